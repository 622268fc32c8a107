"""Compensated programming: less output error at the same cells, and the plain layout where it can do nothing."""

import math
from dataclasses import replace

import pytest
import torch

from romer.chips.pcm import Pcm
from romer.compensation import SHRINKAGE, SHRINKAGE_TOGETHER, Compensated, edges, factor
from romer.corrections import Affine
from romer.encoding import PLAIN, Layout, realise
from romer.errors import InputError
from romer.moments import PRIOR_TOKENS, Moments, collect, together
from romer.noise import ColumnGain, Conductance, Draws, NoiseModel
from romer.programming import Programmed, program

SIGMA = 0.1
NOISE = NoiseModel(SIGMA)
WEIGHT = torch.randn(60, 96, generator=torch.Generator().manual_seed(0))


def correlated(inputs=96, rank=6, tokens=4000, seed=1):
    """Moments of inputs that lie near a few directions, as those of a language model do."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, inputs, generator=g)
    x = x + 0.2 * torch.randn(tokens, inputs, generator=g)
    return Moments(x.T @ x / tokens, x.mean(0), tokens)


SEEN = correlated()


def loss(weight, seen=SEEN):
    """E‖(W̃ - W) x‖²."""
    error = (weight - WEIGHT).double()
    return (error @ seen.second.double() * error).sum().item()


def acts(encoding, noise=NOISE, realisation=0):
    return realise(encoding, noise, "w", WEIGHT, realisation)


def test_the_factor_is_that_of_the_inverse_in_the_order_of_power():
    order, upper = factor(SEEN)
    power = SEEN.power[order]
    assert (power[1:] <= power[:-1]).all() and not upper.tril(-1).any()
    r = SEEN.second[order][:, order].double()
    r.diagonal().mul_(1 + SHRINKAGE * 96 / (4000 + PRIOR_TOKENS))
    torch.testing.assert_close(upper.double().T @ upper.double() @ r, torch.eye(96).double(), rtol=0, atol=1e-3)


def test_a_block_has_no_more_inputs_than_stand_before_it():
    assert edges(70, 32) == [0, 1, 2, 4, 8, 16, 32, 64, 70]
    assert edges(9, 2) == [0, 1, 2, 4, 6, 8, 9] and edges(1, 32) == [0, 1]


@pytest.mark.parametrize("tokens", [4, 4000])
def test_later_columns_take_the_least_squares_share_of_an_error(tokens):
    """Against the closed form: with two inputs, the second is -δ R₁₂ / R₂₂ away from its clean target, R₂₂ larger where
    it was seen in few tokens."""
    seen, noise = correlated(inputs=2, seed=3), NoiseModel(0.3)
    seen = Moments(seen.second, seen.mean, tokens)
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(4))
    found = Compensated({"w": seen}).store(noise, weight, Draws(0, 0, "w"))
    first, second = factor(seen)[0].tolist()
    share = seen.second[0, 1] / (seen.second[second, second] * (1 + SHRINKAGE * 2 / (tokens + PRIOR_TOKENS)))
    epsilon = 0.3 * Draws(0, 0, "w").normal("device", weight)
    error = weight[:, first] * epsilon[:, first]
    torch.testing.assert_close(found[:, first], weight[:, first] + error, rtol=1e-5, atol=1e-6)
    wanted = weight[:, second] - error * share
    torch.testing.assert_close(found[:, second], wanted * (1 + epsilon[:, second]), rtol=1e-4, atol=1e-5)


def test_one_input_that_carries_most_of_the_power_is_read_back_alone():
    """As a massive activation does: its error is made up for in inputs that would share its block otherwise."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 1, generator=g) * torch.tensor([[30.0] + [1.0] * 31])
    x = x + 0.3 * torch.randn(4000, 32, generator=g)
    seen = Moments(x.T @ x / 4000, x.mean(0), 4000)
    weight = torch.randn(20, 32, generator=g)

    def left(encoding):
        wrong = (realise(encoding, NOISE, "w", weight, 0) - weight).double()
        return (wrong @ seen.second.double() * wrong).sum()

    assert left(Compensated({"w": seen}, block=32)) < 0.1 * left(PLAIN)


@pytest.mark.parametrize("block", [1, 8, 32])
def test_it_undoes_most_of_the_output_error_of_correlated_inputs(block):
    plain, found = loss(acts(PLAIN)), loss(acts(Compensated({"w": SEEN}, block)))
    assert found < 0.5 * plain


def test_independent_inputs_leave_nothing_to_do():
    flat = Moments(torch.eye(96), torch.zeros(96), 1000)
    torch.testing.assert_close(acts(Compensated({"w": flat})), acts(PLAIN), rtol=1e-5, atol=1e-6)


def test_no_noise_is_the_clean_weight():
    torch.testing.assert_close(acts(Compensated({"w": SEEN}), NoiseModel(0.0)), WEIGHT)


def test_errors_of_the_read_back_take_some_of_it_away():
    exact, noisy, blind = (loss(acts(Compensated({"w": SEEN}, 8, e))) for e in (0.0, 0.02, 1.0))
    assert exact < noisy < loss(acts(PLAIN))
    assert blind < 1.05 * loss(acts(PLAIN))  # a read-back that says nothing changes next to nothing


@pytest.mark.parametrize("scaling", ["tensor", "column"])
def test_measured_cells_keep_their_draws_and_their_range(scaling):
    pairs = Conductance(lambda g, draws, kind: g + 0.8 * draws.normal(kind, g), 0.0, 25.0, scaling)
    noise = NoiseModel(errors=(pairs,))
    assert loss(acts(Compensated({"w": SEEN}, 8), noise)) < 0.5 * loss(acts(PLAIN, noise))
    flat = Moments(torch.eye(96), torch.zeros(96), 1000)  # nothing can be made up for
    torch.testing.assert_close(acts(Compensated({"w": flat}, 96), noise), acts(PLAIN, noise), rtol=1e-5, atol=1e-5)


def test_cells_that_drift_later_are_compensated_as_written():
    pcm = Conductance(Pcm(seconds=86400.0), 0.0, 25.0, compensate=True)
    noise = NoiseModel(errors=(pcm,))
    assert loss(acts(Compensated({"w": SEEN}, 8), noise)) < loss(acts(PLAIN, noise))


def test_experts_and_copied_slots_are_compensated_one_by_one(model, ids, bits):
    moments, before = collect(model, ids, 64), bits(model)
    with program(model, NOISE, layout=Layout(Compensated(moments))):
        assert all(p.isfinite().all() for p in model.parameters())
        assert bits(model) != before
    assert bits(model) == before


@pytest.mark.parametrize("scaling", ["tensor", "column"])
@pytest.mark.parametrize("read_error", [0.0, 0.02])
@pytest.mark.parametrize("inputs", ["the same", "their own"])
def test_slots_are_written_together_as_one_by_one(scaling, read_error, inputs):
    """Also what is known of them: slots of other sizes, each with the range and the groups of its own array."""
    moments = {"w": SEEN}
    if inputs == "their own":
        moments = {f"w[{i}]": correlated(seed=10 + i) for i in range(3)}
    slots = torch.stack([WEIGHT, 3 * WEIGHT.flip(0), 0.1 * WEIGHT.flip(1)])
    pcm = NoiseModel(errors=(Conductance(Pcm(seconds=3600.0), 0.0, 25.0, scaling, compensate=True),))
    draws = [Draws(0, 0, f"w[{i}]") for i in range(3)]
    for noise in (NOISE, pcm):
        all_slots, alone = Compensated(moments, 16, read_error), Compensated(moments, 16, read_error)
        found = all_slots.store_slots(noise, slots, draws)
        for w, d, acts in zip(slots, draws, found, strict=True):
            torch.testing.assert_close(acts, alone.store(noise, w, d), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(all_slots.known(noise, w, d), alone.known(noise, w, d), rtol=1e-4, atol=1e-4)
    assert not found[0].equal(found[1])


def side_by_side(count=3, inputs=8, tokens=4000, seed=3):
    """Moments of the inputs of slots whose outputs are summed: of each, and of all side by side."""
    whole = correlated(count * inputs, tokens=tokens, seed=seed)
    cuts = [slice(i * inputs, (i + 1) * inputs) for i in range(count)]
    parts = {f"w[{i}]": Moments(whole.second[c, c], whole.mean[c], tokens) for i, c in enumerate(cuts)}
    return parts | {"w[:]": whole}, [Draws(0, 0, name) for name in parts]


def test_a_summed_expert_takes_its_share_of_the_error_of_a_busier_one():
    """Against the closed form, with one input each."""
    moments, draws = side_by_side(2, 1)
    slots = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(4))
    found = Compensated(moments).store_slots(NoiseModel(0.3), slots, draws)
    r = moments["w[:]"].second
    first = int(r[1, 1] > r[0, 0])
    error = found[first] - slots[first]
    epsilon = 0.3 * torch.stack([d.normal("device", w) for d, w in zip(draws, slots, strict=True)])
    torch.testing.assert_close(error, slots[first] * epsilon[first], rtol=1e-4, atol=1e-6)
    other = 1 - first
    share = r[0, 1] / (r[other, other] * (1 + SHRINKAGE_TOGETHER * 2 / (4000 + PRIOR_TOKENS)))
    wanted = slots[other] - error * share
    torch.testing.assert_close(found[other], wanted * (1 + epsilon[other]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read_error", [0.0, 0.02])
@pytest.mark.parametrize("block", [3, 32])
@pytest.mark.parametrize("scaling", ["tensor", "column"])
def test_experts_that_are_summed_lose_less_when_they_make_up_for_one_another(block, read_error, scaling):
    """Their sum is nearer than where each makes up for itself, each with the draws and the range of its own cells."""
    moments, draws = side_by_side()
    own = {name: m for name, m in moments.items() if name != "w[:]"}
    slots = torch.stack([WEIGHT[:, :8], 2 * WEIGHT[:, 8:16], 0.5 * WEIGHT[:, 16:24]])
    pcm = NoiseModel(errors=(Conductance(Pcm(read=False), 0.0, 25.0, scaling, compensate=True),))
    for noise in (NOISE, pcm):
        left = {}
        for name, known in (("alone", own), ("together", moments)):
            encoding, left[name] = Compensated(known, block, read_error), 0.0
            for realisation in range(5):
                these = [replace(d, realisation=realisation) for d in draws]
                found = encoding.store_slots(noise, slots, these)
                error = (found - slots).transpose(0, 1).flatten(1).double()
                left[name] += (error @ moments["w[:]"].second.double() * error).sum().item()
        assert left["together"] < 0.9 * left["alone"]
        written = [encoding.latest[d] for d in these]
        assert all(at.known.shape == w.shape for at, w in zip(written, slots, strict=True))
        if noise is pcm:
            assert all(at.targets.abs().max() <= 1.0001 * w.abs().max() for at, w in zip(written, slots, strict=True))
    again = Compensated(moments, block, read_error)
    assert again.store_slots(noise, slots, these).equal(found)
    assert again.store(noise, slots[0], draws[0]).equal(
        Compensated(own, block, read_error).store(noise, slots[0], draws[0])
    )


def test_experts_that_never_go_together_are_on_their_own():
    moments, draws = side_by_side()
    moments["w[:]"] = replace(moments["w[:]"], second=torch.block_diag(*(moments[f"w[{i}]"].second for i in range(3))))
    moments |= {d.tensor: replace(moments[d.tensor], tokens=10**9) for d in draws}
    slots = torch.stack([WEIGHT[:, :8], WEIGHT[:, 8:16], WEIGHT[:, 16:24]])
    own = {name: m for name, m in moments.items() if name != "w[:]"}
    found = Compensated(moments, 1).store_slots(NOISE, slots, draws)
    torch.testing.assert_close(found, Compensated(own, 1).store_slots(NOISE, slots, draws), rtol=1e-3, atol=1e-4)


def test_how_experts_go_together_is_that_of_what_is_summed(olmoe, ids):
    """Against the activations of each, times the weights of the router."""
    moments, seen = collect(olmoe, ids, 64, 2, all_pairs=True), []
    experts = olmoe.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        olmoe.model(ids.view(4, 64), use_cache=False)
    handle.remove()
    (x, index, weights), (count, _, inner) = seen[0], experts.down_proj.shape
    sides = torch.zeros(len(x), count, inner)
    for slot, w in enumerate(experts.gate_up_proj):
        gates = torch.where(index == slot, weights, 0).sum(1, keepdim=True)
        sides[:, slot] = gates * experts._apply_gate(x @ w.T)
    found = together(moments, "model.layers.0.mlp.experts.down_proj")
    expected = sides.flatten(1).T @ sides.flatten(1) / len(x)
    apart = torch.block_diag(*torch.ones(count, inner, inner)) == 0
    torch.testing.assert_close(found.second[apart], expected[apart], rtol=1e-3, atol=1e-9)
    leaning = (found.second - expected).diagonal()
    assert (leaning >= -1e-9).all() and leaning.sum() > 0
    torch.testing.assert_close(found.mean, sides.flatten(1).mean(0), rtol=1e-3, atol=1e-7)
    plain = collect(olmoe, ids, 64, 2)
    assert set(moments) - set(plain) == {f"model.layers.{i}.mlp.experts.down_proj[:]" for i in range(2)}
    assert all(plain[name].second.equal(moments[name].second) for name in plain)


def test_arrays_of_few_inputs_have_several_blocks():
    few = Compensated({"w": SEEN}, block=96, least_blocks=4)
    assert acts(few).equal(acts(Compensated({"w": SEEN}, block=24))) and loss(acts(few)) < loss(acts(PLAIN))
    with pytest.raises(InputError, match="least_blocks: found 0"):
        Compensated(least_blocks=0)


def test_it_lowers_the_error_of_a_layer_of_a_model(olmoe, ids):
    moments, seen = collect(olmoe, ids, 64), []
    linear = olmoe.model.layers[1].self_attn.o_proj
    handle = linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        olmoe.model(ids.view(4, 64), use_cache=False)
    handle.remove()
    y = linear(seen[0])
    errors = []
    for encoding in (PLAIN, Compensated(moments, 4)):
        with program(olmoe, NOISE, layout=Layout(encoding)):
            errors.append((linear(seen[0]) - y).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Compensated(block=0), "block: found 0"),
        (lambda: Compensated(read_error=-0.1), "read_error: found -0.1"),
        (lambda: Compensated(read_error=math.nan), "read_error: found nan"),
        (lambda: acts(Compensated({})), "no calibration inputs of w"),
        (lambda: acts(Compensated({"w": SEEN}), NoiseModel(errors=(ColumnGain(0.1),))), "kind 'column'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("read_error", [0.01, 0.02])
def test_two_readings_tell_more_than_one(read_error):
    """Of the finished array, whose cells were shifted on purpose and read once before, more is known than of a plain
    one that was read once."""
    left = {}
    for encoding in (PLAIN, Compensated({"w": SEEN}, 8, read_error)):
        layout = Layout(encoding, correction=Affine({"w": SEEN}), read_error=read_error)
        acts, known = Programmed(NOISE, 0, {}, layout).stored("w", WEIGHT)
        left[encoding is PLAIN] = (acts - known).square().sum().item()
    assert left[False] < 0.97 * left[True]


def test_slots_that_share_inputs_are_sure_of_them_alike():
    """Whatever their number of tokens: their second moment is that of all tokens."""
    w = torch.stack([WEIGHT, WEIGHT])
    moments = {"w": SEEN} | {f"w[{i}]": Moments(SEEN.second, SEEN.mean, tokens) for i, tokens in ((0, 1), (1, 4000))}
    found = realise(Compensated(moments), NOISE, "w", w, 0)
    torch.testing.assert_close(found, realise(Compensated({"w": SEEN}), NOISE, "w", w, 0), rtol=1e-5, atol=1e-5)
