"""PORTool: do trees and step rewards teach a policy to use tools in fewer steps?

A world of five actions a step: two tools that both have to be called, in any order, before the
answer is right; one that helps nothing; one that fails; and the answer. A softmax policy a state is
trained by the score function. Each method is swept over step sizes, its best is found on seeds of
its own, and the methods are compared there, and at equal sizes with equal weights. The policy is
known, so accuracy and number of steps are exact. Then: which weights make a tree stand for the
policy, against an exact gradient; the same in words, with real tools; and a language model (study).

Wu et al., "PORTool", 2025, arXiv 2510.26020 (numbers from a summary; its 17 tools are not here).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from scoredraw import categorical
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.rollout_tree import (
    VARIANTS,
    Proposals,
    RolloutTree,
    portool_advantages,
    step_weights,
    tree_rollout,
)
from scoredraw.rl.tool_calls import (
    DATE_SHIFT,
    ToolSandbox,
    format_limit,
    format_reward,
    parse_step,
    table_tool,
)
from scoredraw.rl.tool_policy import answer_outcome

Int = NDArray[np.int64]
Float = NDArray[np.float64]

STATES, ACTIONS, ERROR, ANSWER, BOTH = 4, 5, 3, 4, 3
N, QUERIES, FORK, DEPTH, GAMMA = 8, 8, 2, 6, 0.95
LIMIT = format_limit(GAMMA, DEPTH)
FEWER = 0.08  # steps
GRID = (0.5, 1.0, 2.0, 4.0)  # step sizes compared one by one
WIDE = (*GRID, 8.0, 16.0, 32.0, 64.0)  # in which the best is not at the end
LAST = 10  # iterations that a final number is the mean of
GRPO, PORTOOL, EQUAL = "GRPO, chains", "PORTool", "PORTool, weights ½"
SAYS = "higher accuracy in fewer tool steps than GRPO (3.22 steps, -11 %)"
ABLATION = "each term of the advantage helps"
NOTES = (
    "Every batch is used for one update, so the ratios are 1: no clip acts, and DAPO is GRPO here.",
    "Two advantages of variance 1 added are a larger step: compare speed at weights ½ and ½ alone.",
)


class Method(NamedTuple):
    """Advantages of a tree, (B, D), and how the tree is grown."""

    advantages: Callable[[RolloutTree, np.random.Generator], Float]
    fork: int = FORK
    merge: bool = True


def options(**how: Any) -> Callable[[RolloutTree, np.random.Generator], Float]:
    return lambda tree, rng: portool_advantages(tree, **how)


def outcome_alone(tree: RolloutTree, rng: np.random.Generator) -> Float:
    t = tree.table
    return np.where(t.paths >= 0, t.outcome[:, None], 0.0)


def shuffled(tree: RolloutTree, rng: np.random.Generator) -> Float:
    """PORTool's advantages on steps at random: what credit is worth at all."""
    t, A = tree.table, portool_advantages(tree)
    A[t.row, t.column] = rng.permutation(A[t.row, t.column])
    return A


METHODS = {
    GRPO: Method(options(w_fork=0.0), fork=1, merge=False),
    PORTOOL: Method(options()),
    EQUAL: Method(options(w_traj=0.5, w_fork=0.5)),
    "PORTool, ½, unmerged": Method(options(w_traj=0.5, w_fork=0.5), merge=False),
    "PORTool, each step once": Method(options(dedup=True)),
    "PORTool, best descendant": Method(options(aggregate="max")),
    "PORTool, worst descendant": Method(options(aggregate="min")),
    "trajectory only": Method(options(**VARIANTS["trajectory_only"])),
    "fork only": Method(options(**VARIANTS["fork_only"])),
    "no decay": Method(options(**VARIANTS["no_decay"])),
    "no format reward": Method(options(**VARIANTS["no_format"])),
    "TEMPO at steps": Method(options(**VARIANTS["tempo"])),
    "TreeRPO": Method(options(**VARIANTS["treerpo"])),
    "outcome alone": Method(outcome_alone, fork=1, merge=False),
    "credit at random": Method(shuffled),
}


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    tuning: int
    seeds: int
    iterations: int
    trees: int
    worded: int  # seeds of the world in words
    worded_iterations: int


PLANS = {
    "smoke": Plan(2, 2, 10, 1000, 1, 2),
    "quick": Plan(12, 16, 150, 100_000, 4, 25),
    "full": Plan(32, 64, 150, 1_000_000, 8, 40),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train by every method at every step size, weigh trees, use real tools, and judge."""
    plan = PLANS[scale]
    report = Report(paper=60, scale=scale, seed=rng, title="PORTool: tool use with rewarded trees")
    add_methods(report, plan, rng)
    add_weights(report, plan, rng)
    add_words(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.tool_study import add_tool_study

        add_tool_study(report, rng)
    report.notes.extend(NOTES)
    return report


# ── the world ───────────────────────────────────────────────────────────────────────────────────


class World:
    """Policies (C, states, actions), each rolled out for QUERIES queries: a step function.

    state, action, after, query: of every step, by its number. A state is which tools are done.
    """

    def __init__(self, logits: Float) -> None:
        self.logits = logits
        self.state, self.action, self.after, self.query = (np.empty(0, np.int64) for _ in range(4))

    def __call__(self, parents: Int, rng: np.random.Generator) -> Proposals:
        state, query, later = np.zeros(len(parents), np.int64), -1 - parents, parents >= 0
        state[later], query[later] = self.after[parents[later]], self.query[parents[later]]
        action = categorical.draw(self.logits[query // QUERIES, state], rng)
        after = np.where(action < 2, state | (1 << np.minimum(action, 1)), state)
        self.state, self.action = np.append(self.state, state), np.append(self.action, action)
        self.after, self.query = np.append(self.after, after), np.append(self.query, query)
        return self.proposals(parents, state, action)

    def proposals(self, parents: Int, state: Int, action: Int) -> Proposals:
        right = np.where(state == BOTH, 1.0, -1.0)
        return Proposals(action == ANSWER, right, np.where(action == ERROR, -LIMIT, LIMIT), action)

    def score_sums(self, tree: RolloutTree, weight: Float) -> Float:
        """Σ over trajectories and steps of weight ∇ log π, (C, states, actions); weight (B, D)."""
        t, C = tree.table, len(self.logits)
        each = weight[t.row, t.column]
        cell = self.query[t.step] // QUERIES * STATES + self.state[t.step]
        taken = np.bincount(cell * ACTIONS + self.action[t.step], each, C * STATES * ACTIONS)
        there = np.bincount(cell, each, C * STATES).reshape(C, STATES, 1)
        return taken.reshape(self.logits.shape) - there * softmax(self.logits, axis=-1)


def outlook(logits: Float) -> dict[str, Float]:
    """Exact: P(right), P(answered), expected steps and calls of the tool that fails, (C,) each."""
    p = softmax(logits, axis=-1)
    here = np.zeros(p.shape[:2])
    here[:, 0] = 1.0
    right, steps, errors, answered = np.zeros((4, len(p)))
    for _ in range(DEPTH):
        steps += here.sum(axis=1)
        right += here[:, BOTH] * p[:, BOTH, ANSWER]
        answered += (here * p[:, :, ANSWER]).sum(axis=1)
        errors += (here * p[:, :, ERROR]).sum(axis=1)
        then = here * (p[:, :, 2] + p[:, :, ERROR])
        for state in range(STATES):
            for tool in (0, 1):
                then[:, state | (1 << tool)] += here[:, state] * p[:, state, tool]
        here = then
    return {"accuracy": right, "steps": steps, "errors": errors, "answered": answered}


def start(C: int) -> Float:
    logits = np.zeros((C, STATES, ACTIONS))
    logits[:, :, ANSWER] = 1.0
    return logits


def train(
    method: Method, sizes: Float, iterations: int, rng: np.random.Generator,
    world: Callable[[Float], World] = World,
) -> tuple[Float, dict[str, Float]]:  # fmt: skip
    """Policies of C step sizes, trained side by side: how each did after every iteration, (I, C).

    "generated": steps that were sampled in an iteration, the mean over policies.
    """
    logits = start(len(sizes))
    seen: dict[str, list[Float]] = {}
    for _ in range(iterations):
        grown = world(logits)
        tree = tree_rollout(grown, N, method.fork, DEPTH, rng, queries=len(sizes) * QUERIES,
                            merge=method.merge)  # fmt: skip
        rows = np.bincount(grown.query[tree.paths[:, 0]] // QUERIES, minlength=len(sizes))
        sums = grown.score_sums(tree, method.advantages(tree, rng))
        logits = logits + (sizes / rows)[:, None, None] * sums
        generated = np.full(len(sizes), len(tree) / len(sizes))
        for name, value in (outlook(logits) | {"generated": generated}).items():
            seen.setdefault(name, []).append(value)
    return logits, {name: np.array(values) for name, values in seen.items()}


# ── methods ─────────────────────────────────────────────────────────────────────────────────────

Found = dict[str, Float]  # measure -> (step sizes, seeds)


def swept(method: Method, plan: Plan, key: list[int], seeds: int) -> Found:
    """Final measures and the mean accuracy of the whole training, by step size and seed."""
    sizes = np.repeat(WIDE, seeds)
    _, seen = train(method, sizes, plan.iterations, np.random.default_rng(key))
    shape = (len(WIDE), seeds)
    final = {name: values[-LAST:].mean(axis=0).reshape(shape) for name, values in seen.items()}
    reached = (seen["accuracy"] >= 0.9).argmax(axis=0) + 1.0
    reached[seen["accuracy"].max(axis=0) < 0.9] = plan.iterations
    return final | {
        "speed": seen["accuracy"].mean(axis=0).reshape(shape), "to 90 %": reached.reshape(shape),
        "generated": seen["generated"].mean(axis=0).reshape(shape),
    }  # fmt: skip


def add_methods(report: Report, plan: Plan, rng: int) -> None:
    """Sweep, choose each method's step size on seeds of its own, compare."""
    found, best = {}, {}
    for i, (name, method) in enumerate(METHODS.items()):
        tuning = swept(method, plan, [rng, 60, 0, i], plan.tuning)
        best[name] = int(tuning["speed"].min(axis=1).argmax())  # some seeds never recover
        found[name] = swept(method, plan, [rng, 60, 1, i], plan.seeds)
    at_best = {name: {m: v[best[name]] for m, v in each.items()} for name, each in found.items()}
    best_claims(report, at_best)
    matched_claims(report, found)
    ablation_claims(report, found, at_best)
    measures = ("accuracy", "steps", "errors", "speed", "to 90 %", "generated")
    rows: list[list[Cell]] = [
        [name, WIDE[best[name]], *(mean_interval(each[m]) for m in measures)]
        for name, each in at_best.items()
    ]
    before = outlook(start(1))
    known = (float(before[m][0]) if m in before else None for m in measures)
    rows.append(["before training", None, *known])
    columns = ["method", "step size", "accuracy", "steps", "failing calls",
               "mean accuracy of training", "iterations to 90 %", "steps generated"]  # fmt: skip
    note = (
        f"{plan.seeds} seeds; each has the best of {len(WIDE)} step sizes by the mean accuracy of "
        f"training of the worst of {plan.tuning} other seeds. The least number of steps is 3. "
        f"Generated: an iteration of {QUERIES} queries; a shared step is generated once."
    )
    report.tables.append(ReportTable("Each method at its best step size", columns, rows, note))
    add_sizes(report, found)


def best_claims(report: Report, at_best: dict[str, Found]) -> None:
    base, ours = at_best[GRPO], at_best[PORTOOL]
    gain = paired_difference(base["steps"], ours["steps"])
    report.claims.extend([
        Claim.at_least("each at its best: steps of GRPO - of PORTool", SAYS, gain, 0.0),
        Claim.at_least("each at its best: that many steps fewer", SAYS, gain, FEWER),
        Claim.at_least("each at its best: accuracy of PORTool - of GRPO", SAYS,
                       paired_difference(ours["accuracy"], base["accuracy"]), -0.01),
    ])  # fmt: skip


def matched_claims(report: Report, found: dict[str, Found]) -> None:
    """Equal weight of the update (½ + ½ against 1) and equal step size."""
    gaps, accuracy = [], []
    for i in range(len(GRID)):
        base, ours = ({m: v[i] for m, v in found[name].items()} for name in (GRPO, EQUAL))
        gaps.append(paired_difference(base["steps"], ours["steps"], comparisons=len(GRID)))
        accuracy.append(paired_difference(ours["accuracy"], base["accuracy"],
                                          comparisons=len(GRID)))  # fmt: skip
    lowest = min(gaps, key=lambda e: e.low)
    early = paired_difference(found[EQUAL]["speed"][0], found[GRPO]["speed"][0])
    report.claims.extend([
        Claim.at_least("weights ½ and ½, equal step sizes ½ to 4: steps fewer, the worst of four",
                       SAYS, lowest, FEWER),
        Claim.at_least("weights ½ and ½, equal step sizes: accuracy gained, the worst of four",
                       SAYS, min(accuracy, key=lambda e: e.low), -0.01),
        Claim.at_least("weights ½ and ½, step size ½: mean accuracy of training gained",
                       "faster learning; with weights 1 and 1 the update is simply larger",
                       early, 0.0),
    ])  # fmt: skip


def ablation_claims(report: Report, found: dict[str, Found], at_best: dict[str, Found]) -> None:
    """Terms at a step size of 2, where they differ, and at each one's best."""
    two = {name: {m: v[GRID.index(2.0)] for m, v in each.items()} for name, each in found.items()}

    def gain(measure: str, a: str, b: str, of: dict[str, Found] = two) -> Estimate:
        return paired_difference(of[a][measure], of[b][measure])

    noise = at_best["credit at random"]
    for name, says, measured in (
        ("step size 2: steps without the fork term - with it", ABLATION,
         gain("steps", "trajectory only", PORTOOL)),
        ("step size 2: steps without decay - with it", "decay prefers fewer steps",
         gain("steps", "no decay", PORTOOL)),
        ("step size 2: failing calls without format reward - with it",
         "format rewards teach well-formed calls", gain("errors", "no format reward", PORTOOL)),
        ("each at its best: mean accuracy of training, both terms - fork only", ABLATION,
         gain("speed", PORTOOL, "fork only", at_best)),
        ("each at its best: mean accuracy of training, both terms - trajectory only", ABLATION,
         gain("speed", PORTOOL, "trajectory only", at_best)),
        ("each at its best: accuracy over credit at random", "credit matters",
         paired_difference(at_best[PORTOOL]["accuracy"], noise["accuracy"])),
    ):  # fmt: skip
        report.claims.append(Claim.at_least(name, says, measured, 0.0))


def add_sizes(report: Report, found: dict[str, Found]) -> None:
    shown = (GRPO, PORTOOL, EQUAL, "trajectory only", "fork only", "TEMPO at steps")
    for measure, label in (("steps", "steps at the end"), ("speed", "mean accuracy of training")):
        series = []
        for name in shown:
            band = [mean_interval(row) for row in found[name][measure]]
            series.append(Series(name, WIDE, [e.value for e in band], [e.low for e in band],
                                 [e.high for e in band], baseline=name == GRPO))  # fmt: skip
        title = f"{label.capitalize()} by step size"
        report.figures.append(Figure("line", title, "step size", label, series, log_x=True))
    rows: list[list[Cell]] = [
        [name, *(mean_interval(row) for row in each["steps"])] for name, each in found.items()
    ]
    columns = ["method", *(f"{size:g}" for size in WIDE)]
    report.tables.append(ReportTable("Steps at the end, by step size", columns, rows))


# ── weights ─────────────────────────────────────────────────────────────────────────────────────

WEIGHTS = {"draws": "by draws", "forks": "Π 1/|C|", "leaves": "1/leaves"}


def exact_gradient() -> Float:
    """∇ (P(right) - P(wrong)) at the start, (states, actions), by central differences to 1e-9."""
    h = 1e-5 * np.eye(STATES * ACTIONS).reshape(-1, STATES, ACTIONS)
    up, down = (outlook(start(1) + step) for step in (h, -h))
    ends = (2 * each["accuracy"] - each["answered"] for each in (up, down))
    return (next(ends) - next(ends)).reshape(STATES, ACTIONS) / 2e-5


def add_weights(report: Report, plan: Plan, rng: int) -> None:
    """The gradient that a tree gives, projected on the exact one: 1 without bias."""
    exact, chunk = exact_gradient(), min(plan.trees, 20_000)
    rows: list[list[Cell]] = []
    ratios: dict[tuple[str, bool], Estimate] = {}
    for merge in (False, True):
        parts: dict[str, list[Float]] = {rule: [] for rule in WEIGHTS}
        for part in range(plan.trees // chunk):
            random = np.random.default_rng([rng, 60, 2, merge, part])
            world = World(start(chunk // QUERIES))
            tree = tree_rollout(world, N, FORK, DEPTH, random, queries=chunk, merge=merge)
            for rule, each in parts.items():
                each.append(projections(tree, world, rule, exact))
        for rule, each in parts.items():
            ratios[rule, merge] = mean_interval(np.concatenate(each))
            rows.append(["merged" if merge else "all kept", WEIGHTS[rule], ratios[rule, merge]])
    columns = ["identical siblings", "weight of a trajectory", "its gradient over the exact one"]
    note = f"{plan.trees:,} trees of {N} at the start policy; projected on the exact gradient."
    report.tables.append(ReportTable("What weighs a tree right", columns, rows, note))
    for rule, merge in (("leaves", False), ("draws", True), ("forks", False), ("forks", True)):
        name = f"{'merged' if merge else 'unmerged'} tree, {WEIGHTS[rule]}: gradient over exact"
        says = ("a node weight of Π 1/|C| is exactly without bias" if rule == "forks"
                else "every live step has one child on average, whatever was sampled")  # fmt: skip
        report.claims.append(Claim.within(name, says, ratios[rule, merge], 0.97, 1.03))


def projections(tree: RolloutTree, world: World, rule: str, exact: Float) -> Float:
    """<gradient of a tree, exact> / |exact|², a query, (Q,)."""
    t = tree.table
    query = t.query[t.paths[:, 0]]
    Q = int(query.max()) + 1
    if rule == "leaves":
        weight = 1 / np.bincount(query)[query]
    else:
        weight = step_weights(tree, rule)[t.paths[np.arange(len(t.paths)), t.length - 1]]
    centred = exact - (softmax(start(1)[0], axis=-1) * exact).sum(axis=-1, keepdims=True)
    step = centred[world.state[t.step], world.action[t.step]] * (weight * t.outcome)[t.row]
    return np.asarray(np.bincount(query[t.row], step, Q) / (exact**2).sum())


# ── real tools ──────────────────────────────────────────────────────────────────────────────────


def flowers() -> dict[str, dict[str, float]]:
    """Mean measurements of the three kinds of iris, in centimetres."""
    from sklearn.datasets import load_iris

    data = load_iris()
    columns = [name.removesuffix(" (cm)") for name in data.feature_names]
    return {
        str(kind): dict(zip(columns, data.data[data.target == i].mean(axis=0).round(3).tolist(),
                            strict=True))
        for i, kind in enumerate(data.target_names)
    }  # fmt: skip


class WordedWorld(World):
    """The same world in words: "how much longer is the petal of virginica than of setosa?".

    Actions are texts with calls in JSON, which are parsed and run; the answer is made of what the
    tools said, so that nothing but the tools decides the outcome.
    """

    def __init__(self, logits: Float, sandbox: ToolSandbox, table: dict[str, Any]) -> None:
        super().__init__(logits)
        self.sandbox, self.table = sandbox, table
        self.told: list[Any] = []  # of every step: what the tools have said until then
        self.calls = 0

    def question(self, query: int) -> tuple[str, str, str]:
        kinds, columns = list(self.table), list(next(iter(self.table.values())))
        pair = query % QUERIES
        return kinds[pair % 3], kinds[(pair + 1) % 3], columns[pair % 4]

    def proposals(self, parents: Int, state: Int, action: Int) -> Proposals:
        outcome, form = np.empty(len(parents)), np.empty(len(parents))
        query = self.query[len(self.told) :]
        for i, (parent, choice) in enumerate(zip(parents.tolist(), action.tolist(), strict=True)):
            known: dict[str, str] = dict(self.told[parent]) if parent >= 0 else {}
            first, second, column = self.question(int(query[i]))
            step = parse_step(self.text(choice, first, second, column, known), self.sandbox.tools)
            ran = True
            if step.name is not None:
                result = self.sandbox.call(step.name, step.arguments or {})
                ran, self.calls = result.ok, self.calls + 1
                if ran:
                    known[str(choice)] = result.text
            truth = round(self.table[first][column] - self.table[second][column], 3)
            outcome[i] = answer_outcome(step.answer, truth)
            form[i] = format_reward(step, LIMIT, ran)
            self.told.append(known)
        return Proposals(action == ANSWER, outcome, form, action)

    def text(self, choice: int, first: str, second: str, column: str, known: Any) -> str:
        """What a model would write."""
        if choice == ANSWER:
            both = "0" in known and "1" in known
            said = round(float(known["0"]) - float(known["1"]), 3) if both else "no idea"
            return f"<think>that is it</think><answer>{said}</answer>"
        call = {
            0: ("look_up", {"row": first, "column": column}),
            1: ("look_up", {"row": second, "column": column}),
            2: ("shift_date", {"date": "2025-10-30", "days": 1}),
            ERROR: ("look_up", {"row": "tulip", "column": column}),
        }[choice]
        body = json.dumps({"name": call[0], "arguments": call[1]})
        return f"<think>one more</think><tool_call>{body}</tool_call>"


def add_words(report: Report, plan: Plan, rng: int) -> None:
    """Train in the world in words, and measure."""
    table = flowers()
    sizes = np.full(plan.worded, 4.0)
    rows: list[list[Cell]] = []
    accuracy, steps = {}, {}
    with ToolSandbox([table_tool(table), DATE_SHIFT]) as sandbox:
        for i, name in enumerate((GRPO, EQUAL)):
            worlds: list[WordedWorld] = []

            def worded(logits: Float, made: list[WordedWorld] = worlds) -> World:
                made.append(WordedWorld(logits, sandbox, table))
                return made[-1]

            random = np.random.default_rng([rng, 60, 3, i])
            _, seen = train(METHODS[name], sizes, plan.worded_iterations, random, worded)
            accuracy[name], steps[name] = mean_interval(seen["accuracy"][-1]), seen["steps"][-1]
            calls = sum(world.calls for world in worlds)
            rows.append([name, accuracy[name], mean_interval(steps[name]), calls])
    columns = ["method", "accuracy", "steps", "calls that were run"]
    note = (
        f"{plan.worded} policies, {plan.worded_iterations} iterations, step size 4. Every call is "
        "JSON that was parsed and run in a process without network over the means of iris."
    )
    report.tables.append(ReportTable("With real tools", columns, rows, note))
    report.claims.extend([
        Claim.at_least("taught by real tools: P(right) of PORTool, ½", SAYS, accuracy[EQUAL], 0.9),
        Claim.at_least("taught by real tools: steps of GRPO - of PORTool, ½", SAYS,
                       paired_difference(steps[GRPO], steps[EQUAL]), 0.0),
    ])  # fmt: skip
