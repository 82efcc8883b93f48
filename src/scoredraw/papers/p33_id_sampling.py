"""Iterative deepening: what interruptions cost, whom they help, and what the same tokens would buy.

*Accounts*: a response that never ends, by every growth factor and by fixed intervals. *Law*:
simulated responses that a trigger sets right or spoils. *Solver*: a trained net that adds digits,
errs, and starts again after `<wait>`; it is built so that the trigger helps, and what is measured
is the driver, the schedules and the law, beside a placebo and beside a majority vote over as many
plain samples as the same tokens pay for. *Language model*: a small real one on GSM8K, which was
not trained to correct itself.

Chen, Koenig and Dilkina, "Iterative deepening sampling for large language models", 2025, arXiv
2502.05449.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import MissingExtraError
from scoredraw.language.deepening_generation import (
    Request,
    deepening_tokens,
    deepening_traces,
    trigger_tokens,
)
from scoredraw.language.iterative_deepening import (
    TRIGGER,
    DeepeningPlan,
    SelfCorrection,
    Trace,
    last_answer,
    trigger_count,
)
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.models import TransformersModel
from scoredraw.papers import digit_sum_solver
from scoredraw.papers.digit_sum_solver import (
    DEEP,
    DEEP_VOTERS,
    MOST,
    PLACEBO,
    PLAIN,
    VOTERS,
    Outcome,
    arms,
    follows,
)
from scoredraw.papers.gsm8k_answers import TEMPERATURE, plain_number
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import read_samples
from scoredraw.small_models import small_model
from scoredraw.token_sampling import token_logprobs
from scoredraw.uniforms import RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]

ACCOUNT = {"b0": 256, "total": 4096, "trigger": 17, "prompt": 100}
LAWS = (SelfCorrection(0.3, 0.4, 0.1), SelfCorrection(0.9, 0.2, 0.1), SelfCorrection(0.3, 0.9, 0.5))
SCORED = 4  # responses whose log-probabilities are computed again
NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)")
HEADLINE = "a higher success rate than plain sampling on MATH-500 and AIME, by vote and best of N"
NOTES = (
    "The paper's models (7B and 8B reasoners), MATH-500, AIME and GPQA are beyond this machine.",
    "That gains grow with the strength of the model is not tested.",
    (
        "In every lesson a trigger is followed by a clean recomputation. A solver gains by that if "
        "it recomputes better than it answers at first: one of 4 digits does, one of 12, after "
        "3,000 steps, does not. It is no language model."
    ),
)


class LanguagePlan(NamedTuple):
    """Questions, budget and first budget for the real model."""

    questions: int
    total: int
    b0: int = 32


@dataclass(frozen=True)
class Plan:
    """How much a scale runs: solvers and their training, prompts, simulated responses."""

    seeds: int
    digits: int
    steps: int
    batch: int
    prompts: int
    b0: int
    total: int
    simulated: int = 4000
    language: LanguagePlan | None = None
    keep: bool = False  # trained solvers, in the cache, so that a run goes on where it was


PLANS = {
    "smoke": Plan(2, 3, 15, 32, 60, 3, 24, simulated=200),
    "quick": Plan(3, 3, 650, 64, 300, 3, 24),
    "full": Plan(3, 4, 2400, 64, 2000, 4, 32, language=LanguagePlan(12, 128)),
    "study": Plan(
        8, 12, 3000, 256, 2000, b0=8, total=64, language=LanguagePlan(40, 256), keep=True
    ),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(
        paper=33, scale=scale, seed=rng, notes=list(NOTES), title="Iterative deepening sampling"
    )
    add_accounts(report)
    add_laws(report, plan, rng)
    outcomes = [solve(plan, 1000 * rng + seed) for seed in range(plan.seeds)]
    add_solver(report, plan, outcomes)
    if plan.language is not None:
        add_language(report, plan.language, rng)
    return report


# ── accounts, and the law ───────────────────────────────────────────────────────────────────────


def endless(requests: list[Request]) -> list[list[int]]:
    return [[1] * request.room for request in requests]


def add_accounts(report: Report) -> None:
    """What a response that never ends takes, as driven, beside the closed forms."""
    b0, total = ACCOUNT["b0"], ACCOUNT["total"]
    rows: list[list[Cell]] = []
    right, within = [], []
    for schedule in ("total", "segment"):
        for gamma in (1.25, 1.5, 2.0, 4.0) + (1.0,) * (schedule == "segment"):
            plan = DeepeningPlan.geometric(b0, gamma, total, [9] * ACCOUNT["trigger"], schedule)
            (trace,) = deepening_traces(endless, [[5] * ACCOUNT["prompt"]], plan)
            account, m = trace.account(ACCOUNT["prompt"]), trigger_count(b0, gamma, total, schedule)
            own = int(trace.cut_positions.sum())
            bound = total * gamma / (gamma - 1) if gamma > 1 else None
            right.append((account.generated, account.inserted) == (total, m * ACCOUNT["trigger"]))
            within.append(bound is None or own < bound)
            name = f"{schedule}, γ = {gamma:g}" if gamma > 1 else f"every {b0}"
            processed = account.read + account.generated
            rows.append([name, m, *account, processed, account.reread + total, own, bound])
    report.claims.extend([
        Claim.judge(
            "triggers and generated tokens of an endless response are those of the closed form",
            "budgets in geometric progression",
            f"{sum(right)} of {len(right)} schedules", "all of them", all(right),
        ),
        Claim.judge(
            "without a cache, what it reads again of itself stays below B γ / (γ-1)",
            "guarantees on token use (abstract)",
            f"{sum(within)} of {len(within)} schedules", "all of them", all(within),
        ),
    ])  # fmt: skip
    columns = [
        "schedule", "triggers", "generated", "inserted", "read with a cache",
        "read without", "in all, with", "in all, without", "of it itself", "B γ / (γ-1)",
    ]  # fmt: skip
    title = "Tokens of a response that never ends: b0 = {b0}, B = {total}".format(**ACCOUNT)
    note = "A trigger of {trigger} tokens, a prompt of {prompt}.".format(**ACCOUNT)
    report.tables.append(ReportTable(title, columns, rows, note=note))


def simulate(law: SelfCorrection, size: int, rng: int) -> Float:
    """Responses through the driver, right or wrong after 0 .. 4 triggers, (size, 5)."""
    uniforms = RowUniforms(rng)

    def generate(requests: list[Request]) -> list[list[int]]:
        """Two tokens, 1 while right and 2 while wrong."""
        rows = [request.row for request in requests]
        u = uniforms.at(rows, stream="state", round=requests[0].sampled)
        right = u < law.p0
        if requests[0].sampled:
            before = np.array([request.ids[-2] == 1 for request in requests])
            right = np.where(before, u >= law.v, u < law.u)
        return [[1 if state else 2] * 2 for state in right]

    plan = DeepeningPlan.every(2, 2 * (MOST + 1), [9])
    traces = deepening_traces(generate, [[5]] * size, plan)
    return np.stack([trace.ids[trace.generated_mask][::2] for trace in traces]) == 1.0


def add_laws(report: Report, plan: Plan, rng: int) -> None:
    m = np.arange(MOST + 1)
    rows: list[list[Cell]] = []
    worst = 0.0
    series = []
    for law in LAWS:
        states, said = simulate(law, plan.simulated, rng), law.after(m)
        off = (states.mean(0) - said) / np.sqrt(said * (1 - said) / plan.simulated)
        worst = max(worst, float(np.abs(off).max()))
        name = f"P0 = {law.p0:g}, u = {law.u:g}, v = {law.v:g}"
        rows.append([name, law.stationary, str(law.best_count), *said.tolist()])
        rows.append([f"{name}, simulated", None, None, *states.mean(0).tolist()])
        series.append(Series(name, m.tolist(), said.tolist()))
    report.claims.append(
        Claim.judge(
            "simulated responses follow s + (P0 - s)(1 - u - v)^m",
            "-", f"off by at most {worst:.2f} standard errors", "at most 4 (15 means)", worst <= 4,
        )
    )  # fmt: skip
    columns = ["a trigger", "s", "best m", *(f"m = {count}" for count in m)]
    title = "Share that is right after m triggers: where they help, hurt, or overshoot"
    report.tables.append(ReportTable(title, columns, rows))
    report.figures.append(
        Figure("line", title, "triggers m", "share right", series,
               caption="Right at first more often than s: every trigger hurts.")
    )  # fmt: skip


# ── the solver ──────────────────────────────────────────────────────────────────────────────────


def solve(plan: Plan, seed: int) -> Outcome:
    train = digit_sum_solver.trained if plan.keep else digit_sum_solver.train
    solver = train(plan.digits, plan.steps, plan.batch, seed)
    plans = arms(plan.b0, plan.total)
    return digit_sum_solver.examine(solver, plans, plan.prompts, plan.digits, seed)


def add_solver(report: Report, plan: Plan, outcomes: list[Outcome]) -> None:
    report.notes.append(
        "The Markov formula takes all triggers to be alike, but the lessons hold one at most: what "
        "a second does the solver was never shown, and from there on accuracy falls off."
    )
    report.claims.extend(solver_claims(plan, outcomes))
    report.tables.extend([arm_table(plan, outcomes), vote_table(outcomes)])
    report.tables.append(law_table(plan, outcomes))
    report.figures.extend([arm_figure(outcomes), law_figure(outcomes)])
    report.notes.append(
        f"Solvers: {plan.digits} digits, {plan.steps:,} steps of {plan.batch} lessons, "
        f"{plan.seeds} seeds. Twelve digits, 3,000 steps of 256 lessons, take seven minutes a seed "
        "on one core: at study scale alone."
    )


def over(outcomes: list[Outcome], arm: str) -> Float:
    return np.array([outcome.accuracy[arm] for outcome in outcomes])


def off_the_law(plan: Plan, outcome: Outcome) -> Float:
    """How many standard errors the shares after m triggers are off the formula, (MOST + 1,)."""
    m = np.arange(MOST + 1)
    own = np.sqrt(outcome.after * (1 - outcome.after) / plan.prompts)
    error = np.hypot(own, outcome.law.standard_error(m))
    return (outcome.after - outcome.law.after(m)) / error


def solver_claims(plan: Plan, outcomes: list[Outcome]) -> list[Claim]:
    plain, deep, placebo = (over(outcomes, arm) for arm in (PLAIN, DEEP, PLACEBO))
    fixed = [over(outcomes, arm) for arm in outcomes[0].accuracy if arm.startswith("every")]
    worst = max(float(np.abs(off_the_law(plan, outcome)).max()) for outcome in outcomes)
    votes = [outcome.vote[outcome.affordable() - 1] for outcome in outcomes]
    many = [outcome.affordable(DEEP_VOTERS) - 1 for outcome in outcomes]
    gains = {
        name: paired_difference(
            [getattr(o, f"deep_{name}")[-1] for o in outcomes],
            [getattr(o, name)[k] for o, k in zip(outcomes, many, strict=True)],
        )
        for name in ("vote", "best")
    }
    says = f"{HEADLINE}; here at the same generated tokens"
    return [
        Claim.judge(
            f"solver: accuracy after 0 to {MOST} triggers is the Markov formula's", "-",
            f"off by at most {worst:.2f} standard errors, {plan.seeds * (MOST + 1)} means",
            "at most 3 standard errors", worst <= 3,
        ),
        Claim.at_least(
            "solver: deepening (γ = 2) against plain sampling of the same B", HEADLINE,
            paired_difference(deep, plain), 0.05, "accuracy difference at least 5 points",
        ),
        Claim.at_least(
            "solver: deepening (γ = 2) against the best fixed interval",
            "geometric budgets are the efficient ones", paired_difference(deep, np.max(fixed, 0)),
            -0.02, "accuracy difference at least -2 points",
        ),
        Claim.at_most(
            "solver: gain by a placebo, less half the gain by the trigger", "-",
            paired_difference(placebo - plain, (deep - plain) / 2), 0.0, "below 0",
        ),
        Claim.at_least(
            "solver: one interrupted response against the vote its tokens pay for", says,
            paired_difference(deep, votes), 0.0, "accuracy difference at least 0",
        ),
        Claim.at_least(
            f"solver: vote over {DEEP_VOTERS} interrupted responses against plain ones", says,
            gains["vote"], 0.0, "accuracy difference at least 0",
        ),
        Claim.at_least(
            f"solver: likeliest of {DEEP_VOTERS} interrupted responses against plain ones", says,
            gains["best"], 0.0, "accuracy difference at least 0",
        ),
        Claim.judge(
            "solver: every response was interrupted where its plan says, and within B", "-",
            f"{sum(outcome.kept for outcome in outcomes)} of {plan.seeds} seeds", "all of them",
            all(outcome.kept for outcome in outcomes),
        ),
    ]  # fmt: skip


def arm_table(plan: Plan, outcomes: list[Outcome]) -> ReportTable:
    rows: list[list[Cell]] = []
    for arm, how in arms(plan.b0, plan.total).items():
        gain = paired_difference(over(outcomes, arm), over(outcomes, PLAIN))
        tokens = [outcome.generated[arm] for outcome in outcomes]
        read = np.mean([outcome.read[arm] for outcome in outcomes], 0)
        cuts = ", ".join(map(str, how.cuts)) or "-"
        accuracy = mean_interval(over(outcomes, arm))
        rows.append([arm, cuts, accuracy, gain, float(np.mean(tokens)), *read.tolist()])
    columns = ["plan", "cuts", "accuracy", "gain", "generated", "read, cache", "read, none"]
    title = f"Solver of {plan.digits} digits: b0 = {plan.b0}, B = {plan.total}"
    note = f"{plan.prompts:,} prompts, {plan.seeds} seeds. Tokens a response; read: input."
    return ReportTable(title, columns, rows, note=note)


def vote_table(outcomes: list[Outcome]) -> ReportTable:
    """What the tokens of interrupted responses would buy in plain samples."""
    rows: list[list[Cell]] = []

    def add(name: str, ours: Sequence[float], ks: Sequence[int], curve: str) -> None:
        theirs = [getattr(o, curve)[k - 1] for o, k in zip(outcomes, ks, strict=True)]
        rows.append([name, mean_interval(ours), float(np.mean(ks)), mean_interval(theirs)])

    arms = [arm for arm in outcomes[0].accuracy if arm not in (PLAIN, PLACEBO)]
    for arm in arms:
        add(arm, over(outcomes, arm).tolist(), [o.affordable(1, arm) for o in outcomes], "vote")
    for n in range(2, DEEP_VOTERS + 1):
        ks = [o.affordable(n) for o in outcomes]
        add(f"vote over {n}, {DEEP}", [o.deep_vote[n - 1] for o in outcomes], ks, "vote")
        add(f"likeliest of {n}, {DEEP}", [o.deep_best[n - 1] for o in outcomes], ks, "best")
    columns = ["interrupted", "accuracy", "plain samples for it", "accuracy of their choice"]
    note = "The same generated tokens, rounded down (to 1 %); the choice is by the same rule."
    return ReportTable("The same tokens in plain samples", columns, rows, note=note)


def law_table(plan: Plan, outcomes: list[Outcome]) -> ReportTable:
    rows: list[list[Cell]] = []
    for seed, outcome in enumerate(outcomes):
        law = outcome.law
        said, off = law.after(np.arange(MOST + 1)), off_the_law(plan, outcome)
        best = str(law.best_count)
        for m in range(MOST + 1):
            what: list[Cell] = [law.p0, law.u, law.v, best] if m == 0 else [None] * 4
            cells = [float(x[m]) for x in (said, outcome.after, off)]
            rows.append([seed, *what, m, *cells])
    columns = ["seed", "P0", "u", "v", "best m", "m", "formula", "measured", "off by (s.e.)"]
    title = "Solver: accuracy after m triggers, each after an answer"
    note = "P0, u and v from other prompts with no and one trigger."
    return ReportTable(title, columns, rows, note=note)


def arm_figure(outcomes: list[Outcome]) -> Figure:
    def tokens(arm: str) -> float:
        return float(np.mean([outcome.generated[arm] for outcome in outcomes]))

    arms = list(outcomes[0].accuracy)
    points = [float(over(outcomes, arm).mean()) for arm in arms]
    voted = np.mean([outcome.vote for outcome in outcomes], 0)
    paid = [tokens(PLAIN) * k for k in range(1, VOTERS + 1)]
    series = [
        Series("vote over plain samples", paid, voted.tolist(), baseline=True),
        *(Series(a, [tokens(a)], [p], labels=[a]) for a, p in zip(arms, points, strict=True)),
    ]
    title = "Solver: accuracy by generated tokens"
    return Figure("scatter", title, "generated tokens a problem", "accuracy", series)


def law_figure(outcomes: list[Outcome]) -> Figure:
    m = np.arange(MOST + 1)
    series = []
    for seed, outcome in enumerate(outcomes):
        said = outcome.law.after(m)
        half = 3 * outcome.law.standard_error(m)
        band = ((said - half).tolist(), (said + half).tolist())
        series.append(Series(f"formula, seed {seed}", m.tolist(), said.tolist(), *band))
        series.append(Series(f"measured, seed {seed}", m.tolist(), outcome.after.tolist()))
    caption = "Bands: three standard errors of the formula, from the errors of P0, u and v."
    title = "Solver: accuracy after m triggers"
    return Figure("line", title, "triggers m", "accuracy", series, caption=caption)


# ── a real model ────────────────────────────────────────────────────────────────────────────────


def word_problems(count: int) -> list[tuple[str, str]]:
    """The first problems of GSM8K that a published system solved, each with its answer."""
    samples = read_samples("gsm8k-solutions")
    answers, correct = samples.answers, samples.correct
    assert answers is not None
    assert correct is not None
    found = []
    for number, problem in enumerate(samples.problems[: 2 * count]):
        rows = samples.rows(number)
        right = answers[rows][correct[rows]]
        if len(right):
            found.append((problem, plain_number(str(right[0]))))
    return found[:count]


def number_of(text: str) -> str | None:
    """The last number of a response."""
    found = last_answer(text, NUMBER)
    return None if found is None else plain_number(found)


def add_language(report: Report, plan: LanguagePlan, rng: int) -> None:
    """A small model with and without triggers: does the driver do what it says, does it help?"""
    try:
        model, tokenizer = small_model()
    except MissingExtraError as missing:
        report.notes.append(f"The language model is left out: {missing}.")
        return
    problems = word_problems(plan.questions)
    whole, ask = TransformersModel(model, tokenizer), " Think step by step. End with the number."
    prompts = [whole.prompt_tokens([{"role": "user", "content": q + ask}]) for q, _ in problems]
    trigger = trigger_tokens(tokenizer, TRIGGER)
    plans = {
        PLAIN: DeepeningPlan.plain(plan.total),
        DEEP: DeepeningPlan.geometric(plan.b0, 2, plan.total, trigger),
    }
    made = {
        name: [traces[0] for traces in deepening_tokens(
            model, prompts, how, temperature=TEMPERATURE, end=whole.end_tokens, rng=rng
        )]
        for name, how in plans.items()
    }  # fmt: skip
    right, rows = {}, []
    for name, traces in made.items():
        spoken = [tokenizer.decode(t.ids[t.generated_mask]) for t in traces]
        found = [number_of(text) for text in spoken]
        right[name] = np.array([a == truth for a, (_, truth) in zip(found, problems, strict=True)])
        accounts = [t.account(len(p)) for t, p in zip(traces, prompts, strict=True)]
        tokens = np.mean(accounts, 0).tolist()
        triggers = float(np.mean([len(t.trigger_spans) for t in traces]))
        ended = float(np.mean([t.finished for t in traces]))
        rows.append([name, mean_interval(right[name]), ended, triggers, *tokens])
    report.claims.extend(language_claims(model, prompts, plans[DEEP], made[DEEP], right))
    columns = [
        "plan", "accuracy", "ended", "triggers", "generated", "inserted", "read, cache",
        "read, none",
    ]  # fmt: skip
    title = f"SmolLM2-135M on {len(problems)} GSM8K problems: b0 = {plan.b0}, B = {plan.total}"
    note = f"Temperature {TEMPERATURE:g}; the answer is the last number. Means a response."
    report.tables.append(ReportTable(title, columns, rows, note=note))


def language_claims(
    model: Any, prompts: list[list[int]], plan: DeepeningPlan, traces: list[Trace],
    right: dict[str, NDArray[np.bool_]],
) -> list[Claim]:  # fmt: skip
    off = 0.0
    for prompt, trace in zip(prompts[:SCORED], traces, strict=False):
        assert trace.logprobs is not None
        whole = token_logprobs(model, prompt, trace.ids.tolist())[trace.generated_mask]
        off = max(off, float(np.abs(trace.logprobs - whole).max()))
    cut, gain = follows(plan, traces), paired_difference(right[DEEP], right[PLAIN])
    return [
        Claim.judge(
            "SmolLM2: interrupted where the plan says, within B", "-",
            f"{len(traces)} responses: {'yes' if cut else 'no'}", "all of them", cut,
        ),
        Claim.at_most(
            "SmolLM2: log-probabilities against one pass over all ids, triggers masked", "-",
            off, 1e-3, "at most 0.001 nats a token",
        ),
        Claim.judge(
            "SmolLM2: accuracy with triggers less that without", HEADLINE, gain,
            "interval above 0", True if gain.above(0) else False if gain.below(0) else None,
        ),
    ]  # fmt: skip
