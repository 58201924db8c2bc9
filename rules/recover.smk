"""Nodes made by training their parent. A run that was interrupted goes on from its state, which is no output."""


rule recover:
    input:
        unpack(recover_input),
        parent="<results>/models/{parent}/manifest.json",
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
    resources:
        mem_mb=memory("recover"),
        disk_mb=disk("recover"),
        runtime=minutes("recover"),
        gpu=recovery_gpus,
        # Its processes talk within one machine; without this, Slurm gives GPUs wherever some are free.
        nodes=1,
        # Read by the command. Other than a parameter, a resource that changes makes no node anew; and `gpu` may be None.
        processes=recovery_gpus,
    params:
        **noticed(method_content),
        step=node_step,
        seed=node_seed,
        budgets=node_budgets,
        state=node_state,
    shell:
        "python -m coppice recover --node {wildcards.parent}/{wildcards.part} --parent $(dirname {input.parent})"
        " --dense $(dirname {input.dense}) --tokens $(dirname {input.tokens})"
        " --validation $(dirname {input.validation}) --step {params.step:q} {params.budgets} --seed {params.seed}"
        " --gpus {resources.processes} --threads {threads} --state {params.state} --output $(dirname {output}) > {log} 2>&1"
