"""All results of the study as Parquet, and the targets up to there."""


localrules:
    checkpoints,
    evaluations,
    tables,


rule checkpoints:
    input:
        in_results(JOBS.checkpoints),


rule evaluations:
    input:
        in_results(JOBS.metrics),


rule tables:
    input:
        **outputs_read(JOBS.tables),
    output:
        in_results(JOBS.tables.outputs),
    log:
        "<logs>/tables.log",
    benchmark:
        "<benchmarks>/tables.jsonl"
    conda:
        "../envs/coppice.yaml"
    message:
        "Gather the tables."
    shell:
        "python -m coppice tables --study {input.study} --results $(dirname {input.study})"
        " --output $(dirname {input.study})/tables > {log} 2>&1"
