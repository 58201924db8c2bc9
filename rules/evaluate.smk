"""Measurements of a node: all that one evaluation names in one job, with one load of the model."""


rule evaluate:
    input:
        unpack(job_inputs),
    output:
        "<results>/evaluations/{node}/{evaluation}/metrics.json",
    log:
        "<logs>/evaluate/{node}/{evaluation}.log",
    benchmark:
        "<benchmarks>/evaluate/{node}/{evaluation}.jsonl"
    wildcard_constraints:
        evaluation=patterns.evaluation(STUDY, "quality"),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        disk_mb=disk,
        runtime=minutes,
        gpu=1,
    params:
        evaluation=parameter("evaluation"),
        sources=measurement_options,
    message:
        "Evaluate {wildcards.node} by {wildcards.evaluation}."
    shell:
        "python -m coppice evaluate --node {wildcards.node} --model $(dirname {input.model}) {params.sources}"
        " --name {wildcards.evaluation} --evaluation {params.evaluation:q} --threads {threads}"
        " --output $(dirname {output}) > {log} 2>&1"


use rule evaluate as connectivity with:
    wildcard_constraints:
        evaluation=patterns.evaluation(STUDY, "connectivity"),


use rule evaluate as cost with:
    wildcard_constraints:
        evaluation=patterns.evaluation(STUDY, "cost"),
    # Nothing else may run while time is measured.
    threads: all_cores()
