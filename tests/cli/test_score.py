"""`scoredraw score`: one number a row, in the order of the rows, whatever reads and writes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import scoredraw as sd
from scoredraw.table_output import provenance
from scoredraw.tables import FORMATS, open_table

pytestmark = pytest.mark.contract

N = 9000
A = np.random.default_rng(0).standard_t(3, (N, 3))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    whole = pa.table({name: A[:, i] for i, name in enumerate("abc")})
    for i, (a, b) in enumerate([(0, 8000), (8000, 8001), (8001, N)]):
        pq.write_table(whole.slice(a, b - a), folder / f"part-{i}.parquet")
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_scores_are_written_beside_their_rows(scoredraw, parts: Path, tmp_path: Path, kind: str):
    out = tmp_path / f"scores{kind}"
    done = scoredraw("score", "rows", parts, "--method", "lewis", "--p", "1", "-o", out, "--json")
    assert (done.code, done.err) == (0, "")
    want = sd.score("rows", parts, method="lewis", p=1.0)
    found = open_table(out)
    row, score = ("x0", "x1") if kind == ".npy" else ("_row", "_score")
    assert found.column_names == [row, score]
    assert found.numbers(row).tolist() == list(range(N))
    np.testing.assert_array_equal(found.numbers(score), want)
    facts = json.loads(done.out)
    assert (facts["method"], facts["n"], facts["size"], facts["out"]) == ("lewis", N, N, str(out))
    if kind in (".parquet", ".arrow", ".feather"):
        made = provenance(out)
        assert (made["kind"], made["method"], made["seed"]) == ("rows", "lewis", 0)
        assert made["command"][:2] == ["score", "rows"]


def test_every_method_with_its_options(scoredraw, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.npz"
    for method, options, given in [
        ("leverage", (), {}),
        ("leverage", ("--target", "c", "--columns", "b,a"), {"target": "c", "columns": ["b", "a"]}),
        ("ridge-leverage", ("--ridge", "2.5"), {"ridge": 2.5}),
        ("root-leverage", ("--p", "1.5"), {"p": 1.5}),
    ]:
        done = scoredraw("score", "rows", parts, "--method", method, *options, "-o", out,
                         "--workers", 2, "--batch-rows", 100)  # fmt: skip
        assert (done.code, done.err) == (0, "")
        want = sd.score("rows", parts, method=method, **given)
        np.testing.assert_array_equal(open_table(out).numbers("_score"), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "leverage"), "out: got nothing, want -o FILE to write the scores to"),
        (("--method", "uniform", "-o", "OUT"), "method: got uniform, want a method that gives"),
        (("--method", "lewis", "--p", "0", "-o", "OUT"), "p: got 0.0, want 0 < p"),
        (("--method", "leverage", "--p", "1", "-o", "OUT"), "p: got an option that leverage"),
        (("--method", "leverage", "--target", "z", "-o", "OUT"), "target: got 'z', want one of"),
        (("--method", "leverage", "-o", "x.doc"), "out: got x.doc, want a name ending in"),
        (("-o", "OUT"), "Missing option '--method'"),
    ],
)
def test_mistakes_are_one_line(scoredraw, parts: Path, tmp_path: Path, arguments, message) -> None:
    out = tmp_path / "scores.csv"
    done = scoredraw("score", "rows", parts, *(out if a == "OUT" else a for a in arguments))
    assert done.code == 2
    assert done.err.startswith(f"scoredraw: {message}")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert not out.exists()


def test_examples(scoredraw, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="probes are trained with the extra scoredraw[torch]")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, 3))
    frame = pd.DataFrame({f"x{i}": x[:, i] for i in range(3)} | {"label": x[:, 0] > 0})
    frame.to_csv(tmp_path / "train.csv", index=False)
    scores = []
    for seed in (1, 1, 2):
        out = tmp_path / "scores.csv"
        done = scoredraw("score", "examples", tmp_path / "train.csv", "--target", "label",
                         "--method", "el2n", "--seeds", 1, "--epochs", 2, "--seed", seed,
                         "-o", out)  # fmt: skip
        assert (done.code, done.err) == (0, "")
        scores.append(open_table(out).numbers("_score").tolist())
    assert len(scores[0]) == 200
    assert scores[0] == scores[1] != scores[2]
    done = scoredraw("score", "examples", tmp_path / "train.csv", "--target", "nope",
                     "--method", "el2n", "-o", tmp_path / "no.csv")  # fmt: skip
    assert done.code == 2
    assert done.err.startswith("scoredraw: target: got")
    assert done.err.count("\n") == 1
