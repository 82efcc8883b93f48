"""Weibull mixtures: SciPy's densities and optimiser, known mixtures, underflow, many at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize
from scipy.special import gamma
from scipy.stats import weibull_min

from scoredraw.errors import InputError
from scoredraw.language import weibull_mixture
from scoredraw.language.weibull_mixture import (
    BOUNDS,
    START,
    WeibullMixture,
    fit_weibull_mixture,
    fit_weibull_mixtures,
    name_components,
    negative_log_likelihood,
    steps_like_scipy,
)
from scoredraw.samples import read_samples

pytestmark = pytest.mark.oracle

Float = NDArray[np.float64]
FIELDS = ("w", "k", "scale", "nll", "converged")


def by_scipy(theta: Float, x: Float) -> float:
    """-Σ log f in SciPy's densities."""
    w, k1, scale1, k2, scale2 = theta
    high = np.log(w) + weibull_min.logpdf(x, k1, scale=scale1)
    low = np.log(1 - w) + weibull_min.logpdf(x, k2, scale=scale2)
    return float(-np.logaddexp(high, low).sum())


def assert_equal(a: WeibullMixture, b: WeibullMixture) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def known(size: int, rng: np.random.Generator) -> tuple[Float, Float]:
    """A sample of a mixture that lies in [0, 1], and its parameters."""
    theta = np.array([0.6, 12.0, 0.7, 3.0, 0.25])
    high = rng.random(size) < theta[0]
    x = np.where(high, 0.7 * rng.weibull(12.0, size), 0.25 * rng.weibull(3.0, size))
    return x, theta


# ── the likelihood ──────────────────────────────────────────────────────────────────────────────


def test_likelihood_and_gradient() -> None:
    rng = np.random.default_rng(0)
    x = rng.beta(4, 3, (6, 25))
    theta = np.array(START) * rng.uniform(0.7, 1.4, (6, 5))
    value, gradient = negative_log_likelihood(theta, np.log(x))
    for s in range(6):
        assert value[s] == pytest.approx(by_scipy(theta[s], x[s]), rel=1e-12)
        numeric = approx_fprime(theta[s], by_scipy, 1e-7, x[s])
        np.testing.assert_allclose(gradient[s], numeric, rtol=1e-4, atol=1e-4)


def test_posterior() -> None:
    x, theta = known(50, np.random.default_rng(0))
    w, k1, scale1, k2, scale2 = theta
    k, scale = np.array([k1, k2]), np.array([scale1, scale2])
    mixture = WeibullMixture(np.float64(w), k, scale, np.float64(0), np.True_)
    high = w * weibull_min.pdf(x, k1, scale=scale1)
    low = (1 - w) * weibull_min.pdf(x, k2, scale=scale2)
    np.testing.assert_allclose(mixture.posterior_high(x), high / (high + low), rtol=1e-9)
    np.testing.assert_allclose(mixture.means, scale * gamma(1 + 1 / k), rtol=1e-12)


@pytest.mark.parametrize(("k", "high_at_1"), [((800.0, 500.0), 1.0), ((5000.0, 900.0), 0.0)])
def test_posterior_where_densities_underflow(k: tuple[float, float], high_at_1: float) -> None:
    """At 1 the densities are 0 or not a number, but one of them has vanished further."""
    scale = np.array([0.5, 0.3])
    mixture = WeibullMixture(np.float64(0.5), np.array(k), scale, np.float64(0), np.True_)
    with np.errstate(all="ignore"):
        assert not (weibull_min.pdf(1.0, k, scale=scale) > 0).any()
    power = np.array(k) * np.log(1 / scale)  # the logarithm of what stands in the exponent
    assert (power[0] < power[1]) == bool(high_at_1)
    got = mixture.posterior_high([1.0, 0.5, 0.3])
    np.testing.assert_allclose(got, [high_at_1, 1.0, 0.0], rtol=0, atol=1e-100)


# ── the fit ─────────────────────────────────────────────────────────────────────────────────────


def test_recovers_a_known_mixture() -> None:
    """2,000 points; over 20 seeds the means are off by 2 % at most, 10 % is allowed."""
    x, theta = known(2000, np.random.default_rng(0))
    fit = fit_weibull_mixture(x)
    truth = theta[[2, 4]] * gamma(1 + 1 / theta[[1, 3]])
    np.testing.assert_allclose(fit.means, truth, rtol=0.1)
    assert fit.nll <= by_scipy(theta, x)
    assert fit.nll == pytest.approx(
        by_scipy(np.array([fit.w, fit.k[0], fit.scale[0], fit.k[1], fit.scale[1]]), x), rel=1e-10
    )
    assert fit.w == pytest.approx(0.6, abs=0.05)


def test_the_one_start_and_a_local_optimum() -> None:
    """Another start finds a spike of a higher likelihood: it is not what is meant."""
    x = np.random.default_rng(0).beta(5, 2, 12)
    fit = fit_weibull_mixture(x)

    def at(theta: Float) -> tuple[float, Float]:
        value, gradient = negative_log_likelihood(theta[None], np.log(x)[None])
        return float(value[0]), gradient[0]

    spike = np.array([0.2, 1e5, float(x[0]), 3.0, 0.7])
    found = minimize(at, spike, jac=True, bounds=BOUNDS, method="L-BFGS-B")
    assert found.fun < fit.nll - 1
    assert fit.k.max() < 1e3


def test_the_component_of_the_larger_mean_is_the_high_one() -> None:
    fits = fit_weibull_mixtures(np.random.default_rng(0).beta(4, 3, (50, 20)))
    assert (fits.means[:, 0] >= fits.means[:, 1]).all()
    assert ((fits.w > 0.2 - 1e-12) & (fits.w < 0.8 + 1e-12)).all()  # 1 - 0.8 rounds
    assert (fits.w < 0.5).any()


@pytest.mark.property
@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=12), st.randoms(use_true_random=False))
def test_the_order_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_equal(fit_weibull_mixture(values), fit_weibull_mixture(shuffled))


# ── many at once ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [5, 17, 300])
def test_many_at_once_are_one_after_the_other(n: int) -> None:
    assert steps_like_scipy()  # or this test would compare a thing with itself
    rng = np.random.default_rng(n)
    ties = rng.choice([0.2, 0.5, 0.7, 0.9], (20, n))
    p = np.concatenate([rng.beta(4, 3, (20, n)), ties, np.exp(-rng.gamma(5, 9, (20, n)))])
    together = fit_weibull_mixtures(p)
    for s, row in enumerate(p):
        assert_equal(together[s], fit_weibull_mixture(row))


def test_masks_of_real_samples_and_why_they_differ() -> None:
    """Against numerical gradients of densities, as released, on subsets of real samples.

    Where theirs reaches a finite likelihood that is no worse, the same samples are pruned; the
    others are where a density underflows to 0/0.
    """
    rng = np.random.default_rng(0)
    pools = [pool for pool in read_samples("smollm2-arith").pools() if (~pool.null).sum() >= 12]
    p = np.array([
        rng.permutation(np.exp(pool.scores("mean_logprob")[~pool.null]))[:12] for pool in pools
    ])  # fmt: skip
    ours = fit_weibull_mixtures(p)
    differ = []
    for s, row in enumerate(p):

        def densities(theta: Float, x: Float = row) -> float:
            w, k1, scale1, k2, scale2 = theta

            def density(k: float, scale: float) -> Float:
                return np.asarray(k / scale * (x / scale) ** (k - 1) * np.exp(-((x / scale) ** k)))

            return float(-np.log(w * density(k1, scale1) + (1 - w) * density(k2, scale2)).sum())

        with np.errstate(all="ignore"):
            theirs = minimize(densities, np.array(START), bounds=BOUNDS, method="L-BFGS-B")
        mixture = name_components(theirs.x, theirs.fun, True)
        same = (mixture.posterior_high(row) < 0.5) == (ours[s].posterior_high(row) < 0.5)
        if not same.all():
            differ.append((theirs.fun, float(ours[s].nll)))
    assert len(p) >= 30
    assert len(differ) <= 0.05 * len(p)
    assert all(not theirs < mine + 1e-3 for theirs, mine in differ)


def test_without_the_steps_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.random.default_rng(0).beta(4, 3, (5, 9))
    stepped = fit_weibull_mixtures(p)
    monkeypatch.setattr(weibull_mixture, "steps_like_scipy", lambda: False)
    assert_equal(stepped, fit_weibull_mixtures(p))


def test_other_internals_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.optimize import _lbfgsb

    def other(*arguments: object) -> None:
        raise TypeError("setulb() takes 12 arguments")

    monkeypatch.setattr(_lbfgsb, "setulb", other)
    assert not steps_like_scipy.__wrapped__()


def test_nothing_to_fit() -> None:
    assert fit_weibull_mixtures(np.empty((0, 7))).nll.shape == (0,)


def test_zeros_and_ones_are_fitted() -> None:
    fit = fit_weibull_mixture([0.0, 0.0, 1.0, 0.5, 0.4, 0.9])
    assert np.isfinite([fit.nll, *fit.k, *fit.scale, fit.w]).all()
    assert np.isfinite(fit.posterior_high([0.0, 1.0])).all()


@pytest.mark.contract
def test_refusals() -> None:
    with pytest.raises(InputError, match="p: got 1 values, want 2"):
        fit_weibull_mixture([0.5])
    with pytest.raises(InputError, match="p: got others, want probabilities"):
        fit_weibull_mixture([0.5, 0.2, 0.3, 0.4, np.nan])
    with pytest.raises(InputError, match="p: got 1 dimensions, want 2"):
        fit_weibull_mixtures([0.5] * 5)
