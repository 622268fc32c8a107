"""The top-k routers of transformers 5: where they are in a model, and what they choose.

for path, block in moe_layers(model):
    weights, indices = select(logits, block.gate.top_k, block.gate.norm_topk_prob)
"""

import torch
import torch.nn.functional as F
from torch import nn

from romer.errors import InputError


def is_router(module: nn.Module) -> bool:
    """Whether the module is a top-k router as transformers 5 builds them: weight [E, H], returns logits, weights,
    indices."""
    return type(module).__name__.endswith("TopKRouter")


def moe_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The MoE blocks of a model in order: (path, block), each with `gate` (top-k router) and `experts` (fused tensors).

    Raises InputError when there is none.
    """
    blocks = [
        (path, m) for path, m in model.named_modules() if is_router(getattr(m, "gate", None)) and hasattr(m, "experts")
    ]
    if not blocks:
        raise InputError(f"model: {type(model).__name__} has no mixture-of-experts layer with a top-k router")
    for path, block in blocks:
        if not hasattr(block.gate, "norm_topk_prob"):  # what `Rewrite` does is right for softmax routers that state it
            raise InputError(f"model: router {path}.gate is a {type(block.gate).__name__}, which is not supported")
    return blocks


def select(logits: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, indices) [T, k] of the top k of softmax(logits), as transformers' top-k routers compute them.

    Ties go to the lower index (`torch.topk` leaves them open; under eq. 8 all cold experts tie at zero).
    """
    ordered, order = F.softmax(logits, dim=-1, dtype=torch.float).sort(dim=-1, descending=True, stable=True)
    weights, indices = ordered[:, :top_k], order[:, :top_k]
    return (weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights), indices
