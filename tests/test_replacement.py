"""Expert replacement (eq. 6-9): the plan, the slots, and what both readings of the paper compute."""

import json
import math

import pytest
import torch

from romer.errors import InputError
from romer.moments import collect
from romer.noise import NoiseModel, slot_name
from romer.placement import Placement
from romer.profiling import profile
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers
from romer.routing import apply, split_over_copies
from romer.sensitivity import collect as weigh
from romer.sensitivity import experts

ACTIVATION = torch.rand(3, 12, generator=torch.Generator().manual_seed(5))
NOISE = NoiseModel(0.1)


def some_plan(model, n: int = 2, form: str = "split") -> ReplacementPlan:
    """A plan for random activations."""
    blocks = moe_layers(model)
    a = torch.rand(len(blocks), blocks[0][1].gate.num_experts, generator=torch.Generator().manual_seed(6))
    return ReplacementPlan.fit(a, n, form)


# The plan.


@pytest.mark.parametrize("n", range(7))
def test_the_hottest_go_onto_the_coldest_in_order(n):
    plan = ReplacementPlan.fit(ACTIVATION, n)
    assert plan.n_replace == n
    for a, hot, cold in zip(ACTIVATION.tolist(), plan.hot, plan.cold, strict=True):
        ranked = sorted(range(12), key=lambda i: -a[i])
        assert hot == tuple(ranked[:n]) and cold == tuple(ranked[::-1][:n])


def test_equal_activations_rank_the_lower_index_as_the_hotter():
    a = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 0.0, 0.0, 2.0], [1.0] * 8])
    plan = ReplacementPlan.fit(a, 2)
    assert plan.hot == ((1, 2), (0, 1))
    assert plan.cold == ((6, 5), (7, 6))  # the other end of the same order, so the sets stay apart


def test_relabelling_the_experts_relabels_the_plan():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))  # new index j is old index order[j]
    plan, renamed = ReplacementPlan.fit(ACTIVATION, 4), ReplacementPlan.fit(ACTIVATION[:, order], 4)
    for old, new in ((plan.hot, renamed.hot), (plan.cold, renamed.cold)):
        assert [tuple(order[list(layer)].tolist()) for layer in new] == list(old)


@pytest.mark.parametrize("form, n", [("split", 2), ("literal", 1)])
def test_relabelling_the_experts_of_a_model_changes_no_output(model, ids, logits, form, n):
    """For `literal` with n = 1: eq. 8 gives all cold experts the same logit, so that of two only the index decides."""
    with apply(model, ReplacementPlan.fit(profile(model, ids, 64).magnitude, n, form)):
        expected = logits(model)
    for _, block in moe_layers(model):
        order = torch.randperm(block.gate.num_experts, generator=torch.Generator().manual_seed(8))
        for p in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            p.copy_(p[order].clone())
    with apply(model, ReplacementPlan.fit(profile(model, ids, 64).magnitude, n, form)):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_plan_survives_json():
    plan = ReplacementPlan.fit(ACTIVATION, 3, "literal")
    assert ReplacementPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def apply_to(model, plan):
    with apply(model, plan):
        pass


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda m: ReplacementPlan.fit(ACTIVATION, 7), "n_replace: found 7, expected 0 ≤ n ≤ E/2 = 6"),
        (lambda m: ReplacementPlan.fit(ACTIVATION, -1), "n_replace: found -1"),
        (lambda m: ReplacementPlan.fit(ACTIVATION, 1, "halved"), "form: found 'halved', expected one of split"),
        (lambda m: ReplacementPlan(((0, 1),), ((1, 2),)), "layer 0: hot"),
        (lambda m: ReplacementPlan(((0,), (3, 3)), ((1,), (4, 5))), "layer 1: hot"),
        (lambda m: ReplacementPlan(((0, 1),), ((2,),)), "layer 0: hot"),
        (lambda m: ReplacementPlan(((0,), (1,)), ((2,),)), "2 layers of hot experts, 1 of cold"),
        (lambda m: apply_to(m, ReplacementPlan(((0,),), ((1,),))), "plan: 1 layers, the model has 2 MoE layers"),
        (lambda m: apply_to(m, ReplacementPlan(((0,), (8,)), ((1,), (2,)))), "layer 1: expert 8 is not among"),
        (lambda m: apply_to(m, ReplacementPlan(((0,), (1,)), ((-1,), (2,)))), "layer 0: expert -1 is not among"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(olmoe, bits, attempt, message):
    before = bits(olmoe)
    with pytest.raises(InputError) as error:
        attempt(olmoe)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert bits(olmoe) == before


def test_too_few_experts_to_choose_from_are_refused(olmoe):
    for _, block in moe_layers(olmoe):
        block.gate.top_k = 7
    with pytest.raises(InputError, match="8 experts less 2 replaced are fewer than top-k = 7"):
        apply_to(olmoe, some_plan(olmoe))


# The slots.


def test_a_copy_has_the_errors_of_its_own_cells(olmoe):
    path = moe_layers(olmoe)[0][0] + ".experts"
    plan = ReplacementPlan(((2,), (0,)), ((5,), (1,)))
    for name in (f"{path}.gate_up_proj", f"{path}.down_proj"):
        p = olmoe.get_parameter(name)
        clean = p.clone()
        with program(olmoe, NOISE, 4):
            vanilla = p.clone()
            with apply(olmoe, plan):
                assert torch.equal(p[5], NOISE.realise(slot_name(name, 5), clean[2], 4))
                copy, original = p[5] / clean[2] - 1, p[2] / clean[2] - 1
                untouched = [i for i in range(8) if i != 5]
                assert torch.equal(p[untouched], vanilla[untouched])
            assert torch.equal(p, vanilla)
        assert torch.equal(p, clean)
        torch.testing.assert_close(copy, vanilla[5] / clean[5] - 1, atol=1e-5, rtol=0)  # the cells' errors stay theirs
        r = torch.corrcoef(torch.stack([copy.flatten(), original.flatten()]))[0, 1]
        assert abs(r) < 4 / math.sqrt(copy.numel())
        assert abs(copy.std() / 0.1 - 1) < 4 / math.sqrt(2 * copy.numel())


@pytest.mark.parametrize("form", ["split", "literal"])
def test_replacement_leaves_no_trace(model, bits, logits, form):
    before, clean = bits(model), logits(model)
    with program(model, NOISE):
        noisy, out = bits(model), logits(model)
        with apply(model, some_plan(model, 2, form)):
            assert bits(model) != noisy and not torch.equal(logits(model), out)
        assert bits(model) == noisy and torch.equal(logits(model), out)
    assert bits(model) == before and torch.equal(logits(model), clean)


def test_replacement_changes_no_parameter_but_the_routed_experts(model, bits):
    before = bits(model)
    with apply(model, some_plan(model)):
        after = bits(model)
    experts = {f"{path}.experts.{t}" for path, _ in moe_layers(model) for t in ("gate_up_proj", "down_proj")}
    assert {name for name in before if before[name] != after[name]} == experts


# What is computed.


def expert(block, slot: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (block.experts.gate_up_proj[slot].double() @ x.double()).chunk(2)
    return block.experts.down_proj[slot].double() @ (gate * torch.sigmoid(gate) * up)


def reference(block, x: torch.Tensor, hot: tuple, cold: tuple, form: str) -> torch.Tensor:
    """Eq. 8 as printed, or masked cold experts, and eq. 9, for one token and the weights as they are: [H] float64.

    NaN where the k-th and the next expert are equal, as eq. 8 makes all cold ones: the paper does not say who wins."""
    copy_of = dict(zip(hot, cold, strict=True))
    z = (block.gate.weight @ x).double().tolist()
    if form == "literal":
        z = [v / 2 if i in hot else 0.0 if i in cold else v for i, v in enumerate(z)]  # eq. 8
        p = [math.exp(v) for v in z]
    else:
        p = [0.0 if i in cold else math.exp(v) for i, v in enumerate(z)]
    p = [v / sum(p) for v in p]
    ranked, k = sorted(range(len(p)), key=lambda i: -p[i]), block.gate.top_k
    if p[ranked[k - 1]] == p[ranked[k]]:
        return torch.full_like(x, math.nan, dtype=torch.float64)
    chosen = ranked[:k]
    scale = 1 / sum(p[i] for i in chosen) if block.gate.norm_topk_prob else 1.0
    out = torch.zeros_like(x, dtype=torch.float64)
    for i in chosen:
        slots = (i, copy_of[i]) if i in hot else (i,)
        for slot in slots:
            out += scale * p[i] / len(slots) * expert(block, slot, x)  # eq. 9
    return out


@pytest.mark.parametrize("form", ["split", "literal"])
@pytest.mark.parametrize("n", [1, 4])
def test_noisy_replacement_is_eq_8_and_9_token_by_token(model, form, n):
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(9))
    plan = some_plan(model, n, form)
    with program(model, NOISE), apply(model, plan):
        for layer, (_, block) in enumerate(moe_layers(model)):
            _, weights, indices = block.gate(x)
            found = block.experts(x, indices, weights).double()
            expected = torch.stack([reference(block, v, plan.hot[layer], plan.cold[layer], form) for v in x])
            decided = expected.isfinite().all(-1)
            assert decided.sum() >= 20 and (form == "literal" or decided.all())
            torch.testing.assert_close(found[decided], expected[decided], atol=1e-4, rtol=1e-4)
            assert set(plan.hot[layer]) & set(indices.flatten().tolist())


def test_without_noise_split_only_loses_the_cold_experts(model, logits):
    plan, handles = some_plan(model), []
    for layer, (_, block) in enumerate(moe_layers(model)):

        def without_cold(gate, args, output, cold=plan.cold[layer]):
            z = output[0].clone()
            z[:, list(cold)] = -math.inf
            p, chosen = z.softmax(-1).topk(gate.top_k)
            return z, p / p.sum(-1, keepdim=True) if gate.norm_topk_prob else p, chosen

        handles.append(block.gate.register_forward_hook(without_cold))
    expected = logits(model)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(logits(model), expected, atol=0.1)
    with apply(model, plan):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_zero_logit_is_not_an_excluded_expert(olmoe):
    """A finding about eq. 8 as printed: cold experts are still chosen, where they now hold copies; split has none."""
    literal, split = some_plan(olmoe, 2, "literal"), some_plan(olmoe, 2)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(12))
    _, block = moe_layers(olmoe)[0]
    cold = torch.tensor(literal.cold[0])
    with apply(olmoe, literal):
        z, _, indices = block.gate(x)
        assert (z[:, cold] == 0).all() and torch.isin(indices[:, : block.gate.top_k], cold).any()
    with apply(olmoe, split):
        z, _, indices = block.gate(x)
        assert (z[:, cold] == -math.inf).all() and not torch.isin(indices[:, : block.gate.top_k], cold).any()


def test_a_second_copy_halves_the_variance_of_a_hot_experts_error(olmoe):
    """At small σ, where the output's error is linear in the weights'; the tolerance is four standard errors."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(11))
    plan = ReplacementPlan(((2,), (2,)), ((5,), (5,)))
    one, index = torch.ones(16, 1), torch.full((16, 1), 2)
    two = split_over_copies(one, index, torch.tensor([2]), torch.tensor([5]), 8)
    experts = moe_layers(olmoe)[0][1].experts
    clean, errors = experts(x, index, one), []
    for r in range(300):
        with program(olmoe, NoiseModel(0.005), r), apply(olmoe, plan):
            outputs = experts(x, index, one), experts(x, two[1], two[0])
        errors.append([(y - clean).square().mean().item() for y in outputs])
    single, double = torch.tensor(errors, dtype=torch.float64).T
    tolerance = 4 * (double - 0.5 * single).std() / math.sqrt(len(errors)) / single.mean()
    assert tolerance < 0.1
    assert abs(double.mean() / single.mean() - 0.5) < tolerance


def test_copies_are_traded_only_where_the_expected_loss_says_that_they_pay():
    noise = torch.tensor([[1.0, 8.0, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    absence = torch.tensor([[2.0, 9.0, 5.0, 0.1], [0.6, 9.0, 9.0, 9.0]])
    plan = ReplacementPlan.trade(noise, absence, 2)
    assert plan.hot == ((1,), ()) and plan.cold == ((3,), ())  # 3 / 2 < 2: the second pair would not pay
    cheap = ReplacementPlan.trade(noise, absence / 10, 2)
    assert cheap.hot == ((1, 2), (1,)) and cheap.cold == ((3, 0), (0,))  # 1 / 2 < 0.9
    assert ReplacementPlan.trade(noise, absence / 10, 1).n_replace == 1
    full = ReplacementPlan.trade(noise, absence * 0, 4)
    assert all(sorted((*h, *c)) == [0, 1, 2, 3] for h, c in zip(full.hot, full.cold, strict=True))


def test_what_an_expert_s_noise_and_absence_cost(model, ids):
    """Noise goes with its variance and an expert that nobody chooses costs nothing; a layer without copies routes as
    before."""
    moments = collect(model, ids, 64)
    weights = weigh(model, ids, moments, Placement(), 64)
    noisy, absent = experts(model, NoiseModel(0.1), 0, moments, weights)
    twice, same = experts(model, NoiseModel(0.2), 0, moments, weights)
    torch.testing.assert_close(twice, 4 * noisy, rtol=1e-4, atol=0)
    assert same.equal(absent) and (noisy >= 0).all() and noisy.shape == absent.shape
    path, block = moe_layers(model)[0]
    block.experts.down_proj.data[1] = 0
    weights[f"{path}.experts.gate_up_proj"][1] = 0  # its gradients vanish with its outputs
    noisy, absent = experts(model, NoiseModel(0.1), 0, moments, weights)
    assert noisy[0, 1] == 0 and absent[0, 1] == 0
    plan = ReplacementPlan.trade(noisy, absent, 1)
    assert plan.cold[0] == (1,)
    with apply(model, plan):
        assert model(ids[None, :64], use_cache=False).logits.isfinite().all()
