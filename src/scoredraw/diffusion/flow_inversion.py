"""Inverting autoregressive flow blocks with a few parallel sweeps instead of T calls in a row.

A block maps tokens x (T of them, C channels each) to z_t = exp(-s_t)(x_t - u_t), where s_t and u_t
depend on x_<t only. One pass gives all s and u, so z is cheap; x asks for token after token. But x
is also the fixed point of a map whose passes are parallel,

    x = exp(s(x)) z + u(x),

and since its Jacobian is strictly lower triangular, k sweeps of it make the first k + 1 tokens
final, whatever stood behind them: T - 1 sweeps are exact, and usually a few are enough (Jacobi).
Gauss-Seidel-Jacobi cuts the tokens into segments of S, solves them in order, and never needs more
than S sweeps for one. One segment is Jacobi, T segments are the sequential inverse.

A sweep stops mattering when nothing moves. With tol=0 a segment ends after S sweeps or when a sweep
changes nothing, and the result is the sequential one; with tol > 0 it may end earlier and is near.
Two cheap numbers a block say how many sweeps it wants and where to start (`block_metrics`).

Liu and Qin, "Accelerate TarFlow sampling with GS-Jacobi iteration", 2025, arXiv 2505.12849; Song,
Meng, Liao and Ermon, "Accelerating feedforward computation via parallel nonlinear equation
solving", ICML 2021, arXiv 2002.03629.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoredraw.errors import InputError, require

METHODS = ("gs-jacobi", "jacobi", "sequential")
GUESSES = ("z", "zero")

BlockFunction = Callable[[Tensor], Any]  # x -> what `solve` takes, (s, u) for affine blocks
Solve = Callable[[Any, Tensor], Tensor]  # (block_fn(x), z) -> x, token by token
Sweep = Callable[[Tensor, int], Tensor]  # (tokens from `start` on, start) -> those after each


@dataclass(frozen=True)
class SegmentPlan:
    """How to invert one block.

    segments: G from 1 (Jacobi) to T; 0 is T (sequential). Where G does not divide T, segments
        differ by a token.
    max_iter: sweeps of a segment at most; None or more than it has tokens: as many, which is exact.
    tol: a segment ends when ‖new - old‖_F / (B C) ≤ tol. This norm is the batch's: in a larger one
        the same tol stops earlier. per_sample=True asks it of every sample alone, ‖·‖_F / C, and
        leaves those alone that have met it: none depends on its company, but for fallbacks.
    init: the first guess: "z", "zero" (z_1, 0, ...) or a tensor like z.
    clamp: bound on the tokens that are not yet final; a segment does not end while it binds, unless
        by max_iter, so it leaves the result alone. clamp_finished=True bounds all tokens as the
        published code does (clamp 3), which changes the result where the true one lies outside.
    refresh: a last pass for every segment that ended early, so that later segments see its last
        iterate and not, as published, the one before.
    """

    segments: int = 1
    max_iter: int | None = None
    tol: float = 1e-6
    init: str | Tensor = "z"
    clamp: float | None = None
    refresh: bool = False
    per_sample: bool = False
    clamp_finished: bool = False

    def __post_init__(self) -> None:
        _count(self.segments, "segments", 0, "0 (sequential) or a count of segments")
        if self.max_iter is not None:
            _count(self.max_iter, "max_iter", 1, "at least 1, or None")
        require(self.tol >= 0, "tol", self.tol, "0 or more")
        require(self.clamp is None or self.clamp > 0, "clamp", self.clamp, "a positive bound")
        named = isinstance(self.init, Tensor) or self.init in GUESSES
        require(named, "init", repr(self.init), "z, zero or a tensor")

    def bounds(self, T: int) -> list[tuple[int, int]]:
        """(first, end) of the tokens that each segment reads; it writes those one further on."""
        require(self.segments <= T, "segments", self.segments, f"at most the {T} tokens")
        G = self.segments or T
        cuts = [*(T * i // G for i in range(G)), T - 1]  # nothing follows the last token
        return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


@dataclass(frozen=True, eq=False)
class InvertResult:
    """x (B, T, C), and what it took.

    iterations, residuals: one a segment, residuals as in the stop rule (NaN for a segment that fell
    back). passes: calls of the block. tokens: how many tokens of a sample these read together, the
    work with a cache. fallbacks: segments redone token by token as their sweeps overflowed.
    converged: every segment met tol, or had as many sweeps as are exact. A sample in which the flow
    itself overflows is not finite.
    """

    x: Tensor
    iterations: tuple[int, ...] = ()
    residuals: tuple[float, ...] = ()
    passes: int = 0
    tokens: int = 0
    fallbacks: tuple[int, ...] = ()
    converged: bool = True


@dataclass(frozen=True, eq=False)
class InversionState(InvertResult):
    """An inversion after some passes: `sweeps` of them on `segment`, which last read `read`.

    active (B, 1, 1): samples that still move, where the plan is per_sample.
    """

    segment: int = 0
    sweeps: int = 0
    read: Tensor | None = None
    active: Tensor | None = None


class Inversion:
    """A plan at work on one block and one z: `init`, then `step` (one pass) until `done`.

    sweep(tokens, start) reads tokens (B, n, C) at positions start .. start + n - 1 and returns the
    inverse of z at start + 1 .. start + n, given what it read last at all positions before.

    >>> z = torch.ones(1, 4, 1)
    >>> work = Inversion(SegmentPlan(), full_passes(lambda x: (0 * x, x.cumsum(1) - x), z), z)
    >>> state = work.init()
    >>> while not work.done(state):
    ...     state = work.step(state)
    >>> state.x.flatten().tolist(), state.passes
    ([1.0, 2.0, 4.0, 8.0], 3)
    """

    def __init__(self, plan: SegmentPlan, sweep: Sweep, z: Tensor) -> None:
        check_tokens(z)
        self.plan, self.sweep, self.z = plan, sweep, z
        self.bounds = plan.bounds(z.shape[1])

    def init(self, first: Tensor | None = None) -> InversionState:
        """The guess. first (B, T, C): another one, whose first token is final."""
        if first is not None:
            return InversionState(first)
        z, guess = self.z, self.plan.init
        if isinstance(guess, Tensor):
            came = f"{tuple(guess.shape)} {guess.dtype} on {guess.device}"
            same = (guess.shape, guess.dtype, guess.device) == (z.shape, z.dtype, z.device)
            require(same, "init", came, f"{tuple(z.shape)} {z.dtype} on {z.device}, like z")
            require(bool(torch.isfinite(guess).all()), "init", "NaN or infinity", "finite values")
        else:
            guess = z if guess == "z" else torch.zeros_like(z)
        return InversionState(torch.cat([z[:, :1], guess[:, 1:]], dim=1))

    def done(self, state: InversionState) -> bool:
        """Whether nothing is left to do."""
        return state.segment >= len(self.bounds) or len(state.x) == 0

    def step(self, state: InversionState) -> InversionState:
        """One sweep of the current segment, and whatever its end asks for."""
        (a, b), k, plan = self.bounds[state.segment], state.sweeps + 1, self.plan
        old, read = state.x[:, a + 1 : b + 1], state.x[:, a:b]
        if state.active is not None:  # what has come to rest is read as it was
            read = torch.where(state.active, read, state.read)
        new = self.sweep(read, a)
        if state.active is not None:
            new = torch.where(state.active, new, old)
        new, binds = self._bounded(new, k)
        state = replace(
            state, sweeps=k, read=read, passes=state.passes + 1, tokens=state.tokens + b - a
        )
        sound = _rows(torch.isfinite(state.x[:, : a + 1]))
        if b - a > 1 and bool((sound & ~_rows(torch.isfinite(new))).any()):
            return self._token_by_token(state, a, b)
        state = replace(state, x=_with(state.x, new, a + 1))
        moved, residual = self._change(torch.where(sound, new - old, 0))
        met = residual <= plan.tol and not bool(binds.any())
        exact = k >= b - a
        if not (met or exact or k >= (plan.max_iter or k + 1)):
            active = ((moved > plan.tol) | binds) if plan.per_sample else None
            return replace(state, active=active)
        stale = plan.per_sample or (residual > 0 and not exact)
        if plan.refresh and stale and state.segment + 1 < len(self.bounds):
            self.sweep(state.x[:, a:b], a)
            state = replace(state, passes=state.passes + 1, tokens=state.tokens + b - a)
        return self._ended(state, residual, met or exact)

    def run(self, first: Tensor | None = None) -> InversionState:
        """All steps."""
        state = self.init(first)
        while not self.done(state):
            state = self.step(state)
        return state

    def _change(self, change: Tensor) -> tuple[Tensor, float]:
        """‖change‖ / C of every sample (B, 1, 1), and what the stop rule looks at."""
        B, _, C = change.shape
        moved = torch.linalg.vector_norm(change.detach().double(), dim=(1, 2), keepdim=True) / C
        residual = moved.max() if self.plan.per_sample else torch.linalg.vector_norm(moved) / B
        return moved, float(residual)

    def _bounded(self, new: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The sweep's outcome within the clamp, and the samples (B, 1, 1) where that binds."""
        clamp, free = self.plan.clamp, 0 if self.plan.clamp_finished else k
        bounded = new if clamp is None else _with(new, new[:, free:].clamp(-clamp, clamp), free)
        return bounded, ~_rows(bounded == new) & (free > 0)

    def _token_by_token(self, state: InversionState, a: int, b: int) -> InversionState:
        """The segment again, one token after the other."""
        x = state.x
        for t in range(a, b):
            x = _with(x, self.sweep(x[:, t : t + 1], t), t + 1)
        state = replace(
            state, x=x, fallbacks=(*state.fallbacks, state.segment),
            passes=state.passes + b - a, tokens=state.tokens + b - a,
        )  # fmt: skip
        return self._ended(state, math.nan, True)

    def _ended(self, state: InversionState, residual: float, converged: bool) -> InversionState:
        return replace(
            state, segment=state.segment + 1, sweeps=0, read=None, active=None,
            iterations=(*state.iterations, state.sweeps),
            residuals=(*state.residuals, residual), converged=state.converged and converged,
        )  # fmt: skip


def affine_inverse(parameters: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    """x = exp(s) z + u, in float32 where z has fewer digits."""
    s, u = parameters
    if z.dtype.itemsize >= 4:
        return torch.exp(s) * z + u
    return (torch.exp(s.float()) * z.float() + u.float()).to(z.dtype)


def full_passes(
    block_fn: BlockFunction, z: Tensor, solve: Solve = affine_inverse, first: Tensor | None = None
) -> Sweep:
    """A block that knows no cache as a sweep: it is called on all T tokens each time.

    What was read last of earlier segments is kept and shown to it again, and nothing of the tokens
    behind. first (B, 1, C): the first token of x, by default that of z; the sweep raises
    `InputError` where the block says otherwise.
    """
    seen, known = z[:, :0], z[:, :1] if first is None else first

    def sweep(tokens: Tensor, start: int) -> Tensor:
        nonlocal seen
        end = start + tokens.shape[1]
        behind = torch.zeros_like(z[:, end:])
        seen = torch.cat([seen[:, :start], tokens], dim=1)
        new = _like(solve(block_fn(torch.cat([seen, behind], dim=1)), z), z)
        moved = torch.isfinite(new[:, :1]) & ~torch.isclose(new[:, :1], known)
        if start == 0 and bool(moved.any()):
            raise InputError("first: got a block that moves the first token, want first='block'")
        return new[:, start + 1 : end + 1]

    return sweep


def invert_autoregressive(
    block_fn: BlockFunction | None,
    z: Tensor,
    method: str = "gs-jacobi",
    segments: int = 1,
    max_iter: int | None = None,
    tol: float = 1e-6,
    init: str | Tensor = "z",
    clamp: float | None = None,
    refresh: bool = False,
    cache_fn: Callable[[Tensor], Sweep] | None = None,
    *,
    per_sample: bool = False,
    clamp_finished: bool = False,
    solve: Solve = affine_inverse,
    first: str = "identity",
) -> InvertResult:
    """x with z = f(x), for an autoregressive f, by parallel sweeps.

    z (B, T, C), floating. block_fn(x) -> (s, u), both (B, T, C), in one pass; s_t and u_t depend
    on x_<t only (`check_causal`). Blocks that are not affine: block_fn returns what `solve(that,
    z)` turns into x, token by token. cache_fn(z) instead, which returns the sweep of a block with
    a cache (`TarFlowBlock.sweep`): passes then cost what they read.
    method: "gs-jacobi", "jacobi" (one segment), "sequential" (T segments). The other arguments are
    those of `SegmentPlan`. first: "identity" where s_1 = u_1 = 0; "block" where the block acts on
    the first token too (MAF), which takes a pass more.

    With tol=0 and max_iter=None the result is the sequential one, but for rounding. A segment whose
    sweeps overflow is redone token by token, and named in `fallbacks`.
    Raises `InputError` for z of another shape, not floating, with NaN or infinity, a bad plan, or
    a block that moves the first token against `first`. An empty batch comes back empty.
    At most T passes of T tokens (with a cache: of T/G); refresh and fallbacks add some.
    Gradients pass through block_fn; run under `torch.no_grad()` unless they are wanted.
    Sequential: one ordered process. Liu and Qin 2025, arXiv 2505.12849.

    >>> z = torch.ones(1, 4, 1)
    >>> result = invert_autoregressive(lambda x: (0 * x, x.cumsum(1) - x), z, tol=0)
    >>> result.x.flatten().tolist(), result.passes, result.converged
    ([1.0, 2.0, 4.0, 8.0], 3, True)
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    require(first in ("identity", "block"), "first", repr(first), "identity or block")
    check_tokens(z)
    require((block_fn is None) != (cache_fn is None), "block_fn, cache_fn",
            "neither" if block_fn is None else "both", "one of them")  # fmt: skip
    G = {"gs-jacobi": segments, "jacobi": 1, "sequential": 0}[method]
    plan = SegmentPlan(G, max_iter, tol, init, clamp, refresh, per_sample, clamp_finished)
    if cache_fn is not None:
        require(first == "identity", "first", repr(first), "identity with cache_fn")
        return Inversion(plan, cache_fn(z), z).run()
    assert block_fn is not None
    if first == "identity" or len(z) == 0:
        return Inversion(plan, full_passes(block_fn, z, solve), z).run()
    guess = Inversion(plan, full_passes(block_fn, z, solve), z).init().x
    start = _like(solve(block_fn(guess), z), z)  # its first token is right, the others a guess
    start = _with(torch.where(torch.isfinite(start), start, guess), start[:, :1], 0)
    result = Inversion(plan, full_passes(block_fn, z, solve, start[:, :1]), z).run(start)
    return replace(result, passes=result.passes + 1, tokens=result.tokens + z.shape[1])


def fixed_point_residual(
    block_fn: BlockFunction, x: Tensor, z: Tensor, solve: Solve = affine_inverse
) -> Tensor:
    """max |solve(block_fn(x), z) - x| of every sample, (B,): 0 only at the sequential result.

    One pass. The fixed point is unique, so this checks an x from whatever source.

    >>> x = torch.tensor([[[1.0], [2.0], [4.5]]])
    >>> fixed_point_residual(lambda x: (0 * x, x.cumsum(1) - x), x, torch.ones(1, 3, 1))
    tensor([0.5000])
    """
    check_tokens(z)
    return (_like(solve(block_fn(x), z), z) - x).abs().amax(dim=(1, 2))


def check_causal(
    block_fn: BlockFunction, x: Tensor, solve: Solve = affine_inverse, rtol: float = 1e-4
) -> None:
    """Raise `InputError` unless what block_fn gives for token t depends on x_<t only.

    x (B, T, C): any sample, not empty. Tokens t .. T of it are replaced, for every t, and what
    stands at 1 .. t compared, to rtol of its size. T + 1 passes.

    >>> check_causal(lambda x: (0 * x, x), torch.ones(1, 3, 1))
    Traceback (most recent call last):
    scoredraw.errors.InputError: block_fn: got token 0 depending on tokens 0 on, want a causal one
    """
    check_tokens(x)
    at = torch.linspace(-1, 1, x.shape[1] * x.shape[2], dtype=x.dtype, device=x.device)
    other = 1.5 - x + at.reshape(x.shape[1:])
    want = solve(block_fn(x), torch.ones_like(x))
    for t in range(x.shape[1]):
        got = solve(block_fn(torch.cat([x[:, :t], other[:, t:]], dim=1)), torch.ones_like(x))
        far = (got - want)[:, : t + 1].abs() > rtol * (1 + want[:, : t + 1].abs())
        if bool(far.any()):
            first = int(far.any(2).any(0).nonzero()[0])
            came = f"token {first} depending on tokens {t} on"
            raise InputError(f"block_fn: got {came}, want a causal one")


# ── how many sweeps a block wants, and where to start ───────────────────────────────────────────


def block_metrics(
    block_fn: BlockFunction,
    x: Tensor,
    projection: tuple[Tensor, Tensor] | None = None,
    norm: float | str = 2,
) -> dict[str, float]:
    """Guessing metrics (IGM) of both guesses and the ranking metric (CRM) of an affine block.

    IGM(init) = ‖mean over the batch of  exp(s(init)) z + u(init) - x‖   with z = f(x)
    CRM = ‖mean over the batch of  exp(-s(x)) x‖ ‖W_s‖ + ‖W_u‖

    x (B, T, C): data as they reach the block, about 1000 (the means are T x C matrices).
    projection: (W_s, W_u), the weights of the last layer's two halves; without it there is no
    "crm". norm: that of the matrices: 2 (spectral), 1 or "fro". The guess with the smaller IGM is
    the better first sweep; the CRM bounds how strongly a sweep passes errors on, to rank blocks.
    Returns {"igm_z", "igm_zero", "crm"}. Three passes. Raises `InputError` for an empty batch or
    another norm. Liu and Qin 2025, arXiv 2505.12849.

    >>> found = block_metrics(lambda x: (0 * x, x.cumsum(1) - x), torch.ones(1, 4, 1))
    >>> {name: round(value**2, 9) for name, value in found.items()}  # z = (1, 0, -1, -2)
    {'igm_z': 10.0, 'igm_zero': 5.0}
    """
    check_tokens(x)
    require(len(x) > 0, "x", "no samples", "at least one")
    require(norm in (1, 2, "fro"), "norm", repr(norm), "1, 2 or 'fro'")

    def size(matrix: Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrix.double(), ord=norm))

    s, u = block_fn(x)
    z = affine_inverse((-s, torch.zeros_like(u)), x - u)
    zero = torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], dim=1)
    found = {
        name: size((affine_inverse(block_fn(guess), z) - x).mean(dim=0))
        for name, guess in (("igm_z", z), ("igm_zero", zero))
    }
    if projection is not None:
        scaled = affine_inverse((-s, torch.zeros_like(u)), x).mean(dim=0)
        found["crm"] = size(scaled) * size(projection[0]) + size(projection[1])
    return found


def plan_strategy(
    metrics: Sequence[Mapping[str, float]],
    T: int,
    *,
    segments: int = 8,
    tough_sweeps: int = 32,
    sweeps: int = 10,
    tol: float = 1e-6,
) -> list[SegmentPlan]:
    """A plan a block from its `block_metrics`, in the blocks' order.

    Blocks whose share of the summed CRM is above 2/K or above twice the median share are tough:
    `segments` segments and `tough_sweeps` sweeps each; the others have one and `sweeps`. Both
    numbers of sweeps are cut to what is exact. init is the guess with the smaller IGM.
    The rule is ours: it picks the blocks that the authors picked by hand for their four models.
    Liu and Qin 2025, arXiv 2505.12849.

    >>> crm = [5.2, 5.6, 2.5, 10.9, 7.7, 7.4, 56.6, 4.1]  # of ImageNet 128
    >>> plans = plan_strategy([{"crm": c, "igm_z": 1, "igm_zero": 2} for c in crm], T=1024)
    >>> [(plan.segments, plan.max_iter) for plan in plans][4:]
    [(1, 10), (1, 10), (8, 32), (1, 10)]
    """
    crm = np.array([one.get("crm", np.nan) for one in metrics], np.float64)
    sound = crm.size > 0 and bool(np.isfinite(crm).all()) and bool((crm >= 0).all())
    require(sound, "metrics", crm.tolist(), "one finite crm or more, none negative")
    _count(T, "T", 1, "a positive count")
    _count(segments, "segments", 1, "a positive count")
    tough = (crm > 2 * crm.mean()) | (crm > 2 * np.median(crm))
    G = min(segments, T)
    plans = []
    for hard, one in zip(tough, metrics, strict=True):
        z, zero = (np.nan_to_num(one[f"igm_{g}"], nan=np.inf) for g in GUESSES)  # 0 ∞ is NaN
        guess = "z" if z <= zero else "zero"
        k = min(tough_sweeps, -(-T // G)) if hard else min(sweeps, max(T - 1, 1))
        plans.append(SegmentPlan(G if hard else 1, k, tol, guess))
    return plans


def plan_from_notation(text: str, blocks: int, tol: float = 1e-6) -> list[SegmentPlan]:
    """The authors' [Stack-GS-J-Else], "0/7-256/8-1/13-6", as a plan a block, in forward order.

    Stack: the blocks to cut; GS, J: their segments and sweeps, one for all or one each; Else: the
    sweeps of all other blocks. (Their lists of numbers run backwards, last block first.)

    >>> plans = plan_from_notation("0/7-256/8-1/13-6", blocks=8)
    >>> [(plan.segments, plan.max_iter) for plan in plans]
    [(256, 1), (1, 6), (1, 6), (1, 6), (1, 6), (1, 6), (1, 6), (8, 13)]
    """
    wanted = f"Stack-GS-J-Else with blocks from 0 to {blocks - 1}, such as 6-8-32-10"
    sound = re.fullmatch(r"\d+(/\d+)*(-\d+(/\d+)*){2}-\d+", text) is not None
    require(sound, "text", repr(text), wanted)
    stack, segments, sweeps, others = ([int(n) for n in p.split("/")] for p in text.split("-"))
    K = len(stack)
    fits = max(stack) < blocks and len(set(stack)) == K
    fits = fits and {len(segments), len(sweeps)} <= {1, K}
    require(fits, "text", repr(text), wanted)
    plans = [SegmentPlan(1, others[0], tol) for _ in range(blocks)]
    for i, block in enumerate(stack):
        plans[block] = SegmentPlan(segments[i % len(segments)], sweeps[i % len(sweeps)], tol)
    return plans


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────


def check_tokens(z: Tensor) -> None:
    """Raise `InputError` unless z is a finite floating tensor (B, T, C) with T, C ≥ 1."""
    came = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
    shaped = isinstance(z, Tensor) and z.ndim == 3 and 0 not in z.shape[1:]
    require(shaped, "z", came, "a tensor (B, T, C)")
    require(z.is_floating_point(), "z", z.dtype, "a floating dtype")
    require(bool(torch.isfinite(z).all()), "z", "NaN or infinity", "finite values")


def _count(value: Any, name: str, least: int, wanted: str) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(whole and value >= least, name, repr(value), wanted)


def _rows(mask: Tensor) -> Tensor:
    """Whether all of a sample's entries are true, (B, 1, 1)."""
    return mask.flatten(1).all(dim=1)[:, None, None]


def _with(x: Tensor, new: Tensor, start: int) -> Tensor:
    """x with the tokens from `start` on replaced by new ones."""
    return torch.cat([x[:, :start], new, x[:, start + new.shape[1] :]], dim=1)


def _like(x: Tensor, z: Tensor) -> Tensor:
    same = x.shape == z.shape and x.dtype == z.dtype
    came = f"{tuple(x.shape)} {x.dtype}"
    require(same, "block_fn", came, f"{tuple(z.shape)} {z.dtype}, like z")
    return x
