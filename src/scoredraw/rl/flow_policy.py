r"""A flow model as a policy: noisy steps that have a probability, and the loss of a batch of them.

A flow model moves x from noise (σ = 1) to data (σ = 0) along its velocity v, dx = v dσ. With noise
put in and its effect on the distribution taken out again, a step is an action with a density:

    σ_t  = η √(σ / (1 - σ)),    dt = σ_next - σ < 0,    s = σ_t √(-dt)
    mean = x (1 + σ_t²/(2σ) dt) + v (1 + σ_t² (1 - σ)/(2σ)) dt,    x_next = mean + s ε

and log π is the mean over the elements of log N(x_next; mean, s²): the D-th root of the density of
D elements, which is why the ratio is clipped at 1e-4. For a new mean, with Δ the change,

    log ratio = mean(ε Δ)/s - mean(Δ²)/(2 s²),

smaller than 0 on average and on another scale at each step. Normalised it is mean(ε Δ).

Wang et al., "Pref-GRPO", 2025, arXiv 2508.20751; the step: Liu et al., "Flow-GRPO", 2025, arXiv
2505.05470; the normalised ratio: Wang et al., "GRPO-Guard", 2025, arXiv 2510.22319.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.policy_loss import PolicyLoss, aggregate, clipped_token_loss


class FlowStep(NamedTuple):
    """next: as x, without a gradient; logp: (B,); mean: as x; std: s, (B, 1, ..) or (1, 1, ..)."""

    next: Tensor
    logp: Tensor
    mean: Tensor
    std: Tensor


def shifted_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels from 1 to 0, float32 (steps + 1,): shift σ/(1 + (shift - 1) σ), σ evenly spaced.

    >>> shifted_sigmas(4).round(decimals=2)
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    require(steps >= 2, "steps", steps, "at least 2")
    require(0 < shift < math.inf, "shift", shift, "a positive number")
    sigma = torch.linspace(1, 0, steps + 1)
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_sde_step(
    x: Tensor,
    velocity: Tensor,
    sigma: Any,
    sigma_next: Any,
    eta: float = 0.7,
    sigma_max: float | None = None,
    *,
    taken: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FlowStep:
    """A step and its log-probability; with `taken`, the log-probability of a step already taken.

    x, velocity, taken: (B, ...). sigma, sigma_next: numbers or (B,), 1 >= sigma > sigma_next >= 0.
    sigma_max: stands for σ where σ = 1, whose noise would be infinite; the second level of the
    schedule, as released. eta > 0: the amount of noise. Half precision is computed and returned in
    float32. The gradient flows through velocity to mean and logp. Raises InputError for shapes,
    levels out of order, σ = 1 without sigma_max, and eta <= 0. O(B D).

    >>> step = flow_sde_step(torch.ones(1, 2), torch.ones(1, 2), 0.5, 0.4, taken=torch.ones(1, 2))
    >>> step.mean.round(decimals=3), step.std.round(decimals=3), step.logp.round(decimals=3)
    (tensor([[0.8260, 0.8260]]), tensor([[0.2210]]), tensor([0.2820]))
    """
    same = x.ndim >= 2 and velocity.shape == x.shape and (taken is None or taken.shape == x.shape)
    shapes = [tuple(each.shape) for each in (x, velocity, taken) if each is not None]
    require(same, "x, velocity, taken", shapes, "the same (B, ...)")
    require(0 < eta < math.inf, "eta", eta, "a positive number")
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    x, v = x.to(dtype), velocity.to(dtype)
    now, after = (_level(level, x, name) for level, name in
                  ((sigma, "sigma"), (sigma_next, "sigma_next")))  # fmt: skip
    falling = bool(((now <= 1) & (now > after) & (after >= 0)).all())
    came = f"{now.flatten()[:1].tolist()} and {after.flatten()[:1].tolist()}"
    require(falling, "sigma, sigma_next", came, "1 >= sigma > sigma_next >= 0")
    known = sigma_max is not None and 0 < sigma_max < 1
    wanted = "a level below 1, to stand for it in the noise"
    require(known or bool((now < 1).all()), "sigma_max", sigma_max, wanted)
    dt = after - now
    below = now if sigma_max is None else now.masked_fill(now == 1, sigma_max)
    variance = eta**2 * now / (1 - below)
    mean = x * (1 + variance / (2 * now) * dt) + v * (1 + variance * (1 - now) / (2 * now)) * dt
    std = (variance * -dt).sqrt()
    if taken is None:
        noise = torch.randn(x.shape, dtype=dtype, device=x.device, generator=generator)
        taken = mean + std * noise
    step = taken.to(dtype).detach()
    density = -((step - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return FlowStep(step, density.flatten(1).mean(dim=1), mean, std)


def normalised_log_ratio(
    logp: Tensor, old_logp: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor
) -> Tensor:
    """(log π - log π_old + mean(Δ²)/(2 s²)) s = mean(ε Δ), (B,), of two `flow_sde_step`s.

    mean, old_mean: (B, ...), means of the same step; std: its s. On average 0 for steps of the old
    policy, and on the same scale at every noise level. Raises InputError for shapes.
    """
    fits = mean.shape == old_mean.shape and logp.shape == old_logp.shape == mean.shape[:1]
    came = [tuple(each.shape) for each in (logp, old_logp, mean, old_mean)]
    require(fits, "logp, old_logp, mean, old_mean", came, "(B,) twice and (B, ...) twice")
    require(std.numel() in {1, len(logp)}, "std", tuple(std.shape), "one, or one for each of B")
    moved = ((mean - old_mean.detach()) ** 2).flatten(1).mean(dim=1)
    s = std.detach().reshape(-1).expand_as(logp)
    return (logp - old_logp.detach() + moved / (2 * s**2)) * s


def flow_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    clip: float = 1e-4,
    max_advantage: float = 5.0,
    *,
    step_size: Tensor | None = None,
    trained: Tensor | None = None,
) -> PolicyLoss:
    """The mean of max(-A ρ, -A clip(ρ, 1 ± clip)) over the steps that are trained, ρ = e^log_ratio.

    log_ratio: (B, T) of the T steps of B samples; advantages: (B,), cut to ±max_advantage;
    step_size: (T,) or (B, T), |dt|, by which the loss of a step is divided (with
    `normalised_log_ratio`, as released); trained: (B, T), as `trained_steps`. Raises InputError for
    shapes, a step size that isn't positive and what `clipped_token_loss` refuses.

    >>> ratio = torch.tensor([[0.0, 0.1]], requires_grad=True)
    >>> loss, clipped = flow_policy_loss(ratio, torch.tensor([2.0]))
    >>> round(loss.item(), 4), clipped.item()
    (-2.0001, 0.5)
    """
    require(max_advantage > 0, "max_advantage", max_advantage, "a positive number")
    A = advantages.clamp(-max_advantage, max_advantage)
    loss, clipped = clipped_token_loss(log_ratio, torch.zeros_like(log_ratio), A, clip)
    mask = torch.ones_like(log_ratio) if trained is None else trained.to(log_ratio.dtype)
    shape = tuple(log_ratio.shape)
    require(tuple(mask.shape) == shape, "trained", tuple(mask.shape), f"{shape}, as log_ratio")
    require(bool(mask.any()), "trained", "no step", "at least one")
    if step_size is not None:
        fits = tuple(step_size.shape) in {shape, shape[1:]} and bool((step_size > 0).all())
        require(fits, "step_size", tuple(step_size.shape), f"positive, {shape[1:]} or {shape}")
        loss = loss / step_size
    return PolicyLoss(aggregate(loss, mask), (clipped * mask).sum() / mask.sum())


def trained_steps(
    samples: int,
    steps: int,
    share: float = 0.6,
    generator: torch.Generator | None = None,
    last: bool = False,
) -> Tensor:
    """Which steps of each sample are trained, bool (samples, steps): a random share, rounded down.

    last: may the last step be among them? Released: no, so that the share is of steps - 1.

    >>> trained_steps(4, 26).sum(dim=1).tolist()
    [15, 15, 15, 15]
    """
    among = steps if last else steps - 1
    kept = int(among * share) if 0 < share <= 1 else 0
    require(samples >= 1, "samples", samples, "at least 1")
    require(kept >= 1, "share", f"{share} of {among} steps", "at least one of them, at most all")
    order = torch.rand(samples, among, generator=generator).argsort(dim=1)
    chosen = torch.zeros(samples, steps, dtype=torch.bool)
    return chosen.scatter(1, order[:, :kept], True)


def group_noise(
    prompts: int,
    num_generations: int,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Initial noise (prompts · num_generations, *shape), the same for all samples of a prompt.

    A group then differs by what its steps did, not by where it began.

    >>> group_noise(2, 3, (4,)).unique(dim=0).shape
    torch.Size([2, 4])
    """
    require(min(prompts, num_generations) >= 1, "prompts", prompts, "one or more of each")
    noise = torch.randn((prompts, *shape), generator=generator)
    return noise.repeat_interleave(num_generations, dim=0)


def _level(level: Any, x: Tensor, name: str) -> Tensor:
    """A noise level for all (1, ..) or for each row (B, 1, ..)."""
    found = torch.as_tensor(level, dtype=x.dtype, device=x.device)
    fits = found.ndim == 0 or found.shape == x.shape[:1]
    require(fits, name, tuple(found.shape), f"a number, or {tuple(x.shape[:1])}")
    return found.reshape(-1, *([1] * (x.ndim - 1)))
