"""The minimum of process rewards against their sum: who learns to think without end?

A thinking loop. An answer is at most ten steps: "think" changes nothing and the process reward
model likes it (.8), "step" is real work (.4), "answer" ends it and gets .9 after three real steps,
else -.9; who runs into the limit gets -.5 for the last step. A softmax policy with a row a state is
trained from nothing with 64 answers an update. Accuracy and length are exact, from the policy's
probabilities. Every way of giving credit has its own best step size, found on other seeds; runs of
a seed share their random numbers. Then: which baseline makes steps long? An answer of 24 tokens,
each of which may end a step; every step has the same score, so that nothing is to be learned.

Cheng, Xiong, Qiao, Li, Guo, Wang, Lv and Wang, "Stop summation: min-form credit assignment is all
process reward model needs for reasoning", NeurIPS 2025, arXiv 2504.15275.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.categorical import invert
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.process_advantages import process_advantages

Float = NDArray[np.float64]

THINK, STEP, ANSWER = range(3)
NEEDED, LIMIT, GROUP = 3, 10, 64
LIKED, WORK, RIGHT, WRONG, CUT = 0.8, 0.4, 0.9, -0.9, -0.5
SHARED_LR = 0.3
MARKS = (50, 100, 250)  # updates after which the table looks
TOKENS, ENDING, START = 24, 16, 0.25  # the second experiment: length, answers, chance of an end


@dataclass(frozen=True)
class Arm:
    """A way of giving credit. outcomes: the share of updates whose answers can be verified."""

    credit: str = "softmin"
    baseline: str = "token"
    temperature: float = 0.1
    outcomes: float = 0.0
    process: bool = True
    last_only: bool = False
    clipped: bool = False  # at 0 from above, as the released strict minimum


SUM, SOFT, BOTH, TENTH, VERIFIED = (
    "sum", "softmin", "softmin + outcome", "softmin + a tenth of the outcomes", "outcome alone",
)  # fmt: skip
STRICT, CLIPPED, LAST, MEAN = (
    "strict minimum, verl", "the same, clipped at 0 (released)", "last step alone",
    "uniform weights",
)  # fmt: skip
ARMS = {
    SUM: Arm("sum"),
    SOFT: Arm(),
    "sum + outcome": Arm("sum", outcomes=1.0),
    BOTH: Arm(outcomes=1.0),
    TENTH: Arm(outcomes=0.1),
    VERIFIED: Arm(outcomes=1.0, process=False),
    LAST: Arm("sum", last_only=True),
    MEAN: Arm("mean"),
    "strict minimum": Arm("strict_min"),
    "argmin": Arm("argmin"),
    "softmin, step baseline": Arm(baseline="step"),
    "softmin, verl baseline": Arm(baseline="verl"),
    STRICT: Arm("strict_min", "verl"),
    CLIPPED: Arm("strict_min", "verl", clipped=True),
}
FIGURE = (SUM, SOFT, BOTH, VERIFIED, LAST, MEAN)
PUBLISHED = (  # pass@1 of Qwen2.5-Math-7B: AIME24, MATH500, AMC23, Minerva, Olympiad, mean
    ("base", 13.3, 71.8, 47.5, 29.8, 35.1, 39.5),
    ("outcomes alone", 23.3, 79.4, 60.0, 36.8, 41.8, 48.3),
    ("process rewards alone", 16.7, 81.8, 60.0, 38.2, 44.7, 49.3),
    ("both, outcomes for 10 %", 20.0, 82.6, 82.5, 37.1, 44.1, 53.3),
)
NOTES = (
    "At their best step sizes nearly all arms end above .99: compare the mean over the training.",
    "The paper's 7B policies and its process reward model are quoted, not trained again.",
    (
        "The loop has one flaw, the reward for thinking, and the minimum is blind to it. The later "
        "collapse that the paper reports comes from other flaws of a learned reward model."
    ),
    (
        "Softmin divides one minimum among all steps. The sum of what is to come sees the share of "
        "later steps grow with their number, and not what earlier ones lose: with equal scores "
        "above 0 it drifts to more steps, below 0 to fewer. The strict minimum does neither."
    ),
)


@dataclass(frozen=True)
class Plan:
    """How much a scale runs. longer: updates of the run that waits for a late collapse."""

    seeds: int
    tuning: int
    updates: int
    rates: tuple[float, ...]
    longer: int
    limits: tuple[int, ...]
    temperatures: tuple[float, ...]
    endings: int  # updates of the second experiment


PLANS = {
    "smoke": Plan(2, 2, 12, (SHARED_LR, 3.0), 12, (10,), (0.1,), 8),
    "quick": Plan(
        12, 6, 250, (0.1, SHARED_LR, 1.0, 3.0, 10.0), 500, (6, 10), (0.03, 0.1, 1.0), 100,
    ),
    "full": Plan(
        40, 16, 250, (0.03, 0.1, SHARED_LR, 1.0, 3.0, 10.0, 30.0), 1000, (6, 10, 20),
        (0.01, 0.03, 0.1, 0.3, 1.0, 10.0), 200,
    ),
}  # fmt: skip
PLANS["study"] = PLANS["full"]  # and language models


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train every arm, compare, vary what the paper fixes, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=48, scale=scale, seed=rng, title="Minimum or sum of process rewards")
    with one_thread():
        add_loop(report, plan, rng)
        add_variations(report, plan, rng)
        add_endings(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.filler_study import add_filler_study
        from scoredraw.papers.policy_study import add_policy_study

        add_policy_study(report, 48, rng)
        add_filler_study(report, rng)
    columns = ["training", "AIME24", "MATH500", "AMC23", "Minerva", "Olympiad", "mean"]
    title = "As published: pass@1 of Qwen2.5-Math-7B, not measured here"
    report.tables.append(ReportTable(title, columns, [list(row) for row in PUBLISHED]))
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── the thinking loop ───────────────────────────────────────────────────────────────────────────


class Answers(NamedTuple):
    """Answers of R runs, n each, of at most L steps: (R, n, L); right: (R, n) bool."""

    state: Tensor
    action: Tensor
    score: Tensor
    mask: Tensor
    right: Tensor


def answer(logits: Tensor, uniforms: Tensor) -> Answers:
    """Play policies (R, 4, 3) with uniforms (L, R, n)."""
    law, (L, R, n) = logits.log_softmax(dim=-1), uniforms.shape
    run = torch.arange(R)[:, None]
    done = torch.zeros(R, n, dtype=torch.int64)
    alive, right = torch.ones_like(done).bool(), torch.zeros_like(done).bool()
    rows = []
    for t in range(L):
        action = invert(law[run, done], uniforms[t])
        ready = done >= NEEDED
        score = torch.where(ready, RIGHT, WRONG).double()
        score = torch.where(action == ANSWER, score, torch.where(action == STEP, WORK, LIKED))
        if t == L - 1:
            score = torch.where(action == ANSWER, score, CUT)
        rows.append((done, action, score, alive))
        right = right | (alive & ready & (action == ANSWER))
        alive = alive & (action != ANSWER)
        done = (done + (action == STEP)).clamp(max=NEEDED)
    columns = [torch.stack(column, dim=2) for column in zip(*rows, strict=True)]
    return Answers._make([*columns, right])


def advantages(arm: Arm, found: Answers, verified: Tensor) -> Tensor:
    """(R, n, L), a token a step; verified: (R,) whose outcomes are known at this update."""
    R, n, L = found.mask.shape
    mask, score = found.mask.reshape(-1, L), found.score.reshape(-1, L)
    if arm.last_only:
        last = mask.sum(dim=1, keepdim=True) - 1
        score = torch.zeros_like(score).scatter(1, last, score.gather(1, last))
    if arm.clipped:
        score = score.clamp(max=0.0)
    outcome = torch.where(verified[:, None], found.right.double(), torch.nan).reshape(-1)
    A = process_advantages(
        score, mask & arm.process, torch.arange(L).expand(len(mask), L), mask, n,
        credit=arm.credit, baseline=arm.baseline, temperature=arm.temperature,
        outcome=outcome if arm.outcomes else None,
    )  # fmt: skip
    return A.reshape(R, n, L)


def train(arm: Arm, rates: Tensor, updates: int, seed: Sequence[int], limit: int = LIMIT) -> Tensor:
    """Logits after each update, (updates + 1, R, 4, 3); a run a rate, the same draws in any arm."""
    R = len(rates)
    generator = torch.Generator().manual_seed(stream(seed))
    logits = torch.zeros(R, NEEDED + 1, 3, dtype=torch.float64)
    history = [logits]
    run = torch.arange(R)[:, None, None]
    for _ in range(updates):
        u = torch.rand(limit, R, GROUP, generator=generator, dtype=torch.float64)
        verified = torch.rand(R, generator=generator) < arm.outcomes
        found = answer(logits, u)
        A = advantages(arm, found, verified) * found.mask
        cell = ((run * (NEEDED + 1) + found.state) * 3 + found.action).reshape(-1)
        earned = torch.zeros(logits.numel(), dtype=torch.float64)
        earned = earned.index_add(0, cell, A.reshape(-1)).reshape(logits.shape)
        gradient = earned - logits.softmax(dim=-1) * earned.sum(dim=-1, keepdim=True)
        logits = logits + rates[:, None, None] * gradient / GROUP
        history.append(logits)
    return torch.stack(history)


def stream(seed: Sequence[int]) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def measure(logits: Tensor, limit: int = LIMIT) -> tuple[Float, Float]:
    """The chance of a right answer and the expected length of policies (..., 4, 3), exactly."""
    p = logits.softmax(dim=-1)
    at = torch.zeros(p.shape[:-1], dtype=torch.float64)
    at[..., 0] = 1.0
    right, length = torch.zeros(p.shape[:-2], dtype=torch.float64), 0.0
    for _ in range(limit):
        length = length + at.sum(dim=-1)
        right = right + at[..., NEEDED] * p[..., NEEDED, ANSWER]
        moved = at * p[..., STEP]
        at = at * p[..., THINK]
        at[..., 1:] += moved[..., :-1]
        at[..., NEEDED] += moved[..., NEEDED]
    return right.numpy(), torch.as_tensor(length).numpy()


class Trained(NamedTuple):
    """An arm on the seeds of the report: accuracy and length after each update, (U + 1, seeds)."""

    rate: float
    right: Float
    length: Float
    shared: Float  # accuracy at SHARED_LR
    shared_length: Float


def best_rate(arm: Arm, plan: Plan, rng: int) -> float:
    """The step size of the highest accuracy, meaned over the training, on seeds of its own."""
    rates = torch.tensor(plan.rates, dtype=torch.float64).repeat_interleave(plan.tuning)
    right, _ = measure(train(arm, rates, plan.updates, [rng, 48, 0]))
    return plan.rates[int(right.mean(axis=0).reshape(len(plan.rates), -1).mean(axis=1).argmax())]


def trained(arm: Arm, plan: Plan, rng: int) -> Trained:
    rate, n = best_rate(arm, plan, rng), plan.seeds
    rates = torch.tensor([rate, SHARED_LR], dtype=torch.float64).repeat_interleave(n)
    right, length = measure(train(arm, rates, plan.updates, [rng, 48, 1]))
    return Trained(rate, right[:, :n], length[:, :n], right[:, n:], length[:, n:])


def add_loop(report: Report, plan: Plan, rng: int) -> None:
    found = {name: trained(arm, plan, rng) for name, arm in ARMS.items()}
    marks = [min(mark, plan.updates) for mark in MARKS]
    untrained, length = measure(torch.zeros(NEEDED + 1, 3, dtype=torch.float64))
    rows: list[list[Cell]] = [
        ["untrained, every action alike", None, *[float(untrained)] * 5, float(length)]
    ]
    for name, t in sorted(found.items(), key=lambda item: -item[1].right.mean()):
        at_shared = [mean_interval(t.shared[mark]) for mark in marks]
        rows.append([name, t.rate, mean_interval(t.right.mean(axis=0)), mean_interval(t.right[-1]),
                     *at_shared, mean_interval(t.shared_length[-1])])  # fmt: skip
    columns = ["credit", "best step size", "mean accuracy", f"at {marks[2]}",
               *[f"size {SHARED_LR}: at {mark}" for mark in marks], "length"]  # fmt: skip
    title = "The thinking loop: accuracy after so many updates"
    note = (
        f"{plan.seeds} seeds. Mean accuracy: over all updates, at the step size best for it. "
        f"Length: after the last update of size {SHARED_LR}."
    )
    report.tables.append(ReportTable(title, columns, rows, note))
    report.claims.extend(loop_claims(found, plan, rng, marks[0]))
    updates = list(range(plan.updates + 1))
    series = [
        Series(name, updates, found[name].shared.mean(axis=1).tolist(), baseline=name == SUM)
        for name in FIGURE
    ]
    title = f"Who learns to answer (step size {SHARED_LR})"
    report.figures.append(Figure("line", title, "updates", "accuracy", series))


def loop_claims(found: dict[str, Trained], plan: Plan, rng: int, early: int) -> list[Claim]:
    def gain(a: str, b: str) -> Estimate:
        return paired_difference(found[a].right.mean(axis=0), found[b].right.mean(axis=0))

    best = "mean accuracy, each at its best step size"
    sums = "the sum collapses from the first steps of training"
    parity = "7B, mean of five benchmarks: process rewards alone 49.3, outcomes alone 48.3"
    tenth = "7B, mean of five benchmarks: 53.3 with outcomes for a tenth"
    return [
        Claim.at_most(f"Sum: accuracy after {early} updates of size {SHARED_LR}", sums,
                      mean_interval(found[SUM].shared[early]), 0.05),
        Claim.at_most(f"Sum: accuracy at the end, size {SHARED_LR}", sums,
                      mean_interval(found[SUM].shared[-1]), 0.05),
        Claim.at_least(f"Softmin: accuracy at the end, size {SHARED_LR}",
                       "the minimum trains stably", mean_interval(found[SOFT].shared[-1]), 0.9),
        Claim.at_least(f"Softmin - sum, {best}", "min-form is what process rewards need",
                       gain(SOFT, SUM), 0.0),
        Claim.at_least(f"Softmin - outcome alone, {best}", parity, gain(SOFT, VERIFIED), 0.0),
        Claim.at_least(f"Softmin + a tenth of the outcomes - softmin, {best}",
                       f"{tenth}, 49.3 without", gain(TENTH, SOFT), 0.0),
        Claim.at_least(f"Softmin + a tenth of the outcomes - outcome alone, {best}",
                       f"{tenth}, 48.3 for outcomes alone", gain(TENTH, VERIFIED), 0.0),
        Claim.at_least(f"Softmin - last step alone, {best}", "not compared in the paper",
                       gain(SOFT, LAST), 0.0),
        Claim.at_least(f"Strict minimum - the released one, {best}",
                       "the released minimum is clipped at 0", gain(STRICT, CLIPPED), 0.0),
        Claim.at_most("Softmin: share of the updates to where outcomes alone end",
                      "the minimum reaches their level in 30 % of the steps",
                      mean_interval(catch_up(found[SOFT].right, found[VERIFIED].right)), 0.3),
        late_collapse(found[SOFT].rate, plan, rng),
    ]  # fmt: skip


def catch_up(right: Float, other: Float) -> Float:
    """(seeds,) the share of updates after which `right` is where `other` ends; 1 if it never is."""
    there = right >= other[-1]
    first = np.where(there.any(axis=0), there.argmax(axis=0), len(right) - 1)
    return first / (len(right) - 1)


def late_collapse(rate: float, plan: Plan, rng: int) -> Claim:
    rates = torch.full((plan.seeds,), rate, dtype=torch.float64)
    right, _ = measure(train(ARMS[SOFT], rates, plan.longer, [rng, 48, 2]))
    fall = right.max(axis=0) - right[-1]
    says = "process rewards alone are hacked after 100 to 200 steps, even with the minimum"
    name = f"Softmin: fall from the best accuracy within {plan.longer} updates"
    return Claim.at_least(name, says, mean_interval(fall), 0.05)


def add_variations(report: Report, plan: Plan, rng: int) -> None:
    """Temperatures of the softmin, and limits of the length, at the shared step size."""
    rates = torch.full((plan.seeds,), SHARED_LR, dtype=torch.float64)

    def row(name: str, arm: Arm, limit: int) -> list[Cell]:
        history = train(arm, rates, plan.updates, [rng, 48, 3], limit)
        right, length = measure(history[-1], limit)
        return [name, limit, mean_interval(right), mean_interval(length)]

    rows = [row(f"softmin, T = {T:g}", Arm(temperature=T), LIMIT) for T in plan.temperatures] + [
        row(name, ARMS[name], limit) for limit in plan.limits for name in (SUM, SOFT, LAST)
    ]
    columns = ["credit", "longest answer", "accuracy", "length"]
    title = f"Other temperatures and limits, after {plan.updates} updates of size {SHARED_LR}"
    report.tables.append(ReportTable(title, columns, rows))


# ── few and long steps ──────────────────────────────────────────────────────────────────────────


def steps_written(credit: str, baseline: str, score: float, plan: Plan, rng: int) -> Float:
    """(seeds,) the expected steps an answer once trained: 1 + 23 chances of an end."""
    R = plan.seeds
    generator = torch.Generator().manual_seed(stream([rng, 48, 4]))
    mask = torch.ones(R * ENDING, TOKENS, dtype=torch.bool)
    place = torch.arange(TOKENS).expand(mask.shape)
    scores = torch.full(mask.shape, score, dtype=torch.float64)
    logit = torch.full((R,), float(np.log(START / (1 - START))), dtype=torch.float64)
    for _ in range(plan.endings):
        p = logit.sigmoid()[:, None, None]
        u = torch.rand(R, ENDING, TOKENS, generator=generator, dtype=torch.float64)
        ends = u < p
        ends[..., -1] = True  # the answer ends here, whatever is drawn
        real = ends.reshape(-1, TOKENS)  # a step that may end at each token, most of them masked
        A = process_advantages(scores, real, place, mask, ENDING, credit=credit, baseline=baseline)
        push = (ends.double() - p) * A.reshape(R, ENDING, TOKENS)
        logit = logit + 0.1 * push[..., :-1].sum(dim=-1).mean(dim=1)
    return np.asarray(1 + (TOKENS - 1) * logit.sigmoid().numpy())


def add_endings(report: Report, plan: Plan, rng: int) -> None:
    credits_, baselines = ("softmin", "strict_min", "mean", "sum"), ("token", "step", "verl")
    untrained = 1 + (TOKENS - 1) * START
    rows: list[list[Cell]] = [["untrained", "", untrained, untrained]]
    found = {}
    for credit in credits_:
        for baseline in baselines:
            both = [steps_written(credit, baseline, r, plan, rng) for r in (0.5, -0.5)]
            found[credit, baseline] = both[0]
            rows.append([credit, baseline, *map(mean_interval, both)])
    columns = ["credit", "baseline", "steps, all scores .5", "steps, all scores -.5"]
    title = f"Steps an answer of {TOKENS} tokens is cut into, after {plan.endings} updates"
    note = "The score of every step is the same: any change comes from the way of giving credit."
    report.tables.append(ReportTable(title, columns, rows, note))
    fewer = paired_difference(found["softmin", "step"], found["softmin", "token"])
    drift = mean_interval(found["softmin", "token"] / untrained)
    neutral = mean_interval(found["strict_min", "token"] / untrained)
    says = "the step baseline favours few and very long steps"
    neither = "released runs use the token baseline, to favour no length of steps"
    report.claims.extend([
        Claim.at_most("Steps an answer, step baseline - token baseline (softmin, scores .5)", says,
                      fewer, 0.0),
        Claim.within("Steps an answer, token baseline over untrained (softmin, scores .5)",
                     neither, drift, 0.8, 1.25),
        Claim.within("Steps an answer, token baseline over untrained (strict minimum)",
                     neither, neutral, 0.8, 1.25),
    ])  # fmt: skip
    series = [
        Series(baseline, list(credits_), [float(found[c, baseline].mean()) for c in credits_])
        for baseline in baselines
    ]
    title = "Steps an answer, every step scored .5"
    report.figures.append(Figure("bar", title, "credit", "steps", series, reference=untrained))
