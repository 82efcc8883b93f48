"""Distortion: exact for p = 2 and in the plane, below its bound elsewhere, zero for everything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.coresets.distortion import embedding_distortion, embedding_distortions
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.draws import Draw
from scoredraw.errors import InputError
from scoredraw.sampling import poisson, systematic, uniform

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


def ratios(A: Float, draw: Draw, p: float, x: Float) -> Float:
    sampled = draw.weights @ np.abs(A[draw.indices] @ x) ** p
    return np.asarray(sampled / (np.abs(A @ x) ** p).sum(0))


def test_two_is_an_eigenvalue_problem() -> None:
    A = uneven(80, 4)
    draw = poisson(lewis_weights(A, 2), 40, rng=0)
    found = embedding_distortion(A, draw, 2)
    assert found.exact
    assert found.lower == found.upper
    sample = A[draw.indices] * np.sqrt(draw.weights)[:, None]
    values = np.linalg.eigvals(np.linalg.solve(A.T @ A, sample.T @ sample)).real
    np.testing.assert_allclose(found.lower, np.abs(values - 1).max(), rtol=1e-9)


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_the_plane_by_brute_force(p: float) -> None:
    A = uneven(40, 2)
    draw = systematic(lewis_weights(A, p), 15, rng=0)
    angles = np.linspace(0, np.pi, 400_001)
    want = np.abs(ratios(A, draw, p, np.vstack([np.cos(angles), np.sin(angles)])) - 1).max()
    found = embedding_distortion(A, draw, p)
    assert found.exact == (p == 1)
    np.testing.assert_allclose(found.lower, want, rtol=1e-5)
    assert found.lower >= want * (1 - 1e-6)
    assert found.upper >= found.lower


def test_one_column() -> None:
    a = np.arange(1.0, 11.0)[:, None]
    draw = uniform(10, 4, rng=0)
    found = embedding_distortion(a, draw, 3)
    assert found.exact
    np.testing.assert_allclose(found.lower, abs(ratios(a, draw, 3, np.ones((1, 1)))[0] - 1))


@pytest.mark.parametrize("p", [1.0, 1.5, 4.0])
def test_the_search_finds_at_least_what_random_vectors_find(p: float) -> None:
    A = uneven(150, 5)
    draw = systematic(lewis_weights(A, p), 60, rng=1)
    found = embedding_distortion(A, draw, p, rng=3)
    x = np.random.default_rng(0).standard_normal((5, 20_000))
    assert found.lower > np.abs(ratios(A, draw, p, np.linalg.qr(A)[1] @ x) - 1).max()
    assert not found.exact
    assert found.upper >= found.lower


def test_the_search_for_two_reaches_the_eigenvalue() -> None:
    """The same search at p = 2 + 1e-9 against the exact value at two."""
    A = uneven(200, 6)
    draw = systematic(lewis_weights(A, 2), 80, rng=1)
    searched = embedding_distortion(A, draw, 2 + 1e-9, steps=200).lower
    np.testing.assert_allclose(searched, embedding_distortion(A, draw, 2).lower, rtol=1e-3)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_everything_has_no_distortion_and_nothing_all(p: float) -> None:
    A = uneven(30, 3)
    for draw in (uniform(30, 30, rng=0), systematic(np.ones(30), 30, rng=0)):
        assert embedding_distortion(A, draw, p) == (0.0, 0.0, True)
    nothing = Draw(np.zeros(0, np.int64), np.zeros(0), 30)
    assert abs(embedding_distortion(A, nothing, p).lower - 1) < 1e-12


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_lost_direction_is_seen(p: float) -> None:
    A = np.column_stack([uneven(50, 3), np.zeros(50)])
    A[7, 3] = 5.0
    keep = np.delete(np.arange(50), 7)
    draw = Draw(keep, np.ones(49), 50)
    assert embedding_distortion(A, draw, p).lower > 1 - 1e-6


def test_many_draws_are_each_what_they_are_alone_and_repeats_add_up() -> None:
    A = uneven(60, 4)
    draws = [systematic(np.ones(60), 20, rng=seed, order="random") for seed in range(5)]
    many = embedding_distortions(A, draws, 1, rng=2, workers=2)
    assert many == [embedding_distortion(A, draw, 1, rng=2) for draw in draws]
    twice = Draw(np.array([0, 0, 1]), np.array([1.0, 1.0, 2.0]), 60)
    once = Draw(np.array([0, 1]), np.array([2.0, 2.0]), 60)
    assert embedding_distortion(A, twice, 1) == embedding_distortion(A, once, 1)


def test_bad_input() -> None:
    A = uneven(10, 2)
    draw = uniform(10, 3, rng=0)
    with pytest.raises(InputError, match="p"):
        embedding_distortion(A, draw, 0.5)
    with pytest.raises(InputError, match="from a pool of 10"):
        embedding_distortion(uneven(11, 2), draw, 1)
    with pytest.raises(InputError, match="n_starts"):
        embedding_distortion(A, draw, 1, n_starts=0)
