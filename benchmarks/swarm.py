"""A swarm's pool over Zenoh on loopback, against Zenoh alone with the same bytes.

Ours publishes groups of eight answers, collects them at another node, decodes and checks them,
scores their answers and draws all of them. The peer puts the same bytes and takes them as they
come: first a message a group, as one would without thinking about it, then the very payloads that
ours makes of many groups, of which nothing is read. Both sides are two sessions of one process over
TCP, which wait for slow readers, and are done when everything has arrived.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from benchmarks.contest import Contest
from scoredraw.papers.training import one_thread
from scoredraw.rl.rollout_groups import RolloutGroup, encode_groups
from scoredraw.rl.swarm_buffer import SwarmBuffer, SwarmSample
from scoredraw.rl.swarm_transports import Zenoh

K, DEADLINE, AT_MOST = 8, 60.0, 1.5
KEY = "benchmark/groups"


def swarm(*, tiny: bool = False) -> Iterator[Contest]:
    """Against a message a group, and against our payloads."""
    n = 20 if tiny else 10_000
    groups = [group(i) for i in range(n)]
    one_each = [payload for each in groups for payload in encode_groups([each])]
    packed = encode_groups(groups)
    size = sum(map(len, one_each)) / 1e6
    with ExitStack() as stack:
        pool, plain = Pool(stack), Plain(stack)
        for how, payloads, at_most in (
            ("a message a group", one_each, AT_MOST), ("our payloads", packed, None),
        ):  # fmt: skip
            yield Contest(
                f"publish and sample {n:,} groups of {K} answers, {size:.1f} MB",
                f"Zenoh alone, {how} ({len(payloads):,} puts)", partial(pool.exchange, groups),
                partial(plain.exchange, payloads), partial(whole, groups, payloads), at_most,
            )  # fmt: skip


def group(i: int) -> RolloutGroup:
    """A sum with eight lines of working, of which every other one ends right."""
    question = f"{i} + {7 * i % 1000} = "
    right = i + 7 * i % 1000
    texts = [f"Add the tens, then the ones, and carry. So it is {right + k % 2}" for k in range(K)]
    return RolloutGroup(question, tuple(texts), answer=str(right), peer="one")


def ends_right(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [
        float(text.rpartition(" ")[2] == a) for text, a in zip(completions, answer, strict=True)
    ]


class Pool:
    """Two nodes with their pools."""

    def __init__(self, stack: ExitStack) -> None:
        place = [endpoint()]
        sender = stack.enter_context(Zenoh("one", listen=place, block=True))
        self.reader = stack.enter_context(Zenoh("two", connect=place, block=True))
        assert sender.wait_for_peer(DEADLINE)
        self.source = SwarmBuffer(sender, "one")
        self.pool = SwarmBuffer(self.reader, "two", peer_share=1.0)

    def exchange(self, groups: Sequence[RolloutGroup]) -> SwarmSample:
        sent = self.source.publish(groups)
        while len(self.pool) < sent:
            assert self.reader.wait(DEADLINE)
            self.pool.collect()
        with one_thread():  # what torch has to do is too small to share out
            return self.pool.sample(sent, reward_fn=ends_right, rng=0)


class Plain:
    """Two sessions that are set up as the nodes' are, and a list."""

    def __init__(self, stack: ExitStack) -> None:
        import zenoh

        place = endpoint()
        self.got: list[bytes] = []
        self.wanted, self.complete = 0, threading.Event()
        heard = threading.Event()
        sender, reader = (
            stack.enter_context(closing(session(end, place))) for end in ("listen", "connect")
        )
        direct = zenoh.handlers.Callback(self.take, indirect=False)
        self.subscriber = reader.declare_subscriber(KEY, direct)
        self.publisher = sender.declare_publisher(
            KEY, congestion_control=zenoh.CongestionControl.BLOCK
        )
        self.publisher.declare_matching_listener(lambda status: heard.set())
        assert self.publisher.matching_status.matching or heard.wait(DEADLINE)

    def take(self, sample: Any) -> None:
        self.got.append(sample.payload.to_bytes())
        if len(self.got) == self.wanted:
            self.complete.set()

    def exchange(self, payloads: Sequence[bytes]) -> list[bytes]:
        self.got, self.wanted = [], len(payloads)
        self.complete.clear()
        for payload in payloads:
            self.publisher.put(payload)
        assert self.complete.wait(DEADLINE)
        return self.got


def session(end: str, place: str) -> Any:
    """A peer that listens or connects there; the rest as in our transport."""
    import zenoh

    wanted = {
        "mode": "peer", "listen/endpoints": [], f"{end}/endpoints": [place],
        "scouting/multicast/enabled": False, "transport/shared_memory/enabled": False,
    }  # fmt: skip
    config = zenoh.Config()
    for key, value in wanted.items():
        config.insert_json5(key, json.dumps(value))
    return zenoh.open(config)


def endpoint() -> str:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp/127.0.0.1:{probe.getsockname()[1]}"


def whole(
    groups: Sequence[RolloutGroup], payloads: Sequence[bytes], ours: SwarmSample,
    theirs: list[bytes],
) -> None:  # fmt: skip
    """Every group has come and was scored; every byte has come."""
    found, sent = ({(g.prompt, g.completions) for g in some} for some in (ours.groups, groups))
    assert found == sent
    assert len(ours.groups) == len(groups)
    assert all(r.sum() == K / 2 for r in ours.rewards)
    assert theirs == list(payloads)
