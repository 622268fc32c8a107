"""Our ADC beside the output quantisation of aihwkit-lightning: a table, or recorded pairs for the tests, as CSV.

    python benchmarks/peers/adc.py > benchmarks/peers/adc.csv
    python benchmarks/peers/adc.py pairs > benchmarks/peers/adc_pairs.csv

Both sides convert the same product, `Converter.product` and `AnalogLinear`, on one or two arrays of TILE_ROWS inputs.
The peer's ADC reaches ±bound with 2^b - 2 steps; eq. 4's range V_ref has 2^b - 1. So there are two footings:

same step    V_ref = 2 bound (2^b - 1) / (2^b - 2)
same range   V_ref = 2 bound
"""

import contextlib
import sys

import torch
from table import write

from romer.adc import Adc, Converter, Range, step

try:
    with contextlib.redirect_stdout(sys.stderr):  # it says on stdout that it has no triton
        from aihwkit_lightning.nn import AnalogLinear
        from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
except ImportError as error:
    sys.exit(f"{error}: pip install --no-deps aihwkit-lightning==2.1.0")

BITS = (4, 6, 8, 10)
TOKENS, OUTPUTS, TILE_ROWS = 1024, 256, 256
INPUT_RANGE = 4.0  # of the standard normal inputs
OUT_BOUND = 6.0  # of the peer, in units of INPUT_RANGE × max|w|: 2.6 standard deviations of the partial sums here
PAIRS = 40  # a bit width
PAIR_STEP = 0.1875  # a sum of two powers of two, so that ties are exact in float32


def lightning(x: torch.Tensor, w: torch.Tensor, bits: int, input_range: float, out_bound: float) -> torch.Tensor:
    """x wᵀ by an AnalogLinear whose only error is its ADC, at ±input_range × out_bound × max|w| of an array."""
    config = TorchInferenceRPUConfig()
    config.forward.out_res = 2**bits - 2  # as the parameter's documentation says
    config.forward.out_bound = out_bound
    config.mapping.max_input_size = TILE_ROWS
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.learn_input_range = False
    config.pre_post.input_range.init_from_data = 0
    config.pre_post.input_range.init_value = input_range
    layer = AnalogLinear(w.shape[1], w.shape[0], bias=False, rpu_config=config).eval()
    layer.set_weights(w)
    return layer(x).detach()


def ours(x: torch.Tensor, w: torch.Tensor, bits: int, v_ref: float) -> torch.Tensor:
    """x wᵀ by a Converter with one V_ref for every array."""
    tiles = w.shape[1] // TILE_ROWS
    found = Range(torch.full((tiles,), v_ref), torch.zeros(tiles), INPUT_RANGE)
    converter = Converter(Adc(bits, "quantise", TILE_ROWS), {"product": found})
    return converter.product("product", x, w, key=0, rows=torch.arange(len(x)))


def row(bits: int, tiles: int, footing: str) -> dict:
    """Both on the same inputs; max|w| = 1 in every array, so that the peer's bound is that of every array."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, tiles * TILE_ROWS, generator=generator).clamp(-INPUT_RANGE, INPUT_RANGE)
    w = 2 * torch.rand(OUTPUTS, tiles * TILE_ROWS, generator=generator) - 1
    w[:, ::TILE_ROWS] = 1.0
    bound = INPUT_RANGE * OUT_BOUND
    v_ref = 2 * bound * ((2**bits - 1) / (2**bits - 2) if footing == "same step" else 1)
    peer_step = 2 * bound / (2**bits - 2)
    results = ours(x, w, bits, v_ref), lightning(x, w, bits, INPUT_RANGE, OUT_BOUND)
    codes = (results[0] / step(v_ref, bits)).round(), (results[1] / peer_step).round()
    return {
        "bits": bits,
        "arrays": tiles,
        "footing": footing,
        "conversions": TOKENS * OUTPUTS * tiles,
        "bound": bound,
        "clipped": ((x[:, :TILE_ROWS] @ w[:, :TILE_ROWS].T).abs() > bound).double().mean().item(),  # in the first array
        "ours_step": step(v_ref, bits),
        "peer_step": peer_step,
        "ours_codes": len(codes[0].unique()),  # of the sum over arrays
        "peer_codes": len(codes[1].unique()),
        "equal_codes": (codes[0] == codes[1]).double().mean().item(),
        "max_code_difference": (codes[0] - codes[1]).abs().max().item(),
        "max_difference_steps": ((results[0] - results[1]).abs().max() / peer_step).item(),
    }


def pairs(bits: int) -> list[dict]:
    """Inputs of the peer's ADC and what it makes of them: ties, values at and beyond the bound, and random ones."""
    top = 2 ** (bits - 1) - 1
    bound = top * PAIR_STEP
    ties = torch.tensor([k + 0.5 for k in (-3, -2, -1, 0, 1, 2, top - 2, top - 1)]) * PAIR_STEP
    edges = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]) * bound
    generator = torch.Generator().manual_seed(bits)
    spread = 1.1 * bound * (2 * torch.rand(PAIRS - len(ties) - len(edges), generator=generator) - 1)
    x = torch.cat([ties, edges, spread])[:, None]
    y = lightning(x, torch.eye(1), bits, 2 * bound, 0.5)  # a product with 1, below the input range
    return [
        {"bits": bits, "bound": bound, "input": f"{a:.9g}", "output": f"{b:.9g}"}
        for a, b in zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True)
    ]


def main(what: str = "table") -> None:
    if what == "pairs":
        rows = [pair for bits in BITS for pair in pairs(bits)]
    else:
        rows = [row(b, tiles, f) for f in ("same step", "same range") for tiles in (1, 2) for b in BITS]
    write(rows, ("aihwkit-lightning", "torch"), "seed 0")


if __name__ == "__main__":
    main(*sys.argv[1:2])
