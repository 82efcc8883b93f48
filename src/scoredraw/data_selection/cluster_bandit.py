r"""Influence and diversity without scoring everything: a bandit over clusters (Quad).

The pool is cut into clusters. A pull of a cluster looks at a few of its rows: their mean influence
on a reference set is the reward r. Where r exceeds a threshold tau, a block of the cluster is
taken. Which clusters to pull next is decided by their upper confidence bounds (`bandits`),

.. math:: CS_i=\bar I_i+\alpha\,s\sqrt{2\ln\textstyle\sum_jT_j/T_i},

so that a cluster whose rows help is visited often, and one that has not been visited for long is
visited again. alpha = 0 is greedy over clusters, infinity takes the clusters in turn. Influence is
computed for the rows looked at and no others.

Zhang et al., 2025, "Harnessing Diversity for Important Data Selection in Pretraining Large Language
Models", ICLR, arXiv:2409.16986. The released code keeps the *first* k blocks of a cluster rather
than the k that were accepted, and starts with clusters 0 .. B - 1; here what was accepted is kept,
and the start is random.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import sampling
from scoredraw.bandits import ClusterUCB, neighbour_weights
from scoredraw.data_selection.influence import to_numpy
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.journal import Journal
from scoredraw.uniforms import Rng, generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Within = Literal["block", "threshold", "top"]
Progress = Callable[[int, int], None]
Influence = Callable[[Int], ArrayLike]

TAU = "no cluster above tau"


class Pull(NamedTuple):
    """One pull: its round, the cluster (as given), the mean influence, how many rows it added."""

    round: int
    cluster: Any
    reward: float
    taken: int


@dataclass(frozen=True, eq=False)
class QuadResult:
    """What was selected, and what was learned on the way.

    indices: int64 (k,), in the order of selection. trace: every `Pull`. n_evaluated: rows whose
    influence was computed, `evaluated` (in that order), with `influence`. reason: "budget",
    "whole pool", "no cluster above tau", "clusters exhausted" or "max_rounds". clusters: label,
    pulls, mean influence (of the rewards, NaN if never pulled), score (CS at the end) and taken
    rows of each cluster.
    """

    indices: Int
    n: int
    trace: list[Pull]
    evaluated: Int
    influence: Float
    reason: str
    clusters: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def n_evaluated(self) -> int:
        """How many rows' influence was computed."""
        return len(self.evaluated)

    @property
    def draw(self) -> Draw:
        """The selection as a `Draw` (a choice, no probabilities)."""
        info = {"n_evaluated": self.n_evaluated, "reason": self.reason, "pulls": len(self.trace)}
        return Draw(self.indices, np.ones(len(self.indices)), self.n, method="quad", info=info)


def quad_select(
    cluster_ids: ArrayLike,
    influence_fn: Influence,
    budget: float,
    *,
    samples_per_pull: int = 10,
    block: int | None = None,
    B: int = 50,
    tau: float = 0.0,
    gamma: float | None = None,
    distances: ArrayLike | None = None,
    centres: ArrayLike | None = None,
    alpha: float = 1.0,
    scale: float | Literal["auto"] = "auto",
    within: Within = "block",
    neighbours: bool | None = None,
    plus_one: bool = False,
    unpulled_first: bool = True,
    costs: ArrayLike | None = None,
    max_rounds: int | None = None,
    rng: Rng = None,
    log: Journal | None = None,
    progress: Progress | None = None,
) -> QuadResult:
    """Select up to `budget` rows of a pool, cluster by cluster, by their influence.

    Parameters
    ----------
    cluster_ids : (n,) labels of any kind; clusters that are empty do not exist.
    influence_fn : rows (k,) int64 -> (k,) influences, positive where training on the row lowers
        the reference loss. Called once for any row.
    budget : rows to select; with `costs` (n,) > 0 (tokens), what they may cost together.
    samples_per_pull : rows that a pull looks at (the cluster's rows in random order, in turn).
    block : rows an accepted pull takes: those looked at first, then others. By default a quarter
        of a cluster's share of the budget, so that clusters are pulled again and again: where one
        sweep of accepted pulls uses the budget up, alpha has nothing to decide.
    B : clusters a round, chosen together.
    tau : rewards have to exceed it. Rejected rows stay in the pool, at the end of their cluster.
    gamma : a pull also counts for the clusters nearer than this, by `distances` (C, C), symmetric,
        or `centres` (C, k), whose distances are never held as a matrix; both in the sorted order of
        the labels. `neighbours=False` ignores them.
    alpha, scale : exploration, as in `bandits.ClusterUCB`; "auto" is the standard deviation of
        the rewards. plus_one, unpulled_first: conventions of the released code, as there.
    within : "block" takes a block whole; "threshold" looks at all of it and takes the rows above
        tau, the others leave the pool; "top" looks at all rows left in the cluster and takes the
        best.
    max_rounds : at most so many rounds (the released code: 200).
    log : journal of the pulls. With the same arguments and a seeded `rng`, a run that was killed
        goes on where it stopped; influences in the log are not computed again.
    progress : called as (spent, budget).

    It ends with the budget, and earlier where every cluster's last reward was tau or less, or no
    cluster has a row that was not looked at in vain. A cluster with an influence that is not
    finite is left out from then on, with a warning.

    Raises InputError on an empty pool, sizes below one, alpha < 0, gamma <= 0, distances that do
    not fit or are not symmetric, an influence function that returns another shape, a log of
    another run. Sequential. Time O(n log n + pulls · (C + samples)), memory O(n).

    Zhang et al., 2025, arXiv:2409.16986.

    >>> worth = np.repeat([1.0, -1.0, 0.5], 100)
    >>> found = quad_select(np.repeat([0, 1, 2], 100), lambda rows: worth[rows], 60, block=5, rng=0)
    >>> len(found.indices), bool((worth[found.indices] > 0).all()), found.n_evaluated < 200
    (60, True, True)
    """
    labels, codes = _clusters(cluster_ids)
    n, C = len(codes), len(labels)
    price = _prices(costs, n)
    require(budget > 0 and not math.isnan(budget), "budget", budget, "a positive number")
    for name, value in (("samples_per_pull", samples_per_pull), ("B", B)):
        require(value >= 1, name, value, "at least 1")
    require(block is None or block >= 1, "block", block, "at least 1")
    require(max_rounds is None or max_rounds >= 1, "max_rounds", max_rounds, "at least 1")
    require(within in ("block", "threshold", "top"), "within", repr(within),
            "'block', 'threshold' or 'top'")  # fmt: skip
    require(not math.isnan(tau), "tau", tau, "a number")
    policy = ClusterUCB(
        C, alpha, scale, plus_one=plus_one, unpulled_first=unpulled_first,
        weights=_neighbours(C, distances, centres, gamma, neighbours),
        threshold=tau if math.isfinite(tau) else 0.0,
    )  # fmt: skip
    if block is None:
        rows = n if costs is None else budget / price.mean()
        block = max(1, round(min(budget, rows) / (4 * C)))
    look = _Evaluations(influence_fn, n, log)
    run = _Run(policy, codes, price, budget, samples_per_pull, block, tau, within, look,
               generator(rng), progress)  # fmt: skip
    if price.sum() <= budget:
        return run.result(labels, np.arange(n), "whole pool")
    reason = run.play(B, max_rounds, labels)
    return run.result(labels, np.concatenate([*run.taken, np.empty(0, np.int64)]), reason)


def top_influence(
    influence_fn: Influence, n: int, size: int, *, batch: int = 4096, rng: Rng = None
) -> Draw:
    """The baseline that looks at everything: the `size` rows of largest influence.

    The best by any single row's influence, and often worse than uniform: rows alike are all taken.
    n evaluations. Raises InputError on a size above n, NaN.

    >>> top_influence(lambda rows: -1.0 * rows, 10, 2).indices.tolist()
    [0, 1]
    """
    require(batch >= 1, "batch", batch, "at least 1")
    look = _Evaluations(influence_fn, n, None)
    blocks = (np.arange(at, min(at + batch, n)) for at in range(0, n, batch))
    values = np.concatenate([look(rows) for rows in blocks])
    return sampling.top_k(values, size, rng=rng)


# ── The run ──────────────────────────────────────────────────────────────────────────────────────


class _Evaluations:
    """Influences by row, each computed once; pulls that a log holds are read, not computed."""

    def __init__(self, function: Influence, n: int, log: Journal | None) -> None:
        self.function, self.log = function, log
        self.known = np.zeros(n, dtype=bool)
        self.values = np.zeros(n)
        self.order: list[Int] = []
        self.logged = [] if log is None else log.records()
        self.calls = 0

    def __call__(self, rows: Int) -> Float:
        new = rows[~self.known[rows]]
        if len(new):
            self.values[new] = self._computed(new)
            self.known[new] = True
            self.order.append(new)
        return self.values[rows]

    def _computed(self, rows: Int) -> Float:
        self.calls += 1
        if self.calls <= len(self.logged):
            record = self.logged[self.calls - 1]
            same = record.get("rows") == rows.tolist()
            require(same, "log", "records of other rows", "the log of a run with these arguments")
            return np.asarray(record["influence"], dtype=np.float64)
        values = np.asarray(to_numpy(self.function(rows)), dtype=np.float64)
        fits = values.shape == rows.shape
        require(fits, "influence_fn", f"shape {values.shape}", f"{rows.shape}, one number a row")
        if self.log is not None:
            self.log.append({"rows": rows.tolist(), "influence": values.tolist()})
        return values


@dataclass(eq=False)
class _Run:
    policy: ClusterUCB
    codes: Int
    price: Float
    budget: float
    samples: int
    block: int
    tau: float
    within: Within
    look: _Evaluations
    random: np.random.Generator
    progress: Progress | None
    spent: float = 0.0
    taken: list[Int] = field(default_factory=list)
    trace: list[Pull] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Every cluster's rows in random order, one cluster after another."""
        order = self.random.permutation(len(self.codes))
        self.rows = order[np.argsort(self.codes[order], kind="stable")]
        sizes = np.bincount(self.codes, minlength=self.policy.n_arms)
        self.stop = np.cumsum(sizes)
        self.start = self.stop - sizes
        self.vain = np.zeros(len(sizes), dtype=np.int64)  # rows looked at in vain, in a row
        self.last = np.full(len(sizes), np.nan)
        self.rewards = np.zeros(len(sizes))
        self.state = self.policy.init()

    def play(self, B: int, max_rounds: int | None, labels: NDArray[Any]) -> str:
        """Rounds of B pulls until something ends it."""
        number = 0
        while self.state.live.any():
            if max_rounds is not None and number == max_rounds:
                return "max_rounds"
            for arm in self.policy.select(self.state, B, rng=self.random).tolist():
                if self.pull(arm, number, labels[arm]):
                    return "budget"
            live = self.state.live
            if live.any() and bool((self.last[live] <= self.tau).all()):
                return TAU
            number += 1
        # a cluster that is out still has rows where all of them were looked at in vain
        return TAU if bool((self.start < self.stop).any()) else "clusters exhausted"

    def pull(self, arm: int, number: int, label: Any) -> bool:
        """Look at a cluster, take from it if it is worth it; whether the budget is used up."""
        left = self.rows[self.start[arm] : self.stop[arm]]
        sample = left[: self.samples]
        values = self.look(sample)
        if not np.isfinite(values).all():
            return self._unusable(arm, label)
        reward = float(values.mean())
        self.last[arm] = reward
        self.rewards[arm] += reward
        self.state = self.policy.step(self.state, arm, reward)
        full, chosen = False, sample[:0]
        if reward > self.tau:
            offered, used = self._offer(left)
            if not np.isfinite(self.look.values[left]).all():  # rows not looked at hold 0
                return self._unusable(arm, label)
            chosen = offered[np.cumsum(self.price[offered]) <= self.budget - self.spent + 1e-9]
            full = len(chosen) < len(offered)
            self.spent += float(self.price[chosen].sum())
            full = full or self.spent + self.price.min() > self.budget + 1e-9
            self.taken.append(chosen)
            self._drop(arm, left, used)
            self.vain[arm] = 0
        else:
            self.vain[arm] += len(sample)
            self.rows[self.start[arm] : self.stop[arm]] = np.roll(left, -len(sample))
        if self.start[arm] == self.stop[arm] or self.vain[arm] >= len(left):
            self.state = self.state.disable([arm])
        self.trace.append(Pull(number, label, reward, len(chosen)))
        if self.progress is not None:
            self.progress(int(self.spent), int(self.budget))
        return full

    def _offer(self, left: Int) -> tuple[Int, Int]:
        """What an accepted pull may take, in order, and which rows leave the cluster with it."""
        if self.within == "block":
            return left[: self.block], left[: self.block]
        if self.within == "threshold":
            rows = left[: self.block]
            values = self.look(rows)
            return rows[~(values <= self.tau)], rows
        values = self.look(left)
        best = left[np.argsort(-values, kind="stable")[: self.block]]
        return best, best

    def _drop(self, arm: int, left: Int, used: Int) -> None:
        """Rows that are used go to the front, and the front moves on."""
        keep = left[~np.isin(left, used)]
        self.rows[self.start[arm] : self.stop[arm]] = np.concatenate([used, keep])
        self.start[arm] += len(used)

    def _unusable(self, arm: int, label: Any) -> bool:
        text = f"quad_select: an influence in cluster {label} is not finite; it is left out"
        warnings.warn(text, stacklevel=4)
        self.state = self.state.disable([arm])
        self.start[arm] = self.stop[arm]
        return False

    def result(self, labels: NDArray[Any], indices: Int, reason: str) -> QuadResult:
        pulls = self.state.pulls
        with np.errstate(invalid="ignore"):
            mean = self.rewards / pulls
        score = self.policy.scores(self.state)
        taken = np.bincount(self.codes[indices], minlength=len(labels))
        table = {"label": labels, "pulls": pulls, "mean": mean, "score": score, "taken": taken}
        evaluated = np.concatenate([*self.look.order, np.empty(0, np.int64)])
        values = self.look.values[evaluated]
        return QuadResult(indices, len(self.codes), self.trace, evaluated, values, reason, table)


def _clusters(cluster_ids: ArrayLike) -> tuple[NDArray[Any], Int]:
    """Sorted labels (C,), and each row's place among them, (n,)."""
    given = to_numpy(cluster_ids)
    require(
        given.ndim == 1 and len(given) > 0, "cluster_ids", f"shape {given.shape}", "(n,), n > 0"
    )
    missing = given.dtype.kind == "f" and bool(np.isnan(given).any())
    require(not missing, "cluster_ids", "NaN", "a label in every row")
    labels, codes = np.unique(given, return_inverse=True)
    return labels, np.asarray(codes, dtype=np.int64)


def _prices(costs: ArrayLike | None, n: int) -> Float:
    if costs is None:
        return np.ones(n)
    price = np.asarray(to_numpy(costs), dtype=np.float64)
    require(price.shape == (n,), "costs", f"shape {price.shape}", f"({n},)")
    good = bool(np.isfinite(price).all() and (price > 0).all())
    require(good, "costs", "zero, negative or not finite ones", "positive numbers")
    return price


def _neighbours(
    C: int,
    distances: ArrayLike | None,
    centres: ArrayLike | None,
    gamma: float | None,
    neighbours: bool | None,
) -> Any:
    """The weights of neighbours, or None where nothing is asked for."""
    require(gamma is None or gamma > 0, "gamma", gamma, "a positive distance")
    one = distances is None or centres is None
    require(one, "centres", "centres and distances", "one of them")
    given, of = (distances, "distances") if centres is None else (centres, "points")
    if neighbours is False or (given is None and gamma is None and neighbours is None):
        return None
    require(given is not None, "distances", None, "distances or centres for neighbours")
    require(gamma is not None, "gamma", None, "a radius for neighbours")
    places = np.asarray(to_numpy(given), dtype=np.float64)
    name = "distances" if of == "distances" else "centres"
    fits = places.ndim == 2 and len(places) == C
    require(fits, name, f"shape {places.shape}", f"a row for each of the {C} clusters")
    assert gamma is not None
    return neighbour_weights(places, gamma, of=of)
