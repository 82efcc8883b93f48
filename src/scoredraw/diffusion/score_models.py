"""Scores that data imply without training: isotropic, of the training set, of low-rank mixtures.

Beside `GaussianScore` and the full mixtures of `GaussianMixtureScore` these are what a trained
network's score is compared with, noise level by noise level:

    isotropic    N(m, s² I): knows the mean, and at most one variance
    empirical    the training set itself, Σ_i δ(x_i)/n: its denoiser is the mean of the rows under
                 the softmax of -|x - alpha x_i|²/(2 sigma²), and it can only repeat them
    mixture      Σ_k w_k N(m_k, U_k diag(lambda_k) U_kᵀ + tau_k (I - U_k U_kᵀ)), fitted by k-means

At low noise, sigma² below the variance that was dropped, a mixture of low rank with tau = 0 is far
worse than one Gaussian of full rank: it takes every detail that is not in U_k for noise.

Wang and Vastola, "The unreasonable effectiveness of Gaussian score approximation for diffusion
models and its applications", TMLR 2024, arXiv 2412.09726.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from scoredraw.arrays import is_tensor
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import (
    RESIDUALS,
    AnalyticScore,
    GaussianScore,
    as_rows,
    edm_schedule,
)
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]

BLOCK = 2**24  # most logits held at once
ALL_AT_ONCE = 10_000  # most rows that k-means takes without mini-batches


def isotropic_score(
    X: Any, std: float | str = 0.0, schedule: NoiseSchedule | None = None
) -> GaussianScore:
    """The Gaussian N(m, s² I) with the mean of X (n, *dims).

    Its score is (m - x)/(sigma² + s²) where alpha = 1. std: s, or "data", the root mean variance of
    the entries. With s = 0 its path is m + (sigma/sigma_T)(x_T - m), the simplest teleportation.
    Raises InputError for no rows, NaN, a negative std. Wang and Vastola 2024, arXiv 2412.09726.

    >>> isotropic_score([[0.0, 1.0], [2.0, 1.0]]).score(np.array([[3.0, 1.0]]), 2.0).tolist()
    [[-0.5, 0.0]]
    """
    rows = as_rows(X)
    if isinstance(std, str):
        require(std == "data", "std", repr(std), "a number >= 0, or 'data'")
        variance = float(rows.var(axis=0).mean())
    else:
        require(0 <= std < np.inf, "std", std, "a number >= 0, or 'data'")
        variance = float(std) ** 2
    return GaussianScore(rows.mean(axis=0), schedule=schedule, residual=variance)


class EmpiricalScore(AnalyticScore):
    """The exact score of the rows themselves: a perfect fit to the training set, and nothing else.

        E[x_0 | x] = Σ_i p_i x_i,    p = softmax_i(-|x - alpha x_i|² / (2 sigma²))

    X: (n, *dims). Called "delta" in the paper. schedule: default `edm_schedule()`. Raises
    InputError for no rows and NaN, and what `AnalyticScore` does. Time O(B n d) a call; memory
    O(n d), and at most 2²⁴ numbers of the B n at once.

    >>> pair = EmpiricalScore([[-1.0], [1.0]])
    >>> pair.denoise(np.array([[0.0], [0.5]]), 0.5).round(3).tolist()
    [[0.0], [0.964]]
    """

    def __init__(self, X: Any, schedule: NoiseSchedule | None = None) -> None:
        self.rows = as_rows(X)
        self.norms = np.square(self.rows).sum(axis=1)
        self.dimension = self.rows.shape[1]
        self.schedule = schedule if schedule is not None else edm_schedule()

    def _constants(self) -> tuple[Float, ...]:
        return self.rows, self.norms

    def _clean(self, flat: Any, alpha: Any, sigma: Any) -> Any:
        rows, norms = self._arrays(flat)
        result = flat * 0.0
        step = max(1, BLOCK // len(rows))
        for first in range(0, len(flat), step):
            part = slice(first, first + step)
            a, s = (v if isinstance(v, float) else v[part] for v in (alpha, sigma))
            logits = a * (flat[part] @ rows.T - 0.5 * a * norms) / s**2
            result[part] = _softmax(logits) @ rows
        return result


class LowRankMixtureScore(AnalyticScore):
    """Score, eps and denoiser of a mixture whose components spread in few directions each.

    weights: (K,) >= 0, summing to 1. means: (K, d). eigenvalues: (K, r) >= 0. vectors: (K, d, r),
    orthonormal columns. residual: tau_k >= 0, the variance in all other directions, one or (K,).
    Components of full covariance are `GaussianMixtureScore`'s. schedule: default `edm_schedule()`.
    The densities come from r numbers a component and |x - alpha m_k|², in log space:

        log N_k = -½ Σ_j (log v_kj + y_kj²/v_kj)
                  - ½ ((d - r) log v_k + (|x - alpha m_k|² - |y_k|²)/v_k)

    with y_k = U_kᵀ(x - alpha m_k), v_kj = alpha² lambda_kj + sigma² and v_k with tau_k.

    Raises InputError for shapes that disagree, NaN, weights or variances that are none, vectors
    that are not orthonormal. Time O(B K d r), memory O(K d r + B K r). Arithmetic of Wang and
    Vastola 2024, arXiv 2412.09726.

    >>> line = LowRankMixtureScore([1.0], [[0.0, 0.0]], [[4.0]], [[[1.0], [0.0]]])
    >>> line.denoise(np.array([[2.0, 2.0]]), 2.0).tolist()
    [[1.0, 0.0]]
    """

    def __init__(
        self,
        weights: ArrayLike,
        means: ArrayLike,
        eigenvalues: ArrayLike,
        vectors: ArrayLike,
        schedule: NoiseSchedule | None = None,
        *,
        residual: ArrayLike = 0.0,
    ) -> None:
        w, m = np.asarray(weights, np.float64), np.asarray(means, np.float64)
        spread, U = np.asarray(eigenvalues, np.float64), np.asarray(vectors, np.float64)
        require(w.ndim == 1 and w.size >= 1, "weights", w.shape, "(K,), K >= 1")
        positive = bool((w >= 0).all()) and abs(float(w.sum()) - 1) < 1e-6
        require(positive, "weights", f"sum {w.sum():g}, least {w.min():g}", ">= 0, summing to 1")
        require(m.ndim == 2 and len(m) == len(w), "means", m.shape, f"({len(w)}, d)")
        good = spread.ndim == 2 and len(spread) == len(w)
        require(good, "eigenvalues", spread.shape, f"({len(w)}, r)")
        shape = (*m.shape, spread.shape[1])
        require(U.shape == shape, "vectors", U.shape, f"{shape}, of means and eigenvalues")
        finite = all(bool(np.isfinite(part).all()) for part in (m, spread, U))
        require(finite, "means, eigenvalues, vectors", "NaN or infinity", "finite values")
        least = spread.min(initial=0.0)
        require(bool(least >= 0), "eigenvalues", f"{least:g}", "variances >= 0")
        off = np.abs(U.swapaxes(1, 2) @ U - np.eye(spread.shape[1])).max(initial=0.0)
        require(bool(off < 1e-6), "vectors", f"UᵀU off by {off:.1g}", "orthonormal columns")
        tau = np.broadcast_to(np.asarray(residual, np.float64), w.shape).copy()
        require(
            bool((tau >= 0).all() and np.isfinite(tau).all()), "residual", tau, "variances >= 0"
        )
        self.weights, self.means, self.residual = w / w.sum(), m, tau
        self.eigenvalues, self.vectors = spread, U
        self.dimension = m.shape[1]
        self.schedule = schedule if schedule is not None else edm_schedule()

    def _constants(self) -> tuple[Float, ...]:
        stacked = np.moveaxis(self.vectors, 0, 1).reshape(self.dimension, -1)
        own = np.einsum("kdr,kd->kr", self.vectors, self.means)
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights)
        norms = np.square(self.means).sum(axis=1)
        return log_weights, self.means, norms, self.eigenvalues, stacked, own, self.residual

    def _arrays(self, x: Any) -> tuple[Any, ...]:
        if is_tensor(x):
            return super()._arrays(x)
        if "_own" not in self.__dict__:
            self._own = self._constants()
        return self._own

    def _clean(self, flat: Any, alpha: Any, sigma: Any) -> Any:
        log_weights, means, norms, eigenvalues, stacked, own, tau = self._arrays(flat)
        count, rank = eigenvalues.shape
        a, s = (v if isinstance(v, float) else v[..., None] for v in (alpha, sigma))
        y = (flat @ stacked).reshape(len(flat), count, rank) - a * own
        power = a**2 * eigenvalues + s**2
        rest = alpha**2 * tau + sigma**2
        far = (flat**2).sum(-1)[:, None] - 2 * alpha * (flat @ means.T) + alpha**2 * norms
        outside = (far - (y**2).sum(-1)).clip(0.0)
        inside = (_log(power) + y**2 / power).sum(-1)
        density = inside + (self.dimension - rank) * _log(rest) + outside / rest
        gamma = _softmax(log_weights - 0.5 * density)
        shrink = alpha * tau / rest
        along = (a * eigenvalues / power - shrink[..., None]) * y
        moved = (gamma[..., None] * along).reshape(len(flat), count * rank) @ stacked.T
        held = gamma * shrink
        return (gamma - alpha * held) @ means + held.sum(-1)[:, None] * flat + moved


def fit_mixture(
    X: Any,
    n_components: int,
    rank: int | None = None,
    schedule: NoiseSchedule | None = None,
    *,
    residual: str = "zero",
    rng: int | np.random.Generator | None = 0,
) -> GaussianMixtureScore | LowRankMixtureScore:
    """A mixture from k-means: clusters, their frequencies, means and covariances, without EM.

    X: (n, *dims). rank: None keeps whole covariances (`GaussianMixtureScore`); otherwise the
    widest directions of each cluster, and for the others the variance that `residual` says: "zero",
    the paper's, good only while sigma is above what was dropped, or "mean", the mean of it.
    Clusters of one row have no spread. Clusters come from scikit-learn's KMeans, in mini-batches
    above 10,000 rows; for a mixture fitted by EM see `GaussianMixtureScore.from_sklearn`. schedule:
    `edm_schedule()`.

    Raises InputError for n < n_components, ranks outside 1 .. d, NaN. Time of k-means and
    O(n d min(n/K, d)); memory K d² at full rank, K d rank else. Wang and Vastola 2024,
    arXiv 2412.09726.

    >>> X = [[-1.0, 0.0], [-3.0, 0.0], [1.0, 5.0], [3.0, 5.0]]
    >>> fit_mixture(X, 2, rank=1).eigenvalues.round(12).tolist()
    [[1.0], [1.0]]
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    rows = as_rows(X)
    n, d = rows.shape
    count = whole(n_components, "n_components", 1)
    require(count <= n, "n_components", count, f"at most n = {n}")
    kept = d if rank is None else whole(rank, "rank", 1)
    require(kept <= d, "rank", rank, f"None, or 1 to d = {d}")
    require(residual in RESIDUALS, "residual", repr(residual), f"one of {', '.join(RESIDUALS)}")
    seed = int(generator(rng).integers(2**31))
    method = KMeans if n <= ALL_AT_ONCE else MiniBatchKMeans
    found = method(count, random_state=seed, n_init=3).fit_predict(rows)
    labels, sizes = np.unique(found, return_counts=True)
    weights = sizes / n
    clusters = [rows[found == label] for label in labels]
    means = np.stack([cluster.mean(axis=0) for cluster in clusters])
    schedule = schedule if schedule is not None else edm_schedule()
    if rank is None:
        covariances = np.stack([np.cov(c.T, bias=True).reshape(d, d) for c in clusters])
        return GaussianMixtureScore(weights, means, covariances, schedule)
    widths, axes, rest = (np.stack(part) for part in zip(*map(_axes(kept), clusters), strict=True))
    tau = rest if residual == "mean" else 0.0
    return LowRankMixtureScore(weights, means, widths, axes, schedule, residual=tau)


def _axes(rank: int) -> Any:
    """Of a cluster: the largest variances, their directions (d, rank), the mean of the others."""

    def of(cluster: Float) -> tuple[Float, Float, Float]:
        centred = cluster - cluster.mean(axis=0)
        n, d = centred.shape
        # Zero rows make up the directions in which few samples have no spread.
        padded = np.concatenate([centred, np.zeros((max(0, rank - n), d))])
        _, values, axes = np.linalg.svd(padded / math.sqrt(n), full_matrices=False)
        widths = np.square(values)
        dropped = widths[rank:].sum() / max(1, d - rank)
        return widths[:rank], axes[:rank].T, np.asarray(dropped)

    return of


def _softmax(logits: Any) -> Any:
    return logits.softmax(-1) if is_tensor(logits) else softmax(logits, axis=-1)


def _log(values: Any) -> Any:
    if is_tensor(values):
        return values.log()
    return np.log(values)
