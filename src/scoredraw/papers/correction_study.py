"""Learning to correct oneself, compared by training a language model on real problems.

The small policy, taught to answer a second time when asked (`second_attempts`), is the untrained
one. All arms go on from it with equally many sampled attempts at the training problems: SCoRe, its
parts left out, naive reinforcement of both attempts, imitation of own corrections (TRL's SFT), and
GRPO on first attempts alone, of which it has twice as many a batch.

Each arm has its own learning rate, the best of a small grid (and of a rate or two beyond it, where
the best is at an end) by its final answers to spared training problems, with a seed of its own:
those are its second attempts, of GRPO its first. What is reported are attempts sampled at
temperature 1 (the paper's are greedy) at test problems, paired by seed.

The journal of finished runs lies in the cache, and so does the taught policy; changed code is not
noticed. `python -m scoredraw.papers.correction_study --arms score,naive --workers 2` runs some.

Kumar et al. 2024, "Training language models to self-correct via reinforcement learning",
arXiv 2409.12917.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scoredraw.errors import require
from scoredraw.metrics import mean_interval
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    policy_plan,
    trained,
    trained_model,
)
from scoredraw.papers.second_attempts import (
    AGAIN,
    FAMILY,
    FRESH_SEED,
    are_right,
    attempts,
    episodes,
    measured,
    second_prompt,
    taught_policy,
)
from scoredraw.papers.small_policy import Problem
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
from scoredraw.reports import Claim, Figure, Report, Series
from scoredraw.rl import policy_methods
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod, open_policy

COLLAPSED = 0.05  # a second attempt this close to the first adds nothing
ALPHA = 10.0
SCORE = {
    "first": 1 / 3, "alpha": ALPHA, "beta1": 0.01, "beta2": 0.1, "correction_prompt": AGAIN,
}  # fmt: skip


class Arm(NamedTuple):
    """learn: by "score" or its "weight", with options of that method; from "pairs" of a wrong and a
    right attempt; from "episodes" that ended right; by "grpo" from first attempts."""

    title: str
    learn: str
    options: dict[str, Any]


ARMS = {
    "score": Arm("SCoRe", "score", SCORE),
    "naive": Arm("naive two-turn RL", "score", SCORE | {"first": 0.0, "alpha": 0.0}),
    "no_stage": Arm("SCoRe without stage I", "score", SCORE | {"first": 0.0}),
    "no_bonus": Arm("SCoRe without bonus", "score", SCORE | {"alpha": 0.0}),
    "weight": Arm("weight 1 + α", "weight", SCORE),
    "pair_sft": Arm("Pair-SFT", "pairs", {}),
    "star": Arm("STaR, and right pairs", "episodes", {}),
    "grpo": Arm("GRPO, first attempts", "grpo", {}),
}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "embedded": the policy that ships after `lessons` steps on `fresh` questions.

    steps, prompts, generations: of episodes; those who imitate make as many steps, with as many
    texts. max_tokens: of an attempt.
    """

    fresh: int = 1000
    lessons: int = 100
    steps: int = 20
    max_tokens: int = 8
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)


# ── problems ────────────────────────────────────────────────────────────────────────────────────


def study_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    return dealt_problems([FAMILY], settings.spared, settings.tested)


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> acc_t1, acc_t2, delta, i2c, c2i, missing, same: shares of episodes; final: right at the
    attempt that the arm is for; lessons: texts to imitate, of arms that do; seconds of processor
    time.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    rows = study_problems(settings)[1 if tuning else 2]
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "alpha: ", RuntimeWarning)  # none, on purpose
        with made_by(name, rate, seed, tell, settings) as (model, found):
            found |= measured(model, rows, seed, settings.samples, settings.max_tokens)
    found["final"] = found["acc_t1" if name == "grpo" else "acc_t2"]
    return {**found, "seconds": time.process_time() - begun}


def base_policy(settings: Settings) -> str:
    """The folder of the policy that all arms start from."""
    if settings.model != EMBEDDED:
        return settings.model
    return taught_policy(settings.fresh, settings.lessons, settings.max_tokens)


@contextmanager
def made_by(
    name: str, rate: float, seed: int, tell: Step | None, settings: Settings
) -> Iterator[tuple[str, Record]]:
    """The folder of the policy that an arm makes, gone afterwards, and what there is to say."""
    problems = study_problems(settings)[0]
    if name == UNTRAINED:
        yield settings.model, {}
    elif ARMS[name].learn in {"pairs", "episodes"}:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rows = corrections(ARMS[name].learn, settings.model, problems, seed, settings)
        with tempfile.TemporaryDirectory() as folder:
            made = imitated(rows, rate, seed, Path(folder), settings) if rows else settings.model
            if tell is not None:
                tell(settings.steps, settings.steps)
            yield made, {"lessons": len(rows)}
    else:
        prompts = settings.prompts * (1 + (name == "grpo"))  # which attempts once
        with trained(
            problems, settings, method_of(name), name=name, rate=rate, seed=seed, tell=tell,
            prompts=prompts,
        ) as run:  # fmt: skip
            yield trained_model(run), {}


def method_of(name: str) -> PolicyMethod:
    arm = ARMS[name]
    if arm.learn == "grpo":
        return policy_methods.grpo()
    made = policy_methods.score(**arm.options)
    here = "scoredraw.papers.correction_study:weighted_trainer"
    return replace(made, trainer=here) if arm.learn == "weight" else made


def weighted_trainer(alpha: float, **options: Any) -> Any:
    """SCoRe's trainer with the reward of second attempts times 1 + α in stage II, and no bonus."""
    from scoredraw.rl.self_correction_trainer import SCoReTrainer

    class Weighted(SCoReTrainer):
        def _calculate_rewards(self, *batch: Any) -> torch.Tensor:
            found = super()._calculate_rewards(*batch)
            if self.stage == 2:
                self._attempt_rewards[:, 1] *= 1 + alpha
            return found

    return Weighted(alpha=0.0, reward_range=(0.0, 1 + alpha), **options)


def corrections(
    learn: str, source: str, problems: Sequence[Problem], seed: int, settings: Settings
) -> list[dict[str, str]]:
    """Second attempts to imitate, prompt and completion, out of as many attempts as others sample.

    "episodes": those that came out right, whatever the first was; "pairs": after each wrong first
    attempt, a right first attempt at the same problem.
    """
    net, tokenizer = open_policy(source)
    net.eval()
    rng = np.random.default_rng(seed)
    total = settings.steps * settings.prompts * settings.generations
    order = np.resize(rng.permutation(len(problems)), total * (1 + (learn == "pairs")))
    rows = [problems[i] for i in order.tolist()]
    if learn == "episodes":
        made = episodes(net, tokenizer, rows, settings.max_tokens)
        good = [e for e in made if e.right[1] and e.second.ended]
        found = [(e.problem["prompt"], e.first.text, e.second.text) for e in good]
    else:
        tried = attempts(net, tokenizer, [row["prompt"] for row in rows], settings.max_tokens)
        wrong, solved = [], defaultdict(list)
        for row, one, right in zip(rows, tried, are_right(rows, tried), strict=True):
            if one.ended and right:
                solved[row["prompt"]].append(one.text)
            elif one.ended:
                wrong.append((row["prompt"], one.text))
        found = [(p, text, str(rng.choice(solved[p]))) for p, text in wrong if solved[p]]
    return [
        {"prompt": second_prompt(tokenizer, prompt, first), "completion": second}
        for prompt, first, second in found
    ]


def imitated(
    rows: list[dict[str, str]], rate: float, seed: int, folder: Path, settings: Settings
) -> str:
    """The folder of the policy after TRL's SFT on these completions."""
    import datasets
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    net, tokenizer = open_policy(settings.model)
    config = SFTConfig(
        output_dir=str(folder / "checkpoints"), max_steps=settings.steps, learning_rate=rate,
        per_device_train_batch_size=settings.prompts * settings.generations, seed=seed,
        save_strategy="no", report_to=[], disable_tqdm=True, activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = SFTTrainer(
        net, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    net.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    "right first": itemgetter("acc_t1"),
    "right second": itemgetter("acc_t2"),
    "Δ": itemgetter("delta"),
    "mended": itemgetter("i2c"),
    "spoiled": itemgetter("c2i"),
    "same answer": itemgetter("same"),
    "final answer": itemgetter("final"),
    "imitated": itemgetter("lessons"),
}
IMITATION = "imitation of own corrections corrects less"
REPEATS = "naive multi-turn RL learns to repeat its answer"
COMPARISONS = [
    Comparison("score", UNTRAINED, "Δ", "MATH: +4.4 against -11.2"),
    Comparison("score", "naive", "Δ", "SCoRe corrects more than naive multi-turn RL"),
    Comparison("score", "no_stage", "Δ", "MATH: +4.4 against +2.2"),
    Comparison("score", "no_bonus", "Δ", "MATH: +4.4 against +2.6"),
    Comparison("score", "pair_sft", "Δ", "MATH: +4.4 against +1.8"),
    Comparison("score", "star", "Δ", IMITATION),
    Comparison("score", "grpo", "Δ", "MATH, single turn: +4.4 against -2.4"),
    Comparison("score", "weight", "Δ", "(derived) the bonus is this weight, and noise"),
    Comparison("score", UNTRAINED, "right first", "MATH: 60.0 against 52.6"),
    Comparison("score", UNTRAINED, "mended", "MATH: 5.8 against 4.6"),
    Comparison("score", UNTRAINED, "spoiled", "MATH: 1.4 against 15.8", more=False),
    Comparison("score", UNTRAINED, "right second", "MATH: 64.4 against 41.4"),
    Comparison("score", "naive", "right second", "SCoRe has the best second attempts"),
    Comparison("score", "grpo", "final answer", "MATH: 64.4 second, 61.8 of single turn"),
    Comparison("naive", UNTRAINED, "same answer", REPEATS),
]


def plan_of(settings: Settings) -> StudyPlan:
    """The study, which tunes by the share of right final answers; teaches two attempts first."""
    task = (AGAIN, FAMILY, FRESH_SEED)
    return policy_plan(
        "correction-study", TITLES, run_arm, settings, base=base_policy(settings),
        options={name: (arm[1:], task) for name, arm in ARMS.items()},
        quality=itemgetter("final"), measures=MEASURES,
    )  # fmt: skip


def add_correction_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    settings = Settings() if settings is None else settings
    plan = plan_of(settings)
    about = "Language model"
    records = judge(report, about, plan, COMPARISONS, rng, progress)
    naive = mean_interval(per_seed(plan, records, "naive", "Δ"))
    name = f"{about}, Δ: {TITLES['naive']}"
    report.claims.append(Claim.within(name, "Δ falls to about 0", naive, -COLLAPSED, COLLAPSED))
    note = (
        f"{settings.tested} questions, {settings.samples} episodes each; {settings.seeds} seeds. "
        "Final answer: the second, of GRPO the first. Imitated: texts, of arms that do."
    )
    report.tables.append(
        study_table(
            f"{about} after {settings.size} episodes, each at its best rate", plan,
            list(TITLES), records, against="naive", less=("right second", "Δ"), note=note,
        )
    )  # fmt: skip
    gains = [mean_interval(per_seed(plan, records, arm, "Δ")) for arm in TITLES]
    low, high = [g.low for g in gains], [g.high for g in gains]
    one = Series("mean, 95 %", list(TITLES.values()), [g.value for g in gains], low, high)
    title, label = f"{about}: what the second attempt adds", "right second less right first"
    report.figures.append(Figure("interval", title, label, series=[one], reference=0.0))
    title = f"{about}: right final answers to spared problems by learning rate"
    report.figures.append(
        tuning_figure(title, plan, list(TITLES), records, "right final answers", "naive")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"letters": Settings()}, arguments)


if __name__ == "__main__":
    main()
