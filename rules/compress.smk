"""Nodes made by pruning, decomposing, quantizing or compensating their parent."""


rule compress:
    input:
        unpack(job_inputs),
    output:
        "<results>/models/{parent}/{part}/manifest.json",
    log:
        "<logs>/compress/{parent}/{part}.log",
    benchmark:
        "<benchmarks>/compress/{parent}/{part}.jsonl"
    wildcard_constraints:
        parent=patterns.node(STUDY),
        part=patterns.compressing_part(STUDY),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        disk_mb=disk,
        runtime=minutes,
        gpu=1,
    params:
        **source_hash_param(),
        step=parameter("step"),
        seed=parameter("seed"),
        sources=step_options,
    message:
        "Compress {wildcards.parent} by {wildcards.part}."
    shell:
        "python -m coppice compress --node {wildcards.parent}/{wildcards.part} --parent $(dirname {input.parent})"
        " {params.sources:q} --step {params.step:q} --seed {params.seed} --threads {threads}"
        " --output $(dirname {output}) > {log} 2>&1"
