"""Studies of arms that are tuned first: each run is made once, in one process or several.

    tuning     every rate of a grid, with a seed of its own, by how good the run is on spared data;
               twice or half the last rate where the best one is at an end, FURTHER times
    best       each arm at its own best rate, with the seeds of the study
    shared     all arms at one rate, with the same seeds

Every finished run is a line of a journal, so that a study resumes and only pays for what is new.
What is reported is paired by seed: runs of one seed see the same data in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.journal import Journal
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, ReportTable, Series

Float = NDArray[np.float64]

FURTHER = 2  # rates that are tried beyond an end of the grid, each twice or half the last
TUNING = 500  # the tuning seed, after the seeds of the study

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]  # the run in words, its steps done, all of them
Step = Callable[[int, int], None]


class Runner(Protocol):
    """A run of an arm, made in whatever process: tell hears of its steps."""

    def __call__(
        self, name: str, rate: float, seed: int, tuning: bool, tell: Step | None
    ) -> Record: ...


@dataclass(frozen=True)
class StudyPlan:
    """What there is to run.

    titles: of all arms, in order; fixed: those that are not trained, and have one run a seed, at
    rate 0. rates, shared: the grid, and the rate that all also run at (None: no such part). seeds:
    how many. run: makes a run, and can be pickled for several processes. key: what tells a run
    (name, rate, seed, tuning) from any other there ever was. quality: what rates are chosen by.
    steps: of a run, for progress. measures: numbers of a record, in the order of the table.
    """

    titles: dict[str, str]
    fixed: tuple[str, ...]
    rates: tuple[float, ...]
    shared: float | None
    seeds: int
    run: Runner
    key: Callable[[str, float, int, bool], str]
    quality: Callable[[Record], float]
    journal: Path
    steps: int = 1
    measures: dict[str, Callable[[Record], float]] = field(default_factory=dict)

    def chosen(self, arms: Sequence[str] | None) -> list[str]:
        """The arms asked for, or all; InputError for others."""
        wanted = list(self.titles) if arms is None else list(arms)
        unknown = [name for name in wanted if name not in self.titles]
        require(not unknown, "arms", ", ".join(unknown), f"some of {', '.join(self.titles)}")
        return wanted

    def best_rate(self, tuned: Sequence[Record]) -> float:
        return float(max(tuned, key=self.quality)["rate"])

    def beyond_the_end(self, tuned: Sequence[Record]) -> float | None:
        """The rate to try next where the best one so far is the highest or lowest, else None."""
        rates, best = [record["rate"] for record in tuned], self.best_rate(tuned)
        if min(rates) < best < max(rates):
            return None
        return 2 * best if best == max(rates) else best / 2


def run_study(
    plan: StudyPlan, rng: int = 0, progress: Progress | None = None,
    arms: Sequence[str] | None = None, workers: int = 1,
) -> list[Record]:  # fmt: skip
    """The records of all runs, those that the journal lacks made now; all arms, or some.

    Each is that of the plan's `run` with key, arm, rate, seed and part: "tuning", "best" or
    "shared"; that of a fixed arm is "best". A run at the best rate that is also the shared one is
    there twice. rng: decides the seeds. workers: processes that make them; with several, progress
    hears of whole runs only.
    """
    wanted = plan.chosen(arms)
    require(workers >= 1, "workers", workers, "a positive count")
    pool = Here() if workers == 1 else ProcessPoolExecutor(workers, get_context("spawn"))
    of_arm = partial(_records_of_arm, runs=Runs(plan, pool, progress), rng=rng)
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

    def __init__(self, plan: StudyPlan, pool: Executor, progress: Progress | None) -> None:
        self.plan, self.pool, self.progress = plan, pool, progress
        self.journal = Journal(plan.journal)
        made = {r["key"]: r for r in self.journal.records() if "key" in r}
        self.asked = {key: Here().submit(made.get, key) for key in made}

    def ask(self, name: str, rate: float, seed: int, tuning: bool = False) -> Future[Record]:
        key = self.plan.key(name, rate, seed, tuning)
        if key not in self.asked:
            at = "" if name in self.plan.fixed else f", rate {rate:g}"
            about = {"key": key, "arm": name, "rate": rate, "seed": seed}
            said = f"{self.plan.titles[name]}{at}, seed {seed}"
            tell = partial(self.progress, said) if self.progress else None
            own = tell if isinstance(self.pool, Here) else None  # stays in its process
            future = self.pool.submit(_recorded, self.plan.run, about, tuning, own)
            future.add_done_callback(partial(self._keep, None if own else tell))
            self.asked[key] = future
        return self.asked[key]

    def _keep(self, tell: Step | None, future: Future[Record]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.journal.append(future.result())
            if tell:
                tell(self.plan.steps, self.plan.steps)


def _recorded(run: Runner, about: Record, tuning: bool, tell: Step | None) -> Record:
    """The run that a record is about, and what came of it."""
    return about | run(about["arm"], about["rate"], about["seed"], tuning, tell)


def _records_of_arm(name: str, runs: Runs, rng: int) -> list[Record]:
    plan = runs.plan
    seeds = range(1000 * rng, 1000 * rng + plan.seeds)

    def made(part: str, *asked: tuple[float, int]) -> list[Record]:
        futures = [runs.ask(name, *run, part == "tuning") for run in asked]
        return [{**future.result(), "part": part} for future in futures]

    if name in plan.fixed:
        return made("best", *((0.0, seed) for seed in seeds))
    tuned = made("tuning", *((rate, 1000 * rng + TUNING) for rate in plan.rates))
    for _ in range(FURTHER):
        if (beyond := plan.beyond_the_end(tuned)) is None:
            break
        tuned += made("tuning", (beyond, 1000 * rng + TUNING))
    found = sorted(tuned, key=itemgetter("rate"))
    for rate, part in ((plan.best_rate(tuned), "best"), (plan.shared, "shared")):
        if rate is not None:
            found += made(part, *((rate, seed) for seed in seeds))
    return found


# These say which runs there are and where files lie, not what a run does.
BESIDE = ("rates", "shared", "seeds", "data")


def run_key(
    name: str, rate: float, seed: int, tuning: bool, *, arms: Mapping[str, Any], settings: Any,
    files: str,
) -> str:  # fmt: skip
    """A hash of what decides how a run ends, apart from code and libraries.

    arms: what an arm does, by name; one without is its name. settings: a dataclass, of which BESIDE
    does not count. files: `fingerprint` of what the run starts from.
    """
    same = [pair for pair in sorted(asdict(settings).items()) if pair[0] not in BESIDE]
    said = repr((arms.get(name, name), (rate, seed, tuning), same, files,
                 torch.cuda.is_available()))  # fmt: skip
    return hashlib.blake2s(said.encode(), digest_size=8).hexdigest()


def fingerprint(*folders: Path) -> str:
    """Of the files in folders, without those in folders there."""
    files = sorted(path for folder in set(folders) for path in folder.iterdir() if path.is_file())
    return hashlib.blake2s(b"".join(path.read_bytes() for path in files)).hexdigest()


# ── reports ─────────────────────────────────────────────────────────────────────────────────────


def part_of(records: Sequence[Record], arm: str, part: str) -> list[Record]:
    """An arm's records of a part, by seed and rate."""
    rows = [r for r in records if (r["arm"], r["part"]) == (arm, part)]
    return sorted(rows, key=itemgetter("seed", "rate"))


def per_seed(
    plan: StudyPlan, records: Sequence[Record], arm: str, measure: str, part: str = "best"
) -> Float:
    """(seeds,) a measure of an arm; a fixed arm is the same in both parts."""
    rows = part_of(records, arm, "best" if arm in plan.fixed else part)
    return np.array([plan.measures[measure](row) for row in rows])


class Comparison(NamedTuple):
    """An arm less another; more: the paper says that this is not below 0, else not above."""

    arm: str
    other: str
    measure: str
    says: str
    more: bool = True
    part: str = "best"

    def gap(self, plan: StudyPlan, records: Sequence[Record]) -> Estimate:
        pair = (self.arm, self.other)
        return paired_difference(
            *(per_seed(plan, records, arm, self.measure, self.part) for arm in pair)
        )

    def claim(self, about: str, plan: StudyPlan, records: Sequence[Record]) -> Claim:
        at = ", both at one rate" if self.part == "shared" else ""
        name = f"{self.measure}: {plan.titles[self.arm]} - {plan.titles[self.other]}{at}"
        rule = Claim.at_least if self.more else Claim.at_most
        gap = self.gap(plan, records)
        claim = rule(f"{about}, {name}", self.says, gap, 0.0)
        # the same counts for every seed are a coincidence, which says nothing of the sign
        return replace(claim, verdict="undecided") if gap.low == gap.high == 0 else claim


def study_table(
    title: str, plan: StudyPlan, arms: Sequence[str], records: Sequence[Record], *,
    part: str = "best", against: str = "", less: Sequence[str] = (), note: str = "",
    more: dict[str, dict[str, Cell]] | None = None,
) -> ReportTable:  # fmt: skip
    """A row an arm: its rate, each measure and, of those in `less`, what `against` has subtracted.

    more: further columns, heading -> arm -> cell. A measure that a record lacks is left empty.
    """
    extra = more or {}
    gaps = [f"{m} less {plan.titles[against]}'s" for m in less]
    rows: list[list[Cell]] = []
    for arm in arms:
        own = part_of(records, arm, "best" if arm in plan.fixed else part)
        rates = {r["rate"] for r in own} if arm not in plan.fixed else {None}
        rows.append([
            plan.titles[arm], *rates, *(cells.get(arm) for cells in extra.values()),
            *(_measured(plan, own, m) for m in plan.measures),
            *(None if arm == against else Comparison(arm, against, m, "", part=part)
              .gap(plan, records) for m in less),
        ])  # fmt: skip
    ends = [plan.titles[arm] for arm in arms if _at_an_end(records, arm)]
    if part == "best" and ends:
        note += f" The best of all rates tried was the last one: {', '.join(ends)}."
    return ReportTable(title, ["method", "rate", *extra, *plan.measures, *gaps], rows, note)


def _measured(plan: StudyPlan, rows: Sequence[Record], measure: str) -> Estimate | None:
    try:
        return mean_interval([plan.measures[measure](row) for row in rows])
    except KeyError:
        return None


def _at_an_end(records: Sequence[Record], arm: str) -> bool:
    """Whether the rate that an arm runs at is the highest or lowest of those tried."""
    tuned = [record["rate"] for record in part_of(records, arm, "tuning")]
    best = part_of(records, arm, "best")[0]["rate"]
    return bool(tuned) and best in (min(tuned), max(tuned))


def tuning_figure(
    title: str, plan: StudyPlan, arms: Sequence[str], records: Sequence[Record], y: str,
    baseline: str = "",
) -> Figure:  # fmt: skip
    """What each rate was chosen by."""
    lines = []
    for arm in arms:
        if tuned := part_of(records, arm, "tuning"):
            rates, found = [r["rate"] for r in tuned], [plan.quality(r) for r in tuned]
            lines.append(Series(plan.titles[arm], rates, found, baseline=arm == baseline))
    return Figure("line", title, "rate", y, lines, log_x=True)


# ── on the command line ─────────────────────────────────────────────────────────────────────────


def study_command(
    plan_of: Callable[[Any], StudyPlan], tasks: Mapping[str, Any],
    arguments: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """`python -m ... --tasks --arms --seeds --workers`: run what the journals lack.

    tasks: settings by the task's name, dataclasses with the number of seeds, of which `plan_of`
    makes a study.
    """
    parser = argparse.ArgumentParser(description="Run what the journal lacks of the study.")
    parser.add_argument("--arms", help="names with commas between; all of them if not given")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks))
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--rng", type=int, default=0, help="decides which seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    given = parser.parse_args(arguments)

    def tell(said: str, done: int, total: int) -> None:
        if done == total:
            print(said, file=sys.stderr, flush=True)

    more = {} if given.seeds is None else {"seeds": given.seeds}
    made = {task: plan_of(replace(tasks[task], **more)) for task in given.tasks}
    asked = None if given.arms is None else given.arms.split(",")
    known = {arm for plan in made.values() for arm in plan.titles}
    for plan in made.values():
        arms = asked and [arm for arm in asked if arm in plan.titles or arm not in known]
        run_study(plan, given.rng, tell, arms, given.workers)
