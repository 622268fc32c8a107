"""Strong directions of an input, kept off the arrays: a few digital products for what would cost most if it were noisy.

    found = directions(model, noise, realisation, placement, moments, sensitivity)
    layout = Layout(correction=Projected(kept(found, ranks)))           # y ≈ W̃ (x - V B x) + (W V) (B x)

Inputs of a language model lie near few directions. What an array returns for them can be computed from a few products
B x, once for all arrays that read the same input, and W V, which is known exactly: nothing needs to be read back, and
no error of any kind acts on these directions, neither of programming nor of reading, nor drift. With cell errors of
variance m_j, summed over outputs that weigh by how much the loss depends on them, what is left costs tr(M Q R Qᵀ),
Q = 1 - V B, M = diag(m); it is least for B = Uᵀ M^½, V = M^-½ U, U the leading eigenvectors of M^½ R M^½: the
projection onto principal components (Eckart and Young 1936, DOI 10.1007/BF02288367), here in the metric of the noise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from romer.encoding import PLAIN, realise
from romer.lowrank import MOST, spend, subspace
from romer.moments import Moments, readers
from romer.noise import NoiseModel
from romer.placement import Placement, coverage


@dataclass(frozen=True)
class Directions:
    """Of the input of some tensors: gains [r], what each takes out of the expected loss, falling; reads [r, in] = B and
    onto [in, r] = V, B V = 1; tensors: those that read the input."""

    gains: torch.Tensor
    reads: torch.Tensor
    onto: torch.Tensor
    tensors: tuple[str, ...]

    def first(self, rank: int) -> "Directions":
        """The strongest `rank` of them."""
        return Directions(self.gains[:rank], self.reads[:rank], self.onto[:, :rank], self.tensors)

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """What is left of x [in, ...] without them: x - V B x."""
        return x - self.onto @ (self.reads @ x)


@torch.no_grad()
def directions(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int,
    placement: Placement,
    moments: Mapping[str, Moments],
    sensitivity: Mapping[str, torch.Tensor],
) -> dict[str, Directions]:
    """The strongest directions of every input of analog tensors, by the first tensor that reads it; the size of cell
    errors is that of one realisation (one that is for calibration)."""
    found = {}
    for group in readers(moments, [row.parameter for row in coverage(model, placement) if row.analog]):
        second, costs = moments[group[0]].second, 0.0
        for name in group:
            weight = model.get_parameter(name)
            error = realise(PLAIN, noise, name, weight, realisation).float() - weight.float()
            square = error.square() * sensitivity[name].to(error)[..., None]
            costs = costs + square.flatten(0, -2).sum(0)
        root = costs.clamp(min=1e-6 * costs.mean().item() + 1e-30).sqrt()[:, None]
        gains, u = subspace(lambda y, root=root, r=second: root * (r @ (root * y)), group[0], len(root), MOST, root)
        found[group[0]] = Directions(gains, (u * root).T, u / root, group)
    return found


def prices(found: Mapping[str, Directions], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Digital numbers of one direction of each input: B, V and the W V of every array; shapes: [out, in] or
    [E, out, in]."""
    return {
        leader: 2 * shapes[leader][-1] + sum(torch.Size(shapes[t][:-1]).numel() for t in at.tensors)
        for leader, at in found.items()
    }


def kept(
    found: Mapping[str, Directions], shapes: Mapping[str, tuple[int, ...]], budget: float, ranks: str = "loss"
) -> tuple[Directions, ...]:
    """The directions that take out most per digital number, while their numbers are at most the share `budget` of all
    weights of `shapes`; ranks: as of `romer.lowrank.spend`."""
    given = spend({name: at.gains for name, at in found.items()}, prices(found, shapes), shapes, budget, ranks)
    return tuple(found[name].first(rank) for name, rank in given)


def without(moments: Mapping[str, Moments], taken: Iterable[Directions]) -> dict[str, Moments]:
    """Moments of what arrays are left with, R of (1 - V B) x; one object where inputs are shared, as before."""
    left, changed = dict(moments), {}
    for at in taken:
        seen = moments[at.tensors[0]]
        second = at.rest(at.rest(seen.second).T)
        changed[id(seen.second)] = (second + second.T) / 2, at.rest(seen.mean)
    for name, seen in moments.items():
        if (new := changed.get(id(seen.second))) is not None:
            left[name] = Moments(*new, seen.tokens)
    return left


@dataclass(frozen=True)
class Projected:
    """A correction: arrays do not see the directions `taken` of their inputs, whose products are digital and exact."""

    taken: tuple[Directions, ...] = field(default=(), compare=False, repr=False)
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    reads_back = False

    def __post_init__(self):
        object.__setattr__(self, "ranks", tuple((at.tensors[0], len(at.gains)) for at in self.taken))
        object.__setattr__(self, "_of", {name: at for at in self.taken for name in at.tensors})

    def shared(self, name, clean, read):
        return None

    def __call__(self, name, clean, stored, read=None, shared=None):
        if (at := self._of.get(name.partition("[")[0])) is None:
            return stored.float(), None
        stored = stored.float()
        return stored - ((stored - clean.float()) @ at.onto) @ at.reads, None

    def numbers(self, name, outputs, inputs):
        if (at := self._of.get(name)) is None:
            return 0, 0
        rank = len(at.gains)
        return rank * outputs, 2 * rank * inputs if at.tensors[0] == name else 0
