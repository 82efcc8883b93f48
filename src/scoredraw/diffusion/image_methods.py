"""Sampling an image model by a method of the catalogue: what `generate image` runs.

The first kind solves the model's probability-flow ODE, so that all of them make the same image of
the same noise and differ in how near they come with so many calls:

    ddim, heun, deis (35), usf (26), time-shift (53), teleport (08), and peers from diffusers

The second kind samples another law than the model's:

    annealed, product, tilted   q^β, q_1 q_2, q exp(b r) with weighted particles        (24)
    tree, tree-search           q exp(b r), or its best image, by a tree of denoisings   (17)
    best-of-n                   the best of independent images

Every function takes a model, the noises x (n, C, H, W), the number of network calls an image and
its own options, and returns images (n, C, H, W). Those of the second kind take a reward: a
function of images (B, C, H, W) in [-1, 1] that returns (B,), differentiable for "tilted". Where a
model's states are latents, so is what is returned: `ImageModel.images` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Generator, Tensor, arange, from_numpy, stack

from scoredraw import datasets, registry
from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.feynman_kac import Target, ramp
from scoredraw.diffusion.gaussian_score import GaussianScore
from scoredraw.diffusion.image_models import (
    EMBEDDED,
    FOLDER,
    ImageModel,
    fashion_classifier,
    open_image_model,
)
from scoredraw.diffusion.parameterisations import to_x0
from scoredraw.diffusion.pseudo_numerical import by_time
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.solver_schedules import SolverSchedule, solver_preset
from scoredraw.diffusion.teleportation import Teleport
from scoredraw.diffusion.time_grids import time_grid
from scoredraw.diffusion.time_shift import TimeShiftSampler
from scoredraw.diffusion.tree_nodes import checked_reward
from scoredraw.diffusion.tree_sampling import tree_sample
from scoredraw.diffusion.unified_solver import UnifiedSolver
from scoredraw.diffusion.weighted_sampling import WeightedSampler
from scoredraw.errors import InputError, import_extra, require

Reward = Callable[[Tensor], Tensor]

UNIFORM: dict[str, Any] = {"grid": "t", "grid_power": 1.0}  # what DDPM networks do best with
FEW = 15  # calls with which a line extrapolates the network better than a cubic
REFERENCE_STEPS = 200
SPLIT = 0.5  # resample when the particles are worth less than this share of them


# ── solvers of the probability-flow ODE ─────────────────────────────────────────────────────────


def exact(model: ImageModel, x: Tensor, steps: int = REFERENCE_STEPS) -> Tensor:
    """Where the ODE leads, by a third-order method with three calls a step."""
    return _solved(model, x, steps, variant="rhork", grid="rho")


def ddim(model: ImageModel, x: Tensor, calls: int) -> Tensor:
    """DDIM without noise. Song et al. 2021, arXiv 2010.02502."""
    return _solved(model, x, calls, variant="ei_eps", **UNIFORM)


def heun(model: ImageModel, x: Tensor, calls: int) -> Tensor:
    """Heun's method on the grid of EDM, two calls a step. Karras et al. 2022, arXiv 2206.00364."""
    require(calls >= 2, "steps", f"{calls} call", "two calls or more for heun")
    return _solved(model, x, calls // 2, variant="rhork", tableau="2heun", grid="rho")


def deis(model: ImageModel, x: Tensor, calls: int, *, order: int | None = None) -> Tensor:
    """tAB-DEIS: the network extrapolated by a polynomial in time (paper 35).

    order: of the polynomial, by default 1 with fewer than 15 calls and 3 with more, which was
    chosen on the embedded model.
    """
    degree = (1 if calls < FEW else 3) if order is None else order
    return _solved(model, x, calls, variant="tab", order=degree, **UNIFORM)


def _solved(model: ImageModel, x: Tensor, steps: int, **options: Any) -> Tensor:
    made: Tensor = DEISSolver(model.schedule, steps, **options).sample(model.eps, x)
    return made


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "dpm++": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "solver_order": 3}),
}


def diffusers_dpm(model: ImageModel, x: Tensor, calls: int) -> Tensor:
    """DPM-Solver++ 2M of diffusers. Lu et al. 2022, arXiv 2211.01095."""
    return _peer(model, x, calls, "dpm++")


def diffusers_unipc(model: ImageModel, x: Tensor, calls: int) -> Tensor:
    """UniPC of order 3 of diffusers. Zhao et al. 2023, arXiv 2302.04867."""
    return _peer(model, x, calls, "unipc")


def diffusers_deis(model: ImageModel, x: Tensor, calls: int) -> Tensor:
    """DEIS of diffusers, three values of eps in log sigma/alpha."""
    return _peer(model, x, calls, "deis")


def _peer(model: ImageModel, x: Tensor, calls: int, name: str) -> Tensor:
    kind, options = PEERS[name]
    make = getattr(import_extra("diffusers", "diffusion"), kind)
    scheduler = make(trained_betas=betas(model), prediction_type="epsilon", **options)
    scheduler.set_timesteps(calls)
    for t in scheduler.timesteps:
        x = scheduler.step(model.eps(x, float(t)), t, x).prev_sample
    return x


def betas(model: ImageModel) -> Any:
    """The betas (T,) of a model's discrete times."""
    abar = model.schedule.values
    return 1 - abar / np.append(1.0, abar[:-1])


def usf(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    schedule: str = "searched",
    order: int = 2,
    grid: str = "uniform",
) -> Tensor:
    """The unified step: a solver's name, or the file of a schedule that was searched (paper 26).

    schedule: "searched" takes the one that ships for the embedded model and so many calls, and
    UniPC where there is none. order, grid: of a named solver, see `solver_preset`. A file holds its
    own calls, as many as `calls`.
    """
    shipped = FOLDER / "schedules" / f"{calls}.json"
    if schedule == "searched":
        found = model.name == EMBEDDED and shipped.is_file()
        schedule = str(shipped) if found else "unipc"
    if Path(schedule).suffix == ".json":
        plan = SolverSchedule.load(schedule)
        came = f"{calls} for {Path(schedule).name}"
        require(plan.nfe == calls, "steps", came, f"its {plan.nfe} calls")
    else:
        relaxation = "bh2" if schedule == "unipc" else "none"
        plan = solver_preset(
            schedule, model.schedule, calls, order=order, grid=grid, relaxation=relaxation
        )
    made: Tensor = UnifiedSolver(plan, model.schedule).sample(model.eps, x)
    return made


def time_shift(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    window: int = 40,
    cutoff: float = 300,
    target: str = "plain",
    base: str = "ddim",
    data_variance: float | None = None,
) -> Tensor:
    """Each state shown at the time that fits its variance (paper 53).

    data_variance: the mean variance of an image, which target "matched" wants; of the embedded
    model's images if not given.
    """
    if target == "matched" and data_variance is None:
        data_variance = float(data_of(model, None).var(axis=1, ddof=1).mean())
    sampler = TimeShiftSampler(
        model.schedule, calls, base, window=window, cutoff=cutoff, target=target,
        data_variance=data_variance, grid="linspace",
    )  # fmt: skip
    made: Tensor = sampler.sample(by_time(model.eps), x)[0]
    return made


def teleport(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    sigma: float | None = None,
    order: int = 1,
    data: str | None = None,
) -> Tensor:
    """The noisiest stretch by the data's mean and covariance, all calls on the rest (paper 08).

    sigma: where the calls begin, noise per unit of signal; data: see `data_of`. The calls are
    those of `deis`, on times of the rest.
    """
    gaussian = GaussianScore.fit(data_of(model, data), schedule=model.schedule)

    def rest(schedule: NoiseSchedule, times: Any) -> DEISSolver:
        grid = time_grid(schedule, calls, "t", 1.0, t_start=float(times[0]))
        return DEISSolver(schedule, times=grid, variant="tab", order=order)

    jump = Teleport(gaussian, calls, sigma_skip=sigma, grid="respace", solver=rest)
    made: Tensor = jump.sample(model.eps, x)
    return made


def data_of(model: ImageModel, data: str | None) -> Any:
    """Images (n, d) in [-1, 1]: those the embedded model learned from, or the `images` of a .npz.

    Raises InputError where another model comes without data, or with images of another size.
    """
    if data is None:
        wanted = "--set data=FILE.npz, images (n, channels, height, width) in [-1, 1]"
        require(model.name == EMBEDDED, "data", "none", wanted)
        found = datasets.load("fashion-mnist")
        rows = np.asarray(found.x)[found.splits["train"]].astype(np.float64)
        return rows / 127.5 - 1
    try:
        with np.load(data) as file:
            images = np.asarray(file["images"], np.float64)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        wanted = "a .npz with an array 'images'"
        raise InputError(f"data: cannot read {data} ({error}), want {wanted}") from None
    wanted = f"(n, {', '.join(map(str, model.shape))})"
    require(images.shape[1:] == model.shape, "data", images.shape, wanted)
    return images.reshape(len(images), -1)


# ── other laws than the model's ─────────────────────────────────────────────────────────────────


def annealed(
    model: ImageModel, x: Tensor, calls: int, *, beta: float = 1.1, seed: int = 0, **options: Any
) -> Tensor:
    """q^β by weighted particles, the images at temperature 1/β (paper 24)."""
    return _weighted(model, [model], x, calls, Target.anneal(beta), seed, options)


def product(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    other: str,
    prompt: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """q_1 q_2 of this model and that of another folder on the same schedule (paper 24).

    prompt, guidance: of the other one, if it takes a text: of one folder, two prompts at once.
    """
    second = open_image_model(other, prompt, guidance=guidance)
    same = second.shape == model.shape and bool(
        np.allclose(second.schedule.values, model.schedule.values)
    )
    require(same, "other", f"{other} of another shape or schedule", "a model of the same")
    return _weighted(model, [model, second], x, calls, Target.product(1.0, 1.0), seed, options)


def tilted(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    reward: str | Reward,
    strength: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """q exp(b r) by weighted particles, r of the image the model expects at each state (24)."""
    judge, schedule = reward_of(reward, model), model.schedule

    def worth(state: Tensor, t: float) -> Tensor:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return judge(to_x0(model.eps(state, t), state, alpha, sigma))

    target = Target.product(1.0).tilted(worth, strength=ramp(schedule, strength))
    return _weighted(model, [model], x, calls, target, seed, options)


def _weighted(
    model: ImageModel,
    models: list[ImageModel],
    x: Tensor,
    calls: int,
    target: Target,
    seed: int,
    options: dict[str, Any],
) -> Tensor:
    """The images as one population of particles, resampled by what weights are left."""
    usual: dict[str, Any] = {"ess_threshold": SPLIT, **UNIFORM}
    sampler = WeightedSampler(model.schedule, target, calls, **(usual | options))
    random = Generator().manual_seed(seed)
    total = float(sum(target.powers_at(model.schedule.ends.t_start)))
    found = sampler.sample([one.eps for one in models], x / total**0.5, random)
    made: Tensor = found.equally_weighted(random)
    return made


def tree(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    reward: str | Reward,
    strength: float = 1.0,
    budget: int | None = None,
    seed: int = 0,
    search: bool = False,
    **options: Any,
) -> Tensor:
    """q exp(b r) by a tree of denoising steps that every rollout adds to (paper 17).

    budget: network calls in all, by default four rollouts of `calls` steps an image.
    """
    judge, n = reward_of(reward, model), len(x)
    total = 4 * n * calls if budget is None else budget
    found: Tensor = tree_sample(
        model.eps, model.shape, model.schedule, judge, n,
        steps=calls, budget=total, search=search, lam=strength, generator=seed, **options,
    )  # fmt: skip
    return found


def tree_search(model: ImageModel, x: Tensor, calls: int, **options: Any) -> Tensor:
    """The best images that a tree of denoising steps finds, the best first (paper 17)."""
    return tree(model, x, calls, search=True, **options)


def best_of_n(
    model: ImageModel,
    x: Tensor,
    calls: int,
    *,
    reward: str | Reward,
    of: int = 4,
    seed: int = 0,
) -> Tensor:
    """Of `of` independent images each the one of the highest reward, solved by `deis`."""
    judge = reward_of(reward, model)
    tries = [deis(model, model.noise(len(x), seed + i) if i else x, calls) for i in range(of)]
    best = np.argmax([checked_reward(judge, images) for images in tries], axis=0)
    return stack(tries)[from_numpy(best), arange(len(x))]


def reward_of(reward: str | Reward, model: ImageModel) -> Reward:
    """The reward of a model's states by one of images, a function or its name.

    Names: class:K, log P(class K) of the shipped classifier, and module:function.

    >>> reward_of("class:11", None)
    Traceback (most recent call last):
    scoredraw.errors.InputError: reward: got 'class:11', want class:0 to class:9, or module:function
    """
    judge = _named(reward, model) if isinstance(reward, str) else reward
    return lambda states: judge(model.images(states).clamp(-1, 1))


def _named(reward: str, model: ImageModel) -> Reward:
    place, _, name = reward.partition(":")
    if place != "class":
        found: Reward = registry.resolve(reward, argument="reward")
        return found
    wanted = "class:0 to class:9, or module:function"
    require(name.isdecimal() and int(name) < 10, "reward", repr(reward), wanted)
    fits = model.shape == (1, 28, 28)
    require(fits, "reward", f"{reward} for images {model.shape}", "module:function")
    classifier = fashion_classifier()
    return lambda images: classifier(images).log_softmax(dim=-1)[:, int(name)]
