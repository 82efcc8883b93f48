"""Compiled: what `resampling_points` does in several passes, in one, in lanes and two threads.

A running sum waits for its last addition, and a loop over copies guesses how many there are. Here
the sums of the lanes run beside each other, and particle i writes i + 1 where the points after its
stretch begin, later ones over earlier ones: the running maximum of that are the ids, and no branch
depends on the weights. Each thread has half of the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scoredraw import resampling_points as plain
from scoredraw.resampling_points import LANES, halves, scale_to
from scoredraw.uniforms import mix

Float = NDArray[np.float64]
Int = NDArray[np.int64]

HALF = LANES // 2
NO_SEED = np.uint64(0)


def compiled(function: Callable[..., Any], **names: Any) -> Any:
    """By numba; kept on disk where that can be written to. names: what it calls, compiled."""
    if names:
        function = FunctionType(function.__code__, function.__globals__ | names)
    try:
        return njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:
        return njit(function, nogil=True, error_model="numpy")


before_comb = compiled(plain.before_comb)
uniform = compiled(plain.uniform, mix=compiled(mix))
before_strata = compiled(plain.before_strata, uniform=uniform)
whole_part = compiled(plain.whole_part)


def comb(w: Float, size: int, offset: float) -> Int:
    """As `resampling_points.comb`, of its offset."""
    return placed(w, size, partial(plain.before_comb, offset=offset), offset, NO_SEED, False)


def strata(w: Float, size: int, seed: np.uint64) -> Int:
    """As `resampling_points.strata`, of its seed."""
    return placed(w, size, partial(plain.before_strata, seed=seed), 0.0, seed, True)


def placed(w: Float, size: int, before: Callable[[Float], Float], *points: Any) -> Int:
    """Ids, of what says how many points lie before a level, also in the terms of `place`."""
    starts = lane_starts(w)
    scale = scale_to(size, starts[-1])
    ends, stops = begun(before(starts * scale), w.shape[1], size)
    halves(lambda half: place(w, starts, scale, *points, stops, half, ends))
    return maxima(ends, size)


def copies_and_comb(w: Float, size: int, offset: float) -> Int:
    """As `resampling_points.copies_and_comb`, of its offset."""
    scale, sums = size / lane_starts(w)[-1], np.zeros((2, LANES))
    halves(lambda half: rest_sums(w, scale, half, sums))
    copies, starts = np.hstack([np.zeros((2, 1)), np.cumsum(sums, axis=1)])
    rescale = scale_to(size - copies[-1], starts[-1])
    before = copies + plain.before_comb(starts * rescale, offset)
    ends, stops = begun(before, w.shape[1], size)
    halves(lambda half: place_rest(w, scale, copies, starts, rescale, offset, stops, half, ends))
    return maxima(ends, size)


def levels(w: Float, size: float | None) -> Float:
    """As `resampling_points.levels`, or its running sums for no size."""
    starts = lane_starts(w)
    scale = 1.0 if size is None else scale_to(size, starts[-1])
    halves(lambda half: write_levels(w, starts, scale, half))
    return w


def merged(points: Float, ends: Float) -> Int:
    """The first particle whose end lies above each of the sorted points."""
    ids = np.empty(len(points), np.int64)
    line, m = ends.reshape(-1), ends.shape[1]
    first = np.append(np.searchsorted(points, np.append(-np.inf, ends[:-1, -1])), len(points))
    last = np.searchsorted(line, points[np.maximum(first[1:] - 1, 0)], side="right")
    steps = np.where(np.diff(first) > 0, np.diff(first) + last - m * np.arange(LANES), 0)
    halves(lambda half: merge(points, line, first, steps, half, ids))
    return ids


def maxima(ends: Int, size: int) -> Int:
    """Running maxima in place, as one line of the first `size`."""
    before = tops(ends)
    halves(lambda half: write_maxima(ends, before, half))
    return ends.reshape(-1)[:size]


def begun(before: Float, m: int, size: int) -> tuple[Int, Int]:
    """Room for `size` ids and what is written beyond, in lanes, and `before` as whole numbers.

    before: (LANES + 1,) how many points lie before each lane of m particles. Where a lane begins
    there stands how many particles come before it: others write only before where theirs stops.
    """
    ends, stops = np.zeros((LANES, -(-(size + 2) // LANES)), np.int64), before.astype(np.int64)
    for lane in range(LANES):
        ends.reshape(-1)[stops[lane]] = lane * m
    return ends, stops


@compiled
def write_uniforms(seed: Any, first: int, out: Float) -> None:
    """`uniform` first, first + 1, ..."""
    for i in range(len(out)):
        out[i] = uniform(seed, np.uint64(first + i))


@compiled
def lane_starts(w: Float) -> Float:
    """(LANES + 1,) the sum before each lane, and of all."""
    sums, starts = np.zeros(LANES), np.zeros(LANES + 1)
    for j in range(w.shape[1]):
        for lane in range(LANES):
            sums[lane] += w[lane, j]
    for lane in range(LANES):
        starts[lane + 1] = starts[lane] + sums[lane]
    return starts


@compiled
def write_levels(w: Float, starts: Float, scale: float, half: int) -> None:
    sums, low = np.zeros(HALF), half * HALF
    for j in range(w.shape[1]):
        for h in range(HALF):
            sums[h] += w[low + h, j]
            w[low + h, j] = (starts[low + h] + sums[h]) * scale


@compiled
def place(
    w: Float, starts: Float, scale: float, offset: float, seed: Any, in_strata: bool, stops: Int,
    half: int, ends: Int,
) -> None:  # fmt: skip
    """Write 1 + its number where the points after each particle's stretch begin."""
    m, to, low, sums = w.shape[1], ends.reshape(-1), half * HALF, np.zeros(HALF)
    for j in range(m):
        for h in range(HALF):
            sums[h] += w[low + h, j]
            end = (starts[low + h] + sums[h]) * scale
            before = int(before_strata(end, seed) if in_strata else before_comb(end, offset))
            if before < stops[low + h + 1]:
                to[before] = (low + h) * m + j + 1


@compiled
def rest_sums(w: Float, scale: float, half: int, sums: Float) -> None:
    """Of each lane the copies, (0, lane), and what is left of expected counts, (1, lane)."""
    copies, rest, first = np.zeros(HALF), np.zeros(HALF), half * HALF
    for j in range(w.shape[1]):
        for h in range(HALF):
            expected = w[first + h, j] * scale
            whole = whole_part(expected)
            copies[h] += whole
            rest[h] += max(expected - whole, 0.0)
    sums[0, first : first + HALF] = copies
    sums[1, first : first + HALF] = rest


@compiled
def place_rest(
    w: Float, scale: float, copies: Float, starts: Float, rescale: float, offset: float,
    stops: Int, half: int, ends: Int,
) -> None:  # fmt: skip
    """The same, of each particle's copies and a comb over the rest."""
    m, to, low = w.shape[1], ends.reshape(-1), half * HALF
    sums, counted = np.zeros(HALF), copies[low : low + HALF].copy()
    for j in range(m):
        for h in range(HALF):
            expected = w[low + h, j] * scale
            whole = whole_part(expected)
            counted[h] += whole
            sums[h] += max(expected - whole, 0.0)
            end = (starts[low + h] + sums[h]) * rescale
            before = int(counted[h] + before_comb(end, offset))
            if before < stops[low + h + 1]:
                to[before] = (low + h) * m + j + 1


@compiled
def tops(ends: Int) -> Int:
    """(LANES,) the maximum before each lane."""
    found = np.zeros(LANES, np.int64)
    for lane in range(1, LANES):
        found[lane] = max(found[lane - 1], ends[lane - 1].max())
    return found


@compiled
def write_maxima(ends: Int, before: Int, half: int) -> None:
    low = half * HALF
    top = before[low : low + HALF].copy()
    for k in range(ends.shape[1]):
        for h in range(HALF):
            top[h] = max(top[h], ends[low + h, k])
            ends[low + h, k] = top[h]


@compiled
def merge(points: Float, line: Float, first: Int, steps: Int, half: int, ids: Int) -> None:
    """Each step of a lane takes a point, or goes on to the next particle."""
    m, low = len(line) // LANES, half * HALF
    k, i = first[low : low + HALF].copy(), np.arange(low, low + HALF) * m
    together = steps[low : low + HALF].min()
    for _ in range(together):
        for h in range(HALF):
            ids[k[h]] = i[h]
            taken = points[k[h]] < line[i[h]]
            k[h] += taken
            i[h] += 1 - taken
    for h in range(HALF):
        for _ in range(steps[low + h] - together):
            ids[k[h]] = i[h]
            taken = points[k[h]] < line[i[h]]
            k[h] += taken
            i[h] += 1 - taken
