"""Time shift: its rule against a plain search, its laws, and the search for windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.pseudo_numerical import HOSTS, PseudoNumericalSampler
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import (
    TimeShift,
    TimeShiftSampler,
    sample_variance,
    search_shift,
    time_shift,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.property

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
ABAR = TRAINED.values
RNG = np.random.default_rng(53)
D = 60
SHAPE = RNG.normal(size=(D, D)) / 10
DATA = GaussianMixtureScore(
    [0.4, 0.6], RNG.normal(0, 0.5, (2, D)), [np.eye(D) / 8, SHAPE @ SHAPE.T + np.eye(D) / 50],
    TRAINED,
)  # fmt: skip
X = RNG.standard_normal((12, D))
SHIFTING: dict[str, Any] = {"num_steps": 12, "window": 60, "cutoff": 200}


def biased(x: Any, t: Any) -> Any:
    return DATA.eps(x, t) * 1.03


# ------------------------------------------------------------------ the decision


@settings(max_examples=80)
@given(
    variance=st.floats(0, 1.5), center=st.integers(0, 999), window=st.integers(0, 1999),
    cutoff=st.integers(0, 1000), v0=st.one_of(st.none(), st.floats(0, 0.95)),
)  # fmt: skip
def test_it_is_the_least_distance_of_the_window(variance, center, window, cutoff, v0) -> None:
    target = "plain" if v0 is None else "matched"
    rule = TimeShift(ABAR, window, cutoff, target, v0)
    found = int(rule.of_variance([variance], center)[0])
    low, high = max(0, center - window // 2), min(999, center + window // 2)
    level = 1 - ABAR + ABAR * (v0 or 0.0)
    want = low + int(np.abs(variance - level[low : high + 1]).argmin())
    assert found == (want if center > cutoff else center)


def test_equally_near_times_give_the_smaller() -> None:
    rule = TimeShift([0.75, 0.5, 0.25], 4, 0)
    assert rule.of_variance([0.375, 0.625, 0.5], 1).tolist() == [0, 1, 1]


@settings(max_examples=30)
@given(st.lists(st.floats(0, 2), min_size=2, max_size=9), st.integers(0, 999))
def test_more_variance_never_means_an_earlier_time(variances, center) -> None:
    found = TimeShift(ABAR, 100, 0).of_variance(sorted(variances), center)
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize(("target", "v0"), [("plain", None), ("matched", 0.4)])
def test_states_of_the_forward_process_get_their_own_time(target, v0) -> None:
    """In the limit of many entries, where data and noise have their variances and are unrelated."""
    columns = np.random.default_rng(0).standard_normal((500, 3))
    columns[:, 0] = 1.0
    _, data, noise = np.linalg.qr(columns)[0].T * np.sqrt(499)
    for tau in (150, 301, 500, 800, 960):
        x = TRAINED.perturb(np.sqrt(v0 or 0.0) * data[None], float(tau), noise[None])
        for centre in (tau - 30, tau, tau + 30):
            assert time_shift(x, centre, ABAR, 60, 100, target, v0).tolist() == [tau]


def test_a_centre_a_sample_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    x, center = X * 0.9, np.arange(100, 1000, 80)
    want = np.array([time_shift(x[i : i + 1], c, ABAR, 40, 300)[0] for i, c in enumerate(center)])
    assert time_shift(x, center, ABAR, 40, 300).tolist() == want.tolist()
    tensor = torch.from_numpy(x).view(12, 3, 4, 5)
    got = time_shift(tensor, torch.from_numpy(center), ABAR, 40, 300)
    assert got.dtype == torch.int64
    assert got.tolist() == want.tolist()
    half = time_shift(tensor.half(), 700, ABAR, 40, 300)
    assert (half - time_shift(tensor, 700, ABAR, 40, 300)).abs().max() <= 1


def test_variance_is_unbiased_and_over_the_entries() -> None:
    assert sample_variance(np.array([[1.0, 3.0], [0.0, 8.0]])).tolist() == [2.0, 32.0]


# ------------------------------------------------------------------ the sampler


@pytest.mark.parametrize("base", HOSTS)
@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("off", [{"window": 0}, {"window": 1}, {"cutoff": 1000}, {"cutoff": 999}])
def test_without_a_window_every_bit_is_the_hosts(base, mode, off) -> None:
    how = {**SHIFTING, "base": base, "mode": mode, **off}
    got, shifts = TimeShiftSampler(TRAINED, **how).sample(biased, X, rng=3)
    host = PseudoNumericalSampler(TRAINED, 12, base)
    np.testing.assert_array_equal(got, host.sample(biased, X, rng=3))
    np.testing.assert_array_equal(shifts, np.tile(host.times[1:, None], 12))


@pytest.mark.parametrize("base", sorted(set(HOSTS) - {"ddpm"}))
@pytest.mark.parametrize("mode", ["paper", "code"])
def test_samples_do_not_depend_on_their_company(base, mode) -> None:
    sampler = TimeShiftSampler(TRAINED, base=base, mode=mode, **SHIFTING)
    x, shifts = sampler.sample(biased, X)
    assert len(np.unique(shifts - sampler.host.times[1:, None])) > 3  # it does shift
    order = np.random.default_rng(0).permutation(12)
    turned, moved = sampler.sample(biased, X[order])
    np.testing.assert_allclose(turned, x[order], rtol=0, atol=1e-12)
    assert (moved == shifts[:, order]).all()
    for i in (0, 7):
        alone, one = sampler.sample(biased, X[i : i + 1])
        np.testing.assert_allclose(alone[0], x[i], rtol=0, atol=1e-12)
        assert (one[:, 0] == shifts[:, i]).all()


@pytest.mark.parametrize("base", HOSTS)
@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("window", [10, 300])
def test_shifts_stay_in_their_window_and_above_the_cutoff(base, mode, window) -> None:
    sampler = TimeShiftSampler(
        TRAINED, 20, base, mode=mode, window=window, cutoff=240, target="matched", data_variance=0.2
    )
    x, shifts = sampler.sample(biased, X, rng=0)
    away = shifts - sampler.host.times[1:, None]
    assert np.abs(away).max() <= window // 2
    assert (away[sampler.host.times[1:] <= 240] == 0).all()
    assert np.isfinite(x).all()
    if mode == "code":
        assert (away[0] == 0).all()
    else:
        assert np.abs(x).max() < 5  # data within 3: no extrapolation has blown up


@pytest.mark.parametrize("base", HOSTS)
def test_the_network_is_asked_at_the_shifted_times_and_the_step_starts_there(base) -> None:
    """The paper's reading: of the second step by hand, with an eps that depends on t alone."""
    asked: list[Any] = []

    def eps(x: Any, t: Any) -> Any:
        asked.append(t)
        return np.ones_like(x) * np.asarray(t)[:, None] / 1000

    sampler = TimeShiftSampler(TRAINED, base=base, **SHIFTING)
    state = sampler.init(X)
    state, times = sampler.step(state, eps, np.random.default_rng(0))
    assert (times != sampler.host.times[1]).any()
    asked.clear()
    seen = state.x
    state, _ = sampler.step(state, eps, np.random.default_rng(0))
    assert (asked[0] == times).all()
    if base in ("ddim", "deis", "dpm-solver", "s-pndm"):
        a, b = ABAR[times][:, None], ABAR[sampler.host.times[2]]
        old, new = float(sampler.host.times[0]), times.astype(float)[:, None]
        goal = float(sampler.host.times[2])
        mean = new / 1000
        if base == "deis":
            mean = None
        if base == "s-pndm":  # goes by the grid
            w = sampler.host.weights([[sampler.host.times[1], old]], [goal], 1)[0]
            mean = (w[0] * new + w[1] * old) / 1000
        if base == "dpm-solver":
            snr = TRAINED.log_snr
            share = (snr(goal) - snr(new)) / 2 / (snr(old) - snr(new))
            mean = (new + share * (old - new)) / 1000
        if mean is not None:
            want = np.sqrt(b / a) * seen
            want = want + (np.sqrt(1 - b) - np.sqrt(b / a * (1 - a))) * mean
            np.testing.assert_allclose(state.x, want, rtol=1e-9, atol=1e-9)


def test_code_lands_on_shifted_levels_and_asks_at_nominal_times() -> None:
    asked: list[Any] = []

    def eps(x: Any, t: Any) -> Any:
        asked.append(t)
        return biased(x, t)

    sampler = TimeShiftSampler(TRAINED, mode="code", **SHIFTING)
    state = sampler.init(X)
    state, _ = sampler.step(state, eps)
    want = TimeShift(ABAR, 60, 200)(state.x, int(sampler.host.times[2]))
    moved, shifts = sampler.step(state, eps)
    assert (shifts == want).all()
    x = sampler.host.transfer(state.x, biased(state.x, state.times), state.times, want)
    np.testing.assert_array_equal(moved.x, x)
    sampler.sample(eps, X)
    assert {len(np.unique(t)) for t in asked} == {1}


def isotropic(x: Any, t: Any) -> Any:
    """The eps of N(0, 1/4) data of any dimension."""
    return np.sqrt(1 - ABAR[t])[:, None] * x / (1 - 0.75 * ABAR[t])[:, None]


def many_entries(steps: int, mode: str = "paper", target: str = "matched") -> TimeShiftSampler:
    return TimeShiftSampler(
        TRAINED, steps, window=20, cutoff=200, mode=mode, target=target, data_variance=0.25
    )


def test_the_codes_reading_takes_an_end_of_the_window_and_the_papers_the_nominal_time() -> None:
    x = np.random.default_rng(5).standard_normal((16, 8192))
    away = {}
    for mode in ("code", "paper"):
        sampler = many_entries(50, mode)
        nominal = sampler.host.times[1:]
        found = sampler.sample(isotropic, x)[1] - nominal[:, None]
        away[mode] = found[(nominal > 200) & (nominal < 600)]
    assert (np.abs(away["code"]) == 10).mean() > 0.95
    assert (away["code"] == 10).mean() > 0.5
    assert np.abs(away["paper"]).mean() < 3


def test_with_an_exact_score_and_many_entries_nothing_is_gained_or_lost() -> None:
    """What matching moves is within the noise of the samples' own standard deviation.

    That of 16 x 8192 entries has a standard error of 0.2 %; the limit is four of it.
    """
    x = np.random.default_rng(5).standard_normal((16, 8192))
    sampler = many_entries(100)
    shifted, shifts = sampler.sample(isotropic, x)
    assert (shifts != sampler.host.times[1:, None]).any()
    host = sampler.host.sample(isotropic, x)
    assert shifted.std() / host.std() == pytest.approx(1, abs=4 * np.sqrt(0.5 / x.size))


def test_exposure_bias_is_taken_back() -> None:
    """An eps that is 1 % short leaves noise behind; shifted, it ends nearer to the exact eps's."""
    x = np.random.default_rng(5).standard_normal((16, 8192))
    weak = lambda x, t: 0.99 * isotropic(x, t)  # noqa: E731
    sampler = many_entries(50)
    want = sampler.host.sample(isotropic, x).std()
    left = abs(sampler.sample(weak, x)[0].std() - want)
    assert left < 0.5 * abs(sampler.host.sample(weak, x).std() - want)


def test_tensors_in_half_precision_and_empty_batches() -> None:
    torch = pytest.importorskip("torch")
    sampler = TimeShiftSampler(TRAINED, **SHIFTING)
    want, shifts = sampler.sample(biased, X)
    got, same = sampler.sample(biased, torch.from_numpy(X))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)
    assert (same == shifts).all()
    for kind in (torch.float16, torch.bfloat16):
        x, found = sampler.sample(biased, torch.from_numpy(X).to(kind))
        assert x.dtype == kind
        assert found.shape == shifts.shape
        assert (found >= -1).all()
    for empty in (np.zeros((0, D)), torch.zeros(0, D)):
        x, found = sampler.sample(biased, empty)
        assert (tuple(x.shape), found.shape) == ((0, D), (12, 0))
        state, times = sampler.step(sampler.init(empty), lambda x, t: x)
        assert (tuple(state.x.shape), times.shape) == ((0, D), (0,))


def test_one_step_and_as_many_steps_as_levels() -> None:
    one, shifts = TimeShiftSampler(TRAINED, 1).sample(biased, X)
    np.testing.assert_array_equal(one, PseudoNumericalSampler(TRAINED, 1).sample(biased, X))
    assert shifts.tolist() == [[-1] * 12]
    small = DiscreteAlphas(np.linspace(0.99, 0.01, 1000))
    x, shifts = TimeShiftSampler(small, 1000, window=4).sample(lambda x, t: 0.5 * x, X)
    assert shifts.shape == (1000, 12)
    assert np.isfinite(x).all()


def test_generators_make_ancestral_sampling_repeatable() -> None:
    torch = pytest.importorskip("torch")
    sampler = TimeShiftSampler(TRAINED, base="ddpm", **SHIFTING)
    a, b, c = (sampler.sample(biased, X, rng=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    x = torch.from_numpy(X)
    a, b = (sampler.sample(biased, x, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"rng: got int, want a torch\.Generator"):
        sampler.sample(biased, x, 1)


# ------------------------------------------------------------------ windows and cutoffs


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_the_search_finds_the_pair_that_loses_least(kind) -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    noises: list[Any] = list(draw.standard_normal((3, 12, D)))
    if kind == "tensor":
        noises = [torch.from_numpy(x) for x in noises]
    sampler = TimeShiftSampler(TRAINED, 10, "ddpm", target="matched", data_variance=0.3)
    loss = lambda x: float((x**2).mean())  # noqa: E731
    found = search_shift(sampler, biased, noises, loss, (0, 60, 120), (200, 500), rng=4)
    assert found.losses.shape == (3, 2, 3)
    np.testing.assert_array_equal(found.losses[0], [found.host] * 2)
    table = np.vstack([found.losses.reshape(6, 3), found.host])
    pairs = [(w, c) for w in (0, 60, 120) for c in (200, 500)] + [(0, 1000)]
    assert (found.window, found.cutoff) == pairs[int(table.mean(axis=1).argmin())]
    for r in range(3):
        chosen = int(np.delete(table, r, axis=1).sum(axis=1).argmin())
        assert found.gains[r] == pytest.approx(found.host[r] - table[chosen, r], abs=1e-12)
    source = 4 if kind == "array" else torch.Generator().manual_seed(4)
    again = TimeShiftSampler(
        TRAINED, 10, "ddpm", window=60, cutoff=500, target="matched", data_variance=0.3
    )
    assert loss(again.sample(biased, noises[1], source)[0]) == found.losses[1, 1, 1]
    assert sampler.rule.window == 40  # the one given is not changed


def test_a_search_that_finds_nothing_better_says_no_shift() -> None:
    noises = np.random.default_rng(0).standard_normal((2, 4, D))
    sampler = TimeShiftSampler(TRAINED, 6, target="matched", data_variance=0.3)
    host = [sampler.host.sample(biased, x) for x in noises]
    loss = lambda x: float(min(np.abs(x - y).max() for y in host))  # noqa: E731
    found = search_shift(sampler, biased, noises, loss, (300,), (100,))
    assert (found.window, found.cutoff) == (0, 1000.0)
    assert found.gains.tolist() == [0.0, 0.0]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": -1}, "window: got -1, want an integer >= 0"),
        ({"window": 2.5}, "window: got 2.5, want an integer >= 0"),
        ({"window": 2000}, "window: got 2000, want at most 1999, for 1000 levels"),
        ({"cutoff": -1}, "cutoff: got -1, want a time from 0 to 1000"),
        ({"cutoff": 1001}, "cutoff: got 1001, want a time from 0 to 1000"),
        ({"cutoff": np.nan}, "cutoff: got nan"),
        ({"mode": "both"}, "mode: got 'both', want one of paper, code"),
        ({"target": "x"}, "target: got 'x', want one of plain, matched"),
        ({"target": "matched"}, "data_variance: got None, want v_0 of the data"),
        ({"data_variance": -0.1}, "data_variance: got -0.1, want v_0 >= 0"),
        ({"data_variance": np.nan}, "data_variance: got nan, want v_0 >= 0"),
        ({"target": "matched", "data_variance": 1.0}, "data_variance: got 1.0, want 0 <= v_0 < 1"),
    ],
)
def test_mistakes_are_one_line(how, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        TimeShiftSampler(TRAINED, **how)
    assert "\n" not in str(error.value)


def test_what_makes_variances_useless_is_refused_or_warned_of() -> None:
    with pytest.raises(InputError, match=r"alphas_cumprod: got no decrease at 1"):
        time_shift(X, 500, [0.9, 0.9], 2, 0)
    with pytest.raises(InputError, match=r"x: got shape \(4, 1\), want 2 or more entries"):
        time_shift(np.ones((4, 1)), 500, ABAR, 2, 0)
    with pytest.raises(InputError, match="x: got NaN or infinity"):
        time_shift(X * np.nan, 500, ABAR, 2, 0)
    with pytest.raises(InputError, match="center: got 1000, want whole times from 0 to 999"):
        time_shift(X, 1000, ABAR, 2, 0)
    with pytest.raises(InputError, match=r"center: got shape \(4,\), want one time or \(12,\)"):
        time_shift(X, [500] * 4, ABAR, 2, 0)
    with pytest.warns(UserWarning, match="data_variance 1.2 >= 1: the variance does not tell"):
        TimeShift(ABAR, 2, 0, data_variance=1.2)
    with pytest.warns(UserWarning, match="8 entries a sample"):
        time_shift(X[:, :8], 500, ABAR, 2, 0)
    with pytest.warns(UserWarning, match="8 entries a sample"):
        TimeShiftSampler(TRAINED).init(X[:, :8])


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_a_network_that_fails_is_named_by_the_step(mode) -> None:
    sampler = TimeShiftSampler(TRAINED, mode=mode, **SHIFTING)
    late = lambda x, t: np.where(t[:, None] < 420, np.nan, x)  # noqa: E731
    with pytest.raises(InputError, match=r"eps_fn: got NaN or infinity at step [78] "):
        sampler.sample(late, X)
    with pytest.raises(InputError, match=r"eps_fn: got shape \(12, 59\) at step 0"):
        sampler.sample(lambda x, t: x[:, 1:], X)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_states_that_are_not_finite_are_named_by_the_step(mode) -> None:
    sampler = TimeShiftSampler(TRAINED, mode=mode, check_finite=False, **SHIFTING)
    late = lambda x, t: np.where(t[:, None] < 600, np.nan, x)  # noqa: E731
    with pytest.raises(InputError, match=r"x: got NaN or infinity before step [56], want finite"):
        sampler.sample(late, X)


def test_searches_need_repeats_choices_and_numbers() -> None:
    sampler = TimeShiftSampler(TRAINED, 2)
    for noises, windows, loss, message in (
        ([X], (4,), np.mean, "noises: got 1 batches"),
        ([X, X], (), np.mean, "windows, cutoffs: got no choice"),
        ([X, X], (4,), lambda x: np.nan, "loss: got .nan, nan., want finite"),
        ([X, X], (-4,), np.mean, "window: got -4"),
    ):
        with pytest.raises(InputError, match=message):
            search_shift(sampler, biased, noises, loss, windows)
