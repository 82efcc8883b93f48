"""Water-filling against bisection, maps against their formulas, allocation against its rules."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.inclusion import allocate, calibrate_inclusion, linear, rank, softmax

sizes = st.floats(0.01, 60)
plain = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=60)
geometric = st.builds(
    lambda n, base, shift: [base ** (i - shift) for i in range(n)],
    st.integers(1, 60),
    st.floats(1.05, 1000.0),
    st.integers(0, 60),
)
ties = st.lists(st.sampled_from([0.0, 1e-12, 0.1, 0.3, 1.0, 3.0, 1e12]), min_size=1, max_size=60)
scores_ = st.one_of(plain, geometric, ties)


def bisected(s: np.ndarray, size: float, floor: float, costs: np.ndarray) -> np.ndarray:
    """The inclusion probabilities by bisection on log(1/alpha), in the highest precision there."""
    s, costs = s.astype(np.longdouble), costs.astype(np.longdouble)
    positive = s > 0

    def q(level: np.longdouble) -> np.ndarray:
        return np.where(positive, np.minimum(1, floor + s * np.exp(level)), 0)

    low, high = np.longdouble(-1600), np.longdouble(1600)
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if (costs * q(middle)).sum() < size else (low, middle)
    return q(high)


def sorted_out(s: np.ndarray, size: float) -> np.ndarray:
    """The inclusion probabilities by trying every number of rows at one."""
    t = np.sort(s.astype(np.longdouble))[::-1]
    rest = np.cumsum(t[::-1])[::-1]  # what the rows from the k-th on weigh
    k = np.arange(int(np.ceil(size)))
    alpha = rest[: len(k)] / (np.longdouble(size) - k)
    first = int(np.argmax(t[: len(k)] <= alpha))
    return np.minimum(1, s / alpha[first])


@pytest.mark.oracle
@settings(max_examples=300)
@given(scores_, sizes, st.sampled_from([0.0, 0.0, 1e-3, 0.2]), st.booleans(), st.integers(0, 99))
@example([1e300, 1e300, 1e-300], 2.0, 0.0, False, 0)  # the size is used up by the rows at one
@example([3.0, 3.0, 3.0, 1e-20], 3.0, 0.0, False, 0)
@example([3.0, 3.0, 1e-20, 1e-21], 2.4, 0.2, False, 0)
@example([10.0**-i for i in range(300)], 20.0, 0.0, False, 0)
def test_water_level_is_bisections(scores, size, floor, costly, seed) -> None:
    s = np.array(scores)
    assume(s.any())
    costs = np.random.default_rng(seed).uniform(0.1, 9.0, len(s)) if costly else np.ones(len(s))
    whole = costs[s > 0].sum()
    if floor:  # the floor itself must fit
        size = max(size, floor * whole * 1.01)
    q, alpha = calibrate_inclusion(s, size, floor=floor, costs=costs if costly else None)
    assert ((q >= 0) & (q <= 1)).all()
    assert (q[s == 0] == 0).all()
    if size >= whole:
        assert (q == (s > 0)).all()
        return
    assert alpha > 0
    assert float(costs @ q) == pytest.approx(size, rel=1e-9)
    np.testing.assert_allclose(q, bisected(s, size, floor, costs).astype(float), atol=2e-9)
    below = (s > 0) & (q < 1)
    np.testing.assert_allclose(q[below], floor + s[below] / alpha, rtol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("law", ["pareto", "geometric", "one giant", "two levels", "sorted"])
def test_water_level_of_large_pools(law: str) -> None:
    """More rows than a chunk, so that the subsampled start is used, and misled."""
    rng, n = np.random.default_rng(1), 200_000
    s = {
        "pareto": rng.pareto(0.7, n) + 1e-9,
        "geometric": np.exp(np.linspace(-500, 500, n)),
        "one giant": np.r_[1e30, rng.uniform(size=n - 1)],
        "two levels": np.where(np.arange(n) % 3 == 0, 1e9, 1.0),
        "sorted": np.sort(rng.lognormal(0, 4, n)),
    }[law]
    for size in (1, 17.5, 1000, n // 3, n // 3 + 1, n - 1):
        q, _ = calibrate_inclusion(s, size)
        assert q.sum() == pytest.approx(size, rel=1e-9)
        np.testing.assert_allclose(q, sorted_out(s, size).astype(float), atol=1e-9)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("scores", "size", "options", "word"),
    [
        ([], 1, {}, "scores"),
        ([[1.0]], 1, {}, "scores"),
        ([1.0, np.nan], 1, {}, "scores: got nan at row 1"),
        ([1.0, np.inf], 1, {}, "scores: got inf at row 1"),
        ([1.0, -1.0], 1, {}, "scores: got -1.0 at row 1"),
        ([0.0, 0.0], 1, {}, "scores: got only zeros"),
        ([1e308] * 3, 1, {}, "scores: got numbers whose sum overflows"),
        ([1e-310] * 3, 1, {}, "scores: got nothing above 1e-310"),
        ([1.0], 0, {}, "size"),
        ([1.0], -1, {}, "size"),
        ([1.0], np.nan, {}, "size"),
        ([1.0], np.inf, {}, "size"),
        ([1.0, 1.0], 1, {"floor": 1.0}, "floor"),
        ([1.0, 1.0], 1, {"floor": 0.5}, "size"),
        ([1.0, 1.0], 1, {"costs": [1.0]}, "costs"),
        ([1.0, 1.0], 1, {"costs": [1.0, 0.0]}, "costs: got 0.0 at row 1"),
        ([1.0, 1.0], 1, {"costs": [1.0, np.nan]}, "costs: got nan at row 1"),
    ],
)
def test_what_cannot_be_calibrated(scores, size, options, word: str) -> None:
    with pytest.raises(InputError, match=f"^{word}") as error:
        calibrate_inclusion(scores, size, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ maps


@pytest.mark.property
@settings(max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_maps_are_monotone_and_in_their_ranges(scores, eps) -> None:
    s = np.array(scores)
    order = np.argsort(s)
    for mapped, low in ((linear(s, eps), eps), (softmax(s, 1e4), 0.0), (rank(s), 1 / (2 * len(s)))):
        assert (mapped >= low * (1 - 1e-12)).all()
        assert (mapped <= 1 + 1e-12).all()
        assert (np.diff(mapped[order]) >= 0).all()


@pytest.mark.oracle
def test_maps_by_hand() -> None:
    assert linear([2.0, 4.0, 3.0], 0.1).tolist() == pytest.approx([0.1, 1.0, 0.55])
    assert linear([5.0, 5.0]).tolist() == [1.0, 1.0]
    assert softmax([0.0, 2.0], 2.0).tolist() == pytest.approx([np.exp(-1), 1.0])
    assert softmax([1e308, -1e308], 0.1).tolist() == [1.0, 0.0]
    from scipy.stats import rankdata

    s = np.random.default_rng(0).integers(0, 20, 100)
    np.testing.assert_allclose(rank(s), rankdata(s) / 100)


@pytest.mark.contract
def test_maps_refuse() -> None:
    for call in (
        lambda: linear([1.0], eps=-0.1),
        lambda: linear([1e308, -1e308]),
        lambda: softmax([1.0], temperature=0),
        lambda: softmax([1.0], temperature=float("nan")),
        lambda: rank([np.nan]),
        lambda: rank([]),
    ):
        with pytest.raises(InputError):
            call()


# ------------------------------------------------------------------ allocation


@pytest.mark.property
@settings(max_examples=200)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.data())
def test_allocation_is_exact_and_proportional(counts: list[int], data) -> None:
    size = data.draw(st.integers(len(counts), sum(counts)))
    share = allocate(counts, size)
    assert share.sum() == size
    assert (share >= 1).all()
    assert (share <= counts).all()
    quota = [Fraction(c * size, sum(counts)) for c in counts]
    if min(quota) >= 1:  # no stratum needs help: within one of its share
        assert all(abs(q - int(k)) < 1 for q, k in zip(quota, share, strict=True))


@pytest.mark.contract
def test_allocation_refuses() -> None:
    with pytest.raises(InputError, match=r"^size: got 1, want at least 1 for each of 2"):
        allocate([5, 5], 1)
    with pytest.raises(InputError, match=r"^size: got 11, want at most"):
        allocate([5, 5], 11)
