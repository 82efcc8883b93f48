"""The experiment of paper 43: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.language.checklist_selection import ChecklistSelection
from scoredraw.models import Completion
from scoredraw.papers import p43_multilingual_samples as p43
from scoredraw.papers.p43_multilingual_samples import COLD, CUT, HEDGED, HOT, PLAIN, N, Scored
from scoredraw.reports import Report, run_paper

pytestmark = pytest.mark.oracle

PLAN = p43.PLANS["smoke"]


@pytest.fixture(scope="module")
def stored() -> p43.Restored:
    return p43.read_stored()


@pytest.mark.contract
def test_smoke_runs_without_verdicts() -> None:
    report = run_paper(43, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
    text = report.to_json()
    assert Report.from_json(text).claims == report.claims
    assert len(text) < 100_000
    same = next(claim for claim in report.claims if claim.name.startswith("MBR of equal answers"))
    assert same.measured == "0 differ; largest difference 0"


# ── sentences ───────────────────────────────────────────────────────────────────────────────────


def test_corruption_is_as_often_as_it_says() -> None:
    """40,000 letters outside the alphabet: each share within 5 standard deviations (fixed seed).

    Read off: the length changes by insertions less deletions, and what is left shows replacements.
    """
    text = "A" * 40_000
    made = p43.corrupt(text, np.random.default_rng(0))
    kept, new = made.count("A"), len(made) - made.count("A")
    spread = 5 * np.sqrt(40_000 * 0.08 * 0.92)
    assert abs(kept - 40_000 * 0.92) < spread  # neither deleted nor replaced
    assert abs(new - 40_000 * 0.08) < spread  # replaced or inserted
    assert set(made) <= set("A abcdefghijklmnopqrstuvwxyz")
    assert p43.corrupt(text, np.random.default_rng(0)) == made


def test_fresh_sentences_are_not_the_stored_ones(stored: p43.Restored) -> None:
    fresh = p43.sentences()
    assert len(fresh) > 400
    assert not {*fresh} & {*stored.clean}
    assert all(40 <= len(text) <= 80 and text.endswith(".") for text in fresh)


class Copyist:
    """A model that restores by copying, a note of how it was asked at the end."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sample_all(self, prompts: Any, n: int, **how: Any) -> list[list[Completion]]:
        self.calls.append({"prompts": len(prompts), "n": n, **how})
        last = [prompt.rsplit("Noisy: ", 1)[1].split("\n")[0] for prompt in prompts]
        mark = f"{how['temperature']} {how.get('min_p', 0)}"
        return [[Completion(f" {text} {mark} {i} ") for i in range(n)] for text in last]


def test_restoring_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))
    monkeypatch.setattr(p43, "PORTION", 2)
    model: Any = Copyist()
    found = p43.restore(model, 3, 7, keep=True)
    assert [c["prompts"] for c in model.calls] == [8, 2, 2, 2, 4, 1, 1, 1]
    assert [c["first"] for c in model.calls] == [0] * 4 + [2] * 4
    assert len({c["seed"] for c in model.calls if "seed" in c}) == 3
    assert found.clean == p43.sentences()[:3]
    for place in range(3):
        own = found.noisy[place]
        assert found.greedy[place] == f"{own} 0.0 0 0"
        others = {text.removesuffix(" 0.0 0 0") for text in found.evidence[place]}
        assert len(others | {own}) == 4  # four corruptions, each its own
        assert found.samples[HOT][place] == [f"{own} 1.2 0.0 {i}" for i in range(N)]
        assert found.samples[CUT][place] == [f"{own} 1.2 0.1 {i}" for i in range(N - 1)]
    again: Any = Copyist()
    assert p43.restore(again, 3, 7, keep=True) == found
    assert not again.calls
    assert p43.restore(again, 3, 8, keep=True).noisy != found.noisy


# ── picks ───────────────────────────────────────────────────────────────────────────────────────


def test_picks_are_from_the_pool_they_say() -> None:
    """Two sentences; position 0 is greedy, 1 to 5 are samples."""
    u = np.zeros((2, 6, 6))
    u[0, 0], u[0, 5] = 0.5, 0.9  # the greedy one is the consensus of the hedged pool alone
    u[1, 3] = 1.0
    x = np.zeros((2, 6, 3))
    x[1, 1] = 2.0
    truth = np.arange(12.0).reshape(2, 6)
    scored = Scored(u, x, truth)
    assert scored.picked(PLAIN).tolist() == [4, 2]
    assert scored.picked(HEDGED).tolist() == [0, 3]
    assert scored.picked(HEDGED, 1.0).tolist() == [0, 1]
    found = p43.arms(scored)
    assert found["MBR"].tolist() == [5, 9]
    assert found["hedged MBR"].tolist() == [0, 9]
    assert found["hedged X-MBR"].tolist() == [0, 7]
    assert found["random sample"].tolist() == [3, 9]
    assert found["best of the hedged pool"].tolist() == [4, 10]
    assert found["greedy alone"].tolist() == [0, 6]


def test_pools_of_both_temperatures(stored: p43.Restored) -> None:
    """Three cold and two hot samples: their consensus is one of those five."""
    values = p43.of_both_temperatures(stored)
    cold, hot = p43.score(stored, COLD), p43.score(stored, HOT)
    five = np.concatenate([cold.truth[:, 1:4], hot.truth[:, 1:3]], axis=1)
    assert (np.abs(five - values[:, None]).min(axis=1) == 0).all()


def test_claims_of_picking_can_fail() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(9, 60))
    names = ["random sample", "MBR", "hedged MBR", "X-MBR", "hedged X-MBR",
             "best of the plain pool", "best of the hedged pool", "greedy alone"]  # fmt: skip

    def verdicts(cold: list[float], hot: list[float], greedy_first: float) -> list[str | None]:
        found = {
            t: {name: mean + each for name, mean, each in zip(names, means, noise, strict=False)}
            for t, means in ((COLD, cold), (HOT, hot))
        }
        u = np.zeros((60, 6, 6))
        u[: round(60 * greedy_first), 0] = 1.0
        u[round(60 * greedy_first) :, 1] = 1.0
        scored = {t: Scored(u, np.zeros((60, 6, 3)), np.zeros((60, 6))) for t in (COLD, HOT)}
        return [claim.verdict for claim in p43.restored_claims("x", scored, found, PLAN)]

    good = verdicts([10, 20, 30, 25, 40, 50, 50, 20], [0, 5, 40, 20, 50, 60, 60, 20], 0.5)
    assert good == ["holds"] * 9
    bad = verdicts([20, 10, 5, 5, 0, 50, 50, 60], [20, 40, 3, 5, 0, 50, 50, 60], 0.0)
    assert bad == ["fails"] * 9
    level = verdicts([10] * 8, [10] * 8, 0.2)
    assert level.count("undecided") >= 7  # within the noise, whichever side a mean lies
    assert level[-1] == "undecided"


# ── the judge ───────────────────────────────────────────────────────────────────────────────────


def verdict(votes: list[int], places: list[int]) -> ChecklistSelection:
    lost = not any(votes)
    return ChecklistSelection(
        0, np.array(votes), np.array(places), ("",) * len(places), "", len(places), lost, 0
    )


def test_what_a_judge_is_worth() -> None:
    truth = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], (12, 1))
    always_first = [verdict([1] * N, [0] * N)] * 12
    claims, table = p43.judged(always_first, truth, truth[:, 2], PLAN)
    assert claims[0].measured.value == 0.0  # a place's favourite is a random candidate
    assert claims[1].verdict == "fails"
    cells = {str(row[0]): row[1] for row in table.rows}
    assert cells["verdicts by place in the list, first to last"] == "60, 0, 0, 0, 0"
    assert cells["replies that name a candidate"].value == 1.0
    truth += np.random.default_rng(0).normal(scale=0.1, size=truth.shape)
    wise = [verdict([0, 0, 0, 0, 5], [3, 1, 0, 2, 4])] * 12
    assert [c.verdict for c in p43.judged(wise, truth, truth[:, 2], PLAN)[0]] == ["holds"] * 2
    foolish = [verdict([5, 0, 0, 0, 0], [3, 1, 0, 2, 4])] * 12
    assert p43.judged(foolish, truth, truth[:, 2], PLAN)[0][0].verdict == "fails"
    mute = [verdict([0] * N, [-1] * N)] * 12  # the greedy one, the first, is taken; nobody judged
    claims, table = p43.judged(mute, truth, truth[:, 2], PLAN)
    assert (claims[0].measured.value, claims[1].verdict) == (0.0, "undecided")
    assert table.rows[1][1] == 12
    assert table.rows[3][1].value == pytest.approx(truth[:, 0].mean())


def test_a_real_judge_is_shown_every_order(stored: p43.Restored) -> None:
    class Second:
        def ask(self, messages: Any) -> str:
            return "[[2]]"

    report = Report(paper=43, scale="full", seed=0)
    plan = p43.Plan(100, 1, judged=3)
    judge: Any = Second()
    p43.add_judge(report, stored, judge, plan, 0)
    assert report.claims[0].measured.value == pytest.approx(0.0)  # type: ignore[union-attr]
    assert report.tables[0].rows[2][1] == "0, 15, 0, 0, 0"
