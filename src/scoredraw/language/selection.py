"""Choosing one of many answers, and how often the choice is right when there are k to choose from.

A selector takes the pool of one problem and gives the probability with which it would submit each
of the samples, float64 (n,). Ties are settled in expectation, so the expected accuracy is simply
`choice @ correct`. The probabilities sum to 1, or to 0 where there is no answer to submit.

    uniform             any sample
    uniform_answered    any sample that has an answer
    majority_vote       a sample of the largest group
    weighted_vote       a sample of the group with the largest sum of rewards
    probability_vote    a sample of the group with the largest sum of probabilities
    best_of_n           the sample of the highest reward
    likeliest           the sample of the highest log-probability, per token or in all

Groups that tie share alike, and so do the samples of a group; null answers never win. The oracle,
which submits a right sample if there is one, is no selector but the bound of all: coverage.

How accuracy grows with k is an average over the k-subsets of the n samples. Where only ranks
decide (uniform, best of n, oracle) it is a weighted sum of sorted samples, and for the majority
vote it is a polynomial coefficient (`majority_credit`); both are exact. Only sums of scores need
the subsets themselves, all of them while there are few, else a random choice.

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import (
    NULL,
    AnswerPool,
    Equal,
    check_subset_sizes,
    count_votes,
    expected_maximum,
    split_ties,
)
from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Selector = Callable[[AnswerPool], Float]

MOST_SUBSETS = 100_000  # up to so many are enumerated
CELLS = 2_000_000  # how many cells of subsets × samples or groups are worked on at a time
ROUNDING = 1e-12  # sums of scores this close, relative to what they are made of, tie
NEGLIGIBLE = 1e-18
CLOSED, LISTED, DRAWN = "closed form", "enumeration", "Monte Carlo"


# ── selectors ───────────────────────────────────────────────────────────────────────────────────


def uniform(pool: AnswerPool) -> Float:
    """Any of the samples, null ones included: the baseline, right as often as a single sample.

    >>> uniform(AnswerPool.of(["7", None, "12", "7"])).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return np.full(pool.n, 1 / pool.n)


def uniform_answered(pool: AnswerPool) -> Float:
    """Any of the samples that have an answer: what is left to gain once the null ones are out.

    >>> uniform_answered(AnswerPool.of(["7", None, "12", None])).tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    return split_ties(np.where(pool.null, -np.inf, 0.0))


def majority_vote(pool: AnswerPool) -> Float:
    """The most frequent answer (self-consistency): argmax_y #{i : y_i = y}, ties shared.

    Wang et al. 2023, arXiv 2203.11171. O(n).

    >>> majority_vote(AnswerPool.of(["7", None, "12", "7"])).tolist()
    [0.5, 0.0, 0.0, 0.5]
    """
    return _vote(pool.codes, np.ones(pool.n))


def weighted_vote(pool: AnswerPool) -> Float:
    """The answer with the largest sum of rewards: argmax_y Σ_{i : y_i = y} r_i, ties shared.

    Needs `rewards`. Negative rewards count against their answer. O(n).

    >>> weighted_vote(AnswerPool.of(["7", "12", "7"], rewards=[0.2, 0.5, 0.2])).tolist()
    [0.0, 1.0, 0.0]
    """
    return _vote(pool.codes, pool.scores("rewards"))


def probability_vote(pool: AnswerPool, normalize: str = "mean") -> Float:
    """The answer with the largest sum of its samples' probabilities, ties shared.

    normalize: "mean" takes exp(log-probability / tokens), "sum" exp(log-probability).
    Needs `logprobs`, and `lengths` for "mean". Scaled by the most probable sample, so that nothing
    underflows that matters. Every sample counts, also where two texts are the same. O(n).

    >>> pool = AnswerPool.of(["7", "12", "7"], logprobs=[-900, -899.5, -900.2])
    >>> probability_vote(pool, "sum").tolist()
    [0.5, 0.0, 0.5]
    """
    return _vote(pool.codes, _weights(pool, f"{_checked(normalize)}_probability"))


def best_of_n(pool: AnswerPool) -> Float:
    """The sample of the highest reward, ties shared; a null answer has reward -inf.

    Needs `rewards`. O(n).

    >>> best_of_n(AnswerPool.of(["7", None, "12", "7"], rewards=[0.1, 0.9, 0.3, 0.3])).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """
    return split_ties(_weights(pool, "rewards"))


def likeliest(pool: AnswerPool, normalize: str = "mean") -> Float:
    """The sample of the highest log-probability a token ("mean") or in all ("sum"), ties shared.

    Needs `logprobs`, and `lengths` for "mean". Where all that is not null has probability 0
    there is no answer. O(n).

    >>> pool = AnswerPool.of(["7", "12"], logprobs=[-4.0, -5.0], lengths=[2, 5])
    >>> likeliest(pool).tolist(), likeliest(pool, "sum").tolist()
    ([0.0, 1.0], [1.0, 0.0])
    """
    return split_ties(_weights(pool, f"{_checked(normalize)}_logprob"))


def likeliest_in_all(pool: AnswerPool) -> Float:
    """`likeliest` by the log-probability of the whole sample.

    >>> likeliest_in_all(AnswerPool.of(["7", "12"], logprobs=[-4.0, -5.0])).tolist()
    [1.0, 0.0]
    """
    return likeliest(pool, "sum")


def total_probability_vote(pool: AnswerPool) -> Float:
    """`probability_vote` by the probabilities of whole samples.

    >>> total_probability_vote(AnswerPool.of(["7", "12"], logprobs=[-4.0, -5.0])).tolist()
    [1.0, 0.0]
    """
    return probability_vote(pool, "sum")


def _checked(normalize: str) -> str:
    require(normalize in ("mean", "sum"), "normalize", normalize, "mean or sum")
    return normalize


def _weights(pool: AnswerPool, name: str) -> Float:
    """A score of each sample by its name, -inf for null answers; probabilities are relative."""
    if not name.endswith("_probability"):
        return np.where(pool.null, -np.inf, pool.scores(name))
    score = _weights(pool, name.replace("probability", "logprob"))
    top = score.max(initial=-np.inf)
    return np.exp(score - top) if top > -np.inf else np.zeros(pool.n)


def _vote(codes: Int, weights: Float) -> Float:
    """The choice (..., n) of the groups whose weights sum highest, for codes (..., n)."""
    weights = np.where(codes == NULL, 0.0, weights)
    members = count_votes(codes)
    magnitude = count_votes(codes, np.abs(weights))
    totals = np.where(members > 0, count_votes(codes, weights), -np.inf)
    if not totals.shape[-1]:
        return np.zeros(codes.shape)
    slack = ROUNDING * (magnitude + magnitude.max(axis=-1, keepdims=True))
    each = split_ties(totals, slack) / np.maximum(members, 1)
    return np.where(codes == NULL, 0.0, np.take_along_axis(each, np.maximum(codes, 0), -1))


# ── the majority of a random k-subset ───────────────────────────────────────────────────────────


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


# ── accuracy at k ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class SelectionCurve:
    """Accuracy of a selector with k samples to choose from: mean over problems, at sizes k (K,).

    standard_error (K,): of the random subsets alone, 0 where the value is exact; how another set of
    problems would come out is a matter of `per_problem` (P, K) (resample its rows).
    how: for each k, "closed form", "enumeration" or "Monte Carlo".
    """

    k: Int
    accuracy: Float
    standard_error: Float
    how: tuple[str, ...]
    per_problem: Float
    method: str


# method -> what decides: the votes of groups or the best sample, and by which score
METHODS: dict[str, tuple[str, str]] = {
    "uniform": ("best", "equal"),
    "uniform_answered": ("best", "answered"),
    "oracle": ("best", "credit"),
    "majority": ("vote", "one"),
    "bon": ("best", "rewards"),
    "weighted": ("vote", "rewards"),
    "mean_logprob": ("best", "mean_logprob"),
    "sum_logprob": ("best", "sum_logprob"),
    "mean_probability": ("vote", "mean_probability"),
    "sum_probability": ("vote", "sum_probability"),
}


def select_at_k(
    answers: Sequence[Any] | NDArray[Any],
    rewards: Any,
    correct: Any,
    ks: ArrayLike,
    method: str | Selector = "majority",
    *,
    exact: bool = True,
    repeats: int = 100,
    rng: int | np.random.Generator | None = 0,
    logprobs: Any = None,
    lengths: Any = None,
    equal: Equal | None = None,
) -> SelectionCurve:
    """The expected accuracy of a selector on k of the n samples of each problem, for each k.

    answers: P rows of samples, which may differ in length; None or NaN is null.
    rewards: rows like them or None; correct: rows like them of credits in [0, 1] (0/1 or shares);
    a null answer earns nothing. ks: (K,), 1 ≤ k ≤ the smallest n.
    method: "uniform", "uniform_answered", "oracle", "majority", "bon", "weighted" (these two by
    rewards), "mean_logprob", "sum_logprob" (the likeliest sample), "mean_probability",
    "sum_probability" (votes), the last four by `logprobs`, of whole samples, and `lengths` in
    tokens; or a selector, a function of an `AnswerPool`.
    exact: closed forms where there are (uniform, oracle, majority and the best by any score), else
    all k-subsets while there are at most 100 000, else `repeats` random ones (in the paper always
    100), which `exact=False` forces.
    equal: an equality of answers (see `answers.group_answers`).
    Raises InputError for k > n, NaN rewards, log-probabilities above zero (naming the problem and
    the index), rows that do not match, and scores that the method needs and lacks.

    Brown et al. 2024, arXiv 2407.21787, section 4.1 and appendix D. Closed forms take O(n log n)
    a problem and O(n) a size (votes: see `majority_credit`), the others O(subsets · k).

    >>> answers = [["7", None, "12", "7"], ["3", "4", "5", "4"]]
    >>> correct = [[1, 0, 0, 1], [1, 0, 0, 0]]
    >>> curve = select_at_k(answers, None, correct, [1, 2, 4], "majority")
    >>> curve.accuracy.round(6).tolist(), set(curve.how)
    ([0.375, 0.458333, 0.5], {'closed form'})
    """
    if isinstance(method, str):
        require(method in METHODS, "method", method, f"a selector or one of {', '.join(METHODS)}")
    require(repeats >= 1, "repeats", repeats, "1 or more")
    pools, credits_ = _pools(answers, rewards, correct, logprobs, lengths, equal)
    sizes = check_subset_sizes(ks, min(pool.n for pool in pools))
    how = tuple(_how(method, max(pool.n for pool in pools), int(k), exact) for k in sizes)
    closed = np.array([way == CLOSED for way in how])
    accuracy, variance = np.zeros((2, len(pools), len(sizes)))
    random = generator(rng)
    for p, (pool, credit) in enumerate(zip(pools, credits_, strict=True)):
        rule = _rule(pool, credit, method)
        if closed.any():
            assert isinstance(method, str)
            accuracy[p, closed] = _closed_form(pool, credit, method, sizes[closed])
        for column in np.flatnonzero(~closed):
            k = int(sizes[column])
            draw = how[column] == DRAWN
            blocks = _random_subsets(pool.n, k, repeats, random) if draw else _subsets(pool.n, k)
            earned = np.concatenate([rule(block) for block in blocks])
            accuracy[p, column] = earned.mean()
            if draw:
                variance[p, column] = earned.var(ddof=1) / repeats if repeats > 1 else np.nan
    error = np.sqrt(variance.sum(axis=0)) / len(pools)
    name = method if isinstance(method, str) else getattr(method, "__name__", "selector")
    return SelectionCurve(sizes, accuracy.mean(axis=0), error, how, accuracy, name)


def _how(method: str | Selector, n: int, k: int, exact: bool) -> str:
    if not exact:
        return DRAWN
    if isinstance(method, str) and (METHODS[method][0] == "best" or method == "majority"):
        return CLOSED
    return LISTED if math.comb(n, k) <= MOST_SUBSETS else DRAWN


def _pools(
    answers: Any, rewards: Any, correct: Any, logprobs: Any, lengths: Any, equal: Equal | None
) -> tuple[list[AnswerPool], list[Float]]:
    """The pool of each problem, and the credits of its samples."""
    require(len(answers) > 0, "answers", "no problems", "one or more")
    given = {"rewards": rewards, "correct": correct, "logprobs": logprobs, "lengths": lengths}
    for name, rows in given.items():
        if rows is not None and len(rows) != len(answers):
            raise InputError(f"{name}: got {len(rows)} rows, want {len(answers)}, one a problem")
    pools, credits_ = [], []
    for p, row in enumerate(answers):
        known = {name: None if rows is None else rows[p] for name, rows in given.items()}
        credit = known.pop("correct")
        try:
            pool = AnswerPool.of(row, **known, equal=equal)
            credits_.append(_credit(pool, credit))
        except InputError as error:
            raise InputError(f"problem {p}: {error}") from None
        pools.append(pool)
    return pools, credits_


def _credit(pool: AnswerPool, correct: Any) -> Float:
    credit = np.asarray(correct, np.float64)
    require(credit.shape == (pool.n,), "correct", f"shape {credit.shape}", f"({pool.n},)")
    require(bool(((credit >= 0) & (credit <= 1)).all()), "correct", "others", "credits in [0, 1]")
    return np.where(pool.null, 0.0, credit)


def _samples_scores(pool: AnswerPool, credit: Float, score: str) -> Float:
    if score == "credit":
        return credit
    if score in ("equal", "one"):
        return np.ones(pool.n)
    if score == "answered":
        return np.where(pool.null, -np.inf, 0.0)
    return _weights(pool, score)


def _closed_form(pool: AnswerPool, credit: Float, method: str, ks: Int) -> Float:
    kind, score = METHODS[method]
    if kind == "vote":
        return majority_credit(pool, credit, ks)
    scores = _samples_scores(pool, credit, score)
    return expected_maximum(scores, ks, np.where(scores > -np.inf, credit, 0.0))


def _rule(pool: AnswerPool, credit: Float, method: str | Selector) -> Callable[[Int], Float]:
    """What each of some subsets of the samples, int64 (S, k), earns: float64 (S,)."""
    if not isinstance(method, str):
        return partial(_earned_by_selector, pool, credit, method)
    kind, score = METHODS[method]
    scores = _samples_scores(pool, credit, score)

    def earned(subsets: Int) -> Float:
        if kind == "vote":
            choice = _vote(pool.codes[subsets], scores[subsets])
        else:
            choice = split_ties(scores[subsets])
        return np.asarray((choice * credit[subsets]).sum(axis=1))

    return earned


def _earned_by_selector(
    pool: AnswerPool, credit: Float, selector: Selector, subsets: Int
) -> Float:
    return np.array([selector(pool.take(subset)) @ credit[subset] for subset in subsets])


def _subsets(n: int, k: int) -> Iterator[Int]:
    """All k-subsets of range(n), in blocks int64 (S, k)."""
    every = combinations(range(n), k)
    block = max(1, CELLS // max(n, k))
    while chunk := list(islice(every, block)):
        yield np.fromiter(chain.from_iterable(chunk), np.int64, len(chunk) * k).reshape(-1, k)


def _random_subsets(n: int, k: int, repeats: int, random: np.random.Generator) -> Iterator[Int]:
    """Uniform k-subsets of range(n), independent of one another, in blocks int64 (S, k)."""
    block = max(1, CELLS // n)
    for start in range(0, repeats, block):
        keys = random.random((min(block, repeats - start), n))
        yield np.argpartition(keys, k - 1, axis=1)[:, :k]
