"""How well something did, and how sure we are of it: estimates with intervals.

Everything that is measured here travels as an `Estimate`: the value, the two ends of its
confidence interval and the number of independent observations behind it. A comparison of two
methods is made on the differences of paired observations (the same split, the same query, the
same seed), because what the pairs share then cancels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from scoredraw.errors import InputError, require

Statistic = Callable[..., Any]

RESAMPLE_CELLS = 4_000_000  # how many resampled values are held at a time


@dataclass(frozen=True)
class Estimate:
    """A measured number, its confidence interval and the observations behind it.

    `low` and `high` are NaN where there is no interval (a single observation has none).

    >>> print(Estimate(0.8117, 0.8009, 0.8224, 10))
    0.812 [0.801, 0.822]
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.4g}"
        digits = significant_decimals((self.high - self.low) / 2, self.value)
        value, low, high = (
            re.sub(r"^-(0\.?0*)$", r"\1", format(number, digits))  # no minus on a zero
            for number in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above `bound`."""
        return self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below `bound`."""
        return self.high < bound


def significant_decimals(half_width: float, value: float = 0.0) -> str:
    """The format that shows an interval of this half width with two significant digits.

    >>> format(0.81234, significant_decimals(0.0105))
    '0.812'
    """
    if not half_width > 0:
        return ".4g"
    decimals = 1 - math.floor(math.log10(half_width))
    if abs(value) < 1:  # a wide interval must not hide a small value
        decimals = max(decimals, 2)
    if decimals > 6 or abs(value) >= 1e9:
        return ".4g"
    return f".{max(decimals, 0)}f"


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The mean with Student's t interval: x̄ ± t_{(1+level)/2, n-1} · s / √n.

    values: (n,) independent observations. One observation has a value and no interval (NaN).
    Raises `InputError` for no values, or values that are not finite. Student (1908).

    >>> print(mean_interval([1.0, 2.0, 3.0, 4.0]))
    2.5 [0.4, 4.6]
    """
    x = observations(values, "values", level)
    n = len(x)
    mean = float(x.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, comparisons: int = 1
) -> Estimate:
    """The mean of a - b over pairs, with a t interval on the differences.

    a, b: (n,) observations; a[i] and b[i] share everything but the thing compared.
    comparisons: how many such intervals are read together. The level of each is then
    1 - (1 - level) / comparisons (Bonferroni), so that all cover at once with at least `level`.
    Raises `InputError` where the lengths differ.

    >>> print(paired_difference([3.0, 4.0, 5.5], [2.0, 3.0, 4.0]))
    1.17 [0.45, 1.88]
    """
    x = observations(a, "a", level)
    y = observations(b, "b", level)
    require(len(x) == len(y), "b", f"{len(y)} values", f"{len(x)}, one for each of a")
    require(comparisons >= 1, "comparisons", comparisons, "at least 1")
    return mean_interval(x - y, level=1 - (1 - level) / comparisons)


def proportion_interval(successes: int, trials: int, *, level: float = 0.95) -> Estimate:
    """A share of successes with Wilson's score interval, which stays inside [0, 1].

    centre = (p̂ + z²/2n) / (1 + z²/n),  half = z/(1 + z²/n) · √(p̂(1-p̂)/n + z²/4n²).
    Raises `InputError` unless 0 ≤ successes ≤ trials and trials ≥ 1. Wilson (1927).

    >>> print(proportion_interval(8, 10))
    0.80 [0.49, 0.94]
    """
    require(trials >= 1, "trials", trials, "at least 1")
    require(0 <= successes <= trials, "successes", successes, f"a count from 0 to {trials}")
    check_level(level)
    z = float(ndtri((1 + level) / 2))
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half  # exact ends, without round-off
    high = 1.0 if successes == trials else centre + half
    return Estimate(share, low, high, trials)


def bootstrap_interval(
    values: ArrayLike,
    *,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    rng: int | np.random.Generator | None = 0,
) -> Estimate:
    """A statistic with its percentile bootstrap interval, resampling the rows of `values`.

    values: (n,) or (n, ...); a row is one independent observation. statistic: takes resampled
    rows; where it has an `axis` argument it is called once for many resamples (axis=1), otherwise
    once a resample. The interval holds the central `level` of the resampled statistics. It is too
    short for small n (for a mean of fewer than about 20 values use `mean_interval`).
    Raises `InputError` for no values or values that are not finite.
    Efron (1979). O(resamples · n) time; memory bounded by blocks of resamples.

    >>> print(bootstrap_interval(np.arange(100.0)))
    49.5 [43.9, 55.1]
    """
    check_level(level)
    require(resamples >= 1, "resamples", resamples, "at least 1")
    rows = np.asarray(values, dtype=np.float64)
    require(rows.ndim >= 1 and len(rows) > 0, "values", f"shape {rows.shape}", "at least one row")
    require(bool(np.isfinite(rows).all()), "values", "NaN or infinity", "finite numbers")
    n = len(rows)
    vectorised = takes_axis(statistic)
    value = float(statistic(rows, axis=0)) if vectorised else float(statistic(rows))
    if n == 1:
        return Estimate(value, math.nan, math.nan, 1)
    generator = np.random.default_rng(rng)
    replicates = np.empty(resamples)
    step = max(1, RESAMPLE_CELLS // rows.size)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = rows[generator.integers(0, n, size=(stop - start, n))]
        if vectorised:
            replicates[start:stop] = statistic(drawn, axis=1)
        else:
            replicates[start:stop] = [statistic(sample) for sample in drawn]
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), n)


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """|m - m'|² + tr(S + S' - 2 (S S')^{1/2}) of the rows' means and covariances.

    x (n, d), y (n', d), n and n' ≥ 2. tr (S S')^{1/2} is the sum of the singular values of
    S^{1/2} S'^{1/2}. Of features of images this is their Fréchet distance (FID in Inception's
    features); it is biased upwards on finite samples, equally for samples of equal size.
    O((n + n') d² + d³). Dowson and Landau 1982.

    >>> round(frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]), 9)
    9.0
    """
    rows = np.asarray(x, np.float64), np.asarray(y, np.float64)
    for name, z in zip("xy", rows, strict=True):
        require(z.ndim == 2 and len(z) >= 2, name, z.shape, "(n, d) with n of 2 or more")
        require(bool(np.isfinite(z).all()), name, "NaN or infinity", "finite values")
    require(rows[0].shape[1] == rows[1].shape[1], "y", rows[1].shape, f"(n, {rows[0].shape[1]})")
    offset = rows[0].mean(axis=0) - rows[1].mean(axis=0)
    # S = AᵀA, so those of A Bᵀ: no square root of a matrix is needed
    centred = [(z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in rows]
    a, b = (np.asarray(np.linalg.qr(z, mode="r")) for z in centred)
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(offset @ offset + (a**2).sum() + (b**2).sum() - 2 * shared)


def takes_axis(function: Statistic) -> bool:
    """Whether a statistic can be told the axis it works along."""
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):  # built-ins that do not tell
        return False
    return "axis" in parameters and parameters["axis"].kind is not Parameter.VAR_KEYWORD


def observations(values: ArrayLike, argument: str, level: float) -> NDArray[np.float64]:
    """A non-empty finite vector, or an `InputError` that names the argument."""
    check_level(level)
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{argument}: got {type(values).__name__}, want numbers") from None
    require(x.ndim == 1, argument, f"{x.ndim} dimensions", "one dimension")
    require(len(x) > 0, argument, "no values", "at least one")
    require(bool(np.isfinite(x).all()), argument, "NaN or infinity", "finite numbers")
    return x


def check_level(level: float) -> None:
    require(0 < level < 1, "level", level, "a share between 0 and 1")
