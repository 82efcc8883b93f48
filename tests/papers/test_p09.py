"""The experiment of paper 9: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.language.passk_regret import coverage_coefficient, reward_errors
from scoredraw.papers import p09_best_of_majority as p09
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.oracle

SIZES = (10, 500)


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(9, "smoke", 0)


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert all(claim.verdict is None for claim in small.claims)
    sets = len(p09.REAL) - sum(note.endswith("left out.") for note in small.notes)
    assert sets >= 1  # the arithmetic samples are in the package
    assert len(small.claims) == 9 + 11 + 3 * sets + 1
    assert len(small.tables) == 3 + 1 + 2 * sets + 1
    assert len(small.figures) == 2 + sets
    text = small.to_json()
    assert Report.from_json(text).claims == small.claims
    assert len(text) < 100_000


def test_the_exact_claims_hold_at_any_scale() -> None:
    report = Report(paper=9, scale="smoke", seed=0)
    p09.add_degradation(report)
    p09.add_majority_failure(report)
    p09.add_hard_instances(report)
    assert [claim.verdict for claim in report.claims] == ["holds"] * 6
    table = report.tables[0].rows
    assert [row[2] for row in table] == pytest.approx([0.771, 0.221, 2.73e-7], rel=3e-3)


def test_the_degradation_instance() -> None:
    instance = p09.degradation()
    assert reward_errors(*instance) == (pytest.approx(0.01215), 0.0)
    assert coverage_coefficient(*instance[:2]) == pytest.approx(5)
    assert (instance[2] == 1).sum() == 50


def test_a_wrong_choice_would_break_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit the worst instead of the best: the inequality is violated at once."""
    random = np.random.default_rng(0)
    instances = [p09.random_instance(random) for _ in range(5)]
    counts = [random.multinomial(200, instance[0], 20) for instance in instances]

    def largest() -> float:
        pairs = zip(instances, counts, strict=True)
        return max(p09.step_ratios(i, c, 1, 0.02).max(initial=0) for i, c in pairs)

    assert largest() <= 1
    right = p09.submit_bom_in_rows
    monkeypatch.setattr(p09, "submit_bom_in_rows", lambda c, r, *rest: right(c, -r, *rest))
    assert largest() > 1


# ── digits ──────────────────────────────────────────────────────────────────────────────────────


def test_votes_and_reward_are_as_strong_as_they_should_be() -> None:
    """A vote is right 40 % of the time, the model 93 %: 150 trees, one seed."""
    votes, truth, chances = p09.digit_votes(0, 150)
    assert votes.shape == (899, 150)
    assert (votes == truth[:, None]).mean() == pytest.approx(0.40, abs=0.02)
    assert (chances.argmax(axis=1) == truth).mean() == pytest.approx(0.92, abs=0.02)


def invented(**accuracy: Any) -> dict[str, np.ndarray]:
    """Accuracies with 10 and 500 votes, of 30 seeds that differ a little."""
    noise = np.random.default_rng(0).normal(0, 0.002, (30, 2))
    names = {"bon": p09.BON, "majority": p09.MAJORITY, "bom": p09.BOM, "weighted": p09.WEIGHTED}
    found = {names[name]: np.array(row) + noise for name, row in accuracy.items()}
    return found | {name + p09.TWO: rows for name, rows in found.items()}


def verdicts(**accuracy: Any) -> list[str | None]:
    held = invented(**accuracy)
    held["α = 0.3"] = held[p09.MAJORITY]
    for how in ("mean", "max"):
        held[f"{p09.BON}, noise a sample, {how}"] = held["α = 0.3"]
    held["α = 0.15, noise a sample, mean"] = held["α = 0.3"]
    return [claim.verdict for claim in p09.digits_claims(held, held, SIZES)][:4]


def test_claims_of_digits_can_hold_and_fail() -> None:
    weighted = (0.8, 0.86)
    paper = {"bon": (0.78, 0.73), "majority": (0.67, 0.83), "bom": (0.78, 0.86)}
    assert verdicts(**paper, weighted=weighted) == ["holds"] * 4
    better = {**paper, "bon": (0.78, 0.78)}
    assert verdicts(**better, weighted=weighted) == ["fails", "holds", "holds", "holds"]
    falling = {**paper, "bom": (0.90, 0.86)}
    assert verdicts(**falling, weighted=weighted) == ["holds", "fails", "holds", "holds"]
    behind = {**paper, "bom": (0.70, 0.86)}
    assert verdicts(**behind, weighted=weighted) == ["holds", "holds", "fails", "fails"]


# ── a small language model ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rows() -> p09.Rows:
    return p09.real_rows(p09.read_samples(p09.REAL[0]))


def test_arithmetic_as_measured_before(rows: p09.Rows) -> None:
    """In per cent: ties share here, there the first won."""
    found = p09.real_accuracy(rows, 0.0, 1, 0)
    got = [100 * found[name].mean() for name in (p09.BON, p09.MAJORITY, p09.BOM)]
    assert got == pytest.approx(p09.EARLIER_REAL[0.0], abs=0.25)
    assert 100 * found[p09.COVERAGE].mean() == pytest.approx(100 * 29 / 48)


def test_noise_on_right_or_wrong(rows: p09.Rows) -> None:
    """200 draws against an earlier run: standard errors of about 0.3 and 0.8 points."""
    for noise, off in ((0.3, 1.2), (1.0, 3.0)):
        found = p09.real_accuracy(rows, noise, 200, 0)
        got = [100 * found[name].mean() for name in (p09.BON, p09.MAJORITY, p09.BOM)]
        assert got == pytest.approx(p09.EARLIER_REAL[noise], abs=off)


def test_coverage_coefficients(rows: p09.Rows) -> None:
    row = p09.coverage_table("", rows[1]).rows[0]
    assert row[:3] == [48, 29, pytest.approx(6 / 32)]
    assert row[3] == 16
    assert row[-2] > 1000  # samples the theory would want
