"""The Gaussian score: its closed forms against the equations they solve, for every schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import GaussianScore, edm_schedule
from scoredraw.diffusion.schedules import LinearBeta, LinearFlow, VarianceExploding
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(0)
D = 5
MEAN = RNG.normal(size=D)
AXES = np.linalg.qr(RNG.normal(size=(D, D)))[0]
WIDTHS = np.array([4.0, 1.5, 0.3, 0.02, 0.0])
LOW = GaussianScore(MEAN, WIDTHS[:3], AXES[:, :3])
FULL = GaussianScore(MEAN, WIDTHS, AXES)
SOFT = GaussianScore(MEAN, WIDTHS[:2], AXES[:, :2], residual=0.1)
ALL = {"low rank": LOW, "full": FULL, "residual": SOFT}


def ends_of(schedule) -> tuple[float, float]:
    return schedule.ends.t_start, max(schedule.ends.t_end, 1e-3)


@pytest.mark.parametrize("name", ALL)
def test_the_closed_form_solves_the_ode_of_every_schedule(name, schedule) -> None:
    """Against a fourth-order solver with 400 steps, which knows the score alone."""
    gaussian = ALL[name].with_schedule(schedule)
    first, last = ends_of(schedule)
    x_T = gaussian.sample(20, rng=1, t=first)
    solver = DEISSolver(
        schedule, 400, variant="rhork", tableau="4rk", grid="log", t_start=first, t_end=last
    )
    solved = solver.sample(gaussian.eps, x_T)
    np.testing.assert_allclose(gaussian.teleport(x_T, first, last), solved, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_score_eps_and_denoiser_are_those_of_the_dense_gaussian(name, schedule) -> None:
    gaussian = ALL[name].with_schedule(schedule)
    S = gaussian.vectors @ np.diag(gaussian.eigenvalues - gaussian.residual) @ gaussian.vectors.T
    S += gaussian.residual * np.eye(D)
    x = RNG.normal(size=(7, D))
    dense = GaussianMixtureScore([1.0], [MEAN], [S], schedule)
    for t in np.linspace(*ends_of(schedule), 4):
        for method in ("score", "eps", "denoise"):
            got, want = (getattr(one, method)(x, t) for one in (gaussian, dense))
            np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * np.abs(want).max())
    again = GaussianScore.from_covariance(MEAN, S, schedule)
    t_mid = float(np.mean(ends_of(schedule)))
    np.testing.assert_allclose(again.score(x, t_mid), gaussian.score(x, t_mid), rtol=1e-6)


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(0, 2**31))
@settings(max_examples=40)
def test_paths_are_a_semigroup(u, v, seed) -> None:
    a, b = 80.0 * u, 80.0 * u * v
    for gaussian in ALL.values():
        x = np.random.default_rng(seed).normal(size=(3, D)) * 80.0
        twice = gaussian.teleport(gaussian.teleport(x, 80.0, a), a, b)
        np.testing.assert_allclose(twice, gaussian.teleport(x, 80.0, b), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(gaussian.teleport(x, a, a), x, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_all_the_way_is_an_exact_sampler(name, schedule) -> None:
    """Mean and covariance of 20000 samples; every entry within 5 standard errors: false alarm
    below 1e-4 for all of them together."""
    gaussian, n = ALL[name].with_schedule(schedule), 20_000
    first = schedule.ends.t_start
    x_T = gaussian.sample(n, rng=3, t=first)
    last = 0.0 if schedule.domain[0] == 0 else schedule.domain[0]
    x = gaussian.teleport(x_T, first, last)
    alpha, sigma = float(schedule.alpha(last)), float(schedule.sigma(last))
    S = gaussian.vectors @ np.diag(gaussian.eigenvalues - gaussian.residual) @ gaussian.vectors.T
    S = alpha**2 * (S + gaussian.residual * np.eye(D)) + sigma**2 * np.eye(D)
    spread = np.sqrt(np.diag(S)) + 1e-9
    assert (np.abs(x.mean(axis=0) - alpha * MEAN) < 5 * spread / np.sqrt(n)).all()
    error = np.sqrt((np.outer(np.diag(S), np.diag(S)) + S**2) / n) + 1e-12
    assert (np.abs(np.cov(x.T, bias=True) - S) < 5 * error).all()


def test_noise_in_the_null_space_shrinks() -> None:
    """Leaving out the part outside the eigenvectors would leave noise of size 80 there."""
    x_T = 80.0 * RNG.normal(size=(4, D))
    outside = AXES[:, 3:]
    left = (LOW.teleport(x_T, 80.0, 0.8) - MEAN) @ outside
    np.testing.assert_allclose(left, 0.01 * (x_T - MEAN) @ outside, rtol=1e-9)
    at_the_data = (LOW.teleport(x_T, 80.0, 0.0) - MEAN) @ outside
    np.testing.assert_allclose(at_the_data, 0, atol=1e-12)


def test_the_denoised_path_is_the_denoiser_along_the_path() -> None:
    times = [80.0, 9.0, 1.0, 0.1]
    x_T = 80.0 * RNG.normal(size=(4, D))
    for gaussian in ALL.values():
        path = gaussian.trajectory(x_T, 80.0, times)
        np.testing.assert_allclose(path[0], x_T)
        along = gaussian.denoised_trajectory(x_T, 80.0, times)
        for state, clean, t in zip(path, along, times, strict=True):
            np.testing.assert_allclose(clean, gaussian.denoise(state, t), rtol=1e-8, atol=1e-8)
        end = gaussian.denoised_trajectory(x_T, 80.0, [0.0])[0]
        np.testing.assert_allclose(end, gaussian.teleport(x_T, 80.0, 0.0), rtol=1e-8, atol=1e-8)
        xi = WIDTHS[0] / np.sqrt((1 + WIDTHS[0]) * (6400 + WIDTHS[0]))  # the paper's, at sigma 1
        got = (along[2] - MEAN) @ AXES[:, 0]
        np.testing.assert_allclose(got, xi * (x_T - MEAN) @ AXES[:, 0], rtol=1e-9)


def test_wide_directions_are_decided_first_and_perturbations_amplified_by_the_law() -> None:
    np.testing.assert_allclose(LOW.emergence(), np.sqrt(WIDTHS[:3]))
    vp = LOW.with_schedule(LinearBeta())
    np.testing.assert_allclose(LinearBeta().rho(vp.emergence()), np.sqrt(WIDTHS[:3]))
    x = RNG.normal(size=(1, D))
    for t in (5.0, 1.0, 0.1):
        for k in range(3):
            push = 0.3 * AXES[:, k]
            moved = LOW.teleport(x + push, t, 0.0) - LOW.teleport(x, t, 0.0)
            gain = np.sqrt(WIDTHS[k] / (t**2 + WIDTHS[k]))
            np.testing.assert_allclose(moved, gain * push[None], atol=1e-12)


# ------------------------------------------------------------------ fitting


def test_fit_has_the_mean_and_covariance_of_the_data_divided_by_n() -> None:
    for n in (3, 40):  # fewer and more samples than entries
        X = RNG.normal(size=(n, 2, 3)) * np.arange(1, 4)
        rows = X.reshape(n, 6)
        gaussian = GaussianScore.fit(X)
        np.testing.assert_allclose(gaussian.mean, rows.mean(axis=0))
        S = gaussian.vectors @ np.diag(gaussian.eigenvalues) @ gaussian.vectors.T
        np.testing.assert_allclose(S, np.cov(rows.T, bias=True), atol=1e-12)
        assert gaussian.score(X, 1.0).shape == X.shape


def test_a_large_mean_does_not_drown_small_variances() -> None:
    X = RNG.normal(size=(500, 3)) * [2.0, 0.5, 0.1]
    near, far = GaussianScore.fit(X), GaussianScore.fit(X + 1e6)
    np.testing.assert_allclose(far.mean, near.mean + 1e6)
    np.testing.assert_allclose(far.eigenvalues, near.eigenvalues, rtol=1e-8)


def test_what_a_low_rank_drops_can_be_kept_as_its_mean_variance() -> None:
    X = RNG.normal(size=(60, 8)) * np.linspace(3, 0.1, 8)
    total = X.var(axis=0).sum()
    pcas = (PCA(3).fit(X), IncrementalPCA(3, batch_size=30).fit(X))
    fitted = [GaussianScore.fit(X, 3, residual="mean")]
    fitted += [GaussianScore.from_pca(pca, residual="mean") for pca in pcas]
    for gaussian in fitted:
        assert gaussian.eigenvalues.sum() + 5 * gaussian.residual == pytest.approx(total)
    assert GaussianScore.fit(X, 3).residual == 0
    few = GaussianScore.fit(X[:4], 2, residual="mean")  # fewer samples than entries
    assert few.eigenvalues.sum() + 6 * few.residual == pytest.approx(X[:4].var(axis=0).sum())


def test_large_data_of_low_rank_get_the_randomised_decomposition() -> None:
    wide = np.random.default_rng(1).normal(size=(1010, 1010)) * 0.9 ** np.arange(1010)
    exact = np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)[:20] ** 2 / 1010
    np.testing.assert_allclose(GaussianScore.fit(wide, 20).eigenvalues, exact, rtol=1e-3)


def test_another_range_is_another_mean_and_another_variance() -> None:
    X = RNG.uniform(size=(50, 4))
    a, b = GaussianScore.fit(X).rescaled(2, -1), GaussianScore.fit(2 * X - 1)
    x = RNG.normal(size=(3, 4))
    np.testing.assert_allclose(a.score(x, 0.5), b.score(x, 0.5))
    np.testing.assert_allclose(a.eigenvalues, b.eigenvalues)


# ------------------------------------------------------------------ kinds of input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype_and_shape(dtype) -> None:
    x = torch.from_numpy(RNG.normal(size=(3, D, 1))).to(dtype)
    want = x.double().numpy().reshape(3, D)
    for method, t in (("score", 0.7), ("eps", 0.7), ("denoise", [0.5, 1.0, 2.0])):
        got = getattr(SOFT, method)(x, t)
        assert (got.dtype, got.shape) == (dtype, x.shape)
        exact = torch.from_numpy(getattr(SOFT, method)(want, t)).to(dtype)
        torch.testing.assert_close(got.reshape(3, D), exact)
    path = SOFT.trajectory(x, 3.0, [2.0, 0.0])
    assert (path.dtype, path.shape) == (dtype, (2, *x.shape))
    assert SOFT.teleport(want.astype(np.float16), 3.0, 1.0).dtype == np.float16
    assert SOFT.teleport(np.ones((1, D), np.int64), 3.0, 1.0).dtype == np.float64


def test_an_empty_batch_and_one_time_a_sample() -> None:
    for empty in (np.zeros((0, D)), torch.zeros(0, D)):
        assert LOW.score(empty, 1.0).shape == (0, D)
        assert LOW.teleport(empty, 2.0, 1.0).shape == (0, D)
    x = RNG.normal(size=(3, D))
    each = np.concatenate([LOW.score(x[i : i + 1], t) for i, t in enumerate((0.5, 1.0, 2.0))])
    np.testing.assert_allclose(LOW.score(x, [0.5, 1.0, 2.0]), each)


X1 = np.ones((1, D))
WRONG = [
    (lambda: LOW.teleport(X1, 1.0, 2.0), r"times: got \[2.0\], want no more noise than at 1, wh"),
    (lambda: LOW.teleport(X1, 1.0, -0.5), r"times: got \[-0.5, 1.0\], want times in 0"),
    (lambda: LOW.teleport(X1, 0.0, 0.0), "t_start: got 0, without noise, want noise"),
    (lambda: LOW.trajectory(X1, 1.0, 0.5), r"times: got \(\), want \(S,\)"),
    (lambda: LOW.score(X1, 0.0), "t: got sigma = 0, want a time with noise"),
    (lambda: LOW.eps(X1, -1.0), "t: got sigma = -1, want a time with noise"),
    (lambda: LOW.denoise(X1, float("nan")), "t: got sigma = nan, want a time with noise"),
    (lambda: LOW.score(X1, [1.0, 2.0]), r"t: got \(2,\), want one time or \(1,\)"),
    (lambda: LOW.score(np.ones((2, 3)), 1.0), r"x: got \(2, 3\), want \(B, \*dims\) with 5 ent"),
    (lambda: LOW.between(X1, (1.0, 0.0), (1.0, 0.0)), "start: got sigma = 0, want noise"),
    (lambda: GaussianScore([0.0], [1.0], [[1.0, 0.0]]), r"vectors: got \(1, 2\), want \(1, 1\)"),
    (lambda: GaussianScore([0.0], [1.0, 2.0]), r"eigenvalues: got \(2,\), want \(r,\), r <= d"),
    (lambda: GaussianScore([0.0], [-1.0], [[1.0]]), "eigenvalues: got -1, want variances >= 0"),
    (lambda: GaussianScore([0.0], [1.0], [[2.0]]), "vectors: got UᵀU off by 3, want orthonormal"),
    (lambda: GaussianScore([np.nan]), "mean, eigenvalues, vectors: got NaN or infinity"),
    (lambda: GaussianScore([0.0], residual=-1), "residual: got -1, want a variance >= 0"),
    (lambda: GaussianScore.from_covariance([0, 0], np.eye(3)), r"covariance: got \(3, 3\), want"),
    (lambda: GaussianScore.from_covariance([0, 0], [[1, 0.5], [0, 1]]), "an asymmetry of 0.5"),
    (lambda: GaussianScore.from_covariance([0, 0], [[1, 2], [2, 1]]), "eigenvalues: got -1, want"),
    (lambda: GaussianScore.fit([[1.0]]), r"X: got \(1, 1\), want \(n, \*dims\), n >= 2"),
    (lambda: GaussianScore.fit([[1.0], [np.nan]]), "X: got NaN or infinity, want finite values"),
    (lambda: GaussianScore.fit(np.ones((3, 2)), rank=3), r"rank: got 3, want 1 to min\(n, d\) = 2"),
    (lambda: GaussianScore.fit(np.ones((3, 2)), rank=1.0), "rank: got 1.0, want an integer >= 1"),
    (lambda: GaussianScore.fit(np.ones((3, 2)), residual="x"), "residual: got 'x', want one of"),
    (lambda: GaussianScore.from_pca(PCA(1)), "pca: got an unfitted one, want a fitted one"),
    (lambda: LOW.sample(-1), "n: got -1, want a count >= 0"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_bad_input_is_one_line(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_small_negative_eigenvalues_are_rounding_and_clipped() -> None:
    S = np.diag([1.0, -5e-7])
    assert GaussianScore.from_covariance([0.0, 0.0], S).eigenvalues.tolist() == [1.0, 0.0]


def test_the_default_schedule_is_edm_and_a_flow_may_start_at_no_signal() -> None:
    assert isinstance(LOW.schedule, VarianceExploding)
    assert edm_schedule(0.01, 50.0).ends.t_start == 50.0
    flow = FULL.with_schedule(LinearFlow())
    x = RNG.normal(size=(2, D))
    np.testing.assert_allclose(
        flow.teleport(x, 1.0, 0.0), MEAN + (x @ AXES * np.sqrt(WIDTHS)) @ AXES.T, atol=1e-12
    )
