r"""The answer that the others support best: minimum Bayes risk, also with evidence from elsewhere.

Of N sampled answers the one is chosen that is most like the rest, that is, which has the greatest
expected utility if the truth is distributed as the samples are. More samples may be evidence
without being candidates; in the paper they are three answers in another language:

    score_i = (Σ_{j≠i} u(y_i, y_j) + c Σ_m u(y_i, x_m)) / (N - 1 + c M),    pick = argmax_i score_i

u(candidate, evidence) need not be symmetric. With u = 1 for equal answers and 0 otherwise this is
the majority vote. Where the scores tie, the first is picked: the greedy one, in a hedged pool.

Khairi, D'souza, Shen, Kreutzer and Hooker, "When life gives you samples: the benefits of scaling
up inference compute for multilingual LLMs", EMNLP 2025, arXiv 2506.20544 (X-MBR). Kumar and Byrne,
"Minimum Bayes-risk decoding for statistical machine translation", NAACL 2004.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import AnswerPool, split_ties
from scoredraw.errors import InputError, require
from scoredraw.language.selection import ROUNDING
from scoredraw.language.selection_curves import in_batches
from scoredraw.language.text_utilities import Pair, TextUtility, chrf_matrix, text_utility

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Utility = str | TextUtility | Pair


# ── matrices of utilities ───────────────────────────────────────────────────────────────────────


def expected_utility(
    utilities: ArrayLike,
    evidence: ArrayLike | None = None,
    *,
    cross_weight: float = 1.0,
    include_self: bool = False,
) -> Float:
    """The score of each candidate, float64 (..., N); formula in the head of this file.

    utilities: (..., N, N), [i, j] of candidate i in the light of candidate j, for one pool or many
    at once. evidence: (..., N, M), likewise, of samples that are no candidates. cross_weight: c,
    what one of those counts. include_self: j = i counts too (and the divisor is N + c M). A pool of
    one without evidence has score NaN.
    Raises InputError for matrices that are not square or don't match, NaN or infinite utilities,
    and a negative cross_weight. O(N (N + M)) time a pool, O(N) memory beside the matrices.

    >>> u = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]]
    >>> expected_utility(u).tolist()
    [0.25, 0.0, 0.25]
    >>> expected_utility(u, [[0.0], [1.0], [0.0]], cross_weight=2).tolist()
    [0.125, 0.5, 0.125]
    """
    u = np.asarray(utilities, np.float64)
    square = u.ndim >= 2 and u.shape[-1] == u.shape[-2] and u.shape[-1] > 0
    require(square, "utilities", f"shape {u.shape}", "(..., N, N) with N of at least 1")
    fine = 0 <= cross_weight < np.inf
    require(fine, "cross_weight", cross_weight, "a finite number of at least 0")
    total, weight = _row_sums(u, "utilities"), u.shape[-1] - 1.0 + include_self
    if not include_self:
        total -= np.diagonal(u, axis1=-2, axis2=-1)
    if evidence is not None:
        x = np.asarray(evidence, np.float64)
        wanted = f"{(*u.shape[:-1], 'M')}".replace("'", "")
        same = x.ndim == u.ndim and x.shape[:-1] == u.shape[:-1]
        require(same, "evidence", f"shape {x.shape}", wanted)
        total += cross_weight * _row_sums(x, "evidence")
        weight += cross_weight * x.shape[-1]
    return total / weight if weight else np.full(total.shape, np.nan)


def _row_sums(matrix: Float, name: str) -> Float:
    """Sums along the last axis, which are finite if all summands are."""
    with np.errstate(invalid="ignore"):
        total: Float = matrix.sum(axis=-1)
    require(bool(np.isfinite(total).all()), name, "NaN or infinity", "finite utilities")
    return total


def pick(scores: ArrayLike) -> Int:
    """The first candidate of the highest score, int64 (...), for scores (..., N).

    Scores tie that differ by rounding only. A pool of one is picked whatever its score (NaN).

    >>> pick([[0.1 + 0.2, 0.3], [0.0, 1.0]]).tolist()
    [0, 1]
    """
    score = np.asarray(scores, np.float64)
    return np.asarray((score >= _tied_from(score)).argmax(axis=-1), np.int64)


def _tied_from(score: Float) -> Float:
    """The least score that ties with the best of its pool: sums round."""
    possible = np.where(score > -np.inf, np.abs(score), 0.0)
    slack = ROUNDING * possible.max(axis=-1, keepdims=True, initial=0.0)
    return np.asarray(score.max(axis=-1, keepdims=True, initial=-np.inf) - slack)


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Consensus:
    """Who was picked, and the score of every candidate, float64 (N,)."""

    index: int
    scores: Float


def minimum_bayes_risk(
    candidates: Sequence[str],
    utility: Utility = "chrf",
    evidence: Sequence[str] = (),
    *,
    cross_weight: float = 1.0,
    include_self: bool = False,
    allow_surface_cross: bool = False,
) -> Consensus:
    """The candidate that the other samples support best (MBR), and `evidence` with them (X-MBR).

    candidates: N texts, empty ones allowed. utility: "chrf", "symmetric-chrf", "equality", a
    `TextUtility`, or a function of two texts (candidate, evidence). evidence: M more samples that
    are never picked, in another language; the utility has to know both (`crosses_languages`).
    allow_surface_cross: the evidence is in the candidates' own language after all, or the utility
    is known to work. cross_weight, include_self: as `expected_utility`.
    Raises InputError for no candidates, for evidence with a utility that does not cross languages,
    and for utilities that are not finite. N (N + M) utilities, distinct texts asked once.

    Khairi et al. 2025, arXiv 2506.20544.

    >>> texts = ["two trains leave", "a robe takes 2 bolts", "a robe takes two bolts"]
    >>> minimum_bayes_risk(texts).index
    2
    >>> minimum_bayes_risk(texts, evidence=["zwei Ballen Stoff"])
    Traceback (most recent call last):
    scoredraw.errors.InputError: utility: got chrF for evidence in another language, want one that \
crosses languages, or allow_surface_cross=True
    """
    require(len(candidates) > 0, "candidates", "none", "one or more texts")
    u = text_utility(utility)
    check_crossing(u, evidence, allow_surface_cross)
    values = _of_distinct(u, candidates, candidates)
    cross = _of_distinct(u, candidates, evidence) if len(evidence) else None
    scores = expected_utility(values, cross, cross_weight=cross_weight, include_self=include_self)
    return Consensus(int(pick(scores)), scores)


def check_crossing(u: TextUtility, evidence: Sequence[str], allow_surface_cross: bool) -> None:
    """InputError where there is evidence in another language that the utility can't judge by."""
    wanted = "one that crosses languages, or allow_surface_cross=True"
    allowed = not len(evidence) or u.crosses_languages or allow_surface_cross
    require(allowed, "utility", f"{u.name} for evidence in another language", wanted)


def _of_distinct(u: TextUtility, candidates: Sequence[str], evidence: Sequence[str]) -> Float:
    """u of all pairs, a pair of equal texts asked once."""
    rows, columns = list(dict.fromkeys(candidates)), list(dict.fromkeys(evidence))
    values = u(rows, columns)
    row, column = ({text: i for i, text in enumerate(each)} for each in (rows, columns))
    here = np.array([row[text] for text in candidates])
    return np.asarray(values[here[:, None], [column[text] for text in evidence]])


# ── pools of answers ────────────────────────────────────────────────────────────────────────────


def mbr_standing(
    pool: AnswerPool,
    *,
    utility: Utility = "chrf",
    evidence: Sequence[str] = (),
    cross_weight: float = 1.0,
    allow_surface_cross: bool = False,
) -> Float:
    """How each sample stands by minimum Bayes risk over the texts, float64 (n,).

    -inf for null answers: they are no candidates, but their texts are samples of the model like
    the others, and so evidence. "equality" compares the answers, not the texts, and does without
    these. A pool of one sample stands at 0. Raises InputError where the pool has no texts, and as
    `minimum_bayes_risk`.

    >>> pool = AnswerPool.of(["7", "7", "8"], texts=["so it is 7", "it is 7", "maybe 8"])
    >>> mbr_standing(pool).round(1).tolist()
    [43.3, 30.8, 0.0]
    """
    u = text_utility(utility)
    check_crossing(u, evidence, allow_surface_cross)
    by_text = utility != "equality" or not len(evidence)
    require(by_text, "utility", "equality with evidence", "equality(key), which reads the texts")
    values = _pool_utilities(pool, utility)
    cross = _of_distinct(u, _texts(pool), evidence) if len(evidence) else None
    scores = expected_utility(values, cross, cross_weight=cross_weight)
    return np.where(pool.null, -np.inf, np.nan_to_num(scores))


def _mbr_of_subsets(pool: AnswerPool, subsets: Int) -> Float:
    """The choice in each subset (S, k): float64 (S, k). Utilities are asked once a pool."""
    values = _pool_utilities(pool, "chrf")
    count, k = subsets.shape
    if k == 1:
        return np.asarray(~pool.null[subsets], np.float64)
    member = np.zeros((count, pool.n))
    np.put_along_axis(member, subsets, 1.0, axis=1)
    totals = np.take_along_axis(member @ values.T, subsets, 1) - np.diagonal(values)[subsets]
    return _split(np.where(pool.null[subsets], -np.inf, totals / (k - 1)))


def mbr_choice(
    pool: AnswerPool,
    *,
    utility: Utility = "chrf",
    evidence: Sequence[str] = (),
    cross_weight: float = 1.0,
    allow_surface_cross: bool = False,
) -> Float:
    """The sample whose text the others support best, ties shared: a selector, float64 (n,).

    Arguments and errors as `mbr_standing`. With utility="equality" the majority vote, exactly.
    O(n²) utilities a pool; chrF takes some 25 ms for 64 texts of 400 characters.

    >>> pool = AnswerPool.of(["7", "7", "8"], texts=["so it is 7", "it is 7", "maybe 8"])
    >>> mbr_choice(pool).tolist()
    [1.0, 0.0, 0.0]
    """
    return _split(mbr_standing(
        pool, utility=utility, evidence=evidence, cross_weight=cross_weight,
        allow_surface_cross=allow_surface_cross,
    ))  # fmt: skip


in_batches(_mbr_of_subsets)(mbr_choice)


def _split(scores: Float) -> Float:
    """1 shared by all that tie for the best."""
    tied = np.where(scores >= _tied_from(scores), scores, -np.inf)
    return split_ties(np.where(tied > -np.inf, 0.0, -np.inf))


def _texts(pool: AnswerPool) -> tuple[str, ...]:
    if pool.texts is None:
        raise InputError("texts: got None, want one for each answer, which this method needs")
    return pool.texts


def _pool_utilities(pool: AnswerPool, utility: Utility) -> Float:
    if utility == "equality":
        same = pool.codes[:, None] == pool.codes
        return np.asarray(same & ~pool.null, np.float64)
    if utility == "chrf":
        return _chrf_of(_texts(pool))
    return _of_distinct(text_utility(utility), _texts(pool), _texts(pool))


@lru_cache(maxsize=4)
def _chrf_of(texts: tuple[str, ...]) -> Float:
    """chrF of all pairs, kept: a curve asks for the same pool at every k."""
    values = chrf_matrix(texts, texts)
    values.flags.writeable = False
    return values
