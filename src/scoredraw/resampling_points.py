r"""Sorted points on a line of weights: which particle each of them falls on.

Particle i has the stretch of the line from 0 to `size` that ends at its level

    l_i  =  size t_i / t_N,    t_i = w_1 + ... + w_i,

and a point belongs to the first particle whose level lies above it. For a comb and for strata the
number b_i of points before a level is known at once: particle i has the points b_{i-1} .. b_i - 1.
Points that are drawn freely are merged with the levels.

Weights come in LANES rows, the particles along one row after another, zeros at the end; sums run
along a row, upon what the rows before it have. Where numba is installed, `resampling_kernels` makes
large ones in one pass, with the same additions in the same order, so that the ids are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.uniforms import mix

Float = NDArray[np.float64]
Int = NDArray[np.int64]

LANES = 8
NEARLY = 1e-12  # a count this close below a whole number is that number
LARGE = 1 << 17  # particles or points from which on compiled code is worth loading


def comb(w: Float, size: int, rng: np.random.Generator) -> Int:
    """Ids of the points u, u + 1, ... of one uniform u: int64 (size,). w: in lanes."""
    offset = offset_of(rng, size)
    if (fast := kernels(w.size)) is not None:
        return fast.comb(w, size, offset)
    return repeated(before_comb(levels(w, size), offset), size)


def strata(w: Float, size: int, rng: np.random.Generator) -> Int:
    """Ids of one uniform point in every cell from k to k + 1."""
    seed = rng.integers(1 << 64, dtype=np.uint64)
    if (fast := kernels(w.size)) is not None:
        return fast.strata(w, size, seed)
    return repeated(before_strata(levels(w, size), seed), size)


def copies_and_comb(w: Float, size: int, rng: np.random.Generator) -> Int:
    """Ids: of each particle the whole part of its expected count, and a comb over the rest."""
    offset = offset_of(rng, size)
    if (fast := kernels(w.size)) is not None:
        return fast.copies_and_comb(w, size, offset)
    expected = w * (size / running_sums(w.copy())[-1, -1])
    copies = whole_part(expected)
    left = levels(np.maximum(expected - copies, 0.0), size - copies.sum())
    counted = np.cumsum(copies).reshape(w.shape)
    return repeated(counted + before_comb(left, offset), size)


def independent(w: Float, size: int, rng: np.random.Generator) -> Int:
    """Ids of `size` independent uniform points: sums of exponential gaps, as they come sorted."""
    points = running_sums(exponentials(size + 1, rng)).reshape(-1)
    return fallen(points[:size], w, points[-1])


def fallen(points: Float, w: Float, end: float) -> Int:
    """Ids of sorted points on a line from 0 to `end`, where rounding may have brought one."""
    ends = levels(w, np.nextafter(end, np.inf))
    if (fast := kernels(w.size)) is not None:
        return fast.merged(points, ends)
    return np.searchsorted(ends.reshape(-1), points, side="right")


def offset_of(rng: np.random.Generator, size: int) -> float:
    """A uniform number, so far below 1 that size - 1 lies below size - u in floats."""
    return min(rng.random(), 1.0 - size * 2.0**-52)


# ── for arrays and in compiled code alike ───────────────────────────────────────────────────────


def before_comb(level: Any, offset: float) -> Any:
    """How many of the points offset, offset + 1, ... lie below a level."""
    return np.ceil(level - offset)


def before_strata(level: Any, seed: np.uint64) -> Any:
    """How many of the points k + u_k do, u_k being `uniform` k."""
    cell = np.floor(level)
    return cell + (uniform(seed, np.uint64(cell)) < level - cell)


def uniform(seed: np.uint64, k: Any) -> Any:
    """Of word k of SplitMix64 the top 53 bits, in [0, 1). Steele, Lea and Flood 2014."""
    return (mix(seed + k * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def whole_part(expected: Any) -> Any:
    return np.floor(expected * (1 + NEARLY))


# ── in arrays ───────────────────────────────────────────────────────────────────────────────────


def in_lanes(n: int) -> Float:
    """(LANES, M) for n numbers, zeros where they end."""
    lanes = np.empty((LANES, -(-n // LANES)))
    lanes.reshape(-1)[n:] = 0.0
    return lanes


def weights(a: Float, top: float) -> Float:
    """exp(a - top) of log-weights (N,), in lanes."""
    w = in_lanes(len(a))
    flat = w.reshape(-1)[: len(a)]

    def exponentiate(half: int) -> None:
        part = slice(half * (len(a) // 2), len(a) if half else len(a) // 2)
        np.subtract(a[part], top, out=flat[part])
        np.exp(flat[part], out=flat[part])

    halves(exponentiate, len(a))
    return w


def running_sums(w: Float) -> Float:
    """Weights in lanes become t."""
    if (fast := kernels(w.size)) is not None:
        return fast.levels(w, None)
    t = np.cumsum(w, axis=1, out=w)
    t[1:] += np.cumsum(t[:-1, -1])[:, None]
    return t


def levels(w: Float, size: float) -> Float:
    """Weights become the ends of their stretches."""
    if (fast := kernels(w.size)) is not None:
        return fast.levels(w, size)
    t = running_sums(w)
    t *= scale_to(size, t[-1, -1])
    return t


def scale_to(size: float, total: float) -> float:
    """size / total, rounded up so that the last level doesn't lie below size; of 0 it is 0."""
    scale = size / total if size else 0.0
    return scale if total * scale >= size else float(np.nextafter(scale, np.inf))


def repeated(before: Float, size: int) -> Int:
    """Ids, from how many points lie before the end of each stretch."""
    below = before.astype(np.int64).reshape(-1)
    ends = np.bincount(below, minlength=size + 1)[:size]  # stretches that end before a point
    return np.cumsum(ends, out=ends)


def exponentials(n: int, rng: np.random.Generator) -> Float:
    """n exponential numbers in lanes, - log(1 - u_k)."""
    seed, lanes = rng.integers(1 << 64, dtype=np.uint64), in_lanes(n)
    flat, half_n = lanes.reshape(-1)[:n], n // 2

    def draw(half: int) -> None:
        first, part = half * half_n, flat[half_n:] if half else flat[:half_n]
        if (fast := kernels(n)) is not None:
            fast.write_uniforms(seed, first, part)
        else:
            part[:] = uniform(seed, np.arange(first, first + len(part), dtype=np.uint64))
        np.subtract(1.0, part, out=part)
        np.log(part, out=part)
        np.negative(part, out=part)

    halves(draw, n)
    return lanes


# ── compiled ────────────────────────────────────────────────────────────────────────────────────


def halves(work: Callable[[int], None], rows: int = LARGE) -> None:
    """work(0) and work(1), of many rows in two threads, which must release the interpreter."""
    if rows < LARGE:
        work(0)
        work(1)
        return
    other = Thread(target=work, args=(1,))
    other.start()
    work(0)
    other.join()


def kernels(rows: int) -> Any:
    """The module of compiled code, where it is worth while and numba is installed, else None."""
    return loaded() if rows >= LARGE else None


@cache
def loaded() -> Any:
    try:
        from scoredraw import resampling_kernels
    except ImportError:
        return None
    return resampling_kernels
