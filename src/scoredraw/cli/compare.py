"""`scoredraw compare`: which way of drawing rows, choosing answers or sampling is worth it here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli.options import (
    Equal,
    Guidance,
    Json,
    Negative,
    Prompt,
    ReportPage,
    SampleColumns,
    SamplesInput,
    Seed,
    Sizes,
    Target,
    Workers,
    named_columns,
    whole,
)
from scoredraw.cli.options import Text as TextColumn
from scoredraw.errors import InputError, InterruptedWorkError

if TYPE_CHECKING:
    from scoredraw.bakeoff.answers import AnswerComparison
    from scoredraw.bakeoff.comparison import Comparison
    from scoredraw.bakeoff.rows import Progress
    from scoredraw.bakeoff.samplers import SamplerComparison
    from scoredraw.metrics import Estimate
    from scoredraw.reports import ReportTable

COLOURS = {"beats": "bold green", "worse": "red", "undecided": ""}


def rows(
    data: Annotated[
        str, typer.Argument(metavar="INPUT", help="A table's file, or a data set: fashion-mnist.")
    ],
    target: Target = None,
    text: TextColumn = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Such as lewis,el2n:poisson,uniform@class: a method, with another scheme, by "
            "class.",
            metavar="A,B",
            show_default="a set that suits the task",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Rows to keep: counts or shares.", metavar="N,...", show_default="1%,5%,10%"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="logistic, ridge, mlp or boosting.", show_default="by task")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification or regression.", show_default="by target")
    ] = None,
    flip: Annotated[
        str, typer.Option(help="Share of training labels made wrong: which methods collapse?")
    ] = "0%",
    repeats: Annotated[int, typer.Option(help="Splits; more give shorter intervals.")] = 10,
    seed: Seed = 0,
    max_rows: Annotated[int, typer.Option(help="Larger tables are sampled first.")] = 100_000,
    workers: Workers = None,
    journal: Annotated[
        Path, typer.Option(help="File or folder that keeps finished repeats.", metavar="PATH")
    ] = Path(".scoredraw"),
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Compare ways of drawing training rows by the model they give, against a uniform draw."""
    from scoredraw.bakeoff.rows import compare_rows

    if report is not None:
        check_report(report)
    try:
        with progress_bar() as progress:
            result = compare_rows(
                data,
                target,
                text=text,
                methods=methods,
                sizes=sizes,
                model=model,
                repeats=repeats,
                seed=seed,
                task=task,
                flip=flip,
                max_rows=max_rows,
                workers=workers,
                journal=journal,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = f"finished repeats are kept in {journal}, the same command goes on from there"
        raise InterruptedWorkError(f"interrupted; {kept}") from None
    deliver(result, print_leaderboard, report, as_json)


def answers(
    samples: SamplesInput,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Such as majority,bon,mean-logprob.",
            metavar="A,B",
            show_default="all that the columns allow",
        ),
    ] = None,
    ks: Sizes = None,
    columns: SampleColumns = None,
    equal: Equal = "exact",
    repeats: Annotated[int, typer.Option(help="Random subsets where nothing is exact.")] = 1000,
    seed: Seed = 0,
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Compare ways of choosing one of k sampled answers, against a sample chosen uniformly."""
    from scoredraw.bakeoff.answers import compare_answers
    from scoredraw.math_answers import equality

    if report is not None:
        check_report(report)
    with progress_bar() as progress:
        result = compare_answers(
            samples, methods, whole(ks, "ks"),
            columns=named_columns(columns), equal=equality(equal), repeats=repeats, seed=seed,
            progress=progress,
        )  # fmt: skip
    deliver(result, print_choices, report, as_json)


def samplers(
    model: Annotated[
        str, typer.Option(help="embedded, or the folder of a diffusers pipeline.", metavar="MODEL")
    ] = "embedded",
    prompt: Prompt = None,
    negative: Negative = None,
    guidance: Guidance = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Such as deis,usf,diffusers-unipc.",
            metavar="A,B",
            show_default="all solvers of the ODE",
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Network calls.", metavar="N,...")] = "5,10,20",
    size: Annotated[int, typer.Option("--size", "-n", help="Images of a method.")] = 512,
    noises: Annotated[int, typer.Option(help="Of them compared with the exact solution.")] = 128,
    data: Annotated[
        Path | None,
        typer.Option(help="Images for methods that use the data's moments.", metavar="FILE.npz"),
    ] = None,
    reference: Annotated[int, typer.Option(min=1, help="Steps of the exact solution.")] = 60,
    seed: Seed = 0,
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Compare solvers of a diffusion model: error to the exact ODE, Fréchet distance, seconds."""
    from scoredraw.bakeoff.samplers import compare_samplers

    if report is not None:
        check_report(report)
    with progress_bar() as progress:
        result = compare_samplers(
            model, methods, whole(steps, "steps") or (), size=size, noises=min(noises, size),
            data=data, reference=reference, seed=seed, prompt=prompt, negative=negative,
            guidance=guidance, progress=progress,
        )  # fmt: skip
    deliver(result, print_samplers, report, as_json)


def deliver(
    result: Any, print_result: Callable[[Any], None], report: Path | None, as_json: bool
) -> None:
    """Write the page if one was asked for, then print the JSON or the tables."""
    if report is not None:
        result.page().save(report)
    if as_json:
        typer.echo(result.to_json())
        return
    print_result(result)
    if report is not None:
        typer.echo(f"wrote {report}")


def check_report(path: Path) -> None:
    """Find out before the work whether the page can be written."""
    if path.is_dir():
        raise InputError(f"report: got {path}, which is a folder, want a file's path")
    if not path.parent.is_dir():
        raise InputError(f"report: got {path}, want a file in an existing folder")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr; on a pipe nothing moves."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        tasks: dict[str, int] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield step


def print_leaderboard(result: Comparison) -> None:
    """The gains as a table, winners in green, then the answer in words."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from scoredraw.bakeoff.comparison import verdicts
    from scoredraw.bakeoff.contenders import BASELINE
    from scoredraw.bakeoff.display import points, size_labels

    # a pipe gets lines as long as they need to be, a narrow terminal two lines a cell
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    wide = console.width >= 130
    protocol = result.protocol
    title = (
        f"{result.examples.name}: gain in {result.metric} over a uniform draw{points(result)} "
        f"({protocol['model']}, {protocol['repeats']} repeats"
        f"{f', {100 * result.flip:g} % of the labels wrong' if result.flip else ''})"
    )
    table = Table(title=Text(title), title_justify="left")
    table.add_column("method", overflow="fold")
    for label in size_labels(result):
        table.add_column(Text(label), justify="right")
    table.add_column("against uniform")
    table.add_column("seconds", justify="right")
    for method in result.ranking:
        entries = result.of(method)
        baseline = method == BASELINE
        cells = [
            Text(
                shown(result.shown(entry.value if baseline else entry.gain), wide),
                style=COLOURS[entry.verdict],
            )
            for entry in entries
        ]
        if baseline:
            table.add_row(method, *cells, "(reaches)", "", style="dim", end_section=False)
        else:
            table.add_row(Text(method), *cells, verdicts(entries), f"{entries[0].seconds:.2f}")
    console.print(table)
    console.print(Text(result.answer))
    for note in result.notes:
        console.print(Text(f"- {note}", style="dim"))


def print_choices(result: AnswerComparison) -> None:
    """Gains over a uniform sample, what that and a perfect verifier reach, the answer in words."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from scoredraw.bakeoff.answers import percent
    from scoredraw.bakeoff.comparison import verdicts
    from scoredraw.bakeoff.contenders import BASELINE

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    wide = console.width >= 130
    title = f"{result.samples.name}: gain in accuracy over a uniform sample, percentage points"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("method", overflow="fold")
    for entry in result.of(BASELINE):
        table.add_column(entry.size, justify="right")
    table.add_column("against uniform")
    for method in result.ranking:
        entries, baseline = result.of(method), method == BASELINE
        cells = [
            Text(shown(percent(e.value if baseline else e.gain), wide), style=COLOURS[e.verdict])
            for e in entries
        ]
        said = "(reaches)" if baseline else verdicts(entries, "k")
        table.add_row(Text(method), *cells, said, style="dim" if baseline else "")
    ceiling = [Text(shown(percent(value), wide)) for value in result.ceiling]
    table.add_row("some sample is right", *ceiling, "(reaches)", style="dim")
    console.print(table)
    if result.calibration:
        print_table(result.tables()[-1], console)  # how far a confidence can be believed
    console.print(Text(result.answer))
    for note in result.notes:
        console.print(Text(f"- {note}", style="dim"))


def print_samplers(result: SamplerComparison) -> None:
    """Ratios of errors, Fréchet distances and seconds, then the answer in words."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for found in result.tables():
        print_table(found, console)
    console.print(Text(result.answer))
    for note in result.notes:
        console.print(Text(f"- {note}", style="dim"))


def print_table(found: ReportTable, console: Any) -> None:
    """One table of a report."""
    from rich.table import Table

    table = Table(title=found.title, title_justify="left")
    for i, head in enumerate(found.columns):
        table.add_column(head, justify="right" if i else "left")
    for row in found.rows:
        table.add_row(*map(str, row))
    console.print(table)


def shown(estimate: Estimate, wide: bool) -> str:
    text = str(estimate)
    return text if wide else text.replace(" [", "\n[")
