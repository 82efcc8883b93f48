"""The experiment of paper 01: it runs, and its parts are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.metrics import bootstrap_interval
from scoredraw.papers import p01_lp_sensitivity as p01
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.contract


def test_smoke_runs_without_verdicts() -> None:
    report = run_paper(1, "smoke", 0)
    assert Report.from_json(report.to_json()).claims == report.claims
    assert len(report.claims) == 5
    assert all(claim.verdict is None for claim in report.claims)
    assert [len(table.rows) for table in report.tables] == [10, 5]


@pytest.mark.oracle
def test_the_gain_is_taken_against_the_better_uniform() -> None:
    values = np.zeros((5, 2, 3))
    values[..., 0] = [0.3, 0.1]
    values[..., 1] = [0.6, 0.2]
    values[..., 2] = [0.4, 0.4]
    assert p01.gain(values) == pytest.approx((0.25 + 0.5) / 2)
    interval = bootstrap_interval(values, statistic=p01.gain)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.375, 0.375, 0.375))


@pytest.mark.oracle
def test_the_planted_matrix() -> None:
    A = p01.planted(300, 1)
    assert np.linalg.matrix_rank(A) == 20
    assert (np.count_nonzero(A[:, 10:], axis=0) == 1).all()


@pytest.mark.oracle
def test_the_table_of_breast_cancer() -> None:
    """Its total l1 sensitivity is 7.773, a quarter of the largest possible."""
    A = p01.breast_cancer()
    assert A.shape == (569, 31)
    np.testing.assert_allclose(A[:, :30].var(axis=0), 1)
    assert p01.all_scores(A)[p01.SENSITIVITY].sum() == pytest.approx(7.773, abs=5e-4)
