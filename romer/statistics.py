"""Statistics over realisations: bootstrap intervals, paired tests, Holm's correction, the recovered fraction.

A realisation is one programming of the arrays. The same realisation is the same noise for every method, so two methods
are compared by their differences within realisations.

    mean, low, high = mean_interval(perplexities)
    paired(romer, vanilla).high < 0           # the claim "lower" needs an interval that excludes zero
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from romer.errors import InputError

CONFIDENCE = 0.95
ALPHA = 0.05  # of a family of tests, after Holm
RESAMPLES = 2000


@dataclass(frozen=True)
class Paired:
    """What `paired` found. difference: mean of a - b; low, high: its interval; t_p, wilcoxon_p: two-sided; n: pairs."""

    difference: float
    low: float
    high: float
    t_p: float
    wilcoxon_p: float
    n: int


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise InputError(f"{name}: found {values.tolist()}, expected one or more finite numbers")
    return values


def mean_interval(
    values: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval of one number per realisation (Efron and Tibshirani 1993, chapter 13).

    values: [n] float. Returns (mean, low, high); the interval is NaN for n < 2. It does not depend on the order of the
    values. It is narrow for few values: the 95 % interval of five normal draws covers their mean in about 85 % of
    cases, that of thirty in about 94 %. Raises InputError for values that are missing or not finite.
    """
    values = np.sort(_finite(values, "values"))
    if values.size < 2:
        return float(values.mean()), float("nan"), float("nan")
    low, high = np.quantile(_resampled(values, seed, resamples), _tails(confidence))
    return float(values.mean()), float(low), float(high)


def _resampled(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means [resamples, ...] of bootstrap resamples of the rows of `values` [n, ...]."""
    picks = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    return values[picks].mean(axis=1)


def _tails(confidence: float) -> tuple[float, float]:
    """The quantiles that leave out the same share at both ends."""
    return (1 - confidence) / 2, 1 - (1 - confidence) / 2


def paired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> Paired:
    """Compare two methods on the same realisations: a, b [n] float, pair by pair.

    The p-values are those of the two-sided paired t-test and of Wilcoxon's signed-rank test. Fewer than two pairs, or
    differences that are all zero, are no evidence: both p-values are 1. Wilcoxon's p-value cannot fall below 2 / 2^n:
    0.0625 for five pairs. Raises InputError when a and b differ in length or hold a number that is not finite.
    """
    a, b = _finite(a, "a"), _finite(b, "b")
    if a.shape != b.shape:
        raise InputError(f"paired: found {a.size} and {b.size} values, expected one pair per realisation")
    difference = np.sort(a - b)
    mean, low, high = mean_interval(difference, confidence, seed)
    t_p = wilcoxon_p = 1.0
    if difference.size >= 2 and difference.any():
        spread = difference.std(ddof=1)
        # Equal differences make the t statistic infinite, its p-value 0; scipy warns there, so it is said here.
        t_p = 0.0 if spread == 0 else float(stats.ttest_1samp(difference, 0.0).pvalue)
        wilcoxon_p = float(stats.wilcoxon(difference).pvalue)
    return Paired(mean, low, high, t_p, wilcoxon_p, difference.size)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979): float64 [m].

    Rejecting where the result is below alpha keeps the chance of any false rejection in the family below alpha. Raises
    InputError for a number outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values: found {p.tolist()}, expected numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def recovered_fraction(clean: ArrayLike, vanilla: ArrayLike, method: ArrayLike) -> float | np.ndarray:
    """The share of the noise's harm that a method undoes, from perplexities (broadcast together).

    (ln vanilla - ln method) / (ln vanilla - ln clean): 0 is vanilla, 1 is clean; it is below 0 where the method does
    harm and above 1 where it ends below clean. NaN where vanilla equals clean and there is nothing to recover. Returns
    a float for three scalars. Raises InputError for a perplexity that is not finite and positive.
    """
    clean, vanilla, method = (np.asarray(x, dtype=np.float64) for x in (clean, vanilla, method))
    for name, value in (("clean", clean), ("vanilla", vanilla), ("method", method)):
        if not (np.isfinite(value) & (value > 0)).all():
            raise InputError(f"{name} perplexity: found {value.tolist()}, expected finite positive numbers")
    harm = np.log(vanilla) - np.log(clean)
    gain = np.log(vanilla) - np.log(method)
    fraction = np.divide(gain, harm, out=np.full(np.broadcast(gain, harm).shape, np.nan), where=harm != 0)
    return float(fraction) if fraction.ndim == 0 else fraction


def recovered_interval(
    clean: float, vanilla: ArrayLike, method: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float, float]:
    """`recovered_fraction` of the mean losses over realisations, with its percentile bootstrap interval over pairs
    (those resamples in which the noise does harm: nearly all, see below).

    vanilla, method: perplexities [n], a pair per realisation. A ratio of means: the mean of ratios would be ruled by
    the realisations that did next to no harm. (NaN, NaN, NaN) where the interval of the mean harm reaches 0, so that
    there is no loss to have a share of; the interval is NaN for n < 2. Raises InputError as `paired` and
    `recovered_fraction` do.
    """
    vanilla, method = _finite(vanilla, "vanilla perplexities"), _finite(method, "perplexities")
    if vanilla.shape != method.shape:
        raise InputError(f"recovered: found {vanilla.size} and {method.size} values, expected a pair per realisation")
    recovered_fraction(clean, vanilla, method)  # raises for what is not a perplexity
    order = np.lexsort((method, vanilla))
    harm, gain = np.log(vanilla[order] / clean), np.log(vanilla / method)[order]
    mean, low, _ = mean_interval(harm, confidence, seed)
    if not (low if harm.size > 1 else mean) > 0:
        return float("nan"), float("nan"), float("nan")
    if harm.size < 2:
        return float(gain.mean() / mean), float("nan"), float("nan")
    harms, gains = _resampled(harm, seed), _resampled(gain, seed)  # the same picks: pairs stay together
    real = harms > 0
    low, high = np.quantile(gains[real] / harms[real], _tails(confidence))
    return float(gain.mean() / mean), float(low), float(high)
