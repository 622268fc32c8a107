"""What the hardware cost model itself takes: a trace of many tokens on Qwen3-30B's shape (48 layers), and its growth.

    python benchmarks/hardware_cost.py [tokens] [pairs]

Growth: time for twice the tokens over time for the tokens, in interleaved pairs; near two means linear in tokens.
"""

import statistics
import sys
import time

import numpy as np
import yaml

from romer.cli import conf_folder
from romer.hardware import SHAPES, ChipSheet, Trace, estimate
from romer.hardware.trace import dtype

SHAPE, BATCHES = SHAPES["qwen3"], (1, 32, 512)


def seconds(trace: Trace, sheet: ChipSheet, batch: int) -> float:
    start = time.perf_counter()
    estimate(SHAPE, trace, sheet, batch=batch)
    return time.perf_counter() - start


def random_trace(tokens: int) -> Trace:
    """Uniform choices: a random run of neighbouring slots is as good as any for the time."""
    first = np.random.default_rng(0).integers(SHAPE.experts, size=(tokens, SHAPE.moe_layers, 1))
    slots = (first + np.arange(SHAPE.top_k)) % SHAPE.experts
    return Trace(slots.astype(dtype(SHAPE.experts)), SHAPE.experts, 512)


def main(tokens: int = 100_000, pairs: int = 3) -> None:
    sheet = ChipSheet.load(yaml.safe_load((conf_folder() / "hardware" / "hermes.yaml").read_text()))
    whole = random_trace(tokens)
    half = Trace(whole.slots[: tokens // 2], whole.experts, whole.window)
    print(f"{tokens} tokens x {SHAPE.moe_layers} layers x {SHAPE.top_k} choices, {whole.slots.nbytes / 2**20:.0f} MiB")
    for batch in BATCHES:
        took = [(seconds(half, sheet, batch), seconds(whole, sheet, batch)) for _ in range(pairs)]
        ratios = [b / a for a, b in took]
        print(
            f"batch {batch:4}: {statistics.median(b for _, b in took):6.2f} s; twice the tokens take"
            f" {statistics.median(ratios):.2f} times as long [{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
