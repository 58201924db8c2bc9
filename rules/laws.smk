"""Formulas fitted to the tables."""


localrules:
    laws,


rule laws:
    input:
        fits(),


rule fit:
    input:
        tables=rules.tables.output,
        law=law_file,
    output:
        "<results>/laws/{law}/fit.json",
    log:
        "<logs>/fit/{law}.log",
    benchmark:
        "<benchmarks>/fit/{law}.jsonl"
    wildcard_constraints:
        law=alternation(STUDY.laws),
    conda:
        "../envs/coppice.yaml"
    params:
        law=law_name,
        options=law_options,
    shell:
        "python -m coppice fit --law {params.law} --tables $(dirname {input.tables[0]}) --options {params.options:q}"
        " --output $(dirname {output}) > {log} 2>&1"
