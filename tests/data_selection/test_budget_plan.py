"""Plans from a table of measurements: known curves, fair comparisons, noise, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.budget_plan import plan_budget, read_measurements
from scoredraw.data_selection.collection_budget import allocate, equal_allocation
from scoredraw.data_selection.learning_curves import LearningCurve
from scoredraw.errors import InputError
from scoredraw.pages import figure_html

SIZES = (50, 100, 200)
ROOTS = {"north": 1.0, "south": 2.2, "east": 0.6}
COSTS = {"north": 1.0, "south": 2.0, "east": 1.5}


def rows(noise: float = 0.0, seed: int = 0, **extra: Any) -> dict[str, list[Any]]:
    """Three groups, three sizes each, on curves 1 - β / √n; mixed up."""
    rng = np.random.default_rng(seed)
    table: dict[str, list[Any]] = {name: [] for name in ("group", "n", "performance", "cost")}
    for name, beta in ROOTS.items():
        for n in SIZES:
            table["group"].append(name)
            table["n"].append(n)
            table["performance"].append(1 - beta / np.sqrt(n) + noise * rng.normal())
            table["cost"].append(COSTS[name])
    return table | {key: [of[g] for g in table["group"]] for key, of in extra.items()}


def short(**change: Any) -> dict[str, Any]:
    """One row a group."""
    table = {
        "group": ["a", "b"], "n": [100, 100], "performance": [0.9, 0.7], "cost": [1.0, 1.0]
    }  # fmt: skip
    return table | change


# ── what a plan says ────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_without_noise_the_plan_is_the_allocation_of_the_true_curves() -> None:
    plan = plan_budget(rows(), 900, batch=20, explore=0.0, resamples=20)
    curves = [LearningCurve("root", {"beta": beta}) for beta in ROOTS.values()]
    costs = list(COSTS.values())
    total = 900 + 200 * sum(costs)
    want = allocate(curves, costs, total, n0=200, step=20)
    assert plan.names == tuple(ROOTS)
    assert plan.counts.tolist() == want.counts.tolist()
    assert plan.next_batch.tolist() == (20 * np.eye(3, dtype=int)[want.order[0]]).tolist()
    after = [one.value for one in plan.after]
    np.testing.assert_allclose(after, want.performance, rtol=1e-9)
    np.testing.assert_allclose(
        [one.value for one in plan.before],
        [float(curve.predict(200)) for curve in curves],
        rtol=1e-9,
    )
    assert plan.spent + plan.left == pytest.approx(900)
    assert plan.utilities["plan"] == pytest.approx(want.utility)
    assert plan.favourite == 1.0  # the residuals, and so the noise, are nothing
    assert plan.count_ends is not None
    assert (plan.count_ends == plan.counts).all()


@pytest.mark.oracle
def test_the_rules_get_the_same_money() -> None:
    shares = {"north": 0.6, "south": 0.1, "east": 0.3}
    plan = plan_budget(rows(share=shares), 900, resamples=0)
    costs = np.array(list(COSTS.values()))
    total = 900 + 200 * costs.sum()
    equal = np.floor(equal_allocation(costs, total, n0=200) + 1e-9)
    assert plan.alternatives["equal"].tolist() == equal.tolist()
    assert set(plan.alternatives) == {"equal", "proportional"}
    for counts in (plan.counts, *plan.alternatives.values()):
        assert (counts >= 200).all()
        assert total - 3 * costs.max() <= costs @ counts + plan.left <= total + plan.left
    for name, gain in plan.gains.items():
        assert gain.value == pytest.approx(plan.utilities["plan"] - plan.utilities[name])
        assert gain.value > 0
    both = plan_budget(rows(), total, includes_held=True, resamples=0)
    assert both.counts.tolist() == plan.counts.tolist()
    assert set(both.alternatives) == {"equal"}


@pytest.mark.oracle
def test_a_weight_and_a_pool_count() -> None:
    weight = {"north": 0.01, "south": 0.01, "east": 0.98}
    plain, heavy = (plan_budget(rows(**extra), 900, resamples=0) for extra in (
        {}, {"weight": weight}))  # fmt: skip
    assert heavy.counts[2] > plain.counts[2]
    pool = {"north": 1000, "south": 260, "east": 1000}
    kept = plan_budget(rows(pool=pool), 900, batch=20, resamples=0)
    assert kept.counts[1] == 260
    assert kept.alternatives["equal"][1] <= 260


@pytest.mark.oracle
def test_every_group_is_explored_in_the_next_batch() -> None:
    plan = plan_budget(rows(), 900, batch=40, explore=0.1, resamples=0)
    assert (plan.next_batch >= 4).all()
    assert plan.next_batch.sum() == 40


@pytest.mark.oracle
def test_intervals_cover_what_the_true_curves_would_reach() -> None:
    """50 tables, three intervals each; percentiles of 60 cover .93: under .85 has odds of 1e-4."""
    covered = []
    for seed in range(50):
        table = rows(0.01, seed)
        table["se"] = [0.01] * len(table["n"])
        plan = plan_budget(table, 900, batch=60, resamples=60, rng=seed)
        assert plan.after[0].n == 60
        for beta, n, one in zip(ROOTS.values(), plan.counts, plan.after, strict=True):
            covered.append(one.low <= 1 - beta / np.sqrt(n) <= one.high)
    assert np.mean(covered) > 0.85


@pytest.mark.oracle
def test_noise_comes_from_errors_residuals_or_shares() -> None:
    table = short()
    shares = plan_budget(table, 100, resamples=50)
    assert "share of n" in shares.notes[0]
    widths = [one.half_width for one in shares.before]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(0.21 / 0.09), rel=0.3)
    residuals = plan_budget(rows(0.02), 900, resamples=50)
    assert "6 spare residuals" in residuals.notes[0]
    sigma = float(residuals.notes[0].split(": ")[1].split(" /")[0])
    assert sigma == pytest.approx(0.02 * np.sqrt(np.mean(SIZES)), rel=0.5)
    wide = plan_budget(short(se=[0.1, 0.1]), 100, resamples=50)
    assert wide.after[0].half_width > 2 * shares.after[0].half_width
    losses = short(performance=[-0.5, -1.5])
    none = plan_budget(losses, 100, family="saturating", fit={"known": 50.0})
    assert none.count_ends is None
    assert none.favourite is None
    assert np.isnan(none.after[0].low)
    assert "se" in none.notes[0]


@pytest.mark.oracle
def test_close_groups_make_an_unsure_favourite() -> None:
    alike = short(performance=[0.8, 0.801], se=[0.05, 0.05])
    unlike = short(performance=[0.95, 0.5], se=[0.02, 0.02])
    sure, unsure = (plan_budget(t, 100, resamples=100).favourite for t in (unlike, alike))
    assert sure == 1.0
    assert unsure is not None
    assert 0.3 < unsure < 0.7


@pytest.mark.contract
def test_the_same_seed_gives_the_same_plan() -> None:
    first, again, other = (plan_budget(rows(0.02), 900, resamples=20, rng=s) for s in (1, 1, 2))
    assert first.table() == again.table()
    assert first.table() != other.table()
    assert first.counts.tolist() == other.counts.tolist()  # only the intervals are drawn


@pytest.mark.contract
@pytest.mark.parametrize("utility", ["sum", "log", "sqrt", "crra:3", "maximin", "gap:1"])
@pytest.mark.parametrize("family", ["root", "power", "saturating", "isotonic"])
def test_every_utility_and_family_makes_a_plan_that_can_be_shown(utility: str, family: Any) -> None:
    plan = plan_budget(rows(0.01), 900, utility=utility, family=family, resamples=5)
    columns = plan.table()
    assert {len(column) for column in columns.values()} == {3}
    assert (plan.counts >= plan.held).all()
    curves, bars = plan.figures()
    assert [len(curves.series), len(bars.series)] == [6, 3]
    assert curves.series[1].x == list(SIZES)
    if family == "root" and utility == "sum":
        assert all("<svg" in figure_html(figure) for figure in (curves, bars))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"group": []}, "table"),
        ({"n": [100, 100, 100]}, "n"),
        ({"n": [100, 0]}, "n"),
        ({"n": [100, 10.5]}, "n"),
        ({"n": [100, np.nan]}, "n"),
        ({"performance": [0.5, np.nan]}, "performance"),
        ({"performance": [0.5, 1.5]}, "performance"),
        ({"performance": ["high", "low"]}, "performance"),
        ({"cost": [1, 0]}, "cost"),
        ({"cost": [1, -2]}, "cost"),
        ({"se": [0.1, 0]}, "se"),
        ({"weight": [1, -1]}, "weights"),
        ({"share": [1, -1]}, "shares"),
        ({"pool": [50, 200]}, "pool"),
        ({"group": ["a", "a"], "cost": [1, 2]}, "cost"),
        ({"group": ["a", "a"], "pool": [500, 600]}, "pool"),
    ],
)
def test_tables_are_refused(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}: got ") as error:
        plan_budget(short(**change), 100, resamples=0)
    assert "\n" not in str(error.value)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": -5}, "budget"),
        ({"budget": np.nan}, "budget"),
        ({"budget": 150, "includes_held": True}, "budget"),
        ({"batch": 101}, "budget"),
        ({"batch": 0}, "batch"),
        ({"family": "power"}, "n"),
        ({"family": "cubic"}, "family"),
        ({"utility": "best"}, "utility"),
        ({"explore": 0.6}, "explore"),
        ({"resamples": -1}, "resamples"),
        ({"level": 1.0}, "level"),
    ],
)
def test_plans_are_refused(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}: got "):
        plan_budget(short(), **({"budget": 100, "resamples": 0} | options))


@pytest.mark.contract
def test_a_missing_column_is_named() -> None:
    table = short()
    del table["cost"]
    with pytest.raises(InputError, match=r"^table: got no column cost"):
        read_measurements(table)
