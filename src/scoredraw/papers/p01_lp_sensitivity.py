"""Row samples for lp norms: which score keeps every ‖Ax‖_1 best at the same number of rows.

The paper proves how many rows are enough; it has no experiments. Measured here is what the
theorems are about, the largest relative error of ‖SAx‖_1 over all x (by search, a lower bound), on
the breast cancer table: standardised columns and a constant, 569 x 31, p = 1. Against the better of
two uniform draws stand sensitivities, root leverage, Lewis weights and sensitivity plus leverage.
A planted matrix shows where uniform draws cannot work at all. Cheap surrogates of the sensitivities
are set beside the exact ones (`lp_surrogates`). At full scale a least absolute deviations
regression of doctor's visits (RAND health insurance, 20,190 x 10) is fitted on coresets
(`lp_regression`).

Woodruff and Yasuda, "Sharper bounds for lp sensitivity sampling", ICML 2023, arXiv 2306.00732.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.coresets.combined import leverage_bounds, lewis_bounds, total_bounds
from scoredraw.coresets.distortion import embedding_distortions
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.datasets import load
from scoredraw.draws import Draw
from scoredraw.metrics import Estimate, bootstrap_interval
from scoredraw.papers.lp_regression import add_regression
from scoredraw.papers.lp_surrogates import add_surrogates
from scoredraw.reports import Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import poisson, systematic

Float = NDArray[np.float64]

UNIFORM, SENSITIVITY, ROOT, LEWIS = "uniform", "sensitivity", "root leverage", "Lewis weights"
PLUS = "sensitivity + leverage"
METHODS = (UNIFORM, SENSITIVITY, ROOT, LEWIS, PLUS)
CLAIMED = (SENSITIVITY, ROOT, LEWIS)
FIXED, POISSON = "fixed size", "Poisson"
GAIN = 0.25
SAYS = (
    "d and the total sensitivity decide how many rows are enough, not n: theorems, no "
    "experiment. Expected from them: a quarter less distortion than uniform at equal size"
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    draws: int
    sizes: tuple[int, ...] = (150, 250, 400)
    starts: int = 24
    steps: int = 40
    poisson: tuple[str, ...] = METHODS
    planted: tuple[int, int] = (2000, 200)  # rows, and rows kept
    surrogates: tuple[int, int] = (569, 31)  # rows and columns for the surrogates
    totals: int = 1000  # estimates of the total sensitivity
    regression: int = 0  # draws of the regression


PLANS = {
    "smoke": Plan(
        draws=3,
        sizes=(150, 400),
        starts=4,
        steps=5,
        planted=(400, 120),
        surrogates=(120, 8),
        totals=20,
    ),
    "quick": Plan(draws=24, poisson=(UNIFORM,)),
    "full": Plan(draws=48, regression=20),
    "study": Plan(draws=400, starts=64, regression=100),
}

Measured = dict[
    tuple[str, str, int], Float
]  # (method, scheme, size) -> the distortion, a draw each


def run(scale: str, rng: int) -> Report:
    """Draw, measure the distortions, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=1, scale=scale, seed=rng)
    A = breast_cancer()
    scores = all_scores(A)
    measured = distortions(A, scores, plan, rng)
    report.claims.extend(gain_claims(plan, measured))
    report.claims.append(bounds_claim(A, scores))
    report.tables.append(distortion_table(plan, measured))
    report.figures.extend([distortion_figure(plan, measured), score_figure(scores)])
    add_planted(report, plan, rng)
    part = A[: plan.surrogates[0], -plan.surrogates[1] :]
    add_surrogates(report, part, plan.totals, distortion_of(part, plan, rng), rng)
    if plan.regression:
        add_regression(report, plan.regression, rng)
    report.notes.append(
        "The distortion is the best of a gradient search (every draw gets the same starts), so a "
        "lower bound of the true one. Differences between the four scores are within noise."
    )
    return replace(report, seconds=time.perf_counter() - started)


# ── breast cancer: distortion at equal size ─────────────────────────────────────────────────────


def breast_cancer() -> Float:
    """569 x 31: columns with mean zero and variance one, and a column of ones."""
    x = load("breast-cancer").x
    assert x is not None
    return np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])


def all_scores(A: Float) -> dict[str, Float]:
    sigma, tau = lp_sensitivities(A, 1), leverage_scores(A)
    return {
        UNIFORM: np.ones(len(A)),
        SENSITIVITY: sigma,
        ROOT: np.sqrt(tau),
        LEWIS: lewis_weights(A, 1),
        PLUS: sigma + tau,
    }


def distortions(A: Float, scores: dict[str, Float], plan: Plan, rng: int) -> Measured:
    """The distortion of every draw of every arm."""
    arms: dict[tuple[str, str, int], list[Draw]] = {}
    for method, score in scores.items():
        for size in plan.sizes:
            arms[method, FIXED, size] = [
                systematic(score, size, rng=seed, order="random") for seed in seeds(plan, rng)
            ]
            if method in plan.poisson:
                arms[method, POISSON, size] = [
                    poisson(score, size, rng=seed) for seed in seeds(plan, rng)
                ]
    draws = [draw for each in arms.values() for draw in each]
    found = embedding_distortions(A, draws, 1, n_starts=plan.starts, steps=plan.steps, rng=rng)
    lower = np.reshape([one.lower for one in found], (len(arms), plan.draws))
    return dict(zip(arms, lower, strict=True))


def seeds(plan: Plan, rng: int) -> list[int]:
    return [10_000 * rng + i for i in range(plan.draws)]


def distortion_of(A: Float, plan: Plan, rng: int) -> Callable[[Float], Estimate]:
    """What a score's draws of 250 rows, fixed size, give: the median distortion."""
    size = min(plan.sizes[len(plan.sizes) // 2], len(A) // 2)

    def median(score: Float) -> Estimate:
        only = replace(plan, sizes=(size,), poisson=())
        found = distortions(A, {"score": score}, only, rng)["score", FIXED, size]
        return bootstrap_interval(found, statistic=np.median)

    return median


def gain(values: Float, axis: int = 0) -> Any:
    """1 - median / the better uniform median, averaged over sizes.

    values: (draws, sizes, 3), the last axis being method, uniform fixed, uniform Poisson.
    """
    median = np.median(values, axis=axis)
    return (1 - median[..., 0] / np.minimum(median[..., 1], median[..., 2])).mean(-1)


def gains(plan: Plan, measured: Measured, method: str, scheme: str = FIXED) -> Estimate:
    columns = [
        np.stack([measured[m, s, size] for size in plan.sizes], axis=1)
        for m, s in ((method, scheme), (UNIFORM, FIXED), (UNIFORM, POISSON))
    ]
    return bootstrap_interval(np.stack(columns, axis=2), statistic=gain)


def gain_claims(plan: Plan, measured: Measured) -> list[Claim]:
    return [
        Claim.at_least(
            f"{method}, fixed size: distortion below the better uniform, mean over sizes",
            SAYS,
            gains(plan, measured, method),
            GAIN,
            rule=f"at least {GAIN:.0%} less, medians of {plan.draws} draws, bootstrap interval",
        )
        for method in CLAIMED
    ]


def bounds_claim(A: Float, scores: dict[str, Float]) -> Claim:
    """Every inequality between sensitivities, Lewis weights, leverage and their totals."""
    sigma, d = scores[SENSITIVITY], A.shape[1]
    pairs = [
        lewis_bounds(scores[LEWIS], 1, d),
        leverage_bounds(scores[ROOT] ** 2, 1),
    ]
    slack = 1 + 1e-9
    broken = sum(
        int((low > sigma * slack).sum() + (sigma > high * slack).sum()) for low, high in pairs
    )
    low, high = total_bounds(1, d)
    total = float(sigma.sum())
    return Claim.judge(
        "total sensitivity, and bounds broken by a row",
        f"from {low:.2f} to {high:g}; every row between its bounds",
        f"{total:.3f} ({total / d:.0%} of d); {broken} broken",
        "no bound broken",
        broken == 0 and low <= total <= high,
    )


def distortion_table(plan: Plan, measured: Measured) -> ReportTable:
    rows: list[list[Any]] = []
    for method, scheme in dict.fromkeys((m, s) for m, s, _ in measured):
        cells = [
            bootstrap_interval(measured[method, scheme, size], statistic=np.median)
            for size in plan.sizes
        ]
        less = None if method == UNIFORM else gains(plan, measured, method, scheme)
        rows.append([method, scheme, *cells, less])
    columns = ["score", "scheme", *(f"{size} rows" for size in plan.sizes), "less than uniform"]
    title = f"Median distortion of ‖Ax‖_1, breast cancer 569 x 31, {plan.draws} draws"
    return ReportTable(title, columns, rows, note="Last column: against the better uniform.")


def distortion_figure(plan: Plan, measured: Measured) -> Figure:
    series = []
    for method in METHODS:
        cells = [
            bootstrap_interval(measured[method, FIXED, size], statistic=np.median)
            for size in plan.sizes
        ]
        series.append(
            Series(
                method,
                list(plan.sizes),
                [c.value for c in cells],
                [c.low for c in cells],
                [c.high for c in cells],
                baseline=method == UNIFORM,
            )
        )
    return Figure(
        "line",
        "Distortion at equal size (fixed size draws)",
        "rows kept of 569",
        "median distortion of ‖Ax‖_1",
        series,
        log_y=True,
    )


def score_figure(scores: dict[str, Float]) -> Figure:
    ranks = list(range(1, len(scores[SENSITIVITY]) + 1, 4))
    series = [
        Series(method, ranks, np.sort(scores[method])[::-1][::4].tolist())
        for method in (SENSITIVITY, LEWIS, ROOT)
    ]
    title = "How uneven the rows are"
    return Figure("line", title, "rank of the row", "score", series, log_y=True)


# ── a planted matrix: directions that few rows carry ────────────────────────────────────────────


def planted(n: int, rng: int, base: int = 10, heavy: int = 10) -> Float:
    """n rows in `base` directions; `heavy` of them are a thousand times longer, in new ones."""
    generator = np.random.default_rng(rng)
    A = np.zeros((n, base + heavy))
    A[:, :base] = generator.standard_normal((n, base))
    places = generator.choice(n, heavy, replace=False)
    A[places, base + np.arange(heavy)] = 1e3
    return A


def add_planted(report: Report, plan: Plan, rng: int) -> None:
    n, size = plan.planted
    A = planted(n, rng)
    rank = A.shape[1]
    rows: list[list[Any]] = []
    lost: dict[str, int] = {}
    for method, score in all_scores(A).items():
        draws = [
            systematic(score, size, rng=10_000 * rng + i, order="random") for i in range(plan.draws)
        ]
        ranks = [int(np.linalg.matrix_rank(A[d.indices] / np.abs(A).max(0))) for d in draws]
        lost[method] = sum(r < rank for r in ranks)
        found = embedding_distortions(A, draws[:12], 1, n_starts=8, steps=20, rng=rng)
        median = float(np.median([one.lower for one in found]))
        rows.append([method, f"{lost[method]}/{plan.draws}", float(np.mean(ranks)), median])
    title = f"Ten directions carried by one heavy row each: {n} x {rank}, {size} rows kept"
    columns = ["score", "draws that lose a direction", "mean rank", "median distortion"]
    report.tables.append(ReportTable(title, columns, rows))
    weighted = sum(lost[m] for m in METHODS if m != UNIFORM)
    report.claims.append(
        Claim.judge(
            "planted heavy rows: draws that lose a direction",
            "sensitivity-like scores give such rows probability one; uniform sampling has no bound",
            f"uniform {lost[UNIFORM]} of {plan.draws}, the four scores {weighted} of "
            f"{4 * plan.draws}",
            "every uniform draw and no other",
            lost[UNIFORM] == plan.draws and weighted == 0,
        )
    )
