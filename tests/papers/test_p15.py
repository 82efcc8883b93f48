"""The experiment of paper 15: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.papers import p15_odis as p15
from scoredraw.papers.docstring_pool import docstring_pool, docstrings_of, folder
from scoredraw.papers.subset_learning import (
    BigramModel,
    Bigrams,
    accuracy,
    log_likelihood,
    word_features,
)
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(15, "smoke", 0)


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert len(small.claims) == 17
    assert all(claim.verdict is None for claim in small.claims)
    assert [len(table.rows) for table in small.tables] == [13, 3, 2, 10, 17]
    assert [len(figure.series) for figure in small.figures] == [4, 1]
    assert Report.from_json(small.to_json()).claims == small.claims


# ── the pool ────────────────────────────────────────────────────────────────────────────────────


def test_docstrings_are_deterministic_real_and_distinct() -> None:
    pool = docstring_pool(30)
    assert pool.texts == docstring_pool(30).texts
    assert len(set(pool.texts)) == len(pool.texts) == len(pool.labels)
    counts = np.bincount(pool.labels)
    assert counts.max() <= 30
    assert {"python", "numpy", "scipy", "sklearn"} <= set(pool.names)
    assert all(len(text.split()) >= 20 for text in pool.texts)
    assert folder("a_package_nobody_has") is None
    assert np.linalg.svd.__doc__ is not None
    path = Path(np.linalg.__file__).parent / "_linalg.py"
    assert inspect.cleandoc(np.linalg.svd.__doc__) in docstrings_of(path)


# ── what is learnt ──────────────────────────────────────────────────────────────────────────────

TEXTS = ["a b a b a c", "b a b a", "c a b c a b", "a b d"]  # d is rare


def test_bigrams_follow_the_formula() -> None:
    """Kneser and Ney's probabilities from counters; d is the rare word."""
    bigrams = Bigrams(TEXTS)
    assert bigrams.words == 4
    model = BigramModel(bigrams, np.array([0, 2, 3]))
    pairs: Counter[tuple[str, str]] = Counter()
    for text in (TEXTS[0], TEXTS[2], TEXTS[3]):
        words = ["^", *text.split()]
        pairs.update(itertools.pairwise(words))
    d = 0.75

    def p(word: str, before: str) -> float:
        ahead = {w: sum(1 for pair in pairs if pair[1] == w) for w in "abcd"}
        spread = d * sum(n > 0 for n in ahead.values()) / len(pairs) / 4
        unigram = max(ahead[word] - d, 0) / len(pairs) + spread
        total = sum(c for pair, c in pairs.items() if pair[0] == before)
        followers = sum(1 for pair in pairs if pair[0] == before)
        if total == 0:
            return unigram
        return max(pairs[before, word] - d, 0) / total + d * followers / total * unigram

    for row, text in enumerate(TEXTS):
        words = ["^", *text.split()]
        want = [math.log(p(w, v)) for v, w in itertools.pairwise(words)]
        np.testing.assert_allclose(model.log_probability(*bigrams.of(np.array([row]))), want)


def test_bigram_probabilities_sum_to_one() -> None:
    pool = docstring_pool(15)
    bigrams = Bigrams(pool.texts)
    every = np.arange(bigrams.words)
    model = BigramModel(bigrams, np.arange(40))
    for before in (0, 5, bigrams.words):  # the last opens a document
        p = np.exp(model.log_probability(np.full_like(every, before), every))
        assert p.sum() == pytest.approx(1)
        assert p.min() > 0


def test_more_texts_teach_more() -> None:
    pool = docstring_pool(40)
    order = np.random.default_rng(0).permutation(len(pool.texts))
    test, few, many = order[:60], order[60:80], order[60:]
    bigrams, counts = Bigrams(pool.texts), word_features(pool.texts)
    assert log_likelihood(bigrams, many, test) > log_likelihood(bigrams, few, test) + 0.1
    assert accuracy(counts, pool.labels, many, test) > accuracy(counts, pool.labels, few, test)


# ── overlap and diversity ───────────────────────────────────────────────────────────────────────


def test_mean_overlap_counts_pairs() -> None:
    scores = np.array([[4, 1, 4], [3, 2, 1], [2, 3, 3], [1, 4, 2]], float)
    # tops of two: {0,1}, {3,2}, {0,2}: overlaps 0, 1/2, 1/2
    assert p15.mean_overlap(scores, 0.5) == pytest.approx(1 / 3)


def test_mean_distance_is_that_of_the_pairs() -> None:
    from scipy.sparse import csr_array

    x = np.random.default_rng(0).random((7, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = (1 - x @ x.T)[np.triu_indices(7, 1)]
    assert p15.mean_distance(csr_array(x)) == pytest.approx(pairs.mean())


def test_halves_know_the_spread_of_a_mean() -> None:
    """The interval of a mean from halves of the rows is the textbook's, within 10 %."""
    x = np.random.default_rng(0).normal(size=400)
    (found,) = p15.by_halves(400, lambda rows: np.array([x[rows].mean()]), 2000, 0)
    assert found.value == pytest.approx(x.mean())
    assert found.half_width == pytest.approx(1.96 * x.std() / 20, rel=0.1)


def test_turned_metrics_overlap_more_than_opposite_ones() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2000, 1))
    ratings = (common + 0.3 * rng.normal(size=(2000, 6))) * [1, -1, 1, -1, 1, -1]
    ratings[:, :3] += 0.5 * rng.normal(size=(2000, 1))  # so that four components are far from equal
    ratings[:, 2:5] += 0.8 * rng.normal(size=(2000, 1))
    found = p15.overlaps(ratings).reshape(5, 3)
    assert (found[3] > found[0] + 0.05).all()
    np.testing.assert_allclose(found[2], found[1] - found[0])
    np.testing.assert_allclose(found[4], found[1] - found[3])


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def outcome(**means: float) -> dict[str, Float]:
    rng = np.random.default_rng(0)
    arms = [p15.UNIFORM, p15.ODIS, p15.NO_PCA, *p15.BASELINES, *p15.SINGLE]
    at = dict.fromkeys(arms, 0.5) | {name.replace("_", " "): v for name, v in means.items()}
    return {name: mean + 0.01 * rng.standard_normal(12) for name, mean in at.items()}


def test_claims_of_learning_can_fail() -> None:
    def verdicts(**means: float) -> list[str | None]:
        return [claim.verdict for claim in p15.learning_claims("x", outcome(**means))]

    assert verdicts(ODiS=0.6) == ["holds"] * 4
    assert verdicts(ODiS=0.4) == ["fails"] * 4
    assert verdicts()[1:3] == ["undecided"] * 2
    assert verdicts(ODiS=0.6, DSIR=0.7) == ["holds", "fails", "holds", "holds"]
    assert verdicts(ODiS=0.6, component_2_alone=0.6)[2] == "undecided"


@pytest.mark.filterwarnings("ignore:eigenvalues")
def test_arms_spend_the_same_budget() -> None:
    pool = docstring_pool(60)
    texts, target = list(pool.texts[:200]), list(pool.texts[200:])
    ratings = p15.text_metrics(texts)
    arms = p15.arms_of(texts, target, ratings, 0)
    tokens = p15.word_counts(texts)
    for name, rows in arms.items():
        assert len(set(rows)) == len(rows), name
        assert tokens[rows].sum() >= 0.1 * tokens.sum(), name
    assert len(arms) == 17
