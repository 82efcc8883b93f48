"""The experiment of paper 20: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.papers import p20_equitable_sampling as p20
from scoredraw.papers.p20_equitable_sampling import EQUAL, MEAN, RAW, SHARE, WORST
from scoredraw.reports import Report

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def small() -> Report:
    return p20.run("smoke", 0)


@pytest.mark.contract
def test_smoke_runs_end_to_end(small: Report) -> None:
    assert small.paper == 20
    assert len(small.claims) == 19
    assert [len(table.rows) for table in small.tables] == [3, 6, 6, 2, 5]
    assert [figure.kind for figure in small.figures] == ["line", "interval", "interval", "line"]
    assert Report.from_json(small.to_json()).claims == small.claims
    assert p20.run("smoke", 1).to_json() != small.to_json()


def test_known_curves_give_what_was_computed_elsewhere(small: Report) -> None:
    """Mean R² of equal, proportional and greedy by another implementation, to four digits."""
    want = [[0.2916, 0.2703, 0.2968], [0.2590, 0.2645, 0.2855], [0.2601, 0.2873, 0.2991]]
    for row, numbers in zip(small.tables[0].rows, want, strict=True):
        assert row[1:4] == pytest.approx(numbers, abs=5e-5)
        assert row[4] >= row[3]  # type: ignore[operator]
    lines = {series.name: np.array(series.y) for series in small.figures[0].series}
    assert (lines["greedy"] >= np.maximum(lines[EQUAL], lines[SHARE]) - 1e-12).all()


def test_digit_worlds() -> None:
    world = p20.digit_world(0)
    assert world.pool is not None
    assert [2 * size for size in world.pool] == pytest.approx([360, 720, 717], abs=2)
    assert world.at("truth", 1, 40) < world.at("truth", 1, 200)
    assert 0 < world.at("measure", 0, 20) <= 1 - 0.5 / 20
    assert world.fixed((1, 1, 1)).tolist() == [66, 66, 66]
    assert world.fixed(world.shares).tolist() == [35, 70, 70]
    other = p20.digit_world(1)
    assert other.at("truth", 1, 40) != world.at("truth", 1, 40)


def test_scores_of_simulated_genotypes_follow_their_law() -> None:
    """Mean R² over 20 worlds (deviation of the mean: 2 %) against the curve that knows that what
    is explained is no noise any more: ρ = R² / h² = n h² / (n h² + M (1 - ρ h²)).
    """
    worlds = [p20.genotype_world(seed) for seed in range(20)]
    for g, h2 in enumerate(p20.KNOWN[0][0]):
        for n in (200, 800):
            rho = 0.5
            for _ in range(100):
                rho = n * h2 / (n * h2 + p20.SEGMENTS * (1 - rho * h2))
            found = np.mean([world.truth(g, n) for world in worlds])
            assert found == pytest.approx(h2 * rho, rel=0.1)
    measured = [world.measure(0, 800) for world in worlds]
    true = [world.truth(0, 640) for world in worlds]  # four fifths, with noise of 800 people
    assert np.mean(measured) == pytest.approx(np.mean(true), abs=0.03)


def test_the_oracle_is_no_worse_than_any_allocation_in_its_batches() -> None:
    def truth(g: int, n: int) -> float:
        return float(np.sin(n * (g + 1)) ** 2)

    world = p20.World(np.array([1.0, 2.0]), 100.0, 10, np.ones(2), truth, truth)
    best = p20.oracle(world, 10)
    every = [
        [truth(0, a), truth(1, b)]
        for a in range(10, 90, 10) for b in range(10, 50, 10) if a + 2 * b <= 100
    ]  # fmt: skip
    assert best["mean"] == pytest.approx(np.mean(every, axis=1).max())
    assert best["worst"] == pytest.approx(np.min(every, axis=1).max())


def test_raw_maximin_starves_whom_it_takes_for_finished() -> None:
    def measure(g: int, n: int) -> float:
        return 1.0 if g == 0 else 0.9

    world = p20.World(np.array([1.0, 1.0]), 100.0, 10, np.ones(2), measure, measure)
    assert p20.raw_maximin(world, 10).tolist() == [10, 90]
    assert p20.campaign(world, utility="maximin", batch=10, explore=0.1)[0] > 10


def found(**means: float) -> dict[str, dict[str, Any]]:
    """Twenty seeds of each arm, of this mean and a deviation of .01."""
    rng = np.random.default_rng(0)
    names = {"equal": EQUAL, "share": SHARE, "mean": MEAN, "worst": WORST, "raw": RAW}
    values = {names[k]: mean + 0.01 * rng.normal(size=20) for k, mean in means.items()}
    return {name: {"mean": value, "worst": value} for name, value in values.items()}


def test_claims_about_digits_can_fail() -> None:
    good = p20.digit_claims(found(equal=0.9, share=0.9, mean=0.95, worst=0.95, raw=0.9))
    bad = p20.digit_claims(found(equal=0.9, share=0.9, mean=0.85, worst=0.85, raw=0.9))
    assert {claim.verdict for claim in good} == {"holds"}
    assert {claim.verdict for claim in bad} == {"fails"}


def test_claims_about_noise_can_fail() -> None:
    rng = np.random.default_rng(0)
    low, high = (level + 1e-3 * rng.normal(size=50) for level in (0.01, 0.05))
    verdicts = [
        [claim.verdict for claim in p20.noise_claims(values, 0.1)]
        for values in (
            {(0.1, 0.01): low, (0.1, 0.1): low, (0.0, 0.1): high},
            {(0.1, 0.01): high, (0.1, 0.1): high, (0.0, 0.1): low},
        )
    ]
    assert verdicts == [["holds", "holds"], ["fails", "fails"]]


def test_regret_without_noise_is_the_price_of_exploration() -> None:
    free = p20.regrets(0.0, 0.0, 1, 30, 0)
    explored = p20.regrets(0.0, 0.1, 1, 30, 0)
    assert free == pytest.approx([0], abs=1e-12)
    assert 0 < explored[0] < 0.03
