"""lp sensitivities without n large programmes: against a sample, block by block, and their sum.

Three savings that combine. A sample SA that keeps every ‖Ax‖_p makes each programme small. Random
sums of the rows of a block, r = Σ±a_j, make the programmes few: at the x where row i weighs most,
|⟨r, x⟩| ≥ |⟨a_i, x⟩| for at least half of all signs, so the largest of a few sums' sensitivities
stands for every row of the block. And a total needs only a few rows, drawn by their Lewis weights.
What comes out is kept between the bounds that the Lewis weights give for certain.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.combined import (
    lewis_bounds,
    sensitivity_lower_bounds,
    sensitivity_upper_bounds,
)
from scoredraw.coresets.leverage import materialise, whitening
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import (
    Progress,
    lp_sensitivities,
    orthonormal_basis,
    positions,
    solve_programmes,
)
from scoredraw.errors import require
from scoredraw.execution import as_blocks
from scoredraw.sampling import multinomial, poisson
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]

SAMPLE = 32  # rows of the sample a dimension, by default
DRAWS = 16  # of rows for the total, times the largest ratio of sensitivity and Lewis weight


def approximate_sensitivities(
    A: Any,
    p: float,
    sample: float | None = None,
    *,
    rows: Any = None,
    rng: Rng = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Float:
    """Sensitivities against a Lewis-weight sample: σ̃_i = max_x |⟨a_i, x⟩|^p / ‖SAx‖_p^p.

    With ‖SAx‖_p^p within 1 ± ε of ‖Ax‖_p^p, σ̃_i is within 1/(1 ± ε) of σ_i, and each programme has
    about `sample` terms instead of n. A: (n, d) as in `lp_sensitivities`; p in [1, ∞); sample:
    expected rows of the sample (32 d^{max(1, p/2)}; ε falls as 1/√sample); rows: positions of the
    rows wanted (all); progress(done, all) is called as programmes are solved.
    -> float64 (n,) or (len(rows),), kept between the bounds by Lewis weights.
    Raises InputError for p outside [1, ∞) or a sample that loses rank.

    Time O(n sample d² · steps), n programmes. Padmanabhan, Woodruff, Zhang 2023
    (arXiv 2311.04158), with the sample drawn by Lewis weights (Cohen and Peng 2015,
    arXiv 1412.0588).

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((60, 2))
    >>> near = approximate_sensitivities(A, 1, 40, rng=0) / lp_sensitivities(A, 1)
    >>> bool(abs(near - 1).max() < 0.5)
    True
    """
    frame = _frame(A, p, sample, rng)
    wanted = positions(rows, len(frame.basis))
    targets = np.unique(wanted[frame.upper[wanted] > 0])
    sigma = np.zeros(len(frame.basis))
    sigma[targets] = frame.solve(frame.basis[targets], p, workers, progress)
    return np.clip(sigma, frame.lower, frame.upper)[wanted]


def block_sensitivities(
    A: Any,
    p: float = 1.0,
    *,
    block: int = 16,
    signs: int = 4,
    sample: float | None = None,
    rng: Rng = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Float:
    """Sensitivities from signs · n/block programmes: a random block of rows shares one value.

    The rows fall into random blocks; of each, `signs` sums r = Σ±a_j with random signs are made,
    and every row of the block gets the largest sensitivity of a sum against the sample SA, kept
    between the row's bounds by Lewis weights. Up to the sample's distortion and apart from those
    bounds,

        σ_i ≤ σ̃_i  with probability at least 1 - 2^{-signs} for each row, and
        σ̃_i ≤ block^{p-1} Σ_{j in the block} σ_j,  for p = 1 in the mean at most σ_i + 𝔖 block/n.

    A block of more than d/𝔖 ≤ √d rows (p = 1) leaves little but the Lewis weights themselves, as
    the second line then says less than σ_i ≤ w_i.

    A: (n, d) as in `lp_sensitivities`; p in [1, ∞), p = 1 being what it is meant for; block: rows
    of a block; sample: as in `approximate_sensitivities`; progress(done, all), of programmes.
    -> float64 (n,). Raises InputError.

    Time O(signs n/block · sample d² · steps). Padmanabhan, Woodruff, Zhang 2023 (arXiv 2311.04158).

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((400, 3))
    >>> near = block_sensitivities(A, 1, block=10, signs=6, sample=400, rng=0)
    >>> float((near >= lp_sensitivities(A, 1) * (1 - 1e-9)).mean()) > 0.95
    True
    """
    require(block >= 1, "block", block, "at least 1 row")
    require(signs >= 1, "signs", signs, "at least 1")
    frame = _frame(A, p, sample, rng)
    n = len(frame.basis)
    uniforms = RowUniforms(rng)
    order = np.argsort(uniforms.block(0, n, stream="block_order"), kind="stable")
    order = order[frame.upper[order] > 0]
    if not len(order):
        return np.zeros(n)
    starts = np.arange(0, len(order), block)
    sums = np.empty((signs, len(starts), frame.basis.shape[1]))
    for k in range(signs):
        plus = uniforms.block(0, n, stream="block_signs", round=k) < 0.5
        signed = np.where(plus, 1.0, -1.0)[:, None] * frame.basis
        sums[k] = np.add.reduceat(signed[order], starts)
    flat = sums.reshape(-1, sums.shape[2])
    found = np.zeros(len(flat))
    real = np.abs(flat).max(1) > 1e-12 * np.abs(frame.basis).max()  # a sum can cancel
    found[real] = frame.solve(flat[real], p, workers, progress)
    sigma = np.zeros(n)
    sigma[order] = np.repeat(found.reshape(signs, -1).max(0), block)[: len(order)]
    return np.clip(sigma, frame.lower, frame.upper)


def total_sensitivity(
    A: Any,
    p: float,
    *,
    size: int | None = None,
    rng: Rng = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Estimate 𝔖 = Σσ_i from a few exact sensitivities: (Σw / k) Σ σ_i / w_i, k rows drawn ∝ w.

    w: Lewis weights, between σ and K times σ or its inverse, K = d^{|1-p/2|}. The ratios σ_i/w_i
    thus lie in an interval of ratio K, and no distribution on it has a relative variance above
    (K-1)²/4K. size: k; by default 16 K, hence √d for p = 1 up to the constant, with a relative
    standard error of at most 1/8. -> (estimate, standard error); exact, with error 0, where `size`
    reaches the number of nonzero rows. Raises InputError for p outside [1, ∞) or size < 2.

    Time that of `lp_sensitivities` for k rows. Padmanabhan, Woodruff, Zhang 2023
    (arXiv 2311.04158).

    >>> import numpy as np
    >>> total_sensitivity(np.eye(4), 1)
    (4.0, 0.0)
    """
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    require(size is None or size >= 2, "size", size, "at least 2 draws")
    blocks = as_blocks(A)
    weights, info = lewis_weights(blocks, p, return_info=True)
    k = int(np.ceil(DRAWS * info.rank ** abs(1 - p / 2))) if size is None else int(size)
    if k >= np.count_nonzero(weights):
        return float(lp_sensitivities(blocks, p, workers=workers, progress=progress).sum()), 0.0
    draw = multinomial(weights, k, rng=rng)
    rows, sigma = np.unique(draw.indices), np.zeros(blocks.n)
    sigma[rows] = lp_sensitivities(blocks, p, rows=rows, workers=workers, progress=progress)
    value, error = draw.total(sigma)  # draws are weighted by Σw / (k w_i)
    return value, error


def by_method(method: str, A: Any, p: float, rows: Any, options: dict[str, Any]) -> Float:
    """What `lp_sensitivities` gives for a method other than "exact"; options it may take."""
    functions: dict[str, Callable[..., Float]] = {
        "sampled": approximate_sensitivities,
        "block": block_sensitivities,
        "upper": sensitivity_upper_bounds,
        "lower": sensitivity_lower_bounds,
    }
    function = functions[method]
    takes = [name for name in signature(function).parameters if name not in ("A", "p", "rows")]
    offered = {"rng", "workers", "progress"}  # by every call, needed or not
    for name in options:
        known = name in takes or name in offered
        require(known, "options", repr(name), f"{', '.join(takes)} for method={method!r}")
    chosen = {name: value for name, value in options.items() if name in takes}
    if method == "sampled":
        return function(A, p, rows=rows, **chosen)
    blocks = as_blocks(A)
    return function(blocks, p, **chosen)[positions(rows, blocks.n)]


class _Frame(NamedTuple):
    """A whitened sample of the rows, all rows in its coordinates, and their certain bounds."""

    sample: Float
    basis: Float
    lower: Float
    upper: Float

    def solve(
        self, targets: Float, p: float, workers: int | None, progress: Progress | None
    ) -> Float:
        return solve_programmes(self.sample, targets, p, workers, "auto", progress)


def _frame(A: Any, p: float, sample: float | None, rng: Rng) -> _Frame:
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    require(sample is None or sample > 0, "sample", sample, "a positive number of rows")
    matrix = materialise(as_blocks(A))
    weights, info = lewis_weights(matrix, p, return_info=True)
    lower, upper = lewis_bounds(weights, p, info.rank)
    basis = orthonormal_basis(matrix)
    rank = basis.shape[1]
    if not rank:
        return _Frame(basis, basis, lower, upper)
    wanted = SAMPLE * rank ** max(1.0, p / 2) if sample is None else float(sample)
    draw = poisson(weights, min(wanted, float(np.count_nonzero(weights))), rng=rng)
    kept = basis[draw.indices] * draw.weights[:, None] ** (1 / p)
    factor, left = whitening(kept)
    require(left == rank, "sample", f"{wanted:g} rows of rank {left}", f"rows of rank {rank}")
    return _Frame(kept @ factor, basis @ factor, lower, upper)
