"""Runs of a policy: resumed where they stopped, measured, and refused where they make no sense."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scoredraw.errors import InputError
from scoredraw.rl.policy_methods import chi2_penalty, rlcr
from scoredraw.rl.policy_training import (
    AnswerReward,
    PolicyMethod,
    final_answer,
    find_reward,
    pass_at,
    read_problems,
    train_policy,
)
from scoredraw.rl.relevance_reward import R3Reward
from scoredraw.rl.reward_groups import centre, chain, group_rewards
from scoredraw.rl.trainer import Rollouts

pytestmark = pytest.mark.contract

PROBLEMS = [{"question": f"{a}+{a}=", "answer": str(2 * a)} for a in range(12)]


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(text.count(v) for v in "aeiou")) for text in completions]


def centred(rollouts: Rollouts) -> torch.Tensor:
    return chain(centre())(group_rewards(rollouts.reward, rollouts.group_ids))


def letters_of(texts: list[str]) -> np.ndarray:
    """Length-one vectors of how often each of a few letters comes."""
    counts = np.array([[1 + text.count(c) for c in "abcde"] for text in texts], np.float64)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


NEEDY = PolicyMethod(rewards=lambda _: [R3Reward(letters_of, 4)])
CENTRED = PolicyMethod(lambda tokenizer: centred, {"num_iterations": 2})


@pytest.fixture
def model(tmp_path: Path, new_policy: Callable[[], Any], letters: Any) -> str:
    folder = tmp_path / "policy"
    new_policy().save_pretrained(folder)
    letters.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(model: str) -> Callable[..., Any]:
    def run(out: Path, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "model": model, "reward": vowels, "method": CENTRED, "steps": 4, "prompts": 2,
            "generations": 4, "max_tokens": 5, "learning_rate": 1e-2, "save_every": 2,
            "held_out": 2, "samples": 2,
        }  # fmt: skip
        given = {**settings, **options}
        return train_policy(given.pop("problems", PROBLEMS), out, **given)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_an_interrupted_run_ends_where_it_would_have(
    tmp_path: Path, train: Callable[..., Any]
) -> None:
    whole = train(tmp_path / "whole")

    def stop(step: int, total: int, row: dict[str, float]) -> None:
        assert total == 4
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", progress=stop)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-4").is_dir()
    seen: list[int] = []
    resumed = train(tmp_path / "cut", progress=lambda step, *_: seen.append(step))
    assert seen == [3, 4]
    assert [row["reward"] for row in resumed.log] == [row["reward"] for row in whole.log]
    want = weights(tmp_path / "whole" / "model")
    for name, value in weights(tmp_path / "cut" / "model").items():
        assert torch.equal(value, want[name]), name
    assert resumed.after == whole.after


def test_it_learns_and_says_so(tmp_path: Path, train: Callable[..., Any]) -> None:
    """Vowels go up by more than two of five: at random .5 of five letters are vowels."""
    run = train(tmp_path / "run", steps=25, prompts=4, generations=8, samples=4)
    first, last = run.log[0]["reward"], np.mean([r["reward"] for r in run.log[-5:]])
    assert last > first + 2
    assert set(run.before) == {1, 2, 4}
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["method"] == "grpo"
    assert facts["log"][0]["reward"] == first
    assert facts["after"] == {str(k): v for k, v in run.after.items()}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "model", "run.json", "settings.json",
    ]  # fmt: skip


def test_trls_own_grpo_and_another_trainer(tmp_path: Path, train: Callable[..., Any]) -> None:
    own = train(tmp_path / "own", method=None, steps=2)
    same = train(tmp_path / "same", method=PolicyMethod(trainer="trl:GRPOTrainer"), steps=2)
    assert [r["loss"] for r in own.log] == [r["loss"] for r in same.log]
    doubled = PolicyMethod(rewards=lambda reward: [reward, reward])
    run = train(tmp_path / "two", method=doubled, steps=1)
    assert run.log[0]["reward"] == 2 * own.log[0]["reward"]


def test_a_penalty_for_leaving_where_it_began(tmp_path: Path, train: Callable[..., Any]) -> None:
    run = train(tmp_path / "run", method=chi2_penalty(kind="kl", coef=1.0), steps=3)
    paid = [row["rewards/kl_penalty/mean"] for row in run.log]
    assert paid[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(paid[2]) > 1e-3
    for row in run.log:
        both = row["rewards/vowels/mean"] + row["rewards/kl_penalty/mean"]
        assert row["reward"] == pytest.approx(both, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "rows", "said"),
    [
        (
            {"reward": "exact"},
            [{"question": "1+1="}] * 4,
            "problems: got columns prompt, want answer",
        ),
        ({"method": rlcr()}, [{"question": "1+1="}] * 4, "answer: got no column, want a column of"),
        ({"method": NEEDY}, PROBLEMS, "qtype: got no column"),
    ],
)
def test_what_a_reward_reads_has_to_be_there(
    options: dict[str, Any], rows: list[dict[str, str]], said: str, tmp_path: Path, model: str
) -> None:
    with pytest.raises(InputError, match=said):
        train_policy(rows, tmp_path / "run", **{"model": model, "steps": 1, **options})
    assert not (tmp_path / "run").exists()


def test_a_reward_of_its_own_needs_no_answers(tmp_path: Path, train: Callable[..., Any]) -> None:
    rows = [{"question": f"{a}?", "qtype": "OPENENDED"} for a in range(8)]
    run = train(tmp_path / "run", problems=rows, reward="exact", method=NEEDY, steps=1)
    assert (run.before, run.after, run.gain) == ({}, {}, None)
    assert run.log[0]["reward"] != 0


def test_a_reward_that_raises(tmp_path: Path, train: Callable[..., Any]) -> None:
    def broken(**_: Any) -> list[float]:
        raise RuntimeError("no")

    run = train(tmp_path / "run", reward=broken, steps=1)
    assert run.log[0]["broken/unscored"] == 1.0
    assert run.after == {1: 0.0, 2: 0.0}


def test_folders(tmp_path: Path, train: Callable[..., Any]) -> None:
    train(tmp_path / "run", steps=1)
    for message, out, options in (
        ("a finished run", tmp_path / "run", {"steps": 1}),
        ("a run with other seed, want", tmp_path / "run", {"steps": 1, "seed": 4}),
        ("which is a file", tmp_path / "file", {}),
        ("holds something else", tmp_path / "other", {}),
    ):
        (tmp_path / "file").touch()
        (tmp_path / "other" / "inside").mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match=message):
            train(out, **options)


def test_refusals(tmp_path: Path, train: Callable[..., Any]) -> None:
    for message, options in {
        "generations: got 1": {"generations": 1},
        "steps: got 0": {"steps": 0},
        "reward: got 'best'": {"reward": "best"},
        "model: cannot load": {"model": str(tmp_path)},
    }.items():
        with pytest.raises(InputError, match=message):
            train(tmp_path / "new", **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "problems: got none"),
        ([{"text": "x"}], "problems: got columns"),
        ([{"prompt": "x"}, {"prompt": "y", "answer": "1"}], "problems, row 1"),
        ([{"prompt": "x"}, {"prompt": ""}], "problems, row 1: got ''"),
        ([{"prompt": None}], "problems, row 0: got None"),
    ],
)
def test_problems_that_are_none(rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_problems(rows)


def test_a_chat_model_is_spoken_to(
    tmp_path: Path, train: Callable[..., Any], model: str, letters: Any
) -> None:
    """Texts become messages, for TRL, for rewards and for the measuring; plain ones do not."""
    speaker = copy.deepcopy(letters)
    speaker.chat_template = "{% for m in messages %}{{ 'q ' + m['content'] + ' a ' }}{% endfor %}"
    speaker.save_pretrained(model)
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(completions)

    train(tmp_path / "chat", reward=look, steps=1)
    assert [prompt[0]["role"] for prompt, _ in seen] == ["user"] * 3
    assert seen[1][1][0]["role"] == "assistant"
    seen.clear()
    train(tmp_path / "plain", reward=look, steps=1, plain=True)
    assert all(isinstance(prompt, str) for prompt, _ in seen)


@pytest.mark.oracle
def test_final_answers() -> None:
    said = {
        "\\boxed{\\frac{1}{2}} it is": "\\frac{1}{2}", "\\boxed{1": "1",
        "3+4=7\n#7\n": "7", "#1\n#2": "2", "\\boxed{1} and \\boxed{2}": "2", " 12 ": "12",
        "<answer>a</answer> <answer> b </answer>": "b", "": "", "#": "",
    }  # fmt: skip
    assert [final_answer(text) for text in said] == list(said.values())
    reward = AnswerReward("math")
    texts = ["#0.5", "#1", "nothing"]
    assert reward([""] * 3, texts, answer=["1/2", None, "2"]) == [1.0, None, 0.0]
    assert find_reward("exact")(prompts=["p"], completions=["#1"], answer=["1"]) == [1.0]
    assert find_reward("exact")(prompts=["p"], completions=["#1"]) == [None]  # no column answer


@pytest.mark.oracle
def test_pass_at_is_the_mean_over_subsets() -> None:
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    assert pass_at(rewards) == pytest.approx({1: 1 / 3, 2: (0.5 + 1 + 0) / 3, 4: 2 / 3})
