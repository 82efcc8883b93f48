"""The unified step: closed forms, the solvers it contains, orders of convergence, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from scoredraw.diffusion.deis import DEISSolver, deis_coefficients
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import Cosine, DiscreteAlphas, LinearBeta, VarianceExploding
from scoredraw.diffusion.solver_schedules import (
    SolverSchedule,
    StepDecision,
    Taylor,
    solver_preset,
    step_times,
)
from scoredraw.diffusion.unified_solver import (
    UnifiedSolver,
    derivative_weights,
    phi,
    relaxation_factor,
    step_weights,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

VP = LinearBeta()
DATA = GaussianMixtureScore(
    [0.45, 0.55], [[0.13, -0.13], [0.64, 0.1]], [np.diag([0.29, 0.32]), np.diag([0.23, 0.27])]
)
RNG = np.random.default_rng(26)
X_T = RNG.standard_normal((16, 2))


def solve(schedule: SolverSchedule, eps: Any = DATA.eps, x: Any = X_T, noise: Any = VP) -> Any:
    return UnifiedSolver(schedule, noise).sample(eps, x)


# ------------------------------------------------------------------ the weights


def test_phi_to_forty_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    for z in (-38.0, -7.3, -0.5, -1e-3, -1e-9, 0.0, 1e-12, 1e-5, 0.09, 2.0, 15.0, 38.0):
        for k in (1, 2, 3, 4, 5):
            with mpmath.workdps(60):
                terms = [mpmath.mpf(z) ** m / mpmath.factorial(m + k) for m in range(300)]
                want = float(mpmath.fsum(terms))
            assert float(phi(k, z)) == pytest.approx(want, rel=5e-14)


def test_derivatives_are_exact_for_polynomials() -> None:
    for o in (1, 2, 3, 4):
        lam, start = np.sort(RNG.normal(size=o)), 1.7
        for k in range(1, o + 1):
            a = derivative_weights(lam - start, k)
            for degree in range(o + 1):
                p = np.polynomial.Polynomial(RNG.normal(size=degree + 1))
                assert a @ (p(lam) - p(start)) == pytest.approx(p.deriv(k)(start), abs=1e-7)
    with pytest.raises(InputError, match="gaps"):
        derivative_weights([0.5, 0.5], 1)
    with pytest.raises(InputError, match="gaps"):
        derivative_weights([0.5, 0.0], 1)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_full_noise_expansions_are_deis_in_log_rho(order) -> None:
    """Both integrate the polynomial through the same values, by different formulas."""
    schedule = solver_preset("dpm_solver", VP, 8, order=order, lower_order_final=False)
    psi, C = deis_coefficients(VP, schedule.times, order - 1, "logrhoab")
    levels = VP.alpha(schedule.times), VP.sigma(schedule.times)
    for i, step in enumerate(step_weights(schedule, *levels)):
        assert step.predictor.scale == pytest.approx(psi[i], rel=1e-12)
        for j, weight in zip(step.predictor.calls, step.predictor.weights, strict=True):
            assert weight == pytest.approx(C[i, i - j], rel=1e-8)


def test_order_one_is_ddim_for_both_predictions() -> None:
    times = step_times(VP, 7, "quadratic")
    want = DEISSolver(VP, times=times, variant="ei_eps").sample(DATA.eps, X_T)
    for prediction in ("noise", "data"):
        ours = solver_preset("ddim", VP, 7, grid="quadratic", prediction=prediction)
        np.testing.assert_allclose(solve(ours), want, rtol=1e-10)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_polynomial_of_log_snr_is_integrated_exactly(prediction, degree) -> None:
    """By predictors and correctors of order degree + 1; one order less leaves an error."""
    p = np.polynomial.Polynomial([0.3, -0.2, 0.1, 0.05][: degree + 1])
    i = 4
    for order, corrector in ((degree, True), (degree + 1, False), (degree, False)):
        made = solver_preset(
            "unipc", VP, 7, order=order, prediction=prediction, lower_order_final=False
        )
        alpha, sigma = VP.alpha(made.times), VP.sigma(made.times)
        lam = np.log(alpha / sigma)
        weights = step_weights(made, alpha, sigma)[i]
        one = weights.corrector if corrector else weights.predictor
        assert one is not None
        got = sum(w * p(lam[j]) for j, w in zip(one.calls, one.weights, strict=True))
        sign, end = (-1, alpha[i + 1]) if prediction == "noise" else (1, sigma[i + 1])
        want = sign * end * quad(lambda v: np.exp(sign * v) * p(v), lam[i], lam[i + 1])[0]  # noqa: B023
        exact = abs(got - want) < 1e-10
        assert exact == (corrector or order == degree + 1)


def test_a_corrector_of_a_constant_network_changes_nothing() -> None:
    one = np.ones_like(X_T)
    plain = solver_preset("dpm_solver", VP, 6, order=3)
    corrected = solver_preset("dpm_solver", VP, 6, order=3, corrector="pseudo")
    for made in (plain, corrected):
        np.testing.assert_allclose(solve(made, lambda x, t: one), solve(plain, lambda x, t: one))


def test_relaxations_by_their_formulas() -> None:
    for h in (0.3, 2.0):
        for z in (h, -h):
            e = np.exp(z)
            want = {
                "none": 1.0, "linear": 1 - 0.1 * h, "bh1": 0.5 * z * z / (e - 1 - z),
                "bh2": 0.5 * z * (e - 1) / (e - 1 - z), "exp+": 1 + 0.5 * (e - 1),
                "exp-": 1 - 0.5 * (e - 1),
            }  # fmt: skip
            for name, value in want.items():
                taylor = Taylor(2, relaxation=name, coefficient=-0.1)
                assert relaxation_factor(taylor, h, z) == pytest.approx(value, rel=1e-12)


# ------------------------------------------------------------------ how fast it converges


def slope(order: int, corrector: str, prediction: str) -> float:
    exact = DEISSolver(VP, 600, variant="rhork", tableau="4rk", grid="log").sample(DATA.eps, X_T)
    errors = []
    for N in (40, 80, 160):
        made = solver_preset(
            "dpm_solver", VP, N, order=order, corrector=corrector, prediction=prediction,
            lower_order_final=False,
        )  # fmt: skip
        errors.append(np.sqrt(np.mean((solve(made) - exact) ** 2)))
    return float(-np.polyfit(np.log([40, 80, 160]), np.log(errors), 1)[0])


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_orders_of_convergence(prediction) -> None:
    assert slope(1, "none", prediction) == pytest.approx(1, abs=0.25)
    assert slope(2, "none", prediction) == pytest.approx(2, abs=0.4)
    assert slope(1, "pseudo", prediction) == pytest.approx(2, abs=0.4)
    assert slope(2, "pseudo", prediction) > 2.6
    assert slope(3, "none", prediction) > 2.6


# ------------------------------------------------------------------ calls, first steps, states


def test_calls_are_counted_and_implicit_correctors_call_again() -> None:
    times: list[float] = []

    def eps(x: Any, t: float) -> Any:
        times.append(t)
        return DATA.eps(x, t)

    pseudo = solver_preset("unipc", VP, 6, order=2)
    solve(pseudo, eps)
    assert len(times) == len(set(times)) == pseudo.nfe == 6
    times.clear()
    for nfe in (1, 2, 7, 8):
        implicit = solver_preset("unipc", VP, nfe, order=2, corrector="implicit")
        solve(implicit, eps)
        assert len(times) == implicit.nfe == nfe
        times.clear()
    once = SolverSchedule(
        1.0, (StepDecision(0.4, "noise", Taylor(), Taylor(2, start=-2), True),
              StepDecision(0.1, "noise", Taylor(2))),
    )  # fmt: skip
    y = solve(once, eps)
    assert times == [1.0, 0.4, 0.4]
    a, s = VP.alpha(once.times), VP.sigma(once.times)
    weights = step_weights(once, a, s)
    e0 = DATA.eps(X_T, 1.0)
    x1 = weights[0].predictor.scale * X_T + weights[0].predictor.weights[0] * e0
    made = weights[0].corrector
    assert made is not None
    by_call = dict(zip(made.calls, made.weights, strict=True))
    x1 = made.scale * X_T + by_call[0] * e0 + by_call[1] * DATA.eps(x1, 0.4)
    e1 = DATA.eps(x1, 0.4)  # at the corrected state
    last = weights[1].predictor
    by_call = dict(zip(last.calls, last.weights, strict=True))
    np.testing.assert_allclose(y, last.scale * x1 + by_call[0] * e0 + by_call[1] * e1)


def test_analytical_first_steps() -> None:
    """One call less; exact for data N(0, I) with eps = x_T, and for the mean of narrow data."""
    unit = GaussianMixtureScore([1.0], [[0.0, 0.0]], [np.eye(2)])
    for afs, mean in (("zero_x0", None), ("average_x0", [0.0, 0.0])):
        made = solver_preset("dpm_solver", VP, 6, order=2, afs=afs, relaxation="bh2")
        assert (len(made.steps), made.nfe) == (7, 6)
        plain = SolverSchedule(made.t_start, made.steps)
        got = UnifiedSolver(made, VP, mean_x0=mean).sample(unit.eps, X_T)
        np.testing.assert_allclose(got, solve(plain, unit.eps), atol=2e-3)
    point = np.array([0.7, -2.0])
    narrow = GaussianMixtureScore([1.0], [point], [1e-12 * np.eye(2)])
    made = solver_preset("dpm_solver++", VP, 3, order=2, afs="average_x0")
    got = UnifiedSolver(made, VP, mean_x0=point).sample(narrow.eps, X_T)
    np.testing.assert_allclose(got, solve(SolverSchedule(1.0, made.steps), narrow.eps), atol=1e-8)
    edm = VarianceExploding()  # per unit of the prior's spread, so that x_0 is 0
    x = 80 * X_T
    made = SolverSchedule(80.0, (StepDecision(1.0, "data"),), "zero_x0")
    np.testing.assert_allclose(UnifiedSolver(made, edm).sample(unit.eps, x), X_T)
    with pytest.raises(InputError, match="mean_x0: got NoneType"):
        UnifiedSolver(solver_preset("ddim", VP, 3, afs="average_x0"), VP)
    with pytest.raises(InputError, match="mean_x0"):
        UnifiedSolver(solver_preset("ddim", VP, 3), VP, mean_x0=point)
    wide = UnifiedSolver(solver_preset("ddim", VP, 3, afs="average_x0"), VP, mean_x0=np.zeros(3))
    with pytest.raises(InputError, match=r"mean_x0: got \(3,\)"):
        wide.sample(unit.eps, X_T)


def test_tensors_arrays_and_half_precision_agree() -> None:
    torch = pytest.importorskip("torch")
    made = solver_preset("unipc", VP, 8, order=3)
    solver = UnifiedSolver(made, VP)
    x = np.random.default_rng(1).standard_normal((4, 1, 2))
    want = solver.sample(DATA.eps, x)
    for dtype, tolerance in (
        (torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02),
    ):  # fmt: skip
        got = solver.sample(DATA.eps, torch.from_numpy(x).to(dtype))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.double().numpy(), want, atol=tolerance)
    half = solver.sample(DATA.eps, x.astype(np.float16))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, want, atol=0.02)
    grad = torch.from_numpy(x).requires_grad_()
    solver.sample(DATA.eps, grad).sum().backward()
    assert grad.grad is not None
    assert bool(grad.grad.isfinite().all())


def test_steps_one_by_one_are_the_sample_and_keep_little() -> None:
    solver = UnifiedSolver(solver_preset("unipc", VP, 12, order=3), VP)
    state = solver.init(X_T)
    for _ in range(solver.num_steps):
        state = solver.step(state, DATA.eps)
        assert len(state.calls) <= 3
        assert all(call.eps is None for call in state.calls.values())  # data alone is used
    np.testing.assert_array_equal(state.sample, solver.sample(DATA.eps, X_T))
    with pytest.raises(InputError, match="state"):
        solver.step(state, DATA.eps)


# ------------------------------------------------------------------ bad input


def test_a_thousand_steps_of_a_discrete_model_and_one_step() -> None:
    trained = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    score = GaussianMixtureScore(DATA.weights, DATA.means, [0.3 * np.eye(2)] * 2, trained)
    for grid in ("uniform", "log_snr"):
        made = solver_preset("unipc", trained, 1000, order=3, grid=grid)
        many = solve(made, score.eps, X_T, trained)
        assert np.isfinite(many).all()
    exact = DEISSolver(trained, 200, variant="rhork", tableau="4rk").sample(score.eps, X_T)
    np.testing.assert_allclose(many, exact, atol=1e-3)
    one = solve(solver_preset("unipc", VP, 1, order=3))
    np.testing.assert_allclose(one, solve(solver_preset("ddim", VP, 1)))


def test_a_cosine_schedule_with_karras_levels() -> None:
    cosine = Cosine()
    score = GaussianMixtureScore(DATA.weights, DATA.means, [0.3 * np.eye(2)] * 2, cosine)
    made = solver_preset("unipc", cosine, 20, order=3, grid="karras")
    exact = DEISSolver(cosine, 300, variant="rhork", tableau="4rk").sample(score.eps, X_T)
    np.testing.assert_allclose(solve(made, score.eps, X_T, cosine), exact, atol=0.02)


def test_a_last_step_may_end_without_noise_at_order_one_only() -> None:
    for prediction in ("noise", "data"):
        clean = SolverSchedule(1.0, (StepDecision(0.3), StepDecision(0.0, prediction)))
        before = solve(SolverSchedule(1.0, (StepDecision(0.3),)))
        np.testing.assert_allclose(
            solve(clean), (before - VP.sigma(0.3) * DATA.eps(before, 0.3)) / VP.alpha(0.3)
        )
    wrong = SolverSchedule(1.0, (StepDecision(0.3), StepDecision(0.0, predictor=Taylor(2))))
    with pytest.raises(InputError, match="t_end: got 0, where no noise is left"):
        solve(wrong)


def test_bad_answers_and_states_name_the_step() -> None:
    solver = UnifiedSolver(solver_preset("unipc", VP, 4), VP)
    calls: list[float] = []

    def at_step_two(answer: Any) -> Any:
        calls.clear()
        return lambda x, t: calls.append(t) or (answer(x) if len(calls) == 3 else 0 * x)

    for answer, message in (
        (lambda x: x[:, :1], r"eps_fn: got shape \(16, 1\) at step 2 .*, want the shape of x"),
        (lambda x: x * np.nan, r"eps_fn: got NaN or infinity at step 2 \(t = 0"),
        (lambda x: "eps", r"eps_fn: got shape \(\) at step 2"),
    ):
        with pytest.raises(InputError, match=message):
            solver.sample(at_step_two(answer), X_T)
    with pytest.raises(InputError, match="x_T: got NaN or infinity"):
        solver.sample(DATA.eps, X_T * np.inf)
    with pytest.raises(InputError, match="x_T: got int64"):
        solver.sample(DATA.eps, np.zeros((2, 2), np.int64))
    empty = solver.sample(at_step_two(lambda x: x), X_T[:0], return_trajectory=True)
    assert (empty.shape, calls) == ((5, 0, 2), [])


def test_times_outside_the_noise_schedule_are_refused() -> None:
    with pytest.raises(InputError, match=r"t_start: got 1\.2"):
        solve(SolverSchedule(1.2, (StepDecision(0.1),)), noise=Cosine())
    with pytest.raises(InputError, match="t_end: got -1"):
        solve(SolverSchedule(0.5, (StepDecision(-1.0),)))
    with pytest.raises(InputError, match="step 0: prediction: got 'v3'"):
        solve(SolverSchedule(0.5, (StepDecision(0.1, "v3"),)))
