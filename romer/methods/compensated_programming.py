"""Compensated programming: errors of what is written are made up for in what is still to be written."""

from collections.abc import Mapping

from romer.compensation import Compensated
from romer.encoding import Layout
from romer.methods import Fitted, Method, register
from romer.readback import READING, reading

LEAST_BLOCKS = 4  # of an array: experts of few inputs gain from it, too


def encoding(fitted: Fitted, o: Mapping) -> Compensated:
    """As `Compensated`, with the moments of calibration text."""
    return Compensated(fitted.moments, o["block"], least_blocks=LEAST_BLOCKS, **reading(o))


register(
    Method(
        "compensated_programming",
        defaults=lambda fitted: {"block": 32} | READING,
        layout=lambda model, fitted, o: Layout(encoding(fitted, o)),
        learns=True,
        correlations=True,
    )
)
