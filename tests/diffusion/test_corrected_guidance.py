"""Pipelines of diffusers whose network is exact: what comes out of them, plain and corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from scoredraw.diffusion.corrected_guidance import (  # noqa: E402
    GuidanceCorrector,
    noise_levels,
    prediction_kind,
)
from scoredraw.diffusion.guidance_bias import gaussian_target  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:std"),
]

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    return iter([None])


def abar_of(t: Any) -> float:
    betas = np.linspace(1e-4, 0.02, 1000)
    return float(np.cumprod(1 - betas)[int(t)])


def stable_diffusion(scheduler: Any, channels: int = 1) -> Any:
    """A tiny Stable Diffusion whose latents have one pixel."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=1, in_channels=channels, out_channels=channels, block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(4,) * 4, norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae.eval(), None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answers_with(pipe: Any, gaussians: list[tuple[float, float]]) -> Any:
    """The network predicts the eps of Gaussians (mean, variance), one a half of its batch."""
    kind = pipe.scheduler.config.prediction_type

    def forward(x: Any, t: Any, **_: Any) -> tuple[Any]:
        abar = abar_of(t)
        alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        found = []
        for part, (mean, variance) in zip(x.chunk(len(gaussians)), gaussians, strict=True):
            eps = sigma * (part - alpha * mean) / (abar * variance + 1 - abar)
            found.append((eps - sigma * part) / alpha if kind == "v_prediction" else eps)
        return (torch.cat(found),)

    pipe.unet.forward = forward
    return pipe


def generate(pipe: Any, n: int, scale: float = 2.0, steps: int = 240, **how: Any) -> Any:
    """Latents (n,), in float64."""
    words = torch.zeros(1, 2, 8)
    start = torch.Generator().manual_seed(1)
    if "eta" not in how and isinstance(pipe.scheduler, diffusers.DDIMScheduler):
        how["eta"] = 1.0
    return pipe(
        prompt_embeds=words, negative_prompt_embeds=words, num_images_per_prompt=n, height=8,
        width=8, num_inference_steps=steps, guidance_scale=scale, generator=start,
        output_type="latent", **how,
    ).images.double()  # fmt: skip


def scheduler(name: str = "DDIMScheduler", **config: Any) -> Any:
    config["steps_offset"] = 1
    kept = {k: v for k, v in BETAS.items() if name in ("DDIMScheduler", "DDPMScheduler")
            or k != "clip_sample"}  # fmt: skip
    return getattr(diffusers, name)(**kept, **config)


def weighted(corrector: Any, x: Any) -> tuple[float, float]:
    p = corrector.log_weights.softmax(0)
    mean = float(p @ x.flatten())
    return mean, float(p @ (x.flatten() - mean) ** 2)


SCHEDULERS = {
    "DDIM": scheduler(),
    "DDIM of v": scheduler(prediction_type="v_prediction"),
    "DDPM": scheduler("DDPMScheduler"),
    "ancestral Euler": scheduler("EulerAncestralDiscreteScheduler"),
    "SDE-DPM-Solver++": scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_samples_what_it_should(name: str) -> None:
    """q_u = N(0, 1), q_c = N(1, 1/2), scale 2: N(4/3, 1/3); plain guidance ends near N(3/2, .29).

    By chance the mean is off by .01 and the variance by .009 (sd, 3000 images); what 240 steps add
    is half that, and shrinks with their number.
    """
    pipe = answers_with(stable_diffusion(SCHEDULERS[name]), [(0.0, 1.0), (1.0, 0.5)])
    plain = generate(pipe, 3000)
    with GuidanceCorrector(pipe, ess_threshold=0.9, generator=0) as corrector:
        x = generate(pipe, 3000, callback_on_step_end=corrector)
    mean, variance = weighted(corrector, x)
    assert float(plain.mean()) > 1.45
    assert float(plain.var()) < 0.31
    assert mean == pytest.approx(4 / 3, abs=0.05)
    assert variance == pytest.approx(1 / 3, abs=0.035)
    assert corrector.ess.shape == (240, 1)
    assert len(np.unique(corrector.ancestors)) < 3000


def test_between_equal_gaussians_nothing_is_resampled_and_log_z_is_known() -> None:
    """log Z is β (β-1)/2 Δ² (1/v_0 - 1/v_1) in x/alpha, whatever the noise; by 240 steps to 5 %."""
    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0), (0.8, 1.0)])
    for eta in (0.0, 1.0):
        with GuidanceCorrector(pipe) as corrector:
            generate(pipe, 6, 3.0, eta=eta, callback_on_step_end=corrector)
        want = 0.5 * 3 * 2 * 0.8**2
        assert corrector.log_z[0] == pytest.approx(want, rel=0.05)
        np.testing.assert_allclose(corrector.ess, 6.0, rtol=1e-6)


def test_annealing() -> None:
    """(N(0, 1)^{-1} N(1, 1/2)^2)^{3/2}: variance 2/9; the first latents have variance 2/3."""
    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0), (1.0, 0.5)])
    with GuidanceCorrector(pipe, annealing=1.5, generator=0) as corrector:
        latents = corrector.draw_prior((4000, 1, 1, 1), torch.Generator().manual_seed(3))
        x = generate(pipe, 4000, latents=latents, callback_on_step_end=corrector)
    want = gaussian_target([-1.5, 3.0], [[0.0], [1.0]], [1.0, 0.5])
    mean, variance = weighted(corrector, x)
    assert float(latents.var()) == pytest.approx(2 / 3, rel=0.1)
    assert mean == pytest.approx(float(want.mean[0]), abs=0.05)
    assert variance == pytest.approx(float(want.covariance[0, 0]), abs=0.04)
    assert not pipe.unet._forward_hooks


def test_a_reward() -> None:
    """N(0, 1) without guidance, r = -(x - 3/2)²/2 of the latents: N(3/4, 1/2)."""
    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0)])
    reward = lambda x, rho: -0.5 * (x.flatten() - 1.5) ** 2  # noqa: E731
    with GuidanceCorrector(pipe, reward=reward, generator=0) as corrector:
        x = generate(pipe, 4000, scale=1.0, callback_on_step_end=corrector)
    mean, variance = weighted(corrector, x)
    assert mean == pytest.approx(0.75, abs=0.06)
    assert variance == pytest.approx(0.5, abs=0.05)
    assert corrector.log_z[0] == pytest.approx(-9 / 16 - 0.5 * math.log(2), abs=0.08)


def test_prompts_are_resampled_among_their_own() -> None:
    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0)])
    with GuidanceCorrector(pipe, particles=5, ess_threshold=1.1,
                           reward=lambda x, rho: x.flatten()) as corrector:  # fmt: skip
        generate(pipe, 15, 1.0, steps=10, callback_on_step_end=corrector)
    assert (corrector.ancestors // 5 == np.arange(15) // 5).all()
    assert len(np.unique(corrector.ancestors)) < 15
    assert corrector.ess.shape == (10, 3)
    assert corrector.log_z.shape == (3,)


def test_what_a_scheduler_remembers_goes_with_the_latents() -> None:
    """Each of the last outputs of a multistep solver belongs to the latent it is kept beside."""
    pipe = answers_with(
        stable_diffusion(scheduler("DPMSolverMultistepScheduler", solver_order=3)), [(0.0, 1.0)]
    )
    seen: list[Any] = []
    reward = lambda x, rho: 3 * x.flatten()  # noqa: E731
    with GuidanceCorrector(pipe, reward=reward, ess_threshold=1.1, generator=0) as corrector:

        def after(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            kept = [one.clone() for one in pipe.scheduler.model_outputs if one is not None]
            before = corrector.ancestors.copy() if i else np.arange(8)
            kwargs = corrector(pipe, i, t, kwargs)
            now = [one for one in pipe.scheduler.model_outputs if one is not None]
            origin = [np.flatnonzero(before == a)[0] for a in corrector.ancestors]
            seen.append(all(torch.equal(a[origin], b) for a, b in zip(kept, now, strict=True)))
            return kwargs

        generate(pipe, 8, 1.0, steps=1, callback_on_step_end=after)
        generate(pipe, 8, 1.0, steps=2, callback_on_step_end=after)
    assert seen == [True] * 3
    assert len(np.unique(corrector.ancestors)) < 8


def test_it_drops_into_a_flow_pipeline() -> None:
    """Stable Diffusion 3, an untrained network: weights as the formula has them, step by step."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=2, patch_size=1, in_channels=1, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=8, out_channels=1, pos_embed_max_size=4,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=1, block_out_channels=(4,) * 3, norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae.eval(),
        None, None, None, None, None, None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    said: list[Any] = []
    listener = transformer.register_forward_hook(lambda m, a, out: said.append(out[0]))
    words = torch.randn(3, 3, 8)
    with GuidanceCorrector(pipe, ess_threshold=1e-9) as corrector:
        images = pipe(
            prompt_embeds=words, negative_prompt_embeds=0 * words, guidance_scale=4.0,
            pooled_prompt_embeds=words[:, 0], negative_pooled_prompt_embeds=0 * words[:, 0],
            num_inference_steps=4, height=16, width=16,
            output_type="latent", callback_on_step_end=corrector,
        ).images  # fmt: skip
    listener.remove()
    assert images.shape[0] == 3
    levels = corrector.rhos
    assert levels[-1] == 0
    want = torch.zeros(3, dtype=torch.float64)
    for answer, rho, rho_next in zip(said, levels[:-1], levels[1:], strict=True):
        half = answer.double().chunk(2)
        alpha = 0.0 if np.isinf(rho) else 1 / (1 + rho)
        gap = (alpha * (half[1] - half[0])).flatten(1).square().sum(1)  # eps = x + alpha v
        share = 1.0 if np.isinf(rho) else 1 - (rho_next / rho) ** 2
        want += 0.5 * 4 * 3 * share * gap
    torch.testing.assert_close(corrector.log_weights, want, rtol=1e-5, atol=1e-8)


def test_noise_levels_are_those_of_the_schedulers() -> None:
    ddim, euler = scheduler(timestep_spacing="trailing"), scheduler("EulerDiscreteScheduler")
    ddim.set_timesteps(10)
    abar = [abar_of(t) for t in ddim.timesteps]
    np.testing.assert_allclose(noise_levels(ddim)[:-1] ** 2, [(1 - a) / a for a in abar], rtol=1e-4)
    assert noise_levels(ddim)[-1] == 0
    euler.set_timesteps(10)
    np.testing.assert_allclose(noise_levels(euler), euler.sigmas.numpy(), rtol=1e-6)
    assert prediction_kind(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow_prediction"


BAD_SCHEDULERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: diffusers.HeunDiscreteScheduler(), "scheduler: got HeunDiscreteScheduler, of two"),
    (lambda: diffusers.DDIMScheduler(), "scheduler: got DDIMScheduler with clip_sample"),
    (lambda: diffusers.EDMEulerScheduler(), "scheduler: got EDMEulerScheduler, of EDM"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SCHEDULERS, ids=[m for _, m in BAD_SCHEDULERS])
def test_schedulers_that_cannot_be_corrected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prediction_kind(make())


def test_bad_input() -> None:
    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0), (1.0, 0.5)])
    for options, message in (
        ({"particles": 1}, "particles: got 1"),
        ({"annealing": 0.0}, "annealing: got 0.0"),
        ({"resampler": "best"}, "resampler: got 'best'"),
        ({"ess_threshold": 0.0}, "ess_threshold: got 0.0"),
        ({"clip_weights": 0.0}, "clip_weights: got 0.0"),
        ({"power": 0.0}, "power: got 0.0"),
        ({"strength": math.inf}, "strength: got inf"),
    ):
        with pytest.raises(InputError, match=message):
            GuidanceCorrector(pipe, **options)
    flow = stable_diffusion(scheduler(prediction_type="v_prediction"))
    with pytest.raises(InputError, match="annealing: got 2 with v_prediction"):
        GuidanceCorrector(flow, annealing=2.0)
    with pytest.raises(InputError, match="pipe: got object, want a pipeline with a unet"):
        GuidanceCorrector(object())


def test_what_goes_wrong_on_the_way_names_its_step() -> None:
    def runs(message: str, *, n: int = 4, enter: bool = True, how: Any = None, **kw: Any) -> None:
        corrector = GuidanceCorrector(pipe, **(how or {}))
        with corrector if enter else nullcontext(), pytest.raises(InputError, match=message):
            generate(pipe, n, steps=5, callback_on_step_end=corrector, **kw)

    pipe = answers_with(stable_diffusion(scheduler()), [(0.0, 1.0), (1.0, 0.5)])
    runs("corrector: got one that was not entered", enter=False)
    runs("batch: got 1 latents", n=1)
    runs("batch: got 4 latents, want a multiple of particles = 3", how={"particles": 3})
    runs("guidance_rescale: got 0.7, want 0", guidance_rescale=0.7)
    at_third = iter([0.0, 0.0, math.nan])
    runs("reward: got NaN or infinity at step 2",
         how={"reward": lambda x, rho: 0 * x.flatten() + next(at_third)})  # fmt: skip
    runs(r"reward: got shape \(4, 1, 1, 1\) at step 0", how={"reward": lambda x, rho: x})
    exact, calls = pipe.unet.forward, iter(range(99))
    pipe.unet.forward = lambda x, t, **k: (exact(x, t)[0] * (math.nan if next(calls) == 3 else 1),)
    runs("network: got NaN or infinity at step 3")
    pipe.unet.forward = exact
    stray = GuidanceCorrector(pipe)
    with stray:
        pipe.unet(torch.zeros(6, 1, 1, 1), 10)
        with pytest.raises(InputError, match=r"network: got calls for \[6, 8\] latents at step 0"):
            generate(pipe, 4, steps=5, callback_on_step_end=stray)
