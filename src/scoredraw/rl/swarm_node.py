"""A node of a swarm that lives in a folder: problems in, rounds with the others', a model out.

    own answers -> published -> some of the others' -> own reward -> one update -> again

`SAPORunner` makes the rounds and `CausalPolicy` the update; here are the problems, the order in
which they are asked, checkpoints, and what came from whom. All randomness of a round is a function
of (seed, name of the node, round), so that a run goes on where it stopped and two nodes with one
seed still ask and answer differently. What the others send, and when, no seed decides.

Amico et al. 2025 (SAPO), arXiv 2509.08721.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path
from scoredraw.rl.policy_training import (
    EMBEDDED,
    FOLDER,
    Row,
    claim_folder,
    find_reward,
    open_policy,
    pass_at,
    read_problems,
    reads_answers,
    rewards_of_samples,
)
from scoredraw.rl.reward_functions import (
    GuardedReward,
    RewardFunction,
    load_reward,
    number_or_none,
)
from scoredraw.rl.rollout_groups import LIMITS, RolloutGroup, check_name
from scoredraw.rl.swarm_buffer import SwarmBuffer, SwarmSample, check_selection
from scoredraw.rl.swarm_training import CausalPolicy, RoundRecord, SAPORunner
from scoredraw.rl.swarm_transports import Transport
from scoredraw.uniforms import Rng

POLL = 0.05  # seconds between looks at a transport that can't wake us
FLOWS = {"published", "received", "accepted", "drawn"}  # the counts that are no reason of a drop
OPTIONS: dict[str, tuple[str, ...]] = {
    "buffer": ("ttl", "max_groups", "max_characters", "peer_share"),
    "runner": ("external_weight", "reuse"),
    "policy": (
        "temperature", "epochs", "minibatch", "eps_low", "eps_high", "clamp", "max_norm",
    ),
}  # fmt: skip
WHOLE = {"max_groups", "max_characters", "epochs", "minibatch"}

Progress = Callable[[int, int, Row, Counter[str]], None]
Answers = Callable[[Sequence[str], int], Sequence[Sequence[str]]]  # k answers to each prompt


@dataclass(frozen=True)
class NodeRun:
    """A finished run of a node.

    log: a row a round; before and after: pass@k of held-out problems by k; counts: of
    `SwarmBuffer`, over the whole run; taken: groups drawn, by the name of who sent them.
    """

    folder: Path
    log: list[Row]
    before: dict[int, float]
    after: dict[int, float]
    counts: Counter[str]
    taken: Counter[str]
    seconds: float


def dropped(counts: Mapping[str, int]) -> dict[str, int]:
    """The groups and payloads that were dropped, by reason, out of a buffer's counts.

    >>> dropped({"received": 5, "accepted": 3, "duplicate": 2})
    {'duplicate': 2}
    """
    return {reason: n for reason, n in sorted(counts.items()) if reason not in FLOWS}


# ── what a node asks, and how it scores ─────────────────────────────────────────────────────────


def question_groups(rows: Sequence[Mapping[str, Any]], generations: int) -> list[RolloutGroup]:
    """Each problem as the group that will be sent, its answers still empty.

    The columns besides prompt and answer travel as meta. Raises InputError naming the row for what
    cannot travel: prompts that are no text, lists and long texts in columns.

    >>> question_groups([{"prompt": "1+1=", "answer": "2", "level": 1}], 4)[0].meta
    {'level': 1}
    """
    fits = 2 <= generations <= LIMITS.completions
    require(fits, "generations", generations, f"2 to {LIMITS.completions} answers a problem")
    found = []
    for i, row in enumerate(rows):
        meta = {key: value for key, value in row.items() if key not in ("prompt", "answer")}
        answer = "" if row.get("answer") is None else row["answer"]
        try:
            found.append(RolloutGroup(row["prompt"], ("",) * generations, answer, meta))
            LIMITS.check(found[-1])
        except InputError as problem:
            raise InputError(f"problems, row {i}: {problem}") from None
    return found


class SwarmColumns:
    """A reward under TRL's contract, for groups of a swarm: it gets the columns by their names.

    columns: those of the node's own problems. A sender that lacks one has None there; so has an
    empty answer, which nothing can be compared with.

    >>> def about(prompts, completions, level, **_): return level
    >>> SwarmColumns(about, ["level"])(["q"] * 2, ["", ""], [""] * 2, [{"level": 1}, {}])
    [1, None]
    """

    def __init__(self, reward: Callable[..., Any], columns: Sequence[str]) -> None:
        self.reward, self.columns = reward, [name for name in columns if name != "prompt"]
        self.__name__ = getattr(reward, "__name__", "reward")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str],
        meta: Sequence[Mapping[str, Any]], **_: Any,
    ) -> Any:  # fmt: skip
        found: dict[str, Any] = {name: [m.get(name) for m in meta] for name in self.columns}
        if "answer" in found:
            found["answer"] = [text or None for text in answer]
        return self.reward(prompts=prompts, completions=completions, **found)


class Questions:
    """A node's own problems, n at a time, each as often as the others, and its answers to them.

    answers: as `CausalPolicy.answers`. Each pass has an order of its own, by words, (seed, name of
    the node), and pass. asked: the questions that have been asked, on which alone it depends what
    comes next.
    """

    def __init__(
        self, groups: Sequence[RolloutGroup], answers: Answers, words: Sequence[int]
    ) -> None:
        self.groups, self.answers, self.words = groups, answers, words
        self.asked = 0

    def __call__(self, n: int) -> list[RolloutGroup]:
        some = [self.groups[i] for i in self._next(n)]
        texts = self.answers([group.prompt for group in some], len(some[0].completions))
        return [replace(g, completions=tuple(a)) for g, a in zip(some, texts, strict=True)]

    def _next(self, n: int) -> list[int]:
        P = len(self.groups)
        first, last = self.asked // P, (self.asked + n - 1) // P
        orders = [self._order(k) for k in range(first, last + 1)]
        start = self.asked - first * P
        self.asked += n
        found: list[int] = np.concatenate(orders)[start : start + n].tolist()
        return found

    def _order(self, k: int) -> NDArray[np.int64]:
        source = np.random.SeedSequence(self.words, spawn_key=(0, k))
        return np.random.default_rng(source).permutation(len(self.groups))


class PatientBuffer(SwarmBuffer):
    """A `SwarmBuffer` that waits for groups of others before a draw, and knows whose were drawn.

    patience: seconds at most, while there are fewer groups than asked for; 0 never waits. After a
    wait in which nobody was heard it doesn't wait again before somebody is: the others may have
    gone.
    """

    def __init__(
        self, transport: Transport, peer: str, *, patience: float = 0.0, **options: Any
    ) -> None:
        super().__init__(transport, peer, **options)
        require(0 <= patience < math.inf, "patience", patience, "seconds, 0 or more")
        self.patience, self.taken = patience, Counter[str]()
        self._given_up = False

    def sample(
        self, n: int, selection: str = "nonzero_uniform",
        reward_fn: Callable[..., Any] | None = None, rng: Rng = None, *, reuse: bool = False,
    ) -> SwarmSample:  # fmt: skip
        """As `SwarmBuffer.sample`, after the wait."""
        if self.patience > 0 and n > 0:
            self._wait_for(n)
        found = super().sample(n, selection, reward_fn, rng, reuse=reuse)
        self.taken.update(group.peer for group in found.groups)
        return found

    def _wait_for(self, n: int) -> None:
        heard = self.collect()
        end = self._clock() + (self.patience if heard or not self._given_up else 0.0)
        wait = getattr(self.transport, "wait", None)
        while len(self) < n and (left := end - self._clock()) > 0:
            if wait is None:
                time.sleep(min(left, POLL))
            else:
                wait(left)
            heard += self.collect()
        self._given_up = not heard and len(self) < n


# ── the run ─────────────────────────────────────────────────────────────────────────────────────


def train_node(
    problems: Sequence[Mapping[str, Any]], out: Path, transport: Transport, *, node: str,
    model: str = EMBEDDED, reward: str | RewardFunction = "exact", rounds: int = 100,
    local: int = 4, external: int = 4, generations: int = 8, selection: str = "nonzero_uniform",
    learning_rate: float | None = None, max_tokens: int | None = None, held_out: int = 32,
    samples: int = 8, save_every: int = 10, patience: float = 0.0, verify: str | None = None,
    seed: int = 0, options: Mapping[str, Any] | None = None, progress: Progress | None = None,
) -> NodeRun:  # fmt: skip
    """Train `model` as one node of the swarm behind `transport`; leave it in the folder `out`.

    problems: as `read_problems`, with text prompts and columns that can be sent; the last
    `held_out` (at most a quarter) only measure. node: its name in the swarm, no other's. model: a
    folder of transformers, or "embedded". reward: as `find_reward`, or a function under TRL's
    contract, for one's own answers and the others'. A round has `local` groups of one's own and
    `external` of others, by `selection`, with `generations` answers a group. learning_rate: of
    Adam, 1e-6 (embedded 5e-5). max_tokens: of an answer, 256 (embedded 48). samples: answers a
    held-out problem. patience: see `PatientBuffer`; before the first round also seconds to wait
    for a node, where the transport can tell. verify: "module:function" from a group to whether it
    may be scored, for senders may lie about an answer. options: see OPTIONS. progress: called
    after each round with the round, all rounds, its numbers and the counts so far.

    The same call resumes an interrupted run from its last checkpoint (every save_every rounds). It
    does not remember whose groups it had: those younger than ttl that still lie in a `Directory`
    come again and may be drawn again; over Zenoh, what was said meanwhile is lost.

    Groups are strangers' texts: a reward that runs an answer or a column runs what they wrote.

    Raises InputError for all that makes no sense, before anything is written.
    """
    begun = time.perf_counter()
    check_name(node, "node")
    for name, count in (("rounds", rounds), ("save_every", save_every)):
        require(count >= 1, name, count, "a positive count")
    for name, count in (("held_out", held_out), ("samples", samples), ("seed", seed)):
        require(count >= 0, name, count, "0 or more")
    scorer = find_reward(reward) if isinstance(reward, str) else GuardedReward(reward)
    rows = _rows(problems, reward)
    groups = question_groups(rows, generations)
    spared = min(held_out, len(rows) // 4)
    measured, asked = rows[len(rows) - spared :], groups[: len(rows) - spared]
    parts = node_options(options or {})
    small = model == EMBEDDED
    learning_rate = (5e-5 if small else 1e-6) if learning_rate is None else learning_rate
    max_tokens = (48 if small else 256) if max_tokens is None else max_tokens
    buffer = PatientBuffer(
        transport, node, patience=patience,
        verify_answer=None if verify is None else _verifier(verify), **parts["buffer"],
    )  # fmt: skip
    check_selection(external, selection)
    policy = _policy(model, learning_rate, max_tokens, parts["policy"])
    words = (seed, *node.encode())
    draws, questions = np.random.default_rng(words), Questions(asked, policy.answers, words)
    runner = SAPORunner(
        policy, questions, SwarmColumns(scorer, list(rows[0])), buffer, local, external,
        selection=selection, rng=draws, **parts["runner"],
    )  # fmt: skip
    settings = {
        "node": node, "model": model, "reward": scorer.__name__, "rounds": rounds, "local": local,
        "external": external, "generations": generations, "selection": selection,
        "learning_rate": learning_rate, "max_tokens": max_tokens, "seed": seed,
        "problems": len(asked), "held_out": spared, "samples": samples, "verify": verify,
        "options": dict(options or {}),
    }  # fmt: skip
    claim_folder(out, settings)

    quality = partial(_quality, policy, measured, scorer, samples, max_tokens, seed)
    state = _State.read(out, policy) or _State(quality())
    runner.rounds, questions.asked = len(state.log), len(state.log) * local
    if patience and hasattr(transport, "wait_for_peer"):
        transport.wait_for_peer(patience)
    device = policy.model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for t in _rounds(runner, buffer, draws, words, rounds, state):
            if t % save_every == 0 or t == rounds:
                state.write(out, policy)
            if progress is not None:
                progress(t, rounds, state.log[-1], state.counts)
    run = NodeRun(
        out, state.log, state.before, quality(), state.counts, state.taken,
        time.perf_counter() - begun,
    )  # fmt: skip
    _leave(run, policy, settings)
    return run


def _rows(
    problems: Sequence[Mapping[str, Any]], reward: str | RewardFunction
) -> list[dict[str, Any]]:
    """The problems; the answer is the text that others get, so that all score the same."""
    rows = read_problems(problems)
    reads_answers(reward, rows)
    return [
        row if row.get("answer") is None else {**row, "answer": str(row["answer"])} for row in rows
    ]


def _verifier(place: str) -> Callable[[RolloutGroup], bool]:
    try:
        found: Callable[..., Any] = load_reward(place)
    except InputError as problem:
        raise InputError(str(problem).replace("reward", "verify", 1)) from None
    return found


def _policy(model: str, rate: float, max_tokens: int, options: Mapping[str, Any]) -> CausalPolicy:
    require(0 < rate < math.inf, "learning_rate", rate, "more than 0")
    there = model == EMBEDDED or Path(model).is_dir()
    require(there, "model", repr(model), "embedded, or a folder of transformers")
    net, tokenizer = open_policy(str(FOLDER) if model == EMBEDDED else model)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.Adam(net.parameters(), rate)
    one_step = {"minibatch": None} if model == EMBEDDED else {}  # steps of 2 undo it at this rate
    return CausalPolicy(
        net, tokenizer, optimizer, max_new_tokens=max_tokens, **{**one_step, **options}
    )


def node_options(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of the buffer, the runner and the policy, apart; InputError for any other.

    >>> node_options({"ttl": 60, "epochs": 2})["policy"]
    {'epochs': 2}
    """
    every = [name for names in OPTIONS.values() for name in names]
    for name, value in given.items():
        require(name in every, name, "an option that a node does not have", ", ".join(every))
        if name == "reuse":
            require(isinstance(value, bool), name, repr(value), "True or False")
        elif value is not None or name != "minibatch":
            kind = int if name in WHOLE else (int, float)
            number = isinstance(value, kind) and type(value) is not bool
            wanted = "a whole number" if name in WHOLE else "a number"
            require(number and math.isfinite(value), name, repr(value), wanted)
    return {
        part: {name: given[name] for name in names if name in given}
        for part, names in OPTIONS.items()
    }


def _quality(
    policy: CausalPolicy, problems: Sequence[Mapping[str, Any]], reward: RewardFunction, n: int,
    max_tokens: int, seed: int,
) -> dict[int, float]:  # fmt: skip
    """pass@k of n answers to each held-out problem; nothing where there are none."""
    if not problems or n < 1:
        return {}
    found = rewards_of_samples(
        policy.model, policy.tokenizer, problems, reward, n=n, max_tokens=max_tokens, seed=seed
    )
    return pass_at(np.nan_to_num(found, nan=0.0))


def _rounds(
    runner: SAPORunner, buffer: PatientBuffer, draws: np.random.Generator, words: Sequence[int],
    rounds: int, state: _State,
) -> Iterator[int]:  # fmt: skip
    """Round after round, each from its own seed; when one comes, the state has its row."""
    counts, taken = state.counts, state.taken  # of earlier lives of this run
    for t in range(runner.rounds, rounds):
        source = np.random.SeedSequence(words, spawn_key=(1, t))
        torch.manual_seed(int(source.generate_state(1)[0]))
        draws.bit_generator.state = np.random.PCG64(source).state
        record, before = runner.round(), state.counts
        state.counts, state.taken = counts + buffer.counts, taken + buffer.taken
        state.log.append(_row(record, before, state.counts))
        yield record.round


def _row(record: RoundRecord, before: Counter[str], now: Counter[str]) -> Row:
    found = {
        "reward": record.reward, "external": record.external, "eligible": record.eligible,
        "missing": record.missing, "stepped": record.stepped,
        "heard": now["received"] - before["received"],
        "dropped": sum(dropped(now).values()) - sum(dropped(before).values()), **record.metrics,
    }  # fmt: skip
    numbers = {key: number_or_none(value) for key, value in found.items()}
    return {key: value for key, value in numbers.items() if value is not None}


# ── what is kept ────────────────────────────────────────────────────────────────────────────────


@dataclass
class _State:
    """All that a run goes on from besides policy and seed: the round is the length of the log."""

    before: dict[int, float]
    log: list[Row] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)

    def write(self, out: Path, policy: CausalPolicy) -> None:
        """A new checkpoint in the place of the last."""
        old = last_checkpoint(out)
        path = out / "checkpoints" / f"round-{len(self.log)}.pt"
        path.parent.mkdir(exist_ok=True)
        whole = {
            "before": self.before, "log": self.log, "counts": dict(self.counts),
            "taken": dict(self.taken), "model": policy.model.state_dict(),
            "optimizer": policy.optimizer.state_dict(),
        }  # fmt: skip
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(whole, file)
        if old is not None and old[1] != path:
            old[1].unlink()

    @classmethod
    def read(cls, out: Path, policy: CausalPolicy) -> _State | None:
        """The last checkpoint, put into the policy; None where there is none."""
        found = last_checkpoint(out)
        if found is None:
            return None
        whole = torch.load(found[1], map_location=policy.model.device, weights_only=True)
        policy.model.load_state_dict(whole["model"])
        policy.optimizer.load_state_dict(whole["optimizer"])
        counts, taken = Counter(whole["counts"]), Counter(whole["taken"])
        return cls(whole["before"], whole["log"], counts, taken)


def last_checkpoint(out: Path) -> tuple[int, Path] | None:
    """The round and the file of a run's last checkpoint, None where there is none."""
    found = [(int(path.stem.removeprefix("round-")), path)
             for path in (out / "checkpoints").glob("round-*.pt")]  # fmt: skip
    return max(found, default=None)


def _leave(run: NodeRun, policy: CausalPolicy, settings: Mapping[str, Any]) -> None:
    """The model and what was measured, in the place of the checkpoints."""
    policy.model.save_pretrained(run.folder / "model")
    policy.tokenizer.save_pretrained(run.folder / "model")
    facts = {
        **settings, "before": run.before, "after": run.after, "counts": run.counts,
        "taken": run.taken, "seconds": run.seconds, "log": run.log,
    }  # fmt: skip
    with atomic_path(run.folder / "run.json") as path:
        path.write_text(json.dumps(facts, indent=1))
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
