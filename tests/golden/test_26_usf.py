"""The unified solver against the authors' program: presets, a mixed schedule, derivatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import (
    DiscreteAlphas,
    EndPoints,
    LinearBeta,
    NoiseSchedule,
    VarianceExploding,
)
from scoredraw.diffusion.solver_schedules import SolverSchedule, solver_preset
from scoredraw.diffusion.unified_solver import UnifiedSolver, derivative_weights
from scoredraw.errors import InputError

pytestmark = pytest.mark.golden

FILE = "26-usf.json"
RELEASED = Path(__file__).resolve().parents[3] / "shared" / "data" / "26-usf"

PRESETS: dict[str, dict[str, Any]] = {
    "dpmsolver++_2M_dpmsolvertype": {"name": "dpm_solver++", "order": 2, "relaxation": "bh2"},
    "dpmsolver++_3M": {"name": "dpm_solver++", "order": 3},
    "dpmsolver_2M_taylor": {"name": "dpm_solver", "order": 2},
    "dpmsolver_3M": {"name": "dpm_solver", "order": 3},
    "unipc2_bh2": {"name": "unipc", "order": 2, "relaxation": "bh2"},
    "unipc3_vary": {"name": "unipc", "order": 3},
    "unipc2_noise_nocorr": {
        "name": "dpm_solver", "order": 2, "relaxation": "bh1",
    },
}  # fmt: skip


@pytest.fixture
def data(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(FILE)


def setting(given: dict[str, Any]) -> tuple[LinearBeta, GaussianMixtureScore, np.ndarray]:
    ends = EndPoints(given["t_start"], given["t_end"])
    schedule = LinearBeta(given["beta_0"], given["beta_1"], ends=ends)
    mixture = given["gmm_weights"], given["gmm_means"], given["gmm_covs"]
    return schedule, GaussianMixtureScore(*mixture, schedule), np.array(given["xT"])


def test_every_final_state(data) -> None:
    given, want = data["inputs"], data["outputs"]["x0"]
    schedule, score, x_T = setting(given)
    assert set(want) == set(given["decisions"]) == {*PRESETS, "mixed"}
    for name, decisions in given["decisions"].items():
        solver = UnifiedSolver(SolverSchedule.from_released(decisions), schedule)
        got = solver.sample(score.eps, x_T)
        np.testing.assert_allclose(
            got, want[name], rtol=0, atol=data["tolerance"]["abs"], err_msg=name
        )


def test_the_presets_are_the_authors_records(data) -> None:
    given = data["inputs"]
    schedule, _, _ = setting(given)
    for name, choices in PRESETS.items():
        record = SolverSchedule.from_released(given["decisions"][name])
        ours = solver_preset(noise_schedule=schedule, nfe=given["num_steps"], **choices)
        np.testing.assert_allclose(ours.times, record.times, rtol=1e-9)
        for a, b in zip(ours.with_times(record.times).steps, record.steps, strict=True):
            assert a.prediction == b.prediction, name
            for mine, theirs in ((a.predictor, b.predictor), (a.corrector, b.corrector)):
                assert (mine is None) == (theirs is None), name
                if mine is not None and theirs is not None:
                    assert (mine.order, mine.start) == (theirs.order, theirs.start), name
                    assert list(map(set, mine.active)) == list(map(set, theirs.active)), name
                    assert mine.relaxation == theirs.relaxation, name


def test_every_derivative(data) -> None:
    given = data["inputs"]["derivative_case"]
    lam, values = np.array(given["lambdas"]), np.array(given["values"])
    rows = []
    for o in (1, 2, 3):
        points = [-p for p in range(2, o + 2)]
        for k in range(1, o + 1):
            a = derivative_weights(lam[points] - lam[-1], k)
            rows.append(a @ (values[points] - values[-1]))
    tolerance = data["tolerance"]["abs"]
    np.testing.assert_allclose(rows, data["outputs"]["derivatives"], rtol=0, atol=tolerance)


def test_the_exact_solution(data) -> None:
    schedule, score, x_T = setting(data["inputs"])
    exact = DEISSolver(schedule, 400, variant="rhork", tableau="4rk").sample(score.eps, x_T)
    want = data["outputs"]["x0_exact_ode"]
    np.testing.assert_allclose(exact, want, rtol=0, atol=data["tolerance"]["abs"])


# ------------------------------------------------------------------ the released schedules


@pytest.fixture(scope="module")
def released() -> dict[str, Any]:
    if not RELEASED.is_dir():
        pytest.skip("the searched schedules have no licence: they lie beside a checkout only")
    return dict(json.loads((RELEASED / "searched_schedules.json").read_text(encoding="utf-8")))


def noise_schedule(name: str) -> NoiseSchedule:
    if "edm" in name:
        return VarianceExploding()
    if "imagenet" in name:  # times (n + 1)/1000 of a discrete model
        return DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    return LinearBeta()


def test_all_24_released_schedules_have_the_calls_of_their_name(released) -> None:
    assert len(released) == 24
    for name, record in released.items():
        schedule = SolverSchedule.from_released(record)
        assert schedule.nfe == int(name.split("nfe")[1]), name
        assert SolverSchedule.from_json(schedule.to_json()) == schedule


def test_released_schedules_run_but_for_their_v3_predictions(released) -> None:
    """With data in place of v3; from 4 calls on nearer the exact solution than DDIM."""
    for name, record in released.items():
        schedule = SolverSchedule.from_released(record)
        noise = noise_schedule(name)
        if "imagenet" in name:
            schedule = schedule.with_times(1000 * schedule.times - 1)
        if any(step.prediction == "v3" for step in schedule.steps):
            with pytest.raises(InputError, match=r"step \d+: prediction: got 'v3'"):
                UnifiedSolver(schedule, noise)
        plain = schedule.with_prediction("data")
        mean = np.array([0.2, -0.1])
        score = GaussianMixtureScore([1.0], [mean], [0.25 * np.eye(2)], noise)
        x_T = np.random.default_rng(26).standard_normal((64, 2)) * noise.prior_std
        mean_x0 = mean if plain.afs == "average_x0" else None
        solver = UnifiedSolver(plain, noise, mean_x0=mean_x0)
        got = solver.sample(score.eps, x_T)
        assert np.isfinite(got).all()
        if "imagenet" not in name:
            ends = {"t_start": plain.times[0], "t_end": plain.times[-1]}
            fine = DEISSolver(noise, 300, variant="rhork", tableau="4rk", grid="log", **ends)
            exact = fine.sample(score.eps, x_T)
            ddim = solver_preset("ddim", noise.with_ends(**ends), plain.nfe)
            errors = [
                float(np.sqrt(np.mean((end - exact) ** 2)))
                for end in (got, UnifiedSolver(ddim, noise).sample(score.eps, x_T))
            ]
            assert plain.nfe == 3 or errors[0] < errors[1], (name, errors)
