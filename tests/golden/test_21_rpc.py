"""SC, PPL, PC and RPC against the released evaluators: confidences, fits, masks, calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.calibration import calibration_metrics
from scoredraw.language.perplexity_consistency import AnswerConfidence, answer_confidence
from scoredraw.language.weibull_mixture import fit_weibull_mixture, fit_weibull_mixtures

pytestmark = pytest.mark.golden

NAME = "21-rpc.json"
METHODS = ("sc", "ppl", "pc", "rpc")


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


def found(problem: dict[str, Any], method: str) -> AnswerConfidence:
    ones = np.ones(len(problem["pred"]))
    return answer_confidence(
        problem["pred"], problem["mean_logprob"], lengths=ones, paths=problem["path"], method=method
    )


def pairs(case: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(case["inputs"]["problems"], case["outputs"]["per_problem"], strict=True))


@pytest.mark.parametrize("method", ["sc", "rpc", "pc"])
def test_confidences(case: dict[str, Any], method: str) -> None:
    tolerance = case["tolerance"]["confidences"]
    for problem, want in pairs(case):
        got = found(problem, method)
        if method == "pc":
            wanted = {int(answer): value for answer, value in want["PC"].items()}
        else:
            wanted = {answer: value for answer, value, _ in want[method.upper()]["answers"]}
            right = {answer for answer, _, is_right in want[method.upper()]["answers"] if is_right}
            assert right <= {problem["truth"]}
        assert set(got.answers) == set(wanted)
        mine = [wanted[answer] for answer in got.answers]
        np.testing.assert_allclose(got.confidence, mine, rtol=0, atol=tolerance)


def test_perplexity(case: dict[str, Any]) -> None:
    """The released list has a row a sample; an answer's confidence is that of its best one."""
    for problem, want in pairs(case):
        got = found(problem, "ppl")
        rows = want["PPL"]["answers"]
        assert [answer for answer, _, _ in rows] == problem["pred"]
        for answer, value in zip(got.answers, got.confidence, strict=True):
            best = max(p for a, p, _ in rows if a == answer)
            assert value == pytest.approx(best, abs=case["tolerance"]["confidences"])


def test_credit(case: dict[str, Any]) -> None:
    for problem, want in pairs(case):
        right = np.array(problem["pred"]) == problem["truth"]
        for method in ("sc", "ppl", "rpc"):
            credit = found(problem, method).choice @ right
            expected = want[method.upper()]["correct"]
            assert credit == pytest.approx(expected, abs=case["tolerance"]["correct"])


def test_the_mixture(case: dict[str, Any]) -> None:
    agree: list[bool] = []
    for problem, want in pairs(case):
        got = found(problem, "rpc")
        fit, mixture = want["weibull"], got.mixture
        assert mixture is not None
        assert mixture.nll <= fit["negloglik"] + 1e-3
        agree.extend(got.keep == np.array(want["keep"]))
        posterior = mixture.posterior_high(np.exp(problem["mean_logprob"]))
        atol = case["tolerance"]["p_high"]
        np.testing.assert_allclose(posterior, want["p_high"], rtol=0, atol=atol)
        mine = [mixture.w, *mixture.k, *mixture.scale]
        theirs = [fit[name] for name in ("w1", "k1", "k2", "lam1", "lam2")]
        np.testing.assert_allclose(mine, theirs, rtol=5e-3)  # they stop at 1e-9 of the likelihood
    assert np.mean(agree) >= 0.97
    assert np.all(agree)  # not one sample differs


def test_fits_in_lock_step_are_those_of_one_after_the_other(case: dict[str, Any]) -> None:
    rows = [np.exp(problem["mean_logprob"]) for problem in case["inputs"]["problems"]]
    for length in {len(row) for row in rows}:
        p = np.array([row for row in rows if len(row) == length])
        together = fit_weibull_mixtures(p)
        for s, row in enumerate(p):
            alone = fit_weibull_mixture(row)
            assert together[s].nll == alone.nll
            np.testing.assert_array_equal(together[s].k, alone.k)


@pytest.mark.parametrize("method", ["sc", "ppl", "rpc"])
def test_calibration(case: dict[str, Any], method: str) -> None:
    got = [found(problem, method) for problem, _ in pairs(case)]
    right = [np.array(problem["pred"]) == problem["truth"] for problem, _ in pairs(case)]
    credit = [one.choice @ mine for one, mine in zip(got, right, strict=True)]
    metrics = calibration_metrics([one.top for one in got], credit)
    want = case["outputs"]["metrics"][method.upper()]
    assert set(metrics) == set(want)
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value, abs=case["tolerance"][name]), name
