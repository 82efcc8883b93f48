"""Perplexity consistency and reasoning pruning: are few samples enough, and can one trust them?

Real samples: a small language model answered 48 arithmetic problems 32 times each (half of the
answers can't be read), and, where the file is there, 100 problems of GSM8K. Votes (SC), the most
probable path (PPL), the distinct paths' mass (PC) and the same after pruning (RPC) each choose
among random n of the samples, beside any answer that could be read. Accuracy and calibration are
compared with what the released evaluators found on the same file. In a synthetic twin the
probabilities of the paths are exact, so that only the estimation error is left. Simulation checks
the laws of that error, and the released way of fitting is run beside ours.

Zhou, Tan, Yang, Gan, Wang, Zhang and Li, "A theoretical study on bridging internal probability and
self-consistency for LLM reasoning", NeurIPS 2025, arXiv 2510.15444.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from scoredraw.answers import AnswerPool
from scoredraw.calibration import expected_calibration_error, reliability
from scoredraw.language.answer_calibration import (
    CalibrationCurve,
    Confident,
    calibration_at_k,
)
from scoredraw.language.estimation_error import (
    consistency_error,
    model_error,
    printed_consistency_error,
    vote_error,
)
from scoredraw.language.perplexity_consistency import NULLS, choose_in_rows
from scoredraw.language.weibull_mixture import (
    BOUNDS,
    START,
    fit_weibull_mixtures,
    name_components,
    negative_log_likelihood,
)
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import read_samples

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Curves = dict[str, CalibrationCurve]

METHODS = ("sc", "ppl", "pc", "rpc")
NAMES = {
    "sc": "SC: votes",
    "ppl": "PPL: the likeliest path",
    "pc": "PC: distinct paths",
    "rpc": "RPC: PC, pruned",
    "any": "any answer",
}
ARITH, GSM8K = "smollm2-arith", "gsm8k-smollm2"
SIZES = (4, 8, 16, 32)
TWIN_SIZES = (2, 4, 8, 16, 32, 64)
SHOWN = 20  # subsets whose calibration is resampled
# accuracy and ECE in per cent, by the released evaluators on the same samples
REFERENCE = {
    "sc": ((9.0, 51.6), (12.7, 28.7), (17.3, 14.6), (24.0, 8.4)),
    "ppl": ((11.0, 55.8), (16.7, 59.3), (25.1, 55.3), (31.2, 51.2)),
    "rpc": ((10.9, 75.0), (17.1, 46.7), (22.1, 22.0), (25.0, 14.8)),
}
WITH_NULLS, WITHOUT_PRUNING = (22.9, 6.5), (22.9, 6.0)  # RPC with null answers in the fit; PC
# an earlier run of the twin: method, n, accuracy in per cent
TWIN_REFERENCE = (
    *(("sc", 2, 44.8), ("sc", 64, 81.0), ("ppl", 2, 58.4), ("ppl", 16, 81.4), ("ppl", 64, 80.6)),
    *(("pc", 2, 58.4), ("pc", 16, 86.8), ("pc", 64, 97.8)),
)
# InternLM2-Math-Plus-7B, accuracy / ECE in per cent: MATH, MathOdyssey, OlympiadBench, AIME, mean
PUBLISHED = {
    "PPL": "46.99 / 48.99, 27.35 / 67.70, 7.27 / 86.90, 5.96 / 88.98, 21.90 / 73.14",
    "VERB": "26.14 / 47.46, 10.06 / 69.92, 3.68 / 84.68, 3.17 / 86.29, 10.76 / 72.09",
    "SC": "50.57 / 6.71, 28.25 / 12.23, 11.07 / 20.20, 9.40 / 14.35, 24.82 / 13.37",
    "RPC": "51.95 / 6.41, 31.62 / 9.87, 11.14 / 18.86, 9.74 / 14.32, 26.11 / 12.37",
}
FEWER = (
    "Published (MATH, MathOdyssey, OlympiadBench, AIME): SC is at its best with 64, 112, 128, 128 "
    "samples; PC is as good with 32, 112, 128, 64 and RPC with 32, 32, 64, 48."
)
NOTES = (
    "VERB asks the model about each sample; the samples here hold no such answers.",
    "Intervals over problems resample problems: 48 of them leave ±6 points.",
    "An ECE of few problems is biased upwards, of resampled ones more: its intervals lie askew.",
    "Where no answer can be read the confidence is 0, which lies in no bin.",
    "The evaluators' ECE comes out if such problems are left out of it and two samples are fitted.",
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    subsets: int
    resamples: int
    seeds: int  # of the twin: 200 new problems each
    problems: int
    runs: int  # of the simulated errors
    fits: int  # fitted in the released way too


PLANS = {
    "smoke": Plan(3, 50, 2, 12, 2000, 4),
    "quick": Plan(60, 1000, 8, 200, 100_000, 80),
    "full": Plan(400, 4000, 40, 200, 1_000_000, 600),
    "study": Plan(4000, 20_000, 200, 200, 2_000_000, 6000),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Measure accuracy and calibration, rerun the twin, test the laws and the fit."""
    plan = PLANS[scale]
    report = Report(paper=21, scale=scale, seed=rng)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the mixture of .* did not converge")
        curves = add_real(report, ARITH, plan, rng)
        add_reference(report, curves, plan, rng)
        add_variants(report, plan, rng)
        add_real(report, GSM8K, plan, rng)
        add_twin(report, plan, rng)
    add_errors(report, plan, rng)
    add_fits(report, plan, rng)
    columns = ["", "MATH", "MathOdyssey", "OlympiadBench", "AIME", "mean"]
    note = "As the paper has it, accuracy / ECE in %: 64 (MATH) or 128 samples, 10 seeds."
    rows: list[list[Cell]] = [[name, *row.split(", ")] for name, row in PUBLISHED.items()]
    report.tables.append(ReportTable("InternLM2-Math-Plus-7B, published", columns, rows, note))
    report.notes.extend(NOTES)
    return report


# ── real samples ────────────────────────────────────────────────────────────────────────────────


def pools_of(name: str) -> tuple[list[AnswerPool], list[Float]]:
    """The pool of each problem, and the credit of its samples."""
    samples = read_samples(name)
    grades = samples.grades.astype(np.float64)
    return list(samples.pools()), [grades[samples.rows(g)] for g in range(len(samples))]


def any_answer(pool: AnswerPool, subsets: Int) -> tuple[Float, Float]:
    """Any answer that could be read, with what is then sure: its share among the answers read."""
    read = ~pool.null[subsets]
    choice = read / np.maximum(read.sum(axis=1, keepdims=True), 1)
    return choice, choice.max(axis=1)


def real_curves(name: str, plan: Plan, rng: int) -> Curves:
    """Every method on the same subsets."""
    pools, credits_ = pools_of(name)
    sizes = [k for k in SIZES if k <= min(pool.n for pool in pools)]
    deciders: dict[str, str | Confident] = {**{m: m for m in METHODS}, "any": any_answer}
    return {
        method: calibration_at_k(pools, credits_, sizes, decide, repeats=plan.subsets, rng=rng)
        for method, decide in deciders.items()
    }


def add_real(report: Report, name: str, plan: Plan, rng: int) -> Curves:
    """Accuracy and calibration at each n, and what the paper says of them."""
    curves = real_curves(name, plan, rng)
    label = f"{name}, {curves['sc'].credit[0].shape[1]} problems"
    ks = curves["sc"].k.tolist()
    rows: list[list[Cell]] = []
    for method, curve in curves.items():
        cells = [over_problems(c.mean(axis=0), plan) for c in curve.credit]
        rows.append([NAMES[method], "accuracy", *cells])
        for metric in ("ECE", "Brier", "NLL") if method != "any" else ():
            rows.append([NAMES[method], metric, *getattr(curve, metric.lower()).tolist()])
    note = f"{plan.subsets} random subsets for each n below all; intervals resample problems."
    columns = ["", "", *(f"n = {k}" for k in ks)]
    report.tables.append(ReportTable(f"Accuracy and calibration, {label}", columns, rows, note))
    for j, k in enumerate(ks):
        report.claims.extend(real_claims(f"{name}, n = {k}", curves, j, plan))
    report.figures.extend(real_figures(label, curves, ks))
    return curves


def over_problems(values: Float, plan: Plan) -> Estimate:
    return bootstrap_interval(values, resamples=plan.resamples)


def accuracy_gap(curves: Curves, a: str, b: str, j: int, plan: Plan) -> Estimate:
    """Accuracy of a less that of b, paired by problem."""
    return over_problems((curves[a].credit[j] - curves[b].credit[j]).mean(axis=0), plan)


def ece_gap(curves: Curves, a: str, b: str, j: int, plan: Plan) -> Estimate:
    """ECE of a less that of b, mean over subsets, resampling problems."""
    rows = min(SHOWN, len(curves[a].credit[j]))
    parts = [part[j][:rows] for m in (a, b) for part in (curves[m].confidence, curves[m].credit)]

    def gap(columns: Float) -> float:
        c, d, e, f = np.split(columns.T, 4)
        return float((expected_calibration_error(c, d) - expected_calibration_error(e, f)).mean())

    return bootstrap_interval(np.concatenate(parts).T, statistic=gap, resamples=plan.resamples)


def real_claims(name: str, curves: Curves, j: int, plan: Plan) -> list[Claim]:
    """What the paper says of every n, and of the largest what a model this weak may not show."""
    accuracy, ece = f"{name}: accuracy, RPC - ", f"{name}: ECE, "
    says = "RPC is at least as accurate as SC everywhere: 26.11 against 24.82 % on average"
    gain, gap = accuracy_gap(curves, "rpc", "sc", j, plan), ece_gap(curves, "ppl", "sc", j, plan)
    claims = [Claim.at_least(f"{accuracy}SC", says, gain, -0.01)]
    says = "PPL is badly calibrated: ECE 73.14 against 13.37 % for SC"
    claims.append(Claim.at_least(f"{ece}PPL - SC", says, gap, 0.25))
    if j + 1 < len(curves["sc"].k):
        return claims
    says = "RPC is more accurate than PPL: 26.11 against 21.90 % on average"
    gain, gap = accuracy_gap(curves, "rpc", "ppl", j, plan), ece_gap(curves, "rpc", "sc", j, plan)
    more = True if gain.above(0) else False if gain.high <= 0 else None
    claims.append(Claim.judge(f"{accuracy}PPL", says, gain, "interval above 0", more))
    says = "RPC is better calibrated than SC: ECE 12.37 against 13.37 % on average"
    return [*claims, Claim.at_most(f"{ece}RPC - SC", says, gap, 0.0)]


def real_figures(label: str, curves: Curves, ks: list[int]) -> list[Figure]:
    accuracy = [line(NAMES[m], ks, c.accuracy, m in ("sc", "any")) for m, c in curves.items()]
    ece = [line(NAMES[m], ks, curves[m].ece, m == "sc") for m in METHODS]
    shown = [line("calibrated", [0, 1], np.array([0.0, 1.0]), True)]
    for method in METHODS:
        found = reliability(curves[method].confidence[-1], curves[method].credit[-1])
        shown.append(line(NAMES[method], found.confidence, found.credit))
    title = f"Confidence against accuracy with {ks[-1]} samples, {label}"
    caption = "Bins of a tenth; below the diagonal: too sure."
    return [
        Figure("line", f"Accuracy, {label}", "samples n", "accuracy", accuracy, log_x=True),
        Figure("line", f"Calibration error, {label}", "samples n", "ECE", ece, log_x=True),
        Figure("line", title, "confidence", "accuracy", shown, caption=caption),
    ]


def line(name: str, x: Sequence[float] | Float | Int, y: Float, baseline: bool = False) -> Series:
    return Series(name, list(x), y.tolist(), baseline=baseline)


# ── what the released evaluators found ──────────────────────────────────────────────────────────


def answered_ece(curve: CalibrationCurve, j: int) -> float:
    """The calibration error over the problems with an answer, mean over subsets."""
    rows = zip(curve.confidence[j], curve.credit[j], strict=True)
    return float(np.mean([expected_calibration_error(c[c > 0], a[c > 0]) for c, a in rows]))


def add_reference(report: Report, curves: Curves, plan: Plan, rng: int) -> None:
    """The evaluators' table beside ours, and beside ours computed their way."""
    pools, credits_ = pools_of(ARITH)
    rows: list[list[Cell]] = []
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for method, reference in REFERENCE.items():
        theirs = calibration_at_k(
            pools, credits_, SIZES, method, repeats=plan.subsets, rng=rng, fewest=2
        )
        for j, wanted in enumerate(reference):
            got = 100 * theirs.accuracy[j], 100 * answered_ece(theirs, j)
            mine = 100 * curves[method].accuracy[j], 100 * curves[method].ece[j]
            row = [float(each) for triple in zip(wanted, got, mine, strict=True) for each in triple]
            rows.append([NAMES[method], SIZES[j], *row])
            gaps[SIZES[j] == 32].extend(abs(a - b) for a, b in zip(got, wanted, strict=True))
    columns = ["", "n"]
    columns += [
        f"{m}, {who}" for m in ("accuracy", "ECE") for who in ("theirs", "their way", "ours")
    ]
    note = "In %. Their way: fits from 2 samples on, ECE without problems that have no answer. "
    note += f"The reference has 20 subsets, this {plan.subsets}."
    report.tables.append(ReportTable("The released evaluators' table", columns, rows, note))
    says = "accuracy and ECE of SC, PPL and RPC by the released evaluators on the same samples"
    name = f"{ARITH}: largest difference from the released evaluators, in points"
    rule = "at most 0.2: one of the 48 fits ends elsewhere with numerical gradients"
    report.claims.append(Claim.at_most(f"{name}, n = 32", says, max(gaps[True]), 0.2, rule))
    rule = "at most 2, as much as that table depends on its random subsets"
    report.claims.append(Claim.at_most(f"{name}, n < 32", says, max(gaps[False]), 2.0, rule))


def add_variants(report: Report, plan: Plan, rng: int) -> None:
    """All 32 samples: null answers, and whole probabilities."""
    pools, credits_ = pools_of(ARITH)
    rows: list[list[Cell]] = []
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for invalid, normalize, method in product(NULLS, ("mean", "sum"), METHODS):
        curve = calibration_at_k(
            pools, credits_, [32], method, normalize=normalize, invalid=invalid
        )
        pair = 100 * float(curve.accuracy[0]), 100 * float(curve.ece[0])
        found[invalid, normalize, method] = pair
        rows.append([invalid, normalize, NAMES[method], *pair])
    columns = ["null answers", "log-probability", "", "accuracy, %", "ECE, %"]
    note = "Own-group: no answer is an answer too, and half of the samples give it."
    title = f"Null answers and normalisation, {ARITH}, n = 32"
    report.tables.append(ReportTable(title, columns, rows, note))
    pairs = ((("fit-only", "mean", "rpc"), WITH_NULLS), (("drop", "mean", "pc"), WITHOUT_PRUNING))
    gap = max(abs(a - b) for key, want in pairs for a, b in zip(found[key], want, strict=True))
    name = f"{ARITH}, n = 32: RPC with null answers in the fit, and PC; largest difference"
    says = "RPC 22.9 / 6.5 and PC 22.9 / 6.0 (accuracy / ECE, %), measured before"
    report.claims.append(Claim.at_most(name, says, gap, 0.05, "at most 0.05: their rounding"))


# ── a twin with exact probabilities ─────────────────────────────────────────────────────────────


def twin_accuracy(
    answers: int, problems: int, sizes: Sequence[int], rng: np.random.Generator
) -> dict[str, Float]:
    """Accuracy at each size (K,) of every method, on new problems with five paths an answer.

    Answers have Dirichlet(1) masses, the largest is the truth; paths have Dirichlet(1) shares.
    """
    mass = -np.sort(-rng.dirichlet(np.ones(answers), problems), axis=1)
    shares = rng.dirichlet(np.ones(5), (problems, answers))
    paths = (mass[:, :, None] * shares).reshape(problems, -1)
    edges = np.cumsum(paths, axis=1)[:, None, :-1]
    drawn = (rng.random((problems, max(sizes), 1)) >= edges).sum(axis=2)
    log_p = np.log(np.take_along_axis(paths, drawn, 1))
    out = {method: np.empty(len(sizes)) for method in METHODS}
    for j, n in enumerate(sizes):
        codes, rows = drawn[:, :n] // 5, (log_p[:, :n], drawn[:, :n])
        for method, row in out.items():
            scores = np.zeros(codes.shape) if method == "sc" else rows[0]
            choice = choose_in_rows(codes, scores, rows[1], method).choice
            row[j] = (choice * (codes == 0)).sum(axis=1).mean()
    return out


def add_twin(report: Report, plan: Plan, rng: int) -> None:
    """Sample efficiency where p(t) is exact: it tests the machinery, not language models."""
    random = np.random.default_rng(rng)
    runs = [twin_accuracy(6, plan.problems, TWIN_SIZES, random) for _ in range(plan.seeds)]
    found = {method: np.array([one[method] for one in runs]) for method in METHODS}
    rows: list[list[Cell]] = []
    series, target = [], found["sc"].mean(axis=0)[-1]
    for method, values in found.items():
        cells = [mean_interval(column) for column in values.T]
        reached = [n for n, v in zip(TWIN_SIZES, values.mean(axis=0), strict=True) if v >= target]
        rows.append([NAMES[method], *cells, reached[0] if reached else None])
        low, high = [cell.low for cell in cells], [cell.high for cell in cells]
        one = line(NAMES[method], TWIN_SIZES, values.mean(axis=0), method == "sc")
        series.append(replace(one, low=low, high=high))
    columns = ["", *(f"n = {n}" for n in TWIN_SIZES), "reaches SC's best at n"]
    note = f"{plan.seeds} seeds of {plan.problems} problems, 6 answers, 5 paths each. {FEWER}"
    title = "The twin: accuracy with exact path probabilities"
    report.tables.append(ReportTable(title, columns, rows, note))
    report.figures.append(Figure("line", title, "samples n", "accuracy", series, log_x=True))
    report.claims.extend(twin_claims(found))
    report.tables.append(few_answers(plan, random))


def twin_claims(found: dict[str, Float]) -> list[Claim]:
    at = {n: j for j, n in enumerate(TWIN_SIZES)}
    says = "PC and RPC reach SC's best accuracy with half of the samples or fewer"
    ahead = {m: paired_difference(found[m][:, at[32]], found["sc"][:, at[64]]) for m in METHODS}
    name = "twin, accuracy: {} with 32 samples - SC with 64"
    claims = [Claim.at_least(name.format(m.upper()), says, ahead[m], 0.0) for m in ("pc", "rpc")]
    off = [
        abs(found[m][:, at[n]].mean() - value / 100) / found[m][:, at[n]].std(ddof=1)
        for m, n, value in TWIN_REFERENCE
    ]
    says = "one earlier run: " + ", ".join(f"{m.upper()}@{n} {v}" for m, n, v in TWIN_REFERENCE)
    name = "twin: largest distance of an earlier run from ours, in standard deviations of a run"
    gain = paired_difference(found["rpc"][:, at[64]], found["pc"][:, at[64]])
    pruned = "pruning reduces the model error without losing right answers"
    return [
        *claims,
        Claim.at_most(name, says, float(max(off)), 3.5),
        Claim.at_least("twin, accuracy with 64 samples: RPC - PC", pruned, gain, 0.0),
    ]


def few_answers(plan: Plan, random: np.random.Generator) -> ReportTable:
    """Gains over votes where there are few answers to choose from."""
    rows: list[list[Cell]] = []
    for answers in (2, 4, 6):
        runs = [twin_accuracy(answers, plan.problems, (8, 64), random) for _ in range(plan.seeds)]
        sc, pc, rpc = (np.array([one[m] for one in runs]).T for m in ("sc", "pc", "rpc"))
        for j, n in enumerate((8, 64)):
            gains = [paired_difference(method[j], sc[j]) for method in (pc, rpc)]
            rows.append([answers, n, mean_interval(sc[j]), *gains])
    note = "A rerun by others of the released data found RPC no better than SC for 2 or 4 answers."
    columns = ["answers", "n", "SC", "PC - SC", "RPC - SC"]
    return ReportTable("The twin with few answers: accuracy", columns, rows, note)


# ── the laws of the error ───────────────────────────────────────────────────────────────────────


def add_errors(report: Report, plan: Plan, rng: int) -> None:
    """Squared errors of simulated confidences beside the laws, the printed one included."""
    random = np.random.default_rng(rng)
    p, laws = 0.4, (consistency_error, printed_consistency_error)
    rows: list[list[Cell]] = []
    off: list[list[float]] = []
    for k, right, n in product((1, 2, 8), (0, 1), (1, 4, 16)):
        drawn = random.multinomial(n, [*[p / k] * k, 1 - p], plan.runs)
        seen = (drawn[:, :-1] > 0).sum(axis=1) * p / k
        errors = (seen - right) ** 2 - model_error(p, right)
        # one run more, off by 1: where nothing was seen, nothing is known of the spread
        width = np.sqrt((errors.var() + 1 / plan.runs) / plan.runs)
        values = [float(law(p, n, right, k)) for law in laws]
        off.append([abs(errors.mean() - value) / width for value in values])
        rows.append([k, right, n, mean_interval(errors), *values, float(vote_error(p, n))])
    title = f"Estimation error of PC, an answer of probability {p}"
    columns = ["paths", "right", "n", "simulated", "exact", "as printed", "SC"]
    report.tables.append(ReportTable(title, columns, rows, note=f"{plan.runs} runs each."))
    name = "estimation error of PC: largest distance of the simulation, in standard errors, from"
    exact, printed = np.max(off, axis=0)
    says = "theorem 4: the estimation error falls exponentially with n"
    rule = "at most 5: a false alarm in 100,000 for 18 comparisons"
    report.claims.append(Claim.at_most(f"{name} the exact law", says, float(exact), 5, rule))
    says = "theorem 4 as printed: α^n p (2 I - (1 + α^n) p)"
    report.claims.append(Claim.at_most(f"{name} theorem 4", says, float(printed), 5, rule))
    ns = np.arange(1, 129)
    series = [line("SC", ns, vote_error(p, ns), True)]
    series += [line(f"PC, {k} paths", ns, consistency_error(p, ns, 1, k)) for k in (1, 8, 64)]
    shown = [replace(one, y=np.maximum(one.y, 1e-8).tolist()) for one in series]
    caption = "A right answer of probability 0.4. Votes are ahead while few paths were seen."
    figure = Figure("line", "Estimation error", "samples n", "error", shown, log_y=True)
    report.figures.append(replace(figure, log_x=True, caption=caption))


# ── the fit ─────────────────────────────────────────────────────────────────────────────────────


def densities_loss(theta: Float, x: Float) -> float:
    """-Σ log f as the released code computes it."""
    w, k1, scale1, k2, scale2 = theta
    first, second = (
        k / scale * (x / scale) ** (k - 1) * np.exp(-((x / scale) ** k))
        for k, scale in ((k1, scale1), (k2, scale2))
    )
    return float(-np.log(w * first + (1 - w) * second).sum())


def best_of_starts(x: Float, starts: int, random: np.random.Generator) -> Any:
    """The best of several local optima: what the method does not want."""

    def at(theta: Float) -> tuple[float, Float]:
        value, gradient = negative_log_likelihood(theta[None], np.log(x)[None])
        return float(value[0]), gradient[0]

    first = np.array(START) * random.uniform(0.5, 2.0, (starts, 5))
    found = [minimize(at, one, jac=True, bounds=BOUNDS, method="L-BFGS-B") for one in first]
    return min(found, key=lambda one: float(one.fun))


def unlikely(found: Sequence[Any], x: Float) -> NDArray[np.bool_]:
    """What the mixtures of optimiser results prune of x (S, n)."""
    theta, nll = np.array([one.x for one in found]), np.array([one.fun for one in found])
    posterior = name_components(theta, nll, np.ones(len(found))).posterior_high(x)
    return (posterior < 0.5) & (x < x.mean(axis=1, keepdims=True))


def add_fits(report: Report, plan: Plan, rng: int) -> None:
    """The same subsets fitted in the released way, and from many starts."""
    random = np.random.default_rng(rng)
    known = [np.exp(p.scores("mean_logprob")[~p.null]) for p in pools_of(ARITH)[0]]
    rows: list[list[Cell]] = []
    otherwise = []
    for size in (8, 16):
        sets = [values for values in known if len(values) >= size]
        chosen = random.integers(0, len(sets), plan.fits // 2)
        x = np.array([random.permutation(sets[i])[:size] for i in chosen])
        ours = fit_weibull_mixtures(x)
        mine = (ours.posterior_high(x) < 0.5) & (x < x.mean(axis=1, keepdims=True))
        few = x[: len(x) // 4 + 1]
        with np.errstate(all="ignore"):
            theirs = [minimize(densities_loss, START, args=(v,), bounds=BOUNDS) for v in x]
            starts = [best_of_starts(v, 10, random) for v in few]
        other = unlikely(theirs, x) != mine
        worse = np.array(
            [not one.fun < nll + 1e-3 for one, nll in zip(theirs, ours.nll, strict=True)]
        )
        more = (unlikely(starts, few) != mine[: len(few)]).any(axis=1)
        higher = np.array([one.fun for one in starts]) < ours.nll[: len(few)] - 0.01
        shares = (other.any(axis=1), other.any(axis=1) & ~worse, other, more, higher)
        rows.append([size, len(x), *(float(share.mean()) for share in shares)])
        otherwise.append(other.reshape(-1))
    columns = ["samples", "sets", "sets pruned otherwise", "and theirs no worse a fit"]
    columns += ["samples pruned otherwise", "10 starts: sets pruned otherwise"]
    columns += ["10 starts: a higher likelihood"]
    note = "Shares. Otherwise than in the released way: numerical gradients of densities, which "
    note += "underflow to no number. The likelihood has no maximum: more starts climb more spikes."
    report.tables.append(ReportTable("What is pruned, by how it is fitted", columns, rows, note))
    name = "share of samples pruned otherwise than with numerical gradients of densities"
    says = "the released fit; masks of its golden file are to agree in 97 % of the samples"
    share = float(np.concatenate(otherwise).mean())
    report.claims.append(Claim.at_most(name, says, share, 0.03))
