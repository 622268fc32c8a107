"""`romer ablate`: the paper's table 4, perplexity over the grids of n (replacement alone) and λ (calibration alone).

An ablation on the reported text, not a selection: n and λ of the other tables come from `romer plan`.
"""

from romer.stages.evaluate import by_hand, measure
from romer.stages.job import Job, application
from romer.stages.plan import feasible
from romer.tracking import Run


def grid(n_replace: list[int], strength: list[float]) -> list[tuple[str, dict]]:
    """clean, vanilla, replacement for every n > 0, calibration for every λ > 0 (n = 0 and λ = 0 are vanilla)."""
    return (
        [("clean", {}), ("vanilla", {})]
        + [("romer_replacement", {"n_replace": n}) for n in n_replace if n > 0]
        + [("romer_calibration", {"strength": s}) for s in strength if s > 0]
    )


@application("ablate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet and coverage.csv; an n that the model has too few experts for is left out."""
    size = job.cfg.profile.ablate
    records, publish = measure(
        job,
        lambda model: grid(feasible(model, list(size.n_replace)), list(size.strength)),
        "ppl:ablation",
        size.tokens,
    )
    publish(by_hand(job))
    run.summary({"points": len(records)})
