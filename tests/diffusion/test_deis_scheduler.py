"""DEIS in diffusers: in pipelines, against the solver, and without six faults of its peers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.integrator_coefficients import deis_coefficients
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearFlow
from scoredraw.errors import InputError

diffusers = pytest.importorskip("diffusers")

from scoredraw.diffusion.deis_scheduler import DEISScheduler  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers, of its NumPy calls
]

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
DATA = GaussianMixtureScore(
    [0.3, 0.7], [[1.0, -1.0], [-1.5, 0.5]],
    [[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0.0], [0.0, 0.05]]], TRAINED,
)  # fmt: skip
PEERS = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
UNSAFE = pytest.mark.filterwarnings("ignore:.*extrapolation above order 3.*")


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.logging.set_verbosity_error()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(scheduler: Any) -> list[tuple[float, float]]:
    """alpha and sigma of every level, from the public sigmas alone."""
    sigmas = scheduler.sigmas.double().tolist()
    if scheduler.config.use_flow_sigmas:
        return [(1 - s, s) for s in sigmas]
    return [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]


def run(scheduler: Any, count: int, x: torch.Tensor, network: Any = None) -> torch.Tensor:
    """A whole sampling run; network(x, t), by default a smooth made-up one."""
    network = network or (lambda x, t: 0.3 * x + 0.1 * torch.cos(x))
    scheduler.set_timesteps(count)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def peer(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


# ------------------------------------------------------------------ the method


@UNSAFE
@pytest.mark.parametrize("variant", ["tab", "rhoab", "logrhoab", "ipndm"])
@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_it_takes_the_steps_of_the_solver(variant, order) -> None:
    scheduler = DEISScheduler(
        solver_order=order, deis_variant=variant, lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    ours = run(scheduler, 12, noise(5, 2), lambda x, t: DATA.eps(x, float(t)))
    times = [*scheduler.timesteps.double().tolist(), 0.0]
    solver = DEISSolver(TRAINED, times=times, variant=variant, order=order - 1)
    theirs = solver.sample(DATA.eps, noise(5, 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_it_takes_the_steps_of_the_solver_on_a_flow() -> None:
    scheduler = DEISScheduler(**FLOW, lower_order_final=False)
    scheduler.set_timesteps(sigmas=[0.98, 0.8, 0.5, 0.3, 0.1])
    flow = GaussianMixtureScore(DATA.weights, DATA.means, np.stack([np.eye(2)] * 2), LinearFlow())
    x = y = noise(5, 2)
    for t in scheduler.timesteps:
        s = float(t) / 1000
        eps = flow.eps(x, s)
        x = scheduler.step((eps - x) / (1 - s), t, x).prev_sample  # eps - x0
    times = [0.98, 0.8, 0.5, 0.3, 0.1, 1e-7]
    solver = DEISSolver(LinearFlow(), times=times)
    torch.testing.assert_close(x, solver.sample(flow.eps, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_in_log_rho_it_is_what_diffusers_calls_deis(order) -> None:
    ours = DEISScheduler(
        solver_order=order, deis_variant="logrhoab", lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs = peer("DEISMultistepScheduler", solver_order=order)
    a, b = (run(s, 20, noise(4, 3, 8, 8)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_one_value_of_eps_is_ddim() -> None:
    ours = DEISScheduler(solver_order=1, timestep_spacing="trailing")
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    a, b = (run(s, 10, noise(4, 3, 8, 8)) for s in (ours, theirs))
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config", [{}, {"use_karras_sigmas": True}, {"rescale_betas_zero_snr": True}]
)
@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_every_prediction_type_leads_to_the_same_sample(kind, config) -> None:
    """Networks that say the same thing about x0; with no signal at the start, epsilon cannot."""

    def x0_of(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return alpha * torch.tanh(x) + 0.2 * sigma

    def final(kind: str) -> torch.Tensor:
        scheduler = DEISScheduler(prediction_type=kind, **config)
        scheduler.set_timesteps(8)
        x = noise(3, 4)
        for (alpha, sigma), t in zip(levels(scheduler), scheduler.timesteps, strict=False):
            x0 = x0_of(x, alpha, sigma)
            eps = (x - alpha * x0) / sigma
            said = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
            x = scheduler.step(said.get(kind, eps - x0), t, x).prev_sample
        return x

    reference = "sample" if config.get("rescale_betas_zero_snr") else "epsilon"
    torch.testing.assert_close(final(kind), final(reference), rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_starts_at_no_signal_exactly() -> None:
    scheduler = DEISScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    x, v = noise(2, 3), noise(2, 3, seed=1)
    moved = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    alpha, sigma = levels(scheduler)[1]
    torch.testing.assert_close(moved, sigma * x - alpha * v, rtol=1e-6, atol=1e-6)  # x0 = -v
    with pytest.raises(InputError, match="prediction_type: got epsilon, want v_prediction"):
        DEISScheduler(rescale_betas_zero_snr=True).set_timesteps(5)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_thresholding_is_that_of_diffusers(final) -> None:
    config = {"thresholding": True, "sample_max_value": 1.5, "final_sigmas_type": final}
    ours = DEISScheduler(solver_order=1, **config)
    theirs = peer("DPMSolverMultistepScheduler", solver_order=1, **config)
    a, b = (run(s, 6, noise(4, 3, 8, 8)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    high = run(DEISScheduler(**config), 6, noise(4, 3, 8, 8))
    assert high.isfinite().all()
    assert not torch.allclose(high, a)


@pytest.mark.parametrize("calls", [5, 10, 20, 50])
def test_no_peer_ends_nearer_to_the_exact_ode_with_as_many_calls(calls) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 2)))
    fine = DEISSolver(TRAINED, 200, variant="rhork", tableau="4rk", grid="log")
    exact = fine.sample(DATA.eps, x)

    def rmse(scheduler: Any) -> float:
        end = run(scheduler, calls, x, lambda x, t: DATA.eps(x, float(t)))
        return float(torch.sqrt(torch.mean((end - exact) ** 2)))

    end = {"final_sigmas_type": "sigma_min"}
    best = min(
        *(rmse(peer(PEERS[0], solver_order=k)) for k in (1, 2, 3)),
        rmse(peer(PEERS[1], solver_order=2, **end)),
        *(rmse(peer(PEERS[2], solver_order=k, **end)) for k in (2, 3)),
    )
    assert rmse(DEISScheduler(**end)) < best


# ------------------------------------------------------------------ six faults of the peers


def test_fault_1_a_thousand_steps_give_no_nan() -> None:
    """Rounding makes two of 1000 "linspace" timesteps coincide: 0/0 in every multistep peer."""
    x = noise(2, 1, 4, 4)
    for spacing in ("linspace", "leading", "trailing"):
        for variant in ("tab", "rhoab", "logrhoab", "ipndm"):
            ours = DEISScheduler(timestep_spacing=spacing, deis_variant=variant, steps_offset=1)
            assert run(ours, 1000, x).isfinite().all()
            assert (ours.timesteps.diff() < 0).all()
            assert len(ours.timesteps) == ours.num_inference_steps >= 998
    for name in PEERS:
        assert not run(peer(name), 1000, x).isfinite().all()


@UNSAFE
def test_fault_2_the_order_asked_for_is_the_order_used() -> None:
    """An eps that is a cubic of time is integrated exactly by 4 values of it, and no fewer."""
    scheduler = DEISScheduler(lower_order_final=False, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(8)
    times = [*scheduler.timesteps.double().tolist(), 0.0]
    fine = np.linspace(times[-4], times[-3], 5001)
    psi, C = deis_coefficients(TRAINED, fine, 0, "ei_eps")

    def cubic(t: Any) -> Any:
        return (t / 500 - 1) ** 3 - t / 1000

    x = before = torch.ones(1, dtype=torch.float64)
    for t in scheduler.timesteps[:-2]:
        x, before = scheduler.step(cubic(t.double()).reshape(1), t, x).prev_sample, x
    exact = before.item()
    middle = (fine[1:] + fine[:-1]) / 2  # of each tiny step: second order
    for p, c, value in zip(psi, C[:, 0], cubic(middle), strict=True):
        exact = p * exact + c * value
    assert x.item() == pytest.approx(exact, rel=1e-7)
    theirs = [run(peer(PEERS[0], solver_order=k), 20, noise(2, 1, 4, 4)) for k in (3, 4)]
    assert torch.equal(*theirs)  # asked for 4, runs 3
    ours = [run(DEISScheduler(solver_order=k), 20, noise(2, 1, 4, 4)) for k in (3, 4, 5)]
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[1], ours[2])


def test_fault_3_weights_keep_their_digits_when_steps_are_short() -> None:
    """The second weight in log rho at 500 steps, against 40 digits; theirs cancels in float32."""
    mpmath = pytest.importorskip("mpmath")
    scheduler = DEISScheduler(
        solver_order=2, deis_variant="logrhoab", lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs = peer(PEERS[0], solver_order=2)

    def second_weight(scheduler: Any, at: int) -> float:
        """What outputs 0, ..., 0, 1, 0 make of samples that are put back to 0 before each step."""
        scheduler.set_timesteps(500)
        x = torch.zeros(1, 1, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps[: at + 1]):
            said = torch.full_like(x, float(i == at - 1))
            x = scheduler.step(said, t, torch.zeros_like(x)).prev_sample
        return float(x)

    def exact(at: int) -> float:
        with mpmath.workdps(40):
            abar = [mpmath.mpf(v) for v in TRAINED.values.tolist()]
            rho = [mpmath.sqrt((1 - a) / a) for a in abar]
            t = [int(v) for v in scheduler.timesteps]
            b, c, e = rho[t[at]], rho[t[at - 1]], rho[t[at + 1]]
            integral = e * (mpmath.log(e / b) - 1) + b  # of log(rho/b) from b to e
            return float(mpmath.sqrt(abar[t[at + 1]]) * integral / mpmath.log(c / b))

    ours_off = theirs_off = 0.0
    for at in (50, 250, 400):
        got, peers = second_weight(scheduler, at), second_weight(theirs, at)
        ours_off = max(ours_off, abs(got / exact(at) - 1))
        theirs_off = max(theirs_off, abs(peers / exact(at) - 1))
    assert ours_off < 1e-10
    assert theirs_off > 1e-4


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("curve", [*CURVES, "use_flow_sigmas"])
def test_fault_4_no_call_is_spent_on_a_step_of_no_length(curve, final) -> None:
    config: dict[str, Any] = FLOW if curve == "use_flow_sigmas" else {curve: True}
    ours = DEISScheduler(**config, final_sigmas_type=final)
    ours.set_timesteps(10)
    assert len(ours.timesteps) == len(ours.timesteps.unique()) == 10
    assert (ours.sigmas.diff() < 0).all()
    least = 1e-3 if config is FLOW else float(TRAINED.rho(0.0))
    assert float(ours.sigmas[-1]) == pytest.approx(0.0 if final == "zero" else least, rel=1e-5)
    theirs = peer(PEERS[0], **config)
    theirs.set_timesteps(10)
    assert theirs.sigmas[-1] == theirs.sigmas[-2]


def test_fault_5_cosine_betas_with_karras_levels_run() -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    ours = DEISScheduler(**config)
    assert run(ours, 20, noise(2, 1, 4, 4)).isfinite().all()
    assert len(ours.timesteps.unique()) == 20
    with pytest.raises(IndexError):
        run(peer(PEERS[0], **config), 20, noise(2, 1, 4, 4))


def test_fault_6_the_last_step_changes_little_by_little_with_the_number_of_steps() -> None:
    def reach(scheduler: Any, count: int) -> int:
        """How many outputs the last step combines."""
        found = 1
        for back in (1, 2, 3, 4):
            scheduler.set_timesteps(count)
            x = torch.zeros(1, 1, dtype=torch.float64)
            for i, t in enumerate(scheduler.timesteps):
                said = torch.full_like(x, float(i == count - 1 - back))
                x = scheduler.step(said, t, torch.zeros_like(x)).prev_sample
            found += bool(x.abs().max() > 1e-12)
        return found

    ours = [reach(DEISScheduler(), n) for n in range(6, 52)]
    assert set(np.diff(ours)) == {0, 1}
    assert (ours[0], ours[-1]) == (2, 4)
    whole = DEISScheduler(lower_order_final=False)
    assert [reach(whole, n) for n in (6, 30)] == [4, 4]
    assert [reach(peer(PEERS[0], solver_order=3), n) for n in (14, 15)] == [1, 3]


# ------------------------------------------------------------------ its interface


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_levels_are_those_of_the_peers(spacing, betas) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": 1, "beta_schedule": betas}
    for count in (1, 2, 7, 50, 333):
        ours, theirs = DEISScheduler(**config), peer(PEERS[2], **config)
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        assert ours.timesteps.dtype == torch.int64
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-9)


def test_the_flow_levels_are_those_of_the_peers() -> None:
    """UniPC's, but for the first, which may be 1 here."""
    given = np.linspace(1.0, 0.25, 4)
    for config, arguments in (
        ({"flow_shift": 3.0}, {"num_inference_steps": 6}),
        ({"flow_shift": 3.0}, {"sigmas": given}),
        ({"use_dynamic_shifting": True}, {"sigmas": given, "mu": 0.7}),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 6}),
    ):
        ours, theirs = DEISScheduler(**FLOW, **config), peer(PEERS[2], **FLOW, **config)
        ours.set_timesteps(**arguments)
        theirs.set_timesteps(**arguments)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=2e-6)
        assert ours.timesteps.dtype == torch.float32
        torch.testing.assert_close(ours.timesteps / 1000, ours.sigmas[:-1])


def test_image_to_image_starts_with_an_empty_history_where_it_is_told() -> None:
    """From a level on, it is the sampling run that has only the later levels."""
    part, whole = DEISScheduler(), DEISScheduler()
    part.set_timesteps(10)
    x0, start = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1)
    t = part.timesteps[4:]
    part.set_begin_index(4)
    x = y = part.add_noise(x0, start, t[:1].repeat(2))
    abar = TRAINED.abar(float(t[0]))
    torch.testing.assert_close(x, abar**0.5 * x0 + (1 - abar) ** 0.5 * start)
    searched = DEISScheduler()
    searched.set_timesteps(10)  # finds its start by the timestep
    z = x
    whole.set_timesteps(timesteps=t.tolist())
    for one in t:
        x = part.step(0.4 * x, one, x).prev_sample
        y = whole.step(0.4 * y, one, y).prev_sample
        z = searched.step(0.4 * z, one, z).prev_sample
    assert (part.begin_index, part.step_index) == (4, 10)
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, z)


def test_noise_is_added_at_any_trained_time() -> None:
    x0, e, t = noise(4, 1, 2, 2), noise(4, 1, 2, 2, seed=1), torch.tensor([0, 3, 500, 999])
    ours, theirs = DEISScheduler(), diffusers.DDPMScheduler()
    ours.set_timesteps(5)  # none of the four is one of its levels but the last
    a, b = (scheduler.add_noise(x0, e, t) for scheduler in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a = DEISScheduler(**FLOW).scale_noise(x0, torch.full((4,), 250.0), e)
    torch.testing.assert_close(a, 0.75 * x0 + 0.25 * e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_low_precision_samples_are_combined_in_float32(dtype, kind) -> None:
    def one(dtype: torch.dtype) -> torch.Tensor:
        """Four steps from the same samples and outputs: only the history is the scheduler's own."""
        scheduler = DEISScheduler(prediction_type=kind)
        scheduler.set_timesteps(30)
        for i, t in enumerate(scheduler.timesteps[:4]):
            said, x = (noise(2, 3, 8, 8, seed=i).to(torch.float16).to(torch.bfloat16)).to(dtype)
            moved = scheduler.step(said, t, x).prev_sample
        assert moved.dtype == dtype
        return moved.float()

    rtol = torch.finfo(dtype).eps  # one rounding, of the result
    torch.testing.assert_close(one(dtype), one(torch.float32), rtol=rtol, atol=1e-6)


def test_gradients_flow_through_the_steps_and_nothing_given_is_changed() -> None:
    scheduler = DEISScheduler()
    scheduler.set_timesteps(3)
    start = noise(1, 1, 2, 2).requires_grad_()
    x = start
    for t in scheduler.timesteps:
        said, kept = 0.5 * x, x.detach().clone()
        new = scheduler.step(said, t, x).prev_sample
        assert torch.equal(x.detach(), kept)
        assert torch.equal(said.detach(), 0.5 * kept)
        x = new
    x.sum().backward()
    assert start.grad is not None
    assert (start.grad != 0).all()


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"solver_order": 0}, None, "solver_order: got 0, want an integer >= 1"),
        ({"deis_variant": "heun"}, None, "deis_variant: got 'heun', want one of tab, rhoab"),
        ({"prediction_type": "x"}, None, "prediction_type: got 'x', want one of epsilon"),
        ({"beta_schedule": "x"}, None, "beta_schedule: got 'x', want one of linear"),
        ({"final_sigmas_type": "x"}, None, "final_sigmas_type: got 'x', want one of zero"),
        ({"trained_betas": [0.1, 0.2]}, None, "trained_betas: got .2,., want num_train"),
        (dict.fromkeys(CURVES, True), None, "want at most one of them"),
        ({}, {}, "set_timesteps: got 0 of them, want exactly one"),
        ({}, {"num_inference_steps": 3, "sigmas": [1.0]}, "set_timesteps: got 2 of them"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps: got 1001, want at most 1000"),
        ({}, {"timesteps": []}, "set_timesteps: got .., want levels"),
        ({}, {"timesteps": [500, 500]}, "times: got 501 twice"),
        ({}, {"timesteps": [1000, 3]}, "timesteps: got .1000, 3., want decreasing times in 0"),
        ({}, {"num_inference_steps": 3, "mu": 1.0}, "mu: got 1.0, want None"),
        (FLOW, {"sigmas": [1.2, 0.1]}, "sigmas: got"),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 3}, "mu: got None"),
    ],
)
def test_mistakes_are_one_line(config, arguments, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        DEISScheduler(**config).set_timesteps(**arguments)
    assert "\n" not in str(error.value)


def test_steps_out_of_order_are_refused() -> None:
    x = noise(1, 1, 2, 2)
    scheduler = DEISScheduler()
    with pytest.raises(InputError, match="step: got no levels"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(1)
    with pytest.raises(InputError, match="timestep: got 5, want one of"):
        scheduler.step(x, 5, x)
    with pytest.raises(InputError, match="model_output: got shape"):
        scheduler.step(x[:, :, :1], 999, x)
    scheduler.step(x, 999, x)
    with pytest.raises(InputError, match="after the last step"):
        scheduler.step(x, 999, x)
