"""Collecting by measurements: the laws of a campaign, its noise, its file, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scoredraw.data_selection.adaptive_collection import AdaptiveSampler
from scoredraw.data_selection.collection_budget import allocate
from scoredraw.data_selection.learning_curves import LearningCurve
from scoredraw.errors import InputError

Int = NDArray[np.int64]
ROOTS = [LearningCurve("root", {"beta": beta}) for beta in (1.0, 1.6, 0.7)]
POLYGENIC = [LearningCurve("daetwyler", {"h2": h2, "M": 150.0}) for h2 in (0.7, 0.5, 0.3)]


def measure(
    sampler: AdaptiveSampler, curves: Any, noise: float = 0.0, rng: Any = None
) -> AdaptiveSampler:
    """Tell one measurement a group, at what it holds."""
    for g, n in enumerate(sampler.counts):
        sampler.tell(n, float(curves[g].predict(n)) + (noise * rng.normal() if noise else 0.0), g)
    return sampler


def collect(sampler: AdaptiveSampler, curves: Any, rounds: int = 10**6, **noise: Any) -> list[Int]:
    batches = []
    while not measure(sampler, curves, **noise).done and len(batches) < rounds:
        batches.append(sampler.ask())
    return batches


def made(**change: Any) -> AdaptiveSampler:
    options: dict[str, Any] = {"costs": [1, 1, 1], "budget": 500, "n0": 20, "explore": 0.0}
    return AdaptiveSampler(**(options | change))


# ── what a campaign does ────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("utility", ["sum", "log", "maximin"])
@pytest.mark.parametrize("costs", [[1, 1, 1], [1, 2, 3]])
def test_without_noise_a_campaign_is_the_allocation_of_known_curves(
    utility: str, costs: list[int]
) -> None:
    sampler = made(utility=utility, costs=costs)
    batches = collect(sampler, ROOTS)
    known = allocate(ROOTS, costs, 500, utility=utility, n0=20, step=10)
    assert [int(b.argmax()) for b in batches] == known.order.tolist()
    assert sampler.counts.tolist() == known.counts.tolist()
    assert sampler.spent == known.spent
    assert not sampler.ask().any()


@pytest.mark.oracle
def test_a_round_in_small_steps_is_as_many_small_rounds() -> None:
    """Without noise a round of 50 in steps of 10 is five of greedy's batches."""
    sampler = made(batch=50, step=10)
    collect(sampler, ROOTS)
    assert sampler.counts.tolist() == allocate(ROOTS, [1] * 3, 500, n0=20, step=10).counts.tolist()


@pytest.mark.property
@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["sum", "log", "maximin", "gap:0.5"]),
    st.sampled_from(["root", "isotonic", "daetwyler"]),
)
def test_laws_of_a_noisy_campaign(seed: int, utility: str, family: Any) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.uniform(1, 3, 3)
    budget = float(20 * costs.sum() + rng.uniform(100, 400))
    pool = 20 + rng.integers(25, 200, 3)
    sampler = AdaptiveSampler(
        costs, budget, utility, batch=20, family=family, explore=0.15, n0=20, pool=pool, rng=seed
    )
    for t in range(1, 100):
        batch = measure(sampler, ROOTS, 0.05, rng).ask()
        assert sampler.spent <= budget
        assert (sampler.counts <= pool).all()
        assert batch.sum() <= 20
        if batch.sum() < 20:
            break
        owed = np.minimum(int(0.15 * 20 * t), pool - 20)
        assert (sampler.counts - 20 >= owed).all()


@pytest.mark.oracle
def test_one_wrong_measurement_starves_a_group_only_without_exploration() -> None:
    """The second group looks finished at the start, which is untrue."""

    def run(explore: float) -> Int:
        sampler = made(utility="maximin", explore=explore, budget=600)
        sampler.tell(20, 0.999, 1)
        for _ in range(100):
            for g in np.flatnonzero(sampler.counts > (0, 20, 0)):
                n = sampler.counts[g]
                sampler.tell(n, float(ROOTS[g].predict(n)), int(g))
            if not sampler.ask().any():
                return sampler.counts
        raise AssertionError("no end")

    assert run(0.0)[1] == 20
    explored = run(0.1)
    assert explored[1] > 200  # known curves give it 347
    assert explored.argmax() == 1


@pytest.mark.oracle
def test_noise_costs_little() -> None:
    """100 seeds, noise .01: the mean regret is below 3 % of U; fixed seeds, so no false alarm."""
    best = allocate(POLYGENIC, [1] * 3, 600, n0=60, step=30).utility
    regrets = []
    for seed in range(100):
        sampler = AdaptiveSampler(
            [1, 1, 1], 600, batch=30, family="daetwyler", fit={"known": 150.0}, n0=60
        )
        collect(sampler, POLYGENIC, noise=0.01, rng=np.random.default_rng(seed))
        r = [float(c.predict(n)) for c, n in zip(POLYGENIC, sampler.counts, strict=True)]
        regrets.append(1 - np.mean(r) / best)
    assert np.mean(regrets) < 0.03
    assert max(regrets) < 0.03


@pytest.mark.oracle
def test_groups_without_a_curve_are_explored_first() -> None:
    sampler = made(family="isotonic")
    sampler.tell([10, 20], [0.5, 0.6], 0)
    sampler.tell([10, 20], [0.5, 0.6], 1)
    assert sampler.ask().tolist() == [0, 0, 10]
    assert sampler.curve(2) is None
    sampler.tell([10, 20, 30], [0.9, 0.9, 0.9], 2)
    assert sampler.ask()[2] == 0
    first = {int(made(rng=seed).ask().argmax()) for seed in range(20)}
    assert first == {0, 1, 2}  # nothing is known: any


@pytest.mark.oracle
def test_pools_that_end_are_passed_over_and_flat_groups_fill_up() -> None:
    sampler = made(pool=[20, 35, 400], budget=300)
    collect(sampler, ROOTS)
    assert sampler.counts.tolist() == [20, 30, 250]
    flat = [LearningCurve("root", {"beta": 0.0})] * 3
    early = made(stop_early=True)
    assert collect(early, flat) == []
    assert early.done
    spread = made(n0=[20, 40, 60])
    collect(spread, flat)
    assert np.ptp(spread.counts) <= 10


@pytest.mark.oracle
def test_a_transfer_is_measured_where_it_acts() -> None:
    """Two groups learn from the third alone: it is bought, and told at effective sizes."""
    transfer = np.array([[0, 0, 1.0], [0, 0, 1], [0, 0, 1]])
    for utility in ("sum", "maximin"):
        sampler = made(transfer=transfer, utility=utility, budget=200)
        while not sampler.done:
            for g in range(3):
                n = float(sampler.counts[2])
                sampler.tell(n, float(ROOTS[g].predict(n)), g)
            sampler.ask()
        assert sampler.counts.tolist() == [20, 20, 160]


@pytest.mark.property
def test_permuted_groups_get_permuted_batches() -> None:
    order = np.array([2, 0, 1])
    costs = np.array([1.0, 1.3, 1.7])
    plain, other = made(costs=costs, explore=0.1), made(costs=costs[order], explore=0.1)
    for a, b in zip(collect(plain, ROOTS), collect(other, [ROOTS[g] for g in order]), strict=True):
        assert b.tolist() == a[order].tolist()


# ── its state ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize("family", ["root", "power"])
def test_a_campaign_goes_on_from_its_file(tmp_path: Path, family: Any) -> None:
    options: dict[str, Any] = {
        "utility": "crra:2", "weights": [0.2, 0.3, 0.5], "explore": 0.1, "batch": 15, "step": 5,
        "pool": [100, 400, np.inf], "family": family, "rng": 5,
    }  # fmt: skip
    if family == "power":
        options |= {"fit": {"shrink": (0.5, 1e-3), "bounds": {"a": (None, 1.0)}}}
    whole, parted = made(**options), made(**options)
    want = collect(whole, ROOTS, 12, noise=0.02, rng=np.random.default_rng(0))
    noise = np.random.default_rng(0)
    got = []
    for _ in range(12):
        measure(parted, ROOTS, 0.02, noise)
        got.append(parted.ask())
        parted.save(tmp_path / "campaign.json")
        parted = AdaptiveSampler.load(tmp_path / "campaign.json")
    assert np.array(got).tolist() == np.array(want).tolist()
    measure(parted, ROOTS, 0.02, noise)  # as `collect` measured once more to see the end
    assert parted.state == whole.state
    json.loads((tmp_path / "campaign.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.contract
def test_states_do_not_change_and_counts_can_be_mended() -> None:
    sampler = measure(made(), ROOTS)
    before = sampler.state
    batch = sampler.ask()
    assert before.counts == (20, 20, 20)
    assert sampler.state.counts == tuple((20 + batch).tolist())
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.counts = (0, 0, 0)  # type: ignore[misc]
    sampler.correct([20, 23, 20])
    assert sampler.spent == 63
    sampler.tell(23, 0.7, 1)
    assert sampler.state.measurements[-1].round == 1


@pytest.mark.contract
def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "[1]", "{}", '{"version": 2, "settings": {}, "state": {}}',
                 '{"version": 1, "settings": {}, "state": {}}'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match="got") as error:
            AdaptiveSampler.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^path: got "):
        AdaptiveSampler.load(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"^utility: got a callable"):
        made(utility=lambda r: float(r.mean())).save(path)
    assert path.read_text() == text  # a refused save leaves the old file


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"budget": 59}, "budget"),
        ({"costs": [1, 1, 0]}, "costs"),
        ({"n0": 0.5}, "n0"),
        ({"batch": 0}, "batch"),
        ({"batch": 2.5}, "batch"),
        ({"pool": [25, 100, 100]}, "batch"),
        ({"pool": [10, 100, 100]}, "pool"),
        ({"step": 11}, "step"),
        ({"step": 0}, "step"),
        ({"family": "cubic"}, "family"),
        ({"explore": 0.34}, "explore"),
        ({"explore": -0.1}, "explore"),
        ({"weights": [1, -1, 1]}, "weights"),
        ({"utility": "crra"}, "utility"),
        ({"transfer": np.eye(2)}, "transfer"),
        ({"fit": {"known": 1.0}}, "known"),
    ],
)
def test_campaigns_refuse(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}: got "):
        made(**change)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("told", "argument"),
    [
        ((20, np.nan, 0), "r"),
        ((20, 0.5, 3), "group"),
        ((20, 0.5, -1), "group"),
        ((20, 0.5, "a"), "group"),
        ((21, 0.5, 0), "n"),
        ((0, 0.5, 0), "n"),
        ((np.nan, 0.5, 0), "n"),
        (([10, 20], 0.5, 0), "r"),
        (([10, 20], [0.5, 0.6], 0, -1.0), "weight"),
    ],
)
def test_measurements_are_refused(told: tuple[Any, ...], argument: str) -> None:
    sampler = made()
    with pytest.raises(InputError, match=f"^{argument}: got "):
        sampler.tell(*told)
    assert sampler.state.measurements == ()


@pytest.mark.contract
def test_corrections_are_refused() -> None:
    for counts in ([1, 2], [-1, 2, 3], [1.5, 2, 3], [50, 20, 20]):
        with pytest.raises(InputError, match=r"^counts: got "):
            made(pool=[40, 40, 40]).correct(counts)
