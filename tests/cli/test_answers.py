"""`scoredraw draw answers` and `compare answers` as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw import registry
from scoredraw.errors import InputError
from scoredraw.language.draw_answers import draw_answers
from scoredraw.table_output import provenance

pytestmark = pytest.mark.contract

ROWS: list[dict[str, Any]] = [
    {"task": "a", "said": "1/2", "logprob": -4.0, "tokens": 4, "reward": 0.1},
    {"task": "a", "said": "0.5", "logprob": -6.0, "tokens": 4, "reward": 0.2},
    {"task": "a", "said": "3", "logprob": -2.0, "tokens": 4, "reward": 0.9},
    {"task": "b", "said": None, "logprob": -1.0, "tokens": 1, "reward": 0.0},
    {"task": "b", "said": "Ωmega " * 20_000, "logprob": -9.0, "tokens": 9, "reward": 0.3},
]
NAMED = ["--columns", "problem=task,answer=said"]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_chosen_rows_are_written_with_their_evidence(scoredraw, samples, tmp_path) -> None:
    out = tmp_path / "chosen.jsonl"
    done = scoredraw("draw", "answers", samples, *NAMED, "-m", "bon", "--size", 2, "-o", out)
    assert done.code == 0
    assert "Up to 2 answers to each of 2 problems by bon." in done.out
    assert "1 of them have fewer different answers" in done.out
    rows = read(out)
    assert [(r["_row"], r["_rank"], r["_score"]) for r in rows] == [
        (2, 1, 0.9), (1, 2, 0.2), (4, 1, 0.3),
    ]  # fmt: skip
    assert [r["_share"] for r in rows] == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    assert rows[2]["said"] == ROWS[4]["said"]
    parquet = tmp_path / "chosen.parquet"
    scoredraw("draw", "answers", samples, *NAMED, "-m", "bon", "-o", parquet)
    assert provenance(parquet)["method"] == "bon"


def test_answers_may_be_the_same_as_mathematics(scoredraw, samples) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    asked = ("draw", "answers", samples, *NAMED, "-m", "majority", "--json")
    found = json.loads(scoredraw(*asked, "--equal", "math", "--size", 3).out)
    assert (found["size"], found["short"]) == (3, 2)
    assert json.loads(scoredraw(*asked, "--size", 3).out)["size"] == 4


def test_a_bundled_file_is_graded_and_shown(scoredraw, tmp_path) -> None:
    page = tmp_path / "page.html"
    done = scoredraw("draw", "answers", "smollm2-arith", "-m", "rpc", "--report", page)
    assert done.code == 0
    assert "and 38 more problems" in done.out
    assert "25.0 % [12.3, 37.7] are right; by lot" in done.out
    assert "share of the samples" in page.read_text()


@pytest.mark.parametrize(
    "method",
    [m.name for m in registry.methods("answers") if not {"reward", "text"} & set(m.needs)],
)
def test_every_method_submits_nested_choices(method: str) -> None:
    one, three = (draw_answers("smollm2-arith", method, k) for k in (1, 3))
    for few, many in zip(one.chosen, three.chosen, strict=True):
        assert many.answers[: len(few)] == few.answers
        assert len(set(many.answers)) == len(many.answers) <= 3
    assert three.draw.offsets is not None
    assert three.draw.offsets[-1] == len(three.draw) == len(three.ranks) == len(three.shares)
    assert three.solved is not None
    assert one.solved is not None
    assert (three.solved >= one.solved).all()


def test_where_nothing_passes_the_answer_is_unranked_and_that_is_said() -> None:
    table = {"problem": ["a"] * 3 + ["b"] * 3, "answer": ["1", "2", "3", "1", "2", "2"],
             "reward": [0.1, 0.9, 0.3, 0.5, 0.2, 0.4]}  # fmt: skip
    found = draw_answers(table, "bom", 2, min_count=2)
    assert [top.answers for top in found.chosen] == [("1",), ("2",)]
    assert [top.fallback for top in found.chosen] == [True, False]
    assert found.draw.scores is not None
    assert np.isnan(found.draw.scores[0])
    assert "In 1 none passed; the most frequent one is submitted, unranked." in found.summary
    with pytest.raises(InputError, match="rewards: got an option that bom does not have"):
        draw_answers(table, "bom", 2, rewards=[1])


def test_lots_belong_to_a_problem_wherever_it_stands(samples) -> None:
    columns = {"problem": "task", "answer": "said"}
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    turned = {name: column[::-1] for name, column in table.items()}
    one = draw_answers(str(samples), "uniform", 1, columns=columns, seed=3)
    other = draw_answers(turned, "uniform", 1, columns=columns, seed=3)
    assert set(one.samples.problems) == set(other.samples.problems)
    assert np.array_equal(
        draw_answers(str(samples), "uniform", columns=columns, seed=3).draw.indices,
        one.draw.indices,
    )


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["-m", "nothing"], "method: got 'nothing' for answers"),
        (["-m", "majority", "--size", 0], "Invalid value for '--size'"),
        (["-m", "majority", "--pad", "lots"], "pad: got 'lots', want frequency or None"),
        (["-m", "majority", "--equal", "near"], "equal: got 'near', want exact or math"),
        (["-m", "majority", "--set", "alpha=1"], "alpha: got an option that majority does not"),
        (["-m", "majority", "--columns", "task"], "columns: got 'task', want ROLE=COL"),
        (["-m", "majority", "-o", "none/here.jsonl"], "out: got none/here.jsonl in a folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(scoredraw, samples, options, wrong) -> None:
    given = options if "--columns" in options else [*NAMED, *options]
    done = scoredraw("draw", "answers", samples, *given)
    assert done.code == 2
    assert wrong in done.err
    assert done.err.count("\n") == 1


def test_columns_that_a_method_needs(scoredraw, tmp_path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"problem": "a", "answer": "1"}\n{"problem": "a", "answer": "1"}\n')
    done = scoredraw("draw", "answers", path, "-m", "rpc")
    assert done.code == 2
    assert "input: got no column logprob, tokens, want the columns that rpc needs" in done.err
    with pytest.raises(InputError, match="logprob"):
        draw_answers(str(path), "rpc")
    path.write_text('{"problem": "a", "answer": null}\n')
    done = scoredraw("draw", "answers", path, "-m", "majority")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no answer in any sample" in done.err


def test_above_zero_a_log_probability_is_refused(scoredraw, tmp_path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "a", "answer": "1", "logprob": 0.1, "tokens": 2}\n')
    done = scoredraw("draw", "answers", path, "-m", "rpc")
    assert (done.code, done.err) == (
        2, "scoredraw: logprob: got 0.1 in row 0, want at most 0\n",
    )  # fmt: skip


def test_the_comparison_shows_calibration(scoredraw, tmp_path) -> None:
    page = tmp_path / "page.html"
    asked = ("compare", "answers", "smollm2-arith", "--methods", "majority,perplexity-consistency")
    done = scoredraw(*asked, "--ks", "2,32", "--report", page)
    assert done.code == 0
    assert "expected calibration error" in done.out
    assert "Brier score of the confidence" in page.read_text()
    found = json.loads(scoredraw(*asked, "--ks", "32", "--json").out)
    assert found["calibration"]["majority"]["ece"][0] == pytest.approx(0.084, abs=0.0005)
    done = scoredraw("compare", "answers", "gsm8k-solutions", "--methods", "rpc")
    assert done.code == 2
    assert "methods: got 'rpc' for samples without logprob and tokens" in done.err
