"""Solver schedules in diffusers: against its own schedulers, in pipelines, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta
from scoredraw.diffusion.solver_schedules import (
    PRESETS,
    SolverSchedule,
    StepDecision,
    Taylor,
    solver_preset,
)
from scoredraw.diffusion.unified_solver import UnifiedSolver
from scoredraw.errors import InputError

diffusers = pytest.importorskip("diffusers")

from scoredraw.diffusion.unified_scheduler import UnifiedScheduler  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers, of its NumPy calls
]

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
DATA = GaussianMixtureScore(
    [0.3, 0.7], [[1.0, -1.0], [-1.5, 0.5]],
    [[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0.0], [0.0, 0.05]]], TRAINED,
)  # fmt: skip
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.logging.set_verbosity_error()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(scheduler: Any, count: int, x: torch.Tensor, network: Any = None) -> torch.Tensor:
    """A whole sampling run; network(x, t), by default a smooth made-up one."""
    network = network or (lambda x, t: 0.3 * x + 0.1 * torch.cos(x))
    scheduler.set_timesteps(count)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


# ------------------------------------------------------------------ the solvers of diffusers


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("bh", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_it_contains_unipc(order, bh, predict_x0, final) -> None:
    if final == "zero" and not (predict_x0 and bh == "bh2"):
        theirs = diffusers.UniPCMultistepScheduler(solver_type=bh, predict_x0=predict_x0)
        assert not run(theirs, 9, noise(4, 3, 4, 4)).isfinite().all()  # 0/0, and inf times 0
        assert run(UnifiedScheduler(relaxation=bh), 9, noise(4, 3, 4, 4)).isfinite().all()
        return
    preset = "unipc" if predict_x0 else "dpm_solver"
    ours = UnifiedScheduler(
        preset=preset, solver_order=order, relaxation=bh, corrector="pseudo",
        final_sigmas_type=final,
    )  # fmt: skip
    theirs = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=bh, predict_x0=predict_x0, final_sigmas_type=final
    )
    a, b = (run(s, 9, noise(4, 3, 4, 4)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)  # its weights are float32


@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("solver_type", "relaxation"), [("midpoint", "bh2"), ("heun", "none")])
def test_it_contains_dpm_solver_2(kind, solver_type, relaxation) -> None:
    preset = kind.replace("dpmsolver", "dpm_solver")
    ours = UnifiedScheduler(preset=preset, relaxation=relaxation, final_sigmas_type="sigma_min")
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_type=solver_type, final_sigmas_type="sigma_min"
    )
    a, b = (run(s, 9, noise(4, 3, 4, 4)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("order", "solver_type", "relaxation", "count"),
    [(2, "midpoint", "bh2", 8), (2, "heun", "none", 8), (3, "heun", "none", 9)],
)
@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++"])
def test_it_contains_single_step_dpm_solver(kind, order, solver_type, relaxation, count) -> None:
    """Its "midpoint" of order 3 relaxes the second stage too, unlike that of the authors."""
    ours = UnifiedScheduler(
        preset=f"{kind.replace('dpmsolver', 'dpm_solver')}_singlestep", solver_order=order,
        relaxation=relaxation, final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type=kind, solver_order=order, solver_type=solver_type,
        final_sigmas_type="sigma_min", lower_order_final=order == 3,
    )  # fmt: skip
    a, b = (run(s, count, noise(4, 3, 4, 4)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_ddim_is_ddim() -> None:
    ours = UnifiedScheduler(preset="ddim", timestep_spacing="trailing")
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    a, b = (run(s, 10, noise(4, 3, 8, 8)) for s in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_every_kind_of_level(preset) -> None:
    for config in (
        {}, {"use_karras_sigmas": True}, FLOW, {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"solver_order": 3, "thresholding": True}, {"lower_order_final": False},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "thresholding": True},
    ):  # fmt: skip
        for count in (1, 2, 7):
            scheduler = UnifiedScheduler(preset=preset, **config)
            end = run(scheduler, count, noise(2, 1, 4, 4))
            assert end.isfinite().all(), (preset, config, count)
            assert len(scheduler.timesteps) == count


@pytest.mark.parametrize("preset", ["dpm_solver", "unipc"])
def test_a_thousand_steps_give_no_nan(preset) -> None:
    ours = UnifiedScheduler(preset=preset, solver_order=3)
    assert run(ours, 1000, noise(2, 1, 2, 2)).isfinite().all()


# ------------------------------------------------------------------ schedules from files


def mixed() -> SolverSchedule:
    """Times between whole timesteps, both predictions, few points, and correctors that call."""
    steps = (
        StepDecision(700.5, "data", Taylor(), Taylor(2, start=-2), True),
        StepDecision(400.0, "noise", Taylor(2, relaxation="linear", coefficient=0.1)),
        StepDecision(150.0, "data", Taylor(3, ((-2,), (-2, -3))), Taylor(4, start=-2)),
        StepDecision(40.0, "noise", Taylor(1, start=-2), Taylor(2, start=-3), True),
        StepDecision(0.0, "noise", Taylor(2)),
    )
    return SolverSchedule(999.0, steps)


def test_it_takes_the_steps_of_the_solver(tmp_path) -> None:
    other = solver_preset("unipc", TRAINED, 6, order=3)
    mixed().save(tmp_path / "mixed.json")
    scheduler = UnifiedScheduler(schedules=[tmp_path / "mixed.json", other])
    for made, count in ((mixed(), 7), (other, 6)):
        ours = run(scheduler, count, noise(5, 2), lambda x, t: DATA.eps(x, float(t)))
        assert len(scheduler.timesteps) == count == made.nfe
        assert len(scheduler.sigmas) == count + 1
        theirs = UnifiedSolver(made, TRAINED).sample(DATA.eps, noise(5, 2))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)  # float32 timesteps


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_every_prediction_type_leads_to_the_same_sample(kind) -> None:
    def final(kind: str) -> torch.Tensor:
        scheduler = UnifiedScheduler(schedules=[mixed()], prediction_type=kind)
        scheduler.set_timesteps(7)
        x = noise(3, 4)
        for rho, t in zip(scheduler.sigmas.double(), scheduler.timesteps, strict=False):
            alpha = 1 / torch.sqrt(1 + rho**2)
            sigma = rho * alpha
            x0 = alpha * torch.tanh(x) + 0.2 * sigma
            eps = (x - alpha * x0) / sigma
            said = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
            x = scheduler.step(said.get(kind, eps - x0), t, x).prev_sample
        return x

    torch.testing.assert_close(final(kind), final("epsilon"), rtol=1e-4, atol=1e-4)


def test_the_end_may_be_no_noise() -> None:
    made = SolverSchedule(999.0, (StepDecision(400.0), StepDecision(-1.0)))
    scheduler = UnifiedScheduler(schedules=[made])
    end = run(scheduler, 2, noise(5, 2), lambda x, t: DATA.eps(x, float(t)))
    first = UnifiedSolver(SolverSchedule(999.0, made.steps[:1]), TRAINED)
    before = first.sample(DATA.eps, noise(5, 2))
    torch.testing.assert_close(end, DATA.denoise(before, 400.0), rtol=1e-5, atol=1e-5)


def test_on_a_flow() -> None:
    made = SolverSchedule(950.0, (StepDecision(500.0), StepDecision(0.0, predictor=Taylor())))
    scheduler = UnifiedScheduler(schedules=[made], **FLOW)
    x = run(scheduler, 2, noise(5, 2), lambda x, t: x)
    assert scheduler.timesteps.tolist() == [950.0, 500.0]
    torch.testing.assert_close(x, noise(5, 2) * (1 - 0.45) * 0.5)


def test_half_precision_is_combined_in_float32() -> None:
    x = noise(2, 1, 8, 8, dtype=torch.float32)
    whole = run(UnifiedScheduler(solver_order=3), 8, x)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.1)):
        half = run(UnifiedScheduler(solver_order=3), 8, x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), whole, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ pipelines


def generated(pipe: Any, count: int, **arguments: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(7)
    return pipe(generator=start, num_inference_steps=count, output_type="np", **arguments).images


@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline"])
def test_a_pipeline_is_given_one_saved_and_loaded(name, unet, tmp_path) -> None:
    pipe = getattr(diffusers, name)(unet, diffusers.DDPMScheduler(beta_schedule="scaled_linear"))
    pipe.scheduler = UnifiedScheduler.from_config(pipe.scheduler.config, schedules=[mixed()])
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert "deis_variant" not in pipe.scheduler.config
    images = generated(pipe, 7)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        x = run(pipe.scheduler, 7, x, lambda x, t: unet(x, t).sample)
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    if name == "DDIMPipeline":  # makes itself a DDIMScheduler of any
        return
    pipe.save_pretrained(tmp_path)
    again = getattr(diffusers, name).from_pretrained(tmp_path)
    assert type(again.scheduler) is UnifiedScheduler
    again.unet = unet  # what a network says depends on where its weights lie
    np.testing.assert_array_equal(generated(again, 7), images)


def test_it_drops_into_stable_diffusion_and_image_to_image() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    words = noise(1, 4, 8, dtype=torch.float32)
    said = {"prompt_embeds": words, "negative_prompt_embeds": 0 * words}
    parts = vae.eval(), None, None, unet, diffusers.PNDMScheduler(steps_offset=1), None, None
    for name, strength in (("", None), ("Img2Img", 0.6)):
        made = getattr(diffusers, f"StableDiffusion{name}Pipeline")
        pipe = made(*parts, requires_safety_checker=False)
        pipe.scheduler = UnifiedScheduler.from_config(pipe.scheduler.config, schedules=[mixed()])
        extra: dict[str, Any] = {"height": 8, "width": 8}
        if strength is not None:
            extra = {"image": torch.rand(1, 3, 8, 8), "strength": strength}
        assert np.isfinite(generated(pipe, 7, **said, **extra)).all()
    assert (pipe.scheduler.begin_index, pipe.scheduler.step_index) == (3, 7)


@pytest.mark.parametrize("begin", range(7))
def test_a_later_start_is_the_rest_of_the_schedule_without_history(begin) -> None:
    scheduler = UnifiedScheduler(schedules=[mixed()])
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(begin)
    x = noise(5, 2)
    for t in scheduler.timesteps[begin:].tolist():
        x = scheduler.step(DATA.eps(x, t), t, x).prev_sample
    tail = mixed().tail([0, 1, 1, 2, 3, 4, 4][begin])
    want = UnifiedSolver(tail, TRAINED).sample(DATA.eps, noise(5, 2))
    torch.testing.assert_close(x, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_configurations_go_both_ways_and_through_a_file(name, tmp_path) -> None:
    there = getattr(diffusers, name)()
    ours = UnifiedScheduler.from_config(there.config, preset="dpm_solver++", solver_order=3)
    ours.save_pretrained(tmp_path)
    again = UnifiedScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    torch.testing.assert_close(run(again, 5, noise(1, 1, 2, 2)), run(ours, 5, noise(1, 1, 2, 2)))
    assert type(type(there).from_config(again.config)) is type(there)


# ------------------------------------------------------------------ what is refused


def test_what_a_pipeline_cannot_run_is_refused() -> None:
    guessing = SolverSchedule(999.0, mixed().steps, "zero_x0")
    v3 = SolverSchedule(999.0, (StepDecision(10.0, "v3"),))
    for arguments, message in (
        ({"schedules": [guessing]}, r"schedules\[0\]: afs: got 'zero_x0', want none: pipelines"),
        ({"schedules": [v3]}, "step 0: prediction: got 'v3'"),
        ({"schedules": [mixed(), mixed()]}, r"schedules: got \[7, 7\] calls, want different"),
        ({"schedules": []}, "schedules: got none"),
        ({"schedules": [{"t": 1}]}, "solver schedule: got dict"),
        ({"schedules": ["absent.json"]}, "cannot read absent.json"),
        ({"preset": "heun"}, "preset: got 'heun'"),
    ):
        with pytest.raises(InputError, match=message):
            UnifiedScheduler(**arguments)
    ours = UnifiedScheduler(schedules=[mixed(), solver_preset("ddim", TRAINED, 3)])
    with pytest.raises(InputError, match="num_inference_steps: got 5, want 3 or 7"):
        ours.set_timesteps(5)
    with pytest.raises(InputError, match="num_inference_steps: got None"):
        ours.set_timesteps(timesteps=[999, 10])
    in_unit_time = solver_preset("ddim", LinearBeta(), 3)
    UnifiedScheduler(schedules=[in_unit_time.on(LinearBeta(), TRAINED)]).set_timesteps(3)
    beyond = SolverSchedule(1200.0, (StepDecision(10.0),))
    with pytest.raises(InputError, match=r"schedules: got times 1200 .. 10, want timesteps"):
        UnifiedScheduler(schedules=[beyond]).set_timesteps(1)
    x = noise(1, 1, 2, 2)
    ours.set_timesteps(3)
    for bad, message in ((x[..., :1], "model_output: got shape"), (x, "eta: got 0.5")):
        with pytest.raises(InputError, match=message):
            ours.step(bad, ours.timesteps[0], x, eta=0.5 if bad is x else 0.0)
    for t in ours.timesteps:
        ours.step(x, t, x)
    with pytest.raises(InputError, match="a call after the last step"):
        ours.step(x, ours.timesteps[-1], x)


@pytest.mark.parametrize("calls", [5, 10, 20])
def test_a_preset_of_ours_is_as_near_as_the_best_of_diffusers(calls) -> None:
    from scoredraw.diffusion.deis import DEISSolver

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 2)))
    exact = DEISSolver(TRAINED, 200, variant="rhork", tableau="4rk", grid="log").sample(DATA.eps, x)

    def rmse(scheduler: Any) -> float:
        end = run(scheduler, calls, x, lambda x, t: DATA.eps(x, float(t)))
        return float(torch.sqrt(torch.mean((end - exact) ** 2)))

    end = {"final_sigmas_type": "sigma_min"}
    peers = min(
        *(rmse(diffusers.DEISMultistepScheduler(solver_order=k)) for k in (1, 2, 3)),
        *(rmse(diffusers.DPMSolverMultistepScheduler(solver_order=k, **end)) for k in (2, 3)),
        *(rmse(diffusers.UniPCMultistepScheduler(solver_order=k, **end)) for k in (2, 3)),
    )
    ours = min(
        rmse(UnifiedScheduler(
            preset=p, solver_order=k, relaxation=r, corrector=c, lower_order_final=low, **end
        ))
        for p in ("dpm_solver", "dpm_solver++") for k in (2, 3) for r in ("none", "bh2")
        for c in ("none", "pseudo") for low in (False, True)
    )  # fmt: skip
    assert ours <= peers * 1.001  # theirs are among ours; float32 weights differ
