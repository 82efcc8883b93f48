"""Root leverage, sums and splits: laws of the draw, identities, degenerate and bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scoredraw.coresets.combined import (
    root_leverage,
    root_leverage_scores,
    sample_size,
    sensitivity_lower_bounds,
    sensitivity_plus_leverage,
    sensitivity_upper_bounds,
    split_copies,
    split_rows,
    split_scores,
)
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.errors import InputError
from scoredraw.execution import BLOCK_ROWS, Engine
from scoredraw.sampling import calibrate_inclusion, poisson

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_the_law_of_the_sampled_norm(p: float) -> None:
    """E‖SAx‖_p^p = ‖Ax‖_p^p and Var = Σ(1/q - 1)|⟨a,x⟩|^{2p}, in 4000 Poisson draws.

    Both within 4 standard errors (for the variance by its fourth moment): 1.3e-4 a case.
    """
    A = uneven(60, 3)
    terms = np.abs(A @ [1.0, -0.5, 2.0]) ** p
    scores = lp_sensitivities(A, p)
    q, _ = calibrate_inclusion(scores, 20)
    totals = np.array([poisson(scores, 20, rng=seed).total(terms).value for seed in range(4000)])
    variance = ((1 / q - 1) * terms**2).sum()
    assert abs(totals.mean() - terms.sum()) < 4 * np.sqrt(variance / 4000)
    fourth = ((totals - totals.mean()) ** 4).mean()
    assert abs(totals.var() - variance) < 4 * np.sqrt((fourth - variance**2) / 4000)


def test_marginal_frequencies_are_q() -> None:
    """60 binomial frequencies of 4000 draws, each within 4.5 standard errors: 4e-4."""
    scores = lp_sensitivities(uneven(60, 3), 1)
    q, _ = calibrate_inclusion(scores, 20)
    counts = np.zeros(60)
    for seed in range(4000):
        counts[poisson(scores, 20, rng=seed).indices] += 1
    error = np.sqrt(q * (1 - q) / 4000)
    assert (np.abs(counts / 4000 - q) <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_recursive_root_leverage_is_unbiased(rounds: int) -> None:
    """500 draws: mean total, mean variance estimate and mean size within 4 standard errors."""
    A = uneven(300, 3)
    terms = np.abs(A @ [1.0, 1.0, -1.0])
    draws = [
        root_leverage(A, 1, 60, rounds=rounds, rng=seed, engine=Engine(workers=1))
        for seed in range(500)
    ]
    found = np.array([draw.total(terms) for draw in draws])
    totals, variances = found[:, 0], found[:, 1] ** 2
    assert abs(totals.mean() - terms.sum()) < 4 * totals.std() / np.sqrt(500)
    spread = np.sqrt(((totals - totals.mean()) ** 4).mean() / 500 + variances.var() / 500)
    assert abs(totals.var() - variances.mean()) < 4 * spread
    sizes = np.array([len(draw) for draw in draws])
    assert abs(sizes.mean() - 60) < 4 * sizes.std() / np.sqrt(500)
    assert all((draw.weights >= 1).all() for draw in draws)


def test_one_round_is_a_poisson_draw_by_root_leverage() -> None:
    A = uneven(200, 4)
    draw = root_leverage(A, 1.5, 50, rounds=1, rng=0)
    q, _ = calibrate_inclusion(root_leverage_scores(A, 1.5), 50)
    np.testing.assert_allclose(draw.inclusion, q[draw.indices])
    np.testing.assert_allclose(root_leverage_scores(A, 1.5), leverage_scores(A) ** 0.75)


def test_recursion_over_blocks_sparse_and_workers() -> None:
    A = uneven(2 * BLOCK_ROWS + 50, 4)
    A[np.abs(A) < 0.5] = 0
    one = root_leverage(A, 1, 300, rng=5, engine=Engine(workers=1))
    two = root_leverage(A, 1, 300, rng=5, engine=Engine(workers=3))
    assert (one.indices == two.indices).all()
    assert (one.weights == two.weights).all()
    sparse = root_leverage(csr_array(A), 1, 300, rng=5)
    assert (one.indices == sparse.indices).all()


def test_everything_is_kept_with_weight_one_where_it_fits() -> None:
    A = uneven(30, 3)
    A[4] = 0
    for size in (29, 30, 100):
        draw = root_leverage(A, 1, size, rng=0)
        assert draw.indices.tolist() == [i for i in range(30) if i != 4]
        assert (draw.weights == 1).all()


def test_heavy_rows_are_always_kept() -> None:
    A = np.zeros((2000, 8))
    A[:, :4] = uneven(2000, 4)
    heavy = np.arange(4) * 400 + 7
    A[heavy, 4 + np.arange(4)] = 1e3
    for seed in range(20):
        assert np.isin(heavy, root_leverage(A, 1, 150, rng=seed).indices).all()


@pytest.mark.property
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), p=st.sampled_from([2.5, 3.0, 6.0]), size=st.integers(3, 60))
def test_split_identity(seed: int, p: float, size: int) -> None:
    """Copies keep every norm exactly and flatten the scores; their leverage sums to d."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((25, 3)) * rng.exponential(1, (25, 1))
    sigma = lp_sensitivities(A, p)
    copies = split_copies(sigma, sigma.sum() / size)
    split = np.repeat(A / (copies ** (1 / p))[:, None], copies, axis=0)
    x = rng.standard_normal((3, 5))
    norms = (np.abs(A @ x) ** p).sum(0)
    np.testing.assert_allclose((np.abs(split @ x) ** p).sum(0), norms, rtol=1e-12)
    result = split_rows(A, p, size, sensitivities=sigma)
    assert (result.copies == copies).all()
    per_copy = np.add.reduceat(leverage_scores(split), np.r_[0, np.cumsum(copies)[:-1]])
    np.testing.assert_allclose(result.leverage, per_copy, rtol=1e-8)
    assert abs(result.leverage.sum() - 3) < 1e-10
    assert abs(result.scores.sum() - 2) < 1e-10
    assert (sigma / copies <= sigma.sum() / size * (1 + 1e-9)).all()


def test_split_computes_the_sensitivities_itself() -> None:
    A = uneven(30, 2)
    given_ = split_scores(A, 3, 10, sensitivities=lp_sensitivities(A, 3))
    np.testing.assert_allclose(split_scores(A, 3, 10), given_)


def test_plus_is_the_sum() -> None:
    A = uneven(30, 3)
    want = lp_sensitivities(A, 1.5) + leverage_scores(A)
    np.testing.assert_allclose(sensitivity_plus_leverage(A, 1.5), want)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0])
def test_bounds_from_every_source(p: float) -> None:
    A = uneven(60, 4)
    A[11] = 0
    sigma, slack = lp_sensitivities(A, p), 1 + 1e-7
    both = {}
    for source in ("lewis", "leverage", "best"):
        low = sensitivity_lower_bounds(A, p, source=source)
        high = sensitivity_upper_bounds(A, p, source=source)
        assert (low <= sigma * slack).all()
        assert (sigma <= high * slack).all()
        assert low[11] == high[11] == 0
        both[source] = low, high
    (low, high), (other_low, other_high) = both["lewis"], both["leverage"]
    np.testing.assert_allclose(both["best"][0], np.maximum(low, other_low), rtol=1e-12)
    np.testing.assert_allclose(both["best"][1], np.minimum(high, other_high), rtol=1e-12)
    assert (sensitivity_upper_bounds(A, p) == both["best"][1]).all()


def test_bounds_of_nothing_are_zero() -> None:
    for p in (1.0, 3.0):
        with pytest.warns(np.exceptions.RankWarning):
            assert not sensitivity_upper_bounds(np.zeros((3, 2)), p).any()


def test_bounds_hold_where_the_weights_have_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step of the iteration w lies below σ at some row; the certified bounds do not."""
    from scoredraw.coresets import combined

    A, p = uneven(40, 3), 1.05
    A[0] = [1e4, 0, 0]
    sigma, full = lp_sensitivities(A, p), combined.lewis_weights

    def hasty(A: object, p: float, **options: object) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return full(A, p, max_iter=1, **options)  # type: ignore[call-overload]

    assert (hasty(A, p) < sigma * (1 - 1e-3)).any()
    monkeypatch.setattr(combined, "lewis_weights", hasty)
    for source in ("lewis", "best"):
        assert (sensitivity_upper_bounds(A, p, source=source) >= sigma * (1 - 1e-9)).all()
        assert (sensitivity_lower_bounds(A, p, source=source) <= sigma * (1 + 1e-9)).all()


def test_sample_sizes_follow_the_bounds() -> None:
    total, d, eps = 9.0, 25, 0.1
    want = {
        ("sensitivity", 1): total**2, ("sensitivity", 4): total**1.5,
        ("root_leverage", 1): d / eps**2,
        ("sensitivity_plus_leverage", 1): total + d, ("split", 4): d**0.5 * total, ("lewis", 1): d,
        ("lewis", 4): d**2, ("generic", 1): total * d,
    }  # fmt: skip
    for (method, p), rows in want.items():
        got = sample_size(method, p, eps, total, d)
        assert abs(got - rows / eps**2) <= 1 + 1e-9 * rows / eps**2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: root_leverage(np.eye(3), 2, 2), "1 <= p < 2"),
        (lambda: root_leverage(np.eye(3), 0.5, 2), "1 <= p < 2"),
        (lambda: root_leverage(np.eye(3), 1, 0), "size: got 0"),
        (lambda: root_leverage(np.eye(3), 1, 2, rounds=0), "rounds"),
        (lambda: root_leverage(np.array([[np.nan]]), 1, 1), "nan at row 0"),
        (lambda: root_leverage_scores(np.eye(3), 0.9), "p: got 0.9"),
        (lambda: sensitivity_plus_leverage(np.eye(3), 3), "split_scores for p > 2"),
        (lambda: split_scores(np.eye(3), 2, 3), "sensitivity_plus_leverage or root_leverage"),
        (lambda: split_scores(np.eye(3), 3, 0), "size"),
        (lambda: split_scores(np.zeros((3, 2)), 3, 2), "nonzero row"),
        (lambda: split_scores(np.eye(3), 3, 2, sensitivities=[1.0]), "sensitivities"),
        (lambda: sensitivity_upper_bounds(np.eye(3), 0.5), "p: got 0.5"),
        (lambda: sensitivity_lower_bounds(np.eye(3), 1, source="w"), "source: got 'w'"),
        (lambda: sample_size("best", 1, 0.1, 1, 1), "method"),
        (lambda: sample_size("lewis", 1, 1.5, 1, 1), "eps"),
        (lambda: sample_size("root_leverage", 3, 0.1, 1, 1), "p < 2"),
        (lambda: sample_size("split", 1, 0.1, 1, 1), "p > 2"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(InputError, match=words):
        call()
