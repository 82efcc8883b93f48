r"""What submitting k of N sampled answers costs against the best answer: exactly, and in bounds.

Answer y has probability π(y), is worth r*(y) and is thought to be worth r̂(y). Of N samples,
independent and distributed as π, k different answers are submitted, and

    regret = max_y r*(y) - E max_{i ≤ k} r*(ŷ_i)

In the guarantees y* is the best answer, C* = 1/π(y*) the coverage coefficient, and

    ε_RM² = Σ_y π(y) (r*(y) - r̂(y))²        ε_opt = |r*(y*) - r̂(y*)|

Counts of N samples are independent Poisson counts with means N π(y), given that they sum to N. So
the chance of an event that is a product over answers, such as "these come at least m times and
those less often", is a coefficient of a product of power series, read off at roots of unity.

Di, Ji, Li, Zhao and Gu, "Best-of-Majority: minimax-optimal strategy for pass@k inference scaling",
ICLR 2026, arXiv 2510.03199. The constants of `regret_bounds` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import comb, gammaln
from scipy.stats import multinomial, poisson

from scoredraw.errors import require
from scoredraw.language.best_of_majority import (
    SLACK,
    bom_threshold,
    survival_threshold,
    surviving,
)
from scoredraw.language.submission import check_beta, check_k
from scoredraw.uniforms import Rng, generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Complex = NDArray[np.complex128]

METHODS = ("bom", "bon", "majority", "uniform", "soft", "soft-answers")
MOST_COUNTS = 200_000  # up to so many tables of counts are enumerated
CELLS = 1_000_000  # how many cells of them are worked on at a time
NEGLIGIBLE = 1e-20
CLOSED, LISTED, DRAWN = "closed form", "enumeration", "Monte Carlo"


@dataclass(frozen=True)
class Regret:
    """A regret, its standard error (0 where it is exact) and how it was found.

    reached: the expected worth of the best submitted answer.
    """

    value: float
    reached: float
    standard_error: float
    how: str


def passk_regret(
    pi: ArrayLike,
    r_true: ArrayLike,
    r_hat: ArrayLike,
    n: int,
    k: int = 1,
    alpha: float | str = "auto",
    method: str = "bom",
    *,
    min_count: int | None = None,
    beta: float = 1.0,
    how: str | None = None,
    samples: int = 20_000,
    rng: Rng = 0,
) -> Regret:
    """The regret of a method that submits k of the answers among n samples.

    pi, r_true, r_hat: float (S,). method: "bom" and "bon" (by r̂; more frequent answers first where
    r̂ ties), "majority", "uniform" (the answers of k of the samples), "soft" and "soft-answers" (k
    draws without replacement from the samples, or from the different answers, in proportion to
    exp(β r̂)). Ties are settled by first occurrence, which is to say by lot.
    alpha, min_count: see `best_of_majority.survival_threshold`; only of "bom". With r_true 1 for
    one answer and 0 for the others the regret is the chance that it is not submitted.
    how: None for the best there is: a closed form ("uniform"; "bom" and "bon" where answers of
    equal r̂ are worth the same; "majority" for k = 1), enumeration of up to 200,000 tables of counts
    (no soft draws for k > 1), else `samples` random ones.
    Raises InputError for probabilities that are negative or don't sum to 1, arrays that don't match
    or are not finite, n or k < 1, k > n of "uniform", a `how` that can't be.

    Di et al. 2025, arXiv 2510.03199. Closed forms take O(S V k √n) time for V different r_true,
    with errors of about 1e-13 √n.

    >>> passk_regret([0.3, 0.3, 0.3, 0.1], [0, 0, 0, 1], [0, 0, 0, 1], 400, 3, 0.075).value < 0.05
    True
    >>> round(passk_regret([0.6, 0.4], [0, 1], [0, 1], 3, method="majority").value, 6)
    0.648
    """
    p, worth, thought = _instance(pi, r_true, r_hat)
    check_k(n, name="n")
    check_k(k)
    check_beta(beta)
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    require(samples >= 2, "samples", samples, "2 or more")
    require(method != "uniform" or k <= n, "k", k, f"at most {n}, the number of samples")
    share = survival_threshold(n, alpha, min_count) if method == "bom" else 0.0
    ways = _ways(p, worth, thought, n, k, method)
    require(how is None or how in ways, "how", repr(how), f"None or one of {', '.join(ways)}")
    error, chosen = 0.0, how or ways[0]
    if chosen == CLOSED:
        reached = _closed(p, worth, thought, n, k, share, method)
    else:
        rule = _rule(worth, thought, n, k, share, method, beta, generator(rng))
        if chosen == LISTED:
            reached = sum(
                float(multinomial.pmf(counts, n, p) @ rule(counts)) for counts in _tables(n, len(p))
            )
        else:
            values = _simulated(rule, p, n, samples, generator(rng))
            reached, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(samples))
    return Regret(max(float(worth.max()) - reached, 0.0), reached, error, chosen)


def _instance(pi: Any, r_true: Any, r_hat: Any) -> tuple[Float, Float, Float]:
    p, worth, thought = (np.asarray(each, np.float64) for each in (pi, r_true, r_hat))
    require(p.ndim == 1 and p.size > 0, "pi", f"shape {p.shape}", "(S,) probabilities")
    fine = bool((p >= 0).all()) and abs(float(p.sum()) - 1) < 1e-9
    require(fine, "pi", f"a sum of {p.sum():g}", "probabilities that sum to 1")
    for name, values in (("r_true", worth), ("r_hat", thought)):
        require(values.shape == p.shape, name, f"shape {values.shape}", f"{p.shape}")
        require(bool(np.isfinite(values).all()), name, "NaN or infinity", "finite numbers")
    there = p > 0  # what is never sampled can be the best, but can't be submitted
    require(bool(worth[there].max() == worth.max()), "pi", "0 for the best answer", "more than 0")
    return p[there] / p.sum(), worth[there], thought[there]


def _ways(p: Float, worth: Float, thought: Float, n: int, k: int, method: str) -> list[str]:
    """How a regret can be found, the best first."""
    order = np.lexsort((worth, thought))
    same = np.diff(thought[order]) == 0
    clear = not (same & (np.diff(worth[order]) != 0)).any()
    closed = {"uniform": True, "bom": clear, "bon": clear, "majority": k == 1}.get(method, False)
    few = math.comb(n + len(p) - 1, len(p) - 1) <= MOST_COUNTS
    listed = few and method != "uniform" and (k == 1 or not method.startswith("soft"))
    return [CLOSED] * closed + [LISTED] * listed + [DRAWN] * (method != "uniform")


# ── given the counts ────────────────────────────────────────────────────────────────────────────

Rule = Callable[[Int], Float]  # counts (M, S) -> the expected worth of the best submitted, (M,)


def _rule(
    worth: Float,
    thought: Float,
    n: int,
    k: int,
    share: float,
    method: str,
    beta: float,
    rng: np.random.Generator,
) -> Rule:
    if not method.startswith("soft"):
        level = np.unique(thought, return_inverse=True)[1] * (method != "majority") + 1
        return lambda counts: _ranked_value(counts, worth, level, n, k, share)
    weights = np.exp(beta * (thought - thought.max()))
    if k == 1:

        def softly(counts: Int) -> Float:
            w = weights * (counts if method == "soft" else counts > 0)
            return np.asarray(w @ worth / w.sum(axis=1))

        return softly
    return lambda counts: _drawn_value(counts, worth, weights, k, method == "soft", rng)


def _ranked_value(counts: Int, worth: Float, level: Int, n: int, k: int, share: float) -> Float:
    """Submit k by level (S,), then by count, then by lot: E[best worth] of counts (M, S).

    Of the answers that tie for the last places a random set gets in. It holds none of a given
    ones of T with chance C(T - a, t) / C(T, t), for t places.
    """
    by_worth = np.argsort(-worth, kind="stable")
    counts, level, worth = counts[:, by_worth], level[by_worth], worth[by_worth]
    live = surviving(counts, n, share)
    empty = ~live.any(axis=1, keepdims=True)
    live = np.where(empty, counts > 0, live)
    key = np.where(live, np.where(empty, 0, level) * (n + 1) + counts, -1)
    places = np.minimum(np.where(empty, 1, k), live.sum(axis=1, keepdims=True))
    edge = np.take_along_axis(-np.sort(-key, axis=1), places - 1, 1)
    sure, tied = key > edge, live & (key == edge)
    left = places - sure.sum(axis=1, keepdims=True)
    rivals, given = tied.sum(axis=1, keepdims=True), np.cumsum(tied, axis=1)
    fits = rivals - given >= left
    log_miss = _log_choose(np.where(fits, rivals - given, left), left) - _log_choose(rivals, left)
    miss = np.where(fits & (np.cumsum(sure, axis=1) == 0), np.exp(log_miss), 0.0)
    first = -np.diff(miss, axis=1, prepend=1.0)  # the chance that the best submitted is this one
    return np.asarray(first @ worth)


def _log_choose(n: Int, k: Int) -> Float:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _drawn_value(
    counts: Int, worth: Float, weights: Float, k: int, samples: bool, rng: np.random.Generator
) -> Float:
    """k draws without replacement in proportion to the weights: the best worth, by lot."""
    left = counts.astype(np.float64) if samples else (counts > 0).astype(np.float64)
    best = np.full(len(counts), -np.inf)
    rows = np.arange(len(counts))
    for _ in range(k):
        edges = np.cumsum(left * weights, axis=1)
        u = edges[:, -1:] * (1 - rng.random((len(counts), 1)))  # in (0, total]
        chosen = (edges < u).sum(axis=1)
        some = edges[:, -1] > 0
        best[some] = np.maximum(best, worth[np.minimum(chosen, len(worth) - 1)])[some]
        left[rows[some], chosen[some]] -= 1
    return best


def _tables(n: int, s: int) -> Iterator[Int]:
    """All counts of s answers that sum to n, in blocks (M, s)."""
    bars = combinations(range(n + s - 1), s - 1)
    while block := list(islice(bars, max(1, CELLS // s))):
        edge = np.array(block, np.int64).reshape(len(block), s - 1)
        yield np.diff(edge, axis=1, prepend=-1, append=n + s - 1) - 1


def _simulated(rule: Rule, p: Float, n: int, samples: int, rng: np.random.Generator) -> Float:
    block = max(1, CELLS // len(p))
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    return np.concatenate([rule(rng.multinomial(n, p, size)) for size in sizes])


# ── closed forms ────────────────────────────────────────────────────────────────────────────────


def _closed(
    p: Float, worth: Float, thought: Float, n: int, k: int, share: float, method: str
) -> float:
    if method == "uniform":
        order = np.argsort(worth, kind="stable")
        below = np.append(0.0, np.cumsum(p[order]))
        return float(np.diff(np.minimum(below, 1.0) ** k) @ worth[order])
    if method == "majority":
        return _most_frequent(p, worth, n, n)
    least = _least_count(n, share)
    value = _best_of_frequent(p, worth, thought, n, k, least)
    if len(p) * (least - 1) < n:  # some answer survives
        return value
    return value + _most_frequent(p, worth, n, least - 1)


def _least_count(n: int, share: float) -> int:
    """The smallest count of at least 1 that survives."""
    return max(1, math.ceil((share - SLACK) * n))


class _Series:
    """Power series of Poisson counts with means n p, at roots of unity; `total` is [x^n] / P(n).

    The roots turn far enough that what wraps around has less than exp(-50) of the mass.
    """

    def __init__(self, p: Float, n: int) -> None:
        self.means, self.n = n * p, n
        self.period = n + 1 + math.ceil(12 * math.sqrt(n) + 60)
        turns = np.arange(self.period // 2 + 1)
        self.both = np.where((turns == 0) | (2 * turns == self.period), 1, 2)  # and conjugates
        self.turns = turns
        self.x: Complex = np.exp(2j * np.pi * turns / self.period)

    def all(self, mean: ArrayLike) -> Complex:
        """E x^count of counts with these means, (..., X)."""
        return np.asarray(np.exp(np.multiply.outer(mean, self.x - 1)))

    def below(self, means: Float, least: int) -> Complex:
        """E [x^count; count < least] of each mean, (S, X)."""
        counts = np.arange(least)
        distinct, inverse = np.unique(means, return_inverse=True)
        chances = poisson.pmf(counts, distinct[:, None])
        return np.asarray((chances @ self.power(counts))[inverse])

    def power(self, exponent: ArrayLike) -> Complex:
        """x^exponent, (..., X): turns are whole numbers, so that nothing drifts."""
        turned = np.multiply.outer(exponent, self.turns) % self.period
        return np.asarray(np.exp(2j * np.pi / self.period * turned))

    def total(self, series: Complex) -> Float:
        """The chance, given n samples in all, that each of some series (..., X) stands for."""
        read = self.both * self.power(-self.n)
        whole = float((read * self.all(self.n)).real.sum())
        return np.asarray((read * series).real.sum(axis=-1) / whole)


def _best_of_frequent(p: Float, worth: Float, thought: Float, n: int, k: int, least: int) -> float:
    """E[the best worth of the k best thought of that come `least` times; some come so often].

    Answers pass from the best thought of down, c that are alike at once. State j of level v: j
    answers were submitted, none worth v or more; what has k submitted is done.
    """
    alike, c = np.unique(np.stack([-thought, p, worth]), axis=1, return_counts=True)
    p, worth = alike[1:]
    series = _Series(p, n)
    rare = series.below(series.means, least)
    after = n * np.maximum(1 - np.cumsum(c * p), 0.0)
    levels = np.unique(worth)[::-1]
    state = np.zeros((len(levels), k, len(series.x)), complex)
    state[:, 0] = 1.0
    done = np.zeros((len(levels), len(series.x)), complex)
    for i in range(len(p)):
        often = series.all(series.means[i]) - rare[i]
        come = [comb(c[i], t) * often**t * rare[i] ** max(c[i] - t, 0) for t in range(k)]
        lower, rest = worth[i] < levels, series.all(after[i])
        every = series.all(c[i] * series.means[i])
        moved = state * come[0]
        for j in range(k):
            for t in range(1, j + 1):
                moved[lower, j] += state[lower, j - t] * come[t]
            done[lower] += rest * state[lower, j] * (every - sum(come[: k - j]))
        state = moved
    none = state[:, 0]  # the same at every level: nothing came so often
    miss = series.total(done + state[:, 1:].sum(axis=1))
    some = 1 - series.total(none)
    reached = some - miss  # the chance of worth at level v or more
    steps = -np.diff(levels, append=0.0)
    return float(reached @ steps)


def _most_frequent(p: Float, worth: Float, n: int, most: int) -> float:
    """E[worth of the most frequent answer; it comes at most `most` times], ties by lot.

    With t others at the same count the share is 1/(t+1) = ∫_0^1 y^t dy.
    """
    share, group, members = np.unique(p, return_inverse=True, return_counts=True)
    total = np.bincount(group, worth)
    series = _Series(share, n)
    pmf = poisson.pmf(np.arange(min(most, n) + 1)[:, None], series.means)
    with np.errstate(divide="ignore"):  # the log of the chance that no answer comes more often
        unbeaten = np.log(np.minimum(np.cumsum(pmf, axis=0), 1.0)) @ members
    fewer = np.zeros((len(share), len(series.x)), complex)
    found = np.zeros(len(series.x), complex)
    for c in range(1, len(pmf)):
        if pmf[c - 1].max() > NEGLIGIBLE:
            fewer += np.outer(pmf[c - 1], series.power(c - 1))
        winners = np.flatnonzero((pmf[c] > NEGLIGIBLE) & (total != 0))
        if unbeaten[c] < math.log(NEGLIGIBLE) or not winners.size:
            continue
        tie = np.outer(pmf[c], series.power(c))
        x, mass = np.polynomial.legendre.leggauss((min(n // c, len(p)) + 1) // 2 + 1)
        factor = fewer[:, None] + ((x + 1) / 2)[:, None] * tie[:, None]  # (group, y, x)
        for g in winners:
            powers = members - (np.arange(len(share)) == g)
            others = np.prod(factor ** powers[:, None, None], axis=0)
            found += total[g] * tie[g] * (mass / 2 @ others)
    return float(series.total(found))


# ── guarantees ──────────────────────────────────────────────────────────────────────────────────


def coverage_coefficient(pi: ArrayLike, r_true: ArrayLike) -> float:
    """C* = 1/π(y*), of the best answer (of several the most probable): at least 1.

    Di et al. 2025, arXiv 2510.03199: E_{π*}[π*/π] with all of π* on y*.

    >>> coverage_coefficient([0.5, 0.25, 0.25], [0.1, 0.9, 0.2])
    4.0
    """
    p, worth, _ = _instance(pi, r_true, r_true)
    return float(1 / p[worth == worth.max()].max())


def reward_errors(pi: ArrayLike, r_true: ArrayLike, r_hat: ArrayLike) -> tuple[float, float]:
    """ε_RM² = Σ π (r* - r̂)², and ε_opt = |r*(y*) - r̂(y*)| with y* as in `coverage_coefficient`.

    >>> squared, at_best = reward_errors([0.5, 0.5], [0.0, 1.0], [0.25, 1.0])
    >>> squared, at_best
    (0.03125, 0.0)
    """
    p, worth, thought = _instance(pi, r_true, r_hat)
    best = np.argmax(np.where(worth == worth.max(), p, -1.0))
    return float(p @ (worth - thought) ** 2), float(abs(worth[best] - thought[best]))


@dataclass(frozen=True)
class RegretBounds:
    """What is guaranteed about the regret with N samples and k answers, rewards in [0, 1].

    bom: never exceeded with α = 3/(4 C*). bom_tail: its last term, the chance that the wrong
    answers survive. The rest are rates, to be multiplied by constants that the paper leaves open:
    lower, of any method; bon, of best-of-n for N > C*. bom_samples: from so many on bom_tail does
    not matter; majority_samples: from so many on the majority vote may fail, rewards being perfect.
    """

    bom: float
    bom_tail: float
    lower: float
    bon: float
    bom_samples: float
    majority_samples: float


def regret_bounds(
    coverage: float, squared_error: float, error_at_best: float, n: int, k: int = 1
) -> RegretBounds:
    """The guarantees of best-of-majority, for coverage C*, ε_RM², ε_opt, N samples and k answers.

        bom   ε_opt + 2 √(C* ε_RM² / k) + e^{-N/(32 C*)} + 4 C* e^{-(3 log 3 - 2) N/(4 C*)}
        lower ε_opt + √(C* ε_RM² / k)          bon   min{1, √(N ε_RM² / k)}

    If y* survives and is not submitted, the k that are have r̂ ≥ r̂(y*), so that the regret is at
    most ε_opt + min_i |r* - r̂|(ŷ_i) ≤ ε_opt + √(ε_RM²/(a k)), a the least of their π. The first
    exponential bounds the chance that y* does not survive, the second that a < 1/(4 C*): both are
    Chernoff's, the second summed over answers, whose chance per π is largest at 1/(4 C*) (N ≥ 2 C*;
    below, the bound exceeds 1). bom_samples is 16 C* log(k C*/ε_RM²), majority_samples
    9 C* log(2k + 2).
    Raises InputError for C* < 1, negative errors, n or k < 1.

    Di et al. 2025, arXiv 2510.03199, theorems on upper and lower bounds.

    >>> bounds = regret_bounds(5, 0.01215, 0.0, 1000)
    >>> round(bounds.bom, 3), round(bounds.lower, 3), round(bounds.bon, 3)
    (0.495, 0.246, 1.0)
    """
    fine = 1 <= coverage < np.inf
    require(fine, "coverage", coverage, "a finite number of at least 1: one over a probability")
    for name, value in (("squared_error", squared_error), ("error_at_best", error_at_best)):
        require(0 <= value < np.inf, name, value, "a finite number of at least 0")
    check_k(n, name="n")
    check_k(k)
    root = math.sqrt(coverage * squared_error / k)
    lost = math.exp(-n / (32 * coverage))
    tail = lost + 4 * coverage * math.exp(-(3 * math.log(3) - 2) * n / (4 * coverage))
    enough = math.inf if squared_error == 0 else math.log(k * coverage / squared_error)
    return RegretBounds(
        error_at_best + 2 * root + min(tail, 1.0),
        min(tail, 1.0),
        error_at_best + root,
        min(1.0, math.sqrt(n * squared_error / k)),
        16 * coverage * max(enough, 0.0),
        9 * coverage * math.log(2 * k + 2),
    )


def survival_chance(pi: ArrayLike, n: int, coverage: float) -> float:
    """The chance of {π ≥ 1/C*} ⊂ Ŷ_α ⊂ {π ≥ 1/(4 C*)} with α = 3/(4 C*) and n samples, exactly.

    The event on which the guarantee of best-of-majority rests. O(S √n + S n α).

    >>> round(survival_chance([0.5, 0.5], 1, 2.0), 12), survival_chance([0.5, 0.5], 400, 2.0) > 0.99
    (0.0, True)
    """
    p, _, _ = _instance(pi, np.zeros(len(np.atleast_1d(pi))), np.zeros(len(np.atleast_1d(pi))))
    check_k(n, name="n")
    series = _Series(p, n)
    rare = series.below(series.means, _least_count(n, bom_threshold(coverage)))
    full = series.all(series.means)
    must, may = p >= 1 / coverage - SLACK, p >= 1 / (4 * coverage) - SLACK
    each = np.where(must[:, None], full - rare, np.where(may[:, None], full, rare))
    return float(series.total(np.prod(each, axis=0)))
