r"""Steering a diffusion by a reward without a tree: rollouts, weighted particles, guided means.

All aim at  π(x_0) ∝ p(x_0) exp(λ r(x_0))  for the chain p of `tree_proposals`, and spend their
network calls on n particles that go down the chain together.

    best_of_n          independent rollouts, the best one
    weighted_rollouts  independent rollouts, weighted by exp(λ r): self-normalised sampling
    particle_steering  particles weighted on the way by what they promise, v = r(x̂_0), resampled
    twisted_steering   its steps also lean towards the reward, TDS; tempered, DAS
    guided_rollouts    steps that lean and no weights, DPS

A particle after i steps has the potential "diff"  exp(λ γ_i v_i - λ γ_{i-1} v_{i-1})  or "max"
exp(λ max_{j ≤ i} v_j), and at the end what is missing of exp(λ r); so all weighted samples are
consistent as n grows. v is r at Tweedie's x̂_0 or at the end of a rollout without noise.

Singhal et al. 2025, arXiv 2501.06848 (Feynman-Kac steering, its potentials); Wu et al. 2023,
arXiv 2306.17775 (TDS); Kim, Kim and Park 2025, arXiv 2501.05803 (DAS); Chung et al. 2023,
arXiv 2209.14687 (DPS). As baselines of Jain et al. 2025, arXiv 2506.20701.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import smc
from scoredraw.arrays import is_tensor
from scoredraw.diffusion.time_grids import whole
from scoredraw.diffusion.tree_nodes import Reward, checked_reward, on_cpu
from scoredraw.diffusion.tree_proposals import MarkovChain
from scoredraw.errors import require

Float = NDArray[np.float64]
Gradient = Callable[[Any, int], Any]

POTENTIALS = ("diff", "max")
VALUES = ("tweedie", "rollout")


@dataclass(frozen=True, eq=False)
class Steered:
    """Particles x (n, *dims) at the data with log-weights and rewards (n,), and what they cost.

    log_z: estimate of log E exp(λ r). nfe: network calls of single samples.
    """

    x: Any
    log_weights: Float
    rewards: Float
    log_z: float
    nfe: int

    def best(self) -> tuple[Any, float]:
        """The particle of the highest reward, and that."""
        i = int(self.rewards.argmax())
        return self.x[i], float(self.rewards[i])

    def sample(self, n: int, rng: Any = None) -> Any:
        """n states (n, *dims), drawn by their weights."""
        return taken(self.x, smc.resample(self.log_weights, "systematic", rng, size=n))


def weighted_rollouts(
    chain: MarkovChain, reward: Reward, n: int, *, lam: float = 1.0, generator: Any = None
) -> Steered:
    """n independent rollouts with weights exp(λ r) p/q: self-normalised importance sampling.

    Consistent, unbiased for E exp(λ r). Row-local. n T calls.

    >>> from scoredraw.diffusion.tree_proposals import finite_chain
    >>> coin = finite_chain([0.5, 0.5], [[[1.0, 0.0], [0.0, 1.0]]])
    >>> found = weighted_rollouts(coin, lambda x: np.log([1.0, 3.0])[x], 4000, generator=0)
    >>> round(float(smc.self_normalized(found.log_weights, found.x)), 1), found.nfe
    (0.8, 4000)
    """
    _check(n, lam)
    source, x, ratio = chain.source(generator), None, np.zeros(n)
    for edge in range(len(chain.edges)):
        x, more = chain.run(x, edge, source, n=n)
        ratio += on_cpu(more, n)
    r = checked_reward(reward, x)
    weights = lam * r + ratio
    return Steered(x, weights, r, smc.log_mean_weight(weights), n * chain.steps)


def best_of_n(
    chain: MarkovChain, reward: Reward, n: int, *, generator: Any = None
) -> tuple[Any, float]:
    """The best of n independent rollouts and its reward; n T calls."""
    return weighted_rollouts(chain, reward, n, generator=generator).best()


def particle_steering(
    chain: MarkovChain,
    reward: Reward,
    n: int,
    *,
    lam: float = 1.0,
    potential: str = "diff",
    value: str = "tweedie",
    weigh_at: Collection[int] | None = None,
    ess_threshold: float = 0.5,
    scheme: str = "systematic",
    gradient: Gradient | str | None = None,
    strength: float = 1.0,
    tempering: Callable[[float], float] | None = None,
    generator: Any = None,
) -> Steered:
    """n particles that are weighted and resampled on their way: SMC, FK steering, TDS, DAS.

    potential: "diff" or "max". value: "tweedie", or "rollout", which costs all calls that are left.
    weigh_at: numbers of steps left at which particles are weighted; by default all, for rollouts
    those at which the chain branches. They are resampled where their effective size is below
    ess_threshold · n. gradient(x, i) -> ∇_x r(x̂_0(x)), or "autograd": steps lean by strength · λ γ
    times it, and weights hold p/q. tempering: γ of the share of steps made, in [0, 1] and 1 at the
    end; None: 1.

    Raises InputError for a chain without `predict` (a discrete one), options outside these, rewards
    that are NaN or +inf, and particles that are all without weight. A particle whose v is -inf on
    the way is given up. n T calls (a gradient's backward pass is not counted); memory O(n).
    Sequential.
    """
    _check(n, lam)
    require(potential in POTENTIALS, "potential", repr(potential), " or ".join(POTENTIALS))
    require(value in VALUES, "value", repr(value), " or ".join(VALUES))
    known = ", ".join(smc.SCHEMES)
    require(scheme in smc.SCHEMES, "scheme", repr(scheme), f"one of {known}")
    require(0 <= ess_threshold <= 1, "ess_threshold", ess_threshold, "a share in [0, 1]")
    require(chain.predict is not None, "chain", "one without x̂_0", "that of a diffusion")
    assert chain.predict is not None
    assert chain.move is not None
    assert chain.finish is not None
    T, rollout = chain.steps, value == "rollout"
    if weigh_at is None:
        weigh_at = [T - last for _, last in chain.edges[:-1]] if rollout else range(1, T + 1)
    random = chain.source(generator)
    x, log_z, calls = chain.prior(n, random), 0.0, 0
    weights, paid, highest = np.zeros(n), np.zeros(n), np.full(n, -np.inf)
    for i in range(T):
        gamma = 1.0 if tempering is None else float(tempering(i / T))
        x0, v, slope = _look(chain, reward, x, i, gradient, wanted=not rollout)
        calls += n
        if T - i in weigh_at:
            if rollout:
                v, calls = checked_reward(reward, chain.finish(x, i)), calls + n * (T - i)
            assert v is not None
            highest = np.maximum(highest, v)
            promise = lam * gamma * v if potential == "diff" else lam * gamma * highest
            with np.errstate(invalid="ignore"):
                more = promise - paid if potential == "diff" else promise
                paid = promise if potential == "diff" else paid + promise
                weights = np.where(weights == -np.inf, -np.inf, weights + more)
            if ess_threshold and smc.effective_size(weights) < ess_threshold * n:
                log_z += smc.log_mean_weight(weights)
                ids = smc.resample(weights, scheme, random)
                x, x0, slope = (taken(part, ids) for part in (x, x0, slope))
                weights, paid, highest = np.zeros(n), paid[ids], highest[ids]
        guide = None if slope is None else slope * (strength * lam * gamma)
        x = chain.move(x, i, x0, random, guide)
        if guide is not None:
            x, ratio = x
            weights = weights + on_cpu(ratio, n)
    r = checked_reward(reward, x)
    alive = weights > -np.inf
    weights[alive] += lam * r[alive] - paid[alive]
    return Steered(x, weights, r, log_z + smc.log_mean_weight(weights), calls)


def twisted_steering(
    chain: MarkovChain, reward: Reward, n: int, *, tempered: bool = False, **options: Any
) -> Steered:
    """TDS: particles whose steps lean along λ ∇r(x̂_0); tempered: DAS, γ_i = 2^{i/T} - 1.

    options: of `particle_steering`; gradient is "autograd" by default. DAS has γ from 0 at the
    noise, where x̂_0 says little, to 1 at the data, by its own geometric rule.
    """
    if tempered:
        options.setdefault("tempering", lambda share: 2.0**share - 1)
    return particle_steering(chain, reward, n, **{"gradient": "autograd"} | options)


def guided_rollouts(
    chain: MarkovChain,
    reward: Reward,
    n: int,
    *,
    lam: float = 1.0,
    strength: float = 1.0,
    gradient: Gradient | str = "autograd",
    generator: Any = None,
) -> Steered:
    """DPS: means that lean along strength · λ ∇r(x̂_0), equal weights: not consistent for π."""
    found = particle_steering(
        chain, reward, n, lam=lam, strength=strength, gradient=gradient, weigh_at=(),
        generator=generator,
    )  # fmt: skip
    return Steered(found.x, np.zeros(n), found.rewards, float("nan"), found.nfe)


def taken(x: Any, ids: Any) -> Any:
    """Rows of an array or tensor, wherever it is; None stays None."""
    if not is_tensor(x):
        return None if x is None else x[ids]
    return x[sys.modules["torch"].as_tensor(ids, device=x.device)]


def _look(
    chain: MarkovChain,
    reward: Reward,
    x: Any,
    i: int,
    gradient: Gradient | str | None,
    *,
    wanted: bool,
) -> tuple[Any, Float | None, Any]:
    """x̂_0, its reward if wanted, and the reward's gradient in x if asked for."""
    assert chain.predict is not None
    if isinstance(gradient, str):
        require(gradient == "autograd", "gradient", repr(gradient), "a function or 'autograd'")
        require(is_tensor(x), "gradient", f"'autograd' of a {type(x).__name__}", "a tensor")
        torch = sys.modules["torch"]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0 = chain.predict(leaf, i)
            r = reward(x0)
            slope = torch.autograd.grad(r.sum(), leaf)[0]
        x0 = x0.detach()
        return x0, checked_reward(lambda _: r.detach(), x0) if wanted else None, slope
    x0 = chain.predict(x, i)
    slope = None if gradient is None else gradient(x, i)
    return x0, checked_reward(reward, x0) if wanted else None, slope


def _check(n: int, lam: float) -> None:
    whole(n, "n", 1)
    require(0 < lam < np.inf, "lam", lam, "a positive number")
