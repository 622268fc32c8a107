"""Compensated programming: arrays are written a block of inputs at a time and read back, and the error of what stands
is made up for in what is still to be written.

    encoding = Compensated(moments, block=32)
    w = realise(encoding, NoiseModel(0.1), "model.layers.0.self_attn.q_proj.weight", weight, realisation=3)

With inputs of second moment R, an error Δ costs tr(Δ R Δᵀ). Once the columns of a block B are fixed with error δ, the
least cost is reached by shifting the targets of the columns C still to come by δ (R⁻¹)_BB⁻¹ (R⁻¹)_BC, the inverse being
that over B and C alone: the second-order update of OBQ (Frantar and Alistarh 2022, arXiv:2208.11580) and GPTQ (Frantar
et al. 2022, arXiv:2210.17323), with a device's programming error in place of a rounding error. It takes cells and run
time as the plain layout does; what it needs is one read-back of every block, and writing blocks one after the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from romer.errors import InputError
from romer.moments import Moments, of
from romer.noise import Conductance, Draws, NoiseModel
from romer.readback import as_read, estimate, read_sigma, unit

LAZY = 6  # blocks whose effect on inputs far off is added up before it is applied: the same sums, less memory traffic
DAMPING = 0.01  # of the mean input power, on the diagonal of R: as GPTQ's


class _Columns(Draws):
    """The draws of some columns (inputs) of a whole array, by their places in `order`: a cell's error is the one it has
    in any other layout."""

    def __init__(self, draws: Draws, shape: torch.Size, order: torch.Tensor):
        super().__init__(draws.seed, draws.realisation, draws.tensor, draws.replica)
        for name, value in (("shape", shape), ("order", order), ("places", slice(None)), ("kept", {})):
            object.__setattr__(self, name, value)

    def at(self, places: slice) -> "_Columns":
        """The same array, at the columns in these places."""
        object.__setattr__(self, "places", places)
        return self

    def shared(self, kind: str, like: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
        """As `Draws.shared`, of the columns chosen."""
        if not isinstance(like, torch.Tensor):
            raise InputError(f"compensated programming: errors of kind {kind!r} are not those of single cells")
        if kind not in self.kept:
            self.kept[kind] = super().shared(kind, tuple(self.shape)).to(like.device)[:, self.order]
        return self.kept[kind][:, self.places]


@dataclass(frozen=True)
class Compensated:
    """block: inputs written at a time; read_error: standard deviation of one read-back of a cell, relative to the
    largest |w| of the array; moments: of the inputs of each array.

    Blocks go in the order of falling input power, so what cannot be made up for is what matters least. What is read
    back is what was just written: drift comes later; a reading counts as far as it can be trusted (`romer.readback`).
    An expert that few tokens chose leans on all tokens (see `romer.moments`). Raises InputError for settings out of
    range, an array without moments, and errors that belong to whole columns.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    block: int = 32
    read_error: float = 0.0
    latest: list = field(default_factory=list, compare=False, repr=False)  # values, draws and `known` of the last write

    cells, products = 1.0, 1.0

    def __post_init__(self):
        if type(self.block) is not int or self.block < 1:
            raise InputError(f"compensated programming: block: found {self.block!r}, expected an integer of at least 1")
        if not (math.isfinite(self.read_error) and self.read_error >= 0):
            found = f"read_error: found {self.read_error}"
            raise InputError(f"compensated programming: {found}, expected a finite number ≥ 0")

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The values [out, in] as they act, float32."""
        if (moments := of(self.moments, draws.tensor)) is None:
            raise InputError(f"compensated programming: no calibration inputs of {draws.tensor}")
        values = values.float()
        if not values.any():
            return values.clone()
        pairs = [e for e in noise.errors if isinstance(e, Conductance)]
        top = values.abs().max()
        if any(e.scaling == "column" for e in pairs):
            top = values.abs().amax(1, keepdim=True)
        order, upper = factor(moments)
        targets, (acts, known) = values[:, order], torch.empty(2, *values.shape).to(values)  # all in that order
        cells, seen, alike = _Columns(draws, values.shape, order), as_read(noise, written=True), unit(noise, values)
        inputs, together = values.shape[1], LAZY * self.block
        for first in range(0, inputs, together):
            group, after, kept = slice(first, first + together), slice(first + together, None), []
            for start in range(first, min(first + together, inputs), self.block):
                block = slice(start, start + self.block)
                known[:, block] = wanted = targets[:, block].clamp(-top, top) if pairs else targets[:, block]
                read = acts[:, block] = noise.store(wanted, cells.at(block), full_range=top)
                if start + self.block >= inputs:
                    break
                if seen is not noise:
                    read = seen.store(wanted, cells.at(block), full_range=top)
                if self.read_error:
                    read = read + self.read_error * top.max() * cells.shared("read back", read)
                sigma = read_sigma(seen, wanted, self.read_error, top)
                known[:, block] = estimate(read, wanted, sigma, alike)
                error = known[:, block] - targets[:, block]
                kept.append(torch.linalg.solve_triangular(upper[block, block], error, upper=True, left=False))
                soon = slice(start + self.block, first + together)
                targets[:, soon] += kept[-1] @ upper[block, soon]
            if first + together < inputs:
                targets[:, after] += torch.cat(kept, 1) @ upper[group, after]
        if any(e.compensate for e in pairs) and (total := acts.abs().sum()) > 0:
            acts *= values.abs().sum() / total  # the mean decay, as `Conductance` takes it out of a whole array
        back = order.argsort()
        self.latest[:] = values, draws, known[:, back]
        return acts[:, back]

    def known(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the cells are known to hold before the finished array is read, float32 [out, in]: targets that were
        shifted on purpose, and what the read-back of each block said."""
        values = values.float()
        if not values.any():
            return values
        if not self.latest or self.latest[0] is not values or self.latest[1] != draws:
            self.store(noise, values, draws)
        return self.latest[2]


_FACTORS: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
_kept_bytes = 0
KEPT_BYTES = 2**28  # of factors: weights share moments, and every realisation needs them again


def factor(seen: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [in], U [in, in]): inputs by falling power, and the upper Cholesky factor of R⁻¹ = Uᵀ U in that order, R
    the damped second moment; float32."""
    global _kept_bytes
    if (known := _FACTORS.get(id(seen.second))) is not None and known[0] is seen.second:
        return known[1:]
    order = seen.power.argsort(descending=True, stable=True)
    r = seen.second[order][:, order].double()
    r.diagonal().add_(DAMPING * seen.power.mean().double() + 1e-30)
    # R = V Vᵀ with V upper, out of a lower factor of R reversed; then R⁻¹ = Uᵀ U with U = V⁻¹, and likewise for what is
    # left of R when its first inputs are fixed.
    v = torch.linalg.cholesky(r.flip(0, 1)).flip(0, 1)
    upper = torch.linalg.solve_triangular(v, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True).float()
    _FACTORS[id(seen.second)] = (seen.second, order, upper)
    _kept_bytes += upper.nbytes
    while _kept_bytes > KEPT_BYTES and len(_FACTORS) > 1:
        _kept_bytes -= _FACTORS.pop(next(iter(_FACTORS)))[-1].nbytes
    return order, upper
