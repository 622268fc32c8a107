"""The largest weights of every output, computed digitally: what is left on the arrays has a smaller range, and with it
smaller errors.

    found = gains(model, noise, realisation, placement, moments, sensitivity)
    counts = spend(found, prices(shapes), shapes, budget)
    layout = Layout(Clipped(PLAIN, counts), correction=Outliers(counts))    # y ≈ W̃ x + S x, S = W - clamp(W, -c, c)

Where cells err by a share of their range, an output whose largest weight is cut from w_max to c errs by c / w_max of
what it did, all of it, not that of the largest weights alone. Weights of language models have few that stand out: the
sparse rest S costs little (Dettmers et al. 2023, SpQR, arXiv:2306.03078; Kim et al. 2023, SqueezeLLM, arXiv:2306.07629,
against rounding errors). It is known exactly; nothing is read back for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from romer.encoding import PLAIN, Encoding, realise
from romer.moments import Moments
from romer.noise import Draws, NoiseModel
from romer.placement import Placement, coverage
from romer.sensitivity import expected

LEVELS = (1, 2, 4, 8, 16)  # outliers of an output at which gains are found; in between they are spread evenly
MOST_SHARE = 1 / 16  # of an output's weights
Counts = tuple[tuple[str, int], ...]  # (tensor, outliers of each of its outputs)


def clipped(weight: torch.Tensor, count: int) -> torch.Tensor:
    """weight [..., in] with the `count` largest |w| of every output cut to the next one: float32."""
    weight = weight.float()
    top = weight.abs().topk(count + 1, dim=-1).values[..., -1:]
    return weight.clamp(-top, top)


@dataclass(frozen=True)
class Clipped:
    """encoding: of what is left of the weights on arrays; counts: of tensors that have outliers."""

    encoding: Encoding = PLAIN
    counts: Counts = ()

    def __post_init__(self):
        object.__setattr__(self, "_counts", dict(self.counts))

    @property
    def cells(self) -> float:
        return self.encoding.cells

    @property
    def products(self) -> float:
        return self.encoding.products

    def held(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """What is left of the weights [..., out, in] of a tensor, or of an expert slot, on its arrays: float32."""
        count = self._counts.get(name.partition("[")[0], 0)
        return clipped(values, count) if count else values.float()

    def store(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The values [out, in] as they act, with their outliers, float32."""
        held = self.held(draws.tensor, values)
        return self.encoding.store(noise, held, draws) + (values.float() - held)

    def store_slots(self, noise: NoiseModel, values: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
        """The values [E, out, in] of the slots of a fused tensor, likewise."""
        if not hasattr(self.encoding, "store_slots"):
            return torch.stack([self.store(noise, w, d) for w, d in zip(values, draws, strict=True)])
        held = self.held(draws[0].tensor, values)
        return self.encoding.store_slots(noise, held, draws) + (values.float() - held)

    def known(self, noise: NoiseModel, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the cells are known to hold before the array is read, float32 [out, in]."""
        return self.encoding.known(noise, self.held(draws.tensor, values), draws)


@dataclass(frozen=True)
class Outliers:
    """The digital part of `Clipped`, which needs no reading: a value and a place for each outlier."""

    counts: Counts = ()

    reads_back = False

    def __post_init__(self):
        object.__setattr__(self, "_counts", dict(self.counts))

    def shared(self, name, clean, read):
        return None

    def __call__(self, name, clean, stored, read=None, shared=None):
        return stored.float(), None

    def numbers(self, name, outputs, inputs):
        return 2 * outputs * self._counts.get(name, 0), 0


def prices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Digital numbers of one outlier of each output: its value and its place; shapes: [out, in] or [E, out, in]."""
    return {name: 2 * torch.Size(shape[:-1]).numel() for name, shape in shapes.items()}


@torch.no_grad()
def gains(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int,
    placement: Placement,
    moments: Mapping[str, Moments],
    sensitivity: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What every further outlier of each output takes out of the expected loss, falling, [r] by analog tensor, on one
    realisation (one that is for calibration) of plain arrays. Raises InputError for a tensor without moments."""
    found = {}
    for row in coverage(model, placement):
        if row.analog:
            name, weight = row.parameter, model.get_parameter(row.parameter).float()
            levels = [0, *(level for level in LEVELS if level <= MOST_SHARE * weight.shape[-1])]
            held = (clipped(weight, level) if level else weight for level in levels)
            errors = (realise(PLAIN, noise, name, w, realisation) - w for w in held)
            losses = [expected(name, error, moments, sensitivity).sum().item() for error in errors]
            each = [(a - b) / (n - m) for (a, m), (b, n) in pairwise(zip(losses, levels, strict=True))]
            steps = torch.tensor([n - m for m, n in pairwise(levels)])
            each = torch.tensor(each).repeat_interleave(steps)
            found[name] = each.cummin(0).values.clamp(min=0)
    return found
