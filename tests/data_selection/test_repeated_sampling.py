"""Repeated random sampling: its laws, its wraps, its shares, and what it refuses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scoredraw.data_selection.repeated_sampling import (
    BernoulliRounds,
    RepeatedSampling,
    ResampledSubset,
    compressed_schedule,
    expected_coverage,
    rs2_schedule,
    subset_size,
)
from scoredraw.errors import InputError

SIZES = [(10, 3), (10, 7), (12, 4), (7, 7), (50, 1), (50, 26), (50, 25), (50, 49), (97, 60)]


def visits(sampler: RepeatedSampling, rounds: int) -> np.ndarray:
    counts = np.zeros(sampler.n, dtype=int)
    for t in range(rounds):
        np.add.at(counts, sampler.subset(t), 1)
    return counts


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 60))
    return n, draw(st.integers(1, n))


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("replacement", [False, True])
def test_every_example_is_in_a_round_with_probability_m_over_n(replacement: bool) -> None:
    """Chi-square of 50 frequencies. False alarm 1e-6 for each case (fixed seed)."""
    n, m, rounds = 50, 13, 5000
    # independent rounds in both cases: one round of each of many samplers without replacement
    if replacement:
        sampler = RepeatedSampling(n, num_samples=m, replacement=True, seed=4)
        counts = visits(sampler, rounds)
    else:
        counts = np.zeros(n)
        for seed in range(rounds):
            np.add.at(counts, RepeatedSampling(n, num_samples=m, seed=seed).subset(5), 1)
    p = m / n
    # counts of a simple random sample are negatively correlated: covariance -p(1-p)/(n-1)
    statistic = ((counts - rounds * p) ** 2).sum() / (rounds * p * (1 - p)) * (n - 1) / n
    assert stats.chi2.sf(statistic, n - 1) > 1e-6


@pytest.mark.oracle
def test_pairs_of_examples_are_together_as_often_as_in_a_simple_random_sample() -> None:
    """Joint inclusion m(m-1)/n(n-1), within 5 standard errors for each of 190 pairs: 1e-4."""
    n, m, rounds = 20, 6, 6000
    sampler = RepeatedSampling(n, num_samples=m, replacement=True, seed=8)
    member = np.zeros((rounds, n))
    for t in range(rounds):
        member[t, sampler.subset(t)] = 1
    together = (member.T @ member / rounds)[np.triu_indices(n, 1)]
    p = m * (m - 1) / (n * (n - 1))
    assert np.abs(together - p).max() < 5 * math.sqrt(p * (1 - p) / rounds)


@pytest.mark.oracle
def test_coverage_with_replacement_follows_its_law() -> None:
    """Mean over 200 seeds within 4 standard errors at each of 12 rounds: false alarm < 1e-3."""
    n, m, rounds, seeds = 60, 9, 12, 200
    seen = np.zeros((seeds, rounds))
    for seed in range(seeds):
        sampler = RepeatedSampling(n, num_samples=m, replacement=True, seed=seed)
        have: set[int] = set()
        for t in range(rounds):
            have.update(sampler.subset(t).tolist())
            seen[seed, t] = len(have) / n
    law = expected_coverage(m / n, rounds, replacement=True)
    assert seen[:, 0] == pytest.approx(law[0])
    error = np.abs(seen.mean(axis=0) - law)[1:] / (seen.std(axis=0, ddof=1)[1:] / math.sqrt(seeds))
    assert error.max() < 4


@pytest.mark.oracle
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("wrap", ["carry", "official"])
def test_coverage_without_replacement_is_exact(n: int, m: int, wrap: str) -> None:
    rounds = 2 * -(-n // m)
    sampler = RepeatedSampling(n, num_samples=m, wrap=wrap, seed=3)
    law = expected_coverage(m / n, rounds)
    for t in range(rounds):
        assert (visits(sampler, t + 1) > 0).mean() == pytest.approx(law[t], abs=1e-12)


@pytest.mark.oracle
def test_coverage_with_drop_follows_its_law() -> None:
    """Mean over 400 seeds within 4.5 standard errors at 3 passes of 3 rounds: < 1e-4."""
    n, m, seeds = 10, 3, 400
    seen = np.array(
        [
            [
                (visits(RepeatedSampling(n, num_samples=m, wrap="drop", seed=s), t + 1) > 0).mean()
                for t in range(9)
            ]
            for s in range(seeds)
        ]
    )
    law = expected_coverage(m / n, 9, wrap="drop")
    deviation = np.abs(seen.mean(axis=0) - law)
    assert (deviation <= 4.5 * seen.std(axis=0, ddof=1) / math.sqrt(seeds) + 1e-12).all()


@pytest.mark.oracle
def test_full_ratio_is_a_plain_shuffle() -> None:
    for replacement in (False, True):
        sampler = RepeatedSampling(40, 1.0, replacement=replacement, seed=2)
        rounds = [sampler.subset(t).tolist() for t in range(4)]
        assert all(sorted(r) == list(range(40)) for r in rounds)
        assert len({tuple(r) for r in rounds}) == 4


@pytest.mark.oracle
@pytest.mark.parametrize("k", [2, 5, 10])
def test_without_replacement_is_ordinary_epoch_training(k: int) -> None:
    """With r = 1/k, k E rounds are E epochs of one permutation each, batch for batch (B | m)."""
    n, epochs, batch = 200, 3, 10
    short = RepeatedSampling(n, 1 / k, seed=11)
    whole = RepeatedSampling(n, 1.0, seed=11)
    rounds = [short.indices(t).reshape(-1, batch) for t in range(k * epochs)]
    epoch_batches = [whole.indices(e).reshape(-1, batch) for e in range(epochs)]
    np.testing.assert_array_equal(np.concatenate(rounds), np.concatenate(epoch_batches))
    steps = compressed_schedule(k * epochs, n // k, batch)
    assert steps == len(np.concatenate(rounds)) == compressed_schedule(epochs, n, batch)


# ── properties ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=150)
@given(
    sizes(), st.integers(0, 2**32), st.sampled_from(["carry", "drop", "official"]), st.booleans()
)
def test_rounds_are_distinct_in_range_and_of_their_size(
    size: tuple[int, int], seed: int, wrap: str, replacement: bool
) -> None:
    n, m = size
    sampler = RepeatedSampling(
        n, num_samples=m, seed=seed % 2**31, wrap=wrap, replacement=replacement
    )
    for t in range(2 * n // m + 3):
        subset = sampler.subset(t)
        assert len(subset) == len(set(subset.tolist())) == sampler.size(t) == sampler.share(t)
        assert subset.dtype == np.int64
        assert subset.min() >= 0
        assert subset.max() < n


@pytest.mark.property
@settings(max_examples=150)
@given(sizes(), st.integers(0, 2**31))
def test_carry_sees_every_example_equally_often_at_all_times(
    size: tuple[int, int], seed: int
) -> None:
    n, m = size
    sampler = RepeatedSampling(n, num_samples=m, seed=seed)
    counts = np.zeros(n, dtype=int)
    for t in range(3 * n // m + 4):
        counts[sampler.subset(t)] += 1
        exact = Fraction((t + 1) * m, n)
        assert counts.min() >= math.floor(exact)
        assert counts.max() <= math.ceil(exact)
    lcm = math.lcm(n, m) // m
    assert len(set(visits(sampler, lcm).tolist())) == 1


@pytest.mark.property
@settings(max_examples=100)
@given(sizes(), st.integers(0, 2**31), st.data())
def test_a_round_is_the_same_whenever_it_is_asked_for(
    size: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    n, m = size
    wrap = data.draw(st.sampled_from(["carry", "drop", "official"]))
    replacement = data.draw(st.booleans())
    kwargs: dict[str, Any] = {
        "num_samples": m, "seed": seed, "wrap": wrap, "replacement": replacement
    }  # fmt: skip
    in_order = [RepeatedSampling(n, **kwargs).subset(t).tolist() for t in range(12)]
    running = RepeatedSampling(n, **kwargs)
    assert [running.subset(t).tolist() for t in range(12)] == in_order
    for t in data.draw(st.lists(st.integers(0, 11), max_size=12)):
        assert running.subset(t).tolist() == in_order[t]


@pytest.mark.property
def test_wrap_fills_in_raw_order_and_the_pass_goes_on_in_raw_order() -> None:
    """A pass of "carry", put together again, is its raw order with a fill moved to the front."""
    for n, m in SIZES:
        sampler = RepeatedSampling(n, num_samples=m, seed=6)
        passes = sampler._strata[0][1]
        period = m // math.gcd(n, m)
        rounds = n * period // m
        sequence = np.concatenate([sampler.subset(t) for t in range(rounds)])
        for k, carried in enumerate(sequence.reshape(period, n)):
            raw = passes.raw(k)
            fill = -(k * n) % m
            assert sorted(carried.tolist()) == list(range(n))
            for part in (carried[:fill], carried[fill:]):
                places = np.argsort(raw)[part]
                assert (np.diff(places) > 0).all()


@pytest.mark.property
def test_a_late_round_costs_no_replay() -> None:
    """Round 10^9 of a sampler asks for the uniforms of at most three passes."""
    sampler = RepeatedSampling(1000, 0.3, seed=1)
    asked = []
    block = sampler.uniforms.block

    def counted(start: int, stop: int, *, stream: str, round: int = 0) -> np.ndarray:
        asked.append(round)
        return block(start, stop, stream=stream, round=round)

    sampler.uniforms.block = counted  # type: ignore[method-assign]
    assert len(sampler.subset(10**9)) == 300
    assert len(set(asked)) <= 3


@pytest.mark.property
def test_what_is_returned_may_be_changed() -> None:
    for kwargs in ({}, {"replacement": True}, {"wrap": "official"}, {"wrap": "drop"}):
        sampler = RepeatedSampling(30, 0.2, **kwargs)  # type: ignore[arg-type]
        subset = sampler.subset(1)
        before = subset.copy()
        subset[:] = -1
        np.testing.assert_array_equal(sampler.subset(1), before)


@pytest.mark.property
def test_other_seeds_and_other_rounds_give_other_subsets() -> None:
    for replacement in (False, True):
        all_rounds = [
            tuple(RepeatedSampling(1000, 0.1, replacement=replacement, seed=s).subset(t))
            for s in range(5)
            for t in range(5)
        ]
        assert len(set(all_rounds)) == 25


@pytest.mark.property
def test_unshuffled_rounds_are_the_same_sets_in_ascending_order() -> None:
    labels = np.arange(50) % 3
    for kwargs in ({}, {"replacement": True}, {"stratify": True, "labels": labels}):
        random = RepeatedSampling(50, 0.3, seed=3, **kwargs)  # type: ignore[arg-type]
        ordered = RepeatedSampling(50, 0.3, seed=3, shuffle=False, **kwargs)  # type: ignore[arg-type]
        for t in range(8):
            np.testing.assert_array_equal(np.sort(random.subset(t)), ordered.subset(t))
            assert (np.diff(random.subset(t)) < 0).any()


# ── strata ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=80)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(0.01, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_strata_get_their_shares_every_round(
    counts: list[int], share: float, replacement: bool, seed: int
) -> None:
    n = sum(counts)
    m = max(len(counts), round(share * n))
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    sampler = RepeatedSampling(
        n, num_samples=m, labels=labels, stratify=True, replacement=replacement, seed=seed
    )
    first = np.bincount(labels[sampler.subset(0)], minlength=len(counts))
    exact = m * np.array(counts) / n
    assert first.sum() == m
    assert (first >= 1).all()
    assert (first <= np.maximum(1, np.ceil(exact))).all()
    large = exact >= 1
    if large.all():
        assert (np.abs(first - exact) < 1).all()
    for t in range(1, 6):
        subset = sampler.subset(t)
        assert len(set(subset.tolist())) == m
        np.testing.assert_array_equal(np.bincount(labels[subset], minlength=len(counts)), first)


@pytest.mark.property
def test_stratified_passes_see_every_example_of_a_class_equally_often() -> None:
    labels = np.repeat(["a", "b", "c"], [30, 50, 20])
    sampler = RepeatedSampling(100, 0.3, labels=labels, stratify=True, seed=5)
    counts = visits(sampler, 7)
    for name, m in (("a", 9), ("b", 15), ("c", 6)):
        mine = counts[labels == name]
        exact = Fraction(7 * m, len(mine))
        assert mine.min() >= math.floor(exact)
        assert mine.max() <= math.ceil(exact)


@pytest.mark.oracle
def test_stratified_rounds_mix_the_classes() -> None:
    """The mean place of a class's examples is the middle, within 5 standard errors: 1e-6."""
    labels = np.repeat([0, 1], 50)
    sampler = RepeatedSampling(100, 0.5, labels=labels, stratify=True, seed=5)
    ones = np.array([labels[sampler.subset(t)] for t in range(400)])
    mean_place = (ones * np.arange(50)).sum(axis=1) / 25
    se = mean_place.std(ddof=1) / math.sqrt(400)
    assert abs(mean_place.mean() - 24.5) < 5 * se


# ── ranks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=100)
@given(sizes(), st.integers(1, 8), st.booleans(), st.sampled_from(["carry", "official"]))
def test_ranks_share_a_round_as_distributed_sampler_does(
    size: tuple[int, int], world: int, drop_last: bool, wrap: str
) -> None:
    n, m = size
    world = min(world, m)
    ranks = [
        RepeatedSampling(
            n, num_samples=m, seed=1, wrap=wrap, rank=r, world_size=world, drop_last=drop_last
        )
        for r in range(world)
    ]
    for t in range(4):
        subset = ranks[0].subset(t)
        shares = [rank.indices(t) for rank in ranks]
        assert {len(share) for share in shares} == {ranks[0].share(t)}
        joined = np.concatenate(shares)
        if drop_last and len(subset) >= world:
            assert len(set(joined.tolist())) == len(joined) == len(subset) // world * world
        else:
            assert set(joined.tolist()) == set(subset.tolist())
            assert 0 <= len(joined) - len(subset) < world


# ── scored rounds ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(sizes(), st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_total_steps_counts_the_batches(
    size: tuple[int, int], rounds: int, batch: int, accumulation: int, world: int
) -> None:
    n, m = size
    for wrap in ("carry", "official"):
        sampler = RepeatedSampling(n, num_samples=m, wrap=wrap, world_size=min(world, m))
        counted = sum(
            math.ceil(math.ceil(len(sampler.indices(t)) / batch) / accumulation)
            for t in range(rounds)
        )
        assert sampler.total_steps(rounds, batch, accumulation=accumulation) == counted


@pytest.mark.oracle
def test_subset_sizes_round_half_to_even_and_are_never_empty() -> None:
    assert [subset_size(10, r) for r in (0.25, 0.35, 0.001, 1.0)] == [2, 4, 1, 10]


@pytest.mark.property
@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"n": 0, "ratio": 0.5}, "n"),
        ({"n": 10}, "ratio"),
        ({"n": 10, "ratio": 0.5, "num_samples": 5}, "ratio"),
        ({"n": 10, "ratio": 0.0}, "ratio"),
        ({"n": 10, "ratio": -0.1}, "ratio"),
        ({"n": 10, "ratio": 1.01}, "ratio"),
        ({"n": 10, "ratio": float("nan")}, "ratio"),
        ({"n": 10, "num_samples": 0}, "num_samples"),
        ({"n": 10, "num_samples": 11}, "num_samples"),
        ({"n": 10, "ratio": 0.5, "wrap": "repeat"}, "wrap"),
        ({"n": 10, "ratio": 0.5, "seed": -1}, "seed"),
        ({"n": 10, "ratio": 0.5, "seed": None}, "seed"),
        ({"n": 10, "ratio": 0.2, "world_size": 3}, "world_size"),
        ({"n": 10, "ratio": 0.2, "world_size": 0}, "world_size"),
        ({"n": 10, "ratio": 0.2, "world_size": 2, "rank": 2}, "rank"),
        ({"n": 10, "ratio": 0.2, "stratify": True}, "labels"),
        ({"n": 10, "ratio": 0.2, "stratify": True, "labels": [1, 2]}, "labels"),
        ({"n": 4, "ratio": 0.5, "stratify": True, "labels": [0, 1, 2, 3]}, "num_samples"),
        ({"n": 2, "ratio": 1, "stratify": True, "labels": [0, 1], "wrap": "official"}, "stratify"),
    ],
)
def test_bad_input_is_refused_by_name(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want ") as caught:
        RepeatedSampling(**kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.property
def test_other_bad_input_is_refused_by_name() -> None:
    sampler = RepeatedSampling(10, 0.5)
    with pytest.raises(InputError, match=r"^t: got -1"):
        sampler.subset(-1)
    with pytest.raises(InputError, match=r"^batch_size: got 6.*drop_last leaves no batch"):
        sampler.total_steps(3, 6, drop_last=True)
    with pytest.raises(InputError, match=r"^batch_size: got 6.*drop_last leaves no batch"):
        compressed_schedule(3, 5, 6, drop_last=True)
    with pytest.raises(InputError, match=r"^rounds: got 0"):
        rs2_schedule(10, 0.5, 0)
    with pytest.raises(InputError, match=r"^ratio: got 0"):
        expected_coverage(0, 3)
    with pytest.raises(InputError, match=r"^ratio: got 2"):
        BernoulliRounds(2)
    with pytest.raises(InputError, match=r"^scores: got nan at row 1"):
        ResampledSubset([1.0, float("nan")], 0.5)
    with pytest.raises(InputError, match=r"^scores: got inf at row 0"):
        ResampledSubset(lambda t: np.array([np.inf, 0.0]), 0.5, n=2).subset(0)
    with pytest.raises(InputError, match=r"^scores: got 3 values, want 2"):
        ResampledSubset(lambda t: np.zeros(3), 0.5, n=2).subset(0)
    with pytest.raises(InputError, match=r"^n: got None"):
        ResampledSubset(lambda t: np.zeros(3), 0.5)
    with pytest.raises(InputError, match=r"^mode: got best"):
        ResampledSubset([1.0, 2.0], 0.5, mode="best")
