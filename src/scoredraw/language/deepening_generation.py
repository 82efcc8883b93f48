"""Responses made by a deepening plan: a driver for any generator, and one for transformers.

`Response` is told what was generated and says whether to interrupt, to go on or to stop; both
drivers ask it. The first hands prompts and responses to a function and gets tokens back, so a
server, llama.cpp or a test's fake will do. The second samples a model of transformers: all
responses in one batch, each token through the model once. The cache goes on across triggers; what
a row is to read waits in its queue, and the batch reads as many tokens at once as every row has
waiting: a whole trigger where all were interrupted together, else a token at a time.

Chen, Koenig and Dilkina, "Iterative deepening sampling for large language models", 2025, arXiv
2502.05449.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import categorical
from scoredraw.errors import require
from scoredraw.language.iterative_deepening import TRIGGER, DeepeningPlan, Trace
from scoredraw.models import Completion, Prompt, TransformersModel
from scoredraw.token_sampling import SAMPLES_OF_A_PROMPT, CachedBatch, Ended
from scoredraw.uniforms import Rng, RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Decode = Callable[[Sequence[int]], str]
Stop = Callable[[Sequence[int]], bool]
Generate = Callable[[Sequence[int], int, Stop | None], Sequence[int]]

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EXTENSION = 64  # tokens that a boundary is waited for
SENTENCE = re.compile(r"(?:[!?]|(?<!\d)\.)[\"')\]*]*\s*$|\n\s*$")  # "3." may go on as 3.14
NEWLINE = re.compile(r"\n\s*$")
BOXED = "\\boxed{"


# ── one response ────────────────────────────────────────────────────────────────────────────────


class Response:
    """A response in the making: told what was generated, it says whether and how to go on.

    `room` is how many tokens it may get before something is decided, less where `stop` says so
    (None where nothing else does); `take` hands them over and puts in the trigger that is due.
    """

    def __init__(
        self,
        plan: DeepeningPlan,
        end: Collection[int],
        decode: Decode | None,
        row: int,
        uniforms: RowUniforms,
    ) -> None:
        self.plan, self.end, self.decode, self.row = plan, frozenset(end), decode, row
        self.uniforms = uniforms
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.logprobs: list[float] = []
        self.generated = self.stripped = self.reflections = 0
        self.going, self.finished = True, False
        self.limit = self._next_limit(0)

    @property
    def segment(self) -> list[int]:
        """What was generated since the last trigger."""
        return self.ids[self.spans[-1][1] if self.spans else 0 :]

    @property
    def sampled(self) -> int:
        """The generated tokens, those included that were stripped."""
        return self.generated + self.stripped

    @property
    def room(self) -> int:
        late = min(self.limit + EXTENSION, self.plan.total)
        return (self.limit if self.generated < self.limit else late) - self.generated

    @property
    def stop(self) -> Stop | None:
        extending = self.generated >= self.limit
        if not extending and not (self.plan.thinking_end and self._reflects(self.generated)):
            return None

        def stop(new: Sequence[int]) -> bool:
            ends = new[-1] in self.plan.thinking_end
            return ends or (extending and self._at_boundary([*self.segment, *new]))

        return stop

    def take(self, new: Sequence[int], ended: bool, logprobs: Sequence[float] = ()) -> None:
        """Add generated tokens; `ended`: the model ended there, by a token or a stop string."""
        self.ids.extend(new)
        self.logprobs.extend(logprobs)
        self.generated += len(new)
        token = bool(new) and (new[-1] in self.end or new[-1] in self.plan.thinking_end)
        if (ended or token) and self._reflects(self.generated - token):
            served = self.generated
            if token:
                self._strip()
            self.reflections += 1
            self._interrupt(served)
        elif ended:
            self.going, self.finished = False, True
        elif self.generated >= self.plan.total:
            self.going = False
        elif self.generated >= self.limit and self._may_cut():
            self._interrupt(self.generated)

    def trace(self) -> Trace:
        """The response as it stands."""
        logprobs = np.array(self.logprobs) if self.logprobs else None
        ids = np.array(self.ids, np.int64)
        return Trace(ids, tuple(self.spans), self.finished, self.stripped, logprobs)

    def _next_limit(self, served: int) -> int:
        return next((cut for cut in self.plan.cuts if cut > served), self.plan.total)

    def _reflects(self, kept: int) -> bool:
        plan = self.plan
        below = kept < (plan.total if plan.minimum is None else plan.minimum)
        return plan.on_finish == "reflect" and below and self.reflections < plan.max_reflections

    def _strip(self) -> None:
        self.ids.pop()
        self.generated -= 1
        self.stripped += 1
        del self.logprobs[self.generated :]

    def _interrupt(self, served: int) -> None:
        place = len(self.spans) % len(self.plan.triggers)
        if self.plan.pick == "draw":
            u = self.uniforms.at([self.row], stream="trigger", round=len(self.spans))[0]
            place = int(u * len(self.plan.triggers))
        trigger = self.plan.triggers[place]
        self.spans.append((len(self.ids), len(self.ids) + len(trigger)))
        self.ids.extend(trigger)
        self.limit = self._next_limit(served)

    def _may_cut(self) -> bool:
        late = self.generated >= self.limit + EXTENSION
        return self.plan.boundary is None or late or self._at_boundary(self.segment)

    def _at_boundary(self, segment: Sequence[int]) -> bool:
        assert self.decode is not None
        text = self.decode(segment)
        start = text.rfind(BOXED)
        inside = text[start + len(BOXED) :]
        if start >= 0 and inside.count("{") >= inside.count("}"):
            return False
        pattern = SENTENCE if self.plan.boundary == "sentence" else NEWLINE
        return pattern.search(text) is not None


# ── drivers ─────────────────────────────────────────────────────────────────────────────────────


class Request(NamedTuple):
    """What a generator is asked: go on from `ids` by at most `room` tokens.

    It stops after a token that ends a text, or as soon as stop(new tokens) holds. row: the
    response's number; sampled: its tokens so far, so that (row, sampled) can address a uniform.
    """

    ids: list[int]
    room: int
    stop: Stop | None
    row: int
    sampled: int


GenerateAll = Callable[[list[Request]], Sequence[Sequence[int]]]


def deepening_traces(
    generate_all: GenerateAll,
    prompts: Sequence[Sequence[int]],
    plan: DeepeningPlan,
    *,
    end: Collection[int] = (),
    decode: Decode | None = None,
    window: float = math.inf,
    rng: Rng = None,
) -> list[Trace]:
    """A response to each prompt by a plan, from any generator: all go on together, round by round.

    generate_all: for each `Request` the new tokens. A response has ended where they hold an `end`
    token (what comes after it is ignored), or are fewer than asked for without `stop`. prompts:
    token ids; repeat one for several responses. decode: ids -> text, for boundaries. window: the
    model's positions. rng: draws among several triggers.

    Raises InputError, before generating, for a plan that doesn't fit the window, a trigger that
    holds an `end` token, a boundary without `decode`; and for a generator that gives too much.
    Sequential. A call a trigger; with boundaries up to two.
    """
    check_plan(plan, prompts, end, decode, window)
    uniforms = RowUniforms(rng)
    responses = [Response(plan, end, decode, row, uniforms) for row in range(len(prompts))]
    while going := [response for response in responses if response.going]:
        requests = [
            Request([*prompts[r.row], *r.ids], r.room, r.stop, r.row, r.sampled) for r in going
        ]
        made = generate_all(requests)
        require(len(made) == len(going), "generate", f"{len(made)} results", f"{len(going)}")
        for response, request, tokens in zip(going, requests, made, strict=True):
            new = [int(token) for token in tokens]
            ends = next((i for i, token in enumerate(new) if token in response.end), None)
            new = new if ends is None else new[: ends + 1]
            fits = len(new) <= request.room
            require(fits, "generate", f"{len(new)} tokens", f"at most {request.room}")
            halted = request.stop is not None and bool(new) and request.stop(new)
            short = len(new) < request.room and not halted
            response.take(new, ends is not None or short)
    return [response.trace() for response in responses]


def check_plan(
    plan: DeepeningPlan,
    prompts: Sequence[Sequence[int]],
    end: Collection[int],
    decode: Decode | None,
    window: float,
) -> None:
    """Raises InputError where a plan can't be followed with this model and these prompts."""
    ends = sorted(set(end) & {token for ids in plan.triggers for token in ids})
    require(not ends, "trigger", f"the token {ends} that ends a text", "a trigger without it")
    require(plan.boundary is None or decode is not None, "decode", None, "ids -> text")
    plan.check_window(prompts, window)


def deepening_sample(
    generate: Generate,
    prompt_ids: Sequence[int],
    *,
    b0: float = 256,
    gamma: float = 2.0,
    total: int = 4096,
    trigger: Any,
    schedule: str = "total",
    n: int = 1,
    end: Collection[int] = (),
    decode: Decode | None = None,
    window: float = math.inf,
    rng: Rng = None,
    **options: Any,
) -> list[Trace]:
    """n responses by iterative deepening, from a function that generates tokens.

    generate(ids, room, stop) -> at most `room` new ids, as `Request` has it. trigger: token ids
    (without a start or end of text), or a list of such. options: on_finish, max_reflections,
    boundary, pick, thinking_end of `DeepeningPlan`; the rest as `deepening_traces` and
    `deepening_schedule`, whose errors it raises, also for n < 1. B ≤ b0 is plain sampling.

    Chen, Koenig and Dilkina, 2025, arXiv 2502.05449. Sequential; m + 1 calls a response.

    >>> def endless(ids, room, stop):
    ...     return [1] * room
    >>> (trace,) = deepening_sample(endless, [7], b0=2, total=7, trigger=[8, 9])
    >>> trace.ids.tolist(), trace.cut_positions.tolist(), trace.n_generated
    ([1, 1, 8, 9, 1, 1, 8, 9, 1, 1, 1], [2, 4], 7)
    """
    require(n >= 1, "n", n, "at least one response")
    plan = DeepeningPlan.geometric(b0, gamma, total, trigger, schedule, **options)

    def generate_all(requests: list[Request]) -> list[Sequence[int]]:
        return [generate(request.ids, request.room, request.stop) for request in requests]

    return deepening_traces(
        generate_all, [prompt_ids] * n, plan, end=end, decode=decode, window=window, rng=rng
    )


# ── transformers ────────────────────────────────────────────────────────────────────────────────


def deepening_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    plan: DeepeningPlan,
    n: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    end: Collection[int] = (),
    ended: Ended | None = None,
    decode: Decode | None = None,
    rng: Rng = None,
    first: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[Trace]]:
    """n responses to each prompt by a plan, from a causal model of transformers.

    The arguments are those of `token_sampling.sample_tokens` and `deepening_traces`; `ended` is
    told a row's tokens since its last trigger, so that a stop string in a trigger stops nothing.
    A plan without cuts gives exactly `sample_tokens`' tokens for the same seed. Log-probabilities
    are the model's own, of generated tokens alone: those of one pass over all ids.

    Raises InputError as `deepening_traces`, before generating. About B + m forward passes where
    all rows are interrupted together, at most B + m · |trigger|; the cache of P · n rows. What a
    row samples is a function of (seed, prompt, sample, step), whatever the batch, up to the
    rounding of the model's arithmetic.
    """
    import torch

    require(n >= 1, "n", n, "at least one response")
    require(all(len(p) > 0 for p in prompts), "prompts", "an empty one", "at least one token each")
    window = getattr(model.config, "max_position_embeddings", None) or math.inf
    check_plan(plan, prompts, end, decode, window)
    if not prompts:
        return []
    how: dict[str, Any] = dict(zip(NEUTRAL, (temperature, top_k, top_p, min_p), strict=True))
    categorical.truncate(np.zeros(1), **how)  # what it refuses, it refuses before generating
    uniforms = RowUniforms(rng)
    numbers = np.arange(len(prompts) * n)
    ids = (numbers // n + first) * SAMPLES_OF_A_PROMPT + numbers % n
    responses = [Response(plan, end, decode, int(row), uniforms) for row in ids]
    active = list(responses)
    queues: list[list[int]] = [[] for _ in active]
    with torch.inference_mode():
        batch = CachedBatch(model, prompts, n)
        while True:
            ready = [i for i, queue in enumerate(queues) if not queue]
            rows = [active[i] for i in ready]
            u = token_uniforms(uniforms, [r.row for r in rows], [r.sampled for r in rows])
            tokens, logprobs = _sample(batch.logits[ready], u, how)
            ends = np.isin(tokens, list(end))
            if ended is not None:
                said = ended([[*r.segment, t] for r, t in zip(rows, tokens.tolist(), strict=True)])
                ends |= np.asarray(said, bool)
            for i, token, logprob, over in zip(ready, tokens, logprobs, ends, strict=True):
                response, read = active[i], len(active[i].ids)
                response.take([int(token)], bool(over), [float(logprob)])
                queues[i] = response.ids[read:]
            going = [i for i, response in enumerate(active) if response.going]
            if progress is not None:
                progress(len(responses) - len(going), len(responses))
            if not going:
                break
            if len(going) < len(active):
                batch.keep(going)
                active, queues = [active[i] for i in going], [queues[i] for i in going]
            width = min(map(len, queues))
            batch.read([queue[:width] for queue in queues])
            queues = [queue[width:] for queue in queues]
    traces = [response.trace() for response in responses]
    return [traces[i * n : (i + 1) * n] for i in range(len(prompts))]


def token_uniforms(uniforms: RowUniforms, rows: ArrayLike, steps: ArrayLike) -> Float:
    """The uniform of each row's next token, by how many it has sampled: those of `sample_tokens`.

    rows, steps: whole numbers (k,) -> float64 (k,).
    """
    ids, sampled = np.asarray(rows, np.int64), np.asarray(steps, np.int64)
    u = np.empty(len(ids))
    for step in np.unique(sampled):
        here = sampled == step
        u[here] = uniforms.at(ids[here], stream="tokens", round=int(step))
    return u


def _sample(logits: Any, u: Float, how: dict[str, Any]) -> tuple[Int, Float]:
    """A token of each row of logits, and its log-probability under the model as it is."""
    own = categorical.normalize(logits)
    neutral = how == NEUTRAL
    chosen = categorical.invert(own if neutral else categorical.truncate(logits, **how), u)
    said = own.gather(-1, chosen[:, None])[:, 0]
    return chosen.cpu().numpy(), said.cpu().numpy()


def trigger_tokens(tokenizer: Any, text: str) -> list[int]:
    """A trigger's token ids, without start or end of text; a blank sets it off from what precedes.

    Raises InputError for a text without tokens.
    """
    parted = text if text[:1].isspace() or not text else f" {text}"
    ids = list(tokenizer(parted, add_special_tokens=False)["input_ids"])
    require(bool(text.strip()) and bool(ids), "trigger", repr(text), "a text with tokens")
    return ids


def deepening_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n: int = 1,
    *,
    max_tokens: int = 4096,
    first_budget: float = 256,
    growth: float = 2.0,
    trigger: str | Sequence[str] = TRIGGER,
    schedule: str = "total",
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    first: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> list[list[Completion]]:
    """n responses to each prompt by iterative deepening -> a list of n `Completion` a prompt.

    prompts: texts, or messages, whose answer is then interrupted within the assistant's turn.
    max_tokens B, first_budget b0, growth γ: in generated tokens, as `deepening_schedule`. trigger:
    a sentence, or several, taken in turn. options: on_finish, max_reflections, boundary, pick of
    `DeepeningPlan`. The text of a completion holds the triggers; its tokens and log-probabilities
    are those generated alone.

    Raises InputError, before generating, as `deepening_tokens`, which says what it takes.
    """
    whole = TransformersModel(model, tokenizer)
    fine = not isinstance(stop, str) and all(stop)
    require(fine, "stop", repr(stop), "a list of strings to stop at")
    sentences = [trigger] if isinstance(trigger, str) else list(trigger)
    triggers = [trigger_tokens(tokenizer, sentence) for sentence in sentences]
    plan = DeepeningPlan.geometric(first_budget, growth, max_tokens, triggers, schedule, **options)
    ids = [whole.prompt_tokens(prompt) for prompt in prompts]
    made = deepening_tokens(
        model, ids, plan, n, temperature=temperature, top_p=top_p, end=whole.end_tokens,
        ended=whole.stop_watch(stop), decode=tokenizer.decode, rng=seed, first=first,
        progress=progress,
    )  # fmt: skip
    return [
        [_completion(whole, before, trace) for trace in traces]
        for before, traces in zip(ids, made, strict=True)
    ]


def _completion(whole: TransformersModel, before: Sequence[int], trace: Trace) -> Completion:
    tokens = tuple(trace.ids[trace.generated_mask].tolist())
    text = whole.text_after(before, trace.ids.tolist())
    return Completion(text, trace.logprobs, tokens, trace.finished)
