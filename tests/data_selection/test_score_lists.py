"""Lists of scores within one budget: how they are cut, shared out and compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scoredraw.data_selection.importance_resampling import (
    importance_log_weights,
    importance_resample,
)
from scoredraw.data_selection.score_lists import (
    average_sample,
    average_scores,
    average_top,
    broader_range,
    overlap_matrix,
    select,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def turn_by_turn(scores: Float, tokens: Float, shares: Float) -> list[int]:
    """The rule as it is said: each list in turn takes its next unseen document."""
    n, k = scores.shape
    owner, spent = [-1] * n, [0.0] * k
    ranking = [sorted(range(n), key=lambda row, j=j: -scores[row, j]) for j in range(k)]
    moved = True
    while moved:
        moved = False
        for j in range(k):
            free = [row for row in ranking[j] if owner[row] < 0]
            if spent[j] < shares[j] and free:
                owner[free[0]] = j
                spent[j] += tokens[free[0]]
                moved = True
    return owner


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    k=st.integers(1, 5),
    part=st.floats(0.01, 1.3),
    common=st.sampled_from([0.0, 1.0, 9.0]),
)
@pytest.mark.property
def test_refill_is_the_turns_one_by_one(
    seed: int, n: int, k: int, part: float, common: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, k)) + common * rng.standard_normal((n, 1))
    tokens = rng.integers(1, 50, n).astype(float)
    shares = rng.random(k) + 0.01
    budget = part * tokens.sum()
    chosen = select(scores, budget, tokens=tokens, shares=shares.tolist())
    owner = np.array(turn_by_turn(scores, tokens, budget * shares / shares.sum()))
    assert chosen.indices.tolist() == np.flatnonzero(owner >= 0).tolist()
    assert chosen.component.tolist() == owner[owner >= 0].tolist()
    # reaches the budget whenever the pool does, and by less than k documents more
    spent = tokens[chosen.indices].sum()
    assert spent >= min(budget * (1 - 1e-12), tokens.sum())
    assert spent < budget + k * tokens.max()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), part=st.floats(0.01, 1.3))
@pytest.mark.property
def test_each_list_is_above_its_share_by_less_than_a_document(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    scores, tokens = rng.standard_normal((40, 3)), rng.integers(1, 50, 40)
    share = part * tokens.sum() / 3
    chosen = select(scores, 3 * share, tokens=tokens, refill=False)
    for j, one in enumerate(chosen.lists):
        assert one.tolist() == np.argsort(-scores[:, j])[: len(one)].tolist()
        assert tokens[one[:-1]].sum() < share * (1 + 1e-12)
        assert tokens[one].sum() >= min(share * (1 - 1e-12), tokens.sum())
    assert chosen.indices.tolist() == sorted(set(np.concatenate(chosen.lists)))
    place = [
        min((one.tolist().index(row), j) for j, one in enumerate(chosen.lists) if row in one)[1]
        for row in chosen.indices
    ]
    assert chosen.component.tolist() == place


@pytest.mark.parametrize("size", [1, 7, 10, 50, 99, 100, 1000])
def test_documents_come_exactly(size: int) -> None:
    scores = np.random.default_rng(0).standard_normal((100, 4))
    chosen = select(scores, size)
    assert len(chosen) == min(size, 100) == len(chosen.draw)
    counts = np.bincount(chosen.component, minlength=4)
    assert counts.max() - counts.min() <= 1 or size > 100


def test_independent_rankings_overlap_by_the_selected_share() -> None:
    """E |A ∩ B| / |A| = q exactly; its variance (1 - q)² n / ((n - 1) |A|) is hypergeometric.

    Means of 300 pairs within three standard errors: a false alarm in 370 for each q.
    """
    rng = np.random.default_rng(0)
    n = 1000
    for q in (0.02, 0.1, 0.3):
        found = [
            select(rng.standard_normal((n, 2)), 2 * q * n, refill=False) for _ in range(300)
        ]  # fmt: skip
        overlap = np.array([one.overlap[0, 1] for one in found])
        error = (1 - q) * np.sqrt(n / ((n - 1) * q * n) / 300)
        assert abs(overlap.mean() - q) < 3 * error
        np.testing.assert_allclose([one.lift[0, 1] for one in found], overlap / q)


def test_overlap_by_documents_and_by_tokens() -> None:
    lists = [[0, 1, 2], [2, 3]]
    assert overlap_matrix(lists, 4).tolist() == [[1, 0.5], [0.5, 1]]
    tokens = [5, 5, 30, 10]
    np.testing.assert_allclose(overlap_matrix(lists, 4, tokens), [[1, 0.75], [0.75, 1]])


def test_ties_go_by_the_next_score_then_by_lot() -> None:
    grades = np.zeros((90, 2))
    grades[:60, 0] = 5  # 60 share the best grade
    grades[30:, 1] = 5
    first = select(grades, 30, shares=[1, 0]).indices
    assert first.tolist() == list(range(30, 60))  # the better on the second score
    second = [select(grades, 10, shares=[1, 0], rng=seed).indices for seed in (0, 0, 1)]
    assert all(((one >= 30) & (one < 60)).all() for one in second)
    assert (second[0] == second[1]).all()
    assert (second[0] != second[2]).any()
    assert second[0].tolist() != list(range(30, 40))  # not by position


def test_ties_survive_round_off() -> None:
    """1 + 2 and 2 + 1 grades, in any order of arithmetic, are the same score."""
    rng = np.random.default_rng(0)
    score = np.full(200, 0.3)
    score[::2] = 0.1 + 0.2
    score = np.append(score, rng.normal(size=50) - 9)[:, None]
    kept = select(score, 50).indices
    assert 10 < (kept % 2).sum() < 40  # 25, sd 3: both kinds of 0.3


def test_joint_threshold_leaves_out_junk_on_the_others() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((500, 3))
    z = (scores - scores.mean(0)) / scores.std(0)
    for joint, together in (("min", z.min(1)), ("mean", z.mean(1))):
        chosen = select(scores, 30, joint_threshold=0.3, joint=joint)
        assert together[chosen.indices].min() >= 0.3
        assert len(chosen) == min(30, (together >= 0.3).sum())
        assert together[select(scores, 30).indices].min() < 0.3
    other = select(scores[:, :1], 30, joint_threshold=0.0, joint_scores=-scores[:, :1])
    assert scores[other.indices, 0].max() < 0.1


def test_documents_without_tokens_are_left_out() -> None:
    scores = np.arange(20.0)[:, None]
    tokens = np.where(np.arange(20) % 2, 0, 3)
    assert select(scores, 1000, tokens=tokens).indices.tolist() == list(range(0, 20, 2))


# ── baselines ───────────────────────────────────────────────────────────────────────────────────


def test_averages() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((300, 4)) * [1, 10, 100, 0.1]
    mean = (scores / scores.std(0)).mean(1)
    assert set(average_top(scores, 20).indices) == set(np.argsort(mean)[-20:])
    plain = average_top(scores, 20, standardize=False).indices
    assert set(plain) == set(np.argsort(scores.mean(1))[-20:])
    assert average_scores(scores).std() == pytest.approx(mean.std())
    tokens = rng.integers(1, 9, 300)
    assert 100 <= tokens[average_top(scores, 100, tokens=tokens).indices].sum() < 109


def test_average_sample_draws_by_the_exponential() -> None:
    """First draws of 4000 seeds: chances e^z / Σ e^z; chi-square(4) is above 23.5 once in 10^4."""
    scores = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    z = (scores[:, 0] - 2) / scores.std()
    p = np.exp(z / 0.5) / np.exp(z / 0.5).sum()
    seen = [average_sample(scores, 1, temperature=0.5, rng=s).indices[0] for s in range(4000)]
    counts = np.bincount(seen, minlength=5)
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 23.5
    hot = average_sample(np.random.default_rng(0).normal(size=(1000, 3)), 300, temperature=1e9)
    assert len(hot) == 300


def test_broader_range_is_uniform_in_the_top() -> None:
    """Each of 20 is kept 200 times in 400 draws of 10, sd 10: five of them in either direction."""
    values = np.arange(100.0)
    kept = [broader_range(values, 10, top=0.2, rng=s).indices for s in range(400)]
    counts = np.bincount(np.concatenate(kept), minlength=100)
    assert counts[:80].sum() == 0
    assert np.abs(counts[80:] - 200).max() < 50
    tokens = np.full(100, 7)
    assert len(broader_range(values, 35, top=0.2, tokens=tokens)) == 5


def test_importance_weights_are_likelihood_ratios() -> None:
    """Two words, no pairs in common: log w = Σ c (log p - log q), by hand."""
    pool, target = ["a1 a1", "b2"], ["b2", "b2"]
    w = importance_log_weights(pool, target, buckets=1 << 16, smoothing=1e-9)
    # pool: a1 ×2, b2 ×1, and the pair "a1 a1"; target: b2 ×2
    assert w[1] == pytest.approx(np.log(1 / (1 / 4)), abs=1e-4)
    assert w[0] < -50
    same = importance_log_weights(pool, pool)
    np.testing.assert_allclose(same, 0, atol=1e-12)


def test_importance_resampling_prefers_the_target() -> None:
    rng = np.random.default_rng(0)
    words = np.array(["sun", "rain", "wind", "code", "loop", "byte"])

    def text(first: int) -> str:
        return " ".join(words[first + rng.integers(0, 3, 12)])

    pool = [text(0) for _ in range(150)] + [text(3) for _ in range(150)]
    draw = importance_resample(pool, [text(3) for _ in range(40)], 60, rng=1)
    assert (draw.indices >= 150).all()
    assert (draw.weights == 1).all()
    assert not draw.unbiased
    other = importance_resample(pool, [text(3) for _ in range(40)], 60, rng=2)
    assert (other.indices != draw.indices).any()


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

S = np.random.default_rng(0).normal(size=(10, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": np.where(S[4, 1] == S, np.nan, S)}, "row 4, metric 1"),
        ({"size": 0}, "size: got 0"),
        ({"size": np.inf}, "size: got inf"),
        ({"tokens": [1, 2]}, r"tokens: got shape \(2,\)"),
        ({"tokens": -np.ones(10)}, "tokens: got negative"),
        ({"tokens": np.zeros(10)}, "tokens: got zeros only"),
        ({"shares": [1]}, "shares"),
        ({"shares": [1, -1]}, "shares"),
        ({"shares": [0, 0]}, "shares"),
        ({"names": ["a"]}, "names: got 1 names"),
        ({"joint": "sum"}, "joint"),
        ({"joint_threshold": 99}, "joint_threshold: got 99, which no document reaches"),
        ({"joint_threshold": 0, "joint_scores": S[:3]}, "joint_scores: got 3 rows"),
    ],
)
def test_bad_selections(options: dict[str, Any], words: str) -> None:
    given_: dict[str, Any] = {"scores": S, "size": 3, **options}
    with pytest.raises(InputError, match=words):
        select(**given_)


def test_bad_baselines() -> None:
    for call, words in [
        (lambda: average_sample(S, 3, temperature=0), "temperature"),
        (lambda: broader_range(S[:, 0], 3, top=0), "top: got 0"),
        (lambda: broader_range(S[:, 0], 3, top=0.1), "holds 1, want 3"),
        (lambda: importance_log_weights([], ["a"]), "texts: got none"),
        (lambda: importance_log_weights(["a"], "abc"), "target: got one string"),
        (lambda: importance_log_weights(["a"], ["b"], buckets=1), "buckets"),
        (lambda: importance_log_weights(["a"], ["b"], smoothing=0), "smoothing"),
        (lambda: importance_resample(["a"], ["b"], 2), "size: got 2"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
