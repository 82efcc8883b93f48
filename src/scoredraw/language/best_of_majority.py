"""Choosing by an imperfect reward among the answers that came often enough, and its rivals.

Best-of-n falls for the rare answer that the reward model likes by mistake: with more samples there
are more of those. The majority vote does not look at the reward at all. Best-of-majority (BoM)

    1.  π̂(y) = #{i : y_i = y} / N              null answers are in N, and never survive
    2.  Ŷ_α = {y : π̂(y) ≥ α}
    3.  submit the k answers of Ŷ_α with the highest reward r̂(y)

so that only answers with a frequency of at least α need a reward. If Ŷ_α is empty, one answer is
submitted, the most frequent. The theory takes α = 3/(4 C*), where C* = 1/π(y*) and y* is the best
answer. α = 0 is best-of-n over different answers, a large α the majority vote.

Beside it: majority-of-the-bests (MoB), the answer that best-of-m would choose most often from m of
the samples drawn with replacement; with the j-th best of n samples weighing

    ((n - j + 1)/n)^m - ((n - j)/n)^m

it is a weighted vote. And soft best-of-n, which submits in proportion to exp(β reward).

Di, Ji, Li, Zhao and Gu, "Best-of-Majority: minimax-optimal strategy for pass@k inference scaling",
ICLR 2026, arXiv 2510.03199 (no official code; "auto", means over samples, ties and the fallback are
ours). Rakhsha et al., "Majority of the bests", 2025, arXiv 2511.18630.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import NULL, AnswerPool, Equal, Key, count_votes, whole_numbers
from scoredraw.errors import InputError, require
from scoredraw.language.selection import ROUNDING, submit_by_vote
from scoredraw.language.selection_curves import in_batches
from scoredraw.language.submission import (
    AGGREGATES,
    TopK,
    answer_rewards,
    check_k,
    check_rows,
    mob_weights,
    of_answer,
    soft_in_rows,
    submit_by_standing,
    submit_in_rows,
)

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Reward = Callable[..., Any]

IN_ROWS = ("majority", "bon", "weighted", "bom", "mob")
AUTO_COUNT, AUTO_SHARE = 2, 0.01  # seen at least twice, and by one sample in a hundred
SLACK = 1e-12  # so that α = m/N keeps a count of m


# ── the threshold ───────────────────────────────────────────────────────────────────────────────


def bom_threshold(coverage: float) -> float:
    """The α of the theory, 3 / (4 C*), for a coverage coefficient C* = 1/π(y*) ≥ 1.

    With N samples, N large against C*, every answer with π ≥ 1/C* then survives, and none with
    π < 1/(4 C*). Raises InputError for C* < 1. Di et al. 2025, theorem 5.1.

    >>> bom_threshold(10)
    0.075
    """
    fine = 1 <= coverage < np.inf
    require(fine, "coverage", coverage, "a finite number of at least 1: one over a probability")
    return 3 / (4 * coverage)


def survival_threshold(
    n: int | Int, alpha: float | str = "auto", min_count: int | None = None
) -> Any:
    """The α that is meant, for n samples: "auto" is min(1, max(2/n, 0.01)), min_count m is m/n.

    Raises InputError for α outside [0, 1], m < 1, and for both.

    >>> survival_threshold(32), survival_threshold(500), survival_threshold(40, min_count=3)
    (0.0625, 0.01, 0.075)
    """
    if min_count is not None:
        require(alpha == "auto", "min_count", f"{min_count} and alpha {alpha}", "one of the two")
        m = int(whole_numbers(min_count, "min_count"))
        require(m >= 1, "min_count", m, "at least 1")
        return m / n
    if isinstance(alpha, str):
        require(alpha == "auto", "alpha", repr(alpha), "auto or a share in [0, 1]")
        share = np.minimum(1.0, np.maximum(AUTO_COUNT / n, AUTO_SHARE))
        return float(share) if np.ndim(n) == 0 else share
    require(0 <= alpha <= 1, "alpha", alpha, "auto or a share in [0, 1]")
    return alpha


def surviving(counts: Float | Int, n: Any, alpha: Any) -> Bool:
    """Which answers are in Ŷ_α: counts (..., G), and n and α that broadcast to it.

    >>> surviving(np.array([3.0, 1.0, 0.0]), 10, 0.3).tolist()
    [True, False, False]
    """
    return np.asarray((counts > 0) & (counts / n >= np.asarray(alpha) - SLACK))


# ── one problem, rewards asked for survivors only ───────────────────────────────────────────────


def best_of_majority(
    answers: Sequence[Any] | NDArray[Any] | AnswerPool,
    rewards: ArrayLike | Reward | None = None,
    k: int = 1,
    alpha: float | str = "auto",
    *,
    min_count: int | None = None,
    aggregate: str = "mean",
    batched: bool = False,
    texts: Sequence[str] | None = None,
    equal: Equal | None = None,
    key: Key | None = None,
    pad: str | None = None,
) -> TopK:
    """Up to k of the answers with a frequency of at least α, by reward: formula at the head.

    answers: (N,), None where none was read; or a pool, whose rewards are the default.
    rewards: (N,), of samples (only those of surviving answers are looked at); or a function, asked
    once for each surviving answer: an answer (its first sample's text where there are `texts`)
    -> a number. batched: the function is asked once, for all survivors together, and gives a list,
    as TRL's reward functions do (by the name `completions`, where it has such an argument).
    alpha: a share in [0, 1] or "auto" (see `survival_threshold`); min_count: m instead, α = m/N.
    aggregate: what an answer's reward is, "mean" of its samples (noise of samples averages out),
    "max" (as in best-of-n; it grows) or "first". Ties: see `submission`.
    Nothing survives: one answer, the most frequent (the first of those that tie), whatever k, and
    `fallback` is set; nothing there at all: an empty result. pad: "frequency" fills up to k.
    equal, key: see `answers.group_answers`; answers that are not hashable need one.
    Raises InputError for no samples, k < 1, α outside [0, 1], α and min_count, lengths that don't
    match, a NaN or infinite reward of a survivor.

    Di et al. 2025, arXiv 2510.03199, algorithm 3. O(N + G log G) time, at most 1/α rewards.

    >>> answers = ["7", "12", "7", "9", "12", "7"]
    >>> best_of_majority(answers, [0.2, 0.5, 0.1, 0.9, 0.6, 0.3]).answers
    ('12',)
    >>> found = best_of_majority(answers, lambda answer: -len(answer), k=3)
    >>> found.answers, found.rewards.tolist(), found.survivors, found.note
    (('7', '12'), [-1.0, -2.0], 2, '2 of 3 answers')
    """
    check_k(k, pad)
    require(aggregate in AGGREGATES, "aggregate", repr(aggregate), f"one of {AGGREGATES}")
    if isinstance(answers, AnswerPool):
        pool = answers
    else:
        pool = AnswerPool.of(answers, texts=texts, equal=equal, key=key)
    if rewards is None:
        rewards = pool.scores("rewards")
    threshold = survival_threshold(pool.n, alpha, min_count)
    counts = count_votes(pool.codes)
    survives = surviving(counts, pool.n, threshold)
    of_sample = np.append(survives, False)[pool.codes]
    if callable(rewards):
        value = _ask(rewards, pool, np.flatnonzero(survives), batched)
        each = np.append(value, 0.0)[pool.codes]
    else:
        require(not batched, "batched", "an array of rewards", "a function, to ask for all at once")
        each = _given(rewards, pool.n, of_sample)
        if aggregate != "max":  # else each answer is known by its best sample
            value = answer_rewards(pool.codes[None], each[None], aggregate)[0]
            each = np.append(value, 0.0)[pool.codes]
    if not survives.any():
        standing = np.append(counts, -np.inf)[pool.codes]
        return submit_by_standing(pool, standing, k, pad, unranked=True)
    return submit_by_standing(pool, np.where(of_sample, each, -np.inf), k, pad)


def _given(rewards: Any, n: int, of_survivor: Bool) -> Float:
    """Rewards (n,), 0 where nobody looks; InputError for a survivor's that is not finite."""
    given = np.asarray(rewards, np.float64)
    require(given.shape == (n,), "rewards", f"shape {given.shape}", f"({n},), one for each answer")
    wrong = np.flatnonzero(of_survivor & ~np.isfinite(given))
    if wrong.size:
        came = f"{given[wrong[0]]} at index {wrong[0]}"
        raise InputError(f"rewards: got {came}, want finite numbers for answers that survive")
    return np.where(of_survivor, given, 0.0)


def _ask(reward: Reward, pool: AnswerPool, survivors: Int, batched: bool) -> Float:
    """The reward of each answer, (G,), NaN for those that were not asked about."""
    if pool.texts is not None:
        code, first = np.unique(pool.codes, return_index=True)
        asked = [pool.texts[i] for i in first[np.isin(code, survivors)]]
    elif pool.answers is not None:
        asked = [pool.answers[code] for code in survivors]
    else:
        raise InputError("rewards: got a function and a pool of codes, want texts or answers")
    if not asked:
        found: Any = []
    elif batched:
        found = list(_call_batched(reward, asked))
    else:
        found = [reward(each) for each in asked]
    require(len(found) == len(asked), "rewards", f"{len(found)} values", f"{len(asked)} from it")
    try:
        numbers = np.array([float(each) for each in found], np.float64)
    except (TypeError, ValueError):
        raise InputError("rewards: got what is not a number, want numbers from it") from None
    fine = bool(np.isfinite(numbers).all())
    require(fine, "rewards", "NaN or infinity from it", "finite numbers for answers that survive")
    values = np.full(pool.groups, np.nan)
    values[survivors] = numbers
    return values


def _call_batched(reward: Reward, asked: list[Any]) -> Any:
    try:
        named = "completions" in inspect.signature(reward).parameters
    except ValueError:  # a builtin without a signature
        named = False
    return reward(completions=asked) if named else reward(asked)


# ── many sets of samples ────────────────────────────────────────────────────────────────────────


def _decide(counts: Float, rewards: Float, threshold: Any, sizes: Any) -> tuple[Float, Bool]:
    """How each answer stands (S, G), and which rows had to fall back (S,): there by its count."""
    live = surviving(counts, np.reshape(sizes, (-1, 1)), np.reshape(threshold, (-1, 1)))
    empty = np.asarray(~live.any(axis=1))
    by_count = np.where(empty[:, None] & (counts > 0), counts, -np.inf)
    return np.where(live, rewards, by_count), empty


def bom_in_rows(
    codes: ArrayLike,
    rewards: ArrayLike,
    alpha: float | str = "auto",
    *,
    min_count: int | None = None,
    aggregate: str = "mean",
    sizes: ArrayLike | None = None,
) -> Float:
    """The choice of one sample in each of S sets, of one problem or many: float64 (S, n).

    codes: int (S, n), numbered within the row, -1 for null and to fill up short rows; rewards:
    float (S, n). sizes: int (S,), N of each row where it is not n. Ties share, after the tie rule
    of frequency; so do the samples of an answer. Options and errors as `best_of_majority`.
    O(S (n + G)) time and memory: a million samples in about 0.1 s.

    >>> bom_in_rows([[0, 1, 0, 1, 2]], [[0.2, 0.4, 0.2, 0.5, 0.9]]).tolist()
    [[0.0, 0.5, 0.0, 0.5, 0.0]]
    """
    code, reward = check_rows(codes, rewards)
    size = _sizes(sizes, code)
    threshold = survival_threshold(size, alpha, min_count)
    counts = count_votes(code)
    value, _ = _decide(counts, answer_rewards(code, reward, aggregate), threshold, size)
    winners = _best(value, counts)
    shares = winners / np.maximum(winners.sum(axis=1, keepdims=True), 1)
    return of_answer(shares / np.maximum(counts, 1), code)


def submit_bom_in_rows(
    codes: ArrayLike,
    rewards: ArrayLike,
    k: int = 1,
    alpha: float | str = "auto",
    *,
    min_count: int | None = None,
    aggregate: str = "mean",
    pad: str | None = None,
    sizes: ArrayLike | None = None,
) -> Int:
    """The samples that `best_of_majority` submits in each of S sets, int64 (S, k), -1 for none.

    Arguments as `bom_in_rows`. O(S (n + G log G)).

    >>> submit_bom_in_rows([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]], np.ones((2, 5)), 2).tolist()
    [[0, 1], [0, -1]]
    """
    code, reward = check_rows(codes, rewards)
    size = _sizes(sizes, code)
    threshold = survival_threshold(size, alpha, min_count)
    each = answer_rewards(code, reward, aggregate)
    value, empty = _decide(count_votes(code), each, threshold, size)
    standing = np.where(code == NULL, -np.inf, of_answer(value, code))
    return submit_in_rows(code, standing, k, pad=pad, most=np.where(empty, 1, max(k, 1)))


def submit_one_in_rows(
    codes: ArrayLike,
    rewards: ArrayLike,
    methods: Sequence[str] = IN_ROWS,
    *,
    alpha: float | str = "auto",
    min_count: int | None = None,
    m: int | None = None,
    sizes: ArrayLike | None = None,
) -> dict[str, Int]:
    """The sample that each of some methods submits in each of S sets: name -> int64 (S,), or -1.

    methods: any of "majority", "bon", "weighted", "bom", "mob"; the answers are counted once for
    all. "bon" gives its best sample, the others the first of their answer; ties go to the more
    frequent answer, then to the first. "bom" takes means. Other arguments and errors as
    `bom_in_rows` and `mob_weights`. A million samples by all five in about 0.1 s.

    >>> found = submit_one_in_rows([[0, 1, 0, 1, 2]], [[0.2, 0.4, 0.2, 0.5, 0.9]])
    >>> {name: int(sample[0]) for name, sample in found.items()}
    {'majority': 0, 'bon': 4, 'weighted': 1, 'bom': 1, 'mob': 1}
    """
    unknown = [name for name in methods if name not in IN_ROWS]
    require(not unknown, "methods", unknown, f"some of {', '.join(IN_ROWS)}")
    code, reward = check_rows(codes, rewards)
    size = _sizes(sizes, code)
    rows, groups = len(code), int(code.max(initial=NULL)) + 1
    # nulls are counted in a column of their own, which is then left out
    cells = (code + 1 + (groups + 1) * np.arange(rows)[:, None]).reshape(-1)

    def total(weights: Float | None) -> Float:
        each = None if weights is None else weights.reshape(-1)
        sums = np.bincount(cells, each, rows * (groups + 1)).astype(np.float64)
        return sums.reshape(rows, groups + 1)[:, 1:]

    counts = total(None)
    first = np.full(rows * (groups + 1), code.shape[1])
    first[cells[::-1]] = np.arange(code.size)[::-1] % code.shape[1]  # the first is written last
    first = first.reshape(rows, groups + 1)[:, 1:]
    out: dict[str, Int] = {}
    for name in methods:
        if name == "bon":
            out[name] = _best_sample(code, reward)
            continue
        if name == "bom":
            threshold = survival_threshold(size, alpha, min_count)
            value, _ = _decide(counts, total(reward) / np.maximum(counts, 1), threshold, size)
        elif name == "majority":
            value = counts
        else:
            value = total(reward if name == "weighted" else mob_weights(code, reward, m))
        out[name] = _first_of_best(np.where(counts > 0, value, -np.inf), counts, first)
    return out


def _best_sample(code: Int, reward: Float) -> Int:
    """The sample of the highest reward in each row; where samples tie, as their answers rank."""
    value = np.where(code == NULL, -np.inf, reward)
    top = value.max(axis=1, keepdims=True)
    best = (value == top) & (top > -np.inf)
    sample = np.where(best.any(axis=1), best.argmax(axis=1), -1)
    tied = best.sum(axis=1) > 1
    sample[tied] = submit_in_rows(code[tied], value[tied])[:, 0]
    return sample


def _first_of_best(value: Float, counts: Float, first: Int) -> Int:
    """The first sample of the answer of the highest value, then count, then the first; or -1."""
    winners = _best(value, counts)
    beyond = np.iinfo(np.int64).max
    sample = np.where(winners, first, beyond).min(axis=1, initial=beyond)
    return np.where(sample < beyond, sample, -1)


def _best(value: Float, counts: Float) -> Bool:
    """Which answers have the highest value, and of these the highest count."""
    size = np.where(value > -np.inf, np.abs(value), 0.0).max(axis=1, keepdims=True, initial=0.0)
    top = value.max(axis=1, keepdims=True, initial=-np.inf)
    count = np.where((value >= top - ROUNDING * size) & (value > -np.inf), counts, 0)
    return np.asarray((count > 0) & (count == count.max(axis=1, keepdims=True, initial=0)))


def _sizes(sizes: ArrayLike | None, codes: Int) -> Int:
    if sizes is None:
        return np.full(len(codes), codes.shape[1])
    size = whole_numbers(sizes, "sizes")
    enough = size.shape == (len(codes),) and bool((size >= (codes != NULL).sum(axis=1)).all())
    require(enough and bool((size >= 1).all()), "sizes", size, "the samples of each row")
    return size


# ── the selector and the standing ───────────────────────────────────────────────────────────────


def _bom_of_subsets(pool: AnswerPool, subsets: Int) -> Float:
    return bom_in_rows(pool.codes[subsets], _rewards(pool)[subsets])


@in_batches(_bom_of_subsets)
def best_of_majority_choice(
    pool: AnswerPool,
    *,
    alpha: float | str = "auto",
    min_count: int | None = None,
    aggregate: str = "mean",
) -> Float:
    """The best-rewarded of the answers that came often enough, ties shared: a selector, (n,).

    Needs `rewards`. Options and errors as `best_of_majority`, whose k = 1 this is; where nothing
    survives the majority vote. O(n).

    >>> pool = AnswerPool.of(list("aabbc"), rewards=[0.2, 0.2, 0.4, 0.5, 0.9])
    >>> best_of_majority_choice(pool).tolist()
    [0.0, 0.0, 0.5, 0.5, 0.0]
    """
    options: dict[str, Any] = {"min_count": min_count, "aggregate": aggregate}
    return bom_in_rows(pool.codes[None], _rewards(pool)[None], alpha, **options)[0]


def best_of_majority_standing(
    pool: AnswerPool,
    *,
    alpha: float | str = "auto",
    min_count: int | None = None,
    aggregate: str = "mean",
) -> Float:
    """How each sample stands with best-of-majority, float64 (n,): its answer's reward.

    -inf for answers that don't survive. Where none does, the first of the most frequent alone
    stands, at 0. Needs `rewards`; options as `best_of_majority`.

    >>> pool = AnswerPool.of(list("aabbc"), rewards=[0.25, 0.25, 0.5, 0.5, 0.9])
    >>> best_of_majority_standing(pool).tolist()
    [0.25, 0.25, 0.5, 0.5, -inf]
    """
    threshold = survival_threshold(pool.n, alpha, min_count)
    codes = pool.codes[None]
    each = answer_rewards(codes, _rewards(pool)[None], aggregate)
    value, empty = _decide(count_votes(codes), each, threshold, pool.n)
    if empty[0]:
        first = submit_in_rows(codes, of_answer(value, codes))[0, 0]
        chosen = pool.codes[first] if first >= 0 else NULL
        return np.where(~pool.null & (pool.codes == chosen), 0.0, -np.inf)
    return np.where(pool.null, -np.inf, of_answer(value, codes)[0])


def _rewards(pool: AnswerPool) -> Float:
    return np.where(pool.null, 0.0, pool.scores("rewards"))


# ── majority of the bests, soft best-of-n ───────────────────────────────────────────────────────


def _mob_of_subsets(pool: AnswerPool, subsets: Int) -> Float:
    codes = pool.codes[subsets]
    return submit_by_vote(codes, mob_weights(codes, _rewards(pool)[subsets]))


@in_batches(_mob_of_subsets)
def majority_of_the_bests(pool: AnswerPool, *, m: int | None = None) -> Float:
    """The answer that best-of-m chooses most often (MoB), ties shared: a selector, float64 (n,).

    Needs `rewards`; see `mob_weights`. Rakhsha et al. 2025, arXiv 2511.18630. O(n log n).

    >>> pool = AnswerPool.of(list("aaabbc"), rewards=[0.5, 0.55, 0.6, 0.9, 0.4, 0.3])
    >>> majority_of_the_bests(pool).round(3).tolist()
    [0.333, 0.333, 0.333, 0.0, 0.0, 0.0]
    """
    return submit_by_vote(pool.codes, mob_weights(pool.codes[None], _rewards(pool)[None], m)[0])


def majority_of_the_bests_standing(pool: AnswerPool, *, m: int | None = None) -> Float:
    """How each sample stands with MoB, float64 (n,): the chance that best-of-m gives its answer.

    >>> pool = AnswerPool.of(list("ab"), rewards=[1.0, 2.0])
    >>> majority_of_the_bests_standing(pool, m=2).tolist()
    [0.25, 0.75]
    """
    codes = pool.codes[None]
    votes = count_votes(codes, mob_weights(codes, _rewards(pool)[None], m))
    return np.where(pool.null, -np.inf, of_answer(votes, codes)[0])


def _soft_of_subsets(over: str, pool: AnswerPool, subsets: Int) -> Float:
    return soft_in_rows(pool.codes[subsets], _rewards(pool)[subsets], 1.0, over)


@in_batches(partial(_soft_of_subsets, "samples"))
def soft_best_of_n(pool: AnswerPool, *, beta: float = 1.0) -> Float:
    """Any sample in proportion to exp(β reward), of those with an answer: a selector, float64 (n,).

    Needs `rewards`. `submission.draw_softly` draws k. Raises InputError for β < 0. O(n).

    >>> soft_best_of_n(AnswerPool.of(list("aab"), rewards=np.log([1, 1, 2]))).round(6).tolist()
    [0.25, 0.25, 0.5]
    """
    return soft_in_rows(pool.codes[None], _rewards(pool)[None], beta, "samples")[0]


@in_batches(partial(_soft_of_subsets, "answers"))
def soft_best_of_answers(pool: AnswerPool, *, beta: float = 1.0) -> Float:
    """Any answer in proportion to exp(β its mean reward), shared by its samples: a selector, (n,).

    >>> pool = AnswerPool.of(list("aab"), rewards=np.log([1, 1, 2]))
    >>> soft_best_of_answers(pool).round(6).tolist()
    [0.166667, 0.166667, 0.666667]
    """
    return soft_in_rows(pool.codes[None], _rewards(pool)[None], beta, "answers")[0]
