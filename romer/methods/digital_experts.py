"""Attention and the most sensitive experts stay digital, after Chowdhury et al. 2026 (arXiv:2603.02633).

The most sensitive experts of a layer are those with the largest neuron norm: the norm of a neuron is that of its row of
gate_up_proj, and an expert's is the largest of its neurons.
"""

import math

from torch import nn

from romer.encoding import Layout
from romer.errors import InputError
from romer.methods import Method, register
from romer.noise import slot_name
from romer.placement import Placement, coverage
from romer.routers import moe_layers


def digital_parts(model: nn.Module, share: float) -> frozenset[str]:
    """Names of the attention weights, and of the ⌈share · E⌉ expert slots of every layer with the largest neuron norm.

    Raises InputError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"digital_experts: share: found {share}, expected 0 ≤ share ≤ 1")
    names = {row.parameter for row in coverage(model, Placement()) if row.kind == "attention"}
    for path, block in moe_layers(model):
        norms = block.experts.gate_up_proj.float().norm(dim=2).amax(1)  # [E]
        for slot in norms.topk(math.ceil(share * len(norms))).indices.tolist():
            names |= {slot_name(f"{path}.experts.{tensor}", slot) for tensor in ("gate_up_proj", "down_proj")}
    return frozenset(names)


register(
    Method(
        "digital_experts",
        defaults=lambda fitted: {"share": 0.125},
        layout=lambda model, fitted, o: Layout(digital=digital_parts(model, o["share"])),
    )
)
