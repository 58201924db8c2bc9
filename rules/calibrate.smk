"""Statistics of a node: each kind once, for all steps that start there."""


rule calibrate:
    input:
        unpack(job_inputs),
    output:
        "<results>/statistics/{node}/{calibration}/{kind}/manifest.json",
    log:
        "<logs>/calibrate/{node}/{calibration}/{kind}.log",
    benchmark:
        "<benchmarks>/calibrate/{node}/{calibration}/{kind}.jsonl"
    wildcard_constraints:
        kind=patterns.alternation(KINDS),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        disk_mb=disk,
        runtime=minutes,
        gpu=1,
    message:
        "Gather {wildcards.kind} of {wildcards.node} over the calibration {wildcards.calibration}."
    shell:
        "python -m coppice calibrate --model $(dirname {input.model}) --tokens $(dirname {input.tokens})"
        " --kind {wildcards.kind} --threads {threads} --output $(dirname {output}) > {log} 2>&1"
