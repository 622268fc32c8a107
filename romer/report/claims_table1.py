"""Statements that table 1 of the ROMER paper decides by itself: is the text what the table prints?

    for claim in table1.claims(): ...

No run is needed. The paper prints no realisation count and no interval, so its numbers are taken as they stand.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from romer.published import load
from romer.report.claim import Finding, Statements, agree, of_all, span, tally
from romer.statistics import recovered_fraction

RIVALS = ("vanilla", "bit_slicing", "average", "weight_remapping", "kb_calibration")
BASELINES = RIVALS[1:]
NEAR_COMPLETE = 0.9  # our reading of "near-complete recovery": share of the log perplexity's rise that is undone
WHERE = "section 4.2, table 1"

table1 = Statements("published")


def perplexities() -> pd.DataFrame:
    """Table 1 with index (temperature, method), one column a model."""
    return load("table1").set_index(["temperature", "method"])


def _log_rise() -> pd.DataFrame:
    """ln(perplexity / clean) of every noisy row."""
    table = perplexities()
    return np.log(table.drop("clean", level="method") / table.loc[(25, "clean")])


def _range(method: str, temperature: int, stated: tuple[float, float]) -> Finding:
    """Whether a stated range of rises over clean is what the table gives."""
    table = perplexities()
    rise = table.loc[(temperature, method)] - table.loc[(temperature, "clean")]
    right = agree(stated, (rise.min(), rise.max()), 2)
    reason = f"the table gives {span(rise)} over four models, the text {span(stated)}"
    return Finding(of_all(right, 2), reason, stated[0], rise.min())


def _leads(method: str, rivals: Sequence[str]) -> pd.DataFrame:
    """By how much a method is below the best of its rivals [temperature, model]; `rival` in attrs names that one."""
    table = perplexities()
    others = table.loc[table.index.isin(rivals, level="method")].groupby(level="temperature")
    best = others.idxmin().map(lambda at: at[1])
    leads = (others.min() - table.xs(method, level="method")).round(9)
    leads.attrs["beaten"] = [
        f"by {best.at[t, m]} on {m} at {t} °C" for t in leads.index for m in leads.columns if leads.at[t, m] < 0
    ]
    return leads


def _lowest(leads: pd.DataFrame) -> str:
    return tally(int((leads > 0).values.sum()), int((leads < 0).values.sum()), leads.size)


@table1.states(
    "vanilla-rise-25",
    "At 25 °C the noise costs the models 0.15 to 0.97 of perplexity.",
    WHERE,
    "smallest rise of vanilla's perplexity over clean at 25 °C",
)
def vanilla_rise_25() -> Finding:
    return _range("vanilla", 25, (0.15, 0.97))


@table1.states(
    "vanilla-rise-80",
    "At 80 °C the noise costs the models 1.85 to 2.65 of perplexity.",
    WHERE,
    "smallest rise of vanilla's perplexity over clean at 80 °C",
)
def vanilla_rise_80() -> Finding:
    return _range("vanilla", 80, (1.85, 2.65))


@table1.states(
    "hotter-is-worse-table1",
    "More noise means more harm: the hotter chip is the worse one.",
    "sections 1 and 4.2, table 1",
    "pairs of method and model whose perplexity is higher at 80 °C than at 25 °C",
)
def hotter_is_worse() -> Finding:
    rise = _log_rise()
    falling = (rise.loc[80] <= rise.loc[25]).stack()
    pairs = " and ".join(f"{method} on {model}" for method, model in falling[falling].index)
    supports = len(falling) - falling.sum()
    return Finding(of_all(supports, len(falling)), f"{pairs} get better with heat", len(falling), supports)


@table1.states(
    "model-sensitivity",
    "OLMoE is the most vulnerable of the models, Qwen1.5-MoE the most robust.",
    "section 4.2, tables 1 and 3",
    "ends of the order of ln(vanilla / clean) that are as said, at 25 and 80 °C (table 1) and 85 °C (table 3)",
)
def model_sensitivity() -> Finding:
    rise = _log_rise()
    third = load("table3").set_index("model")["ppl_noisy"] / perplexities().loc[(25, "clean")]
    orders = rise.loc[(25, "vanilla")], rise.loc[(80, "vanilla")], third
    right = sum((o.idxmax() == "olmoe") + (o.idxmin() == "qwen15") for o in orders)
    robust = f"{third.idxmin()}, with {third.min():.1f} times clean"
    return Finding(of_all(right, 6), f"in table 3 (over table 1's clean values) the most robust is {robust}", 6, right)


@table1.states(
    "bit-slicing-worst",
    "Bit slicing on OLMoE at 80 °C, 14.62, is the worst result of the table.",
    WHERE,
    "highest perplexity of table 1",
)
def bit_slicing_worst() -> Finding:
    highest, at = perplexities().max().max(), (80, "bit_slicing")
    farthest = _log_rise().at[at, "olmoe"] == _log_rise().max().max()
    right = int(perplexities().at[at, "olmoe"] == highest) + int(farthest)
    reason = f"{highest:g}, of bit slicing on qwen3 at 80 °C, is higher; 14.62 is the farthest above its clean value"
    return Finding(of_all(right, 2), reason, 14.62, highest)


@table1.states(
    "averaging-and-kb-improve",
    "Averaging and k-b calibration give moderate improvements.",
    WHERE,
    "cells of table 1 in which they are below vanilla",
)
def averaging_and_kb_improve() -> Finding:
    table = perplexities()
    below = {
        m: (table.xs(m, level="method") < table.xs("vanilla", level="method")).values.sum()
        for m in ("average", "kb_calibration")
    }
    reason = f"k-b calibration in {below['kb_calibration']} of 8 cells, averaging in {below['average']} of 8"
    return Finding(of_all(sum(below.values()), 16), reason, 16, sum(below.values()))


@table1.states(
    "remapping-best-baseline",
    "Of the baselines, weight remapping is the best.",
    WHERE,
    "cells of table 1 in which weight remapping is strictly the lowest baseline",
)
def remapping_best_baseline() -> Finding:
    leads = _leads("weight_remapping", [b for b in BASELINES if b != "weight_remapping"])
    reason = f"beaten {' and '.join(leads.attrs['beaten'])}; {(leads == 0).values.sum()} tie"
    return Finding(_lowest(leads), reason, leads.size, (leads > 0).values.sum())


@table1.states(
    "remapping-remainder-80",
    "Under weight remapping 0.44 to 1.34 of perplexity remain at 80 °C.",
    WHERE,
    "smallest rise of weight remapping's perplexity over clean at 80 °C",
)
def remapping_remainder_80() -> Finding:
    return _range("weight_remapping", 80, (0.44, 1.34))


@table1.states(
    "romer-best-table1",
    "ROMER has the lowest perplexity of all methods for every model at both temperatures.",
    WHERE,
    "cells of table 1 in which ROMER is strictly the lowest under noise",
)
def romer_best() -> Finding:
    leads = _leads("romer", RIVALS)
    won = (leads > 0).values.sum()
    reason = f"every cell checked; the smallest lead is {leads.min().min():.2f}, and no spread over draws is printed"
    return Finding(_lowest(leads), reason, leads.size, won)


@table1.states(
    "romer-remainder-25",
    "Under ROMER 0.05 to 0.34 of perplexity remain at 25 °C.",
    WHERE,
    "smallest rise of ROMER's perplexity over clean at 25 °C",
)
def romer_remainder_25() -> Finding:
    return _range("romer", 25, (0.05, 0.34))


@table1.states(
    "romer-remainder-80",
    "Under ROMER 0.31 to 0.95 of perplexity remain at 80 °C.",
    WHERE,
    "smallest rise of ROMER's perplexity over clean at 80 °C",
)
def romer_remainder_80() -> Finding:
    return _range("romer", 80, (0.31, 0.95))


@table1.states(
    "romer-near-complete-table1",
    "ROMER undoes nearly all of the harm.",
    WHERE,
    "largest recovered fraction over the eight cells of table 1",
)
def romer_near_complete() -> Finding:
    table = perplexities()
    parts = (table.xs(m, level="method") for m in ("clean", "vanilla", "romer"))
    fractions = recovered_fraction(*parts).ravel()
    verdict = of_all((fractions >= NEAR_COMPLETE).sum(), len(fractions))
    reason = f"{span(fractions)} of the rise in loss, about two thirds; nearly all is read as {NEAR_COMPLETE} or more"
    return Finding(verdict, reason, found=fractions.max())


@table1.states(
    "gap-to-strongest-baseline",
    "At 80 °C ROMER is 0.13 to 0.39 below the strongest baseline, which is weight remapping.",
    WHERE,
    "smallest gap between ROMER and the strongest baseline at 80 °C",
)
def gap_to_strongest_baseline() -> Finding:
    remapped, strongest = _leads("romer", ["weight_remapping"]).loc[80], _leads("romer", BASELINES).loc[80]
    right = agree((0.13, 0.39), (strongest.min(), strongest.max()), 2)
    reason = f"{span(remapped)} below weight remapping, {span(strongest)} below the strongest (average, on qwen3)"
    return Finding(of_all(right, 2), reason, 0.13, strongest.min())
