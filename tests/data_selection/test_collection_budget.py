"""Allocations of a known budget: enumeration, laws, limits of the utilities, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scoredraw.data_selection.collection_budget import (
    Allocation,
    allocate,
    continuous_allocation,
    equal_allocation,
    marginal_utilities,
    proportional_allocation,
    uncertainty_allocation,
)
from scoredraw.data_selection.group_utilities import GroupUtility, group_utility
from scoredraw.data_selection.learning_curves import LearningCurve
from scoredraw.errors import InputError

Float = NDArray[np.float64]
STEP, N0 = 10, 20
SEPARABLE = ("sum", "log", "sqrt", "crra:2")


def random_curves(rng: np.random.Generator, groups: int = 3) -> list[LearningCurve]:
    """Concave, and positive from 20 examples on."""
    return [
        LearningCurve(
            "power",
            {"a": rng.uniform(0.7, 0.95), "b": rng.uniform(0.5, 1.5), "c": rng.uniform(0.35, 0.7)},
        )
        for _ in range(groups)
    ]


def enumerated(curves: Any, costs: Float, budget: float, kind: GroupUtility) -> tuple[Float, Float]:
    """Counts (A, G) of every affordable allocation, and their utilities."""
    most = ((budget - N0 * costs.sum()) / (STEP * costs)).astype(int)
    k = np.array(list(itertools.product(*(range(m + 1) for m in most))))
    n = N0 + STEP * k
    n = n[n @ costs <= budget]
    r = np.stack([curve.predict(n[:, g]) for g, curve in enumerate(curves)], axis=1)
    return n, kind.value(r)


def small(**change: Any) -> Allocation:
    curves = random_curves(np.random.default_rng(3))
    options = {"costs": [1, 1, 1], "budget": 260, "n0": N0, "step": STEP} | change
    return allocate(options.pop("curves", curves), **options)


# ── optimality ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_greedy_is_the_optimum_of_enumeration_for_equal_costs() -> None:
    rng = np.random.default_rng(0)
    for i in range(50):
        curves, weights = random_curves(rng), rng.uniform(0.1, 1, 3)
        name, budget = SEPARABLE[i % 4], 60.0 + STEP * int(rng.integers(5, 20))
        kind = group_utility(name, 3, weights)
        found = allocate(
            curves, [1, 1, 1], budget, utility=name, weights=weights, n0=N0, step=STEP
        )  # fmt: skip
        _, values = enumerated(curves, np.ones(3), budget, kind)
        assert found.utility == pytest.approx(values.max(), abs=1e-12)
        assert found.left < STEP


@pytest.mark.oracle
def test_exact_is_the_optimum_of_enumeration_for_any_costs() -> None:
    rng = np.random.default_rng(1)
    lost = 0.0
    for i in range(50):
        curves, costs, weights = random_curves(rng), rng.uniform(1, 3, 3), rng.uniform(0.1, 1, 3)
        name, budget = SEPARABLE[i % 4], N0 * costs.sum() + STEP * rng.uniform(5, 30)
        options = {"utility": name, "weights": weights, "n0": N0, "step": STEP}
        exact = allocate(curves, costs, budget, **options, method="exact")
        greedy = allocate(curves, costs, budget, **options)
        kkt = allocate(curves, costs, budget, **options, method="kkt")
        _, values = enumerated(curves, costs, budget, group_utility(name, 3, weights))
        best = float(values.max())
        assert exact.utility == pytest.approx(best, abs=1e-12)
        assert max(greedy.utility, kkt.utility) <= best + 1e-12
        assert max(exact.spent, greedy.spent, kkt.spent) <= budget
        lost = max(lost, best - greedy.utility)
    assert lost > 1e-4  # greedy's end of the money does cost something


@pytest.mark.oracle
def test_exact_takes_curves_that_are_not_concave() -> None:
    """A group that only learns from its fifth batch on: greedy never gets there."""

    def late(n: Float) -> Float:
        return np.where(np.asarray(n) >= N0 + 5 * STEP, 0.9, 0.1)

    def early(n: Float) -> Float:
        return 0.2 + 1e-4 * np.asarray(n)

    options = {"costs": [1, 1.5], "budget": 130.0, "n0": N0, "step": STEP}
    assert allocate([late, early], **options).performance[0] == 0.1
    exact = allocate([late, early], **options, method="exact")
    _, values = enumerated([Shape(late), Shape(early)], np.array([1, 1.5]), 130.0,
                           group_utility("sum", 2))  # fmt: skip
    assert exact.utility == pytest.approx(values.max(), abs=1e-12)
    assert exact.performance[0] == 0.9


class Shape:
    def __init__(self, function: Any) -> None:
        self.predict = function


@pytest.mark.oracle
def test_maximin_is_the_optimum_of_enumeration_in_its_worst_group() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        curves, costs = random_curves(rng), rng.uniform(1, 3, 3)
        budget = N0 * costs.sum() + STEP * rng.uniform(5, 30)
        found = allocate(curves, costs, budget, utility="maximin", n0=N0, step=STEP)
        _, values = enumerated(curves, costs, budget, group_utility("maximin", 3))
        assert found.utility == pytest.approx(values.max(), abs=1e-12)


@pytest.mark.oracle
def test_maximin_equalises_where_the_money_reaches() -> None:
    curves = random_curves(np.random.default_rng(5))
    found = allocate(curves, [1, 2, 3], 30_000, utility="maximin", n0=N0, step=1)
    last = [c.marginal(n - 1, 1) for c, n in zip(curves, found.counts, strict=True)]
    assert np.ptp(found.performance) <= max(map(float, last))
    assert np.ptp([float(curve.predict(N0)) for curve in curves]) > 0.02


@pytest.mark.oracle
def test_maximin_passes_over_who_cannot_gain_or_be_paid() -> None:
    flat, rising = LearningCurve("root", {"beta": 0.0}), LearningCurve("root", {"beta": 5.0})
    low = LearningCurve("power", {"a": -0.9, "b": 0.0, "c": 1.0})
    found = allocate([low, rising], [1, 1], 100, utility="maximin", n0=10)
    assert found.counts.tolist() == [10, 90]
    dear = allocate([rising, flat], [200, 1], 2150, utility="maximin", n0=[10, 10]).counts
    assert dear.tolist()[0] == 10


@pytest.mark.oracle
def test_continuous_sizes_meet_their_equation_and_bounds() -> None:
    rng = np.random.default_rng(4)
    for name in SEPARABLE:
        curves, costs, weights = random_curves(rng), rng.uniform(1, 3, 3), rng.uniform(0.3, 1, 3)
        n, price = continuous_allocation(
            curves, costs, 900, utility=name, weights=weights, n0=5
        )  # fmt: skip
        kind = group_utility(name, 3, weights)
        r, slope = (np.array([f(x) for f, x in zip(fs, n, strict=True)]) for fs in (
            curves, [c.slope for c in curves]))  # fmt: skip
        np.testing.assert_allclose(kind.weights * kind.slope(r) * slope / costs, price, rtol=1e-7)
        assert float(costs @ n) == pytest.approx(900, rel=1e-9)
        plain = [lambda x, c=c: c.predict(x) for c in curves]  # without slopes: differences
        again, _ = continuous_allocation(plain, costs, 900, utility=name, weights=weights, n0=5)
        np.testing.assert_allclose(again, n, rtol=1e-4)
    capped, _ = continuous_allocation(curves, [1, 1, 1], 300, n0=5, pool=[20, 1000, 1000])
    assert capped[0] == pytest.approx(20)
    every, _ = continuous_allocation(curves, [1, 1, 1], 300, n0=5, pool=[20, 30, 40])
    assert every.tolist() == [20, 30, 40]


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([*SEPARABLE, "maximin", "gap:0.5"]))
def test_laws_of_greedy(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    curves, costs = random_curves(rng), rng.uniform(1, 3, 3)
    budget = float(N0 * costs.sum() + STEP * rng.uniform(5, 40))
    options: dict[str, Any] = {"utility": name, "n0": N0, "step": STEP}
    weights = None if name == "maximin" else rng.uniform(0.1, 1, 3)
    found = allocate(curves, costs, budget, weights=weights, **options)
    assert found.spent <= budget
    assert found.left < STEP * costs.min() + 1e-6
    assert found.path[-1].tolist() == found.counts.tolist() == np.asarray(found).tolist()
    order = rng.permutation(3)
    shuffled = allocate(
        [curves[g] for g in order], costs[order], budget,
        weights=None if weights is None else weights[order], **options,
    )  # fmt: skip
    assert shuffled.counts.tolist() == found.counts[order].tolist()
    scaled = allocate(curves, 4 * costs, 4 * budget, weights=weights, **options)
    assert scaled.counts.tolist() == found.counts.tolist()
    if weights is not None and not name.startswith("gap"):
        heavier = allocate(curves, costs, budget, weights=8 * weights, **options)
        assert heavier.counts.tolist() == found.counts.tolist()


@pytest.mark.property
@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([*SEPARABLE, "maximin"]))
def test_equal_costs_less_money_is_the_beginning_of_more(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    curves = random_curves(rng)
    less, more = (
        allocate(curves, [1, 1, 1], budget, utility=name, n0=N0, step=STEP) for budget in (160, 330)
    )
    assert less.order.tolist() == more.order[: len(less.order)].tolist()


@pytest.mark.property
@pytest.mark.parametrize("name", [*SEPARABLE, "maximin", "gap:0.5"])
def test_identical_groups_share_equally(name: str) -> None:
    curves = random_curves(np.random.default_rng(0), 1) * 4
    counts = allocate(curves, np.ones(4), 1010, utility=name, n0=N0, step=STEP).counts
    assert np.ptp(counts) <= STEP
    assert counts.sum() == 1010


@pytest.mark.oracle
def test_log_leaves_no_group_at_nothing() -> None:
    """A group at 1e-6 that gains little: sum leaves it there, log serves it first."""
    poor = LearningCurve("saturating", {"a": 0.05, "k": 1e6})
    rich = LearningCurve("saturating", {"a": 0.9, "k": 50.0})
    plain, fair = (allocate([poor, rich], [1, 1], 200, utility=u, n0=N0, step=STEP) for u in
                   ("sum", "log"))  # fmt: skip
    assert plain.counts.tolist() == [20, 180]
    assert fair.order[0] == 0
    assert fair.counts[0] > 100


@pytest.mark.oracle
def test_averse_utilities_tend_to_maximin() -> None:
    worst = [small(utility=u).performance.min() for u in ("crra:0", "crra:1", "crra:4", "crra:40")]
    assert sorted(worst) == worst
    assert small(utility="crra:0").counts.tolist() == small().counts.tolist()
    assert small(utility="crra:1").counts.tolist() == small(utility="log").counts.tolist()
    assert small(utility="crra:0.5").counts.tolist() == small(utility="sqrt").counts.tolist()
    assert worst[0] < worst[-1] - 0.005
    assert worst[-1] > small(utility="maximin").utility - 0.005


@pytest.mark.oracle
def test_a_callable_and_its_name_are_the_same() -> None:
    named, own = small(utility="sum"), small(utility=lambda r: float(r.mean()))
    assert own.counts.tolist() == named.counts.tolist()
    assert own.utility == pytest.approx(named.utility)
    gap = group_utility("gap:2", 3)
    assert small(utility=lambda r: float(gap.value(r))).counts.tolist() == (
        small(utility="gap:2").counts.tolist()
    )


@pytest.mark.oracle
def test_a_transfer_of_nothing_is_none_and_of_everything_pools() -> None:
    alone, none = small(), small(transfer=np.eye(3))
    assert alone.order.tolist() == none.order.tolist()
    assert small(utility="log", transfer=np.eye(3)).order.tolist() == (
        small(utility="log").order.tolist()
    )
    pooled = small(transfer=np.ones((3, 3)), costs=[3, 2, 1], budget=300)
    assert pooled.counts.tolist() == [20, 20, 200]  # all learn from all: the cheapest
    helped = small(transfer=[[1, 0.9, 0.9], [0, 1, 0], [0, 0, 1]], utility="maximin")
    first = random_curves(np.random.default_rng(3))[0]
    effective = helped.counts @ [1, 0.9, 0.9]
    assert helped.performance[0] == pytest.approx(float(first.predict(effective)))
    assert helped.utility > small(utility="maximin").utility


@pytest.mark.oracle
def test_pools_that_end_are_passed_over() -> None:
    free = small(utility="maximin")
    worst = int(np.argmax(free.counts))
    pool = np.full(3, 1000)
    pool[worst] = 55  # three batches of 35
    found = small(utility="maximin", pool=pool)
    assert found.counts[worst] == 50
    assert found.counts.sum() == 260
    assert small(pool=[20, 20, 20]).counts.tolist() == [20, 20, 20]
    assert small(pool=[20, 20, np.inf]).counts.tolist() == [20, 20, 220]


@pytest.mark.oracle
def test_continuous_sizes_of_huge_budgets_hold_no_tables() -> None:
    n, _ = continuous_allocation(random_curves(np.random.default_rng(0)), [1, 1, 1], 1e12, n0=20)
    assert n.sum() == pytest.approx(1e12)


@pytest.mark.oracle
def test_money_is_kept_where_nothing_is_gained() -> None:
    flat = [LearningCurve("root", {"beta": 0.0})] * 2
    for utility in ("sum", "maximin"):
        options = {"costs": [1, 1], "budget": 100, "n0": [10, 20], "utility": utility}
        assert allocate(flat, **options, stop_early=True).counts.tolist() == [10, 20]
        assert allocate(flat, **options).counts.sum() == 100


@pytest.mark.oracle
def test_below_the_floor_a_utility_goes_on_along_its_tangent() -> None:
    kind = group_utility("log", 2, [1, 1], floor=0.1)
    r = np.array([-0.2, 0.05, 0.1, 0.5])
    want = [np.log(0.1) - 3, np.log(0.1) - 0.5, np.log(0.1), np.log(0.5)]
    assert kind.each(r).tolist() == pytest.approx(want)
    assert kind.slope(r).tolist() == pytest.approx([10, 10, 10, 2])
    assert marginal_utilities(kind, [-0.1, 0.5], [0.0, 0.6], [1, 1])[0] == pytest.approx(1.0)


# ── rules that look at no curve ─────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_fixed_ratios_spend_the_budget_within_bounds(seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    costs, shares = rng.uniform(1, 5, groups), rng.uniform(0.1, 1, groups)
    held = rng.integers(0, 50, groups)
    pool = held + rng.integers(0, 300, groups)
    budget = float(rng.uniform(costs @ held, costs @ pool + 1))
    n = proportional_allocation(shares, costs, budget, n0=held, pool=pool)
    assert ((n >= held - 1e-9) & (n <= pool + 1e-9)).all()
    assert float(costs @ n) == pytest.approx(min(budget, float(costs @ pool)), rel=1e-9)
    inside = (n > held + 1e-6) & (n < pool - 1e-6)
    if inside.any():
        np.testing.assert_allclose(n[inside] / shares[inside], (n / shares)[inside][0], rtol=1e-9)


@pytest.mark.oracle
def test_fixed_ratios() -> None:
    assert equal_allocation([1, 2], 30).tolist() == [10, 10]
    assert proportional_allocation([1, 0, 0], [2, 1, 1], 60, n0=5).tolist() == [25, 5, 5]
    assert proportional_allocation([2, 1], [1, 1], 30, inverse=True).tolist() == [10, 20]
    n = uncertainty_allocation([0.4, 0.1], [4, 1], 90)
    other = [lambda d: d, lambda d: -d]  # no small change of the sizes at the same cost is better
    variance = lambda n: 0.16 / n[0] + 0.01 / n[1]  # noqa: E731
    for change in other:
        assert variance(n) < variance(n + np.array([change(0.1), -4 * change(0.1)]))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"budget": 59}, "budget"),
        ({"budget": np.nan}, "budget"),
        ({"costs": [1, 0, 1]}, "costs"),
        ({"costs": [1, -1, 1]}, "costs"),
        ({"costs": [1, np.nan, 1]}, "costs"),
        ({"costs": ["a", "b", "c"]}, "costs"),
        ({"costs": [1, 1]}, "curves"),
        ({"n0": [1, 2]}, "n0"),
        ({"n0": -1}, "n0"),
        ({"n0": 1.5}, "n0"),
        ({"step": 0}, "step"),
        ({"step": 1.5}, "step"),
        ({"weights": [1, 1, -1]}, "weights"),
        ({"weights": [0, 0, 0]}, "weights"),
        ({"weights": [1, 1]}, "weights"),
        ({"weights": [1, 1, 1], "utility": "maximin"}, "weights"),
        ({"pool": [10, 100, 100]}, "pool"),
        ({"pool": [100, 100]}, "pool"),
        ({"pool": [25, 100, 100]}, "step"),
        ({"utility": "logs"}, "utility"),
        ({"utility": "crra"}, "utility"),
        ({"utility": "crra:x"}, "utility"),
        ({"utility": "crra:-1"}, "utility"),
        ({"utility": "crra:101"}, "utility"),
        ({"utility": "gap:-1"}, "utility"),
        ({"utility": lambda r: np.nan}, "utility"),
        ({"floor": 0}, "floor"),
        ({"method": "magic"}, "method"),
        ({"method": "exact", "utility": "gap:1"}, "method"),
        ({"method": "kkt", "utility": "maximin"}, "method"),
        ({"method": "kkt", "transfer": np.eye(3)}, "method"),
        ({"method": "exact", "utility": "maximin", "transfer": np.eye(3)}, "method"),
        ({"transfer": np.eye(2)}, "transfer"),
        ({"transfer": -np.eye(3)}, "transfer"),
        ({"curves": [lambda n: n * np.nan] * 3}, "curves"),
        ({"curves": [lambda n: np.zeros(1)] * 3}, "curves"),
        ({"curves": [lambda n: 0 * n] * 3, "utility": "log"}, "performance"),
        ({"curves": [lambda n: 0 * n - 1] * 3, "utility": "sqrt"}, "performance"),
    ],
)
def test_allocations_refuse(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}: got ") as error:
        small(**change)
    assert "\n" not in str(error.value)


@pytest.mark.contract
def test_rules_refuse() -> None:
    for call in (
        lambda: proportional_allocation([1, -1], [1, 1], 10),
        lambda: proportional_allocation([0, 0], [1, 1], 10),
        lambda: proportional_allocation([1, 0], [1, 1], 10, inverse=True),
        lambda: uncertainty_allocation([1, -1], [1, 1], 10),
        lambda: equal_allocation([], 10),
        lambda: equal_allocation([1], 10, n0=11),
        lambda: continuous_allocation([lambda n: n] * 2, [1, 1], 10, utility="maximin"),
    ):
        with pytest.raises(InputError, match=": got "):
            call()
