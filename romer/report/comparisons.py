"""Which method is better than which: paired differences of ln(perplexity), with intervals and corrected tests.

    table = comparisons(records)
    write(table, "results/tables", "comparisons", caption(table, "the held-out Wikipedia text"))

Every method against vanilla, and romer against every other method, at each operating point and for each model.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.report.tables import TASK, only, perplexities
from romer.statistics import ALPHA, CONFIDENCE, Paired, holm, paired

BETTER, WORSE, NO_DIFFERENCE = VERDICTS = ("better", "worse", "no difference shown")
BASELINE, PROPOSED = "vanilla", "romer"
COLUMNS = "chip model temperature_c method against difference difference_low difference_high verdict pairs".split()
COLUMNS += "t_p t_p_holm wilcoxon_p wilcoxon_p_holm cells cells_against tokens".split()


def verdict(low: float, high: float, p: float) -> str:
    """The word for a difference of ln(perplexity): its interval must exclude zero, and p must be below ALPHA.

    low, high: NaN where there is a single pair, which shows nothing. p: Holm-corrected.
    """
    if p < ALPHA and (low > 0 or high < 0):
        return WORSE if low > 0 else BETTER
    return NO_DIFFERENCE


def comparisons(records: pd.DataFrame, task: str = TASK["table1"]) -> pd.DataFrame:
    """One row per comparison of two methods, on the realisations of the noise that both have.

    records: rows of `task` are used, on every chip; methods without noise (clean) have no realisations to pair and are
    left out. Columns: chip, model, temperature_c, method, against, difference (mean of ln(ppl_method / ppl_against),
    negative where the method is better) with _low and _high, verdict, pairs, t_p and wilcoxon_p, each also
    Holm-corrected (_holm), cells and cells_against (of the method and of the other), tokens. The rows of one chip
    against vanilla are one family of tests, those of romer against the others are another. Raises InputError where a
    method has several settings, cells or token counts at an operating point, a realisation twice, or shares none with
    the other.
    """
    rows = perplexities(records, task)
    rows = rows[rows["realisation"] >= 0]
    table = []
    for _, of_chip in rows.groupby("chip"):
        against_vanilla, of_romer = [], []
        for at, here in of_chip.groupby(["chip", "model", "temperature_c"]):
            methods = list(dict.fromkeys(here["method"]))
            against_vanilla += _against(here, at, [(m, BASELINE) for m in methods if m != BASELINE])
            of_romer += _against(here, at, [(PROPOSED, m) for m in methods if m not in (PROPOSED, BASELINE)])
        for family in (against_vanilla, of_romer):
            table += _judged(family)
    return pd.DataFrame(table, columns=COLUMNS)


def _against(rows: pd.DataFrame, at: tuple, pairs: list[tuple[str, str]]) -> Iterator[tuple[dict, Paired]]:
    """What is compared, and the comparison, for each pair of methods that an operating point has."""
    chip, model, temperature = at
    known = set(rows["method"])
    for method, against in pairs:
        if not {method, against} <= known:
            continue
        what = f"{model}, {{}} at {temperature:g} C"
        one, other = (_losses(rows[rows["method"] == m], what.format(m)) for m in (method, against))
        both = f"{model}, {method} and {against} at {temperature:g} C"
        shared = one.index.intersection(other.index)
        if shared.empty:
            raise InputError(f"records: {both} share no realisation, expected at least one")
        line = {"chip": chip, "model": model, "temperature_c": float(temperature)}
        line |= {"method": method, "against": against}
        line |= {"cells": one.attrs["cells"], "cells_against": other.attrs["cells"]}
        line["tokens"] = int(only(rows[rows["method"].isin((method, against))], "tokens", both))
        yield line, paired(one[shared], other[shared])


def _losses(rows: pd.DataFrame, what: str) -> pd.Series:
    """ln(perplexity) by realisation; its attrs hold the cells."""
    for column in ("options", "tokens"):
        only(rows, column, what)
    if rows["realisation"].duplicated().any():
        twice = rows.loc[rows["realisation"].duplicated(), "realisation"].iloc[0]
        raise InputError(f"records: {what} has realisation {twice} more than once, expected one row each")
    losses = pd.Series(np.log(rows["value"].to_numpy(float)), index=rows["realisation"])
    losses.attrs["cells"] = float(only(rows, "cells", what))
    return losses


def _judged(family: list[tuple[dict, Paired]]) -> list[dict]:
    """The rows of a family of comparisons, with corrected p-values and verdicts."""
    t, wilcoxon = (holm([getattr(found, name) for _, found in family]) for name in ("t_p", "wilcoxon_p"))
    return [
        line
        | {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
        | {"t_p": found.t_p, "t_p_holm": t_holm, "wilcoxon_p": found.wilcoxon_p, "wilcoxon_p_holm": wilcoxon_holm}
        | {"pairs": found.n, "verdict": verdict(found.low, found.high, t_holm)}
        for (line, found), t_holm, wilcoxon_holm in zip(family, t, wilcoxon, strict=True)
    ]


def caption(table: pd.DataFrame, text: str) -> str:
    """The caption of a table of `comparisons` with at least one row; text: the name of the evaluation text."""
    pairs, tokens = (
        " to ".join(map(str, sorted({int(table[c].min()), int(table[c].max())}))) for c in ("pairs", "tokens")
    )
    tests = {len(family) for _, family in table.groupby(["chip", table["against"] == BASELINE])}
    return (
        f"Methods compared: mean difference of ln(token perplexity) on {text}, {tokens} tokens, over the {pairs}"
        f" realisations of the noise that both have; negative: the method is better. Brackets: {100 * CONFIDENCE:g} %"
        " bootstrap interval of the mean. p: two-sided, of the paired t-test and of Wilcoxon's signed-rank test (which"
        " cannot fall below 2 / 2^n for n pairs), Holm-corrected within a chip, over all comparisons with"
        f" {BASELINE} and over those of {PROPOSED} with the others ({' and '.join(map(str, sorted(tests)))} tests)."
        f" Better, worse: the interval excludes zero and the corrected t-test has p < {ALPHA}. Cells: as multiples of"
        " the plain layout."
    )
