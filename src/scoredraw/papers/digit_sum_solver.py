"""A small solver that makes mistakes and can start again: some digits, and their sum modulo 10.

A response is the running sums, then `=d`, then the end. Half of the training responses are clean.
In the others one running sum is replaced by a random digit and the error goes on; they are cut at
a random later place or after `=d`, and `<wait>` and a clean response follow. In half of all, a
neutral token stands at a random place and changes nothing. Both tokens are input only: they are no
targets, and cannot be sampled.

So the solver errs about as often as its examples do, and after `<wait>` it is right as far as it
has learnt to count. That a trigger helps is built in: what this is good for is to test a driver.
Few digits are learnt first and one more at a time; all at once takes several times as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw import categorical
from scoredraw.journal import atomic_path
from scoredraw.language.deepening_generation import Request, deepening_traces, token_uniforms
from scoredraw.language.iterative_deepening import DeepeningPlan, SelfCorrection, Trace
from scoredraw.language.selection_curves import select_at_k
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.training import one_thread
from scoredraw.uniforms import RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]

EQUALS, END, WAIT, NEUTRAL, COLON, TOKENS = 10, 11, 12, 13, 14, 15
INPUT_ONLY = [WAIT, NEUTRAL, COLON]
IGNORED = -100
PLAIN, PLACEBO, AT_END, FORCED = "plain", "placebo, γ = 2", "one at the end", "budget forcing"
FACTORS = (1.5, 2.0, 4.0)
DEEP = "deepening, γ = 2"
MOST = 4  # triggers that the law is followed for
VOTERS, DEEP_VOTERS = 10, 4  # samples of a problem: plain, and interrupted
HIDDEN, LAYERS = 128, 2
LEARNING_RATE, WARM_UP = 6e-3, 50
FEWEST, RAMP = 3, 0.8


def questions(count: int, digits: int, rng: np.random.Generator) -> Int:
    """Prompts: the digits and a colon, int64 (count, digits + 1)."""
    drawn = rng.integers(0, 10, (count, digits))
    return np.concatenate([drawn, np.full((count, 1), COLON)], axis=1)


def solutions(prompts: Int) -> Int:
    """The right response of each prompt, (B, digits + 3)."""
    sums = np.cumsum(prompts[:, :-1], axis=1) % 10
    ones = np.ones((len(prompts), 1), np.int64)
    return np.concatenate([sums, EQUALS * ones, sums[:, -1:], END * ones], axis=1)


def segment_answers(traces: Sequence[Trace], segments: int) -> Int:
    """The answer `=d` of each response's first segments, between triggers: (B, S), -1 for none.

    The last of a segment counts; a segment without one keeps the answer of the one before.
    """
    found = np.full((len(traces), segments), -1)
    for row, trace in zip(found, traces, strict=True):
        ids = trace.ids[trace.ids != NEUTRAL]
        places = np.flatnonzero((ids[:-1] == EQUALS) & (ids[1:] < 10))
        segment = np.cumsum(ids == WAIT)[places]
        for place, where in zip(places, segment, strict=True):
            row[where:] = ids[place + 1]
    return found


def final_answers(traces: Sequence[Trace]) -> Int:
    """The last `=d` of each response, (B,), -1 for none."""
    most = max((len(trace.trigger_spans) for trace in traces), default=0)
    return segment_answers(traces, most + 1)[:, -1]


# ── lessons ─────────────────────────────────────────────────────────────────────────────────────


def lesson(prompts: Int, rng: np.random.Generator) -> Int:
    """Training sequences (B, 3 digits + 8): prompt and response, padded with END on the right."""
    batch, clean = len(prompts), solutions(prompts)
    digits, length = prompts.shape[1] - 1, clean.shape[1]
    wrong = rng.random(batch) < 0.5
    place = rng.integers(0, digits, batch)
    error = (rng.integers(0, 10, batch) - clean[np.arange(batch), place]) % 10
    spoilt = clean[:, :-1].copy()
    later = np.arange(digits) >= place[:, None]
    spoilt[:, :digits] = (spoilt[:, :digits] + error[:, None] * later) % 10
    spoilt[:, -1] = spoilt[:, digits - 1]
    cut = rng.integers(place + 1, digits + 2)  # after so many sums, or after `=d`
    cut = np.where(cut > digits, length - 1, cut)
    wait, neutral = np.full((batch, 1), WAIT), np.full((batch, 1), NEUTRAL)
    columns = np.concatenate([spoilt, wait, clean, neutral], axis=1)
    order = np.tile(np.arange(columns.shape[1], dtype=float), (batch, 1))  # inf: left out
    order[:, :length][~wrong] = np.inf
    order[:, : length - 1][np.arange(length - 1) >= cut[:, None]] = np.inf
    before = rng.integers(np.where(wrong, 0, length), 2 * length)
    order[:, -1] = np.where(rng.random(batch) < 0.5, before - 0.5, np.inf)
    by_order = np.argsort(order, axis=1, kind="stable")
    left_out = np.isinf(np.take_along_axis(order, by_order, 1))
    response = np.where(left_out, END, np.take_along_axis(columns, by_order, 1))
    return np.concatenate([prompts, response], axis=1)


def targets(sequences: Int) -> Int:
    """What follows each token but the last, (B, T - 1), IGNORED where that isn't to be learnt."""
    following = sequences[:, 1:].copy()
    ended = np.cumsum(sequences == END, axis=1)[:, :-1] > 0
    prompt = np.cumsum(sequences == COLON, axis=1)[:, :-1] == 0
    following[ended | prompt | np.isin(following, INPUT_ONLY)] = IGNORED
    return following


# ── the solver ──────────────────────────────────────────────────────────────────────────────────


class Solver(torch.nn.Module):
    """A recurrent net over the tokens: two layers of gated units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(TOKENS, HIDDEN)
        self.cells = torch.nn.GRU(HIDDEN, HIDDEN, LAYERS, batch_first=True)
        self.read = torch.nn.Linear(HIDDEN, TOKENS)
        for name, weight in self.cells.named_parameters():
            if name.startswith("weight_hh"):  # each gate's own: what is remembered stays
                for gate in weight.data.chunk(3):
                    torch.nn.init.orthogonal_(gate)

    def forward(self, ids: torch.Tensor) -> Any:
        """Logits of what comes next, (B, T, V)."""
        return self.read(self.cells(self.embed(ids))[0])

    def after(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The state (L, B, H) after texts of any lengths."""
        from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

        ids = pad_sequence([torch.as_tensor(list(text)) for text in contexts], batch_first=True)
        lengths = torch.tensor([len(text) for text in contexts])
        packed = pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=False
        )
        state: torch.Tensor = self.cells(packed)[1]
        return state


def train(digits: int, steps: int, batch: int, seed: int) -> Solver:
    """A solver trained by Adam on fresh lessons; one thread.

    Three digits at first. From 0.8 of the steps on it is all of them, and the rate falls to zero.
    """
    rng = np.random.default_rng(seed)
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(seed)
        solver = Solver()
        optimizer = torch.optim.Adam(solver.parameters(), lr=LEARNING_RATE)
        for step in range(steps):
            sequences = lesson(questions(batch, digits_at(step / steps, digits), rng), rng)
            sequences = sequences[:, : int((sequences != END).sum(1).max()) + 1]
            loss = torch.nn.functional.cross_entropy(
                solver(torch.from_numpy(sequences[:, :-1])).flatten(0, 1),
                torch.from_numpy(targets(sequences)).flatten(),
                ignore_index=IGNORED,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
            share = min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / (1 - RAMP))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share
            optimizer.step()
    return solver.eval()


def trained(digits: int, steps: int, batch: int, seed: int) -> Solver:
    """`train`, kept in the cache directory."""
    settings = (digits, steps, batch, seed, HIDDEN, LAYERS, LEARNING_RATE, WARM_UP, FEWEST, RAMP)
    key = hashlib.sha256(f"{settings} {torch.__version__}".encode()).hexdigest()[:16]
    path = cache_directory() / f"digit-sums-{key}.pt"
    if path.is_file():
        solver = Solver()
        solver.load_state_dict(torch.load(path, weights_only=True))
        return solver.eval()
    solver = train(digits, steps, batch, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(solver.state_dict(), temporary)
    return solver


def digits_at(progress: float, digits: int) -> int:
    """How many digits a lesson has at a share of the training.

    >>> [digits_at(share, 6) for share in (0, 0.3, 0.5, 0.7, 0.8, 1)]
    [3, 4, 5, 6, 6, 6]
    """
    stages = max(digits - FEWEST, 0) + 1
    return min(digits, FEWEST + int(progress / RAMP * stages))


def sampler(solver: Solver, uniforms: RowUniforms) -> Any:
    """The solver as a generator for `deepening_traces`, at temperature 1, reading all afresh.

    A token is decided by the row and how many it has sampled, so plans are compared on the same
    luck until their first trigger.
    """

    def generate_all(requests: list[Request]) -> list[list[int]]:
        rows = np.array([request.row for request in requests])
        sampled = np.array([request.sampled for request in requests])
        room = np.array([request.room for request in requests])
        made: list[list[int]] = [[] for _ in requests]
        going = np.arange(len(requests))
        with torch.inference_mode(), one_thread():
            state = solver.after([request.ids for request in requests])
            for step in range(int(room.max())):
                logits = solver.read(state[-1])
                logits[:, INPUT_ONLY] = -torch.inf
                u = token_uniforms(uniforms, rows[going], sampled[going] + step)
                tokens = categorical.invert(categorical.normalize(logits), u)
                for place, token in zip(going, tokens.tolist(), strict=True):
                    made[place].append(token)
                goes_on = (tokens.numpy() != END) & (room[going] > step + 1)
                going = going[goes_on]
                if not going.size:
                    break
                state, tokens = state[:, goes_on], tokens[goes_on]
                state = solver.cells(solver.embed(tokens[:, None]), state.contiguous())[1]
        return made

    return generate_all


def response_logprobs(solver: Solver, prompts: Int, traces: Sequence[Trace]) -> Float:
    """log p of the generated tokens after the last trigger of each response, (B,): a reward."""
    from torch.nn.utils.rnn import pad_sequence

    texts = [[*prompt, *trace.ids] for prompt, trace in zip(prompts, traces, strict=True)]
    ids = pad_sequence([torch.as_tensor(text) for text in texts], batch_first=True)
    begins = [trace.trigger_spans[-1][1] if trace.trigger_spans else 0 for trace in traces]
    place = np.arange(ids.shape[1] - 1) + 1 - prompts.shape[1]  # of each target in its response
    counts = (place >= np.array(begins)[:, None]) & (
        place < np.array([len(trace.ids) for trace in traces])[:, None]
    )
    with torch.inference_mode(), one_thread():
        logits = solver(ids[:, :-1])
        logits[..., INPUT_ONLY] = -torch.inf
        said = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    return np.asarray(np.where(counts, said.numpy(), 0.0).sum(1))


# ── what it does under each plan ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """One solver: accuracy and tokens of every plan, choices among responses, and the law.

    read: input tokens with a cache and without. after: the shares that are right after 0 .. MOST
    triggers. vote, best: by the number of plain samples; deep_vote, deep_best: of interrupted
    ones. kept: every response was interrupted where its plan says.
    """

    accuracy: dict[str, float]
    generated: dict[str, float]
    read: dict[str, tuple[float, float]]
    law: SelfCorrection
    after: Float
    vote: Float
    best: Float
    deep_vote: Float
    deep_best: Float
    kept: bool

    def affordable(self, responses: int = 1, arm: str = DEEP) -> int:
        """As many plain samples as the tokens of some responses of a plan pay for."""
        ratio = self.generated[arm] / self.generated[PLAIN]
        return min(max(int(1.01 * responses * ratio), 1), VOTERS)  # 1.999 samples are two


def arms(b0: int, total: int) -> dict[str, DeepeningPlan]:
    """The plans that are compared, all of the same budget."""
    found = {PLAIN: DeepeningPlan.plain(total)}
    for gamma in FACTORS:
        found[f"deepening, γ = {gamma:g}"] = DeepeningPlan.geometric(b0, gamma, total, [WAIT])
    for step in (b0, 2 * b0, 4 * b0):
        found[f"every {step}"] = DeepeningPlan.every(step, total, [WAIT])
    found[AT_END] = DeepeningPlan.at_the_end(total, [WAIT])
    found[FORCED] = DeepeningPlan.forced(total // 2, total, [WAIT])
    found[PLACEBO] = DeepeningPlan.geometric(b0, 2, total, [NEUTRAL])
    return found


def examine(
    solver: Solver, plans: dict[str, DeepeningPlan], prompts: int, digits: int, seed: int
) -> Outcome:
    """Put a solver to every plan, on fresh prompts; P0, u and v come from others."""
    random = np.random.default_rng([seed, 1])
    first, second = (questions(prompts, digits, random) for _ in range(2))
    truth = solutions(second)[:, -2]

    def respond(asked: Int, plan: DeepeningPlan, stream: int) -> list[Trace]:
        generate = sampler(solver, RowUniforms(3 * seed + stream))
        return deepening_traces(generate, asked.tolist(), plan, end=[END])

    def choices(plan: DeepeningPlan, n: int) -> list[Float]:
        """Accuracy of the vote, and of the likeliest last segment, over 1 .. n responses."""
        asked = np.repeat(second, n, axis=0)
        traces = respond(asked, plan, 2)
        found = final_answers(traces).reshape(-1, n)
        rewards = response_logprobs(solver, asked, traces).reshape(-1, n)
        answers, correct = np.where(found < 0, np.nan, found), found == truth[:, None]
        return [
            select_at_k(answers, rewards, correct, np.arange(1, n + 1), method).accuracy
            for method in ("majority", "bon")
        ]

    reflect = DeepeningPlan.at_the_end((MOST + 2) * (digits + 3), [WAIT], MOST)
    before, states = (
        segment_answers(respond(asked, reflect, stream), MOST + 1) == solutions(asked)[:, -2:-1]
        for stream, asked in enumerate((first, second))
    )
    made = {name: respond(second, plan, 1) for name, plan in plans.items()}
    accounts = {
        name: np.mean([trace.account(digits + 1) for trace in traces], 0)
        for name, traces in made.items()
    }
    (vote, best), (deep_vote, deep_best) = (
        choices(plans[arm], n) for arm, n in ((PLAIN, VOTERS), (DEEP, DEEP_VOTERS))
    )
    return Outcome(
        {name: float((final_answers(traces) == truth).mean()) for name, traces in made.items()},
        {name: float(account[0]) for name, account in accounts.items()},
        {name: (float(account[2]), float(account[3])) for name, account in accounts.items()},
        SelfCorrection.of(before[:, 0], before[:, 1]),
        states.mean(0),
        vote,
        best,
        deep_vote,
        deep_best,
        all(follows(plan, made[name]) for name, plan in plans.items()),
    )


def follows(plan: DeepeningPlan, traces: Sequence[Trace]) -> bool:
    """Whether the traces of a plan that stops at the end were cut where it says."""
    if plan.on_finish != "stop":
        return all(trace.n_generated <= plan.total for trace in traces)
    return all(
        trace.n_generated <= plan.total
        and trace.cut_positions.tolist() == [c for c in plan.cuts if c < trace.n_generated]
        for trace in traces
    )
