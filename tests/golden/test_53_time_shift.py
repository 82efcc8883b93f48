"""Decisions and whole runs of time shift, both readings, on an exactly known mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.pseudo_numerical import PseudoNumericalSampler, step_times
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import TimeShift, TimeShiftSampler, time_shift

pytestmark = [
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore:8 entries a sample"),
]

RUNS = {  # output -> mode, target, the file's chosen indices
    "code_float64": ("code", "plain", "code_shifted_targets"),
    "code_float32": ("code", "plain", "code_shifted_targets"),
    "paper_float64": ("paper", "plain", "paper_shifted_times"),
    "paper_matched_var_float64": ("paper", "matched", "paper_matched_var_times"),
}


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("53-time-shift.json")


@pytest.fixture(scope="module")
def schedule() -> DiscreteAlphas:
    return DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000), clip=0.0)


@pytest.fixture(scope="module")
def eps(case: dict[str, Any], schedule: DiscreteAlphas) -> Any:
    inputs = case["inputs"]
    parts = inputs["gmm_weights"], inputs["gmm_means"], inputs["gmm_covs"]
    mixture = GaussianMixtureScore(*parts, schedule)
    return lambda x, t: mixture.eps(x, t) * (1 + 0.05 * np.cos(3 * x))


def times(case: dict[str, Any]) -> list[int]:
    return [*case["inputs"]["timesteps"][::-1], 0]


def close(case: dict[str, Any], key: str) -> float:
    return float(case["tolerance"]["float32_abs" if "float32" in key else "float64_abs"])


def test_every_output_is_looked_at(case: dict[str, Any]) -> None:
    looked_at = {"shift_table", "ddim_no_shift_float32", "decision_table", *RUNS}
    looked_at |= {chosen for _, _, chosen in RUNS.values()}
    assert set(case["outputs"]) == looked_at


def test_grid(case: dict[str, Any]) -> None:
    assert step_times(1000, 20, "released").tolist() == times(case)


def test_shift_table(case: dict[str, Any], schedule: DiscreteAlphas) -> None:
    inputs = case["inputs"]
    rule = TimeShift(schedule.values, inputs["window_size"], inputs["cutoff"])
    for row in case["outputs"]["shift_table"]:
        assert rule.of_variance([row["var"]], row["t_next"]).tolist() == [row["t_s"]]


def states(variance: float) -> NDArray[np.float64]:
    """A sample of many entries with this very variance."""
    x = np.random.default_rng(0).standard_normal((1, 64))
    x -= x.mean()
    return x * np.sqrt(variance / x.var(ddof=1))


def test_decision_table(case: dict[str, Any], schedule: DiscreteAlphas) -> None:
    for row in case["outputs"]["decision_table"]:
        how = row["window"], row["cutoff"], row["target"], row["data_variance"]
        rule = TimeShift(schedule.values, *how)
        assert rule.of_variance([row["var"]], row["center"]).tolist() == [row["t_s"]], row
        found = time_shift(states(row["var"]), row["center"], schedule.values, *how)
        assert found.tolist() == [row["t_s"]], row


@pytest.mark.parametrize("key", RUNS)
def test_runs(case: dict[str, Any], schedule: DiscreteAlphas, eps: Any, key: str) -> None:
    inputs, (mode, target, chosen) = case["inputs"], RUNS[key]
    sampler = TimeShiftSampler(
        schedule, times=times(case), window=inputs["window_size"], cutoff=inputs["cutoff"],
        mode=mode, target=target, data_variance=inputs["data_variance"],
    )  # fmt: skip
    x, shifts = sampler.sample(eps, np.array(inputs["x_T"]))
    assert shifts.tolist() == case["outputs"][chosen]
    np.testing.assert_allclose(x, case["outputs"][key], rtol=0, atol=close(case, key))
    if "float32" in key:
        x, _ = sampler.sample(eps, np.array(inputs["x_T"], np.float32))
        np.testing.assert_allclose(x, case["outputs"][key], rtol=0, atol=close(case, key))


def test_without_shifts(case: dict[str, Any], schedule: DiscreteAlphas, eps: Any) -> None:
    key = "ddim_no_shift_float32"
    sampler = PseudoNumericalSampler(schedule, times=times(case))
    x = sampler.sample(eps, np.array(case["inputs"]["x_T"]))
    np.testing.assert_allclose(x, case["outputs"][key], rtol=0, atol=close(case, key))
