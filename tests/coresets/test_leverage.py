"""Leverage: sums, invariances, ill-conditioning, sparse and degenerate input, partition."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array, random_array

from scoredraw.coresets.leverage import (
    default_ridge,
    leverage_scores,
    ridge_leverage_scores,
    whitening,
)
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]
RankWarning = np.exceptions.RankWarning


def gaussian(n: int, d: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((n, d))


def svd_leverage(A: Float) -> Float:
    return np.asarray((np.linalg.svd(A, full_matrices=False)[0] ** 2).sum(1))


@pytest.mark.parametrize("method", ["auto", "gram", "qr"])
def test_equals_the_svd_and_sums_to_the_rank(method: str) -> None:
    A = gaussian(BLOCK_ROWS + 1000, 7)
    tau = leverage_scores(A, method=method)
    np.testing.assert_allclose(tau, svd_leverage(A), atol=1e-13)
    assert abs(tau.sum() - 7) < 1e-10


def test_equals_the_hat_diagonal_of_statsmodels() -> None:
    linear_model = pytest.importorskip("statsmodels.regression.linear_model")
    A = np.column_stack([gaussian(80, 4), np.ones(80)])
    fit = linear_model.OLS(gaussian(80, 1)[:, 0], A).fit()
    np.testing.assert_allclose(leverage_scores(A), fit.get_influence().hat_matrix_diag, atol=1e-12)


def test_identity_and_hadamard_rows() -> None:
    from scipy.linalg import hadamard

    np.testing.assert_allclose(leverage_scores(np.eye(5)), 1, atol=1e-14)
    np.testing.assert_allclose(leverage_scores(hadamard(16)[:, :4].astype(float)), 0.25, atol=1e-14)


@pytest.mark.property
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6), spread=st.floats(0, 4))
def test_any_basis_of_the_columns_gives_the_same(seed: int, d: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((30, d))
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0] * 10 ** rng.uniform(-spread, spread, d)
    np.testing.assert_allclose(leverage_scores(A @ turn), leverage_scores(A), atol=1e-9)


@pytest.mark.property
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), factor=st.floats(1, 100))
def test_a_longer_row_lowers_every_other(seed: int, factor: float) -> None:
    A = np.random.default_rng(seed).standard_normal((12, 3))
    longer = A.copy()
    longer[4] *= factor
    before, after = leverage_scores(A), leverage_scores(longer)
    assert (np.delete(after - before, 4) < 1e-12).all()
    assert after[4] >= before[4] - 1e-12


def gram_schmidt_leverage(A: Float) -> Float:
    """By twice repeated Gram-Schmidt in extended precision."""
    Q = A.astype(np.longdouble)
    for j in range(Q.shape[1]):
        for _ in range(2):
            Q[:, j] -= Q[:, :j] @ (Q[:, :j].T @ Q[:, j])
        Q[:, j] /= np.sqrt((Q[:, j] ** 2).sum())
    return np.asarray((Q**2).sum(1), np.float64)


@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-9])
def test_nearly_dependent_columns_keep_their_digits(gap: float) -> None:
    A = gaussian(3000, 6)
    A[:, 5] = A[:, 0] + gap * A[:, 5]
    want = gram_schmidt_leverage(A)
    error = np.abs(leverage_scores(A) - want).max()
    assert error < 100 * np.finfo(float).eps / gap  # what rounding A itself would do
    assert abs(leverage_scores(A).sum() - 6) < 1e-10


def test_hopeless_columns_are_dropped_with_a_warning() -> None:
    A = gaussian(500, 4)
    collinear = np.column_stack([A, A[:, 0] + 1e-17 * A[:, 1], A.sum(1)])
    with pytest.warns(RankWarning, match="rank 4 of 6"):
        tau = leverage_scores(collinear)
    np.testing.assert_allclose(tau, leverage_scores(A), atol=1e-10)
    with pytest.warns(RankWarning):
        assert whitening(collinear).rank == 4


def test_zero_rows_and_zero_columns() -> None:
    A = gaussian(50, 3)
    A[7] = 0
    with pytest.warns(RankWarning, match="rank 3 of 4"):
        tau = leverage_scores(np.column_stack([A, np.zeros(50)]))
    assert tau[7] == 0
    np.testing.assert_allclose(tau, svd_leverage(A), atol=1e-13)
    with pytest.warns(RankWarning, match="rank 0"):
        assert leverage_scores(np.zeros((4, 2))).tolist() == [0, 0, 0, 0]


def test_more_columns_than_rows() -> None:
    with pytest.warns(RankWarning, match="every row has leverage 1"):
        assert leverage_scores(gaussian(4, 9)).tolist() == [1, 1, 1, 1]
    A = gaussian(5, 9)
    A[3], A[4] = A[2], 0
    for matrix in (A, csr_array(A)):
        with pytest.warns(RankWarning, match="rank 3"):
            np.testing.assert_allclose(leverage_scores(matrix), [1, 1, 0.5, 0.5, 0], atol=1e-12)


def test_extreme_units() -> None:
    A = gaussian(200, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1e-200, 1e-10, 1e160, 1e200):
            np.testing.assert_allclose(leverage_scores(A * scale), svd_leverage(A), atol=1e-12)


def test_float32_is_computed_in_float64() -> None:
    A = gaussian(1000, 5).astype(np.float32)
    np.testing.assert_allclose(leverage_scores(A), svd_leverage(A.astype(float)), atol=1e-13)


def test_sparse_equals_dense() -> None:
    A = random_array((BLOCK_ROWS + 500, 20), density=0.2, rng=np.random.default_rng(0))
    sparse = csr_array(A)
    np.testing.assert_allclose(
        leverage_scores(sparse), leverage_scores(sparse.toarray()), atol=1e-12
    )
    np.testing.assert_allclose(
        leverage_scores(sparse, method="qr"), leverage_scores(sparse), atol=1e-12
    )


def test_bits_do_not_depend_on_workers() -> None:
    A = gaussian(5 * BLOCK_ROWS // 2, 9)
    for method in ("gram", "qr"):
        one, two, seven = (
            leverage_scores(A, method=method, engine=Engine(workers=w)) for w in (1, 2, 7)
        )
        assert (one == two).all()
        assert (one == seven).all()


def test_ridge() -> None:
    A = gaussian(300, 5) * [1, 2, 3, 4, 5]
    for ridge in (1e-9, 1.0, 1e3):
        want = np.einsum("ij,ij->i", A @ np.linalg.inv(A.T @ A + ridge * np.eye(5)), A)
        np.testing.assert_allclose(ridge_leverage_scores(A, ridge), want, atol=1e-12)
    squares = np.linalg.svd(A, compute_uv=False) ** 2
    strength = default_ridge(squares)
    effective = (squares / (squares + strength)).sum()
    got = ridge_leverage_scores(A)
    assert abs(got.sum() - effective) < 1e-10
    k = int(np.searchsorted(np.cumsum(squares), 0.9 * squares.sum())) + 1
    assert effective <= 2 * k
    np.testing.assert_allclose(ridge_leverage_scores(A, 0), leverage_scores(A))
    wide = gaussian(4, 9)
    want = np.diag(wide @ np.linalg.inv(wide.T @ wide + 2 * np.eye(9)) @ wide.T)
    np.testing.assert_allclose(ridge_leverage_scores(wide, 2.0), want, atol=1e-12)


@pytest.mark.parametrize(
    ("A", "words"),
    [
        (np.ones(3), "matrix"),
        (np.array([[1.0], [np.nan]]), "nan at row 1"),
        (np.array([[np.inf, 1.0]]), "inf at row 0"),
        (np.zeros((0, 3)), "at least one row"),
    ],
)
def test_bad_matrices(A: Float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        leverage_scores(A)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="method"):
        leverage_scores(np.eye(2), method="svd")
    with pytest.raises(InputError, match="ridge"):
        ridge_leverage_scores(np.eye(2), -1.0)


@pytest.mark.contract
def test_the_room_is_cheap_to_import() -> None:
    code = "import sys, scoredraw.coresets as c; assert 'LpRowSampler' in dir(c); "
    code += "assert not {'sklearn', 'scipy', 'numpy'} & set(sys.modules); c.lewis_weights; "
    code += "assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
