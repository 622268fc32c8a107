"""Interventions on routing that separate its part of the harm from that of the weights (the paper's section 3.1).

with program(model, noise, 0), recorded_routing(model) as decisions:
    perplexity(model, ids)
with replayed_routing(model, decisions):          # clean weights, the noisy model's choice of experts
    perplexity(model, ids)
with perturbed_selection(model, share=0.1):        # a tenth of every token's experts drawn anew
    perplexity(model, ids)
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from romer.adc import hashed, mix, uniform
from romer.errors import InputError
from romer.noise import key_of
from romer.placement import Placement, coverage
from romer.routers import moe_layers

Decisions = list[list[tuple[torch.Tensor, torch.Tensor]]]  # by layer and call: weights and indices, both [T, k]


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[Decisions]:
    """Collects what every router decides in the forward passes inside."""
    blocks = moe_layers(model)
    decisions: Decisions = [[] for _ in blocks]
    with ExitStack() as stack:
        for (_, block), calls in zip(blocks, decisions, strict=True):

            def hook(gate, args, output, calls=calls):
                calls.append((output[1].detach().clone(), output[2].detach().clone()))

            stack.callback(block.gate.register_forward_hook(hook).remove)
        yield decisions


@contextmanager
def replayed_routing(model: nn.Module, decisions: Decisions) -> Iterator[None]:
    """Lets every router decide what `recorded_routing` saw over the same forward passes, whatever its logits are.

    Raises InputError for more passes, or passes of other sizes, than were recorded.
    """
    blocks = moe_layers(model)
    with ExitStack() as stack:
        for (path, block), calls in zip(blocks, decisions, strict=True):
            left = iter(calls)

            def hook(gate, args, output, left=left, path=path):
                weights, indices = next(left, (None, None))
                if weights is None or len(weights) != len(output[1]):
                    raise InputError(f"replayed routing: {path} reads other tokens than were recorded")
                return output[0], weights, indices

            stack.callback(block.gate.register_forward_hook(hook).remove)
        yield


@contextmanager
def perturbed_selection(model: nn.Module, share: float, seed: int = 0, realisation: int = 0) -> Iterator[None]:
    """Draws `share` of every token's chosen experts anew: each chosen expert is dropped with that probability, and the
    dropped places are filled, with the weights that belonged to them, by a uniform draw without replacement from all
    experts that were not kept. 1 is a random selection.

    The draw belongs to (seed, realisation, layer, position, token), not to the batch. Raises InputError for a share
    outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"perturbed selection: share: found {share}, expected 0 ≤ share ≤ 1")
    rows: list[torch.Tensor] = []

    def read(decoder, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        position = torch.arange(ids.shape[1], device=ids.device)
        rows[:] = [(mix(position) + ids).flatten()]

    with ExitStack() as stack:
        stack.callback(model.get_decoder().register_forward_pre_hook(read, with_kwargs=True).remove)
        for path, block in moe_layers(model):
            key = key_of(seed, realisation, path, 0, "perturbation")

            def hook(gate, args, output, key=key):
                logits, weights, indices = output
                first = hashed(key, rows[0], logits.shape[1])  # [T, E]
                dropped = uniform(first).gather(1, indices) < share  # [T, k]
                # Kept experts go to the end of the order, the others into a random one.
                kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, indices, ~dropped)
                order = uniform(mix(first)).masked_fill(kept, 2.0).argsort(dim=1, stable=True)
                place = (dropped.cumsum(1) - 1).clamp(min=0)
                return logits, weights, torch.where(dropped, order.gather(1, place), indices)

            stack.callback(block.gate.register_forward_hook(hook).remove)
        yield


PARTS = ("attention", "dense mlp", "shared expert", "routed expert", "router")


def parts(model: nn.Module, placement: Placement) -> dict[str, str]:
    """Analog tensor -> its part of the model; a shared expert's gate counts with the shared experts."""
    rows = (row for row in coverage(model, placement) if row.analog)
    return {r.parameter: "shared expert" if r.kind == "shared expert gate" else r.kind for r in rows}


def present(model: nn.Module, placement: Placement) -> list[str]:
    """Those of PARTS that are analog in the model."""
    found = set(parts(model, placement).values())
    return [part for part in PARTS if part in found]


def all_but(model: nn.Module, placement: Placement, part: str) -> frozenset[str]:
    """Names of the analog tensors of all parts but one: digital, they leave noise in that part alone.

    Raises InputError for a part that the model does not have.
    """
    kinds = parts(model, placement)
    if part not in kinds.values():
        raise InputError(
            f"noise in one part: found {part!r}, expected one of {', '.join(dict.fromkeys(kinds.values()))}"
        )
    return frozenset(name for name, kind in kinds.items() if kind != part)
