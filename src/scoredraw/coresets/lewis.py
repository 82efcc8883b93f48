"""Lewis weights: leverage made self-consistent for lp.

Reweight the rows by powers of their own leverage until nothing changes,

    w_i = (a_iᵀ M⁻¹ a_i)^{p/2},   M = Aᵀ W^{1-2/p} A,

and what is left are the lp Lewis weights: unique, summing to the rank, and an upper bound of the
lp sensitivities for p ≤ 2. The fixed point is found on log w with an over- or under-relaxation
that is the best possible for every p, in passes over blocks that each read the matrix once.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import is_tensor
from scoredraw.coresets.leverage import (
    CORRECT_FROM,
    TILE,
    factor_of_gram,
    leverage_scores,
    product,
    rank_warning,
    squared_norms,
    whiten,
)
from scoredraw.errors import require
from scoredraw.execution import Blocks, Engine, as_blocks, map_blocks

Float = npt.NDArray[np.float64]

LARGEST_LOG = 340.0  # e^340 squared is still a float64


class LewisInfo(NamedTuple):
    """How the iteration ended: steps, the largest |log F(w)/w| at its last test, and the rank."""

    steps: int
    residual: float
    rank: int
    converged: bool


@overload
def lewis_weights(
    A: Any,
    p: float,
    *,
    tol: float = ...,
    max_iter: int = ...,
    return_info: Literal[False] = ...,
    engine: Engine | None = ...,
) -> Float: ...
@overload
def lewis_weights(
    A: Any,
    p: float,
    *,
    tol: float = ...,
    max_iter: int = ...,
    return_info: Literal[True],
    engine: Engine | None = ...,
) -> tuple[Float, LewisInfo]: ...
def lewis_weights(
    A: Any,
    p: float,
    *,
    tol: float = 1e-10,
    max_iter: int = 200,
    return_info: bool = False,
    engine: Engine | None = None,
) -> Float | tuple[Float, LewisInfo]:
    """lp Lewis weights: the w with w_i^{2/p} = a_iᵀ(Aᵀ W^{1-2/p} A)⁻¹a_i.

    A: (n, d) dense, CSR or blocks of a table, or a torch tensor, which is scored where it lies;
    0 < p < ∞. -> float64 (n,) in [0, 1], summing to the rank; zero rows have 0; with return_info
    also a `LewisInfo`.

    With F(w) the right side to the power p/2 the step is w ← w^{1-η} F(w)^η, η = 4/(p+2). At the
    fixed point ∂log F/∂log w = -(p/2 - 1) D⁻¹(P∘P), P the projection on the columns of
    W^{1/2-1/p}A and D its diagonal; D⁻¹(P∘P) is row-stochastic and similar to a positive
    semidefinite matrix (Schur), so its eigenvalues fill [0, 1] and the step's lie between 1 - η and
    1 - ηp/2. Their moduli are equal, and least, at this η, for p below 2 as above: the error falls
    by |p-2|/(p+2) a step. (The plain step, η = 1, has |p/2-1|, and diverges for p > 4.) In the
    sup norm of log w the plain step contracts for every p < 4; if the residual does not fall, η
    goes back to 1 for p < 2 and is halved for p > 2.

    Stops at max|log F(w)/w| ≤ tol; a ConvergenceWarning states the residual if max_iter steps
    don't suffice: the weights are then still valid scores. p = 2 gives leverage scores. Raises
    InputError for p ≤ 0, NaN or infinite entries. Warns (RankWarning) if A is rank deficient.

    Time O(n d²) a step, one pass each; memory O(n + d²) and a block a thread. Cohen and Peng 2015
    (arXiv 1412.0588), whose η is 1 and p < 4.

    >>> import numpy as np
    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> lewis_weights(A, 1).round(6).tolist()
    [1.0, 0.25, 0.75]
    """
    if is_tensor(A):
        from scoredraw.coresets import tensors

        return tensors.lewis_weights(A, p, tol=tol, max_iter=max_iter, return_info=return_info)
    require(0 < p < np.inf, "p", p, "0 < p < infinity")
    require(tol > 0, "tol", tol, "a positive number")
    require(max_iter >= 1, "max_iter", max_iter, "at least 1")
    blocks = as_blocks(A)
    if p == 2:
        weights = leverage_scores(blocks, engine=engine)
        return (weights, LewisInfo(0, 0.0, round(weights.sum()), True)) if return_info else weights
    weights, info = _iterate(blocks, p, tol, max_iter, engine)
    if not info.converged:
        from sklearn.exceptions import ConvergenceWarning

        text = f"lewis_weights: residual {info.residual:.1e} > {tol:.1e} after {info.steps} steps"
        warnings.warn(text, ConvergenceWarning, stacklevel=2)
    return (weights, info) if return_info else weights


def relaxation(p: float) -> tuple[float, float]:
    """The step's exponent η = 4/(p+2) and the rate |p-2|/(p+2) at which its error falls.

    >>> relaxation(1)
    (1.3333333333333333, 0.3333333333333333)
    """
    return 4 / (p + 2), abs(p - 2) / (p + 2)


def _iterate(
    blocks: Blocks, p: float, tol: float, max_iter: int, engine: Engine | None
) -> tuple[Float, LewisInfo]:
    factors, condition = whiten(blocks, engine=engine)
    whitener = product(factors)
    rank = whitener.shape[1]
    if rank < min(blocks.n, blocks.d):
        rank_warning(rank, blocks.d)
    log_w = np.full(blocks.n, np.log(max(rank, 1) / blocks.n))
    root = whitener * np.exp((1 / p - 0.5) * log_w[0])  # M⁻¹ = root rootᵀ at the first w
    basis = None if condition < CORRECT_FROM else whitener
    if basis is not None:
        root = np.eye(rank) * np.exp((1 / p - 0.5) * log_w[0])
    eta = relaxation(p)[0]
    previous = residual = np.inf
    step = rises = 0
    while step < max_iter:
        step += 1
        log_w, residual, total = _pass(blocks, log_w, root, basis, p, eta, engine)
        if residual <= tol:
            break
        rises = rises + 1 if residual >= previous else 0
        previous = residual
        if rises >= 2:
            eta, rises = (1.0 if p < 2 else eta / 2), 0
        root, condition = factor_of_gram(total)
        if condition > CORRECT_FROM:  # go on in the columns of AB, orthonormal as now weighted
            basis = root if basis is None else basis @ root
            log_w, residual, total = _pass(blocks, log_w, None, basis, p, 0.0, engine)
            root, _ = factor_of_gram(total)
    return np.minimum(np.exp(log_w), 1.0), LewisInfo(step, residual, rank, residual <= tol)


def _pass(
    blocks: Blocks,
    log_w: Float,
    root: Float | None,
    basis: Float | None,
    p: float,
    eta: float,
    engine: Engine | None,
) -> tuple[Float, float, Float]:
    """One reading of A: the new log w, the largest |log F(w)/w|, and M at the new w.

    root: M⁻¹ = root rootᵀ at the old w (None leaves w as it is). basis: B where the columns of AB
    stand for those of A.
    """
    width = blocks.d if basis is None else basis.shape[1]

    def part(block: Any, old: Float) -> tuple[Float, float, Float]:
        rows = block if basis is None else np.asarray(block @ basis)
        new, largest = old, 0.0
        if root is not None:
            new, largest = _relax(squared_norms(rows, root), old, p, eta)
        scale = np.exp(np.minimum((0.5 - 1 / p) * new, LARGEST_LOG))
        total = np.zeros((width, width))
        for start in range(0, len(old), TILE):
            scaled = _scaled(rows[start : start + TILE], scale[start : start + TILE])
            term = scaled.T @ scaled
            total += term if isinstance(term, np.ndarray) else term.toarray()
        return new, largest, total

    fresh, largest, total = np.empty(blocks.n), 0.0, np.zeros((width, width))
    for rows, (new, worst, term) in map_blocks(part, blocks, log_w, engine=engine):
        fresh[rows] = new
        largest = max(largest, worst)
        total += term
    return fresh, largest, total


def _relax(norms: Float, log_w: Float, p: float, eta: float) -> tuple[Float, float]:
    """log w + η (log F - log w), and the largest |log F - log w|; zero rows fall to -∞."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = (p / 2) * np.log(norms)
        change -= log_w
    zero = norms == 0
    if zero.any():
        change[zero] = 0.0
        return np.where(zero, -np.inf, log_w + eta * change), float(np.abs(change).max())
    worst = max(float(change.max()), -float(change.min()))
    return log_w + eta * change, worst


def _scaled(rows: Any, scale: Float) -> Any:
    """Each row times its scale; the scale of a zero row (infinite weight for p < 2) is moot."""
    if isinstance(rows, np.ndarray):
        return rows * scale[:, None]
    scaled = rows.copy()
    scaled.data = scaled.data * np.repeat(scale, np.diff(rows.indptr))
    return scaled
