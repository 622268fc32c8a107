"""`romer benchmark`: tasks of lm-evaluation-harness on every method, on the same realisations of the noise.

romer benchmark model=deepseek chip=table2 temperature=80                                # what table 2 shows
romer benchmark model=deepseek chip=table2 temperature=80 profile.benchmark.items=null   # the full sets
romer benchmark model=olmoe method=romer 'profile.benchmark.tasks=[piqa,arc_easy]'
"""

import time
from dataclasses import asdict

import pandas as pd

from romer.cost import cost
from romer.errors import InputError
from romer.evaluate import benchmarks
from romer.evaluate.harness import Prepared, Scorer, evaluate, prepare
from romer.evaluate.sweep import points, sweep
from romer.methods import get
from romer.stages import plan
from romer.stages.evaluate import by_hand, record
from romer.stages.job import Job, application
from romer.tracking import Run

WORDS = "word_perplexity"  # a task of the configuration: WikiText where there is one, else the held-out leads


def named(job: Job, task: str) -> tuple[str, list[dict] | None]:
    """(lm-eval's name, documents) of a task of the configuration; None for documents that come out of the wheel."""
    data, paper = job.cfg.data, job.cfg.profile.name == "paper"
    if task == WORDS:
        task = "wikitext" if data.wikitext_dir or paper else "wikipedia_leads"
    if task == "wikitext":
        if data.wikitext_dir:
            return task, benchmarks.wikitext_documents(data.wikitext_dir)
        if paper:
            return task, benchmarks.wikitext_hub_documents(data.hub.id, data.hub.subset, data.hub.revision)
        raise InputError("task wikitext: data.wikitext_dir is not set, expected a folder with WikiText's *test* file")
    if task == "wikipedia_leads":
        rows = pd.read_json(job.read("text") / "evaluation.jsonl", lines=True, dtype=False)
        if set(rows["part"]) != {"wikipedia"}:
            raise InputError(f"task wikipedia_leads: the text is {rows['part'].iloc[0]}, expected Wikipedia leads")
        return task, benchmarks.lead_documents(list(rows["text"]))
    return task, None


def prepared(job: Job, scorer: Scorer) -> list[Prepared]:
    """The configured tasks with their first items. InputError names an unknown one before any other is read."""
    size = job.config["profile"]["benchmark"]
    known = (*benchmarks.STOCK, WORDS)
    if unknown := [task for task in size["tasks"] if task not in known]:
        raise InputError(f"profile.benchmark.tasks: found {unknown[0]!r}, expected some of {', '.join(known)}")
    return [prepare(scorer, benchmarks.load(*named(job, task)), size["items"]) for task in size["tasks"]]


@application("benchmark")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet (one row a method, realisation, task and metric) and coverage.csv, prints the means."""
    cfg = job.cfg
    wanted = job.methods
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, [name for name, _ in wanted])
    scorer = Scorer(model, tokenizer, cfg.profile.window * cfg.profile.batch, cfg.profile.window)
    tasks = prepared(job, scorer)
    todo = points(fitted, wanted, range(cfg.profile.benchmark.realisations))
    context = {"tasks": {one.task.config.task: one.hash for one in tasks}}
    keys = dict(zip(todo, job.point_keys([p.key for p in todo], context), strict=True))
    missing = [p for p in todo if job.points.get(keys[p]) is None]
    scored = ", ".join(f"{one.task.config.task} {len(one.documents)}" for one in tasks)
    job.say(f"{len(todo) - len(missing)} of {len(todo)} points were finished before; items of a point: {scored}")
    scores: list[dict] = []  # of the point that `sweep` has just measured

    def measure() -> float:
        scores[:] = [asdict(score) for score in evaluate(scorer, tasks)]
        return scores[0]["value"]

    started = time.monotonic()
    for i, (point, _) in enumerate(sweep(model, missing, fitted, noise, job.placement, measure), 1):
        found = {f"{s['task']}/{s['metric']}": s["value"] for s in scores}
        values = found | {"scores": list(scores)}
        job.point(keys[point], f"{point.method}-{point.realisation}", lambda values=values: values)
        left = (time.monotonic() - started) / i * (len(missing) - i)
        line = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        job.say(f"{point.method} {point.options} realisation {point.realisation}: {line} ({left:.0f} s left)")
    rows = []
    for point in todo:
        found = job.points.get(keys[point])
        cells = cost(get(point.method), model, job.placement, fitted, point.options).cells
        for score in found["scores"]:
            task = f"lm_eval:{score.pop('task')}"
            row = record(job, point.method, point.options, task, point.realisation, score["value"], found["run_id"])
            rows.append(row | score | {"cells": cells, "context": scorer.window, "model_context": scorer.max_length})
    records = pd.DataFrame(rows).sort_values(["method", "options", "realisation", "task", "metric"], ignore_index=True)
    with job.write(by_hand(job)) as folder:
        records.to_parquet(folder / "records.parquet", index=False)
        job.write_coverage(model, folder)
    job.points.clear(keys.values())
    means = records.groupby(["method", "task", "metric"], sort=False).value.mean()
    run.summary({"/".join(at): value for at, value in means.items()})
    for task, columns in means.unstack("metric").groupby("task", sort=False):
        shown = columns.droplevel("task").dropna(axis=1)
        print(f"\n{task}\n{shown.to_string(float_format=lambda value: f'{value:.4g}')}")
