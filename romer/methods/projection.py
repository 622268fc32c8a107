"""Strong directions of every input kept off the arrays, and computed digitally: nothing is read back."""

from torch import nn

from romer.encoding import Layout
from romer.errors import InputError
from romer.methods import Fitted, Method, register
from romer.placement import analog_shapes
from romer.projection import Projected, directions, kept

DEFAULTS = {"budget": 0.02, "ranks": "loss"}


def projected(model: nn.Module, fitted: Fitted, budget: float, ranks: str = "loss") -> Projected:
    """Directions of `budget` digital numbers, a share of the analog weights. Which ones is decided on a realisation for
    calibration, once for all uses of `fitted`."""
    if fitted.noise is None:
        raise InputError("projection: nothing is known of the noise that directions are chosen for")
    if (found := fitted.known.get("directions")) is None:
        at = fitted.noise, fitted.realisation, fitted.placement, fitted.moments, fitted.sensitivity
        found = fitted.known["directions"] = directions(model, *at)
    return Projected(kept(found, analog_shapes(model, fitted.placement), float(budget), ranks))


register(
    Method(
        "projection",
        defaults=lambda fitted: dict(DEFAULTS),
        layout=lambda model, fitted, o: Layout(correction=projected(model, fitted, o["budget"], o["ranks"])),
        learns=True,
        correlations=True,
        weighs=True,
    )
)
