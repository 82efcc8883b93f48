"""Models of transformers in this process: a tiny random Llama, and stories15M where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.models import (
    Completion,
    SamplingModel,
    ScoringModel,
    TextModel,
    TransformersModel,
)
from scoredraw.small_models import stories_model

pytestmark = pytest.mark.contract

pytest.importorskip("transformers", reason="the extra language is not installed")

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?"}]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama()


def tiny_llama(window: int = 64) -> tuple[Any, Any]:
    """A random Llama of two layers that reads bytes, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=window,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def test_log_probabilities_are_those_of_the_next_token(tiny: tuple[Any, Any]) -> None:
    import torch

    model = TransformersModel(*tiny)
    logprobs = model.next_token_logprobs(ASK[1:], "[[")
    assert logprobs.dtype == np.float64
    assert logprobs.shape == (258,)
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-12)
    assert isinstance(model, TextModel)
    labels = model.label_logprobs(ASK[1:], ["A", "b"], "[[")
    np.testing.assert_array_equal(labels, logprobs[tiny[1].convert_tokens_to_ids(["A", "b"])])
    text = model.prompt(ASK[1:], "[[")
    assert text == "user: Which one?\nassistant: [["  # without a chat template: role: content
    assert model.count_tokens(ASK[1:], "[[") == len(text)
    ids = torch.tensor([tiny[1](text)["input_ids"]])
    with torch.no_grad():
        logits = tiny[0](ids).logits[0, -1].double()
    np.testing.assert_allclose(logprobs, torch.log_softmax(logits, -1).numpy(), atol=1e-12)


def test_greedy_replies_follow_the_log_probabilities(tiny: tuple[Any, Any]) -> None:
    import torch

    model = TransformersModel(*tiny, max_new_tokens=4)
    given, new = tiny[1](model.prompt(ASK[1:]))["input_ids"], []
    while len(new) < 4 and 1 not in new:  # the same, a token at a time
        with torch.no_grad():
            new.append(int(tiny[0](torch.tensor([given + new])).logits[0, -1].argmax()))
    reply = model.ask(ASK[1:])
    assert reply == tiny[1].decode(new, skip_special_tokens=True)
    assert reply == model.ask(ASK[1:])


def test_a_chat_template_is_used_where_there_is_one() -> None:
    _, tokenizer = tiny_llama()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = TransformersModel(tiny_llama()[0], tokenizer)
    assert model.prompt(ASK, "[[") == "<system>Be brief.<user>Which one?<assistant>[["


def test_a_prompt_beyond_the_window_is_refused(tiny: tuple[Any, Any]) -> None:
    model = TransformersModel(*tiny, max_new_tokens=8)
    long = [{"role": "user", "content": "word " * 20}]
    with pytest.raises(InputError, match=r"^messages: got \d+ tokens .*at most 64, which"):
        model.ask(long)
    with pytest.raises(InputError, match=r"^messages: "):
        model.next_token_logprobs(long)
    with pytest.raises(InputError, match=r"^max_new_tokens: got 0"):
        TransformersModel(*tiny, max_new_tokens=0)


# ---- samples and scores --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> TransformersModel:
    try:
        return TransformersModel(*stories_model())
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_the_protocols() -> None:
    model = TransformersModel(None, None)
    assert isinstance(model, TextModel)
    assert isinstance(model, SamplingModel)
    assert isinstance(model, ScoringModel)
    assert not isinstance(object(), SamplingModel | ScoringModel)
    assert np.isnan(Completion("x").logprob)


def test_samples_are_those_of_the_batch_and_of_the_seed(tiny: tuple[Any, Any]) -> None:
    model = TransformersModel(tiny[0].double(), tiny[1], max_new_tokens=6)
    prompts = ["One", "a longer prompt", ASK[1:]]
    together = model.sample_all(prompts, 3, seed=4)
    assert [len(some) for some in together] == [3, 3, 3]
    for i, prompt in enumerate(prompts):
        (alone,) = model.sample_all([prompt], 3, seed=4, first=i)
        assert [c.tokens for c in alone] == [c.tokens for c in together[i]]
    assert [c.text for c in model.sample(prompts[0], 3, seed=4)] == [c.text for c in together[0]]
    for c in (c for some in together for c in some):
        assert c.logprobs is not None
        assert len(c.logprobs) == len(c.tokens) <= 6
        assert c.finished == (c.tokens[-1] == 1)
    assert model.sample_all([], 2) == []
    greedy = model.sample(ASK[1:], temperature=0)[0]
    assert greedy.text == model.ask(ASK[1:])
    tiny[0].float()


def test_the_score_of_a_text_is_that_of_its_tokens(tiny: tuple[Any, Any]) -> None:
    model = TransformersModel(*tiny)
    text = "né."  # four bytes, so four tokens
    scored = model.score(ASK[1:], text, end=True)
    assert scored.shape == (5,)
    ids = [*tiny[1](text)["input_ids"], 1]
    given = tiny[1](model.prompt(ASK[1:]))["input_ids"]
    for t, token in enumerate(ids):
        start = tiny[1].decode(ids[:t]) if t != 2 else None  # two bytes of é are no text
        if start is not None:
            want = model.next_token_logprobs(ASK[1:], start)[token]
            assert scored[t] == pytest.approx(want, abs=1e-5)
    assert model.score(ASK[1:], "").shape == (0,)
    assert len(given) + 5 < 64


def test_a_sample_scores_as_it_was_sampled(stories: TransformersModel) -> None:
    """Its words belong to the text before: on their own they would be other tokens."""
    prompt, alike = "Once upon a time", 0
    for c in stories.sample(prompt, 12, max_tokens=12, temperature=0.8, seed=0):
        assert not c.finished
        together = stories.tokenizer(prompt + c.text)["input_ids"]
        whole = [*stories.tokenizer(prompt)["input_ids"], *c.tokens]
        assert stories.tokenizer.decode(whole, skip_special_tokens=True).lstrip() == prompt + c.text
        if together == whole:  # the tokens that the text has by itself: nearly always
            alike += 1
            np.testing.assert_allclose(stories.score(prompt, c.text), c.logprobs, atol=1e-3)
    assert alike >= 8
    assert len(stories.score(prompt, ", there was")) == 3


def test_a_completion_that_merges_with_the_prompt_is_scored_as_it_would_be_said(
    stories: TransformersModel,
) -> None:
    """ "lit" + "tle" is one token together: the prompt's tokens stay, the rest is spelled."""
    own = stories._continuation("a lit", "tle")
    assert stories.tokenizer.decode([*stories.tokenizer("a lit")["input_ids"], *own],
                                    skip_special_tokens=True).lstrip() == "a little"  # fmt: skip
    assert stories.score("a lit", "tle").shape == (len(own),)


# ---- stop strings --------------------------------------------------------------------------------


class Saying:
    """A model that says what it is told to, whatever comes: a causal model that counts."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        import torch

        torch.manual_seed(0)
        self.inner = tiny_llama()[0]
        self.inner.resize_token_embeddings(vocabulary)
        self.config, self.generation_config = self.inner.config, None
        self.ids, self.parameters = ids, self.inner.parameters

    def __call__(self, **inputs: Any) -> Any:
        import torch

        out = self.inner(**inputs)
        position = int(inputs["position_ids"].max())
        begun = position - self.length + 1
        out.logits = torch.full_like(out.logits, -50.0)
        out.logits[..., self.ids[min(begun, len(self.ids) - 1)]] = 50.0
        return out

    length = 1


def say(tokenizer: Any, text: str, stop: list[str], prompt: str = "x") -> Completion:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = Saying(ids, len(tokenizer))
    model.length = len(tokenizer(prompt)["input_ids"])
    return TransformersModel(model, tokenizer).sample(prompt, max_tokens=len(ids), stop=stop)[0]


@pytest.mark.parametrize(
    ("text", "stop", "left", "used"),
    [("one two three", ["two"], "one ", 7),  # over three tokens of one byte each
     ("one two three", ["three", "e t"], "on", 5), ("one two", ["zero"], "one two", 7),
     ("ab\n\nQ: c", ["\n\nQ:"], "ab", 6), ("naïve cafe", ["ï"], "na", 4),
     ("日本語です", ["語"], "日本", 9), ("日本語です", ["本語"], "日", 9), ("aé́b", ["́"], "aé", 5),
     ("xx", ["x"], "", 1)],
)  # fmt: skip
def test_stop_strings_over_several_tokens_and_bytes(
    tiny: tuple[Any, Any], text: str, stop: list[str], left: str, used: int
) -> None:
    made = say(tiny[1], text, stop)
    assert made.text == left
    assert len(made.tokens) == used  # it ended when the string was complete, not before
    assert made.finished == (left != text)


@pytest.mark.parametrize("before", ["", "鑫" * 9, "ab 鑫 c", "鑫😀鑫"])
@pytest.mark.parametrize("stop", ["龘", "龘!", "🙂", " z", "\n"])
def test_stop_strings_of_a_tokenizer_that_falls_back_on_bytes(
    stories: TransformersModel, before: str, stop: str
) -> None:
    """A decoder that spoils all neighbouring bytes when it begins within a character."""
    assert len(stories._ids("a鑫龘😀🙂")) == 1 + 3 + 3 + 4 + 4  # none has a token of its own
    made = say(stories.tokenizer, f"{before}{stop} and more", [stop])
    assert made.text.strip() == before.strip()
    assert made.finished
    assert len(made.tokens) == len(stories._ids(before + stop))  # not one more


def test_a_first_blank_belongs_to_the_text() -> None:
    """Many decoders drop the first blank of what they are given: of a reply it is part."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁", "▁one", "▁two", "▁three", "one"]
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.decode([4, 5]) == "two three"
    assert say(tokenizer, "two three", [], prompt="one").text == " two three"
    assert say(tokenizer, "two three", [" three"], prompt="one").text == " two"
    stopped = say(tokenizer, "two three one", [" two"], prompt="one")
    assert (stopped.text, len(stopped.tokens)) == ("", 1)


# ---- bad input -----------------------------------------------------------------------------------


def test_a_text_begins_with_its_special_token_and_messages_with_the_templates() -> None:
    from tokenizers.processors import TemplateProcessing

    network, tokenizer = tiny_llama()
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    tokenizer.chat_template = "<unk>{% for m in messages %}{{ m.content }}{% endfor %}"
    model = TransformersModel(network, tokenizer)
    assert model.prompt_tokens("ab")[:1] == [0]
    assert model.prompt_tokens(ASK[1:]).count(0) == 1
    said = model.prompt_tokens(model.text_of(ASK[1:]))
    assert said == model.prompt_tokens(ASK[1:])  # not twice


def test_bad_samples(tiny: tuple[Any, Any]) -> None:
    model = TransformersModel(*tiny)
    with pytest.raises(InputError, match=r"^prompt: got 70 tokens with the reply, want at most 64"):
        model.sample("x" * 60, max_tokens=10)
    with pytest.raises(InputError, match=r"^prompt: got 66 tokens"):
        model.score("x" * 60, "y" * 6)
    with pytest.raises(InputError, match=r"^prompt: got no tokens, want at least one"):
        model.sample("", max_tokens=10)
    with pytest.raises(InputError, match=r"^stop: got an empty string"):
        model.sample("x", max_tokens=10, stop=[""])
    with pytest.raises(InputError, match=r"^stop: got '\\n', want a list"):
        model.sample("x", max_tokens=10, stop="\n")
    with pytest.raises(InputError, match=r"^labels: got 'AB', which is several tokens"):
        model.label_logprobs(ASK[1:], ["AB"])
    tokenizer = tiny_llama()[1]
    tokenizer.eos_token = None
    endless = TransformersModel(type("Model", (), {"generation_config": None})(), tokenizer)
    with pytest.raises(InputError, match=r"^end: got a model without one"):
        endless.score("x", "y", end=True)
