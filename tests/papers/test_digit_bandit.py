"""The digits bandit and the experiment of paper 27: its parts are what they say, and it runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scoredraw.papers import p27_ngrpo as p27
from scoredraw.papers.digit_bandit import (
    GROUP,
    Learner,
    Task,
    digit_task,
    measure,
    reinforce,
    taught,
)
from scoredraw.papers.training import MLPEnsemble
from scoredraw.reports import Report
from scoredraw.rl.group_advantages import group_advantages

pytestmark = pytest.mark.oracle

Pair = tuple[MLPEnsemble, Task]


def test_the_split() -> None:
    task = digit_task([0, 1])
    assert task.train_x.shape == (2, 1297, 64)
    assert task.test_x.shape == (2, 500, 64)
    assert float(task.train_x.max()) == 1.0
    whole = torch.cat([task.train_x, task.test_x], dim=1).sum(dim=2).sort(dim=1).values
    assert torch.equal(whole[0], whole[1])  # every digit once, in either half
    assert not torch.equal(task.train_y[0], task.train_y[1])
    again = digit_task([1])
    assert torch.equal(again.train_x[0], task.train_x[1])


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Two networks that learned wrong labels, and their digits."""
    task = digit_task([0, 1])
    return taught(task), task


def test_what_was_taught(pair: Pair) -> None:
    """Right on 0 to 4, hardly ever on 5 to 9."""
    net, task = pair
    logits = torch.from_numpy(net.logits(task.test_x.numpy()))
    p = logits.softmax(-1).gather(2, task.test_y[..., None])[..., 0]
    assert 0.45 < float(p.mean()) < 0.5
    assert float(p[task.test_y >= 5].mean()) < 0.006
    passed, entropy = measure(net, task, [1, 8])
    by_hand = [float((1 - (1 - p[0].double()) ** k).mean()) for k in (1, 8)]
    assert passed[0] == pytest.approx(by_hand, rel=1e-5)
    law = logits[0].double().softmax(-1)
    assert entropy[0] == pytest.approx(float(-(law * law.log()).sum(-1).mean()), rel=1e-5)


def test_members_train_alone_and_alike(pair: Pair) -> None:
    """A seed beside another ends where it does by itself; nothing of the start is changed."""
    net, task = pair
    before = [w.detach().clone() for w in net.weights]
    arm = Learner("ngrpo")
    both = measure(reinforce(net, task, arm, 4e-3, 5, 0), task)[0]
    alone = digit_task([1])
    own = MLPEnsemble([w[1:] for w in net.weights], [b[1:] for b in net.biases])
    one = measure(reinforce(own, alone, arm, 4e-3, 5, 0), alone)[0]
    np.testing.assert_allclose(both[1], one[0], atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, net.weights, strict=True))
    other = measure(reinforce(net, task, arm, 4e-3, 5, 1), task)[0]
    assert np.abs(other - both).max() > 1e-3  # another stream, other images


def test_the_loss_by_hand() -> None:
    """NGRPO: the mean over answers in groups that are not all right, each clipped by its sign."""
    right = torch.zeros(2, 3, GROUP, dtype=torch.bool)
    right[:, 0] = True
    right[1, 1, :3] = True
    random = torch.Generator().manual_seed(0)
    logp = torch.randn(2, 3 * GROUP, generator=random) / 3
    arm = Learner("ngrpo")
    A, keep = arm.credit(right, torch.zeros(2, 3, dtype=torch.bool))
    got = float(arm.loss(logp, torch.zeros_like(logp), A.flatten(1), keep.flatten(1)))
    want = 0.0
    for s in range(2):
        rows = range(GROUP, 3 * GROUP)
        a = group_advantages(right[s].float().flatten(), None, GROUP).tolist()
        ratio = [math.exp(x) for x in logp[s].tolist()]
        each = [-(min(ratio[i], 1.24) if a[i] > 0 else max(ratio[i], 0.84)) * a[i] for i in rows]
        want += sum(each) / len(each)
    assert got == pytest.approx(want, rel=1e-5)
    assert Learner("ngrpo", (0.2, 0.2)).loss(
        logp, torch.zeros_like(logp), A.flatten(1), keep.flatten(1)
    ) != pytest.approx(want, rel=1e-5)


def test_refilling_trains_on_more(pair: Pair) -> None:
    """Half of the groups are all wrong and most others all right: one batch has few mixed ones."""
    net, task = pair
    few = measure(reinforce(net, task, Learner("dapo"), 2e-3, 8, 0), task)[0][:, 0]
    many = measure(reinforce(net, task, Learner("dapo", batches=10), 2e-3, 8, 0), task)[0][:, 0]
    assert (np.abs(many - few) > 1e-3).all()


def test_the_control_learns() -> None:
    """From .1/19; what compares answers gets there, and NSR, which only pushes away, doesn't."""
    plan = p27.PLANS["smoke"]
    start = p27.control("grpo", replace(plan, control_steps=0), 0)
    assert start == pytest.approx(np.full((2, 2), 0.1 / 19))
    more = replace(plan, control_steps=60)
    nsr = p27.control("nsr", more, 0)[1].max()
    for estimator in ("grpo", "ngrpo"):
        assert p27.control(estimator, more, 0)[1].min() > max(0.8, nsr + 0.1)


@pytest.mark.contract
def test_smoke() -> None:
    found = p27.run("smoke", 0)
    assert len(found.claims) == 17
    assert [len(table.rows) for table in found.tables] == [9, 3, 10, 10, 8, 6]
    assert len(found.figures) == 4
    assert Report.from_json(found.to_json()).claims == found.claims


def test_groups_of_real_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group all right, one all wrong, two mixed."""
    report = Report(paper=27, scale="smoke", seed=0)
    groups = [{"correct": row} for row in ([1, 1], [0, 0], [1, 0], [0, 1])]
    monkeypatch.setattr(p27, "math_groups", lambda: groups)
    p27.add_real_groups(report)
    rows = {row[0]: row[1:] for row in report.tables[0].rows}
    assert rows["grpo"] == [0.5, 1.0]
    assert rows["dapo"] == [0.5, 0.5]
    assert rows["ngrpo"] == [0.25, 0.75]
    assert rows["psr"] == [0.25, 0.5]
    assert [claim.verdict for claim in report.claims] == ["holds"]
