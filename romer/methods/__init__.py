"""The methods that tables compare, one file each, by name.

    method = methods.get("romer")
    options = method.options(fitted, {"n_replace": 4})       # the rest as fitted
    plan, calibration = method.routing(fitted, options)

A new method is a new file here that calls `register`, and a file of the same name in conf/method.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from romer.errors import InputError
from romer.replacement import ReplacementPlan
from romer.routing import RouterCalibration


@dataclass(frozen=True)
class Fitted:
    """What was learned about a model at an operating point, on calibration text.

    activation [L, E]: eq. 6; n_replace, strength: the n of replacement and the λ of calibration chosen there.
    """

    activation: torch.Tensor
    n_replace: int
    strength: float


Routing = tuple[ReplacementPlan | None, RouterCalibration | None]


@dataclass(frozen=True)
class Method:
    """name; noisy: whether the arrays are; cells: multiple of the plain layout; defaults: options that a caller
    leaves out, from what was fitted; routing: the replacement plan and router calibration for complete options."""

    name: str
    noisy: bool
    cells: float
    defaults: Callable[[Fitted], dict]
    routing: Callable[[Fitted, Mapping], Routing]

    def options(self, fitted: Fitted, given: Mapping) -> dict:
        """All options of a point: the given ones, the rest from what was fitted. Raises InputError for unknown ones."""
        known = self.defaults(fitted)
        if unknown := sorted(set(given) - set(known)):
            raise InputError(
                f"method {self.name}: unknown option {unknown[0]!r}, expected {', '.join(known) or 'none'}"
            )
        return known | dict(given)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method to the registry."""
    _METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The method of that name. Raises InputError that names what exists."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in _METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(sorted(_METHODS))}")
    return _METHODS[name]
