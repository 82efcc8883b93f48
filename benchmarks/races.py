"""Draws from ten million weights against NumPy's, and inclusion probabilities against a sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.draws import Draw
from scoredraw.sampling import calibrate_inclusion, exponential_keys

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

SCORES: dict[str, Callable[[np.random.Generator, int], Float]] = {
    "uniform": lambda rng, n: rng.random(n),
    "lognormal(3)": lambda rng, n: rng.lognormal(0.0, 3.0, n),
    "Pareto(1.1)": lambda rng, n: rng.pareto(1.1, n),
}


def keys(*, tiny: bool = False) -> Iterator[Contest]:
    """Weighted sampling without replacement, the same law by two ways."""
    n, sizes = (20_000, (200, 6_000)) if tiny else (10_000_000, (100_000, 3_000_000))
    weights = np.random.default_rng(0).lognormal(0.0, 1.0, n)
    p = weights / weights.sum()  # the peer insists; not on its clock
    pieces_agree(weights[: n // 10], sizes[0])
    for size, at_most in zip(sizes, (1 / 1.3, 1 / 20), strict=True):

        def ours(size: int = size) -> Draw:
            return exponential_keys(weights, size, rng=1)

        def choice(size: int = size) -> Int:
            return np.random.default_rng(1).choice(n, size, replace=False, p=p)

        def same_law(draw: Draw, chosen: Int, size: int = size) -> None:
            assert len(np.unique(draw.indices)) == len(np.unique(chosen)) == size
            mine, others = np.log(weights[draw.indices]), np.log(weights[chosen])
            error = np.sqrt(mine.var() / size + others.var() / size)
            assert abs(mine.mean() - others.mean()) < 5 * error  # false alarm: below 1e-6
            estimate = draw.total(weights * weights)
            assert abs(estimate.value - (weights @ weights)) < 6 * estimate.standard_error

        yield Contest(
            f"exponential keys, {size:,} of {n:,}", "Generator.choice(p, replace=False)",
            ours, choice, same_law, at_most, repeats=5,
        )  # fmt: skip


def pieces_agree(weights: Float, size: int) -> None:
    """Partition invariance: shuffled rows that keep their ids give the same draw."""
    whole = exponential_keys(weights, size, rng=1)
    order = np.random.default_rng(2).permutation(len(weights))
    shuffled = exponential_keys(weights[order], size, rng=1, ids=order)
    assert np.array_equal(np.sort(order[shuffled.indices]), whole.indices)


def calibrate(*, tiny: bool = False) -> Iterator[Contest]:
    """The water level of capped probabilities against sorting the scores once."""
    n, sizes = (20_000, (200, 6_000)) if tiny else (10_000_000, (100_000, 3_000_000))
    rng = np.random.default_rng(0)
    for name, make in SCORES.items():
        scores = make(rng, n)
        for size in sizes:
            what = f"calibrate_inclusion, {name}, {size:,} of {n:,}"
            yield _against_sort(what, scores, size)


def _against_sort(what: str, scores: Float, size: int) -> Contest:
    def is_the_level(found: tuple[Float, float], ascending: Float) -> None:
        q, alpha = found
        np.testing.assert_allclose(q.sum(), size, rtol=1e-9)
        np.testing.assert_allclose(alpha, level_of_sorted(ascending, size), rtol=1e-9)

    return Contest(
        what, "np.sort", lambda: calibrate_inclusion(scores, size), lambda: np.sort(scores),
        is_the_level, 1.0,
    )  # fmt: skip


def level_of_sorted(ascending: Float, size: int) -> float:
    """alpha from sorted scores: with the m largest at one it is (sum of the rest) / (size - m)."""
    sums = np.cumsum(ascending)
    n = len(ascending)
    ones = np.arange(size)
    levels = sums[n - 1 - ones] / (size - ones)
    largest_below = ascending[n - 1 - ones]
    return float(levels[np.argmax(levels >= largest_below)])
