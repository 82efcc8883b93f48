"""Process rewards: scores of the steps of an answer, and what each step is then worth.

A process reward model scores every step of a reasoning. Summing the scores to come pays for each
further step with a good score, and a policy learns to write steps without end. A chain of
reasoning is as good as its worst step: the return of step i is the minimum of what is to come,

    G_i = min_{j >= i} r_j,

or nearly so, from rewards that any trainer can sum up again:

    r*_i = w_i r_i,   w = softmax(-r / T),   Σ_i r*_i -> min r as T -> 0, the mean as T -> ∞.

Cheng, Xiong, Qiao, Li, Guo, Wang, Lv and Wang, "Stop summation: min-form credit assignment is all
process reward model needs for reasoning", NeurIPS 2025, arXiv 2504.15275. Where the released code
takes the strict minimum, it runs over the tokens, of which those between two step ends and the
padding have score 0: an answer whose steps are all good gets 0. Here it runs over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoredraw.errors import require
from scoredraw.rl.token_credit import returns_to_go

CREDITS = ("softmin", "strict_min", "argmin", "mean", "sum")
AGGREGATES = ("min", "softmin", "mean", "last", "prod", "sum")

# ── scores ──────────────────────────────────────────────────────────────────────────────────────


def process_rewards(logits: Any, step_mask: Any = None, good: int = 1) -> Tensor:
    """The score of a step from two logits: r = p(good) - p(bad) = tanh((l_good - l_bad) / 2).

    logits: (..., S, 2); step_mask: (..., S) bool, 0 where false; r: (..., S) in [-1, 1]. Half
    precision becomes float32. An answer is foretold to be right where `aggregate_steps(r, mask,
    "softmin")` > 0. Raises InputError for another number of classes. Row-local, O(size).

    >>> process_rewards([[[0.0, 0.0], [0.0, 2.0]]])
    tensor([[0.0000, 0.7616]])
    """
    x = torch.as_tensor(logits)
    require(x.ndim >= 2 and x.shape[-1] == 2, "logits", tuple(x.shape), "(..., S, 2)")
    require(good in {0, 1}, "good", good, "the class of good steps, 0 or 1")
    x = x if x.dtype == torch.float64 else x.float()
    r = ((x[..., good] - x[..., 1 - good]) / 2).tanh()
    if step_mask is None:
        return r
    mask = torch.as_tensor(step_mask, device=x.device)
    fits = mask.dtype == torch.bool and mask.shape == r.shape
    require(fits, "step_mask", f"{mask.dtype} {tuple(mask.shape)}", f"bool {tuple(r.shape)}")
    return torch.where(mask, r, 0.0)


def padded_steps(rows: Iterable[Sequence[float | None]]) -> tuple[Tensor, Tensor]:
    """Scores (N, S) and mask (N, S) from a list of scores an answer; None is a step without one.

    >>> padded_steps([[0.5, None, 0.25], [1.0]])
    (tensor([[0.5000, 0.0000, 0.2500],
            [1.0000, 0.0000, 0.0000]]),
     tensor([[ True, False,  True],
            [ True, False, False]]))
    """
    lists = [list(row) for row in rows]
    width = max((len(row) for row in lists), default=0)
    require(width > 0, "step_rewards", f"{len(lists)} answers without a step", "a step or more")
    filled = [row + [None] * (width - len(row)) for row in lists]
    values = torch.tensor([[0.0 if r is None else r for r in row] for row in filled])
    return values, torch.tensor([[r is not None for r in row] for row in filled])


def check_scores(step_rewards: Any, step_mask: Any = None) -> tuple[Tensor, Tensor, torch.dtype]:
    """Scores in float64 with 0 for masked steps, the mask, and the type to answer in.

    Raises InputError for anything but (N, S) with S >= 1, a mask that is not bool (N, S), and a
    real step whose score is not finite, naming its row.
    """
    r = torch.as_tensor(step_rewards)
    table = r.ndim == 2 and r.shape[1] > 0
    require(table, "step_rewards", f"shape {tuple(r.shape)}", "(N, S), S >= 1")
    mask = torch.as_tensor(True if step_mask is None else step_mask, device=r.device)
    mask = mask.expand(r.shape) if step_mask is None else mask
    require(mask.dtype == torch.bool, "step_mask", mask.dtype, "torch.bool")
    require(mask.shape == r.shape, "step_mask", tuple(mask.shape), f"{tuple(r.shape)}")
    if not bool((r.isfinite() | ~mask).all()):
        row, step = (mask & ~r.isfinite()).nonzero()[0].tolist()
        came = f"{r[row, step].item()} in row {row}, step {step}"
        require(False, "step_rewards", came, "finite scores, or a mask where there is none")
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    return torch.where(mask, r, 0).double(), mask, dtype


# ── credit ──────────────────────────────────────────────────────────────────────────────────────


def min_form_rewards(
    step_rewards: Any,
    step_mask: Any = None,
    temperature: float = 0.1,
    credit: str = "softmin",
    gamma: float = 1.0,
) -> Tensor:
    """Rewards whose plain sum from step i on is the return of step i.

    credit, with G_i the return and n the steps of the answer:
    - "softmin": r*_i = softmax(-r / T)_i r_i. min r <= Σ r* <= mean r;
      Σ r* - min r <= (n - 1) (max r - min r) exp(-gap / T), gap from the lowest to the next,
    - "strict_min": G_i = min_{j >= i} r_j,
    - "argmin": G_i = min r up to the first lowest step, 0 after it, as in the paper; what softmin
      tends to as T -> 0 where no two steps are lowest,
    - "mean" (T -> ∞): r*_i = r_i / n,
    - "sum": G_i = Σ_{j >= i} gamma^{j-i} r_j, what the others are there to replace.

    step_rewards: (N, S), real numbers, by default in [-1, 1]; step_mask: (N, S) bool, all true if
    None; masked steps get 0 and count nowhere. Returns (N, S), half precision as float32. Raises
    InputError as `check_scores` does, and for a temperature of 0 or below and a gamma without use.
    Row-local. Time and memory O(N S).

    >>> r = torch.tensor([[0.9, -0.5, 0.2]])
    >>> min_form_rewards(r, credit="strict_min"), min_form_rewards(r, credit="argmin")
    (tensor([[ 0.0000, -0.7000,  0.2000]]), tensor([[ 0.0000, -0.5000,  0.0000]]))
    """
    check_credit(credit, temperature, gamma)
    r, mask, dtype = check_scores(step_rewards, step_mask)
    return credited(r, mask, temperature, credit, gamma).to(dtype)


def credited(r: Tensor, mask: Tensor, temperature: float, credit: str, gamma: float) -> Tensor:
    """`min_form_rewards` of what `check_scores` has made of the scores: (N, S) float64."""
    if credit == "softmin":
        return soft_weights(r, mask, temperature) * r
    if credit == "mean":
        return r / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if credit == "argmin":
        first = r.masked_fill(~mask, math.inf).argmin(dim=1, keepdim=True)
        return torch.zeros_like(r).scatter(1, first, r.gather(1, first))
    if credit == "sum" and gamma == 1:
        return r
    # real steps to the front, so that the one after a step is beside it
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    packed, real = r.gather(1, order), mask.gather(1, order)
    if credit == "sum":
        G = returns_to_go(packed, gamma=gamma)
    else:
        ahead = packed.masked_fill(~real, math.inf).flip(1)
        G = torch.where(real, ahead.cummin(dim=1).values.flip(1), 0.0)
    return torch.empty_like(r).scatter(1, order, G - pad(G[:, 1:], (0, 1)))


def soft_weights(r: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """softmax(-r / T) over the real steps of a row, 0 elsewhere; finite for any T > 0."""
    lowest = r.masked_fill(~mask, math.inf).amin(dim=1, keepdim=True)
    z = (lowest - r).div_(temperature).masked_fill_(~mask, -math.inf)
    return torch.where(mask, z.softmax(dim=1), 0.0)


def check_credit(credit: str, temperature: float = 0.1, gamma: float = 1.0) -> None:
    """InputError for an unknown credit, a temperature not above 0 and a gamma without use."""
    require(credit in CREDITS, "credit", repr(credit), ", ".join(CREDITS))
    wanted = 'a number above 0; credit="argmin" is its limit at 0'
    require(temperature > 0, "temperature", temperature, wanted)
    require(0 <= gamma <= 1, "gamma", gamma, "a number in [0, 1]")
    require(gamma == 1 or credit == "sum", "gamma", f"{gamma} with {credit!r}", "credit 'sum'")


def aggregate_steps(
    step_rewards: Any, step_mask: Any = None, how: str = "min", temperature: float = 0.1
) -> Tensor:
    """One score an answer from those of its steps, to rank answers by: (N,), NaN without a step.

    how: "min", "softmin" Σ_i softmax(-r / T)_i r_i, "mean", "last", "sum", or "prod", which needs
    scores >= 0, such as p(good) = (1 + r) / 2. step_rewards: (N, S) with step_mask (N, S), or a
    list of scores an answer, None for a missing one. Raises InputError as `min_form_rewards` does.
    Row-local. O(N S).

    >>> aggregate_steps([[0.9, 0.8], [0.99, 0.2, 0.99]], how="min")
    tensor([0.8000, 0.2000])
    """
    require(how in AGGREGATES, "how", repr(how), ", ".join(AGGREGATES))
    check_credit("softmin", temperature)
    if step_mask is None and isinstance(step_rewards, Sequence):
        step_rewards, step_mask = padded_steps(step_rewards)
    r, mask, dtype = check_scores(step_rewards, step_mask)
    n = mask.sum(dim=1)
    if how == "min":
        found = r.masked_fill(~mask, math.inf).amin(dim=1)
    elif how == "softmin":
        found = (soft_weights(r, mask, temperature) * r).sum(dim=1)
    elif how == "last":
        place = torch.arange(r.shape[1], device=r.device)
        last = torch.where(mask, place, 0).amax(dim=1, keepdim=True)
        found = r.gather(1, last)[:, 0]
    elif how == "prod":
        negative = r[r < 0][:1].tolist()
        require(not negative, "step_rewards", negative, "scores >= 0 to multiply")
        found = torch.where(mask, r.log(), 0.0).sum(dim=1).exp()
    else:
        found = r.sum(dim=1) / (n if how == "mean" else 1)
    return torch.where(n > 0, found, math.nan).to(dtype)


# ── where the steps are ─────────────────────────────────────────────────────────────────────────


def split_steps(text: str, separator: str = "\n\n") -> list[str]:
    """The steps of a text, without blank ones and without the space around them.

    >>> split_steps("2 + 2 = 4\\n\\n\\n\\nSo 4.\\n\\n")
    ['2 + 2 = 4', 'So 4.']
    """
    require(bool(separator), "separator", repr(separator), "one or more characters")
    return [piece.strip() for piece in text.split(separator) if piece.strip()]


def separator_tokens(tokenizer: Any, separator: str = "\n\n") -> list[int]:
    """The ids of all tokens whose text ends in separator, as ".\\n\\n" does; InputError for none.

    tokenizer: of transformers. A tokenizer may write a separator with one token or with several;
    only the former can be found, so ask for what it has a token for. O(size of the vocabulary).
    """
    require(bool(separator), "separator", repr(separator), "one or more characters")
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    found = [i for i, text in enumerate(texts) if text.endswith(separator)]
    require(bool(found), "separator", repr(separator), "text that some token ends in")
    return found


class Steps(NamedTuple):
    """mask (N, S) bool; end (N, S) int64, the last token of each step; separators (N, T) bool."""

    mask: Tensor
    end: Tensor
    separators: Tensor


def find_steps(
    completion_ids: Any,
    response_mask: Any,
    separators: Collection[int],
    blank: Collection[int] = (),
) -> Steps:
    """Steps in token ids: each ends with the separators after it, the last with the response.

    completion_ids, response_mask: (N, T), the mask true for tokens of the response; separators:
    ids that end a step; blank: ids that say nothing, such as the end of text. Separators after one
    another end one step, those at the start end none, and what is blank after the last one belongs
    to the step before: there is no empty step, but a response that says nothing is one. Row-local.
    Time and memory O(N T).

    >>> find_steps([[5, 0, 0, 6, 7, 0, 1]], [[True] * 7], separators=[0], blank=[1])[:2]
    (tensor([[True, True]]), tensor([[2, 6]]))
    """
    ids, mask = torch.as_tensor(completion_ids), torch.as_tensor(response_mask).bool()
    fits = ids.ndim == 2 and ids.shape == mask.shape and ids.shape[1] > 0
    shapes = f"{tuple(ids.shape)} and {tuple(mask.shape)}"
    require(fits, "completion_ids and response_mask", shapes, "both (N, T), T >= 1")
    require(len(separators) > 0, "separators", "none", "the ids of one or more tokens")
    place = torch.arange(ids.shape[1], device=ids.device)

    def before(where: Tensor) -> Tensor:
        """The last token before each for which `where` holds, -1 if there is none."""
        known = torch.where(where, place, -1).cummax(dim=1).values
        return pad(known[:, :-1], (1, 0), value=-1)

    def among(tokens: Collection[int]) -> Tensor:
        return mask & torch.isin(ids, torch.tensor(sorted(tokens), device=ids.device))

    cuts = among(separators)
    speaks = mask & ~cuts & ~among(blank)
    spoke = before(speaks)
    begins = speaks & (spoke >= 0) & (before(cuts) > spoke)
    ends = torch.zeros_like(mask)
    row, at = begins.nonzero(as_tuple=True)
    ends[row, before(mask)[row, at]] = True
    last = torch.where(mask, place, -1).amax(dim=1)
    row = (last >= 0).nonzero()[:, 0]
    ends[row, last[row]] = True
    return Steps(*_columns(ends), cuts)


def _columns(ends: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (N, S) and the places (N, S) of what is true in (N, T), S >= 1."""
    row, at = ends.nonzero(as_tuple=True)
    rank = ends.cumsum(dim=1)[row, at] - 1
    S = int(rank.max()) + 1 if len(rank) else 1
    mask = torch.zeros(len(ends), S, dtype=torch.bool, device=ends.device)
    place = torch.zeros(len(ends), S, dtype=torch.int64, device=ends.device)
    mask[row, rank], place[row, rank] = True, at
    return mask, place
