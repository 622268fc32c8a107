"""Expert replacement alone (eq. 7-9): the n coldest experts' slots hold copies of the n hottest; no further cells."""

from romer.methods import Fitted, Method, register
from romer.replacement import ReplacementPlan


def plan(fitted: Fitted, options) -> ReplacementPlan:
    """The replacement plan for n_replace and form (split | literal)."""
    return ReplacementPlan.fit(fitted.activation, options["n_replace"], options["replacement"])


def defaults(fitted: Fitted) -> dict:
    """n as fitted, form `split`."""
    return {"n_replace": fitted.n_replace, "replacement": "split"}


register(Method("romer_replacement", defaults=defaults, routing=lambda fitted, o: (plan(fitted, o), None)))
