r"""Exact categorical sampling: float64 noise, whatever the logits' own precision.

A token is drawn either by inversion, one uniform a draw, or by the Gumbel race,

    argmax_v  log p_v + g_v,    g_v = -log(-log u_v),    u_v ~ U(0, 1).

Both give p exactly. With float32 uniforms they don't: -log(-log u) is cut off at 17, so that rare
tokens lose their tails and the samples come out as if at a lower temperature, and the sum of 50,000
float32 probabilities is off by more than the rarest of them. Everything here is float64.

Arrays and torch tensors alike, on any device; the last axis is the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scoredraw.arrays import is_tensor
from scoredraw.errors import require
from scoredraw.uniforms import generator as numpy_generator

TINY = float(np.finfo(np.float64).tiny)
ROUNDING = 1e-12  # of sums of some 100,000 probabilities, and of differences of logarithms


def normalize(logits: Any) -> Any:
    """log-probabilities, float64 (..., V): logits - log Σ exp(logits).

    Raises `InputError` for NaN, +inf, and rows that are -inf throughout.

    >>> np.exp(normalize(np.array([0.0, -np.inf]))).tolist()
    [1.0, 0.0]
    """
    if is_tensor(logits):
        x = logits.double()
        top = _largest(x)
        _check_top(bool(top.isfinite().all()))
        x = x - top
        return x - x.exp().sum(dim=-1, keepdim=True).log()
    x = np.asarray(logits, np.float64)
    top = _largest(x)
    _check_top(bool(np.isfinite(top).all()))
    x = x - top
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _check_top(fine: bool) -> None:
    wanted = "numbers, -inf for what can't be drawn, and in every row something that can"
    require(fine, "logits", "NaN, +inf, or a row of -inf", wanted)


def truncate(
    logits: Any,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Any:
    """The log-probabilities one samples from, float64 (..., V), -inf for what is cut off.

    In this order: logits / temperature; the top_k largest and their equals (0 for all); the fewest
    likeliest tokens that hold top_p (a token stays if those before it hold less); tokens with
    p ≥ min_p · max p. Then normalised. temperature 0 leaves the largest, the first of equals.
    The two shares are met up to ROUNDING, so that p = 0.1 each and top_p = 0.7 leave seven.
    Raises `InputError` for temperature < 0, top_k < 0, top_p outside (0, 1], min_p outside [0, 1),
    and for logits as `normalize`.
    Sorting takes O(V log V), which only top_p needs.

    >>> np.exp(truncate(np.log([0.5, 0.3, 0.2]), top_p=0.6)).round(3).tolist()
    [0.625, 0.375, 0.0]
    >>> np.exp(truncate(np.log([0.5, 0.3, 0.2]), min_p=0.5)).round(3).tolist()
    [0.625, 0.375, 0.0]
    """
    require(0 <= temperature < np.inf, "temperature", temperature, "a number of at least 0")
    require(top_k >= 0, "top_k", top_k, "a count, 0 for all")
    require(0 < top_p <= 1, "top_p", top_p, "a share in (0, 1]")
    require(0 <= min_p < 1, "min_p", min_p, "a share in [0, 1)")
    x = normalize(logits)
    if temperature == 0:
        best = x.argmax(-1)[..., None]
        if is_tensor(x):
            return x.new_full(x.shape, -np.inf).scatter_(-1, best, 0.0)
        chosen = np.full(x.shape, -np.inf)
        np.put_along_axis(chosen, best, 0.0, -1)
        return chosen
    if temperature != 1:
        with np.errstate(over="ignore"):  # from 0 down: what is too far below gets -inf
            x = normalize((x - _largest(x)) / temperature)
    if 0 < top_k < x.shape[-1]:
        x = _keep(x, x >= _kth_largest(x, top_k))
    if top_p < 1:
        x = _keep(x, _nucleus(normalize(x), top_p))
    if min_p > 0:
        x = _keep(x, x >= _largest(x) + np.log(min_p) - ROUNDING)
    return normalize(x)


def _largest(x: Any) -> Any:
    return x.amax(dim=-1, keepdim=True) if is_tensor(x) else x.max(axis=-1, keepdims=True)


def _keep(x: Any, kept: Any) -> Any:
    return x.masked_fill(~kept, -np.inf) if is_tensor(x) else np.where(kept, x, -np.inf)


def _kth_largest(x: Any, k: int) -> Any:
    if is_tensor(x):
        return x.topk(k, dim=-1).values[..., -1:]
    return np.partition(x, x.shape[-1] - k, axis=-1)[..., -k, None]


def _nucleus(x: Any, top_p: float) -> Any:
    """Which tokens have less than top_p before them, likeliest first (equals by their number)."""
    top_p *= 1 - ROUNDING
    if is_tensor(x):
        order = x.argsort(dim=-1, descending=True, stable=True)
        p = x.gather(-1, order).exp()
        before = p.cumsum(dim=-1) - p < top_p
        return before.new_zeros(before.shape).scatter_(-1, order, before)
    order = np.argsort(-x, axis=-1, kind="stable")
    p = np.exp(np.take_along_axis(x, order, -1))
    before = np.cumsum(p, axis=-1) - p < top_p
    kept = np.zeros(before.shape, bool)
    np.put_along_axis(kept, order, before, -1)
    return kept


def invert(logprobs: Any, u: Any) -> Any:
    """The token whose stretch of the cumulative probability holds u: int64 (...).

    min {v : Σ_{w ≤ v} p_w > u · Σ p}. logprobs: (..., V) as `normalize` gives them; u: (...) in
    [0, 1). A token of probability 0 is never drawn. One uniform a draw, so whoever gives each row
    its own uniform gets the same tokens whatever rows come with it.

    >>> invert(np.log([0.5, 0.25, 0.25]), np.array([0.0, 0.49, 0.5, 0.999])).tolist()
    [0, 0, 1, 2]
    """
    if is_tensor(logprobs):
        import torch

        total = logprobs.double().exp().cumsum(dim=-1)
        level = torch.as_tensor(u, dtype=torch.float64, device=total.device)[..., None]
        return torch.searchsorted(total, level * total[..., -1:], right=True)[..., 0]
    total = np.cumsum(np.exp(np.asarray(logprobs, np.float64)), axis=-1)
    return (total <= np.asarray(u)[..., None] * total[..., -1:]).sum(axis=-1)


def gumbel(shape: Any, rng: Any = None) -> Any:
    """Standard Gumbel noise, float64, of a shape: -log(-log u).

    rng: a seed, a NumPy `Generator` or None gives an array; a `torch.Generator` a tensor on its
    device. Every value is finite.
    """
    if type(rng).__module__.startswith("torch"):
        import torch

        u = torch.rand(shape, generator=rng, dtype=torch.float64, device=rng.device)
        return -(-u.clamp_min(TINY).log()).clamp_min(TINY).log()
    u = numpy_generator(rng).random(shape)
    return -np.log(-np.log(np.maximum(u, TINY)))


def draw(logits: Any, rng: Any = None) -> Any:
    """A token of each row, from softmax(logits) exactly: int64 (...), by the Gumbel race.

    rng: as in `gumbel`; tensors need a `torch.Generator` (of any device) or None. Raises
    `InputError` as `normalize` does. O(size) time and noise.

    >>> draw(np.array([[0.0, -np.inf], [-np.inf, 0.0]]), rng=0).tolist()
    [0, 1]
    """
    x = normalize(logits)
    if not is_tensor(x):
        return (x + gumbel(x.shape, rng)).argmax(axis=-1)
    import torch

    fine = rng is None or isinstance(rng, torch.Generator)
    require(fine, "rng", type(rng).__name__, "a torch.Generator or None for tensors")
    source = torch.default_generator if rng is None else rng
    return (x + gumbel(x.shape, source).to(x.device)).argmax(dim=-1)
