"""DEALRec: a few examples to fine-tune on, by influence, effort and coverage.

*Digits*: 1,300 to choose from and 497 to test on, another split each seed. The cheap model is a
softmax regression (c = .001, 20 steps of L-BFGS); the expensive one a network 64-64-10 that has
seen 130 examples, whose last layer gives effort. A fresh network is trained on what each arm
chooses, always with the same number of updates. *Leave-one-out*: the influence of the examples of
ridge logistic regressions against retraining without each. *Solvers*: LiSSA, as released and
correctly scaled, against conjugate gradients. *Recommendation* (study): `sequence_recommenders`.

Lin et al., "Data-efficient Fine-tuning for LLM-based Recommendation", SIGIR 2024, arXiv
2401.17197.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from scipy.stats import spearmanr

from scoredraw.data_selection.coverage_selection import (
    cluster_select,
    combined_score,
    coverage_select,
)
from scoredraw.data_selection.influence import el2n
from scoredraw.data_selection.influence_on_risk import influence_on_risk
from scoredraw.data_selection.inverse_hessian import inverse_hessian_product
from scoredraw.data_selection.softmax_surrogate import fit_softmax, softmax_influence
from scoredraw.data_selection.tracin import last_layer_gradient_norms
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import real_trials, sequence_recommenders
from scoredraw.papers.training import minibatches, train_ensemble
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import top_k, uniform

Int = NDArray[np.int64]
Float = NDArray[np.float64]

POOL, SEEN, CLASSES, HIDDEN, BATCH = 1300, 130, 10, (64,), 32
PENALTY, STEPS = 1e-3, 20
WEIGHT, GROUPS, PRUNE, BUDGET = 0.5, 50, 0.1, 65
EARLY_EPOCHS, EARLY_RUNS = 3, 3
OURS, NO_PRUNE, GREEDY = "DEALRec", "DEALRec, no hard prune", "greedy top-score"
ARMS = ("random", "CCS", "k-means", "EL2N", "GraNd", GREEDY, NO_PRUNE, OURS)


@dataclass(frozen=True)
class Plan:
    seeds: int
    updates: int
    budgets: tuple[int, ...] = (BUDGET,)
    draws: int = 10
    lissa: tuple[int, int] = (5, 5000)  # runs, steps
    settings: tuple[str, ...] = ()
    sequences: bool = False


SETTINGS = (
    *("weight 0", "weight 0.1", "weight 0.3", "weight 1", "weight 2"),
    *("groups 1", "groups 10", "groups 25", "groups 75"),
)
PLANS = {
    "smoke": Plan(2, 30, draws=3, lissa=(2, 500)),
    "quick": Plan(8, 1000, (BUDGET, 260)),
    "full": Plan(20, 1000, (26, BUDGET, 130, 260), draws=40, settings=SETTINGS),
    "study": Plan(60, 1000, (26, BUDGET, 130, 260, 520), 200, (5, 5000), SETTINGS, True),
}


@dataclass(frozen=True)
class Split:
    """(seeds, rows, 64) pixels and (seeds, rows) labels to choose from, and to test on."""

    x: NDArray[np.float32]
    y: Int
    test_x: NDArray[np.float32]
    test_y: Int


@dataclass(frozen=True)
class Digits(Split):
    """A split with its scores, (seeds, POOL) each, and the surrogate's mean-gradient ratio."""

    influence: Float
    effort: Float
    el2n: Float
    grand: Float
    ratio: Float

    def score(self, s: int, weight: float = WEIGHT) -> Float:
        return combined_score(self.influence[s], self.effort[s], effort_weight=weight)


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    data = scored(digits(plan.seeds, rng), rng)
    arms = {budget: accuracies(data, ARMS, budget, plan, rng) for budget in plan.budgets}
    whole = accuracies(data, ("all",), POOL, plan, rng)["all"]
    bins = coverage(data, rng)
    linear, exact = leave_one_out(plan.draws, rng)
    fits = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(linear, exact, strict=True)]
    solved = solvers(data, plan, rng)
    report = Report(
        paper=10,
        scale=scale,
        seed=rng,
        claims=claims(arms[BUDGET], bins, fits, solved),
        tables=[
            *(accuracy_table(b, values, whole) for b, values in arms.items()),
            coverage_table(bins),
            retraining_table(linear, exact),
            solver_table(solved),
        ],
        figures=[*budget_figures(arms), retraining_figure(linear[0], exact[0])],
        notes=notes(data, arms[BUDGET], whole),
        title="DEALRec: influence, effort and coverage",
    )
    if plan.settings:
        report.tables.append(sweep_table(data, arms[BUDGET]["random"], plan, rng))
    beats = "1,024 examples beat as many random ones and all of the data"
    real_trials.add_to(report, {"DEALRec": "dealrec", "CCS": "ccs"}, beats)
    if plan.sequences:
        sequence_recommenders.add_to(report, sequence_recommenders.STUDY, rng)
    return report


# ── Digits ───────────────────────────────────────────────────────────────────────────────────────


def digits(seeds: int, rng: int) -> Split:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    orders = np.stack([np.random.default_rng(seed(rng, 1, s)).permutation(len(x))
                       for s in range(seeds)])  # fmt: skip
    pool, test = orders[:, :POOL], orders[:, POOL:]
    pixels = (x / 16).astype(np.float32)
    labels = y.astype(np.int64)
    return Split(pixels[pool], labels[pool], pixels[test], labels[test])


def scored(data: Split, rng: int) -> Digits:
    """Influence by the surrogate, effort by the network that saw the first 130 examples, EL2N
    and GraNd by the mean of three short runs on the whole pool."""
    seeds = len(data.x)
    found = [surrogate_influence(data, s) for s in range(seeds)]
    seen = [minibatches([np.arange(SEEN)] * 60, BATCH, seed(rng, 2, s)) for s in range(seeds)]
    target = train_ensemble(
        data.x, data.y, np.stack(seen), n_classes=CLASSES, hidden=HIDDEN,
        seed=[seed(rng, 3, s) for s in range(seeds)],
    )  # fmt: skip
    logits, hidden = target.logits(data.x), target.hidden(data.x)
    effort = np.stack(
        [last_layer_gradient_norms(logits[s], data.y[s], hidden[s]) for s in range(seeds)]
    )
    runs = [(s, r) for s in range(seeds) for r in range(EARLY_RUNS)]
    short = train_ensemble(
        np.repeat(data.x, EARLY_RUNS, axis=0), np.repeat(data.y, EARLY_RUNS, axis=0),
        np.stack([minibatches([np.arange(POOL)] * EARLY_EPOCHS, BATCH, seed(rng, 4, *k))
                  for k in runs]),
        n_classes=CLASSES, hidden=HIDDEN, schedule="constant",
        seed=[seed(rng, 5, *k) for k in runs],
    )  # fmt: skip
    inputs = np.repeat(data.x, EARLY_RUNS, axis=0)
    shape = (seeds, EARLY_RUNS, POOL, -1)
    early, states = short.logits(inputs).reshape(shape), short.hidden(inputs).reshape(shape)
    lengths = [
        last_layer_gradient_norms(f, y, h) for f, y, h in zip(early, data.y, states, strict=True)
    ]
    return Digits(
        **vars(data),
        influence=np.stack([scores for scores, _ in found]),
        effort=effort,
        el2n=np.stack([el2n(f, y) for f, y in zip(early, data.y, strict=True)]),
        grand=np.stack([one.mean(axis=0) for one in lengths]),
        ratio=np.array([ratio for _, ratio in found]),
    )


def design(data: Split, s: int) -> Float:
    return np.column_stack([data.x[s].astype(np.float64), np.ones(POOL)])


def surrogate_influence(data: Split, s: int) -> tuple[Float, float]:
    x = design(data, s)
    weights = fit_softmax(x, data.y[s], penalty=PENALTY, steps=STEPS)
    return softmax_influence(x, data.y[s], weights, penalty=PENALTY)


def chosen(data: Digits, arm: str, s: int, budget: int, rng: int) -> Int:
    """The rows an arm takes; "weight 0.3" and "groups 25" are DEALRec with another setting."""
    draw, ranks = seed(rng, 6, s), {"EL2N": data.el2n, "GraNd": data.grand}
    if arm == "all":
        return np.arange(POOL)
    if arm == "random":
        return uniform(POOL, budget, rng=draw).indices
    if arm == "k-means":
        clusters = min(GROUPS, budget)
        return cluster_select(data.x[s], budget, n_clusters=clusters, rng=draw).indices
    if arm in ranks:
        return top_k(ranks[arm][s], budget, rng=draw).indices
    if arm == "CCS":
        return coverage_select(data.el2n[s], budget, hard_prune=PRUNE, rng=draw).indices
    if arm == GREEDY:
        return top_k(data.score(s), budget, rng=draw).indices
    word, _, number = arm.partition(" ")
    weight = float(number) if word == "weight" else WEIGHT
    groups = int(number) if word == "groups" else GROUPS
    prune = 0.0 if arm == NO_PRUNE else PRUNE
    score = data.score(s, weight)
    return coverage_select(score, budget, n_groups=groups, hard_prune=prune, rng=draw).indices


def accuracies(
    data: Digits, arms: tuple[str, ...], budget: int, plan: Plan, rng: int
) -> dict[str, Float]:
    """Test accuracy (seeds,) of fresh networks, the same initial weights for all arms of a seed."""
    result = {}
    for arm in arms:
        rows = [chosen(data, arm, s, budget, rng) for s in range(plan.seeds)]
        tables = [
            minibatches([r] * -(-plan.updates // -(-len(r) // BATCH)), BATCH, seed(rng, 7, s))
            for s, r in enumerate(rows)
        ]
        network = train_ensemble(
            data.x, data.y, np.stack([t[: plan.updates] for t in tables]), n_classes=CLASSES,
            hidden=HIDDEN, seed=[seed(rng, 8, s) for s in range(len(rows))],
        )  # fmt: skip
        result[arm] = network.accuracy(data.test_x, data.test_y)
    return result


def coverage(data: Digits, rng: int) -> dict[str, Float]:
    """Score intervals that each choice touches, over those that are not empty, (seeds,)."""
    shares: dict[str, list[float]] = {"random": [], GREEDY: [], OURS: []}
    for s in range(len(data.x)):
        ours = coverage_select(data.score(s), BUDGET, hard_prune=PRUNE, rng=seed(rng, 6, s))
        whole = coverage_select(data.score(s), POOL)
        for arm, selection in (("random", whole), (GREEDY, whole), (OURS, ours)):
            rows = chosen(data, arm, s, BUDGET, rng)
            touched = np.unique(selection.groups[rows])
            shares[arm].append(len(touched) / int((selection.sizes > 0).sum()))
    return {arm: np.array(values) for arm, values in shares.items()}


def seed(*parts: int) -> int:
    """An independent 63-bit seed for each purpose, run and member."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ── Leaving one out ──────────────────────────────────────────────────────────────────────────────


def leave_one_out(draws: int, rng: int, n: int = 30, d: int = 3) -> tuple[Float, Float]:
    """Linear and exact change of the risk, (draws, n) each, of ridge logistic regressions (.1)."""
    pairs = []
    for number in range(draws):
        random = np.random.default_rng(seed(rng, 9, number))
        x = random.normal(size=(n, d))
        y = (random.random(n) < expit(x @ random.normal(size=d) * 1.5)).astype(np.float64)
        pairs.append(one_left_out(x, y, 0.1))
    linear, exact = zip(*pairs, strict=True)
    return np.stack(linear), np.stack(exact)


def one_left_out(x: Float, y: Float, penalty: float) -> tuple[Float, Float]:
    """All n + 1 fits at once by Newton's method; the sums stay over n, as in the influence."""
    n, d = x.shape
    keep = np.vstack([np.ones(n), 1 - np.eye(n)])
    theta, eye = np.zeros((n + 1, d)), np.eye(d)
    for _ in range(30):
        p = expit(theta @ x.T)
        gradient = (keep * (p - y)) @ x / n + penalty * theta
        curvature = np.einsum("ki,id,ie->kde", keep * p * (1 - p), x, x) / n + penalty * eye
        theta = theta - np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
    risk = np.logaddexp(0, (1 - 2 * y) * (theta @ x.T)).mean(axis=1)
    gradients = x * (expit(x @ theta[0]) - y)[:, None]
    linear = influence_on_risk(gradients, hessian=curvature[0], damping=0.0)
    return linear, risk[1:] - risk[0]


# ── Solvers ──────────────────────────────────────────────────────────────────────────────────────


def solvers(data: Digits, plan: Plan, rng: int) -> dict[str, list[tuple[float, float]]]:
    """Of each way to h = H^-1 v: distance to its own fixed point over that, and the rank
    correlation of its influences with the exact ones (CG, no ridge but the penalty)."""
    runs, depth = plan.lissa
    x, y = design(data, 0), data.y[0]
    n, shape = len(x), (x.shape[1], CLASSES)
    weights = fit_softmax(x, y, penalty=PENALTY, steps=STEPS)
    p = softmax(x @ weights, axis=1)
    residual = p - np.eye(CLASSES)[y]
    v = (x.T @ residual / n).reshape(-1)

    def product(u: Float, rows: Int) -> Float:
        matrix, a, q = u.reshape(shape), x[rows], p[rows]
        moved = (a @ matrix) * q
        moved -= q * moved.sum(axis=1, keepdims=True)
        return np.asarray(a.T @ moved / len(rows) + PENALTY * matrix).reshape(-1)

    def influence(h: Float) -> Float:
        return np.einsum("ij,ij->i", x @ h.reshape(shape), residual) / n

    exact = inverse_hessian_product(product, v, n=n, damping=0.0)
    ridged = 25 * inverse_hessian_product(product, v, n=n, damping=0.25)
    ours = inverse_hessian_product(product, v, n=n, damping=0.01)

    def judged(h: Float, aim: Float) -> tuple[float, float]:
        away = float(np.linalg.norm(h - aim) / np.linalg.norm(aim))
        return away, float(spearmanr(influence(h), influence(exact)).statistic)

    result = {
        "CG, no ridge": [judged(exact, exact)],
        "CG, ridge .01": [judged(ours, ours)],
        "CG, ridge .25, times 25": [judged(ridged, ridged)],
    }
    for name, aim, released in (
        ("LiSSA as released", ridged, True), ("LiSSA, ridge .01", ours, False),
    ):  # fmt: skip
        result[name] = [
            judged(
                inverse_hessian_product(
                    product, v, n=n, solver="lissa", damping=0.01, scale=25.0, depth=depth,
                    released=released, rng=seed(rng, 10, r),
                ),
                aim,
            )
            for r in range(runs)
        ]  # fmt: skip
    return result


# ── What the paper claims ────────────────────────────────────────────────────────────────────────


def claims(
    arms: dict[str, Float],
    bins: dict[str, Float],
    fits: list[float],
    solved: dict[str, list[tuple[float, float]]],
) -> list[Claim]:
    where, rule = "65 of 1,300 digits", "accuracy difference, paired by seed, at least "

    def gap(name: str, says: str, other: str, bound: float) -> Claim:
        measured = paired_difference(arms[OURS], arms[other])
        return Claim.at_least(f"{name} ({where})", says, measured, bound, f"{rule}{bound:g}")

    best = "Games, 2 %: NDCG@20 .0142 against .0128 of the best baseline"
    released = solved["LiSSA as released"]
    return [
        gap("coverage saves the score: DEALRec beats its greedy top-score",
            "top scores alone cover too little of the data", GREEDY, 0.2),
        gap("the hard prune of the released code is needed", "not in the paper", NO_PRUNE, 0.02),
        gap("DEALRec beats a random choice", "Games, 2 %: NDCG@20 .0142 against .0122",
            "random", 0.0),
        gap("DEALRec beats CCS", best, "CCS", 0.0),
        gap("DEALRec beats EL2N's top scores", best, "EL2N", 0.0),
        Claim.at_least("DEALRec touches every interval of the score that is not empty",
                       "coverage-enhanced selection", float(bins[OURS].min()), 1.0,
                       "share of non-empty intervals, smallest over seeds, 1"),
        Claim.at_most("greedy top-score touches hardly any", "-", mean_interval(bins[GREEDY]), 0.04,
                      "share of non-empty intervals at most .04, 2 of 50"),
        Claim.at_least("influence follows retraining without each example",
                       "influence estimates the change of the empirical risk",
                       mean_interval(fits), 0.9, "correlation over examples, mean of draws, .9"),
        Claim.at_most("LiSSA as released reaches its fixed point",
                      "5,000 random steps, damping .01, scale 25",
                      mean_interval([away for away, _ in released]), 0.2,
                      "distance over length, mean of runs, at most .2"),
        Claim.at_least("LiSSA as released ranks as exact influence",
                       "it stands for the product with the inverse Hessian",
                       mean_interval([rank for _, rank in released]), 0.9,
                       "rank correlation with exact influence, mean of runs, at least .9"),
    ]  # fmt: skip


# ── Tables and figures ───────────────────────────────────────────────────────────────────────────


def accuracy_table(budget: int, arms: dict[str, Float], whole: Float) -> ReportTable:
    rows: list[list[Cell]] = [["all 1,300", mean_interval(whole), None]]
    for arm, values in arms.items():
        gap = None if arm == "random" else paired_difference(values, arms["random"])
        rows.append([arm, mean_interval(values), gap])
    title = f"Digits, {budget} of 1,300 ({budget / POOL:.0%})"
    return ReportTable(title, ["trained on", "test accuracy", "minus random"], rows)


def sweep_table(data: Digits, random: Float, plan: Plan, rng: int) -> ReportTable:
    rows: list[list[Cell]] = [
        [name, mean_interval(values), paired_difference(values, random)]
        for name, values in accuracies(data, plan.settings, BUDGET, plan, rng).items()
    ]
    note = "One setting changed; otherwise weight of effort .5, 50 groups, hard prune .1."
    columns = ["DEALRec with", "test accuracy", "minus random"]
    return ReportTable("Digits, 65 of 1,300: settings of DEALRec", columns, rows, note)


def coverage_table(bins: dict[str, Float]) -> ReportTable:
    rows: list[list[Cell]] = [[arm, mean_interval(values)] for arm, values in bins.items()]
    title = "Share of the score's non-empty intervals (of 50) that a choice of 65 touches"
    return ReportTable(title, ["choice", "share"], rows, "DEALRec's after its hard prune.")


def retraining_table(linear: Float, exact: Float) -> ReportTable:
    pairs = list(zip(linear, exact, strict=True))
    plain = mean_interval([float(np.corrcoef(a, b)[0, 1]) for a, b in pairs])
    ranks = mean_interval([float(spearmanr(a, b).statistic) for a, b in pairs])
    slope = mean_interval([float(a @ b / (a @ a)) for a, b in pairs])
    rows: list[list[Cell]] = [["correlation", plain], ["rank correlation", ranks],
                              ["exact over linear (slope)", slope]]  # fmt: skip
    title = f"Influence against retraining, {len(pairs)} logistic regressions of 30 examples"
    return ReportTable(title, ["", "mean over draws"], rows)


def solver_table(solved: dict[str, list[tuple[float, float]]]) -> ReportTable:
    def mean(values: list[float]) -> Estimate | float:
        return mean_interval(values) if len(values) > 1 else values[0]

    rows: list[list[Cell]] = [
        [name, mean([away for away, _ in runs]), mean([rank for _, rank in runs])]
        for name, runs in solved.items()
    ]
    return ReportTable(
        "Ways to H^-1 v (softmax regression on digits, 650 weights)",
        ["solver", "distance to its own fixed point", "rank correlation with exact influence"],
        rows,
        "The released recursion is not divided by its scale and has an effective ridge of .25.",
    )


def budget_figures(arms: dict[int, dict[str, Float]]) -> list[Figure]:
    budgets = [float(b) for b in arms]
    series = []
    for arm in ARMS:
        marks = [mean_interval(arms[b][arm]) for b in arms]
        series.append(Series(arm, budgets, [m.value for m in marks], [m.low for m in marks],
                             [m.high for m in marks], baseline=arm == "random"))  # fmt: skip
    return [Figure("line", "Digits: accuracy by what was chosen", "examples of 1,300",
                   "test accuracy", series, log_x=True,
                   caption="Intervals are 95 % over seeds, not paired.")]  # fmt: skip


def retraining_figure(linear: Float, exact: Float) -> Figure:
    return Figure(
        "scatter", "Leaving one example out of a logistic regression",
        "influence (linear)", "change of the risk (retrained)",
        [Series("examples", linear.tolist(), exact.tolist())],
        caption="The first of the draws.",
    )  # fmt: skip


def notes(data: Digits, arms: dict[str, Float], whole: Float) -> list[str]:
    ratio, ccs = mean_interval(data.ratio), paired_difference(arms["CCS"], arms["random"])
    lost = paired_difference(arms[OURS], whole)
    return [
        (
            f"Mean gradient over gradients on the surrogate: {ratio}; at the minimiser of an "
            "unpenalised risk it is 0, and every influence with it."
        ),
        (
            f"At 5 %, CCS minus random: {ccs}. The paper finds selected sequences better than all "
            f"of them; here 65 examples minus all 1,300: {lost}."
        ),
        (
            "LiSSA as released has an effective ridge of .25, which is large beside most "
            "eigenvalues of this Hessian: it reaches its fixed point, whose influences are in "
            "another order than those of the Hessian itself."
        ),
        (
            "The paper's saving of time (Games: 36.87 to 1.67 hours) is that of fine-tuning a 7B "
            "model on 2 % of the sequences; it is not measured here."
        ),
    ]
