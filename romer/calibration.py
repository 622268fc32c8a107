"""Finds the σ_dev at which a model's output divergence meets a chip's target (the paper's figure 2).

    fit = fit_sigma(lambda sigma: [kl of realisation r at sigma for r in ...], target=0.14)

KL(p_clean ‖ p_noisy) grows like σ² for small σ, so the root finder works on log KL against log σ, where the curve is
nearly a line, with the same realisations at every σ (common random numbers).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from romer.errors import InputError

TOLERANCE = 0.01  # relative, of the mean KL to its target
MAX_EVALUATIONS = 12


@dataclass(frozen=True)
class SigmaFit:
    """sigma_dev meets `target` (nats a token) on average over realisations; curve: (σ, KL of each realisation) as
    evaluated, sorted.

    sigma_by_realisation: the σ at which each realisation alone would meet the target, from the local slope of the
    curve.
    """

    sigma_dev: float
    kl: float
    target: float
    sigma_by_realisation: tuple[float, ...]
    curve: tuple[tuple[float, tuple[float, ...]], ...]

    @property
    def evaluations(self) -> int:
        """How many σ were tried."""
        return len(self.curve)


def fit_sigma(
    divergence: Callable[[float], Sequence[float]],
    target: float,
    start: float = 0.05,
    bounds: tuple[float, float] = (1e-4, 2.0),
    tolerance: float = TOLERANCE,
) -> SigmaFit:
    """σ_dev for a KL target.

    divergence(σ) returns the KL of every realisation, in nats; the mean meets `target` within `tolerance` (relative).
    Brackets by the σ² law, then regula falsi (Illinois) on the logarithms. Raises InputError for a target that is not
    positive and finite or cannot be met within `bounds` and twelve evaluations.
    """
    if not (math.isfinite(target) and target > 0):
        raise InputError(f"KL target: found {target}, expected a finite number > 0 (nats per token)")
    curve: dict[float, tuple[float, ...]] = {}

    def gap(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        curve[sigma] = tuple(float(v) for v in divergence(sigma))
        mean = sum(curve[sigma]) / len(curve[sigma])
        if not math.isfinite(mean) or mean <= 0:
            raise InputError(f"KL at sigma_dev = {sigma:.4g} is {mean}, expected a finite number > 0")
        return math.log(mean / target)

    low_bound, high_bound = map(math.log, bounds)
    x = math.log(start)
    y = gap(x)
    below, above = ((x, y), None) if y < 0 else (None, (x, y))
    reach = 0.05
    while abs(y) > math.log1p(tolerance) and (below is None or above is None):  # bracket
        if len(curve) >= MAX_EVALUATIONS or x in (low_bound, high_bound):
            best = target * math.exp(y)
            raise InputError(
                f"KL target {target:.4g} cannot be met: at sigma_dev = {math.exp(x):.4g} the model's KL is {best:.4g}"
            )
        step = -y / 2 + math.copysign(reach, -y)  # KL ~ σ²; reach doubles, for a start on a plateau
        x, reach = min(max(x + step, low_bound), high_bound), 2 * reach
        y = gap(x)
        below, above = ((x, y), above) if y < 0 else (below, (x, y))
    side = 0
    while abs(y) > math.log1p(tolerance):
        if len(curve) >= MAX_EVALUATIONS:
            raise InputError(f"KL target {target:.4g} not met within {MAX_EVALUATIONS} evaluations (noise too coarse?)")
        (x0, y0), (x1, y1) = below, above
        x = (x0 * y1 - x1 * y0) / (y1 - y0)
        y = gap(x)
        if y < 0:
            below, above = (x, y), (x1, y1 / 2 if side == -1 else y1)
            side = -1
        else:
            below, above = (x0, y0 / 2 if side == 1 else y0), (x, y)
            side = 1
    sigma = math.exp(x)
    slope = _slope(curve, sigma)
    alone = tuple(sigma * (target / kl) ** (1 / slope) for kl in curve[sigma])
    mean = sum(curve[sigma]) / len(curve[sigma])
    return SigmaFit(sigma, mean, target, alone, tuple(sorted(curve.items())))


def _slope(curve: dict[float, tuple[float, ...]], sigma: float) -> float:
    """d log KL / d log σ between σ and its nearest neighbour on the curve; 2 where there is none."""
    others = [s for s in curve if s != sigma]
    if not others:
        return 2.0
    near = min(others, key=lambda s: abs(math.log(s / sigma)))
    mean = {s: sum(curve[s]) / len(curve[s]) for s in (near, sigma)}
    return max(0.5, math.log(mean[near] / mean[sigma]) / math.log(near / sigma))
