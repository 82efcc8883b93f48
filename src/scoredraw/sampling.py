"""Every way of drawing rows with chances proportional to a size measure, and what each is worth.

A scheme takes a size measure s >= 0 (one number a row; zero is never drawn) and a size, and
returns a `Draw`. The kinds, with q the calibrated inclusion probabilities of
`calibrate_inclusion` and u the row's own uniform (`uniforms.RowUniforms`):

    poisson            keep if u < q; the size is random with mean `size`        row-local
    priority           the smallest u / s                                        row-local
    exponential_keys   the smallest -log(1 - u) / s: successive sampling         row-local
    uniform            the smallest u                                            row-local
    top_k, threshold   the largest scores, ties by u; no probabilities           row-local
    systematic         one uniform, a comb over the cumulated q                  prefix-sum
    multinomial        `size` independent draws with replacement                 prefix-sum
    residual           the whole part of size * s / sum(s), the rest multinomial prefix-sum
    pivotal            rows duel pairwise until each q is 0 or 1                 sequential

Row-local: with the same ids and seed the choice does not depend on the order of the rows.
Prefix-sum and sequential schemes depend on it. `by` splits the pool into strata, each drawn on its
own with its share of the size; `ids` gives rows identities other than their position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.inclusion import (
    Float,
    Int,
    allocate,
    as_measure,
    as_scores,
    calibrate_inclusion,
    linear,
    rank,
    softmax,
)
from scoredraw.races import gumbel_top, row_ids, smallest_keys, some_uniforms, uniform_chunks
from scoredraw.uniforms import Rng, RowUniforms

__all__ = [
    "SCHEMES",
    "Draw",
    "allocate",
    "calibrate_inclusion",
    "exponential_keys",
    "linear",
    "multinomial",
    "pivotal",
    "poisson",
    "priority",
    "rank",
    "residual",
    "softmax",
    "systematic",
    "threshold",
    "top_k",
    "uniform",
]


def poisson(
    size_measure: Any,
    size: float,
    *,
    rng: Rng = None,
    by: Any = None,
    ids: Any = None,
    floor: float = 0.0,
    costs: Any = None,
) -> Draw:
    """Keep each row independently with probability q = min(1, floor + s / alpha).

    Weights 1/q, unbiased, Var(total) = sum (1/q - 1) f^2. The size is random with mean `size`
    (with `costs`, the expected cost is `size`). Raises InputError. Hajek 1964.

    >>> draw = poisson(np.arange(1.0, 101.0), 20, rng=0)
    >>> abs(draw.total(np.arange(1.0, 101.0)).value - 5050) < 1500
    True
    """
    s, n = as_measure(size_measure), len(size_measure)
    if by is not None:
        require(costs is None, "costs", "costs and strata", "one or the other")
        return _by_strata(poisson, s, size, by, ids, rng, floor=floor)
    if costs is None:
        require(size <= n, "size", size, f"at most the pool's {n}")
    q, _ = calibrate_inclusion(s, size, floor=floor, costs=costs)
    uniforms = uniform_chunks(RowUniforms(rng), n, row_ids(ids, n), "poisson")
    kept = np.concatenate([at + np.flatnonzero(u < q[at : at + len(u)]) for at, u in uniforms])
    return _unequal(kept, q[kept], s, "poisson", "independent")


def priority(
    size_measure: Any, size: int, *, rng: Rng = None, by: Any = None, ids: Any = None
) -> Draw:
    """Keep the `size` rows with the smallest u / s; weight them by the next one, tau.

    Given tau the inclusion probability is min(1, s tau) and the weight its inverse; unbiased for
    every total, and nearly optimal for totals of s itself. Exactly `size` rows (all positive rows
    with weight one if there are no more). Duffield, Lund, Thorup 2007, "Priority sampling".

    >>> len(priority([1.0, 2.0, 3.0, 0.0], 2, rng=1))
    2
    """
    s, k = as_measure(size_measure), _count(size, len(size_measure))
    if by is not None:
        return _by_strata(priority, s, k, by, ids, rng)
    kept, tau = smallest_keys(s, k, RowUniforms(rng), ids, "priority", exponential=False)
    return _unequal(kept, np.minimum(1.0, s[kept] * tau), s, "priority", "independent")


def exponential_keys(
    size_measure: Any,
    size: int,
    *,
    rng: Rng = None,
    by: Any = None,
    ids: Any = None,
    log: bool = False,
) -> Draw:
    """Weighted sampling without replacement: the `size` smallest exponential keys.

    Keys E / s with E = -log(1 - u) race; the order of arrival is successive sampling (draw one
    with chance s / sum(s), take it away, repeat), the law of NumPy's `choice(p=...,
    replace=False)`. Given the next key tau the inclusion probability is 1 - exp(-s tau) (rank
    conditioning), the weight its inverse, and totals are unbiased. With `log`, size_measure holds
    log s, any real numbers: the Gumbel top-k trick, without underflow.

    Exactly `size` rows. Time O(n) and one logarithm a candidate. Efraimidis and Spirakis 2006;
    Cohen and Kaplan 2008 (rank conditioning); Vieira 2014 (Gumbel top-k).

    >>> exponential_keys([0.0, 5.0, 1.0], 2, rng=3).indices.tolist()
    [1, 2]
    """
    s = as_scores(size_measure, "size_measure") if log else as_measure(size_measure)
    k = _count(size, len(s))
    if by is not None:
        return _by_strata(exponential_keys, s, k, by, ids, rng, log=log)
    if log:
        chunks = uniform_chunks(RowUniforms(rng), len(s), row_ids(ids, len(s)), "exponential")
        kept, q = gumbel_top(s, k, np.concatenate([u for _, u in chunks]))
    else:
        kept, tau = smallest_keys(s, k, RowUniforms(rng), ids, "exponential", exponential=True)
        chosen = s[kept]
        q = -tau * chosen
        np.negative(np.expm1(q, out=q), out=q)
    info = {"design": "independent"}
    scores = s[kept] if log else chosen
    return Draw(kept, 1.0 / q, len(s), q, True, scores, method="exponential_keys", info=info)


def uniform(n: int, size: int, *, rng: Rng = None, by: Any = None, ids: Any = None) -> Draw:
    """A simple random sample: every subset of `size` rows of n is equally likely.

    Inclusion size / n, weights n / size, unbiased, Var(total) = n^2 (1 - size/n) S^2 / size.

    >>> uniform(10, 4, rng=0).weights.tolist()
    [2.5, 2.5, 2.5, 2.5]
    """
    require(n > 0, "n", n, "at least one row")
    k, equal = _count(size, n), np.ones(n)
    if by is not None:
        return _by_strata(_uniform_stratum, equal, k, by, ids, rng)
    kept, _ = smallest_keys(equal, k, RowUniforms(rng), ids, "uniform", exponential=False)
    return _unequal(kept, np.full(k, k / n), equal, "uniform", "fixed")


def systematic(
    size_measure: Any,
    size: int,
    *,
    rng: Rng = None,
    by: Any = None,
    ids: Any = None,
    order: str = "given",
) -> Draw:
    """A comb with one random offset over the cumulated q: exactly `size` rows.

    Row i is kept if a point of u + {0, 1, ..., size - 1} falls into its stretch of length q_i of
    the line. Inclusion exactly q, weights 1/q, unbiased; joint inclusions depend on the order, so
    the standard error (Hajek's) is right for `order="random"` and only a guide for the given
    order. Madow 1949.

    >>> systematic(np.ones(6), 3, rng=0).indices.tolist() in ([0, 2, 4], [1, 3, 5])
    True
    """
    s, k = as_measure(size_measure), _count(size, len(size_measure))
    require(order in ("given", "random"), "order", repr(order), "'given' or 'random'")
    if by is not None:
        return _by_strata(systematic, s, k, by, ids, rng, order=order)
    uniforms = RowUniforms(rng)
    q, _ = calibrate_inclusion(s, k)
    rows = np.arange(len(s))
    if order == "random":
        chunks = uniform_chunks(uniforms, len(s), row_ids(ids, len(s)), "order")
        rows = np.argsort(np.concatenate([u for _, u in chunks]), kind="stable")
    open_ = rows[(q[rows] > 0) & (q[rows] < 1)]
    certain = np.flatnonzero(q >= 1)
    offset = uniforms.block(0, 1, stream="systematic", round=_own_round(ids, len(s)))[0]
    points = np.arange(k - len(certain)) + offset
    kept = np.sort(np.concatenate([certain, open_[_cells(q[open_], points, len(points))]]))
    return _unequal(kept, q[kept], s, "systematic", "fixed")


def pivotal(
    size_measure: Any, size: int, *, rng: Rng = None, by: Any = None, ids: Any = None
) -> Draw:
    """Neighbouring rows duel for their inclusion probabilities until every one is 0 or 1.

    In a duel of a and b one takes all of a + b (capped at one) and the other what is left, each
    keeping its expectation. The rounds are a tournament, so n rows need log2 n vectorised rounds.
    Exactly `size` rows, inclusion exactly q, weights 1/q, unbiased; neighbours repel each other,
    so that totals of smooth functions of the order vary less. Deville and Tille 1998.

    >>> pivotal(np.ones(4), 2, rng=0).inclusion.tolist()
    [0.5, 0.5]
    """
    s, k = as_measure(size_measure), _count(size, len(size_measure))
    if by is not None:
        return _by_strata(pivotal, s, k, by, ids, rng)
    q, _ = calibrate_inclusion(s, k)
    uniforms, state, ids = RowUniforms(rng), q.copy(), row_ids(ids, len(s))
    playing = np.flatnonzero((state > 0) & (state < 1))
    round_ = 0
    while len(playing) > 1:
        a, b = playing[0 : len(playing) // 2 * 2 : 2], playing[1::2]
        u = some_uniforms(uniforms, a, len(s), ids, "pivotal", round_)
        state[a], state[b] = _duel(state[a], state[b], u)
        playing = playing[(state[playing] > 0) & (state[playing] < 1)]
        round_ += 1
    state[playing] = np.round(state[playing])  # the sum is whole: only rounding error is left
    kept = np.flatnonzero(state)
    return _unequal(kept, q[kept], s, "pivotal", "fixed")


def multinomial(
    size_measure: Any, size: int, *, rng: Rng = None, by: Any = None, ids: Any = None
) -> Draw:
    """`size` independent draws with replacement, row i with chance p = s / sum(s).

    Entries may repeat; weights 1 / (size p), unbiased; inclusion holds the expected counts
    size * p. Hansen and Hurwitz 1943.

    >>> multinomial([0.0, 1.0], 3, rng=0).indices.tolist()
    [1, 1, 1]
    """
    s, k = as_measure(size_measure), _count(size, None)
    if by is not None:
        return _by_strata(multinomial, s, k, by, ids, rng)
    round_ = _own_round(ids, len(s))
    points = np.sort(RowUniforms(rng).block(0, k, stream="multinomial", round=round_))
    kept = _cells(s, points, 1.0)
    expected = k * (s[kept] / s.sum())
    return _weighted(kept, expected, s, "multinomial", {"design": "replacement"})


def residual(
    size_measure: Any, size: int, *, rng: Rng = None, by: Any = None, ids: Any = None
) -> Draw:
    """floor(size p) certain copies of every row, and the rest multinomial on what is left over.

    Exactly `size` entries (the certain ones first), expected counts size * p, weights
    1 / (size p), unbiased, never more variable than `multinomial`. Liu and Chen 1998.

    >>> residual([3.0, 1.0], 4, rng=0).indices.tolist()
    [0, 0, 0, 1]
    """
    s, k = as_measure(size_measure), _count(size, None)
    if by is not None:
        return _by_strata(residual, s, k, by, ids, rng)
    expected = k * (s / s.sum())
    # A product that is whole but for rounding is whole: 4 * (1/4) must give its copy for certain.
    whole = np.floor(expected + 1e-12 * expected)
    certain = np.repeat(np.arange(len(s)), whole.astype(np.int64))
    rest, round_ = k - len(certain), _own_round(ids, len(s))
    points = np.sort(RowUniforms(rng).block(0, rest, stream="residual", round=round_))
    left = np.maximum(expected - whole, 0.0)
    kept = np.concatenate([certain, _cells(left, points, 1.0)]) if len(points) else certain
    info = {"design": "residual", "certain": len(certain)}
    return _weighted(kept, expected[kept], s, "residual", info)


def top_k(
    scores: Any,
    size: float,
    *,
    largest: bool = True,
    rng: Rng = None,
    by: Any = None,
    ids: Any = None,
    costs: Any = None,
) -> Draw:
    """The `size` rows with the largest (or smallest) scores; ties at the edge are drawn by lot.

    Takes raw scores, any finite numbers. With costs (n,), > 0, `size` is a budget: rows are taken
    from the best down, up to the first that no longer fits. Weights one; not unbiased: no
    probabilities are known. Raises InputError.

    >>> top_k([3.0, 1.0, 2.0], 2).indices.tolist()
    [0, 2]
    """
    s = as_scores(scores)
    v = -s if largest else s
    if costs is not None:
        require(by is None, "costs", "costs and strata", "one or the other")
        kept = _affordable(v, size, costs, rng, ids)
    else:
        k = _count(size, len(s))
        if by is not None:
            return _by_strata(top_k, s, k, by, ids, rng, largest=largest)
        edge = np.partition(v, k - 1)[k - 1]
        better, tied = np.flatnonzero(v < edge), np.flatnonzero(v == edge)
        lot = _lot(tied, len(s), rng, ids)
        kept = np.sort(np.concatenate([better, tied[lot[: k - len(better)]]]))
    ones = np.ones(len(kept))
    return Draw(kept, ones, len(s), scores=s[kept], method="top_k", info={"design": None})


def threshold(scores: Any, cutoff: float, *, largest: bool = True) -> Draw:
    """All rows whose score is at least (with largest=False, at most) `cutoff`; weights one.

    >>> threshold([3.0, 1.0, 2.0], 2.0).indices.tolist()
    [0, 2]
    """
    s = as_scores(scores)
    require(bool(np.isfinite(cutoff)), "cutoff", cutoff, "a finite number")
    kept = np.flatnonzero(s >= cutoff if largest else s <= cutoff)
    info = {"design": None, "cutoff": float(cutoff)}
    return Draw(kept, np.ones(len(kept)), len(s), scores=s[kept], method="threshold", info=info)


SCHEMES: dict[str, Callable[..., Draw]] = {
    "poisson": poisson,
    "priority": priority,
    "exponential_keys": exponential_keys,
    "systematic": systematic,
    "pivotal": pivotal,
    "multinomial": multinomial,
    "residual": residual,
    "top_k": top_k,
}


def _count(size: Any, n: int | None) -> int:
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    require(whole and size > 0, "size", size, "a positive whole number")
    require(n is None or size <= n, "size", size, f"at most the pool's {n}")
    return int(size)


def _lot(rows: Int, n: int, rng: Rng, ids: Any) -> Int:
    """An order of these rows by their own uniforms."""
    u = some_uniforms(RowUniforms(rng), rows, n, row_ids(ids, n), "ties", 0)
    return np.argsort(u, kind="stable")


def _affordable(v: Float, budget: float, costs: Any, rng: Rng, ids: Any) -> Int:
    price = as_scores(costs, "costs")
    require(price.shape == v.shape, "costs", f"{len(price)} values", f"{len(v)}, one a row")
    require(bool(price.min() > 0), "costs", f"{price.min()} at row {price.argmin()}", "above 0")
    lot = _lot(np.arange(len(v)), len(v), rng, ids)
    order = lot[np.argsort(v[lot], kind="stable")]
    fitting = int(np.searchsorted(np.cumsum(price[order]), budget, side="right"))
    require(
        fitting > 0, "budget", f"{budget:g}", f"at least {price[order[0]]:g}, the best row's cost"
    )
    return np.sort(order[:fitting])


def _own_round(ids: Any, n: int) -> int:
    """Schemes that draw points, not rows, take others in each stratum: its first id tells."""
    return 0 if ids is None else int(row_ids(ids, n)[0])


def _unequal(kept: Int, q: Float, s: Float, method: str, design: str) -> Draw:
    return _weighted(kept, q, s, method, {"design": design})


def _weighted(kept: Int, q: Float, s: Float, method: str, info: dict[str, Any]) -> Draw:
    return Draw(kept, 1.0 / q, len(s), q, True, s[kept], method=method, info=info)


def _cells(lengths: Float, points: Float, total: float) -> Int:
    """Which cell of the line [0, total), cut in proportion to `lengths`, each point falls into."""
    ends = np.cumsum(lengths)
    if not len(ends):
        return np.zeros(0, np.int64)
    cell = np.searchsorted(ends, points * (ends[-1] / total), side="right")
    last = int(np.flatnonzero(lengths)[-1])  # a point on the far end belongs to the last cell
    return np.asarray(np.minimum(cell, last), np.int64)


def _duel(a: Float, b: Float, u: Float) -> tuple[Float, Float]:
    """What two inclusion probabilities become: one is settled, both keep their expectation."""
    total = a + b
    small = total <= 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        a_wins = np.where(small, u * total < a, u * (2.0 - total) < 1.0 - b)
    high = np.minimum(total, 1.0)
    low = np.where(small, 0.0, total - 1.0)
    return np.where(a_wins, high, low), np.where(a_wins, low, high)


def _uniform_stratum(equal: Float, size: int, *, rng: Rng, ids: Any) -> Draw:
    return uniform(len(equal), size, rng=rng, ids=ids)


def _by_strata(
    scheme: Callable[..., Draw], s: Float, size: Any, by: Any, ids: Any, rng: Rng, **options: Any
) -> Draw:
    """Draw each stratum on its own, with its share of the size and its rows' own uniforms."""
    labels = np.asarray(by)
    require(labels.shape == s.shape, "by", f"shape {labels.shape}", f"({len(s)},), a label a row")
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    everyone = np.arange(len(s), dtype=np.uint64) if ids is None else row_ids(ids, len(s))
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.cumsum(counts)[:-1])
    zero = -np.inf if options.get("log") else 0.0
    for name, group in zip(names, groups, strict=True):
        drawable = scheme is top_k or bool((s[group] > zero).any())
        require(drawable, "scores", f"only zeros in stratum {name!s}", "a positive one in each")
    shares = allocate(counts, int(size))
    uniforms = RowUniforms(rng)
    parts = [
        scheme(s[g], int(m), rng=uniforms, ids=everyone[g], **options)
        for g, m in zip(groups, shares, strict=True)
    ]
    entries = np.concatenate([g[p.indices] for g, p in zip(groups, parts, strict=True)])
    strata = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    back = np.argsort(entries, kind="stable")
    first = parts[0]
    known = first.inclusion is not None
    design = first.info["design"]  # certain copies have lost their place at the front
    design = None if design == "residual" else design
    return Draw(
        entries[back],
        np.concatenate([p.weights for p in parts])[back],
        len(s),
        np.concatenate([p.inclusion for p in parts])[back] if known else None,
        first.unbiased,
        s[entries[back]],
        method=f"{first.method} by strata",
        info={"design": design, "strata": strata[back]},
    )
