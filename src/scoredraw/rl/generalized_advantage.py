"""Advantages from a critic: generalized advantage estimation over the tokens of answers.

    δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1},    returns = A + V,

with V = 0 after the last token. Schulman et al. 2016, arXiv 1506.02438.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.token_credit import returns_to_go, whiten


class CriticAdvantages(NamedTuple):
    """advantages, returns: (B, T), 0 on padding."""

    advantages: Tensor
    returns: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    whitened: bool = False,
) -> CriticAdvantages:
    """Advantages and returns of the tokens of B answers.

    rewards: (B,), earned at the last real token, or (B, T) of each token; values: (B, T) of the
    critic before each token; mask: (B, T), real tokens first. Values on padding do not matter (in
    the trainer released with NGRPO the one after the end leaks into the last token).
    whitened: the advantages have mean 0 and variance 1 over all real tokens of the batch.
    Raises InputError for shapes that differ, a row without a token, holes, and gamma or lam
    outside [0, 1]. O(B T).

    >>> ones = torch.ones(1, 3)
    >>> generalized_advantages(torch.tensor([1.0]), 0.25 * ones, ones).advantages
    tensor([[0.7500, 0.7500, 0.7500]])
    """
    shape = tuple(values.shape)
    require(len(shape) == 2, "values", shape, "(B, T)")
    require(mask.shape == values.shape, "mask", tuple(mask.shape), f"{shape}, as values")
    fits = tuple(rewards.shape) in {shape, shape[:1]}
    require(fits, "rewards", tuple(rewards.shape), f"{shape[:1]} or {shape}")
    require(0 <= gamma <= 1 and 0 <= lam <= 1, "gamma, lam", (gamma, lam), "numbers in [0, 1]")
    real = mask.bool()
    tokens = real.sum(dim=1)
    require(bool((tokens > 0).all()), "mask", "a row without a token", "a token or more a row")
    first = torch.arange(shape[1], device=mask.device) < tokens[:, None]
    require(bool((real == first).all()), "mask", "a hole, or padding on the left", "tokens first")
    r, V = rewards, torch.where(real, values, 0.0)
    if r.ndim == 1:
        r = torch.zeros_like(V).scatter(1, tokens[:, None] - 1, rewards[:, None].to(V.dtype))
    ahead = torch.nn.functional.pad(V[:, 1:], (0, 1))
    A = returns_to_go(r + gamma * ahead - V, real, gamma=gamma * lam)
    return CriticAdvantages(whiten(A, real) if whitened else A, (A + V) * real)
