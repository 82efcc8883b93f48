"""Pref-GRPO: win rates instead of scores, and what it is about them that stops reward hacking.

*A scorer that can be hacked*: policies over (quality, hack) are trained by a score in which quality
saturates and a hack pays a little without end. By score, by rank, by win rate with several margins,
by score with a floor under the deviation, without deviation, by score and win rate together, and by
chance; at three levels of the scorer's noise. *Real scores*: what normalising makes of the scores
of sampled answers: log-probabilities and a reward model's. *Calls*: how well advantages follow the
truth when a judge is asked about fewer pairs, or favours what it is shown first.

Wang et al., "Pref-GRPO: pairwise preference reward-based GRPO for stable text-to-image
reinforcement learning", 2025, arXiv 2508.20751.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.calibration import auroc
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers.math_groups import math_groups
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.pairwise_rewards import (
    audit_score_gaps,
    bradley_terry,
    combine_advantages,
    normalised_advantages,
    pairwise_win_rate,
    round_robin_pairs,
    score_win_rate,
)
from scoredraw.rl.reward_groups import centre, chain, group_rewards

Float = NDArray[np.float64]

PROMPTS, G, SD, RATE, MARGIN = 8, 9, 0.5, 0.02, 0.1
NOISES, MARGINS = (0.0, 0.01, 0.05), (0.05, 0.1, 0.2)
SCORE, RANK, JOINT, CHANCE = "score", "rank (win rate, no ties)", "score + win rate", "by chance"
FLOOR, NO_STD = f"score, deviation ≥ {MARGIN:g}", "score, no deviation (Dr.GRPO)"
SAYS_HACKED = "training on scores over-saturates pictures; on win rates it stays stable"
GROUP = 8  # answers a group, where calls are counted


@dataclass(frozen=True)
class Plan:
    seeds: int
    steps: int
    groups: int  # of simulated verdicts, a seed


PLANS = {
    "smoke": Plan(2, 12, 8),
    "quick": Plan(8, 400, 50),
    "full": Plan(64, 400, 100),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(paper=32, scale=scale, seed=rng, title="Pref-GRPO: rewards from comparisons")
    with one_thread():
        add_hacking(report, plan, rng)
        add_scores(report)
        add_calls(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.win_rate_study import add_win_rate_study

        add_win_rate_study(report, rng)
    report.notes.append(
        "The paper's own figures (FLUX.1-dev, UniGenBench +5.8 points over training on scores) "
        "take 64 GPUs and a judge of pictures: quoted, not measured. `rl.prompt_tests` scores such "
        "runs."
    )
    return report


# ── a scorer that can be hacked ─────────────────────────────────────────────────────────────────


def win_rate_name(margin: float) -> str:
    return f"win rate, ties below {margin:g}"


PREF = win_rate_name(MARGIN)


def by_win_rate(margin: float) -> Callable[[Tensor], Tensor]:
    def advantage(u: Tensor) -> Tensor:
        rate = score_win_rate(u, num_generations=G, margin=margin)
        return normalised_advantages(rate, num_generations=G)

    return advantage


def joint(u: Tensor) -> Tensor:
    both = {"win": score_win_rate(u, num_generations=G, margin=MARGIN), "score": u}
    return combine_advantages(both, {"win": 0.4, "score": 0.6}, num_generations=G)


def by_chance(u: Tensor) -> Tensor:
    """Advantages that belong to other groups' answers: they know nothing."""
    return normalised_advantages(u.roll(G * PROMPTS + 1), num_generations=G)


ARMS: dict[str, Callable[[Tensor], Tensor]] = {
    SCORE: lambda u: normalised_advantages(u, num_generations=G),
    RANK: by_win_rate(0.0),
    **{win_rate_name(margin): by_win_rate(margin) for margin in MARGINS},
    FLOOR: lambda u: normalised_advantages(u, num_generations=G, std_floor=MARGIN),
    # ten times the rate: a deviation is about a tenth
    NO_STD: lambda u: 10 * chain(centre())(group_rewards(u, num_generations=G)),
    JOINT: joint,
    CHANCE: by_chance,
}


@dataclass
class Trained:
    """(noises, seeds) at the end; quality tanh θ_q and hack θ_h, and both along the way."""

    quality: Float
    hack: Float
    at: list[int] = field(default_factory=list)
    path: list[Float] = field(default_factory=list)  # quality and hack at each of `at`


def train(advantage: Callable[[Tensor], Tensor], plan: Plan, rng: int) -> Trained:
    """Gaussian policies with mean θ, all noises, seeds and prompts at once; score-function steps.

    The same random numbers for each arm, so that arms are compared seed by seed.
    """
    theta = torch.zeros(len(NOISES), plan.seeds, PROMPTS, 1, 2, dtype=torch.float64)
    noise = torch.tensor(NOISES, dtype=torch.float64).reshape(-1, 1, 1, 1)
    g = torch.Generator().manual_seed(rng)
    found = Trained(np.empty(0), np.empty(0))
    for step in range(plan.steps + 1):
        quality, hack = theta[..., 0].tanh().mean(dim=(2, 3)), theta[..., 1].mean(dim=(2, 3))
        if step % max(1, plan.steps // 20) == 0:
            found.at.append(step)
            found.path.append(torch.stack([quality, hack]).numpy())
        if step == plan.steps:
            found.quality, found.hack = quality.numpy(), hack.numpy()
            break
        shape = (plan.seeds, PROMPTS, G)
        z = torch.randn((*shape, 3), generator=g, dtype=torch.float64)
        away = SD * z[..., :2].expand(len(NOISES), *shape, 2)
        q, h = (theta + away).unbind(dim=-1)
        u = 3 + 0.5 * q.tanh() + 0.05 * h + noise * z[..., 2]
        A = advantage(u.reshape(-1)).reshape(u.shape)
        theta = theta + RATE * (A[..., None] * away).mean(dim=3, keepdim=True) / SD**2
    return found


def add_hacking(report: Report, plan: Plan, rng: int) -> None:
    found = {name: train(advantage, plan, rng) for name, advantage in ARMS.items()}
    report.claims.extend(hacking_claims(found))
    for name, part in (("hack θ_h", "hack"), ("quality tanh θ_q", "quality")):
        rows: list[list[Cell]] = [
            [arm, *(mean_interval(row) for row in getattr(trained, part))]
            for arm, trained in found.items()
        ]
        columns = [name, *(f"noise {noise:g}" for noise in NOISES)]
        title = f"A scorer that can be hacked: {name} after {plan.steps} steps"
        note = f"{plan.seeds} seeds, the same random numbers for each arm. Start: 0."
        report.tables.append(ReportTable(title, columns, rows, note))
    series = []
    for arm in (SCORE, RANK, FLOOR, PREF):
        paths = np.array([path[1, 1] for path in found[arm].path])  # noise .01, (times, seeds)
        series.append(Series(arm, found[arm].at, paths.mean(axis=1), paths.min(1), paths.max(1),
                             baseline=arm == SCORE))  # fmt: skip
    report.figures.append(
        Figure("line", "How far the hack goes", "step", "θ_h", series,
               caption=f"Scorer's noise .01; bands: all {plan.seeds} seeds.")
    )  # fmt: skip
    arms = [arm for arm in ARMS if arm != CHANCE]
    quality, hack = ([getattr(found[arm], part)[1].mean() for arm in arms]
                     for part in ("quality", "hack"))  # fmt: skip
    report.figures.append(
        Figure("scatter", "What the hack buys", "quality tanh θ_q", "hack θ_h",
               [Series("arms", quality, hack, labels=arms)], caption="Scorer's noise .01.")
    )  # fmt: skip


def hacking_claims(found: dict[str, Trained]) -> list[Claim]:
    def ratio(arm: str, noise: int, base: str = SCORE) -> Any:
        return mean_interval(found[arm].hack[noise] / found[base].hack[noise])

    def better(noise: int) -> str:
        return min((FLOOR, NO_STD), key=lambda arm: float(found[arm].hack[noise].mean()))

    quality = paired_difference(found[PREF].quality[1], found[SCORE].quality[1])
    rule = "θ_h over that by score, mean of seeds, at most .4"
    against = "θ_h over that of the better of floor and no deviation, at most 1"
    return [
        Claim.at_most("noise .01: win rates hack less than scores", SAYS_HACKED, ratio(PREF, 1),
                      0.4, rule),
        Claim.within("noise .01: and lose no quality", SAYS_HACKED, quality, -0.01, 0.01,
                     "difference of tanh θ_q, paired by seed, within .01"),
        Claim.at_most("noise .01: win rates without ties hack less than scores",
                      "comparing is what helps", ratio(RANK, 1), 0.4, rule),
        Claim.at_most("noise .05, half the margin: win rates hack less than scores", SAYS_HACKED,
                      ratio(PREF, 2), 0.4, rule),
        Claim.at_most(f"noise .01: win rates hack less than {better(1)}", "not compared with",
                      ratio(PREF, 1, better(1)), 1.0, against),
        Claim.at_most(f"noise .05: win rates hack less than {better(2)}", "not compared with",
                      ratio(PREF, 2, better(2)), 1.0, against),
        Claim.at_most("noise .01: score + win rate (.6, .4) hacks less than scores",
                      "win rate .4 + CLIP .6 keeps pictures stable", ratio(JOINT, 1), 0.8,
                      "θ_h over that by score, mean of seeds, at most .8"),
    ]  # fmt: skip


# ── real scores ─────────────────────────────────────────────────────────────────────────────────


def add_scores(report: Report) -> None:
    """A reward model's small differences."""
    scores = np.array([row["rm_score"] for row in math_groups()])
    correct = np.array([row["correct"] for row in math_groups()]) == 1
    ids = np.repeat(np.arange(len(scores)), scores.shape[1])
    name = f"a reward model ({scores.shape[0]} problems × {scores.shape[1]})"
    add_score_table(report, name, scores.reshape(-1), ids)
    within = audit_score_gaps(scores.reshape(-1), ids, margin=MARGIN).within_margin
    says = "scores of one group differ by little, and dividing by the deviation blows that up"
    rule = f"share of groups whose scores all lie within {MARGIN:g} at least .05"
    report.claims.append(Claim.at_least(f"there are such groups: {name}", says, within, 0.05, rule))
    solved = correct.all(axis=1)
    title = f"Advantages in the {solved.sum()} groups with nothing but right answers: {name}"
    rows: list[list[Cell]] = []
    for margin in (0.1, 0.2):
        found = audit_score_gaps(scores[solved].reshape(-1), num_generations=scores.shape[1],
                                 margin=margin)  # fmt: skip
        rows.append([margin, found.pointwise, found.ranked, found.win_rate])
    columns = ["margin", "mean |A| by score", "by rank", "by win rate"]
    report.tables.append(ReportTable(title, columns, rows))
    mixed = np.flatnonzero(~solved & correct.any(axis=1))
    areas = []
    for margin in (0.0, MARGIN):
        rate = score_win_rate(scores.reshape(-1), ids, margin=margin).numpy().reshape(scores.shape)
        areas.append(np.array([auroc(rate[i], correct[i]) for i in mixed]))
    gain = paired_difference(areas[1], areas[0])
    says = "win rates tell answers apart as well as scores or better"
    rule = "difference of AUROC in groups with right and wrong answers at least -.05"
    report.claims.append(Claim.at_least(f"ties cost no ranking: {name}", says, gain, -0.05, rule))


def add_score_table(report: Report, name: str, scores: Float, ids: NDArray[np.int64]) -> None:
    rows: list[list[Cell]] = []
    for margin in (*MARGINS, 0.5):
        found = audit_score_gaps(scores, ids, margin=margin)
        rows.append([margin, found.within_margin, found.illusory, found.pointwise, found.ranked,
                     found.win_rate, found.silent])  # fmt: skip
    columns = ["margin", "groups within it", "share of |A| that is theirs", "mean |A| by score",
               "by rank", "by win rate", "groups silent by win rate"]  # fmt: skip
    note = (
        f"Median range of a group {found.score_range:.3f}; largest |A| over range, median "
        f"{found.amplification:.2f}."
    )
    report.tables.append(ReportTable(f"Small differences: {name}", columns, rows, note))


# ── fewer calls ─────────────────────────────────────────────────────────────────────────────────


def judged(gap: Float, bias: float, random: np.random.Generator) -> NDArray[np.int64]:
    """Verdicts of a noisy judge who likes what is shown first; ties where it is torn."""
    first = 1 / (1 + np.exp(-(3 * gap + bias)))
    u = random.random(gap.shape)
    return np.where(u < 0.85 * first, 1, np.where(u < 0.15 + 0.85 * first, 0, 2))


def follow(values: Tensor, truth: Float) -> float:
    """The mean over groups of the correlation of advantages with the true utility."""
    A = normalised_advantages(values, num_generations=GROUP).numpy().reshape(truth.shape)
    a, t = (x - x.mean(axis=1, keepdims=True) for x in (A, truth))
    norm = np.sqrt((a**2).sum(1) * (t**2).sum(1))
    return float(((a * t).sum(axis=1) / np.where(norm > 0, norm, 1.0)).mean())


def one_seed(plan: Plan, bias: float, random: np.random.Generator) -> dict[str, float]:
    truth = random.standard_normal((plan.groups, GROUP))
    utility, found = truth.reshape(-1), {}
    first = GROUP * torch.arange(plan.groups)[:, None, None]
    for calls in (8, 14, 28):
        pairs = torch.cat([
            start + round_robin_pairs(GROUP, calls, random) for start in first
        ]).numpy()  # fmt: skip
        verdicts = judged(utility[pairs[:, 0]] - utility[pairs[:, 1]], bias, random)
        for name, rate in (("win rate", pairwise_win_rate), ("Bradley-Terry", bradley_terry)):
            found[f"{calls} pairs, {name}"] = follow(rate(verdicts, pairs, len(utility)), truth)
        if calls < 28:
            loose = np.concatenate([
                start.numpy().reshape(1, 1) + np.sort(anywhere(calls, random), axis=1)
                for start in first
            ])  # fmt: skip
            heard = judged(utility[loose[:, 0]] - utility[loose[:, 1]], bias, random)
            rate = pairwise_win_rate(heard, loose, len(utility))
            found[f"{calls} pairs at random, win rate"] = follow(rate, truth)
        again = judged(utility[pairs[:, 1]] - utility[pairs[:, 0]], bias, random)
        agree = np.where((verdicts > 0) & (verdicts + again == 3), verdicts, 0)
        rate = pairwise_win_rate(agree, pairs, len(utility))
        found[f"{calls} pairs in both orders, win rate"] = follow(rate, truth)
    return found


def anywhere(calls: int, random: np.random.Generator) -> NDArray[np.int64]:
    """So many different pairs of a group, uniformly."""
    every = round_robin_pairs(GROUP).numpy()
    return np.asarray(every[random.permutation(len(every))[:calls]], np.int64)


def add_calls(report: Report, plan: Plan, rng: int) -> None:
    biases = (0.0, 1.5)
    seeds = np.random.SeedSequence(rng).spawn(plan.seeds)
    found = {
        bias: [one_seed(plan, bias, np.random.default_rng(seed)) for seed in seeds]
        for bias in biases
    }

    def of(bias: float, name: str) -> Float:
        return np.array([each[name] for each in found[bias]])

    rows: list[list[Cell]] = [
        [name, int(name.split()[0]) * (1 + ("both" in name)),
         *(mean_interval(of(bias, name)) for bias in biases)]
        for name in found[0.0][0]
    ]  # fmt: skip
    columns = ["", "calls a group", "no bias", "favours what is shown first"]
    note = f"Correlation with the true utility, groups of {GROUP}, {plan.groups} a seed."
    report.tables.append(ReportTable("Advantages from fewer calls", columns, rows, note))
    half = "14 pairs, "
    report.claims.extend([
        Claim.at_least("Bradley-Terry follows the truth better than the win rate (14 of 28 pairs)",
                       "-", paired_difference(of(0.0, half + "Bradley-Terry"),
                                              of(0.0, half + "win rate")), 0.0,
                       "difference of correlations, paired by seed, at least 0"),
        Claim.at_least("balanced pairs are better than pairs at random (14 of 28)", "-",
                       paired_difference(of(0.0, half + "win rate"),
                                         of(0.0, "14 pairs at random, win rate")), 0.0,
                       "difference of correlations, paired by seed, at least 0"),
        Claim.at_least("14 pairs in both orders beat 28 in one, for a judge with a bias", "-",
                       paired_difference(of(1.5, "14 pairs in both orders, win rate"),
                                         of(1.5, "28 pairs, win rate")), 0.0,
                       "difference of correlations at the same calls, paired by seed, at least 0"),
    ])  # fmt: skip
