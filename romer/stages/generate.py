"""`romer generate`: figure 1, the same prompts continued by the clean, the noisy and the mended model.

romer generate model=olmoe chip=table1 temperature=80
romer generate model=olmoe temperature=80 'profile.generate.factors=[1,8]'
"""

import dataclasses
import json

from romer.errors import InputError
from romer.evaluate.generation import continuations
from romer.evaluate.sweep import points, sweep
from romer.stages import plan
from romer.stages.evaluate import by_hand
from romer.stages.job import Job, application
from romer.tracking import Run

METHODS = ("vanilla", "romer")  # beside the clean model


@application("generate")
def main(job: Job, run: Run) -> None:
    """Writes continuations.json (rows of method, factor of the operating point's σ_dev, sigma_dev, prompt, text) and
    coverage.csv."""
    size = job.config["profile"]["generate"]
    model, tokenizer = job.load()
    noise, fitted = job.noise(), plan.read(job, model, tokenizer, METHODS)
    if not noise.sigma_dev:
        raise InputError("noise.source: figure 1 multiplies sigma_dev, which is 0 here; expected source fitted")
    texts: list[str] = []  # of the point that `sweep` has just measured

    def measure() -> float:
        texts[:] = continuations(model, tokenizer, size["prompts"], size["tokens"])
        return float(len(texts))

    rows, used, measured = [], [], []
    for factor in (0, *size["factors"]):  # 0: no noise
        wanted = points(fitted, [(name, {}) for name in (METHODS if factor else ("clean",))], [0])
        context = {"prompts": size["prompts"], "new_tokens": size["tokens"], "factor": factor}
        keys = dict(zip(wanted, job.point_keys([p.key for p in wanted], context), strict=True))
        missing = [p for p in wanted if job.points.get(keys[p]) is None]
        scaled = dataclasses.replace(noise, sigma_dev=noise.sigma_dev * factor)
        for point, _ in sweep(model, missing, fitted, scaled, job.placement, measure):
            job.point(keys[point], f"{point.method}-{factor}", lambda: {"texts": list(texts)})
            job.say(f"{point.method}, {factor} σ_dev: {texts[0]!r}")
        for point in wanted:
            found = job.points.get(keys[point])["texts"]
            at = {"method": point.method, "factor": factor, "sigma_dev": scaled.sigma_dev}
            rows += [at | {"prompt": p, "text": t} for p, t in zip(size["prompts"], found, strict=True)]
        used += keys.values()
        measured += wanted
    with job.write(by_hand(job)) as folder:
        (folder / "continuations.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        job.write_coverage(model, folder, [(p.method, p.options, fitted) for p in measured])
    job.points.clear(used)
    run.summary({"continuations": len(rows)})
