"""Advantages, GAE and the clipped loss against what the authors' functions gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scoredraw.rl.generalized_advantage import generalized_advantage
from scoredraw.rl.group_advantages import GROUP_METHODS, group_advantages
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.reward_groups import to_tokens

pytestmark = pytest.mark.golden

FILE = "27-advantage-estimators.json"
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {"estimator": "grpo"},
    "rloo": {"estimator": "rloo"},
    "ngrpo_add1": {"estimator": "ngrpo"},
    "ngrpo_add2": {"estimator": "ngrpo", "num_virtual": 2},
    "psr_nsr_positive": {"estimator": "psr"},
    "psr_nsr_negative": {"estimator": "nsr"},
    "psr_nsr_weighted": {"estimator": "w_reinforce"},
}
CLIPS = {"loss_sym0.2": "grpo", "loss_dapo": "dapo", "loss_ngrpo": "ngrpo"}


def outputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each golden output's name and ours."""
    scores, mask, values = (torch.tensor(inputs[k]) for k in ("scores", "mask", "values"))
    old, new = torch.tensor(inputs["old_logp"]), torch.tensor(inputs["new_logp"])
    how = {k: inputs[k] for k in ("max_reward", "eps", "positive_weight")}

    def advantages(**options: Any) -> Tensor:
        return group_advantages(scores, None, inputs["group_size"], **options, **how)

    found: dict[str, Any] = {
        name: to_tokens(advantages(**options), mask) for name, options in ESTIMATORS.items()
    }
    gae = generalized_advantage(scores, values, mask, **inputs["gae"])
    found["gae_raw"], found["gae_returns"] = gae
    found["gae_whitened"] = generalized_advantage(
        scores, values, mask, **inputs["gae"], whitened=True
    ).advantages
    for name, method in CLIPS.items():
        bounds = GROUP_METHODS[method].eps_low, GROUP_METHODS[method].eps_high
        assert list(bounds) == inputs["clip"][name]
        found[name] = list(clipped_policy_loss(new, old, advantages(), mask, *bounds))
    return found


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    ours = outputs(data["inputs"])
    assert set(data["outputs"]) == set(ours)
    for name, want in data["outputs"].items():
        np.testing.assert_allclose(
            np.asarray(ours[name], float), np.asarray(want, float), rtol=0,
            atol=data["tolerance"]["atol"], err_msg=name,
        )  # fmt: skip


def test_values_on_padding_do_not_matter(golden: Callable[[str], dict[str, Any]]) -> None:
    """As they do in the released function, which takes the first of them for V after the end."""
    inputs = golden(FILE)["inputs"]
    scores, mask, values = (torch.tensor(inputs[k]) for k in ("scores", "mask", "values"))
    assert values[mask == 0].abs().min() > 0
    clean = generalized_advantage(scores, values * mask, mask, **inputs["gae"])
    wild = torch.where(mask > 0, values, torch.nan)
    for given in (values, wild):
        found = generalized_advantage(scores, given, mask, **inputs["gae"])
        assert torch.equal(found.advantages, clean.advantages)
        assert torch.equal(found.returns, clean.returns)
