"""Statements about methods that only a run decides: rows of ppl:heldout, ppl:ablation and the referee's checks.

    for claim in measured.claims(Evidence(records)): ...

Each is decided as `evidence.judge` says; `published` is the same quantity computed from the paper's own table, over the
same cases. What a run did not measure stays undecided.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from romer.report import claims_table4
from romer.report.claim import Finding, Statements
from romer.report.claims_table1 import BASELINES, NEAR_COMPLETE, RIVALS, perplexities
from romer.report.evidence import Case, Evidence, Point, difference, judge

MODELS = ("qwen3", "deepseek", "olmoe", "qwen15")
CELLS = [Point("table1", m, float(t)) for t in (25, 80) for m in MODELS]  # of table 1
ABLATED = [Point("table4", "qwen3", float(t)) for t in claims_table4.TEMPERATURES]
HELDOUT, ABLATION = "ppl:heldout", "ppl:ablation"
WHERE = "section 4.2, table 1"

measured = Statements("measured")


def log_ratio(table: pd.DataFrame, at: Point, a: str, b: str) -> float:
    """ln(perplexity of a / perplexity of b) as the paper's table 1 prints them, NaN where it has none."""
    t = int(at.temperature_c)
    if not {(t, a), (t, b)} <= set(table.index):
        return math.nan
    return float(np.log(table.at[(t, a), at.model] / table.at[(t, b), at.model]))


def against(evidence: Evidence, method: str, rivals: Sequence[str], cells: Sequence[Point] = CELLS) -> list[Case]:
    """One case a cell of table 1: the method against each rival; published: against the strongest one."""
    table, cases = perplexities(), []
    for at in cells:
        own = evidence.losses(HELDOUT, at, method)
        found = [difference(own, evidence.losses(HELDOUT, at, r)) for r in rivals]
        printed = [log_ratio(table, at, method, r) for r in rivals]
        cases.append(Case(at.label, tuple(found), max(printed)))
    return cases


def ablated(evidence: Evidence, method: str, against: Sequence[tuple[str, dict]], **options) -> list[Case]:
    """One case a temperature of table 4: a setting of one component against others."""
    component, key = ("replacement_n", "n_replace") if "n_replace" in options else ("calibration_lambda", "strength")
    table = claims_table4.grid(component)
    cases = []
    for at in ABLATED:
        own = evidence.losses(ABLATION, at, method, **options)
        found = [difference(own, evidence.losses(ABLATION, at, m, **o)) for m, o in against]
        row = table.loc[int(at.temperature_c)]
        others = [claims_table4.clean() if m == "clean" else row[o.get(key, 0)] for m, o in against]
        cases.append(Case(f"{at.temperature_c:g} °C", tuple(found), float(np.log(row[options[key]] / min(others)))))
    return cases


@measured.states(
    "noise-harms",
    "The noise raises every model's perplexity.",
    WHERE,
    "mean ln(vanilla / clean) over the cells of table 1",
)
def noise_harms(evidence: Evidence) -> Finding:
    note = "the noise is fitted to the paper's vanilla rows, as a KL divergence"
    return judge(against(evidence, "vanilla", ["clean"]), len(CELLS), lower=False, note=note)


@measured.states(
    "hotter-is-worse",
    "The hotter chip does more harm.",
    WHERE,
    "mean ln(vanilla at 80 °C / vanilla at 25 °C) over four models",
)
def hotter_is_worse(evidence: Evidence) -> Finding:
    cases = []
    for m in MODELS:
        hot, cool = (evidence.losses(HELDOUT, Point("table1", m, t), "vanilla") for t in (80.0, 25.0))
        printed = np.log(perplexities().at[(80, "vanilla"), m] / perplexities().at[(25, "vanilla"), m])
        cases.append(Case(m, (difference(hot, cool),), float(printed)))
    return judge(cases, len(MODELS), lower=False, note="the noise of both is fitted to the paper's vanilla rows")


@measured.states(
    "replacement-helps",
    "Expert replacement alone lowers perplexity under noise.",
    "sections 3.2 and 4.2",
    "mean ln(replacement / vanilla) over the cells of table 1",
)
def replacement_helps(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer_replacement", ["vanilla"]), len(CELLS))


@measured.states(
    "calibration-helps",
    "Router calibration alone lowers perplexity under noise.",
    "sections 3.2 and 4.2",
    "mean ln(calibration / vanilla) over the cells of table 1",
)
def calibration_helps(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer_calibration", ["vanilla"]), len(CELLS))


@measured.states(
    "romer-helps",
    "ROMER lowers the perplexity of every model under noise.",
    WHERE,
    "mean ln(romer / vanilla) over the cells of table 1",
)
def romer_helps(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer", ["vanilla"]), len(CELLS))


@measured.states(
    "both-beat-either",
    "The two components complement each other: ROMER is better than either alone.",
    "section 4.2, ablation",
    "mean ln(romer / better component) over the cells of table 1",
)
def both_beat_either(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer", ["romer_replacement", "romer_calibration"]), len(CELLS))


@measured.states(
    "joint-map",
    "At the paper's best settings, n = 6 with λ = 0.4, both are better than either alone.",
    "section 4.2, table 4",
    "mean ln(both / better one) over four temperatures",
)
def joint_map(evidence: Evidence) -> Finding:
    cases = []
    for at in ABLATED:
        both = evidence.losses(ABLATION, at, "romer", n_replace=6, strength=0.4)
        n = evidence.losses(ABLATION, at, "romer_replacement", n_replace=6)
        strength = evidence.losses(ABLATION, at, "romer_calibration", strength=0.4)
        cases.append(Case(f"{at.temperature_c:g} °C", (difference(both, n), difference(both, strength))))
    return judge(cases, len(ABLATED))


@measured.states(
    "romer-best",
    "ROMER is better than every other method for every model at both temperatures.",
    WHERE,
    "mean ln(romer / best rival) over the cells of table 1",
)
def romer_best(evidence: Evidence) -> Finding:
    return judge(against(evidence, "romer", RIVALS), len(CELLS), note="at unequal memory, as in the paper")


@measured.states(
    "romer-near-complete",
    f"ROMER undoes nearly all of the harm (read as {NEAR_COMPLETE} or more).",
    WHERE,
    f"mean of ln(romer / clean) less {1 - NEAR_COMPLETE:.1f} ln(vanilla / clean) over the cells of table 1",
)
def romer_near_complete(evidence: Evidence) -> Finding:
    cases = []
    for at in CELLS:
        clean = evidence.losses(HELDOUT, at, "clean")
        left, harm = (difference(evidence.losses(HELDOUT, at, m), clean) for m in ("romer", "vanilla"))
        excess = None if left is None or harm is None else (left - (1 - NEAR_COMPLETE) * harm).dropna()
        rise, whole = (log_ratio(perplexities(), at, m, "clean") for m in ("romer", "vanilla"))
        cases.append(Case(at.label, (excess,), rise - (1 - NEAR_COMPLETE) * whole))
    return judge(cases, len(CELLS))


@measured.states(
    "remapping-best-baseline-measured",
    "Of the baselines, weight remapping is the best.",
    WHERE,
    "mean ln(weight remapping / best other baseline) over the cells of table 1",
)
def remapping_best_baseline(evidence: Evidence) -> Finding:
    others = [b for b in BASELINES if b != "weight_remapping"]
    note = "bit slicing takes 7 or 8 cells a weight, averaging 2, remapping little more than 1"
    return judge(against(evidence, "weight_remapping", others), len(CELLS), note=note)


@measured.states(
    "bit-slicing-harms",
    "Bit slicing at 80 °C is worse than no mitigation for OLMoE and for Qwen3.",
    WHERE,
    "mean ln(bit slicing / vanilla) of the two",
)
def bit_slicing_harms(evidence: Evidence) -> Finding:
    cells = [at for at in CELLS if at.temperature_c == 80 and at.model in ("olmoe", "qwen3")]
    note = "sign-magnitude slices; which slices the paper uses is not printed"
    return judge(against(evidence, "bit_slicing", ["vanilla"], cells), len(cells), lower=False, note=note)


@measured.states(
    "kb-no-better",
    "k-b calibration is no better than no mitigation.",
    "section 4.2, table 2",
    "mean ln(k-b calibration / vanilla) over the cells of table 1",
)
def kb_no_better(evidence: Evidence) -> Finding:
    note = "supported means worse; an interval around zero leaves it open"
    return judge(against(evidence, "kb_calibration", ["vanilla"]), len(CELLS), lower=False, note=note)


@measured.states(
    "n4-to-6-recovers",
    "Replacing four to six experts lowers perplexity under noise.",
    "section 4.2, table 4",
    "mean ln(n = 4 or 6 / n = 0) over four temperatures",
)
def n4_to_6_recovers(evidence: Evidence) -> Finding:
    cases = [c for n in (4, 6) for c in ablated(evidence, "romer_replacement", [("vanilla", {})], n_replace=n)]
    return judge(cases, 2 * len(ABLATED))


@measured.states(
    "n16-worse",
    "Replacing sixteen experts is worse than replacing none.",
    "section 4.2, table 4",
    "mean ln(n = 16 / n = 0) over four temperatures",
)
def n16_worse(evidence: Evidence) -> Finding:
    return judge(ablated(evidence, "romer_replacement", [("vanilla", {})], n_replace=16), len(ABLATED), lower=False)


@measured.states(
    "lambda-04-lowest",
    "λ = 0.4 is better than every other λ of the grid.",
    "section 4.2, table 4",
    "mean ln(λ = 0.4 / best other λ) over four temperatures",
)
def lambda_04_lowest(evidence: Evidence) -> Finding:
    others = [("romer_calibration", {"strength": s}) for s in (0.2, 0.6, 0.8, 1.0)]
    return judge(ablated(evidence, "romer_calibration", [("vanilla", {}), *others], strength=0.4), len(ABLATED))


@measured.states(
    "lambda-02-and-1-degrade",
    "λ = 0.2 and λ = 1.0 do harm.",
    "section 4.2, table 4",
    "mean ln(λ = 0.2 or 1.0 / λ = 0) over four temperatures",
)
def lambda_02_and_1_degrade(evidence: Evidence) -> Finding:
    cases = [c for s in (0.2, 1.0) for c in ablated(evidence, "romer_calibration", [("vanilla", {})], strength=s)]
    return judge(cases, 2 * len(ABLATED), lower=False)


@measured.states(
    "below-clean",
    "At 25 °C calibration with λ = 0.4 ends below the clean model.",
    "section 4.2, table 4",
    "ln(λ = 0.4 / clean) at 25 °C",
)
def below_clean(evidence: Evidence) -> Finding:
    return judge(ablated(evidence, "romer_calibration", [("clean", {})], strength=0.4)[:1], 1)
