"""A method of choosing examples on real data: requests and images, clean and with wrong labels.

The same experiment for every paper that chooses labelled examples: the method beside uniform
draws, plain and by class, and beside the outsiders that cost nothing to train, on CLINC150 (a head
fine-tuned on sentence vectors) and Fashion-MNIST (a small convolutional net), with the labels as
they are and with a fifth of them wrong. One claim a case: the method beats a uniform draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.example_selector import ExampleSelector
from scoredraw.papers.selection_trials import (
    STRATIFIED,
    UNIFORM,
    Arm,
    Trial,
    clothes_trial,
    intents_trial,
)
from scoredraw.reports import Claim, Figure, Report, Series

OUTSIDERS = ("herding", "facility-location", "k-center", "uncertainty")
WRONG = 0.2


@dataclass(frozen=True)
class Scale:
    """Seeds, and the rows kept of 15,000 requests and of 10,000 images."""

    seeds: int
    intents: tuple[int, ...]
    clothes: tuple[int, ...]


SCALES = {
    "full": Scale(4, (1500,), (1000,)),
    "study": Scale(10, (750, 3000), (500, 2000)),
}


def catalogue_arm(name: str) -> Arm:
    """A method of the catalogue as an arm of a trial."""

    def arm(
        features: NDArray[np.float64], labels: NDArray[np.int64], size: int, seed: int
    ) -> NDArray[np.int64]:
        chosen = ExampleSelector(name, size=size, random_state=seed % 2**31)
        return chosen.fit(features, labels).sample_indices_

    return arm


def add_to(report: Report, methods: Mapping[str, str], says: str = "-") -> None:
    """Append the trials of these methods to a paper's report, at its scale and seed.

    methods: name in the report -> name in the catalogue. says: what the paper says of its method
    against a random subset. Nothing below full scale; there four trials, a few minutes.
    """
    if report.scale not in SCALES:
        return
    scale = SCALES[report.scale]
    arms = {shown: catalogue_arm(name) for shown, name in methods.items()}
    arms |= {name: catalogue_arm(name) for name in OUTSIDERS}
    for flip in (0.0, WRONG):
        where = f", {flip:.0%} of the labels wrong" if flip else ", clean labels"
        for trial, sizes in ((intents_trial, scale.intents), (clothes_trial, scale.clothes)):
            found = trial(arms, sizes=sizes, seeds=scale.seeds, flip=flip, rng=report.seed)
            title = found.data.split(",")[0] + where
            report.tables.append(found.table(title))
            report.figures.append(gain_figure(found, title))
            report.claims.extend(claims(found, list(methods), title, says))


def claims(trial: Trial, methods: list[str], title: str, says: str) -> list[Claim]:
    """Each method at each size against the uniform draw; the intervals hold together."""
    pairs = [(method, size) for method in methods for size in trial.sizes]
    return [
        Claim.at_least(
            f"{method} beats a uniform draw ({title}, {size:,} of {trial.pool:,})",
            says,
            trial.gain(method, size, comparisons=len(pairs)),
            0.0,
            "accuracy difference, paired by seed, at least 0",
        )
        for method, size in pairs
    ]


def gain_figure(trial: Trial, title: str) -> Figure:
    """Every arm's gain over the uniform draw."""
    names = [arm for arm in trial.arms if arm != UNIFORM]
    names = [name for name in names if name != STRATIFIED] + [STRATIFIED]
    series = []
    for size in trial.sizes:
        gains = [trial.gain(name, size) for name in names]
        values, low, high = ([getattr(g, end) for g in gains] for end in ("value", "low", "high"))
        series.append(Series(f"{size:,} kept", names, values, low, high))
    return Figure(
        "interval", f"{title}: accuracy minus a uniform draw's", "accuracy difference",
        series=series, reference=0.0,
        caption="Right of the line is better than uniform; 95 % intervals, paired by seed.",
    )  # fmt: skip
