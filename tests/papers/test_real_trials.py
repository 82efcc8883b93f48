"""The trials on real data that several papers share: what is claimed is what was measured."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.papers import real_trials
from scoredraw.papers.selection_trials import STRATIFIED, UNIFORM, Trial
from scoredraw.reports import Report

pytestmark = pytest.mark.oracle


def trial(gain: float) -> Trial:
    """Four seeds in which an arm is better than the uniform draw by about `gain`."""
    base = np.array([0.6, 0.7, 0.65, 0.72])
    arms = {UNIFORM: base, STRATIFIED: base + 0.01, "ours": base + gain + [0, 1e-3, -1e-3, 0]}
    seconds = dict.fromkeys(arms, np.ones(4))
    return Trial("made up, for a test", {50: arms}, {50: seconds}, base + 0.1, 0.2, 500, 10)


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "holds"), (0.0, "undecided"), (-0.1, "fails")])
def test_the_claim_follows_the_gain(gain: float, verdict: str) -> None:
    (claim,) = real_trials.claims(trial(gain), ["ours"], "made up", "it is better")
    assert claim.verdict == verdict
    assert claim.measured.value == pytest.approx(gain)  # type: ignore[union-attr]
    assert "50 of 500" in claim.name


def test_the_figure_shows_every_arm_but_the_baseline() -> None:
    figure = real_trials.gain_figure(trial(0.1), "made up")
    assert figure.series[0].x == ["ours", STRATIFIED]
    assert figure.series[0].y == pytest.approx([0.1, 0.01])


def test_a_method_of_the_catalogue_is_an_arm() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4))
    y = (x[:, 0] > 0).astype(np.int64)
    for name in real_trials.OUTSIDERS:
        arm = real_trials.catalogue_arm(name)
        rows = arm(x, y, 30, 2**40)
        assert len(np.unique(rows)) == 30
        assert (rows == arm(x, y, 30, 2**40)).all()


def test_nothing_is_run_below_full_scale() -> None:
    report = Report(paper=7, scale="quick", seed=0)
    real_trials.add_to(report, {"ours": "add-one-in"})
    assert not report.claims
    assert not report.tables
