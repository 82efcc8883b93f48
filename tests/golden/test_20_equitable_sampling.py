"""Allocations and learning curves against enumeration, bisection and another least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.collection_budget import (
    allocate,
    continuous_allocation,
    equal_allocation,
    proportional_allocation,
)
from scoredraw.data_selection.group_utilities import group_utility
from scoredraw.data_selection.learning_curves import LearningCurve, fit_learning_curve

pytestmark = pytest.mark.golden

NAME = "20-equitable-sampling.json"
SETTINGS = ("equal_cost", "unequal_cost")
NAMES = {"identity": "sum", "log": "log"}


@pytest.fixture(params=SETTINGS)
def case(
    request: pytest.FixtureRequest, golden: Callable[[str], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    data = golden(NAME)
    return data["inputs"][request.param], data["outputs"][request.param]


def curves_of(inputs: dict[str, Any]) -> list[LearningCurve]:
    return [
        LearningCurve("power", dict(zip("abc", row, strict=True))) for row in inputs["curves_abc"]
    ]


def task_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "curves": curves_of(inputs),
        "costs": inputs["costs"],
        "budget": inputs["budget"],
        "n0": inputs["n0"],
    }


@pytest.mark.parametrize("name", list(NAMES))
def test_greedy_and_exact_allocations(case: tuple[Any, Any], name: str) -> None:
    inputs, outputs = case[0], case[1][name]
    options = {"utility": NAMES[name], "weights": inputs["weights"], "step": inputs["step"]}
    greedy = allocate(**task_of(inputs), **options)
    assert greedy.counts.tolist() == outputs["greedy_n"]
    assert greedy.order.tolist() == outputs["greedy_order"]
    assert greedy.utility == pytest.approx(outputs["greedy_value"], rel=0, abs=1e-9)
    exact = allocate(**task_of(inputs), **options, method="exact")
    assert exact.counts.tolist() == outputs["optimal_n"]
    assert exact.utility == pytest.approx(outputs["optimal_value"], rel=0, abs=1e-9)


def test_maximin(case: tuple[Any, Any]) -> None:
    inputs, outputs = case
    found = allocate(**task_of(inputs), utility="maximin", step=inputs["step"])
    assert found.counts.tolist() == outputs["maximin_n"]


def test_heuristics(case: tuple[Any, Any]) -> None:
    inputs, outputs = case[0], case[1]["heuristics"]
    costs, budget = inputs["costs"], inputs["budget"]
    found = {
        "equal": equal_allocation(costs, budget),
        "proportional": proportional_allocation(inputs["population_shares"], costs, budget),
    }
    value = group_utility("sum", 3, inputs["weights"]).value
    for name, n in found.items():
        want = outputs[name]
        np.testing.assert_allclose(n, want["n"], rtol=0, atol=1e-9)
        r = np.array([curve.predict(one) for curve, one in zip(curves_of(inputs), n, strict=True)])
        np.testing.assert_allclose(r, want["performance"], rtol=0, atol=1e-9)
        assert float(value(r)) == pytest.approx(want["identity"], rel=0, abs=1e-9)


def test_continuous_sizes(case: tuple[Any, Any]) -> None:
    inputs, want = case[0], case[1]["continuous_identity"]
    n, price = continuous_allocation(**task_of(inputs), weights=inputs["weights"])
    np.testing.assert_allclose(n, want["n"], rtol=1e-6)
    assert price == pytest.approx(want["lam"], rel=1e-6)
    r = np.array([curve.predict(one) for curve, one in zip(curves_of(inputs), n, strict=True)])
    assert float(r @ inputs["weights"]) == pytest.approx(want["value"], rel=0, abs=1e-9)


def test_fit(case: tuple[Any, Any]) -> None:
    inputs, want = case[0], case[1]["fit"]
    curve = fit_learning_curve(inputs["fit_n"], inputs["fit_y"])
    assert curve.sse == pytest.approx(want["sse"], rel=1e-6)
    assert float(curve.predict(640)) == pytest.approx(want["pred_640"], rel=1e-6)
    params = [curve.parameters[name] for name in "abc"]
    np.testing.assert_allclose(params, want["params"], rtol=1e-4)
