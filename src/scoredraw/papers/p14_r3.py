"""R³: what relevance, length and repetition each buy as a reward, and what still gets past them.

*Comparisons*: how often a reward puts a question's own answer before others' answers, before a copy
of the question, before itself said five times over and, where the answer is exact, before itself
with others' answers attached. The retriever is TF-IDF, and in `full` MiniLM, mean-pooled. On 246
grade school problems with right solutions that are in the package, and, where $SCOREDRAW_ALPACAFARM
names a `val800.json` (a list of objects with input, output, qtype), on 800 instructions.
*Selection*: the best of n of a small model's 32 samples for each of 100 problems, a copy of the
question among them, by each reward; n is how hard the reward is optimised.

Kim and Seo, "Rethinking the role of proxy rewards in language model alignment", 2024, arXiv
2402.03469.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.answers import expected_maximum
from scoredraw.errors import MissingExtraError
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, paired_difference
from scoredraw.papers.answered_questions import (
    VARIABLE,
    Items,
    by_words,
    instructions,
    school_problems,
    stored,
)
from scoredraw.papers.sentence_embeddings import model_folder
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.relevance_reward import (
    ABLATIONS,
    CONSTRAINED,
    OPEN,
    MeanPooledEncoder,
    R3Reward,
    proxy_gold_monotonicity,
)
from scoredraw.samples import read_samples

Float = NDArray[np.float64]

WORDS, DENSE = "TF-IDF", "sentence encoder"
NAMES = {  # rewards without branches
    "relevance": "relevance", "LI": "length", "LI_RP": "length · repetition",
    "R_OE": "relevance · length · repetition",
}  # fmt: skip
FULL, ALONE, PLAIN = NAMES["R_OE"], NAMES["relevance"], "relevance · length"
REPEATS, OTHERS = 5, 3
SAYS_RELEVANT = "preference models prefer long off-topic answers; the retriever doesn't"
SIZES = (1, 2, 4, 8, 16, 33)


@dataclass(frozen=True)
class Plan:
    draws: int  # of others' answers for each item
    resamples: int
    items: int = 10_000
    problems: int = 100
    dense: int = 0  # items that a sentence encoder reads too: about a second for three


PLANS = {
    "smoke": Plan(1, 200, 60, 10),
    "quick": Plan(3, 2000),
    "full": Plan(30, 10_000, dense=200),
}
PLANS["study"] = PLANS["full"]  # and a language model
DENSE_DRAWS = 2


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(paper=14, scale=scale, seed=rng, title="R³: relevance as a reward")
    sets = [school_problems()]
    path = os.environ.get(VARIABLE)
    if path:
        sets.append(instructions(Path(path)))
    else:
        report.notes.append(f"Left out, AlpacaFarm's instructions: {VARIABLE} names no file.")
    for items in sets:
        some = items.head(plan.items)
        embed = by_words([*some.questions, *some.answers])
        add_comparisons(report, some, WORDS, embed, plan, rng)
    if plan.dense:
        add_dense(report, sets, plan, rng)
    add_selection(report, plan)
    if scale == "study":
        from scoredraw.papers.relevance_study import add_relevance_study

        add_relevance_study(report, rng)
    report.notes.append(
        "The paper's own figures (7B models trained by PPO, judged by GPT-4: 85.1 % of answers "
        "relevant, 83.1 % by the best preference model) are quoted, not measured, and Contriever "
        "is not here. The cosine of TF-IDF is largest between a text and itself: by it alone a "
        "copy of the question wins by definition, which is no claim."
    )
    return report


# ── data and the retriever ──────────────────────────────────────────────────────────────────────


def remembered(embed: Any) -> Any:
    """The same, with each text embedded once."""
    known: dict[str, Float] = {}

    def lookup(texts: list[str]) -> Float:
        new = [text for text in texts if text not in known]
        if new:
            known.update(zip(new, embed(new), strict=True))
        return np.stack([known[text] for text in texts])

    return lookup


def add_dense(report: Report, sets: Sequence[Items], plan: Plan, rng: int) -> None:
    """The same comparisons by a sentence encoder, mean-pooled and not normalised."""
    try:
        embed = MeanPooledEncoder.from_pretrained(str(model_folder()))
    except MissingExtraError as absent:
        report.notes.append(f"Left out, a sentence encoder: {absent}")
        return
    fewer = replace(plan, draws=DENSE_DRAWS)
    for items in sets:
        add_comparisons(report, items.head(plan.dense), DENSE, remembered(embed), fewer, rng)


def rewards_of(embed: Any) -> dict[str, R3Reward]:
    arms = {name: R3Reward(embed, interp_in=(0, 1), off=ABLATIONS[arm])
            for arm, name in NAMES.items()}  # fmt: skip
    return {**arms, PLAIN: R3Reward(embed, off=("repetition", "branching"))}


def valued(reward: R3Reward, questions: Sequence[str], texts: Sequence[str], **more: Any) -> Float:
    return np.array(reward(questions, texts, **more), np.float64)


# ── comparisons ─────────────────────────────────────────────────────────────────────────────────


def others(n: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """For each of n items so many other ones, without replacement: (n, count)."""
    order, shifts = random.permutation(n), 1 + random.permutation(n - 1)[:count]
    found = np.empty((n, count), np.int64)
    found[order] = order[(np.arange(n)[:, None] + shifts) % n]
    return found


def joined(answers: Sequence[str], rows: NDArray[np.int64]) -> list[str]:
    return [" ".join(answers[i] for i in row) for row in rows]


def add_comparisons(
    report: Report, items: Items, retriever: str, embed: Any, plan: Plan, rng: int
) -> None:
    random = np.random.default_rng(rng)
    arms = rewards_of(embed)
    own = {name: valued(arm, items.questions, items.answers) for name, arm in arms.items()}
    wins: dict[str, list[Any]] = {name: [] for name in arms}
    for _ in range(plan.draws):
        off_topic = joined(items.answers, others(len(items), OTHERS, random))
        for name, arm in arms.items():
            wins[name].append(own[name] > valued(arm, items.questions, off_topic))
    off = {name: np.mean(each, axis=0) for name, each in wins.items()}
    again = [" ".join([answer] * REPEATS) for answer in items.answers]
    copied, ratio = {}, {}
    for name, arm in arms.items():
        copied[name] = own[name] > valued(arm, items.questions, items.questions)
        some = own[name] > 0
        repeated = valued(arm, items.questions, again)
        ratio[name] = repeated[some] / own[name][some]
    rows: list[list[Cell]] = []
    for name in arms:
        middle = bootstrap_interval(ratio[name], statistic=np.median, resamples=plan.resamples)
        rows.append([name, mean_interval(off[name]), mean_interval(copied[name]), middle])
    columns = ["reward", "own answer beats three others'", "beats a copy of the question",
               "five times over / once, median"]  # fmt: skip
    where = f"{items.name} by {retriever}"
    title = f"{where}: {len(items)} questions, all as if open-ended"
    note = f"Others: {plan.draws} draws. A coin has .5, .5, 1."
    report.tables.append(ReportTable(title, columns, rows, note))
    report.claims.extend(comparison_claims(where, off, copied, ratio, plan))
    add_branches(report, items, where, embed, plan, random)


def comparison_claims(
    name: str, off: dict[str, Float], copied: dict[str, Any], ratio: dict[str, Float], plan: Plan
) -> list[Claim]:
    share = "share of questions and draws at least"
    says = "the parts belong together: each stops what another lets through"
    middle = bootstrap_interval(ratio[FULL], statistic=np.median, resamples=plan.resamples)
    return [
        Claim.at_least(f"{name}: {ALONE} prefers what is on topic", SAYS_RELEVANT,
                       mean_interval(off[ALONE]), 0.75, f"{share} .75"),
        Claim.at_least(f"{name}: {FULL} still does", says, mean_interval(off[FULL]), 0.75,
                       f"{share} .75"),
        Claim.at_least(f"{name}: {FULL} does so more often than {NAMES['LI_RP']}", says,
                       paired_difference(off[FULL], off[NAMES["LI_RP"]]), 0.0,
                       "difference of shares, paired by question, at least 0"),
        Claim.at_most(f"{name}: saying it five times over pays nothing", says, middle, 1.05,
                      "median ratio of rewards at most 1.05"),
        Claim.at_least(f"{name}: a copy of the question does not get past {FULL}",
                       "by relevance alone 40 % of answers are copies, by the product few",
                       mean_interval(copied[FULL]), 0.5,
                       "share of own answers that beat the copy at least a half"),
    ]  # fmt: skip


def add_branches(
    report: Report, items: Items, where: str, embed: Any, plan: Plan, random: np.random.Generator
) -> None:
    """Exact questions: the reference against itself with two others' answers attached."""
    exact = np.flatnonzero(items.exact)
    questions, answers = ([texts[i] for i in exact] for texts in (items.questions, items.answers))
    n, reward = len(exact), R3Reward(embed, interp_in=(0, 1))
    found: dict[str, list[Any]] = {"as if open-ended": [], "random types": [], "by reference": []}
    for _ in range(plan.draws):
        other = others(len(items), 2, random)[exact]
        attached = [" ".join([a, t]) for a, t in
                    zip(answers, joined(items.answers, other), strict=True)]  # fmt: skip
        coin = np.where(random.random(n) < 0.5, CONSTRAINED, OPEN).tolist()
        for name, kinds in zip(found, ([OPEN] * n, coin, [CONSTRAINED] * n), strict=True):
            columns = {"qtype": kinds, "reference": answers}
            short, long = (valued(reward, questions, t, **columns) for t in (answers, attached))
            found[name].append(short > long)
    shares = {name: np.mean(each, axis=0) for name, each in found.items()}
    rows: list[list[Cell]] = [[name, mean_interval(share)] for name, share in shares.items()]
    title = f"{where}: {n} questions with one exact answer"
    names = ["R³ with query types", "reference beats itself + two others' answers"]
    report.tables.append(ReportTable(title, names, rows, f"{plan.draws} draws of the others."))
    says = "questions with one answer need another rule; random query types cost quality"
    report.claims.extend([
        Claim.at_least(f"{where}: by reference, exact beats wordy", says,
                       mean_interval(shares["by reference"]), 0.9, "share at least .9"),
        Claim.at_least(f"{where}: by reference, more often than with random types", says,
                       paired_difference(shares["by reference"], shares["random types"]), 0.0,
                       "difference of shares, paired by question, at least 0"),
    ])  # fmt: skip


# ── selection ───────────────────────────────────────────────────────────────────────────────────


def add_selection(report: Report, plan: Plan) -> None:
    """Best of n of 32 samples and a copy of the question, exactly: over all subsets of n."""
    samples = read_samples("gsm8k-smollm2")
    texts = samples.texts
    assert texts is not None
    problems = list(samples.problems[: plan.problems])
    truths = truth_of(len(problems))
    pool = [[*texts[samples.rows(i)].tolist(), problem] for i, problem in enumerate(problems)]
    asked = [problem for i, problem in enumerate(problems) for _ in pool[i]]
    given = [text for row in pool for text in row]
    shape = (len(problems), len(pool[0]))
    embed = by_words([*problems, *given])
    arms = {"any (chance)": np.zeros(shape)}
    for name, reward in rewards_of(embed).items():
        if name != PLAIN:
            arms[name] = valued(reward, asked, given).reshape(shape)
    r3 = R3Reward(embed, interp_in=(0, 1))
    reference = [f"The answer is {truth}" for truth in truths for _ in pool[0]]
    kinds = [CONSTRAINED] * len(given)
    arms[BY_REFERENCE] = valued(r3, asked, given, qtype=kinds, reference=reference).reshape(shape)
    parts = r3.factors(asked, given, [OPEN] * len(given))
    copied = np.zeros(shape)
    copied[:, -1] = 1
    right = np.zeros(shape)
    grades = [samples.grades[samples.rows(i)] for i in range(len(problems))]
    right[:, :-1] = np.array(grades)
    gold = {
        "tokens": parts.length.reshape(shape) * 100,
        "RP": parts.repetition.reshape(shape),
        "relevance": np.nan_to_num(parts.relevance).reshape(shape),
        "a copy": copied,
        "right": right,
    }
    add_selection_results(report, arms, gold)


BY_REFERENCE = "R³, by reference"


def truth_of(n: int) -> list[str]:
    """The right answers of the first n problems."""
    found = {row["problem"]: row["truth"] for row in stored("gsm8k-smollm2.jsonl.gz")}
    return list(found.values())[:n]


def add_selection_results(report: Report, arms: dict[str, Float], gold: dict[str, Float]) -> None:
    sizes = np.array(SIZES)
    picked = {
        name: {part: expected_maximum(scores, sizes, credit=values)
               for part, values in gold.items()}
        for name, scores in arms.items()
    }  # fmt: skip
    rows: list[list[Cell]] = [
        [name, *(mean_interval(parts[part][:, -1]) for part in gold)]
        for name, parts in picked.items()
    ]
    n = len(arms[ALONE])
    title = f"The best of 32 samples and a copy of the question ({n} problems)"
    note = "Means of what is picked. Relevance: to the question. Right: by the true answer."
    report.tables.append(ReportTable(title, ["by", *gold], rows, note))
    series = [
        Series(name, SIZES, parts["right"].mean(axis=0), baseline=name == "any (chance)")
        for name, parts in picked.items()
    ]
    report.figures.append(
        Figure("line", "Optimising a reward by best of n", "n", "share right", series, log_x=True)
    )
    report.claims.extend(selection_claims(arms, picked))


def selection_claims(arms: dict[str, Float], picked: dict[str, dict[str, Float]]) -> list[Claim]:
    chance, full, exact = (picked[name] for name in ("any (chance)", FULL, BY_REFERENCE))

    def gain(part: str, a: dict[str, Float]) -> Estimate:
        return paired_difference(a[part][:, -1], chance[part][:, -1])

    paired = "difference to any sample, paired by problem, at least 0"
    proxy = expected_maximum(arms[BY_REFERENCE], SIZES).mean(axis=0)
    rho = proxy_gold_monotonicity(proxy, exact["right"].mean(axis=0)).rho
    open_rho = proxy_gold_monotonicity(
        expected_maximum(arms[FULL], SIZES).mean(axis=0), full["right"].mean(axis=0)
    ).rho
    says = "gold reward rises with the proxy: ρ .955 over checkpoints"
    rule = f"Spearman's ρ over n = {', '.join(map(str, SIZES))} at least .9"
    return [
        Claim.at_least(f"best of n by {FULL}: longer", "answers become longer",
                       gain("tokens", full), 0.0, paired),
        Claim.at_least(f"best of n by {FULL}: not repetitive", "and hardly repeat themselves",
                       mean_interval(full["RP"][:, -1]), 0.95, "mean RP at least .95"),
        Claim.at_least(f"best of n by {FULL}: not less relevant", "and stay relevant",
                       gain("relevance", full), 0.0, paired),
        Claim.at_most(f"best of n by {FULL}: no copies of the question",
                      "copies become rare",
                      mean_interval(full["a copy"][:, -1]), 0.1, "share at most .1"),
        Claim.at_least("exact questions: by reference, right more often than by chance",
                       "answers to exact questions are judged by a reference",
                       gain("right", exact), 0.0, paired),
        Claim.at_least("exact questions: by reference, what is right rises with the reward", says,
                       rho, 0.9, rule),
        Claim.at_least("exact questions: taken as open-ended, too", says, open_rho, 0.9, rule),
    ]  # fmt: skip
