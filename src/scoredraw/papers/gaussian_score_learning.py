"""What a denoiser of the 8x8 digits learns first: the Gaussian score, or the training set's.

A multilayer perceptron of two hidden layers learns E[x_0 | x] under EDM's preconditioning,

    D(x, sigma) = c_skip x + c_out F(c_in x, log sigma),    c_skip = s²/(sigma² + s²),
    c_out = sigma s / sqrt(sigma² + s²),    c_in = 1/sqrt(sigma² + s²),

with s the data's deviation, sigma log-normal, more widely than EDM's so that the noise end is
learned as well, and the loss |D - x_0|²/c_out². At checkpoints, equally spaced in the logarithm of
the updates, it is asked how much of its score the analytic ones explain.

Wang and Vastola 2024, arXiv 2412.09726; Karras, Aittala, Aila and Laine 2022, arXiv 2206.00364.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.gaussian_score import AnalyticScore, edm_schedule
from scoredraw.diffusion.teleportation import score_explained_variance
from scoredraw.metrics import Estimate, mean_interval
from scoredraw.papers import digit_diffusion as digits
from scoredraw.papers.training import rate

Float = NDArray[np.float64]

WIDTH, BATCH, LEARNING_RATE = 256, 256, 1e-3
NOISE_MEAN, NOISE_STD = -0.5, 1.8  # of log sigma
REACHED = 0.9


class DigitDenoiser(torch.nn.Module):
    """D(x, sigma) of digits (B, 64), sigma (B, 1); its weights from a seed."""

    def __init__(self, deviation: float, seed: int) -> None:
        super().__init__()
        self.deviation = deviation
        # not torch's own generator, which threads share
        with torch.device("meta"):
            sizes = [(digits.PIXELS + 1, WIDTH), (WIDTH, WIDTH), (WIDTH, digits.PIXELS)]
            self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)
        self.to_empty(device="cpu")
        source = torch.Generator().manual_seed(seed)
        for values in self.parameters():
            bound = WIDTH**-0.5
            torch.nn.init.uniform_(values, -bound, bound, generator=source)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        power = sigma**2 + self.deviation**2
        h = torch.cat([x / power.sqrt(), sigma.log() / 4], dim=1)
        for layer in self.layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        learned = self.layers[-1](h)
        skip, out = self.deviation**2 / power, sigma * self.deviation / power.sqrt()
        return skip * x + out * learned

    def eps(self, x: Any, t: float) -> Any:
        """The noise in x (B, 64), an array, at noise t."""
        with torch.no_grad():
            sigma = torch.full((len(x), 1), float(t))
            clean = self(torch.as_tensor(x, dtype=torch.float32), sigma)
        return (x - clean.numpy()) / t


def trained(data: NDArray[np.float32], steps: int, seed: int, keep: Sequence[int]) -> list[Any]:
    """Copies of a denoiser after the numbers of updates in `keep`, increasing up to `steps`."""
    network = DigitDenoiser(float(data.std()), seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    random = np.random.default_rng([seed, 8])
    rows, copies = torch.from_numpy(data), []
    for step in range(steps + 1):
        if step in keep:
            copies.append(copy.deepcopy(network).requires_grad_(False))
        if step == steps:
            break
        clean = rows[random.integers(len(rows), size=BATCH)]
        log_sigma = random.normal(NOISE_MEAN, NOISE_STD, size=(BATCH, 1))
        sigma = torch.from_numpy(np.exp(log_sigma).astype(np.float32))
        noise = random.standard_normal((BATCH, digits.PIXELS)).astype(np.float32)
        weight = (sigma**2 + network.deviation**2) / (sigma * network.deviation) ** 2
        optimiser.param_groups[0]["lr"] = rate(LEARNING_RATE, step, steps)
        optimiser.zero_grad()
        said = network(clean + sigma * torch.from_numpy(noise), sigma)
        (weight * (said - clean) ** 2).mean().backward()
        optimiser.step()
    return copies


def checkpoints(steps: int, count: int = 12) -> list[int]:
    """Distinct numbers of updates, equally spaced in their logarithm, up to `steps`.

    >>> checkpoints(1000, 4)
    [4, 25, 159, 1000]
    """
    first = min(4.0, steps)
    return sorted({round(v) for v in np.geomspace(first, steps, count)})


class Learning:
    """Denoisers trained from several seeds, and how much analytic scores explain of each.

    shares[name]: (networks, checkpoints, S), the share of the network's score explained.
    """

    def __init__(
        self,
        data: NDArray[np.float32],
        models: dict[str, AnalyticScore],
        sigmas: Sequence[float],
        seeds: Sequence[int],
        steps: int,
        rows: int,
    ) -> None:
        self.updates, self.sigmas = checkpoints(steps), list(sigmas)
        self.members = digits.each(lambda seed: trained(data, steps, seed, self.updates), seeds)
        seen = data[np.random.default_rng(8).permutation(len(data))[:rows]].astype(np.float64)

        def explained(model: AnalyticScore) -> Float:
            return np.stack([
                [self._explained(model, one, seen, seed) for one in copies]
                for seed, copies in zip(seeds, self.members, strict=True)
            ])  # fmt: skip

        found = digits.each(explained, list(models.values()))
        self.shares: dict[str, Float] = dict(zip(models, found, strict=True))

    def _explained(self, model: AnalyticScore, network: Any, rows: Float, seed: int) -> Float:
        found = score_explained_variance(
            model.eps, network.eps, rows, self.sigmas, schedule=edm_schedule(), rng=seed
        )
        return found.score

    @property
    def final(self) -> list[Any]:
        """The networks after all updates."""
        return [copies[-1] for copies in self.members]

    def reached(self, name: str, sigma: float) -> Float:
        """Updates until the share is `REACHED` of its maximum, by network; between checkpoints on
        the line in the logarithm of the updates."""
        shares = self.shares[name][:, :, self.sigmas.index(sigma)]
        goal = REACHED * shares.max(axis=1, keepdims=True)
        first = np.argmax(shares >= goal, axis=1)
        logs = np.log(self.updates)
        crossed = []
        for row, level, i in zip(shares, goal[:, 0], first, strict=True):
            if i == 0:
                crossed.append(logs[0])
                continue
            part = (level - row[i - 1]) / (row[i] - row[i - 1])
            crossed.append(logs[i - 1] + part * (logs[i] - logs[i - 1]))
        return np.exp(crossed)

    def curve(self, name: str, sigma: float) -> list[Estimate]:
        """The mean share at every checkpoint."""
        column = self.shares[name][:, :, self.sigmas.index(sigma)]
        return [mean_interval(values) for values in column.T]
