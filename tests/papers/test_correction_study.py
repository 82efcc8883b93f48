"""The comparison of policies that learn to correct themselves: what runs do, and what is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import correction_study as cs  # noqa: E402
from scoredraw.papers import second_attempts as sa  # noqa: E402
from scoredraw.papers.small_policy import shipped_problems  # noqa: E402
from scoredraw.papers.studies import Record, run_study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402
from scoredraw.rl.policy_training import EMBEDDED, open_policy  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("cache")]

MEASURED = {"acc_t1", "acc_t2", "delta", "i2c", "c2i", "missing", "same", "final", "seconds"}


@pytest.fixture(scope="module")
def settings(new_born: str) -> cs.Settings:
    """Runs of two steps of a policy of one layer that knows nothing, but likes to end."""
    return cs.Settings(
        model=new_born, steps=2, prompts=2, generations=4, max_tokens=4, spared=2, tested=3,
        samples=8, rates=(1e-3, 2e-3, 4e-3), seeds=2,
    )  # fmt: skip


def weights(folder: str) -> dict[str, Any]:
    return dict(open_policy(folder)[0].state_dict())


# ── runs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", list(cs.TITLES))
def test_a_run_is_measured(name: str, settings: cs.Settings) -> None:
    steps: list[tuple[int, int]] = []
    record = cs.run_arm(name, 1e-3, 0, tell=lambda i, n: steps.append((i, n)), settings=settings)
    imitates = cs.TITLES[name] in {"Pair-SFT", "STaR, and right pairs"}
    assert set(record) == MEASURED | ({"lessons"} if imitates else set())
    assert steps[-1:] == ([] if name == cs.UNTRAINED else [(2, 2)])
    assert record["acc_t1"] == record["delta"] == record["final"] == 0  # it knows nothing
    assert 0.8 <= record["missing"] <= 1  # of 99 tokens one ends an attempt
    json.dumps(record)


def test_the_same_call_gives_the_same_run(settings: cs.Settings) -> None:
    first, again = (cs.run_arm("score", 1e-3, 0, settings=settings) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_imitation_learns_second_attempts_that_came_out_right(
    settings: cs.Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of four attempts is right, and the seconds of them by turns."""
    taught = cs.study_problems(settings)[0]

    def attempts(_: Any, __: Any, contexts: list[str], *___: Any) -> list[sa.Attempt]:
        answers = {row["prompt"]: row["answer"] for row in taught}
        golds = [answers[text.partition("\n")[0] + "\n"] for text in contexts]
        return [
            sa.Attempt(f"#{gold}" if i % 4 == 0 else f"#{i}?", i % 4 != 3)
            for i, gold in enumerate(golds)
        ]

    monkeypatch.setattr(cs, "attempts", attempts)
    monkeypatch.setattr(sa, "attempts", attempts)
    few = taught[:1]
    rows = {how: cs.corrections(how, settings.model, few, 0, settings)
            for how in ("pairs", "episodes")}  # fmt: skip
    answer = few[0]["answer"]
    assert len(rows["pairs"]) == 2 * 2 * 2 * 4 // 2  # of twice as many, half are wrong and ended
    assert len(rows["episodes"]) == 3  # of 16, 12 ended, and of these every fourth
    firsts = {how: [row["prompt"].split("\n")[1] for row in found] for how, found in rows.items()}
    assert f"#{answer}<eos>" in firsts["episodes"]
    assert f"#{answer}<eos>" not in firsts["pairs"]
    for found in rows.values():
        assert {row["completion"] for row in found} == {f"#{answer}"}
        assert all(row["prompt"].endswith("<eos>\nagain:\n") for row in found)

    steps = replace(settings, steps=25)
    made = cs.imitated(rows["episodes"], 0.02, 0, tmp_path, steps)
    net, tokenizer = open_policy(made)
    batch = tokenizer([rows["episodes"][0]["prompt"]], return_tensors="pt")
    out = net.generate(input_ids=batch["input_ids"], max_new_tokens=8, do_sample=False)
    said = tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
    assert said == f"#{answer}<eos>"


def test_without_right_ones_nothing_is_imitated(settings: cs.Settings) -> None:
    with cs.made_by("star", 1e-3, 0, None, settings) as (made, said):
        pass
    assert (made, said) == (settings.model, {"lessons": 0})


def test_second_attempts_go_on_from_the_same_tokens_as_in_training(settings: cs.Settings) -> None:
    from scoredraw.rl.self_correction_trainer import Episode

    _, tokenizer = open_policy(settings.model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    episode = Episode(ids("1+1=\n"))
    episode.attempt([*ids("#2"), tokenizer.eos_token_id], None, {tokenizer.eos_token_id})
    episode.insert(ids(sa.AGAIN))
    assert ids(sa.second_prompt(tokenizer, "1+1=\n", "#2")) == episode.prompt + episode.ids


def test_the_weight_is_on_second_attempts_in_stage_two(
    settings: cs.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoredraw.rl import self_correction_trainer as sct

    method = cs.method_of("weight")
    assert method.trainer_options is not None
    given: dict[str, Any] = {}
    monkeypatch.setattr(sct.SCoReTrainer, "__init__", lambda self, **how: given.update(how))
    monkeypatch.setattr(sct.SCoReTrainer, "_calculate_rewards", lambda *_: torch.zeros(2, 1))
    trainer = cs.weighted_trainer(**method.trainer_options(6))
    assert given == {"alpha": 0.0, "reward_range": (0.0, 11.0), "stage_steps": (2, 4),
                     "beta1": 0.01, "beta2": 0.1, "correction_prompt": sa.AGAIN}  # fmt: skip
    trainer.stage_steps = (2, 4)
    for step, second in ((1, 1.0), (2, 11.0)):
        trainer.state = SimpleNamespace(global_step=step)
        trainer._attempt_rewards = torch.ones(2, 2)
        trainer._calculate_rewards([], [], [], [])
        assert trainer._attempt_rewards.tolist() == [[1.0, second]] * 2


def test_stages_and_bonus_of_the_arms() -> None:
    found = {}
    for name in ("score", "naive", "no_stage", "no_bonus"):
        options = cs.method_of(name).trainer_options
        assert options is not None
        made = options(30)
        found[name] = (made["stage_steps"], made["alpha"])
    assert found == {
        "score": ((10, 20), 10.0), "naive": ((0, 30), 0.0),
        "no_stage": ((0, 30), 10.0), "no_bonus": ((10, 20), 0.0),
    }  # fmt: skip
    assert cs.method_of("grpo").trainer_options is None


# ── the task ────────────────────────────────────────────────────────────────────────────────────


def test_problems_do_not_overlap() -> None:
    parts = cs.study_problems(cs.Settings())
    assert [len(part) for part in parts] == [150, 50, 100]
    texts = [row["prompt"] for part in parts for row in part]
    assert len(set(texts)) == len(texts)
    tests = {row["prompt"] for row in shipped_problems("test", [sa.FAMILY])}
    assert {row["prompt"] for row in parts[2]} == tests


def test_fresh_problems_are_none_of_those_that_ship() -> None:
    pytest.importorskip("reasoning_gym")
    made = sa.fresh_problems(50)
    assert 40 < len(made) <= 50  # few doubles
    texts = {row["prompt"] for row in made}
    assert len(texts) == len(made)
    shipped = [row for part in ("train", "test") for row in shipped_problems(part)]
    assert not texts & {row["prompt"] for row in shipped}


def test_teaching_keeps_first_attempts_and_mends_second_ones(
    settings: cs.Settings, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = shipped_problems("train", [sa.FAMILY])[:6]
    monkeypatch.setattr(sa, "fresh_problems", lambda n: known[:n])
    folder = sa.taught_policy(fresh=6, steps=1, max_tokens=8)
    assert (Path(folder) / "config.json").is_file()
    (kept,) = cache.glob("second-attempts-*.json")
    rows = json.loads(kept.read_text())
    alone, again = rows[::2], rows[1::2]
    answers = {row["prompt"]: row["target"] for row in known}
    assert len(alone) == len(again) == 6
    for one, two in zip(alone, again, strict=True):
        assert two["prompt"] == f"{one['prompt']}{one['target']}<eos>\nagain:\n"
        assert two["target"] == answers[one["prompt"]]
    monkeypatch.setattr(sa, "lessons", None)  # is known
    assert sa.taught_policy(fresh=6, steps=1, max_tokens=8) == folder
    assert cs.base_policy(replace(settings, model=EMBEDDED, fresh=6, lessons=1,
                                      max_tokens=8)) == folder  # fmt: skip


def test_shares_of_episodes() -> None:
    row = {"prompt": "1+1=\n", "answer": "2"}

    def episode(first: str, second: str | None) -> sa.Episode:
        one, two = sa.Attempt(first, second is not None), sa.Attempt(second or "", bool(second))
        return sa.Episode(row, one, two, (sa.are_right([row], [one])[0],
                                          sa.are_right([row], [two])[0]))  # fmt: skip

    found = sa.shares([
        episode("1+1=3\n#3", "1+1=2\n#2"), episode("#2", "#2"), episode("#2", "#4"),
        episode("#3", "#3"), episode("#2", None),
    ])  # fmt: skip
    want = {"acc_t1": 0.6, "acc_t2": 0.4, "delta": -0.2, "i2c": 0.2, "c2i": 0.4, "missing": 0.2,
            "same": 0.4}  # fmt: skip
    assert found == pytest.approx(want)


# ── the study ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int, bool]]:
    """Runs whose results are a formula, best at rate 2e-3; the list of those that were made."""
    runs: list[tuple[str, float, int, bool]] = []
    order = ["untrained", "naive", "star", "pair_sft", "grpo", "no_bonus", "weight", "no_stage",
             "score"]  # fmt: skip

    def run_arm(
        name: str, rate: float, seed: int, tuning: bool = False, tell: Any = None, *,
        settings: cs.Settings,
    ) -> Record:  # fmt: skip
        runs.append((name, rate, seed, tuning))
        gain = 0.02 * order.index(name) - 0.1 * abs(np.log2((rate or 2e-3) / 2e-3))
        shares = {"acc_t1": 0.5, "acc_t2": 0.5 + gain + 1e-4 * seed, "delta": gain + 1e-4 * seed,
                  "i2c": 0.1, "c2i": 0.1 + gain, "missing": 0.0, "same": 0.5 - gain}  # fmt: skip
        return {**shares, "final": 0.5 + gain}

    monkeypatch.setattr(cs, "run_arm", run_arm)
    return runs


def test_reports(settings: cs.Settings, made_up: list[Any], cache: Path) -> None:
    report = Report(paper=61, scale="study", seed=0)
    cs.add_correction_study(report, 0, settings)
    assert len(made_up) == 2 + 8 * 5  # untrained twice; three rates, then two seeds at the best
    assert len(Journal(cache / "correction-study.jsonl").records()) == len(made_up)
    assert len(report.claims) == len(cs.COMPARISONS) + 1
    assert len({claim.name for claim in report.claims}) == len(report.claims)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    verdicts = {claim.name: claim.verdict for claim in report.claims}
    assert verdicts["Language model, Δ: SCoRe - naive two-turn RL"] == "holds"
    assert verdicts["Language model, spoiled: SCoRe - untrained"] == "fails"
    assert verdicts["Language model, same answer: naive two-turn RL - untrained"] == "fails"
    assert verdicts["Language model, Δ: naive two-turn RL"] == "holds"
    gap = next(c for c in report.claims if c.name == "Language model, Δ: SCoRe - Pair-SFT")
    assert isinstance(gap.measured, Estimate)
    assert gap.measured.value == pytest.approx(0.1)
    assert [row[1] for row in report.tables[0].rows] == [None, *[2e-3] * 8]
    cs.add_correction_study(Report(paper=61, scale="study", seed=0), 0, settings)
    assert len(made_up) == 42  # all was known


def test_keys_know_the_weights_and_the_options(
    settings: cs.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("score", 1e-3, 0, False)
    plan = cs.plan_of(settings)
    keys = {plan.key(name, *run[1:]) for name in cs.TITLES}
    assert len(keys) == len(cs.TITLES)
    assert cs.plan_of(replace(settings, seeds=5, rates=(1.0,))).key(*run) in keys
    monkeypatch.setattr(cs, "taught_policy", lambda *_: settings.model)
    for changed in ({"lessons": 1}, {"steps": 3}, {"model": EMBEDDED}):
        keys.add(cs.plan_of(replace(settings, **changed)).key(*run))
    monkeypatch.setattr(cs, "AGAIN", "?")
    keys.add(cs.plan_of(settings).key("star", *run[1:]))
    assert len(keys) == len(cs.TITLES) + 4


def test_refusals(settings: cs.Settings) -> None:
    with pytest.raises(InputError, match="name: got 'best', want one of untrained, score, naive"):
        cs.run_arm("best", 1e-3, 0, settings=settings)
    with pytest.raises(InputError, match="arms: got best, want some of untrained, score"):
        run_study(cs.plan_of(settings), arms=["score", "best"])


def test_command_line(
    settings: cs.Settings, made_up: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cs, "Settings", lambda: settings)
    cs.main(["--arms", "naive", "--seeds", "1"])
    assert [name for name, *_ in made_up] == ["naive"] * 4
    assert capsys.readouterr().out == ""
