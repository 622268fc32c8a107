"""Statements that noise breaks an MoE model through its routing, decided by a run.

    for claim in routing.claims(Evidence(records), layers): ...

Tasks: ppl:routing (noisy weights with clean routing, and the reverse), ppl:parts (noise in one part only),
ppl:perturbed (a share of the chosen experts replaced at random, figure 3 left). layers: per MoE layer and realisation
the columns chip, model, temperature_c, layer, realisation, logit_variance_ratio, topk_overlap and the loads (see
`romer.profiling.Profile`), or None.
"""

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.published import load
from romer.report.claim import NOT_MEASURED, UNDECIDED, Finding, Statements, inside, tally
from romer.report.evidence import Case, Evidence, Point, difference, judge, signs
from romer.statistics import mean_interval

ROUTING, PARTS, PERTURBED = "ppl:routing", "ppl:parts", "ppl:perturbed"
OTHER_PARTS = ("attention", "dense mlp", "shared expert", "routed expert")
DOUBLED, TRIPLED = (1.5, 2.5), (2.5, 3.5)  # our reading of "nearly doubles" and "up to 3 times"
EARLY = 1 / 3  # of the layers
FIGURE3 = Point("table3", "olmoe", 85.0)  # the model whose loads figure 3 shows, at the table's noise nearest to it
AT_FIGURE3 = f"{FIGURE3.label}, at table 3's noise"
HALF_DORMANT = 1 - math.log(2) / math.log(64)  # load entropy of 64 experts cannot exceed it when half have no load

routing = Statements("measured")


def checked(layers: pd.DataFrame | None, *columns: str) -> pd.DataFrame | None:
    """The rows with these columns, None without rows. Raises InputError for a missing column."""
    if layers is None or layers.empty:
        return None
    if missing := {"chip", "model", "temperature_c", "layer", "realisation", *columns} - set(layers.columns):
        raise InputError(f"routing: column {sorted(missing)[0]} is missing, found {', '.join(layers.columns)}")
    return layers


def at_figure3(layers: pd.DataFrame | None, column: str) -> pd.DataFrame | None:
    """The rows of figure 3's model, None without any."""
    if (rows := checked(layers, column)) is None:
        return None
    rows = rows[(rows["chip"] == FIGURE3.chip) & (rows["model"] == FIGURE3.model)]
    rows = rows[rows["temperature_c"].astype(float) == FIGURE3.temperature_c]
    return None if rows.empty else rows


def _within(draws: pd.Series, bounds: tuple[float, float], published: float, reason: str) -> Finding:
    mean, low, high = mean_interval(draws)
    return Finding(inside(low, high, bounds), reason, published, mean, low, high, len(draws))


@routing.states(
    "logit-variance-doubles",
    "Noise nearly doubles the variance of OLMoE's router logits.",
    "section 3.2",
    "variance of a token's router logits, noisy over clean, mean over layers",
)
def logit_variance_doubles(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    rows = at_figure3(layers, "logit_variance_ratio")
    if rows is None:
        return NOT_MEASURED
    draws = rows.groupby("realisation")["logit_variance_ratio"].mean()
    reason = f"{AT_FIGURE3}; read as {DOUBLED[0]} to {DOUBLED[1]}; the paper does not print its own"
    return _within(draws, DOUBLED, 2.0, reason)


@routing.states(
    "early-layers-triple",
    "In early layers the variance of router logits rises up to threefold.",
    "section 3.2",
    "largest ratio, noisy over clean, among the first third of the layers",
)
def early_layers_triple(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    rows = at_figure3(layers, "logit_variance_ratio")
    if rows is None:
        return NOT_MEASURED
    early = rows[rows["layer"] < max(1, round(EARLY * rows["layer"].nunique()))]
    draws = early.groupby("realisation")["logit_variance_ratio"].max()
    return _within(draws, TRIPLED, 3.0, f"{AT_FIGURE3}; read as {TRIPLED[0]} to {TRIPLED[1]}")


@routing.states(
    "noise-unbalances-load",
    "Noise unbalances the load of the experts.",
    "section 3.1, figures 3 and 5",
    "mean ln of the busiest expert's load over the mean load, noisy over clean",
)
def noise_unbalances_load(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    if (table := checked(layers, "load_max_over_mean", "load_max_over_mean_clean")) is None:
        return NOT_MEASURED
    cases = []
    for (chip, model, t), rows in table.groupby(["chip", "model", "temperature_c"]):
        logs = np.log(rows["load_max_over_mean"] / rows["load_max_over_mean_clean"])
        change = logs.groupby(rows["realisation"].astype(int)).mean()
        cases.append(Case(f"{model} at {t:g} °C ({chip})", (change,)))
    return judge(cases, len(cases), lower=False)


@routing.states(
    "most-experts-fall-dormant",
    "Under noise a few experts of OLMoE take nearly all tokens and most fall dormant.",
    "section 3.1, figure 3",
    "entropy of the load over experts, 1 is balanced, mean over layers",
)
def most_experts_fall_dormant(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    rows = at_figure3(layers, "load_entropy")
    if rows is None:
        return NOT_MEASURED
    draws = rows.groupby("realisation")["load_entropy"].mean()
    reason = f"{AT_FIGURE3}; with half of 64 experts dormant it could not exceed {HALF_DORMANT:.2f}"
    found = _within(draws, (0.0, HALF_DORMANT), math.nan, reason)
    return found if found.low > HALF_DORMANT else replace(found, verdict=UNDECIDED)  # low entropy is no dormancy yet


@routing.states(
    "routing-is-the-main-cause",
    "Most of the harm comes from the experts that noisy routers choose.",
    "sections 1 and 3.1",
    "mean of the harm (ln over clean) left with clean routing less the harm that clean routing removes",
)
def routing_is_the_main_cause(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    cases, left, harm = [], [], []
    for at in evidence.points(ROUTING, "vanilla"):
        mended = evidence.losses(ROUTING, at, "vanilla", routing="clean", weights="noisy")
        clean = evidence.reference(ROUTING, at, "clean", mended)
        vanilla = evidence.reference(ROUTING, at, "vanilla", mended, routing=None, weights=None)
        rest, whole = difference(mended, clean), difference(vanilla, clean)
        if rest is None or whole is None:
            continue
        cases.append(Case(at.label, ((2 * rest - whole).dropna(),)))  # rest < whole - rest: routing is the larger part
        left.append(rest.mean())
        harm.append(whole.mean())
    note = f"clean routing removes {100 * (1 - sum(left) / sum(harm)):.0f} % of the mean harm" if sum(harm) > 0 else ""
    return judge(cases, len(cases), note=note)


@routing.states(
    "wrong-routing-alone-harms",
    "Noisy routing decisions do harm by themselves.",
    "section 3.1",
    "mean ln(noisy routing on clean weights / clean)",
)
def wrong_routing_alone_harms(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    cases = []
    for at in evidence.points(ROUTING, "vanilla"):
        misled = evidence.losses(ROUTING, at, "vanilla", routing="noisy", weights="clean")
        cases.append(Case(at.label, (difference(misled, evidence.reference(ROUTING, at, "clean", misled)),)))
    return judge(cases, len(cases), lower=False)


@routing.states(
    "router-is-the-weak-part",
    "Noise in the routers does more harm than noise in any other part.",
    "sections 1 and 3.1",
    "mean ln(noise in the routers only / noise in the most harmful other part only)",
)
def router_is_the_weak_part(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    cases = []
    for at in evidence.points(PARTS, "vanilla"):
        router = evidence.losses(PARTS, at, "vanilla", noise_in="router")
        others = [evidence.losses(PARTS, at, "vanilla", noise_in=part) for part in OTHER_PARTS]
        found = tuple(difference(router, other) for other in others if other is not None)  # models lack some parts
        cases.append(Case(at.label, found))
    return judge(cases, len(cases), lower=False, note="parts of very different sizes")


def _perturbed(evidence: Evidence, at: Point, method: str) -> list[pd.Series]:
    """ln(perplexity) with each share of perturbed choices less that without."""
    base = evidence.losses(PERTURBED, at, method, perturbed=0.0)
    shares = [s for s in evidence.settings(PERTURBED, "perturbed") if s > 0]
    found = [difference(evidence.losses(PERTURBED, at, method, perturbed=s), base) for s in shares]
    return [d for d in found if d is not None]


@routing.states(
    "wrong-experts-harm",
    "Replacing chosen experts at random raises the perplexity of the clean model.",
    "section 3.1, figure 3",
    "mean ln(perturbed / not) for the mildest degree of perturbation",
)
def wrong_experts_harm(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    cases = [Case(at.label, tuple(_perturbed(evidence, at, "clean"))) for at in evidence.points(PERTURBED, "clean")]
    return judge(cases, len(cases), lower=False)


@routing.states(
    "clean-routing-suboptimal",
    "Under noise, choices made at random can beat those of the trained router.",
    "sections 1 and 3.1, figure 3",
    "mean ln(perturbed / not) under noise for the best degree of perturbation",
)
def clean_routing_suboptimal(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    """Unlike `judge`: one better degree supports a case, all worse contradict it."""
    points = {at.label: _perturbed(evidence, at, "vanilla") for at in evidence.points(PERTURBED, "vanilla")}
    points = {label: found for label, found in points.items() if found}
    if not points:
        return NOT_MEASURED
    family = iter(signs([d for found in points.values() for d in found]))
    given = [[next(family) for _ in found] for found in points.values()]
    supports, against = sum(-1 in g for g in given), sum(set(g) == {1} for g in given)
    best = judge([Case(label, (min(found, key=lambda d: d.mean()),)) for label, found in points.items()], len(points))
    reason = f"some degree of perturbation is better in {supports} of {len(points)} cases, all are worse in {against}"
    return replace(best, verdict=tally(supports, against, len(points)), reason=reason)


@routing.states(
    "naive-compensation-partial",
    "Naive compensation mends a part of the harm, and leaves a part.",
    "section 3.1, figure 3",
    "mean of the harder of ln(k-b / vanilla) and ln(clean / k-b)",
)
def naive_compensation_partial(evidence: Evidence, layers: pd.DataFrame | None) -> Finding:
    cases = []
    for at in evidence.points(PERTURBED, "kb_calibration"):
        kb = evidence.losses(PERTURBED, at, "kb_calibration", perturbed=0.0)
        vanilla = evidence.reference(PERTURBED, at, "vanilla", kb, perturbed=0.0)
        clean = evidence.reference(PERTURBED, at, "clean", kb, perturbed=0.0)
        left = difference(kb, clean)
        cases.append(Case(at.label, (difference(kb, vanilla), None if left is None else -left), _harder(at.model)))
    return judge(cases, len(cases))


def _harder(model: str) -> float:
    """What section 3.1 states for the quantity of `naive_compensation_partial`."""
    table = load("figure3").set_index("model")
    if model not in table.index:
        return math.nan
    row = table.loc[model]
    return float(np.log(max(row["naive_ppl"] / row["noisy_ppl"], row["clean_ppl"] / row["naive_ppl"])))
