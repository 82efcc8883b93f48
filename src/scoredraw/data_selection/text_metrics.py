"""Eleven surface metrics of texts, for want of a judge: quick, without a model, in any number.

They describe a text and do not say which end is better; a user who knows gives `directions` to
what reads them. Words are runs of letters (apostrophes inside), in lower case; a long word has
seven letters or more. All metrics of a text without words are 0 where they are about words.

    word_length     letters a word               sentence_length  words a sentence
    type_token      different words / words      long_words       share of long words
    rarity          mean -log p(word)            stop_words       share of function words
    digits, symbols, newlines                    share of the characters
    compressed      bytes by zlib / bytes        log_length       log(1 + words)

Rarity reads the frequencies of the texts given, or of a reference; so it is a property of the
column, all others are of the text (row-local).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Int = NDArray[np.int64]

METRICS = (
    *("word_length", "sentence_length", "type_token", "long_words", "rarity", "digits"),
    *("symbols", "compressibility", "log_length", "newlines", "stop_words"),
)
LONG = 7
WORD_BREAK = r"[^\p{L}\p{M}']+"
SENTENCE_END = r"[.!?。！？]+(?:\s|$)"
FUNCTION_WORDS = (
    *("the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "as", "was", "with", "be"),
    *("by", "on", "not", "he", "his", "but", "at", "are", "this", "have", "had", "from", "or"),
    *("which", "one", "you", "were", "all", "her", "she", "they", "their", "an", "we", "has"),
    *("been", "if", "when", "will", "would", "who", "so", "no", "can", "its", "than", "then"),
)


class Words(NamedTuple):
    """The words of a column: text and code of each occurrence, (w,), and the words coded."""

    text: Int
    code: Int
    vocabulary: Any  # Arrow strings


def text_metrics(texts: Iterable[str], *, reference: Sequence[str] | None = None) -> Float:
    """The eleven `METRICS` of each text, float64 (n, 11), finite.

    texts: n strings, or an Arrow column of them. reference: texts whose word frequencies say what
    is rare; by default the texts themselves. p(word) = (count + 1) / (words + different words + 1).

    Raises InputError for no texts, or something that isn't text. Time and memory O(characters);
    only zlib is called once a text.

    >>> rows = text_metrics(["The cat sat. It purred.", "x = 3"])
    >>> rows.shape, dict(zip(METRICS, rows[0].round(2).tolist()))["sentence_length"]
    ((2, 11), 2.5)
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = as_column(texts, "texts")
    n = len(column)
    words = split_words(column)
    count = np.bincount(words.text, minlength=n).astype(np.float64)
    characters = _numbers(pc.utf8_length(column))
    letters = _numbers(pc.utf8_length(words.vocabulary))
    known = pa.array(FUNCTION_WORDS, pa.large_string())
    is_stop = _numbers(pc.is_in(words.vocabulary, value_set=known))

    def mean_of(values: Float) -> Float:  # over the words of each text
        total = np.bincount(words.text, values[words.code], minlength=n)
        return np.asarray(total / np.maximum(count, 1))

    def share(pattern: str) -> Float:  # of the characters
        return _numbers(pc.count_substring_regex(column, pattern)) / np.maximum(characters, 1)

    different = np.unique(words.text * (len(letters) + 1) + words.code) // (len(letters) + 1)
    sentences = np.maximum(1, _numbers(pc.count_substring_regex(column, SENTENCE_END)))
    found = {
        "word_length": mean_of(letters),
        "sentence_length": count / sentences,
        "type_token": np.bincount(different, minlength=n) / np.maximum(count, 1),
        "long_words": mean_of((letters >= LONG).astype(np.float64)),
        "rarity": mean_of(_rarities(words, reference)),
        "digits": share(r"\p{Nd}"),
        "symbols": share(r"[^\p{L}\p{M}\p{N}\s]"),
        "compressibility": _saved(column),
        "log_length": np.log1p(count),
        "newlines": share(r"\n"),
        "stop_words": mean_of(is_stop),
    }
    return np.column_stack([found[name] for name in METRICS])


def word_counts(texts: Iterable[str]) -> Int:
    """Words of each text, int64 (n,): a budget's tokens where no tokenizer is at hand.

    >>> word_counts(["The cat's here.", "", "1 2 3"]).tolist()
    [3, 0, 0]
    """
    column = as_column(texts, "texts")
    return np.bincount(split_words(column).text, minlength=len(column)).astype(np.int64)


def as_column(texts: Any, argument: str) -> Any:
    """Texts as one Arrow array of large strings. Raises InputError."""
    import pyarrow as pa

    wanted = "a text for each document"
    require(not isinstance(texts, str | bytes), argument, "a single text", wanted)
    given = isinstance(texts, pa.Array | pa.ChunkedArray)
    try:
        column = texts if given else pa.array(list(texts))
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        require(len(column) > 0, argument, "none", wanted)
        kind = column.type
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        require(textual, argument, f"values of type {kind}", wanted)
        require(column.null_count == 0, argument, f"{column.null_count} missing", wanted)
        return column.cast(pa.large_string())
    except (TypeError, UnicodeError, pa.ArrowException) as error:
        came = str(error).splitlines()[0]
        raise InputError(f"{argument}: got {came}, want {wanted}") from None


def split_words(column: Any) -> Words:
    """The words of an Arrow column of texts, in lower case."""
    import pyarrow.compute as pc

    pieces = pc.split_pattern_regex(pc.utf8_lower(column), WORD_BREAK)
    text, words = pc.list_parent_indices(pieces), pc.utf8_trim(pc.list_flatten(pieces), "'")
    real = pc.greater(pc.utf8_length(words), 0)
    coded = pc.dictionary_encode(words.filter(real))
    return Words(
        text.filter(real).to_numpy().astype(np.int64),
        coded.indices.to_numpy().astype(np.int64),
        coded.dictionary,
    )


def _rarities(words: Words, reference: Sequence[str] | None) -> Float:
    """-log p of each word of the vocabulary."""
    import pyarrow.compute as pc

    if reference is None:
        counts = np.bincount(words.code, minlength=len(words.vocabulary)).astype(np.float64)
        total, different = len(words.code), len(counts)
    else:
        other = split_words(as_column(reference, "reference"))
        known = np.bincount(other.code, minlength=len(other.vocabulary)).astype(np.float64)
        place = pc.fill_null(pc.index_in(words.vocabulary, value_set=other.vocabulary), -1)
        counts = np.append(known, 0.0)[place.to_numpy()]
        total, different = len(other.code), len(known)
    return np.asarray(np.log(total + different + 1) - np.log(counts + 1))


def _saved(column: Any) -> Float:
    data = [text.encode() for text in column.to_pylist()]
    return np.array([1 - len(zlib.compress(one)) / len(one) if one else 0.0 for one in data])


def _numbers(values: Any) -> Float:
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
