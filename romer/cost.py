"""What a method costs in cells, array products and ADC conversions, derived from how it lays a model out.

    cost(methods.get("average"), model, Placement(), fitted, {"copies": 2}).cells       # 2.0

Each is a multiple of the plain layout of the same model; a product counts with the weights of its array, a conversion
is one output column of one tile.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from romer.adc import Adc
from romer.compensation import Compensated
from romer.corrections import reads_back
from romer.methods import Fitted, Method
from romer.noise import slot_name
from romer.outliers import Clipped
from romer.placement import Placement, coverage
from romer.routers import moe_layers

TILE_ROWS = Adc.tile_rows  # inputs of an array


@dataclass(frozen=True)
class Cost:
    """cells; products: weights in activated arrays per token; conversions: ADC conversions per token; all as multiples
    of the plain layout. digital: share of the analog weights that the method keeps digital; side: numbers of digital
    corrections, as a share of the analog weights; operations: digital multiply-accumulates per token that digital
    weights and corrections take, as a share of the plain layout's products; readbacks: how often every array is read
    back after it was written."""

    cells: float
    products: float
    conversions: float
    digital: float
    side: float
    operations: float
    readbacks: int


def loads(model: nn.Module, fitted: Fitted) -> dict[str, torch.Tensor]:
    """Share of the tokens that choose each expert, [E] by the path of the experts module; k / E without counts."""
    found = {}
    for layer, (path, block) in enumerate(moe_layers(model)):
        experts, top_k = block.gate.weight.shape[0], block.gate.top_k
        counts = torch.ones(experts) if fitted.counts is None else fitted.counts[layer].double()
        found[f"{path}.experts"] = top_k * counts / counts.sum()
    return found


def cost(method: Method, model: nn.Module, placement: Placement, fitted: Fitted, options: Mapping) -> Cost:
    """The cost of a method with complete options on the (clean) model.

    A copied expert's second slot computes for every token that chose the expert, by the choices that were profiled
    without replacement (eq. 8, `literal`, changes them); the tokens of the experts that are overwritten go to others,
    so the routed products otherwise stay as they are.
    """
    layout, (plan, _) = method.layout(model, fitted, options), method.routing(fitted, options)
    kept = {row.parameter for row in coverage(model, method.placement(placement)) if row.analog}
    share = loads(model, fitted)
    copies = {path: 1 + torch.zeros(len(load), dtype=torch.float64) for path, load in share.items()}
    if plan is not None:
        for (path, load), hot in zip(share.items(), plan.hot, strict=True):
            copies[path] = copies[path] + load[list(hot)].sum() / load.sum()  # twice for the share that chose hot ones
    plain, own = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    digital, side, operations = 0, 0, 0.0
    per = torch.tensor([layout.encoding.cells, *[layout.encoding.products] * 2], dtype=torch.float64)
    for row in coverage(model, placement):
        if not row.analog:
            continue
        path = row.parameter.rpartition(".")[0]
        slots = row.shape[0] if len(row.shape) == 3 else 1
        outputs, inputs = row.shape[-2:]
        for slot in range(slots):
            name = slot_name(row.parameter, slot) if slots > 1 else row.parameter
            load, twice = (share[path][slot].item(), copies[path][slot].item()) if slots > 1 else (1.0, 1.0)
            weights, conversions = outputs * inputs, outputs * math.ceil(inputs / TILE_ROWS)
            plain += torch.tensor([weights, weights * load, conversions * load], dtype=torch.float64)
            if row.parameter in kept and not layout.is_digital(name):
                own += per * torch.tensor(
                    [weights, weights * load * twice, conversions * load * twice], dtype=torch.float64
                )
                if layout.correction is not None:
                    numbers, shared = layout.correction.numbers(row.parameter, outputs, inputs)
                    side += numbers + shared * (slot == 0)
                    operations += numbers * load * twice + shared * (slot == 0)
            else:
                digital += weights
                operations += weights * load * twice
    cells, products, conversions = (own / plain).tolist()
    stored, computed, _ = plain.tolist()
    encoding = layout.encoding.encoding if isinstance(layout.encoding, Clipped) else layout.encoding
    readbacks = reads_back(layout.correction) + isinstance(encoding, Compensated)
    return Cost(cells, products, conversions, digital / stored, side / stored, operations / computed, readbacks)
