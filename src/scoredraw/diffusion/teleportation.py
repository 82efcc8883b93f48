"""Skip the first network calls of any sampler: at high noise the path is known in closed form.

From sigma_max down to sigma_skip the data are as good as one Gaussian, whose noise-to-data path
`GaussianScore.teleport` follows exactly and for nothing. The sampler, whatever it is, then starts
at sigma_skip from the state that it would have reached, without any history:

    x_skip = closed form of x_T;    x_0 = sampler(x_skip) over the rest of the times

What is left of the times is their tail (fewer calls), or a new grid of as many steps (the calls
saved are spent below sigma_skip). How far one may skip shows in how much of the network's score the
Gaussian's explains, EV = 1 - Σ|a - b|²/Σ|a|², with a the network's and b the Gaussian's.

Wang and Vastola, "The unreasonable effectiveness of Gaussian score approximation for diffusion
models and its applications", TMLR 2024, arXiv 2412.09726.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_score import GaussianScore, as_rows
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.states import EpsFunction
from scoredraw.diffusion.time_grids import time_grid, whole
from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
SolverFactory = Callable[[NoiseSchedule, Float], Any]
ByClass = Mapping[Any, GaussianScore]

GRIDS = ("tail", "respace")


def heun(schedule: NoiseSchedule, times: Float) -> DEISSolver:
    """Heun's method in sigma/alpha, the sampler of EDM (Karras et al. 2022, arXiv 2206.00364)."""
    return DEISSolver(schedule, times=times, variant="rhork", tableau="2heun")


def sampling_times(schedule: NoiseSchedule, num_steps: int, t_start: float | None = None) -> Float:
    """N + 1 times for N steps, equally spaced in (sigma/alpha)^{1/7}, decreasing from t_start.

    Where the schedule's last step ends "clean" the last time is that without noise, and the others
    go down to t_end: EDM's grid of N levels and 0.

    >>> from scoredraw.diffusion.gaussian_score import edm_schedule
    >>> sampling_times(edm_schedule(), 3).round(3).tolist()
    [80.0, 2.515, 0.002, 0.0]
    """
    steps = whole(num_steps, "num_steps", 1)
    start = schedule.ends.t_start if t_start is None else t_start
    if schedule.ends.last != "clean":
        return time_grid(schedule, steps, "rho", t_start=start)
    noisy = time_grid(schedule, steps - 1, "rho", t_start=start) if steps > 1 else [start]
    return np.append(noisy, schedule.time_of_rho(0.0))


class Teleport:
    """A sampler that starts at sigma_skip, where the closed form carries the noise.

    gaussian: of the data, under the sampler's schedule. num_steps: N, of the whole sampler, on
    `sampling_times`; or times (N + 1,), any decreasing ones. How far is skipped, one of:
    sigma_skip, a noise per unit of signal (sigma/alpha; sigma itself of EDM networks); skip_steps,
    a number k of steps; neither: sigma_skip = 2 sqrt(largest variance). Skipping nothing is the
    sampler alone.

    grid: "tail" keeps the times below sigma_skip (of nodes nearer than half a step the start takes
    the place); "respace" makes `sampling_times` of N steps there. solver: "heun", or a function
    (schedule, times) -> an object with sample(eps_fn, x), and init and step to take steps one by
    one; `DEISSolver`, or any other. by_class: {label: GaussianScore}, for networks that are told
    labels (B,); classes that are not in it take `gaussian`.

    Warns where sigma_skip is below sqrt(largest variance), where most of the picture is decided,
    and where the Gaussian looks like pixels in [0, 1] or [0, 255]: networks want [-1, 1]. Raises
    InputError for a sigma_skip above the first or not above the last noise, two ways to skip, and
    what the solver refuses, in whose messages the first step is that at sigma_skip. Time O(B d r)
    and the solver's; memory that of the state. Wang and Vastola 2024, arXiv 2412.09726.

    >>> data = GaussianScore([0.0], [1.0], [[1.0]])
    >>> jump = Teleport(data, 18, sigma_skip=10.0)
    >>> jump.skipped, jump.solver.nfe
    (6, 23)
    >>> x_T = np.array([[80.0]])
    >>> round(jump.sample(data.eps, x_T).item(), 3), round(data.teleport(x_T, 80, 0).item(), 3)
    (1.046, 1.0)
    """

    def __init__(
        self,
        gaussian: GaussianScore,
        num_steps: int = 18,
        *,
        sigma_skip: float | None = None,
        skip_steps: int | None = None,
        grid: str = "tail",
        times: Any = None,
        solver: str | SolverFactory = "heun",
        by_class: ByClass | None = None,
    ) -> None:
        require(grid in GRIDS, "grid", repr(grid), f"one of {', '.join(GRIDS)}")
        both = sigma_skip is not None and skip_steps is not None
        require(not both, "sigma_skip, skip_steps", "both", "at most one of them")
        named = callable(solver) or solver == "heun"
        require(named, "solver", repr(solver), "heun, or a function of schedule and times")
        schedule = gaussian.schedule
        whole_grid = sampling_times(schedule, num_steps) if times is None else as_grid(times)
        rho = schedule.rho(whole_grid)
        N = len(whole_grid) - 1
        if skip_steps is not None:
            k = whole(skip_steps, "skip_steps", 0)
            require(k < N, "skip_steps", k, f"fewer than the {N} steps")
            self.t_skip = float(whole_grid[k])
        else:
            if sigma_skip is None:
                sigma_skip = min(2 * gaussian.widest, float(rho[0]))
            wanted = f"a noise in ({rho[-1]:g}, {rho[0]:g}], sigma/alpha of the times"
            reached = bool(rho[-1] < sigma_skip <= rho[0] * (1 + 1e-12))
            require(reached, "sigma_skip", sigma_skip, wanted)
            self.t_skip = min(float(schedule.time_of_rho(sigma_skip)), float(whole_grid[0]))
        self.gaussian, self.by_class = gaussian, by_class
        if by_class is not None:
            self.by_class = {c: one.with_schedule(schedule) for c, one in by_class.items()}
        self.t_start = float(whole_grid[0])
        self.sigma_skip = float(schedule.rho(self.t_skip))
        if self.t_skip < self.t_start and self.sigma_skip < gaussian.widest:
            came = f"sigma_skip = {self.sigma_skip:g} is below {gaussian.widest:g}, sqrt of the "
            warnings.warn(f"{came}largest variance: much of what is skipped counts", stacklevel=2)
        warn_of_range(gaussian, stacklevel=3)
        if grid == "respace":
            self.times = sampling_times(schedule, N, self.t_skip)
        else:
            index = np.interp(-self.t_skip, -whole_grid, np.arange(N + 1.0))
            later = np.arange(N + 1) > min(index + 0.5, N - 0.5)
            self.times = np.append(self.t_skip, whole_grid[later])
        self.skipped = N - len(self.times) + 1
        make = solver if callable(solver) else heun
        self.solver = make(schedule, self.times)

    def launch(self, x_T: Any, labels: Any = None) -> Any:
        """The state at sigma_skip of the noise x_T (B, *dims) at the first time."""
        if self.by_class is None:
            return self.gaussian.teleport(x_T, self.t_start, self.t_skip)
        require(labels is not None, "labels", None, "a class for every sample (B,)")
        ends = self.t_start, self.t_skip
        return teleport_by_class(self.by_class, x_T, labels, *ends, default=self.gaussian)

    def init(self, x_T: Any, labels: Any = None) -> Any:
        """The solver's first state, at sigma_skip."""
        return self.solver.init(self.launch(x_T, labels))

    def step(self, state: Any, eps_fn: EpsFunction) -> Any:
        """The solver's next state."""
        return self.solver.step(state, eps_fn)

    def sample(self, eps_fn: EpsFunction, x_T: Any, labels: Any = None) -> Any:
        """The samples that x_T (B, *dims), noise at the first time, leads to; x_T's dtype."""
        return self.solver.sample(eps_fn, self.launch(x_T, labels))


def teleport_sample(
    eps_fn: EpsFunction,
    x_T: Any,
    gaussian: GaussianScore,
    *,
    sigma_skip: float | None = None,
    skip_steps: int | None = None,
    ev_threshold: float | None = None,
    data: Any = None,
    num_steps: int = 18,
    grid: str = "tail",
    solver: str | SolverFactory = "heun",
    labels: Any = None,
    by_class: ByClass | None = None,
    rng: int | np.random.Generator | None = None,
) -> Any:
    """Samples of a network without the calls that the data's mean and covariance make superfluous.

    eps_fn(x, t) -> eps; networks that predict something else: `to_eps`. x_T: (B, *dims), noise at
    the schedule's first time. Options are those of `Teleport`; ev_threshold, a third way to say
    how far, skips down to the least noise of the grid from which up the Gaussian explains this
    share of the network's score on `data` (n, *dims) (`score_explained_variance`: a call over
    the data at every noise level), and nothing where it never does.

    Wang and Vastola 2024, arXiv 2412.09726.

    >>> data = GaussianScore([1.0], [1.0], [[1.0]])
    >>> teleport_sample(data.eps, np.array([[80.0]]), data, skip_steps=6).round(2).tolist()
    [[2.03]]
    """
    given = [value is not None for value in (sigma_skip, skip_steps, ev_threshold)]
    wanted = "at most one of them"
    require(sum(given) <= 1, "sigma_skip, skip_steps, ev_threshold", f"{sum(given)}", wanted)
    if ev_threshold is not None:
        require(0 < ev_threshold < 1, "ev_threshold", ev_threshold, "a share in (0, 1)")
        require(data is not None, "data", None, "samples (n, *dims), for ev_threshold")
        nodes = gaussian.schedule.rho(sampling_times(gaussian.schedule, num_steps)[:-1])
        explained = score_explained_variance(
            gaussian.eps, eps_fn, data, nodes, schedule=gaussian.schedule, rng=rng
        )
        sigma_skip = explained.skip(ev_threshold)
        skip_steps, sigma_skip = (0, None) if sigma_skip is None else (None, sigma_skip)
    jump = Teleport(
        gaussian, num_steps, sigma_skip=sigma_skip, skip_steps=skip_steps, grid=grid,
        solver=solver, by_class=by_class,
    )  # fmt: skip
    return jump.sample(eps_fn, x_T, labels)


def teleport_by_class(
    by_class: ByClass,
    x: Any,
    labels: Any,
    t_from: float,
    t_to: float,
    default: GaussianScore | None = None,
) -> Any:
    """Every sample of x (B, *dims) carried by the Gaussian of its class, labels (B,).

    Classes that are not in by_class take `default`; InputError without one.

    >>> two = {0: GaussianScore([0.0]), 1: GaussianScore([8.0])}
    >>> teleport_by_class(two, np.array([[40.0], [40.0]]), [0, 1], 80.0, 20.0).tolist()
    [[10.0], [16.0]]
    """
    classes = np.asarray(on_host(labels))
    require(classes.shape == (len(x),), "labels", classes.shape, f"({len(x)},), one a sample")
    moved = x * 0
    for label in np.unique(classes):
        one = by_class.get(label.item(), default)
        if one is None:
            known = f"one of {', '.join(map(str, by_class))}, or a default Gaussian"
            raise InputError(f"labels: got {label}, want {known}")
        (rows,) = np.nonzero(classes == label)
        moved[rows] = one.teleport(x[rows], t_from, t_to)
    return moved


def warn_of_range(gaussian: GaussianScore, stacklevel: int = 2) -> None:
    """Warn where mean and variances are those of pixels in [0, 1] or [0, 255], not [-1, 1].

    A variable in [0, c] of mean m has a variance of at most m (c - m); a mean of all entries above
    a tenth of c is what pixels in [-1, 1] and latents do not have.
    """
    mean = gaussian.mean
    spread = np.square(gaussian.vectors) @ gaussian.eigenvalues + gaussian.residual * (
        1 - np.square(gaussian.vectors).sum(axis=1)
    )
    for top in (1.0, 255.0):
        inside = bool((mean >= 0).all() and (mean <= top).all())
        possible = bool((spread <= mean * (top - mean) * (1 + 1e-6) + 1e-12).all())
        if inside and possible and mean.mean() > 0.1 * top and spread.sum() > 0:
            to_pm1 = f"rescaled({2 / top:.4g}, -1)"
            what = f"mean and variances look like pixels in [0, {top:g}]"
            hint = f"for a network of pixels in [-1, 1] use gaussian.{to_pm1}"
            warnings.warn(f"{what}; {hint}", stacklevel=stacklevel)
            return


# ------------------------------------------------------------------ how much a score explains


@dataclass(frozen=True, eq=False)
class ExplainedVariance:
    """How much of a reference score another explains, at S noise levels; nan where that is 0.

    sigmas: (S,), sigma/alpha. score: (S,), 1 - Σ|a - b|²/Σ|a|² over all samples and entries, a the
    reference, nothing centred. score_reversed: with the roles swapped. denoiser, denoiser_reversed:
    the same of E[x_0 | x] minus the mean of the data. per_sample, denoiser_per_sample: (S, n), the
    same of every sample.
    """

    sigmas: Float
    score: Float
    score_reversed: Float
    denoiser: Float
    denoiser_reversed: Float
    per_sample: Float
    denoiser_per_sample: Float

    def skip(self, threshold: float) -> float | None:
        """The least sigma from which up the score's EV is at least `threshold`; None if nowhere."""
        order = np.argsort(-self.sigmas)
        reached = np.logical_and.accumulate(self.score[order] >= threshold)
        return float(self.sigmas[order][reached][-1]) if reached.any() else None


def explained_variance(reference: Any, other: Any, *, per_sample: bool = False) -> Any:
    """1 - Σ|a - b|²/Σ|a|² of a = reference and b = other (n, *dims), nothing centred.

    One number, or (n,) with per_sample. nan where the reference is 0. Raises InputError for other
    shapes. Wang and Vastola 2024, arXiv 2412.09726.

    >>> explained_variance([[3.0, 4.0]], [[3.0, 3.0]])
    0.96
    """
    a, b = (np.asarray(on_host(v), np.float64) for v in (reference, other))
    same = a.shape == b.shape and a.ndim >= 2
    require(same, "reference, other", f"{a.shape}, {b.shape}", "one shape (n, *dims)")
    axes = tuple(range(1, a.ndim)) if per_sample else None
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - np.square(a - b).sum(axis=axes) / np.square(a).sum(axis=axes)
    return share if per_sample else float(share)


def score_explained_variance(
    eps_fn: EpsFunction,
    reference_fn: EpsFunction,
    X: Any,
    sigmas: Any,
    *,
    schedule: NoiseSchedule,
    noises: int = 1,
    batch_size: int = 1024,
    rng: int | np.random.Generator | None = None,
) -> ExplainedVariance:
    """How much of a reference's score a score explains on data with noise, at every noise level.

    eps_fn, reference_fn(x, t) -> eps, such as `GaussianScore.eps` and a network's: a level's scores
    are its eps divided by one number, which cancels. X: (n, *dims), array or tensor, in whose kind
    and dtype x = alpha X + sigma noise is handed over, `batch_size` at once. sigmas: (S,) > 0, in
    units of sigma/alpha. noises: how often every row is used, with another noise each.

    Raises InputError for sigmas <= 0, NaN in the data, and answers of another shape or with NaN,
    naming the level. Calls: S · noises · n / batch_size of both; memory 2 n d.
    Wang and Vastola 2024, arXiv 2412.09726.

    >>> from scoredraw.diffusion.gaussian_score import edm_schedule
    >>> X = np.random.default_rng(0).normal(size=(500, 2)) * [1.0, 2.0]
    >>> fitted, mean_only = GaussianScore.fit(X), GaussianScore(X.mean(axis=0))
    >>> ev = score_explained_variance(
    ...     mean_only.eps, fitted.eps, X, [1.0, 3.0], schedule=edm_schedule(), rng=0)
    >>> ev.score.round(1).tolist()
    [-3.6, 0.9]
    """
    levels = np.asarray(on_host(sigmas), np.float64)
    positive = levels.ndim == 1 and bool((levels > 0).all() and np.isfinite(levels).all())
    wanted = "(S,) positive noise levels, sigma/alpha, S >= 1"
    require(positive and levels.size >= 1, "sigmas", levels.tolist(), wanted)
    whole(noises, "noises", 1)
    whole(batch_size, "batch_size", 1)
    rows, draw = as_rows(X), generator(rng)
    mean = rows.mean(axis=0)
    rows = np.tile(rows, (noises, 1))
    shape = (len(rows), *X.shape[1:]) if hasattr(X, "shape") else rows.shape
    found = []
    for sigma in levels:
        t = float(schedule.time_of_rho(sigma))
        noise = draw.standard_normal(rows.shape)
        x = np.asarray(schedule.perturb(rows, t, noise))
        a, b = (_answers(f, x, t, shape, X, batch_size) for f in (reference_fn, eps_fn))
        alpha, scale = float(schedule.alpha(t)), float(schedule.sigma(t))
        d_a, d_b = ((x - scale * eps) / alpha - mean for eps in (a, b))
        pairs = ((a, b), (b, a), (d_a, d_b), (d_b, d_a))
        shares = [explained_variance(*pair) for pair in pairs]
        each = [explained_variance(*pair, per_sample=True) for pair in (pairs[0], pairs[2])]
        found.append((*shares, *each))
    columns = [np.stack([np.asarray(row[i]) for row in found]) for i in range(6)]
    return ExplainedVariance(levels, *columns)


def _answers(
    eps_fn: EpsFunction, x: Float, t: float, shape: tuple[int, ...], like: Any, batch: int
) -> Float:
    """eps of all rows as float64 (n, d); asked in the kind, dtype and device of `like`."""
    parts = []
    for first in range(0, len(x), batch):
        some = x[first : first + batch].reshape(-1, *shape[1:])
        if is_tensor(like):
            import torch

            dtype = like.dtype if like.is_floating_point() else torch.float64
            some = torch.as_tensor(some, dtype=dtype, device=like.device)
        elif hasattr(like, "dtype") and np.issubdtype(like.dtype, np.floating):
            some = some.astype(like.dtype)
        eps = np.asarray(on_host(eps_fn(some, t)), np.float64)
        wanted = f"the shape of x, {tuple(some.shape)}"
        require(eps.shape == tuple(some.shape), "eps_fn", f"shape {eps.shape} at t = {t:g}", wanted)
        require(bool(np.isfinite(eps).all()), "eps_fn", f"NaN or infinity at t = {t:g}", "finite")
        parts.append(eps.reshape(len(eps), -1))
    return np.concatenate(parts)


def as_grid(times: Any) -> Float:
    """Decreasing times (N + 1,) as float64; the solver checks the rest."""
    grid = np.asarray(on_host(times), np.float64)
    require(grid.ndim == 1 and grid.size >= 2, "times", grid.shape, "(N + 1,) times, N >= 1")
    falling = bool((np.diff(grid) < 0).all())
    require(falling, "times", "equal or increasing ones", "strictly decreasing times")
    return grid
