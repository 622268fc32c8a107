"""Rewrites what a router decides, and computes the experts on arrays.

    calibration = RouterCalibration("iqr", strength=0.4)
    with apply(model, plan=plan, calibration=calibration): ...

Per token: raw logits -> calibration (eq. 10-12) -> replacement (eq. 8-9) -> softmax, top-k. The rewriting is a
forward hook on the model's own top-k routers; the experts run through transformers' experts interface, as `analog`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from romer.errors import InputError
from romer.programming import rewrite_slots
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers, select

CALIBRATIONS = ("iqr", "shrink")
DENSE_SHARE = 0.25  # from this k/E on, computing all experts in one product beats gathering the chosen ones


@dataclass(frozen=True)
class RouterCalibration:
    """kind: `iqr` (eq. 11 as printed) or `shrink` (toward the token's median, for which eq. 12 is exact); strength: λ
    ≥ 0."""

    kind: str = "iqr"
    strength: float = 0.0

    def __post_init__(self):
        if self.kind not in CALIBRATIONS:
            raise InputError(f"calibration kind: found {self.kind!r}, expected one of {', '.join(CALIBRATIONS)}")
        if not 0 <= self.strength <= 1:
            raise InputError(f"calibration strength: found {self.strength}, expected 0 ≤ λ ≤ 1")

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated logits [T, E] of logits [T, E], float32. λ = 0 returns them unchanged."""
        if self.strength == 0:
            return logits
        z = logits.float()
        if self.kind == "shrink":
            median = z.quantile(0.5, dim=-1, keepdim=True)
            return median + (1 - 2 * self.strength) * (z - median)
        ordered, order = z.sort(dim=-1)
        q1, q3 = z.quantile(torch.tensor([0.25, 0.75], device=z.device), dim=-1)  # eq. 10, linear interpolation
        shift = self.strength * (q3 - q1)[:, None]
        lower = torch.arange(z.shape[-1], device=z.device) < z.shape[-1] // 2
        ordered = torch.where(lower, ordered + shift, ordered - shift)  # eq. 11
        return torch.empty_like(ordered).scatter_(-1, order, ordered)


class Rewrite:
    """The forward hook that rewrites one router's (logits [T, E], weights [T, k], indices [T, k])."""

    def __init__(self, calibration: RouterCalibration | None, hot: tuple[int, ...], cold: tuple[int, ...], form: str):
        self.calibration, self.form = calibration, form
        self.hot, self.cold = torch.tensor(hot, dtype=torch.long), torch.tensor(cold, dtype=torch.long)

    def __call__(self, gate: nn.Module, args: tuple, output: tuple) -> tuple:
        logits = output[0].float()
        hot, cold = self.hot.to(logits.device), self.cold.to(logits.device)
        if self.calibration is not None:
            logits = self.calibration(logits)
        if self.form == "literal" and len(hot):
            logits = logits.clone()
            logits[:, hot] /= 2  # eq. 8
            logits[:, cold] = 0
        elif len(hot):
            logits = logits.index_fill(1, cold, -torch.inf)
        weights, indices = select(logits, gate.top_k, gate.norm_topk_prob)
        if len(hot):
            weights, indices = split_over_copies(weights, indices, hot, cold, logits.shape[1])
        return logits, weights.to(output[1].dtype), indices


def split_over_copies(
    weights: torch.Tensor, indices: torch.Tensor, hot: torch.Tensor, cold: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 9: a chosen hot expert's weight goes in halves to its own slot and to its copy's.

    weights, indices [T, k] -> [T, k + min(k, n)]; entries that are not used have weight 0 and the index of a chosen
    slot.
    """
    copy = torch.full((experts,), -1, device=indices.device).index_put_((hot,), cold)[
        indices
    ]  # [T, k]: slot of the copy or -1
    doubled = copy >= 0
    weights = torch.where(doubled, weights / 2, weights)
    extra = min(indices.shape[1], len(hot))
    first = doubled.int().argsort(dim=-1, descending=True, stable=True)[:, :extra]
    used = doubled.gather(1, first)
    copies = torch.where(used, copy.gather(1, first), indices.gather(1, first))
    return torch.cat([weights, weights.gather(1, first) * used], 1), torch.cat([indices, copies], 1)


@contextmanager
def apply(
    model: nn.Module, plan: ReplacementPlan | None = None, calibration: RouterCalibration | None = None
) -> Iterator[nn.Module]:
    """Applies a replacement plan and a router calibration to `model` and takes both off again on exit.

    Inside `romer.program` the copies get the device errors of the slots that they are written to. Raises InputError
    when the plan has another number of layers or names an expert that the model does not have.
    """
    blocks = moe_layers(model)
    n = plan.n_replace if plan is not None else 0
    if n and len(plan.hot) != len(blocks):
        raise InputError(f"replacement plan: {len(plan.hot)} layers, the model has {len(blocks)} MoE layers")
    copies = {}
    for layer, (path, block) in enumerate(blocks if n else []):
        experts = block.gate.weight.shape[0]
        if wrong := [i for i in (*plan.hot[layer], *plan.cold[layer]) if not 0 <= i < experts]:
            raise InputError(f"replacement plan, layer {layer}: expert {wrong[0]} is not among the model's {experts}")
        if experts - len(plan.cold[layer]) < block.gate.top_k and plan.form == "split":
            raise InputError(
                f"replacement plan, layer {layer}: {experts} experts less {n} replaced are fewer than"
                f" top-k = {block.gate.top_k}"
            )
        copies[f"{path}.experts"] = dict(zip(plan.cold[layer], plan.hot[layer], strict=True))
    with ExitStack() as stack:
        stack.enter_context(rewrite_slots(model, copies))
        if n or (calibration is not None and calibration.strength):
            for layer, (_, block) in enumerate(blocks):
                hot, cold = (plan.hot[layer], plan.cold[layer]) if n else ((), ())
                handle = block.gate.register_forward_hook(Rewrite(calibration, hot, cold, plan.form if n else "split"))
                stack.callback(handle.remove)
        yield model


def analog_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Σ_i w_i f_i(x) over chosen slots: hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H].

    Where a large share of the experts is chosen, all are computed in one product and weighted (an expert that is not
    chosen has weight 0); otherwise transformers' grouped product gathers the chosen ones.
    """
    if (site := getattr(self, "site", None)) is not None:  # converters at the edge of every array
        return site.experts(self, hidden_states, top_k_index, top_k_weights)
    experts, hidden, inner = self.down_proj.shape
    first, second = (getattr(self, f"{name}_offset", None) for name in ("gate_up_proj", "down_proj"))  # of corrections
    if top_k_index.shape[1] < DENSE_SHARE * experts and first is None and second is None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    weight = top_k_weights.new_zeros(len(hidden_states), experts).scatter_add_(1, top_k_index, top_k_weights)  # [T, E]
    weight = weight.to(hidden_states.dtype)

    def gates_first(rows):  # [E, 2I, ...] -> [2 · E · I, ...]: long rows for the activation, an expert's are short
        return rows.unflatten(1, (2, inner)).transpose(0, 1).flatten(0, 2)

    bias = first if first is None else gates_first(first)
    a = self._apply_gate(F.linear(hidden_states, gates_first(self.gate_up_proj), bias))
    a = a.unflatten(1, (experts, inner)) * weight[..., None]  # [T, E, I]
    y = F.linear(a.flatten(1), self.down_proj.transpose(0, 1).reshape(hidden, experts * inner))
    return y if second is None else y + weight @ second


ALL_EXPERTS_FUNCTIONS.register("analog", analog_experts_forward)
