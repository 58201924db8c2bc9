"""All results of the study as Parquet, and the targets up to there."""

TABLES = ["nodes", "metrics", "items", "curves", "costs", "comparisons", "signals", "failures"]


localrules:
    checkpoints,
    evaluations,
    tables,


rule checkpoints:
    input:
        checkpoints(),


rule evaluations:
    input:
        metrics(),


rule tables:
    input:
        checkpoints(),
        metrics(),
        token_sets(),
        study="<results>/study.yaml",
    output:
        collect("<results>/tables/{table}.parquet", table=TABLES),
    log:
        "<logs>/tables.log",
    benchmark:
        "<benchmarks>/tables.jsonl"
    conda:
        "../envs/coppice.yaml"
    shell:
        "python -m coppice tables --study {input.study} --results $(dirname {input.study})"
        " --output $(dirname {input.study})/tables > {log} 2>&1"
