"""How far the confidence in an answer can be trusted, and how that changes with the samples.

The metrics are those of `scoredraw.calibration`, as the evaluators released with "A theoretical
study on bridging internal probability and self-consistency for LLM reasoning" (Zhou et al.,
NeurIPS 2025, arXiv 2510.15444) have them. A confidence that is a share should be computed as one
division: a sum of n terms 1/n may cross the edge of a bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import TABLE_CELLS, AnswerPool, check_subset_sizes
from scoredraw.calibration import brier_score, expected_calibration_error, log_loss
from scoredraw.errors import require
from scoredraw.language.perplexity_consistency import FEWEST, choose_in_rows, log_scores
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
# (pool, subsets (S, k)) -> the chance of submitting each sample (S, k), and the confidence (S,)
Confident = Callable[[AnswerPool, Int], tuple[Float, Float]]
Decide = Callable[[slice, Int], tuple[Float, Float]]  # the same of some pools, subsets (P, S, k)


@dataclass(frozen=True, eq=False)
class CalibrationCurve:
    """Confidences and credits at sizes k (K,): credit[j] and confidence[j] are (R, P).

    A row is one random k-subset of the samples of each of P problems; R is 1 where k takes all.
    """

    k: Int
    credit: tuple[Float, ...]
    confidence: tuple[Float, ...]

    @property
    def accuracy(self) -> Float:
        """Mean credit at each k, (K,)."""
        return np.array([credit.mean() for credit in self.credit])

    @property
    def ece(self) -> Float:
        """Mean over the rows of the expected calibration error of each, (K,)."""
        return self._mean(expected_calibration_error)

    @property
    def brier(self) -> Float:
        """Mean Brier score, (K,)."""
        return self._mean(brier_score)

    @property
    def nll(self) -> Float:
        """Mean log loss, (K,)."""
        return self._mean(log_loss)

    def _mean(self, metric: Callable[[Float, Float], Float]) -> Float:
        pairs = zip(self.confidence, self.credit, strict=True)
        return np.array([metric(c, a).mean() for c, a in pairs])


def calibration_at_k(
    pools: Sequence[AnswerPool],
    credits_: Sequence[ArrayLike],
    ks: ArrayLike,
    method: str | Confident = "rpc",
    *,
    repeats: int = 20,
    rng: int | np.random.Generator | None = 0,
    normalize: str = "mean",
    invalid: str = "drop",
    fewest: int = FEWEST,
) -> CalibrationCurve:
    """Accuracy and calibration of confidences with k of the n samples of each problem.

    pools: P; credits_: the credit of each of their samples, (n,) in [0, 1]; a null answer earns
    nothing. ks: (K,), 1 ≤ k ≤ the smallest n. method: "sc", "ppl", "verb", "pc", "rpc" (with the
    options of `perplexity_consistency.choose`), or a function of a pool and subsets (S, k) that
    gives the chance of submitting each sample (S, k) and the confidence (S,). repeats: random
    subsets for each k, the same for every method that is given the same seed.
    Raises InputError as `choose`, for no problems, and for k that are too large.

    Time: K · repeats · P choices. Memory O(repeats · P).

    >>> pool = AnswerPool.of(["7", "7", "12", "7"])
    >>> curve = calibration_at_k([pool], [[1, 1, 0, 1]], [1, 4], "sc", repeats=8)
    >>> float(curve.accuracy[1]), float(curve.ece[1]), curve.confidence[0].shape
    (1.0, 0.25, (8, 1))
    """
    require(len(pools) > 0, "pools", "none", "one or more problems")
    require(repeats >= 1, "repeats", repeats, "1 or more")
    require(len(credits_) == len(pools), "credits_", f"{len(credits_)} rows", f"{len(pools)}")
    sizes = check_subset_sizes(ks, min(pool.n for pool in pools))
    gains = [
        np.where(pool.null, 0.0, np.asarray(credit, np.float64))
        for pool, credit in zip(pools, credits_, strict=True)
    ]
    if isinstance(method, str):
        decide = _by_name(pools, method, normalize, invalid, fewest)
    else:
        decide = _by_function(pools, method)
    random = generator(rng)
    credits, confidences = [], []
    for k in sizes.tolist():
        rows = 1 if all(pool.n == k for pool in pools) else repeats
        earned, sure = np.empty((2, len(pools), rows))
        block = max(1, TABLE_CELLS // (rows * max(pool.n for pool in pools)))
        for start in range(0, len(pools), block):
            some = slice(start, start + block)
            drawn = [np.argsort(random.random((rows, p.n)), axis=1)[:, :k] for p in pools[some]]
            subsets = np.stack(drawn)
            choice, sure[some] = decide(some, subsets)
            gain = np.stack([g[s] for g, s in zip(gains[some], subsets, strict=True)])
            earned[some] = (choice * gain).sum(axis=2)
        credits.append(np.clip(earned, 0.0, 1.0).T)  # shares of ties round
        confidences.append(sure.T)
    return CalibrationCurve(sizes, tuple(credits), tuple(confidences))


def _by_function(pools: Sequence[AnswerPool], method: Confident) -> Decide:
    def decide(some: slice, subsets: Int) -> tuple[Float, Float]:
        choices, sure = zip(*map(method, pools[some], subsets), strict=True)
        return np.stack(choices), np.stack(sure)

    return decide


def _by_name(
    pools: Sequence[AnswerPool], method: str, normalize: str, invalid: str, fewest: int
) -> Decide:
    """All subsets of several pools at once."""
    known: list[tuple[Int, Float, Int]] = [
        (pool.codes, log_scores(pool, method, normalize), pool.path_codes) for pool in pools
    ]

    def decide(some: slice, subsets: Int) -> tuple[Float, Float]:
        rows = zip(known[some], subsets, strict=True)
        parts = zip(*([part[s] for part in one] for one, s in rows), strict=True)
        codes, log_p, paths = map(np.concatenate, parts)
        found = choose_in_rows(
            codes, log_p, paths, method, relative=normalize == "sum", invalid=invalid,
            fewest=fewest,
        )  # fmt: skip
        return found.choice.reshape(subsets.shape), found.top.reshape(subsets.shape[:2])

    return decide
