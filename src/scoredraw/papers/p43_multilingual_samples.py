"""Hedged sampling, consensus with evidence from elsewhere, and a judge with a checklist.

A small language model restores sentences in which characters were changed. From its greedy output
and five samples at a low and a high temperature, plain and hedged pools of five are formed; one
member of each is picked by minimum Bayes risk with chrF, alone or with evidence, and is scored by
its chrF to the clean sentence. The evidence is the greedy outputs for three other corruptions of
the sentence: a stand-in, in the same language, for the paper's samples in another one. Beside the
picks stand a random member, the best, the greedy output alone, and the noisy input left as it is.

`quick` replays 16 sentences whose pools are stored; `full` restores 40 others anew and has the
model judge some of the pools itself, with a checklist. Sampled answers to problems with numbers
for answers show that the consensus of equal answers is the vote, and how soon its gain arrives.

Khairi, D'souza, Shen, Kreutzer and Hooker, "When life gives you samples: the benefits of scaling
up inference compute for multilingual LLMs", EMNLP 2025, arXiv 2506.20544.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.add_one_in import letter_bias
from scoredraw.errors import MissingExtraError
from scoredraw.journal import Journal
from scoredraw.language.checklist_selection import ChecklistSelection, checklist_select
from scoredraw.language.coverage_audit import selection_curve
from scoredraw.language.hedged_sampling import MIN_P, hope_and_risk
from scoredraw.language.minimum_bayes_risk import expected_utility, mbr_choice, pick
from scoredraw.language.selection import majority_vote
from scoredraw.language.text_utilities import TextUtility, chrf, chrf_matrix, embedding_cosine
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, proportion_interval
from scoredraw.models import TransformersModel
from scoredraw.papers.sentence_embeddings import cache_directory, encode
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import Samples, read_samples
from scoredraw.small_models import small_model

Float = NDArray[np.float64]
Pools = list[list[str]]

N = 5
COLD, HOT, CUT = "0.7", "1.2", "1.2, min-p"
TEMPERATURES = {COLD: 0.7, HOT: 1.2, CUT: 1.2}
PLAIN, HEDGED = list(range(1, N + 1)), list(range(N))  # of the greedy text and five samples
MAX_TOKENS, PORTION, OTHERS = 28, 8, 3
SHOTS = """\
Copy each noisy sentence and correct only its misspelled words.

Noisy: Mr. Leee haz three times as mnay books sa Anna.
Clean: Mr. Lee has three times as many books as Anna.

Noisy: The trin leaves Bostnon at 7 o'clockj evey mornisng.
Clean: The train leaves Boston at 7 o'clock every morning.

Noisy: Shez bouht 12 red aqples andu 5 gren pears mfor her sistex.
Clean: She bought 12 red apples and 5 green pears for her sister.

"""
CHECKLIST = """\
Does the answer have the same words as the sentence, in the same order?
Is every word spelled correctly?
Is nothing added and nothing left out?"""
SENTENCE = re.compile(r"[^.?!]+(?:\.\d[^.?!]*)*\.(?=\s)")
STORED_PROBLEMS = 31  # the stored sentences come from these
NOTES = """\
Not measured: win rates on m-ArenaHard (+9.0 with CHOPS, +8.3 with X-MBR, +4.5 with a reward \
model, Command-A judging itself), MGSM (+7.9 points), WMT (+0.72 XCOMET-XL), and evidence in \
another language: they need large models. The stand-in is English, so chrF may judge by it.
The prompt of the fresh sentences was chosen by the greedy output's chrF on the stored ones.
Bootstrap intervals of 16 sentences are somewhat too short."""


@dataclass(frozen=True)
class Plan:
    """How much a scale runs: sentences restored anew, pools judged, orders of each, resamples."""

    resamples: int
    repeats: int  # random subsets of answers
    sentences: int = 0
    judged: int = 0
    vectors: bool = True


PLANS = {
    "smoke": Plan(200, 20, vectors=False),
    "quick": Plan(10_000, 1000),
    "full": Plan(10_000, 1000, sentences=40, judged=10),
    "study": Plan(10_000, 1000, sentences=400, judged=100),
}


@dataclass(frozen=True)
class Restored:
    """P sentences: clean, noisy, greedily restored, 3 pieces of evidence, and samples by name."""

    name: str
    clean: list[str]
    noisy: list[str]
    greedy: list[str]
    evidence: Pools
    samples: dict[str, Pools]


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Pick from stored and from fresh pools, let the model judge, vote, and say what holds."""
    started, plan = time.perf_counter(), PLANS[scale]
    report = Report(paper=43, scale=scale, seed=rng)
    add_restored(report, read_stored(), plan)
    if plan.sentences:
        try:
            model = TransformersModel(*small_model(), max_new_tokens=16)
        except MissingExtraError as missing:
            report.notes.append(f"Left out, fresh sentences and a real judge: {missing}")
        else:
            fresh = restore(model, plan.sentences, rng, keep=scale == "study")
            add_restored(report, fresh, plan)
            add_judge(report, fresh, model, plan, rng)
    add_answers(report, plan, rng)
    report.notes.extend(NOTES.splitlines())
    return replace(report, seconds=time.perf_counter() - started)


# ── pools ───────────────────────────────────────────────────────────────────────────────────────


def read_stored() -> Restored:
    """The stored pools, which come with the package."""
    path = resources.files("scoredraw") / "data" / "restored-sentences.json"
    given = json.loads(path.read_text(encoding="utf-8"))["inputs"]
    texts = (given[name] for name in ("reference", "noisy", "greedy", "evidence", "samples"))
    return Restored(f"{len(given['reference'])} stored sentences", *texts)


def sentences() -> list[str]:
    """The first sentences of GSM8K's test problems, those of the stored pools left out."""
    problems = read_samples("gsm8k-solutions").problems[STORED_PROBLEMS:]
    first = [found.group() for text in problems if (found := SENTENCE.match(text))]
    return [sentence for sentence in first if 40 <= len(sentence) <= 80]


def corrupt(text: str, random: np.random.Generator) -> str:
    """Each character deleted, replaced, or followed by a random one, with probability .04 each.

    >>> corrupt("A robe takes 2 bolts of blue fiber.", np.random.default_rng(1))
    'A robe taes 2 bolts of blue fibser.'
    """
    letters = string.ascii_lowercase + " "
    fate, other = random.random(len(text)), random.integers(0, len(letters), len(text))
    made = [
        "" if u < 0.04 else letters[new] if u < 0.08 else old + letters[new] if u < 0.12 else old
        for old, u, new in zip(text, fate, other, strict=True)
    ]
    return "".join(made)


def restore(model: TransformersModel, count: int, rng: int, *, keep: bool) -> Restored:
    """Sentences corrupted and restored; keep: in a journal, to go on from after a kill."""
    clean = sentences()[:count]
    recipe = hashlib.sha256(f"{SHOTS}{TEMPERATURES}{MAX_TOKENS}{MIN_P}{rng}".encode()).hexdigest()
    journal = Journal(cache_directory() / f"restored-{recipe[:16]}.jsonl")
    done = {entry["sentence"]: entry for entry in journal.records()} if keep else {}
    for first in range(0, len(clean), PORTION):
        places = range(first, min(first + PORTION, len(clean)))
        if all(place in done for place in places):
            continue
        for place, made in zip(places, restore_portion(model, clean, places, rng), strict=True):
            done[place] = {"sentence": place, **made}
            if keep:
                journal.append(done[place])
    rows = [done[place] for place in range(len(clean))]
    noisy, greedy, more = ([row[name] for row in rows] for name in ("noisy", "greedy", "more"))
    samples = {name: [row["samples"][name] for row in rows] for name in TEMPERATURES}
    return Restored(f"{len(clean)} fresh sentences", clean, noisy, greedy, more, samples)


def restore_portion(
    model: TransformersModel, clean: Sequence[str], places: range, rng: int
) -> list[dict[str, Any]]:
    """Some sentences; each way of sampling takes them all through the model in one batch."""
    streams = [np.random.default_rng([rng, place]) for place in places]
    noisy = [
        [corrupt(clean[place], random) for _ in range(1 + OTHERS)]
        for place, random in zip(places, streams, strict=True)
    ]
    prompts = [[f"{SHOTS}Noisy: {text}\nClean:" for text in row] for row in noisy]
    how: dict[str, Any] = {"max_tokens": MAX_TOKENS, "stop": ["\n"], "first": places[0]}
    flat = model.sample_all([p for row in prompts for p in row], 1, temperature=0.0, **how)
    texts = [made[0].text.strip() for made in flat]
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(noisy):
        own, *more = texts[i * (1 + OTHERS) : (i + 1) * (1 + OTHERS)]
        rows.append({"noisy": row[0], "greedy": own, "more": more, "samples": {}})
    for number, (name, temperature) in enumerate(TEMPERATURES.items()):
        pools = model.sample_all(
            [row[0] for row in prompts], N - (name == CUT), temperature=temperature,
            min_p=MIN_P * (name == CUT), seed=10 * rng + number, **how,
        )  # fmt: skip
        for made, pool in zip(rows, pools, strict=True):
            made["samples"][name] = [each.text.strip() for each in pool]
    return rows


# ── picks ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Scored:
    """The greedy text and the samples of P sentences: u (P, n, n) between them, x (P, n, 3) in the
    light of the evidence, truth (P, n) in that of the clean sentence."""

    u: Float
    x: Float
    truth: Float

    def picked(self, members: Sequence[int], weight: float = 0.0) -> NDArray[np.int64]:
        """The position of the consensus among some members; weight: of the evidence."""
        u, x = self.u[:, members][:, :, members], self.x[:, members]
        return pick(expected_utility(u, x, cross_weight=weight))

    def by_consensus(self, members: Sequence[int], weight: float = 0.0) -> Float:
        """The truth of the consensus, (P,)."""
        chosen = self.picked(members, weight)[:, None]
        return np.take_along_axis(self.truth[:, members], chosen, 1)[:, 0]


def score(restored: Restored, name: str, utility: TextUtility | None = None) -> Scored:
    u = utility or chrf()
    pools = [[g, *s] for g, s in zip(restored.greedy, restored.samples[name], strict=True)]
    within = np.stack([u(pool, pool) for pool in pools])
    across = [u(pool, more) for pool, more in zip(pools, restored.evidence, strict=True)]
    truth = [chrf_matrix(p, [c])[:, 0] for p, c in zip(pools, restored.clean, strict=True)]
    return Scored(within, np.stack(across), np.stack(truth))


def arms(scored: Scored) -> dict[str, Float]:
    """What each way of picking scores on each sentence."""
    plain, hedged = scored.truth[:, PLAIN], scored.truth[:, HEDGED]
    return {
        "random sample": plain.mean(axis=1),
        "MBR": scored.by_consensus(PLAIN),
        "hedged MBR": scored.by_consensus(HEDGED),
        "X-MBR": scored.by_consensus(PLAIN, 1.0),
        "hedged X-MBR": scored.by_consensus(HEDGED, 1.0),
        "hedged X-MBR, evidence counts 3": scored.by_consensus(HEDGED, 3.0),
        "best of the plain pool": plain.max(axis=1),
        "best of the hedged pool": hedged.max(axis=1),
        "greedy alone": scored.truth[:, 0],
    }


def add_restored(report: Report, restored: Restored, plan: Plan) -> None:
    scored = {name: score(restored, name) for name in restored.samples}
    found = {name: arms(scored[name]) for name in (COLD, HOT)}
    report.claims.extend(restored_claims(restored.name, scored, found, plan))
    rows: list[list[Cell]] = [
        [arm, *(over(plan, found[name][arm]) for name in found)] for arm in found[COLD]
    ]
    for u in other_utilities(report, restored, plan):
        each = [score(restored, name, u) for name in found]
        for arm, weight in (("hedged MBR", 0.0), ("hedged X-MBR", 1.0)):
            cells = [over(plan, e.by_consensus(HEDGED, weight)) for e in each]
            rows.append([f"{arm}, {u.name}", *cells])
    if CUT in scored:
        for arm, weight in (("hedged MBR, min-p", 0.0), ("hedged X-MBR, min-p", 1.0)):
            rows.append([arm, None, over(plan, scored[CUT].by_consensus(HEDGED, weight))])
    mixed = over(plan, of_both_temperatures(restored))
    inputs = zip(restored.noisy, restored.clean, strict=True)
    untouched = over(plan, np.array([chrf_matrix([x], [own])[0, 0] for x, own in inputs]))
    rows.append(["MBR of three samples at 0.7 and two at 1.2", mixed, None])
    rows.append(["the noisy input, left as it is", untouched, None])
    note = "chrF to the clean sentence, 0 to 100; intervals resample sentences. Cosine: of vectors "
    note += "by all-MiniLM-L6-v2, which knows English only. Picking rescues bad pools; it does not "
    note += "make the model good at a task that is best left undone."
    columns = ["of five samples", "temperature 0.7", "temperature 1.2"]
    report.tables.append(ReportTable(f"{restored.name}: what is picked", columns, rows, note=note))
    report.figures.append(arms_figure(restored.name, found, plan))
    add_hope(report, restored.name, scored)


def other_utilities(report: Report, restored: Restored, plan: Plan) -> list[TextUtility]:
    """Beside chrF: its symmetric form, and sentence vectors where the encoder is there."""
    found = [chrf(symmetric=True)]
    pools = [restored.evidence, *(restored.samples[name] for name in (COLD, HOT))]
    texts = [*restored.greedy, *(text for each in pools for pool in each for text in pool)]
    if plan.vectors:
        try:
            vectors = dict(zip(texts, encode(texts), strict=True))
        except MissingExtraError as missing:
            report.notes.append(f"Left out, sentence vectors: {missing}")
        else:
            found.append(embedding_cosine(lambda some: [vectors[text] for text in some]))
    return found


def of_both_temperatures(restored: Restored) -> Float:
    """MBR of pools whose samples come from a list of temperatures."""
    pairs = zip(restored.samples[COLD], restored.samples[HOT], strict=True)
    mixed = [[*cold[:3], *hot[:2]] for cold, hot in pairs]
    return score(replace(restored, samples={"mixed": mixed}), "mixed").by_consensus(PLAIN)


def over(plan: Plan, values: Float) -> Estimate:
    """The mean over sentences or problems, with its bootstrap interval."""
    return bootstrap_interval(values, resamples=plan.resamples)


def restored_claims(
    name: str, scored: dict[str, Scored], found: dict[str, dict[str, Float]], plan: Plan
) -> list[Claim]:
    """The rules of hedging and evidence, each a paired difference over sentences."""
    gaps = {
        f"{a} - {b} at {t}": (says, found[t][a] - found[t][b])
        for a, b, says in (
            ("hedged MBR", "MBR", "hedging gains 2.4 (English) and 2.2 points of win rate"),
            ("hedged X-MBR", "hedged MBR", "X-MBR +8.3 where best of N has +4.5 (Command-A)"),
            ("hedged X-MBR", "greedy alone", "five samples and a choice: +6.8 points of win rate"),
        )
        for t in found
    }
    gain = [found[t]["hedged MBR"] - found[t]["MBR"] for t in (COLD, HOT)]
    says = "a high temperature has more to hope for, and more to fear, than a low one"
    gaps[f"what the hedge gains at {HOT} - at {COLD}"] = says, gain[1] - gain[0]
    claims = [
        Claim.at_least(f"{name}, {title}", says, over(plan, values), 0.0)
        for title, (says, values) in gaps.items()
    ]
    cold = found[COLD]
    steps = [
        over(plan, cold[a] - cold[b])
        for a, b in (("best of the hedged pool", "MBR"), ("MBR", "random sample"))
    ]
    up, down = all(step.above(0) for step in steps), any(step.below(0) for step in steps)
    title = f"{name}, best of the hedged pool > MBR > random sample at {COLD}"
    measured = f"best - MBR {steps[0]}, MBR - random {steps[1]}"
    rule, says = "both intervals above 0", "a choice among samples beats a single one"
    claims.append(Claim.judge(title, says, measured, rule, True if up else False if down else None))
    share = over(plan, np.mean([scored[t].picked(HEDGED) == 0 for t in found], axis=0))
    title, rule = f"{name}, how often MBR picks the greedy text", "more often than one in five"
    return [*claims, Claim.at_least(title, "35.3 % of the time", share, 1 / N, rule)]


def arms_figure(name: str, found: dict[str, dict[str, Float]], plan: Plan) -> Figure:
    series = []
    for t, each in found.items():
        arms_ = [arm for arm in each if arm != "random sample"]
        gaps = [over(plan, each[arm] - each["random sample"]) for arm in arms_]
        mean, low, high = ([getattr(g, part) for g in gaps] for part in ("value", "low", "high"))
        series.append(Series(f"temperature {t}", arms_, mean, low, high))
    title = f"{name}: chrF gained over a random sample"
    return Figure("interval", title, "chrF", series=series, reference=0.0)


def add_hope(report: Report, name: str, scored: dict[str, Scored]) -> None:
    """Hope and risk by pool size, exactly, and how often a pool without the hedge breaks them."""
    rows: list[list[Cell]] = []
    series = []
    for t, each in scored.items():
        greedy, samples = each.truth[:, 0], each.truth[:, 1:]
        for hedged in (True,) if t == CUT else (False, True):
            sizes = range(1, N + 1)
            pools = [hope_and_risk(samples, greedy, n, hedged=hedged) for n in sizes]
            broken = float(((pools[-1].best < 0) | (pools[-1].worst > 0)).mean())
            kind = f"{'hedged' if hedged else 'plain'}, {t}"
            hopes, risks = [p.hope for p in pools], [p.risk for p in pools]
            rows.append([kind, *hopes[1:], *risks[1:], broken])
            series.append(Series(f"hope, {kind}", list(sizes), hopes))
            series.append(Series(f"risk, {kind}", list(sizes), risks))
    sizes = range(2, N + 1)
    columns = ["pool", *(f"hope, N = {n}" for n in sizes), *(f"risk, N = {n}" for n in sizes)]
    title = f"{name}: hope and risk in % of the greedy score"
    note = "Exact over the subsets of the samples. Last: the share of sentences whose best sample "
    note += "is worse, or whose worst is better, than the greedy one; no hedged pool has any. The "
    note += "paper, at 0.7: +25.4 and -37.7 in English, +37.2 and -44.5 in other languages."
    columns.append("0 not between")
    report.tables.append(ReportTable(title, columns, rows, note=note))
    report.figures.append(Figure("line", title, "samples N", "%", series, reference=0.0))


# ── a judge ─────────────────────────────────────────────────────────────────────────────────────


def add_judge(
    report: Report, restored: Restored, model: TransformersModel, plan: Plan, rng: int
) -> None:
    """The model as the judge of its own hedged pools, every pool in N orders."""
    scored = score(restored, COLD)
    rows = range(min(plan.judged, len(restored.clean)))
    found = []
    for row in rows:
        pool = [restored.greedy[row], *restored.samples[COLD][row]][:N]
        task = f"Correct the misspelled words of this sentence: {restored.noisy[row]}"
        how: dict[str, Any] = {"permutations": N, "rng": np.random.default_rng([rng, row])}
        found.append(checklist_select(model, task, pool, checklist=CHECKLIST, **how))
    truth = scored.truth[: len(rows), HEDGED]
    claims, table = judged(found, truth, scored.by_consensus(HEDGED)[: len(rows)], plan)
    report.claims.extend(claims)
    report.tables.append(table)


def judged(
    found: Sequence[ChecklistSelection], truth: Float, consensus: Float, plan: Plan
) -> tuple[list[Claim], ReportTable]:
    """What a judge's verdicts are worth, whether they can be read, and whether places count."""
    votes, chance = np.stack([f.votes for f in found]), truth.mean(axis=1)
    first = votes == votes.max(axis=1, keepdims=True)  # ties are broken by lot: in expectation
    named = np.average(truth, axis=1, weights=first)  # without a verdict a random member
    lost = np.array([f.fell_back for f in found])
    places = np.concatenate([f.places for f in found])
    read = places[places >= 0]
    counts = np.bincount(read, minlength=N).tolist()
    bias = letter_bias(read, N).p_value if len(read) else np.nan
    says, name = "CHOPS +9.0 (Command-A judging itself)", "SmolLM2 judging itself with a checklist"
    gain = mean_interval(named - chance)
    claims = [Claim.at_least(f"{name} - a random member of the pool, chrF", says, gain, 0.0)]
    title, rule = f"{name}: places in the list do not count", "p of equal places at least 0.05"
    holds = None if np.isnan(bias) else bias >= 0.05
    claims.append(Claim.judge(title, "-", f"p = {bias:.2g}", rule, holds))
    rows: list[list[Cell]] = [
        ["replies that name a candidate", proportion_interval(len(read), len(places))],
        ["pools without any verdict (the greedy one is taken)", int(lost.sum())],
        ["verdicts by place in the list, first to last", ", ".join(map(str, counts))],
        ["chrF of the pick, ties in expectation", over(plan, np.where(lost, truth[:, 0], named))],
        ["chrF of a random member", over(plan, chance)],
        ["chrF of the greedy member", over(plan, truth[:, 0])],
        ["chrF of MBR", over(plan, consensus)],
    ]
    title = f"SmolLM2 as a judge of {len(found)} of its own pools, each in {N} orders"
    return claims, ReportTable(title, ["", "measured"], rows)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def add_answers(report: Report, plan: Plan, rng: int) -> None:
    """Answers that can be told equal: the consensus is the vote. And consensus of texts."""
    arithmetic = read_samples("smollm2-arith")
    pools = list(arithmetic.pools())
    gaps = [np.abs(mbr_choice(p, utility="equality") - majority_vote(p)).max() for p in pools]
    differ = sum(gap > 0 for gap in gaps)
    name = f"MBR of equal answers against the vote, {len(pools)} problems"
    says, rule = "maths: majority vote", "the same choice to the last bit on every problem"
    measured = f"{differ} differ; largest difference {max(gaps):g}"
    report.claims.append(Claim.judge(name, says, measured, rule, differ == 0))
    add_curves(report, arithmetic, {"majority": "MBR of equal answers (the vote)"}, plan, rng)
    rules = {"majority": "MBR of equal answers (the vote)", "mean_logprob": "likeliest, per token"}
    add_curves(report, read_samples("gsm8k-smollm2"), rules | {"mbr": "MBR of texts"}, plan, rng)


def add_curves(
    report: Report, samples: Samples, rules: dict[str, str], plan: Plan, rng: int
) -> None:
    """Accuracy at k, and whether most of what 32 samples gain has arrived at 5."""
    ks = [1, 3, N, 8, 16, int(samples.counts.min())]
    names = {"uniform": "any sample", **rules, "oracle": "some sample is right"}
    rows: list[list[Cell]] = []
    series = []
    for rule, shown in names.items():
        method: Any = mbr_choice if rule == "mbr" else rule
        curve = selection_curve(samples, method, ks, repeats=plan.repeats, rng=rng)
        rows.append([shown, *(over(plan, column) for column in curve.per_problem.T)])
        series.append(Series(shown, ks, curve.accuracy.tolist(), baseline=rule == "uniform"))
        if rule in ("majority", "mbr"):
            accuracy = curve.per_problem
            early = accuracy[:, 2] - accuracy[:, 0] - (accuracy[:, -1] - accuracy[:, 0]) / 2
            title = f"{samples.name}, {shown}: gain by k = {N} - half of that by {ks[-1]}"
            says, rule_ = "most of the gain arrives with 3 to 5 samples", "at least half: above 0"
            report.claims.append(Claim.at_least(title, says, over(plan, early), 0.0, rule_))
        if rule == "mbr":
            gain = over(plan, curve.per_problem[:, -1] - curve.per_problem[:, 0])
            title, says = f"{samples.name}, {shown} at {ks[-1]} - any sample", "MGSM: up to +7.9"
            report.claims.append(Claim.at_least(title, says, gain, 0.0))
    title = f"{samples.name}: accuracy with k samples to choose from"
    report.tables.append(ReportTable(title, ["", *(f"k = {k}" for k in ks)], rows))
    report.figures.append(
        Figure("line", title, "samples k", "share of problems solved", series, log_x=True)
    )
