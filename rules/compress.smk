"""Nodes made by pruning, decomposing, quantizing or compensating their parent."""


rule compress:
    input:
        unpack(compress_input),
        parent="<results>/models/{parent}/manifest.json",
    output:
        "<results>/models/{parent}/{part}/manifest.json",
    log:
        "<logs>/compress/{parent}/{part}.log",
    benchmark:
        "<benchmarks>/compress/{parent}/{part}.jsonl"
    wildcard_constraints:
        parent=node_pattern(),
        part=part_pattern(training=False),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory("compress"),
        disk_mb=disk("compress"),
        runtime=minutes("compress"),
        gpu=1,
    params:
        **noticed(method_content),
        step=node_step,
        seed=node_seed,
        sources=step_sources,
    shell:
        "python -m coppice compress --node {wildcards.parent}/{wildcards.part} --parent $(dirname {input.parent})"
        " {params.sources:q} --step {params.step:q} --seed {params.seed} --threads {threads}"
        " --output $(dirname {output}) > {log} 2>&1"
