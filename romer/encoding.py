"""How clean weights are laid out on cells and read back, and what a layout costs.

    encoding = Sliced(bits=8)
    w = realise(encoding, NoiseModel(0.1), "model.layers.0.self_attn.q_proj.weight", weight, realisation=3)
    encoding.cells, encoding.products                       # both as multiples of the plain layout

Every array of a layout is a replica of its tensor with device errors of its own; replica 0 has those of the plain
layout, so layouts are compared on the same noise.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from romer.chips.pcm import Pcm
from romer.corrections import Correction
from romer.errors import InputError
from romer.moments import Moments, of
from romer.noise import Conductance, Draws, NoiseModel, by_slot, check_sigma, rescaled, slot_name


class Encoding(Protocol):
    """cells: physical cells per weight; products: arrays that a matrix-vector product activates, and so the ADC
    conversions of each output; both as multiples of the plain layout."""

    @property
    def cells(self) -> float: ...

    @property
    def products(self) -> float: ...

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The values [out, in] of one tensor as they act, float32."""
        ...


@dataclass(frozen=True)
class Plain:
    """One cell (under conductance errors: one differential pair) a weight."""

    cells, products = 1.0, 1.0

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        return noise.store(values.float(), draws)

    def known(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the cells are known to hold before the array is read, float32 [out, in]: the values."""
        return values.float()


@dataclass(frozen=True)
class Replicated:
    """The mean of `copies` independently programmed arrays: device error variance over `copies`."""

    copies: int = 2

    def __post_init__(self):
        if type(self.copies) is not int or self.copies < 1:
            raise InputError(f"copies: found {self.copies!r}, expected an integer of at least 1")

    @property
    def cells(self) -> float:
        return float(self.copies)

    products = cells

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        stored = (noise.store(values.float(), replace(draws, replica=r)) for r in range(self.copies))
        return sum(stored) / self.copies


SLICINGS = ("sign-magnitude", "offset-binary")


@dataclass(frozen=True)
class Sliced:
    """Weights rounded to `bits` bits, cut into slices of `bits_per_cell` bits, each slice an array; shift-and-add.

    w = s q with s = max|w| / (2^(bits-1) - 1). `sign-magnitude`: digits of |q| with q's sign, bits - 1 bits;
    `offset-binary`: digits of q + 2^(bits-1), all positive, the offset taken off digitally: its top slice is on for all
    weights near zero, so eq. 2 gives even those the error of half the full range.
    """

    bits: int = 8
    bits_per_cell: int = 1
    form: str = "sign-magnitude"

    def __post_init__(self):
        if self.form not in SLICINGS:
            raise InputError(f"slicing form: found {self.form!r}, expected one of {', '.join(SLICINGS)}")
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise InputError(f"bits: found {self.bits!r}, expected an integer from 2 to 16")
        if type(self.bits_per_cell) is not int or not 1 <= self.bits_per_cell <= self.bits:
            raise InputError(f"bits_per_cell: found {self.bits_per_cell!r}, expected an integer from 1 to bits")

    @property
    def slices(self) -> int:
        """Arrays that hold one tensor."""
        return math.ceil((self.bits - (self.form == "sign-magnitude")) / self.bits_per_cell)

    @property
    def cells(self) -> float:
        return float(self.slices)

    products = cells

    @functools.cached_property
    def _spread(self) -> torch.Tensor:
        """Standard deviation of what a code is read as under eq. 2 with σ_dev = 1: float32 [2^bits]."""
        base = 2**self.bits_per_cell
        places = base ** torch.arange(self.slices)
        digits = torch.arange(2**self.bits)[:, None] // places % base
        return (digits * places).double().square().sum(1).sqrt().float()

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        values, half = values.float(), 2 ** (self.bits - 1)
        scale = values.abs().max() / (half - 1)
        if scale == 0:
            return values.clone()
        q = (values / scale).round().int()
        signed = self.form == "sign-magnitude"
        code, sign = (q.abs(), q.sign()) if signed else (q + half, torch.ones_like(q))
        base = 2**self.bits_per_cell
        if not noise.errors:  # eq. 2 alone: the slices' independent Gaussian errors add up to one Gaussian
            spread = self._spread.to(values.device).index_select(0, code.flatten()).view_as(values)
            error = (noise.sigma_dev * draws.shared("device", values)).mul_(spread)
            return error.add_(code if signed else q).mul_(scale).mul_(sign if signed else 1)
        total = torch.zeros_like(values)
        for j in range(self.slices):
            digit = (code // base**j % base * sign).float()
            total += base**j * noise.store(digit, replace(draws, replica=j), full_range=float(base - 1))
        if any(isinstance(e, Conductance) and e.compensate for e in noise.errors):  # as one array: few cells of the
            total = rescaled(total, (code * sign).float())  # highest slices are on, and noise on the others is no decay
        return scale * (total if signed else total - half)


@dataclass(frozen=True)
class Remapped:
    """Spare cells duplicate the most sensitive weights; under conductance errors, columns use the full range.

    spare: share of the weights that get a second cell, those with the largest w² E[x²], and are read as the mean of
    both; moments: of the inputs of each array, E[x²] = 1 where an array is not in it. Under eq. 2 an error is relative
    to its own weight, so rescaling or permuting columns does nothing at all, and only spare cells act.
    """

    spare: float = 0.05
    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.spare <= 1:
            raise InputError(f"spare: found {self.spare!r}, expected 0 ≤ share ≤ 1")

    @property
    def cells(self) -> float:
        return 1.0 + self.spare

    products = cells  # spare cells fill further rows of arrays, which are read with the others

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        scaled = tuple(replace(e, scaling="column") if isinstance(e, Conductance) else e for e in noise.errors)
        noise, values = replace(noise, errors=scaled), values.float()
        stored = noise.store(values, draws)
        if not (duplicated := int(self.spare * values.numel())):
            return stored
        seen = of(self.moments, draws.tensor)
        sensitivity = values.square() * (1.0 if seen is None else seen.power.to(values.device))
        order = np.argpartition(sensitivity.flatten().cpu().numpy(), -duplicated)  # topk takes five times as long
        chosen = torch.from_numpy(order[-duplicated:]).to(values.device)
        second = noise.store(values, replace(draws, replica=1))
        stored.view(-1)[chosen] = (stored.flatten()[chosen] + second.flatten()[chosen]) / 2
        return stored


PLAIN = Plain()


@dataclass(frozen=True)
class Layout:
    """How a model sits on arrays: the encoding of its analog weights, what stays `digital` although the placement has
    it on arrays (names of tensors, or of expert slots, `<tensor>[slot]`), and the digital correction behind arrays.

    refit: corrections are fitted to a read-back of the arrays when they are used, not of when they had just been
    programmed; read_error: standard deviation that the instrument adds to a cell's value in that read-back, relative to
    the largest |w| of its array, beside the read noise that cells have of their own; read_seconds: how long that takes.
    """

    encoding: Encoding = PLAIN
    digital: frozenset[str] = frozenset()
    correction: Correction | None = None
    refit: bool = True
    read_error: float = 0.0
    read_seconds: float = Pcm.read_seconds

    def __post_init__(self):
        check_sigma("read_error", self.read_error)

    def is_digital(self, name: str) -> bool:
        """Whether a tensor, or an expert slot, is kept digital."""
        return name in self.digital or name.partition("[")[0] in self.digital

    def digital_slots(self, name: str, slots: int) -> set[int]:
        """Those of a fused tensor's expert slots that are kept digital; of a plain tensor (one slot) {0} or none."""
        return {i for i in range(slots) if self.is_digital(slot_name(name, i))}


def realise(encoding: Encoding, noise: NoiseModel, name: str, weight: torch.Tensor, realisation: int) -> torch.Tensor:
    """The weight as it acts, in its dtype: [out, in], or [E, out, in] for fused experts, whose slots are arrays of
    their own. The plain layout's bits are those of `NoiseModel.realise`."""
    if weight.dim() == 3 and hasattr(encoding, "store_slots"):
        draws = [Draws(noise.seed, realisation, slot_name(name, i)) for i in range(len(weight))]
        return encoding.store_slots(noise, weight, draws).to(weight.dtype)
    if weight.dim() == 3:
        return by_slot(name, weight, lambda slot, w: realise(encoding, noise, slot, w, realisation))
    if encoding is PLAIN:
        return noise.realise(name, weight, realisation)
    return encoding.store(noise, weight, Draws(noise.seed, realisation, name)).to(weight.dtype)
