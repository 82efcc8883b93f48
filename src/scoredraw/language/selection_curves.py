"""How often the choice among k sampled answers is right, as k grows.

Accuracy with k samples is an average over the k-subsets of the n at hand. Where only ranks decide
(uniform, best of n, oracle) it is a weighted sum of sorted samples, and for the majority vote it is
a polynomial coefficient (`majority_at_k.majority_credit`); both are exact. Only sums of scores, and
selectors of other kinds, need the subsets themselves: all of them while there are few, else a
random choice.

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
    AnswerPool,
    Equal,
    check_subset_sizes,
    expected_maximum,
    split_ties,
)
from scoredraw.errors import InputError, require
from scoredraw.language.majority_at_k import majority_credit
from scoredraw.language.selection import METHODS, Selector, sample_scores, submit_by_vote
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
OfSubsets = Callable[[AnswerPool, Int], Float]

MOST_SUBSETS = 100_000  # up to so many are enumerated
CELLS = 2_000_000  # how many cells of subsets × samples or groups are worked on at a time
CLOSED, LISTED, DRAWN = "closed form", "enumeration", "Monte Carlo"


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
    return accuracy_at_k(pools, credits_, ks, method, exact=exact, repeats=repeats, rng=rng)


def accuracy_at_k(
    pools: Sequence[AnswerPool],
    credits_: Sequence[Float],
    ks: ArrayLike,
    method: str | Selector = "majority",
    *,
    exact: bool = True,
    repeats: int = 100,
    rng: int | np.random.Generator | None = 0,
) -> SelectionCurve:
    """`select_at_k` of pools of answers with the credit of each sample, float64 (n,) in [0, 1].

    A selector whose attribute `of_subsets(pool, subsets (S, k)) -> choices (S, k)` is set (see
    `in_batches`) is asked for many subsets at once.
    """
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


def _closed_form(pool: AnswerPool, credit: Float, method: str, ks: Int) -> Float:
    kind, score = METHODS[method]
    if kind == "vote":
        return majority_credit(pool, credit, ks)
    scores = sample_scores(pool, credit, score)
    return expected_maximum(scores, ks, np.where(scores > -np.inf, credit, 0.0))


def _rule(pool: AnswerPool, credit: Float, method: str | Selector) -> Callable[[Int], Float]:
    """What each of some subsets of the samples, int64 (S, k), earns: float64 (S,)."""
    if not isinstance(method, str):
        return partial(_earned_by_selector, pool, credit, method)
    kind, score = METHODS[method]
    scores = sample_scores(pool, credit, score)

    def earned(subsets: Int) -> Float:
        if kind == "vote":
            choice = submit_by_vote(pool.codes[subsets], scores[subsets])
        else:
            choice = split_ties(scores[subsets])
        return np.asarray((choice * credit[subsets]).sum(axis=1))

    return earned


def in_batches(of_subsets: OfSubsets) -> Callable[[Selector], Selector]:
    """Tell a selector how it chooses in many subsets at once: int64 (S, k) -> float64 (S, k)."""

    def told(selector: Selector) -> Selector:
        selector.of_subsets = of_subsets  # type: ignore[attr-defined]
        return selector

    return told


def _earned_by_selector(pool: AnswerPool, credit: Float, selector: Selector, subsets: Int) -> Float:
    of_subsets: OfSubsets | None = getattr(selector, "of_subsets", None)
    if of_subsets is not None:
        return np.asarray((of_subsets(pool, subsets) * credit[subsets]).sum(axis=1))
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
