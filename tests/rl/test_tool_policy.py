"""A two-layer Llama that calls a real calculator, in a tree, and through TRL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.errors import InputError
from scoredraw.rl.rollout_tree import RolloutTree, first_visits, portool_advantages
from scoredraw.rl.tool_calls import CALCULATOR, ToolSandbox, format_limit
from scoredraw.rl.tool_policy import (
    OutcomeReward,
    PORToolAdvantage,
    ToolPolicy,
    ToolTreeRollout,
    answer_outcome,
    token_rows,
)
from scoredraw.token_sampling import token_logprobs

pytestmark = pytest.mark.contract

CALL = '<think>.</think><tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}'
QUESTIONS = {"2*3=": "6", "7-3=": "4"}


@pytest.fixture(scope="module")
def characters() -> Any:
    """A tokenizer with a token for each printable character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(marks)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    from tokenizers.decoders import Fuse

    tokenizer.backend_tokenizer.decoder = Fuse()
    return tokenizer


def tiny(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(characters: Any) -> Any:
    """The model after it has learned two dialogues with the calculator by heart, more or less."""
    model = tiny(characters)
    texts = [
        q + CALL.format(q[:-1]) + f"</tool_call>\n<tool_response>{a}</tool_response>\n"
        f"<think>.</think><answer>{a}</answer>"
        for q, a in QUESTIONS.items()
    ]
    ids = torch.tensor(characters(texts)["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ToolSandbox]:
    with ToolSandbox([CALCULATOR], seconds=5) as box:
        yield box


@pytest.fixture(scope="module")
def grown(taught: Any, characters: Any, sandbox: ToolSandbox) -> RolloutTree:
    policy = ToolPolicy(taught, characters, sandbox, max_tokens=110, max_length=400)
    prompts = [characters(q)["input_ids"] for q in QUESTIONS]
    return policy.rollout(prompts, 4, max_depth=3, rng=0, truths=list(QUESTIONS.values()))


def test_the_model_calls_the_tool_and_answers(grown: RolloutTree, characters: Any) -> None:
    t = grown.table
    assert t.length.max() <= 3
    right = np.flatnonzero((t.outcome == 1) & (t.length == 2))
    assert len(right) >= 1
    call, answer = (grown.tokens[s] for s in t.paths[right[0], :2])
    assert call.step.name == "calculator"
    assert call.result.ok
    assert characters.decode(call.told) == f"\n<tool_response>{call.result.text}</tool_response>\n"
    assert answer.step.answer == call.result.text
    assert answer.told == []
    limit = format_limit(0.95, 3)
    assert t.format_reward[t.paths[right[0], :2]].tolist() == [limit, limit]


def test_identical_steps_are_one(grown: RolloutTree) -> None:
    t = grown.table
    met = sorted(set(t.step))
    siblings = [(t.parent[s], tuple(grown.tokens[s].ids)) for s in met]
    assert len(set(siblings)) == len(siblings)
    assert len(met) < t.length.sum()  # something is shared


def test_rows_mask_the_tool(grown: RolloutTree, taught: Any, characters: Any) -> None:
    """Tool tokens count nowhere, and log-probabilities are the model's in that very context."""
    rows = token_rows(grown)
    t = grown.table
    for k in range(len(t.paths)):
        turns = [grown.tokens[s] for s in t.paths[k] if s >= 0]
        own = [i for turn in turns for i in turn.ids]
        assert rows.ids[k][rows.mask[k]].tolist() == own
        length = int(rows.ends[k][rows.step_mask[k]][-1]) + 1
        assert length == sum(len(turn.ids) + len(turn.told) for turn in turns)
        question = characters(list(QUESTIONS)[t.query[t.paths[k, 0]]])["input_ids"]
        want = token_logprobs(taught, question, rows.ids[k, :length].tolist())
        mask = rows.mask[k, :length].numpy()
        np.testing.assert_allclose(rows.logprobs[k, :length].numpy()[mask], want[mask], atol=1e-4)


def test_advantages_lie_on_their_steps(grown: RolloutTree) -> None:
    rows = token_rows(grown)
    A = portool_advantages(grown)
    spread = rows.spread(A)
    for k, path in enumerate(grown.paths):
        start = 0
        for j in range(int((path >= 0).sum())):
            n, told = (len(getattr(grown.tokens[path[j]], x)) for x in ("ids", "told"))
            part = spread[k, start : start + n + told]
            torch.testing.assert_close(part[:n], torch.full((n,), A[k, j], dtype=part.dtype))
            assert not part[n:].any()
            start += n + told
        assert not spread[k, start:].any()
    once = rows.spread(first_visits(grown).astype(float))
    tokens = sum(len(grown.tokens[s].ids) for s in set(grown.table.step))
    assert once.sum() == tokens


def test_a_model_that_knows_nothing(characters: Any, sandbox: ToolSandbox) -> None:
    """Noise is malformed, told so, scored and truncated; the same seed gives the same tree."""
    policy = ToolPolicy(tiny(characters), characters, sandbox, max_tokens=7)

    def grow() -> RolloutTree:
        return policy.rollout([[5, 6], [7]], 3, max_depth=3, rng=1, truths=[1, 2])

    tree = grow()
    t = tree.table
    assert t.outcome.tolist() == [0.0] * 6
    assert (t.length == 3).all()
    assert (t.format_reward[t.step] == -format_limit(0.95, 3)).all()
    turn = tree.tokens[0]
    assert "error: no block" in characters.decode(turn.told)
    assert turn.result is None
    assert [x.ids for x in grow().tokens] == [x.ids for x in tree.tokens]
    graded = ToolPolicy(policy.model, characters, sandbox, max_tokens=7, max_length=9, graded=True)
    short = graded.rollout([[5, 6]], 3, max_depth=3, rng=1, truths=[1])
    assert (short.table.length == 1).all()  # no room for a second step
    assert not portool_advantages(short).any()


def test_a_tool_that_raises(
    characters: Any, sandbox: ToolSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model reads what went wrong, and the step has the least format reward."""

    class Says:
        """In place of sampling: a call by one who does not know, then an answer."""

        texts = iter([[CALL.format("6/0") + "</tool_call>"] * 2, ["<answer>none</answer>"] * 2])

    policy = ToolPolicy(None, characters, sandbox)

    def turns(contexts: list[list[int]], rng: Any) -> list[Any]:
        texts = next(Says.texts)[: len(contexts)]
        ids = [np.array(characters(text)["input_ids"]) for text in texts]
        return [policy._turn(SimpleNamespace(ids=i, logprobs=0.0 * i)) for i in ids]

    monkeypatch.setattr(policy, "_turns", turns)
    tree = policy.rollout([[5]], 2, max_depth=2, rng=0, truths=[1])
    t, limit = tree.table, format_limit(0.95, 2)
    failed, answer = (tree.tokens[s] for s in t.paths[0])
    assert not failed.result.ok
    assert "error: ZeroDivisionError: division by zero" in characters.decode(failed.told)
    assert t.format_reward[t.paths[0]].tolist() == [-limit, -limit]  # no thought in the answer
    assert answer.step.answer == "none"
    assert t.outcome[0] == -1.0


def test_outcomes() -> None:
    for said, truth, want in (
        ("42", "42.0", 1), ("1,000", 1000, 1), ("Oslo", " oslo", 1), ("Oslo", "Bergen", -1),
        ("I can't answer this", "x", 0), ("I can\u2019t answer", "x", 0), ("nan", "nan", -1),
        ("7", None, -1), (None, None, 0), ("unanswerable", None, 0),
    ):  # fmt: skip
        assert answer_outcome(said, truth) == want, said
    reward = OutcomeReward()
    chat = [{"role": "assistant", "content": "<answer>1</answer><answer> 2 </answer>"}]
    assert reward(["", ""], [chat, "2"], answer=["2", "2"]) == [1.0, 0.0]
    assert reward([""], ["<answer>9</answer>"], answer=["2"], said=["2"]) == [1.0]
    broken = ("<answer>2</answer></answer>", "</answer><answer>2", "<answer>2</answer><answer>3")
    assert reward([""] * 3, broken, answer=["2"] * 3) == [1.0, 0.0, 1.0]
    began = time.process_time()
    assert reward([""], ["<answer>" * 100_000], answer=["2"]) == [0.0]
    assert time.process_time() - began < 1  # quadratic: minutes
    with pytest.raises(InputError, match="column: got 'answer'"):
        reward([""], ["2"])


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


def train(taught: Any, characters: Any, rollout: Any, tmp_path: Path, **options: Any) -> Any:
    import copy

    from datasets import Dataset
    from trl import GRPOConfig

    from scoredraw.rl.trainer import AdvantageGRPOTrainer

    rows = [{"prompt": q, "answer": a} for q, a in QUESTIONS.items()]
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=2,
        max_completion_length=400, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=1, save_strategy="no", learning_rate=1e-4, seed=3,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = AdvantageGRPOTrainer(
        model=copy.deepcopy(taught), reward_funcs=OutcomeReward(), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=characters, rollout_func=rollout,
        **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_training_with_trl(
    taught: Any, characters: Any, sandbox: ToolSandbox, tmp_path: Path
) -> None:
    """Two steps; the advantages that TRL trains on are those of the tree, row by row."""
    seen: list[Any] = []
    method = PORToolAdvantage(w_fork=0.5)
    rollout = ToolTreeRollout(sandbox, max_depth=3, rng=0, max_tokens=110, max_length=400)

    def advantages(rollouts: Any) -> torch.Tensor:
        found = method(rollouts)
        assert rollout.tree is not None
        t = rollout.tree.table
        first = rollout.tree.paths[:, 0]
        rows = [i for i, path in enumerate(rollouts.columns["step_path"]) if path]
        order = np.argsort(t.query[first], kind="stable")
        # outcomes come from the reward, after the rollout: give the tree what TRL was given
        known = RolloutTree.from_paths(
            [[int(s) for s in p if s >= 0] for p in t.paths[order]], rollouts.reward[rows].tolist(),
            dict(enumerate(t.format_reward)), t.query[first][order].tolist(),
        )  # fmt: skip
        want = portool_advantages(known, w_fork=0.5)
        tokens = token_rows(rollout.tree)
        spread = tokens.spread(want[np.argsort(order)])[order]
        torch.testing.assert_close(found[rows][:, : spread.shape[1]], spread)
        assert not found[rows][:, spread.shape[1] :].any()
        fillers = [i for i in range(len(found)) if i not in rows]
        assert not found[fillers].any()
        assert not rollouts.mask[fillers].any()
        seen.append(found)
        return found

    trainer = train(taught, characters, rollout, tmp_path, advantage_fn=advantages)
    assert len(seen) == 2
    assert trainer.state.global_step == 2
    assert trainer.model.training
    assert any(found.any() for found in seen)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(trainer.model.parameters(), taught.parameters(), strict=True)
    ]
    assert any(moved)


def test_refusals(characters: Any, sandbox: ToolSandbox, grown: RolloutTree) -> None:
    policy = ToolPolicy(None, characters, sandbox)
    rollouts: Any = SimpleNamespace(columns={"step_path": []})
    trainer: Any = SimpleNamespace(model=SimpleNamespace(training=True), num_generations=2)
    for message, call in (
        ("prompts: got none", lambda: policy.rollout([], 4)),
        ("prompts: got an empty one", lambda: policy.rollout([[]], 4)),
        ("truths: got 1", lambda: policy.rollout([[1], [2]], 4, truths=["a"])),
        ("n: got 1", lambda: policy.rollout([[1]], 1)),
        ("tree: got steps that are no turns",
         lambda: token_rows(RolloutTree.from_paths(["a"], [1]))),
        (r"rollouts: got no column \['step_ends'", lambda: PORToolAdvantage()(rollouts)),
        ("prompts: got 3", lambda: ToolTreeRollout(sandbox)(["a", "a", "b"], trainer)),
        ("prompts: got 2", lambda: ToolTreeRollout(sandbox)(["a", "b"], trainer)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
