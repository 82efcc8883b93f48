"""The bake-off of rows: which way of drawing training rows is worth it on this data set?

Every repeat splits the rows anew (by class), fits the features on the training split, scores it
with every method, draws every size, fits the model with the draw's weights and judges it on the
held-out rows. A method's gain is measured against uniform draws of the same size in the same
repeat. A repeat depends on its number and the seed alone, so repeats run in parallel and are kept
in a journal, and a comparison that was interrupted goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw import sampling
from scoredraw.bakeoff import models
from scoredraw.bakeoff.comparison import Comparison
from scoredraw.bakeoff.contenders import (
    BASELINE,
    Contender,
    Rows,
    design,
    draw_for,
    parse_all,
    score_contenders,
    scoring_seconds,
    seed_of,
)
from scoredraw.datasets import flip_labels
from scoredraw.errors import InputError, require
from scoredraw.features import (
    Encoder,
    Examples,
    has_sentence_encoder,
    read_examples,
    sentence_vectors,
)
from scoredraw.journal import Journal, atomic_path

Float = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

SIZES = ("1%", "5%", "10%", "20%", "50%")  # the first three that are not too few rows
TEST_SHARE = 0.2
DRAWS = 3  # draws of a size in a repeat, where a scheme is random
UNIFORM_DRAWS = 9  # more of the baseline, so that a gain is not the noise of its reference
PICKS = 14  # pictures shown of each draw
MAX_ROWS = 100_000
JOURNALS = Path(".scoredraw")


@dataclass(frozen=True)
class Protocol:
    """All options that a result depends on."""

    methods: tuple[str, ...]
    sizes: tuple[str, ...]
    counts: tuple[int, ...]
    model: str
    repeats: int
    seed: int
    train_rows: int
    encoder: str
    flip: float = 0.0


def compare_rows(
    data: Any,
    target: Any = None,
    *,
    text: str | None = None,
    methods: Sequence[str] | str | None = None,
    sizes: Sequence[str | int | float] | str | None = None,
    model: str | None = None,
    repeats: int = 10,
    seed: int = 0,
    task: str | None = None,
    flip: float | str = 0.0,
    max_rows: int = MAX_ROWS,
    workers: int | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare ways of drawing training rows by the model they give, against a uniform draw.

    data: the name of a data set, a path, an Arrow table, a frame, or an (n, d) array; target: the
    column to predict, or n values for an array. text: a column to read as text. methods:
    NAME[:SCHEME][@class], see `bakeoff.contenders`. sizes: counts, or shares ("1%", 0.01) of the
    training rows; 1%, 5% and 10% unless that is too few. model: "logistic", "ridge", "mlp" or
    "boosting". flip: the share of training labels ("20%", 0.2) moved to another class, which shows
    who collapses under wrong labels. max_rows: a larger table is reduced to a uniform sample first.
    workers: processes, all cores by default; they do not change the result. journal: where finished
    repeats are kept (a file or a folder); None keeps nothing.
    progress: called as (what, done, all).

    Gains are paired over repeats with t intervals that hold for all methods and sizes at once
    (Bonferroni). They speak of new splits and draws of this table. Raises `InputError` for data,
    options or sizes that can't be compared. Time: repeats · (scoring + fits).

    >>> from scoredraw import datasets
    >>> iris = datasets.load("iris")
    >>> result = compare_rows(iris, methods=["leverage"], sizes=[20], repeats=2, workers=1)
    >>> [entry.method for entry in result.leaderboard(20)]
    ['uniform', 'leverage']
    """
    require(repeats >= 2, "repeats", repeats, "at least 2: one has no interval")
    require(seed >= 0, "seed", seed, "0 or more")
    wrong = share_of(flip)
    examples = read_examples(data, target, text=text, task=task)
    total = len(examples)
    examples = at_most(examples, max_rows, seed)
    require(wrong == 0 or bool(examples.classes), "flip", flip, "0 for a regression: no classes")
    contenders = parse_all(methods, examples.task)
    held_out = split_size(examples)
    if sizes is None:
        sizes = default_sizes(len(examples) - held_out, len(examples.classes))
    labels, counts = read_sizes(sizes, len(examples) - held_out)
    check_strata(contenders, counts, labels, examples)
    encoder = "none"
    if examples.texts is not None:
        encoder = "all-MiniLM-L6-v2" if has_sentence_encoder() else "TF-IDF"
    protocol = Protocol(
        tuple(c.text for c in contenders),
        labels,
        counts,
        models.choose(model, examples.task),
        repeats,
        seed,
        len(examples) - held_out,
        encoder,
        wrong,
    )
    started = time.perf_counter()
    log, vectors_at = open_log(journal, examples, protocol)
    vectors = text_vectors(examples, encoder, vectors_at, progress)
    records = run_repeats(examples, protocol, contenders, vectors, log, workers, progress)
    return Comparison(
        examples, asdict(protocol), tuple(records), total, time.perf_counter() - started
    )


# ── what can be wrong ─────────────────────────────────────────────────────────────────────────


def at_most(examples: Examples, max_rows: int, seed: int) -> Examples:
    """The examples, or a uniform sample of them, by class."""
    require(max_rows >= 20, "max_rows", max_rows, "at least 20")
    if len(examples) <= max_rows:
        return examples
    by = examples.y if examples.classes else None
    rows = sampling.uniform(len(examples), max_rows, rng=seed_of(seed, "rows"), by=by).indices
    return examples.take(np.sort(rows))


def split_size(examples: Examples) -> int:
    """How many rows are held out; every class has one there and one to learn from."""
    n, classes = len(examples), len(examples.classes)
    require(n >= 20, "data", f"{n} rows", "at least 20")
    held_out = max(round(TEST_SHARE * n), classes)
    few = f"{n} rows of {classes} classes"
    require(classes <= TEST_SHARE * n, "target", few, "5 or more rows a class on average")
    return held_out


def share_of(flip: float | str) -> float:
    """A share of the labels, such as "20%" or 0.2.

    >>> share_of("20%"), share_of(0.2)
    (0.2, 0.2)
    """
    text = str(flip).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    require(0 <= share < 1, "flip", repr(flip), "a share of the labels from 0% to below 100%")
    return share


def read_sizes(
    sizes: Sequence[str | int | float] | str, train_rows: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sizes as labels and as counts of the training rows.

    >>> read_sizes("1%, 50", 1000)
    (('1%', '50'), (10, 50))
    """
    parts = sizes.split(",") if isinstance(sizes, str) else sizes
    wanted = "counts or shares such as 100, 5% or 0.05"
    found: dict[int, str] = {}
    for part in parts:
        label = part.strip() if isinstance(part, str) else f"{part}"
        try:
            share = label.endswith("%")
            value = float(label.rstrip("%")) / (100 if share else 1)
        except ValueError:
            raise InputError(f"sizes: got {label!r}, want {wanted}") from None
        require(math.isfinite(value) and value > 0, "sizes", repr(label), wanted)
        if share or value < 1:
            label = label if share else f"{100 * value:g}%"
            value = round(value * train_rows)
        require(value == round(value), "sizes", repr(label), wanted)
        rows = f"{label} ({int(value):,} rows)"
        require(2 <= value <= train_rows, "sizes", rows, f"2 to {train_rows:,} training rows")
        found.setdefault(int(value), label)
    require(bool(found), "sizes", "none", wanted)
    counts = tuple(sorted(found))
    return tuple(found[count] for count in counts), counts


def default_sizes(train_rows: int, classes: int) -> list[str]:
    """Three shares, from the first on that keeps ten rows and two of every class.

    >>> default_sizes(9600, 10), default_sizes(120, 3)
    (['1%', '5%', '10%'], ['10%', '20%', '50%'])
    """
    enough = max(10, 2 * classes)
    shares = [size for size in SIZES if float(size[:-1]) / 100 * train_rows >= enough]
    return (shares or [SIZES[-1]])[:3]


def check_strata(
    contenders: Sequence[Contender],
    counts: Sequence[int],
    labels: Sequence[str],
    examples: Examples,
) -> None:
    if any(c.by_class for c in contenders):
        classes = len(examples.classes)
        came = f"{labels[0]} ({counts[0]} rows)"
        require(counts[0] >= classes, "sizes", came, f"a row for each of {classes} classes")


# ── repeats ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RepeatLog:
    """The finished repeats of one comparison, in a journal under the hash of all it depends on."""

    journal: Journal
    key: str

    def done(self) -> dict[int, dict[str, Any]]:
        """Finished repeats by number; `InputError` if the journal is of another comparison."""
        records = self.journal.records()
        strangers = any(record.get("key") != self.key for record in records)
        path = f"{self.journal.path} of another comparison"
        require(not strangers, "journal", path, "a new path")
        return {record["repeat"]: record for record in records}

    def add(self, record: dict[str, Any]) -> None:
        self.journal.append({"key": self.key, **record})


def open_log(
    place: str | Path | None, examples: Examples, protocol: Protocol
) -> tuple[RepeatLog | None, Path | None]:
    """The log of exactly this comparison, and where its sentence vectors are kept."""
    if place is None:
        return None, None
    data, path = examples.fingerprint(), Path(place)
    depends = [asdict(protocol), data, metadata.version("scoredraw"), np.__version__]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    folder = path.parent if path.suffix else path
    log = RepeatLog(Journal(path if path.suffix else path / f"compare-rows-{key}.jsonl"), key)
    log.done()  # a stranger's journal is refused before any work
    return log, folder / f"sentence-vectors-{data[:16]}.npy"


def text_vectors(
    examples: Examples, encoder: str, path: Path | None, progress: Progress | None
) -> Float | None:
    """Sentence vectors, computed once and kept beside the journal."""
    if examples.texts is None or encoder != "all-MiniLM-L6-v2":
        return None
    if path is not None and path.exists():
        return np.asarray(np.load(path), dtype=np.float64)
    step = None if progress is None else (lambda done, n: progress("reading texts", done, n))
    vectors = sentence_vectors(examples.texts, step)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, vectors)
    return vectors


def run_repeats(
    examples: Examples,
    protocol: Protocol,
    contenders: list[Contender],
    vectors: Float | None,
    log: RepeatLog | None,
    workers: int | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """All repeats' records in order; those in the log are not run again."""
    done = log.done() if log else {}
    todo = [repeat for repeat in range(protocol.repeats) if repeat not in done]
    if progress is not None:
        progress("repeats", len(done), protocol.repeats)
    jobs = [(examples, protocol, contenders, vectors, repeat) for repeat in todo]
    for record in in_processes(jobs, workers):
        if log is not None:
            log.add(record)
        done[record["repeat"]] = record
        if progress is not None:
            progress("repeats", len(done), protocol.repeats)
    return [done[repeat] for repeat in range(protocol.repeats)]


def in_processes(jobs: list[tuple[Any, ...]], workers: int | None) -> Iterator[dict[str, Any]]:
    """Records as repeats finish, in any order."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from (run_repeat(*job) for job in jobs)
        return
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="n_jobs")
    yield from parallel(delayed(run_repeat)(*job) for job in jobs)


def run_repeat(
    examples: Examples,
    protocol: Protocol,
    contenders: list[Contender],
    vectors: Float | None,
    repeat: int,
) -> dict[str, Any]:
    """One split, its scores, draws and fits, on one core; -> a record of plain numbers."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # as many threads everywhere: the same sums in the same order
        return Repeat(examples, protocol, vectors, repeat).record(contenders)


class Reached(NamedTuple):
    """Means over the draws of one size: metric, loss, wrong labels among the rows, seconds a draw;
    and some rows of the first draw."""

    value: float
    loss: float | None
    wrong: float
    seconds: float
    picks: list[int]


class Repeat:
    """One split of the rows, encoded; a share of its training labels may be wrong."""

    def __init__(
        self, examples: Examples, protocol: Protocol, vectors: Float | None, repeat: int
    ) -> None:
        self.examples, self.protocol, self.repeat = examples, protocol, repeat
        n = len(examples)
        by = examples.y if examples.classes else None
        seed = seed_of(protocol.seed, repeat, "split")
        test = np.sort(sampling.uniform(n, n - protocol.train_rows, rng=seed, by=by).indices)
        self.train = np.setdiff1d(np.arange(n), test)
        encoder = Encoder(examples, self.train, vectors)
        y = examples.y[self.train]
        labels, self.wrong = y, np.zeros(len(y), bool)
        if protocol.flip:
            seed = seed_of(protocol.seed, repeat, "flip")
            labels, self.wrong = flip_labels(y, len(examples.classes), protocol.flip, seed)
        x = encoder.transform(self.train)
        self.rows = Rows(x, labels, design(x, labels, examples.task))
        self.test = encoder.transform(test), examples.y[test]

    def record(self, contenders: list[Contender]) -> dict[str, Any]:
        """What every contender reached at every size, and every row at once."""
        protocol = self.protocol
        rows = score_contenders(contenders, self.rows, seed_of(protocol.seed, self.repeat, "probe"))
        results: dict[str, Any] = {}
        for contender in contenders:
            sizes = [self.reached(contender, rows, count) for count in protocol.counts]
            results[contender.text] = {
                "values": [size.value for size in sizes],
                "losses": [size.loss for size in sizes],
                "wrong": [size.wrong for size in sizes],
                "seconds": scoring_seconds(contender, rows) + max(size.seconds for size in sizes),
                "picks": sizes[0].picks if self.repeat == 0 else None,
            }
        started = time.perf_counter()
        value, loss = self.judge(np.arange(len(rows.y)), np.ones(len(rows.y)), "full")
        full = {"value": value, "loss": loss, "seconds": time.perf_counter() - started}
        return {"repeat": self.repeat, "results": results, "full": full}

    def reached(self, contender: Contender, rows: Rows, count: int) -> Reached:
        """What the draws of a size reach, on average."""
        repeats = UNIFORM_DRAWS if contender.text == BASELINE else DRAWS if contender.random else 1
        values: list[float] = []
        losses: list[float | None] = []
        wrong: list[float] = []
        picks: list[int] = []
        seconds = 0.0
        for number in range(repeats):
            name = f"{contender.text} {count} {number}"
            seed = seed_of(self.protocol.seed, self.repeat, name)
            started = time.perf_counter()
            draw = draw_for(contender, rows, count, seed)
            seconds += time.perf_counter() - started
            value, loss = self.judge(draw.indices, draw.sample_weight, name)
            values.append(value)
            losses.append(loss)
            wrong.append(float(self.wrong[draw.indices].mean()) if len(draw) else 0.0)
            if not picks and len(draw):
                at = np.linspace(0, len(draw) - 1, PICKS).astype(int)
                picks = self.train[draw.indices[at]].tolist()
        known = [loss for loss in losses if loss is not None]
        mean_loss = float(np.mean(known)) if len(known) == len(losses) else None
        mean_wrong = float(np.mean(wrong))
        return Reached(float(np.mean(values)), mean_loss, mean_wrong, seconds / repeats, picks)

    def judge(
        self, rows: NDArray[np.int64], weights: Float, name: str
    ) -> tuple[float, float | None]:
        return models.fit_and_judge(
            self.protocol.model,
            self.examples.task,
            (self.rows.x[rows], self.rows.y[rows], weights),
            self.test,
            classes=len(self.examples.classes),
            seed=seed_of(self.protocol.seed, self.repeat, name, "fit") % 2**31,
        )
