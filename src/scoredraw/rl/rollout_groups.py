"""Rollout groups on the wire: what one node of a swarm tells the others, as checked JSON.

A group is a question, K decoded answers to it, what is needed to score them again, and who sent
it. No weights, gradients or token ids are in it, so that models and tokenizers may differ. A
payload is UTF-8 JSON, {"scoredraw": 1, "groups": [...]}.

Payloads come from strangers. Nothing in them is executed or imported: JSON yields text and numbers
only, every field is checked against the schema, and what does not fit is counted by its reason and
left out. That a sender is who it says, nothing here shows; that is the transport's to ensure.

(The released code calls the swarm through `all_gather_object`, and its rendezvous unpickles what
strangers send; pickles execute code, and are never read here.)
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from scoredraw.errors import InputError, require

VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
META_ENTRIES, META_LENGTH = 32, 1024
SCALARS = {str, int, float, bool, type(None)}
HEAD, TAIL = b'{"scoredraw":%d,"groups":[' % VERSION, b"]}"

Scalar = str | int | float | bool | None


class RejectedGroupError(InputError):
    """A group breaks the schema or a limit; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _check(ok: bool, reason: str, came: Any, wanted: str) -> None:
    if not ok:
        raise RejectedGroupError(reason, f"{reason}: got {came}, want {wanted}")


@dataclass(frozen=True)
class Limits:
    """What a payload and a group may hold: bytes and groups; answers and characters of a text."""

    payload: int = 1_000_000
    groups: int = 4096
    completions: int = 256
    completion: int = 32_768
    prompt: int = 65_536

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least = 1024 if one.name == "payload" else 2 if one.name == "completions" else 1
            fits = isinstance(value, int) and value >= least
            require(fits, f"limits.{one.name}", value, f"a whole number of at least {least}")

    def check(self, group: RolloutGroup) -> None:
        """RejectedGroupError for a group that is too large."""
        K = len(group.completions)
        _check(self.completions >= K, "completions", K, f"at most {self.completions}")
        longest = max(map(len, group.completions))
        _check(longest <= self.completion, "completion_length", longest, f"{self.completion}")
        for name, text in (("prompt", group.prompt), ("answer", group.answer)):
            _check(len(text) <= self.prompt, name, len(text), f"at most {self.prompt} characters")


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A question with K decoded answers, and what scores them.

    prompt: text, not empty; completions: K >= 2 texts; answer: the ground truth; meta: at most 32
    named texts and numbers; verifier: which reward the sender means, a short name or "";
    logprobs: K log-probabilities of the whole answers under the sender, if it tells; peer: who sent
    it; created: seconds on the sender's clock, which together with peer tells repetitions apart and
    decides nothing else. Raises RejectedGroupError, an InputError. meta is not compared.

    >>> group = RolloutGroup("1+1=", ["2", "3"], answer="2")
    >>> group.completions
    ('2', '3')
    """

    prompt: str
    completions: Sequence[str]  # kept as a tuple
    answer: str = ""
    meta: Mapping[str, Scalar] = field(default_factory=dict, compare=False)
    verifier: str = ""
    logprobs: Sequence[float] | None = field(default=None, compare=False)
    peer: str = ""
    created: float = 0.0

    def __post_init__(self) -> None:
        texts = self.completions
        listed = isinstance(texts, (list, tuple))
        _check(listed, "completions", type(texts).__name__, "a list of texts")
        K = len(texts)
        _check(K >= 2, "completions", K, "two or more: one has nothing to be compared with")
        _check(set(map(type, texts)) == {str}, "completions", "other than texts", "texts")
        for name in ("prompt", "answer", "verifier", "peer"):
            value = getattr(self, name)
            _check(type(value) is str, name, type(value).__name__, "text")
        _check(self.prompt != "", "prompt", "an empty text", "a question")
        for name in ("verifier", "peer"):
            if value := getattr(self, name):
                check_name(value, name)
        _check(_is_number(self.created), "created", type(self.created).__name__, "seconds")
        object.__setattr__(self, "completions", tuple(texts))
        if self.meta or type(self.meta) is not dict:
            _check_meta(self.meta)
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", _log_probabilities(self.logprobs, K))
        whole = "\n".join((self.prompt, self.answer, *texts))
        _check(_has_bytes(whole), "text", "half of a surrogate pair", "text that has UTF-8")

    def size(self) -> int:
        """Characters of text."""
        size = len(self.prompt) + len(self.answer) + sum(map(len, self.completions))
        return size + len(str(self.meta))


def check_name(value: str, argument: str) -> None:
    """RejectedGroupError unless a short name: letters, digits, '_', '.', '-', 64 at most."""
    _check(
        NAME.fullmatch(value) is not None,
        argument,
        repr(value[:80]),
        "a name of letters, digits, '_', '.' and '-'",
    )


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and type(value) is not bool
    try:
        return plain and math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def _has_bytes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_meta(meta: Any) -> None:
    _check(isinstance(meta, Mapping), "meta", type(meta).__name__, "names and values")
    _check(len(meta) <= META_ENTRIES, "meta", f"{len(meta)} entries", f"at most {META_ENTRIES}")
    _check(set(map(type, meta)) <= {str}, "meta", "other names than texts", "texts")
    kinds = set(map(type, meta.values()))
    _check(kinds <= SCALARS, "meta", "other values", "texts, numbers, true, false or none")
    texts = [*meta, *(value for value in meta.values() if type(value) is str)]
    fine = max(map(len, texts), default=0) <= META_LENGTH
    fine = fine and all(abs(v) < 2**63 for v in meta.values() if isinstance(v, (int, float)))
    _check(fine, "meta", "a large value", f"{META_LENGTH} characters, 63 bits")
    _check(_has_bytes("\n".join(texts)), "meta", "half of a surrogate pair", "text")


def _log_probabilities(values: Any, K: int) -> tuple[float, ...]:
    listed = isinstance(values, (list, tuple)) and len(values) == K
    _check(listed, "logprobs", type(values).__name__, f"{K}, one a completion")
    fine = all(_is_number(v) and v <= 0 for v in values)
    _check(fine, "logprobs", "others than finite numbers up to 0", "log-probabilities")
    return tuple(map(float, values))


# ── the wire ────────────────────────────────────────────────────────────────────────────────────

FIELDS = tuple(f.name for f in fields(RolloutGroup))
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Decoded(NamedTuple):
    """The groups of a payload that are as they should be, and how many were not, by reason."""

    groups: list[RolloutGroup]
    rejected: Counter[str]


def encode_groups(
    groups: Sequence[RolloutGroup],
    limits: Limits = LIMITS,
    rejected: Counter[str] | None = None,
    stamps: Sequence[tuple[str, float]] | None = None,
) -> list[bytes]:
    """As few payloads of at most `limits.payload` bytes as hold the groups in their order.

    A group that exceeds a limit raises RejectedGroupError, or is counted in `rejected`. stamps:
    peer and created of each group, instead of its own. O(bytes).

    >>> encode_groups([RolloutGroup("1+1=", ["2", "3"], peer="a")])[0][:28]
    b'{"scoredraw":1,"groups":[{"p'
    """
    payloads: list[bytes] = []
    part: list[bytes] = []
    free = room = limits.payload - len(HEAD) - len(TAIL)
    for k, group in enumerate(groups):
        peer, created = (group.peer, group.created) if stamps is None else stamps[k]
        try:
            one = _encoded(group, peer, created, limits, room)
        except RejectedGroupError as problem:
            if rejected is None:
                raise
            rejected[problem.reason] += 1
            continue
        if part and (len(one) + 1 > free or len(part) == limits.groups):
            payloads.append(HEAD + b",".join(part) + TAIL)
            part, free = [], room
        part.append(one)
        free -= len(one) + 1
    if part:
        payloads.append(HEAD + b",".join(part) + TAIL)
    return payloads


def _encoded(group: RolloutGroup, peer: str, created: float, limits: Limits, room: int) -> bytes:
    limits.check(group)
    told = {
        "prompt": group.prompt, "completions": group.completions, "answer": group.answer,
        "peer": peer, "created": created,
    }  # fmt: skip
    if group.meta:
        told["meta"] = dict(group.meta)
    if group.verifier:
        told["verifier"] = group.verifier
    if group.logprobs:
        told["logprobs"] = group.logprobs
    one = _encoder.encode(told).encode()
    _check(len(one) <= room, "oversized", f"{len(one)} bytes", f"at most {room} a group")
    return one


def decode_groups(payload: bytes, limits: Limits = LIMITS) -> Decoded:
    """The good groups of a payload, whatever it holds; raises nothing.

    Reasons: "oversized", "not_json" (bytes that are no UTF-8, NaN, nesting without end), "version",
    "not_groups", and the name of the field that broke the schema. O(bytes).

    >>> decode_groups(b'{"scoredraw":1,"groups":[{"prompt":"q","completions":["one"]}]}').rejected
    Counter({'completions': 1})
    """
    rejected: Counter[str] = Counter()
    if len(payload) > limits.payload:
        return Decoded([], Counter(oversized=1))
    try:
        data = json.loads(payload.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return Decoded([], Counter(not_json=1))
    if type(data) is not dict or data.get("scoredraw") != VERSION:
        return Decoded([], Counter(version=1))
    entries = data.get("groups")
    if type(entries) is not list or len(entries) > limits.groups:
        return Decoded([], Counter(not_groups=1))
    groups = []
    for entry in entries:
        try:
            groups.append(_group(entry, limits))
        except RejectedGroupError as problem:
            rejected[problem.reason] += 1
    return Decoded(groups, rejected)


def _group(entry: Any, limits: Limits) -> RolloutGroup:
    known = type(entry) is dict and entry.keys() <= _NAMES
    _check(known, "not_groups", "other fields", "those of a group")
    whole = "prompt" in entry and "completions" in entry
    _check(whole, "not_groups", "no prompt or no completions", "both")
    group = RolloutGroup(**entry)
    check_name(group.peer, "peer")  # nobody's groups are nobody's to count
    limits.check(group)
    return group


_NAMES = frozenset(FIELDS)


def _no_constant(name: str) -> None:
    raise ValueError(name)
