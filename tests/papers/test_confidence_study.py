"""Stated confidence, trained: the form, what a run measures, confidences afterwards, the claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import confidence_study as cs  # noqa: E402
from scoredraw.papers import stated_confidence as sc  # noqa: E402
from scoredraw.papers.policy_study import UNTRAINED  # noqa: E402
from scoredraw.papers.small_policy import LONGEST_PROMPT  # noqa: E402
from scoredraw.papers.studies import Record, run_key, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402
from scoredraw.rl.policy_training import open_policy  # noqa: E402
from scoredraw.rl.verbal_confidence import read_stated  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def settings(new_born: str) -> cs.Settings:
    """Runs of two steps of a policy of one layer that knows nothing."""
    return cs.Settings(
        families=("gcd",), model=new_born, steps=2, prompts=2, generations=4, max_tokens=4,
        spared=190, tested=3, samples=2, rates=(1e-3, 2e-3), seeds=3,
    )  # fmt: skip


# ── the form ────────────────────────────────────────────────────────────────────────────────────


def test_the_form_is_taught_by_own_answers_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10,800 confidences of ten levels: each within 5 errors of its share; 6 in 10⁶, one seed."""
    kept: dict[str, Any] = {}

    def fine_tuned(data: list[dict[str, str]], **options: Any) -> Path:
        kept.update(data=data, options=options)
        return Path("taught")

    def sample_answers(net: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        return [
            ("#7", "hm", "#", "#123456")[0 if len(prompts) > 4 else i]
            for i, _ in enumerate(prompts)
        ]

    monkeypatch.setattr(sc, "small_policy", lambda: (None, None))
    monkeypatch.setattr(sc, "fine_tuned", fine_tuned)
    monkeypatch.setattr(sc, "sample_answers", sample_answers)
    usual = cs.Settings()
    taught = cs.problems(usual)[0]
    assert cs.base_policy(usual) == "taught"
    assert kept["options"] == sc.TEACHING
    prompts = {row["prompt"] for row in taught}
    assert {row["prompt"] for row in kept["data"]} == prompts
    read = [read_stated(row["target"], sc.FORMAT) for row in kept["data"]]
    assert all(said.well_formed and said.answer == "7" for said in read)
    levels = np.unique([said.confidence for said in read], return_counts=True)
    np.testing.assert_allclose(levels[0], np.arange(10) / 10 + 0.05)
    share = len(read) / 10
    assert (np.abs(levels[1] - share) < 5 * np.sqrt(share)).all()
    longest = len(sc.stated("9" * sc.LONGEST, 9)) + 1  # and the end
    assert longest <= usual.max_tokens
    assert LONGEST_PROMPT + usual.max_tokens <= 256
    sc.taught_policy(taught[:2], steps=1)  # of four texts, one is an answer of some letters
    assert len(kept["data"]) == sc.DRAWS
    assert kept["options"] == {**sc.TEACHING, "steps": 1}


def test_what_is_said(settings: cs.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sc.stated("3", 7), sc.stated("4", 0), "<answer>5</answer>", "hm", sc.stated("6", 9)]
    rows = [{"prompt": "?", "answer": "3"}, *({"prompt": "?", "answer": "5"} for _ in range(4))]
    monkeypatch.setattr(sc, "sample_answers", lambda *_, **__: texts)
    own = sc.say(*open_policy(settings.model), rows, 0, 1, 64)
    assert own.right.tolist() == [1, 0, 1, 0, 0]  # also without the form
    assert own.confidence.tolist() == [0.75, 0.05, 0.5, 0.5, 0.95]
    assert own.formed.tolist() == [1, 1, 0, 0, 1]
    found = cs.measured(own)
    assert found["acc"] == pytest.approx(0.4)
    assert found["brier"] == pytest.approx((0.25**2 + 0.05**2 + 0.25 + 0.25 + 0.95**2) / 5)
    assert found["formed"] == pytest.approx(0.6)
    assert found["auroc"] == pytest.approx(3.5 / 6)
    assert "auroc" not in sc.calibrated(np.zeros(3), np.full(3, 0.4))
    score = 3 - 0.25**2 - 0.05**2 - 0.95**2
    half = cs.mean_reward(own, cs.method_of("rlcr"))  # form, right, 1 - (q - c)² of the formed
    assert half == pytest.approx(0.5 * (3 + 1 + score) / 5)
    assert cs.mean_reward(own, cs.method_of("rlvr")) == pytest.approx(0.5 * (3 + 1) / 5)
    assert cs.mean_reward(own, cs.method_of("alone")) == pytest.approx(0.5 * (3 + score) / 5)
    assert cs.mean_reward(own, cs.method_of("grpo")) == pytest.approx(2 / 5)
    assert half != cs.mean_reward(own, cs.method_of("spherical"))
    dotted = own._replace(texts=[sc.stated("0.3", 5)] * 5)
    assert cs.mean_reward(dotted, cs.method_of("rlvr")) == pytest.approx(0.5)  # form alone


# ── confidence afterwards ───────────────────────────────────────────────────────────────────────


def test_reading_again_is_reading_alone(settings: cs.Settings) -> None:
    net, tokenizer = open_policy(settings.model)
    texts = [sc.stated("36", 7), sc.stated("4", 9), "hm", "", "<answer></answer>"]
    rows = [{"prompt": "what is " + "2" * i} for i in range(5)]
    own = sc.Said(rows, texts, *(np.zeros(5) for _ in range(3)))
    chance, states = sc.read_again(net, tokenizer, own, batch=3)
    for i, (row, answer) in enumerate(zip(rows, ["36", "4"], strict=False)):
        before = row["prompt"] + f"#{answer}</think><answer>"
        ids = tokenizer(before + answer + "</answer>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = net(input_ids=ids, output_hidden_states=True)
        places = range(len(before), len(before) + len(answer))
        alone = [out.logits[0, t - 1].softmax(-1)[ids[0, t]].item() for t in places]
        assert chance[i] == pytest.approx(np.mean(alone), rel=1e-4)
        np.testing.assert_allclose(states[i], out.hidden_states[-1][0, -1].numpy(), atol=1e-4)
    assert chance[2:].tolist() == [0.5, 0.5, 0.5]  # no letters of an answer


def test_a_head_learns_what_the_states_tell() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(600, 8)).repeat(sc.FITTED, axis=0)
    p = 1 / (1 + np.exp(-1.5 * states[:, 0] + 0.5 * states[:, 1]))
    right = (rng.random(len(p)) < p).astype(float)
    of = sc.head_of(states[:800], right[:800])(states[800:])
    assert np.abs(of - p[800:]).mean() < 0.05
    noise = sc.head_of(states[:400], rng.permutation(right[:400]))(states[800:])
    assert noise.std() < 0.1 * of.std() + 0.05  # no more than there is to learn


def test_confidences_afterwards(settings: cs.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokenizer = open_policy(settings.model)
    rows = cs.problems(settings)[0][:10]
    asked = [row for row in rows for _ in range(sc.FITTED)]
    right = np.array([float(int(row["answer"]) == 1) for row in asked])
    texts = [sc.stated(row["answer"], 5) for row in asked]
    own = sc.Said(asked, texts, right, np.full(20, 0.5), np.ones(20))
    found = sc.confidence_afterwards(net, tokenizer, own, own)
    assert set(found) == set(cs.AFTERWARDS)
    assert all(q.shape == (20,) and ((q >= 0) & (q <= 1)).all() for q in found.values())
    np.testing.assert_allclose(found["constant"], right.mean())
    none = sc.confidence_afterwards(net, tokenizer, own, own._replace(right=np.zeros(20)))
    assert (none["head"] == 0).all()  # there is nothing to fit
    np.testing.assert_array_equal(none["chance"], found["chance"])


# ── runs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", list(cs.ARMS))
def test_a_run_is_whole(name: str, settings: cs.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = cs.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    assert steps == [(1, 2), (2, 2)]
    more = {"afterwards"} if name == "rlvr" else set()
    basic = {"acc", "brier", "ece", "mean_conf", "formed"}  # nothing is right: no AUROC
    assert set(record) == basic | {"reward", "seconds"} | more
    assert [record[k] for k in ("acc", "brier", "mean_conf", "formed")] == [0, 0.25, 0.5, 0]
    assert record["reward"] == 0
    if more:
        assert set(record["afterwards"]) == set(cs.AFTERWARDS)
        assert record["afterwards"]["constant"]["brier"] == 0


def test_the_same_call_gives_the_same_run(settings: cs.Settings) -> None:
    first, again = (cs.run_arm("rlvr", 1e-3, 0, True, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert "afterwards" not in first  # while tuning


def test_problems_do_not_overlap() -> None:
    parts = cs.problems(cs.Settings())
    assert [len(part) for part in parts] == [3 * 150, 3 * 50, 3 * 100]
    texts = [row["prompt"] for part in parts for row in part]
    assert len(set(texts)) == len(texts)


# ── the study ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int, bool]]:
    """Runs whose results are as the paper has them; the best rate is 2e-3."""
    runs: list[tuple[str, float, int, bool]] = []

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: cs.Settings,
    ) -> Record:  # fmt: skip
        runs.append((name, rate, seed, tuning))
        good = {"rlcr": 0.05, "spherical": 0.06, UNTRAINED: 0.4}.get(name, 0.35)
        right = {UNTRAINED: 0.4, "alone": 0.1}.get(name, 0.6)
        noise = 1e-3 * (seed % 3)
        record: Record = {
            "acc": right + noise, "brier": good + 0.1, "ece": good, "formed": 1.0,
            "auroc": 0.7 if name in {"rlcr", "spherical"} else 0.5, "mean_conf": 0.5,
        }  # fmt: skip
        if name != UNTRAINED:
            record |= {"reward": -abs(np.log2(rate / 2e-3)), "seconds": 1.0}
        if name == "rlvr" and not tuning:
            other = {key: record[key] for key in ("acc", "brier", "ece", "auroc", "mean_conf")}
            record["afterwards"] = dict.fromkeys(cs.AFTERWARDS, other)
        return record

    monkeypatch.setattr(cs, "run_arm", run_arm)
    return runs


def test_a_report(
    settings: cs.Settings, made_up: list[Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(paper=47, scale="study", seed=0)
    cs.add_confidence_study(report, 0, settings)
    assert len(made_up) == 3 + 5 * (3 + 3)  # a rate beyond the grid each
    assert {rate for _, rate, _, tuning in made_up if not tuning} == {0, 2e-3}
    assert len(report.claims) == len(cs.COMPARISONS) + len(cs.NEAR) + 2
    assert len({claim.name for claim in report.claims}) == len(report.claims)
    assert {claim.verdict for claim in report.claims} == {"holds"}
    (table,) = report.tables
    assert [row[0] for row in table.rows] == [*cs.TITLES.values(), *cs.AFTERWARDS.values()]
    assert [row[1] for row in table.rows] == [None] + [2e-3] * 8
    assert len(report.figures) == 2
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert (cache / "confidence-study.jsonl").is_file()
    cs.add_confidence_study(Report(paper=47, scale="study", seed=0), 0, settings)
    assert len(made_up) == 33  # all was known


def records_of(values: dict[str, tuple[float, float, float]]) -> list[Record]:
    """Of three seeds: accuracy, ECE and AUROC by arm, the rest of all arms as "others"."""
    found = []
    for arm in {**cs.TITLES, **cs.AFTERWARDS}:
        acc, ece, auroc = values.get(arm, values["others"])
        for seed in range(3):
            acc, ece = acc + 1e-3 * seed, ece + 1e-3 * seed
            own = {"acc": acc, "ece": ece, "brier": ece + 0.1, "auroc": auroc}
            found.append({"arm": arm, "part": "best", "seed": seed, "rate": 1e-3, **own})
    return found


@pytest.mark.parametrize("verdict", ["holds", "fails"])
def test_claims_can_fail(verdict: str, settings: cs.Settings) -> None:
    cases = {
        "holds": {"rlcr": (0.6, 0.1, 0.7), "spherical": (0.6, 0.1, 0.7), "alone": (0.1, 0.1, 0.5),
                  UNTRAINED: (0.4, 0.4, 0.5), "others": (0.6, 0.4, 0.5)},
        "fails": {"rlcr": (0.1, 0.6, 0.5), "spherical": (0.1, 0.6, 0.5), "alone": (0.6, 0.3, 0.5),
                  UNTRAINED: (0.5, 0.5, 0.5), "others": (0.4, 0.3, 0.7)},
    }  # fmt: skip
    plan = cs.plan_of(settings)
    plan = replace(plan, titles=plan.titles | cs.AFTERWARDS)
    found = cs.claims(plan, records_of(cases[verdict]))
    assert not {claim.name: claim.verdict for claim in found if claim.verdict != verdict}
    first = found[0].measured
    assert isinstance(first, Estimate)
    assert first.value == pytest.approx(0.2 if verdict == "holds" else -0.1)


def test_keys_know_the_weights_and_the_options(
    settings: cs.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        name: str = "rlcr", files: str = "a", tuning: bool = False, asked: Any = settings
    ) -> str:
        return run_key(name, 1e-3, 0, tuning, arms=cs.OPTIONS, settings=asked, files=files)

    keys = {key(), key("rlvr"), key(UNTRAINED), key(files="b"), key(tuning=True)}
    assert len(keys) == 5
    assert key(asked=replace(settings, seeds=9, rates=(1.0,))) == key()
    assert key(asked=replace(settings, steps=9)) != key()
    before = key()
    arm = cs.ARMS["rlcr"]
    monkeypatch.setitem(cs.OPTIONS, "rlcr", (arm.method, {**arm.options, "lam": 0.5}))
    assert key() != before


def test_refusals(settings: cs.Settings) -> None:
    with pytest.raises(InputError, match="name: got 'head', want one of untrained, grpo"):
        cs.run_arm("head", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got best, want some of untrained, grpo"):
        run_study(cs.plan_of(settings), arms=["rlcr", "best"])


def test_command_line(
    settings: cs.Settings, made_up: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cs, "Settings", lambda: settings)
    cs.main(["--arms", "rlcr", "--seeds", "1"])
    assert [name for name, *_ in made_up] == ["rlcr"] * 4
    assert capsys.readouterr().out == ""
