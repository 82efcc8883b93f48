"""The pool of other nodes' rollouts that a node of a swarm trains on beside its own.

A node publishes its groups and collects those of others. It scores them again with its own reward,
whatever the sender thought of them, and draws some for its next update. With group-relative
advantages

    A_i = (r_i - mean r) / (std r + 1e-8)

a group whose rewards are all equal teaches nothing, so the paper draws uniformly among the others
("nonzero_uniform"). Five selections:

    nonzero_uniform      uniformly among groups whose rewards differ
    uniform              uniformly among all; the baseline
    top_reward           the largest sums of rewards, as the released demo; often groups that are
                         all right and teach nothing
    advantage_magnitude  the largest mean |A|: groups about half right
    newest               the latest to come among those whose rewards differ

Everything is bounded: groups, characters, what one peer may hold of either, and what is remembered
to recognise repetitions. What is dropped is counted by its reason.

Amico et al., "Sharing is caring: efficient LM post-training with collective RL experience sharing"
(SAPO), 2025, arXiv 2509.08721.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw import sampling
from scoredraw.errors import require
from scoredraw.rl.reward_functions import GuardedReward
from scoredraw.rl.reward_groups import centre, chain, group_rewards, scale
from scoredraw.rl.rollout_groups import LIMITS, Limits, RolloutGroup, decode_groups, encode_groups
from scoredraw.rl.rollout_groups import check_name as check_peer
from scoredraw.rl.swarm_transports import Transport
from scoredraw.uniforms import Rng

Float = NDArray[np.float64]
Int = NDArray[np.int64]

EPS = 1e-8
HELD_CHARACTERS = 256_000_000
REMEMBERED = 4  # times as many groups as may be held are recognised when they come again

log = logging.getLogger(__name__)


def swarm_advantages(rewards: Any, group_ids: Any) -> Tensor:
    """(B,): (r - mean) / (std + 1e-8) within each group, std unbiased.

    rewards: (B,), None or NaN for none, whose advantage is 0; group_ids: (B,) integers.

    >>> swarm_advantages([1.0, 0.0, 0.0, 5.0, 5.0], [0, 0, 0, 1, 1]).round(decimals=3)
    tensor([ 1.1550, -0.5770, -0.5770,  0.0000,  0.0000])
    """
    advantages = chain(centre(), scale(ddof=1, eps=EPS))
    return advantages(group_rewards(rewards, group_ids))


def score_groups(groups: Sequence[RolloutGroup], reward: GuardedReward) -> list[Float]:
    """The K rewards of each group, NaN where the function gave none; one call for all.

    The function gets prompts, completions and the columns answer, verifier and meta.
    """
    if not groups:
        return []
    sizes = [len(group.completions) for group in groups]
    rows = [group for group, K in zip(groups, sizes, strict=True) for _ in range(K)]
    found = reward(
        prompts=[group.prompt for group in rows],
        completions=[text for group in groups for text in group.completions],
        answer=[group.answer for group in rows],
        verifier=[group.verifier for group in rows],
        meta=[group.meta for group in rows],
    )
    rewards = np.array(found, np.float64)
    return [rewards[start:end] for start, end in pairwise([0, *np.cumsum(sizes).tolist()])]


# ── which groups ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class GroupScores:
    """What a selection looks at, a value a group, in the order of arrival.

    total: Σ r; magnitude: mean |A|; signal: whether rewards differ; peer and prompt break ties of
    top_reward. All (P,).
    """

    total: Float
    magnitude: Float
    signal: NDArray[np.bool_]
    peer: Sequence[str] = ()
    prompt: Sequence[str] = ()

    @classmethod
    def of(
        cls, rewards: Sequence[Any], peer: Sequence[str] = (), prompt: Sequence[str] = ()
    ) -> GroupScores:
        """From the rewards of each group, (K,) each, K >= 1 of any size."""
        if not len(rewards):
            return cls(np.zeros(0), np.zeros(0), np.zeros(0, bool))
        sizes = np.array([len(r) for r in rewards])
        require(bool(sizes.all()), "rewards", "a group of none", "a reward or more a group")
        flat = np.concatenate(rewards).astype(np.float64)
        start = np.cumsum(sizes) - sizes
        ids = np.repeat(np.arange(len(sizes)), sizes)
        size = np.abs(swarm_advantages(torch.from_numpy(flat), torch.from_numpy(ids)).numpy())
        most, least = np.maximum.reduceat(flat, start), np.minimum.reduceat(flat, start)
        return cls(
            np.add.reduceat(flat, start), np.add.reduceat(size, start) / sizes, most > least,
            peer, prompt,
        )  # fmt: skip


def _nonzero_uniform(scores: GroupScores, n: int, rng: Rng) -> Int:
    live = np.flatnonzero(scores.signal)
    return live[_some(len(live), n, rng)]


def _uniform(scores: GroupScores, n: int, rng: Rng) -> Int:
    return _some(len(scores.total), n, rng)


def _some(of: int, n: int, rng: Rng) -> Int:
    size = min(n, of)
    return sampling.uniform(of, size, rng=rng).indices if size else np.zeros(0, np.int64)


def _top_reward(scores: GroupScores, n: int, rng: Rng) -> Int:
    """The last n in ascending order of (total, peer, prompt), without those whose total is 0.

    The released code looks for the first total above 0 in the unsorted list and cuts the sorted one
    there, lets one payload of a peer overwrite another, and returns everything for n = 0.
    """
    live = np.flatnonzero(scores.total > 0)
    keys = [np.array(list(k))[live] for k in (scores.prompt, scores.peer) if len(k)]
    order = np.lexsort([*keys, scores.total[live]])
    return live[order[max(len(order) - n, 0) :]]


def _advantage_magnitude(scores: GroupScores, n: int, rng: Rng) -> Int:
    live = np.flatnonzero(scores.signal)
    size = min(n, len(live))
    if not size:
        return live[:0]
    return live[sampling.top_k(scores.magnitude[live].round(9), size, rng=rng).indices]


def _newest(scores: GroupScores, n: int, rng: Rng) -> Int:
    live = np.flatnonzero(scores.signal)
    return live[max(len(live) - n, 0) :]


SELECTIONS: dict[str, Callable[[GroupScores, int, Rng], Int]] = {
    "nonzero_uniform": _nonzero_uniform,
    "uniform": _uniform,
    "top_reward": _top_reward,
    "advantage_magnitude": _advantage_magnitude,
    "newest": _newest,
}


def select_groups(
    scores: GroupScores, n: int, selection: str = "nonzero_uniform", rng: Rng = None
) -> Int:
    """Which n groups to train on, int64 (at most n,): fewer where fewer qualify.

    Raises InputError for n < 0 and an unknown selection. O(P log P).

    >>> scores = GroupScores.of([[1, 1], [0, 1], [0, 0]], peer="abc", prompt="qqq")
    >>> select_groups(scores, 2, rng=0).tolist(), select_groups(scores, 1, "top_reward").tolist()
    ([1], [0])
    """
    check_selection(n, selection)
    if n == 0:
        return np.zeros(0, np.int64)
    return SELECTIONS[selection](scores, n, rng)


def check_selection(n: Any, selection: str) -> None:
    whole = isinstance(n, (int, np.integer)) and type(n) is not bool
    require(whole and bool(n >= 0), "n", n, "a count of groups, 0 or more")
    known = ", ".join(SELECTIONS)
    require(selection in SELECTIONS, "selection", repr(selection), f"one of {known}")


# ── the pool ────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Entry:
    key: int
    group: RolloutGroup
    received: float
    size: int
    rewards: Float | None = None
    total: float = 0.0
    magnitude: float = 0.0
    signal: bool = False


@dataclass(slots=True)
class _Share:
    """What one peer holds: its entries by arrival, and their characters."""

    keys: OrderedDict[int, None] = field(default_factory=OrderedDict)
    size: int = 0


@dataclass(frozen=True, eq=False)
class SwarmSample:
    """Groups drawn from the others, with the rewards (K,) that they have here.

    asked: how many were wanted; eligible: how many could be drawn from. `missing` were not there.
    """

    groups: list[RolloutGroup]
    rewards: list[Float]
    asked: int
    eligible: int

    @property
    def missing(self) -> int:
        return self.asked - len(self.groups)


class SwarmBuffer:
    """Publishes a node's groups and keeps the latest of the others', within bounds.

    transport: see swarm_transports; peer: this node's name (a random one if None), under which it
    publishes and whose groups it never takes in. ttl: seconds a group is kept from its arrival, on
    this node's clock, so that no clocks need agree. max_groups, max_characters: bounds of the pool;
    peer_share: the part of both that one peer may hold, so that one that floods drives out itself.
    verify_answer: called with a group before it is scored; false, or an exception, drops it (a
    sender may lie about the answer). verifiers: the verifier names that this node knows; groups
    with another are dropped (None: all are taken). `counts` tells what came, went and was dropped.
    Sequential: what is drawn depends on what has arrived. O(groups) a call, memory within the
    bounds. Not for several threads at once. Raises InputError for options that make no sense.

    >>> from scoredraw.rl.swarm_transports import InMemory, MemoryHub
    >>> hub = MemoryHub()
    >>> a, b = (SwarmBuffer(InMemory(hub), name) for name in "ab")
    >>> a.publish([RolloutGroup("1+1=", ["2", "3"], answer="2"), RolloutGroup("1+2=", ["4", "5"])])
    2
    >>> def equal(completions, answer, **columns):
    ...     return [float(c == a) for c, a in zip(completions, answer, strict=True)]
    >>> found = b.sample(2, reward_fn=equal, rng=0)
    >>> [group.prompt for group in found.groups], found.missing, found.rewards[0].tolist()
    (['1+1='], 1, [1.0, 0.0])
    """

    def __init__(
        self,
        transport: Transport,
        peer: str | None = None,
        *,
        ttl: float = 600.0,
        max_groups: int = 10_000,
        max_characters: int = HELD_CHARACTERS,
        peer_share: float = 0.25,
        limits: Limits = LIMITS,
        verify_answer: Callable[[RolloutGroup], bool] | None = None,
        verifiers: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        speaks = isinstance(transport, Transport)
        require(speaks, "transport", type(transport).__name__, "send, receive, close and dropped")
        require(ttl > 0, "ttl", ttl, "seconds, more than 0")
        require(max_groups >= 1, "max_groups", max_groups, "at least 1")
        fits = max_characters >= limits.payload
        require(fits, "max_characters", max_characters, f"a payload's {limits.payload} at least")
        require(0 < peer_share <= 1, "peer_share", peer_share, "a share in (0, 1]")
        named = verifiers is None or not isinstance(verifiers, str)
        require(named, "verifiers", repr(verifiers), "a collection of names, or None")
        self.peer = secrets.token_hex(8) if peer is None else peer
        check_peer(self.peer, "peer")
        self.transport, self.ttl, self.limits = transport, ttl, limits
        self.max_groups, self.max_characters, self.peer_share = (
            max_groups, max_characters, peer_share)  # fmt: skip
        self.verify_answer = verify_answer
        self.verifiers = None if verifiers is None else frozenset(verifiers)
        self._clock = clock
        self._counts: Counter[str] = Counter()
        # the first of a plain dict is found only past all that were deleted before it
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._shares: dict[str, _Share] = {}
        self._characters = 0
        self._last = 0.0
        self._reward: GuardedReward | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def counts(self) -> Counter[str]:
        """published, received, accepted, drawn; and under its reason each group dropped.

        Of payloads: oversized, overflow, unreadable, not_json, version, not_groups, send_failed. Of
        groups: the field that is wrong, own, duplicate, unknown_verifier, unverified, unscored,
        expired, evicted (by newer ones), peer_share (by newer ones of its own peer).
        """
        return self._counts + self.transport.dropped

    def publish(self, groups: Sequence[RolloutGroup]) -> int:
        """Send groups under this node's name and clock; how many went.

        A transport that fails and a group that exceeds a limit are counted, not raised: training
        goes on, alone if need be.
        """
        stamps = []
        for _ in groups:
            self._last = max(time.time(), math.nextafter(self._last, math.inf))  # never the same
            stamps.append((self.peer, self._last))
        refused: Counter[str] = Counter()
        payloads = encode_groups(groups, self.limits, refused, stamps)
        self._counts += refused
        try:
            for payload in payloads:
                self.transport.send(payload)
        except OSError as problem:
            self._counts["send_failed"] += 1
            log.warning("swarm: could not publish: %s", problem)
            return 0
        sent = len(groups) - refused.total()
        self._counts["published"] += sent
        return sent

    def collect(self) -> int:
        """Take in what has arrived and let go what is too old; how many groups are new."""
        now = self._clock()
        self._expire(now)
        before = self._counts["accepted"]
        for payload in self.transport.receive():
            groups, rejected = decode_groups(payload, self.limits)
            self._counts += rejected
            for group in groups:
                self._counts["received"] += 1
                self._counts[self._take(group, now)] += 1
        return self._counts["accepted"] - before

    def sample(
        self,
        n: int,
        selection: str = "nonzero_uniform",
        reward_fn: Callable[..., Any] | None = None,
        rng: Rng = None,
        *,
        reuse: bool = False,
    ) -> SwarmSample:
        """Collect, score what is new with reward_fn, and draw n groups, or as many as there are.

        reward_fn: as TRL calls them (`score_groups`); one that raises or gives no number drops the
        group. Its scores are kept until another function comes. reuse: leave what was drawn in the
        pool; otherwise no group is drawn twice. Raises InputError as `select_groups`.
        """
        check_selection(n, selection)
        require(callable(reward_fn), "reward_fn", type(reward_fn).__name__, "a reward function")
        assert reward_fn is not None
        self.collect()
        self._score(reward_fn)
        entries = list(self._entries.values())
        scores = GroupScores(
            np.array([e.total for e in entries]),
            np.array([e.magnitude for e in entries]),
            np.array([e.signal for e in entries], bool),
            *_names(entries, selection),
        )
        chosen = [entries[i] for i in select_groups(scores, n, selection, rng)]
        if not reuse:
            for entry in chosen:
                self._drop(entry.key)
        self._counts["drawn"] += len(chosen)
        filtered = {"uniform": len(entries), "top_reward": int((scores.total > 0).sum())}
        eligible = filtered.get(selection, int(scores.signal.sum()))
        rewards = [e.rewards for e in chosen if e.rewards is not None]
        return SwarmSample([e.group for e in chosen], rewards, int(n), eligible)

    def clear(self) -> None:
        """Let go all groups; those that come again are still recognised."""
        self._entries.clear()
        self._shares.clear()
        self._characters = 0

    def close(self) -> None:
        """Leave the swarm."""
        self.transport.close()

    # ── what may come in, and what has to go ──

    def _take(self, group: RolloutGroup, now: float) -> str:
        if group.peer == self.peer:
            return "own"
        if self.verifiers is not None and group.verifier not in self.verifiers:
            return "unknown_verifier"
        key = hash(group)  # of texts under a secret of this process: nobody can aim at one
        if key in self._seen:
            return "duplicate"
        self._seen[key] = None
        if len(self._seen) > REMEMBERED * self.max_groups:
            self._seen.popitem(last=False)
        entry = _Entry(key, group, now, group.size())
        self._entries[key] = entry
        share = self._shares.setdefault(group.peer, _Share())
        share.keys[key] = None
        share.size += entry.size
        self._characters += entry.size
        most = max(1, int(self.peer_share * self.max_groups))
        room = max(self.limits.payload, int(self.peer_share * self.max_characters))
        while len(share.keys) > most or share.size > room:
            self._drop(next(iter(share.keys)), "peer_share")
        while len(self._entries) > self.max_groups or self._characters > self.max_characters:
            self._drop(next(iter(self._entries)), "evicted")
        return "accepted"

    def _expire(self, now: float) -> None:
        """They lie in the order of their arrival."""
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if now - entry.received < self.ttl:
                return
            self._drop(key, "expired")

    def _drop(self, key: int, reason: str | None = None) -> None:
        entry = self._entries.pop(key)
        share = self._shares[entry.group.peer]
        del share.keys[key]
        share.size -= entry.size
        self._characters -= entry.size
        if not share.keys:
            del self._shares[entry.group.peer]
        if reason is not None:
            self._counts[reason] += 1

    def _score(self, reward_fn: Callable[..., Any]) -> None:
        if self._reward is None or self._reward.reward != reward_fn:
            self._reward = GuardedReward(reward_fn)
            for entry in self._entries.values():
                entry.rewards = None
        fresh = []
        for entry in list(self._entries.values()):
            if entry.rewards is None and self._verified(entry.group):
                fresh.append(entry)
            elif entry.rewards is None:
                self._drop(entry.key, "unverified")
        rewards = score_groups([entry.group for entry in fresh], self._reward)
        found = GroupScores.of(rewards)
        columns = found.total.tolist(), found.magnitude.tolist(), found.signal.tolist()
        for entry, own, total, magnitude, signal in zip(fresh, rewards, *columns, strict=True):
            if math.isfinite(total):  # each of them was scored
                entry.rewards, entry.total = own, total
                entry.magnitude, entry.signal = magnitude, signal
            else:
                self._drop(entry.key, "unscored")

    def _verified(self, group: RolloutGroup) -> bool:
        if self.verify_answer is None:
            return True
        try:
            return bool(self.verify_answer(group))
        except Exception as problem:
            log.warning("swarm: verify_answer: %s: %s", type(problem).__name__, problem)
            return False


def _names(entries: Sequence[_Entry], selection: str) -> tuple[list[str], list[str]]:
    """Peers and prompts, which only the order of top_reward needs."""
    if selection != "top_reward":
        return [], []
    return [e.group.peer for e in entries], [e.group.prompt for e in entries]
