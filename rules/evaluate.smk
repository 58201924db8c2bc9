"""Measurements of a node: all that one evaluation names in one job, with one load of the model."""


rule evaluate:
    input:
        model="<results>/models/{node}/manifest.json",
        tokens=evaluation_tokens,
    output:
        "<results>/evaluations/{node}/{evaluation}/metrics.json",
    log:
        "<logs>/evaluate/{node}/{evaluation}.log",
    benchmark:
        "<benchmarks>/evaluate/{node}/{evaluation}.jsonl"
    wildcard_constraints:
        evaluation=evaluation_pattern("quality"),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory("evaluate"),
        disk_mb=disk("evaluate"),
        runtime=minutes("evaluate"),
        gpu=1,
    params:
        evaluation=evaluation_options,
        protocols=protocol_sources,
    shell:
        "python -m coppice evaluate --node {wildcards.node} --model $(dirname {input.model})"
        " --name {wildcards.evaluation} --evaluation {params.evaluation:q} {params.protocols} --threads {threads}"
        " --output $(dirname {output}) > {log} 2>&1"


rule connectivity:
    input:
        model="<results>/models/{node}/manifest.json",
        other=twin_checkpoint,
        tokens=evaluation_tokens,
    output:
        "<results>/evaluations/{node}/{evaluation}/metrics.json",
    log:
        "<logs>/evaluate/{node}/{evaluation}.log",
    benchmark:
        "<benchmarks>/evaluate/{node}/{evaluation}.jsonl"
    wildcard_constraints:
        evaluation=evaluation_pattern("connectivity"),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    resources:
        mem_mb=memory("evaluate"),
        disk_mb=disk("evaluate"),
        runtime=minutes("evaluate"),
        gpu=1,
    params:
        evaluation=evaluation_options,
        protocols=protocol_sources,
    shell:
        "python -m coppice evaluate --node {wildcards.node} --model $(dirname {input.model})"
        " --other $(dirname {input.other}) --name {wildcards.evaluation} --evaluation {params.evaluation:q}"
        " {params.protocols} --threads {threads} --output $(dirname {output}) > {log} 2>&1"


rule cost:
    input:
        model="<results>/models/{node}/manifest.json",
    output:
        "<results>/evaluations/{node}/{evaluation}/metrics.json",
    log:
        "<logs>/evaluate/{node}/{evaluation}.log",
    benchmark:
        "<benchmarks>/evaluate/{node}/{evaluation}.jsonl"
    wildcard_constraints:
        evaluation=evaluation_pattern("cost"),
    conda:
        "../envs/coppice.yaml"
    # Nothing else may run while time is measured.
    threads: all_cores()
    resources:
        mem_mb=memory("evaluate"),
        disk_mb=disk("evaluate"),
        runtime=minutes("evaluate"),
        gpu=1,
    params:
        evaluation=evaluation_options,
    shell:
        "python -m coppice evaluate --node {wildcards.node} --model $(dirname {input.model})"
        " --name {wildcards.evaluation} --evaluation {params.evaluation:q} --threads {threads}"
        " --output $(dirname {output}) > {log} 2>&1"
