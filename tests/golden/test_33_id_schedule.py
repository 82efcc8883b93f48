"""Where a response is interrupted, by both readings of the growing budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scoredraw.language.iterative_deepening import deepening_schedule, trigger_count

pytestmark = pytest.mark.golden


def test_every_position_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden("33-id-schedule.json")
    cases, positions = data["inputs"]["cases"], data["outputs"]["positions"]
    assert set(data["outputs"]) == {"positions"}
    assert data["tolerance"] == {"positions": "exact"}
    assert len(cases) == len(positions) == 7
    for case, wanted in zip(cases, positions, strict=True):
        assert set(wanted) == {"total", "segment"}
        for schedule, cuts in wanted.items():
            given = (case["b0"], case["gamma"], case["B"], schedule)
            assert deepening_schedule(*given) == cuts, given
            # those that round to their predecessor, or to B, are counted before they are dropped
            assert trigger_count(*given) >= len(cuts)
