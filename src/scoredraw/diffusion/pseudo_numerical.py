"""Samplers of a discrete diffusion model in which every sample may stand at a time of its own.

A network knows the levels abar_0 > abar_1 > ... of its training; -1 stands for the data, abar = 1.
One step carries a sample from its time t to the time t', along one value ē of the noise:

    x_0 = (x - sqrt(1 - abar) ē) / sqrt(abar)
    x'  = sqrt(abar') x_0 + sqrt(1 - abar' - c²) ē + c z
    c   = eta sqrt((1 - abar/abar') (1 - abar') / (1 - abar)),     z ~ N(0, I)

which is DDIM for eta = 0, DDPM for eta = 1, and the "transfer" of the pseudo-numerical methods.
The multistep methods differ in ē alone: it is the mean, over the step, of the polynomial through
the last values of eps, ē = Σ_j w_j eps_j, Σ_j w_j = 1,

    s-pndm, f-pndm   of degree 1 and 3 in t, the mean taken in t (Adams-Bashforth)
    deis             of degree 3 in t, the mean taken in sigma/alpha
    dpm-solver       of degree 1 in log(alpha/sigma), at the middle of the step

The weights of DEIS and DPM-Solver follow from the times at which the network was really called,
which need not be equally spaced nor the same for all samples; those of PNDM, by its definition,
from the times of the grid. PNDM starts with Runge-Kutta steps of its order.

Song, Meng and Ermon 2021, arXiv 2010.02502; Liu, Ren, Lin and Zhao 2022, arXiv 2202.09778 (PNDM);
Zhang and Chen 2023, arXiv 2204.13902 (DEIS); Lu et al. 2022, arXiv 2211.01095 (DPM-Solver, 2M).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor
from scoredraw.diffusion.parameterisations import per_sample
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.states import accumulator, cast, check_answer, checked_start, copied
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
EpsFunction = Callable[[Any, Any], Any]

NODES = 3  # Gauss-Legendre nodes between two neighbouring levels, for DEIS


class Host(NamedTuple):
    """Degree of the polynomial through eps, where its mean is taken, and how the first steps go."""

    degree: int
    mean: str = "t"  # "t", "rho" or "log"
    start: str = ""  # "heun" or "rk4" while there are fewer than `degree` earlier values


HOSTS = {
    "ddim": Host(0),
    "ddpm": Host(0),
    "s-pndm": Host(1, start="heun"),
    "f-pndm": Host(3, start="rk4"),
    "deis": Host(3, "rho"),
    "dpm-solver": Host(1, "log"),
}
GRIDS = ("trailing", "linspace", "released")


@dataclass(frozen=True, eq=False)
class PseudoNumericalState:
    """The samples x and the time each of them stands at, times (B,); past calls, newest first.

    index: how many steps were made. history: pairs of eps and the times (B,) it was called at.
    x is float32 where the samples are half or bfloat16 (`dtype`); `sample` has their own dtype.
    """

    x: Any
    index: int
    times: Int
    history: tuple[tuple[Any, Int], ...]
    dtype: Any

    @property
    def sample(self) -> Any:
        """x in the dtype of the samples."""
        return cast(self.x, self.dtype)


class PseudoNumericalSampler:
    """DDIM, DDPM, S-PNDM, F-PNDM, DEIS or DPM-Solver(2M) on the whole times of a discrete model.

    schedule: a `DiscreteAlphas` of T levels (default: betas from 1e-4 to 0.02, T = 1000).
    base: a name in `HOSTS`. eta: from 0, DDIM and the default, to 1, DDPM, that of "ddpm".
    grid: times of the num_steps calls and the end: "trailing", T - 1 down to the data (-1), in
        equal parts; "linspace", T - 1 down to index 0, where noise is left; "released", the
        1, 1 + s, 1 + 2s, ... without the last, s = T // num_steps, down to 0, of the program of
        `TimeShiftSampler`'s authors, which leaves some of the steps out.
    times: (N + 1,) explicit whole times, decreasing; the last may be -1.
    clip: bound on |x_0| at every step, for data in a known range; None does not clip.

    `sample(eps_fn, x_T)` runs all steps; `init` and `step` run them one by one. eps_fn(x, t) takes
    x (B, *dims) and t (B,), int64, and returns eps in the shape of x; networks that take one time
    only: `by_time`. The middles of F-PNDM's first three steps are float64 times, k + 1/2 between
    whole ones (abar is linear there; the authors cut them off for the network, and not for the
    level). Arrays and tensors keep their kind, device and dtype. rng: a seed or NumPy Generator for
    arrays, a torch.Generator for tensors, used if eta > 0 only.

    Raises InputError, before any call, for unknown names, equal or increasing times, more steps
    than levels, x_T that is not finite; and, naming the step, for an eps of another shape or kind
    or with NaN. Memory: the state and degree + 1 values of eps; time O(B) beside the calls.

    >>> sampler = PseudoNumericalSampler(num_steps=10, base="f-pndm")
    >>> gaussian = lambda x, t: sampler.sigma(t)[:, None] * x  # the eps of N(0, I) data
    >>> sampler.sample(gaussian, np.array([[0.5, -1.0]])).round(1).tolist(), sampler.nfe
    ([[0.5, -1.0]], 19)
    """

    def __init__(
        self,
        schedule: DiscreteAlphas | None = None,
        num_steps: int = 20,
        base: str = "ddim",
        *,
        eta: float | None = None,
        grid: str = "trailing",
        times: Any = None,
        clip: float | None = None,
        check_finite: bool = True,
    ) -> None:
        require(base in HOSTS, "base", repr(base), f"one of {', '.join(HOSTS)}")
        fine = schedule is None or isinstance(schedule, DiscreteAlphas)
        require(fine, "schedule", type(schedule).__name__, "DiscreteAlphas")
        self.schedule = schedule or DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
        self.levels = len(self.schedule.values)
        if times is None:
            times = step_times(self.levels, num_steps, grid)
        self.times = _checked(times, self.levels)
        self.base, self.host = base, HOSTS[base]
        self.eta = float(base == "ddpm") if eta is None else float(eta)
        require(0 <= self.eta <= 1, "eta", eta, "a share from 0 to 1")
        wanted = f"0, as {base} adds no noise"
        require(self.eta == 0 or self.host.degree == 0, "eta", eta, wanted)
        require(clip is None or 0 < clip < np.inf, "clip", clip, "a positive number or None")
        self.clip, self.check_finite = clip, check_finite
        self._knots = np.arange(-1.0, self.levels)
        self._abar = np.append(1.0, self.schedule.values)
        self._nodes = self._masses = np.zeros(0)
        if self.host.mean == "rho":
            self._nodes, self._masses = _level_nodes(self._abar)

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Network calls that `sample` makes."""
        starts = min(self.num_steps, self.host.degree) if self.host.start else 0
        return self.num_steps + starts * {"": 0, "heun": 1, "rk4": 3}[self.host.start]

    def abar(self, t: Any) -> Float:
        """Signal power at times from -1, the data, to T - 1; linear between whole times."""
        return np.asarray(np.interp(np.asarray(t, np.float64), self._knots, self._abar))

    def sigma(self, t: Any) -> Float:
        """Standard deviation of the noise, sqrt(1 - abar)."""
        return np.sqrt(1 - self.abar(t))

    def init(self, x_T: Any) -> PseudoNumericalState:
        """The state at the first time. x_T: floating (B, *dims), finite."""
        x = checked_start(x_T, finite=self.check_finite)
        require(x.ndim >= 2, "x_T", f"shape {tuple(x.shape)}", "(B, *dims)")
        times = np.full(len(x), self.times[0])
        return PseudoNumericalState(accumulator(x), 0, times, (), x.dtype)

    def step(
        self,
        state: PseudoNumericalState,
        eps_fn: EpsFunction,
        rng: Any = None,
        *,
        target: Any = None,
    ) -> PseudoNumericalState:
        """The state one step further on, from each sample's own time to the next time of the grid.

        target: (B,) times to land on instead; the new state is taken for one at the grid's time
        all the same. rng: one generator for all steps.
        """
        i = state.index
        require(i < self.num_steps, "state", f"one after the last of {i} steps", "an earlier one")
        end = np.full(len(state.times), self.times[i + 1])
        goal = end if target is None else np.asarray(target, np.int64)
        require(goal.shape == end.shape, "target", goal.shape, f"{end.shape} times")
        eps = self._call(eps_fn, state.x, state.times, i, state.dtype)
        history = ((eps, state.times), *state.history)[: self.host.degree + 1]
        if self.host.start and i < self.host.degree:
            mean = self._started(state, eps_fn, eps, goal)
        elif len(history) == 1:
            mean = eps
        else:
            w = self.weights(np.stack([t for _, t in history], axis=1), goal, i)
            mean = sum(per_sample(w[:, j], eps) * e for j, (e, _) in enumerate(history))
        x = self.transfer(state.x, mean, state.times, goal, rng)
        return PseudoNumericalState(x, i + 1, end, history, state.dtype)

    def sample(self, eps_fn: EpsFunction, x_T: Any, rng: Any = None) -> Any:
        """The samples that x_T ~ N(0, I) leads to. An empty batch comes back without a call."""
        state = self.init(x_T)
        if 0 in state.x.shape:
            return copied(state.sample)
        source = rng if is_tensor(state.x) else generator(rng)
        for _ in range(self.num_steps):
            state = self.step(state, eps_fn, source)
        return state.sample

    def transfer(self, x: Any, eps: Any, t: Any, target: Any, rng: Any = None) -> Any:
        """x carried from times t (B,) to target (B,) along eps: the first formulas above.

        Where target is the noisier time, c = 0 and x is noised along eps.
        """
        a, b = self.abar(t), self.abar(target)
        c = self.eta * np.sqrt(np.maximum(1 - a / b, 0.0) * (1 - b) / (1 - a))
        alpha, sigma = per_sample(np.sqrt(a), x), per_sample(np.sqrt(1 - a), x)
        x0 = (x - sigma * eps) / alpha
        if self.clip is not None:
            x0 = x0.clip(-self.clip, self.clip)
            eps = (x - alpha * x0) / sigma
        along = per_sample(np.sqrt(np.maximum(1 - b - c * c, 0.0)), x)
        moved = per_sample(np.sqrt(b), x) * x0 + along * eps
        return moved + per_sample(c, x) * _noise(x, rng) if c.any() else moved

    def weights(self, called: Any, target: Any, index: int) -> Float:
        """w (B, m) of the last m values of eps: called (B, m) their times, newest first.

        target (B,); index: the number of the step, whose grid times are those of PNDM's weights. An
        earlier value, and all before it, is left out (w = 0) for the samples whose times have come
        closer than half the distance of the grid's times: extrapolating from two near calls would
        enlarge their errors.
        """
        rows = np.column_stack([called, target]).astype(np.float64)
        distinct, where = np.unique(rows, axis=0, return_inverse=True)
        times, end = distinct[:, :-1], distinct[:, -1:]
        grid = self.times[index - np.arange(times.shape[1])]
        apart = np.diff(times, axis=1) >= 0.5 * np.diff(grid)
        exists = np.logical_and.accumulate(np.hstack([end == end, apart]), axis=1)
        if self.host.mean == "t":
            times, end = np.tile(grid, (len(times), 1)), np.full_like(end, self.times[index + 1])
        mean = {"t": self._mean_in_t, "rho": self._mean_in_rho, "log": self._at_the_middle}
        return mean[self.host.mean](times, end, exists)[where]

    def _mean_in_t(self, times: Float, end: Float, exists: Bool) -> Float:
        share, gauss = np.polynomial.legendre.leggauss(2)  # exact for degree 3
        points = times[:, :1] + (end - times[:, :1]) * (1 + share) / 2
        return polynomial_means(times, exists, points, gauss / 2)

    def _mean_in_rho(self, times: Float, end: Float, exists: Bool) -> Float:
        low, high = np.minimum(times[:, :1], end), np.maximum(times[:, :1], end)
        inside = (self._nodes > low) & (self._nodes < high)
        used = inside.any(axis=0)
        mass = inside[:, used] * self._masses[used]
        total = mass.sum(axis=1, keepdims=True)
        stays = total[:, 0] == 0  # the step leads nowhere, whatever eps is
        mass = mass / np.where(stays[:, None], 1.0, total)
        w = polynomial_means(times, exists, self._nodes[None, used], mass)
        w[stays] = np.eye(times.shape[1])[0]
        return w

    def _at_the_middle(self, times: Float, end: Float, exists: Bool) -> Float:
        usable = exists.copy()
        usable[end[:, 0] < 0, 1:] = False  # the data: log(alpha/sigma) is infinite
        log_snr = self.schedule.log_snr
        known, goal = log_snr(times), log_snr(np.maximum(end, 0))
        return polynomial_means(known, usable, (known[:, :1] + goal) / 2, np.ones(1))

    def _started(self, state: PseudoNumericalState, eps_fn: EpsFunction, e: Any, end: Int) -> Any:
        """The mean eps of a Runge-Kutta step whose stages are transfers: Heun's, or the classic."""
        x, t = state.x, state.times

        def at(along: Any, time: Any) -> Any:
            stage = self.transfer(x, along, t, time)
            return self._call(eps_fn, stage, time, state.index, state.dtype)

        # at the data there is no network: the last level with noise stands for it
        last = np.maximum(end, 0)
        if self.host.start == "heun":
            return (e + at(e, last)) / 2
        middle = (t + last) / 2
        if (middle % 1 == 0).all():
            middle = middle.astype(np.int64)
        second = at(e, middle)
        third = at(second, middle)
        return (e + 2 * second + 2 * third + at(third, last)) / 6

    def _call(self, eps_fn: EpsFunction, x: Any, t: Any, i: int, dtype: Any) -> Any:
        """eps_fn at x in the samples' dtype and times t (B,); its answer, checked."""
        asked = cast(x, dtype)
        times = sys.modules["torch"].as_tensor(t, device=x.device) if is_tensor(x) else t
        eps = eps_fn(asked, times)
        span = f"t = {t.min():g} to {t.max():g}" if len(t) else "no samples"
        where = f"at step {i} ({span})"
        check_answer(eps, x, where, finite=self.check_finite)
        return cast(eps, x.dtype)


# ------------------------------------------------------------------ times


def step_times(levels: int, num_steps: int, grid: str = "trailing") -> Int:
    """Times of the calls and of the end, int64 (N + 1,): see `PseudoNumericalSampler`.

    Raises InputError for an unknown grid, num_steps < 1 or more steps than there are levels.

    >>> step_times(1000, 4).tolist(), step_times(1000, 4, "released").tolist()
    ([999, 749, 499, 249, -1], [501, 251, 1, 0])
    """
    require(grid in GRIDS, "grid", repr(grid), f"one of {', '.join(GRIDS)}")
    steps = whole(num_steps, "num_steps", 2 if grid == "released" else 1)
    most = {"trailing": levels, "linspace": levels - 1, "released": levels // 2}[grid]
    require(steps <= most, "num_steps", steps, f"at most {most} for {levels} levels")
    if grid == "released":
        called = np.arange(0, levels, levels // steps)[:-1] + 1
        return np.append(called[::-1], 0)
    if grid == "trailing":
        return np.rint(levels * (1 - np.arange(steps + 1) / steps)).astype(np.int64) - 1
    return np.rint(np.linspace(levels - 1, 0, steps + 1)).astype(np.int64)


def _checked(times: Any, levels: int) -> Int:
    grid = np.asarray(times)
    require(grid.ndim == 1 and grid.size >= 2, "times", grid.shape, "(N + 1,) times, N >= 1")
    fine = bool(np.isfinite(grid).all() and (grid % 1 == 0).all())
    require(fine, "times", "times that are not whole", "indices of levels")
    inside = f"times from {levels - 1} at most to -1, the data, at least"
    require(grid[0] < levels and grid[-1] >= -1, "times", f"{grid[0]} to {grid[-1]}", inside)
    if (stuck := np.flatnonzero(np.diff(grid) >= 0)).size:
        i = stuck[0]
        raise InputError(f"times: got {grid[i]} before {grid[i + 1]}, want decreasing times")
    return grid.astype(np.int64)


def by_time(eps_fn: Callable[[Any, float], Any]) -> EpsFunction:
    """An eps_fn(x, t) for times (B,) from one for a single time: a call for every distinct time.

    >>> scaled = by_time(lambda x, t: t * x)
    >>> scaled(np.ones((3, 1)), np.array([5, 7, 5])).tolist()
    [[5.0], [7.0], [5.0]]
    """

    def call(x: Any, t: Any) -> Any:
        eps = None
        for time in (t.unique() if is_tensor(t) else np.unique(t)).tolist():
            of_it = t == time
            part = eps_fn(x[of_it], time)
            if eps is None:
                shape = (len(x), *part.shape[1:])
                eps = part.new_empty(shape) if is_tensor(part) else np.empty(shape, part.dtype)
            eps[of_it] = part
        return eps

    return call


# ------------------------------------------------------------------ means of polynomials


def polynomial_means(times: Float, exists: Bool, points: Float, mass: Float) -> Float:
    """w_j = Σ_p mass_p L_j(points_p), (U, m): what the values at `times` weigh in the mean.

    times (U, m); L_j is 1 at times[:, j] and 0 at the others that exist (U, m); points (U or 1, P)
    and mass (U, P) or (P,), summing to 1. O(U P m²) time, O(U P) memory.

    >>> one = np.ones((1, 2), bool)
    >>> polynomial_means(np.array([[5.0, 6.0]]), one, np.array([[4.5]]), np.ones(1)).tolist()
    [[1.5, -0.5]]
    """
    result = np.zeros(times.shape)
    count = times.shape[1]
    for j in range(count):
        basis = mass * exists[:, j, None]
        for k in range(count):
            if k != j:
                both = exists[:, j] & exists[:, k]
                gap = np.where(both, times[:, j] - times[:, k], 1.0)
                ratio = (points - times[:, k, None]) / gap[:, None]
                basis = basis * np.where(both[:, None], ratio, 1.0)
        result[:, j] = basis.sum(axis=1)
    return result


def _level_nodes(abar: Float) -> tuple[Float, Float]:
    """Times and masses of the nodes of ∫ · drho, rho = sigma/alpha, between all levels.

    abar is linear between whole times, so t(rho) is smooth there, in u = asinh(rho) at both ends.
    """
    share, weights = np.polynomial.legendre.leggauss(NODES)
    u = np.arcsinh(np.sqrt((1 - abar) / abar))
    width = np.diff(u)[:, None]
    at = u[:-1, None] + width * (1 + share) / 2
    above = (abar[:-1, None] - 1 / np.cosh(at) ** 2) / -np.diff(abar)[:, None]
    times = above + np.arange(-1.0, len(width) - 1)[:, None]
    return times.ravel(), (width * weights / 2 * np.cosh(at)).ravel()


def _noise(x: Any, rng: Any) -> Any:
    """Standard normal, in the shape, dtype and place of x."""
    if is_tensor(x):
        torch = sys.modules["torch"]
        fine = rng is None or isinstance(rng, torch.Generator)
        require(fine, "rng", type(rng).__name__, "a torch.Generator or None for tensors")
        return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
    return generator(rng).standard_normal(x.shape).astype(x.dtype)
