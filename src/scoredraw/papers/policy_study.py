"""Ways to credit sampled answers, compared by training a language model on real problems.

The small policy that ships is trained from rewards by each method with equally many samples: on
sums that are worked out a line at a time, of which it gets six of ten right before any training,
and on sums of three digits, a column a line (`column_sums`), from where SFT leaves it right in one
of ten, so that many groups are all wrong. Each method has its own learning rate, tuned by the mean
reward on spared training problems, and runs at one rate for all, too (`studies`). What is reported
is measured on test problems. Methods whose clip has bounds of their own take two optimizer steps a
batch, as clips only act on the second; so GRPO with two is among the methods.

The journal of finished runs lies in the cache: what has other settings, weights or problems is new.
Changed code is not noticed; after that delete the journal. `python -m
scoredraw.papers.policy_study --arms grpo,ngrpo --workers 2` runs some of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np

from scoredraw.errors import require
from scoredraw.metrics import mean_interval
from scoredraw.papers import column_sums
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    opened,
    policy_plan,
    silent_groups,
    trained,
    trained_model,
)
from scoredraw.papers.small_policy import Problem, fine_tuned
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    part_of,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.reports import Cell, Report, ReportTable
from scoredraw.rl import policy_methods, policy_training
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod

ONE_RUN = (
    "Language model: one run chooses a rate, and runs may differ by more than rates do. A gap at "
    "the best rates counts where it shows at one rate, too."
)
LAST = 10  # batches whose entropy and length are reported


class Arm(NamedTuple):
    """A function of `policy_methods` and its options.

    lines: needs scores of worked lines. shorter: how many times fewer steps than a study has.
    """

    title: str
    method: str
    options: dict[str, Any]
    lines: bool = False
    shorter: int = 1


PLAIN = {
    "grpo": "GRPO (TRL's)", "rloo": "RLOO", "ngrpo": "NGRPO", "psr": "PSR", "nsr": "NSR",
    "w_reinforce": "W-REINFORCE", "tempo": "TEMPO",
}  # fmt: skip
REFILLED = {"max_batches": 10}
ARMS = {name: Arm(title, name, {}) for name, title in PLAIN.items()} | {
    "grpo_twice": Arm("GRPO, two steps a batch", "grpo", {"passes": 2}),
    "dapo": Arm("DAPO", "dapo", REFILLED),
    "dapo_half": Arm("DAPO, half the steps", "dapo", REFILLED, shorter=2),
    "dapo_once": Arm("DAPO, not refilled", "dapo", {"max_batches": 1}),
    "ngrpo_refilled": Arm("NGRPO, refilled", "ngrpo", REFILLED),
    "pure": Arm("PURE, softmin of lines", "pure", {"outcome": False}, True),
    "pure_outcome": Arm("PURE, softmin of lines + outcome", "pure", {}, True),
    "pure_sum": Arm("PURE, sum of lines", "pure", {"outcome": False, "credit": "sum"}, True),
}
OPTIONS = {name: arm[1:] if arm.shorter > 1 else arm[1:-1] for name, arm in ARMS.items()}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


@dataclass(frozen=True)
class Settings(PolicySettings):
    families: tuple[str, ...] = ("chain_sum",)
    rates: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4)
    shared: float | None = 5e-5
    without: ClassVar[tuple[str, ...]] = ()  # arms that are not run

    def base(self) -> str:
        """The policy that training starts from."""
        return self.model

    def parts(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """To train on, to tune by and to test with."""
        return dealt_problems(self.families, self.spared, self.tested)


@dataclass(frozen=True)
class ColumnSettings(Settings):
    """Sums of three digits; SFT of `sft_steps` goes first, made once."""

    families: tuple[str, ...] = (column_sums.FAMILY,)
    steps: int = 60
    shared: float | None = 2.5e-5
    seeds: int = 5
    sft_steps: int = 168
    without: ClassVar[tuple[str, ...]] = (
        "psr", "w_reinforce", "dapo_once", "dapo_half", "ngrpo_refilled",
    )  # fmt: skip

    def base(self) -> str:
        if self.model != EMBEDDED:
            return self.model
        rows = column_sums.shown_additions()
        return str(fine_tuned(rows, steps=self.sft_steps, learning_rate=1e-3))

    def parts(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        return column_sums.dealt_additions(self.spared, self.tested)


TASKS = {"sums": Settings(), "three digits": ColumnSettings()}


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> passed: pass@k by family; silent: the share of groups without any advantage; entropy and
    length of the last batches; seconds of processor time; batches sampled, where a step may take
    several; of TEMPO also branches, the share of tokens at which answers part. Of the untrained
    policy: passed alone.
    """
    known = fitting(settings)
    require(name in known, "name", repr(name), f"one of {', '.join(known)}")
    taught, spared, tested = settings.parts()
    if name == UNTRAINED:
        return {"passed": measured(settings.model, tested, seed, settings)}
    begun, method = time.process_time(), method_of(name)
    with trained(
        taught, settings, method, name=name, rate=rate, seed=seed, tell=tell,
        steps=settings.steps // ARMS[name].shorter,
    ) as run:  # fmt: skip
        passed = measured(trained_model(run), spared if tuning else tested, seed, settings)
    end = run.log[-LAST:]
    parted, batches = (
        [row[logged] for row in run.log if logged in row]
        for logged in ("branch_tokens", "generation_batches")
    )
    return {
        "passed": passed,
        "silent": silent_groups(run),
        "entropy": float(np.mean([row["entropy"] for row in end])),
        "length": float(np.mean([row["completions/mean_length"] for row in end])),
        "seconds": time.process_time() - begun,
        **({"batches": sum(batches)} if batches else {}),
        **({"branches": float(np.mean(parted))} if parted else {}),
    }


def method_of(name: str) -> PolicyMethod:
    arm = ARMS[name]
    made: PolicyMethod = getattr(policy_methods, arm.method)(**arm.options)
    return made


def fitting(settings: Settings) -> list[str]:
    """The arms of a study: those that score lines need problems that are worked out in lines."""
    lines = set(settings.families) <= {"chain_sum", "basic_arithmetic"}
    able = [name for name, arm in ARMS.items() if lines or not arm.lines]
    return [UNTRAINED, *(name for name in able if name not in settings.without)]


def measured(
    model: str, rows: Sequence[Problem], seed: int, settings: Settings
) -> dict[str, dict[str, float]]:
    """pass@k of sampled answers: family -> k -> share."""
    rewards = policy_training.rewards_of_samples(
        *opened(model), rows,
        policy_training.find_reward("exact"), n=settings.samples, max_tokens=settings.max_tokens,
        seed=seed,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for family in settings.families:
        own = rewards[[row["family"] == family for row in rows]]
        found[family] = {str(k): share for k, share in policy_training.pass_at(own).items()}
    return found


# ── the study ───────────────────────────────────────────────────────────────────────────────────


def plan_of(settings: Settings) -> StudyPlan:
    """The study of one task."""
    return policy_plan(
        "policy-study", {name: TITLES[name] for name in fitting(settings)}, run_arm, settings,
        base=settings.base(), options=OPTIONS, quality=partial(mean_pass, k=1), measures=MEASURES,
    )  # fmt: skip


def mean_pass(record: Record, k: int) -> float:
    """pass@k, the mean over families of as many problems."""
    return float(np.mean([shares[str(k)] for shares in record["passed"].values()]))


# ── reports ─────────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    "pass@1": lambda record: mean_pass(record, 1),
    "pass@8": lambda record: mean_pass(record, 8),
    "silent groups": itemgetter("silent"),
    "entropy": itemgetter("entropy"),
    "length": itemgetter("length"),
}
OF_PAPER = {
    27: (
        *("ngrpo", "grpo", "grpo_twice", "rloo", "dapo", "psr", "nsr", "w_reinforce"),
        *("dapo_once", "dapo_half", "ngrpo_refilled"),
    ),
    29: ("tempo", "grpo", "rloo"),
    48: ("pure", "pure_outcome", "pure_sum", "grpo"),
}
LEARNS = "training from rewards helps"
HIGHER = "higher pass@k AUC on MATH500, AMC23 and AIME2025 (7B trained on MATH)"
BETTER = "better than PPO and GRPO on MATH, MedQA and out of distribution (Qwen3-1.7B and 4B)"
MORE = "DAPO, 32B, AIME 2024: 50, GRPO 30"
AGAIN = "DAPO, 32B, AIME 2024: 50 with dynamic sampling, 42 without"
SILENT = "groups that are all wrong teach under NGRPO"
PARITY = "7B, mean of five benchmarks: process rewards alone 49.3, outcomes alone 48.3"
TENTH = "7B, mean of five benchmarks: 53.3 with outcomes for a tenth, 49.3 without, 48.3 outcomes"


COMPARISONS = {
    27: [
        Comparison("grpo", UNTRAINED, "pass@1", LEARNS),
        Comparison("ngrpo", UNTRAINED, "pass@1", LEARNS),
        *(Comparison("ngrpo", other, "pass@8", HIGHER) for other in OF_PAPER[27][1:8]),
        Comparison("ngrpo_refilled", "dapo", "pass@8", HIGHER),
        Comparison("dapo", "grpo", "pass@1", MORE),
        Comparison("dapo_half", "grpo", "pass@1", MORE + "; here for as many samples"),
        Comparison("dapo", "dapo_once", "pass@1", AGAIN),
        Comparison("dapo_half", "dapo_once", "pass@1", "DAPO: no slower for as many samples"),
        Comparison("ngrpo", "grpo", "pass@1", HIGHER),
        Comparison("ngrpo", "grpo", "pass@8", HIGHER, part="shared"),
        Comparison("ngrpo", "grpo_twice", "pass@8", HIGHER, part="shared"),
        Comparison("ngrpo", "grpo", "silent groups", SILENT, more=False),
        Comparison("ngrpo", "grpo", "entropy", "NGRPO goes on exploring"),
    ],
    29: [
        Comparison("tempo", UNTRAINED, "pass@1", LEARNS),
        Comparison("tempo", "grpo", "pass@1", BETTER),
        Comparison("tempo", "rloo", "pass@1", "not compared in the paper"),
        Comparison("tempo", "grpo", "pass@1", BETTER, part="shared"),
    ],
    48: [
        Comparison("pure", "pure_sum", "pass@1", "min-form is what process rewards need"),
        Comparison("pure", "pure_sum", "pass@1", "the sum collapses early", part="shared"),
        Comparison("pure_sum", UNTRAINED, "pass@1", "the sum collapses early", False, "shared"),
        Comparison("pure", "grpo", "pass@1", PARITY),
        Comparison("pure_outcome", "grpo", "pass@1", TENTH),
        Comparison("pure_outcome", "pure", "pass@1", TENTH),
    ],
}  # fmt: skip


def add_policy_study(
    report: Report, paper: int, rng: int, tasks: dict[str, Settings] | None = None,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Run what the journal lacks of a paper's arms, on every task that suits them, and judge."""
    require(paper in OF_PAPER, "paper", paper, f"one of {', '.join(map(str, OF_PAPER))}")
    own = OF_PAPER[paper]
    for task, settings in (TASKS if tasks is None else tasks).items():
        arms = [arm for arm in (UNTRAINED, *own) if arm in fitting(settings)]
        if own[0] in arms:
            plan = plan_of(settings)
            about = f"Language model, {task}"
            asked = [c for c in COMPARISONS[paper] if {c.arm, c.other} <= set(arms)]
            records = judge(report, about, plan, asked, rng, progress, arms)
            for part in ("best", "shared"):
                report.tables.append(results(part, task, settings, arms, records))
            if ONE_RUN not in report.notes:
                report.notes.append(ONE_RUN)
            title = f"{about}: spared problems right by learning rate"
            report.figures.append(tuning_figure(title, plan, arms, records, "pass@1", "grpo"))


def results(
    part: str, task: str, settings: Settings, arms: Sequence[str], records: Sequence[Record]
) -> ReportTable:
    steps: dict[str, Cell] = {
        arm: method_of(arm).options.get("num_iterations", 1) for arm in arms if arm in ARMS
    }
    at = "each at its best rate" if part == "best" else "all at one rate"
    note = (
        f"{settings.tested} problems of each of {', '.join(settings.families)}; {settings.seeds} "
        f"seeds. Steps: of the optimizer; at one rate, two go further. Silent groups have no "
        f"advantage; entropy and length: of the last {LAST} batches."
    )
    more = {"steps a batch": steps}
    if "dapo" in arms:
        each = settings.prompts * settings.generations
        more["answers sampled"] = {
            arm: round(each * np.mean([
                run.get("batches", settings.steps // ARMS[arm].shorter)
                for run in part_of(records, arm, part)
            ])) for arm in arms if arm in ARMS
        }  # fmt: skip
    if "tempo" in arms:
        parted = mean_interval([run["branches"] for run in part_of(records, "tempo", part)])
        more["branch tokens"] = {"tempo": parted}
        note += " Branch tokens: at which answers to a problem part, of all that were trained on."
    return study_table(
        f"Language model, {task}, after {settings.size}, {at}", plan_of(settings), arms, records,
        part=part, against="grpo", less=("pass@1", "pass@8"), note=note,
        more=more,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, TASKS, arguments)


if __name__ == "__main__":
    main()
