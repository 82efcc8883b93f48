"""Search for the solver schedule that suits a model: random, evolutionary, or guided by a ranker.

A candidate is a `SolverSchedule` with a fixed number of network calls, its score what `evaluate`
says (lower is better). After the presets come

    random     a preset, mutated
    evolution  half the time a crossover of two of the 15 best, else one of them; then mutated
    predictor  evolution proposes many, a ranker that has learned from all scores so far puts them
               in order, the first are evaluated; the ranker is fitted anew at every stage

and every child is repaired: times decrease, no step uses calls that are not there yet, correctors
fit their steps, the calls are those of the budget. Trial i depends on the seed, on i and on the
trials before it alone, so a search that was killed goes on from its journal as if nothing had been.

Liu, Ning, Yang and Wang, "A unified sampling framework for solver searching of diffusion
probabilistic models", ICLR 2024, arXiv 2312.07243. Their released program has the evolution only,
and its crossover can leave a step with a higher order than it has calls for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.solver_schedules import (
    FIRST_STEPS,
    SolverSchedule,
    StepDecision,
    Taylor,
    solver_preset,
)
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.journal import Journal

Float = NDArray[np.float64]
Evaluate = Callable[[SolverSchedule], float]

METHODS = ("random", "evolution", "predictor")
RANKERS = ("forest", "boosting")
CHOICES = {
    "predictions": ("noise", "data"),
    "correctors": ("none", "pseudo", "implicit"),
    "first_steps": FIRST_STEPS,
}
LEAST_GAP = 1e-3  # between steps, as a share of the way in log sigma/alpha
FEATURES = 12  # of a step


@dataclass(frozen=True)
class SearchSpace:
    """What candidates may choose, and how often a mutation changes it.

    nfe: network calls. orders: 1 .. 4 with their weights. predictions, correctors ("none",
    "pseudo", "implicit"), first_steps (afs): the choices, drawn evenly. relaxation: standard
    deviation of the linear coefficient, 0 for none. t_end: (lowest, highest) last time, drawn
    evenly, where it may change. A mutation draws each step's time, order, derivatives, prediction,
    relaxation and corrector, and afs, anew with probability `changed` each; with probability
    `moved` it inserts a step, with the same it deletes one, and then restores the budget.
    time_jitter: standard deviation of a time's move, as a share of the step in log sigma/alpha.
    The authors, whose budget varies, have 0.3, 0.2, and 0.03 in time. InputError for bad choices.
    """

    nfe: int
    orders: tuple[float, ...] = (0.2, 0.4, 0.3, 0.1)
    predictions: tuple[str, ...] = ("noise", "data")
    correctors: tuple[str, ...] = ("none", "pseudo")
    first_steps: tuple[str, ...] = ("none",)
    relaxation: float = 0.03
    t_end: tuple[float, float] | None = None
    moved: float = 0.0
    changed: float = 0.2
    time_jitter: float = 0.3

    def __post_init__(self) -> None:
        whole(self.nfe, "nfe", 1)
        weights = np.asarray(self.orders, np.float64)
        good = weights.ndim == 1 and weights.size > 0 and bool((weights >= 0).all())
        require(good and weights.sum() > 0, "orders", self.orders, "weights of 1, 2, ...")
        for name, choices in CHOICES.items():
            chosen = getattr(self, name)
            good = len(chosen) > 0 and set(chosen) <= set(choices)
            require(good, name, chosen, f"some of {', '.join(choices)}")
        rates = self.moved, self.changed
        require(all(0 <= p <= 1 for p in rates), "moved, changed", rates, "probabilities")


class Trial(NamedTuple):
    """A schedule and its score; one that is NaN or infinite counts as the worst."""

    schedule: SolverSchedule
    score: float


@dataclass(frozen=True)
class SearchState:
    """All trials so far, and the candidates that the ranker has put in front."""

    trials: tuple[Trial, ...] = ()
    queue: tuple[SolverSchedule, ...] = ()

    def best(self, count: int) -> list[Trial]:
        """The best trials, the best first; ties in order of time."""
        return sorted(self.trials, key=lambda one: badness(one.score))[:count]


def badness(score: float) -> float:
    """The score, or infinity where it is no number."""
    return score if math.isfinite(score) else math.inf


# ------------------------------------------------------------------ children


class Breeder:
    """Mutation, crossover and repair of schedules within a `SearchSpace`.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> breeder = Breeder(LinearBeta(), SearchSpace(nfe=4))
    >>> parent = solver_preset("ddim", LinearBeta(), 4)
    >>> child = breeder.mutated(parent, np.random.default_rng(0))
    >>> child.nfe, child == parent
    (4, False)
    """

    def __init__(self, noise_schedule: NoiseSchedule, space: SearchSpace) -> None:
        self.noise_schedule, self.space = noise_schedule, space
        self.order_weights = np.cumsum(space.orders) / np.sum(space.orders)

    def way(self, times: Any) -> Float:
        """log sigma/alpha of times, falling."""
        return np.asarray(np.log(self.noise_schedule.rho(times)))

    def mutated(self, parent: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
        """A child that differs by what chance changes."""
        space, way = self.space, self.way(parent.times)
        steps, afs, last = list(parent.steps), parent.afs, way[-1]
        if rng.random() < space.moved:
            way = self._insert(way, steps, rng)
        if rng.random() < space.moved and len(steps) > 1:
            way = self._delete(way, steps, rng)
        gaps = (way[:-2] - way[2:]) / 2
        jitter = gaps * rng.normal(0, space.time_jitter, len(gaps))
        way[1:-1] += jitter * (rng.random(len(gaps)) < space.changed)
        way = np.sort(np.clip(way, way[-1], way[0]))[::-1]
        if space.t_end is not None and rng.random() < space.changed:
            last = self.way(rng.uniform(*space.t_end))
        steps = [self._changed(step, i, rng) for i, step in enumerate(steps)]
        if rng.random() < space.changed:
            afs = _one_of(space.first_steps, rng)
        return self.repaired(np.append(way[:-1], last), steps, afs, rng, parent)

    def crossed(
        self, a: SolverSchedule, b: SolverSchedule, rng: np.random.Generator
    ) -> SolverSchedule:
        """A child with each kind of choice from either parent, and at times step by step.

        Parents of different lengths: a alone.
        """
        if len(a.steps) != len(b.steps):
            return a
        times, kinds, expansions, correctors, firsts = (rng.random(5) < 0.5).tolist()
        mixed = (rng.random(len(a.steps)) < 0.5) & (rng.random() < 0.5)
        steps = []
        for *pair, swap in zip(a.steps, b.steps, mixed.tolist(), strict=True):
            kind, expansion = pair[kinds ^ swap].prediction, pair[expansions ^ swap].predictor
            fix = pair[int(correctors)]
            steps.append(StepDecision(0.0, kind, expansion, fix.corrector, fix.reevaluate))
        way = self.way((b if times else a).times)
        return self.repaired(way, steps, (b if firsts else a).afs, rng, a)

    def _changed(self, step: StepDecision, i: int, rng: np.random.Generator) -> StepDecision:
        """A step with some of its choices drawn anew; what then does not fit is repaired later."""
        space, taylor = self.space, step.predictor
        draws = rng.random(5) < space.changed
        if draws[0]:
            order = 1 + int(np.searchsorted(self.order_weights, rng.random(), side="right"))
            taylor = replace(taylor, order=min(order, i + 1), points=None)
        if draws[1] and taylor.order > 2:  # the first derivative by one difference, or by all
            full = Taylor(taylor.order, start=taylor.start).active
            short = full[0][:1], *full[1:]
            taylor = replace(taylor, points=short if rng.random() < 0.5 else None)
        if draws[2]:
            step = replace(step, prediction=_one_of(space.predictions, rng))
        if draws[3] and space.relaxation > 0:
            c = float(rng.normal(0, space.relaxation))
            taylor = replace(taylor, relaxation="linear", coefficient=c)
        if draws[4]:
            kind = _one_of(space.correctors, rng)
            after = None if kind == "none" else taylor.corrector()
            step = replace(step, corrector=after, reevaluate=kind == "implicit")
        return replace(step, predictor=taylor)

    def repaired(
        self, way: Float, steps: list[StepDecision], afs: str, rng: np.random.Generator,
        parent: SolverSchedule,
    ) -> SolverSchedule:  # fmt: skip
        """The nearest valid schedule with the calls of the budget."""
        steps, nfe = list(steps), self.space.nfe
        while True:
            steps = [_fitted(s, i + 1, i == len(steps) - 1) for i, s in enumerate(steps)]
            costly = [i for i, step in enumerate(steps) if step.reevaluate]
            spent = len(steps) - (afs != "none") + len(costly)
            if spent == nfe:
                break
            if spent < nfe:
                way = self._insert(way, steps, rng)
            elif costly:
                i = costly[int(rng.integers(len(costly)))]
                steps[i] = replace(steps[i], reevaluate=False)
            else:
                way = self._delete(way, steps, rng)
        times = self._apart(way, parent)
        made = (replace(s, t=float(t)) for s, t in zip(steps, times[1:], strict=True))
        return replace(parent, t_start=float(times[0]), steps=tuple(made), afs=afs, about={})

    def _insert(self, way: Float, steps: list[StepDecision], rng: np.random.Generator) -> Float:
        """Divide the step at a random place on the way; both halves do the same."""
        at = rng.uniform(way[-1], way[0])
        i = int(np.searchsorted(-way[1:-1], -at))
        steps.insert(i, replace(steps[i], reevaluate=False))
        return np.insert(way, i + 1, at)

    def _delete(self, way: Float, steps: list[StepDecision], rng: np.random.Generator) -> Float:
        """Drop a random step; the one after it, or for the last the one before, goes on longer."""
        i = int(rng.integers(len(steps)))
        del steps[i]
        return np.delete(way, min(i + 1, len(way) - 2))

    def _apart(self, way: Float, parent: SolverSchedule) -> Float:
        """Times in order, and no two nearer than LEAST_GAP of the way."""
        count, first, last = len(way) - 1, way[0], way[-1]
        gap = min(LEAST_GAP, 0.5 / count) * (first - last)
        least = gap * np.arange(count + 1)  # the way that gaps take
        down = np.append(first, np.clip(np.sort(way[1:-1])[::-1], last, first))
        down = np.minimum.accumulate(down + least[:-1]) - least[:-1]
        up = np.maximum.accumulate((np.append(down, last) + least)[::-1])[::-1] - least
        times = np.asarray(self.noise_schedule.time_of_rho(np.exp(up)))
        times[0] = parent.t_start
        if last == self.way(parent.times)[-1]:
            times[-1] = parent.steps[-1].t
        return times


def _one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _fitted(step: StepDecision, calls: int, last: bool) -> StepDecision:
    """`StepDecision.fitted`, and a corrector of one order more than the step."""
    step = step.fitted(calls, last)
    if step.corrector is None or step.corrector.order == step.predictor.order + 1:
        return step
    return replace(step, corrector=step.predictor.corrector())


# ------------------------------------------------------------------ rankers


class Ranker(Protocol):
    """A regressor of scikit-learn's kind; what it predicts puts schedules in order."""

    def fit(self, X: Any, y: Any) -> Any: ...

    def predict(self, X: Any) -> Any: ...


def schedule_features(
    schedules: Sequence[SolverSchedule], noise_schedule: NoiseSchedule, steps: int
) -> Float:
    """What a ranker sees, (n, 12 steps): each step's choices as numbers, zeros after the last.

    Where it ends and how long it is in log sigma/alpha, noise or data, orders 1 to 4, a first
    derivative from few points, relaxation, corrector, reevaluation, an analytical first step.
    """
    made = np.zeros((len(schedules), steps, FEATURES))
    for row, schedule in zip(made, schedules, strict=True):
        way = np.log(noise_schedule.rho(schedule.times))
        for i, step in enumerate(schedule.steps):
            taylor = step.predictor
            row[i, :2] = way[i + 1], way[i] - way[i + 1]
            row[i, 2] = step.prediction == "noise"
            row[i, 2 + min(taylor.order, 4)] = 1.0
            row[i, 7] = taylor.order > 2 and len(taylor.active[0]) < taylor.order - 1
            row[i, 8] = taylor.coefficient
            row[i, 9:11] = step.corrector is not None, step.reevaluate
            row[i, 11] = i == 0 and FIRST_STEPS.index(schedule.afs)
    return made.reshape(len(schedules), -1)


def make_ranker(kind: str | Callable[[int], Ranker], seed: int = 0) -> Ranker:
    """A ranker by name, "forest" (extra trees) or "boosting"; or what a function of a seed makes.

    >>> make_ranker("forest").fit(np.zeros((3, 24)), [0.0, 0.5, 1.0]).predict(np.zeros((1, 24)))
    array([0.5])
    """
    if not isinstance(kind, str):
        return kind(seed)
    require(kind in RANKERS, "ranker", repr(kind), f"one of {', '.join(RANKERS)}, or a function")
    from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor

    if kind == "forest":
        return ExtraTreesRegressor(100, min_samples_leaf=2, random_state=seed)
    return GradientBoostingRegressor(subsample=0.7, random_state=seed)


# ------------------------------------------------------------------ the search


class ScheduleSearch:
    """One trial after another: `init` an empty state, `step` it with an `evaluate`.

    seeds: schedules to try first (default `preset_seeds`); those of another budget, or outside the
    times of the noise schedule, are refused. ranker: for method "predictor", as in
    `make_ranker`. rng: an integer. parents: how many of the best have children. stage, pool:
    candidates evaluated between two fits of the ranker, and candidates that it ranks; a fifth of
    those evaluated are not its choice.
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        space: SearchSpace | int,
        *,
        method: str = "evolution",
        ranker: str | Callable[[int], Ranker] = "forest",
        seeds: Sequence[SolverSchedule] | None = None,
        rng: int = 0,
        parents: int = 15,
        stage: int = 10,
        pool: int = 200,
    ) -> None:
        self.space = space if isinstance(space, SearchSpace) else SearchSpace(space)
        require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
        make_ranker(ranker)
        self.noise_schedule, self.method, self.ranker = noise_schedule, method, ranker
        self.seed, self.stage = whole(rng, "rng", 0), whole(stage, "stage", 1)
        self.parents, self.pool = whole(parents, "parents", 1), whole(pool, "pool", self.stage)
        self.seeds = list(seeds) if seeds else preset_seeds(noise_schedule, self.space)
        for i, one in enumerate(self.seeds):
            require(one.nfe == self.space.nfe, f"seeds[{i}]: nfe", one.nfe, f"{self.space.nfe}")
            one.validate(noise_schedule)
        self.breeder = Breeder(noise_schedule, self.space)

    def init(self, trials: Sequence[Trial] = ()) -> SearchState:
        """No trials, or those of an earlier run."""
        return SearchState(tuple(trials))

    def step(self, state: SearchState, evaluate: Evaluate) -> SearchState:
        """One trial more."""
        schedule, queue = self.propose(state)
        return SearchState((*state.trials, Trial(schedule, float(evaluate(schedule)))), queue)

    def propose(self, state: SearchState) -> tuple[SolverSchedule, tuple[SolverSchedule, ...]]:
        """The schedule to try next, and what the ranker has put behind it."""
        done = len(state.trials) - len(self.seeds)
        if done < 0:
            return self.seeds[len(state.trials)], ()
        if self.method != "predictor":
            return self._child(state, np.random.default_rng([self.seed, done])), ()
        within = done % self.stage
        queue = state.queue
        if not queue:  # at the start of a stage, or where a killed search goes on
            before = SearchState(state.trials[: len(state.trials) - within])
            queue = self._ranked(before, done - within)[within:]
        return queue[0], queue[1:]

    def _child(self, state: SearchState, rng: np.random.Generator) -> SolverSchedule:
        if self.method == "random":
            return self.breeder.mutated(self.seeds[int(rng.integers(len(self.seeds)))], rng)
        best = state.best(self.parents)
        one, other = (best[int(i)].schedule for i in rng.integers(len(best), size=2))
        if rng.random() < 0.5:
            one = self.breeder.crossed(one, other, rng)
        return self.breeder.mutated(one, rng)

    def _ranked(self, state: SearchState, done: int) -> tuple[SolverSchedule, ...]:
        """The candidates of a stage: the ranker's first, and a fifth of any."""
        rng = np.random.default_rng([self.seed, done])
        pool = [self._child(state, rng) for _ in range(self.pool)]
        tried = [trial.schedule for trial in state.trials]
        steps = max(len(one.steps) for one in [*pool, *tried])
        features = schedule_features([*tried, *pool], self.noise_schedule, steps)
        ranks = rankdata([badness(trial.score) for trial in state.trials]) / len(tried)
        ranker = make_ranker(self.ranker, self.seed).fit(features[: len(tried)], ranks)
        order = np.argsort(ranker.predict(features[len(tried) :]), kind="stable")
        free = self.stage // 5
        chosen = [*order[: self.stage - free], *rng.permutation(order[self.stage - free :])[:free]]
        return tuple(pool[int(i)] for i in chosen)


def preset_seeds(noise_schedule: NoiseSchedule, space: SearchSpace) -> list[SolverSchedule]:
    """Presets on three grids: DPM-Solver and ++ of orders 1 to 3, and UniPC 2 and 3 where
    the space has its corrector. The two predictions agree at order 1, which stands once a grid."""
    made = []
    for grid in ("log_snr", "uniform", "quadratic"):
        for prediction in space.predictions:
            for order in (1, 2, 3)[: len(space.orders)]:
                if order > 1 or prediction == space.predictions[0]:
                    made.append(("dpm_solver", grid, prediction, order))
            if "pseudo" in space.correctors and len(space.orders) > 1:
                made += [("unipc", grid, prediction, order) for order in (2, 3)]
    return [
        solver_preset(name, noise_schedule, space.nfe, order=order, prediction=kind, grid=grid)
        for name, grid, kind, order in made
    ]


@dataclass(frozen=True)
class SearchResult:
    """What a search found. best, best_preset: (schedule, score); trials: all, in order.

    held_out: the two on noises that the search has not seen, or None.
    """

    best: Trial
    best_preset: Trial
    trials: tuple[Trial, ...]
    held_out: tuple[float, float] | None = None


def search_schedule(
    evaluate: Evaluate,
    noise_schedule: NoiseSchedule,
    space: SearchSpace | int,
    *,
    evaluations: int = 300,
    held_out: Evaluate | None = None,
    journal: str | Path | None = None,
    about: Any = None,
    progress: Callable[[int, int, float], None] | None = None,
    **choices: Any,
) -> SearchResult:
    """The best schedule of `evaluations` candidates and the presets, by `evaluate`.

    evaluate(schedule) -> score, lower is better; NaN and infinite scores count as the worst. space:
    a `SearchSpace`, or just its number of calls. held_out: a second evaluate for the best and the
    best preset. journal: keeps all trials, from which a killed or longer search goes on; about:
    what `evaluate` goes by, JSON; progress(done, total, best score). choices: of `ScheduleSearch`.

    `result.best.schedule.save(path)` writes what `UnifiedSolver` and `UnifiedScheduler` run. Raises
    InputError before any work for bad choices and another search's journal. Time: the evaluations;
    else ~1 ms a candidate. Sequential. Liu et al. 2024, arXiv 2312.07243.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> gap = lambda schedule: abs(schedule.times[1] - 0.7)  # wants its first step to end there
    >>> result = search_schedule(gap, LinearBeta(), 3, evaluations=60)
    >>> result.best.score < result.best_preset.score, result.best.schedule.nfe
    (True, 3)
    """
    search = ScheduleSearch(noise_schedule, space, **choices)
    total = len(search.seeds) + whole(evaluations, "evaluations", 0)
    log = Journal(journal) if journal is not None else None
    state = search.init(_resumed(log, search, {} if about is None else {"about": about}))
    while len(state.trials) < total:
        state = search.step(state, evaluate)
        newest = state.trials[-1]
        if log is not None:
            record = {"schedule": newest.schedule.to_dict(), "score": newest.score}
            log.append({"trial": len(state.trials) - 1, **record})
        if progress is not None:
            progress(len(state.trials), total, state.best(1)[0].score)
    presets = SearchState(state.trials[: len(search.seeds)])
    best, preset = (_labelled(one.best(1)[0], search) for one in (state, presets))
    both = (held_out(best.schedule), held_out(preset.schedule)) if held_out else None
    return SearchResult(best, preset, state.trials, both)


def _labelled(trial: Trial, search: ScheduleSearch) -> Trial:
    about = {**trial.schedule.about, "method": search.method, "rng": search.seed}
    if math.isfinite(trial.score):
        about["score"] = trial.score
    return Trial(replace(trial.schedule, about=about), trial.score)


def _resumed(log: Journal | None, search: ScheduleSearch, about: dict[str, Any]) -> list[Trial]:
    """The trials of a journal, which is begun if it is empty."""
    if log is None:
        return []
    settings = {name: getattr(search, name) for name in ("method", "parents", "stage", "pool")}
    settings |= {"rng": search.seed, "space": asdict(search.space), **about}
    settings["ranker"] = getattr(search.ranker, "__name__", search.ranker)
    settings["seeds"] = [one.to_dict() for one in search.seeds]
    records = log.records()
    if not records:
        log.append({"search": settings})
        return []
    same = records[0].get("search") == json.loads(json.dumps(settings))
    require(same, "journal", log.path, "one of this very search, or a new file")
    trials = sorted((r for r in records if "trial" in r), key=lambda r: r["trial"])
    return [Trial(SolverSchedule.from_dict(r["schedule"]), r["score"]) for r in trials]
