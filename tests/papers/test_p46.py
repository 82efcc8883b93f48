"""The experiment of paper 46 runs end to end, and its parts do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.papers import p46_projektor as p46
from scoredraw.reports import Report

pytest.importorskip("ot")
pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def report() -> Report:
    return p46.run("smoke", 0)


def test_smoke_runs_end_to_end(report) -> None:
    assert report.paper == 46
    assert len(report.claims) == 28
    assert len(report.tables) == 4
    assert [figure.kind for figure in report.figures] == ["interval", "interval"]
    assert all(np.isfinite(c.measured.value) for c in report.claims)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_the_same_seed_gives_the_same_report(report) -> None:
    assert p46.run("smoke", 0).to_json() == report.to_json()


def test_the_gradient_holds_and_the_notebooks_does_not(report) -> None:
    named = {claim.name: claim.measured for claim in report.claims}
    ours = named["relative error of the forecast's gradient (finite differences)"]
    assert ours.value < 1e-3
    theirs = next(m for name, m in named.items() if name.startswith("the same with the calibrated"))
    assert theirs.value > 0.01


def test_digits_sources_hold_their_classes() -> None:
    sources, (x, y) = p46.digits_sources(np.random.default_rng(0))
    assert x.shape == (500, 64)
    assert len(np.unique(y)) == 10
    for (_, labels), own in zip(sources, p46.CLASSES, strict=True):
        assert np.isin(labels, own).mean() == pytest.approx(p46.OWN, abs=0.005)


def test_clothing_sources_are_mixed_and_one_is_wrong() -> None:
    sources, val, test = p46.clothing_sources(np.random.default_rng(0))
    assert [len(y) for _, y in sources] == [p46.CLOTHING_ROWS] * 4
    assert (len(val[1]), len(test[1])) == (500, 3000)
    for (_, labels), own in zip(sources, ((0, 1, 2, 3), (4, 6, 8), (5, 7, 9)), strict=False):
        assert np.isin(labels, own).mean() == pytest.approx(0.85, abs=0.001)
    rng = np.random.default_rng(1)
    rows = [rng.permutation(p46.CLOTHING_ROWS)[:1000] for _ in sources]
    train = p46.accuracy_on(*test, p46.classifier)
    scores = [train(x[r], y[r]) for (x, y), r in zip(sources, rows, strict=True)]
    clean = train(*(np.concatenate(both) for both in zip(*sources[:3], strict=True)))
    assert max(scores) < clean


def test_differences_are_derivatives_along_the_simplex() -> None:
    slope = np.array([3.0, -1.0, 0.5])
    got = p46.differences(lambda p: float(slope @ p), np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(got, slope - slope.mean(), atol=1e-8)


def test_forms_are_scored_on_what_they_have_not_seen() -> None:
    grid = p46.mixture_grid(3, 4)
    ot = 1 + (grid**2).sum(axis=1)
    fit, held = np.arange(10), np.arange(10, 15)
    assert p46.form_error("ot", grid, ot, 1 - 0.1 * ot, fit, held) < 1e-9
    changed = 1 - 0.1 * ot
    changed[held] += 0.25
    error = p46.form_error("ot", grid, ot, changed, fit, held)
    assert error == pytest.approx(0.25)
