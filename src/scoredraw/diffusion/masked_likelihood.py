r"""The likelihood bound of a masked model, without time: perplexity of what it was not trained on.

The bound of the masked diffusion does not depend on the schedule, and is an average over the
number n of masked tokens and over which they are,

    -log p(x) <= NELBO(x) = Σ_{n=1}^{L} 1/n · E_{|M|=n} [ Σ_{i∈M} -log p(x_i | x outside M) ],

the bound of an autoregressive model over random orders. One term is drawn as n ~ U{1..L}, M of
that size, with weight L/n. n stratified or in antithetic pairs makes the mean steadier, at no cost.
With a `schedule` it is the usual estimator in time: t ~ U(0, 1), every token masked on its own with
probability m(t), weight m'(t)/m(t); the same mean, and more spread, as n is then random given t.

Zheng, Chen, Mao, Liu, Zhu and Zhang, ICLR 2025, arXiv 2409.02908; Ou et al. 2025, arXiv 2406.03736.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.diffusion.mask_schedules import MaskSchedule, mask_schedule
from scoredraw.diffusion.masked_diffusion import (
    AT_ONCE,
    LogitsFunction,
    at,
    called,
    law,
    row_block,
)
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.metrics import Estimate, mean_interval
from scoredraw.uniforms import Rng, RowUniforms

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

SPREADS = ("independent", "stratified", "antithetic")
LONGEST_EXACT = 12


@dataclass(frozen=True, eq=False)
class MaskedLikelihood:
    """Estimates of the bound in nats: terms float64 (B, S), of B rows of `length` (B,) tokens."""

    terms: Float
    length: Int

    @property
    def nelbo(self) -> Float:
        """The bound on -log p of each row, nats, (B,)."""
        return np.asarray(self.terms.mean(axis=1))

    @property
    def per_token(self) -> Estimate:
        """Nats a token over all rows, with the t interval over rows (which are independent).

        All rows count by their tokens: Σ NELBO / Σ length.
        """
        share = len(self.length) / self.length.sum()
        residual = self.nelbo - self.length * (self.nelbo.sum() / self.length.sum())
        spread = mean_interval(residual * share)
        value, half = float(self.nelbo.sum() / self.length.sum()), spread.half_width
        return Estimate(value, value - half, value + half, spread.n)

    @property
    def perplexity(self) -> Estimate:
        """exp of the nats a token, an upper bound in expectation."""
        nats = self.per_token
        value, low, high = (float(np.exp(x)) for x in (nats.value, nats.low, nats.high))
        return Estimate(value, low, high, nats.n)


def masked_nelbo(
    logits_fn: LogitsFunction,
    tokens: Tensor,
    mask_id: int,
    n_samples: int = 1,
    rng: Rng = None,
    *,
    spread: str = "stratified",
    given: Any = None,
    schedule: str | MaskSchedule | Callable[[Float], Any] | None = None,
) -> MaskedLikelihood:
    """Estimate the bound on -log p of rows of tokens from n_samples terms each.

    logits_fn: as `MaskedSampler` has it, called once a sample. tokens: int64 (B, L), no mask.
    given: bool (B, L) or (L,), what is never masked (a prompt, padding): then the bound is on the
    rest given it. spread: how the n (or t) of the B · n_samples terms are drawn: "independent";
    "stratified", one shift of an even grid over all of them (each row's own are even, and so are
    the rows'); "antithetic", u and 1 - u in turn. Each term alone is unbiased in all three.
    schedule: None for the bound without time, else the estimator in time.

    Raises InputError for n_samples < 1, an unknown spread, tokens with a mask, a row that is given
    wholly, tokens outside the vocabulary, and for mask_id and logits as the samplers.
    Stratified and antithetic terms depend on one another, the rows' masks do not. n_samples calls.
    Zheng et al. 2025, arXiv 2409.02908.

    >>> x = torch.tensor([[0, 1, 1, 0]])
    >>> made = masked_nelbo(lambda x: torch.zeros(*x.shape, 3), x, mask_id=2, n_samples=3, rng=0)
    >>> bool(np.allclose(made.nelbo, 4 * np.log(2)))
    True
    """
    S = whole(n_samples, "n_samples", 1)
    require(spread in SPREADS, "spread", repr(spread), f"one of {', '.join(SPREADS)}")
    open_ = _open(tokens, mask_id, given)
    uniforms, clock = RowUniforms(rng), None if schedule is None else mask_schedule(schedule)
    u = _levels(open_.shape[0], S, spread, uniforms)
    length = open_.sum(axis=1)
    terms = np.empty(u.shape)
    for s in range(S):
        keys = row_block(uniforms, open_.shape, 0, "masks", s)
        if clock is None:
            n = np.minimum(1 + np.floor(u[:, s] * length), length)
            keys = np.where(open_, keys, np.inf)
            masked = open_ & (keys.argsort(axis=1).argsort(axis=1) < n[:, None])
            weight = length / n
        else:
            t = np.maximum(u[:, s], 2.0**-53)
            level = clock.masked(t)
            masked = open_ & (keys < level[:, None])
            weight = clock.slope(t) / level
        terms[:, s] = weight * _surprise(logits_fn, tokens, masked, mask_id)
    return MaskedLikelihood(terms, length)


def exact_nelbo(logits_fn: LogitsFunction, tokens: Tensor, mask_id: int) -> Float:
    """The bound itself, over all 2^L - 1 sets of masks: nats, float64 (B,).

    2^L - 1 calls; raises InputError for rows longer than 12, and as `masked_nelbo`.

    >>> exact_nelbo(lambda x: torch.zeros(*x.shape, 3), torch.tensor([[0, 1]]), 2).round(6).tolist()
    [1.386294]
    """
    from math import comb

    open_ = _open(tokens, mask_id, None)
    B, L = open_.shape
    require(L <= LONGEST_EXACT, "tokens", f"{L} a row", f"at most {LONGEST_EXACT}")
    total = np.zeros(B)
    for chosen in itertools.product((False, True), repeat=L):
        if n := sum(chosen):
            masked = np.tile(np.array(chosen), (B, 1))
            total += _surprise(logits_fn, tokens, masked, mask_id) / (n * comb(L, n))
    return total


def _open(tokens: Tensor, mask_id: int, given: Any) -> Bool:
    """Which positions are scored, bool (B, L)."""
    fine = isinstance(tokens, Tensor) and tokens.ndim == 2 and not tokens.is_floating_point()
    came = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
    require(fine and tokens.numel() > 0, "tokens", came, "whole numbers (rows, length)")
    held = int((tokens == whole(mask_id, "mask_id", 0)).sum())
    require(held == 0, "tokens", f"{held} masks", "none")
    open_ = np.ones(tuple(tokens.shape), bool)
    if given is not None:
        known = np.asarray(given.cpu() if isinstance(given, Tensor) else given, bool)
        shapes = (open_.shape, open_.shape[1:])
        require(known.shape in shapes, "given", known.shape, f"{shapes[0]} or {shapes[1]}")
        open_ &= ~known
    require(bool(open_.any(axis=1).all()), "given", "a whole row", "a token to score in each")
    return open_


def _levels(rows: int, samples: int, spread: str, uniforms: RowUniforms) -> Float:
    """Uniform numbers (B, S), each alone U(0, 1)."""
    u = row_block(uniforms, (rows, samples), 0, "levels")
    if spread == "independent":
        return u
    if spread == "antithetic":
        flat = u.reshape(-1)
        flat[1::2] = 1 - flat[: len(flat) // 2 * 2 : 2]
        return np.minimum(flat.reshape(u.shape), 1 - 2.0**-53)
    even = (np.arange(samples) + np.arange(rows)[:, None] / rows) / samples
    return np.asarray((u[0, 0] + even) % 1.0)


def _surprise(logits_fn: LogitsFunction, tokens: Tensor, masked: Bool, mask_id: int) -> Float:
    """Σ_{i∈M} -log p(x_i | x outside M) of each row, (B,)."""
    hidden = torch.tensor(masked, device=tokens.device)
    x = tokens.long().masked_fill(hidden, mask_id)
    with torch.no_grad():
        logits = called(logits_fn, x, mask_id)
        where = np.nonzero(masked)
        truth, V = tokens[hidden].long(), logits.shape[-1]
        known = (truth >= 0) & (truth < V)
        require(bool(known.all()), "tokens", truth[~known][:1].tolist(), f"from 0 to {V - 1}")
        some = max(1, AT_ONCE // V)
        said = np.zeros(len(where[0]))
        for low in range(0, len(said), some):
            part = tuple(axis[low : low + some] for axis in where)
            logprobs = law(at(logits, part), mask_id)
            own = truth[low : low + some, None].to(logprobs.device)
            said[low : low + some] = logprobs.gather(-1, own)[:, 0].cpu().numpy()
    return np.asarray(np.bincount(where[0], -said, minlength=len(masked)), np.float64)
