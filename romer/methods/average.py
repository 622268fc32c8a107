"""The mean of N independently programmed copies of every array: N times the cells, N times the products."""

from romer.encoding import Layout, Replicated
from romer.methods import Method, register

register(
    Method(
        "average",
        defaults=lambda fitted: {"copies": 2},
        layout=lambda model, fitted, o: Layout(Replicated(o["copies"])),
    )
)
