"""Diffusion tree sampling: does a tree of denoisings sample p(x) exp(λ r(x)), and who does better?

Three problems with known answers. A ring of eight states, whose law is computed exactly: how far is
the law that a tree implies? Eight Gaussians in a plane with an exact score: how far are the shares
of the modes? Digits in eight principal components with the exact score of a fitted mixture and a
classifier's log-probability of an 8 as the reward: how far from a large weighted reference, and how
good is the best sample? All methods of a seed have equal numbers of network calls. Independent
rollouts with weights exp(λ r), which the paper does not compare with, stand beside its baselines.

Jain, Sareen, Pedramfar and Ravanbakhsh, "Diffusion tree sampling: scalable inference-time
alignment of diffusion models", NeurIPS 2025, arXiv 2506.20701.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax

from scoredraw import smc
from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion import steering_baselines as steering
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta
from scoredraw.diffusion.tree_proposals import (
    MarkovChain,
    diffusion_chain,
    exact_values,
    finite_chain,
    paper_branches,
)
from scoredraw.diffusion.tree_sampling import DiffusionTree
from scoredraw.metrics import Estimate, frechet_distance, mean_interval, paired_difference
from scoredraw.papers.digit_diffusion import picture_strip
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]
Found = dict[tuple[str, int], Float]  # (arm, calls) -> (seeds,)

BASE, ROLLOUTS, SMC, VALUE = "base, λ = 0", "weighted rollouts", "SMC", "SMC with rollouts"
TDS, DAS, DPS = "TDS", "DAS", "DPS"
TREE, NARROW, WIDE, FLAT = "DTS", "DTS, α = 0.5", "DTS, α = 0.95", "DTS, flat backup"
THEIRS = (SMC, TDS, DAS, DPS)  # the paper's baselines
STAR, BEST, FK = "DTS*", "best of n", "FK steering, max"
BATCH = 16
RING, RING_LAMBDA = np.array([0.0, 0, 0, 2, 1, 0, 0, 0]), 2.0
TREES: dict[str, dict[str, Any]] = {
    TREE: {}, NARROW: {"alpha": 0.5}, WIDE: {"alpha": 0.95}, FLAT: {"backup": "snis"}
}  # fmt: skip
NOTES = [
    "Exact scores stand in for the paper's networks (MNIST, CIFAR-10, Stable Diffusion, text).",
    (
        "A tree's values are biased downwards: a child that was unlucky first is rarely visited "
        "again and keeps its low value, and most children are young. At the paper's α = 0.8 this "
        "hardly shrinks with work. α = 0.95 is the better choice where the base law finds rewards. "
        "Values of rollouts alone (the flat backup) repair the root's value; what is drawn changes "
        "only where nodes below the first level are visited some 30 times, which is rare here."
    ),
    "Weighted rollouts, not in the paper, are hard to beat where the base law finds the reward.",
]


@dataclass(frozen=True)
class Plan:
    """How much a scale runs: seeds, iterations on the ring, calls in the plane and on digits."""

    seeds: int
    ring: tuple[int, ...]
    plane: tuple[int, ...]
    digits: tuple[int, ...]
    reference: int  # rollouts


PLANS = {
    "smoke": Plan(2, (20, 60), (800, 1600), (500, 750), 300),
    "quick": Plan(6, (300, 3000), (10_000, 50_000, 100_000), (5000, 20_000), 30_000),
    "full": Plan(10, (300, 3000, 20_000), (10_000, 50_000, 100_000, 200_000),
                 (5000, 20_000, 80_000), 100_000),
    "study": Plan(40, (300, 3000, 20_000, 200_000), (10_000, 100_000, 1_000_000),
                  (5000, 20_000, 80_000, 320_000), 400_000),
}  # fmt: skip


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Sample every problem in every way, measure, and judge."""
    plan = PLANS[scale]
    report = Report(paper=17, scale=scale, seed=rng, title="Diffusion tree sampling")
    with one_thread():
        add_ring(report, plan, rng)
        add_plane(report, plan, rng)
        add_digits(report, plan, rng)
    report.notes.extend(NOTES)
    return report


# ── the ring ────────────────────────────────────────────────────────────────────────────────────


def ring_chain() -> tuple[Float, Float]:
    """The uniform law of eight states, and p(j | i) ∝ exp(-d²/2), d being the way round."""
    apart = abs(np.arange(8)[:, None] - np.arange(8))
    step = softmax(-0.5 * np.minimum(apart, 8 - apart) ** 2, axis=1)
    return np.full(8, 1 / 8), np.stack([step] * 4)


def add_ring(report: Report, plan: Plan, rng: int) -> None:
    prior, steps = ring_chain()
    chain, exact = finite_chain(prior, steps), exact_values(prior, steps, RING, RING_LAMBDA)
    far: Found = {}
    root: Found = {}
    for arm, options in TREES.items():
        for count in plan.ring:
            law, value = [], []
            for seed in range(plan.seeds):
                source = np.random.default_rng([rng, 17, seed])
                tree = DiffusionTree(chain, lambda x: RING[x], lam=RING_LAMBDA, batch_size=BATCH,
                                     generator=source, **options).grow(count)  # fmt: skip
                leaves, p = tree.implied_law()
                law.append(variation(np.bincount(tree.states.at(leaves), p, 8), exact.target))
                value.append(tree.root_value)
            far[arm, count], root[arm, count] = np.array(law), np.array(value)
    for count in plan.ring:
        law = []
        for seed in range(plan.seeds):
            source = np.random.default_rng([rng, 17, seed])
            one = steering.weighted_rollouts(chain, lambda x: RING[x], count, lam=RING_LAMBDA,
                                             generator=source)  # fmt: skip
            law.append(variation(np.bincount(one.x, weights_of(one), 8), exact.target))
        far[ROLLOUTS, count] = np.array(law)
    first, last = plan.ring[0], plan.ring[-1]
    rows: list[list[Cell]] = [
        [arm, count, mean_interval(values),
         mean_interval(root[arm, count]) if (arm, count) in root else None]
        for (arm, count), values in far.items()
    ]  # fmt: skip
    base = variation(exact.base, exact.target)
    note = f"Exact root value {exact.root:.4f}; the base law is {base:.3f} away."
    columns = ["method", "iterations", "total variation", "root value"]
    report.tables.append(ReportTable("A ring of eight states, λ = 2", columns, rows, note))
    says = "the law of the tree tends to π (Proposition 1)"
    report.claims.extend([
        Claim.at_most("ring: DTS's total variation over the base law's", "samples π",
                      mean_interval(far[TREE, last] / base), 0.5),
        Claim.at_most(f"ring: DTS's total variation after {last:,} iterations", says,
                      mean_interval(far[TREE, last]), 0.05),
        Claim.at_most(f"ring: the same with α = 0.95, {last:,} iterations", says,
                      mean_interval(far[WIDE, last]), 0.05),
        Claim.within(f"ring: DTS's root value minus the exact one, {last:,} iterations",
                     "soft values are estimated without bias in the limit",
                     mean_interval(root[TREE, last] - exact.root), -0.05, 0.05),
        Claim.within(f"ring: the same with the flat backup, {last:,} iterations",
                     "not in the paper: values of rollouts alone",
                     mean_interval(root[FLAT, last] - exact.root), -0.05, 0.05),
        Claim.at_least(f"ring: DTS's total variation at {first:,} minus at {last:,} iterations",
                       "improves with compute",
                       paired_difference(far[TREE, first], far[TREE, last]), 0.0),
    ])  # fmt: skip
    report.figures.append(lines("A ring: total variation by iterations", far, "iterations",
                                "total variation", (ROLLOUTS,)))  # fmt: skip


def variation(p: NDArray[Any], q: Float) -> float:
    return float(abs(p - q).sum() / 2)


def weights_of(found: steering.Steered) -> Float:
    return np.asarray(smc.probabilities(found.log_weights))


# ── problems of diffusions ──────────────────────────────────────────────────────────────────────


class Problem(NamedTuple):
    """The same chain for arrays and for tensors, whose gradients pass, and a reward of both."""

    chain: MarkovChain
    tensors: MarkovChain
    reward: Callable[[Any], Any]


class Cloud(NamedTuple):
    """Samples (n, d) with their shares, and rewards (n,)."""

    x: Float
    p: Float
    rewards: Float


def problem(score: GaussianMixtureScore, steps: int, reward: Callable[[Any], Any]) -> Problem:
    count = steps + (score.schedule.ends.last == "denoise")
    kinds = [
        diffusion_chain(score.schedule, score.eps, (score.dimension,), steps,
                        branch_at=paper_branches(count), tensors=tensors)
        for tensors in (False, True)
    ]  # fmt: skip
    return Problem(kinds[0], kinds[1], reward)


def grown(case: Problem, calls: int, key: Sequence[int], **options: Any) -> DiffusionTree:
    source = np.random.default_rng([*key, calls])
    tree = DiffusionTree(case.chain, case.reward, batch_size=BATCH, generator=source, **options)
    return tree.grow(nfe=calls)


def tree_cloud(case: Problem, calls: int, key: Sequence[int], **options: Any) -> Cloud:
    tree = grown(case, calls, key, **options)
    leaves, p = tree.implied_law()
    return Cloud(tree.states.at(leaves), p, tree.nodes["value"][leaves])


def steered(case: Problem, arm: str, calls: int, key: Sequence[int]) -> Cloud:
    """A baseline with as many particles as the calls allow."""
    n = calls // case.chain.steps
    source: Any = np.random.default_rng([*key, calls])
    if arm in (TDS, DAS, DPS):
        source = case.tensors.source(int(source.integers(2**31)))
    if arm in (ROLLOUTS, BASE):
        found = steering.weighted_rollouts(case.chain, case.reward, n, generator=source)
    elif arm == SMC:
        found = steering.particle_steering(case.chain, case.reward, n, generator=source)
    elif arm == VALUE:
        T = case.chain.steps
        looks = [T - last for _, last in case.chain.edges[:-1]]
        n = max(2, calls // (T + sum(looks)))
        found = steering.particle_steering(case.chain, case.reward, n, value="rollout",
                                           generator=source)  # fmt: skip
    elif arm == DPS:
        found = steering.guided_rollouts(case.tensors, case.reward, n, generator=source)
    else:
        found = steering.twisted_steering(case.tensors, case.reward, n, tempered=arm == DAS,
                                          generator=source)  # fmt: skip
    p = np.full(n, 1 / n) if arm == BASE else weights_of(found)
    return Cloud(np.asarray(on_host(found.x)), p, found.rewards)


SAMPLERS = (TREE, WIDE, FLAT, SMC, VALUE, TDS, DAS, DPS, ROLLOUTS, BASE)


def sampled(case: Problem, arm: str, calls: int, key: Sequence[int]) -> Cloud:
    if arm in TREES:
        return tree_cloud(case, calls, key, **TREES[arm])
    return steered(case, arm, calls, key)


def measured(
    case: Problem, plan: Plan, budgets: Sequence[int], key: Sequence[int],
    measures: Sequence[Callable[[Cloud], float]],
) -> list[Found]:  # fmt: skip
    """Measures of all samplers, budgets and seeds."""
    found: list[Found] = [{} for _ in measures]
    for arm in SAMPLERS:
        for calls in budgets:
            clouds = [sampled(case, arm, calls, [*key, seed]) for seed in range(plan.seeds)]
            for one, measure in zip(found, measures, strict=True):
                one[arm, calls] = np.array([measure(cloud) for cloud in clouds])
    return found


# ── a plane ─────────────────────────────────────────────────────────────────────────────────────

SPREAD = 0.3
ANGLES = np.arange(8) * np.pi / 4
CENTRES = 4 * np.column_stack([np.cos(ANGLES), np.sin(ANGLES)])
SHARES = softmax(1.5 * np.arange(8))


def plane_reward(x: Any) -> Any:
    """log Σ_i w_i N(x; m_i, 0.3² I), w ∝ e^{1.5 i}."""
    if is_tensor(x):
        import torch

        centres, shares = torch.from_numpy(CENTRES), torch.from_numpy(SHARES)
        square = (x.double()[:, None] - centres).square().sum(-1)
        r = torch.logsumexp(shares.log() - square / (2 * SPREAD**2), 1)
        return r - float(np.log(2 * np.pi * SPREAD**2))
    square = np.square(x[:, None] - CENTRES).sum(-1)
    r = logsumexp(np.log(SHARES) - square / (2 * SPREAD**2), axis=1)
    return r - np.log(2 * np.pi * SPREAD**2)


def plane_problem() -> Problem:
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-3, 0.07, 100)).with_ends(last="denoise")
    spread = np.stack([SPREAD**2 * np.eye(2)] * 8)
    score = GaussianMixtureScore(np.full(8, 1 / 8), CENTRES, spread, schedule)
    return problem(score, 99, plane_reward)


def mode_error(cloud: Cloud) -> float:
    """Total variation of the shares of the modes."""
    nearest = np.square(cloud.x[:, None] - CENTRES).sum(-1).argmin(1)
    return variation(np.bincount(nearest, cloud.p, 8), SHARES)


def add_plane(report: Report, plan: Plan, rng: int) -> None:
    case = plane_problem()
    (far,) = measured(case, plan, plan.plane, [rng, 17, 1], [mode_error])
    title = "Eight Gaussians in a plane: total variation of the modes' shares"
    report.tables.append(table(title, far, plan.plane))
    for calls in plan.plane:
        report.claims.append(
            better(
                f"plane, {calls:,} calls: SMC's error minus DTS's",
                "DTS beats SMC at equal calls",
                far,
                SMC,
                TREE,
                calls,
            )
        )
    first, last = plan.plane[0], plan.plane[-1]
    for arm, ours, says in (
        (strongest(far, last), TREE, "DTS beats all baselines"),
        (ROLLOUTS, TREE, "not compared"),
        (ROLLOUTS, WIDE, "not compared"),
    ):
        what = f"plane, {last:,} calls: error of {arm} minus that of {ours}"
        report.claims.append(better(what, says, far, arm, ours, last))
    report.claims.append(Claim.at_least(
        f"plane: DTS's error at {first:,} minus at {last:,} calls", "improves with compute",
        paired_difference(far[TREE, first], far[TREE, last]), 0.0))  # fmt: skip
    tenfold = [c for c in plan.plane if c == 10 * first] or [last]
    arm = strongest(far, tenfold[0])
    report.claims.append(Claim.at_least(
        f"plane: error of {arm} at {tenfold[0]:,} calls minus DTS's at {first:,}",
        "DTS needs a tenth of the best baseline's calls",
        paired_difference(far[arm, tenfold[0]], far[TREE, first]), 0.0))  # fmt: skip
    report.figures.append(lines("A plane: error of the modes' shares by network calls", far,
                                "network calls", "total variation", (ROLLOUTS, BASE)))  # fmt: skip


def strongest(found: Found, calls: int) -> str:
    """The paper's baseline of the least mean error."""
    return min(THEIRS, key=lambda arm: float(found[arm, calls].mean()))


def better(what: str, says: str, found: Found, other: str, ours: str, calls: int) -> Claim:
    return Claim.at_least(what, says, paired_difference(found[other, calls], found[ours, calls]), 0)


# ── digits ──────────────────────────────────────────────────────────────────────────────────────


class Digits(NamedTuple):
    """Principal components of digits, their mixture's chain, and a classifier of them."""

    case: Problem
    coefficients: Float
    intercepts: Float
    pixels: Callable[[Float], Float]

    def probabilities(self, x: Float) -> Float:
        return np.asarray(softmax(x @ self.coefficients.T + self.intercepts, axis=1))


WANTED, STEPS = 8, 50


@cache
def digits() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.mixture import GaussianMixture

    found = load_digits()
    pca = PCA(8, whiten=True, random_state=0).fit(found.data)
    x = pca.transform(found.data)
    mixture = GaussianMixture(10, covariance_type="full", reg_covar=1e-3, random_state=0).fit(x)
    judge = LogisticRegression(max_iter=1000).fit(x, found.target)
    W, b = judge.coef_, judge.intercept_

    def reward(x: Any) -> Any:
        if is_tensor(x):
            import torch

            logits = x.double() @ torch.from_numpy(W.T.copy()) + torch.from_numpy(b)
            return logits.log_softmax(1)[:, WANTED]
        return log_softmax(x @ W.T + b, axis=1)[:, WANTED]

    score = GaussianMixtureScore.from_sklearn(mixture, LinearBeta())
    case = problem(score, STEPS, reward)
    return Digits(case, W, b, lambda z: pca.inverse_transform(z) / 8 - 1)


def moments(cloud: Cloud) -> Float:
    """Points (2d, d) with the mean and covariance of weighted samples."""
    mean = cloud.p @ cloud.x
    offset = cloud.x - mean
    values, vectors = np.linalg.eigh((cloud.p[:, None] * offset).T @ offset)
    axes = (vectors * np.sqrt(np.maximum(values, 0.0))).T * np.sqrt(len(mean) - 0.5)
    return np.concatenate([mean + axes, mean - axes])


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    data = digits()
    case = data.case
    reference = steered(case, ROLLOUTS, plan.reference * STEPS, [rng, 17, 3])
    points = moments(reference)

    def frechet(cloud: Cloud) -> float:
        return frechet_distance(moments(cloud), points)

    def hits(cloud: Cloud) -> float:
        return float(cloud.p @ (data.probabilities(cloud.x).argmax(1) == WANTED))

    far, hit = measured(case, plan, plan.digits, [rng, 17, 2], [frechet, hits])
    first, last = plan.digits[0], plan.digits[-1]
    note = f"To {plan.reference:,} weighted rollouts, whose hit rate is {hits(reference):.3f}."
    report.tables.append(table("Digits as eights: Fréchet distance", far, plan.digits, note))
    report.tables.append(table("Digits as eights: share classified so", hit, plan.digits))
    report.claims.append(
        Claim.at_least(
            f"digits: DTS's Fréchet distance at {first:,} minus at {last:,} calls",
            "improves with compute",
            paired_difference(far[TREE, first], far[TREE, last]),
            0.0,
        )
    )
    for arm in (TREE, WIDE):
        for calls in (first, last):
            report.claims.append(
                better(
                    f"digits, {calls:,} calls: SMC's distance minus {arm}'s",
                    "DTS beats SMC at equal calls",
                    far,
                    SMC,
                    arm,
                    calls,
                )
            )
    arm = strongest(far, last)
    report.claims.append(better(
        f"digits, {last:,} calls: {arm}'s distance minus DTS's", "DTS beats all baselines",
        far, arm, TREE, last))  # fmt: skip
    report.figures.append(lines("Digits: Fréchet distance by network calls", far, "network calls",
                                "Fréchet distance", (ROLLOUTS, BASE)))  # fmt: skip
    add_search(report, plan, case, rng)
    report.figures.append(pictures(data, first, rng))


def add_search(report: Report, plan: Plan, case: Problem, rng: int) -> None:
    """The best reward that search, independent rollouts and particles find."""
    best: Found = {}
    for calls in plan.digits:
        n = calls // STEPS
        tops: dict[str, list[float]] = {STAR: [], BEST: [], FK: []}
        for seed in range(plan.seeds):
            key = [rng, 17, 4, seed]
            tops[STAR].append(grown(case, calls, key, search=True).best()[1])
            source = np.random.default_rng([*key, calls, 1])
            tops[BEST].append(steering.best_of_n(case.chain, case.reward, n, generator=source)[1])
            tops[FK].append(steering.particle_steering(
                case.chain, case.reward, n, lam=10.0, potential="max", generator=source
            ).best()[1])  # fmt: skip
        best |= {(arm, calls): np.array(values) for arm, values in tops.items()}
        report.claims.append(Claim.at_least(
            f"digits, {calls:,} calls: best reward of DTS* minus best of n",
            "DTS* finds as good samples with a fifth of the calls",
            paired_difference(best[STAR, calls], best[BEST, calls]), 0.0))  # fmt: skip
    report.tables.append(table("Digits: log P(8) of the best sample", best, plan.digits))


def pictures(data: Digits, calls: int, rng: int) -> Figure:
    case, key = data.case, [rng, 17, 5]
    tree, star = grown(case, calls, key), grown(case, calls, key, search=True)
    base = steered(case, BASE, 12 * STEPS, key).x
    top = star.best(min(12, len(star.leaves)))[0]
    strips = [("the base law", base), ("DTS", tree.sample(12)), ("DTS*, its best", top)]
    shown = [Picture(name, picture_strip(data.pixels(x))) for name, x in strips]
    caption = f"{calls:,} calls; eight principal components."
    return Figure("pictures", "Digits that should be eights", caption=caption, pictures=shown)


# ── tables and lines ────────────────────────────────────────────────────────────────────────────


def table(title: str, found: Found, budgets: Sequence[int], note: str = "") -> ReportTable:
    arms = dict.fromkeys(arm for arm, _ in found)
    rows: list[list[Cell]] = [
        [arm, *(mean_interval(found[arm, calls]) for calls in budgets)] for arm in arms
    ]
    return ReportTable(title, ["method", *(f"{c:,} calls" for c in budgets)], rows, note)


def lines(title: str, found: Found, x: str, y: str, plain: Sequence[str]) -> Figure:
    series = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        at = [count for name, count in found if name == arm]
        values: list[Estimate] = [mean_interval(found[arm, count]) for count in at]
        series.append(Series(arm, at, [v.value for v in values], baseline=arm in plain))
    return Figure("line", title, x, y, series, log_x=True, log_y=True)
