"""Activation profiling, eq. 6: how often and how strongly every expert is used, clean or noisy.

clean = profile(model, ids)
with program(model, noise, realisation=0):
    noisy = profile(model, ids)
noisy.overlap(clean), noisy.logit_variance / clean.logit_variance
"""

from dataclasses import dataclass

import torch

from romer.evaluate.perplexity import windows
from romer.routers import moe_layers


@dataclass(frozen=True)
class Profile:
    """What the routers did on T tokens, per MoE layer (L) and expert (E).

    magnitude [L, E]: A_{l,i} of eq. 6, the gate probability summed over the tokens that chose the expert; counts [L,
    E]: those tokens; logit_variance [L]: variance of a token's router logits over experts, mean over tokens; chosen
    [L, T, E] bool. magnitude and logit_variance are float64.
    """

    magnitude: torch.Tensor
    counts: torch.Tensor
    logit_variance: torch.Tensor
    chosen: torch.Tensor

    @property
    def load_max_over_mean(self) -> torch.Tensor:
        """[L]: tokens of the busiest expert over the mean; 1 is balanced."""
        return self.counts.max(1).values / self.counts.double().mean(1)

    @property
    def load_entropy(self) -> torch.Tensor:
        """[L]: entropy of the load over experts, divided by ln E; 1 is balanced."""
        share = self.counts.double() / self.counts.sum(1, keepdim=True)
        return -torch.special.xlogy(share, share).sum(1) / torch.tensor(share.shape[1]).double().log()

    def overlap(self, other: "Profile") -> torch.Tensor:
        """[L]: share of a token's chosen experts that both profiles of the same tokens chose, mean over tokens."""
        both = (self.chosen & other.chosen).sum(-1).double()
        return (both / self.chosen.sum(-1)).mean(-1)


@torch.no_grad()
def profile(model: torch.nn.Module, ids: torch.Tensor, window: int = 512, batch: int = 4) -> Profile:
    """Runs the tokens `ids` [T] through the model in windows and records what its routers decide.

    Sees the routing as rewritten by `romer.apply`; a copied expert's two slots both count, each with its half of the
    weight.
    """
    blocks = moe_layers(model)
    magnitude = [torch.zeros(b.gate.weight.shape[0], dtype=torch.float64) for _, b in blocks]  # eq. 6
    variance: list[list[torch.Tensor]] = [[] for _ in blocks]
    chosen: list[list[torch.Tensor]] = [[] for _ in blocks]

    def record(layer: int):
        def hook(gate, args, output):
            logits, weights, indices = output
            finite = logits.double().masked_fill(torch.isinf(logits), torch.nan)
            mean = finite.nanmean(-1, keepdim=True)
            variance[layer].append((finite - mean).square().nanmean(-1).cpu())
            p = torch.zeros_like(logits, dtype=torch.float64).scatter_add_(1, indices, weights.double())
            magnitude[layer] += p.sum(0).cpu()
            # A chosen expert's weight may underflow to zero; a copy's entry of weight zero is not used.
            chosen[layer].append((p > 0).scatter_(1, indices[:, : gate.top_k], True).cpu())

        return hook

    handles = [block.gate.register_forward_hook(record(layer)) for layer, (_, block) in enumerate(blocks)]
    try:
        for rows in windows(ids, window).split(batch):
            model.model(rows.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    selected = torch.stack([torch.cat(parts) for parts in chosen])  # [L, T, E]
    spread = torch.stack([torch.cat(parts).mean() for parts in variance])
    return Profile(torch.stack(magnitude), selected.sum(1), spread, selected)
