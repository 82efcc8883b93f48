"""Experiments of papers that no file of their own tests: they run through, the same each time."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from scoredraw.papers.answered_questions import VARIABLE
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.contract


def measured(paper: int, rng: int) -> Report:
    """Without what the clock and the machine add."""
    report = run_paper(paper, "smoke", rng)
    return dataclasses.replace(report, seconds=0.0, environment={})


@pytest.mark.parametrize("paper", [14, 27, 32, 48, 60])
def test_a_small_run(paper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    first, again, other = (measured(paper, rng) for rng in (0, 0, 1))
    assert first.claims
    assert all(claim.verdict is None for claim in first.claims)
    assert first.to_json() == again.to_json()
    assert [claim.name for claim in first.claims] == [claim.name for claim in other.claims]
    assert first.to_json() != other.to_json().replace('"seed": 1', '"seed": 0')
    assert Report.from_json(first.to_json()).to_json() == first.to_json()
