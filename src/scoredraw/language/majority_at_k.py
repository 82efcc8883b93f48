"""The majority of a random k-subset, exactly."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import AnswerPool, check_subset_sizes, count_votes

Int = NDArray[np.int64]
Float = NDArray[np.float64]

NEGLIGIBLE = 1e-18


def majority_credit(pool: AnswerPool, credit: ArrayLike, ks: ArrayLike) -> Float:
    """The exact expected credit of the majority vote over all k-subsets of the samples, (K,).

    A random k-subset is n independent draws with chance θ, given that k came. Group g has c_g
    members, and b_g(j) = Binomial(c_g, θ)(j). With A_g(x) = Σ_{j<m} b_g(j) x^j, the chance that
    group r wins with m votes, its share 1/(t+1) of a tie of t others included, is

        [x^k]  b_r(m) x^m · B_0(x) · ∫_0^1 Π_{g≠r} (A_g(x) + y b_g(m) x^m) dy  /  Binomial(n, θ)(k)

    because ∫ y^t dy = 1/(t+1); B_0 is the polynomial of the null answers and of all groups with
    fewer than m members. The integrand is a polynomial of degree T < k/m in y, so Gauss-Legendre
    is exact; with y = 1 - s² about 10 T^¼ points give all digits, also where thousands tie. The
    coefficient is read off at roots of unity; θ = k/n puts it where the mass is. An m that some
    group exceeds almost surely is passed over.

    credit: (n,), of each sample; a group earns its mean. ks: (K,), 1 ≤ k ≤ n.
    Time, for each k, O(√n · Σ_m (sizes ≥ m) · (k/m)^¼) with m up to the largest credited group;
    error below 1e-13, up to a million samples, unless hundreds of groups tie and are credited:
    then about 1e-14 times their number.

    >>> pool = AnswerPool.of(["a", "b", "a", None])
    >>> majority_credit(pool, [1, 0, 1, 0], [1, 2, 3, 4]).round(9).tolist()
    [0.5, 0.666666667, 0.75, 1.0]
    """
    sizes = count_votes(pool.codes).astype(np.int64)
    earned = count_votes(pool.codes, credit) / np.maximum(sizes, 1)
    distinct, inverse, groups = np.unique(-sizes, return_inverse=True, return_counts=True)
    worth: Float = np.bincount(inverse, earned).astype(np.float64)  # of all groups of a size
    k_all = check_subset_sizes(ks, pool.n)
    return np.array([_majority_credit(-distinct, groups, worth, pool.n, int(k)) for k in k_all])


def _majority_credit(sizes: Int, groups: Int, worth: Float, n: int, k: int) -> float:
    """For group sizes (D,), largest first, `groups` of each, whose credits sum to `worth`."""
    theta = k / n
    # degrees further than this from k hold less than 2 exp(-50) of the mass: no more roots needed
    period = min(n + 1, math.ceil(5 * math.sqrt(n)) + 1)
    turns = np.arange(period // 2 + 1)
    roots = np.exp(2j * np.pi * np.arange(period) / period)
    x = roots[turns]
    pmf = np.zeros((len(sizes), int(sizes.max(initial=0)) + 1))
    for row, size in zip(pmf, sizes, strict=True):
        row[: size + 1] = binomial_pmf(int(size), theta)
    with np.errstate(divide="ignore"):  # the log of the chance that no group has more than m
        unbeaten = groups @ np.log(np.minimum(np.cumsum(pmf, axis=1), 1.0))
    below = np.zeros((len(sizes), len(x)), complex)  # A_g(x)
    total = np.zeros(len(x), complex)
    for m in range(1, min(k, int(sizes[worth > 0].max(initial=0))) + 1):
        below += pmf[:, m - 1, None] * roots[turns * (m - 1) % period]
        if unbeaten[m] < math.log(NEGLIGIBLE):
            continue
        rivals = int((sizes >= m).sum())
        credited = np.flatnonzero((worth[:rivals] > 0) & (pmf[:rivals, m] > NEGLIGIBLE))
        if not credited.size:
            continue
        tie = pmf[:rivals, m, None] * roots[turns * m % period]
        most_tied = min(k // m, int(groups[:rivals].sum())) - 1
        y, mass = _shares(most_tied)
        factor = below[:rivals, None] + y[:, None] * tie[:, None]  # (size, y, x)
        others = (1 - theta + theta * x) ** (n - int((sizes * groups)[:rivals].sum()))
        for r in credited:
            powers = groups[:rivals] - (np.arange(rivals) == r)
            product = np.prod(factor ** powers[:, None, None], axis=0)
            total += worth[r] * tie[r] * others * (mass @ product)
    both = np.where((turns == 0) | (2 * turns == period), 1, 2)  # a root and its conjugate
    coefficient = float((both * total * roots[-k * turns % period]).real.sum()) / period
    return min(max(coefficient / float(binomial_pmf(n, theta)[k]), 0.0), 1.0)


def _shares(degree: int) -> tuple[Float, Float]:
    """Points y and masses that integrate y^t over [0, 1] for t ≤ degree: 1/(t+1), relatively.

    y^t is all near 1, where y = 1 - s² spreads it out and spares its digits: errors relative to
    1/(t+1) are 3e-14 for t up to 1 000 and 5e-13 up to 10 000.
    """
    nodes = min(degree + 1, math.ceil(10 * degree**0.25) + 8)
    x, mass = np.polynomial.legendre.leggauss(nodes)
    s = (x + 1) / 2
    return 1 - s**2, mass * s


def binomial_pmf(n: int, theta: float) -> Float:
    """Binomial(n, θ) at 0 .. n, by products of ratios away from its mode: error about 1e-15.

    >>> binomial_pmf(2, 0.5).tolist()
    [0.25, 0.5, 0.25]
    """
    if theta == 1:
        return (np.arange(n + 1) == n).astype(np.float64)
    mode = min(int((n + 1) * theta), n)
    up, down = np.arange(mode, n), np.arange(mode, 0, -1)
    rising = np.cumprod((n - up) / (up + 1) * (theta / (1 - theta)))
    falling = np.cumprod(down / (n - down + 1) * ((1 - theta) / theta))
    pmf = np.concatenate([falling[::-1], [1.0], rising])
    return np.asarray(pmf / pmf.sum())
