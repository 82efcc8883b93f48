"""What a growing tree is made of: runs of numbers, rows of nodes that grow, and their states.

The children of several nodes, laid end to end, are runs in one array; backups, softmaxes and draws
work on all runs at once, so that no loop goes over nodes or children.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Reward = Callable[[Any], Any]


# ── formulas ────────────────────────────────────────────────────────────────────────────────────


def soft_backup(values: Any, lam: float = 1.0, log_ratio: Any = 0.0) -> float:
    """(1/λ) log mean exp(λ v + log p/q) of a node's children; their largest for λ = inf.

    values, log_ratio: (k,). O(k).

    >>> round(soft_backup(np.log([1.0, 3.0])), 9), soft_backup([1.0, 5.0], lam=np.inf)
    (0.693147181, 5.0)
    """
    check_lam(lam)
    v = np.asarray(values, np.float64)
    require(v.ndim == 1 and v.size > 0, "values", v.shape, "(k,), k >= 1")
    ratio = np.broadcast_to(np.asarray(log_ratio, np.float64), v.shape)
    return float(backup(v, ratio, np.array([len(v)]), lam)[0])


def widening_limit(N: Any, C: float = 2.0, alpha: float = 0.8) -> Any:
    """C N^α: a node that was visited N times may get a child while it has fewer.

    >>> float(widening_limit(16, 2.0, 0.5))
    8.0
    """
    return C * np.asarray(N, np.float64) ** alpha


def uct_scores(v: Any, n_child: Any, n_parent: Any, c: float = 1.0) -> Any:
    """v + c sqrt(log N(parent) / N(child)).

    >>> uct_scores([1.0, 0.0], [1, 1], 1).tolist()
    [1.0, 0.0]
    """
    return np.asarray(v) + c * np.sqrt(np.log(n_parent) / np.asarray(n_child))


def check_lam(lam: float) -> None:
    require(lam > 0, "lam", lam, "a positive number, or inf")


def runs(counts: Int) -> tuple[Int, Int]:
    """Where runs of these lengths, laid end to end, begin, and each entry's run."""
    return np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)


def backup(v: Float, ratio: Float, counts: Int, lam: float) -> Float:
    """`soft_backup` of runs of these lengths."""
    start, run = runs(counts)
    if math.isinf(lam):
        return np.maximum.reduceat(v, start)
    z = lam * v + ratio
    top = np.maximum.reduceat(z, start)
    safe = np.where(np.isfinite(top), top, 0.0)
    mean = np.add.reduceat(np.exp(z - safe[run]), start) / counts
    with np.errstate(divide="ignore"):
        return (safe + np.log(mean)) / lam


def softmax(v: Float, ratio: Float, counts: Int, lam: float) -> Float:
    """softmax(λ v + log p/q) within runs; even over the largest for λ = inf, and where none is."""
    start, run = runs(counts)
    z = v if math.isinf(lam) else lam * v + ratio
    top = np.maximum.reduceat(z, start)[run]
    if math.isinf(lam):
        e = (z == top).astype(np.float64)
    else:
        e = np.exp(z - np.where(np.isfinite(top), top, 0.0))
        e[top == -np.inf] = 1.0
    return np.asarray(e / np.add.reduceat(e, start)[run])


def arrivals(at: Int) -> tuple[Int, Int, Int, int]:
    """Distinct nodes, which of them each arrival is at, its rank there, and the most at one."""
    nodes, which, counts = np.unique(at, return_inverse=True, return_counts=True)
    order = np.argsort(which, kind="stable")
    start, run = runs(counts)
    rank = np.empty(len(at), np.int64)
    rank[order] = np.arange(len(at)) - start[run]
    return nodes, which, rank, int(counts.max())


def inverted(p: Float, start: Int, counts: Int, which: Int, u: Float) -> Int:
    """Entries of runs of laws p, by inversion of a uniform each: the first whose Σ p exceeds it."""
    total = np.cumsum(p)
    base = np.where(start > 0, total[start - 1], 0.0)
    drawn = np.searchsorted(total, base[which] + u, side="right")
    last = (start + counts - 1)[which]
    if (drawn > last).any():  # rounding: the last of the run that can be drawn
        possible = np.maximum.reduceat(np.where(p > 0, np.arange(len(p)), -1), start)
        drawn = np.where(drawn > last, possible[which], drawn)
    return np.asarray(drawn)


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────

COLUMNS: dict[str, Any] = {
    "parent": np.int64, "level": np.int32, "visits": np.int64, "kids": np.int64,
    "value": np.float64, "fresh": np.float64, "log_ratio": np.float64,
    "start": np.int64, "room": np.int64,
}  # fmt: skip


class Nodes:
    """Rows of growing arrays; node 0 is the root, children of a node are numbered as they came.

    parent (-1 for the root), level (0 for the root), visits N, kids (number of children), value v,
    fresh: the value of the rollout that made the node, log_ratio: log p/q of the edge to it. The
    children of a node stand together in `pool`, from `start`, where there is `room` for some more;
    a full block moves to the end at twice its size. Every operation is amortised O(rows touched).
    """

    def __init__(self) -> None:
        self.size, self.used = 0, 0
        self.columns = {name: np.zeros(1024, kind) for name, kind in COLUMNS.items()}
        self.pool: Int = np.zeros(1024, np.int64)
        self.extend(1, parent=-1, visits=1)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name][: self.size]

    def extend(self, count: int, **values: Any) -> Int:
        """Ids of `count` new rows."""
        ids = np.arange(self.size, self.size + count)
        if self.size + count > len(self.columns["parent"]):
            more = max(count, len(self.columns["parent"]))
            for name, column in self.columns.items():
                self.columns[name] = np.concatenate([column, np.zeros(more, column.dtype)])
        self.size += count
        for name, value in values.items():
            self.columns[name][ids] = value
        return ids

    def children(self, nodes: Int) -> tuple[Int, Int]:
        """The children of these nodes one after the other, and how many each has."""
        counts = self.columns["kids"][nodes]
        if len(nodes) == 1:
            first = self.columns["start"][nodes[0]]
            return self.pool[first : first + counts[0]], counts
        return self.pool[self._places(nodes, counts)], counts

    def _places(self, nodes: Int, counts: Int) -> Int:
        start, run = runs(counts)
        offset = self.columns["start"][nodes] - start
        return offset[run] + np.arange(len(run))

    def adopt(self, parents: Int, ids: Int) -> None:
        """Append ids, which rise, to the children of `parents`, which may repeat."""
        order = np.argsort(parents, kind="stable")
        nodes, counts = np.unique(parents, return_counts=True)
        kids, room = self.columns["kids"], self.columns["room"]
        need = kids[nodes] + counts
        full = need > room[nodes]
        if full.any():
            self._move(nodes[full], need[full])
        start, run = runs(counts)
        rank = np.arange(len(ids)) - start[run]
        self.pool[(self.columns["start"][nodes] + kids[nodes])[run] + rank] = ids[order]
        kids[nodes] = need

    def _move(self, nodes: Int, need: Int) -> None:
        """Give blocks of at least `need` entries at the end of the pool."""
        room = 2 ** np.ceil(np.log2(need)).astype(np.int64)
        total = self.used + int(room.sum())
        if total > len(self.pool):
            self.pool = np.concatenate([self.pool, np.zeros(total, np.int64)])
        counts = self.columns["kids"][nodes]
        old = self.pool[self._places(nodes, counts)]
        self.columns["start"][nodes] = self.used + np.cumsum(room) - room
        self.columns["room"][nodes] = room
        self.pool[self._places(nodes, counts)] = old
        self.used = total


class States:
    """States of the nodes 1, 2, ...: one growing array or tensor, on the chain's device or the CPU.

    Memory: as much again as the states, at most.
    """

    def __init__(self, offload: bool = False) -> None:
        self.rows: Any = None
        self.size, self.offload, self.device = 0, offload, None

    def append(self, x: Any) -> None:
        if is_tensor(x):
            self.device = x.device
            x = x.detach().cpu() if self.offload else x.detach()
        if self.rows is None:
            self.rows = x[:0]
        if self.size + len(x) > len(self.rows):
            more = max(len(x), len(self.rows), 256)
            empty = x.new_empty if is_tensor(x) else lambda shape: np.empty(shape, x.dtype)
            self.rows = joined([self.rows[: self.size], empty((more, *x.shape[1:]))])
        self.rows[self.size : self.size + len(x)] = x
        self.size += len(x)

    def at(self, nodes: Int) -> Any:
        require(self.rows is not None, "tree", "an empty one", "one that has grown")
        index: Any = nodes - 1
        if not is_tensor(self.rows):
            return self.rows[index]
        index = sys.modules["torch"].as_tensor(index, device=self.rows.device)
        return self.rows[index].to(self.device)


def joined(parts: list[Any]) -> Any:
    """Arrays or tensors one after the other."""
    if len(parts) == 1:
        return parts[0]
    return sys.modules["torch"].cat(parts) if is_tensor(parts[0]) else np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks from the root: nodes (b, L + 1), -1 past their ends; depth (b,), the level of those.

    A walk of depth L ends at an old leaf; any other adds a child where it ends.
    """

    nodes: Int
    depth: Int

    def first(self, count: int) -> Walks:
        return Walks(self.nodes[:count], self.depth[:count])


def on_cpu(values: Any, count: int) -> Float:
    if values is None:
        return np.zeros(count)
    return np.asarray(on_host(values), np.float64)


def checked_reward(reward: Reward, x: Any, seen: int = 0) -> Float:
    """reward(x) as float64 (B,), or an InputError that names the sample that has none."""
    r = np.asarray(on_host(reward(x)), np.float64)
    require(r.shape == (len(x),), "reward", f"shape {r.shape}", f"({len(x)},)")
    bad = np.flatnonzero(np.isnan(r) | (r == np.inf))
    if len(bad):
        where = f"at {bad[0]} of {len(r)} samples after iteration {seen}"
        raise InputError(f"reward: got {r[bad[0]]} {where}, want numbers or -inf")
    return r
