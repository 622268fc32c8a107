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
    """Writes activation.safetensors (clean and noisy A and counts, [L, E], means over realisations, and A of the first)
    and routing.csv (per layer and realisation)."""
    cfg, size = job.cfg, job.cfg.profile.profiling
    model, tokenizer = job.load()
    noise = job.noise()
    ids = job.ids(tokenizer, "calibration", size.tokens)
    shape = (cfg.profile.window, cfg.profile.batch)
    clean = profile(model, ids, *shape)

    def measure(realisation: int) -> dict:
        with program(model, noise, CALIBRATION_REALISATIONS + realisation, job.placement):
            noisy = profile(model, ids, *shape)
        routing = summary(noisy, clean, realisation)
        job.say(f"realisation {realisation}: top-k overlap {routing.topk_overlap.mean():.3f}")
        tensors = {"magnitude": noisy.magnitude.tolist(), "counts": noisy.counts.tolist()}
        return tensors | {"topk_overlap": routing.topk_overlap.mean(), "routing": routing.to_dict("list")}

    draws = range(size.realisations)
    keys = job.point_keys([{"realisation": r} for r in draws], {"tokens": size.tokens})
    noisy = [job.point(keys[r], f"realisation-{r}", lambda r=r: measure(r)) for r in draws]
    magnitudes = torch.tensor([found["magnitude"] for found in noisy], dtype=torch.float64)
    tensors = {
        "clean_magnitude": clean.magnitude,
        "clean_counts": clean.counts,
        "noisy_magnitude": magnitudes.mean(0),
        "first_noisy_magnitude": magnitudes[0].clone(),
        "noisy_counts": torch.tensor([found["counts"] for found in noisy], dtype=torch.float64).mean(0),
    }
    table = pd.concat([pd.DataFrame(found["routing"]) for found in noisy])
    with job.write() as folder:
        job.write_coverage(model, folder)
        save_file(tensors, folder / "activation.safetensors")
        table.to_csv(folder / "routing.csv", index=False)
    job.points.clear(keys)
    run.summary(table.drop(columns=["layer", "realisation"]).mean().to_dict())
