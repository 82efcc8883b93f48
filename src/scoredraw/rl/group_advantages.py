"""How good an answer is beside the others to its prompt: GRPO and its relatives behind one call.

With r_1 .. r_G the rewards of the answers to one prompt, μ their mean and σ their deviation:

    grpo, dapo            (r - μ) / (σ + eps)
    dr_grpo               r - μ
    rloo                  r - the mean of the others
    ngrpo                 (r - μ') / (σ' + eps), μ' and σ' with n virtual answers of the highest
                          reward: a group of wrong answers gets -1/√(G+1) each instead of nothing
    psr, nsr, w_reinforce right answers 1, 0 or λ; wrong ones 0, -1 or -1; no comparison
    reinforce_pp          r, and reinforce_pp_baseline r - μ, standardised over the batch
    remax                 r - the reward of the greedy answer

Besides, a method says how far one batch may move the policy (for good answers up to 1 + eps_high,
for bad ones down to 1 - eps_low), how the loss is averaged, and which answers are not trained on.
`GROUP_METHODS` holds that.

What a virtual answer does. Let p be the chance of a right answer. As E ∇ log π = 0, the gradient of
a group that is all wrong has the mean

    E[Σ_i A_i ∇ log π(y_i) | all wrong]  =  c G p/(1-p) E[∇ log π | right],    c = 1/√(G+1),

the right direction, but next to nothing where p is small, and with a variance that grows as c². It
is a shift of the baseline: what it helps must come from parameters that prompts share.

Nan et al., "NGRPO: negative-enhanced group relative policy optimization", 2025, arXiv 2509.18851
(the law is derived here). The others: GRPO, Shao et al. 2024, arXiv 2402.03300; Dr. GRPO, Liu et
al. 2025, arXiv 2503.20783; RLOO, Ahmadian et al. 2024, arXiv 2402.14740; DAPO, Yu et al. 2025,
arXiv 2503.14476; PSR, NSR and W-REINFORCE, Zhu et al. 2025, arXiv 2506.01347; REINFORCE++, Hu et
al. 2025, arXiv 2501.03262; ReMax, Li et al. 2023, arXiv 2310.10505.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.reward_groups import (
    EPS,
    RewardGroups,
    Transformation,
    centre,
    chain,
    group_rewards,
    keep_single,
    reward_vector,
    scale,
    virtual_sample,
)

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

TRL_LOSSES = {"token_mean": "bnpo", "seq_mean": "grpo", "dr_grpo": "dr_grpo", "dapo": "dapo"}
FILTERS = ("none", "all_correct", "all_incorrect", "all", "correct", "incorrect")


@dataclass(frozen=True)
class GroupMethod:
    """What belongs to a method besides its advantages.

    eps_low, eps_high: its clip; aggregation: of its loss, as `clipped_policy_loss` has it; filter:
    what is not trained on, as `kept_answers` has it.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    aggregation: str = "token_mean"
    filter: str = "none"

    def trl_options(self) -> dict[str, Any]:
        """Clip and aggregation as options of TRL's GRPOConfig.

        TRL's ratio is 1, and no clip acts, unless a batch is used more than once: set its
        num_iterations to 2 or more.

        >>> GROUP_METHODS["ngrpo"].trl_options()
        {'epsilon': 0.16, 'epsilon_high': 0.24, 'loss_type': 'bnpo'}
        """
        loss = TRL_LOSSES[self.aggregation]
        return {"epsilon": self.eps_low, "epsilon_high": self.eps_high, "loss_type": loss}


GROUP_METHODS = {
    "grpo": GroupMethod(aggregation="seq_mean"),
    "dr_grpo": GroupMethod(aggregation="dr_grpo"),
    "rloo": GroupMethod(),
    "dapo": GroupMethod(0.2, 0.28, "dapo", "all"),
    "ngrpo": GroupMethod(0.16, 0.24, filter="all_correct"),
    "psr": GroupMethod(filter="incorrect"),
    "nsr": GroupMethod(filter="correct"),
    "w_reinforce": GroupMethod(),
    "reinforce_pp": GroupMethod(),
    "reinforce_pp_baseline": GroupMethod(),
    "remax": GroupMethod(),
}


def group_advantages(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int = 8,
    estimator: str = "ngrpo",
    max_reward: Any = 1.0,
    num_virtual: int = 1,
    ddof: int = 1,
    eps: float = EPS,
    *,
    single_sample: str = "zero",
    positive_weight: float = 0.1,
    greedy_rewards: Any = None,
) -> Tensor:
    """Advantages (B,) of B answers from their rewards (B,): formulas at the head.

    rewards: numbers, None or NaN where there is none: out of all means and deviations, and 0 here.
    group_ids: (B,) integers in any order, groups of any sizes; or num_generations answers to a
    prompt after one another. estimator: a name of `GROUP_METHODS`.
    max_reward: the highest reward there is, a number or one a group in rising order of ids; for
    ngrpo (num_virtual answers of it) and psr, nsr, w_reinforce, whose rewards are 0 or max_reward;
    1, 0, -1 and λ at the head are then in units of it. positive_weight: λ.
    ddof, eps: of the deviations. GRPO as TRL has it is estimator "grpo" with eps 1e-4.
    single_sample: a group with one reward gets 0 ("zero"), or ("raw", as the released trainers)
    the reward, over 1 + eps where the method divides by a deviation.
    greedy_rewards: of the greedy answer to each prompt, (P,), for remax.

    float32, or float64 where the rewards are, on their device; the arithmetic is float64, on the
    host.
    Equal rewards give exactly 0 where they are compared with each other. All wrong, ngrpo gives
    -1/√(G+1), whatever the common reward below max_reward (n = 1, eps = 0). The released trainers
    whiten reinforce_pp over tokens: `whiten(to_tokens(A, mask), mask)` does that to these.
    Raises InputError for what `group_rewards` refuses, a reward above max_reward, an unknown
    estimator, and an option outside its range. A group's advantages depend on that group alone
    except for reinforce_pp and its baseline. O(B log B).

    >>> group_advantages([0, 0, 0, 1, 0, 0, 0, 0], num_generations=4).round(decimals=3)
    tensor([-0.7300, -0.7300, -0.7300,  1.0950, -0.4470, -0.4470, -0.4470, -0.4470])
    >>> group_advantages([0, 0, 0, 1, 0, 0, 0, 0], num_generations=4, estimator="grpo")
    tensor([-0.5000, -0.5000, -0.5000,  1.5000,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    check_options(estimator, num_virtual, ddof, eps, single_sample, positive_weight)
    rewards, device = on_cpu(rewards)
    groups = group_rewards(rewards, group_ids, num_generations)
    dtype, groups = groups.table.dtype, groups.double()
    top = partial(top_rewards, groups, max_reward, like=rewards)
    raw = single_sample == "raw"
    if estimator in {"psr", "nsr", "w_reinforce"}:
        worth = {"psr": (1.0, 0.0), "nsr": (0.0, -1.0), "w_reinforce": (positive_weight, -1.0)}
        steps = [verdict(top(), *worth[estimator])]
    elif estimator == "remax":
        require(greedy_rewards is not None, "greedy_rewards", None, "one a group, for remax")
        steps = [subtract(one_a_group(groups, greedy_rewards, "greedy_rewards", like=rewards))]
    elif estimator in {"reinforce_pp", "reinforce_pp_baseline"}:
        steps = [from_best("batch"), centre("batch"), scale("batch", ddof, eps, of="values")]
        if estimator == "reinforce_pp_baseline":
            steps = [*compared(groups, "group", raw), *steps]
    elif estimator in {"dr_grpo", "rloo"}:
        steps = compared(groups, "others" if estimator == "rloo" else "group", raw)
    else:
        ghosts = [virtual_sample(top(), num_virtual)] if estimator == "ngrpo" else []
        steps = [*ghosts, *compared(groups, "group", raw, scale("group", ddof, eps), eps)]
    return chain(*steps)(groups).to(dtype).to(device)


def on_cpu(rewards: Any) -> tuple[Any, torch.device | None]:
    """Rewards where a step takes microseconds, and where they were: to launch costs more."""
    return (rewards.cpu(), rewards.device) if isinstance(rewards, Tensor) else (rewards, None)


def check_options(
    estimator: str,
    num_virtual: int,
    ddof: int,
    eps: float,
    single_sample: str,
    positive_weight: float,
) -> None:
    """InputError for an option that `group_advantages` doesn't know."""
    require(estimator in GROUP_METHODS, "estimator", repr(estimator), ", ".join(GROUP_METHODS))
    count = isinstance(num_virtual, int | np.integer) and num_virtual >= 0
    require(count, "num_virtual", num_virtual, "0 or more, and whole")
    require(ddof in {0, 1}, "ddof", ddof, "0 or 1")
    require(0 <= eps < math.inf, "eps", eps, "a number of at least 0")
    known = single_sample in {"zero", "raw"}
    require(known, "single_sample", repr(single_sample), "'zero' or 'raw'")
    fine = 0 <= positive_weight < math.inf
    require(fine, "positive_weight", positive_weight, "a number of at least 0")


# ── steps of the chain ──────────────────────────────────────────────────────────────────────────


def compared(
    groups: RewardGroups, over: str, raw: bool, scaled: Transformation | None = None, eps: float = 0
) -> list[Transformation]:
    """Less the mean of the group or of the others, then scaled; raw: single rewards stay."""
    steps = [from_best("group"), centre(over), *([scaled] if scaled else [])]
    return [*steps, lambda done: keep_single(groups, done, eps)] if raw else steps


def from_best(over: str) -> Transformation:
    """Count from the best of the group or batch: equal rewards are exactly 0, as is their mean."""

    def count(groups: RewardGroups) -> RewardGroups:
        best = highest(groups)
        if over == "batch" and len(best):
            best = best.max().expand_as(best)
        return subtract(best)(groups)

    return count


def subtract(baseline: Tensor) -> Transformation:
    """Minus a number a group, (P,)."""
    return lambda groups: replace(groups, table=groups.table - baseline[:, None])


def verdict(top: Tensor, right: float, wrong: float) -> Transformation:
    """top · right for each reward that is `top` (P,), top · wrong for each that is 0."""

    def judge(groups: RewardGroups) -> RewardGroups:
        x, high = groups.table, top[:, None]
        odd = x[(x != 0) & (x != high) & ~x.isnan()][:1].tolist()
        require(not odd, "rewards", odd, "0 or max_reward for psr, nsr and w_reinforce")
        worth = torch.where(x == high, right * high, wrong * high)
        return replace(groups, table=torch.where(x.isnan(), x, worth))

    return judge


def highest(groups: RewardGroups) -> Tensor:
    """The highest reward of each group, (P,): -inf where there is none."""
    x = groups.table
    return x.nan_to_num(nan=-math.inf).amax(dim=1) if x.numel() else x.new_zeros(len(x))


def one_a_group(groups: RewardGroups, values: Any, name: str, like: Any) -> Tensor:
    """(P,) finite numbers, one a group, from such or from one for all.

    Rounded as the rewards `like` are, so that a reward of 0.7 is one of 0.7 in half precision too.
    """
    given = torch.as_tensor(values, dtype=groups.table.dtype, device=groups.table.device)
    P = len(groups.table)
    fits = given.ndim == 0 or given.shape == (P,)
    require(fits, name, f"shape {tuple(given.shape)}", f"a number, or one a group ({P},)")
    require(bool(given.isfinite().all()), name, "NaN or infinity", "finite numbers")
    like = torch.as_tensor(like) if hasattr(like, "dtype") else reward_vector(like)
    given = given.to(like.dtype).double() if like.is_floating_point() else given
    return given.expand(P)


def top_rewards(groups: RewardGroups, max_reward: Any, like: Any) -> Tensor:
    """(P,) the highest reward there is for each group; InputError for a reward above it."""
    top = one_a_group(groups, max_reward, "max_reward", like)
    best = highest(groups)
    worst = best[best > top][:1].tolist()
    require(not worst, "rewards", f"{worst} above max_reward", "at most max_reward")
    return top


# ── what is not trained on, and what is too long ────────────────────────────────────────────────


def kept_answers(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int = 8,
    filter: str = "all_correct",
    max_reward: Any = 1.0,
) -> Tensor:
    """(B,) bool: the answers that a filter leaves to train on.

    filter, what it drops: "all_correct" groups whose rewards are all max_reward; "all_incorrect"
    groups whose rewards are all the same, and lower; "all" both (DAPO); "correct" and "incorrect"
    the answers with and without max_reward (NSR trains on wrong ones alone, PSR on right ones);
    "none" nothing. "all" and "none" don't look at max_reward. A group with one reward stays, as in
    the released trainers, and so does an answer without a reward. Other arguments and errors as
    `group_advantages`.

    >>> kept_answers([1, 1, 0, 1, 0, 0], num_generations=2).tolist()
    [False, False, True, True, True, True]
    """
    require(filter in FILTERS, "filter", repr(filter), ", ".join(FILTERS))
    rewards, device = on_cpu(rewards)
    groups = group_rewards(rewards, group_ids, num_generations).double()
    high = highest(groups)
    other = (groups.table != high[:, None]) & ~groups.table.isnan()
    dropped = ~other.any(dim=1) & (groups.size > 1) & (filter != "none")
    if filter in {"none", "all"}:
        return (~dropped[groups.groups()]).to(device)
    top = top_rewards(groups, max_reward, like=rewards)
    if filter in {"all_correct", "all_incorrect"}:
        dropped &= (high == top) == (filter == "all_correct")
        return (~dropped[groups.groups()]).to(device)
    x = groups.table.reshape(-1)[groups.place]
    right = x == top[groups.groups()]
    return (~right if filter == "correct" else right | x.isnan()).to(device)


def fill_batch(
    generate: Callable[[], Any],
    groups: int,
    num_generations: int = 8,
    filter: str = "all",
    max_reward: Any = 1.0,
    *,
    max_batches: int = 10,
) -> Tensor:
    """DAPO's dynamic sampling: generate batches until a filter has left enough groups.

    generate: called up to max_batches times, samples answers and returns their rewards (B,),
    num_generations to a prompt after one another. -> int64 (N, 2): the call and the row of every
    answer to train on, those of the first `groups` groups, or of all if there are fewer. filter:
    one that drops groups. Raises InputError as `kept_answers`, and for counts below 1.

    >>> batches = iter([[1, 1, 0, 1], [0, 0, 0, 1]])
    >>> fill_batch(lambda: next(batches), groups=2, num_generations=2).tolist()
    [[0, 2], [0, 3], [1, 2], [1, 3]]
    """
    of_groups = [name for name in FILTERS if name not in {"correct", "incorrect"}]
    require(filter in of_groups, "filter", repr(filter), ", ".join(of_groups))
    counts = groups >= 1 and max_batches >= 1
    require(counts, "groups, max_batches", (groups, max_batches), "at least 1")
    found, wanted = [torch.zeros(0, 2, dtype=torch.int64)], groups * num_generations
    for call in range(max_batches):
        kept = kept_answers(generate(), None, num_generations, filter, max_reward)
        rows = kept.nonzero()[:, 0].cpu()
        found.append(torch.stack([torch.full_like(rows, call), rows], dim=1))
        if sum(map(len, found)) >= wanted:
            break
    return torch.cat(found)[:wanted]


def overlong_penalty(lengths: Any, longest: int, cache: int) -> Tensor:
    """DAPO's penalty for answers of `lengths` tokens, to be added to their rewards: same shape.

    0 up to longest - cache tokens, then falling linearly to -1 at `longest` and beyond. Filter by
    the rewards without it. Raises InputError for negative lengths and a cache above `longest`.
    Yu et al. 2025, arXiv 2503.14476, equation 13; TRL has it as `get_soft_overlong_punishment`.

    >>> overlong_penalty([70, 90, 100, 300], longest=100, cache=20)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    fine = 0 <= cache <= longest and longest > 0
    require(fine, "longest, cache", (longest, cache), "0 <= cache <= longest, and longest > 0")
    tokens = torch.as_tensor(lengths)
    require(bool((tokens >= 0).all()), "lengths", "a negative one", "counts of tokens")
    if cache == 0:
        return torch.where(tokens > longest, -1.0, 0.0)
    return (longest - cache - tokens).clamp(-cache, 0) / cache


# ── in TRL ──────────────────────────────────────────────────────────────────────────────────────


class GroupAdvantage:
    """A method of this file as the `advantage_fn` of `AdvantageGRPOTrainer`.

    filter: as `kept_answers`; None for the method's own. Other options: of `group_advantages`.
    greedy_rewards, for remax: a function of the rollouts that gives (P,). Returns advantages (B,),
    and with a filter also which answers to train on. Give the trainer
    `GROUP_METHODS[estimator].trl_options()` for the method's clip and loss, and max_batches=10 to
    sample other prompts for what a filter drops, as DAPO does.

    >>> from types import SimpleNamespace
    >>> batch = SimpleNamespace(reward=torch.tensor([0., 0., 1., 1.]),
    ...                         group_ids=torch.tensor([0, 0, 1, 1]))
    >>> GroupAdvantage("ngrpo")(batch)
    (tensor([-0.5773, -0.5773,  0.0000,  0.0000]), tensor([ True,  True, False, False]))
    """

    def __init__(
        self,
        estimator: str = "ngrpo",
        *,
        filter: str | None = None,
        max_reward: float = 1.0,
        num_virtual: int = 1,
        ddof: int = 1,
        eps: float = EPS,
        single_sample: str = "zero",
        positive_weight: float = 0.1,
        greedy_rewards: Callable[[Rollouts], Any] | None = None,
    ) -> None:
        check_options(estimator, num_virtual, ddof, eps, single_sample, positive_weight)
        self.filter = GROUP_METHODS[estimator].filter if filter is None else filter
        require(self.filter in FILTERS, "filter", repr(filter), ", ".join(FILTERS))
        needed = estimator != "remax" or callable(greedy_rewards)
        require(needed, "greedy_rewards", greedy_rewards, "a function of the rollouts, for remax")
        require(math.isfinite(max_reward), "max_reward", max_reward, "a finite number")
        self.max_reward, self.greedy_rewards = max_reward, greedy_rewards
        self.options: dict[str, Any] = {
            "estimator": estimator, "num_virtual": num_virtual, "ddof": ddof, "eps": eps,
            "single_sample": single_sample, "positive_weight": positive_weight,
        }  # fmt: skip

    def __call__(self, rollouts: Rollouts) -> Tensor | tuple[Tensor, Tensor]:
        """(B,) advantages of the batch; beside them, with a filter, a mask (B,)."""
        reward, ids, top = rollouts.reward, rollouts.group_ids, self.max_reward
        greedy = None if self.greedy_rewards is None else self.greedy_rewards(rollouts)
        found = group_advantages(reward, ids, max_reward=top, greedy_rewards=greedy, **self.options)
        if self.filter == "none":
            return found
        return found, kept_answers(reward, ids, filter=self.filter, max_reward=top)
