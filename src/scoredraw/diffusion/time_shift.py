"""Time shift: tell the network the time that fits the sample, not the one the sampler has planned.

A network has seen, at time t, samples x_t of the forward process. A sampler shows it x̂_t, made by
its own imperfect steps: exposure bias. What tells levels of noise apart is a sample's variance over
its own entries, so a state is given, of the times around its nominal one c, the one that fits best:

    t_s = argmin { |var(x) - v_τ| : |τ - c| <= window/2 }     if c > cutoff, else c
    v_τ = 1 - abar_τ               "plain", of the paper; that of noise alone
    v_τ = 1 - abar_τ + abar_τ v_0  "matched": E var(x_τ), v_0 the mean variance of a clean sample

It costs one variance a sample and no call. Two readings of what is then done with t_s:

    "paper"   the state just made is taken for one at t_s: the network is asked at t_s, and the next
              step leads from t_s to the next nominal time
    "code"    the authors' program: the variance of the state *before* the step is held against the
              times around the step's goal, and the step lands on t_s; the network is asked at
              nominal times. That state is one step noisier than the window's centre, so t_s is
              nearly always an end of the window, mostly the noisy one: a constant, not a fit.

Li, Qu, Yao, Sun and Moens, "Alleviating exposure bias in diffusion models through sampling with
shifted time steps", ICLR 2024, arXiv 2305.15583.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.parameterisations import as_times
from scoredraw.diffusion.pseudo_numerical import (
    EpsFunction,
    PseudoNumericalSampler,
    PseudoNumericalState,
)
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]

MODES = ("paper", "code")
TARGETS = ("plain", "matched")
FEW_ENTRIES = 50  # below, chance moves the variance of a sample by a fifth and more


# ------------------------------------------------------------------ the decision


def sample_variance(x: Any) -> Any:
    """Variance of each sample over its own entries, unbiased: (B, *dims) -> float64 (B,).

    Arrays or tensors; O(B D). Of tensors in float32 from both moments, which loses log10(mean² /
    variance) of some six digits. Raises InputError for fewer than 2 entries a sample.

    >>> sample_variance(np.array([[1.0, 3.0], [5.0, 5.0]])).tolist()
    [2.0, 0.0]
    """
    size = math.prod(x.shape[1:])
    require(x.ndim >= 2 and size >= 2, "x", f"shape {tuple(x.shape)}", "2 or more entries a sample")
    if is_tensor(x):
        torch, rows = sys.modules["torch"], x.detach().flatten(1)
        rows = rows if rows.dtype.itemsize >= 4 else rows.float()
        norm, mean = torch.linalg.vector_norm(rows, dim=1).double(), rows.mean(dim=1).double()
        return norm.square_().sub_(mean.square_(), alpha=size).clamp_(min=0).div_(size - 1)
    return np.asarray(x, np.float64).reshape(len(x), size).var(axis=1, ddof=1)


class TimeShift:
    """The rule t_s above, for one set of levels: `rule(x, center)` -> int64 (B,).

    alphas_cumprod: abar (T,), decreasing in (0, 1]. window >= 0: whole; floor(window/2) times to
    either side are looked at, both ends included, cut at 0 and T - 1; equally near times: the
    smaller. cutoff in [0, T]: at center <= cutoff nothing is shifted. target: "plain" or
    "matched"; data_variance: v_0, which "matched" needs (`sample_variance(data).mean()`), and
    which for "plain" is there to be warned of. The level says nothing once v_0 reaches 1.

    Latents have v_0 near 1 by their scaling factor, images in [-1, 1] from 0.2 to 0.6: prefer
    "matched" unless v_0 is small.

    Raises InputError for what is out of these ranges, levels that do not decrease, NaN, samples of
    one entry; warns of samples of fewer than 50 entries. O(B (D + log T)).

    >>> abar = np.linspace(0.999, 0.001, 1000)
    >>> rule = TimeShift(abar, window=40, cutoff=300)
    >>> rule.of_variance([0.3, 0.505, 0.9], center=500).tolist()
    [480, 505, 520]
    """

    def __init__(
        self,
        alphas_cumprod: ArrayLike,
        window: int,
        cutoff: float,
        target: str = "plain",
        data_variance: float | None = None,
    ) -> None:
        abar = DiscreteAlphas(alphas_cumprod, clip=0.0).values
        self.levels = len(abar)
        self.window = whole(window, "window", 0)
        most = 2 * self.levels - 1
        require(self.window <= most, "window", window, f"at most {most}, for {self.levels} levels")
        fine = 0 <= cutoff <= self.levels
        require(fine, "cutoff", cutoff, f"a time from 0 to {self.levels}")
        require(target in TARGETS, "target", repr(target), f"one of {', '.join(TARGETS)}")
        self.cutoff, self.target, self.data_variance = float(cutoff), target, data_variance
        v0 = 0.0 if data_variance is None else float(data_variance)
        require(v0 >= 0, "data_variance", v0, "v_0 >= 0")
        if target == "matched":
            require(
                data_variance is not None, "data_variance", None, "v_0 of the data, for matched"
            )
            require(v0 < 1, "data_variance", v0, "0 <= v_0 < 1: else no level can be told")
        elif v0 >= 1:
            message = f"data_variance {v0:g} >= 1: the variance does not tell how noisy a state is"
            warnings.warn(message, stacklevel=2)
        self.variances: Float = 1 - abar + (abar * v0 if target == "matched" else 0.0)

    @property
    def shifts(self) -> bool:
        """Whether there is a time that is ever shifted."""
        return self.window >= 2 and self.cutoff < self.levels - 1

    def __call__(self, x: Any, center: Any) -> Any:
        """t_s of states x (B, *dims) at nominal times `center`, one or (B,): int64 where x is."""
        variance = sample_variance(x)
        warn_of_few_entries(x)
        return self.of_variance(variance, center)

    def of_variance(self, variance: Any, center: Any) -> Any:
        """t_s (B,) from the variances (B,) of the states."""
        found = as_times(variance)
        require(bool(np.isfinite(found).all()), "x", "NaN or infinity", "finite values")
        c = np.asarray(on_host(center))
        inside = bool(((c >= 0) & (c < self.levels) & (c % 1 == 0)).all())
        require(inside, "center", center, f"whole times from 0 to {self.levels - 1}")
        fits = found.ndim == 1 and c.shape in ((), (1,), found.shape)
        require(fits, "center", f"shape {c.shape}", f"one time or {found.shape}")
        shifted = self.nearest(found, c.astype(np.int64))
        if is_tensor(variance):
            return sys.modules["torch"].as_tensor(shifted, device=variance.device)
        return shifted

    def nearest(self, variance: Float, center: Int | int) -> Int:
        """`of_variance` of finite numbers at whole times in range."""
        v, half = self.variances, self.window // 2
        # v increases, so the best time of a window is the best of all, moved to the window's end
        above = np.minimum(np.maximum(np.searchsorted(v, variance), 1), self.levels - 1)
        best = above - (variance - v[above - 1] <= v[above] - variance)
        low, high = np.maximum(center - half, 0), np.minimum(center + half, self.levels - 1)
        within = np.minimum(np.maximum(best, low), high)  # twice as fast as np.clip
        return np.where(center > self.cutoff, within, center)


def time_shift(
    x: Any,
    center: Any,
    alphas_cumprod: ArrayLike,
    window: int,
    cutoff: float,
    target: str = "plain",
    data_variance: float | None = None,
) -> Any:
    """The times that fit states x (B, *dims) best, int64 (B,): t_s of `TimeShift`, in one call.

    center: the nominal time, one or (B,). Row-local: a sample's time does not depend on the others.
    Li et al. 2024, arXiv 2305.15583; see `TimeShift` for the arguments and what is raised.

    >>> abar = np.linspace(0.999, 0.001, 1000)
    >>> x = np.random.default_rng(0).normal(0, 0.7, (3, 100_000))
    >>> time_shift(x, 500, abar, window=40, cutoff=300).tolist()
    [490, 492, 490]
    """
    return TimeShift(alphas_cumprod, window, cutoff, target, data_variance)(x, center)


def warn_of_few_entries(x: Any) -> None:
    size = int(np.prod(x.shape[1:]))
    if size < FEW_ENTRIES:
        warnings.warn(f"{size} entries a sample: their variance is mostly chance", stacklevel=3)


# ------------------------------------------------------------------ the sampler


class TimeShiftSampler:
    """A `PseudoNumericalSampler` each of whose states is shown at the time that fits it.

    base, num_steps, schedule and the other options are those of `PseudoNumericalSampler`. window,
    cutoff, target, data_variance: see `TimeShift`; fewer steps want wider windows (the paper: 40 to
    100 at 10 steps, a few at 100) and a cutoff from 200 to 400. mode: "paper" or "code", as above.
    The first call is never shifted, nor what lies at or below the cutoff.

    `sample(eps_fn, x_T)` returns the samples and the shifts (N, B): the time given to the state
    that each step has made ("paper"), or on which it landed ("code"). `init` and `step` go step by
    step; `step` returns the new state and its shifts (B,). eps_fn(x, t) takes a time a sample (B,);
    `by_time` makes it of one for a single time. With classifier-free guidance let eps_fn return the
    guided eps, and the variance is the guided sample's. DEIS and DPM-Solver weigh earlier eps
    by the times really used, PNDM by those of its grid. With window 0 or cutoff T every bit is the
    base sampler's; with eta = 0 a sample's result does not depend on the others of its batch.

    Raises InputError as the two classes named do. Cost: one variance a sample and step.
    Li et al. 2024, arXiv 2305.15583. The authors' program fails at the window's upper end, measures
    the model's outputs instead of the sample (DPM-Solver), doubles the window and keeps nominal
    coefficients (DEIS), and cuts off the fractions of midpoint times; none of it is done here.

    >>> sampler = TimeShiftSampler(num_steps=10, window=60, cutoff=200)
    >>> abar = sampler.host.schedule.values
    >>> gaussian = lambda x, t: np.sqrt(1 - abar[t])[:, None] * x  # the eps of N(0, I) data
    >>> x, shifts = sampler.sample(gaussian, np.random.default_rng(0).normal(size=(2, 500)))
    >>> x.shape, shifts[:3].tolist()
    ((2, 500), [[929, 869], [829, 769], [729, 669]])
    """

    def __init__(
        self,
        schedule: DiscreteAlphas | None = None,
        num_steps: int = 20,
        base: str = "ddim",
        *,
        window: int = 40,
        cutoff: float = 300,
        mode: str = "paper",
        target: str = "plain",
        data_variance: float | None = None,
        **options: Any,
    ) -> None:
        require(mode in MODES, "mode", repr(mode), f"one of {', '.join(MODES)}")
        self.mode = mode
        self.host = PseudoNumericalSampler(schedule, num_steps, base, **options)
        abar = self.host.schedule.values
        self.rule = TimeShift(abar, window, cutoff, target, data_variance)

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return self.host.num_steps

    @property
    def nfe(self) -> int:
        """Network calls that `sample` makes: those of the base."""
        return self.host.nfe

    def init(self, x_T: Any) -> PseudoNumericalState:
        """The state at the first time. x_T: floating (B, *dims), finite, of 2 entries or more."""
        state = self.host.init(x_T)
        warn_of_few_entries(state.x)
        return state

    def step(
        self, state: PseudoNumericalState, eps_fn: EpsFunction, rng: Any = None
    ) -> tuple[PseudoNumericalState, Int]:
        """The state one step further on, and the times (B,) that shifting has chosen."""
        i = state.index
        require(i < self.num_steps, "state", f"one after the last of {i} steps", "an earlier one")
        end = np.full(len(state.times), self.host.times[i + 1])
        if self.mode == "code":
            goal = self._shifted(state.x, end, i) if i else end
            return self.host.step(state, eps_fn, rng, target=goal), goal
        moved = self.host.step(state, eps_fn, rng)
        times = self._shifted(moved.x, end, i + 1) if i + 1 < self.num_steps else end
        return replace(moved, times=times), times

    def sample(self, eps_fn: EpsFunction, x_T: Any, rng: Any = None) -> tuple[Any, Int]:
        """The samples that x_T ~ N(0, I) leads to, and the shifts (N, B).

        rng: a seed or NumPy Generator for arrays, a torch.Generator for tensors; for eta > 0.
        """
        state = self.init(x_T)
        source = rng if is_tensor(state.x) else generator(rng)
        shifts = np.empty((self.num_steps, len(state.x)), np.int64)
        if shifts.shape[1] == 0:
            return self.host.sample(eps_fn, x_T), shifts
        for i in range(self.num_steps):
            state, shifts[i] = self.step(state, eps_fn, source)
        return state.sample, shifts

    def _shifted(self, x: Any, center: Int, i: int) -> Int:
        """t_s of step i's states around the nominal times; data and those below the cutoff stay."""
        if (center <= self.rule.cutoff).all():
            return center
        variance = as_times(sample_variance(x))
        finite = bool(np.isfinite(variance).all())
        require(finite, "x", f"NaN or infinity before step {i}", "finite values")
        return np.asarray(self.rule.of_variance(variance, center))


# ------------------------------------------------------------------ which window, which cutoff


@dataclass(frozen=True, eq=False)
class ShiftSearch:
    """What every window and cutoff comes to, and the best of them.

    losses (W, C, R) of R repeats; host (R,) without shifts. window, cutoff: least mean loss; 0 and
    T, no shift, where none is below the host's. gains (R,): the host's loss minus that of the pair
    chosen on the *other* repeats, so that choosing is not mistaken for improving.
    """

    windows: tuple[int, ...]
    cutoffs: tuple[float, ...]
    losses: Float
    host: Float
    window: int
    cutoff: float
    gains: Float


def search_shift(
    sampler: TimeShiftSampler,
    eps_fn: EpsFunction,
    noises: Sequence[Any],
    loss: Callable[[Any], float],
    windows: Sequence[int] = (10, 20, 40, 80),
    cutoffs: Sequence[float] = (100, 200, 300, 400, 500),
    rng: int = 0,
) -> ShiftSearch:
    """Try windows and cutoffs on the same noises and keep the pair whose samples lose least.

    sampler: its other settings hold for all. noises: R >= 2 batches x_T. loss(samples): lower is
    better, such as a Fréchet distance to data. rng: seed of every run, for eta > 0.
    (W C + 1) R runs of the sampler. Raises InputError for fewer than 2 repeats, no choices, choices
    that `TimeShift` refuses, a loss that is not finite.

    >>> sampler = TimeShiftSampler(num_steps=5, target="matched", data_variance=0.25)
    >>> abar = sampler.host.schedule.values[:, None]
    >>> exact = lambda x, t: np.sqrt(1 - abar[t]) * x / (1 - 0.75 * abar[t])
    >>> noises = np.random.default_rng(0).normal(size=(3, 4, 200))
    >>> found = search_shift(sampler, exact, noises, lambda x: abs(x.std() - 0.5), (0, 40), (200,))
    >>> found.losses.shape, found.gains.shape
    ((2, 1, 3), (3,))
    """
    require(len(noises) >= 2, "noises", f"{len(noises)} batches", "2 or more")
    pairs = list(itertools.product(windows, cutoffs))
    require(len(pairs) > 0, "windows, cutoffs", "no choice", "at least one of each")
    abar, old = sampler.host.schedule.values, sampler.rule
    rules = [TimeShift(abar, w, c, old.target, old.data_variance) for w, c in pairs]

    def losses(rule: TimeShift) -> list[float]:
        tried = copy(sampler)
        tried.rule = rule
        found = []
        for x in noises:
            source = rng
            if is_tensor(x):
                source = sys.modules["torch"].Generator(x.device).manual_seed(rng)
            found.append(float(loss(tried.sample(eps_fn, x, source)[0])))
        require(bool(np.isfinite(found).all()), "loss", found, "finite numbers")
        return found

    none = TimeShift(abar, 0, len(abar), old.target, old.data_variance)
    host = np.array(losses(none))
    table = np.array([losses(rule) for rule in rules])  # (W C, R)
    everything, choices = np.vstack([table, host]), [*pairs, (0, float(len(abar)))]
    window, cutoff = choices[int(everything.mean(axis=1).argmin())]
    others = everything.sum(axis=1, keepdims=True) - everything
    gains = host - everything[others.argmin(axis=0), np.arange(len(host))]
    shape = (len(windows), len(cutoffs), len(host))
    return ShiftSearch(
        tuple(windows), tuple(cutoffs), table.reshape(shape), host, window, float(cutoff), gains
    )
