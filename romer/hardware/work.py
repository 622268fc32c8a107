"""What the parts of a model ask of a chip: times of each step for batches of tokens, and the energy of all uses.

Counts of elementary operations (additions, multiplications, comparisons, exponentials: one each) are ours and stand
below with their reading.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from romer.hardware.deployment import Deployment
from romer.hardware.shapes import ModelShape
from romer.hardware.sheet import ChipSheet
from romer.hardware.tiles import Matrices, matrices, occurrences

NORM_OPS = 4  # RMSNorm, per element: square, sum, times the inverse root, times the gain
ROTARY_OPS = 3  # rotary embedding, per element: two products and a sum
SOFTMAX_OPS = 5  # per element: maximum, difference, exponential, sum, quotient
SWIGLU_OPS = 5  # per neuron: exponential, sum, quotient (sigmoid) and two products
COMBINE_OPS = 2  # weighted sum of experts, per element and used slot
SHIFT_OPS = 4  # eq. 11 per logit: compare, times λ, add; the quartiles come out of the sort
CORRECTION_OPS = 2  # k y + b, per output
BYTES = 1  # of an activation, a digital weight, a cached key or value: 8 bits


@dataclass(frozen=True)
class Totals:
    """Energies of all uses, tile MVMs, time that the digital units and the multipliers are busy at least, and the time
    of everything one after another."""

    mvm_j: float
    adc_j: float
    digital_j: float
    buffers_j: float
    network_j: float
    tile_mvms: float
    ops_ns: float
    macs_ns: float
    serial_ns: float


class Work:
    """A model of `shape` laid out as `deployment` on the chip of `sheet`. Times are ns; `tokens` and other arguments of
    the methods are [batches]."""

    def __init__(self, shape: ModelShape, sheet: ChipSheet, deployment: Deployment):
        self.shape, self.sheet, self.deployment = shape, sheet, deployment
        self.parts = matrices(shape)
        self.ops_per_ns = sheet.digital_units * sheet.digital_unit_ops_per_ns
        self.macs_per_ns = sheet.mac_units * sheet.mac_unit_macs_per_ns

    def analog(self, kind: str) -> bool:
        """Whether the matrices of `kind` sit on tiles."""
        return kind in self.deployment.analog

    def tiles(self, kind: str) -> int:
        """Tiles of one occurrence of `kind` in the plain layout."""
        return self.parts[kind].tiles(self.sheet.weight_rows, self.sheet.weight_columns)

    # Elementwise operations, per token and layer (or per use).

    @cached_property
    def attention_ops(self) -> float:
        """Norm, rotary embedding, residual; without the softmax, which depends on the context."""
        s = self.shape
        rotary = ROTARY_OPS * (s.heads + s.kv_heads) * s.head_dim
        return (NORM_OPS + 1) * s.hidden + rotary + self.after("attention")

    @cached_property
    def router_ops(self) -> float:
        """Softmax and top-k over the experts; sorting and shifting where logits are calibrated (eq. 10-11)."""
        e = self.shape.experts
        calibration = e * math.ceil(math.log2(e)) + SHIFT_OPS * e if self.deployment.calibrated else 0
        return SOFTMAX_OPS * e + self.shape.top_k * e + calibration + self.after("router")

    def expert_ops(self, analog: bool) -> float:
        """Of one used slot of a routed expert."""
        s = self.shape
        return SWIGLU_OPS * s.expert_width + COMBINE_OPS * s.hidden + (self.after("routed expert") if analog else 0)

    @cached_property
    def layer_ops(self) -> float:
        """Beside the routed experts of an MoE layer: norm, residual, shared experts."""
        s = self.shape
        ops = (NORM_OPS + 1) * s.hidden
        if s.shared_width:
            ops += SWIGLU_OPS * s.shared_width + s.hidden + self.after("shared expert")
        return ops + (s.hidden if s.shared_gate else 0)

    @cached_property
    def dense_ops(self) -> float:
        """Of a dense layer: norm, residual, MLP."""
        s = self.shape
        return (NORM_OPS + 1) * s.hidden + SWIGLU_OPS * s.dense_width + self.after("dense mlp")

    @cached_property
    def head_ops(self) -> float:
        """Last norm, and the running maximum over the vocabulary."""
        return NORM_OPS * self.shape.hidden + self.shape.vocab + self.after("lm_head")

    def after(self, kind: str) -> float:
        """Behind the tiles of one use: sums of partial results (row tiles and arrays of an encoding), corrections."""
        if kind not in self.parts or not self.analog(kind):
            return 0
        least = math.inf if self.deployment.corrected is None or kind == "lm_head" else self.deployment.corrected
        rows, products = self.sheet.weight_rows, self.deployment.products
        return sum(
            out * (math.ceil(inp / rows) * products - 1 + CORRECTION_OPS * (inp >= least))
            for out, inp in self.parts[kind].flat
        )

    # Times.

    def chain_ns(self, steps: int, queue: np.ndarray, macs: np.ndarray, dram_bytes: np.ndarray) -> np.ndarray:
        """`steps` projections after one another, tokens pipelined through them: tiles, multipliers and DRAM work side
        by side, and the results of each step travel."""
        tiles = np.where(queue > 0, queue + steps - 1, 0) * self.sheet.mvm_time_ns
        times = (tiles, macs / self.macs_per_ns, dram_bytes / self.sheet.dram_bandwidth_gb_per_s)
        return np.maximum.reduce(times) + steps * self.sheet.network_latency_ns

    def plain_ns(self, kind: str, steps: tuple, tokens: np.ndarray) -> np.ndarray:
        """A chain of matrices of `kind` that every token uses."""
        weights = sum(outputs * inputs for step in steps for outputs, inputs in step)
        if self.analog(kind):
            return self.chain_ns(len(steps), tokens, self.deployment.side * weights * tokens, 0 * tokens)
        return self.chain_ns(len(steps), 0 * tokens, tokens * weights, np.full(len(tokens), weights * BYTES))

    def all_ns(self, kind: str, tokens: np.ndarray) -> np.ndarray:
        """All steps of `kind` as one chain."""
        return self.plain_ns(kind, self.parts[kind].steps, tokens)

    def attention_ns(self, tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """One layer's projections and attention; contexts: positions attended to, summed over the batch."""
        s = self.shape
        macs = 2 * s.heads * s.head_dim * contexts  # q·Kᵀ and a·V
        ops = self.attention_ops * tokens + SOFTMAX_OPS * s.heads * contexts
        # Attention stands between them and needs all of a batch's keys: no pipeline from the first step to the second.
        projections = sum(self.plain_ns("attention", (step,), tokens) for step in self.parts["attention"].steps)
        return projections + macs / self.macs_per_ns + ops / self.ops_per_ns

    def router_ns(self, tokens: np.ndarray) -> np.ndarray:
        """One layer's router."""
        return self.all_ns("router", tokens) + self.router_ops * tokens / self.ops_per_ns

    def dense_ns(self, tokens: np.ndarray) -> np.ndarray:
        """One dense layer's MLP."""
        return self.all_ns("dense mlp", tokens) + self.dense_ops * tokens / self.ops_per_ns

    def head_ns(self, tokens: np.ndarray) -> np.ndarray:
        """lm_head."""
        return self.all_ns("lm_head", tokens) + self.head_ops * tokens / self.ops_per_ns

    def experts_ns(
        self, tokens: np.ndarray, queue: np.ndarray, slots: np.ndarray, digital: np.ndarray, distinct: np.ndarray
    ) -> np.ndarray:
        """One layer's routed and shared experts, side by side: queue at the busiest analog slot, slots used, digital
        ones among them, and how many different ones these are."""
        shared = self.parts.get("shared expert")
        analog_shared = shared is not None and self.analog("shared expert")
        queue = np.maximum(queue, tokens) if analog_shared else queue
        weights = self.parts["routed expert"].weights
        side = self.deployment.side  # paths beside the tiles, spread over all weights alike
        macs, loaded = (digital + side * (slots - digital)) * weights, distinct * weights * BYTES
        if shared is not None:
            macs = macs + tokens * shared.weights * (side if analog_shared else 1)
            loaded = loaded + (0 if analog_shared else shared.weights * BYTES)
        total = self.chain_ns(len(self.parts["routed expert"].steps), queue, macs, loaded)
        ops = self.layer_ops * tokens + self.expert_ops(True) * (slots - digital) + self.expert_ops(False) * digital
        gate = self.shape.hidden * tokens / self.macs_per_ns if self.shape.shared_gate else 0
        return total + gate + ops / self.ops_per_ns

    # Stored tiles and bytes.

    @property
    def _stored(self) -> dict[str, int]:
        return {kind: stored for kind, (stored, _) in occurrences(self.shape).items() if self.analog(kind)}

    def tiles_stored(self, digital_experts: int) -> int:
        """Tiles of the whole model; spare cells of an encoding share tiles, and are read with them."""
        plain = sum(self.tiles(kind) * count for kind, count in self._less(digital_experts).items())
        return math.ceil(plain * self.deployment.cells)

    def weights_stored(self, digital_experts: int) -> float:
        """Cells of the whole model's weights, without those of lm_head: an encoding's arrays count."""
        held = sum(self.parts[k].weights * count for k, count in self._less(digital_experts).items() if k != "lm_head")
        return self.deployment.cells * held

    def cell_utilisation(self, digital_experts: int) -> float:
        """Share of the stored tiles' cells that hold weights; 0 without tiles."""
        counts = self._less(digital_experts)
        weights = sum(self.parts[kind].weights * count for kind, count in counts.items())
        room = self.sheet.weight_rows * self.sheet.weight_columns
        tiles = sum(self.tiles(kind) * count for kind, count in counts.items())
        return weights / (tiles * room) if tiles else 0.0

    def _less(self, digital_experts: int) -> dict[str, int]:
        counts = self._stored
        if "routed expert" in counts:
            counts["routed expert"] -= digital_experts
        return counts

    @property
    def digital_bytes(self) -> int:
        """Digital weights that every batch reads from DRAM: all kinds but routed experts."""
        counts = occurrences(self.shape)
        kinds = [kind for kind in self.parts if kind != "routed expert" and not self.analog(kind)]
        return BYTES * sum(self.parts[kind].weights * counts[kind][0] for kind in kinds)

    @property
    def expert_bytes(self) -> int:
        """Of one digital expert."""
        return BYTES * self.parts["routed expert"].weights

    # Energy.

    def totals(self, uses: Mapping[str, tuple[int, int]], tokens: int, contexts: int) -> Totals:
        """Energies of the (analog, digital) uses of each kind by `tokens` tokens that attend to `contexts` positions.

        The split counts for routed experts; other kinds are wholly what the deployment says.
        """
        s, sheet = self.shape, self.sheet
        mvms = passes = rows = ops = macs = buffers = network = loads = 0.0
        for kind, (analog, digital) in uses.items():
            part = self.parts[kind]
            if kind != "routed expert":
                analog, digital = (analog, 0) if self.analog(kind) else (0, analog)
            arrays = analog * self.deployment.products
            mvms += arrays * self.tiles(kind)
            for outputs, inputs in part.flat:
                high, wide = math.ceil(inputs / sheet.weight_rows), math.ceil(outputs / sheet.weight_columns)
                passes += arrays * high * outputs * sheet.columns_per_weight * sheet.input_cycles
                rows += arrays * wide * inputs * sheet.rows_per_weight * sheet.input_cycles
                network += arrays * (wide * inputs + high * outputs) * BYTES
            paths = analog * self.deployment.side * part.weights
            macs += digital * part.weights + paths
            loads += digital * part.weights * BYTES
            buffers += (analog + digital) * self._vectors(part) + paths * BYTES  # a path's numbers, out of a buffer
        experts = uses["routed expert"]
        ops += self.expert_ops(True) * experts[0] + self.expert_ops(False) * experts[1]
        ops += tokens * (s.layers * self.attention_ops + s.moe_layers * (self.router_ops + self.layer_ops))
        ops += tokens * self.head_ops + (tokens * len(s.dense) * self.dense_ops if s.dense else 0)
        ops += contexts * s.layers * SOFTMAX_OPS * s.heads
        macs += contexts * s.layers * 2 * s.heads * s.head_dim
        macs += tokens * s.moe_layers * s.hidden if s.shared_gate else 0
        cache = 2 * s.layers * s.kv_heads * s.head_dim * BYTES  # keys and values of one position
        buffers += (contexts + tokens) * cache  # read by every token that attends to it, written once
        hops = tokens * (2 * s.layers + 3 * s.moe_layers + 2 * len(s.dense) + 1)
        serial = mvms * sheet.mvm_time_ns + ops / sheet.digital_unit_ops_per_ns + macs / sheet.mac_unit_macs_per_ns
        serial += loads / sheet.dram_bandwidth_gb_per_s + hops * sheet.network_latency_ns
        return Totals(
            mvm_j=1e-9 * mvms * sheet.mvm_energy_nj + 1e-12 * rows * sheet.dac_energy_pj,
            adc_j=1e-12 * passes * sheet.adc_energy_pj,
            digital_j=1e-12
            * (ops * sheet.digital_op_energy_pj + macs * sheet.mac_energy_pj + passes * sheet.shift_add_energy_pj),
            buffers_j=1e-12 * buffers * sheet.buffer_energy_pj_per_byte,
            network_j=1e-12 * network * sheet.network_energy_pj_per_byte,
            tile_mvms=mvms,
            ops_ns=ops / self.ops_per_ns,
            macs_ns=macs / self.macs_per_ns,
            serial_ns=serial,
        )

    @staticmethod
    def _vectors(part: Matrices) -> int:
        """Bytes that one use reads (the input of a step, once) and writes (the outputs)."""
        return BYTES * sum(step[0][1] + sum(outputs for outputs, _ in step) for step in part.steps)
