"""Confidences of 1,000 samples for each of 1,000 problems against the released code's way.

That way is written anew here, plainly: a function says whether two answers are equal and is asked
about every sample and the head of every group (the released loop goes on after it has found the
group), a path's text keys a set of probabilities in its group, and SciPy minimises the mixture's
likelihood, in densities, with numerical gradients, one problem after the other. The time of both
goes with the number of problems (ours by the hundred, on each of two threads), so the contest is on
a fifth of them; all are timed alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import gamma

from benchmarks.contest import Contest, Limit
from scoredraw.answers import group_answers
from scoredraw.language.perplexity_consistency import choose_in_rows

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

SHARE = 5  # the loop is measured on one problem of so many
FASTER = 20
SECONDS = 5.0  # for all problems


def rpc(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Both sides get answers, log-probabilities a token and texts' numbers, and group."""
    problems, n = (40, 60) if tiny else (1000, 1000)
    answers, log_p, paths = _samples(problems, n)
    few = problems // SHARE

    def ours(count: int = few) -> Float:
        codes = group_answers(answers[:count])
        return choose_in_rows(codes, log_p[:count], paths[:count], "rpc").confidence

    def loop() -> list[dict[Any, float]]:
        parts = (rows[:few].tolist() for rows in (answers, log_p, paths))
        return [_one_problem(*row) for row in zip(*parts, strict=True)]

    def every() -> float:
        started = time.perf_counter()
        ours(problems)
        return time.perf_counter() - started

    yield Contest(
        f"RPC, {few:,} of {problems:,} problems x {n:,} samples", "a loop, SciPy",
        ours, loop, lambda a, b: _alike(answers, a, b), 1 / FASTER, repeats=5,
    )  # fmt: skip
    yield Limit(f"RPC, {problems:,} problems x {n:,} samples", "s", every, SECONDS)


def _samples(problems: int, n: int) -> tuple[Int, Float, Int]:
    """Some dozens of answers a problem, the frequent ones along likelier paths; few texts twice."""
    rng = np.random.default_rng(0)
    answers = rng.geometric(0.05, (problems, n))
    p = rng.beta(12, 3 + answers / 10)
    paths = np.tile(np.arange(n), (problems, 1))
    paths[:, 1::10] = paths[:, ::10]  # every tenth text comes twice
    for column in (answers, p):
        column[:, 1::10] = column[:, ::10]
    return answers, np.log(p), paths


def _one_problem(answers: list[int], log_p: list[float], paths: list[int]) -> dict[Any, float]:
    p = np.exp(log_p)
    low = _lower_component(p)
    groups: list[tuple[Any, dict[int, set[float]]]] = []
    for answer, path, value, pruned in zip(answers, paths, p.tolist(), low, strict=True):
        mine = None
        for head, scores in groups:
            if _equal(head, answer):
                mine = scores
        if mine is None:
            mine = {}
            groups.append((answer, mine))
        if not pruned:
            mine.setdefault(path, set()).add(value)
    sums = {head: sum(map(sum, scores.values())) for head, scores in groups}
    total = sum(sums.values())
    return {head: value / total for head, value in sums.items()}


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b)


def _lower_component(p: Float) -> list[bool]:
    """Which probabilities are pruned."""

    def density(x: Float, k: float, scale: float) -> Float:
        return np.asarray(k / scale * (x / scale) ** (k - 1) * np.exp(-((x / scale) ** k)))

    def loss(theta: Float) -> float:
        w, k1, scale1, k2, scale2 = theta
        mixed = w * density(p, k1, scale1) + (1 - w) * density(p, k2, scale2)
        return float(-np.log(mixed).sum())

    bounds = [(0.2, 0.8), *[(0.01, None)] * 4]
    with np.errstate(all="ignore"):
        w, k1, scale1, k2, scale2 = minimize(loss, [0.5, 1, 1, 1.5, 2], bounds=bounds).x
        first, second = w * density(p, k1, scale1), (1 - w) * density(p, k2, scale2)
        if scale1 * gamma(1 + 1 / k1) < scale2 * gamma(1 + 1 / k2):
            first, second = second, first
        pruned = (first / (first + second) < 0.5) & (p < p.mean())
    return [bool(value) for value in pruned]


def _alike(answers: Int, ours: Float, theirs: list[dict[Any, float]]) -> None:
    """Fits end where the optimiser stops: a sample on the edge may fall to the other side."""
    for row, confidence, want in zip(answers, ours, theirs, strict=False):
        codes = group_answers(row)
        heads = row[np.unique(codes, return_index=True)[1]]
        mine = [want[int(head)] for head in heads]
        np.testing.assert_allclose(confidence[: len(heads)], mine, rtol=0, atol=2e-3)
