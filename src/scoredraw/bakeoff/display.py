"""A comparison as tables, figures and a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.bakeoff.comparison import Comparison, Entry, listing, verdicts
from scoredraw.bakeoff.contenders import BASELINE
from scoredraw.pages import Page
from scoredraw.reports import Figure, Picture, ReportTable, Series, stamp

FAR = -0.05  # a method that loses more than this on average would flatten the figures


def page(found: Comparison) -> Page:
    """The report as a self-contained HTML page."""
    protocol = found.protocol
    return Page(
        title="Which rows are worth training on"
        + (f", with {100 * found.flip:g} % of the labels wrong?" if found.flip else "?"),
        kicker=f"scoredraw compare rows · {found.examples.name}",
        answer=found.answer,
        tables=tables(found),
        figures=figures(found),
        notes=found.notes,
        provenance={
            "data": f"{found.examples.name}, {len(found.examples):,} rows",
            "methods": ", ".join(protocol["methods"]),
            "sizes": ", ".join(protocol["sizes"]),
            "seed": protocol["seed"],
            "took": f"{found.seconds:.1f} s",
            **stamp(),
        },
    )


def size_labels(found: Comparison) -> list[str]:
    """Sizes as column heads."""
    protocol = found.protocol
    return [
        f"{size} ({rows:,})" if "%" in size else f"{rows:,} rows"
        for size, rows in zip(protocol["sizes"], protocol["counts"], strict=True)
    ]


def tables(found: Comparison) -> list[ReportTable]:
    """The leaderboard of gains, and what every method reached."""
    gains: list[list[Any]] = []
    values: list[list[Any]] = []
    for method in found.ranking:
        entries = found.of(method)
        if method != BASELINE:
            cells = [found.shown(entry.gain) for entry in entries]
            gains.append([method, verdicts(entries), *cells, round(entries[0].seconds, 2)])
        values.append([method, *(found.shown(entry.value) for entry in entries)])
    values.append(["all rows", *[found.shown(found.full)] * len(found.protocol["sizes"])])
    percent = ", %" if found.examples.classes else ""
    wrong = ReportTable(
        f"Wrong labels among the rows drawn, %; {100 * found.flip:g} % of all are",
        ["method", *size_labels(found)],
        [[m, *(round(100 * entry.wrong, 1) for entry in found.of(m))] for m in found.ranking],
    )
    return [
        ReportTable(
            f"Gain in {found.metric} over a uniform draw{points(found)}",
            ["method", "against uniform", *size_labels(found), "seconds"],
            gains,
            "Ordered by the gain averaged over sizes. All intervals hold together (Bonferroni).",
        ),
        ReportTable(
            f"{capital(found.metric)} on held-out rows{percent}",
            ["method", *size_labels(found)],
            values,
            "Each with its own 95 % t interval over repeats.",
        ),
        *([wrong] if found.flip else []),
    ]


def figures(found: Comparison) -> list[Figure]:
    """Metric against size, gains with intervals, gain against cost, and pictures if any."""
    rivals = [method for method in found.ranking if method != BASELINE]
    near = [method for method in rivals if average(found.of(method)) > FAR]
    near = near if len(near) >= min(3, len(rivals)) else rivals
    far = [method for method in rivals if method not in near]
    left_out = f" Far below and left out: {listing(far)}." if far else ""
    return [
        Figure(
            "interval",
            "Gain over a uniform draw of the same size",
            f"gain in {found.metric}{points(found)}",
            series=[gains(found, size, near) for size in found.protocol["sizes"]],
            reference=0.0,
            caption="Right of the line is better than uniform. All intervals hold together."
            + left_out,
        ),
        Figure(
            "line",
            f"{capital(found.metric)} against the rows kept",
            "rows kept",
            f"{found.metric}{', %' if found.examples.classes else ''}",
            [curve(found, method) for method in (BASELINE, *near)],
            log_x=True,
            caption=f"Dashed: a uniform draw. Bands: 95 % intervals over repeats.{left_out}",
        ),
        Figure(
            "scatter",
            "Gain against cost",
            "seconds to score and draw, one core",
            f"mean gain in {found.metric}{points(found)}",
            [cost(found, near)],
            log_x=True,
            reference=0.0,
            caption="Above the line is better than uniform, which costs nothing." + left_out,
        ),
        *pictures(found),
    ]


def gains(found: Comparison, size: str, methods: Sequence[str]) -> Series:
    """The gains at one size as dots with intervals."""
    entries = {entry.method: found.shown(entry.gain) for entry in found.leaderboard(size)}
    shown = [entries[method] for method in methods]
    values, low, high = ([getattr(g, key) for g in shown] for key in ("value", "low", "high"))
    return Series(size if "%" in size else f"{size} rows", methods, values, low, high)


def curve(found: Comparison, method: str) -> Series:
    """A method's metric by size."""
    entries = found.of(method)
    values = [found.shown(entry.value) for entry in entries]
    return Series(
        method,
        [entry.rows for entry in entries],
        [value.value for value in values],
        [value.low for value in values],
        [value.high for value in values],
        baseline=method == BASELINE,
    )


def cost(found: Comparison, methods: Sequence[str]) -> Series:
    """Mean gain by seconds, a labelled point a method."""
    seconds = [max(found.of(method)[0].seconds, 1e-3) for method in methods]
    scale = 100 if found.examples.classes else 1
    means = [scale * average(found.of(method)) for method in methods]
    return Series("methods", seconds, means, labels=list(methods))


def pictures(found: Comparison) -> list[Figure]:
    """A strip of what each method keeps, where the rows are pictures."""
    side = found.examples.picture_side
    if side is None:
        return []
    strips = []
    for method in found.ranking:
        rows = found.records[0]["results"][method]["picks"]
        if rows:
            strips.append(Picture(method, picture_strip(found.examples.numeric[rows], side)))
    size = found.protocol["sizes"][0]
    caption = f"Some of the rows that each method keeps at {size} in the first repeat."
    return [Figure("pictures", "What they pick", caption=caption, pictures=strips)]


def picture_strip(pixels: NDArray[Any], side: int) -> str:
    """Square grey pictures side by side, as a PNG in base64."""
    from matplotlib.image import imsave

    strip = np.hstack([np.pad(row.reshape(side, side), 1) for row in pixels])
    buffer = io.BytesIO()
    imsave(buffer, strip, cmap="gray", vmin=0, vmax=255, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def average(entries: Sequence[Entry]) -> float:
    return float(np.mean([entry.gain.value for entry in entries]))


def points(found: Comparison) -> str:
    return ", percentage points" if found.examples.classes else ""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
