"""Errors of estimated confidences: exact enumeration, simulation, limits, what the paper prints."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from scoredraw.errors import InputError
from scoredraw.language.estimation_error import (
    consistency_error,
    consistency_error_independent,
    model_error,
    path_error,
    printed_consistency_error,
    printed_pruning_bound,
    seen_mass,
    seen_mass_squared,
    vote_error,
)
from scoredraw.language.perplexity_consistency import choose_in_rows

pytestmark = pytest.mark.oracle


def enumerated(p: float, k: int, n: int) -> tuple[float, float]:
    """E[p̂] and E[p̂²] over all (k + 1)^n sequences of k equal paths and "another answer"."""
    q = p / k
    first = second = 0.0
    for sequence in product(range(k + 1), repeat=n):
        chance = np.prod([q if path < k else 1 - p for path in sequence])
        seen = q * len({path for path in sequence if path < k})
        first, second = first + chance * seen, second + chance * seen**2
    return float(first), float(second)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_moments_are_those_of_every_sequence(p: float, k: int, n: int) -> None:
    first, second = enumerated(p, k, n)
    assert seen_mass(p, n, k) == pytest.approx(first, abs=1e-14)
    assert seen_mass_squared(p, n, k) == pytest.approx(second, abs=1e-14)


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("k", [1, 4])
def test_the_squared_error_of_a_simulation(k: int, right: int) -> None:
    """100,000 runs of 12 samples; 5 standard errors: a false alarm in a million a comparison."""
    p, n, runs = 0.3, 12, 100_000
    rng = np.random.default_rng(0)
    paths = np.minimum((rng.random((runs, n)) * k / p).astype(np.int64), k)
    seen = (paths[:, :, None] == np.arange(k)).any(axis=1)
    shares = (paths < k).mean(axis=1)
    for estimate, mass, law in (
        (shares, p, vote_error(p, n)),
        (seen.sum(axis=1) * p / k, p, consistency_error(p, n, right, k)),
        (seen[:, 0] * p / k, p / k, path_error(p / k, n, right)),
    ):
        errors = (estimate - right) ** 2 - model_error(mass, right)
        assert abs(errors.mean() - law) < 5 * errors.std() / np.sqrt(runs)


def test_what_the_methods_compute_follows_the_laws() -> None:
    """SC's squared estimation error is p (1 - p)/n within 5 %, by the method itself.

    The relative standard error of a variance of 40,000 runs is 0.7 %: 7 standard errors.
    """
    p, n, runs = 0.4, 20, 40_000
    rng = np.random.default_rng(1)
    codes = (rng.random((runs, n)) < p).astype(np.int64)
    found = choose_in_rows(codes, np.zeros((runs, n)), method="sc", groups=2).confidence[:, 1]
    assert ((found - p) ** 2).mean() == pytest.approx(float(vote_error(p, n)), rel=0.05)


def test_one_path_is_the_law_of_perplexity() -> None:
    n = np.arange(30)
    for right in (0, 1):
        np.testing.assert_allclose(
            consistency_error(0.2, n, right), path_error(0.2, n, right), rtol=0, atol=1e-15
        )
        independent = consistency_error_independent(0.2, n, right)
        np.testing.assert_allclose(independent, path_error(0.2, n, right), rtol=0, atol=1e-15)


def test_without_samples_the_error_is_that_of_saying_nothing() -> None:
    """p̂ = 0, so the squared error is I: true of the exact form and not of the printed one."""
    for right in (0, 1):
        for k in (1, 2, 7):
            total = consistency_error(0.3, 0, right, k) + model_error(0.3, right)
            assert total == pytest.approx(right, abs=1e-15)
    printed = printed_consistency_error(0.3, 0, 0, 2) + model_error(0.3, 0)
    assert printed == pytest.approx(-(0.3**2))  # a negative square


def test_independence_is_close_for_small_paths_and_exact_in_the_limit() -> None:
    n = np.arange(1, 200)
    exact = consistency_error(0.2, n, 1, 50)
    gap = np.abs(consistency_error_independent(0.2, n, 1, 50) - exact)
    assert gap.max() < 2e-3 * np.abs(exact).max()
    assert np.abs(printed_consistency_error(0.2, n, 1, 50) - exact).max() > 10 * gap.max()


def test_the_rate_is_exponential() -> None:
    """error(n + 1) / error(n) → α = 1 - p/k."""
    p, k = 0.4, 5
    n = np.arange(80, 100)
    error = consistency_error(p, n, 1, k)
    np.testing.assert_allclose(error[1:] / error[:-1], 1 - p / k, rtol=2e-3)
    assert vote_error(p, 200) / vote_error(p, 100) == 0.5


@pytest.mark.contract
def test_refusals() -> None:
    with pytest.raises(InputError, match=r"p: got \[1.5\], want probabilities"):
        vote_error(1.5, 3)
    with pytest.raises(InputError, match=r"n: got 0\.0, want 1 or more"):
        vote_error(0.5, 0)
    with pytest.raises(InputError, match="right: got"):
        path_error(0.5, 1, 0.5)
    with pytest.raises(InputError, match="n: got"):
        consistency_error(0.5, -1, 0)
    with pytest.raises(InputError, match="paths: got"):
        consistency_error(0.5, 1, 0, 0)
    with pytest.raises(InputError, match="alpha: got 1"):
        printed_pruning_bound(1, 1, 0.1, 1)
