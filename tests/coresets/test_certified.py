"""Certificates of Lewis weights: the true weights are always inside, and the bounds are tight."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.certified import (
    convex_lewis_weights,
    excess_of_exp,
    lewis_certificate,
)
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.errors import InputError, MissingExtraError

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]
EXPONENTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.9, 4.0, 6.0, 12.0)


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


def precise_weights(A: Float, p: float) -> Float:
    """Lewis weights of a matrix with two columns in extended precision: 2 x 2 inverses by hand."""
    x, y = A.astype(np.longdouble).T
    w = np.full(len(A), 2 / np.longdouble(len(A)))
    eta = np.longdouble(4) / (p + 2)
    for _ in range(600):
        scale = w ** (1 - np.longdouble(2) / p)
        a, b, c = (scale * x * x).sum(), (scale * x * y).sum(), (scale * y * y).sum()
        form = (c * x * x - 2 * b * x * y + a * y * y) / (a * c - b * b)
        w = w ** (1 - eta) * form ** (eta * p / 2)
    return np.asarray(w.astype(np.float64))


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_true_weights_are_inside_at_every_distance(p: float) -> None:
    A = uneven(25, 2)
    true = precise_weights(A, p)
    rng = np.random.default_rng(1)
    for noise in (0.0, 1e-9, 1e-4, 0.1, 1.0, 5.0):
        w = true * np.exp(noise * rng.standard_normal(25))
        sure = lewis_certificate(A, p, w)
        assert (sure.lower <= true).all()
        assert (true <= sure.upper).all()
        assert np.abs(np.log(w / true)).max() <= sure.error
        assert (sure.upper <= 1).all()


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_bounds_shrink_with_the_error(p: float) -> None:
    """The certified error is at most a constant times the true one: it is no empty promise."""
    A = uneven(40, 4)
    true = lewis_weights(A, p, tol=1e-13, max_iter=2000)
    noise = np.random.default_rng(2).standard_normal(40)
    for size in (1e-6, 1e-3):
        sure = lewis_certificate(A, p, true * np.exp(size * noise))
        assert sure.error < 12 * size * np.abs(noise).max()
    assert lewis_certificate(A, p, true).error < 1e-9


def test_the_fixed_point_of_leverage_is_found_from_anywhere() -> None:
    """p = 2: F(w) is the leverage whatever w, so that the interval is a point."""
    A = uneven(30, 3)
    sure = lewis_certificate(A, 2, np.random.default_rng(0).uniform(0.1, 1, 30))
    np.testing.assert_allclose(sure.upper, lewis_weights(A, 2), rtol=1e-10)
    np.testing.assert_allclose(sure.lower, sure.upper, rtol=1e-10)


@pytest.mark.property
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    p=st.sampled_from([0.7, 1.0, 1.9, 2.2, 3.7, 5.0, 20.0]),
    steps=st.integers(1, 12),
)
def test_an_unfinished_iteration_is_bounded(seed: int, p: float, steps: int) -> None:
    """Weights after a few steps only: the finished ones lie within what is certified."""
    A = np.random.default_rng(seed).standard_normal((12, 3))
    true = lewis_weights(A, p, tol=1e-12, max_iter=3000)
    rough = np.exp(np.log(true) + 2.0**-steps * np.sin(np.arange(12)))
    sure = lewis_certificate(A, p, rough)
    assert (sure.lower <= true * (1 + 1e-9)).all()
    assert (true <= sure.upper * (1 + 1e-9)).all()


@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 4.0, 6.0])
def test_the_convex_programme(p: float) -> None:
    """An interior point method and the iteration find the same weights, each within its bounds."""
    A = uneven(30, 3)
    A[7] = 0
    weights, sure = convex_lewis_weights(A, p)
    true = lewis_weights(A, p)
    assert weights[7] == sure.upper[7] == 0
    np.testing.assert_allclose(weights, true, rtol=2e-3)
    assert sure.error < 5e-3
    assert (sure.lower <= true * (1 + 1e-9)).all()
    assert (true <= sure.upper * (1 + 1e-9)).all()
    assert abs(weights.sum() - 3) < 1e-2


def test_the_gap_is_that_of_the_programme() -> None:
    """δ bounds log det M* - log det M, both made here from their definitions."""
    A, p = uneven(30, 3), 5.0

    def value(w: Float) -> float:
        gram = (A.T * w ** (1 - 2 / p)) @ A
        norms = np.einsum("ij,ij->i", A @ np.linalg.inv(gram), A)
        feasible = (3 / (norms ** (p / 2)).sum()) ** (2 / p)
        return float(3 * np.log(feasible) - np.linalg.slogdet(gram)[1])

    true = lewis_weights(A, p)
    for noise in (0.02, 0.3):
        w = true * np.exp(noise * np.random.default_rng(3).standard_normal(30))
        lost = value(true) - value(w)
        assert 0 < lost <= lewis_certificate(A, p, w).gap < 20 * lost


def test_rank_zero_rows_sparse_and_scale() -> None:
    A = uneven(30, 3)
    A[np.abs(A) < 0.3] = 0
    A[4] = 0
    for p in (1.0, 3.0, 6.0):
        w = lewis_weights(A, p)
        dense = lewis_certificate(A, p, w)
        np.testing.assert_allclose(lewis_certificate(csr_array(A), p, w).upper, dense.upper)
        np.testing.assert_allclose(lewis_certificate(1e90 * A, p, w).upper, dense.upper)
        with pytest.warns(np.exceptions.RankWarning):
            wide = lewis_certificate(np.column_stack([A, A.sum(1)]), p, w)
        np.testing.assert_allclose(wide.upper, dense.upper, rtol=1e-8)
        assert dense.upper[4] == dense.lower[4] == 0
        assert dense.error < 1e-8
    with pytest.warns(np.exceptions.RankWarning):
        assert lewis_certificate(np.zeros((3, 2)), 3, np.zeros(3)).error == 0


def test_hopeless_weights_give_wide_and_true_bounds() -> None:
    A = uneven(30, 3)
    w = np.geomspace(1e-280, 1, 30)
    for p in (1.0, 3.0, 9.0):
        sure = lewis_certificate(A, p, w)
        true = lewis_weights(A, p)
        assert (sure.lower <= true).all()
        assert (true <= sure.upper).all()
        assert sure.error > 1


def test_excess_of_exp_by_its_series() -> None:
    x = np.array([0.0, 1e-12, -1e-6, 0.00999, 0.01001, -0.01, 3.0, -20.0])
    want = [
        float(sum(np.longdouble(v) ** k / np.prod(np.arange(1, k + 1, dtype=np.longdouble))
                  for k in range(2, 120)))
        for v in x
    ]  # fmt: skip
    np.testing.assert_allclose(excess_of_exp(x), want, rtol=1e-12)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    A = uneven(5, 2)
    for w, words in (
        (np.ones(4), r"weights: got shape \(4,\)"),
        (np.full(5, np.nan), "weights: got NaN"),
        (np.array([1, 1, 0, 1, 1.0]), "positive weights on nonzero rows"),
    ):
        with pytest.raises(InputError, match=words):
            lewis_certificate(A, 1, w)
    with pytest.raises(InputError, match="p: got 0"):
        lewis_certificate(A, 0, np.ones(5))
    with pytest.raises(InputError, match="lewis_weights for p < 2"):
        convex_lewis_weights(A, 1)
    with pytest.raises(InputError, match="solver"):
        convex_lewis_weights(A, 3, solver="ABACUS")
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingExtraError, match=r"scoredraw\[all\]"):
        convex_lewis_weights(A, 3)
