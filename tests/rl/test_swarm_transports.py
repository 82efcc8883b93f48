"""Memory, folders and Zenoh: one contract, and what each does with what it should not take."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.rl import swarm_transports
from scoredraw.rl.rollout_groups import RolloutGroup
from scoredraw.rl.swarm_buffer import SwarmBuffer
from scoredraw.rl.swarm_transports import (
    SUFFIX,
    Directory,
    Inbox,
    InMemory,
    MemoryHub,
    Transport,
    Zenoh,
)

pytestmark = pytest.mark.contract

DEADLINE = 20.0
CAP = 100_000
Join = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def zenoh_nodes() -> Join:
    """The first node listens at a port that the others know."""
    pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    endpoint = f"tcp/127.0.0.1:{free_port()}"
    nodes: list[Zenoh] = []

    def join(peer: str, **options: Any) -> Zenoh:
        place = {"connect": [endpoint]} if nodes else {"listen": [endpoint]}
        nodes.append(Zenoh(peer, block=True, **place, **options))
        return nodes[-1]

    return join


@pytest.fixture(params=["memory", "directory", "zenoh"])
def join(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Join]:
    """Makes nodes of one swarm that are closed afterwards."""
    made: list[Any] = []
    hub = MemoryHub()
    makers: dict[str, Callable[[], Join]] = {
        "memory": lambda: lambda peer, **options: InMemory(hub, **options),
        "directory": lambda: lambda peer, **options: Directory(tmp_path / "s", peer, **options),
        "zenoh": zenoh_nodes,
    }
    maker = makers[request.param]()

    def new(peer: str, **options: Any) -> Any:
        made.append(maker(peer, max_payload=CAP, **options))
        return made[-1]

    yield new
    for transport in made:
        transport.close()
        transport.close()  # a second time does nothing


def meet(*nodes: Any) -> None:
    for node in nodes:
        if isinstance(node, Zenoh):
            assert node.wait_for_peer(DEADLINE)


def arrived(node: Any, n: int) -> list[bytes]:
    """The next n payloads, before the deadline."""
    found: list[bytes] = []
    end = time.monotonic() + DEADLINE
    while len(found) < n and time.monotonic() < end:
        if hasattr(node, "wait"):
            node.wait(end - time.monotonic())
        found += node.receive()
    return found


def test_others_hear_what_one_says_and_oneself_does_not(join: Join) -> None:
    a, b, c = join("a"), join("b"), join("c")
    assert all(isinstance(node, Transport) for node in (a, b, c))
    meet(b, c)
    sent = [b"one", b"", bytes(range(256)) * 100]
    for payload in sent:
        a.send(payload)
    assert sorted(arrived(b, 3)) == sorted(sent)
    if not isinstance(a, Zenoh):  # c may have been found after it was said
        assert sorted(arrived(c, 3)) == sorted(sent)
    assert a.receive() == b.receive() == []
    b.send(b"back")
    assert arrived(a, 1) == [b"back"]


def test_what_is_too_large_is_dropped_and_the_rest_arrives(join: Join) -> None:
    a, b = join("a"), join("b")
    meet(a, b)
    for payload in (b"x" * (CAP + 1), b"x" * 20 * CAP, b"x" * CAP, b"small"):
        a.send(payload)
    assert sorted(map(len, arrived(b, 2))) == [5, CAP]
    if not isinstance(b, Zenoh):
        assert b.dropped == {"oversized": 2}
    else:  # the largest is refused by Zenoh itself before it is assembled
        assert b.dropped == {"oversized": 1}


def test_what_is_held_is_bounded(join: Join) -> None:
    a, b = join("a"), join("b", max_held=3 * CAP)
    meet(a, b)
    for i in range(12):
        a.send(bytes([i]) * CAP)
    a.send(b"last")
    if isinstance(b, Directory):  # the rest lies in the folder until it is asked for
        got = b.receive()
        assert len(got) < 13
        assert sum(map(len, got)) <= 3 * CAP
        assert b"last" in got + arrived(b, 13 - len(got))
        return
    end = time.monotonic() + DEADLINE
    while b.dropped["overflow"] < 10 and time.monotonic() < end:
        b.wait(end - time.monotonic())
    assert b.dropped == {"overflow": 10}
    got = arrived(b, 3)  # two of the large ones, and the last, which may still be coming
    assert sorted(map(len, got)) == [4, CAP, CAP]


def test_a_closed_transport_says_so(join: Join) -> None:
    a, b = join("a"), join("b")
    meet(a, b)
    a.close()
    with pytest.raises(OSError, match="closed"):
        a.send(b"late")
    b.send(b"into the void")  # nobody listens, which is no error


# ── folders ─────────────────────────────────────────────────────────────────────────────────────


def test_only_whole_plain_files_are_read(tmp_path: Path) -> None:
    """Links, pipes and folders that look like payloads; and files still being written."""
    node = Directory(tmp_path, "a", max_payload=CAP)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (tmp_path / f"link{SUFFIX}").symlink_to(secret)
    (tmp_path / f"loop{SUFFIX}").symlink_to(tmp_path / f"loop{SUFFIX}")
    os.mkfifo(tmp_path / f"pipe{SUFFIX}")
    (tmp_path / f"folder{SUFFIX}").mkdir()
    (tmp_path / f".half.partial{SUFFIX}").write_bytes(b"ha")
    (tmp_path / "other.txt").write_bytes(b"other")
    assert node.receive() == []
    assert node.dropped == {"unreadable": 4}
    (tmp_path / f"good{SUFFIX}").write_bytes(b"good")
    assert node.receive() == [b"good"]
    assert node.receive() == []
    assert node.dropped == {"unreadable": 4}, "looked at again"


def test_old_files_go_whoever_wrote_them(tmp_path: Path) -> None:
    """Also those dated in the future, which would stay for ever; a dead node's too."""
    a = Directory(tmp_path, "a", ttl=100.0)
    for name, age in (("old", 101), ("future", -101), (".half.partial", 101), ("new", 50)):
        file = tmp_path / f"{name}{SUFFIX}"
        file.write_bytes(name.encode())
        now = time.time()
        os.utime(file, (now - age, now - age))
    assert a.receive() == [b"new"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(SUFFIX)] == [f"new{SUFFIX}"]


def test_a_node_that_starts_again_is_heard_again(tmp_path: Path) -> None:
    a = Directory(tmp_path, "a")
    for said in (b"first life", b"second life"):
        with Directory(tmp_path, "b") as b:
            b.send(said)
        assert a.receive() == [said]
    a.close()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json"]


def test_a_node_that_starts_again_hears_again_what_is_not_too_old(tmp_path: Path) -> None:
    """Also what it has drawn: of its first life nothing is remembered."""
    said = RolloutGroup("q", ["yes", "no"])
    SwarmBuffer(Directory(tmp_path, "b"), "b").publish([said])
    for old, drawn in ((0, ["q"]), (9, ["q"]), (11, [])):
        for file in tmp_path.glob(f"*{SUFFIX}"):
            os.utime(file, (time.time() - old,) * 2)
        with Directory(tmp_path, "a", ttl=10.0) as life:
            found = SwarmBuffer(life, "a").sample(1, reward_fn=lambda **_: [1.0, 0.0])
        assert [group.prompt for group in found.groups] == drawn


def test_a_folder_that_vanishes_is_no_end(tmp_path: Path) -> None:
    node = Directory(tmp_path / "s", "a")
    for file in (tmp_path / "s").iterdir():
        file.unlink()
    (tmp_path / "s").rmdir()
    assert node.receive() == []
    assert node.dropped == {"unreadable": 1}
    with pytest.raises(OSError, match="cannot write"):
        node.send(b"x")


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


def test_bad_options(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: Directory(tmp_path, "a/b"), "peer: got 'a/b'"),
        (lambda: Directory(tmp_path, ""), "peer: got ''"),
        (lambda: Directory(tmp_path, "a", ttl=0), "ttl: got 0"),
        (lambda: Directory(tmp_path, "a", max_files=0), "max_files: got 0"),
        (lambda: Directory(tmp_path, "a", max_held=10), "max_held: got 10"),
        (lambda: Directory(tmp_path / "file", "a"), "folder: cannot use"),
        (lambda: Inbox(0), "max_payload: got 0"),
        (lambda: InMemory(MemoryHub(), max_held=10), "max_held: got 10"),
        (lambda: Zenoh("**"), r"peer: got '\*\*'"),
        (lambda: Zenoh("a", swarm="a/b"), "swarm: got 'a/b'"),
        (lambda: Zenoh("a", listen="tcp/127.0.0.1:0"), "listen: got 'tcp/127.0.0.1:0', want a li"),
    ]
    for make, message in bad:
        with pytest.raises(InputError, match=message):
            make()


def test_what_zenoh_refuses_is_one_line() -> None:
    pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    port = free_port()
    with Zenoh("a", listen=[f"tcp/127.0.0.1:{port}"]) as node:
        assert not node.wait_for_peer(0.0)
        for options in (
            {"listen": [f"tcp/127.0.0.1:{port}"]},  # taken
            {"listen": ["nonsense"]},
            {"settings": {"no/such/setting": 1}},
        ):
            with pytest.raises(InputError, match=r"^zenoh: .+") as caught:
                Zenoh("b", **options)
            assert "\n" not in str(caught.value)


def test_multicast_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the settings of a user win over ours."""
    zenoh = pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    seen: list[Any] = []
    opened = zenoh.open
    monkeypatch.setattr(zenoh, "open", lambda config: seen.append(config) or opened(config))
    key = "scouting/multicast/enabled"
    for options in ({}, {"multicast": True}, {"settings": {key: True}}):
        Zenoh("a", **options).close()
    assert [config.get_json(key) for config in seen] == ["false", "true", "true"]
    assert seen[0].get_json("listen/endpoints") == '["tcp/127.0.0.1:0"]'


def test_without_zenoh_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str, extra: str) -> Any:
        raise MissingExtraError(f"{module} is not installed: pip install 'scoredraw[{extra}]'")

    monkeypatch.setattr(swarm_transports, "import_extra", absent)
    with pytest.raises(MissingExtraError, match=r"scoredraw\[swarm\]"):
        Zenoh("a")


# ── real processes ──────────────────────────────────────────────────────────────────────────────

WORKER = """
import json, pickle, resource, socket, sys, threading
from contextlib import suppress
from pathlib import Path
from scoredraw.rl.rollout_groups import RolloutGroup, encode_groups
from scoredraw.rl.swarm_transports import Directory, Zenoh

name, kind, place, mark = sys.argv[1:]
if kind == "zenoh":
    ends = {"listen": [place]} if name == "a" else {"connect": [place]}
    transport = Zenoh(name, max_held=8_000_000, **ends)
else:
    transport = Directory(place, name, ttl=2.0, max_held=8_000_000)
stop, VOLLEYS = threading.Event(), 10
def listen():
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()

def say(**line):
    print(json.dumps(line), flush=True)

class Touch:
    def __reduce__(self):
        return Path.touch, (Path(mark),)

def honest():
    import numpy as np
    from scoredraw.papers import p30_sapo as tables
    from scoredraw.rl.swarm_buffer import SwarmBuffer
    from scoredraw.rl.swarm_training import SAPORunner

    listen()
    known = {f"skill {k}" for k in range(tables.SKILLS)}
    texts = {str(k) for k in range(tables.ANSWERS)}
    def true(group):
        return group.prompt in known and group.answer == "0" and texts.issuperset(group.completions)
    rng = np.random.default_rng(ord(name))
    node = tables.TabularNode(tables.knowledge([(ord(name) - ord("a"),)])[0], rng)
    buffer = SwarmBuffer(transport, name, ttl=2.0, max_groups=500, verify_answer=true)
    runner = SAPORunner(node.step, node.generate, tables.exact_match, buffer, 3, 3, rng=rng)
    external = 0
    while not stop.is_set():
        external += sum(record.external for record in runner.run(20))
        p = np.exp(node.logits - np.logaddexp.reduce(node.logits, axis=1, keepdims=True))[:, 0]
        say(rounds=runner.rounds, external=external, p=p.tolist(), held=len(buffer),
            counts=buffer.counts, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

def hostile():
    sys.stdin.readline()
    texts = lambda k: [str(k % 30), "0"]
    for volley in range(VOLLEYS):
        shots = [pickle.dumps(Touch()), b"[" * 900_000, b"\\xff" * 1000, b" " * 1_000_001,
                 b"x" * 5_000_000, b'{"scoredraw":1,"groups":[{"prompt":NaN}]}',
                 b'{"scoredraw":1,"groups":[' + b",".join([b"[[]]"] * 100_000) + b"]}"]
        shots.append(b'{"scoredraw":1,"groups":[' + b",".join([b"{}"] * 4000) + b"]}")
        lies = [RolloutGroup("skill 1", texts(k), "1", peer="h", created=k) for k in range(100)]
        odd = [RolloutGroup("__import__('os')", texts(k), "0", peer="h", created=volley)
               for k in range(30)]
        own = [RolloutGroup("skill 1", texts(k), "0", peer=p, created=9e9)
               for k, p in enumerate("abc")]
        for shot in [*shots, *encode_groups(lies), *encode_groups(odd), *encode_groups(own)]:
            transport.send(shot)
        if kind == "zenoh":
            address = place.removeprefix("tcp/").split(":")
            with suppress(OSError), socket.create_connection(address) as raw:
                raw.sendall(b"\\x00\\xff" * 5000)
    say(done=True)
    sys.stdin.readline()

hostile() if name == "h" else honest()
transport.close()
"""


class Processes:
    """Workers whose lines are read as they come, before one deadline for all."""

    def __init__(self, kind: str, place: str, mark: Path) -> None:
        self.deadline = time.monotonic() + 90
        self.last: dict[str, dict[str, Any]] = {}
        self.first_peak: dict[str, int] = {}
        self.select = selectors.DefaultSelector()
        self.workers = {
            name: subprocess.Popen(
                [sys.executable, "-c", WORKER, name, kind, place, str(mark)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for name in "abch"
        }  # fmt: skip
        for name, worker in self.workers.items():
            assert worker.stdout is not None
            self.select.register(worker.stdout, selectors.EVENT_READ, (name, worker.stdout))

    def tell(self, name: str, line: str) -> None:
        to = self.workers[name].stdin
        assert to is not None
        to.write(f"{line}\n".encode())
        to.flush()

    def until(self, condition: Callable[[], bool]) -> None:
        """Read lines until it holds; an error that says what was last heard, if it never does."""
        while not condition():
            left = self.deadline - time.monotonic()
            assert left > 0, self.last
            for key, _ in self.select.select(left):
                name, lines = key.data
                line = lines.readline()
                if not line:
                    self.select.unregister(key.fileobj)
                    continue
                self.last[name] = json.loads(line)
                self.first_peak.setdefault(name, self.last[name].get("peak", 0))

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.communicate()
        self.select.close()


@pytest.mark.parametrize("kind", ["zenoh", "directory"])
def test_four_processes_one_killed_and_one_hostile(kind: str, tmp_path: Path) -> None:
    """The one that is killed is the one that the others were told of; they go on learning."""
    place = str(tmp_path / "swarm")
    if kind == "zenoh":
        pytest.importorskip("zenoh", reason="the swarm extra is not installed")
        place = f"tcp/127.0.0.1:{free_port()}"
    swarm = Processes(kind, place, tmp_path / "mark")
    last = swarm.last
    try:
        swarm.until(lambda: all(last.get(n, {}).get("external", 0) > 20 for n in "abc"))
        swarm.tell("h", "begin")
        swarm.until(lambda: all(last[n]["counts"].get("not_json", 0) > 0 for n in "abc"))
        swarm.workers["a"].send_signal(signal.SIGKILL)
        assert swarm.workers["a"].wait(20) == -signal.SIGKILL
        swarm.until(lambda: "done" in last.get("h", {}))
        then = {n: last[n] for n in "bc"}
        swarm.until(lambda: all(last[n]["rounds"] > then[n]["rounds"] + 100 for n in "bc"))
        heard = {n: then[n]["counts"]["accepted"] for n in "bc"}  # the hostile one is done
        swarm.until(lambda: all(last[n]["counts"]["accepted"] > heard[n] + 100 for n in "bc"))
        swarm.until(lambda: last["b"]["p"][2] > 0.8 and last["c"]["p"][1] > 0.8)
        for name in "bch":
            swarm.tell(name, "stop")
        assert [swarm.workers[n].communicate(timeout=20) and swarm.workers[n].returncode
                for n in "bch"] == [0, 0, 0]  # fmt: skip
    finally:
        swarm.close()
    assert not (tmp_path / "mark").exists(), "a pickle was executed"
    for name in "bc":
        counts = last[name]["counts"]
        for reason in ("not_json", "not_groups", "oversized", "own", "unverified"):
            assert counts.get(reason, 0) > 0, (reason, counts)
        assert last[name]["held"] <= 500
        assert last[name]["peak"] - swarm.first_peak[name] < 60_000  # kB; 70 MB were sent
