"""The experiment of paper 40 runs end to end, and its parts do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.papers import p40_quad as p40
from scoredraw.reports import Report

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def report() -> Report:
    return p40.run("smoke", 0)


def test_smoke_runs_end_to_end(report: Report) -> None:
    assert report.paper == 40
    assert len(report.claims) == 2 * len(p40.SETTINGS) + 4 + 3
    assert [len(table.rows) for table in report.tables] == [10, 10, 10, 3]
    assert all(np.isfinite(c.measured.value) for c in report.claims)  # type: ignore[union-attr]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_claims_can_fail() -> None:
    """Made-up outcomes: a top k better than Quad, plain products better than curvature."""
    noise = np.random.default_rng(0).normal(0, 1e-3, size=(3, 8))
    arms = [p40.RANDOM, p40.TOP, p40.FULL, p40.CLEAN, *p40.ALPHAS, p40.LOSS, p40.DSIR, p40.MATES]
    accuracy = dict.fromkeys(arms, 0.8 + noise[0])
    accuracy[p40.QUAD] = 0.5 + noise[1]
    accuracy[p40.ROBIN] = 0.4 + noise[1]
    evaluations = dict.fromkeys(arms, 900 + noise[2])
    correlation = {
        "EK-FAC": 0.2 + noise[0],
        "K-FAC": 0.4 + noise[1],
        "no curvature": 0.9 + noise[2],
    }
    outcome = p40.Outcome(accuracy, accuracy, evaluations, correlation)
    verdicts = {c.verdict for c in p40.claims(dict.fromkeys(p40.SETTINGS, outcome))}
    assert verdicts == {"fails"}


def test_the_twin_is_as_described() -> None:
    """Shares of wrong labels over 6 seeds: .65 x .9 x the share of clusters, give or take .05."""
    for setting in p40.SETTINGS[:2]:
        trials = [p40.Trial(setting, seed) for seed in range(3)]
        wrong = np.mean([trial.wrong.mean() for trial in trials])
        assert wrong == pytest.approx(0.65 * 0.9 * setting.share, abs=0.05)
        for trial in trials:
            touched = np.unique(trial.groups[trial.wrong])
            assert len(touched) <= round(setting.share * setting.clusters)
            assert len(np.unique(trial.groups)) == setting.clusters


def test_arms_pick_as_many_rows_and_influence_avoids_wrong_labels() -> None:
    trial = p40.Trial(p40.SETTINGS[2], 1)
    picks = trial.picks()
    for arm, (rows, _) in picks.items():
        assert len(set(rows.tolist())) == len(rows), arm
        if arm not in (p40.FULL, p40.CLEAN):
            assert len(rows) == p40.BUDGET, arm
    share = {arm: trial.wrong[rows].mean() for arm, (rows, _) in picks.items()}
    assert share[p40.CLEAN] == 0
    assert share[p40.TOP] < 0.5 * share[p40.FULL]
    assert picks[p40.TOP][1] == p40.POOL
    assert 0 < picks[p40.QUAD][1] < p40.POOL / 2
    worth = trial.influence
    near = {form: np.corrcoef(worth[form], worth["exact"])[0, 1] for form in p40.FORMS}
    assert near["EK-FAC"] > near["no curvature"] + 0.2


def test_the_language_models_part_runs_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from scoredraw.papers import quad_language

    monkeypatch.setattr(quad_language, "REFERENCE_CHUNKS", 4)
    small = quad_language.Plan(seeds=2, steps=2, groups=4, factor_chunks=16)
    report = Report(paper=40, scale="smoke", seed=0)
    quad_language.add_to(report, small, 0)
    assert len(report.claims) == 2
    assert [row[0] for row in report.tables[0].rows] == [*quad_language.LAYERS, quad_language.PLAIN]
    assert len(report.figures[0].series[0].x) == 4


def test_influence_of_all_layers_is_the_sum_over_kinds() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from scoredraw.papers import quad_language

    pool = torch.randint(128, (12, quad_language.LENGTH))
    model = quad_language.trained(pool, 1, 0)
    found = quad_language.influences(model, pool[:8], pool[8:], pool[None, :4])
    whole, mlp, attention = (found[kind] for kind in quad_language.LAYERS)
    np.testing.assert_allclose(whole, mlp + attention, rtol=1e-4)
