"""Coverage: exact values, unbiasedness, fits that find what made the data, limits, refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from scoredraw.errors import InputError
from scoredraw.language.coverage import (
    CoverageCurve,
    coverage_curve,
    curve_shift,
    extrapolate_coverage,
    fit_beta_binomial,
    fit_power_law,
    log_spaced_sizes,
    pass_at_k,
    plug_in_coverage,
)
from scoredraw.language.coverage_models import BetaBinomial, PowerLaw, log_failure

# ── pass@k ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.data())
def test_pass_at_k_is_exact_and_never_falls(data: st.DataObject) -> None:
    """Ragged problems against rationals; in k from c/n to [c > 0], non-decreasing to the bit."""
    n = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    c = [data.draw(st.integers(0, size)) for size in n]
    ks = np.arange(1, max(n) + 1)
    got = pass_at_k(n, c, ks, k_policy="nan")
    for size, right, row in zip(n, c, got, strict=True):
        want = [
            1 - Fraction(math.comb(size - right, k), math.comb(size, k)) for k in range(1, size + 1)
        ]
        np.testing.assert_allclose(row[:size], np.array(want, float), rtol=0, atol=1e-13)
        assert np.isnan(row[size:]).all()
        assert (np.diff(row[:size]) >= 0).all()
        assert row[size - 1] == (right > 0)
        assert right > 0 or not row[:size].any()
    least = min(n)
    np.testing.assert_array_equal(pass_at_k(n, c, ks[:least]), got[:, :least])


@pytest.mark.oracle
def test_pass_at_k_of_ten_thousand_samples() -> None:
    rng = np.random.default_rng(0)
    n, c = 10_000, rng.binomial(10_000, rng.beta(0.5, 2.0, size=200))
    ks = log_spaced_sizes(n)
    got = pass_at_k(n, c, ks)
    assert (np.diff(got, axis=1) >= 0).all()
    np.testing.assert_allclose(got[:, 0], c / n, rtol=0, atol=1e-13)
    for i in range(0, 200, 40):
        total = [math.comb(n, k) for k in ks.tolist()]
        miss = [math.comb(n - int(c[i]), k) for k in ks.tolist()]
        want = [float(1 - Fraction(m, t)) for m, t in zip(miss, total, strict=True)]
        np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.97])
def test_pass_at_k_is_unbiased_and_the_plug_in_is_too_low(p: float) -> None:
    """Expectations over c ~ Binomial(n, p), summed exactly rather than simulated."""
    n, ks = 30, np.arange(1, 31)
    chances = stats.binom(n, p).pmf(np.arange(n + 1))
    truth = 1 - (1 - p) ** ks
    every = np.arange(n + 1)
    np.testing.assert_allclose(chances @ pass_at_k(n, every, ks), truth, rtol=0, atol=1e-12)
    plugged = chances @ plug_in_coverage(n, every, ks)
    resolved = truth < 1 - 1e-12  # above that both round to 1
    assert (plugged[1:] < truth[1:])[resolved[1:]].all()
    assert plugged[0] == pytest.approx(p)


@pytest.mark.oracle
def test_pass_at_k_is_unbiased_in_simulation() -> None:
    """Three standard errors at one point: false alarm 0.3 % in law, none with this seed."""
    c = np.random.default_rng(1).binomial(40, 0.07, size=20_000)
    got = pass_at_k(40, c, [8])[:, 0]
    error = got.std() / math.sqrt(len(got))
    assert abs(got.mean() - (1 - 0.93**8)) < 3 * error
    plugged = plug_in_coverage(40, c, [8])[:, 0].mean()
    assert plugged < got.mean() - 3 * error


@pytest.mark.oracle
def test_shapes() -> None:
    assert pass_at_k(10, 3, 5).shape == (1, 1)
    assert pass_at_k(10, [3, 4, 5], [1, 2]).shape == (3, 2)
    assert pass_at_k([10.0, 8.0], 3.0, 2.0).shape == (2, 1)  # whole numbers, whatever their type
    assert pass_at_k(8, [0, 8], [1, 8]).tolist() == [[0, 0], [1, 1]]
    assert np.isnan(pass_at_k([2, 3], 1, 4, k_policy="nan")).all()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (10, [3, 11], 1, "c: got 11 right of 10 at problem 1"),
        (10, -1, 1, "c: got -1 right of 10 at problem 0"),
        (0, 0, 1, "n: got 0"),
        (-4, 0, 1, "n: got -4"),
        (10, 3, 0, "k: got 0, want 1 or more"),
        (10, 3, -2, "k: got -2"),
        (10, 3, 11, "k: got 11, want at most 10"),
        ([10, 4], [3, 3], [2, 5], "k: got 5, want at most 4"),
        (10, 3, 1.5, "k: got 1.5, want whole numbers"),
        (10, 2.5, 1, "c: got 2.5"),
        (10.1, 2, 1, "n: got 10.1"),
        (10, math.nan, 1, "c: got nan"),
        ("ten", 2, 1, "n: got type"),
        ([10, 10], [1, 2, 3], 1, "c: got shape"),
        ([], [], 1, "n: got type|n: got shape"),
        ([[10]], [[1]], 1, "n: got shape"),
        (10, 3, [], "k: got"),
    ],
)
def test_what_pass_at_k_refuses(n: Any, c: Any, k: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pass_at_k(n, c, k)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="k_policy"):
        pass_at_k(10, 3, 1, k_policy="clip")


# ── the curve ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_matrix_is_its_counts() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random((20, 12)) < rng.random((20, 1))
    by_matrix = coverage_curve(correct, rng=3)
    by_counts = coverage_curve((12, correct.sum(axis=1)), rng=3)
    assert by_matrix.k.tolist() == list(range(1, 13))
    for name in ("mean", "low", "high"):
        np.testing.assert_array_equal(getattr(by_matrix, name), getattr(by_counts, name))
    np.testing.assert_allclose(by_matrix.mean, pass_at_k(12, correct.sum(1), by_matrix.k).mean(0))
    assert (by_matrix.low < by_matrix.mean).all()
    assert (by_matrix.mean < by_matrix.high).all()
    assert by_matrix.problems == 20


@pytest.mark.oracle
def test_the_band_covers_as_often_as_it_says() -> None:
    """300 sets of 60 problems; coverage(4) is known. A 90 % percentile band should cover 90 %
    less about 1 % for its 60 problems; below 84 % or above 95.5 % has chance < 1e-3."""
    rng = np.random.default_rng(7)
    truth = float(BetaBinomial(0.5, 2.0).coverage([4])[0])
    inside = 0
    for seed in range(300):
        c = rng.binomial(16, rng.beta(0.5, 2.0, size=60))
        curve = coverage_curve((16, c), [4], level=0.9, resamples=300, rng=seed)
        inside += bool(curve.low[0] <= truth <= curve.high[0])
    assert 0.84 < inside / 300 < 0.955


@pytest.mark.oracle
def test_a_curve_between_its_points() -> None:
    curve = coverage_curve((8, [0, 1, 2, 8]), [1, 2, 8])
    assert math.isnan(coverage_curve((8, 3), [1]).low[0])  # one problem has no interval
    for k, coverage in zip(curve.k, curve.mean, strict=True):
        assert curve.k_for(coverage) == pytest.approx(k)
        assert curve.at(k) == pytest.approx(coverage)
    assert curve.k_for(0.01) == 1
    assert curve.k_for(0.76) == math.inf
    assert curve.at(curve.k_for(0.6)) == pytest.approx(0.6)
    assert np.isnan(curve.at([0.5, 9])).all()
    with pytest.raises(InputError, match="target"):
        curve.k_for(1.0)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ([[0, 1, 2]], "correct: got other entries"),
        ([[0, 1, math.nan]], "correct: got other entries"),
        ([0, 1], "correct: got 1 dimensions"),
        (np.zeros((0, 4)), "correct: got shape"),
        ((8,), "correct: got 1 parts"),
        ((8, [9]), "c: got 9"),
    ],
)
def test_what_the_curve_refuses(correct: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        coverage_curve(correct)
    with pytest.raises(InputError, match="level"):
        coverage_curve((8, [1]), level=1.0)
    with pytest.raises(InputError, match="resamples"):
        coverage_curve((8, [1]), resamples=0)


# ── the power law ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(st.floats(0.05, 12), st.floats(0.05, 1.2), st.sampled_from(["coverage", "log"]))
def test_a_noiseless_law_is_found(minus_a: float, minus_b: float, space: str) -> None:
    k = log_spaced_sizes(10_000)
    coverage = np.exp(-minus_a * k**-minus_b)
    law = fit_power_law(k, coverage, space=space)
    assert law.a == pytest.approx(-minus_a, rel=1e-6)
    assert law.b == pytest.approx(-minus_b, rel=1e-6)
    assert law.r2 == pytest.approx(1)
    assert law.residuals is not None
    assert np.abs(law.residuals).max() < 1e-6


@pytest.mark.oracle
def test_a_noisy_law_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        k = log_spaced_sizes(500)
        truth = np.exp(-rng.uniform(1, 6) * k ** -rng.uniform(0.2, 0.9))
        coverage = np.clip(truth + rng.normal(0, 0.03, len(k)), 0, 1)
        law = fit_power_law(k, coverage)
        start = (law.a * 1.1, law.b * 0.9)
        (a, b), _ = optimize.curve_fit(lambda x, a, b: np.exp(a * x**b), k, coverage, start)
        np.testing.assert_allclose([law.a, law.b], [a, b], rtol=1e-4)
        log_law = fit_power_law(k, np.clip(coverage, 1e-3, 0.999), space="log")
        assert law.r2 >= log_law.r2 - 1e-3


@pytest.mark.oracle
def test_power_laws_at_their_limits() -> None:
    k = np.array([1, 2, 4, 8])
    with pytest.warns(UserWarning, match="coverage is 0"):
        law = fit_power_law(k, np.zeros(4))
    assert np.isnan([law.a, law.b]).all()
    assert math.isnan(law.k_for(0.5))
    assert np.isnan(law.predict(k)).all()
    with pytest.warns(UserWarning, match="coverage is 1"):
        law = fit_power_law(k, np.ones(4))
    assert (law.a, law.r2, law.k_for(0.9)) == (0, 1, 1)
    assert law.predict(k).tolist() == [1, 1, 1, 1]
    flat = fit_power_law(k, np.full(4, 0.3))  # nothing is gained by more samples
    assert flat.predict(10**9) == pytest.approx(0.3)
    # zeros, and ones, at an end of a curve are data like any other
    assert fit_power_law([1, 10, 100, 1000], [0.0, 0.2, 0.8, 1.0]).r2 > 0.99
    with pytest.warns(UserWarning, match="did not settle"):
        fit_power_law([1, 2], [0.0, 0.5])


@pytest.mark.oracle
def test_k_for_inverts_the_law() -> None:
    law = PowerLaw(-2.0, -0.5)
    for k in (1, 3.5, 1e3, 1e9):
        assert law.k_for(float(law.predict(k))) == pytest.approx(k, rel=1e-6)
    assert law.k_for(0.01) == 1
    assert PowerLaw(-2.0, 0.5).k_for(0.9) == math.inf  # a law that falls
    assert PowerLaw(-2.0, 0.0).k_for(0.9) == math.inf
    assert PowerLaw(-2.0, 0.0).k_for(0.1) == 1
    many = PowerLaw(np.array([-2.0, -1.0, -np.inf]), np.array([-0.5, -0.5, 0.0]))
    assert many.k_for(0.9).tolist() == [law.k_for(0.9), PowerLaw(-1.0, -0.5).k_for(0.9), math.inf]
    assert many.coverage([1, 10]).shape == (3, 2)
    for target in (0, 1, -0.5, math.nan):
        with pytest.raises(InputError, match="target"):
            law.k_for(target)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("k", "coverage", "space", "message"),
    [
        ([1, 2], [0.1, 0.2, 0.3], "coverage", "coverage: got"),
        ([1, 1], [0.1, 0.2], "coverage", "k: got"),
        ([0, 1], [0.1, 0.2], "coverage", "k: got"),
        ([1, 2], [0.1, 1.2], "coverage", "coverage: got"),
        ([1, 2], [0.1, math.nan], "coverage", "coverage: got"),
        ([1, 2], [0.1, 0.2], "linear", "space: got linear"),
        ([1, 2], [0.0, 0.2], "log", "coverage: got 0 or 1"),
        ([1, 2], [0.1, 1.0], "log", "coverage: got 0 or 1"),
    ],
)
def test_what_the_fit_refuses(k: Any, coverage: Any, space: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_power_law(k, coverage, space=space)


# ── the beta-binomial ───────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_failure_is_a_product() -> None:
    """B(α, β+k)/B(α, β) = Π_{i<k} (1 - α/(α+β+i)), from near-certain to near-binomial problems."""
    usual, extreme = [(0.4, 3.0), (30.0, 70.0)], [(1e-4, 1e-3), (5.0, 1e-3), (3e7, 7e8), (9e5, 0.3)]
    for alpha, beta in usual + extreme:
        for k in (1, 2, 30, 1000, 100_000):
            want = math.fsum(np.log1p(-alpha / (alpha + beta + np.arange(k))))
            if beta < alpha / 100:  # the first factor is near 0: its logarithm, without log1p
                first = math.log(beta / (alpha + beta))
                rest = np.log((beta + np.arange(1, k)) / (alpha + beta + np.arange(1, k)))
                want = first + math.fsum(rest)
            got = float(log_failure(alpha, beta, k))
            assert got == pytest.approx(want, rel=2e-13, abs=1e-14), (alpha, beta, k)


@pytest.mark.oracle
def test_coverage_of_a_beta_mixture_is_what_simulation_gives() -> None:
    """Five standard errors at 5 points: false alarm below 3e-6."""
    p = np.random.default_rng(0).beta(0.4, 3.0, size=400_000)
    ks = np.array([1, 3, 10, 100, 10_000])
    each = 1 - (1 - p[:, None]) ** ks
    error = each.std(axis=0) / math.sqrt(len(p))
    assert (np.abs(each.mean(0) - BetaBinomial(0.4, 3.0).coverage(ks)) < 5 * error).all()


@pytest.mark.oracle
@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.5])
def test_what_is_left_falls_as_k_to_minus_alpha(alpha: float) -> None:
    missed = log_failure(alpha, 3.0, np.array([1e6, 1e7]))
    assert np.diff(missed)[0] / math.log(10) == pytest.approx(-alpha, abs=1e-5)


@pytest.mark.oracle
def test_the_fit_is_the_maximum() -> None:
    """Against SciPy's likelihood and optimiser, ragged n included."""
    rng = np.random.default_rng(0)
    for alpha, beta, least in [(0.5, 2.0, 30), (0.1, 5.0, 3), (4.0, 3.0, 8), (0.3, 0.2, 10)]:
        n = rng.integers(least, 31, size=150)
        c = rng.binomial(n, rng.beta(alpha, beta, size=150))

        def minus(point: np.ndarray, n: np.ndarray = n, c: np.ndarray = c) -> float:
            return -float(stats.betabinom(n, *np.exp(point)).logpmf(c).sum())

        fit = fit_beta_binomial(n, c)
        found = np.log([fit.alpha, fit.beta])
        best = optimize.minimize(minus, [0.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9})
        assert minus(found) <= best.fun + 1e-9
        np.testing.assert_allclose(found, best.x, atol=1e-3)
        binomials = np.log([math.comb(int(a), int(b)) for a, b in zip(n, c, strict=True)]).sum()
        assert -minus(found) == pytest.approx(fit.log_likelihood + binomials, rel=1e-9)


@pytest.mark.oracle
def test_the_fit_finds_what_made_the_data() -> None:
    """20 000 problems of 100 samples: 5 % is about 4 standard errors (false alarm below 1e-3)."""
    rng = np.random.default_rng(0)
    fit = fit_beta_binomial(100, rng.binomial(100, rng.beta(0.4, 3.0, size=20_000)))
    assert (fit.alpha, fit.beta) == (pytest.approx(0.4, rel=0.05), pytest.approx(3.0, rel=0.05))
    assert fit.limit == ""


@pytest.mark.oracle
def test_problems_that_do_not_differ_are_binomial() -> None:
    for c in ([3, 3, 3, 3], [2, 3, 3, 4]):
        with pytest.warns(UserWarning, match="binomial limit"):
            fit = fit_beta_binomial(10, c)
        assert (fit.alpha, fit.beta, fit.limit) == (math.inf, math.inf, "binomial")
        assert fit.mean == pytest.approx(0.3)
        np.testing.assert_allclose(fit.coverage([1, 5, 50]), 1 - 0.7 ** np.array([1, 5, 50]))
        assert fit.k_for(0.9) == pytest.approx(math.log(0.1) / math.log(0.7))
        likelihood = sum(c) * math.log(0.3) + (40 - sum(c)) * math.log(0.7)
        assert fit.log_likelihood == pytest.approx(likelihood)
    # next to the limit the fit is next to it too: a little more spread than chance
    c = np.repeat([2, 3, 4, 5, 6, 7, 8], [5, 8, 12, 14, 12, 8, 5])
    fit = fit_beta_binomial(10, c)
    assert 10 < fit.alpha < math.inf
    np.testing.assert_allclose(fit.coverage([3]), 1 - (1 - c.mean() / 10) ** 3, atol=0.02)


@pytest.mark.oracle
def test_problems_that_are_all_or_none() -> None:
    with pytest.warns(UserWarning, match="all or none limit"):
        fit = fit_beta_binomial([4, 9, 2], [4, 0, 0])
    assert (fit.alpha, fit.beta, fit.limit) == (0, 0, "all or none")
    np.testing.assert_allclose(fit.coverage([1, 10, 1000]), 1 / 3)
    assert (fit.k_for(0.3), fit.k_for(0.4)) == (1, math.inf)
    assert fit.log_likelihood == pytest.approx(math.log(1 / 3) + 2 * math.log(2 / 3))
    for c, coverage in ((0, 0.0), (9, 1.0)):
        with pytest.warns(UserWarning, match="limit"):
            fit = fit_beta_binomial([9, 9], c)
        assert fit.coverage([1, 100]).tolist() == [coverage, coverage]
    assert fit.k_for(0.99) == 1


@pytest.mark.oracle
def test_k_for_inverts_the_beta_binomial() -> None:
    for model in (BetaBinomial(0.4, 3.0), BetaBinomial(5.0, 90.0), BetaBinomial(0.01, 0.2)):
        for k in (1, 7, 1e4, 1e9):
            target = float(model.coverage(k))
            if target < 1 - 1e-9:
                assert model.k_for(target) == pytest.approx(k, rel=1e-6)
    many = BetaBinomial(np.array([0.4, np.inf, 0.0]), np.array([3.0, np.inf, 0.0]), np.full(3, 0.5))
    assert many.coverage([1, 2]).tolist()[1:] == [[0.5, 0.75], [0.5, 0.5]]
    assert many.k_for(0.75)[1:].tolist() == [pytest.approx(2), math.inf]


@pytest.mark.oracle
def test_what_the_beta_binomial_refuses() -> None:
    with pytest.raises(InputError, match="n: got 1"):
        fit_beta_binomial([1, 1], [0, 1])
    with pytest.raises(InputError, match="c: got 3"):
        fit_beta_binomial(2, 3)
    for alpha, beta in ((-1.0, 2.0), (math.inf, 2.0)):
        with pytest.raises(InputError, match="alpha"):
            BetaBinomial(alpha, beta)
    with pytest.raises(InputError, match="mean"):
        BetaBinomial(math.inf, math.inf)


# ── beyond the samples ──────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("model", ["power_law", "beta_binomial"])
def test_all_resamples_are_fitted_as_each_alone(model: str) -> None:
    rng = np.random.default_rng(0)
    n = np.array([20] * 30 + [25] * 10)
    c = rng.binomial(n, rng.beta(0.4, 2.0, size=40))
    curve = extrapolate_coverage(n, c, [5, 500], model=model, resamples=8, rng=5)
    drawn = np.random.Generator(np.random.Philox(5))
    pairs, times = np.unique(np.stack([n, c]), axis=1, return_counts=True)
    counts = drawn.multinomial(40, times / 40, size=8)
    for r, row in enumerate(counts):
        n_r, c_r = np.repeat(pairs, row, axis=1)
        alone: PowerLaw | BetaBinomial
        if model == "beta_binomial":
            alone = fit_beta_binomial(n_r, c_r)
        else:
            ks = log_spaced_sizes(20)
            alone = fit_power_law(ks, pass_at_k(n_r, c_r, ks).mean(axis=0))
        assert curve.replicates is not None
        together = curve.replicates.coverage([5, 500])[r]
        np.testing.assert_allclose(together, alone.coverage([5, 500]), rtol=1e-6)


@pytest.mark.oracle
def test_extrapolation_of_a_beta_mixture() -> None:
    """From 20 samples to 1000. The beta-binomial is the truth, so its 95 % band should hold it in
    95 % of 60 sets; below 50 has chance < 1e-3. The plug-in stays far below."""
    rng = np.random.default_rng(0)
    truth = float(BetaBinomial(0.5, 4.0).coverage([1000])[0])
    inside = 0
    for seed in range(60):
        c = rng.binomial(20, rng.beta(0.5, 4.0, size=200))
        curve = extrapolate_coverage(20, c, 1000, model="beta_binomial", resamples=200, rng=seed)
        inside += bool(curve.low[0] <= truth <= curve.high[0])
        assert plug_in_coverage(20, c, 1000).mean() < curve.low[0]
    assert inside >= 50


@pytest.mark.oracle
def test_the_samples_needed_have_an_interval() -> None:
    rng = np.random.default_rng(0)
    c = rng.binomial(20, rng.beta(0.5, 4.0, size=200))
    for model in ("power_law", "beta_binomial"):
        curve = extrapolate_coverage(20, c, [20, 100], model=model, resamples=200)
        found = curve.samples_for(0.9)
        assert found.low < found.value < found.high
        assert found.value == curve.k_for(0.9)
        assert curve.fit is not None
        assert curve.fit.coverage(found.value) == pytest.approx(0.9)
    # resamples without a right sample never get there
    few = extrapolate_coverage(20, [0] * 19 + [3], [20], resamples=200)
    assert few.samples_for(0.9).high == math.inf
    assert few.low[0] == 0
    with pytest.raises(InputError, match="model: got spline"):
        extrapolate_coverage(20, c, 100, model="spline")
    with pytest.raises(InputError, match="k: got 0"):
        extrapolate_coverage(20, c, 0)


# ── families of curves ──────────────────────────────────────────────────────────────────────────


def curve_of(coverage: Any, k: Any) -> CoverageCurve:
    mean = np.asarray(coverage(np.asarray(k, float)))
    return CoverageCurve(np.asarray(k), mean, mean, mean, 10)


@pytest.mark.oracle
def test_shifted_curves_are_found_shifted_and_others_are_not() -> None:
    k = log_spaced_sizes(10_000)
    law = PowerLaw(-3.0, -0.4).coverage
    strong, weak = curve_of(law, k), curve_of(lambda k: law(k / 20), k)
    shift = curve_shift(weak, strong)
    assert math.exp(shift.shift) == pytest.approx(20, rel=0.01)
    assert shift.distance < 5e-3  # the reference is a straight line in log k from 1 to 2
    assert curve_shift(strong, weak).shift == pytest.approx(-shift.shift)
    assert curve_shift(strong, strong).shift == 0
    other = curve_of(PowerLaw(-3.0, -0.15).coverage, k)
    assert curve_shift(other, strong, anchor=0.4).distance > 0.05
    with pytest.raises(InputError, match="anchor: got"):
        curve_shift(other, strong, anchor=0.99)
    with pytest.raises(InputError, match="overlap"):
        curve_shift(curve_of(lambda k: 0.01 + 0 * k, k), strong)
