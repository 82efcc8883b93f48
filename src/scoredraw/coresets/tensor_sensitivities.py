"""Exact lp sensitivities of torch tensors: many rows' programmes at once, where the tensor lies.

The programmes, their duals and Newton's method are those of `sensitivities`: in an orthonormal
basis U of the columns, min Σ|Uy|^p on ⟨t, y⟩ = 1 for every row t, whose Hessians for a batch are
one matrix product with the rows' outer products. Each value is certified by a dual point.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoredraw.coresets.tensors import (
    PIECE_CELLS,
    checked,
    host,
    leverage_scores,
    on_device,
    product,
    whiten,
)
from scoredraw.errors import require

BATCH_CELLS = 1 << 22  # programmes solved at once times their terms
PRODUCT_CELLS = 1 << 26  # outer products of rows kept in memory; beyond, they are made again
MAX_STEPS = 100
GAP = 1e-10  # a row is finished when its duality gap, relative, is below
WARN_GAP = 1e-6  # and reported when it is still above after MAX_STEPS


def lp_sensitivities(A: Tensor, p: float, *, rows: Any = None) -> Tensor:
    """Exact lp sensitivities max_x |⟨a_i, x⟩|^p / ‖Ax‖_p^p of a tensor's rows, on its device.

    p in [1, ∞]; rows: positions wanted (all). -> float64 (n,) or (len(rows),). For 1 < p < ∞ many
    rows' programmes are solved at once by Newton's method on the device, each with a certificate
    (`sensitivities.lp_sensitivities`); p = 1 and p = ∞ are linear programmes and done on the CPU.
    A ConvergenceWarning states the largest relative duality gap if one exceeds 1e-6. Raises
    InputError as `leverage_scores`, for p < 1 or positions outside the matrix.

    Time O(n² d² · 10 to 60 steps), memory O(n d²) up to 512 MiB and a batch.
    Woodruff and Yasuda 2023 (arXiv 2306.00732).

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    >>> lp_sensitivities(A, 3).numpy().round(9).tolist()  # 1 / (1 + 2^{1-p})
    [0.8, 0.8, 0.8]
    """
    from scoredraw.coresets import sensitivities as exact

    require(p >= 1, "p", p, "p >= 1")
    A = checked(A)
    if p in (1, np.inf):
        return on_device(exact.lp_sensitivities(host(A), p, rows=rows), A)
    wanted = np.arange(len(A)) if rows is None else np.atleast_1d(np.asarray(rows))
    inside = wanted.dtype.kind in "iu" and (wanted.size == 0 or wanted.min() >= 0)
    inside = inside and (wanted.size == 0 or wanted.max() < len(A))
    require(bool(inside), "rows", "not positions in the matrix", f"0 <= row < {len(A)}")
    index = torch.as_tensor(wanted.astype(np.int64), device=A.device)
    if p == 2:
        return leverage_scores(A)[index]
    merged, group, counts = _merge_equal_rows(A.double(), p)
    value = torch.zeros(len(counts) + 1, dtype=torch.float64, device=A.device)
    targets = group[index].unique()
    targets = targets[targets < len(counts)]  # the last group is that of zero rows
    if len(targets):
        factors, _ = whiten(merged)
        basis = torch.linalg.qr(merged @ product(factors))[0]
        value[targets] = _sensitivities(basis, basis[targets], p) / counts[targets]
    return value.clamp_(max=1.0)[group[index]]


# ------------------------------------------------------------------ batches of programmes


class _Programmes(NamedTuple):
    """min Σ|Uy|^p on ⟨t, y⟩ = 1, one for each row t; the Gram matrices of U, made or to be made."""

    basis: Tensor
    products: Tensor | None
    p: float

    def hessians(self, weights: Tensor) -> Tensor:
        """Uᵀ diag(w_b) U for many weight vectors w_b: one product with the rows' outer products."""
        rank = self.basis.shape[1]
        if self.products is not None:
            return (weights @ self.products).view(-1, rank, rank)
        total = torch.zeros(len(weights), rank * rank, dtype=torch.float64, device=weights.device)
        step = max(1, PIECE_CELLS // rank**2)
        for start in range(0, len(self.basis), step):
            part = self.basis[start : start + step]
            total += weights[:, start : start + step] @ _outer(part)
        return total.view(-1, rank, rank)


def _outer(rows: Tensor) -> Tensor:
    return (rows[:, :, None] * rows[:, None, :]).flatten(1)


def _merge_equal_rows(A: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct nonzero rows times m^{1/p} for m copies; each row's group; the counts m."""
    distinct, group, counts = torch.unique(A + 0.0, dim=0, return_inverse=True, return_counts=True)
    keep = (distinct != 0).any(1)
    place = torch.where(keep, keep.cumsum(0) - 1, int(keep.sum()))
    count = counts[keep].double()
    return distinct[keep] * count[:, None] ** (1 / p), place[group], count


def _sensitivities(basis: Tensor, targets: Tensor, p: float) -> Tensor:
    """1 / min {‖Uy‖_p^p : ⟨t, y⟩ = 1} for every row t of `targets`, in batches."""
    small = basis.shape[0] * basis.shape[1] ** 2 <= PRODUCT_CELLS
    work = _Programmes(basis, _outer(basis) if small else None, p)
    newton = _newton_smoothed if p < 2 else _newton_power
    batch = max(16, min(4096, BATCH_CELLS // len(basis)))
    parts = [newton(work, targets[i : i + batch]) for i in range(0, len(targets), batch)]
    value, gap = (torch.cat(column) for column in zip(*parts, strict=True))
    if (worst := float(gap.max())) > WARN_GAP:
        from sklearn.exceptions import ConvergenceWarning

        count = int((gap > WARN_GAP).sum())
        text = f"lp_sensitivities: {count} rows with a relative duality gap up to {worst:.1e}"
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
    return (-value).exp()


class _Best:
    """The best log value and duality gap of every programme so far, and those still at work."""

    def __init__(self, targets: Tensor) -> None:
        self.live = torch.arange(len(targets), device=targets.device)
        self.value = torch.full_like(targets[:, 0], np.inf)
        self.gap = torch.full_like(targets[:, 0], np.inf)

    def record(self, value: Tensor, gap: Tensor) -> Tensor:
        """Keep what is better; the mask of those to go on with."""
        known = self.gap[self.live]
        better = (gap < known) | (~torch.isfinite(known) & (value < self.value[self.live]))
        rows = self.live[better]
        self.value[rows], self.gap[rows] = value[better], gap[better]
        go_on = self.gap[self.live] > GAP
        self.live = self.live[go_on]
        return go_on


def _newton_power(work: _Programmes, targets: Tensor) -> tuple[Tensor, Tensor]:
    """p > 2: damped Newton from least squares through exponents 2, 3, 4.5, ... p."""
    basis, p, t = work.basis, work.p, targets
    y = t / (t * t).sum(1, keepdim=True)
    best, exponents, q = _Best(t), [], 2.0
    while (q := 1.5 * q) < p:
        exponents += [q] * 3
    for q in exponents + [p] * MAX_STEPS:
        residual = y @ basis.T
        top = residual.abs().amax(1, keepdim=True)
        ratio = residual.abs() / top
        if q == p:
            dual = residual.sign() * ratio ** (p - 1)
            go_on = best.record(*_duality_gap(work, t, residual, dual))
            if not bool(go_on.any()):
                break
            y, t, residual, ratio, top = (v[go_on] for v in (y, t, residual, ratio, top))
        hessian = _regularised(work.hessians(ratio ** (q - 2)), t)
        direction = torch.linalg.solve(hessian, t)
        step = (direction / (t * direction).sum(1, keepdim=True) - y) / (q - 1)
        change, signed = step @ basis.T / top, residual / top
        slope = q * (signed.sign() * ratio ** (q - 1) * change).sum(1)

        def merit(r: Tensor, q: float = q) -> Tensor:
            return (r.abs() ** q).sum(1)

        y = y + _backtrack(merit, signed, change, slope) * step
    return best.value, best.gap


def _newton_smoothed(work: _Programmes, targets: Tensor) -> tuple[Tensor, Tensor]:
    """1 < p < 2: primal-dual Newton on Σ(r² + e²)^{p/2} while e falls (Chan, Golub, Mulet 1999)."""
    basis, p, t = work.basis, work.p, targets
    y = t / (t * t).sum(1, keepdim=True)
    residual = y @ basis.T
    width = 0.3 * residual.abs().mean(1, keepdim=True)
    smallest, best = 1e-11 * width, _Best(t)
    dual = residual * (residual**2 + width**2) ** (p / 2 - 1)
    for _ in range(MAX_STEPS):
        theta = (residual**2 + width**2).sqrt()
        limit = theta ** (p - 1)
        dual = torch.minimum(torch.maximum(dual, -limit), limit)
        weight = theta ** (p - 2)
        bend = (dual * residual * theta ** (-p)).clamp(max=1.0)
        curvature = torch.maximum(weight * (1 - (2 - p) * bend), 1e-12 * weight)
        gradient = (weight * residual) @ basis
        hessian = _regularised(work.hessians(curvature), t)
        along, down = torch.linalg.solve(hessian, torch.stack([t, gradient], 2)).unbind(2)
        step = ((t * down).sum(1) / (t * along).sum(1))[:, None] * along - down
        change, decrement = step @ basis.T, -(gradient * step).sum(1)

        def merit(r: Tensor, e: Tensor = width) -> Tensor:
            return ((r * r + e * e) ** (p / 2)).sum(1)

        length = _backtrack(merit, residual, change, -p * decrement)
        y = y + length * step
        before, residual = residual, y @ basis.T
        dual = dual + length * (curvature * change + weight * before - dual)
        go_on = best.record(*_duality_gap(work, t, residual, dual))
        if not bool(go_on.any()):
            break
        settled = (decrement * p < 1e-2 * merit(residual))[:, None]
        width = torch.where(settled, torch.maximum(0.4 * width, smallest), width)
        state = (y, t, residual, width, smallest, dual)
        y, t, residual, width, smallest, dual = (v[go_on] for v in state)
    return best.value, best.gap


def _regularised(hessian: Tensor, t: Tensor) -> Tensor:
    """H + ρ ttᵀ + tiny I: steps with ⟨t, δ⟩ = 0 don't change, and H is invertible."""
    trace = hessian.diagonal(dim1=1, dim2=2).sum(1)
    pull = (trace / (t * t).sum(1))[:, None, None]
    tiny = (1e-15 * trace + 1e-300)[:, None, None]
    eye = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    return hessian + pull * t[:, :, None] * t[:, None, :] + tiny * eye


def _backtrack(
    merit: Callable[[Tensor], Tensor], residual: Tensor, change: Tensor, slope: Tensor
) -> Tensor:
    """Step lengths (b, 1), halved until the merit falls by 1e-4 of what the slope says."""
    start, t = merit(residual), torch.ones_like(slope)
    for _ in range(30):
        reached = merit(residual + t[:, None] * change)
        bad = ~(reached <= start + 1e-4 * t * slope + 1e-15 * start)
        if not bool(bad.any()):
            break
        t = torch.where(bad, 0.5 * t, t)
    return t[:, None]


def _duality_gap(
    work: _Programmes, t: Tensor, residual: Tensor, dual: Tensor
) -> tuple[Tensor, Tensor]:
    """log ‖r‖_p^p and its relative distance to the bound ⟨t, Uᵀz⟩/‖z‖_q of a feasible dual z."""
    p = work.p
    image = dual @ work.basis
    c = (image * t).sum(1) / (t * t).sum(1)
    dual = dual - (image - c[:, None] * t) @ work.basis.T
    value = p * _log_norm(residual, p)
    bound = p * (c.clamp(min=0).log() - _log_norm(dual, p / (p - 1)))
    gap = (value - bound).clamp(max=700.0).expm1().abs()
    return value, gap.nan_to_num(nan=np.inf)


def _log_norm(vectors: Tensor, p: float) -> Tensor:
    top = vectors.abs().amax(1)
    ratio = vectors.abs() / torch.where(top > 0, top, 1.0)[:, None]
    return top.log() + (ratio**p).sum(1).log() / p
