"""Confidences of answers from votes and from the model's own probabilities, and both together.

A problem was answered n times; sample i went along a path (its text) of probability p_i to the
answer y_i. Five ways to say how sure one is of an answer y:

    sc    self-consistency          #{i : y_i = y} / n
    ppl   perplexity                p of the path; the answer of the most probable path
    verb  verbalized                what the model says when asked, a score of each sample
    pc    perplexity consistency    Σ p(t) over the distinct paths t that end in y, over all paths
    rpc   with reasoning pruning    pc of the paths that are left after pruning

An answer's votes come in slowly, like 1/n; what its distinct paths weigh comes in exponentially
fast, but so does what all the wrong paths weigh. Reasoning pruning fits two Weibull components to
p_1..p_n (see `weibull_mixture`) and removes the paths that more likely belong to the improbable
one and lie below the mean of p.

p is the probability a token, exp(log p(t) / tokens), as in the released code; the theory is about
p(t) itself ("sum"). `selection.majority_vote`, `likeliest` and `best_of_n` select as sc, ppl and
verb do.

Zhou, Tan, Yang, Gan, Wang, Zhang and Li, "A theoretical study on bridging internal probability and
self-consistency for LLM reasoning", NeurIPS 2025, arXiv 2510.15444.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import NULL, AnswerPool, Equal, count_votes, split_ties
from scoredraw.errors import require
from scoredraw.language.selection_curves import in_batches
from scoredraw.language.weibull_mixture import WeibullMixture, fit_weibull_mixtures

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

METHODS = ("sc", "ppl", "verb", "pc", "rpc")
NULLS = ("drop", "fit-only", "own-group")  # what becomes of answers that could not be read
FEWEST = 5  # as many as the mixture has parameters: fewer samples say nothing about them
TIED = 1e-10  # confidences this close to the best tie with it
EQUAL = 1e-12  # relative: means round, and what equals the mean is not below it


# ── one problem ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class AnswerConfidence:
    """How sure a method is of each answer to one problem.

    answers: the G distinct answers in order of appearance (None among them with "own-group").
    confidence: (G,); sums to 1, but for "ppl" and "verb", where it is that of the best path, and
    where nothing has weight (all 0). best: the answer of the highest confidence (the first of
    those that tie), None where there is none. keep: (n,), the samples that were counted.
    choice: (n,), the chance of submitting each sample, ties shared. mixture: of "rpc"; None where
    nothing was fitted.
    """

    answers: tuple[Any, ...]
    confidence: Float
    best: int | None
    keep: Bool
    choice: Float
    mixture: WeibullMixture | None

    @property
    def answer(self) -> Any:
        """The answer of the highest confidence, or None."""
        return None if self.best is None else self.answers[self.best]

    @property
    def top(self) -> float:
        """The highest confidence, 0 where there is no answer."""
        return 0.0 if self.best is None else float(self.confidence[self.best])


def answer_confidence(
    answers: Sequence[Any] | NDArray[Any],
    logprobs: ArrayLike | None = None,
    *,
    method: str = "rpc",
    scores: ArrayLike | None = None,
    paths: Sequence[Any] | None = None,
    lengths: ArrayLike | None = None,
    normalize: str = "mean",
    invalid: str = "drop",
    equal: Equal | None = None,
) -> AnswerConfidence:
    """The confidence in each distinct answer by "sc", "ppl", "verb", "pc" or "rpc".

    answers: (n,), None where none was read. logprobs: (n,), of whole samples in nats, ≤ 0 (-inf:
    probability 0, always pruned). lengths: (n,), tokens, for normalize="mean"; give ones where the
    log-probabilities are means already. normalize="sum" takes whole probabilities, scaled by the
    largest before the fit, so that nothing underflows. scores: (n,), what the model said, for
    "verb". paths: (n,), equal for the same text; by default each sample is a path of its own. A
    path counts once for an answer, with its largest probability.
    invalid: "drop" leaves unread answers out altogether; "fit-only" lets them take part in fitting
    and in the mean; "own-group" makes them an answer, None, which is never submitted.
    equal: an equality of answers (not transitive: the first that equals; see `group_answers`).
    Fewer than 5 or equal probabilities: nothing is pruned. A fit that fails prunes nothing and
    warns. Raises InputError, naming the index, for log-probabilities above 0 or NaN, lengths that
    don't match, no samples, what the method needs and lacks.

    Zhou et al. 2025, arXiv 2510.15444. O(n log n), and for "rpc" about 60 evaluations of O(n).

    >>> found = answer_confidence(["7", "7", "12", None], [-2.0, -2.0, -1.0, -5.0],
    ...     lengths=[4, 4, 4, 4], paths=["a", "a", "b", "c"], method="pc")
    >>> found.answers, found.confidence.round(3).tolist(), found.answer
    (('7', '12'), [0.438, 0.562], '12')
    """
    pool = AnswerPool.of(
        answers, rewards=scores, logprobs=logprobs, lengths=lengths, paths=paths, equal=equal
    )
    found = choose(pool, np.arange(pool.n)[None], method, normalize=normalize, invalid=invalid)
    names = tuple(pool.answers or ())
    if invalid == "own-group" and pool.null.any():
        names = (*names, None)
    confidence, choice = found.confidence[0], found.choice[0]
    best = int(confidence.argmax()) if found.top[0] > 0 else None
    if choice.any():  # of those that tie the first; a probability may also be too small for exp
        best = int(pool.codes[choice > 0].min())
    mixture = found.mixture
    fitted = mixture is not None and bool(np.isfinite(mixture.nll[0]))
    return AnswerConfidence(
        names, confidence, best, found.keep[0], choice,
        mixture[0] if mixture is not None and fitted else None,
    )  # fmt: skip


def rpc_confidence(
    answers: Sequence[Any] | NDArray[Any],
    logprobs: ArrayLike,
    *,
    paths: Sequence[Any] | None = None,
    lengths: ArrayLike | None = None,
    normalize: str = "mean",
    prune: bool = True,
    invalid: str = "drop",
    equal: Equal | None = None,
) -> AnswerConfidence:
    """`answer_confidence` by perplexity consistency after reasoning pruning, or without `prune`.

    >>> logprobs = np.log([0.9, 0.85, 0.8, 0.2, 0.15, 0.1, 0.2])
    >>> found = rpc_confidence(list("aabbbbb"), logprobs, lengths=np.ones(7))
    >>> found.keep.tolist(), found.answer, round(found.top, 3)
    ([True, True, True, False, False, False, False], 'a', 0.686)
    """
    return answer_confidence(
        answers, logprobs, method="rpc" if prune else "pc", paths=paths, lengths=lengths,
        normalize=normalize, invalid=invalid, equal=equal,
    )  # fmt: skip


# ── many subsets, many problems ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Choices:
    """What a method makes of S sets of samples: an `AnswerConfidence` in each row.

    choice: (S, k), the chance of submitting each sample. top: (S,), the confidence in what is
    submitted. confidence: (S, G). standing: (S, k), how each sample stands: the confidence in its
    answer, for "ppl" and "verb" the logarithm of its own; -inf: never submitted. keep: (S, k).
    mixture: NaN in the rows that were not fitted; None but for "rpc".
    """

    choice: Float
    top: Float
    confidence: Float
    standing: Float
    keep: Bool
    mixture: WeibullMixture | None


def choose(
    pool: AnswerPool,
    subsets: Int,
    method: str = "rpc",
    *,
    normalize: str = "mean",
    invalid: str = "drop",
    fewest: int = FEWEST,
) -> Choices:
    """What a method makes of each of some subsets of a pool, int64 (S, k).

    Options as in `answer_confidence`; fewest: as in `prune_reasoning`. Time O(S k log k) and, for
    "rpc", a fit a subset, about 0.3 ms each up to k = 64.

    >>> pool = AnswerPool.of(list("abb"), logprobs=[-1.0, -3.0, -2.0], lengths=[2, 3, 2])
    >>> choose(pool, np.array([[0, 1, 2], [0, 1, 0]]), "sc").top.round(3).tolist()
    [0.667, 0.667]
    """
    return choose_in_rows(
        pool.codes[subsets], log_scores(pool, method, normalize)[subsets],
        pool.path_codes[subsets], method, relative=normalize == "sum", invalid=invalid,
        fewest=fewest, groups=pool.groups,
    )  # fmt: skip


def log_scores(pool: AnswerPool, method: str, normalize: str = "mean") -> Float:
    """What `choose_in_rows` takes as log p, (n,): log-probabilities, for "verb" of being right.

    >>> pool = AnswerPool.of(["7", "12"], logprobs=[-4.0, -5.0], lengths=[2, 5])
    >>> log_scores(pool, "pc").tolist(), log_scores(pool, "sc").tolist()
    ([-2.0, -1.0], [0.0, 0.0])
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    require(normalize in ("mean", "sum"), "normalize", repr(normalize), "mean or sum")
    if method == "sc":
        return np.zeros(pool.n)
    if method == "verb":
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(_verbalized(pool)))
    return pool.scores(f"{normalize}_logprob")


def _verbalized(pool: AnswerPool) -> Float:
    said = np.where(pool.null, 0.0, pool.scores("rewards"))
    wrong = np.flatnonzero((said < 0) | (said > 1))
    came = f"{said[wrong[0]]} at index {wrong[0]}" if wrong.size else ""
    require(not wrong.size, "rewards", came, "probabilities in [0, 1] that a sample is right")
    return said


def choose_in_rows(
    codes: Int,
    log_p: Float,
    paths: Int | None = None,
    method: str = "rpc",
    *,
    relative: bool = False,
    invalid: str = "drop",
    fewest: int = FEWEST,
    groups: int | None = None,
) -> Choices:
    """`choose` where each row is a set of samples of a problem of its own.

    codes: int64 (S, n), answers by number within their row, -1 for null; log_p: (S, n), ≤ 0, as
    the method is to take them; paths: int64 (S, n), equal within a row for the same text, None
    where all differ. relative: fit to p over the row's largest. groups: columns of `confidence`.

    >>> codes, log_p = np.array([[0, 0, 1], [0, 1, -1]]), np.log([[0.2, 0.2, 0.6], [0.5, 0.4, 0.9]])
    >>> choose_in_rows(codes, log_p, method="pc").confidence.round(3).tolist()
    [[0.4, 0.6], [0.556, 0.444]]
    """
    require(invalid in NULLS, "invalid", repr(invalid), f"one of {', '.join(NULLS)}")
    null = codes == NULL
    count = int(codes.max(initial=NULL)) + 1 if groups is None else groups
    votes = codes
    if invalid == "own-group" and null.any():
        votes, count = np.where(null, count, codes), count + 1
    counted = votes != NULL
    mixture = None
    keep = counted
    if method == "rpc":
        fitted = np.ones_like(null) if invalid == "fit-only" else counted
        kept, mixture = _prune_rows(log_p, fitted, relative, fewest)
        keep = counted & kept
    if method in ("ppl", "verb"):
        best = np.where(counted, log_p, -np.inf)
        confidence = np.exp(_largest(votes, best, count))
        choice = split_ties(_over_largest(best), TIED) * (best > -np.inf)
        standing = best
    else:
        distinct = keep if method == "sc" else keep & _first_of_path(votes, log_p, paths)
        weights = _over_largest(np.where(distinct, log_p, -np.inf))
        totals = _padded(count_votes(votes, weights), count)
        # the most probable path has weight 1, so a total below 1 is 0
        confidence = totals / np.maximum(totals.sum(axis=1, keepdims=True), 1.0)
        members = _padded(count_votes(votes), count)
        some = confidence.max(axis=1, initial=0.0) > 0
        shares = split_ties(np.where((members > 0) & some[:, None], confidence, -np.inf), TIED)
        choice = _of_group(shares / np.maximum(members, 1), votes)
        standing = np.where(some[:, None] & counted, _of_group(confidence, votes), -np.inf)
    return Choices(
        np.where(null, 0.0, choice), confidence.max(axis=1, initial=0.0), confidence,
        np.where(null, -np.inf, standing), keep, mixture,
    )  # fmt: skip


def _over_largest(log_p: Float) -> Float:
    """exp(log p) over the largest of its row; 0 where that is 0 too."""
    largest = log_p.max(axis=1, keepdims=True, initial=-np.inf)
    return np.exp(log_p - np.where(largest > -np.inf, largest, 0.0))


def _padded(totals: Float, count: int) -> Float:
    return np.pad(totals, ((0, 0), (0, count - totals.shape[1])))


def _of_group(values: Float, codes: Int) -> Float:
    """What the group of each sample has, 0 without a group."""
    if not values.shape[1]:
        return np.zeros(codes.shape)
    return np.where(codes == NULL, 0.0, np.take_along_axis(values, np.maximum(codes, 0), 1))


def _largest(codes: Int, values: Float, count: int) -> Float:
    """The largest value of each group, float64 (S, count), -inf without members."""
    out = np.full((len(codes), count + 1), -np.inf)  # the last column is that of no group
    columns = np.where(codes == NULL, count, codes)
    np.maximum.at(out, (np.arange(len(codes))[:, None], columns), values)
    return out[:, :count]


def _first_of_path(codes: Int, log_p: Float, paths: Int | None) -> Bool:
    """Of the samples of a path that give the same answer, the most probable (the first of them)."""
    if paths is None:
        return np.ones(codes.shape, bool)
    path = paths * (int(codes.max(initial=NULL)) + 2) + codes + 1
    order = np.argsort(path, axis=1)  # three times as fast as by path and probability
    ranked, p = (np.take_along_axis(values, order, 1) for values in (path, log_p))
    begins = np.ones(codes.shape, bool)
    begins[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    starts = np.flatnonzero(begins)
    best = np.maximum.reduceat(p.ravel(), starts)[np.cumsum(begins) - 1]
    place = np.where(p.ravel() == best, order.ravel(), codes.shape[1])
    out = np.zeros(codes.shape, bool)
    out[starts // codes.shape[1], np.minimum.reduceat(place, starts)] = True
    return out


# ── reasoning pruning ───────────────────────────────────────────────────────────────────────────


def prune_reasoning(p: ArrayLike, *, fewest: int = FEWEST) -> tuple[Bool, WeibullMixture]:
    """Which paths are kept in each of S sets of n, bool (S, n), and the mixtures fitted to them.

    Removed is what has probability 0, or P(high | p) < 1/2 and p < the mean of its row; the most
    probable path always stays. p: (S, n) in [0, 1]. Rows of fewer than `fewest` or of equal values
    are not fitted (NaN), and what a failed fit would prune is kept, with a warning. Equal to the
    mean means within 1e-12 of it, as means round. The released code fits any number of samples,
    two to five parameters (`fewest=2`), and keeps the result of a fit that failed.

    Zhou et al. 2025, arXiv 2510.15444, section 3.2. Memory O(S n).

    >>> keep, mixture = prune_reasoning([[0.9, 0.88, 0.9, 0.1, 0.12, 0.15], [0.5] * 6])
    >>> keep.astype(int).tolist(), np.isnan(mixture.nll).tolist()
    ([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], [False, True])
    """
    x = np.asarray(p, np.float64)
    require(x.ndim == 2, "p", f"{x.ndim} dimensions", "two, a row a set of paths")
    require(bool(((x >= 0) & (x <= 1)).all()), "p", "others", "probabilities in [0, 1]")
    require(fewest >= 2, "fewest", fewest, "2 or more samples to fit")
    keep, mixture = x > 0, _unfitted(len(x))
    if x.shape[1] < fewest:
        return keep, mixture
    spread = np.ptp(x, axis=1) > EQUAL * x.max(axis=1)
    fitted = fit_weibull_mixtures(x[spread])
    for name in ("w", "k", "scale", "nll", "converged"):
        getattr(mixture, name)[spread] = getattr(fitted, name)
    if not fitted.converged.all():
        text = "the mixture of a set of paths did not converge: none of them is pruned"
        warnings.warn(text, stacklevel=2)
    below = x[spread] < x[spread].mean(axis=1, keepdims=True) * (1 - EQUAL)
    unlikely = fitted.posterior_high(x[spread]) < 0.5
    keep[spread] &= ~(unlikely & below & fitted.converged[:, None])
    return keep, mixture


def _unfitted(s: int) -> WeibullMixture:
    w, k, scale = np.full(s, np.nan), np.full((s, 2), np.nan), np.full((s, 2), np.nan)
    return WeibullMixture(w, k, scale, np.full(s, np.nan), np.zeros(s, bool))


def _prune_rows(
    log_p: Float, fitted: Bool, relative: bool, fewest: int
) -> tuple[Bool, WeibullMixture]:
    """`prune_reasoning` of the `fitted` samples of each row; rows of a length go together."""
    some = np.where(fitted, log_p, -np.inf)
    p = _over_largest(some) if relative else np.exp(some)
    if fitted.all():
        return prune_reasoning(p, fewest=fewest)
    keep, mixture = np.zeros(log_p.shape, bool), _unfitted(len(log_p))
    lengths = fitted.sum(axis=1)
    order = np.argsort(~fitted, axis=1, kind="stable")  # those to fit come first
    for length in np.unique(lengths[lengths > 0]).tolist():
        rows = np.flatnonzero(lengths == length)
        columns = order[rows, :length]
        kept, part = prune_reasoning(p[rows[:, None], columns], fewest=fewest)
        keep[rows[:, None], columns] = kept
        for name in ("w", "k", "scale", "nll", "converged"):
            getattr(mixture, name)[rows] = getattr(part, name)
    return keep, mixture


# ── selectors and standings ─────────────────────────────────────────────────────────────────────


def _of_subsets(method: str, pool: AnswerPool, subsets: Int) -> Float:
    return choose(pool, subsets, method).choice


@in_batches(partial(_of_subsets, "pc"))
def perplexity_consistency(
    pool: AnswerPool, normalize: str = "mean", invalid: str = "drop"
) -> Float:
    """The answer whose distinct paths weigh most: argmax_y Σ_{t → y} p(t), ties shared.

    Needs `logprobs`, and `lengths` for "mean"; options as in `answer_confidence`. O(n log n).

    >>> pool = AnswerPool.of(list("aab"), logprobs=[-2.0, -2.0, -1.5], texts=["x", "x", "y"])
    >>> perplexity_consistency(pool, "sum").tolist()
    [0.0, 0.0, 1.0]
    """
    return _whole(pool, "pc", normalize, invalid).choice[0]


@in_batches(partial(_of_subsets, "rpc"))
def pruned_consistency(pool: AnswerPool, normalize: str = "mean", invalid: str = "drop") -> Float:
    """`perplexity_consistency` of the paths that reasoning pruning leaves (RPC).

    >>> logprobs = np.log([0.9, 0.85, 0.8, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    >>> pool = AnswerPool.of(list("aacbbbbbbb"), logprobs=logprobs, lengths=np.ones(10))
    >>> pruned_consistency(pool)[:3].tolist(), perplexity_consistency(pool)[:3].tolist()
    ([0.5, 0.5, 0.0], [0.0, 0.0, 0.0])
    """
    return _whole(pool, "rpc", normalize, invalid).choice[0]


def consistency_standing(
    pool: AnswerPool, method: str = "rpc", normalize: str = "mean", invalid: str = "drop"
) -> Float:
    """How each sample stands with a method of `METHODS`, float64 (n,): higher is better.

    The confidence in its answer with "sc", "pc" and "rpc", so that samples of a group stand alike;
    the logarithm of its own with "ppl" and "verb". -inf: never submitted.

    >>> consistency_standing(AnswerPool.of(["7", None, "12", "7"]), "sc").round(3).tolist()
    [0.667, -inf, 0.333, 0.667]
    """
    return _whole(pool, method, normalize, invalid).standing[0]


def perplexity_consistency_standing(
    pool: AnswerPool, normalize: str = "mean", invalid: str = "drop"
) -> Float:
    """`consistency_standing` with "pc".

    >>> pool = AnswerPool.of(list("ab"), logprobs=np.log([0.2, 0.6]), lengths=[1, 1])
    >>> perplexity_consistency_standing(pool).round(6).tolist()
    [0.25, 0.75]
    """
    return consistency_standing(pool, "pc", normalize, invalid)


def _whole(pool: AnswerPool, method: str, normalize: str, invalid: str) -> Choices:
    every = np.arange(pool.n)[None]
    return choose(pool, every, method, normalize=normalize, invalid=invalid)
