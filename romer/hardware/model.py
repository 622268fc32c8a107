"""Time, energy and area of a routing trace on an analog accelerator: an analytic model, vectorised over tokens.

    found = estimate(shape_of(model.config), trace, sheet, Deployment(), batch=32)
    found.time_s, found.power_w, found.mvm_j, found.tiles_stored

Tokens are computed in batches of consecutive ones, a batch after another. Within a batch every block (attention's
projections, router, experts, ...) starts when the last has ended for all of its tokens; tokens that need the same tile
queue at it, tiles work side by side, and so do the slots of a replicated expert. docs/hardware.md states each
assumption.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from romer.errors import InputError
from romer.hardware.deployment import Deployment
from romer.hardware.shapes import ModelShape
from romer.hardware.sheet import ChipSheet
from romer.hardware.tiles import matrices
from romer.hardware.trace import Trace
from romer.hardware.work import Work

PARTS = ("mvm_j", "adc_j", "digital_j", "buffers_j", "network_j", "dram_j", "static_j")
STAGES = ("attention_s", "router_s", "experts_s", "head_s")


@dataclass(frozen=True)
class Estimate:
    """What a trace costs.

    time_s: of all tokens; attention_s, router_s, experts_s (dense layers and shared experts included), head_s: its
    parts; critical_path_s: without any queue; bottleneck_s: of the busiest resource, which no schedule can beat;
    serial_s: everything one after another, on one tile and one unit.
    mvm_j to static_j: energy by part. tiles_stored; tiles_active: a token's mean; tile_mvms: of all tokens.
    cell_utilisation: cells of the tiles that hold weights; tile_utilisation: busy share of tiles over the time.
    area_mm2: of the tiles, NaN where the sheet does not say.
    """

    tokens: int
    batch: int
    time_s: float
    attention_s: float
    router_s: float
    experts_s: float
    head_s: float
    critical_path_s: float
    bottleneck_s: float
    serial_s: float
    mvm_j: float
    adc_j: float
    digital_j: float
    buffers_j: float
    network_j: float
    dram_j: float
    static_j: float
    tiles_stored: int
    tiles_active: float
    tile_mvms: float
    cell_utilisation: float
    tile_utilisation: float
    area_mm2: float

    @property
    def energy_j(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def power_w(self) -> float:
        """Average over the time."""
        return self.energy_j / self.time_s

    def row(self) -> dict[str, float]:
        """All fields, with energy_j and power_w: a line of a table."""
        return asdict(self) | {"energy_j": self.energy_j, "power_w": self.power_w}


def estimate(
    shape: ModelShape, trace: Trace, sheet: ChipSheet, deployment: Deployment | None = None, batch: int = 1
) -> Estimate:
    """What the tokens of `trace` cost on a model of `shape` laid out as `deployment` (all on tiles, by default) on
    the chip of `sheet`, `batch` tokens at a time.

    Raises InputError where trace and shape have another number of MoE layers or experts, or for a batch below 1.
    """
    if (trace.layers, trace.experts) != (shape.moe_layers, shape.experts):
        found, expected = (f"{n} MoE layers of {e} experts" for n, e in _sizes(shape, trace))
        raise InputError(f"trace: found {found}, expected {expected} as in shape {shape.name}")
    if type(batch) is not int or batch < 1:
        raise InputError(f"batch: found {batch!r}, expected a positive integer")
    deployment = deployment or Deployment()
    work = Work(shape, sheet, deployment)
    mask = deployment.digital_mask(trace.layers, trace.experts)
    starts = np.arange(0, trace.tokens, batch)
    stages, dram_bytes = _run(shape, work, trace, mask, batch)
    alone, _ = (stages, 0) if batch == 1 else _run(shape, work, trace, mask, 1)
    path = np.maximum.reduceat(sum(alone.values()), starts).sum()  # the longest token of each batch
    seconds = {stage: 1e-9 * float(ns.sum()) for stage, ns in stages.items()}
    time_s = sum(seconds.values())

    uses = _uses(shape, trace, mask)
    totals = work.totals(uses, trace.tokens, int(_contexts(trace).sum()))
    stored = work.tiles_stored(int(mask.sum()))
    fetched = float(dram_bytes)  # weights that time is counted for
    dram_bytes += trace.tokens * shape.hidden  # rows of the embedding
    longest = max(
        trace.tokens if work.deployment.analog - {"routed expert"} else 0, int(trace.loads[~mask].max(initial=0))
    )
    resources = (longest * sheet.mvm_time_ns, totals.ops_ns, totals.macs_ns, fetched / sheet.dram_bandwidth_gb_per_s)
    static_w = sheet.static_w + 1e-6 * sheet.tile_static_uw * stored
    busy = totals.tile_mvms * sheet.mvm_time_ns * 1e-9
    return Estimate(
        tokens=trace.tokens,
        batch=batch,
        time_s=time_s,
        **seconds,
        critical_path_s=1e-9 * float(path),
        bottleneck_s=1e-9 * max(resources),
        serial_s=1e-9 * totals.serial_ns,
        mvm_j=totals.mvm_j,
        adc_j=totals.adc_j,
        digital_j=totals.digital_j,
        buffers_j=totals.buffers_j,
        network_j=totals.network_j,
        dram_j=1e-12 * sheet.dram_energy_pj_per_byte * float(dram_bytes),
        static_j=static_w * time_s,
        tiles_stored=stored,
        tiles_active=totals.tile_mvms / trace.tokens,
        tile_mvms=totals.tile_mvms,
        cell_utilisation=work.cell_utilisation(int(mask.sum())),
        tile_utilisation=busy / (stored * time_s) if stored else 0.0,
        area_mm2=stored * sheet.tile_area_mm2 if sheet.tile_area_mm2 is not None else float("nan"),
    )


def _sizes(shape: ModelShape, trace: Trace) -> tuple[tuple[int, int], tuple[int, int]]:
    return (trace.layers, trace.experts), (shape.moe_layers, shape.experts)


def _contexts(trace: Trace) -> np.ndarray:
    """[T]: positions that each token attends to."""
    return np.arange(trace.tokens) % trace.window + 1


def _uses(shape: ModelShape, trace: Trace, mask: np.ndarray) -> dict[str, tuple[int, int]]:
    """(analog, digital) uses of each of `matrices` by all tokens; of kinds other than routed experts, all at once."""
    loads, t = trace.loads, trace.tokens
    every = {
        "attention": t * shape.layers,
        "router": t * shape.moe_layers,
        "shared expert": t * shape.moe_layers,
        "dense mlp": t * len(shape.dense),
        "lm_head": t,
    }
    found = {kind: (count, 0) for kind, count in every.items() if kind in matrices(shape)}
    found["routed expert"] = (int(loads[~mask].sum()), int(loads[mask].sum()))
    return found


@dataclass(frozen=True)
class _Routed:
    """What the tokens of each batch ask of one layer's routed experts, each [batches].

    queue: tokens at the busiest analog slot; slots: slots used, by all tokens; digital: of these, digital ones;
    distinct: digital slots used by any token.
    """

    queue: np.ndarray
    slots: np.ndarray
    digital: np.ndarray
    distinct: np.ndarray


def _routed(slots: np.ndarray, mask: np.ndarray, batch: int) -> _Routed:
    """slots [T, K] of one layer, mask bool [E]."""
    tokens, experts = len(slots), len(mask)
    if batch == 1:  # a token alone never queues, and needs no count per slot
        used = slots < experts
        digital = np.append(mask, False)[slots].sum(1)
        return _Routed((used.sum(1) > digital).astype(np.int64), used.sum(1), digital, digital)
    batches = -(-tokens // batch)
    place = (np.arange(tokens) // batch * (experts + 1))[:, None] + slots  # a counter per batch and slot
    counts = np.bincount(place.ravel(), minlength=batches * (experts + 1)).reshape(batches, experts + 1)[:, :-1]
    analog = np.where(mask, 0, counts)
    at = counts[:, mask]
    return _Routed(analog.max(1), counts.sum(1), at.sum(1), (at > 0).sum(1))


def _run(
    shape: ModelShape, work: Work, trace: Trace, mask: np.ndarray, batch: int
) -> tuple[dict[str, np.ndarray], float]:
    """(ns of each batch by stage, each [batches]; bytes of digital weights that are read from DRAM)."""
    starts = np.arange(0, trace.tokens, batch)
    tokens = np.diff(np.append(starts, trace.tokens))
    contexts = np.add.reduceat(_contexts(trace), starts)
    stages = {stage: np.zeros(len(starts)) for stage in STAGES}
    stages["attention_s"] += shape.layers * work.attention_ns(tokens, contexts)
    dense = work.dense_ns(tokens) if shape.dense else 0
    stages["experts_s"] += len(shape.dense) * dense
    stages["router_s"] += shape.moe_layers * work.router_ns(tokens)
    for layer in _layers(trace, mask, batch):
        stages["experts_s"] += work.experts_ns(tokens, layer.queue, layer.slots, layer.digital, layer.distinct)
    stages["head_s"] += work.head_ns(tokens)
    distinct = sum(float(layer.distinct.sum()) for layer in _layers(trace, mask, batch)) if mask.any() else 0.0
    return stages, len(starts) * work.digital_bytes + distinct * work.expert_bytes


def _layers(trace: Trace, mask: np.ndarray, batch: int) -> Iterator[_Routed]:
    for layer in range(trace.layers):
        yield _routed(trace.slots[:, layer], mask[layer], batch)
