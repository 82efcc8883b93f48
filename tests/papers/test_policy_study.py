"""The comparison of trained policies: what runs measure, what is paid for once, what is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import policy_study as ps  # noqa: E402
from scoredraw.papers.policy_runs import files_of  # noqa: E402
from scoredraw.papers.small_policy import shipped_problems  # noqa: E402
from scoredraw.papers.studies import Comparison, Record, run_key, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402


def study(rng: int, settings: ps.Settings, *how: Any, **options: Any) -> list[Record]:
    return run_study(ps.plan_of(settings), rng, *how, **options)


pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> ps.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return ps.Settings(
        model=new_born, steps=2, prompts=2, generations=4, max_tokens=4, spared=2, tested=3,
        samples=8, rates=(1e-3, 2e-3), shared=1e-3, seeds=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def columns(settings: ps.Settings) -> ps.ColumnSettings:
    """The same with sums of three digits."""
    return ps.ColumnSettings(**{**asdict(settings), "families": ("column_sum",)})


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int, bool]]:
    """Runs whose results are a formula, best at rate 2e-3; the list of those that were made."""
    runs: list[tuple[str, float, int, bool]] = []
    real = ps.run_arm

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: ps.Settings,
    ) -> Record:  # fmt: skip
        if name == ps.UNTRAINED:
            return real(name, rate, seed, settings=settings)
        runs.append((name, rate, seed, tuning))
        right = (
            0.5
            - 0.1 * abs(np.log2(rate / 2e-3))
            + 0.01 * list(ps.ARMS).index(name)
            + 0.001 * (seed % 7)
        )
        passed = {family: {"1": right, "8": right + 0.1} for family in settings.families}
        silent = 0.2 if name == "ngrpo" else 0.4
        if tell is not None:
            tell(2, 2)
        logged: dict[str, Record] = {"tempo": {"branches": 0.3}, "dapo": {"batches": 5}}
        more = logged.get(name, {})
        return {"passed": passed, "silent": silent, "entropy": right, "length": 20 * right} | more

    monkeypatch.setattr(ps, "run_arm", run_arm)
    return runs


@pytest.mark.parametrize(
    "name", ["grpo", "grpo_twice", "ngrpo", "dapo", "dapo_half", "tempo", "pure", "pure_outcome",
             "pure_sum"]
)  # fmt: skip
def test_a_run_is_measured_on_what_it_was_not_trained_on(name: str, settings: ps.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = ps.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    half = name == "dapo_half"
    assert steps == ([(1, 1)] if half else [(1, 2), (2, 2)])  # batches, gone over twice or not
    more = {"tempo": {"branches"}, "dapo": {"batches"}, "dapo_half": {"batches"}}.get(name, set())
    assert set(record) == {"passed", "silent", "entropy", "length", "seconds"} | more
    assert 0 <= record.get("branches", 0) <= 1
    assert set(record["passed"]) == {"chain_sum"}
    assert list(record["passed"]["chain_sum"]) == ["1", "2", "4", "8"]
    assert 1 <= record["length"] <= 4
    even = 0.0 if "batches" in record else np.log(99)  # a guess of 99 tokens, or none is left
    assert record["entropy"] == pytest.approx(even, rel=0.05)
    if name in {"grpo", "grpo_twice", "dapo", "tempo"}:  # nothing is right: no group teaches
        assert record["silent"] == 1
    if "batches" in record:  # so that all are tried
        assert record["batches"] == 10 * len(steps)
    if name == "ngrpo":  # and here all have
        assert record["silent"] == 0


def test_problems_do_not_overlap(settings: ps.Settings) -> None:
    families = ("chain_sum", "simple_equations", "gcd", "count_bits")
    mix = ps.Settings(families=families, spared=20, tested=30)
    taught, spared, tested = mix.parts()
    assert [len(part) for part in (taught, spared, tested)] == [4 * 180, 4 * 20, 4 * 30]
    texts = [row["prompt"] for row in taught + spared + tested]
    assert len(set(texts)) == len(texts)
    assert {row["family"] for row in spared} == set(mix.families)
    assert {row["prompt"] for row in tested} <= {
        row["prompt"] for row in shipped_problems("test", mix.families)
    }


def test_sums_of_three_digits_start_from_a_policy_of_their_own(
    columns: ps.ColumnSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which SFT made, of problems that are neither trained on nor measured by."""
    shown: list[Any] = []
    monkeypatch.setattr(ps, "fine_tuned", lambda rows, **_: shown.extend(rows) or Path("made"))
    assert ps.ColumnSettings().base() == "made"
    assert columns.base() == columns.model
    parts = columns.parts()
    assert [len(part) for part in parts] == [300 - 5, 2, 3]
    asked = [row["prompt"] for part in (shown, *parts) for row in part]
    assert len(set(asked)) == len(asked) > 19_000
    assert {row["family"] for row in parts[2]} == {"column_sum"}
    record = ps.run_arm("ngrpo", 1e-3, 0, settings=columns)
    assert set(record["passed"]) == {"column_sum"}
    assert not {"pure", "dapo_once", "psr"} & set(ps.fitting(columns))


@pytest.mark.parametrize(("paper", "claims"), [(27, 13), (29, 4)])
def test_reports_of_what_a_task_has(
    paper: int, claims: int, columns: ps.ColumnSettings, made_up: list[Any]
) -> None:
    """Only arms that it runs; and nothing where it lacks the paper's own."""
    report = Report(paper=paper, scale="study", seed=1)
    ps.add_policy_study(report, paper, 1, {"three digits": columns})
    assert len(report.claims) == claims
    assert not any("not refilled" in claim.name for claim in report.claims)
    arms = [arm for arm in ps.OF_PAPER[paper] if arm in ps.fitting(columns)]
    for table in report.tables:
        assert [row[0] for row in table.rows] == [ps.TITLES[arm] for arm in (ps.UNTRAINED, *arms)]
    nothing = Report(paper=48, scale="study", seed=1)
    ps.add_policy_study(nothing, 48, 1, {"three digits": columns})
    assert not nothing.claims


def test_the_same_call_gives_the_same_run(settings: ps.Settings) -> None:
    first, again = (ps.run_arm("grpo", 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_a_study_tunes_and_pays_for_nothing_twice(
    settings: ps.Settings, made_up: list[Any], cache: Path
) -> None:
    told: list[str] = []
    arms = [ps.UNTRAINED, "grpo", "pure"]
    records = study(0, settings, lambda said, *_: told.append(said), arms)
    want = [
        (arm, rate, seed, seed == 500) for arm in arms[1:]
        for rate, seed in [
            (1e-3, 500), (2e-3, 500), (4e-3, 500),  # the grid, and beyond its end
            (2e-3, 0), (2e-3, 1), (1e-3, 0), (1e-3, 1),
        ]
    ]  # fmt: skip
    assert made_up == want
    assert told[0] == "GRPO (TRL's), rate 0.001, seed 500"
    assert len(told) == len(want)
    assert [r["part"] for r in records if r["arm"] == "pure"] == [
        "tuning", "tuning", "tuning", "best", "best", "shared", "shared",
    ]  # fmt: skip
    journal = Journal(cache / "policy-study.jsonl")
    assert len(journal.records()) == 2 + len(want)
    assert study(0, settings, arms=arms) == records
    assert made_up == want  # all was known
    study(0, replace(settings, seeds=3, rates=(1e-3, 2e-3, 4e-3)), arms=arms)
    assert made_up[len(want) :] == [
        (arm, rate, 2, False) for arm in arms[1:] for rate in (2e-3, 1e-3)
    ]  # fmt: skip
    del made_up[:]
    study(0, replace(settings, steps=3), arms=["grpo"])
    assert len(made_up) == 7  # another run altogether
    path = journal.path
    path.write_bytes(path.read_bytes()[:-20])  # killed as it wrote
    study(0, replace(settings, steps=3), arms=["grpo"])
    assert len(made_up) == 8


def test_processes_make_the_same_records(settings: ps.Settings, cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    alone = study(0, settings, arms=[ps.UNTRAINED])
    (cache / "policy-study.jsonl").unlink()
    both = study(0, settings, lambda *of: told.append(of), [ps.UNTRAINED], workers=2)
    assert both == alone
    assert sorted(told) == [("untrained, seed 0", 2, 2), ("untrained, seed 1", 2, 2)]
    assert len(Journal(cache / "policy-study.jsonl").records()) == 2


@pytest.mark.parametrize(
    ("rates", "tried"),
    [
        ((1e-3, 2e-3, 4e-3), []),
        ((2e-3, 4e-3), [1e-3]),
        ((8e-3, 16e-3), [4e-3, 2e-3]),  # and no further
        ((5e-4,), [1e-3, 2e-3]),
    ],
)
def test_tuning_goes_beyond_the_grid(
    rates: tuple[float, ...], tried: list[float], settings: ps.Settings, made_up: list[Any]
) -> None:
    asked = replace(settings, rates=rates)
    records = study(0, asked, arms=["grpo"])
    tuned = [r["rate"] for r in records if r["part"] == "tuning"]
    assert [rate for _, rate, seed, _ in made_up if seed == 500] == [*rates, *tried]
    assert tuned == sorted([*rates, *tried])
    assert {r["rate"] for r in records if r["part"] == "best"} == {2e-3}
    for part in ("best", "shared"):
        note = ps.results(part, "sums", asked, ["grpo"], records).note
        last = part == "best" and 2e-3 in {tuned[0], tuned[-1]}
        assert ("The best of all rates tried was the last one: GRPO (TRL's)." in note) == last


def test_keys_know_the_weights_and_the_options(
    settings: ps.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(name: str = "pure", files: str = "a", tuning: bool = False) -> str:
        return run_key(name, 1e-3, 0, tuning, arms=ps.OPTIONS, settings=settings, files=files)

    keys = {
        key(),
        key("pure_sum"),
        key("grpo"),
        key(ps.UNTRAINED),
        key(files="b"),
        key(tuning=True),
    }
    assert len(keys) == 6
    before = key()
    monkeypatch.setitem(ps.OPTIONS, "pure", ("pure", {"temperature": 1.0}, True))
    assert key() != before
    assert files_of(settings.model) != files_of("embedded")


@pytest.mark.parametrize(("paper", "claims", "tasks"), [(27, 19, 2), (29, 4, 2), (48, 6, 1)])
def test_reports(
    paper: int, claims: int, tasks: int, settings: ps.Settings, made_up: list[Any]
) -> None:
    report = Report(paper=paper, scale="study", seed=1)
    mix = replace(settings, families=("chain_sum", "gcd"))
    ps.add_policy_study(report, paper, 1, {"sums": settings, "mix": mix})
    assert len(report.claims) == claims * tasks
    assert len({claim.name for claim in report.claims}) == claims * tasks
    assert len(report.tables) == 2 * tasks
    assert len(report.figures) == tasks
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    order, arms = list(ps.ARMS), ps.OF_PAPER[paper]
    for c, claim in zip(ps.COMPARISONS[paper], report.claims, strict=False):
        if c.other == ps.UNTRAINED or c.measure == "silent groups":
            continue
        scale = 20 if c.measure == "length" else 1  # the formula of the results
        gap = scale * 0.01 * (order.index(c.arm) - order.index(c.other))
        assert isinstance(claim.measured, Estimate)
        assert claim.measured.value == pytest.approx(gap)
        assert claim.verdict == ("holds" if gap > 0 else "fails")
    if paper == 27:
        silent = next(c for c in report.claims if "silent groups" in c.name)
        assert isinstance(silent.measured, Estimate)
        assert silent.measured.value == pytest.approx(-0.2)
        assert silent.verdict == "holds"
    rates: Sequence[Any] = [[row[1] for row in table.rows] for table in report.tables[:2]]
    assert rates == [[None, *[2e-3] * len(arms)], [None, *[1e-3] * len(arms)]]
    steps = {row[0]: row[2] for row in report.tables[0].rows}
    twice = {ps.TITLES[arm] for arm in arms if arm.startswith(("ngrpo", "dapo", "grpo_twice"))}
    assert steps == {ps.TITLES[arm]: 1 + (ps.TITLES[arm] in twice) for arm in arms} | {
        "untrained": None
    }
    if paper == 27:
        sampled = {row[0]: row[3] for row in report.tables[0].rows}
        assert (sampled["DAPO"], sampled["DAPO, half the steps"]) == (5 * 8, 1 * 8)
        assert sampled["GRPO (TRL's)"] == 2 * 8


def test_equal_counts_decide_nothing() -> None:
    same = Comparison("grpo", "ngrpo", "pass@1", "?")
    records: list[Record] = [
        {"arm": arm, "part": "best", "seed": seed, "rate": 1e-3, "passed": {"a": {"1": 0.5 + seed}}}
        for arm in ("grpo", "ngrpo") for seed in range(3)
    ]  # fmt: skip
    plan = ps.plan_of(ps.Settings())
    assert same.claim("here", plan, records).verdict == "undecided"
    records[0]["passed"]["a"]["1"] += 0.01
    records[1]["passed"]["a"]["1"] += 0.01
    records[2]["passed"]["a"]["1"] += 0.0101
    assert same.claim("here", plan, records).verdict == "holds"


def test_refusals(settings: ps.Settings) -> None:
    gcd = replace(settings, families=("gcd",))
    with pytest.raises(InputError, match="name: got 'pure', want one of untrained, grpo"):
        ps.run_arm("pure", 1e-3, 0, settings=gcd)
    with pytest.raises(InputError, match="arms: got pure, best, want some of untrained, grpo"):
        study(0, gcd, arms=["pure", "grpo", "best"])
    with pytest.raises(InputError, match="paper: got 2, want one of 27, 29, 48"):
        ps.add_policy_study(Report(paper=2, scale="study", seed=0), 2, 0)


def test_command_line(
    settings: ps.Settings, made_up: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mix = replace(settings, families=("gcd",))
    monkeypatch.setattr(ps, "TASKS", {"sums": settings, "mix": mix})
    ps.main(["--arms", "grpo,pure", "--seeds", "1"])
    assert [name for name, *_ in made_up] == ["grpo"] * 5 + ["pure"] * 5 + ["grpo"] * 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 15
