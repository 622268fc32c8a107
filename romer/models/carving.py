"""Carves a dense SwiGLU layer into a mixture of experts: neurons into groups, and a router that picks the groups.

A SwiGLU layer is a sum over neurons, so any grouping of its neurons is exact while all groups are used; a router that
picks k of E groups per token makes it a sparse mixture (MoEfication, Zhang et al. 2022, arXiv:2110.01786; LLaMA-MoE,
Zhu et al. 2024, arXiv:2406.16554; CMoE, Pei et al. 2025, arXiv:2502.04416).

    order = group_neurons(x, layer, structure)             # step 1: shared neurons, then E clusters of equal size
    router = fit_router(x, layer, order, structure)        # step 2: the error is a quadratic form, so no forward pass
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Structure:
    """What is carved out of every feed-forward layer but the first `first_dense` and those listed in dense_layers.

    n_experts (E) routed experts of `expert_neurons` neurons each, top_k (k) of them a token; shared_neurons neurons
    that every token uses, behind a sigmoid gate where gated_shared; norm_topk_prob: the k weights are renormalised to
    one.
    """

    n_experts: int
    expert_neurons: int
    top_k: int
    shared_neurons: int
    gated_shared: bool
    norm_topk_prob: bool
    first_dense: int
    dense_layers: tuple[int, ...] = ()

    def is_dense(self, layer: int) -> bool:
        """Whether the layer stays as it is."""
        return layer < self.first_dense or layer in self.dense_layers


@dataclass(frozen=True)
class SwiGLU:
    """The weights of one dense layer: gate, up [N, H] and down [H, N], float32."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate x) * (up x): [T, H] -> [T, N]."""
        return F.silu(x @ self.gate.T) * (x @ self.up.T)


@dataclass(frozen=True)
class Router:
    """weight [E, H] of the linear router, scale [E] of each expert's output, and, where the shared neurons are gated,
    shared_gate [H] and shared_scale []. error: relative squared error of the layer's output on the fitting tokens."""

    weight: torch.Tensor
    scale: torch.Tensor
    shared_gate: torch.Tensor
    shared_scale: torch.Tensor
    error: float


def group_neurons(x: torch.Tensor, layer: SwiGLU, structure: Structure, generator: torch.Generator) -> torch.Tensor:
    """Order of the neurons [N]: the shared ones first, then expert after expert.

    x [T, H] are the layer's inputs. Shared are the neurons whose output has most energy relative to the layer's; the
    rest is clustered by when they are active (balanced k-means on |a_j|·‖down_j‖ over tokens, exact assignment).
    """
    a = layer.activations(x)
    strength = a.abs() * layer.down.norm(dim=0)  # [T, N]
    importance = (strength.square() / (a @ layer.down.T).square().sum(-1, keepdim=True)).mean(0)  # [N]
    by_importance = importance.argsort(descending=True)
    shared, rest = by_importance[: structure.shared_neurons], by_importance[structure.shared_neurons :].sort().values
    points = F.normalize(strength[:, rest].T, dim=1)  # [N', T]
    groups, size = structure.n_experts, structure.expert_neurons
    centres = points[torch.randperm(len(rest), generator=generator)[:groups]]
    for _ in range(6):
        similarity = (points @ centres.T).repeat_interleave(size, dim=1)  # [N', E * size]: one column a seat
        _, seats = linear_sum_assignment(-similarity.numpy())
        cluster = torch.from_numpy(seats) // size
        centres = F.normalize(torch.stack([points[cluster == i].mean(0) for i in range(groups)]), dim=1)
    return torch.cat([shared, *(rest[cluster == i] for i in range(groups))])


def route(logits: torch.Tensor, top_k: int, norm_topk_prob: bool, straight_through: bool = False) -> torch.Tensor:
    """Routing weights [T, E] from logits [T, E]: softmax over all experts, the top k kept (renormalised where asked).

    straight_through lets gradients pass the selection: backward, it is a sigmoid around the k-th logit whose
    temperature is half the token's standard deviation of the logits.
    """
    p = logits.softmax(-1)
    threshold = logits.topk(top_k, dim=-1).values[:, -1:]
    mask = (logits >= threshold).to(p.dtype)
    if straight_through:
        soft = torch.sigmoid((logits - threshold.detach()) / (0.5 * logits.detach().std(-1, keepdim=True)))
        mask = mask + soft - soft.detach()
    p = p * mask
    return p / p.sum(-1, keepdim=True) if norm_topk_prob else p


def balance_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """E/k · Σ_i f_i P_i, one when balanced: f the share of selections, P the mean probability (Switch Transformers,
    eq. 4)."""
    selected = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, dim=-1).indices, 1.0)
    return logits.shape[1] / top_k * (selected.mean(0) * logits.softmax(-1).mean(0)).sum()


def gram(x: torch.Tensor, layer: SwiGLU, order: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Inner products of the outputs of the shared neurons (index 0) and of every expert: [T, E+1, E+1]."""
    groups, size = structure.n_experts, structure.expert_neurons
    a = layer.activations(x)[:, order]
    down = layer.down[:, order]
    parts = []
    for t in a.split(512):
        routed = torch.einsum(
            "tes,hes->teh",
            t[:, -groups * size :].unflatten(1, (groups, size)),
            down[:, -groups * size :].unflatten(1, (groups, size)),
        )
        shared = t[:, : structure.shared_neurons] @ down[:, : structure.shared_neurons].T
        outputs = torch.cat([shared[:, None], routed], dim=1)  # [t, E+1, H]
        parts.append(outputs @ outputs.transpose(1, 2))
    return torch.cat(parts)


def fit_router(
    x: torch.Tensor,
    layer: SwiGLU,
    order: torch.Tensor,
    structure: Structure,
    generator: torch.Generator,
    steps: int = 300,
    batch: int = 1024,
    balance: float = 0.03,
) -> Router:
    """The router that best reproduces the dense layer's output on inputs x [T, H] with k experts a token.

    With w the weights of the parts and G their Gram matrix, the squared error is (w-1)ᵀ G (w-1). Starts from a ridge
    regression of each expert's log relative energy, then Adam on the relative error plus `balance` times the
    load-balance term.
    """
    g = gram(x, layer, order, structure)  # [T, E+1, E+1]
    total = g.sum((1, 2))  # [T]
    energy = g.diagonal(dim1=1, dim2=2)[:, 1:]
    target = (energy / energy.sum(-1, keepdim=True)).clamp_min(1e-6).log()
    target = (target - target.mean(-1, keepdim=True)) / target.std()
    ridge = x.T @ x + 1e-2 * x.square().sum(0).mean() * torch.eye(x.shape[1])
    weight = (0.3 * torch.linalg.solve(ridge, x.T @ target).T).contiguous().requires_grad_()  # [E, H]
    k = structure.top_k
    log_scale = torch.full((structure.n_experts,), float(k if structure.norm_topk_prob else structure.n_experts)).log()
    log_scale.requires_grad_()
    shared_gate = torch.zeros(x.shape[1], requires_grad=structure.gated_shared)
    shared_scale = torch.tensor(2.0 if structure.gated_shared else 1.0, requires_grad=structure.gated_shared)

    def error(rows: torch.Tensor, straight_through: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logits = x[rows] @ weight.T
        w = route(logits, k, structure.norm_topk_prob, straight_through) * log_scale.exp()
        shared = (
            shared_scale * torch.sigmoid(x[rows] @ shared_gate) if structure.gated_shared else torch.ones(len(rows))
        )
        v = torch.cat([shared[:, None], w], dim=1) - 1.0
        return (torch.einsum("ti,tij,tj->t", v, g[rows], v) / total[rows]).mean(), logits

    slow, fast = [weight], [log_scale] + ([shared_gate, shared_scale] if structure.gated_shared else [])
    adam = torch.optim.Adam([{"params": slow, "lr": 2e-3}, {"params": fast, "lr": 5e-3}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        relative, logits = error(rows, straight_through=True)
        loss = relative + balance * balance_loss(logits, k)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        final = error(torch.arange(len(x)), straight_through=False)[0].item()
    parts = (weight, log_scale.exp(), shared_gate, shared_scale)
    return Router(*(p.detach().clone() for p in parts), error=final)
