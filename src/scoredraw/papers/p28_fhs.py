"""First-hitting sampling of a masked text model: the same text in a tenth of the calls.

A small masked model of characters (`masked_text_model`), trained on docstrings, writes windows of
32 characters: by ancestral sampling in N steps, as common programs do it (a race of all characters
and "stay masked" at every masked place) and as we do (one draw a character), by first-hitting
sampling in one call a character and in fewer, in random order, from left to right, and by MaskGIT.
A block is a batch of 64 texts; methods share nothing but the model, and intervals are over blocks.
Texts are judged by an interpolated trigram model of the training text, and by the entropy of their
characters. Noise of few bits is drawn as such, and for a vocabulary of 50,257 computed as a law.

Zheng, Chen, Mao, Liu, Zhu and Zhang, "Masked diffusion models are secretly time-agnostic masked
models and exploit inaccurate categorical sampling", ICLR 2025, arXiv 2409.02908.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.diffusion import low_precision as low
from scoredraw.diffusion.first_hitting import FirstHittingSampler
from scoredraw.diffusion.masked_diffusion import (
    AncestralSampler,
    ConfidenceSampler,
    MaskedSampler,
    MaskedState,
    OrderedSampler,
    at,
    law,
    masked_language_model,
)
from scoredraw.diffusion.masked_likelihood import masked_nelbo
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers import masked_text_model as text
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Float = NDArray[np.float64]
Int = NDArray[np.int64]

FIRST, ANCESTRAL, AGAIN, RACE = "first-hitting", "ancestral", "ancestral, other seed", "textbook"
RANDOM, LEFT, MASKGIT = "random order", "left to right", "MaskGIT"
HELD_OUT, UNIFORM = "held-out text", "uniform characters"
CORRECTOR = "corrector"
EXACT_BITS = 53
ZIPF = 50_257
NOTES = [
    (
        "The paper measures generative perplexity by a large language model on OpenWebText; here a "
        "trigram model of the training text judges 32 characters, so that orderings compare and "
        "sizes do not. A vocabulary of 97 is small: what float32 does to one of 50,257 is given as "
        "a law, what 8 to 24 bits do to this one is drawn."
    ),
    (
        "The paper's speed-up is over ancestral sampling that races V + 1 classes at every masked "
        "place in every step. Drawing whom to show first needs one draw a token too, and then only "
        "the calls differ: as many as there are masks for one text, N for a large batch."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    blocks: int
    training: int
    batch: int = 64
    steps: int = 512  # N of ancestral sampling
    few_steps: int = 64
    bits: tuple[int, ...] = (8, 11, 16, 24)
    noisy_blocks: int = 4
    groups: tuple[int, ...] = (16, 8, 4)
    singles: int = 8  # texts that are timed one at a time
    scored: int = 512  # held-out windows
    per_package: int = 150


PLANS = {
    "smoke": Plan(
        2, 2, batch=3, steps=12, few_steps=4, bits=(8, 16), noisy_blocks=2, groups=(4,), singles=2,
        scored=8, per_package=4,
    ),
    "quick": Plan(
        3, 300, steps=128, few_steps=16, bits=(8, 16), noisy_blocks=3, singles=4, scored=128,
        per_package=50,
    ),
    "full": Plan(6, 2000),
    "study": Plan(64, 100_000, noisy_blocks=32, scored=2048),
}  # fmt: skip


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train, write, compare and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=28, scale=scale, seed=rng)
    with one_thread():
        found = Texts(plan, rng)
        exact, noisy = exact_arms(plan), noisy_arms(plan)
        for name, sampler in exact.items():
            found.write(name, sampler, plan.blocks)
        for name, sampler in noisy.items():
            found.write(name, sampler, plan.noisy_blocks)
        singles = {name: found.single(exact[name]) for name in (FIRST, ANCESTRAL, RACE)}
        likelihood = bounds(found, plan, rng)
    report.claims.extend([*sameness(plan, found), *costs(plan, found, singles)])
    report.claims.extend([*precision(plan, found), *zipf_claims(), *fewer_calls(plan, found)])
    report.claims.extend(time_claims(likelihood))
    report.tables.extend([method_table(plan, found), cost_table(found, singles)])
    report.tables.extend([bits_table(plan, found), zipf_table(), likelihood_table(likelihood)])
    report.figures.extend([zipf_figure(), bits_figure(plan, found)])
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────


class RacedFirstHitting(FirstHittingSampler):
    """First-hitting sampling whose tokens come from a race with noise of few bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def draw(self, state: MaskedState, logits: Tensor, where: tuple[Any, ...]) -> Tensor:
        source = torch.Generator().manual_seed(int(state.uniforms.key[0]) % 2**62 + state.index)
        p = law(at(logits, where), state.mask_id)
        drawn: Tensor = low.sample_categorical(p, self.bits, source)
        return drawn


def ancestral_name(bits: int, steps: int) -> str:
    return f"ancestral, {bits} bits, {steps} steps"


def grouped_name(calls: int, order: int, clock: str = "") -> str:
    return f"first-hitting, {calls} calls, order {order}" + (f" by {clock}" if clock else "")


def exact_arms(plan: Plan) -> dict[str, MaskedSampler]:
    arms: dict[str, MaskedSampler] = {
        FIRST: FirstHittingSampler(),
        ANCESTRAL: AncestralSampler(plan.steps),
        AGAIN: AncestralSampler(plan.steps),
        RACE: AncestralSampler(plan.steps, noise=EXACT_BITS),
        RANDOM: OrderedSampler("random"),
        LEFT: OrderedSampler("left-to-right"),
        MASKGIT: ConfidenceSampler(text.LENGTH),
    }
    for n in plan.groups:
        arms[grouped_name(n, 1)] = FirstHittingSampler(steps=n)
        for clock in ("time", "count"):
            arms[grouped_name(n, 2, clock)] = FirstHittingSampler(steps=n, order=2, clock=clock)
    for n in plan.groups:  # one call less to draw, one to correct the last group
        corrected = FirstHittingSampler(steps=n - 1, order=2, corrector=True)
        arms[grouped_name(n, 2, CORRECTOR)] = corrected
    return arms


def noisy_arms(plan: Plan) -> dict[str, MaskedSampler]:
    arms: dict[str, MaskedSampler] = {}
    for steps in (plan.few_steps, plan.steps):
        for bits in (*plan.bits, EXACT_BITS):
            arms[ancestral_name(bits, steps)] = AncestralSampler(steps, noise=bits)
    for bits in (*plan.bits, EXACT_BITS):
        arms[f"{FIRST}, {bits} bits"] = RacedFirstHitting(bits)
    return arms


class Texts:
    """What every method wrote: tokens (blocks, batch, L), calls, draws and processor seconds."""

    def __init__(self, plan: Plan, rng: int) -> None:
        self.plan, self.rng = plan, rng
        self.corpus = text.corpus(plan.per_package)
        model = text.masked_text_model(self.corpus.train, plan.training, rng)
        self.model = masked_language_model(model)
        self.judge = text.Trigrams(self.corpus.train)
        self.tokens: dict[str, Int] = {}
        self.cost: dict[str, Float] = {}  # (blocks, 3)
        shape = (plan.blocks, plan.batch, text.LENGTH)
        random = np.random.default_rng(rng)
        self.tokens[UNIFORM] = random.integers(0, text.V, shape)
        rows = random.permutation(np.resize(self.corpus.held_out, (shape[0] * shape[1], shape[2])))
        self.tokens[HELD_OUT] = rows.reshape(shape)

    def write(self, name: str, sampler: MaskedSampler, blocks: int) -> None:
        """Every method its own seeds, so that no two share noise."""
        first = 10_000 * (self.rng + 1) + 100 * len(self.tokens)
        made, cost = [], []
        for block in range(blocks):
            tokens, spent = self.timed(sampler, self.plan.batch, first + block)
            made.append(tokens)
            cost.append(spent)
        self.tokens[name], self.cost[name] = np.stack(made), np.array(cost, np.float64)

    def single(self, sampler: MaskedSampler) -> Float:
        """Calls, draws and seconds of one text at a time, (singles, 3)."""
        runs = [self.timed(sampler, 1, block)[1] for block in range(self.plan.singles)]
        return np.array(runs, np.float64)

    def timed(self, sampler: MaskedSampler, rows: int, seed: int) -> tuple[Int, tuple[Any, ...]]:
        x = torch.full((rows, text.LENGTH), text.MASK)
        start = time.process_time()
        made = sampler.sample(self.model, x, text.MASK, seed)
        spent = made.nfe, made.draws, time.process_time() - start
        return made.tokens.numpy(), spent

    def entropy(self, name: str) -> Float:
        """Of the characters of a block, in nats, (blocks,)."""
        return np.array([low.entropy(text.share(block, 1)) for block in self.tokens[name]])

    def surprise(self, name: str) -> Float:
        """-log p a character under the trigram model, nats, (blocks,)."""
        return np.array([self.judge.surprise(block) for block in self.tokens[name]])

    def distance(self, a: str, b: str, size: int) -> Float:
        """Total variation between the frequencies of single characters or pairs, (blocks,)."""
        both = zip(self.tokens[a], self.tokens[b], strict=True)
        gaps = [abs(text.share(x, size) - text.share(y, size)).sum() for x, y in both]
        return np.array(gaps) / 2


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def sameness(plan: Plan, found: Texts) -> list[Claim]:
    """Distances from ancestral sampling, in units of that between two ancestral runs."""
    says = "the same law as ancestral sampling with many steps, N → ∞"
    claims = []
    for name in (FIRST, RANDOM):
        for size, of in ((1, "characters"), (2, "pairs")):
            ratio = found.distance(name, ANCESTRAL, size) / found.distance(AGAIN, ANCESTRAL, size)
            title = f"{name}: distance of {of} from ancestral, in that of two ancestral runs"
            claims.append(Claim.at_most(title, says, mean_interval(ratio), 1.5))
    gap = paired_difference(found.surprise(FIRST), found.surprise(ANCESTRAL))
    title = "first-hitting minus ancestral: trigram surprise, nats"
    claims.append(Claim.within(title, "equal quality", gap, -0.1, 0.1))
    gap = paired_difference(found.entropy(FIRST), found.entropy(MASKGIT))
    says = "not in the paper: keeping what is surest first is another law"
    claims.append(Claim.at_least("MaskGIT: entropy of characters lost, nats", says, gap, 0.0))
    return claims


def costs(plan: Plan, found: Texts, singles: dict[str, Float]) -> list[Claim]:
    """Draws and processor time against ancestral sampling, in batches and one at a time."""
    ours = found.cost[FIRST]
    claims = []
    draws = mean_interval(found.cost[RACE][:, 1] / ours[:, 1])
    says = "L categorical draws, where ancestral sampling makes one a masked token and step"
    claims.append(Claim.at_least(f"{RACE} ancestral: its draws in ours", says, draws, 10.0))
    for name in (RACE, ANCESTRAL):
        gain = mean_interval(found.cost[name][:, 2] / ours[:, 2])
        title = f"{name}, batch of {plan.batch}: its processor time in first-hitting's"
        says = "about 20 times faster (OpenWebText, vocabulary 50,257)"
        claims.append(Claim.at_least(title, says, gain, 5.0))
    for name, bound in ((RACE, 2.0), (ANCESTRAL, 1.0)):
        gain = mean_interval(singles[name][:, 2] / singles[FIRST][:, 2])
        title = f"{name}, one text at a time, cached: its processor time in first-hitting's"
        says = "with the cache an ancestral run makes at most L calls: its best case"
        claims.append(Claim.at_least(title, says, gain, bound))
    return claims


def precision(plan: Plan, found: Texts) -> list[Claim]:
    """Entropy lost with few bits, more of it with more steps, and hardly any by first-hitting."""
    says = "low-precision noise lowers the temperature; more steps make it worse"
    claims = []

    def lost(bits: int, steps: int) -> Float:
        full = found.entropy(ancestral_name(EXACT_BITS, steps))
        return np.asarray(full - found.entropy(ancestral_name(bits, steps)))

    few, many = plan.few_steps, plan.steps
    for bits in (b for b in plan.bits if b <= 16):
        title = f"ancestral, {bits} bits, {many} steps: entropy lost, nats"
        claims.append(Claim.at_least(title, says, mean_interval(lost(bits, many)), 0.0))
        more = paired_difference(lost(bits, many), lost(bits, few))
        title = f"ancestral, {bits} bits: entropy lost in {many} steps minus in {few}"
        claims.append(Claim.at_least(title, says, more, 0.0))
    names = ancestral_name(16, few), ancestral_name(16, many)
    gain = paired_difference(*(found.surprise(name) for name in names))
    title = f"16 bits: trigram surprise falls from {few} to {many} steps, nats"
    says = "generative perplexity keeps falling with the steps while diversity collapses"
    claims.append(Claim.at_least(title, says, gain, 0.0))
    names = ancestral_name(EXACT_BITS, few), ancestral_name(EXACT_BITS, many)
    gain = paired_difference(*(found.surprise(name) for name in names))
    title = f"float64: trigram surprise falls from {few} to {many} steps, nats"
    claims.append(Claim.within(title, "with float64 it does not go on falling", gain, -0.1, 0.1))
    for bits in (b for b in plan.bits if b >= 16):
        full, cut = (found.entropy(f"{FIRST}, {b} bits") for b in (EXACT_BITS, bits))
        title = f"first-hitting, {bits} bits: entropy lost, nats"
        gap = paired_difference(full, cut)
        claims.append(Claim.within(title, "direct draws are nearly immune", gap, -0.1, 0.1))
    return claims


def fewer_calls(plan: Plan, found: Texts) -> list[Claim]:
    """What order 2 is worth where several tokens are drawn from one call."""
    says = "a second order makes parallel decoding better"
    claims = []
    for n in plan.groups:
        for clock in ("time", "count", CORRECTOR):
            names = grouped_name(n, 1), grouped_name(n, 2, clock)
            gain = paired_difference(*(found.surprise(name) for name in names))
            title = f"{n} calls: trigram surprise saved by order 2 by {clock}, nats"
            claims.append(Claim.at_least(title, says, gain, 0.0))
    return claims


# ── the law of float32, for a vocabulary of 50,257 ──────────────────────────────────────────────

ZIPF_STEPS = (16, 64, 256, 1024, 4096, 16_384, 50_000)


def zipf() -> Float:
    p = 1 / (np.arange(1, ZIPF + 1) + 2.7)
    return np.asarray(p / p.sum())


def shown(step: Float) -> Float:
    """The law of the token, given that the mask, which is last, does not win."""
    return np.asarray(step[:-1] / step[:-1].sum())


def zipf_laws() -> dict[int, dict[str, Float]]:
    """Of a token shown in an ancestral step of N, from t = 1 and 1/2, with 24 bits."""
    p, laws = zipf(), {}
    for n in ZIPF_STEPS:
        one, half = low.unmasking_probs(p, 1 / n), low.unmasking_probs(p, 2 / n)
        laws[n] = {
            "truncated, t = 1": shown(low.truncated_categorical_probs(one, "float32")),
            "truncated, t = 1/2": shown(low.truncated_categorical_probs(half, "float32")),
            "grid, t = 1": shown(low.grid_categorical_probs(one, "float32", dominated=True)),
            "grid, t = 1/2": shown(low.grid_categorical_probs(half, "float32", dominated=True)),
        }
    return laws


def zipf_claims() -> list[Claim]:
    """Exact laws, without an interval."""
    p, laws = zipf(), zipf_laws()
    true = low.entropy(p)
    says = "float32: entropy collapses with the steps, as at a lower temperature"
    lost = true - low.entropy(laws[4096]["grid, t = 1"])
    claims = [Claim.at_least("V = 50,257, 4,096 steps, float32: entropy lost", says, lost, 1.0)]
    T = low.effective_temperature(p, laws[1024]["grid, t = 1"])
    title = "V = 50,257, 1,024 steps, float32: temperature of the same entropy"
    claims.append(Claim.at_most(title, says, T, 0.9))
    direct = true - low.entropy(low.truncated_categorical_probs(p, "float32"))
    title = "V = 50,257, direct draw (first-hitting), float32: entropy lost"
    claims.append(Claim.at_most(title, "nearly immune", direct, 0.02))
    step = low.unmasking_probs(p, 1 / 4096)
    double = true - low.entropy(shown(low.truncated_categorical_probs(step, "float64")))
    title = "V = 50,257, 4,096 steps, float64: entropy lost"
    claims.append(Claim.at_most(title, "float64 repairs it", double, 1e-3))
    return claims


def zipf_table() -> ReportTable:
    p, laws = zipf(), zipf_laws()
    names = list(next(iter(laws.values())))
    rows: list[list[Cell]] = [
        [
            n, *(low.entropy(laws[n][name]) for name in names),
            low.effective_temperature(p, laws[n]["grid, t = 1"]),
        ]
        for n in ZIPF_STEPS
    ]  # fmt: skip
    direct = (low.entropy(low.truncated_categorical_probs(p, noise)) for noise in (24, 11, 8))
    note = (
        f"Exact laws for p ∝ 1/(k + 2.7), k = 1 .. {ZIPF:,}, whose entropy is {low.entropy(p):.3f} "
        "nats. Drawn directly, as first-hitting does, with 24, 11 and 8 bits (truncated): "
        + ", ".join(f"{value:.3f}" for value in direct) + "."
    )  # fmt: skip
    title = "Entropy of a token that float32 noise shows in an ancestral step"
    return ReportTable(title, ["steps", *names, "temperature, grid, t = 1"], rows, note)


def zipf_figure() -> Figure:
    laws = zipf_laws()
    series = [
        Series(name, ZIPF_STEPS, [low.entropy(laws[n][name]) for n in ZIPF_STEPS])
        for name in next(iter(laws.values()))
    ]
    exact = [low.entropy(zipf())] * len(ZIPF_STEPS)
    series.append(Series("float64", ZIPF_STEPS, exact, baseline=True))
    return Figure(
        "line", "What float32 noise does to a vocabulary of 50,257", "ancestral steps",
        "entropy of a shown token, nats", series, log_x=True,
    )  # fmt: skip


# ── the bound, with time and without ────────────────────────────────────────────────────────────

CLOCKS = {"without time": None, "linear": "linear", "cosine": "cosine"}


def bounds(found: Texts, plan: Plan, rng: int) -> dict[tuple[str, str], Float]:
    """Nats a character of held-out windows, 8 terms each: (estimator, spread) -> terms (B, 8)."""
    rows = torch.from_numpy(found.corpus.held_out[: plan.scored])
    made = {}
    for k, (name, schedule) in enumerate(CLOCKS.items()):
        for spread in ("independent", "stratified"):
            bound = masked_nelbo(
                found.model, rows, text.MASK, 8, 100 * rng + k, spread=spread, schedule=schedule
            )
            made[name, spread] = bound.terms / text.LENGTH
    return made


def time_claims(likelihood: dict[tuple[str, str], Float]) -> list[Claim]:
    says = "the bound does not depend on the schedule, nor on time"
    claims = []
    free = likelihood["without time", "stratified"].mean(axis=1)
    for name in list(CLOCKS)[1:]:
        gap = paired_difference(likelihood[name, "stratified"].mean(axis=1), free, comparisons=2)
        title = f"bound by the {name} schedule minus without time, nats a character"
        claims.append(Claim.within(title, says, gap, -0.1, 0.1))
    timed, untimed = (likelihood[name, "independent"].var() for name in ("linear", "without time"))
    title = "variance of a term: linear schedule in that without time"
    says = "not in the paper: n is random given t"
    return [*claims, Claim.at_least(title, says, float(timed / untimed), 1.0)]


def likelihood_table(likelihood: dict[tuple[str, str], Float]) -> ReportTable:
    rows: list[list[Cell]] = [
        [name, spread, mean_interval(terms.mean(axis=1)), float(terms.std(axis=1).mean())]
        for (name, spread), terms in likelihood.items()
    ]
    columns = ["estimator", "n or t", "nats a character", "spread of a row's terms"]
    return ReportTable("The likelihood bound of held-out text", columns, rows)


# ── tables and figures ──────────────────────────────────────────────────────────────────────────


def method_table(plan: Plan, found: Texts) -> ReportTable:
    rows: list[list[Cell]] = []
    for name in [HELD_OUT, UNIFORM, *exact_arms(plan)]:
        cells: list[Cell] = [mean_interval(f(name)) for f in (found.surprise, found.entropy)]
        for size in (1, 2):
            same = name == ANCESTRAL
            cells.append(None if same else mean_interval(found.distance(name, ANCESTRAL, size)))
        rows.append([name, *cells])
    note = f"{plan.blocks} blocks of {plan.batch} texts; ancestral: {plan.steps} steps."
    columns = ["method", "trigram surprise", "entropy", "distance, characters", "pairs"]
    title = "What every method writes (nats; distances from ancestral)"
    return ReportTable(title, columns, rows, note)


def cost_table(found: Texts, singles: dict[str, Float]) -> ReportTable:
    rows: list[list[Cell]] = []
    for name in (FIRST, ANCESTRAL, RACE, RANDOM, LEFT, MASKGIT):
        batch: list[Cell] = [mean_interval(column) for column in found.cost[name].T]
        alone: list[Cell] = [None] * 3
        if name in singles:
            alone = [mean_interval(column) for column in singles[name].T]
        rows.append([name, *batch, *alone])
    one = [f"one text: {what}" for what in ("calls", "draws", "seconds")]
    columns = ["method", "calls", "draws", "seconds", *one]
    return ReportTable("Cost of a batch, and of one text (processor seconds)", columns, rows)


def bits_table(plan: Plan, found: Texts) -> ReportTable:
    rows: list[list[Cell]] = []
    for bits in (*plan.bits, EXACT_BITS):
        names = [ancestral_name(bits, steps) for steps in (plan.few_steps, plan.steps)]
        cells = [f(name) for name in (*names, f"{FIRST}, {bits} bits") for f in (
            found.entropy, found.surprise)]  # fmt: skip
        rows.append([bits, *(mean_interval(cell) for cell in cells)])
    arms = (f"{plan.few_steps} steps", f"{plan.steps} steps", FIRST)
    columns = ["bits", *(f"{arm}: {what}" for arm in arms for what in ("entropy", "surprise"))]
    return ReportTable("Noise of few bits, drawn (nats)", columns, rows)


def bits_figure(plan: Plan, found: Texts) -> Figure:
    bits = (*plan.bits, EXACT_BITS)
    arms = {f"ancestral, {n} steps": [ancestral_name(b, n) for b in bits] for n in (
        plan.few_steps, plan.steps)}  # fmt: skip
    arms[FIRST] = [f"{FIRST}, {b} bits" for b in bits]
    series = []
    for name, each in arms.items():
        cells = [mean_interval(found.entropy(arm)) for arm in each]
        value, down, up = ([getattr(c, end) for c in cells] for end in ("value", "low", "high"))
        series.append(Series(name, bits, value, down, up, baseline=name == FIRST))
    return Figure(
        "line", "Diversity against the bits of the noise", "bits",
        "entropy of the characters, nats", series,
    )  # fmt: skip
