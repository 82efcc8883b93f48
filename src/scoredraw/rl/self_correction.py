"""An answer, a second look at it, and who is credited for what came of it.

An episode is K attempts at one problem, K = 2 in the paper; nobody says which of them are right:

    x_1 = the problem,   x_{k+1} = [x_k, y_k, an instruction to look again],   y_k ~ π(. | x_k).

Rewards r_k in [0, 1] are there in training only. A policy that repeats itself earns nearly as much
as one that corrects itself, and is easier to find. So stage I teaches the later attempts while
the first is held at the base model, and stage II trains all and pays for progress:

                turn 1             turn k >= 2
    stage I     -β₂ KL_1           r_k - β₁ KL_k
    stage II    r_1 - β₁ KL_1      r_k + α (r_k - r_{k-1}) - β₁ KL_k

with KL_k that of π from the base model at x_k, β₂ >> β₁ and α > 1. The paper has K = 2 and the sum
of a row as the objective; more turns, and whose tokens get what, are worked out here:

credit="per_turn": the tokens of a turn get its own return. Then -α r_{k-1} is known before y_k is
written, a baseline with a mean effect of none, and the bonus is a weight of 1 + α on later turns.
credit="total": all tokens get the sum of the row. In it r_1 has the coefficient 1 - α, below 0:
the best first attempt is a wrong one.

Kumar, Zhuang, Agarwal, Su, Co-Reyes, Singh, Baumli, Iqbal, Bishop, Roelofs, Zhang, McKinney,
Shrivastava, Paduraru, Tucker, Precup, Behbahani and Faust, "Training language models to
self-correct via reinforcement learning", 2024, arXiv 2409.12917 (SCoRe).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoredraw.errors import InputError, require
from scoredraw.rl.divergences import divergence_from_logits, kl_k1, kl_k3
from scoredraw.rl.reward_groups import centre, group_rewards

CREDITS = ("per_turn", "total")
BASELINES = ("loo", "mean")
ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}
UNIT = (0.0, 1.0)


# ── what an attempt costs ───────────────────────────────────────────────────────────────────────


def turn_kl(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    estimator: str = "k1",
    missing: Tensor | None = None,
) -> Tensor:
    """KL of the policy from its reference over one turn's tokens, (B,), in nats.

    "k1"     Σ_t log π/π_ref of the sampled tokens: no bias, may be negative,
    "k3"     Σ_t (e^{-k} - 1 + k), k = log π/π_ref: no bias, never negative,
    "exact"  Σ_t KL(π(. | s_t) ‖ π_ref(. | s_t)) over the vocabulary at the sampled prefixes.

    logp, ref_logp: (B, T), or logits (B, T, V) for "exact", both under the same prompt: the second
    attempt's contains the first. mask: (B, T), the tokens of the turn. missing: (B,) bool, the
    rows without this attempt, whose KL is 0. Raises InputError for shapes that differ, an unknown
    estimator, and a row without a token that isn't missing. Row-local; O(B T), or O(B T V).

    >>> turn_kl(torch.tensor([[-1.0, -9.0]]), torch.tensor([[-1.5, 0.0]]), torch.tensor([[1, 0]]))
    tensor([0.5000])
    """
    known = estimator in {*ESTIMATORS, "exact"}
    require(known, "estimator", repr(estimator), f"{', '.join(ESTIMATORS)} or exact")
    shapes = f"{tuple(logp.shape)}, {tuple(ref_logp.shape)} and {tuple(mask.shape)}"
    fits = logp.shape == ref_logp.shape and mask.ndim == 2 and logp.shape[:2] == mask.shape
    fits = fits and logp.ndim == (3 if estimator == "exact" else 2)
    want = "(B, T, V), (B, T, V) and (B, T)" if estimator == "exact" else "three times (B, T)"
    require(fits, "logp, ref_logp and mask", shapes, want)
    kept = mask.bool()
    written = kept.any(dim=1)
    if missing is not None:
        require(missing.shape == written.shape, "missing", tuple(missing.shape), f"({len(mask)},)")
        written = written | missing
    require(bool(written.all()), "mask", f"no token in row {_first(~written)}", "an attempt a row")
    if estimator == "exact":
        each = divergence_from_logits(logp, ref_logp, "kl")
    else:
        each = ESTIMATORS[estimator](logp, ref_logp)
    return torch.where(kept, each, 0.0).sum(dim=1)


# ── what it earns ───────────────────────────────────────────────────────────────────────────────


def score_returns(
    rewards: Any,
    kl: Any = None,
    stage: int = 2,
    alpha: float = 10.0,
    beta1: float = 0.01,
    beta2: float = 0.1,
    credit: str = "per_turn",
    *,
    missing: Any = None,
    reward_range: tuple[float, float] = UNIT,
) -> Tensor:
    """Returns (B, K) of the turns of B episodes, by the table at the head of this file.

    rewards: (B, K) of the attempts, K >= 2; kl: (B, K) of each (`turn_kl`), None for no penalty;
    stage: 1 or 2; credit: "per_turn", or "total", the sum of the row at each turn. missing: (B, K)
    bool, attempts that were not made (the one before hit the length limit); they have the lowest
    reward, whatever `rewards` says there. float32, or float64 where the rewards are; device kept.
    Raises InputError for rewards that are NaN or outside reward_range, shapes that differ, a KL
    that is not finite, an unknown stage or credit, and negative coefficients; warns for α <= 1 in
    stage 2, which does not outweigh what can be had without progress. Row-local; O(B K).

    In a plain second stage (α = 0, one β) this is reinforcement learning over several turns.

    >>> score_returns([[0.0, 1.0], [1.0, 0.0]])
    tensor([[  0.,  11.],
            [  1., -10.]])
    >>> score_returns([[0.0, 1.0], [1.0, 0.0]], credit="total")
    tensor([[11., 11.],
            [-9., -9.]])
    """
    check_shaping(stage, alpha, beta1, beta2, credit)
    r = _rewards(rewards, missing, reward_range)
    penalty = torch.zeros_like(r)
    if kl is not None:
        penalty = _table(kl, "kl", r.device).to(r.dtype)
        require(penalty.shape == r.shape, "kl", tuple(penalty.shape), f"{tuple(r.shape)}")
        require(bool(penalty.isfinite().all()), "kl", "NaN or infinity", "finite numbers")
    beta = torch.full_like(r[0], beta1)
    earned = r.clone()
    if stage == 1:
        beta[0] = beta2
        earned[:, 0] = 0.0
    else:
        earned[:, 1:] += alpha * (r[:, 1:] - r[:, :-1])
    found = earned - beta * penalty
    return found if credit == "per_turn" else found.sum(dim=1, keepdim=True).expand_as(found)


def score_advantages(
    rewards: Any,
    kl: Any = None,
    stage: int = 2,
    alpha: float = 10.0,
    beta1: float = 0.01,
    beta2: float = 0.1,
    credit: str = "per_turn",
    *,
    baseline: str = "loo",
    group_ids: Any = None,
    missing: Any = None,
    reward_range: tuple[float, float] = UNIT,
) -> Tensor:
    """`score_returns` less a baseline for each turn, (B, K): what multiplies Σ_t ∇ log π.

    baseline: "loo", the mean return at that turn of the others in the group (unbiased), or "mean",
    that of the whole group. group_ids: (B,) integers, the episodes of one prompt; None for one
    group of all. Raises InputError also for a group of one with "loo". A group's advantages depend
    on that group alone. O(B K + B log B).

    >>> score_advantages([[0.0, 1.0], [1.0, 1.0]])
    tensor([[ -1.,  10.],
            [  1., -10.]])
    """
    require(baseline in BASELINES, "baseline", repr(baseline), ", ".join(BASELINES))
    found = score_returns(
        rewards, kl, stage, alpha, beta1, beta2, credit, missing=missing, reward_range=reward_range
    )
    B, K = found.shape
    ids = torch.zeros(B, dtype=torch.int64) if group_ids is None else group_ids
    turns = [group_rewards(found[:, k], ids) for k in range(K)]
    away = torch.stack([centre()(turn).values() for turn in turns], dim=1)
    if baseline == "mean":
        return away
    size = turns[0].size[turns[0].groups()].to(away.dtype)[:, None]
    alone = bool((size == 1).any())
    require(not alone, "group_ids", "a group of one", "two episodes or more for 'loo'")
    return away * size / (size - 1)


def turns_to_tokens(values: Tensor, turn: Tensor) -> Tensor:
    """(B, T): each turn's value (B, K) at its tokens; turn (B, T) int64 is 1 .. K there, else 0.

    >>> turns_to_tokens(torch.tensor([[0.5, -2.0]]), torch.tensor([[1, 1, 0, 2, 0]]))
    tensor([[ 0.5000,  0.5000,  0.0000, -2.0000,  0.0000]])
    """
    fits = values.ndim == 2 and turn.ndim == 2 and len(values) == len(turn)
    came = f"{tuple(values.shape)} and {tuple(turn.shape)}"
    require(fits, "values and turn", came, "(B, K) and (B, T)")
    K = values.shape[1]
    inside = turn.dtype == torch.int64 and bool(((turn >= 0) & (turn <= K)).all())
    require(inside, "turn", f"{turn.dtype}, or numbers outside", f"int64 from 0 to {K}")
    return torch.nn.functional.pad(values, (1, 0)).gather(1, turn)


def check_shaping(
    stage: int, alpha: float, beta1: float, beta2: float, credit: str = "per_turn"
) -> None:
    """InputError for what `score_returns` refuses of these, and its warning."""
    require(stage in {1, 2}, "stage", repr(stage), "1 or 2")
    require(credit in CREDITS, "credit", repr(credit), ", ".join(CREDITS))
    coefficients = (alpha, beta1, beta2)
    fine = all(0 <= x < math.inf for x in coefficients)
    require(fine, "alpha, beta1, beta2", coefficients, "finite numbers of at least 0")
    if stage == 2 and alpha <= 1:
        problem = f"alpha: {alpha:g} does not pay for progress; the method wants more than 1"
        warnings.warn(problem, RuntimeWarning, stacklevel=3)


def _rewards(rewards: Any, missing: Any, reward_range: tuple[float, float]) -> Tensor:
    low, high = reward_range
    require(low < high, "reward_range", reward_range, "its lower end first")
    r = _table(rewards, "rewards")
    r = r if r.dtype == torch.float64 else r.float()
    fits = r.ndim == 2 and len(r) > 0 and r.shape[1] >= 2
    require(fits, "rewards", f"shape {tuple(r.shape)}", "(B, K), two attempts or more a row")
    if missing is not None:
        gone = _table(missing, "missing", r.device)
        fits = gone.shape == r.shape and gone.dtype == torch.bool
        came = f"{tuple(gone.shape)} of {gone.dtype}"
        require(fits, "missing", came, f"{tuple(r.shape)} of torch.bool")
        ends = not bool((gone[:, :-1] & ~gone[:, 1:]).any() or gone[:, 0].any())
        require(ends, "missing", "an attempt after one that is", "the last attempts of a row")
        r = r.masked_fill(gone, low)
    outside = ~((r >= low) & (r <= high))
    worst = r[outside][:1].tolist()
    require(not worst, "rewards", worst, f"numbers from {low:g} to {high:g}")
    return r


def _table(values: Any, name: str, device: torch.device | None = None) -> Tensor:
    """The values without gradient; InputError for words, None and rows of unlike lengths."""
    try:
        return torch.as_tensor(values, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(f"{name}: got no table ({reason}), want numbers") from None


def _first(rows: Tensor) -> int:
    return int(rows.int().argmax()) if bool(rows.any()) else -1


# ── how well a policy corrects itself ───────────────────────────────────────────────────────────


class SelfCorrection(NamedTuple):
    """Shares of episodes. delta = acc_t2 - acc_t1 = i2c - c2i.

    acc_t1, acc_t2: right at the first and at the second attempt; i2c: wrong, then right; c2i:
    right, then wrong; missing: without a second attempt, which counts as wrong.
    """

    acc_t1: float
    acc_t2: float
    delta: float
    i2c: float
    c2i: float
    missing: float


def self_correction_metrics(correct1: Any, correct2: Any, missing: Any = None) -> SelfCorrection:
    """How often a second attempt mends the first, and how often it spoils it.

    correct1, correct2: (B,) bool or 0/1; missing: (B,) bool, no second attempt. Of more attempts
    take two at a time. Raises InputError for other shapes and values, and for no episode. O(B).

    >>> self_correction_metrics([0, 1, 1, 0], [1, 1, 0, 0])
    SelfCorrection(acc_t1=0.5, acc_t2=0.5, delta=0.0, i2c=0.25, c2i=0.25, missing=0.0)
    """
    first, second = (
        _table(c, name).double() for c, name in ((correct1, "correct1"), (correct2, "correct2"))
    )
    fits = first.ndim == 1 and len(first) > 0 and first.shape == second.shape
    came = f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    require(fits, "correct1 and correct2", came, "(B,) each, one episode or more")
    for name, c in (("correct1", first), ("correct2", second)):
        other = c[(c != 0) & (c != 1)][:1].tolist()
        require(not other, name, other, "0 or 1")
    gone = torch.zeros_like(first)
    if missing is not None:
        flags = _table(missing, "missing", first.device)
        fits = flags.shape == first.shape and flags.dtype == torch.bool
        require(fits, "missing", f"{tuple(flags.shape)} of {flags.dtype}", "(B,) of torch.bool")
        gone, second = flags.double(), second * ~flags
    mended, spoiled = ((1 - first) * second).mean(), (first * (1 - second)).mean()
    delta = mended - spoiled
    shares = (first.mean(), second.mean(), delta, mended, spoiled, gone.mean())
    return SelfCorrection(*(float(x) for x in shares))
