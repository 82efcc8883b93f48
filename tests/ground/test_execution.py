"""Blocks: what goes in, in which order results come out, and what a broken row says."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine, as_blocks, map_blocks
from scoredraw.tables import open_table

pytestmark = pytest.mark.contract

N = 3 * BLOCK_ROWS + 17


def test_blocks_are_aligned_to_absolute_rows() -> None:
    A = np.arange(2.0 * N).reshape(N, 2)
    table = open_table({"a": A[:, 0], "b": A[:, 1]}, batch_rows=1000)
    for blocks in (as_blocks(A), as_blocks(np.asfortranarray(A)), table.blocks()):
        seen = list(map_blocks(lambda block, v: (block, v), blocks, np.arange(N)))
        edges = [(rows.start, rows.stop) for rows, _ in seen]
        assert edges == [(0, 8192), (8192, 16384), (16384, 24576), (24576, N)]
        for rows, (block, vector) in seen:
            assert block.dtype == np.float64
            np.testing.assert_array_equal(block, A[rows])
            np.testing.assert_array_equal(vector, np.arange(N)[rows])


def test_blocks_of_a_table_can_start_anywhere() -> None:
    table = open_table({"a": np.arange(float(N))}, batch_rows=777)
    blocks = table.blocks()
    for first, last in [(0, 4), (1, 3), (2, 4), (3, 4), (3, 9)]:
        parts = [blocks.dense(part)[:, 0] for part in blocks.parts(first, last)]
        want = np.arange(float(N))[first * BLOCK_ROWS : last * BLOCK_ROWS]
        np.testing.assert_array_equal(np.concatenate(parts), want)
        assert len(parts) == min(last, 4) - first


def test_csr_stays_sparse() -> None:
    matrix = sparse.random_array((N, 5), density=0.1, rng=0, format="coo", dtype=np.float32)
    blocks = as_blocks(matrix)
    parts = [part for _, part in map_blocks(lambda block: block, blocks)]
    assert all(part.format == "csr" and part.dtype == np.float64 for part in parts)
    assert abs(sparse.vstack(parts) - matrix).max() == 0


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_however_long_they_take(workers: int) -> None:
    """The first block waits for the third: with two threads or more the later one is done first."""
    third = threading.Event()
    progress = []

    def slow_first(block):
        if block[0, 0] == 0 and workers > 2:
            assert third.wait(10)
        if block[0, 0] == 2 * BLOCK_ROWS:
            third.set()
        return block[0, 0]

    A = np.arange(float(N))[:, None]
    engine = Engine(workers=workers, progress=lambda done, n: progress.append((done, n)))
    found = [value for _, value in map_blocks(slow_first, as_blocks(A), engine=engine)]
    assert found == [0, 8192, 16384, 24576]
    assert progress == [(8192, N), (16384, N), (24576, N), (N, N)]


def test_one_blas_thread_a_block() -> None:
    import threadpoolctl

    def blas_threads(_) -> set[int]:
        libraries = threadpoolctl.threadpool_info()
        return {lib["num_threads"] for lib in libraries if lib["user_api"] == "blas"}

    for workers in (1, 2):
        engine = Engine(workers=workers)
        for _, threads in map_blocks(blas_threads, as_blocks(np.ones((N, 1))), engine=engine):
            assert threads <= {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_broken_row_is_named(value: float, workers: int) -> None:
    A = np.ones((N, 3))
    A[20_001, 2] = A[24_000, 0] = value
    for data, where in [
        (as_blocks(A), "row 20001, column 2"),
        (as_blocks(sparse.csr_array(A)), "row 20001, column 2"),
        (open_table(A).blocks(), "row 20,001, column 'x2'"),
    ]:
        with pytest.raises(InputError) as error:
            list(map_blocks(lambda block: None, data, engine=Engine(workers=workers)))
        assert str(error.value) == f"A: got {value} at {where}, want finite numbers"
        assert not data.finite


def test_a_whole_pass_is_remembered() -> None:
    blocks = as_blocks(np.full((N, 1), 1e308))  # its sum overflows, its values do not
    list(map_blocks(lambda block: None, blocks))
    assert blocks.finite
    half = as_blocks(np.ones((N, 1)))
    next(iter(map_blocks(lambda block: None, half)))
    assert not half.finite


def test_errors_of_the_function_stop_the_pass() -> None:
    def fail(block):
        raise ZeroDivisionError("mine")

    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(map_blocks(fail, as_blocks(np.ones((N, 1))), engine=Engine(workers=workers)))


@pytest.mark.parametrize(
    ("A", "word"),
    [
        (np.ones(3), "A: got shape"),
        (np.ones((0, 2)), "A: got shape"),
        (np.ones((2, 0)), "A: got shape"),
        (np.ones((2, 2), complex), "A: got dtype complex128"),
        (np.array([["a"]]), "A: got dtype <U1"),
        (sparse.csr_array((0, 3)), "A: got shape"),
    ],
)
def test_what_is_not_a_matrix(A, word: str) -> None:
    with pytest.raises(InputError, match=f"^{word}"):
        as_blocks(A)


def test_engines_and_vectors() -> None:
    for call, word in [
        (lambda: Engine("spark"), "engine: got 'spark'"),
        (lambda: Engine(workers=0), "workers: got 0"),
        (lambda: list(map_blocks(len, as_blocks(np.ones((3, 1))), np.ones(2))), "vector"),
    ]:
        with pytest.raises(InputError, match=f"^{word}"):
            call()


def test_blocks_hold_every_kind_of_number() -> None:
    from decimal import Decimal

    table = pa.table(
        {
            "int": pa.array([1, 2, 2**60], pa.int64()),
            "small": pa.array([0, 255, 3], pa.uint8()),
            "half": pa.array(np.array([0.5, 1.5, 2.5], np.float16)),
            "bool": [True, False, True],
            "decimal": pa.array([Decimal("1.25"), Decimal("-2.5"), Decimal(0)]),
            "list": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2)),
            "text": ["a", "b", "c"],
        }
    )
    want = [
        [1, 0, 0.5, 1, 1.25, 1, 2],
        [2, 255, 1.5, 0, -2.5, 3, 4],
        [2**60, 3, 2.5, 1, 0, 5, 6],
    ]
    blocks = open_table(table).blocks()
    assert (blocks.n, blocks.d) == (3, 7)
    [(_, block)] = map_blocks(lambda block: block, blocks)
    assert block.tolist() == want
    sliced = open_table(table.slice(1)).blocks()
    [(_, block)] = map_blocks(lambda block: block, sliced)
    assert block.tolist() == want[1:]


@pytest.mark.parametrize(
    ("column", "row"),
    [
        (pa.array([1, None, 3]), 1),
        (pa.array([True, False, None]), 2),
        (pa.array([None, None, None], pa.float64()), 0),
        (pa.array([1, None, 2], pa.decimal128(5, 2)), 1),
        (pa.array([[1.0, 2.0], [None, 1.0], [1.0, 2.0]], pa.list_(pa.float64(), 2)), 1),
        (pa.array([[1.0, 2.0], [1.0, 2.0], None], pa.list_(pa.float64(), 2)), 2),
    ],
)
def test_missing_values_are_not_numbers(column, row: int) -> None:
    blocks = open_table(pa.table({"v": column})).blocks()
    with pytest.raises(InputError, match=rf"^A: got nan at row {row}, column 'v'"):
        list(map_blocks(lambda block: None, blocks))
