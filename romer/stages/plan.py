"""`romer plan`: chooses n and lambda on calibration text and writes the replacement plan.

The paper's method always replaces and always compresses, so the candidates leave out n = 0 and λ = 0; whether either
helps is what the evaluation shows.
"""

import json
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from romer import InputError, perplexity, profile, program
from romer.evaluate.sweep import points, sweep
from romer.methods import Fitted, get
from romer.moments import collect
from romer.noise import NoiseModel
from romer.routers import moe_layers
from romer.routing import apply
from romer.sensitivity import collect as weigh
from romer.sensitivity import experts
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.tracking import Run


def feasible(model, candidates: list[int]) -> list[int]:
    """The n that every layer allows: 2n ≤ E, and at least k experts remain."""
    blocks = [block for _, block in moe_layers(model)]
    most = min(min(b.gate.weight.shape[0] // 2, b.gate.weight.shape[0] - b.gate.top_k) for b in blocks)
    return [n for n in candidates if n <= most]


@application("plan")
def main(job: Job, run: Run) -> None:
    """Writes plan.json (n, λ, plan), selection.csv (all candidates) and activation.safetensors (eq. 6 under the
    plan)."""
    cfg, size = job.cfg, job.cfg.profile.plan
    model, tokenizer = job.load()
    noise = job.noise()
    found = load_file(job.read("profile") / "activation.safetensors")
    activation = found["noisy_magnitude"]
    ids = job.ids(tokenizer, "calibration", size.tokens)
    if not (candidates := feasible(model, list(size.n_replace))) or not size.strength:
        raise InputError(f"profile.plan: no n_replace of {list(size.n_replace)} fits the model, or strength is empty")
    wanted = [("romer_replacement", {"n_replace": n}) for n in candidates]
    wanted += [("romer_calibration", {"strength": s}) for s in size.strength]
    unfitted = Fitted(activation, 0, 0.0)
    seen = range(CALIBRATION_REALISATIONS, CALIBRATION_REALISATIONS + size.realisations)
    todo = points(unfitted, wanted, seen)

    def compute(missing):
        return sweep(
            model,
            missing,
            unfitted,
            noise,
            job.placement,
            lambda: perplexity(model, ids, cfg.profile.window, cfg.profile.batch),
        )

    rows = [
        {"method": p.method, **p.options, "realisation": p.realisation, "value": value}
        for p, value, _ in job.resumed(todo, {"tokens": size.tokens}, compute)
    ]
    table = pd.DataFrame(rows).sort_values(["method", "n_replace", "strength", "realisation"]).reset_index(drop=True)
    best = {
        method: table[table.method == method].groupby(column).value.mean().idxmin()
        for method, column in (("romer_replacement", "n_replace"), ("romer_calibration", "strength"))
    }
    fitted = Fitted(activation, int(best["romer_replacement"]), float(best["romer_calibration"]))
    method = get("romer")
    plan, calibration = method.routing(fitted, method.options(fitted, {}))
    with program(model, noise, CALIBRATION_REALISATIONS, job.placement), apply(model, plan, calibration):
        active = profile(model, ids, cfg.profile.window, cfg.profile.batch)
    chosen = {"n_replace": fitted.n_replace, "strength": fitted.strength, "plan": plan.to_json()}
    with job.write() as folder:
        job.write_coverage(model, folder)
        (folder / "plan.json").write_text(json.dumps(chosen, indent=1) + "\n")
        table.to_csv(folder / "selection.csv", index=False)
        save_file(
            {
                "magnitude": active.magnitude,
                "fitted_on": activation,
                "counts": found["noisy_counts"],
                "hot": torch.tensor(plan.hot),
                "cold": torch.tensor(plan.cold),
            },
            folder / "activation.safetensors",
        )
    job.points.clear(job.point_keys([p.key for p in todo], {"tokens": size.tokens}))
    run.summary({"n_replace": fitted.n_replace, "strength": fitted.strength})


def read(job: Job, model: nn.Module, tokenizer, names: Iterable[str]) -> Fitted:
    """What the plan stage fitted for this job's model and operating point and, where one of the methods `names` learns
    from them, the moments of the clean model's inputs on calibration text."""
    folder = job.read("plan")
    chosen = json.loads((folder / "plan.json").read_text())
    found = load_file(folder / "activation.safetensors")
    wanted, moments, sensitivity, noise, size = [get(name) for name in names], {}, {}, None, job.cfg.profile
    if any(method.learns or method.weighs for method in wanted):
        correlations = any(method.correlations for method in wanted)
        tokens = size.fit.correlations if correlations else size.fit.tokens
        ids = job.ids(tokenizer, "calibration", max(tokens, size.fit.tokens))
        moments = collect(model, ids[:tokens], size.window, size.batch, correlations)
    if any(method.weighs for method in wanted):
        few = ids[: size.fit.tokens]
        sensitivity, noise = weigh(model, few, moments, job.placement, min(size.window, 128)), job.noise()
    fitted = Fitted(
        found["fitted_on"],
        chosen["n_replace"],
        chosen["strength"],
        found["counts"],
        moments,
        sensitivity,
        placement=job.placement,
        realisation=CALIBRATION_REALISATIONS,
    )
    return fitted if noise is None else under(model, fitted, noise)


def under(model: nn.Module, fitted: Fitted, noise: NoiseModel) -> Fitted:
    """The same, for arrays with the errors of `noise`: what methods that weigh errors see."""
    noisy, absent = experts(model, noise, fitted.realisation, fitted.moments, fitted.sensitivity)
    return replace(fitted, noise=noise, expert_noise=noisy, expert_absence=absent, known={})
