"""Puts noisy weights into a model and takes them out again, bitwise; says which parameters are analog and which are
not.

    rows = coverage(model, Placement())                     # every parameter, analog or digital
    with program(model, NoiseModel(0.1), realisation=0):    # one programming of the arrays
        ...

The expert slots of a programmed model can be rewritten while it is programmed (`rewrite_slots`): each physical slot
keeps its own device errors whatever expert is stored in it, so a copied expert sees independent noise.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from romer.errors import InputError
from romer.noise import NoiseModel, slot_name

PLACEMENTS = ("experts", "linear")


@dataclass(frozen=True)
class Placement:
    """Which weights are analog. rule: `experts` (routed and shared experts) or `linear` (every linear weight but
    embeddings and lm_head); router: whether the routers are analog too."""

    rule: str = "linear"
    router: bool = True

    def __post_init__(self):
        if self.rule not in PLACEMENTS:
            raise InputError(f"placement.rule: found {self.rule!r}, expected one of {', '.join(PLACEMENTS)}")


@dataclass(frozen=True)
class Coverage:
    """One parameter of a model: its name, shape, what it is, and whether it sits on analog arrays."""

    parameter: str
    shape: tuple[int, ...]
    count: int
    kind: str
    analog: bool


def _kinds(model: nn.Module) -> dict[str, str]:
    """What every parameter is, by name."""
    output = model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if isinstance(module, nn.Embedding):
                kind = "embedding"
            elif module is output:
                kind = "lm_head"
            elif name in ("gate_up_proj", "down_proj"):
                kind = "routed expert"
            elif is_router(module):
                kind = "router"
            elif isinstance(module, nn.Linear) and name == "weight":
                parts = path.split(".")
                if any(p in ("shared_expert", "shared_experts") for p in parts):
                    kind = "shared expert"
                elif "shared_expert_gate" in parts:
                    kind = "shared expert gate"
                else:
                    kind = "attention" if "self_attn" in parts else "dense mlp"
            elif isinstance(module, nn.Linear):
                kind = "bias"
            elif "norm" in type(module).__name__.lower():
                kind = "norm"
            else:
                raise InputError(
                    f"placement: parameter {full} {tuple(module.get_parameter(name).shape)} of {type(module).__name__}"
                    " is neither known as analog nor as digital"
                )
            found[full] = kind
    return found


_LINEAR_KINDS = {"attention", "dense mlp", "shared expert", "shared expert gate", "routed expert"}
_EXPERT_KINDS = {"shared expert", "routed expert"}


def is_router(module: nn.Module) -> bool:
    """Whether the module is a top-k router as transformers 5 builds them: weight [E, H], returns logits, weights,
    indices."""
    return type(module).__name__.endswith("TopKRouter")


def coverage(model: nn.Module, placement: Placement) -> list[Coverage]:
    """Every parameter of the model, analog or digital. Raises InputError when one is unaccounted for or none is
    analog."""
    analog = set(_LINEAR_KINDS if placement.rule == "linear" else _EXPERT_KINDS) | (
        {"router"} if placement.router else set()
    )
    kinds = _kinds(model)
    rows = []
    for name, p in model.named_parameters():  # a tied parameter once, under the name of its first use
        rows.append(Coverage(name, tuple(p.shape), p.numel(), kinds[name], kinds[name] in analog))
    if not any(r.analog and r.kind != "router" for r in rows):
        raise InputError(f"placement.rule: {placement.rule!r} matches no weight of {type(model).__name__}")
    return rows


class Programmed:
    """The arrays of a programmed model: what was written where. Made by `program`, used by `rewrite_slots`."""

    def __init__(self, noise: NoiseModel, realisation: int, clean: dict[str, torch.Tensor]):
        self.noise, self.realisation, self.clean = noise, realisation, clean


_PROGRAMMED: weakref.WeakKeyDictionary[nn.Module, Programmed] = weakref.WeakKeyDictionary()


@contextmanager
@torch.no_grad()
def program(
    model: nn.Module, noise: NoiseModel, realisation: int = 0, placement: Placement | None = None
) -> Iterator[Programmed]:
    """Replaces the analog weights of `model` by one noisy realisation, in place, and restores them bitwise on exit.

    Raises InputError when the model is programmed already.
    """
    if model in _PROGRAMMED:
        raise InputError("program: the model is programmed already; leave the first context before entering a second")
    analog = {row.parameter for row in coverage(model, placement or Placement()) if row.analog}
    clean = {name: p.detach().clone() for name, p in model.named_parameters() if name in analog}
    _PROGRAMMED[model] = array = Programmed(noise, realisation, clean)
    try:
        for name in clean:
            p = model.get_parameter(name)
            p.copy_(noise.realise(name, p, realisation))
        yield array
    finally:
        del _PROGRAMMED[model]
        for name, value in clean.items():
            model.get_parameter(name).copy_(value)


@contextmanager
@torch.no_grad()
def rewrite_slots(model: nn.Module, copies: Mapping[str, Mapping[int, int]]) -> Iterator[None]:
    """Overwrites expert slots with other experts' weights (eq. 7) and undoes it on exit.

    copies: name of an experts module -> {slot: expert whose weights it gets}. On a programmed model the clean weight
    of the expert is written with the errors of the slot's own cells; on a clean one it is copied.
    """
    array = _PROGRAMMED.get(model)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for path, slots in copies.items():
            for tensor in ("gate_up_proj", "down_proj"):
                name = f"{path}.{tensor}"
                p = model.get_parameter(name)
                analog = array is not None and name in array.clean
                source = array.clean[name] if analog else p.detach().clone()
                for slot, expert in slots.items():
                    before.append((p[slot], p[slot].clone()))
                    value = source[expert]
                    p[slot] = array.noise.realise(slot_name(name, slot), value, array.realisation) if analog else value
        yield
    finally:
        for view, value in reversed(before):
            view.copy_(value)
