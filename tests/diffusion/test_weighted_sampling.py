"""Weighted particles against Gaussians and mixtures whose target is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.feynman_kac import Target, ramp
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.guidance_bias import gaussian_target
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule, VarianceExploding
from scoredraw.diffusion.weighted_sampling import (
    RESAMPLERS,
    WeightedSample,
    WeightedSampler,
    descend,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

VE = VarianceExploding(0.01, 10.0, time="geometric")
VP = LinearBeta()
BOTH = pytest.mark.parametrize("schedule", [VP, VE], ids=["VP", "VE"])


def gaussian(schedule: NoiseSchedule, mean: float = 0.0, variance: float = 1.0) -> Any:
    return GaussianMixtureScore([1.0], [[mean]], [[[variance]]], schedule)


def run(
    schedule: NoiseSchedule, target: Target, models: Any, n: int = 4000, seed: int = 0, **how: Any
) -> WeightedSample:
    sampler = WeightedSampler(schedule, target, **{"num_steps": 400, **how})
    return sampler.sample(models, sampler.draw_prior((n, 1), rng=seed), rng=seed + 1)


def moments(found: WeightedSample) -> tuple[float, float]:
    mean = float(found.estimate(found.x)[0])
    return mean, float(found.estimate((found.x - mean) ** 2)[0])


# ── laws that are known ─────────────────────────────────────────────────────────────────────────


def test_guidance_between_equal_gaussians_has_equal_weights_and_a_known_normaliser() -> None:
    """No chance in it: ∫ g dτ = β (β-1)/2 (m1 - m2)² (1/v_0 - 1/v_1), by 600 steps to 3 %."""
    models = [gaussian(VE, 0.5).eps, gaussian(VE, -0.4).eps]
    for beta in (2.0, 0.5):
        found = run(VE, Target.guidance(beta), models, n=4, num_steps=600)
        v = 1 + np.square(VE.sigma([0.0, 1.0]))
        want = 0.5 * beta * (beta - 1) * 0.9**2 * (1 / v[0] - 1 / v[1])
        assert found.log_z == pytest.approx(want, rel=0.04)
        np.testing.assert_allclose(found.ess, 4.0)


@BOTH
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_every_resampler_anneals_a_gaussian(resampler: str, schedule: NoiseSchedule) -> None:
    """β = 3, ζ² = 4: .333, uncorrected .286; 6 seeded runs have a spread of .008, judged at .03."""
    target = Target.anneal(3.0).with_noise(2.0)
    how: dict[str, Any] = {"resampler": resampler, "num_steps": 600}
    if resampler != "birth_death":
        how["ess_threshold"] = 0.5
    found = run(schedule, target, gaussian(schedule).eps, seed=11, **how)
    assert moments(found)[1] == pytest.approx(1 / 3, abs=0.03)
    if resampler == "birth_death":
        assert not found.log_weights.any()


@BOTH
def test_log_z_of_a_product(schedule: NoiseSchedule) -> None:
    """Of two Gaussians, both ends in closed form; 6 runs have a spread of .02, judged at .1."""
    means, variances = [0.3, -0.6], [1.0, 0.5]
    models = [gaussian(schedule, *one).eps for one in zip(means, variances, strict=True)]
    found = run(schedule, Target.product(1, 1), models, ess_threshold=0.5, num_steps=800)
    ends = []
    for t in (schedule.ends.t_end, schedule.ends.t_start):
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        diffused = [a**2 * v + s**2 for v in variances]
        ends.append(gaussian_target([1, 1], a * np.array(means)[:, None], diffused))
    assert found.log_z == pytest.approx(ends[0].log_z - ends[1].log_z, abs=0.1)
    mean, variance = moments(found)
    assert mean == pytest.approx(float(ends[0].mean[0]), abs=0.05)
    assert variance == pytest.approx(float(ends[0].covariance[0, 0]), abs=0.04)


def reward(x: Any, t: float) -> Any:
    return -0.5 * ((x[:, 0] - 1.5) ** 2)


def pull(x: Any, t: float) -> Any:
    return 1.5 - x


@pytest.mark.parametrize("gradient", [pull, None], ids=["gradient", "none"])
@pytest.mark.parametrize(
    ("schedule", "constant"), [(VP, True), (VP, False), (VE, False)], ids=["VP, b = 1", "VP", "VE"]
)
def test_tilting_a_gaussian(schedule: NoiseSchedule, constant: bool, gradient: Any) -> None:
    """N(0, 1) exp(-(x - 3/2)²/2) ∝ N(3/4, 1/2), log Z -9/16 - log(2)/2.

    With b = 1 at the noise end the first weights hold exp r. Spread of 6 runs .02; judged at .1.
    """
    b: Any = 1.0 if constant else ramp(schedule, power=2.0)
    target = Target.anneal(1.0).tilted(reward, gradient, b)
    found = run(schedule, target, gaussian(schedule).eps, ess_threshold=0.5)
    mean, variance = moments(found)
    assert mean == pytest.approx(0.75, abs=0.08)
    assert variance == pytest.approx(0.5, abs=0.06)
    assert found.log_z == pytest.approx(-9 / 16 - 0.5 * np.log(2), abs=0.1)


@BOTH
@pytest.mark.parametrize("exact", [True, False], ids=["log-densities", "Itô"])
def test_powers_that_move(schedule: NoiseSchedule, exact: bool) -> None:
    """q^β with β from 1 at the noise to 2 at the data: variance 1/2; without weights .40 or .56."""
    start = schedule.ends.t_start
    target = Target.anneal(lambda t: 2 - t / start)
    data = gaussian(schedule)
    how: dict[str, Any] = {"log_densities": [data.log_density]} if exact else {}
    found = run(schedule, target, data.eps, ess_threshold=0.5, num_steps=800, **how)
    assert moments(found)[1] == pytest.approx(0.5, abs=0.04)
    plain = run(schedule, target, data.eps, resampler=None, num_steps=800, **how)
    assert abs(float(plain.x.var()) - 0.5) > 0.05


def test_a_mixture_gets_its_masses_right() -> None:
    """q = .6 N(-3, 1) + .4 N(2, .16), β = 3: exact mean .247, mass left .351, uncorrected .698.

    Single runs of ζ² = 4 have a spread of .09 and .02; the mean of 4 is judged at 3 of its own.
    """
    data = GaussianMixtureScore([0.6, 0.4], [[-3.0], [2.0]], [[[1.0]], [[0.16]]], VE)
    loud = Target.anneal(3.0).with_noise(2.0)
    found = [
        run(VE, loud, data.eps, 2000, seed, num_steps=1000, ess_threshold=0.5) for seed in range(4)
    ]
    left = np.mean([float(one.estimate((one.x[:, 0] < 0) * 1.0)) for one in found])
    assert left == pytest.approx(0.35064, abs=0.05)
    assert np.mean([moments(one)[0] for one in found]) == pytest.approx(0.2468, abs=0.22)
    plain = run(VE, Target.anneal(3.0), data.eps, 2000, resampler=None)
    assert (plain.x < 0).mean() == pytest.approx(0.698, abs=0.04)


def test_importance_sampling_at_the_end_is_right_too() -> None:
    models = [gaussian(VP, 0.5).eps, gaussian(VP, -0.5, 0.6).eps]
    found = run(VP, Target.guidance(1.5), models, resampler=None)
    want = gaussian_target([-0.5, 1.5], [[0.5], [-0.5]], [1.0, 0.6])
    mean, variance = moments(found)
    assert mean == pytest.approx(float(want.mean[0]), abs=0.06)
    assert variance == pytest.approx(float(want.covariance[0, 0]), abs=0.06)
    drawn = found.equally_weighted(rng=0)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.01)
    assert float(drawn.var()) == pytest.approx(variance, abs=0.01)


# ── integrators and options ─────────────────────────────────────────────────────────────────────


@BOTH
def test_without_noise_it_solves_the_probability_flow_ode(schedule: NoiseSchedule) -> None:
    """Euler's error halves with the step, Heun's is quartered; both end at the exact solution."""
    data = GaussianMixtureScore([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]], schedule)
    x = float(schedule.prior_std) * np.linspace(-1.5, 1.5, 7)[:, None]
    exact = DEISSolver(schedule, 400, variant="rhork").sample(data.eps, x)
    for integrator, factor in (("euler", 2.0), ("heun", 4.0)):
        errors = []
        for steps in (200, 400):
            sampler = WeightedSampler(
                schedule, Target.anneal(1.0), steps, noise_scale=0.0, integrator=integrator,
                resampler=None,
            )  # fmt: skip
            found = sampler.sample(data.eps, x)
            assert found.log_z == 0.0
            errors.append(np.abs(found.x - exact).mean())
        assert errors[0] / errors[1] == pytest.approx(factor, rel=0.3)


def test_heun_of_edm_on_its_grid() -> None:
    """The same as Heun's method of the exponential integrator, where sigma is the time."""
    schedule = VarianceExploding()
    data = GaussianMixtureScore([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]], schedule)
    x = 80.0 * np.linspace(-1.5, 1.5, 7)[:, None]
    same = DEISSolver(schedule, 18, variant="rhork", tableau="2heun", grid="rho")
    sampler = WeightedSampler(
        schedule, Target.anneal(1.0), 18, noise_scale=0.0, integrator="heun", resampler=None,
        grid="rho",
    )  # fmt: skip
    assert sampler.nfe == 36
    np.testing.assert_allclose(sampler.sample(data.eps, x).x, same.sample(data.eps, x), rtol=1e-9)


@BOTH
def test_weights_and_volumes_give_the_density(schedule: NoiseSchedule) -> None:
    """Without noise log p(x_0) - log p(x_1) = w - log dx_0/dx_1, p = Π q^β, for every particle.

    Volumes by neighbours 2e-4 apart, Heun with 400 steps.
    """
    experts = [
        GaussianMixtureScore([0.3, 0.7], [[-1.0], [1.0]], [[[0.4]], [[0.5]]], schedule),
        gaussian(schedule, 0.5, 0.8),
    ]
    target = Target.product(0.7, 0.6).with_noise(0.0)
    sampler = WeightedSampler(schedule, target, 400, integrator="heun", resampler=None)
    centre = float(schedule.prior_std) * np.linspace(-1.0, 1.0, 9)
    x = (centre[:, None] + [-1e-4, 0.0, 1e-4]).reshape(-1, 1)
    found = sampler.sample([q.eps for q in experts], x)
    volume = np.log((found.x[2::3, 0] - found.x[::3, 0]) / 2e-4)
    ends = [
        sum(b * q.log_density(at[1::3], t) for b, q in zip((0.7, 0.6), experts, strict=True))
        for at, t in ((x, schedule.ends.t_start), (found.x, schedule.ends.t_end))
    ]
    np.testing.assert_allclose(ends[1] - ends[0], found.log_weights[1::3] - volume, atol=0.01)


def counting(model: Callable[[Any, float], Any]) -> tuple[Any, list[float]]:
    times: list[float] = []

    def call(x: Any, t: float) -> Any:
        times.append(t)
        return model(x, t)

    return call, times


def test_the_first_steps_can_be_skipped() -> None:
    model, times = counting(gaussian(VP).eps)
    sampler = WeightedSampler(VP, Target.anneal(2.0), 10, start_resampling_step=4)
    x = sampler.draw_prior((5, 1), rng=0)
    state = sampler.init(x, 0)
    for _ in range(4):
        state = sampler.step(state, model, 0)
    assert state.sample is x
    assert not state.log_weights.any()
    sampler.sample(model, x, 0)
    assert len(times) == sampler.nfe == 6
    assert times[0] == sampler.times[4]


def test_when_it_resamples() -> None:
    model = gaussian(VP).eps
    often = {"resampler": "multinomial"}
    kept = {
        name: run(VP, Target.anneal(1.2), model, 50, num_steps=12, **how).n_unique < 50
        for name, how in {
            "always": often, "third": often | {"interval": 3},
            "last": often | {"interval": 3, "resample_last": True},
            "never": {"resampler": None}, "seldom": {"ess_threshold": 1e-6},
        }.items()
    }  # fmt: skip
    assert kept["always"][:11].all()
    assert not kept["always"][11]
    assert np.flatnonzero(kept["third"]).tolist() == [2, 5, 8]
    assert np.flatnonzero(kept["last"]).tolist() == [2, 5, 8, 11]
    assert not kept["never"].any()
    assert not kept["seldom"].any()


def test_resampling_leaves_the_normaliser() -> None:
    """log Z adds up over resamplings: with or without them it estimates one number."""
    models = [gaussian(VP, 0.5).eps, gaussian(VP, -0.5, 0.6).eps]
    target = Target.guidance(1.3)
    found = [
        run(VP, target, models, resampler=r).log_z for r in (None, "systematic", "birth_death")
    ]
    assert np.ptp(found) < 0.05


def test_clips_bound_what_they_say() -> None:
    target, model = Target.anneal(3.0), gaussian(VE).eps
    free = run(VE, target, model, 200, resampler=None, num_steps=60)
    tight = run(VE, target, model, 200, resampler=None, num_steps=60, clip_weights=1e-3)
    assert np.ptp(tight.log_weights) <= 60 * 2e-3 * (1 + 1e-9)
    assert np.ptp(free.log_weights) > 1.0
    assert tight.log_z == pytest.approx(float(free.log_weights.mean()), abs=0.05)
    loose = run(VE, target, model, 200, num_steps=60, clip_score_norm=1e9)
    np.testing.assert_array_equal(loose.x, run(VE, target, model, 200, num_steps=60).x)
    slow = run(VE, target, model, 200, resampler=None, num_steps=60, clip_score_norm=1e-3)
    assert slow.x.std() > 2 * free.x.std()


def test_ancestors_follow_the_particles() -> None:
    """Where nothing moves but the signal's scale, a particle is where its ancestor was."""
    sampler = WeightedSampler(VE, Target.anneal(1.0).tilted(reward, None, ramp(VE)), 4,
                              noise_scale=0.0, resample_last=True)  # fmt: skip
    x = sampler.draw_prior((30, 1), rng=0)
    found = sampler.sample(lambda x, t: np.zeros_like(x), x, 3)
    assert found.n_unique.min() < 30
    np.testing.assert_array_equal(found.x, x[found.ancestors])


def test_descent_goes_downhill() -> None:
    x = np.array([[2.0], [-1.0]])
    np.testing.assert_allclose(descend(x, lambda x: x, 100, 1e-2), x * 0.99**100)
    np.testing.assert_array_equal(descend(x, lambda x: x, steps=0), x)
    with pytest.raises(InputError, match="gradient: got NaN or infinity at step 0"):
        descend(x, lambda x: x * np.nan)


# ── tensors, kinds and seeds ────────────────────────────────────────────────────────────────────


def test_networks_of_torch() -> None:
    """A small network's eps; kind and dtype are kept, and a seed gives the same again."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))
    models = [lambda x, t: 0.1 * network(x), lambda x, t: x]
    target = Target.guidance(1.5).tilted(lambda x, t: -(x**2).sum(dim=1), "autograd", 0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sampler = WeightedSampler(VP, target, 200, ess_threshold=0.5)
        network.to(dtype)
        x = sampler.draw_prior((6, 3), torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            found = sampler.sample(models, x, torch.Generator().manual_seed(2))
            again = sampler.sample(models, x, torch.Generator().manual_seed(2))
        assert found.x.dtype == dtype
        assert found.log_weights.dtype == torch.float64
        assert torch.equal(found.x, again.x)
        assert torch.equal(found.log_weights, again.log_weights)
        assert found.equally_weighted(torch.Generator().manual_seed(0)).shape == (6, 3)


def test_predictions_of_any_kind_are_the_same_model() -> None:
    """Pictures (N, 2, 2) in float32, the score given as eps, score and x_0."""
    data = GaussianMixtureScore([0.5, 0.5], np.eye(2, 4), [0.5 * np.eye(4)] * 2, VP)
    models = {"epsilon": data.eps, "score": data.score, "sample": data.denoise}
    found = []
    for prediction, model in models.items():
        sampler = WeightedSampler(VP, Target.anneal(1.5), 20, prediction=prediction)
        x = sampler.draw_prior((8, 2, 2), rng=0).astype(np.float32)
        found.append(sampler.sample(model, x, 1))
        assert found[-1].x.dtype == np.float32
    for other in found[1:]:
        np.testing.assert_allclose(other.x, found[0].x, atol=1e-3)


def test_sampling_is_init_and_steps_and_leaves_its_input() -> None:
    data = gaussian(VP)
    sampler = WeightedSampler(VP, Target.anneal(1.1), 6)
    x = sampler.draw_prior((9, 1), rng=0)
    kept = x.copy()
    found = sampler.sample(data.eps, x, 5)
    source = np.random.Generator(np.random.Philox(5))
    state = sampler.init(x, source)
    for _ in range(6):
        state = sampler.step(state, data.eps, source)
    np.testing.assert_array_equal(state.x, found.x)
    np.testing.assert_array_equal(state.log_weights, found.log_weights)
    np.testing.assert_array_equal(x, kept)
    with pytest.raises(InputError, match="state: got one after the last of 6 steps"):
        sampler.step(state, data.eps, source)


# ── warnings and bad input ──────────────────────────────────────────────────────────────────────


def test_a_target_that_cannot_be_normalised_is_noticed() -> None:
    """q_1⁻⁷ q_2⁸ of variances .05 and 3 has precision -137 at the data."""
    models = [gaussian(VE, 0.0, 0.05).eps, gaussian(VE, 0.0, 3.0).eps]
    with pytest.warns(RuntimeWarning, match=r"step \d+: (one particle|states grow)"):
        run(VE, Target.guidance(8.0), models, 100)
    with pytest.warns(RuntimeWarning, match=r"step \d+: states grow without bound"):
        run(VP, Target.anneal(1.0), lambda x, t: -30 * x, 100, resampler=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(VE, Target.anneal(1.2), gaussian(VE).eps, 100)


def failing(at: int, answer: Callable[[Any], Any]) -> Callable[[Any, float], Any]:
    """0 x, and at call number `at` this."""
    calls = iter(range(10**6))
    return lambda x, t: answer(x) if next(calls) == at else 0 * x


def failing_reward(at: int, answer: Callable[[Any], Any]) -> Callable[[Any, float], Any]:
    calls = iter(range(10**6))
    return lambda x, t: answer(x) if next(calls) == at else 0 * x[:, 0]


def tilt(reward: Any, gradient: Any = None) -> Target:
    return Target.anneal(1.0).tilted(reward, gradient)


ONE = Target.anneal(1.0)
ON_THE_WAY: list[tuple[Target, Any, str]] = [
    (ONE, failing(2, lambda x: x * np.nan), "eps_fn: got NaN or infinity at step 2"),
    (ONE, failing(1, lambda x: x[:3]), r"eps_fn: got shape \(3, 1\) at step 1 .*, want shape"),
    (ONE, failing(0, lambda x: x.tolist()), r"eps_fn: got shape \(\) at step 0"),
    (Target.product(1, 1), [failing(9, np.sin), failing(3, lambda x: x + np.inf)],
     r"eps_fns\[1\]: got NaN or infinity at step 3"),
    (tilt(failing_reward(2, lambda x: x[:, 0] * np.nan)), failing(99, np.sin),
     "reward: got NaN or infinity at step 2"),
    (tilt(failing_reward(2, lambda x: x)), failing(99, np.sin),
     r"reward: got shape \(5, 1\) at step 2"),
    (tilt(failing_reward(0, lambda x: x[:, 0] / 0)), failing(99, np.sin),
     "reward: got NaN or infinity at step 0"),
    (tilt(failing_reward(99, np.sin), failing(1, lambda x: x * np.nan)), failing(99, np.sin),
     "gradient: got NaN or infinity at step 1"),
    (ONE, failing(3, lambda x: np.full_like(x, 1e308)), "x: got NaN or infinity at step 3"),
    (Target.product(1, 1), failing(99, np.sin), "eps_fns: got 1 models, want 2, one a power"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize(("target", "model", "message"), ON_THE_WAY, ids=range(len(ON_THE_WAY)))
def test_what_goes_wrong_on_the_way_names_its_step(
    target: Target, model: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        WeightedSampler(VP, target, 5).sample(model, np.ones((5, 1)), 0)


STATES: list[tuple[Any, str]] = [
    (np.zeros((0, 2)), "x_T: got 0 particles, want 2 or more"),
    (np.zeros((1, 2)), "x_T: got 1 particles, want 2 or more"),
    (np.zeros((4, 0)), r"x_T: got \(4, 0\)"),
    (np.zeros(4), r"x_T: got \(4,\), want \(N, \*dims\)"),
    (np.zeros((4, 2), int), "x_T: got int64, want a floating dtype"),
    (np.full((4, 2), np.nan), "x_T: got NaN or infinity"),
]


@pytest.mark.parametrize(("x", "message"), STATES, ids=[message for _, message in STATES])
def test_bad_first_states(x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WeightedSampler(VP, ONE, 5).sample(gaussian(VP).eps, x)


MOVING = Target.anneal(lambda t: 2 - t)
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": 0}, "num_steps: got 0"),
    ({"noise_scale": -1.0}, "noise_scale: got -1.0, want a number >= 0"),
    ({"integrator": "rk4"}, "integrator: got 'rk4', want one of euler, heun"),
    ({"resampler": "best"}, "resampler: got 'best', want one of multinomial"),
    ({"resampler": "birth_death", "ess_threshold": 0.5}, "resampler: got birth_death with"),
    ({"births": "uniform"}, "births: got 'uniform'"),
    ({"interval": 0}, "interval: got 0"),
    ({"ess_threshold": 0.0}, "ess_threshold: got 0.0"),
    ({"clip_weights": -1.0}, "clip_weights: got -1.0"),
    ({"clip_score_norm": 0.0}, "clip_score_norm: got 0.0"),
    ({"start_resampling_step": 500}, "start_resampling_step: got 500, want fewer than"),
    ({"prediction": "noise"}, "prediction: got 'noise'"),
    ({"log_densities": []}, "log_densities: got 0, want 1, one a power"),
    ({"times": [0.1, 0.5]}, "times: got 0.1 before 0.5, want decreasing times"),
    ({"target": MOVING, "noise_scale": 2.0}, "noise_scale: got 2.0, want 1 where powers move"),
    ({"schedule": VP.with_ends(last="denoise")}, "schedule.ends.last: got denoise"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WeightedSampler(**{"schedule": VP, "target": ONE, **options})
