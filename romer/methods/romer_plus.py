"""Low-rank paths on what compensated programming leaves (`block` 0: on plain arrays) and, where calibration text says
so, a scale and offset of each output and the paper's replacement: cells as the plain layout has, a small digital share,
nothing trained."""

from collections.abc import Mapping

from torch import nn

from romer.encoding import PLAIN, Layout
from romer.methods import Fitted, Method, Routing, compensated_programming, low_rank, register, romer_replacement


def layout(model: nn.Module, fitted: Fitted, o: Mapping) -> Layout:
    """Every block is read back while it is programmed, and the finished array once more."""
    encoding = compensated_programming.encoding(fitted, o) if o["block"] else PLAIN
    return low_rank.layout(model, fitted, o, encoding, o["affine"])


def routing(fitted: Fitted, o: Mapping) -> Routing:
    """The paper's replacement, by a copy that shares its tokens (`split`), where n_replace > 0."""
    plan = romer_replacement.plan(fitted, {"replacement": "split"} | o) if o["n_replace"] else None
    return plan, None


register(
    Method(
        "romer_plus",
        defaults=lambda fitted: low_rank.DEFAULTS | {"block": 32, "affine": False, "n_replace": 0},
        layout=layout,
        routing=routing,
        learns=True,
        weighs=True,
    )
)
