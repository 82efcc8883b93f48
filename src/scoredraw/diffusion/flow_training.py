"""Training a TarFlow by maximum likelihood on images with a little noise.

    minimise over the weights   mean over pixels of  ½ z² + s    at   x + σ ε,   ε ~ N(0, I)

The noise fills the gaps between the grey levels, without which the likelihood has no upper bound;
what is learned is the density of noisy images. Gradients are cut to norm 1, the learning rate
warms up and falls to 0 along a cosine, and the weights that are kept are an average of the last
ones.

Zhai et al. 2025, "Normalizing flows are capable generative models", arXiv 2412.06329.
"""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor

from scoredraw.diffusion.tarflow import TarFlow, TarFlowShape
from scoredraw.errors import require

WARM_UP = 0.05  # of the steps
MOMENT = 0.1  # weight of the newest batch in the second moment of z
DECAY = 0.99  # of the average of weights
ONE_AT_A_TIME = Lock()  # new weights come from torch's own generator, which threads share


def train_tarflow(
    shape: TarFlowShape,
    images: Tensor,
    steps: int,
    *,
    noise_std: float = 0.2,
    batch: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    labels: Tensor | None = None,
    drop_labels: float = 0.1,
    seed: int = 0,
) -> TarFlow:
    """A TarFlow after `steps` steps of AdamW, on the images' device.

    images (n, channels, side, side), scaled to about [-1, 1]; noise_std in their units. labels
    int64 (n,), where the shape has classes: a share `drop_labels` of them is hidden, for guidance.
    Deterministic by seed, of which weights, batches and noise come (on one machine and number of
    threads). Raises `InputError` for steps or batch below 1, a noise that is negative, or labels
    without classes. Zhai et al. 2025, arXiv 2412.06329.

    >>> images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> shape = TarFlowShape(image_size=4, patch_size=2, channels=8, head_dim=4, layers=1)
    >>> before, after = (train_tarflow(shape, images, n, batch=32) for n in (1, 40))
    >>> bool(after.log_prob(images).mean() > before.log_prob(images).mean())
    True
    """
    require(steps >= 1, "steps", steps, "at least 1")
    require(batch >= 1 and len(images) > 0, "batch", batch, "at least 1, of at least one image")
    require(noise_std >= 0, "noise_std", noise_std, "0 or more")
    has = labels is not None
    require(has == bool(shape.classes), "labels", "labels" if has else "none",
            f"labels where there are classes, of which the shape has {shape.classes}")  # fmt: skip
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = TarFlow(shape)
    flow = flow.to(images.device)
    source = torch.Generator(images.device).manual_seed(seed)
    average = torch.optim.swa_utils.AveragedModel(
        flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )
    optimiser = torch.optim.AdamW(
        flow.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    warm = max(1, round(WARM_UP * steps))
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=source, device=images.device)
        noise = torch.randn(images[rows].shape, generator=source, device=images.device)
        given = None if labels is None else labels[rows]
        if given is not None:
            hidden = torch.rand(batch, generator=source, device=images.device) < drop_labels
            given = torch.where(hidden, -1, given)
        z, logdet = flow(images[rows] + noise_std * noise, given)
        loss = 0.5 * z.square().mean() - logdet.mean() / z[0].numel()
        optimiser.param_groups[0]["lr"] = learning_rate * min(
            (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimiser.step()
        flow.var.lerp_(z.detach().square().mean(dim=0), MOMENT)
        average.update_parameters(flow)
    trained: TarFlow = average.module
    trained.var.copy_(flow.var)
    return trained.requires_grad_(False).eval()
