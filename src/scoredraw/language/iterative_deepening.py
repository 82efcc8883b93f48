r"""Interrupt a response at growing budgets with "wait", so that it corrects itself: ID-sampling.

A model writes until it has produced b0 tokens, is handed a sentence that makes it reconsider, goes
on until γ b0, is interrupted again, and so on up to a budget B. Early interruptions come often and
cost little, late ones are rare: with a cache m of them cost m triggers of input, and even a model
that reads everything afresh after each reads no more than γ/(γ-1) B tokens of its own again,
where interruptions at every b0 tokens make that B²/(2 b0). N responses are then put to a vote.

    cuts      b0 γ^i, i = 0, 1, ...  (schedule "total"), or the sums of segments of b0 γ^i tokens
    triggers  m = ⌈log_γ(B / b0)⌉, or ⌈log_γ(1 + B (γ-1) / b0)⌉ - 1

Whether it helps is not the schedule's doing. Let a trigger set right a wrong response with
probability u and spoil a right one with probability v. Then, with s = u / (u + v),

    P(right after m triggers) = s + (P0 - s) (1 - u - v)^m

so that where P0 > s and u + v < 1 every trigger hurts (`SelfCorrection`).

Chen, Koenig and Dilkina, "Iterative deepening sampling for large language models", 2025, arXiv
2502.05449. No code is published, and the abstracts leave open the loop, the trigger's words, what
becomes of a response that ends early, and which of two budgets grows; here those are options.
Budgets count generated tokens; triggers are input.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import AnswerPool, whole_numbers
from scoredraw.errors import require
from scoredraw.language import selection

Int = NDArray[np.int64]
Float = NDArray[np.float64]

TRIGGER = "Wait! Maybe I made some mistakes! I need to rethink from scratch."
MANY_TRIGGERS = 64
MOST_STEPS = 1_000_000


# ── when, and what it costs ─────────────────────────────────────────────────────────────────────


def trigger_count(b0: float, gamma: float, total: int, schedule: str = "total") -> int:
    """How many triggers are due before rounding, in closed form.

    "total": ⌈log_γ(B / b0)⌉; "segment": ⌈log_γ(1 + B (γ-1) / b0)⌉ - 1, for γ = 1 ⌈B / b0⌉ - 1; 0
    where B ≤ b0. Logarithms are inexact where B is itself a cut, so the last cut is compared.
    Raises InputError as `deepening_schedule`.

    >>> trigger_count(100, 2, 1000), trigger_count(100, 2, 1000, "segment"), trigger_count(8, 2, 64)
    (4, 3, 3)
    """
    _check_schedule(b0, gamma, total, schedule)
    if total <= b0:
        return 0
    if gamma == 1:
        return math.ceil(total / b0) - 1
    if schedule == "total":
        count = math.log(total / b0) / math.log(gamma)
    else:
        count = math.log1p(total * (gamma - 1) / b0) / math.log(gamma) - 1
    wanted = f"a factor that reaches {total} from {b0:g} in at most {MOST_STEPS:,} steps"
    require(count <= MOST_STEPS, "gamma", gamma, wanted)
    near = max(math.ceil(count) - 1, 0)
    while _cuts(b0, gamma, np.array([near]), schedule)[0] < total:
        near += 1
    return near


def deepening_schedule(b0: float, gamma: float, total: int, schedule: str = "total") -> list[int]:
    """After how many generated tokens a response is interrupted: whole numbers rising below B.

    "total": b0 γ^i; "segment": b0 (1 + γ + ... + γ^i), and γ = 1 gives fixed intervals. Real
    positions below B are rounded half to even; one that then equals its predecessor, or B, is left
    out. b0 ≥ 1 and B ≥ 1 in tokens; B ≤ b0 gives no cuts, plain sampling.

    Raises InputError for b0 < 1, B < 1, γ < 1, γ = 1 with "total" (which would never advance), γ
    so near 1 that it takes more than a million steps. O(steps).

    >>> deepening_schedule(100, 2, 1000), deepening_schedule(100, 2, 1000, "segment")
    ([100, 200, 400, 800], [100, 300, 700])
    """
    steps = np.arange(trigger_count(b0, gamma, total, schedule))
    cuts = np.unique(np.rint(_cuts(b0, gamma, steps, schedule)).astype(np.int64))
    return [int(cut) for cut in cuts if cut < total]


def _cuts(b0: float, gamma: float, i: Int, schedule: str) -> Float:
    if gamma == 1:
        return np.asarray(b0 * (i + 1.0))
    with np.errstate(over="ignore"):  # beyond any budget
        power = np.power(float(gamma), i)
        sums = (gamma * power - 1) / (gamma - 1)
    return np.asarray(b0 * (power if schedule == "total" else sums))


def _check_schedule(b0: float, gamma: float, total: int, schedule: str) -> None:
    require(schedule in ("total", "segment"), "schedule", repr(schedule), "total or segment")
    require(1 <= b0 < math.inf, "b0", b0, "at least 1 token")
    require(total >= 1 and total % 1 == 0, "total", total, "a whole number of at least 1 token")
    least = "above 1" if schedule == "total" else "at least 1"
    fine = 1 <= gamma < math.inf and (gamma > 1 or schedule == "segment")
    require(fine, "gamma", gamma, f"a growth factor {least}")


class TokenAccount(NamedTuple):
    """What a response took, in tokens.

    generated: sampled, those that were stripped included. inserted: of triggers. read: of the
    prompt and the triggers, each once: input with a cache. reread: input of a model without one,
    which reads prompt and response afresh at every call.
    """

    generated: int
    inserted: int
    read: int
    reread: int


def token_account(
    cuts: ArrayLike, generated: int, trigger: ArrayLike, prompt: int = 0
) -> TokenAccount:
    """The account of a response interrupted at `cuts` (m,): Σ_{j=0..m} (P + c_j + j t) is reread.

    trigger: the length of a trigger, or of each (m,). prompt: its length P. c_0 = 0. With the
    geometric cuts of `deepening_schedule`, Σ c_j < B γ / (γ-1), rounding aside.

    >>> token_account([100, 200, 400, 800], 1000, trigger=10, prompt=50)
    TokenAccount(generated=1000, inserted=40, read=90, reread=1850)
    """
    places = np.asarray(cuts, np.int64)
    lengths = np.broadcast_to(np.asarray(trigger, np.int64), places.shape)
    context = prompt + places + np.cumsum(lengths)
    total = int(lengths.sum())
    return TokenAccount(generated, total, prompt + total, prompt + int(context.sum()))


# ── a plan, and a response that follows it ──────────────────────────────────────────────────────


@dataclass(frozen=True)
class DeepeningPlan:
    """When a response of at most `total` generated tokens is interrupted, and with what.

    triggers: token ids of one or more sentences, taken in turn, or at random (pick "draw").
    cuts: after how many generated tokens. boundary: at the first end of a "sentence" or line
    ("newline") from there on, 64 tokens later at the latest, never inside a \\boxed{...}.
    on_finish: what becomes of a response that ends by itself: "stop", or "reflect", which strips
    the end and interrupts, max_reflections times; with a `minimum` only below so many tokens.
    thinking_end: tokens that end the thinking but not the response; where a response would
    reflect they are treated as its end, and otherwise they are tokens like others.

    Raises InputError for what can't be, an empty trigger among it; warns where more than 64
    triggers are due. `geometric`, `every`, `at_the_end`, `forced` and `plain` are the usual ones.
    """

    total: int
    triggers: tuple[tuple[int, ...], ...] = ()
    cuts: tuple[int, ...] = ()
    on_finish: str = "stop"
    max_reflections: int = 1
    minimum: int | None = None
    thinking_end: tuple[int, ...] = ()
    boundary: str | None = None
    pick: str = "cycle"

    def __post_init__(self) -> None:
        fits = self.total >= 1 and self.total % 1 == 0
        require(fits, "total", self.total, "a whole number of at least 1 token")
        fits = self.minimum is None or 1 <= self.minimum <= self.total
        require(fits, "minimum", self.minimum, f"from 1 to {self.total} tokens")
        rising = all(a < b for a, b in zip((0, *self.cuts), (*self.cuts, self.total), strict=True))
        require(rising, "cuts", self.cuts, f"counts of tokens that rise, below {self.total}")
        kinds = ("stop", "reflect")
        require(self.on_finish in kinds, "on_finish", repr(self.on_finish), "stop or reflect")
        require(self.max_reflections >= 1, "max_reflections", self.max_reflections, "at least 1")
        fits = self.boundary in (None, "sentence", "newline")
        require(fits, "boundary", repr(self.boundary), "sentence, newline or None")
        require(self.pick in ("cycle", "draw"), "pick", repr(self.pick), "cycle or draw")
        given = bool(self.triggers) or not self.most_triggers
        require(given and all(self.triggers), "trigger", "no tokens", "at least one")
        if self.most_triggers > MANY_TRIGGERS:
            text = f"{self.most_triggers} triggers are due, more than {MANY_TRIGGERS}"
            warnings.warn(text, stacklevel=4)

    @classmethod
    def geometric(
        cls,
        b0: float,
        gamma: float,
        total: int,
        trigger: Any,
        schedule: str = "total",
        **options: Any,
    ) -> DeepeningPlan:
        """Iterative deepening. trigger: token ids, or a list of such; options: the other fields.

        >>> DeepeningPlan.geometric(8, 2, 64, trigger=[5]).cuts
        (8, 16, 32)
        """
        cuts = tuple(deepening_schedule(b0, gamma, total, schedule))
        return cls(int(total), as_triggers(trigger), cuts, **options)

    @classmethod
    def every(cls, interval: int, total: int, trigger: Any, **options: Any) -> DeepeningPlan:
        """The baseline of fixed intervals: a trigger every so many tokens."""
        return cls.geometric(interval, 1, total, trigger, "segment", **options)

    @classmethod
    def at_the_end(cls, total: int, trigger: Any, times: int = 1, **options: Any) -> DeepeningPlan:
        """The baseline of reflection after thinking: let it finish, then have it look again."""
        return cls(
            total, as_triggers(trigger), on_finish="reflect", max_reflections=times, **options
        )

    @classmethod
    def forced(
        cls, minimum: int, total: int, trigger: Any, max_reflections: int = 16, **options: Any
    ) -> DeepeningPlan:
        """Budget forcing: while there are fewer than `minimum` tokens, an end becomes a trigger.

        Muennighoff et al., "s1: simple test-time scaling", 2025, arXiv 2501.19393.
        """
        return cls(
            total, as_triggers(trigger), on_finish="reflect", max_reflections=max_reflections,
            minimum=minimum, **options,
        )  # fmt: skip

    @classmethod
    def plain(cls, total: int) -> DeepeningPlan:
        """Sampling without a trigger."""
        return cls(total)

    @property
    def most_triggers(self) -> int:
        """How many triggers a response can get."""
        return len(self.cuts) + (self.max_reflections if self.on_finish == "reflect" else 0)

    @property
    def longest(self) -> int:
        """How many tokens a response can take, triggers included."""
        return self.total + self.most_triggers * max(map(len, self.triggers), default=0)

    def check_window(self, prompts: Sequence[Sequence[int]], window: float) -> None:
        """Raises InputError where the longest prompt leaves no room for the longest response."""
        tokens = max(map(len, prompts), default=0) + self.longest
        parts = f"{tokens} tokens with {self.total} generated and {self.most_triggers} triggers"
        require(tokens <= window, "prompts", parts, f"at most {window}, the model's window")


def as_triggers(trigger: Any) -> tuple[tuple[int, ...], ...]:
    """Token ids, or a list of such, as the triggers of a plan."""
    require(not isinstance(trigger, str), "trigger", repr(trigger), "token ids")
    several = len(trigger) > 0 and not isinstance(trigger[0], int | np.integer)
    return tuple(tuple(map(int, ids)) for ids in (trigger if several else [trigger]))


@dataclass(frozen=True, eq=False)
class Trace:
    """A response: what was generated, and where it was interrupted.

    ids: int64 (T,), after the prompt, triggers in their places. trigger_spans: where those lie,
    [start, stop). finished: it ended by itself. stripped: ends that were sampled and taken out.
    logprobs: float64, of the generated tokens, in nats, where the driver knows them.
    """

    ids: Int
    trigger_spans: tuple[tuple[int, int], ...] = ()
    finished: bool = True
    stripped: int = 0
    logprobs: Float | None = None

    @property
    def generated_mask(self) -> NDArray[np.bool_]:
        """Which of the ids the model sampled, bool (T,)."""
        mask = np.ones(len(self.ids), bool)
        for start, stop in self.trigger_spans:
            mask[start:stop] = False
        return mask

    @property
    def trigger_lengths(self) -> Int:
        """The tokens of each trigger, (m,)."""
        return np.array([stop - start for start, stop in self.trigger_spans], np.int64)

    @property
    def cut_positions(self) -> Int:
        """The generated tokens before each trigger, (m,)."""
        starts = np.array([start for start, _ in self.trigger_spans], np.int64)
        return starts - np.cumsum(self.trigger_lengths) + self.trigger_lengths

    @property
    def n_generated(self) -> int:
        """The generated tokens that are left, without those that were stripped."""
        return len(self.ids) - int(self.trigger_lengths.sum())

    def account(self, prompt: int = 0) -> TokenAccount:
        """What the response took after a prompt of so many tokens."""
        sampled = self.n_generated + self.stripped
        return token_account(self.cut_positions, sampled, self.trigger_lengths, prompt)


# ── which response to submit ────────────────────────────────────────────────────────────────────

SELECTORS: dict[str, selection.Selector] = {
    "majority": selection.majority_vote,
    "bon": selection.best_of_n,
    "weighted": selection.weighted_vote,
    "likeliest": selection.likeliest,
    "probability": selection.probability_vote,
}


@dataclass(frozen=True, eq=False)
class Selection:
    """The pool of answers, and how likely each is to be submitted, float64 (n,) (ties share)."""

    pool: AnswerPool
    choice: Float

    @property
    def index(self) -> int | None:
        """The first response of the highest probability, None where there is no answer."""
        return int(self.choice.argmax()) if self.choice.any() else None

    @property
    def answer(self) -> Any:
        """Its answer."""
        if self.index is None or self.pool.answers is None:
            return None
        return self.pool.answers[self.pool.codes[self.index]]


def select_trace(
    traces: Sequence[Trace],
    answer: Callable[[Trace], Any],
    method: str | selection.Selector = "majority",
    rewards: ArrayLike | None = None,
) -> Selection:
    """Submit one of n responses: by vote, by reward, or by both.

    answer: a response's final answer, None where it has none; of several the last counts
    (`last_answer`). method: "majority", "bon" and "weighted" (these need `rewards`), "likeliest",
    "probability" (these need log-probabilities, of generated tokens alone), or a selector.
    Raises InputError for no traces, another method, or scores that are missing.

    >>> traces = [Trace(np.array(ids)) for ids in ([3, 5], [4, 7], [5])]
    >>> select_trace(traces, lambda trace: int(trace.ids[-1])).answer
    5
    """
    known = method in SELECTORS if isinstance(method, str) else callable(method)
    require(known, "method", repr(method), f"one of {', '.join(SELECTORS)}, or a selector")
    require(len(traces) > 0, "traces", "none", "at least one")
    sums = [trace.logprobs.sum() for trace in traces if trace.logprobs is not None]
    scored = len(sums) == len(traces)
    pool = AnswerPool.of(
        [answer(trace) for trace in traces],
        rewards=rewards,
        logprobs=sums if scored else None,
        lengths=[trace.n_generated for trace in traces] if scored else None,
    )
    return Selection(pool, (SELECTORS[method] if isinstance(method, str) else method)(pool))


def last_answer(text: str, pattern: str | re.Pattern[str]) -> str | None:
    """The last match of a pattern's first group: a later correction overrides what came before.

    >>> last_answer("The answer is 5. Wait! The answer is 7.", r"answer is (\\d+)")
    '7'
    """
    found = [match.group(1) for match in re.finditer(pattern, text)]
    return found[-1] if found else None


# ── the law of self-correction ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SelfCorrection:
    """Right or wrong, a Markov chain: a trigger sets right with u and spoils with probability v.

    P(right after m) = s + (p0 - s) (1 - u - v)^m,  s = u / (u + v).

    trials: the responses that the three were estimated from, 0 where they are known. Raises
    InputError for what is no probability.

    >>> law = SelfCorrection(p0=0.9, u=0.2, v=0.1)
    >>> law.after([0, 1, 2]).round(3).tolist(), law.best_count
    ([0.9, 0.83, 0.781], 0)
    """

    p0: float
    u: float
    v: float
    trials: int = 0

    def __post_init__(self) -> None:
        for name in ("p0", "u", "v"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a probability")

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike) -> SelfCorrection:
        """From responses that were right or not before and after a trigger, bool (n,) each.

        Raises InputError unless some were right and some wrong before.
        """
        first, then = np.asarray(before, bool), np.asarray(after, bool)
        require(first.shape == then.shape, "after", f"{then.shape}", f"shape {first.shape}")
        both = bool(first.any() and not first.all())
        require(both, "before", "only one kind of responses", "right ones and wrong ones")
        return cls(first.mean(), then[~first].mean(), 1 - then[first].mean(), first.size)

    @property
    def stationary(self) -> float:
        """s, where accuracy ends up; p0 where nothing ever changes."""
        return self.u / (self.u + self.v) if self.u + self.v else self.p0

    def after(self, m: ArrayLike) -> Any:
        """P(right) after m triggers, float64 of m's shape."""
        powers = whole_numbers(m, "m")
        require(bool((powers >= 0).all()), "m", m, "counts of triggers")
        s = self.stationary
        return s + (self.p0 - s) * np.power(1 - self.u - self.v, powers)

    def standard_error(self, m: ArrayLike) -> Any:
        """Of `after(m)`, from the errors of p0, u and v (delta method); 0 where they are known."""
        m = whole_numbers(m, "m")
        if not self.trials or self.u + self.v == 0:
            return np.zeros(m.shape)
        u, v, rest = self.u, self.v, 1 - self.u - self.v
        power = np.power(rest, m)
        slope = -(self.p0 - self.stationary) * m * np.power(rest, np.maximum(m - 1, 0))
        by_u = v / (u + v) ** 2 * (1 - power) + slope
        by_v = -u / (u + v) ** 2 * (1 - power) + slope
        wrong, right = self.trials * (1 - self.p0), self.trials * self.p0
        first = power**2 * self.p0 * (1 - self.p0) / self.trials
        return np.sqrt(first + by_u**2 * u * (1 - u) / wrong + by_v**2 * v * (1 - v) / right)

    @property
    def best_count(self) -> float:
        """The number of triggers that makes P(right) largest, the fewest of equals.

        0 where p0 ≥ s: triggers can only hurt. Otherwise infinity where u + v < 1 (accuracy
        climbs to s), and 1 where u + v ≥ 1 (it is at once at s, or beyond and falls back).
        """
        total = self.u + self.v
        if self.p0 * total >= self.u:
            return 0
        return math.inf if total < 1 else 1
