"""pass@k of many problems at many k against the textbook loop and against scorio."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest
from scoredraw.language.coverage import log_spaced_sizes, pass_at_k

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def coverage(*, tiny: bool = False) -> Iterator[Contest]:
    """From counts against the loop, from a matrix of right and wrong against scorio."""
    problems, n, points = (30, 200, 10) if tiny else (1000, 10_000, 100)
    right = _right(problems, n)
    ks = np.unique(np.round(np.linspace(1, n, points)).astype(np.int64))
    yield _against_the_loop(right, ks)
    yield _against_scorio(right, ks)
    # half of the sizes below √n, as on a curve in log k
    yield _against_scorio(right, log_spaced_sizes(n, points))


def _against_the_loop(right: Bool, ks: Int) -> Contest:
    """Chen et al. (2021): one product for each problem and each k."""
    n, counts = right.shape[1], right.sum(axis=1)

    def loop() -> Float:
        out = np.empty((len(counts), len(ks)))
        for i, c in enumerate(counts):
            for j, k in enumerate(ks):
                if n - c < k:
                    out[i, j] = 1.0
                else:
                    out[i, j] = 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        return out

    what = f"pass@k from counts, {_size(right, ks)}"
    return Contest(
        what, "np.prod, a loop", lambda: pass_at_k(n, counts, ks), loop, _close, 1 / 50, repeats=2
    )


def _against_scorio(right: Bool, ks: Int) -> Contest:
    """Both start from the matrix; scorio takes one k at a call."""
    from scorio.eval import pass_at_k as scorio_pass_at_k

    n = right.shape[1]

    def ours() -> Float:
        return np.asarray(pass_at_k(n, right.sum(axis=1), ks).mean(axis=0))

    def theirs() -> Float:
        return np.array([scorio_pass_at_k(right, int(k)) for k in ks])

    what = f"coverage from a matrix, {_size(right, ks)}"
    return Contest(what, "scorio pass_at_k", ours, theirs, _close, 1.0, repeats=3)


def _right(problems: int, n: int) -> Bool:
    """Chances of a right sample from Beta(0.5, 2): hopeless, easy and in between."""
    rng = np.random.default_rng(0)
    chances = rng.beta(0.5, 2.0, problems)
    return np.asarray(rng.random((problems, n)) < chances[:, None])


def _size(right: Bool, ks: Int) -> str:
    spacing = "log-spaced k" if np.ptp(np.diff(ks)) > 1 else "evenly spaced k"
    return f"{right.shape[0]:,} x {right.shape[1]:,}, {len(ks)} {spacing}"


def _close(ours: Float, theirs: Float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
