"""Layouts of weights on cells: what each does to eq. 2's errors, and what it costs."""

import math
from dataclasses import replace

import pytest
import torch

from romer import methods
from romer.chips.pcm import Pcm
from romer.cost import TILE_ROWS, cost
from romer.encoding import PLAIN, Layout, Plain, Remapped, Replicated, Sliced, realise
from romer.errors import InputError
from romer.methods.digital_experts import digital_parts
from romer.moments import Moments
from romer.noise import ColumnGain, Conductance, NoiseModel
from romer.placement import Placement, coverage
from romer.programming import program, rewrite_slots
from romer.routers import moe_layers

WEIGHT = torch.randn(400, 500, generator=torch.Generator().manual_seed(3))
EXPERTS = torch.randn(4, 60, 50, generator=torch.Generator().manual_seed(4))
N = WEIGHT.numel()
SIGMA = 0.1
NOISE = NoiseModel(SIGMA)
ALL = [PLAIN, Replicated(3), Sliced(), Sliced(8, 2), Sliced(6, 1, "offset-binary"), Remapped(0.1)]


def acts(encoding, weight=WEIGHT, noise=NOISE, realisation=0, name="layer.weight"):
    return realise(encoding, noise, name, weight, realisation).double()


def spread(encoding, **kwargs):
    """Relative standard deviation of the errors over weights that are not close to zero."""
    large = WEIGHT.abs() > 0.5
    return ((acts(encoding, **kwargs) / WEIGHT.double() - 1)[large]).std().item()


def test_the_plain_layout_is_the_noise_model_bit_by_bit():
    for weight in (WEIGHT, EXPERTS, WEIGHT.bfloat16()):
        assert realise(PLAIN, NOISE, "w", weight, 2).equal(NOISE.realise("w", weight, 2))
        assert realise(Replicated(1), NOISE, "w", weight, 2).equal(NOISE.realise("w", weight, 2))
        assert realise(Plain(), NOISE, "w", weight, 2).equal(NOISE.realise("w", weight, 2))


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_divide_the_variance(copies):
    assert spread(Replicated(copies)) * math.sqrt(copies) == pytest.approx(SIGMA, rel=4 / math.sqrt(N))


def test_the_first_array_of_a_layout_has_the_errors_of_the_plain_one():
    """So that layouts are compared on the same noise: the mean of two correlates with the first by 1/√2."""
    errors = torch.stack([(acts(e) - WEIGHT).flatten() for e in (PLAIN, Replicated(2))])
    assert torch.corrcoef(errors)[0, 1].item() == pytest.approx(math.sqrt(0.5), abs=4 / math.sqrt(N))


@pytest.mark.parametrize("encoding", ALL[2:5], ids=repr)
def test_slices_without_noise_are_the_rounded_weight(encoding):
    step = WEIGHT.abs().max() / (2 ** (encoding.bits - 1) - 1)
    found = acts(encoding, noise=NoiseModel(0.0))
    torch.testing.assert_close(found, (WEIGHT / step).round().double() * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bits, per_cell, form, slices",
    [(8, 1, "sign-magnitude", 7), (8, 2, "sign-magnitude", 4), (8, 7, "sign-magnitude", 1), (8, 1, "offset-binary", 8)],
)
def test_slices_are_counted(bits, per_cell, form, slices):
    encoding = Sliced(bits, per_cell, form)
    assert encoding.cells == encoding.products == encoding.slices == slices


def test_slices_add_up_independent_errors():
    """w̃ = s Σ_j 2^j d_j (1 + ε_j): the variance of a weight of code q is σ² s² Σ_j 4^j d_j."""
    q = 0b1011010
    weight = torch.full((300, 300), float(q))
    weight[0, 0] = 127.0  # the full range, s = 1
    error = (acts(Sliced(), weight) - weight)[1:].std().item()
    expected = SIGMA * math.sqrt(sum(4.0**j for j in range(7) if q >> j & 1))
    assert error == pytest.approx(expected, rel=4 / math.sqrt(2 * 299 * 300))
    assert error < 0.9 * SIGMA * q  # below plain, which errs by σ q


def test_offset_binary_disturbs_weights_near_zero():
    """Its top slice is on for q = 0, with an error of σ half the range; sign-magnitude stores nothing there."""
    weight = torch.zeros(300, 300)
    weight[0, 0] = 127.0
    offset, signed = (acts(Sliced(8, 1, form), weight)[1:] for form in ("offset-binary", "sign-magnitude"))
    assert offset.std().item() == pytest.approx(128 * SIGMA, rel=4 / math.sqrt(2 * 299 * 300))
    assert not signed.any()


def test_spare_cells_halve_the_variance_of_the_most_sensitive_weights():
    power = torch.linspace(0.1, 3.0, WEIGHT.shape[1])
    encoding = Remapped(0.1, {"layer.weight": Moments(power.diag(), torch.zeros_like(power), 1)})
    mended, plain = acts(encoding), acts(PLAIN)
    touched = mended != plain
    sensitivity = WEIGHT.square() * power
    assert touched.sum() == pytest.approx(0.1 * N, abs=2)
    assert sensitivity[touched].min() >= sensitivity[~touched].max()
    relative = (mended / WEIGHT.double() - 1)[touched].std().item()
    assert relative == pytest.approx(SIGMA / math.sqrt(2), rel=4 / math.sqrt(0.2 * N))


def test_rescaling_columns_does_nothing_under_eq_2_and_something_under_conductance_errors():
    assert acts(Remapped(0.0)).equal(acts(PLAIN))
    pairs = Conductance(lambda g, draws, kind: g + 0.5 * draws.normal(kind, g), 0.0, 25.0)
    noise = NoiseModel(errors=(pairs, ColumnGain(0.0)))
    rows = WEIGHT * torch.linspace(0.05, 1.0, len(WEIGHT))[:, None]  # columns of the array that use little of its range
    plain, scaled = (acts(e, rows, noise) - rows for e in (PLAIN, Remapped(0.0)))
    assert scaled[:40].std() < 0.3 * plain[:40].std()
    assert acts(Remapped(0.0), rows, noise).equal(
        acts(PLAIN, rows, replace(noise, errors=(replace(pairs, scaling="column"), ColumnGain(0.0))))
    )


@pytest.mark.parametrize("encoding", ALL[:4], ids=repr)
def test_the_mean_drift_is_taken_out_of_every_layout(encoding):
    """An hour takes more than a tenth of what was written; a factor against the exact weights gives it back."""
    cells = Pcm(3600.0)
    drifted, mended = (
        acts(encoding, noise=NoiseModel(errors=(Conductance(cells, 0.0, 25.0, compensate=c),))) for c in (False, True)
    )
    gain = [((w * WEIGHT).sum() / WEIGHT.double().square().sum()).item() for w in (drifted, mended)]
    assert gain[0] < 0.9 and gain[1] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("encoding", ALL, ids=repr)
def test_every_expert_slot_is_an_array_of_its_own(encoding):
    whole = acts(encoding, EXPERTS)
    for i, w in enumerate(EXPERTS):
        assert realise(encoding, NOISE, f"layer.weight[{i}]", w, 0).double().equal(whole[i])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Replicated(0), "copies: found 0"),
        (lambda: Replicated(1.5), "copies: found 1.5"),
        (lambda: Sliced(1), "bits: found 1"),
        (lambda: Sliced(8, 9), "bits_per_cell: found 9"),
        (lambda: Sliced(8, 1, "gray"), "slicing form: found 'gray'"),
        (lambda: Remapped(1.5), "spare: found 1.5"),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


# In a model.


def test_digital_parts_keep_their_weights(model, bits):
    before = bits(model)
    digital = digital_parts(model, 0.25)
    with program(model, NOISE, 0, layout=Layout(digital=digital)):
        changed = {name for name, value in bits(model).items() if value != before[name]}
        for row in coverage(model, Placement()):
            assert (row.parameter in changed) == (row.analog and row.kind != "attention")
        for path, block in moe_layers(model):
            norms = torch.tensor([w.norm(dim=1).max() for w in block.experts.gate_up_proj])
            slots = [i for i in range(len(norms)) if f"{path}.experts.down_proj[{i}]" in digital]
            assert len(slots) == math.ceil(0.25 * len(norms))
    assert bits(model) == before
    with program(model, NOISE, 0, layout=Layout(digital=digital)):
        for path, block in moe_layers(model):
            for i in range(len(block.experts.down_proj)):
                name = f"{path}.experts.down_proj"
                clean = before[name][
                    i * block.experts.down_proj[i].nbytes : (i + 1) * block.experts.down_proj[i].nbytes
                ]
                assert (block.experts.down_proj[i].numpy().tobytes() == clean) == (f"{name}[{i}]" in digital)


def test_copied_experts_are_laid_out_like_the_others(olmoe):
    """A slot that is overwritten gets the encoding's errors of its own arrays."""
    ((path, block), *_) = moe_layers(olmoe)
    layout, clean = Layout(Replicated(4)), block.experts.down_proj[1].clone()
    with program(olmoe, NOISE, 0, layout=layout), rewrite_slots(olmoe, {f"{path}.experts": {6: 1}}):
        expected = realise(layout.encoding, NOISE, f"{path}.experts.down_proj[6]", clean, 0)
        assert block.experts.down_proj[6].equal(expected)


FITTED = methods.Fitted(torch.rand(2, 8, generator=torch.Generator().manual_seed(1)), n_replace=2, strength=0.1)


def costs(model, name, fitted=FITTED, **options):
    method = methods.get(name)
    return cost(method, model, Placement(), fitted, method.options(fitted, options))


def test_costs_follow_from_the_layout(olmoe):
    plain = {name: costs(olmoe, name) for name in ("vanilla", "romer_calibration")}
    assert all((c.cells, c.products, c.conversions, c.digital) == (1, 1, 1, 0) for c in plain.values())
    for name, options, times in (("average", {"copies": 3}, 3), ("bit_slicing", {"bits": 8, "bits_per_cell": 2}, 4)):
        found = costs(olmoe, name, **options)
        assert (found.cells, found.products, found.conversions) == pytest.approx((times,) * 3)
    spare = costs(olmoe, "weight_remapping", spare=0.2)
    assert (spare.cells, spare.products, spare.conversions) == pytest.approx((1.2,) * 3)
    rows = {row.kind: 0 for row in coverage(olmoe, Placement())}
    for row in coverage(olmoe, Placement()):
        rows[row.kind] += row.count * row.analog
    share = rows["router"] / sum(rows.values())
    found = costs(olmoe, "digital_router")
    assert (found.cells, found.digital) == pytest.approx((1 - share, share))
    found = costs(olmoe, "digital_experts", share=0.25)
    share = (rows["attention"] + 0.25 * rows["routed expert"]) / sum(rows.values())
    assert (found.cells, found.digital) == pytest.approx((1 - share, share))


def test_replacement_computes_hot_experts_twice(olmoe):
    """No further cells; the products of hot experts come on top, whatever is done to the logits."""
    counts = torch.tensor([[40, 30, 10, 5, 5, 5, 4, 1]] * 2)
    fitted = replace(FITTED, activation=counts.float(), counts=counts)
    found = costs(olmoe, "romer_replacement", fitted, n_replace=2)
    blocks = moe_layers(olmoe)
    expert = sum(p[0].numel() for p in (blocks[0][1].experts.gate_up_proj, blocks[0][1].experts.down_proj))
    dense = sum(r.count for r in coverage(olmoe, Placement()) if r.analog and r.kind != "routed expert")
    routed = len(blocks) * blocks[0][1].gate.top_k * expert
    assert found.cells == 1
    assert found.products == pytest.approx((dense + 1.7 * routed) / (dense + routed))
    assert costs(olmoe, "romer_replacement", fitted, n_replace=2, replacement="literal").products == found.products


def test_conversions_are_counted_by_tile(olmoe):
    assert all(row.shape[-1] <= TILE_ROWS for row in coverage(olmoe, Placement()) if row.analog)
    assert costs(olmoe, "digital_router").conversions < 1
