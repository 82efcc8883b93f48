"""The simplex of mixtures: a grid on it, the way back to it, and climbing along it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.source_transport import check_mixtures
from scoredraw.errors import require

Array = NDArray[np.float64]


def mixture_grid(m: int, parts: int | None = None, *, at_most: int = 36) -> Array:
    """Every mixture of m sources in steps of 1/parts, (C(parts + m - 1, m - 1), m).

    Without `parts` the finest grid of `at_most` mixtures or fewer, but at least halves.

    >>> mixture_grid(2, 2).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    require(m >= 2, "m", m, "two sources or more")
    if parts is None:
        parts = 2
        while comb(parts + m, m - 1) <= at_most:
            parts += 1
    require(parts >= 1, "parts", parts, "a positive count")
    # stars and bars: the gaps between m - 1 bars among parts + m - 1 places
    bars = np.array(list(combinations(range(parts + m - 1), m - 1)))
    ends = np.column_stack([np.full(len(bars), -1), bars, np.full(len(bars), parts + m - 1)])
    grid: Array = (np.diff(ends, axis=1) - 1) / parts
    return grid


def project_simplex(v: ArrayLike) -> Array:
    """The nearest point of the simplex to v (..., m), in Euclidean distance. O(m log m).

    max(v - τ, 0) with the one τ that makes it sum to 1. Held, Wolfe and Crowder (1974).

    >>> project_simplex([0.9, 0.5, -1.0]).round(6).tolist()
    [0.7, 0.3, 0.0]
    """
    x = np.asarray(v, dtype=np.float64)
    require(x.ndim >= 1 and x.size > 0, "v", f"shape {x.shape}", "vectors (..., m)")
    require(bool(np.isfinite(x).all()), "v", "NaN or infinity", "finite numbers")
    ordered = -np.sort(-x, axis=-1)
    over = np.cumsum(ordered, axis=-1) - 1
    count = np.arange(1, x.shape[-1] + 1)
    held = (ordered * count > over).sum(axis=-1, keepdims=True)
    tau = np.take_along_axis(over, held - 1, axis=-1) / held
    nearest = np.maximum(x - tau, 0.0)
    out: Array = nearest / nearest.sum(axis=-1, keepdims=True)
    return out


class Trace(NamedTuple):
    """The steps of an optimisation: mixtures (T + 1, m) and their values (T + 1,)."""

    mixtures: Array
    values: Array


def optimise_mixture(
    objective: Callable[[Array], tuple[float, Array]],
    start: ArrayLike,
    *,
    steps: int = 100,
    lr: float | None = None,
    decay: float = 0.9,
    method: str = "projected",
) -> tuple[Array, Trace]:
    r"""Climb an objective on the simplex; returns its best mixture (m,) and the `Trace`.

    ``"projected"``: :math:`p\leftarrow\Pi_\Delta(p+\eta_t\nabla)`; ``"exponentiated"``:
    :math:`p\leftarrow p\,e^{\eta_t\nabla}/Z` (a source that starts at 0 stays there);
    :math:`\eta_t=\eta_0\,\mathrm{decay}^t`. Every p is on the simplex.

    objective : p -> (value, gradient (m,)), to be made large; the gradient counts up to a constant.
    lr : η0. None takes one over the length of the first gradient along the simplex, whatever the
        unit of the value: early steps may cross the simplex, and the decay settles them. The
        published 5e-4 suits values in per cent: all steps together go no further than
        lr · |gradient| / (1 - decay).

    Raises `InputError` on a start off the simplex and steps, lr or decay out of range.
    """
    p = np.asarray(start, dtype=np.float64)
    p = check_mixtures(p, p.shape[-1] if p.ndim else 0, "start")
    require(steps >= 0, "steps", steps, "0 or more")
    require(lr is None or 0 < lr < np.inf, "lr", lr, "a rate above 0, or None")
    require(0 < decay <= 1, "decay", decay, "a factor in (0, 1]")
    known = ("projected", "exponentiated")
    require(method in known, "method", repr(method), " or ".join(known))
    mixtures, values = [p], []
    rate = lr
    for step in range(steps + 1):
        value, gradient = objective(p)
        values.append(float(value))
        gradient = gradient - gradient.mean()
        if step == steps:
            break
        if rate is None:
            rate = 1 / max(float(np.linalg.norm(gradient)), np.finfo(float).tiny)
        if method == "projected":
            p = project_simplex(p + rate * decay**step * gradient)
        else:
            weight = p * np.exp(rate * decay**step * (gradient - gradient.max()))
            p = weight / weight.sum()
        mixtures.append(p)
    trace = Trace(np.stack(mixtures), np.array(values))
    return trace.mixtures[trace.values.argmax()], trace
