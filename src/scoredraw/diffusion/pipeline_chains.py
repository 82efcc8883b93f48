"""Pipelines of diffusers as Markov chains from noise to data, which trees of samples grow on.

    pipeline_chain    an unconditional UNet with its scheduler; states are images
    latent_chain      any pipeline that takes latents and returns them: text to image, guidance and
                      all; `latent_images` makes images of its states, for a reward to look at

A latent chain runs the pipeline itself. For an edge of the chain the pipeline gets a scheduler that
has the times of this edge only and otherwise is the pipeline's own, the states as `latents`, and is
asked for latents; with no times at all it decodes what it is given.

    chain = latent_chain(pipe, 50, prompt="a red bird", branch_at=paper_branches(50))
    tree = DiffusionTree(chain, lambda x: reward(latent_images(pipe, x)), generator=0).grow(500)
    images = latent_images(pipe, tree.sample(4))

Jain, Sareen, Pedramfar and Ravanbakhsh, "Diffusion tree sampling", NeurIPS 2025, arXiv 2506.20701.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scoredraw.diffusion.prompted_network import state_shape
from scoredraw.diffusion.time_grids import whole
from scoredraw.diffusion.tree_proposals import MarkovChain
from scoredraw.errors import require


def pipeline_chain(
    unet: Any,
    scheduler: Any,
    steps: int = 50,
    *,
    eta: float = 1.0,
    branch_at: Iterable[int] | None = None,
    device: Any = None,
) -> MarkovChain:
    """An unconditional UNet of diffusers under its `DDIMScheduler` (noise η) or `DDPMScheduler`.

    States are images (n, C, H, W) on `device` (by default where the UNet is). The scheduler is
    copied, so the pipeline keeps its own. Raises InputError for eta outside (0, 1] and a scheduler
    whose steps have no noise.
    """
    own, options = _noisy(scheduler, steps, eta)

    def predict(x: Any, i: int) -> Any:
        t = own.timesteps[i]
        return unet(own.scale_model_input(x, t), t).sample

    def step(x: Any, i: int, source: Any) -> Any:
        t = own.timesteps[i]
        with torch.no_grad():
            made = own.step(predict(x, i), t, x, generator=source, **options)
        return made.prev_sample

    where = unet.device if device is None else device
    dims = state_shape(unet)

    def prior(n: int, source: Any) -> Any:
        return _gaussian(n, dims, source).to(where) * own.init_noise_sigma

    return MarkovChain(prior, step, len(own.timesteps), branch_at, True)


def latent_chain(
    pipe: Any,
    steps: int = 50,
    *,
    dims: Sequence[int] | None = None,
    eta: float = 1.0,
    branch_at: Iterable[int] | None = None,
    **inputs: Any,
) -> MarkovChain:
    """A pipeline with a `DDIMScheduler` (noise η) or `DDPMScheduler`; inputs: what it is asked for.

    inputs: prompt, guidance_scale, ... of one image, as the pipeline's call takes them; give
    `prompt_embeds` to have the prompt encoded once rather than for each edge. It has to take
    `latents`, `num_images_per_prompt` and `output_type="latent"`, as Stable Diffusion, XL and
    PixArt do. States are latents (n, *dims), by default of the network's own size; those of
    scheduler and pipeline stay as they are. One call of the network a step, n states in a batch.

    Raises InputError for a pipeline without a network or these inputs, for eta outside (0, 1] and a
    scheduler whose steps have no noise.
    """
    own, options = _noisy(pipe.scheduler, steps, eta)
    takes = inspect.signature(pipe.__call__).parameters
    for name in ("latents", "num_images_per_prompt", "output_type"):
        require(name in takes, "pipe", f"{type(pipe).__name__} without {name}", "one that takes it")
    options = {name: value for name, value in options.items() if name in takes}
    shape = state_shape(_network(pipe)) if dims is None else tuple(dims)

    class Latents(MarkovChain):
        def run(self, x: Any, edge: int, generator: Any, n: int = 0) -> tuple[Any, Any]:
            x = self.prior(n, generator) if edge == 0 else x
            return moved(x, *self.edges[edge], generator), None

    def moved(x: Tensor, first: int, last: int, source: Any) -> Any:
        if first == last:
            return x
        with _between(pipe, own, first, last):
            return pipe(
                latents=x, num_images_per_prompt=len(x), num_inference_steps=steps,
                generator=source, output_type="latent", return_dict=False, **options, **inputs,
            )[0]  # fmt: skip

    def step(x: Any, i: int, source: Any) -> Any:
        return moved(x, i, i + 1, source)

    def prior(n: int, source: Any) -> Any:
        return _gaussian(n, shape, source).to(_network(pipe).device)

    return Latents(prior, step, len(own.timesteps), branch_at, True)


def latent_images(pipe: Any, latents: Tensor, batch: int = 8, **inputs: Any) -> Tensor:
    """(n, 3, H, W) the images in [0, 1] that a pipeline makes of latents, `batch` at a time.

    inputs: those without which the pipeline can't be called; by default an empty prompt. No call of
    the denoising network.
    """
    own, _ = _noisy(pipe.scheduler, 1, 1.0)
    asked = inputs or {"prompt": ""}
    with _between(pipe, own, 0, 0):
        made = [
            pipe(
                latents=x, num_images_per_prompt=len(x), num_inference_steps=1, output_type="pt",
                return_dict=False, **asked,
            )[0]
            for x in latents.split(batch)
        ]  # fmt: skip
    return torch.cat(made)


# ── parts ───────────────────────────────────────────────────────────────────────────────────────


class _Window:
    """A scheduler whose times are some of its own; the rest is the whole one's."""

    def __init__(self, scheduler: Any, first: int, last: int) -> None:
        self._all, self._some = scheduler, slice(first, last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._all, name)

    @property
    def timesteps(self) -> Tensor:
        """The times of the steps from `first` up to, not with, `last`."""
        times: Tensor = self._all.timesteps[self._some]
        return times


@contextmanager
def _between(pipe: Any, scheduler: Any, first: int, last: int) -> Iterator[None]:
    """In here the pipeline makes the steps from first to last only, and shows no bar for it."""
    own, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.scheduler = _Window(scheduler, first, last)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**bar)


def _noisy(scheduler: Any, steps: int, eta: float) -> tuple[Any, dict[str, float]]:
    """A copy of a scheduler, at so many steps, and what its steps take of eta."""
    require(0 < eta <= 1, "eta", eta, "in (0, 1]: without noise all children are equal")
    takes = inspect.signature(scheduler.step).parameters
    noisy = "eta" in takes or hasattr(scheduler, "_get_variance")
    came = type(scheduler).__name__
    require("generator" in takes and noisy, "scheduler", came, "a DDIMScheduler or DDPMScheduler")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(whole(steps, "steps", 1))
    return own, {"eta": eta} if "eta" in takes else {}


def _network(pipe: Any) -> Any:
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    wanted = "a pipeline with a unet or a transformer"
    require(network is not None, "pipe", type(pipe).__name__, wanted)
    return network


def _gaussian(n: int, dims: Sequence[int], source: Any) -> Tensor:
    return torch.randn(n, *dims, generator=source, device=source.device)
