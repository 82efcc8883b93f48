"""How far given weights can be from the Lewis weights, and the convex programme that defines them.

An iteration that stops says that its last step was short, not how near the fixed point is. Here
the distance is bounded, from the weights alone and for every p. With u = log w, Φ(u) = log F(e^u),
F(w)_i = (a_iᵀ(AᵀW^{1-2/p}A)⁻¹a_i)^{p/2}, r = Φ(u) - u and κ = |p/2 - 1|:

- p < 4. Φ keeps the order for p ≤ 2 and reverses it for p ≥ 2, and Φ(u + c) = Φ(u) ± κc; at the
  rows where u - u* is largest and least, r then bounds that difference by r/(1 - κ).
- p ≥ 2. w* = (a_iᵀM*a_i)^{p/2} for the M* of max log det M, Σ(a_iᵀMa_i)^{p/2} ≤ d. Of any feasible
  M with a value δ below the largest, the eigenvalues λ of M*^{-1/2}MM*^{-1/2} satisfy
  Σ(λ - 1 - log λ) ≤ δ, as the slope of log det at M* is nowhere positive inside; hence
  -√(2δ) - δ ≤ log λ ≤ √(2δ), which bounds every a_iᵀMa_i / a_iᵀM*a_i. And by Hölder's inequality
  any w > 0 gives both an M, (AᵀW^{1-2/p}A)⁻¹ made feasible, and an upper bound of the value:
  δ ≤ d [(1 - 2/p) log(Σw/d) + (2/p) log(ΣF(w)/d)].

The two intervals are intersected. No solver is needed to be certain; the programme itself is here
as an independent way to the weights.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.leverage import leverage_scores, materialise
from scoredraw.coresets.sensitivities import orthonormal_basis
from scoredraw.errors import InputError, import_extra, require
from scoredraw.execution import as_blocks

Float = npt.NDArray[np.float64]

ROUND_OFF = 1e-12  # allowed for in log F: leverages in an orthonormal basis are better than this


class LewisCertificate(NamedTuple):
    """lower ≤ w* ≤ upper, (n,) each; error: the largest |log w - log w*| that they leave.

    gap: δ, how far the convex programme's value at these weights can be from the largest (NaN for
    p < 2, where it does not apply).
    """

    lower: Float
    upper: Float
    error: float
    gap: float


def lewis_certificate(A: Any, p: float, weights: Any) -> LewisCertificate:
    """Bounds of the lp Lewis weights w* from any weights w > 0: how near is w?

    A: (n, d) dense, CSR or blocks; 0 < p < ∞; weights: (n,), positive on the nonzero rows (those
    of zero rows are not looked at). -> `LewisCertificate`. The error is of the order of the
    residual r = log F(w)/w: r/(1 - |p/2 - 1|) for p < 4, and √(d(p-2)/2) times the standard
    deviation of r, weighted by w, for large p. Weights far from the fixed point get bounds that
    are wide (0 and 1 at worst) and still true. Raises InputError.

    Time O(n d²), memory O(n d): the leverage of the rows scaled by w^{1/2-1/p} is all there is to
    compute, r_i = (p/2) log(τ_i/w_i). Programme and fixed point: Cohen and Peng 2015
    (arXiv 1412.0588); the bounds are derived above.

    >>> import numpy as np
    >>> from scoredraw.coresets import lewis_weights
    >>> A = np.random.default_rng(0).standard_normal((50, 3))
    >>> w = lewis_weights(A, 6)
    >>> sure = lewis_certificate(A, 6, w)
    >>> bool((sure.lower <= sure.upper).all()), sure.error < 1e-8
    (True, True)
    """
    require(0 < p < np.inf, "p", p, "0 < p < infinity")
    blocks = as_blocks(A)
    w = np.asarray(weights, np.float64)
    require(w.shape == (blocks.n,), "weights", f"shape {w.shape}", f"({blocks.n},)")
    basis = orthonormal_basis(materialise(blocks))
    rows = np.flatnonzero(np.abs(basis).max(1, initial=0.0) > 0)
    require(bool(np.isfinite(w).all()), "weights", "NaN or infinity", "finite numbers")
    require(bool((w[rows] > 0).all()), "weights", f"{w[rows].min(initial=1):g} on a nonzero row",
            "positive weights on nonzero rows")  # fmt: skip
    lower, upper = np.zeros((2, blocks.n))
    if not len(rows):
        return LewisCertificate(lower, upper, 0.0, 0.0)
    u, rank = np.log(w[rows]), basis.shape[1]
    with np.errstate(divide="ignore"):
        tau = leverage_scores(basis[rows] * np.exp((0.5 - 1 / p) * (u - u.max()))[:, None])
        residual = (p / 2) * (np.log(tau) - u)
    intervals = [_by_order(u, residual, p)] if p < 4 else []
    gap = np.nan
    if p >= 2:
        *interval, gap = _by_programme(u, residual, p, rank)
        intervals.append((interval[0], interval[1]))
    low = np.fmax.reduce([one[0] for one in intervals])  # fmax, fmin: NaN says nothing
    high = np.minimum(np.fmin.reduce([one[1] for one in intervals]), 0.0)  # w* is a leverage
    low = np.where(np.isnan(low), -np.inf, low)
    high = np.where(np.isnan(high), 0.0, high)
    lower[rows], upper[rows] = np.exp(low), np.exp(high)
    return LewisCertificate(lower, upper, float(np.maximum(high - u, u - low).max()), gap)


def _by_order(u: Float, residual: Float, p: float) -> tuple[Float, Float]:
    """p < 4: u* lies in [u - M, u - m] and in Φ(u) ± κ[m, M], M and m the ends of u - u*."""
    kappa = abs(p / 2 - 1)
    low, high = float(residual.min()) - ROUND_OFF, float(residual.max()) + ROUND_OFF
    phi = u + residual
    if p < 2:  # at the largest of u - u*: r ≤ κM - M
        above, below = -low / (1 - kappa), high / (1 - kappa)
        ends = phi - kappa * above, phi + kappa * below
    else:  # r ≤ -κm - M at the largest, r ≥ -κM - m at the least
        above = (kappa * high - low) / (1 - kappa**2)
        below = (high - kappa * low) / (1 - kappa**2)
        ends = phi - kappa * below, phi + kappa * above
    return (
        np.maximum(u - above, ends[0] - ROUND_OFF),
        np.minimum(u + below, ends[1] + ROUND_OFF),
    )


def _by_programme(u: Float, residual: Float, p: float, rank: int) -> tuple[Float, Float, float]:
    """p ≥ 2: log F(w) - log(ΣF/d) with (p/2) log λ either side, and δ.

    With r̄ = Σwr/Σw, Σ w^{1-2/p}F^{2/p} = d turns δ into d[(2/p) log E e^{r-r̄} - log E e^{(2/p)(r-r̄)}],
    E the mean by w, in which nothing cancels but the squares.
    """  # noqa: E501
    share = np.exp(u - u.max())
    share /= share.sum()
    centre = float(share @ residual)
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = residual - centre
        first = np.log1p(share @ excess_of_exp(deviation))
        second = np.log1p(share @ excess_of_exp(deviation * 2 / p))
        gap = max(float(rank * (2 / p * first - second)), 0.0)
        total = u.max() + np.log(np.exp(u - u.max()).sum()) + centre + first  # log ΣF
        middle = u + residual - (total - np.log(rank))
        width = (p / 2) * np.sqrt(2 * gap) + ROUND_OFF * (1 + np.sqrt(rank * p))
        return middle - width, middle + width + (p / 2) * gap, gap


def excess_of_exp(x: Any) -> Float:
    """e^x - 1 - x, to full relative precision near 0.

    >>> float(excess_of_exp(1e-9))
    5.000000001666667e-19
    """
    x = np.asarray(x, np.float64)
    small = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return np.where(np.abs(x) < 0.01, small, np.expm1(x) - x)


def convex_lewis_weights(
    A: Any, p: float, *, solver: str | None = None
) -> tuple[Float, LewisCertificate]:
    """lp Lewis weights, p ≥ 2, by max log det M subject to Σ(a_iᵀMa_i)^{p/2} ≤ d, M ⪰ 0.

    w_i = (a_iᵀMa_i)^{p/2} at the optimum. A: (n, d) dense, CSR or blocks, small: an interior point
    method with n power cones and d² variables. solver: one of CVXPY's (its choice by default).
    -> (weights float64 (n,), their `LewisCertificate`). For p close to 2 and well beyond 4 it needs
    no damping; `lewis_weights` is faster by orders of magnitude and as certain with
    `lewis_certificate`. Raises InputError for p < 2, a programme the solver gives up, and
    MissingExtraError without CVXPY. Cohen and Peng 2015 (arXiv 1412.0588).

    >>> import numpy as np
    >>> weights, sure = convex_lewis_weights(np.eye(3)[[0, 1, 2, 2]], 4)
    >>> weights.round(4).tolist(), sure.error < 1e-3
    ([1.0, 1.0, 0.5, 0.5], True)
    """
    require(2 <= p < np.inf, "p", p, "2 <= p < infinity (lewis_weights for p < 2)")
    cp = import_extra("cvxpy", "all")
    blocks = as_blocks(A)
    basis = orthonormal_basis(materialise(blocks))
    weights = np.zeros(blocks.n)
    rows = np.flatnonzero(np.abs(basis).max(1, initial=0.0) > 0)
    if len(rows):
        n, rank = len(rows), basis.shape[1]
        scaled = basis[rows] * np.sqrt(n / rank)  # so that M and the a_iᵀMa_i are about one
        M = cp.Variable((rank, rank), PSD=True)
        form = cp.sum(cp.multiply(scaled @ M, scaled), axis=1)
        norm = cp.sum(form) if p == 2 else cp.pnorm(form, p / 2)
        programme = cp.Problem(cp.Maximize(cp.log_det(M)), [norm <= n ** (2 / p)])
        with warnings.catch_warnings():  # how cones stand for the norm; the certificate sees it
            warnings.simplefilter("ignore", UserWarning)
            try:
                programme.solve(solver=solver)
            except cp.error.SolverError as error:
                raise InputError(f"solver: got {str(error).splitlines()[0]}, want one that solves "
                                 "this programme") from None  # fmt: skip
        solved = programme.status in ("optimal", "optimal_inaccurate")
        require(solved, "solver", f"status {programme.status}", "a solved programme")
        found = np.einsum("ij,jk,ik->i", scaled, np.asarray(M.value), scaled)
        weights[rows] = np.minimum(np.maximum(found, 1e-300) ** (p / 2) * rank / n, 1.0)
    return weights, lewis_certificate(blocks, p, weights)
