"""Greedy facility location without the matrix of similarities.

    f(S) = sum_i max_{j in S} s(i, j),      s(i, j) = c - d(i, j) >= 0,

is monotone and submodular, so that taking again and again the row of largest gain

    g(j) = sum_i max(0, D_i - d(i, j)),     D_i = min_{j in S} d(i, j),

comes within 1 - 1/e of the best S (Nemhauser, Wolsey, Fisher 1978). Gains only fall. While most of
them are far from zero everywhere, an old gain is a bound, and only rows whose bound reaches the
best are looked at again (Minoux 1978), some dozens at a time as one matrix product. Once the pairs
with d(i, j) < D_i have become few, they are all that can still matter: they are listed once, and
from then on every gain is kept exact by subtracting what a pick takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Progress = Callable[[int, int], None]

TIE = 1e-10  # gains that differ by less than this share of c are equal: the first row is taken
ROWS = 64  # candidates looked at together, or fewer
CELLS, LEAST = 2_000_000, 16  # distances held at a time, and rows of them
PAIRS = 128  # pairs listed, per row: at most this, or d if that is more
SAME = 1e-13  # squared distances below this are rounding: the rows are the same
SAMPLE = 256  # rows that tell how many pairs there would be


class Distances:
    """d(i, j) of any rows i to all j, from one matrix product.

    "cosine": (1 - cos) / 2, c = 1; "sqeuclidean": |x - y|^2; "euclidean": |x - y|; "rbf":
    1 - exp(-gamma |x - y|^2), c = 1. For the two in the middle lengths are in units of the largest
    distance from the mean, and c is the (squared) diameter of that ball, which no distance
    exceeds; picks do not depend on c. In the rows' own units d and c are `unit` times as much.

    The two that are linear in the product also come in float32, good enough for bounds: `slack[j]`
    is the most by which a sum over i of such distances, clipped or not, can be off.
    """

    def __init__(self, x: Array, similarity: str, gamma: float | None) -> None:
        if similarity == "cosine":
            x = x / np.sqrt(np.square(x).sum(axis=1, keepdims=True))
        x, length = centred(x)
        squares, ones = np.square(x).sum(axis=1), np.ones(len(x))
        self.similarity, self.n, self.width = similarity, len(x), x.shape[1]
        self.c = {"cosine": 1.0, "rbf": 1.0, "sqeuclidean": 4.0, "euclidean": 2.0}[similarity]
        self.unit = {"sqeuclidean": length**2, "euclidean": length}.get(similarity, 1.0)
        typical = 1 / max(2 * squares.mean(), 1e-300)
        self.gamma = typical if gamma is None else gamma * length**2
        factor = length**2 / 4 if similarity == "cosine" else 1.0
        self.left = factor * np.column_stack([-2 * x, ones, squares])
        self.right = np.column_stack([x, squares, ones])
        self.step = min(len(x), max(LEAST, CELLS // len(x)))
        self.room = np.empty(self.step * len(x))
        self.linear = self.roughly = similarity in ("cosine", "sqeuclidean")
        self.slack = np.zeros(len(x))
        if self.linear:
            self.single = self.left.astype(np.float32), self.right.astype(np.float32)
            lengths = np.sqrt(squares)
            whole = len(x) * squares + 2 * lengths * lengths.sum() + squares.sum()
            self.slack = factor * (self.width + 10) * 2.0**-24 * whole  # (|x_i| + |x_j|)^2

    def rows(self, rows: Any, *, rough: bool = False) -> NDArray[Any]:
        """d(i, j) for i in rows and every j, (len(rows), n); the next call overwrites it."""
        if rough and self.roughly:
            return self._product(*self.single, rows)
        d = self._product(self.left, self.right, rows)
        if not self.linear:
            d[d < SAME] = 0.0
        if self.similarity == "euclidean":
            np.sqrt(d, out=d)
        elif self.similarity == "rbf":
            np.negative(np.expm1(np.multiply(d, -self.gamma, out=d), out=d), out=d)
        return d

    def exactly(self) -> None:
        """Make no more use of float32."""
        self.roughly = False
        self.slack = np.zeros(self.n)

    def _product(self, left: NDArray[Any], right: NDArray[Any], rows: Any) -> NDArray[Any]:
        mine = left[rows]
        room = self.room.view(left.dtype)[: len(mine) * self.n].reshape(len(mine), self.n)
        return np.matmul(mine, right.T, out=room)

    def totals(self) -> Array:
        """sum_i d(i, j) for each j, (n,)."""
        if self.linear:
            return np.asarray(self.left.sum(axis=0) @ self.right.T)
        return np.concatenate([self.rows(block).sum(axis=1) for block in self.blocks()])

    def blocks(self) -> Iterator[slice]:
        return (slice(at, min(at + self.step, self.n)) for at in range(0, self.n, self.step))


def centred(x: Array) -> tuple[Array, float]:
    """Rows about their mean, the longest of length one, and its length before (1 for zeros)."""
    scale = float(np.abs(x).max()) or 1.0
    x = x / scale  # so that nothing overflows
    x -= x.mean(axis=0)
    length = float(np.sqrt(np.square(x).sum(axis=1).max())) or 1.0
    return x / length, length * scale


class Greedy:
    """The rows taken so far, and how far every row is from the nearest of them."""

    def __init__(self, distances: Distances, size: int, progress: Progress | None) -> None:
        self.of, self.size, self.progress = distances, size, progress
        self.near = np.full(distances.n, np.inf)
        self.owner = np.zeros(distances.n, np.int64)
        self.picks: list[int] = []
        self.gains: list[float] = []

    def take(self, row: int, gain: float, closer: Any, distance: Array) -> None:
        """Add a row; `closer` are the rows now nearest to it, at `distance`."""
        self.near[closer] = distance
        self.owner[closer] = len(self.picks)
        self.picks.append(row)
        self.gains.append(max(gain, 0.0))
        if self.progress is not None:
            self.progress(len(self.picks), self.size)

    def take_dense(self, row: int, gain: float) -> None:
        d = self.of.rows([row])[0]
        d[row] = min(d[row], 0.0)
        closer = np.flatnonzero(d < self.near)
        self.take(row, gain, closer, d[closer])

    def gains_of(self, rows: Index, *, rough: bool = False) -> Array:
        """g(j) for the rows asked for; rough ones are off by `slack` at most."""
        near = self.near.astype(np.float32) if rough and self.of.roughly else self.near
        parts = [np.zeros(0)]
        for at in range(0, len(rows), self.of.step):
            gap = self.of.rows(rows[at : at + self.of.step], rough=rough)
            np.subtract(near, gap, out=gap)
            parts.append(np.maximum(gap, 0.0, out=gap).sum(axis=1))
        return np.concatenate(parts)

    def first(self) -> None:
        """f of one row alone: the medoid."""
        values = self.of.n * self.of.c - self.of.totals()
        row = first_best(values, TIE * self.of.c)
        self.take_dense(row, float(values[row]))


def lazy(distances: Distances, size: int, progress: Progress | None = None) -> Greedy:
    """The plain greedy's picks, by bounds first and by listed pairs after."""
    state = Greedy(distances, size, progress)
    state.first()
    bounds = np.full(distances.n, np.inf)
    look = 8
    while len(state.picks) < size:
        if len(state.picks) >= look:
            if few_pairs(state):
                by_listed_pairs(state)
                break
            look += max(1, look // 4)
        bounds[state.picks[-1]] = -np.inf
        state.take_dense(*best_by_bounds(state, bounds))
    return state


def best_by_bounds(state: Greedy, bounds: Array) -> tuple[int, float]:
    """The row of largest gain and that gain; `bounds` are tightened on the way."""
    stale, low = bounds > -np.inf, -np.inf
    while True:
        rows = np.flatnonzero(stale & (bounds >= low))
        if not len(rows):
            break
        if len(rows) > ROWS and np.isfinite(bounds[rows]).all():
            rows = rows[np.argpartition(-bounds[rows], ROWS)[:ROWS]]
        gains, slack = state.gains_of(rows, rough=True), state.of.slack[rows]
        slack = slack + 1e-5 * gains  # of the sum itself
        bounds[rows] = gains + slack
        stale[rows] = False
        low = max(low, float((gains - slack).max()))
    tolerance = TIE * state.of.c
    rows = np.flatnonzero(bounds >= low - tolerance)
    bounds[rows] = state.gains_of(rows)
    if len(rows) > ROWS:  # bounds too loose to be worth it
        state.of.exactly()
    best = first_best(bounds[rows], tolerance)
    return int(rows[best]), float(bounds[rows[best]])


def few_pairs(state: Greedy) -> bool:
    """Whether the pairs with d(i, j) < D_i would fit, judged by evenly spaced rows i."""
    n = state.of.n
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    step = state.of.step
    pieces = [rows[at : at + step] for at in range(0, len(rows), step)]
    pairs = sum(np.count_nonzero(state.of.rows(p) < state.near[p, None]) for p in pieces)
    return pairs * (n / len(rows)) <= n * max(PAIRS, state.of.width)


def by_listed_pairs(state: Greedy) -> None:
    """The rest of the picks from the pairs that can still matter."""
    n, near = state.of.n, state.near
    start, column, distance = list_pairs(state)
    row_of = np.repeat(np.arange(n), np.diff(start))
    gains = np.bincount(column, near[row_of] - distance, minlength=n).astype(np.float64)
    gains[state.picks] = -np.inf
    by_column = np.argsort(column, kind="stable")
    column_start = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=n))])
    tolerance = TIE * state.of.c
    while len(state.picks) < state.size:
        row = first_best(gains, tolerance)
        gain = float(gains[row])
        own = by_column[column_start[row] : column_start[row + 1]]
        own = own[distance[own] < near[row_of[own]]]
        closer = row_of[own]
        entries = ragged(start[closer], start[closer + 1])
        lengths = start[closer + 1] - start[closer]
        before, after = np.repeat(near[closer], lengths), np.repeat(distance[own], lengths)
        far = distance[entries]
        lost = np.maximum(before - far, 0.0) - np.maximum(after - far, 0.0)
        np.subtract.at(gains, column[entries], lost)
        gains[row] = -np.inf
        state.take(row, gain, closer, distance[own])


def list_pairs(state: Greedy) -> tuple[Index, NDArray[np.int32], Array]:
    """Rows i with the j that are nearer than D_i, one after the other: start, j, d(i, j)."""
    n, columns, distances, counts = state.of.n, [], [], []
    for block in state.of.blocks():
        d = state.of.rows(block)
        inside = np.flatnonzero(d < state.near[block, None])
        row, j = np.divmod(inside, n)
        counts.append(np.bincount(row, minlength=len(d)))
        columns.append(j.astype(np.int32))
        distances.append(d.ravel()[inside])
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return start, np.concatenate(columns), np.concatenate(distances)


def stochastic(
    distances: Distances,
    size: int,
    rng: np.random.Generator,
    *,
    epsilon: float = 0.1,
    progress: Progress | None = None,
) -> Greedy:
    """Each pick is the best of (n / size) ln(1 / epsilon) rows drawn from those left.

    Within 1 - 1/e - epsilon of the best in expectation (Mirzasoleiman et al. 2015).
    """
    state = Greedy(distances, size, progress)
    n = distances.n
    left, alone = rng.permutation(n), n * distances.c - distances.totals()
    share = max(1, int(np.ceil(n / size * np.log(1 / epsilon))))
    for _ in range(size):
        places = rng.choice(len(left), min(share, len(left)), replace=False)
        rows = np.sort(left[places])
        values = state.gains_of(rows) if state.picks else alone[rows]
        best = first_best(values, TIE * distances.c)
        left = left[left != rows[best]]
        state.take_dense(int(rows[best]), float(values[best]))
    return state


def first_best(values: Array, tolerance: float) -> int:
    """The first place whose value is the largest, or less than `tolerance` below it."""
    return int(np.argmax(values >= values.max() - tolerance))


def ragged(start: Index, stop: Index) -> Index:
    """The numbers start_0 .. stop_0 - 1, start_1 .. stop_1 - 1, ... in a row."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(start - ends + lengths, lengths)
