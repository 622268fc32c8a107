"""Statements that table 4 of the ROMER paper (Qwen3, grids of n and λ) and its set-up decide by themselves.

for claim in table4.claims(): ...
"""

import numpy as np
import pandas as pd
from transformers import OlmoeConfig

from romer.published import load
from romer.report.claim import DOES_NOT_HOLD, UNDECIDED, Finding, Statements, agree, of_all, span
from romer.statistics import recovered_fraction

WHERE = "section 4.2, table 4"
TEMPERATURES = (25, 45, 65, 85)

table4 = Statements("published")


def grid(component: str) -> pd.DataFrame:
    """Table 4's perplexities of `replacement_n` or `calibration_lambda`: rows are temperatures, columns values."""
    rows = load("table4").query("component == @component")
    table = rows.assign(temperature=rows["temperature"].astype(int))
    return table.pivot(index="temperature", columns="value", values="wikitext2_ppl")


def clean() -> float:
    """Table 4's clean perplexity."""
    return float(load("table4").query("component == 'clean'")["wikitext2_ppl"].iloc[0])


def _degrade(component: str, symbol: str, values: tuple) -> Finding:
    """Whether all cells with these values of a component are above those without it."""
    table = grid(component)
    worse = table[list(values)].gt(table[0], axis=0)
    each = (f"{symbol} = {v} at {worse[v].sum()} of 4" for v in values)
    reason = ", ".join(each).replace("of 4", "of 4 temperatures", 1)
    return Finding(of_all(worse.values.sum(), worse.size), reason, worse.size, worse.values.sum())


@table4.states(
    "n6-at-65",
    "At 65 °C, n = 6 brings perplexity from 24.87 down to 14.05.",
    WHERE,
    "perplexity at 65 °C without replacement",
)
def n6_at_65() -> Finding:
    n = grid("replacement_n")
    right = agree((24.87, 14.05), n.loc[65, [0, 6]], 2)
    there = [t for t in TEMPERATURES if agree((24.87, 14.05), n.loc[t, [0, 6]], 2) == 2]
    reason = f"at 65 °C the table has {n.at[65, 0]} and {n.at[65, 6]}; the two numbers are those of {there[0]} °C"
    return Finding(of_all(right, 2), reason, 24.87, n.at[65, 0])


@table4.states(
    "n4-to-6-recovers-table4",
    "Replacing four to six experts recovers a substantial part of the loss.",
    WHERE,
    "smallest recovered fraction over n = 4, 6 and four temperatures",
)
def n4_to_6_recovers() -> Finding:
    n = grid("replacement_n")
    fractions = recovered_fraction(clean(), n[[0]].to_numpy(), n[[4, 6]].to_numpy()).ravel()
    reason = f"{span(fractions)} of the rise in loss; substantial is read as at least half"
    return Finding(of_all((fractions >= 0.5).sum(), len(fractions)), reason, found=fractions.min())


@table4.states(
    "n16-worse-table4",
    "Replacing sixteen experts is worse than replacing none.",
    WHERE,
    "temperatures of table 4 at which n = 16 is above n = 0",
)
def n16_worse() -> Finding:
    worse = grid("replacement_n")[16] > grid("replacement_n")[0]
    at = ", ".join(f"{t} °C" for t in worse[~worse].index)
    falls = grid("replacement_n")[16]
    reason = f"not at {at}; with n = 16 the table falls with heat, from {falls[25]} to {falls[85]}"
    return Finding(of_all(worse.sum(), len(worse)), reason, len(worse), worse.sum())


@table4.states(
    "n8-degrades-table4",
    "From n = 8 on, replacement does harm.",
    WHERE,
    "cells of table 4 with n = 8 or 16 that are above n = 0",
)
def n8_degrades() -> Finding:
    return _degrade("replacement_n", "n", (8, 16))


@table4.states(
    "lambda-04-lowest-table4",
    "λ = 0.4 gives the lowest perplexity at every temperature.",
    WHERE,
    "temperatures of table 4 at which λ = 0.4 is the lowest of the grid",
)
def lambda_04_lowest() -> Finding:
    lowest = grid("calibration_lambda").idxmin(axis=1) == 0.4
    return Finding(of_all(lowest.sum(), 4), f"{lowest.sum()} of 4 temperatures of the grid", 4, lowest.sum())


@table4.states(
    "lambda-02-and-1-degrade-table4",
    "λ = 0.2 and λ = 1.0 do harm.",
    WHERE,
    "cells of table 4 with λ = 0.2 or 1.0 that are above λ = 0",
)
def lambda_02_and_1_degrade() -> Finding:
    return _degrade("calibration_lambda", "λ", (0.2, 1.0))


@table4.states(
    "lambda-range",
    "λ lies strictly between 0 and 0.5.",
    "section 3.2, eq. 11, and table 4",
    "non-zero values of λ in table 4 that lie between 0 and 0.5",
)
def lambda_range() -> Finding:
    values = [v for v in grid("calibration_lambda").columns if v]
    allowed = sum(0 < v < 0.5 for v in values)
    outside = ", ".join(f"{v:g}" for v in values if v >= 0.5)
    reason = f"the table also prints λ = {outside}, for which eq. 12 would have a spread of zero or less"
    return Finding(of_all(allowed, len(values)), reason, len(values), allowed)


@table4.states(
    "below-clean-table4",
    "At 25 °C calibration with λ = 0.4 ends below the clean model.",
    WHERE,
    "perplexity with λ = 0.4 at 25 °C less that of the clean model",
)
def below_clean() -> Finding:
    gap = grid("calibration_lambda").at[25, 0.4] - clean()
    reason = "so printed; what ends below clean has changed the model rather than undone the noise"
    return Finding(of_all(int(gap < 0), 1), reason, 10.40 - 10.83, gap)


@table4.states(
    "n4-to-6-everywhere-table4",
    "One choice of n, four to six, suits every noise level.",
    WHERE,
    "temperatures of table 4 at which the best n is 4 or 6",
)
def n4_to_6_everywhere() -> Finding:
    best = grid("replacement_n").idxmin(axis=1)
    reason = f"the best of the grid is {', '.join(f'n = {n:g} at {t} °C' for t, n in best.items())}"
    return Finding(of_all(best.isin([4, 6]).sum(), len(best)), reason, len(best), best.isin([4, 6]).sum())


@table4.states(
    "both-needed-tables",
    "Neither component alone reaches what ROMER as a whole recovers.",
    WHERE,
    "ROMER's perplexity on Qwen3 at 85 °C (table 3) less the best of a single component (table 4)",
)
def both_needed() -> Finding:
    whole = load("table3").set_index("model").at["qwen3", "ppl_romer"]
    alone = min(grid(c).loc[85].min() for c in ("replacement_n", "calibration_lambda"))
    reason = f"no table has both at once; {whole} and {alone} stand over different vanilla rows, 27.5 and 24.87"
    return Finding(UNDECIDED, reason, found=whole - alone)


@table4.states(
    "wikitext-2-and-103",
    "WikiText-2 and WikiText-103 are two evaluations.",
    "section 4.1, tables 1, 2 and 4",
    "ln of DeepSeek-MoE's clean perplexity on WikiText-2 (table 2) over that on WikiText-103 (table 1)",
)
def wikitext_2_and_103() -> Finding:
    first = load("table1").query("method == 'clean'").iloc[0]
    second = load("table2").query("method == 'clean'").iloc[0]
    ratio = np.log(second["wikitext2_ppl"] / first["deepseek"])
    reason = (
        f"they share one test set (Merity et al. 2017, arXiv:1609.07843), yet clean DeepSeek-MoE is {first['deepseek']}"
        f" and {second['wikitext2_ppl']}, clean Qwen3 {first['qwen3']} and {clean()}: apart in opposite directions"
    )
    return Finding(DOES_NOT_HOLD, reason, 0.0, ratio)


@table4.states(
    "five-temperatures-table4",
    "Table 4 spans five temperatures.",
    "table 4, its caption",
    "temperatures in table 4",
)
def five_temperatures() -> Finding:
    found = len(grid("replacement_n"))
    reason = f"the caption says five, the text and the table have {', '.join(map(str, TEMPERATURES))} °C"
    return Finding(of_all(int(found == 5), 1), reason, 5, found)


@table4.states(
    "active-parameters-of-qwen3",
    "Qwen3-30B-A3B has 14 billion active parameters.",
    "section 4.1 against section 4.2",
    "active parameters in section 4.2, 1e9",
)
def active_parameters_of_qwen3() -> Finding:
    return Finding(DOES_NOT_HOLD, "section 4.2 gives 3 billion, as does the model's name", 14, 3)


@table4.states(
    "layers-of-olmoe",
    "OLMoE's activation map spans layers 0 to 22 and experts 0 to 60.",
    "section 3.1, figure 3",
    "MoE layers of OLMoE-1B-7B",
)
def layers_of_olmoe() -> Finding:
    config = OlmoeConfig()  # the defaults are OLMoE-1B-7B's (Muennighoff et al. 2024, arXiv:2409.02060)
    layers, experts = config.num_hidden_layers, config.num_experts
    right = int(layers == 23) + int(experts >= 61)
    reason = f"the model has {layers} layers, so no layers {layers} to 22; of its {experts} experts all may be shown"
    return Finding(DOES_NOT_HOLD if layers < 23 else of_all(right, 2), reason, 23, layers)


@table4.states(
    "moe-more-robust-than-dense",
    "MoE models withstand the noise better than dense ones with as many active parameters.",
    "section 1, figure 1",
    "difference of ln(noisy / clean) between an MoE model and its dense counterpart",
)
def moe_more_robust_than_dense() -> Finding:
    return Finding(UNDECIDED, "the paper prints no number for a dense model, and none is programmed here")
