"""pass@k in exact rationals, the power-law fit, selectors by enumeration, operations, and betas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.language.coverage import coverage_curve, fit_power_law, pass_at_k
from scoredraw.language.coverage_models import BetaBinomial
from scoredraw.language.inference_cost import inference_flops
from scoredraw.language.selection import METHODS
from scoredraw.language.selection_curves import CLOSED, LISTED, select_at_k

pytestmark = pytest.mark.golden

NAME = "38-passk.json"


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


def test_pass_at_k(case: dict[str, Any]) -> None:
    given, want = case["inputs"], case["outputs"]
    got = pass_at_k(given["n"], given["correct"], given["k"])
    tolerance = case["tolerance"]["pass_at_k"]
    np.testing.assert_allclose(got, want["pass_at_k"], rtol=0, atol=tolerance)
    curve = coverage_curve((given["n"], given["correct"]), given["k"], resamples=10)
    np.testing.assert_allclose(curve.mean, want["coverage"], rtol=0, atol=tolerance)


def test_power_law(case: dict[str, Any]) -> None:
    given, want = case["inputs"], case["outputs"]
    curve = coverage_curve((given["n"], given["correct"]), resamples=10)
    assert curve.k.tolist() == given["fit_k"]  # the default sizes are those of the paper
    tolerance = case["tolerance"]["pass_at_k"]
    np.testing.assert_allclose(curve.mean, want["fit_coverage"], rtol=0, atol=tolerance)
    law = fit_power_law(curve.k, curve.mean)
    found = [law.a, law.b]
    np.testing.assert_allclose(found, [want["a"], want["b"]], atol=case["tolerance"]["fit"])


def test_selectors(case: dict[str, Any]) -> None:
    given = case["inputs"]["selection"]
    answers, rewards, ks = given["answers"], given["rewards"], given["k"]
    right = given["right_answer"]
    correct = [[a == want for a in row] for row, want in zip(answers, right, strict=True)]
    for method, want in case["outputs"]["selection_at_k"].items():
        curve = select_at_k(answers, rewards, correct, ks, method)
        tolerance = case["tolerance"]["selection"]
        np.testing.assert_allclose(curve.accuracy, want, rtol=0, atol=tolerance, err_msg=method)
        by_sums = METHODS[method] == ("vote", "rewards")
        assert set(curve.how) == {LISTED if by_sums else CLOSED}
        assert not curve.standard_error.any()


def test_operations(case: dict[str, Any]) -> None:
    got = inference_flops(**case["inputs"]["flops"])
    tolerance = case["tolerance"]["flops_rel"]
    np.testing.assert_allclose(got, case["outputs"]["total_flops"], rtol=tolerance)


def test_beta_binomial(case: dict[str, Any]) -> None:
    given, want = case["inputs"]["beta_binomial"], case["outputs"]["beta_binomial_coverage"]
    got = BetaBinomial(given["alpha"], given["beta"]).coverage(given["k"])
    tolerance = case["tolerance"]["beta_binomial"]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
