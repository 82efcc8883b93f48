"""Answers: what is equal, who has the votes, and the order statistics of a random k of n."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.answers import (
    FEW_DRAWS,
    AnswerPool,
    count_votes,
    expected_maximum,
    group_answers,
    group_ragged,
    is_null,
    max_rank_probabilities,
    miss_probabilities,
    split_ties,
    whole_numbers,
)
from scoredraw.errors import InputError

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None, 1, 2.5, math.nan]), min_size=1, max_size=9)


# ── equality ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(ANSWERS)
def test_codes_say_what_is_equal_and_count_up(answers: list[Any]) -> None:
    codes = group_answers(answers)
    for i, a in enumerate(answers):
        assert (codes[i] == -1) == is_null(a)
        for j, b in enumerate(answers):
            if not is_null(a) and not is_null(b):
                assert (codes[i] == codes[j]) == (a == b)
    seen = codes[codes >= 0]
    firsts = [code for i, code in enumerate(seen) if code not in seen[:i]]
    assert firsts == list(range(len(firsts)))


@pytest.mark.property
@given(st.lists(ANSWERS, min_size=1, max_size=5))
def test_ragged_problems_are_grouped_each_for_itself(rows: list[list[Any]]) -> None:
    offsets = np.cumsum([0, *map(len, rows)])
    flat = [answer for row in rows for answer in row]
    want = np.concatenate([group_answers(row) for row in rows])
    assert group_ragged(flat, offsets).tolist() == want.tolist()
    same = group_ragged(flat, offsets, equal=lambda a, b: a == b)
    assert same.tolist() == want.tolist()


@pytest.mark.property
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6))
def test_a_matrix_is_its_rows_whatever_its_type(seed: int, problems: int, n: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 4, (problems, n))
    want = [group_answers(row.tolist()).tolist() for row in numbers]
    for matrix in (numbers, numbers.astype(float), numbers.astype(str), numbers.astype(object)):
        assert group_answers(matrix).tolist() == want


@pytest.mark.oracle
def test_nulls_in_every_type() -> None:
    assert group_answers(np.array([1.0, np.nan, 1.0, np.nan])).tolist() == [0, -1, 0, -1]
    mixed = [None, float("nan"), np.float32("nan"), "nan", 0]
    assert group_answers(mixed).tolist() == [-1, -1, -1, 0, 1]
    assert group_answers([None, None], equal=lambda a, b: True).tolist() == [-1, -1]
    assert group_answers([]).tolist() == []
    assert group_answers(np.empty((2, 0), object)).shape == (2, 0)


@pytest.mark.oracle
def test_equality_that_is_not_transitive_goes_by_the_first_of_a_group() -> None:
    def near(a: float, b: float) -> bool:
        return abs(a - b) <= 1

    assert group_answers([0, 1, 2, 3], equal=near).tolist() == [0, 0, 1, 1]
    assert group_answers([1, 0, 2, 3], equal=near).tolist() == [0, 0, 0, 1]


@pytest.mark.oracle
def test_equality_is_asked_once_for_what_python_knows_to_be_equal() -> None:
    asked = []

    def equal(a: str, b: str) -> bool:
        asked.append((a, b))
        return a.lower() == b.lower()

    assert group_answers(["x", "X", "x", "X", "y"], equal=equal).tolist() == [0, 0, 0, 0, 1]
    assert asked == [("x", "X"), ("x", "y")]


@pytest.mark.oracle
def test_unhashable_answers_need_a_way_to_compare() -> None:
    answers = [[1, 2], [2, 1], None, [1, 2]]
    with pytest.raises(InputError, match="answers: got an unhashable list"):
        group_answers(answers)
    assert group_answers(answers, key=tuple).tolist() == [0, 1, -1, 0]
    assert group_answers(answers, equal=lambda a, b: a == b).tolist() == [0, 1, -1, 0]
    # a key that gives None cannot read the answer
    codes = group_answers(["7", "seven"], key=lambda a: int(a) if a.isdigit() else None)
    assert codes.tolist() == [0, -1]


@pytest.mark.oracle
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [], [[0, 3]]])
def test_offsets_that_do_not_fit(offsets: list[Any]) -> None:
    with pytest.raises(InputError, match="offsets"):
        group_ragged(["a", "b", "c"], offsets)


# ── votes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.integers(0, 2**32))
def test_votes_are_sums_over_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 4, (3, 5, 7))
    weights = rng.normal(size=(3, 5, 7))
    want = np.stack([(weights * (codes == g)).sum(-1) for g in range(codes.max() + 1)], -1)
    np.testing.assert_allclose(count_votes(codes, weights), want, atol=1e-12)
    np.testing.assert_array_equal(count_votes(codes).sum(-1), (codes >= 0).sum(-1))


@pytest.mark.oracle
def test_ties_share_and_nobody_wins_nothing() -> None:
    assert count_votes([-1, -1]).shape == (0,)
    assert split_ties(np.zeros((2, 0))).shape == (2, 0)
    assert split_ties([1.0, 1.0 - 1e-13, 0.5], slack=1e-12).tolist() == [0.5, 0.5, 0.0]
    assert split_ties([-5.0, -7.0]).tolist() == [1.0, 0.0]


# ── a random k of n ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.data())
def test_missing_c_of_n_agrees_with_rationals(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400))
    c = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=6))
    ks = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=6))
    want = [[Fraction(math.comb(n - x, k), math.comb(n, k)) for k in ks] for x in c]
    got = miss_probabilities(n, c, ks)
    np.testing.assert_allclose(got, np.array(want, float), rtol=0, atol=1e-14)


@pytest.mark.oracle
@pytest.mark.parametrize("sizes", [[1, 2, 63, 64, 65, 5000, 9999, 10_000], range(1, 130)])
def test_missing_c_of_ten_thousand(sizes: Any) -> None:
    """Both products, over items and over draws, to 1e-13 where the error is at its worst."""
    n, c, ks = 10_000, [0, 1, 2, 50, 1000, 2500, 5000, 9999, 10_000], list(sizes)
    assert min(ks) <= FEW_DRAWS < max(ks)
    want = [[float(Fraction(math.comb(n - x, k), math.comb(n, k))) for k in ks] for x in c]
    np.testing.assert_allclose(miss_probabilities(n, c, ks), want, rtol=0, atol=1e-13)


@pytest.mark.oracle
def test_missing_c_of_a_million() -> None:
    """Products over the draws as long as a million, against extended precision; c = 1 is the
    worst of them, as every factor is rounded the same way."""
    n = 1_000_000
    k = np.arange(1, n + 1)
    got = miss_probabilities(n, [1, 2, 3, 50], k)
    for row, c in zip(got, (1, 2, 3, 50), strict=True):
        i = np.arange(c, dtype=np.longdouble)[:, None]
        want = np.prod(np.maximum(n - i - k[::997], 0) / (n - i), axis=0)
        assert float(np.abs(row[::997] - want).max()) < 1e-13


@pytest.mark.oracle
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_rank_of_the_best(n: int) -> None:
    ks = np.arange(1, n + 1)
    got = max_rank_probabilities(n, ks)
    want = [
        [Fraction(math.comb(n - j, k - 1), math.comb(n, k)) for j in range(1, n + 1)]
        for k in ks.tolist()
    ]
    np.testing.assert_allclose(got, np.array(want, float), rtol=0, atol=1e-14)
    # that the best j are missed is that the best drawn has a higher rank
    missed = miss_probabilities(n, np.arange(1, n + 1), ks).T
    np.testing.assert_allclose(1 - np.cumsum(got, axis=1), missed, atol=1e-13)


@pytest.mark.property
@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=8),
    st.data(),
)
def test_expected_maximum_is_the_mean_over_subsets(
    samples: list[tuple[int, float]], data: st.DataObject
) -> None:
    scores, credit = np.array(samples).T
    k = data.draw(st.integers(1, len(scores)))
    subsets = [list(s) for s in combinations(range(len(scores)), k)]
    best = np.mean([scores[s].max() for s in subsets])
    np.testing.assert_allclose(expected_maximum(scores, k), [best], atol=1e-12)
    worst = np.mean([scores[s].min() for s in subsets])
    np.testing.assert_allclose(-expected_maximum(-scores, k), [worst], atol=1e-12)
    shared = np.mean([credit[s][scores[s] == scores[s].max()].mean() for s in subsets])
    np.testing.assert_allclose(expected_maximum(scores, k, credit), [shared], atol=1e-12)


@pytest.mark.oracle
def test_expected_maximum_of_many_problems_is_that_of_each() -> None:
    rng = np.random.default_rng(0)
    scores, credit = rng.integers(0, 3, (4, 6)).astype(float), rng.random((4, 6))
    scores[0] = 1.0  # a tie must not run on into the next problem
    scores[1] = 1.0
    got = expected_maximum(scores, [1, 3, 6], credit)
    want = [expected_maximum(s, [1, 3, 6], c) for s, c in zip(scores, credit, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-14)


@pytest.mark.oracle
@pytest.mark.parametrize("k", [0, 9, -1, 1.5, math.nan, "3", []])
def test_subset_sizes_that_make_no_sense(k: Any) -> None:
    with pytest.raises(InputError, match="k: got"):
        max_rank_probabilities(8, k)


@pytest.mark.oracle
def test_whole_numbers() -> None:
    assert whole_numbers([True, False], "c").tolist() == [1, 0]
    assert whole_numbers(3.0, "c").dtype == np.int64
    for wrong in ([1.5], [math.inf], ["a"], [None]):
        with pytest.raises(InputError, match="c: got"):
            whole_numbers(wrong, "c")
    with pytest.raises(InputError, match="NaN"):
        expected_maximum([1.0, math.nan], 1)
    with pytest.raises(InputError, match="scores"):
        expected_maximum([], 1)
    with pytest.raises(InputError, match="scores: got infinite"):
        expected_maximum([1.0, -math.inf], 2)
    assert expected_maximum([1.0, -math.inf], [1, 2], credit=[1, 0]).tolist() == [0.5, 1.0]


# ── the pool ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_pool_knows_its_samples() -> None:
    pool = AnswerPool.of(
        ["b", None, "a", "b"],
        rewards=[1, -np.inf, 3, 4],
        logprobs=[-4, -np.inf, 0, -1],
        lengths=[2, 1, 5, 4],
        texts=["x", "y", "z", "x"],
    )
    assert (pool.n, pool.groups, pool.answers) == (4, 2, ("b", "a"))
    assert pool.null.tolist() == [False, True, False, False]
    assert pool.scores("mean_logprob").tolist() == [-2, -np.inf, 0, -0.25]
    assert pool.scores("sum_logprob").tolist() == [-4, -np.inf, 0, -1]
    part = pool.take([3, 2])
    assert (part.codes.tolist(), part.texts, part.answers) == ([0, 1], ("x", "z"), ("b", "a"))
    assert part.lengths is not None
    assert part.lengths.tolist() == [4, 5]
    nothing = AnswerPool.of([None, None])
    assert (nothing.groups, nothing.answers) == (0, ())
    with pytest.raises(AttributeError):
        pool.codes = pool.codes  # type: ignore[misc]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": [1, math.nan, 2]}, "rewards: got nan at index 1, want finite"),
        ({"rewards": [1, 2, math.inf]}, "rewards: got inf at index 2"),
        ({"rewards": [-math.inf, 2, 1]}, "rewards: got -inf at index 0"),
        ({"rewards": [1, 2]}, "rewards: got 2 values, want 3"),
        ({"rewards": [[1, 2, 3]]}, "rewards: got 2 dimensions"),
        ({"rewards": ["x", 1, 2]}, "rewards: got what is not a number"),
        ({"logprobs": [-1, 0, 0.25]}, "logprobs: got 0.25 at index 2, want log-probabilities"),
        ({"logprobs": [-1, math.nan, 0]}, "logprobs: got nan at index 1"),
        ({"lengths": [1, 0, 2]}, "lengths: got 0.0 at index 1"),
        ({"lengths": [1, 1.5, 2]}, "lengths: got 1.5 at index 1"),
        ({"texts": ["a"]}, "texts: got 1 values, want 3"),
    ],
)
def test_what_a_pool_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        AnswerPool.of(["a", None, "b"], **given)
    assert "\n" not in str(caught.value)


@pytest.mark.oracle
def test_a_pool_without_samples_codes_or_scores() -> None:
    with pytest.raises(InputError, match="answers"):
        AnswerPool.of([])
    with pytest.raises(InputError, match="codes"):
        AnswerPool(np.array([0, -2]))
    with pytest.raises(InputError, match="rewards: got None"):
        AnswerPool.of(["a"]).scores("rewards")
    with pytest.raises(InputError, match="lengths: got None"):
        AnswerPool.of(["a"], logprobs=[-1]).scores("mean_logprob")


@pytest.mark.parametrize(
    "answers",
    [
        np.array(["a\ud800", "b", "a\ud800"]), np.array(["", "x" * 1000, ""]),
        np.array([1, 2, 1], ">i8"), np.array([True, False, True]),
        np.array([5, 0, 6, 0, 5, 0], np.uint8)[::2], np.array([b"7", b"12", b"7"]),
        np.array([0.0, np.inf, -0.0]),
    ],
)  # fmt: skip
def test_arrays_of_every_kind(answers: np.ndarray) -> None:
    looped = group_answers(answers.tolist()).tolist()
    assert group_answers(answers).tolist() == looped
    assert group_answers(answers[:0]).tolist() == []
