"""The registry of methods, and the sweep that measures them in pairs on the same noise."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from romer import methods
from romer.adc import Adc, Converter
from romer.errors import InputError
from romer.evaluate.perplexity import perplexity
from romer.evaluate.sweep import Point, points, sweep
from romer.noise import CLEAN, NoiseModel, slot_name
from romer.placement import Placement, coverage
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routing import RouterCalibration, apply

CONF = Path(__file__).resolve().parents[1] / "conf" / "method"
FITTED = methods.Fitted(torch.rand(2, 8, generator=torch.Generator().manual_seed(1)), n_replace=2, strength=0.1)
WANTED = [("vanilla", {}), ("clean", {}), ("romer", {}), ("romer_calibration", {}), ("romer_replacement", {})]
WANTED += [(name, {}) for name in ("average", "bit_slicing", "weight_remapping", "digital_router", "digital_experts")]
LEARNING = ("kb_calibration", "channel_affine", "compensated_programming")  # from the moments of inputs
NOISE, PLACEMENT = NoiseModel(0.1), Placement()


class Counting(NoiseModel):
    """The same noise, with a count of what was drawn."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "drawn", Counter())

    def realise(self, name, weight, realisation, replica=0):
        self.drawn[name, realisation] += 1
        return super().realise(name, weight, realisation, replica)


# The registry.


@pytest.mark.parametrize("name", [*(name for name, _ in WANTED), *LEARNING])
def test_every_method_has_a_configuration_that_it_accepts(name):
    method = methods.get(name)
    configured = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert set(configured) == {name}
    given = {key: value for key, value in configured[name].items() if value is not None}  # null: as fitted
    assert set(configured[name]) <= set(method.options(FITTED, {}))
    options = method.options(FITTED, given)
    plan, calibration = method.routing(FITTED, options)
    assert (plan is not None) == (name in ("romer", "romer_replacement"))
    assert (calibration is not None) == (name in ("romer", "romer_calibration"))
    assert method.noisy == (name != "clean")


def test_what_is_not_given_comes_from_the_fit():
    plan, calibration = methods.get("romer").routing(FITTED, methods.get("romer").options(FITTED, {}))
    assert plan == ReplacementPlan.fit(FITTED.activation, 2, "split")
    assert calibration == RouterCalibration("iqr", 0.1)
    given = {"n_replace": 3, "strength": 0.4, "replacement": "literal", "calibration": "shrink"}
    plan, calibration = methods.get("romer").routing(FITTED, methods.get("romer").options(FITTED, given))
    assert plan == ReplacementPlan.fit(FITTED.activation, 3, "literal")
    assert calibration == RouterCalibration("shrink", 0.4)


def test_options_are_complete_and_the_given_ones_are_left_alone():
    given = {"strength": 0.3}
    assert methods.get("romer").options(FITTED, given) == {
        "n_replace": 2,
        "replacement": "split",
        "strength": 0.3,
        "calibration": "iqr",
    }
    assert given == {"strength": 0.3}


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("vanilla", {"strength": 0.1}, "method vanilla: unknown option 'strength', expected none"),
        (
            "romer_replacement",
            {"n": 2},
            "method romer_replacement: unknown option 'n', expected n_replace, replacement",
        ),
        ("romer", {"lambda": 0.1}, "method romer: unknown option 'lambda'"),
        ("romer", {"n_replace": 2.5}, "method romer: n_replace: found 2.5, expected int"),
        ("romer", {"strength": "much"}, "method romer: strength: found 'much', expected float"),
        ("romr", {}, "method: found 'romr', expected one of average, bit_slicing, channel_affine, clean,"),
    ],
)
def test_unknown_methods_and_wrong_options_are_refused_in_one_line(name, given, message):
    with pytest.raises(InputError) as error:
        points(FITTED, [(name, given)], [0])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_points_are_every_method_on_every_realisation_and_clean_once():
    listed = points(FITTED, WANTED, [4, 2])
    assert [(p.method, p.realisation) for p in listed if p.method == "clean"] == [("clean", CLEAN)]
    assert Counter((p.method, p.realisation) for p in listed if p.method != "clean") == Counter(
        (name, r) for name, _ in WANTED if name != "clean" for r in (4, 2)
    )
    assert len({str(sorted(p.key.items(), key=str)) for p in listed}) == len(listed)


# The sweep.


def test_each_realisation_is_programmed_once(olmoe):
    noise = Counting(0.1)
    todo = points(FITTED, [("vanilla", {}), ("clean", {}), ("romer_calibration", {})], [1, 0])
    todo.sort(key=lambda p: p.method)  # realisations interleaved
    assert len(list(sweep(olmoe, todo, FITTED, noise, PLACEMENT, lambda: 0.0))) == 5
    arrays = set()
    for row in (row for row in coverage(olmoe, PLACEMENT) if row.analog):
        slots = range(row.shape[0] if len(row.shape) == 3 else 0)
        arrays |= {slot_name(row.parameter, i) for i in slots} or {row.parameter}
    assert noise.drawn == {(name, r): 1 for name in arrays for r in (0, 1)}


def test_values_are_those_of_each_point_alone_on_the_same_noise(olmoe, ids, bits):
    """Paired: whatever else is measured, and in whatever order, a point sees its realisation."""
    before, todo = bits(olmoe), points(FITTED, WANTED, [0, 1])

    def measure():
        return perplexity(olmoe, ids, 64)

    found = {str(p): value for p, value in sweep(olmoe, todo, FITTED, NOISE, PLACEMENT, measure)}
    assert bits(olmoe) == before
    assert len(found) == len(todo) == 19
    backwards = {str(p): v for p, v in sweep(olmoe, todo[::-1], FITTED, NOISE, PLACEMENT, measure)}
    assert backwards == found
    for point in todo:
        method = methods.get(point.method)
        plan, calibration = method.routing(FITTED, point.options)
        layout = method.layout(olmoe, FITTED, point.options)
        if point.realisation == CLEAN:
            alone = measure()
        else:
            at = method.placement(PLACEMENT)
            with program(olmoe, NOISE, point.realisation, at, layout), apply(olmoe, plan, calibration):
                alone = measure()
        assert found[str(point)] == alone
    assert len(set(found.values())) == 19


def test_doing_nothing_equals_vanilla_on_the_same_realisation(olmoe, ids):
    nothing = [("vanilla", {}), ("romer", {"n_replace": 0, "strength": 0.0})]
    todo = points(FITTED, nothing, [0, 1])
    values = [v for _, v in sweep(olmoe, todo, FITTED, NOISE, PLACEMENT, lambda: perplexity(olmoe, ids, 64))]
    assert values[0] == values[1] != values[2] == values[3]


def test_a_value_that_is_not_finite_stops_and_names_the_point(olmoe, ids, bits):
    before = bits(olmoe)

    def measure():
        raise FloatingPointError("perplexity is nan")

    todo = points(FITTED, [("romer", {})], [3])
    with pytest.raises(InputError, match="point .*'romer'.*'realisation': 3.*: perplexity is nan"):
        list(sweep(olmoe, todo, FITTED, NOISE, PLACEMENT, measure))
    assert bits(olmoe) == before


def test_what_an_adc_rules_out_is_refused_before_anything_is_measured(olmoe):
    def measure():
        raise AssertionError("measured")

    converted = replace(NOISE, adc=Converter(Adc(8), {}))
    todo = points(FITTED, [("clean", {}), ("vanilla", {}), ("weight_remapping", {"spare": 1.0}), ("average", {})], [0])
    with pytest.raises(InputError, match="method average: .*copies.* under an ADC are not simulated"):
        list(sweep(olmoe, todo, FITTED, converted, PLACEMENT, measure))


def test_a_sweep_that_is_left_early_restores_the_model(olmoe, bits):
    before = bits(olmoe)
    running = sweep(olmoe, points(FITTED, WANTED, [0]), FITTED, NOISE, PLACEMENT, lambda: 1.0)
    for point, _ in running:
        if point.method == "romer":
            break
    assert bits(olmoe) != before
    running.close()
    assert bits(olmoe) == before


def test_a_plan_that_does_not_fit_the_model_leaves_nothing(olmoe, bits):
    before = bits(olmoe)
    wrong = methods.Fitted(torch.rand(3, 8), 1, 0.1)
    with pytest.raises(InputError, match="3 layers, the model has 2"):
        list(sweep(olmoe, points(wrong, [("romer", {})], [0]), wrong, NOISE, PLACEMENT, lambda: math.pi))
    assert bits(olmoe) == before


def test_the_key_of_a_point_is_plain_and_complete():
    point = Point("romer", 2, {"strength": 0.1})
    assert point.key == {"method": "romer", "options": {"strength": 0.1}, "realisation": 2}
