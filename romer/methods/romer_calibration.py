"""Router calibration alone (eq. 10-12): logits compressed by their interquartile range; digital, no cells."""

from romer.methods import Fitted, Method, register
from romer.routing import RouterCalibration


def calibration(options) -> RouterCalibration:
    """The router calibration for kind and strength."""
    return RouterCalibration(options["calibration"], options["strength"])


def defaults(fitted: Fitted) -> dict:
    """λ as fitted, kind `iqr`."""
    return {"strength": fitted.strength, "calibration": "iqr"}


register(Method("romer_calibration", defaults=defaults, routing=lambda fitted, o: (None, calibration(o))))
