r"""A plan for collecting: from a table of measurements to what to buy next, and how sure that is.

The table has a row a measurement: a group, the n examples that its model was trained on, the
performance, and what one more example costs. Several rows of a group are its learning curve; one
row is enough for the one-parameter family. From it come the next batch (with exploration), the
whole allocation, what each group would reach, and what equal numbers or population shares would
reach for the same money. All of it hangs on noisy measurements. So the plan is made again from
measurements disturbed as much as they are noisy, and what varies is shown.

Cai, Encarnacion, Chern, Corbett-Davies, Bogen, Bergman and Goel, "Adaptive sampling strategies to
construct equitable training datasets", FAccT 2022, arXiv 2202.01327.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.adaptive_collection import AdaptiveSampler
from scoredraw.data_selection.collection_budget import Allocation, allocate
from scoredraw.data_selection.fixed_allocations import proportional_allocation
from scoredraw.data_selection.group_utilities import UtilityLike, group_utility
from scoredraw.data_selection.learning_curves import (
    FAMILIES,
    Family,
    LearningCurve,
    fit_learning_curve,
    free_parameters,
)
from scoredraw.errors import InputError, require
from scoredraw.metrics import Estimate, check_level
from scoredraw.reports import Figure, Series
from scoredraw.uniforms import Rng, generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]

COLUMNS = ("group", "n", "performance", "cost")
PER_GROUP = ("cost", "weight", "share", "pool")
SHRINK = (0.5, 1e-3)  # for a free exponent: as if noise were .03 and its logarithm spread by 1
ROUNDS = 20  # the batches that the money is cut into where no batch is given
GRID = 40  # points of a drawn curve


@dataclass(frozen=True, eq=False)
class Measured:
    """The table, checked. names: (G,); group: (m,) numbers of groups; held: the largest n."""

    names: tuple[str, ...]
    group: Int
    n: Float
    r: Float
    se: Float | None
    held: Int
    cost: Float
    weight: Float | None
    share: Float | None
    pool: Float | None


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """What to collect, what it would do, and how far the measurements carry that.

    All (G,), in the order of `names`. held: examples at the start. next_batch: to collect before
    measuring again. counts: held and bought once the money is spent; count_ends: (2, G) where they
    lie in most disturbed plans. before, after: predicted performances at held and at counts.
    alternatives: name -> counts of rules that look at no curve. utilities: of held, of the plan
    and of each alternative. gains: name -> the plan's utility over the alternative's, if the
    plan is followed. favourite: share of disturbed plans whose next batch goes to the same group.
    """

    names: tuple[str, ...]
    held: Int
    next_batch: Int
    counts: Int
    count_ends: Int | None
    before: tuple[Estimate, ...]
    after: tuple[Estimate, ...]
    alternatives: dict[str, Int]
    alternative_performance: dict[str, Float]
    utilities: dict[str, float]
    gains: dict[str, Estimate]
    favourite: float | None
    spent: float
    left: float
    curves: tuple[LearningCurve, ...]
    measured: Measured
    notes: tuple[str, ...] = ()

    def table(self) -> dict[str, list[Any]]:
        """The plan as columns, a row a group."""
        columns: dict[str, list[Any]] = {
            "group": list(self.names),
            "held": self.held.tolist(),
            "next_batch": self.next_batch.tolist(),
            "planned": self.counts.tolist(),
        }
        if self.count_ends is not None:
            columns["planned_low"], columns["planned_high"] = self.count_ends.tolist()
        columns["performance_before"] = [one.value for one in self.before]
        for end in ("value", "low", "high"):
            name = "performance_after" + ("" if end == "value" else f"_{end}")
            columns[name] = [getattr(one, end) for one in self.after]
        for name, counts in self.alternatives.items():
            columns[name] = counts.tolist()
            columns[f"performance_{name}"] = self.alternative_performance[name].tolist()
        return columns

    def figures(self) -> list[Figure]:
        """The curves with what was measured, and the allocations side by side."""
        return [curve_figure(self), allocation_figure(self)]


def plan_budget(
    table: Mapping[str, Any],
    budget: float,
    *,
    utility: UtilityLike = "sum",
    family: Family = "root",
    batch: int | None = None,
    explore: float | None = None,
    fit: Mapping[str, Any] | None = None,
    floor: float | None = 1e-3,
    includes_held: bool = False,
    resamples: int = 200,
    level: float = 0.95,
    rng: Rng = 0,
) -> BudgetPlan:
    r"""What to collect for a budget, from measured performances of groups.

    Parameters
    ----------
    table : columns of m rows: group (names), n (examples trained on), performance (the higher the
        better), cost (of one example). Optional: se (the standard error of the performance), and
        the same in all rows of a group: weight (in the utility), share (of the population), pool
        (examples that exist). A group holds its largest n.
    budget : money to spend; with `includes_held` it has paid for what is held already.
    utility, floor : as in `group_utilities.group_utility`. family, fit : of the curves;
        "root" takes one row a group or more and performances of at most 1, "power" is shrunk to
        c = 1/2 unless `fit` says otherwise.
    batch : examples a round, a twentieth of what the money buys by default. explore : share of a
        round that every group gets; a tenth, or half of 1/G where that is less, by default.
    resamples : disturbed plans behind the intervals; 0 for none. Noise is `se` where there is one;
        else σ / √n with σ from the residuals of the curves; else, where every group is measured
        once, that of a share, √(r (1 - r) / n). level : of the intervals.

    Raises
    ------
    InputError
        a missing column, columns of different lengths, NaN, costs not above 0, values that differ
        within a group, too few sizes for the family, a budget that buys nothing or does not pay
        for what is held, and what `AdaptiveSampler` refuses.

    Time: resamples · (G fits and an allocation). Memory O(G · batches). Sequential.

    Cai et al. 2022, arXiv 2202.01327.

    >>> table = {
    ...     "group": ["young", "old"], "n": [400, 100], "performance": [0.9, 0.8],
    ...     "cost": [1.0, 2.0], "share": [0.8, 0.2],
    ... }
    >>> plan = plan_budget(table, 200, batch=20, rng=0)
    >>> plan.held.tolist(), plan.next_batch.tolist(), plan.counts.tolist()
    ([400, 100], [2, 18], [400, 200])
    >>> {name: round(float(gain.value), 3) for name, gain in plan.gains.items()}
    {'equal': 0.0, 'proportional': 0.009}
    """
    require(family in FAMILIES, "family", repr(family), ", ".join(FAMILIES))
    require(resamples >= 0, "resamples", resamples, "0 or more")
    check_level(level)
    require(math.isfinite(budget), "budget", budget, "a finite amount")
    data = read_measurements(table)
    options = dict(fit or {})
    if family == "power" and not {"known", "shrink"} & options.keys():
        options["shrink"] = SHRINK
    _check_sizes(data, family, options)
    paid = float(data.cost @ data.held)
    money = float(budget) - (paid if includes_held else 0.0)
    size = _batch_size(data, money) if batch is None else batch
    least = size * float(data.cost.min()) + float(budget) - money
    require(money >= size * float(data.cost.min()), "budget", budget, f"{least:g}, a batch's cost")
    share = min(0.1, 0.5 / len(data.names)) if explore is None else explore
    planner = _Planner(data, money + paid, utility, family, options, size, share, floor)
    curves, asked = planner.curves(data), planner.ask(data)
    whole, rules = planner.spend(curves), _alternatives(data, money + paid)
    start = _performance(curves, data.held)
    reached = {name: _performance(curves, counts) for name, counts in rules.items()}
    worth = {name: planner.value(r) for name, r in reached.items()}
    noise, notes = _noise(data, curves, family, options)
    drawn = _disturbed(planner, noise, whole.counts, rules, resamples, generator(rng))
    if drawn is not None:
        notes.append(f"{level:.0%} intervals from {resamples} disturbed plans.")
    counts, before, after, gains, favourites = drawn or [None] * 5
    ends = _ends(counts, level)
    gained = np.array([whole.utility - worth[name] for name in rules])
    return BudgetPlan(
        names=data.names,
        held=data.held,
        next_batch=asked,
        counts=whole.counts,
        count_ends=None if ends is None else np.round(ends).astype(np.int64),
        before=_estimates(start, before, level),
        after=_estimates(whole.performance, after, level),
        alternatives=rules,
        alternative_performance=reached,
        utilities={"held": planner.value(start), "plan": whole.utility, **worth},
        gains=dict(zip(rules, _estimates(gained, gains, level), strict=True)),
        favourite=None if favourites is None else float((favourites == asked.argmax()).mean()),
        spent=whole.spent - paid,
        left=whole.left,
        curves=curves,
        measured=data,
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class _Planner:
    """From measurements to curves, the next batch and an allocation; total counts what is held."""

    data: Measured
    total: float
    utility: UtilityLike
    family: Family
    fit: dict[str, Any]
    size: int
    explore: float
    floor: float | None

    def curves(self, data: Measured) -> tuple[LearningCurve, ...]:
        weights = _precisions(data)
        parts = [data.group == g for g in range(len(data.names))]
        return tuple(
            fit_learning_curve(data.n[own], data.r[own], self.family, weights[own], **self.fit)
            for own in parts
        )

    def ask(self, data: Measured) -> Int:
        sampler = AdaptiveSampler(
            data.cost, self.total, self.utility, data.weight, self.size, self.family,
            self.explore, 0, n0=data.held, pool=data.pool, fit=self.fit, floor=self.floor,
        )  # fmt: skip
        weights = _precisions(data)
        for g in range(len(data.names)):
            own = data.group == g
            sampler.tell(data.n[own], data.r[own], g, weights[own])
        return sampler.ask()

    def spend(self, curves: tuple[LearningCurve, ...]) -> Allocation:
        data = self.data
        return allocate(
            curves, data.cost, self.total, utility=self.utility, weights=data.weight,
            n0=data.held, step=self.size, pool=data.pool, floor=self.floor,
        )  # fmt: skip

    def value(self, r: Float) -> float:
        kind = group_utility(self.utility, len(r), self.data.weight, self.floor)
        return float(kind.value(r))


def _disturbed(
    planner: _Planner,
    noise: Float | None,
    counts: Int,
    rules: Mapping[str, Int],
    resamples: int,
    random: np.random.Generator,
) -> list[Any] | None:
    """Of plans from disturbed measurements: counts, performances before and after, gains, and
    the group that the next batch is for.
    """
    if noise is None or resamples == 0:
        return None
    rows = []
    data = planner.data
    for _ in range(resamples):
        other = replace(data, r=data.r + noise * random.normal(size=len(data.r)))
        curves = planner.curves(other)
        now, then = _performance(curves, data.held), _performance(curves, counts)
        worth = [planner.value(_performance(curves, n)) for n in rules.values()]
        gains = planner.value(then) - np.array(worth)
        rows.append((planner.spend(curves).counts, now, then, gains, planner.ask(other).argmax()))
    return [np.array(column) for column in zip(*rows, strict=True)]


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def read_measurements(table: Mapping[str, Any]) -> Measured:
    """Check a table of measurements; groups in the order of their first row. InputError."""
    missing = [name for name in COLUMNS if name not in table]
    require(not missing, "table", f"no column {', '.join(missing)}", ", ".join(COLUMNS))
    labels = [str(label) for label in np.asarray(table["group"], dtype=object).ravel()]
    require(len(labels) > 0, "table", "no rows", "a row a group or more")
    columns = {
        name: _column(table, name, len(labels)) for name in ("n", "performance", "se", *PER_GROUP)
    }
    names = tuple(dict.fromkeys(labels))
    number = {name: g for g, name in enumerate(names)}
    group = np.array([number[label] for label in labels], np.int64)
    n, r = columns["n"], columns["performance"]
    assert n is not None
    assert r is not None
    require(bool((n > 0).all()), "n", f"{n.min():g}", "sizes above 0")
    require(bool((n == np.floor(n)).all()), "n", "a fraction", "whole numbers of examples")
    held = np.zeros(len(names), np.int64)
    np.maximum.at(held, group, n.astype(np.int64))
    each = {name: _per_group(name, columns[name], group, names) for name in PER_GROUP}
    cost, se = each["cost"], columns["se"]
    assert cost is not None
    require(bool((cost > 0).all()), "cost", f"{cost.min():g}", "above 0")
    require(se is None or bool((se > 0).all()), "se", "one not above 0", "standard errors above 0")
    return Measured(
        names, group, n, r, se, held, cost, each["weight"], each["share"], each["pool"]
    )  # fmt: skip


def _column(table: Mapping[str, Any], name: str, rows: int) -> Float | None:
    if name not in table:
        return None
    try:
        values = np.asarray(table[name], np.float64).ravel()
    except (TypeError, ValueError):
        raise InputError(f"{name}: got what is not numeric, want numbers") from None
    require(len(values) == rows, name, f"{len(values)} rows", f"{rows}, as many as group")
    require(bool(np.isfinite(values).all()), name, "NaN or infinity", "finite numbers")
    return values


def _per_group(name: str, values: Float | None, group: Int, names: tuple[str, ...]) -> Float | None:
    if values is None:
        return None
    first = values[np.unique(group, return_index=True)[1]]
    differs = values != first[group]
    where = names[int(group[int(np.argmax(differs))])]
    require(not differs.any(), name, f"several values in group {where}", "one a group")
    return np.asarray(first, np.float64)


def _check_sizes(data: Measured, family: str, options: Mapping[str, Any]) -> None:
    needed = free_parameters(family, options.get("known"), options.get("shrink"))
    for g, name in enumerate(data.names):
        sizes = len(np.unique(data.n[data.group == g]))
        came = f"{sizes} distinct sizes of group {name}"
        require(sizes >= needed, "n", came, f"{needed} or more for {family}")
    highest = float(data.r.max())
    fits = family != "root" or highest <= 1
    require(fits, "performance", f"{highest:g}", "at most 1 for root, or another family")


def _batch_size(data: Measured, money: float) -> int:
    size = max(1, int(money / (ROUNDS * float(data.cost.mean()))))
    if data.pool is not None:
        rest = data.pool - data.held
        size = int(min(size, rest[rest > 0].min(initial=size)))
    return size


# ── curves, rules and noise ──────────────────────────────────────────────────────────────────────


def _precisions(data: Measured) -> Float:
    return data.n if data.se is None else np.asarray(data.se**-2.0)


def _performance(curves: tuple[LearningCurve, ...], n: Int) -> Float:
    return np.array([float(curve.predict(one)) for curve, one in zip(curves, n, strict=True)])


def _alternatives(data: Measured, total: float) -> dict[str, Int]:
    ratios = {"equal": np.ones(len(data.names))}
    if data.share is not None:
        ratios["proportional"] = data.share
    return {
        name: np.floor(
            proportional_allocation(ratio, data.cost, total, n0=data.held, pool=data.pool) + 1e-9
        ).astype(np.int64)
        for name, ratio in ratios.items()
    }


def _noise(
    data: Measured, curves: tuple[LearningCurve, ...], family: str, options: Mapping[str, Any]
) -> tuple[Float | None, list[str]]:
    """The standard deviation of each measurement (m,), or None, and where it comes from."""
    if data.se is not None:
        return data.se, ["Noise of the measurements: their standard errors."]
    fitted = np.zeros_like(data.r)
    for g, curve in enumerate(curves):
        fitted[data.group == g] = curve.predict(data.n[data.group == g])
    free = free_parameters(family, options.get("known"), options.get("shrink"))
    spare = len(data.r) - free * len(data.names)
    if spare >= 1:
        sigma = math.sqrt(float((data.n * (data.r - fitted) ** 2).sum()) / spare)
        return sigma / np.sqrt(data.n), [
            f"Noise of the measurements: {sigma:.3g} / √n, from {spare} spare residuals."
        ]
    if bool(((data.r >= 0) & (data.r <= 1)).all()):
        share = (data.r * data.n + 0.5) / (data.n + 1)
        note = "Noise of the measurements: as of a share of n, √(r (1 - r) / n); give se if known."
        return np.sqrt(share * (1 - share) / data.n), [note]
    return None, ["No intervals: as many parameters as measurements. Give a column se."]


def _ends(drawn: Any, level: float) -> Float | None:
    if drawn is None:
        return None
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _estimates(values: Float, drawn: Any, level: float) -> tuple[Estimate, ...]:
    ends = _ends(drawn, level)
    low, high = np.full((2, len(values)), math.nan) if ends is None else ends
    count = 0 if drawn is None else len(drawn)
    rows = zip(values, low, high, strict=True)
    return tuple(Estimate(float(v), float(a), float(b), count) for v, a, b in rows)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def curve_figure(plan: BudgetPlan) -> Figure:
    """Each group's curve up to its planned count, and the measurements."""
    series, data = [], plan.measured
    for g, (name, curve) in enumerate(zip(plan.names, plan.curves, strict=True)):
        own = np.flatnonzero(data.group == g)
        own = own[np.argsort(data.n[own], kind="stable")]
        last = max(int(plan.counts[g]), int(plan.held[g]) + 1)
        n = np.geomspace(float(data.n[own[0]]), last, GRID)
        series.append(Series(name, n.tolist(), curve.predict(n).tolist()))
        points = data.n[own].tolist(), data.r[own].tolist()
        series.append(Series(f"{name}, measured", *points, baseline=True))
    caption = "Each curve ends at the planned number of examples."
    title = "Learning curves"
    return Figure("line", title, "examples", "performance", series, log_x=True, caption=caption)


def allocation_figure(plan: BudgetPlan) -> Figure:
    """Examples by group: held, planned, and by the rules that look at no curve."""
    low, high = [None, None] if plan.count_ends is None else plan.count_ends.tolist()
    series = [
        Series("held", plan.names, plan.held.tolist(), baseline=True),
        Series("plan", plan.names, plan.counts.tolist(), low, high),
    ]
    for name, counts in plan.alternatives.items():
        series.append(Series(name, plan.names, counts.tolist()))
    return Figure("bar", "Examples of each group", "", "examples", series)
