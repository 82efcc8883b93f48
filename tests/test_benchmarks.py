"""The benchmarks run end to end, and judge rightly, at a size that measures nothing.

`benchmarks` stands beside `src`, not in it: it is found from the root of the checkout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    *("leverage", "draw", "keys", "calibrate", "lewis", "sketched", "coverage", "scheduler"),
    *("selection", "influence", "transport", "rpc", "answers", "watermarks", "mbr"),
    *("decoding", "resampling", "first-hitting", "flow", "tree", "images", "schedulers"),
    *("advantages", "credit", "swarm"),
]


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("statsmodels", reason="a peer of the extra `dev`")
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("leverage", 3),
        ("draw", 2),
        ("keys", 2),
        ("calibrate", 6),
        ("lewis", 1),
        ("sketched", 6),
        ("coverage", 3),
        ("scheduler", 3),
        ("selection", 4),
        ("influence", 2),
        ("transport", 3),
        ("rpc", 2),
        ("answers", 7),
        ("watermarks", 3),
        ("mbr", 2),
        ("decoding", 1),
        ("resampling", 4),
        ("first-hitting", 2),
        ("flow", 4),
        ("tree", 2),
        ("images", 1),
        ("schedulers", 4),
        ("advantages", 4),
        ("credit", 7),
        ("swarm", 2),
    ],
)
def test_every_line_runs_and_both_sides_agree(name, count, tmp_path, capsys) -> None:
    from benchmarks.__main__ import main

    out = tmp_path / "benchmarks.json"
    lines = main([name, "--tiny", "--repeats", "1", "--out", str(out)])
    kept = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert len(lines) == len(kept["lines"]) == count
    assert kept["scale"] == "tiny"
    assert {"commit", "date", "cpu", "numpy", "scipy", "pyarrow", "blas"} <= set(
        kept["environment"]
    )
    for line, again in zip(lines, kept["lines"], strict=True):
        assert again["what"] == line.what
        assert 1 <= len(line.ours) <= 2
        assert min(line.ours) > 0
        assert line.ratio == pytest.approx(min(line.ours) / min(line.peers))
        assert line.verdict is None  # a tiny size proves nothing
    assert "against" in capsys.readouterr().out


def test_the_names_are_the_benchmarks() -> None:
    from benchmarks.__main__ import BENCHMARKS

    assert list(BENCHMARKS) == NAMES


def test_the_sides_take_turns_and_the_best_decides(monkeypatch) -> None:
    from benchmarks import contest

    turns: list[str] = []
    clock = iter([(3.0, 0.0), (2.0, 0.0), (5.0, 0.0), (1.0, 0.0), (1.5, 0.0), (9.0, 0.0)])

    def timed(function, least):
        turns.append(function())
        assert least == contest.TURN
        return next(clock)

    monkeypatch.setattr(contest, "_timed", timed)
    checked: list[tuple[str, str]] = []
    entry = contest.Contest(
        "w", "p", lambda: "ours", lambda: "peer", lambda *both: checked.append(both), 1.5
    )
    line = contest.run(entry, 3)
    assert checked == [("ours", "peer")]
    assert turns == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert line.ours == [3.0, 1.0, 1.5]
    assert line.peers == [2.0, 5.0, 9.0]
    assert (line.ratio, line.ratio_of_medians, line.verdict) == (0.5, 0.3, "holds")


@pytest.mark.parametrize(("at_most", "verdict"), [(0.4, "fails"), (0.6, "holds"), (None, None)])
def test_the_verdict_is_by_the_target(monkeypatch, at_most, verdict) -> None:
    from benchmarks import contest

    monkeypatch.setattr(contest, "_timed", lambda function, least: (function(), 0.0))
    entry = contest.Contest("w", "p", lambda: 1.0, lambda: 2.0, lambda a, b: None, at_most)
    assert contest.run(entry, 2).verdict == verdict
    assert contest.run(entry, 2, judged=False).verdict is None


def test_a_turn_is_as_many_calls_as_fill_it(monkeypatch) -> None:
    from benchmarks import contest

    now, calls = [0.0], []

    def work() -> None:
        calls.append(now[0])
        now[0] += 0.0625 * len(calls)

    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(contest.time, "process_time", lambda: now[0] / 2)
    assert contest._timed(work, 0.3125) == (0.125, 0.0625)
    assert len(calls) == 3
    calls.clear()
    assert contest._timed(work, 0.0) == (0.0625, 0.03125)
    assert len(calls) == 1


@pytest.mark.parametrize(("megabytes", "verdict"), [(699.0, "holds"), (701.0, "fails")])
def test_a_limit_is_judged_by_what_it_allows(megabytes, verdict) -> None:
    from benchmarks import contest

    line = contest.run(contest.Limit("memory", "MB", lambda: megabytes, 700.0), 2)
    assert line.verdict == verdict
    assert line.ratio == pytest.approx(megabytes / 700)


def test_a_wrong_answer_is_not_timed() -> None:
    from benchmarks.contest import Contest, run
    from benchmarks.matrices import _close

    entry = Contest("w", "p", lambda: [1.0], lambda: [2.0], _close, 1.0)
    with pytest.raises(AssertionError):
        run(entry, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "name: got 'speed', want one of leverage"),
        (["keys", "--repeats", "0"], "--repeats: got 0"),
        (["keys", "--out", "nowhere/at/all.json"], "--out: got nowhere/at/all.json"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments, message, capsys) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_level_of_sorted_scores_by_hand() -> None:
    import numpy as np
    from benchmarks.races import level_of_sorted

    assert level_of_sorted(np.array([1.0, 1.0, 2.0, 100.0]), 2) == 4.0
