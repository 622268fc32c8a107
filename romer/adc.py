"""Converters at the edge of an array, eq. 4 of the ROMER paper: what digital logic sees of an analog product.

    adc = Adc(bits=8, form="quantise", tile_rows=256)
    y = Converter(adc, ranges).product("model.layers.0.self_attn.q_proj", x, w, key, rows)

An array has `tile_rows` inputs, so a longer product is cut into tiles, each with conversions of its own, and their
results are added digitally: partial sums are what an ADC sees. The step is Δ = V_ref / (2^b - 1); V_ref spans both
signs and comes from calibration (a percentile of the partial sums' magnitude, for each layer and tile).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from romer.errors import InputError

FORMS = ("quantise", "uniform")


@dataclass(frozen=True)
class Adc:
    """bits: of the ADC; form: `quantise` (rounding and clipping) or `uniform` (eq. 4: additive U(-Δ/2, Δ/2), no
    clipping); tile_rows: inputs of an array; percentile: of |partial sum| on calibration tokens that V_ref/2 is set to;
    dac_bits: of the inputs, None for exact ones; residual: standard deviation of a further additive error of a
    conversion, relative to the rms of the calibrated partial sums. Raises InputError for values out of range."""

    bits: int = 8
    form: str = "quantise"
    tile_rows: int = 256
    percentile: float = 99.99
    dac_bits: int | None = None
    residual: float = 0.0

    def __post_init__(self):
        if self.form not in FORMS:
            raise InputError(f"adc.form: found {self.form!r}, expected one of {', '.join(FORMS)}")
        for name, value in (("adc.bits", self.bits), ("adc.dac_bits", self.dac_bits)):
            if not (type(value) is int and 2 <= value <= 24) and (name, value) != ("adc.dac_bits", None):
                raise InputError(f"{name}: found {value!r}, expected an integer from 2 to 24")
        if not (type(self.tile_rows) is int and self.tile_rows >= 1):
            raise InputError(f"adc.tile_rows: found {self.tile_rows!r}, expected an integer of at least 1")
        if type(self.percentile) not in (int, float) or not 50 < self.percentile <= 100:
            raise InputError(f"adc.percentile: found {self.percentile!r}, expected 50 < percentile ≤ 100")
        if type(self.residual) not in (int, float) or not 0 <= self.residual < math.inf:
            raise InputError(f"adc.residual: found {self.residual!r}, expected a finite number ≥ 0")


def step(v_ref: float | torch.Tensor, bits: int) -> float | torch.Tensor:
    """Δ = V_ref / (2^b - 1), in the units of V_ref (eq. 4)."""
    return v_ref / (2**bits - 1)


def quantise(y: torch.Tensor, v_ref: float | torch.Tensor, bits: int) -> torch.Tensor:
    """y rounded to multiples of Δ and clipped to the codes ±(2^(b-1) - 1); y of any shape, in the units of V_ref."""
    delta, top = step(v_ref, bits), 2 ** (bits - 1) - 1
    return (y / delta).round().clamp(-top, top) * delta


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 at least: what an ADC sees was never rounded to bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tiled(
    x: torch.Tensor, w: torch.Tensor, tile_rows: int, converted: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """x wᵀ as the sum over tiles of `converted(tile, partial sums [T, out])`: x [T, in], w [out, in] -> [T, out] in x's
    dtype."""
    total = 0.0
    for tile, (xs, ws) in enumerate(zip(x.split(tile_rows, -1), w.split(tile_rows, -1), strict=True)):
        total = total + converted(tile, wide(xs) @ wide(ws).T)
    return total.to(x.dtype)


# Noise of a conversion must be new for every token, yet the same whatever else is in the batch, so it is not drawn from
# a stream: it is a hash of (key, token, column), the finaliser of SplitMix64 (Steele et al. 2014, DOI
# 10.1145/2660193.2660195) in wrapping int64.
_GOLDEN, _M1, _M2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of int64 numbers, any shape."""
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def hashed(key: int, rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Hashes [T, columns] int64 of a key (any integer), token numbers rows [T] int64, and the column."""
    key = torch.tensor((key & (2**64 - 1)) - 2**63, dtype=torch.int64, device=rows.device)
    column = torch.arange(1, columns + 1, device=rows.device) * _GOLDEN
    return mix(mix(mix(rows + key) + _GOLDEN)[:, None] + column)


def uniform(hashes: torch.Tensor) -> torch.Tensor:
    """U[0, 1) from the upper 24 bits of hashes: float32 of the same shape."""
    return _shift(hashes, 40).float() * 2**-24


def gaussian(hashes: torch.Tensor) -> torch.Tensor:
    """N(0, 1) from hashes (Box-Muller on two disjoint runs of 24 bits): float32 of the same shape."""
    first = (_shift(hashes, 40).float() + 0.5) * 2**-24
    second = (_shift(hashes << 24, 40)).float() * 2**-24
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


@dataclass(frozen=True)
class Range:
    """What calibration saw at one converter: v_ref [tiles] and rms [tiles] of its partial sums, and the input's
    percentile (all float32, in the units of the product and of the input)."""

    v_ref: torch.Tensor
    rms: torch.Tensor
    inputs: float


@dataclass(frozen=True, eq=False)
class Converter:
    """An ADC with the ranges of every analog product of a model, by name.

    Ranges are shared by the expert slots of a layer. Raises InputError, naming the product, where one has no range.
    """

    adc: Adc
    ranges: Mapping[str, Range]

    def range_of(self, name: str) -> Range:
        """The range of a product; of `name[3]`, that of `name`."""
        base = name.partition("[")[0]
        if base not in self.ranges:
            raise InputError(f"adc: no calibrated range for {base}; calibrate the ranges with the same placement")
        return self.ranges[base]

    def product(self, name: str, x: torch.Tensor, w: torch.Tensor, key: int, rows: torch.Tensor) -> torch.Tensor:
        """x wᵀ as converted: x [T, in], w [out, in] -> [T, out] in x's dtype; key and rows [T] number the conversions
        (see `hashed`)."""
        found, tiles = self.range_of(name), -(-x.shape[-1] // self.adc.tile_rows)
        if len(found.v_ref) != tiles:
            raise InputError(f"adc: {name} has {tiles} tiles, ranges were calibrated for {len(found.v_ref)}")
        x = self.inputs(x, found)
        return tiled(x, w, self.adc.tile_rows, lambda tile, y: self.convert(y, found, tile, key, rows))

    def inputs(self, x: torch.Tensor, found: Range) -> torch.Tensor:
        """The inputs behind the DAC, any shape."""
        return x if self.adc.dac_bits is None else quantise(wide(x), 2 * found.inputs, self.adc.dac_bits).to(x.dtype)

    def convert(self, y: torch.Tensor, found: Range, tile: int, key: int, rows: torch.Tensor) -> torch.Tensor:
        """Partial sums y [T, columns] of one tile, as converted: float32 or wider."""
        y, known = wide(y), min(tile, len(found.v_ref) - 1)  # a KV cache may grow beyond what calibration saw
        v_ref, adc = found.v_ref[known].to(y.device), self.adc
        if adc.residual or adc.form == "uniform":
            hashes = hashed(key + (tile << 32), rows, y.shape[1])
            if adc.residual:
                y = y + adc.residual * found.rms[known].to(y.device) * gaussian(mix(hashes))
            if adc.form == "uniform":
                return y + step(v_ref, adc.bits) * (uniform(hashes) - 0.5)  # eq. 4
        return quantise(y, v_ref, adc.bits)


def write_ranges(ranges: Mapping[str, Range], path: str | Path) -> None:
    """The ranges as safetensors: `<product>/v_ref`, `<product>/rms` [tiles], `<product>/inputs` [1], float32."""
    tensors = {}
    for name, found in ranges.items():
        parts = {"v_ref": found.v_ref, "rms": found.rms, "inputs": torch.tensor([found.inputs])}
        tensors |= {f"{name}/{part}": value for part, value in parts.items()}
    save_file(tensors, path)


def read_ranges(path: str | Path) -> dict[str, Range]:
    """What `write_ranges` wrote. Raises InputError for a file that holds something else."""
    try:
        tensors = load_file(path)
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        parts = {n: [tensors[f"{n}/{part}"] for part in ("v_ref", "rms", "inputs")] for n in names}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as ADC ranges ({error})") from None
    return {n: Range(v_ref, rms, inputs.item()) for n, (v_ref, rms, inputs) in parts.items()}


class RangeFinder:
    """Collects the magnitudes of partial sums and inputs in histograms of 1 % wide bins, so that neither the order of
    the tokens nor their batches matter; stands in for a `Converter` while a clean model reads calibration tokens."""

    BINS, LOWEST, WIDTH = 6000, 1e-14, 0.01

    def __init__(self, adc: Adc):
        self.adc, self.counts, self.squares = adc, {}, {}

    def product(self, name: str, x: torch.Tensor, w: torch.Tensor, key: int, rows: torch.Tensor) -> torch.Tensor:
        """x wᵀ, exactly; notes what an ADC would have seen."""
        base = name.partition("[")[0]
        self.note(base, "input", x)
        return tiled(x, w, self.adc.tile_rows, lambda tile, y: self.note(base, tile, y))

    def note(self, name: str, tile: int | str, y: torch.Tensor) -> torch.Tensor:
        """Adds |y| to the histogram; returns y."""
        magnitude = y.detach().abs().float().flatten()
        bins = ((magnitude.clamp(min=self.LOWEST) / self.LOWEST).log() / self.WIDTH).long().clamp(max=self.BINS - 1)
        counts = torch.bincount(bins, minlength=self.BINS)
        key = (name, tile)
        self.counts[key] = self.counts.get(key, 0) + counts
        self.squares[key] = self.squares.get(key, 0.0) + magnitude.double().square().sum().item()
        return y

    def percentile(self, key: tuple) -> float:
        """The upper edge of the bin that holds the percentile of |y|."""
        counts = self.counts[key].cumsum(0)
        wanted = math.ceil(self.adc.percentile / 100 * counts[-1].item())
        return self.LOWEST * math.exp((int((counts < wanted).sum()) + 1) * self.WIDTH)

    def ranges(self) -> dict[str, Range]:
        """The ranges of every product that was seen."""
        found = {}
        for name in dict.fromkeys(n for n, _ in self.counts):
            tiles = sorted(t for n, t in self.counts if n == name and t != "input")
            rms = [math.sqrt(self.squares[name, t] / self.counts[name, t].sum().item()) for t in tiles]
            found[name] = Range(
                torch.tensor([2 * self.percentile((name, t)) for t in tiles]),
                torch.tensor(rms),
                self.percentile((name, "input")),
            )
        return found
