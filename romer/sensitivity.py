"""How much the loss depends on each output of each weight: what errors in different places cost.

    weights = collect(model, ids, moments, placement)      # [out], or [E, out] of fused experts, by the tensor's name

To second order an error Δy of outputs costs ½ Σ_o E[g_o²] E[Δy_o²] of a token's negative log-likelihood, g being its
gradient: the diagonal Fisher information, on unlabelled text. It is read off the gradients of the weights, window by
window, Σ_i (∂L/∂w_oi)² ≈ tokens · E[g_o²] · Σ_i E[x_i²], so fused experts need nothing of their own; that an expert is
chosen seldom or weighs little is in it. Few windows make an output's own value uncertain: it leans on its array's mean.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from romer.encoding import PLAIN, realise
from romer.errors import InputError
from romer.evaluate.perplexity import windows
from romer.moments import Moments, of
from romer.noise import NoiseModel, slot_name
from romer.placement import Placement, coverage
from romer.routers import moe_layers

PRIOR_WINDOWS = 16  # the mean of an array weighs as this many windows of an output's own


def collect(
    model: nn.Module, ids: torch.Tensor, moments: Mapping[str, Moments], placement: Placement, window: int = 128
) -> dict[str, torch.Tensor]:
    """E[g_o²] of every analog weight, float32 [out] or [E, out], on tokens ids [T] in windows (short ones: each is one
    sample of the gradient). The model is left as it was.

    Raises InputError where a weight has no moments, or where there is not one whole window.
    """
    names = [row.parameter for row in coverage(model, placement) if row.analog]
    if missing := [name for name in names if of(moments, name) is None and of(moments, slot_name(name, 0)) is None]:
        raise InputError(f"sensitivity: no calibration inputs of {missing[0]}")
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    squares = [0.0] * len(names)
    rows = windows(ids, window).to(model.device)
    try:
        model.requires_grad_(False)
        weights = [model.get_parameter(name).requires_grad_() for name in names]
        with torch.enable_grad():
            for row in rows:
                logits = model(row[None], use_cache=False).logits[0, :-1]
                loss = F.cross_entropy(logits.float(), row[1:], reduction="sum")
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
                squares = [
                    s + (0.0 if g is None else g.float().square().sum(-1)) for s, g in zip(squares, grads, strict=True)
                ]
                del logits, loss, grads
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
    tokens = rows.shape[0] * (window - 1)
    found = {}
    for name, weight, square in zip(names, weights, squares, strict=True):
        square = torch.as_tensor(square, device=weight.device).expand(weight.shape[:-1])
        if weight.dim() == 3:
            power = torch.stack([of(moments, slot_name(name, i)).power.sum() for i in range(len(weight))])[:, None]
        else:
            power = of(moments, name).power.sum()
        own = square / (tokens * power.to(square).clamp(min=1e-30))
        found[name] = (len(rows) * own + PRIOR_WINDOWS * own.mean(-1, keepdim=True)) / (len(rows) + PRIOR_WINDOWS)
    return found


def expected(
    name: str, error: torch.Tensor, moments: Mapping[str, Moments], sensitivity: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What an error Δ [out, in], or [E, out, in] of fused experts, of the tensor `name` is expected to cost: ½ Σ_o γ_o
    (Δ R Δᵀ)_oo of every array, in nats a token, [1] or [E]. Raises InputError for a tensor without moments."""
    names = [slot_name(name, i) for i in range(len(error))] if error.dim() == 3 else [name]
    if None in (seen := [of(moments, n) for n in names]):
        raise InputError(f"sensitivity: no calibration inputs of {name}")
    error = error.view(len(names), *error.shape[-2:])
    weigh, second = sensitivity[name].to(error).view(len(names), -1) / 2, torch.stack([m.second for m in seen])
    return (weigh * (error @ second * error).sum(2)).sum(1)


@torch.no_grad()
def experts(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int,
    moments: Mapping[str, Moments],
    sensitivity: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the noise of its arrays, what its absence is expected to cost) of every expert, in nats a token, float32
    [L, E] on the CPU: ½ Σ_o γ_o (Δ R Δᵀ)_oo of one realisation's errors Δ (one that is for calibration), and of all of
    down_proj's weights."""
    noisy, absent = [], []
    for path, block in moe_layers(model):
        costs, without = 0.0, 0.0
        for tensor in ("gate_up_proj", "down_proj"):
            name = f"{path}.experts.{tensor}"
            weight = block.experts.get_parameter(tensor).float()
            error = realise(PLAIN, noise, name, weight, realisation) - weight
            costs = costs + expected(name, error, moments, sensitivity)
            if tensor == "down_proj":
                without = expected(name, weight, moments, sensitivity)
        noisy.append(costs)
        absent.append(without)
    return torch.stack(noisy).cpu(), torch.stack(absent).cpu()
