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
    params:
        results=subpath(input.study, parent=True),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice report --study {input.study:q} --results {params.results:q} --output {params.directory:q}"
        " > {log:q} 2>&1"
