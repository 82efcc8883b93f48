"""The exact score, noise and denoiser of data that are a Gaussian mixture.

Diffusing Σ_k w_k N(m_k, S_k) by x_t = alpha x_0 + sigma eps gives the mixture of
N(alpha m_k, alpha² S_k + sigma² I), so every quantity a network has to learn is known:

    C_k        = alpha² S_k + sigma² I
    gamma_k(x) = P(component k | x), the softmax of log w_k + log N(x; alpha m_k, C_k)
    E[x_0 | x] = Σ_k gamma_k [m_k + alpha S_k C_k⁻¹ (x - alpha m_k)]
    eps(x)     = Σ_k gamma_k sigma C_k⁻¹ (x - alpha m_k) = -sigma ∇log p_t(x)

With S_k = U diag(lambda) Uᵀ taken apart once, the inverses of all times are diagonal in U. These
scores stand in for trained networks wherever a sampler is to be judged by the solver's error alone.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, softmax

from scoredraw.arrays import is_tensor
from scoredraw.diffusion.parameterisations import as_times
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule
from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]


class GaussianMixtureScore:
    """Score, eps and denoiser of a diffused Gaussian mixture, exact in float64.

    weights: (K,) >= 0, summing to 1. means: (K, d). covariances: (K, d, d), symmetric and positive
    semidefinite (eigenvalues down to -1e-6 of the largest are taken for 0). schedule: default
    `LinearBeta()`. Methods take x (B, *dims) with d entries a sample, array or tensor, and one time
    or one per sample (B,); they compute in float64 on x's device and return x's dtype.

    Raises InputError for shapes that disagree, weights that are negative or do not sum to 1, NaN,
    and covariances that are not symmetric or indefinite.
    Time O(K d³) once and O(B K d²) a call; memory O(K d² + B K d).

    >>> data = GaussianMixtureScore([0.5, 0.5], [[-3.0], [3.0]], [[[0.1]], [[0.1]]])
    >>> data.denoise(np.array([[-1.0], [1.0]]), 0.1).round(3).tolist()
    [[-2.099], [2.099]]
    """

    def __init__(
        self,
        weights: ArrayLike,
        means: ArrayLike,
        covariances: ArrayLike,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        w, m = np.asarray(weights, np.float64), np.asarray(means, np.float64)
        S = np.asarray(covariances, np.float64)
        require(w.ndim == 1 and w.size >= 1, "weights", w.shape, "(K,), K >= 1")
        positive = bool((w >= 0).all()) and abs(float(w.sum()) - 1) < 1e-6
        require(positive, "weights", f"sum {w.sum():g}, least {w.min():g}", ">= 0, summing to 1")
        require(m.ndim == 2 and len(m) == len(w), "means", m.shape, f"({len(w)}, d)")
        K, d = m.shape
        require(S.shape == (K, d, d), "covariances", S.shape, f"({K}, {d}, {d})")
        finite = bool(np.isfinite(m).all() and np.isfinite(S).all())
        require(finite, "means, covariances", "NaN or infinity", "finite values")
        scale = np.abs(S).max(initial=0.0)
        symmetric = bool(np.abs(S - S.swapaxes(1, 2)).max(initial=0.0) <= 1e-8 * scale)
        require(symmetric, "covariances", "an asymmetric matrix", "symmetric matrices")
        eigenvalues, vectors = np.linalg.eigh((S + S.swapaxes(1, 2)) / 2)
        definite = bool((eigenvalues.min(axis=1) >= -1e-6 * eigenvalues.max(axis=1)).all())
        came = f"an eigenvalue {eigenvalues.min():g}"
        require(definite, "covariances", came, "positive semidefinite matrices")
        self.schedule = schedule if schedule is not None else LinearBeta()
        self.weights, self.means = w / w.sum(), m
        self.eigenvalues, self.vectors = np.maximum(eigenvalues, 0.0), vectors
        self._tables: dict[Any, tuple[Any, ...]] = {}

    @classmethod
    def from_sklearn(
        cls, mixture: Any, schedule: NoiseSchedule | None = None
    ) -> GaussianMixtureScore:
        """From a fitted `sklearn.mixture.GaussianMixture` of any covariance type.

        >>> from sklearn.mixture import GaussianMixture
        >>> X = np.random.default_rng(0).normal(size=(50, 2))
        >>> gm = GaussianMixture(2, covariance_type="tied", random_state=0).fit(X)
        >>> GaussianMixtureScore.from_sklearn(gm).eigenvalues.shape
        (2, 2)
        """
        require(hasattr(mixture, "covariances_"), "mixture", "an unfitted one", "a fitted one")
        K, d = mixture.means_.shape
        found, kind = np.asarray(mixture.covariances_), mixture.covariance_type
        if kind == "diag":
            found = found[:, :, None] * np.eye(d)
        elif kind == "spherical":
            found = found[:, None, None] * np.eye(d)
        elif kind not in ("full", "tied"):
            wanted = "full, tied, diag or spherical"
            raise InputError(f"mixture.covariance_type: got {kind!r}, want {wanted}")
        covariances = np.broadcast_to(found, (K, d, d))
        return cls(mixture.weights_, mixture.means_, covariances, schedule)

    @property
    def dimension(self) -> int:
        """d, the number of entries of a sample."""
        return int(self.means.shape[1])

    def eps(self, x: Any, t: Any) -> Any:
        """The noise in x at time t: E[eps | x_t = x], the answer of a perfect eps-network."""
        _, sigma, y, precision, gamma = self._posterior(x, t)
        return self._mix(gamma[..., None] * (sigma * precision * y), x)

    def score(self, x: Any, t: Any) -> Any:
        """∇log p_t(x) = -eps/sigma."""
        _, _, y, precision, gamma = self._posterior(x, t)
        return self._mix(-gamma[..., None] * (precision * y), x)

    def denoise(self, x: Any, t: Any) -> Any:
        """E[x_0 | x_t = x], the answer of a perfect denoiser."""
        alpha, _, y, precision, gamma = self._posterior(x, t)
        _, means, eigenvalues, _, _, _ = self._table(x)
        return self._mix(gamma[..., None] * (alpha * eigenvalues * precision * y), x, gamma @ means)

    def responsibilities(self, x: Any, t: Any) -> Any:
        """P(component k | x_t = x), (B, K)."""
        return self._posterior(x, t)[-1]

    def log_density(self, x: Any, t: Any) -> Any:
        """log p_t(x), (B,), in float64."""
        _, _, y, precision, _ = self._posterior(x, t)
        logits = self._logits(y, precision, x)
        total = logits.logsumexp(-1) if is_tensor(x) else logsumexp(logits, axis=-1)
        return total - 0.5 * self.dimension * float(np.log(2 * np.pi))

    def sample(
        self, n: int, rng: int | np.random.Generator | None = None, t: float | None = None
    ) -> Float:
        """n samples of the data, or of the diffused data at time t: float64 (n, d).

        >>> GaussianMixtureScore([1.0], [[2.0]], [[[0.0]]]).sample(2, rng=0).tolist()
        [[2.0], [2.0]]
        """
        require(n >= 0, "n", n, "a count >= 0")
        draw = generator(rng)
        cumulative = np.cumsum(self.weights)
        component = np.searchsorted(cumulative[:-1], draw.random(n), side="right")
        z = draw.standard_normal((n, self.dimension)) * np.sqrt(self.eigenvalues[component])
        x = np.empty((n, self.dimension))
        for k in range(len(self.weights)):
            of_k = component == k
            x[of_k] = self.means[k] + z[of_k] @ self.vectors[k].T
        if t is None:
            return x
        return np.asarray(self.schedule.perturb(x, t, draw.standard_normal(x.shape)))

    # -------------------------------------------------------------- in the eigenvectors' axes

    def _table(self, x: Any) -> tuple[Any, ...]:
        """log w, m, lambda, U side by side (d, K d), its transpose, Uᵀm: where x lies."""
        device = x.device if is_tensor(x) else None
        if device not in self._tables:
            with np.errstate(divide="ignore"):
                log_weights = np.log(self.weights)
            stacked = np.moveaxis(self.vectors, 0, 1).reshape(self.dimension, -1)
            own = np.einsum("kde,kd->ke", self.vectors, self.means)
            table: tuple[Any, ...] = (
                log_weights, self.means, self.eigenvalues, stacked, stacked.T.copy(), own
            )  # fmt: skip
            if device is not None:
                torch = sys.modules["torch"]
                table = tuple(torch.as_tensor(part, device=device) for part in table)
            self._tables[device] = table
        return self._tables[device]

    def _posterior(self, x: Any, t: Any) -> tuple[Any, Any, Any, Any, Any]:
        """alpha, sigma; y = Uᵀ(x - alpha m), 1/(alpha² lambda + sigma²) (B, K, d); gamma (B, K)."""
        d = self.dimension
        size = int(np.prod(x.shape[1:])) if x.ndim else 0
        require(x.ndim >= 2 and size == d, "x", tuple(x.shape), f"(B, *dims) with {d} entries each")
        _, _, eigenvalues, stacked, _, own = self._table(x)
        times = as_times(t)
        signal, noise = self.schedule.alpha(times), self.schedule.sigma(times)
        least = np.square(signal) * self.eigenvalues.min() + np.square(noise)
        came = "a time at which a component has no spread"
        require(bool((least > 0).all()), "t", came, "sigma > 0 or covariances of full rank")
        alpha, sigma = self._scale(signal, x), self._scale(noise, x)
        flat = x.reshape(len(x), d)
        flat = flat.double() if is_tensor(x) else flat.astype(np.float64)
        y = (flat @ stacked).reshape(len(x), len(self.weights), d) - alpha * own
        precision = 1 / (alpha * alpha * eigenvalues + sigma * sigma)
        logits = self._logits(y, precision, x)
        gamma = logits.softmax(-1) if is_tensor(x) else softmax(logits, axis=-1)
        return alpha, sigma, y, precision, gamma

    def _logits(self, y: Any, precision: Any, x: Any) -> Any:
        """log w_k N(x; alpha m_k, ...), (B, K), up to the constant d/2 log 2π."""
        log_weights = self._table(x)[0]
        log = precision.log() if is_tensor(x) else np.log(precision)
        return log_weights + 0.5 * (log.sum(-1) - (precision * y * y).sum(-1))

    def _scale(self, values: Float, x: Any) -> Any:
        """One value as a float; one a sample as (B, 1, 1) in float64 where x lies."""
        if values.ndim == 0:
            return float(values)
        require(values.shape == (len(x),), "t", values.shape, f"one time or ({len(x)},)")
        column = values[:, None, None]
        return sys.modules["torch"].as_tensor(column, device=x.device) if is_tensor(x) else column

    def _mix(self, parts: Any, x: Any, offset: Any = 0.0) -> Any:
        """offset + Σ_k U_k parts_k, in the shape and dtype of x."""
        back = self._table(x)[4]
        total = (offset + parts.reshape(len(x), len(back)) @ back).reshape(x.shape)
        if is_tensor(x):
            return total.to(x.dtype)
        return total.astype(x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64)
