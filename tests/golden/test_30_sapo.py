"""Swarm bookkeeping of the released code: rewards, advantages, both selections, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.rl.rollout_groups import RolloutGroup  # noqa: E402
from scoredraw.rl.swarm_buffer import SwarmBuffer, swarm_advantages  # noqa: E402
from scoredraw.rl.swarm_training import swarm_policy_loss  # noqa: E402
from scoredraw.rl.swarm_transports import InMemory, MemoryHub  # noqa: E402

pytestmark = pytest.mark.golden


def equal(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def loss_of(given: dict[str, Any]) -> float:
    new, old, adv, mask = (torch.tensor(given[k]) for k in ("new", "old", "adv", "mask"))
    bounds = {"eps_low": given["eps_low"], "eps_high": given["eps_high"]}
    return float(swarm_policy_loss(new, old, adv, mask, clamp=given["loss_clamp"], **bounds).loss)


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    """Through the wire: each peer publishes, and a node that knows nobody collects."""
    data = golden("30-sapo.json")
    swarm, n = data["inputs"]["swarm"], data["inputs"]["num_transplants"]
    hub = MemoryHub()
    node = SwarmBuffer(InMemory(hub), "node")
    for peer, questions in swarm.items():
        SwarmBuffer(InMemory(hub), peer).publish(
            [RolloutGroup(q, g["completions"], g["answer"]) for q, g in questions.items()]
        )

    def drawn(n: int, selection: str) -> dict[tuple[str, str], np.ndarray]:
        found = node.sample(n, selection, equal, rng=0, reuse=True)
        return {(g.peer, g.prompt): r for g, r in zip(found.groups, found.rewards, strict=True)}

    every = drawn(100, "uniform")
    keys = [tuple(key) for key in data["outputs"]["keys"]]
    assert set(every) == set(keys)
    rewards = np.stack([every[key] for key in keys])
    ids = np.repeat(np.arange(len(keys)), rewards.shape[1])
    ours = {
        "keys": keys,
        "rewards": rewards,
        "group_advantages": swarm_advantages(rewards.ravel(), ids).reshape(rewards.shape).numpy(),
        "eligible_nonzero_advantage": sorted(drawn(100, "nonzero_uniform"), key=keys.index),
        "released_demo_top_k_selection": sorted(drawn(n, "top_reward")),
        "loss": loss_of(data["inputs"]["loss"]),
    }
    assert set(data["outputs"]) == set(ours), "an output this test does not know"
    for name, want in data["outputs"].items():
        if name in {"rewards", "group_advantages", "loss"}:
            np.testing.assert_allclose(ours[name], want, rtol=0, atol=data["tolerance"]["atol"])
        else:
            assert ours[name] == [tuple(key) for key in want], name


def test_the_upper_bound_is_above_one(golden: Callable[[str], dict[str, Any]]) -> None:
    """Without eps_high the released code clips good answers at 0.2: then nothing would be learned.

    A ratio of 1.1 lies between the bounds, and its gradient is A rho / tokens.
    """
    logp = torch.tensor([[0.1]], requires_grad=True)
    swarm_policy_loss(
        logp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), eps_high=0.2
    ).loss.backward()
    assert logp.grad is not None
    assert float(logp.grad) == pytest.approx(-np.exp(0.1))
