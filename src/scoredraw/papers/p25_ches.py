"""Likelihood displacement: is it foretold by how alike two answers' hidden states are?

*Features*: the model without constraints, an unembedding matrix and one free vector a context, in
which the speed of the chosen answer's log-likelihood is known exactly. *Letters*: a transformer of
two layers, trained on the Python files of the standard library, takes one step of DPO on one pair
at a time, always from the same weights; the chosen answer is what the file says, the other one a
letter off, from elsewhere, or noise. Scores are compared by their rank correlation with how far
the chosen answer fell; and windows of their order are trained on, as in the paper. A language
model and real answers, from full scale on: `preference_study`.

Razin, Malladi, Bhaskar, Chen, Arora and Hanin, "Unintentional Unalignment: Likelihood
Displacement in Direct Preference Optimization", ICLR 2025, arXiv 2410.08847.
"""

from __future__ import annotations

import hashlib
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.data_selection import preference_pairs as pp
from scoredraw.data_selection.likelihood_displacement import (
    ches_score,
    dpo_loss,
    edit_distance_score,
    filter_by_score,
    last_hidden_similarity,
    likelihood_derivative,
)
from scoredraw.journal import atomic_path
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, paired_difference
from scoredraw.papers import preference_study
from scoredraw.papers.preference_study import rank_correlation
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Scores = dict[str, Float]

CHES, EDIT, LAST, RANDOM = "CHES", "edit distance", "last hidden states", "random"
LAW = "the law of free features"
KINDS = ("one letter off", "from elsewhere", "noise")
PROMPT, ANSWER, LETTERS = 32, 12, 96
WINDOWS, WINDOW_RATE = (0.0, 0.25, 0.5, 0.75, 1.0), 5  # in units of the rate for one pair
BETA, GAIN = 0.1, 0.1  # of DPO; the median growth of the margin in one step
TOY = {"vocabulary": 200, "width": 24, "tokens": 5, "pairs": 300}
SAYS = "mean change of ln π(chosen) falls with CHES; edit distance and last states hardly tell"


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    toys: int
    models: int
    updates: int
    pairs: int
    resamples: int
    tokens: int = 40  # pairs of one-letter answers
    steps: int = 10  # of DPO on each window of pairs
    sweep: tuple[int, ...] = ()  # other amounts of training, for one model
    slopes: int = 0  # pairs shown to a language model


PLANS = {
    "smoke": Plan(2, 1, 12, 12, 50, 4, steps=1),
    "quick": Plan(5, 1, 500, 60, 500),
    "full": Plan(20, 3, 1000, 200, 2000, 100, sweep=(30, 200), slopes=40),
    "study": Plan(20, 3, 1000, 200, 2000, 100, sweep=(30, 200), slopes=100),  # and the arms of DPO
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rank pairs before the step, take it, and judge; at scale `study` with a real model too."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=25, scale=scale, seed=rng)
    add_features(report, plan, rng)
    add_letters(report, plan, rng)
    if plan.slopes:
        preference_study.add_slopes(report, rng, plan.slopes)
    if scale == "study":
        preference_study.add_arms(report, rng)
    return replace(report, seconds=time.perf_counter() - started)


# ── Free features ────────────────────────────────────────────────────────────────────────────────


def add_features(report: Report, plan: Plan, rng: int) -> None:
    rows: list[list[Cell]] = []
    for lasting, name in ((True, "one vector a prefix"), (False, "new only after another token")):
        found = [toy_correlations(lasting, rng + seed) for seed in range(plan.toys)]
        values = {key: np.array([one[key] for one in found]) for key in found[0]}
        rows.append([name, *(mean_interval(values[key]) for key in (CHES, LAST, EDIT))])
        gap = paired_difference(values[CHES], values[LAST])
        says = "CHES ranks displacement, the last hidden states do not"
        where = f"free features, {name}"
        report.claims.extend((
            Claim.at_least(f"{where}: ρ(CHES)", says, mean_interval(values[CHES]), 0.4),
            Claim.at_least(f"{where}: ρ(CHES) - ρ(last hidden states)", says, gap, 0.0),
        ))  # fmt: skip
    title = "Free features: rank correlation with the fall of the chosen answer"
    note = "Random answers of five tokens, one to five redrawn; hardly a pair is truly displaced."
    report.tables.append(ReportTable(title, ["vectors", CHES, LAST, EDIT], rows, note))


def toy_correlations(lasting: bool, seed: int) -> dict[str, float]:
    """Rank correlation of each score with -d ln π(chosen)/dt over random pairs.

    After a redrawn token the rejected answer's vectors are new: for good (`lasting`), or for the
    next position alone.
    """
    random = torch.Generator().manual_seed(seed)
    n, tokens, words = TOY["pairs"], TOY["tokens"], TOY["vocabulary"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    unembedding = normal(words, TOY["width"]) / TOY["width"] ** 0.5
    h, fresh = normal(n, tokens, TOY["width"]), normal(n, tokens, TOY["width"])
    chosen = torch.randint(words, (n, tokens), generator=random)
    redrawn = torch.rand(n, tokens, generator=random).argsort(1)
    redrawn = redrawn < torch.randint(1, tokens + 1, (n, 1), generator=random)
    other = (chosen + torch.randint(1, words, (n, tokens), generator=random)) % words
    rejected = torch.where(redrawn, other, chosen)
    after = torch.zeros_like(redrawn)
    after[:, 1:] = redrawn[:, :-1]
    after = after.cumsum(1) > 0 if lasting else after
    g = torch.where(after[..., None], fresh, h)
    every = torch.ones(n, tokens, dtype=torch.bool)
    fall = -likelihood_derivative(unembedding, h, g, chosen, rejected, beta=BETA).rate.numpy()
    scores = {
        CHES: ches_score(h, g, every, every).numpy(),
        LAST: last_hidden_similarity(h, g, every, every).numpy(),
        EDIT: edit_distance_score(chosen.numpy(), rejected.numpy()),
    }
    return {k: float(rank_correlation(np.stack([v, fall], 1)[:, None])) for k, v in scores.items()}


# ── A transformer of letters ─────────────────────────────────────────────────────────────────────


def corpus() -> tuple[Int, Int]:
    """The standard library's files as letters 0 to 95, those to train on and every tenth."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:100]
    parts = []
    for path in paths:
        code = np.frombuffer(path.read_bytes(), np.uint8)
        code = code[(code == 10) | ((code >= 32) & (code < 127))]
        parts.append(np.where(code == 10, 0, code.astype(np.int64) - 31))
    held = parts[9::10]
    return np.concatenate([p for i, p in enumerate(parts) if i % 10 != 9]), np.concatenate(held)


def letter_model(text: Int, updates: int, seed: int) -> Any:
    """A Llama of two layers, 64 wide, trained on `text`; kept in the cache once trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LETTERS, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    key = hashlib.sha256(text.tobytes() + f"{updates} {seed} {torch.__version__}".encode())
    path = cache_directory() / f"letters-{key.hexdigest()[:16]}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, text, updates, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(model.state_dict(), temporary)
    return model.eval()


def train(model: Any, text: Int, updates: int, seed: int) -> None:
    """AdamW on windows of 48 letters, 32 an update, under one cycle of the learning rate."""
    random, length = np.random.default_rng(seed), 48
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=updates)
    for _ in range(updates):
        starts = random.integers(0, len(text) - length - 1, 32)
        window = torch.from_numpy(text[starts[:, None] + np.arange(length + 1)])
        logits = model(window[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()


def letter_pairs(text: Int, n: int, seed: int, answer: int = ANSWER) -> list[dict[str, Any]]:
    """Prompts, what follows them, and in turn one of `KINDS`."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(text) - PROMPT - answer, (n, 2))
    pairs = []
    for i, (start, elsewhere) in enumerate(starts):
        prompt, chosen = np.split(text[start : start + PROMPT + answer], [PROMPT])
        if i % 3 == 0:
            rejected = chosen.copy()
            at = random.integers(answer)
            rejected[at] = (rejected[at] + random.integers(1, LETTERS)) % LETTERS
        else:
            noise = random.integers(0, LETTERS, answer)
            rejected = text[elsewhere : elsewhere + answer] if i % 3 == 1 else noise
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        pairs.append({f"{name}_ids": ids.tolist() for name, ids in sides.items()})
    return pairs


class Moves(NamedTuple):
    """What a step on each pair does: to ln π(chosen), to the margin, and to the prompt's logits."""

    chosen: Float
    margin: Float
    logits: Float
    rate: float


def one_step_each(model: Any, pairs: list[dict[str, Any]]) -> Moves:
    """One SGD step of DPO on each pair, from the same weights and at one rate for all.

    The rate makes the margin grow by `GAIN` in the median: first by the slope, then corrected.
    """
    weights = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(weights).detach()
    batches = [pp.pair_batch([pair]) for pair in pairs]
    slopes, squares = [], []
    for batch in batches:
        chosen, rejected = log_likelihoods(model, batch)
        loss = dpo_loss(chosen, rejected, (chosen - rejected).detach(), beta=BETA).sum()
        slope = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, weights))
        slopes.append(slope)
        squares.append(float(slope.square().sum()))
    before = looks(model, batches)
    rate = GAIN * BETA / 2 / float(np.median(squares))
    for _ in range(2):
        moved = []
        for slope, batch in zip(slopes, batches, strict=True):
            torch.nn.utils.vector_to_parameters(start - rate * slope, weights)
            moved.append(looks(model, [batch]))
        torch.nn.utils.vector_to_parameters(start, weights)
        change = np.concatenate(moved) - before
        margin = change[:, 0] - change[:, 1]
        used, rate = rate, rate * GAIN / float(np.median(margin))
    return Moves(change[:, 0], margin, change[:, 2:], used)


def log_likelihoods(model: Any, batch: pp.Batch) -> tuple[Tensor, Tensor]:
    """`preference_pairs.pair_log_probabilities` of a batch, with a graph."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    return chosen, rejected


def looks(model: Any, batches: list[dict[str, Tensor]]) -> Float:
    """A row a pair: ln π of both answers, and the logits after the prompt."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            both = torch.cat(log_likelihoods(model, batch))
            prompt = batch["input_ids"][:1, :PROMPT]
            rows.append(torch.cat([both, model(prompt).logits[0, -1]]).double().numpy())
    return np.stack(rows)


def train_on_window(
    model: Any, pairs: list[dict[str, Any]], rows: Int, rate: float, steps: int
) -> Float:
    """Changes of ln π(chosen), (k,), of the pairs `rows` by DPO on all of them; SGD steps."""
    weights = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(weights).detach()
    batch = pp.pair_batch([pairs[row] for row in rows])
    first = [side.detach() for side in log_likelihoods(model, batch)]
    for _ in range(steps):
        loss = dpo_loss(*log_likelihoods(model, batch), first[0] - first[1], beta=BETA).mean()
        slope = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, weights))
        moved = torch.nn.utils.parameters_to_vector(weights).detach() - rate * slope
        torch.nn.utils.vector_to_parameters(moved, weights)
    last, _ = pp.pair_log_probabilities(model, batch)
    torch.nn.utils.vector_to_parameters(start, weights)
    return (last - first[0]).double().numpy()


def letter_scores(model: Any, pairs: list[dict[str, Any]], seed: int) -> Scores:
    batch = pp.pair_batch(pairs)
    found = pp.ches_of_batch(model, batch)
    chosen, rejected = ([pair[f"{side}_ids"] for pair in pairs] for side in ("chosen", "rejected"))
    with torch.no_grad():
        body = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        plus, minus = body.last_hidden_state[:, PROMPT - 1 : -1].double().chunk(2)
        law = likelihood_derivative(
            model.lm_head.weight.double(), plus, minus, torch.tensor(chosen), torch.tensor(rejected)
        )
    return {
        CHES: found["ches"].double().numpy(),
        EDIT: edit_distance_score(chosen, rejected),
        LAST: found["last_hidden"].double().numpy(),
        RANDOM: np.random.default_rng(seed).random(len(pairs)),
        LAW: -law.rate.numpy(),
    }


# ── What the letters say ─────────────────────────────────────────────────────────────────────────


def add_letters(report: Report, plan: Plan, rng: int) -> None:
    text, held = corpus()
    pairs = letter_pairs(held, plan.pairs, rng)
    short = letter_pairs(held, plan.tokens, rng + 1, answer=1)
    scores, moves, drifts = [], [], []
    with one_thread():
        for seed in range(rng, rng + plan.models):
            model = letter_model(text, plan.updates, seed)
            scores.append(letter_scores(model, pairs, seed))
            moves.append(one_step_each(model, pairs))
            drifts.append(token_drifts(model, short))
    stacked = {name: np.stack([one[name] for one in scores], 1) for name in scores[0]}
    fall = -np.stack([move.chosen for move in moves], 1)
    ratio = fall / np.stack([move.margin for move in moves], 1)
    report.claims.extend(letter_claims(stacked, fall, plan))
    report.claims.append(drift_claim(np.mean(drifts, 0), plan))
    report.tables.extend((
        correlation_table(stacked, fall, ratio, plan),
        quintile_table(stacked[CHES], fall, ratio),
    ))  # fmt: skip
    report.figures.append(quintile_figure(stacked, fall))
    add_windows(
        report, letter_model(text, plan.updates, rng), pairs, scores[0], moves[0].rate, plan
    )
    if plan.sweep:
        report.tables.append(training_table(text, pairs, plan, rng))
    share = float((fall > 0).mean())
    about_law = (
        f"'{LAW}' weighs each product of hidden states by how like the two residuals are; CHES is "
        "what is left of it when all these weights are one."
    )
    report.notes.extend([
        f"{share:.1%} of the pairs truly displace their chosen answer (it falls in one step).",
        "All answers are of one length, so CHES divided by length ranks as CHES does.",
        about_law,
    ])  # fmt: skip


def correlation(score: Float, target: Float, plan: Plan, less: Float | None = None) -> Estimate:
    """Mean over models of ρ(score, target), or of its lead over another's; bootstrap over pairs."""
    columns = [score, target] if less is None else [score, less, target]
    return bootstrap_interval(
        np.stack(columns, 2), statistic=rank_correlation, resamples=plan.resamples
    )


def letter_claims(scores: Scores, fall: Float, plan: Plan) -> list[Claim]:
    where = "letters"
    claims = [Claim.at_least(f"{where}: ρ(CHES)", SAYS, correlation(scores[CHES], fall, plan), 0.4)]
    for other in (EDIT, LAST, RANDOM):
        lead = correlation(scores[CHES], fall, plan, less=scores[other])
        claims.append(Claim.at_least(f"{where}: ρ(CHES) - ρ({other})", SAYS, lead, 0.0))
    within = [correlation(scores[CHES][k::3], fall[k::3], plan) for k in range(3)]
    for kind, estimate in zip(KINDS, within, strict=True):
        says = "- (a mix of kinds can make a correlation by itself)"
        claims.append(Claim.at_least(f"{where}, {kind}: ρ(CHES)", says, estimate, 0.0))
    gap = bootstrap_interval(
        np.stack([scores[CHES], -fall], 2), statistic=quintile_gap, resamples=plan.resamples
    )
    law = correlation(scores[LAW], fall, plan)
    claims.extend((
        Claim.at_most(f"{where}: Δ ln π(chosen), top less bottom fifth by CHES", SAYS, gap, 0.0),
        Claim.at_least(f"{where}: ρ({LAW})", "the law that CHES shortens", law, 0.4),
    ))  # fmt: skip
    return claims


def quintile_gap(rows: Float) -> float:
    """Mean of column 1 in the fifth of the rows with the highest column 0, less the lowest's."""
    gaps = [fifths(model[:, 0], model[:, 1]) for model in rows.transpose(1, 0, 2)]
    return float(np.mean([values[-1] - values[0] for values in gaps]))


def fifths(score: Float, value: Float) -> list[float]:
    order = np.argsort(score, kind="stable")
    return [float(value[part].mean()) for part in np.array_split(order, 5)]


def correlation_table(scores: Scores, fall: Float, ratio: Float, plan: Plan) -> ReportTable:
    rows: list[list[Cell]] = []
    for name, score in scores.items():
        cells: list[Cell] = [correlation(score, fall, plan), correlation(score, ratio, plan)]
        for k in range(3):
            flat = bool((np.ptp(score[k::3], axis=0) == 0).any())
            cells.append(None if flat else correlation(score[k::3], fall[k::3], plan))
        rows.append([name, *cells])
    return ReportTable(
        "Letters: rank correlation with the fall of ln π(chosen) in one step of DPO",
        ["score", "all pairs", "per margin gained", *KINDS],
        rows,
        "Mean over models, bootstrap over pairs. A letter off is one distance: nothing to rank by.",
    )


def add_windows(
    report: Report, model: Any, pairs: list[dict[str, Any]], scores: Scores, rate: float, plan: Plan
) -> None:
    """The paper's own comparison: train on a fifth of the pairs, a part of a score's order."""
    rows: list[list[Cell]] = []
    with one_thread():
        for name in (CHES, EDIT, LAST, RANDOM):
            windows = [filter_by_score(scores[name], 0.2, which=q) for q in WINDOWS]
            changes = [
                train_on_window(model, pairs, window.indices, WINDOW_RATE * rate, plan.steps)
                for window in windows
            ]
            gap = paired_difference(changes[-1], changes[0])  # the pairing is by chance
            rows.append([name, *(mean_interval(change) for change in changes), gap])
            if name == CHES:
                what = "letters, DPO on a window: Δ ln π(chosen), highest less lowest CHES"
                report.claims.append(Claim.at_most(what, SAYS, gap, 0.0))
    title = f"Letters: Δ ln π(chosen) by {plan.steps} steps of DPO on a fifth (one model)"
    columns = ["score", *(f"window at {q:g}" for q in WINDOWS), "highest - lowest"]
    report.tables.append(ReportTable(title, columns, rows))


def training_table(text: Int, pairs: list[dict[str, Any]], plan: Plan, rng: int) -> ReportTable:
    rows: list[list[Cell]] = []
    for updates in (*plan.sweep, plan.updates):
        with one_thread():
            model = letter_model(text, updates, rng)
            scores, moves = letter_scores(model, pairs, rng), one_step_each(model, pairs)
        fall = -moves.chosen
        found = [
            correlation(scores[k][:, None], fall[:, None], plan) for k in (CHES, EDIT, LAST, LAW)
        ]
        rows.append([updates, *found, float((fall > 0).mean())])
    title = "Letters: rank correlation by how long the model was trained (one model)"
    return ReportTable(title, ["updates", CHES, EDIT, LAST, LAW, "share that falls"], rows)


def quintile_table(score: Float, fall: Float, ratio: Float) -> ReportTable:
    columns = zip(score.T, fall.T, ratio.T, strict=True)
    change, per_margin = np.mean([(fifths(s, -f), fifths(s, -r)) for s, f, r in columns], 0)
    labels = ("lowest", "second", "third", "fourth", "highest")
    rows: list[list[Cell]] = [list(row) for row in zip(labels, change, per_margin, strict=True)]
    title = "Letters: fifths of the pairs by CHES"
    return ReportTable(title, ["CHES", "Δ ln π(chosen)", "per margin gained"], rows)


def quintile_figure(scores: Scores, fall: Float) -> Figure:
    series = []
    for name, score in scores.items():
        lines = [fifths(s, -f) for s, f in zip(score.T, fall.T, strict=True)]
        middle = [0.1, 0.3, 0.5, 0.7, 0.9]
        series.append(Series(name, middle, np.mean(lines, 0), baseline=name == RANDOM))
    title = "What a step of DPO does to the chosen answer, by fifths of a score"
    caption = "Letters; a score that works falls to the right."
    labels = ("quantile of the score", "Δ ln π(chosen), nats")
    return Figure("line", title, *labels, series, caption=caption, reference=0.0)


def token_drifts(model: Any, pairs: list[dict[str, Any]]) -> Float:
    """One-letter answers: ρ over letters z of z's logit gain with <W_z, W+ - W->, (n,)."""
    moved = one_step_each(model, pairs).logits
    unembedding = model.lm_head.weight.detach().double().numpy()
    sides = np.array([[pair["chosen_ids"][0], pair["rejected_ids"][0]] for pair in pairs])
    pull = (unembedding[sides[:, 0]] - unembedding[sides[:, 1]]) @ unembedding.T
    both = np.stack([pull, moved], 2)[..., None, :]  # (n, letters, 1, 2)
    return np.asarray(rank_correlation(both, axis=1))


def drift_claim(drift: Float, plan: Plan) -> Claim:
    says = "mass goes to tokens whose unembedding lies along that of chosen less rejected"
    found = bootstrap_interval(drift, resamples=plan.resamples)
    name = "letters, answers of one: ρ over letters z of z's logit gain with <W_z, W⁺ - W⁻>"
    return Claim.at_least(name, says, found, 0.4)
