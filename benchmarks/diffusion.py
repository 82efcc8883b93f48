"""The DEIS scheduler against those of diffusers: what a step costs, and how far off it ends.

The second question has an exact answer where the data are a Gaussian mixture: its eps stands in
for the network, so that all of the distance to the exact solution of the ODE is the solver's. Each
scheduler makes the same number of calls on the same levels, diffusers' "linspace" timesteps of the
DDPM betas, and ends at the level of timestep 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.contest import Contest, Limit
from scoredraw.diffusion import DEISScheduler, DEISSolver, DiscreteAlphas, GaussianMixtureScore

CALLS = (5, 10, 20, 50)
MIXTURES = ("2-d mixture", "mixture of digits")


def scheduler(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Time of a step and of the weights, and errors at 5, 10, 20 and 50 calls."""
    yield _steps((2, 3, 8, 8) if tiny else (64, 3, 32, 32))
    yield _weights(50 if tiny else 1000)
    for mixture in MIXTURES[:1] if tiny else MIXTURES:
        for calls in CALLS[:1] if tiny else CALLS:
            yield _error(mixture, calls, 32 if tiny else 256)


# ------------------------------------------------------------------ time


def _steps(shape: tuple[int, ...]) -> Contest:
    """The same method on both sides: three values of eps, extrapolated in log sigma/alpha."""
    from diffusers import DEISMultistepScheduler

    ours = DEISScheduler(
        solver_order=3, deis_variant="logrhoab", lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    peer = DEISMultistepScheduler(solver_order=3)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def fifty(scheduler: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            scheduler.set_timesteps(50)
            x = noise[0]
            for t in scheduler.timesteps:
                x = scheduler.step(noise[1], t, x).prev_sample
            return x

        return run

    def same(a: torch.Tensor, b: torch.Tensor) -> None:
        assert float((a - b).norm() / b.norm()) < 1e-3  # theirs are weights of float32

    what = f"50 steps of DEIS with 3 values, {' x '.join(map(str, shape))} float32"
    return Contest(what, "diffusers DEISMultistep", fifty(ours), fifty(peer), same, 1.0)


def _weights(steps: int) -> Limit:
    """Seconds that choosing the levels and computing the weights takes, once a sampling run."""
    import time

    def measure() -> float:
        scheduler = DEISScheduler()
        start = time.perf_counter()
        scheduler.set_timesteps(steps)
        return time.perf_counter() - start

    return Limit(f"set_timesteps({steps:,}) of the DEIS scheduler", "s", measure, 0.2)


# ------------------------------------------------------------------ error


def _error(mixture: str, calls: int, noises: int) -> Limit:
    """RMSE to the exact ODE, as a share of the least that a scheduler of diffusers reaches."""
    what = f"DEIS RMSE to the exact ODE, {mixture}, {calls} calls / best of {len(_peers())} peers"

    def measure() -> float:
        ours = _rmse(mixture, calls, noises, DEISScheduler(final_sigmas_type="sigma_min"))
        return ours / min(_rmse(mixture, calls, noises, peer) for peer in _peers().values())

    return Limit(what, "", measure, 1.0)


def _peers() -> dict[str, Any]:
    """One of each; DEIS with one value of eps is DDIM, on these levels."""
    from diffusers import (
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    )

    end = {"final_sigmas_type": "sigma_min"}
    return {
        "DDIM": DEISMultistepScheduler(solver_order=1),
        **{f"DEIS {k}": DEISMultistepScheduler(solver_order=k) for k in (2, 3)},
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler(solver_order=2, **end),
        **{f"UniPC {k}": UniPCMultistepScheduler(solver_order=k, **end) for k in (2, 3)},
    }


def _rmse(mixture: str, calls: int, noises: int, scheduler: Any) -> float:
    """Root mean square, over noises and coordinates, of the distance to the exact end point."""
    network = _network(mixture)
    x, exact = _solved(mixture, noises)
    scheduler.set_timesteps(calls)
    for t in scheduler.timesteps:
        x = scheduler.step(network.eps(x, float(t)), t, x).prev_sample
    return float(torch.sqrt(torch.mean((x - exact) ** 2)))


@cache
def _network(mixture: str) -> GaussianMixtureScore:
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    if mixture == MIXTURES[0]:
        return GaussianMixtureScore(
            [0.3, 0.7], [[1.0, -1.0], [-1.5, 0.5]],
            [[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0.0], [0.0, 0.05]]], schedule,
        )  # fmt: skip
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    fit = GaussianMixture(10, covariance_type="full", reg_covar=1e-3, random_state=0)
    return GaussianMixtureScore.from_sklearn(fit.fit(load_digits().data / 8 - 1), schedule)


@cache
def _solved(mixture: str, noises: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noises, and where the ODE leads from them: 300 Runge-Kutta steps of order 4."""
    network = _network(mixture)
    noise = np.random.default_rng(0).standard_normal((noises, network.dimension))
    x = torch.from_numpy(noise)
    solver = DEISSolver(network.schedule, 300, variant="rhork", tableau="4rk", grid="log")
    return x, solver.sample(network.eps, x)
