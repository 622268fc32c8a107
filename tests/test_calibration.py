"""Finding σ_dev for a KL target: met within its tolerance and twelve evaluations, or refused."""

import itertools
import math
import random

import pytest

from romer.calibration import TOLERANCE, TYPICAL, fit_sigma
from romer.errors import InputError
from romer.evaluate.perplexity import kl_divergence, log_probabilities
from romer.noise import NoiseModel
from romer.programming import program
from romer.routers import moe_layers

POWERS = (1.0, 1.5, 2.0, 3.0, 4.0)
SIGMAS = (3e-4, 2e-3, 0.01, 0.0499, 0.05, 0.13, 0.6, 1.5)
TARGETS = (1e-4, 0.03, 0.14, 2.0)


@pytest.mark.parametrize("power, sigma, target", list(itertools.product(POWERS, SIGMAS, TARGETS)))
def test_a_power_law_is_met_within_the_tolerance(power, sigma, target):
    """KL = c σ^p with c such that the answer is `sigma`."""
    calls = []

    def divergence(s):
        calls.append(s)
        return [target * (s / sigma) ** power]

    fit = fit_sigma(divergence, target)
    assert abs(fit.kl / target - 1) <= TOLERANCE
    assert abs(fit.sigma_dev / sigma - 1) <= (1 + TOLERANCE) ** (1 / power) - 1 + 1e-9
    assert fit.evaluations == len(calls) <= 12
    assert [s for s, _ in fit.curve] == sorted(calls)
    assert dict(fit.curve)[fit.sigma_dev] == (fit.kl,)


@pytest.mark.parametrize("scale", [0.01, 0.2])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
def test_a_curve_that_saturates_is_met_too(scale, share):
    """Real KL bends over towards ln V."""
    ceiling = 4.0
    fit = fit_sigma(lambda s: [ceiling * (1 - math.exp(-((s / scale) ** 2)))], share * ceiling)
    expected = scale * math.sqrt(-math.log1p(-share))
    assert abs(fit.kl / (share * ceiling) - 1) <= TOLERANCE
    assert fit.sigma_dev == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "curve, target",
    [
        (lambda s: 3 * s + (s / 0.02) ** 6, 0.05),  # steeper above the target than below
        (lambda s: 1 / (1 / s + (0.3 / s) ** 8), 0.3),  # and the other way round
    ],
    ids=["convex", "concave"],
)
def test_a_bend_between_the_brackets_does_not_stall_the_search(curve, target):
    """Plain regula falsi would keep one end for ever."""
    assert fit_sigma(lambda s: [curve(s)], target).kl == pytest.approx(target, rel=TOLERANCE)


def test_the_mean_over_realisations_meets_the_target_and_each_has_a_sigma():
    factors = (0.7, 1.0, 1.6)
    fit = fit_sigma(lambda s: [f * 30 * s**2 for f in factors], target=0.2)
    assert sum(f * 30 * fit.sigma_dev**2 for f in factors) / 3 == pytest.approx(0.2, rel=TOLERANCE)
    alone = [math.sqrt(0.2 / (30 * f)) for f in factors]  # where one realisation alone meets the target
    assert fit.sigma_by_realisation == pytest.approx(alone, rel=1e-6)
    assert all(len(values) == 3 for _, values in fit.curve)


@pytest.mark.parametrize("target", (1e-9, 1e-4, *(kl for kl, _ in TYPICAL), 0.4, 30.0, 1e9))
def test_a_search_begins_where_a_typical_model_meets_the_target(target):
    """Within the bounds; from a bound, too, the search goes inward."""
    tried = []
    fit = fit_sigma(lambda s: tried.append(s) or [target * s / 0.1], target)
    assert fit.sigma_dev == pytest.approx(0.1, rel=0.02)
    assert 0.999e-7 <= tried[0] <= 2.001 and tried[0] == pytest.approx(dict(TYPICAL).get(target, tried[0]))


def test_a_start_that_already_meets_the_target_is_taken():
    fit = fit_sigma(lambda s: [56 * s**2, 58 * s**2], 57 * 0.05**2, start=0.05)
    assert fit.evaluations == 2 and fit.sigma_dev == pytest.approx(0.05)  # and one more σ, for the slope
    assert fit.sigma_by_realisation == pytest.approx([0.05 * math.sqrt(57 / 56), 0.05 * math.sqrt(57 / 58)])


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("off", [0.95, 0.995, 1.0, 1.05])
def test_a_fit_close_to_the_start_has_the_interval_of_its_own_slope(power, off):
    """Where only close σ were tried, a slope of 2 would make the interval of a flat curve too narrow."""
    factors = (0.8, 1.25)
    fit = fit_sigma(lambda s: [f * (s / 0.05) ** power for f in factors], off**power * sum(factors) / 2, start=0.05)
    assert fit.slope == pytest.approx(power, rel=1e-6) and fit.evaluations <= 12
    alone = [0.05 * off * (sum(factors) / 2 / f) ** (1 / power) for f in factors]
    assert fit.sigma_by_realisation == pytest.approx(alone, rel=1.01 ** (1 / power) - 1 + 1e-6)


@pytest.mark.parametrize("target", [0.0, -0.1, math.nan, math.inf])
def test_a_target_that_is_none_is_refused_before_anything_runs(target):
    def never(sigma):
        raise AssertionError("evaluated")

    with pytest.raises(InputError, match="KL target: found"):
        fit_sigma(never, target)


@pytest.mark.parametrize(
    "divergence, message",
    [
        (lambda s: [0.1 * (1 - math.exp(-(s**2)))], "cannot be met: at sigma_dev = 2 "),  # never that much
        (lambda s: [1.0 + s], "cannot be met: at sigma_dev = 1e-07"),  # never that little
        (lambda s: [0.01 if s < 0.07 else 3.0], "not met within 12 evaluations"),  # a jump across the target
        (lambda s: [math.nan, 0.1], "is nan, expected a finite number > 0"),
        (lambda s: [math.inf], "is inf, expected a finite number > 0"),
        (lambda s: [0.0], "is 0.0, expected a finite number > 0"),
    ],
)
def test_a_curve_that_misses_the_target_is_refused_in_one_line(divergence, message):
    evaluated = []

    def counted(sigma):
        evaluated.append(sigma)
        return divergence(sigma)

    with pytest.raises(InputError) as error:
        fit_sigma(counted, 0.5)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(evaluated) <= 12


def test_the_bounds_are_kept():
    seen = []
    with pytest.raises(InputError, match="cannot be met"):
        fit_sigma(lambda s: seen.append(s) or [1e-9 * s], 1.0, bounds=(0.01, 0.4))
    assert max(seen) == pytest.approx(0.4) and min(seen) >= 0.01


def test_a_model_is_fitted_and_keeps_its_weights(olmoe, ids, bits):
    """With all experts chosen: where a few tokens change experts, KL(σ) jumps by more than one percent."""
    for _, block in moe_layers(olmoe):
        block.gate.top_k = 8
    before, clean = bits(olmoe), log_probabilities(olmoe, ids, 64)

    def divergence(sigma):
        values = []
        for realisation in range(2):
            with program(olmoe, NoiseModel(sigma), realisation):
                values.append(kl_divergence(olmoe, ids, clean, 64))
        return values

    fit = fit_sigma(divergence, 0.1)
    assert sum(divergence(fit.sigma_dev)) / 2 == pytest.approx(0.1, rel=TOLERANCE)
    assert bits(olmoe) == before


@pytest.mark.parametrize("jitter", [0.01, 0.03])
def test_a_curve_that_jumps_is_met_all_the_same(jitter):
    """KL of few tokens jumps by per cents from one σ to the next: 200 such curves, and hardly one is missed."""
    missed = 0
    for curve in range(200):

        def divergence(s, curve=curve):
            jump = random.Random(f"{curve} {s:.6e}").gauss(0, jitter)
            return [0.05 * (s / 1e-3) ** 0.3 * math.exp(jump)]

        try:
            fit = fit_sigma(divergence, 0.0137)
            assert abs(fit.kl / 0.0137 - 1) < 0.02 and fit.evaluations <= 12
        except InputError:
            missed += 1
    assert missed <= 2
