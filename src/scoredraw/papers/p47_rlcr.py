"""RLCR: a reward for being right, and a proper score for saying how likely that is.

*The theorem*: which confidence pays, and for which scores and weights it pays to be wrong on
purpose. *Digits half hidden* (`digit_confidence`): a policy that answers and states a confidence is
trained with accuracy alone (RLVR), with RLCR and with other scores, from a start that is too sure
of itself, a better one and a random one; rivals get their confidence after the fact. *Test time*:
confidences as votes, and averaged. *Released evaluations*: the published metrics of three sets are
computed again from every question. *Study*: the rewards train a language model besides
(`confidence_study`).

Damani et al., "Beyond binary rewards: training LMs to reason about their uncertainty", 2025, arXiv
2507.16806.
"""

from __future__ import annotations

import csv
import gzip
import math
import warnings
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from scoredraw.answers import group_answers
from scoredraw.calibration import PROPER_SCORES, expected_calibration_error, reliability
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, paired_difference
from scoredraw.papers.digit_confidence import (
    LEVELS,
    Half,
    Policies,
    Visits,
    fit_judge,
    halves,
    judged,
    reinforce,
    say,
    teach,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.calibrated_reward import (
    calibrated_reward,
    calibration_report,
    expected_reward,
    largest_lam,
    wrong_on_purpose,
)
from scoredraw.rl.verbal_confidence import VOTES, vote_in_rows

Float = NDArray[np.float64]
Outcome = dict[str, Float]  # metric -> (seeds,)

METRICS = ("acc", "brier", "ece", "auroc")
METHODS = ("Base", "RLVR", "RLVR-Classifier", "Answer-Prob", "RLCR")
# accuracy, Brier, ECE, AUROC of the released models that were trained on HotpotQA
_CELLS = {
    "math-500": (
        (0.468, 0.4845, 0.4921, 0.5910), (0.386, 0.6104, 0.6112, 0.5023),
        (0.386, 0.2601, 0.2236, 0.7037), (0.386, 0.5095, 0.5467, 0.7856),
        (0.454, 0.2514, 0.1879, 0.7157),
    ),
    "gpqa": (
        (0.395, 0.5035, 0.5094, 0.4920), (0.395, 0.6049, 0.6049, 0.5),
        (0.395, 0.2786, 0.1608, 0.5229), (0.395, 0.5375, 0.5439, 0.5264),
        (0.415, 0.2667, 0.1550, 0.5497),
    ),
    "commonsenseqa": (
        (0.886, 0.0987, 0.0037, 0.6205), (0.908, 0.0917, 0.0917, 0.5),
        (0.908, 0.1184, 0.1827, 0.6533), (0.908, 0.0826, 0.0311, 0.6034),
        (0.913, 0.1673, 0.3024, 0.7280),
    ),
}  # fmt: skip
HOTPOT = (
    (0.397, 0.525, 0.535, 0.540), (0.630, 0.370, 0.370, 0.5), (0.630, 0.217, 0.070, 0.664),
    (0.630, 0.357, 0.360, 0.715), (0.621, 0.210, 0.030, 0.687),
)  # fmt: skip
PUBLISHED = {name: dict(zip(METHODS, rows, strict=True)) for name, rows in _CELLS.items()}

BASE, RLVR, RLCR = "base", "RLVR", "RLCR"
SPHERICAL, LOG, ALONE = "RLCR, spherical score", "log score, clipped at .001", "Brier score alone"
CONSTANT, CHANCE = "RLVR + its accuracy, always", "RLVR + probability of the answer"
HEAD, PROBE = "RLVR + head fitted by BCE", "RLVR + probe fitted by BCE"
FINE = np.linspace(0, 1, 201)  # confidences that the theorem is tried with
FEW = (RLVR, RLCR, LOG, ALONE)  # the arms of other starts
BETTER_RATE = 1e-2  # of teaching, so that a sampled answer is right more often than not


@dataclass(frozen=True)
class Plan:
    seeds: int
    steps: int
    random_steps: int
    visits: int = 2
    votes: int = 16


PLANS = {
    "smoke": Plan(2, 15, 20, 1, 4),
    "quick": Plan(5, 500, 800),
    "full": Plan(16, 500, 800),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(paper=47, scale=scale, seed=rng, title="RLCR: rewards for calibrated answers")
    add_theorem(report)
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="auroc")  # Brier alone may get none right
        add_digits(report, plan, rng)
    add_released(report)
    if scale == "study":
        from scoredraw.papers.confidence_study import add_confidence_study

        add_confidence_study(report, rng)
    return report


# ── the theorem ─────────────────────────────────────────────────────────────────────────────────


def add_theorem(report: Report) -> None:
    p = np.linspace(0, 1, 1001)
    best = FINE[expected_reward(p[:, None], FINE).argmax(axis=1)]
    away = float(np.abs(best - p).max())
    square = float(np.abs(expected_reward(p, p) - p**2).max())
    says = "the best policy answers what is likeliest and states its probability"
    step = FINE[1]
    report.claims.extend([
        Claim.at_most("the confidence that pays most is the probability", says, away,
                      step / 2 + 1e-9, "largest |q - p| at most half the grid's step"),
        Claim.at_most("the best expected reward is p²", says, square, 1e-12,
                      "largest |V - p²| at most 1e-12"),
        Claim.at_least("largest weight of the Brier score", "weight 1", largest_lam("brier"), 1.0),
        Claim.within("log score: V falls below", "an unbounded score can break the theorem",
                     wrong_on_purpose("log").falls_below, *around(1 / (1 + math.e)),
                     "1/(1 + e), to 1e-9"),
        Claim.within("Brier with weight 2: V falls below", "weight 1",
                     wrong_on_purpose("brier", 2.0).falls_below, *around(0.25), "1/4, to 1e-9"),
    ])  # fmt: skip
    rows: list[list[Cell]] = []
    series = []
    cases = [(score, lam, 1.0) for score in PROPER_SCORES for lam in (1.0, 2.0)]
    for score, lam, accuracy in [*cases, ("brier", 1.0, 0.0)]:
        found = wrong_on_purpose(score, lam, accuracy)
        name = f"{score}, weight {lam:g}" if accuracy else f"{score} alone"
        most = largest_lam(score) if accuracy else 0.0
        rows.append([name, found.falls_below, found.pays_below, most])
        value = expected_reward(p, p, score, lam) - (1 - accuracy) * p
        curve = p[::20].tolist(), value[::20].tolist()
        series.append(Series(name, *curve, baseline=(score, lam) == ("brier", 1.0)))
    columns = ["reward: right + ...", "V falls below p =", "surely wrong pays below p =",
               "largest weight"]  # fmt: skip
    note = (
        "V falls: the less likely of two unlikely answers is worth more. Surely wrong: one known "
    )
    note += "to be wrong, with q = 0, is worth more than an honest one of probability p."
    title = "For which answers it pays to be wrong on purpose"
    report.tables.append(ReportTable(title, columns, rows, note))
    title = "What an answer is worth with the confidence that pays most"
    report.figures.append(Figure("line", title, "chance that it is right", "V", series))


def around(value: float) -> tuple[float, float]:
    return value - 1e-9, value + 1e-9


# ── digits ──────────────────────────────────────────────────────────────────────────────────────


def reward_tables(names: tuple[str, ...]) -> Float:
    """(arms, 2, 11): what a wrong and a right answer get by the confidence stated with it."""
    c = np.array([[0.0], [1.0]])
    tables = {
        RLVR: np.broadcast_to(c, (2, len(LEVELS))),
        RLCR: calibrated_reward(c, LEVELS),
        SPHERICAL: calibrated_reward(c, LEVELS, "spherical"),
        LOG: calibrated_reward(c, LEVELS, "log"),
        ALONE: calibrated_reward(c, LEVELS) - c,
    }
    return np.stack([tables[name] for name in names])


def by_seed(right: Float, confidence: Float) -> Outcome:
    """Metrics of each seed from (S, B, n)."""
    found = [
        calibration_report(c.reshape(-1), q.reshape(-1))
        for c, q in zip(right, confidence, strict=True)
    ]
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    seeds = [int(s) for s in np.random.SeedSequence(rng).generate_state(plan.seeds)]
    train, test = halves(seeds)
    random = np.random.default_rng([rng, 47])
    rows = np.tile(np.arange(test.x.shape[1]), (plan.seeds, plan.visits))
    seen = test.visit(random, rows)
    u = random.random((2, *rows.shape, 1))
    blank, start, better = (Policies.new(seeds) for _ in range(3))
    teach(start, train, random)
    teach(better, train, random, BETTER_RATE)
    arms = (RLVR, RLCR, SPHERICAL, LOG, ALONE)
    trained = start.copies(len(arms))
    reinforce(trained, train, reward_tables(arms), plan.steps, random)
    warm = {BASE: measure(start, seen, u), **measure_arms(trained, arms, seen, u)}
    rlvr, rlcr = (trained.part(arms.index(a) * plan.seeds, plan.seeds) for a in (RLVR, RLCR))
    warm |= after_the_fact(rlvr, train, seen, u, plan, random)
    others = []
    for policies, steps in ((blank, plan.random_steps), (better, plan.steps)):
        copies = policies.copies(len(FEW))
        reinforce(copies, train, reward_tables(FEW), steps, random)
        others.append(measure_arms(copies, FEW, seen, u))
    cold, surer = others
    surer = {BASE: measure(better, seen, u), **surer}
    report.claims.extend(digit_claims(warm, cold, surer))
    for title, found in (
        (f"Digits half hidden, {plan.steps} steps from a taught start", warm),
        (f"The same from a start that was taught better ({BETTER_RATE:g} a step)", surer),
        (f"The same, {plan.random_steps} steps from random weights", cold),
    ):
        report.tables.append(outcome_table(title, found))
    report.figures.extend([brier_figure(warm), reliability_figure(start, rlvr, rlcr, seen, u)])
    add_test_time(report, rlcr, test, plan, random)
    report.notes.append(
        f"Digits: {plan.seeds} seeds, another split each; metrics of the likeliest answer and a "
        "sampled confidence on the half not trained on, hidden anew. Heads and probes are fitted "
        "to what became of all of RLVR's answers; RLCR learns only of the confidences it states, "
        "and as it goes it tries fewer of them. The Brier score alone, -p(1 - p) at its best, "
        "pulls a chance p below a half down and one above it up: what it learns hangs on the start."
    )


def measure_arms(
    policies: Policies, arms: tuple[str, ...], seen: Visits, u: Float
) -> dict[str, Outcome]:
    n = len(seen.x)
    return {name: measure(policies.part(i * n, n), seen, u) for i, name in enumerate(arms)}


def measure(policies: Policies, seen: Visits, u: Float) -> Outcome:
    said = say(policies, seen, u)
    return by_seed(said.right, said.stated)


def after_the_fact(
    rlvr: Policies, train: Half, seen: Visits, u: Float, plan: Plan, random: np.random.Generator
) -> dict[str, Outcome]:
    """RLVR's answers with a confidence that RLVR does not state."""
    said = say(rlvr, seen, u)
    rows = np.tile(np.arange(train.x.shape[1]), (plan.seeds, 1))
    own = say(rlvr, train.visit(random, rows), random.random((2, *rows.shape, 1)))
    often = own.right.mean(axis=(1, 2), keepdims=True)
    found = {CONSTANT: np.broadcast_to(often, said.right.shape), CHANCE: said.chance}
    for name, probe in ((HEAD, False), (PROBE, True)):
        judge = fit_judge(rlvr, train, plan.steps, random, probe=probe)
        found[name] = judged(judge, seen, said)
    return {name: by_seed(said.right, q) for name, q in found.items()}


def digit_claims(
    warm: dict[str, Outcome], cold: dict[str, Outcome], surer: dict[str, Outcome]
) -> list[Claim]:
    def gap(metric: str, a: str, b: str) -> Estimate:
        return paired_difference(warm[a][metric], warm[b][metric])

    ratio = mean_interval(warm[RLCR]["brier"] / warm[RLVR]["brier"])
    least = "HotpotQA: accuracy .621 against .630"
    alone, log = (mean_interval(cold[name]["acc"] / cold[RLCR]["acc"]) for name in (ALONE, LOG))
    taught, well = (mean_interval(at[ALONE]["acc"] / at[RLCR]["acc"]) for at in (warm, surer))
    says = "the score alone is best served by answers that are surely wrong"
    hotpot = "HotpotQA: Brier .210 against "
    return [
        Claim.within("digits: RLCR is as accurate as RLVR", least, gap("acc", RLCR, RLVR),
                     -0.03, 0.03, "accuracy difference, paired by seed, within .03"),
        Claim.at_most("digits: RLCR has a lower Brier score than RLVR", hotpot + ".370", ratio,
                      0.9, "ratio, mean of seeds, at most .9"),
        Claim.at_least("digits: RLCR's confidence tells right from wrong",
                       "HotpotQA: AUROC .687 against .5", gap("auroc", RLCR, RLVR), 0.05,
                       "AUROC difference to RLVR, paired by seed, at least .05"),
        Claim.at_most("digits: RLCR has a lower ECE than RLVR", "HotpotQA: .030 against .370",
                      gap("ece", RLCR, RLVR), 0.0, "difference, paired by seed, at most 0"),
        Claim.within("digits: the spherical score does as well", "any bounded proper score",
                     gap("brier", SPHERICAL, RLCR), -0.02, 0.02,
                     "Brier difference to RLCR, paired by seed, within .02"),
        Claim.within("digits: the log score does no harm from a taught start", "-",
                     gap("acc", LOG, RLCR), -0.03, 0.03,
                     "accuracy difference to RLCR, paired by seed, within .03"),
        Claim.at_most("digits: RLCR beats a head fitted to RLVR's answers", hotpot + ".217",
                      gap("brier", RLCR, HEAD), 0.0, "Brier difference at most 0"),
        Claim.at_most("digits: RLCR beats RLVR's probability of the answer", hotpot + ".357",
                      gap("brier", RLCR, CHANCE), 0.0, "Brier difference at most 0"),
        Claim.at_most("digits: RLCR beats one confidence for all answers", "-",
                      gap("brier", RLCR, CONSTANT), 0.0, "Brier difference at most 0"),
        Claim.at_most("digits: the Brier score alone learns to be wrong (taught start)", says,
                      taught, 0.5, "accuracy over RLCR's, mean of seeds, at most a half"),
        Claim.at_most("digits: the Brier score alone learns to be wrong (better start)", says,
                      well, 0.5, "accuracy over RLCR's, mean of seeds, at most a half"),
        Claim.at_most("digits: the Brier score alone learns to be wrong (random start)", says,
                      alone, 0.1, "accuracy over RLCR's, mean of seeds, at most a tenth"),
        Claim.at_most("digits: so does being right + log score (random start)",
                      "the theorem needs a bounded score", log, 0.1,
                      "accuracy over RLCR's, mean of seeds, at most a tenth"),
    ]  # fmt: skip


def outcome_table(title: str, found: dict[str, Outcome]) -> ReportTable:
    names = {"acc": "accuracy", "brier": "Brier", "ece": "ECE", "auroc": "AUROC"}
    names["mean_conf"] = "mean confidence"
    rows: list[list[Cell]] = []
    for name, outcome in found.items():
        cells = [
            mean_interval(outcome[m]) if np.isfinite(outcome[m]).all() else None for m in names
        ]
        rows.append([name, *cells])
    note = "No AUROC where a seed has no right answer. ECE: 10 bins."
    return ReportTable(title, ["", *names.values()], rows, note)


def brier_figure(warm: dict[str, Outcome]) -> Figure:
    marks = {name: mean_interval(outcome["brier"]) for name, outcome in warm.items()}
    marks.pop(ALONE)  # it is low because nothing is right
    value, low, high = ([getattr(m, part) for m in marks.values()] for part in
                        ("value", "low", "high"))  # fmt: skip
    series = [Series("Brier score", list(marks), value, low, high)]
    return Figure("interval", "Digits half hidden: Brier score (lower is better)", "Brier score",
                  series=series)  # fmt: skip


def reliability_figure(
    base: Policies, rlvr: Policies, rlcr: Policies, seen: Visits, u: Float
) -> Figure:
    series = [Series("what is stated", [0.0, 1.0], [0.0, 1.0], baseline=True)]
    for name, policies in ((BASE, base), (RLVR, rlvr), (RLCR, rlcr)):
        said = say(policies, seen, u)
        curve = reliability(said.stated, said.right)
        enough = curve.count >= 0.01 * said.right.size
        points = curve.confidence[enough].tolist(), curve.credit[enough].tolist()
        series.append(Series(name, *points))
    caption = "All seeds together; bins that hold 1 % of the answers or more."
    return Figure("line", "Digits half hidden: how often what is stated comes true", "confidence",
                  "share right", series, caption=caption)  # fmt: skip


def add_test_time(
    report: Report, rlcr: Policies, test: Half, plan: Plan, random: np.random.Generator
) -> None:
    """n samples an image as votes, and n confidences for the likeliest answer, averaged."""
    rows = np.tile(np.arange(test.x.shape[1]), (plan.seeds, 1))
    seen = test.visit(random, rows)
    u = random.random((2, *rows.shape, plan.votes))
    said = say(rlcr, seen, u, likeliest=False)
    flat = group_answers(said.answer.reshape(-1, plan.votes))
    q, right = said.stated.reshape(flat.shape), said.right.reshape(flat.shape)
    accuracy = {"a sample": said.right.mean(axis=(1, 2))}
    for how in VOTES:
        chosen = vote_in_rows(flat, q, how)[:, None]
        won = np.take_along_axis(right, chosen, 1).reshape(plan.seeds, -1)
        accuracy[how] = won.mean(axis=1)
    accuracy["any sample right"] = said.right.max(axis=2).mean(axis=1)
    again = say(rlcr, seen, u)
    single = by_seed(again.right[..., :1], again.stated[..., :1])
    mean = by_seed(again.right[..., :1], again.stated.mean(axis=2, keepdims=True))
    says = "confidence-weighted majority beats the majority"
    rule = "accuracy difference, paired by seed, above 0"
    report.claims.extend([
        Claim.at_least(f"digits: weighted votes of {plan.votes} beat the majority", says,
                       paired_difference(accuracy["weighted"], accuracy["majority"]), 0.0, rule),
        Claim.at_least("digits: the surest of the samples beats a sample", "max-confidence",
                       paired_difference(accuracy["max"], accuracy["a sample"]), 0.0, rule),
        Claim.at_most(f"digits: the mean of {plan.votes} confidences has a lower Brier score",
                      "an ensemble of analyses", paired_difference(mean["brier"], single["brier"]),
                      0.0, "Brier difference to one confidence, paired by seed, at most 0"),
    ])  # fmt: skip
    columns = ["chosen by", "accuracy", "minus majority"]
    cells: list[list[Cell]] = [
        [name, mean_interval(v),
         None if name == "majority" else paired_difference(v, accuracy["majority"])]
        for name, v in accuracy.items()
    ]  # fmt: skip
    report.tables.append(ReportTable(f"RLCR: {plan.votes} samples an image", columns, cells))
    report.tables.append(
        outcome_table("RLCR: confidence of the likeliest answer",
                      {"one sampled": single, f"mean of {plan.votes}": mean})
    )  # fmt: skip


# ── released evaluations ────────────────────────────────────────────────────────────────────────


def evaluations(name: str) -> dict[str, tuple[Float, Float]]:
    """Correctness and confidence (n,) of each method on a set of the released evaluations."""
    path = resources.files("scoredraw").joinpath("data", "rlcr-eval", f"{name}.csv.gz")
    with path.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        m: (np.array([float(row[f"{m}_correct"]) for row in rows]),
            np.array([float(row[f"{m}_confidence"]) for row in rows]))
        for m in METHODS
    }  # fmt: skip


def tolerance(name: str, method: str, metric: str) -> float:
    """Half a unit of the published decimals; the file's six digits move the ties of one AUROC."""
    if (name, method, metric) == ("gpqa", "Base", "auroc"):
        return 3e-4
    return 5e-4 if metric == "acc" else 5e-5


def add_released(report: Report) -> None:
    columns = ["method", "accuracy", "Brier", "ECE", "AUROC", "mean confidence"]
    worst = 0.0
    for name, methods in PUBLISHED.items():
        pairs = evaluations(name)
        rows: list[list[Cell]] = []
        for method, want in methods.items():
            found = calibration_report(*pairs[method])
            for metric, value in zip(METRICS, want, strict=True):
                gap = abs(found[metric] - value) / tolerance(name, method, metric)
                worst = max(worst, gap)
            rows.append([method, *(found[m] for m in METRICS), found["mean_conf"]])
        title = f"Released evaluations: {name} ({len(pairs[RLCR][0])} questions)"
        report.tables.append(ReportTable(title, columns, rows))
        report.claims.extend(released_claims(name, pairs))
    report.claims.append(
        Claim.at_most("released evaluations: every published metric comes out again",
                      "60 numbers", worst, 1.0, "largest gap in half units of the last decimal")
    )  # fmt: skip
    title = "As published, questions not released: HotpotQA, the training distribution (1,000)"
    aggregate = zip(METHODS, HOTPOT, strict=True)
    report.tables.append(
        ReportTable(title, ["method", *columns[1:5]], [[m, *values] for m, values in aggregate])
    )


def released_claims(name: str, pairs: dict[str, tuple[Float, Float]]) -> list[Claim]:
    """RLCR against the best of the others, over questions."""
    others = [m for m in METHODS if m != RLCR]
    square = {m: (q - c) ** 2 for m, (c, q) in pairs.items()}
    rival = min(others, key=lambda m: float(square[m].mean()))
    brier = paired_difference(square[RLCR], square[rival])

    def ece(c: Float, q: Float) -> float:
        return float(expected_calibration_error(q, c, closed="left"))

    def difference(both: Float) -> float:
        return ece(both[:, 0], both[:, 1]) - ece(both[:, 2], both[:, 3])

    nearest = min(others, key=lambda m: ece(*pairs[m]))
    table = np.stack([*pairs[RLCR], *pairs[nearest]], axis=1)
    gap = bootstrap_interval(table, statistic=difference, resamples=500)
    accuracy = paired_difference(pairs[RLCR][0], pairs[RLVR][0])
    row = dict(zip(METRICS, PUBLISHED[name][RLCR], strict=True))
    says, rule = f"RLCR has {row['brier']}", "difference, paired by question, at most 0"
    return [
        Claim.at_most(f"{name}: lowest Brier score (against {rival})", says, brier, 0.0, rule),
        Claim.at_most(f"{name}: lowest ECE (against {nearest})", f"RLCR has {row['ece']}", gap,
                      0.0, "difference, bootstrap over questions, at most 0"),
        Claim.at_least(f"{name}: as accurate as RLVR", f"RLCR has {row['acc']}", accuracy, -0.03,
                       "difference, paired by question, at least -.03"),
    ]  # fmt: skip
