"""Leverage: how much of its own fitted value a row of a matrix decides.

With Q an orthonormal basis of the columns of A, row i has leverage τ_i = ‖q_i‖², the diagonal of
the projection A(AᵀA)⁺Aᵀ; the leverages sum to the rank. The work is to find W with AW = Q from a
pass or two over blocks of rows, after which τ_i = ‖a_i W‖² is local to the row. The Gram matrix
AᵀA is the fastest way to W and loses digits with the square of the condition number, so it is
corrected by a second pass from 1e3 on and given up for a QR factorisation from 1e7 on.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import is_tensor
from scoredraw.errors import require
from scoredraw.execution import Blocks, Engine, as_blocks, map_blocks

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

TILE = 4096  # rows multiplied at once: fewer calls to wait for the interpreter, still in cache
CORRECT_FROM = 1e3  # condition number from which a second orthogonalising pass is made
QR_FROM = 1e7  # condition number from which the Gram matrix has too few digits left
METHODS = ("auto", "gram", "qr", "sketch")


class Whitening(NamedTuple):
    """W, float64 (d, rank), such that the columns of AW are orthonormal, and the rank."""

    factor: Float
    rank: int


def leverage_scores(
    A: Any,
    *,
    method: str = "auto",
    sketch: str = "countsketch",
    engine: Engine | None = None,
    rng: Any = None,
) -> Float:
    """Leverage scores τ_i = a_iᵀ(AᵀA)⁺a_i, the squared row norms of an orthonormal basis of A.

    A: (n, d) dense array, CSR matrix or blocks of a table; computed in float64. A torch tensor is
    scored where it lies (`tensors.leverage_scores`). method: "gram" (one pass for AᵀA, one for the
    scores), "qr" (for condition numbers above 1e7), "auto" (gram, and qr if it turns out to be
    needed) or "sketch" (`sketching.sketched_leverage` with that `sketch`, seeded by rng).
    -> float64 (n,) in [0, 1], summing to the rank; a zero row has 0.

    Directions below max(n, d)·eps of the largest, columns scaled to norm one, are dropped, with a
    RankWarning. With more columns than rows the scores are all one if the rows are independent.
    Raises InputError for NaN or infinite entries or an unknown method.

    Time O(n d²), memory O(d²) and a block a thread. Row-local once W is known: the same bits for
    any number of workers and any cut of the input into files. Drineas, Mahoney, Muthukrishnan
    2006; the correcting pass is that of CholeskyQR2 (Yamamoto et al. 2015).

    >>> import numpy as np
    >>> A = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 6.0]])
    >>> leverage_scores(A).round(4).tolist()
    [0.5357, 0.3214, 0.25, 0.8929]
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    if is_tensor(A):
        from scoredraw.coresets import tensors

        return tensors.leverage_scores(A, method=method, sketch=sketch, rng=rng)
    blocks = as_blocks(A)
    if method == "sketch":
        from scoredraw.coresets.sketching import sketched_leverage

        return sketched_leverage(blocks, sketch=sketch, rng=rng, engine=engine)
    if blocks.n < blocks.d:
        return _wide_leverage(blocks, engine)
    factors, _ = whiten(blocks, method=method, engine=engine)
    if (rank := factors[-1].shape[1]) < blocks.d:
        rank_warning(rank, blocks.d, 2)
    return np.minimum(row_norms(blocks, *factors, engine=engine), 1.0)


def whitening(A: Any, *, method: str = "auto", engine: Engine | None = None) -> Whitening:
    """The linear map W (d, rank) that makes the columns of AW orthonormal, and the rank.

    A: (n, d) as in `leverage_scores`, which says how; columns may outnumber rows.

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((50, 3)) * [1.0, 1e6, 1e-6]
    >>> Q = A @ whitening(A).factor
    >>> bool(np.abs(Q.T @ Q - np.eye(3)).max() < 1e-12)
    True
    """
    require(method in METHODS[:3], "method", repr(method), f"one of {', '.join(METHODS[:3])}")
    blocks = as_blocks(A)
    factors, _ = whiten(blocks, method=method, engine=engine)
    if (rank := factors[-1].shape[1]) < min(blocks.n, blocks.d):
        rank_warning(rank, blocks.d)
    return Whitening(product(factors), rank)


def whiten(
    blocks: Blocks, *, method: str = "auto", engine: Engine | None = None
) -> tuple[list[Float], float]:
    """The factors of W, and the condition number of A, columns scaled to norm one.

    Multiplying by the factors one after the other, not by their product, keeps the columns
    orthogonal to round-off however ill-conditioned A is.
    """
    if blocks.n < blocks.d:
        factor, condition = _wide_factor(_dense(materialise(blocks, engine)))
        return [factor], condition
    found = None
    if method != "qr":
        factor, condition = factor_of_gram(gram(blocks, engine))
        found = condition <= QR_FROM or method == "gram"
    if not found:
        factor, condition = factor_of_triangle(triangle(blocks, engine), blocks.n)
    if condition > CORRECT_FROM:
        return [factor, _inverse_root(gram(blocks, engine, factor))], condition
    return [factor], condition


def product(factors: list[Float]) -> Float:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def ridge_leverage_scores(
    A: Any, ridge: float | None = None, *, engine: Engine | None = None
) -> Float:
    """Ridge leverage scores τ_i(λ) = a_iᵀ(AᵀA + λI)⁻¹a_i; they sum to the effective dimension.

    A: (n, d) as in `leverage_scores`. ridge: λ ≥ 0, in the units of AᵀA. By default
    λ = ‖A - A_k‖_F²/k, with A_k the best approximation of rank k and k the least rank that holds
    90 % of ‖A‖_F²: the scores then sum to at most 2k and a sample by them keeps what A_k keeps
    (Cohen, Musco, Musco 2017, arXiv 1511.07263). -> float64 (n,) in [0, 1].
    Raises InputError for a negative ridge. Unlike leverage, the scores depend on the units of the
    columns. Time O(n d²), memory O(d²) and a block a thread.

    >>> import numpy as np
    >>> ridge_leverage_scores(np.eye(2), 1.0).round(12).tolist()
    [0.5, 0.5]
    """
    require(ridge is None or 0 <= ridge < np.inf, "ridge", ridge, "a number >= 0")
    if is_tensor(A):
        from scoredraw.coresets import tensors

        return tensors.ridge_leverage_scores(A, ridge)
    if ridge == 0:
        return leverage_scores(A, engine=engine)
    blocks = as_blocks(A)
    if blocks.n < blocks.d:
        rows = materialise(blocks, engine)
        values, vectors = np.linalg.eigh(_dense(rows @ rows.T))
        squares = np.maximum(values, 0.0)
        share = squares / (squares + (default_ridge(squares) if ridge is None else ridge))
        return np.asarray((vectors**2) @ share)
    values, vectors = np.linalg.eigh(gram(blocks, engine))
    squares = np.maximum(values, 0.0)
    strength = default_ridge(squares) if ridge is None else ridge
    if strength < squares[-1] / QR_FROM:  # the small eigenvalues matter: take them from QR
        _, singular, right = np.linalg.svd(triangle(blocks, engine))
        squares, vectors = singular**2, right.T
    scale = squares + strength
    factor = vectors[:, scale > 0] / np.sqrt(scale[scale > 0])
    return np.minimum(row_norms(blocks, factor, engine=engine), 1.0)


def default_ridge(squares: Float) -> float:
    """‖A - A_k‖_F²/k from the squared singular values, k holding 90 % of ‖A‖_F².

    >>> import numpy as np
    >>> default_ridge(np.array([90.0, 6.0, 4.0]))
    10.0
    """
    descending = np.sort(squares)[::-1]
    held = np.cumsum(descending)
    k = int(np.searchsorted(held, 0.9 * held[-1])) + 1
    return float(descending[k:].sum() / k)


# ------------------------------------------------------------------ passes over blocks


def gram(blocks: Blocks, engine: Engine | None = None, factor: Float | None = None) -> Float:
    """AᵀA, or (AW)ᵀAW, summed over blocks in their order."""

    def part(block: Any) -> Float:
        rows = block if factor is None else np.asarray(block @ factor)
        with np.errstate(over="ignore", invalid="ignore"):  # then the QR route is taken
            return _dense(rows.T @ rows)

    width = blocks.d if factor is None else factor.shape[1]
    total = np.zeros((width, width))
    for _, term in map_blocks(part, blocks, engine=engine):
        total += term
    return total


def triangle(blocks: Blocks, engine: Engine | None = None) -> Float:
    """R of A = QR: the triangles of the blocks, folded in their order (TSQR)."""
    folded = np.zeros((0, blocks.d))
    for _, r in map_blocks(lambda block: upper_triangle(_dense(block)), blocks, engine=engine):
        folded = upper_triangle(np.vstack([folded, r]))
    return folded


def upper_triangle(matrix: Float) -> Float:
    """R of one matrix in memory."""
    return np.asarray(np.linalg.qr(matrix, "r"), np.float64)


def row_norms(blocks: Blocks, *factors: Float, engine: Engine | None = None) -> Float:
    """‖a_i W‖² of every row, W the product of the factors."""
    norms = np.empty(blocks.n)
    for rows, value in map_blocks(lambda b: squared_norms(b, *factors), blocks, engine=engine):
        norms[rows] = value
    return norms


def squared_norms(block: Any, *factors: Float) -> Float:
    """‖a_i W‖² of the rows of one block, tile by tile."""
    norms = np.empty(block.shape[0])
    for start in range(0, len(norms), TILE):
        rows = block[start : start + TILE]
        for factor in factors:
            rows = np.asarray(rows @ factor)
        np.einsum("ij,ij->i", rows, rows, out=norms[start : start + TILE])
    return norms


def materialise(blocks: Blocks, engine: Engine | None = None) -> Any:
    """The whole matrix: dense float64, or CSR if the blocks are."""
    parts = [part.copy() for _, part in map_blocks(lambda block: block, blocks, engine=engine)]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    from scipy.sparse import vstack

    return vstack(parts, format="csr")


def take_rows(blocks: Blocks, indices: Int, engine: Engine | None = None) -> Any:
    """The rows at ascending positions, as `materialise` would give them."""
    wanted = np.zeros(blocks.n, bool)
    wanted[indices] = True
    parts = [p for _, p in map_blocks(lambda b, keep: b[keep], blocks, wanted, engine=engine)]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    from scipy.sparse import vstack

    return vstack(parts, format="csr")


# ------------------------------------------------------------------ small matrices


def factor_of_gram(total: Float) -> tuple[Float, float]:
    """W and the condition number from AᵀA with columns scaled to norm one; ∞ if it is unusable."""
    norms = np.sqrt(np.diagonal(total))
    if not (np.isfinite(total).all() and norms.min() > 0):
        return np.zeros((len(total), 0)), np.inf
    values, vectors = np.linalg.eigh(total / norms[:, None] / norms)
    condition = float(np.sqrt(values[-1] / max(values[0], 1e-300)))
    keep = values > len(values) * np.finfo(float).eps * values[-1]
    return vectors[:, keep] / np.sqrt(values[keep]) / norms[:, None], condition


def factor_of_triangle(r: Float, longest: int) -> tuple[Float, float]:
    """W and the condition number from R with columns scaled to norm one; rank by the usual rule."""
    largest = np.abs(r).max(0)
    scale = np.where(largest > 0, largest, 1.0)
    scale = scale * np.maximum(np.linalg.norm(r / scale, axis=0), (largest == 0))
    _, singular, right = np.linalg.svd(r / scale, full_matrices=False)
    keep = singular > longest * np.finfo(float).eps * singular[0]
    if not keep.any():
        return np.zeros((r.shape[1], 0)), 1.0
    factor = right[keep].T / singular[keep] / scale[:, None]
    return factor, float(singular[0] / singular[keep][-1])


def _inverse_root(total: Float) -> Float:
    """V Λ^{-1/2} of a Gram matrix that is nearly the identity."""
    values, vectors = np.linalg.eigh(total)
    return np.asarray(vectors / np.sqrt(values))


def _wide_factor(rows: Float) -> tuple[Float, float]:
    """Fewer rows than columns: W and the condition number from the SVD."""
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    keep = singular > max(rows.shape) * np.finfo(float).eps * singular[0]
    if not keep.any():
        return np.zeros((rows.shape[1], 0)), 1.0
    return right[keep].T / singular[keep], float(singular[0] / singular[keep][-1])


def _wide_leverage(blocks: Blocks, engine: Engine | None) -> Float:
    """Fewer rows than columns: one each if independent, otherwise from AAᵀ or an SVD."""
    rows = materialise(blocks, engine)
    if isinstance(rows, np.ndarray):
        left, singular, _ = np.linalg.svd(rows, full_matrices=False)
        keep = singular > max(rows.shape) * np.finfo(float).eps * singular[0]
    else:
        norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
        scaled = rows.multiply(1 / np.where(norms > 0, norms, 1.0)[:, None]).tocsr()
        values, left = np.linalg.eigh(_dense(scaled @ scaled.T))
        keep = values > len(values) * np.finfo(float).eps * values[-1]
    rank = int(keep.sum())
    text = f"{blocks.n} rows for {blocks.d} columns, rank {rank}: "
    text += "every row has leverage 1" if rank == blocks.n else "the leverages sum to the rank"
    warnings.warn(text, np.exceptions.RankWarning, stacklevel=3)
    scores = (left[:, keep] ** 2).sum(1)
    return np.ones(blocks.n) if rank == blocks.n else np.minimum(scores, 1.0)


def rank_warning(rank: int, columns: int, level: int = 3) -> None:
    text = f"rank {rank} of {columns}: the dependent directions are left out"
    warnings.warn(text, np.exceptions.RankWarning, stacklevel=level + 1)


def _dense(matrix: Any) -> Float:
    return matrix if isinstance(matrix, np.ndarray) else np.asarray(matrix.toarray())
