"""Calibration: the released loop over bins, edges, clipping, ties, and growth with samples."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.answers import AnswerPool
from scoredraw.errors import InputError
from scoredraw.language.answer_calibration import (
    brier_score,
    calibration_at_k,
    calibration_metrics,
    expected_calibration_error,
    log_loss,
    reliability,
)
from scoredraw.language.perplexity_consistency import METHODS, choose

pytestmark = pytest.mark.oracle

UNIT = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.6, 0.7, 1.0]))


def looped(confidence: list[float], credit: list[float], bins: int) -> float:
    """The error bin by bin, with edges from linspace."""
    edges = np.linspace(0, 1, bins + 1)
    c, a = np.array(confidence), np.array(credit)
    total = 0.0
    for lower, upper in pairwise(edges):
        inside = (c > lower) & (c <= upper)
        if inside.any():
            total += abs(c[inside].mean() - a[inside].mean()) * inside.mean()
    return float(total)


@pytest.mark.property
@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=40), st.sampled_from([1, 3, 10, 15]))
def test_ece_is_the_loop(pairs: list[tuple[float, float]], bins: int) -> None:
    c, a = map(list, zip(*pairs, strict=True))
    got = expected_calibration_error(c, a, bins)
    assert got == pytest.approx(looped(c, a, bins), abs=1e-12)
    stacked = expected_calibration_error([c, c[::-1]], [a, a[::-1]], bins)
    np.testing.assert_allclose(stacked, got, rtol=0, atol=1e-12)
    shown = reliability(c, a, bins)
    gaps = np.abs(shown.confidence - shown.credit) @ shown.count / len(c)
    assert gaps == pytest.approx(float(got), abs=1e-12)


def test_bins_are_open_below_and_a_confidence_of_zero_is_not_counted() -> None:
    assert reliability([0.1, 0.10001], [0, 0]).upper.round(3).tolist() == [0.1, 0.2]
    assert float(expected_calibration_error([0.0, 0.5], [1.0, 1.0])) == 0.25


def test_a_share_is_one_division() -> None:
    """3/10 lies in the bin that ends at 0.3; three tenths added up lie above it."""
    added = 0.1 + 0.1 + 0.1
    assert added > 3 / 10
    assert reliability([3 / 10], [0]).upper.round(3) == [0.3]
    pool = AnswerPool.of([*"aaa", *"bb", *"cc", "d", "e", "f"])
    assert choose(pool, np.arange(10)[None], "sc").top[0] == 3 / 10


def test_log_loss_clips_credits_too() -> None:
    a = 1 - 1e-6
    for confidence, c in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        want = -(a * np.log(c) + 1e-6 * np.log(1 - c))
        assert log_loss([confidence], [1.0]) == pytest.approx(want, rel=1e-6)
    assert brier_score([0.25], [1.0]) == 0.5625


def test_perfect_confidences_have_small_errors() -> None:
    """200,000 events with their own probabilities: ECE's noise is about √(2/π · 10/4m) = 0.003."""
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    found = calibration_metrics(p, rng.random(len(p)) < p)
    assert found["ece"] < 0.01
    assert found["brier"] == pytest.approx(1 / 6, abs=0.002)
    assert found["nll"] == pytest.approx(0.5, abs=0.004)


# ── against the number of samples ───────────────────────────────────────────────────────────────


def pools() -> tuple[list[AnswerPool], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    found, credits_ = [], []
    for _ in range(5):
        answers = np.array(["a", "b", "c", None], object)[rng.integers(0, 4, 9)]
        logprobs, lengths = -rng.gamma(5.0, 1.0, 9), rng.integers(5, 20, 9)
        found.append(
            AnswerPool.of(answers, rewards=rng.random(9), logprobs=logprobs, lengths=lengths)
        )
        credits_.append((answers == "a").astype(float))
    return found, credits_


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_is_the_mean_over_subsets(method: str) -> None:
    """4,000 random pairs a problem against all 36; 5 standard errors."""
    some, credits_ = pools()
    curve = calibration_at_k(some, credits_, [2, 9], method, repeats=4000, rng=0)
    every = np.array(list(combinations(range(9), 2)))
    exact = [
        (choose(pool, every, method).choice * credit[every]).sum(axis=1).mean()
        for pool, credit in zip(some, credits_, strict=True)
    ]
    assert curve.credit[0].shape == (4000, 5)
    assert curve.credit[1].shape == (1, 5)
    assert curve.accuracy[0] == pytest.approx(np.mean(exact), abs=5 * 0.5 / np.sqrt(4000 * 5))
    each = [
        calibration_metrics(c, a) for c, a in zip(curve.confidence[0], curve.credit[0], strict=True)
    ]
    assert curve.ece[0] == pytest.approx(np.mean([m["ece"] for m in each]))
    assert curve.brier[0] == pytest.approx(np.mean([m["brier"] for m in each]))
    assert curve.nll[0] == pytest.approx(np.mean([m["nll"] for m in each]))


def test_any_method_with_confidences() -> None:
    """A function of pool and subsets; the same seed gives the same subsets."""
    some, credits_ = pools()

    def votes(pool: AnswerPool, subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = choose(pool, subsets, "sc")
        return found.choice, found.top

    mine = calibration_at_k(some, credits_, [3], votes, repeats=7, rng=5)
    theirs = calibration_at_k(some, credits_, [3], "sc", repeats=7, rng=5)
    np.testing.assert_array_equal(mine.credit[0], theirs.credit[0])
    np.testing.assert_array_equal(mine.confidence[0], theirs.confidence[0])


@pytest.mark.contract
def test_refusals() -> None:
    some, credits_ = pools()
    with pytest.raises(InputError, match="confidence: got shape"):
        calibration_metrics([], [])
    with pytest.raises(InputError, match="credit: got shape"):
        calibration_metrics([0.5], [1, 0])
    with pytest.raises(InputError, match=r"confidence: got 1\.5 at \[1\]"):
        calibration_metrics([0.5, 1.5], [1, 0])
    with pytest.raises(InputError, match="credit: got nan"):
        brier_score([0.5], [np.nan])
    with pytest.raises(InputError, match="n_bins: got 0"):
        calibration_metrics([0.5], [1], n_bins=0)
    with pytest.raises(InputError, match="pools: got none"):
        calibration_at_k([], [], [1])
    with pytest.raises(InputError, match="k: got 10"):
        calibration_at_k(some, credits_, [10], "sc")
    with pytest.raises(InputError, match="credits_: got 1 rows"):
        calibration_at_k(some, credits_[:1], [1], "sc")
    with pytest.raises(InputError, match="repeats: got 0"):
        calibration_at_k(some, credits_, [1], "sc", repeats=0)
    with pytest.raises(InputError, match="method: got 'vote'"):
        calibration_at_k(some, credits_, [1], "vote")
