"""Statements of the referee's report on the ROMER paper and of its authors' answers, decided by a run.

    for claim in referee.claims(Evidence(records)): ...

Tasks: ppl:unnoised (the methods on clean weights), ppl:scaled (noise of another size under the plan fitted at the
measured one), ppl:transfer (a plan fitted on one chip, evaluated on another).
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from romer.report.claim import DOES_NOT_HOLD, HOLDS, NOT_MEASURED, Finding, Statements, inside, of_all, span, tally
from romer.report.claims_measured import CELLS, against
from romer.report.evidence import EXACT_TOLERANCE, Case, Evidence, Point, difference, judge, pooled, signs
from romer.statistics import mean_interval

UNNOISED, SCALED, TRANSFER = "ppl:unnoised", "ppl:scaled", "ppl:transfer"
SCALES = (0.8, 1.2)
KEPT = 0.05  # of the authors' answer: the reduction of perplexity moves by at most five points
SIGNIFICANT = 0.01  # of the authors' answer

referee = Statements("measured")


def scaled(evidence: Evidence, at: Point, scale: float) -> pd.Series | None:
    """ln(romer / vanilla) under noise of `scale` times the measured size."""
    romer, vanilla = (evidence.losses(SCALED, at, m, scale=scale) for m in ("romer", "vanilla"))
    return difference(romer, vanilla)


@referee.states(
    "no-clean-degradation",
    "On clean weights ROMER costs nothing.",
    "referee report, second comment and its answer",
    "mean ln(romer / clean) on weights without noise",
)
def no_clean_degradation(evidence: Evidence) -> Finding:
    rises = {}
    for at in evidence.points(UNNOISED, "romer"):
        romer = evidence.losses(UNNOISED, at, "romer")
        rise = difference(romer, evidence.reference(UNNOISED, at, "clean", romer))
        if rise is not None:
            rises[at.label] = float(rise.mean())
    if not rises:
        return NOT_MEASURED
    harmed = [label for label, rise in rises.items() if rise > EXACT_TOLERANCE]
    reason = f"above clean in {len(harmed)} of {len(rises)} cases, by {span(rises.values(), 3)}; nothing is drawn"
    return Finding(of_all(len(rises) - len(harmed), len(rises)), reason, 0.0, float(np.mean(list(rises.values()))))


@referee.states(
    "gain-is-significant",
    "ROMER's gain is significant over realisations of the noise (p < 0.01).",
    "referee report, second comment and its answer",
    "mean ln(romer / vanilla) over the cells of table 1",
)
def gain_is_significant(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer", ["vanilla"]), len(CELLS), alpha=SIGNIFICANT, note="Holm's p below 0.01")


@referee.states(
    "survives-other-noise",
    "With everything fixed, ROMER still helps under noise that is a fifth smaller or larger.",
    "referee report, third comment and its answer",
    "mean ln(romer / vanilla) at 0.8 and 1.2 times the noise",
)
def survives_other_noise(evidence: Evidence) -> Finding:
    points = evidence.points(SCALED, "romer")
    cases = [Case(f"{at.label}, {s:g} times", (scaled(evidence, at, s),)) for at in points for s in SCALES]
    return judge(cases, len(cases))


@referee.states(
    "gain-moves-little",
    "Under noise that is a fifth smaller or larger, the reduction by ROMER moves by five points at most.",
    "referee report, third comment and its answer",
    "mean change of 1 - romer / vanilla against that at the measured noise",
)
def gain_moves_little(evidence: Evidence) -> Finding:
    changes, gains = [], []
    for at in evidence.points(SCALED, "romer"):
        for s in SCALES:
            there = scaled(evidence, at, s)
            like = evidence.losses(SCALED, at, "romer", scale=s)
            base = difference(*(evidence.reference(SCALED, at, m, like, scale=1.0) for m in ("romer", "vanilla")))
            if there is not None and base is not None and len(both := there.index.intersection(base.index)):
                changes.append(np.exp(base[both]) - np.exp(there[both]))
                gains.append(there[both])
    if not changes:
        return NOT_MEASURED
    places = [inside(*mean_interval(c)[1:], (-KEPT, KEPT)) for c in changes]
    given = signs(gains)
    kept = sum(place == HOLDS and sign == -1 for place, sign in zip(places, given, strict=True))
    lost = sum(place == DOES_NOT_HOLD or sign == 1 for place, sign in zip(places, given, strict=True))
    reason = (
        f"a reduction that stays within five points in {kept} of {len(changes)} cases; moved by more in"
        f" {places.count(DOES_NOT_HOLD)}, no reduction but a rise in {given.count(1)}: of a rise it is not asked how"
        " far it moves"
    )
    return replace(pooled(changes), verdict=tally(kept, lost, len(changes)), reason=reason)


@referee.states(
    "transfers-to-another-chip",
    "A plan that was fitted on one chip helps on another one, too.",
    "referee report, first comment",
    "mean ln(romer / vanilla) on chips that nothing was fitted on",
)
def transfers_to_another_chip(evidence: Evidence) -> Finding:
    cases = []
    for at in evidence.points(TRANSFER, "romer"):
        romer, vanilla = (evidence.losses(TRANSFER, at, m) for m in ("romer", "vanilla"))
        cases.append(Case(f"{at.label} on {at.chip}", (difference(romer, vanilla),)))
    return judge(cases, len(cases))


@referee.states(
    "spread-is-small",
    "The gain over the strongest baseline is larger than the spread over realisations.",
    "referee report, second comment",
    "mean ln(romer / weight remapping) over the cells of table 1",
)
def spread_is_small(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer", ["weight_remapping"]), len(CELLS))
