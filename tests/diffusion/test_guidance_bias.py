"""Closed forms of the bias: against quadrature, their differential equation and simulations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from scoredraw.diffusion.feynman_kac import Target
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.guidance_bias import (
    bias_table,
    gaussian_target,
    normalisable,
    uncorrected_gaussian,
    variance_factor,
)
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule, VarianceExploding
from scoredraw.diffusion.weighted_sampling import WeightedSampler
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

EXACT = [
    ([3.0], [0.7], [1.3]),
    ([1.0, 1.0], [0.0, 2.0], [1.0, 0.5]),
    ([-0.8, 1.8], [0.5, -0.4], [1.0, 0.6]),
]


@pytest.mark.parametrize(("betas", "means", "variances"), EXACT)
def test_the_target_is_the_integral(betas: Any, means: Any, variances: Any) -> None:
    def density(x: float) -> float:
        return float(np.exp(np.dot(betas, norm.logpdf(x, means, np.sqrt(variances)))))

    moments = [quad(lambda x, k=k: x**k * density(x), -30, 30, epsabs=1e-13)[0] for k in range(3)]
    found = gaussian_target(betas, np.array(means)[:, None], variances)
    mean = moments[1] / moments[0]
    assert found.log_z == pytest.approx(np.log(moments[0]), abs=1e-9)
    assert found.mean[0] == pytest.approx(mean, abs=1e-9)
    assert found.covariance[0, 0] == pytest.approx(moments[2] / moments[0] - mean**2, abs=1e-8)


def test_the_target_in_several_dimensions() -> None:
    """Π q^β over its normalised form is exp(log Z) wherever it is looked at."""
    random = np.random.default_rng(1)
    root = random.normal(size=(2, 3, 3))
    S = root @ root.swapaxes(1, 2) + np.eye(3)
    m = random.normal(size=(2, 3))
    found = gaussian_target([0.7, 1.6], m, S)
    laws = [multivariate_normal(mean, cov) for mean, cov in zip(m, S, strict=True)]
    target = multivariate_normal(found.mean, found.covariance)
    x = random.normal(size=(5, 3))
    ratio = 0.7 * laws[0].logpdf(x) + 1.6 * laws[1].logpdf(x) - target.logpdf(x)
    np.testing.assert_allclose(ratio, found.log_z, rtol=1e-10)


def test_annealing_has_the_known_normaliser() -> None:
    for beta, v in ((3.0, 0.4), (0.5, 2.0)):
        want = 0.5 * ((1 - beta) * np.log(2 * np.pi * v) - np.log(beta))
        found = gaussian_target([beta], [[1.0, 2.0]], [v])
        assert found.log_z == pytest.approx(2 * want)


def test_figures_that_are_known() -> None:
    """β = 3: .2 with the usual noise, 1/9 tempered, 1/7 between; β κ → 1 as ζ grows."""
    zetas = np.sqrt([1.0, 1 / 3, 0.5])
    np.testing.assert_allclose(variance_factor(3.0, zetas), [1 / 5, 1 / 9, 1 / 7], rtol=1e-12)
    table = bias_table([0.9, 1.0, 3.0], [1.0, 3.0, 100.0])
    np.testing.assert_allclose(table[1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(table[:, -1], 1.0, atol=1e-3)
    assert (np.diff(np.abs(np.log(table[[0, 2]])), axis=1) < 0).all()


def test_one_expert_ends_where_its_closed_form_says() -> None:
    for beta, zeta, v, start in ((3.0, 1.0, 1.0, 10.0), (1.7, 0.6, 0.3, 2.0), (0.8, 0.3, 2.0, 5.0)):
        _, found = uncorrected_gaussian([beta], [0.0], [v], zeta, start, 0.1)
        kappa, c = zeta**2 / (beta * (1 + zeta**2) - 1), beta * (1 + zeta**2)
        near, far = v + 0.1**2, v + start**2
        first = start**2 / beta
        want = kappa * near + (first / far - kappa) * far * (near / far) ** c
        assert found == pytest.approx(want, rel=1e-7)


def test_without_bias_there_is_none() -> None:
    """β = 1, and guidance between Gaussians of equal variance, whose weights are all equal."""
    mean, variance = uncorrected_gaussian([1.0], [2.0], [0.5], 0.7, 50.0, mean_start=2.0)
    assert (mean, variance) == pytest.approx((2.0, 0.5), rel=2e-3)
    exact = gaussian_target([-1.0, 2.0], [[0.5], [-0.4]], [0.8, 0.8])
    start = float(exact.mean[0])
    _, variance = uncorrected_gaussian(
        [-1.0, 2.0], [0.5, -0.4], [0.8, 0.8], 1.0, 50.0, mean_start=start
    )
    assert variance == pytest.approx(float(exact.covariance[0, 0]), rel=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [LinearBeta(), VarianceExploding(0.01, 10.0, time="geometric")],
    ids=["VP", "VE"],
)
@pytest.mark.parametrize(
    ("target", "means", "variances"),
    [
        (Target.anneal(3.0, "tempered"), [1.0], [1.0]),
        (Target.anneal(3.0).with_noise(2.0), [1.0], [1.0]),
        (Target.guidance(2.0), [0.0, 1.0], [1.0, 0.5]),
    ],
    ids=["tempered", "loud", "guidance"],
)
def test_simulations_end_there(
    schedule: NoiseSchedule, target: Target, means: Any, variances: Any
) -> None:
    """20,000 particles: variances to 1 % by chance and 2 % by 800 Euler steps; judged at 5 %."""
    models = [
        GaussianMixtureScore([1.0], [[m]], [[[v]]], schedule).eps
        for m, v in zip(means, variances, strict=True)
    ]
    sampler = WeightedSampler(schedule, target, 800, resampler=None)
    x = sampler.sample(models, sampler.draw_prior((20_000, 1), rng=1), rng=2).x
    ends = schedule.ends
    mean, variance = uncorrected_gaussian(
        target.powers_at(0.5), means, variances, target.noise_scale,
        float(schedule.rho(ends.t_start)), float(schedule.rho(ends.t_end)),
        variance_start=float(
            np.square(schedule.prior_std / schedule.alpha(ends.t_start))
            / target.powers_at(0.5).sum()
        ),
    )  # fmt: skip
    scale = float(schedule.alpha(ends.t_end))
    assert x.var() == pytest.approx(variance * scale**2, rel=0.05)
    assert x.mean() == pytest.approx(mean * scale, abs=0.03)


def test_what_can_be_normalised() -> None:
    assert normalisable([-1.0, 2.0], [1.0, 1.99])
    assert not normalisable([-1.0, 2.0], [1.0, 2.0])
    flat = np.stack([np.diag([1.0, 1.0]), np.diag([0.5, 5.0])])
    assert not normalisable([-1.0, 2.0], flat)  # in one direction of the two
    assert normalisable([0.1, 0.9], flat)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: gaussian_target([-1.0, 2.0], [[0.0], [1.0]], [1.0, 3.0]), "betas: got a target with"),
    (lambda: gaussian_target([1.0], [[0.0], [1.0]], [1.0, 1.0]), "means: got"),
    (lambda: gaussian_target([1.0], [[0.0]], [[1.0]]), r"covariances: got \(1, 1\)"),
    (lambda: gaussian_target([1.0], [[0.0]], [-1.0]), "covariances: got one that is not"),
    (lambda: gaussian_target([np.nan], [[0.0]], [1.0]), "betas: got NaN"),
    (lambda: variance_factor(0.5, 1.0), "beta: got β"),
    (lambda: uncorrected_gaussian([1.0], [0.0], [1.0], 1.0, 1.0, 2.0), "rho_end: got 2.0"),
    (lambda: uncorrected_gaussian([1.0], [0.0, 1.0], [1.0], 1.0, 1.0), "betas: got"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
