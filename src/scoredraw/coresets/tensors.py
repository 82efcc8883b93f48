"""Scores of torch tensors where they lie: on the CPU or a CUDA device, in float64.

The matrix never leaves its device. Everything that is long in n happens there, piece by piece, in
float64 (float32 tensors and narrower are widened a piece at a time, so that TF32 has nothing to
shorten); the d x d matrices are factored on the CPU by the same functions as those of arrays, and
the random numbers of a sketch are the same, so the scores agree with the array's to rounding:

    G = AᵀA  →  W with AW orthonormal, on the CPU  →  τ_i = ‖a_i W‖²

`leverage_scores(tensor)`, `ridge_leverage_scores`, `lewis_weights`, `sketched_leverage` and
`root_leverage_scores` come here by themselves. Draws are made on the CPU: `poisson(scores.cpu(),
...)`. Gradients are not tracked: a tensor that requires them is detached. What adds into buckets
(CountSketch and OSNAP on CUDA) does so in no fixed order: there the last bits may vary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scoredraw.coresets import leverage as arrays
from scoredraw.coresets import sketching
from scoredraw.coresets.leverage import (
    CORRECT_FROM,
    METHODS,
    QR_FROM,
    default_ridge,
    factor_of_gram,
    factor_of_triangle,
    rank_warning,
)
from scoredraw.coresets.lewis import LARGEST_LOG, LewisInfo, relaxation
from scoredraw.errors import InputError, require
from scoredraw.execution import BLOCK_ROWS, as_blocks
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]

PIECE_CELLS = 1 << 23  # numbers of a piece: 64 MiB


def leverage_scores(
    A: Tensor, *, method: str = "auto", sketch: str = "countsketch", rng: Rng = None
) -> Tensor:
    """Leverage scores τ_i = a_iᵀ(AᵀA)⁺a_i of the rows of a tensor; float64 (n,) on its device.

    A: (n, d), any real dtype; method, sketch, rng, rank rule and warnings as in
    `leverage.leverage_scores`: Gram matrix, a correcting pass from condition number 1e3, QR from
    1e7. Raises InputError for complex, sparse, quantised or meta tensors, devices without float64,
    NaN or infinite entries. Time O(n d²), memory O(d²) and a piece of 64 MiB.

    >>> A = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 6.0]])
    >>> leverage_scores(A).numpy().round(4).tolist()
    [0.5357, 0.3214, 0.25, 0.8929]
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    if method == "sketch":
        return sketched_leverage(A, sketch=sketch, rng=rng)
    A = checked(A)
    if len(A) < A.shape[1]:
        return on_device(arrays.leverage_scores(host(A), method=method), A)
    factors, _ = whiten(A, method)
    if (rank := factors[-1].shape[1]) < A.shape[1]:
        rank_warning(rank, A.shape[1])
    return row_norms(A, *factors).clamp_(max=1.0)


def ridge_leverage_scores(A: Tensor, ridge: float | None = None) -> Tensor:
    """Ridge leverage scores τ_i(λ) = a_iᵀ(AᵀA + λI)⁻¹a_i; float64 (n,) on the tensor's device.

    ridge and its default as in `leverage.ridge_leverage_scores`. Time O(n d²), memory O(d²) and a
    piece. Raises InputError as `leverage_scores`, and for a negative ridge.

    >>> ridge_leverage_scores(torch.eye(2), 1.0).numpy().round(12).tolist()
    [0.5, 0.5]
    """
    require(ridge is None or 0 <= ridge < np.inf, "ridge", ridge, "a number >= 0")
    if ridge == 0:
        return leverage_scores(A)
    A = checked(A)
    if len(A) < A.shape[1]:
        return on_device(arrays.ridge_leverage_scores(host(A), ridge), A)
    values, vectors = np.linalg.eigh(host(gram(A)))
    squares = np.maximum(values, 0.0)
    strength = default_ridge(squares) if ridge is None else ridge
    if strength < squares[-1] / QR_FROM:  # the small eigenvalues matter: take them from QR
        _, singular, right = np.linalg.svd(host(triangle(A)))
        squares, vectors = singular**2, right.T
    scale = squares + strength
    factor = vectors[:, scale > 0] / np.sqrt(scale[scale > 0])
    return row_norms(A, on_device(factor, A)).clamp_(max=1.0)


def lewis_weights(
    A: Tensor, p: float, *, tol: float = 1e-10, max_iter: int = 200, return_info: bool = False
) -> Any:
    """lp Lewis weights, w_i^{2/p} = a_iᵀ(AᵀW^{1-2/p}A)⁻¹a_i; float64 (n,) on the tensor's device.

    Arguments, iteration, warnings and (with return_info) `LewisInfo` as in `lewis.lewis_weights`.
    Time O(n d²) a step, memory O(n + d²) and a piece. Raises InputError as there and as
    `leverage_scores`. Cohen and Peng 2015 (arXiv 1412.0588).

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> lewis_weights(A, 1).numpy().round(6).tolist()
    [1.0, 0.25, 0.75]
    """
    require(0 < p < np.inf, "p", p, "0 < p < infinity")
    require(tol > 0, "tol", tol, "a positive number")
    require(max_iter >= 1, "max_iter", max_iter, "at least 1")
    A = checked(A)
    if p == 2:
        w = leverage_scores(A)
        return (w, LewisInfo(0, 0.0, round(float(w.sum())), True)) if return_info else w
    weights, info = _lewis(A, p, tol, max_iter)
    if not info.converged:
        from sklearn.exceptions import ConvergenceWarning

        text = f"lewis_weights: residual {info.residual:.1e} > {tol:.1e} after {info.steps} steps"
        warnings.warn(text, ConvergenceWarning, stacklevel=2)
    return (weights, info) if return_info else weights


def sketched_leverage(
    A: Tensor,
    *,
    sketch: str = "countsketch",
    size: int | None = None,
    projection: int | None = None,
    rng: Rng = None,
) -> Tensor:
    """Approximate leverage scores ‖a_i W G‖² of a tensor; float64 (n,) on its device.

    Arguments, accuracy and random numbers as in `sketching.sketched_leverage`: the same seed gives
    the array's scores to rounding. CountSketch and OSNAP add rows to buckets with `index_add_`,
    "srht" runs the fast Hadamard transform in place on blocks of 8,192 rows, "gaussian" copies its
    entries from the CPU. Time that of the sketch, r d² and n d t; memory O(r d) and a piece.

    >>> A = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    >>> ratio = sketched_leverage(A, rng=0) / leverage_scores(A)
    >>> bool(ratio.log().abs().max() < np.log(4))
    True
    """
    A = checked(A)
    n, d = A.shape
    rows, columns = sketching.sketch_shape(sketch, n, d, size, projection)
    if rows >= n:
        return leverage_scores(A)
    uniforms = RowUniforms(rng)
    factor = sketching.whitening_of_sketch(host(_SKETCHES[sketch](A, rows, uniforms)), n)
    if columns < factor.shape[1]:
        factor = factor @ sketching.gaussian(factor.shape[1], columns, uniforms)
    return row_norms(A, on_device(factor, A)).clamp_(max=1.0)


# ------------------------------------------------------------------ passes over pieces


def checked(A: Tensor) -> Tensor:
    """The detached tensor, if it is a matrix of finite real numbers that float64 can take."""
    require(A.ndim == 2, "A", f"shape {tuple(A.shape)}", "a matrix (n, d)")
    plain = A.layout is torch.strided and not (A.is_quantized or A.is_nested)
    require(plain, "A", f"a tensor of layout {A.layout}, dtype {A.dtype}", "a plain dense tensor")
    require(not A.is_complex(), "A", f"dtype {A.dtype}", "real numbers")
    require(A.device.type not in ("meta", "mps"), "A", f"device {A.device}", "one with float64")
    require(A.numel() > 0, "A", f"shape {tuple(A.shape)}", "at least one row and one column")
    A = A.detach()
    for rows, piece in pieces(A):
        if not bool(torch.isfinite(piece.sum())) and not bool(torch.isfinite(piece).all()):
            row, column = (int(i) for i in torch.nonzero(~torch.isfinite(piece))[0])
            place = f"{float(piece[row, column])} at row {rows.start + row}, column {column}"
            raise InputError(f"A: got {place}, want finite numbers")
    return A


def pieces(A: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Float64 pieces of whole blocks of 8,192 rows, about 64 MiB each."""
    step = BLOCK_ROWS * max(1, PIECE_CELLS // (BLOCK_ROWS * A.shape[1]))
    for start in range(0, len(A), step):
        rows = slice(start, min(start + step, len(A)))
        yield rows, A[rows].double()


def gram(A: Tensor, factor: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """AᵀA, (AW)ᵀAW, or either with the rows scaled."""
    width = A.shape[1] if factor is None else factor.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=A.device)
    for rows, piece in pieces(A):
        piece = piece if factor is None else piece @ factor
        piece = piece if scale is None else piece * scale[rows, None]
        total += piece.T @ piece
    return total


def triangle(A: Tensor) -> Tensor:
    """R of A = QR: the triangles of the pieces, folded in their order."""
    folded = torch.zeros(0, A.shape[1], dtype=torch.float64, device=A.device)
    for _, piece in pieces(A):
        folded = torch.linalg.qr(torch.cat([folded, piece]), mode="r")[1]
    return folded


def row_norms(A: Tensor, *factors: Tensor) -> Tensor:
    """‖a_i W‖² of every row, W the product of the factors."""
    norms = torch.empty(len(A), dtype=torch.float64, device=A.device)
    for rows, piece in pieces(A):
        for factor in factors:
            piece = piece @ factor
        norms[rows] = torch.linalg.vecdot(piece, piece)
    return norms


def whiten(A: Tensor, method: str = "auto") -> tuple[list[Tensor], float]:
    """The factors of W, and the condition number of A, columns scaled to norm one."""
    if len(A) < A.shape[1]:
        wide, condition = arrays.whiten(as_blocks(host(A)))
        return [on_device(factor, A) for factor in wide], condition
    found, factor, condition = False, np.zeros((0, 0)), np.inf
    if method != "qr":
        factor, condition = factor_of_gram(host(gram(A)))
        found = condition <= QR_FROM or method == "gram"
    if not found:
        factor, condition = factor_of_triangle(host(triangle(A)), len(A))
    first = on_device(factor, A)
    if condition > CORRECT_FROM and factor.shape[1]:
        return [first, on_device(factor_of_gram(host(gram(A, first)))[0], A)], condition
    return [first], condition


def product(factors: list[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def host(tensor: Tensor) -> Float:
    return np.asarray(tensor.double().cpu().numpy())


def on_device(array: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(array, np.float64), device=like.device)


# ------------------------------------------------------------------ Lewis weights


def _lewis(A: Tensor, p: float, tol: float, max_iter: int) -> tuple[Tensor, LewisInfo]:
    """The iteration of `lewis.lewis_weights`, in orthonormal columns if A is ill-conditioned."""
    factors, condition = whiten(A)
    whitener = product(factors)
    rank = whitener.shape[1]
    if rank < min(A.shape):
        rank_warning(rank, A.shape[1], 4)
    log_w = torch.full((len(A),), float(np.log(max(rank, 1) / len(A))), dtype=torch.float64)
    log_w = log_w.to(A.device)
    basis = None if condition < CORRECT_FROM else whitener
    start = whitener if basis is None else torch.eye(rank, dtype=torch.float64, device=A.device)
    root = start * torch.exp((1 / p - 0.5) * log_w[0])
    eta, previous, rises = relaxation(p)[0], np.inf, 0
    step, residual = 0, np.inf
    while step < max_iter:
        step += 1
        norms = row_norms(A, root) if basis is None else row_norms(A, basis, root)
        change = torch.where(norms > 0, (p / 2) * norms.log() - log_w, 0.0)
        residual = float(change.abs().max())
        log_w = torch.where(norms > 0, log_w + eta * change, -np.inf)
        if residual <= tol:
            break
        rises = rises + 1 if residual >= previous else 0
        previous = residual
        if rises >= 2:
            eta, rises = (1.0 if p < 2 else eta / 2), 0
        scale = torch.exp(((0.5 - 1 / p) * log_w).clamp(max=LARGEST_LOG))
        small, condition = factor_of_gram(host(gram(A, basis, scale)))
        root = on_device(small, A)
        if condition > CORRECT_FROM:  # go on in the columns of AB, orthonormal as now weighted
            basis = root if basis is None else basis @ root
            root = on_device(factor_of_gram(host(gram(A, basis, scale)))[0], A)
    return log_w.exp().clamp_(max=1.0), LewisInfo(step, residual, rank, residual <= tol)


# ------------------------------------------------------------------ sketches


def fast_hadamard(matrix: Tensor) -> Tensor:
    """H times a contiguous matrix (2^k, d), in place: k rounds of butterflies (a + b, a - b).

    >>> fast_hadamard(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).ravel().tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    half, length = 1, len(matrix)
    while half < length:
        pair = matrix.view(length // (2 * half), 2, half, -1)
        above, below = pair[:, 0], pair[:, 1]
        above += below
        below.mul_(-2.0).add_(above)
        half *= 2
    return matrix


def _buckets(A: Tensor, size: int, uniforms: RowUniforms, entries: int = 1) -> Tensor:
    total = torch.zeros(size, A.shape[1], dtype=torch.float64, device=A.device)
    for rows, piece in pieces(A):
        bucket, value = sketching.cells(uniforms, rows.start, len(piece), size, entries, 0)
        for j in range(entries):
            place = torch.as_tensor(np.ascontiguousarray(bucket[:, j]), device=A.device)
            total.index_add_(0, place, piece * on_device(value[:, j, None], A))
    return total


def _osnap(A: Tensor, size: int, uniforms: RowUniforms) -> Tensor:
    return _buckets(A, size, uniforms, sketching.osnap_entries(A.shape[1], size))


def _srht(A: Tensor, size: int, uniforms: RowUniforms) -> Tensor:
    total = torch.zeros(size, A.shape[1], dtype=torch.float64, device=A.device)
    for start in range(0, len(A), BLOCK_ROWS):
        block = A[start : start + BLOCK_ROWS].double()
        length = 1 << (len(block) - 1).bit_length()
        mixed = torch.zeros(length, A.shape[1], dtype=torch.float64, device=A.device)
        flip = sketching.signs(uniforms, start, len(block), "srht rows", 0)
        torch.mul(block, on_device(flip[:, None], A), out=mixed[: len(block)])
        kept, places = sketching.srht_places(uniforms, start, length, size, 0)
        sign = sketching.signs(uniforms, start, len(kept), "srht signs", 0)
        after = on_device(sign[:, None] / np.sqrt(min(size, length)), A)
        index, place = (torch.as_tensor(i, device=A.device) for i in (kept, places))
        total[place] += fast_hadamard(mixed)[index] * after
    return total


def _gaussian(A: Tensor, size: int, uniforms: RowUniforms) -> Tensor:
    total = torch.zeros(size, A.shape[1], dtype=torch.float64, device=A.device)
    step = max(1, sketching.NORMALS // size)
    for start in range(0, len(A), step):
        block = A[start : start + step].double()
        entries = sketching.normals(uniforms, start, len(block), size, 0)
        total += on_device(entries, A).T @ block
    return total


_SKETCHES: dict[str, Callable[[Tensor, int, RowUniforms], Tensor]] = {
    "countsketch": _buckets,
    "osnap": _osnap,
    "srht": _srht,
    "gaussian": _gaussian,
}
