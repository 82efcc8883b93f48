"""One step for every fast diffusion solver, run as a `SolverSchedule` says.

With λ = log alpha/sigma and h = λ_t - λ_s > 0 the probability-flow ODE has two exact forms, whose
integrals are expanded around the start s; f^(k) is the k-th derivative in λ:

    noise  x_t = (alpha_t/alpha_s) x_s - sigma_t Σ_k h^{k+1} φ_{k+1}(h)  eps^(k),   k = 0 .. n-1
    data   x_t = (sigma_t/sigma_s) x_s + alpha_t Σ_k h^{k+1} φ_{k+1}(-h) x0^(k)

    φ_k(z) = ∫₀¹ e^{(1-θ)z} θ^{k-1}/(k-1)! dθ,       f^(k) = Σ_j a_j (f_j - f_s)

where a makes the estimate exact for polynomials: Σ_j a_j (λ_j - λ_s)^m / m! = [m = k], m = 1 .. o,
with o points. As the times are known beforehand so is all of this: a step is one linear combination
of a state and values of eps, or of x_0, where the network has been called (`step_weights`).

What a call at (x, t) said stays as it was said: when a corrector moves the state, eps and x_0 of
that call are not recomputed from the moved state.

Liu, Ning, Yang and Wang, "A unified sampling framework for solver searching of diffusion
probabilistic models", ICLR 2024, arXiv 2312.07243.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.integrator_coefficients import NODES, unit_nodes
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule
from scoredraw.diffusion.solver_schedules import SolverSchedule, Taylor
from scoredraw.diffusion.states import (
    EpsFunction,
    accumulator,
    cast,
    check_answer,
    checked_start,
    combine,
    copied,
)
from scoredraw.errors import require

Float = NDArray[np.float64]


# ------------------------------------------------------------------ the weights


def phi(k: int, z: ArrayLike) -> Float:
    """φ_k(z) = ∫₀¹ e^{(1-θ)z} θ^{k-1}/(k-1)! dθ for k >= 1, without the recursion's cancellation.

    φ_1(z) = (e^z - 1)/z and φ_{k+1}(z) = (φ_k(z) - 1/k!)/z. 32 Gauss-Legendre nodes are exact to
    round-off for |z| <= 40.

    >>> phi(1, [0.0, 1.0]).round(12).tolist()  # e^0 and e - 1
    [1.0, 1.718281828459]
    """
    theta, weights = _nodes()
    z = np.asarray(z, np.float64)[..., None]
    moments = weights * theta ** (k - 1) / math.factorial(k - 1)
    return np.asarray((np.exp((1 - theta) * z) * moments).sum(axis=-1))


@cache
def _nodes() -> tuple[Float, Float]:
    return unit_nodes(NODES)


def derivative_weights(gaps: ArrayLike, k: int) -> Float:
    """a (o,) with Σ_j a_j gaps_j^m / m! = [m = k], m = 1 .. o: f^(k) ≈ Σ_j a_j (f_j - f_s).

    gaps: (o,) λ_j - λ_s, o >= k. Exact for polynomials of degree o. InputError where two gaps
    coincide or one is 0.

    >>> derivative_weights([-1.0, -2.0], 1).tolist()  # backward differences
    [-2.0, 0.5]
    """
    gap = np.asarray(gaps, np.float64)
    require(1 <= k <= gap.size, "gaps", gap.size, f"at least {k} for derivative {k}")
    distinct = len(np.unique(np.append(gap, 0.0))) == gap.size + 1
    require(distinct, "gaps", gap.tolist(), "different from 0 and from one another")
    scale = np.abs(gap).max()
    m = np.arange(1, gap.size + 1)
    factorials = np.cumprod(m, dtype=np.float64)
    system = (gap / scale) ** m[:, None] / factorials[:, None]
    return np.asarray(np.linalg.solve(system, (m == k).astype(np.float64)) / scale**k)


class Combination(NamedTuple):
    """x = scale · (state of call `start`) + Σ_j weights[j] · (eps or x_0 of call calls[j])."""

    scale: float
    start: int
    prediction: str
    calls: tuple[int, ...]
    weights: tuple[float, ...]


class StepWeights(NamedTuple):
    """How step i moves; its corrector, if any, is applied once call i + 1 has been made."""

    predictor: Combination
    corrector: Combination | None
    reevaluate: bool


def step_weights(schedule: SolverSchedule, alpha: Any, sigma: Any) -> list[StepWeights]:
    """The linear combinations of all steps, from the levels alpha and sigma (S + 1,) of its times.

    Levels may end at sigma = 0 with a step of order 1, and start at alpha = 0 unless "noise" is
    expanded from there. Raises InputError naming the step. Time O(S n³), n the order.
    """
    levels = np.stack([np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)])
    made = []
    for i, step in enumerate(schedule.steps):
        predictor = _combination(step.predictor, step.prediction, levels, i + 1, i)
        corrector = None
        if step.corrector is not None:
            corrector = _combination(step.corrector, step.prediction, levels, i + 2, i)
        made.append(StepWeights(predictor, corrector, step.reevaluate))
    return made


def _combination(taylor: Taylor, prediction: str, levels: Float, calls: int, i: int) -> Combination:
    """The expansion `taylor` of step i as weights, `calls` calls having been made."""
    start = calls + taylor.start
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels[:, start], levels[:, i + 1]
    weights = dict.fromkeys([start], 0.0)
    noise = prediction == "noise"
    if noise:
        require(alpha_s > 0, f"step {i}: prediction", "'noise' from alpha = 0", "data")
        scale = alpha_t / alpha_s
        whole_weight = sigma_t - scale * sigma_s
    else:
        scale = sigma_t / sigma_s
        whole_weight = alpha_t - scale * alpha_s
    if taylor.order > 1:
        used = {start, i + 1, *(calls + p for points in taylor.active for p in points)}
        regular = bool((levels[:, sorted(used)] > 0).all())
        wanted = "1 where the step, or a call that it uses, is at no signal or no noise"
        require(regular, f"step {i}: order", taylor.order, wanted)
        with np.errstate(divide="ignore"):  # other levels may be without either
            lam = np.log(levels[0]) - np.log(levels[1])
        h = float(lam[i + 1] - lam[start])
        z = h if noise else -h
        front = -sigma_t if noise else alpha_t
        whole_weight = front * h * float(phi(1, z))
        for k, points in enumerate(taylor.active, start=1):
            at = [calls + p for p in points]
            a = derivative_weights(lam[at] - lam[start], k)
            a *= front * h ** (k + 1) * float(phi(k + 1, z))
            a *= relaxation_factor(taylor, h, z) if k == 1 else 1.0
            for j, weight in zip(at, a.tolist(), strict=True):
                weights[j] = weights.get(j, 0.0) + weight
    weights[start] = float(whole_weight) - sum(weights.values())
    return Combination(float(scale), start, prediction, tuple(weights), tuple(weights.values()))


def relaxation_factor(taylor: Taylor, h: float, z: float) -> float:
    """What multiplies the first derivative: the table of `Taylor`, by way of φ_1 and φ_2."""
    if taylor.relaxation == "linear":
        return 1 + taylor.coefficient * h
    if taylor.relaxation == "bh1":
        return 0.5 / float(phi(2, z))
    if taylor.relaxation == "bh2":
        return 0.5 * float(phi(1, z) / phi(2, z))
    half = 0.5 * math.expm1(z)
    return {"none": 1.0, "exp+": 1 + half, "exp-": 1 - half}[taylor.relaxation]


# ------------------------------------------------------------------ what was called


class Call(NamedTuple):
    """A state and what the network said there, as far as later steps need either."""

    x: Any
    eps: Any
    x0: Any


Calls = dict[int, Call]  # by number, 0 the first; only those that are still needed


class Program:
    """The weights of all steps, and which parts of which call are still needed when."""

    def __init__(self, schedule: SolverSchedule, alpha: Any, sigma: Any) -> None:
        self.steps = step_weights(schedule, alpha, sigma)
        self.needs: list[dict[str, int]] = [{} for _ in range(len(self.steps) + 1)]
        for used_at, one in self._uses():
            for j in one.calls:
                self._need(j, one.prediction, used_at)
            self._need(one.start, "x", used_at)

    def _uses(self) -> Iterator[tuple[int, Combination]]:
        for i, step in enumerate(self.steps):
            yield i, step.predictor
            if step.corrector is not None:
                yield i + 1, step.corrector

    def _need(self, call: int, part: str, step: int) -> None:
        self.needs[call][part] = max(step, self.needs[call].get(part, step))

    def says(self, call: int, part: str) -> bool:
        """Whether any step uses this part ("noise", "data") of the call."""
        return part in self.needs[call]

    def corrected(self, calls: Calls, i: int) -> Any:
        """The state of call i after the corrector of the step that led there, or as it was."""
        corrector = self.steps[i - 1].corrector if i else None
        return calls[i].x if corrector is None else apply(corrector, calls)

    def trimmed(self, calls: Calls, done: int) -> Calls:
        """The calls, with the parts that steps after `done` still use."""
        kept = {}
        for number, call in calls.items():
            later = {part for part, last in self.needs[number].items() if last > done}
            if later:
                parts = zip(("x", "noise", "data"), call, strict=True)
                kept[number] = Call(*(value if part in later else None for part, value in parts))
        return kept


def apply(one: Combination, calls: Calls) -> Any:
    """The state that a combination of past calls gives."""
    noise = one.prediction == "noise"
    said = [calls[j].eps if noise else calls[j].x0 for j in one.calls]
    return combine(calls[one.start].x, one.scale, one.weights, said)


# ------------------------------------------------------------------ the solver


@dataclass(frozen=True, eq=False)
class UnifiedState:
    """Where a solver stands: the state x at times[index], and the calls that are still needed.

    x is float32 where the samples are half or bfloat16 (`dtype`); `sample` has their own dtype.
    """

    x: Any
    index: int
    calls: Calls
    dtype: Any

    @property
    def sample(self) -> Any:
        """x in the dtype of the samples."""
        return cast(self.x, self.dtype)


class UnifiedSolver:
    """Sample from noise to data, doing at each step what a `SolverSchedule` says.

    noise_schedule: a `NoiseSchedule` (default `LinearBeta()`) of which the schedule's times are.
    mean_x0: the mean of the data, broadcastable to a sample, for afs = "average_x0".

    `solver.sample(eps_fn, x_T)` runs all steps; `init` and `step` run them one by one. eps_fn(x, t)
    takes states (B, *dims) and the time as a float, and returns eps in the same shape (other kinds
    of network: `to_eps`). Arrays and tensors keep their kind, device and dtype; eps_fn must return
    a new one each time. Gradients pass through. The authors' released program never re-evaluates
    its implicit correctors though it counts the calls; here they are made, at the corrected state.

    Raises InputError, before any call, for what `SolverSchedule.validate` refuses and a missing or
    superfluous mean; and during the steps for an answer of another shape or kind, on another
    device, or with NaN or infinite values, naming the step.
    Memory: the calls that coming steps still use, at most the highest order. Sequential.
    Liu et al. 2024, arXiv 2312.07243.

    >>> from scoredraw.diffusion.solver_schedules import solver_preset
    >>> solver = UnifiedSolver(solver_preset("unipc", LinearBeta(), 10, order=3))
    >>> gaussian = lambda x, t: solver.noise_schedule.sigma(t) * x  # the eps of N(0, I) data
    >>> solver.sample(gaussian, np.array([[0.5, -1.0]])).round(2).tolist(), solver.nfe
    ([[0.53, -1.07]], 10)
    """

    def __init__(
        self,
        schedule: SolverSchedule,
        noise_schedule: NoiseSchedule | None = None,
        *,
        mean_x0: Any = None,
        check_finite: bool = True,
    ) -> None:
        self.schedule = schedule
        self.noise_schedule = noise_schedule if noise_schedule is not None else LinearBeta()
        self.times = schedule.validate(self.noise_schedule)
        averages = schedule.afs == "average_x0"
        wanted = "the data's mean, for afs average_x0 and for no other"
        require((mean_x0 is not None) == averages, "mean_x0", type(mean_x0).__name__, wanted)
        self.mean_x0, self.check_finite = mean_x0, check_finite
        self.alpha = self.noise_schedule.alpha(self.times)
        self.sigma = self.noise_schedule.sigma(self.times)
        self.program = Program(schedule, self.alpha, self.sigma)

    @property
    def num_steps(self) -> int:
        """S, the number of steps."""
        return len(self.schedule.steps)

    @property
    def nfe(self) -> int:
        """Network calls that `sample` makes."""
        return self.schedule.nfe

    def init(self, x_T: Any) -> UnifiedState:
        """The state at t_start. x_T: floating (B, *dims), finite."""
        x = checked_start(x_T, finite=self.check_finite)
        return UnifiedState(accumulator(x), 0, {}, x.dtype)

    def step(self, state: UnifiedState, eps_fn: EpsFunction) -> UnifiedState:
        """The state one time further on: call, correct the step before, predict the next."""
        i, program = state.index, self.program
        require(i < self.num_steps, "state", f"one after the last of {i} steps", "an earlier one")
        guessed = i == 0 and self.schedule.afs != "none"
        newest = self._guess(state.x) if guessed else self._call(eps_fn, state, i)
        calls = {**state.calls, i: newest}
        if i and program.steps[i - 1].corrector is not None:
            moved = replace(state, x=program.corrected(calls, i))
            if program.steps[i - 1].reevaluate:
                newest = self._call(eps_fn, moved, i)
            calls[i] = newest._replace(x=moved.x)
        x = apply(program.steps[i].predictor, calls)
        return UnifiedState(x, i + 1, program.trimmed(calls, i), state.dtype)

    def sample(self, eps_fn: EpsFunction, x_T: Any, *, return_trajectory: bool = False) -> Any:
        """The sample that x_T ~ prior leads to, or the states at all times, (S + 1, B, *dims).

        States of the trajectory are the predicted ones, at which the network is called. An empty
        batch comes back empty, without a call.
        """
        state = self.init(x_T)
        path, empty = [state.sample], 0 in state.x.shape
        for _ in range(self.num_steps):
            if not empty:
                state = self.step(state, eps_fn)
            if return_trajectory:
                path.append(state.sample)
        if not return_trajectory:
            return copied(state.sample) if empty else state.sample
        return sys.modules["torch"].stack(path) if is_tensor(state.x) else np.stack(path)

    def _call(self, eps_fn: EpsFunction, state: UnifiedState, i: int) -> Call:
        """The network's answer at a state, as eps and, where a step needs it, as x_0."""
        x, t = state.x, float(self.times[i])
        eps = eps_fn(state.sample, t)
        check_answer(eps, x, f"at step {i} (t = {t:g})", finite=self.check_finite)
        x0 = None
        if self.program.says(i, "data"):
            alpha, sigma = float(self.alpha[i]), float(self.sigma[i])
            x0 = combine(x, 1 / alpha, [-sigma / alpha], (eps,))
        return Call(x, eps, x0)

    def _guess(self, x: Any) -> Call:
        """What afs puts in place of the first call."""
        alpha, sigma = float(self.alpha[0]), float(self.sigma[0])
        if self.schedule.afs == "zero_x0":  # eps = x_T, per unit of the prior's spread
            eps = x / self.noise_schedule.prior_std
            return Call(x, eps, combine(x, 1 / alpha, [-sigma / alpha], (eps,)))
        shape = tuple(np.shape(self.mean_x0))
        fits = len(shape) < x.ndim and all(
            n in (1, m) for n, m in zip(shape[::-1], x.shape[::-1], strict=False)
        )
        wanted = f"one that fits a sample, {tuple(x.shape[1:])}"
        require(fits, "mean_x0", shape, wanted)
        if is_tensor(x):
            x0 = sys.modules["torch"].as_tensor(self.mean_x0).to(x).expand_as(x)
        else:
            x0 = np.broadcast_to(np.asarray(self.mean_x0, x.dtype), x.shape)
        return Call(x, combine(x, 1 / sigma, [-alpha / sigma], (x0,)), x0)


class SolutionError:
    """How far a schedule ends from the fine solution: RMSE over noises (B, *dims).

    eps_fn(x, t) as for `UnifiedSolver`. exact: the solution, or computed by `reference` steps of
    Kutta's third-order method (three calls each). batch: noises a call. A schedule that overflows
    has infinite error. Call on other noises than those searched on: a search is optimistic.

    >>> from scoredraw.diffusion.solver_schedules import solver_preset
    >>> error = SolutionError(lambda x, t: 0 * x, LinearBeta(), np.ones((2, 3)), reference=5)
    >>> error(solver_preset("ddim", LinearBeta(), 2)) < 1e-12  # without noise there is no error
    True
    """

    def __init__(
        self, eps_fn: EpsFunction, noise_schedule: NoiseSchedule, noises: Any, *,
        exact: Any = None, reference: int = 100, mean_x0: Any = None, batch: int | None = None,
    ) -> None:  # fmt: skip
        require(len(noises) > 0, "noises", "an empty batch", "at least one")
        self.eps_fn, self.noise_schedule, self.noises = eps_fn, noise_schedule, noises
        self.mean_x0, self.batch = mean_x0, batch or len(noises)
        self.exact = exact
        if exact is None:
            plain = noise_schedule.with_ends(last="stop")
            self.exact = self._each(DEISSolver(plain, reference, variant="rhork", grid="rho"))

    def __call__(self, schedule: SolverSchedule) -> float:
        return float(np.sqrt(np.square(self.each(schedule)).mean()))

    def each(self, schedule: SolverSchedule) -> Float:
        """The RMSE of every noise, (B,)."""
        mean = self.mean_x0 if schedule.afs == "average_x0" else None
        solver = UnifiedSolver(schedule, self.noise_schedule, mean_x0=mean, check_finite=False)
        with np.errstate(all="ignore"):
            gap = self._each(solver) - self.exact
            found = np.sqrt(np.square(gap).reshape(len(gap), -1).mean(axis=1))
        return np.where(np.isfinite(found), found, np.inf)

    def _each(self, solver: Any) -> Float:
        parts = (
            solver.sample(self.eps_fn, self.noises[i : i + self.batch])
            for i in range(0, len(self.noises), self.batch)
        )
        return np.concatenate([np.asarray(on_host(part), np.float64) for part in parts])
