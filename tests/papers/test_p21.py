"""The experiment of paper 21: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scoredraw.papers import p21_rpc as p21
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.oracle

PLAN = replace(p21.PLANS["smoke"], subsets=10)


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(21, "smoke", 0)


@pytest.fixture(scope="module")
def curves() -> p21.Curves:
    return p21.real_curves(p21.ARITH, PLAN, 0)


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert all(claim.verdict is None for claim in small.claims)
    sets = 2
    assert len(small.claims) == 10 * sets + 10
    assert len(small.tables) == sets + 7
    assert len(small.figures) == 3 * sets + 2
    text = small.to_json()
    assert Report.from_json(text).claims == small.claims
    assert len(text) < 300_000


def test_the_evaluators_figures_at_32(curves: p21.Curves) -> None:
    """Accuracy and ECE in per cent as they were measured by others, all samples taken."""
    for method, reference in p21.REFERENCE.items():
        got = 100 * curves[method].accuracy[-1], 100 * curves[method].ece[-1]
        assert got == pytest.approx(reference[-1], abs=0.0501 if method != "rpc" else 0.12)
    pc = 100 * curves["pc"].accuracy[-1], 100 * curves["pc"].ece[-1]
    assert pc == pytest.approx(p21.WITHOUT_PRUNING, abs=0.05)


def test_leaving_out_what_has_no_answer(curves: p21.Curves) -> None:
    curve = curves["sc"]
    c, a = curve.confidence[0], curve.credit[0]
    share = (c > 0).mean(axis=1)
    assert 0.8 < share.mean() < 1
    # c = 0 lies in no bin: left out, the rest counts for more
    assert p21.answered_ece(curve, 0) == pytest.approx(
        np.mean([p21.expected_calibration_error(x, y) for x, y in zip(c, a, strict=True)] / share)
    )


def test_any_answer(curves: p21.Curves) -> None:
    pools, _ = p21.pools_of(p21.ARITH)
    choice, sure = p21.any_answer(pools[0], np.arange(32)[None])
    assert choice[0][pools[0].null].sum() == 0
    assert choice.sum() == pytest.approx(1)
    assert sure[0] == pytest.approx(1 / (~pools[0].null).sum())


def test_one_vote_in_the_twin_is_the_mass_of_the_truth() -> None:
    """E[max of Dirichlet(1, ..., 1)] = (1 + 1/2 + ... + 1/6)/6, with one sample and with two.

    20,000 problems: 5 standard errors are 0.015.
    """
    got = p21.twin_accuracy(6, 20_000, (1, 2), np.random.default_rng(0))
    mass = sum(1 / i for i in range(1, 7)) / 6
    np.testing.assert_allclose(got["sc"], mass, rtol=0, atol=0.015)
    for method in ("ppl", "pc", "rpc"):
        assert got[method][0] == pytest.approx(got["sc"][0])
        assert got[method][1] > got["sc"][1] + 0.05


@pytest.mark.filterwarnings("ignore:the mixture of .* did not converge")
def test_the_twin_has_the_order_of_the_methods() -> None:
    got = p21.twin_accuracy(6, 200, (64,), np.random.default_rng(0))
    assert got["pc"][0] > got["sc"][0] + 0.05
    assert got["pc"][0] > got["ppl"][0] + 0.05


def test_claims_can_fail(curves: p21.Curves) -> None:
    """With the roles of two methods exchanged, what held does not."""
    held = p21.real_claims("x", curves, 1, PLAN)
    assert held[0].verdict == "holds"
    exchanged = {**curves, "sc": curves["ppl"], "ppl": curves["sc"], "rpc": curves["any"]}
    assert all(claim.verdict == "fails" for claim in p21.real_claims("x", exchanged, 1, PLAN))
    found = {m: np.random.default_rng(0).random((5, 6)) / 100 for m in p21.METHODS}
    found["sc"][:, -1] += 0.9
    assert [claim.verdict for claim in p21.twin_claims(found)][:2] == ["fails", "fails"]


def test_the_simulation_tells_the_laws_apart() -> None:
    report = Report(paper=21, scale="quick", seed=0)
    p21.add_errors(report, replace(PLAN, runs=20_000), 0)
    assert [claim.verdict for claim in report.claims] == ["holds", "fails"]


def test_densities_are_those_of_the_mixture() -> None:
    theta, x = np.array([0.4, 3.0, 0.7, 2.0, 0.3]), np.array([0.1, 0.5, 0.8])
    value, _ = p21.negative_log_likelihood(theta[None], np.log(x)[None])
    assert p21.densities_loss(theta, x) == pytest.approx(value[0], rel=1e-12)
    alone = p21.best_of_starts(x, 3, np.random.default_rng(0))
    assert alone.fun <= value[0]
