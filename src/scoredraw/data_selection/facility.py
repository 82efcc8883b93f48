"""Greedy facility location without the matrix of similarities.

    f(S) = sum_i max_{j in S} s(i, j),      s(i, j) = c - d(i, j) >= 0,

is monotone and submodular, so that taking again and again the row of largest gain

    g(j) = sum_i max(0, D_i - d(i, j)),     D_i = min_{j in S} d(i, j),

comes within 1 - 1/e of the best S (Nemhauser, Wolsey, Fisher 1978). Gains only fall. While most of
them are far from zero everywhere, an old gain is a bound, and only rows whose bound reaches the
best are looked at again (Minoux 1978): what the picks since then took away is subtracted in parts,
for many rows at a time as one matrix product, until the bound falls short. Once the pairs with
d(i, j) < D_i have become few, they are all that can still matter: they are listed once, and from
then on every gain is kept exact by subtracting what a pick takes away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Progress = Callable[[int, int], None]

TIE = 1e-10  # gains that differ by less than this share of c are equal: the first row is taken
FIRST, GROWTH = 16, 8  # rows whose bounds are seen to first, and how many times as many next
CLOSE = 64  # rows whose gains float32 may leave undecided
CELLS, LEAST = 1_000_000, 16  # distances that a thread holds at a time, and rows of them
HIGH, WIDE = 256, 1024  # the same for sums: rows j, and rows i
LARGE, FEW, THREADS = 2000, 64, 8  # rows, and rows to tell, worth more threads; at most so many
PAIRS = 160  # pairs listed, per row: at most this, or d if that is more
SAME = 1e-13  # squared distances below this are rounding: the rows are the same
SAMPLE = 128  # rows that tell how many pairs there would be


class Distances:
    """d(i, j) of any rows i and j, from one matrix product.

    "cosine": (1 - cos) / 2, c = 1; "sqeuclidean": |x - y|^2; "euclidean": |x - y|; "rbf":
    1 - exp(-gamma |x - y|^2), c = 1. For the two in the middle lengths are in units of the largest
    distance from the mean, and c is the (squared) diameter of that ball, which no distance
    exceeds; picks do not depend on c. In the rows' own units d and c are `unit` times as much.

    Where d is linear in the product, sums for bounds are of float32 until `sum_in` says otherwise.
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
        self.squares = factor * squares
        self.left = np.column_stack([-2 * factor * x, ones, self.squares])
        self.right = np.vstack([x.T, self.squares, ones])
        steepest = {"euclidean": 0.5 / np.sqrt(SAME), "rbf": self.gamma}
        self.steep = steepest.get(similarity, 1.0)  # d moves by at most so much with the product
        self.linear = similarity in ("cosine", "sqeuclidean")
        self.sum_in(np.float32 if self.linear else np.float64)
        self.step = min(len(x), max(LEAST, CELLS // len(x)))
        self.pool: ThreadPoolExecutor | None = None
        self.rooms = [self._room()]

    def sum_in(self, dtype: Any) -> None:
        self.dtype = dtype
        self.towards = (-self.left if self.linear else self.left).astype(dtype)
        self.seen = self.right.T.astype(dtype, order="C")  # rows i side by side: quick to gather

    def _room(self) -> Array:
        return np.empty(max(self.step * self.n, min(HIGH, self.n) * min(WIDE, self.n)))

    @contextmanager
    def in_threads(self) -> Iterator[None]:
        """As many threads as BLAS has: products are not half of the work."""
        from threadpoolctl import ThreadpoolController

        if self.n < LARGE:
            yield
            return
        blas = ThreadpoolController().select(user_api="blas")
        count = min(THREADS, max((library["num_threads"] for library in blas.info()), default=1))
        self.rooms = [self._room() for _ in range(count)]
        with blas.limit(limits=1), ThreadPoolExecutor(count) as self.pool:
            yield
        self.pool, self.rooms = None, self.rooms[:1]

    def share(self, function: Callable[[Any, Array], Any], pieces: list[Any]) -> list[Any]:
        """function(piece, room) for each piece, at most as many as there are rooms."""
        run: Any = map if self.pool is None or len(pieces) == 1 else self.pool.map
        return list(run(function, pieces, self.rooms))

    def rows(self, rows: Any, columns: Any = slice(None), room: Array | None = None) -> Array:
        """d(i, j) for i in rows and j in columns (all); the next call overwrites it."""
        room = self.rooms[0] if room is None else room
        return self._bent(product(self.left[rows], self.right[:, columns], room))

    def terms(self, columns: Index, near: Array, drop: Array | None = None) -> Terms:
        """Rows i with D_i = `near`, which a pick brought down by `drop`."""
        right = self.seen[columns]
        squares = self.squares[columns]
        if self.linear:  # then the product is D_i - d(i, j)
            right[:, self.width] = squares - near
        size = len(near), float(np.sqrt(squares).sum()), float((squares + near).sum())
        return Terms(right, near, None if drop is None else drop.astype(self.dtype), size)

    def sums(self, rows: Index, terms: Terms, room: Array) -> tuple[Array, Array]:
        """sum_i max(0, D_i - d(i, j)) for j in rows, and how far off it may be.

        If the terms have a drop, none of them counts for more than that.
        """
        count, lengths, squares = terms.size
        total, own = self._sums(terms, rows, room), self.squares[rows]
        whole = count * own + 2 * np.sqrt(own) * lengths + squares  # (|x_i| + |x_j|)^2 + D_i
        off = self.steep * (self.width + 10) * whole + 2 * WIDE * total
        return total, np.finfo(self.dtype).eps / 2 * off

    def _sums(self, terms: Terms, rows: Index, room: Array) -> Array:
        total, ones = np.zeros(len(rows)), np.ones(WIDE, self.dtype)
        for at in range(0, len(rows), HIGH):
            left = self.towards[rows[at : at + HIGH]]
            for start in range(0, len(terms.near), WIDE):
                part = slice(start, start + WIDE)
                gap = product(left, terms.right[part].T, room)
                if not self.linear:
                    np.subtract(terms.near[part], self._bent(gap), out=gap)
                np.maximum(gap, 0.0, out=gap)
                if terms.drop is not None:
                    np.minimum(gap, terms.drop[part], out=gap)
                total[at : at + HIGH] += gap @ ones[: gap.shape[1]]
        return total

    def blocks(self) -> Iterator[slice]:
        return (slice(at, min(at + self.step, self.n)) for at in range(0, self.n, self.step))

    def totals(self) -> Array:
        """sum_i d(i, j) for each j, (n,)."""
        if self.linear:
            return np.asarray(self.left.sum(axis=0) @ self.right)
        return np.concatenate([self.rows(block).sum(axis=1) for block in self.blocks()])

    def _bent(self, d: Array) -> Array:
        """d from squared distances, in place."""
        if not self.linear:
            d[d < SAME] = 0.0
        if self.similarity == "euclidean":
            np.sqrt(d, out=d)
        elif self.similarity == "rbf":
            np.negative(np.expm1(np.multiply(d, -self.gamma, out=d), out=d), out=d)
        return d


class Terms(NamedTuple):
    """Some rows i, made ready for sums over them."""

    right: NDArray[Any]
    near: Array
    drop: NDArray[Any] | None
    size: tuple[int, float, float]  # how many; sums of |x_i| and of |x_i|^2 + D_i


def product(left: NDArray[Any], right: NDArray[Any], room: Array) -> NDArray[Any]:
    shape = len(left), right.shape[1]
    return np.matmul(left, right, out=room.view(left.dtype)[: shape[0] * shape[1]].reshape(shape))


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

    def gains_of(self, rows: Index) -> Array:
        """g(j) for the rows asked for."""
        parts = [np.zeros(0)]
        for at in range(0, len(rows), self.of.step):
            gap = self.of.rows(rows[at : at + self.of.step])
            np.subtract(self.near, gap, out=gap)
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
    bounds, look = Bounds(state), 8
    with distances.in_threads():
        while len(state.picks) < size:
            if len(state.picks) >= look:
                if few_pairs(state):
                    by_listed_pairs(state)
                    break
                look += max(1, look // 4)
            bounds.take_best()
    return state


class Bounds:
    """Gains as they were, less some of what the picks since have taken away.

    A pick that brings D_i down by e_i takes from the gain of j

        sum_i min(e_i, max(0, D_i - d(i, j))),

    and the gain less any of these terms is a bound. They are kept in parts, of each pick the
    largest e_i first. A row is told part after part while its bound reaches the best gain known.
    Only the last n terms are kept: a row that has missed others is looked at afresh.
    """

    def __init__(self, state: Greedy) -> None:
        self.state, n = state, state.of.n
        self.gain, self.slack = np.full(n, np.inf), np.zeros(n)
        self.gain[state.picks] = -np.inf
        self.parts: deque[Terms] = deque()
        self.kept, self.last = 0, 0  # terms kept; parts there have been
        self.told = np.full(n, -1)  # the parts, from the very first, that a row's gain is without

    def take_best(self) -> None:
        """Take the row of largest gain."""
        state, tolerance = self.state, TIE * self.state.of.c
        rows = np.flatnonzero(self.reach(slice(None), self.best_known() - tolerance))
        gains = state.gains_of(rows)
        self.gain[rows], self.slack[rows], self.told[rows] = gains, 0.0, self.last
        if len(rows) > CLOSE and state.of.dtype is np.float32:
            state.of.sum_in(np.float64)
            self.forget(0)
        best, before = first_best(gains, tolerance), state.near.copy()
        state.take_dense(int(rows[best]), float(gains[best]))
        self.gain[rows[best]] = -np.inf
        self.keep(before)

    def best_known(self) -> float:
        """What the largest gain is at least, once no row behind with the news can exceed it."""
        low, look = 0.0, FIRST
        while True:
            rows = np.flatnonzero(self.reach(slice(None), low) & (self.told < self.last))
            if not len(rows):
                return low
            if len(rows) > look:
                order = np.argpartition(-self.gain[rows] - self.slack[rows], look)
                rows, look = rows[order[:look]], GROWTH * look
            rows = self.tell(rows, low)
            low = float((self.gain[rows] - self.slack[rows]).max(initial=low))

    def reach(self, rows: Any, low: float) -> NDArray[np.bool_]:
        return np.asarray(self.gain[rows] + self.slack[rows] >= low)

    def tell(self, rows: Index, low: float) -> Index:
        """Tell rows what they have missed while they reach `low`; those that do to the end."""
        of = self.state.of
        missed = self.told[rows] < self.last - len(self.parts)
        everyone = of.terms(np.arange(of.n), self.state.near) if missed.any() else None
        pieces = len(of.rooms) if len(rows) >= FEW else 1
        tell = partial(self._tell, low, everyone)
        return np.concatenate(of.share(tell, np.array_split(rows, pieces)))

    def _tell(self, low: float, everyone: Terms | None, rows: Index, room: Array) -> Index:
        """The same for some of the rows, which are no other thread's."""
        of, first = self.state.of, self.last - len(self.parts)
        afresh = rows[self.told[rows] < first]
        if everyone is not None and len(afresh):
            self.gain[afresh], self.slack[afresh] = of.sums(afresh, everyone, room)
            self.told[afresh] = self.last
        for place in range(self.told[rows].min(), self.last):
            rows = rows[self.reach(rows, low)]
            mine = rows[self.told[rows] == place]
            if len(mine):
                loss, slack = of.sums(mine, self.parts[place - first], room)
                self.gain[mine] = np.maximum(self.gain[mine] - loss, 0.0)
                self.slack[mine] += slack
                self.told[mine] += 1
        return rows[self.reach(rows, low)]

    def keep(self, before: Array) -> None:
        """Keep the terms of a pick, given D from before it."""
        drop = before - self.state.near
        closer = np.flatnonzero(drop > 0)
        closer = closer[np.argsort(-drop[closer])]
        for at in range(0, len(closer), WIDE):
            part = closer[at : at + WIDE]
            self.parts.append(self.state.of.terms(part, before[part], drop[part]))
            self.last += 1
        self.kept += len(closer)
        self.forget(self.state.of.n)

    def forget(self, limit: int) -> None:
        """Leave the last terms, at most `limit`."""
        while self.kept > limit:
            self.kept -= len(self.parts.popleft().near)


def few_pairs(state: Greedy) -> bool:
    """Whether the pairs with d(i, j) < D_i would fit, judged by evenly spaced rows i."""
    n = state.of.n
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    step = state.of.step
    pieces = [rows[at : at + step] for at in range(0, len(rows), step)]
    pairs = sum(np.count_nonzero(state.of.rows(p) < state.near[p, None]) for p in pieces)
    return bool(pairs * (n / len(rows)) <= n * max(PAIRS, state.of.width))


def by_listed_pairs(state: Greedy) -> None:
    """The rest of the picks from the pairs that can still matter."""
    from scipy.sparse import csr_array

    n, near, pairs = state.of.n, state.near, list_pairs(state)
    start, column, distance = pairs.indptr, pairs.indices, pairs.data
    row_of = np.repeat(np.arange(n, dtype=column.dtype), np.diff(start))
    gains = np.bincount(column, near[row_of] - distance, minlength=n).astype(np.float64)
    gains[state.picks] = -np.inf
    order = np.arange(len(column), dtype=start.dtype)
    places = csr_array((order, column, start), shape=(n, n)).tocsc()
    by_column, column_start = places.data, places.indptr
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


def list_pairs(state: Greedy) -> Any:
    """d(i, j) for the j nearer to i than D_i: a sparse matrix, CSR.

    Of two blocks of rows the products are the same both ways, and computed once.
    """
    from scipy.sparse import coo_array

    n, near, of = state.of.n, state.near, state.of

    def list_in(blocks: list[slice], room: Array) -> list[tuple[Any, Any, Array]]:
        listed = []
        for block in blocks:
            d = of.rows(block, slice(block.start, None), room)
            later = d[:, len(d) :]
            a, b = np.divmod(np.flatnonzero(d < near[block, None]), d.shape[1])
            p, q = np.divmod(np.flatnonzero(later < near[block.stop :]), later.shape[1])
            i = np.concatenate([block.start + a, block.stop + q], dtype=np.int32)
            j = np.concatenate([block.start + b, block.start + p], dtype=np.int32)
            listed.append((i, j, np.concatenate([d[a, b], later[p, q]])))
        return listed

    blocks, threads = list(of.blocks()), len(of.rooms)
    shares = of.share(list_in, [blocks[k::threads] for k in range(threads)])
    i, j, d = (np.concatenate(part) for part in zip(*chain(*shares), strict=True))
    return coo_array((d, (i, j)), shape=(n, n)).tocsr()


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
    return np.asarray(np.arange(lengths.sum()) + np.repeat(start - ends + lengths, lengths))
