"""Rewards of the answers to one prompt, on their way to advantages.

A group-based method compares an answer with the others to its prompt. The rewards of B answers lie
in a table with a row a prompt; small transformations of that table follow one another,

    virtual_sample -> centre -> scale -> to_tokens,

and each method is such a chain. What has no reward (None or NaN) is empty in the table: it stays
out of every mean and deviation, and its advantage is 0.

>>> advantages = chain(centre(), scale())
>>> advantages(group_rewards([1.0, 0.0, 0.0, None], num_generations=4)).round(decimals=2)
tensor([ 1.1500, -0.5800, -0.5800,  0.0000])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoredraw.errors import require

EPS = 1e-6


@dataclass(frozen=True, eq=False)
class RewardGroups:
    """Rewards, or what has become of them, in a table with a row a group.

    table: (P, width), NaN where there is nothing. place: (B,) int64, where each answer lies in the
    flattened table of the answers alone; size: (P,) how many answers of a group have a reward;
    rewards: the table as it was before anything was subtracted or divided; virtual: how many of
    the last columns nobody sampled. Memory O(P · the largest group).
    """

    table: Tensor
    place: Tensor
    size: Tensor
    rewards: Tensor
    virtual: int = 0

    @property
    def answers(self) -> Tensor:
        """The table without its virtual columns."""
        return self.table[:, : self.table.shape[1] - self.virtual]

    def values(self) -> Tensor:
        """(B,) what each answer carries, 0 where it has no reward."""
        return torch.nan_to_num(self.answers.reshape(-1)[self.place], nan=0.0)

    def double(self) -> RewardGroups:
        """In float64."""
        return replace(self, table=self.table.double(), rewards=self.rewards.double())

    def groups(self) -> Tensor:
        """(B,) int64: the row of the table that each answer lies in."""
        return self.place // self.answers.shape[1]


Transformation = Callable[[RewardGroups], RewardGroups]


def reward_vector(rewards: Any) -> Tensor:
    """(B,) rewards in float32 or float64, None as NaN; InputError for infinite ones and words.

    >>> reward_vector([1, None, 0.5])
    tensor([1.0000,    nan, 0.5000])
    """
    if not isinstance(rewards, Tensor):
        if isinstance(rewards, Sequence):
            rewards = [math.nan if reward is None else reward for reward in rewards]
            word = next((reward for reward in rewards if isinstance(reward, str)), None)
            require(word is None, "rewards", repr(word), "numbers, or None")
        rewards = torch.as_tensor(rewards)
    values = rewards.detach()
    values = values if values.dtype == torch.float64 else values.float()
    require(values.ndim == 1, "rewards", f"shape {tuple(values.shape)}", "one a row, (B,)")
    require(not bool(values.isinf().any()), "rewards", "an infinite one", "finite numbers or NaN")
    return values


def group_rewards(
    rewards: Any, group_ids: Any = None, num_generations: int | None = None
) -> RewardGroups:
    """Lay rewards (B,) in groups: rows with the same id, or num_generations after one another.

    group_ids: (B,) integers, in any order; groups may differ in size. Without them B has to be a
    multiple of num_generations. None and NaN are rows without a reward. Half precision becomes
    float32; device kept. Raises InputError for infinite rewards, ids of another length and a batch
    that num_generations does not divide. O(B log B).

    >>> group_rewards([1.0, 0.0, 0.5], group_ids=[7, 3, 7]).table
    tensor([[0.0000,    nan],
            [1.0000, 0.5000]])
    """
    values = reward_vector(rewards)
    B, device = len(values), values.device
    if group_ids is None:
        G = num_generations or 0
        require(G >= 1, "num_generations", num_generations, "a positive count, or group_ids")
        require(B % G == 0, "rewards", f"{B} rows", f"a multiple of num_generations = {G}")
        table, place = values.reshape(-1, G), torch.arange(B, device=device)
    else:
        ids = torch.as_tensor(group_ids, device=device)
        ids = ids if ids.numel() else ids.long()
        require(ids.shape == (B,), "group_ids", f"shape {tuple(ids.shape)}", f"({B},), one a row")
        require(not ids.is_floating_point(), "group_ids", ids.dtype, "integers")
        row, size = ids.unique(return_inverse=True, return_counts=True)[1:]
        order = row.argsort(stable=True)
        first = size.cumsum(0) - size
        width = int(size.max()) if B else 0
        place = torch.empty_like(row)
        place[order] = torch.arange(B, device=device) - first[row[order]]  # rank in the group
        place = row * width + place
        table = values.new_full((len(size) * width,), math.nan)
        table[place] = values
        table = table.reshape(len(size), width)
    return RewardGroups(table, place, (~table.isnan()).sum(dim=1), table)


def virtual_sample(max_reward: Any = 1.0, n: int = 1) -> Transformation:
    """Add n answers of the highest reward that nobody sampled to each group of two or more.

    max_reward: a number, or one a group in the order of the table. They count in means and
    deviations, and carry no tokens. Raises InputError for a reward above max_reward.
    """
    require(n >= 0, "num_virtual", n, "0 or more")

    def add(groups: RewardGroups) -> RewardGroups:
        top = torch.as_tensor(max_reward, dtype=groups.table.dtype, device=groups.table.device)
        P = len(groups.table)
        fits = top.ndim == 0 or top.shape == (P,)
        require(fits, "max_reward", f"shape {tuple(top.shape)}", f"a number, or one a group ({P},)")
        top = top.expand(P)
        highest = groups.table.nan_to_num(nan=-math.inf).amax(dim=1) if P else top
        above = highest > top
        worst = highest[above][:1].tolist()
        require(not bool(above.any()), "rewards", f"{worst} above max_reward", "at most max_reward")
        ghost = torch.where(groups.size > 1, top, math.nan)[:, None].expand(P, n)
        table = torch.cat([groups.table, ghost], dim=1)
        return replace(groups, table=table, rewards=table, virtual=groups.virtual + n)

    return add


def centre(over: str = "group") -> Transformation:
    """Subtract the mean of the group, of the "others" of the group, or of the "batch".

    A group with a single reward has nothing to compare it with: 0, except over the batch. As TRL
    rounds it; `group_advantages` makes it exactly 0 for equal rewards.
    """
    require(over in {"group", "others", "batch"}, "over", repr(over), "'group', 'others', 'batch'")

    def subtract(groups: RewardGroups) -> RewardGroups:
        x = groups.table
        if over == "batch":
            return replace(groups, table=x - x.nanmean())
        away = x - x.nanmean(dim=1, keepdim=True)
        if over == "others":
            count = (~x.isnan()).sum(dim=1, keepdim=True).to(x.dtype)
            away = away * (count / (count - 1).clamp(min=1))
        return replace(groups, table=away)

    return subtract


def scale(
    over: str = "group", ddof: int = 1, eps: float = EPS, of: str = "rewards"
) -> Transformation:
    """Divide by the standard deviation of the group or of the batch, plus eps.

    of: the deviation of the "rewards" as they came, or of the "values" that the chain has now; in
    a group that was centred both are the same, over a batch they are not. Where the deviation does
    not exist (too few rewards) the result is 0.
    """
    require(over in {"group", "batch"}, "over", repr(over), "'group' or 'batch'")
    require(of in {"rewards", "values"}, "of", repr(of), "'rewards' or 'values'")
    require(ddof in {0, 1}, "ddof", ddof, "0 or 1")

    def divide(groups: RewardGroups) -> RewardGroups:
        x = groups.table
        source = groups.rewards if of == "rewards" else x
        spread = deviation(source, ddof, dim=1 if over == "group" else None)
        scaled = (x / (spread + eps)).nan_to_num(0.0, posinf=0.0, neginf=0.0)
        return replace(groups, table=torch.where(x.isnan(), x, scaled))

    return divide


def deviation(x: Tensor, ddof: int = 1, dim: int | None = None) -> Tensor:
    """Standard deviation of what is not NaN, dimensions kept; NaN below ddof + 1 values.

    >>> deviation(torch.tensor([[0.0, 1.0, torch.nan]]), dim=1).round(decimals=4)
    tensor([[0.7071]])
    """
    variance = ((x - x.nanmean(dim=dim, keepdim=True)) ** 2).nanmean(dim=dim, keepdim=True)
    count = (~x.isnan()).sum(dim=dim, keepdim=True).to(x.dtype)
    unbiased = variance * (count / (count - ddof).clamp(min=1))
    return unbiased.masked_fill(count <= ddof, math.nan).sqrt()


def keep_single(groups: RewardGroups, done: RewardGroups, eps: float = EPS) -> RewardGroups:
    """`done`, but a group with one reward has reward / (1 + eps), as the released trainers do."""
    alone = (groups.size == 1)[:, None]
    raw = torch.nn.functional.pad(groups.answers, (0, done.virtual), value=math.nan)
    return replace(done, table=torch.where(alone, raw / (1 + eps), done.table))


def chain(*steps: Transformation) -> Callable[[RewardGroups], Tensor]:
    """Those transformations after one another, then the value of each answer, (B,)."""

    def advantages(groups: RewardGroups) -> Tensor:
        for step in steps:
            groups = step(groups)
        return groups.values()

    return advantages


def to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T): each answer's advantage (B,) at each of its tokens, 0 elsewhere.

    >>> to_tokens(torch.tensor([0.5, -1.0]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    tensor([[ 0.5000,  0.5000,  0.0000],
            [-1.0000, -0.0000, -0.0000]])
    """
    fits = advantages.ndim == 1 and mask.ndim == 2 and len(mask) == len(advantages)
    shapes = f"{tuple(advantages.shape)} and {tuple(mask.shape)}"
    require(fits, "advantages and mask", shapes, "(B,) and (B, T)")
    return advantages[:, None] * mask.to(advantages.dtype)
