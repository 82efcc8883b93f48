"""Minimum Bayes risk: limits and laws, ties, evidence that is never picked, pools and subsets."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.answers import AnswerPool
from scoredraw.errors import InputError
from scoredraw.language.minimum_bayes_risk import (
    expected_utility,
    mbr_choice,
    mbr_standing,
    minimum_bayes_risk,
    pick,
)
from scoredraw.language.selection import majority_vote
from scoredraw.language.selection_curves import accuracy_at_k
from scoredraw.language.text_utilities import equality, pairwise
from scoredraw.samples import read_samples

seeds = st.integers(0, 2**32)


def by_loops(u: np.ndarray, x: np.ndarray, c: float, include_self: bool) -> list[float]:
    scores = []
    for i in range(len(u)):
        others = [u[i, j] for j in range(len(u)) if include_self or j != i]
        scores.append((sum(others) + c * sum(x[i])) / (len(others) + c * x.shape[1]))
    return scores


# ── matrices ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(seeds, st.integers(2, 7), st.integers(0, 4), st.booleans(), st.floats(0, 9))
def test_the_formula(seed: int, n: int, m: int, include_self: bool, c: float) -> None:
    rng = np.random.default_rng(seed)
    u, x = rng.normal(size=(3, n, n)), rng.normal(size=(3, n, m))
    found = expected_utility(u, x, cross_weight=c, include_self=include_self)
    want = [by_loops(*each, c, include_self) for each in zip(u, x, strict=True)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    if m == 0:  # without evidence it is plain MBR
        np.testing.assert_array_equal(found, expected_utility(u, include_self=include_self))


@pytest.mark.property
@settings(max_examples=60)
@given(seeds, st.integers(3, 9))
def test_squared_distance_picks_the_sample_next_to_the_mean(seed: int, n: int) -> None:
    y = np.random.default_rng(seed).normal(size=n)
    u = -((y[:, None] - y) ** 2)
    for include_self in (False, True):
        chosen = int(pick(expected_utility(u, include_self=include_self)))
        assert chosen == np.abs(y - y.mean()).argmin()
    rest = (y.sum() - y) / (n - 1)  # likewise next to the mean of the others
    assert chosen == np.abs(y - rest).argmin()


@pytest.mark.property
@settings(max_examples=60)
@given(seeds, st.integers(3, 9), st.floats(50, 1e6))
def test_a_far_outlier_is_never_picked(seed: int, n: int, far: float) -> None:
    y = np.append(np.random.default_rng(seed).random(n), far)
    order = np.random.default_rng(seed + 1).permutation(n + 1)
    y = y[order]
    assert y[int(pick(expected_utility(-np.abs(y[:, None] - y))))] < 2


@pytest.mark.oracle
def test_much_evidence_for_one_candidate_decides() -> None:
    """Every other candidate has the better of the pool; m pieces of evidence speak for the last."""
    n = 5
    u = np.where(np.arange(n)[:, None] < n - 1, 1.0, 0.0) * np.ones((n, n))
    for m, winner in ((0, 0), (3, 0), (4, 0), (5, n - 1), (1000, n - 1)):
        x = np.zeros((n, m))
        x[n - 1] = 1.0  # 4 of 4 in the pool, against m of m
        assert pick(expected_utility(u, x)) == winner, m
        assert pick(expected_utility(u, x, cross_weight=0.0)) == 0
    heavy = np.zeros((n, 1))
    heavy[n - 1] = 1.0
    assert pick(expected_utility(u, heavy, cross_weight=4.5)) == n - 1


@pytest.mark.oracle
def test_ties_go_to_the_first() -> None:
    assert pick(expected_utility(np.full((4, 4), 0.3))) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):  # the same numbers in another order: sums differ in their last digits
        row = rng.normal(size=9)
        u = np.array([np.insert(rng.permutation(row), i, 0) for i in range(10)])
        scores = expected_utility(u)
        assert np.ptp(scores) < 1e-14
        assert pick(scores) == 0
    assert pick([[1.0, 1.0 + 1e-9], [0.0, -1.0]]).tolist() == [1, 0]  # those are no ties


@pytest.mark.oracle
def test_a_pool_of_one() -> None:
    alone = minimum_bayes_risk(["only"])
    assert alone.index == 0
    assert np.isnan(alone.scores).all()
    u = pairwise(lambda a, b: 0.5, crosses_languages=True)
    assert minimum_bayes_risk(["only"], u, ["evidence"]).scores.tolist() == [0.5]
    assert minimum_bayes_risk(["only"], include_self=True).scores.tolist() == [100.0]
    assert np.isnan(expected_utility([[3.0]], [[1.0]], cross_weight=0.0)).all()


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_utility_is_of_the_candidate_given_the_evidence() -> None:
    """u(a, b) = len(b) - 10 [a starts with b]: evidence that is not symmetric shows the order."""

    def u(candidate: str, evidence: str) -> float:
        return len(evidence) - 10.0 * candidate.startswith(evidence)

    pool = ["ab", "a", "c"]
    found = minimum_bayes_risk(pool, pairwise(u, crosses_languages=True), ["cc"])
    want = [[u("ab", "a"), u("ab", "c"), u("ab", "cc")], [u("a", "ab"), u("a", "c"), u("a", "cc")],
            [u("c", "ab"), u("c", "a"), u("c", "cc")]]  # fmt: skip
    np.testing.assert_allclose(found.scores, np.mean(want, axis=1))


@pytest.mark.property
@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["a", "ab", "abc", "xyz", ""]), min_size=1, max_size=6),
    st.lists(st.sampled_from(["ab", "other"]), max_size=4),
)
def test_repeated_texts_count_every_time(pool: list[str], evidence: list[str]) -> None:
    def u(a: str, b: str) -> float:
        return len(set(a) & set(b)) - 0.1 * len(a)

    found = minimum_bayes_risk(pool, u, evidence, allow_surface_cross=True)
    if len(pool) + len(evidence) == 1:
        return
    table = np.array([[u(a, b) for b in pool] for a in pool])
    cross = np.array([[u(a, b) for b in evidence] for a in pool]).reshape(len(pool), -1)
    np.testing.assert_allclose(found.scores, by_loops(table, cross, 1.0, False), atol=1e-12)
    assert 0 <= found.index < len(pool)  # evidence is never picked


@pytest.mark.oracle
def test_surface_metrics_do_not_cross_languages() -> None:
    pool, other = ["the answer is 7", "it is 8"], ["die Antwort ist 7"] * 3
    for utility in ("chrf", "symmetric-chrf", "equality", lambda a, b: 0.0):
        with pytest.raises(InputError, match=r"utility: got .* for evidence in another language"):
            minimum_bayes_risk(pool, utility, other)
        assert minimum_bayes_risk(pool, utility).index == 0
        allowed = minimum_bayes_risk(pool, utility, other, allow_surface_cross=True)
        assert allowed.scores.shape == (2,)
    last_word = equality(lambda text: text.split()[-1])
    assert minimum_bayes_risk(pool[::-1], last_word, other).index == 1
    texts = AnswerPool.of(["7", "8"], texts=pool)
    with pytest.raises(InputError, match="another language"):
        mbr_choice(texts, evidence=other)


# ── pools of answers ────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=80)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_equality_is_the_majority_vote(answers: list[Any]) -> None:
    pool = AnswerPool.of(answers)
    np.testing.assert_array_equal(mbr_choice(pool, utility="equality"), majority_vote(pool))
    standing = mbr_standing(pool, utility="equality")
    assert ((standing == -np.inf) == pool.null).all()


@pytest.mark.oracle
def test_equality_is_the_vote_on_real_samples() -> None:
    for pool in read_samples("smollm2-arith").pools():
        np.testing.assert_array_equal(mbr_choice(pool, utility="equality"), majority_vote(pool))


def small_pool(seed: int, n: int = 7) -> AnswerPool:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abc d"), rng.integers(0, 9))) for _ in range(n)]
    texts[2] = texts[5]
    answers = [None if i == 1 else texts[i] for i in range(n)]
    return AnswerPool.of(answers, texts=texts)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_subsets_at_once_are_each_on_its_own(seed: int) -> None:
    pool = small_pool(seed)
    for k in (1, 2, 3, 7):
        subsets = np.array(list(combinations(range(pool.n), k)))
        found = mbr_choice.of_subsets(pool, subsets)  # type: ignore[attr-defined]
        want = [mbr_choice(pool.take(subset)) for subset in subsets]
        np.testing.assert_allclose(found, want, rtol=0, atol=0)
        sums = found.sum(axis=1)
        nothing = pool.null[subsets].all(axis=1)
        np.testing.assert_allclose(sums, np.where(nothing, 0.0, 1.0))
    credit = (np.arange(pool.n) % 2).astype(float)
    curve = accuracy_at_k([pool], [np.where(pool.null, 0, credit)], [1, 3], mbr_choice)
    assert set(curve.how) == {"enumeration"}


@pytest.mark.oracle
def test_null_answers_are_evidence_and_no_candidates() -> None:
    texts = ["aaaa aaaa", "aaaa aaaa", "aaaa", "zzzz"]
    pool = AnswerPool.of([None, None, "x", "y"], texts=texts)
    assert mbr_standing(pool)[:2].tolist() == [-np.inf, -np.inf]
    assert mbr_choice(pool).tolist() == [0, 0, 1, 0]
    assert mbr_choice(AnswerPool.of([None], texts=["a"])).tolist() == [0]
    assert mbr_choice(AnswerPool.of(["a"], texts=["a"])).tolist() == [1]


@pytest.mark.oracle
def test_evidence_and_other_utilities_for_a_pool() -> None:
    pool = AnswerPool.of(["u", "v", "w"], texts=["one two", "one too", "three"])
    by_hand = minimum_bayes_risk(pool.texts or (), "chrf", ["three"] * 3, allow_surface_cross=True)
    found = mbr_standing(pool, evidence=["three"] * 3, allow_surface_cross=True)
    np.testing.assert_allclose(found, by_hand.scores)
    assert mbr_choice(pool, evidence=["three"] * 3, allow_surface_cross=True).tolist() == [0, 0, 1]
    shorter = mbr_choice(pool, utility=lambda a, b: float(len(a) < len(b)))
    assert shorter.tolist() == [0, 0, 1]
    first = equality(lambda text: text[0])
    assert mbr_choice(pool, utility=first, evidence=["thirty"] * 2).tolist() == [0, 0, 1]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_utility([[1.0, 2.0]]), "utilities: got shape"),
        (lambda: expected_utility([1.0]), "utilities: got shape"),
        (lambda: expected_utility(np.zeros((0, 0))), "utilities: got shape"),
        (lambda: expected_utility([[1.0, np.nan], [0, 0]]), "utilities: got NaN"),
        (lambda: expected_utility([[1.0, np.inf], [0, 0]]), "utilities: got NaN or infinity"),
        (lambda: expected_utility(np.eye(2), [[np.nan], [0]]), "evidence: got NaN"),
        (lambda: expected_utility(np.eye(2), [[1.0]]), "evidence: got shape"),
        (lambda: expected_utility(np.eye(2), [1.0, 2.0]), "evidence: got shape"),
        (lambda: expected_utility(np.eye(2), cross_weight=-1), "cross_weight: got -1"),
        (lambda: expected_utility(np.eye(2), cross_weight=np.nan), "cross_weight: got nan"),
        (lambda: minimum_bayes_risk([]), "candidates: got none"),
        (lambda: minimum_bayes_risk(["a", "b"], lambda a, b: np.nan), "<lambda>: got NaN"),
        (lambda: mbr_choice(AnswerPool.of(["a", "b"])), "texts: got None"),
        (
            lambda: mbr_choice.of_subsets(AnswerPool.of(["a"]), np.zeros((1, 1), int)),  # type: ignore[attr-defined]
            "texts: got None",
        ),
        (
            lambda: mbr_choice(
                AnswerPool.of(["a", "b"]),
                utility="equality",
                evidence=["a"],
                allow_surface_cross=True,
            ),
            "utility: got equality with evidence",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
