"""chrF of whole matrices against sacrebleu pair by pair; equality, cosine, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.language.text_utilities import (
    TextUtility,
    chrf,
    chrf_matrix,
    embedding_cosine,
    equality,
    pairwise,
    text_utility,
)

sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="the extra language is not installed")

texts = st.lists(st.text("ab é中\n\t", max_size=12) | st.text(max_size=8), min_size=1, max_size=5)


def pair_by_pair(rows: list[str], columns: list[str], **how: Any) -> np.ndarray:
    metric = sacrebleu.CHRF(**how)
    return np.array([[metric.sentence_score(a, [b]).score for b in columns] for a in rows])


@pytest.mark.property
@settings(max_examples=150)
@given(texts, texts, st.integers(1, 7), st.sampled_from([1, 2, 3]))
def test_chrf_is_that_of_sacrebleu(
    rows: list[str], columns: list[str], char_order: int, beta: int
) -> None:
    want = pair_by_pair(rows, columns, char_order=char_order, beta=beta)
    found = chrf_matrix(rows, columns, char_order=char_order, beta=beta)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-9)
    back = pair_by_pair(columns, rows, char_order=char_order, beta=beta).T
    both = chrf_matrix(rows, columns, char_order=char_order, beta=beta, symmetric=True)
    np.testing.assert_allclose(both, (want + back) / 2, rtol=0, atol=1e-9)


@pytest.mark.oracle
def test_chrf_of_longer_texts_and_repeated_ones() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("aabcdefgh    ."))
    rows = ["".join(rng.choice(letters, size)) for size in (1, 5, 60, 300, 300)]
    rows += [rows[2], "a" * 200, "", " \n"]
    want = pair_by_pair(rows, rows[::-1])
    np.testing.assert_allclose(chrf()(rows, rows[::-1]), want, rtol=0, atol=1e-9)
    assert (want[-2:] == 0).all()  # empty texts, also against themselves
    assert not np.allclose(chrf()(rows, rows), chrf()(rows, rows).T)  # recall counts more
    both = chrf(symmetric=True)(rows, rows)
    np.testing.assert_allclose(both, both.T, rtol=0, atol=1e-12)
    assert chrf()(rows, []).shape == (len(rows), 0)


@pytest.mark.oracle
def test_chrf_of_a_pool_is_fast() -> None:
    """64 texts of 400 characters: some 30 ms where sacrebleu takes seconds; 20 times that here."""
    rng = np.random.default_rng(1)
    pool = ["".join(rng.choice(list("abcdefghijklmno   "), 400)) for _ in range(64)]
    started = time.process_time()
    chrf_matrix(pool, pool)
    assert time.process_time() - started < 0.6


@pytest.mark.oracle
def test_equality() -> None:
    found = equality()(["7", None, "", float("nan")], ["7", "", None])
    assert found.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    by_number = equality(lambda text: float(text) if text else None)
    assert by_number(["1.0", ""], ["1", ""]).tolist() == [[1, 0], [0, 0]]
    assert (equality().crosses_languages, by_number.crosses_languages) == (False, True)


@pytest.mark.oracle
def test_cosine_is_of_directions() -> None:
    vectors = {"a": [1.0, 0.0], "b": [3.0, 3.0], "zero": [0.0, 0.0]}
    u = embedding_cosine(lambda pool: np.array([vectors[text] for text in pool], np.float32))
    found = u(["a", "b", "zero"], ["a", "b"])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[1, half], [half, 1], [0, 0]], atol=1e-12)
    assert not u.crosses_languages
    assert embedding_cosine(len, crosses_languages=True).crosses_languages  # type: ignore[arg-type]


@pytest.mark.oracle
def test_a_function_of_two_texts_is_asked_in_order() -> None:
    asked = []

    def u(candidate: str, evidence: str) -> float:
        asked.append(candidate + evidence)
        return float(candidate < evidence)

    assert text_utility(u)(["a", "c"], ["b", "d"]).tolist() == [[1, 1], [0, 1]]
    assert asked == ["ab", "ad", "cb", "cd"]
    assert text_utility(u).name == "u"
    known = chrf()
    assert text_utility(known) is known
    assert text_utility("symmetric-chrf").name == "symmetric chrF"


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text_utility("bleu"), "utility: got bleu, want a function or one of chrf"),
        (lambda: chrf_matrix(["a"], ["b"], char_order=0), "char_order: got 0"),
        (lambda: chrf_matrix(["a"], ["b"], beta=0), "beta: got 0"),
        (lambda: chrf_matrix([1], ["b"]), "texts: got what is not text"),  # type: ignore[list-item]
        (lambda: chrf_matrix([["a"]], ["b"]), "texts: got"),  # type: ignore[list-item]
        (lambda: pairwise(lambda a, b: float("nan"))(["a"], ["b"]), "<lambda>: got NaN"),
        (lambda: TextUtility("u", lambda a, b: [1.0])(["a"], ["b"]), "u: got shape"),
        (lambda: embedding_cosine(lambda t: [1.0])(["a"], ["b"]), "encode: got shape"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
