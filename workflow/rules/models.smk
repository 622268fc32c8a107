# Text and models: what every operating point starts from.
rule text:
    output:
        directory(f"{ROOT}/text"),
    log:
        f"{ROOT}/logs/text.log",
    benchmark:
        f"{ROOT}/benchmarks/text.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        "romer text {params.common} > {log} 2>&1"


rule standin:
    input:
        text=f"{ROOT}/text",
    output:
        directory(f"{ROOT}/standin/{{model}}"),
    log:
        f"{ROOT}/logs/standin/{{model}}.log",
    benchmark:
        f"{ROOT}/benchmarks/standin/{{model}}.tsv"
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=lambda wildcards: digest(f"conf/model/{wildcards.model}.yaml", f"resources/standins/{wildcards.model}.*"),
    shell:
        "romer standin model={wildcards.model} {params.common} > {log} 2>&1"
