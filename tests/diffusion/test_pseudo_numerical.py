"""Samplers with a time a sample: against closed forms, other solvers, and each other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.integrator_coefficients import deis_coefficients
from scoredraw.diffusion.pseudo_numerical import (
    HOSTS,
    PseudoNumericalSampler,
    by_time,
    polynomial_means,
    step_times,
)
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
DATA = GaussianMixtureScore(
    [0.3, 0.7], [[1.0, -1.0], [-1.5, 0.5]],
    [[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0.0], [0.0, 0.05]]], TRAINED,
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((64, 2))
LINEAR = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


def smooth(x: Any, t: Any) -> Any:
    return 0.3 * x + 0.1 * np.cos(x)


# ------------------------------------------------------------------ the methods


def test_the_transfer_of_pndm_is_ddim() -> None:
    """Formula (9) of the PNDM paper, written out, on times of each sample's own."""
    sampler = PseudoNumericalSampler(TRAINED)
    t, goal = np.array([900, 500, 30]), np.array([850, 520, 0])
    x, e = X[:3], X[3:6]
    a, b = sampler.abar(t)[:, None], sampler.abar(goal)[:, None]
    theirs = x + (b - a) * (
        x / (np.sqrt(a) * (np.sqrt(a) + np.sqrt(b)))
        - e / (np.sqrt(a) * (np.sqrt((1 - b) * a) + np.sqrt((1 - a) * b)))
    )
    np.testing.assert_allclose(sampler.transfer(x, e, t, goal), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "index", "want"),
    [
        ("s-pndm", 5, [1.5, -0.5]),
        ("f-pndm", 5, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_on_equal_steps_pndm_has_the_weights_of_its_paper(base, index, want) -> None:
    sampler = PseudoNumericalSampler(TRAINED, base=base, times=LINEAR)
    called = [LINEAR[index - np.arange(len(want))[j]] for j in range(len(want))]
    found = sampler.weights([called], [LINEAR[index + 1]], index)
    np.testing.assert_allclose(found, [want], rtol=1e-12, atol=1e-12)


def test_deis_has_the_weights_of_the_exact_integrals() -> None:
    times = np.array([999, 800, 590, 400, 220, 100, 30, 0])
    sampler = PseudoNumericalSampler(TRAINED, base="deis", times=times)
    _, C = deis_coefficients(TRAINED, times, 3, "tab")
    for i in range(3, 7):
        want = C[i] / C[i].sum()
        found = sampler.weights([times[i - np.arange(4)]], times[i + 1 : i + 2], i)
        np.testing.assert_allclose(found[0], want, rtol=1e-7, atol=1e-9)


def test_dpm_solver_has_the_weights_of_its_paper() -> None:
    sampler = PseudoNumericalSampler(TRAINED, base="dpm-solver", times=LINEAR)
    half = TRAINED.log_snr([601, 501, 401]) / 2
    ratio = (half[1] - half[0]) / (half[2] - half[1])
    found = sampler.weights([[501, 601]], [401], 4)
    np.testing.assert_allclose(found, [[1 + 0.5 / ratio, -0.5 / ratio]], rtol=1e-12)


@pytest.mark.parametrize("base", ["ddim", "deis"])
def test_without_shifts_they_are_the_solvers_of_this_room(base) -> None:
    times = step_times(1000, 20, "linspace")
    ours = PseudoNumericalSampler(TRAINED, 20, base, grid="linspace").sample(DATA.eps, X)
    how = {"variant": "ei_eps"} if base == "ddim" else {"variant": "tab", "order": 3}
    want = DEISSolver(TRAINED, times=times, **how).sample(DATA.eps, X)
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-7)


@pytest.mark.contract
@pytest.mark.parametrize(("base", "name"), [("f-pndm", "PNDM"), ("ddim", "DDIM")])
def test_without_shifts_they_are_the_schedulers_of_diffusers(base, name) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    theirs = getattr(diffusers, f"{name}Scheduler")(
        timestep_spacing="leading", set_alpha_to_one=False, steps_offset=1,
        **({"clip_sample": False} if base == "ddim" else {}),
    )  # fmt: skip
    theirs.set_timesteps(10)
    x, count = torch.from_numpy(X.copy()), 0
    grid = sorted({int(t) for t in theirs.timesteps if int(t) % 100 == 1}, reverse=True)
    for t in theirs.timesteps:
        if int(t) == 1:  # from here they go to 0 with the weights of a full step
            break
        x = theirs.step(torch.from_numpy(DATA.eps(x.numpy(), float(t))), t, x).prev_sample
        count += 1
    ours = PseudoNumericalSampler(TRAINED, base=base, times=grid)
    assert ours.nfe == count
    np.testing.assert_allclose(ours.sample(DATA.eps, X), x.numpy(), rtol=2e-5, atol=2e-5)


def test_ddpm_is_the_ancestral_sampler() -> None:
    """Mean and variance of q(x_{t'} | x_t, x_0), over 200,000 draws: 6 standard errors."""
    sampler = PseudoNumericalSampler(TRAINED, base="ddpm", times=[500, 480])
    x = np.full((200_000, 2), 0.7)
    e = np.full_like(x, -0.4)
    got = sampler.step(sampler.init(x), lambda x, t: e, np.random.default_rng(1)).x
    a, b = TRAINED.abar([500, 480])
    beta, x0 = 1 - a / b, (0.7 - np.sqrt(1 - a) * -0.4) / np.sqrt(a)
    mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * 0.7
    variance = beta * (1 - b) / (1 - a)
    assert got.mean() == pytest.approx(mean, abs=6 * np.sqrt(variance / got.size))
    assert got.var() == pytest.approx(variance, rel=6 * np.sqrt(2 / got.size))


@pytest.mark.parametrize(
    ("base", "order"),
    [("ddim", 1), ("s-pndm", 2), ("f-pndm", 2), ("deis", 2), ("dpm-solver", 2)],
)
def test_order_of_convergence(base, order) -> None:
    """Twice the steps divide the error by about 2^order, on a smooth schedule and N(0, S) data.

    F-PNDM has order 2, as its authors prove: eps is averaged in t, and then carried along by DDIM.
    The first steps of DEIS are of lower order, which holds it between 2 and 4.
    """
    fine = DiscreteAlphas(np.exp(-5.0 * np.linspace(0.002, 1, 2049) ** 2))
    data = GaussianMixtureScore([1.0], [[0.5, -0.2]], [[[0.2, 0.0], [0.0, 2.0]]], fine)
    exact = DEISSolver(
        fine, times=np.linspace(2048, 512, 129), variant="rhork", tableau="4rk"
    ).sample(data.eps, X)
    errors = []
    for n in (24, 48):
        times = np.linspace(2048, 512, n + 1).astype(int)
        found = PseudoNumericalSampler(fine, base=base, times=times).sample(data.eps, X)
        errors.append(np.abs(found - exact).max())
    slope = np.log2(errors[0] / errors[1])
    assert order - 0.6 < slope < (4.6 if base == "deis" else order + 0.6)


def test_weights_leave_out_calls_that_have_come_too_close() -> None:
    sampler = PseudoNumericalSampler(TRAINED, base="f-pndm", times=LINEAR)
    far = [501, 601, 701, 801]
    near = [501, 540, 701, 801]  # less than half of 100 apart: the rest goes too
    same = [501, 601, 601, 801]
    w = sampler.weights([far, near, same], [401] * 3, 4)
    assert (w[0] != 0).all()
    assert w[1].tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(w[2], [1.5, -0.5, 0, 0])
    np.testing.assert_allclose(w.sum(axis=1), 1)


@pytest.mark.parametrize("base", ["s-pndm", "f-pndm", "deis", "dpm-solver"])
def test_weights_sum_to_one_and_forget_the_past_where_no_step_is_made(base) -> None:
    sampler = PseudoNumericalSampler(TRAINED, base=base, times=[*LINEAR, -1])
    m = HOSTS[base].degree + 1
    called = [LINEAR[9 - j] for j in range(m)]
    w = sampler.weights([called] * 2, [called[0], -1], 9)
    np.testing.assert_allclose(w.sum(axis=1), 1)
    if HOSTS[base].mean != "t":
        np.testing.assert_allclose(w[0], np.eye(m)[0], atol=1e-12)


def test_polynomials_are_integrated_exactly() -> None:
    times, points = np.array([[5.0, 7.0, 8.0]]), np.array([[1.0, 2.5, 4.0]])
    mass = np.array([0.2, 0.5, 0.3])
    w = polynomial_means(times, np.ones((1, 3), bool), points, mass)[0]
    for p in range(3):
        assert w @ times[0] ** p == pytest.approx(mass @ points[0] ** p)


# ------------------------------------------------------------------ what they are given


@pytest.mark.contract
@pytest.mark.parametrize("base", HOSTS)
@pytest.mark.parametrize("grid", ["trailing", "linspace"])
def test_tensors_and_arrays_go_the_same_way(base, grid) -> None:
    torch = pytest.importorskip("torch")
    sampler = PseudoNumericalSampler(TRAINED, 8, base, grid=grid, eta=0 if base == "ddpm" else None)
    calls: list[Any] = []

    def eps(x: Any, t: Any) -> Any:
        calls.append(t)
        return DATA.eps(x, t)

    want = sampler.sample(eps, X)
    assert len(calls) == sampler.nfe
    assert all(t.shape == (64,) and t.min() >= 0 for t in calls)
    got = sampler.sample(DATA.eps, torch.from_numpy(X))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    if base != "f-pndm":
        assert all(t.dtype == np.int64 for t in calls)


def test_middles_of_odd_steps_keep_their_half() -> None:
    calls: list[float] = []

    def eps(x: Any, t: Any) -> Any:
        calls.append(float(t[0]))
        return DATA.eps(x, t)

    sampler = PseudoNumericalSampler(TRAINED, base="f-pndm", times=[300, 275, 250])
    sampler.sample(eps, X)
    assert calls == [300, 287.5, 287.5, 275, 275, 262.5, 262.5, 250]


def test_clipping_bounds_the_clean_sample() -> None:
    sampler = PseudoNumericalSampler(TRAINED, 5, clip=1.0)
    x = sampler.sample(lambda x, t: -5 * x, X)
    assert np.abs(x).max() <= 1 + 1e-12
    free = PseudoNumericalSampler(TRAINED, 5, clip=1e9).sample(smooth, X)
    np.testing.assert_allclose(free, PseudoNumericalSampler(TRAINED, 5).sample(smooth, X))


def test_networks_for_one_time_are_asked_time_by_time() -> None:
    torch = pytest.importorskip("torch")
    t = np.array([5, 900, 5, 40] * 16)
    want = DATA.eps(X, t)
    np.testing.assert_allclose(by_time(DATA.eps)(X, t), want, rtol=1e-12)
    got = by_time(DATA.eps)(torch.from_numpy(X), torch.from_numpy(t))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_grids() -> None:
    assert step_times(1000, 1000).tolist() == [*range(999, -2, -1)]
    assert step_times(1000, 1).tolist() == [999, -1]
    assert step_times(10, 9, "linspace").tolist() == [*range(9, -1, -1)]
    for n, grid in itertools.product((7, 333, 499), ("trailing", "linspace", "released")):
        assert (np.diff(step_times(1000, n, grid)) < 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_low_precision_is_combined_in_float32(dtype) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    x = torch.from_numpy(X).to(kind)
    seen = set()

    def eps(x: Any, t: Any) -> Any:
        seen.add(x.dtype)
        return 0.3 * x

    got = PseudoNumericalSampler(TRAINED, 10, "s-pndm").sample(eps, x)
    want = PseudoNumericalSampler(TRAINED, 10, "s-pndm").sample(eps, x.double())
    assert got.dtype == kind
    assert kind in seen
    eps_of = torch.finfo(kind).eps
    torch.testing.assert_close(got.double(), want, rtol=20 * eps_of, atol=20 * eps_of)


def test_an_empty_batch_makes_no_call() -> None:
    x = PseudoNumericalSampler(TRAINED, 5).sample(lambda x, t: 1 / 0, np.zeros((0, 3)))
    assert x.shape == (0, 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"base": "heun"}, "base: got 'heun', want one of ddim, ddpm"),
        ({"grid": "x"}, "grid: got 'x', want one of trailing"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"num_steps": 1001}, "num_steps: got 1001, want at most 1000 for 1000 levels"),
        ({"times": [5, 5, 1]}, "times: got 5 before 5, want decreasing times"),
        ({"times": [5, 7, 1]}, "times: got 5 before 7, want decreasing times"),
        ({"times": [1000, 7]}, "times: got 1000 to 7, want times from 999"),
        ({"times": [7, -2]}, "times: got 7 to -2, want times from 999"),
        ({"times": [7.5, 2]}, "times: got times that are not whole"),
        ({"times": [7]}, "times: got .1,., want .N . 1,. times"),
        ({"eta": 1.5}, "eta: got 1.5, want a share"),
        ({"base": "deis", "eta": 0.5}, "eta: got 0.5, want 0, as deis adds no noise"),
        ({"clip": 0}, "clip: got 0"),
        ({"schedule": "linear"}, "schedule: got str, want DiscreteAlphas"),
    ],
)
def test_mistakes_are_one_line(how, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        PseudoNumericalSampler(**how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, t: x[:, :1], r"got shape \(64, 1\) at step 0 \(t = .*\), want the shape of x"),
        (lambda x, t: x.tolist(), r"eps_fn: got shape \(\) at step 0"),
        (
            lambda x, t: np.where(t[:, None] < 300, np.nan, x),
            r"eps_fn: got NaN or infinity at step 4 \(t = 199 to 199\), want finite values",
        ),
    ],
)
def test_a_bad_answer_names_the_step(answer, message) -> None:
    with pytest.raises(InputError, match=message):
        PseudoNumericalSampler(TRAINED, 5).sample(answer, X)


def test_bad_states_are_refused() -> None:
    sampler = PseudoNumericalSampler(TRAINED, 5)
    for x, message in ((X * np.nan, "NaN"), (X.astype(int), "int"), (X[0], "shape")):
        with pytest.raises(InputError, match=f"x_T: got .*{message}"):
            sampler.init(x)
    state = sampler.init(X)
    for _ in range(5):
        state = sampler.step(state, smooth)
    with pytest.raises(InputError, match="state: got one after the last of 5 steps"):
        sampler.step(state, smooth)
