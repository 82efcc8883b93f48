"""Leverage from a sketch: a random map keeps ‖Ax‖ for every x, so it keeps the leverages.

Two sketches do it. ΠA, a CountSketch of A (each row is added, with a random sign, to one of r
buckets), has r rows instead of n and gives W with ΠAW orthonormal; the columns of AW are then
nearly orthonormal. A Gaussian G with few columns keeps row norms, so that ‖a_i W G‖² costs less
than ‖a_i W‖² where t < d. What remains of the exact computation is one pass over the nonzeros and
one multiplication by t columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.leverage import (
    factor_of_triangle,
    leverage_scores,
    row_norms,
    upper_triangle,
)
from scoredraw.errors import require
from scoredraw.execution import Engine, as_blocks, map_blocks
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]


def sketched_leverage(
    A: Any,
    *,
    size: int | None = None,
    projection: int | None = None,
    rng: Rng = None,
    engine: Engine | None = None,
) -> Float:
    """Approximate leverage scores ‖a_i W G‖², with W from a CountSketch of A and G Gaussian.

    A: (n, d) dense, CSR or blocks of a table. size: buckets r of the sketch, by default
    max(20 d, min(d², 2^14)). projection: columns t of G, entries N(0, 1/t), by default ⌈8 ln n⌉;
    from t ≥ d on G is left out. -> float64 (n,) in [0, 1].

    The sketch keeps ‖Ax‖² to 1 ± O(d/√r) for every x, and each norm of G has relative standard
    deviation √(2/t). With the defaults no score of a million rows should be off by more than a
    factor of four, and most are by less than 20 %; for a size measure that is enough. Where r ≥ n
    the scores are exact. Raises InputError for r < d or t < 1.

    Time O(nnz(A) + r d² + nnz(A) t), memory O(r d). The row's bucket and sign are functions of
    (seed, row), so the result has the same bits for any cut of the input. Drineas, Magdon-Ismail,
    Mahoney, Woodruff 2012 (arXiv 1109.3843); Clarkson and Woodruff 2013 (arXiv 1207.6365).

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((2000, 5))
    >>> ratio = sketched_leverage(A, rng=0) / leverage_scores(A)
    >>> bool(abs(np.log(ratio)).max() < np.log(4))
    True
    """
    blocks = as_blocks(A)
    n, d = blocks.n, blocks.d
    buckets = max(20 * d, min(d * d, 1 << 14)) if size is None else size
    columns = int(np.ceil(8 * np.log(max(n, 2)))) if projection is None else projection
    require(buckets >= d, "size", buckets, f"at least the {d} columns of A")
    require(columns >= 1, "projection", columns, "at least 1")
    if buckets >= n:
        return leverage_scores(blocks, engine=engine)
    uniforms = RowUniforms(rng)
    sketch = countsketch(blocks, buckets, uniforms, engine)
    factor, _ = factor_of_triangle(upper_triangle(sketch), n)
    if columns < factor.shape[1]:
        factor = factor @ gaussian(factor.shape[1], columns, uniforms)
    return np.minimum(row_norms(blocks, factor, engine=engine), 1.0)


def countsketch(
    A: Any, size: int, rng: Rng | RowUniforms = None, engine: Engine | None = None
) -> Float:
    """ΠA, float64 (size, d): row i is added to bucket h(i) with sign s(i), both from its uniform.

    E (ΠA)ᵀ(ΠA) = AᵀA. Time O(nnz(A)), memory O(size d). Charikar, Chen, Farach-Colton 2002.

    >>> import numpy as np
    >>> countsketch(np.ones((6, 1)), 4, 0).shape
    (4, 1)
    """
    from scipy.sparse import csr_array

    blocks = as_blocks(A)
    require(size >= 1, "size", size, "at least 1")
    uniforms = rng if isinstance(rng, RowUniforms) else RowUniforms(rng)

    def part(block: Any, ids: npt.NDArray[np.int64]) -> tuple[Any, Float]:
        u = uniforms.block(int(ids[0]), int(ids[-1]) + 1, stream="countsketch")
        cell = (u * (2 * size)).astype(np.int64)
        bucket, line = np.unique(cell >> 1, return_inverse=True)
        sign = 1.0 - 2.0 * (cell & 1)
        mix = csr_array((sign, (line, np.arange(len(u)))), shape=(len(bucket), len(u)))
        mixed = mix @ block
        return bucket, mixed if isinstance(mixed, np.ndarray) else mixed.toarray()

    total = np.zeros((size, blocks.d))
    for _, (bucket, sums) in map_blocks(part, blocks, np.arange(blocks.n), engine=engine):
        total[bucket] += sums
    return total


def gaussian(rows: int, columns: int, rng: Rng | RowUniforms = None) -> Float:
    """A (rows, columns) matrix of independent N(0, 1/columns) entries: E‖xG‖² = ‖x‖².

    >>> gaussian(3, 2, 0).shape
    (3, 2)
    """
    from scipy.special import ndtri

    uniforms = rng if isinstance(rng, RowUniforms) else RowUniforms(rng)
    u = uniforms.block(0, rows * columns, stream="gaussian").reshape(rows, columns)
    return np.asarray(ndtri(u + 2.0**-54) / np.sqrt(columns))
