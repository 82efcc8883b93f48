"""Replies to a lettered question, and greedy with full windows, against the golden file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.judges import parse_choice
from scoredraw.set_selection import UtilityChooser, add_one_in

pytestmark = pytest.mark.golden

FILE = "07-add-one-in.json"


def test_every_reply_is_read_as_the_rule_says(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    replies, want = data["inputs"]["replies"], data["outputs"]["parsed_index"]
    assert len(replies) == len(want) == 15
    got = [parse_choice(reply["text"], reply["b"]) for reply in replies]
    assert got == want


def test_full_windows_are_classic_greedy(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    given, want = data["inputs"], data["outputs"]
    x = np.array(given["X"])
    assert given["kernel"] == "exp(-||xi-xj||^2/2)"
    likeness = np.exp(-((x[:, None] - x) ** 2).sum(axis=-1) / 2)

    def gain(chosen: Any, candidates: Any) -> Any:
        """F(S + j) - F(S) with F(S) = sum_i max_{j in S} K_ij."""
        covered = likeness[:, chosen].max(axis=1, keepdims=True)
        return (np.maximum(covered, likeness[:, candidates]) - covered).sum(axis=0)

    for rng in range(3):  # nothing is left to chance
        log = add_one_in(
            len(x), given["K"], UtilityChooser(gain),
            context_window=None, candidate_window=None, seed_set=given["seed_set"], rng=rng,
        )  # fmt: skip
        assert log.indices.tolist() == want["greedy_order"]
        picks, gains = zip(*want["picked_with_gain"], strict=True)
        assert [step.pick for step in log.steps] == list(picks)
        np.testing.assert_allclose(
            [step.value for step in log.steps], gains, rtol=0, atol=data["tolerance"]["gain_abs"]
        )
