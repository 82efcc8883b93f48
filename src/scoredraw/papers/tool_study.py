"""Does a tree of tool calls teach a language model more than chains of them?

Questions about twenty men of a fitness club (the `linnerud` table of scikit-learn), products, and
products with a cell of that table; the policy may call a table and a calculator, both real, run
apart:

    23 * Waist of 7?
    <think></think><tool_call>{"name":"get","arguments":{"row":"7","column":"Waist"}}</tool_call>
    34
    <think></think><tool_call>{"name":"calc","arguments":{"expression":"23*34"}}</tool_call>
    782
    <think></think><answer>782</answer>

The small policy that ships, to whose letters the words of calls are added as tokens of their own,
is first taught such dialogues by SFT, and bad habits with them: to say a call twice, to leave off
its brackets, to answer out of its head. From there it is trained on the outcome by GRPO, in chains,
and by PORTool, its terms one by one and its relatives, in trees, with equally many answers a
question and each at its best learning rate: of a small grid, by the share of right answers to
spared questions with a seed of its own. Test questions ask for new cells and products. (DAPO has no
arm: with one step a batch no clip acts, and its filter leaves out what has no advantage here.)

`python -m scoredraw.papers.tool_study --workers 2` runs what the journal lacks.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.metrics import mean_interval
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    judge,
    policy_plan,
    trained,
    trained_model,
)
from scoredraw.papers.small_policy import FOLDER, Problem, fine_tuned
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    per_seed,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Claim, Report
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod, open_policy
from scoredraw.rl.rollout_tree import VARIANTS, RolloutTree
from scoredraw.rl.tool_calls import Tool, ToolSandbox, parse_step, table_tool
from scoredraw.rl.tool_policy import OutcomeReward, PORToolAdvantage, ToolPolicy, ToolTreeRollout

RESPONSE = "\n{}\n"
WORDS = [  # that become tokens
    "<think></think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "error: no JSON",
    '{"name":"', '","arguments":{"', '"}}', 'get', 'row":"', '","column":"', 'calc',
    'expression":"', "Chins", "Situps", "Jumps", "Weight", "Waist", "Pulse", " of ", " * ",
]  # fmt: skip
TOGETHER = 32  # questions whose answers are sampled together
PATIENCE = 20.0  # seconds of a call: a busy machine is no failure
KINDS = ("look up", "multiply", "both")
CELLS = {"shown": 48, "taught": 32, "spared": 16, "tested": 24}  # of the 120 of the table
SLIPS = {"": 0.35, "again": 0.2, "broken": 0.2, "head": 0.25}  # of the dialogues shown
DIALOGUES = 3000
SFT: dict[str, Any] = {"steps": 1000, "batch": 32, "learning_rate": 1.5e-3}

Question = tuple[Problem, list[str]]  # what is asked, and the calls that answer it


# ── questions and tools ─────────────────────────────────────────────────────────────────────────


@cache
def men() -> dict[str, dict[str, int]]:
    """Man -> what was measured of him -> its value: 20 x 6 whole numbers."""
    from sklearn.datasets import load_linnerud

    found = load_linnerud()
    values = np.hstack([found.data, found.target]).astype(int).tolist()
    names = [*found.feature_names, *found.target_names]
    return {str(i): dict(zip(names, row, strict=True)) for i, row in enumerate(values, start=1)}


def tool_box() -> ToolSandbox:
    """The table and the calculator, under short names."""
    calculator = Tool("calc", "scoredraw.rl.tool_calls:calculate", {"expression": "string"})
    return ToolSandbox([calculator, table_tool(men(), "get")], seconds=PATIENCE)


def question(kind: str, cell: tuple[str, str], a: int, b: int) -> Question:
    """For a cell of the table, a product a * b, or a times the cell.

    >>> question("both", ("7", "Waist"), 23, 45)[0]["prompt"]
    '23 * Waist of 7?\\n'
    """
    (row, column), get = cell, _call("get", row=cell[0], column=cell[1])
    named, value = f"{column} of {row}", men()[row][column]
    prompt, answer, calls = {
        "look up": (named, value, [get]),
        "multiply": (f"{a} * {b}", a * b, [_call("calc", expression=f"{a}*{b}")]),
        "both": (f"{a} * {named}", a * value, [get, _call("calc", expression=f"{a}*{value}")]),
    }[kind]
    return {"prompt": f"{prompt}?\n", "answer": str(answer), "family": kind}, calls


def _call(name: str, **arguments: str) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))
    return f"<think></think><tool_call>{body}</tool_call>"


def questions(part: str, n: int) -> list[Question]:
    """n questions of each kind, about cells and products that no other part asks for."""
    rng, place = np.random.default_rng(60), list(CELLS).index(part)
    cells = [(row, column) for row, named in men().items() for column in named]
    order = np.split(rng.permutation(len(cells)), np.cumsum(list(CELLS.values())))
    own = [cells[i] for i in order[place]]
    products = rng.permutation(88 * 88)[place :: len(CELLS)][:n].tolist()
    return [
        question(kind, own[i % len(own)], 12 + pair // 88, 12 + pair % 88)
        for kind in KINDS
        for i, pair in enumerate(products)
    ]


def study_problems(settings: Settings) -> tuple[list[Problem], ...]:
    """To train on, to tune by and to test with."""
    sizes = {"taught": CELLS["taught"], "spared": settings.spared, "tested": settings.tested}
    for part, n in sizes.items():
        require(1 <= n <= CELLS[part], part, n, f"1 to {CELLS[part]} of each kind")
    return tuple([problem for problem, _ in questions(part, n)] for part, n in sizes.items())


def dialogue(asked: Question, slip: str, tools: ToolSandbox) -> str:
    """What to write to a question, with what the tools say in between.

    slip: "again": the last call twice; "broken": first a call without its brackets, for which the
    tool has an error; "head": no call at all.
    """
    problem, calls = asked
    calls = [] if slip == "head" else calls + calls[-1:] * (slip == "again")
    if slip == "broken":
        calls = [calls[0].replace("}}", ""), *calls]
    answer = f"<think></think><answer>{problem['answer']}</answer>"
    return "".join(call + RESPONSE.format(_told(call, tools)) for call in calls) + answer


def _told(call: str, tools: ToolSandbox) -> str:
    step = parse_step(call, tools.tools)
    if step.name is None or step.arguments is None:
        return f"error: {step.problem}"
    return tools.call(step.name, step.arguments).text


def dialogues(n: int, seed: int = 0) -> list[Problem]:
    """n of them, as many of each kind, with slips as often as SLIPS says."""
    asked, kinds = questions("shown", n // len(KINDS)), list(SLIPS)
    u = np.random.default_rng(seed).random(len(asked))
    slips = np.searchsorted(np.cumsum(list(SLIPS.values())), u, side="right")
    with tool_box() as tools:
        return [
            {**one[0], "target": dialogue(one, kinds[slip], tools)}
            for one, slip in zip(asked, slips, strict=True)
        ]


def add_words(folder: str) -> None:
    """Save the policy that ships with WORDS as tokens, each begun as the mean of its letters."""
    net, tokenizer = open_policy(str(FOLDER))
    letters = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    tokenizer.add_tokens(WORDS)
    net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = net.get_input_embeddings().weight
    with torch.no_grad():
        table[-len(WORDS) :] = torch.stack([table[ids].mean(dim=0) for ids in letters])
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_policy(settings: Settings) -> str:
    """The folder of the policy that training starts from; taught now, if it is not yet."""
    if settings.model != EMBEDDED:
        return settings.model
    with tempfile.TemporaryDirectory() as folder:
        add_words(folder)
        return str(fine_tuned(dialogues(DIALOGUES), source=folder, **SFT))


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


class Arm(NamedTuple):
    """Advantages by options of `portool_advantages` in a tree; None: TRL's GRPO in chains."""

    title: str
    options: dict[str, Any] | None = None
    merge: bool = True


GRPO = "grpo"
ARMS = {
    GRPO: Arm("GRPO, chains", merge=False),
    "portool": Arm("PORTool", VARIANTS["portool"]),
    "unmerged": Arm("PORTool, unmerged", VARIANTS["portool"], merge=False),
    "fork_only": Arm("fork-relative alone", VARIANTS["fork_only"]),
    "trajectory_only": Arm("trajectory-relative alone", VARIANTS["trajectory_only"]),
    "no_decay": Arm("PORTool, γ = 1", VARIANTS["no_decay"]),
    "tempo": Arm("TEMPO on steps", VARIANTS["tempo"]),
}
OPTIONS = {name: arm[1:] for name, arm in ARMS.items()}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "embedded": the policy that ships after SFT on dialogues.

    max_tokens: of a step; max_length: no step begins that could end beyond it. spared, tested:
    questions of each kind.
    """

    steps: int = 60
    max_fork: int = 2
    max_depth: int = 4
    max_tokens: int = 24
    max_length: int = 160
    spared: int = 16
    tested: int = 24


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test questions, or on spared ones if tuning.

    -> what `measured` has, and of the training: the answers that a batch teaches by, the steps
    drawn for them, and seconds of processor time.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    taught, spared, tested = study_problems(settings)
    rows = spared if tuning else tested
    with tool_box() as tools:
        if name == UNTRAINED:
            with one_thread():
                return measured(settings.model, rows, seed, settings, tools)
        method, rollout = method_of(name, seed, settings, tools)
        grown: list[tuple[int, int]] = []

        def told(batch: int, batches: int, _: dict[str, float]) -> None:
            assert rollout.tree is not None
            grown.append((len(rollout.tree.paths), len(rollout.tree)))
            if tell is not None:
                tell(batch, batches)

        with trained(
            taught, settings, method, name=name, rate=rate, seed=seed, reward=OutcomeReward(),
            max_tokens=settings.max_length, progress=told,
        ) as run:  # fmt: skip
            found = measured(trained_model(run), rows, seed, settings, tools)
    answers, drawn = np.mean(grown, axis=0).tolist()
    return {
        **found, "answers a batch": answers, "steps drawn a batch": drawn,
        "seconds": time.process_time() - begun,
    }  # fmt: skip


def method_of(
    name: str, seed: int, settings: Settings, tools: ToolSandbox
) -> tuple[PolicyMethod, ToolTreeRollout]:
    """What trains by an arm, and the rollout in it."""
    arm = ARMS[name]
    rollout = ToolTreeRollout(
        tools, 1 if arm.options is None else settings.max_fork, settings.max_depth, seed, arm.merge,
        max_tokens=settings.max_tokens, max_length=settings.max_length, response=RESPONSE,
    )  # fmt: skip
    credit = None if arm.options is None else PORToolAdvantage(**arm.options)
    advantage = None if credit is None else lambda _: credit
    return PolicyMethod(advantage, trainer_options=lambda _: {"rollout_func": rollout}), rollout


def measured(
    source: str, rows: Sequence[Problem], seed: int, settings: Settings, tools: ToolSandbox
) -> Record:
    """What comes of dialogues that are sampled in chains.

    The share of right answers, also by kind; calls a dialogue, malformed ones too, and a right
    one, if any; the share of calls that fail or do not meet every check; letters written.
    """
    net, tokenizer = open_policy(source)
    limits = (settings.max_tokens, settings.max_length)
    policy = ToolPolicy(net.eval(), tokenizer, tools, *limits, response=RESPONSE)
    rng, n, counts, kinds = np.random.default_rng(seed), settings.samples, [], []
    for first in range(0, len(rows), TOGETHER):
        some = rows[first : first + TOGETHER]
        ids = tokenizer([row["prompt"] for row in some])["input_ids"]
        truths = [row["answer"] for row in some]
        tree = policy.rollout(ids, n, 1, settings.max_depth, rng, truths, merge=False)
        counts.append(counted(tree))
        kinds += [some[q]["family"] for q in tree.table.query[tree.paths[:, 0]]]
    right, calls, bad, length = np.concatenate(counts).T
    of, enough = np.array(kinds), calls[right > 0]
    return {
        "right": float(right.mean()), "calls": float(calls.mean()),
        **({"calls where right": float(enough.mean())} if enough.size else {}),
        "malformed calls": float(bad.sum() / max(calls.sum(), 1)), "length": float(length.mean()),
        **{f"right, {kind}": float(right[of == kind].mean()) for kind in KINDS},
    }  # fmt: skip


def counted(tree: RolloutTree) -> NDArray[np.float64]:
    """(B, 4): whether right, calls, malformed or failed ones of them, and letters written."""
    found = []
    for path, outcome in zip(tree.paths, tree.table.outcome, strict=True):
        turns = [tree.tokens[step] for step in path if step >= 0]
        calls = [turn for turn in turns if turn.step.answer is None]
        fine = [all(turn.step.passed) and turn.result.ok for turn in calls]
        found.append((outcome > 0, len(calls), fine.count(False), sum(len(t.ids) for t in turns)))
    return np.array(found, np.float64)


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    name: itemgetter(name)
    for name in (
        "right", "calls", "calls where right", "malformed calls", "length",
        *(f"right, {kind}" for kind in KINDS), "answers a batch", "steps drawn a batch",
    )
}  # fmt: skip
ABOVE = "accuracy 64.1, some 5 % above GRPO's (7B, 17 tools; from a summary)"
FEWER = "3.22 tool steps, 11 % fewer than GRPO's (from a summary)"
TERMS = "each term of the advantage helps"
COMPARISONS = [
    Comparison(GRPO, UNTRAINED, "right", "training from rewards helps"),
    Comparison("portool", UNTRAINED, "right", "training from rewards helps"),
    Comparison("portool", GRPO, "right", ABOVE),
    Comparison("portool", GRPO, "calls", FEWER, more=False),
    Comparison("unmerged", GRPO, "right", ABOVE),
    Comparison("unmerged", GRPO, "calls", FEWER, more=False),
    Comparison("portool", GRPO, "malformed calls", "format rewards teach calls", more=False),
    Comparison("portool", "fork_only", "right", TERMS),
    Comparison("portool", "trajectory_only", "right", TERMS),
    Comparison("portool", "trajectory_only", "calls", TERMS, more=False),
    Comparison("portool", "no_decay", "calls", "decay prefers fewer steps", more=False),
    Comparison("portool", "no_decay", "right", "γ = .95 is best"),
    Comparison("portool", "tempo", "right", "not compared in the paper"),
]


def plan_of(settings: Settings) -> StudyPlan:
    """The study; the policy is taught now, if it is not yet."""
    return policy_plan(
        "tool-study", TITLES, run_arm, settings, base=base_policy(settings), options=OPTIONS,
        quality=itemgetter("right"), measures=MEASURES,
    )  # fmt: skip


def add_tool_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    asked = Settings() if settings is None else settings
    plan = plan_of(asked)
    about = "Language model with tools"
    records = judge(report, about, plan, COMPARISONS, rng, progress)
    before = mean_interval(per_seed(plan, records, UNTRAINED, "right"))
    taught = Claim.within(f"{about}, right: untrained", "taught, but not well", before, 0.2, 0.8)
    report.claims.append(taught)
    note = (
        f"{asked.size}, each at its best rate; "
        f"{asked.tested} test questions of each of {', '.join(KINDS)}, {asked.samples} answers to "
        f"each; {asked.seeds} seeds. One, one and two calls are enough. Malformed: also calls that "
        "fail. Identical siblings of a tree are merged, which leaves fewer answers to train on."
    )
    report.tables.append(study_table(
        about, plan, list(TITLES), records, against=GRPO, less=("right", "calls"), note=note
    ))  # fmt: skip
    title = f"{about}: spared questions right by learning rate"
    report.figures.append(tuning_figure(title, plan, list(ARMS), records, "right", GRPO))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"tools": Settings()}, arguments)


if __name__ == "__main__":
    main()
