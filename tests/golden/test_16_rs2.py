"""The authors' subset sequences, bit for bit, and the exact coverage laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.repeated_sampling import (
    RepeatedSampling,
    expected_coverage,
    rs2_schedule,
    subset_size,
)

pytestmark = pytest.mark.golden

NAME = "16-rs2-schedule.json"
SEQUENCES = {"official_without_replacement": False, "official_with_replacement": True}


@pytest.fixture
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


@pytest.mark.parametrize("sequence", list(SEQUENCES))
def test_official_sequences_are_reproduced_exactly(case: dict[str, Any], sequence: str) -> None:
    inputs, want = case["inputs"], case["outputs"][sequence]
    got = rs2_schedule(
        inputs["n"], inputs["fraction"], inputs["rounds"],
        replacement=SEQUENCES[sequence], wrap="official", seed=inputs["seed"],
    )  # fmt: skip
    assert [subset.tolist() for subset in got] == want


@pytest.mark.parametrize("sequence", list(SEQUENCES))
def test_official_rounds_can_be_asked_for_in_any_order(case: dict[str, Any], sequence: str) -> None:
    inputs, want = case["inputs"], case["outputs"][sequence]
    sampler = RepeatedSampling(
        inputs["n"], inputs["fraction"],
        replacement=SEQUENCES[sequence], wrap="official", seed=inputs["seed"],
    )  # fmt: skip
    order = np.random.default_rng(0).permutation(2 * inputs["rounds"]) % inputs["rounds"]
    for t in order:
        assert sampler.subset(int(t)).tolist() == want[t]


def test_official_sizes_show_the_short_round(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    assert subset_size(inputs["n"], inputs["fraction"]) == outputs["subset_size"]
    sampler = RepeatedSampling(inputs["n"], inputs["fraction"], wrap="official")
    sizes = [sampler.size(t) for t in range(inputs["rounds"])]
    assert sizes == outputs["official_without_replacement_sizes"]
    assert sizes == [len(sampler.subset(t)) for t in range(inputs["rounds"])]


def test_expected_coverage(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    ratio, tolerance = outputs["subset_size"] / inputs["n"], case["tolerance"]["coverage_abs"]
    for replacement, name in (
        (True, "with_replacement_expected_unique_fraction"),
        (False, "without_replacement_expected_unique_fraction_first_pass"),
    ):
        got = expected_coverage(ratio, inputs["rounds"], replacement)
        np.testing.assert_allclose(got, outputs[name], rtol=0, atol=tolerance)
