"""Declarative figures as SVG: text stays text, colours are the page's CSS variables.

matplotlib draws with colours that stand for the variables of a page (ink, muted, the series), and
the names of the variables are put in afterwards. So one drawing follows the reader's light or dark
setting. The series colours tell apart for colour-blind readers, and markers differ as well.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from html import escape
from typing import Any

import numpy as np

from scoredraw.reports import Figure, Series

# Colours that stand for the page's own; drawn by matplotlib, then replaced by CSS variables.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0500{i:02x}" for i in range(1, 8)]
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"s{i}" for i, colour in enumerate(SERIES, start=1)
}
MARKERS = "osD^vPX"
WIDE, NARROW = 760, 380  # CSS pixels
OVERLAID = 6  # more lines than this are drawn as small multiples


def figure_svg(figure: Figure, width: int = WIDE) -> str:
    """The figure as an SVG element `width` CSS pixels wide, coloured by the page's variables."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{figure.title}{width}",
        "text.parse_math": False,  # a dollar sign in a column's name is a dollar sign
        "font.size": 12.5 if width >= WIDE else 12,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 2.0,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs the measuring font lacks
        canvas = FigureCanvasSVG(draw(figure, width))
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.print_svg(buffer, metadata=nothing)
    return inline(buffer.getvalue(), figure.title)


def inline(svg: str, title: str) -> str:
    """An SVG document as an element of the page: its colours, its font, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None  # matplotlib always writes one
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", rest)
    rest = re.sub(r"font: ([0-9.]+px) inherit", r"font-size: \1", rest)
    rest = rest.replace("xlink:href", "href")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box.group()} role="img" '
        f'stroke-linejoin="round" aria-label="{escape(title)}">{rest}'
    )


def draw(figure: Figure, width: int) -> Any:
    """A matplotlib figure `width` pixels wide (72 points an inch: a point is a CSS pixel)."""
    from matplotlib.figure import Figure as Canvas

    if figure.kind == "line" and len(figure.series) > OVERLAID:
        return draw_panels(figure, width)
    tall = 400 if width >= WIDE else 320
    if figure.kind == "interval":
        names = {name for series in figure.series for name in series.x}
        tall = 90 + len(names) * (14 + 14 * len(figure.series))
    canvas = Canvas(figsize=(width / 72, tall / 72), dpi=72, layout="constrained")
    canvas.patch.set_alpha(0)
    axes = canvas.subplots()
    axes.patch.set_alpha(0)
    painter = {"line": lines, "bar": bars, "scatter": points, "interval": intervals}[figure.kind]
    painter(axes, figure, width)
    frame(axes, figure, width)
    if len(figure.series) > 1:
        columns = 4 if width >= WIDE else 2
        canvas.legend(loc="outside lower center", ncols=min(columns, len(figure.series)))
    if figure.kind == "scatter":
        label_points(canvas, axes, figure)
    return canvas


def look(figure: Figure) -> list[tuple[Series, str, str]]:
    """Every series with its colour and marker; the baseline is plain."""
    shades = itertools.cycle(zip(SERIES, MARKERS, strict=True))
    return [
        (series, MUTED, "") if series.baseline else (series, *next(shades))
        for series in figure.series
    ]


def lines(axes: Any, figure: Figure, width: int) -> None:
    dashes = itertools.cycle([(0, (5, 3)), (0, (1, 2)), (0, (8, 3, 1, 3))])
    for series, colour, marker in look(figure):
        style = next(dashes) if series.baseline else "-"
        order = 2 if series.baseline else 3
        axes.plot(
            series.x, series.y, color=colour, marker=marker or None, markersize=5,
            linestyle=style, label=series.name, zorder=order, markevery=max(1, len(series.x) // 10),
        )  # fmt: skip
        if series.low is not None and series.high is not None:
            axes.fill_between(
                series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0
            )


def bars(axes: Any, figure: Figure, width: int) -> None:
    names = list(dict.fromkeys(name for series in figure.series for name in series.x))
    place = {name: i for i, name in enumerate(names)}
    thick = 0.8 / len(figure.series)
    for i, (series, colour, _) in enumerate(look(figure)):
        at = [place[name] + (i - (len(figure.series) - 1) / 2) * thick for name in series.x]
        axes.bar(at, series.y, thick * 0.92, color=colour, label=series.name, zorder=3)
        if series.low is not None:
            axes.errorbar(
                at, series.y, yerr=arms(series), fmt="none", ecolor=INK, elinewidth=1.2, zorder=4
            )
    texts = [str(name) for name in names]
    crowded = sum(len(text) + 2 for text in texts) * 7.5 > width - 80
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(names)), texts, **turned)


def points(axes: Any, figure: Figure, width: int) -> None:
    for series, colour, marker in look(figure):
        axes.plot(
            series.x, series.y, linestyle="none", marker=marker or "s", markersize=7, color=colour,
            markeredgecolor=PAPER, label=series.name, zorder=3,
        )  # fmt: skip
        if series.low is not None:
            axes.errorbar(
                series.x, series.y, yerr=arms(series), fmt="none", ecolor=colour, elinewidth=1.2
            )
    axes.margins(x=0.12, y=0.1)


def label_points(canvas: Any, axes: Any, figure: Figure) -> None:
    """Names beside points, each at the first of some places where it covers nothing."""
    canvas.draw_without_rendering()  # settles the layout, and with it where points lie
    frame_box = axes.get_window_extent()
    named = [
        (axes.transData.transform((x, y)), str(text))
        for series in figure.series
        for x, y, text in zip(series.x, series.y, series.labels or [], strict=False)
    ]
    taken = [(x - 4, y - 4, x + 4, y + 4) for (x, y), _ in named]
    for (x, y), text in sorted(named, key=lambda item: -item[0][1]):
        wide, high = 6.1 * len(text), 12.0
        places = [
            (x + side if side > 0 else x + side - wide, y + up)
            for up in (-6, 6, -18, 18, -30, 30, -42, 42)
            for side in (8, -8)
        ]
        for left, bottom in places:
            box = (left, bottom, left + wide, bottom + high)
            inside = left >= frame_box.x0 and box[2] <= frame_box.x1 + 4
            if inside and not any(overlap(box, other) for other in taken):
                break
        else:
            continue  # no room: the table has it
        taken.append(box)
        axes.annotate(
            text, (left, bottom), xycoords="figure pixels", fontsize=10.5, zorder=4, va="bottom",
            annotation_clip=False,
        )  # fmt: skip
        if abs(bottom + 6 - y) > 8:  # set off: a thread back to its point
            end = (left if left > x else left + wide, bottom + high / 2)
            axes.annotate(
                "", (x, y), end, xycoords="figure pixels", textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 4},
            )  # fmt: skip


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def intervals(axes: Any, figure: Figure, width: int) -> None:
    names = list(dict.fromkeys(name for series in figure.series for name in series.x))
    place = {name: -i for i, name in enumerate(names)}
    step = 0.6 / max(len(figure.series), 1)
    for i, (series, colour, marker) in enumerate(look(figure)):
        at = [place[name] - (i - (len(figure.series) - 1) / 2) * step for name in series.x]
        error = None if series.low is None else arms(series)
        axes.errorbar(
            series.y, at, xerr=error, fmt=marker or "s", color=colour, markersize=6,
            elinewidth=2, label=series.name, zorder=3,
        )  # fmt: skip
    axes.set_yticks(list(place.values()), [str(name) for name in names])
    axes.set_ylim(-len(names) + 0.4, 0.6)


def arms(series: Series) -> np.ndarray:
    """Lengths of the two arms of every interval; a missing interval has none."""
    y = np.asarray(series.y, dtype=np.float64)
    both = np.array([y - np.asarray(series.low), np.asarray(series.high) - y], dtype=np.float64)
    return np.nan_to_num(np.maximum(both, 0))


def draw_panels(figure: Figure, width: int) -> Any:
    """Small multiples: a panel a series, each with the baseline behind it and shared axes."""
    from matplotlib.figure import Figure as Canvas

    baselines = [series for series in figure.series if series.baseline]
    others = [series for series in figure.series if not series.baseline]
    columns = 4 if width >= WIDE else 2
    rows = math.ceil(len(others) / columns)
    canvas = Canvas(figsize=(width / 72, (150 * rows + 50) / 72), dpi=72, layout="constrained")
    canvas.patch.set_alpha(0)
    grid = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, series in itertools.zip_longest(grid.flat, others):
        if series is None:
            axes.set_visible(False)
            continue
        axes.patch.set_alpha(0)
        lines(axes, Figure("line", "", series=[*baselines, series]), width)
        frame(axes, figure, width // columns, labels=False)
        axes.set_title(series.name, fontsize=12, loc="left")
        axes.tick_params(labelsize=10.5)
    below = [grid[(len(others) - 1 - c) // columns, c] for c in range(min(columns, len(others)))]
    for axes in below:  # the lowest panel of every column keeps its ticks
        axes.tick_params(labelbottom=True)
    canvas.supxlabel(figure.x_label, fontsize=12.5)
    canvas.supylabel(figure.y_label, fontsize=12.5)
    return canvas


def frame(axes: Any, figure: Figure, width: int, *, labels: bool = True) -> None:
    """Axes, scales, grid and reference line."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    lying = figure.kind == "interval"
    if labels:
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
    if figure.log_x:
        axes.set_xscale("log")
        marks = sorted({float(x) for series in figure.series for x in series.x})
        if figure.kind == "line" and len(marks) <= 7:  # the sizes themselves are the ticks
            axes.set_xticks(marks)
            axes.xaxis.set_minor_locator(NullLocator())
    if figure.log_y:
        axes.set_yscale("log")
    for axis, logarithmic in ((axes.xaxis, figure.log_x), (axes.yaxis, figure.log_y)):
        if logarithmic:
            low, high = axis.get_view_interval()
            if isinstance(axis.get_major_locator(), LogLocator) and high < 100 * low:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axis.set_minor_formatter(NullFormatter())
    if figure.reference is not None:
        rule = axes.axvline if lying else axes.axhline
        rule(figure.reference, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.grid(axis="x" if lying else "y", zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0 if lying else 3)
    if width < 300 and not figure.log_x:
        axes.locator_params(axis="x", nbins=4)


def short(value: float) -> str:
    """A count in the room of a tick.

    >>> short(96), short(960), short(9600), short(1.5e6)
    ('96', '960', '9.6k', '1.5M')
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
