"""Statistics of a node: each kind once, for all steps that start there."""


rule calibrate:
    input:
        model="<results>/models/{node}/manifest.json",
        tokens=calibration_tokens,
    output:
        "<results>/statistics/{node}/{calibration}/{kind}/manifest.json",
    log:
        "<logs>/calibrate/{node}/{calibration}/{kind}.log",
    benchmark:
        "<benchmarks>/calibrate/{node}/{calibration}/{kind}.jsonl"
    wildcard_constraints:
        kind=alternation(KINDS),
    conda:
        "../envs/coppice.yaml"
    threads: 1
    params:
        model=subpath(input.model, parent=True),
        tokens=subpath(input.tokens, parent=True),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m coppice calibrate --model {params.model:q} --tokens {params.tokens:q} --kind {wildcards.kind}"
        " --threads {threads} --output {params.directory:q} > {log:q} 2>&1"
