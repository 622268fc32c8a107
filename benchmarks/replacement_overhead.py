"""What replacement costs on the paper's checkpoints beside what its table 3 prints, under two loads of the experts.

    python benchmarks/replacement_overhead.py [tokens]

Vanilla against n = 4 on `hermes`, batches of 32 tokens, routing simulated: uniform, and falling with rank^-0.5 (for
which no checkpoint was measured). Overheads in per cent, also with 16 times the digital units and multipliers. The
table that it prints is in docs/hardware.md.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
import yaml

from romer import ReplacementPlan
from romer.cli import conf_folder
from romer.hardware import SHAPES, ChipSheet, Deployment, estimate, simulate

N, BATCH, WINDOW, MORE = 4, 32, 512, 16
LOADS = {"uniform": 0.0, "skewed": 0.5}  # exponent of the rank


def overheads(sheet: ChipSheet, shape, load: np.ndarray, tokens: int) -> dict[str, float]:
    """Per cent over vanilla, and vanilla's average power in W."""
    plan = ReplacementPlan.fit(torch.from_numpy(load), N)
    plain, own = (
        estimate(shape, simulate(load, shape.top_k, tokens, WINDOW, p), sheet, Deployment(), BATCH)
        for p in (None, plan)
    )
    fields = {"MVMs": "tile_mvms", "latency": "time_s", "power": "power_w", "energy": "energy_j"}
    return {k: 100 * (getattr(own, f) / getattr(plain, f) - 1) for k, f in fields.items()} | {"W": plain.power_w}


def main(tokens: int = 2048) -> None:
    sheet = ChipSheet.load(yaml.safe_load((conf_folder() / "hardware" / "hermes.yaml").read_text()))
    wide = replace(sheet, digital_units=MORE * sheet.digital_units, mac_units=MORE * sheet.mac_units)
    print(
        "| model | n/E | load | extra MVMs | latency | power | energy | latency, 16 × units | power, 16 × units | W |"
    )
    print("| --- " * 10 + "|")
    for name in ("olmoe", "deepseek", "qwen15", "qwen3"):
        shape = SHAPES[name]
        for kind, exponent in LOADS.items():
            row = np.arange(1, shape.experts + 1) ** -exponent
            load = np.tile(row / row.sum(), (shape.moe_layers, 1))
            own, more = (overheads(s, shape, load, tokens) for s in (sheet, wide))
            cells = [own["MVMs"], own["latency"], own["power"], own["energy"], more["latency"], more["power"], own["W"]]
            share = 100 * N / shape.experts
            print(f"| {name} | {share:.1f} | {kind} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
