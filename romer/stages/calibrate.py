"""`romer calibrate`: finds the sigma_dev whose output divergence meets the chip's target (the paper's figure 2, right).

romer calibrate chip=table1 model=olmoe temperature=80        # a published noise level
romer calibrate chip=rram_b temperature=100                   # measured cells: their simulation is the target
romer calibrate chip=pcm profile.calibrate.identify_bits=[6,8,10]
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pandas as pd

from romer import InputError, NoiseModel, kl_divergence, log_probabilities, program
from romer.adc import Adc, Converter, write_ranges
from romer.arrays import calibrate_ranges
from romer.calibration import SigmaFit, compared_layers, decoder_layers, fit_sigma, recorded_layers
from romer.chips import files
from romer.stages.job import CALIBRATION_REALISATIONS, Job, application
from romer.tracking import Run


class Comparison:
    """The clean model on calibration text, and how far noise takes it from there."""

    def __init__(self, job: Job):
        self.job, self.size = job, job.cfg.profile.calibrate
        self.model, tokenizer = job.load()
        self.ids = job.ids(tokenizer, "calibration", self.size.tokens)
        # Short contexts: where noise upsets what the first token does, all that follows in its context goes wrong.
        contexts = job.cfg.profile.window * job.cfg.profile.batch // self.size.window
        self.shape = (self.size.window, contexts)
        self.keys: list[dict] = []  # of all points, to forget them when the artifact stands
        self.context = {name: self.size[name] for name in ("tokens", "window", "realisations")}
        with recorded_layers(self.model) as self.layers:
            self.reference = log_probabilities(self.model, self.ids, *self.shape)
        expected, layers = job.chip.layer_error, len(decoder_layers(self.model))
        if expected is not None and len(expected) != layers:
            path = files(job.config["chip"])["end_to_end"]
            raise InputError(f"{path}: layer_error_std: found {len(expected)} layers, the model has {layers}")

    def converter(self, adc: Adc | None) -> Converter | None:
        """The ADC with ranges from the clean model on the calibration text."""
        if adc is None:
            return None
        cfg = self.job.cfg.profile  # contexts as long as those that are evaluated: a KV cache has tiles for late tokens
        return Converter(adc, calibrate_ranges(self.model, self.ids, adc, self.job.placement, cfg.window, cfg.batch))

    def measure(self, noise: NoiseModel) -> dict:
        """KL(clean ‖ noisy) in nats per token and each layer's relative error, for every realisation.

        Raises InputError where a value is not finite: errors so large that the model overflows.
        """
        kl, layers = [], []
        for r in range(self.size.realisations):
            with program(self.model, noise, CALIBRATION_REALISATIONS + r, self.job.placement):
                with compared_layers(self.model, self.layers) as errors:
                    kl.append(kl_divergence(self.model, self.ids, self.reference, *self.shape))
            if not all(map(math.isfinite, (kl[-1], *errors.relative))):
                what = f"sigma_dev = {noise.sigma_dev:.4g}" if noise.sigma_dev else "its own errors"
                raise InputError(
                    f"chip {self.job.chip.name} at {self.job.chip.temperature_c:g} C: under {what} the model's KL is"
                    f" {kl[-1]} and its layers err by up to {max(errors.relative)}, expected finite numbers"
                )
            layers.append(errors.relative)
        return {"mean_kl": statistics.mean(kl), "kl": kl, "layers": layers}

    def between(self, first: NoiseModel, second: NoiseModel) -> dict:
        """KL(first ‖ second) in nats per token for every realisation, each with noise of its own."""
        kl, n = [], self.size.realisations
        for r in range(CALIBRATION_REALISATIONS, CALIBRATION_REALISATIONS + n):
            with program(self.model, first, r, self.job.placement):
                reference = log_probabilities(self.model, self.ids, *self.shape)
            with program(self.model, second, r + n, self.job.placement):
                kl.append(kl_divergence(self.model, self.ids, reference, *self.shape))
        return {"mean_kl": statistics.mean(kl), "kl": kl}

    def point(self, what: dict, name: str, compute: Callable[[], dict]) -> dict:
        """A measurement, made once even if the job is killed later."""
        self.keys += self.job.point_keys([what], self.context)
        return self.job.point(self.keys[-1], name, compute)


def adc_key(adc: Adc | None) -> dict | None:
    """The ADC as plain JSON."""
    return None if adc is None else asdict(adc)


def fit(comparison: Comparison, target: float, converter: Converter | None) -> tuple[SigmaFit, dict[float, dict]]:
    """(fit, measurements by σ_dev) of eq. 2 with the converter's ADC."""
    seen: dict[float, dict] = {}
    adc = converter.adc if converter else None

    def divergence(sigma: float) -> list[float]:
        noise = NoiseModel(sigma, comparison.job.cfg.seed, (), converter)
        what = {"sigma_dev": sigma, "adc": adc_key(adc)}
        seen[sigma] = comparison.point(what, f"sigma-{sigma:.5g}", lambda: comparison.measure(noise))
        comparison.job.say(f"sigma_dev {sigma:.5f}: KL {seen[sigma]['mean_kl']:.5f}, target {target:.5f}")
        return seen[sigma]["kl"]

    return fit_sigma(divergence, target), seen


def identify(comparison: Comparison, target: float, bits: Iterable[int], chip_layers: list[float] | None) -> list[dict]:
    """One row for each ADC resolution: the σ_dev that meets the same target with it, and what the layers then say.

    KL alone does not tell device noise from conversion noise: every row meets the target equally well. Where the chip
    has no ADC, its range is that of what occurs, because clipping is neither.
    """
    rows = []
    for b in bits:
        adc = replace(comparison.job.chip.adc or Adc(percentile=100.0), bits=b)
        row = {"bits": b, "sigma_dev": math.nan, "kl": math.nan, "evaluations": 0, "layer_distance": None}
        converter = comparison.converter(adc)
        try:
            found, seen = fit(comparison, target, converter)
        except InputError as error:  # the conversions alone may be beyond the target
            comparison.job.say(f"{b} bits: {error}")
        else:
            row |= {"sigma_dev": found.sigma_dev, "kl": found.kl, "evaluations": found.evaluations}
            if chip_layers is not None:
                row["layer_distance"] = log_distance(means(seen[found.sigma_dev]["layers"]), chip_layers)
        rows.append(row)
    return rows


def layer_rows(source: str, layers: list[list[float]]) -> list[tuple]:
    """(layer, realisation, source, relative error) of [realisations][layers]."""
    return [(layer, r, source, error) for r, errors in enumerate(layers) for layer, error in enumerate(errors)]


def means(layers: list[list[float]]) -> list[float]:
    """Mean over realisations of [realisations][layers]."""
    return [statistics.mean(values) for values in zip(*layers, strict=True)]


def log_distance(a: list[float], b: list[float]) -> float | None:
    """Root mean square of ln(a / b) over the layers where both err (digital ones before the first array do not): 0.1
    is 10 %. None where there is no such layer."""
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
    return math.sqrt(statistics.mean(v**2 for v in logs)) if logs else None


def check(job: Job) -> list[int]:
    """profile.calibrate.identify_bits. Raises InputError for what would only be found after the work."""
    size = job.config["profile"]["calibrate"]
    bits = size.get("identify_bits") or []
    if not isinstance(bits, list) or not all(type(b) is int and 2 <= b <= 24 for b in bits):
        raise InputError(f"profile.calibrate.identify_bits: found {bits!r}, expected a list of integers from 2 to 24")
    for name in ("realisations", "tokens"):
        if type(size[name]) is not int or size[name] < 1:
            raise InputError(f"profile.calibrate.{name}: found {size[name]!r}, expected an integer of at least 1")
    longest = job.config["profile"]["window"]
    if type(size["window"]) is not int or not 2 <= size["window"] <= longest:
        what = f"found {size['window']!r}, expected an integer from 2 to profile.window = {longest}"
        raise InputError(f"profile.calibrate.window: {what}")
    if job.chip.kl_target is None and not job.chip.errors:
        raise InputError(f"chip {job.chip.name}: has an ADC alone, which leaves no device noise to fit sigma_dev to")
    return bits


@application("calibrate")
def main(job: Job, run: Run) -> None:
    """Writes calibration.json (sigma_dev, its range over realisations, target), kl_curve.csv, layers.csv (relative
    error of each layer, chip and noise model), identifiability.csv, coverage.csv and, with an ADC, its ranges."""
    cfg, chip = job.cfg, job.chip
    bits = check(job)
    for note in chip.notes:
        job.say(note)
    comparison = Comparison(job)
    converter = comparison.converter(chip.adc)
    own = NoiseModel(0.0, cfg.seed, chip.errors, converter)  # the chip itself, as far as it was measured
    what = {"chip": job.config["chip"], "adc": adc_key(chip.adc)}
    # Also beside a measured target: how much of it the chip's own errors explain.
    simulated = comparison.point(what, "chip", lambda: comparison.measure(own)) if chip.errors else None
    target = simulated["mean_kl"] if chip.kl_target is None else chip.kl_target
    found, seen = fit(comparison, target, converter)
    fitted = seen[found.sigma_dev]
    rows = layer_rows("noise model", fitted["layers"])
    measured = None if chip.layer_error is None else [list(chip.layer_error)]
    chip_layers, across = measured or (simulated["layers"] if simulated else None), None
    if chip_layers is not None:
        rows += layer_rows("chip", chip_layers)
        chip_layers = means(chip_layers)
    if simulated is not None:
        model = NoiseModel(found.sigma_dev, cfg.seed, (), converter)
        across = comparison.point(what | {"across": found.sigma_dev}, "across", lambda: comparison.between(own, model))
    identified = identify(comparison, target, bits, chip_layers)
    result = {
        "sigma_dev": found.sigma_dev,
        "sigma_low": min(found.sigma_by_realisation),
        "sigma_high": max(found.sigma_by_realisation),
        "slope": found.slope,
        "kl": found.kl,
        "kl_target": target,
        "kl_simulated": simulated["mean_kl"] if simulated else None,
        "kl_chip_model": across["mean_kl"] if across else None,
        "layer_distance": log_distance(means(fitted["layers"]), chip_layers) if chip_layers else None,
        "evaluations": found.evaluations,
        "realisations": comparison.size.realisations,
        "tokens": comparison.size.tokens,
        "window": comparison.size.window,
        "adc": adc_key(chip.adc),
        "notes": list(chip.notes),
    }
    with job.write() as folder:
        curve = [(sigma, r, kl) for sigma, kls in found.curve for r, kl in enumerate(kls)]
        pd.DataFrame(curve, columns=["sigma_dev", "realisation", "kl"]).to_csv(folder / "kl_curve.csv", index=False)
        layers = pd.DataFrame(rows, columns=["layer", "realisation", "source", "relative_error"])
        layers.to_csv(folder / "layers.csv", index=False)
        columns = ["bits", "sigma_dev", "kl", "evaluations", "layer_distance"]
        pd.DataFrame(identified, columns=columns).to_csv(folder / "identifiability.csv", index=False)
        if converter is not None:
            write_ranges(converter.ranges, folder / "ranges.safetensors")
        (folder / "calibration.json").write_text(json.dumps(result, indent=2) + "\n")
        job.write_coverage(comparison.model, folder)
    job.points.clear(comparison.keys)
    run.summary({k: v for k, v in result.items() if isinstance(v, int | float)})
