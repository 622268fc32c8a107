"""A model on arrays: which products are converted, that their key alone decides their errors, and the KV cache."""

import copy
import math
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from transformers import DynamicCache

import romer.arrays
from romer.adc import FORMS, Adc, Converter, RangeFinder, quantise, step
from romer.arrays import AnalogLinear, Arrays, Site, attach, calibrate_ranges
from romer.errors import InputError
from romer.noise import ColumnGain, Conductance, NoiseModel, key_of, slot_name
from romer.placement import PLACEMENTS, Placement, coverage
from romer.profiling import profile
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers
from romer.routing import RouterCalibration, apply
from tests.conftest import tiny

KV = Placement("linear+kv")
EXACT = Adc(bits=24, percentile=100)
# A 24-bit step is float32's own at full range; float32 is 3e-5 off float64 here, for logits of up to 10.
FLOAT32 = dict(rtol=0, atol=3e-4)
# In float64 no rounding flips a code (1e-16 of a step); what is left is attention's softmax, which is in float32.
FLOAT64 = dict(rtol=0, atol=1e-4)


def on_arrays(model, ids, adc, placement=KV, noise=NoiseModel()) -> NoiseModel:  # noqa: B008 (frozen)
    """`noise` with a converter that is calibrated for the model."""
    return replace(noise, adc=Converter(adc, calibrate_ranges(model, ids, adc, placement, window=64)))


@torch.no_grad()
def run(model, ids) -> torch.Tensor:
    """[B, S, V]"""
    return model(ids, use_cache=False).logits


def programmed(model, ids, noise, realisation=0, placement=KV) -> torch.Tensor:
    with program(model, noise, realisation, placement):
        return run(model, ids)


BOTH = pytest.mark.parametrize("form, tile_rows", [("uniform", 8), ("quantise", 12), ("uniform", 256)])


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.fixture
def double(model):
    """In float64, where another order of summation decides no rounding to a code."""
    return model.double()


# ---- what is converted


@pytest.mark.parametrize("rule", PLACEMENTS)
@pytest.mark.parametrize("router", [True, False])
def test_24_bits_compute_what_the_plain_program_computes(model, ids, logits, rule, router):
    clean, placement = logits(model), Placement(rule, router)
    for form in FORMS:
        noise = on_arrays(model, ids, replace(EXACT, form=form, tile_rows=16, dac_bits=24), placement)
        torch.testing.assert_close(programmed(model, ids.view(4, 64), noise, 0, placement), clean, **FLOAT32)


def test_perfect_cells_and_24_bits_compute_what_the_plain_program_computes(model, ids, logits):
    """Keys and values too: stored as pairs of conductances, they are read as they were."""
    clean = logits(model)
    noise = on_arrays(model, ids, EXACT, noise=NoiseModel(errors=(Conductance(lambda g, draws, kind: g, 1.0, 41.0),)))
    torch.testing.assert_close(programmed(model, ids.view(4, 64), noise), clean, rtol=0, atol=3e-3)  # g_min cancels


@pytest.mark.parametrize("form", FORMS)
def test_fewer_bits_are_worse(model, ids, logits, form):
    clean, ranges = logits(model), calibrate_ranges(model, ids, Adc(tile_rows=16), KV, window=64)
    for field in ("bits", "dac_bits"):
        adcs = [replace(Adc(bits=14, form=form, tile_rows=16), **{field: bits}) for bits in (4, 6, 10)]
        errors = [
            rms(programmed(model, ids.view(4, 64), NoiseModel(adc=Converter(adc, ranges))) - clean) for adc in adcs
        ]
        assert errors[0] > errors[1] > 1.5 * errors[2] > 0, field


@pytest.mark.parametrize("rule", PLACEMENTS)
@pytest.mark.parametrize("router", [True, False])
def test_every_analog_product_is_converted_and_no_other(model, ids, monkeypatch, rule, router):
    """Rows that pass the converters, by product, against the coverage table."""
    placement, tokens, tile_rows, rows = Placement(rule, router), ids[:60].view(3, 20), 12, Counter()
    noise = on_arrays(model, ids, Adc(tile_rows=tile_rows, form="uniform"), placement)
    expected, names = Counter(), {}
    for row in (row for row in coverage(model, placement) if row.analog):
        base = row.parameter if row.kind == "routed expert" else row.parameter.removesuffix(".weight")
        per_token = model.config.num_experts_per_tok if row.kind == "routed expert" else 1
        expected[base] = 60 * per_token * math.ceil(row.shape[-1] / tile_rows)
        names |= {base: base} | {slot_name(base, i): base for i in range(row.shape[0]) if row.kind == "routed expert"}
    for layer in range(2 if placement.kv else 0):
        path = f"model.layers.{layer}.self_attn"
        expected[f"{path}.scores"] = 60 * 4  # heads, whose 8 dimensions are one tile
        expected[f"{path}.mixture"] = 60 * 4 * 2  # 20 tokens are two tiles
        names |= {f"{path}.{kind}": f"{path}.{kind}" for kind in ("scores", "mixture")}
    by_key = {key_of(0, 7, name, 0, "adc"): base for name, base in names.items()}
    convert = Converter.convert

    def count(self, y, found, tile, key, numbers):
        assert len(y) == len(numbers)
        rows[by_key[key]] += len(y)
        return convert(self, y, found, tile, key, numbers)

    monkeypatch.setattr(Converter, "convert", count)
    programmed(model, tokens, noise, 7, placement)
    assert rows == expected


def test_all_slots_of_a_layer_share_the_calibrated_range(model, ids):
    ranges = calibrate_ranges(model, ids, Adc(tile_rows=12), KV, window=64)
    analog = {row.parameter.removesuffix(".weight") for row in coverage(model, KV) if row.analog}
    attention = {f"model.layers.{i}.self_attn.{kind}" for i in (0, 1) for kind in ("key", "value", "scores", "mixture")}
    assert set(ranges) == analog | attention
    for name, found in ranges.items():
        assert (found.v_ref > 0).all() and (found.rms * 2 < found.v_ref).all() and found.inputs > 0, name


def test_ranges_depend_on_neither_batches_nor_the_order_of_windows(double, ids):
    base = calibrate_ranges(double, ids, Adc(percentile=99), KV, window=32, batch=8)
    order = ids.view(8, 32).flip(0).flatten()
    for tokens, batch in ((ids, 1), (order, 8), (order, 3)):
        other = calibrate_ranges(double, tokens, Adc(percentile=99), KV, window=32, batch=batch)
        assert set(other) == set(base)
        for name, found in base.items():
            assert torch.equal(other[name].v_ref, found.v_ref) and other[name].inputs == found.inputs, name
            torch.testing.assert_close(other[name].rms, found.rms, rtol=1e-6, atol=0)


def test_tiles_without_tokens_to_attend_are_not_calibrated(olmoe, ids):
    """The second tile of a window of 16 holds nothing for the first 8 tokens."""
    finder = RangeFinder(Adc(tile_rows=8))
    with attach(olmoe, NoiseModel(), 0, KV, finder):
        run(olmoe, ids.view(16, 16))
    for tile, tokens in enumerate((16, 8)):
        assert finder.counts["model.layers.0.self_attn.mixture", tile].sum() == 16 * tokens * 32  # [4 heads, 8]
    assert finder.counts["model.layers.0.self_attn.scores", 0].sum() == 16 * 4 * (16 * 17 // 2)


def test_quantised_outputs_are_codes_with_the_bias_added_digitally(built, ids):
    """Qwen2-MoE's q_proj has a bias, which is no multiple of the step."""
    model = copy.deepcopy(built["qwen15"])
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias += 0.1234
    noise, seen = on_arrays(model, ids, Adc(bits=6), KV), []
    with program(model, noise, 0, KV):
        assert type(layer) is AnalogLinear
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        run(model, ids[None])
    (x, y), v_ref = seen[0], noise.adc.ranges["model.layers.0.self_attn.q_proj"].v_ref[0]
    torch.testing.assert_close(y, quantise(x @ layer.weight.T, v_ref, 6) + layer.bias, rtol=0, atol=1e-6)
    assert (y - layer.bias - x @ layer.weight.T).abs().max() > 0.4 * step(v_ref, 6)


# ---- what is undone


def traces(model) -> dict:
    """What `attach` changes for a while."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = {
        path: (type(module), sorted(module.__dict__), [len(getattr(module, hook)) for hook in hooks])
        for path, module in model.named_modules()
    }
    return {"modules": modules, "attention": model.config._attn_implementation}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_undoes_everything(model, ids, bits, logits, implementation, fails):
    model.set_attn_implementation(implementation)
    before, parameters, clean = traces(model), bits(model), logits(model)
    noise = on_arrays(model, ids, Adc(form="uniform", tile_rows=16), noise=NoiseModel(0.1))
    assert traces(model) == before and bits(model) == parameters  # nor does calibration leave anything
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(KeyboardInterrupt))
        stack.enter_context(program(model, noise, 0, KV))
        assert not torch.allclose(logits(model), clean, atol=0.1)
        assert model.config._attn_implementation == "analog" and traces(model) != before
        if fails:
            model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
            run(model, ids[None])
    if fails:
        model.model.layers[1].mlp._forward_pre_hooks.clear()
    assert traces(model) == before and bits(model) == parameters
    assert torch.equal(logits(model), clean)


def interrupt(*args):
    raise KeyboardInterrupt


def test_experts_that_arrays_cannot_compute_are_refused_and_undone(ids, bits):
    model = tiny("olmoe")
    noise = on_arrays(model, ids, Adc())
    model.set_experts_implementation("grouped_mm")
    before, parameters = traces(model), bits(model)
    with pytest.raises(InputError, match=r"adc: model\.layers\.0\.mlp\.experts is a OlmoeExperts; expected"):
        programmed(model, ids[None], noise)
    assert traces(model) == before and bits(model) == parameters


def test_a_model_on_arrays_is_not_put_on_arrays_again(olmoe, ids):
    """Calibration inside `program` would read converted products, and detach the converters of the outer context."""
    placement = Placement("experts")
    noise = on_arrays(olmoe, ids, Adc(form="uniform"), placement)
    with program(olmoe, noise, 0, placement):
        before, noisy = traces(olmoe), run(olmoe, ids[None])
        with pytest.raises(InputError):
            calibrate_ranges(olmoe, ids, Adc(), placement, window=64)
        assert traces(olmoe) == before and torch.equal(run(olmoe, ids[None]), noisy)


# ---- refused


@pytest.mark.parametrize("fields, culprit", [(("all",), "placement.rule: found 'all'"), (("linear", "no"), "'no'")])
def test_a_placement_that_is_none_is_refused(fields, culprit):
    assert culprit in refusal(Placement, *fields)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_conductance_errors_of_a_kv_cache_need_its_range(olmoe, ids, bits):
    before, cells = bits(olmoe), NoiseModel(errors=(Conductance(lambda g, draws, kind: g, 0.0, 25.0),))
    assert "set an ADC" in refusal(programmed, olmoe, ids[None], cells)
    assert bits(olmoe) == before
    programmed(olmoe, ids[None], cells, placement=Placement())  # weights have their own


def test_ranges_of_another_placement_are_refused(olmoe, ids):
    noise = on_arrays(olmoe, ids, Adc(), Placement("experts"))
    assert "no calibrated range for model.layers.0.self_attn.q_proj" in refusal(programmed, olmoe, ids[None], noise)


def test_calibration_without_a_whole_window_is_refused(olmoe, ids):
    refusal(calibrate_ranges, olmoe, ids[:63], Adc(), KV, window=64)


# ---- randomness


@BOTH
def test_a_window_gets_the_same_logits_in_any_batch(double, ids, form, tile_rows):
    adc, rows = Adc(form=form, tile_rows=tile_rows, residual=0.02), ids[:128].view(4, 32)
    noise = on_arrays(double, ids, adc, noise=NoiseModel(0.05))
    with program(double, noise, 0, KV):
        whole = run(double, rows)
        torch.testing.assert_close(run(double, rows[2:3]), whole[2:3], **FLOAT64)
        torch.testing.assert_close(run(double, rows.flip(0)), whole.flip(0), **FLOAT64)
        torch.testing.assert_close(run(double, rows[[1, 1, 3]]), whole[[1, 1, 3]], **FLOAT64)


@BOTH
def test_tokens_that_follow_change_nothing(double, ids, form, tile_rows):
    """Causality, and that padding on the right is without effect."""
    adc, rows = Adc(form=form, tile_rows=tile_rows, residual=0.02), ids[:96].view(3, 32)
    noise, other = on_arrays(double, ids, adc, noise=NoiseModel(0.05)), rows.clone()
    other[:, 12:] = (rows[:, 12:] + 7) % 62 + 2
    with program(double, noise, 0, KV):
        whole = run(double, rows)
        torch.testing.assert_close(run(double, other)[:, :12], whole[:, :12], rtol=0, atol=0)
        assert not torch.allclose(run(double, other)[:, 12:], whole[:, 12:], atol=0.1)
        torch.testing.assert_close(run(double, rows[:, :12]), whole[:, :12], **FLOAT64)


def test_other_libraries_and_threads_decide_nothing(olmoe, ids):
    """lm-eval's `simple_evaluate` seeds three global generators, before it finds that it has no tasks here."""
    model, rows = olmoe.double(), ids[:64][None]
    noise = on_arrays(model, ids, Adc(form="uniform", residual=0.02), noise=NoiseModel(0.05))
    states, threads = (random.getstate(), np.random.get_state()), torch.get_num_threads()
    first = programmed(model, rows, noise)
    with torch.random.fork_rng(devices=[]):
        with pytest.raises(ValueError, match="No tasks"):
            simple_evaluate(model=None, tasks=[])
        assert torch.initial_seed() == 1234
        try:
            assert torch.equal(programmed(model, rows, noise), first)
            torch.set_num_threads(1 if threads > 1 else 2)
            torch.testing.assert_close(programmed(model, rows, noise), first, **FLOAT64)
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0]), np.random.set_state(states[1])


def test_the_global_generators_are_left_alone(olmoe, ids):
    noise = on_arrays(olmoe, ids, Adc(form="uniform", residual=0.02), noise=NoiseModel(0.05))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    programmed(olmoe, ids[None], noise)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("fields", [dict(form="uniform"), dict(residual=0.02)], ids=str)
def test_another_realisation_and_another_seed_convert_differently(model, ids, fields):
    noise = on_arrays(model, ids, Adc(**fields))
    first = programmed(model, ids[None], noise)
    assert torch.equal(programmed(model, ids[None], noise), first)
    assert not torch.allclose(programmed(model, ids[None], noise, 1), first, atol=1e-2)
    assert not torch.allclose(programmed(model, ids[None], replace(noise, seed=1)), first, atol=1e-2)


def test_conversions_of_different_products_are_independent(olmoe, ids):
    """Errors of q_proj and k_proj, of two layers and of two realisations, for the same tokens."""
    noise, errors = on_arrays(olmoe, ids, Adc(form="uniform")), []
    layers = [layer.self_attn for layer in olmoe.model.layers]

    def keep(module, args, output):
        errors.append((output - args[0] @ module.weight.T).flatten())

    with ExitStack() as stack:
        for module in (layers[0].k_proj, layers[0].v_proj, layers[1].k_proj):
            stack.callback(module.register_forward_hook(keep).remove)
        for realisation in (0, 1):
            programmed(olmoe, ids[None], noise, realisation)
    correlations = torch.corrcoef(torch.stack(errors).double()) - torch.eye(6)
    assert correlations.abs().max() < 4 / math.sqrt(len(errors[0]))


def test_attention_converts_every_head_and_token_by_itself(olmoe, ids):
    """The errors of 4 heads and of neighbouring tokens, of which some are equal, in both products."""
    noise = on_arrays(olmoe, ids, Adc(form="uniform"))
    with program(olmoe, noise, 0, KV):
        run(olmoe, ids[None])  # numbers the tokens
        place = olmoe.model.layers[0].self_attn.site
        zero = torch.zeros(1, 4, 256, 8)
        e = {kind: place.convert(kind, zero, 0, None)[0] for kind in ("scores", "mixture")}
    n = e["scores"][0].numel()
    heads = torch.corrcoef(torch.cat(list(e.values())).flatten(1).double()) - torch.eye(8)
    assert heads.abs().max() < 4 / math.sqrt(n)
    for x in e.values():
        pairs = torch.stack([x[:, 1:].flatten(), x[:, :-1].flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(4 * n)
        assert x.unique().numel() > 0.99 * x.numel()  # of 2^24 values that float32 can tell apart


# ---- the KV cache


def cached(model, ids, lengths) -> torch.Tensor:
    """[B, S, V]: read in pieces, with a cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in ids.split(lengths, 1)], 1)


@BOTH
def test_prefill_and_decoding_see_the_same_arrays(double, ids, form, tile_rows):
    adc, rows = Adc(form=form, tile_rows=tile_rows, residual=0.02), ids[:60].view(3, 20)
    noise = on_arrays(double, ids, adc, noise=NoiseModel(0.05, errors=(ColumnGain(0.05),)))
    with program(double, noise, 0, KV):
        whole = run(double, rows)
        for lengths in ([20], [14] + 6 * [1], [3, 9, 8]):
            torch.testing.assert_close(cached(double, rows, lengths), whole, **FLOAT64)


def test_a_cache_longer_than_calibration_saw(double, ids):
    """Tokens 64 to 127 lie in tiles of which calibration saw none; they are read with the range of its last."""
    adc = Adc(form="uniform", tile_rows=32)
    noise = on_arrays(double, ids, adc, noise=NoiseModel(0.05))
    rows = ids[:128][None]
    with program(double, noise, 0, KV):
        whole = run(double, rows)
        assert whole.isfinite().all()
        torch.testing.assert_close(cached(double, rows, [120] + 8 * [1]), whole, **FLOAT64)


def site(noise: NoiseModel, realisation: int = 0) -> Site:
    return Site(Arrays(noise.adc, noise, realisation), "model.layers.0.self_attn")


STATES = torch.randn(3, 2, 400, 8, generator=torch.Generator().manual_seed(6))  # [B, heads, S, D]
CELLS = Conductance(lambda g, draws, kind: g + 0.3 * draws.normal(kind, g), 0.0, 25.0, compensate=True)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("errors", [(), (ColumnGain(0.1),), (CELLS,)], ids=["device", "column", "cells"])
def test_what_is_written_stays_when_later_tokens_come(olmoe, ids, kind, errors):
    place = site(on_arrays(olmoe, ids, Adc(), noise=NoiseModel(0.05, errors=errors)))
    whole = place.write(kind, STATES)
    for length in (1, 7, 399):
        assert torch.equal(place.write(kind, STATES[:, :, :length]), whole[:, :, :length])
    assert torch.equal(place.write(kind, STATES[1:2]), whole[1:2])  # nor do others in the batch matter
    assert not torch.equal(whole, STATES)


def test_written_keys_and_values_have_the_device_noise(olmoe):
    sigma, n = 0.05, STATES[0].numel()
    places = [site(NoiseModel(sigma), realisation) for realisation in (0, 1)]
    drawn = [(place.write(kind, STATES).double() / STATES - 1)[0] for place in places for kind in ("key", "value")]
    for e in drawn:
        assert abs(e.mean()) < 4 * sigma / math.sqrt(n) and abs(e.std() / sigma - 1) < 4 / math.sqrt(2 * n)
    correlations = torch.corrcoef(torch.stack([e.flatten() for e in drawn])) - torch.eye(4)
    assert correlations.abs().max() < 4 / math.sqrt(n)
    assert torch.equal(site(NoiseModel(0.0)).write("key", STATES), STATES)


def test_columns_are_tokens_of_keys_and_dimensions_of_values():
    """q·Kᵀ has an output for every head and token, a·V one for every dimension and tile of 256 tokens."""
    place = site(NoiseModel(errors=(ColumnGain(0.1),)))
    gain = place.write("key", STATES) / STATES
    torch.testing.assert_close(gain, gain[:1, :, :, :1].expand_as(gain), rtol=1e-6, atol=0)
    assert gain[0, :, :, 0].std().item() == pytest.approx(0.1, rel=4 / math.sqrt(2 * 800))
    assert abs(torch.corrcoef(gain[0, :, :, 0])[0, 1]) < 4 / math.sqrt(400)  # heads have columns of their own
    gain = place.write("value", STATES) / STATES
    for tile in gain.split(256, 2):
        torch.testing.assert_close(tile, tile[:1, :, :1].expand_as(tile), rtol=1e-6, atol=0)
    assert gain[0, :, 0].unique().numel() == 16 and (gain[0, :, 255] != gain[0, :, 256]).all()


def test_values_beyond_the_calibrated_range_are_clipped_by_cells_only(olmoe, ids):
    noise = on_arrays(olmoe, ids, Adc())
    limit, beyond = noise.adc.ranges["model.layers.0.self_attn.value"].inputs, 100 * STATES
    assert torch.equal(site(noise).write("value", beyond), beyond)
    cells = replace(noise, errors=(Conductance(lambda g, draws, kind: g, 0.0, 25.0),))
    torch.testing.assert_close(site(cells).write("value", beyond), beyond.clamp(-limit, limit), rtol=1e-6, atol=0)


def test_only_linear_kv_writes_the_cache_to_arrays(model, ids, monkeypatch):
    """With digital keys and values, `linear+kv` computes what `linear` does; with errors of theirs, it does not."""
    noise = NoiseModel(0.1)
    linear, kv = (programmed(model, ids[None], noise, 0, Placement(rule)) for rule in ("linear", "linear+kv"))
    assert (kv - linear).abs().max() > 0.1
    monkeypatch.setattr(romer.arrays.Site, "write", lambda self, kind, states: states)
    torch.testing.assert_close(programmed(model, ids[None], noise), linear, **FLOAT32)
    adc = on_arrays(model, ids, Adc(), Placement("linear"))  # no ranges of attention's products are needed
    monkeypatch.setattr(romer.arrays.Site, "write", interrupt)
    programmed(model, ids[None], adc, 0, Placement("linear"))


# ---- together with the routing


@pytest.mark.parametrize("form", ["split", "literal"])
def test_24_bits_route_as_the_plain_program_routes(model, ids, logits, form):
    """Whichever context is the outer one: the routers are rewritten after their products are converted."""
    layers = len(moe_layers(model))
    plan, calibration = ReplacementPlan(((0, 3),) * layers, ((5, 1),) * layers, form), RouterCalibration("iqr", 0.2)
    clean, noise = logits(model), on_arrays(model, ids, replace(EXACT, form="uniform"))  # clips nothing
    with apply(model, plan, calibration):
        expected = logits(model)
    assert not torch.allclose(expected, clean, atol=0.1)
    with program(model, noise, 0, KV), apply(model, plan, calibration):
        torch.testing.assert_close(logits(model), expected, **FLOAT32)
    torch.testing.assert_close(logits(model), clean, rtol=0, atol=0)
    with apply(model, plan, calibration), program(model, noise, 0, KV):
        torch.testing.assert_close(logits(model), expected, **FLOAT32)


def test_calibration_sees_converted_logits(model, ids):
    seen = []

    class Watched(RouterCalibration):
        def __call__(self, logits):
            seen.append(logits)
            return super().__call__(logits)

    noise = on_arrays(model, ids, Adc(bits=6))
    with program(model, noise, 0, KV), apply(model, calibration=Watched("iqr", 0.2)):
        run(model, ids[None])
    for (path, _), z in zip(moe_layers(model), seen, strict=True):  # 32 inputs are one tile
        codes = z.double() / step(noise.adc.ranges[f"{path}.gate"].v_ref[0].double(), 6)
        assert (codes - codes.round()).abs().max() < 1e-4 and codes.round().unique().numel() > 10


def test_copies_are_converted_as_the_slots_that_hold_them(olmoe, ids):
    """Both halves of a split expert pass converters of their own: their errors do not cancel or double."""
    noise = on_arrays(olmoe, ids, Adc(form="uniform", bits=6), Placement("experts", router=False))
    block, x = olmoe.model.layers[0].mlp, torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    one, two = (torch.tensor(i).expand(64, -1) for i in ([2], [5]))
    with program(olmoe, noise, 0, Placement("experts", router=False)):
        with apply(olmoe, ReplacementPlan(((2,),) * 2, ((5,),) * 2)):
            run(olmoe, ids[:64][None])  # numbers the tokens
            own, copied = (block.experts(x, i, torch.ones(64, 1)) for i in (one, two))
    clean = block.experts(x, one, torch.ones(64, 1))
    a, b = (y - clean for y in (own, copied))
    assert rms(b) / rms(a) == pytest.approx(1, abs=0.2)
    n = 64  # the 32 outputs of a token share the errors of its 16 activations
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(n)


def test_profiles_of_a_model_on_arrays(model, ids):
    """Digital routing of 24 bits is the clean one; the tokens that are read decide the noise, whoever reads them."""
    clean = profile(model, ids, window=64)
    exact = on_arrays(model, ids, EXACT)
    with program(model, exact, 0, KV):
        assert torch.equal(profile(model, ids, window=64).counts, clean.counts)
    noise = on_arrays(model, ids, Adc(form="uniform", bits=6))
    with program(model, noise, 0, KV):
        first = profile(model, ids, window=64)
        run(model, ids[None].flip(1))
        torch.testing.assert_close(profile(model, ids, window=64, batch=2).magnitude, first.magnitude)
    assert not torch.equal(first.counts, clean.counts)
