"""Surface metrics of texts: each against its definition on texts small enough to count."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.data_selection.text_metrics import METRICS, text_metrics, word_counts
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

TEXT = "The cat's mat isn't extraordinary.\nIs it? No: 12 + 7."


def of(text: str, *others: str, **options: Any) -> dict[str, float]:
    return dict(zip(METRICS, text_metrics([text, *others], **options)[0], strict=True))


def test_a_text_counted_by_hand() -> None:
    words = ["the", "cat's", "mat", "isn't", "extraordinary", "is", "it", "no"]
    found = of(TEXT)
    n = len(TEXT)
    assert word_counts([TEXT]).tolist() == [8]
    assert found["word_length"] == pytest.approx(sum(map(len, words)) / 8)
    assert found["sentence_length"] == pytest.approx(8 / 3)
    assert found["type_token"] == 1
    assert found["long_words"] == pytest.approx(1 / 8)
    assert found["digits"] == pytest.approx(3 / n)
    assert found["symbols"] == pytest.approx(7 / n)  # ' ' . ? : + .
    assert found["newlines"] == pytest.approx(1 / n)
    assert found["log_length"] == pytest.approx(np.log(9))
    assert found["stop_words"] == pytest.approx(4 / 8)  # the is it no
    assert found["compressibility"] == pytest.approx(1 - len(zlib.compress(TEXT.encode())) / n)


def test_rarity_is_read_off_the_column_or_a_reference() -> None:
    # a ×3, b ×1: p(a) = 4/7, p(b) = 2/7
    rows = text_metrics(["a b", "a a"])[:, METRICS.index("rarity")]
    np.testing.assert_allclose(rows, [-np.log(8 / 49) / 2, -np.log(4 / 7)])
    # reference: a ×1, c ×2; b was never seen: p(a) = 2/6, p(b) = 1/6
    rows = text_metrics(["a b", "A"], reference=["c c a"])[:, METRICS.index("rarity")]
    np.testing.assert_allclose(rows, [-np.log(2 / 36) / 2, -np.log(2 / 6)])
    np.testing.assert_allclose(of("a a b")["type_token"], 2 / 3)


def test_letters_of_all_scripts() -> None:
    found = of("Ünïcode слово 文字。 ١٢")
    assert found["word_length"] == pytest.approx((7 + 5 + 2) / 3)
    assert found["digits"] == pytest.approx(2 / 20)
    assert found["symbols"] == pytest.approx(1 / 20)
    assert word_counts(["don't 'quote' rock 'n' roll x2y A--b"]).tolist() == [9]


def test_quality_it_can_see() -> None:
    repeated, prose = of("spam " * 50), of("Each of these words differs from what came before it.")
    assert repeated["compressibility"] > prose["compressibility"]
    assert repeated["type_token"] < prose["type_token"]


@settings(max_examples=25)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=5))
@pytest.mark.property
def test_any_text_has_finite_metrics_of_its_own(texts: list[str]) -> None:
    texts = [t.encode("utf-8", "ignore").decode() for t in texts]
    rows = text_metrics(texts)
    assert rows.shape == (len(texts), 11)
    assert np.isfinite(rows).all()
    assert (np.delete(rows, METRICS.index("compressibility"), axis=1) >= 0).all()
    shares = [METRICS.index(m) for m in METRICS if m in (
        "type_token", "long_words", "digits", "symbols", "newlines", "stop_words")]  # fmt: skip
    assert (rows[:, shares] <= 1).all()
    own = np.delete(np.arange(11), METRICS.index("rarity"))
    alone = np.vstack([text_metrics([t]) for t in texts])
    np.testing.assert_allclose(rows[:, own], alone[:, own])
    assert word_counts(texts).tolist() == np.expm1(rows[:, METRICS.index("log_length")]).round(
    ).tolist()  # fmt: skip


def test_inputs() -> None:
    rows = text_metrics(["one text", "two"])
    np.testing.assert_allclose(rows, text_metrics(pa.array(["one text", "two"])))
    np.testing.assert_allclose(rows, text_metrics(pa.chunked_array([["one text"], ["two"]])))
    np.testing.assert_allclose(rows, text_metrics(t for t in ("one text", "two")))
    np.testing.assert_allclose(rows, text_metrics(pa.array(["x", "one text", "two"])[1:]))
    assert not text_metrics([""]).any()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("a text", "texts: got a single text"),
        ([], "texts: got none"),
        ([1, 2], "texts: got values of type int64"),
        (["a", 3], "texts: got"),
        (["a", None], "texts: got 1 missing"),
        (["\ud800"], "texts: got"),
        (3, "texts: got"),
    ],
)
def test_bad_texts(texts: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        text_metrics(texts)
