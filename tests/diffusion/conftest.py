"""Every kind of schedule, for the tests that hold for all of them; tiny pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.schedules import (
    Cosine,
    DiscreteAlphas,
    LinearBeta,
    LinearFlow,
    NoiseSchedule,
    OrnsteinUhlenbeck,
    SubVariancePreserving,
    VarianceExploding,
)

SCHEDULES: list[NoiseSchedule] = [
    LinearBeta(),
    SubVariancePreserving(),
    Cosine(),
    OrnsteinUhlenbeck(),
    DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000)),
    VarianceExploding(),
    VarianceExploding(0.01, 50.0, time="geometric"),
    LinearFlow(),
]


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return request.param


@pytest.fixture
def quiet() -> None:
    """No advice from diffusers."""
    pytest.importorskip("diffusers").logging.set_verbosity_error()


@pytest.fixture
def unet() -> Any:
    """An untrained network of 8x8 pixels, always the same."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip


@pytest.fixture
def stable_diffusion() -> Any:
    """A function (pipeline's name, scheduler) -> Stable Diffusion of 8x8 latents, without text."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")

    def make(name: str, scheduler: Any) -> Any:
        torch.manual_seed(0)
        network = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=8, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, layers_per_block=1
        ).eval()
        return getattr(diffusers, name)(
            vae, None, None, network, scheduler, None, None, requires_safety_checker=False
        )

    return make


@pytest.fixture
def generated() -> Any:
    """A function (pipeline, steps, its other arguments) -> images, from one seed."""
    torch = pytest.importorskip("torch")

    def make(pipe: Any, steps: int, **arguments: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        start = torch.Generator().manual_seed(7)
        return pipe(
            generator=start, num_inference_steps=steps, output_type="np", **arguments
        ).images

    return make
