"""Statements about the equations of the ROMER paper, decided by evaluating them with this project's own code.

    for claim in computed.claims(): ...

Logits are random (normal, fixed seed): what is shown to fail for them is not true of the equation.
"""

import numpy as np
import torch

from romer.hardware import SHAPES
from romer.noise import NoiseModel
from romer.published import load
from romer.replacement import ReplacementPlan
from romer.report.claim import DOES_NOT_HOLD, HOLDS, IN_PART, Finding, Statements, inside, of_all
from romer.routers import select
from romer.routing import RouterCalibration
from romer.statistics import mean_interval

SEED = 0
TOKENS = 2048
EXPERTS, TOP_K, N_REPLACE = 64, 8, 6  # OLMoE's routing; n as in section 4.2
QWEN3 = (128, 8)  # experts and top-k of Qwen3-30B-A3B, which renormalises its weights
STRENGTHS = [0.05 * i for i in range(1, 11)]
EXACT = 1e-4  # error of the share of the interquartile range that still counts as exact
PROGRAMMINGS, BATCH = 400, 20  # of one expert; each batch gives one ratio of variances
SIGMA_DEV, WIDTH, INNER = 0.05, 48, 24
NEAR = 0.1  # relative, what still counts as n/E
EQUAL = (0.45, 0.55)  # what still counts as a factor of one half

computed = Statements("computed")


def logits(experts: int = EXPERTS, mean: float = 0.0) -> torch.Tensor:
    """Router logits N(mean, 1), float32 [TOKENS, experts]."""
    drawn = np.random.default_rng(SEED).standard_normal((TOKENS, experts), np.float32)
    return torch.from_numpy(drawn) + mean


def spread(z: torch.Tensor) -> torch.Tensor:
    """Interquartile range per token, eq. 10: [T]."""
    q1, q3 = z.quantile(torch.tensor([0.25, 0.75]), dim=-1)
    return q3 - q1


def kept_spread(z: torch.Tensor, strength: float) -> torch.Tensor:
    """IQR after eq. 11 over IQR before, per token: [T]; eq. 12 says 1 - 2λ."""
    return spread(RouterCalibration("iqr", strength)(z)) / spread(z)


def symmetric() -> torch.Tensor:
    """One token with the quantiles of a normal distribution for logits [1, E]: eq. 12's best case."""
    return torch.distributions.Normal(0, 1).icdf((torch.arange(EXPERTS) + 0.5) / EXPERTS)[None]


def halved(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 8 with the experts ranked by their mean probability: (logits, hot [n], cold [n])."""
    plan = ReplacementPlan.fit(z.softmax(-1).mean(0)[None], N_REPLACE)
    hot, cold = torch.tensor(plan.hot[0]), torch.tensor(plan.cold[0])
    changed = z.clone()
    changed[:, hot] /= 2  # eq. 8
    changed[:, cold] = 0
    return changed, hot, cold


@computed.states(
    "eq8-halves-the-weight",
    "Halving a hot expert's logit gives each of its two copies half of the gate's weight.",
    "section 3.2, eq. 8 and 9",
    "share of (token, hot expert) pairs whose probability is halved by eq. 8, within a tenth",
)
def eq8_halves_the_weight() -> Finding:
    z = logits()
    changed, hot, _ = halved(z)
    ratio = changed.softmax(-1)[:, hot] / z.softmax(-1)[:, hot]
    right = ((ratio > EQUAL[0]) & (ratio < EQUAL[1])).double().mean().item()
    low, high = ratio.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    verdict = HOLDS if right == 1 else DOES_NOT_HOLD
    reason = f"the ratio depends on the logit, {low:.2f} to {high:.2f} in nine tenths of the pairs; negative ones gain"
    return Finding(verdict, reason, 1.0, right)


@computed.states(
    "eq8-discards-cold-experts",
    "A logit of zero discards an expert.",
    "section 3.2, eq. 8",
    "share of tokens that choose an expert whose logit was set to zero, logits N(-2, 1)",
)
def eq8_discards_cold_experts() -> Finding:
    shares = {}
    for mean in (0.0, -2.0):
        changed, _, cold = halved(logits(mean=mean))
        _, chosen = select(changed, TOP_K, norm_topk_prob=False)
        shares[mean] = torch.isin(chosen, cold).any(-1).double().mean().item()
    verdict = HOLDS if max(shares.values()) == 0 else DOES_NOT_HOLD
    reason = (
        "eq. 8 depends on a constant added to all logits, which softmax ignores:"
        f" {100 * shares[0.0]:.0f} % of the tokens choose a discarded expert at mean logit 0,"
        f" {100 * shares[-2.0]:.0f} % at mean logit -2"
    )
    return Finding(verdict, reason, 0.0, shares[-2.0])


def _variance_ratios() -> list[float]:
    """Error variance of an expert's output as the mean of two slots over that of one slot, per batch of programmings.

    One SwiGLU expert with random weights and tokens; the two slots have device errors of their own (eq. 2).
    """
    rng = np.random.default_rng(SEED)
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    weights = {name: torch.from_numpy(rng.standard_normal(s, np.float32) / s[1] ** 0.5) for name, s in shapes.items()}
    x = torch.from_numpy(rng.standard_normal((16, WIDTH), np.float32))
    noise = NoiseModel(SIGMA_DEV)

    def output(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T

    clean, one, two = output(weights), [], []
    for r in range(PROGRAMMINGS):
        slots = [output({k: noise.realise(f"{k}[{slot}]", w, r) for k, w in weights.items()}) for slot in (0, 1)]
        one.append((slots[0] - clean).square().mean().item())
        two.append(((slots[0] + slots[1]) / 2 - clean).square().mean().item())
    batches = np.reshape(two, (-1, BATCH)).sum(1) / np.reshape(one, (-1, BATCH)).sum(1)
    return batches.tolist()


@computed.states(
    "eq9-halves-the-variance",
    "Computing an expert twice on independent arrays halves the variance of its error.",
    "section 3.2, eq. 9",
    "error variance of the mean of two slots over that of one slot",
)
def eq9_halves_the_variance() -> Finding:
    mean, low, high = mean_interval(_variance_ratios())
    reason = f"a gated expert under eq. 2 with σ = {SIGMA_DEV}; half is read as {EQUAL[0]} to {EQUAL[1]}"
    return Finding(inside(low, high, EQUAL), reason, 0.5, mean, low, high, PROGRAMMINGS)


@computed.states(
    "no-further-computation",
    "Replacement needs no computation at run time beyond the plain model's.",
    "section 4.2, against eq. 9",
    f"least extra products with routed experts, n = {N_REPLACE} of {EXPERTS}",
)
def no_further_computation() -> Finding:
    least = N_REPLACE / EXPERTS  # the hottest n of E experts get at least n / E of the tokens, all computed twice
    reason = (
        f"eq. 9 computes every hot expert twice, and the hottest n get at least n/E = {100 * least:.0f} % of the load"
    )
    return Finding(DOES_NOT_HOLD, reason, 0.0, least)


@computed.states(
    "overhead-is-n-over-e",
    "The overheads of table 3 are what computing n = 4 hot experts of a uniform load twice would add: n/E.",
    "section 4.2, table 3",
    "largest printed rise of latency over 100 n/E",
)
def overhead_is_n_over_e() -> Finding:
    printed = load("table3").set_index("model")["latency_delta_pct"]
    ratios = {model: rise / (100 * 4 / SHAPES[model].experts) for model, rise in printed.items()}
    near = [model for model, ratio in ratios.items() if abs(ratio - 1) <= NEAR]
    words = ", ".join(f"{model} {printed[model]:g} against {400 / SHAPES[model].experts:.1f} %" for model in ratios)
    reason = f"within {100 * NEAR:.0f} % for {len(near)} of {len(ratios)} models: {words}"
    return Finding(of_all(len(near), len(ratios)), reason, 1.0, max(ratios.values()))


@computed.states(
    "eq12-exact",
    "Eq. 11 shrinks the interquartile range by exactly 1 - 2λ, for every λ up to 0.5.",
    "section 3.2, eq. 12",
    "largest λ (in steps of 0.05) for which eq. 12 is exact, symmetric logits",
)
def eq12_exact() -> Finding:
    exact = [s for s in STRENGTHS if abs(kept_spread(symmetric(), s).item() - (1 - 2 * s)) <= EXACT]
    random = {s: kept_spread(logits(), s) for s in (0.2, 0.25, 0.4)}
    share = {s: 100 * ((kept - (1 - 2 * s)).abs() <= EXACT).double().mean().item() for s, kept in random.items()}
    verdict = HOLDS if exact == STRENGTHS else IN_PART if exact else DOES_NOT_HOLD
    reason = (
        f"beyond that the halves cross, even of symmetric logits; for random ones it is exact in {share[0.2]:.0f} % of"
        f" tokens at 0.2, {share[0.25]:.0f} % at 0.25; at the paper's 0.4 {random[0.4].mean():.2f} is left, not 0.20"
    )
    return Finding(verdict, reason, 0.5, max(exact, default=0.0))


@computed.states(
    "lambda-half-collapses",
    "With λ near 0.5 both quartiles fall onto the median.",
    "section 3.2, below eq. 12",
    "interquartile range after eq. 11 with λ = 0.5 over that before",
)
def lambda_half_collapses() -> Finding:
    kept = kept_spread(logits(), 0.5).mean().item()
    reason = "each half is moved past the median onto the other side; the kind `shrink` does collapse"
    return Finding(HOLDS if kept <= EXACT else DOES_NOT_HOLD, reason, 0.0, kept)


def no_operation(strength: float) -> tuple[float, float]:
    """(share of tokens whose top-k eq. 11 leaves alone, largest change of a renormalised weight among those)."""
    experts, top_k = QWEN3
    z = logits(experts)
    before, chosen = select(z, top_k, norm_topk_prob=True)
    after, again = select(RouterCalibration("iqr", strength)(z), top_k, norm_topk_prob=True)
    same = (chosen == again).all(-1)
    change = (before - after)[same].abs().max().item() if same.any() else float("nan")
    return same.double().mean().item(), change


@computed.states(
    "eq11-changes-routing-of-qwen3",
    "On Qwen3, λ from 0.2 to 0.4 changes what the routers decide.",
    "section 3.2, eq. 11, and table 4",
    "share of tokens whose experts or weights eq. 11 changes, 128 experts, top 8 renormalised, λ = 0.4",
)
def eq11_changes_routing_of_qwen3() -> Finding:
    untouched = {s: no_operation(s) for s in (0.2, 0.4, 1.0)}
    changed = 1 - untouched[0.4][0]
    nothing = max(change for share, change in untouched.values() if share)
    reason = (
        "the chosen logits are all moved by one constant, which renormalising takes out: where the choice stays,"
        f" weights change by {nothing:.0e} at most; it stays for {100 * untouched[0.2][0]:.0f} % of random tokens at"
        f" λ = 0.2, {100 * untouched[0.4][0]:.0f} % at 0.4, {100 * untouched[1.0][0]:.0f} % at 1.0"
    )
    return Finding(DOES_NOT_HOLD if changed < 0.01 else IN_PART if changed < 0.99 else HOLDS, reason, found=changed)


@computed.states(
    "needs-no-labels",
    "Neither retraining nor labels are needed.",
    "sections 1 and 3.2",
    "settings that still have to be chosen per model and noise level",
)
def needs_no_labels() -> Finding:
    reason = "eq. 6 reads gate probabilities of plain text, eq. 10 to 12 logits alone; n and λ remain to be chosen"
    return Finding(HOLDS, reason, found=2)


@computed.states(
    "no-further-cells",
    "The number of stored experts, and so of cells, stays the same.",
    "section 3.2, eq. 7",
    "expert slots after replacement over before",
)
def no_further_cells() -> Finding:
    plan = ReplacementPlan.fit(logits().softmax(-1).mean(0)[None], N_REPLACE)
    slots = len(set(range(EXPERTS)) | set(plan.cold[0]))  # copies go into slots that exist
    reason = "the copies overwrite the cold experts, which are lost"
    return Finding(of_all(int(slots == EXPERTS), 1), reason, 1.0, slots / EXPERTS)


@computed.states(
    "zero-strength-is-identity",
    "λ = 0 leaves the logits as they are.",
    "section 3.2, below eq. 12",
    "largest change of a logit with λ = 0",
)
def zero_strength_is_identity() -> Finding:
    change = (RouterCalibration("iqr", 0.0)(logits()) - logits()).abs().max().item()
    return Finding(HOLDS if change == 0 else DOES_NOT_HOLD, "bitwise", 0.0, change)
