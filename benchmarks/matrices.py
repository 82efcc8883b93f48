"""Leverage scores and Lewis weights against the matrix products that they cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights

Float = npt.NDArray[np.float64]


def leverage(*, tiny: bool = False) -> Iterator[Contest]:
    """Exact leverage scores against the two products of the floor, QR and statsmodels."""
    n, d = (20_000, 16) if tiny else (1_000_000, 64)
    A = _matrix(n, d)
    yield _against_products(A)
    yield _against_qr(A)
    yield _against_statsmodels(A[: n // 5])


def _against_products(A: Float) -> Contest:
    """What is left when all but the arithmetic is taken away; the product's pages are not new."""
    d = A.shape[1]
    factor, product = _matrix(d, d), np.empty_like(A)

    def floor() -> tuple[Float, Float]:
        return A.T @ A, np.matmul(A, factor, out=product)

    def is_the_diagonal(scores: Float, parts: tuple[Float, Float]) -> None:
        whitened = A[:1000] @ np.linalg.inv(parts[0])
        np.testing.assert_allclose(scores[:1000], (whitened * A[:1000]).sum(1), rtol=1e-8)
        np.testing.assert_allclose(scores.sum(), d, rtol=1e-9)

    peer = "AᵀA and A·(d x d)"
    return Contest(_leverage_of(A), peer, lambda: leverage_scores(A), floor, is_the_diagonal, 1.6)


def _against_qr(A: Float) -> Contest:
    import scipy.linalg

    columns = np.asfortranarray(A)  # as LAPACK wants it; not on its clock

    def qr() -> Float:
        q, _ = scipy.linalg.qr(columns, mode="economic", check_finite=False)
        return np.asarray(np.einsum("ij,ij->i", q, q))

    peer = "scipy.linalg.qr, row norms"
    return Contest(_leverage_of(A), peer, lambda: leverage_scores(A), qr, _close, 1 / 5, repeats=3)


def _against_statsmodels(A: Float) -> Contest:
    """The hat diagonal of a fitted model takes an SVD of A: hence fewer rows."""
    from statsmodels.regression.linear_model import OLS
    from statsmodels.stats.outliers_influence import OLSInfluence

    y = A @ np.arange(1.0, A.shape[1] + 1)

    def hat() -> Float:
        return np.asarray(OLSInfluence(OLS(y, A).fit()).hat_matrix_diag)

    peer = "statsmodels OLSInfluence"
    return Contest(_leverage_of(A), peer, lambda: leverage_scores(A), hat, _close, repeats=3)


def lewis(*, tiny: bool = False) -> Iterator[Contest]:
    """Lewis weights against as many Gram matrices and products as their iteration takes."""
    n, d = (20_000, 8) if tiny else (1_000_000, 32)
    A = _matrix(n, d)
    _, info = lewis_weights(A, 1, return_info=True)
    factor, product = _matrix(d, d), np.empty_like(A)

    def passes() -> Float:
        gram = A.T @ A  # where the iteration starts
        for _ in range(info.steps):
            np.matmul(A, factor, out=product)
            gram = A.T @ A
        return gram

    def is_fixed(weights: Float, gram: Float) -> None:
        inverse = np.linalg.inv((A / weights[:, None]).T @ A)  # W^{1 - 2/p} with p = 1
        again = ((A[:1000] @ inverse) * A[:1000]).sum(1)
        np.testing.assert_allclose(weights[:1000] ** 2, again, rtol=1e-8)
        np.testing.assert_allclose(weights.sum(), d, rtol=1e-8)

    what = f"Lewis weights p = 1, {n:,} x {d}, {info.steps} steps"
    yield Contest(
        what, f"{info.steps + 1} AᵀA and {info.steps} A·(d x d)",
        lambda: lewis_weights(A, 1), passes, is_fixed, 1.5, repeats=5,
    )  # fmt: skip


def _matrix(n: int, d: int) -> Float:
    """Correlated columns and heavy-tailed rows, so that the scores differ."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, d))
    rows *= rng.lognormal(0.0, 1.0, (n, 1))
    return rows


def _leverage_of(A: Float) -> str:
    return f"leverage scores, {len(A):,} x {A.shape[1]} float64"


def _close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-14)
