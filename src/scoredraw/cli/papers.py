"""`scoredraw papers`: the catalogue as a table for people, as JSON for programs, as Markdown.

The Markdown table is the README's; a test or a release script compares or writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from scoredraw import registry

RESULTS = Path(registry.__file__).with_name("results")
VERDICTS = ("holds", "fails", "undecided")


def papers(
    search: Annotated[
        str | None,
        typer.Option("--search", "-s", help="Only papers about these words, the best match first."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list instead of a table.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the README's table of papers.")
    ] = False,
) -> None:
    """List the papers behind scoredraw: what they are, where they live here, how far they are."""
    found = registry.papers() if search is None else registry.search(search)
    if as_json:
        typer.echo(json.dumps(records(found), ensure_ascii=False, indent=2))
    elif as_markdown:
        typer.echo(table_markdown(found), nl=False)
    elif found:
        _print_table(found)
    else:
        typer.echo(f"no paper matches {search!r}; `scoredraw papers` lists all", err=True)


def records(found: Iterable[registry.Paper]) -> list[dict[str, Any]]:
    """The papers as plain dictionaries, with the fields that `--json` promises.

    >>> records([registry.paper(16)])[0]["arxiv"]
    '2305.18424'
    """
    return [
        {
            "number": paper.number,
            "slug": paper.slug,
            "title": paper.title,
            "arxiv": paper.arxiv,
            "published": paper.published,
            "room": paper.room,
            "status": paper.status,
            "api": list(paper.api),
        }
        for paper in found
    ]


def table_markdown(found: Iterable[registry.Paper] | None = None) -> str:
    """The papers as a Markdown table: number, title (linked), room, status, claims, methods.

    Claims are those that hold of those tested in the committed run; methods the names that
    `--method` takes, or else the paper's functions and classes.

    >>> print(table_markdown([registry.paper(35)]))
    | # | paper | room | status | claims | methods |
    | ---: | --- | --- | --- | --- | --- |
    | 35 | [Fast Sampling of Diffusion Models with Exponential Integrator](https://...) | ...
    """
    lines = ["| # | paper | room | status | claims | methods |"]
    lines.append("| ---: | --- | --- | --- | --- | --- |")
    for paper in registry.papers() if found is None else found:
        title = f"[{paper.title}]({paper.url})" if paper.url else paper.title
        names = [method.name for method in registry.methods() if method.paper == paper.number]
        names = names or [reference.rpartition(":")[2] for reference in paper.api]
        cells = (
            f"{paper.number:02d}",
            title.replace("|", r"\|"),
            paper.room,
            paper.status,
            _claims(paper),
            ", ".join(f"`{name}`" for name in names),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _claims(paper: registry.Paper) -> str:
    """How the claims came out in the committed run, or nothing."""
    path = RESULTS / f"{paper.number:02d}-{paper.slug}.json"
    if not path.exists():
        return ""
    verdicts = [claim["verdict"] for claim in json.loads(path.read_text("utf-8"))["claims"]]
    counts = [(verdicts.count(v), v) for v in VERDICTS]
    return ", ".join(f"{n} {v if n == 1 else v.removesuffix('s')}" for n, v in counts if n)


def _print_table(found: Iterable[registry.Paper]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    rows = [(f"{p.number:02d}", p.title, p.published, p.room, p.status) for p in found]
    header = ("no.", "title", "published", "room", "status")
    table = Table(box=None, pad_edge=False, header_style="bold")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[2] = min(widths[2], 20)
    # The title takes what the others and two spaces between columns leave, but never vanishes.
    widths[1] = max(20, min(widths[1], console.width - sum(widths) + widths[1] - 2 * len(header)))
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)
