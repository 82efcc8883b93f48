"""Lewis weights: closed forms, the fixed point, its rate, monotonicity, degenerate input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning

from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights, relaxation
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def gaussian(n: int, d: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((n, d))


def fixed_point_residual(A: Float, w: Float, p: float) -> float:
    gram = (A.T * w ** (1 - 2 / p)) @ A
    image = np.einsum("ij,ij->i", A @ np.linalg.inv(gram), A)
    return float(np.abs(np.log(image ** (p / 2) / w)).max())


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2.5, 3, 3.9, 4, 6, 10])
def test_the_equation_and_the_sum(p: float) -> None:
    A = gaussian(200, 5) * np.random.default_rng(1).exponential(1, (200, 1))
    w, info = lewis_weights(A, p, return_info=True)
    assert info.converged
    assert info.rank == 5
    assert fixed_point_residual(A, w, p) < 1e-9
    assert abs(w.sum() - 5) < 1e-8


@pytest.mark.parametrize("p", [0.3, 1, 1.7, 3, 8, 30])
def test_one_column(p: float) -> None:
    a = np.random.default_rng(0).exponential(1, 40)
    want = a**p / (a**p).sum()
    np.testing.assert_allclose(lewis_weights(a[:, None], p, max_iter=600), want, rtol=1e-7)


@pytest.mark.parametrize("p", [1, 1.5, 3, 5])
def test_blocks_of_columns_do_not_see_each_other(p: float) -> None:
    A, B = gaussian(30, 2), 1e3 * gaussian(20, 3, seed=1)
    joined = np.block([[A, np.zeros((30, 3))], [np.zeros((20, 2)), B]])
    want = np.concatenate([lewis_weights(A, p), lewis_weights(B, p)])
    np.testing.assert_allclose(lewis_weights(joined, p), want, rtol=1e-8)


def test_copies_share_the_weight() -> None:
    A = gaussian(30, 3)
    for p in (1.0, 3.0):
        once, thrice = lewis_weights(A, p), lewis_weights(np.repeat(A, 3, axis=0), p)
        # three copies are one row times 3^(1/p)
        scaled = A.copy()
        scaled[:5] *= 3 ** (1 / p)
        partly = lewis_weights(np.vstack([A, A[:5], A[:5]]), p)
        np.testing.assert_allclose(thrice, np.repeat(once / 3, 3), rtol=1e-8)
        np.testing.assert_allclose(partly[:30][5:], lewis_weights(scaled, p)[5:], rtol=1e-8)


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 3, 4, 6, 12])
def test_the_error_falls_at_the_stated_rate(p: float) -> None:
    """Between steps 10 and 20 the residual shrinks by |p-2|/(p+2) a step, or faster."""
    A = gaussian(500, 4) * np.random.default_rng(2).exponential(1, (500, 1))

    def residual(steps: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            info = lewis_weights(A, p, tol=1e-300, max_iter=steps, return_info=True)[1]
        return info.residual

    early, late = residual(6), residual(12)
    rate = relaxation(p)[1]
    assert (late / early) ** (1 / 6) < rate + 0.03
    plain = abs(p / 2 - 1)
    assert rate < plain


@pytest.mark.property
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), p=st.sampled_from([1.0, 1.5, 3.0, 5.0]))
def test_any_basis_of_the_columns_gives_the_same(seed: int, p: float) -> None:
    rng = np.random.default_rng(seed)
    A, turn = rng.standard_normal((40, 4)), rng.standard_normal((4, 4)) * [1, 1e3, 1e-3, 1]
    np.testing.assert_allclose(lewis_weights(A @ turn, p), lewis_weights(A, p), rtol=1e-6)


@pytest.mark.property
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), p=st.sampled_from([1.0, 1.3, 2.0]), factor=st.floats(1, 30))
def test_a_longer_row_lowers_every_other_up_to_two(seed: int, p: float, factor: float) -> None:
    A = np.random.default_rng(seed).standard_normal((12, 3))
    longer = A.copy()
    longer[4] *= factor
    change = lewis_weights(longer, p) - lewis_weights(A, p)
    assert (np.delete(change, 4) < 1e-9).all()


def test_beyond_two_a_longer_row_may_raise_another() -> None:
    raised = 0
    for seed in range(40):
        A = gaussian(12, 3, seed)
        longer = A.copy()
        longer[4] *= 3
        raised += bool((np.delete(lewis_weights(longer, 3) - lewis_weights(A, 3), 4) > 1e-6).any())
    assert raised > 0


def test_ill_conditioned_columns() -> None:
    A = gaussian(400, 4)
    close = A.copy()
    close[:, 3] = A[:, 0] + 1e-6 * A[:, 3]
    mixed = A @ np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1e-6]])
    np.testing.assert_allclose(close, mixed, atol=1e-12)
    for p in (1.0, 4.0):
        np.testing.assert_allclose(lewis_weights(mixed, p), lewis_weights(A, p), rtol=1e-6)


def test_degenerate_rows_and_columns() -> None:
    A = gaussian(60, 3)
    A[5] = 0
    for p in (1.0, 3.0):
        w = lewis_weights(A, p)
        assert w[5] == 0
        np.testing.assert_allclose(np.delete(w, 5), lewis_weights(np.delete(A, 5, 0), p), rtol=1e-8)
        with pytest.warns(np.exceptions.RankWarning, match="rank 3 of 4"):
            dependent = lewis_weights(np.column_stack([A, A[:, 0] - A[:, 1]]), p)
        np.testing.assert_allclose(dependent, w, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(lewis_weights(gaussian(3, 7), 1), 1)
    np.testing.assert_allclose(lewis_weights(np.eye(4), 5), 1)


def test_two_is_leverage() -> None:
    A = gaussian(50, 3)
    assert (lewis_weights(A, 2) == leverage_scores(A)).all()
    near = lewis_weights(A, 2 + 1e-9)
    np.testing.assert_allclose(near, leverage_scores(A), rtol=1e-7)


def test_large_p_works_in_logs() -> None:
    A = gaussian(300, 3) * np.random.default_rng(0).exponential(1, (300, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        w = lewis_weights(A, 100, max_iter=1500, tol=1e-6)
    assert np.isfinite(w).all()
    assert abs(w.sum() - 3) < 1e-4


def test_sparse_and_workers() -> None:
    A = gaussian(2 * BLOCK_ROWS + 100, 6)
    A[np.abs(A) < 1] = 0
    w = lewis_weights(A, 1, engine=Engine(workers=1))
    assert (w == lewis_weights(A, 1, engine=Engine(workers=3))).all()
    np.testing.assert_allclose(lewis_weights(csr_array(A), 1), w, rtol=1e-8)


def test_stopping_early_warns_with_the_residual() -> None:
    with pytest.warns(ConvergenceWarning, match=r"residual .* > 1.0e-10 after 2 steps"):
        w = lewis_weights(gaussian(50, 3), 1, max_iter=2)
    assert abs(w.sum() - 3) < 0.5


@pytest.mark.parametrize(("p", "name"), [(0, "p"), (-1, "p"), (np.inf, "p"), (np.nan, "p")])
def test_bad_p(p: float, name: str) -> None:
    with pytest.raises(InputError, match=name):
        lewis_weights(np.eye(2), p)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="nan at row 0"):
        lewis_weights(np.array([[np.nan]]), 1)
    with pytest.raises(InputError, match="max_iter"):
        lewis_weights(np.eye(2), 1, max_iter=0)
    with pytest.raises(InputError, match="tol"):
        lewis_weights(np.eye(2), 1, tol=0)
