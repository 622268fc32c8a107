"""No noise: the ceiling that every method is measured against."""

from romer.methods import Method, register

register(
    Method("clean", noisy=False, cells=1.0, defaults=lambda fitted: {}, routing=lambda fitted, options: (None, None))
)
