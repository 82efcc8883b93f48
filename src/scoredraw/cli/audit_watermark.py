"""What `scoredraw audit watermark` reads, prints and shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from scoredraw.cli.compare import check_report, progress_bar
from scoredraw.cli.draw_answers import short
from scoredraw.cli.outcome import written_by
from scoredraw.errors import require
from scoredraw.language.watermark_detection import WatermarkAudit, audit_watermark
from scoredraw.pages import Page
from scoredraw.reports import Figure, ReportTable, Series, plain

SHOWN, ON_PAGE, BINS = 20, 500, 20


def carry_out(
    source: str, model: str | None, column: str | None, vocab_size: int | None,
    report: Path | None, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Read the texts, test each, say which bear the mark."""
    from scoredraw.tables import open_table

    if report is not None:
        check_report(report)
    table = open_table(source)
    name = column or next((c for c in ("ids", "text") if c in table.column_names), "text")
    values = table.column(name, "column").to_pylist()
    require(bool(values), "input", "no rows", "at least one text")
    read = any(isinstance(value, str) for value in values)
    require(not read or model is not None, "model", "none", "--model, whose tokenizer reads them")
    tokenizer = None
    if model is not None:
        from scoredraw.small_models import load_model

        loaded, tokenizer = load_model(model)
        vocab_size = vocab_size or int(loaded.get_output_embeddings().weight.shape[0])
    texts = [value if isinstance(value, str) else list(value or ()) for value in values]
    with progress_bar() as progress:
        found = audit_watermark(
            texts, tokenizer=tokenizer, vocab_size=vocab_size,
            progress=lambda done, total: progress("texts", done, total), **settings,
        )  # fmt: skip
    names = table.column("text", "column").to_pylist() if "text" in table.column_names else texts
    if report is not None:
        page(found, names, source).save(report)
    if as_json:
        typer.echo(as_text(found))
        return
    print_audit(found, names)
    if report is not None:
        typer.echo(f"wrote {report}")


def as_text(found: WatermarkAudit) -> str:
    """The audit as JSON."""
    d = found.detections
    facts = {
        "scheme": found.watermark.scheme,
        "alpha": found.alpha,
        "detected": found.n_detected,
        "by_chance": found.by_chance,
        "with_other_keys": found.with_other_keys,
        "tokens_needed": found.needed,
        "texts": [
            {"tokens": int(n), "statistic": s, "p_value": p, "verdict": verdict(found, i)}
            for i, (n, s, p) in enumerate(zip(d.n_scored, d.statistic, d.p_value, strict=True))
        ],
    }
    return json.dumps(plain(facts), indent=2, allow_nan=False)


def verdict(found: WatermarkAudit, i: int) -> str:
    """What can be said of a text, all texts being tested together (Holm)."""
    if found.holm[i]:
        return "watermarked"
    if found.undecidable[i]:
        return "too short to say"
    return "suspect" if found.flagged[i] else "not found"


def answer(found: WatermarkAudit) -> str:
    """How many texts bear the mark, and how many would by chance."""
    n, scheme = len(found.flagged), found.watermark.scheme
    said = (
        f"{found.n_detected['holm']:,} of {n:,} texts bear the watermark ({scheme}; "
        f"no false alarm among all of them with probability {1 - found.alpha:.0%}). Alone, "
        f"{found.n_detected['alone']:,} are significant at {found.alpha:g}, where chance would "
        f"flag {found.by_chance:.1%}."
    )
    short_ones = int(found.undecidable.sum())
    if short_ones:
        said += f" {short_ones:,} have fewer than the {found.needed:,} tokens that a test takes."
    return said


def rows(found: WatermarkAudit, names: list[Any], most: int) -> list[list[Any]]:
    """Text, scored tokens, statistic, p-value and verdict of the most certain texts."""
    d = found.detections
    order = np.argsort(d.p_value, kind="stable")[:most]
    return [
        [short(str(names[i])), f"{d.n_scored[i]:,}", f"{d.statistic[i]:.4g}",
         f"{d.p_value[i]:.2g}", verdict(found, int(i))]
        for i in order
    ]  # fmt: skip


HEADS = ["text", "tokens", "statistic", "p-value", "verdict"]


def print_audit(found: WatermarkAudit, names: list[Any]) -> None:
    """The texts with the smallest p-values, then the answer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="The smallest p-values", title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("text", "verdict") else "right")
    for row in rows(found, names, SHOWN):
        table.add_row(*map(Text, row))
    Console().print(table)
    typer.echo(answer(found))
    if found.with_other_keys is not None:
        typer.echo(f"Read with keys nobody used, a share of {found.with_other_keys} is flagged.")


def page(found: WatermarkAudit, names: list[Any], source: str) -> Page:
    """The same as a page, with the distribution of the p-values."""
    counts, edges = np.histogram(found.detections.p_value, BINS, (0.0, 1.0))
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    level = [len(found.flagged) / BINS] * BINS
    figure = Figure(
        "line", "p-values of the texts", "p-value", "texts",
        [Series("these texts", middle, counts.tolist()),
         Series("texts that don't know the key", middle, level, baseline=True)],
        caption="Watermarked texts pile up on the left.",
    )  # fmt: skip
    return Page(
        title=f"Watermarks in {Path(source).name}",
        kicker="scoredraw audit watermark",
        answer=answer(found),
        tables=[ReportTable("Texts by p-value", HEADS, rows(found, names, ON_PAGE))],
        figures=[figure],
        provenance=written_by(input=source),
    )
