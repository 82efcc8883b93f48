"""Ways to credit sampled answers, compared by training a language model on real problems.

The small policy that ships is trained from rewards by each method with equally many samples, on
sums that are worked out a line at a time (right for six of ten samples before any training) and on
a mix with harder problems. Each method has its own learning rate, the best of a small grid by the
mean reward on spared training problems with a seed of its own (and of a rate or two beyond it,
where the best is at an end); then other seeds train at that rate, and at one rate for all. What is
reported is measured on test problems, paired by seed: runs of one seed see the same problems in the
same order. Methods whose clip has bounds of their own take two optimizer steps a batch, as clips
only act on the second; so GRPO with two is among the methods.

Every finished run is a line of a journal in the cache, so that a study resumes and only pays for
what is new: what has other settings, weights or problems. Changed code is not noticed; after that
delete the journal. `python -m scoredraw.papers.policy_study --arms grpo,ngrpo` runs some of it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.journal import Journal
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.small_policy import FOLDER, Problem, shipped_problems
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl import policy_methods, policy_training
from scoredraw.rl.policy_training import EMBEDDED, PolicyMethod, Row

Float = NDArray[np.float64]
Record = dict[str, Any]
Progress = Callable[[str, int, int], None]  # the run in words, its steps done, all of them
Step = Callable[[int, int], None]

TUNING = 500  # the tuning seed, after the seeds of the study
FURTHER = 2  # rates that are tried beyond an end of the grid, each twice or half the last
LAST = 10  # batches whose entropy and length are reported


class Arm(NamedTuple):
    """A function of `policy_methods` and its options. lines: needs scores of worked lines."""

    title: str
    method: str
    options: dict[str, Any]
    lines: bool = False


UNTRAINED = "untrained"
PLAIN = {
    "grpo": "GRPO (TRL's)", "rloo": "RLOO", "dapo": "DAPO", "ngrpo": "NGRPO", "psr": "PSR",
    "nsr": "NSR", "w_reinforce": "W-REINFORCE", "tempo": "TEMPO",
}  # fmt: skip
ARMS = {name: Arm(title, name, {}) for name, title in PLAIN.items()} | {
    "grpo_twice": Arm("GRPO, two steps a batch", "grpo", {"passes": 2}),
    "pure": Arm("PURE, softmin of lines", "pure", {"outcome": False}, True),
    "pure_outcome": Arm("PURE, softmin of lines + outcome", "pure", {}, True),
    "pure_sum": Arm("PURE, sum of lines", "pure", {"outcome": False, "credit": "sum"}, True),
}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}


@dataclass(frozen=True)
class Settings:
    """What every run shares, and the sizes of the study.

    steps: batches of `prompts` problems with `generations` answers. spared: of a family's training
    problems, to tune by; tested: of a family's test problems; samples: answers to each of either.
    rates: the grid; shared: the rate that all methods also run at; seeds: at both of these.
    """

    families: tuple[str, ...] = ("chain_sum",)
    model: str = EMBEDDED
    steps: int = 30
    prompts: int = 8
    generations: int = 8
    max_tokens: int = 48
    spared: int = 50
    tested: int = 100
    samples: int = 8
    rates: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4)
    shared: float = 5e-5
    seeds: int = 3


SIZES = ("rates", "shared", "seeds")  # these say which runs there are, not what a run does
TASKS = {
    "sums": Settings(),
    "mix": Settings(("chain_sum", "simple_equations", "gcd", "count_bits"), spared=25),
}


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, settings: Settings, *, tuning: bool = False,
    progress: Callable[[int, int, Row], None] | None = None,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test problems, or on spared ones if tuning.

    -> passed: pass@k by family; silent: the share of groups without any advantage; entropy and
    length of the last batches; seconds of processor time. Of the untrained policy: passed alone.
    """
    known = fitting(settings)
    require(name in known, "name", repr(name), f"one of {', '.join(known)}")
    if name == UNTRAINED:
        tested = study_problems(settings)[2]
        return {"passed": measured(settings.model, tested, seed, settings)}
    begun = time.process_time()
    taught, spared, tested = study_problems(settings)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        run = policy_training.train_policy(
            taught, Path(folder), model=settings.model, method=method_of(name), about=name,
            steps=settings.steps, prompts=settings.prompts, generations=settings.generations,
            learning_rate=rate, max_tokens=settings.max_tokens, held_out=0,
            save_every=settings.steps, seed=seed, progress=progress,
        )  # fmt: skip
        rows = spared if tuning else tested
        passed = measured(str(run.folder / "model"), rows, seed, settings)
    silent = [row.get("frac_dead_groups", row["frac_reward_zero_std"]) for row in run.log]
    end = run.log[-LAST:]
    return {
        "passed": passed,
        "silent": float(np.mean(silent)),
        "entropy": float(np.mean([row["entropy"] for row in end])),
        "length": float(np.mean([row["completions/mean_length"] for row in end])),
        "seconds": time.process_time() - begun,
    }


def method_of(name: str) -> PolicyMethod:
    arm = ARMS[name]
    made: PolicyMethod = getattr(policy_methods, arm.method)(**arm.options)
    return made


def fitting(settings: Settings) -> list[str]:
    """The arms of a study: those that score lines need problems that are worked out in lines."""
    lines = set(settings.families) <= {"chain_sum", "basic_arithmetic"}
    return [UNTRAINED, *(name for name, arm in ARMS.items() if lines or not arm.lines)]


def study_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """To train on, the last `spared` of each family of those, and to test with."""
    parts: tuple[list[Problem], list[Problem], list[Problem]] = ([], [], [])
    for family in settings.families:
        rows, tests = (shipped_problems(part, [family]) for part in ("train", "test"))
        first = len(rows) - settings.spared
        parts[0].extend(rows[:first])
        parts[1].extend(rows[first:])
        parts[2].extend(tests[: settings.tested])
    return parts


def measured(
    source: str, rows: Sequence[Problem], seed: int, settings: Settings
) -> dict[str, dict[str, float]]:
    """pass@k of sampled answers: family -> k -> share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(FOLDER) if source == EMBEDDED else source
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reward = policy_training.find_reward("exact")
    rewards = policy_training.rewards_of_samples(
        net, AutoTokenizer.from_pretrained(folder), rows, reward, n=settings.samples,
        max_tokens=settings.max_tokens, seed=seed,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for family in settings.families:
        own = rewards[[row["family"] == family for row in rows]]
        found[family] = {str(k): share for k, share in policy_training.pass_at(own).items()}
    return found


# ── the study ───────────────────────────────────────────────────────────────────────────────────


def study(
    rng: int, settings: Settings, progress: Progress | None = None,
    arms: Sequence[str] | None = None, workers: int = 1,
) -> list[Record]:  # fmt: skip
    """The records of all runs, those that the journal lacks made now; all arms that fit, or some.

    Each is that of `run_arm` with arm, rate, seed and part: "tuning", "best" or "shared"; the
    untrained policy's is "best". A run at the best rate that is also the shared one is there twice.
    workers: processes that make them; with several, progress hears of whole runs only.
    """
    possible = fitting(settings)
    wanted = possible if arms is None else list(arms)
    unknown = [name for name in wanted if name not in possible]
    require(not unknown, "arms", ", ".join(unknown), f"some of {', '.join(possible)}")
    require(workers >= 1, "workers", workers, "a positive count")
    pool = Here() if workers == 1 else ProcessPoolExecutor(workers, get_context("spawn"))
    seeds = range(1000 * rng, 1000 * rng + settings.seeds)
    of_arm = partial(
        records_of_arm, runs=Runs(settings, pool, progress), seeds=seeds,
        tuning_seed=1000 * rng + TUNING,
    )  # fmt: skip
    try:
        if workers == 1:
            return [record for name in wanted for record in of_arm(name)]
        with ThreadPoolExecutor(len(wanted)) as threads:
            return [record for found in threads.map(of_arm, wanted) for record in found]
    finally:
        pool.shutdown(cancel_futures=True)


class Here(Executor):
    """An executor that runs what it is given at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Runs:
    """Runs of arms, each made once: known from the journal, or made by an executor and kept."""

    def __init__(self, settings: Settings, pool: Executor, progress: Progress | None) -> None:
        self.settings, self.pool, self.progress = settings, pool, progress
        self.journal = Journal(cache_directory() / "policy-study.jsonl")
        self.files = fingerprint(settings.model)
        made = {r["key"]: r for r in self.journal.records() if "key" in r}
        self.asked = {key: Here().submit(made.get, key) for key in made}

    def ask(self, name: str, rate: float, seed: int, tuning: bool = False) -> Future[Record]:
        key = run_key(name, (rate, seed, tuning), self.settings, self.files)
        if key not in self.asked:
            said = TITLES[name] if name == UNTRAINED else f"{TITLES[name]}, rate {rate:g}"
            about = {"key": key, "arm": name, "rate": rate, "seed": seed}
            tell = partial(self.progress, f"{said}, seed {seed}") if self.progress else None
            own = tell if isinstance(self.pool, Here) else None  # stays in its process
            future = self.pool.submit(recorded, about, self.settings, tuning, own)
            future.add_done_callback(partial(self.keep, None if own else tell))
            self.asked[key] = future
        return self.asked[key]

    def keep(self, tell: Step | None, future: Future[Record]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.journal.append(future.result())
            if tell:
                tell(self.settings.steps, self.settings.steps)


def recorded(about: Record, settings: Settings, tuning: bool, tell: Step | None) -> Record:
    """The run that a record is about, and what came of it."""
    step = None if tell is None else lambda i, n, _: tell(i, n)
    run = (about["arm"], about["rate"], about["seed"], settings)
    return about | run_arm(*run, tuning=tuning, progress=step)


def records_of_arm(name: str, runs: Runs, seeds: Sequence[int], tuning_seed: int) -> list[Record]:
    """Tune its rate, then run it at the best and at the shared one."""

    def made(part: str, *asked: tuple[float, int]) -> list[Record]:
        futures = [runs.ask(name, *run, part == "tuning") for run in asked]
        return [{**future.result(), "part": part} for future in futures]

    if name == UNTRAINED:
        return made("best", *((0.0, seed) for seed in seeds))
    tuned = made("tuning", *((rate, tuning_seed) for rate in runs.settings.rates))
    for _ in range(FURTHER):
        if (beyond := beyond_the_end(tuned)) is None:
            break
        tuned += made("tuning", (beyond, tuning_seed))
    found = sorted(tuned, key=itemgetter("rate"))
    for rate, part in ((best_rate(tuned), "best"), (runs.settings.shared, "shared")):
        found += made(part, *((rate, seed) for seed in seeds))
    return found


def best_rate(tuned: Sequence[Record]) -> float:
    return float(max(tuned, key=lambda record: mean_pass(record, 1))["rate"])


def beyond_the_end(tuned: Sequence[Record]) -> float | None:
    """The rate to try next where the best one so far is the highest or lowest, else None."""
    rates, best = [record["rate"] for record in tuned], best_rate(tuned)
    if min(rates) < best < max(rates):
        return None
    return 2 * best if best == max(rates) else best / 2


def run_key(name: str, run: tuple[float, int, bool], settings: Settings, files: str) -> str:
    """A hash of what decides how a run (rate, seed, tuning) ends, apart from code and libraries."""
    same = [pair for pair in sorted(asdict(settings).items()) if pair[0] not in SIZES]
    said = repr((ARMS[name][1:] if name in ARMS else name, run, same, files,
                 torch.cuda.is_available()))  # fmt: skip
    return hashlib.blake2s(said.encode(), digest_size=8).hexdigest()


def fingerprint(model: str) -> str:
    """Of the files of a policy and of the problems."""
    folders = {FOLDER, FOLDER if model == EMBEDDED else Path(model)}
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return hashlib.blake2s(b"".join(path.read_bytes() for path in files)).hexdigest()


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
    27: ("ngrpo", "grpo", "grpo_twice", "rloo", "dapo", "psr", "nsr", "w_reinforce"),
    29: ("tempo", "grpo", "rloo"),
    48: ("pure", "pure_outcome", "pure_sum", "grpo"),
}
LEARNS = "training from rewards helps"
HIGHER = "higher pass@k AUC on MATH500, AMC23 and AIME2025 (7B trained on MATH)"
BETTER = "better than PPO and GRPO on MATH, MedQA and out of distribution (Qwen3-1.7B and 4B)"
SILENT = "groups that are all wrong teach under NGRPO"
PARITY = "7B, mean of five benchmarks: process rewards alone 49.3, outcomes alone 48.3"
TENTH = "7B, mean of five benchmarks: 53.3 with outcomes for a tenth, 49.3 without, 48.3 outcomes"


class Comparison(NamedTuple):
    """An arm less another; more: the paper says that this is not below 0, else not above."""

    arm: str
    other: str
    measure: str
    says: str
    more: bool = True
    part: str = "best"

    def gap(self, records: Sequence[Record]) -> Estimate:
        both = (per_seed(records, arm, self.measure, self.part) for arm in (self.arm, self.other))
        return paired_difference(*both)

    def claim(self, task: str, records: Sequence[Record]) -> Claim:
        at = ", both at one rate" if self.part == "shared" else ""
        name = f"{self.measure}: {TITLES[self.arm]} - {TITLES[self.other]}{at}"
        rule = Claim.at_least if self.more else Claim.at_most
        return rule(f"Language model, {task}, {name}", self.says, self.gap(records), 0.0)


COMPARISONS = {
    27: [
        Comparison("grpo", UNTRAINED, "pass@1", LEARNS),
        Comparison("ngrpo", UNTRAINED, "pass@1", LEARNS),
        *(Comparison("ngrpo", other, "pass@8", HIGHER) for other in OF_PAPER[27][1:]),
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


def per_seed(records: Sequence[Record], arm: str, measure: str, part: str = "best") -> Float:
    """(seeds,) a measure of an arm; the untrained policy is the same in both parts."""
    part = "best" if arm == UNTRAINED else part
    rows = [r for r in records if (r["arm"], r["part"]) == (arm, part)]
    return np.array([MEASURES[measure](r) for r in sorted(rows, key=itemgetter("seed"))])


def add_policy_study(
    report: Report, paper: int, rng: int, tasks: dict[str, Settings] | None = None,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Run what the journal lacks of a paper's arms, on every task that suits them, and judge."""
    require(paper in OF_PAPER, "paper", paper, f"one of {', '.join(map(str, OF_PAPER))}")
    arms = (UNTRAINED, *OF_PAPER[paper])
    for task, settings in (TASKS if tasks is None else tasks).items():
        if set(arms) <= set(fitting(settings)):
            records = study(rng, settings, progress, arms)
            report.claims.extend(c.claim(task, records) for c in COMPARISONS[paper])
            for part in ("best", "shared"):
                report.tables.append(results(part, task, settings, arms, records))
            report.figures.append(tuning_figure(task, arms, records))
    report.notes.append("Language model: runs are short and seeds few; only large gaps stand out.")


def results(
    part: str, task: str, settings: Settings, arms: Sequence[str], records: Sequence[Record]
) -> ReportTable:
    less = ["pass@1 less GRPO's", "pass@8 less GRPO's"]
    columns = ["method", "rate", "steps a batch", *MEASURES, *less]
    rows: list[list[Cell]] = []
    for arm in arms:
        known = list(MEASURES)[: 2 if arm == UNTRAINED else None]
        rates = {r["rate"] for r in records if (r["arm"], r["part"]) == (arm, part)} - {0.0}
        steps = None if arm == UNTRAINED else method_of(arm).options.get("num_iterations", 1)
        rows.append([
            TITLES[arm], *(rates or {None}), steps,
            *(mean_interval(per_seed(records, arm, m, part)) if m in known else None
              for m in MEASURES),
            *(None if arm == "grpo" else Comparison(arm, "grpo", m, "", part=part).gap(records)
              for m in ("pass@1", "pass@8")),
        ])  # fmt: skip
    at = "each at its best rate" if part == "best" else "all at one rate"
    size = f"{settings.steps} batches of {settings.prompts} x {settings.generations}"
    note = (
        f"{settings.tested} problems of each of {', '.join(settings.families)}; {settings.seeds} "
        f"seeds. Steps: of the optimizer; at one rate, two go further. Silent groups have no "
        f"advantage; entropy and length: of the last {LAST} batches."
    )
    tuning = [[r for r in records if (r["arm"], r["part"]) == (a, "tuning")] for a in arms]
    edge = [TITLES[tuned[0]["arm"]] for tuned in tuning if tuned and beyond_the_end(tuned)]
    if part == "best" and edge:
        note += f" The best of all rates tried was the last one: {', '.join(edge)}."
    return ReportTable(f"Language model, {task}, after {size}, {at}", columns, rows, note)


def tuning_figure(task: str, arms: Sequence[str], records: Sequence[Record]) -> Figure:
    lines = []
    for arm in arms[1:]:
        tuned = [r for r in records if (r["arm"], r["part"]) == (arm, "tuning")]
        rates, right = [r["rate"] for r in tuned], [mean_pass(r, 1) for r in tuned]
        lines.append(Series(TITLES[arm], rates, right, baseline=arm == "grpo"))
    title = f"Language model, {task}: spared problems right by learning rate"
    return Figure("line", title, "rate", "pass@1", lines, log_x=True)


# ── on the command line ─────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run what the journal lacks of the study.")
    parser.add_argument("--arms", help="names with commas between; all of them if not given")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=Settings().seeds, help="how many")
    parser.add_argument("--rng", type=int, default=0, help="decides which seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    given = parser.parse_args(arguments)

    def tell(said: str, done: int, total: int) -> None:
        if done == total:
            print(said, file=sys.stderr, flush=True)

    for task in given.tasks:
        settings = replace(TASKS[task], seeds=given.seeds)
        asked = fitting(settings) if given.arms is None else given.arms.split(",")
        arms = [arm for arm in asked if arm not in ARMS or arm in fitting(settings)]
        study(given.rng, settings, tell, arms, given.workers)


if __name__ == "__main__":
    main()
