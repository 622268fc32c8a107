"""The paper's method: expert replacement and router calibration together (eq. 7-12); no further cells."""

from romer.methods import Method, register, romer_calibration, romer_replacement

register(
    Method(
        "romer",
        defaults=lambda fitted: romer_replacement.defaults(fitted) | romer_calibration.defaults(fitted),
        routing=lambda fitted, o: (romer_replacement.plan(fitted, o), romer_calibration.calibration(o)),
    )
)
