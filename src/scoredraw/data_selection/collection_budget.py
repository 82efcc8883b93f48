r"""Whose data to collect next: spend a budget over groups whose learning curves are known.

Group g has n_g examples, the next costs c_g, and a model for it performs r_g(n_g). Find

    max U(r_1(n_1), ..., r_G(n_G))   subject to   Σ c_g n_g ≤ B,   n_g ≥ n_g⁰

Greedy buys a batch of s examples where it adds most for its price,

    g* = argmax_g [ U(n + s e_g) - U(n) ] / (s c_g),

and looks only one batch ahead, which is why it also works where the curves are not known
(`adaptive_collection`). Where U = Σ w_g u(r_g), u and the curves are concave and all costs equal,
it is optimal at every budget on its way. With unequal costs the end of the money is a knapsack:
"exact" solves it. Continuous sizes obey w_g u'(r_g) r_g'(n_g) = λ c_g; "kkt" finds them, rounds
down to batches, and spends what is left greedily.

The budget counts what is already held: Σ c_g n_g⁰ ≤ B.

Cai, Encarnacion, Chern, Corbett-Davies, Bogen, Bergman and Goel, "Adaptive sampling strategies to
construct equitable training datasets", FAccT 2022, arXiv 2202.01327.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.fixed_allocations import (
    CENT,
    budget_terms,
    equal_allocation,
    proportional_allocation,
    uncertainty_allocation,
)
from scoredraw.data_selection.group_utilities import (
    GroupUtility,
    UtilityLike,
    group_utility,
)
from scoredraw.errors import require

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Curve = Callable[[Any], Any]  # sizes (k,) -> performances (k,); a LearningCurve is one
Method = Literal["greedy", "kkt", "exact"]

__all__ = [
    "Allocation",
    "allocate",
    "continuous_allocation",
    "equal_allocation",
    "marginal_utilities",
    "proportional_allocation",
    "uncertainty_allocation",
]

HALVINGS = 60  # bisections of a size or a price
STATES = 4_000_000  # the most partial answers that the exact search holds
BEAM = 2_000  # and the search for a good answer to begin with


@dataclass(frozen=True, eq=False)
class Allocation:
    """How many examples each group gets.

    counts: int64 (G,) with what was held before; an array of them where NumPy asks for one.
    spent: Σ c_g n_g. utility: U at the counts. performance: (G,) as the curves have it.
    order: int64 (batches,), the groups in the order bought. held: (G,) the counts at the start.
    left: money that bought no whole batch.
    """

    counts: Int
    spent: float
    left: float
    utility: float
    performance: Float
    order: Int
    held: Int
    step: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.counts, dtype=dtype)

    @property
    def path(self) -> Int:
        """The counts before the first batch and after each, int64 (batches + 1, G)."""
        bought = np.eye(len(self.counts), dtype=np.int64)[self.order] * self.step
        return np.concatenate([self.held[None], self.held + np.cumsum(bought, axis=0)])


def allocate(
    curves: Sequence[Curve],
    costs: ArrayLike,
    budget: float,
    *,
    utility: UtilityLike = "sum",
    weights: ArrayLike | None = None,
    n0: ArrayLike,
    step: int = 1,
    pool: ArrayLike | None = None,
    transfer: ArrayLike | None = None,
    method: Method = "greedy",
    floor: float | None = None,
    stop_early: bool = False,
) -> Allocation:
    r"""Spend a budget over groups with known learning curves, in batches of `step` examples.

    Greedy skips groups whose batch cannot be paid and stops when none can. Among equals it takes
    the first group. For "maximin" a batch goes to the group that performs worst and can still
    gain; once its batch cannot be paid, to the next worst (that is optimal for the worst group).

    Parameters
    ----------
    curves : G callables of sizes (k,), such as `LearningCurve`. costs : (G,) of one example.
    utility, weights, floor : as in `group_utilities.group_utility`.
    n0 : (G,) examples held, which the budget pays for too. pool : (G,) examples that exist.
    transfer : (G, G) τ; a group then learns from all, r_g(Σ_h τ_gh n_h). Greedy only, and without
        its guarantee.
    method : "greedy"; "exact", the optimum over whole batches; "kkt", see `continuous_allocation`.
        The last two take weighted sums (sum, log, sqrt, crra), "exact" also maximin.
    stop_early : keep the money where no batch adds anything.

    Raises
    ------
    InputError
        costs not above 0, a budget below Σ c n0, a step larger than what is left of a pool (pools
        that are used up are passed over), negative weights, performances that are NaN or outside
        the domain of the utility, a method that does not take the utility.

    Time O(batches · G), memory O(G B / (s min c)); "exact" is a knapsack on the few counts that a
    Lagrange bound leaves open, exponential at worst. Sequential.

    Cai et al. 2022, arXiv 2202.01327.

    >>> curves = [lambda n: 0.9 - n**-0.5, lambda n: 0.9 - 2 * n**-0.5]
    >>> allocate(curves, [1, 1], 100, n0=[10, 10], step=10).counts.tolist()
    [40, 60]
    >>> allocate(curves, [1, 1], 100, n0=[10, 10], step=10, utility="maximin").counts.tolist()
    [20, 80]
    """
    require(method in ("greedy", "kkt", "exact"), "method", repr(method), "greedy, kkt or exact")
    task = _Task.of(curves, costs, budget, utility, weights, n0, step, pool, transfer, floor)
    kind = task.utility
    if method == "kkt" or (method == "exact" and kind.name != "maximin"):
        require(kind.separable, "method", f"{method} for {kind.name}", "greedy")
    alone = method == "greedy" or transfer is None
    require(alone, "method", f"{method} with transfer", "greedy")
    start = np.zeros(task.groups, np.int64)
    if method == "kkt":
        smooth, _ = _stationary(task)
        start = np.minimum(np.floor((smooth - task.n0) / step + CENT).astype(np.int64), task.most)
    order = _greedy(task, start, stop_early)
    if method == "exact" and kind.separable:
        best = _knapsack(task, np.bincount(order, minlength=task.groups))
        order = _greedy(replace(task, most=best), start, False)
    return task.result(order)


def marginal_utilities(
    utility: GroupUtility, now: ArrayLike, then: ArrayLike, price: ArrayLike
) -> Float:
    """[U(n + s e_g) - U(n)] / (s c_g) for every group.

    For maximin -r_g where a batch helps g; with (G, G) what each does for the worst, per cost.

    now: (G,) performances. then: (G,) what each group would have after a batch of its own, or
    (G, G) whose row g is everybody's after a batch for g. price: (G,) s c_g. -> (G,)

    >>> mean = group_utility("sum", 2)
    >>> marginal_utilities(mean, [0.5, 0.7], [0.6, 0.9], [1, 4]).round(6).tolist()
    [0.05, 0.025]
    """
    before, after, cost = (np.asarray(one, np.float64) for one in (now, then, price))
    if after.ndim == 1:
        if utility.name == "maximin":
            return np.where(after > before, -before, -math.inf)
        if utility.separable:  # without the rounding of the other groups' sum
            return utility.weights * (utility.each(after) - utility.each(before)) / cost
        after = np.where(np.eye(len(before), dtype=bool), after, before)
    if utility.name == "maximin":
        worst = int(before.argmin())
        return np.asarray((after[:, worst] - before[worst]) / cost)
    return np.asarray((utility.value(after) - utility.value(before)) / cost)


def continuous_allocation(
    curves: Sequence[Curve],
    costs: ArrayLike,
    budget: float,
    *,
    utility: UtilityLike = "sum",
    weights: ArrayLike | None = None,
    n0: ArrayLike = 0,
    pool: ArrayLike | None = None,
    floor: float | None = None,
) -> tuple[Float, float]:
    r"""The optimal sizes as real numbers, and the price λ of money: w u'(r(n)) r'(n) = λ c.

    Sizes at n0 or at the pool may leave the equation on that side. Arguments and errors as in
    `allocate`; weighted sums only. Curves without a `slope` method are differenced.
    -> n float64 (G,), λ in utility per unit of cost. A root in log λ, and for each λ a bisection of
    all sizes at once: some 1,000 evaluations of each curve.

    >>> root = [lambda n: 1 - n**-0.5, lambda n: 1 - 8 * n**-0.5]
    >>> continuous_allocation(root, [1, 1], 100, n0=1)[0].round(6).tolist()
    [20.0, 80.0]
    """
    task = _Task.of(curves, costs, budget, utility, weights, n0, 1, pool, None, floor)
    require(task.utility.separable, "utility", task.utility.name, "a weighted sum over groups")
    return _stationary(task)


# ── the task and its solvers ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Task:
    """Checked inputs. most: (G,) batches that money and pool allow a group for itself."""

    curves: Sequence[Curve]
    costs: Float
    budget: float
    utility: GroupUtility
    n0: Float
    step: int
    pool: Float
    most: Int
    transfer: Float | None

    @classmethod
    def of(
        cls, curves: Sequence[Curve], costs: ArrayLike, budget: float, utility: UtilityLike,
        weights: ArrayLike | None, n0: ArrayLike, step: int, pool: ArrayLike | None,
        transfer: ArrayLike | None, floor: float | None,
    ) -> _Task:  # fmt: skip
        price, held, exists = budget_terms(costs, budget, n0, pool)
        groups = len(price)
        require(len(curves) == groups, "curves", len(curves), f"{groups}, one for each cost")
        require(step >= 1 and int(step) == step, "step", step, "a whole number, 1 or more")
        whole = bool((held == np.floor(held)).all())
        require(whole, "n0", "a fraction of an example", "whole numbers")
        rest = exists - held
        short = (rest > 0) & (rest < step)
        at = int(np.argmax(short))
        require(not short.any(), "step", step, f"{rest[at]:g} or less, the rest of pool {at}")
        money = budget * (1 + CENT) - float(price @ held)
        most = np.floor(np.minimum(money / (price * step), rest / step)).astype(np.int64)
        kind = group_utility(utility, groups, weights, floor)
        shared = None
        if transfer is not None:
            shared = np.asarray(transfer, np.float64)
            good = shared.shape == (groups, groups) and bool((shared >= 0).all())
            wanted = f"({groups}, {groups}) numbers, 0 or more"
            require(good, "transfer", f"shape {shared.shape}", wanted)
        task = cls(curves, price, float(budget), kind, held, int(step), exists, most, shared)
        start = held if shared is None else held @ shared.T
        kind.value(_rates(curves, start))  # raises outside its domain
        return task

    @cached_property
    def table(self) -> Float:
        """Performance after k batches, (G, max(most) + 2), NaN beyond what each can have."""
        table = np.full((self.groups, int(self.most.max()) + 2), math.nan)
        for g, curve in enumerate(self.curves):
            sizes = self.n0[g] + self.step * np.arange(self.most[g] + 1, dtype=np.float64)
            table[g, : len(sizes)] = _rate(curve, sizes, g)
        return table

    @property
    def groups(self) -> int:
        return len(self.costs)

    @property
    def price(self) -> Float:
        return self.costs * self.step

    def performance(self, k: Int) -> Float:
        """(G,) after k batches."""
        if self.transfer is None:
            return self.table[np.arange(self.groups), k]
        return self._shared(self.n0 + self.step * k)

    def scores(self, k: Int) -> Float:
        """Marginal utility per cost of the next batch of each group."""
        now = self.performance(k)
        if self.transfer is None:
            then = self.table[np.arange(self.groups), k + 1]
            then = np.where(k < self.most, then, now)
        else:
            then = self._shared(self.n0 + self.step * (k + np.eye(self.groups, dtype=np.int64)))
        return marginal_utilities(self.utility, now, then, self.price)

    def _shared(self, n: Float) -> Float:
        """Performances at the sizes (..., G) that the transfer makes of n (..., G)."""
        assert self.transfer is not None
        return _rates(self.curves, n @ self.transfer.T)

    def left(self, k: Int) -> float:
        return self.budget - float(self.costs @ (self.n0 + self.step * k))

    def result(self, order: Int) -> Allocation:
        k = np.bincount(order, minlength=self.groups)
        counts = (self.n0 + self.step * k).astype(np.int64)
        performance = self.performance(k)
        return Allocation(
            counts, float(self.costs @ counts), max(self.left(k), 0.0),
            float(self.utility.value(performance)), performance, order,
            self.n0.astype(np.int64), self.step,
        )  # fmt: skip


def _rates(curves: Sequence[Curve], n: Float) -> Float:
    """The performance of group g at n[..., g]."""
    return np.stack([_rate(curve, n[..., g], g) for g, curve in enumerate(curves)], axis=-1)


def _rate(curve: Curve, n: Float, g: int) -> Float:
    r = np.asarray(curve(n), np.float64)
    require(r.shape == n.shape, "curves", f"shape {r.shape} of curve {g}", f"{n.shape}")
    finite = bool(np.isfinite(r).all())
    require(finite, "curves", f"NaN or infinity of curve {g}", "finite performances from n0 on")
    return r


def _greedy(task: _Task, start: Int, stop_early: bool) -> Int:
    """The groups bought, one a batch, beginning with `start` batches each."""
    k = start.copy()
    order = np.repeat(np.arange(task.groups), start).tolist()
    slack = CENT * task.budget
    while True:
        can = (task.price <= task.left(k) + slack) & (k < task.most)
        if not can.any():
            break
        scores = np.where(can, task.scores(k), -math.inf)
        g = int(np.argmax(scores))
        least = -math.inf if task.utility.name == "maximin" and task.transfer is None else 0.0
        hopeless = scores[g] <= least
        if hopeless and stop_early:
            break
        if scores[g] == -math.inf:  # nobody gains: the one with the fewest
            g = int(np.argmin(np.where(can, task.n0 + task.step * k, math.inf)))
        k[g] += 1
        order.append(g)
    return np.asarray(order, np.int64)


def _knapsack(task: _Task, greedy: Int) -> Int:
    """The best whole numbers of batches, int64 (G,), given a good answer.

    With a price λ of money no answer is worth more than λ M + Σ_g max_k [v_g(k) - λ p_g k]. A
    count whose term falls short of its maximum by more than this bound exceeds a known answer is
    in no better one. What that leaves is searched in full, twice: narrowly, for a better known
    answer, and then widely.
    """
    there = ~np.isnan(task.table)
    values = task.utility.weights[:, None] * task.utility.each(np.where(there, task.table, 1.0))
    worth = np.where(there, values - values[:, :1], -math.inf)
    k, groups, price = np.arange(worth.shape[1]), np.arange(task.groups), task.price
    money = task.left(np.zeros_like(greedy)) + CENT * task.budget
    gains = np.diff(values, axis=1)[there[:, 1:]]
    low, high = 0.0, max(float(gains.max(initial=0.0) / price.min()), 0.0)
    for _ in range(HALVINGS):  # the price at which the money is just spent
        middle = (low + high) / 2
        wanted = (worth - middle * price[:, None] * k).argmax(axis=1)
        low, high = (middle, high) if price @ wanted > money else (low, middle)
    reduced = worth - high * price[:, None] * k
    lacks = reduced.max(axis=1)[:, None] - reduced
    bound = high * money + float(reduced.max(axis=1).sum())
    answer = greedy
    for width in (BEAM, STATES):
        known = float(worth[groups, answer].sum())
        noise = 1e-15 * (1 + abs(known))
        found = _fill(lacks, price, money, high, bound - known + noise, width)
        if len(found) and float(worth[groups, found].sum()) > known + noise:
            answer = found
    return answer


def _fill(lacks: Float, price: Float, money: float, rate: float, slack: float, width: int) -> Int:
    """The counts that lack least of the bound, unspent money included; (0,) if all lack more.

    Of partial answers that cost the same or more and are worth no more, only the best is kept. At
    the width of `STATES` the search is full, or refuses.
    """
    spent, short, chosen = np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int64)
    for g, row in enumerate(lacks):
        options = np.flatnonzero(row <= slack)
        few = len(spent) * len(options) <= STATES
        require(few, "method", "exact for a task with too many near-ties", "greedy")
        left, right = np.indices((len(spent), len(options))).reshape(2, -1)
        cost = spent[left] + price[g] * options[right]
        lack = short[left] + row[options][right]
        value = rate * cost - lack
        order = np.lexsort((-value, cost))
        order = order[(cost[order] <= money) & (lack[order] <= slack)]
        lead = np.maximum.accumulate(value[order])
        keep = order[value[order] > np.concatenate([[-math.inf], lead])[: len(order)]]
        if len(keep) > width:
            keep = keep[np.sort(np.argpartition(lack[keep], width)[:width])]
        chosen = np.column_stack([chosen[left[keep]], options[right[keep]]])
        spent, short = cost[keep], lack[keep]
    return np.asarray(chosen[-1] if len(chosen) else [], np.int64)  # dearest, and so the best


def _stationary(task: _Task) -> tuple[Float, float]:
    """Sizes whose marginal utility per cost is one λ: a root in log λ, sizes by bisection."""
    from scipy.optimize import brentq

    money = task.budget - float(task.costs @ task.n0)
    low, high = task.n0, np.minimum(task.pool, task.n0 + money / task.costs)

    def marginal(n: Float) -> Float:
        r = _rates(task.curves, n)
        slopes = [_slope(curve, n[g]) for g, curve in enumerate(task.curves)]
        gain = task.utility.weights * task.utility.slope(r) * np.asarray(slopes)
        return np.asarray(gain / task.costs)

    def sizes(price: float) -> Float:
        start, end = low.copy(), high.copy()
        for _ in range(HALVINGS):
            middle = (start + end) / 2
            above = marginal(middle) > price
            start, end = np.where(above, middle, start), np.where(above, end, middle)
        return start

    least, most = marginal(high), marginal(low)
    if float(task.costs @ high) <= task.budget:  # the pools end before the money does
        return high, float(least.min())

    def overspent(log_price: float) -> float:
        return float(task.costs @ sizes(math.exp(log_price))) - task.budget

    bottom = math.log(max(float(least.min()), 1e-300))
    top = math.log(min(max(float(most.max()), 1e-300), 1e300)) + CENT
    if overspent(top) >= 0 or overspent(bottom) <= 0:  # no money, or curves that have ended
        best = top if overspent(top) >= 0 else bottom
        return sizes(math.exp(best)), math.exp(best)
    root = float(brentq(overspent, bottom, top, xtol=1e-14, rtol=1e-15))
    over = CENT * task.budget
    raised = (root + up for up in (0.0, 1e-13, 1e-11, 1e-9))  # past the corner of a broken line
    best = next((at for at in raised if overspent(at) <= over), top)
    return sizes(math.exp(best)), math.exp(best)


def _slope(curve: Curve, n: float) -> float:
    if hasattr(curve, "slope"):
        return float(curve.slope(n))
    h = 1e-5 * max(n, 1.0)
    ends = np.asarray(curve(np.array([max(n - h, n / 2), n + h])), np.float64)
    return float((ends[1] - ends[0]) / (n + h - max(n - h, n / 2)))
