"""From steps to tokens: put what a step earned on its tokens, and sum what is still to come.

A step is a run of tokens that ends at token `ends`; the next one begins after it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from scoredraw.errors import require


def at_step_ends(values: Tensor, step_mask: Tensor, ends: Tensor, length: int) -> Tensor:
    """(N, T): each step's value on its last token, 0 elsewhere.

    values, step_mask, ends: (N, S); ends int64, 0-based, rising along a row where step_mask is
    true; length: T. O(N (S + T)); `check_steps` says what is refused.

    >>> at_step_ends(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]),
    ...              torch.tensor([[1, 3]]), 5)
    tensor([[0., 1., 0., 2., 0.]])
    """
    check_steps(values, step_mask, ends, length)
    spare = values.new_zeros(len(values), length + 1)  # the last column takes what is masked
    place = torch.where(step_mask, ends, length)
    return spare.scatter_add(1, place, values * step_mask)[:, :length]


def over_steps(values: Tensor, step_mask: Tensor, ends: Tensor, length: int) -> Tensor:
    """(N, T): each step's value on all its tokens, 0 after the last step.

    >>> over_steps(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]),
    ...            torch.tensor([[1, 3]]), 5)
    tensor([[1., 1., 2., 2., 0.]])
    """
    check_steps(values, step_mask, ends, length)
    counts = step_tokens((ends + 1) * step_mask)
    rest = length - counts.sum(dim=1, keepdim=True)
    return runs(pad(values * step_mask, (0, 1)), torch.cat([counts, rest], dim=1), length)


def step_tokens(upto: Tensor) -> Tensor:
    """(N, S) tokens of each step, from those up to its end, 0 for masked steps.

    >>> step_tokens(torch.tensor([[2, 0, 5]])).tolist()
    [[2, 0, 3]]
    """
    before = pad(upto.cummax(dim=1).values[:, :-1], (1, 0))
    return (upto - before).clamp(min=0)


def check_steps(values: Tensor, step_mask: Tensor, ends: Tensor, length: int) -> None:
    """InputError for shapes that differ, a mask that is not bool, ends that fall or lie outside."""
    shape = tuple(step_mask.shape)
    require(step_mask.dtype == torch.bool, "step_mask", step_mask.dtype, "torch.bool")
    fits = len(shape) == 2 and tuple(values.shape) == shape and tuple(ends.shape) == shape
    came = f"{tuple(values.shape)}, {shape}, {tuple(ends.shape)}"
    require(fits, "step values, step_mask, step_end", came, "all (N, S)")
    require(ends.dtype == torch.int64, "step_end", ends.dtype, "torch.int64")
    known = torch.where(step_mask, ends, -1).cummax(dim=1).values
    before = pad(known[:, :-1], (1, 0), value=-1)
    rises = bool(((ends > before) | ~step_mask).all())
    if not rises or bool((known[:, -1:] >= length).any()):
        outside = ends[step_mask & ((ends < 0) | (ends >= length))][:1].tolist()
        require(not outside, "step_end", outside, f"tokens of the response, 0 to {length - 1}")
    require(rises, "step_end", "ends that do not rise", "each step ending after the one before")


def runs(values: Tensor, counts: Tensor, length: int) -> Tensor:
    """(N, T): row n is values[n, 0] counts[n, 0] times, then values[n, 1] counts[n, 1] times, ...

    values, counts: (N, R); the counts of a row add up to length, T.

    >>> runs(torch.tensor([[1.0, 2.0]]), torch.tensor([[2, 1]]), 3)
    tensor([[1., 1., 2.]])
    """
    plain = values.device.type == "cpu" and not values.requires_grad
    if plain and values.dtype != torch.bfloat16:  # twenty times as fast as torch's
        found = torch.from_numpy(np.repeat(values.numpy().ravel(), counts.numpy().ravel()))
    else:
        found = values.flatten().repeat_interleave(counts.flatten())
    return found.reshape(len(values), length)


def leading_tokens(mask: Tensor) -> tuple[Tensor, bool]:
    """(N,) int64 tokens of each row before its first gap, and whether no row has any after it.

    mask: (N, T) bool, T >= 1.

    >>> leading_tokens(torch.tensor([[True, True, False], [True, False, False]]))
    (tensor([2, 1]), True)
    """
    if mask.device.type != "cpu":
        length, count = mask.long().cumprod(dim=1).sum(dim=1), mask.count_nonzero()
    else:  # looks no further than the gap
        m = mask.numpy()
        gap = m.argmin(axis=1)  # 0, where there is none
        length = torch.from_numpy(np.where(m[np.arange(len(m)), gap], m.shape[1], gap))
        count = torch.tensor(np.count_nonzero(m))
    return length, bool(count == length.sum())


def returns_to_go(x: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """G_t = Σ_{s >= t} gamma^{s-t} x_s over the last axis; 0 where mask is.

    >>> returns_to_go(torch.tensor([[1.0, 0.0, 2.0]]), gamma=0.5)
    tensor([[1.5000, 1.0000, 2.0000]])
    """
    require(0 <= gamma <= 1, "gamma", gamma, "a number in [0, 1]")
    kept = x if mask is None else x * mask
    if gamma == 1:
        found = kept.flip(-1).cumsum(-1).flip(-1)
    else:
        found, running = torch.empty_like(kept), kept.new_zeros(kept.shape[:-1])
        for t in reversed(range(x.shape[-1])):  # over time only; rows together
            running = kept[..., t] + gamma * running
            found[..., t] = running
    return found if mask is None else found * mask


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the tokens that count, variance unbiased; else 0.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])).round(decimals=3)
    tensor([[-0.7070,  0.7070,  0.0000]])
    """
    m = mask.to(x.dtype)
    n = m.sum()
    require(bool(n > 1), "mask", f"{int(n)} tokens", "two tokens or more to whiten")
    away = (x - (x * m).sum() / n) * m
    return away / ((away**2).sum() / (n - 1) + eps).sqrt()
