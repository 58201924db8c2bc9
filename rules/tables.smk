"""All results of the study as Parquet, and the targets up to there."""

TABLES = ["nodes", "metrics", "items", "curves", "costs", "failures"]


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
        study="<results>/study.yaml",
    output:
        collect("<results>/tables/{table}.parquet", table=TABLES),
    log:
        "<logs>/tables.log",
    benchmark:
        "<benchmarks>/tables.jsonl"
    conda:
        "../envs/coppice.yaml"
    params:
        results=subpath(input.study, parent=True),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice tables --study {input.study:q} --results {params.results:q} --output {params.directory:q}"
        " > {log:q} 2>&1"
