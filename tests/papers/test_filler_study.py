"""Process rewards that like lines which say nothing: what is taught, measured and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.papers import filler_study as fs  # noqa: E402
from scoredraw.papers.column_sums import APART, additions  # noqa: E402
from scoredraw.papers.small_policy import shipped_problems  # noqa: E402
from scoredraw.papers.studies import Record  # noqa: E402
from scoredraw.reports import Report  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> fs.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return fs.Settings(
        model=new_born, steps=2, prompts=2, generations=4, max_tokens=6, spared=3, tested=3,
        samples=2, rates=(1e-3, 2e-3), seeds=2,
    )  # fmt: skip


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Runs whose right answers and filler lines are those of a table, best at rate 2e-3."""
    results = {
        "untrained": (0.6, 0.8), "grpo": (0.7, 0.7), "softmin": (0.72, 0.5),
        "softmin_outcome": (0.75, 0.4), "sum": (0.3, 9.0), "sum_outcome": (0.5, 5.0),
    }  # fmt: skip

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: fs.Settings,
    ) -> Record:  # fmt: skip
        right, lines = results[name]
        worse = 0 if name == "untrained" else abs(rate - 2e-3)
        found = dict.fromkeys(fs.MEASURES, 0.0)
        return found | {"right": right - worse + 0.001 * (seed % 7), "filler lines": lines - seed}

    monkeypatch.setattr(fs, "run_arm", run_arm)
    return results


@pytest.mark.parametrize("name", fs.TITLES)
def test_a_run_is_measured(name: str, settings: fs.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = fs.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    trained = name != fs.UNTRAINED
    assert steps == [(1, 2), (2, 2)] * trained
    assert set(record) == {*fs.MEASURES, *["seconds"] * trained}
    assert (record["right"], record["filler lines"]) == (0, 0)
    assert record["sum of scores"] <= record["lowest score"] < 0


def test_the_sum_pays_for_filler_and_the_minimum_does_not() -> None:
    """Card 48: a step that scores at least the least so far raises any sum, and no minimum."""
    plain, padded = ["4-1=3", "3+2=5", "#5"], ["4-1=3", "hm", "hm", "3+2=5", "hm", "#5"]
    short, long = fs.flawed_scores(["?"] * 2, [plain, padded], ["5"] * 2)
    assert sum(long) > sum(short) + 2
    assert min(long) == min(short) == fs.WORK
    wrong, cut = fs.flawed_scores(["?"] * 2, [["4-1=2", "#2"], ["4-1=3", "3+"]], ["3", "5"])
    assert (wrong, cut) == ([-0.9, -0.9], [0.4, -0.5])


def test_columns_are_due_in_their_order() -> None:
    (row,) = [row for row in additions(2000) if row["answer"] == "1000"][:1]
    lines = row["target"].splitlines()
    a, b = (int(word) for word in row["prompt"].split() if word.isdigit())
    assert a + b == 1000
    assert [int(line[0]) for line in lines[:3]] == [a % 10, a // 10 % 10, a // 100]
    first, second, third, end = lines

    def scores(*said: str) -> list[float]:
        settings = fs.ColumnSettings()
        return fs.flawed_scores([row["prompt"]], [said], ["1000"], settings)[0]

    assert scores(*lines) == [0.4, 0.4, 0.4, 0.9]
    assert scores(first, "hm", second, "0+0=0", third, end) == [0.4, 0.8, 0.4, -0.9, 0.4, 0.9]
    assert scores(second, first) == [-0.9, 0.4]  # too early, as "0+0=0" is
    assert scores(first, first) == [0.4, -0.9]
    assert scores(end) == [0.9]
    assert scores("#1") == [-0.9]


def test_no_problem_is_in_two_parts() -> None:
    settings = fs.ColumnSettings()
    taught, spared, tested = settings.parts()
    shown, _ = settings.shown()
    assert (len(spared), len(tested)) == (settings.spared, settings.tested)
    prompts = [row["prompt"] for rows in (taught, spared, tested, shown) for row in rows]
    assert len(set(prompts)) == len(prompts) > 19_000
    assert len(taught) == APART - settings.spared - settings.tested
    assert max(len(row["target"]) for row in fs.filled(shown)) <= settings.max_tokens


@pytest.mark.parametrize("name", ["softmin", "sum_outcome"])
def test_columns_are_learnt_by_their_own_scores(name: str, settings: fs.Settings) -> None:
    options = {k: getattr(settings, k) for k in ("model", "steps", "prompts", "generations")}
    record = fs.run_arm(name, 1e-3, 0, settings=fs.ColumnSettings(
        **options, max_tokens=6, spared=3, tested=3, samples=2,
    ))  # fmt: skip
    assert set(record) == {*fs.MEASURES, "seconds"}


def test_what_sft_shows_is_filled_now_and_then() -> None:
    rows = shipped_problems("train", [fs.FAMILY])
    made = fs.filled(rows)
    lines = [line for row in made for line in row["target"].splitlines()]
    share = lines.count(fs.FILLER) / (len(lines) - lines.count(fs.FILLER))
    assert share == pytest.approx(fs.SELDOM, abs=0.06)
    assert [row["target"].replace("hm\n", "") for row in made] == [row["target"] for row in rows]
    assert made == fs.filled(rows)
    assert made != fs.filled(rows, seed=1)
    assert max(len(row["target"]) for row in made) <= fs.Settings().max_tokens


def test_claims_can_fail(settings: fs.Settings, made_up: dict[str, tuple[float, float]]) -> None:
    report = Report(paper=48, scale="study", seed=1)
    fs.add_filler_study(report, 1, {"sums": settings})
    assert [claim.verdict for claim in report.claims] == ["holds"] * len(fs.COMPARISONS)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    made_up["sum"] = (0.8, 0.1)
    again = Report(paper=48, scale="study", seed=2)
    fs.add_filler_study(again, 2, {"sums": settings})
    failed = {
        claim.name.partition("sums, ")[2] for claim in again.claims if claim.verdict == "fails"
    }
    assert failed == {
        "fillers liked, right: sum - untrained",
        "fillers liked, filler lines: sum - untrained",
        "fillers liked, right: softmin - sum",
        "fillers liked, filler lines: softmin - sum",
    }


def test_refusals(settings: fs.Settings) -> None:
    with pytest.raises(InputError, match="name: got 'nobody', want one of untrained, grpo"):
        fs.run_arm("nobody", 1e-3, 0, settings=settings)


def test_command_line(
    settings: fs.Settings, made_up: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fs, "TASKS", {"sums": settings})
    fs.main(["--arms", "grpo", "--seeds", "1"])
    runs = Journal(tmp_path / "cache" / "filler-study.jsonl").records()
    assert [run["rate"] for run in runs] == [1e-3, 2e-3, 4e-3, 2e-3]
