"""A reward for being right and for knowing how likely that is.

With c = 1 where the answer y is right and q the confidence stated with it,

    R(y, q)  =  c + λ S(q, c),                 S(q, c) = -(q - c)²   (RLCR: Brier, λ = 1).

An answer that is right with probability p is worth the most with q = p, since S is proper, and then

    V(p) = max_q E R = p + λ [p S(p, 1) + (1 - p) S(p, 0)]           (RLCR: p²).

If V rises everywhere, the best policy gives its likeliest answer and says how likely that is. V is
convex with V'(p) = 1 + λ [S(p, 1) - S(p, 0)], so that it rises iff

    λ [S(0, 0) - S(0, 1)] <= 1                 (Brier and spherical: λ <= 1; log, clipped: .145).

Above, an answer that is surely wrong, with q = 0, pays more than an honest unlikely one, and
training learns to be wrong on purpose. As rewards for text, with the format gate g, the paper gives

    weights · (g, g c, g [1 + λ S(q, c)])      weights .5 each, in TRL without scaling by deviation:
                                               GRPOConfig(scale_rewards="none", beta=0.0, ...)

Damani, Puri, Slocum, Shenfeld, Choshen, Kim and Andreas, "Beyond binary rewards: training LMs to
reason about their uncertainty", 2025, arXiv 2507.16806. The condition on λ is derived here.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from scoredraw.calibration import PROPER_SCORES, auroc, brier_score, expected_calibration_error
from scoredraw.errors import InputError, require
from scoredraw.rl.reward_functions import RewardFunction, completion_text, number_or_none
from scoredraw.rl.verbal_confidence import (
    FORMATS,
    StatedAnswer,
    Verifier,
    check_format,
    logged_confidence,
    read_stated,
    verifiers_by_source,
)

Float = NDArray[np.float64]
Score = Callable[[ArrayLike, ArrayLike], Any]

GRID = np.linspace(0, 1, 101)
SLACK = 1e-9
EXTREME = 0.01  # a confidence as near as this to 0 or 1 is one of the two
LOGGER_WEIGHT = 1e-6  # so that TRL logs what doesn't count

log = logging.getLogger(__name__)

# ── the reward, and whether it keeps a policy honest ────────────────────────────────────────────


def find_score(score: str | Score) -> Score:
    """A proper score by its name (`calibration.PROPER_SCORES`), or a function S(q, c) of arrays.

    Raises InputError for another name, and for a function that isn't bounded on [0, 1] or isn't
    proper: for which some q pays more than q = p. Checked on a grid of hundredths.

    >>> find_score(lambda q, c: -abs(q - c))
    Traceback (most recent call last):
    scoredraw.errors.InputError: score: got q = 0 paid more than q = 0.01, which is true, want a proper score
    """  # noqa: E501
    if not callable(score):
        require(score in PROPER_SCORES, "score", repr(score), ", ".join(PROPER_SCORES))
        return PROPER_SCORES[score]
    right, wrong = (np.asarray(score(GRID, np.full(101, c)), np.float64) for c in (1.0, 0.0))
    shapes = right.shape == wrong.shape == GRID.shape
    require(shapes, "score", f"shapes {right.shape}, {wrong.shape}", "a number for each q")
    bounded = bool(np.isfinite(right).all() and np.isfinite(wrong).all())
    require(bounded, "score", "values that are not finite", "a score bounded on [0, 1]")
    expected = GRID[:, None] * right + (1 - GRID[:, None]) * wrong  # (p, q)
    loss = expected.max(axis=1) - np.diagonal(expected)
    if (loss > SLACK).any():
        p = int(np.argmax(loss > SLACK))
        came = f"q = {GRID[expected[p].argmax()]:g} paid more than q = {GRID[p]:g}, which is true"
        require(False, "score", came, "a proper score")
    return score


def calibrated_reward(
    correct: ArrayLike, confidence: ArrayLike, score: str | Score = "brier", lam: float = 1.0
) -> Float:
    """c + λ S(q, c), elementwise; in [-1, 1] for Brier and spherical with λ = 1. NaN stays NaN.

    correct, confidence: numbers in [0, 1] that broadcast. Raises InputError for others, a negative
    λ, and as `find_score` does.

    >>> calibrated_reward([1, 1, 0], [0.9, 0.2, 0.8]).round(2).tolist()
    [0.99, 0.36, -0.64]
    """
    c, q = _unit(correct, "correct"), _unit(confidence, "confidence")
    require(0 <= lam < math.inf, "lam", lam, "a number of at least 0")
    return np.asarray(c + lam * np.asarray(find_score(score)(q, c), np.float64))


def _unit(values: ArrayLike, name: str) -> Float:
    x = np.asarray(values, np.float64)
    outside = x[(x < 0) | (x > 1)]
    require(not outside.size, name, outside[:1].tolist(), "numbers in [0, 1]")
    return x


def expected_reward(
    p: ArrayLike, q: ArrayLike, score: str | Score = "brier", lam: float = 1.0
) -> Float:
    """E R of an answer that is right with probability p, stated with confidence q.

    p (1 + λ S(q, 1)) + (1 - p) λ S(q, 0). Broadcasts; raises as `calibrated_reward`, also for p.

    >>> float(expected_reward(0.6, 0.6).round(9)), float(expected_reward(0.6, 1.0).round(9))
    (0.36, 0.2)
    """
    chance = _unit(p, "p")
    right, wrong = (calibrated_reward(c, q, score, lam) for c in (1.0, 0.0))
    return np.asarray(chance * right + (1 - chance) * wrong)


def largest_lam(score: str | Score = "brier") -> float:
    """The largest λ with which the likeliest answer is always worth the most: formula at the head.

    >>> largest_lam("brier"), largest_lam("spherical"), round(largest_lam("log"), 4)
    (1.0, 1.0, 0.1448)
    """
    S = find_score(score)
    zero = np.zeros(1)
    gap = float(S(zero, zero)[0] - S(zero, zero + 1)[0])
    return 1 / gap if gap > 0 else math.inf  # a constant is proper too


class WrongPays(NamedTuple):
    """For which p it pays to be less right.

    falls_below: V falls up to here, so that of two unlikely answers the less likely is worth more;
    pays_below: an answer that is surely wrong is worth more than an honest one of this p.
    Both are 0 where V rises everywhere.
    """

    falls_below: float
    pays_below: float


def wrong_on_purpose(
    score: str | Score = "brier", lam: float = 1.0, accuracy: float = 1.0
) -> WrongPays:
    """Where a reward accuracy · c + λ S(q, c) teaches to be wrong on purpose.

    accuracy: the weight of being right; 0 is the score alone. The first is the root of V'; the
    second the other root of V(p) = V(0), or 1. Raises InputError as `find_score` and for negative
    weights.

    >>> wrong_on_purpose("brier"), wrong_on_purpose("brier", lam=2.0)
    (WrongPays(falls_below=0.0, pays_below=0.0), WrongPays(falls_below=0.25, pays_below=0.5))
    """
    S = find_score(score)
    finite = 0 <= lam < math.inf and 0 <= accuracy < math.inf
    require(finite, "lam, accuracy", (lam, accuracy), "numbers of at least 0")

    def both(p: float) -> tuple[float, float]:
        q = np.array([p, p])
        right, wrong = np.asarray(S(q, np.array([1.0, 0.0])), np.float64)
        return float(right), float(wrong)

    def slope(p: float) -> float:
        right, wrong = both(p)
        return accuracy + lam * (right - wrong)

    def gain(p: float) -> float:
        right, wrong = both(p)
        return accuracy * p + lam * (p * right + (1 - p) * wrong - both(0.0)[1])

    if slope(0.0) >= -SLACK:
        return WrongPays(0.0, 0.0)
    falls = float(brentq(slope, 0.0, 1.0, xtol=1e-13)) if slope(1.0) > 0 else 1.0
    pays = float(brentq(gain, falls, 1.0, xtol=1e-13)) if gain(1.0) > SLACK else 1.0
    return WrongPays(round(falls, 12), round(pays, 12))


# ── as TRL calls it ─────────────────────────────────────────────────────────────────────────────


class Judged(NamedTuple):
    """A batch as it was read, (B,) each: the gate; c, 0 behind a closed gate and NaN where nothing
    can be said (no gold answer, the verifier failed); q, NaN where there is none to trust."""

    well_formed: Float
    correct: Float
    confidence: Float


class RLCRReward:
    """weights · (g, g c, g [1 + λ S(q, c)]) for completions with answer and confidence in tags.

    format, strict_tags, percent: as `verbal_confidence.read_stated`.
    verifier: "exact" (SQuAD's normalisation), "math" (math-verify), a function (answer, gold) ->
    bool or a credit in [0, 1]; or a mapping from the row's source to one of these, where the
    released code takes the first row's for the whole batch.
    score, lam: S and λ; weights: of format, accuracy and calibration, (.5, .5, .5) as published.
    when_wrong_pays: "refuse" or "warn" where λ · weights[2] / weights[1] is above `largest_lam`.
    gold, source: the data set's columns with right answers and sources.

    Called as `reward(prompts, completions, answer=[...])`, completions as texts or messages; gives
    a number a row: 0 without the right tags, and None for what can't be scored: a gold answer of
    None, a source without verifier, a verifier that raised, a completion that is no text. It never
    raises for what a completion holds, but InputError for columns that aren't there or too short.
    `parts()` are three functions for TRL's `reward_weights`, `loggers()` two that don't count.
    Format "ta" has no confidence: give it weights (.5, .5, 0).

    >>> reward = RLCRReward("tac")
    >>> said = "</think><answer>Paris</answer><confidence>0.8</confidence>"
    >>> found = reward(["?"] * 3, [said, said, "no tags"], answer=["paris", "Rome", "Rome"])
    >>> [round(value, 9) for value in found]
    [1.48, 0.68, 0.0]
    """

    def __init__(
        self,
        format: str = "tabc",
        verifier: str | Verifier | Mapping[str, str | Verifier] = "exact",
        score: str | Score = "brier",
        lam: float = 1.0,
        weights: Sequence[float] = (0.5, 0.5, 0.5),
        *,
        strict_tags: bool = False,
        percent: bool = False,
        when_wrong_pays: str = "refuse",
        gold: str = "answer",
        source: str = "source",
    ) -> None:
        check_format(format)
        known = when_wrong_pays in {"refuse", "warn"}
        require(known, "when_wrong_pays", repr(when_wrong_pays), "'refuse' or 'warn'")
        self.weights = np.asarray(weights, np.float64)
        fits = self.weights.shape == (3,) and bool((self.weights >= 0).all())
        fits = fits and 0 < self.weights.sum() < math.inf
        require(fits, "weights", weights, "three numbers of at least 0, not all 0")
        speaks = "confidence" in FORMATS[format]
        wanted = "0 for the third: this format has no confidence"
        require(speaks or self.weights[2] == 0, "weights", weights, wanted)
        self.format, self.strict_tags, self.percent = format, strict_tags, percent
        self.score, self.lam = find_score(score), lam
        self.gold, self.source = gold, source
        self._verifier = verifiers_by_source(verifier)
        self._by_source = isinstance(verifier, Mapping)
        self.__name__ = "rlcr_reward"
        pays = wrong_on_purpose(score, lam * self.weights[2], self.weights[1])
        if pays.pays_below > 0:
            problem = f"wrong answers on purpose pay where the best is right below {pays[1]:.3g}"
            most = f"lam of at most {largest_lam(score) * self.weights[1] / self.weights[2]:.3g}"
            require(when_wrong_pays == "warn", "lam", f"{lam:g}, with which {problem}", most)
            warnings.warn(f"RLCRReward: {problem}; want {most}", RuntimeWarning, stacklevel=2)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The weighted sum of the three parts, a row each."""
        judged = self.judge(completions, **columns)
        if completions and callable(columns.get("log_metric")):
            self._log(judged, columns["log_metric"])
        return _listed(np.stack(self._parts(judged), axis=1) @ self.weights)

    def judge(self, completions: Sequence[Any], **columns: Any) -> Judged:
        """Gate, correctness and confidence of a batch, with the data set's columns."""
        n = len(completions)
        needed = [self.gold, self.source] if self._by_source else [self.gold]
        for name in needed:
            values = columns.get(name)
            rows = len(values) if isinstance(values, (Sequence, np.ndarray)) else None
            require(rows == n, name, rows if rows else "no column", f"a column of {n} rows")
        golds, sources = columns[self.gold], columns.get(self.source) if self._by_source else None
        read = [
            self._row(completion, golds[i], None if sources is None else sources[i])
            for i, completion in enumerate(completions)
        ]
        return Judged(*np.array(read, np.float64).reshape(n, 3).T)

    def _row(self, completion: Any, gold: Any, source: Any) -> tuple[float, float, float]:
        verify = self._verifier(source)
        try:
            text = completion_text(completion)
        except InputError:
            return 0.0, math.nan, math.nan
        said = read_stated(text, self.format, strict_tags=self.strict_tags, percent=self.percent)
        q = math.nan if said.confidence is None else said.confidence
        if gold is None or verify is None:
            return float(said.well_formed), math.nan, q
        return float(said.well_formed), _credit(verify, said, gold), q

    def _parts(self, judged: Judged) -> tuple[Float, Float, Float]:
        """Format, accuracy and calibration, NaN where nothing can be said."""
        gate, c, q = judged
        unscorable = np.where(np.isnan(c), np.nan, 0.0)
        calibration = np.zeros(len(c))
        if "confidence" in FORMATS[self.format]:
            said = (gate > 0) & ~np.isnan(c)
            calibration[said] = 1 + self.lam * np.asarray(self.score(q[said], c[said]), np.float64)
        return gate + unscorable, c, calibration + unscorable

    def _log(self, judged: Judged, log_metric: Callable[[str, float], None]) -> None:
        known = ~np.isnan(judged.correct)
        log_metric(f"{self.__name__}/unscored", float(1 - known.mean()))
        if known.any():
            for name, part in zip(("format", "accuracy"), self._parts(judged), strict=False):
                log_metric(f"{self.__name__}/{name}", float(part[known].mean()))
        both = known & (judged.well_formed > 0) & ~np.isnan(judged.confidence)
        if both.any():
            brier = brier_score(judged.confidence[both], judged.correct[both])
            log_metric(f"{self.__name__}/brier", float(brier))
            log_metric(f"{self.__name__}/confidence", float(judged.confidence[both].mean()))

    def parts(self) -> list[RewardFunction]:
        """format_reward, accuracy_reward, calibration_reward: unweighted, for `reward_weights`.

        Whether it pays to be wrong then hangs on TRL's weights, which nobody checks: see
        `wrong_on_purpose(score, lam * third, second)`.
        """
        names = ("format_reward", "accuracy_reward", "calibration_reward")
        return [_Part(self, i, name) for i, name in enumerate(names)]

    def loggers(self) -> list[RewardFunction]:
        """`mean_confidence` and `extreme_confidence`, to be weighed with LOGGER_WEIGHT."""
        return [mean_confidence, extreme_confidence]


class _Part:
    """One part of a reward as a function of its own, with the name TRL logs."""

    def __init__(self, whole: RLCRReward, number: int, name: str) -> None:
        self.whole, self.number, self.__name__ = whole, number, name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return _listed(self.whole._parts(self.whole.judge(completions, **columns))[self.number])


def _credit(verify: Verifier, said: StatedAnswer, gold: Any) -> float:
    if not said.well_formed or said.answer is None:
        return 0.0
    try:
        credit = number_or_none(verify(said.answer, gold))
    except Exception as problem:
        log.warning("verifier: %s: %s", type(problem).__name__, problem)
        return math.nan
    return math.nan if credit is None or not 0 <= credit <= 1 else credit


def _listed(values: Float) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def mean_confidence(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """`logged_confidence` of each completion, gate or no gate; None for what is no text."""
    return [None if text is None else logged_confidence(text) for text in _texts(completions)]


def extreme_confidence(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where that is within .01 of 0 or 1 (so also where no confidence is stated), else 0."""
    q = mean_confidence(prompts, completions)
    return [None if x is None else float(min(x, 1 - x) < EXTREME) for x in q]


def _texts(completions: Sequence[Any]) -> list[str | None]:
    texts: list[str | None] = []
    for completion in completions:
        try:
            texts.append(completion_text(completion))
        except InputError:
            texts.append(None)
    return texts


# ── metrics ───────────────────────────────────────────────────────────────────────


def calibration_report(
    correct: ArrayLike, confidence: ArrayLike, n_bins: int = 10
) -> dict[str, float]:
    """Brier, ECE (bins closed on the left, as published), AUROC, accuracy and mean confidence.

    correct: (m,) 0 or 1; confidence: (m,) in [0, 1]. AUROC is NaN, with a warning, where all are
    right or all wrong. Raises InputError for other values, other shapes and no rows. O(m log m).

    In floating point the edges .3, .6 and .7 lie a rounding above: such confidences are in the bin
    below, as they are in the published figures.

    >>> report = calibration_report([1, 0, 1, 0], [0.9, 0.4, 0.6, 0.6])
    >>> {name: round(value, 4) for name, value in report.items()}
    {'brier': 0.1725, 'ece': 0.175, 'auroc': 0.875, 'acc': 0.5, 'mean_conf': 0.625}
    """
    brier = float(brier_score(confidence, correct))
    ece = float(expected_calibration_error(confidence, correct, n_bins, closed="left"))
    return {
        "brier": brier,
        "ece": ece,
        "auroc": auroc(confidence, correct),
        "acc": float(np.mean(np.asarray(correct, np.float64))),
        "mean_conf": float(np.mean(np.asarray(confidence, np.float64))),
    }
