"""Does a virtual right answer help groups that are all wrong, and when?

Digits as a contextual bandit: a network that was taught wrong labels for half of the digits is
trained by its rewards, with the same images and uniforms for every method. Advantages differ in
size, so that each method has its own best step size, found on other seeds by pass@8. Measures are
exact, from the softmax. A control has no shared parameters: a table of its own for each prompt.
Beside these the closed forms, the law of an all-wrong group, and groups of real MATH answers.

Nan et al., "NGRPO: negative-enhanced group relative policy optimization", 2025, arXiv 2509.18851.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.categorical import invert
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers.digit_bandit import (
    BATCH,
    GROUP,
    Learner,
    Task,
    digit_task,
    measure,
    reinforce,
    taught,
)
from scoredraw.papers.math_groups import math_groups
from scoredraw.papers.training import MLPEnsemble, one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.group_advantages import GROUP_METHODS, group_advantages, kept_answers
from scoredraw.rl.policy_loss import clipped_token_loss

Float = NDArray[np.float64]

NGRPO, SYMMETRIC, GRPO, DAPO = "NGRPO", "NGRPO, clip .2 both ways", "GRPO", "DAPO"
RLOO, PSR, NSR, WEIGHTED = "RLOO", "PSR", "NSR", "W-REINFORCE"
BATCHWISE = "REINFORCE++"  # a baseline over the batch, which all-wrong groups are below too
ARMS = {
    NGRPO: Learner("ngrpo"), SYMMETRIC: Learner("ngrpo", (0.2, 0.2)), GRPO: Learner("grpo"),
    DAPO: Learner("dapo"), RLOO: Learner("rloo"), PSR: Learner("psr"), NSR: Learner("nsr"),
    WEIGHTED: Learner("w_reinforce"),
}  # fmt: skip
REFILLED = {name: name + ", refilled" for name in (NGRPO, DAPO)}
MORE = {
    **{more: replace(ARMS[name], batches=10) for name, more in REFILLED.items()},
    "Dr. GRPO": Learner("dr_grpo"), BATCHWISE: Learner("reinforce_pp"),
    "REINFORCE++ with baseline": Learner("reinforce_pp_baseline"), "ReMax": Learner("remax"),
}  # fmt: skip
SILENT = (GRPO, DAPO, RLOO, PSR)
KS = tuple(2**i for i in range(9))  # of pass@k
EIGHT = KS.index(8)
SHARED_RATE = 1e-3
PROMPTS, ANSWERS, SURE = 200, 20, 0.9  # of the control: the chance of its one wrong answer
SAYS = "higher pass@k AUC on MATH500, AMC23 and AIME2025 (7B trained on MATH)"
DERIVED = "derived here, not in the paper"
NOTES = (
    "The paper's 7B runs and its PPO baseline, which needs a critic, are not repeated here.",
    (
        "DAPO drops groups; refilled (full scale) it samples up to ten batches a step in their "
        "place, as published. NGRPO refilled is given as much."
    ),
    (
        "On its own a virtual answer shifts a baseline: the mean gradient of an all-wrong group is "
        "proportional to the chance of a right answer. What it brings, shared weights bring."
    ),
)


@dataclass(frozen=True)
class Plan:
    """How much a scale runs. taught, steps: of training; groups: of the law; control_rates and
    control_seeds, control_steps: of the bandit without shared parameters."""

    seeds: int
    tuning: int
    rates: tuple[float, ...]
    taught: int
    steps: int
    groups: int
    control_rates: tuple[float, ...]
    control_seeds: int
    control_steps: int
    more: bool = False


FIVE = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
PLANS = {
    "smoke": Plan(2, 2, (1e-3, 8e-3), 40, 6, 2000, (1.0, 4.0), 2, 4),
    "quick": Plan(16, 6, FIVE, 300, 150, 100_000, (0.25, 1.0, 4.0, 16.0), 4, 200),
    "full": Plan(
        32, 8, FIVE, 300, 150, 400_000, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), 4, 200, True,
    ),
}  # fmt: skip
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Check forms and laws, train every arm at its best step size, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=27, scale=scale, seed=rng)
    with one_thread():
        add_forms(report, rng)
        add_law(report, plan, rng)
        add_real_groups(report)
        add_digits(report, plan, rng)
        add_control(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.policy_study import add_policy_study

        add_policy_study(report, 27, rng)
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── closed forms and the clip ───────────────────────────────────────────────────────────────────


def verdicts_in_groups(G: int) -> Tensor:
    """A group for each number k = 0 .. G of right answers, (G + 1, G)."""
    return (torch.arange(G) < torch.arange(G + 1)[:, None]).double()


def closed_form(G: int) -> Tensor:
    """NGRPO's advantages of `verdicts_in_groups` at eps = 0."""
    k = torch.arange(G + 1, dtype=torch.float64)[:, None]
    right = (G * (G - k) / ((k + 1) * (G + 1))).sqrt()
    wrong = -(G * (k + 1) / ((G - k) * (G + 1))).sqrt()
    return torch.where(verdicts_in_groups(G) > 0, right, wrong)


def add_forms(report: Report, rng: int) -> None:
    off = 0.0
    for G in range(2, 17):
        found = group_advantages(verdicts_in_groups(G).flatten(), None, G).reshape(-1, G)
        want = closed_form(G)
        off = max(
            off, float(((found - want)[:-1] / want[:-1]).abs().max()), float(found[-1].abs().max())
        )
    name = "Advantages of verdicts off their closed forms, relative, 2 to 16 answers"
    report.claims.append(Claim.at_most(name, DERIVED, off, 5e-6))
    generator = torch.Generator().manual_seed(rng)
    logp, A = (torch.randn(1000, 100, generator=generator, dtype=torch.float64) for _ in "lA")
    loss = clipped_token_loss(logp / 3, torch.zeros_like(logp), A, 0.16, 0.24)[0]
    ratio = (logp / 3).exp()
    signed = torch.where(A > 0, ratio.clamp(max=1.24), ratio.clamp(min=0.84))
    name = "Clip by sign against the clip of PPO with two bounds: largest difference"
    says = "positive answers are clipped at 1 + .24, negative ones at 1 - .16"
    report.claims.append(Claim.at_most(name, says, float((loss + signed * A).abs().max()), 0.0))
    k, table, estimators = list(range(9)), verdicts_in_groups(8), ("grpo", "ngrpo", "rloo")
    series, columns = [], ["right of 8"]
    cells: list[list[Cell]] = [[i] for i in k]
    for name in estimators:
        found = group_advantages(table.flatten(), None, 8, name).reshape(9, 8)
        for kind, column, rows in (("right", 0, k[1:]), ("wrong", -1, k[:-1])):
            values = found[rows, column].tolist()
            series.append(Series(f"{name}, {kind}", rows, values, baseline=name == "grpo"))
            columns.append(f"{name}, {kind}")
            known = dict(zip(rows, values, strict=True))
            for i in k:
                cells[i].append(known.get(i))
    title = "Advantages in a group of 8 by how many are right"
    report.tables.append(ReportTable(title, columns, cells))
    report.figures.append(
        Figure("line", title, "right answers", "advantage", series, reference=0.0)
    )


# ── the law of an all-wrong group ───────────────────────────────────────────────────────────────


def all_wrong_gradients(p: float, groups: int, rng: int) -> tuple[Float, float]:
    """Σ_i A_i ∇ log π(y_i) of the groups that are all wrong, along E[∇ log π | right]; and the mean
    of that by the law. A softmax over 10 answers, two of them right with chance p in all."""
    pi = np.array([2, 1, 5, 4, 3, 3, 2, 1, 1, 1]) * np.repeat([p / 3, (1 - p) / 20], [2, 8])
    right = np.arange(10) < 2
    score = np.where(right, pi / p, 0.0) - pi
    counts = np.random.default_rng([rng, 27, 0]).multinomial(GROUP, pi, groups)
    y = np.repeat(np.tile(np.arange(10), groups), counts.ravel()).reshape(groups, GROUP)
    A = group_advantages(right[y].astype(np.float64).ravel(), None, GROUP).numpy()
    along = (A.reshape(y.shape) * (score[y] - pi @ score)).sum(axis=1)
    law = GROUP * p / (1 - p) / math.sqrt(GROUP + 1) * float(score @ score)
    return along[~right[y].any(axis=1)], law


def add_law(report: Report, plan: Plan, rng: int) -> None:
    rows: list[list[Cell]] = []
    for p in (0.02, 0.1, 0.3):
        along, law = all_wrong_gradients(p, plan.groups, rng)
        ratio = mean_interval(along / law)
        rows.append([p, len(along) / plan.groups, law, ratio, float(along.std()) / law])
        name = f"Mean gradient of an all-wrong group along that of right answers / the law, p = {p}"
        report.claims.append(Claim.within(name, DERIVED, ratio, 0.95, 1.05))
    columns = ["chance of a right answer p", "share of groups all wrong", "mean by the law",
               "measured / law", "deviation of one group / mean"]  # fmt: skip
    title = "The gradient of all-wrong groups of 8, along that of right answers"
    note = f"{plan.groups} groups; the mean shrinks with p, the noise doesn't"
    report.tables.append(ReportTable(title, columns, rows, note))


# ── groups of real answers ──────────────────────────────────────────────────────────────────────


def add_real_groups(report: Report) -> None:
    """How many groups of answers to MATH problems teach nothing."""
    rewards = torch.tensor([row["correct"] for row in math_groups()], dtype=torch.float64)
    P, G = rewards.shape
    dead: dict[str, float] = {}
    rows: list[list[Cell]] = []
    for estimator, method in GROUP_METHODS.items():
        if estimator == "remax":
            continue  # has no greedy answers here
        A = group_advantages(rewards.flatten(), None, G, estimator).reshape(P, G)
        keep = kept_answers(rewards.flatten(), None, G, method.filter)
        dead[estimator] = float((A == 0).all(dim=1).double().mean())
        rows.append([estimator, dead[estimator], float(keep.double().mean())])
    columns = ["estimator", "groups without any advantage", "answers that are trained on"]
    title = f"{P} MATH problems, {G} answers each, {float(rewards.mean()):.3f} right"
    report.tables.append(ReportTable(title, columns, rows))
    says = "GRPO learns nothing from groups that are all wrong"
    fewer = dead["grpo"] - dead["ngrpo"]
    name = "MATH: share of groups without advantage, GRPO - NGRPO (those all wrong)"
    wrong = float((rewards == 0).all(dim=1).double().mean())
    holds = math.isclose(fewer, wrong, abs_tol=1e-12)
    report.claims.append(Claim.judge(name, says, fewer, f"the {wrong:g} that are all wrong", holds))


# ── digits ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Trained:
    """An arm on the seeds of the report: its best step size, mean pass@8 of the tuning seeds at
    every size, pass@k (S, len(KS)) and entropy (S,)."""

    rate: float
    tuned: list[float]
    passed: Float
    entropy: Float


def train(
    arm: Learner, plan: Plan, tuning: tuple[MLPEnsemble, Task], final: tuple[MLPEnsemble, Task]
) -> Trained:
    tuned = [
        float(measure(reinforce(*tuning, arm, rate, plan.steps, 0), tuning[1], [8])[0].mean())
        for rate in plan.rates
    ]
    rate = plan.rates[int(np.argmax(tuned))]
    return Trained(rate, tuned, *measure(reinforce(*final, arm, rate, plan.steps, 1), final[1], KS))


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    first = 10_000 * rng
    tasks = [digit_task(range(first, first + plan.seeds)),
             digit_task(range(first + 5000, first + 5000 + plan.tuning))]  # fmt: skip
    final, tuning = [(taught(task, plan.taught), task) for task in tasks]
    arms = {**ARMS, **(MORE if plan.more else {})}
    found = {name: train(arm, plan, tuning, final) for name, arm in arms.items()}
    guess = 1 - 0.9 ** np.array(KS)
    rows: list[list[Cell]] = [
        ["an even guess", None, 0.1, float(guess[EIGHT]), float(area(guess)), math.log(10)],
        ["before training", None, *measures(*measure(*final, KS))],
    ]
    for name, t in sorted(found.items(), key=lambda item: -item[1].passed[:, EIGHT].mean()):
        rows.append([name, t.rate, *measures(t.passed, t.entropy)])
    columns = ["method", "best step size", "pass@1", "pass@8", f"area under pass@k, k to {KS[-1]}",
               "entropy"]  # fmt: skip
    title = (
        f"Digits of which five were taught wrong, after {plan.steps} batches of {BATCH} x {GROUP}"
    )
    note = f"{plan.seeds} seeds; step sizes by mean pass@8 of {plan.tuning} others"
    report.tables.append(ReportTable(title, columns, rows, note))
    report.claims.extend(digit_claims(found, plan, final))
    report.claims.append(silence_claim(report, final))
    add_digit_figures(report, found, plan)


def area(passed: Float) -> Float:
    """The area under pass@k over log k, as a mean, (...)."""
    return np.asarray(np.trapezoid(passed, axis=-1) / (len(KS) - 1))


def measures(passed: Float, entropy: Float) -> list[Cell]:
    return [mean_interval(v) for v in (passed[:, 0], passed[:, EIGHT], area(passed), entropy)]


def gain(found: dict[str, Trained], other: str, of: str = NGRPO) -> Estimate:
    return paired_difference(found[of].passed[:, EIGHT], found[other].passed[:, EIGHT])


def digit_claims(
    found: dict[str, Trained], plan: Plan, final: tuple[MLPEnsemble, Task]
) -> list[Claim]:
    claims = [
        Claim.at_least(f"Digits, pass@8: NGRPO - {other}, each at its best step size", SAYS,
                       gain(found, other), 0.0)
        for other in (GRPO, DAPO, RLOO, PSR, NSR, WEIGHTED)
    ]  # fmt: skip
    if plan.more:
        refilled = gain(found, REFILLED[DAPO], REFILLED[NGRPO])
        claims += [
            Claim.at_least("Digits, pass@8: NGRPO - DAPO, both refilled with up to ten batches",
                           SAYS, refilled, 0.0),
            Claim.at_least("Digits, pass@8: NGRPO - REINFORCE++, a mean over the batch as baseline",
                           "not compared in the paper", gain(found, BATCHWISE), 0.0),
        ]  # fmt: skip
    claims.append(
        Claim.at_least("Digits, pass@8: NGRPO with its two bounds - with .2 both ways",
                       "the asymmetric clip keeps training stable and exploring",
                       gain(found, SYMMETRIC), 0.0)
    )  # fmt: skip
    more = paired_difference(found[NGRPO].entropy, found[GRPO].entropy)
    claims.append(
        Claim.at_least("Digits, entropy: NGRPO - GRPO, each at its best step size",
                       "NGRPO goes on exploring", more, 0.0)
    )  # fmt: skip
    shared = [
        measure(reinforce(*final, ARMS[name], SHARED_RATE, plan.steps, 1), final[1], [8])[0][:, 0]
        for name in (NGRPO, GRPO)
    ]
    claims.append(
        Claim.at_least(f"Digits, pass@8: NGRPO - GRPO, both at step size {SHARED_RATE:g}", SAYS,
                       paired_difference(*shared), 0.0)
    )  # fmt: skip
    return claims


def silence_claim(report: Report, final: tuple[MLPEnsemble, Task]) -> Claim:
    """The first update of every arm from groups that are all wrong alone."""
    net, task = final
    x, y = task.train_x[:, :200], task.train_y[:, :200]
    logp = net.layers(x)[-1].log_softmax(dim=-1)
    u = np.random.default_rng(27).random((*y.shape, GROUP))
    answers = invert(logp.detach()[:, :, None].expand(*u.shape, 10).contiguous(), u)
    right = answers == y[..., None]
    wrong = ~right.any(dim=2)
    chance = logp.gather(2, y[..., None])[..., 0].exp()
    parameters = [*net.weights, *net.biases]

    def flat(loss: Tensor) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
        )

    exact = flat(chance[wrong].sum())
    rows: list[list[Cell]] = []
    sizes = {}
    for name, arm in ARMS.items():
        A, keep = arm.credit(right, logp.argmax(dim=-1) == y)
        A, keep = A.flatten(1), (keep & wrong[..., None]).flatten(1)
        new = logp.gather(2, answers).flatten(1)
        g = -flat(arm.loss(new, new.detach(), A, keep))
        sizes[name] = float(g.norm())
        cosine = float(g @ exact / g.norm() / exact.norm()) if sizes[name] else None
        rows.append([name, sizes[name], cosine])
    columns = ["method", "length of the gradient", "cosine with that of the chance to be right"]
    title = "Digits before training: the gradient of all-wrong groups"
    note = f"{float(wrong.double().mean()):.2f} of all groups of {GROUP}"
    report.tables.append(ReportTable(title, columns, rows, note))
    holds = all(sizes[name] == 0 for name in SILENT) and sizes[NGRPO] > 0
    says = "GRPO's advantages vanish where all answers are wrong; NGRPO's don't"
    rule = f"0 for {', '.join(SILENT)}; not for NGRPO"
    return Claim.judge(
        "Digits: gradient of all-wrong groups, NGRPO", says, sizes[NGRPO], rule, holds
    )


def add_digit_figures(report: Report, found: dict[str, Trained], plan: Plan) -> None:
    curves = [
        Series(name, KS, t.passed.mean(axis=0).tolist(), baseline=name == GRPO)
        for name, t in found.items() if name in ARMS
    ]  # fmt: skip
    title = "Digits: pass@k at the best step sizes"
    report.figures.append(Figure("line", title, "k", "pass@k", curves, log_x=True))
    tuned = [
        Series(name, plan.rates, t.tuned, baseline=name == GRPO)
        for name, t in found.items() if name in ARMS
    ]  # fmt: skip
    title = "Digits: pass@8 by step size, tuning seeds"
    caption = "Advantages differ in size, so that at one step size the ranking says little."
    report.figures.append(
        Figure("line", title, "step size", "pass@8", tuned, log_x=True, caption=caption)
    )
    others = [name for name in found if name != NGRPO]
    values = [gain(found, name) for name in others]
    series = Series("seeds", others, [v.value for v in values], [v.low for v in values],
                    [v.high for v in values])  # fmt: skip
    title = "Digits, pass@8: NGRPO less the others"
    report.figures.append(Figure("interval", title, series=[series], reference=0.0))


# ── nothing shared ──────────────────────────────────────────────────────────────────────────────


def control(estimator: str, plan: Plan, rng: int) -> Float:
    """Chance of the right answer in the end, (rates, seeds): each prompt has a table of its own.

    200 prompts of 20 answers, a wrong one of chance .9, the other 19 alike; one gradient step of
    (rate/G) Σ A ∇ log π an update.
    """
    rates, S = torch.tensor(plan.control_rates, dtype=torch.float64), plan.control_seeds
    start = np.log(np.r_[SURE, np.full(ANSWERS - 1, (1 - SURE) / (ANSWERS - 1))])
    logits = torch.from_numpy(start).expand(len(rates), S, PROMPTS, ANSWERS).clone()
    random = np.random.default_rng([rng, 27, 1])
    for _ in range(plan.control_steps):
        u = torch.from_numpy(random.random((S, PROMPTS, GROUP))).expand(len(rates), -1, -1, -1)
        logp = logits.log_softmax(dim=-1)
        y = invert(logp[..., None, :].expand(*u.shape, ANSWERS), u)
        A = group_advantages((y == 1).double().flatten(), None, GROUP, estimator).reshape(y.shape)
        earned = torch.zeros_like(logits).scatter_add(-1, y, A)
        step = earned - logp.exp() * A.sum(dim=-1, keepdim=True)
        logits = logits + rates[:, None, None, None] * step / GROUP
    return logits.softmax(dim=-1)[..., 1].mean(dim=-1).numpy()


def add_control(report: Report, plan: Plan, rng: int) -> None:
    names = (NGRPO, GRPO, RLOO, PSR, NSR, WEIGHTED)
    found = {name: control(ARMS[name].estimator, plan, rng) for name in names}
    best = {name: values[values.mean(axis=1).argmax()] for name, values in found.items()}
    rows: list[list[Cell]] = [
        [name, mean_interval(best[name]), *map(float, values.mean(axis=1))]
        for name, values in found.items()
    ]
    columns = ["method", "at its best step size", *(f"{rate:g}" for rate in plan.control_rates)]
    title = f"No shared parameters: pass@1 after {plan.control_steps} updates, by step size"
    note = f"{PROMPTS} prompts of {ANSWERS} answers, {plan.control_seeds} seeds"
    report.tables.append(ReportTable(title, columns, rows, note))
    gained = paired_difference(best[NGRPO], best[GRPO])
    name = "No shared parameters, pass@1: NGRPO - GRPO, each at its best step size"
    report.claims.append(Claim.at_most(name, f"{DERIVED}: nothing to gain", gained, 0.01))
