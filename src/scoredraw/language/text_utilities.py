r"""How good one text is in the light of another: utilities for a choice by consensus.

A utility u(candidate, evidence) is asked for all pairs at once, as a matrix. Three kinds:

    chrf()              character n-grams in common, 0 .. 100: a surface metric of one language
    equality(key)       1 where two answers are the same, else 0
    embedding_cosine(f) cosine of sentence vectors
    pairwise(f)         a function of two texts, called for every pair

Texts in two languages share hardly an n-gram, so a surface metric says nothing across languages;
`crosses_languages` says which utilities may be asked that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.answers import NULL, group_answers
from scoredraw.errors import require

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Pair = Callable[[Any, Any], float]


@dataclass(frozen=True)
class TextUtility:
    """A named utility: matrix(candidates (N,), evidence (M,)) -> float64 (N, M).

    crosses_languages: whether it means something where candidate and evidence are in different
    languages. Called, it raises `InputError` for a matrix of another shape and for values that
    are NaN or infinite.
    """

    name: str
    matrix: Callable[[Sequence[Any], Sequence[Any]], Any]
    crosses_languages: bool = False

    def __call__(self, candidates: Sequence[Any], evidence: Sequence[Any]) -> Float:
        values = np.asarray(self.matrix(candidates, evidence), np.float64)
        wanted = (len(candidates), len(evidence))
        require(values.shape == wanted, self.name, f"shape {values.shape}", f"{wanted}")
        require(bool(np.isfinite(values).all()), self.name, "NaN or infinity", "finite utilities")
        return values


def text_utility(utility: str | TextUtility | Pair) -> TextUtility:
    """A utility by name ("chrf", "symmetric-chrf", "equality"), or a function of two texts.

    Raises `InputError` for another name.

    >>> text_utility("equality")(["7", "8"], ["8", "7", "7"]).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if isinstance(utility, TextUtility):
        return utility
    if isinstance(utility, str):
        named = {"chrf": chrf(), "symmetric-chrf": chrf(symmetric=True), "equality": equality()}
        require(utility in named, "utility", utility, f"a function or one of {', '.join(named)}")
        return named[utility]
    return pairwise(utility)


def pairwise(f: Pair, *, crosses_languages: bool = False) -> TextUtility:
    """The utility f(candidate, evidence), asked once a pair: a judge, a learned metric.

    >>> pairwise(lambda a, b: -abs(len(a) - len(b)))(["one", "three"], ["seven"]).tolist()
    [[-2.0], [0.0]]
    """

    def matrix(candidates: Sequence[Any], evidence: Sequence[Any]) -> list[list[float]]:
        return [[float(f(a, b)) for b in evidence] for a in candidates]

    return TextUtility(getattr(f, "__name__", "utility"), matrix, crosses_languages)


def equality(key: Callable[[Any], Any] | None = None) -> TextUtility:
    """1 where two answers are equal, else 0; a null answer equals nothing, not even itself.

    key: what of an answer is compared (a parsed number, say; None makes it null). With a key it
    may cross languages: a number is the same in all of them; whole texts are not.

    >>> equality(str.lower)(["Yes", "no"], ["yes"]).tolist()
    [[1.0], [0.0]]
    """

    def matrix(candidates: Sequence[Any], evidence: Sequence[Any]) -> Float:
        codes = group_answers([*candidates, *evidence], key=key)
        ours, theirs = codes[: len(candidates), None], codes[len(candidates) :]
        return np.asarray((ours == theirs) & (ours != NULL), np.float64)

    return TextUtility("equality", matrix, crosses_languages=key is not None)


def embedding_cosine(
    encode: Callable[[Sequence[str]], Any], *, crosses_languages: bool = False
) -> TextUtility:
    """Cosine of sentence vectors; a vector of zeros has cosine 0.

    encode: n texts -> (n, d), such as the `encode` of a sentence-transformers model.
    crosses_languages: whether that model is multilingual. all-MiniLM-L6-v2, for one, knows
    English only. O((N + M) encodings + N M d).

    >>> embedding_cosine(lambda texts: [[len(t), 1.0] for t in texts])(["a"], ["a"]).round(9)
    array([[1.]])
    """

    def unit(texts: Sequence[str]) -> Float:
        vectors = np.asarray(encode(list(texts)), np.float64)
        shape_ok = vectors.ndim == 2 and len(vectors) == len(texts)
        require(shape_ok, "encode", f"shape {vectors.shape}", f"({len(texts)}, d)")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(norms > 0, norms, 1.0))

    def matrix(candidates: Sequence[str], evidence: Sequence[str]) -> Float:
        both = unit([*candidates, *evidence])
        return np.asarray(both[: len(candidates)] @ both[len(candidates) :].T)

    return TextUtility("embedding cosine", matrix, crosses_languages)


# ── chrF ────────────────────────────────────────────────────────────────────────────────────────


def chrf(*, char_order: int = 6, beta: float = 2.0, symmetric: bool = False) -> TextUtility:
    """chrF as a utility, the candidate as the hypothesis; see `chrf_matrix`."""

    def matrix(candidates: Sequence[str], evidence: Sequence[str]) -> Float:
        how: dict[str, Any] = {"char_order": char_order, "beta": beta, "symmetric": symmetric}
        return chrf_matrix(candidates, evidence, **how)

    return TextUtility("symmetric chrF" if symmetric else "chrF", matrix)


def chrf_matrix(
    candidates: Sequence[str],
    evidence: Sequence[str],
    *,
    char_order: int = 6,
    beta: float = 2.0,
    symmetric: bool = False,
) -> Float:
    r"""Sentence chrF of every candidate against every piece of evidence, float64 (N, M), 0 .. 100.

    .. math:: 100\,\frac{(1+\beta^2)PR}{\beta^2P+R},\quad
       P=\frac1{|O|}\sum_{n\in O}\frac{m_n}{h_n},\; R=\frac1{|O|}\sum_{n\in O}\frac{m_n}{r_n}

    over the orders n ≤ char_order at which both texts have n-grams, of their characters without
    white space: h_n and r_n in all, m_n in common (the smaller of the two counts of each). Two
    texts without an n-gram in common, the empty one among them, have 0. The numbers are those of
    sacrebleu (`CHRF(char_order, beta=beta)`), pair by pair, to 1e-9. symmetric: the mean of
    u(a, b) and u(b, a), which differ, since recall counts more.

    Raises `InputError` for char_order < 1, beta ≤ 0 and what is not text. The common counts are a
    product of sparse matrices, one column for the t-th time an n-gram comes: time O(char_order ·
    (L log L + pairs of equal n-grams)) for L characters of distinct texts, memory O(L + N M).

    Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.

    >>> chrf_matrix(["the cat sat", ""], ["the cat sat", "a cat"]).round(2).tolist()
    [[100.0, 41.11], [0.0, 0.0]]
    """
    require(char_order >= 1, "char_order", char_order, "an order of at least 1")
    require(0 < beta < np.inf, "beta", beta, "a positive number")
    texts: dict[str, int] = {}
    try:
        rows = np.array([texts.setdefault(text, len(texts)) for text in candidates], np.int64)
        columns = np.array([texts.setdefault(text, len(texts)) for text in evidence], np.int64)
        letters = ["".join(text.split()) for text in texts]
    except (TypeError, AttributeError):
        require(False, "texts", "what is not text", "strings")
    lengths = np.array([len(each) for each in letters], np.int64)
    a, first = np.unique(rows, return_inverse=True)  # each distinct text once
    b, second = np.unique(columns, return_inverse=True)
    precision, recall, orders = np.zeros((3, len(a), len(b)))
    for n, grams in enumerate(_ngrams(letters, lengths, char_order), 1):
        matches = (grams[a] @ grams[b].T).toarray()
        ours, theirs = (np.maximum(lengths[side] - n + 1, 0) for side in (a, b))
        precision += matches / np.maximum(ours, 1)[:, None]
        recall += matches / np.maximum(theirs, 1)
        orders += (ours[:, None] > 0) & (theirs > 0)
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    below = beta**2 * precision + recall
    score = 100 * (1 + beta**2) * precision * recall / np.where(below > 0, below, 1.0)
    if symmetric:
        below = beta**2 * recall + precision
        score = score / 2 + 50 * (1 + beta**2) * precision * recall / np.where(below > 0, below, 1)
    return np.asarray(score[first[:, None], second])


def _ngrams(letters: Sequence[str], lengths: Int, char_order: int) -> Iterator[Any]:
    """For each order a sparse 0/1 matrix: a row a text, a column the t-th time of an n-gram."""
    from scipy.sparse import csr_array

    joined = "".join(letters).encode("utf-32-le", "surrogatepass")
    characters = _ranks(np.frombuffer(joined, "<u4").astype(np.int64))
    base = int(characters.max(initial=0)) + 1
    text = np.repeat(np.arange(len(letters)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(text))  # to the text's end
    gram = np.zeros(len(text), np.int64)  # the n-gram that begins here
    for n in range(1, char_order + 1):
        begins = np.flatnonzero(left >= n)
        gram[begins] = _ranks(gram[begins] * base + characters[begins + n - 1])
        here, home = gram[begins], text[begins]
        order = np.lexsort((home, here))
        same = np.diff(here[order], prepend=-1) == 0
        same &= np.diff(home[order], prepend=-1) == 0
        place = np.arange(len(order))
        times = place - np.maximum.accumulate(np.where(same, 0, place))  # so often before
        column = _ranks(here[order] * (int(times.max(initial=0)) + 1) + times)
        shape = (len(letters), int(column.max(initial=-1)) + 1)
        ones = np.ones(len(order), np.int64)
        yield csr_array((ones, (home[order], column)), shape=shape)


def _ranks(values: Int) -> Int:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
