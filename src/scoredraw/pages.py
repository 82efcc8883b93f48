"""Self-contained HTML pages: a report or a comparison as one file to read, send and keep.

Nothing is loaded from elsewhere and nothing needs a script. Figures are inline SVG whose text is
text and whose colours are the page's CSS variables, so one drawing reads well in light and in
dark; each is drawn twice, for a wide and for a narrow screen, and CSS shows the one that fits.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from scoredraw.drawing import NARROW, WIDE, figure_svg
from scoredraw.metrics import Estimate
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, write_text


@dataclass(frozen=True)
class Page:
    """What a page shows, in this order: the answer first, where it comes from last."""

    title: str
    kicker: str = ""
    answer: str = ""
    claims: Sequence[Claim] = ()
    tables: Sequence[ReportTable] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The whole document."""
        parts = [
            '<header class="top">',
            f'<p class="kicker">{escape(self.kicker)}</p>' if self.kicker else "",
            f"<h1>{escape(self.title)}</h1>",
            f'<p class="answer">{escape(self.answer)}</p>' if self.answer else "",
            "</header>",
            claims_html(self.claims),
            *(table_html(table) for table in self.tables),
            *(figure_html(figure) for figure in self.figures),
            notes_html(self.notes),
            provenance_html(self.provenance),
        ]
        return document(self.title, "\n".join(part for part in parts if part))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page in one step."""
        write_text(path, self.html())


def report_page(report: Report) -> Page:
    """The page of a paper's report."""
    name = f"Paper {report.paper:02d}"
    return Page(
        title=report.title or name,
        kicker=f"{name} · {report.scale} run" if report.title else f"{report.scale} run",
        answer=tally(report.claims, report.scale),
        claims=report.claims,
        tables=report.tables,
        figures=report.figures,
        notes=report.notes,
        provenance={
            "command": f"scoredraw run {report.paper:02d} --scale {report.scale} "
            f"--seed {report.seed}",
            "took": f"{report.seconds:.1f} s",
            **report.environment,
        },
    )


def tally(claims: Sequence[Claim], scale: str) -> str:
    """One sentence on how the claims came out.

    >>> tally([Claim.at_least("a", "", 2.0, 1.0), Claim.at_least("b", "", 0.0, 1.0)], "quick")
    '1 of 2 claims holds, 1 fails.'
    """
    verdicts = Counter(claim.verdict for claim in claims)
    if not claims:
        return "This run makes no claims."
    if set(verdicts) == {None}:
        return f"It runs from end to end; a {scale} run is too small to judge the claims."
    held, failed = verdicts["holds"], verdicts["fails"]
    total = len(claims)
    if held == total:
        return "The claim holds." if total == 1 else f"All {total} claims hold."
    parts = [f"{held or 'none'} of {total} claims {'holds' if held == 1 else 'hold'}"]
    if failed:
        parts.append(f"{failed} {'fails' if failed == 1 else 'fail'}")
    if unsure := total - held - failed:
        parts.append(f"{unsure} {'is' if unsure == 1 else 'are'} undecided")
    sentence = ", ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


# ── text ──────────────────────────────────────────────────────────────────────────────────────


def cell_text(value: Cell) -> str:
    """A cell as plain text; what the terminal shows too.

    >>> cell_text(12345), cell_text(0.123456), cell_text(None), cell_text(True)
    ('12,345', '0.1235', '–', 'yes')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def cell_html(value: Cell) -> str:
    if isinstance(value, Estimate):
        text, _, interval = str(value).replace("-", "−").partition(" ")
        aside = f' <span class="interval">{escape(interval)}</span>' if interval else ""
        return f'<td class="number">{escape(text)}{aside}</td>'
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    kind = ' class="number"' if numeric or value is None else ""
    text = cell_text(value).replace("-", "−") if numeric else cell_text(value)
    return f"<td{kind}>{escape(text)}</td>"


def table_html(table: ReportTable) -> str:
    """A table in a box that scrolls sideways by itself on a narrow screen."""
    numeric = [
        any(isinstance(row[i], Estimate | int | float | np.number) for row in table.rows)
        for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{escape(name)}</th>'
        for name, right in zip(table.columns, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(cell_html(value) for value in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return section(
        table.title,
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{note}",
    )


MARKS = {"holds": "✓ holds", "fails": "✗ fails", "undecided": "? undecided", None: "not judged"}


def claims_html(claims: Iterable[Claim]) -> str:
    items = [
        f'<li class="claim {claim.verdict or "none"}">'
        f'<span class="verdict">{MARKS[claim.verdict]}</span><h3>{escape(claim.name)}</h3>'
        f"<dl><div><dt>the paper says</dt><dd>{escape(claim.paper_says)}</dd></div>"
        f"<div><dt>measured</dt><dd><b>{escape(measured_text(claim.measured))}</b></dd></div>"
        f"<div><dt>holds if</dt><dd>{escape(claim.rule)}</dd></div></dl></li>"
        for claim in claims
    ]
    return section("Claims", f'<ul class="claims">{"".join(items)}</ul>') if items else ""


def measured_text(value: Estimate | float | str | None) -> str:
    text = cell_text(value)
    return text if isinstance(value, str) else text.replace("-", "−")


def notes_html(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return section("How it was done", f'<ul class="notes">{items}</ul>') if items else ""


def provenance_html(provenance: Mapping[str, Any]) -> str:
    """What files hold of their making; the arguments of a command as one would type them."""
    rows = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(typed(value))}</dd></div>"
        for key, value in provenance.items()
        if value is not None
    )
    return section("Provenance", f'<dl class="provenance">{rows}</dl>') if rows else ""


def typed(value: Any) -> str:
    """
    >>> typed(["draw", "rows", "a b.csv"])
    "scoredraw draw rows 'a b.csv'"
    """
    return f"scoredraw {shlex.join(value)}" if isinstance(value, list) else str(value)


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


# ── figures ───────────────────────────────────────────────────────────────────────────────────


def figure_html(figure: Figure) -> str:
    """A figure with its title and caption, at both widths."""
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    if figure.kind == "pictures":
        strips = "".join(
            f'<div class="picture"><p>{escape(picture.caption)}</p><img alt="" '
            f'src="data:image/png;base64,{escape(picture.png)}"></div>'
            for picture in figure.pictures
        )
        return section(figure.title, f'<figure class="pictures">{strips}{caption}</figure>')
    drawings = "".join(
        f'<div class="{name}">{figure_svg(figure, width)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return section(figure.title, f"<figure>{drawings}{caption}</figure>")


# ── the document ──────────────────────────────────────────────────────────────────────────────


def document(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="scoredraw">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


STYLE = """
:root {
  --paper: #fdfdfc; --raised: #f4f4f1; --ink: #1b1c1e; --muted: #63666b; --grid: #e3e3df;
  --good: #00714f; --bad: #b3400a; --unsure: #63666b;
  --s1: #0067a5; --s2: #c4500a; --s3: #00845f; --s4: #b0508c; --s5: #8f6a00; --s6: #2a8fc9;
  --s7: #5d4bb5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --raised: #1f2226; --ink: #e8e8e6; --muted: #a0a4aa; --grid: #33373c;
    --good: #3ecf9c; --bad: #ff9257; --unsure: #a0a4aa;
    --s1: #5ab4f2; --s2: #ff9257; --s3: #3ecf9c; --s4: #ea9cc9; --s5: #e8bd4a; --s6: #9fd3f5;
    --s7: #b3a6ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.kicker { margin: 0; color: var(--muted); font-size: .875rem; }
h1 { margin: .2rem 0 .9rem; font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); line-height: 1.2;
  letter-spacing: -.01em; text-wrap: balance; }
.answer { margin: 0; padding: .9rem 1.1rem; border-left: 4px solid var(--s1);
  background: var(--raised); font-size: 1.15rem; line-height: 1.5; }
section { margin-top: 2.6rem; }
h2 { margin: 0 0 .7rem; font-size: 1.2rem; line-height: 1.3; }
h3 { margin: 0; font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .8rem .42rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; font-size: .8125rem; vertical-align: bottom; }
th.number, td.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th:last-child, td:last-child { padding-right: 0; }
.interval { color: var(--muted); font-size: .8125rem; }
.note, figcaption { margin: .6rem 0 0; color: var(--muted); font-size: .875rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
.narrow { display: none; max-width: 30rem; }
.picture { margin-bottom: .8rem; }
.picture p { margin: 0 0 .2rem; font-size: .875rem; }
.picture img { display: block; width: 100%; image-rendering: pixelated; border-radius: 4px; }
.claims { list-style: none; margin: 0; padding: 0; }
.claim { position: relative; padding: .8rem 0; border-top: 1px solid var(--grid); }
.claim h3 { padding-right: 7rem; }
.verdict { position: absolute; right: 0; font-weight: 600; font-size: .9375rem; }
.holds .verdict { color: var(--good); }
.fails .verdict { color: var(--bad); }
.undecided .verdict, .none .verdict { color: var(--unsure); }
dl { margin: .3rem 0 0; }
.claim dl, .provenance { display: grid; gap: .1rem .9rem; font-size: .9375rem; }
.claim dl div, .provenance div { display: grid; grid-template-columns: 7.5rem 1fr; gap: .6rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.notes { margin: 0; padding-left: 1.2rem; }
.notes li { margin-bottom: .35rem; }
.provenance { font-size: .875rem; }
@media (max-width: 40rem) {
  main { padding: 1.4rem 1rem 3rem; }
  .answer { font-size: 1.05rem; }
  .wide { display: none; }
  .narrow { display: block; }
}
@media print { :root { --paper: #fff; } section { break-inside: avoid; } }
"""
