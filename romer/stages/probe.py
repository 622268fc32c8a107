"""`romer probe`: what breaks under noise, and whether the paper's cure still works where it was not fitted.

Experiments around one operating point, each on the same realisations:
- ppl:perturbed   a share of every token's experts drawn at random, on clean and on noisy weights (figure 3, left)
- ppl:routing     the clean model's choice of experts on noisy weights, and the noisy one's on clean weights
- ppl:parts       noise in one part of the model alone
- ppl:unnoised    what the paper's cures cost where there is no noise
- ppl:scaled      the noise stronger or weaker than what n and λ were chosen at
- ppl:transfer    another chip's own errors, which n and λ have never seen
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import pandas as pd
import yaml
from torch import nn

from romer import InputError, perplexity, program
from romer.chips import build
from romer.cli import conf_folder
from romer.encoding import Layout
from romer.evaluate.perplexity import predicted
from romer.methods import Fitted, get
from romer.noise import CLEAN, NoiseModel
from romer.probes import (
    Decisions,
    all_but,
    perturbed_selection,
    present,
    recorded_routing,
    replayed_routing,
)
from romer.routing import apply
from romer.stages import plan
from romer.stages.evaluate import by_hand, in_order, record
from romer.stages.job import Job, application
from romer.tracking import Run

CURES = ("romer_replacement", "romer_calibration", "romer")
NAIVE = "kb_calibration"  # the compensation that the paper's figure 3 calls naive


@dataclass(frozen=True)
class Probe:
    """One measurement: the routing of a method with the options `given`, and a layout, on the errors of `noise` (None:
    clean weights), inside `around`; options: what its record says; fitted: what the method was fitted to."""

    task: str
    method: str
    options: dict
    realisation: int
    noise: NoiseModel | None
    layout: Layout | None = None
    around: Callable[[], AbstractContextManager] = nullcontext
    chip: str | None = None
    given: dict = field(default_factory=dict)
    fitted: Fitted | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> dict:
        """Plain JSON that identifies it within its job."""
        kept = {"task": self.task, "method": self.method, "options": self.options, "realisation": self.realisation}
        return kept | {"on_chip": self.chip}

    @property
    def complete(self) -> dict:
        """The options of the method, those that are not given from what it was fitted to."""
        return get(self.method).options(self.fitted, self.given)


class Routing:
    """What the noisy and the clean routers decided, measured once and kept."""

    def __init__(self, model, noise: NoiseModel, placement, measure: Callable[[], float]):
        self.model, self.noise, self.placement, self.measure = model, noise, placement, measure
        self.known: dict[int, Decisions] = {}

    @contextmanager
    def of(self, realisation: int) -> Iterator[None]:
        """Replays the decisions of a realisation (CLEAN: of the clean model)."""
        with replayed_routing(self.model, self.known[realisation]):
            yield

    def record(self, realisation: int) -> None:
        """Records them, on a model that is not programmed."""
        if realisation not in self.known:
            noisy = realisation != CLEAN
            arrays = program(self.model, self.noise, realisation, self.placement) if noisy else nullcontext()
            with arrays, recorded_routing(self.model) as self.known[realisation]:
                self.measure()

    def prepare(self, job: Job, probes: list[Probe], keys: list[dict], realisations: Iterable[int]) -> None:
        """Records them, on a model that is not programmed, where a probe that replays routing is not finished."""
        if any("routing" in p.options and job.points.get(key) is None for p, key in zip(probes, keys, strict=True)):
            for realisation in realisations:
                self.record(realisation)


def listed(job: Job, model, fitted, noise: NoiseModel, routing: Routing) -> list[Probe]:
    """Every probe of the profile, in an order in which neighbours share a programming."""
    size, placement = job.cfg.profile.probe, job.placement
    naive = get(NAIVE).layout(model, fitted, get(NAIVE).options(fitted, {}))
    others = [(chip, celsius, other_chip(job, chip, celsius)) for chip, celsius in size.transfer]
    probes, probe = [], partial(Probe, fitted=fitted)
    for r in range(size.realisations):
        for share in size.perturbed if job.cfg.model.name in size.perturbed_models else [0.0]:
            around = partial(perturbed_selection, model, share, job.cfg.seed, r)
            at = {"perturbed": share}
            if share or r == 0:  # nothing is drawn for a clean model whose selection is left alone
                probes.append(probe("ppl:perturbed", "clean", at, r if share else CLEAN, None, None, around))
            probes.append(probe("ppl:perturbed", "vanilla", at, r, noise, Layout(), around))
            probes.append(probe("ppl:perturbed", NAIVE, at, r, noise, naive, around))
        split = {"routing": "clean", "weights": "noisy"}
        probes.append(probe("ppl:routing", "vanilla", split, r, noise, Layout(), partial(routing.of, CLEAN)))
        split = {"routing": "noisy", "weights": "clean"}
        probes.append(probe("ppl:routing", "vanilla", split, r, None, None, partial(routing.of, r)))
        for part in present(model, placement):
            alone = Layout(digital=all_but(model, placement, part))
            probes.append(probe("ppl:parts", "vanilla", {"noise_in": part}, r, noise, alone))
        for scale in size.scales:
            other = replace(noise, sigma_dev=scale * noise.sigma_dev)
            probes += [probe("ppl:scaled", m, {"scale": scale}, r, other, Layout()) for m in ("vanilla", "romer")]
        fitted_on = {"fitted_on": f"{job.cfg.chip.name}/{job.cfg.temperature.celsius}"}
        for chip, celsius, other in others:
            at = fitted_on | {"celsius": celsius}
            probes += [probe("ppl:transfer", m, at, r, other, Layout(), chip=chip) for m in ("vanilla", "romer")]
    probes += [probe("ppl:unnoised", m, {}, CLEAN, None) for m in ("clean", *CURES)]
    return together(probes)


def together(probes: list[Probe]) -> list[Probe]:
    """The probes in an order in which those that share a programming are neighbours."""
    order: dict[tuple, int] = {}
    return sorted(probes, key=lambda p: order.setdefault((p.realisation, p.noise, p.layout), len(order)))


def other_chip(job: Job, name: str, celsius: float) -> NoiseModel:
    """The own errors of a chip of conf/chip. Raises InputError for one that has none, or has an ADC."""
    path = conf_folder() / "chip" / f"{name}.yaml"
    if not path.exists():
        raise InputError(f"profile.probe.transfer: no chip {name!r}: {path} is missing")
    chip = build(yaml.safe_load(path.read_text()), job.cfg.model.name, float(celsius))
    if not chip.errors or chip.adc is not None:
        raise InputError(f"profile.probe.transfer: chip {name} at {celsius} °C, expected one with errors and no ADC")
    return NoiseModel(0.0, job.cfg.seed, chip.errors)


@application("probe")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet and coverage.csv, and prints the means."""
    cfg, size = job.cfg, job.cfg.profile.probe
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, [NAIVE])
    if noise.adc is not None:
        raise InputError("probe: noise.adc is set; parts and corrections are only simulated without an ADC")
    ids = job.ids(tokenizer, "evaluation", size.tokens)
    measure = partial(perplexity, model, ids, cfg.profile.window, cfg.profile.batch)
    routing = Routing(model, noise, job.placement, measure)
    probes = listed(job, model, fitted, noise, routing)
    keys = job.point_keys([p.key for p in probes], {"tokens": size.tokens})
    routing.prepare(job, probes, keys, (CLEAN, *range(size.realisations)))
    records = measured(job, model, probes, keys, size.tokens, measure)
    with job.write(by_hand(job)) as folder:
        records.to_parquet(folder / "records.parquet", index=False)
        job.write_coverage(model, folder)
    job.points.clear(keys)
    means = records.groupby(["task", "chip", "method", "options"]).value.agg(["mean", "min", "max", "count"])
    run.summary({"points": len(records)})
    print(means.to_string(float_format="%.3f"))


def measured(
    job: Job,
    model: nn.Module,
    probes: list[Probe],
    keys: list[dict],
    tokens: int,
    measure: Callable[[], float],
) -> pd.DataFrame:
    """The records of all probes, those of a killed run not measured again; neighbours that can share a programming."""
    rows, todo = [], list(zip(probes, keys, strict=True))
    for (realisation, on, layout), group in groupby(todo, lambda t: (t[0].realisation, t[0].noise, t[0].layout)):
        group = list(group)
        with ExitStack() as stack:
            if on is not None and any(job.points.get(key) is None for _, key in group):
                stack.enter_context(program(model, on, realisation, job.placement, layout))
            for p, key in group:
                how = get(p.method).routing(p.fitted, p.complete)

                def value(p=p, how=how) -> dict:  # a finished point may need what is no longer there: replayed routing
                    with apply(model, *how), p.around():
                        return {"value": measure()}

                found = job.point(key, f"{p.task.removeprefix('ppl:')}-{p.method}-{realisation}", value)
                job.say(f"{p.task} {p.method} {json.dumps(p.options)} realisation {realisation}: {found['value']:.4f}")
                row = record(job, p.method, p.options, p.task, realisation, found["value"], found["run_id"])
                cells = 1.0 if p.layout is None else p.layout.encoding.cells
                row |= {"tokens": predicted(tokens, job.cfg.profile.window), "cells": cells}
                if p.chip is not None:
                    row |= {"chip": p.chip, "temperature_c": float(p.options["celsius"])}
                rows.append(row)
    return in_order(rows)
