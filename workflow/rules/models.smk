# Text and models: what every operating point starts from.
rule text:
    input:
        [f for folder in WIKITEXT for f in Path(folder).expanduser().glob("*.*")],
    output:
        directory(f"{ROOT}/text"),
    log:
        f"{ROOT}/logs/text.log",
    benchmark:
        f"{ROOT}/benchmarks/text.tsv"
    priority: 100
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
        f"{ROMER} text {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule standin:
    input:
        text=f"{ROOT}/text",
    output:
        directory(f"{ROOT}/standin/{{model}}"),
    log:
        f"{ROOT}/logs/standin/{{model}}.log",
    benchmark:
        f"{ROOT}/benchmarks/standin/{{model}}.tsv"
    priority: 100
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=60,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
        model=lambda wildcards: digest(f"conf/model/{wildcards.model}.yaml", f"resources/standins/{wildcards.model}.*"),
    shell:
        f"{ROMER} standin model={{wildcards.model}} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"
