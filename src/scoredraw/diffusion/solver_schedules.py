"""Solver schedules: what a diffusion sampler does at each of its steps, as data in a small file.

All the fast solvers of the diffusion ODE take the same kind of step: a Taylor expansion around a
point where the network has been called, exact in the linear part, with derivatives estimated from
other such points. They differ in choices, and each step may choose for itself:

    t            where it ends
    prediction   whether eps ("noise") or x_0 ("data") is expanded
    order        n: the value and n - 1 derivatives
    points       the earlier calls that estimate each derivative
    relaxation   a factor on the first derivative
    start        the call around which it expands (an older one: a single-step method)
    corrector    a second expansion once the network has been called at the end of the step

`SolverSchedule` is a list of such decisions. DDIM, DPM-Solver, DPM-Solver++ and UniPC are special
cases (`solver_preset`); `UnifiedSolver` runs any; `search_schedule` finds one for a given model.

Liu, Ning, Yang and Wang, "A unified sampling framework for solver searching of diffusion
probabilistic models", ICLR 2024, arXiv 2312.07243.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.time_grids import checked_times, time_grid, whole
from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path

Float = NDArray[np.float64]

PREDICTIONS = ("noise", "data", "v3")
RELAXATIONS = ("none", "linear", "bh1", "bh2", "exp+", "exp-")
FIRST_STEPS = ("none", "zero_x0", "average_x0")
FORMAT = "scoredraw solver schedule 1"
STEP_GRIDS: dict[str, tuple[str, float | None, bool]] = {  # kind, power, turned round
    "log_snr": ("log", None, False),
    "uniform": ("t", 1.0, False),
    "quadratic": ("t", 2.0, False),
    "reversed_quadratic": ("t", 2.0, True),
    "reversed_1.5": ("t", 1.5, True),
    "karras": ("rho", 7.0, False),
}
PRESETS: dict[str, tuple[str, bool, str]] = {  # prediction, single-step, corrector
    "ddim": ("noise", False, "none"),
    "dpm_solver": ("noise", False, "none"),
    "dpm_solver++": ("data", False, "none"),
    "dpm_solver_singlestep": ("noise", True, "none"),
    "dpm_solver++_singlestep": ("data", True, "none"),
    "unipc": ("data", False, "pseudo"),
}


@dataclass(frozen=True)
class Taylor:
    """One expansion: its order, the points behind its derivatives, and where it starts.

    Calls of the network are counted from the newest, -1, backwards. order: n >= 1. points: for each
    of the n - 1 derivatives the calls whose differences to the start estimate it, at least k for
    the k-th; None is the n - 1 newest for all, which makes the expansion the interpolating
    polynomial. relaxation: of the first derivative, with z = h, or -h for "data", and h > 0 the
    step in log alpha/sigma:

        linear  1 + coefficient h      bh2  z (e^z - 1) / 2(e^z - 1 - z)     exp+  1 + (e^z - 1)/2
                                       bh1  z² / 2(e^z - 1 - z)              exp-  1 - (e^z - 1)/2

    bh2 is the second order of DPM-Solver(++) and UniPC's B₂(h), bh1 UniPC's B₁(h).

    >>> Taylor(3).active, Taylor(3, start=-2).active
    (((-2, -3), (-2, -3)), ((-1, -3), (-1, -3)))
    """

    order: int = 1
    points: tuple[tuple[int, ...], ...] | None = None
    relaxation: str = "none"
    coefficient: float = 0.0
    start: int = -1

    @property
    def active(self) -> tuple[tuple[int, ...], ...]:
        """The points of each of the order - 1 derivatives."""
        if self.points is not None:
            return self.points
        newest = tuple(p for p in range(-1, -self.order - 1, -1) if p != self.start)
        return (newest[: self.order - 1],) * (self.order - 1)

    def corrector(self) -> Taylor:
        """One order more from the same start, one call later."""
        return Taylor(self.order + 1, start=self.start - 1)

    def problem(self, calls: int) -> str | None:
        """What is wrong with it after this many calls: "got ..., want ...", or None."""
        try:
            whole(self.order, "order", 1)
        except InputError as error:
            return str(error)
        if self.start not in range(-calls, 0):
            return f"start: got {self.start}, want one of -{calls} .. -1"
        if self.points is None and self.order > calls:
            return f"order: got {self.order}, want at most {calls}, the calls until then"
        if len(self.active) != self.order - 1:
            came = f"points for {len(self.active)} derivatives"
            return f"points: got {came}, want {self.order - 1}, one less than the order"
        for k, points in enumerate(self.active, start=1):
            if self.start in points or not set(points) <= set(range(-calls, 0)):
                return f"points: got {points}, want others than {self.start} in -{calls} .. -1"
            if len(set(points)) != len(points) or len(points) < k:
                return f"points: got {points}, want {k} or more different for derivative {k}"
        if self.relaxation not in RELAXATIONS:
            return f"relaxation: got {self.relaxation!r}, want one of {', '.join(RELAXATIONS)}"
        if not math.isfinite(self.coefficient):
            return f"coefficient: got {self.coefficient}, want a finite number"
        return None


@dataclass(frozen=True)
class StepDecision:
    """What one step does. t: the time at which it ends; the other choices as in this module's head.

    corrector: an expansion around the step's own start (`Taylor.start` is one lower than the
    predictor's, -2), in which -1 is the call at the step's end. That call is needed anyway, so the
    correction is free; reevaluate=True (an "implicit" corrector) calls again at its result.
    """

    t: float
    prediction: str = "data"
    predictor: Taylor = field(default_factory=Taylor)
    corrector: Taylor | None = None
    reevaluate: bool = False

    def fitted(self, calls: int, last: bool) -> StepDecision:
        """The step without what is not there after `calls` calls; no corrector at the last."""
        taylor = self.predictor
        if taylor.start < -calls:
            taylor = replace(taylor, start=-1, points=None)
        if taylor.problem(calls):
            taylor = replace(taylor, order=min(taylor.order, calls), points=None)
        corrector = None if last else self.corrector
        moved = corrector is not None and corrector.start != taylor.start - 1
        if corrector is not None and (moved or corrector.problem(calls + 1)):
            corrector = taylor.corrector()
        again = self.reevaluate and corrector is not None
        return replace(self, predictor=taylor, corrector=corrector, reevaluate=again)


@dataclass(frozen=True)
class SolverSchedule:
    """Every choice of a sampler, step by step.

    t_start: where sampling starts. steps: one `StepDecision` a step, S >= 1. afs: the analytical
    first step, which puts a guess in place of the first call: "none", "zero_x0" (eps = x_T), or
    "average_x0" (x_0 = the mean of the data). skip_coefficients: multipliers for the skip
    connections of a U-net; they are kept, and it is for the caller's network to apply them. about:
    anything JSON holds; where the schedule came from.

    A schedule is checked when it is made: InputError names the step for times that do not
    decrease, an unknown choice, points that do not exist yet, or a corrector at the last step.
    Times are those of one `NoiseSchedule`; `on` moves them to another's.

    >>> two = SolverSchedule(1.0, (StepDecision(0.4), StepDecision(0.1, predictor=Taylor(2))))
    >>> two.nfe, SolverSchedule.from_json(two.to_json()) == two
    (2, True)
    """

    t_start: float
    steps: tuple[StepDecision, ...]
    afs: str = "none"
    skip_coefficients: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.steps) >= 1, "steps", len(self.steps), "at least one")
        require(self.afs in FIRST_STEPS, "afs", repr(self.afs), f"one of {', '.join(FIRST_STEPS)}")
        before = self.t_start
        require(math.isfinite(before), "t_start", before, "a finite time")
        for i, step in enumerate(self.steps):
            wanted = f"below {before:g}, for times to decrease"
            require(step.t < before and math.isfinite(step.t), f"step {i}: t", step.t, wanted)
            before = step.t
            kind, choices = step.prediction, f"one of {', '.join(PREDICTIONS)}"
            require(kind in PREDICTIONS, f"step {i}: prediction", repr(kind), choices)
            corrected = step.corrector is not None
            require(corrected or not step.reevaluate, f"step {i}: reevaluate", True, "a corrector")
            last = i == len(self.steps) - 1
            require(not (corrected and last), f"step {i}: corrector", "one", "none at the last")
            for taylor, calls in ((step.predictor, i + 1), (step.corrector, i + 2)):
                if taylor is not None and (problem := taylor.problem(calls)):
                    name = "predictor" if taylor is step.predictor else "corrector"
                    raise InputError(f"step {i}: {name}: {problem}")
            if step.corrector is not None:
                start = step.predictor.start - 1
                came, wanted = step.corrector.start, f"{start}, where the step started"
                require(came == start, f"step {i}: corrector: start", came, wanted)

    # -------------------------------------------------------------- what it says

    @property
    def times(self) -> Float:
        """The S + 1 times, decreasing."""
        return np.array([self.t_start, *(step.t for step in self.steps)])

    @property
    def nfe(self) -> int:
        """Network calls: S, one less with an analytical first step, one more a reevaluation."""
        return len(self.steps) - (self.afs != "none") + sum(s.reevaluate for s in self.steps)

    def validate(self, noise_schedule: NoiseSchedule) -> Float:
        """The times, if `noise_schedule` can be sampled along them; else InputError.

        Signal must be left at the first, and noise at the last unless that step has order 1.
        """
        self.predictable()
        first_order = self.steps[-1].predictor.order == 1
        return checked_times(noise_schedule, self.times, clean_end=first_order)

    def predictable(self) -> None:
        """InputError, naming the step, for "v3" predictions."""
        for i, step in enumerate(self.steps):
            wanted = "noise or data: v3 needs statistics of the network (`with_prediction`)"
            require(step.prediction != "v3", f"step {i}: prediction", "'v3'", wanted)

    def tail(self, begin: int) -> SolverSchedule:
        """Steps `begin` and later, started without earlier calls: orders are what that allows."""
        count = len(self.steps) - begin
        rest = (s.fitted(i + 1, i == count - 1) for i, s in enumerate(self.steps[begin:]))
        return replace(self, t_start=float(self.times[begin]), steps=tuple(rest)) if begin else self

    def on(self, source: NoiseSchedule, target: NoiseSchedule) -> SolverSchedule:
        """The same noise levels sigma/alpha, as times of another noise schedule.

        >>> from scoredraw.diffusion.schedules import LinearBeta, LinearFlow
        >>> one = solver_preset("ddim", LinearBeta(), 2, grid="uniform")
        >>> one.on(LinearBeta(), LinearFlow()).times.round(3).tolist()
        [0.993, 0.774, 0.01]
        """
        return self.with_times(target.time_of_rho(source.rho(self.times)))

    def with_times(self, times: Any) -> SolverSchedule:
        """The same decisions at other times (S + 1,)."""
        grid = [float(t) for t in times]
        require(len(grid) == len(self.steps) + 1, "times", len(grid), f"{len(self.steps) + 1}")
        steps = (replace(s, t=t) for s, t in zip(self.steps, grid[1:], strict=True))
        return replace(self, t_start=grid[0], steps=tuple(steps))

    def with_prediction(self, prediction: str, instead_of: str = "v3") -> SolverSchedule:
        """One prediction in place of another wherever that stands."""
        old = {instead_of: prediction}
        steps = (replace(s, prediction=old.get(s.prediction, s.prediction)) for s in self.steps)
        return replace(self, steps=tuple(steps))

    # -------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self), allow_nan=False))}

    @classmethod
    def from_dict(cls, data: Any) -> SolverSchedule:
        """Back from `to_dict`; InputError for anything else."""
        good = isinstance(data, Mapping) and data.get("format") == FORMAT
        require(good, "solver schedule", type(data).__name__, f"an object of format {FORMAT!r}")
        try:
            keys = {f.name for f in fields(cls)}
            given = {k: v for k, v in data.items() if k != "format"}
            require(set(given) <= keys, "solver schedule", sorted(given), f"{sorted(keys)}")
            steps = tuple(
                StepDecision(**{
                    **one,
                    "predictor": _taylor(one["predictor"]),
                    "corrector": _taylor(one["corrector"]) if one.get("corrector") else None,
                })
                for one in data["steps"]
            )  # fmt: skip
            skips = tuple(data.get("skip_coefficients", ()))
            return cls(**{**given, "steps": steps, "skip_coefficients": skips})
        except (KeyError, TypeError, AttributeError) as error:
            came = f"{type(error).__name__} {error}".splitlines()[0]
            raise InputError(f"solver schedule: got {came}, want what to_json writes") from None

    def to_json(self) -> str:
        """JSON from which `from_json` makes an equal schedule, to the last digit."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SolverSchedule:
        """Back from `to_json`."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise InputError(f"solver schedule: got {error}, want JSON") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON: a whole file or none."""
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverSchedule:
        """Read a file of `save`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"solver schedule: cannot read {path}: {why}") from None
        return cls.from_json(text)

    @classmethod
    def from_released(cls, record: Mapping[str, Any]) -> SolverSchedule:
        """A record of the authors' repository: its `decisions`, with tensors as lists.

        DPM-Solver-v3 predictions are kept as "v3"; of relaxations the first derivative's, the only
        one there is. InputError where a record does not hold together (theirs are not checked).
        """
        made = record.get("decisions", record)
        try:
            steps = tuple(
                _released_step(made, i, float(t)) for i, t in enumerate(made["timesteps"][1:])
            )
            skips = tuple(float(v) for v in made.get("skip_coefficients", ()))
            afs = "none" if made["afs"] == "no_afs" else made["afs"]
            return cls(float(made["timesteps"][0]), steps, afs, skips)
        except (KeyError, IndexError, TypeError) as error:
            came = f"{type(error).__name__} {error}"
            raise InputError(f"record: got {came}, want the authors' decisions") from None


def _taylor(data: Mapping[str, Any]) -> Taylor:
    points = data.get("points")
    return Taylor(**{**data, "points": None if points is None else tuple(map(tuple, points))})


RELEASED_RELAXATIONS = {
    None: "none", "linear": "linear", "dpmsolver-2": "bh2", "unipc-bh2": "bh2",
    "unipc-bh1": "bh1", "0.5exp": "exp+", "-0.5exp": "exp-",
}  # fmt: skip
RELEASED_CORRECTORS = ("no_corrector", "pseudo", "implicit")


def _released_step(made: Mapping[str, Any], i: int, t: float) -> StepDecision:
    said = made["corrector_types"][i]
    kind, choices = said["type"], ", ".join(RELEASED_CORRECTORS)
    require(kind in RELEASED_CORRECTORS, f"step {i}: corrector", repr(kind), f"one of {choices}")
    corrector = None
    if kind != "no_corrector":
        order, start = said["taylor_order"], said["start_point"]
        corrector = _released_taylor(order, said["derivative_type"], start)
    order, start = made["orders"][i], made["start_points"][i]
    predictor = _released_taylor(order, made["derivative_types"][i], start)
    prediction = made["prediction_types"][i].removesuffix("_prediction")
    prediction = {"dpmsolver_v3": "v3"}.get(prediction, prediction)
    return StepDecision(t, prediction, predictor, corrector, kind == "implicit")


def _released_taylor(order: int, derivatives: Sequence[Mapping[str, Any]], start: int) -> Taylor:
    points = tuple(tuple(sorted(one["active_points"], reverse=True)) for one in derivatives)
    full = Taylor(order, start=start)
    plain = full if points == full.active else replace(full, points=points)
    kind = RELEASED_RELAXATIONS[derivatives[0]["relaxation"]] if derivatives else "none"
    coefficient = derivatives[0].get("relaxation_coefficient") if kind == "linear" else 0.0
    return replace(plain, relaxation=kind, coefficient=float(coefficient or 0.0))


# ------------------------------------------------------------------ the known solvers


def solver_preset(
    name: str,
    noise_schedule: NoiseSchedule,
    nfe: int,
    *,
    order: int = 2,
    prediction: str | None = None,
    grid: str = "log_snr",
    times: Any = None,
    relaxation: str = "none",
    relaxed_corrector: bool = False,
    corrector: str | None = None,
    lower_order_final: bool = True,
    afs: str = "none",
) -> SolverSchedule:
    """A published solver with `nfe` network calls, as a schedule.

    name: "ddim", "dpm_solver", "dpm_solver++" (multistep), "dpm_solver_singlestep",
        "dpm_solver++_singlestep" (order at most 3), or "unipc".
    order: the highest. Multistep solvers warm up through 1, 2, ... and with `lower_order_final`
        come down the same way. prediction, corrector ("none", "pseudo", "implicit"): the solver's
        own unless given; a corrector has one order more than its step, and implicit ones stand at
        the first steps, as many as the calls allow.
    relaxation: of the steps of order 2: "bh2" makes DPM-Solver(++) 2 what its authors call type
        "dpmsolver" (diffusers: "midpoint") and is UniPC's default; "bh1"; "none" is type "taylor"
        ("heun") and UniPC's vary_coeff. relaxed_corrector: also of correctors of order 2, that of
        step 0, as diffusers' UniPC has it; the authors' presets do not.
    grid: "log_snr", "uniform", "quadratic", "reversed_quadratic", "reversed_1.5" in time, or
        "karras"; or `times` themselves, one for each step and the start.

    Raises InputError for an unknown name or choice and nfe < 1. Liu et al. 2024, arXiv 2312.07243;
    Lu et al. 2022, arXiv 2206.00927 and 2211.01095; Zhao et al. 2023, arXiv 2302.04867.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> preset = solver_preset("unipc", LinearBeta(), 5, order=3, relaxation="bh2")
    >>> [step.predictor.order for step in preset.steps], preset.nfe
    ([1, 2, 3, 2, 1], 5)
    """
    require(name in PRESETS, "name", repr(name), f"one of {', '.join(PRESETS)}")
    calls, highest = whole(nfe, "nfe", 1), whole(order, "order", 1)
    own, single, correction = PRESETS[name]
    kind = correction if corrector is None else corrector
    require(kind in ("none", "pseudo", "implicit"), "corrector", repr(kind), "a kind of corrector")
    count, implicit = calls + (afs != "none"), 0
    if kind == "implicit":
        steps = count // 2 + 1
        count, implicit = steps, count - steps
    expected = own if prediction is None else prediction
    if single:
        wanted = "1, 2 or 3, without corrector, for a single-step solver"
        require(highest <= 3 and kind == "none", "order", f"{order}, {kind}", wanted)
        made = _singlestep(highest, count, relaxation)
    else:
        made = []
        for i in range(count):
            n = 1 if name == "ddim" else min(i + 1, highest)
            n = min(n, count - i) if lower_order_final else n
            made.append(Taylor(n, relaxation=relaxation if n == 2 else "none"))
    if times is not None:
        grid_times = np.asarray(times, np.float64)
    elif single:
        grid_times = _singlestep_times(noise_schedule, made, grid)
    else:
        grid_times = step_times(noise_schedule, count, grid)
    require(len(grid_times) == count + 1, "times", len(grid_times), f"{count + 1} for {nfe} calls")
    decisions = []
    for i, predictor in enumerate(made):
        after = None
        reached = i < count - 1 and (kind == "pseudo" or i < implicit)
        if reached:
            relaxed = relaxed_corrector and predictor.order == 1
            after = replace(predictor.corrector(), relaxation=relaxation if relaxed else "none")
        t = float(grid_times[i + 1])
        decisions.append(StepDecision(t, expected, predictor, after, reached and i < implicit))
    about = {"preset": name, "order": highest, "grid": grid if times is None else "given"}
    return SolverSchedule(float(grid_times[0]), tuple(decisions), afs, about=about)


def step_times(noise_schedule: NoiseSchedule, steps: int, grid: str = "log_snr") -> Float:
    """The steps + 1 times of a named grid between the ends of a noise schedule.

    The reversed grids are t_start + t_end minus the others: dense at the noise.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> step_times(LinearBeta(), 2, "reversed_quadratic").round(4).tolist()
    [1.0, 0.7349, 0.001]
    """
    require(grid in STEP_GRIDS, "grid", repr(grid), f"one of {', '.join(STEP_GRIDS)}")
    kind, power, turned = STEP_GRIDS[grid]
    times = time_grid(noise_schedule, steps, kind, power)
    if turned:
        times[1:-1] = times[0] + times[-1] - times[-2:0:-1]
    return times


def _singlestep(order: int, count: int, relaxation: str) -> list[Taylor]:
    """Blocks of `order` calls, each expanded around its first; what is left over is shorter."""
    blocks = [order] * (count // order)
    if count % order:
        blocks.append(count % order)
    elif order == 3:  # the last block is split, as its authors do
        blocks[-1:] = [2, 1]
    made: list[Taylor] = []
    for size in blocks:
        made.append(Taylor(1))
        if size >= 2:
            kind = relaxation if size == 2 else "none"
            made.append(Taylor(2, ((-1,),), kind, start=-2))
        if size == 3:  # relaxed: the second stage alone, and no second derivative
            exact = Taylor(3, start=-3)
            made.append(exact if relaxation == "none" else Taylor(2, ((-1,),), start=-3))
    return made


def _singlestep_times(schedule: NoiseSchedule, made: Sequence[Taylor], grid: str) -> Float:
    """The blocks' ends on the grid; inside a block even in log sigma/alpha."""
    firsts = [i for i, taylor in enumerate(made) if taylor.start == -1]
    ends = [*firsts, len(made)]
    outer = step_times(schedule, len(firsts), grid)
    if grid != "log_snr":
        outer = step_times(schedule, len(made), grid)[ends]
    times = np.interp(np.arange(len(made) + 1), ends, np.log(schedule.rho(outer)))
    inside = np.asarray(schedule.time_of_rho(np.exp(times)))
    inside[ends] = outer
    return inside
