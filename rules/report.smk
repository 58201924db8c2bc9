"""Tables and laws as a page."""


localrules:
    report,


rule report:
    input:
        tables=rules.tables.output,
        laws=fits(),
        study="<results>/study.yaml",
    output:
        report("<results>/report/index.html", caption="captions/report.rst", category="Study"),
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.jsonl"
    conda:
        "../envs/coppice.yaml"
    shell:
        "python -m coppice report --study {input.study} --results $(dirname {input.study}) --output $(dirname {output})"
        " > {log} 2>&1"
