"""The sketches: unbiased, as accurate as stated, and the same for any cut of the input."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sketching import (
    SKETCHES,
    approximate_lewis_weights,
    cells,
    countsketch,
    gaussian,
    hadamard_rows,
    osnap,
    osnap_entries,
    sketch_size,
    sketched_leverage,
    srht,
)
from scoredraw.coresets.streaming import ChunkBlocks
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine
from scoredraw.uniforms import RowUniforms

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_unbiased(name: str, size: int) -> None:
    """Mean of 800 Gram matrices of 40 rows, r below and above the padded 64, within 4.5 standard
    errors: 8 cases of 6 entries, false alarms 3e-4."""
    A = uneven(40, 3)
    grams = []
    for seed in range(800):
        sketch = SKETCHES[name](A, size, seed, Engine(workers=1))
        assert sketch.shape == (size, 3)
        grams.append((sketch.T @ sketch)[np.triu_indices(3)])
    mean, error = np.mean(grams, 0), np.std(grams, 0) / np.sqrt(800)
    error = np.maximum(error, 1e-12)  # an SRHT of the whole block is orthogonal: no error at all
    assert (np.abs(mean - (A.T @ A)[np.triu_indices(3)]) < 4.5 * error).all()


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_embed_the_columns(name: str) -> None:
    """Singular values of ΠU at the default size: within the order √(d/r) that is stated; the worst
    of 5 seeds is 0.36 for gaussian (√(1/4) and its edge 0.5), 0.2 for the others."""
    d = 24
    Q = np.linalg.qr(uneven(BLOCK_ROWS + 3000, d))[0]
    size = sketch_size(name, d)
    worst = 0.0
    for seed in range(5):
        values = np.linalg.svd(SKETCHES[name](Q, size, seed), compute_uv=False)
        worst = max(worst, np.abs(values - 1).max())
    assert 0.3 * np.sqrt(d / size) < worst < 1.5 * np.sqrt(d / size)


def test_osnap_parts_the_rows_that_countsketch_throws_together() -> None:
    """64 heavy orthogonal rows: in 640 buckets of a CountSketch some meet (chance 0.96 a seed) and
    a direction is lost; OSNAP with as many rows keeps them all."""
    A = np.zeros((3000, 64))
    A[::40][:64] = np.eye(64)
    lost = kept = 0
    for seed in range(10):
        lost += np.linalg.matrix_rank(countsketch(A, 640, seed)) < 64
        kept += np.linalg.matrix_rank(osnap(A, 640, seed)) == 64
    assert lost >= 6
    assert kept == 10


@pytest.mark.parametrize("name", ["countsketch", "osnap", "srht"])
def test_heavy_rows_of_their_own_directions(name: str) -> None:
    """Whatever meets in a bucket: no score too low, and the sum that of the exact ones; but only
    osnap and srht keep the small scores from being too high."""
    A = uneven(20_000, 64)
    A[::300][:64] = 1e5 * np.eye(64)
    exact = leverage_scores(A)
    for seed in range(4):
        near = sketched_leverage(A, sketch=name, rng=seed)
        assert (near / exact).min() > 1 / 3
        assert abs(near.sum() / 64 - 1) < 0.1
        assert name == "countsketch" or (near / exact).max() < 3


def test_where_the_rows_go() -> None:
    """Every range has its entry, buckets are even (4.5 standard deviations), signs are, too."""
    bucket, value = cells(RowUniforms(0), 0, 60_000, 100, 3, 0)
    assert osnap_entries(20, 100) == 3
    assert (bucket[:, 0] < 33).all()
    assert ((bucket[:, 1] >= 33) & (bucket[:, 1] < 66)).all()
    assert ((bucket[:, 2] >= 66) & (bucket[:, 2] < 100)).all()
    count = np.bincount(bucket[:, 0], minlength=33)
    assert np.abs(count - 60_000 / 33).max() < 4.5 * np.sqrt(60_000 / 33)
    np.testing.assert_allclose(np.abs(value), 1 / np.sqrt(3))
    assert abs(np.sign(value).sum()) < 4.5 * np.sqrt(value.size)
    again, _ = cells(RowUniforms(0), 500, 7, 100, 3, 0)
    assert (again == bucket[500:507]).all()


def test_hadamard_by_factors_is_the_matrix() -> None:
    from scipy.linalg import hadamard

    for length in (1, 2, 32, 64, 2048):
        x = uneven(length, 3)
        np.testing.assert_allclose(hadamard_rows(x), hadamard(length) @ x, atol=1e-9)


def test_countsketch_keeps_each_row_once() -> None:
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


@pytest.mark.parametrize("name", SKETCHES)
def test_both_sketches_are_as_accurate_as_stated(name: str) -> None:
    """Of 20,000 rows none off by a factor of four; too large by r/(r - d) on average."""
    A = uneven(20_000, 100)
    exact, size = leverage_scores(A), sketch_size(name, 100)
    ratio = sketched_leverage(A, sketch=name, rng=1) / exact
    assert np.abs(np.log(ratio)).max() < np.log(4)
    assert abs(ratio.mean() * (size - 100) / size - 1) < 0.05
    assert np.median(np.abs(np.log(ratio * (size - 100) / size))) < 0.15


def test_a_small_projection_is_rough() -> None:
    A = uneven(20_000, 100)
    exact = leverage_scores(A)
    error = np.abs(np.log(sketched_leverage(A, rng=1) / exact))
    rough = np.abs(np.log(sketched_leverage(A, size=2000, projection=10, rng=1) / exact))
    assert np.median(rough) > np.median(error)


def test_heavy_rows_are_found() -> None:
    A = uneven(9000, 5)
    A = np.column_stack([A, np.zeros(9000)])
    A[123, 5] = 1e4
    assert sketched_leverage(A, rng=0)[123] > 0.3


@pytest.mark.parametrize("name", SKETCHES)
def test_sparse_cuts_and_workers(name: str) -> None:
    A = uneven(9 * BLOCK_ROWS + 77, 6)
    A[np.abs(A) < 0.5] = 0
    whole = sketched_leverage(A, sketch=name, rng=3)
    assert (whole == sketched_leverage(A, sketch=name, rng=3, engine=Engine(workers=1))).all()
    cut = ChunkBlocks(lambda: np.array_split(A, 37))
    assert (whole == sketched_leverage(cut, sketch=name, rng=3)).all()
    sparse = sketched_leverage(csr_array(A), sketch=name, rng=3)
    np.testing.assert_allclose(sparse, whole, rtol=1e-9)
    assert (leverage_scores(A, method="sketch", sketch=name, rng=3) == whole).all()
    assert (sketched_leverage(A, sketch=name, rng=4) != whole).any()


def test_large_sketches_of_many_blocks() -> None:
    """r above the block: every mixed row is kept, and the sum still embeds."""
    A = uneven(3 * BLOCK_ROWS + 5, 2)
    sketch = srht(A, BLOCK_ROWS + 1000, 0)
    ratio = np.linalg.svd(sketch, compute_uv=False) / np.linalg.svd(A, compute_uv=False)
    assert np.abs(ratio - 1).max() < 0.06


@pytest.mark.parametrize(("p", "name"), [(1, "countsketch"), (1.5, "osnap"), (3, "srht")])
def test_approximate_lewis_weights(p: float, name: str) -> None:
    """All within what leverages off by (1 - √(d/r))^-2 can do to them, power p/2."""
    A = uneven(30_000, 12)
    limit = -max(p, 2) * np.log(1 - np.sqrt(12 / sketch_size(name, 12)))
    A[7] = 0
    exact = lewis_weights(A, p)
    near = approximate_lewis_weights(A, p, sketch=name, rng=0)
    assert near[7] == 0
    ratio = np.delete(near / np.where(exact > 0, exact, 1.0), 7)
    assert np.abs(np.log(ratio)).max() < limit < np.log(4)
    early = approximate_lewis_weights(A, p, sketch=name, rng=0, rounds=1)
    assert np.abs(early - exact).sum() > np.abs(near - exact).sum()
    cut = ChunkBlocks(lambda: np.array_split(A, 37))
    assert (near == approximate_lewis_weights(cut, p, sketch=name, rng=0)).all()
    assert not approximate_lewis_weights(np.zeros((900, 2)), p, rng=0).any()


def test_ill_conditioned_columns() -> None:
    A = uneven(5000, 6)
    A[:, 5] = A[:, 0] + 1e-9 * A[:, 5]
    ratio = sketched_leverage(A, rng=0) / leverage_scores(A)
    assert np.abs(np.log(ratio)).max() < np.log(2)


def test_nan_is_named() -> None:
    A = uneven(5000, 3)
    A[4321, 1] = np.nan
    for name in SKETCHES:
        with pytest.raises(InputError, match="nan at row 4321, column 1"):
            sketched_leverage(A, sketch=name, rng=0)


def test_few_rows_are_scored_exactly_and_bad_arguments() -> None:
    A = uneven(50, 3)
    assert (sketched_leverage(A, rng=0) == leverage_scores(A)).all()
    with pytest.raises(InputError, match="size"):
        sketched_leverage(A, size=2)
    with pytest.raises(InputError, match="projection"):
        sketched_leverage(A, projection=0)
    for sketch in SKETCHES.values():
        with pytest.raises(InputError, match="size"):
            sketch(A, 0)
    with pytest.raises(InputError, match="sketch: got 'hash'"):
        sketched_leverage(A, sketch="hash")
    with pytest.raises(InputError, match="p: got 4"):
        approximate_lewis_weights(A, 4)
    with pytest.raises(InputError, match="rounds"):
        approximate_lewis_weights(A, 1, rounds=0)
