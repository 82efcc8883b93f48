"""Choosing one of 1,000 samples for each of 1,000 problems by five methods, against scorio.

Both sides get rewards and answers: ours as numbers of answers, as a pool holds them, scorio's as
labels; a line of its own groups the labels too. The rewards are continuous, so that only votes tie,
and these go to the first on both sides. Where no answer is frequent enough the two fall back
differently; with this alpha some answer always is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.answers import group_answers
from scoredraw.language.best_of_majority import IN_ROWS, submit_one_in_rows

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

NAMES = {
    "majority": "majority vote",
    "bon": "best of n",
    "weighted": "weighted vote",
    "bom": "best-of-majority",
    "mob": "majority-of-the-bests",
}
ALPHA = 0.01


def answers(*, tiny: bool = False) -> Iterator[Contest]:
    """All five together, from numbers and from labels, and each alone."""
    labels, rewards = _samples(*((30, 100) if tiny else (1000, 1000)))
    codes = group_answers(labels)
    check = partial(_same, labels)
    size = f"{labels.shape[0]:,} problems x {labels.shape[1]:,} samples"

    def ours(methods: tuple[str, ...], numbers: Int) -> dict[str, Int]:
        return submit_one_in_rows(numbers, rewards, methods, alpha=ALPHA)

    def theirs(methods: tuple[str, ...]) -> dict[str, Any]:
        return {name: _scorio()[name](labels, rewards) for name in methods}

    yield Contest(
        f"five ways to choose, {size}", "scorio, one after the other",
        lambda: ours(IN_ROWS, codes), lambda: theirs(IN_ROWS), check, 1 / 20, repeats=3,
    )  # fmt: skip
    yield Contest(
        f"the same, grouping the labels first, {size}", "scorio, one after the other",
        lambda: ours(IN_ROWS, group_answers(labels)), lambda: theirs(IN_ROWS), check, repeats=3,
    )  # fmt: skip
    for name in IN_ROWS:
        one = (name,)
        yield Contest(
            f"{NAMES[name]}, {size}", "scorio", partial(ours, one, codes), partial(theirs, one),
            check, repeats=3,
        )  # fmt: skip


def _scorio() -> dict[str, Callable[[Int, Float], Any]]:
    from scorio import aggregate

    return {
        "majority": lambda labels, _: aggregate.majority_vote(labels),
        "bon": aggregate.best_of_n,
        "weighted": aggregate.weighted_majority_vote,
        "bom": partial(aggregate.best_of_majority, alpha=ALPHA),
        "mob": aggregate.majority_of_the_bests,
    }


def _samples(problems: int, n: int) -> tuple[Int, Float]:
    """Some dozens of answers a problem, and rewards that know a little."""
    rng = np.random.default_rng(0)
    labels = rng.geometric(0.05, (problems, n))
    return labels, rng.random((problems, n)) + 1 / labels


def _same(labels: Int, ours: dict[str, Int], theirs: dict[str, Any]) -> None:
    for name, samples in ours.items():
        chosen = np.take_along_axis(labels, samples[:, None], 1)[:, 0]
        np.testing.assert_array_equal(chosen, np.asarray(theirs[name], np.int64), err_msg=name)
