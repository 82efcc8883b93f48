"""Submitting k different answers: the best by any method's standing, ranked.

A method says how each sample stands; an answer stands as its best sample does. Answers are ranked

    by standing, then by frequency, then by first occurrence

and the first k are submitted. So what is submitted for k is the beginning of what is submitted for
k + 1. An answer that could not be read, or that stands at -inf, is never submitted: there may be
fewer than k. `pad="frequency"` then goes on with the most frequent of the others. Standings tie
that differ by rounding only.

Soft best-of-n draws its k samples by lot, with chances proportional to exp(β reward) and without
replacement: keys β reward + Gumbel noise race, and the k largest are drawn. β = 0 is a uniform
draw, β → ∞ best-of-n.

Di, Ji, Li, Zhao and Gu, "Best-of-Majority: minimax-optimal strategy for pass@k inference scaling",
ICLR 2026, arXiv 2510.03199 (submitting k answers; no official code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import NULL, AnswerPool, count_votes
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.language.selection import METHODS, ROUNDING, standing
from scoredraw.uniforms import Rng, RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Standing = Callable[[AnswerPool], Float]

AGGREGATES = ("mean", "max", "first")
AT_RANDOM = ("uniform", "uniform_answered")
LEAST = np.finfo(np.float64).tiny


@dataclass(frozen=True, eq=False)
class TopK:
    """Up to k different answers to one problem, best first.

    answers: the m ≤ k answers. indices: int64 (m,), a sample that gives each: its best by standing,
    the first of those that tie. rewards: float64 (m,), what they were ranked by; NaN for an answer
    that was submitted without (padding, fallback). frequencies: float64 (m,), shares of all n
    samples. survivors: how many different answers could have been submitted. fallback: nothing
    survived, so what is here (if anything) was not ranked. padded: how many fill up the k.
    """

    answers: tuple[Any, ...]
    indices: Int
    rewards: Float
    frequencies: Float
    survivors: int
    fallback: bool
    k: int
    n: int
    padded: int = 0

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def note(self) -> str:
        """What a user should know: a fallback, padding, fewer than k answers; else empty."""
        said = []
        if self.fallback:
            said.append("no answer survived" if len(self) else "no answer to submit")
        if self.padded:
            said.append(f"{self.padded} of {len(self)} answers fill up")
        if len(self) < self.k:
            said.append(f"{len(self)} of {self.k} answers")
        return "; ".join(said)

    @property
    def draw(self) -> Draw:
        """The submitted samples as a draw from the n; nothing is known of its chances."""
        return Draw(self.indices, np.ones(len(self)), self.n, scores=self.rewards, method="top_k")


# ── ranking ─────────────────────────────────────────────────────────────────────────────────────


class Ranking(NamedTuple):
    """The answers of S sets of samples, by code: `order` (S, G) lists codes, best first.

    standing (S, G): -inf for answers that are not submitted. counts (S, G): 0 for what is not
    there. samples (S, G): the best sample of each answer, the first of those that tie.
    """

    order: Int
    standing: Float
    counts: Float
    samples: Int


def answer_rewards(codes: ArrayLike, rewards: ArrayLike, aggregate: str = "mean") -> Float:
    """The reward of each answer in each of S sets of samples: float64 (S, G), 0 for what is absent.

    codes: int (S, n), -1 for null; rewards: float (S, n). aggregate: "mean", "max", "first".
    Raises InputError for others. O(S (n + G)).

    >>> answer_rewards([[0, 1, 0]], [[1.0, 5.0, 2.0]]).tolist()
    [[1.5, 5.0]]
    """
    require(aggregate in AGGREGATES, "aggregate", repr(aggregate), f"one of {AGGREGATES}")
    code, reward = np.asarray(codes, np.int64), np.asarray(rewards, np.float64)
    if aggregate == "mean":
        null = code == NULL
        return count_votes(code, np.where(null, 0.0, reward)) / np.maximum(count_votes(code), 1)
    rows, groups = len(code), int(code.max(initial=NULL)) + 1
    row, column = np.nonzero(code != NULL)
    at, value = row * groups + code[row, column], reward[row, column]
    out = np.full(rows * groups, -np.inf)
    if aggregate == "max":
        np.maximum.at(out, at, value)
    else:
        out[at[::-1]] = value[::-1]  # the first is written last
    return np.where(out > -np.inf, out, 0.0).reshape(rows, groups)


def of_answer(values: Float, codes: Int) -> Float:
    """What the answer of each sample has, (S, n), of values (S, G); 0 for null.

    >>> of_answer(np.array([[5.0, 7.0]]), np.array([[1, -1, 0]])).tolist()
    [[7.0, 0.0, 5.0]]
    """
    if not values.shape[1]:
        return np.zeros(codes.shape)
    return np.where(codes == NULL, 0.0, np.take_along_axis(values, np.maximum(codes, 0), 1))


def rank_answers(codes: ArrayLike, standings: ArrayLike) -> Ranking:
    """Rank the answers of each row: by standing, then frequency, then first occurrence.

    codes: int (S, n), -1 for null; standings: float (S, n), of samples, -inf for none; no NaN, no
    +inf. Raises InputError for those. Time O(S (n + G log G)), memory O(S (n + G)).

    >>> rank_answers([[0, 1, 1, 2]], [[1.0, 1.0, 0.5, 2.0]]).order.tolist()
    [[2, 1, 0]]
    """
    code, value = np.asarray(codes, np.int64), np.asarray(standings, np.float64)
    same = code.ndim == 2 and value.shape == code.shape
    require(same, "standings", f"shape {value.shape}", f"{code.shape}, one for each sample")
    fine = not np.isnan(value).any() and value.max(initial=-np.inf) < np.inf
    require(bool(fine), "standings", "NaN or infinity", "numbers, or -inf for what can't win")
    rows, n = code.shape
    counts = count_votes(code)
    groups = counts.shape[1]
    row, column = np.nonzero(code != NULL)
    at, sample_value = row * groups + code[row, column], value[row, column]
    best = np.full(rows * groups, -np.inf)
    np.maximum.at(best, at, sample_value)
    first, samples = np.full((2, rows * groups), n)
    np.minimum.at(first, at, column)
    top = sample_value == best[at]
    np.minimum.at(samples, at[top], column[top])
    best = best.reshape(rows, groups)
    keys = (first.reshape(rows, groups), -counts, _places(best))
    return Ranking(np.lexsort(keys, axis=1), best, counts, samples.reshape(rows, groups))


def _places(values: Float) -> Int:
    """The place of each value in its row, 0 the largest; values a rounding apart share it."""
    order = np.argsort(-values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, 1)
    size = np.where(values > -np.inf, np.abs(values), 0.0).max(axis=1, keepdims=True, initial=0.0)
    with np.errstate(invalid="ignore"):  # -inf after -inf
        falls = ranked[:, :-1] - ranked[:, 1:] > ROUNDING * size
    place = np.zeros(values.shape, np.int64)
    np.put_along_axis(place, order[:, 1:], np.cumsum(falls, axis=1), 1)
    return place


def submit_in_rows(
    codes: ArrayLike,
    standings: ArrayLike,
    k: int = 1,
    *,
    pad: str | None = None,
    most: ArrayLike | None = None,
) -> Int:
    """The samples to submit in each of S sets of samples, int64 (S, k), best first, -1 for none.

    Arguments and errors as `rank_answers` and `submit_answers`. most: int (S,), no more answers
    than that by their standing.

    >>> submit_in_rows([[0, 1, 0], [0, -1, 0]], [[1.0, 2.0, 1.0], [1.0, 9.0, 1.0]], 2).tolist()
    [[1, 0], [0, -1]]
    """
    check_k(k, pad)
    ranking = rank_answers(codes, standings)
    rows, groups = ranking.order.shape
    known = np.take_along_axis(ranking.counts, ranking.order, 1) > 0
    if pad is None:
        known &= np.take_along_axis(ranking.standing, ranking.order, 1) > -np.inf
        known &= np.arange(groups) < np.reshape(groups if most is None else most, (-1, 1))
    # answers at -inf tie, so they follow by frequency
    samples = np.where(known, np.take_along_axis(ranking.samples, ranking.order, 1), -1)
    return np.concatenate([samples[:, :k], np.full((rows, max(k - groups, 0)), -1)], axis=1)


def check_k(k: int, pad: str | None = None, name: str = "k") -> None:
    """InputError unless k is a whole number of at least 1, and pad None or "frequency"."""
    whole = isinstance(k, int | np.integer) and not isinstance(k, bool) and k >= 1
    require(whole, name, repr(k), "a whole number of at least 1")
    require(pad in (None, "frequency"), "pad", repr(pad), "frequency or None")


# ── weights of samples, row by row ──────────────────────────────────────────────────────────────


def check_rows(codes: ArrayLike, rewards: ArrayLike) -> tuple[Int, Float]:
    """Codes and rewards as arrays (S, n), rewards 0 for nulls; InputError for what is neither."""
    code, reward = np.asarray(codes, np.int64), np.asarray(rewards, np.float64)
    fine = code.ndim == 2 and code.shape[1] > 0
    require(fine, "codes", f"shape {code.shape}", "(S, n), a row a set of samples")
    require(reward.shape == code.shape, "rewards", f"shape {reward.shape}", f"{code.shape}")
    reward = np.where(code == NULL, 0.0, reward)
    require(bool(np.isfinite(reward).all()), "rewards", "NaN or infinity", "finite numbers")
    return code, reward


def mob_weights(codes: ArrayLike, rewards: ArrayLike, m: int | None = None) -> Float:
    """The chance that best-of-m chooses each sample, of m drawn with replacement: (S, n).

    Of the n samples of a row that are not null; m: ⌊√n⌋ by default, n at most. Samples of equal
    reward share: ranks a .. b weigh [((n-a+1)/n)^m - ((n-b)/n)^m] / (b-a+1) each. Rows sum to 1.
    Raises InputError for m < 1. Rakhsha et al. 2025, arXiv 2511.18630. O(S n log n).

    >>> mob_weights([[0, 1, 0, 2]], [[3.0, 2.0, 2.0, 1.0]]).round(4).tolist()
    [[0.4375, 0.25, 0.25, 0.0625]]
    """
    code, reward = check_rows(codes, rewards)
    require(m is None or m >= 1, "m", m, "a whole number of at least 1, or None")
    value = np.where(code == NULL, -np.inf, reward)
    n, which = np.unique((code != NULL).sum(axis=1), return_inverse=True)
    draws = np.maximum(np.sqrt(n).astype(np.int64) if m is None else np.minimum(m, n), 1)
    left = np.maximum(n[:, None] - np.arange(value.shape[1] + 1), 0) / np.maximum(n, 1)[:, None]
    mass = -np.diff(left ** draws[:, None], axis=1)[which]  # by rank
    order = np.argsort(-value, axis=1)
    ranked = np.take_along_axis(value, order, 1)
    starts = np.ones(value.shape, bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    if not starts.all():
        run = np.cumsum(starts) - 1  # numbered through all rows
        mass = (np.bincount(run, mass.reshape(-1)) / np.bincount(run))[run].reshape(mass.shape)
    out = np.empty_like(value)
    np.put_along_axis(out, order, mass, 1)
    return np.where(code == NULL, 0.0, out)


# ── one problem ─────────────────────────────────────────────────────────────────────────────────


def submit_answers(
    pool: AnswerPool,
    by: str | ArrayLike | Standing = "majority",
    k: int = 1,
    *,
    pad: str | None = None,
    rng: Rng = 0,
) -> TopK:
    """The k best different answers of a pool by any method.

    by: a name of `selection.METHODS` ("majority": the k most frequent; "bon": the k whose best
    sample has the highest reward; hyphens will do); a standing, float (n,), or a function of the
    pool that gives one. "uniform" and "uniform_answered" rank by lot: each next sample is any of
    those whose answer is not yet there. pad: "frequency" fills up with the most frequent answers.
    rng: the lot; the same for every k.
    Raises InputError for k < 1, an unknown method, what it needs and the pool lacks, standings of
    another length, NaN or +inf. O(n + G log G) time for G different answers.

    Di et al. 2025, arXiv 2510.03199, algorithms 1 and 2.

    >>> pool = AnswerPool.of(["7", None, "12", "7", "9"], rewards=[0.1, 0.0, 0.9, 0.2, 0.4])
    >>> submit_answers(pool, "majority", 2).answers, submit_answers(pool, "bon", 2).answers
    (('7', '12'), ('12', '9'))
    >>> submit_answers(pool, "bon", 5).note
    '3 of 5 answers'
    """
    check_k(k, pad)
    given = _standing(pool, by, rng)
    right = given.shape == (pool.n,)
    require(right, "by", f"standings of shape {given.shape}", f"({pool.n},), one for each sample")
    return submit_by_standing(pool, given, k, pad)


def submit_by_standing(
    pool: AnswerPool,
    given: Float,
    k: int,
    pad: str | None,
    *,
    unranked: bool = False,
) -> TopK:
    """`submit_answers` by a standing (n,).

    unranked: nothing survived, and one answer at most is submitted (and padded): the first by
    this standing, without a reward.
    """
    most = 1 if unranked else k
    found = submit_in_rows(pool.codes[None], given[None], k, pad=pad, most=[most])[0]
    indices = found[found >= 0]
    codes = pool.codes[indices]
    counts = count_votes(pool.codes)
    live = ~pool.null & (given > -np.inf)
    ranked = np.zeros(len(indices), bool) if unranked else live[indices]
    survivors = 0 if unranked else len(np.unique(pool.codes[live]))
    names = pool.answers
    return TopK(
        tuple(int(c) if names is None else names[c] for c in codes),
        indices,
        np.where(ranked, given[indices], np.nan),
        counts[codes] / pool.n,
        survivors,
        survivors == 0,
        int(k),
        pool.n,
        max(len(indices) - (1 if unranked else int(ranked.sum())), 0),
    )


def _standing(pool: AnswerPool, by: Any, rng: Rng) -> Float:
    if callable(by):
        return np.asarray(by(pool), np.float64)
    if not isinstance(by, str):
        return np.asarray(by, np.float64)
    name = by.replace("-", "_")
    known = [method for method in METHODS if method != "oracle"]
    require(name in known, "by", repr(by), f"a standing or one of {', '.join(known)}")
    if name in AT_RANDOM:
        return np.where(pool.null, -np.inf, gumbel_noise(pool.n, rng))
    return standing(pool, name)


# ── by lot ──────────────────────────────────────────────────────────────────────────────────────


def gumbel_noise(n: int, rng: Rng) -> Float:
    """Standard Gumbel noise, float64 (n,): -log E with E exponential, a number for each row."""
    u = RowUniforms(rng).block(0, n, stream="soft best-of-n")
    return np.asarray(-np.log(np.maximum(-np.log1p(-u), LEAST)))


def draw_softly(
    pool: AnswerPool,
    scores: ArrayLike | None = None,
    k: int = 1,
    *,
    beta: float = 1.0,
    over: str = "samples",
    pad: str | None = None,
    rng: Rng = None,
) -> TopK:
    """Soft best-of-n: k draws without replacement, with chances proportional to exp(β score).

    scores: (n,), by default the pool's rewards. over: "samples" draws k of the samples that have an
    answer, so that frequent answers have more chances, and an answer drawn twice is submitted once;
    "answers" draws k different answers, each by the mean score of its samples. The order is that of
    drawing; rewards of the result are the scores drawn by. Nested in k for the same seed.
    Raises InputError for k < 1, β < 0 or infinite, an unknown `over`, no or non-finite scores.
    O(n log n).

    Di et al. 2025, arXiv 2510.03199, name the baselines SBoN and SBoN(C) without details: drawing
    without replacement, and the mean, are ours.

    >>> pool = AnswerPool.of(list("aab"), rewards=[0.0, 0.0, 50.0])
    >>> draw_softly(pool, k=2, rng=0).answers, draw_softly(pool, k=2, over="answers", rng=0).answers
    (('b', 'a'), ('b', 'a'))
    """
    check_k(k, pad)
    check_beta(beta)
    require(over in ("samples", "answers"), "over", repr(over), "samples or answers")
    score = _scores(pool, scores)
    noise = gumbel_noise(pool.n, rng)
    if over == "answers":
        codes = pool.codes[None]
        score = of_answer(answer_rewards(codes, score[None]), codes)[0]
        noise = of_answer(noise[None], codes)[0]
    key = np.where(pool.null, -np.inf, beta * score + noise)
    if over == "samples" and k < pool.n:
        key[np.argsort(-key, kind="stable")[k:]] = -np.inf
    drawn = submit_by_standing(pool, key, k, pad)
    rewards = np.where(np.isnan(drawn.rewards), np.nan, score[drawn.indices])
    return replace(drawn, rewards=rewards)


def soft_in_rows(codes: Int, rewards: Float, beta: float = 1.0, over: str = "samples") -> Float:
    """The chance of each sample in proportion to exp(β reward) in each of S sets, float64 (S, n).

    over: "samples", or "answers" by the mean of their samples' rewards.

    >>> soft_in_rows(np.array([[0, 0, 1, -1]]), np.zeros((1, 4)), over="answers").tolist()
    [[0.25, 0.25, 0.5, 0.0]]
    """
    require(over in ("samples", "answers"), "over", repr(over), "samples or answers")
    check_beta(beta)
    weight = np.ones(codes.shape)
    if over == "answers":
        rewards = of_answer(answer_rewards(codes, rewards), codes)
        weight /= np.maximum(of_answer(count_votes(codes), codes), 1)
    null = codes == NULL
    top = np.where(null, -np.inf, rewards).max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # what lies infinitely far below the best has no chance
        weight *= np.exp(beta * np.where(null, 0.0, rewards - top))
    weight[null] = 0.0
    return weight / np.maximum(weight.sum(axis=1, keepdims=True), LEAST)


def check_beta(beta: float) -> None:
    """InputError unless 0 ≤ β < ∞."""
    require(0 <= beta < np.inf, "beta", beta, "a finite number of at least 0")


def _scores(pool: AnswerPool, scores: ArrayLike | None) -> Float:
    score = pool.scores("rewards") if scores is None else np.asarray(scores, np.float64)
    require(score.shape == (pool.n,), "scores", f"shape {score.shape}", f"({pool.n},)")
    fine = np.isfinite(score) | pool.null
    require(bool(fine.all()), "scores", "NaN or infinity", "finite numbers")
    return np.where(pool.null, 0.0, score)
