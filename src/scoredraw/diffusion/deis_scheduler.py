"""DEIS in place of the scheduler of any diffusers pipeline.

    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)

One step leads from the level (alpha, sigma) of the noise to the next one, (alpha', sigma'):

    x' = alpha' x0 + sigma' eps + Σ_j C_j (eps_j - eps),   j = 1 .. r

where x0 and eps are what the network's output says at x, eps_j its eps j calls ago, and C the
weights of `deis_coefficients`. The first two terms are DDIM; the sum corrects it by how eps has
been changing. Since x0 and eps are linear in x and in the output m, all of it is

    x' = A x + B m + Σ_j C_j eps_j

with numbers that are known as soon as the levels are: `set_timesteps` computes them in float64, a
step multiplies and adds. In this form nothing is divided by alpha' or sigma', so the last step may
end at no noise and, for networks that predict x0, v or a flow, the first may start at no signal.

Zhang and Chen, "Fast sampling of diffusion models with exponential integrator", ICLR 2023,
arXiv 2204.13902.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import (
    KarrasDiffusionSchedulers,
    SchedulerMixin,
    SchedulerOutput,
)
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.diffusion.integrator_coefficients import deis_coefficients
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearFlow, NoiseSchedule
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
DEIS_VARIANTS = ("tab", "rhoab", "logrhoab", "ipndm")
SPACINGS = ("linspace", "leading", "trailing")
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
ENDS = ("zero", "sigma_min")

LEAST_ALPHA = 1e-9  # stands for no signal, where sigma/alpha has to be finite
LEAST_RHO = 1e-7  # stands for no noise, where log(sigma/alpha) has to be finite
LARGEST_RHO = 4096.0  # where the Karras, exponential and beta levels start if no signal is left


class _Step(NamedTuple):
    """x' = A x + B m + Σ_j past[j-1] eps_j, and eps = a x + b m joins the past."""

    numbers: tuple[float, float, float, float]  # A, B, a, b
    past: list[float]


class DEISScheduler(SchedulerMixin, ConfigMixin):
    """DEIS multistep sampling with the interface of diffusers' schedulers.

    Arguments with a name that diffusers' DEIS, DPM-Solver++ or UniPC schedulers have mean what they
    mean there, so that `from_config` carries them over from any scheduler of the Karras family, and
    from FlowMatchEulerDiscreteScheduler (as use_flow_sigmas, flow_shift and flow_prediction). EDM
    schedulers, whose networks are scaled differently, are refused.

    solver_order: how many values of eps a step combines, any number from 1 (DDIM); the paper's
        order r is one less. 4 is the paper's best; 2 or 3 are usual under strong guidance.
    deis_variant: the variable in which eps is extrapolated: "tab" time (between whole timesteps
        alphas_cumprod is linear in it), "rhoab" sigma/alpha, "logrhoab" its log (what diffusers'
        DEIS does), "ipndm" the number of the step.
    lower_order_final: the last step, by far the longest in log sigma/alpha, combines at most 2
        values below 12 steps, 3 below 24, 4 below 48, ...: more pay only once steps are short.
    final_sigmas_type: where the last step ends: "zero", no noise (the default), or "sigma_min",
        the noise of timestep 0.
    prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction" (eps - x0).
    rescale_betas_zero_snr: no signal at the last timestep, exactly; not for "epsilon".
    use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: other levels than those of evenly
        spaced timesteps. Their timesteps are not whole; networks embed such times all the same.
    variance_type: "learned" or "learned_range" drops the half of the output that is a variance.

    Levels never repeat: where rounding would make timesteps coincide there are fewer steps, and
    `num_inference_steps` says how many. Sampling is deterministic; half and bfloat16 samples are
    combined in float32. Memory: solver_order - 1 values of eps; a step adds as many tensors up.
    Raises InputError for an unknown choice, wrong sizes, levels that do not decrease.

    Zhang and Chen 2023, arXiv 2204.13902; levels: Karras et al. 2022, arXiv 2206.00364, and Lee et
    al. 2024, arXiv 2407.12173; zero terminal SNR: Lin et al. 2024, arXiv 2305.08891.

    >>> scheduler = DEISScheduler(solver_order=2)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [999, 749, 500, 250]
    >>> x = torch.ones(1, 3, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(0.9 * x, t, x).prev_sample
    >>> x.shape
    torch.Size([1, 3, 8, 8])
    """

    _compatibles = [  # noqa: RUF012 - the name and the kind that diffusers reads
        *(one.name for one in KarrasDiffusionSchedulers if one.name != "EDMEulerScheduler"),
        "FlowMatchEulerDiscreteScheduler",
    ]
    order = 1  # network calls a step

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 4,
        deis_variant: str = "tab",
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
        whole(num_train_timesteps, "num_train_timesteps", 2)
        whole(solver_order, "solver_order", 1)
        for name, value, choices in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("deis_variant", deis_variant, DEIS_VARIANTS),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("final_sigmas_type", final_sigmas_type, ENDS),
            ("timestep_spacing", timestep_spacing, SPACINGS),
            ("time_shift_type", time_shift_type, ("exponential", "linear")),
        ):
            require(value in choices, name, repr(value), f"one of {', '.join(choices)}")
        curves = [name for name in CURVES if self.config[name]]
        require(len(curves) <= 1, "sigmas", " and ".join(curves), "at most one of them")
        self._curve = curves[0] if curves else None
        require(flow_shift > 0, "flow_shift", flow_shift, "a positive number")

        betas = _betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if trained_betas is not None:
            betas = np.asarray(trained_betas, np.float64)
        wanted = f"num_train_timesteps = {num_train_timesteps} betas"
        require(betas.shape == (num_train_timesteps,), "trained_betas", betas.shape, wanted)
        abar = np.exp(np.cumsum(np.log1p(-betas)))
        if rescale_betas_zero_snr:
            abar = _without_terminal_signal(abar)
        self.alphas_cumprod = torch.from_numpy(abar).float()
        self.alphas = torch.from_numpy(abar / np.append(1.0, abar[:-1])).float()
        self.betas = 1 - self.alphas
        self.init_noise_sigma = 1.0
        self._schedule: NoiseSchedule = LinearFlow()
        if not use_flow_sigmas:  # time = timestep + 1, with the data at time 0
            known = np.append(1 / (1 + LEAST_RHO**2), np.maximum(abar, LEAST_ALPHA**2))
            self._schedule = DiscreteAlphas(known, clip=0.0)

        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        self._times = self._alpha = self._sigma = np.zeros(0)
        self._reset([])

    def _reset(self, steps: list[_Step]) -> None:
        self._steps, self._first = steps, 0
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._history: list[Tensor] = []
        self._depth: int = self.config.solver_order - 1

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A scheduler with the configuration of another one, and what `kwargs` changes in it."""
        keys = config if isinstance(config, dict) else {}
        if "sigma_data" in keys:
            raise InputError("config: got one for EDM networks, want one with betas or a flow")
        if "shift" in keys and "beta_start" not in keys:
            flow = {"use_flow_sigmas": True, "flow_shift": keys["shift"]}
            kwargs = {**flow, "prediction_type": "flow_prediction", **kwargs}
        return super().from_config(config, *args, **kwargs)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # -------------------------------------------------------------- levels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the levels at which the network is called, and compute the weights of the steps.

        Exactly one of num_inference_steps; timesteps, decreasing within 0 .. num_train_timesteps -
        1; sigmas, decreasing: sigma/alpha, or the flow's sigma (a 0 at the end is that of
        `final_sigmas_type="zero"`). The end is added to those given unless it is the last of them.
        mu: the shift of the flow's sigmas where `use_dynamic_shifting` is set, else unused.
        """
        given: list[Any] = [v for v in (num_inference_steps, timesteps, sigmas) if v is not None]
        wanted = "exactly one of num_inference_steps, timesteps and sigmas"
        require(len(given) == 1, "set_timesteps", f"{len(given)} of them", wanted)
        if num_inference_steps is not None:
            whole(num_inference_steps, "num_inference_steps", 1)
        elif len(given[0]) == 0 or given[0][0] == 0:
            raise InputError(f"set_timesteps: got {given[0]}, want levels of noise to start from")
        flow = self.config.use_flow_sigmas
        chosen = self._flow_times if flow else self._timesteps
        times = chosen(num_inference_steps or 0, timesteps, sigmas, mu)
        self._times = np.clip(times, LEAST_RHO, 1 - LEAST_ALPHA) if flow else times + 1
        alpha, sigma = self._levels(self._times)
        alpha[alpha < 2 * LEAST_ALPHA] = 0.0
        if times[-1] == (0.0 if flow else -1.0):
            alpha[-1], sigma[-1] = 1.0, 0.0
        self._alpha, self._sigma = alpha, sigma
        self._reset(self._weights(0))

        calls = times[:-1] * (self.config.num_train_timesteps if flow else 1)
        kind = torch.float32 if flow or (calls % 1).any() else torch.int64
        self.timesteps = torch.from_numpy(calls).to(device=device, dtype=kind)
        self.num_inference_steps = len(calls)
        shown = sigma if flow else sigma / np.maximum(alpha, LEAST_ALPHA)
        self.sigmas = torch.from_numpy(shown).float()

    def _timesteps(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Float:
        """Timesteps of the calls and of the end, (N + 1,); -1 is the data."""
        last = self.config.num_train_timesteps - 1
        require(mu is None, "mu", mu, "None without use_flow_sigmas")
        end = -1.0 if self.config.final_sigmas_type == "zero" else 0.0
        if timesteps is not None:
            calls = np.asarray(timesteps, np.float64)
            inside = bool(((calls >= 0) & (calls <= last)).all())
            require(inside, "timesteps", timesteps, f"decreasing times in 0 .. {last}")
        elif sigmas is not None:
            given = np.asarray(sigmas, np.float64)
            if given[-1] == 0:
                given, end = given[:-1], -1.0
            calls = self._schedule.time_of_rho(given) - 1
        elif self._curve is not None:
            first, least = self._schedule.rho(np.array([last + 1.0, 1.0]))
            rho = _curve(self._curve, min(first, LARGEST_RHO), least, count + (end == 0))
            calls = np.clip(self._schedule.time_of_rho(rho) - 1, 0, last)
        else:
            require(count <= last + 1, "num_inference_steps", count, f"at most {last + 1}")
            calls = self._spaced(count)
        if end == 0 and calls[-1] < 1e-6 and len(calls) > 1:  # that is the end already
            calls = calls[:-1]
        return np.append(calls, end)

    def _spaced(self, count: int) -> Float:
        """Evenly spaced whole timesteps, distinct and within the trained ones."""
        total = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            calls = np.linspace(0, total - 1, count + 1)[:0:-1]
        elif self.config.timestep_spacing == "leading":
            stride = max(1, total // (count + 1))
            calls = np.arange(count, 0, -1) * stride + self.config.steps_offset
        else:
            calls = np.rint(total - np.arange(count) * (total / count)) - 1
        return np.unique(np.clip(np.rint(calls), 0, total - 1))[::-1]

    def _flow_times(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Float:
        """The flow's sigma at the calls and at the end, (N + 1,)."""
        config = self.config
        zero, least = config.final_sigmas_type == "zero", 1 / config.num_train_timesteps
        dynamic = config.use_dynamic_shifting
        require(mu is not None or not dynamic, "mu", mu, "a shift, for use_dynamic_shifting")
        if timesteps is not None:
            levels = np.asarray(timesteps, np.float64) * least
        else:
            evenly = np.linspace(1, least, count + 1)[: count + (not zero)]
            levels = evenly if sigmas is None else np.asarray(sigmas, np.float64)
            shift = config.flow_shift
            if dynamic and mu is not None:
                shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
            levels = shift * levels / (1 + (shift - 1) * levels)
            if config.shift_terminal is not None and levels[-1] < 1:
                levels = 1 - (1 - levels) * (1 - config.shift_terminal) / (1 - levels[-1])
            if self._curve is not None and len(levels) > 1:
                levels = _curve(self._curve, levels[0], levels[-1], len(levels))
        inside = bool(((levels >= 0) & (levels <= 1)).all())
        require(inside, "sigmas", [float(levels.min()), float(levels.max())], "sigmas in [0, 1]")
        ended = levels[-1] == 0 or (not zero and (count > 0 or levels[-1] <= least))
        return levels if ended and len(levels) > 1 else np.append(levels, 0.0 if zero else least)

    def _levels(self, times: Float) -> Float:
        """alpha and sigma at times of the schedule, (2, *times.shape)."""
        return np.stack([self._schedule.alpha(times), self._schedule.sigma(times)])

    # -------------------------------------------------------------- weights

    def _weights(self, begin: int) -> list[_Step]:
        """The numbers of the steps from level `begin` on, where there is no history yet."""
        times, degree = self._times[begin:], self.config.solver_order - 1
        variant = self.config.deis_variant
        degree = min(degree, len(times) - 2)
        _, C = deis_coefficients(self._schedule, times, degree, variant)
        if self.config.lower_order_final and degree > (least := _last_degree(len(self._times) - 1)):
            _, short = deis_coefficients(self._schedule, times[-least - 2 :], least, variant)
            C[-1] = np.append(short[-1], np.zeros(degree - least))
        alpha, sigma = self._alpha[begin:], self._sigma[begin:]
        kind = self.config.prediction_type
        if kind == "epsilon" and alpha[0] == 0:
            raise InputError("prediction_type: got epsilon, want v_prediction where abar = 0")
        p, q, a, b = readings(kind, alpha[:-1], sigma[:-1])
        eps_weight = sigma[1:] - C[:, 1:].sum(axis=1)
        A, B = alpha[1:] * p + eps_weight * a, alpha[1:] * q + eps_weight * b
        numbers = np.stack([A, B, a, b], axis=1).tolist()
        return list(map(_Step, numbers, C[:, 1:].tolist()))

    # -------------------------------------------------------------- stepping

    @property
    def step_index(self) -> int | None:
        """Number of the coming step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first step, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later level than the first: image to image, or the second of two experts."""
        self._begin_index = whole(begin_index, "begin_index", 0)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The number of the step that starts at `timestep`; InputError if there is none."""
        known = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (known == torch.as_tensor(timestep, device=known.device)).nonzero()
        require(len(found) > 0, "timestep", timestep, "one of scheduler.timesteps")
        return int(found[0])

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: alpha² + sigma² = 1 is what the network was trained on."""
        return sample

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
        """`prev_sample`, the sample at the next level, from the network's output at this one.

        timestep finds the first step where no begin index is set; from then on steps are counted.
        eta, use_clipped_model_output and generator are there for pipelines made for DDIM: nothing
        is drawn, and an eta other than 0 is refused. Raises InputError also for an output of
        another shape than the sample's, before `set_timesteps` and after the last step.
        """
        i = self._start(timestep) if self._step_index is None else self._step_index
        if eta:
            raise InputError(f"eta: got {eta}, want 0: DEIS adds no noise")
        if i - self._first >= len(self._steps):
            raise InputError("step: got a call after the last step, want set_timesteps before it")
        (A, B, a, b), past = self._steps[i - self._first]
        m = model_output if model_output.shape == sample.shape else self._mean(model_output, sample)
        x = sample if sample.dtype.itemsize >= 4 else sample.float()
        if self.config.thresholding:
            moved, eps = self._thresholded(x, m, i, sum(past))
        else:
            moved = (x * A).add_(m, alpha=B)
            eps = m
            if self._depth:  # a copy: a compiled network may write its next output over this one
                eps = (x * a).add_(m, alpha=b) if a else m.clone()
        for weight, earlier in zip(past, self._history, strict=False):
            moved.add_(earlier, alpha=weight)
        if self._depth:
            self._history = [eps, *self._history[: self._depth - 1]]
        self._step_index = i + 1
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _start(self, timestep: Any) -> int:
        """Number of the first step; the weights start there, without a history."""
        require(bool(self._steps), "step", "no levels", "set_timesteps before it")
        first = self._begin_index
        first = self.index_for_timestep(timestep) if first is None else first
        require(first < len(self.timesteps), "begin_index", first, "the number of a step")
        if first != self._first:
            self._first, self._steps = first, self._weights(first)
        return first

    def _mean(self, output: Tensor, sample: Tensor) -> Tensor:
        """The half of the channels that is not a variance."""
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned and output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
            return output[:, : sample.shape[1]]
        wanted = f"the sample's, {tuple(sample.shape)}"
        raise InputError(f"model_output: got shape {tuple(output.shape)}, want {wanted}")

    def _thresholded(self, x: Tensor, m: Tensor, i: int, corrected: float) -> list[Tensor]:
        """alpha' x0 + (sigma' - Σ C) eps, and eps, for x0 clamped to ±s and divided by s."""
        alpha, sigma = self._alpha[i : i + 2].tolist(), self._sigma[i : i + 2].tolist()
        at = np.array(alpha[:1]), np.array(sigma[:1])
        p, q, _, _ = (part.item() for part in readings(self.config.prediction_type, *at))
        flat = (x * p).add_(m, alpha=q).flatten(1)
        s = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        s = s.clamp(min=1.0, max=self.config.sample_max_value)
        x0 = (flat.clamp(-s, s) / s).view_as(x)
        eps = (x - x0 * alpha[0]) / sigma[0]
        return [(x0 * alpha[1]).add_(eps, alpha=sigma[1] - corrected), eps]

    # -------------------------------------------------------------- noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at timesteps (B,), whether or not they are among the levels."""
        times = timesteps.detach().cpu().double().numpy()
        if self.config.use_flow_sigmas:
            times = np.clip(times / self.config.num_train_timesteps, 0, 1)
        else:
            last = self.config.num_train_timesteps - 1
            inside = times.min() >= 0 and times.max() <= last
            require(inside, "timesteps", times.tolist(), f"times in 0 .. {last}")
            times += 1
        x0 = original_samples
        levels = torch.from_numpy(self._levels(times)).to(x0)
        alpha, sigma = levels.view(2, -1, *[1] * (x0.ndim - 1))
        return alpha * x0 + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and in the order that flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)


# ------------------------------------------------------------------ the formulas


def _betas(kind: str, start: float, end: float, count: int) -> Float:
    """The trained betas (T,) of a named schedule."""
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    abar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def _without_terminal_signal(abar: Float) -> Float:
    """sqrt(abar) moved and stretched so that its first value stays and its last is 0."""
    root = np.sqrt(abar)
    return np.asarray(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def _curve(name: str, first: float, last: float, count: int) -> Float:
    """count levels from first down to last, both included where count > 1."""
    share = np.linspace(0, 1, count)
    if name == "use_karras_sigmas":
        return np.asarray((first ** (1 / 7) + share * (last ** (1 / 7) - first ** (1 / 7))) ** 7)
    if name == "use_exponential_sigmas":
        return np.exp(math.log(first) + share * (math.log(last) - math.log(first)))
    from scipy.special import betaincinv

    return np.asarray(last + betaincinv(0.6, 0.6, 1 - share) * (first - last))


def _last_degree(steps: int) -> int:
    """Degree of the last polynomial: 1, then 2 from 12 steps, 3 from 24, 4 from 48, ..."""
    # Near these, each comes closer to the exact ODE of Gaussian mixtures in 2 to 64 dimensions.
    return 1 + max(0, int(math.log2(steps / 6)))


def readings(kind: str, alpha: Float, sigma: Float) -> tuple[Float, Float, Float, Float]:
    """(p, q, a, b) with x0 = p x + q m and eps = a x + b m, for x = alpha x0 + sigma eps."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha, zero, one
    if kind == "sample":
        return zero, one, 1 / sigma, -alpha / sigma
    if kind == "v_prediction":  # m = alpha eps - sigma x0
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power, sigma / power, alpha / power
    total = alpha + sigma  # m = eps - x0
    return 1 / total, -sigma / total, 1 / total, alpha / total
