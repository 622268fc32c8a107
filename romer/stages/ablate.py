"""`romer ablate`: the paper's table 4, perplexity over the grids of n (replacement alone) and λ (calibration alone),
and over both together where the profile asks for it.

An ablation on the reported text, not a selection: n and λ of the other tables come from `romer plan`.
"""

from itertools import product

from torch import nn

from romer.evaluate.sweep import Point, points
from romer.methods import Fitted
from romer.stages.evaluate import by_hand, measure
from romer.stages.job import Job, application
from romer.stages.plan import feasible
from romer.tracking import Run

METHODS = ("clean", "vanilla", "romer_replacement", "romer_calibration", "romer")


def axes(n_replace: list[int], strength: list[float]) -> list[tuple[str, dict]]:
    """clean, vanilla, replacement for every n > 0, calibration for every λ > 0 (n = 0 and λ = 0 are vanilla)."""
    return (
        [("clean", {}), ("vanilla", {})]
        + [("romer_replacement", {"n_replace": n}) for n in n_replace if n > 0]
        + [("romer_calibration", {"strength": s}) for s in strength if s > 0]
    )


def joint(n_replace: list[int], strength: list[float]) -> list[tuple[str, dict]]:
    """Both components for every n > 0 and λ > 0."""
    inside = product((n for n in n_replace if n > 0), (s for s in strength if s > 0))
    return [("romer", {"n_replace": n, "strength": s}) for n, s in inside]


@application("ablate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet, cost.csv and coverage.csv; an n that the model has too few experts for is left out."""
    size = job.cfg.profile.ablate
    both = size.joint if job.cfg.temperature.celsius in size.joint.temperatures else None

    def wanted(model: nn.Module, fitted: Fitted) -> list[Point]:
        n, strength = feasible(model, list(size.n_replace)), list(size.strength)
        todo = points(fitted, axes(n, strength), range(job.cfg.profile.realisations))
        return todo + (points(fitted, joint(n, strength), range(both.realisations)) if both else [])

    records, publish = measure(job, METHODS, wanted, "ppl:ablation", size.tokens)
    publish(by_hand(job))
    run.summary({"points": len(records)})
