"""Whether a stated probability can be trusted: calibration and proper scores.

With c the confidence and a the credit earned (1 if right, 0 if wrong, a share where ties are):

    ECE        Σ_b (m_b / m) |mean a - mean c| over equal bins of c
    Brier      mean (a - c)²
    NLL        -mean [a log c + (1 - a) log(1 - c)], a and c both clipped to [1e-6, 1 - 1e-6]
    AUROC      the chance that a right one has more confidence than a wrong one, ties a half

A proper score S(q, a) of a stated probability q is largest on average where q is the truth;
`PROPER_SCORES` has those that training may use as a reward (Gneiting and Raftery 2007).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from scoredraw.errors import require

Float = NDArray[np.float64]

CLIP = 1e-6


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


def expected_calibration_error(
    confidence: ArrayLike, credit: ArrayLike, n_bins: int = 10, *, closed: str = "right"
) -> Float:
    """Σ_b (m_b / m) |mean credit - mean confidence| over the last axis, (..., m) -> (...).

    closed: equal bins (lower, upper] ("right": a confidence of 0 falls in none, and is not counted)
    or [lower, upper) ("left": the last holds 1). The edges are those of linspace, in which .3, .6
    and .7 lie a rounding above the decimal: round confidences change bins with `closed`.

    >>> expected_calibration_error([[0.3, 0.3], [1.0, 0.0]], [[1, 0], [1, 1]]).round(6).tolist()
    [0.2, 0.0]
    """
    c, a = _checked(confidence, credit)
    gaps = _binned(c, a - c, n_bins, closed)
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


def _binned(c: Float, values: Float, n_bins: int, closed: str = "right") -> Float:
    """Sums of values (..., m) by the bin of c, (..., n_bins)."""
    require(closed in {"right", "left"}, "closed", repr(closed), "'right' or 'left'")
    if closed == "right":  # edges[place - 1] < c <= edges[place]
        place = np.searchsorted(_edges(n_bins), c, side="left")
    else:  # edges[place - 1] <= c < edges[place]
        place = np.searchsorted(_edges(n_bins)[:-1], c, side="right")
    place = place.reshape(-1, c.shape[-1])
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


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """P(c of a right one > c of a wrong one) + P(equal) / 2, of (m,).

    NaN, with a warning, where all are right or all are wrong.

    >>> auroc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0])
    0.875
    """
    c, a = _checked(confidence, correct)
    require(c.ndim == 1, "confidence", f"{c.ndim} dimensions", "one")
    require(bool(np.isin(a, (0.0, 1.0)).all()), "correct", "a share", "0 or 1")
    right = int(a.sum())
    wrong = len(a) - right
    if not right or not wrong:
        warnings.warn("auroc: all are right, or all are wrong", RuntimeWarning, stacklevel=2)
        return math.nan
    return float((rankdata(c)[a == 1].sum() - right * (right + 1) / 2) / (right * wrong))


# ── proper scores ───────────────────────────────────────────────────────────────────────────────


def quadratic_score(q: ArrayLike, correct: ArrayLike) -> Float:
    """-(q - a)², the Brier score as a reward; in [-1, 0].

    >>> quadratic_score([0.5, 0.0], [1, 1]).tolist()
    [-0.25, -1.0]
    """
    q, a = _both(q, correct)
    return np.asarray(-((q - a) ** 2))


def spherical_score(q: ArrayLike, correct: ArrayLike) -> Float:
    """(a q + (1 - a)(1 - q)) / sqrt(q² + (1 - q)²) - 1; in [-1, 0].

    >>> spherical_score([1.0, 0.5], [1, 0]).round(4).tolist()
    [0.0, -0.2929]
    """
    q, a = _both(q, correct)
    return np.asarray((a * q + (1 - a) * (1 - q)) / np.hypot(q, 1 - q) - 1)


def logarithmic_score(q: ArrayLike, correct: ArrayLike, clip: float = 1e-3) -> Float:
    """a log q + (1 - a) log(1 - q), q clipped to [clip, 1 - clip]; in [log clip, 0].

    >>> logarithmic_score([0.5, 0.0], [1, 1]).round(3).tolist()
    [-0.693, -6.908]
    """
    q, a = _both(q, correct)
    require(0 < clip < 0.5, "clip", clip, "a number in (0, 0.5)")
    q = np.clip(q, clip, 1 - clip)
    return np.asarray(a * np.log(q) + (1 - a) * np.log1p(-q))


PROPER_SCORES: dict[str, Callable[[ArrayLike, ArrayLike], Float]] = {
    "brier": quadratic_score,
    "spherical": spherical_score,
    "log": logarithmic_score,
}


def _both(q: ArrayLike, correct: ArrayLike) -> tuple[Float, Float]:
    return np.asarray(q, np.float64), np.asarray(correct, np.float64)
