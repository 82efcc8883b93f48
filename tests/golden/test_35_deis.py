"""Grids, coefficients, trajectories and end states of DEIS on an exactly known mixture."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.integrator_coefficients import deis_coefficients
from scoredraw.diffusion.schedules import LinearBeta
from scoredraw.diffusion.time_grids import time_grid

pytestmark = pytest.mark.golden

NAME = "35-deis.json"
GRID = 1e-12


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


@pytest.fixture(scope="module")
def schedule(case: dict[str, Any]) -> LinearBeta:
    inputs = case["inputs"]
    schedule = LinearBeta(inputs["beta_0"], inputs["beta_1"])
    return schedule.with_ends(t_start=inputs["t_start"], t_end=inputs["t_end"])


@pytest.fixture(scope="module")
def mixture(case: dict[str, Any], schedule: LinearBeta) -> GaussianMixtureScore:
    inputs = case["inputs"]
    parts = inputs["gmm_weights"], inputs["gmm_means"], inputs["gmm_covs"]
    return GaussianMixtureScore(*parts, schedule)


@pytest.fixture(scope="module")
def x_T(case: dict[str, Any]) -> NDArray[np.float64]:
    return np.array(case["inputs"]["xT"])


def own_grid(case: dict[str, Any]) -> tuple[str, float]:
    return case["inputs"]["ts_phase"], case["inputs"]["ts_order"]


def settings(case: dict[str, Any], key: str) -> dict[str, Any]:
    """Of the variant that `tab3`, `rhork_4rk`, `rk_4rk` or `ipndm` names."""
    if key == "ipndm":
        return {"variant": "ipndm"}
    kind, power = own_grid(case)
    grid = {"grid": kind, "grid_power": power}
    if match := re.fullmatch(r"(?:rho)?rk_(\w+)", key):
        return {"variant": "rhork", "tableau": match[1], **grid}
    return {"variant": key[:-1], "order": int(key[-1]), **grid}


def solve(case: dict[str, Any], mixture: GaussianMixtureScore, key: str, **how: Any) -> Any:
    solver = DEISSolver(mixture.schedule, case["inputs"]["num_steps"], **settings(case, key))
    return solver.sample(mixture.eps, np.array(case["inputs"]["xT"]), **how)


def coefficients(case: dict[str, Any], schedule: LinearBeta, key: str) -> NDArray[np.float64]:
    """The table of `tab2`, `rhoab3`, ... or `ipndm`, in the space in which the file has it."""
    how = settings(case, key)
    grid = ("t", 1) if key == "ipndm" else own_grid(case)
    times = time_grid(schedule, case["inputs"]["num_steps"], *grid)
    space = "v" if "rho" in key else "x"
    return deis_coefficients(schedule, times, how.get("order", 3), how["variant"], space=space)[1]


def test_the_file_has_every_case(case: dict[str, Any]) -> None:
    outputs = case["outputs"]
    assert len(outputs["coef"]) >= 13
    assert len(outputs["x0"]) >= 21
    assert len([key for key in outputs if key.startswith("ts_")]) >= 5


def test_grids(case: dict[str, Any], schedule: LinearBeta) -> None:
    steps = case["inputs"]["num_steps"]
    for key, want in case["outputs"].items():
        if match := re.fullmatch(r"ts_([a-z]+)(\d+)", key):
            got = time_grid(schedule, steps, match[1], float(match[2]))
            np.testing.assert_allclose(got, want, rtol=0, atol=GRID, err_msg=key)


def test_schedule(case: dict[str, Any], schedule: LinearBeta) -> None:
    outputs = case["outputs"]
    times = time_grid(schedule, case["inputs"]["num_steps"], *own_grid(case))
    psi, _ = deis_coefficients(schedule, times)
    np.testing.assert_allclose(psi, outputs["psi"], rtol=GRID)
    np.testing.assert_allclose(schedule.rho(times), outputs["rho"], rtol=GRID)
    np.testing.assert_allclose(schedule.abar(times), outputs["abar"], rtol=GRID)


def test_coefficients(case: dict[str, Any], schedule: LinearBeta) -> None:
    for key, want in case["outputs"]["coef"].items():
        got = coefficients(case, schedule, key)
        tolerance = case["tolerance"]["coef_abs"]
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=key)


def test_eps(case: dict[str, Any], mixture: GaussianMixtureScore, x_T: Any) -> None:
    got = mixture.eps(x_T, case["inputs"]["t_start"])
    np.testing.assert_allclose(got, case["outputs"]["eps_at_xT"], rtol=0, atol=GRID)


def test_end_states(case: dict[str, Any], mixture: GaussianMixtureScore) -> None:
    for key, want in case["outputs"]["x0"].items():
        tolerance = case["tolerance"]["x0_abs"]
        got = solve(case, mixture, key)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=key)


def test_trajectory(case: dict[str, Any], mixture: GaussianMixtureScore) -> None:
    for key, want in case["outputs"].items():
        if key.startswith("trajectory_"):
            got = solve(case, mixture, key.removeprefix("trajectory_"), return_trajectory=True)
            tolerance = case["tolerance"]["x0_abs"]
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=key)


def test_exact_end_point(case: dict[str, Any], mixture: GaussianMixtureScore, x_T: Any) -> None:
    want = case["outputs"]["x0_exact_ode"]
    solver = DEISSolver(mixture.schedule, 400, variant="rhork", tableau="4rk")
    got = solver.sample(mixture.eps, x_T)
    np.testing.assert_allclose(got, want, rtol=0, atol=case["tolerance"]["x0_abs"])


def test_against_the_authors_program(
    case: dict[str, Any], schedule: LinearBeta, mixture: GaussianMixtureScore
) -> None:
    tolerance = case["tolerance"]
    for key, want in case["outputs"]["official_float64"].items():
        if key.endswith("_coef"):
            got = coefficients(case, schedule, key.removesuffix("_coef"))
            close = tolerance["vs_official_float64_coef_abs"]
        else:
            name = key.removeprefix("x0_")
            got = solve(case, mixture, name)
            exact = name.startswith("rk_") or name == "ipndm"  # no Riemann sum in these
            close = tolerance["rhork_vs_official_abs" if exact else "vs_official_float64_x0_abs"]
        np.testing.assert_allclose(got, want, rtol=0, atol=close, err_msg=key)
