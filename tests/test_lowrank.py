"""Low-rank paths take out what they can at their rank, where it counts, within their budget."""

import math

import pytest
import torch

from romer import methods
from romer.compensation import Compensated
from romer.corrections import Affine, Chain
from romer.cost import cost
from romer.encoding import Layout, Replicated
from romer.errors import InputError
from romer.lowrank import LowRank, allocate, leading, spectra
from romer.moments import Moments, collect
from romer.noise import Drift, NoiseModel, slot_name
from romer.placement import Placement, coverage
from romer.programming import program, rewrite_slots
from romer.routers import moe_layers
from romer.sensitivity import collect as weigh

NOISE = NoiseModel(0.15)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs, seed=1, tokens=4000):
    """Moments of inputs that lie near a few directions, as those of a language model do."""
    x = random(tokens, 5, seed=seed) @ random(5, inputs, seed=seed + 1) + 0.1 * random(tokens, inputs, seed=seed + 2)
    return Moments(x.T @ x / tokens, x.mean(0), tokens)


def energy(error, seen, weight=None):
    """Σ_o γ_o E[(Δ x)_o²]."""
    rows = (error.double() @ seen.second.double() * error.double()).sum(1)
    return (rows * (1.0 if weight is None else weight.double())).sum().item()


def best(error, seen, weight, rank):
    """What is left by the best path of that rank: the tail of the weighted singular values (Eckart and Young)."""
    values, vectors = torch.linalg.eigh(seen.second.double())
    root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.svdvals(weight.double().sqrt()[:, None] * error.double() @ root)[rank:].square().sum().item()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_path_leaves_what_the_best_of_its_rank_leaves(rank):
    seen, error, weight = correlated(48), random(30, 48, seed=5), random(30, seed=6).square() + 0.1
    values, path = leading("w", error, {"w": seen}, weight, rank)
    left = energy(error - path.of(error), seen, weight)
    assert best(error, seen, weight, rank) <= left * (1 + 1e-6)  # the path is float32
    assert left <= best(error, seen, weight, rank) * 1.02
    assert values.sum().item() == pytest.approx(energy(error, seen, weight) - left, rel=0.02)
    assert torch.linalg.matrix_rank(path.of(error).double(), rtol=1e-5) == rank


def test_outputs_that_count_more_are_corrected_more():
    seen, error = correlated(48), random(30, 48, seed=5)
    left = {}
    for case, weight in (("even", torch.ones(30)), ("first", torch.ones(30) + 99 * (torch.arange(30) < 5))):
        _, path = leading("w", error, {"w": seen}, weight, 2)
        left[case] = energy((error - path.of(error))[:5], seen)
    assert left["first"] < 0.8 * left["even"]


def test_experts_that_read_the_same_share_a_path_as_one_stacked_matrix_does():
    seen, error = correlated(24), random(6, 8, 24, seed=7)
    moments = {slot_name("m.experts.gate_up_proj", i): seen for i in range(6)}
    _, stacked = leading("w", error.flatten(0, 1), {"w": seen}, None, 3)
    _, path = leading("m.experts.gate_up_proj", error, moments, None, 3)
    expected = stacked.of(error.flatten(0, 1)).unflatten(0, (6, 8))
    found = torch.stack([path.of(e) for e in error])
    left, most = energy((error - found).flatten(0, 1), seen), energy((error - expected).flatten(0, 1), seen)
    assert left == pytest.approx(most, rel=0.02)


def test_experts_that_are_summed_share_the_outputs_of_a_path():
    name = "m.experts.down_proj"
    error, seen = random(6, 24, 8, seed=8), [correlated(8, seed=10 + i) for i in range(6)]
    moments = {slot_name(name, i): m for i, m in enumerate(seen)}
    _, path = leading(name, error, moments, None, 3)
    taken = torch.stack([path.of(e) for e in error])
    assert torch.linalg.matrix_rank(torch.cat(list(taken), 1).double(), rtol=1e-5) == 3
    before = sum(energy(e, m) for e, m in zip(error, seen, strict=True))
    left = sum(energy(e - t, m) for e, t, m in zip(error, taken, seen, strict=True))
    root = [m.second.double() for m in seen]
    total = sum(e.double() @ r @ e.double().T for e, r in zip(error, root, strict=True))
    floor = torch.linalg.eigvalsh(total)[:-3].sum().item()
    assert floor <= left * (1 + 1e-9) and left <= 1.02 * floor and left < before


def test_a_path_of_experts_that_are_summed_weighs_how_they_go_together():
    name = "m.experts.down_proj"
    error, whole = random(6, 24, 8, seed=8), correlated(48)
    cuts = [slice(8 * i, 8 * i + 8) for i in range(6)]
    moments = {slot_name(name, i): Moments(whole.second[c, c], whole.mean[c], 4000) for i, c in enumerate(cuts)}
    values, path = leading(name, error, moments | {f"{name}[:]": whole}, None, 3)
    side = error.transpose(0, 1).flatten(1)
    left = energy(side - torch.cat([path.of(e) for e in error], 1), whole)
    total = torch.linalg.eigvalsh(side.double() @ whole.second.double() @ side.double().T)
    assert total[:-3].sum().item() * (1 - 1e-6) <= left <= 1.02 * total[:-3].sum().item()
    torch.testing.assert_close(values.double(), total.flip(0)[:3], rtol=0.02, atol=0)
    one_by_one = leading(name, error, moments, None, 3)[1]
    assert left < 0.9 * energy(side - torch.cat([one_by_one.of(e) for e in error], 1), whole)


@pytest.fixture
def fitted(model, ids):
    moments = collect(model, ids, 64, 2)
    weights = weigh(model, ids, moments, Placement(), 64)
    return methods.Fitted(
        torch.rand(2, 8, generator=torch.Generator().manual_seed(1)),
        2,
        0.1,
        None,
        moments,
        weights,
        NOISE,
        Placement(),
        99,
    )


def test_sensitivity_is_the_fisher_information_of_outputs(model, ids, fitted):
    """Against the gradients of layers' outputs: their mean squares, up to what tokens of one window have in common."""
    squares = {}

    def keep(name):
        def hook(module, args, y):
            y.register_hook(lambda g: squares.update({name: squares.get(name, 0) + g.double().square().sum().item()}))

        return hook

    model.get_input_embeddings().weight.requires_grad_(True)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head}
    handles = [m.register_forward_hook(keep(n)) for n, m in linear.items()]
    for row in ids.view(-1, 64):
        logits = model(row[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    [h.remove() for h in handles]
    expected = torch.tensor([squares[n] for n in linear]) / (len(ids) // 64 * 63)
    found = torch.tensor([fitted.sensitivity[f"{n}.weight"].sum().item() for n in linear])
    assert ((found / expected).log().abs() < math.log(6)).all()
    assert torch.corrcoef(torch.stack([found.log(), expected.log()]))[0, 1] > 0.8


def test_sensitivity_leaves_the_model_alone(model, ids, bits):
    before, wanted = bits(model), [p.requires_grad for p in model.parameters()]
    weigh(model, ids, collect(model, ids, 64, 2), Placement(), 64)
    assert bits(model) == before and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match="sensitivity: no calibration inputs of model"):
        weigh(model, ids, {}, Placement(), 64)


def test_a_budget_is_kept_and_spent_where_it_is_worth_most():
    gains = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 0.5]), "m.experts.down_proj": torch.ones(1)}
    shapes = {"a": (10, 10), "b": (10, 10), "m.experts.down_proj": (4, 10, 5)}
    assert allocate(gains, shapes, 0.0) == ()
    assert allocate(gains, shapes, 50 / 400) == (("a", 1), ("b", 1))
    assert dict(allocate(gains, shapes, 1.0)) == {"a": 3, "b": 2, "m.experts.down_proj": 1}
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match="budget: found"):
            allocate(gains, shapes, share)


def test_uniform_ranks_are_alike_within_the_budget():
    gains = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.full((3,), 0.1), "m.experts.down_proj": torch.ones(3)}
    shapes = {"a": (10, 10), "b": (10, 10), "m.experts.down_proj": (4, 10, 5)}
    prices = {"a": 20, "b": 20, "m.experts.down_proj": 30}
    for numbers in (70, 100, 140, 210):
        ranks = dict(allocate(gains, shapes, numbers / 400, "uniform"))
        spent = sum(prices[name] * rank for name, rank in ranks.items())
        assert numbers - 30 < spent <= numbers and max(ranks.values()) - min(ranks.values()) <= 1
    assert dict(allocate(gains, shapes, 70 / 400, "loss")) == {"a": 3}
    with pytest.raises(InputError, match="ranks: found 'even', expected one of loss, uniform"):
        allocate(gains, shapes, 0.1, "even")


def layout_of(name, model, fitted, **options):
    method = methods.get(name)
    return method.layout(model, fitted, method.options(fitted, options))


@pytest.mark.parametrize("name", ["low_rank", "romer_plus"])
def test_what_a_path_costs_is_within_its_budget(model, fitted, name):
    method, found = methods.get(name), {}
    for budget in (0.0, 0.05, 0.2):
        found[budget] = cost(method, model, Placement(), fitted, method.options(fitted, {"budget": budget}))
        assert found[budget].cells == 1 and found[budget].side <= budget
    assert found[0.0].side == 0 and 0.1 < found[0.2].side and found[0.05].side > 0.02
    assert found[0.2].operations > found[0.05].operations > 0


def weighted(model, fitted, layout, realisation=0):
    """The expected loss of the programmed errors to second order, without its ½."""
    clean = {
        row.parameter: model.get_parameter(row.parameter).clone() for row in coverage(model, Placement()) if row.analog
    }
    total = 0.0
    with program(model, NOISE, realisation, layout=layout):
        for name, w in clean.items():
            error, weight = model.get_parameter(name) - w, fitted.sensitivity[name]
            arrays = (
                [(name, error, weight)]
                if error.dim() == 2
                else [(slot_name(name, i), e, g) for i, (e, g) in enumerate(zip(error, weight, strict=True))]
            )
            total += sum(energy(e, fitted.moments[n], g) for n, e, g in arrays)
    return total


def test_more_budget_leaves_less_error_and_compensation_less_still(model, fitted):
    left = [weighted(model, fitted, layout_of("low_rank", model, fitted, budget=b)) for b in (0.0, 0.02, 0.1, 0.3)]
    assert left == sorted(left, reverse=True) and left[3] < 0.7 * left[0]
    assert left[0] == pytest.approx(weighted(model, fitted, Layout()), rel=1e-6)
    plus = weighted(model, fitted, layout_of("romer_plus", model, fitted, budget=0.1, block=8))
    assert plus < left[2] and plus < weighted(model, fitted, Layout(Compensated(fitted.moments, 8)))
    assert left[2] < weighted(model, fitted, layout_of("low_rank", model, fitted, budget=0.1, ranks="uniform"))


def test_where_the_rank_goes_is_decided_once_and_without_the_reported_noise(model, fitted, monkeypatch):
    import romer.lowrank

    seen = []
    monkeypatch.setattr(romer.lowrank, "realise", lambda *args: seen.append(args[-1]) or args[3])
    for budget in (0.1, 0.2):
        layout_of("low_rank", model, fitted, budget=budget)
    assert set(seen) == {99} and len(seen) == sum(row.analog for row in coverage(model, Placement()))


def test_bad_readings_cost_and_are_drawn_apart(model, fitted):
    exact = weighted(model, fitted, layout_of("low_rank", model, fitted, budget=0.3))
    noisy, blind = (
        weighted(model, fitted, layout_of("low_rank", model, fitted, budget=0.3, read_error=e)) for e in (0.05, 1.0)
    )
    assert exact < noisy < weighted(model, fitted, Layout())
    assert blind < 1.05 * weighted(model, fitted, Layout())
    with pytest.raises(InputError, match="read_error: found -0.1"):
        layout_of("low_rank", model, fitted, read_error=-0.1)


@pytest.mark.parametrize("read_error", [0.02, 1.0])
def test_what_was_shifted_on_purpose_is_not_taken_for_an_error(model, fitted, read_error):
    """Behind compensated programming a path takes out what went wrong, not what was written to make up for it."""
    alone, with_paths = (
        weighted(model, fitted, layout_of(name, model, fitted, read_error=read_error, **more))
        for name, more in (("compensated_programming", {}), ("romer_plus", {"budget": 0.3}))
    )
    assert with_paths < (1.0 if read_error < 1 else 1.05) * alone


def test_readings_of_other_layouts_are_refused(model, fitted):
    layout = Layout(Replicated(2), correction=Affine(fitted.moments), read_error=0.01)
    with pytest.raises(InputError, match="Replicated"):
        weighted(model, fitted, layout)


def test_a_path_that_is_not_refitted_does_not_know_of_drift(model, fitted, monkeypatch):
    drifting = NoiseModel(0.15, errors=(Drift(0.1, 0.02, 86400.0),))
    monkeypatch.setattr("tests.test_lowrank.NOISE", drifting)
    now, then = (
        weighted(model, fitted, layout_of("low_rank", model, fitted, budget=0.3, refit=r)) for r in (True, False)
    )
    assert now < then


def test_a_copied_expert_gets_the_path_of_its_own_slot(olmoe, ids, bits):
    moments = collect(olmoe, ids, 64, 2)
    ((path, block), *_) = moe_layers(olmoe)
    names = [f"{path}.experts.{t}" for t in ("gate_up_proj", "down_proj")]
    correction = LowRank(moments, {}, tuple((n, 2) for n in names))
    before = bits(olmoe)
    with program(olmoe, NOISE, layout=Layout(correction=correction)) as array:
        own = [olmoe.get_parameter(n)[6].clone() for n in names]
        with rewrite_slots(olmoe, {f"{path}.experts": {6: 1}}):
            for n in names:
                clean = array.clean[n][1]
                stored = NOISE.realise(f"{n}[6]", clean, 0)
                weight, _ = correction(f"{n}[6]", clean, stored, stored, array.shared[n])
                assert olmoe.get_parameter(n)[6].equal(weight) and not weight.equal(stored)
        assert all(olmoe.get_parameter(n)[6].equal(w) for n, w in zip(names, own, strict=True))
    assert bits(olmoe) == before


def test_a_chain_fits_every_link_to_what_is_left():
    seen, clean = correlated(24), random(12, 24, seed=3)
    moments = {"w": seen}
    stored = NOISE.realise("w", clean, 0)
    low, affine = LowRank(moments, {}, (("w", 2),)), Affine(moments, "channel")
    chain = Chain((low, affine))
    found, offset = chain("w", clean, stored, stored, chain.shared("w", clean, stored))
    first, _ = low("w", clean, stored, stored, low.shared("w", clean, stored))
    expected, shift = affine("w", clean, first)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(offset, shift)
    assert chain.numbers("w", 12, 24) == (2 * 12 + 2 * 12, 2 * 24)


def test_spectra_need_calibration_inputs(model, fitted):
    with pytest.raises(InputError, match="low-rank path: no calibration inputs of model"):
        spectra(model, NOISE, 0, Placement(), Layout().encoding, {}, {})
    blind = methods.Fitted(fitted.activation, 2, 0.1)
    with pytest.raises(InputError, match="nothing is known of the noise"):
        layout_of("low_rank", model, blind)
