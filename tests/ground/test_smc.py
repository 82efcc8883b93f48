"""Weighted particles: worth, log Z, resampling schemes and the birth-death clock."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scoredraw import resampling_points, smc
from scoredraw.errors import InputError

WEIGHTS = np.log([0.05, 0.3, 0.2, 0.0625, 0.3875])
weights = st.lists(st.floats(-30, 30) | st.just(-np.inf), min_size=1, max_size=40).filter(
    lambda a: max(a) > -np.inf
)
STEADY = ["stratified", "systematic", "residual"]  # leave equal weights alone


@pytest.mark.property
@pytest.mark.parametrize("scheme", smc.SCHEMES)
@given(a=weights, size=st.integers(1, 100), seed=st.integers(0, 9))
def test_ids_are_of_particles_with_weight(scheme, a, size, seed) -> None:
    ids = smc.resample(a, scheme, seed, size=size)
    assert ids.dtype == np.int64
    assert ids.shape == (size,)
    assert (np.asarray(a)[ids] > -np.inf).all()
    assert (np.diff(ids) >= 0).all()


@pytest.mark.property
@given(a=weights, size=st.integers(1, 100), seed=st.integers(0, 9))
def test_combs_take_the_floor_or_one_more(a, size, seed) -> None:
    expected = smc.probabilities(a) * size
    for scheme in ("systematic", "residual"):
        counts = np.bincount(smc.resample(a, scheme, seed, size=size), minlength=len(a))
        assert (counts >= np.floor(expected - 1e-6)).all()
        assert (counts <= np.ceil(expected + 1e-6)).all()


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", smc.SCHEMES)
def test_counts_are_unbiased(scheme) -> None:
    """Five means of 4,000 within 4.5 sd: a false alarm in 1 of 15,000 tests."""
    size, repeats = 7, 4000
    rng = np.random.default_rng(3)
    counts = np.array(
        [
            np.bincount(smc.resample(WEIGHTS, scheme, rng, size=size), minlength=5)
            for _ in range(repeats)
        ]
    )
    off = counts.mean(axis=0) - size * np.exp(WEIGHTS)
    assert (np.abs(off) <= 4.5 * counts.std(axis=0) / np.sqrt(repeats) + 1e-12).all()
    assert counts.std() > 0


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", STEADY)
@pytest.mark.parametrize("n", [1, 3, 10, 49])
def test_equal_weights_keep_everyone_once(scheme, n) -> None:
    for seed in range(20):
        assert smc.resample(np.full(n, -3.0), scheme, seed).tolist() == list(range(n))


@pytest.mark.property
@pytest.mark.parametrize("scheme", smc.SCHEMES)
@given(a=weights, size=st.integers(1, 100), seed=st.integers(0, 9))
def test_compiled_code_gives_the_same_ids(scheme, a, size, seed) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    found = []
    for least in (1, 1 << 60):
        with mock.patch.object(resampling_points, "LARGE", least):
            found.append(smc.resample(a, scheme, seed, size=size).tolist())
    assert found[0] == found[1]


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", smc.SCHEMES)
def test_many_particles(scheme) -> None:
    """200,003, a third of them dead: the same with and without compiled code, in both threads."""
    pytest.importorskip("numba", reason="numba is not installed")
    rng = np.random.default_rng(1)
    a = np.where(rng.random(200_003) < 1 / 3, -np.inf, 3 * rng.normal(size=200_003))
    ids = smc.resample(a, scheme, 5)
    with mock.patch.object(resampling_points, "kernels", return_value=None):
        assert np.array_equal(smc.resample(a, scheme, 5), ids)
    p = smc.probabilities(a)
    spread = np.bincount(ids, minlength=len(a)) - len(a) * p
    assert np.abs(np.cumsum(spread)).max() < 4 * np.sqrt(len(a))
    assert p[ids].min() > 0


@pytest.mark.oracle
def test_words_are_those_of_splitmix64() -> None:
    """Published first outputs for the seed 1234567, whose counter starts at one."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423,
             4593380528125082431, 16408922859458223821]  # fmt: skip
    k = np.arange(1, 6, dtype=np.uint64)
    found = resampling_points.uniform(np.uint64(1234567), k)
    assert found.tolist() == [(word >> 11) * 2.0**-53 for word in words]


@pytest.mark.oracle
def test_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov at 1 in 10,000, and no correlation of neighbours beyond 4.5 sd."""
    gaps = resampling_points.exponentials(50_000, np.random.default_rng(3)).reshape(-1)[:50_000]
    assert stats.kstest(gaps, "expon").pvalue > 1e-4
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4.5 / np.sqrt(50_000)


@pytest.mark.oracle
@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-52])
def test_offsets_at_the_ends_of_a_cell(offset) -> None:
    """A comb whose last point is next to the end still has a particle for it."""

    class Fixed:
        def random(self) -> float:
            return offset

    n = 10_000
    ids = resampling_points.comb(resampling_points.weights(np.zeros(n), 0.0), n, Fixed())
    assert ids.tolist() == list(range(n))


@pytest.mark.oracle
def test_worth_and_log_mean() -> None:
    a = np.array([0.0, 1.0, -np.inf, 2.0])
    w = np.exp(a)
    assert smc.effective_size(a + 900) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
    assert smc.log_mean_weight(a + 900) == pytest.approx(np.log(w.mean()) + 900, rel=1e-12)
    values = np.array([[1.0, 2.0], [3.0, 4.0], [np.inf, np.nan], [5.0, 6.0]])
    want = (w[[0, 1, 3], None] * values[[0, 1, 3]]).sum(axis=0) / w.sum()
    np.testing.assert_allclose(smc.self_normalized(a, values), want, rtol=1e-12)
    assert smc.effective_size(np.zeros(9)) == pytest.approx(9)


@pytest.mark.oracle
@pytest.mark.parametrize(("births", "bias"), [("instantaneous", 0.005), ("accumulated", 0.02)])
def test_birth_and_death_follow_the_weights(births, bias) -> None:
    """Three kinds of particles with constant rates: shares become softmax(g t).

    40,000 particles, 4.5 sd of a share and the bias of the time step (and of births that have
    become another particle's): a false alarm in 1 of 40,000.
    """
    rates, n, steps = np.array([-2.0, 0.0, 1.0]), 40_000, 100
    kind, rng = np.arange(n) % 3, np.random.default_rng(5)
    clock = smc.BirthDeath(births)
    state = clock.init(n, rng)
    for _ in range(steps):
        ids, state = clock.step(state, rates[kind], 1 / steps, rng)
        kind = kind[ids]
    want = np.exp(rates) / np.exp(rates).sum()
    got = np.bincount(kind, minlength=3) / n
    assert np.abs(got - want).max() < 4.5 * np.sqrt(0.25 / n) + bias
    assert np.abs(got - 1 / 3).max() > 0.2


@pytest.mark.oracle
def test_births_are_those_since_the_particle_was_last_replaced() -> None:
    clock = smc.BirthDeath("accumulated")
    state = clock.init(3, 0)
    _, state = clock.step(state, [1e-9, 0.0, -1e-9], 1.0, 1)  # 0 is born a little, none dies
    ids, state = clock.step(state, [0.0, 3e3, -3e3], 1.0, 2)
    assert ids.tolist() == [0, 1, 1]
    ids, state = clock.step(state, [3e3, 0.0, -3e3], 1.0, 3)  # for 2 the births of 1 are over
    assert ids.tolist() == [0, 1, 0]


@pytest.mark.contract
def test_tensors_stay_tensors() -> None:
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    a = torch.tensor(WEIGHTS, dtype=torch.float32)
    ids = smc.resample(a, "systematic", torch.Generator().manual_seed(1))
    assert ids.dtype == torch.int64
    again = smc.resample(a, "systematic", torch.Generator().manual_seed(1))
    assert ids.tolist() == again.tolist()
    assert smc.probabilities(a).dtype == torch.float64
    source = torch.Generator().manual_seed(1)
    runs = {tuple(smc.resample(a, "multinomial", source).tolist()) for _ in range(20)}
    assert len(runs) > 5  # the generator moves on
    clock = smc.BirthDeath()
    moved, _ = clock.step(clock.init(2, 0), torch.tensor([1.0, -1.0]), 100.0, 0)
    assert moved.tolist() == [0, 0]


@pytest.mark.contract
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smc.probabilities([0.0, np.nan]), "log_weights: got nan at 1"),
        (lambda: smc.effective_size([np.inf, 0.0]), "log_weights: got inf at 0"),
        (lambda: smc.log_mean_weight([-np.inf]), "a particle with weight"),
        (lambda: smc.resample([]), r"log_weights: got \(0,\)"),
        (lambda: smc.resample([[0.0]]), r"log_weights: got \(1, 1\)"),
        (lambda: smc.resample([0.0], "best"), "scheme: got 'best'"),
        (lambda: smc.resample([0.0], size=0), "size: got 0"),
        (lambda: smc.self_normalized([0.0], [1.0, 2.0]), "values: got"),
        (lambda: smc.BirthDeath("slow"), "births: got 'slow'"),
        (lambda: smc.BirthDeath().init(1), "n: got 1"),
        (lambda: smc.BirthDeath().step(smc.BirthDeath().init(2), [1.0], 1.0), "rates: got"),
        (lambda: smc.BirthDeath().step(smc.BirthDeath().init(1 + 1), [1.0, np.nan], 1.0), "rates"),
        (lambda: smc.BirthDeath().step(smc.BirthDeath().init(2), [1.0, 0.0], 0.0), "dt: got 0"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
