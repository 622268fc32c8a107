"""End-to-end distillation of a carved model against its dense base: step 3 of making a stand-in.

    model = carve(base, ids, structure, seed)      # steps 1 and 2 in every layer from `first_dense` on
    distil(model, teacher_states(base, ids), ids, Schedule(...), structure, checkpoint)
    parts = export(model, structure)               # small tensors that turn the base into the stand-in

Trains routers, expert scales, neuron scales, norm gains and low-rank updates of the three projections on the KL
divergence to the base's next-token distribution; everything else stays as it is. Nothing here needs labels.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from romer.models.carving import Router, Structure, SwiGLU, balance_loss, fit_router, group_neurons, route


@dataclass(frozen=True)
class Schedule:
    """tokens: how many are seen; window: tokens a sequence; batch: sequences a step; rank: of the low-rank updates.

    lr_*: Adam's learning rates at the peak of a cosine with `warmup` steps, lr_norm relative to the rms of the gains;
    hidden: weight of the relative squared error of the last hidden state beside the KL divergence; balance: weight of
    the load-balance term.
    """

    tokens: int
    window: int = 256
    batch: int = 4
    rank: int = 8
    lr_router: float = 7e-4
    lr_scale: float = 2e-3
    lr_norm: float = 1e-3
    lr_low_rank: float = 4e-3
    warmup: int = 20
    hidden: float = 0.0
    balance: float = 0.01


class LowRankLinear(nn.Module):
    """y = x Wᵀ + (x Aᵀ) Bᵀ with W frozen; A [r, in] random, B [out, r] zero at the start."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


class CarvedMLP(nn.Module):
    """A feed-forward layer carved by `structure`, computed densely: every neuron's activation times its expert's
    weight.

    Input and output [B, S, H]. `logits` keeps the router's last output [B*S, E] for the load-balance term.
    """

    def __init__(self, layer: SwiGLU, order: torch.Tensor, router: Router, structure: Structure, rank: int, generator):
        super().__init__()
        self.structure = structure
        self.register_buffer("order", order)
        self.gate_proj = LowRankLinear(layer.gate[order], rank, generator)
        self.up_proj = LowRankLinear(layer.up[order], rank, generator)
        self.down_proj = LowRankLinear(layer.down[:, order], rank, generator)
        self.router = nn.Parameter(router.weight.clone())  # [E, H]
        self.log_scale = nn.Parameter(router.scale.log())  # [E]
        self.neuron_scale = nn.Parameter(torch.ones(len(order)))  # [N]
        self.shared_gate = nn.Parameter(router.shared_gate.clone())  # [H]
        self.shared_scale = nn.Parameter(router.shared_scale.clone())  # []
        self.logits = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.structure
        with torch.autocast(x.device.type, enabled=False):  # the router decides in float32
            self.logits = x.float().flatten(0, 1) @ self.router.T
            weight = route(self.logits, s.top_k, s.norm_topk_prob) * self.log_scale.exp()  # [T, E]
            weight = weight.repeat_interleave(s.expert_neurons, dim=1).unflatten(0, x.shape[:2])
            shared = torch.ones(*x.shape[:2], s.shared_neurons, device=x.device)
            if s.gated_shared:
                shared = shared * self.shared_scale * torch.sigmoid(x.float() @ self.shared_gate)[..., None]
            weight = torch.cat([shared, weight], dim=-1) * self.neuron_scale  # [B, S, N]
        a = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(a * weight.to(a.dtype))


@torch.no_grad()
def layer_inputs(base: LlamaForCausalLM, ids: torch.Tensor, window: int) -> list[torch.Tensor]:
    """Inputs of every feed-forward layer on the tokens `ids` [T]: a list of [T, H] in bfloat16."""
    collected: list[list[torch.Tensor]] = [[] for _ in base.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, out=out: out.append(args[0].flatten(0, 1).bfloat16()))
        for layer, out in zip(base.model.layers, collected, strict=True)
    ]
    for rows in ids.view(-1, window).split(8):
        base.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in collected]


def carve(
    base: LlamaForCausalLM,
    ids: torch.Tensor,
    structure: Structure,
    seed: int,
    rank: int = 8,
    window: int = 256,
    checkpoint: Path | None = None,
    progress: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """Replaces the feed-forward layers that `structure` does not keep dense by carved ones, in place; returns the base.

    ids [T]: unlabelled tokens, T a multiple of `window`; 4096 of them serve the clustering. With `checkpoint` a file,
    the groups and routers are saved there, and read instead of fitted by the next call.
    """
    found = load_file(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    inputs = layer_inputs(base, ids, window) if not found else []
    fields = ("weight", "scale", "shared_gate", "shared_scale")
    for index, layer in enumerate(base.model.layers):
        if structure.is_dense(index):
            continue
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        weights = SwiGLU(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
        if inputs:
            x, inputs[index] = inputs[index].float(), None
            order = group_neurons(x[:4096], weights, structure, generator)
            router = fit_router(x, weights, order, structure, generator)
            found |= {f"{index}.order": order} | {f"{index}.{f}": getattr(router, f) for f in fields}
            progress(f"layer {index}: relative error {router.error:.3f}")
        router = Router(*(found[f"{index}.{f}"] for f in fields), error=math.nan)
        start = torch.Generator().manual_seed(seed * 1000 + 500 + index)
        layer.mlp = CarvedMLP(weights, found[f"{index}.order"], router, structure, rank, start)
    if checkpoint is not None and inputs:
        save_file(found, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
    return base


@torch.no_grad()
def teacher_states(base: LlamaForCausalLM, ids: torch.Tensor, window: int) -> torch.Tensor:
    """The base's last hidden states (after the final norm) on windows of `ids`: [T / window, window, H] in bfloat16."""
    states = []
    for rows in ids.view(-1, window).split(8):
        with torch.autocast(rows.device.type, torch.bfloat16):
            states.append(base.model(rows, use_cache=False).last_hidden_state.bfloat16())
    return torch.cat(states)


def trainable(model: LlamaForCausalLM, schedule: Schedule) -> list[dict]:
    """Adam's parameter groups: what is trained, each with its peak learning rate."""
    mlps = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, CarvedMLP)]
    norms = [p for name, p in model.named_parameters() if "norm" in name]  # gains differ by orders between layers
    groups = [
        (schedule.lr_router, [m.router for m in mlps] + [m.shared_gate for m in mlps if m.structure.gated_shared]),
        (schedule.lr_scale, [p for m in mlps for p in (m.log_scale, m.neuron_scale)]),
        (schedule.lr_scale, [m.shared_scale for m in mlps if m.structure.gated_shared]),
        (schedule.lr_low_rank, [p for m in mlps for q in (m.gate_proj, m.up_proj, m.down_proj) for p in (q.a, q.b)]),
    ]
    groups += [(schedule.lr_norm * p.square().mean().sqrt().item(), [p]) for p in norms]
    return [{"params": params, "lr": lr, "peak": lr} for lr, params in groups]


def distil(
    model: LlamaForCausalLM,
    teacher: torch.Tensor,
    ids: torch.Tensor,
    schedule: Schedule,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[str], None] = print,
) -> float:
    """Trains the carved `model` in place and returns the mean KL (nats a token) over the last tenth of the steps.

    teacher: `teacher_states` of the dense base, ids [T] the same tokens. KL is taken at every second position. With
    `checkpoint` a file, the state is saved there every 50 steps and taken up again by the next call.
    """
    device = model.device
    groups = trainable(model, schedule)
    params = [p.requires_grad_() for g in groups for p in g["params"]]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
    windows = ids[: schedule.tokens].view(-1, schedule.window)
    steps = len(windows) // schedule.batch
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    head = model.lm_head.weight.detach().to(torch.bfloat16)
    first, recent, started = 0, [], time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, params, adam)
    for step in range(first, steps):
        rate = min((step + 1) / schedule.warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        for g in adam.param_groups:
            g["lr"] = g["peak"] * min(rate, 1.0)
        rows = order[step * schedule.batch : (step + 1) * schedule.batch]
        x, target = windows[rows].to(device), teacher[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(x, use_cache=False).last_hidden_state
        offset = step % 2
        with torch.no_grad():
            expected = F.linear(target[:, offset::2], head).float().log_softmax(-1)
        actual = F.linear(hidden[:, offset::2].to(torch.bfloat16), head).float().log_softmax(-1)
        kl = F.kl_div(actual, expected, log_target=True, reduction="sum") / (actual.shape[0] * actual.shape[1])
        mlps = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, CarvedMLP)]
        balance = sum(balance_loss(m.logits, m.structure.top_k) for m in mlps) / len(mlps)
        loss = kl + schedule.balance * balance
        if schedule.hidden:
            wanted = target.float()
            loss = loss + schedule.hidden * ((hidden - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        recent.append(kl.item())
        if (step + 1) % 10 == 0:
            rate = (step + 1 - first) * schedule.batch * schedule.window / (time.monotonic() - started)
            progress(
                f"step {step + 1}/{steps}: KL {sum(recent[-10:]) / 10:.3f} balance {balance:.2f} {rate:.0f} tokens/s"
            )
        if checkpoint is not None and (step + 1) % 50 == 0 and step + 1 < steps:
            _save(checkpoint, params, adam, step + 1)
    for p in params:
        p.requires_grad_(False)
    return sum(recent[-max(1, steps // 10) :]) / max(1, len(recent[-max(1, steps // 10) :]))


def _save(path: Path, params: list[torch.Tensor], adam: torch.optim.Adam, step: int) -> None:
    tensors = {"step": torch.tensor(step)}
    for i, p in enumerate(params):
        tensors[f"{i}.value"] = p.detach()
        tensors |= {f"{i}.{key}": value for key, value in adam.state[p].items()}
    scratch = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, scratch)
    scratch.replace(path)


def _restore(path: Path, params: list[torch.Tensor], adam: torch.optim.Adam) -> int:
    tensors = load_file(path)
    for i, p in enumerate(params):
        p.data.copy_(tensors[f"{i}.value"])
        moments = {k: tensors[f"{i}.{k}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
        adam.state[p] = {"step": tensors[f"{i}.step"]} | moments
    return int(tensors["step"])


def export(model: LlamaForCausalLM, structure: Structure) -> dict[str, torch.Tensor]:
    """What turns the base into this model, by name and layer: float16, the neurons' order int16.

    `scale` [N] is what the neurons' down columns are multiplied by (expert, neuron and shared scale in one).
    """
    parts = {"norm": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        parts[f"{i}.input_layernorm"] = layer.input_layernorm.weight
        parts[f"{i}.post_attention_layernorm"] = layer.post_attention_layernorm.weight
        if not isinstance(m := layer.mlp, CarvedMLP):
            continue
        experts = m.log_scale.exp().repeat_interleave(structure.expert_neurons)
        scale = m.neuron_scale * torch.cat([m.shared_scale.expand(structure.shared_neurons), experts])
        parts |= {f"{i}.router": m.router, f"{i}.scale": scale, f"{i}.order": m.order.to(torch.int16)}
        if structure.gated_shared:
            parts[f"{i}.shared_gate"] = m.shared_gate
        for name in ("gate_proj", "up_proj", "down_proj"):
            parts |= {f"{i}.{name}.a": getattr(m, name).a, f"{i}.{name}.b": getattr(m, name).b}
    return {k: (v if v.dtype == torch.int16 else v.half()).detach().cpu().contiguous() for k, v in parts.items()}
