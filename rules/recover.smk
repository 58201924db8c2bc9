"""Nodes made by training their parent. An interrupted run resumes from its state, which is not an output."""


rule recover:
    input:
        unpack(job_inputs),
    output:
        "<results>/models/{parent}/{part}/manifest.json",
    log:
        "<logs>/recover/{parent}/{part}.log",
    benchmark:
        "<benchmarks>/recover/{parent}/{part}.jsonl"
    wildcard_constraints:
        parent=patterns.node(STUDY),
        part=patterns.training_part(STUDY),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        disk_mb=disk,
        runtime=minutes,
        gpu=recovery_gpus,
        # Its processes communicate within one machine; without this, Slurm gives GPUs wherever some are free.
        nodes=1,
        # Read by the command. Unlike a parameter, a changed resource reruns no node; and `gpu` may be None.
        processes=recovery_gpus,
    params:
        **source_hash_param(),
        step=parameter("step"),
        seed=parameter("seed"),
        budgets=budget_options,
        state=state_folder,
    message:
        "Train {wildcards.parent} by {wildcards.part}."
    shell:
        "python -m coppice recover --node {wildcards.parent}/{wildcards.part} --parent $(dirname {input.parent})"
        " --dense $(dirname {input.dense}) --tokens $(dirname {input.tokens})"
        " --validation $(dirname {input.validation}) --step {params.step:q} {params.budgets} --seed {params.seed}"
        " --gpus {resources.processes} --threads {threads} --state {params.state} --output $(dirname {output}) > {log} 2>&1"
