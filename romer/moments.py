"""First and second moments of what every weight's inputs are, on calibration text: all that layer-wise fits need.

    moments = collect(model, ids)                                  # of the clean model
    moments["model.layers.0.self_attn.q_proj.weight"].second       # E[x xᵀ], [in, in]

A layer's output error is quadratic in the error of its weights, E‖(W̃ - W) x‖² = tr((W̃ - W) E[x xᵀ] (W̃ - W)ᵀ), so
affine corrections, compensated programming and low-rank paths all follow from these moments without a forward pass per
realisation of the noise.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from romer.evaluate.perplexity import windows
from romer.noise import slot_name
from romer.routers import is_router, moe_layers

PRIOR_TOKENS = 64  # an expert's own moments weigh as its tokens, those of all tokens as this many
MOST_TOGETHER = 4096  # activations of all experts of a layer, up to which it is kept how they go together


@dataclass(frozen=True)
class Moments:
    """Of one weight's inputs x: second [in, in] = E[x xᵀ] and mean [in] = E[x], float32; tokens: how many were seen
    (of an expert's: how many chose it)."""

    second: torch.Tensor
    mean: torch.Tensor
    tokens: int

    @property
    def power(self) -> torch.Tensor:
        """[in]: mean square of each input."""
        return self.second.diagonal()

    @property
    def covariance(self) -> torch.Tensor:
        """[in, in]: E[x xᵀ] - E[x] E[x]ᵀ."""
        return self.second - torch.outer(self.mean, self.mean)


def of(moments: Mapping[str, Moments], array: str) -> Moments | None:
    """The moments of a tensor or an expert slot, `<tensor>[slot]`; the tensor's where the slot has none of its own."""
    return moments.get(array) or moments.get(array.partition("[")[0])


def readers(moments: Mapping[str, Moments], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Tensors of `names` by the input that they share; those whose slots have inputs of their own are left out."""
    found: dict[int, list[str]] = {}
    for name in names:
        if name in moments:
            found.setdefault(id(moments[name].second), []).append(name)
    return [tuple(group) for group in found.values()]


def shared(moments: Mapping[str, Moments], array: str) -> Moments | None:
    """As `of`, but of a slot whose inputs are those of all slots: the tensor's, with all of the tokens."""
    seen, whole = of(moments, array), moments.get(array.partition("[")[0])
    return whole if seen is not None and whole is not None and whole.second is seen.second else seen


def together(moments: Mapping[str, Moments], tensor: str) -> Moments | None:
    """The moments of what all slots of a tensor read whose outputs are summed, side by side and times the router's
    weights, 0 where a slot is not chosen: second [E·I, E·I], mean [E·I]. None where they were not collected."""
    return moments.get(_all_slots(tensor))


def _all_slots(tensor: str) -> str:
    return f"{tensor}[:]"


class _Sums:
    """Running sums of x xᵀ and x."""

    def __init__(self):
        self.second, self.first, self.tokens = 0.0, 0.0, 0

    def add(self, x: torch.Tensor) -> None:
        """x [T, in]."""
        x = x.float()
        self.second, self.first = self.second + x.T @ x, self.first + x.double().sum(0)
        self.tokens += len(x)

    @property
    def moments(self) -> Moments:
        """The means."""
        return Moments(self.second / self.tokens, (self.first / self.tokens).float(), self.tokens)


class _ExpertSums:
    """Sums over experts' inner activations: of all tokens, of those that chose each expert and, with `all_pairs`, of
    all experts side by side."""

    def __init__(self, all_pairs: bool):
        self.everyone, self.chosen, self.first, self.first_chosen, self.counts, self.tokens = 0.0, 0.0, 0.0, 0.0, 0, 0
        self.all_pairs, self.pairs, self.first_added, self.squares = all_pairs, 0.0, 0.0, 0.0

    def add(self, a: torch.Tensor, gates: torch.Tensor) -> None:
        """a [T, E, I] float32; gates [T, E], the router's weights, 0 of those that were not chosen."""
        chosen = gates != 0
        every, own = a.transpose(0, 1), (a * chosen[..., None]).transpose(0, 1)  # [E, T, I]
        self.everyone, self.first = self.everyone + every.transpose(1, 2) @ every, self.first + every.sum(1)
        self.chosen, self.first_chosen = self.chosen + own.transpose(1, 2) @ own, self.first_chosen + own.sum(1)
        self.counts, self.tokens = self.counts + chosen.sum(0), self.tokens + len(a)
        if self.all_pairs:
            added = (a * gates[..., None]).flatten(1)
            self.pairs, self.first_added = self.pairs + added.T @ added, self.first_added + added.sum(0)
            self.squares = self.squares + gates.square().sum()

    def moments(self, slot: int) -> Moments:
        """Of one expert: its own tokens' moments, leaning on those of all tokens where it has few."""
        n = int(self.counts[slot])
        weight, share = n + PRIOR_TOKENS, PRIOR_TOKENS / self.tokens
        second = (self.chosen[slot] + share * self.everyone[slot]) / weight
        return Moments(second, (self.first_chosen[slot] + share * self.first[slot]) / weight, n)

    @property
    def together(self) -> Moments:
        """As of `together`, each expert leaning on all tokens as in `moments`."""
        share = PRIOR_TOKENS / self.tokens * self.squares / self.counts.sum()  # at the mean square of a weight
        return Moments(
            (self.pairs + torch.block_diag(*(share * self.everyone))) / self.tokens,
            self.first_added / self.tokens,
            self.tokens,
        )


@torch.no_grad()
def collect(
    model: nn.Module, ids: torch.Tensor, window: int = 512, batch: int = 2, all_pairs: bool = False
) -> dict[str, Moments]:
    """Moments of the inputs of every linear weight, router and expert slot that `ids` [T], read in windows, reach.

    By the tensor's name, and `<tensor>[slot]` for experts. Slots share the moments of their layer's input, whoever is
    chosen; the inputs of down_proj are each expert's own. Weights with the same input share one object. `all_pairs`:
    also those of `together`, in layers whose experts have MOST_TOGETHER activations or fewer. Raises InputError
    where there is not one whole window.
    """
    sums: dict[str, _Sums] = {}
    experts: dict[str, _ExpertSums] = {}
    leader: dict[str, str] = {}  # weight -> the weight whose sums it shares
    last: list = [None, ""]  # the input seen last, and under which name

    def note(name: str, x: torch.Tensor) -> None:
        x = x.detach().flatten(0, -2)
        same = last[0] is not None and x.data_ptr() == last[0].data_ptr() and x.shape == last[0].shape
        if leader.setdefault(name, last[1] if same else name) == name:
            sums.setdefault(name, _Sums()).add(x)
            last[:] = x, name  # kept, so that its memory is not another tensor's meanwhile

    def watch(name: str):
        return lambda module, args: note(name, args[0])

    def watch_experts(path: str):
        def hook(module, args):
            x, index, weights = args[0].flatten(0, -2), args[1], args[2]
            note(f"{path}.gate_up_proj", x)
            count = len(module.down_proj)
            gate_up = F.linear(x, module.gate_up_proj.flatten(0, 1)).unflatten(1, (count, -1))
            inner = module._apply_gate(gate_up).float()
            gates = torch.zeros(len(x), count, device=x.device).scatter_(1, index, weights.float())
            few = inner[0].numel() <= MOST_TOGETHER
            experts.setdefault(path, _ExpertSums(all_pairs and few)).add(inner, gates)

        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) or is_router(module):
                stack.callback(module.register_forward_pre_hook(watch(f"{path}.weight")).remove)
        for path, block in moe_layers(model):
            stack.callback(block.experts.register_forward_pre_hook(watch_experts(f"{path}.experts")).remove)
        for rows in windows(ids, window).split(batch):
            model.get_decoder()(rows.to(model.device), use_cache=False)
    found = {name: s.moments for name, s in sums.items()}
    found |= {name: found[first] for name, first in leader.items()}
    for path, inner in experts.items():
        for slot, count in enumerate(inner.counts.tolist()):
            layer = found[f"{path}.gate_up_proj"]
            found[slot_name(f"{path}.gate_up_proj", slot)] = replace(layer, tokens=count)
            found[slot_name(f"{path}.down_proj", slot)] = inner.moments(slot)
        if inner.all_pairs:
            found[_all_slots(f"{path}.down_proj")] = inner.together
    return found
