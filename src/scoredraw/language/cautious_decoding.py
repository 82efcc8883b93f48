r"""Cautious decoding: where a model is unsure of the next token, try several ways and keep one.

At a text's end the next-token distribution p says how sure the model is; its entropy H decides how
many trials it is worth:

    H = -Σ p log p,    f = (H - h_min) / (h_max - h_min),    N = ⌊n_min + (n_max - n_min) clip(f)⌋

Where N = 1 the next token is drawn as ever. Otherwise N continuations are drawn independently, each
up to and with the first punctuation mark, and that of the lowest perplexity exp(-mean log p(token))
is kept whole (`punctuation.segment_law` says how often which).

Perplexity is a mean over tokens: a segment that is less probable in all can win. An end of text is
a segment of one token; where it is surer than what others have on average, it wins whenever it is
among the trials, with probability 1 - (1 - p)^N instead of p.

`Rows` is the method without a model: it is told the logits of every trial under way and says which
to go on with and by which token. `cautious_decode` drives it with any function that gives logits;
`cautious_generation` with models of transformers and their cache. A token's uniform is a function
of (seed, row, step, trial), so batches change nothing, and where N is always 1 the tokens are those
of `token_sampling.sample_tokens` for the same seed.

Wang et al., "Cautious next token prediction", 2025, arXiv 2507.03038. The released code runs one
row, trial after trial, computes the first token's distribution anew for each, and stops at ten
single tokens alone, so that "." merged with a newline does not end a trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import categorical
from scoredraw.arrays import is_tensor, on_host
from scoredraw.errors import InputError, require
from scoredraw.language.punctuation import best_segment
from scoredraw.token_sampling import SAMPLES_OF_A_PROMPT
from scoredraw.uniforms import Rng, RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]

EPSILON = 1e-10  # inside the logarithm of the entropy, as released
BOUNDS = {"entropy": (0.01, 1.5), "max_prob": (0.0, 1.0), "margin": (0.0, 1.0)}  # h_min, h_max
RULES = ("code", "paper")
TRIALS = ("positive", "inverse", "fixed")
SCORES = ("processed", "raw")
MOST_TRIALS = 2**16  # uniforms: step · this + trial


# ── how many trials ─────────────────────────────────────────────────────────────────────────────


def uncertainty(logprobs: Any, measure: str = "entropy") -> Float:
    """How unsure distributions are, float64 (...), of log-probabilities (..., V).

    "entropy": -Σ p log(p + 1e-10), nats. "max_prob": 1 - the largest p. "margin": 1 - the largest p
    + the second largest. Arrays or tensors. Raises `InputError` for another measure. O(V).

    >>> half = np.log([0.5, 0.5])
    >>> uncertainty(half).round(4).item(), uncertainty(half, "max_prob").item()
    (0.6931, 0.5)
    """
    _check_name("measure", measure, BOUNDS)
    if not is_tensor(logprobs):
        logprobs = np.asarray(logprobs, np.float64)
    if measure == "entropy":
        p = logprobs.exp() if is_tensor(logprobs) else np.exp(logprobs)
        logs = (p + EPSILON).log() if is_tensor(p) else np.log(p + EPSILON)
        return np.asarray(on_host(-(p * logs).sum(-1)))
    k = min(2, logprobs.shape[-1])
    if is_tensor(logprobs):
        top = on_host(logprobs.topk(k, dim=-1).values.exp())
    else:
        top = np.exp(np.sort(logprobs, axis=-1)[..., : -k - 1 : -1])
    second = top[..., 1] if measure == "margin" and k == 2 else 0.0
    return np.asarray(1 - top[..., 0] + second)


def trial_counts(
    uncertainties: ArrayLike,
    h_min: float = 0.01,
    h_max: float = 1.5,
    n_max: int = 10,
    n_min: int = 1,
    *,
    rule: str = "code",
    trials: str = "positive",
    fixed: int = 6,
) -> Int:
    """How many trials an uncertainty is worth, int64 (...).

    f = (H - h_min) / (h_max - h_min). rule: "code" ⌊n_min + (n_max - n_min) clip(f, 0, 1)⌋, "paper"
    ⌊f n_max⌋ clipped to [n_min, n_max]: f = .15 gives 2 or 1. trials: "positive" more where it is
    unsure, "inverse" fewer (1 - f), "fixed" as many everywhere. Raises `InputError` for NaN,
    h_min ≥ h_max, n_min < 1, n_max < n_min, fixed < 1 and unknown names.

    >>> trial_counts([0.0, 0.3, 1.0, 9.0]).tolist()
    [1, 2, 6, 10]
    >>> trial_counts([0.0, 0.3, 1.0, 9.0], rule="paper").tolist()
    [1, 1, 6, 10]
    """
    _check_counts(h_min, h_max, n_max, n_min, rule, trials, fixed)
    h = np.asarray(uncertainties, np.float64)
    require(not np.isnan(h).any(), "uncertainties", "NaN", "numbers")
    if trials == "fixed":
        return np.full(h.shape, fixed, np.int64)
    f = (h - h_min) / (h_max - h_min)
    f = 1 - f if trials == "inverse" else f
    counts = n_min + (n_max - n_min) * np.clip(f, 0, 1) if rule == "code" else f * n_max
    return np.clip(np.floor(counts), n_min, n_max).astype(np.int64)


def _check_counts(
    h_min: float, h_max: float, n_max: int, n_min: int, rule: str, trials: str, fixed: int
) -> None:
    require(h_min < h_max, "h_min", f"{h_min} with h_max {h_max}", "a number below h_max")
    require(1 <= n_max <= MOST_TRIALS, "n_max", n_max, f"a count from 1 to {MOST_TRIALS:,}")
    require(1 <= n_min <= n_max, "n_min", n_min, f"a count from 1 to n_max, {n_max}")
    require(1 <= fixed <= MOST_TRIALS, "fixed", fixed, f"a count from 1 to {MOST_TRIALS:,}")
    _check_name("rule", rule, RULES)
    _check_name("trials", trials, TRIALS)


def _check_name(argument: str, name: str, known: Collection[str]) -> None:
    require(name in known, argument, repr(name), f"one of {', '.join(known)}")


# ── what is asked, and what comes out ───────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class CautiousPlan:
    """How to be cautious. punctuation: the token ids that end a trial and belong to it.

    measure: of uncertainty; its h_min and h_max default to 0.01 and 1.5 nats, or 0 and 1 for the
    others (ours). n_max, n_min, rule, trials, fixed: as `trial_counts`. score: a trial's perplexity
    by the "processed" distribution it was drawn from, or by the model's "raw" one, as the paper
    writes. max_trial_tokens: where a trial without a mark ends; None: where the text does.

    Raises `InputError` for an empty punctuation, a cap below 1, and as `trial_counts`.
    """

    punctuation: Sequence[int] | Int
    measure: str = "entropy"
    h_min: float | None = None
    h_max: float | None = None
    n_max: int = 10
    n_min: int = 1
    rule: str = "code"
    trials: str = "positive"
    fixed: int = 6
    score: str = "processed"
    max_trial_tokens: int | None = None

    def __post_init__(self) -> None:
        require(len(self.punctuation) > 0, "punctuation", "no tokens", "at least one")
        _check_name("measure", self.measure, BOUNDS)
        _check_name("score", self.score, SCORES)
        cap = self.max_trial_tokens
        require(cap is None or cap >= 1, "max_trial_tokens", cap, "at least 1, or None")
        _check_counts(*self.bounds, self.n_max, self.n_min, self.rule, self.trials, self.fixed)

    @property
    def bounds(self) -> tuple[float, float]:
        """h_min and h_max."""
        given = (self.h_min, self.h_max)
        low, high = (
            b if g is None else g for g, b in zip(given, BOUNDS[self.measure], strict=True)
        )
        return low, high

    def counts(self, uncertainties: Float) -> Int:
        """The number of trials at each decision."""
        return trial_counts(
            uncertainties, *self.bounds, self.n_max, self.n_min, rule=self.rule,
            trials=self.trials, fixed=self.fixed,
        )  # fmt: skip


class Decision(NamedTuple):
    """A decision: the text's length then, how unsure, each trial's tokens and perplexity, the kept.

    A decision of one trial is an ordinary token.
    """

    step: int
    uncertainty: float
    lengths: tuple[int, ...]
    perplexities: tuple[float, ...]
    kept: int


@dataclass(frozen=True, eq=False)
class CautiousTokens:
    """A text: ids int64 (T,), log-probabilities float64 (T,), how it ended, and what it took.

    logprobs: under the model as it is. decisions: in order. forward_rows: rows of forward passes
    whose logits were used, the prompt's pass being one: T for a text without trials.
    """

    ids: Int
    logprobs: Float
    finished: bool
    decisions: tuple[Decision, ...]
    forward_rows: int

    @property
    def branch_rate(self) -> float:
        """The share of decisions with more than one trial."""
        return float(np.mean([len(d.lengths) > 1 for d in self.decisions] or [False]))


# ── the rows and their trials ───────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Trial:
    """A continuation of a row under way; without tokens it is the row at a decision.

    score: Σ log p that its perplexity is made of. over: it ends the text; finished: by itself.
    state: what belongs to this continuation alone and is copied for each trial. memory: its cache,
    while it waits for the others.
    """

    row: int
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    score: float = 0.0
    over: bool = False
    finished: bool = False
    state: Any = None
    memory: Any = None

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.score / len(self.tokens)))


@dataclass(eq=False)
class Row:
    """A text so far, and the decision it stands at: trials begun, and those that have ended."""

    number: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    uncertainty: float = 0.0
    begun: int = 0
    ended: list[Trial] = field(default_factory=list)
    finished: bool = False
    forward_rows: int = 1  # the prompt's

    def choose(self) -> Trial:
        """Append the best of the trials, all of which have ended."""
        trials = sorted(self.ended, key=lambda trial: trial.number)
        perplexities = tuple(trial.perplexity for trial in trials)
        kept = best_segment(perplexities)
        lengths = tuple(len(trial.tokens) for trial in trials)
        step = len(self.tokens)
        self.decisions.append(Decision(step, self.uncertainty, lengths, perplexities, kept))
        self.tokens += trials[kept].tokens
        self.logprobs += trials[kept].logprobs
        self.finished, self.ended = trials[kept].finished, []
        return trials[kept]

    def result(self) -> CautiousTokens:
        return CautiousTokens(
            np.array(self.tokens, np.int64), np.array(self.logprobs), self.finished,
            tuple(self.decisions), self.forward_rows,
        )  # fmt: skip


class Move(NamedTuple):
    """How a batch goes on: its row i is the last one's row parents[i], and reads one more token.

    waiting: (trial, its row of the last batch), of trials that have to wait; their memory is to be
    kept. adopted: (i, tokens that row i has read since the decision, trial): they are to be
    replaced by that trial's memory.
    """

    parents: list[int]
    tokens: list[int]
    waiting: list[tuple[Trial, int]]
    adopted: list[tuple[int, int, Trial]]


class Rows:
    """Texts that are decoded together: `advance` takes the logits of all trials under way.

    numbers: of the rows, which address their uniforms. room: tokens a row may get. end: ids that
    end a text. ended: told these rows, which of their `lanes` end the text. process: these rows and
    the logits of their lanes -> the log-probabilities to draw from, float64; None: the model's own.
    sample: False takes the likeliest token where there is a single trial; trials are always drawn.
    """

    def __init__(
        self,
        plan: CautiousPlan,
        numbers: Sequence[int],
        room: int,
        *,
        end: Collection[int] = (),
        ended: Callable[[Rows], Sequence[bool]] | None = None,
        process: Callable[[Rows, Any], Any] | None = None,
        sample: bool = True,
        rng: Rng = None,
    ) -> None:
        self.plan, self.room, self.sample = plan, room, sample
        self.end, self.ended, self.process = frozenset(end), ended, process
        self.punctuation = frozenset(int(token) for token in plan.punctuation)
        self.uniforms = RowUniforms(rng)
        self.rows = [Row(int(number)) for number in numbers]
        self.lanes = [Trial(row) for row in range(len(self.rows))] if room > 0 else []

    def text(self, lane: Trial) -> list[int]:
        """The tokens of a lane's text, the prompt's aside."""
        return self.rows[lane.row].tokens + lane.tokens

    def length(self, lane: Trial) -> int:
        """How many they are."""
        return len(self.rows[lane.row].tokens) + len(lane.tokens)

    def advance(self, logits: Any) -> Move:
        """Draw the next token of every lane, begin trials, and choose where all of a row ended.

        logits: (lanes, V). Raises `InputError`, naming the step, for logits that are NaN.
        """
        own, p = self._distributions(logits)
        parents = self._begin(p)
        chosen = categorical.invert(p if len(parents) == len(p) else p[parents], self._uniforms())
        if not self.sample:
            single = [i for i, lane in enumerate(self.lanes) if self.rows[lane.row].begun == 1]
            chosen[single] = p[[parents[i] for i in single]].argmax(-1)
        said = on_host(own[parents, chosen]).tolist()
        raw = self.plan.score == "raw"
        scores = said if raw or own is p else on_host(p[parents, chosen]).tolist()
        tokens = on_host(chosen).tolist()
        for lane, token, logprob, score in zip(self.lanes, tokens, said, scores, strict=True):
            lane.tokens.append(token)
            lane.logprobs.append(logprob)
            lane.score += score
        stopped = [False] * len(self.lanes) if self.ended is None else self.ended(self)
        for lane, stop in zip(self.lanes, stopped, strict=True):
            lane.finished = bool(stop) or lane.tokens[-1] in self.end
            lane.over = lane.finished or self.length(lane) >= self.room
        return self._settle(parents)

    def _distributions(self, logits: Any) -> tuple[Any, Any]:
        """The model's own log-probabilities, and those to draw from."""
        try:
            own = categorical.normalize(logits)
            return own, own if self.process is None else self.process(self, logits)
        except InputError as error:
            finite = [bool(abs(float(row.max())) < np.inf) for row in logits]  # NaN is not
            lane = self.lanes[finite.index(False) if False in finite else 0]
            where = f"row {lane.row}, step {self.length(lane)}"
            raise InputError(f"{error} ({where})") from None

    def _begin(self, p: Any) -> list[int]:
        """Replace each row at a decision by its trials -> the lane that each one was."""
        fresh = [i for i, lane in enumerate(self.lanes) if not lane.tokens]
        if not fresh:
            return list(range(len(self.lanes)))
        unsure = uncertainty(p[fresh], self.plan.measure)
        begun = dict(zip(fresh, self.plan.counts(unsure).tolist(), strict=True))
        for i, value in zip(fresh, unsure.tolist(), strict=True):
            row = self.rows[self.lanes[i].row]
            row.uncertainty, row.begun = value, begun[i]
        parents, lanes = [], []
        for i, lane in enumerate(self.lanes):
            siblings = range(1, begun.get(i, 1))
            parents += [i] * (len(siblings) + 1)
            lanes.append(lane)
            lanes += [Trial(lane.row, j, state=copy.deepcopy(lane.state)) for j in siblings]
        self.lanes = lanes
        return parents

    def _uniforms(self) -> Float:
        """The uniform of each lane's next token, a function of (seed, row, step, trial)."""
        u = np.empty(len(self.lanes))
        known: dict[int, Float] = {}
        for i, lane in enumerate(self.lanes):
            if lane.row not in known:
                row, step = self.rows[lane.row], self.length(lane)
                start, stream, counter = row.number, "tokens", step
                if row.begun > 1:
                    start, stream, counter = step * MOST_TRIALS, "trials", row.number
                stop = start + row.begun
                known[lane.row] = self.uniforms.block(start, stop, stream=stream, round=counter)
            u[i] = known[lane.row][lane.number]
        return u

    def _settle(self, parents: list[int]) -> Move:
        """Trials that ended wait for the others of their row; with the last one it is decided."""
        move = Move([], [], [], [])
        lanes: list[Trial] = []
        places: dict[Trial, int] = {}  # that ended now -> its parent

        def go_on(lane: Trial, parent: int, token: int) -> None:
            lanes.append(lane)
            move.parents.append(parent)
            move.tokens.append(token)
            self.rows[lane.row].forward_rows += 1

        for lane, parent in zip(self.lanes, parents, strict=True):
            row = self.rows[lane.row]
            if not self._ends(lane):
                go_on(lane, parent, lane.tokens[-1])
                continue
            row.ended.append(lane)
            places[lane] = parent
            if len(row.ended) < row.begun:
                continue
            kept = row.choose()
            if kept.over:
                continue
            if kept not in places:
                move.adopted.append((len(lanes), len(lane.tokens) - 1, kept))
            last = places.get(kept, parent)
            go_on(Trial(lane.row, state=kept.state), last, kept.tokens[-1])
        move.waiting.extend(
            (lane, parent) for lane, parent in places.items() if lane in self.rows[lane.row].ended
        )
        self.lanes = lanes
        return move

    def _ends(self, trial: Trial) -> bool:
        cap = self.plan.max_trial_tokens
        capped = cap is not None and len(trial.tokens) >= cap
        marked = trial.tokens[-1] in self.punctuation
        return marked or capped or trial.over or self.rows[trial.row].begun == 1


# ── any function that gives logits ──────────────────────────────────────────────────────────────


def truncation(**how: Any) -> Callable[[Rows, Any], Any] | None:
    """`Rows`' process for temperature, top_k, top_p and min_p; None where they change nothing.

    Raises `InputError` as `categorical.truncate`.
    """
    categorical.truncate(np.zeros(1), **how)
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if {**neutral, **how} == neutral:
        return None
    return lambda rows, logits: categorical.truncate(logits, **how)


def cautious_decode(
    next_logits: Callable[[list[list[int]]], Any],
    prompts: Sequence[Sequence[int]],
    plan: CautiousPlan,
    *,
    max_new_tokens: int,
    end: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    sample: bool = True,
    rng: Rng = None,
    first: int = 0,
) -> list[CautiousTokens]:
    """A continuation of each prompt by cautious decoding, from any function that gives logits.

    next_logits: k texts as token ids -> array or tensor (k, V), the logits of what comes next; it
    is asked for all trials of all prompts at once. prompts: token ids. end: ids that end a text.
    temperature, top_k, top_p, min_p: as `categorical.truncate`; uncertainty and trials are of what
    is left. sample: False for the likeliest token wherever there is a single trial. rng: a seed.
    first: the number of the first prompt, where they come in portions. max_new_tokens 0 returns
    empty texts.

    Raises `InputError` for a negative max_new_tokens, as `CautiousPlan` and `truncate`, and for
    logits that are NaN, naming the step. Wang et al. 2025, arXiv 2507.03038. Sequential.
    O(T (1 + p̄ (n_max - 1))) rows of logits for T tokens, p̄ the share of decisions with trials.

    >>> coin = lambda texts: np.log([[0.45, 0.45, 0.1]] * len(texts))  # token 2 ends a sentence
    >>> found = cautious_decode(coin, [[0]], CautiousPlan([2]), max_new_tokens=50, end=[2], rng=0)
    >>> len(found[0].decisions[0].lengths), found[0].ids[-1].item()
    (6, 2)
    """
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "a count")
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    numbers = [(first + i) * SAMPLES_OF_A_PROMPT for i in range(len(prompts))]
    rows = Rows(
        plan, numbers, max_new_tokens, end=end, process=truncation(**how), sample=sample, rng=rng
    )
    while rows.lanes:
        rows.advance(next_logits([[*prompts[t.row], *rows.text(t)] for t in rows.lanes]))
    return [row.result() for row in rows.rows]
