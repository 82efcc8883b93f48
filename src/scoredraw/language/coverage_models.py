"""Two models of coverage, a power law and a beta-binomial, and their fits to many data at once.

A bootstrap fits a thousand resamples of the same problems. They differ in two parameters each and
in nothing else, so both fits are one damped Newton iteration in two variables on arrays (R,),
each row with its own damping: Levenberg-Marquardt for the power law's least squares, and the
same with second derivatives for the beta-binomial's likelihood.

The parameters of a model are numbers, or arrays (R,) for R fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from scoredraw.errors import require

Int = NDArray[np.int64]
Float = NDArray[np.float64]

STEPS = 300
LEAP = 3.0  # the longest step of a logarithm
SETTLED = 1e-10  # steps as short as this end the iteration
DAMPING = 1e-3  # where the iteration starts; it moves by tens between these two
LEAST_DAMPING, MOST_DAMPING = 1e-15, 1e12
HUGE_LOG = 700.0  # exp of more overflows
LOG_K_BITS = 80  # bisections of log k: down to one part in 10^20
LEAST_GAIN = 1e-9  # overdispersion below this share of what n allows is none
STARTS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)  # α + β to start from: the likeliest is taken
CELLS = 2_000_000  # how many cells of resamples × tallies are worked on at a time


# ── the power law ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """coverage(k) = exp(a k^b); with b < 0 it tends to 1.

    r2 is 1 - Σ residuals² / Σ (coverage - its mean)², in coverage whatever the fit minimised;
    residuals (K,) are coverage - fit, at the sizes of the fit.

    >>> law = PowerLaw(-2.0, -0.5)
    >>> law.predict([1, 100]).round(4).tolist(), round(law.k_for(0.9))
    ([0.1353, 0.8187], 360)
    """

    a: Any
    b: Any
    r2: float = math.nan
    residuals: Float | None = None

    @classmethod
    def of(cls, a: float, b: float, k: Float, coverage: Float) -> PowerLaw:
        """The law with its residuals on the data it was fitted to."""
        residuals = coverage - cls(a, b).coverage(k)
        spread = float(((coverage - coverage.mean()) ** 2).sum())
        left = float((residuals**2).sum())
        r2 = 1 - left / spread if spread > 0 else (1.0 if left == 0 else math.nan)
        return cls(a, b, r2, residuals)

    def coverage(self, k: ArrayLike) -> Float:
        """Coverage at sizes k (K,) -> (K,), or (R, K) where the parameters are (R,)."""
        log_k = np.log(np.asarray(k, np.float64))
        return np.asarray(np.exp(_column(self.a) * np.exp(_column(self.b) * log_k)))

    predict = coverage

    def k_for(self, target: float) -> Any:
        """k* = (log(target) / a)^(1/b), at least 1; inf where it is never reached."""
        require(0 < target < 1, "target", target, "a coverage between 0 and 1")
        a, b = np.asarray(self.a, np.float64), np.asarray(self.b, np.float64)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            k = np.exp(np.minimum(np.log(math.log(target) / a) / b, 2 * HUGE_LOG))
            k = np.where(np.exp(a) >= target, 1.0, np.where(b < 0, np.maximum(k, 1.0), np.inf))
            k = np.where(np.isnan(a), np.nan, k)
        return k if k.ndim else float(k)


def least_squares(log_k: Float, coverage: Float) -> tuple[Float, Float, NDArray[np.bool_]]:
    """The power laws nearest to curves (R, K) at log k (K,): a (R,), b (R,), whether each settled.

    With h = -a k^b the slopes of exp(-h) are -h exp(-h) in log(-a), and log k times that in b.
    A curve that is all 0 gets a = -inf, b = 0, one that is all 1 gets a = b = 0.
    """
    a, b = np.where(coverage.any(axis=1), 0.0, -np.inf), np.zeros(len(coverage))
    settled = np.ones(len(coverage), bool)
    some = np.flatnonzero(coverage.any(axis=1) & (coverage < 1).any(axis=1))
    if not some.size:
        return a, b, settled
    want = coverage[some]

    def hazard(point: Float) -> Float:
        return np.exp(np.minimum(point[:, :1] + point[:, 1:] * log_k, HUGE_LOG))

    def loss(point: Float) -> Float:
        return ((want - np.exp(-hazard(point))) ** 2).sum(axis=1)

    def derivatives(point: Float) -> tuple[Float, Float]:
        h = hazard(point)
        fit = np.exp(-h)
        slopes = np.stack([-h * fit, -h * fit * log_k], axis=1)
        downhill = np.einsum("rik,rk->ri", slopes, want - fit)
        return downhill, np.einsum("rik,rjk->rij", slopes, slopes)

    point, settled[some] = _descend(_regressed(log_k, want), loss, derivatives)
    a[some], b[some] = -np.exp(np.minimum(point[:, 0], HUGE_LOG)), point[:, 1]
    return a, b, settled


def _regressed(log_k: Float, coverage: Float) -> Float:
    """log(-a) and b by regressing log(-log coverage) on log k over 0 < coverage < 1, (R, 2)."""
    inner = ((coverage > 0) & (coverage < 1)).astype(np.float64)
    safe = np.clip(coverage, 1e-12, 1 - 1e-12)
    y = np.log(-np.log(safe))
    points = np.maximum(inner.sum(axis=1), 1)
    x_mean, y_mean = inner @ log_k / points, (inner * y).sum(axis=1) / points
    x = log_k - x_mean[:, None]
    spread = (inner * x**2).sum(axis=1)
    slope = (inner * x * (y - y_mean[:, None])).sum(axis=1) / np.where(spread > 0, spread, 1)
    slope = np.where(spread > 0, slope, -0.3)
    first = np.log(-np.log(safe.max(axis=1)))  # of a curve with no inner point
    level = np.where(inner.any(axis=1), y_mean - slope * x_mean, first)
    return np.stack([level, slope], axis=1)


# ── the beta-binomial ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class BetaBinomial:
    """Problems whose chance of a right sample is Beta(alpha, beta): coverage at any k.

    coverage(k) = 1 - B(α, β+k) / B(α, β), and 1 - coverage falls as k^-α.
    `mean` is α/(α+β) if not given. In the limits it stands alone: α = β = inf is one chance p for
    all, 1 - (1-p)^k; α = β = 0 are problems always right (a share p) or always wrong, coverage p.

    >>> BetaBinomial(0.4, 3.0).coverage([1, 10, 100, 10_000]).round(6).tolist()
    [0.117647, 0.460734, 0.76626, 0.962562]
    >>> round(BetaBinomial(0.4, 3.0).k_for(0.9), 2)
    855.14
    """

    alpha: Any
    beta: Any
    mean: Any = None
    log_likelihood: Any = math.nan

    def __post_init__(self) -> None:
        alpha, beta = np.asarray(self.alpha, np.float64), np.asarray(self.beta, np.float64)
        alike = (np.isinf(alpha) == np.isinf(beta)) & ((alpha > 0) == (beta > 0))
        positive = bool((alike & (alpha >= 0) & (beta >= 0)).all())
        came = f"{self.alpha} with beta {self.beta}"
        require(positive, "alpha", came, "both positive, both zero or both infinite")
        if self.mean is None:
            inside = bool(((alpha > 0) & (beta > 0) & np.isfinite(alpha)).all())
            require(inside, "mean", None, "a share, for infinite or zero alpha and beta")
            object.__setattr__(self, "mean", self.alpha / (self.alpha + self.beta))

    @property
    def limit(self) -> str:
        """ "" for a beta distribution, or the limit that stands in for one."""
        if np.ndim(self.alpha) or 0 < self.alpha < math.inf:
            return ""
        return "binomial" if self.alpha else "all or none"

    def coverage(self, k: ArrayLike) -> Float:
        """Coverage at sizes k (K,) -> (K,), or (R, K) where the parameters are (R,)."""
        sizes = np.asarray(k, np.float64)
        alpha, beta, mean = (_column(x) for x in (self.alpha, self.beta, self.mean))
        inside = (alpha > 0) & np.isfinite(alpha)
        with np.errstate(divide="ignore"):
            one_chance = sizes * np.log1p(-mean)
            always = np.log1p(-mean) + 0 * sizes
        beta_mixed = log_failure(np.where(inside, alpha, 1.0), np.where(inside, beta, 1.0), sizes)
        log_miss = np.where(inside, beta_mixed, np.where(alpha > 0, one_chance, always))
        return np.asarray(-np.expm1(log_miss))

    def k_for(self, target: float) -> Any:
        """The k ≥ 1 at which coverage reaches `target`, by bisection in log k, or inf."""
        require(0 < target < 1, "target", target, "a coverage between 0 and 1")
        low = np.zeros(np.shape(self.alpha))
        high = np.full(np.shape(self.alpha), HUGE_LOG)
        for _ in range(LOG_K_BITS):
            middle = (low + high) / 2
            reached = self._coverage_of_each(np.exp(middle)) >= target
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
        reachable = self._coverage_of_each(np.exp(np.full_like(high, HUGE_LOG))) >= target
        k = np.where(self._coverage_of_each(np.ones_like(high)) >= target, 1.0, np.exp(high))
        k = np.where(reachable, k, np.inf)
        return k if k.ndim else float(k)

    def _coverage_of_each(self, k: Float) -> Float:
        """The coverage of fit r at its own k[r]."""
        return self.coverage(k[..., None])[..., 0] if k.ndim else self.coverage(k)


def log_failure(alpha: ArrayLike, beta: ArrayLike, k: ArrayLike) -> Float:
    """log B(α, β+k)/B(α, β), the log of the chance that k samples all fail; arrays broadcast.

    With s = α+β it is log Γ(β+k) - log Γ(β) - log Γ(s+k) + log Γ(s). Those are large and cancel, so
    Stirling's series log Γ(y) = (y-½) log y - y + ½ log 2π + δ(y) is put in and the large parts
    are taken together by hand:

        (β-½) log1p(kα / (β(s+k))) - α log1p(k/s) + k log((β+k) / (s+k))
            + δ(β+k) - δ(β) - δ(s+k) + δ(s)

    for β, s ≥ 10, where the ten factors (β+i)(s+k+i) / ((β+k+i)(s+i)) of Γ(y+1) = yΓ(y) lead.
    The chance itself is good to about 1e-14 for any α, β > 0 and k ≥ 0, near the limits too.

    >>> np.exp(log_failure(1.0, 1.0, [1, 5, 999])).round(12).tolist()  # uniform p: 1 / (k+1)
    [0.5, 0.166666666667, 0.001]
    """
    a, b, k = (np.asarray(x, np.float64) for x in (alpha, beta, k))
    i = np.arange(10.0)
    near, far = b[..., None] + i, (a + b)[..., None] + i
    size = k[..., None]
    product = np.log(near / (near + size) * ((far + size) / far)).sum(axis=-1)
    b, s = b + 10, a + b + 10
    large = (b - 0.5) * np.log1p(a / b * (k / (s + k))) - a * np.log1p(k / s)
    with np.errstate(divide="ignore"):  # of the two, the one that loses no digits
        rest = np.where(a < b + k, np.log1p(-a / (s + k)), np.log((b + k) / (s + k)))
    large = large + k * rest
    return np.asarray(product + large + _delta(b + k) - _delta(b) - _delta(s + k) + _delta(s))


def _delta(y: Float) -> Float:
    """log Γ(y) - [(y-½) log y - y + ½ log 2π] for y ≥ 10, by Stirling's series."""
    x = (1 / y) ** 2
    series = 1 / 1188 - x * (691 / 360360 - x / 156)
    return np.asarray((1 / 12 - x * (1 / 360 - x * (1 / 1260 - x * (1 / 1680 - x * series)))) / y)


def fit_tallies(n: Int, c: Int, times: NDArray[Any]) -> tuple[Float, Float, Float, Float]:
    """Beta-binomial fits to kinds of problems (n, c) (U,) that come times (R, U) often.

    -> α, β, mean and log-likelihood (without binomial coefficients), each (R,).
    """
    step = max(1, CELLS // int(n.max()))
    parts = [_fit_block(n, c, times[start : start + step]) for start in range(0, len(times), step)]
    alpha, beta, mean, log_likelihood = (np.concatenate(part) for part in zip(*parts, strict=True))
    return alpha, beta, mean, log_likelihood


def _fit_block(n: Int, c: Int, times: NDArray[Any]) -> tuple[Float, Float, Float, Float]:
    j = np.arange(int(n.max()), dtype=np.float64)
    right, wrong, tried = (_tally(counts, times, len(j)) for counts in (c, n - c, n))
    mean = right.sum(axis=1) / tried.sum(axis=1)
    some = (mean > 0) & (mean < 1)
    bimodal = some & (times[:, (c > 0) & (c < n)].sum(axis=1) == 0)
    mean[bimodal] = right[bimodal, 0] / tried[bimodal, 0]
    # the slope of log L in 1/(α+β) at 0: what the data would gain by leaving the binomial
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (right @ j) / mean + (wrong @ j) / (1 - mean) - tried @ j
    # which way it slopes there settles it where all n are equal, but not where they differ
    leaves = gain > LEAST_GAIN * (tried @ j)
    inside = np.flatnonzero(some & ~bimodal & (leaves | (n.min() < n.max())))
    alpha = np.where(bimodal, 0.0, np.inf)
    beta = alpha.copy()
    # both limits are of one chance: of every sample, or of every problem's first
    first = np.where(bimodal[:, None], j == 0, True)
    likelihood = xlogy((right * first).sum(axis=1), mean)
    likelihood += xlogy((wrong * first).sum(axis=1), 1 - mean)
    if inside.size:
        parts = (right[inside], wrong[inside], tried[inside], mean[inside])
        point, found = _most_likely(j, *parts)
        better = leaves[inside] | (found > likelihood[inside] + LEAST_GAIN)
        inside = inside[better]
        likelihood[inside] = found[better]
        alpha[inside], beta[inside] = np.exp(point[better]).T
        mean[inside] = alpha[inside] / (alpha[inside] + beta[inside])
    return alpha, beta, mean, likelihood


def _tally(counts: Int, times: NDArray[Any], length: int) -> Float:
    """How many problems have a count above j, for j = 0 .. length - 1: (R, length)."""
    order = np.argsort(counts)
    above = np.zeros((len(times), len(counts) + 1))
    above[:, :-1] = np.cumsum(times[:, order[::-1]], axis=1)[:, ::-1]
    return above[:, np.searchsorted(counts[order], np.arange(length), side="right")]


def _most_likely(
    j: Float, right: Float, wrong: Float, tried: Float, mean: Float
) -> tuple[Float, Float]:
    """log α and log β of the largest likelihood, (R, 2), and the logarithm of that (R,)."""
    total = tried.sum(axis=1)

    def loss(point: Float) -> Float:
        a, b = np.exp(point.T)[:, :, None]
        gains = right * np.log(a + j) + wrong * np.log(b + j) - tried * np.log(a + b + j)
        return -gains.sum(axis=1) / total

    def derivatives(point: Float) -> tuple[Float, Float]:
        a, b = np.exp(point.T)
        per_a, per_b, per_s = (1 / (x[:, None] + j) for x in (a, b, a + b))
        slope_s, bend_s = (tried * per_s).sum(axis=1), (tried * per_s**2).sum(axis=1)
        rise_a = a * ((right * per_a).sum(axis=1) - slope_s)
        rise_b = b * ((wrong * per_b).sum(axis=1) - slope_s)
        bend_a = a**2 * ((right * per_a**2).sum(axis=1) - bend_s) - rise_a
        bend_b = b**2 * ((wrong * per_b**2).sum(axis=1) - bend_s) - rise_b
        across = -a * b * bend_s
        uphill = np.stack([rise_a, rise_b], axis=1)
        bend = np.stack([bend_a, across, across, bend_b], axis=1).reshape(-1, 2, 2)
        return uphill / total[:, None], bend / total[:, None, None]

    starts = [np.log(np.stack([mean, 1 - mean], axis=1) * s) for s in STARTS]
    best = np.argmin([loss(start) for start in starts], axis=0)
    point, _ = _descend(np.stack(starts)[best, np.arange(len(mean))], loss, derivatives)
    return point, -loss(point) * total


def _column(parameter: Any) -> Float:
    """A parameter as (), or as (R, 1) to be set against sizes (K,)."""
    value = np.asarray(parameter, np.float64)
    return value[..., None] if value.ndim else value


# ── the iteration ───────────────────────────────────────────────────────────────────────────────


def _descend(
    point: Float,
    loss: Callable[[Float], Float],
    derivatives: Callable[[Float], tuple[Float, Float]],
) -> tuple[Float, NDArray[np.bool_]]:
    """Minima of R functions of two variables from points (R, 2), and whether each was reached.

    Newton's step with curvature H + λ |diag H|; λ falls after a step that is no loss and grows
    after one that is, in each row for itself. `derivatives` gives the downhill slope and H.
    """
    damping = np.full(len(point), DAMPING)
    value = loss(point)
    settled = np.zeros(len(point), bool)
    for _ in range(STEPS):
        downhill, curvature = derivatives(point)
        first, across, second = curvature[:, 0, 0], curvature[:, 0, 1], curvature[:, 1, 1]
        first, second = first + damping * np.abs(first), second + damping * np.abs(second)
        determinant = first * second - across**2
        convex = (first > 0) & (determinant > 0)
        step = np.stack(
            [
                second * downhill[:, 0] - across * downhill[:, 1],
                first * downhill[:, 1] - across * downhill[:, 0],
            ],
            axis=1,
        )
        step = np.clip(step / np.where(convex, determinant, np.inf)[:, None], -LEAP, LEAP)
        trial = point + step
        tried = loss(trial)
        better = convex & (tried <= value)
        settled |= convex & (np.abs(step) <= SETTLED * (1 + np.abs(point))).all(axis=1)
        point = np.where(better[:, None], trial, point)
        value = np.where(better, tried, value)
        damping = np.where(better, damping / 10, damping * 10)
        damping = np.clip(damping, LEAST_DAMPING, MOST_DAMPING)
        if settled.all():
            break
    return point, settled
