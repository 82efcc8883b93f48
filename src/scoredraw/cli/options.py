"""Options that several verbs share, what they mean, and the progress bar of a streaming pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from scoredraw.errors import InputError, require
from scoredraw.execution import Engine

Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A file, a quoted glob or a folder: parquet, arrow, csv, csv.gz, jsonl, npy, npz.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.", metavar="OUT")]
Target = Annotated[str | None, typer.Option(help="The column to be predicted.", metavar="COL")]
Columns = Annotated[
    str | None,
    typer.Option(help="Comma-separated columns to use; all if not given.", metavar="A,B"),
]
Text = Annotated[str | None, typer.Option(help="The column of texts.", metavar="COL")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
EngineName = Annotated[str, typer.Option("--engine", help="local or ray.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Cores to use; all if not given.")]
BatchRows = Annotated[int, typer.Option(min=1, help="Rows read at a time: bounds memory only.")]
ReportPage = Annotated[
    Path | None, typer.Option("--report", help="Write a page of figures.", metavar="FILE.html")
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]
P = Annotated[float | None, typer.Option("--p", help="The norm p (rows).", show_default=False)]
Ridge = Annotated[float | None, typer.Option(help="The penalty (ridge-leverage).")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of the recursion (root-leverage).")]
Probe = Annotated[str | None, typer.Option(help="mlp or logistic: what is trained (examples).")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Probes trained and averaged (examples).")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs of a probe (examples).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method, again for more.", metavar="NAME=VALUE"),
]
Prompt = Annotated[
    str | None, typer.Option(help="What Stable Diffusion is to show.", metavar="TEXT")
]
Negative = Annotated[str | None, typer.Option(help="What is not wanted.", metavar="TEXT")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Strength of guidance, 1 for none.", metavar="G", show_default="7.5"),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Of add-one-in-llm, ches: small, a folder, or an endpoint's URL#NAME.",
        metavar="MODEL",
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(help="Keeps each step; the same command goes on from it.", metavar="FILE.jsonl"),
]

SamplesInput = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        help="A row a sample (or a row a problem, with lists), or a bundled set: "
        "smollm2-arith, gsm8k-smollm2, gsm8k-solutions.",
        show_default=False,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option("--ks", help="Numbers of samples.", metavar="K,...", show_default="1,2,4,...,n"),
]
SampleColumns = Annotated[
    str | None,
    typer.Option(
        help="Your names of problem, correct, answer, reward, logprob, tokens, text, path.",
        metavar="ROLE=COL,...",
    ),
]
Equal = Annotated[str, typer.Option(help="Answers are the same as text (exact) or as math.")]

Problems = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEMS",
        help="A table with a column prompt (problem, question) and what the reward reads "
        "(answer), or embedded, embedded:chain_sum.",
    ),
]
RunFolder = Annotated[
    Path, typer.Option("--out", "-o", help="The folder of the run.", metavar="FOLDER")
]
PolicyModel = Annotated[
    str, typer.Option(help="embedded, or a folder of transformers.", metavar="MODEL")
]
Reward = Annotated[str, typer.Option(help="exact, math, or module:function.", metavar="REWARD")]
Generations = Annotated[int, typer.Option(min=2, help="Answers a problem.")]
LearningRate = Annotated[
    float | None, typer.Option(help="1e-6 if not given, of the embedded model 5e-5.")
]
AnswerTokens = Annotated[
    int | None, typer.Option(min=1, help="Of an answer; 256, of the embedded model 48.")
]
HeldOut = Annotated[int, typer.Option(min=0, help="Problems that only measure.")]
AnswersEach = Annotated[int, typer.Option(min=0, help="Answers to each of those.")]
Plain = Annotated[
    bool, typer.Option("--plain", help="Go on from the prompt, without the chat template.")
]


def split(text: str | None) -> list[str] | None:
    """A comma-separated list, or None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def named_columns(text: str | None) -> dict[str, str]:
    """What `--columns ROLE=COL,...` says.

    >>> named_columns("problem=task,correct=passed")
    {'problem': 'task', 'correct': 'passed'}
    """
    pairs = [part.partition("=") for part in split(text) or []]
    wrong = ["".join(pair) for pair in pairs if not all(pair)]
    require(not wrong, "columns", repr((wrong or [""])[0]), "ROLE=COL, as in problem=task")
    return {role.strip(): column.strip() for role, _, column in pairs}


def whole(text: str | None, argument: str) -> list[int] | None:
    """A comma-separated list of whole numbers, or None."""
    parts = split(text)
    if parts is None:
        return None
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong or not parts:
        came = wrong[0] if wrong else text
        raise InputError(f"{argument}: got {came!r}, want whole numbers as 1,2,4")
    return [int(part) for part in parts]


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """What `--set NAME=VALUE` says, a value read as Python would where it can be.

    >>> settings(["alpha=0.5", "within=top"])
    {'alpha': 0.5, 'within': 'top'}
    """
    from ast import literal_eval

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier() and value):
            raise InputError(f"set: got {pair!r}, want NAME=VALUE")
        try:
            found[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def engine(kind: str, workers: int | None, what: str) -> Iterator[Engine]:
    """An engine that shows how far a pass over the rows is, where someone is looking."""
    if not sys.stderr.isatty():
        yield Engine(kind, workers)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield Engine(kind, workers, lambda done, n: bar.update(task, completed=done, total=n))


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts from the parent's peak
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
