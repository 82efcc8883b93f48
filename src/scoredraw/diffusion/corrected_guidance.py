r"""Corrected guidance, temperature and reward in any diffusers pipeline with a step callback.

    with GuidanceCorrector(pipe) as corrector:
        pipe(prompt, num_images_per_prompt=16, eta=1.0, callback_on_step_end=corrector)

The images of a prompt are particles. Guided eps, (1-β) eps_u + β eps_c, does not sample
q_u^{1-β} q_c^β; with the weights of `feynman_kac` it does. They do not depend on how much noise a
scheduler adds, and in ρ = sigma/alpha the step from ρ to ρ' gives, whatever the parameterisation,

    log w += (1 - ρ'²/ρ²)/2 · (|Σ β_i eps_i|² - Σ β_i |eps_i|²)

which for guidance is β (β-1)/2 (1 - ρ'²/ρ²) |eps_c - eps_u|². A forward hook on the network sees
eps_u and eps_c, the callback sees the latents after the step: there weights are added and latents
resampled, each prompt's among themselves, with whatever the scheduler remembers of them.

Copies only part again if the scheduler adds noise: DDIM with eta = 1, DDPM, ancestral Euler,
SDE-DPM-Solver. With latents of thousands of entries the weights spread far; see `clip_weights`.

Skreta et al., "Feynman-Kac correctors in diffusion", ICML 2025, arXiv 2503.02819.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw import smc
from scoredraw.diffusion.feynman_kac import squares_gap
from scoredraw.diffusion.parameterisations import to_eps
from scoredraw.errors import require

Float = NDArray[np.float64]

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


class GuidanceCorrector:
    """Weigh and resample the latents of a pipeline's batch; also the pipeline's step callback.

    pipe: any pipeline with `callback_on_step_end` whose network (unet or transformer) answers for
        both halves of guidance in one call: Stable Diffusion 1 to 3.5, XL, PixArt, ...; without
        guidance there is one expert, and annealing or reward are what is left.
    particles: how many images in a row belong to one prompt, `num_images_per_prompt`; by default
        all.
    annealing: γ, for (q_u^{1-β} q_c^β)^γ. Networks that predict epsilon only. The first latents
        must come from `draw_prior`, as `latents=`.
    reward(latents, rho): (B,), of latents after a step and their noise per signal; it weighs as
        exp(b r) with b = strength · (steps done / steps)^power.
    resampler, ess_threshold: as in `WeightedSampler`; nobody is resampled after the last step, and
        `log_weights` (B,) says what the images then weigh. clip_weights: c holds a step's
        log-weights, less their mean, in [-c, c]; biased.
    generator: a `torch.Generator`, a seed or None.

    After a run: `log_weights` (B,) and `ancestors` (B,) int64, `ess` (steps, prompts), `log_z`
    (prompts,). Raises InputError for a pipeline without a network or callback, guidance rescale,
    schedulers with two stages a step or that clip predictions, a batch that is no multiple of
    `particles`, and answers or rewards with NaN or of the wrong shape, naming the step.
    Skreta et al. 2025, arXiv 2503.02819. Sequential; O(B d) a step.
    """

    tensor_inputs = ("latents",)  # what diffusers' `MultiPipelineCallbacks` asks for

    def __init__(
        self,
        pipe: Any,
        *,
        particles: int | None = None,
        annealing: float = 1.0,
        reward: Callable[[Tensor, float], Tensor] | None = None,
        strength: float = 1.0,
        power: float = 1.0,
        resampler: str = "systematic",
        ess_threshold: float = 0.5,
        clip_weights: float | None = None,
        generator: Any = None,
    ) -> None:
        network: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        name = type(pipe).__name__
        require(network is not None, "pipe", name, "a pipeline with a unet or a transformer")
        self.network, self.scheduler, self.pipe = network, pipe.scheduler, pipe
        require(particles is None or particles >= 2, "particles", particles, "2 or more")
        require(bool(0 < annealing < np.inf), "annealing", annealing, "a positive number")
        require(bool(np.isfinite(strength)), "strength", strength, "a finite number")
        require(bool(0 < power < np.inf), "power", power, "a positive number")
        wanted = f"one of {', '.join(smc.SCHEMES)}"
        require(resampler in smc.SCHEMES, "resampler", repr(resampler), wanted)
        require(ess_threshold > 0, "ess_threshold", ess_threshold, "a positive share")
        good = clip_weights is None or clip_weights > 0
        require(good, "clip_weights", clip_weights, "a positive number or None")
        kind = prediction_kind(self.scheduler)
        came = f"{annealing:g} with {kind}"
        require(annealing == 1 or kind == "epsilon", "annealing", came, "a network of epsilon")
        self.particles, self.annealing, self.kind = particles, float(annealing), kind
        self.reward, self.strength, self.power = reward, float(strength), float(power)
        self.resampler, self.ess_threshold = resampler, ess_threshold
        self.clip_weights, self.generator = clip_weights, generator
        self._answers: list[Tensor] = []
        self._hook: Any = None
        self.ancestors: NDArray[np.int64] = np.arange(0)
        self._worth_before = torch.zeros(0, dtype=torch.float64)

    def __enter__(self) -> Self:
        self._hook = self.network.register_forward_hook(self._listen)
        self._answers.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._hook = None

    def draw_prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Any:
        """Latents to give the pipeline as `latents=`: N(0, I/γ), float32 (B, *dims)."""
        device = None if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device)
        return noise / self.annealing**0.5

    def __call__(self, pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`: weigh, and resample where it is time."""
        latents = kwargs["latents"]
        if i == 0:
            self._begin(pipe, len(latents))
        rho, rho_next, last = self._levels(t)
        gained = self._gained(pipe, latents, i, rho, rho_next)
        if self.reward is not None:
            worth = self._worth(latents, i, rho_next)
            gained = gained + (worth - self._worth_before)
            self._worth_before = worth
        ids = self._weigh(gained, last)
        if ids is None:
            return kwargs
        self._worth_before = self._worth_before[ids]
        self.ancestors = self.ancestors[ids.cpu().numpy()]
        _take_memory(self.scheduler, latents.shape, ids)
        return {**kwargs, "latents": latents[ids]}

    # ------------------------------------------------------------------ parts of a step

    def _listen(self, _network: Any, _inputs: Any, output: Any) -> Any:
        """The network's answer is kept; annealed, it goes on multiplied by γ."""
        whole = isinstance(output, tuple)
        answer = output[0] if whole else output.sample
        self._answers.append(answer.detach())
        if self.annealing == 1:
            return None
        if whole:
            return (answer * self.annealing, *output[1:])
        output.sample = answer * self.annealing
        return output

    def _begin(self, pipe: Any, batch: int) -> None:
        require(self._hook is not None, "corrector", "one that was not entered", "with corrector:")
        size = batch if self.particles is None else self.particles
        wanted = f"a multiple of particles = {size}, 2 or more"
        require(batch >= 2 and batch % size == 0, "batch", f"{batch} latents", wanted)
        rescale = getattr(pipe, "guidance_rescale", 0.0) or 0.0
        require(rescale == 0, "guidance_rescale", rescale, "0: rescaled eps is nobody's score")
        self.scheduler = pipe.scheduler
        self.rhos = noise_levels(self.scheduler)
        self.size, self.groups = size, batch // size
        self.log_weights = torch.zeros(batch, dtype=torch.float64)
        self._worth_before = torch.zeros(batch, dtype=torch.float64)
        self.ancestors = np.arange(batch)
        self.log_z: Float = np.zeros(self.groups)
        self._gathered: Float = np.zeros(self.groups)
        self._ess: list[Float] = []

    @property
    def ess(self) -> Float:
        """Effective size at every step before resampling, (steps, prompts)."""
        return np.array(self._ess)

    def _levels(self, t: Any) -> tuple[float, float, bool]:
        """ρ before and after the step at timestep t, and whether it is the last."""
        times = self.scheduler.timesteps
        found = (times == torch.as_tensor(t, device=times.device)).nonzero()
        require(len(found) > 0, "timestep", t, "one of the scheduler's")
        position = int(found[0, 0])
        rho, rho_next = self.rhos[position : position + 2]
        return float(rho), float(rho_next), position == len(times) - 1

    def _gained(self, pipe: Any, latents: Tensor, i: int, rho: float, rho_next: float) -> Tensor:
        """What the step adds to the log-weights, (B,) float64."""
        count, where = len(latents), f"at step {i}"
        rows = [len(answer) for answer in self._answers]
        wanted = f"one call for {count} or {2 * count} latents"
        came = f"calls for {rows} latents {where}"
        require(rows in ([count], [2 * count]), "network", came, wanted)
        answer = self._answers.pop()[:, : latents.shape[1]]
        require(bool(answer.isfinite().all()), "network", f"NaN or infinity {where}", "numbers")
        guided = rows == [2 * count]
        scale = float(pipe.guidance_scale) if guided else 1.0
        beta = np.array([1 - scale, scale] if guided else [1.0]) * self.annealing
        parts = [part.double() for part in answer.chunk(len(beta))]
        # eps up to what all experts share, which the differences cancel unless γ is not 1
        alpha, sigma = _signal_and_noise(rho, self.kind)
        eps = [to_eps(part, 0.0, alpha, sigma, self.kind) for part in parts]
        share = 1.0 if rho == np.inf else 1 - (rho_next / rho) ** 2
        return (squares_gap(beta, eps) * (0.5 * share)).cpu()

    def _worth(self, latents: Tensor, i: int, rho: float) -> Tensor:
        assert self.reward is not None
        value = torch.as_tensor(self.reward(latents, rho))
        shape, where = tuple(value.shape), f"at step {i}"
        require(shape == (len(latents),), "reward", f"shape {shape} {where}", f"({len(latents)},)")
        require(bool(value.isfinite().all()), "reward", f"NaN or infinity {where}", "numbers")
        steps = getattr(self.pipe, "num_timesteps", None) or len(self.scheduler.timesteps)
        b = self.strength * min((i + 1) / steps, 1.0) ** self.power
        return b * value.detach().double().cpu()

    def _weigh(self, gained: Tensor, last: bool) -> Tensor | None:
        """Weights with what was gained, and the ids of those that go on if any was resampled."""
        sizes, chosen = np.empty(self.groups), torch.arange(len(gained))
        resampled = False
        for k in range(self.groups):
            mine = slice(k * self.size, (k + 1) * self.size)
            step = gained[mine]
            if self.clip_weights is not None:
                mean = step.mean()
                step = mean + (step - mean).clip(-self.clip_weights, self.clip_weights)
            weights = self.log_weights[mine] + step
            sizes[k] = smc.effective_size(weights)
            if sizes[k] < self.ess_threshold * self.size and not last:
                self._gathered[k] += smc.log_mean_weight(weights)
                ids = smc.resample(weights, self.resampler, self.generator)
                chosen[mine] = ids + k * self.size
                weights, resampled = torch.zeros_like(weights), True
            self.log_weights[mine] = weights
            self.log_z[k] = self._gathered[k] + smc.log_mean_weight(weights)
        self._ess.append(sizes)
        return chosen if resampled else None


# ── what a scheduler says of itself ─────────────────────────────────────────────────────────────


def prediction_kind(scheduler: Any) -> str:
    """What its network predicts, or an InputError for schedulers that can't be corrected."""
    config, name = scheduler.config, type(scheduler).__name__
    require(scheduler.order == 1, "scheduler", f"{name}, of two stages a step", "one stage a step")
    require("sigma_data" not in config, "scheduler", f"{name}, of EDM networks", "a VP or flow one")
    for clip in ("clip_sample", "thresholding"):
        came = f"{name} with {clip}"
        require(not config.get(clip, False), "scheduler", came, "one that clips no prediction")
    flow = "shift" in config or config.get("use_flow_sigmas", False)
    kind = "flow_prediction" if flow else str(config.get("prediction_type", "epsilon"))
    require(kind in KINDS, "scheduler", f"{name} of {kind!r}", f"one of {', '.join(KINDS)}")
    return kind


def noise_levels(scheduler: Any) -> Float:
    """ρ = sigma/alpha at every timestep and after the last, (T + 1,), strictly decreasing.

    From `sigmas` where the scheduler has them, else from `alphas_cumprod`; after `set_timesteps`.
    """
    name, times = type(scheduler).__name__, scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(times) + 1:
        levels = np.asarray(torch.as_tensor(sigmas).double().cpu())
        if prediction_kind(scheduler) == "flow_prediction":
            with np.errstate(divide="ignore"):
                levels = levels / (1 - levels)
    else:
        require(hasattr(scheduler, "alphas_cumprod"), "scheduler", name, "sigmas or alphas_cumprod")
        abar = scheduler.alphas_cumprod.double().cpu().numpy()[times.long().cpu().numpy()]
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        abar = np.append(abar, final)
        with np.errstate(divide="ignore"):
            levels = np.sqrt((1 - abar) / abar)
    falling = bool((levels[1:] < levels[:-1]).all())
    require(falling, "scheduler", f"{name}, whose noise does not fall", "less noise at every step")
    return np.asarray(levels, np.float64)


def _signal_and_noise(rho: float, kind: str) -> tuple[float, float]:
    """alpha and sigma of a flow (which add to one) or of a VP model (whose squares do)."""
    if rho == np.inf:
        return 0.0, 1.0
    if kind == "flow_prediction":
        return 1 / (1 + rho), rho / (1 + rho)
    alpha = (1 + rho * rho) ** -0.5
    return alpha, rho * alpha


def _take_memory(scheduler: Any, shape: torch.Size, ids: Tensor) -> None:
    """What a scheduler keeps of earlier steps, one a latent, goes with the latents."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == shape:
            return value[ids.to(value.device)]
        if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
            return type(value)(take(one) for one in value)
        return value

    for name, value in vars(scheduler).items():
        setattr(scheduler, name, take(value))
