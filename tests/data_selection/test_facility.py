"""Inside lazy greedy facility location: bounds, pairs and threads against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_info, threadpool_limits

from scoredraw.data_selection import facility

pytestmark = pytest.mark.oracle

KINDS = ("cosine", "euclidean", "sqeuclidean", "rbf")


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, d)) * 2
    return centres[rng.integers(6, size=n)] + rng.normal(size=(n, d)) + 0.5


def matrix(distances: facility.Distances) -> np.ndarray:
    """d(i, j) of all rows, from differences."""
    x = distances.right[: distances.width].T
    d = cdist(x, x, "sqeuclidean")
    if distances.similarity == "cosine":
        return d * (distances.squares[0] / np.square(x[0]).sum())
    if distances.similarity == "euclidean":
        return np.sqrt(d)
    return d if distances.similarity == "sqeuclidean" else 1 - np.exp(-distances.gamma * d)


def as_if_large(monkeypatch) -> None:
    """Small inputs cut as large ones are."""
    monkeypatch.setattr(facility, "LARGE", 0)
    monkeypatch.setattr(facility, "FEW", facility.THREADS)
    monkeypatch.setattr(facility, "CELLS", 4000)
    monkeypatch.setattr(facility, "HIGH", 48)
    monkeypatch.setattr(facility, "WIDE", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_gain_lies_within_its_bounds(kind, monkeypatch) -> None:
    """Those told of all the picks from both sides, the others from above, to the slack they own."""
    as_if_large(monkeypatch)
    state = facility.Greedy(facility.Distances(rows(400, 6), kind, None), 60, None)
    state.first()
    bounds, d, behind = facility.Bounds(state), matrix(state.of), 0
    for _ in range(59):
        bounds.take_best()
        left = np.setdiff1d(np.arange(400), state.picks)
        gains = np.maximum(state.near[:, None] - d, 0.0).sum(axis=0)[left]
        now = bounds.gain[left], bounds.slack[left] + 1e-9
        assert (gains <= now[0] + now[1]).all()
        told = bounds.told[left] == bounds.last
        assert (gains >= now[0] - now[1])[told].all()
        assert bounds.kept == sum(len(part.near) for part in bounds.parts) <= 400
        behind += int((bounds.told[left] < bounds.last - len(bounds.parts)).sum())
    assert behind  # some had missed terms that were gone, and were looked at afresh
    finite = np.isfinite(bounds.gain)
    assert bounds.slack[finite].max() < 0.01 * state.gains[1]  # and the bounds are worth it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [False, True])
def test_sums_are_off_by_no_more_than_they_say(kind, drop, monkeypatch) -> None:
    as_if_large(monkeypatch)
    of = facility.Distances(rows(300, 9, 1), kind, None)
    d, some = matrix(of), np.arange(0, 300, 2)
    near = d[some][:, [3, 80]].min(axis=1)
    fall = 0.3 * near if drop else None
    want = np.maximum(near[:, None] - d[some], 0.0)
    want = (np.minimum(want, fall[:, None]) if drop else want).sum(axis=0)
    room = np.empty(facility.HIGH * facility.WIDE)
    got, off = of.sums(np.arange(300), of.terms(some, near, fall), room)
    assert (np.abs(got - want) <= off + 1e-9).all()
    assert np.abs(got - want).max() > 0
    assert off.max() < 1e-2 * want.max()


@pytest.mark.parametrize("threads", [1, 3])
def test_listed_pairs_are_those_nearer_than_the_nearest_pick(threads, monkeypatch) -> None:
    as_if_large(monkeypatch)
    state = facility.Greedy(facility.Distances(rows(300, 4), "sqeuclidean", None), 20, None)
    state.first()
    for row in (5, 60, 200):
        state.take_dense(row, 0.0)
    with threadpool_limits(threads, user_api="blas"), state.of.in_threads():
        assert len(state.of.rooms) == threads
        pairs = facility.list_pairs(state)
    d = matrix(state.of)
    i, j = np.nonzero(d < state.near[:, None] - 1e-9)
    close = np.abs(d - state.near[:, None]) <= 1e-9  # a pick and its own rows
    listed = np.zeros((300, 300), bool)
    listed[pairs.tocoo().coords] = True  # zeros among them
    assert listed[i, j].all()
    assert not (listed & ~(d < state.near[:, None]) & ~close).any()
    assert pairs.has_canonical_format
    np.testing.assert_allclose(pairs.toarray()[i, j], d[i, j], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [False, True])
def test_threads_do_not_show(kind, listed, monkeypatch) -> None:
    x = rows(500, 5)
    few = facility.few_pairs
    monkeypatch.setattr(facility, "few_pairs", lambda state: listed and few(state))
    alone = facility.lazy(facility.Distances(x, kind, None), 120)
    as_if_large(monkeypatch)
    distances = facility.Distances(x, kind, None)
    with threadpool_limits(3, user_api="blas"):
        before = threadpool_info()
        shared = facility.lazy(distances, 120)
        assert threadpool_info() == before
    assert (distances.pool, len(distances.rooms)) == (None, 1)
    assert shared.picks == alone.picks
    np.testing.assert_allclose(shared.gains, alone.gains, rtol=1e-9, atol=1e-9)


def test_ties_that_float32_cannot_decide_go_to_the_first_row(monkeypatch) -> None:
    """Corners of a cube, many with one gain: sums are of float64 from the first such pick on."""
    x = np.array(list(itertools.product([0.0, 1.0], repeat=9)))
    monkeypatch.setattr(facility, "few_pairs", lambda state: False)
    distances = facility.Distances(x, "sqeuclidean", None)
    state = facility.lazy(distances, 100)
    assert distances.dtype is np.float64
    d, near = matrix(distances), np.full(512, np.inf)
    for row in state.picks:
        gains = np.maximum(np.minimum(near, 4.0)[:, None] - d, 0.0).sum(axis=0)
        assert row == int(np.argmax(gains >= gains.max() - 4e-10))
        near = np.minimum(near, d[row])
