"""Statements of table 3 of the ROMER paper about what ROMER costs in hardware, decided by a cost model's table.

    for claim in hardware.claims(costs): ...

costs: one row per model and method with the columns of COLUMNS and, where known, n_replace, or None. The numbers are a
cost model's: means over recorded or simulated routing, without an interval.
"""

import pandas as pd

from romer.errors import InputError
from romer.published import load
from romer.report.claim import NOT_MEASURED, Finding, Statements, tally

COLUMNS = ("model", "method", "latency_s", "power_w", "energy_j", "extra_products")
MODELS = ("deepseek", "qwen15", "qwen3", "olmoe")
CHEAP = ("deepseek", "qwen15", "olmoe")  # those of which the text says a single-digit percentage
SINGLE_DIGIT = 10.0  # per cent
N_COSTED = 4  # of the paper's four to six; but for Qwen3's, its overheads are near n/E for this one

hardware = Statements("measured")


def rises(costs: pd.DataFrame | None, quantity: str) -> pd.Series | None:
    """Rise of a quantity from vanilla to romer in per cent, by model; None where not measured.

    Raises InputError for a missing column or for several rows of one model and method.
    """
    if costs is None or costs.empty:
        return None
    if missing := [c for c in COLUMNS if c not in costs.columns]:
        raise InputError(f"hardware: column {missing[0]} is missing, expected {', '.join(COLUMNS)}")
    if costs.duplicated(["model", "method"]).any():
        twice = costs.loc[costs.duplicated(["model", "method"])].iloc[0]
        raise InputError(f"hardware: {twice['method']} of {twice['model']} has several rows, expected one")
    table = costs.pivot(index="model", columns="method", values=quantity)
    if not {"vanilla", "romer"} <= set(table.columns):
        return None
    rise = (100 * (table["romer"] / table["vanilla"] - 1)).dropna()
    return None if rise.empty else rise


def _replaced(costs: pd.DataFrame) -> str:
    """The n behind romer's rows, for a reason."""
    n = sorted(set(costs.loc[costs["method"] == "romer", "n_replace"].dropna())) if "n_replace" in costs else []
    return f", n = {' to '.join(f'{v:g}' for v in dict.fromkeys((n[0], n[-1])))}" if n else ""


def single_digit(costs: pd.DataFrame | None, quantity: str, printed: str) -> Finding:
    """Whether the overhead stays below ten per cent for the three models of which the text says so."""
    rise = rises(costs, quantity)
    if rise is None or not len(known := rise[rise.index.isin(CHEAP)]):
        return NOT_MEASURED
    supports = int((known < SINGLE_DIGIT).sum())
    paper = load("table3").set_index("model")[printed]
    reason = f"below {SINGLE_DIGIT:g} % for {supports} of {len(known)} models{_replaced(costs)}"
    reason += "; a cost model, of its own hardware"
    verdict = tally(supports, len(known) - supports, len(CHEAP))
    return Finding(verdict, reason, paper[list(known.index)].mean(), known.mean())


@hardware.states(
    "latency-overhead",
    "For three of four models ROMER adds less than a tenth to latency.",
    "section 4.2, table 3",
    "mean rise of latency over DeepSeek-MoE, Qwen1.5-MoE and OLMoE, %",
)
def latency_overhead(costs: pd.DataFrame | None) -> Finding:
    return single_digit(costs, "latency_s", "latency_delta_pct")


@hardware.states(
    "power-overhead",
    "For three of four models ROMER adds less than a tenth to power.",
    "section 4.2, table 3",
    "mean rise of power over DeepSeek-MoE, Qwen1.5-MoE and OLMoE, %",
)
def power_overhead(costs: pd.DataFrame | None) -> Finding:
    return single_digit(costs, "power_w", "power_delta_pct")


@hardware.states(
    "largest-overhead-on-qwen3",
    "Of the four models Qwen3 pays the highest latency for ROMER.",
    "section 4.2, table 3",
    "rise of Qwen3's latency less the largest of the others, points of %",
)
def largest_overhead_on_qwen3(costs: pd.DataFrame | None) -> Finding:
    rise = rises(costs, "latency_s")
    if rise is None or not set(MODELS) <= set(rise.index):
        return NOT_MEASURED
    paper = load("table3").set_index("model")["latency_delta_pct"]
    lead, printed = (s["qwen3"] - s[list(CHEAP)].max() for s in (rise, paper))
    return Finding(
        tally(int(lead > 0), int(lead <= 0), 1), f"the largest is {rise.idxmax()}'s{_replaced(costs)}", printed, lead
    )


@hardware.states(
    "no-extra-products",
    "ROMER needs no array products beyond the plain model's.",
    "section 4.2, against eq. 9",
    "mean extra products of ROMER over the models",
)
def no_extra_products(costs: pd.DataFrame | None) -> Finding:
    if rises(costs, "latency_s") is None:
        return NOT_MEASURED
    extra = costs[costs["method"] == "romer"].set_index("model")["extra_products"].dropna()
    if extra.empty:
        return NOT_MEASURED
    more = int((extra > 0).sum())
    reason = f"the copies of hot experts compute, too: more products in {more} of {len(extra)} models{_replaced(costs)}"
    return Finding(tally(len(extra) - more, more, len(extra)), reason, 0.0, extra.mean())
