"""Statements that tables 2 and 3 of the ROMER paper decide by themselves: is the text what the tables print?

    for claim in table2.claims(): ...

Table 2 has one model on five benchmarks, table 3 the cost and the perplexity at 85 °C.
"""

import numpy as np
import pandas as pd

from romer.published import load
from romer.report.claim import UNDECIDED, Finding, Statements, agree, of_all, span
from romer.report.claims_table1 import RIVALS, perplexities
from romer.report.claims_table4 import clean as clean_of_table4
from romer.statistics import recovered_fraction

ACCURACIES = ["piqa_acc", "arc_challenge_acc", "arc_easy_acc"]
PERPLEXITIES = ["wikitext2_ppl", "lambada_ppl"]
SECOND, THIRD = "section 4.2, table 2", "section 4.2, table 3"
QUANTITIES = {"latency": "_s", "power": "_w", "ppl": ""}  # of table 3, with the end of their columns
NEAR_CLEAN = 1.1  # our reading of "approaching clean": at most a tenth above the clean perplexity
PROPORTIONAL = 1.5  # our reading of "proportionally": the two ratios agree within this factor
SAME_NOISE = 0.1  # relative, what still counts as one noise: section 3.1 rounds its perplexities
MODEST = 2.0  # 5 °C more should not multiply the harm by more, when 55 °C (25 to 80) multiply it by 2.5 to 6
# Parameters active per token, in 1e9, as the text of section 4.2 gives them (it gives none for DeepSeek-MoE).
ACTIVE = {"olmoe": 1.0, "qwen15": 2.7, "qwen3": 3.0}

table2 = Statements("published")


def _benchmarks() -> pd.DataFrame:
    return load("table2").set_index(["temperature", "method"])


def _quality() -> pd.DataFrame:
    """Table 2 with the sign of perplexities turned: higher is better in every column."""
    table = _benchmarks()
    return table.assign(**{c: -table[c] for c in PERPLEXITIES})


def _costs() -> pd.DataFrame:
    return load("table3").set_index("model")


@table2.states(
    "romer-best-table2",
    "ROMER is the best method on all five benchmarks at both temperatures.",
    SECOND,
    "cells of table 2 in which ROMER is strictly the best under noise",
)
def romer_best() -> Finding:
    quality = _quality()
    rivals = quality.loc[quality.index.isin(RIVALS, level="method")].groupby(level="temperature").max()
    won = (quality.xs("romer", level="method") > rivals).values
    reason = f"every cell checked: {won.sum()} of {won.size}; one model, and no spread over draws is printed"
    return Finding(of_all(won.sum(), won.size), reason, won.size, won.sum())


@table2.states(
    "kb-no-better-table2",
    "k-b calibration does about as well as no mitigation at all, or worse.",
    SECOND,
    "cells of table 2 in which k-b calibration is not better than vanilla",
)
def kb_no_better() -> Finding:
    quality, table = _quality(), _benchmarks()
    better = (quality.xs("kb_calibration", level="method") > quality.xs("vanilla", level="method")).values
    rows = (table.xs(m, level="method")["wikitext2_ppl"] for m in ("clean", "vanilla", "kb_calibration"))
    reason = (
        f"better in {better.sum()} of {better.size}; recovers {span(recovered_fraction(*rows))} of the loss on"
        " WikiText-2; the text on table 1 calls it an improvement"
    )
    return Finding(of_all((~better).sum(), better.size), reason, better.size, (~better).sum())


@table2.states(
    "slicing-and-averaging-fail-table2",
    "Bit slicing and averaging help a little at 25 °C and fail at 80 °C.",
    SECOND,
    "cells of table 2 at 80 °C in which the two are not better than vanilla",
)
def slicing_and_averaging_fail() -> Finding:
    quality, shares = _quality().loc[80], []
    failed = sum((quality.loc[m] <= quality.loc["vanilla"]).sum() for m in ("bit_slicing", "average"))
    for m in ("bit_slicing", "average"):
        rows = (_benchmarks().xs(kind, level="method")["wikitext2_ppl"] for kind in ("clean", "vanilla", m))
        shares.append(recovered_fraction(*rows))
    words = " and ".join(f"{cool:.2f} at 25 °C, {hot:.2f} at 80 °C" for cool, hot in shares)
    reason = f"better in all 10 but {failed}; share of the loss on WikiText-2 that they undo: {words}"
    return Finding(of_all(failed, 10), reason, 10, failed)


@table2.states(
    "recovers-62-percent",
    "At 80 °C ROMER undoes about 62 % of the harm on WikiText-2 and LAMBADA.",
    SECOND,
    "share of the rise of WikiText-2's perplexity that is undone",
)
def recovers_62_percent() -> Finding:
    clean, vanilla, romer = (_benchmarks().loc[(80, m), PERPLEXITIES] for m in ("clean", "vanilla", "romer"))
    share, log = (vanilla - romer) / (vanilla - clean), recovered_fraction(clean, vanilla, romer)
    reason = f"{span(share, 3)} of the rise in perplexity on the two, {span(log)} of the rise in loss"
    return Finding(of_all(agree([0.62] * 2, share, 2), 2), reason, 0.62, share["wikitext2_ppl"])


@table2.states(
    "reasoning-hit-harder",
    "Reasoning degrades relatively more than language modelling (21.9 % of ARC-Challenge, 49.7 % of WikiText-2).",
    SECOND,
    "largest relative loss of an accuracy less the smallest relative rise of a perplexity, 80 °C",
)
def reasoning_hit_harder() -> Finding:
    change = (_benchmarks().loc[(80, "vanilla")] / _benchmarks().loc[(80, "clean")] - 1).abs()
    reasoning, language = change[ACCURACIES], change[PERPLEXITIES]
    larger = sum((r > language).sum() for r in reasoning)
    reason = (
        f"accuracies lose {span(100 * reasoning, 1)} %, perplexities rise by {span(100 * language, 1)} %: the two cited"
        " numbers say the opposite"
    )
    return Finding(of_all(larger, 6), reason, found=reasoning.max() - language.min())


@table2.states(
    "table2-differences",
    "The differences that the text quotes from table 2 are those of the table.",
    SECOND,
    "quoted differences that the table gives, to the printed digit",
)
def table2_differences() -> Finding:
    table = _benchmarks()
    unit = [1.0, 1.0, 100.0]  # accuracies are quoted in points
    columns = [*PERPLEXITIES, "arc_challenge_acc"]
    low, hot, clean = ((table.loc[(t, m), columns]) for t, m in ((25, "vanilla"), (80, "vanilla"), (80, "clean")))
    mended, hot_mended, remapped = (
        table.loc[(t, m), columns] for t, m in ((25, "romer"), (80, "romer"), (80, "weight_remapping"))
    )
    found = np.concatenate([abs(a - b) * unit for a, b in ((low, clean), (hot, clean), (low, mended))])
    gap = abs(remapped - hot_mended) * unit
    relative = 100 * abs(hot / clean - 1)
    found = [*found, gap["wikitext2_ppl"], gap["arc_challenge_acc"], *relative[["arc_challenge_acc", "wikitext2_ppl"]]]
    stated = [4.89, 4.24, 5.6, 9.42, 8.89, 10.3, 3.10, 2.68, 3.5, 1.38, 1.5, 21.9, 49.7]
    digits = [2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 1, 1, 1]
    right = sum(agree([s], [f], d) for s, f, d in zip(stated, found, digits, strict=True))
    return Finding(of_all(right, len(stated)), f"{right} of {len(stated)} recomputed", len(stated), right)


@table2.states(
    "headline-reductions",
    "ROMER cuts perplexity by 58.6, 58.8 and 59.8 % on DeepSeek-MoE, Qwen-MoE and OLMoE.",
    "abstract, sections 1 and 5, table 3",
    "reduction of OLMoE's perplexity in table 3, %",
)
def headline_reductions() -> Finding:
    costs, rows = _costs(), perplexities()
    cut = 100 * (1 - costs["ppl_romer"] / costs["ppl_noisy"])
    usual = 100 * (1 - rows.loc[(80, "romer")] / rows.loc[(80, "vanilla")])
    right = agree((58.6, 58.8, 59.8), cut[["deepseek", "qwen15", "olmoe"]], 1)
    reason = f"so in table 3 (text unnamed, 85 °C); table 1 at 80 °C gives {span(usual, 1)} % over the four models"
    return Finding(of_all(right, 3), reason, 59.8, cut["olmoe"])


@table2.states(
    "table3-averages",
    "On average ROMER costs 7.8 % latency and 7.4 % power for 56.7 % less perplexity.",
    THIRD,
    "average rise of latency, %",
)
def table3_averages() -> Finding:
    costs = _costs()
    change = {q: 100 * (costs[f"{q}_romer{u}"] / costs[f"{q}_noisy{u}"] - 1) for q, u in QUANTITIES.items()}
    mean = [change[q].mean() for q in QUANTITIES]
    energy = costs["latency_romer_s"] * costs["power_romer_w"] / costs["latency_noisy_s"] / costs["power_noisy_w"]
    printed = sum(agree(costs[f"{q}_delta_pct"], change[q], 1) for q in QUANTITIES)
    reason = (
        f"{printed} of 12 printed changes recomputed, and the means; energy, the product of both costs, rises by"
        f" {100 * (energy.mean() - 1):.1f} %"
    )
    return Finding(of_all(printed + agree((7.8, 7.4, -56.7), mean, 1), 15), reason, 7.8, mean[0])


@table2.states(
    "romer-approaches-clean-table3",
    "In table 3 ROMER's perplexity, 13.84 to 14.76, comes near that of the clean models.",
    THIRD,
    "largest ratio of ROMER's perplexity in table 3 to the clean one of table 1",
)
def romer_approaches_clean() -> Finding:
    ratio = _costs()["ppl_romer"] / perplexities().loc[(25, "clean")]
    near = (ratio <= NEAR_CLEAN).sum()
    reason = (
        f"{span(ratio)} times the clean values of table 1 (table 3 prints none); near is read as {NEAR_CLEAN} or less,"
        f" which only {ratio.idxmin()} meets, below its clean value"
    )
    return Finding(of_all(near, len(ratio)), reason, found=ratio.max())


@table2.states(
    "overhead-follows-active-parameters",
    "The overhead is in proportion to the active parameters, hence Qwen3's is the largest.",
    THIRD,
    "latency overhead of Qwen3 over that of Qwen1.5-MoE",
)
def overhead_follows_active_parameters() -> Finding:
    latency = _costs()["latency_delta_pct"]
    pairs = [("qwen15", "olmoe"), ("qwen3", "qwen15"), ("qwen3", "olmoe")]
    rises = sum(latency[more] > latency[less] for more, less in pairs)
    proportional = sum(
        abs(np.log(latency[a] / latency[b]) - np.log(ACTIVE[a] / ACTIVE[b])) <= np.log(PROPORTIONAL) for a, b in pairs
    )
    reason = (
        f"Qwen1.5-MoE has 2.7 times OLMoE's and pays {latency['qwen15']:g} % against {latency['olmoe']:g} %, Qwen3 1.1"
        f" times Qwen1.5-MoE's, {latency['qwen3']:g} %; of 3 pairs {rises} are in order, {proportional} in proportion"
    )
    expected = ACTIVE["qwen3"] / ACTIVE["qwen15"]
    return Finding(of_all(proportional, len(pairs)), reason, expected, latency["qwen3"] / latency["qwen15"])


@table2.states(
    "one-noise-per-temperature",
    "The tables show one chip, whose noise is fixed by the temperature.",
    "sections 2.2 and 4.2, tables 1 to 4",
    "ln(vanilla / clean) of DeepSeek-MoE at 85 °C (table 3) over that at 80 °C (table 1)",
)
def one_noise_per_temperature() -> Finding:
    fourth = load("table4").query("component == 'replacement_n' and value == 0").set_index("temperature")
    same = _costs().at["qwen3", "ppl_noisy"] == fourth.at["85", "wikitext2_ppl"]
    clean = perplexities().loc[(25, "clean")]

    def loss(ppl: pd.Series) -> float:
        return float(np.log(ppl["vanilla"] / ppl["clean"]))

    rise = np.log(_costs()["ppl_noisy"] / clean) / np.log(perplexities().loc[(80, "vanilla")] / clean)
    hot = _costs().at["qwen3", "ppl_noisy"], fourth.at["85", "wikitext2_ppl"]
    apart = loss(_benchmarks().loc[25]["wikitext2_ppl"]), loss(perplexities().loc[25]["deepseek"])
    reason = (
        f"5 °C more multiply the harm by {span(rise, 1)}; Qwen3 at 85 °C is at {hot[0]} in table 3, at {hot[1]} in"
        f" table 4, and table 3 does not name its text; on DeepSeek-MoE at 25 °C ln(vanilla / clean) is {apart[0]:.3f}"
        f" in table 2 and {apart[1]:.3f} in table 1, on one test set"
    )
    return Finding(of_all(int(same) + int(rise.max() <= MODEST), 2), reason, found=rise["deepseek"])


@table2.states(
    "figure3-noise-is-the-tables",
    "Figure 3 shows the noise, and the clean models, of the tables.",
    "section 3.1, figure 3, against tables 1, 3 and 4",
    "OLMoE's ln(noisy / clean) in figure 3 over the largest of the tables",
)
def figure3_noise_is_the_tables() -> Finding:
    figure, clean = load("figure3").set_index("model"), perplexities().loc[(25, "clean")]
    own = np.log(figure["noisy_ppl"] / figure["clean_ppl"])
    hottest = np.log(_costs().loc[own.index, "ppl_noisy"] / clean[own.index])
    fourth = load("table4").query("component == 'replacement_n' and value == 0")["wikitext2_ppl"].max()
    hottest["qwen3"] = max(hottest["qwen3"], np.log(fourth / clean_of_table4()))
    mild = np.log(perplexities().loc[(80, "vanilla")]["olmoe"] / clean["olmoe"])
    same = (abs(own / hottest - 1) <= SAME_NOISE).sum()
    reason = (
        f"{own['olmoe']:.2f} against {hottest['olmoe']:.2f} at most on OLMoE, {own['qwen3']:.2f} against"
        f" {hottest['qwen3']:.2f} on Qwen3, both at 85 °C, and {mild:.2f}"
        f" for OLMoE at table 1's 80 °C; clean {figure.at['olmoe', 'clean_ppl']} and {figure.at['qwen3', 'clean_ppl']}"
        f" (rounded) against table 1's {clean['olmoe']} and {clean['qwen3']}"
    )
    return Finding(of_all(same, len(own)), reason, 1.0, own["olmoe"] / hottest["olmoe"])


@table2.states(
    "chip-parameters",
    "The noise is that of a measured chip.",
    "section 2.2, figure 2",
    "printed values of the noise's σ, of the ADC's bits and of its range",
)
def chip_parameters() -> Finding:
    return Finding(UNDECIDED, "neither σ nor bits, range, number of chips or process is printed", found=0)
