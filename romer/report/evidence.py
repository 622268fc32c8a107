"""Measured perplexities, by point, and the rule by which pairs of them decide a statement.

    evidence = Evidence(records)
    at = Point("table1", "olmoe", 80.0)
    case = Case(at.label, (difference(evidence.losses("ppl:heldout", at, "romer"), evidence.losses(..., "vanilla")),))
    judge([case], total=8)                # Finding: lower in all eight operating points?

`records` are long-format rows (the columns of `romer.report.tables.RECORD`). Everything is compared as ln(perplexity),
the mean loss per token, realisation by realisation.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.noise import CLEAN
from romer.report.claim import NOT_MEASURED, Finding, tally
from romer.report.tables import METRIC, RECORD
from romer.statistics import ALPHA, holm, mean_interval, paired

# Without a noise draw there is no interval over draws: a loss that moves by more than this (nats) counts as changed.
EXACT_TOLERANCE = 1e-3
# Which variant of the paper's method a row must be, where a run has several.
VARIANT = {"replacement": "split", "calibration": "iqr"}


@dataclass(frozen=True)
class Point:
    """An operating point of a model."""

    chip: str
    model: str
    temperature_c: float

    @property
    def label(self) -> str:
        return f"{self.model} at {self.temperature_c:g} °C"


class Evidence:
    """The perplexity rows of a run, checked and with their options read. None: a run without any.

    Raises InputError for a missing column, options that are not JSON, or a perplexity that is not finite and positive.
    """

    def __init__(self, records: pd.DataFrame | None):
        rows = pd.DataFrame(columns=list(RECORD)) if records is None else records
        if missing := [c for c in RECORD if c not in rows.columns]:
            raise InputError(f"records: column {missing[0]} is missing, expected {', '.join(RECORD)}")
        rows = rows[rows["metric"] == METRIC].copy()
        rows["value"] = rows["value"].astype(float)
        if len(bad := rows[~(np.isfinite(rows["value"]) & (rows["value"] > 0))]):
            where = "{method} of {model}, realisation {realisation}".format(**bad.iloc[0])
            raise InputError(f"records: {where}: found {bad['value'].iloc[0]}, expected a finite positive perplexity")
        try:
            rows["options_text"] = rows["options"]
            rows["options"] = [json.loads(text or "{}") for text in rows["options"]]
        except ValueError as error:
            raise InputError(f"records: options are not JSON: {error}") from None
        self.rows = rows
        keys = ["task", "chip", "model", "method"]
        self.groups = {key: group for key, group in rows.groupby(keys)} if len(rows) else {}

    def settings(self, task: str, option: str) -> list:
        """The values that an option takes in a task, sorted."""
        found = {o[option] for o in self.rows.loc[self.rows["task"] == task, "options"] if option in o}
        return sorted(found)

    def points(self, task: str, method: str) -> list[Point]:
        """The operating points at which a method was measured in a task."""
        rows = self.rows[(self.rows["task"] == task) & (self.rows["method"] == method)]
        found = rows[["chip", "model", "temperature_c"]].drop_duplicates().itertuples(index=False)
        return sorted((Point(c, m, float(t)) for c, m, t in found), key=lambda p: (p.chip, p.model, p.temperature_c))

    def losses(self, task: str, at: Point, method: str, **options) -> pd.Series | None:
        """ln(perplexity) by realisation of one method with these options among its own, None where not measured.

        An option of None must be absent. Its attrs hold the token count. A clean row serves every temperature. Raises
        InputError where several rows share a realisation.
        """
        everywhere = self.groups.get((task, at.chip, at.model, method))
        if everywhere is None:
            return None
        rows = everywhere[everywhere["temperature_c"].astype(float) == at.temperature_c]
        if rows.empty and method == "clean":
            rows = everywhere.drop_duplicates(["options_text", "realisation"])
        wanted = VARIANT | options
        asked = [all(_same(o.get(k, VARIANT.get(k)), v) for k, v in wanted.items()) for o in rows["options"]]
        rows = rows[np.array(asked, dtype=bool)]
        if rows.empty:
            return None
        if rows["realisation"].duplicated().any() or rows["tokens"].nunique() > 1:
            raise InputError(
                f"records: {task}, {method} of {at.label} on {at.chip}, options {options}: found {len(rows)} rows,"
                " expected one per realisation, all on one text"
            )
        series = pd.Series(np.log(rows["value"].to_numpy()), index=rows["realisation"].astype(int)).sort_index()
        series.attrs["tokens"] = int(rows["tokens"].iloc[0])
        return series

    def reference(self, task: str, at: Point, method: str, like: pd.Series | None, **options) -> pd.Series | None:
        """`losses` of the task or, where it has none, of unperturbed selections in ppl:perturbed, or of ppl:heldout; on
        as many tokens as `like`."""
        for source, chosen in ((task, options), ("ppl:perturbed", {"perturbed": 0.0}), ("ppl:heldout", {})):
            found = self.losses(source, at, method, **chosen)
            if found is not None and like is not None and found.attrs["tokens"] == like.attrs["tokens"]:
                return found
        return None


def _same(found, wanted) -> bool:
    number = (int, float)
    if isinstance(found, number) and isinstance(wanted, number):
        return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)
    return found == wanted


def difference(a: pd.Series | None, b: pd.Series | None) -> pd.Series | None:
    """a - b within realisations; what has no noise is compared with every realisation. None where nothing pairs."""
    if a is None or b is None or a.attrs["tokens"] != b.attrs["tokens"]:
        return None
    if list(b.index) == [CLEAN]:
        return a - b.iloc[0]
    if list(a.index) == [CLEAN]:
        return a.iloc[0] - b
    both = a.index.intersection(b.index)
    return a[both] - b[both] if len(both) else None


@dataclass(frozen=True)
class Case:
    """One case of a statement, supported where every difference lies on the side that the statement says.

    differences: in nats, by realisation; None for one that was not measured; published: the number in the paper that
    corresponds to the hardest of them.
    """

    label: str
    differences: tuple[pd.Series | None, ...]
    published: float = math.nan

    @property
    def measured(self) -> tuple[pd.Series, ...]:
        return tuple(d for d in self.differences if d is not None)


def signs(differences: Sequence[pd.Series], alpha: float = ALPHA) -> list[int]:
    """-1 below zero, +1 above, 0 undecided, for each of one family of differences.

    Both must hold: the bootstrap interval excludes zero, and the paired t-test's p-value, corrected by Holm over the
    family, is below alpha. Differences without any noise have neither; they count from EXACT_TOLERANCE on.
    """
    tests = [paired(d, np.zeros(len(d))) for d in differences]
    adjusted = holm([t.t_p for t in tests]) if tests else []
    found = []
    for d, test, p in zip(differences, tests, adjusted, strict=True):
        if list(d.index) == [CLEAN]:
            found.append(int(np.sign(d.iloc[0])) if abs(d.iloc[0]) > EXACT_TOLERANCE else 0)
        else:
            found.append(0 if not p < alpha else -1 if test.high < 0 else 1 if test.low > 0 else 0)
    return found


def pooled(differences: Sequence[pd.Series]) -> Finding:
    """Mean over cases and its interval over the realisations that all of them share, as a Finding without verdict."""
    table = pd.concat(differences, axis=1, join="inner").mean(axis=1)
    if table.empty:
        return replace(NOT_MEASURED, found=float(np.mean([d.mean() for d in differences])))
    mean, low, high = mean_interval(table)
    draws = 0 if list(table.index) == [CLEAN] else len(table)
    return replace(NOT_MEASURED, found=mean, low=low, high=high, realisations=draws)


def judge(cases: Sequence[Case], total: int, lower: bool = True, alpha: float = ALPHA, note: str = "") -> Finding:
    """Decides a statement about `total` cases by the measured ones; all differences are one family for Holm.

    A case supports it where all its differences were measured and lie on the side that is claimed, and contradicts it
    where any lies on the other. found: mean over cases of the difference that is hardest for the statement.
    """
    cases = [c for c in cases if c.measured]
    if not cases:
        return NOT_MEASURED
    claimed = -1 if lower else 1
    family = iter(signs([d for c in cases for d in c.measured], alpha))
    found = [[next(family) for _ in c.measured] for c in cases]
    supports = [c for c, s in zip(cases, found, strict=True) if len(s) == len(c.differences) and set(s) == {claimed}]
    against = [c for c, s in zip(cases, found, strict=True) if -claimed in s]
    hardest = [min(c.measured, key=lambda d: claimed * d.mean()) for c in cases]
    printed = [c.published for c in cases]
    reason = f"supported in {len(supports)} of {total} cases, contradicted in {len(against)}"
    if against and len(against) < len(cases):
        reason += f" ({', '.join(c.label for c in against)})"
    if open_cases := len(cases) - len(supports) - len(against):
        reason += f", open in {open_cases}"
    if len(cases) < total:
        reason += f", not measured in {total - len(cases)}"
    verdict = tally(len(supports), len(against), total)
    return replace(
        pooled(hardest),
        verdict=verdict,
        reason=reason + (f"; {note}" if note else ""),
        published=float(np.mean(printed)),
    )
