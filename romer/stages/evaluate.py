"""`romer evaluate`: token perplexity of every method on held-out text, on the same realisations; or, by hand, tasks of
lm-evaluation-harness, scored as `romer benchmark` scores them.

romer evaluate model=olmoe temperature=80                     # all methods; what the pipeline runs
romer evaluate -m model=olmoe,qwen3 temperature=25,80 method=vanilla,romer
romer evaluate model=olmoe temperature=80 method=clean,vanilla,romer task=piqa,arc_easy
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from torch import nn

from romer import perplexity
from romer.cost import cost
from romer.errors import InputError
from romer.evaluate.perplexity import predicted
from romer.evaluate.sweep import Point, points, sweep
from romer.methods import Fitted, get
from romer.stages import plan
from romer.stages.job import Job, application
from romer.store import canonical_json, sha256
from romer.tracking import Run


def measure(
    job: Job, names: Iterable[str], wanted: Callable[[nn.Module, Fitted], list[Point]], task: str, tokens: int
) -> tuple[pd.DataFrame, Callable[[Path | None], None]]:
    """(records, publish): the points wanted of the methods `names`; resumes a killed run.

    publish(folder) writes records.parquet, cost.csv and coverage.csv and forgets the finished points.
    """
    cfg = job.cfg
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, names)
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

    todo = wanted(model, fitted)
    settings = {(p.method, *sorted(p.options.items())): p for p in todo}  # one point of each, whatever its realisation
    costs = {key: cost(get(p.method), model, job.placement, fitted, p.options) for key, p in settings.items()}
    rows = [
        record(job, p.method, p.options, task, p.realisation, value, run_id)
        | {"cells": costs[p.method, *sorted(p.options.items())].cells, "tokens": predicted(tokens, cfg.profile.window)}
        for p, value, run_id in job.resumed(todo, context, compute)
    ]
    records = in_order(rows)

    def publish(folder: Path | None) -> None:
        with job.write(folder) as scratch:
            records.to_parquet(scratch / "records.parquet", index=False)
            lines = [
                {"method": name, "options": json.dumps(dict(options), sort_keys=True), **asdict(found)}
                for (name, *options), found in costs.items()
            ]
            pd.DataFrame(lines).to_csv(scratch / "cost.csv", index=False)
            job.write_coverage(model, scratch, [(p.method, p.options, fitted) for p in todo])
        job.points.clear(job.point_keys([p.key for p in todo], context))

    return records, publish


COLUMNS = "model chip temperature_c method options task metric realisation value tokens cells run_id".split()


def record(job: Job, method: str, options: dict, task: str, realisation: int, value: float, run_id: str) -> dict:
    """One row of the records, without tokens and cells."""
    return {
        "model": job.cfg.model.name,
        "chip": job.cfg.chip.name,
        "temperature_c": float(job.cfg.temperature.celsius),
        "method": method,
        "options": json.dumps(options, sort_keys=True),
        "task": task,
        "metric": "token_perplexity",
        "realisation": realisation,
        "value": value,
        "run_id": run_id,
    }


def in_order(rows: list[dict]) -> pd.DataFrame:
    """Records in an order that does not depend on when they were measured."""
    keys = ["task", "chip", "method", "options", "realisation"]
    return pd.DataFrame(rows)[COLUMNS].sort_values(keys).reset_index(drop=True)


def by_hand(job: Job) -> Path | None:
    """Where a run by hand writes: a folder of its own, so that only the pipeline's runs reach the report."""
    if job.cfg.pipeline:
        return None
    choice = {k: v for k, v in job.config.items() if k not in ("tracking", "results", "resources", "standin", "device")}
    name = "-".join(job.config["method"])
    return job.root / "selected" / job.stage / job.where / f"{name}-{sha256(canonical_json(choice, 'choice'))[:8]}"


@application("evaluate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet, cost.csv and coverage.csv; prints means. InputError for heldout beside lm-eval tasks."""
    task = job.config["task"]
    if "tasks" in task:
        if "name" in task:
            raise InputError(f"task: found {task['name']} beside {', '.join(task['tasks'])}, expected one or the other")
        from romer.stages import benchmark  # lm-eval; and it imports this module

        return benchmark.score(job, run, task["tasks"])
    wanted = job.methods
    size = job.cfg.profile
    records, publish = measure(
        job,
        [name for name, _ in wanted],
        lambda model, fitted: points(fitted, wanted, range(size.realisations)),
        f"ppl:{task['name']}",
        size.evaluate.tokens,
    )
    publish(by_hand(job))
    means = records.groupby("method").value.agg(["mean", "min", "max", "count"])
    run.summary({f"{method}/perplexity": row["mean"] for method, row in means.iterrows()})
    print(means.to_string(float_format="%.3f"))
