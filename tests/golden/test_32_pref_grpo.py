"""Win rates, normalised and joint advantages against the released code's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.rl.pairwise_rewards import (
    combine_advantages,
    normalised_advantages,
    pairwise_win_rate,
)

pytestmark = pytest.mark.golden

FILE = "32-pref-grpo.json"


def outputs(given: dict[str, Any]) -> dict[str, Any]:
    n, pairs = given["num_items"], given["pairs"]
    heard = [v or None for v in given["verdicts"]]  # their 0 is no verdict, half a win for both
    win_rate = pairwise_win_rate(heard, pairs, n, missing="tie", decimals=3)
    both = {"win": win_rate, "clip": torch.tensor(given["clip_scores"], dtype=torch.float64)}
    weights = dict(zip(both, given["weights"], strict=True))
    return {
        "win_rate": win_rate,
        "adv_win": normalised_advantages(win_rate, num_generations=n),
        "adv_pointwise": normalised_advantages(given["pointwise_scores"], num_generations=n),
        "adv_joint_0p4_0p6": combine_advantages(both, weights, num_generations=n),
        "adv_joint_gdpo": combine_advantages(both, weights, num_generations=n, whiten=True),
    }


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    ours = outputs(data["inputs"])
    assert data["outputs"], "a golden file without outputs"
    assert set(data["outputs"]) == set(ours)
    for name, want in data["outputs"].items():
        got = np.asarray(ours[name], np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=data["tolerance"]["atol"], err_msg=name)


def test_a_missing_verdict_is_no_tie_unless_asked(golden: Callable[[str], dict[str, Any]]) -> None:
    """Left out by default; a 0 of ours is a tie. The released code cannot tell the two apart."""
    given = golden(FILE)["inputs"]
    n, pairs, codes = given["num_items"], given["pairs"], given["verdicts"]
    dropped = pairwise_win_rate([v or None for v in codes], pairs, n)
    kept = [(v, p) for v, p in zip(codes, pairs, strict=True) if v]
    assert torch.equal(dropped, pairwise_win_rate(*zip(*kept, strict=True), n))
    ties = pairwise_win_rate(codes, pairs, n)
    assert torch.equal(ties, pairwise_win_rate([v or None for v in codes], pairs, n, missing="tie"))
    assert not torch.equal(ties, dropped)
