"""Preference pairs from text to scores, and TRL's own trainer, on a tiny random model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from scoredraw.data_selection import preference_pairs  # noqa: E402
from scoredraw.data_selection.likelihood_displacement import (  # noqa: E402
    edit_distance_score,
    filter_by_score,
)
from scoredraw.data_selection.preference_pairs import (  # noqa: E402
    DisplacementTracker,
    ches_of_batch,
    ches_pairs,
    pair_batch,
    pair_log_probabilities,
    score_preference_dataset,
    tokenize_pairs,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.contract

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "twenty two"},
    {"prompt": "name a colour: ", "chosen": "blue", "rejected": "a dog"},
    {"prompt": "is it so? a", "chosen": "b, it is", "rejected": "bsolutely not, it is not so"},
    {"prompt": "x", "chosen": "same", "rejected": "same"},
]


def conversation(pair: dict[str, str]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {k: [{"role": roles[k], "content": text}] for k, text in pair.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, "ab" as one (so that tokens grow over the seam), and two special ones."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*letters, "ab"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def tiny(kind: str = "llama", window: int = 128) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # absolute positions, tied weights
        config = transformers.GPT2Config(
            vocab_size=260, n_positions=window, n_embd=16, n_layer=2, n_head=2
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=window,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────


def test_tokens_split_where_the_prompt_ends(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    for include_eos in (True, False):
        pairs = tokenize_pairs(tokenizer, PAIRS, include_eos=include_eos)
        for pair, text in zip(pairs, PAIRS, strict=True):
            for side in ("chosen", "rejected"):
                ids = pair["prompt_ids"] + pair[f"{side}_ids"]
                end = "<eos>" if include_eos else ""
                assert tokenizer.decode(ids) == text["prompt"] + text[side] + end
                assert (ids[-1] == eos) == include_eos
    # "a" + "b" is one token: the prompt is cut before it
    assert tokenizer.decode(pairs[2]["prompt_ids"]) == "is it so? "


def test_answers_that_end_already_get_no_second_end(tokenizer: Any) -> None:
    ended = [{**PAIRS[0], "chosen": "4<eos>"}]
    for include_eos in (True, False):
        ours = tokenize_pairs(tokenizer, ended, include_eos=include_eos)
        assert ours == tokenize_pairs(tokenizer, PAIRS[:1], include_eos=include_eos)


def test_conversations_end_as_the_template_ends_them(tokenizer: Any) -> None:
    chats = [conversation(pair) for pair in PAIRS[:2]]
    for include_eos, end in ((True, "<eos>\n"), (False, "")):
        pair = tokenize_pairs(tokenizer, chats, include_eos=include_eos)[1]
        assert tokenizer.decode(pair["prompt_ids"]) == "<|user|>name a colour: <eos>\n<|assistant|>"
        assert tokenizer.decode(pair["chosen_ids"]) == "blue" + end


def test_what_is_cut_is_flagged(tokenizer: Any) -> None:
    pairs = tokenize_pairs(tokenizer, PAIRS[:2], max_length=18)
    assert [pair["truncated"] for pair in pairs] == [False, True]
    assert len(pairs[1]["prompt_ids"]) + len(pairs[1]["rejected_ids"]) == 18
    scores = score_preference_dataset(tiny(), tokenizer, PAIRS[:2], max_length=18)
    assert scores["truncated"].tolist() == [False, True]


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def by_hand(model: Any, pair: dict[str, Any]) -> dict[str, float]:
    """The formulas on one pair at a time, from all hidden states, without padding."""
    sums = []
    for side in ("chosen", "rejected"):
        ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
        with torch.no_grad():
            h = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        first = len(pair["prompt_ids"]) - 1
        sums.append(h[first : first + len(pair[f"{side}_ids"])])
    plus, minus = sums
    s, t, m, k = plus.sum(0), minus.sum(0), plus.mean(0), minus.mean(0)
    return {
        "ches": float(s @ t - s @ s),
        "ln_ches": float(m @ k - m @ m),
        "last_hidden": float(plus[-1] @ minus[-1]),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("include_eos", [True, False])
def test_scores_are_the_formulas_whatever_the_batch(
    tokenizer: Any, kind: str, include_eos: bool
) -> None:
    model = tiny(kind).train()  # dropout must not matter, and the mode must come back
    seen: list[tuple[int, int]] = []
    pairs = tokenize_pairs(tokenizer, PAIRS, include_eos=include_eos)
    want = [by_hand(model.eval(), pair) for pair in pairs]
    model.train()
    for size in (1, 3, 8):
        scores = score_preference_dataset(
            model, tokenizer, PAIRS, batch_size=size, include_eos=include_eos,
            progress=lambda done, n: seen.append((done, n)),
        )  # fmt: skip
        for name in want[0]:
            assert scores[name].dtype == np.float64
            np.testing.assert_allclose(scores[name], [w[name] for w in want], rtol=2e-4, atol=1e-4)
        chosen, rejected = ([p[f"{side}_ids"] for p in pairs] for side in ("chosen", "rejected"))
        assert scores["edit"].tolist() == edit_distance_score(chosen, rejected).tolist()
        assert scores["ches"][3] == pytest.approx(0, abs=1e-3)  # equal answers, by padding alone
        assert seen[-1] == (4, 4)
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(tokenizer: Any, kind: str) -> None:
    model, batch = tiny(kind), pair_batch(tokenize_pairs(tokenizer, PAIRS), 3)
    moved = {}
    for name, table in batch.items():
        real = batch["attention_mask"].sum(1).tolist()
        rows = [torch.roll(row, len(row) - n) for row, n in zip(table, real, strict=True)]
        moved[name] = torch.stack(rows)
    right, left = ches_of_batch(model, batch), ches_of_batch(model, moved)
    for name, values in right.items():
        torch.testing.assert_close(left[name], values, rtol=1e-4, atol=1e-3)
    for a, b in zip(*(pair_log_probabilities(model, b) for b in (batch, moved)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_are_the_models(tokenizer: Any, kind: str) -> None:
    model, pairs = tiny(kind).eval(), tokenize_pairs(tokenizer, PAIRS)
    found = pair_log_probabilities(model, pair_batch(pairs))
    for values, side in zip(found, ("chosen", "rejected"), strict=True):
        for value, pair in zip(values, pairs, strict=True):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            labels = ids.clone()
            labels[:, : len(pair["prompt_ids"])] = -100
            loss = model(ids, labels=labels).loss.item()
            assert value.item() == pytest.approx(-loss * len(pair[f"{side}_ids"]), rel=1e-4)


def test_the_edit_distance_alone_needs_no_forward_pass(tokenizer: Any) -> None:
    model = tiny()
    model.forward = None
    scores = score_preference_dataset(model, tokenizer, PAIRS, measures=["edit"])
    assert list(scores) == ["edit", "truncated"]


def test_texts_and_a_models_name(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(window=24)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    columns = [[pair[name] for pair in PAIRS[:2]] for name in ("prompt", "chosen", "rejected")]
    with pytest.warns(UserWarning, match="1 of 2 pairs are longer"):
        longer = ches_pairs(*columns[:2], [*columns[2][:1], "z" * 30], model=str(tmp_path))
    assert longer.shape == (2,)
    scores = ches_pairs(*columns, model=str(tmp_path))
    want = score_preference_dataset(model, tokenizer, PAIRS[:2], measures=["ln_ches"])["ln_ches"]
    np.testing.assert_allclose(scores, want, rtol=1e-5)
    wide = tiny()
    monkeypatch.setattr("scoredraw.small_models.small_model", lambda: (wide, tokenizer))
    chat = ches_pairs(*columns, measure="ches", chat=True)
    chats = [conversation(pair) for pair in PAIRS[:2]]
    want = score_preference_dataset(wide, tokenizer, chats, measures=["ches"])["ches"]
    np.testing.assert_allclose(chat, want)


# ── TRL ──────────────────────────────────────────────────────────────────────────────────────────


def dpo_trainer(tokenizer: Any, folder: Path, data: Any, *trackers: Any, **options: Any) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 0,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "bf16": False,
    }  # fmt: skip
    peft_config = options.pop("peft_config", None)
    return trl.DPOTrainer(
        model=tiny(),
        ref_model=None if peft_config else tiny(),
        args=trl.DPOConfig(str(folder), **{**arguments, **options}),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=list(trackers),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_and_batches_are_trls(tokenizer: Any, tmp_path: Path, chat: bool) -> None:
    data = [conversation(pair) for pair in PAIRS] if chat else PAIRS
    trainer = dpo_trainer(tokenizer, tmp_path, data)
    ours = tokenize_pairs(tokenizer, data)
    for mine, theirs in zip(ours, trainer.train_dataset, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert mine[name] == theirs[name]
    batch = trainer.data_collator(list(trainer.train_dataset))
    for name, table in pair_batch(ours, tokenizer.pad_token_id).items():
        assert torch.equal(table, batch[name]), name
    scores = score_preference_dataset(trainer.model, tokenizer, data)
    for name, values in ches_of_batch(trainer.model, batch).items():
        np.testing.assert_allclose(values.numpy(), scores[name], rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_real_run_is_measured(tokenizer: Any, tmp_path: Path, lora: bool) -> None:
    held_out = tokenize_pairs(tokenizer, PAIRS[2:])
    tracker = DisplacementTracker(every=1)
    other = DisplacementTracker(held_out, batch_size=1)
    options: dict[str, Any] = {}
    if lora:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = dpo_trainer(tokenizer, tmp_path, PAIRS[:3], tracker, other, **options)
    trainer.train()
    assert tracker.steps == [0, 1, 2]
    assert other.steps == [0, 2]
    assert tracker.chosen.shape == tracker.rejected.shape == (3, 3)
    start = pair_log_probabilities(tiny(), pair_batch(tokenize_pairs(tokenizer, PAIRS[:3])))
    np.testing.assert_allclose(tracker.chosen[0], start[0].numpy(), rtol=1e-4)
    end = pair_log_probabilities(trainer.model, pair_batch(held_out))
    np.testing.assert_allclose(other.chosen[-1], end[0].cpu().numpy(), rtol=1e-4)
    np.testing.assert_allclose(
        other.margin_gain(), (end[0] - end[1]).numpy() - (other.chosen[0] - other.rejected[0]),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert np.abs(tracker.displacement()).max() > 0  # something moved
    np.testing.assert_array_equal(tracker.displacement(), tracker.chosen[-1] - tracker.chosen[0])


def test_a_filtered_data_set_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(PAIRS)
    scores = score_preference_dataset(tiny(), tokenizer, data, measures=["ln_ches"])["ln_ches"]
    kept = filter_by_score(scores, 0.5).take(data)
    assert kept["chosen"] == [PAIRS[i]["chosen"] for i in sorted(np.argsort(scores)[:2])]
    trainer = dpo_trainer(tokenizer, tmp_path, list(kept), loss_type=["sigmoid", "sft"])
    assert trainer.train().global_step == 2


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────

PAIR = PAIRS[0]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset: got no pair"),
        ([PAIR, {**PAIR, "chosen": ""}], {}, "chosen: got an empty answer in row 1"),
        ([{**PAIR, "rejected": "<eos>"}], {}, "rejected: got an empty answer in row 0"),
        ([conversation({**PAIR, "chosen": ""})], {}, "chosen: got an empty answer in row 0"),
        ([{**PAIR, "prompt": ""}], {}, "prompt: got no token in row 0"),
        ([{"prompt": "a", "chosen": "b"}], {}, "dataset: got row 0 without 'rejected'"),
        ([PAIR, "text"], {}, "dataset: got str in row 1"),
        ([{**PAIR, "chosen": 4}], {}, "dataset: got int, str in row 0"),
        ([PAIR, conversation(PAIR)], {}, "dataset: got texts and conversations"),
        ([PAIR], {"max_length": 4}, "chosen: got an empty answer in row 0"),
        ([PAIR], {"max_length": 0}, "max_length: got 0"),
        ([PAIR], {"batch_size": 0}, "batch_size: got 0"),
        ([PAIR], {"measures": ["chess"]}, r"measures: got \['chess'\]"),
        ([PAIR], {"measures": []}, "measures: got"),
    ],
)
def test_bad_data(tokenizer: Any, dataset: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_preference_dataset(tiny(), tokenizer, dataset, **options)


def test_bad_tokenizers_and_models(tokenizer: Any, tmp_path: Path) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="tokenizer: got no eos_token"):
        tokenize_pairs(bare, [PAIR])
    with pytest.raises(InputError, match="tokenizer: got no chat template"):
        tokenize_pairs(bare, [conversation(PAIR)])
    with pytest.raises(InputError, match="model: cannot load"), warnings.catch_warnings():
        ches_pairs(["a"], ["b"], ["c"], model=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="chosen: got 1 texts, want 2"):
        ches_pairs(["a", "b"], ["b"], ["c", "d"])
    with pytest.raises(InputError, match="measure: got 'chess'"):
        ches_pairs(["a"], ["b"], ["c"], measure="chess")  # type: ignore[arg-type]
    broken = tiny()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match="chosen_hidden: got NaN"):
        score_preference_dataset(broken, tokenizer, [PAIR])


def test_bad_batches(tokenizer: Any) -> None:
    batch = pair_batch(tokenize_pairs(tokenizer, PAIRS))
    for wrong, message in (
        ({k: v for k, v in batch.items() if k != "completion_mask"}, "got none of completion_mask"),
        ({k: v[:3] for k, v in batch.items()}, "batch: got shapes"),
        ({**batch, "attention_mask": batch["attention_mask"][:, :2]}, "batch: got shapes"),
        ({**batch, "completion_mask": batch["attention_mask"]}, "no prompt token in examples"),
    ):
        with pytest.raises(InputError, match=message):
            ches_of_batch(tiny(), wrong)


def test_bad_trackers(tokenizer: Any) -> None:
    for options, message in (({"every": 0}, "every: got 0"), ({"batch_size": 0}, "batch_size")):
        with pytest.raises(InputError, match=message):
            DisplacementTracker(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs: got none"):
        DisplacementTracker().look(tiny(), 0)
    tracker = DisplacementTracker(tokenize_pairs(tokenizer, [PAIR]))
    tracker.look(tiny(), 0)
    with pytest.raises(InputError, match="step: got 0 after 0"):
        tracker.look(tiny(), 0)


def test_learned_prompt_tokens_are_refused(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny(), config)
    with pytest.raises(InputError, match="model: got one with learned prompt tokens"):
        ches_of_batch(model, pair_batch(tokenize_pairs(tokenizer, [PAIR])))
    assert preference_pairs.MEASURES[0] == "ches"
