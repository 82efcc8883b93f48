"""Chains of real pipelines of diffusers: their own images, and trees over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError

torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")

from scoredraw.diffusion.pipeline_chains import (  # noqa: E402
    latent_chain,
    latent_images,
    pipeline_chain,
)
from scoredraw.diffusion.tree_sampling import DiffusionTree  # noqa: E402

pytestmark = pytest.mark.contract
STEPS = 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_a_unet_makes_the_images_of_its_pipeline(unet, name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(clip_sample=False, steps_offset=1)
    pipe = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"eta": 1.0} if name == "DDIM" else {}
    images = pipe(
        batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=4,
        output_type="np", **options,
    ).images  # fmt: skip
    chain = pipeline_chain(unet, scheduler, 4, branch_at=())
    x = chain.run(None, 0, chain.source(7), n=2)[0]
    made = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made, images, atol=1e-5)
    if name == "DDIM":
        with pytest.raises(InputError, match=r"eta: got 0\.0"):
            pipeline_chain(unet, scheduler, 4, eta=0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tree_over_a_unet(unet) -> None:
    chain = pipeline_chain(unet, diffusers.DDIMScheduler(), 4, branch_at=(4, 2))
    tree = DiffusionTree(
        chain, lambda x: x.mean((1, 2, 3)), C=1.0, alpha=0.7, lam=20.0, batch_size=4, generator=0,
        offload=True,
    )  # fmt: skip
    tree.grow(nfe=80)
    assert tree.sample(3).shape == (3, 1, 8, 8)
    assert tree.nfe <= 80
    means = tree.sample(50).mean((1, 2, 3))
    assert float(means.mean()) > float(tree.states.at(tree.leaves).mean())
    with pytest.raises(InputError, match="scheduler: got"):
        pipeline_chain(unet, diffusers.EulerDiscreteScheduler(), 4)


# ── pipelines of latents ────────────────────────────────────────────────────────────────────────


def quiet_ddim() -> Any:
    """As Stable Diffusion wants it."""
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)


def autoencoder(channels: int) -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(4,) * 4, norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def asked() -> dict[str, Any]:
    words, nothing = gaussians(2, 1, 5, 8)
    return {
        "prompt_embeds": words, "negative_prompt_embeds": nothing, "guidance_scale": 4.0,
    }  # fmt: skip


def gaussians(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def xl(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )  # fmt: skip
    parts = (autoencoder(2), None, None, None, None, unet.eval(), scheduler)
    pipe = diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    words, nothing = gaussians(2, 1, 8)
    more = {"pooled_prompt_embeds": words, "negative_pooled_prompt_embeds": nothing}
    return pipe, asked() | more


def pixart(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1,
        cross_attention_dim=8, sample_size=4, patch_size=2, caption_channels=8, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(None, None, autoencoder(2), network.eval(), scheduler)
    seen = torch.ones(1, 5)
    return pipe, asked() | {
        "prompt_attention_mask": seen, "negative_prompt_attention_mask": seen,
        "negative_prompt": None, "use_resolution_binning": False,
    }  # fmt: skip


@pytest.mark.parametrize("make", [xl, pixart])
def test_other_pipelines(make: Any) -> None:
    pipe, inputs = make(quiet_ddim())
    first = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    whole = pipe(
        latents=first, num_images_per_prompt=2, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(8), eta=1.0, **inputs,
    ).images  # fmt: skip
    chain = latent_chain(pipe, STEPS, branch_at=(4, 1), **inputs)
    source = chain.source(8)
    x = chain.run(first, 1, source)[0]
    assert torch.equal(chain.run(x, 2, source)[0], whole)
    assert latent_images(pipe, x, **inputs).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
@pytest.mark.parametrize("branch_at", [(), (4, 1), (3, 2, 1)])
def test_edge_by_edge_a_pipeline_makes_its_own_latents(
    stable_diffusion, name: str, branch_at
) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(clip_sample=False, steps_offset=1)
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    first = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    pipe.set_progress_bar_config(leave=False)
    whole = pipe(
        latents=first, num_images_per_prompt=3, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(8), **{"eta": 1.0} if name == "DDIM" else {},
        **asked(),
    ).images  # fmt: skip
    chain = latent_chain(pipe, STEPS, branch_at=branch_at, **asked())
    x, source = chain.prior(3, chain.source(7)), chain.source(8)
    assert torch.equal(x, first)
    for edge in range(len(chain.edges)):
        x = chain.run(x, edge, source)[0] if edge else chain_from(chain, x, source)
    assert torch.equal(x, whole)
    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config == {"leave": False}


def chain_from(chain: Any, x: Any, source: Any) -> Any:
    """Along the first edge, from given states."""
    for i in range(*chain.edges[0]):
        x = chain.step(x, i, source)
    return x


def test_images_of_latents_are_those_of_the_pipeline(stable_diffusion) -> None:
    pipe = stable_diffusion("StableDiffusionPipeline", quiet_ddim())
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    made = latent_images(pipe, x, batch=2, **asked())
    hook.remove()
    with torch.no_grad():
        said = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert not calls
    torch.testing.assert_close(made, (said / 2 + 0.5).clamp(0, 1))


def test_a_tree_over_a_text_to_image_pipeline(stable_diffusion) -> None:
    pipe = stable_diffusion("StableDiffusionPipeline", quiet_ddim())
    chain = latent_chain(pipe, STEPS, branch_at=(4, 2), **asked())

    def reward(x: Any) -> Any:
        return latent_images(pipe, x, **asked()).mean((1, 2, 3))

    tree = DiffusionTree(chain, reward, C=1.0, alpha=0.7, lam=500.0, batch_size=4, generator=0)
    tree.grow(nfe=80)
    assert tree.nfe <= 80
    every = reward(tree.states.at(tree.leaves)).mean()
    assert float(reward(tree.sample(30)).mean()) > float(every)


def test_what_is_refused_leaves_the_pipeline_as_it_was(stable_diffusion) -> None:
    pipe = stable_diffusion("StableDiffusionPipeline", quiet_ddim())
    scheduler = pipe.scheduler
    with pytest.raises(InputError, match=r"eta: got 0\.0"):
        latent_chain(pipe, STEPS, eta=0.0, **asked())
    with pytest.raises(InputError, match="pipe: got DDIMPipeline without latents"):
        latent_chain(diffusers.DDIMPipeline(pipe.unet, scheduler), STEPS)
    chain = latent_chain(pipe, STEPS, branch_at=(), **{**asked(), "guidance_scale": "much"})
    with pytest.raises(TypeError):
        chain.run(None, 0, chain.source(0), n=1)
    assert pipe.scheduler is scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(InputError, match="scheduler: got EulerDiscreteScheduler"):
        latent_chain(pipe, STEPS, **asked())
