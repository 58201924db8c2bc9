"""Dense models, and the study as it is after defaults."""


localrules:
    study,
    root,


rule study:
    input:
        study_files(),
    output:
        "<results>/study.yaml",
    log:
        "<logs>/study.log",
    conda:
        "../envs/coppice.yaml"
    params:
        # The values that count; comments of a file do not.
        fingerprint=fingerprint(effective(STUDY)),
        files=config_files(),
        changes=config_changes(),
    message:
        "Write the effective study."
    shell:
        "python -m coppice study {params.files:q} --config {params.changes:q} --output {output} 2> {log}"


rule root:
    input:
        unpack(job_inputs),
    output:
        "<results>/models/{model}/manifest.json",
    log:
        "<logs>/root/{model}.log",
    benchmark:
        "<benchmarks>/root/{model}.jsonl"
    conda:
        "../envs/coppice.yaml"
    params:
        source=parameter("source"),
        seed=parameter("seed"),
    message:
        "Import the dense model {wildcards.model}."
    shell:
        "python -m coppice root --node {wildcards.model} --source {params.source:q} --seed {params.seed}"
        " --output $(dirname {output}) > {log} 2>&1"
