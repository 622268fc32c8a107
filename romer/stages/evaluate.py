"""`romer evaluate`: token perplexity of every method on held-out text, on the same realisations.

romer evaluate model=olmoe temperature=80                     # all methods; what the pipeline runs
romer evaluate -m model=olmoe,qwen3 temperature=25,80 method=vanilla,romer
"""

import json
from pathlib import Path

import pandas as pd
import yaml

from romer import perplexity
from romer.cli import conf_folder
from romer.evaluate.sweep import points, sweep
from romer.methods import get
from romer.stages import plan
from romer.stages.job import Job, application
from romer.store import canonical_json, sha256
from romer.tracking import Run


def measure(job: Job, wanted: list[tuple[str, dict]], task: str, tokens: int) -> tuple[pd.DataFrame, object]:
    """(records, model): every wanted (method, options) on every realisation, resuming where an earlier run was
    killed."""
    cfg = job.cfg
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job)
    ids = job.ids(tokenizer, "evaluation", tokens)

    def compute(missing):
        return sweep(
            model,
            missing,
            fitted,
            noise,
            job.placement,
            lambda: perplexity(model, ids, cfg.profile.window, cfg.profile.batch),
        )

    todo = points(fitted, wanted, range(cfg.profile.realisations))
    rows = [
        {
            "model": cfg.model.name,
            "chip": cfg.chip.name,
            "temperature_c": float(cfg.temperature.celsius),
            "method": p.method,
            "options": json.dumps(p.options, sort_keys=True),
            "task": task,
            "metric": "token_perplexity",
            "realisation": p.realisation,
            "value": value,
            "tokens": tokens,
            "cells": get(p.method).cells,
            "run_id": run_id,
        }
        for p, value, run_id in job.resumed(todo, {"task": task, "tokens": tokens}, compute)
    ]
    order = ["method", "options", "realisation"]
    return pd.DataFrame(rows).sort_values(order).reset_index(drop=True), model


def publish(job: Job, records: pd.DataFrame, model, folder: Path | None = None) -> None:
    """Writes records.parquet and coverage.csv and forgets the finished points."""
    with job.write(folder) as scratch:
        records.to_parquet(scratch / "records.parquet", index=False)
        job.write_coverage(model, scratch)
    job.points.clear()


def default_methods() -> dict:
    """conf/method/all: every method with its default options, as the pipeline runs them."""
    folder = conf_folder() / "method"
    names = yaml.safe_load((folder / "all.yaml").read_text())["defaults"]
    return {
        key: value for name in names for key, value in yaml.safe_load((folder / f"{name}.yaml").read_text()).items()
    }


@application("evaluate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet and coverage.csv; what differs from the pipeline's own choice gets its own folder."""
    wanted = [
        (name, {key: value for key, value in options.items() if value is not None})
        for name, options in job.config["method"].items()
    ]
    records, model = measure(job, wanted, f"ppl:{job.cfg.task.name}", job.cfg.profile.evaluate.tokens)
    folder = None
    if job.cfg.noise.sigma_dev is not None or job.config["method"] != default_methods():
        choice = sha256(canonical_json({"method": job.config["method"], "noise": job.config["noise"]}, "choice"))[:8]
        folder = job.root / "selected" / job.where / f"{'-'.join(name for name, _ in wanted)}-{choice}"
    publish(job, records, model, folder)
    means = records.groupby("method").value.agg(["mean", "min", "max", "count"])
    run.summary({f"{method}/perplexity": row["mean"] for method, row in means.iterrows()})
    print(means.to_string(float_format="%.3f"))
