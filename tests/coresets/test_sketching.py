"""The sketches: unbiased, as accurate as stated, and the same for any cut of the input."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.sketching import countsketch, gaussian, sketched_leverage
from scoredraw.coresets.streaming import ChunkBlocks
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


def test_countsketch_is_unbiased_and_keeps_each_row_once() -> None:
    """Mean of 1500 sketched Gram matrices within 4.5 standard errors: 3 entries, 2e-5."""
    A = uneven(40, 2)
    grams = []
    for seed in range(1500):
        sketch = countsketch(A, 16, seed, Engine(workers=1))
        grams.append((sketch.T @ sketch)[np.triu_indices(2)])
    mean, error = np.mean(grams, 0), np.std(grams, 0) / np.sqrt(1500)
    assert (np.abs(mean - (A.T @ A)[np.triu_indices(2)]) < 4.5 * error).all()
    total = np.abs(countsketch(np.eye(40), 16, 0)).sum(0)
    assert total.tolist() == [1.0] * 40


def test_gaussian_entries() -> None:
    """80,000 entries: mean and variance within 4.5 standard errors."""
    G = gaussian(200, 400, 0) * 20
    assert abs(G.mean()) < 4.5 / np.sqrt(G.size)
    assert abs(G.var() - 1) < 4.5 * np.sqrt(2 / G.size)


def test_only_the_sketch() -> None:
    """d = 8, no second sketch: all within a factor of 2.5, and the error falls as 1/√r."""
    A = uneven(9000, 8)
    exact = leverage_scores(A)
    errors = np.array(
        [
            [
                np.abs(np.log(sketched_leverage(A, size=r, rng=seed) / exact)).max()
                for r in (160, 2560)
            ]
            for seed in range(20)
        ]
    )
    assert errors[:, 0].max() < np.log(2.5)
    assert 2 < errors[:, 0].mean() / errors[:, 1].mean() < 8


def test_both_sketches_are_as_accurate_as_stated() -> None:
    A = uneven(20_000, 100)
    exact = leverage_scores(A)
    error = np.abs(np.log(sketched_leverage(A, rng=1) / exact))
    assert error.max() < np.log(4)
    assert np.median(error) < 0.2
    rough = np.abs(np.log(sketched_leverage(A, size=2000, projection=10, rng=1) / exact))
    assert np.median(rough) > np.median(error)


def test_heavy_rows_are_found() -> None:
    A = uneven(9000, 5)
    A = np.column_stack([A, np.zeros(9000)])
    A[123, 5] = 1e4
    assert sketched_leverage(A, rng=0)[123] > 0.3


def test_sparse_cuts_and_workers() -> None:
    A = uneven(2 * BLOCK_ROWS + 77, 6)
    A[np.abs(A) < 0.5] = 0
    whole = sketched_leverage(A, rng=3)
    assert (whole == sketched_leverage(A, rng=3, engine=Engine(workers=1))).all()
    cut = ChunkBlocks(lambda: np.array_split(A, 37))
    assert (whole == sketched_leverage(cut, rng=3)).all()
    np.testing.assert_allclose(sketched_leverage(csr_array(A), rng=3), whole, rtol=1e-9)
    assert (leverage_scores(A, method="sketch", rng=3) == whole).all()


def test_few_rows_are_scored_exactly_and_bad_arguments() -> None:
    A = uneven(50, 3)
    assert (sketched_leverage(A, rng=0) == leverage_scores(A)).all()
    with pytest.raises(InputError, match="size"):
        sketched_leverage(A, size=2)
    with pytest.raises(InputError, match="projection"):
        sketched_leverage(A, projection=0)
    with pytest.raises(InputError, match="size"):
        countsketch(A, 0)
