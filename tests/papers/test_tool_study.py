"""Policies trained to call tools: what runs measure, and what is judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.papers import tool_study as ts  # noqa: E402
from scoredraw.papers.studies import Record, run_key, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402
from scoredraw.rl.policy_training import open_policy  # noqa: E402
from scoredraw.rl.rollout_tree import RolloutTree  # noqa: E402
from scoredraw.rl.tool_calls import parse_step  # noqa: E402
from scoredraw.rl.tool_policy import CLOSING  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> ts.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return ts.Settings(
        model=new_born, steps=2, prompts=2, generations=2, max_depth=2, max_tokens=3,
        max_length=64, spared=1, tested=2, samples=2, rates=(1e-3, 2e-3), seeds=2,
    )  # fmt: skip


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Runs whose results are those of a table, best at rate 2e-3."""
    results = {
        "untrained": {"right": 0.5, "calls": 1.6, "malformed calls": 0.2},
        "grpo": {"right": 0.6, "calls": 1.5, "malformed calls": 0.1},
        "portool": {"right": 0.7, "calls": 1.3, "malformed calls": 0.05},
        "unmerged": {"right": 0.55, "calls": 1.6, "malformed calls": 0.1},
        "fork_only": {"right": 0.65, "calls": 1.4, "malformed calls": 0.1},
        "trajectory_only": {"right": 0.75, "calls": 1.2, "malformed calls": 0.1},
        "no_decay": {"right": 0.6, "calls": 1.4, "malformed calls": 0.1},
        "tempo": {"right": 0.72, "calls": 1.3, "malformed calls": 0.1},
    }

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: ts.Settings,
    ) -> Record:  # fmt: skip
        found = dict.fromkeys(ts.MEASURES, 0.0) | results[name]
        return {**found, "right": found["right"] - abs(rate - 2e-3) + 0.001 * (seed % 7)}

    monkeypatch.setattr(ts, "run_arm", run_arm)
    return results


@pytest.mark.parametrize("name", ts.ARMS)
def test_a_run_is_measured(name: str, settings: ts.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = ts.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    assert steps == [(1, 2), (2, 2)]
    assert set(record) == {*ts.MEASURES, "seconds"} - {"calls where right"}  # nothing was right
    assert record["right"] == 0
    assert (record["calls"], record["malformed calls"], record["length"]) == (2, 1, 6)
    assert record["answers a batch"] == 4
    assert record["steps drawn a batch"] == 8


@pytest.mark.parametrize(
    ("name", "outcomes", "moves"),
    [("grpo", [1.0, 1.0], False), ("grpo", [1.0, -1.0], True), ("unmerged", [1.0, -1.0], True)],
)
def test_outcomes_move_the_weights(
    name: str, outcomes: list[float], moves: bool, settings: ts.Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only where the answers to a question differ."""

    class Given:
        __name__ = "outcome"

        def __call__(self, prompts: list[str], **_: Any) -> list[float]:
            return outcomes * (len(prompts) // 2)

    def moved(source: str, *_: Any) -> Record:
        return {"moved": float((weights(source) - weights(settings.model)).abs().max())}

    monkeypatch.setattr(ts, "OutcomeReward", Given)
    monkeypatch.setattr(ts, "measured", moved)
    record = ts.run_arm(name, 1e-2, 0, settings=replace(settings, steps=1))
    assert (record["moved"] > 1e-3) == moves
    assert moves or record["moved"] == 0


def weights(source: str) -> Any:
    net = open_policy(source)[0]
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


def test_the_same_call_gives_the_same_run(settings: ts.Settings) -> None:
    first, again = (ts.run_arm("portool", 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_tuning_measures_on_spared_questions(
    settings: ts.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def measured(source: str, rows: list[Any], *_: Any) -> Record:
        seen.append([row["prompt"] for row in rows])
        return {}

    monkeypatch.setattr(ts, "measured", measured)
    for tuning in (True, False):
        ts.run_arm(ts.UNTRAINED, 0.0, 0, tuning, settings=settings)
    _, spared, tested = ts.study_problems(settings)
    assert seen == [[row["prompt"] for row in part] for part in (spared, tested)]


def test_problems_do_not_overlap() -> None:
    parts = [
        [problem["prompt"] for problem, _ in ts.questions(part, n)]
        for part, n in {"shown": 1000, **{p: ts.CELLS[p] for p in list(ts.CELLS)[1:]}}.items()
    ]
    sets = [set(part) for part in parts]
    assert sum(len(part) for part in sets) == len(set.union(*sets))
    for part in parts[1:]:
        assert len(set(part)) == len(part)
    cells = [{text.rpartition("* ")[2] for text in part if " of " in text} for part in sets]
    assert [len(part) for part in cells] == list(ts.CELLS.values())
    assert sum(len(part) for part in cells) == len(set.union(*cells)) == 120
    taught, spared, tested = ts.study_problems(ts.Settings())
    assert [len(part) for part in (taught, spared, tested)] == [96, 48, 72]
    assert {row["family"] for row in tested} == set(ts.KINDS)


def test_dialogues_are_what_the_tools_say() -> None:
    made = ts.dialogues(300)
    with ts.tool_box() as tools:
        for row in made[::7]:
            rest, calls = row["target"], 0
            while "<answer>" not in rest[: rest.index("</think>") + 20]:
                call, closed, rest = rest.partition(CLOSING[0])
                told, _, rest = rest[1:].partition("\n")
                step = parse_step(call + closed, tools.tools)
                if step.name is None:
                    assert told == "error: no JSON"
                else:
                    assert tools.call(step.name, step.arguments or {}).text == told
                calls += 1
            answer = parse_step(rest, tools.tools)
            assert all(answer.passed)
            assert answer.answer == row["answer"]
            assert calls <= 3
    ways = {row["target"].count("<tool_call>") for row in made if row["family"] == "multiply"}
    assert ways == {0, 1, 2}
    assert any("no JSON" in row["target"] for row in made)


def test_words_of_calls_are_tokens_and_all_is_read_as_before(tmp_path: Path) -> None:
    ts.add_words(str(tmp_path))
    net, tokenizer = open_policy(str(tmp_path))
    old, letters = open_policy(str(ts.FOLDER))
    for row in ts.dialogues(30):
        text = row["prompt"] + row["target"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 100 < len(letters(text)["input_ids"]) or row["target"].count("}") == 0
    before, after = (x.get_input_embeddings().weight for x in (old, net))
    assert torch.equal(after[: len(before)], before)
    want = before[letters("Waist")["input_ids"]].mean(dim=0)
    assert torch.equal(after[tokenizer("Waist")["input_ids"]][0], want)
    with torch.no_grad():  # what letters come to, but for the softmax over more tokens
        seen = torch.tensor([letters("55+21=76\n#76")["input_ids"]])
        torch.testing.assert_close(net(seen).logits[..., : len(before)], old(seen).logits)


def test_what_is_counted() -> None:
    def turn(letters: int, answer: str | None, fine: bool = True, ok: bool = True) -> Any:
        step = SimpleNamespace(answer=answer, passed=(True, fine))
        return SimpleNamespace(ids=[0] * letters, step=step, result=SimpleNamespace(ok=ok))

    tree = RolloutTree()
    call = tree.add_step(None, turn(5, None))
    tree.finish(tree.add_step(call, turn(2, "4")), 1.0)
    broken = tree.add_step(call, turn(3, None, fine=False))
    tree.finish(tree.add_step(broken, turn(1, None, ok=False)), 0.0)
    tree.finish(tree.add_step(None, turn(4, "5")), -1.0)
    assert ts.counted(tree).tolist() == [[1, 1, 0, 7], [0, 3, 2, 9], [0, 0, 0, 4]]


def test_claims_can_fail(settings: ts.Settings, made_up: dict[str, dict[str, float]]) -> None:
    report = Report(paper=60, scale="study", seed=1)
    ts.add_tool_study(report, 1, settings)
    assert len(report.claims) == 1 + len(ts.COMPARISONS)
    verdicts = [claim.verdict for claim in report.claims]
    assert verdicts == [
        *["holds"] * 4, *["fails"] * 2, *["holds"] * 2, *["fails"] * 2,  # of PORTool's terms
        *["holds"] * 2, "fails", "holds",
    ]  # fmt: skip
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert [row[1] for row in report.tables[0].rows] == [None] + [2e-3] * len(ts.ARMS)
    made_up["untrained"]["right"] = 0.0
    again = Report(paper=60, scale="study", seed=2)
    ts.add_tool_study(again, 2, settings)
    assert again.claims[-1].verdict == "fails"


def test_keys_know_the_weights_and_the_options(settings: ts.Settings) -> None:
    def key(name: str = "portool", files: str = "a", tuning: bool = False, **other: Any) -> str:
        return run_key(
            name, 1e-3, 0, tuning, arms=ts.OPTIONS, settings=replace(settings, **other), files=files
        )

    names = {key(name) for name in ts.TITLES}
    assert len(names) == len(ts.TITLES)
    assert len({key(), key(files="b"), key(tuning=True), key(max_depth=3)}) == 4
    assert key() == key(seeds=9, rates=(1.0,))


def test_refusals(settings: ts.Settings) -> None:
    with pytest.raises(InputError, match="name: got 'nobody', want one of untrained, grpo"):
        ts.run_arm("nobody", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="tested: got 25, want 1 to 24 of each kind"):
        ts.study_problems(replace(settings, tested=25))
    with pytest.raises(InputError, match="arms: got pure, want some of untrained, grpo"):
        run_study(ts.plan_of(settings), 0, None, ["pure"])


def test_command_line(
    settings: ts.Settings, made_up: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ts, "Settings", lambda: settings)
    ts.main(["--arms", "grpo", "--seeds", "1"])
    runs = Journal(tmp_path / "cache" / "tool-study.jsonl").records()
    assert [run["rate"] for run in runs] == [1e-3, 2e-3, 4e-3, 2e-3]
