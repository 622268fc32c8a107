"""No noise: the ceiling that every method is measured against."""

from romer.methods import Method, register

register(Method("clean", noisy=False))
