r"""When may a proxy be optimised? When it correlates, and only as far as the correlation carries.

A proxy R̃ is r-correlated with the true reward R under a reference policy if over the states and
actions that this policy visits

    r = E[(R̃ - J̃_ref)/σ̃ · (R - J_ref)/σ] > 0.

Any policy π then has, with a = (J̃(π) - J̃_ref)/σ̃ its gain by the proxy and χ² the divergence of
its occupancy from the reference's,

    (J(π) - J_ref)/σ >= r a - √(1 - r²) √(χ² - a²) >= r a - √(1 - r²) √χ².

(Split the true reward into r times the proxy and what is orthogonal to it; the orthogonal part can
lose no more than Cauchy and Schwarz allow.) The right-hand side is a proxy less a penalty: maximise

    J̃(π) - λ √χ²,   λ = σ̃ √(1/r² - 1).

r near 1 asks for little; r near 0 for staying where one is. The middle bound is attained.

Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185 (the last bound; the middle one is ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require
from scoredraw.metrics import Estimate, bootstrap_interval

Float = NDArray[np.float64]

SWEEP = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # times σ̃, where r is unknown
ROUNDING = 1e-12  # of a mean, relative
SLACK = 1e-9  # of a² <= χ²
POSITIVE = "a proxy that correlates positively with the true reward"


class ProxyCorrelation(NamedTuple):
    """r in [-1, 1]; sigma: the proxy's standard deviation σ̃ under the reference."""

    r: float
    sigma: float


def proxy_correlation(
    proxy: ArrayLike, true: ArrayLike, weights: ArrayLike | None = None
) -> ProxyCorrelation:
    """r and σ̃ of a proxy over what the reference policy does.

    proxy, true: (...) rewards of the same states and actions; weights: (...) their occupancy, such
    as γ^t or the exact one of a table, to any scale; None: all alike. float64, weighted moments
    (no n - 1). Raises InputError for shapes, what is not finite, weights below 0 or all 0, and a
    proxy or a true reward that is constant under the reference. r may be negative; what needs
    r > 0 says so. Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185. O(n).

    >>> proxy_correlation([0.0, 1.0, 2.0, 5.0], [0.0, 1.0, 2.0, 2.0], [1, 1, 1, 0])
    ProxyCorrelation(r=1.0, sigma=0.816496580927726)
    """
    x, y, w = _rewards(proxy, true, weights)
    for name, values in (("proxy", x), ("true", y)):
        seen = values[w > 0]
        spread = np.ptp(seen) > ROUNDING * np.abs(seen).max()
        require(bool(spread), name, "one that is constant under the reference", "one that varies")
    moments = _moments(x, y, w).sum(axis=0)
    return ProxyCorrelation(float(_r(moments)), float(np.sqrt(_variances(moments)[0])))


def penalty_coefficient(r: float, sigma: float) -> float:
    """λ = σ̃ √(1/r² - 1), before √χ² of the occupancies. Raises InputError unless 0 < r <= 1, σ̃ > 0.

    >>> round(penalty_coefficient(0.8, 2.0), 6)
    1.5
    """
    require(0 < r <= 1, "r", r, POSITIVE)
    require(0 < sigma < math.inf, "sigma", sigma, "a positive number")
    return sigma * math.sqrt((1 - r) * (1 + r)) / r


def coefficient_sweep(sigma: float) -> Float:
    """The λ to try where r is unknown: σ̃ times 1, .5, .2, .1, .05, .02, .01.

    >>> coefficient_sweep(0.05)[:3].tolist()
    [0.05, 0.025, 0.010000000000000002]
    """
    require(0 < sigma < math.inf, "sigma", sigma, "a positive number")
    return sigma * np.array(SWEEP)


def hacking_bound(r: Any, proxy_gain: Any, chi2: Any, sharp: bool = True) -> Any:
    """The least that the true reward can gain, in units of its standard deviation.

    r a - √(1 - r²) √(χ² - a²) where sharp, else r a - √(1 - r²) √χ². r in [-1, 1]; proxy_gain:
    a = (J̃(π) - J̃_ref)/σ̃; chi2: χ²(mu_π‖mu_ref), infinite where π does what the reference never
    does; all of shapes that broadcast. Raises InputError for r outside [-1, 1], χ² < 0, and, where
    sharp, for a² > χ², which no policy has. Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185.

    >>> float(hacking_bound(0.8, 1.0, 2.0)), round(float(hacking_bound(0.8, 1.0, 2.0, False)), 4)
    (0.20000000000000007, -0.0485)
    """
    r, a, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (r, proxy_gain, chi2)))
    for name, x, fits in (("r", r, np.abs(r) <= 1), ("chi2", c, c >= 0)):
        wanted = "a correlation, from -1 to 1" if name == "r" else "numbers of at least 0"
        require(bool(fits.all()), name, x[~fits][:1], wanted)
    require(bool(np.isfinite(a).all()), "proxy_gain", "NaN or infinity", "finite numbers")
    if sharp:
        fits = a**2 <= c * (1 + SLACK) + SLACK
        came = f"{a[~fits][:1]} with χ² {c[~fits][:1]}"
        require(bool(fits.all()), "proxy_gain", came, "at most √χ², as of every policy")
        c = np.maximum(c - a**2, 0.0)
    off = np.sqrt((1 - r) * (1 + r))
    with np.errstate(invalid="ignore"):
        return r * a - np.where(off > 0, off * np.sqrt(c), 0.0)


def safe_divergence(r: float, proxy_gain: float, sharp: bool = True) -> float:
    """The largest χ² at which a gain by the proxy still cannot hurt the true reward.

    a² r²/(1 - r²), and a²/(1 - r²) by the sharp bound; infinite at r = 1. proxy_gain: a >= 0 in
    standard deviations of the proxy. Raises InputError unless 0 < r <= 1.

    >>> round(safe_divergence(0.8, 1.0), 4), round(safe_divergence(0.8, 1.0, sharp=False), 4)
    (2.7778, 1.7778)
    """
    require(0 < r <= 1, "r", r, POSITIVE)
    require(0 <= proxy_gain < math.inf, "proxy_gain", proxy_gain, "a gain of at least 0")
    off = (1 - r) * (1 + r)
    top = proxy_gain**2 * (1.0 if sharp else r**2)
    return top / off if off > 0 else math.inf


# ── a test of a proxy on rollouts of the reference ──────────────────────────────────────────────


@dataclass(frozen=True)
class ProxyAudit:
    """What rollouts of the reference policy say about a proxy.

    r: the correlation; coefficient: λ (infinite where r <= 0); both with bootstrap intervals over
    episodes. sigma, sigma_true: standard deviations; proxy_mean, true_mean: mean rewards a step;
    episodes, steps: how many. correlated: True where the interval of r lies above 0, False where
    below, None where the rollouts do not tell.
    """

    r: Estimate
    coefficient: Estimate
    sigma: float
    sigma_true: float
    proxy_mean: float
    true_mean: float
    episodes: int
    steps: int

    @property
    def correlated(self) -> bool | None:
        return True if self.r.above(0) else False if self.r.below(0) else None

    def guaranteed_gain(self, proxy_mean: float, chi2: float, sharp: bool = True) -> Estimate:
        """The least gain of the true reward a step, of a policy with this mean proxy and χ².

        In units of the true reward; the interval is what the bound says over that of r. chi2:
        `divergences.chi2_from_log_ratios`. Raises InputError as `hacking_bound`.
        """
        gain = (proxy_mean - self.proxy_mean) / self.sigma
        value = self.sigma_true * float(hacking_bound(self.r.value, gain, chi2, sharp))
        if math.isnan(self.r.low):
            return Estimate(value, math.nan, math.nan, self.episodes)
        # convex in r, so largest at an end and least where its slope is 0, if that lies between
        level = math.sqrt(chi2 if sharp else chi2 + gain**2)
        lowest = min(max(-gain / level if level else 0.0, self.r.low), self.r.high)
        over = np.array([self.r.low, lowest, self.r.high])
        bounds = self.sigma_true * hacking_bound(over, gain, chi2, sharp)
        return Estimate(value, float(bounds.min()), float(bounds.max()), self.episodes)


def audit_proxy(
    proxy: ArrayLike,
    true: ArrayLike,
    episodes: ArrayLike | None = None,
    *,
    times: ArrayLike | None = None,
    gamma: float = 1.0,
    level: float = 0.95,
    resamples: int = 2000,
    rng: int | np.random.Generator | None = 0,
) -> ProxyAudit:
    """Correlation of a proxy with the true reward over rollouts of the reference, and λ.

    proxy, true: (n,) rewards of each step; episodes: (n,) the episode of each, numbers or names
    (None: every step is its own, as with one reward an answer); times: (n,) steps since the start
    of the episode, and gamma in (0, 1]: each counts γ^t. What an episode holds is dependent, so
    the bootstrap draws episodes; λ is monotone in r and gets r's resamples. Raises InputError as
    `proxy_correlation`, for fewer than 2 episodes, times below 0 and gamma outside (0, 1].

    Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185. O(n + resamples x episodes).

    >>> rng = np.random.default_rng(0)
    >>> true = rng.normal(size=400)
    >>> found = audit_proxy(true + rng.normal(size=400), true)
    >>> print(found.r, found.correlated)
    0.734 [0.688, 0.778] True
    """
    require(0 < gamma <= 1, "gamma", gamma, "a number in (0, 1]")
    weights = None
    if times is not None:
        t = np.asarray(times, np.float64)
        require(bool((t >= 0).all()), "times", "below 0 or NaN", "steps since the start, >= 0")
        weights = gamma**t
    x, y, w = _rewards(proxy, true, weights)
    r, sigma = proxy_correlation(x, y, w)
    each = _moments(x, y, w)
    if episodes is not None:
        names = np.asarray(episodes)
        require(names.shape == x.shape, "episodes", f"shape {names.shape}", f"{x.shape}")
        _, code = np.unique(names, return_inverse=True)
        each = np.stack([np.bincount(code, column) for column in each.T], axis=1)
    require(len(each) >= 2, "episodes", f"{len(each)} episode", "2 or more")
    options: dict[str, Any] = {"level": level, "resamples": resamples, "rng": rng}
    correlation = bootstrap_interval(each, statistic=_r_of_rows, **options)
    # λ/σ̃ falls with r: the ends of its interval are those of r, and σ̃ is taken as it is
    ends = [_coefficient(v, sigma) for v in (r, correlation.high, correlation.low)]
    true_sd = float(np.sqrt(_variances(each.sum(axis=0))[1]))
    means = [float(np.average(rewards, weights=w)) for rewards in (x, y)]
    return ProxyAudit(
        correlation, Estimate(ends[0], ends[1], ends[2], len(each)), sigma, true_sd,
        means[0], means[1], len(each), len(x),
    )  # fmt: skip


def _coefficient(r: float, sigma: float) -> float:
    if math.isnan(r):
        return math.nan
    return penalty_coefficient(min(r, 1.0), sigma) if r > 0 else math.inf


def _rewards(proxy: ArrayLike, true: ArrayLike, weights: ArrayLike | None) -> tuple[Float, ...]:
    x, y = np.asarray(proxy, np.float64), np.asarray(true, np.float64)
    require(x.size > 0, "proxy", f"shape {x.shape}", "at least one reward")
    require(x.shape == y.shape, "true", f"shape {y.shape}", f"{x.shape}, as proxy")
    w = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64)
    require(w.shape == x.shape, "weights", f"shape {w.shape}", f"{x.shape}, as proxy")
    for name, values in (("proxy", x), ("true", y), ("weights", w)):
        require(bool(np.isfinite(values).all()), name, "NaN or infinity", "finite numbers")
    require(bool((w >= 0).all() and w.any()), "weights", "below 0, or all 0", "weights >= 0")
    return x.reshape(-1), y.reshape(-1), w.reshape(-1)


def _moments(x: Float, y: Float, w: Float) -> Float:
    """w times 1, x, y, x², y², xy of each row, (n, 6), x and y less their means."""
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    return w[:, None] * np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _variances(moments: Float) -> tuple[Any, ...]:
    """Variances of both and their covariance, of sums (..., 6)."""
    total, sx, sy, sxx, syy, sxy = np.moveaxis(moments, -1, 0)
    mx, my = sx / total, sy / total
    return sxx / total - mx**2, syy / total - my**2, sxy / total - mx * my


def _r(moments: Float) -> Any:
    sxx, syy, sxy = _variances(moments)
    scale = np.sqrt(np.maximum(sxx * syy, 0.0))
    r = np.where(scale > 0, sxy / np.where(scale > 0, scale, 1.0), 0.0)
    return np.clip(r, -1.0, 1.0)


def _r_of_rows(rows: Float, axis: int) -> Any:
    """The correlation of some episodes; 0 where a resample has no spread."""
    return _r(rows.sum(axis=axis))
