"""The experiment of paper 29: its world is what it says, its steps are what they say, it runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scoredraw.papers import p29_tempo as p29
from scoredraw.papers.p29_tempo import FAVOURITE, RIGHT, SIZE, G, TokenTrees, V
from scoredraw.reports import Report
from scoredraw.rl.generalized_advantage import generalized_advantage

pytestmark = pytest.mark.oracle

SEEDS, PROMPTS, DEPTH = [3, 4], 3, 4


@pytest.fixture
def trees() -> TokenTrees:
    return TokenTrees(SEEDS, PROMPTS, DEPTH)


def sampled(trees: TokenTrees, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    R = len(trees.right)
    u = np.random.default_rng(seed).random((R, G, trees.depth))
    return trees.answers(torch.from_numpy(u))


def disturb(trees: TokenTrees) -> None:
    """Any other policy than that of the start."""
    generator = torch.Generator().manual_seed(0)
    trees.logits = torch.randn(trees.logits.shape, generator=generator, dtype=torch.float64)
    trees.p = trees.logits.softmax(dim=1)


def test_the_start(trees: TokenTrees) -> None:
    """Two positions with one right token of chance .2; elsewhere a favourite of chance .8."""
    keys = trees.right.sum(dim=2) == 1
    assert (keys.sum(dim=1) == 2).all()
    assert trees.right[~keys].all()
    p = trees.p.reshape(-1, trees.nodes, V)
    level = np.repeat(np.arange(DEPTH), V ** np.arange(DEPTH))
    at_key = keys[:, level]
    assert torch.allclose(p.sum(dim=2), torch.tensor(1.0).double())
    assert torch.allclose(p[at_key].min(dim=1).values, torch.tensor(RIGHT).double())
    assert torch.allclose(p[~at_key].max(dim=1).values, torch.tensor(FAVOURITE).double())
    assert trees.success() == pytest.approx(np.full(2, RIGHT**2))


def test_success_is_a_sum_over_all_answers(trees: TokenTrees) -> None:
    disturb(trees)
    p = trees.p.reshape(len(trees.right), trees.nodes, V)
    chance = np.zeros(len(p))
    for r, answer in itertools.product(range(len(p)), itertools.product(range(V), repeat=DEPTH)):
        if all(trees.right[r, t, token] for t, token in enumerate(answer)):
            nodes = list(
                itertools.accumulate(answer, lambda n, token: V * n + 1 + token, initial=0)
            )
            chance[r] += np.prod([float(p[r, n, a]) for n, a in zip(nodes, answer, strict=False)])
    assert trees.success() == pytest.approx(chance.reshape(2, -1).mean(axis=1))


def test_answers_follow_the_table(trees: TokenTrees) -> None:
    """Rows are those of the prefixes, rewards what the tokens earn, tokens as likely as said.

    12 000 first tokens of each prompt by χ² with 2 degrees of freedom, six prompts, .1 % each.
    """
    from scipy.stats import chisquare

    disturb(trees)
    tokens, rows, rewards = sampled(trees)
    for r, i in itertools.product(range(len(tokens)), range(G)):
        node, right = 0, True
        for t, token in enumerate(tokens[r, i].tolist()):
            assert int(rows[r, i, t]) == r * trees.nodes + node
            node, right = V * node + 1 + token, right and bool(trees.right[r, t, token])
        assert float(rewards[r, i]) == right
    u = np.random.default_rng(1).random((len(tokens), 12_000, DEPTH))
    first = trees.answers(torch.from_numpy(u))[0][:, :, 0]
    for r in range(len(tokens)):
        expected = 12_000 * trees.p[r * trees.nodes].numpy()
        assert chisquare(np.bincount(first[r], minlength=V), expected).pvalue > 0.001


def test_the_gradient_is_autograds(trees: TokenTrees) -> None:
    disturb(trees)
    tokens, rows, _ = sampled(trees)
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    logits = trees.logits.clone().requires_grad_()
    logp = logits.log_softmax(dim=1)[rows].gather(3, tokens[..., None])[..., 0]
    (want,) = torch.autograd.grad((A * logp).sum() / G, [logits])
    touched, gradient = trees.gradient(rows, tokens, A)
    assert torch.allclose(gradient, want[touched], atol=1e-12)
    want[touched] = 0
    assert not want.any()


@pytest.mark.parametrize("matched", [True, False])
def test_a_step(trees: TokenTrees, matched: bool) -> None:
    """Of one length for each seed, along its own gradient; or a multiple of the gradient."""
    tokens, rows, _ = sampled(trees)
    touched, gradient = trees.gradient(rows, tokens, torch.ones(tokens.shape).double() * 3)
    before = trees.logits.clone()
    trees.ascend(touched, gradient, SIZE, matched)
    step = (trees.logits - before).reshape(2, -1)
    whole = torch.zeros_like(before)
    whole[touched] = gradient
    whole = whole.reshape(2, -1)
    if matched:
        whole *= PROMPTS**0.5 / whole.norm(dim=1, keepdim=True)
    assert torch.allclose(step, SIZE * whole, atol=1e-12)
    assert torch.allclose(trees.p, trees.logits.softmax(dim=1), atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_the_critic_is_a_table_that_learns(trees: TokenTrees, lam: float) -> None:
    """Generalised advantages of V as it was; then V moves to the mean return of each prefix."""
    rate, value = 0.3, torch.zeros(len(trees.p), dtype=torch.float64)
    credit = p29.with_critic(rate, lam)(trees)
    for turn in range(3):
        tokens, rows, rewards = sampled(trees, turn)
        rewards = rewards + torch.arange(G) % 2  # there are hardly any at the start
        V_now = value[rows].flatten(0, 1)
        want = generalized_advantage(rewards.flatten(), V_now, torch.ones_like(V_now), lam=lam)
        found = credit(tokens, rows, rewards)
        assert torch.allclose(found.flatten(0, 1), want.advantages, atol=1e-12)
        returns = rewards[:, :, None].expand(rows.shape)
        for row in rows.unique().tolist():
            value[row] += rate * (returns[rows == row].mean() - value[row])


def test_updates_to_the_goal() -> None:
    """The first update whose mean of five reaches .9; as many as there are where none does."""
    late = np.r_[np.zeros(10), np.full(10, 0.95)]
    never = np.full(20, 0.89)
    found = p29.updates_to_goal(np.stack([late, never, np.ones(20)], axis=1))
    assert found.tolist() == [15, 20, 5]


def test_seeds_train_alone_and_alike() -> None:
    """A seed beside another does what it does by itself; steps of one length, also at RLOO."""
    plan = p29.PLANS["smoke"]
    how: dict[str, Any] = {"plan": plan, "size": SIZE, "updates": 4}
    for arm in (p29.on_tree(), p29.rloo, p29.with_critic(0.3, 0.95)):
        both = p29.trained(arm, [0, 1], **how)
        assert both.shape == (4, 2)
        np.testing.assert_allclose(both[:, 1:], p29.trained(arm, [1], **how), atol=1e-9)
        assert both[0] == pytest.approx(RIGHT**2)  # before any update
        assert (both[-1] > both[0]).all()


@pytest.mark.contract
def test_smoke() -> None:
    found = p29.run("smoke", 0)
    assert len(found.claims) == 12
    assert len(found.figures) == 2
    laws = [claim for claim in found.claims if claim.name.startswith("gradient of")]
    assert [claim.verdict for claim in laws] == ["holds"] * 3
    trees = next(t for t in found.tables if t.title == "Answers to MATH problems as trees")
    rows: dict[Any, Any] = {row[0]: row[1] for row in trees.rows}
    shared = rows["words that end a prefix shared with another answer"]
    assert (round(shared, 3), round(rows["branch words an answer"], 2)) == (0.347, 3.07)
    assert Report.from_json(found.to_json()).claims == found.claims
