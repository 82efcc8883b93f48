"""Choosing user sequences to fine-tune a recommender on: the setting of DEALRec, made small.

The "LLM" is a transformer of two layers that has learned to predict the next item from one half
of the users (odd numbers). A one-layer SASRec of width 32, trained on the other half, is the
cheap model. Some sequences of that half are chosen, the transformer is fine-tuned on them, and
its NDCG@20 is taken on what the same users did later.

The data are the user's own: a file of tab-separated columns user, train_items, later_items, the
items as numbers 1..n in order of time with blanks between them, `later_items` empty for most.
$SCOREDRAW_SEQUENCES names it. (The Amazon Games sequences that the paper uses have no open
licence, so that none are shipped.)
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scoredraw.data_selection.coverage_selection import combined_score, coverage_select
from scoredraw.data_selection.influence import el2n
from scoredraw.data_selection.influence_on_risk import effort_scores, influence_on_risk
from scoredraw.errors import InputError, require
from scoredraw.journal import Journal
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import top_k, uniform

Int = NDArray[np.int64]
Float = NDArray[np.float64]

VARIABLE = "SCOREDRAW_SEQUENCES"
LENGTH, TOP = 50, 20
GROUPS, HARD_PRUNE, EFFORT_WEIGHT = 50, 0.1, 0.3  # the paper's weight for Games
RIDGE = 0.25  # what the released damping and scale amount to; doubled until H + it is positive
NONE, FULL = "no fine-tuning", "all sequences"
ARMS = ("random", "CCS", "greedy top-score", "DEALRec", NONE, FULL)


@dataclass(frozen=True)
class Size:
    """How much of the experiment a scale runs; `users` cuts each half, `length` each history."""

    seeds: int = 5
    users: int | None = None
    length: int = LENGTH
    budget: int = 100
    pretrain_epochs: int = 20
    surrogate_epochs: int = 10
    tune_epochs: int = 20


SMALL = Size(
    1, users=64, length=12, budget=40, pretrain_epochs=2, surrogate_epochs=2, tune_epochs=2
)
STUDY = Size()


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sequences:
    """items: int64 (users, 50), padded with 0 on the left. later: each user's later items."""

    items: Int
    later: list[Int]
    n_items: int

    @property
    def n_users(self) -> int:
        return len(self.items)

    @property
    def pool(self) -> Int:
        """Users whose sequences may be chosen: the even numbers."""
        return np.arange(0, self.n_users, 2)

    @property
    def evaluated(self) -> Int:
        """Users of the pool who did something later."""
        return np.array([u for u in self.pool if len(self.later[u])], np.int64)


def load_sequences(path: str | Path) -> Sequences:
    """Read a file of sequences (see the module). Raises InputError where it is not one."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    head = "user\ttrain_items\tlater_items"
    require(lines[:1] == [head], VARIABLE, f"{path} beginning {lines[:1]}", f"columns {head!r}")
    rows = [line.split("\t") for line in lines[1:]]
    require(all(len(row) == 3 for row in rows), VARIABLE, "lines of other columns", head)
    train = [np.array(row[1].split()[-LENGTH:], np.int64) for row in rows]
    later = [np.array(row[2].split(), np.int64) for row in rows]
    items = np.zeros((len(rows), LENGTH), np.int64)
    for user, sequence in enumerate(train):
        require(len(sequence) >= 2, VARIABLE, f"user {rows[user][0]} with one item", "two or more")
        items[user, LENGTH - len(sequence) :] = sequence
    return Sequences(items, later, int(max(items.max(), *(x.max(initial=0) for x in later))))


# ── A recommender ────────────────────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    """Causal self-attention that sees no padding; a padded place sees itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = (
            part(x).view(n, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        itself = torch.eye(length, dtype=torch.bool)
        seen = (torch.ones(length, length).tril() > 0) & (real[:, None, :] | itself)
        weights = (q @ k.mT / (dim / self.heads) ** 0.5).masked_fill(~seen[:, None], -1e9)
        mixed = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, length, dim)
        result: Tensor = self.dense(mixed)
        return result


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norms[0](x), real))
        return torch.as_tensor(x + self.dropout(self.feed(self.norms[1](x))))


class Recommender(nn.Module):
    """SASRec (Kang and McAuley 2018) under the full softmax: items (n, L) -> logits (n, L, V)."""

    def __init__(self, n_items: int, dim: int, layers: int, *, dropout: float = 0.2) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, dim)
        self.places = nn.Embedding(LENGTH, dim)
        self.blocks = nn.ModuleList([Block(dim, 2, dropout) for _ in range(layers)])
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def states(self, items: Tensor) -> Tensor:
        places = self.places.weight[-items.shape[1] :]
        x, real = self.dropout(self.items(items) + places), items > 0
        for block in self.blocks:
            x = block(x, real)
        return torch.as_tensor(self.norm(x))

    def forward(self, items: Tensor) -> Tensor:
        return self.states(items) @ self.items.weight.T


def next_item_labels(items: Tensor) -> Tensor:
    return items.masked_fill(items == 0, -100)


def sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over sequences of the mean over their places of the next item's cross-entropy."""
    following = labels[:, 1:]
    each = cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
    return (each.sum(dim=1) / (following != -100).sum(dim=1)).mean()


def train(
    model: Recommender, items: Int, epochs: int, *, seed: int, rate: float = 1e-3
) -> Recommender:
    """Adam over shuffled batches of 64; places after padding only are put to the softmax."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.as_tensor(items)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for _ in range(epochs):
            for rows in torch.randperm(len(pool), generator=generator).split(64):
                batch = pool[rows]
                asked = (batch[:, :-1] > 0) & (batch[:, 1:] > 0)
                states = model.states(batch)[:, :-1][asked]
                loss = cross_entropy(states @ model.items.weight.T, batch[:, 1:][asked])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval()


def last_logits(model: Recommender, items: Int) -> Float:
    """What comes after each sequence, float64 (n, V)."""
    with torch.no_grad():
        parts = [model.states(part)[:, -1] for part in torch.as_tensor(items).split(256)]
        logits: Float = (torch.cat(parts) @ model.items.weight.T).double().numpy()
    return logits


def ndcg(model: Recommender, data: Sequences, users: Int, length: int = LENGTH) -> float:
    """NDCG@20, among items that are new to a user, of those that the user chose later."""
    scores = last_logits(model, data.items[users, -length:])
    np.put_along_axis(scores, data.items[users], -np.inf, axis=1)  # the padding's 0 among them
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    discount = 1 / np.log2(np.arange(best.shape[1]) + 2)
    gains = []
    for row, user in zip(best, users, strict=True):
        new = np.setdiff1d(data.later[user], data.items[user])
        if len(new):
            gains.append(np.isin(row, new) @ discount / discount[: len(new)].sum())
    return float(np.mean(gains))


# ── One seed ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """ndcg: of each arm. bins: how many of the 50 score intervals each arm's choice touches.
    ridge: what was added to the surrogate's Hessian."""

    ndcg: dict[str, float]
    bins: dict[str, int]
    ridge: float


def sequence_seed(data: Sequences, seed: int, size: Size) -> Outcome:
    """Train both models, choose by every arm, fine-tune, and measure."""
    pool = data.pool[: size.users]
    others = np.arange(1, data.n_users, 2)[: size.users]
    chosen_from = data.items[pool, -size.length :]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = Recommender(data.n_items, 64, 2)
        surrogate = Recommender(data.n_items, 32, 1)
        train(target, data.items[others, -size.length :], size.pretrain_epochs, seed=seed)
        train(surrogate, chosen_from, size.surrogate_epochs, seed=seed + 1)
        score, ridge = dealrec_score(surrogate, target, chosen_from)
        picks, bins = choose(score, last_item_el2n(surrogate, chosen_from), size.budget, seed)
        start = {name: value.clone() for name, value in target.state_dict().items()}
        result = {NONE: ndcg(target, data, data.evaluated, size.length)}
        for arm in ARMS:
            if arm != NONE:
                target.load_state_dict(start)
                rows = picks.get(arm, np.arange(len(pool)))
                train(target, chosen_from[rows], size.tune_epochs, seed=seed + 2, rate=5e-4)
                result[arm] = ndcg(target, data, data.evaluated, size.length)
    return Outcome({arm: result[arm] for arm in ARMS}, bins, ridge)


def dealrec_score(
    surrogate: Recommender, target: Recommender, sequences: Int
) -> tuple[Float, float]:
    """Influence by one matrix of the surrogate, effort by the target's last query and value."""
    items = torch.as_tensor(sequences)
    labels = next_item_labels(items)
    influence, ridge = surrogate_influence(surrogate, items, labels)
    last = f"blocks.{len(target.blocks) - 1}.attention"
    batches = list(zip(items.split(256), labels.split(256), strict=True))
    effort = effort_scores(target, batches, params=[f"{last}.query", f"{last}.value"])
    return combined_score(influence, effort, effort_weight=EFFORT_WEIGHT), ridge


def surrogate_influence(
    surrogate: Recommender, items: Tensor, labels: Tensor
) -> tuple[Float, float]:
    """With the smallest of the ridges .25, .5, 1, ... under which the Hessian is positive along
    the directions that CG meets, and that ridge."""
    matrix = f"blocks.{len(surrogate.blocks) - 1}.attention.dense.weight"
    ridge = RIDGE
    while True:
        try:
            influence = influence_on_risk(
                (surrogate, (items, labels)), loss=sequence_loss, parameters=matrix,
                damping=ridge, block=256,
            )  # fmt: skip
            return influence, ridge
        except InputError as error:
            if "negative curvature" not in str(error):
                raise
            ridge *= 2


def last_item_el2n(surrogate: Recommender, sequences: Int) -> Float:
    before = np.zeros_like(sequences)
    before[:, 1:] = sequences[:, :-1]
    return el2n(last_logits(surrogate, before), sequences[:, -1])


def choose(
    score: Float, hardness: Float, budget: int, seed: int
) -> tuple[dict[str, Int], dict[str, int]]:
    options: dict[str, Any] = {"n_groups": GROUPS, "hard_prune": HARD_PRUNE, "rng": seed}
    whole = coverage_select(score, len(score), n_groups=GROUPS)
    ours = coverage_select(score, budget, **options)
    picks = {
        "random": uniform(len(score), budget, rng=seed).indices,
        "CCS": coverage_select(hardness, budget, **options).indices,
        "greedy top-score": top_k(score, budget, rng=seed).indices,
        "DEALRec": ours.indices,
    }
    touched = {arm: len(np.unique(whole.groups[rows])) for arm, rows in picks.items()}
    touched["DEALRec"] = len(np.unique(ours.groups[ours.indices]))  # in its own intervals
    return picks, touched | {"non-empty": int((ours.sizes > 0).sum())}


# ── The report ───────────────────────────────────────────────────────────────────────────────────


def add_to(report: Report, size: Size, rng: int) -> None:
    """Run the experiment where the data are, and append what it finds or why it was not run."""
    path = os.environ.get(VARIABLE)
    if not path:
        report.notes.append(
            f"The experiment on user sequences was left out: ${VARIABLE} names no file (see "
            "scoredraw.papers.sequence_recommenders)."
        )
        return
    data = load_sequences(path)
    outcomes = resumed(data, Path(path), size, rng)
    arms = {arm: np.array([one.ndcg[arm] for one in outcomes]) for arm in ARMS}
    random = arms["random"]
    report.claims.extend(
        [
            Claim.at_least(
                "recommendation: DEALRec beats a random choice",
                "Games, 2 %: NDCG@20 .0142 against .0122",
                paired_difference(arms["DEALRec"], random), 0.0,
                "NDCG@20 difference, paired by seed, at least 0",
            ),
            Claim.at_least(
                "recommendation: DEALRec on a few sequences beats all of them",
                "Games: NDCG@20 .0142 on 1,024 sequences, .0120 on all",
                paired_difference(arms["DEALRec"], arms[FULL]), 0.0,
                "NDCG@20 difference, paired by seed, at least 0",
            ),
            Claim.judge(
                "recommendation: DEALRec touches every interval of the score",
                "coverage-enhanced sampling",
                ", ".join(f"{o.bins['DEALRec']} of {o.bins['non-empty']}" for o in outcomes),
                "all intervals that are not empty, for every seed",
                all(o.bins["DEALRec"] == o.bins["non-empty"] for o in outcomes),
            ),
        ]
    )  # fmt: skip
    report.tables.append(table(arms, outcomes, size))
    report.figures.append(
        Figure(
            "interval", f"Fine-tuned on {size.budget} sequences", "NDCG@20", "",
            [Series("NDCG@20", list(arms), [v.mean() for v in arms.values()],
                    [mean_interval(v).low for v in arms.values()],
                    [mean_interval(v).high for v in arms.values()])],
        )
    )  # fmt: skip


def table(arms: dict[str, Float], outcomes: list[Outcome], size: Size) -> ReportTable:
    rows: list[list[Cell]] = []
    for arm, values in arms.items():
        gap = None if arm == "random" else paired_difference(values, arms["random"])
        bins = [o.bins[arm] for o in outcomes if arm in o.bins]
        rows.append([arm, mean_interval(values), gap, float(np.mean(bins)) if bins else None])
    return ReportTable(
        f"User sequences, {size.budget} of the pool, {size.seeds} seeds",
        ["fine-tuned on", "NDCG@20", "minus random", "score intervals touched, of 50"],
        rows,
        f"Ridge on the surrogate's Hessian: {', '.join(f'{o.ridge:g}' for o in outcomes)}.",
    )


def resumed(data: Sequences, path: Path, size: Size, rng: int) -> list[Outcome]:
    """The outcomes of all seeds; finished ones are read from a log in the cache directory."""
    text = json.dumps(asdict(size)) + hashlib.sha256(path.read_bytes()).hexdigest()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    log = Journal(cache_directory() / f"dealrec-{key}.jsonl")
    done = {r["seed"]: r for r in log.records() if {"seed", "ndcg", "bins", "ridge"} <= set(r)}
    outcomes = []
    for seed in (1000 * rng + s for s in range(size.seeds)):
        if seed not in done:
            log.append({"seed": seed, **asdict(sequence_seed(data, seed, size))})
            done = {r["seed"]: r for r in log.records()}
        outcomes.append(Outcome(**{k: v for k, v in done[seed].items() if k != "seed"}))
    return outcomes
