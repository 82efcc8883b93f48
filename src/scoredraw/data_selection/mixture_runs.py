"""Pilot trainings: draw a mixture from the sources, train, measure; each run once and on record.

Repeat r of a mixture takes the first round(N p_k) rows of source k in an order that belongs to
(seed, stream, source, r). Mixtures and sizes of one repeat so share as many rows as they can, and
what differs between two measurements is the mixture, not the luck of the draw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.source_transport import check_mixtures
from scoredraw.errors import InputError, require
from scoredraw.journal import Journal
from scoredraw.uniforms import Rng, RowUniforms

Array = NDArray[np.float64]
Int = NDArray[np.int64]
TrainAndEval = Callable[[NDArray[Any], NDArray[Any]], float]
Progress = Callable[[int, int], None]
Source = tuple[ArrayLike, ArrayLike]


def mixture_counts(p: ArrayLike, n: int) -> Int:
    """n rows shared over the sources in proportion to p by largest remainder, (..., m).

    Raises `InputError` for a p off the simplex or n < 1.

    >>> mixture_counts([0.5, 0.25, 0.25], 6).tolist()
    [3, 2, 1]
    """
    require(n >= 1, "n", n, "a size above 0")
    shares = np.asarray(p, dtype=np.float64)
    wanted = n * check_mixtures(shares, shares.shape[-1] if shares.ndim else 0)
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(np.argsort(-(wanted - counts), axis=-1, kind="stable"), axis=-1)
    out: Int = counts + (order < n - counts.sum(axis=-1, keepdims=True))
    return out


class MixtureRuns:
    """Trains `train_and_eval(X, y) -> performance` on mixtures of sources, and remembers.

    sources : (X_k (n_k, d), y_k (n_k,)) each; at least two, none empty. With `replacement` rows
    are drawn with replacement and a source can give more than it has; without, it can't.
    journal : a file of finished runs. A second process with the same data, seed and function name
    goes on from it; another's journal is refused.
    progress : called as (runs done, runs asked for so far).

    Raises `InputError` on empty or unequal sources, a mixture that asks for more rows than a
    source has, and performance that is not a finite number.

    >>> runs = MixtureRuns([([[0.0], [1.0]], [0, 1]), ([[2.0]], [1])], lambda X, y: X.mean())
    >>> runs.measure([[0.0, 1.0]], 1).tolist()
    [[2.0]]
    """

    def __init__(
        self,
        sources: Sequence[Source],
        train_and_eval: TrainAndEval,
        *,
        replacement: bool = False,
        rng: Rng = 0,
        journal: str | Path | None = None,
        depends: Any = None,
        progress: Progress | None = None,
    ) -> None:
        require(len(sources) >= 2, "sources", len(sources), "two or more")
        parts = [_source(k, *pair) for k, pair in enumerate(sources)]
        widths = {x.shape[1] for x, _ in parts}
        require(len(widths) == 1, "sources", f"{sorted(widths)} columns", "as many in each")
        self.X = np.concatenate([x for x, _ in parts])
        self.y = np.concatenate([y for _, y in parts])
        self.sizes: Int = np.array([len(y) for _, y in parts])
        self.m, self._starts = len(parts), np.cumsum(self.sizes) - self.sizes
        self.train_and_eval, self.replacement, self.progress = train_and_eval, replacement, progress
        self.uniforms = RowUniforms(rng)
        self._orders: dict[tuple[str, int], Int] = {}
        self._results: dict[str, float] = {}
        self._done = self._asked = 0
        self._journal = Journal(journal) if journal is not None else None
        if self._journal is not None:
            self._resume(self._journal, depends)

    def _resume(self, journal: Journal, depends: Any) -> None:
        name = getattr(self.train_and_eval, "__qualname__", type(self.train_and_eval).__name__)
        facts = [name, repr(depends), self.replacement, self.sizes.tolist()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for array in (self.X, self.y.astype(str), self.uniforms.key):
            digest.update(np.ascontiguousarray(array).tobytes())
        self._key = digest.hexdigest()[:16]
        records = journal.records()
        strange = any(record.get("key") != self._key for record in records)
        require(not strange, "journal", f"{journal.path} of other runs", "a new path")
        self._results = {record["run"]: record["performance"] for record in records}

    def feasible(self, P: ArrayLike, n: int) -> NDArray[np.bool_]:
        """Which mixtures (g, m) the sources have rows enough for at size n, (g,)."""
        counts = np.atleast_2d(mixture_counts(P, n))
        enough = (counts <= self.sizes).all(axis=1)
        return np.asarray(enough | self.replacement)

    def counts(self, P: ArrayLike, n: int) -> Int:
        """The rows of each source in mixtures (g, m) of n, or an `InputError`: it has too few."""
        counts, possible = np.atleast_2d(mixture_counts(P, n)), self.feasible(P, n)
        if not possible.all():
            i = int(np.flatnonzero(~possible)[0])
            k = int(np.argmax(counts[i] - self.sizes))
            came = f"mixture {i}, which takes {counts[i, k]} rows of source {k}"
            raise InputError(f"P: got {came}, want at most the {self.sizes[k]} it has")
        return counts

    def rows(self, counts: Int, repeat: int, stream: str, *, distinct: bool = False) -> Int:
        """The rows of one training set, as positions in the sources laid end to end.

        distinct : without replacement whatever the runs do.
        """
        again = self.replacement and not distinct
        picked = [
            self._starts[k] + self._first(int(count), k, repeat, f"{stream}/{k}", again)
            for k, count in enumerate(counts)
        ]
        return np.concatenate(picked)

    def _first(self, count: int, source: int, repeat: int, stream: str, again: bool) -> Int:
        n = int(self.sizes[source])
        if again:
            drawn = self.uniforms.block(0, count, stream=stream, round=repeat)
            return (drawn * n).astype(np.int64)
        if (stream, repeat) not in self._orders:
            u = self.uniforms.block(0, n, stream=stream, round=repeat)
            self._orders[stream, repeat] = np.argsort(u, kind="stable")
        return self._orders[stream, repeat][:count]

    def measure(self, P: ArrayLike, n: int, *, repeats: int = 1, stream: str = "pilot") -> Array:
        """Performance of mixtures P (g, m) trained on n rows, (g, repeats)."""
        require(repeats >= 1, "repeats", repeats, "1 or more")
        P = np.atleast_2d(check_mixtures(P, self.m, "P"))
        counts = self.counts(P, n)
        self._asked += len(P) * repeats
        out = np.empty((len(P), repeats))
        for i, count in enumerate(counts):
            for repeat in range(repeats):
                out[i, repeat] = self._run(count, repeat, stream)
                self._done += 1
                if self.progress is not None:
                    self.progress(self._done, self._asked)
        return out

    def _run(self, count: Int, repeat: int, stream: str) -> float:
        name = f"{stream} {repeat} {count.tolist()}"
        if name not in self._results:
            rows = self.rows(count, repeat, stream)
            value = float(self.train_and_eval(self.X[rows], self.y[rows]))
            came = f"{value} for rows {count.tolist()} of the sources"
            require(np.isfinite(value), "train_and_eval", came, "a finite performance")
            self._results[name] = value
            if self._journal is not None:
                record = {"key": self._key, "run": name, "performance": value}
                self._journal.append(record)
        return self._results[name]


def _source(k: int, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    x, labels = np.asarray(X), np.asarray(y)
    fits = x.ndim == 2 and len(x) > 0 and labels.shape == (len(x),)
    came = f"shapes {x.shape} and {labels.shape} in source {k}"
    require(fits, "sources", came, "(n, d) and (n,), with at least one row")
    numeric = x.dtype.kind in "fiub" and bool(np.isfinite(x).all())
    require(numeric, "sources", f"NaN, infinity or text in source {k}", "finite numbers")
    return x, labels
