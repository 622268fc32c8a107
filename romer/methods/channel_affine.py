"""y = k ỹ + b for every output channel of every array, fitted on calibration text; Joshi et al. 2020
(DOI 10.1038/s41467-020-16108-9) correct batch normalisation likewise against drift."""

from romer.corrections import Affine
from romer.encoding import Layout
from romer.methods import Method, register

register(
    Method(
        "channel_affine",
        defaults=lambda fitted: {"read_error": 0.0, "refit": True},
        layout=lambda model, fitted, o: Layout(
            correction=Affine(fitted.moments, "channel"), refit=o["refit"], read_error=float(o["read_error"])
        ),
        learns=True,
    )
)
