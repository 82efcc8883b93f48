"""Coverage where it is awkward: large tables, likelihoods of two maxima, bad parameters."""

from __future__ import annotations

import math
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import betaln

from scoredraw.errors import InputError
from scoredraw.language.coverage import coverage_curve, extrapolate_coverage, pass_at_k
from scoredraw.language.coverage_models import BetaBinomial, fit_tallies

pytestmark = pytest.mark.oracle


def likelihood(n: np.ndarray, c: np.ndarray, alpha: float, beta: float) -> float:
    return float((betaln(alpha + c, beta + n - c) - betaln(alpha, beta)).sum())


def test_the_slope_at_a_fit_is_zero() -> None:
    """By differences of SciPy's likelihood: a second-order bound, so the fit is flat to 1e-5."""
    rng = np.random.default_rng(0)
    for alpha, beta, n, problems in ((0.5, 2, 50, 400), (20, 30, 10, 200), (3, 900, 100, 300)):
        c = rng.binomial(n, rng.beta(alpha, beta, size=problems))
        counts = np.full(problems, n)
        a, b, _, found = (float(x[0]) for x in fit_tallies(counts, c, np.ones((1, problems))))
        assert found == pytest.approx(likelihood(counts, c, a, b), rel=1e-10)
        for step in ((1e-4, 0.0), (0.0, 1e-4)):
            up = likelihood(counts, c, a * math.exp(step[0]), b * math.exp(step[1]))
            down = likelihood(counts, c, a * math.exp(-step[0]), b * math.exp(-step[1]))
            assert up < found + 1e-9
            assert abs(up - down) / 2e-4 < 1e-5 * counts.sum()


def test_a_maximum_inside_counts_though_the_limit_slopes_away() -> None:
    """With unequal n the likelihood may fall from the binomial limit and rise again."""
    n, c = np.array([11, 2, 4]), np.array([4, 2, 0])
    alpha, beta, mean, found = (float(x[0]) for x in fit_tallies(n, c, np.ones((1, 3))))
    limit = 6 * math.log(6 / 17) + 11 * math.log(11 / 17)
    assert limit + 0.1 < found == pytest.approx(likelihood(n, c, alpha, beta))
    assert mean == pytest.approx(alpha / (alpha + beta))
    grid = np.exp(np.linspace(-6, 8, 57))
    assert found >= max(likelihood(n, c, a, b) for a in grid for b in grid)


def test_no_beta_is_likelier_than_the_fit() -> None:
    """Few problems of equal n: over a grid of all magnitudes, limits included."""
    rng = np.random.default_rng(1)
    grid = np.exp(np.linspace(-7, 9, 17))
    a, b = (x[..., None] for x in np.meshgrid(grid, grid))
    for _ in range(150):
        problems, n = int(rng.integers(2, 7)), int(rng.integers(2, 12))
        c = rng.binomial(n, rng.random(problems))
        found = fit_tallies(np.full(problems, n), c, np.ones((1, problems)))[3][0]
        assert (betaln(a + c, b + n - c) - betaln(a, b)).sum(-1).max() <= found + 1e-9


def test_near_binomial_resamples_are_fitted_in_time() -> None:
    """A thousand resamples of ragged problems that hardly differ: no endless walk to the limit."""
    rng = np.random.default_rng(0)
    n = rng.integers(20, 60, size=80)
    c = rng.binomial(n, 0.2)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curve = extrapolate_coverage(n, c, [1, 10, 100], model="beta_binomial")
    assert time.perf_counter() - start < 20
    assert np.isfinite(curve.mean).all()
    assert (curve.low <= curve.high).all()
    assert (curve.low[:2] <= 1 - 0.8 ** np.array([1, 10])).all()


@pytest.mark.parametrize(
    ("alpha", "beta"), [(2.0, -1.0), (-1.0, 2.0), (0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0)]
)
def test_parameters_out_of_range(alpha: float, beta: float) -> None:
    with pytest.raises(InputError, match=r"alpha: got .* with beta") as caught:
        BetaBinomial(alpha, beta, 0.5)
    assert "\n" not in str(caught.value)


def test_sizes_of_a_curve_rise() -> None:
    with pytest.raises(InputError, match="ks: got sizes in another order"):
        coverage_curve((8, [1, 2]), [4, 2])


def test_a_thousand_problems_of_ten_thousand_samples_at_a_hundred_sizes() -> None:
    rng = np.random.default_rng(2)
    n, c = 10_000, rng.binomial(10_000, rng.beta(0.3, 5.0, size=1000))
    ks = np.unique(np.round(np.geomspace(1, n, 128)).astype(int))[:100]
    got = pass_at_k(n, c, ks)
    assert got.shape == (1000, 100)
    for i, j in zip(rng.integers(0, 1000, 60), rng.integers(0, 100, 60), strict=True):
        k = int(ks[j])
        want = 1 - Fraction(math.comb(n - int(c[i]), k), math.comb(n, k))
        assert abs(float(Fraction(float(got[i, j])) - want)) < 1e-14
