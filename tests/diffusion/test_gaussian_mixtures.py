"""The analytic score against densities, samples and regressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import Cosine, LinearBeta, LinearFlow, VarianceExploding
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(35)
WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = RNG.normal(scale=2.0, size=(3, 4))
ROOTS = RNG.normal(size=(3, 4, 4)) * 0.5
COVARIANCES = ROOTS @ ROOTS.swapaxes(1, 2) + 0.05 * np.eye(4)
X = RNG.normal(scale=1.5, size=(6, 4))
SCHEDULES = [LinearBeta(), Cosine(), VarianceExploding(), LinearFlow()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def density(x: Any, t: float, schedule: Any) -> Any:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return sum(
        w * multivariate_normal(alpha * m, alpha**2 * S + sigma**2 * np.eye(4)).pdf(x)
        for w, m, S in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    )


@each_schedule
@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_density_and_its_gradient(schedule: Any, t: float) -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, schedule)
    want = np.log(density(X, t, schedule))
    np.testing.assert_allclose(mixture.log_density(X, t), want, rtol=1e-9)
    h = 1e-5
    for axis in range(4):
        step = h * np.eye(4)[axis]
        up, down = density(X + step, t, schedule), density(X - step, t, schedule)
        slope = (np.log(up) - np.log(down)) / (2 * h)
        np.testing.assert_allclose(mixture.score(X, t)[:, axis], slope, rtol=1e-4, atol=1e-6)


@each_schedule
def test_eps_score_and_denoiser_agree(schedule: Any) -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, schedule)
    t = np.linspace(0.05, 0.95, len(X))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps, x0 = mixture.eps(X, t), mixture.denoise(X, t)
    np.testing.assert_allclose(eps, -sigma * mixture.score(X, t), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, X, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mixture.responsibilities(X, t).sum(1), 1, rtol=1e-12)


def test_one_component_is_the_wiener_filter() -> None:
    schedule = LinearBeta()
    mixture = GaussianMixtureScore([1.0], MEANS[:1], COVARIANCES[:1], schedule)
    alpha, sigma = schedule.alpha(0.4), schedule.sigma(0.4)
    gain = alpha * COVARIANCES[0] @ np.linalg.inv(alpha**2 * COVARIANCES[0] + sigma**2 * np.eye(4))
    want = MEANS[0] + (X - alpha * MEANS[0]) @ gain.T
    np.testing.assert_allclose(mixture.denoise(X, 0.4), want, rtol=1e-10)


def test_point_masses_are_the_training_set_score() -> None:
    """Zero covariances: the denoiser is a softmax over the points."""
    schedule = VarianceExploding()
    points = RNG.normal(size=(5, 4))
    mixture = GaussianMixtureScore(np.full(5, 0.2), points, np.zeros((5, 4, 4)), schedule)
    logits = -0.5 * ((X[:, None] - points) ** 2).sum(-1) / 0.7**2
    gamma = np.exp(logits - logits.max(1, keepdims=True))
    want = gamma / gamma.sum(1, keepdims=True) @ points
    np.testing.assert_allclose(mixture.denoise(X, 0.7), want, rtol=1e-10)
    with pytest.raises(InputError, match="t: got a time at which a component has no spread"):
        mixture.score(X, 0.0)


def test_one_time_a_sample_is_each_sample_alone() -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    t = np.linspace(0.1, 1.0, len(X))
    each = np.concatenate([mixture.eps(x[None], s) for x, s in zip(X, t, strict=True)])
    np.testing.assert_allclose(mixture.eps(X, t), each, rtol=1e-12)
    long = torch.as_tensor(np.round(t * 10)).long()
    whole = mixture.eps(torch.as_tensor(X), long).numpy()
    np.testing.assert_allclose(whole, mixture.eps(X, long.numpy()), rtol=1e-10)


def test_far_from_all_components_nothing_under_or_overflows() -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    far = 1e6 * np.ones((1, 4))
    assert bool(np.isfinite(mixture.eps(far, 0.01)).all())
    np.testing.assert_allclose(mixture.responsibilities(far, 0.01).sum(), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_dtype_and_shape(dtype: Any) -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    x = torch.as_tensor(X.reshape(6, 2, 2)).to(dtype)
    for method in (mixture.eps, mixture.score, mixture.denoise):
        got = method(x, 0.3)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        want = torch.as_tensor(method(x.double().numpy(), 0.3)).to(dtype)
        torch.testing.assert_close(got, want)
    small = mixture.eps(X.astype(np.float32), 0.3)
    assert small.dtype == np.float32


def test_gradients_pass_through() -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    x = torch.as_tensor(X, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_density(x, 0.3).sum(), x)
    np.testing.assert_allclose(slope.numpy(), mixture.score(X, 0.3), rtol=1e-9)


def test_samples_have_the_mixture_moments() -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    n = 40_000
    x = mixture.sample(n, rng=0)
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    covariance = np.einsum("k,kde->de", WEIGHTS, COVARIANCES) + (WEIGHTS * centred.T) @ centred
    error = np.sqrt(np.diag(covariance) / n)
    assert np.abs((x.mean(0) - mean) / error).max() < 5  # false alarms: 4 in 1.7 million
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.06 * np.abs(covariance).max())
    noisy = mixture.sample(n, rng=0, t=0.5)
    schedule = mixture.schedule
    want = schedule.abar(0.5) * covariance + schedule.sigma(0.5) ** 2 * np.eye(4)
    np.testing.assert_allclose(np.cov(noisy.T), want, atol=0.06 * np.abs(want).max())
    assert mixture.sample(0).shape == (0, 4)


def test_eps_is_the_regression_of_the_noise() -> None:
    """E[eps | x_t] makes the residual uncorrelated with it: 5 standard errors, 3e-7 a test."""
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    x0, noise = mixture.sample(40_000, rng=1), np.random.default_rng(2).normal(size=(40_000, 4))
    x = mixture.schedule.perturb(x0, 0.3, noise)
    predicted = mixture.eps(x, 0.3)
    products = ((noise - predicted) * predicted).sum(1)
    assert abs(products.mean()) < 5 * products.std() / 200
    assert ((noise - predicted) ** 2).sum(1).mean() < (noise**2).sum(1).mean() * 0.5


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_from_sklearn(kind: str) -> None:
    from sklearn.mixture import GaussianMixture

    data = RNG.normal(size=(200, 4)) * [1, 2, 0.5, 1]
    gm = GaussianMixture(2, covariance_type=kind, random_state=0).fit(data)
    mixture = GaussianMixtureScore.from_sklearn(gm)
    np.testing.assert_allclose(
        mixture.log_density(data, 1e-12), gm.score_samples(data), rtol=1e-5, atol=1e-6
    )


def test_from_sklearn_wants_a_fitted_mixture() -> None:
    from sklearn.mixture import GaussianMixture

    with pytest.raises(InputError, match="unfitted"):
        GaussianMixtureScore.from_sklearn(GaussianMixture(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 0.5, 0.5]}, "weights: got sum 1.5"),
        ({"weights": [1.5, -0.5, 0.0]}, "weights"),
        ({"weights": [np.nan, 0.5, 0.5]}, "weights"),
        ({"weights": []}, "weights"),
        ({"means": MEANS[:2]}, "means"),
        ({"covariances": COVARIANCES[:, :3]}, "covariances"),
        ({"means": np.full((3, 4), np.nan)}, "NaN"),
        ({"covariances": COVARIANCES + np.triu(np.ones((4, 4)), 1)}, "asymmetric"),
        ({"covariances": COVARIANCES - 5 * np.eye(4)}, "eigenvalue"),
    ],
)
def test_bad_mixtures(change: dict[str, Any], message: str) -> None:
    parts = {"weights": WEIGHTS, "means": MEANS, "covariances": COVARIANCES} | change
    with pytest.raises(InputError, match=message):
        GaussianMixtureScore(**parts)


def test_bad_states() -> None:
    mixture = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES)
    with pytest.raises(InputError, match="with 4 entries each"):
        mixture.eps(X[:, :3], 0.5)
    with pytest.raises(InputError, match="with 4 entries each"):
        mixture.eps(X[0], 0.5)
    with pytest.raises(InputError, match="one time or"):
        mixture.eps(X, [0.1, 0.2])
    assert mixture.eps(X[:0], 0.5).shape == (0, 4)
