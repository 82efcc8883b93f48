"""Sampled answers: which of them are equal, who has the votes, what a random k of n would hold.

A problem is answered n times. Equal answers form a group, known by its code 0, 1, ... in order of
first appearance; an answer that could not be read (None or NaN) is null, code -1: it is in no
group, gets no vote and is never submitted. Votes are sums over groups, and ties share.

What k of the n samples would do, drawn without replacement, has a closed form wherever it depends
on ranks alone. With the samples in order of a score, best first,

    P(none of c given samples is drawn)  =  C(n-c, k) / C(n, k)
    P(the best one drawn has rank j)     =  C(n-j, k-1) / C(n, k)
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, require

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Equal = Callable[[Any, Any], bool]
Key = Callable[[Any], Any]

NULL = -1  # the code of an answer that could not be read
TABLE_CELLS = 4_000_000  # how many cells of a table are worked on at a time
FEW_DRAWS = 64  # up to so many, a product over the draws is shorter than one over the items
VANISHED = 46.1  # exp(-46.1) < 1e-20: below the last digit of 1


# ── equality ────────────────────────────────────────────────────────────────────────────────────


def is_null(answer: Any) -> bool:
    """Whether an answer is missing: None, or a number that is not equal to itself.

    >>> [is_null(answer) for answer in (None, float("nan"), 0, "")]
    [True, True, False, False]
    """
    return answer is None or (isinstance(answer, numbers.Number) and bool(answer != answer))


def group_answers(answers: Any, *, equal: Equal | None = None, key: Key | None = None) -> Int:
    """Codes of equal answers, 0, 1, ... in order of first appearance; null answers are -1.

    answers: a sequence (n,) of hashable answers -> int64 (n,); a two-dimensional array (P, n), a
    row a problem -> int64 (P, n), numbered afresh in each row.
    key: maps an answer to what stands for it (lower case, a rounded number; None makes it null).
    equal: an equality of answers, asked only about pairs that Python does not find equal. An
    answer joins the first group whose first member it equals, so where the equality is not
    transitive the order of the answers decides.
    Raises InputError for unhashable answers without `equal` or a `key` that makes them hashable.
    O(n) time without `equal`; with it, up to n times the number of groups calls a problem.

    >>> group_answers(["7", None, "12", "7"]).tolist()
    [0, -1, 1, 0]
    >>> group_answers([1.0, 0.999, 2.0], equal=lambda a, b: abs(a - b) < 0.01).tolist()
    [0, 0, 1]
    >>> group_answers(np.array([[5, 5, 9], [9, 5, 5]])).tolist()
    [[0, 0, 1], [0, 1, 1]]
    """
    if isinstance(answers, np.ndarray) and answers.ndim != 1:
        require(answers.ndim == 2, "answers", f"{answers.ndim} dimensions", "one or two")
        problems, n = answers.shape
        offsets = np.arange(problems + 1) * n
        codes = group_ragged(answers.reshape(-1), offsets, equal=equal, key=key)
        return codes.reshape(problems, n)
    return group_ragged(answers, [0, len(answers)], equal=equal, key=key)


def group_ragged(
    answers: Any, offsets: ArrayLike, *, equal: Equal | None = None, key: Key | None = None
) -> Int:
    """`group_answers` of problems with different numbers of samples, laid end to end.

    answers: (M,), those of problem p at offsets[p] : offsets[p + 1]; offsets: (P + 1,) from 0 to M.
    -> int64 (M,), numbered afresh in each problem. Raises InputError as `group_answers`, and for
    offsets that do not run from 0 to M without falling.

    >>> group_ragged(["a", "b", "a", "b", None], [0, 2, 5]).tolist()
    [0, 1, 0, 1, -1]
    """
    bounds = np.asarray(offsets)
    runs = bounds.ndim == 1 and len(bounds) > 0 and bool((np.diff(bounds) >= 0).all())
    if not (runs and bounds[0] == 0 and bounds[-1] == len(answers)):
        wanted = f"counts rising from 0 to {len(answers)}"
        raise InputError(f"offsets: got {bounds.tolist()}, want {wanted}")
    problem = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    if key is not None:
        answers = [None if is_null(answer) else key(answer) for answer in answers]
    codes = _renumber(_identities(answers, needed=equal is None), problem)
    return codes if equal is None else _join_equal(codes, answers, bounds, equal)


def _identities(answers: Any, *, needed: bool) -> Int:
    """Equal codes for what Python finds equal; where that is not `needed`, each its own will do."""
    if isinstance(answers, np.ndarray) and answers.dtype.kind in "biuUS":
        return _first_appearance(answers)
    if isinstance(answers, np.ndarray) and answers.dtype.kind == "f":
        values, codes = np.unique(answers, return_inverse=True)
        return np.where(values != values, NULL, np.arange(len(values)))[codes].astype(np.int64)
    table: dict[Any, int] = {}
    try:
        codes = np.array([table.setdefault(answer, len(table)) for answer in answers], np.int64)
    except TypeError:
        if needed:
            kind = next(type(a).__name__ for a in answers if not _is_hashable(a))
            wanted = "hashable answers, or `equal` or `key` to compare them by"
            raise InputError(f"answers: got an unhashable {kind}, want {wanted}") from None
        return np.array([NULL if is_null(a) else i for i, a in enumerate(answers)], np.int64)
    meaning = [NULL if is_null(answer) else code for answer, code in table.items()]
    return np.array(meaning, np.int64)[codes] if len(codes) else codes


def _is_hashable(answer: Any) -> bool:
    try:
        hash(answer)
    except TypeError:
        return False
    return True


def _first_appearance(values: NDArray[Any]) -> Int:
    """Equal integers, truth values or texts by number, 0, 1, ... in order of first appearance.

    Told apart by their bytes, so that surrogates and foreign byte orders will do.
    """
    held = np.ascontiguousarray(values)
    if held.dtype.kind == "i" and held.dtype.isnative:  # twice as fast
        return np.asarray(pa.array(held).dictionary_encode().indices, np.int64)
    buffers = [None, pa.py_buffer(held)]
    same = pa.FixedSizeBinaryArray.from_buffers(pa.binary(held.itemsize), len(held), buffers)
    return np.asarray(same.dictionary_encode().indices, np.int64)


def _renumber(codes: Int, problem: Int) -> Int:
    """The same groups, numbered in each problem in order of first appearance."""
    seen = codes != NULL
    if not seen.all():
        out = np.full(len(codes), NULL, np.int64)
        out[seen] = _renumber(codes[seen], problem[seen])
        return out
    if not len(codes):
        return codes
    group = _first_appearance(problem * (codes.max() + 1) + codes)
    begins = np.flatnonzero(np.append(True, problem[1:] != problem[:-1]))
    # a problem's first sample begins a group
    return group - np.repeat(group[begins], np.diff(begins, append=len(codes)))


def _join_equal(codes: Int, answers: Any, bounds: Int, equal: Equal) -> Int:
    """Groups joined that a given equality finds equal: each to the first whose head it equals."""
    out = codes.copy()
    for start, stop in pairwise(bounds):
        here = codes[start:stop]
        heads: list[Any] = []
        joined = np.full(here.max(initial=NULL) + 1, NULL, np.int64)
        for code, first in zip(*np.unique(here, return_index=True), strict=True):
            if code == NULL:
                continue
            answer = answers[start + first]
            match = (g for g, head in enumerate(heads) if equal(head, answer))
            joined[code] = next(match, len(heads))
            if joined[code] == len(heads):
                heads.append(answer)
        out[start:stop] = np.where(here == NULL, NULL, joined[here] if len(joined) else NULL)
    return out


# ── votes ───────────────────────────────────────────────────────────────────────────────────────


def count_votes(codes: ArrayLike, weights: ArrayLike | None = None) -> Float:
    """What each group gets: the number of its samples, or the sum of their weights.

    codes: int (..., n), -1 for null; weights: broadcastable to it. -> float64 (..., G), where G is
    one more than the largest code. O(size + rows · G) time and memory.

    >>> count_votes([[0, 0, 1, -1], [1, 0, 1, 1]]).tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """
    code = np.asarray(codes, np.int64)
    rows = code.reshape(-1, code.shape[-1])
    groups = int(code.max(initial=NULL)) + 1
    # nulls are counted in a column of their own, which is then left out
    cells = (rows + 1 + (groups + 1) * np.arange(len(rows))[:, None]).reshape(-1)
    each = None if weights is None else np.broadcast_to(np.asarray(weights), code.shape).reshape(-1)
    totals = np.bincount(cells, each, minlength=len(rows) * (groups + 1))
    shape = (*code.shape[:-1], groups + 1)
    return totals.astype(np.float64).reshape(shape)[..., 1:]


def split_ties(scores: ArrayLike, slack: ArrayLike = 0.0) -> Float:
    """Probabilities of the winners along the last axis: 1 shared by all that tie for the best.

    scores: (..., G), -inf for what can't win; all -inf (or G = 0) has no winner, and gives zeros.
    slack: scores no further than this below the best tie with it (sums round).

    >>> split_ties([[3.0, 1.0, 3.0], [-np.inf, -np.inf, -np.inf]]).tolist()
    [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    """
    score = np.asarray(scores, np.float64)
    best = score.max(axis=-1, keepdims=True, initial=-np.inf)
    wins = (score >= best - np.asarray(slack)) & (score > -np.inf)
    return wins / np.maximum(wins.sum(axis=-1, keepdims=True), 1)


# ── a random k of n ─────────────────────────────────────────────────────────────────────────────


def miss_probabilities(n: int, c: ArrayLike, ks: ArrayLike) -> Float:
    """The probability that k of n samples, drawn without replacement, miss c given ones.

    C(n-c, k) / C(n, k)  =  Π_{j=n-c+1}^{n} (1 - k/j)  =  Π_{i=0}^{k-1} (1 - c/(n-i))

    c: int (P,), 0 ≤ c ≤ n; ks: int (K,), 1 ≤ k ≤ n. -> float64 (P, K), each in [0, 1].
    Running products, of whichever kind is the shorter, over the distinct c; every factor is one
    correctly rounded division, and the error stays below 1e-12 for n up to a million.
    Where a product over the c falls below 1e-20 it is given as 0.
    Time O(P log P + min(Σ_k min(max c, 46 n/k), P max k)), memory O(n + P K).

    >>> miss_probabilities(5, [0, 2, 5], [1, 2]).round(12).tolist()
    [[1.0, 1.0], [0.6, 0.3], [0.0, 0.0]]
    """
    k = np.atleast_1d(np.asarray(ks, np.int64))
    given, place = np.unique(np.asarray(c, np.int64), return_inverse=True)
    most, longest = int(given.max(initial=0)), int(k.max(initial=1))
    miss = np.empty((len(given), len(k)))
    by_draw = k <= (longest if len(given) * longest <= len(k) * most else FEW_DRAWS)
    if by_draw.any():
        i = np.arange(k[by_draw].max())
        step = max(1, TABLE_CELLS // len(i))
        for start in range(0, len(given), step):
            left = np.maximum(n - i - given[start : start + step, None], 0)
            miss[start : start + step, by_draw] = np.cumprod(left / (n - i), 1)[:, k[by_draw] - 1]
    for column in np.flatnonzero(~by_draw):
        j = n - np.arange(min(most, int(VANISHED * n / k[column]) + 1))
        product = np.concatenate([[1.0], np.cumprod(np.maximum(j - k[column], 0) / j), [0.0]])
        miss[:, column] = product[np.minimum(given, len(product) - 1)]
    # a product that goes down by 1/n each time gathers roundings of one sign: 4e-12 for a million
    miss[given == 1] = (n - k) / n
    return np.asarray(miss[place], np.float64)


def max_rank_probabilities(n: int, ks: ArrayLike) -> Float:
    """The probability that the best of k samples, drawn of n without replacement, has rank j.

    C(n-j, k-1) / C(n, k) for j = 1 (the best of all) .. n, as a running product.
    ks: int (K,), 1 ≤ k ≤ n. -> float64 (K, n); rows sum to 1. O(K n) time and memory.

    >>> max_rank_probabilities(4, [1, 2, 4]).round(12).tolist()
    [[0.25, 0.25, 0.25, 0.25], [0.5, 0.333333333333, 0.166666666667, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """
    k = check_subset_sizes(ks, n)[:, None]
    j = np.arange(1, n)
    ratio = np.maximum(n - j - k + 1, 0) / (n - j)
    return np.cumprod(np.concatenate([k / n, ratio], axis=1), axis=1)


def expected_maximum(scores: ArrayLike, ks: ArrayLike, credit: ArrayLike | None = None) -> Float:
    """The expected best score of k of n samples, or the expected credit of the best-scored one.

    Σ_j P(the best has rank j) · score of rank j. With `credit` (same shape), the credit of the
    sample that has the best score; samples of equal score are taken with equal probability.

    scores: (..., n) without NaN, finite if there is no `credit`; ks: int (K,), 1 ≤ k ≤ n.
    -> float64 (..., K).
    The expected *worst* score is -expected_maximum(-scores, ks). O(n log n + K n) a problem.

    >>> expected_maximum([1.0, 2.0, 4.0], [1, 2, 3]).round(9).tolist()
    [2.333333333, 3.333333333, 4.0]
    >>> expected_maximum([0.3, 0.9, 0.9], [1, 3], credit=[1, 0, 1]).round(9).tolist()
    [0.666666667, 0.5]
    """
    score = np.asarray(scores, np.float64)
    require(score.ndim >= 1 and score.size > 0, "scores", f"shape {score.shape}", "samples")
    require(not np.isnan(score).any(), "scores", "NaN", "numbers")
    finite = credit is not None or bool(np.isfinite(score).all())
    require(finite, "scores", "infinite ones", "finite numbers, to have a mean")
    chances = max_rank_probabilities(score.shape[-1], ks)
    order = np.argsort(-score, axis=-1, kind="stable")
    ranked = np.take_along_axis(score, order, -1)
    if credit is None:
        return np.asarray(ranked @ chances.T)
    gains = np.take_along_axis(np.asarray(credit, np.float64), order, -1)
    starts = np.ones(score.shape, bool)
    starts[..., 1:] = ranked[..., 1:] != ranked[..., :-1]
    tie = np.cumsum(starts.reshape(-1)) - 1  # equal scores of one problem share a number
    shared = np.bincount(tie, gains.reshape(-1)) / np.bincount(tie)
    return np.asarray(shared[tie].reshape(score.shape) @ chances.T)


def check_subset_sizes(ks: ArrayLike, n: int) -> Int:
    """Subset sizes as int64 (K,), or an InputError unless they are whole numbers from 1 to n.

    >>> check_subset_sizes(9, 8)
    Traceback (most recent call last):
    scoredraw.errors.InputError: k: got 9, want whole numbers from 1 to 8, the number of samples
    """
    sizes = np.atleast_1d(whole_numbers(ks, "k"))
    require(sizes.ndim == 1 and sizes.size > 0, "k", f"shape {sizes.shape}", "one or more sizes")
    wrong = sizes[(sizes < 1) | (sizes > n)]
    wanted = f"whole numbers from 1 to {n}, the number of samples"
    require(not wrong.size, "k", wrong[:1].sum(), wanted)
    return sizes


def whole_numbers(values: ArrayLike, argument: str) -> Int:
    """An array of whole numbers as int64, or an InputError that names the argument.

    >>> whole_numbers([1.0, 2.5], "c")
    Traceback (most recent call last):
    scoredraw.errors.InputError: c: got 2.5, want whole numbers
    """
    array = np.asarray(values)
    require(array.dtype.kind in "biuf", argument, f"type {array.dtype}", "whole numbers")
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(array) & (np.mod(array, 1) == 0) if array.dtype.kind == "f" else True
    if not np.all(whole):
        raise InputError(f"{argument}: got {array[~np.asarray(whole)][0]}, want whole numbers")
    return array.astype(np.int64)


# ── the samples of one problem ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class AnswerPool:
    """The n sampled answers of one problem, and what is known of each sample.

    codes: int64 (n,), groups of equal answers, -1 for null (see `group_answers`).
    rewards: float64 (n,), higher is better; finite, but -inf is allowed for a null answer.
    logprobs: float64 (n,), log-probability of the whole sample in nats, ≤ 0; -inf is allowed.
    lengths: int64 (n,), tokens of the sample, ≥ 1.
    texts: the n sampled texts; answers: the G distinct answers, by code.
    paths: int64 (n,), equal numbers for the same sampled text (by default those of `texts`, and
    where these are unknown too, every sample is a path of its own: see `path_codes`).
    All but `codes` may be None. Raises InputError, naming the index, for what breaks these rules.

    >>> pool = AnswerPool.of(["7", None, "12", "7"], logprobs=[-2.0, -1.0, -3.0, -4.0])
    >>> pool.n, pool.groups, pool.codes.tolist(), pool.answers
    (4, 2, [0, -1, 1, 0], ('7', '12'))
    """

    codes: Int
    rewards: Float | None = None
    logprobs: Float | None = None
    lengths: Int | None = None
    texts: tuple[str, ...] | None = None
    answers: tuple[Any, ...] | None = None
    paths: Int | None = None

    @classmethod
    def of(
        cls,
        answers: Sequence[Any] | NDArray[Any],
        *,
        rewards: ArrayLike | None = None,
        logprobs: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        texts: Sequence[str] | None = None,
        paths: Sequence[Any] | NDArray[Any] | None = None,
        equal: Equal | None = None,
        key: Key | None = None,
    ) -> AnswerPool:
        """The pool of a sequence of answers, grouped by `group_answers`."""
        codes = group_answers(answers, equal=equal, key=key)
        first = np.unique(codes, return_index=True)[1][int((codes == NULL).any()) :]
        distinct = tuple(answers[i] for i in first)
        given: dict[str, Any] = {"rewards": rewards, "logprobs": logprobs, "lengths": lengths}
        given["texts"] = None if texts is None else tuple(texts)
        given["paths"] = None if paths is None else group_answers(paths)
        return cls(codes, **given, answers=distinct)

    def __post_init__(self) -> None:
        codes = whole_numbers(self.codes, "codes")
        require(codes.ndim == 1 and codes.size > 0, "answers", f"shape {codes.shape}", "samples")
        require(bool((codes >= NULL).all()), "codes", codes.min(), "-1 for null, or a group")
        object.__setattr__(self, "codes", codes)
        self._keep_numbers("rewards", lambda x: np.isfinite(x) | ((x == -np.inf) & self.null))
        self._keep_numbers("logprobs", lambda x: x <= 0, "log-probabilities of at most 0")
        self._keep_numbers("lengths", lambda x: (x >= 1) & (x % 1 == 0), "whole numbers of tokens")
        if self.lengths is not None:
            object.__setattr__(self, "lengths", self.lengths.astype(np.int64))
        if self.texts is not None:
            self._check_length("texts", len(self.texts))
            object.__setattr__(self, "texts", tuple(self.texts))
        if self.paths is not None:
            object.__setattr__(self, "paths", whole_numbers(self.paths, "paths"))
            self._check_length("paths", len(self.paths))

    def _keep_numbers(
        self, name: str, fits: Callable[[Float], NDArray[np.bool_]], wanted: str = "finite numbers"
    ) -> None:
        if getattr(self, name) is None:
            return
        try:
            values = np.asarray(getattr(self, name), np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{name}: got what is not a number, want {wanted}") from None
        require(values.ndim == 1, name, f"{values.ndim} dimensions", "one")
        self._check_length(name, len(values))
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~fits(values))
        if wrong.size:
            raise InputError(f"{name}: got {values[wrong[0]]} at index {wrong[0]}, want {wanted}")
        object.__setattr__(self, name, values)

    def _check_length(self, name: str, length: int) -> None:
        require(length == self.n, name, f"{length} values", f"{self.n}, one for each answer")

    @property
    def n(self) -> int:
        """The number of samples, null ones included."""
        return len(self.codes)

    @property
    def groups(self) -> int:
        """The number of distinct answers."""
        return int(self.codes.max()) + 1

    @property
    def null(self) -> NDArray[np.bool_]:
        """Which samples have no readable answer."""
        return self.codes == NULL

    @property
    def path_codes(self) -> Int:
        """Which samples are the same text: int64 (n,), numbered from 0 as they first appear.

        >>> AnswerPool.of(["7", "7", "8"], texts=["it is 7", "it is 7", "8"]).path_codes.tolist()
        [0, 0, 1]
        """
        if self.paths is not None:
            return np.unique(self.paths, return_inverse=True)[1].astype(np.int64)
        return np.arange(self.n) if self.texts is None else group_answers(self.texts)

    def scores(self, name: str) -> Float:
        """The scores "rewards", "sum_logprob" or "mean_logprob" (a token), higher is better.

        Raises InputError where the pool lacks what they are made of.
        """
        if name == "rewards":
            return np.asarray(self._given("rewards"))
        total = np.asarray(self._given("logprobs"))
        return total / self._given("lengths") if name == "mean_logprob" else total

    def _given(self, name: str) -> Any:
        value = getattr(self, name)
        require(value is not None, name, None, "one for each answer, which this method needs")
        return value

    def take(self, indices: ArrayLike) -> AnswerPool:
        """The pool of some of the samples; groups keep their codes.

        >>> AnswerPool.of(["a", "b", "b"], rewards=[1, 2, 3]).take([2, 0]).rewards.tolist()
        [3.0, 1.0]
        """
        chosen = np.asarray(indices, np.int64)
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("codes", "rewards", "logprobs", "lengths", "paths"):
            parts[name] = None if parts[name] is None else parts[name][chosen]
        if self.texts is not None:
            parts["texts"] = tuple(self.texts[i] for i in chosen)
        return AnswerPool(**parts)
