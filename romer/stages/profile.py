"""`romer profile`: what the routers do on calibration text, clean and under noise (eq. 6)."""

import pandas as pd
import torch
from safetensors.torch import save_file

from romer import Profile, profile, program
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.tracking import Run


def summary(noisy: Profile, clean: Profile, realisation: int) -> pd.DataFrame:
    """Per layer: router logit variance ratio, top-k overlap with clean, and load of both."""
    return pd.DataFrame(
        {
            "layer": range(len(clean.counts)),
            "realisation": realisation,
            "logit_variance_ratio": (noisy.logit_variance / clean.logit_variance).tolist(),
            "topk_overlap": noisy.overlap(clean).tolist(),
            "load_max_over_mean_clean": clean.load_max_over_mean.tolist(),
            "load_max_over_mean": noisy.load_max_over_mean.tolist(),
            "load_entropy_clean": clean.load_entropy.tolist(),
            "load_entropy": noisy.load_entropy.tolist(),
        }
    )


@application("profile")
def main(job: Job, run: Run) -> None:
    """Writes activation.safetensors (clean and noisy A and counts, [L, E]) and routing.csv (per layer and
    realisation)."""
    cfg, size = job.cfg, job.cfg.profile.profiling
    model, tokenizer = job.load()
    noise = job.noise()
    ids = job.ids(tokenizer, "calibration", size.tokens)
    clean = profile(model, ids, cfg.profile.window, cfg.profile.batch)
    rows, noisy = [], []
    for r in range(size.realisations):
        with program(model, noise, CALIBRATION_REALISATIONS + r, job.placement):
            noisy.append(profile(model, ids, cfg.profile.window, cfg.profile.batch))
        rows.append(summary(noisy[-1], clean, r))
        job.say(f"realisation {r}: top-k overlap {noisy[-1].overlap(clean).mean():.3f}")
    tensors = {
        "clean_magnitude": clean.magnitude,
        "clean_counts": clean.counts,
        "noisy_magnitude": torch.stack([p.magnitude for p in noisy]).mean(0),
        "noisy_counts": torch.stack([p.counts for p in noisy]).double().mean(0),
    }
    table = pd.concat(rows)
    with job.write() as folder:
        job.write_coverage(model, folder)
        save_file(tensors, folder / "activation.safetensors")
        table.to_csv(folder / "routing.csv", index=False)
    run.summary(table.drop(columns=["layer", "realisation"]).mean().to_dict())
