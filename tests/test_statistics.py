"""Properties of the statistics over realisations."""

import math

import numpy as np
import pytest
from scipy import stats

from romer.errors import InputError
from romer.statistics import holm, mean_interval, paired, recovered_fraction, recovered_interval

RNG = np.random.default_rng(20)


def test_the_interval_covers_the_mean_as_often_as_its_theory_says():
    # The bootstrap's interval is mean +- z * sqrt((n-1)/n) * standard error, so Student's t gives its coverage.
    n, trials = 30, 1000
    expected = 1 - 2 * stats.t.sf(stats.norm.ppf(0.975) * math.sqrt((n - 1) / n), n - 1)
    hits = 0
    for trial in range(trials):
        mean, low, high = mean_interval(RNG.normal(3.0, 2.0, n), seed=trial, resamples=1000)
        hits += low <= 3.0 <= high
    tolerance = 4 * math.sqrt(expected * (1 - expected) / trials)
    assert abs(hits / trials - expected) < tolerance


def test_a_higher_confidence_gives_a_wider_interval_that_holds_the_mean():
    values = RNG.lognormal(size=12)
    bounds = [mean_interval(values, confidence=c)[1:] for c in (0.5, 0.8, 0.95, 0.99)]
    widths = [high - low for low, high in bounds]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert all(low < values.mean() < high for low, high in bounds)


def test_the_interval_moves_and_scales_with_the_values():
    values = RNG.normal(size=9)
    assert np.allclose(mean_interval(5 + 3 * values), 5 + 3 * np.array(mean_interval(values)))


def test_order_changes_nothing():
    values, other = RNG.normal(size=(2, 11))
    order = RNG.permutation(11)
    assert mean_interval(values[order]) == mean_interval(values)
    assert paired(values[order], other[order]) == paired(values, other)


def test_one_value_has_a_mean_and_no_interval():
    mean, low, high = mean_interval([7.5])
    assert mean == 7.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_values_that_are_missing_or_not_finite_are_refused(values):
    with pytest.raises(InputError, match="values: found"):
        mean_interval(values)


def test_pairing_sees_a_small_gain_under_a_large_common_spread():
    common = RNG.normal(0, 10, 12)
    a, b = common - 0.5 + RNG.normal(0, 0.05, 12), common
    found = paired(a, b)
    assert found.high < 0 and found.t_p < 1e-6 and found.wilcoxon_p == 2 / 2**12
    assert stats.ttest_ind(a, b).pvalue > 0.5


def test_swapping_the_methods_turns_the_sign_and_keeps_the_p_values():
    a, b = RNG.normal(size=(2, 8)) + [[0.3], [0.0]]
    one, other = paired(a, b), paired(b, a)
    assert one.difference == pytest.approx(-other.difference) == pytest.approx(a.mean() - b.mean())
    assert one.t_p == pytest.approx(other.t_p) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert one.wilcoxon_p == pytest.approx(other.wilcoxon_p)


def test_five_pairs_cannot_reach_five_percent_by_ranks():
    assert paired([1, 2, 3, 4, 5], [11, 22, 33, 44, 55]).wilcoxon_p == 0.0625


def test_too_little_evidence_has_p_one_and_equal_differences_p_zero():
    single = paired([1.0], [2.0])
    assert (single.t_p, single.wilcoxon_p, single.n) == (1, 1, 1) and math.isnan(single.low)
    same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.difference, same.low, same.high, same.t_p, same.wilcoxon_p) == (0, 0, 0, 1, 1)
    assert paired([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]).t_p == 0


def test_unequal_lengths_are_refused():
    with pytest.raises(InputError, match="2 and 3 values"):
        paired([1, 2], [1, 2, 3])


def test_holm_by_hand():
    # Ascending: 4 * 0.01 = 0.04, 3 * 0.015 = 0.045, 2 * 0.04 = 0.08; 1 * 0.05 may not fall below the step before.
    assert np.allclose(holm([0.04, 0.01, 0.015, 0.05]), [0.08, 0.04, 0.045, 0.08])
    assert np.allclose(holm([0.9, 0.6]), [1.0, 1.0])
    assert holm([]).size == 0 and holm([0.03])[0] == 0.03


def test_holm_follows_its_input_and_lies_between_raw_and_bonferroni():
    p = RNG.uniform(0, 0.3, 15)
    order = RNG.permutation(15)
    adjusted = holm(p)
    assert np.array_equal(holm(p[order]), adjusted[order])
    assert (adjusted >= p).all() and (adjusted <= np.minimum(15 * p, 1)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


@pytest.mark.parametrize("p", [[-0.1], [1.1], [math.nan, 0.5]])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(InputError, match="p-values"):
        holm(p)


def test_recovered_fraction_has_vanilla_at_zero_and_clean_at_one():
    assert recovered_fraction(10, 20, 20) == 0
    assert recovered_fraction(10, 20, 10) == 1
    assert recovered_fraction(10, 20, math.sqrt(200)) == pytest.approx(0.5)
    assert recovered_fraction(10, 20, 40) == pytest.approx(-1)
    assert recovered_fraction(10, 20, 5) == pytest.approx(2)


def test_recovered_fraction_does_not_depend_on_the_unit_of_perplexity():
    vanilla, method = RNG.uniform(12, 30, (2, 6))
    assert np.allclose(recovered_fraction(30, 3 * vanilla, 3 * method), recovered_fraction(10, vanilla, method))


def test_nothing_to_recover_is_nan_and_bad_perplexities_are_refused():
    assert math.isnan(recovered_fraction(10, 10, 12))
    with pytest.raises(InputError, match="vanilla perplexity"):
        recovered_fraction(10, 0, 12)
    with pytest.raises(InputError, match="method perplexity"):
        recovered_fraction(10, 12, [11, math.nan])


def test_a_share_of_the_mean_loss_is_not_ruled_by_a_draw_that_did_no_harm():
    vanilla = 10 * np.exp([0.2, 0.2, 0.2, 0.2, 0.0001])
    method = 10 * np.exp([0.1, 0.1, 0.1, 0.1, 0.1])
    share, low, high = recovered_interval(10, vanilla, method)
    assert share == pytest.approx((0.8001 - 0.5) / 0.8001)
    assert np.mean(recovered_fraction(10, vanilla, method)) < -100
    assert low < share < high <= 0.5
    shuffled = recovered_interval(10, vanilla[::-1], method[::-1])
    assert shuffled == (share, low, high)


def test_there_is_no_share_of_a_loss_that_may_be_none():
    harmless = 10 * np.exp([0.2, -0.3, 0.1])
    assert np.isnan(recovered_interval(10, harmless, harmless)).all()
    assert np.isnan(recovered_interval(10, [9.0], [9.5])).all()
    assert recovered_interval(10, [20.0], [10.0])[0] == 1
    one_below = 10 * np.exp([0.3, 0.3, 0.3, 0.3, -0.1])  # the mean harm's interval stays above zero
    assert recovered_interval(10, one_below, [10.0] * 5)[0] == pytest.approx(1)
    unsure = 10 * np.exp([0.3, -0.2])  # raised on average, and maybe not at all
    assert np.isnan(recovered_interval(10, unsure, unsure)).all()
    with pytest.raises(InputError, match="a pair per realisation"):
        recovered_interval(10, [20.0, 21.0], [10.0])
