"""What `audit passk` shows: tables on the terminal, a page of figures, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoredraw.cli.outcome import written_by
from scoredraw.metrics import Estimate
from scoredraw.pages import Page, cell_text
from scoredraw.reports import Figure, ReportTable, Series, plain

if TYPE_CHECKING:
    from scoredraw.language.coverage import CoverageCurve
    from scoredraw.language.coverage_audit import CoverageAudit

NAMES = {
    "power_law": "power law",
    "beta_binomial": "beta-binomial",
    "plug_in": "plug-in 1-(1-c/n)^k",
    "oracle": "some sample is right",
}


def named(name: str) -> str:
    """A model's or a method's name for a person."""
    return NAMES.get(name, name.replace("_", "-"))


def headline(audit: CoverageAudit) -> str:
    """What was found, in a few sentences."""
    n = audit.n
    one, all_ = audit.coverage(int(audit.curve.k[0])), audit.coverage(n)
    problems = len(audit.samples)
    parts = [
        f"One sample is right on {100 * one.value:.1f} % of {problems:,} problems.",
        f"{in_percent(all_)} % of them have a right one among {n:,} samples.",
    ]
    best = audit.best_selector
    if best is not None and n > 1:
        gap, value = audit.gap[best, n], audit.accuracy[best, n].value
        parts.append(
            f"Choosing one of them without a verifier gets {100 * value:.1f} % at best "
            f"({named(best)}): {in_percent(gap)} points are left on the table."
        )
    if audit.reach:
        needs = " or ".join(f"{r.samples} ({named(name)})" for name, r in audit.reach.items())
        parts.append(f"For {100 * (audit.target or 0):g} % the models ask for {needs} samples.")
    if audit.replays:
        said = [
            f"{named(r.model)} {100 * r.predicted:.0f} ± {100 * r.spread:.0f}"
            for r in audit.replays
        ]
        first = audit.replays[0]
        parts.append(
            f"Their record here: from {first.known} samples they put coverage at {first.k} at "
            f"{', '.join(said)} %, where it is {100 * first.truth:.1f} %."
        )
    return " ".join(parts)


def in_percent(estimate: Estimate) -> str:
    """An estimate with its interval, times a hundred."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def tables(audit: CoverageAudit, priced: bool) -> list[ReportTable]:
    """Coverage and selectors at the samples at hand, what lies beyond, the price of a target."""
    made = [_at_hand(audit)]
    if audit.models:
        made.append(_beyond(audit))
    if audit.replays:
        made.append(_record(audit))
    if audit.reach:
        made.append(_price(audit, priced))
    return made


def _at_hand(audit: CoverageAudit) -> ReportTable:
    heads = [f"k = {k:,}" for k in audit.ks]
    rows: list[list[Any]] = [["some sample is right", *(audit.coverage(int(k)) for k in audit.ks)]]
    order = sorted(audit.selectors, key=lambda m: -audit.accuracy[m, int(audit.ks[-1])].value)
    for method in order:
        if method != "oracle":
            rows.append([named(method), *(audit.accuracy[method, int(k)] for k in audit.ks)])
    note = f"Intervals: bootstrap over problems. {audit.unsolved:,} of {len(audit.samples):,} "
    note += "problems have no right sample."
    return ReportTable("Share of the problems that are right", ["chosen by", *heads], rows, note)


def _beyond(audit: CoverageAudit) -> ReportTable:
    curves = audit.models
    ahead = [int(k) for k in audit.beyond]
    rows: list[list[Any]] = [
        [named(name), _parameters(curve), *(_value(curve, k) for k in ahead)]
        for name, curve in curves.items()
    ]
    heads = [f"k = {k:,}" for k in ahead]
    note = "The intervals are those of other problems; the models' disagreement comes on top."
    return ReportTable("Coverage beyond the samples", ["model", "fit", *heads], rows, note)


def _record(audit: CoverageAudit) -> ReportTable:
    rows: list[list[Any]] = [
        [named(r.model), r.predicted, r.spread, r.truth, r.off] for r in audit.replays
    ]
    first = audit.replays[0]
    title = f"Coverage at {first.k:,}, as predicted from {first.known:,} samples a problem"
    heads = ["model", "predicted", "standard deviation", "true", "off by"]
    return ReportTable(title, heads, rows, "Over 40 random choices of those samples.")


def _price(audit: CoverageAudit, priced: bool) -> ReportTable:
    heads = ["model", "samples a problem", *(["price a problem"] if priced else [])]
    rows: list[list[Any]] = [
        [named(name), r.samples, *([r.cost] if priced else [])] for name, r in audit.reach.items()
    ]
    return ReportTable(f"For a coverage of {audit.target:g}", heads, rows)


def _parameters(curve: Any) -> str:
    fit = curve.fit
    if hasattr(fit, "a"):
        return f"exp({fit.a:.3g} k^{fit.b:.3g})"
    return f"Beta({fit.alpha:.3g}, {fit.beta:.3g})"


def _value(curve: CoverageCurve, k: int) -> Estimate:
    j = int(np.flatnonzero(curve.k == k)[0])
    return Estimate(float(curve.mean[j]), float(curve.low[j]), float(curve.high[j]), curve.problems)


def figures(audit: CoverageAudit) -> list[Figure]:
    """Coverage and the selectors against k, the models beyond, and how unlike the problems are."""
    ks = [int(k) for k in audit.ks]
    chosen = [
        Series(named(m), ks, *_bounds([audit.accuracy[m, k] for k in ks]), baseline=m == "uniform")
        for m in audit.selectors
        if m != "oracle"
    ]
    curve = _series("some sample is right", audit.curve)
    share = audit.samples.right / audit.samples.counts
    level = np.linspace(0, 1, min(len(share), 200))
    made = [
        Figure(
            "line", "Coverage, and choosing one answer", "samples k", "share of the problems",
            [curve, *chosen], log_x=True,
            caption="The gap is what a verifier would add. Bands: bootstrap over problems.",
        )
    ]  # fmt: skip
    if audit.models:
        made.append(
            Figure(
                "line", "Beyond the samples at hand", "samples k", "coverage",
                [curve, *(_series(named(name), model) for name, model in audit.models.items())],
                log_x=True, caption="Where the models part, nothing here can tell which is right.",
            )
        )  # fmt: skip
    made.append(
        Figure(
            "line", "How unlike the problems are", "share of the problems, hardest first",
            "share of their samples that are right",
            [Series("problems", level.tolist(), np.quantile(share, level).tolist())],
            caption="A long flat start is what makes coverage grow so slowly at the end.",
        )
    )  # fmt: skip
    return made


def _series(name: str, curve: CoverageCurve) -> Series:
    columns = (curve.k, curve.mean, curve.low, curve.high)
    x, y, low, high = (np.asarray(column, float).tolist() for column in columns)
    return Series(name, x, y, low, high)


def _bounds(estimates: list[Estimate]) -> tuple[list[float], list[float], list[float]]:
    return [e.value for e in estimates], [e.low for e in estimates], [e.high for e in estimates]


def write_page(path: Path, audit: CoverageAudit, priced: bool) -> None:
    """Write the page, whole or not at all."""
    Page(
        title="What would more samples buy?",
        kicker=f"scoredraw audit passk · {audit.samples.name}",
        answer=headline(audit),
        tables=tables(audit, priced),
        figures=figures(audit),
        notes=notes(audit),
        provenance=written_by(input=audit.samples.name, problems=len(audit.samples)),
    ).save(path)


def notes(audit: CoverageAudit) -> list[str]:
    """What a reader has to know of the numbers."""
    counts = audit.samples.counts
    said = []
    if counts.max() > counts.min():
        span = f"{counts.min():,} to {counts.max():,}"
        said.append(f"Problems have {span} samples; curves end at the smallest number.")
    random = [m for m, curve in audit.selectors.items() if "Monte Carlo" in curve.how]
    if random:
        said.append(f"{', '.join(map(named, random))}: 100 random subsets where there are many.")
    if audit.samples.answers is None:
        said.append("Without a column of answers nothing can be put to the vote.")
    return said


def print_audit(audit: CoverageAudit, priced: bool) -> None:
    """The headline and the tables for a terminal or a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(headline(audit)))
    for table in tables(audit, priced):
        shown = Table(title=Text(table.title), title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(Text(column), justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell_text(cell)) for cell in row))
        console.print(shown)
        if table.note:
            console.print(Text(table.note, style="dim"))
    for note in notes(audit):
        console.print(Text(f"- {note}", style="dim"))


def audit_json(audit: CoverageAudit, priced: bool) -> str:
    """One strict JSON object."""
    found = {
        "data": audit.samples.name,
        "problems": len(audit.samples),
        "unsolved": audit.unsolved,
        "answer": headline(audit),
        "coverage": {str(k): audit.coverage(int(k)) for k in audit.ks},
        "selectors": {
            method: {str(k): audit.accuracy[method, int(k)] for k in audit.ks}
            for method in audit.selectors
        },
        "models": {
            name: {
                "fit": _parameters(curve),
                "coverage": {str(k): _value(curve, int(k)) for k in audit.beyond},
            }
            for name, curve in audit.models.items()
        },
        "replays": audit.replays,
        "target": audit.target,
        "reach": {
            name: {"samples": r.samples, **({"price": r.cost} if priced else {})}
            for name, r in audit.reach.items()
        },
        **written_by(),
    }
    return json.dumps(plain(found), indent=2, allow_nan=False, ensure_ascii=False)
