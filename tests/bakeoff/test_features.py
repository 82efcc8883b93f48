"""Reading tables and turning rows into features."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from scoredraw import datasets, features
from scoredraw.bakeoff.rows import compare_rows
from scoredraw.errors import InputError
from scoredraw.features import Encoder, has_sentence_encoder, read_examples

pytestmark = pytest.mark.oracle

N = 40
CYCLE = np.arange(N) % 4


def table(**columns) -> pa.Table:
    return pa.table({"x": np.arange(N, dtype=float), "y": CYCLE, **columns})


@pytest.mark.parametrize(
    ("target", "task", "classes"),
    [
        (np.array(["a", "b"])[CYCLE % 2], "classification", ("a", "b")),
        (CYCLE % 2 == 0, "classification", ("False", "True")),
        (CYCLE, "classification", ("0", "1", "2", "3")),
        (CYCLE.astype(float), "classification", ("0", "1", "2", "3")),
        (CYCLE + 0.5, "regression", ()),
        (np.arange(N), "regression", ()),
    ],
)
def test_the_target_decides_the_task(target, task, classes) -> None:
    found = read_examples(table(y=target), "y")
    assert (found.task, found.classes) == (task, classes)
    assert "y" in found.rule


def test_the_task_can_be_declared() -> None:
    assert read_examples(table(), "y", task="regression").task == "regression"
    with pytest.raises(InputError, match=r"^task: got regression on 's'"):
        read_examples(table(s=np.array(["a", "b"])[CYCLE % 2]), "s", task="regression")


def test_columns_are_sorted_by_what_they_hold() -> None:
    day = np.datetime64("2024-01-01") + CYCLE.astype("timedelta64[D]")
    found = read_examples(
        table(
            flag=CYCLE > 1,
            day=pa.array(day),
            town=pa.array(["Ulm", None, "Bonn", "Ulm"] * (N // 4)),
            kind=pa.array(["k"] * N).dictionary_encode(),
            vector=pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * N)), 2),
        ),
        "y",
    )
    assert found.columns == ("x", "flag", "day", "vector", "vector")
    assert found.numeric.shape == (N, 5)
    assert found.numeric[3, 3:].tolist() == [6.0, 7.0]
    assert found.categories["town"][1] == ("", "Bonn", "Ulm")
    assert set(found.categories) == {"town", "kind"}


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (table(), "z", r"^target: got 'z', want one of x, y$"),
        (table(), None, r"^target: got none, want one of x, y$"),
        (table(y=np.ones(N)), "y", r"^target: got the one value .*'y', want at least two$"),
        (table(y=["a"] + ["b"] * (N - 1)), "y", "^target: got 1 row of class a"),
        (table(y=[None] + ["b"] * (N - 1)), "y", "^target: got 1 empty cells"),
        (table(y=[np.nan] + [0.5] * (N - 1)), "y", "^target: got NaN or infinity"),
        (table(x=[np.nan] + [0.5] * (N - 1)), "y", "^data: got nan in 'x', row 0"),
        (table(x=[1.0, None] + [0.5] * (N - 2)), "y", "^data: got nan in 'x', row 1"),
        (table(x=[[1.0]] * N), "y", "^data: got column 'x' of type list"),
        (table().select(["y"]), "y", "^data: got only 'y'"),
        (np.zeros((N, 2, 2)), CYCLE, "^data: got 3 dimensions"),
        (np.zeros((N, 2)), CYCLE[:-1], "^target: got shape"),
        (np.full((N, 2), np.inf), CYCLE, "^data: got inf in 'column 0', row 0"),
        (np.full((N, 2), "a"), CYCLE, "^data: got numbers of type"),
        ("iris", "petal", "^target: got 'petal'"),
    ],
)
def test_tables_that_cannot_be_compared(data, target, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_examples(data, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z", "^text: got 'z'"),
        ("x", "^text: got 'x' of type double"),
        ("y", "^text: got 'y', want another column"),
        ("t", "^text: got 1 empty cells"),
    ],
)
def test_texts_that_are_none(text, message) -> None:
    with pytest.raises(InputError, match=message):
        read_examples(table(t=[None] + ["word"] * (N - 1)), "y", text=text)


# ── encoding ──────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_standardised_on_the_training_rows_and_constants_dropped() -> None:
    x = np.random.default_rng(0).normal(3, 5, size=(N, 3))
    x[:, 1] = 7
    train = np.arange(0, N, 2)
    encoder = Encoder(read_examples(x, CYCLE), train, None)
    inside = encoder.transform(train)
    assert inside.shape == (20, 2)
    assert inside.mean(axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert inside.std(axis=0) == pytest.approx([1, 1])
    expected = (x[1, 0] - x[train, 0].mean()) / x[train, 0].std()
    assert encoder.transform(np.array([1]))[0, 0] == pytest.approx(expected)


def test_wide_features_are_reduced_as_scikit_learn_would() -> None:
    from sklearn.decomposition import PCA

    x = np.random.default_rng(1).integers(0, 256, size=(N, 10)).astype(np.uint8)
    ours = Encoder(read_examples(x, CYCLE), np.arange(N), None, components=3)
    theirs = PCA(3).fit_transform(x / 255)
    assert np.abs(ours.transform(np.arange(N))) == pytest.approx(np.abs(theirs), abs=1e-8)


def test_categories_become_indicators_and_rare_ones_share_one(monkeypatch) -> None:
    monkeypatch.setattr(features, "LEVELS", 2)
    towns = ["a"] * 20 + ["b"] * 10 + ["c"] * 6 + ["d"] * 4
    examples = read_examples(table(x=towns), "y")
    encoder = Encoder(examples, np.arange(36), None)
    assert encoder.transform(np.array([0, 20, 30, 36])).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 0, 1],  # never seen in training
    ]


def test_without_the_sentence_encoder_texts_are_tf_idf(monkeypatch) -> None:
    monkeypatch.setattr("scoredraw.bakeoff.rows.has_sentence_encoder", lambda: False)
    words = np.array(["sun rises early", "rain falls late", "snow lies deep", "wind blows hard"])
    found = compare_rows(
        table(t=words[CYCLE]), "y", text="t", methods="leverage", sizes=[16], repeats=2, workers=1
    )
    assert found.full.value == 1.0
    assert any("TF-IDF" in note for note in found.notes)


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
def test_sentence_vectors_are_those_of_the_model() -> None:
    # the cosines that the published model gives for these sentences, to four digits
    texts = ("A cat sits on the mat.", "A feline rests on a rug.", "Stock prices fell today.")
    vectors = features.sentence_vectors(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    cosines = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert cosines == pytest.approx((0.5738, 0.0758), abs=1e-3)


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
def test_sentence_vectors_are_kept_beside_the_journal(tmp_path, monkeypatch) -> None:
    options = {"text": "t", "methods": "leverage", "sizes": [16], "workers": 1}
    data = table(t=np.array(["sun", "rain", "snow", "wind"])[CYCLE])
    compare_rows(data, "y", **options, repeats=2, journal=tmp_path)
    assert len(list(tmp_path.glob("sentence-vectors-*.npy"))) == 1
    monkeypatch.setattr("scoredraw.bakeoff.rows.sentence_vectors", pytest.fail)
    found = compare_rows(data, "y", **options, repeats=3, journal=tmp_path)
    assert any("all-MiniLM-L6-v2" in note for note in found.notes)


def test_pictures_are_known_by_their_bytes() -> None:
    fashion = datasets.load("fashion-mnist")
    assert read_examples(fashion, None).picture_side == 28
    assert read_examples("digits", None).picture_side is None
