"""Text to image as a network of images alone: a latent diffusion UNet under one prompt.

With guidance the network is asked twice, for the prompt and for what is not wanted:

    m  =  m(x, negative) + g (m(x, prompt) - m(x, negative))

The states are latents; the pipeline's autoencoder makes images of them. With g above 1 no diffusion
has m for its own: what weights make of such a model (annealed, product, tilted) is a law only as
near as m is to a score.

Ho and Salimans, "Classifier-free diffusion guidance", 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scoredraw.errors import import_extra, require

TOGETHER = 4  # latents that the networks take at a time: XL's have a gigabyte each at work
GUIDANCE = 7.5


def state_shape(network: Any) -> tuple[int, ...]:
    """(channels, height, width) of what a UNet or transformer of diffusers denoises."""
    size = network.config.sample_size
    return (int(network.config.in_channels), *((size, size) if isinstance(size, int) else size))


class PromptedNetwork(torch.nn.Module):
    """The UNet of a Stable Diffusion pipeline (1, 2 or XL) under a prompt: (x, t) -> `.sample`.

    negative: what is not wanted; guidance: g above, and none where it is 1 or less: then a call is
    one pass. The prompt is encoded once, the text encoders are not kept. Raises InputError for
    other pipelines and a guidance that is no number.
    """

    states: Tensor

    def __init__(
        self, pipeline: Any, prompt: str, negative: str | None = None, guidance: float = GUIDANCE
    ) -> None:
        super().__init__()
        require(math.isfinite(guidance), "guidance", guidance, "a finite number")
        diffusers = import_extra("diffusers", "diffusion")
        kinds = (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
        wanted = "a StableDiffusionPipeline or StableDiffusionXLPipeline"
        require(isinstance(pipeline, kinds), "model", f"a {type(pipeline).__name__}", wanted)
        plain = pipeline.unet.config.time_cond_proj_dim is None
        require(plain, "model", "a UNet that takes guidance as an input", wanted)
        self.unet, self.vae = (
            part.float().eval().requires_grad_(False) for part in (pipeline.unet, pipeline.vae)
        )
        self.guidance, guided = guidance, guidance > 1
        with torch.no_grad():
            yes, no, *pooled = pipeline.encode_prompt(
                prompt=prompt, device="cpu", num_images_per_prompt=1,
                do_classifier_free_guidance=guided, negative_prompt=negative,
            )  # fmt: skip
        added: dict[str, Tensor] = {}
        if pooled:  # XL: a vector of the whole text, and the size and crop of the image
            sides = [side * pipeline.vae_scale_factor for side in state_shape(pipeline.unet)[1:]]
            size = torch.tensor([[*sides, 0, 0, *sides]], dtype=torch.float32)
            whole, unwanted = pooled
            both = torch.cat([unwanted, whole]) if guided else whole
            added = {"text_embeds": both, "time_ids": size.expand(len(both), 6)}
        self.added = tuple(added)
        for name, value in {"states": torch.cat([no, yes]) if guided else yes, **added}.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        """What the network predicts of latents x (B, C, H, W) at times t (B,)."""
        n, asked = len(x), len(self.states)
        added = {name: getattr(self, name).repeat_interleave(n, 0) for name in self.added}
        found = self.unet(
            x.repeat(asked, 1, 1, 1), t.repeat(asked), self.states.repeat_interleave(n, 0),
            added_cond_kwargs=added or None,
        ).sample  # fmt: skip
        if asked == 1:
            return SimpleNamespace(sample=found)
        no, yes = found.chunk(2)
        return SimpleNamespace(sample=no + self.guidance * (yes - no))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H', W') in about [-1, 1] of latents."""
        scale = self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(x / scale).sample for x in latents.split(TOGETHER)])
