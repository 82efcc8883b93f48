"""Least absolute deviations on coresets of RAND's doctor visits: what a small sample costs.

min Σ |y - Xβ - β_0| on 20,190 x 10 is solved exactly on all rows and on weighted samples by each
score; the loss of each fit on all rows, above the least, is the cost. The samples are made in
memory, from a stream read twice, and from a stream read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.coresets.approximate import approximate_sensitivities, block_sensitivities
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.streaming import MergeReduce, score_stream
from scoredraw.datasets import load
from scoredraw.draws import Draw
from scoredraw.errors import MissingExtraError
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.reports import Claim, Report, ReportTable
from scoredraw.sampling import systematic

Float = NDArray[np.float64]

LEWIS, ONE_PASS = "Lewis weights", "Lewis weights, one pass (merge and reduce)"


@dataclass(frozen=True)
class Regression:
    """min Σ |y - Xβ - β_0|, solved exactly."""

    x: Float
    y: Float

    @property
    def matrix(self) -> Float:
        """[X, 1, y], whose row sensitivities bound each row's share of any residual."""
        return np.column_stack([self.x, np.ones(len(self.y)), self.y])

    def loss(self, rows: Any = slice(None), weights: Float | None = None) -> float:
        """The loss on all rows of the fit on some."""
        from sklearn.linear_model import QuantileRegressor

        model = QuantileRegressor(quantile=0.5, alpha=0, solver="highs")
        model.fit(self.x[rows], self.y[rows], sample_weight=weights)
        return float(np.abs(self.y - model.predict(self.x)).sum())


def add_regression(report: Report, draws: int, rng: int) -> None:
    """Excess loss of the coreset fits; a note where the data's package is absent."""
    try:
        data = load("randhie")
    except MissingExtraError as error:
        report.notes.append(f"The regression on randhie was not run: {error}.")
        return
    assert data.x is not None
    problem = Regression(data.x, data.y)
    A = problem.matrix
    tau = leverage_scores(A)
    sigma = approximate_sensitivities(A, 1, 500, rng=rng)
    scores = {
        "uniform": np.ones(len(A)),
        "sensitivity": sigma,
        "sensitivity, blocks of 8": block_sensitivities(A, 1, block=8, sample=500, rng=rng),
        "root leverage": np.sqrt(tau),
        LEWIS: lewis_weights(A, 1),
        "sensitivity + leverage": sigma + tau,
    }
    best = problem.loss()
    sizes = (200, 500, 1000)
    seeds = [10_000 * rng + i for i in range(draws)]
    excess: dict[tuple[str, int], Float] = {}
    for size in sizes:
        for method, score in scores.items():
            made = [systematic(score, size, rng=s, order="random") for s in seeds]
            excess[method, size] = excesses(problem, made, best)
        excess[ONE_PASS, size] = excesses(problem, [one_pass(A, size, s) for s in seeds], best)
    report.tables.append(regression_table(draws, sizes, excess))
    ratio = tau.max() / tau.mean()
    report.notes.append(
        f"randhie with its response: the largest leverage is {ratio:.1f} times the mean."
    )
    report.claims.extend(streaming_claims(A, scores[LEWIS], sizes[-1], excess, rng))


def excesses(problem: Regression, draws: list[Draw], best: float) -> Float:
    """How much larger the loss of each coreset's fit is than the least, in parts of it."""
    return np.array([problem.loss(d.indices, d.weights) / best - 1 for d in draws])


def one_pass(A: Float, size: int, seed: int) -> Draw:
    """A merge-and-reduce sample of the rows in a random order of arrival."""
    order = np.random.default_rng(seed).permutation(len(A))
    state = MergeReduce(p=1, size=size, block=4 * size, rng=seed)
    for start in range(0, len(A), 1000):
        state.push(A[order[start : start + 1000]])
    draw, _ = state.sample()
    return replace(draw, indices=order[draw.indices])


def regression_table(
    draws: int, sizes: tuple[int, ...], excess: dict[tuple[str, int], Float]
) -> ReportTable:
    methods = dict.fromkeys(method for method, _ in excess)
    rows: list[list[Any]] = [
        [method, *(mean_interval(100 * excess[method, size]) for size in sizes)]
        for method in methods
    ]
    title = "Least absolute deviations on a coreset, randhie 20,190 x 10: excess loss, percent"
    note = f"Mean of {draws} draws, fixed size (Poisson for the pass read once)."
    return ReportTable(title, ["score", *(f"{size} rows" for size in sizes)], rows, note)


def streaming_claims(
    A: Float, lewis: Float, size: int, excess: dict[tuple[str, int], Float], rng: int
) -> list[Claim]:
    """Two passes give the same draw to the bit; one pass costs little."""
    streamed = score_stream(lambda: np.array_split(A, 37), "lewis", 1)
    here, there = (systematic(s, size, rng=rng, order="random") for s in (lewis, streamed))
    differing = len(np.setxor1d(here.indices, there.indices))
    cost = paired_difference(excess[ONE_PASS, size], excess[LEWIS, size])
    return [
        Claim.judge(
            f"rows that differ between a stream in 37 chunks, read twice, and memory, {size} kept",
            "two passes give what one matrix in memory gives",
            f"{differing} rows; scores equal to the bit: {bool((streamed == lewis).all())}",
            "none, and equal scores",
            differing == 0 and bool((streamed == lewis).all()),
        ),
        Claim.at_most(
            f"excess loss added by reading the stream once instead of twice, {size} rows",
            "equal quality, up to the levels of the merge tree",
            cost,
            0.01,
            rule="at most 0.01 of the least loss, paired by seed",
        ),
    ]
