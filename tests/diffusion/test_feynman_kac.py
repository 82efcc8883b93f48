"""The weighted SDEs against the Fokker-Planck equation, and the limits they must meet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.diffusion.feynman_kac import (
    Target,
    dot,
    family_noise_scale,
    log_density_change,
    ramp,
    rates,
    squares_gap,
)
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import LinearBeta, LinearFlow, NoiseSchedule, VarianceExploding
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

X = np.random.default_rng(24).normal(size=(7, 3))


def experts(schedule: NoiseSchedule) -> list[GaussianMixtureScore]:
    """Two mixtures on the line."""
    first = GaussianMixtureScore([0.3, 0.7], [[-1.0], [0.8]], [[[0.3]], [[0.5]]], schedule)
    second = GaussianMixtureScore([0.6, 0.4], [[0.2], [1.5]], [[[0.7]], [[0.2]]], schedule)
    return [first, second]


# ── the equation that every weighted SDE has to satisfy ─────────────────────────────────────────


def bump(x: Any, t: float) -> Any:
    return np.sin(1.3 * x[:, 0])


def slope(x: Any, t: float) -> Any:
    return 1.3 * np.cos(1.3 * x)


def falling(t: float) -> float:
    return 0.4 + 0.6 * (1 - t)


TARGETS = {
    "annealed": Target.anneal(2.5),
    "tempered": Target.anneal(2.5, "tempered"),
    "family": Target.anneal(2.5, 0.2),
    "hot": Target.anneal(0.6, 0.9),
    "ODE": Target.anneal(2.5).with_noise(0.0),
    "loud": Target.product(1, 1).with_noise(2.0),
    "product": Target.product(1.5, 0.75),
    "guidance": Target.guidance(1.8),
    "guidance of annealed": Target.guidance(1.8).raised(1.4),
    "powers that move": Target((lambda t: 2 - t, lambda t: 0.5 * t)),
    "reward": Target.anneal(1.0).tilted(bump, slope, falling),
    "reward of a loud product": Target.product(1, 1).with_noise(1.7).tilted(bump, slope, falling),
}


def count(target: Target) -> int:
    return len(target.powers)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "schedule", [LinearBeta(), VarianceExploding(), LinearFlow()], ids=lambda s: type(s).__name__
)
def test_fokker_planck(name: str, schedule: NoiseSchedule) -> None:
    """∂_τ p = -(v p)' + ζ²σ²/2 p'' + g p for p = Π q^β exp(b r), not normalised, on a line.

    Derivatives by central differences; with the sign of any term of v or g turned, or any factor
    halved, it is off by more than 1e-2.
    """
    target = TARGETS[name]
    models = experts(schedule)[: count(target)]
    t, h, x = 0.5, 1e-3, np.linspace(-2.0, 2.5, 46)[:, None]

    def density(x: Any, t: float) -> Any:
        total = sum(
            b * q.log_density(x, t) for b, q in zip(target.powers_at(t), models, strict=True)
        )
        if target.reward is not None:
            total = total + target.strength_at(t) * target.reward(x, t)
        return np.exp(total)

    def coefficients(x: Any) -> Any:
        reward = None if target.reward is None else target.reward(x, t)
        gradient = target.gradient(x, t) if callable(target.gradient) else None
        return rates(
            target, schedule, x, [q.score(x, t) for q in models], t + h, t - h, at=t, reward=reward,
            gradient=gradient, log_q=[q.log_density(x, t) for q in models],
        )  # fmt: skip

    in_time = (density(x, t - h) - density(x, t + h)) / (2 * h)
    flow = [coefficients(x + step).drift[:, 0] * density(x + step, t) for step in (h, -h)]
    curve = (density(x + h, t) - 2 * density(x, t) + density(x - h, t)) / h**2
    here = coefficients(x)
    right = -(flow[0] - flow[1]) / (2 * h) + 0.5 * here.noise**2 * curve
    right = right + here.growth * density(x, t)
    np.testing.assert_allclose(right, in_time, atol=3e-4 * np.abs(in_time).max())


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


def test_where_nothing_is_to_be_corrected_the_weights_stand_still() -> None:
    scores = [X, np.cos(X)]
    for schedule in (LinearBeta(), VarianceExploding()):
        for target, given_ in (
            (Target.anneal(1.0), scores[:1]),
            (Target.guidance(0.0), scores),
            (Target.guidance(1.0), scores),
        ):
            got = rates(target, schedule, X, given_, 0.5, 0.4)
            assert not got.growth.any()
        plain = rates(Target.anneal(1.0), schedule, X, scores[1:], 0.5, 0.4)
        guided = rates(Target.guidance(1.0), schedule, X, scores, 0.5, 0.4)
        np.testing.assert_array_equal(guided.drift, plain.drift)


def test_a_product_with_itself_is_annealing_at_two() -> None:
    score, schedule = np.cos(X), LinearBeta()
    twice = rates(Target.product(1, 1), schedule, X, [score, score], 0.5, 0.4)
    once = rates(Target.anneal(2.0), schedule, X, [score], 0.5, 0.4)
    np.testing.assert_allclose(twice.drift, once.drift, rtol=1e-14)
    np.testing.assert_allclose(twice.growth, once.growth, rtol=1e-13)


def test_rows_of_the_table() -> None:
    """The drifts, noises and weights as the paper prints them, for a schedule with drift."""
    schedule, (a, b) = LinearBeta(), (np.cos(X), np.sin(X))
    f, g2 = float(schedule.drift(0.5)), float(schedule.diffusion(0.5))
    family = 3.0 + (1 - 3.0) * 0.1
    annealed = 2 * 3 * f + 0.5 * g2 * 3 * 2 * dot(a, a)
    rows = [
        (Target.anneal(3.0), [a], -f * X + 3 * g2 * a, 1.0, annealed),
        (Target.anneal(3.0, "tempered"), [a], -f * X + 2 * g2 * a, 3**-0.5, annealed),
        (Target.anneal(3.0, 0.1), [a], -f * X + family * g2 * a, (1 - 0.4 / 3) ** 0.5, annealed),
        (Target.product(1, 1), [a, b], -f * X + g2 * (a + b), 1.0, 3 * f + g2 * dot(a, b)),
        (Target.guidance(1.8), [a, b], -f * X + g2 * (1.8 * b - 0.8 * a), 1.0,
         0.5 * g2 * 1.8 * 0.8 * dot(a - b, a - b)),
    ]  # fmt: skip
    for target, scores, drift, scale, growth in rows:
        got = rates(target, schedule, X, scores, 0.5, 0.4)
        np.testing.assert_allclose(got.drift, drift, rtol=1e-12)
        assert got.noise == pytest.approx(scale * g2**0.5, rel=1e-12)
        np.testing.assert_allclose(got.growth, growth, rtol=1e-10)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.floats(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_the_weights_do_not_depend_on_the_noise(betas: list[float], zeta: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = [random.normal(size=(5, 2)) for _ in betas]
    x = random.normal(size=(5, 2))
    target = Target(tuple(betas))
    got = rates(target.with_noise(zeta), LinearBeta(), x, scores, 0.5, 0.4)
    want = rates(target, LinearBeta(), x, scores, 0.5, 0.4)
    np.testing.assert_array_equal(got.growth, want.growth)
    beta = np.array(betas)
    S = np.einsum("i,ind->nd", beta, scores)
    gap = dot(S, S) - sum(b * dot(s, s) for b, s in zip(beta, scores, strict=True))
    np.testing.assert_allclose(squares_gap(beta, scores), gap, atol=1e-11)


def test_arrays_and_tensors_agree() -> None:
    torch = pytest.importorskip("torch")
    scores = [np.cos(X), np.sin(X)]
    for target in (Target.guidance(2.0), Target.product(0.5, 2.0)):
        want = rates(target, LinearBeta(), X, scores, 0.5, 0.4)
        tensors = [torch.from_numpy(s) for s in scores]
        got = rates(target, LinearBeta(), torch.from_numpy(X), tensors, 0.5, 0.4)
        np.testing.assert_allclose(got.drift.numpy(), want.drift, rtol=1e-14)
        np.testing.assert_allclose(got.growth.numpy(), want.growth, rtol=1e-13)


@pytest.mark.parametrize(
    "schedule",
    [LinearBeta(), VarianceExploding(0.05, 3.0, time="geometric")],
    ids=["VP", "VE"],
)
def test_log_densities_are_followed(schedule: NoiseSchedule) -> None:
    """Along another expert's paths: the error falls as sqrt(dτ), by 4 for 16 times the steps.

    With 400 paths the ratio itself is known to 5 %; what is left of O(dτ) at 100 steps raises it.
    """
    q, driving = experts(schedule)
    errors = []
    for steps in (100, 1600):
        random = np.random.default_rng(3)
        x = schedule.prior_std * random.normal(size=(400, 1))
        times = np.linspace(0.8, 0.2, steps + 1)
        log_q = q.log_density(x, times[0])
        for t, t_next in pairwise(times):
            got = rates(Target.anneal(1.0), schedule, x, [driving.score(x, t)], t, t_next)
            kick = got.noise * (t - t_next) ** 0.5 * random.normal(size=x.shape)
            moved = x + got.drift * (t - t_next) + kick
            log_q = log_q + log_density_change(schedule, x, moved, q.score(x, t), t, t_next)
            x = moved
        errors.append(np.sqrt(np.square(log_q - q.log_density(x, times[-1])).mean()))
    assert 3 < errors[0] / errors[1] < 6


def test_the_family_of_noises() -> None:
    assert family_noise_scale(3.0, 0.0) == 1.0
    assert family_noise_scale(3.0, 0.5) == pytest.approx(3**-0.5)
    assert family_noise_scale(3.0, 0.75) == 0.0
    assert Target.anneal(3.0, "tempered").noise_scale == pytest.approx(3**-0.5)
    assert family_noise_scale(0.5, 0.5) == pytest.approx(2**0.5)
    with pytest.raises(InputError, match=r"noise: got a = 0\.8"):
        family_noise_scale(3.0, 0.8)


def test_ramp_and_autograd() -> None:
    b = ramp(LinearBeta(), 3.0, power=2.0)
    assert b(1.0) == 0.0
    assert b(1e-3) == pytest.approx(3.0)
    assert b(0.0) == pytest.approx(3.0)
    torch = pytest.importorskip("torch")
    target = Target.anneal(1.0).tilted(lambda x, t: (x**3).sum(dim=1), "autograd")
    assert callable(target.gradient)
    x = torch.from_numpy(X)
    with torch.no_grad():
        torch.testing.assert_close(target.gradient(x, 0.5), 3 * x**2)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Target.anneal(-1.0), "beta: got -1.0, want a positive number"),
    (lambda: Target.anneal(0.0), "beta: got 0.0"),
    (lambda: Target.anneal(float("nan")), "beta: got nan"),
    (lambda: Target.anneal(2.0, "hot"), "noise: got 'hot', want a number or one of target"),
    (lambda: Target.anneal(lambda t: 1.0, "tempered"), "noise: got 'tempered', want 'target'"),
    (lambda: Target.product(), "betas: got none"),
    (lambda: Target.product(1.0, -0.5), r"betas\[1\]: got -0.5, want a number >= 0"),
    (lambda: Target.product(0.0, 0.0), "betas: got zeros"),
    (lambda: Target.guidance(-2.0), r"betas\[0\]: got -2.0"),
    (lambda: Target.guidance(), "betas: got none"),
    (lambda: Target.guidance(2.0).raised(0.0), "power: got 0.0"),
    (lambda: Target.product(1).tilted(bump).raised(2.0), "power: got a tilted target"),
    (lambda: Target.product(1).tilted(bump).tilted(bump), "reward: got a second one"),
    (lambda: Target.product(1).tilted(bump, "exact"), "gradient: got 'exact'"),
    (lambda: Target.product(1).with_noise(-0.1), "noise_scale: got -0.1, want a number >= 0"),
    (lambda: ramp(LinearBeta(), power=0.0), "power: got 0.0"),
    (lambda: Target((lambda t: float("inf"),)).powers_at(0.5), r"powers: got \[inf\] at t = 0.5"),
    (lambda: rates(Target.product(1), LinearBeta(), X, [X], 0.5, 0.5), "t_next: got 0.5"),
    (lambda: rates(Target.product(1), LinearBeta(), X, [X, X], 0.5, 0.4), "scores: got 2, want 1"),
    (lambda: rates(Target.product(1, 1), LinearBeta(), X, [X, X[:3]], 0.5, 0.4),
     r"scores\[1\]: got \(3, 3\), want the shape of x, \(7, 3\)"),
    (lambda: rates(Target((lambda t: t,)), LinearBeta(), X, [X], 0.5, 0.4), "log_q: got None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
