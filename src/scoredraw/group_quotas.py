"""Group quotas: how many of each group a set may hold, and who may still be added.

A set of k is filled one item at a time. With at least l_g and at most h_g of each group, and c_g
so far, a group is open to one of the f free places if

    c_g < h_g   and   (c_g < l_g   or   sum_g' max(l_g' - c_g', 0) < f),

that is, if it has room, and the places that other groups must still get are not taken from them.
Whoever adds only from open groups ends with every quota met. A group that closes stays closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.errors import require
from scoredraw.inclusion import allocate

Int = npt.NDArray[np.int64]


@dataclass
class Quotas:
    """How many of each group: `low` to `high` (G,), `count` so far; group (n,) of each item."""

    group: Int
    low: Int
    high: Int
    count: Int

    def open(self, free: int) -> npt.NDArray[np.bool_]:
        """The groups that may still get one of the `free` places, (G,)."""
        need = np.maximum(self.low - self.count, 0)
        return (self.count < self.high) & ((need > 0) | (need.sum() < free))


def group_quotas(by: Any, quotas: Mapping[Any, Any] | None, n: int, k: int) -> Quotas:
    """Quotas of the groups that `by` (n,) names, for a set of k.

    quotas: {label: count or (least, most)}; labels it leaves out have none to fill, and None is in
    proportion to the groups' sizes. Raises `InputError` for labels that do not occur and quotas
    that k items cannot meet. O(n log n).

    >>> group_quotas(["a", "b", "a", "c"], {"a": 1, "b": (0, 1)}, 4, 3).high.tolist()
    [1, 1, 1]
    """
    labels = np.asarray(by)
    require(labels.shape == (n,), "by", f"shape {labels.shape}", f"({n},), a label an item")
    names, group = np.unique(labels, return_inverse=True)
    sizes = np.bincount(group, minlength=len(names))
    if quotas is None:
        low = high = allocate(sizes, k, minimum=0)
    else:
        known = names.tolist()
        for name in quotas:
            require(name in known, "quotas", repr(name), "labels that occur in by")
        bounds = [quotas.get(name, (0, int(size))) for name, size in zip(known, sizes, strict=True)]
        pairs = np.array([b if np.ndim(b) else (b, b) for b in bounds], np.int64)
        low, high = pairs[:, 0], pairs[:, 1]
        for name, a, b, size in zip(known, low, high, sizes, strict=True):
            require(0 <= a <= b, "quotas", f"{a} to {b} of {name!r}", "0 <= least <= most")
            require(a <= size, "quotas", f"{a} of {name!r}", f"at most the {size} there are")
    most = np.minimum(high, sizes)
    fits = low.sum() <= k <= most.sum()
    require(bool(fits), "quotas", f"{low.sum()} to {most.sum()} in all", f"room for k = {k}")
    return Quotas(group.astype(np.int64), low, most, np.zeros(len(names), np.int64))
