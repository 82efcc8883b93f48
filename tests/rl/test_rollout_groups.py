"""Groups on the wire: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.rollout_groups import (
    FIELDS,
    HEAD,
    TAIL,
    Limits,
    RejectedGroupError,
    RolloutGroup,
    decode_groups,
    encode_groups,
)

pytestmark = pytest.mark.property

GOOD: dict[str, Any] = {"prompt": "1+1=", "completions": ["2", "3"], "peer": "a", "answer": "2"}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
values = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | texts | st.floats(-1e9, 1e9)


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    K = draw(st.integers(2, 5))
    told = st.lists(st.floats(-50, 0), min_size=K, max_size=K)
    return RolloutGroup(
        prompt=draw(texts.filter(bool)),
        completions=tuple(draw(st.lists(texts, min_size=K, max_size=K))),
        answer=draw(texts),
        meta=draw(st.dictionaries(texts, values, max_size=4)),
        verifier=draw(st.just("") | names),
        logprobs=draw(st.none() | told),
        peer=draw(names),
        created=draw(st.floats(0, 2e9)),
    )


def payload(*entries: Any, **outer: Any) -> bytes:
    return json.dumps({"scoredraw": 1, "groups": list(entries), **outer}).encode()


@given(st.lists(groups(), max_size=12))
def test_what_goes_in_comes_out(given_groups: list[RolloutGroup]) -> None:
    """In their order, over payloads that keep the cap; also meta and log-probabilities."""
    limits = Limits(payload=2048)
    payloads = encode_groups(given_groups, limits)
    assert all(len(p) <= limits.payload for p in payloads)
    found = [decode_groups(p, limits) for p in payloads]
    back = [group for one in found for group in one.groups]
    assert back == given_groups
    for one, two in zip(back, given_groups, strict=True):
        assert (one.meta, one.logprobs) == (two.meta, two.logprobs)
    assert not sum((one.rejected for one in found), Counter())


def test_payloads_are_as_few_as_can_be() -> None:
    """Every payload and the first group of the next one together exceed the cap."""
    many = [RolloutGroup(f"question {i}", ["x" * i, "y"], peer="a") for i in range(60)]
    limits = Limits(payload=1024)
    payloads = encode_groups(many, limits)
    assert 1 < len(payloads) < len(many)
    for before, after in pairwise(payloads):
        alone = encode_groups(decode_groups(after).groups[:1])[0]
        assert len(before) + 1 + len(alone) - len(HEAD) - len(TAIL) > limits.payload
    assert len(encode_groups(many, Limits(groups=25))) == 3


jsons = st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(texts, inner))


@given(st.binary(max_size=200) | jsons.map(lambda v: json.dumps(v).encode()))
def test_no_bytes_raise(anything: bytes) -> None:
    assert decode_groups(anything).groups == []


@given(st.dictionaries(st.sampled_from([*FIELDS, "more"]), jsons, max_size=9))
def test_no_fields_raise_and_what_passes_is_a_group(entry: dict[str, Any]) -> None:
    found = decode_groups(payload({**GOOD, **entry}, GOOD))
    assert len(found.groups) + found.rejected.total() == 2
    for group in found.groups:
        assert len(group.completions) >= 2
        assert all(type(t) is str for t in (group.prompt, group.answer, *group.completions))


BAD_ENTRIES: list[tuple[Any, str]] = [
    ({"completions": ["one"]}, "completions"),
    ({"completions": []}, "completions"),
    ({"completions": "two texts"}, "completions"),
    ({"completions": {"a": 1, "b": 2}}, "completions"),
    ({"completions": ["a", 1]}, "completions"),
    ({"completions": ["a", None]}, "completions"),
    ({"completions": ["a", ["b"]]}, "completions"),
    ({"completions": ["a"] * 257}, "completions"),
    ({"completions": ["a", "b" * 32_769]}, "completion_length"),
    ({"completions": ["a", "\ud800"]}, "text"),
    ({"answer": "\udfff"}, "text"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a chat"]}, "prompt"),
    ({"prompt": "q" * 65_537}, "prompt"),
    ({"answer": 2}, "answer"),
    ({"answer": "2" * 65_537}, "answer"),
    ({"peer": ""}, "peer"),
    ({"peer": "../../etc"}, "peer"),
    ({"peer": "a/**"}, "peer"),
    ({"peer": "a" * 65}, "peer"),
    ({"peer": None}, "peer"),
    ({"verifier": "os.system()"}, "verifier"),
    ({"created": "now"}, "created"),
    ({"created": True}, "created"),
    ({"created": 10**400}, "created"),
    ({"meta": [1]}, "meta"),
    ({"meta": {"nested": {}}}, "meta"),
    ({"meta": {"a": 2**63}}, "meta"),
    ({"meta": {"a": "b" * 1025}}, "meta"),
    ({"meta": {"a" * 1025: 1}}, "meta"),
    ({"meta": {"a": "\ud800"}}, "meta"),
    ({"meta": {str(i): i for i in range(33)}}, "meta"),
    ({"logprobs": [-1.0]}, "logprobs"),
    ({"logprobs": [-1.0, 0.5]}, "logprobs"),
    ({"logprobs": "ab"}, "logprobs"),
    ({"__class__": "os"}, "not_groups"),
]


@pytest.mark.parametrize(("entry", "reason"), BAD_ENTRIES)
def test_a_bad_group_is_counted_and_the_others_stay(entry: dict[str, Any], reason: str) -> None:
    found = decode_groups(payload({**GOOD, **entry}, GOOD))
    assert found.rejected == {reason: 1}
    assert [group.prompt for group in found.groups] == ["1+1="]


BAD_PAYLOADS: list[tuple[bytes, str]] = [
    (b"", "not_json"),
    (b"\xff\xfe", "not_json"),
    (payload(GOOD)[:-1], "not_json"),
    (b"[" * 900_000, "not_json"),
    (b'{"a":' * 100_000, "not_json"),
    (payload({**GOOD, "created": float("nan")}), "not_json"),
    (payload({**GOOD, "created": float("inf")}), "not_json"),
    (b'{"scoredraw":1,"groups":[' + b"9" * 5000 + b"]}", "not_json"),
    (payload(GOOD, scoredraw=2), "version"),
    (b"[]", "version"),
    (b"null", "version"),
    (payload(groups={"0": GOOD}), "not_groups"),
    (payload(["a list"]), "not_groups"),
    (payload({"prompt": "q"}), "not_groups"),
    (payload(*[[]] * 4097), "not_groups"),
    (b" " * 1_000_001, "oversized"),
]


@pytest.mark.parametrize(("raw", "reason"), BAD_PAYLOADS)
def test_a_bad_payload_is_counted(raw: bytes, reason: str) -> None:
    found = decode_groups(raw)
    assert found.groups == []
    assert found.rejected == {reason: 1}


class Touch:
    """Its pickle makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    raw = pickle.dumps(Touch(mark))
    for hostile in (raw, payload({**GOOD, "answer": raw.decode("latin1")}), raw + payload(GOOD)):
        decode_groups(hostile)
    assert not mark.exists()
    pickle.loads(raw)
    assert mark.exists(), "the pickle would have done nothing"


def test_numbers_that_overflow_are_refused() -> None:
    raw = payload(GOOD).replace(b'"peer": "a"', b'"peer": "a", "created": 1e999')
    assert decode_groups(raw).rejected == {"created": 1}


@pytest.mark.parametrize(("entry", "reason"), BAD_ENTRIES)
def test_ones_own_groups_are_checked_too(entry: dict[str, Any], reason: str) -> None:
    if reason == "not_groups" or entry == {"peer": ""}:
        return  # not yet published; and unknown fields are Python's to refuse
    with pytest.raises(RejectedGroupError, match=f"{reason}: got") as caught:
        encode_groups([RolloutGroup(**{**GOOD, **entry})])
    assert caught.value.reason == reason
    assert isinstance(caught.value, InputError)
    assert len(str(caught.value)) < 300


def test_a_group_that_fills_more_than_a_payload() -> None:
    large = RolloutGroup("q", ["x" * 900, "y" * 900], peer="a")
    with pytest.raises(RejectedGroupError, match="oversized"):
        encode_groups([large], Limits(payload=1024))
    counted: Counter[str] = Counter()
    small = RolloutGroup("q", ["x", "y"], peer="a")
    assert len(encode_groups([large, small], Limits(payload=1024), counted)) == 1
    assert counted == {"oversized": 1}


@pytest.mark.parametrize(
    "bad", [{"payload": 10}, {"completions": 1}, {"completion": 0}, {"prompt": 1.5}]
)
def test_bad_limits(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"limits.{next(iter(bad))}: got"):
        Limits(**bad)
