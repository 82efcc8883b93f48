"""Text to image as a network of images alone: a latent diffusion UNet under one prompt.

With guidance the network is asked twice, for the prompt and for what is not wanted:

    m  =  m(x, negative) + g (m(x, prompt) - m(x, negative))

The states are latents; the pipeline's autoencoder makes images of them.

Ho and Salimans, "Classifier-free diffusion guidance", 2022, arXiv 2207.12598.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scoredraw.errors import import_extra, require

DECODED = 8  # latents that the autoencoder takes at a time


class PromptedNetwork(torch.nn.Module):
    """The UNet of a Stable Diffusion pipeline (1, 2 or XL) under a prompt: (x, t) -> `.sample`.

    negative: what is not wanted; guidance: g above, and none where it is 1 or less: one pass. The
    prompt is encoded once, the text encoders are not kept. Raises InputError for other pipelines.
    """

    def __init__(self, pipeline: Any, prompt: str, negative: str, guidance: float) -> None:
        super().__init__()
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
                do_classifier_free_guidance=guided, negative_prompt=negative or None,
            )  # fmt: skip
        self.states = torch.cat([no, yes]) if guided else yes
        self.added: dict[str, Tensor] = {}
        if pooled:  # XL: a vector of the whole text, and the size and crop of the image
            side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
            size = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
            whole, unwanted = pooled
            both = torch.cat([unwanted, whole]) if guided else whole
            self.added = {"text_embeds": both, "time_ids": size.expand(len(both), 6)}

    def forward(self, x: Tensor, t: Tensor) -> Any:
        """What the network predicts of latents x (B, C, H, W) at times t (B,)."""
        n, asked = len(x), len(self.states)
        added = {name: each.repeat_interleave(n, 0) for name, each in self.added.items()}
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
        return torch.cat([self.vae.decode(x / scale).sample for x in latents.split(DECODED)])
