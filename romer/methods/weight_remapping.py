"""Spare cells for the most sensitive weights and, under conductance noise, the full range for every column."""

from romer.encoding import Layout, Remapped
from romer.methods import Method, register

register(
    Method(
        "weight_remapping",
        defaults=lambda fitted: {"spare": 0.05},
        layout=lambda model, fitted, o: Layout(Remapped(o["spare"], fitted.moments)),
        learns=True,
    )
)
