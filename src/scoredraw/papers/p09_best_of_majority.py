"""Best-of-majority: submit k answers by an imperfect reward, of those that came often enough.

Exact instances first: best-of-n falls to nothing as samples come in, the majority vote does with
perfect rewards, some are hard for everybody; and the guarantee on random ones. Then trees vote on
images of digits, with a reward that errs once for each image and class and a threshold found on
other images. Last, real samples of a small language model, too few for the theory: there the claim
should fail, and how far off the theory is stands beside it.

Di, Ji, Li, Zhao and Gu, "Best-of-Majority: minimax-optimal strategy for pass@k inference scaling",
ICLR 2026, arXiv 2510.03199.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.answers import count_votes
from scoredraw.language.best_of_majority import (
    bom_in_rows,
    bom_threshold,
    submit_bom_in_rows,
)
from scoredraw.language.passk_regret import (
    coverage_coefficient,
    passk_regret,
    regret_bounds,
    reward_errors,
    survival_chance,
)
from scoredraw.language.selection import submit_by_vote
from scoredraw.language.submission import mob_weights, of_answer, soft_in_rows, submit_in_rows
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import Samples, read_samples

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Instance = tuple[Float, Float, Float]  # π, r*, r̂
Rows = tuple[Int, Bool, Float]  # codes, which are right, rewards
Found = dict[str, Float]  # by method

POINT = 0.01
ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.3)
REAL = ("smollm2-arith", "gsm8k-smollm2")
BON, MAJORITY, BOM, ANY = "best-of-n", "majority", "best-of-majority", "any answer"
WEIGHTED, COVERAGE, TWO = "weighted majority", "coverage", ", k = 2"
REWARDS = {0.0: "log-probability a token"}  # by the size of the noise
REWARDS |= {noise: f"right or wrong + {noise:g} noise" for noise in (0.3, 1.0)}
BEFORE, AGAIN = "largest difference from an earlier run", "the same experiment, run before"
SIZES = (10, 20, 50, 100, 200, 500)
# earlier runs, in %: on the digits with as many votes; with all votes and two answers; on the
# arithmetic samples by reward, best-of-n, majority and best-of-majority
EARLIER = {
    BON: (78.1, 76.7, 75.3, 74.0, 73.1, 73.8),
    MAJORITY: (66.7, 72.6, 78.8, 80.9, 83.0, 83.4),
    "α = 0.15": (78.1, 81.0, 82.6, 84.2, 85.1, 85.6),
}
EARLIER_TWO = {BON: 85.0, MAJORITY: 91.1, "α = 0.15": 91.9}
EARLIER_REAL = {0.0: (20.8, 24.2, 16.7), 0.3: (56.8, 23.8, 34.7), 1.0: (22.9, 23.9, 23.1)}
PUBLISHED = {  # k = 1, 2, 3, 5, 10
    "best-of-n (α = 0)": (83.6, 87.2, 88.8, 89.2, 90.0),
    "best-of-majority, α = 0.005": (86.8, 89.2, 89.6, 89.8, 90.2),
    "best-of-majority, α = 0.015": (87.4, 88.8, 89.4, 89.4, 89.8),
    "majority": (86.4, 88.0, 88.4, 88.8, 90.0),
}
FALLS = "best-of-n gets worse with more samples: regret of the order min{1, √(N ε²/k)}"
STABLE = "best-of-majority does not get worse with more samples (AIME24: stable from 200 on)"
BETTER = "best-of-majority is at least as good as best-of-n and the majority (GSM8K, MATH, AIME)"
BLIND = "the majority vote fails with perfect rewards once N ≥ 9 C* log(2k + 2)"
UPPER = "regret ≤ ε_opt + O(√(C* ε²/k)) + O(C* exp(-N/(32 C*))) with α = 3/(4 C*)"
NOTES = (
    "The paper's runs (a 4B model, a 7B reward model, 500 to 2,000 samples) are quoted only.",
    "Digits: intervals are over seeds (trees, votes, reward); the images are always the same.",
    "Language model: intervals resample problems; tens of them leave ±10 points. Ties share.",
    "Noise of samples, maximum: a frequent answer has more tries, which is a vote of its own.",
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    instances: int
    seeds: int
    votes: int
    noises: int  # draws of a reward's noise
    subsets: int
    resamples: int


PLANS = {
    "smoke": Plan(3, 2, 50, 4, 4, 100),
    "quick": Plan(60, 10, 500, 100, 40, 1000),
    "full": Plan(600, 60, 500, 1000, 400, 4000),
    "study": Plan(10_000, 1000, 500, 20_000, 4000, 20_000),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Compute the instances, test the guarantee, run digits and language model, and judge."""
    plan = PLANS[scale]
    report = Report(paper=9, scale=scale, seed=rng)
    add_degradation(report)
    add_majority_failure(report)
    add_hard_instances(report)
    add_guarantee(report, plan, rng)
    add_digits(report, plan, rng)
    for name in REAL:
        add_real(report, read_samples(name), plan, rng)
    rows: list[list[Cell]] = [[name, *row] for name, row in PUBLISHED.items()]
    columns = ["", *(f"k = {k}" for k in (1, 2, 3, 5, 10))]
    title = "MATH-500, N = 500, as published: Qwen3-4B-Instruct-2507 and AceMath-7B-RM, %"
    report.tables.append(ReportTable(title, columns, rows))
    report.notes.extend(NOTES)
    return report


# ── exact instances, and the guarantee ────────────────────────────────────────────────────────────


def degradation() -> Instance:
    """The best answer has 1/5, a mediocre one 1/2; of 1,000 bad ones 50 are dear to r̂."""
    pi = np.array([0.2, 0.5, *[0.3 / 1000] * 1000])
    r_true = np.array([0.9, 0.5, *[0.1] * 1000])
    return pi, r_true, np.array([0.9, 0.5, *[1.0] * 50, *[0.1] * 950])


def add_degradation(report: Report) -> None:
    """Best-of-n finds the best answer less and less often: 0.985^N - 0.785^N."""
    pi, r_true, r_hat = instance = degradation()
    success = (r_true == r_true.max()) * 1.0
    errors, coverage = reward_errors(*instance), coverage_coefficient(pi, r_true)
    ways = (("bon", 0.0), ("bom", 0.05), ("majority", 0.0))
    rows: list[list[Cell]] = []
    found: list[list[float]] = []
    for n in (10, 100, 1000):
        reached = [passk_regret(pi, success, r_hat, n, 1, a, m).reached for m, a in ways]
        bounds = regret_bounds(coverage, *errors, n)
        found.append([0.985**n - 0.785**n, *reached])
        rows.append([n, *found[-1], bounds.bon, bounds.lower])
    columns = ["N", "0.985^N - 0.785^N", BON, f"{BOM}, α = 0.05", MAJORITY, "min{1, √(N ε²/k)}",
               "√(C* ε²/k)"]  # fmt: skip
    note = f"Exact. C* = {coverage:g}, ε² = {errors[0]:g}, ε_opt = {errors[1]:g}. The last two are "
    note += "rates of regret, without constants."
    title = "How often the best answer is submitted: 50 bad answers are dear to the reward model"
    report.tables.append(ReportTable(title, columns, rows, note))
    law, bon, bom, _ = np.array(found).T
    name = "degradation: success of"
    off, least = float(np.abs(law - bon).max()), float(bom[1:].min())
    falls = Claim.at_most(f"{name} best-of-n with 1,000 samples", FALLS, float(bon[-1]), POINT)
    exact = Claim.at_most(f"{name} best-of-n less 0.985^N - 0.785^N", FALLS, off, 1e-12)
    stable = Claim.at_least(f"{name} best-of-majority, N ≥ 100", STABLE, least, 0.999)
    report.claims.extend([falls, exact, stable])
    ns = np.unique(np.round(np.geomspace(5, 1000, 24)).astype(int)).tolist()
    series = []
    for name, alpha, method in (
        (BON, 0.0, "bon"), (MAJORITY, 0.0, "majority"), (f"{BOM}, α = 0.05", 0.05, "bom"),
        (f"{BOM}, α = 3/(4 C*)", bom_threshold(coverage), "bom"), ("any sample", 0.0, "uniform"),
    ):  # fmt: skip
        values = [passk_regret(*instance, n, 1, alpha, method).value for n in ns]
        series.append(Series(name, ns, values, baseline=method == "uniform"))
    enough = regret_bounds(coverage, *errors, 1).bom_samples
    caption = f"Exact. The theory is about N ≥ 16 C* log(k C*/ε²) = {enough:.0f}. With few samples "
    caption += "one sighting passes the filter, and best-of-majority is best-of-n."
    title = "Regret as samples come in, the reward erring on rare answers"
    report.figures.append(Figure("line", title, "N", "regret", series, log_x=True, caption=caption))


def add_majority_failure(report: Report) -> None:
    """Three answers of 0.3 crowd out the right one of 0.1, k = 3, rewards perfect."""
    pi, worth = [0.3, 0.3, 0.3, 0.1], [0.0, 0.0, 0.0, 1.0]
    methods = {MAJORITY: "majority", BOM: "bom", BON: "bon"}
    rows: list[list[Cell]] = []
    for n in (20, 60, 200, 600):
        found = [passk_regret(pi, worth, worth, n, 3, 0.075, m) for m in methods.values()]
        rows.append([n, *(each.reached for each in found)])
    title = "How often the right answer is among three: π = (0.3, 0.3, 0.3, 0.1), perfect rewards"
    fails = regret_bounds(10, 0.0, 0.0, 1, 3).majority_samples
    note = f"α = 3/(4 C*) = 0.075; 9 C* log(2k + 2) = {fails:.0f}. Exact, but for the majority "
    note += "with 200 samples or more: 20,000 simulated tables of counts."
    report.tables.append(ReportTable(title, ["N", *methods], rows, note))
    majority, bom, _ = (each.reached for each in found)  # with the most samples
    name = "majority instance, k = 3, N = 600: success of"
    report.claims.append(Claim.at_most(f"{name} the majority", BLIND, majority, POINT))
    report.claims.append(Claim.at_least(f"{name} best-of-majority", BLIND, bom, 0.97))


def hard_regret(k: int) -> tuple[float, float]:
    """2k answers are alike but that one, each in turn, is better by 1/2: regret, and its rate."""
    m = 2 * k
    pi, r_hat, found = np.full(m, 1 / m), 1 - 1e-6 * np.arange(m), []
    for best in range(m):
        r_true = r_hat - 0.5 * (np.arange(m) != best)
        rate = regret_bounds(m, *reward_errors(pi, r_true, r_hat), 64 * m, k).lower
        regret = passk_regret(pi, r_true, r_hat, 64 * m, k, bom_threshold(m)).value
        found.append((regret, rate))
    regret, rate = np.mean(found, axis=0).tolist()
    return regret, rate


def add_hard_instances(report: Report) -> None:
    found = {k: hard_regret(k) for k in (1, 2, 3, 5, 8)}
    rows: list[list[Cell]] = [[k, 2 * k, a, b, a / b] for k, (a, b) in found.items()]
    title = "Hard instances: 2k answers alike, one of them better by 1/2, N = 64 C*"
    columns = ["k", "C*", "regret of best-of-majority", "√(C* ε²/k)", "ratio"]
    report.tables.append(ReportTable(title, columns, rows))
    ratios = [a / b for a, b in found.values()]
    says = "no method does better than the order of √(C* ε²/k), and best-of-majority attains it"
    name, rule = "hard instances: regret / √(C* ε²/k)", "all from 0.25 to 2"
    fine = 0.25 <= min(ratios) <= max(ratios) <= 2
    ends = f"{min(ratios):.3g} to {max(ratios):.3g}"
    report.claims.append(Claim.judge(name, says, ends, rule, fine))


def random_instance(random: np.random.Generator, support: int = 20) -> Instance:
    """Answers of uneven probability, rewards in [0, 1] with errors of random size."""
    pi = random.dirichlet(np.full(support, 10 ** random.uniform(-0.5, 0.5)))
    r_true, mix = random.random(support), random.random()
    return pi, r_true, (1 - mix) * r_true + mix * random.random(support)


def add_guarantee(report: Report, plan: Plan, rng: int) -> None:
    """The deterministic step, pool by pool, and the whole bound against the exact regret."""
    random = np.random.default_rng([rng, 1])
    steps, whole, tails = [], [], []
    for _ in range(plan.instances):
        instance = random_instance(random)
        coverage, errors = coverage_coefficient(*instance[:2]), reward_errors(*instance)
        alpha = bom_threshold(coverage)
        counts = random.multinomial(200, instance[0], 20)
        steps += [step_ratios(instance, counts, k, a) for k in range(1, 6) for a in (alpha, 0.02)]
        for n, k in ((200, 1), (200, 5), (2000, 2)):
            bounds = regret_bounds(coverage, *errors, n, k)
            whole.append(passk_regret(*instance, n, k, alpha).value / bounds.bom)
            tails.append(1 - survival_chance(instance[0], n, coverage) - bounds.bom_tail)
    ratios = np.concatenate(steps)
    says = "r*(y*) - max r*(ŷ_i) ≤ ε_opt + √(ε²/(a k)), a the least π submitted, if y* survives"
    name, rule = f"the step, {len(ratios):,} pools: largest regret over it", "at most 1: never more"
    step = Claim.at_most(name, says, float(ratios.max()), 1.0, rule)
    name = "the bound: largest exact regret over it"
    bound = Claim.at_most(name, UPPER, max(whole), 1.0, rule)
    says = "{π ≥ 1/C*} ⊂ Ŷ ⊂ {π ≥ 1/(4 C*)} but for O(C* exp(-N/(32 C*)))"
    name = "the bound: largest chance that this is not so, less the bound's tail"
    report.claims.extend([step, bound, Claim.at_most(name, says, max(tails), 1e-12)])


def step_ratios(instance: Instance, counts: Int, k: int, alpha: float) -> Float:
    """Regret over ε_opt + √(ε²/(a k')), k' submitted, in the pools (counts) where y* survives."""
    pi, r_true, r_hat = instance
    squared, at_best = reward_errors(*instance)
    every = np.tile(np.arange(len(pi)), len(counts))
    codes = np.repeat(every, counts.reshape(-1)).reshape(len(counts), -1)
    chosen = submit_bom_in_rows(codes, r_hat[codes], k, alpha)
    there = chosen >= 0
    answers = np.take_along_axis(codes, np.maximum(chosen, 0), 1)
    regret = r_true.max() - np.where(there, r_true[answers], -np.inf).max(axis=1)
    a = np.where(there, pi[answers], np.inf).min(axis=1)
    bound = at_best + np.sqrt(squared / (a * there.sum(axis=1)))
    return np.asarray((regret / bound)[counts[:, r_true.argmax()] >= alpha * codes.shape[1]])


# ── digits ───────────────────────────────────────────────────────────────────────────────────────


def choices(codes: Int, rewards: Float, right: Bool, **bom: Any) -> Found:
    """What each method earns in each row, (S,); `bom`: the options of best-of-majority."""
    chosen = {
        BON: bom_in_rows(codes, rewards, 0.0),
        MAJORITY: submit_by_vote(codes, np.ones(codes.shape)),
        BOM: bom_in_rows(codes, rewards, **bom),
        "the best sample": bom_in_rows(codes, rewards, 0.0, aggregate="max"),
        WEIGHTED: submit_by_vote(codes, rewards),
        "majority weighted by exp(reward)": submit_by_vote(codes, np.exp(rewards)),
        "majority-of-the-bests": submit_by_vote(codes, mob_weights(codes, rewards)),
        "soft best-of-n, β = 5": soft_in_rows(codes, rewards, 5.0),
        ANY: soft_in_rows(codes, rewards, 0.0),
        COVERAGE: right / np.maximum(right.sum(axis=1, keepdims=True), 1),
    }
    return {name: (choice * right).sum(axis=1) for name, choice in chosen.items()}


def hits(chosen: Int, right: Bool) -> Float:
    """Whether one of the submitted samples (S, k) is right."""
    found = np.take_along_axis(right, np.maximum(chosen, 0), 1) & (chosen >= 0)
    return np.asarray(found.any(axis=1), np.float64)


def digit_votes(seed: int, votes: int) -> tuple[Int, Int, Float]:
    """Votes of shallow trees on the images (I, votes), the truth (I,), and a model's chances."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_digits(return_X_y=True)
    x, images, y, truth = train_test_split(x, y, test_size=0.5, stratify=y, random_state=0)
    random, said = np.random.default_rng(seed), []
    for tree in range(votes):
        rows = random.integers(0, len(x), len(x))
        model = DecisionTreeClassifier(max_depth=3, max_features=4, random_state=tree)
        said.append(model.fit(x[rows], y[rows]).predict(images))
    few = random.permutation(len(x))[:200]  # of the rows that the trees were grown on
    chances = LogisticRegression(max_iter=1000).fit(x[few] / 16, y[few]).predict_proba(images / 16)
    return np.array(said).T, truth, chances


def digits_trial(seed: int, plan: Plan) -> Found:
    """What each method earns with each number of votes on each image, (sizes, I)."""
    votes, truth, chances = digit_votes(seed, plan.votes)
    random = np.random.default_rng([seed, 1])
    fixed = chances + 0.3 * random.normal(size=chances.shape)  # one error an image and class
    loose = np.take_along_axis(chances, votes, 1) + 0.3 * random.normal(size=votes.shape)
    out: dict[str, list[Float]] = {}
    for n in (n for n in SIZES if n <= plan.votes):
        codes, right = votes[:, :n], votes[:, :n] == truth[:, None]
        rewards, noisy = np.take_along_axis(fixed, codes, 1), loose[:, :n]
        row = choices(codes, rewards, right, alpha=0.15)
        row["α = 0.15"] = row.pop(BOM)
        by_count = of_answer(count_votes(codes), codes)
        row[f"{MAJORITY}{TWO}"] = hits(submit_in_rows(codes, by_count, 2), right)
        for alpha in (0.0, *ALPHAS):
            name = f"α = {alpha:g}" if alpha else BON
            row[name] = (bom_in_rows(codes, rewards, alpha) * right).sum(axis=1)
            row[f"{name}{TWO}"] = hits(submit_bom_in_rows(codes, rewards, 2, alpha), right)
        for name, alpha, how in ((BON, 0.0, "mean"), ("α = 0.15", 0.15, "mean"), (BON, 0.0, "max")):
            choice = bom_in_rows(codes, noisy, alpha, aggregate=how)
            row[f"{name}, noise a sample, {how}"] = (choice * right).sum(axis=1)
        for name, values in row.items():
            out.setdefault(name, []).append(values)
    return {name: np.array(rows) for name, rows in out.items()}


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    trials = [digits_trial(1000 * rng + seed, plan) for seed in range(plan.seeds)]

    def means(images: slice) -> Found:
        return {m: np.array([t[m][:, images].mean(axis=1) for t in trials]) for m in trials[0]}

    whole, chosen, held = means(slice(None)), means(slice(0, None, 2)), means(slice(1, None, 2))
    picked: list[list[str]] = []
    for k in ("", TWO):  # a threshold for each k, the same for all N
        each = np.array([chosen[f"α = {alpha:g}{k}"].mean(axis=1) for alpha in ALPHAS])
        picked.append([f"α = {ALPHAS[i]:g}" for i in each.argmax(axis=0)])
        held[BOM + k] = np.array([held[pick + k][s] for s, pick in enumerate(picked[-1])])
    sizes = [n for n in SIZES if n <= plan.votes]
    report.claims.extend(digits_claims(chosen, held, sizes))
    rows: list[list[Cell]] = []
    found = {f"{BOM}, α found{k}": held[BOM + k] for k in ("", TWO)}
    for name, values in {**found, **whole}.items():
        rows.append([name, *(mean_interval(column) for column in values.T)])
        if name in EARLIER:
            rows.append([f"{name}, before", *(v / 100 for v in EARLIER[name][: len(sizes)])])
    times = "; ".join(", ".join(f"{p} ({m.count(p)})" for p in sorted(set(m))) for m in picked)
    note = f"{plan.seeds} seeds. α found on half of the images and judged on the other, for k = 1 "
    note += f"and for k = 2, the same for all N: {times}."
    columns = ["", *(f"N = {n}" for n in sizes)]
    report.tables.append(ReportTable("Digits: accuracy with N votes", columns, rows, note))
    shown = (BON, MAJORITY, BOM, WEIGHTED, "α = 0.3", COVERAGE, ANY)
    report.figures.append(curves("Digits: accuracy as votes come in", sizes, held, shown))
    cells = [(x, v) for m, row in EARLIER.items() for x, v in zip(whole[m].T, row, strict=False)]
    if plan.votes == max(SIZES):
        cells += [(whole[m + TWO][:, -1], v) for m, v in EARLIER_TWO.items()]
    off = max(abs(x.mean() - v / 100) for x, v in cells)
    rule = "at most 0.02 (the earlier run had one set of trees)"
    report.claims.append(Claim.at_most(f"digits: {BEFORE}", AGAIN, float(off), 2 * POINT, rule))


def curves(title: str, sizes: Sequence[int], found: Found, shown: Sequence[str]) -> Figure:
    """Mean accuracy over the rows of (R, sizes)."""
    series = [Series(m, sizes, found[m].mean(axis=0), baseline=m == ANY) for m in shown]
    return Figure("line", title, "samples N", "accuracy", series, log_x=True)


def digits_claims(chosen: Found, held: Found, sizes: Sequence[int]) -> list[Claim]:
    """The rules, paired by seed; the best N is found on the images that α was found on."""

    def less(a: str, i: int, b: str, j: int) -> Estimate:
        return mean_interval(held[a][:, i] - held[b][:, j])

    every, last = range(len(sizes)), len(sizes) - 1
    top = int(chosen[BON].mean(axis=0).argmax())
    loss = max((less(BOM, i, BOM, j) for j in every for i in range(j)), key=lambda e: e.value)
    name = f"digits: best-of-n, N = {sizes[top]} less N = {sizes[last]}"
    claims = [Claim.at_least(name, FALLS, less(BON, top, BON, last), 3 * POINT)]
    name = "digits: best-of-majority's largest loss from an N to a larger one"
    claims.append(Claim.at_most(name, STABLE, loss, POINT))
    for k in ("", TWO):
        gaps = (less(BOM + k, j, other + k, j) for j in every for other in (BON, MAJORITY))
        name = f"digits{k}: best-of-majority less the better of the two, at the worst N"
        claims.append(Claim.at_least(name, BETTER, min(gaps, key=lambda e: e.value), -POINT))
    boundary = f"digits, N = {sizes[last]}: α = 0.3 less the majority"
    says = "a boundary: too large an α is the majority vote"
    claims.append(Claim.at_most(boundary, says, less("α = 0.3", last, MAJORITY, last), POINT))
    says, gap = "not compared in the paper", less(BOM, last, WEIGHTED, last)
    name = f"digits, N = {sizes[last]}: best-of-majority less the weighted majority"
    claims.append(Claim.at_least(name, says, gap, -POINT))
    mean, highest = (f"{BON}, noise a sample, {how}" for how in ("mean", "max"))
    filtered = less("α = 0.15, noise a sample, mean", last, mean, last)
    says, name = "a boundary: noise of samples averages out", "digits, noise a sample, mean:"
    gain, grown = less(mean, last, mean, 0), less(highest, last, highest, 0)
    claims.append(Claim.at_least(f"{name} best-of-n, all votes less 10", says, gain, 10 * POINT))
    says += ", and the filter buys nothing"
    claims.append(Claim.at_most(f"{name} α = 0.15 less best-of-n", says, filtered, POINT))
    says, name = "noise of samples grows under the maximum", "digits, noise a sample: best-of-n,"
    gap = less(highest, last, mean, last)
    claims.append(Claim.at_most(f"{name} max less mean, all votes", says, gap, -3 * POINT))
    return [*claims, Claim.at_most(f"{name} max, all votes less 10", says, grown, 0.0)]


# ── a small language model ──────────────────────────────────────────────────────────────────────


def real_rows(samples: Samples) -> Rows:
    """Codes, right answers and log-probabilities a token of the problems, (P, N) each."""
    pools = list(samples.pools())
    n = min(pool.n for pool in pools)
    codes = np.array([pool.codes[:n] for pool in pools])
    right = np.array([samples.grades[samples.rows(g)][:n] for g in range(len(pools))])
    scores = np.array([pool.scores("mean_logprob")[:n] for pool in pools])
    return codes, right & (codes >= 0), scores


def real_accuracy(rows: Rows, noise: float, draws: int, rng: int) -> Found:
    """What each method earns on each problem (P,) by log-probability, or right or wrong + noise."""
    codes, right, scores = rows
    if noise == 0:
        return choices(codes, scores, right, min_count=2)
    random, block = np.random.default_rng([rng, 2]), min(draws, 100)
    total: Found = {}
    for _ in range(draws // block):
        many, hit = np.tile(codes, (block, 1)), np.tile(right, (block, 1))
        errors = noise * random.normal(size=(len(many), int(codes.max()) + 1))
        for name, values in choices(many, hit + of_answer(errors, many), hit, min_count=2).items():
            each = values.reshape(block, -1).mean(axis=0) * block / draws
            total[name] = total[name] + each if name in total else each
    return total


def add_real(report: Report, samples: Samples, plan: Plan, rng: int) -> None:
    """Where N is far below what the theory asks for; C* beside it."""
    codes, right, _ = rows = real_rows(samples)
    problems, n = codes.shape
    table: dict[str, list[Cell]] = {}
    off: list[float] = []
    for noise, reward in REWARDS.items():
        found = real_accuracy(rows, noise, plan.noises, rng)
        for name, values in found.items():
            table.setdefault(name, []).append(bootstrap_interval(values, resamples=plan.resamples))
        better = max((BON, MAJORITY), key=lambda m: float(found[m].mean()))
        gap = bootstrap_interval(found[BOM] - found[better], resamples=plan.resamples)
        name = f"{samples.name}, N = {n}, {reward}: best-of-majority less {better}"
        report.claims.append(Claim.at_least(name, BETTER, gap, -POINT))
        before = zip((BON, MAJORITY, BOM), EARLIER_REAL[noise], strict=True)
        off += [abs(float(found[m].mean()) - v / 100) for m, v in before]
    cells: list[list[Cell]] = [[name, *row] for name, row in table.items()]
    if samples.name == REAL[0]:
        report.claims.append(Claim.at_most(f"{REAL[0]}: {BEFORE}", AGAIN, max(off), 2 * POINT))
        for i, name in enumerate((BON, MAJORITY, BOM)):
            cells.append([f"{name}, before", *(row[i] / 100 for row in EARLIER_REAL.values())])
    title = f"{samples.name}: accuracy with {n} samples of {problems} problems, by the reward"
    note = f"Noise: one draw an answer, {plan.noises} times. Best-of-majority: seen at least twice."
    report.tables.append(ReportTable(title, ["", *REWARDS.values()], cells, note))
    report.tables.append(coverage_table(samples.name, right))
    random, sizes = np.random.default_rng([rng, 3]), [k for k in (2, 4, 8, 16, 32, 64) if k <= n]
    order = np.argsort(random.random((plan.subsets, *codes.shape)), axis=2)
    many: Any = (np.take_along_axis(part[None], order, 2).reshape(-1, n) for part in rows)
    c, r, s = many
    parts = [choices(c[:, :k], s[:, :k], r[:, :k], min_count=2) for k in sizes]
    each = {name: np.stack([part[name] for part in parts], axis=1) for name in parts[0]}
    title = f"{samples.name}: accuracy as samples come in, the reward a {REWARDS[0.0]}"
    shown = (BON, MAJORITY, BOM, "the best sample", ANY, COVERAGE)
    report.figures.append(curves(title, sizes, each, shown))


def coverage_table(name: str, right: Bool) -> ReportTable:
    """How probable the right answer is, and how many samples the theory would want."""
    share = right.mean(axis=1)
    c = 1 / share[share > 0]
    need = [regret_bounds(each, 0.3**2, 0.0, 1).bom_samples for each in c]
    low, middle, high = np.quantile(c, [0.05, 0.5, 0.95]).tolist()
    row: list[Cell] = [len(share), len(c), 1 / float(c.min()), middle, f"{low:.3g} to {high:.3g}"]
    columns = ["problems", "right answer seen", "its largest share", "C*, median", "C*, 5 to 95 %",
               "16 C* log(C*/ε²), median", "N"]  # fmt: skip
    note = "C* = 1/share where the right answer was seen (too low: no share is below 1/N); ε = 0.3."
    row += [float(np.median(need)), right.shape[1]]
    return ReportTable(f"{name}: coverage coefficients", columns, [row], note)
