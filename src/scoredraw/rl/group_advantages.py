"""Advantages of sampled answers from the rewards of their group: NGRPO and what it is measured by.

GRPO compares an answer with the others to its prompt, A = (r - mean) / (std + eps), and so learns
nothing from a group whose answers are all wrong. NGRPO computes mean and deviation as if n more
answers with the highest reward had been sampled,

    R' = R + n · {r_max},    A_i = (r_i - mean R') / (std R' + eps),

so that every answer of an all-wrong group is pushed down; the update is clipped more narrowly for
bad answers than for good ones. With rewards 0 and 1, k of G right and n = 1, at eps = 0:

    A_right = sqrt(G (G - k) / ((k + 1)(G + 1))),   A_wrong = -sqrt(G (k + 1) / ((G - k)(G + 1))).

What that can teach (derived): on average over all samples a constant advantage teaches nothing,
since E[∇log π(y)] = 0. Given that all G are wrong, where p is the chance to be right,

    E[Σ_i A_i ∇log π(y_i)] = G p / ((1 - p) sqrt(G + 1)) · E[∇log π | right]:

the right direction, but as faint as the answer is rare. It is a shift of the baseline, and helps
through what problems share.

Nan, Chen, Huang, Lu, Wang, Xie, Xiong, Zeng, Zhou, Li and Xu 2025, arXiv 2509.18851.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.reward_groups import (
    EPS,
    RewardGroups,
    Transformation,
    centre,
    group_rewards,
    keep_single,
    scale,
    virtual_sample,
)

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

FILTERS = ("none", "all_correct", "all_incorrect", "all")


@dataclass(frozen=True)
class Recipe:
    """What belongs to an estimator besides its advantages.

    clip: how far the ratio may fall and rise; aggregation: as `clipped_policy_loss` has it;
    drop: the groups that are left out; one_sign: answers with advantage 0 are left out too.
    """

    clip: tuple[float, float] = (0.2, 0.2)
    aggregation: str = "seq_mean"
    drop: str = "none"
    one_sign: bool = False


RECIPES: Mapping[str, Recipe] = {
    "grpo": Recipe(),
    "dr_grpo": Recipe(aggregation="dr_grpo"),
    "rloo": Recipe(aggregation="seq_sum"),
    "dapo": Recipe((0.2, 0.28), "dapo", drop="all"),
    "ngrpo": Recipe((0.16, 0.24), "token_mean", drop="all_correct"),
    "psr": Recipe(aggregation="token_mean", one_sign=True),
    "nsr": Recipe(aggregation="token_mean", one_sign=True),
    "w_reinforce": Recipe(aggregation="token_mean"),
    "reinforce_pp": Recipe(aggregation="token_mean"),
    "reinforce_pp_baseline": Recipe(aggregation="token_mean"),
    "remax": Recipe(aggregation="seq_sum"),
}


def group_advantages(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int = 8,
    estimator: str = "ngrpo",
    *,
    max_reward: Any = 1.0,
    num_virtual: int = 1,
    positive_weight: float = 0.1,
    greedy_rewards: Any = None,
    ddof: int = 1,
    eps: float = EPS,
    single_sample: str = "zero",
) -> Tensor:
    """(B,) advantages of answers from their rewards (B,), by one of eleven estimators.

    With mean and std of the group and R = max_reward (a number, or one a group by its id):
    - "ngrpo" as at the head of this file; num_virtual = 0 is GRPO,
    - "grpo", "dapo" (r - mean) / (std + eps); "dr_grpo" r - mean; "rloo" r - mean of the others,
    - "psr" r; "nsr" r - R; "w_reinforce" positive_weight · r + (r - R): learning from right answers
      alone, from wrong ones alone, and from both (Zhu et al. 2025, arXiv 2506.01347),
    - "reinforce_pp" (r - mean) / (std + eps) of the batch; "reinforce_pp_baseline" r less the mean
      of the group, over the deviation of that in the batch (Hu et al. 2025, arXiv 2501.03262),
    - "remax" r - greedy_rewards, one a group (Li et al. 2023, arXiv 2310.10505).

    group_ids: (B,) integers in any order; without them num_generations rows after one another are
    a group. None and NaN are rows without a reward: left out of everything, advantage 0.
    single_sample: a group with one reward has advantage 0, or "raw" r / (1 + eps) as the released
    trainers have it ("grpo", "dapo", "ngrpo"; no virtual answers then). Raises InputError for
    infinite rewards, one above R ("ngrpo"), ids or batches that do not fit, and an unknown
    estimator. Half precision becomes float32. Each group on its own, but for "reinforce_pp" and
    its baseline. O(B log B).

    >>> group_advantages([0, 0, 0, 0, 1, 1, 0, 0], num_generations=4).round(decimals=3)
    tensor([-0.4470, -0.4470, -0.4470, -0.4470,  0.7300,  0.7300, -1.0950, -1.0950])
    """
    groups = group_rewards(rewards, group_ids, num_generations)
    require(estimator in RECIPES, "estimator", repr(estimator), ", ".join(RECIPES))
    require(single_sample in {"zero", "raw"}, "single_sample", repr(single_sample), "zero or raw")
    if estimator in {"grpo", "dapo", "ngrpo"}:
        steps: list[Transformation] = [centre(), scale(ddof=ddof, eps=eps)]
        if estimator == "ngrpo":
            steps.insert(0, virtual_sample(max_reward, num_virtual))
        done = _through(groups, *steps)
        return (keep_single(groups, done, eps) if single_sample == "raw" else done).values()
    if estimator in {"dr_grpo", "rloo"}:
        return _through(groups, centre("others" if estimator == "rloo" else "group")).values()
    if estimator == "reinforce_pp":
        return _through(groups, centre("batch"), scale("batch", ddof, eps)).values()
    if estimator == "reinforce_pp_baseline":
        return _through(groups, centre(), scale("batch", ddof, eps, of="values")).values()
    r = groups.values()
    if estimator == "remax":
        level = _of_answers(groups, greedy_rewards, "greedy_rewards")
        return _scored(groups, r - level)
    top = _of_answers(groups, max_reward, "max_reward")
    found = {"psr": r, "nsr": r - top, "w_reinforce": positive_weight * r + r - top}
    return _scored(groups, found[estimator])


def _through(groups: RewardGroups, *steps: Transformation) -> RewardGroups:
    for step in steps:
        groups = step(groups)
    return groups


def _of_answers(groups: RewardGroups, values: Any, name: str) -> Tensor:
    """(B,) a number, or one a group, at each answer."""
    require(values is not None, name, "None", "a number, or one a group")
    x = torch.as_tensor(values, dtype=groups.table.dtype, device=groups.table.device)
    P = len(groups.table)
    fits = x.ndim == 0 or x.shape == (P,)
    require(fits, name, f"shape {tuple(x.shape)}", f"a number, or one a group ({P},)")
    return x.expand(P)[groups.groups()]


def _scored(groups: RewardGroups, x: Tensor) -> Tensor:
    return torch.where(groups.table.reshape(-1)[groups.place].isnan(), 0.0, x)


# ── what is left out ────────────────────────────────────────────────────────────────────────────


def keep_groups(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int = 8,
    drop: str = "all_correct",
    *,
    max_reward: Any = 1.0,
    min_reward: float = 0.0,
) -> Tensor:
    """(B,) bool: the answers of groups that stay.

    drop: "all_correct" leaves out groups whose rewards all reach max_reward, "all_incorrect" those
    in which none is above min_reward, "all" both, "none" neither. Groups without any reward count
    as neither.

    >>> keep_groups([1, 1, 0, 0, 1, 0], num_generations=2, drop="all")
    tensor([False, False, False, False,  True,  True])
    """
    require(drop in FILTERS, "drop", repr(drop), ", ".join(FILTERS))
    groups = group_rewards(rewards, group_ids, num_generations)
    lowest = groups.table.nan_to_num(nan=torch.inf).amin(dim=1)[groups.groups()]
    highest = groups.table.nan_to_num(nan=-torch.inf).amax(dim=1)[groups.groups()]
    known = groups.size[groups.groups()] > 0
    right = known & (lowest >= _of_answers(groups, max_reward, "max_reward"))
    wrong = known & (highest <= min_reward)
    out = torch.zeros_like(right)
    if drop in {"all_correct", "all"}:
        out = out | right
    if drop in {"all_incorrect", "all"}:
        out = out | wrong
    return ~out


def overlong_penalty(lengths: Any, max_length: int, margin: int) -> Tensor:
    """DAPO's soft punishment of long answers, in [-1, 0]; to be added to the reward.

    0 up to max_length - margin tokens, then down in a line to -1 at max_length and beyond.
    Yu et al. 2025, arXiv 2503.14476.

    >>> overlong_penalty([10, 15, 20, 30], 20, 10)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    require(0 < margin <= max_length, "margin", margin, f"from 1 to max_length = {max_length}")
    over = torch.as_tensor(lengths).float() - (max_length - margin)
    return 0 - (over / margin).clamp(0, 1)


class GroupAdvantage:
    """An estimator as the `advantage_fn` of `AdvantageGRPOTrainer`.

    drop: which groups are left out, the estimator's own if None. Where groups or answers can be
    left out it returns the advantages and a mask of what stays. Options as `group_advantages`.
    The clip and the aggregation are TRL's to set: `trl_options` has them.

    >>> GroupAdvantage("dapo").trl_options()
    {'loss_type': 'dapo', 'epsilon': 0.2, 'epsilon_high': 0.28}
    """

    def __init__(self, estimator: str = "ngrpo", drop: str | None = None, **options: Any) -> None:
        require(estimator in RECIPES, "estimator", repr(estimator), ", ".join(RECIPES))
        self.recipe = RECIPES[estimator]
        self.drop = self.recipe.drop if drop is None else drop
        require(self.drop in FILTERS, "drop", repr(drop), ", ".join(FILTERS))
        self.estimator, self.options = estimator, options
        group_advantages([0.0, 0.0], num_generations=2, estimator=estimator, **options)

    def __call__(self, rollouts: Rollouts) -> Tensor | tuple[Tensor, Tensor]:
        """(B,) advantages, and the mask of the answers that stay."""
        r, ids = rollouts.reward, rollouts.group_ids
        A = group_advantages(r, ids, estimator=self.estimator, **self.options)
        if self.drop == "none" and not self.recipe.one_sign:
            return A
        top = self.options.get("max_reward", 1.0)
        keep = keep_groups(r, ids, drop=self.drop, max_reward=top)
        return A, keep & (A != 0) if self.recipe.one_sign else keep

    def trl_options(self) -> dict[str, Any]:
        """Loss and clip of the method as GRPOConfig names them."""
        names = {"token_mean": "bnpo", "seq_mean": "grpo", "seq_sum": "luspo"}
        low, high = self.recipe.clip
        how = self.recipe.aggregation
        return {"loss_type": names.get(how, how), "epsilon": low, "epsilon_high": high}
