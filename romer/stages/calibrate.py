"""`romer calibrate`: finds the sigma_dev whose output divergence meets the chip's target (the paper's figure 2,
right)."""

import json
import statistics

import pandas as pd

from romer import NoiseModel, kl_divergence, log_probabilities, program, published
from romer.calibration import fit_sigma
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.tracking import Run


@application("calibrate")
def main(job: Job, run: Run) -> None:
    """Writes calibration.json (sigma_dev, its range over realisations, target), kl_curve.csv and coverage.csv."""
    cfg, size = job.cfg, job.cfg.profile.calibrate
    target = published.kl_target(cfg.chip.published, cfg.model.name, cfg.temperature.celsius)
    model, tokenizer = job.load()
    ids = job.ids(tokenizer, "calibration", size.tokens)
    reference = log_probabilities(model, ids, cfg.profile.window, cfg.profile.batch)

    def measure(sigma: float) -> dict:
        values = []
        for r in range(size.realisations):
            with program(model, NoiseModel(sigma, cfg.seed), CALIBRATION_REALISATIONS + r, job.placement):
                values.append(kl_divergence(model, ids, reference, cfg.profile.window, cfg.profile.batch))
        return {"sigma_dev": sigma, "mean_kl": statistics.mean(values), "kl": values}

    keys = []

    def divergence(sigma: float) -> list[float]:
        keys.extend(job.point_keys([{"sigma_dev": sigma}], {"tokens": size.tokens, "realisations": size.realisations}))
        found = job.point(keys[-1], f"sigma-{sigma:.5g}", lambda: measure(sigma))
        job.say(f"sigma_dev {sigma:.5f}: KL {found['mean_kl']:.5f}, target {target:.5f}")
        return found["kl"]

    fit = fit_sigma(divergence, target)
    result = {
        "sigma_dev": fit.sigma_dev,
        "sigma_low": min(fit.sigma_by_realisation),
        "sigma_high": max(fit.sigma_by_realisation),
        "kl": fit.kl,
        "kl_target": target,
        "evaluations": fit.evaluations,
        "realisations": size.realisations,
        "tokens": size.tokens,
    }
    with job.write() as folder:
        rows = [(sigma, r, kl) for sigma, kls in fit.curve for r, kl in enumerate(kls)]
        pd.DataFrame(rows, columns=["sigma_dev", "realisation", "kl"]).to_csv(folder / "kl_curve.csv", index=False)
        (folder / "calibration.json").write_text(json.dumps(result, indent=2) + "\n")
        job.write_coverage(model, folder)
    job.points.clear(keys)
    run.summary(result)
