"""Two attempts on real TRL runs: what is masked, who is credited, when the stages change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.rl.self_correction import score_advantages, self_correction_metrics
from scoredraw.rl.self_correction_trainer import Episode, SCoReTrainer

pytestmark = pytest.mark.contract

AGAIN = "\nagain: "
PROMPTS = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(8)]
CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def odd(completions: list[Any], **_: Any) -> list[float]:
    """Whether the first letter has an odd place in the alphabet."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(ord((t + "b")[0]) % 2) for t in texts]


class Watched(SCoReTrainer):
    """Keeps what each generation batch came to, and the weights that made it."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        policy = type(self.model)(self.model.config).eval()  # a copy would keep TRL's forward
        policy.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        seen = self.__dict__.setdefault("seen", [])
        seen.append({
            "output": {k: v.clone() for k, v in output.items()}, "policy": policy,
            "episodes": self._episodes, "rewards": self._attempt_rewards, "kl": self._kl,
            "missing": self._missing, "turn": self._turn, "stage": self.stage,
        })  # fmt: skip
        return output


Run = Callable[..., Any]


@pytest.fixture
def make(letters: Any, new_policy: Callable[[], Any], grpo_config: Callable[..., Any]) -> Run:
    def build(**options: Any) -> Any:
        config = {
            "max_completion_length": 32, "per_device_train_batch_size": 16, "loss_type": "dapo",
            **options.pop("config", {}),
        }  # fmt: skip
        settings: dict[str, Any] = {
            "model": new_policy(), "reward_funcs": odd, "args": grpo_config(**config),
            "train_dataset": Dataset.from_list(options.pop("rows", PROMPTS)),
            "processing_class": options.pop("tokenizer", letters),
            "correction_prompt": AGAIN, "stage_steps": (1, 1),
        }  # fmt: skip
        return Watched(**{**settings, **options})

    return build


@pytest.fixture
def run(make: Run) -> Run:
    def train(**options: Any) -> Any:
        trainer = make(**options)
        trainer.train()
        return trainer

    return train


def spelled_out(batch: dict[str, Any], shaping: dict[str, Any], G: int = 4) -> Tensor:
    """(B, T) advantages from a batch's rewards and KLs, a group and a token at a time."""
    turn, rewards = batch["turn"], batch["rewards"]
    found = torch.zeros(turn.shape)
    for start in range(0, len(turn), G):
        rows = [i for i in range(start, start + G) if not rewards[i].isnan().any()]
        if len(rows) < 2:
            continue
        each = score_advantages(rewards[rows], batch["kl"][rows], batch["stage"], **shaping)
        for i, row in zip(rows, each, strict=True):
            for t, k in enumerate(turn[i].tolist()):
                found[i, t] = row[k - 1] if k else 0.0
    return found


def log_ratio(policy: Any, reference: Any, context: list[int], written: list[int]) -> Tensor:
    """log π/π_ref of each token written after a context, by a plain forward pass."""
    ids = torch.tensor([context + written])
    with torch.no_grad():
        logps = [m(input_ids=ids).logits.log_softmax(-1)[0, :-1] for m in (policy, reference)]
    at = torch.arange(len(context) - 1, ids.shape[1] - 1)
    return (logps[0] - logps[1])[at, ids[0, 1:][at]]


# ── episodes ────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_and_what_is_masked(run: Run, letters: Any) -> None:
    trainer = run()
    again, eos = letters(AGAIN)["input_ids"], letters.eos_token_id
    for batch in trainer.seen:
        output, episodes = batch["output"], batch["episodes"]
        made = [len(e.attempts) for e in episodes]
        assert set(made) == {1, 2}  # some first attempts end, some hit the limit
        for i, episode in enumerate(episodes):
            first, *second = episode.attempts
            ids = first + (again + second[0] if second else [])
            assert (first[-1] == eos) == bool(second)
            assert len(first) <= 32
            n = len(ids)
            assert output["completion_ids"][i, :n].tolist() == ids
            assert output["completion_mask"][i].tolist() == [1] * n + [0] * (
                len(batch["turn"][i]) - n
            )
            written = [1] * len(first) + ([0] * len(again) + [2] * len(second[0]) if second else [])
            assert batch["turn"][i, :n].tolist() == written
            assert not batch["turn"][i, n:].any()
            assert output["tool_mask"][i, :n].tolist() == [min(k, 1) for k in written]
            assert bool(batch["missing"][i, 1]) == (not second)
            want = odd(letters.batch_decode(episode.attempts, skip_special_tokens=True))
            assert batch["rewards"][i].tolist() == [*want, 0.0][:2]
        assert int(output["num_items_in_batch"]) == int((batch["turn"] > 0).sum())


@pytest.mark.parametrize("credit", ["per_turn", "total"])
@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_stages_kl_and_advantages(run: Run, kl: str, credit: str) -> None:
    """Stage I, then II; KL from the model at the start, by an own forward pass of each row."""
    trainer = run(credit=credit, kl=kl, beta1=0.05, beta2=0.7, alpha=5.0)
    assert [batch["stage"] for batch in trainer.seen] == [1, 2]
    start = trainer.seen[0]["policy"]
    shaping = {"credit": credit, "beta1": 0.05, "beta2": 0.7, "alpha": 5.0}
    for step, batch in enumerate(trainer.seen):
        found = batch["output"]["advantages"]
        torch.testing.assert_close(found, spelled_out(batch, shaping))
        assert not found[batch["turn"] == 0].any()
        for i, episode in enumerate(batch["episodes"]):
            ratio = log_ratio(batch["policy"], start, episode.prompt, episode.ids)
            each = ratio if kl == "k1" else torch.expm1(-ratio) + ratio
            turn = torch.tensor(episode.turn)
            want = torch.stack([each[turn == k].sum() for k in (1, 2)])
            torch.testing.assert_close(batch["kl"][i], want, rtol=1e-3, atol=1e-5)
        moved = float(batch["kl"].abs().max())
        assert (moved > 1e-4) if step else (moved < 1e-6)
    assert not any(p.requires_grad for p in trainer.reference.parameters())


def test_the_loss_and_the_log(run: Run) -> None:
    """TRL's loss is -ΣΣ A / tokens, as the ratio is 1; the log has the metrics of the batch."""
    trainer = run()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    for step, (row, batch) in enumerate(zip(logs, trainer.seen, strict=True)):
        written = batch["turn"] > 0
        want = -(batch["output"]["advantages"] * written).sum() / written.sum()
        assert row["loss"] == pytest.approx(float(want), abs=2e-3)
        right, gone = batch["rewards"] == 1, batch["missing"][:, 1]
        for name, share in self_correction_metrics(*right.T, gone)._asdict().items():
            assert row[f"self_correction/{name}"] == pytest.approx(share)
        assert row["self_correction/stage"] == step + 1
        assert row["self_correction/kl_t1"] == pytest.approx(float(batch["kl"][:, 0].mean()))


def test_what_cannot_be_scored_is_left_out(run: Run) -> None:
    """An attempt without reward: the episode has no advantage and is in nobody's baseline."""
    calls: list[int] = []

    def patchy(completions: list[str], **_: Any) -> list[float | None]:
        """Of the first group all but one, of the second only row 5 at its first attempt."""
        calls.append(0)
        gone = {0, 1, 2, 5} if len(calls) % 2 else {0, 1, 2}
        return [None if i in gone else float(i % 2) for i in range(len(completions))]

    trainer = run(reward_funcs=patchy, beta1=0.0)
    for batch in trainer.seen:
        assert not batch["output"]["advantages"][[0, 1, 2, 3, 5]].any()
        want = spelled_out(batch, {"beta1": 0.0})
        torch.testing.assert_close(batch["output"]["advantages"], want)
    # stage II: the first attempts of 4, 6, 7 earn 0, 0, 1
    last = trainer.seen[1]["output"]["advantages"]
    assert last[[4, 6, 7], 0].tolist() == pytest.approx([-0.5, -0.5, 1.0])


def test_a_first_attempt_from_the_data(run: Run, letters: Any) -> None:
    rows = [{**row, "first_attempt": "no idea" if i % 2 else None} for i, row in enumerate(PROMPTS)]
    trainer = run(rows=rows, config={"shuffle_dataset": False})
    given = letters("no idea")["input_ids"] + [letters.eos_token_id]
    for batch in trainer.seen:
        assert [e.given for e in batch["episodes"]] == ([False] * 4 + [True] * 4) * 2
        for i, episode in enumerate(batch["episodes"][4:8], 4):
            assert episode.attempts[0] == given
            assert set(episode.turn) == {0, 2}
            assert not batch["output"]["tool_mask"][i, : len(given)].any()
            assert float(batch["kl"][i, 0]) == 0
            assert not batch["missing"][i].any()
        assert batch["rewards"][4:8, 0].tolist() == [0.0] * 4  # "n"


def test_three_attempts_and_evaluation(run: Run) -> None:
    config = {"num_generations_eval": 1, "per_device_eval_batch_size": 8, "max_steps": 1}
    trainer = run(
        attempts=3, stage_steps=(0, 1), config=config, eval_dataset=Dataset.from_list(PROMPTS)
    )
    batch = trainer.seen[0]
    assert batch["stage"] == 2
    assert {len(e.attempts) for e in batch["episodes"]} >= {1, 3}
    assert set(batch["turn"].unique().tolist()) == {0, 1, 2, 3}
    assert batch["rewards"].shape == batch["kl"].shape == batch["missing"].shape == (16, 3)
    torch.testing.assert_close(batch["output"]["advantages"], spelled_out(batch, {}))
    found = trainer.evaluate()
    assert 0 <= found["eval_self_correction/acc_t1"] <= 1


def test_a_conversation_goes_on_by_its_template(run: Run, letters: Any) -> None:
    tokenizer = copy.deepcopy(letters)
    tokenizer.chat_template = CHAT
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    trainer = run(rows=rows, tokenizer=tokenizer, correction_prompt="look again")
    again = tokenizer("\n<u>look again\n<a>")["input_ids"]
    seen = 0
    for batch in trainer.seen:
        for episode in batch["episodes"]:
            if len(episode.attempts) == 2:
                first, second = episode.attempts
                assert episode.ids == first + again + second
                said = tokenizer.decode(episode.prompt + first + again)
                assert said.startswith("<u>")
                assert said.endswith("<eos>\n<u>look again\n<a>")
                seen += 1
    assert seen > 0
    assert "self_correction/acc_t2" in trainer.state.log_history[0]


def test_episodes_close_without_an_end() -> None:
    episode = Episode([7, 8])
    episode.attempt([4, 1], None, {1})
    assert episode.open
    episode.insert([9])
    episode.attempt([5, 5], [-0.1, -0.2], {1})
    assert not episode.open
    assert (episode.ids, episode.turn) == ([4, 1, 9, 5, 5], [1, 1, 0, 2, 2])
    assert episode.logprobs == [0.0, 0.0, 0.0, -0.1, -0.2]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[dict[str, Any], str]] = [
    ({"correction_prompt": ""}, "correction_prompt: got '', want a text"),
    ({"stage_steps": (1, 2)}, r"stage_steps: got \(1, 2\), want args.max_steps = 2 in all"),
    ({"stage_steps": (3, -1)}, r"stage_steps: got \(3, -1\), want two counts of steps"),
    ({"args": None}, "args: got none, want a GRPOConfig with max_steps"),
    ({"config": {"beta": 0.1}}, r"args.beta: got 0.1, want 0: the KL is in the return"),
    ({"attempts": 1}, "attempts: got 1, want 2 or more"),
    ({"kl": "exact"}, "kl: got 'exact', want k1 or k3"),
    ({"baseline": "batch"}, "baseline: got 'batch', want loo or mean"),
    ({"credit": "both"}, "credit: got 'both', want per_turn, total"),
    ({"beta2": -1.0}, "alpha, beta1, beta2: got"),
    ({"rollout_func": print}, "rollout_func: got one, want none: the trainer has its own"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(make: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


def test_rewards_out_of_range(run: Run) -> None:
    def tens(completions: list[str], **_: Any) -> list[float]:
        return [10.0] * len(completions)

    with pytest.raises(InputError, match=r"rewards: got \[10.0\], want numbers from 0 to 1"):
        run(reward_funcs=tens)


def test_a_small_bonus_warns_at_once(make: Run) -> None:
    with pytest.warns(RuntimeWarning, match="alpha: 0 does not pay for progress"):
        make(alpha=0.0)
