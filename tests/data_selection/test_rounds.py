"""Rounds by score and rounds of a stream."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.data_selection.repeated_sampling import BernoulliRounds, ResampledSubset
from scoredraw.sampling import exponential_keys


@pytest.mark.oracle
def test_scored_rounds_follow_the_law_of_weighted_draws_without_replacement() -> None:
    """Inclusion of 6 rows against exact enumeration, 5 standard errors each: 4e-6."""
    scores = np.array([0.0, 1.0, -1.0, 2.0, 0.5, 0.0])
    p = np.exp(scores) / np.exp(scores).sum()
    exact = np.zeros(6)
    for i in range(6):
        for j in range(6):
            if i != j:
                exact[[i, j]] += p[i] * p[j] / (1 - p[i])
    rounds = 4000
    sampler = ResampledSubset(scores, num_samples=2, seed=9)
    got = np.bincount(np.concatenate([sampler.subset(t) for t in range(rounds)])) / rounds
    assert (np.abs(got - exact) < 5 * np.sqrt(exact * (1 - exact) / rounds)).all()
    peer = [exponential_keys(np.exp(scores), 2, rng=s).indices for s in range(rounds)]
    other = np.bincount(np.concatenate(peer)) / rounds
    assert (np.abs(got - other) < 5 * np.sqrt(2 * exact * (1 - exact) / rounds)).all()


@pytest.mark.property
def test_scores_too_far_apart_for_a_softmax_still_fill_the_round() -> None:
    scores = np.array([0.0, -5000.0, 5000.0, -9000.0])
    for t in range(5):
        assert sorted(ResampledSubset(scores, num_samples=3).subset(t).tolist()) == [0, 1, 2]


@pytest.mark.property
def test_recomputed_scores_choose_the_largest_each_round() -> None:
    table = np.random.default_rng(0).normal(size=(5, 40))
    calls = []

    def scores(t: int) -> np.ndarray:
        calls.append(t)
        return table[t]

    sampler = ResampledSubset(scores, 0.25, n=40, mode="rc")
    for t in range(5):
        assert set(sampler.subset(t).tolist()) == set(np.argsort(-table[t])[:10].tolist())
    assert calls == list(range(5))


@pytest.mark.property
def test_scored_rounds_are_addressed_by_round_and_split_over_ranks() -> None:
    scores = np.linspace(-1, 1, 30)
    a, b = ResampledSubset(scores, 0.3, seed=2), ResampledSubset(scores, 0.3, seed=2)
    assert a.subset(7).tolist() == b.subset(7).tolist() != a.subset(8).tolist()
    ranks = [ResampledSubset(scores, 0.3, seed=2, rank=r, world_size=3) for r in range(3)]
    joined = np.concatenate([r.indices(7) for r in ranks])
    assert sorted(joined.tolist()) == sorted(a.subset(7).tolist())


@pytest.mark.oracle
def test_bernoulli_rounds_keep_their_share_independently() -> None:
    """Size and overlap of two rounds of 40 000, within 5 standard errors: 1e-6 each."""
    n, r = 40_000, 0.2
    rounds = BernoulliRounds(r, seed=4)
    first, second = rounds.keep_block(0, n, 0), rounds.keep_block(0, n, 1)
    for kept, p in ((first, r), (second, r), (first & second, r * r)):
        assert abs(kept.mean() - p) < 5 * np.sqrt(p * (1 - p) / n)
    order = np.random.default_rng(1).permutation(n)
    np.testing.assert_array_equal(rounds.keep(order, 1), second[order])


# ── steps and refusals ──────────────────────────────────────────────────────────────────────────
