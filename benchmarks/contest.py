"""Contests: two functions of the same input take turns; the ratio of their times is what counts.

Noise on a machine only ever adds time, so the best of the repeats is the honest one and gives the
verdict; the medians stand beside it. Before the clock starts each side runs once (imports, page
faults) and the two results are compared: a fast wrong answer is no answer. A turn of a side is as
many calls as fill a twentieth of a second, one at least, and counts as their mean, as with timeit:
a single call of a few milliseconds would show what the other side has left of the caches and of the
allocator's memory.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

TURN = 0.05  # seconds that a side's calls fill at least


@dataclass(frozen=True)
class Contest:
    """`ours` against `peer_runs`; `check(ours', peer's result)` raises unless both are right.

    at_most: the largest ratio of our time to the peer's that will do; None: nothing was promised.
    """

    what: str
    peer: str
    ours: Callable[[], Any]
    peer_runs: Callable[[], Any]
    check: Callable[[Any, Any], None]
    at_most: float | None = None
    repeats: int | None = None  # fewer, where the peer takes long


@dataclass(frozen=True)
class Limit:
    """A number that `measure` finds and that must not exceed `at_most`."""

    what: str
    unit: str
    measure: Callable[[], float]
    at_most: float


@dataclass(frozen=True)
class Line:
    """What was measured: seconds (or `unit`) of every repeat, and what was asked for.

    ratio: best to best, ours to the peer's (for a limit: measured to allowed); ratio_of_medians
    likewise. verdict: "holds" or "fails", None where nothing was promised or the scale is tiny.
    """

    what: str
    peer: str
    unit: str
    ours: list[float]
    peers: list[float]
    ratio: float
    ratio_of_medians: float
    at_most: float | None
    verdict: str | None
    cpu: dict[str, float] = field(default_factory=dict)  # a hint: idle BLAS threads spin


def run(entry: Contest | Limit, repeats: int, *, judged: bool = True) -> Line:
    """Measure one contest or limit; the verdict is None unless `judged`."""
    if isinstance(entry, Limit):
        values = [entry.measure() for _ in range(min(repeats, 2))]
        ours, allowed = min(values), entry.at_most
        return Line(
            entry.what, "limit", entry.unit, values, [allowed], ours / allowed,
            median(values) / allowed, 1.0, _verdict(ours / allowed, 1.0, judged),
        )  # fmt: skip
    entry.check(entry.ours(), entry.peer_runs())
    rounds = min(repeats, entry.repeats or repeats)
    walls: tuple[list[float], list[float]] = ([], [])
    cpus: tuple[list[float], list[float]] = ([], [])
    sides = (entry.ours, entry.peer_runs)
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            wall, cpu = _timed(sides[side], TURN if judged else 0.0)
            walls[side].append(wall)
            cpus[side].append(cpu)
    ratio = min(walls[0]) / min(walls[1])
    return Line(
        entry.what, entry.peer, "s", walls[0], walls[1], ratio,
        median(walls[0]) / median(walls[1]), entry.at_most,
        _verdict(ratio, entry.at_most, judged),
        {"ours": min(cpus[0]), "peer": min(cpus[1])},
    )  # fmt: skip


def _timed(function: Callable[[], Any], least: float) -> tuple[float, float]:
    """Wall and processor seconds of a call, the mean of as many as fill `least` seconds.

    Freeing what they return is not part of it.
    """
    gc.collect()
    gc.disable()
    try:
        total, used, calls = 0.0, 0.0, 0
        while not calls or total < least:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function()
            _settle()
            total += time.perf_counter() - wall
            used += time.process_time() - cpu
            calls += 1
            del result
    finally:
        gc.enable()
    return total / calls, used / calls


def _settle() -> None:
    """Wait for a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _verdict(ratio: float, at_most: float | None, judged: bool) -> str | None:
    if at_most is None or not judged:
        return None
    return "holds" if ratio <= at_most else "fails"


# ------------------------------------------------------------------ the table


def table(lines: Iterable[Line]) -> Table:
    """The lines as a person reads them: best (median) of each side, ratio, target, verdict."""
    shown = Table(box=box.SIMPLE, caption="best (median) of the turns", caption_justify="left")
    for heading in ("what", "against"):
        shown.add_column(heading)
    for heading in ("ours", "peer", "ratio", "target"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for line in lines:
        target = "" if line.at_most is None else _asked(line)
        shown.add_row(
            line.what, line.peer, _amount(line.ours, line.unit), _amount(line.peers, line.unit),
            f"{_factor(line.ratio)} ({_factor(line.ratio_of_medians)})", target, line.verdict or "",
            style={"fails": "red", "holds": "green"}.get(line.verdict or ""),
        )  # fmt: skip
    return shown


def _amount(values: list[float], unit: str) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g} {unit}"
    return f"{min(values):.3g} ({median(values):.3g}) {unit}"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio > 0.5 else f"1/{1 / ratio:.1f}"


def _asked(line: Line) -> str:
    assert line.at_most is not None
    return f"≤ {_factor(line.at_most)}"
