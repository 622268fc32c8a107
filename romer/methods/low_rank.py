"""Low-rank digital paths that take out errors that were read back, with ranks where they are worth most."""

from collections.abc import Mapping

from torch import nn

from romer.corrections import Affine, Chain, share
from romer.encoding import PLAIN, Encoding, Layout
from romer.errors import InputError
from romer.lowrank import LowRank, allocate, spectra
from romer.methods import Fitted, Method, register
from romer.placement import analog_shapes
from romer.readback import READING, reading

LEAST_INPUTS = 128  # of an array whose outputs are scaled and shifted
DEFAULTS = {"budget": 0.02, "ranks": "loss", "refit": True} | READING


def paths(model: nn.Module, fitted: Fitted, budget: float, encoding: Encoding = PLAIN, ranks: str = "loss") -> LowRank:
    """Paths of `budget` digital numbers, a share of the analog weights. Where they go (`ranks`, see `allocate`) is
    decided on a realisation for calibration, once for all uses of `fitted`."""
    if fitted.noise is None:
        raise InputError("low-rank path: nothing is known of the noise that the ranks are for")
    known = fitted.known.get(("spectra", encoding)) if budget else {}
    if known is None:
        known = spectra(
            model, fitted.noise, fitted.realisation, fitted.placement, encoding, fitted.moments, fitted.sensitivity
        )
        fitted.known["spectra", encoding] = known
    shapes = analog_shapes(model, fitted.placement)
    return LowRank(fitted.moments, fitted.sensitivity, allocate(known, shapes, float(budget), ranks))


def layout(model: nn.Module, fitted: Fitted, o: Mapping, encoding: Encoding = PLAIN, affine: bool = False) -> Layout:
    """The paths behind an encoding and, with `affine`, a scale and offset of each output behind the paths, where an
    array has at least LEAST_INPUTS and the budget pays for all of them."""
    budget, step = float(o["budget"]), Affine(fitted.moments, "channel", LEAST_INPUTS)
    taken = share(step, model, fitted.placement) if affine else 0.0
    correction = paths(model, fitted, budget - taken if taken <= budget else budget, encoding, o["ranks"])
    if affine and taken <= budget:
        correction = Chain((correction, step))
    return Layout(encoding, correction=correction, refit=o["refit"], **reading(o))


register(
    Method(
        "low_rank",
        defaults=lambda fitted: dict(DEFAULTS),
        layout=layout,
        learns=True,
        correlations=True,
        weighs=True,
    )
)
