"""DEIS in the pipelines of diffusers, and configurations that come from its schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.errors import InputError

diffusers = pytest.importorskip("diffusers")

from scoredraw.diffusion.deis_scheduler import DEISScheduler  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers, of its NumPy calls
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(scheduler: Any, count: int, x: torch.Tensor, network: Any = None) -> torch.Tensor:
    """A whole sampling run; network(x, t), by default a smooth made-up one."""
    network = network or (lambda x, t: 0.3 * x + 0.1 * torch.cos(x))
    scheduler.set_timesteps(count)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline"])
def test_it_drops_into_a_pipeline(name, unet, generated) -> None:
    pipe = getattr(diffusers, name)(unet, diffusers.DDPMScheduler(beta_schedule="scaled_linear"))
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    images = generated(pipe, 4, batch_size=2)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        x = run(pipe.scheduler, 4, x, lambda x, t: unet(x, t).sample)
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    if name == "DDIMPipeline":
        with pytest.raises(InputError, match=r"eta: got 0\.5, want 0"):
            generated(pipe, 4, eta=0.5)


def test_a_pipeline_is_saved_and_loaded_with_it(unet, generated, tmp_path) -> None:
    pipe = diffusers.DDPMPipeline(unet, DEISScheduler(solver_order=3, use_karras_sigmas=True))
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DEISScheduler
    assert again.scheduler.config.solver_order == 3
    again.unet = unet  # what a network says depends on where its weights lie
    np.testing.assert_array_equal(generated(again, 4), generated(pipe, 4))


def test_it_drops_into_a_latent_pipeline_with_learned_variance(generated) -> None:
    """DiT: class labels, guidance, a network that answers with twice the channels."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        sample_size=4, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    pipe = diffusers.DiTPipeline(transformer, vae.eval(), diffusers.DDIMScheduler())
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    images = generated(pipe, 4, class_labels=[1, 2], guidance_scale=3.0)
    assert images.shape[0] == 2
    assert np.isfinite(images).all()
    x, out = noise(2, 3, 4, 4), noise(2, 6, 4, 4, seed=1)
    both = []
    for said in (out, out[:, :3]):
        scheduler = DEISScheduler(variance_type="learned_range")
        scheduler.set_timesteps(3)
        both.append(scheduler.step(said, 999, x).prev_sample)
    assert torch.equal(*both)


def test_it_drops_into_image_to_image(stable_diffusion, generated) -> None:
    """Stable Diffusion calls add_noise and set_begin_index, and passes eta and a generator."""
    base = diffusers.PNDMScheduler(steps_offset=1)
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", base)
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    words = noise(1, 4, 8)
    images = generated(
        pipe, 4, image=torch.rand(1, 3, 8, 8), strength=0.5, prompt_embeds=words,
        negative_prompt_embeds=0 * words,
    )  # fmt: skip
    assert np.isfinite(images).all()
    assert (pipe.scheduler.begin_index, pipe.scheduler.step_index) == (2, 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_drops_into_a_flow_pipeline(dynamic, generated) -> None:
    """Flux, whose scheduler's configuration becomes use_flow_sigmas and flow_prediction."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=1, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    euler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
    pipe = diffusers.FluxPipeline(euler, vae.eval(), None, None, None, None, transformer)
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    words = noise(1, 4, 32)
    images = generated(
        pipe, 4, prompt_embeds=words, pooled_prompt_embeds=words[:, 0], height=8, width=8
    )
    assert np.isfinite(images).all()
    assert float(pipe.scheduler.sigmas[0]) == pytest.approx(1.0)
    assert float(pipe.scheduler.sigmas[-1]) == 0.0


@pytest.mark.parametrize("name", [*DEISScheduler._compatibles, "DEISScheduler"])
def test_configurations_go_both_ways_and_through_a_file(name, tmp_path) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    there = DEISScheduler() if name == "DEISScheduler" else getattr(diffusers, name)()
    ours = DEISScheduler.from_config(there.config, solver_order=3)
    ours.save_pretrained(tmp_path)
    again = DEISScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    torch.testing.assert_close(run(again, 5, noise(1, 1, 2, 2)), run(ours, 5, noise(1, 1, 2, 2)))
    assert type(type(there).from_config(again.config)) is type(there)
    assert ours.config.use_flow_sigmas == name.startswith("FlowMatch")


def test_what_a_configuration_says_is_kept() -> None:
    there = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=3,
        timestep_spacing="trailing", prediction_type="v_prediction", final_sigmas_type="sigma_min",
    )  # fmt: skip
    ours = DEISScheduler.from_config(there.config)
    for scheduler in (ours, there):
        scheduler.set_timesteps(12)
    assert ours.config.solver_order == 3
    assert ours.config.prediction_type == "v_prediction"
    assert ours.timesteps.tolist() == there.timesteps.tolist()
    torch.testing.assert_close(ours.sigmas, there.sigmas, rtol=1e-5, atol=1e-6)
    sd3 = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert DEISScheduler.from_config(sd3.config).config.flow_shift == 3.0
    with pytest.raises(InputError, match="config: got one for EDM networks"):
        DEISScheduler.from_config(diffusers.EDMEulerScheduler().config)
