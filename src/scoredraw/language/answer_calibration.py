"""Whether confidences in answers can be trusted, and how that changes with the number of samples.

With c the confidence in what is submitted and a the credit it earns (1 if right, 0 if wrong, a
share where ties are), over problems:

    ECE    Σ_b (m_b / m) |mean a - mean c| over 10 bins, (lower, upper]; c = 0 lies in none
    Brier  mean (a - c)²
    NLL    -mean [a log c + (1 - a) log(1 - c)], a and c both clipped to [1e-6, 1 - 1e-6]

as the evaluators released with "A theoretical study on bridging internal probability and
self-consistency for LLM reasoning" (Zhou et al., NeurIPS 2025, arXiv 2510.15444) have them.
A confidence that is a share should be computed as one division: a sum of n terms 1/n may cross the
edge of a bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import TABLE_CELLS, AnswerPool, check_subset_sizes
from scoredraw.errors import require
from scoredraw.language.perplexity_consistency import FEWEST, choose_in_rows, log_scores
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
# (pool, subsets (S, k)) -> the chance of submitting each sample (S, k), and the confidence (S,)
Confident = Callable[[AnswerPool, Int], tuple[Float, Float]]
Decide = Callable[[slice, Int], tuple[Float, Float]]  # the same of some pools, subsets (P, S, k)

CLIP = 1e-6


# ── metrics ─────────────────────────────────────────────────────────────────────────────────────


def calibration_metrics(
    confidence: ArrayLike, credit: ArrayLike, n_bins: int = 10
) -> dict[str, float]:
    """ECE, Brier score and NLL of confidences (m,) and credits (m,), both in [0, 1].

    Raises InputError for shapes that differ, no problems, and values outside [0, 1]. O(m).

    >>> found = calibration_metrics([0.9, 0.8, 0.3], [1.0, 1.0, 0.5])
    >>> {name: round(value, 4) for name, value in found.items()}
    {'ece': 0.1667, 'brier': 0.03, 'nll': 0.3696}
    """
    c, a = _checked(confidence, credit)
    require(c.ndim == 1, "confidence", f"{c.ndim} dimensions", "one")
    ece = float(expected_calibration_error(c, a, n_bins))
    return {"ece": ece, "brier": float(brier_score(c, a)), "nll": float(log_loss(c, a))}


def expected_calibration_error(confidence: ArrayLike, credit: ArrayLike, n_bins: int = 10) -> Float:
    """Σ_b (m_b / m) |mean credit - mean confidence| over the last axis, (..., m) -> (...).

    Equal bins (lower, upper]; a confidence of 0 falls in none, and is not counted.

    >>> expected_calibration_error([[0.3, 0.3], [1.0, 0.0]], [[1, 0], [1, 1]]).round(6).tolist()
    [0.2, 0.0]
    """
    c, a = _checked(confidence, credit)
    gaps = _binned(c, a - c, n_bins)
    return np.asarray(np.abs(gaps).sum(axis=-1) / c.shape[-1])


def brier_score(confidence: ArrayLike, credit: ArrayLike) -> Float:
    """mean (credit - confidence)² over the last axis.

    >>> float(brier_score([0.5, 1.0], [1.0, 1.0]))
    0.125
    """
    c, a = _checked(confidence, credit)
    return np.asarray(((a - c) ** 2).mean(axis=-1))


def log_loss(confidence: ArrayLike, credit: ArrayLike) -> Float:
    """-mean [a log c + (1 - a) log(1 - c)] over the last axis, a and c clipped by 1e-6.

    >>> float(log_loss([0.5], [1.0]).round(4)), float(log_loss([0.0], [1.0]).round(3))
    (0.6931, 13.815)
    """
    c, a = (np.clip(x, CLIP, 1 - CLIP) for x in _checked(confidence, credit))
    return np.asarray(-(a * np.log(c) + (1 - a) * np.log1p(-c)).mean(axis=-1))


@dataclass(frozen=True, eq=False)
class Reliability:
    """What a reliability diagram shows, for the bins that hold something.

    upper: upper edges; count: problems; confidence, credit: their means.
    """

    upper: Float
    count: Float
    confidence: Float
    credit: Float


def reliability(confidence: ArrayLike, credit: ArrayLike, n_bins: int = 10) -> Reliability:
    """Mean confidence and mean credit in each bin, over all of (..., m).

    >>> found = reliability([0.85, 0.95, 0.2], [1, 0, 0])
    >>> found.upper.round(1).tolist(), found.count.tolist()
    ([0.2, 0.9, 1.0], [1.0, 1.0, 1.0])
    """
    c, a = (x.reshape(-1) for x in _checked(confidence, credit))
    count = _binned(c, np.ones(len(c)), n_bins)
    held = count > 0
    means = [_binned(c, x, n_bins)[held] / count[held] for x in (c, a)]
    return Reliability(_edges(n_bins)[1:][held], count[held], *means)


def _edges(n_bins: int) -> Float:
    require(n_bins >= 1, "n_bins", n_bins, "1 or more")
    return np.linspace(0, 1, n_bins + 1)


def _binned(c: Float, values: Float, n_bins: int) -> Float:
    """Sums of values (..., m) by the bin of c, (..., n_bins)."""
    # edges[place - 1] < c <= edges[place]
    place = np.searchsorted(_edges(n_bins), c, side="left").reshape(-1, c.shape[-1])
    cells = place + (n_bins + 1) * np.arange(len(place))[:, None]
    sums = np.bincount(cells.reshape(-1), values.reshape(-1), minlength=len(place) * (n_bins + 1))
    return np.asarray(sums.reshape(*c.shape[:-1], n_bins + 1)[..., 1:], np.float64)


def _checked(confidence: ArrayLike, credit: ArrayLike) -> tuple[Float, Float]:
    c, a = np.asarray(confidence, np.float64), np.asarray(credit, np.float64)
    require(c.ndim >= 1 and c.size > 0, "confidence", f"shape {c.shape}", "one or more values")
    require(a.shape == c.shape, "credit", f"shape {a.shape}", f"{c.shape}, one a confidence")
    for name, x in (("confidence", c), ("credit", a)):
        wrong = np.argwhere(~((x >= 0) & (x <= 1)))
        came = f"{x[tuple(wrong[0])]} at {wrong[0].tolist()}" if len(wrong) else ""
        require(not len(wrong), name, came, "a number in [0, 1]")
    return c, a


# ── against the number of samples ───────────────────────────────────────────────────────────────


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
