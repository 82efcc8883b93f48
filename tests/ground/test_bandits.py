"""Bandits: who is pulled next, what a pull tells of neighbours, and how regret grows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from scoredraw.bandits import (
    UCB1,
    BanditState,
    ClusterUCB,
    cumulative_regret,
    exploration_bonus,
    largest,
    neighbour_weights,
    play,
)
from scoredraw.errors import InputError

NEAR = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]])


def played(policy: UCB1, rewards: dict[int, list[float]]) -> BanditState:
    state = policy.init()
    for arm, values in rewards.items():
        for value in values:
            state = policy.step(state, arm, value)
    return state


# ── Laws ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_scores_are_the_formula() -> None:
    state = played(UCB1(2), {0: [1.0, 0.0], 1: [0.5]})
    bonus = np.sqrt(2 * np.log(3) / np.array([2, 1]))
    np.testing.assert_allclose(UCB1(2, 0.7, 2.0).scores(state), 0.5 + 1.4 * bonus)
    np.testing.assert_allclose(UCB1(2, 0.7, "auto").scores(state), 0.5 + 0.7 * 0.5 * bonus)
    assert state.deviation == pytest.approx(np.std([1.0, 0.0, 0.5], ddof=1))
    np.testing.assert_allclose(
        exploration_bonus([2, 1, 0], plus_one=True), np.sqrt(2 * np.log(3) / np.array([3, 2, 1]))
    )


@pytest.mark.oracle
@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("alpha", [0.0, 1.0, np.inf])
def test_every_arm_is_pulled_once_before_any_is_pulled_again(batch: int, alpha: float) -> None:
    policy = ClusterUCB(10, alpha)
    rng = np.random.default_rng(1)
    _, arms = play(policy, lambda arm: float(rng.normal()), -(-10 // batch), batch=batch, rng=0)
    assert sorted(arms[:10].tolist()) == list(range(10))
    assert arms[:10].tolist() != list(range(10))  # and not in order of their numbers


@pytest.mark.oracle
def test_the_first_arm_is_random() -> None:
    """400 first choices among 4: each count within 5 deviations of 100 (false alarm < 1e-5)."""
    policy, rng = UCB1(4), np.random.default_rng(0)
    first = [int(policy.select(policy.init(), rng=rng)[0]) for _ in range(400)]
    assert np.abs(np.bincount(first, minlength=4) - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.oracle
def test_greedy_breaks_ties_at_random_where_rewards_are_constant() -> None:
    """1,000 pulls of 5 equal arms: counts within 5 deviations of 200 (false alarm < 1e-5)."""
    state, _ = play(UCB1(5, alpha=0.0), lambda arm: 0.3, 1000, rng=0)
    assert np.abs(state.pulls - 200).max() < 5 * np.sqrt(1000 * 0.2 * 0.8)


@pytest.mark.oracle
def test_infinite_alpha_is_round_robin() -> None:
    rng = np.random.default_rng(0)
    state, arms = play(UCB1(7, np.inf), lambda arm: float(rng.normal()), 70, rng=0)
    assert set(state.pulls.tolist()) == {10}
    for sweep in arms.reshape(10, 7):
        assert len(set(sweep.tolist())) == 7


@pytest.mark.oracle
def test_regret_grows_as_the_logarithm() -> None:
    """UCB1 on Bernoulli arms, mean of 12 runs: under Auer's bound, and a straight line in log t.

    The regret of the pulls 1,000 to 4,000 is at most twice that of 250 to 1,000: alike if it
    grows as log t, four times as much if it grew as t. Fixed seeds.
    """
    means, gaps = np.array([0.8, 0.6, 0.5]), np.array([0.2, 0.3])
    marks = np.array([250, 1000, 4000])
    regret = np.mean([regrets(1.0, means, 4000, seed)[marks - 1] for seed in range(12)], axis=0)
    assert (regret < (8 / gaps).sum() * np.log(marks) + (1 + np.pi**2 / 3) * gaps.sum()).all()
    early, late = np.diff(regret)
    assert 0 < late < 2 * early


@pytest.mark.oracle
def test_greedy_regret_is_linear_where_optimism_is_not() -> None:
    """So the check above can fail: a greedy player that starts badly never recovers."""
    means = np.array([0.8, 0.6])
    greedy, optimist = (
        np.mean([np.diff(regrets(alpha, means, 1200, s)[[599, 1199]]) for s in range(16)])
        for alpha in (0.0, 1.0)
    )
    assert greedy > 2 * optimist


def regrets(alpha: float, means: np.ndarray, pulls: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    _, arms = play(
        UCB1(len(means), alpha), lambda arm: float(rng.random() < means[arm]), pulls, rng=rng
    )
    return cumulative_regret(means, arms)


# ── Neighbours ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_neighbour_at_the_radius_learns_nothing() -> None:
    policy = ClusterUCB(3, distances=NEAR, radius=2.0, threshold=0.25)
    state = policy.step(policy.init(), 1, 1.25)
    np.testing.assert_allclose(state.sums, [0.5, 1.0, 0.0])  # weights 1/2, 1 and none
    assert state.counts.tolist() == [1, 1, 0]
    assert state.pulls.tolist() == [0, 1, 0]
    just = ClusterUCB(3, distances=NEAR, radius=2.0 + 1e-9)
    assert just.step(just.init(), 1, 1.0).counts.tolist() == [1, 1, 1]


@pytest.mark.oracle
def test_a_distance_to_oneself_of_zero_weighs_one() -> None:
    weights = neighbour_weights(NEAR, 2.5).toarray()
    np.testing.assert_allclose(weights, np.maximum(1 - NEAR / 2.5, 0))
    points = np.array([[0.0], [1.0], [3.0]])
    np.testing.assert_allclose(neighbour_weights(points, 2.5, of="points").toarray(), weights)


@pytest.mark.property
def test_without_distances_cluster_ucb_is_ucb1() -> None:
    rewards = np.random.default_rng(0).normal(size=(200, 4))
    for alpha in (0.0, 0.5, np.inf):
        runs = []
        for policy in (UCB1(4, alpha), ClusterUCB(4, alpha, 1.0)):
            given = iter(rewards)
            runs.append(play(policy, lambda arm, given=given: float(next(given)[arm]), 200, rng=3))
        np.testing.assert_array_equal(runs[0][1], runs[1][1])
        np.testing.assert_allclose(runs[0][0].sums, runs[1][0].sums)


@pytest.mark.property
def test_alpha_in_deviations_does_not_feel_the_unit_of_rewards() -> None:
    noise = np.random.default_rng(0).normal(size=300)
    arms = []
    for unit in (1.0, 1e-3, 1e4):
        given = iter(noise)
        pull = lambda arm, given=given, unit=unit: unit * (arm + float(next(given)))  # noqa: E731
        arms.append(play(ClusterUCB(3, 1.0), pull, 300, rng=0)[1].tolist())
    assert arms[0] == arms[1] == arms[2]


# ── States, and who may play ─────────────────────────────────────────────────────────────────────


@pytest.mark.property
def test_a_state_survives_json_and_the_run_goes_on_alike() -> None:
    policy, rewards = ClusterUCB(5), np.random.default_rng(0).normal(size=(60, 5))
    given = iter(rewards)
    whole, arms = play(
        policy, lambda arm: float(next(given)[arm]), 60, rng=np.random.default_rng(5)
    )
    given, rng = iter(rewards), np.random.default_rng(5)
    half, first = play(policy, lambda arm: float(next(given)[arm]), 30, rng=rng)
    half = BanditState.read(json.loads(json.dumps(half.plain())))
    again, second = play(policy, lambda arm: float(next(given)[arm]), 30, state=half, rng=rng)
    np.testing.assert_array_equal(arms, np.concatenate([first, second]))
    assert again.plain() == whole.plain()


@pytest.mark.property
def test_disabled_arms_are_never_chosen_and_steps_change_nothing_in_place() -> None:
    policy = UCB1(4)
    state = policy.init()
    without = state.disable([0, 2])
    assert sorted(policy.select(without, 4, rng=0).tolist()) == [1, 3]  # more than live: all
    policy.step(state, 1, 1.0)
    assert state.counts.tolist() == [0] * 4
    assert state.live.all()


@pytest.mark.property
@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"n_arms": 0}, "n_arms"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"scale": 0.0}, "scale"),
        ({"scale": "deviation"}, "scale"),
        ({"ties": "first"}, "ties"),
        ({"threshold": np.nan}, "threshold"),
        ({"distances": NEAR, "radius": 0.0}, "radius"),
        ({"distances": NEAR, "radius": -1.0}, "radius"),
        ({"distances": NEAR}, "radius"),
        ({"radius": 1.0}, "radius"),
        ({"distances": NEAR + np.triu(NEAR), "radius": 1.0}, "distances"),
        ({"distances": -NEAR, "radius": 1.0}, "distances"),
        ({"distances": NEAR + 1, "radius": 1.0}, "distances"),
        ({"distances": NEAR[:2], "radius": 1.0}, "distances"),
        ({"distances": NEAR * np.nan, "radius": 1.0}, "distances"),
        ({"distances": NEAR[:2, :2], "radius": 1.0}, "distances"),
    ],
)
def test_bad_policies_are_refused_by_name(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
        ClusterUCB(**{"n_arms": 3, **arguments})


@pytest.mark.property
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda p, s: p.step(s, 3, 0.0), "arm"),
        (lambda p, s: p.step(s, -1, 0.0), "arm"),
        (lambda p, s: p.step(s, 0, np.nan), "reward"),
        (lambda p, s: p.step(s, 0, np.inf), "reward"),
        (lambda p, s: p.select(s, 0), "size"),
        (lambda p, s: p.select(s.disable([0, 1, 2])), "live"),
        (lambda p, s: play(p, float, 0), "rounds"),
        (lambda p, s: play(p, float, 1, state=UCB1(2).init()), "state"),
        (lambda p, s: BanditState.read({"sums": [0.0]}), "data"),
        (lambda p, s: BanditState.read({**s.plain(), "live": [True]}), "data"),
        (lambda p, s: largest([0.0, np.nan]), "scores"),
        (lambda p, s: largest([0.0], ties="none"), "ties"),
        (lambda p, s: cumulative_regret([0.1], [1]), "arms"),
        (lambda p, s: cumulative_regret([[0.1], [0.2]], [0]), "means"),
        (lambda p, s: neighbour_weights(NEAR, 1.0, of="angles"), "of"),
    ],
)
def test_bad_calls_are_refused_by_name(call: Any, argument: str) -> None:
    policy = UCB1(3)
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
        call(policy, policy.init())
