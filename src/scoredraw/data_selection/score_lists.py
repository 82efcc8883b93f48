"""Several scores, one budget: the best of each score's own list, or of their average.

Averaging k scores and taking the top keeps documents that are good all round and nothing that is
outstanding in one way. Here each score ranks the pool by itself and gets its share of the budget,
B / k or by its share of the variance; a list is taken from the top while its tokens are below the
share, so that it goes over by less than one document.

`refill=False`: the lists are independent, a document may be in several, and their union is less
than B. `refill=True`: turn by turn, each score takes the next document of its list that no other
has taken yet, until its share is spent: the union reaches B wherever the pool does.

How much do two lists share? |A ∩ B| / min(|A|, |B|). Two *independent* rankings of n documents
share max(|A|, |B|) / n on average, so a small overlap at a small budget says nothing: read the
*lift*, overlap over chance. Uncorrelated scores overlap beyond chance where their tails depend.

"Learning from the Best, Differently", 2025, arXiv 2510.18909: the lists, and the averages that it
compares with. Budget split, duplicates and ties are decided here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import sampling
from scoredraw.data_selection.principal_scores import as_ratings
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.uniforms import Rng, RowUniforms

Float = NDArray[np.float64]
Int = NDArray[np.int64]

DIGITS = 11  # of a standard deviation: scores that agree so far are tied
STRETCH = 1 << 12  # rows of a ranking that are looked at in one go


@dataclass(frozen=True, eq=False)
class Selection:
    """Documents chosen from several lists, and how those lists overlap.

    indices: int64 (m,) ascending. component: int64 (m,), the list each came from (the first to
    reach it). lists: for each score its own top documents, best first, before anything is shared
    out. overlap: (k, k) of these lists, by documents. lift: (k, k), overlap over what independent
    rankings of the pool give. names: of the k lists. draw: the same as a `Draw`, weights one.
    """

    indices: Int
    component: Int
    lists: tuple[Int, ...]
    overlap: Float
    lift: Float
    names: tuple[str, ...]
    draw: Draw

    def __len__(self) -> int:
        return len(self.indices)


def select(
    scores: ArrayLike,
    size: float,
    *,
    tokens: ArrayLike | None = None,
    shares: Sequence[float] | None = None,
    refill: bool = True,
    joint_threshold: float | None = None,
    joint: str = "mean",
    joint_scores: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    rng: Rng = 0,
) -> Selection:
    """The top of each of k lists of documents, within one budget.

    Parameters
    ----------
    scores : (N, k) finite; each column ranks the pool, high first.
    size : the budget: tokens where `tokens` (N,) are given, otherwise documents (then exactly as
        many come with `refill`). A budget above the pool takes all of it.
    shares : (k,) parts of the budget, equal by default.
    refill : share the pool out turn by turn, or let the lists overlap.
    joint_threshold : leave out documents whose `joint` ("mean" or "min") standardised score is
        below it, so that the top of one list isn't junk on the others. joint_scores (N, m): the
        scores it is about, by default `scores`.
    rng : settles ties that the next column (the first, after the last) doesn't settle.

    Documents without tokens are left out. Raises InputError for scores that are not finite, a
    budget that isn't positive, negative tokens or shares, a threshold that leaves nothing.
    Time O(k N log N), memory O(k N). Sequential: every document competes with every other.

    >>> scores = np.array([[3.0, 0.0], [2.0, 3.0], [1.0, 2.0], [0.0, 1.0]])
    >>> chosen = select(scores, 3)
    >>> chosen.indices.tolist(), chosen.component.tolist(), [x.tolist() for x in chosen.lists]
    ([0, 1, 2], [0, 1, 0], [[0, 1], [1]])
    """
    s = as_ratings(scores)
    n, k = s.shape
    weight = _tokens(tokens, n)
    budget = _budgets(size, shares, k, whole=tokens is None)
    labels = tuple(names) if names is not None else tuple(f"list {j + 1}" for j in range(k))
    require(len(labels) == k, "names", f"{len(labels)} names", f"{k}, one a list")
    together = s if joint_scores is None else as_ratings(joint_scores)
    require(len(together) == n, "joint_scores", f"{len(together)} rows", f"{n}, one a document")
    pool = _eligible(together, weight, joint_threshold, joint)
    orders = [pool[order] for order in _orders(s[pool], pool, n, rng)]
    lists = tuple(
        _within(order, weight, share) for order, share in zip(orders, budget, strict=True)
    )
    owner = _shared_out(orders, weight, budget, n) if refill else _first_to_reach(lists, n)
    kept = np.flatnonzero(owner >= 0)
    component = owner[kept]
    overlap = overlap_matrix(lists, n)
    sizes = np.array([len(one) for one in lists])
    with np.errstate(invalid="ignore"):
        lift = overlap / (np.maximum.outer(sizes, sizes) / len(pool))
    draw = Draw(
        kept, np.ones(len(kept)), n, scores=s[kept, component], method="lists of scores",
        info={"design": None, "component": component, "lists": list(labels)},
    )  # fmt: skip
    return Selection(kept, component, lists, overlap, lift, labels, draw)


def overlap_matrix(lists: Sequence[ArrayLike], n: int, tokens: ArrayLike | None = None) -> Float:
    """|A ∩ B| / min(|A|, |B|) of every two lists of documents 0 .. n-1, or the same in tokens.

    (k, k); NaN for an empty list. Time O(k n).

    >>> overlap_matrix([[0, 1, 2], [2, 3]], 5).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    weight = _tokens(tokens, n)
    inside = np.zeros((len(lists), n), bool)
    for row, chosen in zip(inside, lists, strict=True):
        row[np.asarray(chosen, np.int64)] = True
    shared = np.array([[weight[a & b].sum() for b in inside] for a in inside])
    own = np.diag(shared)
    with np.errstate(invalid="ignore"):
        return np.asarray(shared / np.minimum.outer(own, own))


# ── What it is compared with ─────────────────────────────────────────────────────────────────────


def average_scores(scores: ArrayLike, *, standardize: bool = True) -> Float:
    """The mean of each document's scores (n,), each score standardised first.

    >>> average_scores([[0.0, 10.0], [2.0, 30.0]]).tolist()
    [-1.0, 1.0]
    """
    s = as_ratings(scores)
    return np.asarray((_standard(s) if standardize else s).mean(axis=1))


def average_top(
    scores: ArrayLike, size: float, *, standardize: bool = True, tokens: Any = None, rng: Rng = 0
) -> Draw:
    """The documents with the highest average score, while tokens (or documents) are below `size`.

    Give components for the top by average component (standardize=False for their plain mean),
    metrics for the top by average metric. Raises InputError as `select`.

    >>> average_top([[0.0, 1.0], [2.0, 3.0], [1.0, 1.0]], 1).indices.tolist()
    [1]
    """
    mean = average_scores(scores, standardize=standardize)
    return select(mean[:, None], size, tokens=tokens, rng=rng).draw


def average_sample(
    scores: ArrayLike,
    size: float,
    *,
    temperature: float = 1.0,
    standardize: bool = True,
    tokens: Any = None,
    rng: Rng = 0,
) -> Draw:
    """Documents drawn without replacement with chances exp(z / temperature), z the average score.

    z is standardised. The Gumbel keys z / temperature - log(-log u) rank the pool; the ranking is
    then cut like any other. Raises InputError as `select`, or for temperature ≤ 0.

    >>> len(average_sample(np.random.default_rng(0).normal(size=(50, 3)), 10))
    10
    """
    require(temperature > 0, "temperature", temperature, "a positive number")
    z = _standard(average_scores(scores, standardize=standardize)[:, None])[:, 0]
    return select(gumbel_keys(z / temperature, rng)[:, None], size, tokens=tokens, rng=rng).draw


def gumbel_keys(log_weights: ArrayLike, rng: Rng = 0) -> Float:
    """log w - log(-log u), whose descending order is a draw without replacement with chances ∝ w.

    >>> gumbel_keys([0.0, 900.0]).argmax()
    np.int64(1)
    """
    log_w = np.asarray(log_weights, np.float64)
    u = RowUniforms(rng).block(0, len(log_w), stream="gumbel keys")
    return np.asarray(log_w - np.log(-np.log1p(-np.maximum(u, 2.0**-54))))


def broader_range(
    values: ArrayLike, size: float, *, top: float = 0.3, tokens: Any = None, rng: Rng = 0
) -> Draw:
    """A uniform draw from the `top` share of the documents by one score.

    values: (n,), such as `average_scores`. Raises InputError as `select`, or where the range holds
    less than the budget.

    >>> bool((broader_range(np.arange(100.0), 10, top=0.2).indices >= 80).all())
    True
    """
    v = np.asarray(values, np.float64)
    require(0 < top <= 1, "top", top, "a share in (0, 1]")
    weight = _tokens(tokens, len(v))
    best = sampling.top_k(v, max(1, round(top * len(v))), rng=rng).indices
    holds = float(weight[best].sum())
    require(holds >= size, "top", f"{top} of the pool, which holds {holds:g}", f"{size:g} in it")
    lot = np.full(len(v), -1.0)
    lot[best] = RowUniforms(rng).block(0, len(v), stream="broader range")[best]
    return select(lot[:, None], size, tokens=tokens, rng=rng).draw


# ── Ranking, cutting, sharing out ────────────────────────────────────────────────────────────────


def _orders(s: Float, rows: Int, n: int, rng: Rng) -> list[Int]:
    """Each column's descending order; ties by the next column, then by the row's uniform."""
    keys = np.round(_standard(s), DIGITS)
    lot = None
    orders = []
    for j, key in enumerate(keys.T):
        order = np.argsort(-key, kind="stable")
        same = np.diff(key[order], prepend=np.inf, append=-np.inf) == 0
        tied = np.flatnonzero(same[1:] | same[:-1])  # places equal to the one below or above
        if len(tied):
            lot = RowUniforms(rng).block(0, n, stream="ties")[rows] if lot is None else lot
            own, second = order[tied], keys[:, (j + 1) % keys.shape[1]]
            order[tied] = own[np.lexsort((lot[own], -second[own], -key[own]))]
        orders.append(order)
    return orders


def _within(order: Int, weight: Float, share: float) -> Int:
    """The documents taken in this order while what was taken is below the share."""
    if not (share > 0 and len(order)):
        return order[:0]
    return order[: int(np.searchsorted(np.cumsum(weight[order]), share)) + 1]


def _first_to_reach(lists: Sequence[Int], n: int) -> Int:
    """Which list holds each document at its best place, the earlier on a tie; -1: none. (n,)."""
    place = np.full(n, n)
    owner = np.full(n, -1)
    for j, rows in enumerate(lists):
        sooner = np.arange(len(rows)) < place[rows]
        place[rows[sooner]] = np.flatnonzero(sooner)
        owner[rows[sooner]] = j
    return owner


def _shared_out(orders: Sequence[Int], weight: Float, budget: Float, n: int) -> Int:
    """Turn by turn each list takes its next free document while it is below its share: int64 (n,).

    A pick depends on every pick before it, by the others too, so this is a loop: a step a document
    looked at, and none for those below where the shares are spent.
    """
    owner = array("q", [-1]) * n
    tokens = weight.data
    spent = [0.0] * len(orders)
    down = [_one_by_one(order) for order in orders]
    taking = [j for j, share in enumerate(budget.tolist()) if share > 0]
    while taking:
        for j in tuple(taking):
            for row in down[j]:
                if owner[row] < 0:
                    owner[row] = j
                    spent[j] += tokens[row]
                    break
            else:  # the pool is used up
                return np.array(owner, np.int64)
            if spent[j] >= budget[j]:
                taking.remove(j)
    return np.array(owner, np.int64)


def _one_by_one(rows: Int) -> Iterator[int]:
    """The rows as plain numbers, made a stretch at a time."""
    for start in range(0, len(rows), STRETCH):
        yield from rows[start : start + STRETCH].tolist()


def _tokens(tokens: Any, n: int) -> Float:
    if tokens is None:
        return np.ones(n)
    t = np.asarray(tokens, np.float64)
    require(t.shape == (n,), "tokens", f"shape {t.shape}", f"({n},), one count a document")
    good = bool(np.isfinite(t).all()) and bool((t >= 0).all())
    require(good, "tokens", "negative, NaN or infinite counts", "counts from 0")
    return t


def _budgets(size: float, shares: Any, k: int, *, whole: bool) -> Float:
    """What each list may spend; whole numbers of documents by largest remainder."""
    real = isinstance(size, int | float | np.number) and bool(np.isfinite(size)) and size > 0
    require(real, "size", size, "a positive budget")
    part = np.ones(k) if shares is None else np.asarray(shares, np.float64)
    fits = part.shape == (k,) and bool(np.isfinite(part).all()) and bool((part >= 0).all())
    require(fits and part.sum() > 0, "shares", shares, f"{k} parts from 0, one above 0")
    exact = size * part / part.sum()
    if not (whole and float(size).is_integer()):
        return np.asarray(exact)
    down = np.floor(exact + 1e-9)
    down[np.argsort(down - exact, kind="stable")[: int(size - down.sum())]] += 1
    return np.asarray(down)


def _eligible(s: Float, weight: Float, threshold: float | None, joint: str) -> Int:
    """The documents that have tokens and are good enough on all scores together."""
    require(joint in ("mean", "min"), "joint", repr(joint), "'mean' or 'min'")
    fine = weight > 0
    require(bool(fine.any()), "tokens", "zeros only", "documents with tokens")
    if threshold is not None:
        z = np.full(s.shape, -np.inf)
        z[fine] = _standard(s[fine])
        together = z.mean(axis=1) if joint == "mean" else z.min(axis=1)
        fine &= together >= threshold
        few = f"{threshold}, which no document reaches"
        require(bool(fine.any()), "joint_threshold", few, f"at most {together.max():.3g}")
    return np.flatnonzero(fine)


def _standard(s: Float) -> Float:
    deviation = s.std(axis=0)
    return (s - s.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
