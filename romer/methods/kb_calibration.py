"""k-b calibration: y ≈ k · ỹ + b behind every array (of experts: every slot), fitted on calibration text.

The paper's baseline fits one k and b a layer; `channel` fits them for each output.
"""

from romer.corrections import Affine
from romer.encoding import Layout
from romer.methods import Method, register

register(
    Method(
        "kb_calibration",
        defaults=lambda fitted: {"per": "layer"},
        layout=lambda model, fitted, o: Layout(correction=Affine(fitted.moments, o["per"])),
        learns=True,
    )
)
