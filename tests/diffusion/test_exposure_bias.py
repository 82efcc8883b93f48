"""Remedies and measures of exposure bias on data whose eps is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.exposure_bias import (
    coupling_losses,
    eps_ratio,
    epsilon_scaling,
    variance_gap,
    variance_normalise,
    variance_normalising,
)
from scoredraw.diffusion.pseudo_numerical import PseudoNumericalSampler
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import sample_variance
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
ABAR = TRAINED.values
RNG = np.random.default_rng(53)
X = RNG.standard_normal((6, 2000))
DATA = 0.5 * RNG.standard_normal((400, 2000))
NOISE = RNG.standard_normal(DATA.shape)


def exact(x: Any, t: Any) -> Any:
    """The eps of N(0, 1/4) data."""
    sigma = (1 - ABAR[t]) ** 0.5
    return x * (sigma / (1 - 0.75 * ABAR[t]))[:, None]


def states(eps: Any, steps: int = 20) -> list[Any]:
    sampler = PseudoNumericalSampler(TRAINED, steps)
    found = [sampler.init(X)]
    for _ in range(steps - 1):
        found.append(sampler.step(found[-1], eps))
    return found


# ------------------------------------------------------------------ remedies


def test_epsilon_scaling_divides_by_the_steps_scale() -> None:
    times = [999, 500, 20]
    shown = epsilon_scaling(exact, 1.02, 0.01, times)
    for i, t in enumerate(times):
        here = np.full(6, t)
        np.testing.assert_allclose(shown(X, here), exact(X, here) / (1.02 + 0.01 * i))
    mixed = shown(X, np.array([999, 990, 501, 500, 499, 3]))  # shifted times: steps above them
    want = exact(X, np.array([999, 990, 501, 500, 499, 3]))
    scale = 1.02 + 0.01 * np.array([0, 1, 1, 1, 2, 3])[:, None]
    np.testing.assert_allclose(mixed, want / scale)
    np.testing.assert_allclose(epsilon_scaling(exact, 1.01)(X, np.full(6, 7)) * 1.01, exact(X, [7]))


@pytest.mark.parametrize(("target", "v0"), [("plain", None), ("matched", 0.25)])
def test_normalised_states_have_the_variance_of_their_time(target, v0) -> None:
    t = np.array([0, 10, 100, 500, 900, 999])
    scaled = variance_normalise(X, t, ABAR, target, v0)
    want = 1 - ABAR[t] + ABAR[t] * (v0 or 0.0)
    np.testing.assert_allclose(sample_variance(scaled), want)
    np.testing.assert_allclose(scaled / X, (scaled / X)[:, :1] * np.ones_like(X))
    seen = variance_normalising(lambda x, t: x, ABAR, target, v0)
    np.testing.assert_array_equal(seen(X, t), scaled)


def test_times_between_two_levels_are_not_cut_off() -> None:
    """Those of F-PNDM's middles, where abar is linear, as the host has it."""
    host = PseudoNumericalSampler(TRAINED, 8, "f-pndm")
    t = np.array([500.5, 0.25, 998.5, 3.0, 0.0, 999.0])
    scaled = variance_normalise(X, t, ABAR, "matched", 0.25)
    np.testing.assert_allclose(sample_variance(scaled), 1 - 0.75 * host.abar(t))


def test_tensors_keep_their_kind() -> None:
    torch = pytest.importorskip("torch")
    x, t = torch.from_numpy(X).float().view(6, 20, 100), torch.tensor([3] * 6)
    got = variance_normalising(epsilon_scaling(lambda x, t: x, 1.5), ABAR)(x, t)
    assert got.dtype == torch.float32
    want = variance_normalise(X, 3, ABAR).reshape(6, 20, 100) / 1.5
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)
    data, noise = torch.from_numpy(DATA), torch.from_numpy(NOISE)
    found = states(exact)[:3]
    for state in found:
        object.__setattr__(state, "x", torch.from_numpy(state.x))
        object.__setattr__(state, "dtype", torch.float64)
    plain = states(exact)[:3]
    eps = lambda x, t: torch.from_numpy(exact(x.numpy(), t.numpy()))  # noqa: E731
    ratio = eps_ratio(eps, found, data, noise, TRAINED)
    np.testing.assert_allclose(ratio, eps_ratio(exact, plain, DATA, NOISE, TRAINED))
    np.testing.assert_allclose(
        variance_gap(found, data, TRAINED), variance_gap(plain, DATA, TRAINED)
    )


# ------------------------------------------------------------------ measures


def test_measures_find_no_bias_where_there_is_none() -> None:
    """States of the forward process itself: 400 x 2000 entries, 6 standard errors."""
    sampler = PseudoNumericalSampler(TRAINED, 10)
    found = []
    for t in sampler.times[:-1]:
        other = RNG.standard_normal(DATA.shape)
        state = sampler.init(TRAINED.perturb(DATA[::-1], float(t), other))
        object.__setattr__(state, "times", np.full(400, t))
        found.append(state)
    error = np.sqrt(2 / DATA.size)
    assert np.abs(variance_gap(found, DATA, TRAINED)).max() < 6 * error
    assert np.abs(eps_ratio(exact, found, DATA, NOISE, TRAINED) - 1).max() < 6 * error


@pytest.mark.parametrize(("factor", "sign"), [(0.97, 1), (1.03, -1)])
def test_measures_show_what_a_biased_network_leaves_behind(factor, sign) -> None:
    """Too short an eps leaves noise in the states, which then seem noisier than their times."""
    biased = states(lambda x, t: factor * exact(x, t))
    honest = states(exact)
    gap = variance_gap(biased, DATA, TRAINED) - variance_gap(honest, DATA, TRAINED)
    assert (np.sign(gap[1:]) == sign).all()
    ratio = eps_ratio(exact, biased, DATA, NOISE, TRAINED)
    ratio = ratio / eps_ratio(exact, honest, DATA, NOISE, TRAINED)
    assert (np.sign(ratio[1:] - 1) == sign).all()


def test_states_couple_with_the_time_at_which_they_were_noised() -> None:
    """The least error of N(0, 1/4) data is that of the true time, the posterior variance."""
    times = np.arange(340, 461, 20)
    x = TRAINED.perturb(DATA, 400.0, NOISE)
    losses = coupling_losses(exact, x, DATA, times, TRAINED)
    assert losses.shape == (7, 400)
    posterior = 0.25 * (1 - ABAR[400]) / (1 - 0.75 * ABAR[400])
    assert losses[3].mean() == pytest.approx(posterior, rel=6 * np.sqrt(2 / x.size))
    assert times[losses.mean(axis=1).argmin()] == 400
    noisier = TRAINED.perturb(DATA, 440.0, NOISE)
    found = coupling_losses(exact, noisier, DATA, times, TRAINED).mean(axis=1)
    assert times[found.argmin()] == 440


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: epsilon_scaling(exact, 1.0, 0.1), "times: got None, want the times of the calls"),
        (
            lambda: epsilon_scaling(exact, 1.0, -0.6, [5, 3, 1]),
            "constant, slope: got a scale of -",
        ),
        (lambda: epsilon_scaling(exact, 0.0), "constant, slope: got a scale of 0"),
        (lambda: epsilon_scaling(exact, 1.0, 0.1, [1, 3]), "times: got shape .2,., want decreas"),
        (lambda: variance_normalise(X * 0, 3, ABAR), "x: got a sample without variance"),
        (lambda: variance_normalise(X, 3, ABAR, "matched", 1.0), "data_variance: got 1.0"),
        (lambda: variance_normalise(X, -1, ABAR), "t: got -1.0, want times from 0 to 999"),
        (lambda: variance_normalise(X, 1000, ABAR), "t: got 1000.0, want times from 0 to 999"),
        (lambda: variance_normalise(X, np.nan, ABAR), "t: got nan, want times from 0 to 999"),
        (lambda: coupling_losses(exact, X, X, [3.5], TRAINED), "times: got .3.5., want .K,. whole"),
        (
            lambda: coupling_losses(exact, X, X[:2], [3], TRAINED),
            "x0: got .2, 2000., want .6",
        ),
        (
            lambda: eps_ratio(exact, states(exact, 2), DATA, X, TRAINED),
            "noise: got .6, 2000., want .400, 2000., as data",
        ),
    ],
)
def test_mistakes_are_one_line(wrong, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
