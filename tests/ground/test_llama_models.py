"""llama.cpp against transformers: the same random weights, written as GGUF and read by both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.llama_models import LlamaCppModel
from scoredraw.models import SamplingModel, ScoringModel, TextModel, TransformersModel

pytestmark = pytest.mark.contract

ASK = [{"role": "user", "content": "Which one?"}]
F32 = 0  # GGML's type number, for a cache as precise as the weights
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaCppModel, TransformersModel]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="the extra language is not installed")
    pytest.importorskip("transformers", reason="the extra language is not installed")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    network, tokenizer = tiny_llama()
    write_gguf(path, network, tokenizer)
    ours = LlamaCppModel(path, max_new_tokens=8, window=128, n_threads=1, type_k=F32, type_v=F32)
    return ours, TransformersModel(network, tokenizer, max_new_tokens=8)


def tiny_llama() -> tuple[Any, Any]:
    """A random Llama whose tokens are bytes, but for "ab"."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<eos>", *alphabet, "ab"])}
    core = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=None, eos_token_id=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def write_gguf(path: Path, network: Any, tokenizer: Any) -> None:
    """The weights as llama.cpp wants them: its rotation takes neighbouring pairs."""
    import gguf

    c = network.config
    head = c.hidden_size // c.num_attention_heads
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(head)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokenizer.convert_ids_to_tokens(range(c.vocab_size)))
    w.add_token_types([3, 3, *[1] * (c.vocab_size - 2)])  # two control tokens
    w.add_token_merges(["a b"])
    w.add_eos_token_id(1)
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)
    weights = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(c.num_hidden_layers):
        names |= {f"model.layers.{layer}.{a}": f"blk.{layer}.{b}" for a, b in parts.items()}
    for source, target in names.items():
        weight = weights[f"{source}.weight"]
        if target.endswith(("attn_q", "attn_k")):
            halves = weight.reshape(-1, 2, head // 2, c.hidden_size)
            weight = halves.transpose(0, 2, 1, 3).reshape(weight.shape)
        w.add_tensor(f"{target}.weight", np.ascontiguousarray(weight, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_the_next_token_as_transformers_has_it(pair: Any) -> None:
    ours, theirs = pair
    assert isinstance(ours, TextModel)
    assert isinstance(ours, SamplingModel)
    assert isinstance(ours, ScoringModel)
    assert ours.prompt(ASK, "[[") == "<user>Which one?<assistant>[[" == theirs.prompt(ASK, "[[")
    for prompt in ("abc ab é", ASK):
        logprobs = ours.next_token_logprobs(prompt)
        assert logprobs.dtype == np.float64
        assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(logprobs, theirs.next_token_logprobs(prompt), atol=1e-4)


def test_scores_as_transformers_has_them(pair: Any) -> None:
    ours, theirs = pair
    for prompt, text, end in [(ASK, "né. abba", False), ("a", "bc", True), ("x", "y", False)]:
        want = theirs.score(prompt, text, end=end)
        np.testing.assert_allclose(ours.score(prompt, text, end=end), want, atol=1e-4)
    assert ours.score("ab", "").shape == (0,)
    # "a" + "b" is one token together: the prompt's stay as they are
    np.testing.assert_allclose(ours.score("a", "b"), theirs.score("a", "b"), atol=1e-4)


def test_a_seed_means_the_same_as_in_transformers(pair: Any) -> None:
    """The uniforms are the same; a rounding may turn one draw in ten thousand, not among these."""
    ours, theirs = pair
    for how in ({}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}):
        mine = ours.sample("Once ab", 6, max_tokens=10, seed=3, **how)
        other = theirs.sample("Once ab", 6, max_tokens=10, seed=3, **how)
        for one, two in zip(mine, other, strict=True):
            assert (one.tokens, one.text, one.finished) == (two.tokens, two.text, two.finished)
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)
    assert ours.ask(ASK) == theirs.ask(ASK)
    again = ours.sample("Once ab", 2, max_tokens=10, seed=3)
    assert [c.tokens for c in again] == [
        c.tokens for c in ours.sample("Once ab", 6, max_tokens=10, seed=3)[:2]
    ]
    assert len({c.text for c in ours.sample("Once ab", 4, max_tokens=10)}) > 1


def test_a_sample_scores_as_it_was_sampled(pair: Any) -> None:
    """The prompt's cache is shared by the samples: each is as if it were the first."""
    ours, _ = pair
    for c in ours.sample(ASK, 5, max_tokens=12, temperature=1.5, seed=0):
        ids = [*ours.fitting_tokens(ASK, 12), *c.tokens]
        rows = ours._pass(ids[:-1], 0, every=True)[-len(c.tokens) :]
        own = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(c.logprobs, own[np.arange(len(own)), c.tokens], atol=1e-4)


def test_a_long_prompt_goes_in_portions(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair
    small = LlamaCppModel(ours.llama.model_path, n_threads=1, type_k=F32, type_v=F32, n_batch=16,
                          window=128)  # fmt: skip
    prompt = "The quick brown fox jumps over the lazy dog, ab and ab."
    want = theirs.score(prompt, " And again, twenty letters.")
    np.testing.assert_allclose(small.score(prompt, " And again, twenty letters."), want, atol=1e-4)


def test_stop_strings(pair: Any) -> None:
    ours, theirs = pair
    (whole,) = ours.sample("Once", max_tokens=12, temperature=0)
    raw = whole.text
    stop = next(c for c in raw[2:] if c.isascii())  # random bytes are seldom characters
    (made,) = ours.sample("Once", max_tokens=12, temperature=0, stop=["never", stop])
    (other,) = theirs.sample("Once", max_tokens=12, temperature=0, stop=["never", stop])
    assert made.text == raw[: raw.index(stop)] == other.text
    assert made.tokens == other.tokens
    assert made.finished


def test_bad_input(pair: Any, tmp_path: Path) -> None:
    ours, _ = pair
    for options, message in [
        ({"n": 0}, "n: got 0"), ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"top_p": 0}, "top_p: got 0"), ({"temperature": -1}, "temperature: got"),
        ({"stop": [""]}, "stop: got"), ({"stop": "x"}, "stop: got 'x', want a list"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f"^{message}"):
            ours.sample("a", **options)
    with pytest.raises(
        InputError, match=r"^prompt: got 132 tokens with the reply, want at most 128"
    ):
        ours.sample("x" * 120, max_tokens=12)
    with pytest.raises(InputError, match=r"^messages: got \d+ tokens"):
        ours.ask([{"role": "user", "content": "x" * 120}])
    with pytest.raises(InputError, match=r"^prompt: got no tokens"):
        ours.sample("")
    with pytest.raises(InputError, match=r"^model: got .*none.gguf, want a GGUF file"):
        LlamaCppModel(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    with pytest.raises(InputError, match=r"^model: llama.cpp cannot load .*broken.gguf"):
        LlamaCppModel(broken)
    assert ours.ask(ASK) == ours.ask(ASK)  # none of it left a trace


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        MissingExtraError, match=r"^llama_cpp is not installed: pip install 'scoredraw\[llama\]'"
    ):
        LlamaCppModel("model.gguf")
