"""Sampling a causal model of transformers token by token: batched, with its cache, reproducibly.

All samples of all prompts go through the model together. A prompt is read once and its cache is
shared out to its samples; rows leave the batch as they end. The token of sample j of prompt i at
step t is decided by one uniform that is a function of (seed, i, j, t), so the batch a sample went
with does not matter beyond the rounding of the model's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw import categorical
from scoredraw.errors import require
from scoredraw.uniforms import Rng, RowUniforms

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
Ended = Callable[[Sequence[Sequence[int]]], Sequence[bool]]
Choose = Callable[[Any, Any, Float, Int], Any]

SAMPLES_OF_A_PROMPT = 2**32  # row ids: prompt · this + sample


@dataclass(frozen=True, eq=False)
class Tokens:
    """What was sampled: ids int64 (T,), their log-probabilities float64 (T,), and how it ended."""

    ids: Int
    logprobs: Float
    finished: bool


def sample_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    end: Sequence[int] = (),
    ended: Ended | None = None,
    choose: Choose | None = None,
    rng: Rng = None,
    first: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[Tokens]]:
    r"""n continuations of each prompt -> a list of n `Tokens` a prompt.

    prompts: token ids, none empty. temperature, top_k, top_p, min_p: as `categorical.truncate`
    (temperature 0 is greedy). end: tokens that end a row (and belong to it). ended: told the tokens
    so far of each row that goes on, says which have ended (a stop string). choose: decides in place
    of these, from the ids so far (B, L), padded with 0 on the left, the logits (B, V), a uniform
    (B,) and the number (B,) of each row (prompt · n + sample, rising): the next token of each.
    rng: a seed. first: the number of the first prompt, where prompts come in portions. progress:
    called with the rows that are done and all rows. Log-probabilities are the model's own:
    temperature 1, nothing cut.

    Raises `InputError` for an empty prompt, n or max_tokens below 1, and as `truncate`.
    One forward pass of the prompts, padded on the left, and at most max_tokens of a token a row;
    memory: the cache of P · n rows and P · n · V logits.
    """
    import torch

    require(n >= 1, "n", n, "at least one sample")
    require(max_tokens >= 1, "max_tokens", max_tokens, "a positive count")
    require(all(len(p) > 0 for p in prompts), "prompts", "an empty one", "at least one token each")
    if not prompts:
        return []
    how: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    uniforms = RowUniforms(rng)
    device = next(model.parameters()).device
    rows = np.arange(len(prompts) * n)
    ids = (rows // n + first) * SAMPLES_OF_A_PROMPT + rows % n
    tokens: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    finished = np.zeros(len(rows), bool)
    with torch.inference_mode():
        inputs, mask = _padded(prompts, device)
        out = model(
            input_ids=inputs, attention_mask=mask, use_cache=True, logits_to_keep=1,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        )  # fmt: skip
        cache, mask = out.past_key_values, mask.repeat_interleave(n, dim=0)
        text = inputs.repeat_interleave(n, dim=0)
        logits = out.logits[:, -1].repeat_interleave(n, dim=0)
        cache.batch_repeat_interleave(n)
        for step in range(max_tokens):
            u = uniforms.at(ids[rows], stream="tokens", round=step)
            own = categorical.normalize(logits)
            neutral = (temperature, top_k, top_p, min_p) == (1.0, 0, 1.0, 0.0)
            if choose is not None:
                chosen = choose(text, logits, u, rows)
            else:
                law = own if neutral else categorical.truncate(logits, **how)
                chosen = categorical.invert(law, u)
            said = own.gather(-1, chosen[:, None])[:, 0].cpu().numpy()
            for row, token, logprob in zip(rows, chosen.tolist(), said, strict=True):
                tokens[row].append(token)
                logprobs[row].append(float(logprob))
            done = np.isin(chosen.cpu().numpy(), list(end))
            if ended is not None:
                done |= np.asarray(ended([tokens[row] for row in rows]), bool)
            finished[rows[done]] = True
            going = np.flatnonzero(~done) if step + 1 < max_tokens else np.empty(0, np.int64)
            rows = rows[going]
            if progress is not None:
                progress(len(finished) - len(rows), len(finished))
            if not len(rows):
                break
            if done.any():
                keep = torch.as_tensor(going, device=device)
                cache.batch_select_indices(keep)
                mask, text, chosen = mask[keep], text[keep], chosen[keep]
            text = torch.cat([text, chosen[:, None]], dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            out = model(
                input_ids=chosen[:, None], attention_mask=mask, past_key_values=cache,
                position_ids=mask.sum(-1, keepdim=True) - 1, use_cache=True,
            )  # fmt: skip
            logits = out.logits[:, -1]
    made = [
        Tokens(np.array(t, np.int64), np.array(lp), bool(f))
        for t, lp, f in zip(tokens, logprobs, finished, strict=True)
    ]
    return [made[i * n : (i + 1) * n] for i in range(len(prompts))]


def _padded(prompts: Sequence[Sequence[int]], device: Any) -> tuple[Any, Any]:
    """Prompts side by side, padded on the left, and the mask of what is not padding."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def token_logprobs(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Float:
    """log p of each token of a continuation, given the prompt and those before: float64 (T,).

    One forward pass. Raises `InputError` for an empty prompt.
    """
    import torch

    require(len(prompt) > 0, "prompt", "no tokens", "at least one")
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *continuation]], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(continuation) + 1).logits[0, :-1]
        said = categorical.normalize(logits).gather(-1, ids[0, len(prompt) :, None])[:, 0]
    values: Float = said.cpu().numpy()
    return values
