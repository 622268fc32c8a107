"""Compensated programming: errors of what is written are made up for in what is still to be written."""

from romer.compensation import Compensated
from romer.encoding import Layout
from romer.methods import Method, register

register(
    Method(
        "compensated_programming",
        defaults=lambda fitted: {"block": 32, "read_error": 0.0},
        layout=lambda model, fitted, o: Layout(Compensated(fitted.moments, o["block"], float(o["read_error"]))),
        learns=True,
    )
)
