"""The tabular swarm: its update, its choice of groups, and what a run counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scoredraw.papers import p30_sapo as swarm  # noqa: E402
from scoredraw.papers.p30_sapo import ANSWERS, PLANS, SKILLS, STEP, Run  # noqa: E402
from scoredraw.rl.swarm_buffer import GroupScores, select_groups  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL = replace(PLANS["smoke"], rounds=6)


def test_what_nodes_know() -> None:
    p = np.exp(swarm.knowledge([(0, 2), ()]))
    np.testing.assert_allclose(p.sum(axis=2), 1.0)
    assert p[0, :3, swarm.RIGHT].round(6).tolist() == [0.9, round(0.1 / 29, 6), 0.9]
    assert p[1, :, swarm.BELIEVED].round(6).tolist() == [0.9] * SKILLS


def test_the_update_is_the_policy_gradient() -> None:
    """lr Σ_groups (1/G) Σ A log π by autograd, also where two groups are about one skill."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, SKILLS, ANSWERS))
    skill = rng.integers(0, SKILLS, (2, 3, 4))
    skill[:, :, 3] = skill[:, :, 0]
    answer = rng.integers(0, ANSWERS, (2, 3, 4, swarm.G))
    A = rng.standard_normal((2, 3, 4, swarm.G))
    A -= A.mean(axis=3, keepdims=True)
    lr = np.array([0.4, 2.0])
    x = torch.from_numpy(logits.copy()).requires_grad_()
    logp = x.log_softmax(-1)
    b, n = np.ix_(range(2), range(3))
    asked = logp[b[..., None], n[..., None], skill]
    chosen = asked.gather(3, torch.from_numpy(answer))
    weight = torch.from_numpy(lr[:, None, None, None] * A / swarm.G)
    (weight * chosen).sum().backward()
    assert x.grad is not None
    moved = logits.copy()
    swarm.learn(moved, skill, answer, A, lr)
    np.testing.assert_allclose(moved - logits, x.grad, atol=1e-12)


def test_the_largest_advantages_are_the_librarys() -> None:
    """The same mean |A| of what is taken, ties apart, and never a node's own."""
    rng = np.random.default_rng(1)
    local = 3
    for _ in range(30):
        r = (rng.random((1, 4, local, 8)) < rng.choice([0.0, 0.3, 1.0], (1, 4, local, 1))) * 1.0
        std = r.std(axis=3, ddof=1, keepdims=True)
        A = (r - r.mean(axis=3, keepdims=True)) / (std + 1e-8)
        skill = rng.random((1, 4, SKILLS)).argsort(axis=2)[..., :local]
        found, live = swarm.choose(r, A, skill, 4, swarm.MAGNITUDE, rng)
        for node in range(4):
            others = np.flatnonzero(np.arange(4 * local) // local != node)
            scores = GroupScores.of(list(r.reshape(-1, 8)[others]))
            want = scores.magnitude[select_groups(scores, 4, swarm.MAGNITUDE, rng)]
            got = found[0, node][live[0, node]]
            assert np.isin(got, others).all()
            mine = np.abs(A).mean(axis=3).reshape(-1)[got]
            np.testing.assert_allclose(np.sort(mine), np.sort(want), atol=1e-7)


def test_what_a_run_counts() -> None:
    silo = swarm.swarm(SMALL, (8, 0), swarm.FILTERED, [0.2, STEP], [0])
    mixed = swarm.swarm(SMALL, (4, 4), swarm.UNIFORM, [STEP], [0])
    assert silo.reward.shape == (6, 2, SMALL.seeds, swarm.NODES)
    assert not silo.used.any()
    np.testing.assert_allclose(mixed.used, 4)  # without the filter there are 28 to draw from
    start = (0.9 + (SKILLS - 1) * 0.1 / 29) / SKILLS
    np.testing.assert_allclose(silo.accuracy[0], start)
    assert (silo.signal[1] <= swarm.NODES * 8).all()
    again = swarm.swarm(SMALL, (8, 0), swarm.FILTERED, [0.2, STEP], [0])
    assert np.array_equal(silo.reward, again.reward)


def test_answers_are_right_as_often_as_the_table_says() -> None:
    """Step 0 leaves the tables: the mean reward is the exact accuracy, within 4.5 s.e."""
    plan = replace(SMALL, seeds=20, rounds=20)
    still = swarm.swarm(plan, (8, 0), swarm.FILTERED, [0.0], [3])
    exact = still.accuracy.mean()
    n = still.reward.size * 8 * swarm.G
    assert abs(still.reward.mean() - exact) < 4.5 * np.sqrt(exact * (1 - exact) / n)
    assert np.ptp(still.accuracy) < 1e-12


def test_wobble_is_the_deviation_about_a_trend() -> None:
    rng = np.random.default_rng(0)
    trend = np.linspace(0, 1, 4000)[:, None]
    noise = 0.1 * rng.standard_normal((4000, 3))
    reward = np.repeat((trend + noise)[:, None, :, None], 8, axis=3)
    run = Run(reward, reward, np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)))
    np.testing.assert_allclose(swarm.wobble(run, 0), 0.1, rtol=0.05)
