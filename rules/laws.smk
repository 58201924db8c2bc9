"""Formulas fitted to the tables."""


localrules:
    laws,


rule laws:
    input:
        fits(),


rule fit:
    input:
        tables=rules.tables.output,
        law=law_files,
    output:
        fit="<results>/laws/{law}/fit.json",
        points="<results>/laws/{law}/points.parquet",
        samples="<results>/laws/{law}/samples.parquet",
        figure=report("<results>/laws/{law}/fit.svg", caption="captions/law.rst", category="Laws", subcategory="{law}"),
    log:
        "<logs>/fit/{law}.log",
    benchmark:
        "<benchmarks>/fit/{law}.jsonl"
    wildcard_constraints:
        law=alternation(STUDY.laws),
    conda:
        "../envs/coppice.yaml"
    threads: 2
    resources:
        mem_mb=4_000,
        runtime=minutes("fit"),
    params:
        **noticed(law_content),
        law=law_name,
        options=law_options,
    shell:
        "python -m coppice fit --law {params.law} --tables $(dirname {input.tables[0]}) --options {params.options:q}"
        " --threads {threads} --output $(dirname {output.fit}) > {log} 2>&1"
