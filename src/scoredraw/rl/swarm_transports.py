"""How payloads travel between the nodes of a swarm: memory, a folder, or Zenoh.

A transport sends bytes to whoever listens and hands over what has arrived since it was last asked.
It never waits for anybody: late and dead peers are not noticed. What it holds is bounded in bytes,
whatever strangers send; the oldest goes first, and `dropped` counts what went and why.

    InMemory    nodes of one process
    Directory   nodes that share a folder: whole files by atomic renames, gone after a time
    Zenoh       publish and subscribe over TCP between processes and machines
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from scoredraw.errors import InputError, import_extra, require
from scoredraw.journal import atomic_path
from scoredraw.rl.rollout_groups import LIMITS, check_name

HELD_BYTES = 64_000_000
MESSAGE_OVERHEAD = 128  # bytes that Python needs besides the payload's
SUFFIX = ".groups.json"


@runtime_checkable
class Transport(Protocol):
    """Sends bytes to the other nodes and collects theirs."""

    dropped: Counter[str]

    def send(self, payload: bytes) -> None:
        """Hand a payload to all who listen; OSError where that cannot be done."""

    def receive(self) -> list[bytes]:
        """What others sent since the last call, without waiting."""

    def close(self) -> None:
        """Stop listening; a second time does nothing."""


class Inbox:
    """A queue for one reader and many writers, bounded in bytes; what is too much drops the oldest.

    >>> inbox = Inbox(max_payload=4, max_held=300)
    >>> for payload in (b"one", b"two", b"three", b"four"):
    ...     inbox.put(payload)
    >>> inbox.take(), inbox.dropped
    ([b'two', b'four'], Counter({'oversized': 1, 'overflow': 1}))
    """

    def __init__(self, max_payload: int = LIMITS.payload, max_held: int = HELD_BYTES) -> None:
        require(max_payload >= 1, "max_payload", max_payload, "a positive count of bytes")
        fits = max_held >= max_payload + MESSAGE_OVERHEAD
        require(fits, "max_held", max_held, f"room for one payload of {max_payload} bytes")
        self.max_payload, self.max_held = max_payload, max_held
        self.dropped: Counter[str] = Counter()
        self._queue: deque[bytes] = deque()
        self._held = 0
        self._lock = threading.Condition()

    def refuse(self, size: int) -> bool:
        """Whether a payload of this size is too large, which is counted."""
        if size <= self.max_payload:
            return False
        with self._lock:
            self.dropped["oversized"] += 1
        return True

    def put(self, payload: bytes) -> None:
        if self.refuse(len(payload)):
            return
        cost = len(payload) + MESSAGE_OVERHEAD
        with self._lock:
            while self._held + cost > self.max_held:
                self._held -= len(self._queue.popleft()) + MESSAGE_OVERHEAD
                self.dropped["overflow"] += 1
            self._queue.append(payload)
            self._held += cost
            self._lock.notify_all()

    def take(self) -> list[bytes]:
        with self._lock:
            taken, self._queue, self._held = self._queue, deque(), 0
        return list(taken)

    def wait(self, timeout: float) -> bool:
        """Wait for something to take, at most so many seconds; whether there is."""
        with self._lock:
            return self._lock.wait_for(lambda: bool(self._queue), timeout)


class _Closing(ABC):
    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


# ── one process ─────────────────────────────────────────────────────────────────────────────────


class MemoryHub:
    """Joins the `InMemory` transports of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inboxes: list[Inbox] = []


class InMemory(_Closing):
    """Nodes of one process, in any of its threads.

    >>> hub = MemoryHub()
    >>> a, b = InMemory(hub), InMemory(hub)
    >>> a.send(b"hello"); b.receive(), a.receive()
    ([b'hello'], [])
    """

    def __init__(
        self, hub: MemoryHub, *, max_payload: int = LIMITS.payload, max_held: int = HELD_BYTES
    ) -> None:
        self._hub, self._inbox = hub, Inbox(max_payload, max_held)
        self.dropped = self._inbox.dropped
        with hub.lock:
            hub.inboxes.append(self._inbox)

    def send(self, payload: bytes) -> None:
        with self._hub.lock:
            if self._inbox not in self._hub.inboxes:
                raise OSError("the transport is closed")
            others = [inbox for inbox in self._hub.inboxes if inbox is not self._inbox]
        for inbox in others:
            inbox.put(payload)

    def receive(self) -> list[bytes]:
        return self._inbox.take()

    def wait(self, timeout: float) -> bool:
        """Wait until something has arrived, at most so many seconds; whether it has."""
        return self._inbox.wait(timeout)

    def close(self) -> None:
        with self._hub.lock, suppress(ValueError):
            self._hub.inboxes.remove(self._inbox)


# ── a shared folder ─────────────────────────────────────────────────────────────────────────────


class Directory(_Closing):
    """Nodes that share a folder: a payload is a file that appears whole, by a rename.

    folder: made if absent; peer: this node's name. ttl: seconds after which whoever comes by
    removes a file, on the clock of the file system, so that machines' clocks need not agree.
    max_files: entries of the folder that one look takes in. Only plain files with our ending are
    read: links are not followed, pipes not opened for waiting. Raises InputError for a bad name, a
    ttl that is not positive and a folder that cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        peer: str,
        *,
        ttl: float = 600.0,
        max_payload: int = LIMITS.payload,
        max_held: int = HELD_BYTES,
        max_files: int = 10_000,
    ) -> None:
        check_name(peer, "peer")
        require(ttl > 0, "ttl", ttl, "seconds, more than 0")
        require(max_files >= 1, "max_files", max_files, "at least 1")
        require(max_held >= max_payload >= 1, "max_held", max_held, f"at least {max_payload}")
        self.folder, self.ttl, self.max_files = Path(folder), ttl, max_files
        self.max_payload, self.max_held = max_payload, max_held
        self.dropped: Counter[str] = Counter()
        self._mine = f"{peer}.{secrets.token_hex(4)}."
        self._clock = self.folder / f".{self._mine}clock"
        self._sent, self._next_sweep = 0, 0.0
        self._closed = False
        self._seen: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._now()
        except OSError as error:
            raise InputError(f"folder: cannot use {folder}: {error.strerror or error}") from None

    def send(self, payload: bytes) -> None:
        if self._closed:
            raise OSError("the transport is closed")
        name = f"{self._mine}{self._sent}{SUFFIX}"
        self._sent += 1
        self._seen.add(name)
        try:
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(payload)
        except InputError as error:
            raise OSError(str(error)) from error

    def receive(self) -> list[bytes]:
        found: list[bytes] = []
        if self._closed:
            return found
        try:
            now = self._now()
            with os.scandir(self.folder) as entries:
                listed = [e for e in islice(entries, self.max_files) if e.name.endswith(SUFFIX)]
        except OSError:
            self.dropped["unreadable"] += 1
            return found
        self._seen &= {entry.name for entry in listed}
        held = 0
        sweep = now >= self._next_sweep
        if sweep:
            self._next_sweep = now + self.ttl / 4
        for entry in listed:
            known = entry.name in self._seen
            if (known and not sweep) or self._expired(entry, now) or known:
                continue
            if entry.name.startswith("."):  # not whole yet
                continue
            if held + self.max_payload > self.max_held:
                break  # the rest at the next call
            self._seen.add(entry.name)
            payload = self._read(entry.path)
            if payload is not None:
                found.append(payload)
                held += len(payload)
        return found

    def close(self) -> None:
        """Stop; what was sent stays until its time is over."""
        self._closed = True
        with suppress(OSError):
            self._clock.unlink()

    def _now(self) -> float:
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _expired(self, entry: os.DirEntry[str], now: float) -> bool:
        try:
            if abs(now - entry.stat(follow_symlinks=False).st_mtime) <= self.ttl:
                return False
            os.unlink(entry.path)
        except OSError:
            pass  # somebody else was first, or it is not ours to remove
        return True

    def _read(self, path: str) -> bytes | None:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            handle = os.open(path, flags)
            try:
                plain = stat.S_ISREG(os.fstat(handle).st_mode)
                with open(handle, "rb", closefd=False) as file:
                    payload = file.read(self.max_payload + 1) if plain else None
            finally:
                os.close(handle)
        except OSError:
            payload = None
        if payload is None or len(payload) > self.max_payload:
            self.dropped["unreadable" if payload is None else "oversized"] += 1
            return None
        return payload


# ── Zenoh ───────────────────────────────────────────────────────────────────────────────────────


class Zenoh(_Closing):
    """Publish and subscribe between processes and machines, without a server.

    peer: this node's name; swarm: nodes with the same name hear one another. listen, connect:
    endpoints such as "tcp/127.0.0.1:7447" (port 0: any free one); one known peer is enough, the
    others are learned from it. multicast: look for peers on the local network, off unless asked
    for. block: wait for slow peers instead of losing what they can't take in time. settings: more
    of Zenoh's configuration, {"transport/link/tls/...": value}; certificates and access control
    are there, without which any process that reaches an endpoint can take part, under any name.

    Messages above max_payload are dropped as they come in, before they are assembled. Raises
    InputError for a bad name, endpoint or setting, MissingExtraError without eclipse-zenoh.
    """

    def __init__(
        self,
        peer: str,
        *,
        swarm: str = "swarm",
        listen: Sequence[str] = ("tcp/127.0.0.1:0",),
        connect: Sequence[str] = (),
        multicast: bool = False,
        block: bool = False,
        max_payload: int = LIMITS.payload,
        max_held: int = HELD_BYTES,
        settings: dict[str, Any] | None = None,
    ) -> None:
        check_name(peer, "peer")
        check_name(swarm, "swarm")
        for name, ends in (("listen", listen), ("connect", connect)):
            fine = not isinstance(ends, str) and all(isinstance(e, str) for e in ends)
            require(fine, name, repr(ends), 'a list of endpoints, ["tcp/127.0.0.1:7447"]')
        self._inbox = Inbox(max_payload, max_held)
        self.dropped = self._inbox.dropped
        zenoh = import_extra("zenoh", "swarm")
        self._failure: type[Exception] = zenoh.ZError
        self._heard = threading.Event()
        wanted = {
            "mode": "peer",
            "listen/endpoints": list(listen),
            "connect/endpoints": list(connect),
            "scouting/multicast/enabled": multicast,
            "transport/link/rx/max_message_size": max_payload + 65_536,  # its own headers
            "transport/shared_memory/enabled": False,  # there that limit does not hold
            **(settings or {}),
        }
        congestion = zenoh.CongestionControl.BLOCK if block else zenoh.CongestionControl.DROP
        self._session: Any = None
        try:
            config = zenoh.Config()
            for key, value in wanted.items():
                config.insert_json5(key, json.dumps(value))
            self._session = zenoh.open(config)
            direct = zenoh.handlers.Callback(self._take, indirect=False)
            remote = zenoh.Locality.REMOTE
            self._session.declare_subscriber(f"scoredraw/{swarm}/*", direct, allowed_origin=remote)
            self._publisher = self._session.declare_publisher(
                f"scoredraw/{swarm}/{peer}", congestion_control=congestion,
                allowed_destination=remote,
            )  # fmt: skip
            self._publisher.declare_matching_listener(
                zenoh.handlers.Callback(self._match, indirect=False)
            )
            if self._publisher.matching_status.matching:
                self._heard.set()
        except self._failure as error:
            if self._session is not None:
                self._session.close()
            line = str(error).split(" at /")[0].splitlines()[0]
            raise InputError(f"zenoh: {line}") from None

    def send(self, payload: bytes) -> None:
        try:
            self._publisher.put(payload)
        except self._failure as error:
            raise OSError(str(error)) from error

    def receive(self) -> list[bytes]:
        return self._inbox.take()

    def wait(self, timeout: float) -> bool:
        """Wait until something has arrived, at most so many seconds; whether it has."""
        return self._inbox.wait(timeout)

    def wait_for_peer(self, timeout: float) -> bool:
        """Wait until somebody listens, at most so many seconds; whether somebody does."""
        return self._heard.wait(timeout)

    def close(self) -> None:
        self._session.close()

    def _take(self, sample: Any) -> None:
        if not self._inbox.refuse(len(sample.payload)):
            self._inbox.put(sample.payload.to_bytes())

    def _match(self, status: Any) -> None:
        if status.matching:
            self._heard.set()
        else:
            self._heard.clear()
