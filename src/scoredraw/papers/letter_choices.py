"""Paper 07 at length: a small language model picks requests to a voice assistant by a letter.

SmolLM2-135M-Instruct is shown ten requests of the set and ten candidates of CLINC150, and the most
probable of the letters A to J is the pick (`LogprobChooser`). The candidates come in random order,
so a model that reads them would name each letter equally often. A window is shown in one order, in
two, or in as many as there are letters, and the log-probabilities are added up: in the last case
each candidate has had every letter, and what a letter is worth by itself cancels. What was picked
trains a classifier on sentence vectors, against uniform draws of the same size.

The picks are logged under the user's cache directory, and a run that was cut off goes on there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw import datasets
from scoredraw.data_selection.add_one_in import LetterBias, LogprobChooser, letter_bias
from scoredraw.metrics import mean_interval
from scoredraw.papers.sentence_embeddings import cache_directory, encode
from scoredraw.reports import Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import uniform
from scoredraw.set_selection import SelectionLog, add_one_in
from scoredraw.small_models import small_model
from scoredraw.uniforms import generator

LETTERS = 10


@dataclass(frozen=True)
class Scale:
    """How much is run: intents of the pool, requests kept, (orders, runs), and uniform draws.

    About 1,800 forward passes of 500 tokens: twenty minutes on two idle cores.
    """

    intents: int = 20
    kept: int = 120
    runs: tuple[tuple[int, int], ...] = ((1, 2), (2, 2), (LETTERS, 1))
    uniform_draws: int = 100


class Requests(NamedTuple):
    texts: list[str]
    vectors: NDArray[np.float32]
    y: NDArray[np.int64]
    test_vectors: NDArray[np.float32]
    test_y: NDArray[np.int64]

    @classmethod
    def load(cls, intents: int, rng: int) -> Requests:
        """The training and test requests of some intents, drawn at random."""
        data = datasets.load("clinc150")
        assert data.texts is not None
        names = [i for i, name in enumerate(data.target_names) if name != "oos"]
        kept = generator(rng).permutation(names)[:intents]
        train, test = (
            rows[np.isin(data.y[rows], kept)]
            for rows in (data.splits["train"], data.splits["test"])
        )
        texts, asked = ([data.texts[i] for i in rows] for rows in (train, test))
        return cls(texts, encode(texts), data.y[train], encode(asked), data.y[test])

    def accuracy(self, rows: NDArray[np.int64]) -> float:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=10.0, max_iter=1000).fit(self.vectors[rows], self.y[rows])
        return float(model.score(self.test_vectors, self.test_y))


def add_to(report: Report, scale: Scale, rng: int) -> None:
    """Pick, and add what came of it to the report: three claims on letters, one on accuracy."""
    requests = Requests.load(scale.intents, rng)
    chooser = LogprobChooser(*small_model())
    logs = {
        orders: [pick(requests, chooser, scale, orders, rng + run) for run in range(runs)]
        for orders, runs in scale.runs
    }
    chance = np.array(
        [
            requests.accuracy(uniform(len(requests.y), scale.kept, rng=rng + draw).indices)
            for draw in range(scale.uniform_draws)
        ]
    )
    bias = {orders: letters_of(runs) for orders, runs in logs.items()}
    reached = {
        orders: np.array([requests.accuracy(log.indices) for log in runs])
        for orders, runs in logs.items()
    }
    report.claims.extend(claims(bias, reached, chance))
    report.tables.append(table(bias, reached, chance, requests, scale))
    report.figures.append(figure(bias))


def pick(
    requests: Requests, chooser: LogprobChooser, scale: Scale, orders: int, rng: int
) -> SelectionLog:
    name = f"smollm2-{scale.intents}-intents-{scale.kept}-of-{len(requests.texts)}"
    path = cache_directory() / "add-one-in" / f"{name}-{orders}-orders-seed-{rng}.jsonl"
    return add_one_in(
        requests.texts, scale.kept, chooser,
        context_window=10, candidate_window=LETTERS, n_orders=orders, rng=rng, log=path,
    )  # fmt: skip


def letters_of(logs: list[SelectionLog]) -> LetterBias:
    """The letters of all picks; the first order's, where there were two."""
    return letter_bias([s.place for log in logs for s in log.steps if s.place is not None], LETTERS)


def distance(bias: LetterBias) -> float:
    """Half of the sum of |share - 1/b|: the share of picks that would have to move."""
    shares = bias.counts / bias.counts.sum()
    return float(np.abs(shares - 1 / LETTERS).sum() / 2)


def claims(
    bias: dict[int, LetterBias], reached: dict[int, Any], chance: NDArray[np.float64]
) -> list[Claim]:
    model = "SmolLM2-135M, 10 candidates in random order"
    one, two, every = bias[1], bias[2], bias[LETTERS]
    first = one.counts[0] / one.counts.sum()
    low, high = np.quantile(chance, [0.025, 0.975])
    mean = float(reached[LETTERS].mean())
    return [
        Claim.judge(
            f"a small model prefers letters ({model})",
            "replies should avoid position bias",
            f"χ² {one.chi2:.1f}, p = {one.p_value:.2g}; A has {first:.0%}",
            "p below .01 against equal shares",
            one.p_value < 0.01,
        ),
        Claim.at_least(
            f"two orders bring the letters nearer to equal shares ({model})",
            "-",
            distance(one) - distance(two),
            0.05,
            "distance to equal shares in one order minus that in two, at least .05",
        ),
        Claim.judge(
            f"in as many orders as letters none is preferred ({model})",
            "-",
            f"χ² {every.chi2:.1f}, p = {every.p_value:.2g}",
            "p at least .01 against equal shares",
            every.p_value >= 0.01,
        ),
        Claim.judge(
            f"what it picks trains a better classifier than a random draw ({model}, all orders)",
            "choices of a large model beat random subsets",
            f"{mean:.3f}, of random draws 95 % lie from {low:.3f} to {high:.3f}",
            "above 97.5 % of the random draws; below 2.5 % it fails",
            True if mean > high else False if mean < low else None,
        ),
    ]


def table(
    bias: dict[int, LetterBias],
    reached: dict[int, Any],
    chance: NDArray[np.float64],
    requests: Requests,
    scale: Scale,
) -> ReportTable:
    rows: list[list[Any]] = [
        [f"letter, {orders} order{'s' if orders > 1 else ''}", mean_interval(reached[orders]),
         round(bias[orders].chi2, 1), bias[orders].p_value, round(distance(bias[orders]), 3)]
        for orders in bias
    ]  # fmt: skip
    rows.append(["random", mean_interval(chance), None, None, None])
    return ReportTable(
        f"Requests: {scale.kept} of {len(requests.texts):,} kept, {scale.intents} intents",
        ["chosen by", "test accuracy", "χ² of letters", "p", "distance to equal shares"],
        rows,
        f"SmolLM2-135M, {scale.uniform_draws} random draws. Intervals are over runs and draws.",
    )


def figure(bias: dict[int, LetterBias]) -> Figure:
    names = [chr(ord("A") + i) for i in range(LETTERS)]
    series = [
        Series(
            f"{orders} order{'s' if orders > 1 else ''}", names, found.counts / found.counts.sum()
        )
        for orders, found in bias.items()
    ]
    return Figure(
        "bar",
        "How often a small model names each letter",
        "letter",
        "share of picks",
        series,
        reference=1 / LETTERS,
        caption="Candidates in random order: equal shares are what reading them would give.",
    )
