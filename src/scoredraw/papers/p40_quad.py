"""Quad: influence and diversity by a bandit over clusters (arXiv:2409.16986).

*Digits*: a pool of 1,200 images in k-means clusters; in some clusters most labels are drawn anew.
A softmax regression on 100 rows of the pool is the checkpoint, 100 clean rows are the reference,
and a regression on 300 rows that a method picked is judged on the rest. Influence is computed
with EK-FAC, K-FAC, no curvature, and the exact Fisher matrix of the layer, which is small enough.
*Documentation* (full scale): `quad_language`, a small language model with attention.

Everything is paired by seed. A random choice stands beside every method.

Zhang et al., 2025, "Harnessing Diversity for Important Data Selection in Pretraining Large
Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw import sampling
from scoredraw.data_selection.cluster_bandit import quad_select
from scoredraw.data_selection.kronecker import exact_fisher, exact_ihvp
from scoredraw.data_selection.tabular_influence import SoftmaxInfluence, rows_of_every_class
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers import quad_language, real_trials
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Float = NDArray[np.float64]
Int = NDArray[np.int64]

POOL, REFERENCE, CHECKPOINT, BUDGET = 1200, 100, 100, 300
SAMPLES, PER_ROUND, DAMPING, REDRAWN = 5, 4, 1e-3, 0.65
RANDOM, TOP, FULL, CLEAN = "random", "top-k influence", "the whole pool", "clean labels only"
GREEDY, QUAD, ROBIN = "Quad, α = 0 (greedy)", "Quad, α = 1", "Quad, α = ∞ (round-robin)"
ALPHAS = {GREEDY: 0.0, QUAD: 1.0, ROBIN: np.inf}
LOSS, DSIR, MATES = "smallest loss (perplexity)", "DSIR", "MATES-like"
FORMS = ("EK-FAC", "K-FAC", "no curvature")


class Setting(NamedTuple):
    """Clusters, the share of them with wrong labels, and the block of an accepted pull."""

    clusters: int
    share: float
    block: int

    @property
    def name(self) -> str:
        return f"{self.clusters} clusters, block {self.block}"


SETTINGS = (Setting(40, 0.4, 10), Setting(24, 0.5, 10), Setting(24, 0.4, 4))


@dataclass(frozen=True)
class Plan:
    """How many seeds, and whether and how the language model is trained."""

    seeds: int
    language: quad_language.Plan | None = None


PLANS = {
    "smoke": Plan(1),
    "quick": Plan(12),
    "full": Plan(32, quad_language.Plan(seeds=4, steps=200)),
    "study": Plan(200, quad_language.Plan(seeds=20, steps=3000)),
}


class Outcome(NamedTuple):
    """Over seeds: accuracy, share of wrong labels and evaluations by arm; correlations by form."""

    accuracy: dict[str, Float]
    wrong: dict[str, Float]
    evaluations: dict[str, Float]
    correlation: dict[str, Float]


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the experiments; the clock and the machine are added by `reports`."""
    from threadpoolctl import threadpool_limits

    plan = PLANS[scale]
    with threadpool_limits(1):  # everything here is too small to share out
        outcomes = {setting: trials(setting, plan.seeds, rng) for setting in SETTINGS}
    report = Report(
        paper=40,
        scale=scale,
        seed=rng,
        claims=claims(outcomes),
        tables=[*(table(s, o) for s, o in outcomes.items()), correlation_table(outcomes)],
        figures=[figure(outcomes)],
        notes=notes(outcomes),
        title="Harnessing diversity for important data selection",
    )
    says = "+1.39 points over the best baseline, random among them"
    real_trials.add_to(report, {"Quad": "quad"}, says)
    if plan.language is not None:
        quad_language.add_to(report, plan.language, rng)
    return report


# ── One seed ─────────────────────────────────────────────────────────────────────────────────────


class Trial:
    """A split of the digits, its clusters, its wrong labels and its influences."""

    def __init__(self, setting: Setting, seed: int) -> None:
        from sklearn.cluster import KMeans
        from sklearn.datasets import load_digits

        self.setting, self.seed = setting, seed
        self.random = np.random.default_rng(seed)
        x, y = load_digits(return_X_y=True)
        x, y = x / 16, y.astype(np.int64)
        pool, reference, test = np.split(self.random.permutation(len(x)), [POOL, POOL + REFERENCE])
        self.x, self.test = x[pool], (x[test], y[test])
        self.groups = KMeans(setting.clusters, n_init=1, random_state=seed % 2**31).fit_predict(
            self.x
        )
        bad = self.random.permutation(setting.clusters)[: round(setting.share * setting.clusters)]
        redrawn = np.isin(self.groups, bad) & (self.random.random(POOL) < REDRAWN)
        self.y = np.where(redrawn, self.random.integers(10, size=POOL), y[pool])
        self.wrong = self.y != y[pool]
        self.influence = self.influences((x[reference], y[reference]))
        self.reference = x[reference]

    def influences(self, reference: tuple[Float, Int]) -> dict[str, Float]:
        """Of every row of the pool: by each form of curvature, and by the exact Fisher matrix."""
        everything = np.arange(POOL)
        fit = rows_of_every_class(self.y, everything, CHECKPOINT, self.random)
        found = {}
        for name, form in (("EK-FAC", "ekfac"), ("K-FAC", "kfac")):
            self.model = SoftmaxInfluence(
                self.x, self.y, fit, reference, damping=DAMPING,
                form=form, factor_rows=everything,  # type: ignore[arg-type]
            )  # fmt: skip
            found[name] = self.model(everything)
        a, delta = self.model.traces(*reference, np.arange(REFERENCE))
        gradient = delta.T @ a / REFERENCE
        a, delta = self.model.traces(self.x, self.y, everything)
        exact = exact_ihvp(exact_fisher(a[:, None], delta[:, None]), gradient, DAMPING)
        found["no curvature"] = ((delta @ gradient) * a).sum(1)
        found["exact"] = ((delta @ exact) * a).sum(1)
        return found

    def picks(self) -> dict[str, tuple[Int, int]]:
        """Arm -> its rows and how many influences it computed; random is drawn apart."""
        worth = self.influence["EK-FAC"]
        chosen: dict[str, tuple[Int, int]] = {
            FULL: (np.arange(POOL), 0),
            CLEAN: (np.flatnonzero(~self.wrong), 0),
            TOP: (sampling.top_k(worth, BUDGET, rng=self.random).indices, POOL),
        }
        for arm, alpha in ALPHAS.items():
            found = quad_select(
                self.groups, lambda rows: worth[rows], BUDGET, samples_per_pull=SAMPLES,
                block=self.setting.block, B=PER_ROUND, alpha=alpha, rng=self.seed,
            )  # fmt: skip
            chosen[arm] = found.indices, found.n_evaluated
        return chosen | self.other_picks(worth, chosen[QUAD][1])

    def other_picks(self, worth: Float, evaluations: int) -> dict[str, tuple[Int, int]]:
        """Baselines of language modelling as they read on images."""
        from sklearn.linear_model import Ridge

        a, delta = self.model.traces(self.x, self.y, np.arange(POOL))
        loss = -np.log(np.maximum(1 + delta[np.arange(POOL), self.y], 1e-300))
        # bags of dark pixels: log-ratio of their frequencies in the reference and in the pool
        ink = self.x > 0.5
        share = [(part.sum(0) + 1) / (part.sum() + 64) for part in (self.reference > 0.5, ink)]
        ratio = ink @ np.log(share[0] / share[1])
        # a regression on a few evaluated rows foretells the influence of the others
        columns = np.hstack([a, np.eye(10)[self.y]])
        products = (columns[:, :, None] * np.eye(10)[self.y][:, None, :]).reshape(POOL, -1)
        seen = sampling.uniform(POOL, evaluations, rng=self.random).indices
        foretold = Ridge(1.0).fit(products[seen], worth[seen]).predict(products)
        return {
            LOSS: (sampling.top_k(-loss, BUDGET, rng=self.random).indices, 0),
            DSIR: (sampling.exponential_keys(ratio, BUDGET, rng=self.random, log=True).indices, 0),
            MATES: (sampling.top_k(foretold, BUDGET, rng=self.random).indices, evaluations),
        }

    def accuracy(self, rows: Int) -> float:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(max_iter=300).fit(self.x[rows], self.y[rows])
        return float(model.score(*self.test))

    def random_rows(self, draws: int = 3) -> list[Int]:
        return [sampling.uniform(POOL, BUDGET, rng=self.random).indices for _ in range(draws)]


def trials(setting: Setting, seeds: int, rng: int) -> Outcome:
    """Every seed's trial; the arms of a seed share all but the rows they pick."""
    outcome = Outcome({}, {}, {}, {})

    def add(part: dict[str, Float], name: str, value: float) -> None:
        part[name] = np.append(part.get(name, np.empty(0)), value)

    for number in range(seeds):
        seed = int(np.random.SeedSequence([rng, number]).generate_state(1)[0])
        trial = Trial(setting, seed)
        rows = trial.random_rows()
        add(outcome.accuracy, RANDOM, float(np.mean([trial.accuracy(r) for r in rows])))
        add(outcome.wrong, RANDOM, float(np.mean([trial.wrong[r].mean() for r in rows])))
        add(outcome.evaluations, RANDOM, 0)
        for arm, (picked, evaluations) in trial.picks().items():
            add(outcome.accuracy, arm, trial.accuracy(picked))
            add(outcome.wrong, arm, float(trial.wrong[picked].mean()))
            add(outcome.evaluations, arm, evaluations)
        for form in FORMS:
            pair = np.corrcoef(trial.influence[form], trial.influence["exact"])
            add(outcome.correlation, form, float(pair[0, 1]))
    return outcome


# ── What the paper claims ────────────────────────────────────────────────────────────────────────


def claims(outcomes: Mapping[Setting, Outcome]) -> list[Claim]:
    found: list[Claim] = []
    for setting, outcome in outcomes.items():
        arms = outcome.accuracy
        found += [
            Claim.at_least(
                f"{setting.name}: Quad (α = 1) beats the top k by influence",
                "diversity matters: top influence alone picks rows that are alike",
                paired_difference(arms[QUAD], arms[TOP]),
                0.05,
                "accuracy difference, paired by seed, at least .05",
            ),
            Claim.at_least(
                f"{setting.name}: Quad (α = 1) beats a random choice",
                "+1.39 points of zero-shot accuracy over nine tasks",
                paired_difference(arms[QUAD], arms[RANDOM]),
                0.0,
                "accuracy difference, paired by seed, at least 0",
            ),
        ]
    for setting, outcome in list(outcomes.items())[:2]:
        near = outcome.correlation
        found += [
            Claim.at_least(
                f"{setting.name}: EK-FAC influence is nearer to the exact one than plain products",
                "the inverse Hessian is what makes influence accurate",
                paired_difference(near["EK-FAC"], near["no curvature"]),
                0.2,
                "difference of correlations, at least .2",
            ),
            Claim.at_least(
                f"{setting.name}: EK-FAC is no worse than K-FAC",
                "- (George et al. 2018: the nearest of all diagonals in that basis)",
                paired_difference(near["EK-FAC"], near["K-FAC"]),
                0.0,
                "difference of correlations, at least 0",
            ),
        ]
    first, last = SETTINGS[0], SETTINGS[-1]
    sweep, repeated = outcomes[first], outcomes[last]
    found += [
        Claim.at_least(
            f"{last.name}: taking clusters in turn beats greed",
            "the bandit balances quality and diversity",
            paired_difference(repeated.accuracy[ROBIN], repeated.accuracy[GREEDY]),
            0.0,
            "accuracy difference α = ∞ minus α = 0, at least 0",
        ),
        Claim.within(
            f"{first.name}: the budget is gone after a sweep, α decides nothing",
            "-",
            paired_difference(sweep.accuracy[QUAD], sweep.accuracy[GREEDY]),
            -0.02,
            0.02,
            "accuracy difference α = 1 minus α = 0, within .02",
        ),
        Claim.at_most(
            f"{last.name}: influences computed, as a share of the pool",
            "few samples a cluster stand for it",
            mean_interval(repeated.evaluations[QUAD] / POOL),
            1 / 3,
            "at most a third",
        ),
    ]
    return found


# ── Tables and figures ───────────────────────────────────────────────────────────────────────────


def table(setting: Setting, outcome: Outcome) -> ReportTable:
    rows: list[list[Cell]] = []
    for arm, values in outcome.accuracy.items():
        gap = None if arm == RANDOM else paired_difference(values, outcome.accuracy[RANDOM])
        wrong = round(float(outcome.wrong[arm].mean()), 3)
        evaluations = round(float(outcome.evaluations[arm].mean()))
        rows.append([arm, mean_interval(values), gap, wrong, evaluations])
    share = outcome.wrong[FULL].mean()
    return ReportTable(
        f"Digits, {setting.name}, {share:.0%} of the labels wrong",
        ["rows", "test accuracy", "minus random", "wrong labels among them", "evaluations"],
        rows,
        f"{BUDGET} rows of {POOL:,}; {setting.share:.0%} of the clusters have labels drawn anew.",
    )


def correlation_table(outcomes: Mapping[Setting, Outcome]) -> ReportTable:
    rows: list[list[Cell]] = [
        [form, *(mean_interval(outcome.correlation[form]) for outcome in outcomes.values())]
        for form in FORMS
    ]
    return ReportTable(
        "Correlation with influence by the exact empirical Fisher matrix, over the pool",
        ["curvature", *(setting.name for setting in outcomes)],
        rows,
    )


def figure(outcomes: Mapping[Setting, Outcome]) -> Figure:
    series = []
    for setting, outcome in outcomes.items():
        arms = [arm for arm in outcome.accuracy if arm not in (RANDOM, FULL, CLEAN)]
        gaps = [paired_difference(outcome.accuracy[a], outcome.accuracy[RANDOM]) for a in arms]
        low, high = [gap.low for gap in gaps], [gap.high for gap in gaps]
        series.append(Series(setting.name, arms, [gap.value for gap in gaps], low, high))
    return Figure(
        "interval",
        f"Accuracy on {BUDGET} rows minus that of a random choice",
        x_label="accuracy difference",
        series=series,
        reference=0.0,
        caption="Intervals are 95 %, paired by seed.",
    )


def notes(outcomes: Mapping[Setting, Outcome]) -> list[str]:
    """What was measured, in words."""
    gaps = [
        f"{setting.name}: {paired_difference(o.accuracy[QUAD], o.accuracy[RANDOM])}"
        for setting, o in outcomes.items()
    ]
    return [
        (
            f"Quad (α = 1) minus random: {'; '.join(gaps)}. Influence avoids wrong labels, but "
            "whole regions of the digits with them, which a random choice covers."
        ),
        (
            "α counts in standard deviations of the rewards; UCB1 as the paper has it (clusters "
            "without a pull first, T under the root), τ = 0, no neighbours."
        ),
        "The paper's 1.3B and 7B models on SlimPajama and FineWeb are not run again.",
    ]
