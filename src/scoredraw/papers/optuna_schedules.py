"""The search of a solver schedule by a general optimiser: optuna's TPE and NSGA-II.

A schedule of n steps becomes n choices of a kind, which know nothing of each other:

    gap         log of a step's length in log sigma/alpha, of the mean length
    prediction  noise or data
    order       1 .. 3, at most the calls until then
    short       the first derivative of order 3 from one difference rather than two
    bend        the linear coefficient of the first derivative

That is the space of `SearchSpace(n, orders=(.., .., ..), correctors=("none",))`, whose presets the
optimiser is told to try first, as our own searches do.

Akiba, Sano, Yanase, Ohta and Koyama, "Optuna: a next-generation hyperparameter optimization
framework", KDD 2019, arXiv 1907.10902.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scoredraw.diffusion.schedule_search import (
    Breeder,
    Evaluate,
    SearchResult,
    SearchSpace,
    SearchState,
    Trial,
    badness,
    preset_seeds,
)
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.solver_schedules import SolverSchedule, StepDecision, Taylor
from scoredraw.errors import import_extra

GAPS, BENDS = (-4.0, 2.0), (-0.1, 0.1)
SHORT = ((-2,), (-2, -3))  # the points of order 3's two derivatives
POPULATION = 25  # of NSGA-II: ten generations of 250 trials
SAMPLERS: dict[str, Callable[[Any, int], Any]] = {
    "TPE": lambda samplers, seed: samplers.TPESampler(seed=seed, multivariate=True),
    "NSGA-II": lambda samplers, seed: samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
}


def choices_of(schedule: SolverSchedule, breeder: Breeder) -> dict[str, Any]:
    """A schedule without correctors as optuna's parameters."""
    gaps = -np.diff(breeder.way(schedule.times))
    found: dict[str, Any] = {}
    for i, (gap, step) in enumerate(zip(gaps / gaps.mean(), schedule.steps, strict=True)):
        taylor = step.predictor
        found |= {
            f"gap {i}": float(np.clip(np.log(gap), *GAPS)), f"prediction {i}": step.prediction,
            f"order {i}": taylor.order, f"short {i}": taylor.points == SHORT,
            f"bend {i}": float(np.clip(taylor.coefficient, *BENDS)),
        }  # fmt: skip
    return found


def schedule_of(trial: Any, parent: SolverSchedule, breeder: Breeder) -> SolverSchedule:
    """The schedule of what a trial suggests, between the ends of a parent."""
    n, space = breeder.space.nfe, breeder.space
    gaps = np.exp([trial.suggest_float(f"gap {i}", *GAPS) for i in range(n)])
    first, last = breeder.way(parent.times)[[0, -1]]
    way = np.append(first, first + (last - first) * np.cumsum(gaps) / gaps.sum())
    way[-1] = last
    steps = []
    for i in range(n):
        kind = trial.suggest_categorical(f"prediction {i}", list(space.predictions))
        order = trial.suggest_int(f"order {i}", 1, min(len(space.orders), i + 1))
        short = trial.suggest_categorical(f"short {i}", [False, True])
        bend = trial.suggest_float(f"bend {i}", *BENDS)
        points = SHORT if short and order == 3 else None
        steps.append(StepDecision(0.0, kind, Taylor(order, points, "linear", bend)))
    return breeder.repaired(way, steps, "none", np.random.default_rng(0), parent)


def optuna_search(
    evaluate: Evaluate, noise_schedule: NoiseSchedule, space: SearchSpace, sampler: str, *,
    evaluations: int, held_out: Evaluate, rng: int = 0,
) -> SearchResult:  # fmt: skip
    """As `search_schedule`: the presets and `evaluations` trials more, by a sampler of SAMPLERS.

    Raises `MissingExtraError` without optuna.
    """
    optuna = import_extra("optuna", "dev")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    breeder, presets = Breeder(noise_schedule, space), preset_seeds(noise_schedule, space)
    study = optuna.create_study(sampler=SAMPLERS[sampler](optuna.samplers, rng))
    trials: list[Trial] = []
    for preset in presets:
        study.enqueue_trial(choices_of(preset, breeder))

    def objective(trial: Any) -> float:
        schedule = schedule_of(trial, presets[0], breeder)
        trials.append(Trial(schedule, float(evaluate(schedule))))
        return badness(trials[-1].score)

    study.optimize(objective, n_trials=len(presets) + evaluations)
    best, known = (SearchState(tuple(some)).best(1)[0] for some in (trials, trials[: len(presets)]))
    both = held_out(best.schedule), held_out(known.schedule)
    return SearchResult(best, known, tuple(trials), both)
