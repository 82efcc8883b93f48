"""`Draw`: what was chosen from a pool, with which weights, and what may be concluded from it.

If a draw is unbiased, sum(weights * f[indices]) estimates sum(f) over the whole pool without bias
(Horvitz and Thompson 1952; Hansen and Hurwitz 1943 with replacement), for every f.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.errors import InputError, import_extra, require

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


class Measured(NamedTuple):
    """An estimate and its standard error (NaN where the design gives none)."""

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class Draw:
    """A weighted choice of k entries from a pool of n.

    indices: int64 (k,), positions in the pool (repeated if drawn repeatedly).
    weights: float64 (k,); where `unbiased`, sum(weights * f[indices]) estimates sum(f).
    inclusion: float64 (k,) inclusion probabilities (expected counts with replacement; given the
        random threshold for priority and exponential-key draws), or None.
    scores: float64 (k,) the scores of the chosen, or None.
    offsets: int64 (g + 1,) for draws made per problem, query or round, or None.
    info: what the scheme adds; `design` names the variance formula of `total`.

    >>> draw = Draw(np.array([1, 3]), np.array([2.0, 2.0]), n=4)
    >>> draw.take(np.array([10, 20, 30, 40])).tolist()
    [20, 40]
    >>> draw.sample_weight.tolist()
    [1.0, 1.0]
    """

    indices: Int
    weights: Float
    n: int
    inclusion: Float | None = None
    unbiased: bool = False
    scores: Float | None = None
    offsets: Int | None = None
    method: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", np.ascontiguousarray(self.indices, np.int64))
        k = len(self.indices)
        for name in ("weights", "inclusion", "scores"):
            value = getattr(self, name)
            if value is not None:
                value = np.ascontiguousarray(value, np.float64)
                require(value.shape == (k,), name, f"shape {value.shape}", f"({k},)")
                object.__setattr__(self, name, value)
        inside = k == 0 or (self.indices.min() >= 0 and self.indices.max() < self.n)
        require(bool(inside), "indices", "positions outside the pool", f"0 <= index < {self.n}")

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        kind = "unbiased" if self.unbiased else "not for totals"
        return f"Draw({self.method or 'unnamed'}: {len(self)} of {self.n}, {kind})"

    @property
    def sample_weight(self) -> Float:
        """The weights scaled to mean one: what a learner's `sample_weight` wants."""
        return self.weights / self.weights.mean() if len(self) else self.weights

    def total(self, f: Any) -> Measured:
        """Estimate sum(f) over the pool, with its standard error.

        f: array (n,) over the pool, or a callable from indices to values. The error follows the
        design: sum (1 - q)(f/q)^2 for independent (Poisson, and given the threshold priority and
        exponential keys) inclusion; Hajek's (1964) formula for fixed sizes, by stratum; the
        sample variance for draws with replacement. Raises InputError if the draw is not unbiased.
        """
        if not self.unbiased:
            raise InputError(
                f"total: got a {self.method} draw, want one made by an unbiased scheme"
            )
        values = self._values(f)
        return Measured(float(self.weights @ values), float(np.sqrt(self._variance(values))))

    def mean(self, f: Any) -> Measured:
        """Estimate the mean of f over the pool by the ratio sum(w f) / sum(w) (Hajek 1971)."""
        require(len(self) > 0, "mean", "an empty draw", "at least one entry")
        values = self._values(f)
        mean = float(self.weights @ values / self.weights.sum())
        if not self.unbiased:
            return Measured(mean, float("nan"))
        return Measured(mean, float(np.sqrt(self._variance(values - mean))) / self.n)

    def then(self, second: Draw) -> Draw:
        """The draw that `second`, made from this draw's k entries, leaves of the first pool."""
        require(second.n == len(self), "then", f"a pool of {second.n}", f"a pool of {len(self)}")
        chosen = second.indices
        inclusion = None
        if self.inclusion is not None and second.inclusion is not None:
            inclusion = self.inclusion[chosen] * second.inclusion
        return Draw(
            self.indices[chosen],
            self.weights[chosen] * second.weights,
            self.n,
            inclusion,
            self.unbiased and second.unbiased,
            self.scores[chosen] if self.scores is not None else second.scores,
            method=f"{self.method} then {second.method}",
            info={"design": None},
        )

    def merged(self) -> Draw:
        """The same draw with each repeated entry once, its weights summed.

        Raises InputError for a draw made in groups, whose `offsets` would no longer fit.
        """
        require(self.offsets is None, "merged", "a draw made in groups", "one without offsets")
        rows, where = np.unique(self.indices, return_inverse=True)
        if len(rows) == len(self):
            return self
        first = np.zeros(len(rows), np.int64)
        first[where[::-1]] = np.arange(len(self))[::-1]
        return replace(
            self,
            indices=rows,
            weights=np.bincount(where, self.weights).astype(np.float64),
            inclusion=None if self.inclusion is None else self.inclusion[first],
            scores=None if self.scores is None else self.scores[first],
            info={**{k: v for k, v in self.info.items() if k != "strata"}, "design": None},
        )

    def take(self, data: Any) -> Any:
        """The chosen rows of an array, tensor, frame, Arrow table, `datasets.Dataset` or list."""
        length = data.num_rows if hasattr(data, "num_rows") else _length(data)
        require(length == self.n, "data", f"{length} rows", f"the pool's {self.n}")
        module = type(data).__module__.split(".")[0]
        if module == "pandas":
            return data.iloc[self.indices]
        if module == "datasets":
            return data.select(self.indices)
        if module == "pyarrow":
            return data.take(self.indices)
        if module == "torch":
            torch = import_extra("torch", "torch")
            return data[torch.as_tensor(self.indices, device=data.device)]
        if isinstance(data, list | tuple):
            return type(data)(data[i] for i in self.indices)
        return data[self.indices]

    def to_arrow(self) -> Any:
        """The draw as an Arrow table: `_row`, `_weight`, and `_inclusion`, `_score` if known."""
        import pyarrow as pa

        columns = {"_row": self.indices, "_weight": self.weights}
        columns |= {} if self.inclusion is None else {"_inclusion": self.inclusion}
        columns |= {} if self.scores is None else {"_score": self.scores}
        arrays = {k: v for k, v in self.info.items() if isinstance(v, np.ndarray)}
        plain = {k: v for k, v in self.info.items() if k not in arrays}
        meta = {"n": self.n, "unbiased": self.unbiased, "method": self.method, "info": plain}
        meta["arrays"] = {k: v.tolist() for k, v in arrays.items()}
        meta["offsets"] = None if self.offsets is None else self.offsets.tolist()
        return pa.table(columns).replace_schema_metadata({"scoredraw": json.dumps(meta)})

    def to_frame(self) -> Any:
        """The draw as a pandas frame with the columns of `to_arrow`."""
        import_extra("pandas", "frames")
        return self.to_arrow().to_pandas()

    def save(self, path: str | Path) -> None:
        """Write the draw as a Parquet file, whole or not at all."""
        import pyarrow.parquet as pq

        from scoredraw.journal import atomic_path

        with atomic_path(path) as temporary:
            pq.write_table(self.to_arrow(), temporary)

    @classmethod
    def load(cls, path: str | Path) -> Draw:
        """Read a draw that `save` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        text = (table.schema.metadata or {}).get(b"scoredraw", b"null")
        meta = json.loads(text)
        saved = meta is not None and "arrays" in meta
        require(saved, "path", f"{path} without a draw's metadata", "a saved Draw")
        column = {name: table[name].to_numpy() for name in table.column_names}
        return cls(
            column["_row"],
            column["_weight"],
            meta["n"],
            column.get("_inclusion"),
            meta["unbiased"],
            column.get("_score"),
            None if meta["offsets"] is None else np.array(meta["offsets"], np.int64),
            meta["method"],
            {**meta["info"], **{k: np.array(v) for k, v in meta["arrays"].items()}},
        )

    def _values(self, f: Any | Callable[[Int], Any]) -> Float:
        if callable(f):
            values = np.asarray(f(self.indices), np.float64)
            require(values.shape == (len(self),), "f", f"shape {values.shape}", f"({len(self)},)")
            return values
        values = np.asarray(f, np.float64)
        require(values.shape == (self.n,), "f", f"shape {values.shape}", f"({self.n},)")
        return values[self.indices]

    def _variance(self, values: Float) -> float:
        strata = self.info.get("strata")
        if strata is None:
            return self._stratum_variance(values, np.arange(len(self)))
        groups = (np.flatnonzero(strata == s) for s in np.unique(strata))
        return sum(self._stratum_variance(values[g], g) for g in groups)

    def _stratum_variance(self, values: Float, entries: Int) -> float:
        design = self.info.get("design")
        weights = self.weights[entries]
        expanded = weights * values
        if design == "independent":
            return float(((1 - 1 / weights) * expanded**2).sum())
        if design == "replacement":
            k = len(entries)
            return float(expanded.var(ddof=1) * k) if k > 1 else float("nan")
        if design == "residual":  # the whole copies are certain, the rest is multinomial
            rest = expanded[int(self.info["certain"]) :]
            if len(rest) == 0:
                return 0.0
            return float(rest.var(ddof=1) * len(rest)) if len(rest) > 1 else float("nan")
        if design == "fixed":
            spread = 1 - 1 / weights
            random = spread > 0
            k = int(random.sum())
            if k == 0:
                return 0.0
            if k == 1:
                return float("nan")
            spread, expanded = spread[random], expanded[random]
            centre = (spread @ expanded) / spread.sum()
            return float(k / (k - 1) * (spread @ (expanded - centre) ** 2))
        return float("nan")


def _length(data: Any) -> int:
    return int(data.shape[0]) if hasattr(data, "shape") else len(data)
