r"""Sampling masked models: who is shown when, and what it turns out to be.

A masked model gives, for a text x with masks, the law p(x_i | x) of every masked token. To sample,
masks are replaced by draws from it in some number of network calls. The samplers differ only in
*when* a position is drawn; whatever is drawn in one call is drawn independently from that call's
logits. So a sampler here is a plan: for every position the step in which it is drawn.

`AncestralSampler`  N steps of the reverse process. In the step from t to s a masked token is shown
                    with probability (m_t - m_s)/m_t, so it is shown in the step in which m(t)
                    passes a level that is uniform on (0, m(1)): one uniform a token decides.
`OrderedSampler`    in a random order, or from left to right, in as many even groups as asked for.
`ConfidenceSampler` draws all, keeps those that the model is surest of (MaskGIT).
`first_hitting`     the limit N → ∞ of the first, in one call a token or fewer.

Tokens are drawn by `categorical`, in float64, one uniform a token, which is a function of (seed,
row, position): a batch that is split gives the same tokens, up to the rounding of the network.

Austin et al. 2021, arXiv 2107.03006; Sahoo et al. 2024, arXiv 2406.07524; Chang et al. 2022,
arXiv 2202.04200 (MaskGIT); Zheng et al. 2025, arXiv 2409.02908.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw import categorical
from scoredraw.diffusion.low_precision import noise_bits, on_grid, race
from scoredraw.diffusion.mask_schedules import MaskSchedule, mask_schedule
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, RowUniforms

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
LogitsFunction = Callable[[Tensor], Tensor]

AT_ONCE = 2**22  # float64 numbers of logits or noise that are held while drawing
GIVEN = -1  # the step of a position that was not masked


@dataclass(frozen=True, eq=False)
class MaskedState:
    """Where a sampler stands: tokens (B, L) before step `index` of `steps`.

    shown: int64 (B, L), the step in which a position is drawn (`steps` where that is still open),
    -1 where it was given. times: float64 (B, L), when; NaN where given or open. first: the number
    of the first row. logits: of the last call, where a sampler uses them again, else None.
    """

    tokens: Tensor
    mask_id: int
    uniforms: RowUniforms
    first: int
    shown: Int
    times: Float
    steps: int
    index: int = 0
    calls: int = 0
    draws: int = 0
    logits: Tensor | None = None

    def block(self, stream: str, round: int = 0) -> Float:
        """A uniform for every position, float64 (B, L)."""
        return row_block(self.uniforms, self.tokens.shape, self.first, stream, round)


@dataclass(frozen=True, eq=False)
class MaskedSample:
    """What was sampled: tokens int64 (B, L), no mask among them.

    times: float64 (B, L), the time from 1 down to 0 at which a position was shown. order: int64
    (B, L), the step in which it was drawn. Both are NaN and -1 where it was given. nfe: network
    calls, of the whole batch each. draws: categorical draws.
    """

    tokens: Tensor
    times: Float
    order: Int
    nfe: int
    draws: int


class MaskedSampler(ABC):
    """A plan of the steps, and `init`, `step` and `sample` on top of it.

    temperature, top_p: as `categorical.truncate`; temperature 0 takes the likeliest.

    `sample(logits_fn, x_init, mask_id, rng)` runs all steps. logits_fn(x) takes int64 (B, L) and
    gives floating logits (B, L, V), the mask being one of the V; it always gets the whole batch.
    x_init: int64 (B, L); what is not mask_id is given and never changes. rng: a seed, a generator
    or None. first: the number of the first row, where a batch comes in portions. Rows may have
    different numbers of masks; without any, no call is made and x_init comes back.

    Raises InputError for steps < 1, temperature < 0, top_p outside (0, 1], x_init that is not a
    table of whole numbers >= 0, mask_id outside the vocabulary, logits of another shape, and
    logits that are NaN, +inf, or -inf throughout where a token is to be drawn.
    Memory: the logits of a call, and 32 MB for drawing.
    """

    def __init__(
        self, steps: int | None = None, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        self.steps = None if steps is None else whole(steps, "steps", 1)
        require(0 <= temperature < np.inf, "temperature", temperature, "a number of at least 0")
        require(0 < top_p <= 1, "top_p", top_p, "a share in (0, 1]")
        self.temperature, self.top_p = float(temperature), float(top_p)

    @abstractmethod
    def plan(self, masked: Bool, uniforms: RowUniforms, first: int) -> tuple[Int, Float, int]:
        """Steps int64 (B, L), times float64 (B, L), and how many steps there are."""

    def init(self, x_init: Tensor, mask_id: int, rng: Rng = None, first: int = 0) -> MaskedState:
        """The state before the first step."""
        mask = whole(mask_id, "mask_id", 0)
        require(isinstance(x_init, Tensor), "x_init", type(x_init).__name__, "a tensor")
        fine = x_init.ndim == 2 and not x_init.is_floating_point() and x_init.dtype != torch.bool
        came = f"{tuple(x_init.shape)} {x_init.dtype}"
        require(fine, "x_init", came, "whole numbers (rows, length)")
        low = int(x_init.min()) if x_init.numel() else 0
        require(low >= 0, "x_init", low, "tokens >= 0")
        tokens, uniforms = x_init.long(), RowUniforms(rng)
        masked: Bool = (tokens == mask).cpu().numpy()
        shown, times, steps = self.plan(masked, uniforms, whole(first, "first", 0))
        shown = np.where(masked, shown, GIVEN)
        steps = steps if masked.any() else 0
        return MaskedState(
            tokens, mask, uniforms, first, shown, np.where(masked, times, np.nan), steps
        )

    def step(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        """The state one step further on; InputError after the last step."""
        require(state.index < state.steps, "state", "one after the last step", "an earlier one")
        try:
            return self.advance(state, logits_fn)
        except InputError as problem:
            raise InputError(f"step {state.index}: {problem}") from problem

    def advance(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        """Draw what is due; a step in which nothing is makes no call."""
        due = np.nonzero(state.shown == state.index)
        if not len(due[0]):
            return replace(state, index=state.index + 1)
        logits = called(logits_fn, state.tokens, state.mask_id)
        tokens = self.draw(state, logits, due)
        return replace(
            state, tokens=placed(state.tokens, due, tokens), index=state.index + 1,
            calls=state.calls + 1, draws=state.draws + len(tokens),
            logits=self.kept(logits),
        )  # fmt: skip

    def kept(self, logits: Tensor) -> Tensor | None:
        """What the next step needs of this call."""
        return None

    def draw(self, state: MaskedState, logits: Tensor, where: tuple[Any, ...]) -> Tensor:
        """A token for each of the positions: int64 (K,)."""
        u = state.block("tokens")[where]
        return drawn(at(logits, where), state.mask_id, u, self.temperature, self.top_p)[0]

    def sample(
        self,
        logits_fn: LogitsFunction,
        x_init: Tensor,
        mask_id: int,
        rng: Rng = None,
        *,
        first: int = 0,
    ) -> MaskedSample:
        """Replace every mask of x_init."""
        state = self.init(x_init, mask_id, rng, first)
        with torch.no_grad():
            while state.index < state.steps:
                state = self.step(state, logits_fn)
        return MaskedSample(state.tokens, state.times, state.shown, state.calls, state.draws)


class AncestralSampler(MaskedSampler):
    """N steps of the reverse process, t_k = 1 - k/N, for any schedule.

    cache: leave out the calls that could not change anything: those of steps in which no row shows
    a token (the baseline's own cache, and the reason why it makes at most L calls for one row).
    noise: None draws whom to show and then its token, which is one draw a token in all. A precision
    ("float64", "float32", "float16", "bfloat16" or a number of bits) draws as the common programs
    do: in every step, at every masked position, the token or "stay masked" in one Gumbel race of
    noise -log(-log u) with u on a grid of that many bits. Float64 has the same law as None; fewer
    bits do not (see `low_precision`). What alpha(0) < 1 leaves masked is drawn in the last step.

    The law tends to that of `FirstHittingSampler` as 1/N. Sahoo et al. 2024, arXiv 2406.07524,
    whose program draws with float32 noise. Without noise= O(L V) draws a row, with it O(N L V).

    >>> uniform = lambda x: torch.zeros(*x.shape, 5)
    >>> made = AncestralSampler(100).sample(uniform, torch.full((1, 8), 4), mask_id=4, rng=0)
    >>> bool((made.tokens < 4).all()), made.draws, made.nfe <= 8
    (True, 8, True)
    """

    def __init__(
        self,
        steps: int,
        schedule: str | MaskSchedule | Callable[[Float], Any] = "linear",
        *,
        cache: bool = True,
        noise: str | int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(whole(steps, "steps", 1), temperature=temperature, top_p=top_p)
        self.schedule, self.cache = mask_schedule(schedule), bool(cache)
        self.bits = None if noise is None else noise_bits(noise)

    def plan(self, masked: Bool, uniforms: RowUniforms, first: int) -> tuple[Int, Float, int]:
        assert self.steps is not None
        if self.bits is not None:
            open_ = np.full(masked.shape, self.steps)
            return open_, np.full(masked.shape, np.nan), self.steps
        edges = self.schedule.masked(self._time(np.arange(self.steps)))
        level = edges[0] * row_block(uniforms, masked.shape, first, "levels")
        shown = np.searchsorted(-edges[1:], -level)  # how many later edges lie above the level
        return shown, self._time(shown + 1), self.steps

    def _time(self, k: Any) -> Float:
        assert self.steps is not None
        return np.asarray(1 - np.asarray(k) / self.steps)

    def advance(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        if self.bits is not None:
            return self._race(state, logits_fn)
        if self.cache or (state.shown == state.index).any():
            return super().advance(state, logits_fn)
        called(logits_fn, state.tokens, state.mask_id)
        return replace(state, index=state.index + 1, calls=state.calls + 1)

    def _race(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        """Every masked position draws its token or the mask, in one race."""
        waiting = state.shown == state.steps
        fresh = state.logits is None and (waiting.any() or not self.cache)
        logits = called(logits_fn, state.tokens, state.mask_id) if fresh else state.logits
        t, s = self._time(state.index), self._time(state.index + 1)
        last = state.index + 1 == state.steps
        p = 1.0 if last else float(self.schedule.unmasking(t, s))
        tokens, shown, times = state.tokens, state.shown.copy(), state.times.copy()
        if waiting.any():
            assert logits is not None
            new = self._raced(state, logits, waiting, p)
            hit = new.cpu().numpy() != state.mask_id
            where = tuple(axis[hit] for axis in np.nonzero(waiting))
            tokens = placed(tokens, where, new[torch.from_numpy(hit).to(new.device)])
            shown[where], times[where] = state.index, s
            logits = logits if self.cache and not hit.any() else None
        return replace(
            state, tokens=tokens, shown=shown, times=times, index=state.index + 1,
            calls=state.calls + fresh, draws=state.draws + int(waiting.sum()),
            logits=logits if self.cache else None,
        )  # fmt: skip

    def _raced(self, state: MaskedState, logits: Tensor, waiting: Bool, p: float) -> Tensor:
        """The winners, int64 (K,), over tokens of p · softmax and the mask of 1 - p."""
        assert self.bits is not None
        B, L, V = logits.shape
        some = max(1, AT_ONCE // V)  # positions, counted through the batch
        start, winners = state.first * L, []
        with np.errstate(divide="ignore"):
            log_p, log_q = np.log(p), np.log1p(-p)
        for low in range(0, B * L, some):
            ids = low + np.flatnonzero(waiting.reshape(-1)[low : low + some])
            if not len(ids):
                continue
            ends = (start + low) * V, (start + min(low + some, B * L)) * V
            u = state.uniforms.block(*ends, stream="race", round=state.index)
            u = on_grid(u.reshape(-1, V)[ids - low], self.bits)
            rows = logits.reshape(B * L, V)[torch.from_numpy(ids).to(logits.device)]
            both = law(rows, state.mask_id, self.temperature, self.top_p) + log_p
            both[:, state.mask_id] = log_q
            winners.append(race(both, torch.from_numpy(u).to(both.device)))
        return torch.cat(winners)


class OrderedSampler(MaskedSampler):
    """One token a call in a random order or from left to right; with `steps`, in even groups.

    order: "random" has, one at a time, the law of the first-hitting sampler; "left-to-right" is
    decoding as an autoregressive model would. times: even, 1 - (step + 1)/N, N of the row.

    >>> made = OrderedSampler("left-to-right").sample(
    ...     lambda x: torch.zeros(*x.shape, 3), torch.tensor([[2, 0, 2]]), mask_id=2, rng=0)
    >>> made.order.tolist()
    [[0, -1, 1]]
    """

    def __init__(
        self,
        order: str = "random",
        steps: int | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(steps, temperature=temperature, top_p=top_p)
        require(order in ORDERS, "order", repr(order), f"one of {', '.join(ORDERS)}")
        self.order = order

    def plan(self, masked: Bool, uniforms: RowUniforms, first: int) -> tuple[Int, Float, int]:
        rank = np.cumsum(masked, axis=1) - 1
        if self.order == "random":
            rank = random_ranks(masked, uniforms, first)
        shown, steps = even_groups(rank, masked.sum(axis=1), self.steps)
        own = 1 + np.where(masked, shown, 0).max(axis=1, initial=0, keepdims=True)
        return shown, 1 - (shown + 1) / own, steps


class ConfidenceSampler(MaskedSampler):
    """MaskGIT: draw every masked token, keep the likeliest draws, mask the others again.

    After step k of N, floor(n m(1 - (k + 1)/N)) of a row's n masks are left (N at most n; at least
    one is shown a step, and none is left at the end). Kept are those of the largest
    log p(token) + choice_temperature · (1 - (k + 1)/N) · Gumbel noise, p being the model's own
    (temperature 1, nothing cut). The law is not the model's: it takes what is likely first.
    Chang et al. 2022, arXiv 2202.04200. O(N L V) draws a row.

    >>> uniform = lambda x: torch.zeros(*x.shape, 5)
    >>> made = ConfidenceSampler(4).sample(uniform, torch.full((1, 8), 4), mask_id=4, rng=0)
    >>> np.bincount(made.order[0]).tolist(), made.nfe
    ([1, 2, 2, 3], 4)
    """

    def __init__(
        self,
        steps: int,
        schedule: str | MaskSchedule | Callable[[Float], Any] = "cosine",
        *,
        choice_temperature: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(whole(steps, "steps", 1), temperature=temperature, top_p=top_p)
        fine = 0 <= choice_temperature < np.inf
        require(fine, "choice_temperature", choice_temperature, "a number of at least 0")
        self.schedule, self.choice_temperature = mask_schedule(schedule), choice_temperature

    def plan(self, masked: Bool, uniforms: RowUniforms, first: int) -> tuple[Int, Float, int]:
        assert self.steps is not None
        steps = min(self.steps, int(masked.sum(axis=1).max(initial=0)))
        return np.full(masked.shape, steps), np.full(masked.shape, np.nan), steps

    def advance(self, state: MaskedState, logits_fn: LogitsFunction) -> MaskedState:
        waiting = state.shown == state.steps
        where = np.nonzero(waiting)
        if not len(where[0]):
            return replace(state, index=state.index + 1)
        logits = called(logits_fn, state.tokens, state.mask_id)
        left = waiting.sum(axis=1)
        count = (state.shown != GIVEN).sum(axis=1)
        t = np.maximum(1 - (state.index + 1) / np.clip(count, 1, self.steps), 0.0)  # a row's own
        u = state.block("tokens", state.index)[where]
        new, said = drawn(at(logits, where), state.mask_id, u, self.temperature, self.top_p)
        noise = np.maximum(state.block("choice", state.index)[where], categorical.TINY)
        sure = np.full(waiting.shape, -np.inf)
        gumbel = -np.log(-np.log(noise))
        sure[where] = said.cpu().numpy() + self.choice_temperature * t[where[0]] * gumbel
        goal = np.floor(count * self.schedule.masked(t) + 1e-9)  # 6 (1 - 5/6) is 1, not 0.99...
        goal = np.where(t > 0, goal, 0)
        show = left - np.minimum(goal, np.maximum(left - 1, 0)).astype(np.int64)
        ranks = np.argsort(np.argsort(-sure, axis=1, kind="stable"), axis=1)
        kept = waiting & (ranks < show[:, None])
        chosen = torch.from_numpy(kept[where]).to(new.device)
        shown, times = state.shown.copy(), state.times.copy()
        shown[kept], times[kept] = state.index, t[np.nonzero(kept)[0]]
        return replace(
            state, tokens=placed(state.tokens, np.nonzero(kept), new[chosen]), shown=shown,
            times=times, index=state.index + 1, calls=state.calls + 1,
            draws=state.draws + len(new),
        )  # fmt: skip


ORDERS = ("random", "left-to-right")


# ── the parts of a step ─────────────────────────────────────────────────────────────────────────


def masked_language_model(model: Any, attention_mask: Tensor | None = None) -> LogitsFunction:
    """The logits function of a masked model of transformers (`AutoModelForMaskedLM`).

    Tokens go to the model's device, logits come back on that of the tokens. attention_mask: (B, L)
    of the batch that is sampled, 0 for padding; None: all of it is text. Raises InputError for a
    model in training mode, whose dropout would be part of what is sampled.
    """
    require(not model.training, "model", "one in training mode", "one in evaluation mode")
    device = next(model.parameters()).device
    seen = None if attention_mask is None else attention_mask.to(device)

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=x.to(device), attention_mask=seen).logits
        return found.to(x.device)

    return logits


def called(logits_fn: LogitsFunction, tokens: Tensor, mask_id: int) -> Tensor:
    """The logits (B, L, V) of a call, of the right shape."""
    logits = logits_fn(tokens)
    size = tuple(tokens.shape)
    fine = isinstance(logits, Tensor) and logits.ndim == 3 and tuple(logits.shape[:2]) == size
    came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    require(fine, "logits", came, f"{size} and the vocabulary")
    require(logits.is_floating_point(), "logits", logits.dtype, "a floating dtype")
    V = logits.shape[-1]
    require(mask_id < V, "mask_id", mask_id, f"a token of the vocabulary, below {V}")
    return logits


def at(logits: Tensor, where: tuple[Any, ...]) -> Tensor:
    """The logits (K, V) of these positions."""
    rows, columns = (torch.from_numpy(axis).to(logits.device) for axis in where)
    return logits[rows, columns]


def law(logits: Tensor, mask_id: int, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """log p of what may be drawn, float64 (K, V): never the mask."""
    x = logits.double().clone()
    x[:, mask_id] = -torch.inf
    if temperature == 1 and top_p == 1:
        return categorical.normalize(x)
    return categorical.truncate(x, temperature=temperature, top_p=top_p)


def drawn(
    logits: Tensor, mask_id: int, u: Float, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (K, V), int64 (K,), and the model's own log p of it."""
    some = max(1, AT_ONCE // logits.shape[-1])
    tokens, said = [], []
    for low in range(0, len(u), some):
        own = law(logits[low : low + some], mask_id)
        cut = own
        if (temperature, top_p) != (1, 1):
            cut = categorical.truncate(own, temperature=temperature, top_p=top_p)
        tokens.append(categorical.invert(cut, torch.from_numpy(u[low : low + some])))
        said.append(own.gather(-1, tokens[-1][:, None])[:, 0])
    return torch.cat(tokens), torch.cat(said)


def placed(tokens: Tensor, where: tuple[Any, ...], new: Tensor) -> Tensor:
    """A copy of tokens (B, L) with these positions set."""
    rows, columns = (torch.from_numpy(axis).to(tokens.device) for axis in where)
    copy = tokens.clone()
    copy[rows, columns] = new.to(tokens.device)
    return copy


def row_block(uniforms: RowUniforms, shape: Any, first: int, stream: str, round: int = 0) -> Float:
    """A uniform for every position of the rows from `first` on, float64 (B, L)."""
    B, L = shape
    numbers = uniforms.block(first * L, (first + B) * L, stream=stream, round=round)
    return numbers.reshape(B, L)


def random_ranks(masked: Bool, uniforms: RowUniforms, first: int) -> Int:
    """Each row's masked positions in a uniformly random order, 0 .. n-1; the given ones after."""
    keys = np.where(masked, row_block(uniforms, masked.shape, first, "order"), np.inf)
    order = np.argsort(keys, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(masked.shape[1])[None], 1)
    return ranks


def even_groups(rank: Int, count: Int, steps: int | None) -> tuple[Int, int]:
    """n ranks in N groups of n // N or one more; N at most n, by row; None: N = n.

    >>> groups, steps = even_groups(np.arange(5)[None], np.array([5]), 3)
    >>> groups.tolist(), steps
    ([[0, 0, 1, 1, 2]], 3)
    """
    groups = count if steps is None else np.minimum(count, steps)
    shown = rank * groups[:, None] // np.maximum(count, 1)[:, None]
    return shown, int(groups.max(initial=0))
