r"""How fast a masked diffusion hides tokens: the share alpha(t) that is still seen at time t.

Every token is masked on its own, with probability m(t) = 1 - alpha(t), which rises from 0 at t = 0
to 1 at t = 1. Backwards, a token that is masked at t is shown by s < t with probability

    (m(t) - m(s)) / m(t),

so that the schedule is only a clock: what is drawn depends on m alone.

"linear"      m = (1 - eps) t               MDLM has eps = 1e-3
"cosine"      m = cos(π/2 (1 - t))          MaskGIT, MD4
"polynomial"  m = t^power                   MD4
"geometric"   m = 1 - exp(-σ(t)), σ = σ_min (σ_max/σ_min)^t     SEDD

Austin et al. 2021, arXiv 2107.03006; Sahoo et al. 2024, arXiv 2406.07524 (MDLM); Shi et al. 2024,
arXiv 2406.04329 (MD4); Lou et al. 2024, arXiv 2310.16834 (SEDD).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, require

Float = NDArray[np.float64]

END_SLACK = 2e-3  # of m(0) = 0 and m(1) = 1: MDLM's m(1) is 0.999
CHECKED_TIMES = 1025
BISECTIONS = 60


class MaskSchedule(ABC):
    """m(t) on [0, 1], its inverse and its slope; all float64, element by element."""

    @abstractmethod
    def masked(self, t: ArrayLike) -> Float:
        """m(t), the probability that a token is masked."""

    @abstractmethod
    def slope(self, t: ArrayLike) -> Float:
        """dm/dt."""

    @abstractmethod
    def _inverse(self, m: Float) -> Float:
        """The time of m, for m from m(0) to m(1)."""

    def alpha(self, t: ArrayLike) -> Float:
        """1 - m(t), the probability that a token is seen."""
        return np.asarray(1 - self.masked(t))

    def time_of_masked(self, m: ArrayLike) -> Float:
        """The time at which m(t) is m; below m(0) it is 0, above m(1) it is 1.

        >>> CosineMasking().time_of_masked([0.0, 0.5, 1.0]).round(4).tolist()
        [0.0, 0.3333, 1.0]
        """
        low, high = self.masked([0.0, 1.0])
        levels = np.asarray(m, np.float64)
        inside = np.clip(self._inverse(np.clip(levels, low, high)), 0.0, 1.0)
        return np.where(levels <= low, 0.0, np.where(levels >= high, 1.0, inside))

    def unmasking(self, t: ArrayLike, s: ArrayLike) -> Float:
        """(m(t) - m(s)) / m(t): the probability that a token masked at t is shown by s <= t."""
        masked = self.masked(t)
        return np.asarray((masked - self.masked(s)) / masked)


class LinearMasking(MaskSchedule):
    """m = (1 - eps) t, alpha = 1 - (1 - eps) t: "log-linear", as -log alpha is what is set.

    >>> float(LinearMasking(1e-3).masked(1.0))
    0.999
    """

    def __init__(self, eps: float = 0.0) -> None:
        require(0 <= eps < 1, "eps", eps, "a share in [0, 1)")
        self.top = 1 - float(eps)

    def masked(self, t: ArrayLike) -> Float:
        return np.asarray(self.top * np.asarray(t, np.float64))

    def slope(self, t: ArrayLike) -> Float:
        return np.full_like(np.asarray(t, np.float64), self.top)

    def _inverse(self, m: Float) -> Float:
        return np.asarray(m / self.top)


class CosineMasking(MaskSchedule):
    """m = cos(π/2 (1 - t)) = sin(π t / 2): most tokens are shown late."""

    def masked(self, t: ArrayLike) -> Float:
        return np.asarray(np.sin(np.pi / 2 * np.asarray(t, np.float64)))

    def slope(self, t: ArrayLike) -> Float:
        return np.asarray(np.pi / 2 * np.cos(np.pi / 2 * np.asarray(t, np.float64)))

    def _inverse(self, m: Float) -> Float:
        return np.asarray(2 / np.pi * np.arcsin(m))


class PolynomialMasking(MaskSchedule):
    """m = t^power.

    >>> float(PolynomialMasking(3.0).time_of_masked(0.125))
    0.5
    """

    def __init__(self, power: float = 2.0) -> None:
        require(0 < power < np.inf, "power", power, "a positive number")
        self.power = float(power)

    def masked(self, t: ArrayLike) -> Float:
        return np.asarray(np.asarray(t, np.float64) ** self.power)

    def slope(self, t: ArrayLike) -> Float:
        with np.errstate(divide="ignore"):
            return np.asarray(self.power * np.asarray(t, np.float64) ** (self.power - 1))

    def _inverse(self, m: Float) -> Float:
        return np.asarray(m ** (1 / self.power))


class GeometricMasking(MaskSchedule):
    """m = 1 - exp(-σ), σ = σ_min (σ_max/σ_min)^t: uniform in the log of what hides tokens.

    >>> GeometricMasking().masked([0.0, 1.0]).round(6).tolist()
    [0.001, 1.0]
    """

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 20.0) -> None:
        require(0 < sigma_min < np.inf, "sigma_min", sigma_min, "a positive number")
        wanted = f"a number above sigma_min = {sigma_min:g}"
        require(sigma_min < sigma_max < np.inf, "sigma_max", sigma_max, wanted)
        self.sigma_min, self.log_ratio = float(sigma_min), float(np.log(sigma_max / sigma_min))

    def sigma(self, t: ArrayLike) -> Float:
        """σ(t) = -log alpha(t)."""
        return np.asarray(self.sigma_min * np.exp(self.log_ratio * np.asarray(t, np.float64)))

    def masked(self, t: ArrayLike) -> Float:
        return np.asarray(-np.expm1(-self.sigma(t)))

    def slope(self, t: ArrayLike) -> Float:
        sigma = self.sigma(t)
        return np.asarray(self.log_ratio * sigma * np.exp(-sigma))

    def _inverse(self, m: Float) -> Float:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(-np.log1p(-m) / self.sigma_min) / self.log_ratio)


class CustomMasking(MaskSchedule):
    """Any alpha(t), a function of float64 arrays; inverse by bisection, slope by steps of 1e-6.

    >>> float(CustomMasking(lambda t: (1 - t) ** 2).time_of_masked(0.75).round(12))
    0.5
    """

    def __init__(self, alpha: Callable[[Float], ArrayLike]) -> None:
        self.function = alpha

    def masked(self, t: ArrayLike) -> Float:
        return np.asarray(1 - np.asarray(self.function(np.asarray(t, np.float64)), np.float64))

    def slope(self, t: ArrayLike) -> Float:
        times = np.asarray(t, np.float64)
        after, before = np.minimum(times + 1e-6, 1.0), np.maximum(times - 1e-6, 0.0)
        return np.asarray((self.masked(after) - self.masked(before)) / (after - before))

    def _inverse(self, m: Float) -> Float:
        low, high = np.zeros_like(m), np.ones_like(m)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = self.masked(middle) > m
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.asarray((low + high) / 2)


SCHEDULES: dict[str, type[MaskSchedule]] = {
    "linear": LinearMasking,
    "cosine": CosineMasking,
    "polynomial": PolynomialMasking,
    "geometric": GeometricMasking,
}


def mask_schedule(schedule: str | MaskSchedule | Callable[[Float], ArrayLike]) -> MaskSchedule:
    """A name, a `MaskSchedule` or a function alpha(t) as a schedule that can be sampled along.

    Raises InputError for an unknown name, values that are not finite, m that does not rise
    strictly, and m(0) or m(1) off 0 or 1 by more than 2e-3.

    >>> mask_schedule(lambda t: t)
    Traceback (most recent call last):
    scoredraw.errors.InputError: schedule: got alpha rising from 0 to 0.000976562 at t = 0, \
want alpha falling from 1 to 0
    """
    if isinstance(schedule, str):
        known = ", ".join(SCHEDULES)
        require(schedule in SCHEDULES, "schedule", repr(schedule), f"one of {known}")
        return SCHEDULES[schedule]()
    one = schedule if isinstance(schedule, MaskSchedule) else CustomMasking(schedule)
    times = np.linspace(0.0, 1.0, CHECKED_TIMES)
    masked = one.masked(times)
    wanted = "alpha falling from 1 to 0"
    require(masked.shape == times.shape, "schedule", masked.shape, f"{times.shape}, as the times")
    require(bool(np.isfinite(masked).all()), "schedule", "NaN or infinity", wanted)
    if (flat := np.flatnonzero(np.diff(masked) < 0)).size:
        i, alpha = flat[0], 1 - masked
        came = f"alpha rising from {alpha[i]:g} to {alpha[i + 1]:g} at t = {times[i]:g}"
        raise InputError(f"schedule: got {came}, want {wanted}")
    if (flat := np.flatnonzero(np.diff(masked) == 0)).size and not _saturated(masked, flat):
        raise InputError(f"schedule: got alpha constant at t = {times[flat[0]]:g}, want {wanted}")
    for t, value, off in ((0, 1 - masked[0], masked[0]), (1, 1 - masked[-1], 1 - masked[-1])):
        good = abs(off) <= END_SLACK
        require(good, "schedule", f"alpha({t}) = {value:g}", f"{1 - t} within {END_SLACK:g}")
    return one


def _saturated(masked: Float, flat: NDArray[np.int64]) -> bool:
    """Whether m is constant only where rounding makes it so, at 0 or 1."""
    ends = np.minimum(masked[flat], 1 - masked[flat])
    return bool((ends < 1e-12).all())
