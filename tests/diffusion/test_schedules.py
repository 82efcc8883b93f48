"""Schedules against their definitions, time grids, parameterisations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.diffusion.parameterisations import PREDICTIONS, to_eps, to_x0
from scoredraw.diffusion.schedules import (
    Cosine,
    DiscreteAlphas,
    EndPoints,
    LinearBeta,
    LinearFlow,
    NoiseSchedule,
    OrnsteinUhlenbeck,
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.diffusion.time_grids import GRIDS, checked_times, time_grid
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

DDPM = np.linspace(1e-4, 0.02, 1000)
SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": LinearBeta(),
    "constant": LinearBeta(2.0, 2.0),
    "falling": LinearBeta(3.0, 0.5),
    "sub-VP": SubVariancePreserving(),
    "cosine": Cosine(),
    "OU": OrnsteinUhlenbeck(),
    "discrete": DiscreteAlphas.from_betas(DDPM),
    "sigma": VarianceExploding(),
    "geometric": VarianceExploding(0.2, 1.0, time="geometric"),
    "flow": LinearFlow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def interior(schedule: NoiseSchedule, n: int = 40) -> np.ndarray:
    """Times between the end points, away from the kinks of a discrete schedule."""
    start, end = schedule.ends.t_start, schedule.ends.t_end
    times = np.linspace(start, end, n + 2)[1:-1]
    return np.floor(times) + 0.37 if schedule.knots.size else times


@every_schedule
def test_rho_is_noise_per_signal(schedule: NoiseSchedule) -> None:
    t = interior(schedule)
    np.testing.assert_allclose(schedule.rho(t), schedule.sigma(t) / schedule.alpha(t), rtol=1e-11)
    np.testing.assert_allclose(schedule.abar(t), schedule.alpha(t) ** 2, rtol=1e-12)
    np.testing.assert_allclose(schedule.log_snr(t), -2 * np.log(schedule.rho(t)), rtol=1e-12)
    assert bool((np.diff(schedule.rho(np.sort(t))) > 0).all())


@every_schedule
def test_time_of_rho_is_the_inverse(schedule: NoiseSchedule) -> None:
    t = interior(schedule)
    np.testing.assert_allclose(schedule.time_of_rho(schedule.rho(t)), t, rtol=1e-9, atol=1e-12)


@every_schedule
def test_drift_and_diffusion_are_derivatives(schedule: NoiseSchedule) -> None:
    t = interior(schedule)
    h = 1e-5 * (schedule.ends.t_start - schedule.ends.t_end)
    if schedule.knots.size:
        h = 0.1
    slope = (schedule.log_alpha(t + h) - schedule.log_alpha(t - h)) / (2 * h)
    close: Any = {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(schedule.drift(t), slope, **close)
    variance = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    want = variance - 2 * schedule.drift(t) * schedule.sigma(t) ** 2
    np.testing.assert_allclose(schedule.diffusion(t), want, **close)


def test_variance_preserving_identity() -> None:
    for name in ("linear", "constant", "cosine", "OU", "discrete"):
        t = interior(SCHEDULES[name])
        total = SCHEDULES[name].abar(t) + SCHEDULES[name].sigma(t) ** 2
        np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_definitions() -> None:
    t = np.array([0.0, 0.2, 1.0])
    linear = np.exp(-0.5 * t**2 * (20.0 - 0.1) - t * 0.1)
    np.testing.assert_allclose(LinearBeta().abar(t), linear, rtol=1e-13)
    np.testing.assert_allclose(SubVariancePreserving().sigma(t), 1 - linear, rtol=1e-12, atol=1e-15)
    cosine = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(Cosine().abar(t), cosine, rtol=1e-12, atol=1e-30)
    np.testing.assert_allclose(OrnsteinUhlenbeck().alpha(t), np.exp(-t), rtol=1e-14)
    geometric = VarianceExploding(0.2, 1.0, time="geometric")
    np.testing.assert_allclose(geometric.sigma(t), 0.2 * 5.0**t, rtol=1e-13)
    np.testing.assert_allclose(
        geometric.diffusion(t), (geometric.sigma(t) * np.sqrt(2 * np.log(5.0))) ** 2, rtol=1e-12
    )


def test_the_linear_inverse_survives_equal_betas() -> None:
    """The other form of the root, (sqrt(b0² + 2(b1-b0)L) - b0)/(b1-b0), loses all digits here."""
    t = np.array([1e-6, 0.01, 0.5, 1.0])
    for gap in (0.0, 1e-15, 1e-12, 1e-9):
        schedule = LinearBeta(0.1, 0.1 + gap)
        np.testing.assert_allclose(schedule.time_of_rho(schedule.rho(t)), t, rtol=1e-9)


def test_discrete_alphas_are_met_at_integers_and_linear_between() -> None:
    alphas = np.cumprod(1 - DDPM)
    schedule = DiscreteAlphas(torch.as_tensor(alphas))
    index = np.arange(1000)
    np.testing.assert_array_equal(schedule.abar(index), alphas)
    half = (alphas[10] + alphas[11]) / 2
    np.testing.assert_allclose(schedule.abar(10.5), half, rtol=1e-14)
    clipped = DiscreteAlphas([1.0, 0.5, 1e-9])
    np.testing.assert_array_equal(clipped.abar([0, 2]), [1 - 1e-7, 1e-7])


def test_ends_are_part_of_the_schedule() -> None:
    schedule = OrnsteinUhlenbeck(ends=EndPoints(2.0, 0.05, prior="marginal", last="denoise"))
    assert (schedule.ends.t_start, schedule.ends.last) == (2.0, "denoise")
    other = schedule.with_ends(last="stop")
    assert other.ends.prior == "marginal"
    assert schedule.ends.last == "denoise"
    assert "OrnsteinUhlenbeck" in repr(other)


def test_prior() -> None:
    assert LinearBeta().prior_std == SubVariancePreserving().sigma(np.inf) == 1.0
    assert LinearFlow().prior_std == 1.0
    assert VarianceExploding(0.2, 7.0, time="geometric").prior_std == pytest.approx(7.0)
    data = np.random.default_rng(0).normal(4.0, 0.1, size=(500, 2))
    weak = LinearBeta(0.1, 1.0, ends=EndPoints(1.0, 1e-3, prior="marginal"))
    x = weak.draw_prior((20000, 2), rng=1, data=data)
    # 5 standard errors of a mean of 20,000: a false alarm in 10⁶ for each of two coordinates
    assert np.abs(x.mean(0) - weak.alpha(1.0) * data.mean(0)).max() < 5 * x.std() / 20000**0.5
    spread = np.sqrt(weak.abar(1.0) * data.var(0) + weak.sigma(1.0) ** 2)
    np.testing.assert_allclose(x.std(0), spread, rtol=0.03)
    with pytest.raises(InputError, match="data: got None"):
        weak.draw_prior((3, 2))
    with pytest.raises(InputError, match="data"):
        weak.draw_prior((3, 5), data=data)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_perturb_takes_one_time_or_one_a_sample(kind: str) -> None:
    schedule = LinearBeta()
    x0: Any = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    noise: Any = np.ones_like(x0)
    t: Any = np.array([0.1, 0.5, 1.0])
    want = np.stack([schedule.alpha(s) * x + schedule.sigma(s) for s, x in zip(t, x0, strict=True)])
    if kind == "tensor":
        x0, noise, t = torch.as_tensor(x0), torch.as_tensor(noise), torch.as_tensor(t)
    got = schedule.perturb(x0, t, noise)
    assert got.dtype == x0.dtype
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)
    one = np.asarray(schedule.perturb(x0, 0.5, noise))[1]
    np.testing.assert_allclose(one, want[1], rtol=1e-6)
    with pytest.raises(InputError, match="one time or"):
        schedule.perturb(x0, [0.1, 0.2], noise)


# ------------------------------------------------------------------ grids


@every_schedule
@pytest.mark.parametrize("kind", GRIDS)
def test_grids_run_from_start_to_end(schedule: NoiseSchedule, kind: str) -> None:
    end = schedule.ends.t_end
    times = time_grid(schedule, 7, kind)
    assert times.shape == (8,)
    assert (times[0], times[-1]) == (schedule.ends.t_start, end)
    assert bool((np.diff(times) < 0).all())


def test_grids_are_uniform_in_their_variable() -> None:
    schedule = Cosine()
    log = np.log(schedule.rho(time_grid(schedule, 9, "log")))
    np.testing.assert_allclose(np.diff(log), np.diff(log)[0], rtol=1e-9)
    rho = schedule.rho(time_grid(schedule, 9, "rho", 3.0)) ** (1 / 3)
    np.testing.assert_allclose(np.diff(rho), np.diff(rho)[0], rtol=1e-9)
    t = time_grid(schedule, 9, "t", 4.0) ** (1 / 4)
    np.testing.assert_allclose(np.diff(t), np.diff(t)[0], rtol=1e-9)
    np.testing.assert_array_equal(time_grid(schedule, 9), time_grid(schedule, 9, "t", 2.0))
    np.testing.assert_array_equal(time_grid(schedule, 9, "rho"), time_grid(schedule, 9, "rho", 7))


def test_the_karras_grid() -> None:
    """Sigmas of Karras et al. 2022, eq. 5, with rho = 7."""
    schedule = VarianceExploding(0.002, 80.0)
    i = np.arange(18)
    root = 80.0 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))
    np.testing.assert_allclose(time_grid(schedule, 17, "rho"), root**7, rtol=1e-12)


@pytest.mark.parametrize("kind", GRIDS)
def test_whole_times_are_distinct_also_with_more_steps_than_times(kind: str) -> None:
    schedule = SCHEDULES["discrete"]
    times = time_grid(schedule, 1500, kind, integer=True)
    assert bool((times == np.rint(times)).all() and (np.diff(times) < 0).all())
    assert times.size <= 1000
    assert (times[0], times[-1]) == (999, 0)
    few = time_grid(schedule, 5, "t", 1.0, integer=True)
    np.testing.assert_array_equal(few, np.rint(time_grid(schedule, 5, "t", 1.0)))
    with pytest.raises(InputError, match="two distinct whole times"):
        time_grid(LinearBeta(), 3, t_start=0.4, integer=True)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "ten"])
def test_num_steps(steps: Any) -> None:
    with pytest.raises(InputError, match="num_steps"):
        time_grid(LinearBeta(), steps)


def test_bad_grids() -> None:
    schedule = LinearBeta()
    with pytest.raises(InputError, match="kind: got 'cosine', want one of t, log, rho"):
        time_grid(schedule, 5, "cosine")
    for kind in ("t", "rho"):
        with pytest.raises(InputError, match=r"power: got 0\.5, want a power >= 1"):
            time_grid(schedule, 5, kind, 0.5)
    with pytest.raises(InputError, match=r"t_start: got 0\.001, want a time above"):
        time_grid(schedule, 5, t_start=1e-3)
    with pytest.raises(InputError, match=r"t_end: got -0\.1"):
        time_grid(schedule, 5, t_end=-0.1)
    with pytest.raises(InputError, match="t_end: got 0, where no noise is left"):
        time_grid(schedule, 5, "log", t_end=0.0)
    assert time_grid(schedule, 5, t_end=0.0)[-1] == 0.0
    with pytest.raises(InputError, match=r"t_start: got 1\.5, want a time <= 1"):
        time_grid(Cosine(), 5, t_start=1.5)


@pytest.mark.parametrize("schedule", [Cosine(), LinearFlow()])
def test_no_signal_at_the_start(schedule: NoiseSchedule) -> None:
    with pytest.raises(InputError, match="t_start: got 1, where abar = 0"):
        time_grid(schedule, 5, t_start=1.0)


def test_zero_terminal_snr() -> None:
    with pytest.raises(InputError, match="zero terminal SNR"):
        DiscreteAlphas([0.9, 0.5, 0.0])
    huge = LinearBeta(0.1, 1e5)
    with pytest.raises(InputError, match="abar = 0"):
        time_grid(huge, 5)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([0.9, 0.9, 0.5], "no decrease at 1, want abar decreasing"),
        ([0.9, 0.5, 0.6], "no decrease at 2"),
        ([1.1, 0.5], "abar in"),
        ([0.9, -0.5], "abar in"),
        ([0.9, np.nan], "abar in"),
        ([0.9], r"\(T,\)"),
    ],
)
def test_bad_alphas(alphas: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiscreteAlphas(alphas)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.5, 0.5, 0.1], "times: got 0.5 twice, want distinct times"),
        ([1.0, 0.2, 0.5], "times: got 0.2 before 0.5, want decreasing"),
        ([1.0, np.nan, 0.5], "NaN"),
        ([1.0], "times"),
        ([[1.0, 0.5]], "times"),
        ([1.0, -0.5], "t_end"),
        ([1.0, 0.0], "t_end: got 0, where no noise is left"),
    ],
)
def test_times_that_no_solver_can_take(times: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_times(LinearBeta(), times)


def test_a_users_schedule_that_rises() -> None:
    class Rising(LinearBeta):
        def rho(self, t: Any) -> Any:
            return 2 - super().rho(t)

    with pytest.raises(InputError, match=r"schedule: got abar .* not decreasing"):
        checked_times(Rising(), [0.2, 0.1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EndPoints(0.1, 0.1), "t_start"),
        (lambda: EndPoints(np.inf, 0.1), "t_start"),
        (lambda: EndPoints(1, 0, prior="unit"), "prior: got 'unit', want one of noise, marginal"),
        (lambda: EndPoints(1, 0, last="end"), "last: got 'end', want one of stop, denoise, clean"),
        (lambda: LinearBeta(0.0), "beta_0"),
        (lambda: LinearBeta(1.0, -1.0), "beta_1"),
        (lambda: Cosine(-1.0), "offset"),
        (lambda: VarianceExploding(0.0), "sigma_min"),
        (lambda: VarianceExploding(2.0, 1.0), "sigma_max"),
        (lambda: VarianceExploding(time="log"), "time"),
        (lambda: DiscreteAlphas([0.9, 0.1], clip=0.5), "clip"),
    ],
)
def test_bad_schedules(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


# ------------------------------------------------------------------ parameterisations


def predictions(x0: Any, eps: Any, alpha: float, sigma: float) -> dict[str, Any]:
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow_prediction": eps - x0,
    }


@pytest.mark.property
@settings(max_examples=50)
@given(
    x0=st.floats(-10, 10), eps=st.floats(-5, 5), alpha=st.floats(0.1, 1), sigma=st.floats(0.1, 90)
)
def test_every_prediction_gives_eps_and_x0(
    x0: float, eps: float, alpha: float, sigma: float
) -> None:
    x = np.array(alpha * x0 + sigma * eps)
    for kind, prediction in predictions(x0, eps, alpha, sigma).items():
        got = to_eps(prediction, x, alpha, sigma, kind), to_x0(prediction, x, alpha, sigma, kind)
        np.testing.assert_allclose(got, (eps, x0), rtol=1e-9, atol=1e-9, err_msg=kind)


def test_predictions_of_tensors() -> None:
    x0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    parts = predictions(x0, eps, 0.6, 0.8)
    assert set(parts) == set(PREDICTIONS)
    for kind, prediction in parts.items():
        x = 0.6 * x0 + 0.8 * eps
        torch.testing.assert_close(to_x0(prediction, x, 0.6, 0.8, kind), x0)
    with pytest.raises(InputError, match="kind: got 'noise', want one of epsilon"):
        to_x0(x0, x0, 0.6, 0.8, "noise")


@pytest.mark.contract
def test_the_package_offers_functions_where_a_module_could_hide_them() -> None:
    import scoredraw.diffusion as diffusion
    from scoredraw.diffusion import deis  # noqa: F401

    for name in ("deis_coefficients", "time_grid", "DEISSolver", "GaussianMixtureScore"):
        assert callable(getattr(diffusion, name)), name
