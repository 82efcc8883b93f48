"""One answer from one core, all cores or Ray: arithmetic on blocks aligned to absolute rows.

Floating-point sums depend on how they are grouped. So everything that decides is computed on
blocks of 8,192 rows that start at multiples of 8,192, each under a single BLAS thread, and the
results are handed back in block order; which worker computed what, and in which pieces a file was
read, cannot show. A pass is

    for rows, part in map_blocks(lambda block: block.T @ block, as_blocks(A)):
        gram += part

`function(block, *slices)` gets a float64 block (b, d) and the block's slices of any vectors.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import on_host
from scoredraw.errors import InputError, import_extra, require

BLOCK_ROWS = 8192
_RAY_BLOCKS = 16  # blocks a Ray task, so that a task is worth its scheduling


@runtime_checkable
class Blocks(Protocol):
    """A matrix (n, d) that can be read as aligned blocks, any number of times, from any block on.

    `parts` yields one cheap handle a block (a view, Arrow slices) in the reading thread; `dense`
    turns it into float64 in the worker; `where` names a row to a person; `finite` is set once a
    whole pass has met neither NaN nor infinity.
    """

    n: int
    d: int
    finite: bool

    def parts(self, first: int, last: int) -> Iterator[Any]: ...
    def dense(self, part: Any) -> Any: ...
    def where(self, row: int, column: int) -> str: ...


@dataclass(frozen=True)
class Engine:
    """Where blocks are computed: `local` threads (None: all cores) or `ray` core tasks.

    progress(rows done, rows in all) is called as a pass goes along.
    """

    kind: str = "local"
    workers: int | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        require(self.kind in ("local", "ray"), "engine", repr(self.kind), "'local' or 'ray'")
        ok = self.workers is None or self.workers >= 1
        require(ok, "workers", self.workers, "at least 1")

    @property
    def threads(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


class ArrayBlocks:
    """Blocks of a NumPy array or SciPy CSR matrix in memory."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.n, self.d = array.shape
        self.finite = False

    def parts(self, first: int, last: int) -> Iterator[Any]:
        for start in range(first * BLOCK_ROWS, min(last * BLOCK_ROWS, self.n), BLOCK_ROWS):
            yield self.array[start : start + BLOCK_ROWS]

    def dense(self, part: Any) -> Any:
        return part.astype(np.float64, copy=False)

    def where(self, row: int, column: int) -> str:
        return f"row {row}, column {column}"


def as_blocks(A: Any) -> Blocks:
    """A matrix as aligned blocks: array-like or tensor (n, d), SciPy sparse, or blocks already.

    Raises InputError unless it is two-dimensional, numeric and not empty.

    >>> blocks = as_blocks([[1.0, 2.0], [3.0, 4.0]])
    >>> blocks.n, blocks.d
    (2, 2)
    """
    if isinstance(A, Blocks):
        return A
    if hasattr(A, "tocsr"):
        matrix = A.tocsr()
    else:
        matrix = np.asarray(on_host(A))
        require(matrix.ndim == 2, "A", f"shape {matrix.shape}", "a matrix (n, d)")
        numeric = matrix.dtype.kind in "fiub"
        require(numeric, "A", f"dtype {matrix.dtype}", "real numbers")
    require(min(matrix.shape) > 0, "A", f"shape {matrix.shape}", "at least one row and one column")
    return ArrayBlocks(matrix)


def map_blocks(
    function: Callable[..., Any],
    blocks: Blocks,
    *vectors: npt.NDArray[Any],
    engine: Engine | None = None,
) -> Iterator[tuple[slice, Any]]:
    """Apply `function(block, *slices)` to every block; yield (rows, result) in block order.

    vectors: arrays (n, ...), cut like the matrix. Blocks run in parallel, each under one BLAS
    thread, and the order and the values of the results do not depend on the engine. Raises
    InputError that names the row on the first NaN or infinity. Memory: a few blocks a worker.

    >>> A = np.arange(6.0).reshape(3, 2)
    >>> [part.tolist() for _, part in map_blocks(lambda block: block.sum(axis=0), as_blocks(A))]
    [[6.0, 9.0]]
    """
    engine = engine or Engine()
    for vector in vectors:
        require(len(vector) == blocks.n, "vector", f"length {len(vector)}", f"{blocks.n}")
    run = _map_ray if engine.kind == "ray" else _map_local
    for rows, result in run(function, blocks, vectors, engine):
        if engine.progress is not None:
            engine.progress(rows.stop, blocks.n)
        yield rows, result
    blocks.finite = True


def _map_local(
    function: Callable[..., Any], blocks: Blocks, vectors: tuple[Any, ...], engine: Engine
) -> Iterator[tuple[slice, Any]]:
    tasks = _tasks(blocks, vectors, 0, _count(blocks))
    with one_blas_thread():
        if engine.threads == 1 or blocks.n <= BLOCK_ROWS:
            for rows, part, slices in tasks:
                yield rows, _compute(function, blocks, rows, part, slices)
            return
        pool = ThreadPoolExecutor(engine.threads)
        waiting: deque[tuple[slice, Future[Any]]] = deque()
        try:
            for rows, part, slices in tasks:
                job = pool.submit(_compute, function, blocks, rows, part, slices)
                waiting.append((rows, job))
                if len(waiting) > 4 * engine.threads:
                    rows, job = waiting.popleft()
                    yield rows, job.result()
            for rows, job in waiting:
                yield rows, job.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _map_ray(
    function: Callable[..., Any], blocks: Blocks, vectors: tuple[Any, ...], engine: Engine
) -> Iterator[tuple[slice, Any]]:
    ray = import_extra("ray", "ray")
    if not ray.is_initialized():
        ray.init(
            num_cpus=engine.workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    task = ray.remote(_compute_range)
    shared = ray.put((function, blocks))
    waiting: deque[Any] = deque()
    total = _count(blocks)
    window = 2 * int(ray.cluster_resources().get("CPU", 1))

    def collect() -> Iterator[tuple[slice, Any]]:
        try:
            yield from ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, InputError) else error) from None

    for first in range(0, total, _RAY_BLOCKS):
        last = min(first + _RAY_BLOCKS, total)
        rows = slice(first * BLOCK_ROWS, min(last * BLOCK_ROWS, blocks.n))
        waiting.append(task.remote(shared, first, last, [v[rows] for v in vectors]))
        if len(waiting) > window:
            yield from collect()
    while waiting:
        yield from collect()


def _compute_range(shared: Any, first: int, last: int, vectors: list[Any]) -> list[Any]:
    """A Ray task: the results of blocks first..last; vectors start at the first of them."""
    function, blocks = shared
    offset = first * BLOCK_ROWS
    results = []
    with one_blas_thread():
        for rows, part, _ in _tasks(blocks, (), first, last):
            slices = [v[rows.start - offset : rows.stop - offset] for v in vectors]
            results.append((rows, _compute(function, blocks, rows, part, slices)))
    return results


def _tasks(
    blocks: Blocks, vectors: tuple[Any, ...], first: int, last: int
) -> Iterator[tuple[slice, Any, list[Any]]]:
    for index, part in enumerate(blocks.parts(first, last), first):
        rows = slice(index * BLOCK_ROWS, min((index + 1) * BLOCK_ROWS, blocks.n))
        yield rows, part, [v[rows] for v in vectors]


def _compute(
    function: Callable[..., Any], blocks: Blocks, rows: slice, part: Any, slices: list[Any]
) -> Any:
    block = blocks.dense(part)
    if not blocks.finite:
        _require_finite(block, blocks, rows.start)
    return function(block, *slices)


def _require_finite(block: Any, blocks: Blocks, start: int) -> None:
    values = block.data if hasattr(block, "tocsr") else block
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):  # one pass without a mask; a sum can overflow, so look again
            return
    if np.isfinite(values).all():
        return
    dense = block.toarray() if hasattr(block, "tocsr") else block
    row, column = (int(i) for i in np.argwhere(~np.isfinite(dense))[0])
    came = f"{dense[row, column]} at {blocks.where(start + row, column)}"
    raise InputError(f"A: got {came}, want finite numbers")


def _count(blocks: Blocks) -> int:
    return -(-blocks.n // BLOCK_ROWS)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, NumPy and SciPy multiply matrices on one core."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@contextmanager
def single_threads(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A thread pool (None: one for each core) whose threads run BLAS on one core each."""
    with one_blas_thread(), ThreadPoolExecutor(Engine(workers=workers).threads) as pool:
        yield pool


@cache
def _libraries() -> Any:
    """The BLAS libraries of this process, looked for once: it takes a while."""
    import scipy.linalg  # noqa: F401  # brings a library of its own
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()
