"""`romer frontier`: how much of the noise's loss methods take back, for which cells, digital numbers and energy.

Experiments around one operating point, each on the same realisations:
- ppl:choice    on calibration text and its own realisations: which parts of romer_plus help
- ppl:methods   every method of `profile.frontier.methods`
- ppl:budget    digital numbers from none to many, and copies
- ppl:read      the corrected ones with errors in what is read back
- ppl:scaled    the noise stronger or weaker than what ranks were chosen at
- ppl:limits    what is left of the loss: the clean model's choice of experts, noise in one part alone, uniform ranks
- ppl:chips     measured chips' own errors, with ranks that were chosen there and with those that were chosen here
- ppl:drift     such a chip later on, its corrections refitted or left as they were after programming
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import pandas as pd
from torch import nn

from romer import InputError, perplexity
from romer.chips.pcm import Pcm
from romer.cost import cost
from romer.evaluate.sweep import CLEAN, Point
from romer.hardware import ChipSheet, deployed, estimate, record, shape_of
from romer.methods import Fitted, get
from romer.noise import Conductance, NoiseModel
from romer.probes import all_but, present
from romer.routing import apply
from romer.stages import plan
from romer.stages.evaluate import by_hand
from romer.stages.hardware import settings
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.stages.probe import Probe, Routing, measured, other_chip, together
from romer.tracking import Run

PLUS = "romer_plus"
CORRECTED = ("low_rank", PLUS)  # what reads finished arrays back
BEFORE = ("vanilla", "average")  # what others are held against everywhere


class Bench:
    """Makes probes of one model, whose options are complete and whose ranks are chosen once a place."""

    def __init__(self, model: nn.Module, fitted: Fitted, chosen: Mapping):
        self.model, self.fitted, self.chosen = model, fitted, chosen

    def probe(
        self,
        task: str,
        name: str,
        realisation: int,
        noise: NoiseModel,
        given: Mapping | None = None,
        about: Mapping | None = None,
        fitted: Fitted | None = None,
        chip: str | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Probe:
        """given: options of the method; about: what else its record says, with `noise_in` noise in that part alone;
        fitted: at another place; around: as of `Probe`."""
        method, fitted = get(name), fitted or self.fitted
        given = (dict(self.chosen) if name == PLUS else {}) | dict(given or {})
        options = method.options(fitted, given)
        layout = method.layout(self.model, fitted, options) if method.noisy else None
        if about and "noise_in" in about:
            layout = replace(layout, digital=all_but(self.model, fitted.placement, about["noise_in"]))
        on, realisation = (noise, realisation) if method.noisy else (None, CLEAN)
        return Probe(task, name, options | dict(about or {}), realisation, on, layout, around, chip, given)


def later(noise: NoiseModel, seconds: float) -> NoiseModel:
    """The same arrays `seconds` after programming. Raises InputError for a chip that is not known to drift."""
    drifting = [e for e in noise.errors if isinstance(e, Conductance) and isinstance(e.cells, Pcm)]
    if not drifting:
        raise InputError(
            "profile.frontier.drift: a chip whose drift is not known, expected one with phase-change cells"
        )
    errors = (replace(e, cells=replace(e.cells, seconds=seconds)) if e in drifting else e for e in noise.errors)
    return replace(noise, errors=tuple(errors))


def limits(bench: Bench, noise: NoiseModel, routing: Routing, realisation: int) -> list[Probe]:
    """What is left of the loss behind romer_plus, and where it comes from."""
    task = "ppl:limits"
    replayed = {"about": {"routing": "clean"}, "around": partial(routing.of, CLEAN)}
    probes = [
        bench.probe(task, PLUS, realisation, noise, {"ranks": "uniform"}),
        bench.probe(task, PLUS, realisation, noise, {"n_replace": 0}, **replayed),
        bench.probe(task, "vanilla", realisation, noise, **replayed),
    ]
    for part, name in product(present(bench.model, bench.fitted.placement), ("vanilla", PLUS)):
        probes.append(bench.probe(task, name, realisation, noise, about={"noise_in": part}))
    return probes


def listed(job: Job, bench: Bench, noise: NoiseModel, routing: Routing) -> list[Probe]:
    """Every probe of the profile, in an order in which neighbours share a programming."""
    size, probes = job.cfg.profile.frontier, [bench.probe("ppl:methods", "clean", CLEAN, noise)]
    home = {"fitted_on": f"{job.cfg.chip.name}/{job.cfg.temperature.celsius}"}
    chips = [(name, celsius, other_chip(job, name, celsius)) for name, celsius in size.chips]
    for r in range(size.realisations):
        probes += [bench.probe("ppl:methods", name, r, noise) for name in size.methods]
    for r in range(size.swept.realisations):
        swept = [(name, {"budget": float(b)}) for name, b in product(CORRECTED, size.swept.budgets)]
        swept += [("vanilla", {}), *(("average", {"copies": n}) for n in size.swept.copies)]
        probes += [bench.probe("ppl:budget", name, r, noise, given) for name, given in swept]
        read = {"read_error": float(size.read_error)}
        probes += [bench.probe("ppl:read", name, r, noise, read) for name in ("compensated_programming", *CORRECTED)]
        for scale in size.scales:
            other = replace(noise, sigma_dev=scale * noise.sigma_dev)
            probes += [bench.probe("ppl:scaled", n, r, other, about={"scale": scale}) for n in (*BEFORE, PLUS)]
    for r in range(size.limits.realisations):
        probes += limits(bench, noise, routing, r)
    for name, celsius, other in chips:
        there = replace(bench.fitted, noise=other, known={})
        for r in range(size.elsewhere):
            at = {"celsius": celsius}
            own = {"about": at, "fitted": there, "chip": name}
            probes += [bench.probe("ppl:chips", method, r, other, **own) for method in size.chip_methods]
            probes.append(bench.probe("ppl:chips", PLUS, r, other, about=at | home, chip=name))
            if name in size.drift.chips:
                aged = later(other, float(size.drift.seconds))
                at = at | {"seconds": float(size.drift.seconds)}
                own = {"about": at, "fitted": there, "chip": name}
                probes += [bench.probe("ppl:drift", method, r, aged, **own) for method in BEFORE]
                for refit in (True, False):
                    probes.append(bench.probe("ppl:drift", PLUS, r, aged, {"refit": refit}, **own))
    return together(probes)


def choose(job: Job, model, fitted: Fitted, noise: NoiseModel, measure) -> tuple[dict, pd.DataFrame, list[dict]]:
    """(options of romer_plus, every candidate's records, their points' keys), by calibration text alone: with and
    without compensated programming, the affine step and the paper's replacement."""
    size, block = job.cfg.profile.frontier.choice, get(PLUS).options(fitted, {})["block"]
    every = product((block, 0), (False, True), (0, fitted.n_replace))
    candidates = [dict(zip(("block", "affine", "n_replace"), values, strict=True)) for values in every]
    bench, seeds = Bench(model, fitted, {}), range(size.realisations)
    probes = [
        bench.probe("ppl:choice", PLUS, CALIBRATION_REALISATIONS + 1 + r, noise, given)
        for r in seeds
        for given in candidates
    ]
    probes = together(probes)
    keys = job.point_keys([p.key for p in probes], {"tokens": size.tokens, "text": "calibration"})
    records = measured(job, model, fitted, probes, keys, size.tokens, measure)
    options = records.options.map(json.loads)
    means = [records.value[[all(o[k] == v for k, v in given.items()) for o in options]].mean() for given in candidates]
    return candidates[means.index(min(means))], records, keys


def prices(job: Job, model, fitted: Fitted, probes: list[Probe], ids) -> pd.DataFrame:
    """Cells, digital numbers and energy of every setting that was measured, on the routing of the clean model, with the
    copies and calibrated logits that the setting has."""
    sheet, workload, window = ChipSheet.load(job.config["hardware"]), settings(job), job.cfg.profile.window
    rows, traces = {}, {}
    for p in probes:
        method = get(p.method)
        options = method.options(fitted, p.given)
        key = p.method, json.dumps(options, sort_keys=True)
        if key in rows or not method.noisy:
            continue
        rerouted = method.routing(fitted, options)
        if rerouted not in traces:
            with apply(model, *rerouted), record(model, window) as recorder:
                perplexity(model, ids, window, job.cfg.profile.batch)
            traces[rerouted] = recorder.trace
        where = deployed(method, model, job.placement, fitted, options, workload["lm_head"])
        found = estimate(shape_of(model.config), traces[rerouted], sheet, where, workload["batch"])
        energy = {"hardware": sheet.name, "energy_j": found.energy_j, "time_s": found.time_s}
        rows[key] = asdict(cost(method, model, job.placement, fitted, options)) | energy
    return pd.DataFrame([{"method": m, "options": o} | row for (m, o), row in rows.items()])


@application("frontier")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet, cost.csv, choice.json and coverage.csv, and prints the means."""
    cfg, size = job.cfg, job.cfg.profile.frontier
    model, tokenizer = job.load()
    names = [*size.methods, *size.chip_methods, *CORRECTED]
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, names)
    if noise.adc is not None:
        raise InputError("frontier: noise.adc is set; corrections are only simulated without an ADC")
    read = partial(perplexity, model, window=cfg.profile.window, batch=cfg.profile.batch)
    fitted_on = cfg.profile.fit.tokens  # by moments and gradients: candidates are compared on the text behind it
    text = job.ids(tokenizer, "calibration", fitted_on + size.choice.tokens)[fitted_on:]
    chosen, tried, done = choose(job, model, fitted, noise, partial(read, text))
    job.say(f"chosen on calibration text: {chosen}")
    ids = job.ids(tokenizer, "evaluation", size.tokens)
    routing = Routing(model, noise, job.placement, partial(read, ids))
    probes = listed(job, Bench(model, fitted, chosen), noise, routing)
    keys = job.point_keys([p.key for p in probes], {"tokens": size.tokens})
    routing.prepare(job, probes, keys, [CLEAN])
    records = measured(job, model, fitted, probes, keys, size.tokens, partial(read, ids))
    with job.write(by_hand(job)) as folder:
        pd.concat([tried, records], ignore_index=True).to_parquet(folder / "records.parquet", index=False)
        prices(job, model, fitted, probes, ids).to_csv(folder / "cost.csv", index=False)
        (folder / "choice.json").write_text(json.dumps(chosen) + "\n")
        settled = [Point(p.method, p.realisation, get(p.method).options(fitted, p.given)) for p in probes]
        job.write_coverage(model, folder, fitted, settled)
    job.points.clear([*done, *keys])
    means = records.groupby(["task", "chip", "method", "options"]).value.agg(["mean", "min", "max", "count"])
    run.summary({"points": len(records), **chosen})
    print(means.to_string(float_format="%.3f"))
