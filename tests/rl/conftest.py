"""A small real policy for TRL: a two-layer model, a character tokenizer, a folder for its runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LETTERS = "0123456789+-=<>/ abcdefghijklmnopqrstuvwxyz\n"


@pytest.fixture
def letters() -> Any:
    """A tokenizer with a token a character, padded on the left as TRL wants it."""
    from scoredraw.papers.small_policy import new_tokenizer

    return new_tokenizer(LETTERS)


def two_layers(letters: Any) -> Any:
    """The same two-layer Qwen2 of random weights each time."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(letters), hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, pad_token_id=letters.pad_token_id,
            eos_token_id=letters.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def grpo_settings(folder: str | Path) -> dict[str, Any]:
    """Of a GRPOConfig for two steps on the CPU."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 5, "max_steps": 2, "bf16": False, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-3, "seed": 3, "activation_checkpointing": False,
    }  # fmt: skip


@pytest.fixture
def new_policy(letters: Any) -> Callable[[], Any]:
    """Makes `two_layers`."""
    return lambda: two_layers(letters)


@pytest.fixture
def grpo_config(tmp_path: Path) -> Callable[..., Any]:
    """A GRPOConfig of `grpo_settings`; options of the test win."""

    def config(**options: Any) -> Any:
        from trl import GRPOConfig

        return GRPOConfig(**{**grpo_settings(tmp_path), **options})

    return config
