"""Outliers: the largest weights are exact, the others err by a smaller range, within the budget and without reading."""

import math

import pytest
import torch

from romer import methods
from romer.adc import Adc, Converter
from romer.compensation import Compensated
from romer.corrections import Affine, Chain
from romer.cost import cost
from romer.encoding import PLAIN, Layout, Plain
from romer.errors import InputError
from romer.methods import Fitted
from romer.moments import Moments, collect
from romer.noise import Conductance, Draws, NoiseModel, slot_name
from romer.outliers import LEVELS, Clipped, Outliers, clipped, gains, prices
from romer.placement import Placement, analog_shapes
from romer.programming import Programmed, program, rewrite_slots
from romer.routers import moe_layers
from romer.sensitivity import collect as weigh

WEIGHT = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
NAME = "w"
FLAT = NoiseModel(errors=(Conductance(lambda g, draws, kind: g + draws.normal(kind, g), 0.0, 25.0, "column"),))


@pytest.fixture
def fitted(model, ids):
    moments = collect(model, ids, 64)
    return Fitted(torch.ones(1, 1), 1, 0.2, None, moments, weigh(model, ids, moments, Placement(), 64), FLAT)


def power(error):
    return error.double().square().mean().item()


@pytest.mark.parametrize("count", [1, 5])
def test_the_largest_of_every_output_are_cut_to_the_next_one(count):
    cut = clipped(WEIGHT, count)
    size = WEIGHT.abs().sort(1, descending=True).values
    torch.testing.assert_close(cut.abs().amax(1), size[:, count])
    assert ((cut != WEIGHT).sum(1) == count).all() and (cut.sign() == WEIGHT.sign()).all()


@pytest.mark.parametrize("count", [1, 5])
def test_errors_shrink_with_the_range_that_is_left(count):
    """Cells that err by as much whatever they hold: by the square of the ranges of each output."""
    draws = Draws(0, 0, NAME)
    plain, found = (e.store(FLAT, WEIGHT, draws) - WEIGHT for e in (PLAIN, Clipped(PLAIN, ((NAME, count),))))
    ratio = clipped(WEIGHT, count).abs().amax(1) / WEIGHT.abs().amax(1)
    torch.testing.assert_close(found, plain * ratio[:, None], rtol=0, atol=1e-4)
    assert power(found) < 0.95 * power(plain)


def test_arrays_without_noise_and_tensors_without_outliers_are_left_as_they_are():
    layout = Clipped(PLAIN, (("v", 3),))
    draws = Draws(0, 0, NAME)
    assert layout.store(FLAT, WEIGHT, draws).equal(PLAIN.store(FLAT, WEIGHT, draws))
    exact = Clipped(PLAIN, ((NAME, 3),)).store(NoiseModel(0.0), WEIGHT, draws)
    torch.testing.assert_close(exact, WEIGHT, rtol=0, atol=1e-6)


def test_a_correction_is_told_of_the_weights_outliers_and_all():
    """What acts where readings are exact, the clean weights where they are of no worth."""
    counts, moments = ((NAME, 4),), {NAME: Moments(torch.eye(300), torch.zeros(300), 4000)}
    for read_error, most in ((0.0, 1e-12), (100.0, 0.05)):
        correction = Chain((Affine(moments), Outliers(counts)))
        layout = Layout(Clipped(PLAIN, counts), correction=correction, read_error=read_error)
        acts, told = Programmed(FLAT, 0, {NAME: WEIGHT}, layout).stored(NAME, WEIGHT)
        assert power(told - (WEIGHT if read_error else acts)) <= most * power(acts - WEIGHT)


@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_the_budget_is_kept_and_counted_and_nothing_is_read_back(model, fitted, budget):
    method = methods.get("outliers")
    options = method.options(fitted, {"budget": budget})
    found = cost(method, model, Placement(), fitted, options)
    assert 0.5 * budget < found.side <= budget and found.cells == 1 and found.readbacks == 0
    layout = method.layout(model, fitted, options)
    shapes = analog_shapes(model, Placement())
    spent = sum(prices(shapes)[name] * count for name, count in layout.encoding.counts)
    assert spent == pytest.approx(found.side * sum(math.prod(s) for s in shapes.values()))


def test_they_go_where_the_expected_loss_falls_most(model, fitted):
    """And gains are falling, those that programming with so many outliers has."""
    at = FLAT, 7, Placement(), fitted.moments, fitted.sensitivity
    found = gains(model, *at)
    name = next(n for n in found if n.endswith("q_proj.weight"))
    weight, seen, gamma = model.get_parameter(name), fitted.moments[name], fitted.sensitivity[name]

    def expected(count):
        error = Clipped(PLAIN, ((name, count),)).store(FLAT, weight, Draws(0, 7, name)) - weight
        return (gamma * ((error @ seen.second) * error).sum(1)).sum().item() / 2

    assert found[name][0].item() == pytest.approx(expected(0) - expected(1), rel=1e-3)
    assert all((each.diff() <= 0).all() and len(each) <= LEVELS[-1] for each in found.values())
    counts = dict(methods.get("outliers").layout(model, fitted, {"budget": 0.02, "ranks": "loss"}).encoding.counts)
    each = prices(analog_shapes(model, Placement()))
    taken = min(found[n][c - 1].item() / each[n] for n, c in counts.items())
    left = max(found[n][counts.get(n, 0)].item() / each[n] for n in found if counts.get(n, 0) < len(found[n]))
    assert taken >= left * (1 - 1e-6) or sum(each[n] * c for n, c in counts.items()) > 0.015 * sum(
        math.prod(s) for s in analog_shapes(model, Placement()).values()
    )


@pytest.mark.parametrize("inner", [PLAIN, "compensated"])
def test_slots_are_written_together_as_one_by_one_and_again(model, fitted, inner):
    path, _ = moe_layers(model)[0]
    name = f"{path}.experts.gate_up_proj"
    encoding = Compensated(fitted.moments, 8) if inner == "compensated" else inner
    layout = Clipped(encoding, ((name, 1),))
    weight = model.get_parameter(name)
    draws = [Draws(0, 0, slot_name(name, i)) for i in range(len(weight))]
    one_by_one = torch.stack([layout.store(FLAT, w, d) for w, d in zip(weight, draws, strict=True)])
    torch.testing.assert_close(layout.store_slots(FLAT, weight, draws), one_by_one, rtol=1e-4, atol=1e-4)
    with program(model, FLAT, layout=Layout(layout, correction=Outliers(layout.counts))):
        copied = model.get_parameter(name)[1].clone()
        with rewrite_slots(model, {f"{path}.experts": {1: 1}}):
            torch.testing.assert_close(model.get_parameter(name)[1], copied, rtol=1e-4, atol=1e-4)


def test_plus_shares_its_budget_with_them(model, fitted):
    plus, left = methods.get("romer_plus"), {}
    for share in (0.0, 0.5, 1.0):
        options = plus.options(fitted, {"outliers": share, "budget": 0.1, "block": 8})
        found = cost(plus, model, Placement(), fitted, options)
        assert 0.05 < found.side <= 0.1 and found.readbacks == 2 - (share == 1)
        left[share] = plus.layout(model, fitted, options)
    assert isinstance(left[0.5].encoding, Clipped) and isinstance(left[0.5].encoding.encoding, Compensated)
    assert not isinstance(left[0.0].encoding, Clipped | Plain)
    with pytest.raises(InputError, match="outliers: found 1.5, expected 0 ≤ share"):
        plus.layout(model, fitted, plus.options(fitted, {"outliers": 1.5}))


def test_what_is_not_simulated_is_refused(model, fitted):
    layout = methods.get("outliers").layout(model, fitted, {"budget": 0.02, "ranks": "loss"})
    with (
        pytest.raises(InputError, match="under an ADC"),
        program(model, NoiseModel(0.1, adc=Converter(Adc(), {})), layout=layout),
    ):
        pass
    with pytest.raises(InputError, match="no calibration inputs of"):
        gains(model, FLAT, 0, Placement(), {}, fitted.sensitivity)
    unknown = Fitted(torch.ones(1, 1), 1, 0.2)
    with pytest.raises(InputError, match="nothing is known of the noise"):
        methods.get("outliers").layout(model, unknown, {"budget": 0.02, "ranks": "loss"})
