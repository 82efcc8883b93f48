"""Trees of steps: rewards against a plain loop, the laws, the roll-out, and what weighs right."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.reward_groups import centre, chain, group_rewards, scale
from scoredraw.rl.rollout_tree import (
    VARIANTS,
    Proposals,
    RolloutTree,
    first_visits,
    fork_advantages,
    fork_counts,
    portool_advantages,
    step_rewards,
    step_weights,
    trajectory_advantages,
    tree_rollout,
    z_scores,
)

pytestmark = pytest.mark.oracle

GOLDEN_PATHS = ["acf", "acgk", "ad", "beh", "bei"]


@st.composite
def grown(draw: st.DrawFn, unknown: bool = True) -> tuple[list[str], list[Any], dict[str, float]]:
    """Names of the steps of each trajectory, outcomes and format rewards of a random tree."""
    paths: list[str] = []
    letters = iter(map(chr, range(200, 500)))

    def grow(prefix: str, depth: int) -> None:
        for _ in range(draw(st.integers(1, 3 if depth < 2 else 2))):
            path = prefix + next(letters)
            if depth < 4 and draw(st.booleans()):
                grow(path, depth + 1)
            else:
                paths.extend([path] * draw(st.integers(1, 2)))  # the same trajectory twice

    grow("", 1)
    values = [1.0, 0.0, -1.0] + [None] * unknown
    outcomes = [draw(st.sampled_from(values)) for _ in paths]
    return paths, outcomes, {s: draw(st.floats(-0.3, 0.3)) for s in sorted(set("".join(paths)))}


def by_loop(
    paths: list[str], outcomes: list[Any], form: dict[str, float], gamma: float, aggregate: str,
    w_traj: float = 1.0, w_fork: float = 1.0, eps: float = 1e-6,
) -> tuple[dict[str, float], list[list[float]]]:  # fmt: skip
    """Rewards of steps and advantages of trajectories, said with dictionaries and loops."""
    G = {"mean": statistics.fmean, "max": max, "min": min}[aggregate]
    through: dict[str, list[float]] = defaultdict(list)
    parent: dict[str, str] = {}
    for path, outcome in zip(paths, outcomes, strict=True):
        for t, step in enumerate(path, 1):
            parent[step] = path[t - 2] if t > 1 else ""
            if outcome is not None:
                through[step].append(gamma ** (len(path) - t) * outcome)
    R = {step: G(values) + form[step] for step, values in through.items()}

    def z(x: float, group: list[float]) -> float:
        if len(group) < 2:
            return 0.0
        return (x - statistics.fmean(group)) / (statistics.stdev(group) + eps)

    siblings = defaultdict(list)
    for step in R:
        siblings[parent[step]].append(R[step])
    known = [outcome for outcome in outcomes if outcome is not None]
    A = []
    for path, outcome in zip(paths, outcomes, strict=True):
        if outcome is None:
            A.append([0.0] * len(path))
            continue
        whole = w_traj * z(outcome, known)
        A.append([whole + w_fork * z(R[s], siblings[parent[s]]) for s in path])
    return R, A


@pytest.mark.property
@settings(max_examples=60)
@given(grown(), st.floats(0, 1), st.sampled_from(["mean", "max", "min"]))
def test_against_the_loop(case: Any, gamma: float, aggregate: str) -> None:
    paths, outcomes, form = case
    R, A = by_loop(paths, outcomes, form, gamma, aggregate)
    tree = RolloutTree.from_paths(paths, outcomes, form)
    got = step_rewards(tree, gamma, aggregate)
    np.testing.assert_allclose(got, [R.get(s, math.nan) for s in tree.tokens], atol=1e-12)
    advantages = portool_advantages(tree, gamma=gamma, aggregate=aggregate)
    for row, want, path in zip(advantages, A, paths, strict=True):
        # a deviation of rounding alone is as good as 0 beside eps
        np.testing.assert_allclose(row[: len(path)], want, atol=1e-6)
        assert not row[len(path) :].any()


@pytest.mark.property
@settings(max_examples=40)
@given(grown(), st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(case: Any, random: Any) -> None:
    paths, outcomes, form = case
    order = list(range(len(paths)))
    random.shuffle(order)
    names = {s: f"step {i}" for i, s in enumerate(sorted(form, key=lambda _: random.random()))}
    one = portool_advantages(RolloutTree.from_paths(paths, outcomes, form))
    other = RolloutTree.from_paths(
        [[names[s] for s in paths[k]] for k in order], [outcomes[k] for k in order],
        {names[s]: value for s, value in form.items()},
    )  # fmt: skip
    np.testing.assert_allclose(portool_advantages(other), one[order], atol=1e-9)


@pytest.mark.property
@settings(max_examples=40)
@given(grown(unknown=False), st.floats(0.3, 1), st.sampled_from(["mean", "max", "min"]))
def test_right_steps_stand_above_wrong_ones(case: Any, gamma: float, aggregate: str) -> None:
    """Whatever the formats, as far as they are within gamma^{T_max} / 2."""
    paths, outcomes, form = case
    limit = gamma ** max(map(len, paths)) / 2
    tree = RolloutTree.from_paths(paths, outcomes, {s: f / 0.3 * limit for s, f in form.items()})
    R = step_rewards(tree, gamma, aggregate)
    seen = defaultdict(set)
    for path, outcome in zip(tree.paths, outcomes, strict=True):
        for step in path[path >= 0]:
            seen[int(step)].add(outcome)
    right = [R[s] for s, found in seen.items() if found == {1.0}]
    wrong = [R[s] for s, found in seen.items() if found == {-1.0}]
    if right and wrong:
        assert min(right) > max(wrong)


@pytest.mark.property
@settings(max_examples=40)
@given(grown())
def test_siblings_sum_to_nothing(case: Any) -> None:
    tree = RolloutTree.from_paths(*case)
    A = fork_advantages(tree, step_rewards(tree))
    sums = np.bincount(tree.table.fork, weights=A)
    np.testing.assert_allclose(sums, 0, atol=1e-9)


@pytest.mark.property
@settings(max_examples=40)
@given(grown(unknown=False))
def test_prefix_values_telescope(case: Any) -> None:
    """gamma 1, no format: R is the value of a prefix, and its differences sum to R_k - R(s_1)."""
    paths, outcomes, form = case
    tree = RolloutTree.from_paths(paths, outcomes, form)
    R = step_rewards(tree, 1.0, use_format=False)
    once = len(set(paths)) == len(paths)
    for path, outcome in zip(tree.paths, outcomes, strict=True):
        walk = R[path[path >= 0]]
        through = [o for p, o in zip(tree.paths, outcomes, strict=True) if path[0] in p]
        assert walk[0] == pytest.approx(statistics.fmean(through))
        if once:
            assert np.diff(walk).sum() == pytest.approx(outcome - walk[0])


def test_tempo_is_the_published_form_at_steps() -> None:
    """(1 / std)(R_k - mean + V(s_t) - V(s_{t-1})), V the mean outcome through a step."""
    outcomes = [1.0, -1.0, 1.0, 0.0, -1.0]
    tree = RolloutTree.from_paths(GOLDEN_PATHS, outcomes)
    A = portool_advantages(tree, **VARIANTS["tempo"])
    std = statistics.stdev(outcomes)
    for row, path, outcome in zip(A, GOLDEN_PATHS, outcomes, strict=True):
        V = [
            statistics.fmean(
                o for p, o in zip(GOLDEN_PATHS, outcomes, strict=True) if p.startswith(path[:t])
            )
            for t in range(len(path) + 1)
        ]
        want = (outcome - statistics.fmean(outcomes) + np.diff(V)) / std
        np.testing.assert_allclose(row[: len(path)], want, atol=1e-5)
    equal = RolloutTree.from_paths(GOLDEN_PATHS, [1.0] * 5)
    assert not portool_advantages(equal, **VARIANTS["tempo"], w_traj=1.0).any()
    assert not portool_advantages(equal, credit="td", gamma=0.5).any()


def test_chains_are_grpo() -> None:
    rng = np.random.default_rng(0)
    outcomes = rng.choice([1.0, 0.0, -1.0], 24)
    paths = [[f"{k}.{t}" for t in range(1 + k % 3)] for k in range(24)]
    tree = RolloutTree.from_paths(paths, outcomes, query=[k // 8 for k in range(24)])
    A = portool_advantages(tree, **VARIANTS["trajectory_only"])
    grpo = chain(centre(), scale())(group_rewards(torch.as_tensor(outcomes), num_generations=8))
    for row, want, path in zip(A, grpo.tolist(), paths, strict=True):
        np.testing.assert_allclose(row[: len(path)], want, atol=1e-12)


def test_z_scores_are_those_of_reward_groups() -> None:
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=200), rng.integers(0, 40, 200)
    x[::9] = np.nan
    want = chain(centre(), scale())(group_rewards(torch.as_tensor(x), group_ids=g)).numpy()
    np.testing.assert_allclose(z_scores(x, g), want, atol=1e-12)


def test_no_epsilon_and_half_precision() -> None:
    """Equal values get 0 without an eps too; outcomes may be a tensor of any type."""
    found = z_scores(np.array([2.0, 2.0, 1.0, 3.0]), np.array([0, 0, 1, 1]), 0.0).tolist()
    assert found == pytest.approx([0.0, 0.0, -(0.5**0.5), 0.5**0.5], rel=1e-12)
    half = torch.tensor([1, -1, 1, 0, -1], dtype=torch.bfloat16)
    outcome = RolloutTree.from_paths(GOLDEN_PATHS, half).table.outcome
    assert outcome.dtype == np.float64
    assert outcome.tolist() == [1, -1, 1, 0, -1]


def test_two_siblings_and_equal_siblings() -> None:
    tree = RolloutTree.from_paths(["ab", "ac", "de", "df"], [1, -1, 1, 1], {"e": 0.1, "f": 0.1})
    A = fork_advantages(tree, step_rewards(tree))
    found = dict(zip(tree.tokens, A, strict=True))
    assert found["b"] == -found["c"] == pytest.approx(2**-0.5, abs=1e-6)
    assert found["e"] == found["f"] == 0.0


def test_shorter_is_better_only_with_decay() -> None:
    tree = RolloutTree.from_paths(["ab", "cdef"], [1, 1])
    for gamma, sign in ((0.9, 1), (1.0, 0)):
        A = fork_advantages(tree, step_rewards(tree, gamma))
        assert np.sign(A[tree.tokens.index("a")]) == sign


def test_unknown_outcomes_leave_everything_else_alone() -> None:
    known = RolloutTree.from_paths(GOLDEN_PATHS, [1, -1, 1, 0, -1])
    more = RolloutTree.from_paths([*GOLDEN_PATHS, "bez"], [1, -1, 1, 0, -1, None])
    A, B = portool_advantages(known), portool_advantages(more)
    np.testing.assert_array_equal(A, B[:5])
    assert not B[5].any()
    assert np.isnan(step_rewards(more)[more.tokens.index("z")])


def test_dedup_counts_each_step_once() -> None:
    tree = RolloutTree.from_paths(GOLDEN_PATHS, [1, -1, 1, 0, -1])
    first = first_visits(tree)
    assert sorted(tree.paths[first]) == list(range(len(tree)))
    A_traj = trajectory_advantages(tree)
    once = portool_advantages(tree, w_fork=0, dedup=True)
    assert once[0, 0] == pytest.approx(A_traj[:3].mean())  # "a" is in the first three
    assert not once[~first].any()


# ── growing ─────────────────────────────────────────────────────────────────────────────────────


class Stops:
    """A process that ends with probability p at each step; its first letter is worth a reward."""

    def __init__(self, p: float = 0.4, letters: int = 1_000_000) -> None:
        self.p, self.letters, self.asked = p, letters, 0

    def __call__(self, parents: Any, rng: np.random.Generator) -> Proposals:
        C = len(parents)
        self.asked += C
        done = rng.random(C) < self.p
        key = 2 * rng.integers(0, self.letters, C) + done
        return Proposals(done, np.where(done, 1.0, np.nan), 0.0, key, key.tolist())


@pytest.mark.property
@settings(max_examples=60)
@given(
    st.integers(2, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from([1, 2, 10**6]), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_shape_of_a_rollout(
    n: int, f: int, T: int, Q: int, letters: int, merge: bool, seed: int
) -> None:
    def grow() -> RolloutTree:
        return tree_rollout(Stops(0.3, letters), n, f, T, seed, queries=Q, merge=merge)

    tree = grow()
    t = tree.table
    leaves = np.bincount(t.query[t.paths[:, 0]], minlength=Q)
    assert (leaves <= n).all()
    assert leaves.min() >= 1
    if not merge or letters == 10**6:
        assert (leaves == n).all()
    assert t.length.max() <= T
    met = np.bincount(t.step, minlength=len(tree)) > 0
    children = np.bincount(t.parent[met & (t.parent >= 0)], minlength=1)
    assert children.max() <= f
    if merge:
        pairs = list(zip(t.parent[met], np.array(tree.tokens)[met], strict=True))
        assert len(set(pairs)) == len(pairs)
    again = grow()
    assert (again.paths == tree.paths).all()
    assert (again.table.outcome == t.outcome).all()


def test_fork_counts_are_even_and_exact() -> None:
    """Each of 6 candidates of two groups is kept as often: counts within 4.5 s.e. (1e-4)."""
    rng, group, wanted = np.random.default_rng(0), np.array([0, 0, 0, 2, 2]), np.array([4, 9, 1])
    total = np.zeros(5)
    for _ in range(2000):
        children = fork_counts(group, wanted, 2, rng)
        assert children.max() <= 2
        assert np.bincount(group, children).tolist() == [4, 0, 1]
        total += children
    np.testing.assert_allclose(total / 2000, [4 / 3] * 3 + [0.5] * 2, atol=4.5 * 0.6 / 2000**0.5)
    few = fork_counts(np.zeros(2, int), np.array([9]), 2, rng)
    assert few.tolist() == [2, 2]
    for _ in range(50):
        assert fork_counts(np.zeros(3, int), np.array([4]), 2, rng, True).min() == 1


def test_with_all_kept_alive_distinct_first_steps_never_fork() -> None:
    tree = tree_rollout(Stops(0.2), 6, 3, 5, 0, keep_all_live=True)
    assert np.bincount(tree.table.parent[tree.table.parent >= 0]).max() == 1


def test_truncation() -> None:
    for late, want in ((0.0, 0.0), (-1.0, -1.0)):
        tree = tree_rollout(Stops(0.0), 4, 2, 3, 0, truncated=late)
        assert tree.table.outcome.tolist() == [want] * 4
    assert np.isnan(tree_rollout(Stops(0.0), 4, 2, 3, 0, truncated=None).table.outcome).all()


@pytest.mark.parametrize("letters", [2, 10**6])
def test_draws_weigh_without_bias_and_forks_do_not(letters: int) -> None:
    """P(stop at the first step) = .4 and the law of the length, from 60,000 trees of four.

    Pruning drops unfinished trajectories only, so that Π 1/|C| favours short ones; weights by
    draws do not, merged steps or not. z below 4.5: a false alarm in 10^4 runs.
    """
    Q, p = 60_000, 0.4
    tree = tree_rollout(Stops(p, letters), 4, 2, 3, 0, queries=Q)
    t = tree.table
    leaf = t.paths[np.arange(len(t.paths)), t.length - 1]
    query = t.query[leaf]

    def z(rule: str, f: Any, truth: float) -> float:
        each = np.bincount(query, weights=step_weights(tree, rule)[leaf] * f, minlength=Q)
        return (each.mean() - truth) / (each.std() / Q**0.5)

    assert abs(z("draws", t.length == 1, p)) < 4.5
    assert abs(z("draws", t.length == 2, p * (1 - p))) < 4.5
    if letters == 2:
        assert abs(z("draws", np.ones(len(leaf)), 1.0)) < 4.5
    else:
        np.testing.assert_allclose(step_weights(tree)[leaf], 1 / 4)  # every leaf alike
    assert z("forks", t.length == 1, p) > 20


def test_forks_weigh_without_bias_where_every_live_step_keeps_a_child() -> None:
    """Unequal forks of a kept-alive tree, children drawn alike: 40,000 trees, z below 4.5."""
    Q, p = 40_000, 0.4
    tree = tree_rollout(Stops(p), 4, 2, 3, 0, queries=Q, merge=False, keep_all_live=True)
    t = tree.table
    leaf = t.paths[np.arange(len(t.paths)), t.length - 1]
    weight = step_weights(tree, "forks")[leaf]
    np.testing.assert_allclose(np.bincount(t.query[leaf], weights=weight), 1.0)
    each = np.bincount(t.query[leaf], weights=weight * (t.length == 1), minlength=Q)
    assert abs(each.mean() - p) < 4.5 * each.std() / Q**0.5


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_refusals() -> None:
    tree = RolloutTree.from_paths(GOLDEN_PATHS, [1, -1, 1, 0, -1])
    step = Stops()
    for message, call in (
        ("paths: got two parents of step 'b'", lambda: RolloutTree.from_paths(["ab", "b"], [1, 1])),
        ("two parents of step 'a' in traj", lambda: RolloutTree.from_paths(["aba"], [1])),  # cycle
        ("paths: got no step in trajectory 1", lambda: RolloutTree.from_paths(["a", ""], [1, 1])),
        ("two parents", lambda: RolloutTree.from_paths(["a", "a"], [1, 1], query=[0, 1])),
        ("leaf: got .*, want steps that nothing follows",
         lambda: RolloutTree.from_paths(["a", "ab"], [1, 1]).paths),
        (r"query: got \[0\]", lambda: RolloutTree.from_paths(["a", "b"], [1, 1], query=[0])),
        ("query: got ", lambda: RolloutTree.from_paths(["a"], [1], query=[-1])),
        ("query: got -1", lambda: RolloutTree().add_step(None, query=-1)),
        (r"outcome: got \(1,\)", lambda: RolloutTree.from_paths(["a", "b"], [1])),
        ("outcome: got an infinite", lambda: RolloutTree.from_paths(["a"], [math.inf])),
        ("format_reward: got NaN", lambda: RolloutTree.from_paths(["a"], [1], {"a": math.nan})),
        ("parents: got 7", lambda: RolloutTree().add_step(7)),
        ("step: got ", lambda: RolloutTree().finish(0, 1.0)),
        ("tree: got no trajectory", lambda: RolloutTree().paths),
        (r"gamma: got 1\.5", lambda: step_rewards(tree, 1.5)),
        (r"gamma: got -0\.1", lambda: portool_advantages(tree, gamma=-0.1)),
        ("aggregate: got 'median'", lambda: step_rewards(tree, aggregate="median")),
        ("credit: got 'ppo'", lambda: portool_advantages(tree, credit="ppo")),
        ("rewards: got", lambda: fork_advantages(tree, [1.0])),
        ("rule: got", lambda: step_weights(tree, "n")),
        ("tree: got steps without a share", lambda: step_weights(tree)),
        ("n: got 1,", lambda: tree_rollout(step, 1)),
        ("max_fork: got 0", lambda: tree_rollout(step, 4, 0)),
        ("max_depth: got 0", lambda: tree_rollout(step, 4, 2, 0)),
        ("step_fn: got done", lambda: tree_rollout(lambda p, r: Proposals([True], 1.0), 4)),
        ("step_fn: got 1 keys",
         lambda: tree_rollout(lambda p, r: Proposals(p < 0, 1.0, key=[0]), 4)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
    assert step.asked == 0
