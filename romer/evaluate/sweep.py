"""Measures many points of one model at one operating point, programming every realisation once.

    for point, value in sweep(model, points, fitted, noise, placement, measure):
        ...

Points that differ only in routing share the programmed arrays: the same realisation is the same noise for every
method, so methods are compared in pairs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import nn

from romer import methods
from romer.errors import InputError
from romer.noise import CLEAN, NoiseModel
from romer.placement import Placement
from romer.programming import check_converted, program
from romer.routing import apply


@dataclass(frozen=True)
class Point:
    """One measurement: a method with complete options, on one realisation of the noise (CLEAN where the method has
    none)."""

    method: str
    realisation: int
    options: dict = field(default_factory=dict)

    def __hash__(self):
        return hash((self.method, self.realisation, *sorted(self.options.items())))

    @property
    def key(self) -> dict:
        """Plain JSON that identifies the point within its job."""
        return {"method": self.method, "options": self.options, "realisation": self.realisation}


def points(fitted: methods.Fitted, wanted: Iterable[tuple[str, dict]], realisations: Iterable[int]) -> list[Point]:
    """Every wanted (method, options) on every realisation, a clean method once; in the order of realisations."""
    listed = [(methods.get(name), options) for name, options in wanted]
    clean = [Point(m.name, CLEAN, m.options(fitted, o)) for m, o in listed if not m.noisy]
    return clean + [Point(m.name, r, m.options(fitted, o)) for r in realisations for m, o in listed if m.noisy]


def sweep(
    model: nn.Module,
    todo: Iterable[Point],
    fitted: methods.Fitted,
    noise: NoiseModel,
    placement: Placement,
    measure: Callable[[], float],
) -> Iterator[tuple[Point, float]]:
    """(point, measure()) for every point, with the arrays programmed and the routing rewritten as the point says.

    Points on the same realisation, placement and layout share one programming. Raises InputError, naming the point,
    when its value is not finite.
    """
    groups: dict[tuple, list[Point]] = {}
    for point in sorted(todo, key=lambda p: p.realisation):
        method = methods.get(point.method)
        how = (method.placement(placement), method.layout(model, fitted, point.options)) if method.noisy else ()
        if how:
            try:
                check_converted(noise, how[1])  # before anything is measured
            except InputError as error:
                raise InputError(f"method {point.method}: {error}") from None
        groups.setdefault((point.realisation, *how), []).append(point)
    for (realisation, *how), group in groups.items():
        with program(model, noise, realisation, *how) if how else nullcontext():
            for point in group:
                plan, calibration = methods.get(point.method).routing(fitted, point.options)
                with apply(model, plan, calibration):
                    try:
                        value = measure()
                        if not math.isfinite(value):
                            raise FloatingPointError(f"value is {value}")
                    except FloatingPointError as error:
                        raise InputError(f"point {point.key}: {error}") from None
                yield point, value
