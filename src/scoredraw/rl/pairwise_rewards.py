r"""Rewards from comparisons: an answer is worth the share of its rivals that it beats.

Dividing by a group's deviation makes the best of eight answers an advantage of 1 to 2, however
little better it is: A = (r - mean)/std blows up what lies within a scorer's noise. A judge that
compares two answers may call that a tie. With v_ij = 1, ½ or 0 where i beats, ties with or loses
to j,

    w_i = Σ_j v_ij / (comparisons of i)        Σ w = G/2 where each pair was compared once.

Where nothing ties, w is the rank of the answer and nothing is won; all that helps is in the ties.
A floor under the deviation, A = (r - mean) / max(std, floor), buys nearly the same without a judge.

max |A| is at most (G - 1)/√G by any reward; by a win rate without ties √(3 (G-1)² / (G (G+1))).

Wang et al., "Pref-GRPO: pairwise preference reward-based GRPO for stable text-to-image
reinforcement learning", 2025, arXiv 2508.20751. The margin, the floor and the bounds are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.metrics import Estimate, bootstrap_interval, proportion_interval
from scoredraw.rl.reward_groups import (
    RewardGroups,
    centre,
    chain,
    deviation,
    group_rewards,
    reward_vector,
    scale,
)
from scoredraw.uniforms import generator

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

EPS = 1e-8
TIE, FIRST, SECOND = 0, 1, 2
MISSING = ("drop", "tie")
ELO_PER_NAT = 400 / math.log(10)

# ── from verdicts to rewards ────────────────────────────────────────────────────────────────────


def round_robin_pairs(num_items: int, max_pairs: int | None = None, rng: Any = None) -> Tensor:
    """Which of G items to compare, int64 (M, 2), the smaller index first.

    All G(G - 1)/2 pairs in order; or the first max_pairs of a tournament's rounds (circle method)
    with the items seated at random, so that no item is compared much more often than another: with
    G even the counts differ by at most 1. Raises InputError for G < 2 and max_pairs < 1. O(G²).

    >>> round_robin_pairs(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    >>> round_robin_pairs(6, 3, rng=0).flatten().bincount().tolist()
    [1, 1, 1, 1, 1, 1]
    """
    G = int(num_items)
    require(G >= 2, "num_items", num_items, "at least 2 to compare")
    if max_pairs is None or max_pairs >= G * (G - 1) // 2:
        return torch.combinations(torch.arange(G))
    require(max_pairs >= 1, "max_pairs", max_pairs, "a positive count, or None for all pairs")
    even = G + G % 2
    rounds, k = np.arange(even - 1)[:, None], np.arange(1, even // 2)
    turning = np.stack([(rounds + k) % (even - 1), (rounds - k) % (even - 1)], axis=-1)
    fixed = np.stack([rounds, np.full_like(rounds, even - 1)], axis=-1)
    games = np.concatenate([fixed, turning], axis=1).reshape(-1, 2)
    games = games[(games < G).all(axis=1)][:max_pairs]  # with an odd G one seat is empty
    return torch.from_numpy(np.sort(generator(rng).permutation(G)[games], axis=1))


def pairwise_win_rate(
    verdicts: Any,
    pairs: Any,
    num_items: int,
    tie: float = 0.5,
    missing: str = "drop",
    decimals: int | None = None,
) -> Tensor:
    """The share of its comparisons that each item wins, float64 (num_items,).

    verdicts: (M,) 1 the first won, 2 the second, 0 a tie, None or NaN no verdict; pairs: (M, 2) of
    items, in any order, repeated or one-sided. tie: what each side gets. missing: "drop" leaves a
    comparison without verdict out; "tie" makes it one, as the released code does, which writes 0
    for both. An item without a comparison has NaN (released: 0). decimals: round (released: 3).
    Raises InputError for G < 2, pairs outside or of one item, lengths and other verdicts. O(M + G).

    Wang et al. 2025, arXiv 2508.20751.

    >>> pairwise_win_rate([1, 0, None], [(0, 1), (0, 2), (1, 2)], 3)
    tensor([0.7500, 0.0000, 0.5000], dtype=torch.float64)
    """
    v, ij = _comparisons(verdicts, pairs, num_items, missing)
    require(0 <= tie <= 1, "tie", tie, "a number from 0 to 1")
    points = torch.stack([(v == FIRST) + tie * (v == TIE), (v == SECOND) + tie * (v == TIE)], 1)
    flat, n = ij.reshape(-1), int(num_items)
    compared = torch.bincount(flat, minlength=n)
    rate = torch.bincount(flat, points.double().reshape(-1), minlength=n) / compared
    return rate if decimals is None else rate.round(decimals=decimals)


def bradley_terry(
    verdicts: Any, pairs: Any, num_items: int, prior_sd: float = 2.0, missing: str = "drop"
) -> Tensor:
    """Strengths θ from the same verdicts, float64 (num_items,): P(i beats j) = σ(θ_i - θ_j).

    The most probable θ under θ ~ N(0, prior_sd²), a tie being half a win for each; without a prior
    an unbeaten item would be infinitely strong. Times ELO_PER_NAT these are Elo points. Once all
    pairs are compared θ ranks as the win rate does; where they are not, θ knows whom one has
    beaten. NaN and errors as `pairwise_win_rate`. One logistic regression, O(M + G) an iteration.

    Bradley and Terry 1952; the prior is ours.

    >>> bradley_terry([1, 1], [(0, 1), (1, 2)], 3).round(decimals=2)
    tensor([ 1.0400,  0.0000, -1.0400], dtype=torch.float64)
    """
    from scipy.sparse import csr_array, vstack
    from sklearn.linear_model import LogisticRegression

    v, ij = _comparisons(verdicts, pairs, num_items, missing)
    require(0 < prior_sd < math.inf, "prior_sd", prior_sd, "a positive number")
    n, M = int(num_items), len(v)
    if not M:
        return torch.full((n,), math.nan, dtype=torch.float64)
    rows, signs = np.arange(M).repeat(2), np.tile([1.0, -1.0], M)
    x = csr_array((signs, (rows, ij.reshape(-1).numpy())), (M, n))
    won = ((v == FIRST) + 0.5 * (v == TIE)).double().numpy()
    model = LogisticRegression(
        C=prior_sd**2, fit_intercept=False, solver="newton-cg", tol=1e-10, max_iter=1000
    )
    both = vstack([x, x], format="csr")  # won by the first, and by the second, as far as it is so
    model.fit(both, np.repeat([1, 0], M), sample_weight=np.r_[won, 1 - won])
    never = torch.bincount(ij.reshape(-1), minlength=n) == 0
    return torch.from_numpy(model.coef_[0]).masked_fill(never, math.nan)


def _comparisons(verdicts: Any, pairs: Any, num_items: int, missing: str) -> tuple[Tensor, Tensor]:
    """Verdicts (m,) and pairs (m, 2) that count, checked."""
    require(num_items >= 2, "num_items", num_items, "at least 2 to compare")
    require(missing in MISSING, "missing", repr(missing), "'drop' or 'tie'")
    listed = verdicts if isinstance(verdicts, Sequence) else ()
    odd = next((v for v in listed if isinstance(v, (str, bool))), None)
    odd = "booleans" if str(getattr(verdicts, "dtype", "")).endswith("bool") else odd
    require(odd is None, "verdicts", repr(odd), "1, 2, 0 for a tie, or None")
    v = reward_vector(verdicts).double().cpu()
    known = torch.isin(v, torch.tensor([0.0, 1.0, 2.0])) | v.isnan()
    require(bool(known.all()), "verdicts", v[~known][:1].tolist(), "1, 2, 0 for a tie, or None")
    ij = torch.as_tensor(pairs, device="cpu")
    ij = ij.reshape(0, 2).long() if not ij.numel() else ij
    shape = tuple(ij.shape)
    require(shape == (len(v), 2), "pairs", f"shape {shape}", f"({len(v)}, 2), one a verdict")
    require(not ij.is_floating_point(), "pairs", ij.dtype, "whole numbers")
    inside = ((ij >= 0) & (ij < num_items)).all(dim=1) & (ij[:, 0] != ij[:, 1])
    wanted = f"two different items of 0 .. {num_items - 1}"
    require(bool(inside.all()), "pairs", ij[~inside][:1].tolist(), wanted)
    if missing == "tie":
        return v.nan_to_num(nan=float(TIE)), ij.long()
    return v[~v.isnan()], ij[~v.isnan()].long()


def score_win_rate(
    scores: Any, group_ids: Any = None, num_generations: int | None = None, margin: float = 0.0
) -> Tensor:
    """The win rate (B,) of scores under a judge that ties whatever is less than margin apart.

    At margin 0 the rank of each answer in its group, (worse + ½ equal)/(n - 1). A missing score
    or one that is alone has NaN. Groups and errors as `group_rewards`, and for a margin below 0.
    O(B log B), memory O(B).

    >>> score_win_rate([0.1, 0.2, 0.9], num_generations=3, margin=0.5)
    tensor([0.2500, 0.2500, 1.0000])
    """
    require(0 <= margin < math.inf, "margin", margin, "a number of at least 0")
    groups = group_rewards(scores, group_ids, num_generations)
    x, order = groups.table.sort(dim=1)  # NaN last
    x = x.nan_to_num(nan=math.inf)
    beats = torch.searchsorted(x, x - margin, right=margin > 0)  # the first so many, in order
    n = groups.size[:, None]
    places = torch.arange(x.shape[1], device=x.device).expand_as(x).contiguous()
    beaten = n - torch.searchsorted(beats.contiguous(), places, right=True).clamp(max=n)
    rate = (beats + (n - 1 - beats - beaten) / 2) / (n - 1)
    rate = torch.where((places < n) & (n > 1), rate, math.nan).to(x.dtype)
    return _flat(replace(groups, table=torch.empty_like(rate).scatter(1, order, rate)))


def flex_reward(
    overall: Any,
    categories: Any,
    weights: tuple[float, float] = (0.3, 0.7),
    category_weights: Sequence[float] = (1.0, 0.7, 0.7),
) -> Tensor:
    """One reward (B,) of an overall win rate and those by category (aesthetics, consistency, ..).

    (w_o overall + w_d mean of the categories by their weights)/(w_o + w_d). overall: (B,);
    categories: (K, B), NaN where a judge named no winner: left out, and without any category
    overall counts alone. To normalise the parts apart, give them to `combine_advantages`.

    >>> flex_reward([1.0, 0.0], [[0.5, None], [None, None], [None, None]])
    tensor([0.6500, 0.0000])
    """
    whole = reward_vector(overall)
    rows = [reward_vector(row) for row in categories]
    K = len(rows)
    require(len(category_weights) == K, "category_weights", len(category_weights), f"{K} numbers")
    positive = min(*weights, *category_weights) >= 0 and sum(weights) > 0
    require(positive, "weights", (weights, category_weights), "numbers of at least 0, not all 0")
    for row in rows:
        require(len(row) == len(whole), "categories", f"{len(row)} rows", f"{len(whole)}")
    by_kind = torch.stack(rows) if rows else whole.new_zeros(0, len(whole))
    w = torch.as_tensor(category_weights, dtype=whole.dtype, device=whole.device)[:, None]
    total = (w * ~by_kind.isnan()).sum(dim=0)
    part = (w * by_kind.nan_to_num()).sum(dim=0) / total
    both = (weights[0] * whole + weights[1] * part) / sum(weights)
    return torch.where(total > 0, both, whole)


# ── advantages ──────────────────────────────────────────────────────────────────────────────────


def normalised_advantages(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int | None = None,
    std_floor: float = 0.0,
    eps: float = EPS,
) -> Tensor:
    """(r - mean) / (max(std, std_floor) + eps) in each group, (B,); 0 without a reward.

    std: unbiased. std_floor: the deviation that is the scorer's noise; below it an advantage is in
    proportion to the difference. In float64, since in float32 the rounding of the mean of equal
    rewards exceeds this eps, as released, and comes out as an advantage of ±1; given back as
    reward's dtype. Groups and errors as `group_rewards`.

    >>> normalised_advantages([3.400, 3.401], num_generations=2).round(decimals=2)
    tensor([-0.7100,  0.7100])
    >>> normalised_advantages([3.400, 3.401], num_generations=2, std_floor=0.1).round(decimals=3)
    tensor([-0.0050,  0.0050])
    """
    require(0 <= std_floor < math.inf, "std_floor", std_floor, "a number of at least 0")
    values = reward_vector(rewards)
    groups = group_rewards(values.double(), group_ids, num_generations)
    if not std_floor:
        return chain(centre(), scale(ddof=1, eps=eps))(groups).to(values.dtype)
    away = centre()(groups)
    spread = deviation(groups.table, 1, dim=1).clamp(min=std_floor)
    return replace(away, table=away.table / (spread + eps)).values().to(values.dtype)


def combine_advantages(
    rewards: Mapping[str, Any],
    weights: Mapping[str, float] | None = None,
    group_ids: Any = None,
    num_generations: int | None = None,
    whiten: bool = False,
    clamp: float | None = None,
    eps: float = EPS,
) -> Tensor:
    """Σ_k weight_k · (advantages of reward k in its group), (B,): each normalised on its own.

    rewards: name -> (B,); weights: name -> number, 1 each if None. A row adds nothing where it has
    no reward. whiten: then (A - mean)/(std + eps) over the rows of the batch that have any (GDPO;
    at eps = 1e-4 TRL's "normalize_then_sum"). clamp: to ±clamp (released: 5). Raises InputError for
    names that differ, no reward and lengths; the rest as `group_rewards`.

    Wang et al. 2025, arXiv 2508.20751; Liu et al. 2026, arXiv 2601.05242 (GDPO).

    >>> both = {"win": [1.0, 0.0, 1.0, 0.0], "clip": [0.3, 0.1, 0.2, 0.4]}
    >>> combine_advantages(both, {"win": 0.4, "clip": 0.6}, num_generations=2).round(decimals=2)
    tensor([ 0.7100, -0.7100, -0.1400,  0.1400])
    """
    require(len(rewards) > 0, "rewards", "none", "one or more by name")
    w = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
    require(set(w) == set(rewards), "weights", sorted(w), f"one for each of {sorted(rewards)}")
    require(all(map(math.isfinite, w.values())), "weights", w, "finite numbers")
    require(clamp is None or clamp > 0, "clamp", clamp, "a positive number, or None")
    columns = {name: reward_vector(r) for name, r in rewards.items()}
    B = {len(r) for r in columns.values()}
    require(len(B) == 1, "rewards", f"{sorted(B)} rows", "as many of each")
    one = next(iter(columns.values()))
    total = torch.zeros_like(one, dtype=torch.float64)
    for name, r in columns.items():
        r = r.to(total)
        total += w[name] * normalised_advantages(r, group_ids, num_generations, eps=eps)
    if whiten:
        known = torch.stack([~r.to(total).isnan() for r in columns.values()]).any(dim=0)
        batch = group_rewards(torch.where(known, total, math.nan), num_generations=len(total) or 1)
        total = chain(centre("batch"), scale("batch", eps=eps, of="values"))(batch)
    return (total if clamp is None else total.clamp(-clamp, clamp)).to(one.dtype)


class CombinedAdvantage:
    """`combine_advantages` of the trainer's reward functions, for `AdvantageGRPOTrainer`.

    weights: one for each of `reward_funcs`, in their order (TRL's own don't count); None: 1 each.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        whiten: bool = False,
        clamp: float | None = 5.0,
        eps: float = EPS,
    ) -> None:
        self.weights, self.whiten, self.clamp, self.eps = weights, whiten, clamp, eps

    def __call__(self, rollouts: Rollouts) -> Tensor:
        columns = {str(k): column for k, column in enumerate(rollouts.rewards.T)}
        w = None if self.weights is None else {str(k): w for k, w in enumerate(self.weights)}
        return combine_advantages(
            columns, w, rollouts.group_ids, whiten=self.whiten, clamp=self.clamp, eps=self.eps
        )


# ── what normalising makes of small differences ─────────────────────────────────────────────────


@dataclass(frozen=True)
class ScoreGapAudit:
    """What dividing by the deviation makes of scores whose differences below margin mean nothing.

    groups: with two scores or more; score_range: the median of the groups' ranges; amplification:
    the median of max |A| / range (constant groups left out); within_margin: the share of groups
    whose scores all lie within margin; illusory: the share of Σ |A| that is in those groups, which
    a win rate with this margin gives nothing; pointwise, ranked, win_rate: mean |A| by score, by
    rank and by win rate; silent: the share of groups without a signal by win rate. Intervals over
    groups, 95 %.
    """

    margin: float
    groups: int
    score_range: float
    amplification: float
    within_margin: Estimate
    illusory: Estimate
    pointwise: float
    ranked: float
    win_rate: float
    silent: float


def audit_score_gaps(
    scores: Any,
    group_ids: Any = None,
    num_generations: int | None = None,
    *,
    margin: float,
    resamples: int = 2000,
    rng: Any = 0,
) -> ScoreGapAudit:
    """Measure how much of a scorer's advantages comes from differences below margin.

    scores: (B,); margin: what the scorer's own noise is, in its units, such as twice its deviation
    when asked again. Raises InputError for fewer than 2 groups of two scores, and as
    `score_win_rate`. O(B log B + resamples · groups).

    >>> found = audit_score_gaps([3.40, 3.41, 3.0, 4.0], num_generations=2, margin=0.1)
    >>> found.within_margin.value, round(found.illusory.value, 3), round(found.win_rate, 3)
    (0.5, 0.5, 0.354)
    """
    values = reward_vector(scores).double()
    groups = group_rewards(values, group_ids, num_generations)
    table = groups.table[groups.size > 1]
    require(len(table) >= 2, "scores", f"{len(table)} groups of two or more", "at least 2")
    ids = groups.groups()

    def sizes(rewards: Tensor) -> Tensor:
        absolute = normalised_advantages(rewards, ids).abs().masked_fill(values.isnan(), math.nan)
        return group_rewards(absolute, ids).table[groups.size > 1]

    by_score, by_rank, by_wins = (
        sizes(r) for r in (values, *(score_win_rate(values, ids, margin=m) for m in (0.0, margin)))
    )
    low, high = table.nan_to_num(nan=math.inf).amin(1), table.nan_to_num(nan=-math.inf).amax(1)
    spread = high - low
    within = spread < margin
    most = by_score.nan_to_num(nan=0.0).amax(dim=1)
    factor = (most / spread)[spread > 0]
    mass = by_score.nansum(dim=1)
    share = torch.stack([mass * within, mass], dim=1).numpy()
    point, ranked, wins = (float(a.nanmean()) for a in (by_score, by_rank, by_wins))
    return ScoreGapAudit(
        margin, len(table), float(spread.quantile(0.5)),
        float(factor.quantile(0.5)) if len(factor) else math.nan,
        proportion_interval(int(within.sum()), len(table)),
        bootstrap_interval(share, statistic=_share, resamples=resamples, rng=rng),
        point, ranked, wins, float((by_wins.nansum(dim=1) == 0).double().mean()),
    )  # fmt: skip


def _share(rows: Any, axis: int) -> Any:
    part, whole = np.moveaxis(rows.sum(axis=axis), -1, 0)
    return part / np.where(whole > 0, whole, 1.0)


def _flat(groups: RewardGroups) -> Tensor:
    return groups.answers.reshape(-1)[groups.place]
