"""USF: the claim-makers against what is known, the rankers, and the experiment itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.schedule_search import FEATURES, METHODS, SearchResult, Trial  # noqa: E402
from scoredraw.diffusion.schedules import LinearBeta  # noqa: E402
from scoredraw.diffusion.solver_schedules import solver_preset  # noqa: E402
from scoredraw.papers import p26_usf  # noqa: E402
from scoredraw.papers.p26_usf import PLANS, WIDE, SequenceRanker  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402


def invented(power: float) -> list[Any]:
    """Seeds whose searches end as the paper would have it; with power -1 the other way round."""
    gains = {"random": 0.9, "evolution": 0.75, "predictor": 0.65, WIDE: 0.7}
    gains |= dict.fromkeys(p26_usf.optimisers(), 0.9)
    schedule, rng = solver_preset("ddim", LinearBeta(), 5), np.random.default_rng(26)
    seeds = []
    for spread in np.exp(0.2 * rng.normal(size=10)):
        found = {}
        for method, gain in gains.items():
            near = np.exp(0.01 * rng.normal())
            own, other = (0.8 * gain * near) ** power, (gain * near) ** power
            best, preset = Trial(schedule, spread * own), Trial(schedule, spread)
            pair = (spread * other, spread)
            found[method] = SearchResult(best, preset, (preset, best), pair)
        one = SimpleNamespace(found=found)
        one.ratios = lambda m, one=one: p26_usf.Trials.ratios(one, m)
        seeds.append(one)
    return seeds


@pytest.mark.oracle
@pytest.mark.parametrize(("power", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_claims_hold_where_the_paper_is_right_and_fail_where_it_is_not(power, verdict) -> None:
    claims = p26_usf.search_claims(5, invented(power))
    assert len(claims) == len(METHODS) + 1 + 2 + 1 + 3 * len(p26_usf.optimisers())
    assert {claim.name: claim.verdict for claim in claims} == {c.name: verdict for c in claims}


@pytest.mark.oracle
def test_the_sequence_ranker_learns_an_order_across_steps() -> None:
    """The score is a sum of what two steps say; 100 unseen rows, tau by chance within 0.2."""
    from scipy.stats import kendalltau

    X = np.random.default_rng(0).normal(size=(300, 4 * FEATURES))
    first, third = X[:, 0], X[:, FEATURES + 2]
    y = first + third
    ranker = SequenceRanker(0).fit(X[:200], y[:200])
    taus = [kendalltau(ranker.predict(X[200:]), term[200:])[0] for term in (y, first, third)]
    assert taus[0] > 0.5
    assert min(taus[1:]) > 0.3
    again = SequenceRanker(0).fit(X[:200], y[:200])
    np.testing.assert_array_equal(again.predict(X), ranker.predict(X))


@pytest.fixture(scope="module")
def small() -> Report:
    """Every part of a run, and little of each."""
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            PLANS,
            "quick",
            replace(PLANS["smoke"], calls=(4, 5), peers=(4,), doublings=(20, 40, 80)),
        )
        return run_paper(26, "quick", 0)


@pytest.mark.contract
def test_every_part_of_a_run_works(small: Report) -> None:
    assert all(claim.verdict in ("holds", "fails", "undecided") for claim in small.claims)
    assert len(small.claims) == 12 + 2 * (7 + 3 * len(p26_usf.optimisers())) + 3 + 1
    assert len(small.tables) == 1 + 2 * 2 + 2
    assert [figure.kind for figure in small.figures] == ["line", "line", "pictures", "line"]
    again = Report.from_json(small.to_json())
    assert [t.columns for t in again.tables] == [t.columns for t in small.tables]
    assert len(small.to_json()) < 200_000


@pytest.mark.oracle
def test_orders_of_convergence_are_found(small: Report) -> None:
    verdicts = {c.name: c.verdict for c in small.claims if c.name.startswith("order of conv")}
    for order in (1, 2):
        for prediction in ("noise", "data"):
            name = f"order of convergence, {prediction}, order {order}"
            assert verdicts[name] == verdicts[f"{name}, corrected"] == "holds"


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(26, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
