"""Solver schedules in place of the scheduler of any diffusers pipeline.

    pipe.scheduler = UnifiedScheduler.from_config(pipe.scheduler.config, schedules=["found.json"])

A schedule that a search has found for n calls runs when the pipeline asks for n steps; with none,
a preset (DDIM, DPM-Solver, DPM-Solver++, UniPC) does. Times are the timesteps of the model.

A pipeline calls the network once a timestep, so all that a schedule asks for has to fit that:
correctors that are free wait for the next call, as in diffusers' UniPC; one that re-evaluates has
its timestep twice. Analytical first steps save a call that a pipeline makes anyway: refused.

Liu, Ning, Yang and Wang, "A unified sampling framework for solver searching of diffusion
probabilistic models", ICLR 2024, arXiv 2312.07243.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import (
    SchedulerMixin,  # noqa: F401 - pipelines look for it here when they load
    SchedulerOutput,
)
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.diffusion.deis_scheduler import DEISScheduler, readings
from scoredraw.diffusion.solver_schedules import (
    PRESETS,
    SolverSchedule,
    StepDecision,
    Taylor,
    solver_preset,
)
from scoredraw.diffusion.time_grids import whole
from scoredraw.diffusion.unified_solver import Call, Calls, Program, apply
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]


class UnifiedScheduler(DEISScheduler):
    """Run a `SolverSchedule`, or a preset, with the interface of diffusers' schedulers.

    schedules: `SolverSchedule`s, their dicts or the paths of their files, for different numbers of
        calls, whose times are timesteps of the model, 0 .. num_train_timesteps - 1
        (`SolverSchedule.on` moves those of another noise schedule); -1 is no noise, where a step of
        order 1 may end. They fix the levels: the spacing arguments are then unused.
    preset, solver_order, relaxation, corrector: where `schedules` is None, those of
        `solver_preset`, on the levels that the spacing arguments choose; a relaxation is also that
        of correctors of order 2, so that "unipc" with "bh2" or "bh1" is diffusers' UniPC.

    All other arguments, and what may be loaded from which configuration: as in `DEISScheduler`.
    A run that starts at a later level (image to image) starts there without earlier calls, with
    the orders that this allows. Half and bfloat16 samples are combined in float32. Memory: the
    calls that coming steps use. Raises InputError for a number of steps that no schedule has
    (naming those there are), an analytical first step, v3 predictions, and what DEISScheduler does.

    Liu et al. 2024, arXiv 2312.07243.

    >>> scheduler = UnifiedScheduler(preset="unipc", solver_order=3)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [999, 749, 500, 250]
    >>> x = torch.ones(1, 3, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(0.9 * x, t, x).prev_sample
    >>> x.shape
    torch.Size([1, 3, 8, 8])
    """

    ignore_for_config = ["deis_variant"]  # noqa: RUF012 - DEISScheduler's, of no meaning here

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        schedules: Sequence[Any] | None = None,
        preset: str = "unipc",
        solver_order: int = 2,
        relaxation: str = "none",
        corrector: str | None = None,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        lower_order_final: bool = True,
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        variance_type: str | None = None,
    ) -> None:
        require(preset in PRESETS, "preset", repr(preset), f"one of {', '.join(PRESETS)}")
        known = signature(DEISScheduler.__init__).parameters
        self._chosen: SolverSchedule | None = None
        self._visits: list[int] = []
        self._asked: int | None = None
        super().__init__(**{name: self.config[name] for name in known if name in self.config})
        self._known = [_schedule(one, i) for i, one in enumerate(schedules or ())]
        counts = [one.nfe for one in self._known]
        require(len(set(counts)) == len(counts), "schedules", f"{counts} calls", "different ones")
        if schedules is not None:
            require(len(counts) > 0, "schedules", "none", "at least one, or None for a preset")
            self.register_to_config(schedules=[one.to_dict() for one in self._known])

    # -------------------------------------------------------------- levels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the schedule with that many calls, or a preset's levels as `DEISScheduler` does.

        With schedules, num_inference_steps alone: they have their own levels.
        """
        count, self._chosen = num_inference_steps, None
        if self._known:
            counts = {one.nfe: one for one in self._known}
            wanted = f"{' or '.join(map(str, sorted(counts)))}, the calls of the schedules"
            free = timesteps is None and sigmas is None
            require(free and count in counts, "num_inference_steps", count, wanted)
            self._chosen = counts[count]  # type: ignore[index]
            count = len(self._chosen.steps)
        elif count is not None and self.config.corrector == "implicit":
            count = whole(count, "num_inference_steps", 1) // 2 + 1
        self._asked = num_inference_steps
        super().set_timesteps(count, device, timesteps, sigmas, mu)
        self.timesteps = self.timesteps[self._visits]
        self.sigmas = self.sigmas[[*self._visits, -1]]
        self.num_inference_steps = len(self._visits)

    def _timesteps(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Float:
        if self._chosen is None:
            return super()._timesteps(count, timesteps, sigmas, mu)
        times, last = self._chosen.times, self.config.num_train_timesteps - 1
        inside = times[0] <= last and times[-2] >= 0 and (times[-1] >= 0 or times[-1] == -1)
        came = f"times {times[0]:g} .. {times[-1]:g}"
        wanted = f"timesteps in 0 .. {last}, or -1 for no noise at the end"
        require(bool(inside), "schedules", came, wanted)
        return times

    def _flow_times(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Float:
        if self._chosen is None:
            return super()._flow_times(count, timesteps, sigmas, mu)
        times = self._chosen.times / self.config.num_train_timesteps
        inside = bool(times[0] <= 1 and times[-1] >= 0)
        came, last = f"{self._chosen.times[[0, -1]]}", self.config.num_train_timesteps
        require(inside, "schedules", came, f"timesteps in 0 .. {last}")
        return times

    # -------------------------------------------------------------- weights

    def _weights(self, begin: int) -> list[Any]:
        """The levels of the calls from the begin-th on; one that is called again stands twice."""
        level = self._visits[begin] if begin else 0
        alpha, sigma = self._alpha[level:], self._sigma[level:]
        if alpha[0] == 0 and self.config.prediction_type == "epsilon":
            raise InputError("prediction_type: got epsilon, want v_prediction where abar = 0")
        plan = self._chosen.tail(level) if self._chosen else self._preset(alpha, sigma)
        self._program, self._level = Program(plan, alpha, sigma), level
        self._calls: Calls = {}
        kind = self.config.prediction_type
        self._read = np.stack(readings(kind, alpha[:-1], sigma[:-1]), axis=1).tolist()
        if begin == 0:
            again = [i > 0 and plan.steps[i - 1].reevaluate for i in range(len(plan.steps))]
            self._visits = [i for i, twice in enumerate(again) for _ in range(1 + twice)]
        return self._visits[begin:]

    def _preset(self, alpha: Float, sigma: Float) -> SolverSchedule:
        """The preset on these levels; order 1 where there is no signal yet or no noise is left."""
        config, count = self.config, len(alpha) - 1
        silent = [StepDecision(0.5, "data")] * int(alpha[0] == 0)  # no other step uses that call
        steps = count - len(silent)
        if steps == 0:
            return SolverSchedule(1.0, tuple(silent))
        calls = steps
        if config.corrector == "implicit":
            calls += min(steps - 1, max(0, (self._asked or 2 * count) - count))
        made = solver_preset(
            config.preset, self._schedule, calls, order=config.solver_order,
            times=-np.arange(steps + 1.0), relaxation=config.relaxation,
            relaxed_corrector=config.relaxation != "none", corrector=config.corrector,
            lower_order_final=config.lower_order_final,
        )  # fmt: skip
        done = list(made.steps)
        if sigma[-1] == 0 and done[-1].predictor.order > 1:
            done[-1] = replace(done[-1], predictor=Taylor(1))
        return SolverSchedule(1.0, (*silent, *done))

    # -------------------------------------------------------------- stepping

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """`prev_sample`, where the network is to be called next; arguments as in `DEISScheduler`.

        Where a corrector re-evaluates that is the corrected sample, at the same timestep.
        """
        number = self._start(timestep) if self._step_index is None else self._step_index
        if eta:
            raise InputError(f"eta: got {eta}, want 0: the solver adds no noise")
        visits: list[Any] = self._steps[number - self._first :]
        if not visits:
            raise InputError("step: got a call after the last step, want set_timesteps before it")
        i, stays = visits[0] - self._level, visits[1:2] == visits[:1]
        again = number > self._first and self._visits[number - 1] == visits[0]
        m = model_output if model_output.shape == sample.shape else self._mean(model_output, sample)
        x = sample if sample.dtype.itemsize >= 4 else sample.float()
        self._calls[i] = self._said(i, x, m)
        corrector = self._program.steps[i - 1].corrector if i and not again else None
        if corrector is not None:
            x = apply(corrector, self._calls)
            self._calls[i] = self._calls[i]._replace(x=x)
        if not stays:
            x = apply(self._program.steps[i].predictor, self._calls)
            self._calls = self._program.trimmed(self._calls, i)
        self._step_index = number + 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _said(self, i: int, x: Tensor, m: Tensor) -> Call:
        """What the network's output m at x says, as far as steps use it."""
        (p, q, a, b), program = self._read[i], self._program
        if self.config.thresholding:
            at = i + self._level
            moved, eps = self._thresholded(x, m, at, 0.0)  # to the next level, where alpha > 0
            alpha, sigma = float(self._alpha[at + 1]), float(self._sigma[at + 1])
            return Call(x, eps, (moved - eps * sigma) / alpha)
        eps = x0 = None
        if program.says(i, "noise"):  # a copy: a compiled network may write its next output there
            eps = (x * a).add_(m, alpha=b) if a else m.clone()
        if program.says(i, "data"):
            x0 = (x * p).add_(m, alpha=q) if p else m.clone()
        return Call(x, eps, x0)


def _schedule(given: Any, i: int) -> SolverSchedule:
    """A schedule from itself, its dict or the path of its file; InputError if a pipeline can't."""
    if isinstance(given, SolverSchedule):
        made = given
    elif isinstance(given, Mapping):
        made = SolverSchedule.from_dict(given)
    else:
        made = SolverSchedule.load(given)
    wanted = "none: pipelines make the first call anyway; with none it is used, one call more"
    require(made.afs == "none", f"schedules[{i}]: afs", repr(made.afs), wanted)
    made.predictable()
    return made
