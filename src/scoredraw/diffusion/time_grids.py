"""The times at which a sampler stops on its way from noise to data, and what makes them usable."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, require

if TYPE_CHECKING:
    from scoredraw.diffusion.schedules import NoiseSchedule

Float = NDArray[np.float64]

GRIDS = ("t", "log", "rho")
GRID_POWERS = {"t": 2.0, "log": 1.0, "rho": 7.0}
LEAST_SIGNAL = 1e-20  # an abar below this is none: cos²(π/2) comes out as 4e-33


def whole(value: Any, name: str, least: int) -> int:
    """value as an int, or an InputError naming `name`; booleans and 3.0 are not integers."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}: got {value!r}, want an integer >= {least}") from None
    good = number >= least and not isinstance(value, bool)
    require(good, name, repr(value), f"an integer >= {least}")
    return number


def time_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    kind: str = "t",
    power: float | None = None,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    integer: bool = False,
) -> Float:
    """N + 1 decreasing times from t_start to t_end, by default the schedule's end points.

    With u = i/N and power κ (default 2 for "t", 7 for "rho"; 1 is uniform):

        "t"     t_i   = (t_start^{1/κ} + u (t_end^{1/κ} - t_start^{1/κ}))^κ
        "log"   uniform in log rho (κ unused)
        "rho"   rho_i = (rho_start^{1/κ} + u (rho_end^{1/κ} - rho_start^{1/κ}))^κ; with κ = 7 that
                of Karras et al. 2022, arXiv 2206.00364

    integer: round to whole times and drop those that coincide, for networks that know no others;
    then there may be fewer than N steps. -> float64 (N + 1,).

    Raises InputError for num_steps < 1, an unknown kind, a power below 1, t_start <= t_end, times
    outside the schedule's domain, no signal left at t_start (abar = 0), or for "log" no noise left
    at t_end. Zhang and Chen 2023, arXiv 2204.13902.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> time_grid(LinearBeta(), 2, t_end=0.01).round(4).tolist()
    [1.0, 0.3025, 0.01]
    """
    steps = whole(num_steps, "num_steps", 1)
    require(kind in GRIDS, "kind", repr(kind), f"one of {', '.join(GRIDS)}")
    kappa = GRID_POWERS[kind] if power is None else power
    require(bool(1 <= kappa < np.inf), "power", kappa, "a power >= 1")
    start = schedule.ends.t_start if t_start is None else t_start
    end = schedule.ends.t_end if t_end is None else t_end
    require(start > end, "t_start", f"{start:g}", f"a time above t_end = {end:g}")
    ends = checked_times(schedule, np.array([start, end]), clean_end=kind != "log")
    u = np.linspace(0.0, 1.0, steps + 1)
    if kind == "t":
        times = _between(ends, u, kappa)
    elif kind == "log":
        times = schedule.time_of_rho(np.exp(_between(np.log(schedule.rho(ends)), u, 1.0)))
    else:
        times = schedule.time_of_rho(_between(schedule.rho(ends), u, kappa))
    times[[0, -1]] = ends
    if integer:
        times = np.unique(np.rint(times))[::-1].copy()
        wanted = "a grid with two distinct whole times"
        require(times.size >= 2, "integer", f"{times.size} whole time", wanted)
    return times


def _between(ends: Float, u: Float, power: float) -> Float:
    """From ends[0] to ends[1], equally spaced in the 1/power-th power."""
    first, last = ends ** (1 / power)
    return np.asarray((first + u * (last - first)) ** power)


def checked_times(schedule: NoiseSchedule, times: Any, *, clean_end: bool = False) -> Float:
    """Times as float64 if a solver can step along them, else InputError with the reason.

    They must decrease strictly within the schedule's domain, signal must be left at the first
    (rho finite), rho must decrease with them, and unless `clean_end` noise must be left at the
    last (rho > 0).
    """
    grid = np.asarray(times, dtype=np.float64)
    require(grid.ndim == 1 and grid.size >= 2, "times", grid.shape, "(N + 1,) times, N >= 1")
    require(bool(np.isfinite(grid).all()), "times", "NaN or infinity", "finite times")
    low, high = schedule.domain
    require(grid[-1] >= low, "t_end", f"{grid[-1]:g}", f"a time >= {low:g}")
    require(grid[0] <= high, "t_start", f"{grid[0]:g}", f"a time <= {high:g}")
    steps = np.diff(grid)
    if (equal := np.flatnonzero(steps == 0)).size:
        raise InputError(f"times: got {grid[equal[0]]:g} twice, want distinct times")
    if (rises := np.flatnonzero(steps > 0)).size:
        i = rises[0]
        raise InputError(f"times: got {grid[i]:g} before {grid[i + 1]:g}, want decreasing times")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        abar, rho = schedule.abar(grid), schedule.rho(grid)
    signal = abar[0] > LEAST_SIGNAL and bool(np.isfinite(rho[0]))
    require(signal, "t_start", f"{grid[0]:g}, where abar = 0", "a time with signal left")
    decreasing = bool((np.diff(rho) < 0).all()) and bool((abar > 0).all() and (abar <= 1).all())
    require(decreasing, "schedule", "abar not in (0, 1] or not decreasing", "one that is")
    clean = f"{grid[-1]:g}, where no noise is left"
    require(clean_end or rho[-1] > 0, "t_end", clean, "a time with noise left (sigma > 0)")
    return grid
