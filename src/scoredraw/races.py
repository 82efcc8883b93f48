"""Races: every row has a random key, and the smallest keys win.

With u the row's uniform, keys u / s give priority sampling and -log(1 - u) / s (exponential
clocks with rates s) give successive sampling without replacement. The k winners and the next key,
the threshold that the weights need, are found without computing the other rows' keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from scoredraw.errors import require
from scoredraw.inclusion import Float, Int
from scoredraw.uniforms import RowUniforms

_CLEARLY = 1 - 1e-12  # below, whatever the rounding
_CHUNK = 1 << 14  # rows whose temporaries stay in the cache


def row_ids(ids: Any, n: int) -> Any:
    """Ids as uint64 (n,), or None for positions; InputError unless one a row, all different."""
    if ids is None:
        return None
    ids = np.asarray(ids)
    whole = ids.dtype.kind in "iu"
    require(whole, "ids", f"dtype {ids.dtype}", "integers (uniforms.hash_ids makes them of text)")
    ids = ids.astype(np.uint64)
    require(ids.shape == (n,), "ids", f"{len(ids)} ids", f"{n}, one a row")
    require(len(np.unique(ids)) == n, "ids", "duplicate ids", "a different one for each row")
    return ids


def uniform_chunks(
    uniforms: RowUniforms, n: int, ids: Any, stream: str
) -> Iterator[tuple[int, Float]]:
    """The pool's uniforms, a piece that fits the cache at a time: (first row, uniforms)."""
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        if ids is None:
            yield start, uniforms.block(start, stop, stream=stream)
        else:
            yield start, uniforms.at(ids[start:stop], stream=stream)


def some_uniforms(
    uniforms: RowUniforms, rows: Int, n: int, ids: Any, stream: str, round_: int
) -> Float:
    """The uniforms of a few of the pool's rows."""
    if ids is None and 32 * len(rows) > n:  # a whole run costs a thirtieth of a single look-up
        return uniforms.block(0, n, stream=stream, round=round_)[rows]
    who = rows.astype(np.uint64) if ids is None else ids[rows]
    return uniforms.at(who, stream=stream, round=round_)


def smallest_keys(
    s: Float, k: int, uniforms: RowUniforms, ids: Any, stream: str, *, exponential: bool
) -> tuple[Int, float]:
    """The rows of the k smallest keys u/s (or -log(1-u)/s), sorted by row, and the next key.

    Since -log(1-u) >= u, a row whose u exceeds s * level has a key above level: one comparison
    spares nearly all rows the rest. The level only filters; any level gives the same rows.
    """
    ids = row_ids(ids, len(s))
    if not _more_positive(s, k):
        return np.flatnonzero(s), np.inf
    level = _key_level(s, k + 1, exponential)
    while True:
        rows, keys = _candidates(s, level, uniforms, ids, stream, exponential)
        edge = float(np.partition(keys, k)[k]) if len(keys) > k else np.inf
        if edge < level * _CLEARLY or level == np.inf:  # whoever is no candidate comes after it
            break
        level *= 2.0
    below = keys < edge
    if np.count_nonzero(below) == k:
        return rows[below], edge
    order = np.argsort(keys, kind="stable")[:k]  # equal keys at the edge: the earlier row
    return np.sort(rows[order]), edge


def _more_positive(s: Float, k: int) -> bool:
    """Whether more than k numbers are positive, looking no further than it takes."""
    found = 0
    for start in range(0, len(s), _CHUNK):
        found += int(np.count_nonzero(s[start : start + _CHUNK] > 0))
        if found > k:
            return True
    return False


def _candidates(
    s: Float, level: float, uniforms: RowUniforms, ids: Any, stream: str, exponential: bool
) -> tuple[Int, Float]:
    """The rows with u < s * level, all whose keys are below the level among them, and the keys."""
    rows, keys = [], []
    many = exponential and float(s[:: max(1, len(s) // 1024)].mean()) * level > 0.05
    for start, u in uniform_chunks(uniforms, len(s), ids, stream):
        t = s[start : start + _CHUNK]
        with np.errstate(over="ignore", invalid="ignore"):  # 0 * inf is no candidate
            x = t * level
        near = np.flatnonzero((u if not many else u + 0.5 * x * u) < x)
        key = u[near]
        if exponential:
            np.log1p(np.negative(key, out=key), out=key)
            np.negative(key, out=key)
        key /= t[near]
        near += start
        rows.append(near)
        keys.append(key)
    return np.concatenate(rows), np.concatenate(keys)


def _key_level(s: Float, want: int, exponential: bool) -> float:
    """A level that about `want` keys (and six deviations more) stay below, from a subsample."""
    step = max(1, len(s) // _CHUNK)
    sample = s[::step][s[::step] > 0]
    if not len(sample):
        return want / float(s.sum())
    target = min((want + 6.0 * np.sqrt(want) + 10.0) / step, 0.999 * len(sample))
    low, high = 0.0, target / float(sample.sum())

    def reached(level: float) -> float:
        x = sample * level
        return float((-np.expm1(-x) if exponential else np.minimum(x, 1.0)).sum())

    while reached(high) < target:
        low, high = high, 2.0 * high
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reached(middle) < target else (low, middle)
    return high


def gumbel_top(log_s: Float, k: int, u: Float) -> tuple[Int, Float]:
    """The k smallest exponential keys of rates exp(log_s), and their inclusion probabilities."""
    with np.errstate(divide="ignore"):  # u = 0 wins
        keys = np.log(-np.log1p(-u)) - log_s
    if k == len(keys):
        return np.arange(k), np.ones(k)
    order = np.argsort(keys, kind="stable")
    kept = np.sort(order[:k])
    with np.errstate(over="ignore"):  # a rate far above the threshold is in for certain
        return kept, -np.expm1(-np.exp(log_s[kept] + keys[order[k]]))
