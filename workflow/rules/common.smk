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
    return {k: v for k, v in section.items() if k not in ("what", "heatmap", "tokens_per_second", "seconds_per_job")}


PROFILE = conf("profile", config["profile"])
ROOT = f"{config['results']}/{PROFILE['name']}"
LIBRARY = digest("romer/*.py", "romer/[!r]*/**/*.py", "romer/published/*.csv")  # all but romer/report
CONF = [shown(PROFILE), digest("conf/chip/*.yaml", "conf/method/*.yaml", "conf/t*/*.yaml", "conf/config.yaml")]
COMMON = f"pipeline=true profile={config['profile']} results={config['results']} {config['overrides']}".strip()
ROMER = "python -m romer.cli"
WIKITEXT = re.findall(r"data\.wikitext_dir=(\S+)", config["overrides"])
POINTS = [
    (chip, model, temperature)
    for chip in PROFILE["chips"]
    for model in conf("chip", chip)["models"]
    if model in PROFILE["models"]
    for temperature in conf("chip", chip)["temperatures"]
]
MODELS = [*PROFILE["reference_models"], *PROFILE["models"]]


# One thread a job, whatever share of the scheduler's cores it takes; the tracking mode is no reason to run a job again.
shell.prefix(f"export OMP_NUM_THREADS=1 ROMER_TRACKING={config['tracking']}; ")


def share(wildcards):
    """Scheduler cores of one job: --cores are divided by the machine's real ones, a job computes on one thread."""
    return max(1, (workflow.cores or 1) // (os.cpu_count() or 1))


def at_points(pattern, chips=None):
    """`pattern` with the wildcards of every operating point filled in."""
    return [
        pattern.format(chip=chip, model=model, temperature=temperature)
        for chip, model, temperature in POINTS
        if chips is None or chip in chips
    ]


def estimate(cores):
    """Minutes that the whole profile takes, from its token counts and the measured speed that it states."""
    size = PROFILE
    noisy, grid = 4, len(size["ablate"]["n_replace"]) + len(size["ablate"]["strength"]) - 1
    tokens = len(MODELS) * (size["quality"]["tokens"] + 60 * size["quality"]["piqa_items"])
    for chip, _, _ in POINTS:
        tokens += 6 * size["calibrate"]["realisations"] * size["calibrate"]["tokens"]
        tokens += (2 + size["profiling"]["realisations"]) * size["profiling"]["tokens"]
        candidates = len(size["plan"]["n_replace"]) + len(size["plan"]["strength"])
        tokens += candidates * size["plan"]["realisations"] * size["plan"]["tokens"]
        if chip in size["evaluated_chips"]:
            tokens += (1 + noisy * size["realisations"]) * size["evaluate"]["tokens"]
        if chip in size["ablated_chips"]:
            tokens += (1 + grid * size["realisations"]) * size["ablate"]["tokens"]
    jobs = len(MODELS) + 4 * len(POINTS)
    parallel = min(cores or 1, os.cpu_count() or 1)
    return (tokens / size["tokens_per_second"] + size["seconds_per_job"] * jobs) / parallel / 60


onstart:
    print(f"profile {PROFILE['name']}: about {estimate(workflow.cores):.0f} minutes when started from nothing")


OPERATING_POINT = "{chip}/{model}/{temperature}"
AT = "model={wildcards.model} chip={wildcards.chip} temperature={wildcards.temperature}"


wildcard_constraints:
    chip="|".join(PROFILE["chips"]),
    model="|".join(MODELS),
    temperature=r"\d+",
