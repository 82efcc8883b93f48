"""DEIS as a solver: DDIM, closed forms, convergence, ends, dtypes, and what it refuses."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.integrator_coefficients import TABLEAUX, VARIANTS, Tableau
from scoredraw.diffusion.schedules import (
    Cosine,
    DiscreteAlphas,
    LinearBeta,
    LinearFlow,
    NoiseSchedule,
    VarianceExploding,
)
from scoredraw.diffusion.time_grids import time_grid
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

Float = NDArray[np.float64]

LINEAR = LinearBeta()


def name_of(schedule: NoiseSchedule) -> str:
    return type(schedule).__name__


MULTISTEP = ("tab", "rhoab", "logrhoab")
EXACT = (*MULTISTEP, "ipndm", "ei_eps", "rhork")  # those that integrate a constant eps exactly
MIXTURE = GaussianMixtureScore(
    [0.3, 0.7], [[1, -1], [-1.5, 0.5]], [[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0], [0, 0.05]]], LINEAR
)
X_T = np.random.default_rng(35).standard_normal((16, 2))


def solve(steps: int, x: Any = X_T, **how: Any) -> Any:
    return DEISSolver(LINEAR, steps, **how).sample(MIXTURE.eps, x)


def ddim(x: Any, times: Float) -> Any:
    """Predict x_0, noise it again to the next level (Song et al. 2021), step by step."""
    for t, s in pairwise(times):
        eps = MIXTURE.eps(x, t)
        x0 = (x - LINEAR.sigma(t) * eps) / LINEAR.alpha(t)
        x = LINEAR.alpha(s) * x0 + LINEAR.sigma(s) * eps
    return x


@pytest.mark.parametrize(
    "how",
    [
        *({"variant": name, "order": 0} for name in (*MULTISTEP, "ei_eps")),
        {"variant": "ei_eps", "order": 3},
        {"variant": "rhork", "tableau": "1euler"},
    ],
)
def test_order_zero_is_ddim(how: dict[str, Any]) -> None:
    want = ddim(X_T, time_grid(LINEAR, 10))
    np.testing.assert_allclose(solve(10, **how), want, rtol=1e-12, atol=1e-12)


def test_order_zero_of_ipndm_is_ddim() -> None:
    want = ddim(X_T, time_grid(LINEAR, 10, "t", 1.0))
    got = solve(10, variant="ipndm", order=0)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", EXACT)
def test_constant_eps(schedule: NoiseSchedule, variant: str) -> None:
    schedule = schedule.with_ends(t_end=max(schedule.ends.t_end, 1e-3))
    c = np.full_like(X_T, 0.7)
    ends = np.array([schedule.ends.t_start, schedule.ends.t_end])
    alpha, rho = schedule.alpha(ends), schedule.rho(ends)
    want = alpha[1] * (X_T / alpha[0] + (rho[1] - rho[0]) * c)
    got = DEISSolver(schedule, 9, variant=variant).sample(lambda x, t: c, X_T)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def worst_errors(exact: Float, counts: tuple[int, ...], **how: Any) -> list[float]:
    return [float(np.abs(solve(n, **how) - exact).max()) for n in counts]


@pytest.fixture(scope="module")
def exact() -> Float:
    return np.asarray(solve(800, variant="rhork", tableau="4rk"))


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ({"order": 0}, 1),
        ({"order": 1}, 2),
        ({"order": 2}, 3),
        ({"variant": "rhoab", "order": 1}, 2),
        ({"variant": "logrhoab", "order": 1}, 2),
        ({"variant": "rhork", "tableau": "2heun"}, 2),
        ({"variant": "rhork", "tableau": "3kutta"}, 3),
        ({"variant": "rhork", "tableau": "3ral"}, 3),
        ({"variant": "rhork", "tableau": "3heun"}, 3),
        ({"variant": "rhork", "tableau": "3vdh"}, 3),
        ({"variant": "rhork", "tableau": "3ssprk"}, 3),
        ({"variant": "rhork", "tableau": "4rk"}, 4),
        ({"variant": "euler"}, 1),
        ({"variant": "ei_score"}, 1),
    ],
)
def test_order_of_convergence(exact: Float, how: dict[str, Any], order: int) -> None:
    first, last = worst_errors(exact, (80, 160), **how)
    assert np.log2(first / last) == pytest.approx(order, abs=0.35)


def test_order_three_is_between_three_and_four(exact: Float) -> None:
    """Its warm-up has lower order, which caps it near 3."""
    first, last = worst_errors(exact, (80, 160), order=3)
    assert 2.7 < np.log2(first / last) < 4.3
    errors = [worst_errors(exact, (20,), order=r)[0] for r in range(4)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "schedule", [LINEAR, Cosine(), VarianceExploding(), LinearFlow()], ids=name_of
)
@pytest.mark.parametrize("variant", [*MULTISTEP, "rhork"])
def test_gaussian_data_have_a_closed_form(schedule: NoiseSchedule, variant: str) -> None:
    """x_t = alpha_t mu + Σ_k sqrt(sigma_t² + alpha_t² l_k) / sqrt(the same at T) u_k u_kᵀ(...)."""
    mean, covariance = np.array([1.0, -2.0]), np.array([[0.5, 0.2], [0.2, 1.0]])
    data = GaussianMixtureScore([1.0], mean[None], covariance[None], schedule)
    values, U = np.linalg.eigh(covariance)
    ends = np.array([schedule.ends.t_start, schedule.ends.t_end])
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    x = alpha[0] * mean + np.sqrt(alpha[0] ** 2 + sigma[0] ** 2) * X_T
    variances = sigma[:, None] ** 2 + alpha[:, None] ** 2 * values
    spread = np.sqrt(variances[1] / variances[0])
    want = alpha[1] * mean + (x - alpha[0] * mean) @ (U * spread) @ U.T
    errors = []
    for steps in (120, 240, 480):
        got = DEISSolver(schedule, steps, grid="rho", variant=variant).sample(data.eps, x)
        errors.append(float(np.abs(got - want).max()))
    assert np.log2(errors[0] / errors[1]) > 2.7  # third order
    assert errors[2] < 5e-6


def test_fewer_steps_than_order_plus_one() -> None:
    for steps in (1, 2, 3):
        np.testing.assert_array_equal(solve(steps, order=3), solve(steps, order=steps - 1))


@pytest.mark.parametrize("variant", ["rhoab", "rhork"])
def test_no_noise_left_at_the_end(variant: str) -> None:
    for tableau in TABLEAUX:
        calls: list[float] = []

        def eps(x: Any, t: float, calls: list[float] = calls) -> Any:
            calls.append(t)
            return MIXTURE.eps(x, t)

        solver = DEISSolver(LINEAR, 20, variant=variant, tableau=tableau, t_end=0.0)
        assert bool(np.isfinite(solver.sample(eps, X_T)).all())
        ends_at_zero = variant == "rhork" and tableau in ("2heun", "3kutta", "4rk", "3ssprk")
        assert (min(calls) == 0.0) == ends_at_zero
        assert len(calls) == solver.nfe


def test_last_steps() -> None:
    """stop; one more call for the x_0 prediction; or the last step to abar = 1."""
    for how in ({"order": 2}, {"variant": "rhork", "tableau": "2heun"}):
        solvers = {
            last: DEISSolver(LINEAR.with_ends(last=last), 6, **how)
            for last in ("stop", "denoise", "clean")
        }
        counts = dict.fromkeys(solvers, 0)
        paths = {}
        for last, solver in solvers.items():

            def eps(x: Any, t: float, last: str = last, counts: Any = counts) -> Any:
                counts[last] += 1
                return MIXTURE.eps(x, t)

            paths[last] = solver.sample(eps, X_T, return_trajectory=True)
            assert counts[last] == solver.nfe
        path, times = paths["stop"], solvers["stop"].times
        np.testing.assert_array_equal(paths["denoise"][:-1], path)
        np.testing.assert_array_equal(paths["clean"][:-1], path[:-1])
        want = MIXTURE.denoise(path[-1], times[-1])
        np.testing.assert_allclose(paths["denoise"][-1], want, rtol=1e-8, atol=1e-10)
        want = MIXTURE.denoise(path[-2], times[-2])
        np.testing.assert_allclose(paths["clean"][-1], want, rtol=1e-8, atol=1e-10)


def test_init_and_step_are_sample() -> None:
    solver = DEISSolver(LINEAR, 5)
    state = solver.init(X_T)
    path = [state.x]
    while state.index < solver.num_steps:
        state = solver.step(state, MIXTURE.eps)
        path.append(state.x)
    assert len(state.history) == 4
    whole = solver.sample(MIXTURE.eps, X_T, return_trajectory=True)
    np.testing.assert_array_equal(np.stack(path), whole)
    with pytest.raises(InputError, match="state: got one after the last of 5 steps"):
        solver.step(state, MIXTURE.eps)


def test_explicit_times_and_tableau() -> None:
    times = [1.0, 0.6, 0.3, 0.01]
    got = DEISSolver(LINEAR, times=times, order=0).sample(MIXTURE.eps, X_T)
    np.testing.assert_allclose(got, ddim(X_T, np.array(times)), rtol=1e-12)
    own = Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
    solver = DEISSolver(LINEAR, times=times, variant="rhork", tableau=own)
    middle = np.exp(np.log(LINEAR.rho(np.array(times))))
    want = LINEAR.time_of_rho((middle[:-1] + middle[1:]) / 2)
    assert solver.stages is not None
    np.testing.assert_allclose(solver.stages.stage_times[:, 1], want, rtol=1e-12)


# ------------------------------------------------------------------ arrays and tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_arrays(variant: str) -> None:
    x = torch.as_tensor(X_T).reshape(16, 1, 2)
    before = x.clone()
    got = solve(6, x, variant=variant)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert torch.equal(x, before)
    np.testing.assert_allclose(got.reshape(16, 2).numpy(), solve(6, variant=variant), rtol=1e-9)
    small = solve(6, X_T.astype(np.float32), variant=variant)
    assert small.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, np.float16])
@pytest.mark.parametrize("variant", ["tab", "rhork"])
def test_half_precision_accumulates_in_float32(dtype: Any, variant: str) -> None:
    tensor = dtype is not np.float16
    x: Any = torch.as_tensor(X_T).to(dtype) if tensor else X_T.astype(dtype)
    seen = set()

    def eps(x: Any, t: float) -> Any:
        seen.add(x.dtype)
        return MIXTURE.eps(x, t)

    solver = DEISSolver(LINEAR, 10, variant=variant)
    path = solver.sample(eps, x, return_trajectory=True)
    assert seen == {path.dtype} == {x.dtype}
    state = solver.step(solver.init(x), eps)
    single = torch.float32 if tensor else np.dtype(np.float32)
    assert state.x.dtype == single
    wide = x.float() if tensor else x.astype(np.float32)

    def narrow(x: Any, t: float) -> Any:  # the same network at work on a float32 state
        low = x.to(dtype) if tensor else x.astype(dtype)
        return MIXTURE.eps(low, t).float() if tensor else MIXTURE.eps(low, t).astype(np.float32)

    want = solver.sample(narrow, wide, return_trajectory=True)
    assert bool((path == (want.to(dtype) if tensor else want.astype(dtype))).all())


def test_empty_batch_makes_no_call() -> None:
    def never(x: Any, t: float) -> Any:
        raise AssertionError

    solver = DEISSolver(LINEAR, 4)
    assert solver.sample(never, np.zeros((0, 3, 2))).shape == (0, 3, 2)
    path = solver.sample(never, torch.zeros(0, 3), return_trajectory=True)
    assert path.shape == (5, 0, 3)


def test_gradients_pass_through() -> None:
    x = torch.as_tensor(X_T).requires_grad_()
    (slope,) = torch.autograd.grad(solve(4, x)[0, 0], x)
    h = 1e-6
    bump = np.zeros_like(X_T)
    bump[0, 1] = h
    want = (solve(4, X_T + bump) - solve(4, X_T - bump))[0, 0] / (2 * h)
    assert float(slope[0, 1]) == pytest.approx(want, rel=1e-6)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_steps": 0}, "num_steps: got 0, want an integer >= 1"),
        ({"num_steps": 2.0}, "num_steps: got 2"),
        ({"order": -1}, "order: got -1, want an integer >= 0"),
        ({"order": 1.5}, "order: got 1"),
        ({"order": True}, "order"),
        ({"variant": "dpm"}, f"variant: got 'dpm', want one of {', '.join(VARIANTS)}"),
        ({"tableau": "rk5"}, f"tableau: got 'rk5', want one of {', '.join(TABLEAUX)}"),
        ({"tableau": Tableau((0,), ((),), (0.5, 0.5))}, "tableau: got inconsistent sizes"),
        ({"tableau": Tableau((0, 1), ((), ()), (0.5, 0.5))}, "tableau: got inconsistent sizes"),
        ({"grid": "sigma"}, "kind: got 'sigma', want one of t, log, rho"),
        ({"grid_power": 0.5}, "power: got 0"),
        ({"t_start": 0.1, "t_end": 0.1}, "t_start: got 0"),
        ({"t_start": 0.1, "t_end": 0.2}, "t_start: got 0"),
        ({"t_end": -1.0}, "t_end: got -1"),
        ({"t_end": -1.0, "variant": "rhork"}, "t_end: got -1"),
        ({"t_end": 0.0}, "t_end: got 0, where no noise is left"),
        ({"t_end": 0.0, "variant": "logrhoab"}, "t_end: got 0"),
        ({"t_end": 0.0, "variant": "euler"}, "t_end: got 0"),
        ({"times": [1.0, 0.5, 0.5]}, "twice, want distinct times"),
        ({"schedule": Cosine(), "t_start": 1.0}, "where abar = 0"),
        ({"variant": "ipndm", "grid": "log"}, "grid: got 'log'"),
        ({"variant": "ipndm", "grid_power": 2.0}, "uniform grid"),
    ],
)
def test_refused_before_any_call(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        DEISSolver(**{"schedule": LINEAR, **how})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_steps_than_distinct_times() -> None:
    """Where the peers return NaN: 1000 steps on whole times, or duplicates given by hand."""
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    mixture = GaussianMixtureScore([1.0], [[0.5]], [[[0.2]]], schedule)
    for count in (1000, 1500):
        times = time_grid(schedule, count, "t", 1.0, integer=True)
        x0 = DEISSolver(schedule, times=times).sample(mixture.eps, X_T[:, :1])
        assert bool(np.isfinite(x0).all())
    repeated = np.rint(np.linspace(999, 0, 1501))
    with pytest.raises(InputError, match="twice, want distinct times"):
        DEISSolver(schedule, times=repeated)


def test_orders_above_three_warn_and_work() -> None:
    with pytest.warns(UserWarning, match="order 5: extrapolation above order 3"):
        solver = DEISSolver(LINEAR, 40, order=5)
    assert bool(np.isfinite(solver.sample(MIXTURE.eps, X_T)).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DEISSolver(LINEAR, 40, order=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["array", "tensor", "half"])
@pytest.mark.parametrize("variant", ["tab", "rhork"])
def test_eps_that_is_not_finite_names_the_step(bad: float, kind: str, variant: str) -> None:
    x: Any = X_T if kind == "array" else torch.as_tensor(X_T)
    x = x.half() if kind == "half" else x
    solver = DEISSolver(LINEAR, 6, variant=variant)

    def eps(x: Any, t: float) -> Any:
        value = MIXTURE.eps(x, t)
        if t <= solver.times[3]:
            value[4, 1] = bad
        return value

    with pytest.raises(InputError, match=r"eps_fn: got NaN or infinity at step [23] \(t = "):
        solver.sample(eps, x)


def test_large_finite_eps_is_finite() -> None:
    """The sum overflows in float32, the values do not."""
    huge = np.full((4, 2), 3e38, np.float32)
    solver = DEISSolver(VarianceExploding(0.1, 0.2), 1, order=0)
    assert bool(np.isfinite(solver.sample(lambda x, t: huge, np.zeros((4, 2), np.float32))).all())


def test_answers_of_the_wrong_kind() -> None:
    solver = DEISSolver(LINEAR, 4)
    with pytest.raises(InputError, match=r"eps_fn: got shape \(16,\) at step 0"):
        solver.sample(lambda x, t: x[:, 0], X_T)
    with pytest.raises(InputError, match=r"eps_fn: got shape \(32, 2\)"):  # guidance forgotten
        solver.sample(lambda x, t: torch.cat([x, x]), torch.as_tensor(X_T))
    with pytest.raises(InputError, match=r"eps_fn: got a ndarray at step 0 .*, want a Tensor"):
        solver.sample(lambda x, t: np.zeros(x.shape), torch.as_tensor(X_T))
    with pytest.raises(InputError, match=r"got meta at step 0 .*, want the device of x, cpu"):
        solver.sample(lambda x, t: x.to("meta"), torch.as_tensor(X_T))
    with pytest.raises(InputError, match="x_T: got int64, want a floating dtype"):
        solver.sample(MIXTURE.eps, np.ones((2, 2), np.int64))
    with pytest.raises(InputError, match="x_T: got NaN or infinity"):
        solver.sample(MIXTURE.eps, np.full((2, 2), np.nan))
