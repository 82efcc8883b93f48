"""Compare ways of choosing one of the sampled answers: which is worth it, against any sample.

All methods see the same samples of the same problems. A method's accuracy with k samples to choose
from is an average over k-subsets of the n at hand, exact where there is a closed form; its gain is
taken problem by problem over a sample chosen uniformly. The oracle, which a perfect verifier would
be, stands beside them as the ceiling.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from scoredraw import registry
from scoredraw.answers import Equal
from scoredraw.bakeoff.comparison import Entry, listing, places, verdicts
from scoredraw.bakeoff.contenders import BASELINE
from scoredraw.bakeoff.display import capital
from scoredraw.bakeoff.rows import Progress
from scoredraw.calibration import brier_score
from scoredraw.errors import InputError, require
from scoredraw.language.answer_calibration import CalibrationCurve, calibration_at_k
from scoredraw.language.selection import METHODS
from scoredraw.language.selection_curves import SelectionCurve, accuracy_at_k
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.pages import Page
from scoredraw.reports import Figure, ReportTable, Series, plain, stamp
from scoredraw.samples import Samples, read_samples

CEILING = "oracle"
CALIBRATED = 20  # random subsets whose confidences are judged


@dataclass(frozen=True, eq=False)
class AnswerComparison:
    """Every method at every k, against a sample chosen uniformly.

    curves: method -> accuracy at `ks`, with a value a problem; seconds: of each method.
    calibration: method -> its confidences at `ks`, of those methods that have any.
    """

    samples: Samples = field(repr=False)
    protocol: dict[str, Any]
    curves: dict[str, SelectionCurve] = field(repr=False)
    seconds: dict[str, float]
    calibration: dict[str, CalibrationCurve] = field(default_factory=dict, repr=False)

    @property
    def methods(self) -> list[str]:
        """The methods compared, the ceiling aside."""
        return [name for name in self.curves if name != CEILING]

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every method at every k above one; at k = 1 there is nothing to choose."""
        return tuple(
            self._entry(method, j)
            for method in self.methods
            for j in range(len(self.protocol["ks"]))
        )

    def _entry(self, method: str, j: int) -> Entry:
        k = self.protocol["ks"][j]
        comparisons = (len(self.methods) - 1) * len(self.protocol["ks"])
        values = self.curves[method].per_problem[:, j]
        base = self.curves[BASELINE].per_problem[:, j]
        gain = paired_difference(values, base, comparisons=max(comparisons, 1))
        seconds = self.seconds[method]
        return Entry(method, f"k = {k}", k, mean_interval(values), gain, None, seconds)

    def of(self, method: str) -> list[Entry]:
        """A method's entries by k."""
        return [entry for entry in self.entries if entry.method == method]

    @cached_property
    def ranking(self) -> list[str]:
        """Methods by their accuracy at the largest k."""
        return sorted(self.methods, key=lambda m: -self.of(m)[-1].value.value)

    @cached_property
    def ceiling(self) -> list[Estimate]:
        """Coverage at each k: what a perfect verifier would reach."""
        return [mean_interval(column) for column in self.curves[CEILING].per_problem.T]

    @property
    def answer(self) -> str:
        """Which way of choosing is worth it, in a few sentences."""
        best, last = self.of(self.ranking[0])[-1], self.ceiling[-1]
        one = self.of(BASELINE)[-1].value.value
        k = best.rows
        if any(entry.verdict == "beats" for entry in self.entries):
            where: dict[str, list[str]] = {}
            for name in self.ranking:
                if won := places(self.of(name), "beats", "k"):
                    where.setdefault(won, []).append(name)
            parts = [f"{listing(names)} {won}" for won, names in where.items()]
            first = f"Better than a sample chosen uniformly: {'; '.join(parts)}."
        else:
            first = f"Nothing beats a sample chosen uniformly on {self.samples.name}."
        losers = [m for m in self.ranking if all(e.verdict == "worse" for e in self.of(m))]
        worse = f" {capital(listing(losers))}: worse at every k." if losers else ""
        return (
            f"{first}{worse} With {k} samples the best choice is {best.method}: right on "
            f"{100 * best.value.value:.1f} % of the problems, where one sample is right on "
            f"{100 * one:.1f} % and some sample on {100 * last.value:.1f} %."
        )

    @property
    def notes(self) -> list[str]:
        """How it was done."""
        random = [m for m in self.methods if "Monte Carlo" in self.curves[m].how]
        counts = self.samples.counts
        known = [
            (
                f"{len(self.samples):,} problems, {_span(counts)} samples each; accuracy with k "
                "samples is the average over the k-subsets of them."
            ),
            (
                "Gains are paired by problem; their t intervals hold together with 95 % "
                "(Bonferroni). They speak of other problems of the kind, not of another model."
            ),
            (
                "Ties share: the chance of submitting each tied answer counts. A sample without an "
                "answer is never submitted by a method that chooses."
            ),
        ]
        if random:
            repeats = self.protocol["repeats"]
            known.append(
                f"{listing(random)}: {repeats} random subsets where there are more than 100,000, "
                "all of them otherwise; the rest is exact."
            )
        if self.calibration:
            known.append(
                "Calibration: what a method says of its own choice, against the credit it earns; "
                f"means over {CALIBRATED} random subsets. 0 is best for both numbers; the Brier "
                "score also falls with accuracy."
            )
        if self.samples.answers is None:
            known.append("The samples have no answers, so nothing can be put to the vote.")
        return known

    def to_json(self) -> str:
        """One strict JSON object."""
        keys = ("method", "rows", "value", "gain", "verdict", "seconds")
        board = [{key: getattr(entry, key) for key in keys} for entry in self.entries]
        for row in board:
            row["k"] = row.pop("rows")
        found = {
            "data": self.samples.name,
            "problems": len(self.samples),
            "answer": self.answer,
            "leaderboard": board,
            "calibration": {
                name: {"k": curve.k.tolist(), "ece": curve.ece.tolist(), "brier": brier(curve)}
                for name, curve in self.calibration.items()
            },
            "coverage": dict(zip(map(str, self.protocol["ks"]), self.ceiling, strict=True)),
            "protocol": self.protocol,
            "notes": self.notes,
            "environment": stamp(),
        }
        return json.dumps(plain(found), indent=2, allow_nan=False, ensure_ascii=False)

    def tables(self) -> list[ReportTable]:
        """Gains over a uniform sample, and what every method reaches, both in percent."""
        heads = [entry.size for entry in self.of(BASELINE)]
        gains: list[list[Any]] = [
            [m, verdicts(self.of(m), "k"), *(percent(entry.gain) for entry in self.of(m))]
            for m in self.ranking
            if m != BASELINE
        ]
        values: list[list[Any]] = [
            [m, *(percent(entry.value) for entry in self.of(m))] for m in self.ranking
        ]
        values.append(["some sample is right", *map(percent, self.ceiling)])
        found = [
            ReportTable(
                "Gain in accuracy over a sample chosen uniformly, percentage points",
                ["method", "against uniform", *heads],
                gains,
                "Ordered by accuracy at the largest k. All intervals hold together (Bonferroni).",
            ),
            ReportTable("Accuracy, %", ["method", *heads], values, "95 % t intervals."),
        ]
        if self.calibration:
            sure: list[list[Any]] = [
                [m, *(f"{100 * e:.1f} · {b:.3f}" for e, b in zip(c.ece, c.brier, strict=True))]
                for m in self.ranking
                if (c := self.calibration.get(m)) is not None
            ]
            found.append(
                ReportTable(
                    "Calibration: expected calibration error, % · Brier score",
                    ["method", *heads],
                    sure,
                    "Whether a confidence can be believed, whatever the accuracy.",
                )
            )
        return found

    def page(self) -> Page:
        """The report as a self-contained HTML page."""
        ks = self.protocol["ks"]
        lines = [
            Series(m, ks, *_bounds([percent(e.value) for e in self.of(m)]), baseline=m == BASELINE)
            for m in [BASELINE, *(m for m in self.ranking if m != BASELINE)]
        ]
        lines.append(Series("some sample is right", ks, *_bounds(map(percent, self.ceiling))))
        rivals = [m for m in self.ranking if m != BASELINE]
        gains = [percent(self.of(m)[-1].gain) for m in rivals]
        figures = [
            Figure(
                "line", "Accuracy against the samples to choose from", "samples k", "accuracy, %",
                lines, log_x=True,
                caption="The gap to the top line is what a perfect verifier would add.",
            ),
            Figure(
                "interval", f"Gain over a uniform sample at k = {ks[-1]}", "percentage points",
                series=[Series(f"k = {ks[-1]}", rivals, *_bounds(gains))], reference=0.0,
                caption="Right of the line is better. All intervals hold together.",
            ),
        ]  # fmt: skip
        if self.calibration:
            sure = [Series(m, ks, *_bounds(brier(curve))) for m, curve in self.calibration.items()]
            figures.append(
                Figure(
                    "line", "Calibration against the samples to choose from", "samples k",
                    "Brier score of the confidence", sure, log_x=True,
                    caption="Lower is better. 95 % t intervals over problems.",
                )
            )  # fmt: skip
        return Page(
            title="Which answer should be submitted?",
            kicker=f"scoredraw compare answers · {self.samples.name}",
            answer=self.answer,
            tables=self.tables(),
            figures=figures,
            notes=self.notes,
            provenance={
                "data": self.samples.name,
                "methods": ", ".join(self.protocol["methods"]),
                "k": ", ".join(map(str, ks)),
                "repeats": self.protocol["repeats"],
                "seed": self.protocol["seed"],
                **stamp(),
            },
        )


def compare_answers(
    source: Any,
    methods: str | Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    *,
    columns: dict[str, str] | None = None,
    equal: Equal | None = None,
    repeats: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnswerComparison:
    """Compare ways of choosing one answer of k sampled ones, on the samples of a table.

    source, columns: as in `samples.read_samples`. methods: names of `registry.methods("answers")`
    (all that the columns allow); a uniform sample is always among them. ks: numbers of samples
    to choose from, by default 2, 4, 8, ... and the smallest n. equal: an equality of answers.
    repeats: random subsets where a method has no closed form and there are too many to list.
    Raises InputError for unknown methods, those whose columns are missing, samples with nothing to
    choose by, and k that is below 2 or above n.

    >>> found = compare_answers("gsm8k-solutions", "majority")
    >>> found.ranking
    ['majority', 'uniform']
    >>> print(found.of("majority")[-1].gain)
    0.103 [0.090, 0.115]
    """
    samples = read_samples(source, columns)
    require(repeats >= 2, "repeats", repeats, "at least 2")
    n = int(samples.counts.min())
    require(n >= 2, "input", "a problem with one sample", "two or more samples of every problem")
    sizes = sorted({*(2**i for i in range(1, n.bit_length()) if 2**i <= n), n} if ks is None
                   else {int(k) for k in ks})  # fmt: skip
    fits = bool(sizes) and sizes[0] >= 2 and sizes[-1] <= n
    require(fits, "k", f"{sizes}", f"from 2 to {n}, the samples of every problem")
    names = _named(methods, samples)
    pools = list(samples.pools(equal=equal))
    grades = np.split(samples.grades.astype(np.float64), samples.offsets[1:-1])
    credit = [np.where(pool.null, 0.0, grade) for pool, grade in zip(pools, grades, strict=True)]
    curves, seconds, calibration = {}, {}, {}
    for i, name in enumerate(names):
        started = time.perf_counter()
        entry = registry.method("answers", BASELINE if name == CEILING else name)
        rule = _key(name) or registry.resolve(entry.function, entry.extra)
        curves[name] = accuracy_at_k(pools, credit, sizes, rule, repeats=repeats, rng=seed)
        seconds[name] = time.perf_counter() - started
        if entry.confidence:
            calibration[name] = calibration_at_k(
                pools, credit, sizes, entry.confidence, repeats=CALIBRATED, rng=seed
            )
        if progress is not None:
            progress("methods", i + 1, len(names))
    protocol = {"methods": names[:-1], "ks": sizes, "repeats": repeats, "seed": seed}
    return AnswerComparison(samples, protocol, curves, seconds, calibration)


def _named(methods: str | Sequence[str] | None, samples: Samples) -> list[str]:
    """The names asked for, uniform first and the ceiling last; InputError for what cannot be."""
    if methods is None:
        asked = [m.name for m in registry.methods("answers") if not samples.lacks(m.needs)]
    else:
        given = methods.split(",") if isinstance(methods, str) else methods
        asked = [name.strip() for name in given if name.strip()]
    for name in asked:
        lacks = samples.lacks(registry.method("answers", name).needs)
        if lacks:
            had = f"{name!r} for samples without {listing(lacks)}"
            raise InputError(f"methods: got {had}, want such a column")
    rivals = [name for name in dict.fromkeys(asked) if name != BASELINE]
    wanted = "a column of answers, rewards or log-probabilities (with tokens), and a method for it"
    require(bool(rivals), "input", "nothing to choose by", wanted)
    return [BASELINE, *rivals, CEILING]


def _key(name: str) -> str | None:
    """What `selection.METHODS` calls the method; None for one that is a selector of its own."""
    key = name.replace("-", "_")
    return key if key in METHODS else None


def brier(curve: CalibrationCurve) -> list[Estimate]:
    """The Brier score at each k, with its interval over problems."""
    pairs = zip(curve.confidence, curve.credit, strict=True)
    return [mean_interval(brier_score(c.T, a.T)) for c, a in pairs]


def percent(estimate: Estimate) -> Estimate:
    """The same estimate in percent."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.n)


def _bounds(estimates: Any) -> tuple[list[float], list[float], list[float]]:
    each = list(estimates)
    return [e.value for e in each], [e.low for e in each], [e.high for e in each]


def _span(counts: Any) -> str:
    low, high = int(np.min(counts)), int(np.max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
