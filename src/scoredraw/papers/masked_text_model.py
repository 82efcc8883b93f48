"""A small masked language model of characters, trained on the docstrings of installed packages.

Two layers of ModernBERT, 64 wide, that see 32 characters of which some are masked, and no time. It
is trained on the time-free bound of a masked diffusion: n ~ U{1..L} characters of a window are
masked, and the loss is the mean of -log p over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import import_extra
from scoredraw.papers.docstring_pool import docstring_pool
from scoredraw.papers.training import one_thread, rate

Float = NDArray[np.float64]
Int = NDArray[np.int64]

LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # and nothing else: 96
V = len(LETTERS)
MASK = V  # one more than the letters
SPACE = LETTERS.index(" ")
LENGTH = 32
BATCH = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Corpus:
    """One long line of letters to train on, and windows int64 (n, LENGTH) of other texts."""

    train: Int
    held_out: Int


@cache
def corpus(per_package: int = 150) -> Corpus:
    """Docstrings, runs of spaces as one; every tenth text is held out and cut into windows."""
    texts = [encoded(text) for text in docstring_pool(per_package).texts]
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    rest = np.concatenate(texts[::10])
    return Corpus(train, rest[: len(rest) // LENGTH * LENGTH].reshape(-1, LENGTH))


def encoded(text: str) -> Int:
    """Letter numbers of a text; what is not a letter is left out."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    place = {letter: i for i, letter in enumerate(LETTERS)}
    joined = "\n".join(lines) + "\n"
    return np.array([place[letter] for letter in joined if letter in place], np.int64)


def decoded(tokens: Any) -> str:
    """The text of letter numbers, "·" for the mask and "⏎" for the end of a line."""
    return "".join("⏎" if t == 0 else (LETTERS + "·")[t] for t in map(int, tokens))


def masked_text_model(line: Int, steps: int, seed: int = 0) -> Any:
    """The model after so many steps of 64 windows of a line of letters, in evaluation mode.

    Deterministic by seed. Initial weights are five times those of large models: with these, small
    ones take thousands of steps to find that neighbours matter.
    """
    transformers = import_extra("transformers", "language")
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        special = {f"{name}_token_id": 0 for name in ("bos", "eos", "cls", "sep")}
        config = transformers.ModernBertConfig(
            vocab_size=V + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=128, max_position_embeddings=LENGTH, local_attention=16,
            initializer_range=0.1, pad_token_id=SPACE, **special,
        )  # fmt: skip
        model = transformers.ModernBertForMaskedLM(config)
        train(model, line, steps, seed)
    return model.eval()


def train(model: Any, line: Int, steps: int, seed: int) -> None:
    """AdamW on -log p of the masked letters of random windows, n stratified in the batch."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    strata = (np.arange(BATCH) + 0.5) / BATCH
    for step in range(steps):
        starts = rng.integers(0, len(line) - LENGTH, BATCH)
        x = torch.from_numpy(line[starts[:, None] + np.arange(LENGTH)])
        n = 1 + np.floor((strata + rng.random()) % 1 * LENGTH)
        ranks = rng.random(x.shape).argsort(axis=1).argsort(axis=1)
        hidden = torch.from_numpy(ranks < n[:, None])
        logits = model(input_ids=x.masked_fill(hidden, MASK)).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], x[hidden], reduction="none")
        weight = torch.from_numpy(np.repeat(1 / n, n.astype(np.int64))).float() / BATCH
        optimiser.param_groups[0]["lr"] = rate(LEARNING_RATE, step, steps)
        optimiser.zero_grad()
        torch.dot(loss, weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def share(tokens: Int, size: int) -> Float:
    """Frequencies of the runs of `size` characters inside a row."""
    codes = np.zeros_like(tokens[:, size - 1 :])
    for i in range(size):
        codes = codes * V + tokens[:, i : tokens.shape[1] - size + 1 + i]
    counts = np.bincount(codes.ravel(), minlength=V**size)
    return np.asarray(counts / counts.sum(), np.float64)


class Trigrams:
    """p(c | a b) = 0.7 of trigrams + 0.2 of pairs + 0.09 of characters + 0.01 uniform."""

    def __init__(self, line: Int) -> None:
        one = share(line[None], 1)
        two = share(line[None], 2).reshape(V, V)
        three = share(line[None], 3).reshape(V, V, V)
        with np.errstate(invalid="ignore"):
            p2 = np.nan_to_num(two / two.sum(axis=-1, keepdims=True))
            p3 = np.nan_to_num(three / three.sum(axis=-1, keepdims=True))
        self.p = 0.7 * p3 + 0.2 * p2 + 0.09 * one + 0.01 / V

    def surprise(self, tokens: Int) -> float:
        return float(-np.log(self.p[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]).mean())
