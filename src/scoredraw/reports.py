"""What a paper's experiment found: claims with verdicts, tables, figures, and where it ran.

A `Claim` sets what a paper says beside what was measured. Its verdict is honest about noise: it
"holds" when the whole interval lies on the right side of the bound, "fails" when the whole
interval lies on the wrong side, and is "undecided" when the bound falls inside. Tables and figures
are data, not pictures, so that a report is a small strict JSON file from which the terminal, the
HTML page and the gallery are all made.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from scoredraw import registry
from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path
from scoredraw.metrics import Estimate

Verdict = Literal["holds", "fails", "undecided"]
Cell = Estimate | float | int | str | bool | None
SCALES = ("smoke", "quick", "full", "study")
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Claim:
    """One thing a paper says, what we measured, the rule that decides, and the verdict.

    >>> claim = Claim.at_least("accuracy gain", "+1 point", Estimate(1.4, 1.1, 1.7, 20), 1.0)
    >>> claim.verdict, claim.rule
    ('holds', 'at least 1')
    """

    name: str
    paper_says: str
    measured: Estimate | float | str | None
    rule: str
    verdict: Verdict | None = None

    @classmethod
    def at_least(
        cls,
        name: str,
        paper_says: str,
        measured: Estimate | float,
        bound: float,
        rule: str | None = None,
    ) -> Claim:
        """Holds where the interval starts at or above `bound`, fails where it ends below."""
        low, high = ends(measured)
        verdict = judge(holds=low >= bound, fails=high < bound)
        return cls(name, paper_says, measured, rule or f"at least {bound:g}", verdict)

    @classmethod
    def at_most(
        cls,
        name: str,
        paper_says: str,
        measured: Estimate | float,
        bound: float,
        rule: str | None = None,
    ) -> Claim:
        """Holds where the interval ends at or below `bound`, fails where it starts above."""
        low, high = ends(measured)
        verdict = judge(holds=high <= bound, fails=low > bound)
        return cls(name, paper_says, measured, rule or f"at most {bound:g}", verdict)

    @classmethod
    def within(
        cls,
        name: str,
        paper_says: str,
        measured: Estimate | float,
        low: float,
        high: float,
        rule: str | None = None,
    ) -> Claim:
        """Holds where the interval lies in [low, high], fails where it lies outside."""
        start, end = ends(measured)
        verdict = judge(holds=low <= start and end <= high, fails=end < low or start > high)
        return cls(name, paper_says, measured, rule or f"from {low:g} to {high:g}", verdict)

    @classmethod
    def judge(
        cls,
        name: str,
        paper_says: str,
        measured: Estimate | float | str | None,
        rule: str,
        holds: bool | None,
    ) -> Claim:
        """A claim decided by its own rule: True holds, False fails, None is undecided."""
        verdict: Verdict = "undecided" if holds is None else "holds" if holds else "fails"
        return cls(name, paper_says, measured, rule, verdict)


def ends(measured: Estimate | float) -> tuple[float, float]:
    """The ends of the interval; a plain number is exact, an Estimate without one is not."""
    if isinstance(measured, Estimate):
        return measured.low, measured.high
    return float(measured), float(measured)


def judge(*, holds: bool, fails: bool) -> Verdict:
    return "holds" if holds else "fails" if fails else "undecided"  # NaN ends decide nothing


@dataclass(frozen=True)
class ReportTable:
    """A titled table; a cell is text, a number, an Estimate or None."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                came = f"a row of {len(row)} cells in {self.title!r}"
                raise InputError(f"rows: got {came}, want {len(self.columns)}")


@dataclass(frozen=True)
class Series:
    """One line, set of bars or cloud of points; `low` and `high` are its interval.

    x: numbers, or names for bars. labels: a name a point (scatter). baseline: drawn plainly, as
    what the others are measured against.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    labels: Sequence[str] | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        for name in ("x", "y", "low", "high", "labels"):
            values = getattr(self, name)
            if values is None:
                continue
            if isinstance(values, np.ndarray):
                values = values.tolist()
            object.__setattr__(self, name, list(values))
            if len(values) != len(self.x):
                came = f"{len(values)} values in series {self.name!r}"
                raise InputError(f"{name}: got {came}, want {len(self.x)}, one for each x")
        if (self.low is None) != (self.high is None):
            raise InputError(f"low, high: got one of them in series {self.name!r}, want both")


@dataclass(frozen=True)
class Picture:
    """A small picture with a caption: PNG bytes in base64."""

    caption: str
    png: str


@dataclass(frozen=True)
class Figure:
    """A figure as data, drawn by `pages`.

    kind: "line", "bar", "scatter", "interval" (a row a name: a dot and its interval, lying down) or
    "pictures". reference: a value to draw a line at, such as the zero of a difference (across y;
    for "interval" across the values).
    """

    kind: Literal["line", "bar", "scatter", "interval", "pictures"]
    title: str
    x_label: str = ""
    y_label: str = ""
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    caption: str = ""
    reference: float | None = None
    pictures: list[Picture] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = ("line", "bar", "scatter", "interval", "pictures")
        require(self.kind in kinds, "kind", repr(self.kind), f"one of {', '.join(kinds)}")


@dataclass(frozen=True)
class Report:
    """The outcome of one paper's experiment at one scale and seed.

    >>> report = Report(paper=1, scale="smoke", seed=0, seconds=0.5)
    >>> Report.from_json(report.to_json()) == report
    True
    """

    paper: int
    scale: str
    seed: int
    seconds: float = 0.0
    claims: list[Claim] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    def to_json(self) -> str:
        """The report as strict JSON: NaN and infinity are null."""
        return json.dumps(plain(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back. Raises `InputError` where `text` is not one."""
        try:
            data = json.loads(text)
            return cls(
                paper=data["paper"],
                scale=data["scale"],
                seed=data["seed"],
                seconds=data["seconds"],
                claims=[read_claim(claim) for claim in data["claims"]],
                tables=[read_table(table) for table in data["tables"]],
                figures=[read_figure(figure) for figure in data["figures"]],
                notes=data["notes"],
                environment=data["environment"],
                title=data.get("title", ""),
            )
        except (ValueError, KeyError, TypeError) as error:
            came = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"text: got {came}, want the JSON of a report") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON in one step, with the commit, the machine and the date in it."""
        stamped = self if self.environment else dataclasses.replace(self, environment=stamp())
        write_text(path, stamped.to_json())


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NumPy numbers as what JSON knows; NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None) -> float:
    return math.nan if value is None else value


def read_cell(value: Any) -> Any:
    """An Estimate where the JSON holds one, anything else as it is."""
    if not isinstance(value, dict):
        return value
    return Estimate(number(value["value"]), number(value["low"]), number(value["high"]), value["n"])


def read_claim(data: dict[str, Any]) -> Claim:
    return Claim(**{**data, "measured": read_cell(data["measured"])})


def read_table(data: dict[str, Any]) -> ReportTable:
    return ReportTable(**{**data, "rows": [[read_cell(c) for c in row] for row in data["rows"]]})


def read_figure(data: dict[str, Any]) -> Figure:
    series = []
    for one in data["series"]:
        numbers = {
            key: None if one[key] is None else [number(v) for v in one[key]]
            for key in ("x", "y", "low", "high")
        }
        series.append(Series(**{**one, **numbers}))
    pictures = [Picture(**picture) for picture in data["pictures"]]
    return Figure(**{**data, "series": series, "pictures": pictures})


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file or nothing."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def stamp() -> dict[str, Any]:
    """Where and when this runs: commit or version, machine, library versions, date (UTC)."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "version": metadata.version("scoredraw"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        **({"device": gpu} if gpu else {}),
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from ("+" where files differ), or None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # an installed package may lie inside somebody else's checkout: that commit isn't ours
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "scoredraw" != PACKAGE:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def paper_modules() -> dict[int, str]:
    """The papers that can be run: number -> module name."""
    names = (path.stem for path in sorted((PACKAGE / "papers").glob("p[0-9][0-9]_*.py")))
    return {int(name[1:3]): name for name in names}


def paper_module(number: int) -> ModuleType:
    """The module of a paper's experiment. Raises `InputError` where there is none."""
    entry, modules = registry.paper(number), paper_modules()
    if number not in modules:
        came = f"{number:02d} ({entry.slug}), which is {entry.status}"
        known = ", ".join(f"{n:02d}" for n in modules) or "none yet"
        raise InputError(f"paper: got {came}, want one that can be run: {known}")
    return importlib.import_module(f"scoredraw.papers.{modules[number]}")


def run_paper(number: int, scale: str = "quick", seed: int = 0) -> Report:
    """Run a paper's experiment and return its report, timed and stamped.

    scale: "smoke" (seconds; shows that it runs, so no verdicts), "quick" (a minute), "full" (ten
    minutes) or "study" (hours). Raises `InputError` for an unknown number or scale.
    """
    require(scale in SCALES, "scale", repr(scale), f"one of {', '.join(SCALES)}")
    module = paper_module(number)
    started = time.perf_counter()
    report: Report = module.run(scale, seed)
    seconds = round(time.perf_counter() - started, 3)
    claims = report.claims
    if scale == "smoke":
        claims = [dataclasses.replace(claim, verdict=None) for claim in claims]
    title = report.title or registry.paper(number).title
    return dataclasses.replace(
        report, claims=claims, seconds=seconds, environment=stamp(), title=title
    )
