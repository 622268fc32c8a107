"""Low-rank digital paths beside the arrays, which take out what their errors do to the inputs that occur.

    ranks = allocate(spectra(model, noise, fitted...), shapes, budget)  # where rank is worth most
    layout = Layout(correction=LowRank(moments, sensitivity, ranks))    # y ≈ ỹ - A (B x)

An array that acts as W + Δ costs E‖Δ x‖² = tr(Δ R Δᵀ), R = E[x xᵀ]. Of all paths of rank r the one onto the leading
left singular vectors of Δ R^½ takes out most of it, as LQER (Zhang et al. 2024, arXiv:2402.02446) and QERA (Zhang et
al. 2024, arXiv:2410.06040) do for quantisation errors; here Δ is the programmed error, known from reading the array
back. Outputs weigh by how much the model's loss depends on them (`romer.sensitivity`). Fused experts get one path a
tensor: those that read the same input share B, those that are summed share A, so small experts do not pay for it each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from romer.encoding import Encoding, realise
from romer.errors import InputError
from romer.moments import Moments, of, together
from romer.noise import NoiseModel, generator, slot_name
from romer.placement import Placement, coverage

ITERATIONS, EXTRA = 3, 4  # of the subspace iteration, and its columns beyond the rank
PRIOR_TOKENS = 64  # an expert's path weighs as its tokens, no path as this many
MOST = 48  # rank of one path
RANKS = ("loss", "uniform")


@dataclass(frozen=True)
class Path:
    """One factor of a tensor's path; each array's other factor follows from its own error.

    onto [out, r]: orthonormal outputs, the path of an array is onto ontoᵀ Δ; or seen [in, r] = R Bᵀ and reads [r, in] =
    B with B R Bᵀ = 1, the path is (Δ seen) reads.
    """

    onto: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    reads: torch.Tensor | None = None

    def of(self, error: torch.Tensor) -> torch.Tensor:
        """The part of an array's error [out, in] that the path takes out."""
        return self.onto @ (self.onto.T @ error) if self.onto is not None else (error @ self.seen) @ self.reads


@dataclass(frozen=True)
class LowRank:
    """moments: of the inputs of each array; sensitivity: [out], or [E, out] of experts, by tensor, 1 where a tensor is
    not in it; ranks: (tensor, rank) of the paths; other tensors have none."""

    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    sensitivity: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    ranks: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "_ranks", dict(self.ranks))

    def shared(self, name, clean, read):
        if not (rank := self._ranks.get(name, 0)):
            return None
        return leading(name, read.float() - clean.float(), self.moments, self.sensitivity.get(name), rank)[1]

    def __call__(self, name, clean, stored, read=None, shared=None):
        if shared is None:
            return stored.float(), None
        read = stored if read is None else read
        tokens = of(self.moments, name).tokens
        trust = tokens / (tokens + PRIOR_TOKENS)
        return stored.float() - trust * shared.of(read.float() - clean.float()), None

    def numbers(self, name, outputs, inputs):
        rank = self._ranks.get(name, 0)
        return (rank * inputs, rank * outputs) if sums_slots(name) else (rank * outputs, rank * inputs)


def sums_slots(name: str) -> bool:
    """Whether the outputs of a tensor's slots are summed, so that they share the outputs of a path."""
    return name.endswith(".experts.down_proj")


def leading(
    name: str,
    error: torch.Tensor,
    moments: Mapping[str, Moments],
    sensitivity: torch.Tensor | None,
    rank: int,
) -> tuple[torch.Tensor, Path]:
    """(what each direction takes out of the weighted error energy, falling [r]; the path) of one tensor.

    error: float32 [out, in], or [E, out, in]; r is `rank` or what the tensor allows. Raises InputError for a tensor
    without moments.
    """
    error = error if error.dim() == 3 else error[None]
    slots = [of(moments, slot_name(name, i)) for i in range(len(error))]
    if None in slots:
        raise InputError(f"low-rank path: no calibration inputs of {name}")
    weight = torch.ones(error.shape[:2]) if sensitivity is None else sensitivity.reshape(error.shape[:2])
    weight = weight.to(error)
    if sums_slots(name):
        weights = weight.mean(1)  # of all outputs of an expert
        if (seen := together(moments, name)) is not None:
            side, second = error.transpose(0, 1).flatten(1), seen.second.to(error)
            side = side * (weights @ torch.stack([m.power.sum() for m in slots]).to(error) / second.trace()).sqrt()

            def energy(y):  # γ Σ_ef Δ_e R_ef Δ_fᵀ y
                return side @ (second @ (side.T @ y))

        else:
            weighted = error * weights.sqrt()[:, None, None]
            second = torch.stack([m.second for m in slots]).to(error)

            def energy(y):  # Σ_e γ_e Δ_e R_e Δ_eᵀ y
                return (weighted @ (second @ (weighted.transpose(1, 2) @ y))).sum(0)

        values, onto = subspace(energy, name, error.shape[1], rank, error)
        return values, Path(onto=onto)
    x, second = (error * weight.sqrt()[..., None]).flatten(0, 1), slots[0].second.to(error)  # [E out, in]
    values, left = subspace(lambda y: x @ (second @ (x.T @ y)), name, len(x), min(rank, x.shape[1]), error)
    reads = left.T @ x
    power = reads @ second @ reads.T
    powers, turn = torch.linalg.eigh((power + power.T) / 2)
    floor = 1e-6 * powers.max() + 1e-30  # a direction without inputs is not blown up
    reads = (turn / powers.clamp(min=floor).sqrt()).T @ reads
    return values, Path(seen=second @ reads.T, reads=reads)


def subspace(
    energy: Callable[[torch.Tensor], torch.Tensor], name: str, size: int, rank: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [r], falling, and eigenvectors [size, r] of a symmetric operator, `energy` of a block of vectors, by
    subspace iteration from a start that the name decides; r is `rank` or `size`."""
    columns = min(rank + EXTRA, size)
    start = generator(0, 0, name, 0, "subspace").standard_normal((size, columns), "float32")
    q = torch.linalg.qr(torch.from_numpy(start).to(like)).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(energy(q)).Q
    inner = q.T @ energy(q)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    r = min(rank, size)
    return values.flip(0)[:r].clamp(min=0), (q @ vectors.flip(1))[:, :r]


@torch.no_grad()
def spectra(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int,
    placement: Placement,
    encoding: Encoding,
    moments: Mapping[str, Moments],
    sensitivity: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What every further rank takes out of the expected loss, [r] by analog tensor, on one realisation (one that is
    for calibration) of the clean model's arrays."""
    found = {}
    for row in coverage(model, placement):
        if row.analog:
            name, weight = row.parameter, model.get_parameter(row.parameter)
            error = realise(encoding, noise, name, weight, realisation).float() - weight.float()
            found[name] = leading(name, error, moments, sensitivity.get(name), MOST)[0]
    return found


def allocate(
    spectra: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], budget: float, ranks: str = "loss"
) -> tuple[tuple[str, int], ...]:
    """(tensor, rank) of the paths that take out most per digital number, while their numbers are at most the share
    `budget` of all weights of `shapes`, [out, in] or [E, out, in]; with ranks `uniform` of paths of one rank, what is
    left over for a further one going to the first tensors.

    Each tensor's gains fall with its rank, so taking the best ratio first is the best that rounding allows.
    """
    prices = {}
    for name, shape in shapes.items():
        slots, outputs, inputs = shape if len(shape) == 3 else (1, *shape)
        prices[name] = slots * inputs + outputs if sums_slots(name) else slots * outputs + inputs
    return spend(spectra, prices, shapes, budget, ranks)


def spend(
    gains: Mapping[str, torch.Tensor],
    prices: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    budget: float,
    ranks: str = "loss",
) -> tuple[tuple[str, int], ...]:
    """(name, rank) of what takes out most per digital number, `gains` [r] for `prices` each; shapes, budget, ranks: as
    of `allocate`. Raises InputError for a budget that is no share and for ranks of another name."""
    if not 0 <= budget <= 1:
        raise InputError(f"budget: found {budget!r}, expected 0 ≤ share ≤ 1")
    if ranks not in RANKS:
        raise InputError(f"ranks: found {ranks!r}, expected one of {', '.join(RANKS)}")
    offers = [
        (-gain / prices[name] if ranks == "loss" else further, name)
        for name, each in gains.items()
        for further, gain in enumerate(each.tolist())
        if gain > 0
    ]
    left = budget * sum(torch.Size(shape).numel() for shape in shapes.values())
    given = dict.fromkeys(gains, 0)
    for _, name in sorted(offers):
        if prices[name] <= left:
            left -= prices[name]
            given[name] += 1
    return tuple((name, rank) for name, rank in given.items() if rank)
