"""Moments of inputs, and the affine corrections that are fitted on them."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from romer import methods
from romer.adc import Adc, Converter
from romer.arrays import calibrate_ranges
from romer.corrections import Affine
from romer.cost import cost
from romer.encoding import Layout
from romer.errors import InputError
from romer.moments import PRIOR_TOKENS, Moments, collect, of
from romer.noise import NoiseModel
from romer.placement import Placement, coverage
from romer.programming import program, rewrite_slots
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers
from romer.routing import apply

NOISE = NoiseModel(0.15)


@pytest.fixture
def moments(model, ids):
    return collect(model, ids, 64, 2)


def inputs_of(model, module, ids):
    """[T, in] of what a module sees."""
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model.model(ids.view(4, 64), use_cache=False)
    handle.remove()
    return torch.cat(seen)


def test_every_analog_array_has_the_moments_of_its_inputs(model, ids, moments):
    for row in coverage(model, Placement()):
        if row.analog:
            names = [f"{row.parameter}[{i}]" for i in range(row.shape[0])] if len(row.shape) == 3 else [row.parameter]
            assert all(of(moments, n).second.shape == (row.shape[-1],) * 2 for n in names)
    layer = model.model.layers[1]
    for path, module in (("self_attn.o_proj", layer.self_attn.o_proj), ("mlp.gate", layer.mlp.gate)):
        x, found = inputs_of(model, module, ids), moments[f"model.layers.1.{path}.weight"]
        torch.testing.assert_close(found.second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        assert found.tokens == len(ids)
    assert moments["model.layers.0.self_attn.q_proj.weight"] is moments["model.layers.0.self_attn.v_proj.weight"]
    assert moments["model.layers.1.mlp.gate.weight"] is moments["model.layers.1.mlp.experts.gate_up_proj"]


def test_moments_of_an_expert_are_of_its_own_tokens_and_lean_on_all(olmoe, ids):
    moments = collect(olmoe, ids, 64, 2)
    path, block = moe_layers(olmoe)[0]
    seen = []
    handle = block.experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        olmoe.model(ids.view(4, 64), use_cache=False)
    handle.remove()
    ((x, index, _),) = seen
    for slot in range(8):
        a = block.experts._apply_gate(F.linear(x, block.experts.gate_up_proj[slot]))
        own = a[(index == slot).any(1)]
        expected = (own.T @ own + PRIOR_TOKENS * a.T @ a / len(a)) / (len(own) + PRIOR_TOKENS)
        found = moments[f"{path}.experts.down_proj[{slot}]"]
        torch.testing.assert_close(found.second, expected, rtol=1e-4, atol=1e-6)
        assert found.tokens == moments[f"{path}.experts.gate_up_proj[{slot}]"].tokens == len(own)


def test_moments_do_not_depend_on_the_batch(model, ids, moments):
    other = collect(model, ids, 64, 4)
    assert other.keys() == moments.keys()
    for name, found in moments.items():
        torch.testing.assert_close(other[name].second, found.second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_the_fit_is_the_least_squares_one_on_many_tokens(per):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=g) + 0.5
    clean, noise = torch.randn(7, 12, generator=g), torch.randn(7, 12, generator=g)
    stored = 0.8 * clean + 0.1 * noise
    seen = Moments(x.T @ x / len(x), x.mean(0), 10**9)  # so many that nothing is drawn toward k = 1
    weight, offset = Affine({"w": seen}, per)("w", clean, stored)
    y, noisy = x @ clean.T, x @ stored.T
    if per == "channel":
        for j in range(7):
            k, b = torch.linalg.lstsq(torch.stack([noisy[:, j], torch.ones(4000)], 1), y[:, j]).solution
            torch.testing.assert_close(weight[j], k * stored[j], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(offset[j], b, rtol=1e-3, atol=1e-3)
    else:  # one slope and one offset of all outputs
        k, b = torch.linalg.lstsq(torch.stack([noisy.flatten(), torch.ones(noisy.numel())], 1), y.flatten()).solution
        torch.testing.assert_close(weight, k * stored, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(offset, b.expand(7), rtol=1e-3, atol=1e-3)


def test_few_tokens_mean_little_correction():
    clean = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    sizes = []
    for tokens in (0, PRIOR_TOKENS, 10**9):
        weight, offset = Affine({"w": Moments(torch.eye(5), torch.zeros(5), tokens)}, "channel")("w", clean, clean / 2)
        sizes.append((weight / clean).mean().item())
        assert not offset.any()
    assert sizes == pytest.approx([0.5, 0.75, 1.0], abs=1e-5)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_without_noise_a_correction_changes_nothing(model, ids, moments, logits, per):
    expected = logits(model)
    with program(model, NoiseModel(0.0), layout=Layout(correction=Affine(moments, per))):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_corrected_products_are_closer_and_everything_is_undone(model, ids, moments, bits, logits):
    """Each linear layer's output on its clean inputs; offsets reach linear layers, routers and experts."""
    before, expected = bits(model), logits(model)
    linear = model.model.layers[1].self_attn.o_proj
    x = inputs_of(model, linear, ids)
    y = linear(x)

    def error(layout):
        with program(model, NOISE, layout=layout):
            return (linear(x) - y).square().mean().item()

    vanilla, channel = error(Layout()), error(Layout(correction=Affine(moments, "channel")))
    assert channel < vanilla
    assert bits(model) == before and torch.equal(logits(model), expected)


def test_offsets_act_wherever_an_array_is(model, ids, logits):
    """With weights that stay as they are, the offsets are those that biases of the layers would be."""

    class Shifted:
        def shared(self, name, clean, read):
            return None

        def __call__(self, name, clean, stored, read, shared):
            return stored, torch.full((len(stored),), 0.05)

    with program(model, NoiseModel(0.0), layout=Layout(correction=Shifted())):
        found = logits(model)
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, torch.nn.Linear) and module is not twin.lm_head:
            old = 0.0 if module.bias is None else module.bias.detach()
            module.bias = torch.nn.Parameter(old + torch.full((module.out_features,), 0.05))
    for _, block in moe_layers(twin):  # expert by expert, as the definition says

        def forward(x, index, weights, e=block.experts):
            y = torch.zeros_like(x)
            for t in range(len(x)):
                for slot, p in zip(index[t].tolist(), weights[t], strict=True):
                    a = e._apply_gate(F.linear(x[t], e.gate_up_proj[slot]) + 0.05)
                    y[t] += p * (F.linear(a, e.down_proj[slot]) + 0.05)
            return y

        block.experts.forward = forward  # a router's offset is the same for all experts: softmax does not see it
    torch.testing.assert_close(found, logits(twin), rtol=1e-4, atol=1e-4)


def test_an_offset_of_a_router_moves_its_choice(olmoe, ids):
    class Favour:
        def shared(self, name, clean, read):
            return None

        def __call__(self, name, clean, stored, read, shared):
            offset = torch.zeros(len(stored))
            if name.endswith("gate.weight"):
                offset[5] = 100.0
            return stored, offset

    seen = []
    handle = olmoe.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with torch.no_grad(), program(olmoe, NOISE, layout=Layout(correction=Favour())):
        olmoe.model(ids[None, :64], use_cache=False)
    handle.remove()
    assert (seen[0] == 5).any(1).all()


def test_a_copied_expert_is_corrected_for_its_own_slot(olmoe, ids):
    moments = collect(olmoe, ids, 64, 2)
    ((path, block), *_) = moe_layers(olmoe)
    correction = Affine(moments, "channel")
    name, clean = f"{path}.experts.down_proj", block.experts.down_proj[1].clone()
    with program(olmoe, NOISE, layout=Layout(correction=correction)) as array:
        own = array.offsets[name][6].clone()
        with rewrite_slots(olmoe, {f"{path}.experts": {6: 1}}):
            weight, offset = correction(f"{name}[6]", clean, NOISE.realise(f"{name}[6]", clean, 0))
            assert block.experts.down_proj[6].equal(weight) and array.offsets[name][6].equal(offset)
            assert not offset.equal(own)
        assert array.offsets[name][6].equal(own)


def test_replacement_and_correction_work_together(model, ids, moments, bits):
    before = bits(model)
    experts = moe_layers(model)[0][1].gate.weight.shape[0]
    plan = ReplacementPlan.fit(torch.rand(len(moe_layers(model)), experts), 1)
    with program(model, NOISE, layout=Layout(correction=Affine(moments, "channel"))), apply(model, plan):
        with torch.no_grad():
            assert model(ids[None, :64]).logits.isfinite().all()
    assert bits(model) == before


def test_what_is_wrong_is_said_in_one_line(olmoe, ids):
    with pytest.raises(InputError, match="per: found 'row', expected one of layer, channel"):
        Affine({}, "row")
    with pytest.raises(InputError, match="no calibration inputs of model.layers.0"):
        with program(olmoe, NOISE, layout=Layout(correction=Affine({}))):
            pass
    adc = Adc(8)
    noisy = replace(NOISE, adc=Converter(adc, calibrate_ranges(olmoe, ids, adc, Placement(), 64)))
    with pytest.raises(InputError, match="under an ADC are not simulated"):
        with program(olmoe, noisy, layout=Layout(correction=Affine(collect(olmoe, ids, 64)))):
            pass


def test_kb_calibration_is_counted(olmoe, ids):
    method = methods.get("kb_calibration")
    fitted = methods.Fitted(torch.rand(2, 8), 2, 0.1, moments=collect(olmoe, ids, 64))
    rows = [r for r in coverage(olmoe, Placement()) if r.analog]
    total = sum(r.count for r in rows)
    for per, each in (("layer", lambda out: 2), ("channel", lambda out: 2 * out)):
        found = cost(method, olmoe, Placement(), fitted, method.options(fitted, {"per": per}))
        arrays = sum((r.shape[0] if len(r.shape) == 3 else 1) * each(r.shape[-2]) for r in rows)
        assert (found.cells, found.products, found.digital) == (1, 1, 0)
        assert found.side == pytest.approx(arrays / total)
