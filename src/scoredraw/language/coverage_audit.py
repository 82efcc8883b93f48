"""An audit of repeated sampling: what more samples would buy, and what picking one of them loses.

From the samples of a set of problems: the coverage curve with its band; two models that carry it
beyond the samples, each with the error it makes when it has to predict the samples at hand from a
quarter of them; and, where answers are known, the accuracy of every way of choosing one, with the
gap to coverage that a perfect verifier would close.

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.language.coverage import (
    MODELS,
    CoverageCurve,
    ExtrapolatedCoverage,
    coverage_curve,
    extrapolate_coverage,
    fit_beta_binomial,
    fit_power_law,
    log_spaced_sizes,
    plug_in_coverage,
)
from scoredraw.language.inference_cost import ReachCost, cost_to_reach
from scoredraw.language.selection import METHODS
from scoredraw.language.selection_curves import SelectionCurve, accuracy_at_k
from scoredraw.metrics import Estimate, bootstrap_interval
from scoredraw.samples import Samples, read_samples
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

BEYOND = (2, 10, 100)  # times the samples at hand
BETWEEN = 30  # points of a curve beyond the samples
REPLAYS = 40  # of predicting all samples from a quarter of them
LEAST_REPLAYED = 8  # samples a problem without which a quarter is nothing to fit


@dataclass(frozen=True)
class Replay:
    """What a model says of coverage at k from `known` samples a problem, over `REPLAYS` draws."""

    model: str
    known: int
    k: int
    truth: float
    predicted: float
    spread: float  # standard deviation over the draws

    @property
    def off(self) -> float:
        """Predicted minus true coverage."""
        return self.predicted - self.truth


@dataclass(frozen=True, eq=False)
class CoverageAudit:
    """What `audit_coverage` found.

    ks: the sizes of the tables, powers of two and the smallest n; beyond: larger ones. curve and
    models (by name): coverage at those sizes and between them. replays: how the models did on
    what is known. selectors: method -> accuracy at `ks`; accuracy and gap (coverage minus
    accuracy): (method, k) -> Estimate over problems. reach: model -> samples (and cost) for
    `target`. unsolved: problems without a right sample.
    """

    samples: Samples
    ks: Int
    beyond: Int
    curve: CoverageCurve
    models: dict[str, ExtrapolatedCoverage]
    replays: list[Replay]
    selectors: dict[str, SelectionCurve]
    accuracy: dict[tuple[str, int], Estimate]
    gap: dict[tuple[str, int], Estimate]
    target: float | None
    reach: dict[str, ReachCost]
    unsolved: int

    @property
    def n(self) -> int:
        """The samples that every problem has."""
        return int(self.samples.counts.min())

    def coverage(self, k: int) -> Estimate:
        """Coverage at one of the sizes of the curve."""
        j = int(np.flatnonzero(self.curve.k == k)[0])
        c = self.curve
        return Estimate(float(c.mean[j]), float(c.low[j]), float(c.high[j]), c.problems)

    @property
    def best_selector(self) -> str | None:
        """The most accurate way of choosing with all n samples, the oracle aside; None without."""
        names = [name for name in self.selectors if name != "oracle"]
        return max(names, key=lambda m: self.accuracy[m, self.n].value) if names else None


def audit_coverage(
    source: Any,
    *,
    ks: Any = None,
    beyond: Any = None,
    target: float | None = None,
    cost: Callable[[float], float] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    rng: int = 0,
    progress: Progress | None = None,
) -> CoverageAudit:
    """Coverage, its models and their errors, and the selectors, of samples or a file of them.

    source: as in `samples.read_samples`. ks: sizes of the tables (1, 2, 4, ... and the smallest n).
    beyond: larger sizes to extrapolate to (2, 10 and 100 times n). target: a coverage to reach;
    cost: what k samples of a problem cost. Raises InputError as those functions, for k above the
    smallest n and for `beyond` below it.

    Time: the selectors take most of it, O(problems · n log n · ks).

    >>> found = audit_coverage("smollm2-arith", resamples=200)
    >>> round(found.coverage(32).value, 3), found.best_selector, found.unsolved
    (0.604, 'mean_logprob', 19)
    """
    samples = read_samples(source)
    counts, right = samples.counts, samples.right
    n = int(counts.min())
    sizes = np.unique(np.append(2 ** np.arange(int(np.log2(n)) + 1), n)) if ks is None else ks
    sizes = np.unique(np.atleast_1d(sizes)).astype(np.int64)
    require(sizes.min() >= 1 and sizes.max() <= n, "k", f"{sizes}", f"1 to {n}, samples of each")
    ahead = np.multiply(BEYOND, n) if beyond is None else np.unique(np.atleast_1d(beyond))
    require(bool((ahead > n).all()), "beyond", f"{ahead}", f"sizes above the {n} samples at hand")
    options: dict[str, Any] = {"level": level, "resamples": resamples, "rng": rng}
    curve = coverage_curve((counts, right), np.union1d(log_spaced_sizes(n), sizes), **options)
    models, replays = {}, []
    with warnings.catch_warnings():  # a degenerate fit says so in its numbers
        warnings.simplefilter("ignore", UserWarning)
        if n >= 2:
            between = np.geomspace(n, ahead.max(), BETWEEN).astype(np.int64)
            at = np.union1d(curve.k, np.union1d(between, ahead))
            models = {
                model: extrapolate_coverage(counts, right, at, model=model, **options)
                for model in MODELS
            }
        if n >= LEAST_REPLAYED:
            replays = replay(counts, right, n // 4, rng)
    selectors = _selectors(samples, sizes, rng, progress)
    accuracy, gap = {}, {}
    for name, found in selectors.items():
        for j, k in enumerate(sizes):
            values, best = found.per_problem[:, j], selectors["oracle"].per_problem[:, j]
            accuracy[name, int(k)] = _over_problems(values, level, resamples, rng)
            gap[name, int(k)] = _over_problems(best - values, level, resamples, rng)
    price = cost if cost is not None else (lambda k: k)
    goals = {} if target is None else models
    reach = {name: cost_to_reach(model, target or 0.0, price) for name, model in goals.items()}
    return CoverageAudit(
        samples, sizes, ahead, curve, models, replays, selectors, accuracy, gap, target, reach,
        int((right == 0).sum()),
    )  # fmt: skip


def _over_problems(values: Float, level: float, resamples: int, rng: int) -> Estimate:
    return bootstrap_interval(values, level=level, resamples=resamples, rng=rng)


def replay(counts: Int, right: Int, known: int, rng: int) -> list[Replay]:
    """Coverage at the smallest n as predicted from `known` of the samples of each problem.

    The right ones among `known` samples drawn without replacement are hypergeometric.
    """
    k = int(counts.min())
    truth = float(coverage_curve((counts, right), [k], resamples=1).mean[0])
    random = generator(rng)
    said: dict[str, list[float]] = {"power_law": [], "beta_binomial": [], "plug_in": []}
    at = log_spaced_sizes(known)
    for _ in range(REPLAYS):
        c = random.hypergeometric(right, counts - right, known)
        part = coverage_curve((np.full(len(c), known), c), at, resamples=1).mean
        said["power_law"].append(float(fit_power_law(at, part).coverage([k])[0]))
        said["beta_binomial"].append(float(fit_beta_binomial(known, c).coverage([k])[0]))
        said["plug_in"].append(float(plug_in_coverage(known, c, k).mean()))
    return [
        Replay(model, known, k, truth, float(np.mean(values)), float(np.std(values, ddof=1)))
        for model, values in said.items()
    ]


def usable_methods(samples: Samples) -> list[str]:
    """The methods of `selection.METHODS` for which the samples have what they need.

    >>> usable_methods(read_samples({"problem": [1], "correct": [1], "reward": [0.5]}))
    ['uniform', 'oracle', 'bon']
    """
    has = {
        "rewards": samples.rewards is not None,
        "sum_logprob": samples.logprobs is not None,
        "mean_logprob": samples.logprobs is not None and samples.tokens is not None,
        "credit": True,
        "equal": True,
        "answered": samples.answers is not None,
        "one": True,
    }
    found = []
    for method, (kind, score) in METHODS.items():
        known = has[score.replace("probability", "logprob")]
        if known and (kind == "best" or samples.answers is not None):
            found.append(method)
    return found


def selection_curve(
    samples: Samples, method: Any, ks: Any, *, exact: bool = True, repeats: int = 100, rng: int = 0
) -> SelectionCurve:
    """`selection_curves.accuracy_at_k` of samples read from a table (see `Samples.pools`)."""
    pools = list(samples.pools())
    grades = np.split(samples.grades.astype(np.float64), samples.offsets[1:-1])
    credit = [np.where(pool.null, 0.0, g) for pool, g in zip(pools, grades, strict=True)]
    return accuracy_at_k(pools, credit, ks, method, exact=exact, repeats=repeats, rng=rng)


def _selectors(
    samples: Samples, ks: Int, rng: int, progress: Progress | None
) -> dict[str, SelectionCurve]:
    methods = usable_methods(samples)
    found = {}
    for i, method in enumerate(methods):
        found[method] = selection_curve(samples, method, ks, rng=rng)
        if progress is not None:
            progress("selectors", i + 1, len(methods))
    return found
