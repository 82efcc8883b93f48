r"""Running the weighted SDEs of `feynman_kac`: particles, their weights, and their resampling.

Every step moves N particles by Euler-Maruyama (or Heun) and adds to their log-weights,

    x += v dτ + ζ σ sqrt(dτ) ε,    a += g dτ,

and now and then resamples: particles of much weight are copied, those of little dropped, and the
weights set back to one. Without resampling the weights do all the work at the end (plain importance
sampling), and without weights it is the usual sampler of mixed scores; both are the baselines here.

How well N particles do depends on the noise scale ζ though the weights do not. The weights of
annealing are quadratic in x, and with "tempered" noise each mode comes out too narrow at any N one
can pay for; ζ >= 1 is the better choice, and ζ² of 4 or 10 with smaller steps is the best.

Skreta et al., "Feynman-Kac correctors in diffusion", ICML 2025, arXiv 2503.02819.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import smc
from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.feynman_kac import Rates, Target, dot, log_density_change, rates
from scoredraw.diffusion.parameterisations import PREDICTIONS, to_eps
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.states import EpsFunction, accumulator, cast, checked_start, is_finite
from scoredraw.diffusion.time_grids import checked_times, time_grid, whole
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]

INTEGRATORS = ("euler", "heun")
BIRTH_DEATH = "birth_death"
RESAMPLERS = (*smc.SCHEMES, BIRTH_DEATH)
COLLAPSED = 1.5  # an effective size below this is one particle
DIVERGED = 1e4  # times the size of the first states


@dataclass(frozen=True, eq=False)
class Particles:
    """Where the particles stand after `index` steps, and what they weigh.

    x: (N, *dims), in float32 where the samples are half. log_weights: (N,) float64, since the last
    resampling. log_z: what the resamplings before gathered. ancestors: (N,) the first particle each
    comes from. ess, n_unique: effective size before the last resampling, and how many particles it
    kept. log_q: (k, N), of experts whose power moves. worth: (N,) b r.
    """

    x: Any
    log_weights: Any
    index: int
    log_z: float
    ancestors: NDArray[np.int64]
    ess: float
    n_unique: int
    dtype: Any
    log_q: Any = None
    worth: Any = None
    clock: smc.BirthDeathState | None = None

    @property
    def sample(self) -> Any:
        """x in the dtype of the samples."""
        return cast(self.x, self.dtype)


@dataclass(frozen=True, eq=False)
class WeightedSample:
    """Particles at the data end, x (N, *dims), with log-weights (N,), and how they got there.

    log_z: estimate of log(∫ target at the data / ∫ target at the noise end). ess, n_unique: (T,),
    effective size at every step and number of particles its resampling kept. ancestors: (N,).
    """

    x: Any
    log_weights: Any
    log_z: float
    ess: Float
    n_unique: NDArray[np.int64]
    ancestors: NDArray[np.int64]

    def estimate(self, values: Any) -> Any:
        """Self-normalised estimate Σ softmax(log_weights)_k φ_k of E[φ]; values: (N, ...)."""
        return smc.self_normalized(self.log_weights, values)

    def equally_weighted(self, rng: Any = None, scheme: str = "systematic") -> Any:
        """x resampled by the weights that are left: (N, *dims)."""
        return self.x[smc.resample(self.log_weights, scheme, rng)]


class WeightedSampler:
    """Sample a `Target` of one or several diffusions with weighted particles.

    schedule: a `NoiseSchedule` of any kind. num_steps: T; times uniform in t unless `grid`,
        `grid_power` (as in `time_grid`) or `times` say otherwise: EDM models go well with
        `VarianceExploding()`, grid="rho" and 30 to 100 steps.
    integrator: "euler" (Euler-Maruyama, one call a step), or "heun" (two, second order without
        noise: with noise scale 0 the sampler of EDM).
    resampler: a scheme of `smc.SCHEMES`, "birth_death" (a jump process that keeps weights equal,
        `births` as in `smc.BirthDeath`), or None: weights gather to the end.
    ess_threshold: resample only when the effective size is below this share of N; else every
        `interval` steps, and after the last step only if `resample_last`.
    start_resampling_step: the particles neither move nor weigh in the steps before it.
    clip_weights: c: a step's log-weights, less their mean, are held in [-c, c] (released EDM code:
        1 with noise, 2 for Heun); clip_score_norm: the largest |s_i| (released code: 1000). Both
        bias, log Z too, and are off.
    prediction: what the models return, as in `parameterisations`: "epsilon", "score", ...
    log_densities: exact log q_i(x, t) of the experts, for powers that move; without them they are
        followed by Itô's formula, which needs noise scale 1.

    `sampler.sample(eps_fns, x_T, rng)` runs all; `init` and `step` run one by one. eps_fns: one
    model or several, in the order of the target's powers: eps(x, t) of states (N, *dims) and a
    float. Arrays and tensors keep kind, device and dtype; rng is a seed, a NumPy generator or a
    `torch.Generator`. Run under `torch.no_grad()` unless gradients are wanted.

    Raises InputError before any call for options that make no sense, fewer than 2 particles and
    another number of models than powers; on the way for an answer of a model, a reward or its
    gradient of the wrong shape or with NaN or infinity, and for states that overflow, naming the
    step. Warns where one particle holds all the weight, or states grow without bound, as those of
    a target that can't be normalised do.

    Time: T k calls; memory: the state and k answers. Sequential. Skreta et al. 2025,
    arXiv 2503.02819.

    >>> from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
    >>> from scoredraw.diffusion.schedules import VarianceExploding
    >>> schedule = VarianceExploding(0.01, 10.0, time="geometric")
    >>> data = GaussianMixtureScore([1.0], [[0.0]], [[[1.0]]], schedule)
    >>> sampler = WeightedSampler(schedule, Target.anneal(2.0), 200, ess_threshold=0.5)
    >>> found = sampler.sample(data.eps, sampler.draw_prior((4000, 1), rng=0), rng=1)
    >>> round(float(found.estimate(found.x**2)[0]), 1)  # 1/2; without weights 1/3
    0.5
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        target: Target,
        num_steps: int = 500,
        *,
        noise_scale: float | None = None,
        integrator: str = "euler",
        resampler: str | None = "systematic",
        ess_threshold: float | None = None,
        interval: int = 1,
        resample_last: bool = False,
        births: str = "instantaneous",
        start_resampling_step: int = 0,
        clip_weights: float | None = None,
        clip_score_norm: float | None = None,
        prediction: str = "epsilon",
        log_densities: Sequence[Callable[[Any, float], Any]] | None = None,
        grid: str = "t",
        grid_power: float | None = None,
        times: Any = None,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> None:
        self.schedule = schedule
        self.target = target if noise_scale is None else target.with_noise(noise_scale)
        self.integrator = _one_of("integrator", integrator, INTEGRATORS)
        self.resampler = None if resampler is None else _one_of("resampler", resampler, RESAMPLERS)
        self.interval = whole(interval, "interval", 1)
        self.ess_threshold = _positive_or_none("ess_threshold", ess_threshold)
        self.clip_weights = _positive_or_none("clip_weights", clip_weights)
        self.clip_score_norm = _positive_or_none("clip_score_norm", clip_score_norm)
        self.resample_last = resample_last
        self.births = smc.BirthDeath(births)
        every = self.interval == 1 and ess_threshold is None
        came = "birth_death with interval or ess_threshold"
        wanted = "a scheme that resamples at times"
        require(every or resampler != BIRTH_DEATH, "resampler", came, wanted)
        self.prediction = _one_of("prediction", prediction, PREDICTIONS)
        count = len(target.powers)
        right = log_densities is None or len(log_densities) == count
        require(right, "log_densities", len(log_densities or ()), f"{count}, one a power")
        self.log_densities = log_densities
        ito = not target.moving or log_densities is not None or self.target.noise_scale == 1
        wanted = "1 where powers move and there are no log_densities"
        require(ito, "noise_scale", self.target.noise_scale, wanted)
        if times is None:
            if grid == "t" and grid_power is None:
                grid_power = 1.0
            times = time_grid(schedule, num_steps, grid, grid_power, t_start=t_start, t_end=t_end)
        self.times = checked_times(schedule, times)
        self.start = whole(start_resampling_step, "start_resampling_step", 0)
        wanted = f"fewer than the {self.num_steps} steps"
        require(self.start < self.num_steps, "start_resampling_step", self.start, wanted)
        require(schedule.ends.last == "stop", "schedule.ends.last", schedule.ends.last, "'stop'")

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Calls of each model that `sample` makes."""
        return (self.num_steps - self.start) * (2 if self.integrator == "heun" else 1)

    def draw_prior(self, shape: tuple[int, ...], rng: Any = None) -> Any:
        """First states (N, *dims): N(0, s²/Σβ I), s the schedule's `prior_std`.

        An array in float64, or a float32 tensor where rng is a `torch.Generator`.
        """
        total = float(self.target.powers_at(self.times[0]).sum())
        require(total > 0, "target", f"powers that sum to {total:g}", "a positive sum")
        noise = _normal(shape, rng)
        return noise * (float(self.schedule.prior_std) / total**0.5)

    def init(self, x_T: Any, rng: Any = None) -> Particles:
        """Particles at the noise end. x_T: floating (N, *dims), N >= 2, finite."""
        x = checked_start(x_T)
        shape = tuple(x.shape)
        require(len(shape) >= 2 and 0 not in shape[1:], "x_T", shape, "(N, *dims)")
        require(shape[0] >= 2, "x_T", f"{shape[0]} particles", "2 or more")
        dtype, x = x.dtype, accumulator(x)
        log_weights = dot(x, x) * 0.0
        log_q = worth = None
        if self.target.moving:
            scale, size = self.schedule.prior_std, int(np.prod(shape[1:]))
            start = dot(x, x) * (-0.5 / scale**2) - size * np.log(scale * np.sqrt(2 * np.pi))
            log_q = [start] * len(self.target.powers)
        if self.target.reward is not None:
            worth = self._worth(x, dtype, 0)
            log_weights = worth
        everyone, N = np.arange(shape[0]), shape[0]
        state = Particles(x, log_weights, 0, 0.0, everyone, float(N), N, dtype, log_q, worth)
        if self.resampler == BIRTH_DEATH:  # starts from equal weights
            source = _source(rng, x)
            ids = smc.resample(log_weights, "systematic", source)
            state = replace(
                state,
                clock=self.births.init(N, source),
                log_z=smc.log_mean_weight(log_weights),
            )
            state = _take(state, ids, log_weights * 0.0)
        return state

    def step(
        self, state: Particles, eps_fns: EpsFunction | Sequence[EpsFunction], rng: Any = None
    ) -> Particles:
        """The particles one time further on: moved, weighed and, where it is time, resampled."""
        i, T = state.index, self.num_steps
        require(i < T, "state", f"one after the last of {i} steps", "an earlier one")
        models = self._models(eps_fns)
        if i < self.start:
            return replace(state, index=i + 1)
        rng = _source(rng, state.x)
        t, t_next = float(self.times[i]), float(self.times[i + 1])
        scores = self._scores(models, state.x, state.dtype, i, t)
        log_q = self._log_q(state, t)
        first = self._rates(state.x, state.dtype, scores, i, t, log_q)
        drift, noise, growth = first
        dt = t - t_next
        kick: Any = 0.0
        if noise > 0:
            kick = _normal(tuple(state.x.shape), rng, state.x) * (noise * dt**0.5)
        x = state.x + drift * dt + kick
        _checked(x, "x", x, f"at step {i} (t = {t:g})")
        if self.integrator == "heun":
            again = self._scores(models, x, state.dtype, i, t_next)
            second = self._rates(x, state.dtype, again, i, t, log_q, t_next)
            x = state.x + (drift + second.drift) * (0.5 * dt) + kick
            growth = 0.5 * (growth + second.growth)
        gained = growth * dt
        if log_q is not None and self.log_densities is None:
            log_q = [
                q + log_density_change(self.schedule, state.x, x, score, t, t_next)
                for q, score in zip(log_q, scores, strict=True)
            ]
        worth = state.worth
        if worth is not None and self.target.gradient is None:
            worth = self._worth(x, state.dtype, i + 1)
            gained = gained + (worth - state.worth)
        moved = replace(state, x=x, index=i + 1, log_q=log_q, worth=worth)
        return self._weigh(moved, self._clipped(gained), dt, rng)

    def sample(
        self, eps_fns: EpsFunction | Sequence[EpsFunction], x_T: Any, rng: Any = None
    ) -> WeightedSample:
        """All steps from x_T, which `draw_prior` gives; init and every step draw from rng."""
        rng = _source(rng, x_T)
        state = self.init(x_T, rng)
        ess, kept = np.empty(self.num_steps), np.empty(self.num_steps, np.int64)
        limit = DIVERGED * max(_size(state.x), 1e-30)
        warned = False
        for i in range(self.num_steps):
            state = self.step(state, eps_fns, rng)
            ess[i], kept[i] = state.ess, state.n_unique
            grown = not warned and _size(state.x) > limit
            if not warned and (grown or state.ess < COLLAPSED):
                warned = True
                what = "states grow without bound" if grown else "one particle has all the weight"
                hint = "can the target be normalised? are there enough particles?"
                warnings.warn(f"step {i}: {what}; {hint}", RuntimeWarning, stacklevel=2)
        log_z = state.log_z + smc.log_mean_weight(state.log_weights)
        return WeightedSample(state.sample, state.log_weights, log_z, ess, kept, state.ancestors)

    # ------------------------------------------------------------------ parts of a step

    def _rates(
        self, x: Any, dtype: Any, scores: Any, i: int, t: float, log_q: Any, at: float | None = None
    ) -> Rates:
        """`rates` over step i, evaluated at time `at`."""
        now, where = t if at is None else at, f"at step {i} (t = {t:g})"
        reward = gradient = None
        if self.target.gradient is not None:
            assert self.target.reward is not None
            seen = cast(x, dtype)
            came = self.target.reward(seen, now)
            reward = _checked(came, "reward", x, where, per_sample=True)
            gradient = _checked(self.target.gradient(seen, now), "gradient", x, where)
        t_next = float(self.times[i + 1])
        return rates(
            self.target, self.schedule, x, scores, t, t_next,
            at=now, reward=reward, gradient=gradient, log_q=log_q,
        )  # fmt: skip

    def _weigh(self, state: Particles, gained: Any, dt: float, rng: Any) -> Particles:
        """Weights with what a step gained, and the particles that are left of it."""
        N = len(state.x)
        log_weights = state.log_weights + gained
        ess = smc.effective_size(log_weights)
        if state.clock is not None:
            ids, clock = self.births.step(state.clock, gained / dt, dt, rng)
            log_z = state.log_z + float(gained.mean())
            state = replace(state, clock=clock, log_z=log_z)
            return _take(replace(state, ess=ess), ids, state.log_weights)
        step, last = state.index, state.index == self.num_steps
        due = self.resampler is not None and (self.resample_last if last else True)
        due = due and step % self.interval == 0
        if self.ess_threshold is not None:
            due = due and ess < self.ess_threshold * N
        if not due:
            return replace(state, log_weights=log_weights, ess=ess, n_unique=N)
        assert self.resampler is not None
        ids = smc.resample(log_weights, self.resampler, rng)
        log_z = state.log_z + smc.log_mean_weight(log_weights)
        return _take(replace(state, log_z=log_z, ess=ess), ids, log_weights * 0.0)

    def _clipped(self, gained: Any) -> Any:
        c = self.clip_weights
        if c is None:
            return gained
        mean = float(gained.mean())
        return mean + (gained - mean).clip(-c, c)

    def _worth(self, x: Any, dtype: Any, i: int) -> Any:
        """b r at the time before step i, (N,) float64."""
        assert self.target.reward is not None
        t = float(self.times[i])
        b = self.target.strength_at(t)
        came = self.target.reward(cast(x, dtype), t)
        value = _checked(came, "reward", x, f"at step {i} (t = {t:g})", per_sample=True)
        return b * (value.double() if is_tensor(value) else np.asarray(value, np.float64))

    def _log_q(self, state: Particles, t: float) -> Any:
        if state.log_q is None or self.log_densities is None:
            return state.log_q
        where = f"at step {state.index} (t = {t:g})"
        return [
            _checked(one(state.x, t), f"log_densities[{k}]", state.x, where, per_sample=True)
            for k, one in enumerate(self.log_densities)
        ]

    def _models(self, eps_fns: Any) -> list[EpsFunction]:
        models = [eps_fns] if callable(eps_fns) else list(eps_fns)
        count = len(self.target.powers)
        require(len(models) == count, "eps_fns", f"{len(models)} models", f"{count}, one a power")
        return models

    def _scores(self, models: list[EpsFunction], x: Any, dtype: Any, i: int, t: float) -> list[Any]:
        """∇log q_i(x, t) of every expert."""
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        seen, where = cast(x, dtype), f"at step {i} (t = {t:g})"
        scores = []
        for k, model in enumerate(models):
            name = "eps_fn" if len(models) == 1 else f"eps_fns[{k}]"
            answer = cast(_checked(model(seen, t), name, x, where), x.dtype)
            if self.prediction == "score":
                score = answer
            else:
                score = to_eps(answer, x, alpha, sigma, self.prediction) * (-1 / sigma)
            if self.clip_score_norm is not None:
                norm = dot(score, score) ** 0.5
                factor = (self.clip_score_norm / norm.clip(1e-300)).clip(None, 1.0)
                score = score * _column(factor, score)
            scores.append(score)
        return scores


def descend(
    x: Any, gradient: Callable[[Any], Any], steps: int = 100, step_size: float = 1e-4
) -> Any:
    """x - step_size · gradient(x), again and again: a last polish after the data end is reached.

    gradient(x): ∇E/T of the law wanted, (N, *dims), as of an energy that is known. Released code
    calls it negative time. Raises InputError for answers of another shape or with NaN, naming the
    step. Biases towards the modes; small steps move little.

    >>> descend(np.array([[1.0]]), lambda x: x, steps=2, step_size=0.5).tolist()
    [[0.25]]
    """
    require(0 < step_size < np.inf, "step_size", step_size, "a positive number")
    for i in range(whole(steps, "steps", 0)):
        x = x - _checked(gradient(x), "gradient", x, f"at step {i}") * step_size
    return x


# ── arrays and tensors ──────────────────────────────────────────────────────────────────────────


def _checked(value: Any, name: str, x: Any, where: str, *, per_sample: bool = False) -> Any:
    """What a user's function answered, if it is shaped like x (or one a sample) and finite."""
    kind = f"a {type(value).__name__} {where}"
    require(is_tensor(value) == is_tensor(x), name, kind, f"a {type(x).__name__} like x")
    shape, want = tuple(getattr(value, "shape", ())), tuple(x.shape)
    want = want[:1] if per_sample else want
    require(shape == want, name, f"shape {shape} {where}", f"shape {want}")
    require(is_finite(value), name, f"NaN or infinity {where}", "finite values")
    return value


def _take(state: Particles, ids: Any, log_weights: Any) -> Particles:
    """The particles with these ids, weighing this."""
    host = np.asarray(on_host(ids))
    log_q = None if state.log_q is None else [one[ids] for one in state.log_q]
    worth = None if state.worth is None else state.worth[ids]
    return replace(
        state, x=state.x[ids], log_weights=log_weights, ancestors=state.ancestors[host],
        n_unique=int(np.count_nonzero(np.bincount(host))), log_q=log_q, worth=worth,
    )  # fmt: skip


def _normal(shape: tuple[int, ...], rng: Any, like: Any = None) -> Any:
    """Standard normals, as `like` is; without one float64, or a float32 tensor from torch's rng."""
    if type(rng).__module__.startswith("torch"):
        torch = sys.modules["torch"]
        dtype = torch.float32 if like is None else like.dtype
        noise = torch.randn(shape, generator=rng, dtype=dtype, device=rng.device)
        return noise if like is None else noise.to(like.device)
    if like is None:
        return generator(rng).standard_normal(shape)
    if not is_tensor(like):
        return generator(rng).standard_normal(shape).astype(like.dtype, copy=False)
    noise = generator(rng).standard_normal(shape)
    return sys.modules["torch"].as_tensor(noise, dtype=like.dtype, device=like.device)


def _source(rng: Any, x: Any) -> Any:
    """What every later draw comes from: a generator of NumPy or torch."""
    if type(rng).__module__.startswith("torch"):
        return rng
    if rng is None and is_tensor(x):
        return sys.modules["torch"].default_generator
    return generator(rng)


def _column(values: Any, x: Any) -> Any:
    """One number a sample, as what multiplies x."""
    column = values.reshape(-1, *(1,) * (x.ndim - 1))
    return column.to(x.dtype) if is_tensor(x) else column.astype(x.dtype)


def _size(x: Any) -> float:
    """Root mean square of all entries."""
    flat = x.detach().double() if is_tensor(x) else np.asarray(x, np.float64)
    return float((flat * flat).mean()) ** 0.5


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    require(value in choices, name, repr(value), f"one of {', '.join(choices)}")
    return value


def _positive_or_none(name: str, value: float | None) -> float | None:
    good = value is None or bool(0 < value < np.inf)
    require(good, name, value, "a positive number or None")
    return value
