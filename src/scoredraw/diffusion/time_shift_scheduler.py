"""Time shift around any noise-predicting scheduler of diffusers, in the pipelines that there are.

    pipe.scheduler = TimeShiftScheduler.around(pipe.scheduler, window=40, cutoff=300)

After each step the wrapper measures the variance of the new state and chooses the time t_s that
fits it (`TimeShift`, the paper's reading). The network has to be asked at t_s, and the base
scheduler has to step from there. A pipeline hands `scheduler.timesteps` to the network by itself,
so there are two ways in:

    shared        the entry of `timesteps` that the pipeline takes next is overwritten in place;
                  a pipeline iterates over views of that tensor. Entries are single numbers, so that
                  the whole batch gets one t_s, that of its mean variance: exact for one image.
    per sample    `attach(pipe.unet)` puts a hook on the network that replaces its timestep by
                  those of the samples, repeated for classifier-free guidance

The base steps between the levels it knows. What it is given is therefore the state at the nominal
level that has the same x_0 and eps as the real one has at t_s,

    x~ = alpha_t x_0 + sigma_t eps,     x_0, eps from the output m at (x, alpha_s, sigma_s)

with m rewritten alike. As every scheduler works on x_0 and eps, the step leads from t_s to the next
nominal level exactly for one-step bases; how much of the noise DDPM draws anew is that of its
nominal step. Multistep bases keep their history at nominal times: where that matters,
`TimeShiftSampler` weighs by the true ones. DDIM's own step, which is the paper's, is taken from t_s
without that detour: the same up to rounding, in fewer passes over the states than DDIMScheduler's.

Li, Qu, Yao, Sun and Moens, "Alleviating exposure bias in diffusion models through sampling with
shifted time steps", ICLR 2024, arXiv 2305.15583.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from scoredraw.diffusion.parameterisations import per_sample, to_eps, to_x0
from scoredraw.diffusion.states import is_finite
from scoredraw.diffusion.time_grids import whole
from scoredraw.diffusion.time_shift import TimeShift, sample_variance, warn_of_few_entries
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Int = NDArray[np.int64]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
OTHER_LEVELS = (
    "use_flow_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas",
)  # fmt: skip


class TimeShiftScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler whose network is asked at the times that fit the samples.

    base_class, base_config: the scheduler inside, by its name in diffusers or "module:Class", and
        its configuration; `around` takes them from a scheduler.
    window, cutoff, target, data_variance: see `TimeShift`. For latents give data_variance, the
        mean of `sample_variance` over encoded images, and target="matched".
    per_sample: each sample its own time, through `attach` or, in a loop of one's own,
        `model_timestep`; otherwise one for the batch, and no change to any pipeline.

    Works for bases that keep alpha² + sigma² = 1 and call at whole timesteps: DDPM, DDIM, PNDM,
    DEIS, DPM-Solver++, UniPC, our DEISScheduler and their like, with epsilon, sample or v
    predictions, guidance (the guided sample's variance counts), learned variances, image to image.
    Refused: Euler, Heun, LMS and EDM schedulers (which scale their states), flows, Karras and other
    sigma curves, zero terminal SNR. A pipeline that changes the state between two steps
    (inpainting by masks) does so after the variance was taken. `DDIMPipeline` turns what it is
    constructed with into a DDIMScheduler: set `pipe.scheduler` afterwards.

    Raises InputError for these and for what `TimeShift` refuses; and during sampling, naming the
    step, for states with NaN, and where the network has not been asked at the shifted times.

    >>> import diffusers
    >>> scheduler = TimeShiftScheduler.around(diffusers.DDIMScheduler(), window=40, cutoff=300)
    >>> scheduler.set_timesteps(5)
    >>> x = torch.linspace(-0.5, 0.5, 192).view(1, 3, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(0.1 * x, t, x).prev_sample
    >>> scheduler.timesteps.tolist()  # as the network was asked
    [800, 580, 380, 200, 0]
    """

    @register_to_config
    def __init__(
        self,
        base_class: str = "DDIMScheduler",
        base_config: dict[str, Any] | None = None,
        window: int = 40,
        cutoff: float = 300,
        target: str = "plain",
        data_variance: float | None = None,
        per_sample: bool = False,
    ) -> None:
        self.base = _scheduler(base_class).from_config(dict(base_config or {}))
        config = self.base.config
        curves = [name for name in OTHER_LEVELS if config.get(name)]
        fine = hasattr(self.base, "alphas_cumprod") and not curves
        came = ", ".join([base_class, *curves])
        require(fine, "base", came, "a scheduler that calls at the whole timesteps of training")
        unit = float(self.base.init_noise_sigma)
        require(unit == 1, "base", f"{base_class}, noise {unit:g}", "one with alpha² + sigma² = 1")
        kind = config.get("prediction_type", "epsilon")
        wanted = f"one of {', '.join(PREDICTION_TYPES)}"
        require(kind in PREDICTION_TYPES, "prediction_type", repr(kind), wanted)
        self._kind = kind
        self._takes = frozenset(inspect.signature(self.base.step).parameters)
        abar = self.base.alphas_cumprod.double().numpy()
        self._rule = TimeShift(abar, window, cutoff, target, data_variance)
        self._alpha, self._sigma = np.sqrt(abar), np.sqrt(1 - abar)
        self._linear = _linear(self._alpha, self._sigma, kind)
        ddim = type(self.base) is DDIMScheduler and not config.thresholding
        self._leaps = ddim and self._rule.shifts
        self.timesteps: Tensor = self.base.timesteps
        self._nominal: Tensor = self.timesteps
        self._levels: list[int] = []  # the same as numbers
        self._reset()

    def _reset(self) -> None:
        self._index: int | None = None
        self._begin_index: int | None = None
        self._times: Int | None = None  # of the states that the next call is about
        self._asked = False

    @classmethod
    def around(cls, base: Any, **how: Any) -> Self:
        """A wrapper around a scheduler like `base`; how: window, cutoff, ... as above."""
        kind = type(base)
        own = kind.__module__.split(".")[0] == "diffusers"
        name = kind.__name__ if own else f"{kind.__module__}:{kind.__name__}"
        config = {key: value for key, value in base.config.items() if not key.startswith("_")}
        return cls(base_class=name, base_config=config, **how)

    # -------------------------------------------------------------- what a pipeline asks of it

    @property
    def order(self) -> int:
        """Network calls a step of the base."""
        return int(self.base.order)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first states: 1."""
        return float(self.base.init_noise_sigma)

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar (T,)."""
        return torch.as_tensor(self.base.alphas_cumprod)

    @property
    def num_inference_steps(self) -> int | None:
        """Steps of the base; None before `set_timesteps`."""
        count = self.base.num_inference_steps
        return None if count is None else int(count)

    @property
    def step_index(self) -> int | None:
        """Number of the coming step; None before the first."""
        return self._index

    @property
    def begin_index(self) -> int | None:
        """Number of the first step, where a pipeline has set it."""
        return self._begin_index

    def __len__(self) -> int:
        return int(self._rule.levels)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later step than the first."""
        self._begin_index = whole(begin_index, "begin_index", 0)
        if hasattr(self.base, "set_begin_index"):
            self.base.set_begin_index(begin_index)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the nominal times, as the base does; `timesteps` where the base takes them."""
        given: dict[str, Any] = {"device": device}
        if num_inference_steps is not None:
            whole(num_inference_steps, "num_inference_steps", 1)
            given["num_inference_steps"] = num_inference_steps
        if timesteps is not None:
            takes = "timesteps" in inspect.signature(self.base.set_timesteps).parameters
            came = f"some for {self.config.base_class}"
            require(takes, "timesteps", came, "num_inference_steps: it takes no others")
            given["timesteps"] = list(timesteps)
        self.base.set_timesteps(**given)
        nominal = self.base.timesteps
        values = nominal.double().cpu().numpy()
        usable = bool((values % 1 == 0).all() and (np.diff(values) <= 0).all())
        require(usable, "timesteps", values.tolist(), "whole timesteps that do not increase")
        self._nominal, self.timesteps = nominal, nominal.clone()
        self._levels = values.astype(np.int64).tolist()
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The base's: alpha x_0 + sigma noise at timesteps (B,)."""
        return torch.as_tensor(self.base.add_noise(original_samples, noise, timesteps))

    # -------------------------------------------------------------- asking the network

    def model_timestep(self, sample: Tensor) -> Tensor:
        """The times (B,) at which the network is to be asked about the coming step's samples.

        sample: what the network is given, (B, ...) or k times as many, as guidance stacks them.
        For per_sample=True; `attach` calls it.
        """
        require(self.config.per_sample, "per_sample", False, "True, for a time a sample")
        nominal = self._nominal[self._index or self._begin_index or 0]
        if self._times is None:
            return nominal.expand(len(sample))
        count = len(self._times)
        fits = len(sample) % count == 0
        require(fits, "sample", f"{len(sample)} of them", f"{count}, or some times as many")
        self._asked = True
        times = torch.as_tensor(self._times, device=sample.device, dtype=nominal.dtype)
        return times.repeat(len(sample) // count)

    def attach(self, network: torch.nn.Module) -> RemovableHandle:
        """Have a network asked at `model_timestep`, whatever timestep a pipeline gives it.

            with scheduler.attach(pipe.unet):
                images = pipe(...)

        The handle is a context manager, and has `remove()`. The network takes its samples first
        and `timestep` second or by name, as those of diffusers do. Needs per_sample=True.
        """
        require(self.config.per_sample, "per_sample", False, "True, to attach to a network")

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._times is None:
                return None
            stacked = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            times = self.model_timestep(torch.as_tensor(stacked))
            if "timestep" in kwargs:
                return args, {**kwargs, "timestep": times}
            return (args[0], times, *args[2:]), kwargs

        return network.register_forward_pre_hook(hook, with_kwargs=True)

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
    ) -> Any:
        """What the base returns for the step from the states' own times, and the next times chosen.

        timestep: the entry of `timesteps` that is due. eta, use_clipped_model_output, generator:
        for the bases that take them; an eta other than 0 is refused for one that does not.
        """
        i = self._due(timestep)
        require("eta" in self._takes or not eta, "eta", eta, f"0 for {self.config.base_class}")
        if self._leaps and not eta and not use_clipped_model_output:
            moved = self._leap(model_output, sample, i, return_dict)
        else:
            output, x = self._at_nominal(model_output, sample, i)
            extras = {"eta": eta, "generator": generator}
            if use_clipped_model_output is not None:
                extras["use_clipped_model_output"] = use_clipped_model_output
            extras = {key: value for key, value in extras.items() if key in self._takes}
            moved = self.base.step(output, self._nominal[i], x, return_dict=return_dict, **extras)
        self._index, self._times, self._asked = i + 1, None, False
        if i + 1 < len(self._nominal) and len(sample):
            self._choose(moved.prev_sample if return_dict else moved[0], i + 1)
        return moved

    def _due(self, timestep: Any) -> int:
        """The number of this step, if `timestep` is the one that is due."""
        given = float(torch.as_tensor(timestep).flatten()[0])
        i = self._index
        if i is None:
            require(
                self.num_inference_steps is not None, "step", "no levels", "set_timesteps first"
            )
            found = (self._nominal == given).nonzero().flatten().tolist()
            require(len(found) > 0, "timestep", f"{given:g}", "one of scheduler.timesteps")
            return found[0] if self._begin_index is None else self._begin_index
        if i >= len(self._nominal):
            raise InputError("step: got a call after the last step, want set_timesteps before it")
        due = float(self.timesteps[i])
        wanted = f"{due:g}, the shifted one; a pipeline that copies timesteps needs per_sample=True"
        require(given == due, "timestep", f"{given:g} at step {i}", wanted)
        asked = self._times is None or self._asked or not self.config.per_sample
        wanted = "a call at model_timestep: attach(network), or per_sample=False"
        require(asked, "step", f"a network asked at nominal times, step {i}", wanted)
        return i

    def _choose(self, moved: Tensor, i: int) -> None:
        """The times at which step i asks about the states `moved`; none at nominal ones."""
        if i == 1:
            warn_of_few_entries(moved)
        center = self._levels[i]
        late = center <= self._rule.cutoff
        variance = np.zeros(0) if late else sample_variance(moved).cpu().numpy()
        if not (is_finite(moved) if late else np.isfinite(variance).all()):
            raise InputError(f"sample: got NaN or infinity before step {i}, want finite values")
        if late:
            return
        each = variance if self.config.per_sample else variance.mean(keepdims=True)
        times = self._rule.nearest(each, center)
        if not self.config.per_sample:
            self.timesteps[i] = int(times[0])  # in place: the pipeline holds views of it
        self._times = times if self.config.per_sample else times.repeat(len(moved))

    def _read(self, output: Tensor, sample: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The states and what the network predicts of them, alike, in float32 at least."""
        count = len(sample if self._times is None else self._times)
        if len(sample) != count:
            raise InputError(f"sample: got {len(sample)} at step {i}, want the {count} before")
        x = sample if sample.dtype.itemsize >= 4 else sample.float()
        m = output[:, : sample.shape[1]].to(x.dtype)
        if m.shape != x.shape:
            came, wanted = tuple(output.shape), tuple(x.shape)
            raise InputError(f"model_output: got {came}, want {wanted}")
        return x, m

    def _leap(self, output: Tensor, sample: Tensor, i: int, return_dict: bool) -> Any:
        """DDIM from the states' own times: alpha x_0 + sigma eps at the next nominal level."""
        x, m = self._read(output, sample, i)
        to = self._levels[i]
        of_x0, of_eps = self._linear[..., self._own_times(to)]
        x0 = _combined(x, m, of_x0)
        if self.base.config.clip_sample:
            limit = self.base.config.clip_sample_range
            x0 = x0.clamp_(-limit, limit)
        eps = m if self._kind == "epsilon" else _combined(x, m, of_eps)
        to -= len(self) // self.base.num_inference_steps
        final = float(self.base.final_alpha_cumprod)
        last = final**0.5, (1 - final) ** 0.5
        alpha, sigma = (self._alpha[to], self._sigma[to]) if to >= 0 else last
        moved = torch.add(x0, eps, alpha=float(sigma / alpha)).mul_(float(alpha)).to(sample.dtype)
        x0 = x0.to(sample.dtype)
        return DDIMSchedulerOutput(moved, x0) if return_dict else (moved, x0)

    def _at_nominal(self, output: Tensor, sample: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The output and state at the nominal level that have the x_0 and eps of those given."""
        nominal = self._levels[i]
        if self._times is None or bool((self._times == nominal).all()):
            return output, sample
        x, m = self._read(output, sample, i)
        of_state, of_output = self._moves(nominal)
        state = _combined(x, m, of_state).to(sample.dtype)
        if self._kind == "v_prediction":  # eps and x_0 themselves stay as they are
            m = _combined(x, m, of_output)
        channels, said = sample.shape[1], m.to(output.dtype)
        if output.shape[1] > channels:
            said = torch.cat([said, output[:, channels:]], dim=1)
        return said, state

    def _own_times(self, nominal: int) -> Int:
        """(B,), or () where the batch shares one."""
        if self._times is None:
            return np.array(nominal)
        return self._times if self.config.per_sample else self._times[:1].reshape(())

    def _moves(self, nominal: int) -> tuple[Float, Float]:
        """The state and the output at the nominal level, linear in (x, m): factors of each.

        Exactly (1, 0) and (0, 1) for a sample whose time is the nominal one.
        """
        x0, eps = self._linear[..., self._own_times(nominal)]
        alpha, sigma = self._alpha[nominal], self._sigma[nominal]
        stays = self._own_times(nominal) == nominal
        x, m = np.eye(2).reshape(2, 2, *(1,) * stays.ndim)
        state = np.where(stays, x, alpha * x0 + sigma * eps)
        return state, np.where(stays, m, alpha * eps - sigma * x0)


def _linear(alpha: Float, sigma: Float, kind: str) -> Float:
    """x_0 and eps at every time, linear in (x, m): factors (2, 2, T) of each.

    Found as what becomes of x = 1, m = 0 and of x = 0, m = 1.
    """
    x, m = np.eye(2)[:, :, None]
    both = [turn(m, x, alpha, sigma, kind) for turn in (to_x0, to_eps)]
    return np.array([np.broadcast_to(one, (2, len(alpha))) for one in both])


def _combined(x: Tensor, m: Tensor, factors: Float) -> Tensor:
    """A new tensor a x + b m; factors (2,), or (2, B): a and b, one each a sample."""
    a, b = (per_sample(row, x) for row in factors)
    return (x * a).add_(m, alpha=b) if isinstance(b, float) else (x * a).addcmul_(m, b)


def _scheduler(name: str) -> Any:
    """A scheduler class, by its name in diffusers or as "module:Class"."""
    module, _, kind = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module or "diffusers"), kind)
    except (ImportError, AttributeError):
        raise InputError(f"base_class: got {name!r}, want a scheduler's name") from None
    fine = isinstance(found, type) and issubclass(found, SchedulerMixin)
    require(fine, "base_class", repr(name), "a scheduler's name")
    return found
