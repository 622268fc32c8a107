"""Digital corrections of what arrays return, fitted for each realisation on calibration text.

    layout = Layout(correction=Affine(moments, per="channel"))      # y ≈ k · ỹ + b

The fit of y = W x against ỹ = W̃ x is least squares over calibration tokens; W̃ is known by reading the arrays back. A
correction is applied to the products digitally, after the converters. Its arithmetic is the same as that of an exactly
corrected weight, which is how it is simulated.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from romer.errors import InputError
from romer.moments import Moments, of
from romer.routers import is_router, select

PRIOR_TOKENS = 64  # a fit weighs as the tokens it was made from, no correction as this many
PER = ("layer", "channel")


class Correction(Protocol):
    """A digital step behind every array."""

    def __call__(
        self, name: str, clean: torch.Tensor, stored: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [out, in] with which the corrected array acts, offset [out] or None) of one array: float32."""
        ...

    def numbers(self, outputs: int, inputs: int) -> int:
        """Digital numbers that an array's correction needs, which are also its multiply-accumulates per product."""
        ...


@dataclass(frozen=True)
class Affine:
    """y ≈ k ỹ + b with one k and b a `layer` (an array, of experts a slot) or one for each output `channel`.

    Least squares on the moments of the clean inputs, drawn toward k = 1, b = 0 where few tokens were seen.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    per: str = "layer"

    def __post_init__(self):
        if self.per not in PER:
            raise InputError(f"affine correction: per: found {self.per!r}, expected one of {', '.join(PER)}")

    def __call__(self, name, clean, stored):
        if (seen := of(self.moments, name)) is None:
            raise InputError(f"affine correction: no calibration inputs of {name}")
        clean, stored, covariance = clean.float(), stored.float(), seen.covariance
        spread = stored @ covariance  # [out, in]
        variance, together = (spread * stored).sum(1), (spread * clean).sum(1)  # of ỹ; of ỹ and y
        trust = seen.tokens / (seen.tokens + PRIOR_TOKENS)
        if self.per == "layer":
            variance, together = variance.sum().expand(len(stored)), together.sum().expand(len(stored))
        k = torch.where(variance > 0, together / variance.clamp(min=1e-30), 1.0)
        k = 1 + trust * (k - 1)
        b = trust * (clean @ seen.mean - k * (stored @ seen.mean))
        if self.per == "layer":
            b = b.mean().expand(len(stored))
        return k[:, None] * stored, b

    def numbers(self, outputs, inputs):
        return 2 if self.per == "layer" else 2 * outputs


@contextmanager
def offset(model: nn.Module, offsets: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Adds offsets to the products of linear layers, routers and fused experts, by the tensor's name: [out], or
    [E, out] of experts; undone on exit."""
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, value in offsets.items():
            path, _, tensor = name.rpartition(".")
            module = modules[path]
            if value.dim() == 2:
                setattr(module, f"{tensor}_offset", value)
                stack.callback(delattr, module, f"{tensor}_offset")
            elif is_router(module):
                stack.callback(module.register_forward_hook(_router_hook(value)).remove)
            else:
                stack.callback(module.register_forward_hook(lambda m, args, y, value=value: y + value).remove)
        yield


def _router_hook(value: torch.Tensor):
    def hook(gate, args, output):
        logits = output[0] + value.to(output[0].dtype)
        weights, indices = select(logits, gate.top_k, gate.norm_topk_prob)
        return logits, weights.to(output[1].dtype), indices

    return hook
