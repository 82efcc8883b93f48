"""`audit passk` and `compare answers`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scoredraw import registry
from scoredraw.bakeoff.answers import compare_answers
from scoredraw.errors import InputError
from scoredraw.language.coverage_audit import audit_coverage

pytestmark = pytest.mark.contract


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Samples of a person's own: ragged counts, a null answer, other column names."""
    rows: list[dict[str, Any]] = []
    for problem, marks in (("a", "1011"), ("b", "0001"), ("c", "00000")):
        for i, mark in enumerate(marks):
            right = mark == "1"
            answer = None if i == 1 else ("7" if right else str(i))
            rows.append({"task": problem, "passed": right, "answer": answer, "reward": i / 4})
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


OWN = ["--columns", "problem=task,correct=passed"]


def test_the_audit_of_real_samples(scoredraw, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = scoredraw(
        "audit", "passk", "smollm2-arith", "--json", "--report", page, "--target", 0.9,
        "--resamples", 100, "--prompt-tokens", 100, "--input-price", 0.15, "--output-price", 0.6,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out, parse_constant=pytest.fail)
    reached = [round(100 * found["coverage"][str(2**i)]["value"], 1) for i in range(6)]
    assert reached == [4.6, 8.8, 16.3, 28.2, 43.8, 60.4]
    at_32 = {name: round(100 * v["32"]["value"], 1) for name, v in found["selectors"].items()}
    assert at_32["majority"] == 24.0
    assert at_32["mean_logprob"] == 31.2
    assert at_32["oracle"] == 60.4
    assert {"power_law", "beta_binomial"} == set(found["models"]) == set(found["reach"])
    off = {r["model"]: abs(r["predicted"] - r["truth"]) for r in found["replays"]}
    assert off["plug_in"] > 0.25 > off["power_law"]
    cost = found["reach"]["power_law"]
    tokens = found["reach"]["power_law"]["price"]["value"] / cost["samples"]["value"]
    assert tokens == pytest.approx((100 * 0.15 + 0.6 * 22.6) / 1e6, rel=0.05)
    text = page.read_text()
    assert text.lower().startswith("<!doctype html>")
    assert text.count("<svg") >= 6
    assert "mean-logprob" in text


def test_the_audit_of_ones_own_samples(scoredraw, own: str) -> None:
    done = scoredraw("audit", "passk", own, *OWN, "--ks", "1,2,4", "--resamples", "50")
    assert done.code == 0, done.err
    assert "4 to 5 samples" in done.out
    assert "bon" in done.out
    found = audit_coverage({"problem": list("aabb"), "correct": [1, 0, 0, 0]}, resamples=20)
    assert set(found.selectors) == {"uniform", "oracle"}
    assert found.coverage(2).value == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ks", "8"], "k: got"),
        (["--ks", "two"], "ks: got 'two', want whole numbers"),
        (["--beyond", "2"], "beyond: got"),
        (["--target", "1.5"], "target: got 1.5"),
        (["--columns", "answer=nothing"], "answer: got 'nothing', want one of the columns"),
        (["--output-price", "1"], "output_price: got one for samples without lengths"),
        (["--report", "/nowhere/page.html"], "report: got"),
    ],
)
def test_what_an_audit_refuses(scoredraw, own: str, arguments: list[str], message: str) -> None:
    done = scoredraw("audit", "passk", own, *OWN, *arguments)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_answers_are_compared(scoredraw, own: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = scoredraw("compare", "answers", own, *OWN, "--report", str(page), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out, parse_constant=pytest.fail)
    board = {(row["method"], row["k"]): row["value"]["value"] for row in found["leaderboard"]}
    # all four samples of a: a right answer holds the majority; of b: three differ, one is right
    assert board["majority", 4] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["coverage"]["4"]["value"] == pytest.approx(2 / 3)
    assert "Which answer should be submitted?" in page.read_text()
    plain = scoredraw("compare", "answers", own, *OWN, "--methods", "bon", "--ks", "2")
    assert plain.code == 0, plain.err
    assert "bon" in plain.out
    assert "majority" not in plain.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "guess"], "method: got 'guess' for answers, want one of uniform, "),
        (["--methods", "mean-logprob"], "methods: got 'mean-logprob' for samples without logprob"),
        (["--ks", "1"], "k: got"),
        (["--repeats", "1"], "repeats: got 1"),
    ],
)
def test_what_a_comparison_refuses(scoredraw, own: str, arguments: list[str], message: str) -> None:
    done = scoredraw("compare", "answers", own, *OWN, *arguments)
    assert done.code == 2
    assert message in done.err


def test_every_selector_of_the_catalogue_competes() -> None:
    found = compare_answers("smollm2-arith", ks=[4], repeats=20)
    able = {m.name for m in registry.methods("answers") if not {"reward", "text"} & set(m.needs)}
    assert set(found.methods) == able
    again = compare_answers("smollm2-arith", ks=[4], repeats=20)
    assert (
        found.to_json().split('"environment"')[0].split('"seconds"')[0]
        == (again.to_json().split('"environment"')[0].split('"seconds"')[0])
    )


def test_marks_alone_leave_nothing_to_choose_by() -> None:
    with pytest.raises(InputError, match=r"^input: got nothing to choose by, want a column of"):
        compare_answers({"problem": [1, 1, 2, 2], "correct": [1, 0, 0, 0]})


def test_one_sample_leaves_nothing_to_choose() -> None:
    with pytest.raises(InputError, match="input: got a problem with one sample"):
        compare_answers({"problem": [1, 2], "correct": [1, 0]})
