"""Sensitivities: closed forms for every p, brute force, invariances, bounds, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import hadamard
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning

from scoredraw.coresets import sensitivities
from scoredraw.coresets.combined import (
    leverage_bounds,
    lewis_bounds,
    sensitivity_upper_bounds,
    total_bounds,
)
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]
EXPONENTS = (1.0, 1.0001, 1.2, 1.5, 1.9, 2.0, 2.1, 3.0, 4.0, 8.0, 25.0)


def gaussian(n: int, d: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((n, d))


def grounded_complete_graph(v: int) -> Float:
    first, second = np.triu_indices(v, 1)
    return np.asarray((np.eye(v)[first] - np.eye(v)[second])[:, 1:])


@pytest.mark.parametrize("v", [3, 5, 8])
@pytest.mark.parametrize("p", [*EXPONENTS, 60.0])
def test_complete_graph(v: int, p: float) -> None:
    want = 1 / (1 + (v - 2) * 2 ** (1 - p))
    np.testing.assert_allclose(lp_sensitivities(grounded_complete_graph(v), p), want, rtol=1e-8)


@pytest.mark.parametrize("p", EXPONENTS)
def test_identity_hadamard_and_copies(p: float) -> None:
    np.testing.assert_allclose(lp_sensitivities(np.eye(4), p), 1, rtol=1e-12)
    equal = lp_sensitivities(hadamard(16)[:, :5].astype(float), p)
    np.testing.assert_allclose(equal, equal[0], rtol=1e-7)
    A = gaussian(20, 3)
    copies = lp_sensitivities(np.repeat(A, 4, axis=0), p)
    np.testing.assert_allclose(copies, np.repeat(lp_sensitivities(A, p) / 4, 4), rtol=1e-8)


@pytest.mark.parametrize("p", [1.0, 1.3, 3.0, 7.0])
def test_plane_by_brute_force(p: float) -> None:
    A = gaussian(15, 2) * np.random.default_rng(1).exponential(1, (15, 1))
    angles = np.linspace(0, np.pi, 200_001)
    powers = np.abs(A @ np.vstack([np.cos(angles), np.sin(angles)])) ** p
    want = (powers / powers.sum(0)).max(1)
    got = lp_sensitivities(A, p)
    assert (want <= got * (1 + 1e-9)).all()
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("p", [1.0, np.inf])
def test_the_linear_programmes(p: float) -> None:
    """p = 1: Newton with vertices against HiGHS; p = ∞: against the primal programme."""
    from scipy.optimize import linprog

    A = gaussian(40, 4) * np.random.default_rng(1).exponential(1, (40, 1))
    got = lp_sensitivities(A, p)
    if p == 1:
        np.testing.assert_allclose(got, lp_sensitivities(A, 1, solver="lp"), rtol=1e-8)
        return
    sides = np.vstack([np.column_stack([A, -np.ones(40)]), np.column_stack([-A, -np.ones(40)])])
    for i in range(0, 40, 7):
        done = linprog(
            [0, 0, 0, 0, 1], A_ub=sides, b_ub=np.zeros(80),
            A_eq=[[*A[i], 0]], b_eq=[1], bounds=[(None, None)] * 5,
        )  # fmt: skip
        np.testing.assert_allclose(got[i], 1 / done.fun, rtol=1e-8)


def test_every_value_is_certified() -> None:
    """The primal value and a feasible dual point agree: no row is reported that isn't optimal."""
    A = gaussian(200, 8) * np.random.default_rng(3).exponential(1, (200, 1))
    basis = np.linalg.qr(A)[0]
    grams = sensitivities.WeightedGrams(basis)
    for p in (1.0, 1.01, 1.5, 3.0, 10.0, 50.0):
        newton = sensitivities._newton_smoothed if p < 2 else sensitivities._newton_power
        assert newton(basis, grams, basis, p)[1].max() < 1e-8


def test_an_unfinished_solve_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivities, "MAX_STEPS", 2)
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        lp_sensitivities(gaussian(100, 6), 1.1)


@pytest.mark.parametrize("p", EXPONENTS)
def test_bounds_by_lewis_weights_and_leverage(p: float) -> None:
    A = gaussian(60, 4) * np.random.default_rng(5).exponential(1, (60, 1))
    sigma, d = lp_sensitivities(A, p), 4
    slack = 1 + 1e-7
    for low, high in (
        lewis_bounds(lewis_weights(A, p, max_iter=1000), p, d),
        leverage_bounds(leverage_scores(A), p),
    ):
        assert (low <= sigma * slack).all()
        assert (sigma <= high * slack).all()
    low_total, high_total = total_bounds(p, d)
    assert low_total <= sigma.sum() * slack
    assert sigma.sum() <= high_total * slack
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert (sensitivity_upper_bounds(A, p) >= sigma / slack).all()


def test_the_largest_sensitivity_grows_with_p() -> None:
    A = gaussian(40, 3)
    largest = [lp_sensitivities(A, p).max() for p in EXPONENTS]
    assert (np.diff(largest) > -1e-9).all()


@pytest.mark.property
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), p=st.sampled_from([1.0, 1.5, 3.0, 6.0]))
def test_any_basis_of_the_columns_gives_the_same(seed: int, p: float) -> None:
    rng = np.random.default_rng(seed)
    A, turn = rng.standard_normal((25, 3)), rng.standard_normal((3, 3)) * [1, 1e4, 1e-4]
    np.testing.assert_allclose(lp_sensitivities(A @ turn, p), lp_sensitivities(A, p), rtol=1e-6)


@pytest.mark.property
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), p=st.sampled_from([1.0, 1.5, 3.0, 6.0]), factor=st.floats(1, 50))
def test_a_longer_row_lowers_every_other(seed: int, p: float, factor: float) -> None:
    A = np.random.default_rng(seed).standard_normal((14, 3))
    longer = A.copy()
    longer[4] *= factor
    change = lp_sensitivities(longer, p) - lp_sensitivities(A, p)
    assert (np.delete(change, 4) < 1e-8).all()


def test_rows_sparse_zero_and_dependent() -> None:
    A = gaussian(50, 4)
    A[np.abs(A) < 0.4] = 0
    A[9] = 0
    A[12] = A[3]
    for p in (1.0, 1.5, 3.0, np.inf):
        sigma = lp_sensitivities(A, p)
        assert sigma[9] == 0
        assert sigma[12] == sigma[3]
        some = lp_sensitivities(A, p, rows=[9, 3, 12, 40, 3])
        np.testing.assert_allclose(some, sigma[[9, 3, 12, 40, 3]], rtol=1e-8)
        np.testing.assert_allclose(lp_sensitivities(csr_array(A), p), sigma, rtol=1e-7)
        with pytest.warns(np.exceptions.RankWarning):
            dependent = lp_sensitivities(np.column_stack([A, A.sum(1)]), p)
        np.testing.assert_allclose(dependent, sigma, rtol=1e-6)
    np.testing.assert_allclose(lp_sensitivities(gaussian(3, 6), 1), 1, rtol=1e-12)
    assert lp_sensitivities(np.zeros((3, 2)), 1).tolist() == [0, 0, 0]


def test_tiny_values_keep_their_digits() -> None:
    """A row shrunk by c has c^p of its sensitivity to first order: relative accuracy at 1e-40."""
    A = gaussian(30, 2)
    for p, c in ((1.0, 1e-9), (1.5, 1e-9), (4.0, 1e-9)):
        small, smaller = A.copy(), A.copy()
        small[0] *= c
        smaller[0] *= c / 10
        ratio = lp_sensitivities(small, p)[0] / lp_sensitivities(smaller, p)[0]
        np.testing.assert_allclose(ratio, 10**p, rtol=1e-6)


def test_workers_do_not_matter() -> None:
    A = gaussian(900, 3)
    assert (lp_sensitivities(A, 1.5, workers=1) == lp_sensitivities(A, 1.5, workers=3)).all()


def test_products_made_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    A = gaussian(300, 5)
    whole = lp_sensitivities(A, 3)
    monkeypatch.setattr(sensitivities, "PRODUCT_CELLS", 1024)
    np.testing.assert_allclose(lp_sensitivities(A, 3), whole, rtol=1e-9)


def test_degenerate_vertices_need_few_linear_programmes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, many of them zero: residuals vanish in droves, and values stay HiGHS's own."""
    rng = np.random.default_rng(0)
    A = rng.integers(0, 5, (400, 30)) * (rng.random((400, 30)) < 0.05) * 1.0
    rows = np.arange(0, 400, 2)
    exact = lp_sensitivities(A, 1, rows=rows[::5], solver="lp")
    asked: list[float] = []
    dual = sensitivities._dual

    def counting(basis: Float, target: Float, p: float) -> float:
        asked.append(p)
        return dual(basis, target, p)

    monkeypatch.setattr(sensitivities, "_dual", counting)
    np.testing.assert_allclose(lp_sensitivities(A, 1, rows=rows)[::5], exact, rtol=1e-8)
    with_faces = len(asked)
    monkeypatch.setattr(sensitivities, "FACE_CUTS", ())
    lp_sensitivities(A, 1, rows=rows)
    assert len(asked) - with_faces > 4 * with_faces + 10


@pytest.mark.parametrize("p", [0.5, 0, -1, np.nan])
def test_bad_p(p: float) -> None:
    with pytest.raises(InputError, match=r"p: got .*, want p >= 1"):
        lp_sensitivities(np.eye(2), p)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="row 1"):
        lp_sensitivities(np.array([[1.0], [np.inf]]), 1)
    with pytest.raises(InputError, match="matrix"):
        lp_sensitivities(np.ones(3), 1)
    with pytest.raises(InputError, match="rows"):
        lp_sensitivities(np.eye(2), 1, rows=[2])
    with pytest.raises(InputError, match="rows"):
        lp_sensitivities(np.eye(2), 1, rows=[0.5])
    with pytest.raises(InputError, match="solver"):
        lp_sensitivities(np.eye(2), 3, solver="lp")
