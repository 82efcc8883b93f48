"""Sharing rollouts in a swarm: how many, which, and what is left of it at other step sizes.

Eight nodes, nine skills. Node k knows skill k (its right answer has probability 0.9); elsewhere it
believes in one wrong answer that all believe in, and nobody knows the ninth. A policy is a table of
logits over 30 answers a skill. In a round each node draws I skills and answers each 8 times, and
adds J groups of this round that others published: I + J = 8, so that all updates are as large and
only the generating differs. The return of a run is the mean reward of the nodes' own answers over
all rounds. Silos (J = 0) and a uniform draw of others' groups are the baselines, also each at its
best step size, chosen on other seeds. Intervals are over seeds.

The whole library also runs it: texts as JSON through a transport, a `SwarmBuffer` and a
`SAPORunner` a node, without a barrier.

Amico et al., "Sharing is caring: efficient LM post-training with collective RL experience sharing"
(SAPO), 2025, arXiv 2509.08721.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import categorical
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.rollout_groups import RolloutGroup
from scoredraw.rl.swarm_buffer import EPS, SwarmBuffer
from scoredraw.rl.swarm_training import SAPORunner, SwarmBatch
from scoredraw.rl.swarm_transports import InMemory, MemoryHub

Float = NDArray[np.float64]
Int = NDArray[np.int64]

NODES, SKILLS, ANSWERS, G = 8, 9, 30, 8
SURE, RIGHT, BELIEVED = 0.9, 0, 1  # probability; the right answer, and the wrong one
STEP = 0.4
MIXES = ((8, 0), (6, 2), (4, 4), (2, 6))
FILTERED, UNIFORM, TOP, MAGNITUDE = (
    "nonzero_uniform", "uniform", "top_reward", "advantage_magnitude")  # fmt: skip
NAMES = {
    FILTERED: "uniform among groups with a signal", UNIFORM: "uniform", TOP: "top reward",
    MAGNITUDE: "largest mean |A|",
}  # fmt: skip
SAYS = (
    "cumulative reward of 8 Qwen2.5-0.5B on ReasoningGYM: 562 for 8/0, 854 for 6/2, 1093 for 4/4 "
    "(+94 %), 946 for 2/6 (from memory)"
)
SAYS_FILTER = "groups without advantages are dropped, and the rest drawn uniformly"
SAYS_OPEN = "in an open network mid-size models gain most, stronger ones little"
NOTES = (
    (
        "Every node here scores by the same exact reward, and a foreign answer is as likely to be "
        "understood as one's own: more than language models of several kinds have in common."
    ),
    (
        "With exact 0/1 rewards a step only ever raises the right answer of a table: accuracy "
        "never falls, and what oscillates at 2/6 is only the reward, of half as many own answers."
    ),
    "All groups of a round are equally new, so that the selection `newest` is not an arm.",
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    rounds: int = 150
    steps: tuple[float, ...] = (0.2, STEP, 2.0)
    tuning: int = 0  # seeds to choose a step size on
    real: int = 4  # seeds of the whole library
    strengths: bool = True


GRID = (0.1, 0.2, STEP, 1.0, 2.0, 4.0, 8.0, 16.0)
PLANS = {
    "smoke": Plan(2, rounds=25, steps=(STEP,), real=1, strengths=False),
    "quick": Plan(6),
    "full": Plan(32, steps=GRID, tuning=16, real=8),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Every mix and selection, the best step sizes, the library itself, and nodes unlike."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=30, scale=scale, seed=rng)
    mixes = {mix: swarm(plan, mix, FILTERED, plan.steps, [rng, 30, 0, *mix]) for mix in MIXES}
    at = plan.steps.index(STEP)
    add_mixes(report, mixes, at)
    add_selections(report, plan, mixes, at, rng)
    if len(plan.steps) > 1:
        add_steps(report, plan, mixes)
    if plan.tuning:
        add_tuned(report, plan, mixes, rng)
    add_library(report, plan, mixes, at, rng)
    if plan.strengths:
        add_strengths(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.swarm_study import add_swarm_study

        add_swarm_study(report, rng)
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── the tabular swarm ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Run:
    """What L step sizes and S seeds gave, over rounds T and nodes N.

    reward: (T, L, S, N) mean reward of own answers; accuracy: (T, L, S, N) exact, before the round;
    final: (L, S) after the last; signal: (L, S) groups with a signal that were published a round;
    used: (L, S) foreign groups a node and a round.
    """

    reward: Float
    accuracy: Float
    final: Float
    signal: Float
    used: Float

    def returns(self, step: int) -> Float:
        """(S,) mean reward over rounds and nodes."""
        return np.asarray(self.reward[:, step].mean(axis=(0, 2)))


def knowledge(known: Sequence[Sequence[int]]) -> Float:
    """Logits (N, SKILLS, ANSWERS): sure of what is right in known skills, of a wrong one else."""
    p = np.full((len(known), SKILLS, ANSWERS), (1 - SURE) / (ANSWERS - 1))
    p[:, :, BELIEVED] = SURE
    for node, skills in enumerate(known):
        p[node, list(skills), BELIEVED] = (1 - SURE) / (ANSWERS - 1)
        p[node, list(skills), RIGHT] = SURE
    return np.asarray(np.log(p))


SPECIALISTS = tuple((k,) for k in range(NODES))


def swarm(
    plan: Plan,
    mix: tuple[int, int],
    selection: str,
    steps: Sequence[float],
    key: Sequence[int],
    known: Sequence[Sequence[int]] = SPECIALISTS,
    seeds: int | None = None,
) -> Run:
    """All step sizes and seeds at once; they lie along the first axis."""
    local, external = mix
    S, L, N = seeds or plan.seeds, len(steps), len(known)
    rng = np.random.default_rng(list(key))
    B = L * S
    logits = np.tile(knowledge(known), (B, 1, 1, 1))
    lr = np.repeat(steps, S)
    reward, accuracy = np.empty((2, plan.rounds, B, N))
    signal, used = np.zeros((2, B))
    for t in range(plan.rounds):
        accuracy[t] = np.exp(categorical.normalize(logits))[..., RIGHT].mean(axis=2)
        skill = rng.random((B, N, SKILLS)).argsort(axis=2)[..., :local]
        asked = np.take_along_axis(logits, skill[..., None], axis=2)
        logp = categorical.normalize(asked)[..., None, :]
        answer = categorical.invert(logp, rng.random((B, N, local, G)))
        r = (answer == RIGHT).astype(np.float64)
        A = (r - r.mean(axis=3, keepdims=True)) / (r.std(axis=3, ddof=1, keepdims=True) + EPS)
        reward[t] = r.mean(axis=(2, 3))
        signal += (r.std(axis=3) > 0).sum(axis=(1, 2)) / plan.rounds
        learn(logits, skill, answer, A, lr)
        if external:
            chosen, live = choose(r, A, skill, external, selection, rng)
            used += live.sum(axis=(1, 2)) / (N * plan.rounds)
            flat = [x.reshape(B, 1, N * local, -1) for x in (skill, answer, A)]
            skill, answer, A = (np.take_along_axis(x, chosen[..., None], axis=2) for x in flat)
            learn(logits, skill[..., 0], answer, A * live[..., None], lr)
    final = np.exp(categorical.normalize(logits))[..., RIGHT].mean(axis=(1, 2))
    by_step = (plan.rounds, L, S, N)
    return Run(
        reward.reshape(by_step), accuracy.reshape(by_step),
        final.reshape(L, S), signal.reshape(L, S), used.reshape(L, S),
    )  # fmt: skip


def learn(logits: Float, skill: Int, answer: Int, A: Float, lr: Float) -> None:
    """logits += lr Σ_groups (1/G) Σ_i A_i ∇ log pi(y_i), in place.

    ∇ log pi(y) is 1 at y less pi, and pi's part vanishes as ΣA = 0. skill: (B, N, k); answer, A:
    (B, N, k, G).
    """
    B, N, _ = skill.shape
    node = np.arange(B * N).reshape(B, N, 1, 1)
    place = (node * SKILLS + skill[..., None]) * ANSWERS + answer
    weight = (lr / G)[:, None, None, None] * A
    moved = np.bincount(place.ravel(), weight.ravel(), minlength=logits.size)
    logits += moved.reshape(logits.shape)


def choose(
    r: Float, A: Float, skill: Int, n: int, selection: str, rng: np.random.Generator
) -> tuple[Int, NDArray[np.bool_]]:
    """For each node up to n of the other nodes' groups, (B, N, n), and which of them there are.

    The rules of `swarm_buffer.select_groups`, for all nodes at once: the largest keys win.
    """
    B, N, local, _ = r.shape
    P = N * local
    lot = rng.random((B, N, P))
    total = r.sum(axis=3).reshape(B, 1, P)
    live = (r.std(axis=3) > 0).reshape(B, 1, P)
    if selection == UNIFORM:
        live = np.ones_like(live)
    if selection == TOP:  # ascending by (total, peer, question), the last ones
        live = total > 0
        peer = np.repeat(np.arange(N), local)
        lot = (total * N + peer) * SKILLS + skill.reshape(B, 1, P)
    if selection == MAGNITUDE:
        lot = np.abs(A).mean(axis=3).reshape(B, 1, P).round(9) + 1e-9 * lot
    own = np.arange(N)[:, None] == np.repeat(np.arange(N), local)
    keys = np.where(live & ~own, lot, -np.inf)
    n = min(n, P)
    chosen = np.argpartition(-keys, n - 1, axis=2)[..., :n]
    return chosen, np.take_along_axis(keys, chosen, axis=2) > -np.inf


# ── the mixes ───────────────────────────────────────────────────────────────────────────────────


def name_of(mix: tuple[int, int]) -> str:
    return f"{mix[0]}/{mix[1]}"


def add_mixes(report: Report, mixes: dict[tuple[int, int], Run], at: int) -> None:
    """Claims on their order, a table, the inverted U, and how they learn."""
    found = {mix: one.returns(at) for mix, one in mixes.items()}
    order = ((4, 4), (6, 2), (2, 6), (8, 0))
    for better, worse in pairwise(order):
        name = f"mean reward, {name_of(better)} less {name_of(worse)}, step {STEP}"
        gain = paired_difference(found[better], found[worse], comparisons=3)
        report.claims.append(Claim.at_least(name, SAYS, gain, 0.0))
    log = mean_interval(np.log(found[4, 4] / found[8, 0]))
    ratio = Estimate(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.n)
    name = f"mean reward, 4/4 over 8/0, step {STEP}"
    report.claims.append(Claim.at_least(name, SAYS, ratio, 1.94))
    name = "round-to-round deviation of the nodes' mean reward, 2/6 less 4/4"
    gain = paired_difference(wobble(mixes[2, 6], at), wobble(mixes[4, 4], at))
    report.claims.append(Claim.at_least(name, "2/6 oscillates", gain, 0.0))
    rows: list[list[Cell]] = [
        [name_of(mix), mean_interval(found[mix]), mean_interval(one.final[at]),
         mean_interval(one.signal[at]), mean_interval(one.used[at])]
        for mix, one in mixes.items()
    ]  # fmt: skip
    columns = ["own/others'", "mean reward", "final accuracy", "published with a signal", "used"]
    note = "Published: groups a round, of all nodes. Used: of others, a node and a round."
    report.tables.append(ReportTable(f"Mixes, step size {STEP}", columns, rows, note))
    rounds = [*range(len(mixes[4, 4].accuracy))]
    series = [
        Series(
            name_of(mix),
            rounds,
            one.accuracy[:, at].mean(axis=(1, 2)).tolist(),
            baseline=mix == (8, 0),
        )
        for mix, one in mixes.items()
    ]
    title = f"Exact accuracy of the nodes, step size {STEP}"
    report.figures.append(Figure("line", title, "round", "accuracy", series))


def wobble(one: Run, at: int) -> Float:
    """(S,) standard deviation of a round's mean reward about its trend, from first differences."""
    reward = one.reward[:, at].mean(axis=2)
    return np.asarray(np.sqrt((np.diff(reward, axis=0) ** 2).mean(axis=0) / 2))


def add_selections(
    report: Report, plan: Plan, mixes: dict[tuple[int, int], Run], at: int, rng: int
) -> None:
    others = MIXES[1:]
    found: dict[str, list[Float]] = {FILTERED: [mixes[mix].returns(at) for mix in others]}
    for k, selection in enumerate((UNIFORM, TOP, MAGNITUDE), start=1):
        found[selection] = [
            swarm(plan, mix, selection, [STEP], [rng, 30, k, *mix]).returns(0) for mix in others
        ]
    for selection in (UNIFORM, TOP, MAGNITUDE):
        gain = paired_difference(found[FILTERED][1], found[selection][1], comparisons=3)
        name = f"mean reward at 4/4, {NAMES[FILTERED]} less {NAMES[selection]}"
        report.claims.append(Claim.at_least(name, SAYS_FILTER, gain, 0.0))
    silo = mixes[8, 0].returns(at)
    gain = paired_difference(found[UNIFORM][1], silo)
    name = "mean reward at 4/4 without the filter, less 8/0"
    report.claims.append(Claim.at_least(name, "sharing helps", gain, 0.0))
    rows: list[list[Cell]] = [
        [NAMES[s], *map(mean_interval, values)] for s, values in found.items()
    ]
    columns = ["which of the others' groups", *map(name_of, others)]
    note = f"Silos: {mean_interval(silo)}"
    report.tables.append(ReportTable(f"Mean reward, step size {STEP}", columns, rows, note))
    x = [name_of(mix) for mix in MIXES]
    series = []
    for selection, values in found.items():
        each = [mean_interval(v) for v in (silo, *values)]
        y, low, high = np.array([[e.value, e.low, e.high] for e in each]).T
        series.append(Series(NAMES[selection], x, y, low, high, baseline=selection == UNIFORM))
    title = f"Own groups / others' groups, step size {STEP}"
    report.figures.append(Figure("line", title, "mix", "mean reward", series))


# ── step sizes ──────────────────────────────────────────────────────────────────────────────────


def add_steps(report: Report, plan: Plan, mixes: dict[tuple[int, int], Run]) -> None:
    rows: list[list[Cell]] = [
        [step, *(mean_interval(one.returns(k)) for one in mixes.values())]
        for k, step in enumerate(plan.steps)
    ]
    columns = ["step size", *map(name_of, mixes)]
    report.tables.append(ReportTable("Mean reward by step size", columns, rows))


def add_tuned(report: Report, plan: Plan, mixes: dict[tuple[int, int], Run], rng: int) -> None:
    """Each mix at the step size that was best on seeds of its own."""
    best = {}
    rows: list[list[Cell]] = []
    for mix, one in mixes.items():
        trial = swarm(plan, mix, FILTERED, plan.steps, [rng, 30, 9, *mix], seeds=plan.tuning)
        k = int(np.argmax([trial.returns(i).mean() for i in range(len(plan.steps))]))
        best[mix] = one.returns(k)
        rows.append([name_of(mix), plan.steps[k], mean_interval(best[mix]),
                     mean_interval(one.final[k])])  # fmt: skip
    gains = [(mix, (8, 0)) for mix in MIXES[1:]] + [((4, 4), (2, 6))]
    for mix, base in gains:
        gain = paired_difference(best[mix], best[base], comparisons=len(gains))
        name = f"mean reward, {name_of(mix)} less {name_of(base)}, each at its best step size"
        report.claims.append(Claim.at_least(name, SAYS, gain, 0.0))
    columns = ["own/others'", "best step size", "mean reward", "final accuracy"]
    note = f"Best of {', '.join(f'{s:g}' for s in plan.steps)} on {plan.tuning} other seeds."
    report.tables.append(ReportTable("At the best step sizes", columns, rows, note))


# ── the library itself ──────────────────────────────────────────────────────────────────────────


class TabularNode:
    """A node whose answers are texts "0" to "29", trained by `SAPORunner`."""

    def __init__(self, logits: Float, rng: np.random.Generator) -> None:
        self.logits, self.rng = logits.copy(), rng

    def generate(self, n: int) -> list[RolloutGroup]:
        skills = self.rng.permutation(SKILLS)[:n]
        logp = categorical.normalize(self.logits[skills])[:, None]
        answers = categorical.invert(logp, self.rng.random((n, G)))
        return [
            RolloutGroup(f"skill {skill}", tuple(map(str, row)), str(RIGHT))
            for skill, row in zip(skills, answers.tolist(), strict=True)
        ]

    def step(self, batch: SwarmBatch) -> None:
        skill = np.array([int(prompt.split()[1]) for prompt in batch.prompts])
        answer = np.array([int(text) for text in batch.completions])
        A = (batch.advantages * batch.weights).numpy()
        learn(self.logits[None, None], skill[None, None], answer[None, None, :, None],
              A[None, None, :, None], np.array([STEP]))  # fmt: skip


def exact_match(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right text."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def library_return(plan: Plan, mix: tuple[int, int], seed: Sequence[int]) -> float:
    """Mean reward of eight nodes over JSON and a transport; each takes what has arrived.

    The clock counts rounds and a group lives for one, so that a node sees those of this round that
    came before its own turn, and those of the last one that came after.
    """
    hub, now = MemoryHub(), [0.0]
    streams = np.random.default_rng(list(seed)).spawn(NODES)
    runners = []
    for k, (logits, rng) in enumerate(zip(knowledge(SPECIALISTS), streams, strict=True)):
        node = TabularNode(logits, rng)
        buffer = SwarmBuffer(InMemory(hub), f"node{k}", ttl=1.0, clock=lambda: now[0])
        runners.append(SAPORunner(node.step, node.generate, exact_match, buffer, *mix, rng=rng))
    rewards = []
    for t in range(plan.rounds):
        for k, runner in enumerate(runners):
            now[0] = t + k / NODES
            rewards.append(runner.round().reward)
    return float(np.mean(rewards))


def add_library(
    report: Report, plan: Plan, mixes: dict[tuple[int, int], Run], at: int, rng: int
) -> None:
    found = {
        mix: mean_interval(
            [library_return(plan, mix, [rng, 30, 7, *mix, seed]) for seed in range(plan.real)]
        )
        for mix in ((8, 0), (4, 4))
    }
    rows: list[list[Cell]] = [
        [name_of(mix), real, mean_interval(mixes[mix].returns(at))] for mix, real in found.items()
    ]
    columns = ["own/others'", "texts, transport, no barrier", "tables, all at once"]
    report.tables.append(ReportTable("The whole library, mean reward", columns, rows))
    silo, real = found.values()
    holds = None if plan.real < 2 else bool(real.low > silo.high)
    name = "the whole library without a barrier: mean reward at 4/4"
    rule = "its interval above that of silos"
    report.claims.append(Claim.judge(name, "no barrier is needed", real, rule, holds))


# ── nodes unlike ────────────────────────────────────────────────────────────────────────────────


def add_strengths(report: Report, plan: Plan, rng: int) -> None:
    """Node k knows the first k skills: what each gains from the swarm over being alone."""
    known = [tuple(range(k)) for k in range(NODES)]
    arms = [swarm(plan, mix, FILTERED, [STEP], [rng, 30, 8, *mix], known)
            for mix in ((8, 0), (4, 4))]  # fmt: skip
    alone, shared = (arm.reward[:, 0].mean(axis=0) for arm in arms)
    gain = [paired_difference(shared[:, k], alone[:, k]) for k in range(NODES)]
    middle = (shared - alone)[:, NODES // 2]
    difference = paired_difference(middle, (shared - alone)[:, -1], comparisons=2)
    name = f"gain of the node with {NODES // 2} skills less that of the one with {NODES - 1}"
    report.claims.append(Claim.at_least(name, SAYS_OPEN, difference, 0.0))
    difference = paired_difference(middle, (shared - alone)[:, 0], comparisons=2)
    name = f"gain of the node with {NODES // 2} skills less that of the one with none"
    report.claims.append(Claim.at_least(name, SAYS_OPEN, difference, 0.0))
    rows: list[list[Cell]] = [
        [k, mean_interval(alone[:, k]), mean_interval(shared[:, k]), gain[k]] for k in range(NODES)
    ]
    columns = ["skills known", "alone (8/0)", "in the swarm (4/4)", "gain"]
    report.tables.append(ReportTable("Nodes of unlike strength, mean reward", columns, rows))
    y, low, high = np.array([[g.value, g.low, g.high] for g in gain]).T
    series = [Series("gain", [f"{k} known" for k in range(NODES)], y, low, high)]
    report.figures.append(
        Figure("interval", "Gain of each node from the swarm", series=series, reference=0.0)
    )
