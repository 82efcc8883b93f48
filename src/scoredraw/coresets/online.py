"""Rows kept or dropped as they arrive, once and for good: online leverage sampling.

A row's leverage among the rows seen so far is at least its leverage among all, and the sample in
hand stands for the rows seen so far. So the sample itself says how much a new row matters:

    τ̃_i = min(1, (1 + ε) a_iᵀ(ÃᵀÃ + λI)⁻¹a_i),   keep with q_i = min(1, c τ̃_i^{p/2}),

Ã the rows kept, each over √q. The Gram matrix only grows, so scores only fall: a row that is
dropped by an old inverse would be dropped by the present one, and a whole chunk is put through one
matrix product; only the few rows that pass are looked at one by one. The inverse is a triangle R,
RᵀR = ÃᵀÃ + λI, to which a kept row is added by orthogonal rotations.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, lapack

from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.execution import BLOCK_ROWS, ArrayBlocks, Engine, as_blocks, map_blocks
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

STEP = 1024  # rows scored at once, from multiples of 1024 on
STALE = 32  # rows kept before the others that passed are scored again
MARGIN = 1e-6  # relative, of scores that only tell which rows cannot be kept


def online_leverage(
    A: Any,
    *,
    p: float = 2.0,
    eps: float = 0.5,
    delta: float | None = None,
    oversampling: float | None = None,
    rng: Rng = None,
    engine: Engine | None = None,
) -> Draw:
    """One reading of A, each row kept or dropped when it is met; `OnlineSampler` on all of A.

    A: (n, d) dense, CSR or blocks of a table; the rest as in `OnlineSampler`. -> `Draw`, unbiased.

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((3000, 3))
    >>> draw = online_leverage(A, oversampling=20, rng=0)
    >>> draw, draw.unbiased
    (Draw(online_leverage(p=2): 390 of 3000, unbiased), True)
    """
    sampler = OnlineSampler(p, eps, delta, oversampling, rng)
    for _, block in map_blocks(lambda block: block, as_blocks(A), engine=engine):
        sampler.push(block)
    return sampler.sample()[0]


@dataclass
class OnlineSampler:
    """State of one-pass leverage sampling (p = 2) or root-leverage sampling (1 ≤ p < 2).

    eps: the relative error ε. delta: the absolute error δ in the units of AᵀA, with λ = δ/ε; by
    default λ is 10^-6 of the squared norm of the first nonzero row. oversampling: c, by default
    8 ε⁻² ln max(d, 3), for which with high probability
    (1-ε) AᵀA - δI ≼ ÃᵀÃ ≼ (1+ε) AᵀA + δI and O(d ln d ln(ε‖A‖²/δ)/ε²) rows are kept (p = 2); a
    smaller c keeps in proportion fewer and makes the error larger. For p < 2 the probabilities are
    larger, so that the same holds, and Σ |⟨a, x⟩|^p / q is unbiased for ‖Ax‖_p^p. Raises
    InputError for p outside [1, 2], or eps, delta or oversampling that are not positive.

    Sequential: the rows must come in one order, each once; how they are cut into chunks does not
    show in a bit of the result, because they are decided 1,024 at a time from fixed positions on
    (`sample` decides those that wait, for itself). A λ below 10^-30 of a column's squared norm is
    lost in rounding. Time O(d²) a row, in solves of many, and O(d²) a kept row alone; memory O(d)
    a kept row and O(d²).
    Cohen, Musco, Pachocki 2016 (arXiv 1604.05448); τ^{p/2}: Woodruff and Yasuda 2023
    (arXiv 2306.00732).

    >>> import numpy as np
    >>> state = OnlineSampler(p=1, oversampling=4, rng=0)
    >>> for chunk in np.array_split(np.random.default_rng(0).standard_normal((5000, 3)), 7):
    ...     state.push(chunk)
    >>> draw, rows = state.sample()
    >>> draw.n, rows.shape == (len(draw), 3), 300 < len(draw) < 2500
    (5000, True, True)
    """

    p: float = 2.0
    eps: float = 0.5
    delta: float | None = None
    oversampling: float | None = None
    rng: Rng = None
    seen: int = 0  # rows decided; fewer than STEP more are waiting
    triangle: Float | None = None  # R, upper triangular, with RᵀR = ÃᵀÃ + λI
    rows: list[Float] = field(default_factory=list, repr=False)
    entries: list[tuple[int, float, float]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        require(1 <= self.p <= 2, "p", self.p, "1 <= p <= 2")
        require(0 < self.eps < 1, "eps", self.eps, "0 < eps < 1")
        for name in ("delta", "oversampling"):
            value = getattr(self, name)
            require(value is None or 0 < value < np.inf, name, value, "a positive number or None")
        self._uniforms = RowUniforms(self.rng)
        self._waiting: list[Float] = []

    def push(self, chunk: Any) -> None:
        """Take the next rows, (k, d), dense or CSR. Raises InputError for NaN or another width."""
        rows = chunk.tocsr() if hasattr(chunk, "tocsr") else np.asarray(chunk)
        require(rows.ndim == 2, "chunk", f"shape {rows.shape}", "rows (k, d)")
        numeric = rows.dtype.kind in "fiub"
        require(numeric, "chunk", f"dtype {rows.dtype}", "real numbers")
        values = rows.data if hasattr(rows, "tocsr") else rows
        require(bool(np.isfinite(values).all()), "chunk", "NaN or infinity", "finite numbers")
        width = self._waiting[0].shape[1] if self._waiting else rows.shape[1]
        require(rows.shape[1] == width, "chunk", f"{rows.shape[1]} columns", f"{width}")
        for start in range(0, max(rows.shape[0], 1), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            dense = part if isinstance(part, np.ndarray) else part.toarray()
            self._waiting.append(np.array(dense, np.float64, order="C"))
            count = sum(len(held) for held in self._waiting)
            if count >= STEP:
                pool = np.concatenate(self._waiting)
                self._decide(pool[: count - count % STEP])
                self._waiting = [pool[count - count % STEP :].copy()]

    def sample(self) -> tuple[Draw, Float]:
        """The draw so far, with positions in the stream and weights 1/q, and its rows (k, d)."""
        held = np.concatenate(self._waiting) if self._waiting else np.zeros((0, 0))
        n = self.seen + len(held)
        require(n > 0, "sample", "no rows yet", "rows pushed before")
        ahead = self
        if len(held):  # decide the rows that wait in a copy of the state, zero rows after them
            ahead = copy(self)
            ahead.rows, ahead.entries = list(self.rows), list(self.entries)
            ahead._decide(np.vstack([held, np.zeros((STEP - len(held), held.shape[1]))]))
        table = np.array(ahead.entries, np.float64).reshape(-1, 3)
        draw = Draw(
            table[:, 0].astype(np.int64),
            1 / table[:, 1],
            n,
            table[:, 1],
            True,
            table[:, 2],
            method=f"online_leverage(p={self.p:g})",
            info={"design": "independent"},  # given the past each row is: a sum of martingale steps
        )
        return draw, np.array(ahead.rows, np.float64).reshape(len(draw), held.shape[1])

    def _decide(self, rows: Float) -> None:
        """Keep or drop rows, a multiple of STEP of them."""
        blocks = ArrayBlocks(rows)
        blocks.finite = True
        for _ in map_blocks(self._decide_block, blocks, engine=Engine(workers=1)):
            pass  # for the one BLAS thread

    def _decide_block(self, block: Float) -> None:
        for start in range(0, len(block), STEP):
            rows = block[start : start + STEP]
            if self.triangle is not None or self._begin(rows):
                u = self._uniforms.block(self.seen, self.seen + STEP, stream="online")
                left = np.flatnonzero(u < self._highest(rows))
                while len(left):
                    left = left[self._one_by_one(rows, u, left) :]
                    left = left[u[left] < self._highest(rows[left])]
            self.seen += STEP

    def _begin(self, rows: Float) -> bool:
        """λ, from δ or the first nonzero row; False while there is none (it has no score)."""
        nonzero = np.flatnonzero(rows.any(axis=1))
        if not len(nonzero):
            return False
        first, d = rows[nonzero[0]], rows.shape[1]
        ridge = 1e-6 * float(first @ first) if self.delta is None else self.delta / self.eps
        if self.oversampling is None:
            self.oversampling = 8 / self.eps**2 * float(np.log(max(d, 3)))
        self.triangle = np.eye(d, order="F") * np.sqrt(ridge)
        return True

    def _one_by_one(self, rows: Float, u: Float, left: Int) -> int:
        """Decide the rows that may be kept in turn, until STALE are; how many were decided."""
        kept = 0
        for count, i in enumerate(left, 1):
            along = blas.dtrsv(self.triangle, rows[i], trans=1)  # R⁻ᵀa
            score = min(1.0, (1 + self.eps) * float(along @ along))
            q = float(self._chance(score))
            if u[i] < q:
                self.rows.append(rows[i].copy())
                self.entries.append((self.seen + int(i), q, score))
                row = (rows[i] / np.sqrt(q))[None, :]
                self.triangle = lapack.dtpqrt(0, min(len(along), 32), self.triangle, row)[0]
                kept += 1
                if kept == STALE:
                    return count
        return len(left)

    def _highest(self, rows: Float) -> Float:
        """What q can at most be for these rows, now or later, rounding included."""
        along = blas.dtrsm(1.0, self.triangle, rows.T, trans_a=1)
        score = (1 + self.eps) * np.einsum("ij,ij->j", along, along)
        return np.asarray(self._chance((1 + MARGIN) * score))

    def _chance(self, score: Any) -> Any:
        assert self.oversampling is not None
        return np.minimum(1.0, self.oversampling * np.minimum(1.0, score) ** (self.p / 2))
