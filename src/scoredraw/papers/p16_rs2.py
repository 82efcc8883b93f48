"""Repeated random sampling against fixed subsets: the same steps, a fresh subset every round.

A classifier of the 8x8 digits (64-64-64-10, ReLU) is trained for 40 rounds of ceil(m / 32) Adam
steps under a cosine that ends with them, on m = rN of 1078 examples: one fixed random subset, that
subset with ten times the steps, RS2 with and without replacement, and everything. All arms of a
seed share the initial weights, so differences are paired. At full scale also fixed subsets chosen
by EL2N, by variance of gradients (both ends of each), by herding and by k-centres, all of it again
with a fifth of the training labels wrong, and the time each took, selection included.

Okanovic et al., "Repeated random sampling for minimizing the time-to-accuracy of learning",
ICLR 2024, arXiv 2305.18424.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.influence import GradientSpread, el2n, normalize_scores
from scoredraw.data_selection.repeated_sampling import (
    RepeatedSampling,
    compressed_schedule,
    expected_coverage,
    subset_size,
)
from scoredraw.inclusion import allocate
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers.training import (
    DigitsSplit,
    MLPEnsemble,
    digits_split,
    minibatches,
    train_ensemble,
)
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Orders = dict[str, list[Int]]

BATCH, CLASSES, CHECKPOINTS = 32, 10, 10
EARLY_RUNS, EARLY_EPOCHS = 5, 3
STATIC, LONG = "static random", "static random, 10x the steps"
WITH, WITHOUT = "RS2 with replacement", "RS2 without replacement"
FULL = "full data"
NOISE = 0.2
TARGET = 0.9


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    rounds: int = 40
    ratios: tuple[float, ...] = (0.02, 0.05, 0.1, 0.3)
    long: bool = True
    selections: bool = False


PLANS = {
    "smoke": Plan(seeds=3, rounds=4, ratios=(0.05, 0.1), long=False),
    "quick": Plan(seeds=20),
    "full": Plan(seeds=40, selections=True),
    "study": Plan(seeds=100, selections=True),
}


@dataclass(frozen=True)
class Outcome:
    """Test accuracy of each seed, and the seconds one seed took to select and to train."""

    accuracy: Float
    training: float
    selection: float = 0.0

    @property
    def seconds(self) -> float:
        """Selection and training."""
        return self.selection + self.training


Outcomes = dict[tuple[str, float], Outcome]


def run(scale: str, rng: int) -> Report:
    """Train every arm, compare them seed by seed, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    trial = Trial(plan, digits_split(), rng)
    clean = trial.uniform()
    report = Report(paper=16, scale=scale, seed=rng)
    report.claims.extend(base_claims(plan, clean))
    report.figures.extend([ratio_figure(plan, clean), coverage_figure(trial)])
    if plan.selections:
        clean |= trial.selected()
        noisy_trial = Trial(plan, trial.data, rng, noise=NOISE, ratios=(0.1, 0.3))
        noisy = noisy_trial.uniform() | noisy_trial.selected()
        report.claims.extend(selection_claims(plan, clean, noisy))
        title = f"Test accuracy, {NOISE:.0%} of the training labels wrong"
        report.tables.append(accuracy_table(title, noisy_trial.ratios, noisy))
        report.tables.append(seconds_table(plan, clean))
        report.figures.append(time_figure(plan, clean))
    title = "Test accuracy, clean labels"
    report.tables.insert(0, accuracy_table(title, plan.ratios, clean))
    report.notes.append(
        "Without replacement RS2 is ordinary epoch training, r times as many epochs, with the "
        "schedule fitted to them; the arms differ in data, never in steps."
    )
    if plan.long:
        report.notes.append(long_note(plan, clean))
    return replace(report, seconds=time.perf_counter() - started)


# ── training the arms ───────────────────────────────────────────────────────────────────────────


class Trial:
    """One data set (clean or with wrong training labels) and the arms trained on it."""

    def __init__(
        self,
        plan: Plan,
        data: DigitsSplit,
        rng: int,
        *,
        noise: float = 0.0,
        ratios: tuple[float, ...] | None = None,
    ) -> None:
        self.plan, self.data, self.ratios = plan, data, ratios or plan.ratios
        self.n = len(data.train_y)
        self.seeds = [1000 * rng + s for s in range(plan.seeds)]
        self.labels = np.stack([wrong_labels(data.train_y, noise, seed) for seed in self.seeds])
        self.spread = GradientSpread()

    def uniform(self) -> Outcomes:
        """Fixed random subsets, RS2 both ways, and all the data."""
        results = self._full()
        for ratio in self.ratios:
            arms = {arm: self._batches(arm, ratio) for arm in (STATIC, WITH, WITHOUT)}
            results |= {(arm, ratio): outcome for arm, outcome in self._train(arms).items()}
            if self.plan.long:
                long = self._train({LONG: self._batches(LONG, ratio)})
                results[LONG, ratio] = long[LONG]
        return results

    def selected(self) -> Outcomes:
        """Fixed subsets by score or geometry. The full run must have been trained before."""
        orders, seconds = self._orders()
        results: Outcomes = {}
        for ratio in self.ratios:
            m = subset_size(self.n, ratio)
            arms = {
                method: self._subsets(
                    [chosen(o, y, m, method) for o, y in zip(each, self.labels, strict=True)]
                )
                for method, each in orders.items()
            }
            for method, outcome in self._train(arms).items():
                results[method, ratio] = Outcome(
                    outcome.accuracy, outcome.training, seconds[method]
                )
        return results

    def _batches(self, arm: str, ratio: float) -> Int:
        """The batches of every seed of an arm: (S, steps, BATCH)."""
        rounds = self.plan.rounds * (10 if arm == LONG else 1)
        tables = []
        for seed in self.seeds:
            sampler = RepeatedSampling(self.n, ratio, replacement=arm == WITH, seed=seed)
            if arm in (STATIC, LONG):
                tables.append(self._fixed(sampler.subset(0), seed, rounds))
            else:
                subsets = [sampler.indices(t) for t in range(rounds)]
                tables.append(minibatches(subsets, BATCH, shuffle=False))
        batches = np.stack(tables)
        assert batches.shape[1] == compressed_schedule(rounds, sampler.m, BATCH)
        return batches

    def _subsets(self, subsets: list[Int]) -> Int:
        return np.stack([self._fixed(s, seed) for s, seed in zip(subsets, self.seeds, strict=True)])

    def _fixed(self, subset: Int, seed: int, rounds: int | None = None) -> Int:
        return minibatches([subset] * (rounds or self.plan.rounds), BATCH, rng=seed)

    def _train(self, arms: dict[str, Int]) -> dict[str, Outcome]:
        """Train all seeds of several arms with the same number of steps at once."""
        data, count = self.data, len(arms)
        batches = np.concatenate(list(arms.values()))
        ensemble = train_ensemble(
            data.train_x, np.tile(self.labels, (count, 1)), batches,
            n_classes=CLASSES, seed=self.seeds * count,
        )  # fmt: skip
        seconds = batches.shape[1] * self.step_seconds
        accuracy = ensemble.accuracy(data.test_x, data.test_y).reshape(count, -1)
        return {arm: Outcome(accuracy[i], seconds) for i, arm in enumerate(arms)}

    def _full(self) -> Outcomes:
        """All the data for as many epochs as there are rounds.

        Notes the gradients for VoG, and the seconds of one step of one member, which all the
        arms are charged: in ensembles of other sizes a step costs a little more or less.
        """
        data, plan = self.data, self.plan
        batches = np.stack([self._fixed(np.arange(self.n), seed) for seed in self.seeds])
        steps = batches.shape[1]
        stops = np.linspace(0, steps, CHECKPOINTS + 1).astype(int).tolist()
        clock, gradient_seconds = [], 0.0  # the clock starts with the first step

        def note(step: int, ensemble: MLPEnsemble) -> None:
            nonlocal gradient_seconds
            clock.append(time.perf_counter())
            if step and plan.selections:
                gradients = ensemble.input_gradients(data.train_x, self.labels)
                self.spread.update(gradients.reshape(-1, gradients.shape[-1]))
                gradient_seconds += time.perf_counter() - clock[-1]

        ensemble = train_ensemble(
            data.train_x, self.labels, batches, n_classes=CLASSES, seed=self.seeds,
            checkpoint_steps=stops, on_checkpoint=note,
        )  # fmt: skip
        seconds = (time.perf_counter() - clock[0] - gradient_seconds) / plan.seeds
        self.step_seconds = seconds / steps
        self.vog_seconds = seconds + gradient_seconds / plan.seeds
        accuracy = ensemble.accuracy(data.test_x, data.test_y)
        return {(FULL, 1.0): Outcome(accuracy, seconds)}

    # ── the subsets it is compared with ─────────────────────────────────────────────────────────

    def _orders(self) -> tuple[Orders, dict[str, float]]:
        """For each method and seed the rows, best first, and the seconds a seed took to score."""
        S, most = self.plan.seeds, subset_size(self.n, max(self.ratios))
        logits, features, early = self._early()
        started = time.perf_counter()
        errors = [el2n(logits[:, s], self.labels[s]) for s in range(S)]
        el2n_seconds = early + (time.perf_counter() - started) / S
        spread = self.spread.score().reshape(S, self.n)
        vog = [normalize_scores(v, y, by="class") for v, y in zip(spread, self.labels, strict=True)]
        started = time.perf_counter()
        herded = [herding(f, y) for f, y in zip(features, self.labels, strict=True)]
        herding_seconds = early / EARLY_RUNS + (time.perf_counter() - started) / S
        started = time.perf_counter()
        centres = [k_centres(f, most) for f in features]
        centre_seconds = early / EARLY_RUNS + (time.perf_counter() - started) / S
        orders: Orders = {"herding": herded, "k-centres": centres}
        seconds = {"herding": herding_seconds, "k-centres": centre_seconds}
        for name, scores, cost in (("EL2N", errors, el2n_seconds), ("VoG", vog, self.vog_seconds)):
            for end, sign in (("hardest", 1), ("easiest", -1)):
                orders[f"{name}, {end}"] = [np.argsort(-sign * v, kind="stable") for v in scores]
                seconds[f"{name}, {end}"] = cost
        return orders, seconds

    def _early(self) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        """Logits (runs, S, n, C) of a few short runs, the first one's features, seconds a seed."""
        data, S = self.data, self.plan.seeds
        seeds = [seed + 10**6 * (1 + run) for run in range(EARLY_RUNS) for seed in self.seeds]
        batches = np.stack(
            [minibatches([np.arange(self.n)] * EARLY_EPOCHS, BATCH, rng=seed) for seed in seeds]
        )
        ensemble = train_ensemble(
            data.train_x, np.tile(self.labels, (EARLY_RUNS, 1)), batches,
            n_classes=CLASSES, seed=seeds, schedule="constant",
        )  # fmt: skip
        training = EARLY_RUNS * batches.shape[1] * self.step_seconds
        started = time.perf_counter()
        logits = ensemble.logits(data.train_x).reshape(EARLY_RUNS, S, self.n, CLASSES)
        seconds = training + (time.perf_counter() - started) / S
        return logits, ensemble.hidden(data.train_x)[:S], seconds


def wrong_labels(labels: Int, share: float, seed: int) -> Int:
    """The labels with a share of them moved to one of the other classes."""
    random = np.random.default_rng([seed, 16])
    rows = random.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[rows] = (noisy[rows] + random.integers(1, CLASSES, len(rows))) % CLASSES
    return noisy


def chosen(order: Int, labels: Int, m: int, method: str) -> Int:
    """The first m of an order; for herding the first of each class by its share of m."""
    if method != "herding":
        return order[:m]
    shares = allocate(np.bincount(labels, minlength=CLASSES), m)
    rows = [order[labels[order] == c][:share] for c, share in enumerate(shares)]
    return np.concatenate(rows)


def herding(features: NDArray[np.float32], labels: Int) -> Int:
    """Rows of each class so ordered that the first k always have nearly the class's mean.

    Row k+1 minimises |mu - (sum of the first k + phi) / (k+1)|. Welling 2009.
    """
    order: list[int] = []
    for c in range(CLASSES):
        rows = np.flatnonzero(labels == c)
        phi = features[rows].astype(np.float64)
        mean, square = phi.mean(axis=0), (phi**2).sum(axis=1)
        total = np.zeros(phi.shape[1])
        for k in range(len(rows)):
            best = int(np.argmin(square - 2 * phi @ ((k + 1) * mean - total)))
            total += phi[best]
            square[best] = np.inf
            order.append(int(rows[best]))
    return np.array(order, dtype=np.int64)


def k_centres(features: NDArray[np.float32], m: int) -> Int:
    """Farthest-first traversal from the row nearest the mean. Gonzalez 1985."""
    phi = features.astype(np.float64)
    order = np.empty(m, dtype=np.int64)
    order[0] = ((phi - phi.mean(axis=0)) ** 2).sum(axis=1).argmin()
    distance = np.full(len(phi), np.inf)
    for k in range(1, m):
        distance = np.minimum(distance, ((phi - phi[order[k - 1]]) ** 2).sum(axis=1))
        order[k] = distance.argmax()
    return order


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def base_claims(plan: Plan, results: Outcomes) -> list[Claim]:
    """RS2 against the fixed random subset, and with against without replacement."""
    says = "ImageNet, r = 10 %: RS2 66 %, the best fixed subset 55 %, all data 69 %"
    claims = []
    for ratio, bound in ((0.05, 0.10), (0.1, 0.02)):
        gain = difference(results, WITHOUT, STATIC, ratio)
        name = f"r = {ratio:.0%}: RS2 without replacement beats a fixed random subset"
        claims.append(Claim.at_least(name, says, gain, bound))
    for ratio in (r for r in plan.ratios if r >= 0.05):
        gap = difference(results, WITHOUT, WITH, ratio)
        name = f"r = {ratio:.0%}: with and without replacement are alike"
        claims.append(Claim.within(name, "both are RS2", gap, -0.05, 0.05))
    return claims


def selection_claims(plan: Plan, clean: Outcomes, noisy: Outcomes) -> list[Claim]:
    """RS2 against fixed subsets that were chosen, on clean and on wrong labels, and in time."""
    small = [ratio for ratio in plan.ratios if ratio <= 0.1]
    methods = [arm for arm in arms_of(clean) if arm not in (STATIC, LONG, WITH, WITHOUT, FULL)]
    claims = []
    for ratio in small:
        method, gap = closest(clean, methods, ratio, comparisons=len(small) * len(methods))
        name = f"r = {ratio:.0%}: every chosen fixed subset is below RS2 (closest: {method})"
        says = "up to 29 points above pruning methods for r < 10 % on ImageNet"
        claims.append(Claim.at_least(name, says, gap, 0.0))
    rivals = [STATIC, *methods]
    method, gap = closest(noisy, rivals, 0.1, comparisons=len(rivals))
    name = f"20 % wrong labels, r = 10 %: RS2 is best or tied (closest: {method})"
    claims.append(Claim.at_least(name, "RS2 best or tied under label noise", gap, -0.01))
    ours = time_to(clean, WITHOUT)
    theirs = {method: time_to(clean, method) for method in [FULL, *rivals]}
    fastest = min(theirs, key=lambda method: theirs[method])
    name = f"the time others take to {TARGET:.0%}, in RS2's (best: {fastest})"
    says = "ImageNet, r = 10 %: the best competitor takes 1.6 times as long"
    claims.append(Claim.at_least(name, says, theirs[fastest] / ours, 1.0))
    return claims


def difference(results: Outcomes, a: str, b: str, ratio: float, comparisons: int = 1) -> Estimate:
    """Accuracy of a over b on the same seeds."""
    mine, other = results[a, ratio].accuracy, results[b, ratio].accuracy
    return paired_difference(mine, other, comparisons=comparisons)


def closest(
    results: Outcomes, rivals: list[str], ratio: float, comparisons: int
) -> tuple[str, Estimate]:
    """The rival over which RS2's lead, with its simultaneous interval, is smallest."""
    gaps = {r: difference(results, WITHOUT, r, ratio, comparisons) for r in rivals}
    rival = min(gaps, key=lambda r: gaps[r].low)
    return rival, gaps[rival]


def time_to(results: Outcomes, arm: str) -> float:
    """The least seconds in which this arm, at some ratio, has the target accuracy."""
    reached = [
        outcome.seconds
        for (name, _), outcome in results.items()
        if name == arm and outcome.accuracy.mean() >= TARGET
    ]
    return min(reached, default=float("inf"))


def long_note(plan: Plan, results: Outcomes) -> str:
    """How a fixed subset does that is given ten times the steps."""
    parts = [f"{ratio:.0%}: {difference(results, WITHOUT, LONG, ratio)}" for ratio in plan.ratios]
    return (
        "RS2 without replacement minus a fixed subset with ten times the steps, at "
        + "; ".join(parts)
        + ". Below 0 the extra steps made up for the fixed subset, above 0 they did not."
    )


# ── tables and figures ──────────────────────────────────────────────────────────────────────────


def arms_of(results: Outcomes) -> list[str]:
    """The arms in the order of training."""
    return list(dict.fromkeys(arm for arm, _ in results))


def accuracy_table(title: str, ratios: tuple[float, ...], results: Outcomes) -> ReportTable:
    """Arms by ratios, and RS2's lead over the fixed random subset."""
    arms = [arm for arm in arms_of(results) if arm != FULL]
    rows: list[list[Cell]] = [
        [arm, *(mean_interval(results[arm, ratio].accuracy) for ratio in ratios)] for arm in arms
    ]
    lead = [difference(results, WITHOUT, STATIC, ratio) for ratio in ratios]
    rows.append([f"{WITHOUT} minus {STATIC}, paired", *lead])
    full = results[FULL, 1.0].accuracy
    return ReportTable(
        title, ["arm", *(f"r = {ratio:.0%}" for ratio in ratios)], rows,
        note=f"{len(full)} seeds, 95 % intervals; all the data: {mean_interval(full)}",
    )  # fmt: skip


def seconds_table(plan: Plan, results: Outcomes) -> ReportTable:
    """What a seed cost, to select and to train."""
    rows: list[list[Cell]] = []
    for arm in arms_of(results):
        ratio = 1.0 if arm == FULL else 0.1
        outcome = results[arm, ratio]
        rows.append([arm, f"{ratio:.0%}", outcome.selection, outcome.training, outcome.seconds])
    return ReportTable(
        "Seconds a seed", ["arm", "r", "selection", "training", "both"], rows,
        note=f"one core; a step of one network, as measured with {plan.seeds} trained together",
    )  # fmt: skip


def line(name: str, x: list[float], values: list[Float], baseline: bool = False) -> Series:
    """Means over seeds with their intervals."""
    means = [mean_interval(v) for v in values]
    return Series(
        name, x, [e.value for e in means], [e.low for e in means], [e.high for e in means],
        baseline=baseline,
    )  # fmt: skip


def ratio_figure(plan: Plan, results: Outcomes) -> Figure:
    """Accuracy against the share of the data a round has."""
    shares = [100 * ratio for ratio in plan.ratios]
    series = [
        line(arm, shares, [results[arm, r].accuracy for r in plan.ratios], arm == STATIC)
        for arm in (STATIC, LONG, WITH, WITHOUT)
        if (arm, plan.ratios[0]) in results
    ]
    full = [results[FULL, 1.0].accuracy] * len(shares)
    series.append(line(FULL, shares, full, baseline=True))
    return Figure(
        "line", "A fresh subset every round", "examples a round, % of the data", "test accuracy",
        series, log_x=True, caption="40 rounds; equal steps, except where ten times are named.",
    )  # fmt: skip


def coverage_figure(trial: Trial) -> Figure:
    """The share of examples seen so far at the ratio nearest 10 %, measured and in law."""
    ratio = min(trial.ratios, key=lambda r: abs(r - 0.1))
    rounds, m = 40, subset_size(trial.n, ratio)
    x = [float(k) for k in range(1, rounds + 1)]
    series = []
    for arm in (WITH, WITHOUT):
        seen = np.zeros((len(trial.seeds), rounds))
        for s, seed in enumerate(trial.seeds):
            sampler = RepeatedSampling(trial.n, ratio, replacement=arm == WITH, seed=seed)
            seen[s] = share_seen([sampler.subset(t) for t in range(rounds)], trial.n)
        law = expected_coverage(m / trial.n, rounds, replacement=arm == WITH)
        series.append(line(f"{arm}, measured", x, list(seen.T)))
        series.append(Series(f"{arm}, in law", x, law.tolist(), baseline=True))
    return Figure(
        "line", f"What has been seen, r = {ratio:.0%}", "rounds", "share of the examples", series
    )


def share_seen(subsets: list[Int], n: int) -> Float:
    """The share of n examples in the first 1, 2, ... of the subsets."""
    first = np.full(n, len(subsets))
    when = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])
    np.minimum.at(first, np.concatenate(subsets), when)
    share: Float = np.cumsum(np.bincount(first, minlength=len(subsets) + 1))[:-1] / n
    return share


def time_figure(plan: Plan, results: Outcomes) -> Figure:
    """Accuracy against all the time it took."""
    series = []
    for arm in arms_of(results):
        mine = [(o.seconds, o.accuracy) for (name, _), o in results.items() if name == arm]
        mine.sort(key=lambda point: point[0])
        series.append(line(arm, [x for x, _ in mine], [v for _, v in mine], arm == FULL))
    return Figure(
        "line", "Time to accuracy", "seconds a seed, selection included", "test accuracy", series,
        log_x=True,
        caption="A line joins r = " + ", ".join(f"{r:.0%}" for r in plan.ratios) + ".",
    )  # fmt: skip
