"""Results mirrored to MLflow."""


localrules:
    track,


rule track:
    input:
        **outputs_read(JOBS.track),
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
    message:
        "Mirror the results to MLflow."
    shell:
        "python -m coppice track --study {input.study} --results $(dirname {input.study}) --uri {params.uri:q}"
        " --output {output} > {log} 2>&1"


# Failures become rows of the tables and runs of the tracker; the next run recomputes the tables.
onerror:
    shell("{command}", command=salvage_command(log))
