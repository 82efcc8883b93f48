"""Samples from tables: both shapes, ragged counts, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError
from scoredraw.samples import BUNDLED, read_samples

pytestmark = pytest.mark.contract

LONG: dict[str, list[Any]] = {
    "problem": ["a", "b", "a", "b", "a"],
    "correct": [True, False, False, True, False],
    "answer": ["1", None, "2", "3", "2"],
    "logprob": [-1.0, -2.0, -np.inf, 0.0, -0.5],
    "reward": [0.5, 1.0, -3.0, 2.0, 0.0],
    "tokens": [3, 4, 5, 6, 7],
}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_samples_of_a_problem_come_together_in_their_order() -> None:
    samples = read_samples(LONG)
    assert samples.problems == ("a", "b")
    assert samples.counts.tolist() == [3, 2]
    assert samples.right.tolist() == [1, 1]
    assert samples.answers is not None
    assert samples.answers.tolist() == ["1", "2", "2", None, "3"]
    assert samples.tokens is not None
    assert samples.tokens.tolist() == [3, 5, 7, 4, 6]
    assert samples.answers[samples.rows(1)].tolist() == [None, "3"]


def test_without_grades_texts_are_enough() -> None:
    table = {"problem": ["a", "b", "a", "a"], "text": ["x", "", "y", "x"]}
    samples = read_samples(table, graded=False)
    assert samples.correct is None
    assert samples.places is not None
    assert samples.places.tolist() == [0, 2, 3, 1]
    first, second = samples.pools()
    assert (first.codes.tolist(), second.codes.tolist()) == ([0, 1, 0], [-1])
    assert first.answers == ("x", "y")
    assert first.path_codes.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="correct: got no such column, want a grade"):
        _ = samples.right
    with pytest.raises(InputError, match="correct"):
        read_samples(table)
    with pytest.raises(InputError, match="input: got columns problem, want a column of answers"):
        read_samples({"problem": ["a"]}, graded=False)


def test_paths_say_which_samples_are_one_text() -> None:
    table = {"problem": ["a"] * 4, "correct": [0, 0, 1, 1], "answer": ["1", "1", "2", "2"]}
    pools = read_samples({**table, "path": ["p", "q", "p", "r"]}).pools()
    assert next(pools).path_codes.tolist() == [0, 1, 0, 2]
    with pytest.raises(InputError, match="path: got an empty cell"):
        read_samples({**table, "path": ["p", "q", "p", None]})
    assert next(read_samples(table).pools()).path_codes.tolist() == [0, 1, 2, 3]


def test_pools_of_problems_of_different_sizes() -> None:
    samples = read_samples(LONG)
    pools = list(samples.pools(key=lambda answer: "x"))
    assert [pool.codes.tolist() for pool in pools] == [[0, 0, 0], [-1, 0]]
    assert pools[0].rewards is not None
    assert pools[0].rewards.tolist() == [0.5, -3.0, 0.0]
    broken = {"problem": ["long"], "correct": [0], "answer": ["1"], "tokens": [1.5]}
    with pytest.raises(InputError, match=r"problem 'long': lengths: got 1\.5 at index 0"):
        list(read_samples(broken).pools())


def test_lists_and_rows_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"problem": p, "correct": c, "answer": a, "logprob": logprob}
        for p, c, a, logprob in zip(
            LONG["problem"], LONG["correct"], LONG["answer"], [-1, -2, -3, -4, -5], strict=True
        )
    ]
    listed = [
        {
            "problem": name,
            "correct": [r["correct"] for r in rows if r["problem"] == name],
            "answer": [r["answer"] for r in rows if r["problem"] == name],
            "logprob": [r["logprob"] for r in rows if r["problem"] == name],
        }
        for name in "ab"
    ]
    one = read_samples(lines(tmp_path / "rows.jsonl", rows))
    other = read_samples(lines(tmp_path / "lists.jsonl", listed))
    assert one.problems == other.problems
    for key in ("offsets", "correct", "answers", "logprobs"):
        assert getattr(one, key).tolist() == getattr(other, key).tolist()


def test_lists_need_no_problem_column(tmp_path: Path) -> None:
    samples = read_samples(lines(tmp_path / "x.jsonl", [{"correct": [1, 0]}, {"correct": [0]}]))
    assert samples.problems == ("0", "1")
    assert samples.right.tolist() == [1, 0]


def test_columns_may_have_other_names() -> None:
    table = {"task_id": [7, 7, 8], "passed": [1, 0, 1], "note": ["x", "y", "z"]}
    samples = read_samples(table, {"problem": "task_id", "correct": "passed"})
    assert samples.problems == ("7", "8")
    assert samples.answers is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": [1, 0, 2, 0, 0]}, "correct: got 2 in row 2, want true or false, 1 or 0"),
        ({"correct": [1, 0, np.nan, 0, 0]}, "correct: got nothing"),
        ({"correct": ["x"] * 5}, "correct: got values of type string"),
        ({"logprob": [-1.0, -2.0, 0.1, 0.0, 0.0]}, "logprob: got 0.1 in row 2, want at most 0"),
        ({"logprob": [-1.0, -2.0, np.nan, 0.0, 0.0]}, "logprob: got nothing"),
        ({"reward": [1.0, np.nan, 0.0, 0.0, 0.0]}, "reward: got nothing"),
        ({"reward": [1.0, np.inf, 0.0, 0.0, 0.0]}, "reward: got inf in row 1, want a finite"),
        ({"tokens": [0, 1, 1, 1, 1]}, "tokens: got 0 in row 0, want at least 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_samples({**LONG, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", ["problem", "correct"])
def test_the_needed_columns_are_asked_for(absent: str) -> None:
    table = {key: values for key, values in LONG.items() if key != absent}
    with pytest.raises(InputError, match=f"{absent}: got '{absent}', want one of the columns"):
        read_samples(table)


def test_right_without_an_answer_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match="^1 samples are marked correct but have no answer"):
        samples = read_samples({"problem": [1, 1], "correct": [1, 0], "answer": ["", "x"]})
    assert samples.right.tolist() == [1]
    assert samples.answers is not None
    assert samples.answers.tolist() == [None, "x"]


def test_lists_of_other_lengths_and_empty_problems(tmp_path: Path) -> None:
    rows = [{"correct": [True, False], "answer": ["1"]}]
    with pytest.raises(InputError, match="answer: got lists of other lengths"):
        read_samples(lines(tmp_path / "short.jsonl", rows))
    with pytest.raises(InputError, match="correct: got row 1 without samples"):
        read_samples(lines(tmp_path / "none.jsonl", [{"correct": [True]}, {"correct": []}]))
    with pytest.raises(InputError, match="problem: got an empty cell"):
        read_samples({**LONG, "problem": ["a", None, "a", "b", "b"]})


def test_the_samples_that_come_along() -> None:
    shapes = {}
    for name in BUNDLED:
        samples = read_samples(name)
        assert samples.name == name
        shapes[name] = (len(samples), set(samples.counts.tolist()), int(samples.right.sum()))
    assert shapes == {
        "smollm2-arith": (48, {32}, 70),
        "gsm8k-smollm2": (100, {32}, 37),
        "gsm8k-solutions": (1319, {4}, 2001),
    }
