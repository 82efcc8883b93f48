"""Solvers of the shipped image model and steps of the schedulers, against those of diffusers.

Errors are to the exact solution of the model's ODE from the same noises, root mean square over
pixels and noises: the best of ours as a share of the best of diffusers' DEIS, DPM-Solver++ and
UniPC with as many calls. What a scheduler's step costs is measured without a network. On a GPU
where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.contest import Contest, Limit
from scoredraw import registry
from scoredraw.diffusion import (
    GaussianScore,
    TeleportScheduler,
    TimeShiftScheduler,
    UnifiedScheduler,
    image_methods,
)
from scoredraw.diffusion.image_models import open_image_model

CALLS = (5, 10, 20)
OURS = ("deis", "usf", "teleport")
PEERS = ("diffusers-deis", "diffusers-dpm", "diffusers-unipc")
REFERENCE = 60  # third-order steps
FEW = 2  # noises, where nothing is measured
STEPS = 50
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def images(*, tiny: bool = False) -> Iterator[Limit]:
    """The best error of ours over the best of the peers, at 5, 10 and 20 calls."""
    noises = FEW if tiny else 64
    for calls in CALLS[:1] if tiny else CALLS:
        what = f"error on the shipped model, {calls} calls: best of {', '.join(OURS)} / of 3 peers"
        yield Limit(what, "", partial(_share, calls, noises), 1.0)


def _share(calls: int, noises: int) -> float:
    return _least(OURS, calls, noises) / _least(PEERS, calls, noises)


@cache
def _least(names: tuple[str, ...], calls: int, noises: int) -> float:
    x, exact = _solved(noises)
    found = []
    for name in names:
        sample = registry.resolve(registry.method("images", name).function)
        with torch.no_grad():
            found.append(float((sample(_model(), x, calls) - exact).square().mean().sqrt()))
    return min(found)


@cache
def _model() -> Any:
    return open_image_model()


@cache
def _solved(noises: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = _model().noise(noises)
    with torch.no_grad():
        return x, image_methods.exact(_model(), x, REFERENCE if noises > FEW else 6)


def schedulers(*, tiny: bool = False) -> Iterator[Contest]:
    """Fifty steps of each scheduler of ours and of the nearest one of diffusers."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    shape = (2, 3, 8, 8) if tiny else (64, 3, 32, 32)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(WHERE)
    flat = np.random.default_rng(0).normal(size=(40, noise[0][0].numel()))
    base = DPMSolverMultistepScheduler()
    pairs = (
        ("UniPC of order 2 by UnifiedScheduler", UnifiedScheduler(relaxation="bh2"),
         UniPCMultistepScheduler(solver_order=2)),
        ("DPM-Solver++ 2M by UnifiedScheduler", UnifiedScheduler(preset="dpm_solver++"), base),
        ("DPM-Solver++ 2M in TeleportScheduler, 10 steps skipped",
         TeleportScheduler(base, GaussianScore.fit(flat), skip_steps=10), base),
        ("DDIM in TimeShiftScheduler", TimeShiftScheduler.around(DDIMScheduler()),
         DDIMScheduler()),
    )  # fmt: skip
    for what, ours, peer in pairs:
        yield Contest(
            f"{STEPS} steps of {what}, {' x '.join(map(str, shape))}", f"diffusers {_name(peer)}",
            _steps(ours, noise), _steps(peer, noise), _finite, 1.0,
        )  # fmt: skip


def _steps(scheduler: Any, noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = noise[0] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(noise[1], t, scheduler.scale_model_input(x, t)).prev_sample
        return x

    return run


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


def _finite(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """They are other solvers, or the same from another start: both end somewhere."""
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all())
