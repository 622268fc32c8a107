"""The largest weights kept off the arrays (`outliers`, their share of the budget), strong input directions likewise
(`projected`, their share of what is left), low-rank paths on what compensated programming leaves (`block` 0: on plain
arrays) and, where it pays, a scale and offset of each output and copies of experts: cells as the plain layout has, a
small digital share, nothing trained."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from romer.corrections import Chain, links
from romer.encoding import PLAIN, Layout
from romer.errors import InputError
from romer.lowrank import LowRank
from romer.methods import Fitted, Method, Routing, compensated_programming, low_rank, outliers, register
from romer.methods.projection import projected
from romer.outliers import Clipped, Outliers
from romer.projection import Projected, without
from romer.replacement import ReplacementPlan

DEFAULTS = {"outliers": 0.0, "projected": 0.5, "block": 32, "affine": False, "n_replace": 0}


def layout(model: nn.Module, fitted: Fitted, o: Mapping) -> Layout:
    """Every block is read back while it is programmed, and the finished array once more. What is projected comes last:
    the other corrections are those of what arrays return, and its products are exact."""
    for name in ("outliers", "projected"):
        if not 0 <= o[name] <= 1:
            raise InputError(f"romer_plus: {name}: found {o[name]}, expected 0 ≤ share of the budget ≤ 1")
    kept = outliers.counts(model, fitted, o["outliers"] * o["budget"], o["ranks"]) if o["outliers"] else ()
    budget, share = float(o["budget"]) * (1 - o["outliers"]), float(o["projected"])
    first = projected(model, fitted, share * budget, o["ranks"])
    left = replace(fitted, moments=without(fitted.moments, first.taken), known=_known(fitted, first.ranks))
    encoding = compensated_programming.encoding(left, o) if o["block"] else PLAIN
    encoding = Clipped(encoding, kept) if kept else encoding
    rest = low_rank.layout(model, left, o | {"budget": (1 - share) * budget}, encoding, o["affine"])
    steps = (*links(rest.correction), first, *((Outliers(kept),) if kept else ()))
    steps = tuple(step for step in steps if not isinstance(step, Projected | LowRank) or step.ranks)
    return replace(rest, correction=Chain(steps) if len(steps) > 1 else steps[0] if steps else None)


def _known(fitted: Fitted, ranks: tuple[tuple[str, int], ...]) -> dict:
    """What was worked out for what arrays are left with behind these directions."""
    return fitted.known.setdefault(("behind", ranks), {}) if ranks else fitted.known


def routing(fitted: Fitted, o: Mapping) -> Routing:
    """At most n_replace experts of a layer are copied, where the expected loss says that it pays."""
    if not o["n_replace"]:
        return None, None
    if fitted.expert_noise is None:
        raise InputError("romer_plus: n_replace: nothing is known of what experts' noise costs")
    return ReplacementPlan.trade(fitted.expert_noise, fitted.expert_absence, o["n_replace"]), None


register(
    Method(
        "romer_plus",
        defaults=lambda fitted: low_rank.DEFAULTS | DEFAULTS,
        layout=layout,
        routing=routing,
        learns=True,
        correlations=True,
        weighs=True,
    )
)
