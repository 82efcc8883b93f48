"""What `scoredraw draw answers` writes, prints and shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer

from scoredraw.cli.compare import check_report, progress_bar
from scoredraw.cli.outcome import outcome, written_by
from scoredraw.errors import require
from scoredraw.language.draw_answers import ChosenAnswers
from scoredraw.language.draw_answers import draw_answers as choose
from scoredraw.math_answers import equality
from scoredraw.pages import Page
from scoredraw.reports import Figure, ReportTable, Series
from scoredraw.samples import located, read_samples

ADDED = ("_row", "_rank", "_score", "_share")
SHOWN, ON_PAGE = 10, 40  # problems listed on the screen, and on the page
WIDE = 60  # characters of a problem or an answer that are shown
BINS = 20


def carry_out(
    source: str, method: str, size: int, out: Path | None, columns: dict[str, str], equal: str,
    pad: str | None, settings: dict[str, Any], seed: int, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Choose, write the chosen rows, say what they are worth."""
    from scoredraw.table_output import require_format
    from scoredraw.tables import open_table, reserved

    begun = time.perf_counter()
    if out is not None:
        require_format(out)
    if report is not None:
        check_report(report)
    same = equality(equal)
    table = open_table(located(source))
    reserved(table, ADDED)
    samples = read_samples(source, columns, graded=False)
    with progress_bar() as progress:
        found = choose(samples, method, size, equal=same, pad=pad, seed=seed, progress=progress,
                       **settings)  # fmt: skip
    require(len(found.draw) > 0, "input", "no answer in any sample", "answers to choose from")
    if out is not None:
        write_chosen(table, found, out, source, seed)
    if report is not None:
        page(found, source).save(report)
    facts = outcome(method, found.draw.n, len(found.draw), begun, out)
    if as_json:
        facts |= {"problems": len(samples), "short": found.short}
        if found.accuracy is not None and found.by_lot is not None:
            facts |= {"solved": found.accuracy.value, "by_lot": float(found.by_lot.mean())}
        typer.echo(json.dumps(facts, indent=2))
        return
    if out is None:
        print_chosen(found)
    typer.echo(found.summary + ("" if out is None else f" -> {out}"))
    if report is not None:
        typer.echo(f"wrote {report}")


def write_chosen(table: Any, found: ChosenAnswers, out: Path, source: str, seed: int) -> None:
    """The chosen rows as they are, by problem and rank, with their row, rank, standing, share."""
    import pyarrow as pa

    from scoredraw.table_output import write_table

    rows = found.draw.indices
    order = np.argsort(rows, kind="stable")  # a table is read from its start
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    chosen = pa.Table.from_batches(table.select(rows[order]), table.schema).take(pa.array(back))
    scores = found.draw.scores
    assert scores is not None
    for name, values in zip(ADDED, (rows, found.ranks, scores, found.shares), strict=True):
        chosen = chosen.append_column(name, pa.array(values))
    made = written_by(kind="answers", method=found.method, size=found.size, seed=seed, input=source)
    write_table(out, chosen.schema, chosen.to_batches(), made)


def lines(found: ChosenAnswers, most: int) -> Iterator[tuple[str, str, str, str]]:
    """Problem, answer, share and standing of the first problems' answers."""
    for name, top in list(zip(found.samples.problems, found.chosen, strict=True))[:most]:
        for i, answer in enumerate(top.answers):
            stands = "" if np.isnan(top.rewards[i]) else f"{top.rewards[i]:.3g}"
            what = short(str(answer)), f"{top.frequencies[i]:.2f}", stands
            yield (short(name) if i == 0 else "", *what)


def short(text: str) -> str:
    """The text on one line, cut where it gets long."""
    line = " ".join(text.split())
    return line if len(line) <= WIDE else line[: WIDE - 1] + "…"


def print_chosen(found: ChosenAnswers) -> None:
    """A table of the first problems."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{found.method}: answers to submit", title_justify="left")
    for head in ("problem", "answer", "share of samples", "standing"):
        table.add_column(head, justify="left" if head in ("problem", "answer") else "right")
    for line in lines(found, SHOWN):
        table.add_row(*map(Text, line))
    Console().print(table)
    rest = len(found.chosen) - SHOWN
    if rest > 0:
        typer.echo(f"and {rest:,} more problems (-o FILE writes them all)")


def page(found: ChosenAnswers, source: str) -> Page:
    """The answers with their evidence, and how often the samples agree."""
    top = np.array([t.frequencies[0] for t in found.chosen if len(t)])
    counts, edges = np.histogram(top, BINS, (0.0, 1.0))
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    tables = [
        ReportTable(
            f"Answers of the first {min(ON_PAGE, len(found.chosen)):,} problems",
            ["problem", "answer", "share of samples", "standing"],
            [list(line) for line in lines(found, ON_PAGE)],
            "Standing: what the method ranks by.",
        )
    ]
    figure = Figure(
        "line", "How far the samples agree with the best answer", "share of the samples",
        "problems", [Series("problems", middle, counts.tolist())],
        caption="To the left are problems whose best answer hardly any sample gave.",
    )  # fmt: skip
    return Page(
        title=f"Answers to submit for {Path(source).name}",
        kicker="scoredraw draw answers",
        answer=found.summary,
        tables=tables,
        figures=[figure],
        provenance=written_by(input=source),
    )
