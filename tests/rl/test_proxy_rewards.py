"""Correlation, λ, and a bound that no policy breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.proxy_rewards import (
    audit_proxy,
    coefficient_sweep,
    hacking_bound,
    penalty_coefficient,
    proxy_correlation,
    safe_divergence,
)

pytestmark = pytest.mark.oracle


def random_case(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """r, the proxy's gain, χ² and the true gain of a random policy over 2 to 7 places."""
    k = int(rng.integers(2, 8))
    mu_ref, mu = rng.dirichlet(np.ones(k)), rng.dirichlet(np.full(k, 0.5))
    true = rng.normal(size=k)
    proxy = rng.uniform(0, 2) * true + rng.normal(size=k)
    r, sigma = proxy_correlation(proxy, true, mu_ref)
    _, sigma_true = proxy_correlation(true, proxy, mu_ref)
    chi2 = ((mu - mu_ref) ** 2 / mu_ref).sum()
    return r, (mu - mu_ref) @ proxy / sigma, float(chi2), (mu - mu_ref) @ true / sigma_true


def test_no_policy_breaks_the_bound_and_the_sharper_one_is_attained() -> None:
    rng = np.random.default_rng(0)
    r, gain, chi2, true = np.array([random_case(rng) for _ in range(5000)]).T
    scale = 1 + np.sqrt(chi2)
    plain = true - hacking_bound(r, gain, chi2, sharp=False)
    sharp = true - hacking_bound(r, gain, chi2)
    assert plain.min() > -1e-9
    assert (sharp / scale).min() > -1e-7  # √(χ² - a²) of numbers that are equal up to rounding
    assert (sharp <= plain + 1e-9).all()
    # with two places the true reward is the proxy, up to sign; with three it has one direction left
    assert np.sort(np.abs(sharp / scale))[:100].max() < 1e-6


def test_the_worst_policy_attains_the_sharper_bound() -> None:
    """mu = mu_ref (1 + a x̃ - b e), e the part of the true reward that is not the proxy."""
    rng = np.random.default_rng(1)
    mu_ref = rng.dirichlet(np.ones(6))
    x, y = rng.normal(size=(2, 6))
    x = (x - mu_ref @ x) / math.sqrt(mu_ref @ (x - mu_ref @ x) ** 2)
    y = (y - mu_ref @ y) / math.sqrt(mu_ref @ (y - mu_ref @ y) ** 2)
    y = y if mu_ref @ (x * y) > 0 else -y
    r, sigma = proxy_correlation(3 * x, y, mu_ref)
    assert (r, sigma) == (pytest.approx(mu_ref @ (x * y)), pytest.approx(3.0))
    e = (y - r * x) / math.sqrt(1 - r**2)
    mu = mu_ref * (1 + 0.05 * x - 0.1 * e)
    assert (mu > 0).all()
    chi2 = ((mu - mu_ref) ** 2 / mu_ref).sum()
    assert chi2 == pytest.approx(0.05**2 + 0.1**2)
    assert mu @ y == pytest.approx(hacking_bound(r, mu @ x, chi2), abs=1e-12)
    assert mu @ y > hacking_bound(r, mu @ x, chi2, sharp=False) + 1e-3


@pytest.mark.property
@given(
    st.lists(st.tuples(*[st.integers(-9, 9)] * 2, st.integers(0, 3)), min_size=3, max_size=30),
    st.floats(0.1, 10), st.floats(-5, 5),
)  # fmt: skip
def test_correlation_is_numpys_and_has_no_scale(
    rows: list[tuple[int, int, int]], scale: float, shift: float
) -> None:
    x, y, w = np.array(rows, float).T
    copies = np.repeat(np.arange(len(w)), w.astype(int))
    if not len(copies) or not np.ptp(x[copies]) or not np.ptp(y[copies]):
        with pytest.raises(InputError):
            proxy_correlation(x, y, w)
        return
    r, sigma = proxy_correlation(x, y, w)
    assert r == pytest.approx(np.corrcoef(x[copies], y[copies])[0, 1], abs=1e-9)
    assert sigma == pytest.approx(x[copies].std())
    other = proxy_correlation(scale * x + shift, 2 * y, 7 * w)
    assert other == (pytest.approx(r, abs=1e-9), pytest.approx(scale * sigma))
    assert proxy_correlation(-x, y, w).r == pytest.approx(-r)


def test_the_coefficient_and_what_it_promises() -> None:
    lam = penalty_coefficient(0.6, 2.0)
    assert lam == pytest.approx(2 * math.sqrt(1 / 0.36 - 1))
    assert penalty_coefficient(1.0, 2.0) == 0
    # J̃ - λ √χ² rises exactly when the plain bound is above 0
    a = np.linspace(0, 2, 9)
    c = np.linspace(4, 9, 9)
    objective = 2.0 * a - lam * np.sqrt(c)
    np.testing.assert_allclose(hacking_bound(0.6, a, c, sharp=False), 0.3 * objective, atol=1e-12)
    for sharp in (True, False):
        edge = safe_divergence(0.6, 1.5, sharp)
        assert hacking_bound(0.6, 1.5, edge, sharp) == pytest.approx(0, abs=1e-9)
    assert safe_divergence(1.0, 0.1) == math.inf
    assert hacking_bound(1.0, 0.5, math.inf) == 0.5
    assert hacking_bound(0.9, 0.5, math.inf) == -math.inf
    np.testing.assert_allclose(coefficient_sweep(0.05) / 0.05, [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])


# ── the audit ───────────────────────────────────────────────────────────────────────────────────


def episodes(rng: np.random.Generator, count: int, r: float, length: int = 10) -> tuple[Any, ...]:
    """Rewards that share a level within an episode; every part of them has correlation r."""
    names = np.repeat(np.arange(count), length)
    level, noise = rng.normal(size=(2, count)), rng.normal(size=(2, count * length))
    true = level[0][names] + noise[0]
    other = level[1][names] + noise[1]
    return r * true + math.sqrt(1 - r**2) * other, true, names


def test_the_interval_covers() -> None:
    """100 audits of 95 % intervals: fewer than 88 hits have a chance of 0.1 %; seed fixed."""
    hits, naive = 0, 0
    for seed in range(100):
        proxy, true, names = episodes(np.random.default_rng(seed), 60, 0.6)
        found = audit_proxy(proxy, true, names, resamples=400, rng=seed).r
        hits += found.low <= 0.6 <= found.high
        steps = audit_proxy(proxy, true, resamples=400, rng=seed).r
        naive += steps.low <= 0.6 <= steps.high
    assert hits >= 88
    assert naive < hits  # steps are not independent


def test_what_an_audit_says() -> None:
    proxy, true, names = episodes(np.random.default_rng(0), 200, 0.7)
    found = audit_proxy(proxy, true, names)
    r, sigma = proxy_correlation(proxy, true)
    assert (found.r.value, found.sigma) == (pytest.approx(r), pytest.approx(sigma))
    assert found.correlated is True
    assert (found.episodes, found.steps) == (200, 2000)
    assert found.coefficient.value == pytest.approx(penalty_coefficient(r, sigma))
    ends = [penalty_coefficient(v, sigma) for v in (found.r.high, found.r.low)]
    assert [found.coefficient.low, found.coefficient.high] == pytest.approx(ends)
    assert (found.proxy_mean, found.true_mean) == pytest.approx((proxy.mean(), true.mean()))
    assert found.sigma_true == pytest.approx(true.std())
    gain = found.guaranteed_gain(found.proxy_mean + sigma, 1.5)
    assert gain.value == pytest.approx(found.sigma_true * hacking_bound(r, 1.0, 1.5))
    assert gain.low < gain.value < gain.high
    shuffled = audit_proxy(proxy[::-1], true[::-1], [f"e{i}" for i in names[::-1]])
    assert shuffled.r.value == pytest.approx(r)


@pytest.mark.parametrize("sharp", [True, False])
@pytest.mark.parametrize("gain", [-1.0, -0.2, 0.0, 0.7])
def test_the_promise_over_the_interval_of_r(sharp: bool, gain: float) -> None:
    """The bound is convex in r: where the proxy lost, it is least in between, not at an end."""
    proxy, true, names = episodes(np.random.default_rng(0), 25, 0.6)
    found = audit_proxy(proxy, true, names, resamples=200)
    for chi2 in (1.6, 9.0):
        got = found.guaranteed_gain(found.proxy_mean + gain * found.sigma, chi2, sharp)
        over = np.linspace(found.r.low, found.r.high, 4001)
        each = found.sigma_true * hacking_bound(over, gain, chi2, sharp)
        assert (got.low, got.high) == pytest.approx((each.min(), each.max()), abs=1e-6)
        assert got.low - 1e-12 <= got.value <= got.high


def test_discounted_steps() -> None:
    proxy, true, names = episodes(np.random.default_rng(3), 50, 0.7)
    times = np.tile(np.arange(10), 50)
    found = audit_proxy(proxy, true, names, times=times, gamma=0.8, resamples=50)
    assert found.r.value == pytest.approx(proxy_correlation(proxy, true, 0.8**times).r)
    assert found.true_mean == pytest.approx(np.average(true, weights=0.8**times))


def test_a_proxy_that_is_none() -> None:
    rng = np.random.default_rng(0)
    proxy, true, names = episodes(rng, 100, 0.0)
    found = audit_proxy(proxy, true, names)
    assert found.correlated is None
    assert found.coefficient.high == math.inf
    against = audit_proxy(-true + 0.1 * proxy, true, names)
    assert against.correlated is False
    assert against.coefficient.value == math.inf


def test_bad_input() -> None:
    x = [0.0, 1.0, 2.0]
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: proxy_correlation([1.0] * 3, x), "proxy: got one that is constant under the ref"),
        (lambda: proxy_correlation([0.1 + 0.2, 0.3, 0.3], x), "proxy: got one that is constant"),
        (lambda: proxy_correlation(x, [2.0] * 3), "true: got one that is constant under the ref"),
        (lambda: proxy_correlation(x, x, [0, 1, 0]), "proxy: got one that is constant"),
        (lambda: proxy_correlation(x, x[:2]), "true: got shape"),
        (lambda: proxy_correlation(x, x, [-1, 1, 1]), "weights: got below 0"),
        (lambda: proxy_correlation(x, x, [0, 0, 0]), "weights: got below 0, or all 0"),
        (lambda: proxy_correlation([], []), "proxy: got shape"),
        (lambda: proxy_correlation([math.nan, 0, 1], x), "proxy: got NaN"),
        (lambda: penalty_coefficient(-0.2, 1.0), "r: got -0.2, want a proxy that correlates pos"),
        (lambda: penalty_coefficient(0.0, 1.0), "r: got 0.0, want a proxy that correlates pos"),
        (lambda: penalty_coefficient(0.5, 0.0), "sigma: got 0"),
        (lambda: coefficient_sweep(0.0), "sigma: got 0"),
        (lambda: hacking_bound(1.2, 0.0, 0.0), "r: got"),
        (lambda: hacking_bound(0.5, 0.0, -1.0), "chi2: got"),
        (lambda: hacking_bound(0.5, math.nan, 1.0), "proxy_gain: got NaN"),
        (lambda: hacking_bound(0.5, 2.0, 1.0), "proxy_gain: got .*, want at most √χ²"),
        (lambda: safe_divergence(0.0, 1.0), "r: got 0"),
        (lambda: safe_divergence(0.5, -1.0), "proxy_gain: got -1"),
        (lambda: audit_proxy(x, x, [1, 1, 1]), "episodes: got 1 episode"),
        (lambda: audit_proxy(x, x, [1, 1]), "episodes: got shape"),
        (lambda: audit_proxy(x, x, times=[0, -1, 0]), "times: got below 0"),
        (lambda: audit_proxy(x, x, gamma=0.0), "gamma: got 0"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()
