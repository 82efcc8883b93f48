"""Whose data to collect next, so that no group's model is left behind (arXiv:2202.01327).

*Known curves*: three groups with the learning curves of polygenic scores; greedy against equal
numbers and population shares. *Digits*: three groups of digits, a logistic regression each, the
curves known only from cross-validation. *Genotypes*: polygenic scores by ridge regression on
simulated genomes, as in the paper. *Noise*: what noisy measurements cost, with exploration and
without. *A bad fit*: two free parameters for a noisy curve can starve a group for ever.

Collecting whoever comes is proportional; it is the uniform draw here. Everything is paired by
seed: the arms of a seed share the data, their order, the folds and the test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from scoredraw.data_selection.adaptive_collection import AdaptiveSampler
from scoredraw.data_selection.collection_budget import (
    allocate,
    equal_allocation,
    proportional_allocation,
)
from scoredraw.data_selection.learning_curves import LearningCurve
from scoredraw.metrics import Estimate, mean_interval, paired_difference, proportion_interval
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Arms = dict[str, list[Int]]  # arm -> the counts (G,) of each seed

EXPLORE = 0.1
FOLDS, GREW = 5, 1.05  # a group is measured again when it has grown by a twentieth
SHARES = (0.75, 0.15, 0.10)
SEGMENTS, HELD = 150, 60  # Daetwyler's M, or as many variants; examples held at the start
KNOWN = (  # heritabilities, costs, budget
    ((0.7, 0.5, 0.3), (1.0, 1.0, 1.0), 1200.0),
    ((0.8, 0.5, 0.15), (1.0, 1.0, 1.0), 900.0),
    ((0.6, 0.5, 0.5), (1.0, 2.0, 6.0), 2400.0),
)
DIGITS = ((0, 1), (3, 5, 8, 9), (2, 4, 6, 7))
EQUAL, SHARE, ALONE = "equal", "proportional (uniform)", "the largest group alone"
MEAN, WORST, RAW = "adaptive, mean", "adaptive, maximin", "maximin on raw measurements"
ORACLE = "oracle (chosen by the test set)"
FREE, FREE_EXPLORED = "two parameters", "two parameters, exploring"
SAYS = "adaptive sampling outperforms equal and proportional collecting"


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    digits: int
    genotypes: int
    misfits: int
    noise: int
    batch: int = 10
    misfit_variants: int = 2 * SEGMENTS
    noises: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03, 0.1)


PLANS = {
    "smoke": Plan(2, 2, 2, 2, batch=70, misfit_variants=40, noises=(0.01,)),
    "quick": Plan(6, 6, 4, 25, noises=(0.01, 0.1)),
    "full": Plan(40, 40, 20, 100),
    "study": Plan(100, 100, 100, 400),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(paper=20, scale=scale, seed=rng, title="Equitable training sets")
    add_known(report)
    add_digits(report, plan, rng)
    add_genotypes(report, plan, rng)
    add_noise(report, plan, rng)
    add_misfit(report, plan, rng)
    report.notes.append(
        "The paper's study is of polygenic scores too, and its numbers are not known to us: its "
        "claim is judged on our simulations. Equal numbers are near the best mean R² there, which "
        "leaves little to gain; what the utility asks for is where adaptive collecting differs."
    )
    return report


# ── known curves ────────────────────────────────────────────────────────────────────────────────


def polygenic(heritability: float, segments: float = SEGMENTS) -> LearningCurve:
    return LearningCurve("daetwyler", {"h2": heritability, "M": float(segments)})


def performances(curves: Sequence[LearningCurve], n: Any) -> Float:
    return np.array([curve.predict(one) for curve, one in zip(curves, n, strict=True)], np.float64)


def add_known(report: Report) -> None:
    rows: list[list[Cell]] = []
    for heritabilities, costs, budget in KNOWN:
        curves = [polygenic(h2) for h2 in heritabilities]
        equal = float(performances(curves, equal_allocation(costs, budget)).mean())
        share = float(performances(curves, proportional_allocation(SHARES, costs, budget)).mean())
        greedy = allocate(curves, costs, budget, n0=HELD, step=10)
        best = allocate(curves, costs, budget, n0=HELD, step=10, method="exact")
        setting = f"h² {heritabilities}, costs {costs}, budget {budget:g}"
        rows.append([setting, equal, share, greedy.utility, best.utility, str(greedy.counts)])
        gain = greedy.utility - max(equal, share)
        name = f"known curves, mean R²: greedy minus the better heuristic ({setting})"
        report.claims.append(Claim.at_least(name, SAYS, gain, 0.0))
    columns = ["setting", EQUAL, SHARE, "greedy", "exact", "greedy's counts"]
    note = f"{SEGMENTS} segments, {HELD} held each, batches of 10, shares {SHARES}."
    report.tables.append(ReportTable("Known curves: mean R²", columns, rows, note=note))
    report.figures.append(known_figure())


def known_figure() -> Figure:
    """Mean R² at every budget on the way: greedy is best at each."""
    heritabilities, costs, budget = KNOWN[1]
    curves = [polygenic(h2) for h2 in heritabilities]
    path = allocate(curves, costs, budget, n0=HELD, step=10).path
    spent = path @ np.asarray(costs)
    lines: dict[str, list[float]] = {
        "greedy": [float(performances(curves, n).mean()) for n in path]
    }
    for name, ratio in ((EQUAL, (1.0, 1.0, 1.0)), (SHARE, SHARES)):
        sizes = [proportional_allocation(ratio, costs, float(b), n0=HELD) for b in spent]
        lines[name] = [float(performances(curves, n).mean()) for n in sizes]
    series = [Series(name, spent, y, baseline=name == SHARE) for name, y in lines.items()]
    title = f"Known curves, h² {heritabilities}: mean R² as the money goes"
    return Figure("line", title, "spent", "mean R²", series)


# ── campaigns on worlds that only measurements know ─────────────────────────────────────────────


@dataclass
class World:
    """Groups to collect from. truth(g, n): the performance of a model trained on the first n.

    measure(g, n): what cross-validation on them makes of it. Both are remembered.
    """

    costs: Float
    budget: float
    held: int
    shares: Float
    truth: Callable[[int, int], float]
    measure: Callable[[int, int], float]
    pool: list[int] | None = None
    seen: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def at(self, what: str, g: int, n: int) -> float:
        if (what, g, n) not in self.seen:
            self.seen[what, g, n] = getattr(self, what)(g, n)
        return self.seen[what, g, n]

    def performance(self, counts: Int) -> Float:
        return np.array([self.at("truth", g, int(n)) for g, n in enumerate(counts)])

    def fixed(self, ratio: Any, held: int = 0) -> Int:
        """Whole counts in this ratio, from `held` on: 0, as the heuristics are defined."""
        n = proportional_allocation(ratio, self.costs, self.budget, n0=held, pool=self.pool)
        return np.floor(n + 1e-9).astype(np.int64)


def campaign(world: World, parts: tuple[float, ...] = (1.0,), **options: Any) -> Int:
    """The counts (G,) that an adaptive campaign ends with."""
    sampler = AdaptiveSampler(
        world.costs, world.budget, n0=world.held, pool=world.pool, **options
    )  # fmt: skip
    told = np.zeros(sampler.groups, np.int64)
    while not sampler.done:
        for g in np.flatnonzero(sampler.counts > GREW * told):
            for part in parts:
                n = math.ceil(part * sampler.counts[g])
                # models of a fold see four fifths of the data
                sampler.tell((1 - 1 / FOLDS) * n, world.at("measure", int(g), n), int(g))
            told[g] = sampler.counts[g]
        sampler.ask()
    return sampler.counts


def raw_maximin(world: World, batch: int) -> Int:
    """A batch to whoever measured worst last: no curve, no exploration."""
    n = np.full(len(world.costs), world.held)
    while (can := world.costs * batch <= world.budget - world.costs @ n).any():
        r = np.array([world.at("measure", g, int(size)) for g, size in enumerate(n)])
        n[int(np.argmin(np.where(can, r, math.inf)))] += batch
    return n


def oracle(world: World, batch: int) -> dict[str, float]:
    """The best mean and the best worst group of all allocations in batches, by the truth."""
    most = ((world.budget - world.costs.sum() * world.held) / (world.costs * batch)).astype(int)
    table = [
        np.array([world.at("truth", g, world.held + batch * k) for k in range(m + 1)])
        for g, m in enumerate(most)
    ]
    k = np.indices([m + 1 for m in most]).reshape(len(most), -1)
    k = k[:, world.costs @ (world.held + batch * k) <= world.budget]
    r = np.stack([row[one] for row, one in zip(table, k, strict=True)])
    return {"mean": float(r.mean(0).max()), "worst": float(r.min(0).max())}


def scores(worlds: Sequence[World], arms: Arms) -> dict[str, dict[str, Float]]:
    """arm -> mean and worst performance of each seed."""
    found = {}
    for arm, counts in arms.items():
        r = [world.performance(n) for world, n in zip(worlds, counts, strict=True)]
        found[arm] = {"mean": np.mean(r, axis=1), "worst": np.min(r, axis=1)}
    return found


def arm_table(
    title: str, found: Mapping[str, Mapping[str, Float]], arms: Arms, note: str
) -> ReportTable:
    rows: list[list[Cell]] = []
    for arm, values in found.items():
        counts = str(np.mean(arms[arm], axis=0).round().astype(int)) if arm in arms else ""
        against = (
            None if arm == EQUAL else paired_difference(values["worst"], found[EQUAL]["worst"])
        )
        rows.append(
            [arm, mean_interval(values["mean"]), mean_interval(values["worst"]), against, counts]
        )
    columns = ["", "mean", "worst group", "worst, minus equal", "mean counts"]
    return ReportTable(title, columns, rows, note=note)


def worst_figure(title: str, label: str, found: Mapping[str, Mapping[str, Float]]) -> Figure:
    each = [mean_interval(values["worst"]) for values in found.values()]
    ends = ([e.low for e in each], [e.high for e in each])
    series = [Series("worst group", list(found), [e.value for e in each], *ends)]
    return Figure("interval", title, label, "", series)


def against(
    found: Mapping[str, Mapping[str, Float]], key: str, arm: str, others: Sequence[str]
) -> list[tuple[str, Estimate]]:
    """Paired differences to several arms, which cover at once."""
    return [
        (other, paired_difference(found[arm][key], found[other][key], comparisons=len(others)))
        for other in others
    ]


# ── digits ──────────────────────────────────────────────────────────────────────────────────────


def digit_world(seed: int) -> World:
    """Half of each group's images to learn from, in random order, half to test on."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    x = x / 16
    random = np.random.default_rng([20, seed])
    orders = [random.permutation(np.flatnonzero(np.isin(y, group))) for group in DIGITS]
    tests = [rows[: len(rows) // 2] for rows in orders]
    trains = [rows[len(rows) // 2 :] for rows in orders]

    def right(train: Int, test: Int) -> int:
        if len(np.unique(y[train])) < 2:
            return int((y[test] == y[train[0]]).sum())
        model = LogisticRegression(max_iter=200).fit(x[train], y[train])
        return int((model.predict(x[test]) == y[test]).sum())

    def truth(g: int, n: int) -> float:
        return right(trains[g][:n], tests[g]) / len(tests[g])

    def measure(g: int, n: int) -> float:
        folds = np.array_split(trains[g][:n], FOLDS)  # in random order already
        rest = [np.concatenate(folds[:f] + folds[f + 1 :]) for f in range(FOLDS)]
        wrong = n - sum(map(right, rest, folds))
        return 1 - max(wrong, 0.5) / n  # no error in n does not mean that there is none

    shares, pool = np.array([0.2, 0.4, 0.4]), [len(rows) for rows in trains]
    return World(np.array([1.0, 2.0, 6.0]), 600.0, 20, shares, truth, measure, pool)


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    worlds = [digit_world(1000 * rng + s) for s in range(plan.digits)]
    adaptive = partial(campaign, batch=plan.batch, family="root", explore=EXPLORE)
    arms: Arms = {
        EQUAL: [world.fixed((1, 1, 1)) for world in worlds],
        SHARE: [world.fixed(world.shares) for world in worlds],
        MEAN: [adaptive(world) for world in worlds],
        WORST: [adaptive(world, utility="maximin") for world in worlds],
        RAW: [raw_maximin(world, plan.batch) for world in worlds],
    }
    found = scores(worlds, arms)
    report.claims.extend(digit_claims(found))
    best = [oracle(world, plan.batch) for world in worlds]
    found[ORACLE] = {key: np.array([one[key] for one in best]) for key in ("mean", "worst")}
    note = f"{plan.digits} seeds; costs 1, 2, 6; budget 600; 20 held of each; logistic regression."
    title = "Digits {0,1}, {3,5,8,9}, {2,4,6,7}: accuracy"
    report.tables.append(arm_table(title, found, arms, note))
    report.figures.append(worst_figure(title, "accuracy of the worst group", found))


def digit_claims(found: Mapping[str, Mapping[str, Float]]) -> list[Claim]:
    claims = []
    for arm in (MEAN, WORST):
        for other, gap in against(found, "worst", arm, (EQUAL, SHARE)):
            name = f"digits, worst group: {arm} minus {other}"
            claims.append(Claim.at_least(name, SAYS, gap, 0.01))
    for other, gap in against(found, "mean", MEAN, (EQUAL, SHARE)):
        name = f"digits, mean accuracy: {MEAN} minus {other}"
        claims.append(Claim.at_least(name, SAYS, gap, 0.0))
    starved = found[WORST]["worst"] < found[EQUAL]["worst"] - 0.01
    raw = found[RAW]["worst"] < found[EQUAL]["worst"] - 0.01
    measured = proportion_interval(int(starved.sum()), len(starved))
    rule = f"at most .25 (without curves and exploration: {raw.mean():.2f})"
    name = "digits: seeds in which maximin leaves the worst group .01 below equal numbers"
    says = "not in the paper: one noisy measurement must not starve a group"
    return [*claims, Claim.at_most(name, says, measured, 0.25, rule)]


# ── genotypes ───────────────────────────────────────────────────────────────────────────────────


def genotype_world(seed: int, p: int = SEGMENTS, budget: float = 1200.0) -> World:
    """Polygenic scores: X ~ Binom(2, maf), y = X β + ε, ridge with λ = p (1 - h²) / h².

    The standardised genotypes are independent and y has variance one, so that a score's R² on new
    people is known without any: (b·β)² / |b|².
    """
    heritabilities = KNOWN[0][0]
    random = np.random.default_rng([21, p, seed])
    most = int(budget) - (len(heritabilities) - 1) * HELD
    people = []
    for h2 in heritabilities:
        maf = random.uniform(0.05, 0.5, p)
        x = (random.binomial(2, maf, (most, p)) - 2 * maf) / np.sqrt(2 * maf * (1 - maf))
        effects = random.normal(size=p)
        effects *= math.sqrt(h2) / np.linalg.norm(effects)
        y = x @ effects + random.normal(scale=math.sqrt(1 - h2), size=most)
        people.append((x, y, effects, p * (1 - h2) / h2))

    def solve(gram: Float, moment: Float, ridge: float) -> Float:
        return linalg.solve(gram + ridge * np.eye(p), moment, assume_a="pos")

    def truth(g: int, n: int) -> float:
        x, y, effects, ridge = people[g]
        b = solve(x[:n].T @ x[:n], x[:n].T @ y[:n], ridge)
        return float((b @ effects) ** 2 / (b @ b))

    def measure(g: int, n: int) -> float:
        x, y, _, ridge = people[g]
        parts = np.array_split(np.arange(n), FOLDS)
        grams = [x[part].T @ x[part] for part in parts]
        moments = [x[part].T @ y[part] for part in parts]
        gram, moment = sum(grams), sum(moments)
        scores = [
            x[part] @ solve(gram - own, moment - its, ridge)
            for part, own, its in zip(parts, grams, moments, strict=True)
        ]
        correlation = float(np.corrcoef(np.concatenate(scores), y[:n])[0, 1])
        return correlation * abs(correlation)

    return World(np.ones(len(people)), budget, HELD, np.array(SHARES), truth, measure)


def add_genotypes(report: Report, plan: Plan, rng: int) -> None:
    worlds = [genotype_world(1000 * rng + s) for s in range(plan.genotypes)]
    adaptive = partial(
        campaign, batch=plan.batch, family="daetwyler", fit={"known": SEGMENTS}, explore=EXPLORE
    )
    arms: Arms = {
        EQUAL: [world.fixed((1, 1, 1)) for world in worlds],
        SHARE: [world.fixed(world.shares) for world in worlds],
        ALONE: [world.fixed(world.shares == world.shares.max(), HELD) for world in worlds],
        MEAN: [adaptive(world) for world in worlds],
        WORST: [adaptive(world, utility="maximin") for world in worlds],
    }
    found = scores(worlds, arms)
    for key, arm in (("mean", MEAN), ("worst", WORST)):
        for other, gap in against(found, key, arm, (EQUAL, SHARE)):
            name = f"genotypes, {key} R²: {arm} minus {other}"
            report.claims.append(Claim.at_least(name, SAYS, gap, 0.0))
    best = [oracle(world, max(plan.batch, 20)) for world in worlds]
    found[ORACLE] = {key: np.array([one[key] for one in best]) for key in ("mean", "worst")}
    note = f"{plan.genotypes} simulations; {SEGMENTS} variants; h² {KNOWN[0][0]}; budget 1200; "
    note += f"shares {SHARES}; one-parameter curves. Those are too low for ridge regression (what "
    note += "is explained is no noise any more), for every group, and serve all the same."
    title = "Simulated genotypes, ridge regression: R² of the polygenic score"
    report.tables.append(arm_table(title, found, arms, note))
    report.figures.append(worst_figure(title, "R² of the worst group", found))


# ── noise, and bad fits ─────────────────────────────────────────────────────────────────────────


def regrets(noise: float, explore: float, seeds: int, batch: int, rng: int) -> Float:
    """1 - U / U of the known curves, (seeds,), where every measurement is off by `noise`."""
    heritabilities, costs, budget = KNOWN[1]
    curves = [polygenic(h2) for h2 in heritabilities]
    best = allocate(curves, costs, budget, n0=HELD, step=batch).utility
    found = []
    for s in range(seeds):
        random = np.random.default_rng([22, rng, s])

        def truth(g: int, n: int) -> float:
            return float(curves[g].predict(n))

        def measure(g: int, n: int, random: np.random.Generator = random) -> float:
            return float(curves[g].predict((1 - 1 / FOLDS) * n) + noise * random.normal())

        world = World(np.asarray(costs), budget, HELD, np.array(SHARES), truth, measure)
        fit = {"known": SEGMENTS}
        n = campaign(world, batch=batch, family="daetwyler", fit=fit, explore=explore)
        found.append(1 - float(world.performance(n).mean()) / best)
    return np.array(found)


def add_noise(report: Report, plan: Plan, rng: int) -> None:
    rows: list[list[Cell]] = []
    series = []
    found: dict[tuple[float, float], Float] = {}
    for explore in (EXPLORE, 0.0):
        means = []
        for noise in plan.noises:
            values = regrets(noise, explore, plan.noise, plan.batch, rng)
            found[explore, noise] = values
            means.append(mean_interval(values))
            rows.append([explore, noise, means[-1], float(values.max())])
        ends = ([mean.low for mean in means], [mean.high for mean in means])
        series.append(
            Series(f"exploring {explore:g}", plan.noises, [mean.value for mean in means], *ends)
        )
    report.claims.extend(noise_claims(found, plan.noises[-1]))
    columns = ["explore", "noise", "mean regret", "largest"]
    title = "Regret against known curves, as a share of U, by noise of the measurements"
    note = f"{plan.noise} seeds. The best allocation here never buys from the third group: what "
    note += "exploration collects there is its price, and all of the regret where noise is small."
    report.tables.append(ReportTable(title, columns, rows, note=note))
    report.figures.append(Figure("line", title, "noise (sd)", "regret", series))


def noise_claims(found: Mapping[tuple[float, float], Float], loud: float) -> list[Claim]:
    values = found[EXPLORE, 0.01]
    says = "efficiently solved even without prior knowledge of the learning rates"
    rule = f"mean over {len(values)} seeds at most .03 (largest: {values.max():.4f})"
    name = "regret of the adaptive campaign, noise .01, as a share of U"
    quiet = Claim.at_most(name, says, mean_interval(values), 0.03, rule)
    gain = paired_difference(found[0.0, loud], found[EXPLORE, loud])
    name = f"noise {loud:g}: regret without exploration minus with"
    return [quiet, Claim.at_least(name, "not in the paper: exploration is ours", gain, 0.0)]


def add_misfit(report: Report, plan: Plan, rng: int) -> None:
    """Twice the variants: the measured R² are small, and two parameters fit anything."""
    p, batch = plan.misfit_variants, max(plan.batch, 40)
    worlds = [genotype_world(1000 * rng + s, p) for s in range(plan.misfits)]
    adaptive = partial(campaign, batch=batch, family="daetwyler")
    free = partial(adaptive, parts=(0.5, 0.75, 1.0))
    arms: Arms = {
        EQUAL: [world.fixed((1, 1, 1)) for world in worlds],
        SHARE: [world.fixed(world.shares) for world in worlds],
        FREE: [free(world, explore=0.0) for world in worlds],
        FREE_EXPLORED: [free(world, explore=EXPLORE) for world in worlds],
        MEAN: [adaptive(world, fit={"known": p}, explore=EXPLORE) for world in worlds],
    }
    found = scores(worlds, arms)
    says = "not in the paper: one bad fit starves a group"
    gap = paired_difference(found[FREE]["mean"], found[EQUAL]["mean"])
    name = f"{p} variants, mean R²: {FREE}, no exploration, minus equal"
    report.claims.append(Claim.at_most(name, says, gap, 0.0))
    gap = paired_difference(found[MEAN]["mean"], found[FREE]["mean"])
    name = f"{p} variants, mean R²: one parameter, exploring, minus {FREE}"
    report.claims.append(Claim.at_least(name, says, gap, 0.0))
    gap = paired_difference(found[MEAN]["mean"], found[EQUAL]["mean"])
    name = f"{p} variants, mean R²: one parameter, exploring, minus equal"
    report.claims.append(Claim.at_least(name, SAYS, gap, 0.0))
    title = f"Simulated genotypes, {p} variants: what a bad fit does"
    note = f"{plan.misfits} simulations; batches of {batch}; budget 1200."
    report.tables.append(arm_table(title, found, arms, note))
