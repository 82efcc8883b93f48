"""Choosing one of many answers.

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
which submits a right sample if there is one, is no selector but the bound of all: coverage. Where
several answers may be submitted it is a sample's `standing` that counts; see `submission`. How
accuracy grows with the number of samples is the matter of `selection_curves`.

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scoredraw.answers import NULL, AnswerPool, count_votes, split_ties
from scoredraw.errors import require

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Selector = Callable[[AnswerPool], Float]

ROUNDING = 1e-12  # sums of scores this close, relative to what they are made of, tie


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
    return submit_by_vote(pool.codes, np.ones(pool.n))


def weighted_vote(pool: AnswerPool) -> Float:
    """The answer with the largest sum of rewards: argmax_y Σ_{i : y_i = y} r_i, ties shared.

    Needs `rewards`. Negative rewards count against their answer. O(n).

    >>> weighted_vote(AnswerPool.of(["7", "12", "7"], rewards=[0.2, 0.5, 0.2])).tolist()
    [0.0, 1.0, 0.0]
    """
    return submit_by_vote(pool.codes, pool.scores("rewards"))


def probability_vote(pool: AnswerPool, normalize: str = "mean") -> Float:
    """The answer with the largest sum of its samples' probabilities, ties shared.

    normalize: "mean" takes exp(log-probability / tokens), "sum" exp(log-probability).
    Needs `logprobs`, and `lengths` for "mean". Scaled by the most probable sample, so that nothing
    underflows that matters. Every sample counts, also where two texts are the same. O(n).

    >>> pool = AnswerPool.of(["7", "12", "7"], logprobs=[-900, -899.5, -900.2])
    >>> probability_vote(pool, "sum").tolist()
    [0.5, 0.0, 0.5]
    """
    return submit_by_vote(pool.codes, _weights(pool, f"{_checked(normalize)}_probability"))


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


def standing(pool: AnswerPool, method: str) -> Float:
    """How each sample stands with a method of `METHODS`, float64 (n,): higher is better.

    For a vote the total of the sample's group, else its own score; -inf for null answers (but all
    are alike to "uniform"). Raises `InputError` for scores that the pool lacks.

    >>> standing(AnswerPool.of(["7", None, "12", "7"]), "majority").tolist()
    [2.0, -inf, 1.0, 2.0]
    """
    known = [name for name in METHODS if name != "oracle"]
    require(method in known, "method", method, f"one of {', '.join(known)}")
    kind, score = METHODS[method]
    scores = sample_scores(pool, np.zeros(pool.n), score)
    if kind == "best":
        return scores
    totals = count_votes(pool.codes, np.where(pool.null, 0.0, scores))
    return np.where(pool.null, -np.inf, np.append(totals, 0.0)[pool.codes])


def sample_scores(pool: AnswerPool, credit: Float, score: str) -> Float:
    """A score of each sample by the name it has in `METHODS`, float64 (n,)."""
    if score == "credit":
        return credit
    if score in ("equal", "one"):
        return np.ones(pool.n)
    if score == "answered":
        return np.where(pool.null, -np.inf, 0.0)
    return _weights(pool, score)


def submit_by_vote(codes: Int, weights: Float) -> Float:
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
