"""Chunks: the same bits as one matrix; merge and reduce: unbiased and bounded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.combined import root_leverage
from scoredraw.coresets.distortion import embedding_distortion
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.streaming import ChunkBlocks, MergeReduce, score_stream
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine
from scoredraw.sampling import poisson, systematic

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


@pytest.mark.parametrize("cuts", [1, 2, 37, 500])
def test_any_cut_gives_the_same_bits(cuts: int) -> None:
    A = uneven(2 * BLOCK_ROWS + 321, 5)
    for method, whole in (
        ("leverage", leverage_scores(A)),
        ("root_leverage", leverage_scores(A) ** 0.5),
        ("lewis", lewis_weights(A, 1)),
    ):
        scores = score_stream(lambda: np.array_split(A, cuts), method, 1)
        assert (scores == whole).all()
        for scheme in (poisson, systematic):
            assert (scheme(scores, 200, rng=1).indices == scheme(whole, 200, rng=1).indices).all()
    draw = root_leverage(ChunkBlocks(lambda: np.array_split(A, cuts)), 1, 300, rng=2)
    assert (draw.indices == root_leverage(A, 1, 300, rng=2).indices).all()


def test_chunks_that_meet_the_blocks_and_empty_ones() -> None:
    A = uneven(3 * BLOCK_ROWS, 3)
    pieces = [A[:0], A[:BLOCK_ROWS], A[BLOCK_ROWS:BLOCK_ROWS], A[BLOCK_ROWS:]]
    blocks = ChunkBlocks(lambda: pieces)
    assert (leverage_scores(blocks) == leverage_scores(A)).all()
    some = list(blocks.parts(1, 2))
    assert (blocks.dense(some[0]) == A[BLOCK_ROWS : 2 * BLOCK_ROWS]).all()
    assert len(some) == 1


def test_sparse_chunks_and_float32() -> None:
    A = uneven(BLOCK_ROWS + 100, 4).astype(np.float32)
    A[np.abs(A) < 0.5] = 0
    sparse = score_stream(lambda: [csr_array(A[:5000]), csr_array(A[5000:])], "leverage")
    np.testing.assert_allclose(sparse, leverage_scores(A), atol=1e-12)
    one = score_stream(lambda: np.array_split(A, 5), "leverage", engine=Engine(workers=1))
    assert (one == leverage_scores(A)).all()


def test_sources_that_are_not() -> None:
    A = uneven(20, 3)
    once: Iterator[Float] = iter([A])
    with pytest.raises(InputError, match="0 rows in a later reading"):
        leverage_scores(ChunkBlocks(lambda: once))
    for source, words in (
        (lambda: [A, A[:, :2]], "2 columns"),
        (list, "no rows"),
        (lambda: [A[0]], "1 dimensions"),
        ([A], "a function"),
    ):
        with pytest.raises(InputError, match=words):
            score_stream(source, "leverage")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nan at row 13"):
        score_stream(lambda: [np.where(np.arange(20)[:, None] == 13, np.nan, A)], "leverage")
    with pytest.raises(InputError, match="method"):
        score_stream(lambda: [A], "sensitivity")


def pushed(A: Float, cuts: int, **options: int) -> MergeReduce:
    state = MergeReduce(p=1, **options)
    for chunk in np.array_split(A, cuts):
        state.push(chunk)
    return state


def test_merge_and_reduce_does_not_see_the_chunks() -> None:
    A = uneven(3333, 3)
    first, rows = pushed(A, 1, size=80, block=400, rng=4).sample()
    for cuts in (2, 37, 1000):
        other, other_rows = pushed(A, cuts, size=80, block=400, rng=4).sample()
        assert (first.indices == other.indices).all()
        assert (first.weights == other.weights).all()
        assert (rows == other_rows).all()
    assert (rows == A[first.indices]).all()
    assert len(np.unique(first.indices)) == len(first)


def test_merge_and_reduce_is_unbiased() -> None:
    """80 draws of a total through three levels, within 4 standard errors (6e-5)."""
    A = uneven(1500, 2)
    terms = np.abs(A @ [1.0, -1.0])
    totals = []
    for seed in range(80):
        draw, rows = pushed(A, 3, size=100, block=200, rng=seed).sample()
        assert draw.n == 1500
        totals.append(draw.weights @ np.abs(rows @ [1.0, -1.0]))
    assert abs(np.mean(totals) - terms.sum()) < 4 * np.std(totals) / np.sqrt(80)


def test_merge_and_reduce_keeps_few_samples_and_the_norms() -> None:
    A = uneven(20_000, 3)
    state = pushed(A, 10, size=300, block=1000, rng=0)
    held = sum(len(level.rows) for level in state.levels if level is not None)
    assert len(state.levels) <= 5
    assert held < 5 * 400
    draw, _ = state.sample()
    again, _ = state.sample()
    assert (draw.indices == again.indices).all()
    assert embedding_distortion(A, draw, 1, n_starts=16).lower < 0.5


def test_bad_streams() -> None:
    state = MergeReduce(p=1, size=5)
    with pytest.raises(InputError, match="no rows yet"):
        state.sample()
    with pytest.raises(InputError, match="NaN"):
        state.push([[np.nan]])
    with pytest.raises(InputError, match="shape"):
        state.push([1.0])
    state.push(np.ones((3, 2)))
    with pytest.raises(InputError, match="columns"):
        state.push(np.ones((3, 3)))
    for options, words in (({"p": 0.5, "size": 5}, "p"), ({"p": 1, "size": 0}, "size")):
        with pytest.raises(InputError, match=words):
            MergeReduce(**options)
