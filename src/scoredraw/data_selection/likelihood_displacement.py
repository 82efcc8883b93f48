r"""Likelihood displacement: which preference pairs push their own preferred answer down.

Training on a pair (prompt, chosen, rejected) widens the margin between the answers, and may do so
by lowering both. How far the chosen one falls is told beforehand by the hidden states that predict
the two answers' tokens: the more alike the sums of those states, the further (CHES, the centred
hidden embedding similarity). Two forward passes a pair and no gradient. `filter_by_score` keeps a
window of a score's order, `likelihood_derivative` is the exact law that the score shortens, and the
two losses are those that the paper trains with. `preference_pairs` goes from text to scores.

A token's *predicting position* is the one before it: the prompt's last token predicts the answer's
first. Masks mark predicting positions; `predicting_mask` and `shift_completion_mask` make them.

Razin, Malladi, Bhaskar, Chen, Arora and Hanin, 2025, "Unintentional Unalignment: Likelihood
Displacement in Direct Preference Optimization", ICLR, arXiv:2410.08847.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from scoredraw.data_selection.influence import Array, name_rows, require_finite, to_numpy
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require

_BLOCK_CELLS = 1 << 20  # cells of an edit distance table that are held at a time


# ── Masks ────────────────────────────────────────────────────────────────────────────────────────


def predicting_mask(
    attention_mask: Tensor,
    prompt_lengths: Tensor | Sequence[int],
    *,
    padding_side: Literal["left", "right"] | None = None,
    has_eos: bool | Tensor = True,
    include_eos: bool | Tensor = True,
) -> Tensor:
    r"""Mark the positions whose hidden states predict the tokens of the response.

    With p prompt tokens among n real ones they are the real tokens :math:`p-1,\dots,p+|y|-2`
    (from 0), where :math:`|y|=n-p-[\text{has\_eos}]+[\text{include\_eos}]`. Two programs were
    released with the paper: one counts the end-of-sequence token that the sequence holds
    (``has_eos=True``), the other feeds the sequence without it and counts the state that predicts
    it all the same (``has_eos=False, include_eos=True``); the two masks pick the same states. The
    first gives wrong sums unless padding is on the left; here either side will do.

    Parameters
    ----------
    attention_mask : (B, S) of 0 and 1, the ones of a row in one run.
    prompt_lengths : (B,) real tokens of each prompt, its special tokens included.
    padding_side : None takes each row as it comes; a side is checked.
    has_eos : whether a sequence ends with its end-of-sequence token; one for all, or (B,).
    include_eos : whether that token counts as one of the response: whether it is trained on.

    Returns
    -------
    (B, S) bool, on the device of `attention_mask`. Raises InputError on padding inside a sequence
    or on the wrong side, an empty prompt, a response of no token. O(B S).

    >>> predicting_mask(torch.tensor([[0, 1, 1, 1, 1]]), [2]).int().tolist()
    [[0, 0, 1, 1, 0]]
    >>> predicting_mask(torch.tensor([[1, 1, 1, 1, 0]]), [2], include_eos=False).int().tolist()
    [[0, 1, 0, 0, 0]]
    """
    require(attention_mask.ndim == 2, "attention_mask", f"{attention_mask.ndim} axes", "(B, S)")
    sides = (None, "left", "right")
    require(padding_side in sides, "padding_side", repr(padding_side), "'left' or 'right'")
    real = attention_mask.bool()
    require(bool((real == attention_mask).all()), "attention_mask", "other values", "0 and 1")
    _require_one_run("attention_mask", real)
    (rows, width), device = real.shape, real.device
    length, first = real.sum(1), real.int().argmax(1)
    prompt = torch.as_tensor(prompt_lengths, device=device)
    require(prompt.shape == (rows,), "prompt_lengths", f"shape {tuple(prompt.shape)}", f"({rows},)")
    has, counted = (
        torch.as_tensor(flag, device=device).long().expand(rows) for flag in (has_eos, include_eos)
    )
    padded = {"left": first + length < width, "right": first > 0}.get(padding_side or "", first < 0)
    _require_rows(~padded, "padding_side", f"padding on the other side than {padding_side}", "none")
    _require_rows(prompt >= 1, "prompt_lengths", "no prompt token", "one that predicts the first")
    tokens = length - prompt - has + counted
    some = (tokens >= 1) & (length > prompt)
    _require_rows(some, "prompt_lengths", "an empty response", "a token after the prompt")
    start = (first + prompt - 1)[:, None]
    column = torch.arange(width, device=device)
    return (column >= start) & (column < start + tokens[:, None])


def shift_completion_mask(completion_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The predicting positions of tokens that are marked themselves: the mask, moved left by one.

    completion_mask: (B, S) of 0 and 1, as TRL's collator makes it, padded on either side.
    attention_mask: (B, S); given, padding is not taken for a prompt. Returns (B, S) bool. Raises
    InputError on an empty or broken response, or one that no token of a prompt comes before.

    >>> shift_completion_mask(torch.tensor([[0, 0, 1, 1, 0]])).int().tolist()
    [[0, 1, 1, 0, 0]]
    """
    tokens = completion_mask.bool()
    require(tokens.ndim == 2, "completion_mask", f"{tokens.ndim} axes", "(B, S)")
    _require_one_run("completion_mask", tokens)
    positions = torch.zeros_like(tokens)
    positions[:, :-1] = tokens[:, 1:]
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask.bool()
    shapes = f"shape {tuple(real.shape)}"
    require(real.shape == tokens.shape, "attention_mask", shapes, str(tuple(tokens.shape)))
    led = ~tokens[:, 0] & ~(positions & ~real).any(1)
    _require_rows(led, "completion_mask", "no prompt token", "one that predicts the first")
    return positions


def _require_one_run(argument: str, mask: Tensor) -> None:
    """Every row of a bool mask has exactly one run of True."""
    runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, :1].sum(1)
    _require_rows(runs > 0, argument, "nothing marked", "one position or more")
    _require_rows(runs < 2, argument, "marks that are not contiguous", "one run a row")


def _require_rows(fine: Tensor, argument: str, came: str, wanted: str) -> None:
    if not bool(fine.all()):
        where = name_rows(to_numpy((~fine).nonzero()[:, 0]))
        raise InputError(f"{argument}: got {came} in {where}, want {wanted}")


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def ches_score(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    normalize: bool = False,
) -> Tensor:
    r"""How strongly training on each pair pushes the chosen response down (CHES).

    With :math:`S^\pm=\sum_{k=1}^{|y^\pm|} h_{x,y^\pm_{<k}}`, the sums over the states that predict
    the tokens of the chosen (+) and the rejected (-) response,

    .. math:: \mathrm{CHES}=\langle S^+,S^-\rangle-\lVert S^+\rVert^2,

    and with `normalize` (by length, ln-CHES, the one to filter with) each S is divided by its
    number of tokens. High means more displacement; a pair of equal responses scores 0; the two
    responses do not play the same part. :math:`\mathrm{CHES}\le
    \lVert S^+\rVert(\lVert S^-\rVert-\lVert S^+\rVert)`.

    Parameters
    ----------
    chosen_hidden, rejected_hidden : (B, S, D) and (B, S', D) floats, what the unembedding matrix
        is applied to: the last layer after the final norm.
    chosen_mask, rejected_mask : (B, S) and (B, S') bool, the predicting positions.

    Returns
    -------
    (B,) on the states' device: float64 of float64 states, float32 of all others (half precision
    is added up in float32). What is not marked is never read, be it NaN.

    Raises
    ------
    InputError
        shapes or devices that disagree, masks that are empty or not contiguous, marked states
        with NaN or infinity.

    Time and memory O(B (S + S') D). Row-local.

    Razin et al., 2025, arXiv:2410.08847, Definition 2.

    >>> h = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    >>> ches_score(h, h, both, first).tolist(), ches_score(h, h, both, both).tolist()
    ([-4.0], [0.0])
    """
    _check_pair(chosen_hidden, rejected_hidden, chosen_mask, rejected_mask)
    plus = _summed("chosen_hidden", chosen_hidden, chosen_mask)
    minus = _summed("rejected_hidden", rejected_hidden, rejected_mask)
    if normalize:
        plus, minus = plus / chosen_mask.sum(1)[:, None], minus / rejected_mask.sum(1)[:, None]
    return (plus * (minus - plus)).sum(-1)


def last_hidden_similarity(
    chosen_hidden: Tensor, rejected_hidden: Tensor, chosen_mask: Tensor, rejected_mask: Tensor
) -> Tensor:
    """Inner product of the two states that predict the last token of each response: a baseline.

    Arguments, result and errors as of `ches_score`.

    >>> h = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> mask = torch.tensor([[True, True]])
    >>> last_hidden_similarity(h, h, mask, mask).tolist()
    [4.0]
    """
    _check_pair(chosen_hidden, rejected_hidden, chosen_mask, rejected_mask)
    plus = _summed("chosen_hidden", chosen_hidden, _last(chosen_mask))
    minus = _summed("rejected_hidden", rejected_hidden, _last(rejected_mask))
    return (plus * minus).sum(-1)


def _summed(argument: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum of the marked states, (B, D); half precision is added up in float32."""
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    total = torch.where(mask[..., None], hidden, 0).sum(1, dtype=wide)
    finite = total.isfinite().all(1)
    _require_rows(finite, argument, "NaN or infinity at a marked position", "finite numbers")
    return total


def _last(mask: Tensor) -> Tensor:
    last = mask.clone()
    last[:, :-1] &= ~mask[:, 1:]
    return last


def _check_pair(chosen: Tensor, rejected: Tensor, plus: Tensor, minus: Tensor) -> None:
    for name, hidden, mask in (("chosen", chosen, plus), ("rejected", rejected, minus)):
        floats = hidden.ndim == 3 and hidden.is_floating_point()
        came = f"a {hidden.dtype} tensor {tuple(hidden.shape)}"
        require(floats, f"{name}_hidden", came, "floats (B, S, D)")
        fits = mask.shape == hidden.shape[:2] and mask.dtype == torch.bool
        came = f"a {mask.dtype} tensor {tuple(mask.shape)}"
        require(fits, f"{name}_mask", came, f"bool {tuple(hidden.shape[:2])}")
        devices = {chosen.device, hidden.device, mask.device}
        require(len(devices) == 1, name, " and ".join(map(str, devices)), "one device")
        _require_one_run(f"{name}_mask", mask)
    same = (len(chosen), chosen.shape[2]) == (len(rejected), rejected.shape[2])
    came = f"shape {tuple(rejected.shape)}"
    require(same, "rejected_hidden", came, f"B and D as in {tuple(chosen.shape)}")


def edit_distance_score(
    chosen_ids: Sequence[ArrayLike], rejected_ids: Sequence[ArrayLike]
) -> Array:
    r"""Minus the edit distance of two responses, as a share of the longer one: a baseline.

    :math:`-\mathrm{Lev}(y^+,y^-)/\max(|y^+|,|y^-|)` on token ids, from -1 (nothing in common) to 0
    (equal); Lev counts insertions, deletions and substitutions.

    chosen_ids, rejected_ids: n sequences of ids each, of any lengths. Returns (n,) float64. Raises
    InputError on numbers of sequences that differ or an empty one. Time O(n |y+| |y-|), a block of
    pairs and one row of their tables at once.

    >>> edit_distance_score([[1, 2, 3, 4]], [[1, 2, 9]]).tolist()
    [-0.5]
    """
    n = len(chosen_ids)
    require(len(rejected_ids) == n, "rejected_ids", f"{len(rejected_ids)} sequences", f"{n}")
    pairs = []
    for name, side in (("chosen_ids", chosen_ids), ("rejected_ids", rejected_ids)):
        pairs.append([np.asarray(ids).reshape(-1) for ids in side])
        empty = np.flatnonzero([len(ids) == 0 for ids in pairs[-1]])
        require(not len(empty), name, f"an empty response in {name_rows(empty)}", "a token or more")
    if n == 0:
        return np.empty(0)
    pairs = [sorted(pair, key=len) for pair in zip(*pairs, strict=True)]  # fewer, wider steps
    short, long = np.array([[len(a), len(b)] for a, b in pairs]).T
    order = np.argsort(-short, kind="stable")
    distance, start = np.empty(n), 0
    while start < n:
        rows = order[start : start + max(1, _BLOCK_CELLS // int(long[order[start:]].max()))]
        distance[rows] = _levenshtein([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])
        start += len(rows)
    return -distance / long


def _levenshtein(short: list[NDArray[Any]], long: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Edit distances of pairs, the longest `short` first; a row of all tables a step.

    The insertions of a row, d[j] = min(c[j], d[j-1] + 1), are min over i <= j of c[i] + j - i.
    """
    rows = np.arange(len(short))
    steps, ends = np.array([len(s) for s in short]), np.array([len(s) for s in long])
    s, t = _padded(short, int(steps.max())), _padded(long, int(ends.max()))
    column = np.arange(t.shape[1] + 1)
    table = np.tile(column, (len(rows), 1))
    for i in range(s.shape[1]):
        live = int(np.searchsorted(-steps, -i, side="left"))  # pairs with a token i
        above = table[:live].copy()
        table[:live, 0] = i + 1
        changed = above[:, :-1] + (s[:live, i, None] != t[:live])
        np.minimum(above[:, 1:] + 1, changed, out=table[:live, 1:])
        np.minimum.accumulate(table[:live] - column, axis=1, out=table[:live])
        table[:live] += column
    return np.asarray(table[rows, ends])


def _padded(sequences: list[NDArray[Any]], width: int) -> NDArray[np.int64]:
    table = np.full((len(sequences), width), -1, np.int64)
    for row, ids in zip(table, sequences, strict=True):
        row[: len(ids)] = ids
    return table


# ── The law behind the score ─────────────────────────────────────────────────────────────────────


class LikelihoodDerivative(NamedTuple):
    """What `likelihood_derivative` returns; leading batch axes are those of its arguments."""

    rate: Tensor
    unembedding_term: Tensor
    hidden_term: Tensor
    alpha_chosen: Tensor
    alpha_rejected: Tensor


def likelihood_derivative(
    unembedding: Tensor,
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 0.1,
    margin: float = 0.0,
    train_hidden: bool = True,
) -> LikelihoodDerivative:
    r"""How fast the chosen response's log-likelihood moves under gradient flow on the DPO loss.

    The unconstrained-features model: an unembedding matrix W (V, D) and one free vector h for each
    context. With :math:`m=\beta\,\sigma(-\beta\Delta)`, :math:`\Delta` the margin over the
    reference (m = beta/2 there), :math:`r_k=e_{y_k}-\pi_k` and :math:`g_k=W^\top r_k`,

    .. math:: \frac{d\ln\pi(y^+)}{dt}=m\Big[\sum_{k,k'}\langle r^+_k,r^+_{k'}\rangle
       \langle h^+_k,h^+_{k'}\rangle-\sum_{k,k'}\langle r^+_k,r^-_{k'}\rangle
       \langle h^+_k,h^-_{k'}\rangle+\mathrm{hid}\Big],

    where :math:`\mathrm{hid}=\sum_k\lVert g^+_k\rVert^2-\sum_{k:\text{ same prefix}}\langle
    g^+_k,g^-_k\rangle` is what moving the contexts' vectors adds (shared: the prompt, and what
    both responses begin with). With all :math:`\langle r,r'\rangle=1` and no hid the
    bracket is minus CHES.

    Parameters
    ----------
    unembedding : (V, D). chosen_hidden : (..., T, D), row k predicts token k of the chosen
        response; rejected_hidden : (..., T', D). chosen_tokens : (..., T) ids below V;
        rejected_tokens : (..., T').
    beta : of the loss, > 0. margin : :math:`\Delta`, nats. train_hidden : False freezes the
        contexts' vectors (hid = 0).

    Returns
    -------
    LikelihoodDerivative: `rate` (...,) nats a unit of time, the bracket's `unembedding_term` (its
    two sums) and `hidden_term`, and the products `alpha_chosen` (..., T, T) and `alpha_rejected`
    (..., T, T').

    Raises
    ------
    InputError
        shapes that disagree, ids out of range, shared contexts whose vectors differ, beta <= 0.

    Time O(T T' (V + D) + T V D) a pair; memory O(T V). Row-local.

    Razin et al., 2025, arXiv:2410.08847; the term hid in this form is derived here.

    >>> W, h = torch.eye(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    >>> moved = likelihood_derivative(W, h, h, torch.tensor([0]), torch.tensor([1]))
    >>> round(moved.rate.item(), 6), moved.alpha_chosen.tolist()
    (0.05, [[0.5]])
    """
    require(beta > 0, "beta", beta, "a positive number")
    h_plus, h_minus = chosen_hidden, rejected_hidden
    r_plus = _residuals("chosen", unembedding, h_plus, chosen_tokens)
    r_minus = _residuals("rejected", unembedding, h_minus, rejected_tokens)
    shared = _shared_contexts(h_plus, h_minus, chosen_tokens, rejected_tokens)
    alpha_plus, alpha_minus = r_plus @ r_plus.mT, r_plus @ r_minus.mT
    gram_plus, gram_minus = h_plus @ h_plus.mT, h_plus @ h_minus.mT
    direct = (alpha_plus * gram_plus).sum((-2, -1)) - (alpha_minus * gram_minus).sum((-2, -1))
    hid = torch.zeros_like(direct)
    if train_hidden:
        g_plus, g_minus = r_plus @ unembedding, r_minus @ unembedding
        both = shared.shape[-1]
        common = (g_plus[..., :both, :] * g_minus[..., :both, :]).sum(-1)
        hid = g_plus.square().sum((-2, -1)) - torch.where(shared, common, 0).sum(-1)
    m = beta / (1 + np.exp(beta * margin))
    return LikelihoodDerivative(m * (direct + hid), direct, hid, alpha_plus, alpha_minus)


def _residuals(side: str, unembedding: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Token minus prediction at each position, (..., T, V)."""
    wanted = (*tokens.shape, unembedding.shape[-1])
    fits = unembedding.ndim == 2 and tokens.ndim > 0 and hidden.shape == wanted
    require(fits, f"{side}_hidden", f"shape {tuple(hidden.shape)}", f"{wanted}, (..., T, D)")
    inside = tokens.numel() > 0 and 0 <= int(tokens.min()) <= int(tokens.max()) < len(unembedding)
    require(inside, f"{side}_tokens", "ids out of range", f"0 to {len(unembedding) - 1}")
    prediction = (hidden @ unembedding.mT).softmax(-1)
    return one_hot(tokens.long(), len(unembedding)).to(prediction.dtype) - prediction


def _shared_contexts(h_plus: Tensor, h_minus: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """Whether position k has the same prefix in both, (..., min(T, T')): the prompt's has."""
    require(plus.shape[:-1] == minus.shape[:-1], "rejected_tokens", "other batch axes", "the same")
    both = min(plus.shape[-1], minus.shape[-1])
    same = (plus[..., :both] == minus[..., :both]).cumprod(-1).bool()
    shared = torch.cat([torch.ones_like(same[..., :1]), same[..., :-1]], -1)
    a, b = h_plus[..., :both, :], h_minus[..., :both, :]
    alike = (a - b).norm(dim=-1) <= 1e-3 * (a.norm(dim=-1) + b.norm(dim=-1))  # rounding aside
    require(bool((alike | ~shared).all()), "rejected_hidden", "another vector for a shared context",
            "the chosen's, where the prefix is the same")  # fmt: skip
    return shared


# ── Losses ───────────────────────────────────────────────────────────────────────────────────────


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_margin: Tensor | float, *, beta: float = 0.1
) -> Tensor:
    r"""Direct preference optimisation: :math:`-\ln\sigma(\beta(r-r_{ref}))`, a loss a pair.

    chosen, rejected: (B,) log-probabilities of whole responses, nats; r is their difference and
    `reference_margin` that of the reference model. To anchor the chosen response, as the paper's
    regularised baseline does, add :math:`-\lambda\ln\pi(y^+)`: ``- coefficient * chosen``.
    Rafailov et al., 2023, arXiv:2305.18290.

    >>> round(dpo_loss(torch.tensor(-2.0), torch.tensor(-3.0), 1.0).item(), 4)
    0.6931
    """
    require(beta > 0, "beta", beta, "a positive number")
    return -logsigmoid(beta * (chosen - rejected - reference_margin))


def ipo_loss(
    chosen: Tensor, rejected: Tensor, reference_margin: Tensor | float, *, beta: float = 0.1
) -> Tensor:
    r"""Identity preference optimisation: :math:`(r-r_{ref}-\frac1{2\beta})^2`, a loss a pair.

    As `dpo_loss`, and of whole responses: TRL's loss of this name divides the log-probabilities
    by the responses' lengths first. Azar et al., 2023, arXiv:2310.12036.

    >>> ipo_loss(torch.tensor(-2.0), torch.tensor(-3.0), 0.0, beta=0.5).item()
    0.0
    """
    require(beta > 0, "beta", beta, "a positive number")
    return (chosen - rejected - reference_margin - 1 / (2 * beta)).square()


# ── Filtering ────────────────────────────────────────────────────────────────────────────────────


def filter_by_score(
    scores: ArrayLike,
    keep: float = 0.05,
    *,
    which: Literal["lowest", "highest"] | float = "lowest",
) -> Draw:
    r"""Keep a window of the pairs in order of their scores; by default the 5 % that score lowest.

    In ascending order (ties stay in order of position) the window of k pairs is centred at
    position :math:`\mathrm{round}(Q(n-1))` and moved inwards where it would stick out, so that
    there are always k; the released code lets it be cut off. Q is 0 for ``"lowest"``, 1 for
    ``"highest"``, or `which` itself.

    scores: (n,) finite. keep: a share, float in (0, 1], or a count, int. Returns a Draw of the k
    rows in order of position, weights one; not for totals. `draw.take(dataset)` is the filtered
    ``datasets.Dataset``. Raises InputError on NaN, a share outside (0, 1] or one that keeps
    nothing, a count below one or above n. Time O(n log n). Prefix-sum: depends on the row order
    where scores tie.

    Razin et al., 2025, arXiv:2410.08847, Sections 5 and 6.

    >>> filter_by_score([3.0, -1.0, 0.0, 2.0], 2).indices.tolist()
    [1, 2]
    >>> filter_by_score([3.0, -1.0, 0.0, 2.0], 0.5, which="highest").indices.tolist()
    [0, 3]
    """
    values = to_numpy(scores).astype(np.float64)
    require(values.ndim == 1 and len(values) > 0, "scores", f"shape {values.shape}", "(n,), n > 0")
    require_finite("scores", values)
    n, k = len(values), keep
    if not isinstance(keep, int | np.integer) or isinstance(keep, bool):
        share = isinstance(keep, float | np.floating) and 0 < keep <= 1
        require(share, "keep", repr(keep), "a count, or a share in (0, 1]")
        k = round(keep * n)
    require(1 <= k <= n, "keep", f"{keep}: {k} of {n} pairs", f"1 to {n}")
    ends: dict[Any, float] = {"lowest": 0.0, "highest": 1.0}
    quantile: Any = ends.get(which, which)
    number = isinstance(quantile, int | float) and 0 <= quantile <= 1
    require(number, "which", repr(which), "'lowest', 'highest' or a quantile in [0, 1]")
    start = min(max(round(quantile * (n - 1)) - int(k) // 2, 0), n - int(k))
    kept = np.sort(np.argsort(values, kind="stable")[start : start + int(k)])
    return Draw(kept, np.ones(len(kept)), n, scores=values[kept], method=f"filter at {quantile:g}")
