"""Segments of text: the punctuation that ends one, and which of several drawn is kept.

A segment reaches to the first token that ends in a punctuation mark, and holds it. Of n drawn
independently, the one of lowest perplexity exp(-mean log p(token)) is kept, the first of equals:

    P(kept perplexity = v) = Q_{≥v}^n - Q_{>v}^n,    Q the probability of a segment so perplexing

Cautious decoding (`cautious_decoding`) is made of such choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require

Float = NDArray[np.float64]

MARKS = ".,\n?!:;)]}"
SETS = ("vocabulary", "official")


def punctuation_ids(
    tokenizer: Any, marks: Sequence[str] = MARKS, *, which: str = "vocabulary"
) -> NDArray[np.int64]:
    r"""The ids of tokens that end in a punctuation mark, int64, ascending.

    marks: one character each. which: "vocabulary" takes every token whose text, blanks at its end
    aside, ends in a mark (also ``.\n``, `` .`` and ``...``); "official" the first
    token of each mark encoded on its own, as the released code of cautious decoding does. That
    misses merged tokens; and where a tokenizer sets a blank before a text (Llama 2), the mark that
    follows a word is another token than the one found, and a newline gives the blank itself.
    Special tokens never count.

    tokenizer: of transformers. Raises `InputError` for no marks, or marks that no token ends in.
    O(vocabulary).
    """
    require(which in SETS, "which", repr(which), f"one of {', '.join(SETS)}")
    require(len(marks) > 0, "marks", "none", "at least one punctuation mark")
    special = set(tokenizer.all_special_ids)
    if which == "official":
        coded = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in marks]
        found = {int(ids[0]) for ids in coded if ids} - special
    else:
        ids = [i for i in range(len(tokenizer)) if i not in special]
        texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        ends = tuple(marks)
        found = {i for i, text in zip(ids, texts, strict=True) if text.rstrip(" \t").endswith(ends)}
    require(bool(found), "marks", repr(marks), "marks that a token of this tokenizer ends in")
    return np.array(sorted(found), np.int64)


def segment_perplexity(logprobs: ArrayLike) -> float:
    """exp(-mean log p) of a segment's tokens (m,); inf where one has probability 0.

    Raises `InputError` for no tokens.

    >>> round(segment_perplexity(np.log([0.5, 0.125])), 12)
    4.0
    """
    values = np.asarray(logprobs, np.float64)
    require(values.size > 0, "logprobs", "none", "those of one token or more")
    return float(np.exp(-values.mean()))


def best_segment(perplexities: ArrayLike) -> int:
    """The trial that is kept: the first of the lowest perplexity, the first if all are infinite.

    >>> best_segment([2.5, 1.5, 1.5]), best_segment([np.inf, np.inf])
    (1, 0)
    """
    return int(np.argmin(np.asarray(perplexities, np.float64)))


def segment_law(q: ArrayLike, perplexities: ArrayLike, n: ArrayLike) -> Float:
    """The probability that each segment is the one kept of n trials, float64 (..., S).

    P(perplexity = v) = Q_{≥v}^n - Q_{>v}^n, where Q is the mass of the segments with at least, or
    more than, that perplexity; shared by q within a tie, since the first trial wins. q: (S,)
    probabilities, summing to 1. n: counts of any shape. Raises `InputError` for q that is none, or
    n < 1. O(S log S).

    >>> segment_law([0.9, 0.1], [1.0, 2.0], 3).round(3).tolist()
    [0.999, 0.001]
    """
    q, v = np.asarray(q, np.float64), np.asarray(perplexities, np.float64)
    fine = q.ndim == 1 and q.shape == v.shape and (q >= 0).all() and abs(q.sum() - 1) < 1e-9
    require(bool(fine), "q", f"a sum of {q.sum():g}", "probabilities of the segments, summing to 1")
    counts = np.asarray(n)
    require(bool((counts >= 1).all()), "n", n, "at least one trial")
    _, group = np.unique(v, return_inverse=True)
    mass = np.bincount(group, q)
    above = np.append(np.cumsum(mass[::-1])[::-1], 0.0)  # Q_{≥v} of each level, then nothing
    levels = above ** counts[..., None]
    kept = levels[..., :-1] - levels[..., 1:]
    share = np.divide(q, mass[group], out=np.zeros_like(q), where=mass[group] > 0)
    law: Float = kept[..., group] * share
    return law
