"""Minimum Bayes risk of many pools, and chrF of a whole pool, against mbrs and sacrebleu.

mbrs needs older versions of what this environment holds: `make mbr` gives it one of its own. Where
it cannot be imported, the same decision is made by a loop over candidates, and the line says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.language.minimum_bayes_risk import expected_utility, pick
from scoredraw.language.text_utilities import chrf_matrix

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def minimum_bayes_risk(*, tiny: bool = False) -> Iterator[Contest]:
    """Picks from given utilities of 64 candidates each, and the utilities of one pool of texts."""
    problems, n = (20, 8) if tiny else (1000, 64)
    utilities = np.random.default_rng(0).random((problems, n, n)).astype(np.float32)
    peer, theirs = _peer(utilities)

    def ours() -> Int:
        return pick(expected_utility(utilities, include_self=True))  # as mbrs counts

    what = f"MBR from given utilities, {problems:,} x {n} candidates"
    yield Contest(what, peer, ours, theirs, _same, 1.0)
    yield _chrf(4 if tiny else 32, 60 if tiny else 200)


def _peer(utilities: npt.NDArray[np.float32]) -> tuple[str, Callable[[], Int]]:
    """mbrs with a metric that knows the utilities already, or a loop where it is not installed."""
    if importlib.util.find_spec("mbrs") is None:
        return "a loop over candidates (mbrs is not installed)", lambda: _loop(utilities)
    return "mbrs DecoderMBR", _mbrs(utilities)


def _loop(utilities: npt.NDArray[np.float32]) -> Int:
    picks = []
    for u in utilities:
        scores = [float(np.mean(row, dtype=np.float64)) for row in u]
        picks.append(max(range(len(scores)), key=scores.__getitem__))
    return np.array(picks)


def _mbrs(utilities: npt.NDArray[np.float32]) -> Callable[[], Int]:
    import torch

    mbr: Any = importlib.import_module("mbrs.decoders.mbr")
    base: Any = importlib.import_module("mbrs.metrics.base")

    class Known(base.Metric):
        """Hands out the matrix of the problem at hand."""

        matrix: Any = None

        def score(self, hypothesis: str, reference: str, *_: Any, **__: Any) -> float:
            return float(self.matrix[int(hypothesis), int(reference)])

        def pairwise_scores(self, *_: Any, **__: Any) -> Any:
            return self.matrix

    metric = Known(Known.Config())
    decoder = mbr.DecoderMBR(mbr.DecoderMBR.Config(), metric)
    names = [str(i) for i in range(utilities.shape[1])]
    matrices = torch.from_numpy(utilities)

    def decode() -> Int:
        picks = []
        for matrix in matrices:
            metric.matrix = matrix
            picks.append(decoder.decode(names, names).idx[0])
        return np.array(picks)

    return decode


def _chrf(n: int, length: int) -> Contest:
    """All pairs of a pool of texts."""
    from sacrebleu.metrics import CHRF

    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlu    "))
    texts = ["".join(rng.choice(letters, length)) for _ in range(n)]
    metric = CHRF()

    def theirs() -> Float:
        return np.array([[metric.sentence_score(a, [b]).score for b in texts] for a in texts])

    what = f"chrF of all pairs, {n} texts of {length} characters"
    return Contest(
        what, "sacrebleu, pair by pair", lambda: chrf_matrix(texts, texts), theirs, _close, 1.0,
        repeats=2,
    )  # fmt: skip


def _same(ours: Int, theirs: Int) -> None:
    np.testing.assert_array_equal(ours, theirs)


def _close(ours: Float, theirs: Float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
