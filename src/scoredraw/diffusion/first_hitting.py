r"""First-hitting sampling: a masked diffusion in continuous time, exactly, in one call a token.

With n masked tokens at time τ_n, nothing happens until the first of them is shown, at

    τ_{n-1} = m^{-1}( u^{1/n} m(τ_n) ),    u ~ U(0, 1),

m = 1 - alpha being the masked share; which one is uniform, and its token has the law p(· | x) of
the network. So the law of N → ∞ ancestral steps takes as many calls as there are masks, and one
categorical draw a token instead of one a token and step. Where the network does not see the time,
the times are irrelevant: it is decoding in a uniformly random order.

With N < L steps the tokens are shown in N even groups, each drawn from one call's logits. order=2
extrapolates these logits to the moment at which a token of the group is shown, or draws the group
again once the network has seen it.

Zheng, Chen, Mao, Liu, Zhu and Zhang, "Masked diffusion models are secretly time-agnostic masked
models and exploit inaccurate categorical sampling", ICLR 2025, arXiv 2409.02908.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scoredraw import categorical
from scoredraw.diffusion.mask_schedules import MaskSchedule, mask_schedule
from scoredraw.diffusion.masked_diffusion import (
    AT_ONCE,
    GIVEN,
    AncestralSampler,
    Bool,
    ConfidenceSampler,
    Float,
    Int,
    LogitsFunction,
    MaskedSampler,
    MaskedState,
    OrderedSampler,
    at,
    called,
    drawn,
    even_groups,
    law,
    masked_language_model,
    placed,
    random_ranks,
    row_block,
)
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.uniforms import Rng, RowUniforms

Schedule = str | MaskSchedule | Callable[[Float], Any]

CLOCKS = ("time", "count")
MOST_STATES = 4096  # of the enumerated laws


def hitting_times(
    uniforms: ArrayLike,
    schedule: Schedule = "linear",
    *,
    masked: ArrayLike | None = None,
    start: float = 1.0,
) -> Float:
    """The times at which one masked token after the other is shown, from `start` down.

    τ_{n-1} = m^{-1}(u^{1/n} m(τ_n)), n = the tokens masked before. uniforms: (..., K) in [0, 1),
    used in order; masked: (...) how many tokens are masked at `start` (default K); what comes after
    the last is 0. Their m are distributed as uniform numbers on (0, m(start)), sorted downwards.
    -> float64 (..., K). Raises InputError for uniforms outside [0, 1), start outside (0, 1], more
    masked tokens than uniforms, and schedules as `mask_schedule`.
    Zheng et al. 2025, arXiv 2409.02908, with the product taken in logarithms.

    >>> hitting_times([0.25, 0.5]).tolist()
    [0.5, 0.25]
    """
    clock = mask_schedule(schedule)
    u = np.asarray(uniforms, np.float64)
    fine = u.ndim >= 1 and bool(((u >= 0) & (u < 1)).all())
    require(fine, "uniforms", "numbers outside [0, 1)", "uniform numbers (..., K)")
    require(0 < start <= 1, "start", start, "a time in (0, 1]")
    count = np.asarray(u.shape[-1] if masked is None else masked)
    most = int(count.max(initial=0))
    require(most <= u.shape[-1], "masked", most, f"<= {u.shape[-1]}")
    left = count[..., None] - np.arange(u.shape[-1])
    powers = np.log(np.maximum(u, categorical.TINY)) / np.maximum(left, 1)
    levels = clock.masked(start) * np.exp(np.cumsum(powers, axis=-1))
    return np.where(left > 0, clock.time_of_masked(levels), 0.0)


class FirstHittingSampler(MaskedSampler):
    """The masked diffusion of a network without time, exactly, or in N calls nearly.

    steps: N; None, or as many as a row has masks, is exact, more are not used. Fewer show the
    tokens in N groups of equal size (± 1), each drawn from the logits before its first.

    order=2 (for N < L): from the second call on, a token that is shown at τ is drawn from the
    line through the probabilities p_a and p_b of the last two calls, at the times τ_a > τ_b,

        p = p_b + (τ - τ_b)/(τ_b - τ_a) (p_b - p_a),    clipped at 0 and normalised.

    clock="count" takes the number of masked tokens for τ: a network that does not see the time
    changes with these alone, and the first token of a group is drawn from p_b itself. With either,
    rows that have a call for each mask take p_b, which is exact.

    corrector=True (with order=2): a predictor-corrector in place of the line. A group is drawn from
    p_b, and anew from (p_b + p_new)/2, p_new being what the next call, which sees the first draws,
    says at their places; the group after it comes from that call, and one more call corrects the
    last group: N + 1 in all. It is for networks that were taught to judge tokens that are shown (as
    BERT is, by replaced ones): one trained on masks alone says nothing sensible about them.

    temperature and top_p act on p. order=2 keeps the logits of one more call.

    What `MaskedSampler` says of `sample` holds; the schedule decides the times that come back and,
    with order=2 and clock="time", the extrapolation; nothing else depends on it.
    Zheng et al. 2025, arXiv 2409.02908. Time: a call and O(V) for each token.

    >>> uniform = lambda x: torch.zeros(*x.shape, 5)
    >>> made = FirstHittingSampler().sample(uniform, torch.full((1, 8), 4), mask_id=4, rng=0)
    >>> made.nfe, made.draws, bool((np.diff(made.times[0][made.order[0].argsort()]) < 0).all())
    (8, 8, True)
    """

    def __init__(
        self,
        schedule: Schedule = "linear",
        steps: int | None = None,
        *,
        order: int = 1,
        clock: str = "time",
        corrector: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(steps, temperature=temperature, top_p=top_p)
        require(order in (1, 2), "order", order, "1 or 2")
        require(clock in CLOCKS, "clock", repr(clock), f"one of {', '.join(CLOCKS)}")
        self.schedule, self.order, self.clock = mask_schedule(schedule), int(order), clock
        require(order == 2 or not corrector, "corrector", True, "order 2 with it")
        self.corrector = bool(corrector)

    def plan(self, masked: Bool, uniforms: RowUniforms, first: int) -> tuple[Int, Float, int]:
        count = masked.sum(axis=1)
        rank = random_ranks(masked, uniforms, first)
        u = row_block(uniforms, masked.shape, first, "hits")
        hits = hitting_times(u, self.schedule, masked=count)
        shown, steps = even_groups(rank, count, self.steps)
        return shown, np.take_along_axis(hits, rank, 1), steps + self.corrector

    def kept(self, logits: Tensor) -> Tensor | None:
        return logits if self.order == 2 else None

    def advance(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        last = (state.shown == state.index - 1) & (state.shown != GIVEN) & _grouped(state)
        if not (self.corrector and last.any()):
            return super().advance(state, logits_fn)
        where, logits = np.nonzero(last), called(logits_fn, state.tokens, state.mask_id)
        average = np.full(len(where[0]), -0.5)  # halfway back to the call before
        tokens = self._between(state, logits, where, average, state.block("corrected")[where])
        corrected = placed(state.tokens, where, tokens)
        state = replace(state, tokens=corrected, draws=state.draws + len(tokens))
        if not (state.shown == state.index).any():
            return replace(state, index=state.index + 1, calls=state.calls + 1)
        return super().advance(state, lambda _: logits)

    def draw(self, state: MaskedState, logits: Tensor, where: tuple[Any, ...]) -> Tensor:
        if self.order == 1 or self.corrector or state.logits is None:
            return super().draw(state, logits, where)
        u = state.block("tokens")[where]
        return self._between(state, logits, where, self.ahead(state)[where], u)

    def _between(
        self, state: MaskedState, logits: Tensor, where: tuple[Any, ...], share: Float, u: Float
    ) -> Tensor:
        """Tokens (K,) from p_b + share (p_b - p_a), of this call's p_b and p_a of that before."""
        assert state.logits is not None
        now, before = at(logits, where), at(state.logits, where)
        some, tokens = max(1, AT_ONCE // logits.shape[-1]), []
        for low in range(0, len(u), some):
            part = slice(low, low + some)
            step = torch.from_numpy(share[part]).to(logits.device)[:, None]
            p_b, p_a = (law(x[part], state.mask_id).exp() for x in (now, before))
            line = (p_b + step * (p_b - p_a)).clamp_min(0).log()
            tokens.append(drawn(line, state.mask_id, u[part], self.temperature, self.top_p)[0])
        return torch.cat(tokens)

    def ahead(self, state: MaskedState) -> Float:
        """(τ - τ_b)/(τ_b - τ_a) of every position that is due, float64 (B, L)."""
        shown, k = state.shown, state.index
        if self.clock == "time":
            own = np.where(shown == GIVEN, 1.0, state.times)
            calls = [
                np.where((shown != GIVEN) & (shown < g), own, 1.0).min(axis=1, keepdims=True)
                for g in (k, k - 1)
            ]
        else:  # tokens that are masked before this one is shown, and at the calls
            order = np.argsort(np.argsort(np.where(shown == GIVEN, np.inf, -state.times), axis=1))
            own = -order.astype(np.float64)
            calls = [
                -((shown != GIVEN) & (shown < g)).sum(axis=1, keepdims=True) for g in (k, k - 1)
            ]
        now, before = calls
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (own - now) / (now - before)
        due = (shown == k) & (before > now) & _grouped(state)
        return np.where(due, np.maximum(share, 0.0), 0.0)


def _grouped(state: MaskedState) -> Bool:
    """(B, 1): rows with fewer groups than masks."""
    groups = state.shown.max(axis=1, initial=GIVEN) + 1
    return (groups < (state.shown != GIVEN).sum(axis=1))[:, None]


# ── laws, by enumeration ────────────────────────────────────────────────────────────────────────


def first_hitting_law(logits_fn: LogitsFunction, length: int, mask_id: int) -> Float:
    """What first-hitting sampling of L masks draws, exactly: float64 (V, ..., V), L axes.

    Every state of masks and tokens, from all masks on: a mask is chosen uniformly and replaced by
    p(· | x). One call with all V^L states; raises InputError above 4,096.

    >>> p = first_hitting_law(lambda x: torch.zeros(*x.shape, 3), 2, mask_id=2)
    >>> p[:2, :2].tolist(), float(p.sum())
    ([[0.25, 0.25], [0.25, 0.25]], 1.0)
    """
    states, p = _tabulate(logits_fn, length, mask_id)
    V = p.shape[-1]
    mass = np.zeros(len(states))
    hidden = states == mask_id
    mass[hidden.all(axis=1)] = 1.0
    number = np.arange(len(states))
    for n in range(length, 0, -1):
        for i in range(length):
            of = hidden[:, i] & (hidden.sum(axis=1) == n)
            target = number[of, None] + (np.arange(V) - mask_id) * V ** (length - 1 - i)
            np.add.at(mass, target, mass[of, None] / n * p[of, i])
    return np.where(hidden.any(axis=1), 0.0, mass).reshape((V,) * length)


def ancestral_law(
    logits_fn: LogitsFunction,
    length: int,
    mask_id: int,
    steps: int,
    schedule: Schedule = "linear",
) -> Float:
    """What N ancestral steps from L masks draw, exactly: float64 (V, ..., V), L axes.

    One call with all V^L states and N products with a table (V^L, V^L); InputError above 4,096.

    >>> p = ancestral_law(lambda x: torch.zeros(*x.shape, 3), 2, 2, steps=4)
    >>> p[:2, :2].round(12).tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    N, clock = whole(steps, "steps", 1), mask_schedule(schedule)
    states, p = _tabulate(logits_fn, length, mask_id)
    S, V = len(states), p.shape[-1]
    stay = np.eye(V)[states]  # a token stays what it is
    hidden = (states == mask_id)[..., None]
    mass = (states == mask_id).all(axis=1).astype(np.float64)
    for k in range(N):
        unmask = 1.0 if k == N - 1 else float(clock.unmasking(1 - k / N, 1 - (k + 1) / N))
        one = np.where(hidden, unmask * p + (1 - unmask) * stay, stay)
        move = np.ones((S, S))
        for i in range(length):
            move *= one[:, i][:, states[:, i]]
        mass = mass @ move
    return mass.reshape((V,) * length)


def _tabulate(logits_fn: LogitsFunction, length: int, mask_id: int) -> tuple[Int, Float]:
    """All states int64 (S, L) in the order of their numbers, and p float64 (S, L, V)."""
    L = whole(length, "length", 1)
    V = logits_fn(torch.full((1, L), mask_id)).shape[-1]
    require(0 <= mask_id < V, "mask_id", mask_id, f"a token of the vocabulary, below {V}")
    require(V**L <= MOST_STATES, "length", f"{V}^{L} states", f"at most {MOST_STATES:,}")
    states: Int = np.stack(np.unravel_index(np.arange(V**L), (V,) * L), axis=-1)
    logits = logits_fn(torch.from_numpy(states)).reshape(-1, V)
    p = law(logits, mask_id).exp().cpu().numpy()
    return states, p.reshape(-1, L, V)


# ── any method by its name, on a model of transformers ──────────────────────────────────────────

METHODS = ("first-hitting", "ancestral", "confidence", "random-order", "left-to-right")


def masked_sampler(
    method: str,
    steps: int | None = None,
    *,
    schedule: Schedule | None = None,
    order: int = 1,
    corrector: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> MaskedSampler:
    """The sampler of a name: first-hitting, ancestral, confidence, random-order, left-to-right.

    steps: which ancestral and confidence (MaskGIT) need. schedule: by default linear, of confidence
    cosine. order, corrector: of first-hitting. Raises InputError for an unknown method, and as the
    samplers.
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    first = method == "first-hitting"
    for name, value, usual in (("order", order, 1), ("corrector", corrector, False)):
        require(first or value == usual, name, value, f"{usual} for {method}, which has no other")
    cut: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    if method in ("random-order", "left-to-right"):
        return OrderedSampler(method.removesuffix("-order"), steps, **cut)
    if first:
        cut |= {"order": order, "corrector": corrector}
        return FirstHittingSampler(schedule or "linear", steps, **cut)
    require(steps is not None, "steps", None, f"a count, for {method}")
    assert steps is not None
    if method == "ancestral":
        return AncestralSampler(steps, schedule or "linear", **cut)
    return ConfidenceSampler(steps, schedule or "cosine", **cut)


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    length: int = 0,
    n: int = 1,
    *,
    mask_id: int,
    pad_id: int = 0,
    method: str = "first-hitting",
    steps: int | None = None,
    batch_size: int = 64,
    rng: Rng = None,
    progress: Callable[[int, int], Any] | None = None,
    **settings: Any,
) -> list[list[NDArray[np.int64]]]:
    """n texts of each prompt by a masked model of transformers -> their ids, prompts included.

    prompts: token ids, masks among them where something is to be filled in; `length` masks are put
    after each. method, steps, settings: as `masked_sampler`. batch_size: rows in a call; the same
    texts come with any other, up to the model's rounding. progress: called with the rows that are
    done and all rows. Rows are padded on the right, and the padding hidden from the model.
    Raises InputError for a prompt without a mask where length is 0 or with a token that the model
    does not have, and as the samplers.
    """
    V = model.config.vocab_size  # before a call: an embedding out of range is no InputError
    require(0 <= mask_id < V, "mask_id", mask_id, f"a token of the model, below {V}")
    masks = [mask_id] * whole(length, "length", 0)
    texts = [[*prompt, *masks] for prompt in prompts]
    fillable = all(mask_id in text for text in texts)
    require(fillable, "prompts", "one without a mask", "masks in it, or a length of at least 1")
    require(pad_id != mask_id, "pad_id", pad_id, f"a token that is not the mask {mask_id}")
    ids = [token for text in texts for token in text]
    bad = next((token for token in ids if not 0 <= token < V), None)
    require(bad is None, "prompts", bad, f"tokens of the model, below {V}")
    copies, size = whole(n, "n", 1), whole(batch_size, "batch_size", 1)
    sampler, uniforms = masked_sampler(method, steps, **settings), RowUniforms(rng)
    rows = [text for text in texts for _ in range(copies)]
    longest = max(map(len, rows), default=0)
    made: list[NDArray[np.int64]] = []
    for low in range(0, len(rows), size):
        part = rows[low : low + size]
        x = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in part])
        seen = (torch.arange(longest) < torch.tensor([[len(row)] for row in part])).long()
        logits_fn = masked_language_model(model, seen)
        tokens = sampler.sample(logits_fn, x, mask_id, uniforms, first=low).tokens.numpy()
        made += [ids[: len(row)] for ids, row in zip(tokens, part, strict=True)]
        if progress is not None:
            progress(len(made), len(rows))
    return [made[i * copies : (i + 1) * copies] for i in range(len(texts))]
