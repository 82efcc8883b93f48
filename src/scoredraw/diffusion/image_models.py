"""Image models as a sampler wants them: eps(x, t), the schedule it was trained on, its noise.

Any pipeline that diffusers saved with an unconditional UNet and a scheduler of discrete times loads
from its folder, and Stable Diffusion with a prompt; "embedded" is the one that ships, trained on
the embedded Fashion-MNIST (`papers.fashion_diffusion`). With it ships a small classifier of the
same images, whose activations are a space to measure Fréchet distances in, and whose
log-probabilities are rewards to steer by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.parameterisations import to_eps
from scoredraw.diffusion.prompted_network import (
    GUIDANCE,
    TOGETHER,
    PromptedNetwork,
    state_shape,
)
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.errors import InputError, import_extra, require

EMBEDDED = "embedded"
FOLDER = Path(__file__).parents[1] / "data" / "fashion-unet"
BATCH = 256  # images that a call takes at a time
KINDS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, eq=False)
class ImageModel:
    """A trained network and what it needs to be sampled.

    unet: a `UNet2DModel`, in evaluation mode, or a `PromptedNetwork`. schedule: its discrete times.
    kind: what it predicts. shape: of a state, (channels, height, width). path: the folder that
    diffusers loads a pipeline from.
    """

    name: str
    path: Path
    unet: Any
    schedule: DiscreteAlphas
    kind: str
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Of the network; states may be on another."""
        weights = next(self.unet.parameters(), None)
        return torch.device("cpu") if weights is None else weights.device

    def eps(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The noise in x (B, *shape) at time t, a number from 0 to T - 1, or one each (B,)."""
        times = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        size = TOGETHER if isinstance(self.unet, PromptedNetwork) else BATCH
        parts = zip(*(each.to(self.device).split(size) for each in (x, times)), strict=True)
        said = torch.cat([self.unet(*part).sample for part in parts]) if len(x) else x
        predicted = said.to(x.device)
        if self.kind == "epsilon":
            return predicted
        shaped = (-1, 1, 1, 1)
        alpha = torch.as_tensor(self.schedule.alpha(times.numpy()), dtype=x.dtype).view(shaped)
        sigma = torch.as_tensor(self.schedule.sigma(times.numpy()), dtype=x.dtype).view(shaped)
        return torch.as_tensor(to_eps(predicted, x, alpha, sigma, self.kind))

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """What states show: themselves, or what is decoded from latents; in about [-1, 1]."""
        if not isinstance(self.unet, PromptedNetwork):
            return x
        return self.unet.decode(x.to(self.device)).to(x.device)

    def noise(self, n: int, seed: int = 0, first: int = 0) -> torch.Tensor:
        """x_T of images first .. first + n - 1: each from its own (seed, number), (n, *shape)."""
        each = [np.random.default_rng([seed, i]) for i in range(first, first + n)]
        drawn = [rng.standard_normal(self.shape, np.float32) for rng in each]
        return torch.from_numpy(np.stack(drawn)) if n else torch.empty(0, *self.shape)


def open_image_model(
    source: str | Path = EMBEDDED, prompt: str | None = None, *, negative: str | None = None,
    guidance: float | None = None,
) -> ImageModel:  # fmt: skip
    """The model in a folder saved by `save_pretrained` of a diffusers pipeline, or "embedded".

    prompt, negative, guidance (by default 7.5): of Stable Diffusion, see `PromptedNetwork`. The
    network is on a CUDA device where torch has one; states stay where the sampler has them.

    Raises InputError for a folder without an unconditional UNet (`UNet2DModel`) or one that takes a
    prompt, or with a scheduler that has no alphas_cumprod, for a prompt that is missing, for these
    three where nothing takes them, and MissingExtraError where diffusers is not installed.

    >>> model = open_image_model()
    >>> model.shape, model.schedule.ends.t_start
    ((1, 28, 28), 999.0)
    """
    diffusers, transformers = (
        import_extra(name, "diffusion") for name in ("diffusers", "transformers")
    )
    path = FOLDER if str(source) == EMBEDDED else Path(source)
    wanted = "'embedded' or a folder that a diffusers pipeline was saved to"
    require((path / "model_index.json").is_file(), "model", repr(str(source)), wanted)
    for package in (diffusers, transformers):
        package.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"model: got {source}: {error}, want {wanted}") from None
    unet, scheduler = getattr(pipeline, "unet", None), pipeline.scheduler
    came = f"a {type(pipeline).__name__}"
    if isinstance(unet, diffusers.UNet2DConditionModel):
        require(prompt is not None, "prompt", f"none for {came}", "a text")
        strength = GUIDANCE if guidance is None else guidance
        network: Any = PromptedNetwork(pipeline, str(prompt), negative, strength)
    else:
        plain = isinstance(unet, diffusers.UNet2DModel) and unet.class_embedding is None
        require(plain, "model", came, "one of an unconditional UNet2DModel, or Stable Diffusion")
        for name, value in (("prompt", prompt), ("negative", negative), ("guidance", guidance)):
            require(value is None, name, f"one for {came}", "none: its network takes no text")
        assert unet is not None
        network = unet.float().eval().requires_grad_(False)
    alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.prediction_type
    came = f"a {type(scheduler).__name__} of {kind!r}"
    require(alphas is not None and kind in KINDS, "model", came, "alphas_cumprod, and one of "
            + ", ".join(KINDS))  # fmt: skip
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    schedule, shape = DiscreteAlphas(alphas), state_shape(unet)
    return ImageModel(str(source), path, network, schedule, str(kind), shape)


def classifier_network() -> torch.nn.Sequential:
    """The classifier of 28 x 28 images before training: 64 activations, then 10 logits."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.SiLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.SiLU(),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.SiLU(), nn.Linear(64, 10),
    )  # fmt: skip


@cache
def fashion_classifier() -> torch.nn.Sequential:
    """The shipped classifier: images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10); gradients pass.

    >>> fashion_classifier()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    from safetensors.torch import load_file

    net = classifier_network()
    weights = load_file(FOLDER / "classifier.safetensors")
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.eval().requires_grad_(False)


def fashion_features(images: Any) -> NDArray[np.float64]:
    """The 64 activations of the shipped classifier, (n, 64), where Fréchet distances are taken."""
    body, x = fashion_classifier()[:-1], torch.as_tensor(images, dtype=torch.float32)
    return np.concatenate([body(part).numpy() for part in x.split(BATCH)]).astype(np.float64)


def pictures(images: Any) -> NDArray[np.uint8]:
    """Images (n, C, H, W) in [-1, 1] as bytes (n, H, W, C), clipped."""
    x = torch.as_tensor(images).detach().float().cpu()
    scaled = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()
