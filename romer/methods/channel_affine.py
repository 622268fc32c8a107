"""y = k ỹ + b for every output channel of every array, fitted on calibration text; Joshi et al. 2020
(DOI 10.1038/s41467-020-16108-9) correct batch normalisation likewise against drift."""

from romer.corrections import Affine
from romer.encoding import Layout
from romer.methods import Method, register
from romer.readback import READING, reading

register(
    Method(
        "channel_affine",
        defaults=lambda fitted: {"refit": True} | READING,
        layout=lambda model, fitted, o: Layout(
            correction=Affine(fitted.moments, "channel"), refit=o["refit"], **reading(o)
        ),
        learns=True,
    )
)
