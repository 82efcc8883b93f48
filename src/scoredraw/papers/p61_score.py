r"""Learning to correct oneself: three parameters, two attempts, and every way to be paid for them.

A label y = ±1 shows itself in evidence e = y + 2 ε. The policy answers a_1, sees a hint whether
that was right (wrong itself in .15 of the cases), and answers again:

    a_1 = ±1 with logit w e,      a_2 = ±1 with logit w e + k a_1 + v hint a_1.

The base policy, (w, k, v) = (.3, 7, 0), repeats itself. An arm is one way of training it, each with
the same number of episodes: SCoRe, its parts left out one at a time, all turns paid with the total,
a weight 1 + α on the second turn in place of the bonus, and imitation of good episodes. Runs are
paired by seed (the same labels, evidence and uniforms), all seeds of an arm are trained at once,
and accuracies are exact: integrals over ε, not samples. A run has collapsed to repeating itself
where the second attempt is less than five points better than the first.

Kumar et al. 2024, "Training language models to self-correct via reinforcement learning",
arXiv 2409.12917.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from scoredraw.metrics import mean_interval, paired_difference, proportion_interval
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.divergences import kl_k1
from scoredraw.rl.self_correction import score_advantages

Float = NDArray[np.float64]

BASE = np.array([0.3, 7.0, 0.0])
NOISE, FLIP = 2.0, 0.15
BATCH, STEPS = 64, 150
ALPHA, BETA1, BETA2, RATE = 10.0, 0.01, 0.1, 0.05
COLLAPSED = 0.05
ROUNDS = 3  # of sampling, where episodes are imitated
GRID = np.linspace(-6, 6, 241)  # of ε: the integrand is smooth, so the sum is exact to 1e-8


@dataclass(frozen=True)
class Arm:
    """One way of training. learn: from "returns", good "episodes", or "pairs" wrong, then right."""

    alpha: float = ALPHA
    first_stage: bool = True
    credit: str = "per_turn"
    weight: bool = False  # r_2 times 1 + α, no bonus
    first_only: bool = False
    base_half: bool = False  # half of stage II's first attempts are the base policy's
    learn: str = "returns"
    same: bool = False  # imitate right, then right as well


SCORE, NAIVE = "SCoRe", "naive two-turn RL"
NO_STAGE, NO_BONUS = "without stage I", "without bonus"
TOTAL = "SCoRe, total credit"
WEIGHT, WEIGHT_ONLY = "weight 1 + α", "weight 1 + α, no stage I"
SINGLE, STAR2, BASE_HALF = "first turn only", "STaR in stage II", "SCoRe, half base attempts"
PAIRS, PAIRS_SAME = "Pair-SFT", "Pair-SFT, and right pairs"
STAR, STAR_SAME = "STaR", "STaR, and right pairs"
ARMS = {
    SCORE: Arm(),
    NAIVE: Arm(alpha=0.0, first_stage=False),
    NO_STAGE: Arm(first_stage=False),
    NO_BONUS: Arm(alpha=0.0),
    WEIGHT: Arm(weight=True),
    WEIGHT_ONLY: Arm(first_stage=False, weight=True),
    TOTAL: Arm(credit="total"),
    SINGLE: Arm(alpha=0.0, first_stage=False, first_only=True),
    BASE_HALF: Arm(base_half=True),
    STAR2: Arm(learn="episodes", same=True),
    PAIRS: Arm(learn="pairs", first_stage=False),
    PAIRS_SAME: Arm(learn="pairs", first_stage=False, same=True),
    STAR: Arm(learn="episodes", first_stage=False),
    STAR_SAME: Arm(learn="episodes", first_stage=False, same=True),
}
BONUS = "the bonus rewards corrections; (derived) it is this weight, and noise"
NOTES = (
    "Δ is the share right at the second attempt less that at the first.",
    "A pair of Pair-SFT is two first attempts at one problem, the wrong one before the right one.",
    "Its pairs come with a hint, so that imitation is enough to learn what a hint means.",
    "STaR goes on from where it is after each round; the paper starts from the base model again.",
    "Not compared: 32 attempts with 16 corrected ones. The fresh hint of each decides that here.",
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    tuning: int = 0  # other seeds to choose a step size on
    alphas: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0, 30.0)
    every: int = 10  # steps between points of the curves


RATES = (0.0125, 0.025, RATE, 0.1, 0.2)
PLANS = {
    "smoke": Plan(24, alphas=(10.0,), every=50),
    "quick": Plan(192, tuning=48),
    "full": Plan(1024, tuning=128, alphas=(0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train every arm, compare, tune their steps, and vary α; a language model at scale "study"."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=61, scale=scale, seed=rng, title="Self-correction by reinforcement")
    runs = {name: train(arm, plan.seeds, [rng, 61], every=plan.every) for name, arm in ARMS.items()}
    add_arms(report, runs)
    report.claims.extend(claims(runs))
    report.figures.append(curves(runs, plan))
    add_alphas(report, plan, rng)
    if plan.tuning:
        add_tuned(report, plan, runs, rng)
    if scale == "study":
        from scoredraw.papers.correction_study import add_correction_study

        add_correction_study(report, rng)
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── the task ────────────────────────────────────────────────────────────────────────────────────


class Outcome(NamedTuple):
    """Exact shares, (S,) each: right first, right second, mended, spoiled."""

    t1: Float
    t2: Float
    i2c: Float
    c2i: Float

    @property
    def delta(self) -> Float:
        return self.t2 - self.t1

    @property
    def collapsed(self) -> int:
        return int((self.delta < COLLAPSED).sum())


def evaluate(theta: Float) -> Outcome:
    """Of policies (S, 3), by integrating over ε; by symmetry y = 1."""
    w, k, v = theta.T[:, :, None]
    e = 1 + NOISE * GRID
    density = np.exp(-(GRID**2) / 2)
    density /= density.sum()
    right = expit(w * e)

    def again(first: float) -> Float:
        """P(a_2 = 1 | a_1, e), the hint averaged over."""
        true, false = (expit(w * e + k * first + v * h * first) for h in (first, -first))
        return np.asarray((1 - FLIP) * true + FLIP * false)

    kept, mended = right * again(1.0), (1 - right) * again(-1.0)
    shares = [x @ density for x in (right, kept + mended, mended, right - kept)]
    return Outcome(*shares)


class Batch(NamedTuple):
    """Episodes (S, B), and what each logit is made of."""

    y: Float
    e: Float
    a1: Float
    hint: Float
    a2: Float


def sample(theta: Float, first: Float, rng: np.random.Generator, size: int) -> Batch:
    """Episodes of policies theta (S, 3); first (S, size, 3) are those of the first attempts."""
    S = len(theta)
    uniform = rng.random((4, S, size))
    y = np.where(uniform[0] < 0.5, 1.0, -1.0)
    e = y + NOISE * rng.standard_normal((S, size))
    a1 = np.where(uniform[1] < expit(first[..., 0] * e), 1.0, -1.0)
    hint = np.where((a1 == y) == (uniform[2] >= FLIP), 1.0, -1.0)
    _, second = logits(theta, Batch(y, e, a1, hint, a1))
    a2 = np.where(uniform[3] < expit(second), 1.0, -1.0)
    return Batch(y, e, a1, hint, a2)


def logits(theta: Float, b: Batch) -> tuple[Float, Float]:
    w, k, v = np.broadcast_to(theta, (len(b.y), 3)).T[:, :, None]
    return w * b.e, w * b.e + k * b.a1 + v * b.hint * b.a1


def gradient(theta: Float, b: Batch, first: Float, second: Float) -> Float:
    """(S, 3): the mean over a batch of first ∇ log π(a_1) + second ∇ log π(a_2)."""
    l1, l2 = logits(theta, b)
    g1 = first * b.a1 * expit(-b.a1 * l1)
    g2 = second * b.a2 * expit(-b.a2 * l2)
    parts = ((g1 + g2) * b.e, g2 * b.a1, g2 * b.hint * b.a1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


# ── training ────────────────────────────────────────────────────────────────────────────────────


class Trained(NamedTuple):
    """Where an arm came to, (S, 3), how well it does, and its course, (points, S) each."""

    theta: Float
    outcome: Outcome
    steps: list[int]
    t1: Float
    t2: Float


def train(
    arm: Arm, seeds: int, key: Sequence[int], rate: float = RATE, every: int = STEPS
) -> Trained:
    """STEPS steps of Adam for all seeds of an arm at once."""
    rng = np.random.default_rng(list(key))
    theta = np.tile(BASE, (seeds, 1))
    sampler = theta.copy()
    m, s = np.zeros((2, *theta.shape))
    course = [(0, evaluate(theta))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some arms have no bonus, on purpose
        for t in range(STEPS):
            first_stage = arm.first_stage and t < STEPS // 3
            if first_stage or arm.learn == "returns" or t % (STEPS // ROUNDS) == 0:
                sampler = theta
            g = direction(arm, 1 if first_stage else 2, theta, sampler, rng)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            m_hat, s_hat = m / (1 - 0.9 ** (t + 1)), s / (1 - 0.999 ** (t + 1))
            theta = theta + rate * m_hat / (np.sqrt(s_hat) + 1e-8)
            if (t + 1) % every == 0:
                course.append((t + 1, evaluate(theta)))
    t1, t2 = (np.array([getattr(o, name) for _, o in course]) for name in ("t1", "t2"))
    return Trained(theta, evaluate(theta), [step for step, _ in course], t1, t2)


def direction(
    arm: Arm, stage: int, theta: Float, sampler: Float, rng: np.random.Generator
) -> Float:
    """(S, 3): the step an arm would take, by reinforcement or by imitation."""
    source = np.tile(sampler[:, None], (1, BATCH, 1))
    own = np.ones(BATCH)
    if arm.base_half and stage == 2:
        source[:, BATCH // 2 :], own[BATCH // 2 :] = BASE, 0.0
    if arm.learn == "pairs":
        sampler = np.tile([BASE[0], 0.0, 0.0], (len(theta), 1))  # another first attempt
    b = sample(sampler, source, rng, BATCH)
    if stage == 2 and arm.learn != "returns":
        return imitation(arm, theta, b)
    first, second = advantages(arm, stage, theta, b, own)
    return gradient(theta, b, first * own, second * (not arm.first_only))


def advantages(arm: Arm, stage: int, theta: Float, b: Batch, own: Float) -> tuple[Float, Float]:
    """(S, B) of each turn: a seed is a group, and so is each source of first attempts in it."""
    S, B = b.y.shape
    r = np.stack([b.a1 == b.y, b.a2 == b.y], axis=-1).astype(np.float64)
    alpha, top = arm.alpha, 1.0
    if arm.weight and stage == 2:
        r[..., 1] *= 1 + arm.alpha
        alpha, top = 0.0, 1 + arm.alpha
    logp, ref = (
        np.stack([log_expit(a * x) for a, x in zip((b.a1, b.a2), logits(p, b), strict=True)], -1)
        for p in (theta, BASE)
    )
    group = 2 * np.arange(S)[:, None] + own.astype(np.int64)
    found = score_advantages(
        torch.from_numpy(r).reshape(-1, 2),
        kl_k1(torch.from_numpy(logp), torch.from_numpy(ref)).reshape(-1, 2),
        stage, alpha, BETA1, BETA2, arm.credit,
        group_ids=torch.from_numpy(group).reshape(-1), reward_range=(0.0, top),
    ).numpy().reshape(S, B, 2)  # fmt: skip
    return found[..., 0], found[..., 1]


def imitation(arm: Arm, theta: Float, b: Batch) -> Float:
    """The likelihood's gradient on episodes that end right: after a wrong first attempt, or any.

    Pairs teach the second turn only. No step where a seed's batch has none.
    """
    good = (b.a2 == b.y) & (arm.same | (b.a1 != b.y))
    share = good / np.maximum(good.mean(axis=1, keepdims=True), 1 / BATCH)
    return gradient(theta, b, share * (arm.learn == "episodes"), share)


# ── what came of it ─────────────────────────────────────────────────────────────────────────────


def add_arms(report: Report, runs: Mapping[str, Trained]) -> None:
    base = evaluate(BASE[None])
    rows: list[list[Cell]] = [["base", *(float(x[0]) for x in (*base, base.delta)), None]]
    for name, arm in runs.items():
        o = arm.outcome
        shares = [mean_interval(x) for x in (*o, o.delta)]
        rows.append([name, *shares, proportion_interval(o.collapsed, len(o.t1))])
    columns = ["trained by", "right first", "right second", "mended", "spoiled", "Δ", "collapsed"]
    note = f"Collapsed: Δ below {COLLAPSED}. {STEPS} steps of {BATCH} episodes, Adam {RATE}."
    title = f"Two attempts with a hint, {len(o.t1)} seeds"
    report.tables.append(ReportTable(title, columns, rows, note=note))
    gains = [mean_interval(arm.outcome.delta) for arm in runs.values()]
    low, high = [g.low for g in gains], [g.high for g in gains]
    one = Series("mean, 95 %", list(runs), [g.value for g in gains], low, high)
    title, label = "What the second attempt adds", "right second less right first"
    report.figures.append(Figure("interval", title, label, series=[one], reference=0.0))


def claims(runs: Mapping[str, Trained]) -> list[Claim]:
    o = {name: arm.outcome for name, arm in runs.items()}
    score, n = o[SCORE], len(o[SCORE].t1)
    base = float(evaluate(BASE[None]).delta[0])
    gain = mean_interval(score.delta - base)
    no_stage = proportion_interval(o[NO_STAGE].collapsed, n)
    found = [
        Claim.at_least("Δ of SCoRe less the base policy's", "MATH: +4.4 against -11.2", gain, 0.0),
        Claim.at_most(
            "SCoRe, share of runs that collapse", "stage I is there to prevent collapse",
            proportion_interval(score.collapsed, n), 1 / 24),
        Claim.at_least(
            "without stage I, share of runs that collapse", "without it training collapses",
            no_stage, 3 / 24),
        Claim.within(
            "right first, SCoRe less naive RL", "SCoRe gives up little at the first attempt",
            paired_difference(score.t1, o[NAIVE].t1), -0.03, 0.03),
        Claim.at_most(
            "right first, SCoRe paid by the total", "(derived) r_1 counts 1 - α: be wrong first",
            mean_interval(o[TOTAL].t1), 0.5),
        Claim.at_least(
            "naive RL, share of runs that collapse", "naive multi-turn RL repeats its answer",
            proportion_interval(o[NAIVE].collapsed, n), 0.5),
        Claim.at_least(
            "right second, SCoRe less naive RL", "SCoRe has the best second attempts",
            paired_difference(score.t2, o[NAIVE].t2), 0.0),
    ]  # fmt: skip
    says = {
        NO_STAGE: ("MATH: Δ +4.4 against +2.2", 0.03),
        NO_BONUS: ("MATH: Δ +4.4 against +2.6", 0.0),
        NAIVE: ("SCoRe corrects more than naive multi-turn RL", 0.0),
        WEIGHT: (BONUS, 0.0),
        WEIGHT_ONLY: (BONUS, 0.0),
        STAR2: ("MATH: Δ +4.4 against +2.2", 0.0),
        PAIRS: ("MATH: Δ +4.4 against +1.8", 0.0),
        STAR: ("imitation of own episodes corrects less", 0.0),
        STAR_SAME: ("with right pairs it corrects less", 0.0),
        PAIRS_SAME: ("with right pairs it corrects less", 0.0),
    }
    for other, (paper, bound) in says.items():
        gain = paired_difference(score.delta, o[other].delta, comparisons=len(says))
        found.append(Claim.at_least(f"Δ, SCoRe less {other}", paper, gain, bound))
    return found


def curves(runs: Mapping[str, Trained], plan: Plan) -> Figure:
    """Mean accuracy of both attempts over training."""
    series = []
    for name in (SCORE, NAIVE, NO_STAGE, TOTAL):
        for part, which in (("first", "t1"), ("second", "t2")):
            values = getattr(runs[name], which).mean(axis=1)
            label = f"{name}, {part}"
            series.append(Series(label, runs[name].steps, values, baseline=name == NAIVE))
    caption = f"Means over {plan.seeds} seeds; stage I ends at step {STEPS // 3}."
    return Figure("line", "Both attempts during training", "step", "share right", series,
                  caption=caption)  # fmt: skip


def add_alphas(report: Report, plan: Plan, rng: int) -> None:
    """The bonus by its size, under both credits, with and without stage I."""
    ways = {"per turn": Arm(), "per turn, no stage I": Arm(first_stage=False),
            "total": Arm(credit="total")}  # fmt: skip
    rows: list[list[Cell]] = []
    series = []
    for way, arm in ways.items():
        found = [
            train(replace(arm, alpha=alpha), plan.seeds, [rng, 61]).outcome for alpha in plan.alphas
        ]
        for alpha, o in zip(plan.alphas, found, strict=True):
            lost = proportion_interval(o.collapsed, plan.seeds)
            rows.append([way, alpha, mean_interval(o.t1), mean_interval(o.t2), lost])
        series.append(Series(way, plan.alphas, [float(o.t1.mean()) for o in found]))
    columns = ["credit", "α", "right first", "right second", "collapsed"]
    report.tables.append(ReportTable("The size of the bonus", columns, rows))
    report.figures.append(Figure(
        "line", "Who is paid the bonus: the first attempt by α", "α", "right first", series,
        reference=0.5, caption="Below .5 the first attempt is wrong on purpose."))  # fmt: skip


def add_tuned(report: Report, plan: Plan, runs: Mapping[str, Trained], rng: int) -> None:
    """Each arm at the step size with the best second attempts on other seeds."""
    rows: list[list[Cell]] = []
    tuned: dict[str, Outcome] = {}
    for name, arm in ARMS.items():
        tried = [train(arm, plan.tuning, [rng, 61, 1], rate).outcome.t2.mean() for rate in RATES]
        best = RATES[int(np.argmax(tried))]
        found = runs[name] if best == RATE else train(arm, plan.seeds, [rng, 61], best)
        o = tuned[name] = found.outcome
        lost = proportion_interval(o.collapsed, plan.seeds)
        rows.append(
            [name, best, mean_interval(o.t1), mean_interval(o.t2), mean_interval(o.delta), lost]
        )
    columns = ["trained by", "best step", "right first", "right second", "Δ", "collapsed"]
    note = f"Chosen on {plan.tuning} other seeds among {', '.join(f'{x:g}' for x in RATES)}."
    report.tables.append(ReportTable("At its best step size", columns, rows, note=note))
    says = "SCoRe's second attempts are the best"
    others = (NAIVE, NO_STAGE, NO_BONUS, WEIGHT, WEIGHT_ONLY)
    for other in others:
        gain = paired_difference(tuned[SCORE].t2, tuned[other].t2, comparisons=len(others))
        name = f"right second, SCoRe less {other}, each at its best step"
        report.claims.append(Claim.at_least(name, says, gain, 0.0))
