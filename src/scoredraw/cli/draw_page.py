"""The page of `draw --report`: how uneven the scores are, and what each draw is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoredraw.cli.outcome import written_by
from scoredraw.pages import Page
from scoredraw.reports import Figure, ReportTable, Series

if TYPE_CHECKING:
    from scoredraw.draws import Draw

POINTS = 200  # of a curve: more than a screen shows


def write_page(path: Path, source: str, draws: list[Draw], scores: Any) -> None:
    """Write the page about draws of one method and several sizes, whole or not at all."""
    first = draws[0]
    sizes = ", ".join(f"{len(draw):,}" for draw in draws)
    answer = f"{sizes} of {first.n:,} rows by {first.method}."
    if first.unbiased:
        answer += " Weighted sums over them estimate sums over all rows without bias."
    figures = [weights_figure(draws)]
    if scores is not None and np.ptp(scores) > 0:
        figures.insert(0, concentration_figure(scores))
    Page(
        title=f"A draw from {Path(source).name}",
        kicker="scoredraw draw",
        answer=answer,
        tables=[draws_table(draws)],
        figures=figures,
        provenance=written_by(input=source),
    ).save(path)


def draws_table(draws: list[Draw]) -> ReportTable:
    """A row a draw: its size, the rows it is worth, the spread of its weights."""
    rows: list[list[Any]] = []
    for draw in draws:
        w = draw.weights
        effective = float(w.sum() ** 2 / (w**2).sum())
        mass = float(w.sum()) if draw.unbiased else None
        rows.append([len(draw), len(draw) / draw.n, effective, w.min(), w.max(), mass])
    return ReportTable(
        "What was drawn",
        ["rows", "share", "effective rows", "smallest weight", "largest weight", "weights' sum"],
        rows,
        "Effective rows: (sum w)^2 / sum w^2, the equally weighted rows that estimate a mean of "
        "things unrelated to the scores as well.",
    )


def concentration_figure(scores: Any) -> Figure:
    """The share of the total score that the highest-scoring rows hold."""
    ordered = np.sort(scores - min(0.0, float(scores.min())))[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    at = np.unique(np.linspace(0, len(held) - 1, POINTS).astype(int))
    share = ((at + 1) / len(held)).tolist()
    even = Series("all rows alike", share, share, baseline=True)
    return Figure(
        "line",
        "How uneven the scores are",
        "share of the rows, highest scores first",
        "share of the total score",
        [Series("these scores", share, held[at].tolist()), even],
        caption="The further above the diagonal, the more there is to gain over a uniform draw.",
    )


def weights_figure(draws: list[Draw]) -> Figure:
    """The weights of the kept rows by quantile."""
    level = np.linspace(0, 1, POINTS // 2)
    series = [
        Series(f"{len(d):,} rows", level.tolist(), np.quantile(d.weights, level).tolist())
        for d in draws
    ]
    return Figure(
        "line",
        "What a kept row stands for",
        "share of the kept rows",
        "weight",
        series,
        log_y=True,
        caption="A row of weight w stands for w rows of the table.",
    )
