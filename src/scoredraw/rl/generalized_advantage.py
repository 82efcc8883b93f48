"""How much better it went at a token than a critic expected: generalised advantage estimation.

With V a critic's value before each token, V = 0 after the last one, and rewards r,

    δ_t = r_t + gamma V_{t+1} - V_t,      A_t = δ_t + gamma lam A_{t+1},      return_t = A_t + V_t.

A reward for the whole answer lies on its last token. What the mask leaves out (padding, what a tool
wrote) isn't there: the token after a masked one follows on the one before it. The function that was
released with NGRPO doesn't mask, so that the critic's value one place past the end gets into the
last token's advantage; current verl masks it.

Schulman et al., "High-dimensional continuous control using generalized advantage estimation", 2016,
arXiv 1506.02438.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoredraw.errors import InputError, require
from scoredraw.rl.token_credit import returns_to_go, whiten


class TokenAdvantages(NamedTuple):
    """advantages and returns, (B, T) each, 0 where the mask is."""

    advantages: Tensor
    returns: Tensor


def generalized_advantage(
    rewards: Any,
    values: Any,
    mask: Any,
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    whitened: bool = False,
) -> TokenAdvantages:
    """Advantages and returns of the tokens of B answers: formulas at the head.

    rewards: (B,) for the whole answer, or (B, T) a token; values, mask: (B, T). whitened: the
    advantages (not the returns) as (A - mean) / sqrt(variance + 1e-8), variance unbiased, over all
    tokens of the batch; groups don't matter. No gradient. float32 or float64 as the values are.
    Raises InputError for other shapes, a row without a token, gamma or lam outside [0, 1], and
    rewards or values that are not finite; what stands where the mask is may be anything.
    O(B T); a row depends on itself alone, unless whitened.

    >>> V = torch.tensor([[0.5, 0.25, 9.0]])
    >>> generalized_advantage([1.0], V, torch.tensor([[1, 1, 0]]), lam=0.5).advantages
    tensor([[0.1250, 0.7500, 0.0000]])
    """
    for name, share in (("gamma", gamma), ("lam", lam)):
        require(0 <= share <= 1, name, share, "a number in [0, 1]")
    V, m = torch.as_tensor(values).detach(), torch.as_tensor(mask)
    V = V if V.dtype == torch.float64 else V.float()
    require(V.ndim == 2, "values", f"shape {tuple(V.shape)}", "(B, T)")
    require(m.shape == V.shape, "mask", f"shape {tuple(m.shape)}", f"{tuple(V.shape)}, as values")
    m = m.to(V.device).bool()
    counts = m.sum(dim=1)
    empty = (counts == 0).nonzero()[:1, 0].tolist()
    require(not empty, "mask", f"no token in row {empty}", "at least one in every row")
    try:
        r = torch.as_tensor(rewards).detach().to(V)
    except (TypeError, ValueError, RuntimeError):
        raise InputError("rewards: got None, words or ragged rows, want numbers") from None
    B = len(V)
    fits = r.shape in {(B,), tuple(V.shape)}
    require(fits, "rewards", f"shape {tuple(r.shape)}", f"({B},) or {tuple(V.shape)}")
    order = (~m).long().argsort(dim=1, stable=True)  # the tokens that are there first
    there = torch.arange(V.shape[1], device=V.device) < counts[:, None]
    if r.ndim == 1:
        last = torch.arange(V.shape[1], device=V.device) == counts[:, None] - 1
        earned = r[:, None] * last
    else:
        earned = r.gather(1, order)
    for name, x in (("rewards", earned), ("values", V.gather(1, order))):
        require(bool(x[there].isfinite().all()), name, "NaN or infinity", "finite numbers")
    earned, before = (torch.where(there, x, 0.0) for x in (earned, V.gather(1, order)))
    after = torch.nn.functional.pad(before[:, 1:], (0, 1))
    found = returns_to_go(earned + gamma * after - before, there, gamma * lam)
    back = torch.zeros_like(V)
    A = back.scatter(1, order, found)
    returns = back.scatter(1, order, found + before)
    return TokenAdvantages(whiten(A, m) if whitened else A, returns)
