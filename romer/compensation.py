"""Compensated programming: arrays are written a block of inputs at a time and read back, and the error of what stands
is made up for in what is still to be written.

    encoding = Compensated(moments, block=32)
    w = realise(encoding, NoiseModel(0.1), "model.layers.0.self_attn.q_proj.weight", weight, realisation=3)

With inputs of second moment R, an error Δ costs tr(Δ R Δᵀ). Once the columns of a block B are fixed with error δ, the
least cost is reached by shifting the targets of the columns C still to come by δ (R⁻¹)_BB⁻¹ (R⁻¹)_BC, the inverse being
that over B and C alone: the second-order update of OBQ (Frantar and Alistarh 2022, arXiv:2208.11580) and GPTQ (Frantar
et al. 2022, arXiv:2210.17323), with a device's programming error in place of a rounding error. It takes cells and run
time as the plain layout does; what it needs is one read-back of every block, and writing blocks one after the other.
Experts whose outputs are summed are one array in this, each a block or several of its inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from romer.chips.pcm import Pcm
from romer.errors import InputError
from romer.moments import PRIOR_TOKENS, Moments, of, shared, together
from romer.noise import Conductance, Draws, NoiseModel, rescaled
from romer.readback import as_read, estimate, read_sigma, unit

LAZY = 6  # blocks whose effect on inputs far off is added up before it is applied: the same sums, less memory traffic
SHRINKAGE = 0.5  # R's diagonal grows by this times inputs / tokens: regressions on few tokens fit their chance, too
SHRINKAGE_TOGETHER = 2.0  # of experts that are made up for by one another, whose inputs are mostly 0


class _Columns(Draws):
    """The draws of some columns (inputs) of whole arrays of one shape, one below the other, by their places in `order`
    (None: as they are): a cell's error is the one it has in any other layout."""

    def __init__(self, arrays: Sequence[Draws], one: tuple[int, int], order: torch.Tensor | None = None):
        super().__init__(arrays[0].seed, arrays[0].realisation, arrays[0].tensor, arrays[0].replica)
        own = dict(arrays=arrays, one=one, order=order, places=slice(None), kept={})
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def at(self, places: slice) -> "_Columns":
        """The same arrays, at the columns in these places."""
        object.__setattr__(self, "places", places)
        return self

    def shared(self, kind: str, like: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
        """As `Draws.shared`, of the columns chosen."""
        if not isinstance(like, torch.Tensor):
            raise InputError(f"compensated programming: errors of kind {kind!r} are not those of single cells")
        if kind not in self.kept:
            drawn = torch.cat([draws.shared(kind, self.one) for draws in self.arrays]).to(like.device)
            self.kept[kind] = drawn if self.order is None else _taken(drawn, self.order)
        return self.kept[kind][:, self.places]


@dataclass(frozen=True)
class _Written:
    """An array that was written last: the errors that its read-backs saw, its values, what its cells were to hold in
    the end and what is known that they hold, [out, in]. A further reading of it needs no further writing."""

    noise: NoiseModel
    values: torch.Tensor
    targets: torch.Tensor
    known: torch.Tensor


@dataclass(frozen=True)
class _Block:
    """Inputs that are written together: their columns among all, the cells that hold them and their places in these;
    largest, top: |value| of the array and what can be stored, [out, 1]; alike: as of `romer.readback.unit`."""

    columns: slice
    cells: _Columns
    places: slice
    largest: torch.Tensor
    top: torch.Tensor
    alike: torch.Tensor


def _taken(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of values [S · rows, in] in the order [S, in] of each."""
    if len(order) == 1:
        return values[:, order[0]]
    return values.view(len(order), -1, order.shape[1]).take_along_dim(order[:, None], 2).flatten(0, 1)


def edges(inputs: int, most: int) -> list[int]:
    """Where blocks of inputs begin, and `inputs`: a block has at most `most`, and no more than stand before it. One
    input can carry most of an array's power (that of a massive activation): it is read back by itself."""
    found = [0]
    while found[-1] < inputs:
        found.append(min(inputs, found[-1] + min(most, max(found[-1], 1))))
    return found


@dataclass(frozen=True)
class Compensated:
    """block: inputs written at a time, at most (`edges`); read_error: standard deviation of one read-back of a cell,
    relative to the largest |w| of the array, beside the read noise that cells have of their own, read_seconds: how long
    it takes; least_blocks: of an array, whose blocks are smaller where it has few inputs, because what goes wrong in
    the last block stays; moments: of the inputs of each array.

    Blocks go in the order of falling input power, so what cannot be made up for is what matters least. What is read
    back is what was just written: drift comes later; a reading counts as far as it can be trusted (`romer.readback`).
    An expert that few tokens chose leans on all tokens (see `romer.moments`). Experts whose outputs are summed are
    written as one array of many inputs, the busiest first, where it is known how they go together; a slot that is
    written again later is on its own. Raises InputError for settings out of range, an array without moments, and errors
    that belong to whole columns.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    block: int = 32
    read_error: float = 0.0
    least_blocks: int = 1
    read_seconds: float = Pcm.read_seconds
    latest: dict = field(default_factory=dict, compare=False, repr=False)  # `_Written` by the draws of each array

    cells, products = 1.0, 1.0

    def __post_init__(self):
        if type(self.block) is not int or self.block < 1:
            raise InputError(f"compensated programming: block: found {self.block!r}, expected an integer of at least 1")
        if type(self.least_blocks) is not int or self.least_blocks < 1:
            found = f"least_blocks: found {self.least_blocks!r}"
            raise InputError(f"compensated programming: {found}, expected an integer of at least 1")
        if not (math.isfinite(self.read_error) and self.read_error >= 0):
            found = f"read_error: found {self.read_error}"
            raise InputError(f"compensated programming: {found}, expected a finite number ≥ 0")

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The values [out, in] as they act, float32."""
        return self._store(noise, values.float(), (draws,))

    def store_slots(self, noise: NoiseModel, values: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
        """The values [E, out, in] of the slots of a fused tensor as they act, float32: as `store` one by one, up to
        rounding, which for small experts is many times as fast."""
        values = values.float()
        if values.flatten(1).any(1).all():
            return self._store(noise, values.flatten(0, 1), draws).view_as(values)
        return torch.stack([self._store(noise, w, (d,)) for w, d in zip(values, draws, strict=True)])

    def _store(self, noise: NoiseModel, values: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
        """Arrays of one shape, one below the other, as they act: float32 [arrays · out, in]."""
        if not values.any():
            return values.clone()
        pairs, arrays = [e for e in noise.errors if isinstance(e, Conductance)], len(draws)
        largest = values.view(arrays, -1).abs().amax(1).repeat_interleave(len(values) // arrays)[:, None]
        top = largest
        if any(e.scaling == "column" for e in pairs):
            top = values.abs().amax(1, keepdim=True)
        written = self._as_written(noise)
        if not all(self._stands(written, w, d) for w, d in zip(values.chunk(arrays), draws, strict=True)):
            self._write(written, values, draws, largest, top, bool(pairs))
        targets, one = torch.cat([self.latest[d].targets for d in draws]), (len(values) // arrays, values.shape[1])
        acts = noise.store(targets, _Columns(draws, one), full_range=top)
        if any(e.compensate for e in pairs):  # the mean decay, as `Conductance` takes it out of a whole array
            acts = torch.cat([rescaled(a, t) for a, t in zip(acts.chunk(arrays), targets.chunk(arrays), strict=True)])
        return acts

    def _as_written(self, noise: NoiseModel) -> NoiseModel:
        """The errors that a read-back of a block sees."""
        return as_read(noise, written=True, read_seconds=self.read_seconds)

    def _stands(self, written: NoiseModel, values: torch.Tensor, draws: Draws) -> bool:
        """Whether an array with these values and errors is among those that were written last."""
        found = self.latest.get(draws)
        return found is not None and found.noise == written and found.values.equal(values)

    def _write(
        self,
        seen: NoiseModel,
        values: torch.Tensor,
        draws: Sequence[Draws],
        largest: torch.Tensor,
        top: torch.Tensor,
        bounded: bool,
    ) -> None:
        """Writes arrays block by block and notes in `latest` what their cells were to hold. seen: the errors that a
        read-back of a block sees; largest, top: |value| of the array and what can be stored, [arrays · out, 1]."""
        side = self._side_by_side(seen, values, draws, largest, top)
        if side is not None:
            values, order, upper, blocks = side
            arrays = 1
        else:
            order, upper = self._factors(draws)  # [S, in] and [S, in, in], S = 1 where all see the same inputs
            arrays, inputs = len(draws), values.shape[1]
            cells, alike = _Columns(draws, (len(values) // arrays, inputs), order), unit(seen, values)
            parts = pairwise(edges(inputs, min(self.block, -(-inputs // self.least_blocks))))
            blocks = [_Block(slice(*part), cells, slice(*part), largest, top, alike) for part in parts]
        targets, known, inputs = _taken(values, order), torch.empty_like(values), values.shape[1]  # all in that order

        def apart(errors: torch.Tensor) -> torch.Tensor:  # by their factors
            return errors.view(len(order), -1, errors.shape[1])

        for i in range(0, len(blocks), LAZY):
            few = blocks[i : i + LAZY]
            first, last, kept = few[0].columns.start, few[-1].columns.stop, []
            for at in few:
                columns, end, missed = at.columns, at.columns.stop, targets[:, at.columns]
                if bounded:
                    missed = missed.clone()
                    targets[:, columns] = missed.clamp(-at.top, at.top)
                wanted = targets[:, columns]
                if end == inputs:
                    known[:, columns] = wanted
                    break
                cells = at.cells.at(at.places)
                read = seen.store(wanted, cells, full_range=at.top)
                if self.read_error:
                    read = read + self.read_error * at.largest * cells.shared("read back", read)
                sigma = read_sigma(seen, wanted, self.read_error, at.top, at.largest)
                known[:, columns] = estimate(read, wanted, sigma, at.alike, arrays)
                error, own = apart(known[:, columns] - missed), upper[:, columns]
                kept.append(torch.linalg.solve_triangular(own[:, :, columns], error, upper=True, left=False))
                targets[:, end:last] += (kept[-1] @ own[:, :, end:last]).flatten(0, 1)
            if last < inputs:
                targets[:, last:] += (torch.cat(kept, 2) @ upper[:, first:last, last:]).flatten(0, 1)
        back = order.argsort(1)
        found = (values, _taken(targets, back), _taken(known, back))
        parts = (x.chunk(len(draws), 0 if side is None else 1) for x in found)
        self.latest.clear()
        self.latest.update({d: _Written(seen, *one) for d, *one in zip(draws, *parts, strict=True)})

    def _side_by_side(
        self, noise: NoiseModel, values: torch.Tensor, draws: Sequence[Draws], largest: torch.Tensor, top: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[_Block]] | None:
        """Experts whose outputs are summed as one array, as of `_write`: (values [out, E·I], order [1, E·I], U [1, E·I,
        E·I], blocks), experts by falling power and the inputs of each; None where nothing says how they go together."""
        count, inputs = len(draws), values.shape[1]
        seen = together(self.moments, draws[0].tensor.partition("[")[0]) if count > 1 else None
        if seen is None:
            return None
        power = seen.power.view(count, inputs)
        slots = power.sum(1).argsort(descending=True, stable=True)
        within = power.argsort(dim=1, descending=True, stable=True)[slots]
        order = (slots[:, None] * inputs + within).flatten()
        tokens = torch.tensor([of(self.moments, d.tensor).tokens for d in draws]).to(power)
        more = SHRINKAGE_TOGETHER * power.numel() / (tokens + PRIOR_TOKENS)
        order, upper = factor(seen, order, more.repeat_interleave(inputs))
        each, blocks = list(zip(*(x.chunk(count) for x in (values, largest, top)), strict=True)), []
        for place, (slot, inner) in enumerate(zip(slots.tolist(), within, strict=True)):
            own, *limits = each[slot]
            cells = _Columns((draws[slot],), tuple(own.shape), inner[None])
            for start in range(0, inputs, self.block):
                end, before = min(start + self.block, inputs), place * inputs
                columns = slice(before + start, before + end)
                blocks.append(_Block(columns, cells, slice(start, end), *limits, unit(noise, own)))
        return torch.cat([own for own, *_ in each], 1), order[None], upper[None], blocks

    def _factors(self, draws: Sequence[Draws]) -> tuple[torch.Tensor, torch.Tensor]:
        """`factor` of the inputs of each array, [S, in] and [S, in, in], once where all have the same."""
        seen = [shared(self.moments, d.tensor) for d in draws]
        if None in seen:
            raise InputError(f"compensated programming: no calibration inputs of {draws[seen.index(None)].tensor}")
        different = seen if len({id(m.second) for m in seen}) > 1 else seen[:1]
        order, upper = zip(*map(factor, different), strict=True)
        return torch.stack(order), torch.stack(upper)

    def known(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the cells are known to hold before the finished array is read, float32 [out, in]: targets that were
        shifted on purpose, and what the read-back of each block said."""
        values = values.float()
        if not values.any():
            return values
        if not self._stands(self._as_written(noise), values, draws):
            self.store(noise, values, draws)
        return self.latest[draws].known


_FACTORS: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
_kept_bytes = 0
KEPT_BYTES = 2**30  # of factors: weights share moments, and every realisation needs them again


def factor(
    seen: Moments, order: torch.Tensor | None = None, more: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [in], U [in, in]): inputs by falling power, or in the order that is given, and the upper Cholesky factor
    of R⁻¹ = Uᵀ U in that order, R the second moment with a diagonal that is `more` of itself larger; float32."""
    global _kept_bytes
    if (known := _FACTORS.get(id(seen.second))) is not None and known[0] is seen.second:
        return known[1:]
    order = seen.power.argsort(descending=True, stable=True) if order is None else order
    more = SHRINKAGE * len(order) / (seen.tokens + PRIOR_TOKENS) if more is None else more[order]
    r = seen.second[order][:, order].double()
    r.diagonal().mul_(1 + more)
    r.diagonal().add_(1e-9 * seen.power.mean().double() + 1e-30)  # an input that never occurs
    # R = V Vᵀ with V upper, out of a lower factor of R reversed; then R⁻¹ = Uᵀ U with U = V⁻¹, and likewise for what is
    # left of R when its first inputs are fixed.
    v = torch.linalg.cholesky(r.flip(0, 1)).flip(0, 1)
    upper = torch.linalg.solve_triangular(v, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True).float()
    _FACTORS[id(seen.second)] = (seen.second, order, upper)
    _kept_bytes += upper.nbytes
    while _kept_bytes > KEPT_BYTES and len(_FACTORS) > 1:
        _kept_bytes -= _FACTORS.pop(next(iter(_FACTORS)))[-1].nbytes
    return order, upper
