"""Statistics of a node: each kind once, for all steps that start there."""


rule calibrate:
    input:
        model="<results>/models/{node}/manifest.json",
        tokens=calibration_tokens,
    output:
        "<results>/statistics/{node}/{calibration}/{kind}/manifest.json",
    log:
        "<logs>/calibrate/{node}/{calibration}/{kind}.log",
    benchmark:
        "<benchmarks>/calibrate/{node}/{calibration}/{kind}.jsonl"
    wildcard_constraints:
        kind=alternation(KINDS),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory("calibrate"),
        disk_mb=disk("calibrate"),
        runtime=minutes("calibrate"),
        gpu=1,
    shell:
        "python -m coppice calibrate --model $(dirname {input.model}) --tokens $(dirname {input.tokens})"
        " --kind {wildcards.kind} --threads {threads} --output $(dirname {output}) > {log} 2>&1"
