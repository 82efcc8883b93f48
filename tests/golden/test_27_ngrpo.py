"""Paper 27: estimators, GAE and clipped losses, as the authors' code computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scoredraw.rl.generalized_advantage import generalized_advantages
from scoredraw.rl.group_advantages import group_advantages
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.reward_groups import to_tokens

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Any]) -> Any:
    return golden("27-advantage-estimators.json")


def close(got: torch.Tensor, want: Any, case: Any) -> None:
    atol = case["tolerance"]["atol"]
    torch.testing.assert_close(got.double(), torch.tensor(want).double(), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"estimator": "grpo"}),
        ("rloo", {"estimator": "rloo"}),
        ("ngrpo_add1", {}),
        ("ngrpo_add2", {"num_virtual": 2}),
        ("psr_nsr_positive", {"estimator": "psr"}),
        ("psr_nsr_negative", {"estimator": "nsr"}),
        ("psr_nsr_weighted", {"estimator": "w_reinforce"}),
    ],
)
def test_advantages(case: Any, name: str, options: dict[str, Any]) -> None:
    given = case["inputs"]
    weight = given["positive_weight"]
    A = group_advantages(
        given["scores"], num_generations=given["group_size"], max_reward=given["max_reward"],
        positive_weight=weight, eps=given["eps"], **options,
    )  # fmt: skip
    close(to_tokens(A, torch.tensor(given["mask"])), case["outputs"][name], case)


def test_gae(case: Any) -> None:
    given, want = case["inputs"], case["outputs"]
    values, mask = torch.tensor(given["values"]), torch.tensor(given["mask"])
    r = torch.tensor(given["scores"])
    options = {"gamma": given["gae"]["gamma"], "lam": given["gae"]["lam"]}
    found = generalized_advantages(r, values, mask, **options)
    close(found.advantages, want["gae_raw"], case)
    close(found.returns, want["gae_returns"], case)
    white = generalized_advantages(r, values, mask, whitened=True, **options)
    close(white.advantages, want["gae_whitened"], case)


@pytest.mark.parametrize("name", ["loss_sym0.2", "loss_dapo", "loss_ngrpo"])
def test_losses(case: Any, name: str) -> None:
    given = case["inputs"]
    A = torch.tensor(case["outputs"]["ngrpo_add1"])
    low, high = given["clip"][name]
    new, old, mask = (torch.tensor(given[key]) for key in ("new_logp", "old_logp", "mask"))
    found = clipped_policy_loss(new, old, A, mask, low, high)
    close(torch.stack(found), case["outputs"][name], case)


def test_every_output_is_checked(case: Any) -> None:
    checked = {
        "grpo", "rloo", "ngrpo_add1", "ngrpo_add2", "psr_nsr_positive", "psr_nsr_negative",
        "psr_nsr_weighted", "gae_raw", "gae_returns", "gae_whitened", "loss_sym0.2", "loss_dapo",
        "loss_ngrpo",
    }  # fmt: skip
    assert set(case["outputs"]) == checked
