"""The biased scorer, what the policy is taught first, and how the study judges its arms."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.papers import win_rate_study as ws  # noqa: E402
from scoredraw.papers.small_policy import (  # noqa: E402
    score_lines,
    shipped_problems,
)
from scoredraw.papers.studies import Record, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> ws.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return ws.Settings(
        model=new_born, steps=2, prompts=2, generations=4, max_tokens=4, spared=2, tested=3,
        samples=2, rates=(1e-3, 2e-3, 4e-3), shared=1e-3, seeds=2,
    )  # fmt: skip


def test_the_score_pays_for_length_and_is_its_own() -> None:
    score = ws.BiasedScore(0.5, 0.005, 0.0)
    prompts, answers = ["2+2"] * 3, ["4"] * 3
    assert score(prompts, ["#4", "#4\nso\nso", "#5"], answers) == pytest.approx([0.51, 0.54, 0.01])
    noisy = ws.BiasedScore(0.5, 0.005, 0.01)
    texts = ["#4", "#4", "#5"]
    first, again, other = noisy(prompts, texts, answers)
    assert first == again  # a scorer that reads the same text says the same
    assert noisy(["2 + 2"], ["#4"], ["4"]) != [first]
    assert other != pytest.approx(0.01, abs=1e-6)
    z = np.array([ws.own_noise(str(i)) for i in range(4000)])
    # 5 standard errors: a false alarm in a million seeds
    assert abs(z.mean()) < 5 / np.sqrt(len(z))
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * len(z))


def test_what_is_taught_is_right_new_and_idle() -> None:
    rows = ws.idle_sums(2000)
    assert rows == ws.idle_sums(2000)
    assert rows != ws.idle_sums(2000, seed=1)
    targets, answers = ([row[key] for row in rows] for key in ("target", "answer"))
    assert ws.right(targets, answers) == [1.0] * len(rows)
    shipped = shipped_problems("train", ws.FAMILY)
    known = {row["prompt"] for row in shipped + shipped_problems("test", ws.FAMILY)}
    assert not known & {row["prompt"] for row in rows}
    shape = re.compile(re.escape(ws.ASKED).replace(r"\{\}", r"\d+( [+-] \d+){1,3}"))
    assert all(shape.fullmatch(prompt) for prompt in known | {row["prompt"] for row in rows})
    said = Counter(target.count(ws.IDLE) for target in targets)
    # a half, a quarter, ..: 5 standard errors, a false alarm in a million seeds
    for k in range(3):
        p = 0.5 ** (k + 1)
        assert abs(said[k] / len(rows) - p) < 5 * np.sqrt(p * (1 - p) / len(rows))
    assert max(said) <= ws.MOST_IDLE
    lines = [target.replace(ws.IDLE, "").partition("#")[0].split() for target in targets]
    prompts = [row["prompt"] for row in rows]
    assert {score for scores in score_lines(prompts, lines) for score in scores} == {1.0}
    assert max(len(target) for target in targets) <= ws.Settings().max_tokens


def test_parts_do_not_overlap() -> None:
    taught, spared, tested = ws.study_problems(ws.Settings())
    assert [len(part) for part in (taught, spared, tested)] == [150, 50, 100]
    texts = [row["prompt"] for row in taught + spared + tested]
    assert len(set(texts)) == len(texts)
    tests = {row["prompt"] for row in shipped_problems("test", ws.FAMILY)}
    assert {row["prompt"] for row in tested} <= tests


@pytest.mark.parametrize("name", list(ws.ARMS))
def test_a_run_is_complete(name: str, settings: ws.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = ws.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    assert steps == [(1, 2), (2, 2)]
    assert set(record) == {"right", "score", "length", "idle", "silent", "seconds"}
    assert record["right"] == 0
    assert 0 < record["length"] <= 4
    assert record["score"] == pytest.approx(0.005 * record["length"], abs=0.01)
    # four letters are no difference and nothing is right
    assert record["silent"] == (1 if name in {"win_rate", "truth"} else 0)


def test_the_same_call_gives_the_same_run(settings: ws.Settings) -> None:
    first, again = (ws.run_arm("grpo", 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    bare = [ws.run_arm(ws.UNTRAINED, 0.0, 3, settings=settings) for _ in range(2)]
    assert bare[0] == bare[1]
    assert set(bare[0]) == {"right", "score", "length", "idle"}
    spared = ws.run_arm("grpo", 1e-3, 0, tuning=True, settings=settings)
    assert spared["score"] != first["score"]


def test_the_floor_leaves_small_differences_small(settings: ws.Settings) -> None:
    class Sampled:
        reward = torch.tensor([0.10, 0.12, 0.60, 0.10])
        group_ids = torch.tensor([0, 0, 1, 1])

    maker = ws.floored(settings).advantage
    assert maker is not None
    found = maker(None)(Sampled()).tolist()
    assert found == pytest.approx([-0.1, 0.1, 0.5**0.5, -(0.5**0.5)], rel=1e-5)


@pytest.mark.parametrize("stable", [True, False])
def test_claims_hold_and_fail(
    stable: bool, settings: ws.Settings, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Made-up runs: score hacks and win rates do not, or the other way round."""
    order = ["grpo", "ranks", "dr_grpo", "floor", "win_rate", "truth"]

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: ws.Settings,
    ) -> Record:  # fmt: skip
        at = order.index(name) if name in order else 1.5
        sound = (at if stable else len(order) - at) / 10 - abs(np.log2((rate or 2e-3) / 2e-3)) / 100
        found = {"right": 0.4 + sound, "length": 40 - 30 * sound, "score": 1 - sound, "idle": 1.0}
        return found if name == ws.UNTRAINED else {**found, "silent": 0.1, "seconds": 1.0}

    monkeypatch.setattr(ws, "run_arm", run_arm)
    report = Report(paper=32, scale="study", seed=0)
    ws.add_win_rate_study(report, 0, settings)
    assert len({claim.name for claim in report.claims}) == len(ws.COMPARISONS)
    assert {claim.verdict for claim in report.claims} == {"holds" if stable else "fails"}
    assert [row[1] for row in report.tables[0].rows] == [None, *[2e-3] * len(ws.ARMS)]
    assert [row[1] for row in report.tables[1].rows] == [None, *[1e-3] * len(ws.ARMS)]
    assert len(report.figures) == 1
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert (cache / "win-rate-study.jsonl").is_file()


def test_keys_and_refusals(settings: ws.Settings) -> None:
    def key(name: str = "grpo", tuning: bool = False, **changed: Any) -> str:
        return ws.plan_of(replace(settings, **changed)).key(name, 1e-3, 0, tuning)

    keys = [key(), key("floor"), key(tuning=True), key(margin=0.2), key(letter=0.1)]
    assert len(set(keys)) == len(keys)
    assert key(seeds=9, rates=(1.0,)) == key()
    with pytest.raises(InputError, match="name: got 'best', want one of untrained, grpo"):
        ws.run_arm("best", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got best"):
        run_study(ws.plan_of(settings), arms=["best"])
