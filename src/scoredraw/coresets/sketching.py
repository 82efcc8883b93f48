"""Leverage from a sketch: a random map keeps ‖Ax‖ for every x, so it keeps the leverages.

Two sketches do it. ΠA has r rows instead of n and gives W with ΠAW orthonormal; the columns of AW
are then nearly orthonormal. A Gaussian G with few columns keeps row norms, so that ‖a_i W G‖² costs
less than ‖a_i W‖² where t < d. What remains of the exact computation is the pass that makes ΠA and
one multiplication by t columns. Four maps Π, with E (ΠA)ᵀ(ΠA) = AᵀA each:

    countsketch   every row goes, with a random sign, to one of r buckets         O(nnz)
    osnap         to s = ⌈ln d⌉ of them, scaled by 1/√s                           O(nnz log d)
    srht          blocks of rows are mixed by a Hadamard matrix and subsampled    O(n d log r)
    gaussian      independent N(0, 1/r) entries                                   O(n d r)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import is_tensor
from scoredraw.coresets.leverage import (
    factor_of_gram,
    factor_of_triangle,
    gram,
    leverage_scores,
    row_norms,
    upper_triangle,
)
from scoredraw.errors import require
from scoredraw.execution import BLOCK_ROWS, ArrayBlocks, Blocks, Engine, as_blocks, map_blocks
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

GROUP = 8  # blocks summed into buckets at once: the sums are small beside the rows
GRAM_TO = 1e6  # condition number up to which the sketch is whitened by its Gram matrix
SMALLEST = 64  # rows of the sketches whose size grows as d log d or d
SLAB = 32  # columns mixed at once, so that a block of them stays in the cache
NORMALS = 1 << 22  # Gaussian entries held at a time


def sketched_leverage(
    A: Any,
    *,
    sketch: str = "countsketch",
    size: int | None = None,
    projection: int | None = None,
    rng: Rng = None,
    engine: Engine | None = None,
) -> Float:
    """Approximate leverage scores ‖a_i W G‖², with W from a sketch ΠA and G Gaussian.

    A: (n, d) dense, CSR, blocks of a table, or a torch tensor. sketch: "countsketch", "osnap",
    "srht" or "gaussian". size: rows r of ΠA, by default `sketch_size`. projection: columns t of G,
    entries N(0, 1/t), by default 8⌈ln n⌉; from t ≥ d on G is left out. -> float64 (n,) in [0, 1].

    ΠA keeps ‖Ax‖² to 1 ± O(√(d/r)) for every x (a CountSketch, in the worst case, to 1 ± O(d/√r)),
    which makes the scores too large by r/(r - d) on average, and each norm of G has relative
    standard deviation √(2/t). Measured on a million heavy-tailed rows, d = 256 (the first three
    sketches): the median error is 9 to 10 %, the largest of all a factor of 2.2. Among d rows 10^5
    times as long as the rest, in directions of their own, two may meet in a bucket of a
    CountSketch: the light rows that lie between them then score up to 10^4 times too high, which
    still is so little that the sum of all moves by 2 %; none is too low by more than half, and
    osnap and srht keep to a factor of 2.2 there too. Where r ≥ n the scores are exact.
    Raises InputError for an unknown sketch, r < d or t < 1.

    Time that of the sketch, r d² and nnz(A) t; memory O(r d) and a few blocks. Parts of the time of
    exact scores, for dense A of 1 or 2 GB on two cores:

        d              64    128    256    512   1024
        countsketch   1.0    0.9   0.65   0.45   0.35
        osnap         1.2    1.1   0.95   0.65   0.65
        srht          1.7    1.4    1.1    1.1    0.8

    so that a sketch pays from d = 128 on; the Gaussian one never does (15 at d = 256).
    What a row adds to ΠA is a function of (seed, row), so the result has the same bits for any cut
    of the input. Drineas, Magdon-Ismail, Mahoney, Woodruff 2012 (arXiv 1109.3843); Clarkson and
    Woodruff 2013 (arXiv 1207.6365).

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((2000, 5))
    >>> ratio = sketched_leverage(A, rng=0) / leverage_scores(A)
    >>> bool(abs(np.log(ratio)).max() < np.log(4))
    True
    """
    if is_tensor(A):
        from scoredraw.coresets import tensors

        return tensors.sketched_leverage(
            A, sketch=sketch, size=size, projection=projection, rng=rng
        )
    blocks = as_blocks(A)
    n, d = blocks.n, blocks.d
    rows, columns = sketch_shape(sketch, n, d, size, projection)
    if rows >= n:
        return leverage_scores(blocks, engine=engine)
    uniforms = RowUniforms(rng)
    factor = whitening_of_sketch(SKETCHES[sketch](blocks, rows, uniforms, engine), n)
    if columns < factor.shape[1]:
        factor = factor @ gaussian(factor.shape[1], columns, uniforms)
    return np.minimum(row_norms(blocks, factor, engine=engine), 1.0)


def approximate_lewis_weights(
    A: Any,
    p: float,
    *,
    rounds: int | None = None,
    sketch: str = "countsketch",
    size: int | None = None,
    projection: int | None = None,
    rng: Rng = None,
    engine: Engine | None = None,
) -> Float:
    """lp Lewis weights to a constant factor: the fixed point's iteration on sketched leverages.

    `lewis_weights` with AᵀW^{1-2/p}A replaced by the Gram matrix of a fresh sketch of W^{1/2-1/p}A
    and the row norms by projected ones, for T rounds, by default ⌈log log n⌉ + 3. p < 4: a round
    divides the error that is left by |p+2|/|p-2|, so that constant factors settle first.

    A: (n, d) dense, CSR or blocks of a table; sketch, size, projection as in `sketched_leverage`;
    0 < p < 4. -> float64 (n,) in [0, 1]; zero rows have 0. Measured on heavy-tailed rows, p = 1:
    n = 10^5, d = 64, where G is left out, every weight within 8 %; n = 2·10^5, d = 256 the median
    error 7 %, the largest a factor of 1.6. Where r ≥ n these are `lewis_weights`. Raises
    InputError for p outside (0, 4) or rounds < 1.

    Time T times that of `sketched_leverage`, memory O(n + r d). Cohen and Peng 2015
    (arXiv 1412.0588).

    >>> import numpy as np
    >>> from scoredraw.coresets.lewis import lewis_weights
    >>> A = np.random.default_rng(0).standard_normal((2000, 5))
    >>> ratio = approximate_lewis_weights(A, 1, rng=0) / lewis_weights(A, 1)
    >>> bool(abs(np.log(ratio)).max() < np.log(4))
    True
    """
    from scoredraw.coresets.lewis import LARGEST_LOG, lewis_weights, relaxation

    require(0 < p < 4, "p", p, "0 < p < 4")
    require(rounds is None or rounds >= 1, "rounds", rounds, "at least 1")
    blocks = as_blocks(A)
    n, d = blocks.n, blocks.d
    rows, columns = sketch_shape(sketch, n, d, size, projection)
    turns = int(np.ceil(np.log(np.log(max(n, 3))))) + 3 if rounds is None else rounds
    if rows >= n:
        return lewis_weights(blocks, p, engine=engine)
    uniforms, eta = RowUniforms(rng), relaxation(p)[0]
    log_w, norms = np.full(n, np.log(d / n)), np.ones(n)
    for turn in range(turns):
        top = float(log_w.max())
        exponent = (0.5 - 1 / p) * (np.where(norms > 0, log_w, top) - top)
        scale = np.exp(np.minimum(exponent, LARGEST_LOG))  # the Gram matrix over max w^{1-2/p}
        sketched = SKETCHES[sketch](blocks, rows, uniforms, engine, scale, turn)
        factor = whitening_of_sketch(sketched, n)
        if columns < factor.shape[1]:
            factor = factor @ gaussian(factor.shape[1], columns, uniforms, turn)
        norms = row_norms(blocks, factor, engine=engine)
        if not norms.any():
            return norms
        with np.errstate(divide="ignore", invalid="ignore"):
            change = (p / 2) * (np.log(norms) - (1 - 2 / p) * top) - log_w
        log_w = np.where(norms > 0, log_w + eta * change, -np.inf)
    return np.minimum(np.exp(log_w), 1.0)


def sketch_size(sketch: str, d: int) -> int:
    """The default rows r of a sketch of d columns, for a constant distortion.

    countsketch max(20 d, min(d², 2^14)); osnap and srht 4 d ln d; gaussian 4 d; at least 64.
    Clarkson and Woodruff 2013 (arXiv 1207.6365); Nelson and Nguyen 2013 (arXiv 1211.1002).

    >>> [sketch_size(name, 100) for name in SKETCHES]
    [10000, 1843, 1843, 400]
    """
    require(sketch in SKETCHES, "sketch", repr(sketch), f"one of {', '.join(SKETCHES)}")
    if sketch == "countsketch":
        return max(20 * d, min(d * d, 1 << 14))
    growth = 1.0 if sketch == "gaussian" else max(1.0, float(np.log(d)))
    return max(SMALLEST, int(np.ceil(4 * d * growth)))


def sketch_shape(
    sketch: str, n: int, d: int, size: int | None, projection: int | None
) -> tuple[int, int]:
    """The rows r of ΠA and the columns t of G, given or by default, and checked."""
    rows = sketch_size(sketch, d) if size is None else size
    columns = 8 * int(np.ceil(np.log(max(n, 2)))) if projection is None else projection
    sketch_size(sketch, d)  # names the sketches if this is none
    require(rows >= d, "size", rows, f"at least the {d} columns of A")
    require(columns >= 1, "projection", columns, "at least 1")
    return rows, columns


def whitening_of_sketch(sketch: Float, longest: int) -> Float:
    """W with ΠAW orthonormal, from the Gram matrix of ΠA, or its QR if that is ill-conditioned."""
    rows = ArrayBlocks(sketch)
    rows.finite = True  # if it is not, the Gram matrix is unusable, and says so
    factor, condition = factor_of_gram(gram(rows))
    if condition <= GRAM_TO:
        return factor
    return factor_of_triangle(upper_triangle(sketch), longest)[0]


# ------------------------------------------------------------------ the maps


def countsketch(
    A: Any,
    size: int,
    rng: Rng = None,
    engine: Engine | None = None,
    scale: Float | None = None,
    round: int = 0,
) -> Float:
    """ΠA, float64 (size, d): row i is added to bucket h(i) with sign s(i), both from its uniform.

    E (ΠA)ᵀ(ΠA) = AᵀA. scale: (n,) factors of the rows; round: another independent map.
    Time O(nnz(A)), bound by the memory's speed, memory O(size d) and 8 blocks.
    Charikar, Chen, Farach-Colton 2002.

    >>> import numpy as np
    >>> countsketch(np.ones((6, 1)), 4, 0).shape
    (4, 1)
    """
    return _buckets(as_blocks(A), size, 1, RowUniforms(rng), engine, scale, round)


def osnap(
    A: Any,
    size: int,
    rng: Rng = None,
    engine: Engine | None = None,
    scale: Float | None = None,
    round: int = 0,
) -> Float:
    """ΠA, float64 (size, d): row i is added, scaled by ±1/√s, to one bucket in each of s ranges.

    s = max(1, ⌈ln d⌉) ranges of about size/s buckets: rows that share a bucket are apart in the
    others, so that a few heavy rows don't hide one another as they may in a CountSketch.
    E (ΠA)ᵀ(ΠA) = AᵀA. Time O(nnz(A) s), memory O(size d) and 8 blocks.
    Nelson and Nguyen 2013 (arXiv 1211.1002).

    >>> import numpy as np
    >>> (np.abs(osnap(np.eye(30), 64, 0)) > 0).sum(0).tolist() == [4] * 30
    True
    """
    blocks = as_blocks(A)
    entries = osnap_entries(blocks.d, size)
    return _buckets(blocks, size, entries, RowUniforms(rng), engine, scale, round)


def srht(
    A: Any,
    size: int,
    rng: Rng = None,
    engine: Engine | None = None,
    scale: Float | None = None,
    round: int = 0,
) -> Float:
    """ΠA, float64 (size, d), by a subsampled randomised Hadamard transform of each block, summed.

    A block of B = 2^k rows (8,192; the last padded) adds √(B/r) S P H D A_b to the r rows: D and S
    random signs, H the orthogonal Hadamard matrix, P r of its rows drawn without replacement (for
    r > B all of them, unscaled, at B places of the r). One transform over all n rows would need
    them at once; the sum of blocks embeds as well and can be streamed.

    E (ΠA)ᵀ(ΠA) = AᵀA. Sparse blocks are made dense. Time O(n d log B), as three matrix products a
    block; memory O(size d) and four blocks a thread. Balabanov, Beaupère, Grigori, Lederer 2023
    (arXiv 2210.11295), with the subset P drawn afresh for each block.

    >>> import numpy as np
    >>> srht(np.ones((100, 2)), 16, 0).shape
    (16, 2)
    """
    blocks, uniforms = as_blocks(A), RowUniforms(rng)
    require(size >= 1, "size", size, "at least 1")
    factors = np.ones(blocks.n) if scale is None else scale

    def part(block: Any, ids: Int, weight: Float) -> tuple[Int, Float]:
        dense = block if isinstance(block, np.ndarray) else block.toarray()
        start, length = int(ids[0]), 1 << int(len(dense) - 1).bit_length()
        flip = (weight * signs(uniforms, start, len(dense), "srht rows", round))[:, None]
        kept, places = srht_places(uniforms, start, length, size, round)
        sign = signs(uniforms, start, len(kept), "srht signs", round)
        after = (sign / np.sqrt(min(size, length)))[:, None]
        rows = np.empty((len(kept), dense.shape[1]))
        for first in range(0, dense.shape[1], SLAB):
            columns = slice(first, first + SLAB)
            mixed = np.zeros((length, len(dense[0, columns])))
            np.multiply(dense[:, columns], flip, out=mixed[: len(dense)])
            np.multiply(hadamard_rows(mixed)[kept], after, out=rows[:, columns])
        return places, rows

    total = np.zeros((size, blocks.d))
    ids = np.arange(blocks.n)
    for _, (places, rows) in map_blocks(part, blocks, ids, factors, engine=engine):
        if len(places) == size:
            total += rows
        else:
            total[places] += rows
    return total


def gaussian_sketch(
    A: Any,
    size: int,
    rng: Rng = None,
    engine: Engine | None = None,
    scale: Float | None = None,
    round: int = 0,
) -> Float:
    """ΠA, float64 (size, d), with independent N(0, 1/size) entries, `size` of them a row of A.

    The best embedding for its size and the slowest: 2 n d r operations, and n r normals from the
    rows' own uniforms, so for r = 4 d more than exact leverage. Time O(n d r), memory O(size d).

    >>> import numpy as np
    >>> gaussian_sketch(np.ones((6, 1)), 4, 0).shape
    (4, 1)
    """
    blocks, uniforms = as_blocks(A), RowUniforms(rng)
    require(size >= 1, "size", size, "at least 1")
    factors = np.ones(blocks.n) if scale is None else scale
    step = max(1, NORMALS // size)

    def part(block: Any, ids: Int, weight: Float) -> Float:
        total = np.zeros((size, blocks.d))
        for start in range(0, len(ids), step):
            stop = min(start + step, len(ids))
            entries = normals(uniforms, int(ids[0]) + start, stop - start, size, round)
            # (Bᵀ Π)ᵀ, so that a sparse block stands on the left
            total += np.asarray(block[start:stop].T @ (entries * weight[start:stop, None])).T
        return total

    total = np.zeros((size, blocks.d))
    for _, rows in map_blocks(part, blocks, np.arange(blocks.n), factors, engine=engine):
        total += rows
    return total


def gaussian(rows: int, columns: int, rng: Rng = None, round: int = 0) -> Float:
    """A (rows, columns) matrix of independent N(0, 1/columns) entries: E‖xG‖² = ‖x‖².

    >>> gaussian(3, 2, 0).shape
    (3, 2)
    """
    from scipy.special import ndtri

    u = RowUniforms(rng).block(0, rows * columns, stream="gaussian", round=round)
    return np.asarray(ndtri(u + 2.0**-54).reshape(rows, columns) / np.sqrt(columns))


SKETCHES: dict[str, Callable[..., Float]] = {
    "countsketch": countsketch,
    "osnap": osnap,
    "srht": srht,
    "gaussian": gaussian_sketch,
}


# ------------------------------------------------------------------ where the rows go


def osnap_entries(d: int, size: int) -> int:
    """s = ⌈ln d⌉, at least one and at most a bucket each.

    >>> osnap_entries(256, 5000)
    6
    """
    return min(max(1, int(np.ceil(np.log(d)))), max(size, 1))


def cells(
    uniforms: RowUniforms, start: int, count: int, size: int, entries: int, round: int
) -> tuple[Int, Float]:
    """The buckets (count, entries) of rows start.., one in each range, and ±1/√entries."""
    edges = np.arange(entries + 1) * size // entries
    width = np.diff(edges)
    stream = "countsketch" if entries == 1 else "osnap"
    u = uniforms.block(start * entries, (start + count) * entries, stream=stream, round=round)
    cell = (u.reshape(count, entries) * (2 * width)).astype(np.int64)
    return edges[:-1] + (cell >> 1), (1.0 - 2.0 * (cell & 1)) / np.sqrt(entries)


def signs(uniforms: RowUniforms, start: int, count: int, stream: str, round: int) -> Float:
    """±1 of rows start.. from their uniforms."""
    negative = uniforms.block(start, start + count, stream=stream, round=round) < 0.5
    return np.where(negative, -1.0, 1.0)


def srht_places(
    uniforms: RowUniforms, start: int, length: int, size: int, round: int
) -> tuple[Int, Int]:
    """Which of a block's mixed rows are kept, and to which rows of the sketch they are added."""
    longer = max(length, size)
    u = uniforms.block(start, start + longer, stream="srht subset", round=round)
    chosen = np.sort(np.argsort(u, kind="stable")[: min(length, size)])
    every = np.arange(min(length, size))
    return (chosen, every) if size <= length else (every, chosen)


def normals(uniforms: RowUniforms, start: int, count: int, size: int, round: int) -> Float:
    """N(0, 1/size) entries (count, size) of rows start.., from uniforms of their own."""
    from scipy.special import ndtri

    stream = "gaussian sketch"
    u = uniforms.block(start * size, (start + count) * size, stream=stream, round=round)
    u += 2.0**-54
    ndtri(u, out=u)
    u /= np.sqrt(size)
    return u.reshape(count, size)


def hadamard_rows(matrix: Float) -> Float:
    """H times a matrix (2^k, d), H the Hadamard matrix of ±1 in Sylvester's order.

    H is a Kronecker product; its factors of up to 32 rows are applied as matrix products, which
    costs more operations than the butterflies of the fast transform and passes over memory less.
    """
    length, done, mixed = len(matrix), 1, matrix
    while done < length:
        width = min(32, length // done)
        mixed = np.matmul(_sylvester(width), mixed.reshape(done, width, -1))
        done *= width
    return np.asarray(mixed, np.float64).reshape(matrix.shape)


@cache
def _sylvester(length: int) -> Float:
    from scipy.linalg import hadamard

    return np.asarray(hadamard(length), np.float64)


def _buckets(
    blocks: Blocks,
    size: int,
    entries: int,
    uniforms: RowUniforms,
    engine: Engine | None,
    scale: Float | None,
    round: int,
) -> Float:
    """Signed sums of rows in buckets, a group of blocks at a time: one sparse product each.

    The product reads each row once, in order. It is made by one thread: SciPy holds the
    interpreter's lock in it, and one thread already asks for most of what the memory can give.
    """
    from scipy.sparse import csc_array

    require(size >= 1, "size", size, "at least 1")
    total = np.zeros((size, blocks.d))
    for start, rows in _groups(blocks, size, engine):
        count = rows.shape[0]
        bucket, value = cells(uniforms, start, count, size, entries, round)
        if scale is not None:
            value = value * scale[start : start + count, None]
        pointer = np.arange(count + 1) * entries
        sums = csc_array((value.ravel(), bucket.ravel(), pointer), shape=(size, count)) @ rows
        total += sums if isinstance(sums, np.ndarray) else sums.toarray()
    if not (blocks.finite or np.isfinite(total).all()):
        for _ in map_blocks(lambda block: None, blocks, engine=engine):  # names the row
            pass
    return total


def _groups(blocks: Blocks, size: int, engine: Engine | None) -> Iterator[tuple[int, Any]]:
    """Rows of several blocks together, so many that the sums of a group cost little beside them."""
    together = max(GROUP, -(-8 * size // BLOCK_ROWS))
    if isinstance(blocks, ArrayBlocks):  # in memory here: nothing to send to workers
        for start in range(0, blocks.n, together * BLOCK_ROWS):
            yield start, blocks.dense(blocks.array[start : start + together * BLOCK_ROWS])
            if engine is not None and engine.progress is not None:
                engine.progress(min(start + together * BLOCK_ROWS, blocks.n), blocks.n)
        return
    held: list[Any] = []
    start = 0
    for rows, part in map_blocks(lambda block: block, blocks, engine=engine):
        held.append(part)
        if len(held) == together or rows.stop == blocks.n:
            yield start, _stacked(held)
            held, start = [], rows.stop


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    from scipy.sparse import vstack

    return vstack(parts, format="csr")
