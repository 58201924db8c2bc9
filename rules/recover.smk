"""Nodes made by training their parent. A run that was interrupted goes on from its state, which is no output."""


rule recover:
    input:
        parent="<results>/models/{parent}/manifest.json",
        dense=dense_checkpoint,
        tokens=recovery_tokens,
        validation=validation_tokens,
        method=method_file,
    output:
        "<results>/models/{parent}/{part}/manifest.json",
    log:
        "<logs>/recover/{parent}/{part}.log",
    benchmark:
        "<benchmarks>/recover/{parent}/{part}.jsonl"
    wildcard_constraints:
        parent=node_pattern(),
        part=part_pattern(training=True),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    params:
        node=node_name,
        step=node_step,
        seed=node_seed,
        budgets=node_budgets,
        parent=subpath(input.parent, parent=True),
        dense=subpath(input.dense, parent=True),
        tokens=subpath(input.tokens, parent=True),
        validation=subpath(input.validation, parent=True),
        state=node_state,
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice recover --node {params.node:q} --parent {params.parent:q} --dense {params.dense:q}"
        " --tokens {params.tokens:q} --validation {params.validation:q} --step {params.step:q}"
        " {params.budgets:q} --seed {params.seed} --threads {threads} --state {params.state:q}"
        " --output {params.directory:q} > {log:q} 2>&1"
