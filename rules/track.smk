"""Results mirrored to MLflow."""


localrules:
    track,


rule track:
    input:
        checkpoints(),
        metrics(),
        token_sets(),
        tables=rules.tables.output,
        laws=fits(),
        report=rules.report.output.page,
        study="<results>/study.yaml",
    output:
        "<results>/tracking/runs.json",
    log:
        "<logs>/track.log",
    benchmark:
        "<benchmarks>/track.jsonl"
    conda:
        "../envs/coppice.yaml"
    params:
        uri=tracking_uri(),
    shell:
        "python -m coppice track --study {input.study} --results $(dirname {input.study}) --uri {params.uri:q}"
        " --output {output} > {log} 2>&1"


# Failures become rows of the tables and runs of the tracker; the next run makes the tables anew.
onerror:
    shell("{command}", command=partial_results(log))
