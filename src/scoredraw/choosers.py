"""Asking a chooser: what it is shown, what it may answer, and what is made of the answers.

A chooser is called with a context and candidates and names one of these by its position. It may be
a function of numbers, a person or a language model, so it may also fail: say nothing, name what
was not shown, or raise. Here a window becomes a `Step`: shown in several orders where it is asked
to, and again where there was no verdict. A missing verdict is missing, and is written down.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.draws import Draw
from scoredraw.errors import InputError, StoppedError, require

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Chooser = Callable[[Any, Any], "int | Choice | None"]


@dataclass(frozen=True, eq=False)
class Choice:
    """An answer: the position of the pick among the candidates, or None where there is none.

    scores: (b,) how much each candidate is worth, where the chooser knows (utilities,
    log-probabilities). reply: what a model said. cut: how much of the texts it was not shown.
    """

    pick: int | None
    scores: Float | None = None
    reply: str | None = None
    cut: int = 0


@dataclass(frozen=True)
class Step:
    """One window and what became of it.

    context, candidates: positions in the pool, in the order shown first. pick: the position in the
    pool that was added, None for a window that was skipped. place: where it stood among the
    candidates as they were shown (in the first of several orders). value: its score. calls:
    answers asked for; retries: how often the window was asked again, failures: why; replies: in
    order; cut: how much the chooser was not shown, at most.
    """

    round: int
    shard: int
    context: tuple[int, ...]
    candidates: tuple[int, ...]
    pick: int | None = None
    place: int | None = None
    value: float | None = None
    calls: int = 0
    retries: int = 0
    failures: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()
    cut: int = 0


@dataclass(frozen=True, eq=False)
class SelectionLog:
    """The set, int64 (k,) in the order in which it grew, and every step on the way.

    The first `n_seed` were drawn at random or given.
    """

    indices: Int
    steps: tuple[Step, ...]
    n: int
    n_seed: int

    @property
    def calls(self) -> int:
        """How many answers were asked for."""
        return sum(step.calls for step in self.steps)

    @property
    def retries(self) -> int:
        """How often a window was asked again."""
        return sum(step.retries for step in self.steps)

    @property
    def skipped(self) -> int:
        """How many windows were given up."""
        return sum(step.pick is None for step in self.steps)

    @property
    def draw(self) -> Draw:
        """The set as a draw with weights one: for a learner, not for totals."""
        info = {"design": None, "n_seed": self.n_seed, "calls": self.calls}
        ones = np.ones(len(self.indices))
        return Draw(self.indices, ones, self.n, method="add-one-in", info=info)


class SelectionError(StoppedError):
    """The chooser had no answer for too many windows in a row; `log` holds what there is."""

    def __init__(self, message: str, log: SelectionLog) -> None:
        super().__init__(message)
        self.log = log


class UtilityChooser:
    """The candidate of the highest utility; among equals the one shown first.

    utility(context, candidates) -> (b,) numbers, such as the marginal gains V(S ∪ {x}) - V(S).
    Both arguments are what the chooser is shown: positions in the pool, or records. Raises
    `InputError` for another shape, and for NaN. One call of the utility a window.

    >>> UtilityChooser(lambda context, candidates: -np.abs(candidates - 5.0))([], np.arange(9)).pick
    5
    """

    def __init__(self, utility: Callable[[Any, Any], Any]) -> None:
        self.utility = utility

    def __call__(self, context: Any, candidates: Any) -> Choice:
        values = np.asarray(self.utility(context, candidates), np.float64)
        wanted = f"({len(candidates)},) numbers"
        require(values.shape == (len(candidates),), "utility", f"shape {values.shape}", wanted)
        require(not np.isnan(values).any(), "utility", "NaN", wanted)
        return Choice(int(values.argmax()), values)


class Window(NamedTuple):
    """What is shown, positions in the pool, and which window it is."""

    round: int
    shard: int
    number: int
    context: Int
    candidates: Int


def ask_window(
    chooser: Chooser,
    window: Window,
    view: Callable[[Int], Any],
    key: Any,
    *,
    n_orders: int = 1,
    max_retries: int = 0,
) -> tuple[Step, Exception | None]:
    """The outcome of a window, after as many retries as it takes and may have.

    view: from positions to what the chooser is shown. key: of the orders shown in retries.
    The second value is what the chooser raised last. `InputError` and `StoppedError` are raised.
    """
    candidates = window.candidates
    b = len(candidates)
    heard: list[Choice] = []
    failures: list[str] = []
    last, calls = None, 0
    pick = place = value = None
    for attempt in range(max_retries + 1):
        order = np.arange(b)
        if attempt:  # another prompt, for a chooser that gives the same answer to the same one
            purpose = f"retry {attempt} of {window.number}"
            order = random_at(key, purpose, window.round, window.shard).permutation(b)
        answers = []
        try:
            for turn in range(min(n_orders, b)):
                shown = np.roll(order, -round(turn * b / n_orders))
                calls += 1
                said = chooser(view(window.context), view(candidates[shown]))
                choice = said if isinstance(said, Choice) else Choice(said)
                heard.append(choice)
                answers.append((_valid(choice.pick, b), shown, choice))
            pick, value, why = _verdict(answers, b)
            if pick is not None:
                place = int(np.flatnonzero(answers[0][1] == pick)[0])
                break
        except (InputError, StoppedError):  # a server that has been asked often enough
            raise
        except Exception as error:  # a server that is down, a reply that cannot be read
            last, why = error, f"{type(error).__name__}: {error}".splitlines()[0]
        failures.append(why)
    outcome = Step(
        window.round,
        window.shard,
        tuple(window.context.tolist()),
        tuple(candidates.tolist()),
        None if pick is None else int(candidates[pick]),
        place,
        value,
        calls,
        min(len(failures), max_retries),
        tuple(failures),
        tuple(choice.reply for choice in heard if choice.reply is not None),
        max((choice.cut for choice in heard), default=0),
    )
    return outcome, last


def _verdict(
    answers: list[tuple[int | None, Int, Choice]], b: int
) -> tuple[int | None, float | None, str]:
    """The pick among the candidates in their first order, its score, and why there is none."""
    total, votes = np.zeros(b), np.zeros(b, np.int64)
    for place, shown, choice in answers:
        if choice.scores is not None:
            total[shown] += np.asarray(choice.scores, np.float64)
        if place is not None:
            votes[shown[place]] += 1
    scored = all(choice.scores is not None for _, _, choice in answers)
    if scored and len(answers) > 1:
        first = answers[0][1]
        best = int(first[total[first].argmax()])
    elif 2 * votes.max() > len(answers):
        best = int(votes.argmax())
    else:
        return None, None, "no majority" if votes.sum() > 1 else "no verdict"
    return best, float(total[best] / len(answers)) if scored else None, ""


def _valid(pick: Any, b: int) -> int | None:
    """A position among the candidates; what lies beyond them is no verdict, on either side."""
    if pick is None:
        return None
    try:
        place = operator.index(pick)
    except TypeError:
        raise InputError(f"chooser: got {pick!r}, want a position among the candidates") from None
    return place if 0 <= place < b else None


def random_at(key: Any, purpose: str, a: int = 0, b: int = 0) -> np.random.Generator:
    """A generator that depends on the seed, a purpose and two numbers alone."""
    counter = np.array([0, a, b, zlib.crc32(purpose.encode())], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def viewer(records: Any) -> Callable[[Int], Any]:
    """From positions to what a chooser is shown: these, rows of an array, or a list of records."""
    if records is None:
        return lambda rows: rows
    if isinstance(records, np.ndarray) and records.dtype != object:
        return lambda rows: records[rows]
    return lambda rows: [records[i] for i in rows.tolist()]
