# The operating points of a profile, and how a rule calls its stage.
import hashlib
import os
import re
from pathlib import Path

import yaml
from snakemake.utils import validate

validate(config, "../schemas/config.schema.yaml")


def conf(group, name):
    """One choice of a Hydra group, as plain values."""
    return yaml.safe_load(Path(workflow.basedir, "conf", group, f"{name}.yaml").read_text())


def digest(*patterns):
    """sha256 of files of the checkout: a rule's parameter, so that a change of them runs the rule again."""
    found = hashlib.sha256()
    for file in sorted(f for p in patterns for f in Path(workflow.basedir).glob(p)):
        found.update(file.read_bytes())
    return found.hexdigest()


def shown(section):
    """The profile without what only words and estimates depend on."""
    return {
        k: v
        for k, v in section.items()
        if k
        not in (
            "what",
            "heatmap",
            "frontier",
            "tokens_per_second",
            "seconds_per_job",
            "seconds_to_program",
            "measured_chips",
            "measured_models",
        )
    }


def chip(wildcards):
    """What a calibration depends on besides the model: the chip's section without its lists, and its tables."""
    section = {k: v for k, v in conf("chip", wildcards.chip).items() if k not in ("models", "temperatures")}
    tables = (
        v["table"] if isinstance(v, dict) else v for v in map(section.get, ("cells", "columns", "end_to_end")) if v
    )
    return [section, digest(*(f"romer/chips/data/{t}.csv" for t in tables)), overridden_files("chip")]


def overridden_files(group):
    """sha256 of the files that overrides of a group name."""
    paths = re.findall(rf"\b{group}\.[\w.]+=([^\s,]+)", config["overrides"])
    return [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths if Path(p).is_file()]


PROFILE = conf("profile", config["profile"])
ROOT = f"{config['results']}/{PROFILE['name']}"
LIBRARY = digest("romer/*.py", "romer/[!r]*/**/*.py", "romer/published/*.csv")  # all but romer/report
CONF = [shown(PROFILE), digest("conf/method/*.yaml", "conf/t*/*.yaml", "conf/config.yaml")]
COMMON = f"pipeline=true profile={config['profile']} results={config['results']} {config['overrides']}".strip()
ROMER = "python -m romer.cli"
WIKITEXT = re.findall(r"data\.wikitext_dir=(\S+)", config["overrides"])


def points(chips, models):
    """(chip, model, temperature) of every operating point of these chips and models."""
    return [
        (chip, model, temperature)
        for chip in chips
        for model in conf("chip", chip)["models"]
        if model in models
        for temperature in PROFILE["temperatures"].get(chip, conf("chip", chip)["temperatures"])
    ]


COSTED = points([PROFILE["costed"]["chip"]], PROFILE["costed"]["models"])
MARKED = points([PROFILE["benchmark"]["chip"]], PROFILE["benchmark"]["models"])
PROBED = [(PROFILE["probe"]["chip"], model, PROFILE["probe"]["temperature"]) for model in PROFILE["probe"]["models"]]
POINTS = list(dict.fromkeys(points(PROFILE["chips"], PROFILE["models"]) + COSTED + MARKED + PROBED))
DEFAULTS = yaml.safe_load(Path(workflow.basedir, "conf/config.yaml").read_text())
CONTINUED = [
    (PROFILE["generate"]["chip"], m, PROFILE["generate"]["temperature"]) for m in PROFILE["generate"]["models"]
]
BESIDE = PROFILE["frontier"]
FRONTIER = [(BESIDE["chip"], model, BESIDE["temperature"]) for model in BESIDE["models"]]
SHEET = next(choice["hardware"] for choice in DEFAULTS["defaults"] if "hardware" in choice)
WORKLOAD = DEFAULTS["workload"]
CALIBRATED = POINTS + points(PROFILE["measured_chips"], PROFILE["measured_models"])
MODELS = [*PROFILE["reference_models"], *PROFILE["models"]]


# One thread a job, whatever share of the scheduler's cores it takes: Snakemake exports that share to every library.
# Large tensors come from a heap that is kept, not from fresh pages each time: a sixth more tokens a second under glibc.
# The tracking mode is no reason to run a job again.
ONE_THREAD = " ".join(f"{library}_NUM_THREADS=1" for library in ("OMP", "MKL", "OPENBLAS", "GOTO", "NUMEXPR"))
KEPT_HEAP = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592"
shell.prefix(f"export {ONE_THREAD} {KEPT_HEAP} ROMER_TRACKING={config['tracking']}; ")


def memory(wildcards):
    """MB of a calibration: cells of a measured chip take more, conductances beside the weights."""
    return PROFILE["mem_mb"] * 7 // 5 if wildcards.chip in PROFILE["measured_chips"] else PROFILE["mem_mb"]


def share(wildcards):
    """Scheduler cores of one job: --cores are divided by the machine's real ones, a job computes on one thread."""
    return max(1, (workflow.cores or 1) // (os.cpu_count() or 1))


def at_points(pattern, chips=None, among=POINTS):
    """`pattern` with the wildcards of every operating point filled in."""
    return [
        pattern.format(chip=chip, model=model, temperature=temperature)
        for chip, model, temperature in among
        if chips is None or chip in chips
    ]


def estimate(cores):
    """Minutes that the whole profile takes, from its token counts and the measured speed that it states."""
    size, methods = PROFILE, conf("method", "all")["defaults"]
    sweep = 1 + len(size["ablate"]["n_replace"]) + len(size["ablate"]["strength"]) - 2
    both = (len(size["ablate"]["n_replace"]) - 1) * (len(size["ablate"]["strength"]) - 1)
    tokens = len(MODELS) * (size["quality"]["tokens"] + 60 * size["quality"]["piqa_items"])
    tokens += 4 * (len(CALIBRATED) - len(POINTS)) * size["calibrate"]["realisations"] * size["calibrate"]["tokens"]
    tokens += 6 * len(CALIBRATED) * size["calibrate"]["realisations"] * size["calibrate"]["tokens"]
    for chip, _, temperature in POINTS:
        tokens += (2 + size["profiling"]["realisations"]) * size["profiling"]["tokens"]
        candidates = len(size["plan"]["n_replace"]) + len(size["plan"]["strength"])
        tokens += candidates * size["plan"]["realisations"] * size["plan"]["tokens"]
        if chip in size["evaluated_chips"]:
            tokens += (
                size["fit"]["tokens"] + (1 + (len(methods) - 1) * size["realisations"]) * size["evaluate"]["tokens"]
            )
        if chip in size["ablated_chips"]:
            joint = size["ablate"]["joint"]
            tokens += (1 + sweep * size["realisations"]) * size["ablate"]["tokens"]
            tokens += (temperature in joint["temperatures"]) * both * joint["realisations"] * size["ablate"]["tokens"]
    probe = size["probe"]
    around = 1 + 3 + 5 + 2 * len(probe["scales"]) + 2 * len(probe["transfer"])  # split, parts, scales, other chips
    for _, model, _ in PROBED:
        shares = len(probe["perturbed"]) if model in probe["perturbed_models"] else 1
        tokens += size["fit"]["tokens"] + (5 + (around + 3 * shares) * probe["realisations"]) * probe["tokens"]
    tokens += (
        len(COSTED) * WORKLOAD["realisations"] * (len(methods) + len(WORKLOAD["n_replace"])) * size["costed"]["tokens"]
    )
    swept = 3 * len(BESIDE["swept"]["budgets"]) + 4 + len(BESIDE["swept"]["copies"]) + 3 * len(BESIDE["scales"])
    elsewhere = len(BESIDE["chips"]) * (len(BESIDE["chip_methods"]) + 1) + 4 * len(BESIDE["drift"]["chips"])
    beside = 1 + len(BESIDE["methods"]) * BESIDE["realisations"] + swept * BESIDE["swept"]["realisations"]
    choice = 9 * (BESIDE["choice"]["realisations"] + len(BESIDE["chips"]) * BESIDE["choice"]["elsewhere"])
    tokens += len(FRONTIER) * (beside + elsewhere * BESIDE["elsewhere"]) * BESIDE["tokens"]
    tokens += len(FRONTIER) * (choice * BESIDE["choice"]["tokens"] + 3 * size["fit"]["tokens"])
    tokens += len(FRONTIER) * size["fit"]["correlations"]
    marks = size["benchmark"]
    tokens += len(MARKED) * (1 + (len(methods) - 1) * marks["realisations"]) * 370 * (marks["items"] or 3000)
    draws = 6 * len(CALIBRATED) * size["calibrate"]["realisations"] + len(POINTS) * (2 + size["plan"]["realisations"])
    draws += len(PROBED) * 12 * probe["realisations"] + len(COSTED) * WORKLOAD["realisations"] * len(methods)
    draws += sum(c in size["evaluated_chips"] for c, _, _ in POINTS) * (len(methods) - 4) * size["realisations"]
    draws += sum(c in size["ablated_chips"] for c, _, _ in POINTS) * size["realisations"]
    draws += len(MARKED) * (len(methods) - 4) * marks["realisations"] + 3 * beside
    jobs = (
        len(MODELS)
        + len(COSTED)
        + len(MARKED)
        + len(CONTINUED)
        + len(FRONTIER)
        + 3 * len(POINTS)
        + len(CALIBRATED)
        + len(PROBED)
    )
    parallel = min(cores or 1, os.cpu_count() or 1)
    seconds = tokens / size["tokens_per_second"] + size["seconds_per_job"] * jobs + size["seconds_to_program"] * draws
    return seconds / parallel / 60


onstart:
    print(f"profile {PROFILE['name']}: about {estimate(workflow.cores):.0f} minutes when started from nothing")


OPERATING_POINT = "{chip}/{model}/{temperature}"
AT = "model={wildcards.model} chip={wildcards.chip} temperature={wildcards.temperature}"


wildcard_constraints:
    chip="|".join(dict.fromkeys(chip for chip, _, _ in CALIBRATED)),
    model="|".join(MODELS),
    temperature=r"\d+",
