"""The score of data seen as one Gaussian, and where its noise-to-data path leads, in closed form.

At high noise a diffusion network says little more than the mean m and the covariance S of its data.
For data N(m, S) diffused by x_t = alpha x_0 + sigma eps everything is known. With the eigenvectors
U (d, r), their variances lambda, and one variance tau in all other directions,

    v_k(t)     = alpha² lambda_k + sigma²                    variance along u_k; v(t) with tau
    E[x_0 | x] = m + Σ_k (alpha lambda_k / v_k) u_k u_kᵀ (x - alpha m) + the same with tau, others
    score(x)   = (alpha E[x_0 | x] - x) / sigma²
    x_t        = alpha_t m + Σ_k sqrt(v_k(t)/v_k(T)) u_k u_kᵀ (x_T - alpha_T m) + as above, others

The last is the exact solution of the probability-flow ODE: no network call and no step is needed
to follow it over any distance. Noise outside the span of U has to shrink too, by sqrt(v(t)/v(T)).

Wang and Vastola, "The unreasonable effectiveness of Gaussian score approximation for diffusion
models and its applications", TMLR 2024, arXiv 2412.09726.
"""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.parameterisations import as_times
from scoredraw.diffusion.schedules import EndPoints, NoiseSchedule, VarianceExploding
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Level = tuple[Any, Any]  # alpha, sigma

RESIDUALS = ("zero", "mean")


def edm_schedule(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """Time is sigma, from 80 to 0.002, and the last step ends without noise (Karras et al. 2022).

    >>> edm_schedule().ends.last
    'clean'
    """
    ends = EndPoints(sigma_max, sigma_min, last="clean")
    return VarianceExploding(sigma_min, sigma_max, ends=ends)


class AnalyticScore(ABC):
    """Score, eps and denoiser of diffused data whose E[x_0 | x_t] is known; a subclass gives it.

    Methods take x (B, *dims) with `dimension` entries a sample, array or tensor, and one time or
    one per sample (B,); they compute in float64 on x's device and return x's shape and dtype.
    Raise InputError for another number of entries, and for a time without noise (sigma <= 0).
    """

    schedule: NoiseSchedule
    dimension: int

    @abstractmethod
    def _constants(self) -> tuple[Float, ...]:
        """The arrays that `_clean` computes with."""

    @abstractmethod
    def _clean(self, flat: Any, alpha: Any, sigma: Any) -> Any:
        """E[x_0 | x_t] of float64 rows (B, d); alpha and sigma are floats or (B, 1)."""

    def denoise(self, x: Any, t: Any) -> Any:
        """E[x_0 | x_t = x], the answer of a perfect denoiser of these data."""
        flat, alpha, sigma = self._read(x, t)
        return written(self._clean(flat, alpha, sigma), x)

    def eps(self, x: Any, t: Any) -> Any:
        """E[eps | x_t = x] = (x - alpha E[x_0 | x]) / sigma."""
        flat, alpha, sigma = self._read(x, t)
        return written((flat - alpha * self._clean(flat, alpha, sigma)) / sigma, x)

    def score(self, x: Any, t: Any) -> Any:
        """∇log p_t(x) = (alpha E[x_0 | x] - x) / sigma²."""
        flat, alpha, sigma = self._read(x, t)
        return written((alpha * self._clean(flat, alpha, sigma) - flat) / sigma**2, x)

    def with_schedule(self, schedule: NoiseSchedule) -> Self:
        """The same data under another schedule."""
        other = copy.copy(self)
        other.schedule = schedule
        return other

    def _read(self, x: Any, t: Any) -> tuple[Any, Any, Any]:
        flat = self._flat(x)
        times = as_times(t)
        wanted = f"one time or ({len(flat)},)"
        require(times.ndim == 0 or times.shape == (len(flat),), "t", times.shape, wanted)
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        noisy = bool((sigma > 0).all())
        came = f"sigma = {sigma.min():g}" if sigma.size else "no time"
        require(noisy, "t", came, "a time with noise (sigma > 0)")
        return flat, column(alpha, x), column(sigma, x)

    def _flat(self, x: Any) -> Any:
        """x as float64 rows (B, d)."""
        size = math.prod(x.shape[1:]) if x.ndim >= 2 else -1
        wanted = f"(B, *dims) with {self.dimension} entries each"
        require(size == self.dimension, "x", tuple(x.shape), wanted)
        flat = x.reshape(len(x), self.dimension)
        return flat.double() if is_tensor(x) else flat.astype(np.float64)

    def _arrays(self, x: Any) -> tuple[Any, ...]:
        """`_constants` where x lies; brought there once."""
        if not is_tensor(x):
            return self._constants()
        held: dict[Any, tuple[Any, ...]] = self.__dict__.setdefault("_held", {})
        if x.device not in held:
            torch = sys.modules["torch"]
            held[x.device] = tuple(torch.as_tensor(a, device=x.device) for a in self._constants())
        return held[x.device]


class GaussianScore(AnalyticScore):
    """Score and exact noise-to-data paths of the data N(m, U diag(lambda) Uᵀ + tau (I - U Uᵀ)).

    mean: (d,). eigenvalues: (r,) variances >= 0 (down to -1e-6 of the largest are taken for 0), r
    from 0 to d. vectors: (d, r), orthonormal columns. residual: tau >= 0; 0 is the paper's: data
    without any spread outside U. r = 0 is an isotropic Gaussian. schedule: default
    `edm_schedule()`, in which a time is sigma. Data in the range and the space of the network:
    pixels in [-1, 1] where it was trained on these (`rescaled`), latents after their scaling.

    Raises InputError for shapes that disagree, NaN, vectors that are not orthonormal, negative
    variances. Time O(B d r) a call; memory O(d r + B d). Wang and Vastola 2024, arXiv 2412.09726.

    >>> data = GaussianScore([1.0, 0.0], [4.0], [[1.0], [0.0]])
    >>> x_T = np.array([[81.0, 80.0]])
    >>> data.teleport(x_T, 80.0, 20.0).round(3).tolist()  # 20.1/80.02 of the way along x
    [[21.093, 20.0]]
    >>> data.denoise(np.array([[3.0, 2.0]]), 2.0).tolist()
    [[2.0, 0.0]]
    """

    def __init__(
        self,
        mean: ArrayLike,
        eigenvalues: ArrayLike = (),
        vectors: ArrayLike | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        residual: float = 0.0,
    ) -> None:
        m = np.asarray(on_host(mean), np.float64).reshape(-1)
        found = np.asarray(on_host(eigenvalues), np.float64)
        require(
            found.ndim == 1 and found.size <= m.size, "eigenvalues", found.shape, "(r,), r <= d"
        )
        U = np.zeros((m.size, 0)) if vectors is None else np.asarray(on_host(vectors), np.float64)
        wanted = f"({m.size}, {found.size}), of mean and eigenvalues"
        require(m.size > 0 and U.shape == (m.size, found.size), "vectors", U.shape, wanted)
        finite = all(bool(np.isfinite(part).all()) for part in (m, found, U))
        require(finite, "mean, eigenvalues, vectors", "NaN or infinity", "finite values")
        largest = found.max(initial=0.0)
        came = f"{found.min(initial=0.0):g}"
        require(bool((found >= -1e-6 * largest).all()), "eigenvalues", came, "variances >= 0")
        off = np.abs(U.T @ U - np.eye(found.size)).max(initial=0.0)
        require(bool(off < 1e-6), "vectors", f"UᵀU off by {off:.1g}", "orthonormal columns")
        require(0 <= residual < np.inf, "residual", residual, "a variance >= 0")
        order = np.argsort(-found, kind="stable")
        self.mean, self.residual, self.dimension = m, float(residual), m.size
        self.eigenvalues, self.vectors = np.maximum(found[order], 0.0), U[:, order]
        self.schedule = schedule if schedule is not None else edm_schedule()

    @classmethod
    def from_covariance(
        cls, mean: ArrayLike, covariance: ArrayLike, schedule: NoiseSchedule | None = None
    ) -> Self:
        """From a mean (d,) and a covariance (d, d), symmetric and positive semidefinite. O(d³).

        >>> one = GaussianScore.from_covariance([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]])
        >>> one.eigenvalues.round(12).tolist()
        [3.0, 1.0]
        """
        m = np.asarray(on_host(mean), np.float64).reshape(-1)
        S = np.asarray(on_host(covariance), np.float64)
        require(S.shape == (m.size, m.size), "covariance", S.shape, f"({m.size}, {m.size})")
        require(bool(np.isfinite(S).all()), "covariance", "NaN or infinity", "finite values")
        skew = np.abs(S - S.T).max(initial=0.0)
        even = bool(skew <= 1e-8 * np.abs(S).max(initial=0.0))
        require(even, "covariance", f"an asymmetry of {skew:.1g}", "a symmetric matrix")
        return cls(m, *np.linalg.eigh((S + S.T) / 2), schedule)

    @classmethod
    def fit(
        cls,
        X: Any,
        rank: int | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        residual: str = "zero",
        rng: int | np.random.Generator | None = 0,
    ) -> Self:
        """From data X (n, *dims), n >= 2: mean, and covariance divided by n.

        rank: how many directions are kept, the widest; None keeps all min(n, d). residual: the
        variance of the others, "zero" (the paper's) or "mean", the mean of what was dropped
        (probabilistic PCA), which stays sound at low noise. rng: of the randomised
        decomposition, which large data of low rank get. Raises InputError for n < 2 and NaN.
        Time O(n d min(n, d)), or O(n d rank) randomised. For data that do not fit into memory see
        `from_pca`.

        >>> GaussianScore.fit([[0.0, 1.0], [2.0, 1.0]]).eigenvalues.round(12).tolist()
        [1.0, 0.0]
        """
        from sklearn.decomposition import PCA

        require(residual in RESIDUALS, "residual", repr(residual), f"one of {', '.join(RESIDUALS)}")
        rows = as_rows(X, 2)
        n, d = rows.shape
        most = min(n, d)
        kept = most if rank is None else whole(rank, "rank", 1)
        require(kept <= most, "rank", rank, f"1 to min(n, d) = {most}")
        solver = "covariance_eigh" if d <= min(n, 4096) else "full"
        if most > 1000 and kept < most / 4:
            solver = "randomized"
        seed = int(generator(rng).integers(2**31))
        mean = rows.mean(axis=0)  # taken off first: its square would drown small variances
        with np.errstate(invalid="ignore"):  # data without variance: shares of it, not used here
            pca = PCA(kept, svd_solver=solver, random_state=seed).fit(rows - mean)
        pca.mean_ += mean
        return cls.from_pca(pca, schedule, residual=residual)

    @classmethod
    def from_pca(
        cls, pca: Any, schedule: NoiseSchedule | None = None, *, residual: str = "zero"
    ) -> Self:
        """From a fitted scikit-learn `PCA` or `IncrementalPCA`, which takes data in batches.

        >>> from sklearn.decomposition import IncrementalPCA
        >>> pca = IncrementalPCA(1).fit([[0.0, 1.0], [2.0, 1.0]])
        >>> GaussianScore.from_pca(pca).eigenvalues.round(12).tolist()
        [1.0]
        """
        require(residual in RESIDUALS, "residual", repr(residual), f"one of {', '.join(RESIDUALS)}")
        require(hasattr(pca, "components_"), "pca", "an unfitted one", "a fitted one")
        n = int(getattr(pca, "n_samples_seen_", getattr(pca, "n_samples_", 0)))
        require(n >= 2, "pca", f"one of {n} samples", "n >= 2")
        rank, d = pca.components_.shape
        share = (n - 1) / n  # scikit-learn divides by n - 1
        rest = 0.0
        if residual == "mean" and rank < d:
            if hasattr(pca, "var_"):  # IncrementalPCA, which knows the variance of every entry
                dropped = float(np.sum(pca.var_) - share * np.sum(pca.explained_variance_))
            else:
                dropped = share * float(pca.noise_variance_) * (min(n, d) - rank)
            rest = max(0.0, dropped) / (d - rank)
        variances = share * pca.explained_variance_
        return cls(pca.mean_, variances, pca.components_.T, schedule, residual=rest)

    def rescaled(self, scale: float, shift: float = 0.0) -> Self:
        """The Gaussian of scale · x + shift: `rescaled(2, -1)` takes [0, 1] to [-1, 1].

        >>> unit = GaussianScore([0.5], [0.25], [[1.0]])
        >>> unit.rescaled(2, -1).mean.item(), unit.rescaled(2, -1).eigenvalues.item()
        (0.0, 1.0)
        """
        power = float(scale) ** 2
        mean, variances = scale * self.mean + shift, power * self.eigenvalues
        rest = power * self.residual
        return type(self)(mean, variances, self.vectors, self.schedule, residual=rest)

    @property
    def widest(self) -> float:
        """sqrt of the largest variance: what is decided first, at sigma/alpha about this size."""
        return math.sqrt(self._variances().max())

    def emergence(self) -> Float:
        """The time at which every direction's place is decided, (r,): sigma/alpha = sqrt(lambda).

        What perturbs the path along u_k at noise rho arrives at the data multiplied by
        sqrt(lambda_k / (rho² + lambda_k)): hardly before that time, wholly after it.
        """
        return self.schedule.time_of_rho(np.sqrt(self.eigenvalues))

    def sample(
        self, n: int, rng: int | np.random.Generator | None = None, t: float | None = None
    ) -> Float:
        """n samples of the data, or of the diffused data at time t: float64 (n, d)."""
        require(n >= 0, "n", n, "a count >= 0")
        draw = generator(rng)
        z = draw.standard_normal((n, self.dimension))
        own = z @ self.vectors
        base = math.sqrt(self.residual)
        x = self.mean + base * z + own * (np.sqrt(self.eigenvalues) - base) @ self.vectors.T
        return (
            x if t is None else np.asarray(self.schedule.perturb(x, t, draw.normal(size=x.shape)))
        )

    # -------------------------------------------------------------- paths

    def teleport(self, x: Any, t_from: float, t_to: float) -> Any:
        """Where the exact path of x (B, *dims) at t_from stands at t_to, in x's dtype.

        Raises InputError where t_to has more noise than t_from, t_from has none, or either lies
        outside the schedule's domain. t_to may be the data.
        """
        return written(self._path(x, t_from, [t_to])[0], x)

    def trajectory(self, x_T: Any, t_start: float, times: Any) -> Any:
        """`teleport` to each of `times` (S,): (S, B, *dims)."""
        states = self._path(x_T, t_start, times)
        return written(states, x_T, (len(states), *x_T.shape))

    def denoised_trajectory(self, x_T: Any, t_start: float, times: Any) -> Any:
        """The denoiser's answer along the path, (S, B, *dims), at the data too:

        m + Σ_k alpha_t lambda_k / sqrt(v_k(t) v_k(T)) u_k u_kᵀ (x_T - alpha_T m).
        """
        start, levels = self._levels(t_start, times)
        spread = self._variances()
        late = np.sqrt(np.square(levels[0]) * spread + np.square(levels[1]))
        early = np.sqrt(np.square(start[0]) * spread + np.square(start[1]))
        gain = np.divide(levels[0] * spread, late * early, out=np.zeros_like(late), where=late > 0)
        states = self._carried(x_T, start[0], np.ones_like(levels[0]), gain)
        return written(states, x_T, (len(states), *x_T.shape))

    def between(self, x: Any, start: Level, stop: Level) -> Any:
        """`teleport` from one (alpha, sigma) to another, whatever the schedule. x: (B, *dims)."""
        require(start[1] > 0, "start", f"sigma = {start[1]:g}", "noise (sigma > 0)")
        spread = self._variances()
        first, last = (np.square(a) * spread + np.square(s) for a, s in (start, stop))
        alpha = np.array([[float(stop[0])]])
        return written(self._carried(x, start[0], alpha, np.sqrt(last / first)[None])[0], x)

    def _path(self, x: Any, t_start: float, times: Any) -> Any:
        start, levels = self._levels(t_start, times)
        spread = self._variances()
        first = np.square(start[0]) * spread + np.square(start[1])
        last = np.square(levels[0]) * spread + np.square(levels[1])
        return self._carried(x, start[0], levels[0], np.sqrt(last / first))

    def _carried(self, x: Any, alpha: Any, alphas: Float, gain: Float) -> Any:
        """alphas_s m + gain_s,k along u_k, and the last gain in other directions: (S, B, d)."""
        flat = self._flat(x)
        mean, _, vectors = self._arrays(x)
        y = flat - float(alpha) * mean
        rest = column(gain[:, -1], x)[..., None]
        along = column(gain[:, :-1] - gain[:, -1:], x, 1)
        carried = ((y @ vectors) * along) @ vectors.T
        carried += rest * y
        carried += column(alphas[:, 0], x)[..., None] * mean
        return carried

    def _variances(self) -> Float:
        """lambda and tau, (r + 1,)."""
        return np.append(self.eigenvalues, self.residual)

    def _levels(
        self, t_start: float, times: Any
    ) -> tuple[tuple[float, float], tuple[Float, Float]]:
        """alpha, sigma at t_start, and at times (S, 1) if these can be reached from there."""
        targets = as_times(times)
        require(targets.ndim == 1, "times", targets.shape, "(S,)")
        low, high = self.schedule.domain
        everything = np.append(targets, as_times(t_start))
        inside = bool(((everything >= low) & (everything <= high)).all())
        require(inside, "times", everything.tolist(), f"times in {low:g} .. {high:g}")
        alpha, sigma = self.schedule.alpha(everything), self.schedule.sigma(everything)
        require(bool(sigma[-1] > 0), "t_start", f"{t_start:g}, without noise", "noise (sigma > 0)")
        higher = sigma * alpha[-1] > sigma[-1] * alpha * (1 + 1e-12)
        wanted = f"no more noise than at {t_start:g}, where the path starts"
        require(not higher.any(), "times", everything[higher].tolist(), wanted)
        return (alpha[-1], sigma[-1]), (alpha[:-1, None], sigma[:-1, None])

    # -------------------------------------------------------------- the denoiser

    def _constants(self) -> tuple[Float, ...]:
        return self.mean, self.eigenvalues, self.vectors

    def _clean(self, flat: Any, alpha: Any, sigma: Any) -> Any:
        mean, eigenvalues, vectors = self._arrays(flat)
        y = flat - alpha * mean
        rest = alpha * self.residual / (alpha**2 * self.residual + sigma**2)
        along = alpha * eigenvalues / (alpha**2 * eigenvalues + sigma**2) - rest
        return mean + rest * y + ((y @ vectors) * along) @ vectors.T


# ------------------------------------------------------------------ arrays and tensors


def as_rows(X: Any, least: int = 1) -> Float:
    """Finite data (n, *dims), at least `least` of them, as float64 rows (n, d)."""
    data = np.asarray(on_host(X), np.float64)
    require(data.ndim >= 2 and len(data) >= least, "X", data.shape, f"(n, *dims), n >= {least}")
    require(bool(np.isfinite(data).all()), "X", "NaN or infinity", "finite values")
    return data.reshape(len(data), -1)


def column(values: Any, x: Any, axis: int = -1) -> Any:
    """One value as a float; an array with a new axis, in float64 where x lies."""
    if np.ndim(values) == 0:
        return float(values)
    shaped = np.expand_dims(values, axis)
    return sys.modules["torch"].as_tensor(shaped, device=x.device) if is_tensor(x) else shaped


def written(values: Any, x: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Float64 rows in the dtype of x and its shape, or another."""
    shaped = values.reshape(tuple(x.shape) if shape is None else shape)
    if is_tensor(x):
        return shaped.to(x.dtype if x.is_floating_point() else shaped.dtype)
    return shaped.astype(x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64)
