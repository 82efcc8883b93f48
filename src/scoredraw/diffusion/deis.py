"""DEIS: good samples from a trained diffusion network in 5 to 20 calls, without training.

The network's eps is evaluated at N times from noise to data. Every step is one linear combination
of the state and the last r + 1 values of eps, whose weights (`deis_coefficients`) depend on the
schedule and the times alone and are computed once, in float64:

    x_{i+1} = psi_i x_i + C_i0 eps_i + C_i1 eps_{i-1} + ... + C_ir eps_{i-r}

The first steps have fewer earlier values and use what there is: order 0 (DDIM), then 1, 2, ... The
Runge-Kutta variant `rhork` has stages instead, which are combinations of the same kind.

Zhang and Chen, "Fast sampling of diffusion models with exponential integrator", ICLR 2023,
arXiv 2204.13902.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor
from scoredraw.diffusion.integrator_coefficients import (
    ONE_STEP,
    TABLEAUX,
    TO_CLEAN,
    VARIANTS,
    RungeKuttaCoefficients,
    Tableau,
    as_tableau,
    deis_coefficients,
    runge_kutta_coefficients,
)
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule
from scoredraw.diffusion.states import (
    EpsFunction,
    accumulator,
    cast,
    check_answer,
    checked_start,
    combine,
    copied,
)
from scoredraw.diffusion.time_grids import checked_times, time_grid, whole
from scoredraw.errors import require

__all__ = [
    "TABLEAUX",
    "VARIANTS",
    "DEISSolver",
    "DEISState",
    "Tableau",
    "deis_coefficients",
    "runge_kutta_coefficients",
]

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DEISState:
    """Where a solver stands: the state x at times[index], and the last values of eps, newest first.

    x is float32 where the samples are half or bfloat16 (`dtype`); `sample` has their own dtype.
    """

    x: Any
    index: int
    history: tuple[Any, ...]
    dtype: Any

    @property
    def sample(self) -> Any:
        """x in the dtype of the samples."""
        return cast(self.x, self.dtype)


class DEISSolver:
    """Solve the probability-flow ODE from noise to data with N steps of a DEIS variant.

    schedule: a `NoiseSchedule` (default `LinearBeta()`), whose `ends` give t_start, t_end and what
        the last step does, unless t_start or t_end are given here.
    num_steps: N >= 1. variant: "tab" (default), "rhoab", "logrhoab", "ipndm" with polynomial
        `order` >= 0 (fewer where there are fewer earlier values); "rhork" with a `tableau` (name
        or `Tableau`), as many calls a step as it has stages; "euler", "ei_score", "ei_eps"
        (DDIM), the paper's ablations, which have no order. See `deis_coefficients`.
    grid, grid_power: the times, as in `time_grid`; by default quadratic in t, and uniform in t for
        ipndm, whose weights hold there only. times: (N + 1,) explicit times instead.

    `solver.sample(eps_fn, x_T)` runs all steps; `init` and `step` run them one by one. eps_fn(x, t)
    takes states (B, *dims) and the time as a float, and returns eps in the same shape. Arrays and
    tensors keep their kind, device and dtype, and are never changed in place; eps_fn must return a
    new one each time, as the last ones are kept. Networks that predict something else: `to_eps`.
    Gradients pass through; run under `torch.no_grad()` unless they are wanted.

    Raises InputError, before any call, for what `time_grid` and `deis_coefficients` refuse,
    t_end = 0 of a schedule without noise there unless the variant is rhoab or rhork; and during
    the steps for an eps of another shape or with NaN or infinite values, naming the step.
    Memory: the state and order + 1 values of eps. Zhang and Chen 2023, arXiv 2204.13902.

    >>> solver = DEISSolver(LinearBeta(), num_steps=10)
    >>> gaussian = lambda x, t: solver.schedule.sigma(t) * x  # the eps of N(0, I) data
    >>> solver.sample(gaussian, np.array([[0.5, -1.0]])).round(2).tolist(), solver.nfe
    ([[0.49, -0.99]], 10)
    """

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        num_steps: int = 10,
        *,
        variant: str = "tab",
        order: int = 3,
        tableau: str | Tableau = "3kutta",
        grid: str = "t",
        grid_power: float | None = None,
        times: Any = None,
        t_start: float | None = None,
        t_end: float | None = None,
        check_finite: bool = True,
    ) -> None:
        require(variant in VARIANTS, "variant", repr(variant), f"one of {', '.join(VARIANTS)}")
        method = as_tableau(tableau)
        degree = whole(order, "order", 0)
        self.schedule = schedule if schedule is not None else LinearBeta()
        self.variant = variant
        self.order = 0 if variant in ONE_STEP or variant == "rhork" else degree
        self.check_finite = check_finite
        if times is None:
            if variant == "ipndm":
                uniform = grid == "t" and grid_power in (None, 1)
                came = f"{grid!r}, power {grid_power}"
                require(uniform, "grid", came, "the uniform grid 't', power 1, for ipndm")
                grid_power = 1.0
            times = time_grid(
                self.schedule, num_steps, grid, grid_power, t_start=t_start, t_end=t_end
            )
        self.times: Float = checked_times(self.schedule, times, clean_end=variant in TO_CLEAN)
        multistep = "rhoab" if variant == "rhork" else variant
        psi, C = deis_coefficients(self.schedule, self.times, self.order, multistep)
        self.stages: RungeKuttaCoefficients | None = None
        if variant == "rhork":
            self.stages = runge_kutta_coefficients(self.schedule, self.times, method)
        if self.schedule.ends.last == "clean":  # the last step ends at alpha = 1, rho = 0
            psi[-1] = 1 / self.schedule.alpha(self.times[-2])
            C[-1] = 0.0
            C[-1, 0] = -self.schedule.rho(self.times[-2])
        self.psi, self.C = psi, C

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Network calls that `sample` makes."""
        last = self.schedule.ends.last
        stages = 1 if self.stages is None else self.stages.C.shape[1]
        calls = self.num_steps * stages
        return calls + (last == "denoise") - (stages - 1) * (last == "clean")

    def init(self, x_T: Any) -> DEISState:
        """The state at t_start. x_T: floating (B, *dims), finite."""
        x = checked_start(x_T, finite=self.check_finite)
        return DEISState(accumulator(x), 0, (), x.dtype)

    def step(self, state: DEISState, eps_fn: EpsFunction) -> DEISState:
        """The state one time further on; calls eps_fn once, or once a stage for rhork."""
        i = state.index
        require(i < self.num_steps, "state", f"one after the last of {i} steps", "an earlier one")
        if self.stages is not None and not self._to_clean(i):
            return DEISState(self._runge_kutta(state, eps_fn), i + 1, (), state.dtype)
        eps = self._evaluate(eps_fn, state.x, self.times[i], i, state.dtype)
        history = (eps, *state.history)[: self.order + 1]
        x = combine(state.x, self.psi[i], self.C[i], history)
        return DEISState(x, i + 1, history, state.dtype)

    def sample(self, eps_fn: EpsFunction, x_T: Any, *, return_trajectory: bool = False) -> Any:
        """The sample that x_T ~ prior leads to, or the states at all times, (N + 1, B, *dims).

        With `ends.last = "denoise"` the trajectory has the final prediction as one more entry.
        An empty batch comes back empty, without a call.
        """
        state = self.init(x_T)
        path = [state.sample]
        steps = self.num_steps + (self.schedule.ends.last == "denoise")
        empty = 0 in state.x.shape
        for i in range(steps):
            if not empty:
                last = i == self.num_steps
                state = self.denoise(state, eps_fn) if last else self.step(state, eps_fn)
            if return_trajectory:
                path.append(state.sample)
        if not return_trajectory:
            return copied(state.sample) if empty else state.sample
        return sys.modules["torch"].stack(path) if is_tensor(state.x) else np.stack(path)

    def denoise(self, state: DEISState, eps_fn: EpsFunction) -> DEISState:
        """The x_0 that the network predicts at the state: (x - sigma eps) / alpha, one call."""
        t = self.times[state.index]
        eps = self._evaluate(eps_fn, state.x, t, state.index, state.dtype)
        alpha, rho = float(self.schedule.alpha(t)), float(self.schedule.rho(t))
        x = combine(state.x, 1 / alpha, [-rho], (eps,))
        return DEISState(x, state.index, state.history, state.dtype)

    def _to_clean(self, i: int) -> bool:
        return self.schedule.ends.last == "clean" and i == self.num_steps - 1

    def _runge_kutta(self, state: DEISState, eps_fn: EpsFunction) -> Any:
        assert self.stages is not None
        times, stage_psi, stage_C, psi, C = (table[state.index] for table in self.stages)
        eps: list[Any] = []
        for s, t in enumerate(times):
            x = combine(state.x, stage_psi[s], stage_C[s], eps) if s else state.x
            eps.append(self._evaluate(eps_fn, x, t, state.index, state.dtype))
        return combine(state.x, psi, C, eps)

    def _evaluate(self, eps_fn: EpsFunction, x: Any, t: float, i: int, dtype: Any) -> Any:
        """eps_fn at x in the samples' dtype; its answer, checked."""
        eps = eps_fn(cast(x, dtype), float(t))
        check_answer(eps, x, f"at step {i} (t = {t:g})", finite=self.check_finite)
        return eps
