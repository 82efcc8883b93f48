"""Alignment resampling: does the best of n watermarked stories make up for the watermark?

A small story model goes on from the beginnings of its own stories, without a watermark, with a
green list, with the Gumbel schemes, permute-and-flip, and SynthID as transformers has it. Two
rewards: how cheerful a text is (VADER's compound score), and how little it repeats itself (minus
the share of its trigrams that were there before). The best of n is an exact expectation over all
n of the candidates; the best of n without a watermark stands beside it.

Verma, Phan and Trivedi, "Watermarking degrades alignment in language models: analysis and
mitigation", 2025, arXiv 2506.04462.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import kstest

from scoredraw import categorical
from scoredraw.answers import expected_maximum
from scoredraw.errors import MissingExtraError, import_extra
from scoredraw.language import alignment_resampling as resampling
from scoredraw.language import watermark_detection as detection
from scoredraw.language.alignment_resampling import chooser, expected_gain
from scoredraw.language.watermarks import Watermark, expected_gumbel_score, model_law
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.small_models import stories_model
from scoredraw.token_sampling import Choose, Tokens, sample_tokens

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Reward = Callable[[Sequence[str]], Float]

PLAIN, GREEN, RANDOMISED = "no watermark", "green list", "randomised Gumbel"
GUMBEL, PERMUTE, SYNTHID = "Gumbel", "permute-and-flip", "SynthID"
CHEER, VARIETY = "VADER", "variety"
SIZES = (1, 2, 4, 8)
ADVISED = 4  # candidates: the paper advises 2 to 4
CONTEXT = 2
DEPTH = 10  # of SynthID's tournament
DECADES = 0.5  # of p that the choice may cost
FOUND = 1e-3
SHARE = 0.2  # of a gain by the reward that may come of perplexity; of σ e_n that a gain may be off
FIT = 0.95
DETECTABLE = "the watermark remains strongly detectable"
NOTES = (
    "The paper's aligned models, benchmarks and preference models are beyond this machine.",
    "Guard attenuation and amplification, and Phi-3-Mini's 43.5 % more refusals: not measured.",
    "The story model is not aligned: this shows the arithmetic of the best of n, not its gap.",
    "VADER ends at 1, variety at 0: near the end gains fall short of σ e_n, and of √log n.",
)


@dataclass(frozen=True)
class Plan:
    """How much a scale runs; keys of the watermarked arms, candidates a prompt and key."""

    prompts: int
    candidates: int
    keys: int
    tokens: int
    long: int  # tokens of the longer texts
    long_candidates: int
    synthid: int  # prompts
    null_texts: int
    resamples: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(n for n in SIZES if n <= self.candidates)


PLANS = {
    "smoke": Plan(2, 4, 1, 6, 8, 2, 1, 100, 100),
    "quick": Plan(14, 8, 1, 60, 120, 2, 4, 2000, 1000),
    "full": Plan(40, 8, 3, 60, 120, 2, 20, 10_000, 4000),
    "study": Plan(40, 16, 3, 60, 120, 16, 40, 100_000, 10_000),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Laws first, then stories; without the story model's file a note stands in their place."""
    plan = PLANS[scale]
    report = Report(paper=13, scale=scale, seed=rng, notes=list(NOTES))
    add_null(report, plan, rng)
    report.claims.extend(gaussian_claims(10 * plan.null_texts, rng))
    try:
        stories = Stories(plan, rng)
    except MissingExtraError as missing:
        report.notes.append(f"No stories were written: {missing}.")
        return report
    report.notes.extend(stories.notes)
    add_rewards(report, stories, plan)
    add_detection(report, stories, plan)
    report.claims.append(gumbel_claim(stories))
    return report


# ── laws without a model ────────────────────────────────────────────────────────────────────────


def add_null(report: Report, plan: Plan, rng: int) -> None:
    """P-values of texts that know no key: uniform, or where they are discrete never too small."""
    v, length = 256, 40
    texts = list(np.random.default_rng(rng).integers(v, size=(plan.null_texts, length)))
    gumbel = detection.detect_texts(texts, Watermark(v, "gumbel", key=rng + 1, context=CONTEXT))
    green = detection.detect_texts(texts, Watermark(v, "kgw", key=rng + 1, context=CONTEXT))
    released = ndtr(
        -detection.score_z(gumbel.statistic, gumbel.n_scored, detection.GUMBEL_DEVIATION)
    )
    exact, off = (float(kstest(p, "uniform").pvalue) for p in (gumbel.p_value, released))
    level = 0.01
    share = mean_interval((green.p_value <= level).astype(np.float64), level=0.999)
    of = f"{plan.null_texts:,} random texts"
    says = "not in the paper, which needs it: no watermark where none was written"
    report.claims.extend([
        Claim.at_least(f"KS test of Gumbel p-values of {of} against uniform", says, exact, 0.001,
                       "p of the test at least 0.001"),
        Claim.at_most(f"the same with the deviation π/√6 of released code, {of}",
                      "released code: z = (mean - 1) √T / (π/√6)", off, 0.001,
                      "visibly not uniform: p of the test at most 0.001"),
        Claim.judge(f"share of {of} whose green tokens have p ≤ {level:g}", says, share,
                    f"99.9 % interval not above {level:g}", share.low <= level),
    ])  # fmt: skip
    grid = np.linspace(0, 1, 41).tolist()
    series = [Series("uniform", grid, grid, baseline=True)]
    for name, p in (
        ("Gumbel, exact", gumbel.p_value), ("Gumbel, released z", released),
        ("green list, exact", green.p_value),
    ):  # fmt: skip
        shares = np.searchsorted(np.sort(p), grid, side="right") / len(p)
        series.append(Series(name, grid, shares.tolist()))
    title = "Texts that know no key: the share with a p-value of at most that"
    report.figures.append(Figure("line", title, "p-value", "share of texts", series))


def gaussian_claims(prompts: int, rng: int) -> list[Claim]:
    """The best of n Gaussian rewards gains e_n, which is above the bound for every n."""
    rewards = np.random.default_rng(rng).standard_normal((prompts, ADVISED))
    best = np.take_along_axis(rewards, resampling.select_candidates(rewards)[:, None], 1)[:, 0]
    off = mean_interval(best - expected_gain(ADVISED), level=0.999)
    every = np.unique(np.geomspace(1, 10**6, 300).astype(np.int64))
    slack = float((expected_gain(every) - resampling.gain_bound(every)).min())
    says = "E r(best of n) - μ_ref ≥ C √(log n) - ε"
    return [
        Claim.judge(f"gain of the best of {ADVISED} of N(0, 1), less e_{ADVISED}", says, off,
                    "99.9 % interval holds 0", off.low <= 0 <= off.high),
        Claim.at_least("the least of e_n - √(log n)/√(π log 2), n = 1 to a million", says, slack,
                       -1e-12, "at least 0, to rounding"),
    ]  # fmt: skip


# ── stories ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Arm:
    """What one way of writing gave: P prompts, K keys, m candidates.

    rewards: name -> (P, K, m); logprobs (P, K, m), a token; log10_p (P, K, m), of the arm's own
    detector. long: log10_p of texts cut at `tokens` and at `long`, (2, P, m'), of the first key.
    """

    rewards: dict[str, Float]
    logprobs: Float
    log10_p: Float | None = None
    long: Float | None = None

    def best(self, by: str, n: int, of: str = "") -> Float:
        """What the best of n has of `of` (the same), expected for each prompt: (P,)."""
        return np.asarray(
            expected_maximum(self.column(by), n, self.column(of or by))[..., 0].mean(axis=1)
        )

    def column(self, name: str) -> Float:
        """A reward, or "perplexity" (the lower the better) or "log10 p": (P, K, m)."""
        own = {"perplexity": self.logprobs, "log10 p": self.log10_p}
        return np.asarray(own[name] if name in own else self.rewards[name])

    def spread(self, reward: str) -> Float:
        """The variance within each prompt, (P,); its mean is σ²."""
        return np.asarray(self.rewards[reward].var(axis=2, ddof=1).mean(axis=1))


class Stories:
    """The arms, all from the same beginnings, which the model wrote itself.

    Every prompt has keys of its own: with one key for all, beginnings that end in the same two
    words would meet the same numbers, and their stories would be no independent observations.
    """

    def __init__(self, plan: Plan, rng: int) -> None:
        self.plan, self.rng, self.notes = plan, rng, list[str]()
        self.model, self.tokenizer = stories_model()
        begun = sample_tokens(self.model, [[1]], plan.prompts, max_tokens=8, end=[2], rng=rng)[0]
        self.prompts = [[1, *made.ids.tolist()] for made in begun]
        self.rewards: dict[str, Reward] = {VARIETY: variety}
        try:
            self.rewards = {CHEER: cheer(), **self.rewards}
        except MissingExtraError as missing:
            self.notes.append(f"The reward {CHEER} is left out: {missing}.")
        self.arms = {PLAIN: self.arm(None), GREEN: self.arm("kgw")}
        self.arms[RANDOMISED] = self.arm("randomised")
        self.arms[GUMBEL], self.scores, self.expected = self.gumbel()
        self.arms[PERMUTE], self.arms[SYNTHID] = self.arm("permute_and_flip", 1), self.synthid()

    def sample(
        self, choose: Any, n: int, tokens: int, stream: int, prompts: Sequence[list[int]] = ()
    ) -> list[list[Tokens]]:
        return sample_tokens(
            self.model, prompts or self.prompts, n, choose=choose, max_tokens=tokens, end=[2],
            rng=1000 * self.rng + stream,
        )  # fmt: skip

    def marks(self, scheme: str, key: int) -> list[Watermark]:
        """The watermark of each prompt under its key of that number."""
        v, first = int(self.model.config.vocab_size), 1_000_000 * self.rng + 1000 * key
        return [Watermark(v, scheme, key=first + i, context=CONTEXT, delta=4.0)
                for i in range(len(self.prompts))]  # fmt: skip

    def arm(self, scheme: str | None, n: int = 0) -> Arm:
        """Candidates of each prompt under each key; n = 1 for a scheme that is fixed by it."""
        plan, each, n = self.plan, [], n or self.plan.candidates
        for key in range(plan.keys if scheme and n > 1 else 1):
            marks = self.marks(scheme, key) if scheme else None
            made = self.sample(by_prompt(marks, n), n, plan.tokens, key)
            each.append(self.judged(made, marks))
        rewards = {name: np.hstack([a.rewards[name] for a in each]) for name in self.rewards}
        found = [a.log10_p for a in each if a.log10_p is not None]
        logprobs = np.hstack([a.logprobs for a in each])
        arm = Arm(rewards, logprobs, np.hstack(found) if found else None)
        if scheme and n > 1:
            marks, few = self.marks(scheme, 0), plan.long_candidates
            made = self.sample(by_prompt(marks, few), few, plan.long, 0)
            arm.long = np.stack([log10_p(made, marks, cut) for cut in (plan.tokens, plan.long)])
        return arm

    def judged(self, made: list[list[Tokens]], marks: list[Watermark] | None) -> Arm:
        """Rewards, log-probabilities and p-values, (P, 1, m) each."""
        flat = [tokens for samples in made for tokens in samples]
        shape = (len(made), 1, -1)
        texts = self.tokenizer.batch_decode([t.ids for t in flat], skip_special_tokens=True)
        rewards = {name: reward(texts).reshape(shape) for name, reward in self.rewards.items()}
        logprobs = np.array([t.logprobs.mean() for t in flat]).reshape(shape)
        return Arm(rewards, logprobs, None if marks is None else log10_p(made, marks)[:, None])

    def gumbel(self) -> tuple[Arm, Float, Float]:
        """One text a prompt; of tokens in new contexts, the score and what to expect of it.

        In a context that the text has met before, u is no longer fresh.
        """
        marks, hopes = self.marks("gumbel", 0), list[Float]()
        choose = by_prompt(marks, 1)

        def recorded(ids: Any, logits: Any, u: Float, rows: Any) -> Any:
            hopes.append(np.zeros(len(marks)))
            hopes[-1][rows] = expected_gumbel_score(model_law(logits).exp())
            return choose(ids, logits, u, rows)

        made = self.sample(recorded, 1, self.plan.tokens, 0)
        scores, expected = [], []
        for mark, prompt, (tokens,), hope in zip(
            marks, self.prompts, made, np.stack(hopes, axis=1), strict=True
        ):
            _, contexts, new = detection.windows([[*prompt[-CONTEXT:], *tokens.ids]], mark, "none")
            first = np.sort(np.unique(contexts, axis=0, return_index=True)[1])
            scores.append(detection.keyed_values(contexts[first], new[first], mark))
            expected.append(hope[first])
        return self.judged(made, marks), np.concatenate(scores), np.concatenate(expected)

    def synthid(self) -> Arm:
        """transformers' SynthID with a tournament of ten rounds, on fewer prompts."""
        import torch
        from transformers import SynthIDTextWatermarkLogitsProcessor as Processor

        rounds = np.random.default_rng(self.rng).integers(1, 2**20, size=DEPTH).tolist()
        make = partial(Processor, CONTEXT + 1, rounds, 2**16, 0, 1024, "cpu")
        prompts = self.prompts[: self.plan.synthid]
        processors = [make() for _ in prompts]  # few rows each: one holds V x rounds numbers

        def choose(ids: Any, logits: Any, u: Float, rows: Any) -> Any:
            every = (x.new_zeros((len(prompts), ADVISED, x.shape[-1])) for x in (ids, logits))
            text, scores = every  # rows that have ended stay 0
            place = tuple(map(torch.as_tensor, np.divmod(rows, ADVISED)))
            text[place], scores[place] = ids, logits
            laws = torch.stack([f(*x) for f, *x in zip(processors, text, scores, strict=True)])
            return categorical.invert(categorical.normalize(laws[place]), u)

        made = self.sample(choose, ADVISED, self.plan.tokens, 0, prompts)
        arm = self.judged(made, None)
        p = detection.detect_synthid(
            [tokens.ids for samples in made for tokens in samples], make()
        ).p_value
        arm.log10_p = np.log10(p).reshape(len(made), 1, -1)
        return arm


def by_prompt(marks: list[Watermark] | None, n: int) -> Choose:
    """The choice of a token where the n rows of each prompt have a watermark of their own."""
    if marks is None:
        return chooser(None)
    import torch

    own = [chooser(mark) for mark in marks]

    def choose(ids: Any, logits: Any, u: Float, rows: Any) -> Any:
        here = [(own[i], np.flatnonzero(rows // n == i)) for i in np.unique(rows // n)]
        return torch.cat([f(ids[r], logits[r], u[r], rows[r]) for f, r in here])

    return choose


def log10_p(made: list[list[Tokens]], marks: list[Watermark], cut: int | None = None) -> Float:
    """Of each text, or of its first tokens: (P, m)."""
    return np.log10([
        np.maximum(detection.detect_texts([t.ids[:cut] for t in samples], mark).p_value, 1e-300)
        for samples, mark in zip(made, marks, strict=True)
    ])  # fmt: skip


def cheer() -> Reward:
    """VADER's compound score, from -1 to 1. Raises `MissingExtraError` without the package."""
    module = import_extra("vaderSentiment.vaderSentiment", "dev")
    analyzer = module.SentimentIntensityAnalyzer()

    def reward(texts: Sequence[str]) -> Float:
        return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])

    return reward


def variety(texts: Sequence[str]) -> Float:
    """Minus the share of a text's trigrams of words that stand in it already."""
    shares = []
    for text in texts:
        words = text.lower().split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        shares.append(len(set(trigrams)) / len(trigrams) - 1 if trigrams else 0.0)
    return np.array(shares)


# ── what the best of n gains ────────────────────────────────────────────────────────────────────


def add_rewards(report: Report, stories: Stories, plan: Plan) -> None:
    over = partial(bootstrap_interval, resamples=plan.resamples)
    plain = stories.arms[PLAIN]
    for reward in plain.rewards:
        add_curves(report, stories, reward, plan)
        one = plain.best(reward, 1)
        rows: list[list[Cell]] = []
        for name in (GREEN, RANDOMISED):
            arm = stories.arms[name]
            gap, sigma = over(one - arm.best(reward, 1)), math.sqrt(arm.spread(reward).mean())
            best = arm.best(reward, ADVISED)
            made_up, same = over(best - one), over(best - plain.best(reward, ADVISED))
            ratios = [gain_ratio(arm, reward, n, over) for n in plan.sizes[1:]]
            needed = resampling.ar_required_n(gap.value, sigma) if gap.value < 5 * sigma else None
            rows.append([name, gap, sigma, needed, made_up, same, *ratios])
            which, n = f"{name}, {reward}", plan.sizes[-1]
            report.claims.extend([
                Claim.at_least(f"{which}: mean without a watermark - with it",
                               "watermarks degrade alignment", gap, 0.0),
                Claim.at_least(f"{which}: best of {ADVISED} with a watermark - one text without",
                               "2 to 4 samples recover or exceed the unwatermarked reward",
                               made_up, 0.0),
                Claim.within(f"{which}: gain of the best of {n} as a multiple of σ e_{n}",
                             "derived for Gaussian rewards", ratios[-1], 1 - SHARE, 1 + SHARE),
                root_log_claim(which, arm, reward, over),
            ])  # fmt: skip
            if reward == CHEER:
                report.claims.append(perplexity_claim(name, arm, over))
        columns = [
            "", "ε: without - with it", "σ", "n to make up for ε",
            f"best of {ADVISED} - one without", f"best of {ADVISED} - best of {ADVISED} without",
            *(f"gain / σ e_n, n = {n}" for n in plan.sizes[1:]),
        ]  # fmt: skip
        report.tables.append(ReportTable(f"What resampling buys, {reward}", columns, rows))


def gain_ratio(arm: Arm, reward: str, n: int, over: Callable[..., Estimate]) -> Estimate:
    gain = arm.best(reward, n) - arm.best(reward, 1)
    rows = np.stack([gain, arm.spread(reward)], axis=1)

    def ratio(values: Float, axis: int = 0) -> Any:
        mean = values.mean(axis)
        with np.errstate(invalid="ignore"):  # 0 / 0 where nothing varies, which decides nothing
            return mean[..., 0] / (np.sqrt(mean[..., 1]) * expected_gain(n))

    return over(rows, statistic=ratio)


def root_log_claim(name: str, arm: Arm, reward: str, over: Callable[..., Estimate]) -> Claim:
    sizes = np.arange(1, arm.rewards[reward].shape[2] + 1)
    means = np.stack([arm.best(reward, n) for n in sizes], axis=1)
    root = np.sqrt(np.log(sizes))

    def r_squared(rows: Float, axis: int = 0) -> Any:
        curve = rows.mean(axis)
        gain = curve - curve[..., :1]
        slope = (gain @ root / (root @ root))[..., None]
        left = ((gain - slope * root) ** 2).sum(-1)
        with np.errstate(invalid="ignore"):
            return 1 - left / (gain.var(axis=-1) * len(root))

    found, says = over(means, statistic=r_squared), "the gain in reward follows √log n"
    return Claim.at_least(f"{name}: R² of the gain as a multiple of √log n", says, found, FIT)


def perplexity_claim(name: str, arm: Arm, over: Callable[..., Estimate]) -> Claim:
    gain = arm.best("perplexity", ADVISED, CHEER) - arm.best(CHEER, 1)
    found = over(gain - SHARE * (arm.best(CHEER, ADVISED) - arm.best(CHEER, 1)))
    what = f"gain of the likeliest of {ADVISED}, less {SHARE:.0%} of the reward's"
    says = "choosing by the lowest perplexity does not help (README)"
    return Claim.at_most(f"{name}, {CHEER}: {what}", says, found, 0.0)


def add_curves(report: Report, stories: Stories, reward: str, plan: Plan) -> None:
    over = partial(bootstrap_interval, resamples=plan.resamples)
    rows: list[list[Cell]] = []
    series = []
    for name, arm in stories.arms.items():
        m = arm.rewards[reward].shape[2]
        sizes = [n for n in plan.sizes if n <= m]
        found = [over(arm.best(reward, n)) for n in sizes]
        by = over(arm.best("perplexity", ADVISED, reward)) if m >= ADVISED else None
        rows.append([name, arm.logprobs.size, *found, *[None] * (len(plan.sizes) - len(sizes)), by])
        if len(sizes) > 1:
            mid, low, high = ([getattr(e, at) for e in found] for at in ("value", "low", "high"))
            series.append(Series(name, sizes, mid, low, high, baseline=name == PLAIN))
    columns = ["", "texts", *(f"best of {n}" for n in plan.sizes), f"likeliest of {ADVISED}"]
    note = "The first or a random candidate has the reward of the best of 1. One text a prompt "
    note += f"where the key fixes it; {SYNTHID} on fewer prompts."
    report.tables.append(ReportTable(f"Mean {reward} by the best of n", columns, rows, note=note))
    title = f"{reward}: the best of n candidates"
    report.figures.append(Figure("line", title, "candidates n", reward, series, log_x=True))


# ── what it does to the watermark ───────────────────────────────────────────────────────────────


def add_detection(report: Report, stories: Stories, plan: Plan) -> None:
    middle = partial(bootstrap_interval, statistic=np.median, resamples=plan.resamples)
    rows: list[list[Cell]] = []
    for name, arm in stories.arms.items():
        if arm.log10_p is None:
            continue
        one, m = arm.log10_p.mean(axis=(1, 2)), arm.log10_p.shape[2]
        chosen = [arm.best(reward, ADVISED, "log10 p") if m >= ADVISED else None
                  for reward in arm.rewards]  # fmt: skip
        scores = -arm.log10_p.reshape(len(one), -1)
        pairs = [correlation(r.reshape(len(one), -1), scores, plan) if m > 1 else None
                 for r in arm.rewards.values()]  # fmt: skip
        longer = [None, None] if arm.long is None else [float(np.median(x)) for x in arm.long]
        found = float((arm.log10_p <= math.log10(FOUND)).mean())
        cells = [None if each is None else middle(each) for each in chosen]
        rows.append([name, middle(one), *cells, found, *longer, *pairs])
        if name not in (GREEN, RANDOMISED):
            continue
        for reward, each in zip(arm.rewards, chosen, strict=True):
            cost = middle(each - one)
            which = f"{name}: log10 p of the best of {ADVISED} by {reward} - of any, median"
            report.claims.append(Claim.at_most(which, DETECTABLE, cost, DECADES))
        assert arm.long is not None
        which, last = f"{name}: median log10 p after {plan.long} tokens", arm.long[1].mean(axis=1)
        report.claims.append(Claim.at_most(which, DETECTABLE, middle(last), math.log10(FOUND)))
    names = list(stories.arms[PLAIN].rewards)
    columns = [
        "", "of any", *(f"of the best of {ADVISED} by {name}" for name in names),
        f"share of texts with p ≤ {FOUND:g}", f"after {plan.tokens} tokens", f"{plan.long} tokens",
        *(f"correlation with {name}" for name in names),
    ]  # fmt: skip
    note = "Medians over prompts of the mean log10 p of a prompt's texts; correlation of the "
    note += "reward with -log10 p within prompts: where it is negative the choice costs power."
    report.tables.append(ReportTable("log10 p of the written texts", columns, rows, note=note))


def correlation(rewards: Float, scores: Float, plan: Plan) -> Estimate | None:
    """None where one of the two never varies."""
    if not (np.ptp(rewards, axis=1).any() and np.ptp(scores, axis=1).any()):
        return None
    return resampling.reward_score_correlation(rewards, scores, resamples=plan.resamples)


def gumbel_claim(stories: Stories) -> Claim:
    """The score of each token against Σ p_v H(1/p_v) of the model's own p."""
    off = stories.scores - stories.expected
    z = float(off.sum() / np.sqrt((off**2).sum()))
    name = f"plain Gumbel: {stories.scores.mean():.3f} a token, {stories.expected.mean():.3f} by "
    name += f"its law; {len(off):,} tokens, standard errors apart"
    says = "derived: a token's mean score is Σ p_v H(1/p_v)"
    return Claim.within(name, says, z, -3.0, 3.0)
