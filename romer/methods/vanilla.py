"""Noise and no mitigation: weights programmed plainly, one cell pair a weight."""

from romer.methods import Method, register

register(
    Method("vanilla", noisy=True, cells=1.0, defaults=lambda fitted: {}, routing=lambda fitted, options: (None, None))
)
