"""How a method lays a model out on a chip: what is analog, on how many arrays, and which experts are digital.

Deployment()                                                        # everything on tiles, plainly
deployed(methods.get("average"), model, Placement(), fitted, {"copies": 2})
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from romer.corrections import Affine, links, share
from romer.errors import InputError
from romer.hardware.tiles import KINDS
from romer.lowrank import LowRank
from romer.methods import Fitted, Method
from romer.outliers import Outliers
from romer.placement import Placement, coverage
from romer.projection import Projected
from romer.routers import moe_layers


@dataclass(frozen=True)
class Deployment:
    """analog: kinds of weights on tiles (`romer.hardware.tiles.KINDS`); cells, products: arrays that hold a matrix,
    and arrays that its product activates, as multiples of the plain layout (`romer.encoding`); digital_experts: per
    MoE layer the slots whose experts stay digital, () for none; calibrated: whether routers compress their logits;
    corrected: the least inputs of a matrix whose outputs are scaled and shifted digitally (never lm_head's), None where
    none are; side: digital multiply-accumulates of
    paths beside the tiles, per weight of a product, with numbers that are read from a buffer at every use.
    """

    analog: frozenset[str] = frozenset(KINDS)
    cells: float = 1.0
    products: float = 1.0
    digital_experts: tuple[frozenset[int], ...] = ()
    calibrated: bool = False
    corrected: int | None = None
    side: float = 0.0

    def __post_init__(self):
        if unknown := sorted(self.analog - set(KINDS)):
            raise InputError(f"deployment: found {unknown[0]!r} on tiles, expected some of {', '.join(KINDS)}")
        for field in ("cells", "products"):
            if getattr(self, field) < 1:
                raise InputError(f"deployment: {field}: found {getattr(self, field)}, expected at least 1")

    def digital_mask(self, layers: int, experts: int) -> np.ndarray:
        """bool [layers, experts]: slots whose experts are digital. Raises InputError for another number of layers."""
        mask = np.full((layers, experts), "routed expert" not in self.analog)
        if self.digital_experts and len(self.digital_experts) != layers:
            raise InputError(f"deployment: digital experts of {len(self.digital_experts)} layers, expected {layers}")
        for row, slots in zip(mask, self.digital_experts or [()] * layers, strict=True):
            row[list(slots)] = True
        return mask

    def stretched(self, load: np.ndarray, layers: int, experts: int) -> "Deployment":
        """The same for a shape whose load is `stretch(load, layers, experts)`: an expert is digital where that of the
        nearest rank in load [l, e] is."""
        if not self.digital_experts:
            return self
        order = np.argsort(-np.asarray(load), axis=1, kind="stable")
        mask = np.take_along_axis(self.digital_mask(*load.shape), order, axis=1)
        depth = np.linspace(0, load.shape[0] - 1, layers).round().astype(int)
        rank = np.linspace(0, load.shape[1] - 1, experts).round().astype(int)
        slots = tuple(frozenset(np.flatnonzero(row).tolist()) for row in mask[depth][:, rank])
        return replace(self, digital_experts=slots)


def deployed(
    method: Method, model: nn.Module, placement: Placement, fitted: Fitted, options: Mapping, lm_head: bool = True
) -> Deployment:
    """How a method with complete options lays `model` out; lm_head: whether that sits on tiles, which the noise model
    leaves open. Kinds of weights that the model does not have count as being on tiles.

    Raises InputError for cached keys and values on arrays, whose writing no sheet prices, and where a method keeps
    only a part of a kind of weights (other than routed experts) digital.
    """
    own, layout = method.placement(placement), method.layout(model, fitted, options)
    if own.kv:
        raise InputError("placement.rule: found 'linear+kv', expected linear or experts: writing cells is not priced")
    slots = [set() for _ in moe_layers(model)]
    paths = {f"{path}.experts": layer for layer, (path, _) in enumerate(moe_layers(model))}
    kinds: dict[str, set[bool]] = {}
    for row in coverage(model, own):
        if row.kind not in KINDS or row.kind == "lm_head":
            continue
        if row.kind == "routed expert" and row.analog:
            kinds.setdefault(row.kind, set()).add(True)
            layer = slots[paths[row.parameter.rpartition(".")[0]]]
            layer |= layout.digital_slots(row.parameter, row.shape[0])
        else:
            kinds.setdefault(row.kind, set()).add(row.analog and not layout.is_digital(row.parameter))
    if mixed := [kind for kind, found in kinds.items() if len(found) > 1]:
        raise InputError(f"method {method.name}: a part of {mixed[0]} is digital, expected all of it or nothing")
    digital = {kind for kind, found in kinds.items() if found == {False}} | (set() if lm_head else {"lm_head"})
    _, calibration = method.routing(fitted, options)
    steps = links(layout.correction)
    return Deployment(
        frozenset(KINDS) - digital,
        float(layout.encoding.cells),
        float(layout.encoding.products),
        tuple(map(frozenset, slots)) if any(slots) else (),
        calibration is not None and calibration.strength > 0,
        min((link.least_inputs for link in steps if isinstance(link, Affine)), default=None),
        sum(share(link, model, own) for link in steps if isinstance(link, LowRank | Outliers | Projected)),
    )
