"""The instructions' parts, the measures, and how the study judges; on made-up instructions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("sklearn")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.models import TransformersModel  # noqa: E402
from scoredraw.papers import relevance_study as rs  # noqa: E402
from scoredraw.papers.answered_questions import VARIABLE  # noqa: E402
from scoredraw.papers.policy_runs import opened  # noqa: E402
from scoredraw.papers.studies import Record, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402
from scoredraw.rl.relevance_reward import CONSTRAINED, OPEN  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache", "no_instructions")]

THINGS = ("bread", "rivers", "chess", "violins", "rain", "bees", "glass", "maps")
MEASURED = {
    "words", "exact words", "relevance", "to the reference", "shared words", "repetition", "copied",
    "surprise",
}  # fmt: skip
WANTED = ("Describe", "Give a reason for", "Name a book about")


def made_up() -> list[dict[str, str]]:
    """Two dozen instructions, one of them twice, one long and one too long."""
    rows = [
        {"input": f"{want}  {thing}.", "output": f"{thing.title()} are old and new.\nSo they say.",
         "qtype": CONSTRAINED if want == WANTED[2] else OPEN}
        for want in WANTED for thing in THINGS
    ]  # fmt: skip
    odd = [f"Describe {'long ' * 30}bread.", f"Describe {'long ' * 60}bread.", "Describe bread."]
    return rows + [{"input": text, "output": "No.", "qtype": OPEN} for text in odd]


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def settings(new_born: str, tmp_path_factory: pytest.TempPathFactory) -> rs.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    data = tmp_path_factory.mktemp("data") / "made_up.json"
    data.write_text(json.dumps(made_up()))
    return rs.Settings(
        data=str(data), model=new_born, steps=2, prompts=2, generations=4, max_tokens=24,
        taught=8, spared=3, tested=4, samples=3, rates=(1e-3, 2e-3, 4e-3), seeds=2,
    )  # fmt: skip


def test_instructions_are_dealt_out_once(settings: rs.Settings) -> None:
    parts = rs.instruction_rows(settings)
    assert [len(part) for part in parts] == [10, 8, 3, 4]
    assert parts[0][-1]["prompt"] == f"Describe {'long ' * 30}bread.\n"
    rows = [row for part in parts for row in part]
    texts = [row["prompt"] for row in rows if len(row["prompt"]) <= settings.asked]
    assert set(texts) == {f"{want} {thing}.\n" for want in WANTED for thing in THINGS}
    assert len(set(texts)) == len(texts)
    by_text = {row["prompt"]: row for row in rows}
    assert by_text["Describe bread.\n"]["reference"] == "No."  # of two, the last one
    chess = by_text["Name a book about chess.\n"]
    assert chess == {
        "prompt": "Name a book about chess.\n", "target": "Chess are old and new. So they say.",
        "reference": "Chess are old and new. So they say.", "qtype": CONSTRAINED,
        "kind": CONSTRAINED,
    }  # fmt: skip
    short = rs.instruction_rows(replace(settings, shown=12))
    targets = {row["prompt"]: row["target"] for part in short for row in part}
    assert targets["Name a book about chess.\n"] == "Chess are"


def test_measures_of_a_copy(settings: rs.Settings) -> None:
    question = "Give a reason for bees."
    texts = [question, "Bees are old.", "", "bees bees bees bees bees bees"]
    for reward in (rs.reward_of("relevance", settings), rs.judge_of_words(settings)):
        values = np.array(reward([question] * 4, texts), np.float64)
        assert values[0] == pytest.approx(1)
        assert 0 < values[1] < 1
        assert values[2] == 0
    parts = rs.reward_of("R_OE", settings).factors([question] * 4, texts)
    assert parts.repetition.tolist() == [1, 1, 1, 0.25]
    assert np.array(rs.reward_of("LI", settings)([question] * 4, texts)) == pytest.approx(
        [0.06, 0.04, 0, 0.06]
    )
    shares = [rs.copied(question, text) for text in texts]
    assert shares == pytest.approx([1, 3 / 23, 0, 5 / 23])
    R3 = rs.reward_of("R3", settings)
    columns = {"qtype": [OPEN, CONSTRAINED], "reference": ["x", question]}
    both = np.array(R3([question] * 2, [question] * 2, **columns), np.float64)
    assert both == pytest.approx([0.06, settings.max_tokens / 100])


def test_dealt_types_are_the_same_ones(settings: rs.Settings) -> None:
    rows = rs.instruction_rows(settings)[1]
    dealt = rs.with_dealt_types(rows)
    kinds, others = ([row["qtype"] for row in some] for some in (rows, dealt))
    assert kinds != others
    assert sorted(kinds) == sorted(others)
    assert rs.with_dealt_types(rows) == dealt
    assert [{**row, "qtype": ""} for row in dealt] == [{**row, "qtype": ""} for row in rows]


def test_surprise_is_a_token_of_all_texts(settings: rs.Settings) -> None:
    scorer = TransformersModel(*opened(settings.model))
    texts = ["bread", "", "a longer answer"]
    logp = np.concatenate([scorer.score("Why?\n", text) for text in texts if text])
    assert len(logp) == 20  # a token a letter
    found = rs.surprise(settings.model, ["Why?\n"] * 3, texts)
    assert found == pytest.approx(-logp.sum() / 20)


@pytest.mark.parametrize("name", list(rs.ARMS))
def test_a_run_is_complete(name: str, settings: rs.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = rs.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    assert steps == [(1, 2), (2, 2)]
    assert set(record) == {*MEASURED, "reward", "seconds"}
    assert 0 < record["words"] <= 24
    assert 0 < record["repetition"] <= 1
    assert 0 < record["copied"] < 0.5
    if name == "LI":
        assert 100 * record["reward"] == pytest.approx(record["words"])
    if name == "relevance":
        assert record["reward"] == pytest.approx(record["relevance"])


def test_arms_are_trained_as_they_say(
    settings: rs.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Asked(Exception):
        pass

    def trained(taught: Any, *_: Any, name: str, reward: Any, beta: float, **more: Any) -> Any:
        asked[name] = [row["qtype"] for row in taught], sorted(reward.off), beta
        raise Asked

    monkeypatch.setattr(rs, "trained", trained)
    for name in rs.ARMS:
        with pytest.raises(Asked):
            rs.run_arm(name, 1e-3, 0, settings=settings)
    own = [row["qtype"] for row in rs.instruction_rows(settings)[1]]
    dealt = [row["qtype"] for row in rs.with_dealt_types(rs.instruction_rows(settings)[1])]
    assert asked == {
        "R3": (own, [], 0), "relevance": (own, ["branching", "length", "repetition"], 0),
        "LI": (own, ["branching", "relevance", "repetition"], 0),
        "LI_RP": (own, ["branching", "relevance"], 0), "R_OE": (own, ["branching"], 0),
        "dealt": (dealt, [], 0), "KL": (own, [], 0.2),
    }  # fmt: skip


def test_the_same_call_gives_the_same_run(settings: rs.Settings) -> None:
    first, again = (rs.run_arm("R3", 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    bare = rs.run_arm(rs.UNTRAINED, 0.0, 0, settings=settings)
    assert set(bare) == MEASURED
    assert rs.run_arm("R3", 1e-3, 0, tuning=True, settings=settings)["words"] != first["words"]


@pytest.mark.parametrize("true", [True, False])
def test_claims_hold_and_fail(
    true: bool, settings: rs.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up runs that are as the paper has it, or the other way round."""
    ends: dict[str, Sequence[float]] = {  # words, relevance, RP, copied, exact ones, surprise
        rs.UNTRAINED: (5, 0.1, 0.99, 0.1, 5, 0.1, 1), "R3": (9, 0.3, 0.98, 0.2, 6, 0.3, 3),
        "LI": (12, 0.05, 0.2, 0.1, 12, 0.1, 4), "relevance": (6, 0.5, 0.9, 0.8, 6, 0.2, 3),
        "LI_RP": (10, 0.05, 0.9, 0.1, 10, 0.1, 4), "R_OE": (10, 0.3, 0.98, 0.2, 10, 0.2, 3),
        "dealt": (9, 0.3, 0.98, 0.2, 9, 0.2, 3), "KL": (7, 0.2, 0.98, 0.2, 6, 0.2, 2),
    }  # fmt: skip

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: rs.Settings,
    ) -> Record:  # fmt: skip
        sign = 1 if true else -1
        names = (
            "words", "relevance", "repetition", "copied", "exact words", "to the reference",
            "surprise",
        )  # fmt: skip
        found: Record = {k: sign * v for k, v in zip(names, ends[name], strict=True)}
        found["shared words"] = found["relevance"]
        return found | ({} if name == rs.UNTRAINED else {"reward": -abs(np.log2(rate / 2e-3))})

    monkeypatch.setattr(rs, "run_arm", run_arm)
    report = Report(paper=14, scale="study", seed=0)
    rs.add_relevance_study(report, 0, settings)
    assert len({claim.name for claim in report.claims}) == len(rs.COMPARISONS) + 2
    assert {claim.verdict for claim in report.claims} == {"holds" if true else "fails"}
    assert [row[1] for row in report.tables[0].rows] == [None, *[2e-3] * len(rs.ARMS)]
    assert len(report.figures) == 1
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(paper=14, scale="study", seed=0)
    rs.add_relevance_study(report, 0)
    assert not report.claims
    assert not report.tables
    assert report.notes == [
        "Left out, a language model trained by R³: SCOREDRAW_ALPACAFARM names no file."
    ]
    with pytest.raises(InputError, match="SCOREDRAW_ALPACAFARM: got nothing"):
        rs.main([])
    monkeypatch.setenv(VARIABLE, "instructions.json")
    assert rs.settings_of_environment() == rs.Settings(data="instructions.json")


def test_without_stories(
    settings: rs.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCOREDRAW_STORIES", str(tmp_path / "none"))
    report = Report(paper=14, scale="study", seed=0)
    rs.add_relevance_study(report, 0, replace(settings, model=rs.STORIES))
    assert not report.claims
    assert report.notes[0].startswith(f"{rs.LEFT_OUT}: stories15M is not there: npm pack")


def test_keys_and_refusals(settings: rs.Settings, tmp_path: Path) -> None:
    def key(name: str = "R3", tuning: bool = False, **changed: Any) -> str:
        return rs.plan_of(replace(settings, **changed)).key(name, 1e-3, 0, tuning)

    keys = [key(), key("LI"), key(tuning=True), key(max_tokens=9)]
    assert len(set(keys)) == len(keys)
    text = Path(settings.data).read_text()
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_text(text)
    other.write_text(text.replace("Bees", "Wasps"))
    assert key(seeds=9, rates=(1.0,), data=str(copy)) == key()
    assert key(data=str(other)) != key()
    with pytest.raises(InputError, match="name: got 'best', want one of untrained, R3"):
        rs.run_arm("best", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got best"):
        run_study(rs.plan_of(settings), arms=["best"])
    with pytest.raises(InputError, match="SCOREDRAW_ALPACAFARM: got 24 of them, want more than 26"):
        rs.instruction_rows(replace(settings, taught=19))
    with pytest.raises(InputError, match="cannot be read"):
        rs.instruction_rows(replace(settings, data="nowhere.json"))
