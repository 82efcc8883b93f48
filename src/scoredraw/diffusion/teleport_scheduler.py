"""Any scheduler of diffusers, started where the data's mean and covariance stop being enough.

    gaussian = GaussianScore.fit(images)            # in the range, or the latents, of the network
    pipe.scheduler = TeleportScheduler(pipe.scheduler, gaussian, sigma_skip=10.0)

The wrapped scheduler chooses its levels as always. Those above sigma_skip are dropped, the
pipeline's noise is carried over them by the closed form of `GaussianScore`, and the first step is
the wrapped scheduler's own, without a history, at the first level that is left. What the network
predicts does not matter: the closed form needs no prediction. The state at the level sigma/alpha =
rho is, by the kind of the scheduler,

    VP     (x0 + rho eps) / sqrt(1 + rho²)    DDIM, DDPM, DPM-Solver++, UniPC, DEIS, ...
    VE     x0 + rho eps                       Euler, Heun, LMS, EDM, ...
    flow   (1 - s) x0 + s eps                 flow matching

Wang and Vastola, "The unreasonable effectiveness of Gaussian score approximation for diffusion
models and its applications", TMLR 2024, arXiv 2412.09726.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from scoredraw.diffusion.deis_scheduler import DEISScheduler
from scoredraw.diffusion.gaussian_score import GaussianScore
from scoredraw.diffusion.teleportation import GRIDS, warn_of_range
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]

LAUNCHES = ("input", "step")
STATISTICS = "gaussian.safetensors"
OPTIONS = ("sigma_skip", "skip_steps", "grid", "launch")
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class TeleportScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler around another one, `base`, that skips its steps above sigma_skip.

    base: a scheduler of diffusers, or `DEISScheduler`; not PNDM, whose first steps cannot be
        dropped. gaussian: of what the network generates, in its own range: pixels in [-1, 1] as a
        rule, latents after their scaling factor; its schedule plays no part.
    sigma_skip: skip the levels above this sigma/alpha; skip_steps: this many steps; neither:
        2 sqrt(largest variance), nothing where no level is above that.
    grid: "tail" keeps the levels that base chooses for the number of steps asked for; "respace"
        chooses so many that this number of steps is left below sigma_skip (the first such grid of
        base's: where it has none, one step more).
    launch: "input" carries the noise when the pipeline calls `scale_model_input` (Stable Diffusion,
        DiT and most others), at no call; "step" is for pipelines that never call it (DDPMPipeline,
        DDIMPipeline, flow pipelines): the network is called once on the noise, and that step's
        answer is the closed form. The wrong one raises InputError at the first step.

    Everything else is base's: `config` has base's entries, so that other schedulers can be made
    from it, and attributes not found here are looked up there. A state that did not start as noise
    (image to image) is not carried; better take base there, as `strength` counts all its steps.
    save_pretrained writes mean and eigenvectors beside the configuration. Memory O(d r) for the
    eigenvectors. Raises InputError for a sigma_skip above the first level or below the last, more
    skipped steps than there are, samples of another size.

    Wang and Vastola 2024, arXiv 2412.09726.

    >>> gaussian = GaussianScore(np.zeros(64), residual=0.25)
    >>> base = diffusers.DDIMScheduler(timestep_spacing="trailing")
    >>> scheduler = TeleportScheduler(base, gaussian, sigma_skip=10.0)
    >>> scheduler.set_timesteps(10)
    >>> base.timesteps.tolist()[:4], scheduler.timesteps.tolist()[:2]
    ([999, 899, 799, 699], [699, 599])
    """

    def __init__(
        self,
        base: Any,
        gaussian: GaussianScore,
        *,
        sigma_skip: float | None = None,
        skip_steps: int | None = None,
        grid: str = "tail",
        launch: str = "input",
    ) -> None:
        known = isinstance(base, SchedulerMixin) and not isinstance(base, TeleportScheduler)
        require(known, "base", type(base).__name__, "a scheduler of diffusers")
        require(not isinstance(base, diffusers.PNDMScheduler), "base", "PNDM", "another scheduler")
        kind = type(gaussian).__name__
        require(isinstance(gaussian, GaussianScore), "gaussian", kind, "a GaussianScore")
        both = sigma_skip is not None and skip_steps is not None
        require(not both, "sigma_skip, skip_steps", "both", "at most one of them")
        good = sigma_skip is None or 0 < sigma_skip < np.inf
        require(good, "sigma_skip", sigma_skip, "a positive noise level, sigma/alpha")
        if skip_steps is not None:
            whole(skip_steps, "skip_steps", 0)
        for name, value, choices in (("grid", grid, GRIDS), ("launch", launch, LAUNCHES)):
            require(value in choices, name, repr(value), f"one of {', '.join(choices)}")
        warn_of_range(gaussian, stacklevel=3)
        options = dict(zip(OPTIONS, (sigma_skip, skip_steps, grid, launch), strict=True))
        self._base, self.gaussian = base, gaussian
        self.register_to_config(**base.config, base_scheduler=type(base).__name__, **options)
        self._timesteps: Tensor | None = None
        self._ready(0)

    def _ready(self, first: int) -> None:
        """Before the first step: the number of base's step that it is, and whether to carry."""
        self._first, self._pending, self._started, self._scaled = first, first > 0, False, False
        self._kept: tuple[Tensor, Tensor, tuple[int, int]] | None = None

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("_base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(base, name)

    def __len__(self) -> int:
        return len(self._base)

    # -------------------------------------------------------------- levels

    @property
    def timesteps(self) -> Tensor:
        """The times of the coming network calls."""
        found: Tensor = self._base.timesteps if self._timesteps is None else self._timesteps
        return found

    @property
    def num_inference_steps(self) -> int | None:
        """How many steps are taken."""
        if self._timesteps is None:
            return None
        return -(-len(self._timesteps) // self._base.order)

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """Base's levels below sigma_skip; takes the arguments of base's `set_timesteps`."""
        return _with_signature(self._set_timesteps, self._base.set_timesteps)

    def _set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kw: Any) -> None:
        base, total = self._base, num_inference_steps
        base.set_timesteps(total, *args, **kw)
        skipped = self._skipped()
        if self.config.grid == "respace" and skipped:
            total = asked = whole(num_inference_steps, "num_inference_steps", 1)
            short, most = skipped, int(self.config.num_train_timesteps)
            while short > 0:
                total += short
                few = f"{asked} steps below sigma_skip"
                wanted = f"as many as {most} levels have there"
                require(total <= most, "num_inference_steps", few, wanted)
                base.set_timesteps(total, *args, **kw)
                skipped, rho = self._skipped(), self._rho()[0][:: base.order]
                # some grids of base are faulty: DDIM's "trailing" one of 61 steps goes on to -1
                faulty = int((np.diff(rho) >= 0).any())
                short = max(asked - len(rho) + skipped, faulty)
        first = skipped * base.order
        self._ready(first)
        rho, _ = self._rho()
        if first and rho[first] < self.gaussian.widest:
            level = f"the first level, sigma/alpha = {rho[first]:g}, is below"
            limit = f"{self.gaussian.widest:g}, sqrt of the largest variance"
            warnings.warn(f"{level} {limit}: much of what is skipped counts", stacklevel=4)
        self._timesteps = base.timesteps[first:]
        if first and self.config.launch == "step":
            self._timesteps = torch.cat([base.timesteps[:1], self._timesteps])

    def _skipped(self) -> int:
        """How many of base's steps are skipped."""
        rho = self._rho()[0][:: self._base.order]
        respace = self.config.grid == "respace"  # of a grid that may still grow
        if self.config.skip_steps is not None:
            k: int = self.config.skip_steps
            require(respace or k < len(rho), "skip_steps", k, f"fewer than the {len(rho)} steps")
            return k
        level = self.config.sigma_skip
        if level is None:
            level = min(2 * self.gaussian.widest, rho[0])
        wanted = f"a level in {rho.min():g} .. {rho[0]:g}, sigma/alpha of the steps"
        reached = bool(rho.min() <= level * (1 + 1e-6))
        inside = (reached or respace) and level <= rho[0] * (1 + 1e-6)
        require(inside, "sigma_skip", level, wanted)
        above = np.logical_and.accumulate(rho >= level * (1 - 1e-6))
        return int(np.count_nonzero(above)) - reached

    def _rho(self) -> tuple[Float, str]:
        """sigma/alpha at every call of base, and the kind of its states."""
        base, count = self._base, len(self._base.timesteps)
        sigmas = getattr(base, "sigmas", None)
        if sigmas is None:
            at = base.timesteps.cpu().long().numpy()
            abar = base.alphas_cumprod.double().cpu().numpy()[at]
            return np.sqrt((1 - abar) / abar), "vp"
        levels = torch.as_tensor(sigmas).double().cpu().numpy()[:count]
        if base.config.get("use_flow_sigmas") or "FlowMatch" in type(base).__name__:
            return levels / np.maximum(1 - levels, 1e-12), "flow"
        return levels, "vp" if float(base.init_noise_sigma) == 1.0 else "ve"

    def _carried(self, sample: Tensor) -> Tensor:
        """The sample at base's first level, at the level where its steps begin.

        A pipeline gives the same one twice, for the network's input and for the step: it is carried
        again only if it, or what came of it, was changed in place in between.
        """
        if self._kept is not None and self._kept[0] is sample:
            moved, versions = self._kept[1:]
            if versions == (sample._version, moved._version):
                return moved
        rho, kind = self._rho()
        at = rho[[0, self._first]]
        scale = {"vp": np.hypot(1.0, at), "ve": np.ones(2), "flow": 1.0 + at}[kind]
        start, stop = zip(1 / scale, at / scale, strict=True)
        moved = self.gaussian.between(sample, start, stop)
        if not (sample.is_inference() or moved.is_inference()):  # which do not tell of changes
            self._kept = sample, moved, (sample._version, moved._version)
        return moved

    # -------------------------------------------------------------- stepping

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: base's, of the sample, or at the first step of the carried one."""
        self._start(timestep)
        self._scaled = True
        if self._pending and self.config.launch == "step":
            return sample  # the answer is not used
        if self._pending:
            sample = self._carried(sample)
        scaled: Tensor = self._base.scale_model_input(sample, timestep)
        return scaled

    @property
    def step(self) -> Callable[..., Any]:
        """Base's step, from the carried sample at first; takes the arguments of base's `step`."""
        return _with_signature(self._step, self._base.step)

    def _step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        require(self._timesteps is not None, "step", "no levels", "set_timesteps before it")
        self._start(timestep)
        if self._pending:
            self._pending = False
            if self.config.launch == "step":
                moved = self._carried(sample)
                return SchedulerOutput(moved) if kwargs.get("return_dict", True) else (moved,)
            wanted = "a pipeline that calls scale_model_input, or launch='step'"
            require(self._scaled, "launch", "'input', and a step without it", wanted)
            sample, self._kept = self._carried(sample), None
        return self._base.step(model_output, timestep, sample, *args, **kwargs)

    def _start(self, timestep: Any) -> None:
        """At the first call: noise is carried where the pipeline starts at the first time."""
        if self._started:
            return
        self._started = True
        if timestep is not None and self._pending:
            first = torch.as_tensor(timestep).flatten()[0].cpu() == self.timesteps[0].cpu()
            self._pending = bool(first)
        if self._pending and hasattr(self._base, "set_begin_index"):
            self._base.set_begin_index(self._first)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later step than the first, from a state that is no noise: image to image."""
        begin = whole(begin_index, "begin_index", 0)
        launched = self._pending and self.config.launch == "step"
        self._pending = self._pending and begin == 0
        if hasattr(self._base, "set_begin_index"):
            self._base.set_begin_index(self._first + max(0, begin - launched))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Base's; where it comes before the first step, that step's state is no noise."""
        self._pending = self._pending and self._started
        noisy: Tensor = self._base.add_noise(original_samples, noise, timesteps)
        return noisy

    # -------------------------------------------------------------- files

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        gaussian: GaussianScore | None = None,
        **kwargs: Any,
    ) -> Any:
        """Around the scheduler that a configuration describes, base's or a `TeleportScheduler`'s.

        kwargs: options of `TeleportScheduler`, and what changes in base's configuration.
        """
        require(isinstance(config, dict), "config", type(config).__name__, "a configuration")
        wanted = "the GaussianScore of the data, which a configuration does not have"
        require(gaussian is not None, "gaussian", None, wanted)
        assert gaussian is not None
        name = config.get("base_scheduler", config.get("_class_name"))
        made = DEISScheduler if name == "DEISScheduler" else getattr(diffusers, str(name), None)
        known = isinstance(made, type) and issubclass(made, SchedulerMixin)
        require(known, "base_scheduler", repr(name), "the name of a scheduler of diffusers")
        assert made is not None
        own = {key: config[key] for key in OPTIONS if key in config}
        own |= {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        left = {k: v for k, v in config.items() if k not in (*OPTIONS, "base_scheduler")}
        base, unused = made.from_config(
            {**left, "_class_name": name}, return_unused_kwargs=True, **kwargs
        )
        scheduler = cls(base, gaussian, **own)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """The configuration, and mean, eigenvalues and eigenvectors beside it."""
        one = self.gaussian
        tables = {
            "mean": one.mean, "eigenvalues": one.eigenvalues,
            "vectors": np.ascontiguousarray(one.vectors), "residual": np.array([one.residual]),
        }  # fmt: skip
        os.makedirs(save_directory, exist_ok=True)
        save_file(tables, os.path.join(save_directory, STATISTICS))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From a folder or a repository of the Hub that `save_pretrained` filled."""
        path = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB if key in kwargs}
        config, kwargs = cls.load_config(
            path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        file = os.path.join(path, subfolder or "", STATISTICS)
        if not os.path.isdir(path):
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(str(path), STATISTICS, subfolder=subfolder, **hub)
        if not os.path.isfile(file):
            raise InputError(f"path: got {path} without {STATISTICS}, want a saved scheduler")
        tables = load_file(file)
        gaussian = GaussianScore(
            tables["mean"], tables["eigenvalues"], tables["vectors"],
            residual=tables["residual"].item(),
        )  # fmt: skip
        return cls.from_config(
            config, return_unused_kwargs=return_unused_kwargs, gaussian=gaussian, **kwargs
        )


def _with_signature(function: Callable[..., Any], model: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the signature that pipelines look into before they call it."""

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
