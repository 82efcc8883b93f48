"""What studies of the small policy share: their sizes, their problems, and a run of an arm."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.small_policy import FOLDER, Problem, sample_answers, shipped_problems
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    fingerprint,
    run_key,
    run_study,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Report
from scoredraw.rl.policy_training import (
    EMBEDDED,
    PolicyMethod,
    PolicyRun,
    Row,
    open_policy,
    train_policy,
)

UNTRAINED = "untrained"
FEW_SEEDS = "Language model: runs are short and seeds few; only large gaps stand out."


@dataclass(frozen=True)
class PolicySettings:
    """What every run of a study shares, and the study's sizes; studies add theirs.

    model: a folder, or "embedded": the policy that ships, or what the study first makes of it.
    steps: batches of `prompts` problems with `generations` answers of up to max_tokens. spared: of
    a family's training problems, to tune by; tested: of its test problems; samples: answers to each
    of either. rates: the grid; shared: the rate that all arms also run at; seeds: at both of these.
    """

    model: str = EMBEDDED
    steps: int = 30
    prompts: int = 8
    generations: int = 8
    max_tokens: int = 48
    spared: int = 50
    tested: int = 100
    samples: int = 8
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    shared: float | None = None
    seeds: int = 3

    @property
    def size(self) -> str:
        """Of a run, in words."""
        return f"{self.steps} batches of {self.prompts} x {self.generations}"


def dealt_problems(
    families: Sequence[str], spared: int, tested: int
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """To train on, the last `spared` of each family of those, and `tested` of each to test with."""
    parts: tuple[list[Problem], list[Problem], list[Problem]] = ([], [], [])
    for family in families:
        rows, tests = (shipped_problems(part, [family]) for part in ("train", "test"))
        first = len(rows) - spared
        parts[0].extend(rows[:first])
        parts[1].extend(rows[first:])
        parts[2].extend(tests[:tested])
    return parts


def opened(model: str) -> tuple[Any, Any]:
    """A policy and its tokenizer, by its folder or "embedded"."""
    return open_policy(str(FOLDER) if model == EMBEDDED else model)


def files_of(model: str) -> str:
    """What tells the files of a policy and of the problems."""
    return fingerprint(FOLDER, FOLDER if model == EMBEDDED else Path(model))


@contextmanager
def trained(
    problems: Sequence[Problem], settings: PolicySettings, method: PolicyMethod, *, name: str,
    rate: float, seed: int, tell: Step | None = None, **more: Any,
) -> Iterator[PolicyRun]:  # fmt: skip
    """A run of `train_policy` whose folder is gone afterwards; more: of its arguments, these win.

    On one thread, what is done with the run, too.
    """

    def progress(batch: int, batches: int, _: Row) -> None:
        if tell is not None:
            tell(batch, batches)

    usual: dict[str, Any] = {
        "model": settings.model, "steps": settings.steps, "prompts": settings.prompts,
        "generations": settings.generations, "max_tokens": settings.max_tokens,
        "learning_rate": rate, "progress": progress,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, one_thread():
        yield train_policy(
            problems, Path(folder), method=method, about=name, seed=seed, held_out=0,
            save_every=settings.steps, **{**usual, **more},
        )  # fmt: skip


def trained_model(run: PolicyRun) -> str:
    """The folder of what a run made."""
    return str(run.folder / "model")


def silent_groups(run: PolicyRun) -> float:
    """The share of groups without any advantage, over the whole run."""
    return float(
        np.mean([row.get("frac_dead_groups", row["frac_reward_zero_std"]) for row in run.log])
    )


def sampled_texts(
    model: str, rows: Sequence[Problem], seed: int, settings: PolicySettings
) -> tuple[list[Problem], list[str]]:
    """`samples` answers of a policy to each problem: the problems, repeated, and the texts."""
    asked = [row for row in rows for _ in range(settings.samples)]
    net, tokenizer = opened(model)
    texts = sample_answers(
        net, tokenizer, [row["prompt"] for row in asked], seed=seed,
        max_new_tokens=settings.max_tokens,
    )  # fmt: skip
    return asked, texts


def policy_plan(
    study: str, titles: Mapping[str, str], run_arm: Callable[..., Record],
    settings: PolicySettings, *, base: str, options: Mapping[str, Any],
    quality: Callable[[Record], float], measures: dict[str, Callable[[Record], float]],
    fixed: Sequence[str] = (UNTRAINED,), data: str = "",
) -> StudyPlan:  # fmt: skip
    """The plan of a study; run_arm gets its settings with `base` as the model.

    study: the journal's name in the cache. base: the folder of the policy that all arms start from,
    or "embedded". options: what tells arms apart, as `run_key`; data: what tells other files.
    """
    return StudyPlan(
        titles=dict(titles), fixed=tuple(fixed), rates=settings.rates, shared=settings.shared,
        seeds=settings.seeds, run=partial(run_arm, settings=replace(settings, model=base)),
        key=partial(run_key, arms=options, settings=settings, files=files_of(base) + data),
        quality=quality, journal=cache_directory() / f"{study}.jsonl", steps=settings.steps,
        measures=measures,
    )  # fmt: skip


def judge(
    report: Report, about: str, plan: StudyPlan, comparisons: Sequence[Comparison], rng: int,
    progress: Progress | None = None, arms: Sequence[str] | None = None,
) -> list[Record]:  # fmt: skip
    """Run what the journal lacks, and report a claim a comparison -> the records of all runs."""
    records = run_study(plan, rng, progress, arms)
    report.claims.extend(c.claim(about, plan, records) for c in comparisons)
    if FEW_SEEDS not in report.notes:
        report.notes.append(FEW_SEEDS)
    return records
