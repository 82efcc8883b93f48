"""Step rewards and advantages of a tree of five trajectories, for each aggregator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.rl.rollout_tree import (
    VARIANTS,
    RolloutTree,
    first_visits,
    fork_advantages,
    portool_advantages,
    step_rewards,
    trajectory_advantages,
)

pytestmark = pytest.mark.golden

FILE = "60-portool.json"


@pytest.mark.parametrize("aggregate", ["mean", "max", "min"])
def test_tree(golden: Callable[[str], dict[str, Any]], aggregate: str) -> None:
    data = golden(FILE)
    given, want = data["inputs"], data["outputs"][aggregate]
    assert set(data["outputs"]) == {"mean", "max", "min"}
    atol = data["tolerance"]["atol"]
    paths = given["paths"]
    tree = RolloutTree.from_paths(paths, given["outcome_reward"], given["format_reward"])
    how = {"gamma": given["gamma"], "aggregate": aggregate}
    weights = {key: given[key] for key in ("w_traj", "w_fork", "eps")}
    assert given["ddof"] == 1

    rewards = step_rewards(tree, **how)
    advantages = portool_advantages(tree, **weights, **how)
    once = portool_advantages(tree, dedup=True, **weights, **how)
    first = first_visits(tree)
    found = {
        "step_reward": dict(zip(tree.tokens, rewards, strict=True)),
        "fork_advantage": dict(
            zip(tree.tokens, fork_advantages(tree, rewards, given["eps"]), strict=True)
        ),
        "trajectory_advantage": trajectory_advantages(tree, given["eps"]),
        "advantage": [row[: len(path)] for row, path in zip(advantages, paths, strict=True)],
        "advantage_dedup": {
            tree.tokens[s]: a for s, a in zip(tree.paths[first], once[first], strict=True)
        },
    }
    assert set(found) == set(want)
    for name, value in want.items():
        got = found[name]
        if isinstance(value, dict):
            assert set(got) == set(value)
            for step, number in value.items():
                np.testing.assert_allclose(got[step], number, atol=atol, rtol=0, err_msg=name)
        else:
            for row, numbers in zip(got, value, strict=True):
                np.testing.assert_allclose(row, numbers, atol=atol, rtol=0, err_msg=name)
    assert not advantages[tree.paths < 0].any()
    assert not once[~first].any()


def test_tempo_variant_is_tempo(golden: Callable[[str], dict[str, Any]]) -> None:
    """Tokens as steps, with an end after the last: the numbers of TEMPO's own file."""
    data = golden("29-tempo.json")
    given, want, atol = data["inputs"], data["outputs"], data["tolerance"]["atol"]
    answers = [[*response, "end"] for response in given["responses"]]
    prefixes = [[tuple(a[: t + 1]) for t in range(len(a))] for a in answers]
    tree = RolloutTree.from_paths(prefixes, given["rewards"])
    A = portool_advantages(tree, eps=given["eps"], **VARIANTS["tempo"])
    td = portool_advantages(tree, w_traj=0, eps=given["eps"], **VARIANTS["tempo"])
    V = step_rewards(tree, 1.0, use_format=False)
    for i, response in enumerate(given["responses"]):
        n = len(response)
        np.testing.assert_allclose(A[i, :n], want["advantages"][i], atol=atol, rtol=0)
        np.testing.assert_allclose(td[i, :n], want["td"][i], atol=atol, rtol=0)
        values = V[tree.paths[i, :n]]
        np.testing.assert_allclose(values, want["prefix_value_raw"][i][1:], atol=atol, rtol=0)
