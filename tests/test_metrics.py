"""Estimates and their intervals against laws and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from scoredraw.errors import InputError
from scoredraw.metrics import (
    Estimate,
    bootstrap_interval,
    mean_interval,
    paired_difference,
    proportion_interval,
)

pytestmark = pytest.mark.oracle


def test_mean_interval_is_students() -> None:
    x = np.random.default_rng(1).gamma(2.0, size=17)
    ours = mean_interval(x, level=0.9)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert ours.n == 17
    assert ours.value == pytest.approx(x.mean())


def test_mean_interval_covers_as_often_as_it_says() -> None:
    # 4,000 samples of 5: the count covering is binomial(4000, 0.95); a count outside ±4.4 sd
    # happens by chance with probability 1e-5
    x = np.random.default_rng(2).normal(3.0, 2.0, size=(4000, 5))
    covered = sum(e.low <= 3.0 <= e.high for e in map(mean_interval, x))
    assert abs(covered - 3800) < 4.4 * math.sqrt(4000 * 0.95 * 0.05)


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=12)
    b = a + rng.normal(0.1, 0.01, size=12)  # the pairs share nearly everything
    paired = paired_difference(a, b)
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert paired.high < 0


def test_bonferroni_widens_to_the_level_of_each_comparison() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 9))
    together = paired_difference(a, b, comparisons=10)
    alone = paired_difference(a, b, level=1 - 0.05 / 10)
    assert together == alone
    assert together.half_width > paired_difference(a, b).half_width


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (812, 1000)])
def test_proportion_interval_is_wilsons(successes: int, trials: int) -> None:
    ours = proportion_interval(successes, trials, level=0.9)
    theirs = stats.binomtest(successes, trials).proportion_ci(0.9, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("statistic", [np.mean, np.median, lambda x: float(np.mean(x))])
def test_bootstrap_interval_agrees_with_scipys_percentile_interval(statistic) -> None:
    # two bootstraps of 8,000 resamples each: an end's Monte-Carlo error is under 0.5 % of the
    # length, six of them are allowed
    x = np.random.default_rng(5).exponential(size=80)
    ours = bootstrap_interval(x, statistic=statistic, resamples=8000, rng=0)
    reference = stats.bootstrap(
        (x,), statistic, n_resamples=8000, method="percentile", rng=1
    ).confidence_interval
    length = reference.high - reference.low
    # a median's bootstrap distribution is a staircase: its ends jump by the gap between two values
    slack = 0.15 if statistic is np.median else 0.06
    assert ours.low == pytest.approx(reference.low, abs=slack * length)
    assert ours.high == pytest.approx(reference.high, abs=slack * length)


def test_bootstrap_resamples_rows_together() -> None:
    x = np.random.default_rng(6).normal(size=200)
    pairs = np.stack([x, x], axis=1)

    def difference(rows: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.ptp(rows, axis=-1).sum(axis=axis)

    assert bootstrap_interval(pairs, statistic=difference) == Estimate(0.0, 0.0, 0.0, 200)


def test_bootstrap_does_not_depend_on_the_size_of_its_blocks(monkeypatch) -> None:
    x = np.random.default_rng(7).normal(size=50)
    whole = bootstrap_interval(x, rng=3)
    monkeypatch.setattr("scoredraw.metrics.RESAMPLE_CELLS", 700)
    assert bootstrap_interval(x, rng=3) == whole


def test_one_observation_has_no_interval() -> None:
    for estimate in (mean_interval([2.0]), bootstrap_interval([2.0])):
        assert estimate.value == 2.0
        assert math.isnan(estimate.low)
        assert not estimate.above(-1e9)
        assert not estimate.below(1e9)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.8117, 0.8009, 0.8224, 9), "0.812 [0.801, 0.822]"),
        (Estimate(-0.0001, -0.0301, 0.02, 9), "0.000 [-0.030, 0.020]"),
        (Estimate(1234.5, 1200.0, 1300.0, 9), "1234 [1200, 1300]"),
        (Estimate(0.5, 0.5, 0.5, 9), "0.5 [0.5, 0.5]"),
        (Estimate(0.25, math.nan, math.nan, 1), "0.25"),
        (Estimate(3e-9, 1e-9, 5e-9, 4), "3e-09 [1e-09, 5e-09]"),
    ],
)
def test_an_estimate_prints_two_digits_of_its_uncertainty(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: mean_interval([]), "values"),
        (lambda: mean_interval([1.0, math.nan]), "values"),
        (lambda: mean_interval([[1.0]]), "values"),
        (lambda: mean_interval(["a"]), "values"),
        (lambda: mean_interval([1.0], level=1.0), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "b"),
        (lambda: paired_difference([1.0], [1.0], comparisons=0), "comparisons"),
        (lambda: bootstrap_interval([]), "values"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples"),
        (lambda: proportion_interval(3, 2), "successes"),
        (lambda: proportion_interval(0, 0), "trials"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, argument: str) -> None:
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want [^\n]*$"):
        call()
