"""`romer frontier`: how much of the noise's loss methods take back, for which cells, digital numbers and energy.

Experiments around one operating point, each on the same realisations (at the point itself, with
`profile.frontier.antithetic`, on their mirror images, too):
- ppl:choice    on calibration text and its own realisations: which parts of romer_plus help
- ppl:methods   every method of `profile.frontier.methods`
- ppl:budget    digital numbers from none to many, and copies
- ppl:read      the corrected ones with errors in what is read back
- ppl:scaled    the noise stronger or weaker than what ranks were chosen at
- ppl:limits    what is left of the loss: the clean model's choice of experts, noise in one part alone, uniform ranks
- ppl:chips     measured chips' own errors, with ranks that were chosen there and with those that were chosen here, and
                with slower read-backs where a read is noisy
- ppl:drift     such a chip later on, its corrections refitted or left as they were after programming

Many processes can share the work: each measures the part that `profile.frontier.only` names, and leaves its points to a
last one that has no part and writes the result. Choices come first, as what the others measure depends on them:
    romer frontier 'profile.frontier.only={experiments: [choice], places: [rram_a/25]}'
    romer frontier 'profile.frontier.only={places: [rram_a/25], realisations: [0, 1]}'
    romer frontier
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from torch import nn

from romer import InputError, perplexity
from romer.chips.pcm import Pcm
from romer.cost import cost
from romer.hardware import ChipSheet, deployed, estimate, record, shape_of
from romer.methods import Fitted, get
from romer.noise import CLEAN, Conductance, NoiseModel, mirror
from romer.probes import all_but, present
from romer.readback import reads_noisily
from romer.routing import apply
from romer.stages import plan
from romer.stages.evaluate import by_hand
from romer.stages.hardware import settings
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.stages.probe import Probe, Routing, measured, other_chip, together
from romer.tracking import Run

PLUS = "romer_plus"
EXPERIMENTS = ("choice", "methods", "budget", "read", "scaled", "limits", "chips", "drift")
CORRECTED = ("low_rank", PLUS)  # what reads finished arrays back
SHARES = (0.0, 0.5, 1.0)  # of the budget, that projection may have
KEPT = (0.0, 0.5)  # of the budget, that outliers may have
BEFORE = ("vanilla", "average")  # what others are held against everywhere


@dataclass(frozen=True)
class Part:
    """What a job measures of everything. Each None, or names of places (`Bench.name`), of experiments, and
    realisations."""

    places: tuple[str, ...] | None = None
    experiments: tuple[str, ...] | None = None
    realisations: tuple[int, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether it is everything."""
        return self == Part()

    def at(self, place: str) -> bool:
        """Whether anything is measured there."""
        return self.places is None or place in self.places

    def has(self, experiment: str, realisation: int = CLEAN) -> bool:
        """Whether this is measured, where anything is; what has no noise is where its experiment is."""
        drawn = self.realisations is None or realisation in (CLEAN, *self.realisations)
        return drawn and (self.experiments is None or experiment in self.experiments)

    @classmethod
    def of(cls, only: Mapping, places: Iterable[str]) -> "Part":
        """That of `profile.frontier.only`. Raises InputError for a name that there is not, and for what is no list."""
        known = {"places": tuple(places), "experiments": EXPERIMENTS, "realisations": None}
        for key, values in only.items():
            if key not in known or not isinstance(values, list | None):
                found = f"found {key!r}" if key not in known else f"{key}: found {values!r}, expected a list"
                raise InputError(f"profile.frontier.only: {found}; it has lists {', '.join(known)}")
            for value in values or ():
                if known[key] is not None and value not in known[key]:
                    raise InputError(
                        f"profile.frontier.only.{key}: found {value!r}, expected one of {', '.join(known[key])}"
                    )
                if known[key] is None and type(value) is not int:
                    raise InputError(f"profile.frontier.only.{key}: found {value!r}, expected whole numbers")
        return cls(**{key: None if values is None else tuple(values) for key, values in only.items()})


def place(chip: str | None, celsius: float | None = None, reading: Mapping | None = None) -> str:
    """The name of a place: home, chip/celsius, or chip/celsius/option=value where arrays are read back in a way of its
    own."""
    if chip is None:
        return "home"
    return "/".join([chip, f"{celsius}", *(f"{key}={value}" for key, value in (reading or {}).items())])


class Bench:
    """Makes probes of one model at a place: home, or a chip of its own errors, whose options are complete and whose
    ranks are chosen once. reading: how arrays are read back there, where it is not as by default; part: of the work
    that is this job's; chosen: options of romer_plus."""

    def __init__(
        self,
        model: nn.Module,
        fitted: Fitted,
        chip: str | None = None,
        celsius: float | None = None,
        reading: Mapping | None = None,
        part: Part = Part(),
    ):
        self.model, self.fitted, self.chip, self.reading, self.part = model, fitted, chip, dict(reading or {}), part
        self.name = place(chip, celsius, reading)
        self.about, self.chosen = {} if chip is None else {"celsius": celsius}, {}

    def probe(
        self,
        task: str,
        name: str,
        realisation: int,
        given: Mapping | None = None,
        about: Mapping | None = None,
        noise: NoiseModel | None = None,
        home: "Bench | None" = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Probe | None:
        """None where it is not this job's. given: options of the method; about: what else its record says, with
        `noise_in` noise in that part alone; noise: another than this place's; home: where the method was fitted, else
        here; around: as of `Probe`."""
        experiment = task.removeprefix("ppl:")
        if experiment != "choice" and not (self.part.at(self.name) and self.part.has(experiment, realisation)):
            return None
        method, at, about = get(name), home or self, self.about | dict(about or {})
        given = (dict(at.chosen) if name == PLUS else self.reading if name in CORRECTED else {}) | dict(given or {})
        options = method.options(at.fitted, given)
        layout = method.layout(self.model, at.fitted, options) if method.noisy else None
        if "noise_in" in about:
            layout = replace(layout, digital=all_but(self.model, at.fitted.placement, about["noise_in"]))
        on, realisation = (noise or self.fitted.noise, realisation) if method.noisy else (None, CLEAN)
        return Probe(task, name, options | about, realisation, on, layout, around, self.chip, given, at.fitted)


def later(noise: NoiseModel, seconds: float) -> NoiseModel:
    """The same arrays `seconds` after programming. Raises InputError for a chip that is not known to drift."""
    drifting = [e for e in noise.errors if isinstance(e, Conductance) and isinstance(e.cells, Pcm)]
    if not drifting:
        raise InputError(
            "profile.frontier.drift: a chip whose drift is not known, expected one with phase-change cells"
        )
    errors = (replace(e, cells=replace(e.cells, seconds=seconds)) if e in drifting else e for e in noise.errors)
    return replace(noise, errors=tuple(errors))


def limits(bench: Bench, routing: Routing, realisation: int) -> list[Probe | None]:
    """What is left of the loss behind romer_plus, and where it comes from."""
    task = "ppl:limits"
    replayed = {"about": {"routing": "clean"}, "around": partial(routing.of, CLEAN)}
    probes = [
        bench.probe(task, PLUS, realisation, {"ranks": "uniform"}),
        bench.probe(task, PLUS, realisation, {"n_replace": 0}, **replayed),
        bench.probe(task, "vanilla", realisation, **replayed),
    ]
    for part, name in product(present(bench.model, bench.fitted.placement), ("vanilla", PLUS)):
        probes.append(bench.probe(task, name, realisation, about={"noise_in": part}))
    return probes


def listed(job: Job, home: Bench, chips: Iterable[Bench], routing: Routing) -> list[Probe]:
    """Every probe of the profile, in an order in which neighbours share a programming."""
    size, noise, probes = job.cfg.profile.frontier, home.fitted.noise, [home.probe("ppl:methods", "clean", CLEAN)]
    origin = {"fitted_on": f"{job.cfg.chip.name}/{job.cfg.temperature.celsius}"}
    for r in range(size.realisations):
        probes += [home.probe("ppl:methods", name, r) for name in size.methods]
    for r in range(size.swept.realisations):
        swept = [(name, {"budget": float(b)}) for name, b in product((*CORRECTED, "projection"), size.swept.budgets)]
        swept += [("vanilla", {}), *(("average", {"copies": n}) for n in size.swept.copies)]
        probes += [home.probe("ppl:budget", name, r, given) for name, given in swept]
        read = {"read_error": float(size.read_error)}
        probes += [home.probe("ppl:read", name, r, read) for name in ("compensated_programming", *CORRECTED)]
        for scale in size.scales:
            other, about = replace(noise, sigma_dev=scale * noise.sigma_dev), {"scale": scale}
            probes += [home.probe("ppl:scaled", n, r, about=about, noise=other) for n in (*BEFORE, PLUS)]
    for r in range(size.limits.realisations):
        probes += limits(home, routing, r)
    for there, r in product(chips, range(size.elsewhere)):
        own = [name for name in size.chip_methods if name in CORRECTED or not there.reading]
        probes += [there.probe("ppl:chips", method, r) for method in own]
        if not there.reading:
            probes.append(there.probe("ppl:chips", PLUS, r, about=origin, home=home))
        if there.chip in size.drift.chips:
            seconds = float(size.drift.seconds)
            aged = {"about": {"seconds": seconds}, "noise": later(there.fitted.noise, seconds)}
            probes += [there.probe("ppl:drift", method, r, **aged) for method in BEFORE if not there.reading]
            probes += [there.probe("ppl:drift", PLUS, r, {"refit": refit}, **aged) for refit in (True, False)]
    return paired(job, probes)


def paired(job: Job, probes: list[Probe | None]) -> list[Probe]:
    """The probes, and the mirror images of those at the operating point where these are wanted, in an order in which
    neighbours share a programming."""
    probes = [p for p in probes if p is not None]
    images = [replace(p, realisation=mirror(p.realisation)) for p in probes if p.chip is None and p.noise is not None]
    return together([*probes, *images] if job.cfg.profile.frontier.antithetic else probes)


def choose(job: Job, bench: Bench, realisations: int, measure) -> tuple[pd.DataFrame, list[dict]]:
    """Sets the options of romer_plus at a place, by calibration text alone: first with and without compensated
    programming and projection, then, of the best, with and without outliers, the affine step and, where the profile
    asks for them and the expected loss has any that pay, copies of experts. Returns every candidate's records and their
    points' keys."""
    size, fitted = job.cfg.profile.frontier.choice, bench.fitted
    best, tables, done = {"outliers": 0.0, "affine": False, "n_replace": 0} | bench.reading, [], []
    plus = get(PLUS)
    plans = {n: plus.routing(fitted, plus.options(fitted, {"n_replace": n}))[0] for n in size.n_replace}
    copies = [0, *(n for n, plan in plans.items() if plan is not None and plan.n_replace)]
    blocks = plus.options(fitted, {})["block"], 0
    rounds = {"block": blocks, "projected": SHARES}, {"outliers": KEPT, "affine": (False, True), "n_replace": copies}
    for choices in rounds:
        if best.get("projected") == 1:  # nothing of the budget is left to pay for the affine step
            choices["affine"] = (False,)
        candidates = [best | dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        seeds = range(CALIBRATION_REALISATIONS + 1, CALIBRATION_REALISATIONS + 1 + realisations)
        probes = [bench.probe("ppl:choice", PLUS, r, given) for r, given in product(seeds, candidates)]
        probes = paired(job, probes)
        keys = job.point_keys([p.key for p in probes], {"tokens": size.tokens, "text": "calibration"})
        records = measured(job, bench.model, probes, keys, size.tokens, measure)
        options = records.options.map(json.loads)
        losses = np.log(records.value)
        means = [losses[[all(o[k] == v for k, v in c.items()) for o in options]].mean() for c in candidates]
        best = candidates[means.index(min(means))]
        tables, done = [*tables, records], [*done, *keys]
    bench.chosen = best
    job.say(f"chosen on calibration text for {bench.name}: {best}")
    return pd.concat(tables).drop_duplicates(["options", "realisation"]), done


def prices(job: Job, model, probes: list[Probe], ids) -> pd.DataFrame:
    """Cells, digital numbers and energy of every setting where it was measured, of what it was fitted to there, on the
    routing of the clean model, with the copies and calibrated logits that the setting has. Its chip, method and options
    are those of its records."""
    sheet, workload, window = ChipSheet.load(job.config["hardware"]), settings(job), job.cfg.profile.window
    rows, found, traces = {}, {}, {}
    for p in probes:
        method = get(p.method)
        key = p.chip or job.cfg.chip.name, p.method, json.dumps(p.options, sort_keys=True)
        if key in rows or not method.noisy:
            continue
        options = p.complete
        same = id(p.fitted), p.method, json.dumps(options, sort_keys=True)
        if same not in found:
            rerouted = method.routing(p.fitted, options)
            if rerouted not in traces:
                with apply(model, *rerouted), record(model, window) as recorder:
                    perplexity(model, ids, window, job.cfg.profile.batch)
                traces[rerouted] = recorder.trace
            where = deployed(method, model, job.placement, p.fitted, options, workload["lm_head"])
            spent = estimate(shape_of(model.config), traces[rerouted], sheet, where, workload["batch"])
            energy = {"hardware": sheet.name, "energy_j": spent.energy_j, "time_s": spent.time_s}
            found[same] = asdict(cost(method, model, job.placement, p.fitted, options)) | energy
        rows[key] = found[same]
    names = ("chip", "method", "options")
    return pd.DataFrame([dict(zip(names, key, strict=True)) | row for key, row in rows.items()])


@application("frontier")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet, cost.csv, choice.json and coverage.csv, and prints the means; a part of the work leaves
    its points alone."""
    cfg, size = job.cfg, job.cfg.profile.frontier
    found = [(name, celsius, other_chip(job, name, celsius)) for name, celsius in size.chips]
    slow = [{"read_seconds": float(seconds)} for seconds in size.read_seconds]
    there = [(*at, reading) for at in found for reading in ({}, *(slow if reads_noisily(at[2]) else ()))]
    only = job.config["profile"]["frontier"]["only"]
    part = Part.of(only, ["home", *(place(name, celsius, reading) for name, celsius, _, reading in there)])
    model, tokenizer = job.load()
    names = [*size.methods, *size.chip_methods, *CORRECTED]
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, names)
    if noise.adc is not None:
        raise InputError("frontier: noise.adc is set; corrections are only simulated without an ADC")
    read = partial(perplexity, model, window=cfg.profile.window, batch=cfg.profile.batch)
    fitted_on = max(cfg.profile.fit.tokens, cfg.profile.fit.correlations)  # candidates are compared on text behind it
    text = job.ids(tokenizer, "calibration", fitted_on + size.choice.tokens)[fitted_on:]
    home, chips, seen = Bench(model, fitted, part=part), [], {}
    for name, celsius, errors, reading in there:
        if part.at(place(name, celsius, reading)):
            if errors not in seen:  # ways of reading a chip back share what is known of it
                seen[errors] = plan.under(model, fitted, errors)
            chips.append(Bench(model, seen[errors], name, celsius, reading, part))
    tried = []
    used_there = part.has("chips") and any(not at.reading for at in chips)
    if part.at(home.name) or used_there:
        tried.append(choose(job, home, size.choice.realisations, partial(read, text)))
    tried += [choose(job, at, size.choice.elsewhere, partial(read, text)) for at in chips]
    ids = job.ids(tokenizer, "evaluation", size.tokens)
    routing = Routing(model, noise, job.placement, partial(read, ids))
    probes = listed(job, home, chips, routing)
    keys = job.point_keys([p.key for p in probes], {"tokens": size.tokens})
    routing.prepare(job, probes, keys, [CLEAN])
    records = measured(job, model, probes, keys, size.tokens, partial(read, ids)) if probes else pd.DataFrame()
    if not part.whole:
        run.summary({"points": len(records)})
        return job.say("this part is measured; `romer frontier` without profile.frontier.only writes the result")
    with job.write(by_hand(job)) as folder:
        every = pd.concat([*(table for table, _ in tried), records], ignore_index=True)
        every.to_parquet(folder / "records.parquet", index=False)
        prices(job, model, probes, ids).to_csv(folder / "cost.csv", index=False)
        chosen = {at.name: at.chosen for at in (home, *chips)}
        (folder / "choice.json").write_text(json.dumps(chosen, indent=1) + "\n")
        job.write_coverage(model, folder, [(p.method, p.complete, p.fitted) for p in probes])
    job.points.clear([*(key for _, done in tried for key in done), *keys])
    means = records.groupby(["task", "chip", "method", "options"]).value.agg(["mean", "min", "max", "count"])
    run.summary({"points": len(records), **home.chosen})
    print(means.to_string(float_format="%.3f"))
