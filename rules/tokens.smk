"""Windows of tokens: one set for each use that a model has of a text."""


localrules:
    tokenize,


rule tokenize:
    input:
        unpack(job_inputs),
    output:
        "<results>/tokens/{model}/{use}/manifest.json",
    log:
        "<logs>/tokenize/{model}/{use}.log",
    benchmark:
        "<benchmarks>/tokenize/{model}/{use}.jsonl"
    wildcard_constraints:
        use=patterns.alternation(JOBS.uses),
    conda:
        "../envs/coppice.yaml"
    params:
        text=parameter("text"),
        role=parameter("role"),
        windows=parameter("windows"),
        length=parameter("length"),
        packing=parameter("packing"),
        seed=parameter("seed"),
    message:
        "Cut windows of {wildcards.model} for {wildcards.use}."
    shell:
        "python -m coppice tokenize --tokenizer $(dirname {input.model}) --text {params.text:q} --role {params.role}"
        " --windows {params.windows} --length {params.length} --seed {params.seed} {params.packing}"
        " --output $(dirname {output}) > {log} 2>&1"
