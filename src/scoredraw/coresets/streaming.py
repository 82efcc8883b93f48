"""Rows that come in chunks: two passes over a source that can be read again, or one over a stream.

Two passes give what the whole matrix in memory gives, to the bit: chunks of any lengths are cut
anew into the aligned blocks on which everything is computed. Where a second reading is impossible,
merge and reduce keeps a weighted sample of each block, merges two samples of the same age, reduces
the merged one, and so on up a binary tree: log₂(n/B) reductions deep, in memory of that many
samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.combined import root_leverage_scores
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require
from scoredraw.execution import BLOCK_ROWS, Blocks, Engine
from scoredraw.sampling import calibrate_inclusion
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Source = Callable[[], Iterable[Any]]

SCORES = ("leverage", "root_leverage", "lewis")


class ChunkBlocks:
    """Blocks of a matrix that `source()` yields as chunks of rows, afresh at each call.

    source: a function without arguments giving an iterable of arrays (k, d) or CSR matrices, the
    same rows each time, cut in any way. One reading counts the rows. Raises InputError if the
    chunks differ in width, there are none, or a later reading has fewer or more rows.

    >>> import numpy as np
    >>> blocks = ChunkBlocks(lambda: (np.ones((k, 2)) for k in (3, 5)))
    >>> blocks.n, blocks.d
    (8, 2)
    """

    def __init__(self, source: Source) -> None:
        require(callable(source), "source", type(source).__name__, "a function that starts a pass")
        self.source = source
        self.finite = False
        self.n, self.d = 0, 0
        for chunk in source():
            require(np.ndim(chunk) == 2, "source", f"a chunk of {np.ndim(chunk)} dimensions", "2")
            same = self.n == 0 or chunk.shape[1] == self.d
            require(same, "source", f"a chunk of {chunk.shape[1]} columns", f"{self.d}")
            self.n, self.d = self.n + chunk.shape[0], chunk.shape[1]
        require(self.n > 0, "source", "no rows", "at least one chunk of rows")

    def parts(self, first: int, last: int) -> Iterator[list[Any]]:
        held: list[Any] = []
        count = read = 0
        block = 0
        for chunk in self.source():
            read += chunk.shape[0]
            while count + chunk.shape[0] >= BLOCK_ROWS:
                cut = BLOCK_ROWS - count
                held.append(chunk[:cut])
                if block >= first:
                    yield held
                held, count, chunk = [], 0, chunk[cut:]
                block += 1
                if block == last:
                    return
            if chunk.shape[0]:
                held.append(chunk)
                count += chunk.shape[0]
        require(read == self.n, "source", f"{read} rows in a later reading", f"{self.n} each time")
        if held and first <= block < last:
            yield held

    def dense(self, part: list[Any]) -> Any:
        if hasattr(part[0], "tocsr"):
            from scipy.sparse import vstack

            return vstack(part, format="csr").astype(np.float64, copy=False)
        whole = part[0] if len(part) == 1 else np.concatenate(part)
        return np.ascontiguousarray(whole, np.float64)

    def where(self, row: int, column: int) -> str:
        return f"row {row}, column {column}"


def score_stream(
    source: Source, method: str = "lewis", p: float = 1.0, *, engine: Engine | None = None
) -> Float:
    """Scores of rows that come in chunks, equal to the bit to those of the whole matrix.

    source: as in `ChunkBlocks`. method: "leverage", "root_leverage" (τ^{p/2}) or "lewis".
    -> float64 (n,). Memory: the scores and a few blocks. The number of readings is that of the
    method's passes plus one.

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((100, 3))
    >>> once = score_stream(lambda: [A], "leverage")
    >>> cut = score_stream(lambda: np.array_split(A, 37), "leverage")
    >>> bool((once == cut).all())
    True
    """
    require(method in SCORES, "method", repr(method), f"one of {', '.join(SCORES)}")
    blocks: Blocks = ChunkBlocks(source)
    if method == "leverage":
        return leverage_scores(blocks, engine=engine)
    if method == "root_leverage":
        return root_leverage_scores(blocks, p, engine=engine)
    return lewis_weights(blocks, p, engine=engine)


@dataclass
class Sample:
    """Rows of a stream with their positions and weights."""

    rows: Float
    positions: Int
    weights: Float


@dataclass
class MergeReduce:
    """One pass: a weighted sample of a stream, for lp norms, by merge and reduce.

    size: expected rows of each reduced sample; block: rows gathered before the first reduction, at
    least twice the size. Each reduction draws independently with q ∝ the lp Lewis weights of the
    rows scaled by weight^{1/p} and divides the weights by q, so totals stay unbiased. The error of
    a reduction adds up over log₂(n/block) levels: for the quality of a two-pass sample take `size`
    larger by about the square of that. The result does not depend on the chunks of `push`.

    Time O(n d²) times the steps of the weights, memory O((size log(n/block) + block) d). Bentley
    and Saxe 1980; Agarwal, Har-Peled, Varadarajan 2004, "Approximating extent measures of points".

    >>> import numpy as np
    >>> state = MergeReduce(p=1, size=100, block=400, rng=0)
    >>> for chunk in np.array_split(np.random.default_rng(0).standard_normal((3000, 3)), 7):
    ...     state.push(chunk)
    >>> draw, rows = state.sample()
    >>> 50 < len(draw) < 160, rows.shape == (len(draw), 3)
    (True, True)
    """

    p: float
    size: int
    block: int = BLOCK_ROWS
    rng: Rng = None
    seen: int = 0
    levels: list[Sample | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.p >= 1 and np.isfinite(self.p), "p", self.p, "1 <= p < infinity")
        require(self.size >= 1, "size", self.size, "at least 1")
        self.block = max(self.block, 2 * self.size)
        self._uniforms = RowUniforms(self.rng)
        self._buffer: list[Float] = []
        self._waiting = 0
        self._steps = 0

    def push(self, chunk: Any) -> None:
        """Take the next rows, (k, d). Raises InputError for NaN, infinity or another width."""
        rows = np.asarray(chunk, np.float64)
        require(rows.ndim == 2, "chunk", f"shape {rows.shape}", "rows (k, d)")
        require(bool(np.isfinite(rows).all()), "chunk", "NaN or infinity", "finite numbers")
        if self._buffer and rows.shape[1] != self._buffer[0].shape[1]:
            raise InputError(f"chunk: got {rows.shape[1]} columns, want {self._buffer[0].shape[1]}")
        self._buffer.append(rows)
        self._waiting += len(rows)
        if self._waiting < self.block:
            return
        pool = np.concatenate(self._buffer)
        full = len(pool) - len(pool) % self.block
        for start in range(0, full, self.block):
            self._add(self._fresh(pool[start : start + self.block]))
        self._buffer, self._waiting = [pool[full:]], len(pool) - full

    def sample(self) -> tuple[Draw, Float]:
        """The draw so far, unbiased, with positions in the stream, and its rows (k, d)."""
        require(self.seen + self._waiting > 0, "sample", "no rows yet", "rows pushed before")
        parts = [level for level in self.levels if level is not None]
        if self._waiting:
            start = self.seen
            parts.append(self._fresh(np.concatenate(self._buffer)))
            self.seen = start
        whole = self._reduce(_joined(parts), round=1 << 20)
        order = np.argsort(whole.positions)
        draw = Draw(
            whole.positions[order],
            whole.weights[order],
            self.seen + self._waiting,
            unbiased=True,
            method=f"merge_reduce(p={self.p:g})",
            info={"design": "independent"},
        )
        return draw, whole.rows[order]

    def _fresh(self, rows: Float) -> Sample:
        positions = np.arange(self.seen, self.seen + len(rows))
        self.seen += len(rows)
        return Sample(rows, positions, np.ones(len(rows)))

    def _add(self, sample: Sample) -> None:
        """Reduce the block; carry it up the tree, as in adding one to a binary number."""
        carried = self._reduce(sample, round=0)
        for level, other in enumerate(self.levels):
            if other is None:
                self.levels[level] = carried
                return
            self.levels[level] = None
            carried = self._reduce(_joined([other, carried]), round=level + 1)
        self.levels.append(carried)

    def _reduce(self, sample: Sample, round: int) -> Sample:
        if len(sample.rows) <= self.size:
            return sample
        with warnings.catch_warnings():  # a block of a stream may well lack a direction
            warnings.simplefilter("ignore", np.exceptions.RankWarning)
            scaled = sample.rows * (sample.weights ** (1 / self.p))[:, None]
            small = Engine(workers=1) if len(scaled) <= BLOCK_ROWS else None
            scores = lewis_weights(scaled, self.p, tol=1e-3, engine=small)
        if not scores.any():
            return Sample(sample.rows[:0], sample.positions[:0], sample.weights[:0])
        q, _ = calibrate_inclusion(scores, self.size)
        kept = self._uniforms.at(sample.positions, stream="merge_reduce", round=round) < q
        return Sample(sample.rows[kept], sample.positions[kept], sample.weights[kept] / q[kept])


def _joined(parts: list[Sample]) -> Sample:
    return Sample(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )
