"""Schedules as optuna's parameters, there and back, and a search by them."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
optuna = pytest.importorskip("optuna")

from scoredraw.diffusion.schedule_search import Breeder, SearchSpace, preset_seeds  # noqa: E402
from scoredraw.diffusion.schedules import LinearBeta  # noqa: E402
from scoredraw.diffusion.solver_schedules import SolverSchedule  # noqa: E402
from scoredraw.papers import optuna_schedules  # noqa: E402

VP = LinearBeta()
BREEDERS = {
    n: Breeder(VP, SearchSpace(n, orders=(0.2, 0.4, 0.4), correctors=("none",))) for n in (3, 5, 20)
}
BREEDER = BREEDERS[5]
SPACE = BREEDER.space


def from_choices(choices: dict, breeder: Breeder = BREEDER) -> SolverSchedule:
    trial = optuna.trial.FixedTrial(choices)
    return optuna_schedules.schedule_of(trial, preset_seeds(VP, breeder.space)[0], breeder)


@pytest.mark.oracle
@pytest.mark.parametrize("calls", list(BREEDERS))
def test_presets_come_back_as_they_were(calls: int) -> None:
    breeder = BREEDERS[calls]
    for preset in preset_seeds(VP, breeder.space):
        back = from_choices(optuna_schedules.choices_of(preset, breeder), breeder)
        assert back.times == pytest.approx(preset.times, rel=1e-9)
        for a, b in zip(back.steps, preset.steps, strict=True):
            assert (a.prediction, a.predictor.order) == (b.prediction, b.predictor.order)
            assert a.predictor.active == b.predictor.active
            assert a.predictor.coefficient == b.predictor.coefficient == 0


@pytest.mark.oracle
def test_choices_are_what_the_schedule_does() -> None:
    choices = {
        **optuna_schedules.choices_of(preset_seeds(VP, SPACE)[0], BREEDER),
        "gap 1": math.log(2), "order 3": 3, "short 3": True, "bend 3": 0.05, "order 4": 3,
        "prediction 2": "data",
    }  # fmt: skip
    made = from_choices(choices)
    gaps = -(BREEDER.way(made.times)[1:] - BREEDER.way(made.times)[:-1])
    assert gaps[1] / gaps[[0, 2, 3, 4]] == pytest.approx([2.0] * 4)
    assert made.steps[3].predictor.active == optuna_schedules.SHORT
    assert made.steps[3].predictor.coefficient == 0.05
    assert made.steps[4].predictor.active == ((-2, -3), (-2, -3))
    assert made.steps[2].prediction == "data"
    made.validate(VP)
    again = optuna_schedules.choices_of(made, BREEDER)
    assert {k: v for k, v in again.items() if "gap" not in k} == {
        k: v for k, v in choices.items() if "gap" not in k
    }


@pytest.mark.contract
@pytest.mark.parametrize("sampler", list(optuna_schedules.SAMPLERS))
def test_a_search_tries_the_presets_and_goes_on(sampler: str) -> None:
    def gap(schedule: SolverSchedule) -> float:
        """Wants its second step to end at a time, and is broken by data predictions first."""
        if schedule.steps[0].prediction == "data":
            return math.nan
        return abs(schedule.times[2] - 0.31)

    first, again = (
        optuna_schedules.optuna_search(gap, VP, SPACE, sampler, evaluations=40, held_out=gap, rng=3)
        for _ in range(2)
    )
    presets = [gap(one) for one in preset_seeds(VP, SPACE)]
    scores = [trial.score for trial in first.trials]
    assert scores[: len(presets)] == pytest.approx(presets, rel=1e-6, nan_ok=True)
    assert len(scores) == len(presets) + 40
    assert [trial.schedule for trial in first.trials] == [t.schedule for t in again.trials]
    assert any(map(math.isnan, scores))  # and the search went on
    assert first.best.score == again.best.score < first.best_preset.score
    assert first.held_out == (first.best.score, first.best_preset.score)
