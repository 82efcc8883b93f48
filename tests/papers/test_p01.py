"""The experiment of paper 01: it runs, and its parts are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.metrics import Estimate, bootstrap_interval
from scoredraw.papers import lp_surrogates
from scoredraw.papers import p01_lp_sensitivity as p01
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.contract


def test_smoke_runs_without_verdicts() -> None:
    report = run_paper(1, "smoke", 0)
    assert Report.from_json(report.to_json()).claims == report.claims
    assert len(report.claims) == 8
    assert all(claim.verdict is None for claim in report.claims)
    assert [len(table.rows) for table in report.tables] == [10, 5, 14]


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


def small() -> NDArray[np.float64]:
    return np.asarray(p01.breast_cancer()[:150, -6:])


@pytest.mark.oracle
def test_surrogates_count_their_programmes() -> None:
    A = small()
    exact = {p: lp_sensitivities(A, p) for p in (1.0, 3.0)}
    table = lp_surrogates.surrogate_table(A, exact, lambda score: Estimate(1, 1, 1, 1), 0)
    solved = {(row[0], row[1]): row[2] for row in table.rows}
    for p in ("1", "3"):
        assert solved[p, "exact"] == solved[p, "against 400 rows"] == 150
        assert solved[p, "blocks of 8"] == 4 * 19
        assert solved[p, "blocks of 32"] == 4 * 5
        assert solved[p, "upper bounds"] == 0
    assert [row[4] for row in table.rows if row[1] == "exact"] == [1, 1]


@pytest.mark.oracle
def test_a_bound_below_a_sensitivity_fails_the_claim() -> None:
    A = small()
    sigma = lp_sensitivities(A, 1)
    assert lp_surrogates.upper_claim(A, {1.0: sigma}).verdict == "holds"
    sigma[3] = 1.0
    claim = lp_surrogates.upper_claim(A, {1.0: sigma})
    assert (claim.verdict, str(claim.measured)[:8]) == ("fails", "1 of 300")


@pytest.mark.oracle
def test_the_claim_on_totals() -> None:
    """300 nominal 95 % intervals: below the bound of 90 % with a probability under 1e-3."""
    A = small()
    sigma = lp_sensitivities(A, 1)
    claim = lp_surrogates.total_claim(A, sigma, 300, 0)
    assert isinstance(claim.measured, Estimate)
    assert claim.measured.value > 0.9
    wrong = lp_surrogates.total_claim(A, 1.1 * sigma, 300, 0)  # the library's estimate differs
    assert wrong.verdict == "fails"


@pytest.mark.oracle
def test_the_certificates_meet() -> None:
    pytest.importorskip("cvxpy")
    assert lp_surrogates.certificate_claim(small()[:40, :3]).verdict == "holds"
