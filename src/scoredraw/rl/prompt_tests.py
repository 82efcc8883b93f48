"""Scoring a generator by test points: what each prompt asks for, checked one by one.

A prompt names several things its picture (or text) has to have, each of a criterion such as
"Action - Hand"; a judge says of each whether it is there. The score of a criterion is the share of
its test points that are satisfied, over all samples; what stands before the hyphen is its primary
criterion; the overall score is the mean of the primary ones, so that none counts for having many
test points. The points of one prompt are judged on the same samples: intervals resample prompts.

Wang et al. 2025, arXiv 2508.20751 (UniGenBench: 600 prompts, 4 samples each, 10 primary criteria).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.metrics import Estimate, bootstrap_interval


@dataclass(frozen=True)
class PromptTestScores:
    """Shares of satisfied test points with intervals over prompts; `missing`: checks without one.

    overall: the mean of the primary criteria that have a check.
    """

    overall: Estimate
    primary: Mapping[str, Estimate]
    criteria: Mapping[str, Estimate]
    missing: int


def prompt_test_scores(
    satisfied: Sequence[Any],
    criteria: Sequence[str],
    prompts: Sequence[Any],
    *,
    separator: str = " - ",
    level: float = 0.95,
    resamples: int = 2000,
    rng: Any = 0,
) -> PromptTestScores:
    """Scores by criterion, by primary criterion and overall.

    One row a check of a test point on a sample: satisfied 1 or 0 (None or NaN: the judge gave no
    verdict, left out; the released script asks for ever), its criterion, the prompt. Raises
    InputError for lengths, other values, nothing judged and fewer than two prompts.
    O(checks + prompts · criteria · resamples).

    >>> found = prompt_test_scores(
    ...     [1, 0, 1, 1], ["Action - Hand", "Action - Animal", "Style", "Style"], [0, 0, 1, 1])
    >>> found.overall.value, {name: e.value for name, e in found.primary.items()}
    (0.75, {'Action': 0.5, 'Style': 1.0})
    """
    odd = [s for s in satisfied if not (s is None or s != s or s in (0, 1))]
    require(not odd, "satisfied", repr(odd[:1]), "1, 0 or None")
    y = np.array([np.nan if s is None else s for s in satisfied], np.float64)
    n = len(y)
    for name, column in (("criteria", criteria), ("prompts", prompts)):
        require(len(column) == n, name, f"{len(column)} rows", f"{n}, one a check")
    known = ~np.isnan(y)
    require(bool(known.any()), "satisfied", "no verdict", "one or more")
    names = np.array([str(c) for c in criteria], object)[known]
    heads = np.array([c.split(separator)[0].strip() for c in names], object)
    _, prompt = np.unique(np.array([repr(p) for p in prompts], object)[known], return_inverse=True)
    require(prompt.max() > 0, "prompts", "one prompt", "at least 2, for the intervals")

    def shares(labels: NDArray[Any]) -> tuple[list[str], NDArray[np.float64]]:
        """The names, and sums and counts by prompt (prompts, names, 2)."""
        found, code = np.unique(labels, return_inverse=True)
        table = np.zeros((prompt.max() + 1, len(found), 2))
        np.add.at(table, (prompt, code), np.stack([y[known], np.ones(known.sum())], axis=1))
        return found.tolist(), table

    options: dict[str, Any] = {"level": level, "resamples": resamples, "rng": rng}

    def each(labels: NDArray[Any]) -> dict[str, Estimate]:
        found, table = shares(labels)
        return {
            name: bootstrap_interval(table[table[:, i, 1] > 0, i], statistic=_share, **options)
            for i, name in enumerate(found)
        }

    overall = bootstrap_interval(shares(heads)[1], statistic=_mean_share, **options)
    return PromptTestScores(overall, each(heads), each(names), int(n - known.sum()))


def _share(rows: Any, axis: int) -> Any:
    """Σ satisfied / Σ checks; NaN where a resample has no check of a criterion."""
    with np.errstate(invalid="ignore"):
        total = rows.sum(axis=axis)
        return total[..., 0] / total[..., 1]


def _mean_share(rows: Any, axis: int) -> Any:
    return np.nanmean(_share(rows, axis), axis=-1)
