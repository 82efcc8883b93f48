"""The gradient of transport by source, in one solve, against POT called source by source.

Ten sources of 2,000 rows. *Sinkhorn*: both sides entropic, POT solving each source alone to the
validation data, which costs as many kernel entries a sweep and gives no gradient of the mixture.
*Exact*: the network simplex on both sides, ours once; POT once a source for one-sided difference
quotients, which is how the gradient is had without potentials.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

from benchmarks.contest import Contest
from scoredraw.data_selection.source_transport import (
    SourceTransport,
    ot_with_source_gradient,
    otdd_cost,
)

Float = npt.NDArray[np.float64]

SOURCES = 10
REG = 2.0  # about a twentieth of the mean cost
STEP = 1e-6


def transport(*, tiny: bool = False) -> Iterator[Contest]:
    """Sinkhorn against each source alone, exact against each alone and against differences."""
    rows, columns = (20, 30) if tiny else (2000, 500)
    cost = _cost(rows, columns)
    yield _sinkhorn(cost, rows)
    yield _alone(cost, rows)
    rows, columns = (20, 30) if tiny else (400, 300)
    yield _differences(_cost(rows, columns), rows)


def _cost(rows: int, columns: int) -> Float:
    """Sources around centres of their own, validation rows around all of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(SOURCES, 16))
    x = rng.normal(size=(SOURCES * rows, 16)) + np.repeat(centres, rows, axis=0)
    v = rng.normal(size=(columns, 16)) + centres[rng.integers(SOURCES, size=columns)]
    return otdd_cost(x, None, v, None)


def _sinkhorn(cost: Float, rows: int) -> Contest:
    import ot

    sizes, b = np.full(SOURCES, rows), np.full(cost.shape[1], 1 / cost.shape[1])
    parts = np.split(cost, SOURCES)

    def ours() -> SourceTransport:
        return ot_with_source_gradient(cost, sizes, reg=REG)

    a = np.full(rows, 1 / rows)

    def theirs() -> list[Float]:
        return [ot.sinkhorn(a, b, part, REG, numItermax=10_000, warn=False) for part in parts]

    def check(mine: SourceTransport, plans: list[Float]) -> None:
        """The value of a plan: its cost, and REG times its divergence from independence."""
        pairs = zip(plans, parts, strict=True)
        values = [(pi * c).sum() + REG * rel_entr(pi, np.outer(a, b)).sum() for pi, c in pairs]
        _subgradient(mine, np.array(values))

    what = f"Sinkhorn gradient, {_size(cost)}"
    return Contest(what, "POT once a source", ours, theirs, check, 1.2, repeats=3)


def _alone(cost: Float, rows: int) -> Contest:
    import ot

    sizes, parts = np.full(SOURCES, rows), np.split(cost, SOURCES)

    def ours() -> SourceTransport:
        return ot_with_source_gradient(cost, sizes)

    def theirs() -> Float:
        return np.array([ot.emd2([], [], part, numItermax=10**7) for part in parts])

    what = f"exact gradient, {_size(cost)}"
    return Contest(what, "POT emd2 once a source", ours, theirs, _subgradient, repeats=2)


def _subgradient(ours: SourceTransport, alone: Float) -> None:
    """OT is convex: a source alone costs at least what the tangent at the mixture says."""
    tangent = ours.value + (1 - 1 / SOURCES) * ours.gradient
    assert (alone >= tangent - 1e-6).all()
    assert ours.value <= alone.mean() + 1e-6


def _differences(cost: Float, rows: int) -> Contest:
    """p_i up by STEP, the others down in proportion."""
    import ot

    sizes = np.full(SOURCES, rows)
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(SOURCES, 20.0))  # off the kinks of the piecewise linear function
    b = np.full(cost.shape[1], 1 / cost.shape[1])

    def ours() -> Float:
        return ot_with_source_gradient(cost, sizes, p).gradient

    def value(share: Float) -> float:
        return float(ot.emd2(np.repeat(share / rows, rows), b, cost, numItermax=10**7))

    def theirs() -> Float:
        moved = p - STEP * p / (1 - p[:, None])
        np.fill_diagonal(moved, p + STEP)
        return (np.array([value(share) for share in moved]) - value(p)) / STEP

    def same(a: Float, b: Float) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)

    what = f"exact gradient, {_size(cost)}"
    return Contest(what, "POT emd2, differences", ours, theirs, same, 1 / 5, repeats=2)


def _size(cost: Float) -> str:
    return f"{SOURCES} x {len(cost) // SOURCES:,} rows to {cost.shape[1]}"
