"""The tangent kernel's Gram matrix, descent, scores and stopping steps on sixteen noisy points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.diffusion.kernel_regression import (
    SpectralRegression,
    descent_filter,
    ntk_relu,
    rwy_stopping_step,
)
from scoredraw.diffusion.schedules import OrnsteinUhlenbeck

pytestmark = pytest.mark.golden

SCHEDULE = OrnsteinUhlenbeck()


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("50-ntk-score.json")


def features(x: Any, t: Any, t_min: float) -> NDArray[np.float64]:
    return np.column_stack([x, np.asarray(t) - t_min])


@pytest.fixture(scope="module")
def ours(case: dict[str, Any]) -> dict[str, Any]:
    """Each of the file's outputs, by its name."""
    given = case["inputs"]
    x = SCHEDULE.perturb(np.array(given["X0"]), given["t"], np.array(given["eps"]))
    Z = features(x, given["t"], given["T0"])
    queries, times = np.array(given["query_x"]), np.array(given["query_t"])
    Z_query = features(queries, times, given["T0"])
    fit = SpectralRegression.fit(Z, given["X0"])
    predictions = {
        steps: fit.predict(Z_query, fit.descent(int(steps)))
        for steps in case["outputs"]["pred_by_tau"]
    }
    alpha, sigma = SCHEDULE.alpha(times)[:, None], SCHEDULE.sigma(times)[:, None]
    eta = 1 / fit.largest
    return {
        "eta_value": eta,
        "K": ntk_relu(Z),
        "K_query": ntk_relu(Z_query, Z),
        "pred_by_tau": predictions,
        "score_tau100": (alpha * predictions["100"] - queries) / sigma**2,
        "stop_step": {
            str(noise): rwy_stopping_step(fit.eigenvalues, noise, eta) for noise in given["sigmas"]
        },
    }


def test_every_output(case: dict[str, Any], ours: dict[str, Any]) -> None:
    close = {"rtol": 0, "atol": case["tolerance"]["abs"]}
    outputs = case["outputs"]
    assert set(outputs) == set(ours) - {"eta_value"}
    np.testing.assert_allclose(ours["eta_value"], case["inputs"]["eta_value"], **close)
    for name in ("K", "K_query", "score_tau100"):
        np.testing.assert_allclose(ours[name], outputs[name], err_msg=name, **close)
    assert set(outputs["pred_by_tau"]) == {"1", "5", "20", "100", "1000"}
    for steps, want in outputs["pred_by_tau"].items():
        np.testing.assert_allclose(ours["pred_by_tau"][steps], want, err_msg=steps, **close)
    assert ours["stop_step"] == outputs["stop_step"]


def test_descent_step_by_step_gives_the_same(case: dict[str, Any]) -> None:
    """f ← f - (η/n) K (f - y) on training points and queries together, as the file defines it."""
    outputs, given = case["outputs"], case["inputs"]
    K, K_query, y = (np.array(v) for v in (outputs["K"], outputs["K_query"], given["X0"]))
    rate = given["eta_value"] / len(y)
    f, f_query = np.zeros_like(y), np.zeros((len(K_query), y.shape[1]))
    for k in range(1, 1001):
        residual = f - y
        f, f_query = f - rate * K @ residual, f_query - rate * K_query @ residual
        if str(k) in outputs["pred_by_tau"]:
            want = outputs["pred_by_tau"][str(k)]
            np.testing.assert_allclose(f_query, want, rtol=0, atol=case["tolerance"]["abs"])


def test_the_angle_by_arccos_misses_the_files_diagonal(case: dict[str, Any]) -> None:
    """Why the kernel takes the angle from two distances: an arccos is off by more than 1e-8."""
    K = np.array(case["outputs"]["K"])
    given = case["inputs"]
    x = SCHEDULE.perturb(np.array(given["X0"]), given["t"], np.array(given["eps"]))
    Z = features(x, given["t"], given["T0"])
    inner, length = Z @ Z.T, np.linalg.norm(Z, axis=1)
    cosine = np.clip(inner / np.outer(length, length), -1, 1)
    rounded = inner * (np.pi - np.arccos(cosine)) / (2 * np.pi)
    assert np.abs(np.diag(rounded - K)).max() > case["tolerance"]["abs"]
    assert np.abs(np.diag(ntk_relu(Z) - K)).max() < 1e-14


def test_filters_need_no_fit(case: dict[str, Any]) -> None:
    """The same predictions from the file's own matrices: κ(z, Z) V g(Λ) Vᵀ y / n."""
    outputs, given = case["outputs"], case["inputs"]
    K, K_query, y = (np.array(v) for v in (outputs["K"], outputs["K_query"], given["X0"]))
    values, V = np.linalg.eigh(K / len(y))
    for steps, want in outputs["pred_by_tau"].items():
        g = descent_filter(np.maximum(values, 0), int(steps), given["eta_value"])
        got = K_query @ (V * g) @ V.T @ y / len(y)
        np.testing.assert_allclose(got, want, rtol=0, atol=case["tolerance"]["abs"])
