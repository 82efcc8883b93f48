"""Farthest-first traversal with most of the work in a few matrix products.

Compared with every row, a pick costs a pass over the data. But distances D_i to the nearest pick
only fall, so the rows that are now among the farthest, the front, are the only candidates until
the largest D in the front sinks to the largest D left outside it. Only then do all rows catch up
with the picks they have missed, in one product, and a new front is formed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.facility import SAME, centred

Array = NDArray[np.float64]
Index = NDArray[np.int64]

SHARE, LEAST = 16, 256  # the front: 1/16 of the rows, or this many
CELLS = 1_000_000  # distances held at a time


def farthest_first(
    x: Array, size: int, first: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Index, Array, Array, Index]:
    """Picks (size,), D at each pick (infinite first), final D (n,), each row's nearest pick (n,).

    Euclidean; equal distances: the row, and the pick, that comes first.
    """
    n = len(x)
    x, length = centred(x)
    pool = Pool(x, size)
    pool.picks[0] = first
    radii = np.full(size, np.inf)
    everyone, front = np.arange(n), np.zeros(0, np.int64)
    limit, told = np.inf, 0  # the largest D outside the front; picks that everyone knows
    for t in range(1, size + 1):
        pool.compare(front, t - 1, t)
        if t == size or pool.near[front].max(initial=-np.inf) <= limit:
            pool.compare(everyone, told, t)
            front, limit = pool.front()
            row, told = int(pool.near.argmax()), t
        else:
            row = int(front[pool.near[front].argmax()])
        if t < size:
            pool.picks[t], radii[t] = row, np.sqrt(max(pool.near[row], 0.0))
        if progress is not None:
            progress(t, size)
    near = np.sqrt(np.maximum(pool.near, 0.0))
    return pool.picks, radii * length, near * length, pool.owner


class Pool:
    """Rows, picks, squared distances `near` to the nearest pick known (-1 for a pick itself)."""

    def __init__(self, x: Array, size: int) -> None:
        self.x, self.squares = x, np.square(x).sum(axis=1)
        self.near, self.owner = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
        self.picks = np.zeros(size, np.int64)

    def compare(self, rows: Index, start: int, stop: int) -> None:
        """Tell rows of the picks start to stop."""
        centres = self.picks[start:stop]
        towards, offset = -2 * self.x[centres].T, self.squares[centres]
        step = max(1, CELLS // (stop - start))
        for at in range(0, len(rows), step):
            block = rows[at : at + step]
            d = self.x[block] @ towards
            d += self.squares[block, None]
            d += offset
            d[d < SAME] = 0.0
            which = d.argmin(axis=1)
            least = d[np.arange(len(block)), which]
            closer = least < self.near[block]
            self.near[block[closer]] = least[closer]
            self.owner[block[closer]] = start + which[closer]
        self.near[centres] = -1.0
        self.owner[centres] = np.arange(start, stop)

    def front(self) -> tuple[Index, float]:
        """The rows farthest off, in order, and the largest distance among the others."""
        n = len(self.near)
        count = max(LEAST, n // SHARE)
        if count >= n:
            return np.arange(n), -np.inf
        order = np.argpartition(-self.near, count)
        return np.sort(order[:count]), float(self.near[order[count:]].max())
