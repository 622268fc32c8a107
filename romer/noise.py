"""Errors of analog arrays, eq. 2-3 of the ROMER paper (arXiv:2605.11800) and what measured chips add to them.

    noise = NoiseModel(sigma_dev=0.1)                                   # eq. 2: w̃ = w (1 + ε), ε ~ N(0, σ_dev²)
    noise = NoiseModel(errors=(Conductance(cells, 0.0, 25.0), ColumnGain(0.05)))   # a chip: cells first, then columns
    w_noisy = noise.realise("model.layers.0.self_attn.q_proj.weight", w, realisation=3)

A realisation is one programming of the arrays. `mirror` of it has every normal draw with the opposite sign: it is just
as likely, and what changes in proportion to the errors cancels in the mean of both. Draws come from generators keyed by
(seed, realisation, tensor, replica, kind), never from the global one, so they depend on nothing else: not on the order
of the tensors, not on batches, processes or other libraries. A fused 3-D experts tensor holds one array per expert,
each with generators of its own, so an expert slot can be reprogrammed by itself. Everything is computed in float32,
whatever the weight's dtype is.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from romer.adc import Adc, Converter
from romer.errors import InputError

CLEAN = -1  # the realisation of what has no noise


def mirror(realisation: int) -> int:
    """The other one of its antithetic pair (Hammersley and Morton 1956, DOI 10.1017/S0305004100031455): -2 - r for r, r
    for -2 - r; CLEAN is its own."""
    return 2 * CLEAN - realisation


def key_of(seed: int, realisation: int, tensor: str, replica: int, kind: str) -> int:
    """A 128-bit hash of the five parts."""
    key = f"{seed}|{realisation}|{tensor}|{replica}|{kind}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:16], "big")


def generator(seed: int, realisation: int, tensor: str, replica: int, kind: str) -> np.random.Generator:
    """The generator of one key: Philox under a 128-bit hash (torch's CPU generator reads 32 bits of its seed)."""
    return np.random.Generator(np.random.Philox(key=key_of(seed, realisation, tensor, replica, kind)))


@dataclass(frozen=True)
class Draws:
    """The generators of one array: the same numbers for a kind, whatever other kinds are drawn before it."""

    seed: int
    realisation: int
    tensor: str
    replica: int = 0

    def normal(self, kind: str, like: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
        """N(0, 1) draws of a kind: float32, of the shape (and on the device) of `like`.

        The first rows of a longer draw are those of a shorter one.
        """
        return self.shared(kind, like).clone()

    def shared(self, kind: str, like: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
        """The same draws, not to be written to: they are kept for whoever asks next."""
        shape = tuple(like.shape) if isinstance(like, torch.Tensor) else like
        mirrored = self.realisation < CLEAN
        realisation = mirror(self.realisation) if mirrored else self.realisation
        drawn = _drawn(self.seed, realisation, self.tensor, self.replica, kind, shape)
        drawn = drawn.to(like.device) if isinstance(like, torch.Tensor) else drawn
        return -drawn if mirrored else drawn


# Layouts of one realisation share most draws, and drawing is a third of the work of programming: the latest are kept.
# Three realisations of the embedded stand-ins fit, so a calibration draws each once for all the σ that it tries.
KEPT_BYTES = 5 * 2**28
_KEPT: dict[tuple, torch.Tensor] = {}  # in the order of drawing; never written to
_kept_bytes = 0


def _drawn(seed: int, realisation: int, tensor: str, replica: int, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    global _kept_bytes
    key = (seed, realisation, tensor, replica, kind, shape)
    if (found := _KEPT.get(key)) is not None:
        return found
    rng = generator(seed, realisation, tensor, replica, kind)
    drawn = torch.from_numpy(rng.standard_normal(shape, np.float32))
    _KEPT[key], _kept_bytes = drawn, _kept_bytes + drawn.nbytes
    while _kept_bytes > KEPT_BYTES:
        _kept_bytes -= _KEPT.pop(next(iter(_KEPT))).nbytes
    return drawn


class Error(Protocol):
    """What is wrong with an array: turns the weights that were meant into those that act.

    values: float32 [rows, columns of numbers]; draws: of this array; outputs: the dimension that runs over the array's
    output columns (0 for a weight [out, in]); full_range: the largest |value| that can be stored, one number or one for
    each output (a tensor that broadcasts), where it does not follow from the values themselves (a KV cache is written
    before its later tokens are known).
    """

    def __call__(
        self, values: torch.Tensor, draws: Draws, outputs: int = 0, full_range: float | torch.Tensor | None = None
    ) -> torch.Tensor: ...


def check_sigma(name: str, value: float) -> None:
    """InputError unless `value` is a finite number ≥ 0."""
    if not math.isfinite(value) or value < 0:
        raise InputError(f"{name}: found {value}, expected a finite number ≥ 0")


@dataclass(frozen=True)
class Proportional:
    """Eq. 2: w (1 + ε), ε ~ N(0, σ_dev²) for every cell; σ_dev is dimensionless."""

    sigma_dev: float

    def __post_init__(self):
        check_sigma("sigma_dev", self.sigma_dev)

    def __call__(self, values, draws, outputs=0, full_range=None):
        return (self.sigma_dev * draws.shared("device", values)).add_(1.0).mul_(values)  # eq. 2


@dataclass(frozen=True)
class ColumnGain:
    """Every output column of an array has a gain of its own, 1 + σ ε: its amplifier and ADC (dimensionless).

    tile_rows: inputs of an array; a longer product runs over several arrays, each with gains of its own.
    """

    sigma: float
    tile_rows: int = Adc.tile_rows

    def __post_init__(self):
        check_sigma("column gain sigma", self.sigma)

    def __call__(self, values, draws, outputs=0, full_range=None):
        columns, inputs = values.shape[outputs], values.shape[1 - outputs]
        tiles = -(-inputs // self.tile_rows)
        shape = (columns, tiles) if outputs == 0 else (tiles, columns)  # rows first: a cache grows by rows
        gain = 1.0 + self.sigma * draws.shared("column", shape).to(values.device)
        return values * gain.repeat_interleave(self.tile_rows, 1 - outputs).narrow(1 - outputs, 0, inputs)


@dataclass(frozen=True)
class Drift:
    """Conductance decays as (t / t0)^-ν with an exponent ν ~ N(nu, nu_sigma²) of every cell, not below 0.

    seconds: t since programming, t0: of the reference read; no drift for t ≤ t0. For weights of which one cell of the
    pair is at zero conductance; `Conductance` drifts both cells of a pair.
    """

    nu: float
    nu_sigma: float
    seconds: float
    t0: float = 20.0

    def __post_init__(self):
        check_sigma("drift nu", self.nu)
        check_sigma("drift nu_sigma", self.nu_sigma)
        check_sigma("drift seconds", self.seconds)
        if not 0 < self.t0 < math.inf:
            raise InputError(f"drift t0: found {self.t0}, expected a finite number of seconds > 0")

    def __call__(self, values, draws, outputs=0, full_range=None):
        exponent = (self.nu + self.nu_sigma * draws.shared("drift", values)).clamp(min=0)
        return values * (-math.log(max(self.seconds / self.t0, 1.0)) * exponent).exp()  # pow's bits vary with threads


Cells = Callable[[torch.Tensor, Draws, str], torch.Tensor]  # (target µS, draws, kind prefix) -> µS as read


@dataclass(frozen=True)
class Conductance:
    """Weights as differential pairs of conductances, whose errors `cells` knows; read back as weights.

    A weight w is stored as G⁺ = g_min + max(w, 0) s and G⁻ = g_min + max(-w, 0) s with s = (g_max - g_min) / w_max in
    µS, and read as (G̃⁺ - G̃⁻) / s; with zero `high` as G⁺ = g_max - max(-w, 0) s and G⁻ = g_max - max(w, 0) s, for cells
    that hold high conductances better. w_max is the largest |w| of the array (scaling `tensor`) or of the output column
    (`column`). compensate: one digital factor an array, Σ|w| / Σ|w̃|, takes the mean decay out (global drift
    compensation, Joshi et al. 2020, DOI 10.1038/s41467-020-16108-9, against the exact weights; noise on small weights
    makes it a little small); not for a KV cache. Raises InputError for a range that is none.
    """

    cells: Cells
    g_min_us: float
    g_max_us: float
    scaling: str = "tensor"
    compensate: bool = False
    zero: str = "low"

    def __post_init__(self):
        if not 0 <= self.g_min_us < self.g_max_us < math.inf:
            raise InputError(
                f"conductance range: found {self.g_min_us} to {self.g_max_us} µS, expected 0 ≤ g_min < g_max"
            )
        if self.scaling not in ("tensor", "column"):
            raise InputError(f"conductance scaling: found {self.scaling!r}, expected tensor or column")
        if self.zero not in ("low", "high"):
            raise InputError(f"conductance zero: found {self.zero!r}, expected low or high")

    def pair(
        self, values: torch.Tensor, outputs: int = 0, full_range: float | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(G⁺, G⁻, s): the target conductances of values, µS, of their shape, and µS per weight, one number or one for
        each output. outputs, full_range: as of `Error`."""
        if full_range is not None:
            top = torch.as_tensor(full_range, dtype=values.dtype, device=values.device)
            values = values.clamp(-top, top)
        elif self.scaling == "column":
            top = values.abs().amax(dim=1 - outputs, keepdim=True)
        else:
            top = values.abs().max()
        scale = (self.g_max_us - self.g_min_us) / torch.where(top > 1e-30, top, 1.0)  # 1: all are zero
        above, below = (values * scale).clamp(min=0), (-values * scale).clamp(min=0)
        if self.zero == "low":
            return self.g_min_us + above, self.g_min_us + below, scale
        return self.g_max_us - below, self.g_max_us - above, scale

    def __call__(self, values, draws, outputs=0, full_range=None):
        *targets, scale = self.pair(values, outputs, full_range)
        plus, minus = (self.cells(g, draws, kind) for g, kind in zip(targets, ("plus", "minus"), strict=True))
        read = (plus - minus) / scale
        return rescaled(read, values) if self.compensate and full_range is None else read


def rescaled(read: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What an array reads, multiplied by Σ|values| / Σ|read|: its mean decay taken out."""
    total = _absolute_sum(read)
    return read * (_absolute_sum(values) / total) if total > 0 else read


def _absolute_sum(values: torch.Tensor) -> float:
    """Σ|v| in float64, row by row, so that the number of threads does not reach float32's last bit."""
    return values.abs().sum(1, dtype=torch.float64).sum().item()


@dataclass(frozen=True)
class NoiseModel:
    """What is wrong with the arrays that a model sits on.

    sigma_dev: eq. 2's relative standard deviation of a programmed weight (dimensionless, ≥ 0); seed: of the project's
    draws; errors: applied after eq. 2, in order; adc: converts the outputs of the arrays (eq. 4), None for ideal ones.
    Raises InputError for a σ that is negative or not finite.
    """

    sigma_dev: float = 0.0
    seed: int = 0
    errors: tuple[Error, ...] = ()
    adc: Converter | None = None

    def __post_init__(self):
        check_sigma("sigma_dev", self.sigma_dev)

    def epsilon(self, name: str, shape: torch.Size, realisation: int, replica: int = 0) -> torch.Tensor:
        """ε of eq. 2 of one array: float32 of `shape` on the CPU, N(0, σ_dev²)."""
        return self.sigma_dev * Draws(self.seed, realisation, name, replica).shared("device", tuple(shape))

    def store(
        self, values: torch.Tensor, draws: Draws, outputs: int = 0, full_range: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of one array [rows, columns of numbers] as they act, in their dtype; see `Error`."""
        errors = ((Proportional(self.sigma_dev),) if self.sigma_dev else ()) + self.errors
        stored = values.float()
        for error in errors:
            stored = error(stored, draws, outputs, full_range)
        return stored.to(values.dtype) if errors else values.clone()

    def realise(self, name: str, weight: torch.Tensor, realisation: int, replica: int = 0) -> torch.Tensor:
        """The noisy weight as programmed, in the weight's dtype; the noise is applied in float32 before the cast.

        weight: [out, in], or [E, out, in] for fused experts (one array per expert). No error and σ_dev = 0 return the
        weight bitwise.
        """
        if weight.dim() == 3:
            return by_slot(name, weight, lambda slot, w: self.realise(slot, w, realisation, replica))
        return self.store(weight, Draws(self.seed, realisation, name, replica))


def slot_name(name: str, slot: int) -> str:
    """The array of one expert slot of the fused tensor `name`."""
    return f"{name}[{slot}]"


def by_slot(name: str, weight: torch.Tensor, store: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """store(slot's name, weight of the slot [out, in]) of every slot of the fused tensor `name`: [E, out, in]."""
    acts = torch.empty_like(weight)
    for i, w in enumerate(weight):
        acts[i] = store(slot_name(name, i), w)  # while it is in the cache
    return acts
