"""The reward's laws, its text rules, encoders beside a plain computation, a TRL run, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from scoredraw.errors import InputError
from scoredraw.rl.relevance_reward import (
    ABLATIONS,
    MeanPooledEncoder,
    R3Reward,
    length_incentive,
    prepared_query,
    prepared_response,
    proxy_gold_monotonicity,
    sentence_transformer_embed,
    trigram_ratio,
    words,
)

pytestmark = pytest.mark.property

TEXTS = st.lists(st.sampled_from(["a", "b", "cat", "dog", ",", "sat"]), max_size=12).map(" ".join)


def letters(texts: list[str]) -> Any:
    """How often each of six letters, less 1: products of both signs."""
    return np.array([[text.count(c) - 1.0 for c in "abcdgt"] for text in texts])


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


@given(TEXTS)
def test_repetition_is_one_iff_trigrams_differ(text: str) -> None:
    tokens = words(text)
    trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    ratio = trigram_ratio(text)
    assert 0 < ratio <= 1
    assert (ratio == 1) == (len(set(trigrams)) == len(trigrams))
    assert length_incentive(text) == len(tokens) / 100


@pytest.mark.parametrize("n", [3, 10, 41])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_saying_it_again_is_worth_little(n: int, k: int) -> None:
    """n words said k times have RP = n / (k n - 2): LI · RP grows by k n / (k n - 2), nearly 1."""
    text = " ".join(f"w{i}" for i in range(n))
    again = " ".join([text] * k)
    assert trigram_ratio(again) == pytest.approx((n if k > 1 else n - 2) / (k * n - 2))
    if k > 1:
        grown = length_incentive(again) * trigram_ratio(again) / length_incentive(text)
        assert grown == pytest.approx(k * n / (k * n - 2))


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.booleans()), min_size=1, max_size=6), st.data())
def test_the_formula_a_row_at_a_time(rows: list[Any], data: Any) -> None:
    """Every switch on and off, both kinds of questions, in any order of the batch."""
    off = data.draw(st.sets(st.sampled_from(["length", "repetition", "relevance", "branching"])))
    prompts, responses, references, kinds = (list(column) for column in zip(*rows, strict=True))
    references = [text or "a" for text in references]
    names = ["OPENENDED" if open_ended else "CONSTRAINED" for open_ended in kinds]
    reward = R3Reward(letters, 256, (0.5, 3.0), off)
    found = reward(prompts, responses, qtype=names, reference=references)
    for i, text in enumerate(responses):
        branch = not kinds[i] and not off & {"branching", "relevance"}
        x, y = letters([references[i] if branch else prompts[i], text])
        r = float(x @ y)
        want = (r - 0.5) / 2.5 * 2.56 if branch else r
        want = 1.0 if "relevance" in off else want
        want *= 1.0 if branch or "length" in off else len(words(text)) / 100
        want *= 1.0 if "repetition" in off else trigram_ratio(text)
        assert found[i] == pytest.approx(want if text else 0.0)
    order = data.draw(st.permutations(range(len(rows))))
    moved = reward(
        *([column[i] for i in order] for column in (prompts, responses)),
        qtype=[names[i] for i in order],
        reference=[references[i] for i in order],
    )
    assert moved == pytest.approx([found[i] for i in order])  # fmt: skip


def test_linear_in_relevance_and_its_options() -> None:
    scale = [1.0]

    def embed(texts: list[str]) -> Any:
        return np.array([[scale[0] if text == "x" else 1.0] for text in texts])

    def call(**options: Any) -> list[float | None]:
        reward = R3Reward(embed, 350, **options)
        return reward(["x"] * 2, ["a b"] * 2, qtype=["OPENENDED", "CONSTRAINED"],
                      reference=[None, "x"])  # fmt: skip

    for r in (1.0, -2.0, 5.0):
        scale[0] = r
        assert call() == pytest.approx([0.02 * r, r])
        assert call(clip=True) == pytest.approx([0.02 * r, min(max(r, 0), 3.5)])
        assert call(clamp_relevance=0.0) == pytest.approx([0.02 * max(r, 0), max(r, 0)])
        assert call(interp_in=(0, 1)) == pytest.approx([0.02 * r, 3.5 * r])


def test_branching_off_needs_no_types() -> None:
    for arm in set(ABLATIONS) - {"R3"}:
        R3Reward(letters, off=ABLATIONS[arm])(["a"], ["a b"])
    assert R3Reward(letters, off=ABLATIONS["LI"])(["a"], ["a b"]) == [0.02]


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


def test_empty_responses_are_worth_nothing() -> None:
    """In both branches, also when nothing is left before a stop string, whatever is left out."""
    empty = ["", "  \n", "### Response: a cat"]
    for kind in ("OPENENDED", "CONSTRAINED"):
        for arm in ABLATIONS.values():
            reward = R3Reward(letters, off=arm)
            said = reward(["a"] * 3, empty, qtype=[kind] * 3, reference=["a"] * 3)
            assert said == [0.0] * 3
    assert trigram_ratio("") == 1.0
    assert R3Reward(letters)([], [], qtype=[], reference=[]) == []


def test_role_names_are_no_patterns() -> None:
    """The released code makes a regular expression of them: "[INST]" would match one letter."""
    roles = ("[INST]", "[/INST]", "(user)*")
    assert prepared_query("[INST] Is IN  a state?\n(user)* [/INST]", roles) == "Is IN a state?"
    assert prepared_response("N is a letter. [INST] more", roles) == "N is a letter."
    reward = R3Reward(letters, off=ABLATIONS["LI"], roles=roles)
    assert reward(["a"], ["one two [/INST] three"]) == [0.02]


def test_messages_and_tokens_of_ones_own() -> None:
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "a cat"}]
    said = [{"role": "assistant", "content": "a cat sat"}]
    reward = R3Reward(letters, off="branching")
    assert reward([chat], [said]) == reward(["a cat"], ["a cat sat"])
    by_letter = R3Reward(letters, off=ABLATIONS["LI"], tokenize=list)
    assert by_letter(["a"], ["東京都"]) == [0.03]
    assert words("東京都") == ["東京都"]


def test_each_text_is_embedded_once_and_only_where_it_counts() -> None:
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> Any:
        asked.append(texts)
        return csr_array(letters(texts))

    reward = R3Reward(embed)
    prompts, said = ["a cat", "a cat", "a dog"], ["b", "c", "b"]
    kinds, gold = ["OPENENDED", "OPENENDED", "CONSTRAINED"], [None, None, "dog bag"]
    found = reward(prompts, said, qtype=kinds, reference=gold)
    assert asked == [["a cat", "dog bag", "b", "c"]]
    dense = R3Reward(letters)(prompts, said, qtype=kinds, reference=gold)
    tensors = R3Reward(lambda texts: torch.tensor(letters(texts)))
    assert found == dense == tensors(prompts, said, qtype=kinds, reference=gold)


# ── encoders ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random BERT of two layers with a token a letter and [CLS], [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz "]
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(names), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32, initializer_range=0.5,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_the_mean_over_real_tokens(encoder: str) -> None:
    """Texts of several lengths together as each alone; a long one loses its beginning."""
    embed = MeanPooledEncoder.from_pretrained(encoder, batch_size=2)
    texts = ["abc", "a", "zzzzz" + "abcdefghijklmn", "abcdefghijklmn", ""]
    found = embed(texts)
    assert found.shape == (5, 8)
    assert np.allclose(found[2], found[3], atol=1e-5)
    for text, vector in zip(texts, found, strict=True):
        ids = [2, *[4 + "abcdefghijklmnopqrstuvwxyz ".index(c) for c in text[-14:]], 3]
        with torch.no_grad():
            states = embed.model(torch.tensor([ids])).last_hidden_state[0]
        assert np.allclose(vector, states.mean(0).numpy(), atol=1e-5)
    assert not np.allclose(np.linalg.norm(found, axis=1), 1, atol=0.1)
    assert R3Reward(embed, off="branching")(["abc"], ["abc"])[0] == pytest.approx(
        0.01 * float(found[0] @ found[0]), rel=1e-4
    )


def test_sentence_transformers(encoder: str) -> None:
    """Mean pooling of the same model, with its normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    core = Transformer(encoder)
    unit = SentenceTransformer(modules=[core, Pooling(8, "mean"), Normalize()], device="cpu")
    texts = ["abc", "hello"]
    found = sentence_transformer_embed(unit)(texts)
    plain = MeanPooledEncoder.from_pretrained(encoder)(texts)
    assert np.allclose(found, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)


# ── the monotonicity check, a run, bad input ────────────────────────────────────────────────────


def test_monotonicity() -> None:
    rising = proxy_gold_monotonicity([1, 2, 3, 5, 8], [0.1, 0.2, 0.25, 0.3, 9])
    assert rising.rho == pytest.approx(1)
    assert rising.p < 1e-6
    assert proxy_gold_monotonicity([1, 2, 3], [3, 2, 1]).rho == pytest.approx(-1)
    assert all(map(math.isnan, proxy_gold_monotonicity([1, 2, 3], [2, 2, 2])))


def test_a_trl_run(letters: Any, new_policy: Any, grpo_config: Any) -> None:
    """Columns arrive by name, and the parts are logged."""
    from datasets import Dataset
    from trl import GRPOTrainer

    rows = [{"prompt": f"{a}+{a}=", "qtype": ["OPENENDED", "CONSTRAINED"][a % 2],
             "reference": str(2 * a)} for a in range(8)]  # fmt: skip

    def embed(texts: list[str]) -> Any:
        return np.array([[text.count(c) for c in "0123456789=+"] for text in texts])

    trainer = GRPOTrainer(
        model=new_policy(), args=grpo_config(), train_dataset=Dataset.from_list(rows),
        processing_class=letters, reward_funcs=R3Reward(embed, max_new_tokens=5),
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if "rewards/r3_reward/mean" in row]
    assert len(logs) == 2
    assert all(math.isfinite(row["rewards/r3_reward/mean"]) for row in logs)
    assert all("r3_reward/repetition" in row for row in logs)


def call(**given: Any) -> Any:
    """A reward of one row, with what the test changes."""
    columns = {"prompts": ("a",), "said": ("b",), "kinds": ("OPENENDED",), "gold": (None,)}
    prompts, said, kinds, gold = (given.pop(name, value) for name, value in columns.items())
    embed = given.pop("embed", letters)
    return R3Reward(embed, **given)(prompts, said, qtype=kinds, reference=gold)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"prompts": ("a", "b")}, "prompts"),
        ({"kinds": ("OPENENDED",) * 2}, "qtype"),
        ({"kinds": ("open",)}, "qtype"),
        ({"kinds": None}, "qtype"),
        ({"gold": (None, None)}, "reference"),
        ({"kinds": ("CONSTRAINED",)}, "reference"),
        ({"kinds": ("CONSTRAINED",), "gold": None}, "reference"),
        ({"kinds": ("CONSTRAINED",), "gold": (" ",)}, "reference"),
        ({"said": (None,)}, "completion"),
        ({"said": (3,)}, "completion"),
        ({"prompts": (None,)}, "prompts"),
        ({"prompts": ([{"role": "system", "content": "x"}],)}, "prompts"),
        ({"embed": lambda texts: np.ones((1, 2))}, "embed"),
        ({"embed": lambda texts: np.ones(len(texts))}, "embed"),
        ({"embed": lambda texts: np.full((len(texts), 2), np.nan)}, "embed"),
        ({"embed": lambda texts: np.full((len(texts), 2), np.inf)}, "embed"),
        ({"embed": None}, "embed"),
        ({"off": ("lenght",)}, "off"),
        ({"off": "everything"}, "off"),
        ({"interp_in": (1.0, 1.0)}, "interp_in"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"clamp_relevance": math.nan}, "clamp_relevance"),
        ({"stop": ("",)}, "stop"),
        ({"roles": "[INST]"}, "roles"),
    ],
)
def test_refuses(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"^{named}"):
        call(**bad)


@pytest.mark.parametrize(
    ("proxy", "gold", "named"),
    [
        ([1, 2], [1, 2], "proxy"),
        ([1, 2, 3], [1, 2], "gold"),
        ([1, 2, math.nan], [1, 2, 3], "proxy"),
    ],
)
def test_monotonicity_refuses(proxy: Any, gold: Any, named: str) -> None:
    with pytest.raises(InputError, match=rf"^{named}"):
        proxy_gold_monotonicity(proxy, gold)


ITEMS = Path(__file__).parents[3] / "shared" / "data" / "14-alpacafarm-val" / "val800.json"


def test_real_instructions_are_read() -> None:
    """No instruction makes the text rules fail, and none of its answers is cut to nothing."""
    if not ITEMS.is_file():
        pytest.skip("AlpacaFarm may not be shipped: it lies beside a checkout only")
    items = json.loads(ITEMS.read_text())
    said = [item["output"] for item in items]
    reward = R3Reward(letters)
    found = reward.factors([item["input"] for item in items], said,
                           [item["qtype"] for item in items], said)  # fmt: skip
    assert found.constrained.sum() == 422
    assert not found.empty.any()
    assert (found.repetition > 0).all()
