"""Weights in slices of few bits on an array each, added up with shifts; sign-magnitude or offset-binary."""

from romer.encoding import Layout, Sliced
from romer.methods import Method, register

register(
    Method(
        "bit_slicing",
        defaults=lambda fitted: {"bits": 8, "bits_per_cell": 1, "slicing": "sign-magnitude"},
        layout=lambda model, fitted, o: Layout(Sliced(o["bits"], o["bits_per_cell"], o["slicing"])),
    )
)
