"""A checkable claim of the ROMER paper (arXiv:2605.11800) and the rules by which one is decided.

    table1 = Statements("published")

    @table1.states("romer-best-table1", "ROMER is best everywhere.", "table 1", "cells in which it is lowest")
    def romer_best():
        return Finding(tally(supports=3, contradicts=1, total=4), "lost on olmoe", published=4, found=3)

    table1.claims()                                  # [Claim(id="romer-best-table1", verdict="holds in part", ...)]

The statements are in the modules `claims_*`; `claims` puts them together.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from romer.errors import InputError

HOLDS, IN_PART, DOES_NOT_HOLD, UNDECIDED = VERDICTS = (
    "holds",
    "holds in part",
    "does not hold",
    "cannot be decided here",
)
# What a verdict rests on: the paper's printed numbers alone; its equations, evaluated; models run by this project.
BASES = ("published", "computed", "measured")


@dataclass(frozen=True)
class Finding:
    """What was found on a claim.

    reason: one line; published: the number that the paper states for the claim's quantity; found: what its tables, its
    equations or the measurement give; low, high: 95 % bootstrap interval of `found` over realisations of the noise;
    realisations: how many. Numbers that do not exist are NaN (0 realisations).
    """

    verdict: str
    reason: str
    published: float = math.nan
    found: float = math.nan
    low: float = math.nan
    high: float = math.nan
    realisations: int = 0


NOT_MEASURED = Finding(UNDECIDED, "not measured in this run")


@dataclass(frozen=True)
class Claim:
    """One line of the ledger: a statement of the paper or of its referee's report, and what was found on it.

    id: a slug; claim: the statement in our words; where: section, table or figure; quantity: what decides; basis: one
    of BASES; the rest as in `Finding`. Raises InputError for an unknown basis or verdict, an id that is no slug, or a
    reason of several lines.
    """

    id: str
    claim: str
    where: str
    quantity: str
    basis: str
    published: float
    found: float
    low: float
    high: float
    realisations: int
    verdict: str
    reason: str

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise InputError(f"claim id: found {self.id!r}, expected lower-case words joined by hyphens")
        for name, known in (("basis", BASES), ("verdict", VERDICTS)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"claim {self.id}: {name} {value!r}, expected one of {', '.join(known)}")
        if "\n" in self.reason:
            raise InputError(f"claim {self.id}: the reason has several lines, expected one")


class Statements:
    """The statements of one module, each with the function that decides it; `claims(*evidence)` decides all."""

    def __init__(self, basis: str):
        self.basis, self.decided = basis, []

    def states(self, id: str, claim: str, where: str, quantity: str) -> Callable:
        """Registers the decorated function, which takes the evidence and returns a `Finding`."""

        def register(find: Callable[..., Finding]) -> Callable[..., Finding]:
            self.decided.append((id, claim, where, quantity, find))
            return find

        return register

    def claims(self, *evidence) -> list[Claim]:
        """The decided claims, in the order of their definition."""
        return [
            Claim(id, claim, where, quantity, self.basis, **_numbers(find(*evidence)))
            for id, claim, where, quantity, find in self.decided
        ]


def _numbers(finding: Finding) -> dict:
    """Plain Python numbers, whatever the finding was computed with."""
    values = asdict(finding)
    return values | {key: float(values[key]) for key in ("published", "found", "low", "high")}


def tally(supports: int, contradicts: int, total: int) -> str:
    """The verdict on a statement about `total` cases.

    It holds where all cases support it; does not hold where more contradict than support it; holds in part where some
    support it and no more contradict; cannot be decided where no case says anything. A case that was not measured, or
    whose interval includes zero, neither supports nor contradicts.
    """
    if total and supports == total:
        return HOLDS
    if contradicts > supports:
        return DOES_NOT_HOLD
    return IN_PART if supports else UNDECIDED


def of_all(supports: int, total: int) -> str:
    """`tally` where every case either supports or contradicts the statement."""
    return tally(int(supports), int(total - supports), total)


def inside(low: float, high: float, bounds: tuple[float, float]) -> str:
    """The verdict on the statement that a quantity lies within `bounds`, from the interval of its measurement.

    It holds where the interval lies inside, does not hold where it lies outside, and cannot be decided where it
    straddles a bound or does not exist (NaN).
    """
    if bounds[0] <= low and high <= bounds[1]:
        return HOLDS
    return DOES_NOT_HOLD if high < bounds[0] or low > bounds[1] else UNDECIDED


def counts(claims: Iterable[Claim]) -> dict[str, int]:
    """How often each verdict was given, in the order of VERDICTS, zeros included."""
    given = [c.verdict for c in claims]
    return {verdict: given.count(verdict) for verdict in VERDICTS}


def agree(stated: Sequence[float], found: Sequence[float], decimals: int) -> int:
    """How many stated numbers are the found ones, rounded as the paper rounds."""
    half = 0.5 * 10**-decimals + 1e-9
    return sum(abs(s - f) <= half for s, f in zip(stated, found, strict=True))


def span(values: Iterable[float], decimals: int = 2) -> str:
    """`smallest to largest`, for a reason."""
    values = list(values)
    return f"{min(values):.{decimals}f} to {max(values):.{decimals}f}"
