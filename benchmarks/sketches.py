"""Sketched against exact leverage: what a stated accuracy buys, and from which width on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sketching import approximate_lewis_weights, sketched_leverage

Float = npt.NDArray[np.float64]

CELLS = 128_000_000  # numbers of the matrices of the widths that are only compared: 1 GB


def sketched(*, tiny: bool = False) -> Iterator[Contest]:
    """A million rows of 256 must be faster than exact; other widths show where it begins to pay."""
    n, d = (40_000, 64) if tiny else (1_000_000, 256)
    A = _matrix(n, d)
    yield _against_exact(A, "countsketch", at_most=1.0)
    for sketch in ("osnap", "srht"):
        yield _against_exact(A, sketch)
    yield _lewis(A[: n // 5])
    del A
    for d in (64, 128) if tiny else (64, 128, 512, 1024):
        yield _against_exact(_matrix((5_000_000 if tiny else CELLS) // d, d), "countsketch")


def _against_exact(A: Float, sketch: str, at_most: float | None = None) -> Contest:
    n, d = A.shape
    what = f"leverage by {sketch}, {n:,} x {d} float64"
    return Contest(
        what, "leverage_scores",
        lambda: sketched_leverage(A, sketch=sketch, rng=0), lambda: leverage_scores(A),
        _as_accurate_as_stated, at_most, repeats=3,
    )  # fmt: skip


def _lewis(A: Float) -> Contest:
    n, d = A.shape
    what = f"approximate Lewis weights p = 1, {n:,} x {d}"
    return Contest(
        what, "lewis_weights to 1e-10",
        lambda: approximate_lewis_weights(A, 1, rng=0), lambda: lewis_weights(A, 1),
        _as_accurate_as_stated, 1.0, repeats=3,
    )  # fmt: skip


def _as_accurate_as_stated(near: Float, exact: Float) -> None:
    """No row off by a factor of four, half of them by less than 15 %."""
    error = np.abs(np.log(near / exact))
    assert error.max() < np.log(4), error.max()
    assert np.median(error) < 0.15, np.median(error)


def _matrix(n: int, d: int) -> Float:
    """Heavy-tailed rows, so that the scores differ; made in place, for it may be large."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, d))
    rows *= rng.lognormal(0.0, 1.0, (n, 1))
    return rows
