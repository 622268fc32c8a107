# One process per (model, operating point, stage); each loops over its points.
# Priorities: what others wait for, then the longest first, so that no core idles at the end.
rule calibrate:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
    output:
        directory(f"{ROOT}/calibrate/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/calibrate/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/calibrate/{OPERATING_POINT}.tsv"
    priority: 90
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=memory,
        gpu=PROFILE["gpus"],
        runtime=120,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
        chip=chip,
    shell:
        f"{ROMER} calibrate {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule profile:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/profile/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/profile/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/profile/{OPERATING_POINT}.tsv"
    priority: 80
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=120,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} profile {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule plan:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/plan/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/plan/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/plan/{OPERATING_POINT}.tsv"
    priority: 70
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=240,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} plan {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule evaluate:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/evaluate/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/evaluate/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/evaluate/{OPERATING_POINT}.tsv"
    priority: 40
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} evaluate {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule ablate:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/ablate/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/ablate/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/ablate/{OPERATING_POINT}.tsv"
    priority: 40
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} ablate {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule probe:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/probe/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/probe/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/probe/{OPERATING_POINT}.tsv"
    priority: 50
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} probe {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule frontier:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/frontier/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/frontier/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/frontier/{OPERATING_POINT}.tsv"
    priority: 60
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
        beside=BESIDE,
        sheet=digest(f"conf/hardware/{SHEET}.yaml"),
    shell:
        f"{ROMER} frontier {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule hardware:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/hardware/{SHEET}/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/hardware/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/hardware/{OPERATING_POINT}.tsv"
    priority: 30
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
        sheet=digest(f"conf/hardware/{SHEET}.yaml"),
    shell:
        f"{ROMER} hardware {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule benchmark:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/benchmark/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/benchmark/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/benchmark/{OPERATING_POINT}.tsv"
    priority: 60
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} benchmark {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"


rule generate:
    input:
        text=f"{ROOT}/text",
        standin=f"{ROOT}/standin/{{model}}",
        calibrate=f"{ROOT}/calibrate/{OPERATING_POINT}",
        profile=f"{ROOT}/profile/{OPERATING_POINT}",
        plan=f"{ROOT}/plan/{OPERATING_POINT}",
    output:
        directory(f"{ROOT}/generate/{OPERATING_POINT}"),
    log:
        f"{ROOT}/logs/generate/{OPERATING_POINT}.log",
    benchmark:
        f"{ROOT}/benchmarks/generate/{OPERATING_POINT}.tsv"
    priority: 20
    conda:
        "../../environment.yml"
    threads: share
    resources:
        mem_mb=PROFILE["mem_mb"],
        gpu=PROFILE["gpus"],
        runtime=480,
    params:
        common=COMMON,
        library=LIBRARY,
        conf=CONF,
    shell:
        f"{ROMER} generate {AT} {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"
