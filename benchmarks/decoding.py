"""Cautious decoding's passes against those of plain generation, of the same number and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from benchmarks.contest import Contest
from scoredraw.language.cautious_decoding import CautiousPlan, CautiousTokens
from scoredraw.language.cautious_generation import cautious_tokens
from scoredraw.language.punctuation import punctuation_ids
from scoredraw.papers.small_policy import small_policy
from scoredraw.small_models import small_model


def decoding(*, tiny: bool = False) -> Iterator[Contest]:
    """SmolLM2-135M (tiny: the small policy); `generate` gets passes grouped by their rows."""
    model, tokenizer = small_policy() if tiny else small_model()
    tokens, prompts = (6, 1) if tiny else (24, 2)
    plan = CautiousPlan(punctuation_ids(tokenizer))
    texts = ["Once upon a time there was a small town", "The weather in the mountains is often"]
    ids = [tokenizer(text)["input_ids"] for text in texts[:prompts]]

    def ours() -> list[CautiousTokens]:
        return [one for (one,) in cautious_tokens(model, ids, plan, max_tokens=tokens, rng=0)]

    shapes = passes(model, ours)
    rows = sum(shapes)

    def peer() -> int:
        return sum(batch * generated(model, batch, count) for batch, count in grouped(shapes))

    def check(found: list[CautiousTokens], made: int) -> None:
        assert sum(one.forward_rows - 1 for one in found) == rows == made

    what = f"cautious decoding, {len(shapes)} passes of {rows / len(shapes):.1f} rows"
    yield Contest(what, "transformers generate, same passes", ours, peer, check, 1.15, repeats=3)


def passes(model: Any, decode: Callable[[], Any]) -> list[int]:
    """The rows of each pass of one token that a call makes."""
    found: list[int] = []

    def counted(_: Any, __: Any, given: dict[str, Any]) -> None:
        ids = given["input_ids"]
        if ids.shape[1] == 1:
            found.append(len(ids))

    hook = model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        decode()
    finally:
        hook.remove()
    return found


def grouped(shapes: list[int]) -> Iterator[tuple[int, int]]:
    """(rows, how many passes have so many)."""
    for rows, same in groupby(sorted(shapes)):
        yield rows, len(list(same))


def generated(model: Any, batch: int, passes: int) -> int:
    """So many passes of one token by generate: a prompt of one, and those after it."""
    import torch

    ids = torch.ones((batch, 1), dtype=torch.long)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0,
        min_new_tokens=passes, max_new_tokens=passes, pad_token_id=0,
    )  # fmt: skip
    return int(out.shape[1]) - 1
