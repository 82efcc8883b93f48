"""Filtering real preference pairs for a real model, trained by TRL's DPO.

Pairs are a right and a wrong solution of one grade school problem, by published systems; the model
is SmolLM2-135M-Instruct. *Slopes* (full scale): for each of a sample of pairs, the exact speed at
which DPO on it starts to move the chosen answer's log-likelihood, over all weights, beside the
scores; some five seconds a pair. *Arms* (study, some 40 minutes on two cores): half of a pool,
kept at random, by lowest or highest length-normalised CHES or by edit distance, trains adapters
(LoRA) for one epoch, and the random half once more with a likelihood term; the answers'
log-likelihoods are taken before and after, on the pairs trained on and on others.

Every finished pair and arm is a line of a journal in the cache, so that the run resumes.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from scoredraw.data_selection import preference_pairs as pp
from scoredraw.data_selection.likelihood_displacement import (
    filter_by_score,
    likelihood_derivative,
)
from scoredraw.journal import Journal
from scoredraw.metrics import Estimate, bootstrap_interval, mean_interval, paired_difference
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import uniform

Float = NDArray[np.float64]
Pair = dict[str, Any]

SEEDS, POOL, HELD_OUT = 3, 48, 16
RATE, BATCH, RANK, SFT_WEIGHT = 2e-4, 4, 8, 1.0
ARMS = ("random", "lowest ln-CHES", "highest ln-CHES", "lowest edit score", "random, with SFT")
SAYS = "filtering by ln-CHES keeps what DPO on all pairs loses (refusals: 74.4 to 33.4 % on all)"


def open_journal(rng: int) -> Journal:
    """The journal of a seed; other settings, another journal."""
    settings = (POOL, HELD_OUT, RATE, BATCH, RANK, SFT_WEIGHT)
    key = zlib.crc32(repr(settings).encode())
    return Journal(cache_directory() / f"ches-study-{rng}-{key:08x}.jsonl")


def conversations() -> list[Pair]:
    """The 246 pairs of the package as messages; at most 100 tokens a problem and 90 an answer."""
    path = resources.files("scoredraw").joinpath("data", "gsm8k-preferences.jsonl.gz")
    with path.open("rb") as file:
        rows = [json.loads(line) for line in gzip.decompress(file.read()).decode().splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{k: [{"role": roles[k], "content": row[k]}] for k in roles} for row in rows]


# ── Slopes ───────────────────────────────────────────────────────────────────────────────────────


def measured_slopes(journal: Journal, pairs: list[Pair], rng: int, n: int) -> list[dict[str, Any]]:
    """A record a pair: its scores, and the slopes of ln π(chosen) and of the margin."""
    chosen = uniform(len(pairs), n, rng=rng).indices.tolist()
    known = {record["pair"]: record for record in journal.records() if "pair" in record}
    missing = [row for row in chosen if row not in known]
    if missing:
        from scoredraw.small_models import small_model

        model, tokenizer = small_model()
        for row in missing:
            scores = pp.score_preference_dataset(model, tokenizer, [pairs[row]])
            record = {name: float(values[0]) for name, values in scores.items()}
            batch = pp.pair_batch(pp.tokenize_pairs(tokenizer, [pairs[row]]))
            record |= {"pair": row, **slopes_of(model, batch)}
            journal.append(record)
            known[row] = record
    return [known[row] for row in chosen]


def slopes_of(model: Any, batch: pp.Batch) -> dict[str, float]:
    """<∇ ln π(chosen), ∇ margin> and |∇ margin|², over all weights: what a small step moves.

    Beside them `law`, the fall of ln π(chosen) were the last hidden states free.
    """
    import torch

    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    unembedding = model.get_output_embeddings().weight
    gradients, states, tokens = [], [], []
    for side in range(2):
        row = {name: batch[name][side : side + 1] for name in ("input_ids", "attention_mask")}
        where = mask[side].nonzero()[:, 0]
        states.append(model.base_model(**row, use_cache=False).last_hidden_state[0, where])
        tokens.append(ids[side, where + 1])
        logps = (states[-1] @ unembedding.mT).log_softmax(-1)
        logp = logps.gather(1, tokens[-1][:, None]).sum()
        gradients.append(torch.autograd.grad(logp, weights))
    with torch.no_grad():
        law = likelihood_derivative(unembedding, *states, *tokens).rate
    plus = minus = both = 0.0
    for a, b in zip(*gradients, strict=True):
        plus, minus = plus + float((a * a).sum()), minus + float((b * b).sum())
        both += float((a * b).sum())
    slopes = {"chosen_slope": plus - both, "margin_slope": plus - 2 * both + minus}
    return {**slopes, "law": -float(law)}


def add_slopes(report: Report, rng: int, n: int) -> None:
    """Measure what the journal lacks of n pairs, and judge how the scores rank them."""
    records = measured_slopes(open_journal(rng), conversations(), rng, n)
    names = {"ches": "CHES", "ln_ches": "ln-CHES", "edit": "edit distance"}
    names |= {"last_hidden": "last hidden states", "law": "the law of free features"}
    wanted = (*names, "chosen_slope", "margin_slope")
    column = {k: np.array([record[k] for record in records]) for k in wanted}
    fall = -column["chosen_slope"]

    def against(target: Float, *scores: str) -> Estimate:
        rows = np.stack([*(column[score] for score in scores), target], 1)[:, None]
        return bootstrap_interval(rows, statistic=rank_correlation)

    rows: list[list[Cell]] = [
        [title, against(fall, name), against(fall / column["margin_slope"], name)]
        for name, title in names.items()
    ]
    title = "SmolLM2-135M, GSM8K pairs: rank correlation with the slope of -ln π(chosen)"
    report.tables.append(ReportTable(title, ["score", "slope", "per slope of the margin"], rows))
    says = "ln-CHES ranks displacement, edit distance hardly does"
    report.claims.extend((
        Claim.at_least("SmolLM2: ρ(ln-CHES, fall)", says, against(fall, "ln_ches"), 0.4),
        Claim.at_least("SmolLM2: ρ(CHES, fall)", says, against(fall, "ches"), 0.4),
        Claim.at_least("SmolLM2: ρ(CHES) - ρ(edit)", says, against(fall, "ches", "edit"), 0.0),
        Claim.at_least("SmolLM2: ρ(CHES) - ρ(last hidden states)", says,
                       against(fall, "ches", "last_hidden"), 0.0),
    ))  # fmt: skip
    share = float((fall > 0).mean())
    report.notes.append(f"SmolLM2: {share:.0%} of {len(fall)} pairs start by pushing chosen down.")


def rank_correlation(rows: Float, axis: int = 0) -> Any:
    """Spearman's ρ of the last axis' two columns (of three: first less second, with the third).

    rows: (..., n, models, columns), n along `axis`; the mean over models.
    """
    ranks = rankdata(rows, axis=axis)
    ranks -= ranks.mean(axis=axis, keepdims=True)
    length = np.sqrt(np.square(ranks).sum(axis=axis, keepdims=True))
    ranks /= np.where(length > 0, length, 1)  # a resample may be of one value: no correlation
    rho = (ranks[..., :-1] * ranks[..., -1:]).sum(axis=axis).mean(axis=-2)
    return rho[..., 0] - rho[..., 1] if rows.shape[-1] == 3 else rho[..., 0]


# ── Arms ─────────────────────────────────────────────────────────────────────────────────────────


def measured_arm(journal: Journal, pairs: list[Pair], seed: int, arm: str) -> dict[str, Any]:
    """The record of a seed's arm, from the journal or from a run."""
    records = [r for r in journal.records() if r.get("seed") == seed]
    for record in records:
        if record.get("arm") == arm:
            return record
    drawn = uniform(len(pairs), POOL + HELD_OUT, rng=seed).indices
    drawn = np.random.default_rng(seed).permutation(drawn)
    pool, others = [pairs[i] for i in drawn[:POOL]], [pairs[i] for i in drawn[POOL:]]
    scored = next((record for record in records if "ln_ches" in record), None)
    if scored is None:
        from scoredraw.small_models import small_model

        found = pp.score_preference_dataset(*small_model(), pool, measures=["ln_ches", "edit"])
        scored = {"seed": seed, **{name: values.tolist() for name, values in found.items()}}
        journal.append(scored)
    record = {"seed": seed, "arm": arm, **train(keep(arm, pool, scored, seed), others, arm, seed)}
    journal.append(record)
    return record


def keep(arm: str, pool: list[Pair], scored: dict[str, Any], seed: int) -> list[Pair]:
    """Half of the pool."""
    half = len(pool) // 2
    if arm.startswith("random"):
        return uniform(len(pool), half, rng=seed + 1).take(pool)
    scores = scored["edit" if "edit" in arm else "ln_ches"]
    which = "highest" if arm.startswith("highest") else "lowest"
    return filter_by_score(scores, half, which=which).take(pool)  # type: ignore[arg-type]


def train(pairs: Sequence[Pair], others: Sequence[Pair], arm: str, seed: int) -> dict[str, Any]:
    """One epoch of DPO on adapters; changes of ln π(chosen) and of the margin, on both sets."""
    import datasets
    import peft
    import trl

    from scoredraw.small_models import small_model

    started = time.perf_counter()
    model, tokenizer = small_model()
    held_out = pp.DisplacementTracker(pp.tokenize_pairs(tokenizer, others), batch_size=BATCH)
    trained = pp.DisplacementTracker(batch_size=BATCH)
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, SFT_WEIGHT]}
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = trl.DPOConfig(
            folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE,
            lr_scheduler_type="constant", beta=0.1, max_length=256, seed=seed, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, **(losses if "SFT" in arm else {}),
        )  # fmt: skip
        trl.DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(list(pairs)),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
            callbacks=[trained, held_out],
        ).train()
    record: dict[str, Any] = {"seconds": time.perf_counter() - started, "pairs": len(pairs)}
    for name, tracker in (("trained", trained), ("held out", held_out)):
        record[f"{name}, chosen"] = tracker.displacement().tolist()
        record[f"{name}, margin"] = tracker.margin_gain().tolist()
    return record


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars that data sets draw."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def add_arms(report: Report, rng: int) -> None:
    """Run what the journal lacks of the arms, and judge."""
    journal, pairs = open_journal(rng), conversations()
    seeds = range(rng, rng + SEEDS)
    records = {(seed, arm): measured_arm(journal, pairs, seed, arm)
               for seed in seeds for arm in ARMS}  # fmt: skip
    measures = [
        f"{where}, {what}" for where in ("trained", "held out") for what in ("chosen", "margin")
    ]

    def per_seed(arm: str, measure: str) -> Float:
        return np.array([np.mean(records[seed, arm][measure]) for seed in seeds])

    rows: list[list[Cell]] = [
        [arm, *(mean_interval(per_seed(arm, measure)) for measure in measures)] for arm in ARMS
    ]
    title = "SmolLM2-135M, one epoch of DPO on half a pool of GSM8K pairs: mean changes, nats"
    report.tables.append(ReportTable(title, ["kept", *measures], rows, "t intervals over seeds."))
    bars = [mean_interval(per_seed(arm, "trained, chosen")) for arm in ARMS]
    series = Series("trained pairs", list(ARMS), [b.value for b in bars], [b.low for b in bars],
                    [b.high for b in bars])  # fmt: skip
    report.figures.append(Figure("interval", title, "Δ ln π(chosen)", "", [series], reference=0.0))
    low = "lowest ln-CHES"
    for arm, other, measure in (
        (low, "random", "trained, chosen"),
        (low, "random", "held out, chosen"),
        (low, "highest ln-CHES", "trained, chosen"),
        (low, "lowest edit score", "trained, chosen"),
        ("random, with SFT", "random", "trained, chosen"),
    ):
        gap = paired_difference(per_seed(arm, measure), per_seed(other, measure))
        name = f"SmolLM2, {measure}: {arm} less {other}"
        report.claims.append(Claim.at_least(name, SAYS, gap, 0.0))
