"""The clipped policy loss: how far one batch may move the policy.

    ratio_t = exp(logp_t - old_logp_t)
    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps_low, 1 + eps_high) A_t)

The minimum is taken by the clip from above only where A > 0 and from below only where A < 0, so
two different bounds are one bound for good answers and one for bad ones. Schulman et al. 2017,
arXiv 1707.06347; two bounds: Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from scoredraw.errors import require

AGGREGATIONS = ("token_mean", "seq_mean", "dr_grpo", "dapo", "seq_sum")


class PolicyLoss(NamedTuple):
    """loss: a scalar with a gradient; clip_fraction: the share of tokens the clip made worse."""

    loss: Tensor
    clip_fraction: Tensor


def clipped_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float = 0.2,
    eps_high: float | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """Clipped loss of the tokens of a batch, aggregated to a scalar.

    logp, old_logp, mask: (B, T); advantages: (B,) or (B, T). eps_high: eps_low if None.
    aggregation of loss_t over the tokens that count (mask m):
    - "token_mean" ΣΣ loss m / ΣΣ m (TRL: bnpo),
    - "seq_mean" the mean over rows of Σ loss m / Σ m (grpo),
    - "seq_sum" the mean over rows of Σ loss m (luspo),
    - "dr_grpo" ΣΣ loss m / (B · normalizer), normalizer the longest completion allowed,
    - "dapo" ΣΣ loss m / normalizer, normalizer the tokens of the whole generation batch.

    Raises InputError for shapes that differ, bounds below 0 or eps_low above 1, an unknown
    aggregation, a missing normalizer, and a mask without a token. Memory O(B T).

    >>> import torch
    >>> new, old = torch.tensor([[0.3, 0.0]]), torch.zeros(1, 2)
    >>> loss, clipped = clipped_policy_loss(new, old, torch.ones(1), torch.ones(1, 2))
    >>> round(loss.item(), 3), clipped.item()
    (-1.1, 0.5)
    """
    per_token, clipped = clipped_token_loss(logp, old_logp, advantages, eps_low, eps_high)
    require(mask.shape == logp.shape, "mask", tuple(mask.shape), f"{tuple(logp.shape)}, as logp")
    m = mask.to(per_token.dtype)
    tokens = m.sum()
    require(bool(tokens > 0), "mask", "no token", "at least one token that counts")
    loss = aggregate(per_token, m, aggregation, normalizer)
    return PolicyLoss(loss, (clipped * m).sum() / tokens)


def clipped_token_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    eps_low: float = 0.2,
    eps_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """loss_t (B, T) and where the clip makes it worse, (B, T) bool.

    The gradient is that of logp; old_logp and advantages are constants.
    """
    high = eps_low if eps_high is None else eps_high
    bounds = 0 <= eps_low <= 1 and high >= 0
    require(bounds, "eps_low, eps_high", (eps_low, high), "eps_low in [0, 1], eps_high >= 0")
    shape = tuple(logp.shape)
    fits = len(shape) == 2 and old_logp.shape == logp.shape
    require(fits, "logp and old_logp", f"{shape} and {tuple(old_logp.shape)}", "both (B, T)")
    fits = tuple(advantages.shape) in {shape, shape[:1]}
    require(fits, "advantages", tuple(advantages.shape), f"{shape[:1]} or {shape}")
    A = advantages[:, None] if advantages.ndim == 1 else advantages
    return cast(
        tuple[Tensor, Tensor],
        _Clipped.apply(logp, old_logp, A, 1 - eps_low, 1 + high),
    )


class _Clipped(torch.autograd.Function):
    """The token loss and its gradient, -A_t ratio_t or 0 where clipped; less work than autograd's.

    Where all tensors are of one type, to the bit what autograd gives.
    """

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, old_logp: Tensor, A: Tensor, low: float, high: float
    ) -> tuple[Tensor, Tensor]:
        ratio = (logp - old_logp).exp()
        plain, bound = ratio * A, ratio.clamp(low, high) * A
        clipped = bound < plain
        ctx.save_for_backward(ratio, A, clipped)
        ctx.mark_non_differentiable(clipped)
        return torch.minimum(plain, bound, out=plain).neg_(), clipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        ratio, A, clipped = ctx.saved_tensors
        slope = (grad * A).neg_().mul_(ratio).masked_fill_(clipped, 0.0)
        return slope, None, None, None, None


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    how: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The scalar of a loss (B, T), as `clipped_policy_loss` says. Rows without a token count 0."""
    require(how in AGGREGATIONS, "aggregation", repr(how), ", ".join(AGGREGATIONS))
    total = per_token * mask
    if how == "token_mean":
        return total.sum() / mask.sum().clamp(min=1.0)
    if how == "seq_mean":
        return (total.sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).mean()
    if how == "seq_sum":
        return total.sum(dim=1).mean()
    known = normalizer is not None and float(normalizer) > 0
    require(known, "normalizer", normalizer, f"a positive number for aggregation {how!r}")
    assert normalizer is not None
    return total.sum() / (normalizer * (len(mask) if how == "dr_grpo" else 1))
