"""The comparison of swarms: what nodes share, what runs measure, what is tuned and judged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import swarm_study as ss  # noqa: E402
from scoredraw.papers.small_policy import shipped_problems  # noqa: E402
from scoredraw.papers.studies import Record, run_key, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> ss.Settings:
    """Two rounds of three nodes whose policy has one layer and knows nothing."""
    return ss.Settings(
        model=new_born, nodes=3, steps=2, generations=4, max_tokens=2, spared=2, tested=2,
        samples=2, rates=(1e-3, 2e-3), seeds=2,
    )  # fmt: skip


@pytest.fixture
def small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as right is what holds a small letter: nearly half of random texts."""

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(any(map(str.islower, text))) for text in completions]

    monkeypatch.setattr(ss, "right_answer", right)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, float]]:
    """Runs whose results are a formula, best at rate 2e-3; which were made, and what arms gain."""
    runs: list[Any] = []
    gain = {ss.EVEN: 0.4, ss.FEW: 0.3, ss.MOST: 0.2, ss.ALONE: 0.1, ss.UNIFORM: 0.15}

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: ss.Settings,
    ) -> Record:  # fmt: skip
        runs.append((name, rate, seed, tuning))
        base = 0.3 + 0.001 * (seed % 7)
        if name == ss.UNTRAINED:
            return {"reward": [base]}
        mean = base + gain[name] - 0.05 * abs(np.log2(rate / 2e-3))
        up = 0.2 if name == ss.MOST else 0.1
        curve = [mean, mean + up][: settings.steps]
        return {"reward": [mean - 0.1, mean + 0.1], "curve": curve, "used": 2.0, "silent": 0.0}

    monkeypatch.setattr(ss, "run_arm", run_arm)
    monkeypatch.setattr(ss, "base_policy", lambda settings: settings.model)
    return runs, gain


@pytest.mark.usefixtures("small_letters")
@pytest.mark.parametrize("name", list(ss.TITLES))
def test_a_run_is_complete(name: str, settings: ss.Settings) -> None:
    steps: list[tuple[int, int]] = []
    state = torch.random.get_rng_state()
    record = ss.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    if name == ss.UNTRAINED:
        assert record == {"reward": [0.0]}
        return
    assert steps == [(1, 2), (2, 2)]
    assert set(record) == {"reward", "curve", "used", "silent", "seconds"}
    assert len(record["reward"]) == 3
    assert len(record["curve"]) == 2
    assert all(0 < reward < 1 for reward in record["curve"])
    arm = ss.ARMS[name]
    external = settings.prompts - arm.local
    assert 0 <= record["used"] <= external
    assert (record["used"] > 0) == (external > 0)


@pytest.mark.usefixtures("small_letters")
def test_the_same_call_gives_the_same_run(settings: ss.Settings) -> None:
    first, again = (ss.run_arm(ss.EVEN, 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.usefixtures("small_letters")
def test_nodes_differ_and_alone_they_do_not_depend_on_each_other(settings: ss.Settings) -> None:
    taught, _, _ = ss.study_problems(settings)

    def trained(name: str, nodes: int) -> list[Any]:
        nets, _ = ss.swarm(ss.ARMS[name], 1e-2, 0, taught, replace(settings, nodes=nodes))
        return [torch.nn.utils.parameters_to_vector(net.parameters()) for net in nets]

    with torch.random.fork_rng(devices=[]):
        three, two = trained(ss.ALONE, 3), trained(ss.ALONE, 2)
        both = trained(ss.EVEN, 2)
    assert torch.equal(three[0], two[0])
    assert torch.equal(three[1], two[1])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(both[1], two[1])  # it heard of the other


def test_a_node_takes_the_families_in_turn(settings: ss.Settings) -> None:
    taught, _, _ = ss.study_problems(settings)
    family = {row["prompt"]: row["family"] for row in taught}

    class Silent:
        def answers(self, prompts: list[str], k: int) -> list[list[str]]:
            return [["#"] * k for _ in prompts]

    policy: Any = Silent()
    with torch.random.fork_rng(devices=[]):
        draws = [
            ss.written(policy, taught, 2, np.random.default_rng(seed), n)
            for seed in range(20) for n in (2, 6, 8)
        ]  # fmt: skip
    for groups in draws:
        counts = Counter(family[group.prompt] for group in groups)
        assert len({group.prompt for group in groups}) == len(groups)
        assert sum(counts.values()) == len(groups)
        assert max(counts.values()) - min(counts.get(f, 0) for f in settings.families) <= 1
    seen = {family[group.prompt] for groups in draws for group in groups if len(groups) == 2}
    assert seen == set(settings.families)


def test_problems_do_not_overlap() -> None:
    usual = ss.Settings()
    taught, spared, tested = ss.study_problems(usual)
    assert [len(part) for part in (taught, spared, tested)] == [3 * 180, 3 * 20, 3 * 50]
    texts = [row["prompt"] for row in taught + spared + tested]
    assert len(set(texts)) == len(texts)
    assert {row["prompt"] for row in tested} <= {
        row["prompt"] for row in shipped_problems("test", usual.families)
    }


def test_arms_have_batches_of_one_size() -> None:
    assert {arm.local for arm in ss.ARMS.values()} == {8, 6, 4, 2}


def test_rates_are_tuned_and_nothing_is_paid_for_twice(
    settings: ss.Settings, made_up: tuple[list[Any], dict[str, float]], cache: Path
) -> None:
    runs, _ = made_up
    arms = [ss.UNTRAINED, ss.EVEN]
    records = run_study(ss.plan_of(settings), 0, arms=arms)
    want = [(ss.UNTRAINED, 0.0, seed, False) for seed in range(2)]
    want += [(ss.EVEN, rate, 500, True) for rate in (1e-3, 2e-3, 4e-3)]  # and beyond the end
    want += [(ss.EVEN, 2e-3, seed, False) for seed in range(2)]
    assert runs == want
    assert len(Journal(cache / "swarm-study.jsonl").records()) == len(want)
    assert run_study(ss.plan_of(settings), 0, arms=arms) == records
    assert runs == want
    run_study(ss.plan_of(replace(settings, steps=1)), 0, arms=[ss.UNTRAINED])
    assert len(runs) == len(want) + 2


def test_reports(settings: ss.Settings, made_up: tuple[list[Any], dict[str, float]]) -> None:
    _, gain = made_up
    report = Report(paper=30, scale="study", seed=1)
    ss.add_swarm_study(report, 1, settings)
    assert len({claim.name for claim in report.claims}) == len(report.claims)
    assert (len(report.claims), len(report.tables), len(report.figures)) == (15, 1, 2)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert [claim.verdict for claim in report.claims] == ["holds"] * 15
    for c, claim in zip(ss.COMPARISONS, report.claims, strict=True):
        assert isinstance(claim.measured, Estimate)
        want = gain[c.arm] - gain.get(c.other, 0.0)
        if c.measure == "reward over rounds" and ss.MOST in (c.arm, c.other):
            want += 0.05  # half of what its curve is steeper
        assert claim.measured.value == pytest.approx(want)


def test_oscillation_is_about_the_trend() -> None:
    assert ss.oscillation({"curve": [0.0, 0.1, 0.0, 0.1]}) == pytest.approx(0.1 / np.sqrt(2))


def test_claims_can_fail(
    settings: ss.Settings, made_up: tuple[list[Any], dict[str, float]]
) -> None:
    _, gain = made_up
    gain.update({ss.EVEN: 0.0, ss.UNIFORM: 0.05, ss.FEW: 0.06, ss.ALONE: 0.2})
    report = Report(paper=30, scale="study", seed=1)
    ss.add_swarm_study(report, 1, settings)
    failed = [
        c for c, claim in zip(ss.COMPARISONS, report.claims, strict=True)
        if claim.verdict == "fails"
    ]  # fmt: skip
    assert {c.arm for c in failed} == {ss.EVEN, ss.MOST, ss.FEW, ss.UNIFORM}


def test_keys_know_what_decides(settings: ss.Settings) -> None:
    def key(name: str = ss.EVEN, files: str = "a", tuning: bool = False, **other: Any) -> str:
        return run_key(
            name, 1e-3, 0, tuning, arms=ss.OPTIONS, settings=replace(settings, **other), files=files
        )

    keys = {key(), key(ss.UNIFORM), key(ss.MOST), key(ss.UNTRAINED), key(files="b")}
    keys |= {key(tuning=True), key(steps=5), key(minibatch=2)}
    assert len(keys) == 8
    assert key(seeds=5, rates=(1.0,)) == key()


def test_refusals(settings: ss.Settings) -> None:
    with pytest.raises(InputError, match="name: got '1/7', want one of untrained, 8/0"):
        ss.run_arm("1/7", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got 1/7, want some of untrained, 8/0"):
        run_study(ss.plan_of(settings), 0, arms=["1/7"])


def test_command_line(made_up: tuple[list[Any], dict[str, float]]) -> None:
    runs, _ = made_up
    ss.main(["--arms", ss.UNTRAINED, "--seeds", "1"])
    assert runs == [(ss.UNTRAINED, 0.0, 0, False)]
