"""The search: children that are always valid, methods that find, and runs that are killed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedule_search import (
    METHODS,
    Breeder,
    ScheduleSearch,
    SearchSpace,
    Trial,
    make_ranker,
    preset_seeds,
    schedule_features,
    search_schedule,
)
from scoredraw.diffusion.schedules import (
    DiscreteAlphas,
    LinearBeta,
    NoiseSchedule,
    VarianceExploding,
)
from scoredraw.diffusion.solver_schedules import SolverSchedule, StepDecision, Taylor, solver_preset
from scoredraw.diffusion.unified_solver import SolutionError
from scoredraw.errors import InputError

pytestmark = pytest.mark.property

VP = LinearBeta()
DATA = GaussianMixtureScore(
    [0.45, 0.55], [[0.13, -0.13], [0.64, 0.1]], [np.diag([0.29, 0.32]), np.diag([0.23, 0.27])]
)


def toy(schedule: SolverSchedule) -> float:
    """Wants early steps short, noise prediction and order 2: a smooth landscape with no noise."""
    way = np.log(VP.rho(schedule.times))
    gaps = np.diff(way) / (way[-1] - way[0])
    steps = schedule.steps
    wrong = sum((s.prediction != "noise") + abs(s.predictor.order - 2) for s in steps)
    return float(
        np.square(gaps - np.linspace(0.5, 1.5, len(gaps)) / len(gaps)).sum() + 0.01 * wrong
    )


# ------------------------------------------------------------------ children


@pytest.mark.parametrize(
    "noise", [VP, DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000)), VarianceExploding()],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
@pytest.mark.parametrize("nfe", [1, 2, 5, 10])
def test_a_thousand_children_of_children_are_valid(noise: NoiseSchedule, nfe: int) -> None:
    """Orders, points, correctors and times are checked by making them; the budget here."""
    space = SearchSpace(
        nfe, correctors=("none", "pseudo", "implicit"),
        first_steps=("none", "zero_x0", "average_x0"), changed=0.6, moved=0.5,
    )  # fmt: skip
    breeder, rng = Breeder(noise, space), np.random.default_rng(nfe)
    family = preset_seeds(noise, space)
    for _ in range(250):
        one, other = (family[int(i)] for i in rng.integers(len(family), size=2))
        for child in (breeder.mutated(one, rng), breeder.crossed(one, other, rng)):
            assert child.nfe == nfe
            times = child.validate(noise)
            assert times[0] == noise.ends.t_start
            assert times[-1] == pytest.approx(noise.ends.t_end, abs=1e-12)
            way = np.log(noise.rho(times))
            assert (-np.diff(way)).min() > 4e-4 * (way[0] - way[-1]) or nfe == 1
            family.append(child)
    made = {s.prediction for child in family for s in child.steps}
    assert made == {"noise", "data"}
    if nfe == 10:
        assert any(s.reevaluate for child in family for s in child.steps)
        assert {child.afs for child in family} == {"none", "zero_x0", "average_x0"}
        assert max(s.predictor.order for child in family for s in child.steps) == 4


def test_crossover_keeps_orders_possible() -> None:
    """Which the authors' does not: a first step may inherit an order of a later one."""
    space = SearchSpace(3, correctors=("none", "pseudo"))
    breeder = Breeder(VP, space)
    a = solver_preset("unipc", VP, 3, order=3, lower_order_final=False)
    single = solver_preset("dpm_solver_singlestep", VP, 3, order=3)
    for seed in range(100):
        child = breeder.crossed(a, single, np.random.default_rng(seed))
        assert child.nfe == 3
        for step in child.steps:
            if step.corrector is not None:
                assert step.corrector.order == step.predictor.order + 1
    longer = solver_preset("ddim", VP, 4)
    assert breeder.crossed(a, longer, np.random.default_rng(0)) is a


def test_a_last_time_may_be_searched_too() -> None:
    breeder = Breeder(VP, SearchSpace(4, t_end=(1e-4, 1e-3)))
    rng = np.random.default_rng(0)
    parent = solver_preset("ddim", VP, 4)
    ends = {breeder.mutated(parent, rng).times[-1] for _ in range(50)}
    assert len(ends) > 5
    assert all(0.99e-4 <= t <= 1.01e-3 for t in ends)


def test_nothing_changes_where_nothing_may() -> None:
    breeder = Breeder(VP, SearchSpace(4, changed=0.0, moved=0.0))
    for parent in preset_seeds(VP, SearchSpace(4)):
        child = breeder.mutated(parent, np.random.default_rng(0))
        np.testing.assert_allclose(child.times, parent.times, rtol=1e-9)
        assert child.with_times(parent.times).steps == parent.steps


# ------------------------------------------------------------------ searching


@pytest.mark.parametrize("method", METHODS)
def test_every_method_improves_on_the_presets(method) -> None:
    choices: dict[str, Any] = {"method": method, "rng": 3, "pool": 60, "stage": 20}
    result = search_schedule(toy, VP, 5, evaluations=120, **choices)
    assert result.best.score < result.best_preset.score
    assert len(result.trials) == 120 + len(preset_seeds(VP, SearchSpace(5)))
    assert result.best.schedule.nfe == 5
    assert result.best.schedule.about["score"] == result.best.score
    again = search_schedule(toy, VP, 5, evaluations=120, **choices)
    assert again.best == result.best


def test_what_is_learned_beats_chance() -> None:
    """Over 4 seeds: evolution ends below random mutations, and the predictor below both."""
    ends = {
        method: np.mean([
            search_schedule(
                toy, VP, 5, evaluations=80, method=method, rng=s, stage=20, pool=100
            ).best.score
            for s in range(4)
        ])
        for method in METHODS
    }  # fmt: skip
    assert ends["predictor"] < ends["evolution"] < ends["random"]


@pytest.mark.parametrize("ranker", ["forest", "boosting"])
def test_rankers_learn_an_order_that_they_have_not_seen(ranker) -> None:
    from scipy.stats import kendalltau

    breeder, rng = Breeder(VP, SearchSpace(5)), np.random.default_rng(0)
    seeds = preset_seeds(VP, SearchSpace(5))
    made = [breeder.mutated(seeds[i % len(seeds)], rng) for i in range(400)]
    features = schedule_features(made, VP, 5)
    assert features.shape == (400, 60)
    scores = np.array([toy(one) for one in made])
    fitted = make_ranker(ranker).fit(features[:300], scores[:300])
    assert kendalltau(fitted.predict(features[300:]), scores[300:])[0] > 0.4


def test_features_tell_choices_apart() -> None:
    base = SolverSchedule(1.0, (
        StepDecision(0.5), StepDecision(0.3, "data", Taylor(2), Taylor(3, start=-2)),
        StepDecision(0.1, "data", Taylor(3)),
    ))  # fmt: skip
    from dataclasses import replace

    def last(**change: Any) -> SolverSchedule:
        return replace(base, steps=(*base.steps[:2], replace(base.steps[2], **change)))

    others = [
        last(t=0.05), last(prediction="noise"), last(predictor=Taylor(2)),
        last(predictor=Taylor(3, ((-2,), (-2, -3)))), replace(base, afs="zero_x0"),
        last(predictor=Taylor(3, relaxation="linear", coefficient=0.1)),
        *(replace(base, steps=(base.steps[0], replace(base.steps[1], **change), base.steps[2]))
          for change in ({"corrector": None}, {"reevaluate": True})),
    ]  # fmt: skip
    rows = schedule_features([base, *others], VP, 4)
    assert len(np.unique(rows, axis=0)) == len(others) + 1


def test_scores_that_are_no_numbers_are_the_worst() -> None:
    def broken(schedule: SolverSchedule) -> float:
        return math.nan if schedule.steps[0].prediction == "noise" else toy(schedule)

    for method in METHODS:
        result = search_schedule(broken, VP, 4, evaluations=40, method=method)
        assert math.isfinite(result.best.score)
        assert any(math.isnan(trial.score) for trial in result.trials)
    result = search_schedule(lambda schedule: math.inf, VP, 4, evaluations=15, method="predictor")
    assert result.best.score == math.inf
    result.best.schedule.to_json()


def test_held_out_noises_and_the_fine_solution() -> None:
    x = np.random.default_rng(0).standard_normal((96, 2))
    search, held = (SolutionError(DATA.eps, VP, part) for part in (x[:32], x[32:]))
    result = search_schedule(search, VP, 4, evaluations=60, held_out=held)
    assert result.held_out is not None
    assert result.held_out[0] < result.held_out[1]
    each = search.each(result.best.schedule)
    assert np.sqrt(np.mean(each**2)) == pytest.approx(result.best.score)
    parts = SolutionError(DATA.eps, VP, x[:32], batch=5)
    assert parts(result.best.schedule) == pytest.approx(result.best.score, rel=1e-9)
    torch = pytest.importorskip("torch")
    tensors = SolutionError(DATA.eps, VP, torch.from_numpy(x[:32]))
    assert tensors(result.best.schedule) == pytest.approx(result.best.score, rel=1e-9)
    blows_up = SolutionError(lambda x, t: 1e200 * x * abs(x), VP, x, exact=x)
    assert blows_up(result.best.schedule) == math.inf
    with pytest.raises(InputError, match="noises: got an empty batch"):
        SolutionError(DATA.eps, VP, x[:0])


# ------------------------------------------------------------------ journals


def killed_after(calls: int) -> Callable[[SolverSchedule], float]:
    made = []

    def evaluate(schedule: SolverSchedule) -> float:
        made.append(schedule)
        if len(made) > calls:
            raise KeyboardInterrupt
        return toy(schedule)

    return evaluate


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_search_goes_on_as_if_nothing_had_been(method, tmp_path) -> None:
    choices: dict[str, Any] = {"evaluations": 24, "method": method, "rng": 1}
    whole = search_schedule(toy, VP, 5, **choices)
    log = tmp_path / "search.jsonl"
    for calls in (3, 30, 4):
        with pytest.raises(KeyboardInterrupt):
            search_schedule(killed_after(calls), VP, 5, journal=log, **choices)
    with log.open("a") as file:  # a line that the kill cut off
        file.write('{"trial": 99, "sched')
    seen: list[tuple[int, int, float]] = []
    again = search_schedule(
        toy, VP, 5, journal=log, progress=lambda *now: seen.append(now), **choices
    )
    assert again == whole
    total = len(whole.trials)
    assert [now[:2] for now in seen] == [(i, total) for i in range(38, total + 1)]
    assert seen[-1][2] == whole.best.score
    longer = search_schedule(killed_after(6), VP, 5, journal=log, **{**choices, "evaluations": 30})
    assert longer.trials[:total] == whole.trials
    with pytest.raises(InputError, match=r"journal: got .* want one of this very search"):
        search_schedule(toy, VP, 5, journal=log, **{**choices, "rng": 2})
    with pytest.raises(InputError, match=r"journal: got .* want one of this very search"):
        search_schedule(toy, VP, 5, journal=log, about="another model", **choices)


# ------------------------------------------------------------------ bad input


def test_bad_choices_are_refused_before_any_work() -> None:
    never = killed_after(0)
    other = solver_preset("ddim", VP, 7)
    for arguments, message in (
        ({"space": 0}, "nfe: got 0"),
        ({"method": "tpe"}, "method: got 'tpe', want one of random, evolution, predictor"),
        ({"ranker": "gru"}, "ranker: got 'gru'"),
        ({"seeds": [other]}, r"seeds\[0\]: nfe: got 7, want 4"),
        ({"rng": -1}, "rng: got -1"),
        ({"evaluations": -1}, "evaluations: got -1"),
        ({"pool": 3}, "pool: got 3"),
        ({"seeds": [SolverSchedule(1.0, (StepDecision(0.1, "v3"),))], "space": 1}, "got 'v3'"),
    ):
        with pytest.raises(InputError, match=message):
            search_schedule(never, VP, **{"space": 4, **arguments})
    for choices, message in (
        ({"orders": ()}, "orders"), ({"orders": (-1.0, 2.0)}, "orders"),
        ({"predictions": ("v3",)}, "predictions: got"), ({"correctors": ()}, "correctors"),
        ({"first_steps": ("some",)}, "first_steps"), ({"changed": 1.5}, "moved, changed: got"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            SearchSpace(5, **choices)


def test_steps_one_by_one() -> None:
    search = ScheduleSearch(VP, 3)
    state = search.init()
    for _ in range(5):
        state = search.step(state, toy)
    assert [trial.schedule for trial in state.trials] == search.seeds[:5]
    assert state.best(2) == sorted(state.trials, key=lambda t: t.score)[:2]
    assert search.init([Trial(search.seeds[0], 1.0)]).trials[0].score == 1.0
