"""The trainer on real TRL runs: TRL's own numbers where the method is TRL's, and its contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from scoredraw.errors import InputError
from scoredraw.rl.dynamic_sampling import Answers
from scoredraw.rl.reward_functions import GuardedReward
from scoredraw.rl.reward_groups import centre, chain, group_rewards, scale
from scoredraw.rl.trainer import AdvantageGRPOTrainer, Rollouts

pytestmark = pytest.mark.contract

PROMPTS = Dataset.from_list([{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(8)])


def vowels(completions: list[str], **_: Any) -> list[float | None]:
    """How many vowels; nothing for a text with a z, so that some rows have no reward."""
    return [None if "z" in c else float(sum(c.count(v) for v in "aeiou")) for c in completions]


def odd_half(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Answers to a+a with an even a are all alike, the others by their first letter and length."""
    odd = [int(p.split("+")[0]) % 2 for p in prompts]
    return [o * (ord(c[:1] or "a") + len(c)) for o, c in zip(odd, completions, strict=True)]


def grpo(rollouts: Rollouts) -> Tensor:
    """What TRL computes: mean, unbiased deviation + 1e-4."""
    groups = group_rewards(rollouts.reward, num_generations=rollouts.num_generations)
    return chain(centre(), scale(eps=1e-4))(groups)


Run = Callable[..., Any]


@pytest.fixture
def run(letters: Any, new_policy: Callable[[], Any], grpo_config: Callable[..., Any]) -> Run:
    def train(kind: Any = AdvantageGRPOTrainer, reward: Any = vowels, **options: Any) -> Any:
        settings = options.pop("config", {})
        trainer = kind(
            model=new_policy(), reward_funcs=reward, args=grpo_config(**settings),
            train_dataset=options.pop("data", PROMPTS), processing_class=letters, **options,
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_grpo_is_trl_bit_for_bit(run: Run, loss_type: str) -> None:
    """Advantages a row, and the same a token: both end at TRL's own weights."""
    config = {
        "loss_type": loss_type, "num_iterations": 2, "max_steps": 5, "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    theirs = weights(run(GRPOTrainer, config=config))
    ours = weights(run(advantage_fn=grpo, config=config))
    each = weights(run(advantage_fn=lambda r: grpo(r)[:, None].expand(r.mask.shape), config=config))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert torch.equal(each[name], value), name


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import grpo_settings, two_layers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from test_trainer import PROMPTS, grpo, vowels
from scoredraw.errors import InputError
from scoredraw.papers.small_policy import new_tokenizer
from scoredraw.rl.trainer import AdvantageGRPOTrainer

def train(kind, reward=vowels, each=4, **options):
    letters = new_tokenizer()
    config = GRPOConfig(**{**grpo_settings(sys.argv[2]), "num_iterations": 2, "max_steps": 3,
                           "per_device_train_batch_size": each})
    trainer = kind(model=two_layers(letters), reward_funcs=reward, args=config,
                   train_dataset=PROMPTS, processing_class=letters, **options)
    trainer.train()
    return trainer

def weights(trainer):
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()

def each(rollouts):
    assert len(rollouts.reward) == len(rollouts.mask) == len(rollouts.prompts) == 8
    assert len(set(rollouts.prompts[:4])) == 1
    return grpo(rollouts)[:, None].expand(rollouts.mask.shape)

theirs = weights(train(GRPOTrainer))
ours = weights(train(AdvantageGRPOTrainer, advantage_fn=each))
assert all(torch.equal(ours[name], value) for name, value in theirs.items())
"""

REFILLED = (
    SCRIPT[: SCRIPT.index("def each")]
    + """
from test_trainer import odd_half

seen = []

def look(rollouts):
    seen.append(rollouts)
    return grpo(rollouts)

trainer = train(AdvantageGRPOTrainer, odd_half, advantage_fn=look, max_batches=20)
rows = [row for row in trainer.state.log_history if "generation_batches" in row]
last = seen[-1]
assert [row["frac_dead_groups"] for row in rows] == [0.0, 0.0], rows
assert max(row["generation_batches"] for row in rows) > 1
assert all(int(answer) // 2 % 2 for answer in last.columns["answer"])
assert odd_half(last.prompts, last.completions) == last.reward.tolist()
try:
    train(AdvantageGRPOTrainer, odd_half, 2, advantage_fn=grpo, max_batches=20)
except InputError as error:
    assert "max_batches: got 2 answers a process, want whole groups of 4" in str(error)
else:
    raise AssertionError("a group over two processes")
"""
)


@pytest.mark.parametrize("text", [SCRIPT, REFILLED], ids=["plain", "refilled"])
def test_two_processes_see_one_batch(tmp_path: Path, text: str) -> None:
    """Each has half of it, a group; the function sees all, and each keeps its own rows.

    Plain, it ends at TRL's weights; refilled, at a batch in which every group teaches.
    """
    script = tmp_path / "two.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(script), str(Path(__file__).parent), str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_an_advantage_it_is_trl(run: Run) -> None:
    theirs, ours = weights(run(GRPOTrainer)), weights(run())
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_the_function_sees(run: Run) -> None:
    seen: list[Rollouts] = []

    def look(rollouts: Rollouts) -> Tensor:
        seen.append(rollouts)
        return torch.zeros(len(rollouts.reward))

    look.statistics = {"branches": 0.25}  # type: ignore[attr-defined]
    trainer = run(advantage_fn=look)
    for step, r in enumerate(seen):
        assert r.group_ids.tolist() == [0] * 4 + [1] * 4
        assert r.completion_ids.shape == r.mask.shape
        assert r.mask.any(dim=1).all()
        assert (r.step, r.num_generations) == (step, 4)
        assert len(set(r.prompts[:4])) == 1
        assert [p.removesuffix("=") for p in r.prompts] == [
            f"{int(a) // 2}+{int(a) // 2}" for a in r.columns["answer"]
        ]
        want = vowels(r.completions)
        assert [None if x != x else x for x in r.reward.tolist()] == want
        assert r.rewards.shape == (8, 1)
    logs = [row for row in trainer.state.log_history if "frac_dead_groups" in row]
    assert [row["frac_dead_groups"] for row in logs] == [1.0, 1.0]
    assert [row["branches"] for row in logs] == [0.25, 0.25]


def test_rows_without_reward_have_no_advantage(run: Run) -> None:
    """All weights stay as they were when no row has a reward, whatever the function says."""

    def none(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    trainer = run(reward=none, advantage_fn=lambda r: torch.ones(8))
    fresh = run(reward=none, advantage_fn=lambda r: torch.zeros(8))
    for name, value in weights(fresh).items():
        assert torch.equal(weights(trainer)[name], value)


def test_dropped_answers_count_nowhere(run: Run) -> None:
    """Dropping half of the rows is the mean over the other half, in every aggregation."""
    keep = torch.tensor([True, False] * 4)

    def losses(loss_type: str, answer: Any) -> float:
        trainer = run(
            advantage_fn=lambda r: answer(r),
            config={"loss_type": loss_type, "max_steps": 1, "learning_rate": 0.0},
        )
        return float(trainer.state.log_history[0]["loss"])

    def ones(r: Rollouts) -> tuple[Tensor, Tensor]:
        return torch.ones(8), keep

    def half(r: Rollouts) -> Tensor:
        return keep.float()

    def scored(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    assert losses("dapo", ones) == pytest.approx(-1.0, abs=1e-5)  # -A, the mean of the kept tokens
    assert losses("dapo", half) > -0.9  # over all tokens
    assert losses("bnpo", ones) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.zeros(7), r"advantage_fn: got shape \(7,\)"),
        (torch.full((8,), torch.nan), "advantage_fn: got NaN"),
        ((torch.zeros(8), torch.ones(3, dtype=torch.bool)), r"advantage_fn: got \(3,\)"),
    ],
)
def test_refuses_what_is_no_advantage(run: Run, found: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(advantage_fn=lambda r: found)


@pytest.mark.parametrize("scaled", ["group", "batch", "none"])
def test_dead_groups_of_trls_own(run: Run, scaled: str) -> None:
    """However TRL scales: a group of one mind, and one without a reward, teach nothing."""

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [0.7] * 4 + [None] * 4 if len(completions) == 8 else []

    def half(completions: list[str], **_: Any) -> list[float]:
        return [0.7] * 4 + [0.7, 0.1, 0.7, 0.7]

    config = {"max_steps": 1, "scale_rewards": scaled}
    dead = [
        run(reward=f, config=config).state.log_history[0]["frac_dead_groups"]
        for f in (reward, half)
    ]
    assert dead == [1.0, 0.5]


def test_what_is_logged_for_some_rows_is_left_out(run: Run) -> None:
    def reward(prompts: list[str], completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("some", prompts[:3])
        log_extra("all", prompts)
        return odd_half(prompts, completions)

    trainer = run(reward=reward, advantage_fn=grpo, max_batches=10, config={"max_steps": 1})
    assert set(trainer._logs["extra"]) == {"all"}


def test_a_reward_that_raises_for_one_row(run: Run) -> None:
    def fragile(completions: list[str], **_: Any) -> list[float]:
        return [1.0 / (ord(c[0]) % 2) for c in completions]

    guarded = GuardedReward(fragile)
    trainer = run(reward=guarded, advantage_fn=grpo)
    assert guarded.failures > 0
    assert trainer.state.global_step == 2
    assert any("fragile/unscored" in row for row in trainer.state.log_history)


# ── dynamic sampling ────────────────────────────────────────────────────────────────────────────


class Kept(AdvantageGRPOTrainer):
    """Holds on to what goes into the steps."""

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append(output)
        return output


LONGER = Dataset.from_list([{"prompt": f"{a}+{10 ** (a % 3)}="} for a in range(16)])


def test_dead_groups_make_room_for_others(run: Run, letters: Any) -> None:
    """A full batch of living groups, whose rows belong together though prompts differ in length."""
    seen: list[Rollouts] = []
    sampled = 0

    def reward(prompts: list[str], completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        nonlocal sampled
        log_extra("asked", [f"{sampled}: {text}" for text in prompts])
        if sampled:
            log_extra("again", prompts)
        sampled += len(prompts)
        return odd_half(prompts, completions)

    def look(rollouts: Rollouts) -> Tensor:
        seen.append(rollouts)
        return grpo(rollouts)

    trainer = run(
        Kept, reward, advantage_fn=look, max_batches=30, data=LONGER,
        config={"num_iterations": 2, "learning_rate": 0.0, "max_steps": 6},
    )  # fmt: skip
    rows = [row for row in trainer.state.log_history if "generation_batches" in row]
    assert [row["frac_dead_groups"] for row in rows] == [0.0] * 3
    assert 8 * sum(row["generation_batches"] for row in rows) == sampled > 8 * len(rows)
    assert sum(row["frac_reward_zero_std"] for row in rows) > 0  # of all that was sampled
    for batch in trainer.batches:
        r = next(r for r in seen if torch.equal(r.completion_ids, batch["completion_ids"]))
        texts = letters.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        assert texts == r.prompts
        assert all(int(text.split("+")[0]) % 2 for text in texts)
        assert odd_half(texts, r.completions) == r.reward.tolist()
        said = letters.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        assert said == r.completions
        assert torch.equal(batch["advantages"], grpo(r).float())
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        ids, mask = (
            torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        T = batch["completion_ids"].shape[1]
        now = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T)[0]
        written = batch["completion_mask"].bool()
        old = batch["old_per_token_logps"]  # nothing has moved since
        assert torch.allclose(old[written], now[written], atol=1e-5)
    assert list(trainer._logs["prompt"]) == texts
    assert list(trainer._logs["advantages"]) == grpo(r).tolist()
    assert list(trainer._logs["rewards"]["reward"]) == r.reward.tolist()
    asked = [said.split(": ")[1] for said in trainer._logs["extra"]["asked"]]
    assert asked == texts
    assert list(trainer._logs["extra"]["again"]) == texts


def test_what_cannot_be_filled_stays(run: Run) -> None:
    """After max_batches dead groups remain in their places, and nothing moves."""
    sampled: list[list[str]] = []

    def reward(prompts: list[str], **_: Any) -> list[float]:
        sampled.append(prompts)
        return [1.0] * len(prompts)

    trainer = run(Kept, reward, advantage_fn=grpo, max_batches=3, config={"max_steps": 1})
    fresh = run(reward=reward, advantage_fn=grpo, config={"max_steps": 1, "learning_rate": 0.0})
    assert all(torch.equal(weights(fresh)[n], value) for n, value in weights(trainer).items())
    (row,) = (row for row in trainer.state.log_history if "generation_batches" in row)
    assert (row["generation_batches"], row["frac_dead_groups"]) == (3, 1.0)
    assert len({prompts[0] for prompts in sampled[1:3]} | {p[-1] for p in sampled[1:3]}) == 4
    assert list(trainer._logs["prompt"]) == sampled[0]


def test_a_living_batch_is_left_alone(run: Run) -> None:
    """Bit for bit the run without dynamic sampling; and one with it is the same twice."""

    def lively(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i, _ in enumerate(completions)]

    config = {"num_iterations": 2, "max_steps": 4}
    once, ten = (
        weights(run(reward=lively, advantage_fn=grpo, max_batches=m, config=config))
        for m in (1, 10)
    )
    assert all(torch.equal(ten[name], value) for name, value in once.items())
    first, again = (
        weights(run(reward=odd_half, advantage_fn=grpo, max_batches=10)) for _ in range(2)
    )
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_refuses_to_sample_again(run: Run) -> None:
    with pytest.raises(InputError, match="max_batches: got 0, want 1 or more"):
        run(advantage_fn=grpo, max_batches=0)
    with pytest.raises(InputError, match="max_batches: got 2, want 1 without an advantage_fn"):
        run(max_batches=2)
    with pytest.raises(InputError, match="train_dataset: got a stream, want rows by number"):
        run(advantage_fn=grpo, max_batches=2, data=PROMPTS.to_iterable_dataset())
    with pytest.raises(InputError, match="max_batches: got a batch with num_images, pixel_values"):
        Answers.of_batch({"pixel_values": 0, "num_images": 0}, torch.zeros(1), {})
