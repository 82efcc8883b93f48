"""Teleportation into solvers, and how much of a score another explains."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import GaussianScore, edm_schedule
from scoredraw.diffusion.schedules import Cosine, LinearBeta, LinearFlow
from scoredraw.diffusion.score_models import EmpiricalScore, isotropic_score
from scoredraw.diffusion.teleportation import (
    Teleport,
    explained_variance,
    heun,
    sampling_times,
    score_explained_variance,
    teleport_by_class,
    teleport_sample,
    warn_of_range,
)
from scoredraw.errors import InputError
from scoredraw.uniforms import generator

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(2)
D = 4
AXES = np.linalg.qr(RNG.normal(size=(D, D)))[0]
DATA = GaussianScore(RNG.normal(size=D), [3.0, 1.0, 0.2, 0.01], AXES)
MIXTURE = GaussianMixtureScore(
    [0.4, 0.6], [[1.0, 0, 0, 0], [-1.0, 0.5, 0, 0]], np.stack([0.1 * np.eye(D)] * 2), edm_schedule()
)
FITTED = GaussianScore.fit(MIXTURE.sample(4000, rng=0))
NOISE = 80.0 * RNG.normal(size=(50, D))
SOLVERS = {
    "heun": "heun",
    "deis": lambda schedule, times: DEISSolver(schedule, times=times[:-1], variant="tab"),
    "rhoab": lambda schedule, times: DEISSolver(schedule, times=times, variant="rhoab", order=2),
    "euler": lambda schedule, times: DEISSolver(schedule, times=times[:-1], variant="euler"),
}


def karras(N: int, high: float = 80.0, low: float = 0.002) -> np.ndarray:
    """EDM's levels and the 0 after them, written out."""
    i = np.arange(N)
    root = high ** (1 / 7) + i / (N - 1) * (low ** (1 / 7) - high ** (1 / 7))
    return np.append(root**7, 0.0)


def edm_heun(denoise, x, sigmas):
    """Heun's method as Karras et al. print it."""
    for a, b in itertools.pairwise(sigmas):
        d = (x - denoise(x, a)) / a
        moved = x + (b - a) * d
        if b > 0:
            moved = x + (b - a) * (d + (moved - denoise(moved, b)) / b) / 2
        x = moved
    return x


def test_the_times_and_heun_are_edms() -> None:
    np.testing.assert_allclose(sampling_times(edm_schedule(), 18), karras(18), rtol=1e-12)
    np.testing.assert_allclose(sampling_times(edm_schedule(), 7, 5.0), karras(7, 5.0), rtol=1e-12)
    assert sampling_times(edm_schedule(), 1).tolist() == [80.0, 0.0]
    assert sampling_times(LinearBeta(), 5).size == 6
    for N, calls in ((18, 35), (40, 79)):
        solver = heun(edm_schedule(), sampling_times(edm_schedule(), N))
        assert solver.nfe == calls
    x = edm_heun(MIXTURE.denoise, NOISE, karras(18))
    np.testing.assert_allclose(Teleport(FITTED, skip_steps=0).sample(MIXTURE.eps, NOISE), x)


@pytest.mark.parametrize("k", [0, 1, 6, 17])
def test_the_tail_is_the_original_grid_and_the_grid_made_anew_from_the_node(k) -> None:
    jump = Teleport(FITTED.rescaled(1e-3), 18, skip_steps=k)
    np.testing.assert_allclose(jump.times, karras(18)[k:], rtol=1e-12)
    assert jump.skipped == k
    if k < 17:  # the authors' sigma_max = sigma_skip, num_steps = N - k
        np.testing.assert_allclose(jump.times, karras(18 - k, jump.sigma_skip), rtol=1e-9)
    again = Teleport(FITTED.rescaled(1e-3), 18, sigma_skip=karras(18)[k])
    np.testing.assert_allclose(again.times, jump.times, rtol=1e-9)


def test_a_start_between_nodes_takes_the_place_of_the_nearer_one() -> None:
    nodes = karras(18)
    for share, skipped in ((0.1, 4), (0.4, 4), (0.6, 5), (0.9, 5)):
        sigma = (1 - share) * nodes[4] + share * nodes[5]
        jump = Teleport(DATA, 18, sigma_skip=sigma)
        assert jump.skipped == skipped
        np.testing.assert_allclose(jump.times, [sigma, *nodes[skipped + 1 :]], rtol=1e-12)
    last = Teleport(DATA.rescaled(1e-4), 18, sigma_skip=1e-3)
    assert last.times.tolist() == pytest.approx([1e-3, 0.0])


def test_respace_spends_all_steps_below_the_skip() -> None:
    jump = Teleport(DATA, 9, sigma_skip=5.0, grid="respace")
    np.testing.assert_allclose(jump.times, karras(9, 5.0), rtol=1e-12)
    assert (jump.skipped, jump.solver.nfe) == (0, 17)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_the_closed_form_and_then_a_fresh_solver(name) -> None:
    make = SOLVERS[name]
    schedule = edm_schedule() if name == "heun" else edm_schedule().with_ends(last="stop")
    gaussian = FITTED.with_schedule(schedule)
    jump = Teleport(gaussian, 18, sigma_skip=10.0, solver=make)
    solver = heun(schedule, jump.times) if name == "heun" else make(schedule, jump.times)
    want = solver.sample(MIXTURE.eps, gaussian.teleport(NOISE, 80.0, 10.0))
    np.testing.assert_array_equal(jump.sample(MIXTURE.eps, NOISE), want)
    state = jump.init(NOISE)
    assert state.history == ()
    for _ in range(jump.solver.num_steps):
        state = jump.step(state, MIXTURE.eps)
    np.testing.assert_array_equal(state.sample, want)


@pytest.mark.parametrize(
    "schedule", [LinearBeta(), Cosine(), LinearFlow(), edm_schedule()], ids=str
)
def test_on_gaussian_data_only_the_solvers_error_is_left(schedule) -> None:
    """And it falls with the steps, and with what is skipped."""
    gaussian = DATA.with_schedule(schedule)
    ends = schedule.ends
    x_T = gaussian.sample(30, rng=1, t=ends.t_start)
    end = 0.0 if ends.last == "clean" else ends.t_end
    exact = gaussian.teleport(x_T, ends.t_start, end)

    def error(**options) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = Teleport(gaussian, **options).sample(gaussian.eps, x_T)
        return float(np.sqrt(np.square(made - exact).mean()))

    for few, many in ((10, 40), (40, 160)):
        assert error(num_steps=many, sigma_skip=4.0) < 0.3 * error(num_steps=few, sigma_skip=4.0)
    base = error(num_steps=20, skip_steps=0)
    respaced = [error(num_steps=20, sigma_skip=s, grid="respace") for s in (8.0, 4.0, 1.0)]
    assert respaced[0] < base
    assert (np.diff(respaced) < 0).all()


def test_the_gaussian_carries_nearer_than_the_isotropic_one() -> None:
    """Then solved finely; the network is of a mixture. At every skip at least twice as near."""
    fine = sampling_times(edm_schedule(), 100)
    exact = heun(edm_schedule(), fine).sample(MIXTURE.eps, NOISE)
    flat = isotropic_score(MIXTURE.sample(4000, rng=0))
    for sigma in (20.0, 10.0, 5.0):
        errors = [
            Teleport(one, times=fine, sigma_skip=sigma).sample(MIXTURE.eps, NOISE) - exact
            for one in (FITTED, flat)
        ]
        near, far = (np.median(np.sqrt(np.square(e).mean(axis=1))) for e in errors)
        assert far > 2 * near


def test_a_threshold_skips_as_far_as_the_score_is_explained() -> None:
    X = MIXTURE.sample(500, rng=4)
    nodes = karras(18)[:-1]
    ev = score_explained_variance(FITTED.eps, MIXTURE.eps, X, nodes, schedule=edm_schedule(), rng=0)
    for threshold in (0.99, 0.9999):
        sigma = ev.skip(threshold)
        k = int(np.flatnonzero(nodes == sigma)[0])
        assert ev.score[: k + 1].min() >= threshold > ev.score[k + 1]
        got = teleport_sample(MIXTURE.eps, NOISE, FITTED, ev_threshold=threshold, data=X, rng=0)
        want = teleport_sample(MIXTURE.eps, NOISE, FITTED, skip_steps=k)
        np.testing.assert_allclose(got, want, rtol=1e-9)
    nowhere = teleport_sample(
        lambda x, t: RNG.normal(size=x.shape), NOISE, FITTED, ev_threshold=0.9, data=X, num_steps=2
    )
    assert nowhere.shape == NOISE.shape


def test_the_default_is_twice_the_widest_deviation() -> None:
    assert Teleport(DATA).sigma_skip == pytest.approx(2 * np.sqrt(3.0))
    wide = GaussianScore(np.zeros(D), residual=1e6)
    assert Teleport(wide).skipped == 0


def test_every_class_has_its_gaussian() -> None:
    two = {0: DATA, "b": FITTED}
    labels = np.array([0, 1, 0], dtype=object)
    labels[1] = "b"
    x = NOISE[:3]
    by_class = {0: DATA, 1: FITTED}
    moved = teleport_by_class(by_class, x, [0, 1, 0], 80.0, 5.0)
    np.testing.assert_array_equal(moved[1], FITTED.teleport(x, 80.0, 5.0)[1])
    np.testing.assert_array_equal(moved[::2], DATA.teleport(x[::2], 80.0, 5.0))
    with pytest.raises(InputError, match="labels: got 7, want one of 0, b, or a default Gaussian"):
        teleport_by_class(two, x, [7, 0, 0], 80.0, 5.0)
    jump = Teleport(DATA, sigma_skip=5.0, by_class={1: FITTED})
    np.testing.assert_array_equal(jump.launch(torch.from_numpy(x), [0, 1, 0]).numpy(), moved)
    elsewhere = Teleport(DATA, sigma_skip=5.0, by_class={1: FITTED.with_schedule(LinearBeta())})
    np.testing.assert_array_equal(elsewhere.launch(x, [0, 1, 0]), moved)
    with pytest.raises(InputError, match="labels: got None, want a class for every sample"):
        jump.sample(DATA.eps, x)
    with pytest.raises(InputError, match=r"labels: got \(2,\), want \(3,\), one a sample"):
        jump.sample(DATA.eps, x, [0, 1])


# ------------------------------------------------------------------ explained variance


def test_explained_variance_is_not_centred_and_has_a_reference() -> None:
    a, b = RNG.normal(size=(20, 3, 2)) + 5, RNG.normal(size=(20, 3, 2)) + 5
    assert explained_variance(a, a) == 1.0
    assert explained_variance(a, 0 * a) == 0.0
    assert explained_variance(a, b) == pytest.approx(1 - ((a - b) ** 2).sum() / (a**2).sum())
    assert explained_variance(a, b) != pytest.approx(explained_variance(b, a), rel=1e-4)
    each = explained_variance(a, b, per_sample=True)
    alone = [explained_variance(a[i : i + 1], b[i : i + 1]) for i in range(20)]
    np.testing.assert_allclose(each, alone)
    assert np.isnan(explained_variance(0 * a, a * 0))
    with pytest.raises(InputError, match="want one shape"):
        explained_variance(a, b[:1])


@pytest.mark.parametrize("schedule", [edm_schedule(), LinearBeta(), LinearFlow()], ids=str)
def test_the_shares_are_those_of_scores_and_denoisers(schedule) -> None:
    """One number scales eps to the score; every schedule sees the same at the same sigma/alpha."""
    X, sigmas = MIXTURE.sample(300, rng=5), np.array([0.3, 1.0, 4.0])
    ours, other = FITTED.with_schedule(schedule), EmpiricalScore(X, schedule)
    ev = score_explained_variance(
        ours.eps, other.eps, X, sigmas, schedule=schedule, batch_size=64, rng=7
    )
    noises = generator(7).standard_normal((3, *X.shape))
    for i, (sigma, noise) in enumerate(zip(sigmas, noises, strict=True)):
        t = float(schedule.time_of_rho(sigma))
        x = schedule.perturb(X, t, noise)
        a, b = other.score(x, t), ours.score(x, t)
        assert ev.score[i] == pytest.approx(explained_variance(a, b), rel=1e-6)
        assert ev.score_reversed[i] == pytest.approx(explained_variance(b, a), rel=1e-6)
        d_a, d_b = other.denoise(x, t) - X.mean(axis=0), ours.denoise(x, t) - X.mean(axis=0)
        assert ev.denoiser[i] == pytest.approx(explained_variance(d_a, d_b), rel=1e-6)
        assert ev.denoiser_reversed[i] == pytest.approx(explained_variance(d_b, d_a), rel=1e-6)
        each = explained_variance(a, b, per_sample=True)
        np.testing.assert_allclose(ev.per_sample[i], each, rtol=1e-5, atol=1e-7)
        each = explained_variance(d_a, d_b, per_sample=True)
        np.testing.assert_allclose(ev.denoiser_per_sample[i], each, rtol=1e-5, atol=1e-7)
    same = score_explained_variance(other.eps, other.eps, X, sigmas, schedule=schedule, noises=2)
    assert (same.score == 1).all()
    assert same.per_sample.shape == (3, 600)


def test_tensors_and_images_are_handed_over_as_they_are() -> None:
    seen = []

    def network(x, t):
        seen.append((type(x), x.dtype, tuple(x.shape), t))
        return 0.5 * x

    images = torch.rand(5, 1, 2, 2, dtype=torch.float32)
    score_explained_variance(network, network, images, [2.0], schedule=edm_schedule(), batch_size=3)
    kind = (torch.Tensor, torch.float32)
    assert seen == [(*kind, (n, 1, 2, 2), 2.0) for n in (3, 2, 3, 2)]


# ------------------------------------------------------------------ bad input


def test_the_unit_range_is_told_from_minus_one_to_one() -> None:
    from sklearn.datasets import load_digits

    pixels = load_digits().data
    for top in (1.0, 255.0):
        with pytest.warns(UserWarning, match=rf"pixels in \[0, {top:g}\].*rescaled\({2 / top:.4g}"):
            warn_of_range(GaussianScore.fit(pixels / 16 * top, rank=10))
    with pytest.warns(UserWarning, match=r"pixels in \[0, 1\]"):
        Teleport(GaussianScore.fit(pixels / 16), sigma_skip=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_range(GaussianScore.fit(pixels / 8 - 1))
        warn_of_range(GaussianScore.fit(pixels / 16).rescaled(2, -1))
        warn_of_range(GaussianScore.fit(RNG.normal(size=(100, 8))))  # latents


def test_a_skip_below_the_widest_deviation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"sigma_skip = 1 is below 1.73205, sqrt of the largest"):
        Teleport(DATA, sigma_skip=1.0)


def test_one_step_half_precision_and_an_empty_batch() -> None:
    one = Teleport(DATA, 1, skip_steps=0)
    assert one.times.tolist() == [80.0, 0.0]
    np.testing.assert_allclose(one.sample(DATA.eps, NOISE), DATA.denoise(NOISE, 80.0))
    single = Teleport(DATA, 1, sigma_skip=5.0)
    moved = DATA.teleport(NOISE, 80.0, 5.0)
    np.testing.assert_allclose(single.sample(DATA.eps, NOISE), DATA.denoise(moved, 5.0))
    for half in (NOISE.astype(np.float16), torch.from_numpy(NOISE).bfloat16()):
        out = Teleport(DATA, sigma_skip=5.0).sample(DATA.eps, half)
        assert out.dtype == half.dtype
        assert bool((abs(out) < 20).all())
    for empty in (NOISE[:0], torch.zeros(0, D)):
        assert Teleport(DATA, sigma_skip=5.0).sample(DATA.eps, empty).shape == (0, D)


@pytest.mark.parametrize("answer", [lambda x: x[:, :1], lambda x: x * np.nan], ids=["shape", "nan"])
def test_a_wrong_answer_names_its_step(answer) -> None:
    jump, calls = Teleport(DATA, sigma_skip=10.0), []

    def network(x, t):
        calls.append(t)
        return answer(x) if len(calls) == 5 else DATA.eps(x, t)

    with pytest.raises(InputError, match=r"eps_fn: got .* at step 2"):
        jump.sample(network, NOISE)
    with pytest.raises(InputError, match=r"eps_fn: got .* at t = 1, want"):
        score_explained_variance(
            lambda x, _: answer(x), DATA.eps, NOISE, [1.0], schedule=edm_schedule()
        )


WRONG = [
    (lambda: Teleport(DATA, sigma_skip=81.0), r"sigma_skip: got 81.0, want a noise in \(0, 80\]"),
    (lambda: Teleport(DATA, sigma_skip=-1.0), "sigma_skip: got -1.0, want a noise in"),
    (lambda: Teleport(DATA, sigma_skip=0.0), "sigma_skip: got 0.0, want a noise in"),
    (lambda: Teleport(DATA, sigma_skip=np.nan), "sigma_skip: got nan, want a noise in"),
    (lambda: Teleport(DATA, skip_steps=18), "skip_steps: got 18, want fewer than the 18 steps"),
    (lambda: Teleport(DATA, skip_steps=-1), "skip_steps: got -1, want an integer >= 0"),
    (lambda: Teleport(DATA, skip_steps=1, sigma_skip=1.0), "sigma_skip, skip_steps: got both"),
    (lambda: Teleport(DATA, grid="new"), "grid: got 'new', want one of tail, respace"),
    (lambda: Teleport(DATA, solver="dpm"), "solver: got 'dpm', want heun, or a function"),
    (lambda: Teleport(DATA, 0), "num_steps: got 0, want an integer >= 1"),
    (lambda: Teleport(DATA, times=[5.0, 5.0, 0.0]), "times: got equal or increasing ones, want"),
    (lambda: Teleport(DATA, times=[5.0, 6.0, 0.0]), "times: got equal or increasing ones, want"),
    (lambda: Teleport(DATA, times=[5.0]), r"times: got \(1,\), want \(N \+ 1,\) times, N >= 1"),
    (lambda: Teleport(DATA, sigma_skip=9.0).sample(DATA.eps, NOISE[:, :2]), r"x: got \(50, 2\)"),
    (lambda: teleport_sample(DATA.eps, NOISE, DATA, ev_threshold=0.9), "data: got None, want samp"),
    (lambda: teleport_sample(DATA.eps, NOISE, DATA, ev_threshold=1.0, data=NOISE), "got 1.0, want"),
    (
        lambda: teleport_sample(DATA.eps, NOISE, DATA, ev_threshold=0.9, skip_steps=1, data=NOISE),
        "sigma_skip, skip_steps, ev_threshold: got 2, want at most one",
    ),
    (
        lambda: score_explained_variance(DATA.eps, DATA.eps, NOISE, [0.0], schedule=edm_schedule()),
        "sigmas: got .*, want .* positive noise levels",
    ),
    (
        lambda: score_explained_variance(DATA.eps, DATA.eps, NOISE, [], schedule=edm_schedule()),
        r"sigmas: got \[\], want .* S >= 1",
    ),
    (
        lambda: score_explained_variance(
            DATA.eps, DATA.eps, NOISE * np.nan, [1.0], schedule=edm_schedule()
        ),
        "X: got NaN or infinity, want finite values",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_bad_input_is_one_line(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
