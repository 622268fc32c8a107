"""Noise and no mitigation: weights programmed plainly, one cell pair a weight."""

from romer.methods import Method, register

register(Method("vanilla"))
