"""The experiment of paper 38: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.language.selection_curves import SelectionCurve
from scoredraw.papers import p38_large_language_monkeys as p38
from scoredraw.papers.p38_large_language_monkeys import BETA, PLUG_IN, POWER
from scoredraw.reports import Report, run_paper
from scoredraw.samples import Samples, read_samples

pytestmark = pytest.mark.oracle

PLAN = replace(p38.PLANS["smoke"], resamples=400)
Float = NDArray[np.float64]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return read_samples("smollm2-arith")


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(38, "smoke", 0)


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert all(claim.verdict is None for claim in small.claims)
    assert len(small.claims) == 12
    assert [len(table.rows) for table in small.tables] == [8, 4, 3, 5, 3, 3, 6, 4, 1]
    assert [len(figure.series) for figure in small.figures] == [8, 3, 4, 4, 2]
    text = small.to_json()
    assert Report.from_json(text).claims == small.claims
    assert len(text) < 300_000


def test_the_models_of_the_curve(small: Report) -> None:
    """Fits of another implementation to the same file, at every k and at log-spaced k."""
    rows = small.tables[1].rows
    assert [row[1] for row in rows] == [32, 23, 32, 48]
    assert rows[0][2:] == pytest.approx([-4.3757, -0.6090, 0.9944], abs=5e-5)
    assert rows[1][2:4] == pytest.approx([-4.263, -0.597], abs=5e-4)
    r2 = next(claim.measured for claim in small.claims if claim.name.startswith("R²"))
    assert r2.value == rows[0][4]
    assert r2.low < r2.value < r2.high


def test_accuracy_at_k(samples: Samples) -> None:
    """Coverage in per cent at every doubling, and three selectors at 32."""
    methods = ("oracle", "majority", "mean_logprob", "sum_logprob")
    curves = p38.selections(samples, methods, (1, 2, 4, 8, 16, 32), 1, 0)
    coverage = 100 * curves["oracle"].accuracy
    assert coverage.round(1).tolist() == [4.6, 8.8, 16.3, 28.2, 43.8, 60.4]
    last = [round(100 * curves[method].accuracy[-1], 1) for method in methods[1:]]
    assert last == [24.0, 31.2, 29.2]


def test_costs(small: Report) -> None:
    reach, exchange, published = small.tables[3:6]
    assert [row[:2] for row in reach.rows[:3]] == [[0.5, m] for m in ("measured", POWER, BETA)]
    # a token takes about two operations for each of 134.5 million parameters
    tokens = read_samples("smollm2-arith").tokens
    assert tokens is not None
    assert exchange.rows[0][1] == pytest.approx(2 * 0.1345 * tokens.mean(), rel=0.01)
    assert reach.rows[0][3].value == pytest.approx(21 * exchange.rows[0][1])
    assert [row[4] for row in published.rows] == pytest.approx([0.0072, 0.13, 0.17])


def test_the_price_of_a_prompt_is_paid_once() -> None:
    cost = p38.gigaflops_of(p38.SMALL, np.array([3.0, 5.0]), 100)
    params, layers, width = p38.SMOLLM2[p38.SMALL]

    def decoded(count: int) -> float:
        return sum(2 * (params + 2 * layers * width * (100 + t)) for t in range(1, count + 1))

    prompt = sum(2 * (params + 2 * layers * width * t) for t in range(1, 101))
    assert cost(7) == pytest.approx((prompt + 7 * (decoded(3) + decoded(5)) / 2) / 1e9)


# ── foretelling ─────────────────────────────────────────────────────────────────────────────────


def test_forecasts_at_8_are_what_8_samples_show(samples: Samples) -> None:
    """The plug-in at k = 1 is the unbiased estimate: the standard error of 4,000 draws is 2e-4."""
    found = p38.forecasts(samples.counts, samples.right, np.array([1, 8, 32]), 4000, 0)
    assert found[PLUG_IN][:, 0].mean() == pytest.approx(0.0456, abs=1e-3)
    means = {name: values[:, 2].mean() for name, values in found.items()}
    # another implementation, 40 draws: within three of its standard errors
    for name, mean, spread in ((POWER, 0.52, 0.07), (BETA, 0.67, 0.11), (PLUG_IN, 0.29, 0.05)):
        assert means[name] == pytest.approx(mean, abs=3 * spread / np.sqrt(40) + 0.005)
        assert found[name][:, 2].std() == pytest.approx(spread, abs=0.02)


def test_forecasts_of_equal_problems_are_right_by_the_beta_binomial() -> None:
    """Where all problems have p = 1/4, coverage(4) = 1 - (3/4)^4; 500 problems leave no doubt."""
    n, c = np.full(500, 4000), np.full(500, 1000)
    found = p38.forecasts(n, c, np.array([4]), 50, 0)
    assert found[BETA].mean() == pytest.approx(1 - 0.75**4, abs=0.01)
    assert found[PLUG_IN].mean() < 1 - 0.75**4 - 0.03


def test_claims_of_forecasts_can_fail() -> None:
    rng = np.random.default_rng(0)
    at = {POWER: 0.5, BETA: 0.6, PLUG_IN: 0.3}
    found = {name: mean + 0.03 * rng.standard_normal((200, 2)) for name, mean in at.items()}

    def verdicts(truth: float) -> list[str | None]:
        return [claim.verdict for claim in p38.forecast_claims(found, truth, 32)]

    assert verdicts(0.55) == ["holds", "holds", "holds"]
    assert verdicts(0.8) == ["fails", "fails", "holds"]
    assert verdicts(0.1) == ["fails", "fails", "fails"]
    assert verdicts(0.3)[2] == "undecided"


# ── choosing ────────────────────────────────────────────────────────────────────────────────────


def invented(**accuracy: list[float]) -> p38.Curves:
    """Curves of 200 problems whose means are as given, with the spread of coin tosses."""
    ks = np.array([1, 2, 4, 8])
    curves = {}
    for method, means in accuracy.items():
        tosses = np.random.default_rng(0).random((200, 1)) < np.array(means)
        mean = tosses.mean(axis=0)
        curves[method] = SelectionCurve(ks, mean, 0 * mean, ("",) * 4, tosses * 1.0, method)
    return curves


def test_claims_of_selection_can_fail() -> None:
    chance = [0.1, 0.1, 0.1, 0.1]
    paper = invented(oracle=[0.1, 0.3, 0.5, 0.9], majority=[0.1, 0.2, 0.3, 0.3], uniform=chance)
    assert [c.verdict for c in p38.selection_claims(paper, PLAN)] == [
        "holds", "holds", "holds", "fails"  # no plateau: five points a doubling
    ]  # fmt: skip
    flat = invented(oracle=[0.1, 0.3, 0.5, 0.6], majority=[0.1, 0.5, 0.5, 0.5], uniform=chance)
    verdicts = [c.verdict for c in p38.selection_claims(flat, PLAN)]
    assert verdicts == ["holds", "fails", "holds", "holds"]
    worse = invented(oracle=[0.5] * 4, majority=[0.05] * 4, uniform=[0.5] * 4)
    verdicts = [c.verdict for c in p38.selection_claims(worse, PLAN)]
    assert verdicts == ["undecided", "holds", "fails", "holds"]


def test_the_gap_is_to_the_best_of_each_resample() -> None:
    rows = np.array([[[1.0, 0.2, 0.8], [1.0, 0.4, 0.0]], [[1.0, 0.9, 0.0], [0.0, 0.1, 0.0]]])
    assert p38.gap_to_best(rows, axis=1) == pytest.approx([0.6, 0.0])


# ── the twin ────────────────────────────────────────────────────────────────────────────────────


def test_tree_samples() -> None:
    """One tree of depth 3 names at most 8 of 10 digits, and is right on 46 % of the images."""
    twin = p38.tree_samples(3, 8, 0)
    assert (len(twin), set(twin.counts)) == (200, {8})
    assert twin.correct.mean() == pytest.approx(0.46, abs=0.05)
    assert twin.answers is not None
    assert all(len(set(tree)) <= 8 for tree in twin.answers.reshape(200, 8).T)
    again = p38.tree_samples(3, 8, 0)
    np.testing.assert_array_equal(twin.correct, again.correct)
    assert (p38.tree_samples(3, 8, 1).correct != twin.correct).any()


def law(k: Float, b: float = -0.5) -> Float:
    return np.exp(-2 * k**b)


def test_a_shifted_curve_is_found_and_another_shape_is_not() -> None:
    dense = np.arange(10, 400)  # between sizes as close as these a straight line is good
    factor, left = p38.shift_between(law(dense / 3), law(dense / 1), dense)
    assert (factor, left) == (pytest.approx(3, rel=0.01), pytest.approx(0, abs=2e-3))
    ks = np.arange(1, 200)
    factor, left = p38.shift_between(law(ks / 1, -1.5), law(ks / 1), ks)
    assert left > 0.2
