"""Regression with the kernel of a wide ReLU network: gradient descent, ridge, and when to stop.

A network of two layers, f(z) = m^{-1/2} Σ_r a_r ReLU(w_r·z), whose hidden layer alone is trained
by gradient descent from w_r ~ N(0, I), moves as m → ∞ like kernel regression with its neural
tangent kernel, κ(z, z') = z·z' (π - ∠(z, z')) / 2π. With the Gram matrix K of n inputs, started
from f = 0, a step is  f ← f - (η/n) K (f - y),  and in the eigenvectors of K/n = V Λ Vᵀ every
component of the targets is learned at its own rate:

    f_k = V (I - (I - ηΛ)^k) Vᵀ y,        f_k(z) = (1/n) κ(z, Z) V g_k(Λ) Vᵀ y,
    g_k(λ) = (1 - (1 - ηλ)^k) / λ,        ridge: g(λ) = 1 / (λ + penalty).

All steps are so known from one eigendecomposition. Small eigenvalues are learned last and are where
noise in y goes; a stopping rule says at which k to have done with them.

Jacot, Gabriel and Hongler 2018, arXiv 1806.07572; Cho and Saul 2009 (arc-cosine kernels); Raskutti,
Wainwright and Yu 2014, arXiv 1306.3574 (stopping); Han, Razaviyayn and Xu, "Neural network-based
score estimation in diffusion models", ICLR 2024, arXiv 2401.15604.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Kernel = Callable[[Float, Float], Float]

LAYERS = ("hidden", "both")
BLOCK = 1024  # rows of a Gram matrix computed at a time
EXACT_LIMIT = 8000  # inputs whose whole Gram matrix is taken apart
NEVER = math.inf  # steps of the limit k → ∞


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────


def ntk_relu(Z: ArrayLike, Z2: ArrayLike | None = None, *, layers: str = "hidden") -> Float:
    """The tangent kernel of a two-layer ReLU network between rows: float64 (n, n2).

    κ(z, z') = z·z' (π - ∠) / 2π, the hidden layer trained; layers="both" adds what the trained
    output layer gives, the arc-cosine kernel ‖z‖‖z'‖ (sin ∠ + (π - ∠) cos ∠) / 2π.

    Z (n, D), Z2 (n2, D), by default Z. The angle is π - ∠ = 2 atan2(‖u + v‖, ‖u - v‖) of the unit
    vectors: the arccos of a rounded cosine is wrong by up to 3e-8 where they are nearly parallel.
    κ(z, z) = ‖z‖²/2, or ‖z‖² for both layers; zero vectors have κ = 0.
    Raises InputError for other shapes, values that are not finite and an unknown `layers`.
    O(n n2 D) time, O(n n2) memory; row-local. Jacot et al. 2018; Cho and Saul 2009; Han et al.
    2024, arXiv 2401.15604.

    >>> ntk_relu([[1.0, 0.0], [1.0, 1.0]]).round(4).tolist()
    [[0.5, 0.375], [0.375, 1.0]]
    """
    require(layers in LAYERS, "layers", repr(layers), "'hidden' or 'both'")
    a = _matrix(Z, "Z")
    b = a if Z2 is None else _matrix(Z2, "Z2")
    require(a.shape[1] == b.shape[1], "Z2", b.shape, f"(n2, {a.shape[1]})")
    kernel = np.empty((len(a), len(b)))
    lengths, v = _lengths_and_directions(b)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        own, u = _lengths_and_directions(rows)
        apart = 2 * np.arctan2(cdist(u, -v), cdist(u, v))  # π - ∠
        part = (rows @ b.T) * apart
        if layers == "both":
            part *= 2
            part += own[:, None] * lengths * np.sin(apart)
        kernel[start : start + BLOCK] = part / (2 * np.pi)
    return kernel


def _lengths_and_directions(Z: Float) -> tuple[Float, Float]:
    lengths = np.linalg.norm(Z, axis=1)
    return lengths, Z / np.where(lengths > 0, lengths, 1.0)[:, None]


# ── regression, all steps at once ───────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class SpectralRegression:
    """Kernel regression taken apart once; a filter g of the eigenvalues makes it a prediction.

    f(z) = κ(z, anchors) basis diag(g(λ)) components, where λ (r,) are the eigenvalues of K/n,
    falling, components (r, o) the targets in the eigenvectors, basis (a, r) and anchors (a, D) the
    n inputs, or the landmarks of a Nyström approximation. n: inputs. unreached: ‖·‖² of what of y
    no prediction can have. Filters: `descent` after k steps of gradient descent, `ridge`.

    >>> Z = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> fit = SpectralRegression.fit(Z, [[1.0], [0.0], [2.0]])
    >>> fit.predict(Z, fit.descent(NEVER)).round(9).tolist()
    [[1.0], [0.0], [2.0]]
    >>> bool(fit.training_error(5) > fit.training_error(50) > 0)
    True
    """

    kernel: Kernel
    anchors: Float
    basis: Float
    eigenvalues: Float
    components: Float
    n: int
    unreached: float = 0.0

    @classmethod
    def fit(
        cls,
        Z: ArrayLike,
        y: ArrayLike,
        kernel: Kernel = ntk_relu,
        *,
        landmarks: int | None = None,
        rng: int | np.random.Generator | None = None,
    ) -> SpectralRegression:
        """From inputs (n, D) and targets (n, o).

        landmarks: of the n inputs, drawn uniformly, whose span replaces that of all n (Nyström);
        None for the exact kernel. Raises InputError for shapes that disagree, values that are not
        finite, more than 8,000 inputs without landmarks, and landmarks not from 1 to n.
        Time O(n³), memory O(n²); with m landmarks O(n m² + m³) and O(n + m²).
        """
        inputs, targets = _matrix(Z, "Z"), _matrix(y, "y")
        n = len(inputs)
        require(len(targets) == n, "y", f"{len(targets)} rows", f"{n}, one for each of Z")
        if landmarks is None:
            require(n <= EXACT_LIMIT, "Z", f"{n} rows", f"up to {EXACT_LIMIT}, or landmarks")
            eigenvalues, vectors = _spectrum(kernel(inputs, inputs) / n)
            components = vectors.T @ targets
            return cls(kernel, inputs, vectors / n, eigenvalues, components, n)
        require(1 <= landmarks <= n, "landmarks", landmarks, f"from 1 to {n}, the inputs")
        anchors = inputs[generator(rng).choice(n, landmarks, replace=False)]
        basis, eigenvalues, components = _nystrom(kernel, inputs, targets, anchors)
        unreached = max(float(np.square(targets).sum() - np.square(components).sum()), 0.0)
        return cls(kernel, anchors, basis, eigenvalues, components, n, unreached)

    @property
    def largest(self) -> float:
        """λ_max of K/n. Steps of gradient descent must stay below 2/λ_max; 1/λ_max is usual."""
        return float(self.eigenvalues[0])

    def descent(self, steps: float, eta: float | None = None) -> Float:
        """g (r,) after `steps` steps of size eta, 1/λ_max by default; NEVER is the limit."""
        return descent_filter(self.eigenvalues, steps, 1 / self.largest if eta is None else eta)

    def ridge(self, penalty: float) -> Float:
        """g (r,) of min (1/n) ‖f - y‖² + penalty ‖f‖²_κ, penalty > 0."""
        require(0 < penalty < np.inf, "penalty", penalty, "a positive number")
        return np.asarray(1 / (self.eigenvalues + penalty))

    def coefficients(self, g: Float) -> Float:
        """c (a, o) of f(z) = κ(z, anchors) c."""
        return self.basis @ (g[:, None] * self.components)

    def predict(self, Z: ArrayLike, g: Float) -> Float:
        """f (m, o) at Z (m, D), in blocks of rows."""
        inputs, weights = _matrix(Z, "Z"), self.coefficients(g)
        blocks = (inputs[i : i + BLOCK] for i in range(0, len(inputs), BLOCK))
        return np.concatenate([self.kernel(rows, self.anchors) @ weights for rows in blocks])

    def path(self, Z: ArrayLike, filters: list[Float]) -> Iterator[Float]:
        """f (m, o) for one filter after the other; the kernel is computed once."""
        projected = self.kernel(_matrix(Z, "Z"), self.anchors) @ self.basis
        for g in filters:
            yield projected @ (g[:, None] * self.components)

    def training_error(self, steps: float, eta: float | None = None) -> float:
        """(1/n o) ‖f_k - y‖², which never rises with k."""
        left = 1 - self.eigenvalues * self.descent(steps, eta)
        missing = float(np.square(left[:, None] * self.components).sum())
        return (missing + self.unreached) / (self.n * self.components.shape[1])


def descent_filter(eigenvalues: ArrayLike, steps: float, eta: float) -> Float:
    """g_k(λ) = (1 - (1 - ηλ)^k) / λ, and ηk for λ = 0: what k steps from 0 multiply Vᵀy by.

    eigenvalues (r,) >= 0, of K/n. steps: a whole number >= 0, or NEVER, for which g is 1/λ, and 0
    where λ is below r ε λ_max. Raises InputError unless 0 < eta < 2/λ_max.

    >>> descent_filter([1.0, 0.5, 0.0], 2, 0.5).round(9).tolist()
    [0.75, 0.875, 1.0]
    """
    values = _eigenvalues(eigenvalues)
    top = float(values.max())
    require(0 < eta < 2 / top, "eta", eta, f"a step in (0, 2/λ_max) = (0, {2 / top:g})")
    if steps == NEVER:
        return np.divide(1, values, out=np.zeros_like(values), where=values > _floor(values))
    whole = steps >= 0 and float(steps).is_integer()
    require(whole, "steps", steps, "a whole number of steps >= 0, or infinity")
    rate = eta * values
    # for small rates without the cancellation in 1 - (1 - rate)^k; rates above 1 change the sign
    slow = -np.expm1(steps * np.log1p(-np.minimum(rate, 0.5)))
    done = np.where(rate < 0.5, slow, 1 - np.power(1 - rate, float(steps)))
    return np.divide(done, values, out=np.full_like(values, eta * steps), where=values > 0)


def _spectrum(matrix: Float) -> tuple[Float, Float]:
    """Eigenvalues, falling and not below 0, and eigenvectors."""
    values, vectors = scipy.linalg.eigh(matrix, overwrite_a=True, check_finite=False)
    values = np.maximum(values[::-1], 0.0)
    require(values[0] > 0, "Z", "zero vectors only", "inputs at which the kernel is not 0")
    return values, np.ascontiguousarray(vectors[:, ::-1])


def _nystrom(
    kernel: Kernel, inputs: Float, targets: Float, anchors: Float
) -> tuple[Float, Float, Float]:
    """Basis, eigenvalues and components where K ≈ K_nm K_mm⁻¹ K_mn, without an n x m matrix."""
    sizes, vectors = _spectrum(kernel(anchors, anchors))
    kept = sizes > _floor(sizes)
    root = vectors[:, kept] / np.sqrt(sizes[kept])  # root rootᵀ = K_mm⁻¹
    n, r = len(inputs), root.shape[1]
    gram, moments = np.zeros((r, r)), np.zeros((r, targets.shape[1]))
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        features = kernel(inputs[rows], anchors) @ root
        gram += features.T @ features
        moments += features.T @ targets[rows]
    eigenvalues, turn = _spectrum(gram / n)
    kept = eigenvalues > _floor(eigenvalues)
    eigenvalues, turn = eigenvalues[kept], turn[:, kept]
    components = turn.T @ moments / np.sqrt(n * eigenvalues)[:, None]
    return root @ turn * np.sqrt(eigenvalues / n), eigenvalues, components


def _floor(values: Float) -> float:
    """Below this an eigenvalue is round-off."""
    return float(values.size * np.finfo(np.float64).eps * values.max())


# ── when to stop ────────────────────────────────────────────────────────────────────────────────


def rwy_stopping_step(
    eigvals: ArrayLike, sigma: float, eta: float, c: float = 1.0, *, n: int | None = None
) -> int:
    """The step at which the kernel's complexity outgrows the noise, Raskutti, Wainwright and Yu.

    T̂ = min{k >= 1: R̂(1/√s_k) > c / (2 e sigma s_k)} - 1,  s_k = eta k,
    R̂(ε) = sqrt((1/n) Σ min(λ_i, ε²)).

    eigvals: λ of K/n. sigma: standard deviation of the targets' noise. n: inputs, where the
    eigenvalues are fewer (Nyström). c > 1 stops later; with c = 1 the rule is conservative. 0 says
    not to train at all. Raises InputError for negative eigenvalues, none above 0, and sigma, eta or
    c not above 0. O(r log T̂). arXiv 1306.3574; used for scores in arXiv 2401.15604.

    >>> [rwy_stopping_step([1.0, 0.1, 0.01], sigma, 1.0) for sigma in (0.01, 0.1, 1.0)]
    [338, 6, 0]
    """
    values = _eigenvalues(eigvals)
    for name, value in (("sigma", sigma), ("eta", eta), ("c", c)):
        require(0 < value < np.inf, name, value, "a positive number")
    count = values.size if n is None else n
    require(count >= values.size, "n", count, f"at least the {values.size} eigenvalues")

    def outgrown(k: int) -> bool:
        s = eta * k
        complexity = math.sqrt(np.minimum(values, 1 / s).sum() / count)
        return complexity > c / (2 * math.e * sigma * s)

    return first_step(outgrown) - 1


def discrepancy_step(
    fit: SpectralRegression, sigma: float, eta: float | None = None, c: float = 1.0
) -> float:
    """The first step whose training error is at most c sigma²: what is left could be noise.

    Morozov's principle. sigma as in `rwy_stopping_step`. NEVER where the error stays above it.

    >>> fit = SpectralRegression.fit([[1.0, 0.0], [0.0, 1.0]], [[1.0], [-1.0]])
    >>> k = discrepancy_step(fit, 0.1)
    >>> fit.training_error(k) <= 0.01 < fit.training_error(k - 1)
    True
    """
    require(0 < sigma < np.inf, "sigma", sigma, "a positive number")
    require(0 < c < np.inf, "c", c, "a positive number")
    bound = c * sigma**2
    if fit.training_error(0) <= bound:
        return 0
    if fit.training_error(2.0**52, eta) > bound:
        return NEVER
    return first_step(lambda k: fit.training_error(k, eta) <= bound)


def first_step(condition: Callable[[int], bool]) -> int:
    """The least k >= 1 for which a condition holds that holds for all larger k too.

    >>> first_step(lambda k: k * k > 1000)
    32
    """
    high = 1
    while not condition(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high


def step_grid(max_steps: int, per_decade: int = 12) -> list[int]:
    """0 and about `per_decade` whole numbers a decade up to max_steps >= 1, both ends included.

    >>> step_grid(20, 6)
    [0, 1, 2, 3, 4, 5, 7, 10, 14, 20]
    """
    require(max_steps >= 1, "max_steps", max_steps, "at least 1")
    count = 2 + math.ceil(per_decade * math.log10(max_steps))
    steps = np.unique(np.rint(np.geomspace(1, max_steps, count)).astype(np.int64))
    return [0, *steps.tolist()]


@dataclass(frozen=True, eq=False)
class RiskPath:
    """Mean squared errors of a regression per value of what regularises it.

    at: steps of gradient descent, penalties of ridge or epochs. held_out: on rows that were not
    trained on; it holds the targets' own noise, which no estimator can remove. training: on those
    that were, None where it was not computed.
    """

    at: NDArray[Any]
    held_out: Float
    training: Float | None = None

    @property
    def best(self) -> int:
        """Where the held-out error is least: an index."""
        return int(self.held_out.argmin())


# ── the network of finite width ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class WideNetwork:
    """f(z) = m^{-1/2} Σ_r a_r ReLU(w_r·z), trained by gradient descent: w (m, D), a (m, o).

    `init` draws w ~ N(0, I) and signs a, and takes every unit twice with opposite signs, so that
    f = 0 at the start, as in kernel regression. `step` moves w, and with layers="both" also a; its
    outcome differs from that of `SpectralRegression` with the kernel of `layers` by O(m^{-1/2}).

    >>> network = WideNetwork.init(512, 2, 1, rng=0)
    >>> Z, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0], [-1.0]])
    >>> for _ in range(30):
    ...     network = network.step(Z, y, eta=2.0)
    >>> network(Z).round(1).tolist()
    [[1.0], [-1.0]]
    """

    w: Float
    a: Float
    layers: str = "hidden"

    @classmethod
    def init(
        cls,
        width: int,
        inputs: int,
        outputs: int,
        *,
        layers: str = "hidden",
        rng: int | np.random.Generator | None = None,
    ) -> WideNetwork:
        """m = width, an even number; D = inputs, o = outputs."""
        require(width >= 2 and width % 2 == 0, "width", width, "an even number of units")
        require(layers in LAYERS, "layers", repr(layers), "'hidden' or 'both'")
        draw = generator(rng)
        w = draw.standard_normal((width // 2, inputs))
        a = 2.0 * draw.integers(2, size=(width // 2, outputs)) - 1
        return cls(np.concatenate([w, w]), np.concatenate([a, -a]), layers)

    def __call__(self, Z: Float) -> Float:
        """f (n, o) at Z (n, D); memory O(n m)."""
        return np.maximum(Z @ self.w.T, 0) @ self.a / math.sqrt(len(self.w))

    def step(self, Z: Float, y: Float, eta: float) -> WideNetwork:
        """One step down the gradient of (1/2n) ‖f(Z) - y‖². Time O(n m (D + o)), blocks of rows."""
        scale, back = 1 / math.sqrt(len(self.w)), np.zeros_like(self.w)
        outer = np.zeros_like(self.a)
        for start in range(0, len(Z), BLOCK):
            rows = Z[start : start + BLOCK]
            units = rows @ self.w.T
            active = units > 0
            units *= active
            error = units @ self.a * scale - y[start : start + BLOCK]
            back += ((error @ self.a.T) * active).T @ rows
            if self.layers == "both":
                outer += units.T @ error
        move = eta * scale / len(Z)
        return replace(self, w=self.w - move * back, a=self.a - move * outer)

    def descend(
        self,
        Z: Float,
        y: Float,
        eta: float,
        batch_size: int | None = None,
        rng: int | np.random.Generator | None = None,
    ) -> Iterator[WideNetwork]:
        """The network after 0, 1, 2, ... steps, on all of Z or on batches drawn anew each step."""
        network, draw = self, generator(rng)
        while True:
            yield network
            rows = draw.integers(len(Z), size=batch_size) if batch_size else slice(None)
            network = network.step(Z[rows], y[rows], eta)


# ── what is checked ─────────────────────────────────────────────────────────────────────────────


def _matrix(values: ArrayLike, name: str) -> Float:
    try:
        matrix = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: got {type(values).__name__}, want numbers") from None
    require(matrix.ndim == 2 and matrix.size > 0, name, f"shape {matrix.shape}", "rows (n, D)")
    require(bool(np.isfinite(matrix).all()), name, "NaN or infinity", "finite values")
    return matrix


def _eigenvalues(values: ArrayLike) -> Float:
    found = np.asarray(values, np.float64)
    good = found.ndim == 1 and found.size > 0 and bool((found >= 0).all()) and found.max() > 0
    require(good, "eigenvalues", "other values", "(r,) numbers >= 0, one of them above 0")
    return found
