"""`romer evaluate`: token perplexity of every method on held-out text, on the same realisations.

romer evaluate model=olmoe temperature=80                     # all methods; what the pipeline runs
romer evaluate -m model=olmoe,qwen3 temperature=25,80 method=vanilla,romer
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from torch import nn

from romer import perplexity
from romer.evaluate.perplexity import predicted
from romer.evaluate.sweep import points, sweep
from romer.methods import get
from romer.stages import plan
from romer.stages.job import Job, application
from romer.store import canonical_json, sha256
from romer.tracking import Run


def measure(
    job: Job, wanted: Callable[[nn.Module], list[tuple[str, dict]]], task: str, tokens: int
) -> tuple[pd.DataFrame, Callable[[Path | None], None]]:
    """(records, publish): every (method, options) wanted of the model on every realisation; resumes a killed run.

    publish(folder) writes records.parquet and coverage.csv and forgets the finished points.
    """
    cfg = job.cfg
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job)
    ids = job.ids(tokenizer, "evaluation", tokens)
    context = {"task": task, "tokens": tokens}

    def compute(missing):
        return sweep(
            model,
            missing,
            fitted,
            noise,
            job.placement,
            lambda: perplexity(model, ids, cfg.profile.window, cfg.profile.batch),
        )

    todo = points(fitted, wanted(model), range(cfg.profile.realisations))
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
            "tokens": predicted(tokens, cfg.profile.window),
            "cells": get(p.method).cells,
            "run_id": run_id,
        }
        for p, value, run_id in job.resumed(todo, context, compute)
    ]
    records = pd.DataFrame(rows).sort_values(["method", "options", "realisation"]).reset_index(drop=True)

    def publish(folder: Path | None) -> None:
        with job.write(folder) as scratch:
            records.to_parquet(scratch / "records.parquet", index=False)
            job.write_coverage(model, scratch)
        job.points.clear(job.point_keys([p.key for p in todo], context))

    return records, publish


def by_hand(job: Job) -> Path | None:
    """Where a run by hand writes: a folder of its own, so that only the pipeline's runs reach the report."""
    if job.cfg.pipeline:
        return None
    choice = {k: v for k, v in job.config.items() if k not in ("tracking", "results", "resources", "standin", "device")}
    name = "-".join(job.config["method"])
    return job.root / "selected" / job.stage / job.where / f"{name}-{sha256(canonical_json(choice, 'choice'))[:8]}"


@application("evaluate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet and coverage.csv, and prints the means."""
    wanted = [
        (name, {key: value for key, value in options.items() if value is not None})
        for name, options in job.config["method"].items()
    ]
    records, publish = measure(job, lambda model: wanted, f"ppl:{job.cfg.task.name}", job.cfg.profile.evaluate.tokens)
    publish(by_hand(job))
    means = records.groupby("method").value.agg(["mean", "min", "max", "count"])
    run.summary({f"{method}/perplexity": row["mean"] for method, row in means.iterrows()})
    print(means.to_string(float_format="%.3f"))
