"""Influence scores at scale: which examples may be left out (arXiv:2311.16298).

Two experiments. *Digits*: a small network is trained on all of the data, its checkpoints and five
short runs give the scores, an end of each score is pruned, and a new network is trained on the
rest with as many updates as before. With clean labels at three budgets of updates, and with a
fifth of the labels wrong. *Intents* (full scale): the requests to a voice assistant of CLINC150
as sentence vectors, all five scores, both ends, three fractions.

Everything is paired by seed: the arms of a seed share the scoring runs, the wrong labels and the
initial weights, and differ in the rows they keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.influence import el2n, normalize_scores, variance_of_gradients
from scoredraw.data_selection.selection import prune, relative_efficiency, similarity_index
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import influence_intents
from scoredraw.papers.training import (
    DigitsSplit,
    MLPEnsemble,
    digits_split,
    minibatches,
    train_ensemble,
)
from scoredraw.reports import Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import uniform

Accuracies = Mapping[str, NDArray[np.float64]]  # arm -> (seeds,)
Rows = NDArray[np.int64]

BATCH = 32
EARLY_EPOCH, EARLY_RUNS = 3, 5  # EL2N: the mean of five other runs, at the end of epoch 3
CHECKPOINTS = 10
ARMS = ("random", "VoG easy", "VoG hard", "VoG easy, by data set", "EL2N easy", "EL2N hard")


@dataclass(frozen=True)
class Scale:
    """How much is run. `noisy` is the budget of the runs with wrong labels."""

    seeds: int
    budgets: tuple[int, ...]
    fractions: tuple[float, ...]
    noisy: int
    intents: influence_intents.Scale | None = None


SCALES = {
    "smoke": Scale(2, (40,), (0.45,), 40),
    "quick": Scale(5, (680, 3400), (0.45, 0.7), 680),
    "full": Scale(
        20, (680, 1360, 3400), (0.45, 0.7), 680, influence_intents.Scale(10, (0.25, 0.45, 0.65))
    ),
    "study": Scale(
        100,
        (340, 680, 1360, 3400, 6800),
        (0.15, 0.3, 0.45, 0.7),
        680,
        influence_intents.Scale(30, (0.1, 0.25, 0.45, 0.65)),
    ),
}


class Scores(NamedTuple):
    """Each (seeds, n); `full` (seeds,) is the accuracy of the runs they were taken from."""

    by_class: NDArray[np.float64]
    by_dataset: NDArray[np.float64]
    el2n: NDArray[np.float64]
    full: NDArray[np.float64]


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    settings = SCALES[scale]
    data = digits_split()
    tables: list[ReportTable] = []
    differences: list[tuple[int, Accuracies]] = []
    claims: list[Claim] = []
    clean = np.tile(data.train_y, (settings.seeds, 1))
    for budget in settings.budgets:
        scores = score(data, clean, budget, rng)
        for fraction in settings.fractions:
            accuracies = retrain(data, clean, scores, fraction, budget, rng)
            tables.append(table(f"clean labels, {budget} updates", fraction, accuracies, scores))
            if fraction == 0.45:
                differences.append((budget, accuracies))
    claims += clean_claims(differences[0], differences[-1])
    noisy_claims, noisy_tables, noisy = noise(data, settings, rng)
    claims, tables = claims + noisy_claims, tables + noisy_tables
    report = Report(
        paper=2,
        scale=scale,
        seed=rng,
        claims=claims,
        tables=tables,
        figures=[budget_figure(differences)],
        notes=notes(differences, noisy),
        title="Influence scores at scale",
    )
    if settings.intents is not None:
        influence_intents.add_to(report, settings.intents, rng)
    return report


# ── Scoring and retraining ───────────────────────────────────────────────────────────────────────


def score(data: DigitsSplit, labels: Rows, budget: int, rng: int) -> Scores:
    """VoG from ten checkpoints of each seed's full run, EL2N from five other short runs."""
    seeds, n = labels.shape
    everything = np.arange(n)
    gradients: list[NDArray[np.float32]] = []

    def keep(_step: int, ensemble: MLPEnsemble) -> None:
        gradients.append(ensemble.input_gradients(data.train_x, labels).reshape(seeds * n, -1))

    steps = np.linspace(0, budget, CHECKPOINTS + 1).round().astype(int)[1:]
    full = train_ensemble(
        data.train_x,
        labels,
        np.stack([batches(everything, budget, seed(rng, 1, s)) for s in range(seeds)]),
        n_classes=10,
        seed=[seed(rng, 2, s) for s in range(seeds)],
        checkpoint_steps=steps.tolist(),
        on_checkpoint=keep,
    )
    vog = variance_of_gradients(gradients).reshape(seeds, n)
    early = [(s, r) for s in range(seeds) for r in range(EARLY_RUNS)]
    short = train_ensemble(
        data.train_x,
        np.repeat(labels, EARLY_RUNS, axis=0),
        np.stack([minibatches([everything] * EARLY_EPOCH, BATCH, seed(rng, 3, *k)) for k in early]),
        n_classes=10,
        schedule="constant",  # what a cosine over a whole run still is after three epochs
        seed=[seed(rng, 4, *k) for k in early],
    )
    logits = short.logits(data.train_x).reshape(seeds, EARLY_RUNS, n, 10)
    return Scores(
        np.stack([normalize_scores(v, y) for v, y in zip(vog, labels, strict=True)]),
        np.stack([normalize_scores(v, by="dataset") for v in vog]),
        np.stack([el2n(f, y) for f, y in zip(logits, labels, strict=True)]),
        full.accuracy(data.test_x, data.test_y),
    )


def retrain(
    data: DigitsSplit, labels: Rows, scores: Scores, fraction: float, budget: int, rng: int
) -> dict[str, NDArray[np.float64]]:
    """Accuracy of networks trained on what each arm keeps, all with `budget` updates."""
    seeds = len(labels)
    kept = [
        keep_rows(arm, scores, s, fraction, seed(rng, 5, s)) for arm in ARMS for s in range(seeds)
    ]
    tables = [batches(rows, budget, seed(rng, 6, i % seeds)) for i, rows in enumerate(kept)]
    ensemble = train_ensemble(
        data.train_x,
        np.tile(labels, (len(ARMS), 1)),
        np.stack(tables),
        n_classes=10,
        seed=[seed(rng, 7, s) for _ in ARMS for s in range(seeds)],
    )
    accuracy = ensemble.accuracy(data.test_x, data.test_y).reshape(len(ARMS), seeds)
    return dict(zip(ARMS, accuracy, strict=True))


def keep_rows(arm: str, scores: Scores, s: int, fraction: float, rng: int) -> Rows:
    n = scores.el2n.shape[1]
    if arm == "random":
        return uniform(n, round((1 - fraction) * n), rng=rng).indices
    values = scores.el2n if arm.startswith("EL2N") else scores.by_class
    values = scores.by_dataset if arm.endswith("data set") else values
    side = "hard" if "hard" in arm else "easy"
    return prune(values[s], fraction, side=side, rng=rng).indices  # type: ignore[arg-type]


def batches(rows: Rows, budget: int, rng: int) -> Rows:
    """Exactly `budget` batches: as many shuffled passes as that takes."""
    passes = -(-budget // -(-len(rows) // BATCH))
    return minibatches([rows] * passes, BATCH, rng)[:budget]


def seed(*parts: int) -> int:
    """An independent 63-bit seed for each purpose, run and member."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ── What the paper claims ────────────────────────────────────────────────────────────────────────


def clean_claims(short: tuple[int, Accuracies], long: tuple[int, Accuracies]) -> list[Claim]:
    """At the longest budget, and class against data-set normalisation at the shortest."""
    budget, arms = long
    where = f"45 % of clean digits pruned, {budget} updates"
    easy = paired_difference(arms["VoG easy"], arms["random"])
    hard = paired_difference(arms["VoG hard"], arms["random"])
    low_budget, low = short
    norm = paired_difference(low["VoG easy"], low["VoG easy, by data set"])
    return [
        Claim.at_least(
            f"pruning VoG-easy is no worse than random ({where})",
            "SNLI, 45 % pruned: VoG-easy keeps 85.04 of 85.52 %, above random",
            easy,
            0.0,
            "accuracy difference, paired by seed, at least 0",
        ),
        Claim.at_most(
            f"pruning VoG-hard is worse than random ({where})",
            "pruning hard examples is worse than random for nearly all scores",
            hard,
            -0.005,
            "accuracy difference, paired by seed, below -0.005",
        ),
        Claim.at_least(
            f"VoG normalised by class beats by data set (45 %, {low_budget} updates)",
            "SNLI, 45 % pruned: 85.04 ± 0.20 by class, 84.60 ± 1.50 by data set",
            norm,
            0.0,
            "accuracy difference, paired by seed, at least 0",
        ),
    ]


def noise(
    data: DigitsSplit, settings: Scale, rng: int
) -> tuple[list[Claim], list[ReportTable], Accuracies]:
    """Wrong labels: can a score find them, and what does pruning do to them?"""
    share, budget = 0.2, settings.noisy
    labels, wrong = flip(data.train_y, share, settings.seeds, rng)
    scores = score(data, labels, budget, rng)
    accuracies = retrain(data, labels, scores, 0.45, budget, rng)
    title = f"20 % wrong labels, {budget} updates"
    found = {
        name: mean_interval([auc(v, w) for v, w in zip(values, wrong, strict=True)])
        for name, values in (("VoG", scores.by_class), ("EL2N", scores.el2n))
    }
    overlap = {
        name: mean_interval([hardest_overlap(v, w) for v, w in zip(values, wrong, strict=True)])
        for name, values in (("VoG", scores.by_class), ("EL2N", scores.el2n))
    }
    detection = ReportTable(
        title,
        ["score", "AUC for wrong labels", "hardest fifth that is wrong", "by chance"],
        [[name, found[name], overlap[name], share] for name in found],
        "AUC 0.5 and an overlap equal to the share of wrong labels are what chance gives.",
    )
    claims = [
        Claim.within(
            "VoG does not find wrong labels",
            "30 % noise: overlap of VoG-hard with flipped labels 0.11, as at random",
            found["VoG"],
            0.4,
            0.6,
            "AUC between .4 and .6",
        ),
        Claim.at_least("early EL2N finds wrong labels", "-", found["EL2N"], 0.95, "AUC above .95"),
    ]
    return claims, [table(title, 0.45, accuracies, scores), detection], accuracies


def flip(y: Rows, share: float, seeds: int, rng: int) -> tuple[Rows, NDArray[np.bool_]]:
    """Move a share of the labels to another class: (seeds, n) labels and which are wrong."""
    labels = np.tile(y, (seeds, 1))
    wrong = np.zeros(labels.shape, dtype=bool)
    for s in range(seeds):
        random = np.random.default_rng(seed(rng, 8, s))
        rows = random.choice(len(y), size=round(share * len(y)), replace=False)
        labels[s, rows] = (y[rows] + random.integers(1, 10, size=len(rows))) % 10
        wrong[s, rows] = True
    return labels, wrong


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The chance that a positive scores above a negative (ties half)."""
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    k = int(positive.sum())
    return float((ranks[positive].sum() - k * (k + 1) / 2) / (k * (len(scores) - k)))


def hardest_overlap(scores: NDArray[np.float64], wrong: NDArray[np.bool_]) -> float:
    hardest = prune(scores, 1 - wrong.mean(), rng=0).indices
    return similarity_index(hardest, np.flatnonzero(wrong))


# ── Tables and figures ───────────────────────────────────────────────────────────────────────────


def table(title: str, fraction: float, accuracies: Accuracies, scores: Scores) -> ReportTable:
    """Each arm's accuracy, its paired distance to random, and error per data lost."""
    full = mean_interval(scores.full)
    rows: list[list[Estimate | float | str | None]] = [["all data", full, None, None]]
    for arm, values in accuracies.items():
        error, full_error = 1 - float(values.mean()), 1 - full.value
        lost = None
        if full_error > 0:
            lost = round(relative_efficiency(error, full_error, 1 - fraction, 1.0), 2)
        gap = None if arm == "random" else paired_difference(values, accuracies["random"])
        rows.append([arm, mean_interval(values), gap, lost])
    return ReportTable(
        f"Digits, {fraction:.0%} pruned, {title}",
        ["kept", "test accuracy", "minus random", "σ_ER"],
        [list(row) for row in rows],
        "σ_ER: relative rise of the error over the relative loss of data; nearer 0 is better.",
    )


def budget_figure(differences: list[tuple[int, Accuracies]]) -> Figure:
    """How the answer turns with the number of updates."""
    series = []
    for arm in ARMS[1:]:
        gaps = [paired_difference(arms[arm], arms["random"]) for _, arms in differences]
        series.append(
            Series(
                arm,
                [budget for budget, _ in differences],
                [gap.value for gap in gaps],
                [gap.low for gap in gaps],
                [gap.high for gap in gaps],
            )
        )
    return Figure(
        "line",
        "Accuracy minus random, 45 % of clean digits pruned",
        "updates",
        "accuracy difference",
        series,
        log_x=True,
        caption="Intervals are 95 %, paired by seed.",
    )


def notes(differences: list[tuple[int, Accuracies]], noisy: Accuracies) -> list[str]:
    """What was measured, in words."""
    gaps = [
        f"{paired_difference(arms['VoG easy'], arms['random'])} at {budget} updates"
        for budget, arms in differences
    ]
    budget, clean = differences[-1]
    found = paired_difference(clean["EL2N easy"], clean["VoG easy"])
    wrong = paired_difference(noisy["EL2N easy"], noisy["VoG easy"])
    return [
        (
            "The number of updates decides what a pruning fraction means. VoG-easy minus random, "
            f"45 % of clean digits pruned: {'; '.join(gaps)}."
        ),
        (
            f"EL2N-easy minus VoG-easy at 45 %: {found} with clean labels and {budget} updates; "
            f"{wrong} with a fifth of the labels wrong, when the examples that EL2N keeps are "
            "mostly the wrong ones."
        ),
        (
            "EL2N comes from short runs at a constant rate; over three epochs a cosine over the "
            "whole budget is nearly that."
        ),
    ]
