r"""Feynman-Kac correctors: what to add to mixed scores so that they sample what they should.

Scores of pretrained diffusions are mixed every day: β s for a lower temperature, s₁ + s₂ for what
both like, (1-β) s₁ + β s₂ for guidance. At each noise level the mixture is the score of

    p_t  ∝  Π_i q_i,t^{β_i} · exp(b_t r)

but no process has these as its marginals, and what comes out is something else. A weighted SDE
has them. In sampling time τ, from noise to data, with S = Σ β_i s_i, noise scale ζ and the forward
process dx = f dt + σ dW of `NoiseSchedule` (f linear in x, d entries a sample),

    dx = [-f + σ² (1 + ζ²)/2 · S + σ² ζ²/2 · b ∇r] dτ + ζ σ dW
    dw = [(Σβ_i - 1) ∇·f + σ²/2 (|S|² - Σ β_i |s_i|²)
          + b (σ²/2 <∇r, S> - <∇r, f>) + b' r + Σ β_i' log q_i] dτ

and Σ_k softmax(w)_k φ(x_k) estimates E[φ]; the mean of exp(w) estimates ∫Π q_i,0^β_i over the same
at the noise end. The weights do not depend on ζ: it is 1 for the noise of the forward process,
1/sqrt(β) for "tempered" noise, 0 for the probability-flow ODE, and above 1 every step holds a
Langevin correction. A reward without a gradient is left out of dx and weighs by the difference of
b r along the path. `Target` says what is wanted, `rates` is the formula, `weighted_sampling` runs.

Skreta, Akhound-Sadegh, Ohanesian, Bondesan, Aspuru-Guzik, Doucet, Brekelmans, Tong and Neklyudov,
"Feynman-Kac correctors in diffusion", ICML 2025, arXiv 2503.02819.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.errors import require

Float = NDArray[np.float64]
OfTime = Callable[[float], float]
RewardFunction = Callable[[Any, float], Any]

NOISES = ("target", "tempered")


@dataclass(frozen=True)
class Target:
    """Π_i q_i^{β_i} exp(b r): the powers of the experts, the noise, and a reward with its strength.

    Made by `anneal`, `product` and `guidance`, then `raised` and `tilted`:

        Target.guidance(3.0).raised(0.8).tilted(reward, gradient)

    >>> Target.guidance(3.0).raised(0.5).powers_at(0.7).tolist()
    [-1.0, 1.5]
    """

    powers: tuple[float | OfTime, ...]
    noise_scale: float = 1.0
    reward: RewardFunction | None = None
    gradient: RewardFunction | None = None
    strength: float | OfTime = 1.0

    @classmethod
    def anneal(cls, beta: float | OfTime, noise: str | float = "target") -> Target:
        """q^β, the data at temperature 1/β.

        beta: a positive number, or a function of time. noise: "target", "tempered" or a number a of
        the family between (0 and 1/2) and beyond, drift -f + (β + (1-β) a) σ² s and
        ζ² = 1 + 2 (1-β) a/β; these need a constant β. Raises InputError for others, and ζ² < 0.

        >>> round(Target.anneal(4.0, noise="tempered").noise_scale, 9)
        0.5
        """
        if callable(beta):
            require(noise == "target", "noise", repr(noise), "'target' where beta is a function")
            return cls((beta,))
        _positive("beta", beta)
        share = {"target": 0.0, "tempered": 0.5}.get(noise) if isinstance(noise, str) else noise
        require(share is not None, "noise", repr(noise), f"a number or one of {', '.join(NOISES)}")
        return cls((float(beta),), family_noise_scale(beta, float(share or 0.0)))

    @classmethod
    def product(cls, *betas: float | OfTime) -> Target:
        """Π q_i^{β_i}: what all experts find likely. product(1, 1) is q_1 q_2.

        betas: numbers >= 0, not all 0, or functions of time.
        """
        require(len(betas) > 0, "betas", "none", "the power of every expert")
        fixed = [_power(f"betas[{i}]", beta) for i, beta in enumerate(betas) if not callable(beta)]
        some = len(fixed) < len(betas) or sum(fixed) > 0
        require(some, "betas", "zeros", "a positive power")
        return cls(betas)

    @classmethod
    def guidance(cls, *betas: float) -> Target:
        """q_1^{1 - Σβ} Π q_{i+1}^{β_i}: classifier-free guidance, the unconditional expert first.

        betas: numbers >= 0, one a condition. With Σβ > 1 the target need not be normalisable:
        `guidance_bias.gaussian_target` says so for Gaussians.
        """
        require(len(betas) > 0, "betas", "none", "the scale of every condition")
        scales = [_power(f"betas[{i}]", beta) for i, beta in enumerate(betas)]
        return cls((1 - sum(scales), *scales))

    def raised(self, power: float) -> Target:
        """(Π q_i^{β_i})^power, the same at another temperature; before `tilted`."""
        _positive("power", power)
        require(self.reward is None, "power", "a tilted target", "one without a reward")
        return replace(self, powers=tuple(_times(beta, power) for beta in self.powers))

    def tilted(
        self,
        reward: RewardFunction,
        gradient: RewardFunction | str | None = None,
        strength: float | OfTime = 1.0,
    ) -> Target:
        """This times exp(b r).

        reward(x, t): (N,) of states (N, *dims). gradient(x, t): ∇r, shaped as x, which takes a part
        in the drift (the reward must then not depend on t); "autograd" differentiates a reward of
        tensors; None weighs by b' r(x', t') - b r(x, t) alone, for any function of x and t.
        strength: b, or a function of time: see `ramp`. What b r is at the noise end the first
        weights hold.
        """
        require(self.reward is None, "reward", "a second one", "one: add them up")
        if isinstance(gradient, str):
            require(gradient == "autograd", "gradient", repr(gradient), "a function or 'autograd'")
            gradient = autograd(reward)
        return replace(self, reward=reward, gradient=gradient, strength=strength)

    def with_noise(self, noise_scale: float) -> Target:
        """The same sampled with ζ = noise_scale >= 0."""
        good = bool(np.isfinite(noise_scale)) and noise_scale >= 0
        require(good, "noise_scale", noise_scale, "a number >= 0")
        return replace(self, noise_scale=float(noise_scale))

    @property
    def moving(self) -> bool:
        """Whether a power depends on time, so that log-densities are needed."""
        return any(callable(beta) for beta in self.powers)

    def powers_at(self, t: float) -> Float:
        """β_i at a time, (k,)."""
        values = np.array([b(t) if callable(b) else b for b in self.powers], np.float64)
        came = f"{values.tolist()} at t = {t:g}"
        require(bool(np.isfinite(values).all()), "powers", came, "finite powers")
        return values

    def strength_at(self, t: float) -> float:
        """b at a time."""
        value = self.strength(t) if callable(self.strength) else self.strength
        require(bool(np.isfinite(value)), "strength", f"{value} at t = {t:g}", "a finite number")
        return float(value)


def family_noise_scale(beta: float, a: float) -> float:
    """ζ = sqrt(1 + 2 (1-β) a/β): 1 at a = 0, 1/sqrt(β) at a = 1/2. InputError where ζ² < 0.

    >>> family_noise_scale(4.0, 0.5)
    0.5
    """
    square = 1 + 2 * (1 - beta) * a / beta
    wanted = f"an a with 1 + 2 (1-β) a/β >= 0 for β = {beta:g}"
    require(bool(np.isfinite(square)) and square >= -1e-12, "noise", f"a = {a:g}", wanted)
    return float(np.sqrt(max(square, 0.0)))


def ramp(schedule: NoiseSchedule, final: float = 1.0, power: float = 1.0) -> OfTime:
    """b(t) = final · ((t_start - t)/(t_start - t_end))^power: 0 at the noise, `final` at the data.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> b = ramp(LinearBeta().with_ends(t_end=0.0), 2.0)
    >>> b(1.0), b(0.5), b(0.0)
    (0.0, 1.0, 2.0)
    """
    _positive("power", power)
    start, end = schedule.ends.t_start, schedule.ends.t_end
    return lambda t: final * min(max((start - t) / (start - end), 0.0), 1.0) ** power


def autograd(reward: RewardFunction) -> RewardFunction:
    """∇r of a reward of tensors, by differentiating Σ_k r(x_k)."""

    def gradient(x: Any, t: float) -> Any:
        require(is_tensor(x), "gradient", f"a {type(x).__name__}", "a tensor for 'autograd'")
        import torch

        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(reward(leaf, t).sum(), leaf)[0]

    return gradient


# ── the formula ─────────────────────────────────────────────────────────────────────────────────


class Rates(NamedTuple):
    """The weighted SDE at a state: dx/dτ (N, *dims), noise per sqrt(dτ), dw/dτ (N,) float64."""

    drift: Any
    noise: float
    growth: Any


def rates(
    target: Target,
    schedule: NoiseSchedule,
    x: Any,
    scores: Sequence[Any],
    t: float,
    t_next: float,
    *,
    at: float | None = None,
    reward: Any = None,
    gradient: Any = None,
    log_q: Any = None,
) -> Rates:
    """Drift, noise and weight rate of the weighted SDE of `target` on the step from t to t_next.

    x, each of `scores` and `gradient` (∇r): (N, *dims). reward: (N,). log_q: (k, N), needed where
    powers move. How powers and strength change is their difference over the step; everything else
    is taken at time `at`, t by default. A reward without a gradient is not in it. Constants of w
    are kept: log Z needs them. Raises InputError for t_next >= t, another number of scores than
    powers, and scores that differ in shape from x. O(k² N d).

    >>> from scoredraw.diffusion.schedules import VarianceExploding
    >>> x = np.array([[1.0], [2.0]])  # a Gaussian whose variance is now 4, raised to the power 3
    >>> step = rates(Target.anneal(3.0), VarianceExploding(), x, [-x / 4], 1.0, 0.9)
    >>> step.drift.ravel().tolist(), step.growth.tolist()
    ([-1.5, -3.0], [0.375, 1.5])
    """
    require(t_next < t, "t_next", f"{t_next:g}", f"a time below t = {t:g}")
    now, dt = t if at is None else at, t - t_next
    beta = target.powers_at(now)
    require(len(scores) == len(beta), "scores", len(scores), f"{len(beta)}, one for every power")
    for i, score in enumerate(scores):
        same = tuple(score.shape) == tuple(x.shape)
        require(same, f"scores[{i}]", tuple(score.shape), f"the shape of x, {tuple(x.shape)}")
    f, variance = float(schedule.drift(now)), float(schedule.diffusion(now))
    square = target.noise_scale**2
    S = mixed(beta, scores)
    drift = S * (0.5 * variance * (1 + square)) - x * f
    dimension = int(np.prod(x.shape[1:]))
    growth = squares_gap(beta, scores) * (0.5 * variance) + (beta.sum() - 1) * f * dimension
    if gradient is not None:
        b = target.strength_at(now)
        slope = (target.strength_at(t_next) - target.strength_at(t)) / dt
        drift = drift + gradient * (0.5 * variance * square * b)
        growth = growth + b * (0.5 * variance * dot(gradient, S) - f * dot(gradient, x))
        growth = growth + slope * reward
    if target.moving:
        require(log_q is not None, "log_q", None, "log-densities (k, N), as powers move")
        slopes = (target.powers_at(t_next) - target.powers_at(t)) / dt
        growth = growth + sum(float(c) * one for c, one in zip(slopes, log_q, strict=True))
    return Rates(drift, float(np.sqrt(square * variance)), growth)


def mixed(beta: Float, scores: Sequence[Any]) -> Any:
    """S = Σ β_i s_i."""
    return sum(score * float(b) for b, score in zip(beta, scores, strict=True))


def squares_gap(beta: Float, scores: Sequence[Any]) -> Any:
    """|Σ β_i s_i|² - Σ β_i |s_i|², (N,) float64.

    As (Σβ - 1) Σ β_i |s_i|² - Σ_{i<j} β_i β_j |s_i - s_j|², which loses no digits where Σβ = 1 and
    the experts nearly agree.
    """
    total = sum(
        dot(score, score) * (float(beta.sum() - 1) * float(b))
        for b, score in zip(beta, scores, strict=True)
    )
    for (i, a), (j, b) in itertools.combinations(enumerate(scores), 2):
        total = total - dot(a - b, a - b) * float(beta[i] * beta[j])
    return total


def log_density_change(
    schedule: NoiseSchedule, x: Any, x_next: Any, score: Any, t: float, t_next: float
) -> Any:
    """log q_{t'}(x') - log q_t(x) of an expert along a path with noise scale ζ = 1, (N,) float64.

    Itô's formula, in which for this noise the Laplacian of log q cancels, whatever the drift:

        d log q = (∇·f + <f, s> - σ²/2 |s|²) dτ + <s, dx>

    Off by O(sqrt dτ) a unit of time; other noise scales would need the Laplacian.
    """
    f, variance = float(schedule.drift(t)), float(schedule.diffusion(t))
    dimension = int(np.prod(x.shape[1:]))
    slow = f * (dimension + dot(x, score)) - 0.5 * variance * dot(score, score)
    return slow * (t - t_next) + dot(score, x_next - x)


def dot(a: Any, b: Any) -> Any:
    """<a_k, b_k> of every sample, (N,) float64."""
    if is_tensor(a):
        return (a.double() * b.double()).flatten(1).sum(dim=1)
    rows = len(a), -1
    return np.einsum("ni,ni->n", a.reshape(rows), b.reshape(rows), dtype=np.float64)


# ── arguments ───────────────────────────────────────────────────────────────────────────────────


def _positive(name: str, value: float) -> None:
    require(bool(np.isfinite(value)) and value > 0, name, value, "a positive number")


def _power(name: str, value: Any) -> float:
    require(bool(np.isfinite(value)) and value >= 0, name, value, "a number >= 0")
    return float(value)


def _times(beta: float | OfTime, power: float) -> float | OfTime:
    if callable(beta):
        return lambda t: power * beta(t)
    return power * beta
