"""Sensitivities, Lewis weights, leverage and calibrated probabilities computed independently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.sampling import calibrate_inclusion

pytestmark = pytest.mark.golden

NAME = "01-lp-scores.json"


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


@pytest.fixture(scope="module")
def matrix(case: dict[str, Any]) -> NDArray[np.float64]:
    return np.array(case["inputs"]["A"])


@pytest.mark.parametrize("method", ["gram", "qr"])
def test_leverage(case: dict[str, Any], matrix: NDArray[np.float64], method: str) -> None:
    got = leverage_scores(matrix, method=method)
    tolerance = case["tolerance"]["leverage_abs"]
    np.testing.assert_allclose(got, case["outputs"]["leverage"], rtol=0, atol=tolerance)


def test_sensitivities(case: dict[str, Any], matrix: NDArray[np.float64]) -> None:
    for p, want in case["outputs"]["by_p"].items():
        got = lp_sensitivities(matrix, float(p))
        tolerance = case["tolerance"]["sensitivity_rel"]
        np.testing.assert_allclose(got, want["sensitivity"], rtol=tolerance, atol=0)
        np.testing.assert_allclose(got.sum(), want["total_sensitivity"], rtol=tolerance)


def test_sensitivities_by_linear_programmes(
    case: dict[str, Any], matrix: NDArray[np.float64]
) -> None:
    got = lp_sensitivities(matrix, 1, solver="lp")
    want = case["outputs"]["by_p"]["1"]["sensitivity"]
    tolerance = case["tolerance"]["sensitivity_rel"]
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=0)


def test_lewis_weights(case: dict[str, Any], matrix: NDArray[np.float64]) -> None:
    for p, want in case["outputs"]["by_p"].items():
        got = lewis_weights(matrix, float(p))
        tolerance = case["tolerance"]["lewis_rel"]
        np.testing.assert_allclose(got, want["lewis_weights"], rtol=tolerance, atol=0)
        np.testing.assert_allclose(got.sum(), want["lewis_sum"], rtol=tolerance)


def test_calibrated_probabilities(case: dict[str, Any], matrix: NDArray[np.float64]) -> None:
    inputs, outputs, tolerance = case["inputs"], case["outputs"], case["tolerance"]["q_abs"]
    tau = leverage_scores(matrix)
    q, alpha = calibrate_inclusion(tau, inputs["budget_m"])
    np.testing.assert_allclose(q, outputs["calibrated_q_leverage"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(alpha, outputs["calibrated_alpha_leverage"], rtol=1e-9)
    q, _ = calibrate_inclusion(lp_sensitivities(matrix, 1) + tau, inputs["budget_m_sum_scores"])
    want = outputs["calibrated_q_l1sens_plus_leverage"]
    np.testing.assert_allclose(q, want, rtol=0, atol=tolerance)


def test_complete_graphs(case: dict[str, Any]) -> None:
    for graph in case["outputs"]["complete_graph"]:
        v = graph["v"]
        vertices = np.eye(v)
        first, second = np.triu_indices(v, 1)
        grounded = (vertices[first] - vertices[second])[:, 1:]
        got = lp_sensitivities(grounded, graph["p"])
        tolerance = case["tolerance"]["sensitivity_rel"]
        np.testing.assert_allclose(got, graph["sensitivity_each_row"], rtol=tolerance)
