"""Online leverage sampling: the row-by-row rule, in chunks; unbiased; the norms kept."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.online import OnlineSampler, online_leverage
from scoredraw.coresets.streaming import ChunkBlocks
from scoredraw.draws import Draw
from scoredraw.errors import InputError
from scoredraw.uniforms import RowUniforms

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


def pushed(A: Float, cuts: int, **options: float) -> OnlineSampler:
    state = OnlineSampler(**options)  # type: ignore[arg-type]
    for chunk in np.array_split(A, cuts):
        state.push(chunk)
    return state


def row_by_row(
    A: Float, p: float, eps: float, delta: float, c: float, seed: int
) -> dict[int, float]:
    """The rule as it stands, a dense inverse for every row."""
    u = RowUniforms(seed).block(0, len(A), stream="online")
    M = np.eye(A.shape[1]) * delta / eps
    kept = {}
    for i, a in enumerate(A):
        score = min(1.0, (1 + eps) * a @ np.linalg.inv(M) @ a)
        q = min(1.0, c * score ** (p / 2))
        if u[i] < q:
            kept[i] = q
            M += np.outer(a, a) / q
    return kept


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_equals_the_rule_row_by_row(p: float) -> None:
    A = uneven(4000, 5)
    A[17] = 0
    want = row_by_row(A, p, 0.3, 0.01, 3.0, seed=4)
    draw, rows = pushed(A, 7, p=p, eps=0.3, delta=0.01, oversampling=3.0, rng=4).sample()
    assert draw.indices.tolist() == list(want)
    np.testing.assert_allclose(draw.inclusion, list(want.values()), rtol=1e-8)
    np.testing.assert_allclose(draw.weights, 1 / np.array(list(want.values())), rtol=1e-8)
    assert (rows == A[draw.indices]).all()
    assert 50 < len(draw) < 2000


@pytest.mark.parametrize("spread", [0.0, 6.0])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_does_not_see_the_chunks(p: float, spread: float) -> None:
    """To the bit; also with columns of units 10^6 apart and a tiny ridge."""
    A = uneven(5000, 6) * 10.0 ** np.linspace(-spread, spread, 6)
    options = {"p": p, "oversampling": 5.0, "rng": 1, "delta": 1e-10}
    first, rows = pushed(A, 1, **options).sample()
    for cuts in (2, 37, 5000):
        other, other_rows = pushed(A, cuts, **options).sample()
        assert (first.indices == other.indices).all()
        assert (first.weights == other.weights).all()
        assert (rows == other_rows).all()
    assert 100 < len(first) < 4000


def test_matrices_tables_and_sparse_rows() -> None:
    A = uneven(9000, 4)
    A[np.abs(A) < 0.3] = 0
    draw = online_leverage(A, oversampling=10, rng=2)
    cut = ChunkBlocks(lambda: np.array_split(A, 37))
    for other in (cut, csr_array(A)):
        same = online_leverage(other, oversampling=10, rng=2)
        assert (same.indices == draw.indices).all()
        assert (same.weights == draw.weights).all()
    sparse = OnlineSampler(oversampling=10, rng=2)
    for chunk in (csr_array(A[:100]), csr_array(A[100:])):
        sparse.push(chunk)
    assert (sparse.sample()[0].indices == draw.indices).all()
    columns = pushed(np.asfortranarray(A), 1, oversampling=10, rng=2).sample()[0]
    assert (columns.weights == draw.weights).all()
    one = pushed(A[:, :1], 2, oversampling=3, rng=2).sample()[0]
    assert 10 < len(one) < 500


def test_totals_are_unbiased_with_the_stated_error() -> None:
    """Mean of 300 totals within 4 standard errors (6e-5); their variance within 40 % of the mean
    of its estimates (the standard deviation of that ratio is about 9 %)."""
    A = uneven(1500, 3)
    f = np.abs(A @ [1.0, -1.0, 0.5])
    draws = [pushed(A, 2, p=1, oversampling=2.0, rng=seed).sample()[0] for seed in range(300)]
    found = np.array([draw.total(f) for draw in draws])
    assert abs(found[:, 0].mean() - f.sum()) < 4 * found[:, 0].std() / np.sqrt(300)
    assert abs(found[:, 0].var() / (found[:, 1] ** 2).mean() - 1) < 0.4


def spectrum(A: Float, draw: Draw) -> Float:
    """Eigenvalues of ÃᵀÃ in the units of AᵀA."""
    kept = A[draw.indices] * np.sqrt(draw.weights)[:, None]
    R = np.linalg.qr(A, "r")
    return np.asarray(np.linalg.svd(np.linalg.solve(R.T, kept.T), compute_uv=False) ** 2)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_guarantee_with_the_default_oversampling(p: float) -> None:
    """(1 - ε) AᵀA - δI ≼ ÃᵀÃ ≼ (1 + ε) AᵀA + δI, δ far below the least eigenvalue."""
    A = uneven(60_000, 8)
    A[40_000:, 7] *= 100  # what was a minor direction becomes the major one late
    for seed in range(3):
        draw = online_leverage(A, p=p, eps=0.5, delta=1e-3, rng=seed)
        values = spectrum(A, draw)
        assert values.min() > 0.5
        assert values.max() < 1.5
        assert draw.unbiased
        assert len(draw) < (6000 if p == 2 else 45_000)


def test_the_count_follows_the_sum_of_online_leverages() -> None:
    """No more than c (1 + ε) Σ online ridge leverage of A itself, over (1 - ε) (sd 3 %)."""
    A, ridge, c = uneven(4000, 4), 0.02, 6.0
    M, total = np.eye(4) * ridge, 0.0
    for a in A:
        total += min(1.0, a @ np.linalg.solve(M, a))
        M += np.outer(a, a)
    draw = pushed(A, 1, eps=0.2, delta=0.2 * ridge, oversampling=c, rng=0).sample()[0]
    assert 0.5 * c * total < len(draw) < 1.5 * c * total


def test_a_late_direction_is_kept() -> None:
    A = np.column_stack([uneven(20_000, 3), np.zeros(20_000)])
    A[19_990, 3] = 1e-2
    draw = online_leverage(A, eps=0.5, delta=1e-6, oversampling=5, rng=0)
    assert 19_990 in draw.indices
    assert draw.weights[draw.indices == 19_990] == 1
    assert leverage_scores(A)[19_990] > 0.99


def test_zero_rows_first_and_only() -> None:
    A = np.vstack([np.zeros((2000, 2)), uneven(500, 2)])
    draw = pushed(A, 3, oversampling=5.0, rng=0).sample()[0]
    assert draw.indices.min() >= 2000
    assert draw.n == 2500
    nothing, rows = pushed(np.zeros((5, 2)), 1, rng=0).sample()
    assert (len(nothing), nothing.n, rows.shape) == (0, 5, (0, 2))


def test_sampling_in_between_changes_nothing() -> None:
    A = uneven(3000, 3)
    state, other = OnlineSampler(oversampling=5, rng=0), OnlineSampler(oversampling=5, rng=0)
    for chunk in np.array_split(A, 4):
        state.push(chunk)
        other.push(chunk)
        early = other.sample()[0]
    assert (state.sample()[0].indices == early.indices).all()
    state.push(A[:0])
    assert state.sample()[0].n == 3000


def test_bad_arguments_and_rows() -> None:
    for options, words in (
        ({"p": 2.5}, "p: got 2.5"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"delta": 0.0}, "delta: got 0.0"),
        ({"oversampling": -1.0}, "oversampling: got -1.0"),
    ):
        with pytest.raises(InputError, match=words):
            OnlineSampler(**options)  # type: ignore[arg-type]
    state = OnlineSampler()
    with pytest.raises(InputError, match="no rows yet"):
        state.sample()
    with pytest.raises(InputError, match="shape"):
        state.push([1.0])
    with pytest.raises(InputError, match="NaN"):
        state.push([[np.nan]])
    with pytest.raises(InputError, match="real numbers"):
        state.push([["a"]])
    state.push(np.ones((3, 2)))
    with pytest.raises(InputError, match="3 columns"):
        state.push(np.ones((3, 3)))
