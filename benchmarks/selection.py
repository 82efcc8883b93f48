"""Greedy facility location against apricot, farthest-first centres against scikit-learn's loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from benchmarks.contest import Contest, Limit
from scoredraw.data_selection.representatives import facility_location, k_center
from scoredraw.draws import Draw

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def selection(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """1,000 of 20,000 rows of a mixture; apricot holds 3.2 GB of similarities, we hold none."""
    n, d, size = (600, 8, 60) if tiny else (20_000, 64, 1000)
    x = mixture(n, d)
    yield _against_apricot(x, x, size, "sqeuclidean")
    # apricot's "cosine" is the squared cosine; on the sphere its "euclidean" is the cosine
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    yield _against_apricot(x, unit, size, "cosine")
    yield _against_the_loop(x, size)
    what = f"peak memory of facility location, {_size(x, size)}"
    yield Limit(what, "MB", lambda: peak_megabytes(n, d, size), 400.0)


def mixture(n: int, d: int) -> Float:
    """Rows around 200 centres that are as far from each other as rows are from their centre."""
    rng = np.random.default_rng(0)
    centres = 1.5 * rng.standard_normal((200, d))
    return np.asarray(centres[rng.integers(200, size=n)] + rng.standard_normal((n, d)))


def _against_apricot(
    x: Float, theirs: Float, size: int, similarity: Literal["sqeuclidean", "cosine"]
) -> Contest:
    """apricot's "two-stage": its default, "lazy", takes half as long again."""
    from apricot import FacilityLocationSelection

    def ours() -> Draw:
        return facility_location(x, size, similarity=similarity, method="lazy")

    def peer() -> Int:
        selector = FacilityLocationSelection(size, metric="euclidean", optimizer="two-stage")
        return np.asarray(selector.fit(theirs).ranking)

    what = f"facility location, {similarity}, {_size(x, size)}"
    check = _same_objective(theirs)
    return Contest(what, "apricot, two-stage", ours, peer, check, 1 / 3, repeats=2)


def _same_objective(x: Float) -> Callable[[Draw, Int], None]:
    """The same sum of distances to the nearest pick; picks may differ where gains are tied."""

    def check(ours: Draw, theirs: Int) -> None:
        assert len(np.unique(ours.indices)) == len(np.unique(theirs)) == len(theirs)
        totals = [
            sum(
                float(cdist(x[at : at + 1000], x[picks], "sqeuclidean").min(axis=1).sum())
                for at in range(0, len(x), 1000)
            )
            for picks in (ours.indices, theirs)
        ]
        np.testing.assert_allclose(totals[0], totals[1], rtol=1e-9)

    return check


def _against_the_loop(x: Float, size: int) -> Contest:
    """Sener and Savarese's way: a column of scikit-learn's distances for every pick."""
    from sklearn.metrics import pairwise_distances

    def loop() -> Int:
        near, picks = np.full(len(x), np.inf), [0]
        for _ in range(size - 1):
            near = np.minimum(near, pairwise_distances(x, x[picks[-1:]])[:, 0])
            picks.append(int(near.argmax()))
        return np.array(picks)

    def same(ours: Draw, theirs: Int) -> None:
        assert ours.indices.tolist() == theirs.tolist()

    what = f"k-center, {_size(x, size)}"
    run = "pairwise_distances, a loop"
    return Contest(what, run, lambda: k_center(x, size, start=0), loop, same, 1 / 3, repeats=3)


def peak_megabytes(n: int, d: int, size: int) -> float:
    """Peak resident memory of a process that makes the rows, picks and leaves."""
    code = f"""
import resource
from benchmarks.selection import facility_location, mixture
facility_location(mixture({n}, {d}), {size}, similarity="sqeuclidean")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    # A child starts with its parent's peak on its books: let that be the shell's.
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return float(done.stdout) * (1 / 2**20 if sys.platform == "darwin" else 1 / 2**10)


def _size(x: Float, size: int) -> str:
    return f"{size:,} of {len(x):,} x {x.shape[1]}"
