"""`romer hardware`: time, energy and area of every method on a chip, from the routing of its own evaluation.

    romer hardware model=olmoe temperature=85 chip=table3 hardware=hermes
    romer hardware model=olmoe method=romer hardware=isaac workload.batch=1

Every method is evaluated on held-out text while its routing is recorded; the traces are kept, so that another chip or
batch needs no second evaluation. Costs are those of the model's own shape and, where that is a stand-in's, those of the
paper's checkpoint with routing simulated from the stand-in's load.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from romer import perplexity
from romer.cost import cost
from romer.errors import InputError
from romer.evaluate.sweep import Point, points, sweep
from romer.hardware import (
    SHAPES,
    ChipSheet,
    Deployment,
    ModelShape,
    Trace,
    deployed,
    estimate,
    record,
    shape_of,
    simulate,
    stretch,
)
from romer.hardware.model import PARTS
from romer.hardware.work import Work
from romer.methods import Fitted, get
from romer.replacement import ReplacementPlan
from romer.stages import plan
from romer.stages.evaluate import by_hand
from romer.stages.job import Job, application
from romer.store import canonical_json, code_version, sha256
from romer.tracking import Run

PRINTED = ("method", "options", "time_s", "power_w", *PARTS, "tiles_stored", "tiles_active", "perplexity")


def settings(job: Job) -> dict:
    """The section `workload`. Raises InputError for a field of the wrong kind."""
    found = job.config["workload"]
    for field in ("batch", "tokens", "realisations"):
        if type(value := found[field]) is not int or value < 1:
            raise InputError(f"workload.{field}: found {value!r}, expected a positive integer")
    if type(found["lm_head"]) is not bool:
        raise InputError(f"workload.lm_head: found {found['lm_head']!r}, expected true or false")
    return found


def wanted(job: Job, model, fitted: Fitted, workload: dict) -> dict[Point, bool]:
    """The chosen methods that sit on arrays with noise, and romer at every feasible n of the workload; whether a point
    is a chosen method's own rather than of that grid."""
    named = [(name, options) for name, options in job.methods if get(name).noisy]
    grid = plan.feasible(model, workload["n_replace"]) if "romer" in dict(named) else []
    seeds = range(workload["realisations"])
    found = dict.fromkeys(points(fitted, [("romer", {"n_replace": n}) for n in grid], seeds), False)
    return found | dict.fromkeys(points(fitted, named, seeds), True)


def recorded(path: Path, key: str) -> tuple[Trace, float] | None:
    """The (trace, perplexity) kept at `path`; None where there is none of this key and code."""
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
        if about.get("key") == key and about.get("code") == code_version():
            return Trace.load(path), float(about["perplexity"])
    except (OSError, SafetensorError):
        pass
    return None


def evaluated(
    job: Job, model, fitted: Fitted, ids: torch.Tensor, todo: list[Point]
) -> Iterator[tuple[Point, Trace, float]]:
    """(point, trace, perplexity) of every point; those that an earlier run has left are not repeated."""
    cfg, noise = job.cfg, job.noise()
    window, batch = cfg.profile.window, cfg.profile.batch
    context = {"task": f"ppl:{cfg.task.name}", "tokens": len(ids)}
    keys = dict(zip(todo, job.point_keys([p.key for p in todo], context), strict=True))
    texts = {p: canonical_json(key, "trace") for p, key in keys.items()}
    where = {p: job.root / "traces" / job.where / f"{sha256(text)[:16]}.safetensors" for p, text in texts.items()}
    missing = [p for p in todo if recorded(where[p], texts[p]) is None]
    latest: list[Trace] = []

    def measure() -> float:
        with record(model, window) as recorder:
            value = perplexity(model, ids, window, batch)
        latest[:] = [recorder.trace]
        return value

    for p, value in sweep(model, missing, fitted, noise, job.placement, measure):
        job.point(keys[p], f"{p.method}-{p.realisation}", lambda value=value: {"value": value})
        latest[0].save(where[p], {"key": texts[p], "code": code_version(), "perplexity": repr(value)})
        job.say(f"{p.method} {p.options} realisation {p.realisation}: {value:.4f}")
    job.points.clear(keys.values())
    for p in todo:
        found = recorded(where[p], texts[p])
        if found is None:
            raise InputError(f"{where[p]}: the trace that was just recorded cannot be read")
        yield p, *found


def simulated(job: Job, fitted: Fitted, p: Point, own: Deployment, tokens: int) -> tuple[Trace, Deployment] | None:
    """(trace, deployment) of a point on the paper's checkpoint; None where its routing cannot be simulated.

    Calibrated logits keep their order for λ up to about 0.25, and so does what is chosen: only the load is simulated.
    """
    shape, counts = SHAPES[job.cfg.model.name], fitted.counts if fitted.counts is not None else fitted.activation
    load = stretch(counts.numpy(), shape.moe_layers, shape.experts)
    placed, _ = get(p.method).routing(fitted, p.options)
    if placed is not None and placed.n_replace:
        if placed.form != "split" or shape.experts - placed.n_replace < shape.top_k:
            return None
        placed = ReplacementPlan.fit(torch.from_numpy(load), placed.n_replace)
    trace = simulate(load, shape.top_k, tokens, job.cfg.profile.window, placed, seed=p.realisation)
    return trace, own.stretched(np.asarray(counts), shape.moe_layers, shape.experts)


def cells_of(shape: ModelShape, sheet: ChipSheet, own: Deployment, plain: Deployment) -> float:
    """Cells of a model of this shape, as a multiple of its plain layout's."""
    digital = own.digital_mask(shape.moe_layers, shape.experts).sum()
    return Work(shape, sheet, own).weights_stored(int(digital)) / Work(shape, sheet, plain).weights_stored(0)


def costs(
    job: Job,
    model,
    fitted: Fitted,
    ids: torch.Tensor,
    todo: dict[Point, bool],
    sheet: ChipSheet,
    workload: dict,
) -> pd.DataFrame:
    """One row per point of `todo` (see `wanted`) and shape, with perplexity, cells, and everything that `Estimate`
    says."""
    shape, name, rows = shape_of(model.config), job.cfg.model.name, []
    plain = deployed(get("vanilla"), model, job.placement, fitted, {}, workload["lm_head"])
    for p, trace, value in evaluated(job, model, fitted, ids, list(todo)):
        method = get(p.method)
        own = deployed(method, model, job.placement, fitted, p.options, workload["lm_head"])
        common = {
            "model": name,
            "chip": job.cfg.chip.name,
            "temperature_c": float(job.cfg.temperature.celsius),
            "hardware": sheet.name,
            "method": p.method,
            "options": json.dumps(p.options, sort_keys=True),
            "selected": todo[p],
            "realisation": p.realisation,
            "perplexity": value,
        }
        cells = cost(method, model, job.placement, fitted, p.options).cells
        found = estimate(shape, trace, sheet, own, workload["batch"])
        rows.append(common | {"cells": cells, "shape": "own", "routing": "recorded"} | found.row())
        published = SHAPES.get(name)
        if published is None or job.source.kind == "hub":
            continue
        if (pair := simulated(job, fitted, p, own, workload["tokens"])) is not None:
            cells = cells_of(published, sheet, pair[1], plain)
            found = estimate(published, pair[0], sheet, pair[1], workload["batch"])
            rows.append(common | {"cells": cells, "shape": "checkpoint", "routing": "simulated"} | found.row())
    return pd.DataFrame(rows).sort_values(["shape", "method", "options", "realisation"]).reset_index(drop=True)


@application("hardware")
def main(job: Job, run: Run) -> None:
    """Writes cost.csv (every point and shape) and coverage.csv, and prints the means over realisations."""
    sheet, workload = ChipSheet.load(job.config["hardware"]), settings(job)
    model, tokenizer = job.load()
    fitted = plan.read(job, model, tokenizer, list(job.config["method"]))
    todo = wanted(job, model, fitted, workload)
    ids = job.ids(tokenizer, "evaluation", job.cfg.profile.costed.tokens)
    table = costs(job, model, fitted, ids, todo, sheet, workload)
    with job.write(by_hand(job) or job.root / "hardware" / sheet.name / job.where) as folder:
        table.to_csv(folder / "cost.csv", index=False)
        job.write_coverage(model, folder, [(p.method, p.options, fitted) for p in todo])
    for (shape, routing), rows in table.groupby(["shape", "routing"]):
        means = rows.groupby(["method", "options"], as_index=False).mean(numeric_only=True)
        print(f"\n{job.cfg.model.name} ({shape}, {routing} routing) on {sheet.name}, {rows.tokens.iloc[0]} tokens")
        print(means[list(PRINTED)].to_string(index=False, float_format="%.4g"))
    own = table[table["shape"] == "own"].groupby("method")[["time_s", "power_w", "energy_j"]].mean()
    run.summary({f"{method}/{key}": value for method, row in own.iterrows() for key, value in row.items()})
