"""Calibration of answers: ties, and growth with samples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from scoredraw.answers import AnswerPool
from scoredraw.calibration import calibration_metrics, reliability
from scoredraw.errors import InputError
from scoredraw.language.answer_calibration import calibration_at_k
from scoredraw.language.perplexity_consistency import METHODS, choose

pytestmark = pytest.mark.oracle


def test_a_share_is_one_division() -> None:
    """3/10 lies in the bin that ends at 0.3; three tenths added up lie above it."""
    added = 0.1 + 0.1 + 0.1
    assert added > 3 / 10
    assert reliability([3 / 10], [0]).upper.round(3) == [0.3]
    pool = AnswerPool.of([*"aaa", *"bb", *"cc", "d", "e", "f"])
    assert choose(pool, np.arange(10)[None], "sc").top[0] == 3 / 10


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
