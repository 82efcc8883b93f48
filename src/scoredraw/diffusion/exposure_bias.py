"""Exposure bias: how it is measured, and two ways to lessen it that do without shifting times.

A network is trained on x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and asked about x̂_t, which earlier
steps have made. Measures, over times t:

    variance gap    E var(x̂_t) - E var(x_t), the variance of a sample over its own entries
    eps ratio       E |eps(x̂_t, t)| / E |eps(x_t, t)|: above 1 where too much noise is seen
    coupling        E |x_0 - (x̂ - sqrt(1 - abar_τ) eps(x̂, τ)) / sqrt(abar_τ)|²: how badly x̂, made
                    from x_0, is denoised as a sample of time τ; the time at which x̂ should be
                    shown is that of the least

Remedies, which wrap an eps_fn:

    epsilon scaling         eps / λ_i,  λ_i = constant + slope · i at step i
    variance normalising    eps(x sqrt(v_t / var(x)), t),  v_t = 1 - abar_t (+ abar_t v_0)

Ning, Li, Su, Salah and Ertugrul, "Elucidating the exposure bias in diffusion models", ICLR 2024,
arXiv 2308.15321 (epsilon scaling, the eps ratio); Li, Qu, Yao, Sun and Moens, ICLR 2024, arXiv
2305.15583 (variances, the loss by time, and variance normalising in its program).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.parameterisations import as_times, per_sample, to_x0
from scoredraw.diffusion.pseudo_numerical import EpsFunction, PseudoNumericalState
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import TimeShift, sample_variance
from scoredraw.errors import require

Float = NDArray[np.float64]


# ------------------------------------------------------------------ remedies


def epsilon_scaling(
    eps_fn: EpsFunction, constant: float = 1.0, slope: float = 0.0, times: Any = None
) -> EpsFunction:
    """eps_fn with its answers divided by λ_i = constant + slope · i at step i.

    constant: the published ones lie between 1.001 and 1.02. slope: needs times, those of the calls,
    decreasing; i counts those above t (0 at the first call), also for shifted times.
    Raises InputError unless every λ is positive, or where slope comes without times.
    Ning et al. 2024, arXiv 2308.15321.

    >>> scaled = epsilon_scaling(lambda x, t: x, 2.0, 1.0, times=[9, 5, 1])
    >>> scaled(np.ones((3, 1)), np.array([9, 5, 1])).round(3).ravel().tolist()
    [0.5, 0.333, 0.25]
    """
    require(times is not None or slope == 0, "times", None, "the times of the calls, for a slope")
    grid = np.zeros(1) if times is None else as_times(times)
    falling = grid.ndim == 1 and grid.size >= 1 and bool((np.diff(grid) < 0).all())
    require(falling, "times", f"shape {grid.shape}", "decreasing times")
    least = min(constant, constant + slope * (grid.size - 1))
    require(0 < least < np.inf, "constant, slope", f"a scale of {least:g}", "positive scales")
    upwards = np.sort(grid)

    def scaled(x: Any, t: Any) -> Any:
        later = grid.size - np.searchsorted(upwards, as_times(t), side="right")
        scale: Float = np.asarray(constant + slope * later, np.float64)
        return eps_fn(x, t) / per_sample(scale, x)

    return scaled


def variance_normalise(
    x: Any,
    t: Any,
    alphas_cumprod: Any,
    target: str = "plain",
    data_variance: float | None = None,
) -> Any:
    """x (B, *dims) scaled so that each sample's variance is that of its time t, one or (B,).

    v_t = 1 - abar_t, or with target="matched" 1 - abar_t + abar_t v_0, v_0 = data_variance; linear
    between whole times, such as at F-PNDM's middles. Raises InputError as `TimeShift` does, for
    times outside 0 .. T - 1 and for a sample without variance.

    >>> x = np.random.default_rng(0).normal(size=(2, 100))
    >>> y = variance_normalise(x, [0, 1], [0.9, 0.5])
    >>> y.var(axis=1, ddof=1).round(9).tolist()
    [0.1, 0.5]
    """
    levels = TimeShift(alphas_cumprod, 0, 0, target, data_variance).variances
    return _normalised(x, t, levels)


def _normalised(x: Any, t: Any, levels: Float) -> Any:
    found = as_times(sample_variance(x))
    require(bool((found > 0).all()), "x", "a sample without variance", "variances above 0")
    times, last = as_times(t), len(levels) - 1
    inside = bool(((times >= 0) & (times <= last)).all())
    require(inside, "t", times.tolist(), f"times from 0 to {last}")
    return x * per_sample(np.sqrt(np.interp(times, np.arange(last + 1.0), levels) / found), x)


def variance_normalising(
    eps_fn: EpsFunction,
    alphas_cumprod: Any,
    target: str = "plain",
    data_variance: float | None = None,
) -> EpsFunction:
    """eps_fn asked about states that `variance_normalise` has scaled.

    >>> seen = variance_normalising(lambda x, t: x, [0.9, 0.5])
    >>> seen(np.array([[-1.0, 1.0]]), np.array([1])).round(9).tolist()
    [[-0.5, 0.5]]
    """
    levels = TimeShift(alphas_cumprod, 0, 0, target, data_variance).variances
    return lambda x, t: eps_fn(_normalised(x, t, levels), t)


# ------------------------------------------------------------------ measures


def _noised(data: Any, t: int, schedule: DiscreteAlphas, noise: Any) -> Any:
    require(noise.shape == data.shape, "noise", tuple(noise.shape), f"{tuple(data.shape)}, as data")
    return schedule.perturb(data, float(t), noise)


def variance_gap(
    states: Sequence[PseudoNumericalState], data: Any, schedule: DiscreteAlphas
) -> Float:
    """E var(x̂) - E var(x_t) for each state, at its nominal time, float64 (N,).

    states: of a sampler whose times were not shifted. data: samples (n, *dims), n >= 1, of which
    the exact mean variance at t is 1 - abar + abar v_0. Li et al. 2024, arXiv 2305.15583.
    """
    v0 = float(sample_variance(data).mean())
    found = np.array([float(sample_variance(s.x).mean()) for s in states])
    abar = schedule.abar([float(s.times[0]) for s in states])
    return np.asarray(found - (1 - abar + abar * v0))


def eps_ratio(
    eps_fn: EpsFunction,
    states: Sequence[PseudoNumericalState],
    data: Any,
    noise: Any,
    schedule: DiscreteAlphas,
) -> Float:
    """E |eps(x̂_t, t)| / E |eps(x_t, t)| for each state, float64 (N,).

    states: as in `variance_gap`, above the data. data, noise: (n, *dims), from which x_t is made
    at every time. Two calls a state. Ning et al. 2024, arXiv 2308.15321.
    """
    found = []
    for state in states:
        t = int(state.times[0])
        sampled = _mean_norm(eps_fn(state.sample, _times(t, state.x)))
        trained = _mean_norm(eps_fn(_noised(data, t, schedule, noise), _times(t, data)))
        found.append(sampled / trained)
    return np.array(found)


def _times(t: int, x: Any) -> Any:
    """The time of all samples of x, where x is."""
    if is_tensor(x):
        return x.new_full((len(x),), t).long()
    return np.full(len(x), t)


def _mean_norm(eps: Any) -> float:
    flat = np.asarray(on_host(eps), np.float64).reshape(len(eps), -1)
    return float(np.linalg.norm(flat, axis=1).mean())


def coupling_losses(
    eps_fn: EpsFunction, x: Any, x0: Any, times: Any, schedule: DiscreteAlphas
) -> Float:
    """mean |x_0 - (x - sigma_τ eps(x, τ)) / alpha_τ|² over a sample's entries, for τ in times (K,).

    x: states (B, *dims) that a sampler's steps have made from noised x_0 (B, *dims). float64
    (K, B). A perfect eps gives E[x_0 | x_τ = x], so that the mean over samples is least at the time
    to which the states belong; the loss of eps itself always falls with τ. K calls. After Li et al.
    2024, arXiv 2305.15583.

    >>> schedule = DiscreteAlphas([0.9, 0.5, 0.1])
    >>> perfect = lambda x, t: (x - schedule.alpha(1) * 2) / schedule.sigma(1)
    >>> x0 = np.full((1, 2), 2.0)
    >>> coupling_losses(perfect, np.ones((1, 2)), x0, [1], schedule).round(12).tolist()
    [[0.0]]
    """
    require(x.shape == x0.shape, "x0", tuple(x0.shape), f"{tuple(x.shape)}, as x")
    asked = as_times(times)
    inside = asked.ndim == 1 and bool(((asked >= 0) & (asked % 1 == 0)).all())
    require(inside and asked.size >= 1, "times", asked.tolist(), "(K,) whole times >= 0, K >= 1")
    losses = []
    for t in asked.astype(np.int64).tolist():
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        shown = to_x0(eps_fn(x, _times(t, x)), x, alpha, sigma)
        error = np.asarray(on_host(shown - x0), np.float64)
        losses.append(np.square(error).reshape(len(error), -1).mean(axis=1))
    return np.stack(losses)
