"""Rewards for stated confidence, compared by training a language model on real problems.

The small policy, taught to state a confidence at random (`stated_confidence`) and right about every
second time, is trained from rewards with equally many samples an arm: for being right alone, by
TRL's GRPO; for form and being right (RLVR, the published baseline); for these and a proper score of
the confidence (RLCR), Brier or spherical; and for form and Brier score alone, which pays for being
wrong on purpose. RLVR's answers get a confidence afterwards, too.

Each arm has a learning rate of its own, tuned by the mean of the reward that it is trained on, on
spared training problems (`studies`). All that is reported is of sampled answers to test problems.

The journal of finished runs lies in the cache, and so does the policy that knows the form (a few
minutes, once). Changed code is not noticed; after that delete the journal. `python -m
scoredraw.papers.confidence_study --arms rlvr,rlcr --workers 2` runs some of it.

Damani et al., "Beyond binary rewards: training LMs to reason about their uncertainty", 2025, arXiv
2507.16806.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from scoredraw.errors import require
from scoredraw.metrics import mean_interval
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    policy_plan,
    trained,
    trained_model,
)
from scoredraw.papers.small_policy import Problem
from scoredraw.papers.stated_confidence import (
    FITTED,
    FORMAT,
    Said,
    calibrated,
    confidence_afterwards,
    say,
    taught_policy,
)
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    per_seed,
    run_study,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Claim, Figure, Report, Series
from scoredraw.rl import policy_methods
from scoredraw.rl.policy_training import EMBEDDED, AnswerReward, PolicyMethod, open_policy
from scoredraw.rl.reward_functions import RewardFunction

ABOUT = "Language model, stated confidence"


class Arm(NamedTuple):
    """A function of `policy_methods` and its options."""

    title: str
    method: str
    options: dict[str, Any]


def _rlcr(title: str, *weights: float, **options: Any) -> Arm:
    """weights: of form, correctness and score."""
    return Arm(title, "rlcr", {"format": FORMAT, "weights": weights, **options})


ARMS = {
    "grpo": Arm("GRPO (TRL's), correctness", "grpo", {}),
    "rlvr": _rlcr("RLVR", 0.5, 0.5, 0.0),
    "rlcr": _rlcr("RLCR", 0.5, 0.5, 0.5),
    "spherical": _rlcr("RLCR, spherical score", 0.5, 0.5, 0.5, score="spherical"),
    "alone": _rlcr("Brier score alone", 0.5, 0.0, 0.5, when_wrong_pays="warn"),
}
OPTIONS = {name: arm[1:] for name, arm in ARMS.items()}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}
AFTERWARDS = {
    "head": "RLVR + linear head, BCE", "chance": "RLVR + probability of the answer",
    "constant": "RLVR + its accuracy, always",
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "embedded" for that of `taught_policy`; a folder has to know the form."""

    families: tuple[str, ...] = ("gcd", "simple_equations", "letter_counting")
    max_tokens: int = 64
    samples: int = 3


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> `calibrated` of sampled answers, right or not whatever their form; formed: the share that
    has the form. Of the trained besides, reward: the mean of the arm's own; seconds of processor
    time; and of RLVR on test problems, afterwards: `calibrated` for each of AFTERWARDS.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    taught, spared, tested = problems(settings)
    rows = spared if tuning else tested
    sample = partial(say, seed=seed, max_tokens=settings.max_tokens)
    if name == UNTRAINED:
        with one_thread():
            return measured(sample(*open_policy(settings.model), rows, samples=settings.samples))
    method = method_of(name)
    with trained(taught, settings, method, name=name, rate=rate, seed=seed, tell=tell) as run:
        policy = open_policy(trained_model(run))
        own = sample(*policy, rows, samples=settings.samples)
        record = measured(own) | {"reward": mean_reward(own, method)}
        if name == "rlvr" and not tuning:
            new = sample(*policy, taught, samples=FITTED)
            other = confidence_afterwards(*policy, own, new)
            record["afterwards"] = {k: calibrated(own.right, q) for k, q in other.items()}
    return record | {"seconds": time.process_time() - begun}


def problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    return dealt_problems(settings.families, settings.spared, settings.tested)


def base_policy(settings: Settings) -> str:
    """The folder of a policy that knows the form; it is taught now if that is not done yet."""
    if settings.model != EMBEDDED:
        return settings.model
    return str(taught_policy(problems(settings)[0]))


def method_of(name: str) -> PolicyMethod:
    arm = ARMS[name]
    own = {"verifier": same_text} if arm.method == "rlcr" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RLCRReward: wrong answers")
        made: PolicyMethod = getattr(policy_methods, arm.method)(**arm.options, **own)
    return made


def same_text(answer: str, gold: Any) -> bool:
    """As GRPO's reward has it; without punctuation, 1.2 were 12."""
    return answer == str(gold)


def measured(own: Said) -> Record:
    return calibrated(own.right, own.confidence) | {"formed": float(own.formed.mean())}


def mean_reward(own: Said, method: PolicyMethod) -> float:
    """The mean of the one reward that a method trains on."""
    reward: RewardFunction = AnswerReward()
    if method.rewards is not None:
        (reward,) = method.rewards(reward)
    asked, answers = ([row[key] for row in own.rows] for key in ("prompt", "answer"))
    earned = reward(prompts=asked, completions=own.texts, answer=answers)
    return float(np.mean(np.array(earned, np.float64)))


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    "accuracy": itemgetter("acc"), "Brier": itemgetter("brier"), "ECE": itemgetter("ece"),
    "AUROC": itemgetter("auroc"), "mean confidence": itemgetter("mean_conf"),
    "well-formed": itemgetter("formed"),
}  # fmt: skip


def plan_of(settings: Settings) -> StudyPlan:
    return policy_plan(
        "confidence-study", TITLES, run_arm, settings, base=base_policy(settings),
        options=OPTIONS, quality=itemgetter("reward"), measures=MEASURES,
    )  # fmt: skip


# ── reports ─────────────────────────────────────────────────────────────────────────────────────

LEARNS = "training from rewards helps"
BOUNDED = "any bounded proper score"
AS_ACCURATE = "HotpotQA: accuracy .621 against .630"
BRIER, ECE = "HotpotQA: Brier .210 against ", "HotpotQA: ECE .030 against "
ON_PURPOSE = "alone, the score pays for being wrong on purpose"
COMPARISONS = [
    *(Comparison(arm, UNTRAINED, "accuracy", LEARNS) for arm in ("grpo", "rlvr", "rlcr")),
    Comparison("rlcr", "rlvr", "Brier", f"{BRIER}.370", more=False),
    Comparison("rlcr", "rlvr", "ECE", f"{ECE}.370", more=False),
    Comparison("rlcr", "rlvr", "AUROC", "HotpotQA: AUROC .687 against .5"),
    Comparison("rlcr", "grpo", "Brier", f"{BRIER}.370", more=False),
    Comparison("rlcr", "grpo", "ECE", f"{ECE}.370", more=False),
    Comparison("rlcr", UNTRAINED, "ECE", f"{ECE}.535", more=False),
    Comparison("spherical", "rlvr", "Brier", BOUNDED, more=False),
    Comparison("spherical", "rlvr", "ECE", BOUNDED, more=False),
    Comparison("rlcr", "head", "Brier", f"{BRIER}.217", more=False),
    Comparison("rlcr", "head", "ECE", f"{ECE}.070", more=False),
    Comparison("rlcr", "chance", "Brier", f"{BRIER}.357", more=False),
    Comparison("rlcr", "chance", "ECE", f"{ECE}.360", more=False),
    Comparison("rlcr", "constant", "Brier", "not compared in the paper", more=False),
    Comparison("alone", "rlcr", "accuracy", ON_PURPOSE, more=False),
]
NEAR = [  # that RLCR costs no accuracy
    Comparison("rlcr", "rlvr", "accuracy", AS_ACCURATE),
    Comparison("rlcr", "grpo", "accuracy", AS_ACCURATE),
    Comparison("spherical", "rlvr", "accuracy", BOUNDED),
]
AS_GOOD = 0.03  # of accuracy
STILL = 0.8  # of the ECE of confidences at random


def add_confidence_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    settings = settings or Settings()
    plan = plan_of(settings)
    records = with_afterwards(run_study(plan, rng, progress))
    plan = replace(plan, titles=plan.titles | AFTERWARDS)
    report.claims.extend(claims(plan, records))
    note = (
        f"{settings.tested} test problems of each of {', '.join(settings.families)}, "
        f"{settings.samples} sampled answers each; {settings.seeds} seeds. Each arm at the rate "
        "with the highest mean of its own reward on spared problems. An answer that states no "
        "confidence counts with .5. The head and the accuracy are fitted to new answers to the "
        f"problems trained on, {FITTED} each."
    )
    arms = list(plan.titles)
    table = study_table(
        f"{ABOUT}, after {settings.size}", plan, arms, records, against="rlvr",
        less=("accuracy", "Brier", "ECE"), note=note,
    )  # fmt: skip
    report.tables.append(table)
    report.figures.append(brier_figure(plan, records))
    title = f"{ABOUT}: mean reward of spared problems by learning rate"
    report.figures.append(tuning_figure(title, plan, arms, records, "reward of the arm", "rlvr"))
    report.notes.append(f"{ABOUT}: runs are short and seeds few; only large gaps stand out.")


def with_afterwards(records: Sequence[Record]) -> list[Record]:
    """The records, and one for each confidence that RLVR's answers got afterwards."""
    more = [
        {"formed": record["formed"], "rate": record["rate"], "seed": record["seed"],
         "part": record["part"], "arm": name, **found}
        for record in records
        for name, found in record.get("afterwards", {}).items()
    ]  # fmt: skip
    return [*records, *more]


def claims(plan: StudyPlan, records: Sequence[Record]) -> list[Claim]:
    def of(arm: str, measure: str) -> Any:
        return per_seed(plan, records, arm, measure)

    near = [
        Claim.at_least(
            f"{ABOUT}, accuracy: {TITLES[c.arm]} - {TITLES[c.other]}", c.says,
            c.gap(plan, records), -AS_GOOD,
        )
        for c in NEAR
    ]  # fmt: skip
    area = mean_interval(of("rlvr", "AUROC"))
    ratio = mean_interval(of("rlvr", "ECE") / of(UNTRAINED, "ECE"))
    says = "being right alone does not calibrate"
    return [
        *(c.claim(ABOUT, plan, records) for c in COMPARISONS),
        *near,
        Claim.within(f"{ABOUT}, AUROC: RLVR", "HotpotQA: .5", area, 0.45, 0.55),
        Claim.at_least(f"{ABOUT}, ECE: RLVR / untrained", says, ratio, STILL),
    ]


def brier_figure(plan: StudyPlan, records: Sequence[Record]) -> Figure:
    marks = [mean_interval(per_seed(plan, records, arm, "Brier")) for arm in plan.titles]
    value, low, high = ([getattr(m, side) for m in marks] for side in ("value", "low", "high"))
    title = f"{ABOUT}: Brier score (lower is better)"
    series = Series("seeds", list(plan.titles.values()), value, low, high)
    return Figure("interval", title, "Brier score", series=[series])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"confidence": Settings()}, arguments)


if __name__ == "__main__":
    main()
