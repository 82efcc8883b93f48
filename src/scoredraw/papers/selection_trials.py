"""The judge of ways to choose training examples: real data, a real model, equal budgets.

An arm looks at the pool's features and labels and picks `size` rows; a model is trained on them
for a fixed number of updates, whatever the size, and tested on rows nobody has seen. Two trials:

    intents   CLINC150's 15,000 requests of 150 intents as sentence vectors; a perceptron on them
    clothes   10,000 images of Fashion-MNIST; a convolutional net of 20,490 weights on the pixels

Arms see 50 principal components of the vectors or pixels.

Two uniform draws always run along, plain and by class. A share `flip` of the pool's labels can be
made wrong. Within a seed all arms share the wrong labels, the initial weights and the seed they
are handed, so that differences between arms are paired by seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scoredraw.datasets import Dataset, flip_labels, load
from scoredraw.errors import require
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers.sentence_embeddings import encode
from scoredraw.papers.training import minibatches, one_thread, rate, train_ensemble
from scoredraw.reports import Cell, ReportTable
from scoredraw.sampling import uniform

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Arm = Callable[[Floats, Rows, int, int], Rows]

UNIFORM, STRATIFIED = "uniform", "uniform by class"
BATCH, RATE = 64, 3e-3
INTENT_STEPS, INTENT_HIDDEN = 600, (128,)
CLOTHES_STEPS, COMPONENTS = 300, 50
TOGETHER = 8  # heads trained as one ensemble
WORKERS = 2  # trainings side by side, a thread each


# ── What comes out ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Trial:
    """Test accuracies and what the choosing took.

    accuracy[size][arm]: (seeds,) shares of the test rows. seconds[size][arm]: (seeds,) wall time
    of the choosing. everything: (seeds,) accuracies of training on the whole pool.
    flip: the share of wrong labels. pool, steps: rows to choose from, updates of each training.
    """

    data: str
    accuracy: Mapping[int, Mapping[str, Floats]]
    seconds: Mapping[int, Mapping[str, Floats]]
    everything: Floats
    flip: float
    pool: int
    steps: int

    @property
    def sizes(self) -> list[int]:
        """The numbers of rows kept."""
        return list(self.accuracy)

    @property
    def arms(self) -> list[str]:
        """The arms, the two uniform ones first."""
        return list(self.accuracy[self.sizes[0]])

    def gain(self, arm: str, size: int, *, over: str = UNIFORM, comparisons: int = 1) -> Estimate:
        """Accuracy of an arm minus that of another (the uniform draw), paired by seed.

        comparisons: how many such intervals are read together (`metrics.paired_difference`).
        Raises `InputError` for an unknown arm or size.
        """
        require(size in self.accuracy, "size", size, f"one of {self.sizes}")
        of = self.accuracy[size]
        for name, value in (("arm", arm), ("over", over)):
            require(value in of, name, repr(value), f"one of {', '.join(of)}")
        return paired_difference(of[arm], of[over], comparisons=comparisons)

    def table(self, title: str) -> ReportTable:
        """Accuracy, its difference to the uniform draw, and seconds, a row an arm and size."""
        everything = mean_interval(self.everything)
        rows: list[list[Cell]] = [["everything", self.pool, everything, None, None]]
        for size, of in self.accuracy.items():
            for arm, values in of.items():
                gap = None if arm == UNIFORM else self.gain(arm, size)
                seconds = float(self.seconds[size][arm].mean())
                rows.append([arm, size, mean_interval(values), gap, seconds])
        wrong = f"; {self.flip:.0%} of the pool's labels are wrong" if self.flip else ""
        note = (
            f"{self.data}: {len(self.everything)} seeds, {self.steps} updates of {BATCH} rows "
            f"whatever the size{wrong}; differences are paired by seed."
        )
        columns = ["chosen by", "kept", "accuracy", "minus uniform", "seconds to choose"]
        return ReportTable(title, columns, rows, note)


@dataclass(frozen=True, eq=False)
class Task:
    """A pool to choose from, as the arms see it, and how a choice is judged.

    judge(chosen, labels, seeds) trains on rows `chosen[i]` under `labels[i]` from `seeds[i]`, and
    gives each one's accuracy on the test rows.
    """

    data: str
    features: Floats
    labels: Rows
    classes: int
    steps: int
    judge: Callable[[list[Rows], list[Rows], list[int]], Floats]


# ── The two trials ───────────────────────────────────────────────────────────────────────────────


def intents_trial(
    arms: Mapping[str, Arm],
    *,
    sizes: Sequence[int],
    seeds: int,
    flip: float = 0.0,
    rng: int = 0,
    pool: int | None = None,
    steps: int = INTENT_STEPS,
) -> Trial:
    """Choose among CLINC150's requests; judged by a perceptron on their sentence vectors.

    Parameters
    ----------
    arms : name -> arm(features (n, 50) float64, labels (n,), size, seed) -> `size` row numbers.
    sizes : how many rows to keep. seeds : how many repetitions.
    flip : share of the pool's labels changed to another class, other ones each seed.
    pool : take only so many rows of the train split and as many of the test split (by lot).
    steps : updates of each training.

    Raises `InputError` on a size outside the pool or below its number of classes, a flip outside
    [0, 1), an arm called as a uniform one, or an arm's answer that is not `size` distinct rows;
    `MissingExtraError` without the sentence encoder.

    Time: about half a second of one core a training, and the arms' own; the first call on a
    machine encodes the sentences (half a minute).

    Larson et al., 2019, arXiv:1909.02027 (the data); requests out of scope are left out.
    """
    require(steps >= 1, "steps", steps, "1 or more")
    return run(intents(pool, rng, steps), arms, sizes, seeds, flip, rng)


def clothes_trial(
    arms: Mapping[str, Arm],
    *,
    sizes: Sequence[int],
    seeds: int,
    flip: float = 0.0,
    rng: int = 0,
    pool: int | None = None,
    steps: int = CLOTHES_STEPS,
) -> Trial:
    """Choose among images of Fashion-MNIST; judged by a small convolutional net on the pixels.

    Arguments and errors as `intents_trial`. Time: about a second of one core a training.

    Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747 (the data).
    """
    require(steps >= 1, "steps", steps, "1 or more")
    return run(clothes(pool, rng, steps), arms, sizes, seeds, flip, rng)


def run(
    task: Task, arms: Mapping[str, Arm], sizes: Sequence[int], seeds: int, flip: float, rng: int
) -> Trial:
    """Every arm at every size and seed: choose, train, test."""
    n = len(task.labels)
    check(task, arms, sizes, seeds, flip)
    every = {UNIFORM: draw_uniform, STRATIFIED: draw_by_class, **arms}
    labels = [
        flip_labels(task.labels, task.classes, flip, seed(rng, 1, s))[0] for s in range(seeds)
    ]
    kept: list[Rows] = [np.arange(n)] * seeds
    spent: dict[int, dict[str, Floats]] = {}
    for size in sizes:
        spent[size] = {}
        for name, arm in every.items():
            took = np.empty(seeds)
            for s in range(seeds):
                started = time.perf_counter()
                rows = arm(task.features, labels[s], size, seed(rng, 2, s))
                took[s] = time.perf_counter() - started
                kept.append(checked(rows, size, n, name))
            spent[size][name] = took
    times = len(kept) // seeds
    train_seeds = [seed(rng, 3, s) for s in range(seeds)] * times
    accuracy = task.judge(kept, labels * times, train_seeds).reshape(times, seeds)
    by_size = accuracy[1:].reshape(len(sizes), len(every), seeds)
    return Trial(
        task.data,
        {m: dict(zip(every, of, strict=True)) for m, of in zip(sizes, by_size, strict=True)},
        spent,
        accuracy[0],
        flip,
        n,
        task.steps,
    )


# ── Uniform arms ────────────────────────────────────────────────────────────────────────────────


def draw_uniform(features: Floats, labels: Rows, size: int, seed: int) -> Rows:
    """Any rows."""
    return uniform(len(labels), size, rng=seed).indices


def draw_by_class(features: Floats, labels: Rows, size: int, seed: int) -> Rows:
    """Each class its share, any rows of it."""
    return uniform(len(labels), size, rng=seed, by=labels).indices


# ── Intents: a perceptron on sentence vectors ────────────────────────────────────────────────────


def intents(pool: int | None, rng: int, steps: int) -> Task:
    """The train split's requests in scope, judged on the test split's."""
    data = load("clinc150")
    assert data.texts is not None
    inside = np.flatnonzero(data.y != data.target_names.index("oos"))
    train, test = splits(data, pool, rng, inside)
    if pool is None:
        vectors = encode(data.texts)  # all, so that every experiment finds the same file
        train_x, test_x = vectors[train], vectors[test]
    else:
        both = encode([data.texts[row] for row in [*train, *test]])
        train_x, test_x = both[: len(train)], both[len(train) :]
    names, codes = np.unique(data.y[np.concatenate([train, test])], return_inverse=True)
    train_y, test_y = codes[: len(train)].astype(np.int64), codes[len(train) :]

    def together(chosen: list[Rows], labels: list[Rows], seeds: list[int]) -> Floats:
        heads = train_ensemble(
            train_x,
            np.stack(labels),
            np.stack([batches(c, steps, s) for c, s in zip(chosen, seeds, strict=True)]),
            n_classes=len(names),
            hidden=INTENT_HIDDEN,
            learning_rate=RATE,
            seed=seeds,
        )
        return heads.accuracy(test_x, test_y)

    def judge(*these: list[Any]) -> Floats:
        starts = range(0, len(these[0]), TOGETHER)
        groups = ([part[at : at + TOGETHER] for at in starts] for part in these)
        with one_thread(), ThreadPoolExecutor(WORKERS) as workers:
            return np.concatenate(list(workers.map(together, *groups)))

    seen = wide(components(train_x))
    return Task("CLINC150, in scope", seen, train_y, len(names), steps, judge)


# ── Clothes: a convolutional net on pixels ───────────────────────────────────────────────────────


def clothes(pool: int | None, rng: int, steps: int) -> Task:
    """The train split's images, judged on the test split's."""
    data = load("fashion-mnist")
    assert data.x is not None
    train, test = splits(data, pool, rng, np.arange(len(data)))
    pixels = data.x[train].astype(np.float32) / 255
    centre, spread = float(pixels.mean()), float(pixels.std())
    train_x, test_x = (images(data.x[rows], centre, spread) for rows in (train, test))

    def one(chosen: Rows, labels: Rows, seed: int) -> float:
        net = train_net(train_x, labels, batches(chosen, steps, seed), seed)
        with torch.no_grad():
            hits = net(test_x).argmax(dim=1).numpy() == data.y[test]
        return float(hits.mean())

    def judge(chosen: list[Rows], labels: list[Rows], seeds: list[int]) -> Floats:
        with one_thread(), ThreadPoolExecutor(WORKERS) as workers:
            return np.array(list(workers.map(one, chosen, labels, seeds)))

    classes = len(data.target_names)
    return Task(
        "Fashion-MNIST", wide(components(pixels)), data.y[train].copy(), classes, steps, judge
    )


def components(x: NDArray[Any]) -> Floats:
    """The leading principal components, (n, 50) or as many as there are rows."""
    from sklearn.decomposition import PCA

    count = min(COMPONENTS, len(x))
    return np.asarray(PCA(count, random_state=0).fit_transform(x.astype(np.float64)))


def images(pixels: NDArray[Any], centre: float, spread: float) -> torch.Tensor:
    """Standardised images (n, 1, 28, 28)."""
    scaled = (pixels.astype(np.float32) / 255 - centre) / spread
    return torch.from_numpy(scaled).view(-1, 1, 28, 28)


def train_net(x: torch.Tensor, labels: Rows, table: Rows, seed: int) -> nn.Sequential:
    """Two strided convolutions and a linear layer, 20,490 weights, by Adam and a cosine."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 10)),
    )
    own = torch.Generator().manual_seed(seed)
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):  # as torch would, from this seed
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound, own)
            nn.init.uniform_(layer.bias, -bound, bound, own)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    y = torch.from_numpy(labels)
    for step, row in enumerate(table):
        rows = torch.from_numpy(row[row >= 0])
        optimiser.param_groups[0]["lr"] = rate(RATE, step, len(table))
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


# ── Small things ─────────────────────────────────────────────────────────────────────────────────


def splits(data: Dataset, pool: int | None, rng: int, among: Rows) -> tuple[Rows, Rows]:
    """Train and test rows of the published splits; `pool` of each by lot, in order."""
    parts = [np.intersect1d(data.splits[name], among) for name in ("train", "test")]
    if pool is None:
        return parts[0], parts[1]
    require(10 <= pool <= len(parts[0]), "pool", pool, f"a count from 10 to {len(parts[0])}")
    lots = [uniform(len(p), min(pool, len(p)), rng=seed(rng, 4)).indices for p in parts]
    return parts[0][np.sort(lots[0])], parts[1][np.sort(lots[1])]


def batches(chosen: Rows, steps: int, seed: int) -> Rows:
    """`steps` batches, as many passes over the chosen rows as they need."""
    passes = -(-steps // -(-len(chosen) // BATCH))
    return minibatches([chosen] * passes, BATCH, seed)[:steps]


def wide(features: NDArray[Any]) -> Floats:
    """Float64 that no arm can change for the next."""
    values = features.astype(np.float64)
    values.setflags(write=False)
    return values


def seed(*parts: int) -> int:
    """An independent 63-bit seed for each purpose and repetition."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check(
    task: Task, arms: Mapping[str, Arm], sizes: Sequence[int], seeds: int, flip: float
) -> None:
    n, classes = len(task.labels), task.classes
    require(seeds >= 1, "seeds", seeds, "1 or more")
    require(0 <= flip < 1, "flip", flip, "a share in [0, 1)")
    require(len(sizes) > 0, "sizes", "none", "one or more")
    require(len(set(sizes)) == len(sizes), "sizes", list(sizes), "different ones")
    bad = [size for size in sizes if not classes <= size <= n]
    require(not bad, "sizes", bad, f"counts from {classes}, one a class, to the pool's {n}")
    taken = sorted({UNIFORM, STRATIFIED} & set(arms))
    require(not taken, "arms", ", ".join(taken), "other names: those two always run")


def checked(rows: Any, size: int, n: int, name: str) -> Rows:
    """An arm's answer as row numbers."""
    chosen = np.asarray(rows)
    where = f"arm {name!r}"
    require(chosen.shape == (size,), where, f"shape {chosen.shape}", f"({size},) row numbers")
    require(chosen.dtype.kind in "iu", where, f"{chosen.dtype} values", "row numbers")
    inside = bool((chosen >= 0).all() and (chosen < n).all())
    require(inside, where, "rows outside the pool", f"0 .. {n - 1}")
    require(len(np.unique(chosen)) == size, where, "repeated rows", "distinct ones")
    return chosen.astype(np.int64)
