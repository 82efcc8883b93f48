"""Calibration and proper scores: loops over bins, edges, clipping, ties, and what pays best."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from scoredraw.calibration import (
    PROPER_SCORES,
    auroc,
    brier_score,
    calibration_metrics,
    expected_calibration_error,
    log_loss,
    logarithmic_score,
    reliability,
)
from scoredraw.errors import InputError

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


@pytest.mark.property
@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=40), st.sampled_from([1, 10]))
def test_left_closed_bins_are_digitize(pairs: list[tuple[float, float]], bins: int) -> None:
    c, a = (np.array(x) for x in zip(*pairs, strict=True))
    place = np.digitize(c, np.linspace(0, 1, bins + 1)[1:-1])
    want = sum(
        abs(c[place == b].mean() - a[place == b].mean()) * (place == b).mean()
        for b in range(bins)
        if (place == b).any()
    )
    got = expected_calibration_error(c, a, bins, closed="left")
    assert float(got) == pytest.approx(float(want), abs=1e-12)


@pytest.mark.property
@given(st.lists(st.tuples(UNIT, st.booleans()), min_size=2, max_size=30))
def test_auroc_is_scikit_learns(pairs: list[tuple[float, bool]]) -> None:
    c, a = zip(*pairs, strict=True)
    if len(set(a)) == 2:
        assert auroc(c, a) == pytest.approx(roc_auc_score(a, c))


def test_auroc_of_one_class_is_nan() -> None:
    with pytest.warns(RuntimeWarning, match="all are right"):
        assert np.isnan(auroc([0.5, 0.6], [1, 1]))


@pytest.mark.parametrize("name", PROPER_SCORES)
def test_the_truth_scores_best(name: str) -> None:
    """p S(q, 1) + (1 - p) S(q, 0) is largest at q = p, on a grid of 0.01."""
    grid = np.linspace(0, 1, 101)
    score = PROPER_SCORES[name]
    for p in grid:
        mean = p * score(grid, np.ones(101)) + (1 - p) * score(grid, np.zeros(101))
        assert grid[mean.argmax()] == pytest.approx(p, abs=1e-9)
        assert mean.max() <= 0
    assert float(score(1.0, 1)) == pytest.approx(0, abs=2e-3)  # the log score is clipped


@pytest.mark.contract
def test_refusals() -> None:
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
    with pytest.raises(InputError, match="closed: got 'both'"):
        expected_calibration_error([0.5], [1], closed="both")
    with pytest.raises(InputError, match="correct: got a share"):
        auroc([0.5], [0.5])
    with pytest.raises(InputError, match=r"clip: got 0\.7"):
        logarithmic_score([0.5], [1], clip=0.7)
