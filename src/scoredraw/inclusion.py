"""From scores to inclusion probabilities: size measures, allocation and exact water-filling.

A score is any real number; a size measure is its non-negative image, to which the chance of being
kept is proportional until it reaches one. `linear`, `softmax` and `rank` are the maps from one to
the other; `calibrate_inclusion` finds the constant that makes the expected size come out right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import on_host
from scoredraw.errors import require

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_SAMPLE = 1 << 15  # rows, at least, that tell where to look
_CHUNK = 1 << 14  # rows whose temporaries stay in the cache


def as_scores(scores: Any, name: str = "scores") -> Float:
    """Scores as float64 (n,); InputError if empty, not one-dimensional, NaN or infinite."""
    return _checked(scores, name)[0]


def as_measure(size_measure: Any, name: str = "size_measure") -> Float:
    """A size measure as float64 (n,): finite, non-negative, not all zero."""
    values, low, high = _checked(size_measure, name)
    if low < 0:
        row = int(values.argmin())
        require(False, name, f"{low} at row {row}", "numbers >= 0")
    require(high > 0, name, "only zeros", "at least one positive number")
    require(high > 1e-290, name, f"nothing above {high:g}", "numbers with inverses")
    fits = high < 1e308 / len(values)
    with np.errstate(over="ignore"):
        fits = fits or bool(np.isfinite(values.sum()))
    require(fits, name, "numbers whose sum overflows", "smaller ones")
    return values


def _checked(scores: Any, name: str) -> tuple[Float, float, float]:
    """Scores as float64 (n,), and the smallest and the largest of them."""
    values = np.ascontiguousarray(on_host(scores), np.float64)
    require(values.ndim == 1, name, f"shape {values.shape}", "one dimension")
    require(values.size > 0, name, "an empty pool", "at least one row")
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN would be both
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        require(False, name, f"{values[row]} at row {row}", "finite numbers")
    return values, low, high


def count_positive(s: Float) -> int:
    """How many numbers >= 0 are not zero, without a temporary as long as they are."""
    return sum(int(np.count_nonzero(s[i : i + _CHUNK] > 0)) for i in range(0, len(s), _CHUNK))


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
    water-filling in three passes: a subsample brackets alpha, the rows inside the bracket are
    sorted; all rows are if the subsample misled.

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
    A solved subsample brackets alpha; one pass sums the rows below the bracket, counts those above
    and picks the few inside, which are sorted. A level outside its bracket has all rows sorted.
    """
    everything = float(count_positive(s) if costs is None else costs[s > 0].sum())
    if size >= everything:
        return 0.0
    need = f"more than floor * rows = {floor * everything}"
    require(size > floor * everything, "size", size, need)
    step = len(s) // _SAMPLE
    if step > 1:
        sample, cost = s[::step], None if costs is None else costs[::step]
        low, high = _bracket(sample, size / everything, floor, cost)
        mass, below, above, t, c = _split(s, (1 - floor) * low, (1 - floor) * high, costs)
        below -= len(s) - everything if costs is None else float(costs[s == 0].sum())
        alpha = _sorted_level(t, c, size - above, floor, mass, below)
        if low <= alpha <= high:
            return alpha
    return _sorted_level(s, costs, size, floor, 0.0, 0.0)


def _bracket(s: Float, share: float, floor: float, costs: Float | None) -> tuple[float, float]:
    """The subsample's level, six standard errors to either side."""
    s, c = s[s > 0], np.ones(1) if costs is None else costs[s > 0]
    if not len(s):
        return 0.0, 0.0
    size = share * (len(s) if costs is None else float(c.sum()))
    alpha = _sorted_level(s, None if costs is None else c, size, floor, 0.0, 0.0)
    with np.errstate(over="ignore"):
        q = floor + s / alpha
    part = c * (np.minimum(q, 1.0) - share)
    slope = float(((c * s)[q < 1]).sum()) / alpha  # of the total in log(1 / alpha)
    margin = 6.0 * np.sqrt(float((part * part).sum())) / max(slope, 1e-300)
    return alpha / (1 + margin), alpha * (1 + margin)


def _split(
    s: Float, low: float, high: float, costs: Float | None
) -> tuple[float, float, float, Float, Float | None]:
    """sum c s and sum c of the rows below `low`, sum c of those from `high` on, and the others.

    No BLAS: it would split a dot product among threads, which costs more than it saves here, and
    round by their number.
    """
    mass = below = above = 0.0
    values, prices = [], []
    for start in range(0, len(s), _CHUNK):
        t = s[start : start + _CHUNK]
        c = None if costs is None else costs[start : start + _CHUNK]
        ct = t if c is None else c * t
        under = t < low
        count = int(np.count_nonzero(under))
        if count == len(t):
            mass += float(ct.sum())
            below += count if c is None else float(c.sum())
            continue
        over = t >= high
        mass += float((ct * under).sum())
        below += count if c is None else float((c * under).sum())
        top = int(np.count_nonzero(over))
        above += top if c is None else float((c * over).sum())
        if count + top < len(t):
            under |= over
            inside = np.flatnonzero(~under)
            values.append(t[inside])
            if c is not None:
                prices.append(c[inside])
    none = np.zeros(0)
    middle = np.concatenate([none, *values])
    return mass, below, above, middle, None if costs is None else np.concatenate([none, *prices])


def _sorted_level(
    t: Float, costs: Float | None, room: float, floor: float, mass: float, below: float
) -> float:
    """The level among rows t when others of cost `below` and mass `mass` certainly lie under it."""
    if costs is None:
        t = np.sort(t)
        ct, c = t, np.ones(len(t))
    else:
        order = np.argsort(t, kind="stable")
        t, c = t[order], costs[order]
        ct = c * t
    zeros = int(np.searchsorted(t, 0.0, side="right"))
    t, c, ct = t[zeros:], c[zeros:], ct[zeros:]
    masses = mass + np.concatenate([[0.0], np.cumsum(ct)])
    under = np.concatenate([[0.0], np.cumsum(c)])
    rooms = room - (under[-1] - under) - floor * (below + under)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(rooms > 0, masses / rooms, np.inf)
    room_left = rooms > 0
    fits = np.flatnonzero(room_left[1:] & (level[1:] * (1 - floor) >= t))  # rows below one
    return float(level[fits[-1] + 1 if len(fits) else int(np.argmax(room_left))])
