"""Repeated sampling: how coverage grows, whether that can be foretold, and what a choice loses.

Real samples: a small language model answered 48 arithmetic problems 32 times each; four published
systems answered 1,319 grade school problems once each. Coverage at k (is any of k samples right?)
stands beside the accuracy of every way of choosing one of the k without knowing which is right.
Picking any sample is the baseline. Coverage at 32 is foretold from 8 samples by three rules, over
many choices of the 8. A twin has as many samples as one likes: a sample is a bootstrapped decision
tree, a problem a digit, so that votes reach their plateau and depths make a family of models.

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.language.coverage import (
    CoverageCurve,
    coverage_curve,
    curve_shift,
    extrapolate_coverage,
    fit_beta_binomial,
    fit_power_law,
    log_spaced_sizes,
    pass_at_k,
    plug_in_coverage,
)
from scoredraw.language.coverage_audit import selection_curve
from scoredraw.language.coverage_models import BetaBinomial, PowerLaw, fit_tallies, least_squares
from scoredraw.language.inference_cost import cost_to_reach, inference_flops
from scoredraw.language.selection import METHODS
from scoredraw.language.selection_curves import SelectionCurve
from scoredraw.metrics import Estimate, bootstrap_interval
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import Samples, read_samples

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Curves = dict[str, SelectionCurve]

NAMES = {
    "oracle": "coverage",
    "uniform": "any sample",
    "uniform_answered": "any answer",
    "majority": "majority vote",
    "mean_logprob": "likeliest, per token",
    "sum_logprob": "likeliest",
    "mean_probability": "weighted vote, per token",
    "sum_probability": "weighted vote",  # by the probability of a sample
    "bon": "the surest tree",
}
SYSTEMS = ("6B fine-tuned", "6B verifier", "175B fine-tuned", "175B verifier")
POWER, BETA, PLUG_IN = "power law", "beta-binomial", "plug-in"
SEEN = 8  # the samples to foretell from
POINTS_A_DOUBLING = 0.02  # less than this is a plateau
SHIFTS = 500  # resamples that are shifted, one by one
SHAPE = 0.05  # a family's curves may differ by so much once they are shifted
SMALL = "SmolLM2-135M"
SMOLLM2 = {  # parameters, layers, width
    SMALL: (134.5e6, 30, 576),
    "SmolLM2-360M": (361.8e6, 32, 960),
    "SmolLM2-1.7B": (1.711e9, 24, 2048),
}
PROMPT = 200  # tokens, where the cost of a prompt is shown
# as published: attempts at each of SWE-bench Lite's 300 issues, share solved, dollars in all
PUBLISHED_COSTS = (
    ("DeepSeek-Coder-V2-Instruct", 5, 0.2962, 10.8),
    ("GPT-4o", 1, 0.2400, 39.0),
    ("Claude 3.5 Sonnet", 1, 0.2670, 51.0),
)
ISSUES = 300
NOTES = (
    "The paper's 10,000 samples a problem are gigabytes, not shipped: quoted, not measured again.",
    "51 % of the language model's samples hold no readable answer: wrong, without a vote.",
    "Intervals resample problems. The error of a model is not in them: compare the two models.",
)
GAP_SAYS = (
    "MATH, Llama-3-8B: from 100 to 10,000 samples coverage rises from 82.9 % to 98.44 %, the best "
    "selector only from 40.50 % to 41.41 %"
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs. Selectors of the twin see up to a quarter of it."""

    resamples: int
    repeats: int  # random subsets, where there is no closed form
    draws: int  # choices of 8 of the 32 samples
    trees: int
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (3, 2, 4, 5)  # the first is the twin, and the family's reference


PLANS = {
    "smoke": Plan(100, 10, 40, 16, sizes=(1, 8, 32), depths=(3, 4)),
    "quick": Plan(1000, 100, 400, 256),
    "full": Plan(4000, 1000, 4000, 1024),
    "study": Plan(20_000, 10_000, 40_000, 4096),
}


def run(scale: str, rng: int) -> Report:
    """Measure the curves, foretell them, choose among the samples, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=38, scale=scale, seed=rng)
    samples = read_samples("smollm2-arith")
    add_selection(report, samples, plan, rng)
    add_models(report, samples, plan, rng)
    add_forecast(report, samples, plan, rng)
    add_costs(report, samples, plan, rng)
    add_systems(report, read_samples("gsm8k-solutions"), plan)
    add_twin(report, plan, rng)
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── coverage and the ways to choose ─────────────────────────────────────────────────────────────


def selections(
    samples: Samples, methods: Sequence[str], sizes: Sequence[int], repeats: int, rng: int
) -> Curves:
    """Accuracy at each size by each method; "oracle" is coverage."""
    return {m: selection_curve(samples, m, sizes, repeats=repeats, rng=rng) for m in methods}


def add_selection(report: Report, samples: Samples, plan: Plan, rng: int) -> None:
    methods = [method for method, (_, score) in METHODS.items() if score != "rewards"]
    curves = selections(samples, methods, plan.sizes, plan.repeats, rng)
    report.claims.extend(selection_claims(curves, plan))
    title = f"Accuracy at k, SmolLM2-135M on {len(samples)} arithmetic problems"
    add_curves(report, title, curves, plan)


def selection_claims(curves: Curves, plan: Plan) -> list[Claim]:
    coverage, majority, chance = (
        curves[method].per_problem[:, -1] for method in ("oracle", "majority", "uniform")
    )
    k = int(curves["oracle"].k[-1])
    twice = over_problems(plan, np.mean, coverage - 2 * majority)
    gain = over_problems(plan, np.mean, majority - chance)
    says = "choosing without a verifier helps, up to a point"
    return [
        gap_claim(f"SmolLM2, coverage({k}) - the best selector({k})", curves, plan),
        Claim.at_least(f"SmolLM2, coverage({k}) - 2 majority({k})", GAP_SAYS, twice, 0.0),
        Claim.at_least(f"SmolLM2, majority({k}) - any sample", says, gain, 0.0),
        plateau_claim("SmolLM2", curves, plan),
    ]


def over_problems(plan: Plan, statistic: Callable[..., Any], *columns: Float) -> Estimate:
    """A statistic of one or more columns (P,), and its bootstrap interval over problems."""
    values = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    return bootstrap_interval(values, statistic=statistic, resamples=plan.resamples)


def gap_to_best(rows: Float, axis: int = 0) -> Any:
    """Mean coverage (column 0) less the best mean of the other columns."""
    mean = rows.mean(axis)
    return mean[..., 0] - mean[..., 1:].max(-1)


def gap_claim(name: str, curves: Curves, plan: Plan, alone: Sequence[Float] = ()) -> Claim:
    """The best selector is found on the same data, in each resample anew: in its favour."""
    others = [curve.per_problem[:, -1] for method, curve in curves.items() if method != "oracle"]
    coverage = curves["oracle"].per_problem[:, -1]
    gap = over_problems(plan, gap_to_best, coverage, *others, *alone)
    rule = "interval above 0, the selector being the best of each resample"
    holds = True if gap.above(0) else False if gap.below(0) else None
    return Claim.judge(name, GAP_SAYS, gap, rule, holds)


def plateau_claim(name: str, curves: Curves, plan: Plan) -> Claim:
    majority = curves["majority"]
    last = majority.k[-1]
    start = int(np.searchsorted(majority.k, last / 4))
    doublings = np.log2(last / majority.k[start])
    gain = (majority.per_problem[:, -1] - majority.per_problem[:, start]) / doublings
    name = f"{name}, what a doubling adds to the majority vote, k = {majority.k[start]} to {last}"
    says = "selectors reach a plateau at about 100 samples; 0.14 points a doubling beyond (MATH)"
    rule = f"a plateau: at most {POINTS_A_DOUBLING:.0%} of the problems a doubling"
    added = over_problems(plan, np.mean, gain)
    return Claim.at_most(name, says, added, POINTS_A_DOUBLING, rule)


def add_curves(report: Report, title: str, curves: Curves, plan: Plan) -> None:
    """A table and a figure of accuracy at k, the best first."""
    rows: list[list[Cell]] = []
    series = []
    for method, curve in sorted(curves.items(), key=lambda item: -item[1].accuracy[-1]):
        cells = [over_problems(plan, np.mean, column) for column in curve.per_problem.T]
        how = "random subsets" if "Monte Carlo" in curve.how else "exact"
        rows.append([NAMES[method], *cells, how])
        band = np.array([[cell.low, cell.high] for cell in cells]).T
        low, high = (None, None) if method == "uniform" else band
        series.append(line(NAMES[method], curve.k, curve.accuracy, low, high, method == "uniform"))
    error = max(float(curve.standard_error.max()) for curve in curves.values())
    note = "Exact: the mean over all k-subsets."
    if error:
        note += f" Random subsets: {plan.repeats} where there are many; error ≤ {error:.4f}."
    columns = ["", *(f"k = {k}" for k in curves["oracle"].k), "subsets"]
    report.tables.append(ReportTable(title, columns, rows, note=note))
    report.figures.append(replace(log_figure(title, series), y_label="share of problems solved"))


def line(
    name: str, x: Any, y: Float, low: Any = None, high: Any = None, baseline: bool = False
) -> Series:
    return Series(name, x, y.tolist(), low, high, baseline=baseline)


def log_figure(title: str, series: list[Series], caption: str = "") -> Figure:
    return Figure("line", title, "samples k", "coverage", series, log_x=True, caption=caption)


# ── models of the curve ─────────────────────────────────────────────────────────────────────────


def add_models(report: Report, samples: Samples, plan: Plan, rng: int) -> None:
    n, c = samples.counts, samples.right
    every = np.arange(1, int(n.min()) + 1)
    spaced = log_spaced_sizes(every[-1])
    curve = coverage_curve((n, c), every, resamples=plan.resamples, rng=rng)
    rows: list[list[Cell]] = []
    for ks, space in ((every, "coverage"), (spaced, "coverage"), (every, "log")):
        law = fit_power_law(ks, curve.at(ks), space=space)
        least = "coverage" if space == "coverage" else "log(-log coverage)"
        rows.append([f"{POWER}, least squares in {least}", len(ks), law.a, law.b, law.r2])
    beta = fit_beta_binomial(n, c)
    r2 = float(r_squared(curve.mean, beta.coverage(every)))
    rows.append([f"{BETA}, maximum likelihood", len(samples), beta.alpha, beta.beta, r2])
    columns = ["model", "sizes or problems fitted to", "a or α", "b or β", "R² of the curve"]
    title = f"Two models of the curve, k = 1 to {every[-1]}"
    report.tables.append(ReportTable(title, columns, rows))
    report.claims.append(fit_claim(n, c, plan, rng))
    report.figures.append(far_figure(n, c, curve, plan, rng))


def r_squared(curve: Float, fit: Float) -> Any:
    """1 - Σ residuals² / Σ (curve - its mean)² along the last axis."""
    spread = ((curve - curve.mean(-1, keepdims=True)) ** 2).sum(-1)
    return 1 - ((curve - fit) ** 2).sum(-1) / spread


def resampled_means(values: Float, plan: Plan, rng: int) -> Float:
    """The mean of rows (P, K) over problems drawn with replacement, (R, K)."""
    problems = len(values)
    generator = np.random.default_rng(rng)
    times = generator.multinomial(problems, np.full(problems, 1 / problems), plan.resamples)
    return times @ values / problems


def fit_claim(n: Int, c: Int, plan: Plan, rng: int) -> Claim:
    ks = np.arange(1, int(n.min()) + 1)
    each = pass_at_k(n, c, ks)
    curves = np.concatenate([each.mean(0)[None], resampled_means(each, plan, rng)])
    a, b, _ = least_squares(np.log(ks), curves)
    r2 = r_squared(curves, PowerLaw(a, b).coverage(ks))
    name = f"R² of the power law exp(a k^b), k = 1 to {ks[-1]}"
    says = "coverage often follows an exponentiated power law of the number of samples"
    found = replace(central(r2[1:]), value=float(r2[0]), n=len(n))
    return Claim.at_least(name, says, found, 0.99)


def extrapolated(n: Int, c: Int, ks: Int, plan: Plan, rng: int) -> dict[str, CoverageCurve]:
    """Both models, fitted to all samples."""
    return {
        name: extrapolate_coverage(n, c, ks, model=model, resamples=plan.resamples, rng=rng)
        for name, model in ((POWER, "power_law"), (BETA, "beta_binomial"))
    }


def far_figure(n: Int, c: Int, curve: CoverageCurve, plan: Plan, rng: int) -> Figure:
    """Up to 10,000 samples."""
    far = extrapolated(n, c, log_spaced_sizes(10_000, 25), plan, rng)
    series = [
        line(name, each.k, each.mean, each.low, each.high, name == "measured")
        for name, each in {"measured": curve, **far}.items()
    ]
    title = f"Where the curve would go, by models fitted to {curve.k[-1]} samples"
    caption = "The models agree where there are data. Nothing here was measured beyond them."
    return log_figure(title, series, caption)


def forecasts(n: Int, c: Int, ks: Int, draws: int, rng: int) -> dict[str, Float]:
    """Coverage at sizes ks as foretold from random 8 of each problem's samples, (draws, K) each."""
    generator = np.random.default_rng(rng)
    seen = generator.hypergeometric(c, n - c, SEEN, size=(draws, len(c)))
    counts = np.arange(SEEN + 1)
    times = np.stack([(seen == count).sum(axis=1) for count in counts], axis=1)
    sizes = np.arange(1, SEEN + 1)
    curves = times @ pass_at_k(SEEN, counts, sizes) / len(c)
    a, b, _ = least_squares(np.log(sizes), curves)
    beta = BetaBinomial(*fit_tallies(np.full(len(counts), SEEN), counts, times))
    return {
        POWER: PowerLaw(a, b).coverage(ks),
        BETA: beta.coverage(ks),
        PLUG_IN: times @ plug_in_coverage(SEEN, counts, ks) / len(c),
    }


def add_forecast(report: Report, samples: Samples, plan: Plan, rng: int) -> None:
    n, c = samples.counts, samples.right
    ks = np.unique(np.append(log_spaced_sizes(int(n.min()), 16), SEEN))
    truth = pass_at_k(n, c, ks).mean(0)
    found = forecasts(n, c, ks, plan.draws, rng)
    report.claims.extend(forecast_claims(found, float(truth[-1]), int(ks[-1])))
    rows: list[list[Cell]] = []
    for name, values in found.items():
        error = values[:, -1] - truth[-1]
        off = (error.mean(), error.std(ddof=1), np.sqrt((error**2).mean()))
        rows.append([name, central(values[:, -1]), *map(float, off)])
    columns = ["rule", "foretold (central 95 %)", "bias", "standard deviation", "typical error"]
    title = f"Coverage({ks[-1]}) foretold from {SEEN} samples; measured {truth[-1]:.3f}"
    note = f"{plan.draws} random choices of {SEEN} samples. Typical error: root mean square."
    report.tables.append(ReportTable(title, columns, rows, note=note))
    series = [line("measured", ks, truth, baseline=True)]
    for name, values in found.items():
        ends = np.quantile(values, [0.025, 0.975], axis=0)
        series.append(line(name, ks, values.mean(0), *ends))
    caption = f"Mean and central 95 % over {plan.draws} choices of the {SEEN}."
    report.figures.append(log_figure(f"Foretold from {SEEN} samples", series, caption))


def central(values: Float) -> Estimate:
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def forecast_claims(found: dict[str, Float], truth: float, k: int) -> list[Claim]:
    name, lies = f"coverage({k}) from {SEEN} samples by the", f"the measured {truth:.3f}"
    spread = {rule: central(values[:, -1]) for rule, values in found.items()}
    says = {
        POWER: "the fitted power law lets one foresee coverage with more samples",
        BETA: "not in the paper; Schaeffer et al. (2025) derive power laws from such a mixture",
        PLUG_IN: "not in the paper, which uses the unbiased estimate: the plug-in is too low",
    }
    rule = f"{lies} lies in the central 95 % of the forecasts"
    claims = []
    for model in (POWER, BETA):
        holds = spread[model].low <= truth <= spread[model].high
        claims.append(Claim.judge(f"{name} {model}", says[model], spread[model], rule, holds))
    rule = f"the central 95 % of the forecasts lie below {lies}"
    name = f"{name} {PLUG_IN} 1 - (1 - c/{SEEN})^{k}"
    return [*claims, Claim.at_most(name, says[PLUG_IN], spread[PLUG_IN], truth, rule)]


# ── what it costs ───────────────────────────────────────────────────────────────────────────────


def gigaflops_of(model: str, tokens: Float, prompt: int) -> Callable[[float], float]:
    """10^9 operations of k samples of these lengths on average, the prompt processed once."""
    params, layers, width = SMOLLM2[model]
    once = inference_flops(params, layers, width, prompt, 0, 1) / 1e9
    each = inference_flops(params, layers, width, prompt, tokens, 1).mean() / 1e9 - once
    return lambda k: float(once + k * each)


def add_costs(report: Report, samples: Samples, plan: Plan, rng: int) -> None:
    n, c, tokens = samples.counts, samples.right, samples.tokens
    assert tokens is not None
    ks = log_spaced_sizes(int(n.min()))
    curve = coverage_curve((n, c), ks, resamples=plan.resamples, rng=rng)
    models = {"measured": curve, **extrapolated(n, c, ks, plan, rng)}
    rows: list[list[Cell]] = []
    for target in (0.5, 0.9):
        for name, model_curve in models.items():
            if not np.isfinite(model_curve.k_for(target)):
                continue
            costs = (gigaflops_of(SMALL, tokens, prompt) for prompt in (0, PROMPT))
            alone, prompted = (cost_to_reach(model_curve, target, cost) for cost in costs)
            rows.append([target, name, alone.samples, alone.cost, prompted.cost])
    columns = ["coverage", "by", "samples", "GFLOP", f"GFLOP, prompt of {PROMPT}"]
    note = f"{SMALL}, mean over the samples' real lengths ({tokens.mean():.1f} tokens). The "
    note += f"prompt's was not recorded: {PROMPT} tokens are an assumption."
    table = ReportTable("Arithmetic for a problem to reach a coverage", columns, rows, note=note)
    report.tables.extend([table, exchange_table(curve, tokens), published_table()])


def exchange_table(curve: CoverageCurve, tokens: Float) -> ReportTable:
    """How many samples of the small model one of a larger one pays for."""
    each = {model: gigaflops_of(model, tokens, 0)(1) for model in SMOLLM2}
    rows: list[list[Cell]] = []
    for model, one in each.items():
        k = int(one / each[SMALL])
        rows.append([model, one, k, float(curve.at(k))])
    columns = ["one sample of", "GFLOP", "samples of 135M instead", "their coverage"]
    note = "Equal lengths, decoding only; the larger models were not run. Their sample has to be "
    note += "right more often than the last column, where right answers can be recognised."
    return ReportTable("What a larger model's sample would pay for", columns, rows, note=note)


def published_table() -> ReportTable:
    """The paper's table of costs, and what an attempt and a solved issue cost by it."""
    rows: list[list[Cell]] = [
        [model, attempts, solved, dollars, dollars / ISSUES / attempts, dollars / ISSUES / solved]
        for model, attempts, solved, dollars in PUBLISHED_COSTS
    ]
    columns = ["model", "attempts", "solved", "dollars", "an attempt", "a solved issue"]
    note = "Last two columns: derived. The paper gives no token counts to price anew."
    return ReportTable("SWE-bench Lite as the paper reports it", columns, rows, note=note)


def add_systems(report: Report, samples: Samples, plan: Plan) -> None:
    """Not samples of one model, but what a single system alone reaches is known here."""
    alone = samples.grades.reshape(-1, len(SYSTEMS)).astype(np.float64).T
    curves = selections(samples, ("oracle", "majority"), (1, 2, 3, 4), 1, 0)
    title = f"Four systems on {len(samples):,} problems of GSM8K: k of the four at random"
    rows: list[list[Cell]] = []
    for method, curve in curves.items():
        cells = [over_problems(plan, np.mean, column) for column in curve.per_problem.T]
        rows.append([NAMES[method], *cells])
    for system, correct in zip(SYSTEMS, alone, strict=True):
        rows.append([f"{system}, alone", over_problems(plan, np.mean, correct), None, None, None])
    report.tables.append(ReportTable(title, ["", "k = 1", "k = 2", "k = 3", "k = 4"], rows))
    name = "GSM8K, coverage(4) - the better of the majority vote and the best system alone"
    report.claims.append(gap_claim(name, curves, plan, list(alone)))


# ── a twin with a plateau, and a family ─────────────────────────────────────────────────────────


def tree_samples(depth: int, trees: int, rng: int) -> Samples:
    """200 digits, each labelled by bootstrapped trees; a tree's reward is how sure it is."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_digits(return_X_y=True)
    x, images, y, truth = train_test_split(x, y, test_size=200, stratify=y, random_state=0)
    generator = np.random.default_rng(rng)
    shares = np.empty((trees, len(images), 10))
    for tree in range(trees):
        times = np.bincount(generator.integers(0, len(x), len(x)), minlength=len(x))
        model = DecisionTreeClassifier(max_depth=depth, random_state=tree)
        shares[tree] = model.fit(x, y, sample_weight=times).predict_proba(images)
    answers = shares.argmax(axis=2).T
    correct, rewards = answers == truth[:, None], shares.max(axis=2).T
    names, offsets = tuple(map(str, range(len(images)))), np.arange(len(images) + 1) * trees
    columns = (each.reshape(-1) for each in (correct, answers, rewards))
    return Samples(f"trees of depth {depth}", names, offsets, *columns)


def add_twin(report: Report, plan: Plan, rng: int) -> None:
    family = {depth: tree_samples(depth, plan.trees, rng) for depth in plan.depths}
    depth, twin = next(iter(family.items()))
    sizes = 2 ** np.arange(int(np.log2(plan.trees / 4)) + 1)
    curves = selections(twin, ("oracle", "uniform", "majority", "bon"), sizes.tolist(), 1, rng)
    name = f"twin, coverage({sizes[-1]}) - the best selector({sizes[-1]})"
    report.claims.extend([gap_claim(name, curves, plan), plateau_claim("twin", curves, plan)])
    add_curves(report, f"The twin: 200 digits, trees of depth {depth} as samples", curves, plan)
    add_family(report, family, plan, rng)


def add_family(report: Report, family: dict[int, Samples], plan: Plan, rng: int) -> None:
    """Coverage of every depth set against the first: how far to shift, and what is left."""
    ks = np.unique(np.round(np.geomspace(1, plan.trees / 4, 24))).astype(np.int64)
    each = {depth: pass_at_k(s.counts, s.right, ks) for depth, s in family.items()}
    means = {depth: values.mean(0) for depth, values in each.items()}
    # the same seed draws the same images for every depth
    resampled = {depth: resampled_means(values, plan, rng) for depth, values in each.items()}
    reference, *others = family
    rows: list[list[Cell]] = []
    for depth in others:
        found = shift_between(means[depth], means[reference], ks)
        pairs = zip(resampled[depth][:SHIFTS], resampled[reference][:SHIFTS], strict=True)
        again = np.array([shift_between(*pair, ks) for pair in pairs])
        factor, left = (replace(central(again[:, i]), value=found[i], n=200) for i in (0, 1))
        before = float(np.abs(means[depth] - means[reference]).max())
        rows.append([depth, factor, before, left])
        name = f"depth {depth} against depth {reference}: largest gap once shifted in log k"
        says = "a family's coverage curves are one S-shaped curve, shifted in log k"
        rule = f"at most {SHAPE:g} (unshifted: {before:.3f})"
        report.claims.append(Claim.at_most(name, says, left, SHAPE, rule))
    columns = ["depth", "samples needed, as a factor", "largest gap", "largest gap once shifted"]
    title = f"A family of models: coverage of trees against those of depth {reference}"
    report.tables.append(ReportTable(title, columns, rows))
    series = [line(f"depth {d}", ks, means[d], baseline=d == reference) for d in sorted(means)]
    report.figures.append(log_figure(title, series))


def shift_between(curve: Float, reference: Float, ks: Int) -> tuple[float, float]:
    """How many times as many samples a curve takes as the reference, and the gap that is left."""
    a, b = (CoverageCurve(ks, mean, mean, mean, problems=1) for mean in (curve, reference))
    found = curve_shift(a, b)
    return float(np.exp(found.shift)), found.distance
