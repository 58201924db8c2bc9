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
        tables=subpath(input[0], parent=True),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice fit --law {params.law} --tables {params.tables:q} --options {params.options:q}"
        " --output {params.directory:q} > {log:q} 2>&1"
