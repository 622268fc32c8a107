"""`romer ablate`: the paper's table 4, perplexity over the grids of n (replacement alone) and λ (calibration alone).

An ablation on the reported text, not a selection: n and λ of the other tables come from `romer plan`.
"""

from romer.stages import plan
from romer.stages.evaluate import measure, publish
from romer.stages.job import Job, application
from romer.tracking import Run


def grid(n_replace: list[int], strength: list[float], experts: int) -> list[tuple[str, dict]]:
    """clean, vanilla, replacement for every n > 0 with 2n ≤ E, calibration for every λ > 0 (n = 0 and λ = 0 are
    vanilla)."""
    return (
        [("clean", {}), ("vanilla", {})]
        + [("romer_replacement", {"n_replace": n}) for n in n_replace if 0 < 2 * n <= experts]
        + [("romer_calibration", {"strength": s}) for s in strength if s > 0]
    )


@application("ablate")
def main(job: Job, run: Run) -> None:
    """Writes records.parquet and coverage.csv."""
    size = job.cfg.profile.ablate
    experts = plan.read(job).activation.shape[1]
    wanted = grid(list(size.n_replace), list(size.strength), experts)
    records, model = measure(job, wanted, "ppl:ablation", size.tokens)
    publish(job, records, model)
    run.summary({"points": len(records)})
