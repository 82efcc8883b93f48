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
    law = _law(temperature, top_k, top_p, min_p)
    uniforms = RowUniforms(rng)
    rows = np.arange(len(prompts) * n)
    ids = (rows // n + first) * SAMPLES_OF_A_PROMPT + rows % n
    tokens: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    finished = np.zeros(len(rows), bool)
    with torch.inference_mode():
        batch = CachedBatch(model, prompts, n)
        for step in range(max_tokens):
            u = uniforms.at(ids[rows], stream="tokens", round=step)
            own = categorical.normalize(batch.logits)
            if choose is not None:
                chosen = choose(batch.text, batch.logits, u, rows)
            else:
                chosen = categorical.invert(law(batch.logits, own), u)
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
                batch.keep(going)
            batch.read([tokens[row][-1:] for row in rows])
    made = [
        Tokens(np.array(t, np.int64), np.array(lp), bool(f))
        for t, lp, f in zip(tokens, logprobs, finished, strict=True)
    ]
    return [made[i * n : (i + 1) * n] for i in range(len(prompts))]


def _law(temperature: float, top_k: int, top_p: float, min_p: float) -> Callable[[Any, Any], Any]:
    """(logits, the model's own log-probabilities) -> those to draw from."""
    if (temperature, top_k, top_p, min_p) == (1.0, 0, 1.0, 0.0):
        return lambda logits, own: own
    return lambda logits, own: categorical.truncate(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )


class CachedBatch:
    """Rows that a causal model goes on from: what they have read, their cache, the next logits.

    Prompts are padded on the left and read once; n rows go on from each. text: ids (B, L), 0 where
    nothing is; logits: (B, V). To be used within torch.inference_mode.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], n: int) -> None:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        self.model, self.device = model, next(model.parameters()).device
        texts = [torch.as_tensor(list(prompt)) for prompt in prompts]
        ids, mask = (
            pad_sequence(rows, batch_first=True, padding_side="left").to(self.device)
            for rows in (texts, [torch.ones_like(text) for text in texts])
        )
        out = model(
            input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        )  # fmt: skip
        self.cache = out.past_key_values
        self.cache.batch_repeat_interleave(n)
        self.text, self.mask = (x.repeat_interleave(n, dim=0) for x in (ids, mask))
        self.logits = out.logits[:, -1].repeat_interleave(n, dim=0)

    def keep(self, rows: Sequence[int] | Int) -> None:
        """Drop the other rows."""
        import torch

        kept = torch.as_tensor(rows, device=self.device)
        self.cache.batch_select_indices(kept)
        self.text, self.mask, self.logits = (x[kept] for x in (self.text, self.mask, self.logits))

    def read(self, tokens: Sequence[Sequence[int]]) -> None:
        """Go on by the same number of tokens in every row."""
        import torch

        ids = torch.as_tensor(tokens, device=self.device)
        self.text = torch.cat([self.text, ids], dim=-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], dim=-1)
        out = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True,
            position_ids=(self.mask.cumsum(-1) - 1)[:, -ids.shape[1] :], logits_to_keep=1,
        )  # fmt: skip
        self.logits = out.logits[:, -1]


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
