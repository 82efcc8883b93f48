"""The answers to submit, for every problem of a table of samples, by any method of the catalogue.

A method gives every sample a standing (see `submission`); of each problem the k best different
answers are submitted, with the evidence: how each stood, and what share of the samples gave it.
Where the table says which samples are right, so does the result, beside what k answers chosen by
lot would have got.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import registry
from scoredraw.answers import AnswerPool, Equal
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require
from scoredraw.language.submission import TopK, check_k, submit_answers
from scoredraw.metrics import Estimate, mean_interval
from scoredraw.samples import Samples, read_samples

Float = NDArray[np.float64]
# what a method is given, or takes only where it is called from Python
SUPPLIED = ("k", "pad", "rng", "scores", "rewards", "batched", "texts", "equal", "key")
LOTS = 20  # times that k answers are chosen by lot, to compare


@dataclass(frozen=True, eq=False)
class ChosenAnswers:
    """What was chosen: a `TopK` for each of the problems of `samples`, in their order.

    by_lot: (P,), how often k different answers chosen by lot hold a right one; None without grades.
    """

    samples: Samples
    method: str
    size: int
    chosen: tuple[TopK, ...]
    by_lot: Float | None = None

    @cached_property
    def draw(self) -> Draw:
        """The chosen rows of the table, best first within a problem; offsets part the problems."""
        starts = self.samples.offsets[:-1]
        places = self.samples.places
        rows = [start + top.indices for start, top in zip(starts, self.chosen, strict=True)]
        flat = np.concatenate(rows)
        return Draw(
            flat if places is None else places[flat],
            np.ones(len(flat)),
            int(self.samples.offsets[-1]),
            scores=np.concatenate([top.rewards for top in self.chosen]),
            offsets=np.cumsum([0, *map(len, self.chosen)]),
            method=self.method,
        )

    @property
    def ranks(self) -> NDArray[np.int64]:
        """1 for the best answer of a problem, 2, ...: int64, as `draw` lies."""
        return np.concatenate([np.arange(1, len(top) + 1) for top in self.chosen])

    @property
    def shares(self) -> Float:
        """The share of its problem's samples that gave each answer: float64, as `draw` lies."""
        return np.concatenate([top.frequencies for top in self.chosen])

    @cached_property
    def solved(self) -> Float | None:
        """For each problem whether a chosen sample is right, float64 (P,); None without grades."""
        if self.samples.correct is None:
            return None
        starts = self.samples.offsets[:-1]
        right = [
            bool(self.samples.correct[start + top.indices].any())
            for start, top in zip(starts, self.chosen, strict=True)
        ]
        return np.array(right, np.float64)

    @property
    def accuracy(self) -> Estimate | None:
        """The share of problems solved, with a 95 % t interval; None without grades."""
        return None if self.solved is None else mean_interval(self.solved)

    @property
    def short(self) -> int:
        """Problems with fewer than `size` answers to submit."""
        return sum(len(top) < self.size for top in self.chosen)

    @property
    def summary(self) -> str:
        """What was chosen and, where it is known, what it is worth, in a few sentences."""
        k, n = self.size, len(self.chosen)
        answers = "an answer" if k == 1 else f"up to {k} answers"
        said = f"{answers.capitalize()} to each of {n:,} problems by {self.method}."
        if self.short:
            said += f" {self.short:,} of them have fewer different answers that can be submitted."
        fallbacks = sum(top.fallback and len(top) > 0 for top in self.chosen)
        if fallbacks:
            said += f" In {fallbacks:,} none passed; the most frequent one is submitted, unranked."
        if self.accuracy is None or self.by_lot is None:
            return said
        lot = mean_interval(self.by_lot)
        right = "are right" if k == 1 else "of the problems have a right one among them"
        return f"{said} {_percent(self.accuracy)} {right}; by lot {_percent(lot)}."


def draw_answers(
    source: Any,
    method: str = "majority",
    size: int = 1,
    *,
    columns: Mapping[str, str] | None = None,
    equal: Equal | None = None,
    pad: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], Any] | None = None,
    **options: Any,
) -> ChosenAnswers:
    """The `size` answers to submit for each problem of a table of samples.

    source, columns: as in `samples.read_samples` (grades are not needed). method: a name of
    `registry.methods("answers")`; options: its own. equal: an equality of answers, such as
    `math_answers.math_equal`. pad: "frequency" fills up with the most frequent answers where fewer
    than `size` can be submitted. seed: for methods that draw lots; each problem has lots of its
    own, whatever its place in the table.
    Raises `InputError` for a method that is unknown or lacks a column, options that it does not
    have, and a size below 1. Time and memory: one problem's after the other.

    >>> found = draw_answers("smollm2-arith", "rpc", 2)
    >>> found.chosen[0].answers, len(found.draw), round(found.accuracy.value, 2)
    ((19, 78), 96, 0.38)
    """
    check_k(size, pad)
    samples = read_samples(source, columns, graded=False)
    entry = registry.method("answers", method)
    lacks = samples.lacks(entry.needs)
    wanted = f"the columns that {method} needs: {', '.join(entry.needs)}"
    require(not lacks, "input", f"no column {', '.join(lacks)}", wanted)
    choose = _chooser(entry, size, pad, options)
    correct = samples.correct
    chosen, by_lot = [], []
    for problem, pool in enumerate(samples.pools(equal=equal)):
        name = samples.problems[problem]
        try:
            chosen.append(choose(pool, rng=_lots(seed, name)))
        except InputError as error:
            raise InputError(f"problem {name[:60]!r}: {error}") from None
        if correct is not None:
            by_lot.append(_by_lot(pool, correct[samples.rows(problem)], size, _lots(seed, name)))
        if progress is not None:
            progress("problems", problem + 1, len(samples))
    lots = None if correct is None else np.array(by_lot)
    return ChosenAnswers(samples, method, size, tuple(chosen), lots)


def _chooser(
    entry: registry.Method, size: int, pad: str | None, options: dict[str, Any]
) -> Callable[..., TopK]:
    """A function of a pool and `rng` that submits by the method."""
    name = entry.draw or entry.standing
    function: Any = registry.resolve(name, entry.extra) if name else None
    can = [] if function is None else list(inspect.signature(function).parameters)[1:]
    own = [option for option in can if option not in SUPPLIED]
    for option in options:
        takes = ", ".join(own) or "no options"
        require(option in own, option, f"an option that {entry.name} does not have", takes)
    if entry.draw and "rng" in can:
        return partial(function, k=size, pad=pad, **options)
    if entry.draw:
        return lambda pool, rng: function(pool, k=size, pad=pad, **options)
    by = entry.name if function is None else partial(function, **options)

    def choose(pool: AnswerPool, rng: Any) -> TopK:
        return submit_answers(pool, by, size, pad=pad, rng=rng)

    return choose


def _lots(seed: int, problem: str) -> np.random.Generator:
    """Lots of a problem's own."""
    return np.random.default_rng([seed, zlib.crc32(problem.encode())])


def _by_lot(
    pool: AnswerPool, correct: NDArray[np.bool_], k: int, random: np.random.Generator
) -> float:
    """How often k different answers by lot hold a right one, of `LOTS` times."""
    tops = [submit_answers(pool, "uniform", k, rng=random) for _ in range(LOTS)]
    return float(np.mean([correct[top.indices].any() for top in tops]))


def _percent(share: Estimate) -> str:
    low, high = (round(100 * x, 1) for x in (share.low, share.high))
    return f"{100 * share.value:.1f} % [{low}, {high}]"
