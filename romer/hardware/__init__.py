"""An analytic, trace-driven cost model of an analog compute-in-memory accelerator.

    with record(model, window=512) as recorder:
        perplexity(model, ids, window=512)
    found = estimate(shape_of(model.config), recorder.trace, ChipSheet.load(values), batch=32)

docs/hardware.md states each assumption and the source of each constant.
"""

from romer.hardware.deployment import Deployment, deployed
from romer.hardware.model import Estimate, estimate
from romer.hardware.shapes import SHAPES, ModelShape, shape_of
from romer.hardware.sheet import ChipSheet
from romer.hardware.tiles import tile_counts
from romer.hardware.trace import Trace, record, simulate, stretch

__all__ = [
    "SHAPES",
    "ChipSheet",
    "Deployment",
    "Estimate",
    "ModelShape",
    "Trace",
    "deployed",
    "estimate",
    "record",
    "shape_of",
    "simulate",
    "stretch",
    "tile_counts",
]
