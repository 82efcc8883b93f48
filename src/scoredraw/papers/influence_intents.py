"""The intents half of paper 02: CLINC150 sentence vectors, five scores, both ends.

A head 384-64-64-151 on the encoder's sentence vectors (151 classes: 150 intents and out of scope,
as the data has it). Each seed has three scoring runs; VoG (gradient at the sentence vector) and
TracIn (last layer) read ten checkpoints of one, EL2N and PVI the end of epoch 2 of all three,
forgetting a look every 50 updates at all three. The published splits; accuracy on in-scope test
requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.influence import (
    el2n,
    forgetting,
    label_log_probabilities,
    normalize_scores,
    pvi,
    variance_of_gradients,
)
from scoredraw.data_selection.selection import prune, similarity_index, stratified
from scoredraw.data_selection.tracin import last_layer_gradient_norms, tracin_self
from scoredraw.datasets import load
from scoredraw.errors import MissingExtraError
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers.sentence_embeddings import encode
from scoredraw.papers.training import MLPEnsemble, minibatches, rate, train_ensemble
from scoredraw.reports import Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import uniform

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BATCH, UPDATES, RATE = 64, 1500, 3e-3
RUNS, CHECKPOINTS, LOOK_EVERY, EARLY_EPOCH = 3, 10, 50, 2
SCORES = ("VoG", "EL2N", "forgetting", "TracIn", "PVI")


@dataclass(frozen=True)
class Scale:
    seeds: int
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Intents:
    train_x: NDArray[np.float32]
    train_y: Rows
    test_x: NDArray[np.float32]
    test_y: Rows
    out_of_scope: int


def add_to(report: Report, scale: Scale, rng: int) -> None:
    """Run the experiment and append what it finds, or a note that says why it was not run."""
    try:
        data = intents()
    except MissingExtraError as error:
        report.notes.append(f"The CLINC150 experiment was left out: {error}.")
        return
    scores = [score(data, rng, s) for s in range(scale.seeds)]
    raw = {f: retrain(data, scores, f, rng) for f in scale.fractions}
    full = train(data, [np.arange(len(data.train_y))] * scale.seeds, rng)
    report.claims.extend(claims(raw[0.45], scores))
    report.tables.extend(table(f, arms, full) for f, arms in raw.items())
    report.figures.extend(figure(side, raw) for side in ("easy", "hard"))
    report.notes.extend(notes(raw))


def intents() -> Intents:
    data = load("clinc150")
    assert data.texts is not None
    x = encode(data.texts)
    train, test = data.splits["train"], data.splits["test"]
    out = data.target_names.index("oos")
    return Intents(x[train], data.y[train], x[test], data.y[test], out)


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def score(data: Intents, rng: int, s: int) -> dict[str, Floats]:
    """Every score of one seed, all turned so that high means hard."""
    x, y, n = data.train_x, data.train_y, len(data.train_y)
    early = EARLY_EPOCH * -(-n // BATCH)
    evenly = np.linspace(0, UPDATES, CHECKPOINTS + 1).round().astype(int)[1:].tolist()
    gradients: list[NDArray[np.float32]] = []
    lengths: list[Floats] = []
    looks: list[NDArray[np.bool_]] = []
    early_logits: list[NDArray[np.float32]] = []

    def keep(step: int, ensemble: MLPEnsemble) -> None:
        logits = ensemble.logits(x)
        if step % LOOK_EVERY == 0:
            looks.append(logits.argmax(axis=-1) == y)
        if step == early:
            early_logits.append(logits)
        if step in evenly:
            gradients.append(ensemble.input_gradients(x, y)[0])
            lengths.append(last_layer_gradient_norms(logits[0], y, ensemble.hidden(x)[0]))

    everything = [np.arange(n)] * (-(-UPDATES // -(-n // BATCH)))
    tables = [minibatches(everything, BATCH, seed(rng, 11, s, r))[:UPDATES] for r in range(RUNS)]
    train_ensemble(
        x,
        y,
        np.stack(tables),
        n_classes=int(y.max()) + 1,
        learning_rate=RATE,
        seed=[seed(rng, 12, s, r) for r in range(RUNS)],
        checkpoint_steps=sorted({*evenly, early, *range(LOOK_EVERY, UPDATES + 1, LOOK_EVERY)}),
        on_checkpoint=keep,
    )
    prior = np.log(np.bincount(y) / n)[y]
    correct = np.stack(looks)
    vog = variance_of_gradients(gradients)
    # an update at step t is made with rate(t); the last checkpoint comes after the last update
    rates = [rate(RATE, step - 1, UPDATES) for step in evenly]
    counts = [forgetting(correct[:, r], never_learned="max")[0] for r in range(RUNS)]
    return {
        "VoG": normalize_scores(vog, y),
        "VoG by data set": normalize_scores(vog, by="dataset"),
        "EL2N": el2n(early_logits[0], y),
        "forgetting": np.asarray(np.mean(counts, axis=0)),
        "TracIn": tracin_self(np.square(lengths), rates),
        "PVI": -pvi(label_log_probabilities(early_logits[0], y), prior),
    }


# ── Pruning and retraining ───────────────────────────────────────────────────────────────────────


def retrain(
    data: Intents, scores: list[dict[str, Floats]], fraction: float, rng: int
) -> dict[str, Floats]:
    """In-scope test accuracy of each arm, (seeds,)."""
    n, seeds = len(data.train_y), len(scores)
    arms: dict[str, list[Rows]] = {"random": [], "stratified by intent": []}
    for s, of in enumerate(scores):
        own = seed(rng, 13, s)
        arms["random"].append(uniform(n, round((1 - fraction) * n), rng=own).indices)
        arms["stratified by intent"].append(stratified(data.train_y, fraction, rng=own).indices)
        for name in SCORES:
            for side in ("easy", "hard"):
                kept = prune(of[name], fraction, side=side, rng=own)
                arms.setdefault(f"{name} {side}", []).append(kept.indices)
        kept = prune(of["VoG by data set"], fraction, rng=own)
        arms.setdefault("VoG easy, by data set", []).append(kept.indices)
        for mode in ("linear", "softmax"):
            kept = prune(of["VoG"], fraction, mode=mode, rng=own)
            arms.setdefault(f"VoG, {mode} draw", []).append(kept.indices)
    accuracy = train(data, [rows for kept in arms.values() for rows in kept], rng, seeds)
    return dict(zip(arms, accuracy.reshape(len(arms), seeds), strict=True))


def train(data: Intents, kept: list[Rows], rng: int, seeds: int | None = None) -> Floats:
    """In-scope test accuracy of heads trained on each of `kept`, a few dozen at a time."""
    seeds = seeds or len(kept)
    inside = data.test_y != data.out_of_scope
    results = []
    for start in range(0, len(kept), 40):
        group = range(start, min(start + 40, len(kept)))
        tables = []
        for i in group:
            passes = -(-UPDATES // -(-len(kept[i]) // BATCH))
            table = minibatches([kept[i]] * passes, BATCH, seed(rng, 14, i % seeds))
            tables.append(table[:UPDATES])
        ensemble = train_ensemble(
            data.train_x,
            data.train_y,
            np.stack(tables),
            n_classes=int(data.train_y.max()) + 1,
            learning_rate=RATE,
            seed=[seed(rng, 15, i % seeds) for i in group],
        )
        results.append(ensemble.accuracy(data.test_x[inside], data.test_y[inside]))
    return np.concatenate(results)


def seed(*parts: int) -> int:
    """An independent 63-bit seed for each purpose, run and member."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ── Findings ─────────────────────────────────────────────────────────────────────────────────────


def claims(arms: dict[str, Floats], scores: list[dict[str, Floats]]) -> list[Claim]:
    """At 45 % pruned."""
    easy = paired_difference(arms["VoG easy"], arms["random"])
    el2n_easy = paired_difference(arms["EL2N easy"], arms["random"])
    hard = {
        name: paired_difference(arms[f"{name} hard"], arms["random"], comparisons=len(SCORES))
        for name in SCORES
    }
    worse = [name for name, gap in hard.items() if gap.high < 0]
    better = [name for name, gap in hard.items() if gap.low > 0]
    share = 0.05
    overlap = mean_interval(
        [
            similarity_index(*(prune(of[k], 1 - share, rng=0).indices for k in ("TracIn", "EL2N")))
            for of in scores
        ]
    )
    where = "CLINC150 sentence vectors, 45 % pruned"
    return [
        Claim.at_least(
            f"pruning VoG-easy is no worse than random ({where})",
            "SNLI: 85.04 of 85.52 %; in-house ΔDCER 5.48 against 6.04 at random, 52 % pruned",
            easy,
            0.0,
            "accuracy difference, paired by seed, at least 0",
        ),
        Claim.at_most(
            f"pruning EL2N-easy is no better than random ({where})",
            "EL2N beats random only up to 25 % pruned",
            el2n_easy,
            0.0,
            "accuracy difference, paired by seed, at most 0",
        ),
        Claim.judge(
            f"pruning hard is worse than random for nearly all scores ({where})",
            "worse than random for nearly all scores",
            f"worse: {', '.join(worse) or 'none'}; better: {', '.join(better) or 'none'}",
            "at least 4 of 5 scores worse (Bonferroni intervals); fails if fewer can be",
            len(worse) >= 4 if len(worse) >= 4 or len(better) >= 2 else None,
        ),
        Claim.at_least(
            "the hardest 5 % by TracIn and by EL2N overlap beyond chance (CLINC150)",
            "0.37, against 0.11 at random",
            overlap,
            0.11,
            "similarity index at least 0.11 (chance here: 0.05)",
        ),
    ]


def notes(raw: dict[float, dict[str, Floats]]) -> list[str]:
    """Where each score stands against random as more is pruned, and what differs from the paper."""
    gaps = {
        name: "; ".join(
            f"{paired_difference(arms[f'{name} easy'], arms['random'])} at {fraction:.0%}"
            for fraction, arms in raw.items()
        )
        for name in SCORES
    }
    return [
        (
            "CLINC150, dropping the easy end, accuracy minus random. "
            + " ".join(f"{name}: {gap}." for name, gap in gaps.items())
        ),
        (
            "CLINC150 has 100 requests an intent where SNLI has 180,000 sentence pairs a class, "
            "and the encoder stays frozen, so there is less to spare than in the paper."
        ),
        (
            "CLINC150's strata are the intents; which of the ten domains an intent belongs to is "
            f"not in the data. Every arm has the same number of updates, {UPDATES:,}."
        ),
    ]


def table(fraction: float, arms: dict[str, Floats], full: Floats) -> ReportTable:
    rows: list[list[object]] = [["all data", mean_interval(full), None]]
    for arm, values in arms.items():
        gap = None if arm == "random" else paired_difference(values, arms["random"])
        rows.append([arm, mean_interval(values), gap])
    return ReportTable(
        f"CLINC150, {fraction:.0%} pruned",
        ["kept", "in-scope accuracy", "minus random"],
        rows,  # type: ignore[arg-type]
        "'easy' and 'hard' name the end that was dropped; for PVI easy is the high end.",
    )


def figure(side: str, raw: dict[float, dict[str, Floats]]) -> Figure:
    series = []
    for arm in ["random", *(f"{name} {side}" for name in SCORES)]:
        points = [mean_interval(arms[arm]) for arms in raw.values()]
        series.append(
            Series(
                arm,
                [100 * fraction for fraction in raw],
                [p.value for p in points],
                [p.low for p in points],
                [p.high for p in points],
                baseline=arm == "random",
            )
        )
    return Figure(
        "line",
        f"CLINC150: pruning {side} requests",
        "pruned, %",
        "in-scope accuracy",
        series,
        caption="95 % intervals over seeds; every arm has the same number of updates.",
    )
