"""The embedded image model: a small diffusers UNet trained on the embedded Fashion-MNIST.

It predicts the noise in  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  for the thousand times of
DDPM's linear betas (Ho, Jain and Abbeel 2020, arXiv 2006.11239), from the 10,000 training images
scaled to [-1, 1], by the plain loss |eps - net(x_t, t)|². What ships is the moving average of the
weights in float16, as a directory that diffusers loads:

    python -m scoredraw.papers.fashion_diffusion DIRECTORY

trains it again (minutes on a GPU, hours on one core; half done, it goes on from its
checkpoint), and with it the small classifier that measures and steers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scoredraw import datasets, registry
from scoredraw.diffusion.image_models import classifier_network, open_image_model, pictures
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.journal import atomic_path
from scoredraw.papers.training import one_thread, rate

STEPS, BATCH, LEARNING_RATE, MEMORY = 7000, 256, 2e-3, 0.9995
TIMES, FIRST_BETA, LAST_BETA = 1000, 1e-4, 0.02
EVERY = 500  # steps between checkpoints
CLASSIFIER_BATCH = 128


def network() -> Any:
    """The UNet, not trained: 28 x 28, three levels, attention at 7 x 7; 1.1 million weights."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        add_attention=False,
    )


def images(part: str = "train") -> torch.Tensor:
    """The 10,000 training or 2,000 test images, (n, 1, 28, 28) in [-1, 1]."""
    data = datasets.load("fashion-mnist")
    rows = np.asarray(data.x)[data.splits[part]].reshape(-1, 1, 28, 28)
    return torch.from_numpy(rows.astype(np.float32) / 127.5 - 1)


def train(directory: Path, steps: int = STEPS, seed: int = 0, device: str = "cpu") -> Path:
    """Train the model and save it as a DDPM pipeline of diffusers; -> the directory.

    Every step draws from its own (seed, step), so a run that goes on from `checkpoint.pt` in the
    directory ends where an uninterrupted one does.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    torch.manual_seed(seed)
    net = network().to(device, memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-4)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, first = directory / "checkpoint.pt", 0
    if checkpoint.is_file():
        first, parts = torch.load(checkpoint, weights_only=True, map_location=device)
        net.load_state_dict(parts["net"])
        optimizer.load_state_dict(parts["optimizer"])
        average = parts["average"]
    x = images().to(device)
    signal, random = signals().to(device), torch.Generator(device)
    with one_thread():
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(LEARNING_RATE, step, steps)
            loss = train_step(net, optimizer, x, signal, random.manual_seed(seed << 32 | step))
            memory = min(MEMORY, (step + 1) / (step + 10))
            torch._foreach_lerp_([*average.values()], [*net.state_dict().values()], 1 - memory)
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                with atomic_path(checkpoint) as path:
                    torch.save((step + 1, {**parts, "average": average}), path)
                print(f"{step + 1} of {steps} steps, loss {loss:.4f}", file=sys.stderr, flush=True)
    net.load_state_dict(average)
    scheduler = DDPMScheduler(TIMES, FIRST_BETA, LAST_BETA, "linear")
    DDPMPipeline(net.to("cpu").half(), scheduler).save_pretrained(
        directory, safe_serialization=True
    )
    checkpoint.unlink()
    return directory


def signals() -> torch.Tensor:
    """sqrt(abar_t) of the thousand times, (TIMES,)."""
    schedule = DiscreteAlphas.from_betas(np.linspace(FIRST_BETA, LAST_BETA, TIMES))
    return torch.from_numpy(schedule.alpha(np.arange(TIMES))).float()


def train_step(
    net: Any, optimizer: Any, x: torch.Tensor, signal: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """One step on a batch with times spread evenly; -> the loss."""
    device = x.device
    x0 = x[torch.randint(len(x), (BATCH,), generator=random, device=device)]
    noise = torch.randn(x0.shape, generator=random, device=device)
    even = torch.arange(BATCH, device=device) + torch.rand((), generator=random, device=device)
    t = (even / BATCH * TIMES).long()
    loss = noise_loss(net, x0, t, noise, signal)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    return loss.detach()


def noise_loss(
    net: Any, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor
) -> torch.Tensor:
    """mean |noise - net(x_t, t)|², the network in bfloat16; signal: sqrt(abar) of every time."""
    share = signal[t][:, None, None, None]
    x_t = share * x0 + (1 - share**2).sqrt() * noise
    with torch.autocast(x0.device.type, torch.bfloat16):
        predicted = net(x_t.to(memory_format=torch.channels_last), t).sample
    return (predicted.float() - noise).square().mean()


def train_classifier(directory: Path, epochs: int = 15, seed: int = 0) -> float:
    """Train the classifier, save it beside the model; -> its accuracy on the test images."""
    from safetensors.torch import save_file

    data = datasets.load("fashion-mnist")
    y, test = torch.from_numpy(data.y.copy()), data.splits["test"]
    train_x, train_y = images(), y[data.splits["train"].copy()]
    torch.manual_seed(seed)
    net = classifier_network()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-2)
    random, whole = np.random.default_rng(seed), len(train_x) // CLASSIFIER_BATCH * CLASSIFIER_BATCH
    rows = np.concatenate([random.permutation(len(train_x))[:whole] for _ in range(epochs)])
    batches = torch.from_numpy(rows).split(CLASSIFIER_BATCH)
    with one_thread():
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate(LEARNING_RATE, step, len(batches))
            loss = torch.nn.functional.cross_entropy(net(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_file(net.half().state_dict(), directory / "classifier.safetensors")
    with torch.no_grad():
        right = net.float()(images("test")).argmax(dim=1) == y[test.copy()]
    return float(right.float().mean())


def draw_samplers(
    path: Path, methods: Sequence[str], steps: Sequence[int] = (5, 10, 50), count: int = 8
) -> None:
    """A picture of what solvers make of the same noises: a row a solver, a column a budget."""
    from matplotlib.figure import Figure

    model = open_image_model()
    x = model.noise(count)
    figure = Figure(figsize=(3.2 * len(steps), 0.42 * len(methods) + 0.3), layout="constrained")
    axes = figure.subplots(len(methods), len(steps), squeeze=False)
    for row, name in zip(axes, methods, strict=True):
        sample = registry.resolve(registry.method("images", name).function)
        for place, calls in zip(row, steps, strict=True):
            with torch.no_grad():
                shown = pictures(sample(model, x, calls))[..., 0]
            place.imshow(np.hstack(list(shown)), cmap="gray", vmin=0, vmax=255)
            place.set_xticks([])
            place.set_yticks([])
            if name == methods[0]:
                place.set_title(f"{calls} network calls", fontsize=8)
        row[0].set_ylabel(name.removeprefix("diffusers-"), fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    train_classifier(train(Path(sys.argv[1]), device=where))
