"""Finds the σ_dev at which a model's output divergence meets a chip's target (the paper's figure 2).

    fit = fit_sigma(lambda sigma: [kl of realisation r at sigma for r in ...], target=0.14)

KL(p_clean ‖ p_noisy) grows like σ² for small σ, so the root finder works on log KL against log σ, where the curve is
nearly a line, with the same realisations at every σ (common random numbers).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from romer.errors import InputError

TOLERANCE = 0.018  # relative, of the mean KL to its target, at which the search stops
ACCEPTED = 0.02  # likewise, of the best σ when the evaluations are used up: KL(σ) jumps where tokens change experts
MAX_EVALUATIONS = 12
CLOSE, APART = 0.2, 0.002  # of ln KL to its target, for a line through what is known; of ln σ, between two tries
TYPICAL = (  # (KL in nats a token, σ_dev) of eq. 2 on small mixtures of experts: where a search may begin
    (0.014, 3e-4),
    (0.06, 0.012),
    (0.22, 0.05),
    (0.65, 0.1),
    (1.2, 0.14),
    (2.2, 0.2),
    (5.0, 0.32),
)
NEAR = 0.1  # of ln σ: closer together, two KL say more about a jump between them than about a slope


@dataclass(frozen=True)
class SigmaFit:
    """sigma_dev meets `target` (nats a token) on average over realisations; curve: (σ, KL of each realisation) as
    evaluated, sorted.

    slope: d ln KL / d ln σ around sigma_dev: 2 where the model answers smoothly, far less where what counts is that any
    disturbance at all makes some tokens change experts. sigma_by_realisation: the σ at which each realisation alone
    would meet the target, by that slope.
    """

    sigma_dev: float
    kl: float
    target: float
    slope: float
    sigma_by_realisation: tuple[float, ...]
    curve: tuple[tuple[float, tuple[float, ...]], ...]

    @property
    def evaluations(self) -> int:
        """How many σ were tried."""
        return len(self.curve)


def fit_sigma(
    divergence: Callable[[float], Sequence[float]],
    target: float,
    start: float | None = None,
    bounds: tuple[float, float] = (1e-7, 2.0),
    tolerance: float = TOLERANCE,
) -> SigmaFit:
    """σ_dev for a KL target.

    divergence(σ) returns the KL of every realisation, in nats; the mean meets `target` within `tolerance` (relative),
    or within ACCEPTED where twelve evaluations do not find better. From `start`, or from the σ at which a typical model
    meets such a target, brackets by the σ² law, then along the secant of the last two σ, then regula falsi (Illinois)
    on the logarithms, or a line through all close points once there are three. Raises InputError for a target that is
    not positive and finite or cannot be met within `bounds` and twelve evaluations.
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
    x = min(max(math.log(_typical(target) if start is None else start), low_bound), high_bound)
    y = gap(x)
    below, above = ((x, y), None) if y < 0 else (None, (x, y))
    reach = 0.05
    while abs(y) > math.log1p(tolerance) and (below is None or above is None):  # bracket
        if len(curve) >= MAX_EVALUATIONS or x == (high_bound if y < 0 else low_bound):
            best = target * math.exp(y)
            raise InputError(
                f"KL target {target:.4g} cannot be met: at sigma_dev = {math.exp(x):.4g} the model's KL is {best:.4g}"
            )
        slope = _slope(curve, math.exp(x)) if len(curve) > 1 else 2.0  # KL ~ σ² until the curve says otherwise
        step = -y / slope
        step += math.copysign(min(reach, NEAR + abs(step) / 10), -y)  # reach doubles, for a start on a plateau
        x, reach = min(max(x + step, low_bound), high_bound), 2 * reach
        y = gap(x)
        below, above = ((x, y), above) if y < 0 else (below, (x, y))
    side = 0
    while abs(y) > math.log1p(tolerance):
        if len(curve) >= MAX_EVALUATIONS:
            y, x = min((abs(math.log(sum(kl) / len(kl) / target)), math.log(s)) for s, kl in curve.items())
            if y <= math.log1p(ACCEPTED):
                break
            raise InputError(f"KL target {target:.4g} not met within {MAX_EVALUATIONS} evaluations (noise too coarse?)")
        (x0, y0), (x1, y1) = below, above
        x = _through(curve, target) or (x0 * y1 - x1 * y0) / (y1 - y0)
        y = gap(x)
        if y < 0:
            below, above = (x, y), (x1, y1 / 2 if side == -1 else y1)
            side = -1
        else:
            below, above = (x0, y0 / 2 if side == 1 else y0), (x, y)
            side = 1
    sigma = min(curve, key=lambda s: abs(math.log(s) - x))  # exp(x), bit by bit
    if len(curve) < MAX_EVALUATIONS and not _apart(curve, sigma):
        gap(max(x - 3 * NEAR, low_bound))  # a fit close to where it started knows no slope, so no interval either
    slope = _slope(curve, sigma)
    alone = tuple(sigma * (target / kl) ** (1 / slope) for kl in curve[sigma])
    mean = sum(curve[sigma]) / len(curve[sigma])
    return SigmaFit(sigma, mean, target, slope, alone, tuple(sorted(curve.items())))


def _typical(target: float) -> float:
    """A σ_dev to begin with for a KL target: along TYPICAL, in logarithms, and by the σ² law outside it."""
    kl, sigma = np.log(TYPICAL).T
    wanted = math.log(target)
    inside = min(max(wanted, kl[0]), kl[-1])
    return math.exp(np.interp(inside, kl, sigma) + (wanted - inside) / 2)


def _through(curve: dict[float, tuple[float, ...]], target: float) -> float | None:
    """ln σ where a line through ln KL of the σ that came close meets the target: where KL jumps, many points know
    better than the two on either side. None while there are fewer than three, or no line."""
    points = [(math.log(s), math.log(sum(kl) / len(kl) / target)) for s, kl in curve.items()]
    near = [(x, y) for x, y in points if abs(y) < CLOSE]
    if len(near) < 3:
        return None
    at, off, slope = _line(near)
    if slope < 0.1:
        return None
    x = at - off / slope
    while any(abs(x - tried) < APART for tried, _ in points):
        x += math.copysign(APART, -off)  # another draw of the jumps
    return x if min(near)[0] - NEAR <= x <= max(near)[0] + NEAR else None


def _apart(curve: dict[float, tuple[float, ...]], sigma: float) -> list[float]:
    """The σ tried that are far enough from `sigma` to tell a slope from a jump."""
    return [s for s in curve if abs(math.log(s / sigma)) >= NEAR]


def _slope(curve: dict[float, tuple[float, ...]], sigma: float) -> float:
    """d ln KL / d ln σ around σ: least squares over the σ tried within a factor of 3, or else to the nearest other one.

    At least 0.1, because KL jumps where tokens change experts; 2 where no other σ was tried.
    """
    at = {s: math.log(s / sigma) for s in curve}
    near = {s: d for s, d in at.items() if abs(d) < math.log(3)}
    if len(near) < 2 or max(near.values()) - min(near.values()) < NEAR:
        if not (others := _apart(curve, sigma)):
            return 2.0
        near = {s: at[s] for s in (sigma, min(others, key=lambda s: abs(at[s])))}
    log_kl = {s: math.log(sum(curve[s]) / len(curve[s])) for s in near}
    return max(0.1, _line([(near[s], log_kl[s]) for s in near])[2])


def _line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(mean x, mean y, slope) of the least-squares line through points (x, y)."""
    at, off = (sum(v) / len(points) for v in zip(*points, strict=True))
    return at, off, sum((x - at) * (y - off) for x, y in points) / sum((x - at) ** 2 for x, _ in points)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM of transformers. Raises InputError where it has none."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise InputError(f"model: {type(model).__name__} has no decoder layers to compare")
    return layers


@contextmanager
def _watched(model: nn.Module, visit: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):

            def hook(module, args, output, index=index):
                visit(index, output[0] if isinstance(output, tuple) else output)

            stack.callback(layer.register_forward_hook(hook).remove)
        yield


@contextmanager
def recorded_layers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the output [B, S, H] of every layer of every forward pass inside, in order."""
    outputs: list[torch.Tensor] = []
    with _watched(model, lambda index, output: outputs.append(output.detach().cpu())):
        yield outputs


class LayerErrors:
    """Relative error of each layer's output over tokens: sqrt(mean over tokens of ‖h̃ - h‖² / ‖h‖²), end to end.

    Relative to the token's own norm, because a few tokens carry activations a hundred times those of the others.
    """

    def __init__(self, clean: Sequence[torch.Tensor], layers: int):
        self.clean, self.sums, self.tokens, self.seen = clean, [0.0] * layers, [0] * layers, 0

    def visit(self, index: int, output: torch.Tensor) -> None:
        """Compares the next output with the clean one that was recorded in its place."""
        clean = self.clean[self.seen].double()
        error = (output.detach().cpu().double() - clean).square().sum(-1) / clean.square().sum(-1)
        self.sums[index] += error.sum().item()
        self.tokens[index] += error.numel()
        self.seen += 1

    @property
    def relative(self) -> list[float]:
        """One number for each layer."""
        return [math.sqrt(s / n) for s, n in zip(self.sums, self.tokens, strict=True)]


@contextmanager
def compared_layers(model: nn.Module, clean: Sequence[torch.Tensor]) -> Iterator[LayerErrors]:
    """Compares every layer's output inside with `clean`, recorded over the same forward passes."""
    errors = LayerErrors(clean, len(decoder_layers(model)))
    with _watched(model, errors.visit):
        yield errors
