"""Tables and laws as a page."""


localrules:
    report,


rule report:
    input:
        **outputs_read(JOBS.report),
    output:
        page=report("<results>/report/index.html", caption="captions/report.rst", category="Study"),
        frontier=report("<results>/report/frontier.svg", caption="captions/frontier.rst", category="Figures"),
        curves=report("<results>/report/curves.svg", caption="captions/curves.rst", category="Figures"),
        layers=report("<results>/report/layers.svg", caption="captions/layers.rst", category="Figures"),
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.jsonl"
    conda:
        "../envs/coppice.yaml"
    message:
        "Write the report."
    shell:
        "python -m coppice report --study {input.study} --results $(dirname {input.study})"
        " --output $(dirname {output.page}) > {log} 2>&1"
