"""The hardware cost model: tile counts, conservation, bounds, contention, and what must not change a cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from romer import InputError, Placement, ReplacementPlan, RouterCalibration, apply, methods, perplexity
from romer.cli import conf_folder
from romer.hardware import (
    SHAPES,
    ChipSheet,
    Deployment,
    ModelShape,
    Trace,
    deployed,
    estimate,
    record,
    shape_of,
    simulate,
    tile_counts,
)
from romer.hardware.model import PARTS, STAGES
from romer.hardware.tiles import KINDS
from romer.hardware.work import Work
from romer.methods import Fitted
from romer.placement import coverage
from romer.routers import moe_layers
from romer.stages.hardware import cells_of

SHEETS = ("hermes", "isaac", "generic3d", "neurram")
SMALL = ModelShape(
    "small", 96, 4, 4, 2, 24, 16, 3, 40, 300, shared_width=64, shared_gate=True, dense=(1,), dense_width=128
)
PARTLY = tuple(frozenset(slots) for slots in ({0, 5}, {1}, set()))
DEPLOYMENTS = {
    "plain": Deployment(),
    "two copies": Deployment(cells=2.0, products=2.0),
    "digital experts": Deployment(analog=frozenset(KINDS) - {"attention", "lm_head"}, digital_experts=PARTLY),
    "paths": Deployment(corrected=0, side=0.02),
    "all digital": Deployment(analog=frozenset(), calibrated=True),
}


def values(name: str) -> dict:
    return yaml.safe_load((conf_folder() / "hardware" / f"{name}.yaml").read_text())


@pytest.fixture(params=SHEETS)
def sheet(request) -> ChipSheet:
    return ChipSheet.load(values(request.param))


@pytest.fixture(scope="module")
def load() -> np.ndarray:
    return np.random.default_rng(0).gamma(1.0, size=(SMALL.moe_layers, SMALL.experts))


@pytest.fixture(scope="module")
def trace(load) -> Trace:
    return simulate(load, SMALL.top_k, 150, 64)


def fitted_for(model) -> Fitted:
    sizes = [block.gate.weight.shape[0] for _, block in moe_layers(model)]
    generator = torch.Generator().manual_seed(2)
    return Fitted(torch.rand(len(sizes), sizes[0], generator=generator), 2, 0.2)


@pytest.mark.parametrize(
    "name, stored, active",
    [
        ("olmoe", 26060, 4556),
        ("deepseek", 67116, 10740),
        ("qwen15", 57828, 9444),
        ("qwen3", 152292, 14052),
    ],
)
def test_the_true_models_take_the_known_numbers_of_tiles(name, stored, active):
    assert tile_counts(SHAPES[name], 512, 512) == (stored, active)


def test_a_shape_derived_from_a_model_has_its_weights(model):
    """All weights of a model but embeddings, norms, biases and the shared experts' gate are those of its shape."""
    stored = tile_counts(shape_of(model.config), 1, 1)[0]  # tiles of one weight count weights
    rows = coverage(model, Placement())
    assert stored == sum(row.count for row in rows if row.kind in KINDS)
    assert shape_of(model.config).moe_layers == len(moe_layers(model))


def test_a_dense_model_has_no_shape(olmoe):
    olmoe.config.model_type = "llama"
    with pytest.raises(InputError, match="model type: found 'llama', expected olmoe"):
        shape_of(olmoe.config)


@pytest.mark.parametrize("how", DEPLOYMENTS)
@pytest.mark.parametrize("batch", [1, 7, 150])
def test_parts_add_up_and_time_lies_between_its_bounds(sheet, trace, how, batch):
    found = estimate(SMALL, trace, sheet, DEPLOYMENTS[how], batch)
    assert found.energy_j == pytest.approx(sum(getattr(found, part) for part in PARTS))
    assert found.time_s == pytest.approx(sum(getattr(found, stage) for stage in STAGES))
    assert found.power_w * found.time_s == pytest.approx(found.energy_j)
    assert found.static_j == pytest.approx(
        found.time_s * (sheet.static_w + 1e-6 * sheet.tile_static_uw * found.tiles_stored)
    )
    slack = 1 + 1e-9  # sums in another order
    assert found.critical_path_s <= found.time_s * slack
    assert found.bottleneck_s <= found.time_s * slack
    assert found.time_s <= found.serial_s * slack
    assert min(getattr(found, part) for part in PARTS) >= 0
    assert 0 <= found.tile_utilisation <= 1 and 0 <= found.cell_utilisation <= 1


@pytest.mark.parametrize("how", DEPLOYMENTS)
def test_a_batch_of_one_has_no_contention(sheet, trace, how):
    found = estimate(SMALL, trace, sheet, DEPLOYMENTS[how], batch=1)
    assert found.time_s == pytest.approx(found.critical_path_s, rel=1e-12)
    brief = replace(trace, window=1)  # every token attends to itself alone, wherever it stands
    alone = (estimate(SMALL, replace(brief, slots=row[None]), sheet, DEPLOYMENTS[how]) for row in brief.slots)
    assert estimate(SMALL, brief, sheet, DEPLOYMENTS[how]).time_s == pytest.approx(sum(one.time_s for one in alone))


def test_a_token_activates_the_tiles_of_its_shape(sheet, trace):
    found = estimate(SMALL, trace, sheet)
    stored, active = tile_counts(SMALL, sheet.weight_rows, sheet.weight_columns)
    assert found.tiles_stored == stored and found.tiles_active == pytest.approx(active)


@pytest.mark.parametrize("how", DEPLOYMENTS)
@pytest.mark.parametrize("slow", ["digital_unit_ops_per_ns", "mac_unit_macs_per_ns"])
def test_time_and_energy_count_the_same_work(trace, how, slow):
    """Where one kind of unit is all that takes time, the time is that of its work, whatever the batch."""
    fast = {"mvm_time_ns": 1e-12, "network_latency_ns": 0, "dram_bandwidth_gb_per_s": 1e12, "shift_add_energy_pj": 0}
    fast |= {"digital_unit_ops_per_ns": 1e12, "mac_unit_macs_per_ns": 1e12} | {slow: 1.0}
    fast |= {"digital_op_energy_pj": float(slow.startswith("digital")), "mac_energy_pj": float(slow.startswith("mac"))}
    sheet = ChipSheet.load(values("hermes") | fast)
    units = sheet.digital_units if slow.startswith("digital") else sheet.mac_units
    for batch in (1, 16):
        found = estimate(SMALL, trace, sheet, DEPLOYMENTS[how], batch)
        assert found.time_s == pytest.approx(found.bottleneck_s, rel=1e-6)
        assert found.digital_j == pytest.approx(1e-12 * units * 1e9 * found.time_s, rel=1e-6)


def test_tokens_that_need_the_same_expert_queue_and_others_do_not(sheet):
    shape = replace(SMALL, dense=(), dense_width=0, layers=1, shared_width=0, shared_gate=False, top_k=1)
    apart = Trace(np.arange(8, dtype=np.uint8).reshape(8, 1, 1), shape.experts, 8)
    together = Trace(np.zeros((8, 1, 1), np.uint8), shape.experts, 8)
    fast, slow = (estimate(shape, t, sheet, batch=8) for t in (apart, together))
    assert slow.experts_s - fast.experts_s == pytest.approx(7 * 1e-9 * sheet.mvm_time_ns)  # pipelined
    assert slow.mvm_j == fast.mvm_j
    assert estimate(shape, together, sheet, batch=1).time_s == pytest.approx(
        estimate(shape, apart, sheet, batch=1).time_s
    )


def test_replicas_run_side_by_side(sheet):
    """A replica's slot costs its products and digital work, and no time on tiles."""
    shape = replace(SMALL, dense=(), dense_width=0, layers=1, top_k=1)
    once = np.full((8, 1, 2), shape.experts, np.uint8)
    once[:, 0, 0] = 3
    twice = once.copy()
    twice[:, 0, 1] = 9
    quick = replace(sheet, digital_unit_ops_per_ns=1e12, network_latency_ns=0)
    one, two = (estimate(shape, Trace(s, shape.experts, 8), quick, batch=8) for s in (once, twice))
    assert two.time_s == pytest.approx(one.time_s, rel=1e-6)
    extra = two.tile_mvms - one.tile_mvms
    assert (
        extra
        == 8 * tile_counts(replace(shape, experts=1), quick.weight_rows, quick.weight_columns, {"routed expert"})[0]
    )
    assert two.mvm_j > one.mvm_j


def test_relabelling_the_experts_leaves_the_cost(sheet, trace):
    order = np.random.default_rng(1).permutation(SMALL.experts)
    renamed = np.append(order, SMALL.experts).astype(np.uint8)[trace.slots]
    masks = tuple(frozenset(order[list(slots)].tolist()) for slots in PARTLY)
    how = DEPLOYMENTS["digital experts"]
    before = estimate(SMALL, trace, sheet, how, batch=16)
    after = estimate(SMALL, replace(trace, slots=renamed), sheet, replace(how, digital_experts=masks), batch=16)
    assert after == before or after.row() == pytest.approx(before.row(), nan_ok=True)


def test_cost_grows_with_copies(sheet, trace):
    found = [estimate(SMALL, trace, sheet, Deployment(cells=n, products=n), batch=16) for n in (1.0, 2.0, 3.0, 8.0)]
    for less, more in zip(found, found[1:], strict=False):
        assert more.energy_j > less.energy_j and more.time_s >= less.time_s
        assert more.tiles_stored > less.tiles_stored and more.tile_mvms > less.tile_mvms
    assert found[1].tiles_stored == 2 * found[0].tiles_stored
    assert found[3].tile_mvms == 8 * found[0].tile_mvms
    assert found[3].adc_j == pytest.approx(8 * found[0].adc_j)


def test_spare_cells_are_stored_and_read(sheet, trace):
    plain, spare = (estimate(SMALL, trace, sheet, Deployment(cells=c, products=c)) for c in (1.0, 1.05))
    assert spare.tiles_stored == int(np.ceil(plain.tiles_stored * 1.05))
    assert spare.tile_mvms == pytest.approx(1.05 * plain.tile_mvms) and spare.mvm_j == pytest.approx(1.05 * plain.mvm_j)


def test_what_memory_has_to_fetch_bounds_the_time(sheet, trace):
    slow = replace(sheet, dram_bandwidth_gb_per_s=1e-3)
    found = estimate(SMALL, trace, slow, DEPLOYMENTS["all digital"], 16)
    assert 0.99 * found.time_s < found.bottleneck_s <= found.time_s


def test_digital_experts_move_products_from_tiles_to_multipliers(sheet, trace):
    analog, digital = (estimate(SMALL, trace, sheet, Deployment(digital_experts=d), 16) for d in ((), PARTLY))
    assert digital.mvm_j < analog.mvm_j and digital.dram_j > analog.dram_j
    assert digital.tiles_stored < analog.tiles_stored
    nothing = estimate(SMALL, trace, sheet, DEPLOYMENTS["all digital"], 16)
    assert nothing.mvm_j == nothing.adc_j == nothing.network_j == 0 and nothing.tiles_stored == 0


def test_no_replacement_is_vanilla(model, ids):
    """n = 0, recorded under `apply`, costs exactly what the untouched model does."""
    fitted = fitted_for(model)
    sheet = ChipSheet.load(values("hermes"))
    shape = shape_of(model.config)
    found = []
    for name, options in (("vanilla", {}), ("romer_replacement", {"n_replace": 0})):
        method = methods.get(name)
        options = method.options(fitted, options)
        plan, calibration = method.routing(fitted, options)
        with apply(model, plan, calibration), record(model, 64) as recorder:
            perplexity(model, ids, 64)
        how = deployed(method, model, Placement(), fitted, options)
        found.append(estimate(shape, recorder.trace, sheet, how, batch=32))
    assert found[0] == found[1]


def test_a_recorded_trace_is_what_the_routers_chose(olmoe, ids):
    seen = []
    handle = moe_layers(olmoe)[1][1].gate.register_forward_hook(lambda gate, args, output: seen.append(output[2]))
    with record(olmoe, 64) as recorder:
        perplexity(olmoe, ids, 64)
    handle.remove()
    trace = recorder.trace
    assert trace.slots.shape == (256, 2, 2) and trace.slots.dtype == np.uint8
    assert (trace.slots[:, 1] == torch.cat(seen).numpy()).all()
    perplexity(olmoe, ids, 64)
    assert recorder.trace.tokens == 256  # hooks are off


def test_replicas_occupy_the_cold_slots(model, ids):
    fitted = fitted_for(model)
    plan = ReplacementPlan.fit(fitted.activation, 2)
    top_k = moe_layers(model)[0][1].gate.top_k
    with apply(model, plan, RouterCalibration("iqr", 0.2)), record(model, 64) as recorder:
        perplexity(model, ids, 64)
    trace = recorder.trace
    for layer, (hot, cold) in enumerate(zip(plan.hot, plan.cold, strict=True)):
        slots = trace.slots[:, layer]
        for h, c in zip(hot, cold, strict=True):
            assert ((slots == h).any(1) == (slots == c).any(1)).all()
        used = (slots < trace.experts).sum(1)
        assert (used == top_k + np.isin(slots, hot).sum(1)).all()
    assert np.isin(trace.slots, [*plan.hot[0]]).any()


def test_traces_survive_the_disk(tmp_path, trace):
    trace.save(tmp_path / "trace.safetensors")
    back = Trace.load(tmp_path / "trace.safetensors")
    assert (back.slots == trace.slots).all() and (back.experts, back.window) == (trace.experts, trace.window)
    (tmp_path / "broken").write_bytes(b"x")
    for name in ("broken", "missing"):
        with pytest.raises(InputError, match=f"{name}: not a readable routing trace"):
            Trace.load(tmp_path / name)


def test_traces_of_many_experts_are_int16_and_cost_the_same(sheet, trace):
    shape = replace(SMALL, experts=300)
    wide = np.where(trace.slots == SMALL.experts, 300, trace.slots).astype(np.int16)
    assert estimate(shape, Trace(wide, 300, 64), sheet, batch=16).experts_s == pytest.approx(
        estimate(SMALL, trace, sheet, batch=16).experts_s
    )


@pytest.mark.parametrize(
    "slots, message",
    [
        (np.zeros((4, 3), np.uint8), r"expected uint8 \[tokens, layers, choices\]"),
        (np.zeros((4, 3, 1), np.int64), "found int64"),
        (np.full((4, 3, 1), 9, np.uint8), "found slot 9, expected 0 to 8"),
        (np.zeros((4, 3, 2), np.uint8), "layer 0: a token uses a slot twice"),
    ],
)
def test_bad_traces_are_refused(slots, message):
    with pytest.raises(InputError, match=message):
        Trace(slots, 8, 64)


def test_a_trace_of_another_model_is_refused(sheet, trace):
    with pytest.raises(InputError, match="found 3 MoE layers of 16 experts, expected 16 MoE layers of 64 experts"):
        estimate(SHAPES["olmoe"], trace, sheet)
    with pytest.raises(InputError, match="batch: found 0"):
        estimate(SMALL, trace, sheet, batch=0)


def test_simulated_choices_follow_the_load_and_the_plan():
    """Shares are those of the load, binomial, to five standard deviations and the 3 % by which Pareto sampling misses
    them; an expert that is wanted more than once a token is chosen by every one."""
    load, tokens = np.stack([np.arange(1, 65) ** -0.5, np.arange(1, 65) ** -0.2]), 20_000
    for row, p in zip(simulate(load, 8, tokens, 64).loads / tokens, 8 * load / load.sum(1, keepdims=True), strict=True):
        assert (abs(row - p) < 5 * np.sqrt(p * (1 - p) / tokens) + 0.03 * p).all()
    assert simulate(np.array([[9.0, 1.0, 1.0, 1.0]]), 2, 100, 64).loads[0, 0] == 100
    with pytest.raises(InputError, match="fewer than top_k = 3 experts"):
        simulate(np.array([[9.0, 1.0, 0.0, 0.0]]), 3, 100, 64)
    load = np.array([[1.0, 2.0, 3.0, 4.0]])
    plan = ReplacementPlan(((3,),), ((0,),))
    without, with_plan = simulate(load, 2, 500, 64), simulate(load, 2, 500, 64, plan)
    kept = ~(without.slots == 0).any((1, 2))  # tokens that did not want the cold expert keep their choices
    assert (np.sort(with_plan.slots[kept, 0, :2]) == np.sort(without.slots[kept, 0])).all()
    assert (with_plan.loads[0][0] == with_plan.loads[0][3]) and with_plan.loads[0][3] >= without.loads[0][3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mvm_time_ns": None}, "hardware hermes: mvm_time_ns: found None, expected a number"),
        ({"mvm_time_ns": 0}, "hardware hermes: mvm_time_ns: found 0, expected a positive number"),
        ({"adc_energy_pj": -1}, "adc_energy_pj: found -1, expected a number of at least 0"),
        ({"static_w": "5 W"}, "static_w: found '5 W', expected a number"),
        ({"tile_rows": 2.5}, "tile_rows: found 2.5, expected a positive integer"),
        ({"columns_per_weight": 512}, "columns_per_weight: found 512, expected at most tile_columns"),
        ({"mvm_energy_pj": 1}, "mvm_energy_pj: unknown field, expected one of name, tile_rows"),
    ],
)
def test_a_bad_sheet_names_its_field(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        ChipSheet.load(values("hermes") | changes)
    assert "\n" not in str(caught.value)


def test_a_sheet_without_a_field_says_which():
    lacking = values("hermes")
    del lacking["mvm_energy_nj"]
    with pytest.raises(InputError, match="hardware hermes: mvm_energy_nj: missing"):
        ChipSheet.load(lacking)


def test_hermes_agrees_with_the_published_throughput_and_efficiency():
    """63.1 TOPS and 9.76 TOPS/W of 64 cores, to the digits of the sheet's figures."""
    hermes = ChipSheet.load(values("hermes"))
    operations = 2 * hermes.tile_rows * hermes.tile_columns
    assert 64 * operations / hermes.mvm_time_ns / 1e3 == pytest.approx(63.1, rel=0.005)
    assert operations / hermes.mvm_energy_nj / 1e3 == pytest.approx(9.76, rel=0.005)
    assert 64 * operations / 521 / 1e3 == pytest.approx(16.1, rel=0.005)
    assert operations / 52.9 / 1e3 == pytest.approx(2.48, rel=0.005)


def test_neurram_agrees_with_the_points_of_its_curves():
    """TOPS of 48 cores and TOPS/W, 8 and 10 bits, then 4 and 6, to the digits of the sheet's figures."""
    neurram = ChipSheet.load(values("neurram"))
    assert (neurram.weight_rows, neurram.weight_columns) == (128, 256)
    operations = 2 * neurram.weight_rows * neurram.weight_columns
    assert 48 * operations / neurram.mvm_time_ns / 1e3 == pytest.approx(0.2639, rel=0.005)
    assert operations / neurram.mvm_energy_nj / 1e3 == pytest.approx(6.437, rel=0.005)
    assert 48 * operations / 4230 / 1e3 == pytest.approx(0.7439, rel=0.005)
    assert operations / 4.11 / 1e3 == pytest.approx(15.95, rel=0.005)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("vanilla", {}, Deployment()),
        ("average", {"copies": 3}, Deployment(cells=3.0, products=3.0)),
        ("bit_slicing", {}, Deployment(cells=7.0, products=7.0)),
        ("weight_remapping", {"spare": 0.1}, Deployment(cells=1.1, products=1.1)),
        ("romer", {}, Deployment(calibrated=True)),
        ("digital_router", {}, Deployment(analog=frozenset(KINDS) - {"router"})),
    ],
)
def test_methods_are_laid_out_as_they_say(olmoe, name, options, expected):
    fitted, method = fitted_for(olmoe), methods.get(name)
    found = deployed(method, olmoe, Placement(), fitted, method.options(fitted, options))
    assert found == expected


def test_digital_experts_are_deployed_by_slot(qwen3):
    fitted, method = fitted_for(qwen3), methods.get("digital_experts")
    found = deployed(method, qwen3, Placement(), fitted, method.options(fitted, {"share": 0.25}))
    assert [len(slots) for slots in found.digital_experts] == [4, 4] and "attention" not in found.analog
    same = found.stretched(np.tile(np.arange(16, 0, -1.0), (2, 1)), 2, 16)  # experts in falling order of load already
    assert same.digital_experts == found.digital_experts
    assert [len(slots) for slots in found.stretched(np.ones((2, 16)), 5, 64).digital_experts] == pytest.approx(
        [16] * 5, abs=3
    )


def test_cells_are_those_of_the_shape_that_is_costed(sheet):
    """A share of the experts off the arrays counts by what they hold in that shape, and lm_head is left out of it."""
    plain, shape = Deployment(), SHAPES["olmoe"]
    slots = (frozenset(range(16)),) * shape.moe_layers  # a quarter of 64
    experts = shape.moe_layers * shape.experts * 3 * shape.hidden * shape.expert_width
    whole = experts + shape.layers * (4 * shape.hidden**2 + shape.experts * shape.hidden)  # attention and routers
    assert Work(shape, sheet, plain).weights_stored(0) == whole
    assert cells_of(shape, sheet, Deployment(digital_experts=slots), plain) == pytest.approx(1 - experts / 4 / whole)
    assert cells_of(shape, sheet, Deployment(cells=2.0, products=2.0), plain) == 2


def test_cached_keys_on_arrays_are_refused(olmoe):
    fitted, method = fitted_for(olmoe), methods.get("vanilla")
    with pytest.raises(InputError, match="writing cells is not priced"):
        deployed(method, olmoe, Placement("linear+kv"), fitted, {})
