"""Sampled and block sensitivities and totals: their sandwiches, their cost, degenerate input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets import approximate
from scoredraw.coresets.approximate import (
    approximate_sensitivities,
    block_sensitivities,
    total_sensitivity,
)
from scoredraw.coresets.combined import (
    lewis_bounds,
    sensitivity_lower_bounds,
    sensitivity_upper_bounds,
)
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 5) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


class Count:
    """A progress callback that keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


# ── against a sample ────────────────────────────────────────────────────────────────────────────


def test_against_a_sample() -> None:
    """Against a sample of about 400 of 600 rows: within the sample's own distortion, and more."""
    A = np.random.default_rng(0).standard_normal((600, 3))
    near = approximate_sensitivities(A, 1, 400, rng=0)
    assert np.abs(near / lp_sensitivities(A, 1) - 1).max() < 0.3
    for p in (1.0, 1.5, 2.0, 3.0):
        whole = approximate_sensitivities(A, p, 600, rng=0)
        np.testing.assert_allclose(whole, lp_sensitivities(A, p), rtol=1e-7)


def test_the_ratio_stays_within_the_distortion_of_the_sample() -> None:
    """In two dimensions and p = 1 the distortion ε of the sample is exact: 1/(1 ± ε) each row."""
    from scoredraw.coresets.distortion import embedding_distortion
    from scoredraw.sampling import poisson

    A = uneven(300, 2)
    weights = lewis_weights(A, 1)
    for seed in range(5):
        draw = poisson(weights, 150, rng=seed)
        error = embedding_distortion(A, draw, 1)
        assert error.exact
        ratio = approximate_sensitivities(A, 1, 150, rng=seed) / lp_sensitivities(A, 1)
        assert (ratio >= 1 / (1 + error.lower) - 1e-9).all()
        assert (ratio <= 1 / (1 - error.lower) + 1e-9).all()
        assert np.abs(ratio - 1).max() > 1e-3


@pytest.mark.parametrize("p", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("function", [approximate_sensitivities, block_sensitivities])
def test_certain_bounds_are_kept(function: Callable[..., Float], p: float) -> None:
    A = uneven(200, 3)
    low, high = lewis_bounds(lewis_weights(A, p), p, 3)
    found = function(A, p, sample=40, rng=3)
    assert (low <= found).all()
    assert (found <= high).all()


def test_some_rows_sparse_and_zero() -> None:
    A = uneven(120, 3)
    A[np.abs(A) < 0.2] = 0
    A[9] = 0
    for p in (1.0, 3.0):
        all_rows = approximate_sensitivities(A, p, 60, rng=1)
        some = approximate_sensitivities(A, p, 60, rows=[9, 40, 2, 2], rng=1)
        np.testing.assert_allclose(some, all_rows[[9, 40, 2, 2]], rtol=1e-6)
        assert all_rows[9] == 0
        sparse = approximate_sensitivities(csr_array(A), p, 60, rng=1)
        np.testing.assert_allclose(sparse, all_rows, rtol=1e-6)
        blocks = block_sensitivities(A, p, sample=60, rng=1)
        assert blocks[9] == 0
        assert ((blocks > 0) == A.any(1)).all()
        np.testing.assert_allclose(block_sensitivities(csr_array(A), p, sample=60, rng=1), blocks)
    with pytest.warns(np.exceptions.RankWarning):
        assert not block_sensitivities(np.zeros((4, 2)), 1, rng=0).any()


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────


def raw_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the certain bounds out, so that a test sees what the sums alone give."""

    def wide(weights: Float, p: float, rank: int) -> tuple[Float, Float]:
        return np.zeros(len(weights)), np.where(weights > 0, 1e9, 0.0)

    monkeypatch.setattr(approximate, "lewis_bounds", wide)


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("signs", [1, 3])
def test_a_row_is_rarely_missed(monkeypatch: pytest.MonkeyPatch, p: float, signs: int) -> None:
    """At most 2^-signs of the rows lie below σ, on the exact matrix, for every p.

    The rows of a block share their signs, so the blocks are what is independent: 40 runs of 10
    blocks. The mean share of 40 runs exceeds 2^-signs by 4 standard errors in 3e-5 of cases.
    """
    raw_blocks(monkeypatch)
    A = uneven(80, 3)
    sigma = lp_sensitivities(A, p)
    shares = []
    for seed in range(40):
        found = block_sensitivities(A, p, block=8, signs=signs, sample=80, rng=seed, workers=1)
        shares.append((found < sigma * (1 - 1e-7)).mean())
    assert np.mean(shares) <= 2.0**-signs + 4 * np.std(shares) / np.sqrt(40)


def test_the_bound_on_misses_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a, a in one block: their sum is 2a or 0, each half of the time; the bounds repair 0.

    Misses of single sums in 200 seeds, by a binomial law: outside 100 ± 35 in 7e-7 of cases.
    """
    A = np.array([[1.0], [1.0]])

    def values(seed: int) -> Float:
        return block_sensitivities(A, 1, block=2, signs=1, sample=2, rng=seed, workers=1)

    assert all(np.allclose(values(seed), 0.5) for seed in range(20))
    raw_blocks(monkeypatch)
    found = np.array([values(seed)[0] for seed in range(200)])
    assert (np.isclose(found, 0) | np.isclose(found, 1)).all()
    assert abs((found < 0.5).sum() - 100) < 35


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_a_block_takes_at_most_its_rows_together(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    """σ̃ ≤ b^{p-1} Σσ of the block, on the exact matrix; the blocks are read off the result."""
    raw_blocks(monkeypatch)
    A = uneven(60, 3)
    sigma = lp_sensitivities(A, p)
    found = block_sensitivities(A, p, block=6, signs=5, sample=60, rng=2)
    values, where, counts = np.unique(found, return_inverse=True, return_counts=True)
    assert counts.tolist() == [6] * 10
    together = np.bincount(where, sigma)
    assert (values <= 6 ** (p - 1) * together * (1 + 1e-7)).all()
    assert (values > sigma.min()).all()


def test_the_mean_over_partitions_adds_a_share_of_the_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E σ̃_i ≤ σ_i + 𝔖 (b-1)/(n-1): 60 random partitions, 4 standard errors a row, 2e-3 in all."""
    raw_blocks(monkeypatch)
    A = uneven(60, 2)
    sigma = lp_sensitivities(A, 1)
    found = np.array(
        [
            block_sensitivities(A, 1, block=5, signs=3, sample=60, rng=seed, workers=1)
            for seed in range(60)
        ]
    )
    error = found.std(0) / np.sqrt(60)
    assert (found.mean(0) <= sigma + (sigma.sum() - sigma) * 4 / 59 + 4 * error).all()


def test_how_many_programmes_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = approximate.solve_programmes

    def counting(basis: Float, targets: Float, *rest: Any) -> Float:
        solved.append(len(targets))
        return solve(basis, targets, *rest)

    monkeypatch.setattr(approximate, "solve_programmes", counting)
    A = uneven(250, 3)
    A[17] = 0  # no row to solve for
    approximate_sensitivities(A, 1, 100, rng=0)
    block_sensitivities(A, 1, block=20, signs=3, sample=100, rng=0)
    block_sensitivities(A, 1, block=1, signs=1, sample=100, rng=0)
    assert solved == [249, 3 * 13, 249]


def test_blocks_of_one_row_are_the_rows() -> None:
    A = uneven(80, 3)
    one = block_sensitivities(A, 1, block=1, signs=1, sample=50, rng=4)
    np.testing.assert_allclose(one, approximate_sensitivities(A, 1, 50, rng=4), rtol=1e-7)


# ── the total ───────────────────────────────────────────────────────────────────────────────────


def test_total_from_a_few() -> None:
    """Within 5 standard errors: a false alarm in 2e6 runs, were the errors normal."""
    A = uneven(500, 4)
    for p in (1.0, 3.0):
        estimate, error = total_sensitivity(A, p, size=60, rng=1)
        assert 0 < error < 0.2 * estimate
        assert abs(estimate - lp_sensitivities(A, p).sum()) < 5 * error


@pytest.mark.parametrize("p", [1.0, 1.5, 4.0])
def test_the_default_reaches_an_eighth(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    """Mean and error in 400 estimates: unbiased within 4.5 s.e. (7e-6), relative s.e. ≤ 1/8.

    The exact sensitivities are looked up, so that an estimate costs a draw.
    """
    A = uneven(400, 5)
    sigma, asked = lp_sensitivities(A, p), []

    def known(A: Any, p: float, *, rows: Any, workers: Any, progress: Any) -> Float:
        asked.append(len(rows))
        return sigma[rows]

    monkeypatch.setattr(approximate, "lp_sensitivities", known)
    found = np.array([total_sensitivity(A, p, rng=seed) for seed in range(400)])
    assert max(asked) <= np.ceil(16 * 5 ** abs(1 - p / 2))
    spread = found[:, 0].std()
    assert abs(found[:, 0].mean() - sigma.sum()) < 4.5 * spread / 20
    assert spread < sigma.sum() / 8
    assert abs((found[:, 1] ** 2).mean() / spread**2 - 1) < 0.35  # s.e. of a variance: 7 %


def test_a_total_of_all_rows_is_exact() -> None:
    A = uneven(20, 2)
    A[3] = 0
    value, error = total_sensitivity(A, 1, size=19, rng=0)
    assert (value, error) == (pytest.approx(lp_sensitivities(A, 1).sum()), 0)
    assert total_sensitivity(A, 1, size=18, rng=0)[1] > 0


# ── one door ────────────────────────────────────────────────────────────────────────────────────


def test_one_door() -> None:
    A, rows = uneven(90, 3), [5, 0, 88]
    want = {
        "sampled": approximate_sensitivities(A, 1, 50, rng=2),
        "block": block_sensitivities(A, 1, block=5, sample=50, rng=2),
        "upper": sensitivity_upper_bounds(A, 1),
        "lower": sensitivity_lower_bounds(A, 1),
    }
    options: dict[str, dict[str, Any]] = {
        "sampled": {"sample": 50}, "block": {"block": 5, "sample": 50},
    }  # fmt: skip
    for method, values in want.items():
        more = options.get(method, {})
        found = lp_sensitivities(A, 1, method=method, rng=2, **more)
        np.testing.assert_allclose(found, values, rtol=1e-9)
        some = lp_sensitivities(A, 1, method=method, rng=2, rows=rows, **more)
        np.testing.assert_allclose(some, values[rows], rtol=1e-7)
    leverage = lp_sensitivities(A, 1, method="upper", source="leverage")
    np.testing.assert_allclose(leverage, sensitivity_upper_bounds(A, 1, source="leverage"))


def test_progress_reaches_the_end() -> None:
    A = uneven(300, 3)
    for p in (1.0, 1.5, 3.0, np.inf):
        seen = Count()
        lp_sensitivities(A, p, rows=range(60) if p == np.inf else None, progress=seen)
        done = [call[0] for call in seen.calls]
        assert len(done) >= 2
        assert done == sorted(done)
        assert seen.calls[-1] == ((60, 60) if p == np.inf else (300, 300))
    seen = Count()
    lp_sensitivities(A, 1, method="sampled", sample=100, rng=0, progress=seen)
    assert seen.calls[-1] == (300, 300)
    seen = Count()
    block_sensitivities(A, 1, block=10, signs=2, sample=100, rng=0, progress=seen)
    assert seen.calls[-1] == (60, 60)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: approximate_sensitivities(np.eye(2), np.inf, 2), "p: got inf"),
        (lambda: approximate_sensitivities(np.eye(2), 0.5, 2), "p: got 0.5"),
        (lambda: approximate_sensitivities(np.eye(2), 1, 0), "sample: got 0"),
        (lambda: approximate_sensitivities(uneven(99, 9), 1, 3, rng=0), "sample: got 3 rows of"),
        (lambda: approximate_sensitivities(np.eye(2), 1, rows=[2]), "rows"),
        (lambda: block_sensitivities(np.eye(2), 1, block=0), "block: got 0"),
        (lambda: block_sensitivities(np.eye(2), 1, signs=0), "signs: got 0"),
        (lambda: block_sensitivities(np.array([[np.nan]]), 1), "nan at row 0"),
        (lambda: total_sensitivity(np.eye(2), np.inf), "p: got inf"),
        (lambda: total_sensitivity(np.eye(2), 1, size=1), "size: got 1"),
        (lambda: lp_sensitivities(np.eye(2), 1, method="best"), "method: got 'best'"),
        (lambda: lp_sensitivities(np.eye(2), 1, block=3), "options: got block"),
        (lambda: lp_sensitivities(np.eye(2), 1, method="upper", block=3), "options: got 'block'"),
        (lambda: lp_sensitivities(np.eye(2), 1, method="upper", source="x"), "source: got 'x'"),
        (lambda: lp_sensitivities(np.eye(2), np.inf, method="lower"), "p: got inf"),
    ],
)
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
