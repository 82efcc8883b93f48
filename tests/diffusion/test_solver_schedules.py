"""Solver schedules: presets, files to the last digit, the authors' records, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta, VarianceExploding
from scoredraw.diffusion.solver_schedules import (
    PRESETS,
    RELAXATIONS,
    STEP_GRIDS,
    SolverSchedule,
    StepDecision,
    Taylor,
    solver_preset,
    step_times,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.property

VP = LinearBeta()
TWO = (StepDecision(0.5), StepDecision(0.1, "noise", Taylor(2)))


@st.composite
def schedules(draw: Any) -> SolverSchedule:
    """Any valid schedule."""
    times = sorted(draw(st.sets(st.floats(1e-4, 1.0), min_size=2, max_size=8)), reverse=True)
    relaxed = st.sampled_from(RELAXATIONS), st.floats(-1, 1)
    steps = []
    for i, t in enumerate(times[1:]):
        start = draw(st.integers(-i - 1, -1))

        def taylor(start: int, calls: int) -> Taylor:
            order = draw(st.integers(1, calls))
            others = [p for p in range(-calls, 0) if p != start]
            points = tuple(
                tuple(draw(st.permutations(others)))[: draw(st.integers(k, len(others)))]
                for k in range(1, order)
            )  # fmt: skip
            full = draw(st.booleans())
            return Taylor(order, None if full else points, *map(draw, relaxed), start=start)

        corrector = None
        if i < len(times) - 2 and draw(st.booleans()):
            corrector = taylor(start - 1, i + 2)
        kind = draw(st.sampled_from(["noise", "data", "v3"]))
        again = corrector is not None and draw(st.booleans())
        steps.append(StepDecision(t, kind, taylor(start, i + 1), corrector, again))
    afs = draw(st.sampled_from(["none", "zero_x0", "average_x0"]))
    skips = tuple(draw(st.lists(st.floats(0, 2), max_size=4)))
    return SolverSchedule(times[0], tuple(steps), afs, skips, {"score": draw(st.floats(0, 1))})


@given(schedules())
def test_files_keep_every_digit(schedule) -> None:
    again = SolverSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.to_json() == schedule.to_json()
    reevaluated = sum(step.reevaluate for step in schedule.steps)
    assert again.nfe == len(schedule.steps) - (schedule.afs != "none") + reevaluated


def test_a_file_is_whole_or_absent(tmp_path) -> None:
    one = SolverSchedule(1.0, TWO, about={"model": "digits"})
    one.save(tmp_path / "a.json")
    assert SolverSchedule.load(tmp_path / "a.json") == one
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match="cannot read"):
        SolverSchedule.load(tmp_path / "b.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        SolverSchedule(1.0, TWO, about={"score": np.nan}).to_json()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 6, 7, 11])
def test_presets_make_the_calls_they_are_asked_for(name, nfe) -> None:
    single = name.endswith("singlestep")
    for order in (1, 2, 3):
        for grid in STEP_GRIDS:
            for corrector in (None,) if single else (None, "none", "pseudo", "implicit"):
                made = solver_preset(name, VP, nfe, order=order, grid=grid, corrector=corrector)
                assert made.nfe == nfe
                assert (made.times[0], made.times[-1]) == (1.0, 1e-3)
    assert solver_preset(name, VP, nfe, afs="zero_x0").nfe == nfe


def test_orders_warm_up_and_come_down() -> None:
    def orders(**choices: Any) -> list[int]:
        steps = solver_preset("dpm_solver++", VP, 6, **choices).steps
        return [step.predictor.order for step in steps]

    assert orders(order=3) == [1, 2, 3, 3, 2, 1]
    assert orders(order=3, lower_order_final=False) == [1, 2, 3, 3, 3, 3]
    assert orders(order=4) == [1, 2, 3, 3, 2, 1]
    single = solver_preset("dpm_solver_singlestep", VP, 6, order=3).steps
    assert [(s.predictor.order, s.predictor.start) for s in single] == [
        (1, -1), (2, -2), (3, -3), (1, -1), (2, -2), (1, -1)
    ]  # fmt: skip


def test_grids_lie_between_the_ends() -> None:
    trained = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    for noise in (VP, trained, VarianceExploding()):
        for grid in STEP_GRIDS:
            times = step_times(noise, 9, grid)
            assert (np.diff(times) < 0).all()
            assert (times[0], times[-1]) == (noise.ends.t_start, noise.ends.t_end)
    quadratic, turned = (step_times(VP, 8, g) for g in ("quadratic", "reversed_quadratic"))
    np.testing.assert_allclose(np.diff(turned), np.diff(quadratic)[::-1])


def test_noise_levels_survive_a_move_to_another_schedule() -> None:
    trained = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    made = solver_preset("unipc", trained, 6, order=3)
    moved = made.on(trained, VarianceExploding())
    np.testing.assert_allclose(moved.times, trained.rho(made.times))
    assert moved.with_times(made.times) == made
    with pytest.raises(InputError, match="times: got 2, want 7"):
        made.with_times([1.0, 0.5])


# ------------------------------------------------------------------ the authors' records

RECORD = {
    "timesteps": [1.0, 0.5, 0.1],
    "orders": [1, 2],
    "prediction_types": ["noise_prediction", "dpmsolver_v3_prediction"],
    "start_points": [-1, -1],
    "derivative_types": [
        [],
        [{"estimate": "Difference_1", "active_points": [-2], "relaxation": "linear",
          "relaxation_coefficient": 0.03}],
    ],
    "corrector_types": [
        {"type": "implicit", "start_point": -2, "taylor_order": 2, "derivative_type": [
            {"estimate": "Difference_1", "active_points": [-1], "relaxation": None}]},
        {"type": "no_corrector", "start_point": None, "taylor_order": None,
         "derivative_type": None},
    ],
    "afs": "no_afs",
    "skip_coefficients": [1.0, 0.9, 1.0, 1.0],
}  # fmt: skip


def test_a_record_of_the_authors_is_read() -> None:
    read = SolverSchedule.from_released({"decisions": RECORD, "search_score": None})
    assert read == SolverSchedule(
        1.0,
        (
            StepDecision(0.5, "noise", Taylor(), Taylor(2, start=-2), True),
            StepDecision(0.1, "v3", Taylor(2, relaxation="linear", coefficient=0.03)),
        ),
        skip_coefficients=(1.0, 0.9, 1.0, 1.0),
    )
    assert read.nfe == 3
    assert read.with_prediction("data").steps[1].prediction == "data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": [2, 2]}, "step 0: predictor"),
        ({"orders": [1, 3]}, "step 1: predictor: points: got points for 1 derivatives, want 2"),
        ({"timesteps": [1.0, 0.1, 0.5]}, "step 1: t: got 0.5, want below 0.1"),
        ({"start_points": [-1, -2]}, r"step 1: predictor: points: got \(-2,\), want others"),
        ({"prediction_types": ["noise_prediction"]}, "record: got IndexError"),
        ({"corrector_types": [{"type": "other"}] * 2}, "step 0: corrector: got 'other'"),
        ({"afs": "guess"}, "afs: got 'guess'"),
    ],
)
def test_records_that_do_not_hold_together_are_refused(change, message) -> None:
    with pytest.raises(InputError, match=message):
        SolverSchedule.from_released({**RECORD, **change})
    with pytest.raises(InputError, match="record: got KeyError"):
        SolverSchedule.from_released({})


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (StepDecision(0.5), "step 1: t: got 0.5, want below 0.5"),
        (StepDecision(0.7), "step 1: t: got 0.7, want below 0.5"),
        (StepDecision(float("nan")), "step 1: t: got nan"),
        (StepDecision(0.1, "eps"), "step 1: prediction: got 'eps', want one of noise, data, v3"),
        (StepDecision(0.1, predictor=Taylor(3)), "step 1: predictor: order: got 3, want at most 2"),
        (StepDecision(0.1, predictor=Taylor(0)), "step 1: predictor: order: got 0"),
        (StepDecision(0.1, predictor=Taylor(1, start=-3)), "step 1: predictor: start: got -3"),
        (StepDecision(0.1, predictor=Taylor(2, ((-3,),))), r"points: got \(-3,\)"),
        (StepDecision(0.1, predictor=Taylor(2, ((-1,),))), r"points: got \(-1,\), want others"),
        (StepDecision(0.1, predictor=Taylor(2, ((-2, -2),))), "want 1 or more different"),
        (StepDecision(0.1, predictor=Taylor(2, ((),))), "want 1 or more different"),
        (StepDecision(0.1, predictor=Taylor(2, relaxation="bh3")), "relaxation: got 'bh3'"),
        (StepDecision(0.1, predictor=Taylor(2, coefficient=np.inf)), "coefficient: got inf"),
        (StepDecision(0.1, corrector=Taylor(2, start=-2)), "step 1: corrector: got one"),
        (StepDecision(0.1, reevaluate=True), "step 1: reevaluate: got True, want a corrector"),
    ],
)
def test_a_bad_step_is_named(step, message) -> None:
    with pytest.raises(InputError, match=message):
        SolverSchedule(1.0, (StepDecision(0.5), step))


def test_other_bad_choices() -> None:
    with pytest.raises(InputError, match="steps: got 0"):
        SolverSchedule(1.0, ())
    with pytest.raises(InputError, match="step 0: corrector: start: got -1, want -2"):
        SolverSchedule(1.0, (replace(TWO[0], corrector=Taylor(1)), TWO[1]))
    for bad in ("", "[]", "{}", json.dumps({"format": "other"})):
        with pytest.raises(InputError, match="solver schedule: got"):
            SolverSchedule.from_json(bad)
    data = SolverSchedule(1.0, TWO).to_dict()
    for change in ({"extra": 1}, {"steps": [{}]}, {"steps": [{"t": 1, "predictor": {"n": 2}}]}):
        with pytest.raises(InputError, match="solver schedule: got"):
            SolverSchedule.from_dict({**data, **change})
    for arguments, message in (
        ({"nfe": 0}, "nfe: got 0"), ({"name": "heun"}, "name: got 'heun'"),
        ({"order": 0}, "order: got 0"), ({"grid": "cubic"}, "grid: got 'cubic'"),
        ({"corrector": "both"}, "corrector: got 'both'"), ({"times": [1, 0.1]}, "times: got 2"),
        ({"name": "dpm_solver_singlestep", "order": 4}, "order: got 4"),
        ({"prediction": "x"}, "step 0: prediction: got 'x'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            solver_preset(**{"name": "unipc", "noise_schedule": VP, "nfe": 4, **arguments})
