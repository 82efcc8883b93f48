"""How well a weighted sample of rows stands for all of them: the embedding distortion.

    ε = max_x | ‖SAx‖_p^p / ‖Ax‖_p^p - 1 |,   ‖SAx‖_p^p = Σ_{i drawn} weight_i |⟨a_i, x⟩|^p.

For p = 2 that is an eigenvalue problem; for other p the maximum is not convex and only bounded:
from below by the best of many local searches, from above by what the rows' sensitivities allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.leverage import materialise, whitening
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.execution import as_blocks, single_threads
from scoredraw.uniforms import Rng, generator

Float = npt.NDArray[np.float64]

CANDIDATES = 512  # rows whose maximisers are tried as starting points
ANGLES = 8192  # of the sweep in two dimensions
CELLS = 1 << 18  # residuals held at a time, so that they stay in the cache


class Distortion(NamedTuple):
    """Bounds of the distortion: lower ≤ ε ≤ upper, equal where `exact`.

    `lower` is attained by a vector that the search found; `upper` is certified and may be loose.
    """

    lower: float
    upper: float
    exact: bool


def embedding_distortion(
    A: Any, draw: Draw, p: float, *, n_starts: int = 64, steps: int = 40, rng: Rng = 0
) -> Distortion:
    """Bounds of the largest relative error of ‖SAx‖_p^p over all x.

    A: (n, d) dense, CSR or blocks; draw: from its n rows, `weights` multiplying |⟨a_i, x⟩|^p;
    1 ≤ p < ∞. n_starts, steps: random starts and steps of gradient ascent and descent, in an
    orthonormal basis of the columns, beside the maximisers (AᵀW^{1-2/p}A)⁻¹a_i of the most
    misweighted rows. -> `Distortion`. Exact for p = 2, for rank one, for p = 1 and rank two (the
    extremes lie where a residual is zero), and for all rows with weight one (0). Rank two and
    other p: a sweep of 8192 angles.

    Upper bound: Σ(weight_i - 1)₊ σ̄_i and min(1, Σ(1 - weight_i)₊ σ̄_i), σ̄ = τ^{p/2} for p ≤ 2 and
    min(1, n^{p/2-1} τ^{p/2}) beyond, and max weight - 1. Raises InputError.

    Time O(n d² + n d n_starts steps), memory O(n d). Woodruff and Yasuda 2023 (arXiv 2306.00732)
    for the quantity.

    >>> import numpy as np
    >>> from scoredraw.sampling import uniform
    >>> A = np.random.default_rng(0).standard_normal((100, 3))
    >>> embedding_distortion(A, uniform(100, 100, rng=0), 1)
    Distortion(lower=0.0, upper=0.0, exact=True)
    """
    return embedding_distortions(A, [draw], p, n_starts=n_starts, steps=steps, rng=rng)[0]


def embedding_distortions(
    A: Any,
    draws: Sequence[Draw],
    p: float,
    *,
    n_starts: int = 64,
    steps: int = 40,
    rng: Rng = 0,
    maximisers: int = 12,
    workers: int | None = None,
) -> list[Distortion]:
    """`embedding_distortion` of many draws from the same rows; the basis is made once.

    maximisers: how many rows' maximisers are starts, besides `n_starts` random ones, the same for
    every draw. workers: threads (all cores), a draw each.

    >>> import numpy as np
    >>> from scoredraw.sampling import uniform
    >>> A = np.random.default_rng(0).standard_normal((100, 3))
    >>> draws = [uniform(100, 50, rng=seed) for seed in range(3)]
    >>> [0 < one.lower <= one.upper for one in embedding_distortions(A, draws, 2)]
    [True, True, True]
    """
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    require(n_starts >= 1, "n_starts", n_starts, "at least 1")
    matrix = materialise(as_blocks(A))
    basis = np.linalg.qr(np.asarray(matrix @ whitening(matrix).factor))[0]
    n, rank = basis.shape
    for draw in draws:
        require(draw.n == n, "draw", f"from a pool of {draw.n}", f"from the {n} rows of A")
    starts = generator(rng).standard_normal((n_starts, rank))
    tips = row_maximisers(basis, p) if rank > 2 and p != 2 else starts[:0]

    def one(draw: Draw) -> Distortion:
        weights = np.bincount(draw.indices, draw.weights, n).astype(np.float64)
        return _one(basis, weights, p, starts, tips, maximisers, steps)

    with single_threads(workers) as pool:
        return list(pool.map(one, draws))


def row_maximisers(basis: Float, p: float) -> Float:
    """x_i = (UᵀW^{1-2/p}U)⁻¹u_i, near the x in which row i weighs most, for the heaviest rows.

    -> (up to 512, rank). Exact for p = 2.

    >>> row_maximisers(np.eye(2), 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    from scoredraw.coresets.lewis import lewis_weights

    weights = lewis_weights(basis, p)
    heavy = np.sort(np.argsort(-weights, kind="stable")[:CANDIDATES])
    power = np.where(weights > 0, weights, 1.0) ** (1 - 2 / p)
    return np.asarray(np.linalg.solve((basis.T * power) @ basis, basis[heavy].T).T)


def _one(
    basis: Float, weights: Float, p: float, starts: Float, tips: Float, count: int, steps: int
) -> Distortion:
    rank = basis.shape[1]
    if rank == 0 or (weights == 1).all():
        return Distortion(0.0, 0.0, True)
    if p == 2:
        values = np.linalg.eigvalsh((basis.T * weights) @ basis)
        epsilon = max(float(values[-1]) - 1, 1 - float(values[0]))
        return Distortion(epsilon, epsilon, True)
    if rank <= 2:
        at = _log_ratio(basis, weights, p, _directions(basis))
        exact = rank == 1 or p == 1
    else:
        sides = []
        found = _log_ratio(basis, weights, p, tips)
        for sign in (1.0, -1.0):
            best = tips[np.argsort(-sign * found, kind="stable")[:count]]
            sides.append(_climb(basis, weights, p, np.vstack([starts, best]), sign, steps))
        at, exact = np.concatenate(sides), False
    lower = max(float(np.expm1(at.max())), -float(np.expm1(at.min())), 0.0)
    return Distortion(lower, lower if exact else max(lower, _ceiling(basis, weights, p)), exact)


def _directions(basis: Float) -> Float:
    """Of a plane: even angles, and those at which a row's residual vanishes."""
    if basis.shape[1] == 1:
        return np.ones((1, 1))
    angles = np.arange(ANGLES) * (np.pi / ANGLES)
    normal = np.column_stack([-basis[:, 1], basis[:, 0]])
    return np.vstack([np.column_stack([np.cos(angles), np.sin(angles)]), normal[normal.any(1)]])


def _ceiling(basis: Float, weights: Float, p: float) -> float:
    from scoredraw.coresets.combined import leverage_bounds

    bound = leverage_bounds((basis**2).sum(1), p)[1]
    above = min(float(weights.max()) - 1, float(np.maximum(weights - 1, 0) @ bound))
    below = min(1.0, float(np.maximum(1 - weights, 0) @ bound))
    return max(above, below)


def _log_ratio(basis: Float, weights: Float, p: float, points: Float) -> Float:
    """log ‖SUy‖_p^p / ‖Uy‖_p^p of each row y of `points`."""
    values = np.empty(len(points))
    chunk = max(1, 8 * CELLS // len(basis))
    for start in range(0, len(points), chunk):
        part = slice(start, start + chunk)
        values[part] = _parts(basis, weights, p, points[part], gradient=False)[0]
    return values


def _parts(
    basis: Float, weights: Float, p: float, points: Float, *, gradient: bool
) -> tuple[Float, Float]:
    """The log ratio, and its gradient p Σ_j (weight_j/N - 1/D) |r_j|^{p-1} sign(r_j) u_j."""
    count, rank = points.shape
    sums, slopes = np.zeros((count, 2)), np.zeros((2, count, rank))
    both = np.column_stack([weights, np.ones(len(weights))])
    chunk = max(1, CELLS // count)
    for start in range(0, len(basis), chunk):
        rows = basis[start : start + chunk]
        residual = points @ rows.T
        size = np.abs(residual)
        lower = np.ones_like(size) if p == 1 else size ** (p - 1)
        sums += (lower * size) @ both[start : start + chunk]
        if gradient:
            signed = np.sign(residual) if p == 1 else np.copysign(lower, residual)
            slopes[0] += (signed * weights[start : start + chunk]) @ rows
            slopes[1] += signed @ rows
    sums = np.maximum(sums, 1e-300)
    value = np.log(sums[:, 0]) - np.log(sums[:, 1])
    return value, p * (slopes[0] / sums[:, :1] - slopes[1] / sums[:, 1:])


def _climb(basis: Float, weights: Float, p: float, points: Float, sign: float, steps: int) -> Float:
    """The log ratios reached from `points` by gradient steps, uphill or downhill.

    Steps go along the unit gradient on the sphere; a step that helps is taken and the next is
    longer, one that doesn't is not taken and the next is half as long.
    """
    y = points / np.linalg.norm(points, axis=1)[:, None]
    value, slope = _parts(basis, weights, p, y, gradient=True)
    length = np.full(len(y), 0.3)
    for _ in range(steps):
        slope -= (slope * y).sum(1)[:, None] * y
        norm = np.linalg.norm(slope, axis=1)
        trial = y + (sign * length / np.maximum(norm, 1e-300))[:, None] * slope
        trial /= np.linalg.norm(trial, axis=1)[:, None]
        reached, there = _parts(basis, weights, p, trial, gradient=True)
        better = sign * reached > sign * value
        y[better], value[better], slope[better] = trial[better], reached[better], there[better]
        length *= np.where(better, 1.3, 0.5)
    return value
