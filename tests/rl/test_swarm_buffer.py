"""The pool of others' rollouts: what comes in, what is drawn, and what is dropped and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from scoredraw.errors import InputError
from scoredraw.rl.reward_functions import GuardedReward
from scoredraw.rl.rollout_groups import Limits, RolloutGroup, encode_groups
from scoredraw.rl.swarm_buffer import (
    SELECTIONS,
    GroupScores,
    SwarmBuffer,
    score_groups,
    select_groups,
    swarm_advantages,
)
from scoredraw.rl.swarm_transports import InMemory, MemoryHub

pytestmark = pytest.mark.oracle

rewards_of_groups = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0]), min_size=2, max_size=5), max_size=12
)


def equal(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def group(name: str, right: int = 1, K: int = 4, **more: Any) -> RolloutGroup:
    return RolloutGroup(name, ["yes"] * right + ["no"] * (K - right), "yes", **more)


class Swarm:
    """A node under test, a wire to it for strangers, and a clock."""

    def __init__(self, **options: Any) -> None:
        self.hub, self.now = MemoryHub(), 0.0
        self.wire = InMemory(self.hub)
        self.node = SwarmBuffer(InMemory(self.hub), "node", clock=lambda: self.now, **options)

    def say(self, *groups: RolloutGroup, peer: str = "a") -> None:
        """As a peer, with as many different times as groups."""
        for k, one in enumerate(groups):
            one = replace(one, peer=peer, created=one.created or float(k + 1))
            for payload in encode_groups([one], Limits(payload=10_000_000)):
                self.wire.send(payload)

    def prompts(self, n: int = 100, selection: str = "uniform", **more: Any) -> list[str]:
        found = self.node.sample(n, selection, equal, rng=more.pop("rng", 0), **more)
        return sorted(g.prompt for g in found.groups)


# ── which groups ────────────────────────────────────────────────────────────────────────────────


@given(rewards_of_groups)
def test_scores_spelled_out(rewards: list[list[float]]) -> None:
    scores = GroupScores.of(rewards)
    for k, r in enumerate(rewards):
        A = (np.array(r) - np.mean(r)) / (np.std(r, ddof=1) + 1e-8)
        assert scores.total[k] == pytest.approx(sum(r))
        assert scores.magnitude[k] == pytest.approx(np.abs(A).mean(), abs=1e-7)
        assert scores.signal[k] == (max(r) > min(r))


@given(
    rewards_of_groups, st.integers(0, 14), st.sampled_from(sorted(SELECTIONS)), st.integers(0, 9)
)
def test_what_each_selection_may_take(
    rewards: list[list[float]], n: int, selection: str, seed: int
) -> None:
    """As many as asked for or as there are, each once, and by each rule's own filter and order."""
    P = len(rewards)
    scores = GroupScores.of(rewards, [f"p{k % 3}" for k in range(P)], [f"q{k}" for k in range(P)])
    chosen = select_groups(scores, n, selection, seed)
    live = np.ones(P, bool) if selection == "uniform" else scores.signal
    live = scores.total > 0 if selection == "top_reward" else live
    assert len(set(chosen.tolist())) == len(chosen) == min(n, int(live.sum()))
    assert live[chosen].all()
    left = np.setdiff1d(np.flatnonzero(live), chosen)
    if len(chosen) and len(left):
        key = {"top_reward": scores.total, "newest": np.arange(P),
               "advantage_magnitude": scores.magnitude.round(9)}.get(selection)  # fmt: skip
        assert key is None or key[chosen].min() >= key[left].max()


def test_top_reward_is_ordered_by_total_peer_and_question() -> None:
    """Of equals the last peer's last question wins; nothing is asked for, nothing comes."""
    scores = GroupScores.of([[1, 0], [1, 0], [1, 0], [1, 1]], ["b", "a", "b", "a"], list("zyxw"))
    assert select_groups(scores, 4, "top_reward").tolist() == [1, 2, 0, 3]
    assert select_groups(scores, 2, "top_reward").tolist() == [0, 3]
    assert select_groups(scores, 0, "top_reward").tolist() == []


def test_the_released_cut_is_not_repeated() -> None:
    """It looks for the first total above 0 in the unsorted list, here at 0, and so keeps a 0."""
    scores = GroupScores.of([[1, 0], [0, 0], [0, 0]], "abc", "abc")
    assert select_groups(scores, 3, "top_reward").tolist() == [0]


def test_all_correct_groups_teach_nothing_and_top_reward_takes_them() -> None:
    rewards = [[1.0] * 4, [1.0, 0.0, 1.0, 1.0]]
    scores = GroupScores.of(rewards)
    assert select_groups(scores, 1, "top_reward").tolist() == [0]
    assert select_groups(scores, 1, "nonzero_uniform", 0).tolist() == [1]
    assert not swarm_advantages(rewards[0], [0] * 4).any()


@pytest.mark.parametrize("selection", ["nonzero_uniform", "uniform"])
def test_the_order_of_arrival_does_not_change_the_law(selection: str) -> None:
    """2 of 5 in 4,000 draws, arrivals shuffled or sorted: pairs by χ², false alarms 0.1 % each."""
    live = [group(f"q{k}", 1 + k % 3) for k in range(5)]
    dead = [group(f"d{k}", 4 * (k % 2)) for k in range(4)] if selection != "uniform" else []
    order = np.random.default_rng(0)
    draws = np.random.default_rng(1)
    for shuffled in (True, False):
        counts: dict[tuple[str, ...], int] = {}
        for _ in range(20):
            swarm = Swarm()
            arriving = [*dead, *live]
            if shuffled:
                arriving = [arriving[i] for i in order.permutation(len(arriving))]
            swarm.say(*arriving)
            for _ in range(200):
                pair = tuple(swarm.prompts(2, selection, reuse=True, rng=draws))
                counts[pair] = counts.get(pair, 0) + 1
        assert len(counts) == 10
        assert chisquare(list(counts.values())).pvalue > 1e-3


# ── what comes in ───────────────────────────────────────────────────────────────────────────────


def test_what_arrives_is_kept_once_and_ones_own_never() -> None:
    swarm = Swarm()
    swarm.say(group("q"), group("r"))
    swarm.say(group("q"), group("r"))  # the same again
    swarm.say(group("mine"), peer="node")
    swarm.say(group("q"), peer="b")  # another's answers to the same question
    assert swarm.prompts() == ["q", "q", "r"]
    assert swarm.node.counts["duplicate"] == 2
    assert swarm.node.counts["own"] == 1
    swarm.say(group("q"), group("r"))  # again, when they have been used
    assert swarm.prompts() == []
    assert swarm.node.counts["duplicate"] == 4


def test_own_groups_never_come_back_by_any_selection() -> None:
    hub = MemoryHub()
    a, b = (SwarmBuffer(InMemory(hub), name) for name in "ab")
    a.publish([group("a1"), group("a2", 3)])
    for payload in b.transport.receive():
        b.transport.send(payload)  # an echo under the first sender's name
    for selection in SELECTIONS:
        assert a.sample(9, selection, equal).groups == []
    assert a.counts["own"] == 2


def test_publishing_the_same_answers_twice_is_not_a_repetition() -> None:
    hub = MemoryHub()
    a, b = (SwarmBuffer(InMemory(hub), name) for name in "ab")
    a.publish([group("q"), group("q")])
    a.publish([group("q")])
    assert len(b.sample(9, "uniform", equal).groups) == 3
    assert a.counts["published"] == 3


def test_time_counts_from_the_arrival_on_ones_own_clock() -> None:
    """Whatever the sender's clock says; and what has expired is not taken again."""
    swarm = Swarm(ttl=10.0)
    swarm.say(group("long ago", created=1.0), group("in the future", created=9e9))
    assert swarm.node.collect() == 2
    swarm.now = 9.9
    assert len(swarm.prompts(reuse=True)) == 2
    swarm.now = 10.0
    assert swarm.prompts() == []
    assert swarm.node.counts["expired"] == 2
    swarm.say(group("long ago", created=1.0))
    assert swarm.node.collect() == 0


def test_a_flood_drives_out_itself() -> None:
    swarm = Swarm(max_groups=40, peer_share=0.25)
    swarm.say(*(group(f"honest {k}") for k in range(5)), peer="honest")
    swarm.say(*(group(f"flood {k}") for k in range(500)), peer="flood")
    prompts = swarm.prompts()
    assert [p for p in prompts if p.startswith("honest")] == [f"honest {k}" for k in range(5)]
    assert sorted(p for p in prompts if p.startswith("flood")) == [
        f"flood {k}" for k in range(490, 500)
    ]
    assert swarm.node.counts["peer_share"] == 490


def test_many_names_drive_out_the_oldest_and_no_bound_is_passed() -> None:
    limits = Limits(payload=2000)
    swarm = Swarm(max_groups=20, max_characters=2000, limits=limits, peer_share=1.0)
    for k in range(300):
        swarm.say(group("x" * (k % 7 + 1) * 40), peer=f"p{k}")
        swarm.node.collect()
        held = [entry.size for entry in swarm.node._entries.values()]
        assert len(held) <= 20
        assert sum(held) == swarm.node._characters <= 2000
        assert len(swarm.node._seen) <= 80
    assert swarm.node.counts["evicted"] == 300 - len(swarm.node)
    assert {e.group.peer for e in swarm.node._entries.values()} == set(swarm.node._shares)
    swarm.node.clear()
    assert (len(swarm.node), swarm.node._characters) == (0, 0)


def test_verifiers_and_answers_are_checked() -> None:
    """A liar about the answer, one that the check cannot digest, and a reward nobody knows."""

    def check(one: RolloutGroup) -> bool:
        if one.prompt == "odd":
            raise KeyError(one.prompt)
        return one.answer == "yes"

    swarm = Swarm(verify_answer=check, verifiers={"", "exact"})
    swarm.say(
        group("good", verifier="exact"), group("strange", verifier="os.system"), group("odd"),
        replace(group("lie"), answer="no"),
    )  # fmt: skip
    assert swarm.prompts() == ["good"]
    assert swarm.node.counts["unverified"] == 2
    assert swarm.node.counts["unknown_verifier"] == 1


@pytest.mark.parametrize("bad", [math.nan, None, math.inf, "raise"])
def test_groups_without_a_reward_here_are_dropped(bad: Any) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        if bad == "raise" and "odd" in prompts:
            raise ValueError("odd")
        found: list[Any] = equal(completions, **columns)
        return [bad if p == "odd" and k % 4 == 2 else r
                for k, (p, r) in enumerate(zip(prompts, found, strict=True))]  # fmt: skip

    swarm = Swarm()
    swarm.say(group("odd"), group("good"))
    found = swarm.node.sample(5, "uniform", reward)
    assert [g.prompt for g in found.groups] == ["good"]
    assert found.missing == 4
    assert swarm.node.counts["unscored"] == 1


def test_scores_are_ones_own_and_asked_for_once() -> None:
    """Another reward function scores again; the same one does not."""
    calls: list[int] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [float(c == "no") for c in completions]

    swarm = Swarm()
    swarm.say(group("q"))
    for _ in range(3):
        found = swarm.node.sample(1, "uniform", reward, reuse=True)
    assert found.rewards[0].tolist() == [0.0, 1.0, 1.0, 1.0]
    swarm.say(group("r"))
    swarm.node.sample(1, "uniform", reward, reuse=True)
    assert calls == [4, 4]
    found = swarm.node.sample(2, "uniform", equal)
    assert found.rewards[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_what_a_reward_sees() -> None:
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * 5

    groups = [RolloutGroup("p", ["a", "b"], "1", {"task": "x"}, "v"), group("q", K=3)]
    score_groups(groups, GuardedReward(reward))
    assert seen["prompts"] == ["p", "p", "q", "q", "q"]
    assert seen["answer"] == ["1", "1", "yes", "yes", "yes"]
    assert (seen["verifier"][0], seen["meta"][0]) == ("v", {"task": "x"})


class Broken(InMemory):
    def send(self, payload: bytes) -> None:
        raise OSError("the network is down")


def test_a_transport_that_fails_is_counted() -> None:
    node = SwarmBuffer(Broken(MemoryHub()), "node")
    assert node.publish([group("q")]) == 0
    assert node.counts == {"send_failed": 1}


def test_groups_too_large_to_send_are_counted() -> None:
    hub = MemoryHub()
    a = SwarmBuffer(InMemory(hub), "a", limits=Limits(completion=10))
    b = SwarmBuffer(InMemory(hub), "b")
    assert a.publish([RolloutGroup("q", ["x" * 11, "y"]), group("r")]) == 1
    assert a.counts == {"published": 1, "completion_length": 1}
    assert b.collect() == 1


def test_malformed_payloads_are_counted_and_good_groups_kept() -> None:
    swarm = Swarm()
    for raw in (b"\x80\x04.", b"{}", b"[" * 99_999, b'{"scoredraw":1,"groups":[7]}'):
        swarm.wire.send(raw)
    swarm.wire.send(b" " * 1_000_001)
    swarm.say(group("good"))
    assert swarm.prompts() == ["good"]
    counts = {"not_json": 2, "version": 1, "not_groups": 1, "oversized": 1}
    assert {name: swarm.node.counts[name] for name in counts} == counts


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

nobody: Any = object()
half: Any = 1.5
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Swarm(ttl=0), "ttl: got 0"),
    (lambda: Swarm(ttl=math.nan), "ttl: got nan"),
    (lambda: Swarm(max_groups=0), "max_groups: got 0"),
    (lambda: Swarm(max_characters=10), "max_characters: got 10"),
    (lambda: Swarm(peer_share=0), "peer_share: got 0"),
    (lambda: Swarm(verifiers="exact"), "verifiers: got 'exact'"),
    (lambda: SwarmBuffer(nobody), "transport: got object"),
    (lambda: SwarmBuffer(InMemory(MemoryHub()), "a b"), "peer: got 'a b'"),
    (lambda: Swarm().node.sample(-1, reward_fn=equal), "n: got -1"),
    (lambda: Swarm().node.sample(half, reward_fn=equal), "n: got 1.5"),
    (lambda: Swarm().node.sample(1, "best", equal), "selection: got 'best', want one of nonzero"),
    (lambda: Swarm().node.sample(1), "reward_fn: got NoneType"),
    (lambda: GroupScores.of([[0, 1], [], [1, 1]]), "rewards: got a group of none"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
