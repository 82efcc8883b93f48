"""A scorer that pays a little for length, and a language model that learns what it pays for.

The small policy works out sums, most of them right, and is first taught to put any number of idle
words after its answer. A scorer gives .5 for a right answer, .005 a letter and a noise of its own,
the same whenever it reads the same text; only being right is wanted. Where all answers to a sum are
right, or none is, few scores differ by a tenth, and dividing by their deviation makes as much of
that as of right and wrong. Trained on this score with and without the deviation, with a floor under
it, on ranks, on win rates in which less than a tenth is a tie; and on the truth.

Rates are tuned by the share of spared problems that are right: the score would choose what hacks it
most. So every arm is as good as labels for a few problems can make it; all run at one rate, too.

`python -m scoredraw.papers.win_rate_study --workers 2` runs what the journal lacks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch

from scoredraw.errors import require
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    policy_plan,
    sampled_texts,
    silent_groups,
    trained,
    trained_model,
)
from scoredraw.papers.small_policy import (
    Problem,
    fine_tuned,
    shipped_problems,
    worked,
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
from scoredraw.reports import Report, ReportTable
from scoredraw.rl import policy_methods
from scoredraw.rl.pairwise_rewards import normalised_advantages
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod, final_answer
from scoredraw.rl.reward_functions import completion_text

FAMILY = ("basic_arithmetic",)
ASKED = "Calculate {}.\n"
IDLE = "\nso"
MOST_IDLE = 8  # idle words that are taught; half as often with each more
SFT_BATCH = 32


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "embedded": the policy that ships after SFT on `learned` sums with idle words.

    right, letter, noise: what the scorer gives; margin: below it scores tie, and the floor.
    """

    learned: int = 1920
    right: float = 0.5
    letter: float = 0.005
    noise: float = 0.01
    margin: float = 0.1
    steps: int = 24
    max_tokens: int = 64
    samples: int = 4
    shared: float | None = 1e-4


# ── the scorer and the policy ───────────────────────────────────────────────────────────────────


class BiasedScore:
    """right · [the answer is right] + letter · letters + noise · z; z is normal, one a text."""

    def __init__(self, right: float, letter: float, noise: float) -> None:
        self.right, self.letter, self.noise = right, letter, noise
        self.__name__ = "biased_score"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any
    ) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        truth = right(texts, answer)
        return [
            self.right * true + self.letter * len(text) + self.noise * own_noise(f"{prompt}{text}")
            for prompt, text, true in zip(prompts, texts, truth, strict=True)
        ]


def right(texts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where what stands after the `#`, to the line's end, is the answer, else 0."""
    return [float(final_answer(text) == gold) for text, gold in zip(texts, answers, strict=True)]


def own_noise(text: str) -> float:
    """A standard normal number that is the text's own.

    >>> round(own_noise("#15"), 3) == round(own_noise("#15"), 3) != round(own_noise("#16"), 3)
    True
    """
    word = int.from_bytes(hashlib.blake2s(text.encode(), digest_size=6).digest(), "big")
    return NormalDist().inv_cdf((word + 0.5) / 2**48)


def idle_sums(n: int, seed: int = 0) -> list[Problem]:
    """n sums like those that ship, none of these, answered with 0, 1, 2, .. idle words after."""
    known = {row["prompt"] for part in ("train", "test") for row in shipped_problems(part, FAMILY)}
    rng = np.random.default_rng(seed)
    found: list[Problem] = []
    while len(found) < n:
        terms = rng.integers(0, 11, int(rng.integers(2, 5)))
        signs = rng.choice(["+", "-"], len(terms) - 1)
        sum_ = str(terms[0]) + "".join(f" {s} {t}" for s, t in zip(signs, terms[1:], strict=True))
        prompt = ASKED.format(sum_)
        if prompt not in known:
            lines = worked({"metadata": {"expression": sum_, "source_dataset": FAMILY[0]}})
            answer = lines.rstrip("\n").rpartition("=")[2]
            idle = min(int(rng.geometric(0.5)) - 1, MOST_IDLE)
            target = f"{lines}#{answer}" + IDLE * idle
            found.append({"prompt": prompt, "answer": answer, "target": target})
    return found


def base_policy(settings: Settings) -> str:
    """The folder of the policy before training from rewards; made once."""
    if settings.model != EMBEDDED:
        return settings.model
    steps = settings.learned // SFT_BATCH
    return str(fine_tuned(idle_sums(settings.learned), steps=steps, batch=SFT_BATCH))


# ── arms ────────────────────────────────────────────────────────────────────────────────────────


class Arm(NamedTuple):
    """A method made from the settings; truth: rewarded by right or wrong alone."""

    title: str
    method: Callable[[Settings], PolicyMethod]
    truth: bool = False


def floored(settings: Settings) -> PolicyMethod:
    """By score over the deviation, which counts as the margin where it is less."""

    def credit(rollouts: Any) -> torch.Tensor:
        return normalised_advantages(rollouts.reward, rollouts.group_ids, std_floor=settings.margin)

    return PolicyMethod(lambda _: credit)


ARMS = {
    "grpo": Arm("score (GRPO)", lambda _: policy_methods.grpo()),
    "dr_grpo": Arm("score, no deviation (Dr. GRPO)", lambda _: policy_methods.dr_grpo()),
    "floor": Arm("score, deviation floored", floored),
    "ranks": Arm("win rate without ties", lambda _: policy_methods.win_rate()),
    "win_rate": Arm(
        "win rate with ties", lambda settings: policy_methods.win_rate(margin=settings.margin)
    ),
    "truth": Arm("the truth (GRPO)", lambda _: policy_methods.grpo(), True),
}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> right, score, length in letters, idle words: means; of a trained policy also
    silent, the share of groups without any advantage, and seconds of processor time.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    taught, spared, tested = study_problems(settings)
    if name == UNTRAINED:
        with one_thread():
            return measured(settings.model, tested, seed, settings)
    begun, arm = time.process_time(), ARMS[name]
    with trained(
        taught, settings, arm.method(settings), name=name, rate=rate, seed=seed, tell=tell,
        reward="exact" if arm.truth else scorer(settings),
    ) as run:  # fmt: skip
        found = measured(trained_model(run), spared if tuning else tested, seed, settings)
    return {**found, "silent": silent_groups(run), "seconds": time.process_time() - begun}


def scorer(settings: Settings) -> BiasedScore:
    return BiasedScore(settings.right, settings.letter, settings.noise)


def study_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    return dealt_problems(FAMILY, settings.spared, settings.tested)


def measured(model: str, rows: Sequence[Problem], seed: int, settings: Settings) -> Record:
    """Means over sampled answers of a policy."""
    asked, texts = sampled_texts(model, rows, seed, settings)
    prompts, answers = ([row[key] for row in asked] for key in ("prompt", "answer"))
    return {
        "right": float(np.mean(right(texts, answers))),
        "score": float(np.mean(np.array(scorer(settings)(prompts, texts, answers), np.float64))),
        "length": float(np.mean([len(text) for text in texts])),
        "idle": float(np.mean([text.count(IDLE) for text in texts])),
    }


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    "right": itemgetter("right"),
    "score": itemgetter("score"),
    "length": itemgetter("length"),
    "idle words": itemgetter("idle"),
    "silent groups": itemgetter("silent"),
}


def plan_of(settings: Settings) -> StudyPlan:
    """The study; makes the policy it begins with."""
    return policy_plan(
        "win-rate-study", TITLES, run_arm, settings, base=base_policy(settings), options={},
        quality=itemgetter("right"), measures=MEASURES,
    )  # fmt: skip


HACKED = "training on scores over-saturates pictures: the score rises, what is wanted falls"
STABLE = "on win rates it stays stable"
TIES = "comparing is what helps (a rank compares, too)"
BESIDE = "not compared with in the paper"
SOUND = "the study itself: training on the truth helps"

COMPARISONS = [
    Comparison("truth", UNTRAINED, "right", SOUND),
    Comparison("grpo", UNTRAINED, "score", HACKED),
    Comparison("grpo", UNTRAINED, "length", HACKED),
    Comparison("grpo", UNTRAINED, "right", HACKED, more=False),
    Comparison("grpo", "truth", "right", HACKED, more=False),
    Comparison("win_rate", "grpo", "length", STABLE, more=False),
    Comparison("win_rate", UNTRAINED, "right", STABLE),
    Comparison("win_rate", "grpo", "right", STABLE),
    Comparison("ranks", "grpo", "length", TIES, more=False),
    *(Comparison("win_rate", other, measure, BESIDE, more=measure == "right")
      for other in ("ranks", "dr_grpo", "floor") for measure in ("length", "right")),
    Comparison("grpo", UNTRAINED, "right", HACKED, more=False, part="shared"),
    Comparison("win_rate", "grpo", "length", STABLE, more=False, part="shared"),
    Comparison("win_rate", "grpo", "right", STABLE, part="shared"),
]  # fmt: skip


def add_win_rate_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    settings = Settings() if settings is None else settings
    plan = plan_of(settings)
    about = "Language model, sums"
    records = judge(report, about, plan, COMPARISONS, rng, progress)
    report.tables.extend(results(part, plan, settings, records) for part in ("best", "shared"))
    title = f"{about}: spared problems right by learning rate"
    report.figures.append(tuning_figure(title, plan, list(TITLES), records, "right", "grpo"))


def results(
    part: str, plan: StudyPlan, settings: Settings, records: Sequence[Record]
) -> ReportTable:
    at = "each at its best rate" if part == "best" else "all at one rate"
    note = (
        f"{settings.tested} test problems, {settings.samples} answers each, at most "
        f"{settings.max_tokens} letters; {settings.seeds} seeds. Score: {settings.right:g} for a "
        f"right answer, {settings.letter:g} a letter, noise {settings.noise:g}; ties and the floor "
        f"at {settings.margin:g}."
    )
    return study_table(
        f"Language model and a biased score, after {settings.size}, {at}", plan,
        list(TITLES), records, part=part, against="grpo", less=("right", "length"), note=note,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"sums": Settings()}, arguments)


if __name__ == "__main__":
    main()
