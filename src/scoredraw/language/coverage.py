"""Coverage: the chance that any of k samples is right, how it grows with k, what more would buy.

Of n samples of a problem c are right. The chance that k of them, drawn without replacement, hold a
right one is an unbiased estimate of what k fresh samples would do; coverage is its mean:

    pass@k = 1 - C(n-c, k) / C(n, k)

It ends at k = n. Two models go on from there. The power law describes the curve,

    coverage(k) ≈ exp(a k^b),  a < 0, b < 0                                (Brown et al.)

the beta-binomial explains it: where problems differ in their chance p ~ Beta(α, β), each fails k
times with (1-p)^k, and what is left after averaging falls as a power of k though each one falls
exponentially: coverage(k) = 1 - B(α, β+k)/B(α, β), and 1 - coverage ∝ k^-α (Schaeffer et al.).

The k samples of a curve are the same at every k, so its points are correlated and a fit's own
standard errors mean nothing. All intervals here resample problems.

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787. Chen et al., "Evaluating large language
models trained on code", 2021, arXiv 2107.03374 (pass@k). Schaeffer et al., "How do large language
monkeys get their power (laws)?", 2025, arXiv 2502.17578.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import miss_probabilities, whole_numbers
from scoredraw.errors import InputError, require
from scoredraw.language.coverage_models import BetaBinomial, PowerLaw, fit_tallies, least_squares
from scoredraw.metrics import Estimate, check_level
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]

CURVE_POINTS = 40  # sizes of a curve, evenly spaced in log k (Brown et al., appendix C.1)
MODELS = ("power_law", "beta_binomial")


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike, *, k_policy: str = "raise") -> Float:
    """The unbiased estimate of the chance that one of k samples is right, for each problem.

    1 - C(n-c, k) / C(n, k)  =  1 - Π_{j=n-c+1}^{n} (1 - k/j),  which is 1 where n - c < k.

    n: samples of each problem, c: how many of them are right, 0 ≤ c ≤ n; whole numbers that
    broadcast to (P,). k: one size or (K,). -> float64 (P, K), never falling in k.
    k_policy: "raise" refuses a k above any problem's n; "nan" gives NaN there.
    Raises InputError for c > n, n < 1, k < 1, negative counts and what is not a whole number.

    Chen et al. 2021, arXiv 2107.03374, and Brown et al. 2024, arXiv 2407.21787, equation 1; the
    products are shared by problems of equal n (see `answers.miss_probabilities`), so that time is
    O(P log P + n) a size and the error stays below 1e-12.

    >>> pass_at_k([10, 10, 4], [3, 0, 4], [1, 2, 4]).round(6).tolist()
    [[0.3, 0.533333, 0.833333], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    >>> pass_at_k(8, 9, 1)
    Traceback (most recent call last):
    scoredraw.errors.InputError: c: got 9 right of 8 at problem 0, want 0 ≤ c ≤ n
    """
    counts, right = check_counts(n, c)
    require(k_policy in ("raise", "nan"), "k_policy", k_policy, "raise or nan")
    ks = _sizes(k, None if k_policy == "nan" else int(counts.min()))
    out = np.full((len(counts), len(ks)), np.nan)
    for size in np.unique(counts):
        rows, columns = np.flatnonzero(counts == size), np.flatnonzero(ks <= size)
        if columns.size:
            miss = miss_probabilities(int(size), right[rows], ks[columns])
            out[np.ix_(rows, columns)] = 1 - miss
    return out


def plug_in_coverage(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Float:
    """1 - (1 - c/n)^k, float64 (P, K): the estimate that looks natural and is too low.

    Its expectation is below 1 - (1-p)^k for every 1 < k (Jensen), grossly so for k near n and
    beyond, where it treats a problem without a right answer as hopeless. For comparison.

    >>> plug_in_coverage(10, 3, [1, 4]).round(4).tolist()
    [[0.3, 0.7599]]
    """
    counts, right = check_counts(n, c)
    share = (right / counts)[:, None]
    with np.errstate(divide="ignore"):
        return np.asarray(-np.expm1(_sizes(k, None) * np.log1p(-share)))


def check_counts(n: ArrayLike, c: ArrayLike) -> tuple[Int, Int]:
    """Counts of samples and of right ones as int64 (P,) each, or an InputError."""
    counts, right = whole_numbers(n, "n"), whole_numbers(c, "c")
    try:
        counts, right = np.broadcast_arrays(np.atleast_1d(counts), np.atleast_1d(right))
    except ValueError:
        raise InputError(f"c: got shape {right.shape}, want that of n, {counts.shape}") from None
    require(counts.ndim == 1 and counts.size > 0, "n", f"shape {counts.shape}", "(P,), P ≥ 1")
    require(bool((counts >= 1).all()), "n", counts.min(), "one sample or more of each problem")
    wrong = np.flatnonzero((right < 0) | (right > counts))
    if wrong.size:
        which = wrong[0]
        came = f"{right[which]} right of {counts[which]} at problem {which}"
        raise InputError(f"c: got {came}, want 0 ≤ c ≤ n")
    return counts, right


def _sizes(k: ArrayLike, most: int | None) -> Int:
    ks = np.atleast_1d(whole_numbers(k, "k"))
    require(ks.ndim == 1 and ks.size > 0, "k", f"shape {ks.shape}", "one or more sizes")
    require(bool((ks >= 1).all()), "k", ks.min(), "1 or more")
    wanted = f"at most {most}, the samples that every problem has (or k_policy='nan')"
    require(most is None or bool((ks <= most).all()), "k", ks.max(), wanted)
    return ks


def log_spaced_sizes(n: int, points: int = CURVE_POINTS) -> Int:
    """Whole numbers from 1 to n, about evenly spaced in log k: int64, at most `points` of them.

    >>> log_spaced_sizes(32, 6).tolist()
    [1, 2, 4, 8, 16, 32]
    """
    return np.unique(np.round(np.geomspace(1, n, points)).astype(np.int64))


# ── the curve ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Coverage at the sizes k (K,): mean over problems, and the ends of its interval.

    `low` and `high` hold the share `level` at each k, over problems like these; NaN for one.
    """

    k: Int
    mean: Float
    low: Float
    high: Float
    problems: int
    level: float = 0.95

    def k_for(self, target: float) -> float:
        """The k at which the curve reaches a coverage, linear in log k; inf where it never does."""
        check_target(target)
        reached = np.flatnonzero(self.mean >= target)
        if not reached.size:
            return math.inf
        j = reached[0]
        if j == 0:
            return float(self.k[0])
        share = (target - self.mean[j - 1]) / (self.mean[j] - self.mean[j - 1])
        return float(self.k[j - 1] * (self.k[j] / self.k[j - 1]) ** share)

    def at(self, k: ArrayLike) -> Float:
        """Coverage at sizes between those of the curve, linear in log k; NaN outside them."""
        x = np.log(np.asarray(k, np.float64))
        return np.interp(x, np.log(self.k), self.mean, left=np.nan, right=np.nan)


def coverage_curve(
    correct: ArrayLike | tuple[ArrayLike, ArrayLike],
    ks: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    rng: int | np.random.Generator | None = 0,
) -> CoverageCurve:
    """The mean of pass@k over problems at each k, with a band from resampled problems.

    coverage(k) = mean_i pass@k(n_i, c_i); its `level` interval is the percentile bootstrap over
    problems. Resampling whole problems is what tells how another set of problems would come out;
    the noise of the samples within a problem is averaged already.

    correct: (P, N) of 0 and 1, or the pair (n, c) of counts, which may differ between problems.
    ks: rising sizes, by default 40 evenly spaced in log k from 1 to the smallest n.
    Raises InputError for entries that are neither 0 nor 1, and as `pass_at_k`.
    Brown et al. 2024, arXiv 2407.21787. Time O(resamples · min(P, distinct counts) · K).

    >>> curve = coverage_curve(([8, 8, 8, 8], [0, 1, 2, 8]), [1, 2, 8])
    >>> curve.mean.round(4).tolist(), bool((curve.low <= curve.mean).all())
    ([0.3438, 0.4286, 0.75], True)
    >>> round(curve.k_for(0.5), 3)
    2.722
    """
    check_level(level)
    counts, right = _counts_of(correct)
    k = log_spaced_sizes(int(counts.min())) if ks is None else _sizes(ks, int(counts.min()))
    require(bool((np.diff(k) > 0).all()), "ks", "sizes in another order", "rising ones")
    pairs, times = np.unique(np.stack([counts, right]), axis=1, return_counts=True)
    table = pass_at_k(pairs[0], pairs[1], k)
    mean = times @ table / times.sum()
    replicates = _resampled_problems(times, resamples, rng) @ table / times.sum()
    low, high = _band(replicates, level, int(times.sum()))
    return CoverageCurve(k, mean, low, high, int(times.sum()), level)


def _counts_of(correct: Any) -> tuple[Int, Int]:
    if isinstance(correct, tuple):
        require(len(correct) == 2, "correct", f"{len(correct)} parts", "(n, c) or a matrix")
        return check_counts(*correct)
    matrix = np.asarray(correct)
    require(matrix.ndim == 2, "correct", f"{matrix.ndim} dimensions", "(P, N), or a pair (n, c)")
    require(matrix.size > 0, "correct", f"shape {matrix.shape}", "problems and samples")
    require(bool(np.isin(matrix, (0, 1)).all()), "correct", "other entries", "0 and 1 only")
    return check_counts(matrix.shape[1], matrix.astype(bool).sum(axis=1))


def _resampled_problems(
    times: Int, resamples: int, rng: int | np.random.Generator | None
) -> NDArray[np.int64]:
    """How often each kind of problem comes in each resample (R, U): problems with replacement."""
    require(resamples >= 1, "resamples", resamples, "1 or more")
    total = times.sum()
    return generator(rng).multinomial(total, times / total, size=resamples)


def _band(replicates: Float, level: float, problems: int) -> tuple[Float, Float]:
    if problems == 1:
        return np.full(replicates.shape[1], np.nan), np.full(replicates.shape[1], np.nan)
    tails = [(1 - level) / 2, (1 + level) / 2]
    # an order statistic, not a mean of two: replicates may be infinite
    low, high = np.quantile(replicates, tails, axis=0, method="inverted_cdf")
    return low, high


def check_target(target: float) -> None:
    require(0 < target < 1, "target", target, "a coverage between 0 and 1")


# ── models of the curve ─────────────────────────────────────────────────────────────────────────


def fit_power_law(k: ArrayLike, coverage: ArrayLike, *, space: str = "coverage") -> PowerLaw:
    """Fit coverage(k) = exp(a k^b), by default as the paper does: least squares in coverage.

    k: (K,) sizes, positive and at least two different ones; coverage: (K,) in [0, 1].
    space: "coverage" minimises Σ (coverage - exp(a k^b))² (Levenberg-Marquardt in log(-a) and b);
    "log" regresses log(-log coverage) on log k, and needs 0 < coverage < 1.
    Coverage that is all 0 has no fit: a and b are NaN, with a warning. Coverage that is all 1 is
    a = b = 0, with a warning.
    The fit has no standard errors (see above): `extrapolate_coverage` gives intervals.
    Raises InputError for what is not finite, out of range or of another length.

    Brown et al. 2024, arXiv 2407.21787, equations 2 and 3 and appendix C.1. O(K) a step.

    >>> k = np.array([1, 10, 100, 1000])
    >>> law = fit_power_law(k, np.exp(-1.7 * k**-0.35))
    >>> round(law.a, 6), round(law.b, 6), round(law.k_for(0.95))
    (-1.7, -0.35, 22078)
    """
    sizes, share = np.asarray(k, np.float64), np.asarray(coverage, np.float64)
    require(sizes.ndim == 1 and sizes.shape == share.shape, "coverage", share.shape, "as many as k")
    positive = bool((np.isfinite(sizes) & (sizes > 0)).all())
    require(positive and np.unique(sizes).size >= 2, "k", "others", "two different sizes or more")
    inside = bool(((share >= 0) & (share <= 1)).all())
    require(inside, "coverage", "values outside it", "finite numbers in [0, 1]")
    require(space in ("coverage", "log"), "space", space, "coverage or log")
    if not share.any():
        warnings.warn("coverage is 0 at every k: there is no power law", stacklevel=2)
        return PowerLaw.of(math.nan, math.nan, sizes, share)
    if share[np.argmin(sizes)] == 1:
        warnings.warn("coverage is 1 from the smallest k on: a = 0", stacklevel=2)
        return PowerLaw.of(0.0, 0.0, sizes, share)
    if space == "log":
        strict = bool(((share > 0) & (share < 1)).all())
        require(strict, "coverage", "0 or 1", "0 < coverage < 1 for space='log'")
        b, log_a = np.polyfit(np.log(sizes), np.log(-np.log(share)), 1)
        return PowerLaw.of(-math.exp(log_a), float(b), sizes, share)
    (a,), (b,), (settled,) = least_squares(np.log(sizes), share[None])
    if not settled:
        warnings.warn("the power law did not settle: the curve is not of its shape", stacklevel=2)
    return PowerLaw.of(float(a), float(b), sizes, share)


def fit_beta_binomial(n: ArrayLike, c: ArrayLike) -> BetaBinomial:
    """Fit c_i ~ Binomial(n_i, p_i), p_i ~ Beta(α, β) by maximum likelihood.

    log L = Σ_i [ Σ_{j<c_i} log(α+j) + Σ_{j<n_i-c_i} log(β+j) - Σ_{j<n_i} log(α+β+j) ]

    n, c: counts (P,) as in `pass_at_k`; n may differ between problems. The sums over problems are
    tallied first (how many have c_i > j), so that a step of Newton's method takes O(max n),
    whatever P; no gamma functions, and nothing cancels.
    Where there is no maximum inside, the limit is given, with `limit` set and a warning:
    "binomial" where the problems do not differ by more than chance (α, β → ∞, one p for all);
    "all or none" where each problem is always right or always wrong (α, β → 0).
    Raises InputError as `pass_at_k`, and where no problem has two samples.

    Skellam (1948); Griffiths (1973). For coverage: Schaeffer et al. 2025, arXiv 2502.17578.

    >>> rng = np.random.default_rng(0)
    >>> fit = fit_beta_binomial(50, rng.binomial(50, rng.beta(0.5, 2.0, size=4000)))
    >>> round(fit.alpha, 1), round(fit.beta, 1)
    (0.5, 2.0)
    >>> fit.coverage([1, 100, 10_000]).round(2).tolist()
    [0.2, 0.87, 0.99]
    """
    counts, right = check_counts(n, c)
    require(int(counts.max()) >= 2, "n", 1, "two samples or more of some problem")
    pairs, times = np.unique(np.stack([counts, right]), axis=1, return_counts=True)
    fit = BetaBinomial(*(float(x[0]) for x in fit_tallies(pairs[0], pairs[1], times[None])))
    if fit.limit:
        warnings.warn(f"no beta distribution fits best: the {fit.limit} limit", stacklevel=2)
    return fit


@dataclass(frozen=True, eq=False)
class ExtrapolatedCoverage(CoverageCurve):
    """A fitted curve at any k, its band, the fit, and the fits to the resampled problems.

    `replicates` is the model with arrays (R,) for parameters.
    """

    fit: PowerLaw | BetaBinomial | None = None
    replicates: PowerLaw | BetaBinomial | None = None

    def k_for(self, target: float) -> float:
        """The k at which the fitted model reaches a coverage."""
        return self.samples_for(target).value

    def samples_for(self, target: float) -> Estimate:
        """The k at which coverage reaches `target`, and its interval; ends may be infinite."""
        check_target(target)
        assert self.fit is not None
        assert self.replicates is not None
        k = np.asarray(self.replicates.k_for(target), np.float64)
        low, high = _band(k[:, None], self.level, self.problems)
        return Estimate(float(self.fit.k_for(target)), float(low[0]), float(high[0]), self.problems)


def extrapolate_coverage(
    n: ArrayLike,
    c: ArrayLike,
    k: ArrayLike,
    *,
    model: str = "power_law",
    fit_ks: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    rng: int | np.random.Generator | None = 0,
) -> ExtrapolatedCoverage:
    """Coverage at sizes beyond the samples at hand, by a model fitted to each resample of problems.

    model: "power_law", fitted in coverage space to the mean of pass@k at `fit_ks` (by default 40
    sizes evenly spaced in log k, 1 .. min n), or "beta_binomial", fitted to the counts.
    n, c: (P,) as in `pass_at_k`; k: (K,) sizes ≥ 1, of any magnitude.
    The band is the percentile bootstrap over problems: what other problems of the kind would have
    given. It does not contain the error of the model itself, so compare the two models.
    Raises InputError as `pass_at_k`.

    Brown et al. 2024, arXiv 2407.21787; Schaeffer et al. 2025, arXiv 2502.17578. All resamples are
    fitted together: O(resamples · K) a step (power law), O(resamples · max n) (beta-binomial).

    >>> rng = np.random.default_rng(0)
    >>> c = rng.binomial(20, rng.beta(0.5, 4.0, size=300))
    >>> curve = extrapolate_coverage(20, c, [20, 1000], model="beta_binomial", resamples=200)
    >>> truth = BetaBinomial(0.5, 4.0).coverage([20, 1000])
    >>> bool(((curve.low < truth) & (truth < curve.high)).all())
    True
    """
    check_level(level)
    require(model in MODELS, "model", model, " or ".join(MODELS))
    counts, right = check_counts(n, c)
    ks = _sizes(k, None)
    pairs, times = np.unique(np.stack([counts, right]), axis=1, return_counts=True)
    drawn = _resampled_problems(times, resamples, rng)
    fit: PowerLaw | BetaBinomial
    replicates: PowerLaw | BetaBinomial
    if model == "power_law":
        fit_at = log_spaced_sizes(int(counts.min())) if fit_ks is None else _sizes(fit_ks, None)
        table = pass_at_k(pairs[0], pairs[1], fit_at)
        fit = fit_power_law(fit_at, times @ table / len(counts))
        a, b, _ = least_squares(np.log(fit_at), drawn @ table / len(counts))
        replicates = PowerLaw(a, b)
    else:
        fit = fit_beta_binomial(counts, right)
        replicates = BetaBinomial(*fit_tallies(pairs[0], pairs[1], drawn))
    low, high = _band(replicates.coverage(ks), level, len(counts))
    mean = fit.coverage(ks)
    return ExtrapolatedCoverage(ks, mean, low, high, len(counts), level, fit, replicates)


# ── families of curves ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CurveShift:
    """`shift` in log k from a reference, at coverage `anchor`; `distance`: the worst gap left.

    exp(shift) is how many times as many samples the curve takes for the same coverage.
    """

    shift: float
    anchor: float
    distance: float


def curve_shift(
    curve: CoverageCurve, reference: CoverageCurve, anchor: float | None = None
) -> CurveShift:
    """How far a curve lies to the right of a reference in log k, and whether that explains it.

    s with curve(k) = reference(k e^-s) at the coverage `anchor`, by default the middle of what
    both curves reach. Models of one family on one task are the same S shifted (Brown et al.,
    section 3.2): then `distance`, the largest |curve(k) - reference(k e^-s)| over the k that both
    have, is small.
    Raises InputError where the curves share no coverage, or `anchor` is not in both.

    >>> k = np.array([1, 10, 100, 1000])
    >>> def curve(scale):
    ...     mean = np.exp(-2 * (k * scale) ** -0.5)
    ...     return CoverageCurve(k, mean, mean, mean, problems=9)
    >>> weak = curve_shift(curve(0.1), curve(1.0))
    >>> round(math.exp(weak.shift), 3), round(weak.distance, 6)
    (10.0, 0.0)
    """
    low = max(float(curve.mean[0]), float(reference.mean[0]))
    high = min(float(curve.mean[-1]), float(reference.mean[-1]))
    require(low < high, "curve", f"coverage from {low:g} to {high:g} in common", "an overlap")
    at = (low + high) / 2 if anchor is None else anchor
    require(low <= at <= high, "anchor", anchor, f"a coverage of both curves, {low:g} to {high:g}")
    shift = math.log(curve.k_for(at) / reference.k_for(at))
    gap = np.abs(curve.mean - reference.at(curve.k * math.exp(-shift)))
    return CurveShift(shift, at, float(np.nanmax(gap, initial=0.0)))
