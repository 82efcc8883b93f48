"""Isotropic, empirical and low-rank mixture scores against direct formulas and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from scoredraw.diffusion import score_models
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import GaussianScore, edm_schedule
from scoredraw.diffusion.schedules import VarianceExploding
from scoredraw.diffusion.score_models import (
    EmpiricalScore,
    LowRankMixtureScore,
    fit_mixture,
    isotropic_score,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(1)
X = RNG.normal(size=(30, 4)) * [2.0, 1.0, 0.5, 0.1] + 0.3
x = RNG.normal(size=(6, 4)) * 1.5


def agree(a, b, schedule=None, rtol=1e-8) -> None:
    """Score, eps and denoiser of both at several times."""
    ends = (schedule or edm_schedule()).ends
    for t in np.geomspace(ends.t_start, max(ends.t_end, 0.05), 4):
        for method in ("score", "eps", "denoise"):
            got, want = getattr(a, method)(x, t), getattr(b, method)(x, t)
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def test_the_isotropic_score() -> None:
    for std, variance in ((0.0, 0.0), (0.5, 0.25), ("data", X.var(axis=0).mean())):
        model = isotropic_score(X, std)
        want = (X.mean(axis=0) - x) / (1.3**2 + variance)
        np.testing.assert_allclose(model.score(x, 1.3), want)
    path = isotropic_score(X).teleport(x, 80.0, 20.0)
    np.testing.assert_allclose(path, X.mean(axis=0) + (x - X.mean(axis=0)) / 4)


def test_the_empirical_score_is_the_mixture_of_points(schedule) -> None:
    model = EmpiricalScore(X, schedule)
    t = 0.3 * schedule.ends.t_start
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    apart = x[:, None] - alpha * X
    weights = softmax(-np.square(apart).sum(axis=-1) / (2 * sigma**2), axis=1)
    want = -(weights[..., None] * apart).sum(axis=1) / sigma**2
    np.testing.assert_allclose(model.score(x, t), want, rtol=1e-8, atol=1e-10 * np.abs(want).max())
    points = np.zeros((len(X), 4, 4))
    agree(model, GaussianMixtureScore(np.full(30, 1 / 30), X, points, schedule), schedule)


def test_a_training_set_of_one_is_isotropic_without_spread() -> None:
    agree(EmpiricalScore(X[:1]), isotropic_score(X[:1]))


def test_the_variance_is_sigma_squared_once_and_the_denoiser_finds_its_row() -> None:
    """A released demo hands the variance to where a deviation is wanted (sigma to the fourth)."""
    model = EmpiricalScore([[-1.0], [1.0]])
    for sigma in (0.3, 0.7, 2.0):
        at = np.array([[0.4]])
        np.testing.assert_allclose(model.denoise(at, sigma), np.tanh(at / sigma**2))
        np.testing.assert_allclose(model.score(at, sigma), (np.tanh(at / sigma**2) - at) / sigma**2)
    near = EmpiricalScore(X).denoise(X + 1e-3 * RNG.normal(size=X.shape), 1e-3)
    np.testing.assert_allclose(near, X, atol=1e-9)


def test_the_score_integrates_to_a_normalised_density() -> None:
    """∫ score from a point gives log p up to a constant; with N(0, 2πσ²)'s normaliser it is p."""
    schedule, sigma = VarianceExploding(), 0.7
    model = EmpiricalScore([[-1.0], [0.2], [1.0]], schedule)
    grid = np.linspace(-8, 8, 4001)[:, None]
    score = model.score(grid, sigma)[:, 0]
    log_p = np.concatenate([[0.0], np.cumsum((score[1:] + score[:-1]) / 2 * 0.004)])
    p = np.exp(log_p - log_p.max())
    p /= np.sum(p) * 0.004
    bumps = np.exp(-((grid - [-1.0, 0.2, 1.0]) ** 2) / (2 * sigma**2))
    want = bumps.mean(axis=1) / np.sqrt(2 * np.pi * sigma**2)
    np.testing.assert_allclose(p, want, atol=1e-5)


def test_rows_are_taken_block_by_block(monkeypatch) -> None:
    whole = EmpiricalScore(X).denoise(x, [0.1, 0.5, 1.0, 2.0, 5.0, 80.0])
    monkeypatch.setattr(score_models, "BLOCK", 60)
    np.testing.assert_allclose(
        EmpiricalScore(X).denoise(x, [0.1, 0.5, 1.0, 2.0, 5.0, 80.0]), whole, rtol=1e-12
    )


def test_far_away_the_training_set_is_its_gaussian() -> None:
    """score = Gaussian's + O(R³/sigma⁴): the gap's order in sigma, four and no less."""
    delta, gaussian = EmpiricalScore(X), GaussianScore.fit(X)
    gaps = []
    for sigma in (100.0, 200.0, 400.0):
        at = RNG.normal(size=(200, 4)) * sigma
        gap = delta.score(at, sigma) - gaussian.score(at, sigma)
        gaps.append(np.sqrt(np.square(gap).mean()))
    orders = np.log2(np.divide(gaps[:-1], gaps[1:]))
    np.testing.assert_allclose(orders, 4, atol=0.35)


# ------------------------------------------------------------------ mixtures

K, R = 3, 2
AXES = np.linalg.qr(RNG.normal(size=(K, 4, 4)))[0]
WIDTHS = RNG.uniform(0.1, 2.0, size=(K, 4))
MEANS, WEIGHTS = RNG.normal(size=(K, 4)), np.array([0.2, 0.5, 0.3])


def dense(widths, schedule=None):
    S = np.einsum("kde,ke,kfe->kdf", AXES, widths, AXES)
    return GaussianMixtureScore(WEIGHTS, MEANS, S, schedule or edm_schedule())


def test_a_low_rank_mixture_is_the_dense_one_of_the_same_covariances(schedule) -> None:
    for tau in (0.0, 0.3, np.array([0.0, 0.1, 0.7])):
        widths = WIDTHS.copy()
        widths[:, R:] = np.broadcast_to(tau, K)[:, None]
        low = LowRankMixtureScore(
            WEIGHTS, MEANS, WIDTHS[:, :R], AXES[..., :R], schedule, residual=tau
        )
        agree(low, dense(widths, schedule), schedule, rtol=1e-7)
    full = LowRankMixtureScore(WEIGHTS, MEANS, WIDTHS, AXES, schedule)
    agree(full, dense(WIDTHS, schedule), schedule, rtol=1e-7)


def test_one_component_is_the_gaussian_and_no_directions_are_the_training_set() -> None:
    for tau in (0.0, 0.2):
        one = LowRankMixtureScore([1.0], MEANS[:1], WIDTHS[:1, :R], AXES[:1, :, :R], residual=tau)
        agree(one, GaussianScore(MEANS[0], WIDTHS[0, :R], AXES[0, :, :R], residual=tau))
    points = LowRankMixtureScore(np.full(30, 1 / 30), X, np.zeros((30, 0)), np.zeros((30, 4, 0)))
    agree(points, EmpiricalScore(X), rtol=1e-7)


def test_k_means_gives_frequencies_means_and_covariances_of_clusters() -> None:
    shifts = np.array([[-20.0, 0, 0, 0], [0, 20.0, 0, 0], [20.0, 0, 0, 0]])
    labels = np.repeat([0, 1, 2], [10, 14, 6])
    data = X + shifts[labels]
    full = fit_mixture(data, 3)
    order = np.argsort(full.means @ [1.0, 0.01, 0, 0])
    np.testing.assert_allclose(full.weights[order] * 30, [10, 14, 6])
    for k in range(3):
        mine = data[labels == k]
        np.testing.assert_allclose(full.means[order[k]], mine.mean(axis=0))
        U, values = full.vectors[order[k]], full.eigenvalues[order[k]]
        np.testing.assert_allclose(U * values @ U.T, np.cov(mine.T, bias=True), atol=1e-12)
    low = fit_mixture(data, 3, rank=4)
    agree(low, full, rtol=1e-7)
    flat, kept = fit_mixture(data, 3, rank=1), fit_mixture(data, 3, rank=1, residual="mean")
    assert (flat.residual == 0).all()
    total = kept.eigenvalues[:, 0] + 3 * kept.residual
    np.testing.assert_allclose(total, full.eigenvalues.sum(axis=1))


def test_one_cluster_is_the_gaussian_and_as_many_as_rows_are_the_training_set() -> None:
    agree(fit_mixture(X, 1, rank=2), GaussianScore.fit(X, 2), rtol=1e-7)
    agree(fit_mixture(X, 1), GaussianScore.fit(X), rtol=1e-7)
    few = X[:5]
    agree(fit_mixture(few, 5, rank=3), EmpiricalScore(few), rtol=1e-7)


def test_a_low_rank_without_the_rest_collapses_at_low_noise_only() -> None:
    """Against the mixture of whole covariances, on its own noisy samples."""
    truth = dense(WIDTHS)
    low = LowRankMixtureScore(WEIGHTS, MEANS, WIDTHS[:, :R], AXES[..., :R])
    rest = WIDTHS[:, R:].mean(axis=1)
    soft = LowRankMixtureScore(WEIGHTS, MEANS, WIDTHS[:, :R], AXES[..., :R], residual=rest)

    def explained(model, sigma) -> float:
        at = truth.sample(500, rng=2) + sigma * RNG.normal(size=(500, 4))
        a, b = truth.score(at, sigma), model.score(at, sigma)
        return float(1 - np.square(a - b).sum() / np.square(a).sum())

    assert explained(low, 0.05) < -10
    assert explained(soft, 0.05) > 0.5
    assert explained(low, 20.0) > 0.999


# ------------------------------------------------------------------ kinds of input

MODELS = {
    "isotropic": isotropic_score(X, 0.3),
    "empirical": EmpiricalScore(X),
    "low rank": LowRankMixtureScore(WEIGHTS, MEANS, WIDTHS[:, :R], AXES[..., :R]),
    "no rank": LowRankMixtureScore(WEIGHTS, MEANS, WIDTHS[:, :0], AXES[..., :0], residual=1.0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_images_and_one_time_a_sample(name, dtype) -> None:
    model, times = MODELS[name], [0.1, 0.5, 1.0, 2.0, 5.0, 80.0]
    images = torch.from_numpy(x).to(dtype).reshape(6, 2, 1, 2)
    flat = images.double().numpy().reshape(6, 4)
    for method in ("score", "eps", "denoise"):
        got = getattr(model, method)(images, times)
        assert (got.dtype, got.shape) == (dtype, images.shape)
        each = [getattr(model, method)(flat[i : i + 1], t) for i, t in enumerate(times)]
        want = torch.from_numpy(np.concatenate(each)).to(dtype).reshape(images.shape)
        torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=0)
        assert getattr(model, method)(images[:0], 1.0).shape == (0, 2, 1, 2)


WRONG = [
    (lambda: isotropic_score(X, -1), "std: got -1, want a number >= 0"),
    (lambda: isotropic_score(X, "all"), "std: got 'all', want a number >= 0, or 'data'"),
    (lambda: EmpiricalScore(np.ones((0, 2))), r"X: got \(0, 2\), want \(n, \*dims\), n >= 1"),
    (lambda: EmpiricalScore([[np.inf]]), "X: got NaN or infinity, want finite values"),
    (lambda: EmpiricalScore(X).score(x, 0.0), "t: got sigma = 0, want a time with noise"),
    (lambda: EmpiricalScore(X).score(x[:, :2], 1.0), r"x: got \(6, 2\), want \(B, \*dims\) with 4"),
    (lambda: fit_mixture(X, 31), "n_components: got 31, want at most n = 30"),
    (lambda: fit_mixture(X, 0), "n_components: got 0, want an integer >= 1"),
    (lambda: fit_mixture(X, 2, rank=5), "rank: got 5, want None, or 1 to d = 4"),
    (lambda: fit_mixture(X, 2, rank=2.5), "rank: got 2.5, want an integer >= 1"),
    (lambda: fit_mixture(X, 2, rank=1, residual="?"), "residual: got '[?]', want one of"),
    (lambda: fit_mixture([[1.0], [np.nan]], 1), "X: got NaN or infinity"),
]
A = ([1.0], [[0.0, 0.0]], [[1.0]], [[[1.0], [0.0]]])
WRONG += [
    (lambda: LowRankMixtureScore([0.5], *A[1:]), "weights: got sum 0.5, least 0.5, want >= 0, sum"),
    (lambda: LowRankMixtureScore([0.5, 0.5], *A[1:]), r"means: got \(1, 2\), want \(2, d\)"),
    (lambda: LowRankMixtureScore(*A[:2], [1.0], A[3]), r"eigenvalues: got \(1,\), want \(1, r\)"),
    (lambda: LowRankMixtureScore(*A[:3], [[[1.0]]]), r"vectors: got \(1, 1, 1\), want \(1, 2, 1\)"),
    (lambda: LowRankMixtureScore(*A[:2], [[-1.0]], A[3]), "eigenvalues: got -1, want variances"),
    (lambda: LowRankMixtureScore(*A[:3], [[[1.0], [1.0]]]), "vectors: got UᵀU off by 1, want orth"),
    (lambda: LowRankMixtureScore(*A, residual=-1), "residual: got .*, want variances >= 0"),
    (lambda: LowRankMixtureScore(*A[:2], [[np.nan]], A[3]), "eigenvalues, vectors: got NaN"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_bad_input_is_one_line(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
