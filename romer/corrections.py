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
from romer.noise import slot_name
from romer.placement import Placement, coverage
from romer.routers import is_router, select

PRIOR_TOKENS = 64  # a fit weighs as the tokens it was made from, no correction as this many
PER = ("layer", "channel")


class Correction(Protocol):
    """A digital step behind every array, fitted to what was `read` back of it, or else to what acts (`stored`);
    `reads_back` is False of one that needs neither."""

    def shared(self, name: str, clean: torch.Tensor, read: torch.Tensor) -> object | None:
        """What the corrections of all arrays of one tensor, [out, in] or [E, out, in], have in common."""
        ...

    def __call__(
        self,
        name: str,
        clean: torch.Tensor,
        stored: torch.Tensor,
        read: torch.Tensor | None = None,
        shared: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [out, in] with which the corrected array acts, offset [out] or None) of one array: float32."""
        ...

    def numbers(self, name: str, outputs: int, inputs: int) -> tuple[int, int]:
        """Digital numbers of one array's correction, and those that all arrays of its tensor share; they are also the
        multiply-accumulates of a product, the shared ones once a token."""
        ...


def share(correction: Correction, model: nn.Module, placement: Placement) -> float:
    """Digital numbers of a correction, as a share of the model's analog weights."""
    numbers, weights = 0, 0
    for row in coverage(model, placement):
        if row.analog:
            own, common = correction.numbers(row.parameter, *row.shape[-2:])
            numbers, weights = (
                numbers + own * (row.shape[0] if len(row.shape) == 3 else 1) + common,
                weights + row.count,
            )
    return numbers / weights


@dataclass(frozen=True)
class Affine:
    """y ≈ k ỹ + b with one k and b a `layer` (an array, of experts a slot) or one for each output `channel`.

    Least squares on the moments of the clean inputs, drawn toward k = 1, b = 0 where few tokens were seen. Arrays with
    fewer than `least_inputs` inputs are left alone: a channel's two numbers would be many for its few weights.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    per: str = "layer"
    least_inputs: int = 0

    def __post_init__(self):
        if self.per not in PER:
            raise InputError(f"affine correction: per: found {self.per!r}, expected one of {', '.join(PER)}")

    def shared(self, name, clean, read):
        return None

    def __call__(self, name, clean, stored, read=None, shared=None):
        if (seen := of(self.moments, name)) is None:
            raise InputError(f"affine correction: no calibration inputs of {name}")
        if clean.shape[1] < self.least_inputs:
            return stored.float(), None
        clean, stored, covariance = clean.float(), stored.float(), seen.covariance
        read = stored if read is None else read.float()
        spread = read @ covariance  # [out, in]
        variance, together = (spread * read).sum(1), (spread * clean).sum(1)  # of ỹ; of ỹ and y
        was, should = read @ seen.mean, clean @ seen.mean  # means of ỹ and y
        trust = seen.tokens / (seen.tokens + PRIOR_TOKENS)
        if self.per == "layer":  # all outputs are one sample, so their means differ within it
            apart, other = was - was.mean(), should - should.mean()
            variance = (variance + apart * apart).sum().expand(len(stored))
            together = (together + apart * other).sum().expand(len(stored))
        k = torch.where(variance > 0, together / variance.clamp(min=1e-30), 1.0)
        k = 1 + trust * (k - 1)
        b = trust * (should - k * was)
        if self.per == "layer":
            b = b.mean().expand(len(stored))
        return k[:, None] * stored, b

    def numbers(self, name, outputs, inputs):
        numbers = 2 if self.per == "layer" else 2 * outputs
        return (numbers if inputs >= self.least_inputs else 0), 0


@dataclass(frozen=True)
class Chain:
    """One correction behind the other, each fitted to what those before it leave."""

    links: tuple[Correction, ...]

    def shared(self, name, clean, read):
        found = []
        for link in self.links:
            found.append(link.shared(name, clean, read))
            if link is not self.links[-1]:
                read = self._after(link, name, clean, read, found[-1])
        return tuple(found)

    @staticmethod
    def _after(link: Correction, name: str, clean: torch.Tensor, read: torch.Tensor, shared) -> torch.Tensor:
        if clean.dim() == 2:
            return link(name, clean, read, read, shared)[0]
        slots = enumerate(zip(clean, read, strict=True))
        return torch.stack([link(slot_name(name, i), w, r, r, shared)[0] for i, (w, r) in slots])

    def __call__(self, name, clean, stored, read=None, shared=None):
        read, offset = stored if read is None else read, None
        for link, common in zip(self.links, shared or (None,) * len(self.links), strict=True):
            same = read is stored
            stored, more = link(name, clean, stored, read, common)
            read = stored if same else link(name, clean, read, read, common)[0]
            offset = more if offset is None else offset if more is None else offset + more
        return stored, offset

    def numbers(self, name, outputs, inputs):
        own, common = zip(*(link.numbers(name, outputs, inputs) for link in self.links), strict=True)
        return sum(own), sum(common)


def links(correction: Correction | None) -> tuple[Correction, ...]:
    """The single corrections that a correction, or None, is made of, in order."""
    if correction is None:
        return ()
    return correction.links if isinstance(correction, Chain) else (correction,)


def reads_back(correction: Correction | None) -> bool:
    """Whether finished arrays have to be read for it."""
    return any(getattr(link, "reads_back", True) for link in links(correction))


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
