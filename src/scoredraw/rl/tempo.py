"""Credit for the token at which answers part: a value for each prefix, from the group itself.

GRPO gives all tokens of an answer the same advantage r'. The answers of a group form a tree of
prefixes (`prefix_tree`), and the mean r' of those that go through a prefix s is an estimate V(s)
of what can be expected from there, without a critic. Each token also gets by how much it changed
that expectation:

    A_{i,t} = r'_i + V(s_{i,t+1}) - V(s_{i,t}),      s_{i,t} the first t tokens of answer i.

Where nothing branches V stays what it is, and A is GRPO's.

What the second part adds, derived from the equation. On policy and with the same weight for each
token, the gradient of V(s_{t+1}) is that of r' summed over the answers through s_{t+1}, since
∇ log π depends on s_{t+1} alone. So summed over the group this is the policy gradient of

    2 r'_i - V(s_{i,t}),

GRPO plus a Monte-Carlo gradient with the prefix as its baseline ("td_only" equals "mc_baseline").
That is a longer step at the same learning rate: compare with GRPO at steps of one length. Changes
of V to come (`lam`) add nothing, as they sum to 0 over the answers through s_{t+1}. All this ends
where the policy has moved, the loss clips, or tokens have other weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.group_advantages import compared
from scoredraw.rl.prefix_tree import PrefixTree, prefix_tree
from scoredraw.rl.reward_groups import chain, group_rewards, reward_vector, scale
from scoredraw.rl.token_credit import returns_to_go, runs

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

VARIANTS = ("tempo", "grpo", "td_only", "mc_baseline")
EPS = 1e-8


def tempo_advantages(
    completion_ids: Any,
    mask: Any,
    rewards: Any,
    group_ids: Any = None,
    num_generations: int = 8,
    td_coef: float = 1.0,
    *,
    variant: str = "tempo",
    lam: float = 0.0,
    ddof: int = 1,
    eps: float = EPS,
    single: str = "zero",
) -> Tensor:
    """Advantages (B, T) of the tokens of B sampled answers, from rewards (B,) and their prefixes.

    With r' = (r - group mean) / (group deviation + eps), V(s) the mean r' of the group's answers
    that begin with s, c = td_coef and δ_t = V(s_{t+1}) - V(s_t):
    - "tempo"        r' + c Σ_l lam^l δ_{t+l}; lam = 0, the paper's, is r' + c δ_t,
    - "td_only"      c Σ_l lam^l δ_{t+l},
    - "mc_baseline"  r' - c V(s_t),
    - "grpo"         r'.
    Σ_t δ_t is r' where no other answer is, or goes on from, the same text.

    completion_ids (B, T), mask (B, T), or mask None and sequences of any lengths: see
    `prefix_tree`. They are the ids that were sampled, with the end-of-sequence token, so that the
    decision to stop is credited too. group_ids: (B,), in any order, or num_generations answers a
    group after one another. single: a group with one reward gets 0 ("zero") or the reward itself
    ("raw"). Answers without a reward (None, NaN) are left out of r' and V and get 0, as does a
    group whose rewards are all the same. float32, or float64 where the rewards are; on the device
    of the ids. Raises InputError for all that `prefix_tree` and `group_rewards` refuse.

    Tran, Yao and Yu 2025, arXiv 2509.18314 (P2T, TEMPO). The deviation's ddof and eps are not in
    the paper. Time O(tokens on shared prefixes + B W log W + B T), W the largest group; memory
    O(B (T + W)). A group's advantages depend on that group alone.

    >>> tempo_advantages([[5, 6], [5, 7]], None, [1.0, 0.0], num_generations=2).round(decimals=2)
    tensor([[ 0.7100,  1.4100],
            [-0.7100, -1.4100]])
    """
    check_credit(td_coef, variant, lam)
    standing = group_standing(
        rewards, group_ids, num_generations, ddof=ddof, eps=eps, single=single
    )
    tree = prefix_tree(completion_ids, mask, group_ids, num_generations)
    return advantages_on_tree(tree, standing, td_coef, variant=variant, lam=lam)


def group_standing(
    rewards: Any,
    group_ids: Any = None,
    num_generations: int | None = None,
    *,
    ddof: int = 1,
    eps: float = EPS,
    single: str = "zero",
) -> Tensor:
    """(B,) r' = (r - mean) / (deviation + eps) in each group, NaN where there is no reward.

    Exactly 0 where all rewards of a group are the same.

    >>> group_standing([1.0, 0.0, None], num_generations=3).round(decimals=4)
    tensor([ 0.7071, -0.7071,     nan])
    """
    check_standing(ddof, eps, single)
    given = reward_vector(rewards)
    groups = group_rewards(given.double(), group_ids, num_generations)
    steps = compared(groups, "group", single == "raw", scale(ddof=ddof, eps=eps), eps)
    return chain(*steps)(groups).masked_fill(given.isnan(), math.nan).to(given.dtype)


def advantages_on_tree(
    tree: PrefixTree,
    standing: Tensor,
    td_coef: float = 1.0,
    *,
    variant: str = "tempo",
    lam: float = 0.0,
) -> Tensor:
    """`tempo_advantages` for a tree that is there and r' (B,), NaN for an answer without reward."""
    check_credit(td_coef, variant, lam)
    came, want = f"{len(standing)} values", f"{len(tree.length)}, one an answer"
    require(standing.shape == tree.length.shape, "rewards", came, want)
    standing = standing.to(tree.length.device)
    own = standing.double().nan_to_num(nan=0.0) * (variant != "td_only")
    if variant == "grpo" or (lam == 0 and variant != "mc_baseline"):
        each, written = own.to(standing.dtype), tree.length
        counts = torch.stack([written, tree.longest - written], 1)
        found = runs(torch.stack([each, torch.zeros_like(each)], 1), counts, tree.longest)
        if variant != "grpo":  # only branches are looked at: no other array is made of (B, T)
            rows, tokens, change = _branches(tree, standing)
            credit = (own[rows] + td_coef * change) * ~standing[rows].isnan()
            found[rows, tokens] = credit.to(found.dtype)
        return found
    if variant == "mc_baseline":
        part = -tree.means(standing)[:, : tree.longest]
    else:
        part = returns_to_go(token_changes(tree, standing), gamma=lam)
    past = torch.arange(tree.longest, device=own.device) >= tree.length[:, None]
    found = (own[:, None] + td_coef * part).to(standing.dtype)
    return found.masked_fill_(past | standing.isnan()[:, None], 0.0)


def check_credit(td_coef: float, variant: str, lam: float) -> None:
    """InputError for an unknown variant, a coefficient or lam that it has no use for."""
    require(variant in VARIANTS, "variant", repr(variant), ", ".join(VARIANTS))
    require(math.isfinite(td_coef), "td_coef", td_coef, "a finite number")
    require(0 <= lam <= 1, "lam", lam, "a number in [0, 1]")
    summed = variant in {"tempo", "td_only"}
    require(summed or lam == 0, "lam", f"{lam} for {variant!r}", "0: it sums no changes")


def check_standing(ddof: int, eps: float, single: str) -> None:
    """InputError for what `group_standing` has no use for."""
    require(single in {"zero", "raw"}, "single", repr(single), "'zero' or 'raw'")
    require(0 <= eps < math.inf, "eps", eps, "a number of at least 0")
    require(ddof in {0, 1}, "ddof", ddof, "0 or 1")


def token_changes(tree: PrefixTree, values: Any) -> Tensor:
    """(B, T) float64: δ_t = V(s_{t+1}) - V(s_t), V the mean of `values` (B,) through a prefix.

    0 at tokens that are no branch, past the end, and for answers without a value.

    >>> token_changes(prefix_tree([[5, 6], [5, 7]], num_generations=2), [1.0, 0.0])
    tensor([[ 0.0000,  0.5000],
            [ 0.0000, -0.5000]], dtype=torch.float64)
    """
    rows, tokens, change = _branches(tree, values)
    found = torch.zeros(len(tree.length), tree.longest, dtype=change.dtype, device=change.device)
    found[rows, tokens] = change
    return found


def _branches(tree: PrefixTree, values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Answer, token and change of V, one each a branch token."""
    at, change = tree.changes(values)
    rows, k = (at < tree.longest).nonzero(as_tuple=True)
    return rows, at[rows, k], change[rows, k]


class TempoAdvantage:
    """TEMPO as the `advantage_fn` of `AdvantageGRPOTrainer`; `statistics` are of the last batch.

    Takes what `tempo_advantages` takes. Tokens that are not trained on are part of the prefixes, as
    what follows depends on them, and get no advantage: what a tool wrote, and all of an answer that
    was cut off, where TRL's mask_truncated_completions hides it. What the head of this file says
    about the gradient holds for TRL's losses that weigh all tokens alike ("dapo", "bnpo",
    "dr_grpo").

    >>> from types import SimpleNamespace
    >>> batch = SimpleNamespace(
    ...     reward=torch.tensor([1.0, 0.0]), group_ids=torch.tensor([0, 0]),
    ...     completion_ids=torch.tensor([[5, 6], [5, 7]]), mask=torch.ones(2, 2, dtype=torch.bool))
    >>> credit = TempoAdvantage()
    >>> credit(batch).round(decimals=2)
    tensor([[ 0.7100,  1.4100],
            [-0.7100, -1.4100]])
    >>> credit.statistics
    {'shared_tokens': 0.5, 'branch_tokens': 0.5, 'branches': 1.0, 'nodes': 0.75}
    """

    def __init__(
        self,
        td_coef: float = 1.0,
        *,
        variant: str = "tempo",
        lam: float = 0.0,
        ddof: int = 1,
        eps: float = EPS,
        single: str = "zero",
    ) -> None:
        check_credit(td_coef, variant, lam)
        check_standing(ddof, eps, single)
        self.credit: dict[str, Any] = {"td_coef": td_coef, "variant": variant, "lam": lam}
        self.scale: dict[str, Any] = {"ddof": ddof, "eps": eps, "single": single}
        self.statistics: dict[str, float] = {}

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """(B, T) advantages of the batch."""
        written = rollouts.mask.bool()
        context = written.int().flip(1).cummax(dim=1).values.flip(1).bool()  # to the last written
        context |= ~written.any(dim=1, keepdim=True)  # cut off: as long as may be, and hidden
        tree = prefix_tree(rollouts.completion_ids, context, rollouts.group_ids)
        self.statistics = tree.statistics()
        standing = group_standing(rollouts.reward, rollouts.group_ids, **self.scale)
        return advantages_on_tree(tree, standing, **self.credit).masked_fill_(~written, 0.0)
