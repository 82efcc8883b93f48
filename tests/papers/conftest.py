"""What tests of studies share: a policy that knows nothing, and a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where journals and policies are kept, of one test."""
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def new_born(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a policy of one layer that writes the letters of the small one at random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from scoredraw.papers.small_policy import new_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("policy"), new_tokenizer()
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    transformers.GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
