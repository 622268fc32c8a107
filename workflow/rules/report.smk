# Tables and figures from everything that was measured.
rule report:
    input:
        text=f"{ROOT}/text",
        models=expand(f"{ROOT}/standin/{{model}}", model=MODELS),
        calibrate=at_points(f"{ROOT}/calibrate/{OPERATING_POINT}", among=CALIBRATED),
        profile=at_points(f"{ROOT}/profile/{OPERATING_POINT}"),
        plan=at_points(f"{ROOT}/plan/{OPERATING_POINT}"),
        evaluate=at_points(f"{ROOT}/evaluate/{OPERATING_POINT}", PROFILE["evaluated_chips"]),
        ablate=at_points(f"{ROOT}/ablate/{OPERATING_POINT}", PROFILE["ablated_chips"]),
        probe=at_points(f"{ROOT}/probe/{OPERATING_POINT}", among=PROBED),
        frontier=at_points(f"{ROOT}/frontier/{OPERATING_POINT}", among=FRONTIER),
        hardware=at_points(f"{ROOT}/hardware/{SHEET}/{OPERATING_POINT}", among=COSTED),
        benchmark=at_points(f"{ROOT}/benchmark/{OPERATING_POINT}", among=MARKED),
        generate=at_points(f"{ROOT}/generate/{OPERATING_POINT}", among=CONTINUED),
    output:
        report(directory(f"{ROOT}/tables"), patterns=["{name}.csv"], category="tables"),
        report(directory(f"{ROOT}/figures"), patterns=["{name}.png"], category="figures"),
        report(directory(f"{ROOT}/claims"), patterns=["{name}.csv"], category="claims"),
        records=f"{ROOT}/records.parquet",
    log:
        f"{ROOT}/logs/report.log",
    benchmark:
        f"{ROOT}/benchmarks/report.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        common=COMMON,
        library=digest("romer/**/*.py", "romer/**/*.csv"),
        conf=PROFILE,
    shell:
        f"{ROMER} report {{params.common}} tracking=$ROMER_TRACKING > {{log}} 2>&1"
