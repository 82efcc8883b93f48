"""The clipped loss: by sign, at the bounds, and aggregated as TRL does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.policy_loss import clipped_policy_loss, clipped_token_loss

pytestmark = pytest.mark.oracle


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, 5, 7, generator=random, dtype=torch.float64)
    A = torch.randn(5, 7, generator=random, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6])[:, None]
    return new, old, A, mask


@pytest.mark.property
@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 3))
def test_two_bounds_are_one_for_each_sign(seed: int, low: float, high: float) -> None:
    """min(rA, clip(r) A) is A min(r, 1 + high) for A > 0, and A max(r, 1 - low) for A < 0."""
    new, old, A, _ = batch(seed)
    r = (new - old).exp()
    want = -torch.where(A > 0, A * r.clamp(max=1 + high), A * r.clamp(min=1 - low))
    got, clipped = clipped_token_loss(new, old, A, low, high)
    torch.testing.assert_close(got, want)
    assert torch.equal(clipped, (got != -r * A) & (got > -r * A))


def test_no_gradient_beyond_the_bound() -> None:
    new = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
    A = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, share = clipped_policy_loss(new, torch.zeros(1, 4), A, torch.ones(1, 4))
    loss.backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [[False, True, True, False]]
    assert share == 0.5


def test_on_policy_gradient_is_reinforce() -> None:
    new, _, A, mask = batch()
    new.requires_grad_(True)
    clipped_policy_loss(new, new.detach(), A, mask).loss.backward()
    torch.testing.assert_close(new.grad, -A * mask / mask.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [True, False])
def test_the_gradient_is_autograds_to_the_bit(dtype: torch.dtype, rows: bool) -> None:
    """Of the formula, also at its kinks: a ratio on a bound, an advantage of 0."""
    new, old, A, _ = batch()
    new, old = new.to(dtype), old.to(dtype)
    A = (A[:, 0] if rows else A).to(dtype)
    A[0] = 0.0
    old[1, 0], new[1, 0] = 0.0, 0.0  # on both bounds
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    low, high = (0.0, 0.0) if rows else (0.2, 0.28)

    def slope(loss: Any) -> torch.Tensor:
        logp = new.clone().requires_grad_(True)
        (loss(logp) * weights).sum().backward()
        assert logp.grad is not None
        assert logp.grad.dtype == dtype
        return logp.grad

    def formula(logp: torch.Tensor) -> torch.Tensor:
        r, a = (logp - old).exp(), A[:, None] if rows else A
        return -(r * a).min(r.clamp(1 - low, 1 + high) * a)

    got = slope(lambda logp: clipped_token_loss(logp, old, A, low, high)[0])
    assert torch.equal(got, slope(formula))
    A = A.float()  # as rewards are beside log-probabilities in bfloat16
    got = slope(lambda logp: clipped_token_loss(logp, old, A, low, high)[0])
    torch.testing.assert_close(got, slope(formula))


def test_aggregations() -> None:
    new, old, A, mask = batch()
    per, _ = clipped_token_loss(new, old, A)
    rows = [per[i, mask[i]] for i in range(5)]
    tokens = torch.cat(rows)
    want = {
        "token_mean": tokens.mean(),
        "seq_mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq_sum": torch.stack([row.sum() for row in rows]).mean(),
        "dr_grpo": tokens.sum() / (5 * 40),
        "dapo": tokens.sum() / 40,
    }
    for how, value in want.items():
        got = clipped_policy_loss(new, old, A, mask, aggregation=how, normalizer=40).loss
        torch.testing.assert_close(got, value)


def test_what_lies_under_the_mask_does_not_matter() -> None:
    new, old, A, mask = batch()
    noise = torch.where(mask, 0.0, 5.0)
    for how in ("token_mean", "seq_mean", "seq_sum"):
        plain = clipped_policy_loss(new, old, A, mask, aggregation=how)
        noisy = clipped_policy_loss(new + noise, old, A - noise, mask, aggregation=how)
        torch.testing.assert_close(noisy.loss, plain.loss)
        torch.testing.assert_close(noisy.clip_fraction, plain.clip_fraction)


def test_a_row_has_the_advantage_of_its_tokens() -> None:
    new, old, _, mask = batch()
    A = torch.arange(5.0, dtype=torch.float64) - 2
    one = clipped_policy_loss(new, old, A, mask).loss
    torch.testing.assert_close(
        one, clipped_policy_loss(new, old, A[:, None].expand(5, 7), mask).loss
    )


@pytest.mark.contract
def test_refusals() -> None:
    new, old, A, mask = batch()
    for message, change in {
        r"mask: got \(5, 6\)": {"mask": mask[:, :6]},
        "mask: got no token": {"mask": mask & False},
        r"advantages: got \(4,\)": {"advantages": A[:4, 0]},
        "logp and old_logp": {"old_logp": old[:4]},
        "eps_low, eps_high": {"eps_low": 1.5},
        "aggregation: got 'mean'": {"aggregation": "mean"},
        "normalizer: got None": {"aggregation": "dapo"},
        "normalizer: got 0": {"aggregation": "dr_grpo", "normalizer": 0},
    }.items():
        given = {"logp": new, "old_logp": old, "advantages": A, "mask": mask, **change}
        with pytest.raises(InputError, match=message):
            clipped_policy_loss(**given)  # type: ignore[arg-type]


def test_clip_fraction_is_a_share_of_the_tokens() -> None:
    new, old, A, mask = batch(3)
    r = (new - old).exp()
    outside = ((r > 1.2) & (A > 0)) | ((r < 0.8) & (A < 0))
    got = clipped_policy_loss(new, old, A, mask).clip_fraction
    assert got == pytest.approx(np.mean(outside[mask].numpy()))
