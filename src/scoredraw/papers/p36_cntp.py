"""Cautious decoding: the law of what is kept, what it does to texts, and what it does to answers.

*Law*: first segments of a small Markov chain against the closed form. *Texts*: a Llama of two
layers, trained here on docstrings, and stories15M continue from nothing. Selection lowers the
perplexity that it selects by, which proves little alone; so it stands beside what lowers it more
cheaply: temperature, tuned to the same negative log-likelihood; the best of five whole texts, about
the same rows; greedy; five beams. *Answers*: SmolLM2-135M on arithmetic, where single answers and
votes of about the same rows stand beside it.

Wang et al., "Cautious next token prediction", 2025, arXiv 2507.03038.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare

from scoredraw.answers import AnswerPool
from scoredraw.errors import MissingExtraError
from scoredraw.language.cautious_decoding import CautiousPlan, CautiousTokens, cautious_decode
from scoredraw.language.cautious_generation import cautious_texts, cautious_tokens
from scoredraw.language.coverage_audit import selection_curve
from scoredraw.language.punctuation import MARKS, punctuation_ids, segment_law, segment_perplexity
from scoredraw.language.selection import majority_vote
from scoredraw.metrics import bootstrap_interval, mean_interval, paired_difference
from scoredraw.models import Completion, TransformersModel
from scoredraw.papers import quad_language
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.samples import BUNDLED, read_samples
from scoredraw.small_models import small_model, stories_model
from scoredraw.token_sampling import Tokens, sample_tokens, token_logprobs

Float = NDArray[np.float64]
Text = Tokens | CautiousTokens

AT_ONCE = 160  # texts
GROUP = 8  # texts whose phrases are counted together
BEST_OF = 5
CAUTIOUS, PLAIN, COOL = "cautious", "sampling, T = 1", "low temperature"
BEST, GREEDY, BEAMS = f"best of {BEST_OF} texts", "greedy", "5 beams"
COLDEST, HALVINGS = 0.05, 6
LAW_TRIALS, LAW_ROOM = 5, 4
MARKOV = np.log([[0.5, 0.3, 0.2], [0.25, 0.45, 0.3], [0.35, 0.45, 0.2]])  # a, b and the mark
SHOTS = (
    ("Kim has 4 pens and buys 3 more. How many pens does Kim have now?", "4 + 3 = 7", 7),
    ("Tom has 9 eggs and gives away 2. How many eggs are left?", "9 - 2 = 7", 7),
    ("Sue has 3 bags with 5 nuts in each bag. How many nuts are there in total?", "3 * 5 = 15", 15),
    ("Joe has 8 cards, buys 4 more and then gives away 5. How many cards are left?",
     "8 + 4 = 12. 12 - 5 = 7", 7),
)  # fmt: skip
ANSWER = re.compile(r"answer is (-?\d+)")
ANSWER_TOKENS, PROBLEMS_AT_ONCE, VOTERS = 26, 8, 5
NOTES = (
    "The paper's models of 7B and 8B, its word problems, TruthfulQA and pictures are beyond this "
    "machine: its gains there are neither shown nor refuted. In its own tables a vote over "
    "cautious chains can lose: DeepSeek-R1-1.5B on GSM8K, 71.7 against 78.3 over plain ones. "
    "The bounds of uncertainty by max p and by the margin, 0 and 1, are ours."
)


class TextPlan(NamedTuple):
    """Groups of texts by each way, their tokens, and texts by each variant."""

    groups: int
    tokens: int
    variants: int = 0


class AnswerPlan(NamedTuple):
    """Problems, plain samples of each for the vote, samples of each by the other ways."""

    problems: int
    votes: int = 5
    samples: int = 2


@dataclass(frozen=True)
class Plan:
    """How much a scale runs."""

    runs: int
    steps: int
    bytes: TextPlan
    stories: TextPlan | None = None
    answers: AnswerPlan | None = None


PLANS = {
    "smoke": Plan(300, 6, TextPlan(2, 12, variants=2)),
    "quick": Plan(4000, 250, TextPlan(3, 60, variants=8), TextPlan(3, 40)),
    "full": Plan(20_000, 500, TextPlan(4, 60, 4), TextPlan(8, 60, variants=4), AnswerPlan(24)),
    "study": Plan(
        200_000, 4000, TextPlan(60, 120, 64), TextPlan(60, 60, 64), AnswerPlan(48, 25, 5)
    ),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the experiments; the clock and the machine are added by `reports`."""
    plan = PLANS[scale]
    report = Report(paper=36, scale=scale, seed=rng, notes=[NOTES])
    add_law(report, plan.runs, rng)
    add_bytes(report, plan, rng)
    if plan.stories is not None:
        add_stories(report, plan.stories, rng)
    add_best_of(report)
    if plan.answers is not None:
        add_answers(report, plan.answers, rng)
    return report


# ── the law ─────────────────────────────────────────────────────────────────────────────────────


def chain_segments() -> dict[tuple[int, ...], Float]:
    """The segments that may follow a mark, with the log-probabilities of their tokens."""
    return {
        segment: MARKOV[(2, *segment[:-1]), segment]
        for length in range(1, LAW_ROOM + 1)
        for segment in product(range(3), repeat=length)
        if 2 not in segment[:-1] and (segment[-1] == 2 or length == LAW_ROOM)
    }


def add_law(report: Report, runs: int, rng: int) -> None:
    """First segments as often kept as the closed form says."""
    segments = chain_segments()
    q = np.array([np.exp(logs.sum()) for logs in segments.values()])
    perplexity = np.array([segment_perplexity(logs) for logs in segments.values()])
    expected = runs * segment_law(q, perplexity, LAW_TRIALS)
    plan = CautiousPlan([2], n_min=LAW_TRIALS, n_max=LAW_TRIALS)
    made = cautious_decode(
        lambda texts: MARKOV[[text[-1] for text in texts]], [[2]] * runs, plan,
        max_new_tokens=LAW_ROOM, end=[2], rng=rng,
    )  # fmt: skip
    place = {segment: i for i, segment in enumerate(segments)}
    counts = np.bincount([place[tuple(one.ids.tolist())] for one in made], minlength=len(place))
    rare = expected < 5
    kinds = [*np.flatnonzero(~rare)[:, None], *([np.flatnonzero(rare)] if rare.any() else [])]
    seen, due = (np.array([x[kind].sum() for kind in kinds]) for x in (counts, expected))
    p = float(chisquare(seen, due).pvalue)
    name = f"law: {runs:,} first segments, the best of {LAW_TRIALS} trials, by χ²"
    says = "(derived) P(kept perplexity = v) is a difference of powers of tail probabilities"
    rule = "p above 1e-4, segments expected fewer than 5 times together"
    report.claims.append(Claim.judge(name, says, f"p = {p:.3g}", rule, p > 1e-4))
    ns = np.arange(1, 21)
    means = segment_law(q, perplexity, ns) @ perplexity
    series = [
        Series("the segment kept", ns.tolist(), means.tolist()),
        Series("any segment", ns.tolist(), [float(means[0])] * len(ns), baseline=True),
    ]
    title = "Law: what more trials bring in a chain of three letters"
    report.figures.append(Figure("line", title, "trials", "expected perplexity", series))


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


class Way(NamedTuple):
    """A way of making texts: the texts, and the rows of forward passes they took."""

    texts: list[Text]
    rows: int

    @property
    def nll(self) -> Float:
        """Nats a token of each text, under the model as it is."""
        return np.array([-one.logprobs.mean() for one in self.texts])

    @property
    def price(self) -> float:
        """Rows of forward passes a token that is shown."""
        return self.rows / sum(len(one.ids) for one in self.texts)

    def grouped(self) -> Float:
        """The share of different phrases of three tokens in each group of texts."""
        parts = range(0, len(self.texts), GROUP)
        return np.array([distinct(self.texts[i : i + GROUP]) for i in parts])


def distinct(texts: Sequence[Text]) -> float:
    """Different phrases of three tokens / all of them."""
    phrases = [tuple(one.ids[i : i + 3]) for one in texts for i in range(len(one.ids) - 2)]
    return len(set(phrases)) / max(len(phrases), 1)


class Writer(NamedTuple):
    """A model that continues a prompt."""

    name: str
    model: Any
    prompt: list[int]
    end: list[int]
    punctuation: Any
    tokens: int

    def sample(self, n: int, rng: int, temperature: float = 1.0) -> Way:
        texts: list[Text] = []
        for first in range(0, n, AT_ONCE):
            texts += sample_tokens(
                self.model, [self.prompt], min(AT_ONCE, n - first), max_tokens=self.tokens,
                temperature=temperature, end=self.end, rng=rng, first=first,
            )[0]  # fmt: skip
        return Way(texts, sum(len(one.ids) for one in texts))

    def cautious(self, n: int, rng: int, **options: Any) -> Way:
        plan = CautiousPlan(**{"punctuation": self.punctuation, **options})
        texts: list[Text] = list(cautious_tokens(
            self.model, [self.prompt], plan, n, max_tokens=self.tokens, end=self.end, rng=rng
        )[0])  # fmt: skip
        return Way(texts, sum(one.forward_rows for one in texts if isinstance(one, CautiousTokens)))

    def beams(self, count: int = 5) -> Way:
        import torch

        ids = torch.tensor([self.prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=count, do_sample=False,
            max_new_tokens=self.tokens, eos_token_id=self.end or None, pad_token_id=0,
        )[0, len(self.prompt) :]  # fmt: skip
        new = out.numpy()
        said = token_logprobs(self.model, self.prompt, new.tolist())
        return Way([Tokens(new, said, True)], count * len(new))


def cooled(writer: Writer, target: float, n: int, rng: int) -> tuple[float, bool]:
    """The temperature whose texts have that mean NLL, by bisection, and whether there is one."""
    low, high = COLDEST, 1.0
    if writer.sample(n, rng, low).nll.mean() >= target:
        return low, False
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if writer.sample(n, rng, middle).nll.mean() < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2, True


def add_texts(report: Report, writer: Writer, groups: int, rng: int) -> dict[str, Way]:
    """All ways beside each other: a table, a figure and claims."""
    n = groups * GROUP
    ways = {CAUTIOUS: writer.cautious(n, rng)}
    many = writer.sample(n * BEST_OF, rng)
    ways[PLAIN] = Way(many.texts[:n], sum(len(one.ids) for one in many.texts[:n]))
    each = [many.texts[i : i + BEST_OF] for i in range(0, len(many.texts), BEST_OF)]
    best = [max(texts, key=lambda one: one.logprobs.mean()) for texts in each]
    ways[BEST] = Way(best, many.rows)
    target = float(ways[CAUTIOUS].nll.mean())
    temperature, reached = cooled(writer, target, n, rng)
    ways[COOL] = writer.sample(n, rng, temperature)
    ways[GREEDY] = writer.sample(1, rng, 0.0)
    ways[BEAMS] = writer.beams()
    rows: list[list[Cell]] = []
    for name, way in ways.items():
        several = len(way.texts) > 1
        label = f"{name}, T = {temperature:.3g}" if name == COOL else name
        nll: Cell = mean_interval(way.nll) if several else float(way.nll[0])
        varied: list[Cell] = [mean_interval(way.grouped()), distinct(way.texts[:32])]
        rows.append([label, nll, *(varied if several else [None, None]), way.price])
    columns = ["way", "NLL a token", f"distinct-3, {GROUP} texts", "of 32 texts", "rows a token"]
    note = "NLL: nats under the model as it is. Distinct-3: different phrases of three tokens / "
    note += "all. Rows of forward passes a token that is shown."
    if not reached:
        note += f" No temperature down to {COLDEST} has the cautious NLL: that one is shown."
    title = f"{writer.name}: {n} texts of {writer.tokens} tokens"
    report.tables.append(ReportTable(title, columns, rows, note=note))
    series = [
        Series(name, [float(way.nll.mean())], [float(way.grouped().mean())], labels=[name],
               baseline=name == PLAIN)
        for name, way in ways.items() if len(way.texts) > 1
    ]  # fmt: skip
    what, y = f"{writer.name}: how sure, and how varied", f"distinct-3 of {GROUP} texts"
    report.figures.append(Figure("scatter", what, "NLL a token (nats)", y, series))
    report.claims.extend(text_claims(writer.name, ways, reached))
    return ways


def text_claims(name: str, ways: dict[str, Way], reached: bool) -> list[Claim]:
    cautious, cool = ways[CAUTIOUS], ways[COOL]
    traced = [one for one in cautious.texts if isinstance(one, CautiousTokens)]
    share = np.mean([len(d.lengths) > 1 for one in traced for d in one.decisions])
    bound = float(1 + share * 9)
    where = "at equal NLL" if reached else f"at T = {COLDEST}, the surest that sampling gets"
    cost = f"O(1 + p̄ (N_max - 1)) rows a token; p̄ = {share:.2f} here: {bound:.2f}"
    return [
        Claim.at_least(
            f"{name}: NLL of sampling less that of cautious decoding, nats a token",
            "it selects by perplexity (measured before: 0.846 to 0.388 for stories15M)",
            paired_difference(ways[PLAIN].nll, cautious.nll), 0.2,
        ),
        Claim.at_least(
            f"{name}: distinct-3 of cautious decoding less that of low temperature, {where}",
            "(ours) local selection keeps more of the variety than a low temperature does",
            paired_difference(cautious.grouped(), cool.grouped()), 0.0, "at least 0",
        ),
        Claim.at_most(
            f"{name}: rows of forward passes a token", cost,
            cautious.price, bound, f"at most {bound:.2f}",
        ),
        Claim.at_least(
            f"{name}: NLL of the {BEST} less that of cautious decoding",
            "choosing locally matters: the best of N whole answers is worse",
            paired_difference(ways[BEST].nll, cautious.nll), 0.0, "at least 0",
        ),
    ]  # fmt: skip


def add_variants(report: Report, writer: Writer, n: int, rng: int, official: Any = None) -> None:
    """The paper's ablations, and ours: what each does to the texts and to their price."""
    variants: dict[str, dict[str, Any]] = {
        "more trials where unsure (code's rule)": {},
        "the paper's rule": {"rule": "paper"},
        "6 trials everywhere": {"trials": "fixed"},
        "fewer trials where unsure": {"trials": "inverse"},
        "by 1 - max p": {"measure": "max_prob"},
        "by the margin": {"measure": "margin"},
        "at most 8 tokens a trial": {"max_trial_tokens": 8},
    }
    if official is not None:
        variants["the released code's ten marks"] = {"punctuation": official}
    rows: list[list[Cell]] = []
    for name, options in variants.items():
        way = writer.cautious(n, rng, **options)
        traced = [one for one in way.texts if isinstance(one, CautiousTokens)]
        trials = float(np.mean([len(d.lengths) for one in traced for d in one.decisions]))
        branched = float(np.mean([one.branch_rate for one in traced]))
        varied = distinct(way.texts)
        rows.append([name, mean_interval(way.nll), varied, branched, trials, way.price])
    columns = ["variant", "NLL a token", "distinct-3", "branched", "trials", "rows a token"]
    note = "The paper's, by accuracy on GSM8K: fixed 81.1, inverse 81.2, more where unsure 81.6."
    title = f"{writer.name}: variants, {n} texts"
    report.tables.append(ReportTable(title, columns, rows, note=note))


def add_bytes(report: Report, plan: Plan, rng: int) -> None:
    """A small Llama of characters, trained on the docstrings of the standard library."""
    import torch

    chunks = torch.as_tensor(np.concatenate(list(quad_language.docstrings().values())))
    with torch.random.fork_rng():
        model = quad_language.trained(chunks, plan.steps, rng)
    marks = list(MARKS.encode())
    writer = Writer("characters", model, [ord("\n")], [], marks, plan.bytes.tokens)
    add_texts(report, writer, plan.bytes.groups, rng)
    add_variants(report, writer, plan.bytes.variants, rng)


def openings(way: Way, tokenizer: Any) -> Float:
    """The share of different first sentences in each group of texts."""
    first = [tokenizer.decode(one.ids).split(".")[0] for one in way.texts]
    return np.array([len(set(first[i : i + GROUP])) for i in range(0, len(first), GROUP)]) / GROUP


def add_stories(report: Report, plan: TextPlan, rng: int) -> None:
    try:
        model, tokenizer = stories_model()
    except MissingExtraError as missing:
        report.notes.append(f"The stories are left out: {missing}.")
        return
    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    writer = Writer("stories15M", model, start, end, punctuation_ids(tokenizer), plan.tokens)
    ways = add_texts(report, writer, plan.groups, rng)
    off = max(
        float(np.abs(token_logprobs(model, writer.prompt, one.ids.tolist()) - one.logprobs).max())
        for one in ways[CAUTIOUS].texts[:GROUP]
    )
    kept, sampled = (openings(ways[name], tokenizer) for name in (CAUTIOUS, PLAIN))
    report.claims.extend([
        Claim.at_least(
            f"stories15M: different first sentences of {GROUP} texts, share",
            f"(ours) seeds give different ones; of sampled texts {sampled.mean():.2f} are",
            mean_interval(kept), 1.0, "all of them",
        ),
        Claim.at_most(
            "stories15M: log-probabilities from the shared cache against one pass over the text",
            "-", off, 1e-3, "at most 0.001 nats a token",
        ),
    ])  # fmt: skip
    if plan.variants:
        official = punctuation_ids(tokenizer, which="official")
        add_variants(report, writer, plan.variants, rng, official)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def add_best_of(report: Report) -> None:
    """Whole answers chosen by perplexity, of more and more samples."""
    values = selection_curve(read_samples("smollm2-arith"), "mean_logprob", (2, 32)).per_problem
    report.claims.append(
        Claim.at_most(
            "arithmetic: best of 32 whole answers by perplexity less best of 2, accuracy",
            "falls with N: 79.2 at 2, 76.1 at 40 (Llama-3.1-8B, GSM8K)",
            bootstrap_interval(values[:, 1] - values[:, 0]), 0.0, "at most 0",
        )
    )  # fmt: skip


def arithmetic(count: int) -> list[tuple[str, int]]:
    """Problems and their answers, spread over the kinds."""
    file = resources.files("scoredraw") / "data" / BUNDLED["smollm2-arith"]
    with file.open("rb") as packed, gzip.open(packed, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    problems = [*{row["problem"]: int(row["truth"]) for row in rows}.items()]
    return [problems[i * len(problems) // count] for i in range(count)]


def few_shot(problem: str) -> str:
    shots = "".join(f"Q: {q}\nA: {a}. The answer is {n}.\n" for q, a, n in SHOTS)
    return f"{shots}Q: {problem}\nA:"


def number_of(completion: Completion) -> int | None:
    found = ANSWER.search(completion.text)
    return int(found.group(1)) if found else None


def add_answers(report: Report, plan: AnswerPlan, rng: int) -> None:
    try:
        model, tokenizer = small_model()
    except MissingExtraError as missing:
        report.notes.append(f"The answers are left out: {missing}.")
        return
    problems = arithmetic(plan.problems)
    whole, truths = TransformersModel(model, tokenizer), [truth for _, truth in problems]
    prompts = [few_shot(question) for question, _ in problems]
    trace: list[CautiousTokens] = []
    common: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "stop": ["\n"], "seed": rng}

    def plain(n: int, **options: Any) -> list[list[Completion]]:
        made: list[list[Completion]] = []
        for first in range(0, len(prompts), PROBLEMS_AT_ONCE):
            part = prompts[first : first + PROBLEMS_AT_ONCE]
            made += whole.sample_all(part, n, first=first, **common, **options)
        return made

    made = {
        CAUTIOUS: cautious_texts(model, tokenizer, prompts, plan.samples, trace=trace, **common),
        PLAIN: plain(plan.votes),
        "sampling, T = 0.7": plain(plan.samples, temperature=0.7),
        "sampling, nucleus 0.9": plain(plan.samples, top_p=0.9),
        GREEDY: plain(1, temperature=0.0),
    }
    rows = {n: float(np.mean([len(c.tokens) for s in m for c in s])) for n, m in made.items()}
    rows[CAUTIOUS] = float(np.mean([one.forward_rows for one in trace]))
    right = {name: graded(samples, truths) for name, samples in made.items()}
    for name in (PLAIN, CAUTIOUS):
        if len(made[name][0]) >= VOTERS:
            right[f"vote, {name}"] = voted([each[:VOTERS] for each in made[name]], truths)
            rows[f"vote, {name}"] = VOTERS * rows[name]
    answer_report(report, right, rows, trace)


def graded(samples: list[list[Completion]], truths: list[int]) -> Float:
    """The share of each problem's samples that are right."""
    pairs = zip(samples, truths, strict=True)
    return np.array([np.mean([number_of(c) == truth for c in each]) for each, truth in pairs])


def voted(samples: list[list[Completion]], truths: list[int]) -> Float:
    """The probability that the vote over each problem's samples is right."""
    found = []
    for each, truth in zip(samples, truths, strict=True):
        answers = [number_of(completion) for completion in each]
        choice = majority_vote(AnswerPool.of(answers))
        found.append(choice @ np.array([answer == truth for answer in answers], np.float64))
    return np.array(found)


def answer_report(
    report: Report, right: dict[str, Float], taken: dict[str, float], trace: list[CautiousTokens]
) -> None:
    best_first = sorted(right.items(), key=lambda item: -item[1].mean())
    rows: list[list[Cell]] = [[n, bootstrap_interval(r), taken[n]] for n, r in best_first]
    title = f"SmolLM2-135M on {len(right[CAUTIOUS])} arithmetic problems, after four examples"
    branched = np.mean([one.branch_rate for one in trace])
    note = f"T = 1, votes of {VOTERS}. Intervals resample problems. Trials at {branched:.0%} of "
    note += "the cautious decisions."
    report.tables.append(ReportTable(title, ["way", "accuracy", "rows an answer"], rows, note=note))
    said = {
        PLAIN: "81.6 against 79.4 (Llama-3.1-8B, GSM8K)",
        GREEDY: "81.6 against 79.8 (Llama-3.1-8B, GSM8K)",
        f"vote, {PLAIN}": "(ours) about the same rows; in the paper a vote over 40 has 84.8",
    }
    for other, says in said.items():
        gain = bootstrap_interval(right[CAUTIOUS] - right[other])
        name = f"SmolLM2: accuracy of cautious decoding less that of {other}"
        holds = True if gain.above(0) else False if gain.below(0) else None
        report.claims.append(Claim.judge(name, says, gain, "interval above 0", holds))
