"""The comparison of penalties on a proxy: what runs measure, what is tuned, what is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import penalty_study as ps  # noqa: E402
from scoredraw.papers.small_policy import shipped_problems  # noqa: E402
from scoredraw.papers.studies import Record, run_key, run_study  # noqa: E402
from scoredraw.reports import Claim, Report  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> ps.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return ps.Settings(
        model=new_born, learning_rate=1e-2, steps=2, prompts=2, generations=4, max_tokens=4,
        spared=3, tested=3, samples=8, rates=(0.1, 0.2), shared=0.1, seeds=2,
    )  # fmt: skip


@pytest.fixture
def small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as right is what ends in a small letter: a quarter of random texts."""

    def right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [float(text[-1:].islower()) for text in completions]

    monkeypatch.setattr(ps, "right_answer", right)


Truth = Callable[[str, float], float]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, float]]:
    """Runs whose results are a formula, best at λ = 0.2; which were made, and each arm's quality.

    The proxy pays what is lost by truth: an arm of quality q has true reward 0.8 - (1 - q) / 2.
    """
    runs: list[Any] = []
    order = (ps.TRUE, ps.ROOT, ps.THEORY, ps.CHI2, ps.SEQUENCE, ps.TOKENS, ps.NONE)
    quality = {name: 1 - i / 10 for i, name in enumerate(order)} | {ps.NONE: 0.2}

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: ps.Settings,
    ) -> Record:  # fmt: skip
        runs.append((name, rate, seed, tuning))
        found = {"true": 0.6 + 0.001 * (seed % 7), "proxy": 0.6, "length": 9.0}
        if name == ps.UNTRAINED:
            return {**found, "r": 0.8, "proxy_sd": 0.5, "true_sd": 0.4}
        off = 0.1 * abs(np.log2(rate / 0.2)) if name in ps.TUNED else 0.0
        true = found["true"] + 0.2 - (1 - quality[name]) / 2 - off
        return found | {
            "true": true, "proxy": 1.0 - 0.2 * (quality[name] - off), "kl": 1.0, "log_chi2": 2.0,
            "coefficient": rate,
        }  # fmt: skip

    monkeypatch.setattr(ps, "run_arm", run_arm)
    return runs, quality


@pytest.mark.usefixtures("small_letters")
@pytest.mark.parametrize("name", list(ps.TITLES))
def test_a_run_is_complete(name: str, settings: ps.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = ps.run_arm(name, 0.1, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    if name == ps.UNTRAINED:
        assert set(record) == {"true", "proxy", "length", "r", "proxy_sd", "true_sd"}
        assert 0 < record["true"] < 1
        assert record["true_sd"] == pytest.approx(np.sqrt(record["true"] * (1 - record["true"])))
        assert -1 <= record["r"] <= 1
        return
    assert steps == [(1, 2), (2, 2)]
    assert set(record) == {
        "true", "proxy", "length", "kl", "log_chi2", "coefficient", "seconds",
    }  # fmt: skip
    assert record["kl"] != 0  # it went somewhere
    assert record["log_chi2"] >= record["kl"]  # Jensen, of the same samples
    if name == ps.THEORY:
        _, spared, _ = ps.study_problems(settings)
        base = ps.measured(settings.model, spared, 0, settings)
        want = base["proxy_sd"] * np.sqrt(1 / base["r"] ** 2 - 1)
        assert record["coefficient"] == pytest.approx(want)
    else:
        assert record["coefficient"] == 0.1


@pytest.mark.usefixtures("small_letters")
def test_the_same_call_gives_the_same_run(settings: ps.Settings) -> None:
    first, again = (ps.run_arm(ps.ROOT, 0.1, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.usefixtures("small_letters")
@pytest.mark.parametrize("name", [ps.TOKENS, ps.ROOT])
def test_a_strong_penalty_keeps_the_policy_nearer(name: str, settings: ps.Settings) -> None:
    longer = replace(settings, steps=5, prompts=4)
    weak, strong = (ps.run_arm(name, coef, 0, settings=longer)["kl"] for coef in (1e-6, 30.0))
    assert strong < weak


def test_the_proxy_pays_for_digits() -> None:
    proxy = ps.ProxyReward(0.25)
    texts = ["4-1=3\n#3", "4-1=33\n#33", "no", "#3"]
    found = proxy(["?"] * 4, texts, ["3"] * 4, ["4-1=3\n#3"] * 4)
    assert found == [1.0, 0.5, -1.0, 1 - 0.75]


def test_problems_do_not_overlap() -> None:
    taught, spared, tested = ps.study_problems(ps.Settings())
    assert [len(part) for part in (taught, spared, tested)] == [150, 50, 100]
    texts = [row["prompt"] for row in taught + spared + tested]
    assert len(set(texts)) == len(texts)
    assert {row["prompt"] for row in tested} == {
        row["prompt"] for row in shipped_problems("test", [ps.FAMILY])
    }


def test_strengths_are_tuned_and_nothing_is_paid_for_twice(
    settings: ps.Settings, made_up: tuple[list[Any], dict[str, float]], cache: Path
) -> None:
    runs, _ = made_up
    arms = [ps.UNTRAINED, ps.NONE, ps.ROOT]
    records = run_study(ps.plan_of(settings), 0, arms=arms)
    want = [(name, 0.0, seed, False) for name in arms[:2] for seed in range(2)]
    want += [(ps.ROOT, rate, 500, True) for rate in (0.1, 0.2, 0.4)]  # and beyond the end
    want += [(ps.ROOT, rate, seed, False) for rate in (0.2, 0.1) for seed in range(2)]
    assert runs == want
    assert len(Journal(cache / "penalty-study.jsonl").records()) == len(want)
    assert run_study(ps.plan_of(settings), 0, arms=arms) == records
    assert runs == want
    run_study(ps.plan_of(replace(settings, bonus=0.1)), 0, arms=[ps.NONE])
    assert len(runs) == len(want) + 2


def judged(report: Report, part: str) -> Claim:
    (claim,) = (c for c in report.claims if part in c.name)
    return claim


def test_reports(settings: ps.Settings, made_up: tuple[list[Any], dict[str, float]]) -> None:
    _, quality = made_up
    report = Report(paper=39, scale="study", seed=1)
    ps.add_penalty_study(report, 1, settings)
    assert len({claim.name for claim in report.claims}) == len(report.claims)
    assert len(report.claims) == len(ps.COMPARISONS) + 7
    assert (len(report.tables), len(report.figures)) == (2, 2)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    for c, claim in zip(ps.COMPARISONS, report.claims, strict=False):
        if c.measure != "true reward" or ps.UNTRAINED in (c.arm, c.other):
            continue
        assert isinstance(claim.measured, Estimate)
        gap = (quality[c.arm] - quality[c.other]) / 2
        assert claim.measured.value == pytest.approx(gap)
        assert claim.verdict == ("holds" if gap > 0 else "fails")
    hacked = judged(report, "true reward: proxy, no penalty - untrained")
    assert isinstance(hacked.measured, Estimate)
    assert hacked.measured.value == pytest.approx(-0.2)
    assert hacked.verdict == "holds"
    # true = 0.8 - (1 - q)/2 and proxy = 1 - q/5 lie on one line for all that are trained
    even = judged(report, "√χ² of answers - proxy, KL of answers, best λ, equal proxy")
    assert isinstance(even.measured, Estimate)
    low, high = (0.8 - (1 - q) / 2 for q in (quality[ps.SEQUENCE], 1.0))
    start = 1 - quality[ps.SEQUENCE] / 5  # the other's λ, the nearer to the untrained at 0.6, 0.6
    want = (
        0.8
        - (1 - quality[ps.ROOT]) / 2
        - np.interp(1 - quality[ps.ROOT] / 5, [0.6, start], [0.6, low])
    )
    assert low < high
    assert even.measured.value == pytest.approx(want)
    assert even.verdict == "holds"
    bound = judged(report, "its bound in deviations, least: proxy, no penalty")
    a = (1 - quality[ps.NONE] / 5 - 0.6) / 0.5
    slack = -0.2 / 0.4 - (0.8 * a - 0.6 * np.sqrt(np.expm1(2.0)))
    assert isinstance(bound.measured, Estimate)
    assert bound.measured.value == pytest.approx(slack)


def test_claims_can_fail(
    settings: ps.Settings, made_up: tuple[list[Any], dict[str, float]]
) -> None:
    _, quality = made_up
    quality.update({ps.ROOT: 0.1, ps.NONE: 1.0, ps.THEORY: 0.2})
    report = Report(paper=39, scale="study", seed=1)
    ps.add_penalty_study(report, 1, settings)
    for part in (
        "true reward: proxy, no penalty - untrained",
        "true reward: proxy, √χ² of answers - proxy, KL of answers, both at one rate",
        "true reward: proxy, √χ² at the theory's λ - untrained",
        "√χ² of answers - proxy, KL of answers, best λ, equal proxy",
    ):
        assert judged(report, part).verdict == "fails", part


def test_the_bound_is_seen_to_be_broken(settings: ps.Settings) -> None:
    base = {"arm": ps.UNTRAINED, "part": "best", "rate": 0.0, "true": 0.6, "proxy": 0.6}
    base |= {"r": 0.9, "proxy_sd": 0.5, "true_sd": 0.5}
    run = {"arm": ps.NONE, "part": "best", "rate": 0.0, "true": 0.3, "proxy": 1.1, "log_chi2": 0.1}
    records = [{**one, "seed": seed} for one in (base, run) for seed in range(3)]
    claim = ps.bound(ps.plan_of(settings), records)
    assert claim.verdict == "fails"  # so much gain by the proxy needs a larger χ²


def test_keys_know_what_decides(settings: ps.Settings) -> None:
    def key(name: str = ps.ROOT, files: str = "a", tuning: bool = False, **other: Any) -> str:
        return run_key(
            name, 0.1, 0, tuning, arms=ps.OPTIONS, settings=replace(settings, **other), files=files
        )

    keys = {key(), key(ps.CHI2), key(ps.THEORY), key(ps.TRUE), key(ps.UNTRAINED), key(files="b")}
    keys |= {key(tuning=True), key(bonus=0.1), key(learning_rate=1e-3)}
    assert len(keys) == 9
    assert key(seeds=5, rates=(1.0,), shared=2.0) == key()


@pytest.mark.usefixtures("small_letters")
def test_refusals(settings: ps.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="name: got 'ppo', want one of untrained, proxy"):
        ps.run_arm("ppo", 0.1, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got ppo, want some of untrained, proxy"):
        run_study(ps.plan_of(settings), 0, arms=["ppo"])
    monkeypatch.setattr(ps, "right_answer", lambda completions, answer: [0.0] * len(completions))
    with pytest.raises(InputError, match="true: got one that is constant under the reference"):
        ps.run_arm(ps.THEORY, 0.0, 0, settings=settings)


def test_command_line(
    settings: ps.Settings, made_up: tuple[list[Any], dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runs, _ = made_up
    ps.main(["--arms", f"{ps.TRUE},{ps.NONE}", "--seeds", "1"])
    assert runs == [(ps.TRUE, 0.0, 0, False), (ps.NONE, 0.0, 0, False)]
