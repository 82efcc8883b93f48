"""From scores to inclusion probabilities: size measures, allocation and exact water-filling.

A score is any real number; a size measure is its non-negative image, to which the chance of being
kept is proportional until it reaches one. `linear`, `softmax` and `rank` are the maps from one to
the other; `calibrate_inclusion` finds the constant that makes the expected size come out right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.errors import require

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_NEWTON_STEPS = 12  # then a sort: each step costs a pass, a sort of the candidates about ten
_CHUNK = 1 << 16  # rows whose temporaries stay in the cache


def as_scores(scores: Any, name: str = "scores") -> Float:
    """Scores as float64 (n,); InputError if empty, not one-dimensional, NaN or infinite."""
    values = np.ascontiguousarray(scores, np.float64)
    require(values.ndim == 1, name, f"shape {values.shape}", "one dimension")
    require(values.size > 0, name, "an empty pool", "at least one row")
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = not np.isfinite(values.sum())
    if suspect and not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        require(False, name, f"{values[row]} at row {row}", "finite numbers")
    return values


def as_measure(size_measure: Any, name: str = "size_measure") -> Float:
    """A size measure as float64 (n,): finite, non-negative, not all zero."""
    values = as_scores(size_measure, name)
    with np.errstate(over="ignore"):
        total = values.sum()
    require(bool(np.isfinite(total)), name, "numbers whose sum overflows", "smaller ones")
    low = values.min()
    require(bool(low >= 0), name, f"{low} at row {int(values.argmin())}", "numbers >= 0")
    high = values.max()
    require(bool(high > 0), name, "only zeros", "at least one positive number")
    require(bool(high > 1e-290), name, f"nothing above {high:g}", "numbers with inverses")
    return values


def linear(scores: Any, eps: float = 0.01) -> Float:
    """Map scores affinely onto [eps, 1]: eps + (1 - eps)(s - min)/(max - min).

    All equal gives ones. scores: (n,) finite; -> float64 (n,). Raises InputError unless
    0 <= eps <= 1. Anand, Tan, Minakova 2023 (arXiv 2311.16298).

    >>> linear([0.0, 1.0, 2.0], eps=0.5).tolist()
    [0.5, 0.75, 1.0]
    """
    s = as_scores(scores)
    require(0 <= eps <= 1, "eps", eps, "0 <= eps <= 1")
    with np.errstate(over="ignore"):
        span = s.max() - s.min()
    require(bool(np.isfinite(span)), "scores", "a range that overflows", "smaller numbers")
    return eps + (1 - eps) * (s - s.min()) / span if span > 0 else np.ones_like(s)


def softmax(scores: Any, temperature: float = 1.0) -> Float:
    """Map scores to exp((s - max)/temperature), in (0, 1].

    Scores further than about 745 temperatures below the best underflow to zero and are never
    drawn; `exponential_keys(..., log=True)` takes the scores themselves and has no such floor.

    >>> softmax([0.0, np.log(2.0)]).tolist()
    [0.5, 1.0]
    """
    require(temperature > 0, "temperature", temperature, "a positive number")
    s = as_scores(scores)
    with np.errstate(over="ignore"):  # what lies infinitely far below the best has no chance
        return np.exp((s - s.max()) / temperature)


def rank(scores: Any) -> Float:
    """Map scores to their ranks 1..n over n, ties sharing the mean rank.

    >>> rank([5.0, -3.0, 5.0, 9.0]).tolist()
    [0.625, 0.25, 0.625, 1.0]
    """
    s = as_scores(scores)
    _, where, counts = np.unique(s, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where] / len(s)


def allocate(counts: Any, size: int, *, minimum: int = 1) -> Int:
    """Share `size` over groups in proportion to `counts`: integers that sum to it exactly.

    Every non-empty group gets at least `minimum` (as far as it has members) and never more than
    it has; the rest goes by largest remainder, the earlier group on a tie. Raises InputError if
    `size` cannot cover the minimum or exceeds the total.

    >>> allocate([70, 25, 5], 10).tolist()
    [7, 2, 1]
    >>> allocate([98, 1, 1], 4).tolist()
    [2, 1, 1]
    """
    c = np.asarray(counts, np.int64)
    floor = np.minimum(c, minimum)
    require(size <= c.sum(), "size", size, f"at most the pool's {c.sum()}")
    require(size >= floor.sum(), "size", size, f"at least {minimum} for each of {len(c)} strata")
    share = np.zeros(len(c), np.int64)
    fixed = np.zeros(len(c), bool)
    while True:  # groups below their minimum are set to it, the others share what is left
        left, mass = size - floor[fixed].sum(), max(int(c[~fixed].sum()), 1)
        quota = left * c / mass
        low = ~fixed & (quota < floor)
        if not low.any():
            break
        fixed |= low
    share[fixed] = floor[fixed]
    share[~fixed] = np.floor(quota[~fixed])
    remainder = np.where(fixed | (share >= c), -1.0, quota - share)
    share[np.argsort(-remainder, kind="stable")[: size - int(share.sum())]] += 1
    return share


def calibrate_inclusion(
    scores: Any, size: float, *, floor: float = 0.0, costs: Any = None
) -> tuple[Float, float]:
    """Inclusion probabilities proportional to scores, capped at one, with a given total.

    q_i = min(1, floor + s_i / alpha) for s_i > 0 and 0 for s_i = 0, where alpha > 0 is the one
    number with sum_i q_i = size (or sum_i c_i q_i = size, a budget, if costs are given). Exact
    water-filling: Newton's method on a piecewise linear convex function, so that it ends at the
    solution itself, in about five passes; scores made to need many more are sorted instead.

    scores: (n,) finite, >= 0; size: a positive number, at least floor times the number of
    positive scores. -> q float64 (n,), alpha. If size reaches the positive rows' total, each of
    them gets q = 1. Raises InputError. Time O(n), memory one float64 and one bool a row.
    Woodruff and Yasuda 2023 (arXiv 2306.00732), Def. 1.1, with floor = 1/n.

    >>> q, alpha = calibrate_inclusion([1.0, 1.0, 2.0, 100.0], 2)
    >>> q.tolist(), alpha
    ([0.25, 0.25, 0.5, 1.0], 4.0)
    """
    s = as_measure(scores, "scores")
    require(0 <= floor < 1, "floor", floor, "0 <= floor < 1")
    require(np.isfinite(size) and size > 0, "size", size, "a positive number")
    c = None if costs is None else as_scores(costs, "costs")
    if c is not None:
        require(c.shape == s.shape, "costs", f"{len(c)} values", f"{len(s)}, one a row")
        require(bool(c.min() > 0), "costs", f"{c.min()} at row {int(c.argmin())}", "numbers > 0")
    alpha = _water_level(s, float(size), floor, c)
    if alpha == 0.0:  # no water level: everything positive is kept
        return (s > 0).astype(np.float64), float(s[s > 0].min())
    q = np.empty_like(s)
    for start in range(0, len(s), _CHUNK):
        t, out = s[start : start + _CHUNK], q[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            np.divide(t, alpha, out=out)
        if floor:
            out[t > 0] += floor
        np.minimum(out, 1.0, out=out)
    return q, alpha


def _water_level(s: Float, size: float, floor: float, costs: Float | None) -> float:
    """The alpha of `calibrate_inclusion`, 0.0 if the whole pool fits.

    With S the rows at one and U the other positive rows,
    alpha = sum_U c s / (size - sum_S c - floor sum_U c), and S = {s >= (1 - floor) alpha}.
    One step from anywhere lands at or above the solution; from there alpha only falls and S only
    grows until both stand still. A solved subsample gives the start.
    """
    everything = float(np.count_nonzero(s) if costs is None else costs[s > 0].sum())
    if size >= everything:
        return 0.0
    need = f"more than floor * rows = {floor * everything}"
    require(size > floor * everything, "size", size, need)
    step = max(1, len(s) // _CHUNK)
    alpha = np.inf
    if step > 1:
        sample, cost = s[::step], None if costs is None else costs[::step]
        whole = float(np.count_nonzero(sample) if cost is None else cost[sample > 0].sum())
        alpha = _sorted_water_level(sample, size * whole / everything, floor, cost)
    for steps in range(_NEWTON_STEPS):
        below, kept = _below(s, (1 - floor) * alpha, costs)
        room = size - kept - floor * (everything - kept)
        if room <= 0:  # the start was too low to take a step from
            alpha = np.inf
            continue
        lower = below / room
        if steps > 1 and not lower < alpha:
            return alpha
        alpha = lower
    return _sorted_water_level(s, size, floor, costs)


def _below(s: Float, level: float, costs: Float | None) -> tuple[float, float]:
    """sum c s over the rows under `level`, and sum c over the others, in one pass."""
    below = kept = 0.0
    for start in range(0, len(s), _CHUNK):
        t = s[start : start + _CHUNK]
        under = t < level
        if costs is None:
            full = len(t) - int(np.count_nonzero(under))
            kept += full
            below += float(t @ under) if full else float(t.sum())
        else:
            c = costs[start : start + _CHUNK]
            kept += float(c @ ~under)
            below += float((c * t) @ under)
    return below, kept


def _sorted_water_level(s: Float, size: float, floor: float, costs: Float | None) -> float:
    order = np.argsort(-s, kind="stable")[: np.count_nonzero(s)]
    t, c = s[order], np.ones(len(order)) if costs is None else costs[order]
    rest_mass = np.cumsum((c * t)[::-1])[::-1]  # of the rows from i on, summed smallest first
    rest_cost = np.cumsum(c[::-1])[::-1]
    room = size - (rest_cost[0] - rest_cost) - floor * rest_cost
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(room > 0, rest_mass / room, np.inf)
    # The first row that stays at or below one fixes the level; where rounding lets none do so
    # before the rows at one have used up the size, the last row that found room does.
    fits = (level * (1 - floor) >= t) & (room > 0)
    first = int(np.argmax(fits)) if fits.any() else int(np.flatnonzero(room > 0)[-1])
    return float(level[first])
