"""Formulas fitted to the tables."""


localrules:
    laws,


rule laws:
    input:
        in_results(JOBS.fits),


rule fit:
    input:
        unpack(job_inputs),
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
        law=patterns.alternation(STUDY.laws),
    conda:
        "../envs/coppice.yaml"
    threads: 2
    resources:
        mem_mb=4_000,
        runtime=minutes,
    params:
        **source_hash_param(),
        law=parameter("law"),
        options=parameter("options"),
    message:
        "Fit the law {wildcards.law}."
    shell:
        "python -m coppice fit --law {params.law} --tables $(dirname {input.tables[0]}) --options {params.options:q}"
        " --threads {threads} --output $(dirname {output.fit}) > {log} 2>&1"
