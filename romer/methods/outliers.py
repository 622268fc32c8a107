"""The largest weights of every output computed digitally, so that those on the arrays have a smaller range."""

from torch import nn

from romer.encoding import PLAIN, Layout
from romer.errors import InputError
from romer.lowrank import spend
from romer.methods import Fitted, Method, register
from romer.outliers import Clipped, Counts, Outliers, gains, prices
from romer.placement import analog_shapes

DEFAULTS = {"budget": 0.02, "ranks": "loss"}


def counts(model: nn.Module, fitted: Fitted, budget: float, ranks: str = "loss") -> Counts:
    """How many outliers of each output are kept, for `budget` digital numbers, a share of the analog weights. Where is
    decided on a realisation for calibration, once for all uses of `fitted`."""
    if fitted.noise is None:
        raise InputError("outliers: nothing is known of the noise that they are chosen for")
    if (found := fitted.known.get("outliers")) is None:
        at = fitted.noise, fitted.realisation, fitted.placement, fitted.moments, fitted.sensitivity
        found = fitted.known["outliers"] = gains(model, *at)
    shapes = analog_shapes(model, fitted.placement)
    return spend(found, prices(shapes), shapes, float(budget), ranks)


def layout(model: nn.Module, fitted: Fitted, budget: float, ranks: str) -> Layout:
    """The plain layout without them, and they beside it."""
    kept = counts(model, fitted, budget, ranks)
    return Layout(Clipped(PLAIN, kept), correction=Outliers(kept)) if kept else Layout()


register(
    Method(
        "outliers",
        defaults=lambda fitted: dict(DEFAULTS),
        layout=lambda model, fitted, o: layout(model, fitted, o["budget"], o["ranks"]),
        learns=True,
        correlations=True,
        weighs=True,
    )
)
