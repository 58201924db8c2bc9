"""Nodes made by pruning, decomposing, quantizing or compensating their parent."""


rule compress:
    input:
        parent="<results>/models/{parent}/manifest.json",
        statistics=step_statistics,
        tokens=step_tokens,
        reference=step_reference,
        method=method_file,
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
    params:
        node=node_name,
        step=node_step,
        seed=node_seed,
        sources=step_sources,
        parent=subpath(input.parent, parent=True),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice compress --node {params.node:q} --parent {params.parent:q} {params.sources:q}"
        " --step {params.step:q} --seed {params.seed} --threads {threads} --output {params.directory:q} > {log:q} 2>&1"
