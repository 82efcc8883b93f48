"""A small TarFlow of the 8x8 digits: how it was trained, the weights that ship, images from it.

Four blocks of two layers and 64 channels, 407 thousand weights, read the digits as 16 patches of
2 x 2 pixels in [-1, 1] with noise of 0.2. The file in `data/` has them in half precision;
`python -m scoredraw.papers.small_flow` makes it again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.flow_inversion import SegmentPlan
from scoredraw.diffusion.flow_training import train_tarflow
from scoredraw.diffusion.tarflow import FlowInverse, TarFlow, TarFlowShape, load_flow, save_flow
from scoredraw.errors import require
from scoredraw.papers.digit_diffusion import Distances, real_digits
from scoredraw.papers.training import one_thread

SHAPE = TarFlowShape(image_size=8, patch_size=2, channels=64, blocks=4, layers=2, head_dim=32)
NOISE_STD = 0.2
TRUNCATE = 2.0  # of the prior's noise: farther out a flow that saw 1078 digits may overflow
STEPS, SEED = 2000, 0  # of the weights that ship
FILE = "tarflow-digits.safetensors"
METHODS = {
    "sequential": SegmentPlan(segments=0),
    "jacobi": SegmentPlan(segments=1),
    "gs-jacobi": SegmentPlan(segments=2),
}


def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """1078 digits to train on and 719 held out, (n, 1, 8, 8), pixels in [-1, 1]."""
    train, held_out = (torch.from_numpy(part).reshape(-1, 1, 8, 8) for part in real_digits())
    return train, held_out


def train_small_flow(steps: int, seed: int) -> TarFlow:
    """A flow of the digits that it may train on; about 0.1 s of one core a step."""
    with one_thread():
        return train_tarflow(SHAPE, digit_images()[0], steps, noise_std=NOISE_STD, seed=seed)


def small_flow() -> TarFlow:
    """The trained flow that ships with the package, in float32.

    >>> flow = small_flow()
    >>> flow.sample(2, truncate=2.0, generator=torch.Generator().manual_seed(0)).images.shape
    torch.Size([2, 1, 8, 8])
    """
    with resources.as_file(resources.files("scoredraw").joinpath("data", FILE)) as path:
        return load_flow(path)


def quality(flow: TarFlow, seed: int = 0) -> dict[str, float]:
    """Log-densities of noisy digits in nats a pixel, and distances of its images to held-out ones.

    The images are denoised. Both kinds of distances have those of real digits beside them.
    """
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, images in zip(("train", "held out"), digit_images(), strict=True):
        noisy = images + NOISE_STD * torch.randn(images.shape, generator=source)
        with torch.no_grad():
            found[f"log p, {name}"] = float(flow.log_prob(noisy).mean()) / images[0].numel()
    distances = Distances(seed)
    real = digit_images()[0][:719].flatten(1).numpy()
    made = flow.sample(719, METHODS["jacobi"], truncate=TRUNCATE, generator=source).images
    clean = flow.denoise(made, NOISE_STD).flatten(1).numpy()
    for who, x in (("flow", clean), ("real digits", real)):
        for name, value in zip(distances.names, distances(x), strict=True):
            found[f"{name}, {who}"] = float(value)
    return found


def distances_by_way(
    flow: TarFlow,
    ways: Mapping[str, SegmentPlan | Sequence[SegmentPlan]],
    n: int,
    distances: Distances,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """The `distances` of n denoised images, and passes, of every way from the same noise."""
    z = flow.noise(n, truncate=TRUNCATE, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, way in ways.items():
        made = flow.inverse(z, way)
        images = flow.denoise(made.images.nan_to_num(), NOISE_STD).clamp(-1, 1)
        found[name] = np.append(distances(images.flatten(1).numpy()), made.passes)
    return found


def generate(
    n: int,
    flow: TarFlow | str | Path | None = None,
    method: str = "gs-jacobi",
    plans: SegmentPlan | Sequence[SegmentPlan] | None = None,
    *,
    truncate: float | None = TRUNCATE,
    noise_std: float | None = NOISE_STD,
    seed: int = 0,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """n images of a flow as (n, channels, side, side) in [-1, 1], and what they took.

    flow: one, or a file of `save_flow`; the digits' by default. method: "sequential", "jacobi" or
    "gs-jacobi" to a tolerance of 1e-6; plans: others instead (see `SegmentPlan`). noise_std: of the
    flow's training, by which images are denoised; None leaves them noisy. Images in which the flow
    overflows are left out and counted.

    >>> images, facts = generate(3, method="jacobi")
    >>> images.shape, facts["passes"] < facts["sequential_passes"] == 60
    ((3, 1, 8, 8), True)
    """
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    model = small_flow() if flow is None else flow if isinstance(flow, TarFlow) else load_flow(flow)
    source = torch.Generator().manual_seed(seed)
    plan = METHODS[method] if plans is None else plans
    made: FlowInverse = model.sample(n, plan, truncate=truncate, generator=source)
    sound = torch.isfinite(made.images).flatten(1).all(dim=1)
    images = made.images[sound]
    if noise_std is not None and len(images):
        images = model.denoise(images, noise_std)
    facts = {
        "method": method if plans is None else "planned",
        "images": len(images),
        "overflowed": int((~sound).sum()),
        "passes": made.passes,
        "sequential_passes": len(model.blocks) * (model.var.shape[0] - 1),
        "block_passes": [block.passes for block in made.blocks],
        "fallbacks": sum(len(block.fallbacks) for block in made.blocks),
        "converged": all(block.converged for block in made.blocks),
    }
    return images.clamp(-1, 1).numpy(), facts


def main() -> None:
    """Train the flow that ships, write it, and say how good it is."""
    flow = train_small_flow(STEPS, SEED)
    path = Path(str(resources.files("scoredraw").joinpath("data", FILE)))
    save_flow(flow, path, torch.float16)
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.2f} MB\n")
    for name, value in quality(load_flow(path)).items():
        sys.stdout.write(f"{name}: {value:.4f}\n")


if __name__ == "__main__":
    main()
