"""TEMPO against an independent brute force over one group, with duplicates and an early end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.rl.prefix_tree import prefix_tree, prefix_tree_values
from scoredraw.rl.tempo import group_standing, tempo_advantages, token_changes

pytestmark = pytest.mark.golden

FILE = "29-tempo.json"


def outputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each golden output's name and ours; a row an answer, padded where they are tokens."""
    rows, G = inputs["responses"], len(inputs["responses"])
    rewards = torch.tensor(inputs["rewards"], dtype=torch.float64)
    how = {"ddof": inputs["ddof"], "eps": inputs["eps"]}
    standing = group_standing(rewards, num_generations=G, **how)
    found = prefix_tree_values(rows, None, rewards, num_generations=G)
    return {
        "normalized_reward": standing,
        "advantages": tempo_advantages(rows, None, rewards, num_generations=G, **how),
        "td": token_changes(prefix_tree(rows, num_generations=G), standing),
        "branch_token": found.is_branch,
        "prefix_value_raw": found.value,
    }


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    ours = outputs(data["inputs"])
    assert set(data["outputs"]) == set(ours)
    for name, want in data["outputs"].items():
        got = ours[name]
        assert len(got) == len(want), name
        for row, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            n = np.size(theirs)
            np.testing.assert_allclose(
                np.atleast_1d(mine)[:n].astype(float), np.asarray(theirs, float),
                rtol=0, atol=data["tolerance"]["atol"], err_msg=f"{name}, answer {row}",
            )  # fmt: skip
            assert not np.atleast_1d(mine)[n:].any(), f"{name}, answer {row}: not 0 on padding"
