"""What a read-back says of the cells of an array, each reading weighed by how far it can be trusted.

    seen = as_read(noise)
    reading = seen.realise(name, weight, realisation) + 0.01 * weight.abs().max() * torch.randn_like(weight)
    stands = estimate(reading, weight, read_sigma(seen, weight, relative=0.01), unit(seen, weight))

A cell that was to hold t holds t + δ, and is read as m = t + δ + ξ. Taken at its word, a reading whose error ξ is
larger than the programming error δ does more harm than none. The best estimate under Gaussian errors is the posterior
mean t + µ + τ² / (τ² + s²) (m - t - µ), with the mean µ and variance τ² of δ at that target and the standard deviation
s of ξ. µ (of errors away from 0) and τ² are estimated from the readings of the array itself, in groups of cells of like
|t| (empirical Bayes: Efron and Morris 1973, DOI 10.1080/01621459.1973.10481350), and drawn toward 0 by what chance
explains, so nothing need be known of the devices but s.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from romer.chips.pcm import Pcm
from romer.noise import Conductance, Drift, NoiseModel

BINS = 64  # of |t|, narrower toward 0, where most weights are
LEAST_CELLS = 256  # of a group: bins with fewer are joined with the next smaller ones
READING = {"read_error": 0.0, "read_seconds": Pcm.read_seconds}  # options of methods that read arrays back
SURE = 3.0  # standard errors beyond which a statistic is believed, for what is beyond them


def reading(options: Mapping) -> dict[str, float]:
    """Those of a method's options that say how arrays are read back."""
    return {name: float(options[name]) for name in READING}


def _reads(error) -> bool:
    """Whether an error is that of cells whose reads are noisy."""
    return isinstance(error, Conductance) and isinstance(error.cells, Pcm) and error.cells.read


def reads_noisily(noise: NoiseModel) -> bool:
    """Whether cells are read with noise of their own."""
    return any(map(_reads, noise.errors))


def as_read(
    noise: NoiseModel, written: bool = False, reading: str = "back", read_seconds: float = Pcm.read_seconds
) -> NoiseModel:
    """The errors that a read-back sees: those of the arrays themselves, with read noise of its own where the cells have
    any (each `reading` another), less in a read that takes longer; `written`: right after programming, before drift.
    Raises InputError for a duration that no read has."""

    def seen(error):
        if not (isinstance(error, Conductance) and isinstance(error.cells, Pcm)):
            return error
        own = {"reading": f" {reading}", "read_seconds": read_seconds} if error.cells.read else {}
        cells = replace(error.cells, **own)
        return replace(error, cells=replace(cells, seconds=Pcm.T_REFERENCE) if written else cells)

    errors = tuple(seen(e) for e in noise.errors if not (written and isinstance(e, Drift)))
    return noise if errors == noise.errors else replace(noise, errors=errors)


def read_sigma(
    noise: NoiseModel,
    values: torch.Tensor,
    relative: float = 0.0,
    full_range: float | torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
    arrays: int = 1,
) -> torch.Tensor:
    """Standard deviation of the error of one reading of each cell: float32 of the shape of `values` [out, in] and in
    their unit, or a single 0 for exact readings.

    noise: as the reading sees it (`as_read`), of which the cells' own read noise counts; relative: that of the
    instrument, as a share of the largest |value| of the array; arrays: how many the rows are of; full_range, largest:
    where values are only a part of them, what can be stored and the largest |value| of the array, each [1 or out, 1].
    """
    noisy = [e for e in noise.errors if _reads(e)]
    if not noisy and not relative:
        return values.new_zeros(())
    rows, whole = len(values) // arrays, full_range is None

    def of_each(numbers: torch.Tensor) -> torch.Tensor:  # [arrays] as [out, 1]
        return numbers.repeat_interleave(rows)[:, None]

    top = of_each(values.abs().view(arrays, -1).amax(1)) if largest is None else largest
    variance = (relative * top).square().expand(values.shape).clone()
    for error in noisy:
        by_column = whole and error.scaling == "column"
        stored = values.abs().amax(1, keepdim=True) if by_column else top if whole else full_range
        plus, minus, scale = error.pair(values, full_range=stored)
        own = (error.cells.read_sigma(plus).square() + error.cells.read_sigma(minus).square()) / scale.square()
        if error.compensate and whole:  # what multiplies the reading multiplies its error
            left = plus * error.cells.decay(plus) - minus * error.cells.decay(minus)
            before, after = ((x.abs().view(arrays, -1).sum(1)) for x in (plus - minus, left))
            own *= of_each(before / after.clamp(min=1e-30)).square()
        variance += own
    return variance.sqrt()


def unit(noise: NoiseModel, values: torch.Tensor) -> torch.Tensor:
    """In what the errors of an array's cells are alike: the largest |value| of each output column [out, 1] where every
    column has the full range, else 1."""
    if any(isinstance(e, Conductance) and e.scaling == "column" for e in noise.errors):
        return values.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return values.new_ones(())


def estimate(
    reading: torch.Tensor,
    targets: torch.Tensor,
    sigma: torch.Tensor,
    unit: torch.Tensor | None = None,
    arrays: int = 1,
) -> torch.Tensor:
    """The posterior mean of what the cells hold: float32 of the shape of `reading` and `targets` [out, in].

    sigma: of the reading, of that shape, or a single number; unit: cells with like targets in multiples of it are alike
    (see `unit`), 1 where None; arrays: how many the rows are of, each with groups of its own.
    """
    if not sigma.any():
        return reading
    sign = torch.where(targets < 0, -1.0, 1.0)
    sign = sign if unit is None else sign * unit
    error, size = ((reading - targets) / sign).flatten(), (targets / sign).flatten()
    noise = (sigma / sign).square().expand(targets.shape).flatten().double()
    size = size.view(arrays, -1)
    place = ((size / size.amax(1, keepdim=True).clamp(min=1e-30)).sqrt() * BINS).long().clamp(0, BINS - 1)
    place = (place + BINS * torch.arange(arrays, device=place.device)[:, None]).flatten()
    counts = torch.bincount(place, minlength=arrays * BINS).view(arrays, BINS).tolist()
    group = _groups(counts).to(place.device)[place]

    def mean(x, weight):  # and on how many cells it rests
        total = torch.bincount(group, weight)
        return torch.bincount(group, x * weight) / total, total.square() / torch.bincount(group, weight.square())

    weight = torch.ones_like(noise)
    if noise.min() < noise.max():  # what is read badly tells less: as their squares vary, by a first guess of τ²
        guess = (mean(error.double().square(), weight)[0] - mean(noise, weight)[0]).clamp(min=0)[group]
        weight = (noise.mean() / (noise + guess).clamp(min=1e-60)).square()
    mu, cells = mean(error.double(), weight)
    spread = (error - mu.to(error)[group]).double().square()
    (square, _), (expected, _) = mean(spread, weight), mean(noise, weight)
    mu = mu * (1 - SURE**2 * square / (cells * mu.square()).clamp(min=1e-60)).clamp(min=0)
    tau = (square - expected - SURE * (2 / cells).sqrt() * expected).clamp(min=0)[group]
    mu = mu.to(error)[group]
    trust = torch.where(noise > 0, tau / (tau + noise).clamp(min=1e-60), 1.0).to(error)
    return targets + (mu + trust * (error - mu)).view_as(targets) * sign


def _groups(counts: list[list[int]]) -> torch.Tensor:
    """int64 [arrays · bins]: the group of each bin of so many cells, from 0 without gaps; groups of LEAST_CELLS where
    there are as many."""
    groups = []
    for array, row in enumerate(counts):
        number, held, left = 0, 0, sum(row)
        own = [0] * len(row)
        for i in range(len(row) - 1, -1, -1):  # the largest targets first
            if held >= LEAST_CELLS and left >= LEAST_CELLS:
                number, held = number + 1, 0
            own[i] = array * len(row) + number
            held, left = held + row[i], left - row[i]
        groups += own
    return torch.unique(torch.tensor(groups), return_inverse=True)[1]
