"""Trees of denoisings: their limits, their laws on finite chains, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from scoredraw.diffusion.schedules import LinearBeta
from scoredraw.diffusion.steering_baselines import best_of_n, weighted_rollouts
from scoredraw.diffusion.tree_proposals import (
    MarkovChain,
    diffusion_chain,
    exact_values,
    finite_chain,
)
from scoredraw.diffusion.tree_sampling import (
    DiffusionTree,
    soft_backup,
    tree_sample,
    uct_scores,
    widening_limit,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

K, T = 6, 3
RNG = np.random.default_rng(17)
PRIOR = np.full(K, 1 / K)
STEPS = RNG.dirichlet(np.full(K, 0.5), size=(T, K))
REWARD = np.array([0.0, -1.0, 0.5, 2.0, 0.0, 1.0])


def finite(**options: Any) -> DiffusionTree:
    options = {"lam": 1.5, "generator": 0} | options
    return DiffusionTree(finite_chain(PRIOR, STEPS), lambda x: REWARD[x], **options)


def distance(tree: DiffusionTree, target: Any) -> float:
    """Total variation of the implied law of x_0."""
    leaves, p = tree.implied_law()
    law = np.bincount(tree.states.at(leaves), p, minlength=len(target))
    return float(abs(law - target).sum() / 2)


def recomputed(tree: DiffusionTree) -> np.ndarray:
    """All values from the leaves up, node by node."""
    found = tree.to_arrays()
    value, parent = found["value"].copy(), found["parent"]
    for i in range(len(parent) - 1, -1, -1):
        kids = np.flatnonzero(parent == i)
        if len(kids):
            value[i] = logsumexp(tree.lam * value[kids] + found["log_ratio"][kids])
            value[i] = (value[i] - np.log(len(kids))) / tree.lam
    return value


# ── formulas and limits ─────────────────────────────────────────────────────────────────────────


def test_backup_between_mean_and_maximum() -> None:
    v = RNG.normal(size=7)
    assert soft_backup(v, 1e-7) == pytest.approx(v.mean(), abs=1e-6)
    assert soft_backup(v, np.inf) == v.max()
    assert soft_backup(v, 2.0) == pytest.approx((logsumexp(2 * v) - np.log(7)) / 2, rel=1e-12)
    ratio = RNG.normal(size=7)
    want = logsumexp(2 * v + ratio) - np.log(7)
    assert soft_backup(v, 2.0, ratio) == pytest.approx(want / 2, rel=1e-12)
    assert soft_backup([-np.inf, 0.0], 1.0) == pytest.approx(-np.log(2))
    assert soft_backup([-np.inf, -np.inf], 1.0) == -np.inf
    assert soft_backup([1e6, 1e6 - 1], 3.0) < 1e6
    assert widening_limit(1) == 2.0
    np.testing.assert_allclose(uct_scores([1.0, 2.0], [1, 4], np.e, 3.0), [4.0, 3.5])


def test_one_iteration_hands_its_reward_to_the_root() -> None:
    for search in (False, True):
        tree = finite(search=search).grow(1)
        assert tree.root_value == pytest.approx(tree.best()[1], rel=1e-12)
        assert REWARD[tree.sample(3)].tolist() == [tree.best()[1]] * 3


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("lam", [1e-7, 1.5])
def test_every_value_is_that_of_its_children(lam: float, batch_size: int) -> None:
    tree = finite(lam=lam, batch_size=batch_size, alpha=0.6).grow(250)
    np.testing.assert_allclose(tree.to_arrays()["value"], recomputed(tree), rtol=1e-8, atol=1e-8)


def test_infinite_lambda_backs_up_the_largest() -> None:
    tree = finite(lam=np.inf, alpha=0.6).grow(200)
    found = tree.to_arrays()
    for i in np.flatnonzero(found["kids"]):
        assert found["value"][i] == found["value"][found["parent"] == i].max()
    assert (REWARD[tree.sample(50)] == tree.root_value).all()


def test_a_constant_reward_and_a_shift_change_nothing() -> None:
    flat = DiffusionTree(finite_chain(PRIOR, STEPS), lambda x: np.full(len(x), 3.0), generator=1)
    found = flat.grow(200).to_arrays()
    np.testing.assert_allclose(found["value"], 3.0, rtol=1e-12)
    one = finite(batch_size=4).grow(200).to_arrays()
    moved = DiffusionTree(
        finite_chain(PRIOR, STEPS), lambda x: REWARD[x] + 8.0, lam=1.5, batch_size=4, generator=0
    )
    two = moved.grow(200).to_arrays()
    np.testing.assert_array_equal(one["parent"], two["parent"])
    np.testing.assert_array_equal(one["states"], two["states"])
    np.testing.assert_allclose(one["value"] + 8.0, two["value"], rtol=1e-10)


@settings(max_examples=30)
@given(
    st.floats(0.3, 6.0), st.floats(0.1, 0.99), st.integers(1, 40), st.booleans(),
    st.integers(0, 9),
)  # fmt: skip
def test_invariants(C: float, alpha: float, batch: int, search: bool, seed: int) -> None:
    """Children within the widening limit, counts of visits, values within those of children."""
    tree = finite(C=C, alpha=alpha, batch_size=batch, search=search, generator=seed).grow(120)
    found = tree.to_arrays()
    level, kids, parent = found["level"], found["kids"], found["parent"]
    inner = level < tree.depth
    limit = np.ceil(widening_limit(found["visits"], C, alpha))
    assert (kids[inner] <= limit[inner]).all()
    assert (kids[inner] >= 1).all()
    assert found["visits"][0] == 121
    leaves = ~inner
    assert leaves.sum() <= 120
    assert (found["visits"][leaves] == 1).all()
    np.testing.assert_array_equal(np.bincount(parent[1:], minlength=len(parent)), kids)
    for i in np.flatnonzero(inner):
        own = found["value"][tree.nodes.children(np.array([i]))[0]]
        np.testing.assert_array_equal(np.flatnonzero(parent == i), tree.nodes.children(
            np.array([i]))[0])  # fmt: skip
        assert own.min() - 1e-9 <= found["value"][i] <= own.max() + 1e-9
    assert tree.nfe == T * kids[0] + sum(
        (T - depth + 1) * (kids[level == depth] - 1).sum() for depth in range(1, T + 1)
    )
    leaves, p = tree.implied_law()
    assert p.sum() == pytest.approx(1.0)


# ── exact reductions and laws ───────────────────────────────────────────────────────────────────


def test_without_reuse_it_is_best_of_n_and_importance_sampling() -> None:
    """One level and C N^α >= N: equal to independent rollouts from the same stream, weighted."""
    chain = finite_chain(PRIOR, STEPS, branch_at=())
    common: dict[str, Any] = {"C": 1e9, "batch_size": 50, "lam": 1.5, "generator": 3}
    tree = DiffusionTree(chain, lambda x: REWARD[x], **common).grow(50)
    rollouts = weighted_rollouts(chain, lambda x: REWARD[x], 50, lam=1.5, generator=3)
    leaves, p = tree.implied_law()
    np.testing.assert_array_equal(tree.states.at(leaves), rollouts.x)
    np.testing.assert_allclose(p, softmax(rollouts.log_weights), rtol=1e-12)
    assert tree.root_value == pytest.approx(rollouts.log_z / 1.5, rel=1e-12)
    star = DiffusionTree(chain, lambda x: REWARD[x], search=True, **common).grow(50)
    assert star.best() == best_of_n(chain, lambda x: REWARD[x], 50, generator=3)
    assert star.sample(1)[0] == star.best()[0]


def test_samples_follow_the_implied_law() -> None:
    """20,000 draws, every leaf within 5 standard errors: a false alarm in a thousand at most."""
    tree = finite(alpha=0.6).grow(100)
    leaves, p = tree.implied_law()
    found = np.bincount(tree.draw(20_000), minlength=tree.nodes.size)[leaves] / 20_000
    assert (abs(found - p) <= 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-12).all()


def test_it_comes_nearer_with_work_and_near_for_alpha_close_to_one() -> None:
    """On a ring, means of 6 seeds; single runs have a spread of 0.05, 0.1 and 0.01."""
    apart = abs(np.arange(8)[:, None] - np.arange(8))
    ring = softmax(-0.5 * np.minimum(apart, 8 - apart) ** 2, axis=1)
    law, worth = np.full(8, 1 / 8), np.array([0.0, 0, 0, 2, 1, 0, 0, 0])
    exact = exact_values(law, [ring] * 4, worth, 2.0)

    def run(iterations: int, alpha: float) -> tuple[Any, Any]:
        trees = [
            DiffusionTree(finite_chain(law, [ring] * 4), lambda x: worth[x], lam=2.0, alpha=alpha,
                          batch_size=16, generator=seed).grow(iterations)
            for seed in range(6)
        ]  # fmt: skip
        return np.mean([distance(t, exact.target) for t in trees]), trees

    many, few, near = run(2000, 0.8), run(16, 0.95), run(2000, 0.95)
    assert max(many[0], few[0]) < 0.5 * abs(exact.base - exact.target).sum() / 2
    assert near[0] < min(0.03, 0.5 * few[0])
    assert np.mean([t.root_value for t in near[1]]) == pytest.approx(exact.root, abs=0.03)
    # the bias is downwards: all six trees at α = 0.8 lie below, by chance one time in 64
    assert max(t.root_value for t in many[1]) < exact.root


def test_rollouts_alone_make_the_values_of_the_snis_backup() -> None:
    tree = finite(backup="snis", batch_size=8, alpha=0.6).grow(400)
    found = tree.to_arrays()
    for i in np.flatnonzero(found["kids"]):
        own = found["fresh"][found["parent"] == i]
        assert found["value"][i] == pytest.approx(soft_backup(own, 1.5), rel=1e-10)
    first = [found["fresh"][np.flatnonzero(found["parent"] == 0)]]
    assert set(np.round(first[0], 9)) <= set(np.round(REWARD, 9))


def test_duplicate_children_stay_apart() -> None:
    """A coin of 3:1 in one step: with every toss a node, the mean over nodes is the law's."""
    chain = finite_chain([1.0, 0.0], [[[0.75, 0.25], [0.5, 0.5]]], branch_at=(1,))
    tree = DiffusionTree(chain, lambda x: 1.0 * x, C=1e6, generator=0, batch_size=64).grow(4000)
    exact = exact_values([1.0, 0.0], [[[0.75, 0.25], [0.5, 0.5]]], [0.0, 1.0]).root
    assert len(tree.leaves) == 4000
    assert tree.root_value == pytest.approx(exact, abs=0.05)


def test_search_spends_on_the_best_and_greedily_without_the_bonus() -> None:
    greedy = finite(search=True, c_uct=0.0, alpha=0.5).grow(300).to_arrays()
    top = np.flatnonzero(greedy["level"] == 1)
    favoured = top[greedy["visits"][top].argmax()]
    wide = finite(search=True, c_uct=50.0, alpha=0.5).grow(300).to_arrays()
    assert wide["visits"][wide["level"] == 1].max() < 0.5 * greedy["visits"][favoured]


def test_a_guided_proposal_is_corrected_by_its_ratio() -> None:
    """N(0, 1) data, r = 0: with log p/q on the edges the tilted law is the chain's own.

    The mean of 6000 weighted leaves is 0 within 5 standard errors; without the ratio it is far off.
    """
    schedule = LinearBeta()
    eps = lambda x, t: x * float(schedule.sigma(t))  # noqa: E731
    chain = diffusion_chain(
        schedule, eps, (1,), 10, branch_at=(10, 5), guide=lambda x, i: 0.3 + 0 * x
    )
    tree = DiffusionTree(chain, lambda x: 0 * x[:, 0], C=1e6, batch_size=500, generator=0)
    tree.grow(6000)
    leaves, p = tree.implied_law()
    x = tree.states.at(leaves)[:, 0]
    assert x.mean() > 0.2
    assert abs(p @ x) < 5 / np.sqrt(6000 / (1 + np.var(p * len(p))))
    np.testing.assert_allclose(tree.root_value, 0.0, atol=0.1)
    small = DiffusionTree(chain, lambda x: x[:, 0], alpha=0.6, batch_size=4, generator=0).grow(150)
    np.testing.assert_allclose(small.to_arrays()["value"], recomputed(small), atol=1e-9)


# ── budgets, files, failures ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_budget_of_calls_is_used_and_never_exceeded(batch_size: int) -> None:
    for nfe in (T, 50, 101):
        tree = finite(batch_size=batch_size, alpha=0.5).grow(nfe=nfe)
        assert nfe - T < tree.nfe <= nfe
    tree.grow(nfe=30).grow(5)
    assert tree.nfe <= 101 + 30 + 15


class Killed(Exception):
    """Stands for a kill."""


def same_trees(a: DiffusionTree, b: DiffusionTree) -> None:
    one, two = a.to_arrays(), b.to_arrays()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(two[name]))
    assert (a.nfe, a.iterations) == (b.nfe, b.iterations)
    np.testing.assert_array_equal(np.asarray(a.sample(5)), np.asarray(b.sample(5)))


@pytest.mark.parametrize("tensors", [False, True])
def test_a_killed_tree_goes_on_as_if_nothing_had_happened(tmp_path: Path, tensors: bool) -> None:
    file = tmp_path / "tree.npz"
    if tensors:
        pytest.importorskip("torch")
        chain = diffusion_chain(LinearBeta(), lambda x, t: x, (2, 3), 6, branch_at=(6, 3),
                                tensors=True)  # fmt: skip
        reward = lambda x: x[:, 0, 0]  # noqa: E731
    else:
        chain, reward = finite_chain(PRIOR, STEPS), lambda x: REWARD[x]  # type: ignore[assignment]
    options: dict[str, Any] = {"batch_size": 4, "generator": 5, "alpha": 0.7}
    whole = DiffusionTree(chain, reward, **options).grow(200)
    seen = [0]

    def fatal(x: Any) -> Any:
        seen[0] += len(x)
        if seen[0] > 120:
            raise Killed
        return reward(x)

    with pytest.raises(Killed):
        DiffusionTree(chain, fatal, **options).grow(200, checkpoint=file, every=40)
    again = DiffusionTree.load(file, chain, reward)
    assert 40 <= again.iterations < 200
    same_trees(again.grow(200 - again.iterations), whole)
    with pytest.raises(InputError, match="chain: got edges"):
        DiffusionTree.load(file, MarkovChain(chain.prior, chain.step, chain.steps, (1,)), reward)


def test_a_reward_that_fails_is_named_and_leaves_the_tree_whole() -> None:
    answer = [0.0]
    chain = finite_chain(PRIOR, STEPS)
    tree = DiffusionTree(
        chain, lambda x: np.where(np.arange(len(x)) == 1, answer[0], 0.0), batch_size=4, generator=0
    )
    tree.grow(20)
    before = {k: np.copy(v) for k, v in tree.to_arrays().items()}
    for bad in (np.nan, np.inf):
        answer[0] = bad
        said = rf"reward: got {bad} at 1 of \d samples after iteration 20, want numbers or -inf"
        with pytest.raises(InputError, match=said):
            tree.grow(400)
        for name, value in tree.to_arrays().items():
            np.testing.assert_array_equal(value, before[name])
    with pytest.raises(InputError, match=r"reward: got shape \(\), want \(1,\)"):
        DiffusionTree(chain, lambda x: np.float64(1.0)).grow(1)


def test_minus_infinity_is_never_drawn_unless_there_is_nothing_else() -> None:
    chain = finite_chain(PRIOR, STEPS)
    for options in ({}, {"search": True}, {"lam": np.inf}):
        tree = DiffusionTree(
            chain, lambda x: np.where(x == 3, 0.0, -np.inf), generator=0, batch_size=8, **options
        )
        assert (tree.grow(300).sample(40) == 3).all()
        dead = DiffusionTree(chain, lambda x: np.full(len(x), -np.inf), generator=0, **options)
        dead.grow(200)
        assert dead.root_value == -np.inf
        assert dead.sample(30).shape == (30,)
    dead = DiffusionTree(chain, lambda x: np.full(len(x), -np.inf), generator=0).grow(200)
    top = np.flatnonzero(dead.nodes["parent"] == 0)
    drawn = np.bincount(dead.nodes["parent"][dead.nodes["parent"][dead.nodes["parent"][
        dead.draw(20_000)]]], minlength=dead.nodes.size)[top]  # fmt: skip
    even = 20_000 / len(top)
    assert (abs(drawn - even) < 5 * np.sqrt(even)).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lam": 0.0}, "lam: got 0.0"), ({"lam": -1.0}, "lam: got"), ({"lam": np.nan}, "lam: got"),
        ({"C": 0.0}, "C: got 0.0"), ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": 1.2}, "alpha: got 1.2"), ({"c_uct": -1.0}, "c_uct"),
        ({"backup": "hard"}, "backup: got 'hard'"), ({"batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        finite(**options)


def test_what_is_asked_too_early_or_of_too_little() -> None:
    for ask in (lambda t: t.sample(1), lambda t: t.best(), lambda t: t.root_value,
                lambda t: t.implied_law()):  # fmt: skip
        with pytest.raises(InputError, match="tree: got an empty one"):
            ask(finite())
    with pytest.raises(InputError, match="nfe: got 2, want at least the 3 calls of one rollout"):
        finite().grow(nfe=2)
    with pytest.raises(InputError, match="n_iters, nfe: got neither"):
        finite().grow()
    with pytest.raises(InputError, match="n: got 9, want at most the 4 leaves"):
        finite().grow(4).best(9)


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="alpha: 1 adds a child"):
        tree = finite(alpha=1.0)
    assert len(tree.grow(40).leaves) == 40
    still = MarkovChain(lambda n, g: g.standard_normal((n, 2)), lambda x, i, g: 0.9 * x, 4)
    with pytest.warns(UserWarning, match="chain: children are equal"):
        DiffusionTree(still, lambda x: x[:, 0], generator=0, alpha=0.5).grow(60)
    with pytest.warns(UserWarning, match="no new child in"):
        finite(C=1e-3, alpha=0.1, batch_size=4096).grow(nfe=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisy = MarkovChain(
            lambda n, g: g.standard_normal((n, 2)),
            lambda x, i, g: 0.9 * x + g.standard_normal(x.shape), 4,
        )  # fmt: skip
        DiffusionTree(noisy, lambda x: x[:, 0], generator=0, alpha=0.5).grow(60)
        finite(alpha=0.5).grow(60)  # equal children of a finite chain are nothing strange


def test_samples_in_one_call() -> None:
    """N(0, 1) with r = x: the tilted mean is met within 0.2 by 400 samples, the base's is 0."""
    torch = pytest.importorskip("torch")
    schedule = LinearBeta()
    common: dict[str, Any] = {"steps": 10, "budget": 6000, "generator": 1, "alpha": 0.95}

    def eps(x: Any, t: float) -> Any:
        assert not torch.is_grad_enabled()
        return x * float(schedule.sigma(t))

    x = tree_sample(eps, (1,), schedule, lambda x: x[:, 0], 400, offload=True, **common)
    assert x.shape == (400, 1)
    chain = diffusion_chain(schedule, eps, (1,), 10, tensors=True)
    with torch.no_grad():
        found = weighted_rollouts(chain, lambda x: x[:, 0], 20_000, generator=0)
    want = float(softmax(found.log_weights) @ found.x[:, 0].double().numpy())
    assert want > 0.5
    assert float(x.mean()) == pytest.approx(want, abs=0.2)
    best = tree_sample(eps, (1,), schedule, lambda x: x[:, 0], 3, search=True, **common)
    assert float(best.min()) > 2.0
    assert best[0] >= best[1] >= best[2]
    again = tree_sample(eps, (1,), schedule, lambda x: x[:, 0], 3, search=True, **common)
    assert torch.equal(best, again)
