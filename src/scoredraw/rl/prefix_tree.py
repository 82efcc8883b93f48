"""The tree that the answers to one prompt already form: every distinct prefix is a node.

Answers that begin alike share nodes and part at a branch. Nothing is hashed and no node is stored:
put the answers of a group in alphabetical order, and those that share their first t tokens lie
side by side. So the tree is one number for each pair of answers, the tokens they have in common,

    shared(i, j) = min of what neighbours between them have in common,

and everything about the node that answer i is in after t tokens is a sum over the answers j with
shared(i, j) >= t. Along an answer such a sum changes at most once for each other answer.

>>> tree = prefix_tree([[5, 6], [5, 7, 8], [5, 7, 9]], num_generations=3)
>>> tree.means([1.0, 0.0, 0.5])
tensor([[0.5000, 0.5000, 1.0000, 0.0000],
        [0.5000, 0.5000, 0.2500, 0.0000],
        [0.5000, 0.5000, 0.2500, 0.5000]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.errors import InputError, require
from scoredraw.rl.reward_groups import group_rewards
from scoredraw.rl.token_credit import leading_tokens

Int = NDArray[np.int64]

END = np.iinfo(np.int64).min  # after the last token: no token has this id
FIRST_BLOCK = 32  # columns compared at first; most answers have parted by then


class PrefixValues(NamedTuple):
    """value, count: (B, T + 1), of the prefix of t tokens; is_branch: (B, T), of token t."""

    value: Tensor
    count: Tensor
    is_branch: Tensor


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The prefix trees of P groups, the largest of W answers, each of at most T tokens.

    members: (P, W) int64, the answers of a group in alphabetical order, -1 where there is none;
    shared: (P, W, W) int64, the tokens that two of them have in common, an answer with itself its
    length, -1 where there is none; place: (B,) where an answer lies in the flattened `members`;
    length: (B,); longest: T. All on the device of the answers. Memory O(B W); what is dense in
    tokens is made when asked for.
    """

    members: Tensor
    shared: Tensor
    place: Tensor
    length: Tensor
    longest: int

    def counts(self) -> Tensor:
        """(B, T + 1) int64: how many answers of the group share the first t; 0 past the end."""
        return self._sums((self.members >= 0).long())

    def means(self, values: Any) -> Tensor:
        """(B, T + 1) float64: mean of `values` (B,) over the answers that share the first t.

        None and NaN are left out; NaN where no answer through a prefix has a value, 0 past the
        end of an answer. O(B (T + W)).
        """
        total, known = self._of_members(values)
        past = torch.arange(self.longest + 1, device=self.length.device) > self.length[:, None]
        return self._sums(total).div_(self._sums(known)).masked_fill_(past, 0.0)

    def is_branch(self) -> Tensor:
        """(B, T) bool: the answers that share what comes before token t go on in several ways.

        To end is a way to go on, so an answer that is the beginning of another makes a branch.
        """
        at, _ = self.changes(torch.zeros(len(self.length)))
        found = torch.zeros(len(at), self.longest + 1, dtype=torch.bool, device=at.device)
        return found.scatter_(1, at, True)[:, : self.longest]

    def nodes(self) -> Tensor:
        """(B, T + 1) int64: the same number for the same prefix of the same group; else -1.

        A node is numbered a (T + 1) + t by its first answer a in alphabetical order.
        """
        t = torch.arange(self.longest + 1, device=self.length.device)
        answers = torch.arange(self.members.numel(), device=t.device).reshape(self.members.shape)
        none = self.members.numel()
        first = torch.full((len(self.length), len(t)), none, device=t.device)
        who = answers[:, None, :].expand_as(self.shared).masked_fill(self.shared < 0, none)
        first.scatter_reduce_(1, self._rows(self.shared).clamp(min=0), self._rows(who), "amin")
        first = first.flip(1).cummin(dim=1).values.flip(1)
        return torch.where(t > self.length[:, None], -1, first * len(t) + t)

    def changes(self, values: Any) -> tuple[Tensor, Tensor]:
        """Where V, the mean of `values` over the answers that share a prefix, changes.

        Returns at, change, both (B, W): token at[i, k] of answer i is a branch and
        V(after it) - V(before it) = change[i, k]; unused places have at = T and change 0. At every
        other token V stays what it is. O(B W log W), independent of the number of tokens.
        """
        total, known = self._of_members(values)
        level, by = self.shared.sort(dim=2, descending=True, stable=True)
        sums, counts = (x[:, None, :].expand_as(by).gather(2, by).cumsum(2) for x in (total, known))
        mean = sums / counts.clamp(min=1)
        # answers that share equally much enter together: only the last of them ends the sum
        after = torch.nn.functional.pad(level[:, :, 1:], (0, 1), value=-2)
        ends = (level != after) & (level >= 0)
        k = torch.arange(level.shape[2], device=level.device)
        last = torch.where(ends, k, -1).cummax(dim=2).values
        deeper = torch.nn.functional.pad(last[:, :, :-1], (1, 0), value=-1)
        branch = ends & (deeper >= 0)
        change = mean.gather(2, deeper.clamp(min=0)) - mean
        at = level.masked_fill(~branch, self.longest)
        return self._rows(at), self._rows(change.masked_fill(~branch, 0.0))

    def statistics(self) -> dict[str, float]:
        """How much of the batch is a tree: shares of tokens, and branch tokens an answer.

        shared_tokens: the share of tokens that end a prefix shared with another answer;
        branch_tokens: the share at which the answers part; branches: how many an answer;
        nodes: distinct prefixes as a share of the tokens.
        """
        tokens = max(int(self.length.sum()), 1)
        at, _ = self.changes(torch.zeros(len(self.length)))
        branches = int((at < self.longest).sum())
        alone = torch.eye(self.members.shape[1], dtype=torch.bool, device=at.device)
        most = self._rows(self.shared.masked_fill(alone, 0).amax(dim=2)).clamp(min=0)
        common = self.shared.diagonal(1, 1, 2).clamp(min=0)  # of neighbours
        return {
            "shared_tokens": int(most.sum()) / tokens,
            "branch_tokens": branches / tokens,
            "branches": branches / max(len(at), 1),
            "nodes": (int(self.length.sum()) - int(common.sum())) / tokens,
        }

    def _rows(self, table: Tensor) -> Tensor:
        """From a row a member to a row an answer."""
        return table.flatten(0, 1)[self.place]

    def _of_members(self, values: Any) -> tuple[Tensor, Tensor]:
        """(P, W) float64 values of the members, 0 where there is none; 1.0 where there is one."""
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.asarray(values, dtype=np.float64))  # None becomes NaN
        v, B = values.detach().to(self.place.device, torch.float64), len(self.length)
        require(v.shape == (B,), "values", f"shape {tuple(v.shape)}", f"({B},), one an answer")
        require(not bool(v.isinf().any()), "values", "an infinite one", "finite numbers or NaN")
        found = v[self.members.clamp(min=0)] if B else v.reshape(self.members.shape)
        known = (self.members >= 0) & ~found.isnan()
        return found.masked_fill(~known, 0.0), known.double()

    def _sums(self, x: Tensor) -> Tensor:
        """(B, T + 1): the sum of x (P, W) over the members that share the first t tokens."""
        out = x.new_zeros(len(self.length), self.longest + 1)
        each = x[:, None, :].expand_as(self.shared)
        from_end = self.longest - self._rows(self.shared).clamp(min=0)
        return out.scatter_add_(1, from_end, self._rows(each)).cumsum_(1).flip(1)


def prefix_tree(
    completion_ids: Any,
    mask: Any = None,
    group_ids: Any = None,
    num_generations: int | None = None,
) -> PrefixTree:
    """The prefix trees of a batch of sampled token ids, a tree a group; exact, nothing is hashed.

    completion_ids: (B, T) integers padded on the right, with mask (B, T) true at the tokens; or
    without a mask B sequences of any lengths. The prompt is not in them; the end-of-sequence token
    is, where the policy wrote one. An answer without a token ends at the root. group_ids: (B,)
    integers in any order, or num_generations answers a group after one another.
    Raises InputError for shapes that differ, ids that are not integers, a mask with holes or padded
    on the left, and groups that do not fit the batch.

    Time O(tokens on shared prefixes + B W log W), at most O(B T log W), and a pass over the mask.
    The tree of a group depends on that group alone.
    """
    ids, kept = _completions(completion_ids, mask)
    B, T = ids.shape
    groups = group_rewards(torch.zeros(B), group_ids, num_generations)
    P, W = len(groups.table), max(groups.table.shape[1], 1)
    group = groups.groups().cpu().numpy()
    ends = _lengths(kept)
    order, common = _alphabetical(ids.cpu().numpy(), ends, group)
    first = np.searchsorted(group[order], np.arange(P))
    place = np.empty(B, np.int64)
    place[order] = group[order] * W + np.arange(B) - first[group[order]]
    members, neighbours = np.full(P * W, -1), np.full(P * W, -1)
    members[place[order]], neighbours[place[order]] = order, common
    shared = _pairs(neighbours.reshape(P, W), np.append(ends, -1)[members].reshape(P, W))

    def there(x: Int) -> Tensor:
        return torch.from_numpy(x).to(ids.device)

    return PrefixTree(there(members.reshape(P, W)), there(shared), there(place), there(ends), T)


def prefix_tree_values(
    completion_ids: Any,
    mask: Any,
    values: Any,
    group_ids: Any = None,
    num_generations: int | None = None,
) -> PrefixValues:
    """Mean of `values` over the answers that share each prefix, their count, and the branches.

    As `prefix_tree`, `PrefixTree.means`, `counts` and `is_branch` say. values: (B,), NaN or None
    for an answer that has none. O(B (T + W)) memory.

    >>> found = prefix_tree_values([[5], [5, 7]], None, [1.0, 0.0], num_generations=2)
    >>> found.value.tolist(), found.is_branch.tolist()
    ([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], [[False, False], [False, True]])
    """
    tree = prefix_tree(completion_ids, mask, group_ids, num_generations)
    return PrefixValues(tree.means(values), tree.counts(), tree.is_branch())


def _completions(completion_ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """(B, T) ids and a bool mask."""
    if mask is None and not isinstance(completion_ids, Tensor):
        return _padded(completion_ids)
    try:
        ids = torch.as_tensor(completion_ids)
    except (TypeError, ValueError):
        message = "completion_ids: got ragged rows or no numbers, want (B, T) with a mask"
        raise InputError(message) from None
    require(ids.ndim == 2, "completion_ids", f"shape {tuple(ids.shape)}", "(B, T)")
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    require(whole, "completion_ids", ids.dtype, "integer token ids")
    kept = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=ids.device)
    shapes = f"shape {tuple(kept.shape)}"
    require(kept.shape == ids.shape, "mask", shapes, f"{tuple(ids.shape)}, as completion_ids")
    return ids, kept.bool()


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    try:
        rows = [torch.as_tensor(row) for row in sequences]
    except (TypeError, ValueError, RuntimeError):
        message = "completion_ids: got no numbers, want sequences of integer token ids"
        raise InputError(message) from None
    rows = [row.long() if row.numel() == 0 else row for row in rows]
    flat = all(row.ndim == 1 and not row.is_floating_point() for row in rows)
    require(flat, "completion_ids", "rows of another kind", "sequences of integer token ids")
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < length[:, None]


def _lengths(mask: Tensor) -> Int:
    """(B,) tokens before the first gap; InputError where something comes after it."""
    if mask.shape[1] == 0:
        return np.zeros(len(mask), np.int64)
    length, unbroken = leading_tokens(mask)
    if not unbroken:
        row = int((mask.sum(dim=1) != length).nonzero()[0])
        came = f"row {row} padded on the left" if not length[row] else f"a hole in row {row}"
        raise InputError(f"mask: got {came}, want the tokens first and then the padding")
    return length.cpu().numpy()


def _alphabetical(ids: NDArray[Any], length: Int, group: Int) -> tuple[Int, Int]:
    """The answers group by group in alphabetical order, and what each shares with the one before.

    Looks at a block of columns at a time, and only at answers that still share all they have with
    another one. A block's bytes are sorted as one string, which is some alphabetical order. What
    the first answer of a group shares with the one before means nothing.
    """
    order = np.argsort(group, kind="stable")
    common = np.zeros(len(order), np.int64)
    bunch = group[order]  # answers alike so far, numbered upwards along the order
    live = np.arange(len(order))
    start, width, T = 0, FIRST_BLOCK, ids.shape[1]
    while live.size and start < T:
        stop = min(start + width, T)
        rows = order[live]
        block = np.empty((len(rows), 1 + stop - start), np.int64)
        block[:, 0] = bunch.astype(">i8").view(np.int64)  # as bytes these ascend
        past = np.arange(start, stop) >= length[rows][:, None]
        block[:, 1:] = ids[rows, start:stop]
        block[:, 1:][past] = END
        within = np.argsort(block.view(f"V{block.itemsize * block.shape[1]}")[:, 0])
        rows, block = rows[within], block[within]
        order[live] = rows
        alike = block[1:] == block[:-1]
        whole = alike.all(axis=1)
        equal = np.where(whole, alike.shape[1], alike.argmin(axis=1))
        known = equal > 0  # 0: another bunch, parted before
        found = np.minimum(start + equal - 1, length[rows[1:]])
        common[live[1:][known]] = found[known]
        joined = np.append(whole, False) | np.append(False, whole)
        going = joined & (length[rows] >= stop)
        bunch = np.append(0, np.cumsum(~whole))[going]
        live = live[going]
        start, width = stop, 2 * width
    return order, common


def _pairs(neighbours: Int, length: Int) -> Int:
    """(P, W, W) tokens that any two members share, from what each shares with the one before."""
    W = neighbours.shape[1]
    later = np.arange(W) > np.arange(W)[:, None]
    most = np.iinfo(np.int64).max
    after = np.minimum.accumulate(np.where(later, neighbours[:, None, :], most), axis=2)
    shared = np.where(later, after, after.transpose(0, 2, 1))
    diagonal = np.arange(W)
    shared[:, diagonal, diagonal] = length
    return shared
