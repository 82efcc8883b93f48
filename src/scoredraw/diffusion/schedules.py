"""Noise schedules: how much signal and how much noise a diffused sample holds at a time.

Every diffusion here is written  x_t = alpha(t) x_0 + sigma(t) eps  with eps ~ N(0, I), and time
runs from the data (small t) to the noise (large t). A schedule answers for alpha and sigma, and
for what follows from them:

    abar = alpha²                 signal power, "alphas_cumprod" of the discrete models
    rho  = sigma / alpha          noise per unit of signal; log_snr = -2 log rho
    f    = d log alpha / dt       drift, and g² = d sigma²/dt - 2 f sigma² squared diffusion, of the
                                  process  dx = f x dt + g dw  that has these marginals

Signal and noise are computed from log alpha, so that neither 1 - abar at the data end nor
1/abar - 1 at the noise end loses digits. What sampling does at the two ends differs between
programs that agree on everything else; a schedule therefore carries its `EndPoints` explicitly.

Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole, "Score-based generative modeling through
stochastic differential equations", 2021, arXiv 2011.13456.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.diffusion.parameterisations import as_times, per_sample, to_eps, to_x0
from scoredraw.diffusion.time_grids import checked_times, time_grid
from scoredraw.errors import require
from scoredraw.uniforms import generator

__all__ = [
    "Cosine",
    "DiscreteAlphas",
    "EndPoints",
    "LinearBeta",
    "LinearFlow",
    "NoiseSchedule",
    "OrnsteinUhlenbeck",
    "SubVariancePreserving",
    "VarianceExploding",
    "VariancePreserving",
    "checked_times",
    "time_grid",
    "to_eps",
    "to_x0",
]

Float = NDArray[np.float64]

PRIORS = ("noise", "marginal")
LAST_STEPS = ("stop", "denoise", "clean")


@dataclass(frozen=True)
class EndPoints:
    """Where sampling starts and stops, and what is done there.

    t_start: the noise end. t_end: the data end, below it.
    prior: what the first state is drawn from: "noise" is N(0, s² I), s = `prior_std`, as if no
        signal were left at t_start; "marginal" is the law of x_t at t_start itself, for schedules
        that keep signal to the end (a VP process with betas 0.1 to 1 keeps alpha = 0.76).
    last: "stop" returns the state at t_end, with its remaining noise; "denoise" spends one more
        network call at t_end and returns its prediction of x_0; "clean" lets the last step go
        from the last-but-one time straight to abar = 1 and needs no further call.

    >>> EndPoints(1.0, 1e-3).last
    'stop'
    """

    t_start: float
    t_end: float
    prior: str = "noise"
    last: str = "stop"

    def __post_init__(self) -> None:
        for name in ("t_start", "t_end"):
            value = getattr(self, name)
            require(bool(np.isfinite(value)), name, value, "a finite time")
        wanted = f"a time above t_end = {self.t_end:g}"
        require(self.t_start > self.t_end, "t_start", self.t_start, wanted)
        require(self.prior in PRIORS, "prior", repr(self.prior), f"one of {', '.join(PRIORS)}")
        choices = f"one of {', '.join(LAST_STEPS)}"
        require(self.last in LAST_STEPS, "last", repr(self.last), choices)


class NoiseSchedule(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps; methods take times of any shape and return float64.

    A subclass gives `log_alpha`, `rho`, its inverse `time_of_rho`, `drift` and `diffusion`, and
    says on which times it is defined (`domain`) and where abar is not smooth (`knots`).
    """

    ends: EndPoints
    domain: tuple[float, float] = (0.0, np.inf)
    knots: Float = np.zeros(0)

    @abstractmethod
    def log_alpha(self, t: ArrayLike) -> Float:
        """log alpha(t), the log of the signal's scale."""

    @abstractmethod
    def rho(self, t: ArrayLike) -> Float:
        """sigma(t) / alpha(t), increasing in t."""

    @abstractmethod
    def time_of_rho(self, rho: ArrayLike) -> Float:
        """The time at which sigma / alpha is rho: the inverse of `rho`."""

    @abstractmethod
    def drift(self, t: ArrayLike) -> Float:
        """f(t) = d log alpha / dt."""

    @abstractmethod
    def diffusion(self, t: ArrayLike) -> Float:
        """g²(t) = d sigma²/dt - 2 f sigma²."""

    def alpha(self, t: ArrayLike) -> Float:
        """Scale of the signal."""
        return np.exp(self.log_alpha(t))

    def abar(self, t: ArrayLike) -> Float:
        """Signal power alpha²."""
        return np.exp(2 * self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Float:
        """Standard deviation of the noise."""
        return np.asarray(self.alpha(t) * self.rho(t))

    def log_snr(self, t: ArrayLike) -> Float:
        """log(alpha²/sigma²) = -2 log rho; the λ of the DPM solvers is half of it."""
        with np.errstate(divide="ignore"):
            return np.asarray(-2 * np.log(self.rho(t)))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the "noise" prior of `ends`."""
        return float(self.sigma(self.ends.t_start))

    def with_ends(self, **changes: Any) -> Self:
        """A copy whose `ends` have these fields changed.

        >>> LinearBeta().with_ends(t_end=1e-4, last="denoise").ends
        EndPoints(t_start=1.0, t_end=0.0001, prior='noise', last='denoise')
        """
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.ends = replace(self.ends, **changes)
        return copy

    def perturb(self, x0: Any, t: Any, noise: Any) -> Any:
        """alpha(t) x0 + sigma(t) noise, for one time or one per sample; arrays or tensors.

        >>> LinearBeta().perturb(np.ones((2, 3)), [0.0, 1e9], np.full((2, 3), 5.0)).tolist()
        [[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]
        """
        times = as_times(t)
        return per_sample(self.alpha(times), x0) * x0 + per_sample(self.sigma(times), x0) * noise

    def draw_prior(
        self,
        shape: tuple[int, ...],
        rng: int | np.random.Generator | None = None,
        *,
        data: Any = None,
    ) -> Float:
        """First states (B, *dims) from the prior of `ends`, float64.

        "noise": N(0, prior_std² I). "marginal": rows of `data` (n, *dims), drawn with replacement,
        diffused to t_start; InputError without data.

        >>> VarianceExploding(0.01, 50.0).draw_prior((20000,), rng=0).std().round().item()
        50.0
        """
        draw = generator(rng)
        noise = draw.standard_normal(shape)
        if self.ends.prior == "noise":
            return self.prior_std * noise
        require(data is not None, "data", None, "samples to diffuse, for the marginal prior")
        rows = np.asarray(data, np.float64)
        wanted = f"(n, {', '.join(map(str, shape[1:]))})"
        require(rows.shape[1:] == shape[1:] and len(rows) > 0, "data", rows.shape, wanted)
        chosen = rows[draw.integers(len(rows), size=shape[0])]
        return np.asarray(self.perturb(chosen, self.ends.t_start, noise))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ends})"


class VariancePreserving(NoiseSchedule):
    """alpha² + sigma² = 1: the noise replaces the signal that is lost, and g² = -2 f."""

    def sigma(self, t: ArrayLike) -> Float:
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def rho(self, t: ArrayLike) -> Float:
        with np.errstate(over="ignore"):
            return np.sqrt(np.expm1(-2 * self.log_alpha(t)))

    def diffusion(self, t: ArrayLike) -> Float:
        return -2 * self.drift(t)

    @property
    def prior_std(self) -> float:
        return 1.0


class LinearBeta(VariancePreserving):
    """The VP process with beta(t) = beta_0 + t (beta_1 - beta_0): abar = exp(-∫₀ᵗ beta).

    Betas per unit of time; the defaults are those of the continuous CIFAR-10 models. Raises
    InputError unless beta_0 > 0 and beta_1 >= 0. Song et al. 2021, arXiv 2011.13456.

    >>> schedule = LinearBeta()
    >>> float(schedule.abar(1.0).round(8))
    4.319e-05
    >>> float(schedule.time_of_rho(schedule.rho(0.3)).round(12))
    0.3
    """

    def __init__(
        self, beta_0: float = 0.1, beta_1: float = 20.0, *, ends: EndPoints | None = None
    ) -> None:
        require(0 < beta_0 < np.inf, "beta_0", beta_0, "a positive number")
        require(0 <= beta_1 < np.inf, "beta_1", beta_1, "a number >= 0")
        self.beta_0, self.beta_1 = float(beta_0), float(beta_1)
        if beta_1 < beta_0:  # beta is positive up to there
            self.domain = (0.0, self.beta_0 / (self.beta_0 - self.beta_1))
        self.ends = ends or EndPoints(1.0, 1e-3)

    def beta(self, t: ArrayLike) -> Float:
        """beta(t), the rate at which signal power is lost."""
        return np.asarray(self.beta_0 + np.asarray(t, np.float64) * (self.beta_1 - self.beta_0))

    def lost(self, t: ArrayLike) -> Float:
        """L(t) = ∫₀ᵗ beta = -log abar."""
        times = np.asarray(t, np.float64)
        return np.asarray(times * (0.5 * times * (self.beta_1 - self.beta_0) + self.beta_0))

    def time_of_lost(self, lost: ArrayLike) -> Float:
        """The root of L(t) = lost in the form that stays exact when beta_1 → beta_0."""
        amount = np.asarray(lost, np.float64)
        square = self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * amount
        root = np.sqrt(np.maximum(square, 0.0))  # falling betas reach 0 at the domain's end
        return np.asarray(2 * amount / (self.beta_0 + root))

    def log_alpha(self, t: ArrayLike) -> Float:
        return -0.5 * self.lost(t)

    def time_of_rho(self, rho: ArrayLike) -> Float:
        return self.time_of_lost(np.log1p(np.square(np.asarray(rho, np.float64))))

    def drift(self, t: ArrayLike) -> Float:
        return -0.5 * self.beta(t)


class SubVariancePreserving(LinearBeta):
    """The sub-VP process: alpha of `LinearBeta`, sigma = 1 - abar, never above the VP one.

    rho = 2 sinh(L/2) and g² = beta (1 - abar²). Song et al. 2021, arXiv 2011.13456.

    >>> float(SubVariancePreserving().sigma(1.0).round(6))
    0.999957
    """

    def sigma(self, t: ArrayLike) -> Float:
        return -np.expm1(-self.lost(t))

    def rho(self, t: ArrayLike) -> Float:
        with np.errstate(over="ignore"):
            return 2 * np.sinh(0.5 * self.lost(t))

    def time_of_rho(self, rho: ArrayLike) -> Float:
        return self.time_of_lost(2 * np.arcsinh(0.5 * np.asarray(rho, np.float64)))

    def diffusion(self, t: ArrayLike) -> Float:
        return np.asarray(self.beta(t) * -np.expm1(-2 * self.lost(t)))


class OrnsteinUhlenbeck(VariancePreserving):
    """alpha = e^{-t}, sigma² = 1 - e^{-2t}: the process dx = -x dt + sqrt(2) dw.

    Its usual span is [0.05, 2], with an early stop and signal alpha = 0.14 left at t = 2.

    >>> OrnsteinUhlenbeck().diffusion(0.3).item()
    2.0
    """

    def __init__(self, *, ends: EndPoints | None = None) -> None:
        self.ends = ends or EndPoints(2.0, 0.05)

    def log_alpha(self, t: ArrayLike) -> Float:
        return -np.asarray(t, np.float64)

    def time_of_rho(self, rho: ArrayLike) -> Float:
        return np.asarray(0.5 * np.log1p(np.square(np.asarray(rho, np.float64))))

    def drift(self, t: ArrayLike) -> Float:
        return -np.ones_like(np.asarray(t, np.float64))


class Cosine(VariancePreserving):
    """abar = cos²(φ), φ = (t + s)/(1 + s) · π/2: rho = tan φ.

    s: the offset that keeps some noise at t = 0. No signal is left at t = 1, so sampling starts at
    0.9946 by default. Nichol and Dhariwal 2021, arXiv 2102.09672 (which divides by abar(0)).

    >>> float(Cosine().rho(Cosine().time_of_rho(1.0)).round(12))
    1.0
    """

    domain = (0.0, 1.0)

    def __init__(self, offset: float = 0.008, *, ends: EndPoints | None = None) -> None:
        require(0 <= offset < np.inf, "offset", offset, "a number >= 0")
        self.offset = float(offset)
        self.speed = 0.5 * np.pi / (1 + self.offset)
        self.ends = ends or EndPoints(0.9946, 1e-3)

    def phase(self, t: ArrayLike) -> Float:
        """φ, in [0, π/2] radians."""
        return np.asarray((np.asarray(t, np.float64) + self.offset) * self.speed)

    def log_alpha(self, t: ArrayLike) -> Float:
        return np.log(np.cos(self.phase(t)))

    def sigma(self, t: ArrayLike) -> Float:
        return np.sin(self.phase(t))

    def rho(self, t: ArrayLike) -> Float:
        return np.tan(self.phase(t))

    def time_of_rho(self, rho: ArrayLike) -> Float:
        return np.arctan(np.asarray(rho, np.float64)) / self.speed - self.offset

    def drift(self, t: ArrayLike) -> Float:
        return -self.speed * np.tan(self.phase(t))


class DiscreteAlphas(VariancePreserving):
    """abar of a discrete model, linear between its integer times 0 .. T-1.

    alphas_cumprod: (T,) in (0, 1], decreasing; an abar of 0 (zero terminal SNR) is refused, as
    rho would be infinite there. Values are clipped to [clip, 1 - clip]. Slopes (`drift`) at an
    integer are those of the piece below it. Index 0 holds noise, abar(0) = 0.9999 for the usual
    betas: `ends.last` says whether sampling stops there.

    >>> schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    >>> schedule.ends.t_start, float(schedule.abar(0)), float(schedule.abar(999).round(8))
    (999.0, 0.9999, 4.036e-05)
    """

    def __init__(
        self, alphas_cumprod: Any, *, clip: float = 1e-7, ends: EndPoints | None = None
    ) -> None:
        values = as_times(alphas_cumprod)
        require(
            values.ndim == 1 and values.size >= 2, "alphas_cumprod", values.shape, "(T,), T >= 2"
        )
        inside = bool(((values > 0) & (values <= 1)).all())
        wanted = "abar in (0, 1]; 0, a zero terminal SNR, has no sigma/alpha"
        require(inside, "alphas_cumprod", f"[{values.min()}, {values.max()}]", wanted)
        rises = np.flatnonzero(np.diff(values) >= 0)
        came = f"no decrease at {rises[0] + 1}" if rises.size else ""
        require(not rises.size, "alphas_cumprod", came, "abar decreasing in time")
        require(0 <= clip < 0.5, "clip", clip, "a share in [0, 0.5)")
        self.values = np.clip(values, clip, 1 - clip)
        self.domain = (0.0, float(len(values) - 1))
        self.knots = np.arange(len(values), dtype=np.float64)
        self.ends = ends or EndPoints(self.domain[1], 0.0)

    @classmethod
    def from_betas(
        cls, betas: Any, *, clip: float = 1e-7, ends: EndPoints | None = None
    ) -> DiscreteAlphas:
        """From the betas (T,): abar_t = Π (1 - beta)."""
        return cls(np.cumprod(1 - as_times(betas)), clip=clip, ends=ends)

    def abar(self, t: ArrayLike) -> Float:
        return np.asarray(np.interp(np.asarray(t, np.float64), self.knots, self.values))

    def log_alpha(self, t: ArrayLike) -> Float:
        return 0.5 * np.log(self.abar(t))

    def rho(self, t: ArrayLike) -> Float:
        abar = self.abar(t)
        return np.sqrt((1 - abar) / abar)

    def time_of_rho(self, rho: ArrayLike) -> Float:
        abar = 1 / (1 + np.square(np.asarray(rho, np.float64)))
        return np.asarray(np.interp(abar, self.values[::-1], self.knots[::-1]))

    def drift(self, t: ArrayLike) -> Float:
        piece = np.clip(np.ceil(np.asarray(t, np.float64)) - 1, 0, len(self.values) - 2)
        slope = np.diff(self.values)[piece.astype(np.int64)]
        return np.asarray(0.5 * slope / self.abar(t))


class VarianceExploding(NoiseSchedule):
    """alpha = 1: noise is added and no signal lost. rho = sigma.

    time="sigma": the time is sigma itself (Karras et al. 2022, arXiv 2206.00364; EDM nets give
    eps = (x - D(x, sigma)) / sigma). time="geometric": sigma_min (sigma_max/sigma_min)^t on [0, 1]
    (Song et al. 2021, arXiv 2011.13456). The prior is N(0, sigma_max² I).

    >>> VarianceExploding().prior_std
    80.0
    >>> float(VarianceExploding(0.2, 1.0, time="geometric").sigma(0.0))
    0.2
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        *,
        time: str = "sigma",
        ends: EndPoints | None = None,
    ) -> None:
        require(0 < sigma_min < np.inf, "sigma_min", sigma_min, "a positive number")
        wanted = f"a number above sigma_min = {sigma_min:g}"
        require(sigma_min < sigma_max < np.inf, "sigma_max", sigma_max, wanted)
        require(time in ("sigma", "geometric"), "time", repr(time), "sigma or geometric")
        self.sigma_min, self.sigma_max, self.time = float(sigma_min), float(sigma_max), time
        self.log_ratio = float(np.log(sigma_max / sigma_min))
        default = (self.sigma_max, self.sigma_min) if time == "sigma" else (1.0, 0.0)
        self.ends = ends or EndPoints(*default)

    def log_alpha(self, t: ArrayLike) -> Float:
        return np.zeros_like(np.asarray(t, np.float64))

    def sigma(self, t: ArrayLike) -> Float:
        times = np.array(t, np.float64)
        return times if self.time == "sigma" else self.sigma_min * np.exp(self.log_ratio * times)

    def rho(self, t: ArrayLike) -> Float:
        return self.sigma(t)

    def time_of_rho(self, rho: ArrayLike) -> Float:
        sigmas = np.asarray(rho, np.float64)
        if self.time == "sigma":
            return sigmas
        return np.asarray(np.log(sigmas / self.sigma_min) / self.log_ratio)

    def drift(self, t: ArrayLike) -> Float:
        return np.zeros_like(np.asarray(t, np.float64))

    def diffusion(self, t: ArrayLike) -> Float:
        sigma = self.sigma(t)
        slope = 1.0 if self.time == "sigma" else self.log_ratio * sigma
        return np.asarray(2 * sigma * slope)


class LinearFlow(NoiseSchedule):
    """alpha = 1 - t, sigma = t: rectified flow. rho = t/(1 - t), infinite at t = 1.

    Lipman, Chen, Ben-Hamu, Nickel and Le 2023, arXiv 2210.02747.

    >>> float(LinearFlow().rho(0.75))
    3.0
    """

    domain = (0.0, 1.0)

    def __init__(self, *, ends: EndPoints | None = None) -> None:
        self.ends = ends or EndPoints(0.999, 1e-3)

    def log_alpha(self, t: ArrayLike) -> Float:
        with np.errstate(divide="ignore"):
            return np.log1p(-np.asarray(t, np.float64))

    def sigma(self, t: ArrayLike) -> Float:
        return np.array(t, np.float64)

    def rho(self, t: ArrayLike) -> Float:
        times = np.asarray(t, np.float64)
        with np.errstate(divide="ignore"):
            return np.asarray(times / (1 - times))

    def time_of_rho(self, rho: ArrayLike) -> Float:
        ratio = np.asarray(rho, np.float64)
        return np.asarray(ratio / (1 + ratio))

    def drift(self, t: ArrayLike) -> Float:
        return np.asarray(-1 / (1 - np.asarray(t, np.float64)))

    def diffusion(self, t: ArrayLike) -> Float:
        return 2 * self.rho(t)

    @property
    def prior_std(self) -> float:
        return 1.0
