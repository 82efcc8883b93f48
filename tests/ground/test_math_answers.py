"""Answers as mathematics: what is the same, what is not, what can't be read."""

from __future__ import annotations

import time

import pytest

from scoredraw.answers import group_answers
from scoredraw.errors import InputError
from scoredraw.math_answers import LONGEST, SECONDS, equality, math_equal

pytestmark = pytest.mark.oracle

pytest.importorskip("math_verify", reason="math-verify is not installed")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "0.5"), ("0.5", r"\frac{1}{2}"), ("1,200", 1200), ("1200.0", "1200"),
        ("$x+1$", "$1+x$"), ("7", " 7 "), (r"\boxed{12}", "12"), ("not a number", "not a number"),
    ],
)  # fmt: skip
def test_the_same(a: object, b: object) -> None:
    assert math_equal(a, b)
    assert math_equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [("7", "8"), ("1/2", "1/3"), ("no number", "7"), ("", "7"), ("no number", "no digits")],
)
def test_not_the_same(a: object, b: object) -> None:
    assert not math_equal(a, b)
    assert not math_equal(b, a)


def test_groups_of_answers() -> None:
    answers = ["0.5", None, "2", r"\frac{4}{2}", "1/2", "none"]
    assert group_answers(answers, equal=math_equal).tolist() == [0, -1, 1, 1, 0, 2]


def test_a_text_beyond_all_measure_is_only_equal_to_itself() -> None:
    long = "7" * (LONGEST + 1)
    assert math_equal(long, long)
    assert not math_equal(long, "7")


def test_names_of_equalities() -> None:
    assert equality("exact") is None
    assert equality("math") is math_equal
    with pytest.raises(InputError, match="equal: got 'same', want exact or math"):
        equality("same")


def test_what_would_take_for_ever_is_not_equal() -> None:
    begun = time.perf_counter()
    assert not math_equal("2", "9**9**9**9")
    assert time.perf_counter() - begun < 10 * SECONDS
    assert math_equal("1/2", "0.5")
