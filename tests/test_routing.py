"""Router calibration (eq. 10-12), and the experts as arrays compute them."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import romer.routing
from romer.errors import InputError
from romer.noise import NoiseModel
from romer.profiling import profile
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers, select
from romer.routing import RouterCalibration, apply, split_over_copies

STRENGTHS = [0.05, 0.1, 0.2]


def random_logits(experts: int, tokens: int = 4000, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def iqr(z: torch.Tensor) -> np.ndarray:
    """[T]: eq. 10 in float64."""
    q1, q3 = np.percentile(z.double().numpy(), [25, 75], axis=-1)
    return q3 - q1


def eq_12_error(calibration: RouterCalibration, z: torch.Tensor) -> np.ndarray:
    """[T]: how far the calibrated interquartile range is from eq. 12's, as a share of the token's largest logit."""
    expected = (1 - 2 * calibration.strength) * iqr(z)
    return (iqr(calibration(z)) - expected) / z.abs().amax(-1).numpy()


@pytest.mark.parametrize("experts", [5, 8, 60, 64])
@pytest.mark.parametrize("strength", [0.1, 0.4, 0.5])
def test_iqr_is_eq_11_token_by_token(experts, strength):
    z = random_logits(experts, 50)
    expected = np.empty(z.shape)
    for t, row in enumerate(z.double().numpy()):
        q1, q3 = np.percentile(row, 25), np.percentile(row, 75)
        for rank, expert in enumerate(sorted(range(experts), key=lambda i: row[i]), start=1):
            sign = 1 if rank <= experts // 2 else -1
            expected[t, expert] = row[expert] + sign * strength * (q3 - q1)
    found = RouterCalibration("iqr", strength)(z)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("experts", [5, 8, 60, 64])
@pytest.mark.parametrize("strength", [*STRENGTHS, 0.4, 0.49])
def test_eq_12_is_exact_for_shrink(experts, strength):
    assert np.abs(eq_12_error(RouterCalibration("shrink", strength), random_logits(experts))).max() < 1e-6


def test_shrink_keeps_the_median_and_the_order():
    z = random_logits(60)
    out = RouterCalibration("shrink", 0.4)(z)
    medians = [np.median(v.numpy(), axis=-1) for v in (out, z)]
    np.testing.assert_allclose(*medians, atol=1e-6)
    assert torch.equal(out.argsort(-1), z.argsort(-1))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_eq_12_holds_for_iqr_where_the_halves_stay_apart(strength):
    z = random_logits(8, 20000)
    ordered = z.sort(-1).values
    apart = ordered[:, 4] - ordered[:, 3] > 2 * strength * torch.from_numpy(iqr(z))
    assert apart.sum() > 500
    error = np.abs(eq_12_error(RouterCalibration("iqr", strength), z))
    assert error[apart].max() < 1e-6


def test_eq_12_does_not_hold_for_iqr_beyond_a_quarter():
    """A finding about the paper: at λ = 0.4 the halves cross, and the spread that remains is far above eq. 12's."""
    z, calibration = random_logits(64), RouterCalibration("iqr", 0.4)
    ratio = iqr(calibration(z)) / (0.2 * iqr(z))
    assert np.mean(ratio > 1.5) > 0.99 and 2 < np.median(ratio) < 4
    assert np.abs(eq_12_error(RouterCalibration("shrink", 0.4), z)).max() < 1e-6


@pytest.mark.parametrize("kind", ["iqr", "shrink"])
def test_calibration_has_the_symmetries_of_its_equation(kind):
    calibrate, z = RouterCalibration(kind, 0.3), random_logits(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(calibrate(z[:, order]), calibrate(z)[:, order])
    assert torch.equal(calibrate(z[7:9]), calibrate(z)[7:9])  # a token's result is its own
    torch.testing.assert_close(calibrate(z + 3), calibrate(z) + 3, atol=1e-5, rtol=0)
    torch.testing.assert_close(calibrate(2 * z), 2 * calibrate(z))


@pytest.mark.parametrize("kind", ["iqr", "shrink"])
def test_strength_zero_changes_no_bit(model, logits, kind):
    z = random_logits(9)
    assert torch.equal(RouterCalibration(kind, 0.0)(z), z)
    clean = logits(model)
    layers = len(moe_layers(model))
    plan = ReplacementPlan(((),) * layers, ((),) * layers)
    for settings in ({}, {"plan": plan}, {"calibration": RouterCalibration(kind, 0.0)}):
        with apply(model, **settings):
            assert torch.equal(logits(model), clean)
    with apply(model, calibration=RouterCalibration(kind, 1e-9)):  # small enough: the hook's own path
        torch.testing.assert_close(logits(model), clean, atol=1e-5, rtol=1e-5)


def test_selection_is_the_routers_own(model):
    _, block = moe_layers(model)[0]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    z, weights, indices = block.gate(x)
    ours = select(z, block.gate.top_k, block.gate.norm_topk_prob)
    assert torch.equal(ours[0], weights) and torch.equal(ours[1], indices)


def test_under_renormalised_weights_eq_11_does_nothing_unless_the_selection_changes(qwen3, ids, logits):
    """The second finding: the chosen experts are of the upper half and shift together, which a softmax over them
    does not see."""
    calibration = RouterCalibration("iqr", 0.05)
    clean, before = logits(qwen3), profile(qwen3, ids, 64)
    with apply(qwen3, calibration=calibration):
        assert torch.equal(profile(qwen3, ids, 64).chosen, before.chosen)
        torch.testing.assert_close(logits(qwen3), clean, atol=1e-4, rtol=1e-4)
    with apply(qwen3, calibration=RouterCalibration("shrink", 0.05)):
        assert not torch.allclose(logits(qwen3), clean, atol=1e-2)


def test_under_raw_weights_eq_11_changes_the_output(olmoe, logits):
    clean = logits(olmoe)
    with apply(olmoe, calibration=RouterCalibration("iqr", 0.05)):
        assert not torch.allclose(logits(olmoe), clean, atol=1e-2)
    assert torch.equal(logits(olmoe), clean)


def test_rewriting_is_taken_off_after_an_exception(olmoe, logits, bits):
    clean, before = logits(olmoe), bits(olmoe)
    plan = ReplacementPlan(((0,), (1,)), ((3,), (2,)))
    with pytest.raises(KeyboardInterrupt):
        with apply(olmoe, plan, RouterCalibration("iqr", 0.2)):
            assert not torch.equal(logits(olmoe), clean)
            raise KeyboardInterrupt
    assert bits(olmoe) == before and torch.equal(logits(olmoe), clean)


def test_splitting_keeps_every_experts_share():
    g = torch.Generator().manual_seed(10)
    indices = torch.rand(500, 12, generator=g).argsort(-1)[:, :5]
    weights = torch.rand(500, 5, generator=g)
    for n in (1, 3, 6):
        hot, cold = torch.arange(n), torch.arange(6, 6 + n)
        allowed = ~torch.isin(indices, cold)
        before = torch.zeros(500, 12).scatter_add_(1, indices, weights * allowed)
        w, i = split_over_copies(weights * allowed, indices, hot, cold, 12)
        after = torch.zeros(500, 12).scatter_add_(1, i, w)
        torch.testing.assert_close(after.sum(1), before.sum(1))
        torch.testing.assert_close(after[:, hot], before[:, hot] / 2)
        assert torch.equal(after[:, cold], after[:, hot])
        rest = [e for e in range(12) if e not in {*hot.tolist(), *cold.tolist()}]
        assert torch.equal(after[:, rest], before[:, rest])
        used = torch.zeros(500, 12, dtype=torch.long).scatter_add_(1, i, (w > 0).long())
        assert used.max() == 1  # no slot is driven twice


@pytest.mark.parametrize("share", [0.0, 1.1], ids=["dense", "grouped"])
def test_analog_experts_equal_transformers_eager_ones(model, logits, share, monkeypatch):
    monkeypatch.setattr(romer.routing, "DENSE_SHARE", share)
    eager = copy.deepcopy(model)
    eager.set_experts_implementation("eager")
    with program(model, NoiseModel(0.05)), program(eager, NoiseModel(0.05)):
        expected = logits(eager)
        torch.testing.assert_close(logits(model), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.1], ids=["dense", "grouped"])
def test_analog_experts_are_the_weighted_sum_over_slots(olmoe, share, monkeypatch):
    """Also where an index repeats or a weight is zero, as after replacement."""
    monkeypatch.setattr(romer.routing, "DENSE_SHARE", share)
    experts = moe_layers(olmoe)[0][1].experts
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(40, 32, generator=g), torch.rand(40, 5, generator=g)
    indices = torch.randint(0, 8, (40, 5), generator=g)
    weights[:, 4] = 0
    expected = torch.zeros(40, 32, dtype=torch.float64)
    for t in range(40):
        for w, i in zip(weights[t], indices[t], strict=True):
            gate, up = (experts.gate_up_proj[i].double() @ x[t].double()).chunk(2)
            expected[t] += w * (experts.down_proj[i].double() @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(experts(x, indices, weights).double(), expected, atol=1e-4, rtol=1e-5)


def test_low_precision_models_are_rewritten_in_their_own_dtype(olmoe, logits):
    olmoe.bfloat16()
    with apply(olmoe, ReplacementPlan(((0,), (1,)), ((3,), (2,))), RouterCalibration("iqr", 0.2)):
        _, weights, _ = moe_layers(olmoe)[0][1].gate(torch.zeros(3, 32, dtype=torch.bfloat16))
        assert weights.dtype == torch.bfloat16
        assert logits(olmoe).isfinite().all()


def test_what_cannot_be_rewritten_is_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(InputError, match="LlamaForCausalLM has no mixture-of-experts layer"):
        with apply(dense):
            pass
    with pytest.raises(InputError, match="calibration kind: found 'median', expected one of iqr, shrink"):
        RouterCalibration("median", 0.1)
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="calibration strength: found"):
            RouterCalibration("iqr", strength)
