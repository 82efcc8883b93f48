"""Thirteen Lennard-Jones particles: samples at three temperatures, their energy, a learned score.

    U(x) = Σ_{i≠j} (r_ij^-12 - 2 r_ij^-6) + 1/2 Σ_i |x_i - mean x|²

over ordered pairs, and samples follow exp(-U/T) with the centre of mass at rest: 36 degrees of
freedom of 39, and <x · ∇U> = 36 T at any T. The network moves particles along their distances, so
that turning, shifting or renumbering them does the same to its answer (Satorras, Hoogeboom and
Welling 2021, arXiv 2102.09844), in the scaling of Karras et al. 2022, arXiv 2206.00364.

Samples: the released data of Skreta et al. 2025, arXiv 2503.02819 (MIT), thinned, in steps of 2e-4.
"""

from __future__ import annotations

import io
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import wasserstein_distance

from scoredraw.diffusion.feynman_kac import Target
from scoredraw.diffusion.schedules import VarianceExploding
from scoredraw.diffusion.weighted_sampling import WeightedSampler
from scoredraw.papers.training import one_thread, rate

Float = NDArray[np.float64]

PARTICLES, DIMENSIONS, FREE = 13, 39, 36
TEMPERATURES = {"T2p0": 2.0, "T1p5": 1.5, "T0p8": 0.8}
SCHEDULE = VarianceExploding(0.01, 4.0, time="geometric")
SPREAD = 1.2  # of a coordinate at temperature 2
WIDTH, LAYERS, DISTANCES = 32, 2, 16
BATCH, LEARNING_RATE = 64, 3e-3
CAP = 100.0  # energies above it count as it
FIRST, SECOND = np.triu_indices(PARTICLES, 1)


@lru_cache
def samples(name: str) -> Float:
    """Samples at a temperature, "T2p0" (2000), "T1p5" (1000) or "T0p8" (500): (n, 39), centred."""
    with (
        resources.files("scoredraw").joinpath("data", "lj13-samples.npz").open("rb") as file,
        np.load(io.BytesIO(file.read())) as stored,
    ):
        return centred(stored[name] * float(stored["step"]))


def centred(x: Float) -> Float:
    """Without the centre of mass."""
    particles = x.reshape(-1, PARTICLES, 3)
    return np.asarray((particles - particles.mean(axis=1, keepdims=True)).reshape(x.shape))


def energy(x: Float) -> Float:
    """U of states (n, 39): (n,)."""
    particles = centred(x).reshape(-1, PARTICLES, 3)
    squared = np.square(particles[:, FIRST] - particles[:, SECOND]).sum(axis=-1)
    pairs = 2 * (squared**-6 - 2 * squared**-3).sum(axis=1)
    return np.asarray(pairs + 0.5 * np.square(particles).sum(axis=(1, 2)))


def energy_gradient(x: Float) -> Float:
    """∇U, (n, 39)."""
    particles = centred(x).reshape(-1, PARTICLES, 3)
    apart = particles[:, :, None] - particles[:, None]
    squared = np.square(apart).sum(axis=-1) + np.eye(PARTICLES)
    pull = 24 * (squared**-4 - squared**-7) * (1 - np.eye(PARTICLES))
    return np.asarray((particles + (pull[..., None] * apart).sum(axis=2)).reshape(x.shape))


def virial_temperature(x: Float) -> Float:
    """x · ∇U / 36 of every state, whose mean is the temperature: (n,)."""
    return np.asarray((centred(x) * energy_gradient(x)).sum(axis=1) / FREE)


class PairNetwork(torch.nn.Module):
    """eps(x, sigma) of 13 particles in space, equivariant.

    y = x/sqrt(s² + sigma²). Every layer sends messages m_ij of the two particles' features and
    their distance, moves y_i by Σ_j (y_i - y_j) a(m_ij) and updates the features by Σ_j m_ij. What
    y has moved is F, and the clean state is c_skip x + c_out F.
    """

    centres: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            linear, silu = torch.nn.Linear, torch.nn.SiLU
            self.start = linear(4, WIDTH)
            self.messages = torch.nn.ModuleList(
                torch.nn.Sequential(
                    linear(2 * WIDTH + DISTANCES, WIDTH), silu(), linear(WIDTH, WIDTH), silu()
                )
                for _ in range(LAYERS)
            )
            self.moves = torch.nn.ModuleList(linear(WIDTH, 1) for _ in range(LAYERS))
            self.updates = torch.nn.ModuleList(linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
        self.register_buffer("centres", torch.linspace(0.3, 3.3, DISTANCES))

    def moved(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """F of states (B, 39) at noise (B, 1) or (1, 1)."""
        y = (x / torch.sqrt(SPREAD**2 + sigma**2)).reshape(-1, PARTICLES, 3)
        first, level = y, sigma.log()
        waves = torch.cat([level, level**2, torch.sin(level), torch.cos(level)], dim=-1)
        h = self.start(waves)[:, None].expand(len(x), PARTICLES, WIDTH)
        for message, move, update in zip(self.messages, self.moves, self.updates, strict=True):
            apart = y[:, :, None] - y[:, None]
            length = (apart.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            bumps = torch.exp(-((length - self.centres) ** 2) * 12.5)
            pairs = (len(x), PARTICLES, PARTICLES, WIDTH)
            ends = h[:, :, None].expand(pairs), h[:, None].expand(pairs)
            m = message(torch.cat([*ends, bumps], dim=-1))
            y = y + (apart / (length + 0.1) * move(m)).sum(dim=2)
            h = h + update(torch.cat([h, m.sum(dim=2) / PARTICLES], dim=-1))
        return (y - first).reshape(x.shape)

    def eps(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The noise in x (B, 39) at a time of `SCHEDULE`."""
        sigma = torch.full((1, 1), float(SCHEDULE.sigma(t)), dtype=x.dtype)
        middle = x.reshape(-1, PARTICLES, 3).mean(dim=1).repeat(1, PARTICLES)
        inside = x - middle
        total = SPREAD**2 + sigma**2
        clean = inside * SPREAD**2 / total + self.moved(inside, sigma) * (
            sigma * SPREAD / total.sqrt()
        )
        return (inside - clean) / sigma


def train(steps: int, seed: int, temperature: str = "T2p0") -> PairNetwork:
    """A network after `steps` steps of Adam on batches of 64, noise log-uniform."""
    with one_thread():
        network, data = PairNetwork(seed), torch.from_numpy(samples(temperature)).float()
        optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        source = torch.Generator().manual_seed(seed)
        low, high = np.log(SCHEDULE.sigma_min), np.log(SCHEDULE.sigma_max)
        for step in range(steps):
            rows = data[torch.randint(len(data), (BATCH,), generator=source)]
            sigma = torch.exp(low + (high - low) * torch.rand(BATCH, 1, generator=source))
            noise = torch.randn(BATCH, PARTICLES, 3, generator=source)
            noise = (noise - noise.mean(dim=1, keepdim=True)).reshape(BATCH, DIMENSIONS)
            x = rows + sigma * noise
            total = SPREAD**2 + sigma**2
            wanted = (rows - x * SPREAD**2 / total) * total.sqrt() / (sigma * SPREAD)
            optimiser.param_groups[0]["lr"] = rate(LEARNING_RATE, step, steps)
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(network.moved(x, sigma), wanted).backward()
            optimiser.step()
        return network.requires_grad_(False)


def energy_distance(x: Float, weights: Float | None, real: str) -> float:
    """W1 of the energies to those of real samples at a temperature, capped."""
    energies, truth = (np.minimum(energy(one), CAP) for one in (x, samples(real)))
    return float(wasserstein_distance(energies, truth, weights))


def annealed(
    network: PairNetwork, beta: float, real: str, n: int, steps: int, key: list[int]
) -> dict[str, dict[str, float]]:
    """Energies of what each way of annealing from temperature 2 gives, beside real ones."""
    found: dict[str, tuple[Float, Float | None]] = {}
    warm = samples("T2p0")
    tilt = softmax(-(beta - 1) / TEMPERATURES["T2p0"] * energy(warm))
    found["real at 2, reweighted"] = (warm, tilt)
    ways: dict[str, tuple[float, dict[str, Any]]] = {
        "no annealing": (1.0, {"resampler": None}),
        "plain": (beta, {"resampler": None}),
        "FKC": (beta, {"ess_threshold": 0.5}),
        "FKC, from step 20": (beta, {"ess_threshold": 0.5, "start_resampling_step": 20}),
        "FKC, ζ² = 4": (beta, {"ess_threshold": 0.5, "noise_scale": 2.0}),
    }
    for arm, (power, how) in ways.items():
        sampler = WeightedSampler(SCHEDULE, Target.anneal(power), steps, **how)
        source = torch.Generator().manual_seed(sum(key))
        with torch.no_grad(), one_thread():
            one = sampler.sample(network.eps, sampler.draw_prior((n, DIMENSIONS), source), source)
        even = np.full(n, 1 / n)
        p = softmax(one.log_weights.numpy()) if arm.startswith("FKC") else even
        found[arm] = one.x.numpy().astype(np.float64), p
    found["real, half of them"] = samples(real)[::2], None
    return {
        arm: {
            "energy W1": energy_distance(x, p, real),
            "mean energy": float(np.average(np.minimum(energy(x), CAP), weights=p)),
        }
        for arm, (x, p) in found.items()
    }
