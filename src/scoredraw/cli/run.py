"""`scoredraw run`: rerun papers' experiments; what they say beside what we measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.errors import InputError

if TYPE_CHECKING:
    from scoredraw.reports import Report

COLOURS = {"holds": "green", "fails": "red", "undecided": "yellow", None: "dim"}


def run(
    numbers: Annotated[
        list[int], typer.Argument(help="Papers' numbers, 1 to 61.", metavar="NN...")
    ],
    scale: Annotated[
        str, typer.Option(help="smoke (seconds), quick (a minute), full (ten), study (hours).")
    ] = "quick",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same report.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for each paper's NN-slug.json and NN-slug.html.", metavar="DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Rerun papers' experiments and hold each claim to what is measured."""
    from scoredraw import registry, reports
    from scoredraw.pages import report_page

    # everything a person can get wrong is found before the first experiment starts
    if scale not in reports.SCALES:
        raise InputError(f"scale: got {scale!r}, want one of {', '.join(reports.SCALES)}")
    papers = list(dict.fromkeys(registry.paper(number) for number in numbers))
    for paper in papers:
        reports.paper_module(paper.number)
    if out is not None:
        make_folder(out)

    finished: list[Report] = []
    for paper in papers:
        stem = f"{paper.number:02d}-{paper.slug}"
        report = run_one(paper.number, scale, seed, stem)
        finished.append(report)
        if out is not None:
            report.save(out / f"{stem}.json")
            report_page(report).save(out / f"{stem}.html")
        if not as_json:
            print_claims(report)
    if as_json:
        print(json.dumps([summary(r) for r in finished], indent=2, allow_nan=False))


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: got {folder} ({error.strerror}), want a folder") from None


def run_one(number: int, scale: str, seed: int, name: str) -> Report:
    """Run one paper with a spinner, and leave one line behind."""
    from rich.console import Console

    from scoredraw import reports
    from scoredraw.pages import tally

    console = Console(stderr=True, highlight=False)
    with console.status(f"{name} ({scale})"):
        report = reports.run_paper(number, scale, seed)
    console.print(f"{name} ({scale}): {report.seconds:.1f} s. {tally(report.claims, scale)}")
    return report


def print_claims(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from scoredraw.pages import cell_text

    if not report.claims:
        return
    table = Table(title=Text(report.title), title_justify="left", expand=False)
    for column in ("claim", "the paper says", "measured", "holds if", "verdict"):
        table.add_column(column, overflow="fold")
    for claim in report.claims:
        verdict = Text(claim.verdict or "not judged", style=COLOURS[claim.verdict])
        texts = (claim.name, claim.paper_says, cell_text(claim.measured), claim.rule)
        table.add_row(*(Text(text) for text in texts), verdict)
    # a pipe gets lines as long as they need to be
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def summary(report: Report) -> dict[str, Any]:
    """What `--json` prints of a report: the claims without tables and figures."""
    from scoredraw.reports import plain

    keys = ("paper", "scale", "seed", "seconds", "claims")
    return {key: plain(getattr(report, key)) for key in keys}
