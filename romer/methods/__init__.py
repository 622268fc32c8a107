"""The methods that tables compare, one file each, by name.

    method = methods.get("romer")
    options = method.options(fitted, {"n_replace": 4})       # the rest as fitted
    plan, calibration = method.routing(fitted, options)

A new method is a new file here that calls `register`, and a file of the same name in conf/method.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from romer.encoding import Layout
from romer.errors import InputError
from romer.moments import Moments
from romer.noise import NoiseModel
from romer.placement import Placement
from romer.replacement import ReplacementPlan
from romer.routing import RouterCalibration


@dataclass(frozen=True)
class Fitted:
    """What was learned about a model at an operating point, on calibration text.

    activation [L, E]: eq. 6; n_replace, strength: the n of replacement and the λ of calibration chosen there; counts
    [L, E]: tokens that chose the expert; moments: of every array's inputs, by name, for methods that learn from them;
    sensitivity: of the loss to every output, by tensor, for methods that weigh errors; these also see the operating
    point's noise on one realisation that no report shows; expert_noise, expert_absence [L, E]: what the noise of an
    expert and what its absence are expected to cost, where experts are analog. known: what methods have
    worked out from all this.
    """

    activation: torch.Tensor
    n_replace: int
    strength: float
    counts: torch.Tensor | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    sensitivity: Mapping[str, torch.Tensor] = field(default_factory=dict)
    noise: NoiseModel | None = None
    placement: Placement = Placement()
    realisation: int = 0
    expert_noise: torch.Tensor | None = None
    expert_absence: torch.Tensor | None = None
    known: dict = field(default_factory=dict, compare=False, repr=False)


Routing = tuple[ReplacementPlan | None, RouterCalibration | None]


@dataclass(frozen=True)
class Method:
    """What a row of the tables is.

    noisy: whether the arrays are. For complete options: defaults, those that a caller leaves out, from what was fitted;
    routing, the replacement plan and router calibration; layout, how the model's weights sit on arrays; placement, what
    it makes of the run's placement. learns: whether the layout needs `Fitted.moments`; correlations:
    whether it follows how inputs are correlated, which takes more text; weighs: whether it needs `Fitted.sensitivity`
    and the noise, too.
    """

    name: str
    noisy: bool = True
    defaults: Callable[[Fitted], dict] = lambda fitted: {}
    routing: Callable[[Fitted, Mapping], Routing] = lambda fitted, options: (None, None)
    layout: Callable[[nn.Module, Fitted, Mapping], Layout] = lambda model, fitted, options: Layout()
    placement: Callable[[Placement], Placement] = lambda placement: placement
    learns: bool = False
    correlations: bool = False
    weighs: bool = False

    def options(self, fitted: Fitted, given: Mapping) -> dict:
        """All options of a point: the given ones, the rest from what was fitted. Raises InputError for unknown ones
        and for values of another type than the fitted ones (an int serves as a float)."""
        known = self.defaults(fitted)
        if unknown := sorted(set(given) - set(known)):
            raise InputError(
                f"method {self.name}: unknown option {unknown[0]!r}, expected {', '.join(known) or 'none'}"
            )
        for name, value in given.items():
            kind = type(known[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InputError(f"method {self.name}: {name}: found {value!r}, expected {kind.__name__}")
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
