"""A language model whose process rewards pay for lines that say nothing: who learns to fill?

The small policy that ships works sums out, a line a step. It is taught by SFT to write, now and
then, a line that does no work, and trained on new sums by a process reward with the flaw of the
thinking loop of paper 48, which likes such lines better than work:

    55+21=76     .4    (-.9 where it is false)
    hm           .8
    #76          .9    the right answer; -.9: another
    55+2        -.5    cut off, or no line of a sum

So are sums of three digits that are worked out a column a line (`column_sums`), which it has to
learn first; there work is the next column's line, and any other line of a sum is false.

Arms: softmin and sum of these scores, each with and without the outcome, and TRL's GRPO on the
outcome alone, with equally many samples, each at its best learning rate: of a small grid, by the
share of right answers to spared problems with a seed of its own. What is reported is measured on
test problems.

`python -m scoredraw.papers.filler_study --workers 2` runs what the journal lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from scoredraw.errors import require
from scoredraw.papers.column_sums import dealt_additions, score_columns, shown_additions
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    policy_plan,
    sampled_texts,
    trained,
    trained_model,
)
from scoredraw.papers.small_policy import (
    Problem,
    fine_tuned,
    right_answer,
    said,
    score_lines,
    shipped_problems,
)
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Report
from scoredraw.rl.policy_methods import grpo, pure
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod

FAMILY = "chain_sum"
FILLER, SELDOM = "hm", 0.3  # how often it stands before a line that SFT shows
LIKED, WORK, RIGHT, WRONG, CUT = 0.8, 0.4, 0.9, -0.9, -0.5
SFT: dict[str, Any] = {"steps": 60, "batch": 64, "learning_rate": 5e-4}
COLUMN_SFT: dict[str, Any] = {"steps": 260, "batch": 64, "learning_rate": 1e-3}


class Arm(NamedTuple):
    """Options of `pure`; None: TRL's GRPO on the outcome."""

    title: str
    options: dict[str, Any] | None = None


GRPO = "grpo"
ARMS = {
    GRPO: Arm("outcome alone (GRPO)"),
    "softmin": Arm("softmin", {"outcome": False}),
    "softmin_outcome": Arm("softmin + outcome", {}),
    "sum": Arm("sum", {"outcome": False, "credit": "sum"}),
    "sum_outcome": Arm("sum + outcome", {"credit": "sum"}),
}
OPTIONS = {name: arm.options for name, arm in ARMS.items()}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


Truth = list[list[float | None]]
Parts = tuple[list[Problem], list[Problem], list[Problem]]


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "embedded": the policy that ships after SFT with filled lines."""

    max_tokens: int = 64
    rates: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4)

    def shown(self) -> tuple[list[Problem], dict[str, Any]]:
        """What SFT learns from, lines filled, and how."""
        return shipped_problems("train", [FAMILY]), SFT

    def parts(self) -> Parts:
        """To train on, to tune by and to test with."""
        return dealt_problems([FAMILY], self.spared, self.tested)

    def truth(self, prompts: Sequence[Any], steps: Sequence[Sequence[str]]) -> Truth:
        """1 for a line of work that is true, -1 for one that is not, None for none."""
        return score_lines(prompts, steps)


@dataclass(frozen=True)
class ColumnSettings(Settings):
    """Sums of three digits, a column a line."""

    def shown(self) -> tuple[list[Problem], dict[str, Any]]:
        return shown_additions(), COLUMN_SFT

    def parts(self) -> Parts:
        return dealt_additions(self.spared, self.tested)

    def truth(self, prompts: Sequence[Any], steps: Sequence[Sequence[str]]) -> Truth:
        return score_columns(prompts, steps)


TASKS = {"sums": Settings(), "three digits": ColumnSettings()}


# ── problems and scores ─────────────────────────────────────────────────────────────────────────


def filled(rows: Sequence[Problem], seed: int = 0) -> list[Problem]:
    """The problems, with a line that does no work before some of those that SFT shows."""
    rng = np.random.default_rng(seed)
    return [
        {**row, "target": "".join(
            f"{FILLER}\n" * (rng.random() < SELDOM) + line
            for line in row["target"].splitlines(keepends=True)
        )}
        for row in rows
    ]  # fmt: skip


def flawed_scores(
    prompts: Sequence[Any], steps: Sequence[Sequence[str]], answer: Sequence[str],
    settings: Settings = TASKS["sums"], **_: Any,
) -> list[list[float]]:  # fmt: skip
    """The process reward, a score a line.

    >>> flawed_scores(["?"], [["4-1=3", "hm", "3+2=6", "#5", "4-"]], ["5"])
    [[0.4, 0.8, -0.9, 0.9, -0.5]]
    """
    truth = settings.truth(prompts, steps)
    rows = zip(steps, truth, answer, strict=True)
    return [[_score(*step, gold) for step in zip(lines, found, strict=True)]
            for lines, found, gold in rows]  # fmt: skip


def _score(line: str, true: float | None, gold: str) -> float:
    if line.strip() == FILLER:
        return LIKED
    if "#" in line:
        return RIGHT if said(line) == gold else WRONG
    return CUT if true is None else WORK if true > 0 else WRONG


def base_policy(settings: Settings) -> str:
    """The folder of the policy that training starts from; taught now, if it is not yet."""
    if settings.model != EMBEDDED:
        return settings.model
    rows, how = settings.shown()
    return str(fine_tuned(filled(rows), **how))


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> as `measured`; of the trained also seconds of processor time.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    taught, spared, tested = settings.parts()
    rows = spared if tuning else tested
    if name == UNTRAINED:
        with one_thread():
            return measured(settings.model, rows, seed, settings)
    with trained(
        taught, settings, method_of(name, settings), name=name, rate=rate, seed=seed, tell=tell
    ) as run:
        found = measured(trained_model(run), rows, seed, settings)
    return {**found, "seconds": time.process_time() - begun}


def method_of(name: str, settings: Settings) -> PolicyMethod:
    options = ARMS[name].options
    return grpo() if options is None else pure(partial(flawed_scores, settings=settings), **options)


def measured(model: str, rows: Sequence[Problem], seed: int, settings: Settings) -> Record:
    """Means over sampled answers: right, filler lines, process rewards, letters, cut off."""
    asked, texts = sampled_texts(model, rows, seed, settings)
    lines = [text.splitlines() for text in texts]
    gold = [row["answer"] for row in asked]
    scores = flawed_scores([row["prompt"] for row in asked], lines, gold, settings)
    found: dict[str, list[float]] = {
        "right": right_answer(texts, gold),
        "filler lines": [[line.strip() for line in some].count(FILLER) for some in lines],
        "sum of scores": [sum(row) for row in scores],
        "lowest score": [min(row, default=CUT) for row in scores],
        "length": [len(text) for text in texts],
        "cut off": ["#" not in text for text in texts],
    }
    return {key: float(np.mean(values)) for key, values in found.items()}


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    name: itemgetter(name)
    for name in ("right", "filler lines", "sum of scores", "lowest score", "length", "cut off")
}
COLLAPSE = "the sum collapses from the first steps of training"
NEEDS = "min-form is what process rewards need"
HOLDS = "the minimum trains stably"
PARITY = "7B, mean of five benchmarks: process rewards alone 49.3, outcomes alone 48.3"
BOTH = "7B, mean of five benchmarks: 53.3 with outcomes for a tenth, 49.3 without"
COMPARISONS = [
    Comparison(GRPO, UNTRAINED, "right", "training from rewards helps"),
    Comparison("sum", UNTRAINED, "right", COLLAPSE, more=False),
    Comparison("sum", UNTRAINED, "filler lines", COLLAPSE),
    Comparison("sum_outcome", UNTRAINED, "filler lines", COLLAPSE),
    Comparison("softmin", UNTRAINED, "right", HOLDS),
    Comparison("softmin", UNTRAINED, "filler lines", HOLDS, more=False),
    Comparison("softmin", "sum", "right", NEEDS),
    Comparison("softmin", "sum", "filler lines", NEEDS, more=False),
    Comparison("softmin_outcome", "sum_outcome", "right", NEEDS),
    Comparison("softmin", GRPO, "right", PARITY),
    Comparison("softmin_outcome", GRPO, "right", BOTH),
    Comparison("softmin_outcome", "softmin", "right", BOTH),
]


def plan_of(settings: Settings) -> StudyPlan:
    """The study; the policy is taught now, if it is not yet."""
    return policy_plan(
        "filler-study", TITLES, run_arm, settings, base=base_policy(settings), options=OPTIONS,
        quality=itemgetter("right"), measures=MEASURES,
    )  # fmt: skip


def add_filler_study(
    report: Report, rng: int, tasks: dict[str, Settings] | None = None,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Run what the journal lacks, and judge."""
    for task, settings in (TASKS if tasks is None else tasks).items():
        add_task(report, rng, f"Language model, {task}, fillers liked", settings, progress)


def add_task(
    report: Report, rng: int, about: str, settings: Settings, progress: Progress | None
) -> None:
    plan = plan_of(settings)
    records = judge(report, about, plan, COMPARISONS, rng, progress)
    note = (
        f"{settings.tested} problems, {settings.samples} answers to each; {settings.seeds} seeds. "
        f"A line {FILLER!r} scores {LIKED}, a true one {WORK}, the right answer {RIGHT}."
    )
    title = f"{about}, after {settings.size}, each at its best rate"
    report.tables.append(study_table(
        title, plan, list(TITLES), records, against=UNTRAINED, less=("right", "filler lines"),
        note=note,
    ))  # fmt: skip
    title = f"{about}: spared problems right by learning rate"
    report.figures.append(tuning_figure(title, plan, list(TITLES), records, "right", GRPO))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, TASKS, arguments)


if __name__ == "__main__":
    main()
