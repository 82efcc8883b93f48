"""Diffusion of the 8x8 digits: an exact eps, learned ones, and how good generated digits are.

A mixture of ten Gaussians fitted to the digits has a known eps, so that all error is the solver's.
A network is a residual multilayer perceptron that learns the noise in  x_t = alpha x_0 + sigma eps
from pixels in [-1, 1] and waves of log(sigma/alpha), by the plain loss |eps - net(x_t, t)|² with t
uniform. Several are trained, each from its own seed, in parallel. Generated digits are compared
with real ones by

    Fréchet     |m - m'|² + tr(S + S' - 2 (S S')^{1/2})  of a digit classifier's features
    W2          sqrt(min over matchings of the mean |x_i - y_π(i)|²)  of the pixels
    energy      2 E|x - y| - E|x - x'| - E|y - y'|  of the pixels

of which only the first resembles the FID of the papers, with an 8x8 classifier in Inception's
place. All three are biased upwards on finite samples, equally for samples of equal size.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.execution import single_threads
from scoredraw.metrics import Estimate, frechet_distance, mean_interval, paired_difference
from scoredraw.papers.training import (
    MLPEnsemble,
    digits_split,
    minibatches,
    one_thread,
    rate,
    train_ensemble,
)

Float = NDArray[np.float64]

Key = tuple[str, str, int]  # a solver: method, grid, calls
Errors = dict[Key, Float]  # (blocks, samples)

SIDE, PIXELS = 8, 64
WIDTH, BLOCKS, WAVES = 256, 3, 16
BATCH, LEARNING_RATE = 256, 2e-3


# ── exact eps ───────────────────────────────────────────────────────────────────────────────────


@cache
def fitted_mixture() -> Any:
    """Ten Gaussians with full covariances, fitted to all 1797 digits, pixels in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    pixels = load_digits().data / 8 - 1
    model = GaussianMixture(10, covariance_type="full", reg_covar=1e-3, random_state=0)
    return each(model.fit, [pixels])[0]


class Mixture:
    """Blocks of noises and their exact solutions under the eps of `fitted_mixture`.

    exact: (blocks, noises, 64), by `reference` steps of a fourth-order method.
    """

    def __init__(
        self, schedule: NoiseSchedule, blocks: int, noises: int, reference: int, rng: int
    ) -> None:
        self.schedule = schedule
        self.score = GaussianMixtureScore.from_sklearn(fitted_mixture(), schedule)
        self.noises = np.random.default_rng([rng, 35]).standard_normal((blocks, noises, PIXELS))
        self.exact = self.solve(DEISSolver(schedule, reference, variant="rhork", tableau="4rk"))

    def solve(self, solver: DEISSolver) -> Float:
        """Where a solver carries every noise: (blocks, noises, 64)."""
        return self.each_block(lambda x: solver.sample(self.score.eps, x))

    def each_block(self, sample: Callable[[Float], Any]) -> Float:
        """A sampler of one block (noises, 64), for every block."""
        return np.stack(each(sample, list(self.noises)))


# ── learned eps ─────────────────────────────────────────────────────────────────────────────────


class EpsNetwork(torch.nn.Module):
    """eps(x, t) = sigma x + alpha f, with f from h = W x + V waves(t), then for every block
    h += W silu(V waves(t) + W silu(h)), and f = W silu(h).

    sigma x is what eps would be if the data were N(0, I); with skip=False the network is f alone
    and has to learn that too. The waves are sines and cosines of log(sigma/alpha), of wave lengths
    from 2 to 60, so that eps stays smooth in time.
    """

    frequencies: torch.Tensor

    def __init__(self, schedule: NoiseSchedule, seed: int, *, skip: bool = True) -> None:
        super().__init__()
        self.schedule, self.skip, width = schedule, skip, WIDTH
        # made on the meta device and filled below: parallel threads share torch's own generator
        with torch.device("meta"):
            self.first = torch.nn.Linear(PIXELS, width)
            self.times = torch.nn.ModuleList(
                torch.nn.Linear(2 * WAVES, width) for _ in range(BLOCKS + 1)
            )
            self.blocks = torch.nn.ModuleList(
                torch.nn.Linear(width, width) for _ in range(2 * BLOCKS)
            )
            self.last = torch.nn.Linear(width, PIXELS)
        self.to_empty(device="cpu")
        source = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, torch.nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for values in layer.parameters():
                    torch.nn.init.uniform_(values, -bound, bound, generator=source)
        frequencies = torch.as_tensor(np.geomspace(0.1, 3.0, WAVES), dtype=torch.float32)
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: torch.Tensor, log_rho: torch.Tensor) -> torch.Tensor:
        """x (B, 64); log_rho (B, 1) or (1, 1)."""
        phase = log_rho * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1)
        silu = torch.nn.functional.silu
        h = self.first(x) + self.times[0](waves)
        for i in range(BLOCKS):
            inside = silu(self.times[i + 1](waves) + self.blocks[2 * i](silu(h)))
            h = h + self.blocks[2 * i + 1](inside)
        learned = self.last(silu(h))
        if not self.skip:
            return learned
        rho = log_rho.exp()
        return (learned + rho * x) / torch.sqrt(1 + rho * rho)

    def eps(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The noise in x (B, 64) at one time, as a solver asks for it."""
        log_rho = torch.tensor([[float(np.log(self.schedule.rho(t)))]], dtype=x.dtype)
        return self(x, log_rho)


def train(
    schedule: NoiseSchedule,
    data: NDArray[np.float32],
    steps: int,
    seed: int,
    *,
    skip: bool = True,
) -> EpsNetwork:
    """A network after `steps` steps of Adam on batches of 256, under a cosine from 2e-3 to 0."""
    network = EpsNetwork(schedule, seed, skip=skip)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    random = np.random.default_rng([seed, 35])
    ends = schedule.ends
    for step in range(steps):
        rows = data[random.integers(len(data), size=BATCH)]
        t = random.uniform(ends.t_end, ends.t_start, size=BATCH)
        eps = random.standard_normal((BATCH, PIXELS)).astype(np.float32)
        x = torch.from_numpy(schedule.perturb(rows, t, eps))
        log_rho = torch.from_numpy(np.log(schedule.rho(t)).astype(np.float32))[:, None]
        optimiser.param_groups[0]["lr"] = rate(LEARNING_RATE, step, steps)
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(network(x, log_rho), torch.from_numpy(eps)).backward()
        optimiser.step()
    return network.requires_grad_(False)


def each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """function of every item, in threads, each of which multiplies matrices on its own core."""
    with single_threads() as pool, one_thread():
        return list(pool.map(function, items))


class Networks:
    """Networks trained from several seeds, their own exact solutions and what solvers make of them.

    All solvers start from the same noises, (samples, 64) a network. exact: (networks, samples, 64),
    by `reference` steps, four times as many calls, of a fourth-order method; off by `exact_error`
    from a third-order one with as many calls.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        seeds: Sequence[int],
        steps: int,
        samples: int,
        *,
        reference: int = 125,
        skip: bool = True,
    ) -> None:
        data, _ = real_digits()
        self.members = each(lambda seed: train(schedule, data, steps, seed, skip=skip), seeds)
        noises = [np.random.default_rng([s, 36]).standard_normal((samples, PIXELS)) for s in seeds]
        self.noises = [torch.from_numpy(noise).float() for noise in noises]
        self.exact = self.solve(DEISSolver(schedule, reference, variant="rhork", tableau="4rk"))
        again = self.solve(DEISSolver(schedule, 4 * reference))
        self.exact_error = float(np.sqrt(np.square(again - self.exact).mean()))

    def solve(self, solver: DEISSolver) -> Float:
        """Where a solver carries every network's noises: (networks, samples, 64)."""
        pairs = list(zip(self.members, self.noises, strict=True))
        found = each(lambda pair: solver.sample(pair[0].eps, pair[1]).numpy(), pairs)
        return np.stack(found).astype(np.float64)

    def measure(
        self, solvers: dict[Key, DEISSolver], distances: Distances
    ) -> tuple[Errors, Errors]:
        """Errors (networks, samples) and distances to held-out digits (networks, 3) of solvers.

        The second also has the exact solution, ("exact", "", 0), and digits that were trained on,
        ("real", "", 0).
        """
        real = real_digits()[0][None, : self.exact.shape[1]]
        errors: Errors = {}
        quality = {("real", "", 0): distances.each(real)}
        quality["exact", "", 0] = distances.each(self.exact)
        for key, solver in solvers.items():
            found = self.solve(solver)
            errors[key] = pixel_errors(found, self.exact)
            quality[key] = distances.each(found)
        return errors, quality


# ── how far generated digits are from real ones ─────────────────────────────────────────────────


def real_digits() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """1078 digits to train on and 719 held out, pixels in [-1, 1]."""
    split = digits_split()
    return 2 * split.train_x - 1, 2 * split.test_x - 1


class Distances:
    """Distances to the held-out digits of as many generated ones, after `names`."""

    names = ("Fréchet", "W2", "energy")

    def __init__(self, seed: int = 0, epochs: int = 20) -> None:
        split = digits_split()
        batches = minibatches([np.arange(len(split.train_y))] * epochs, 32, rng=seed)[None]
        self.classifier: MLPEnsemble = train_ensemble(
            split.train_x, split.train_y, batches, n_classes=10, seed=seed
        )
        self.accuracy = float(self.classifier.accuracy(split.test_x, split.test_y)[0])
        self.held_out = (2 * split.test_x - 1).astype(np.float64)
        self.features = self.features_of(self.held_out)
        self.spread = mean_distance(self.held_out, self.held_out)

    def features_of(self, digits: Float) -> Float:
        """The classifier's last hidden layer, (n, 64)."""
        return self.classifier.hidden((digits + 1) / 2)[0].astype(np.float64)

    def __call__(self, digits: Any) -> Float:
        """(Fréchet, W2, energy) of digits (n, 64), n at most the number held out."""
        x = np.asarray(digits, np.float64)
        real = self.held_out[: len(x)]
        return np.array([
            frechet_distance(self.features_of(x), self.features),
            transport_distance(x, real),
            2 * mean_distance(x, self.held_out) - mean_distance(x, x) - self.spread,
        ])  # fmt: skip

    def each(self, samples: NDArray[Any]) -> Float:
        """The distances of several samples (k, n, 64), (k, 3)."""
        return np.stack(each(self, list(samples)))


def transport_distance(x: Float, y: Float) -> float:
    """W2 of two samples of equal size, by their best matching."""
    cost = cdist(x, y, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


def mean_distance(x: Float, y: Float) -> float:
    """E|x - y| over all pairs; over pairs of different rows where y is x."""
    total = float(cdist(x, y).sum())
    return total / (len(x) * (len(y) - (x is y)))


def picture_strip(digits: Any) -> str:
    """Digits (n, 64) in [-1, 1] side by side, as a PNG in base64."""
    from matplotlib.image import imsave

    tiles = [np.pad(one.reshape(SIDE, SIDE), 1, constant_values=-1.0) for one in np.asarray(digits)]
    buffer = io.BytesIO()
    imsave(buffer, np.hstack(tiles), cmap="gray", vmin=-1, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


# ── comparing errors, block by block ────────────────────────────────────────────────────────────


def pixel_errors(solutions: Float, exact: Float) -> Float:
    """Root mean squared error over the pixels, one a sample: (..., 64) -> (...)."""
    return np.asarray(np.sqrt(np.square(solutions - exact).mean(axis=-1)))


def rmse(errors: Float) -> Float:
    """Over all noises of a block: (blocks,)."""
    return np.asarray(np.sqrt(np.square(errors).mean(axis=1)))


def typical(errors: Float) -> Float:
    """The median noise of a block: (blocks,)."""
    return np.asarray(np.median(errors, axis=1))


def ratio(worse: Float, better: Float, comparisons: int = 1) -> Estimate:
    """How many times as large: the geometric mean over blocks, with a t interval of the logs."""
    log = paired_difference(np.log(worse), np.log(better), comparisons=comparisons)
    return exponential(log)


def weakest(found: dict[Any, Estimate], bound: float = 1.0) -> tuple[Any, Estimate]:
    """The one that decides whether all lie above the bound: the worst that fails, or the lowest."""
    failed = [key for key in found if found[key].below(bound)]
    if failed:
        key = min(failed, key=lambda k: found[k].high)
    else:
        key = min(found, key=lambda k: found[k].low)
    return key, found[key]


def level(values: Float) -> Estimate:
    """The geometric mean with a t interval of the logs."""
    log = mean_interval(np.log(values))
    return exponential(log)


def exponential(log: Estimate) -> Estimate:
    with np.errstate(over="ignore"):  # two blocks have intervals without an upper end
        value, low, high = (float(np.exp(v)) for v in (log.value, log.low, log.high))
    return Estimate(value, low, high, log.n)
