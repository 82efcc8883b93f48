"""Resampling a million particles against the PyPI package `particles`, whose loops are compiled.

Both sides get log-weights, normalise them and return ids. The laws are the same, the random numbers
are not, so a function of the ids is compared with its mean under the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.contest import Contest
from scoredraw import smc

FASTER = 5
SCHEMES = ("systematic", "stratified", "multinomial", "residual")


def resampling(*, tiny: bool = False) -> Iterator[Contest]:
    """Every scheme that both have."""
    from particles import resampling as peer

    n = 1000 if tiny else 1_000_000
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=n)

    def theirs(scheme: str) -> Any:
        return getattr(peer, scheme)(peer.exp_and_normalise(log_weights))

    for scheme in SCHEMES:
        ours = partial(smc.resample, log_weights, scheme, rng)
        what = f"{scheme} resampling of {n:,} particles"
        check = partial(_alike, smc.probabilities(log_weights))
        yield Contest(what, "particles", ours, partial(theirs, scheme), check, 1 / FASTER)


def _alike(p: Any, *both: Any) -> None:
    value = np.cos(np.arange(len(p)))
    for ids in both:
        assert len(ids) == len(p)
        assert abs(value[ids].mean() - p @ value) < 5 / np.sqrt(len(p))
