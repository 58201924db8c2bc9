"""Windows of tokens: one set for each use that a model has of a text."""


localrules:
    tokenize,


rule tokenize:
    input:
        model="<results>/models/{model}/manifest.json",
        text=text_files,
    output:
        "<results>/tokens/{model}/{use}/manifest.json",
    log:
        "<logs>/tokenize/{model}/{use}.log",
    benchmark:
        "<benchmarks>/tokenize/{model}/{use}.jsonl"
    wildcard_constraints:
        use=alternation(USES),
    conda:
        "../envs/coppice.yaml"
    params:
        text=text_source,
        role=text_role,
        windows=text_windows,
        length=text_length,
        packing=text_packing,
        seed=STUDY.seed,
    shell:
        "python -m coppice tokenize --tokenizer $(dirname {input.model}) --text {params.text:q} --role {params.role}"
        " --windows {params.windows} --length {params.length} --seed {params.seed} {params.packing}"
        " --output $(dirname {output}) > {log} 2>&1"
