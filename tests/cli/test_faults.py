"""Everything that can go wrong with a command: exit code 2, one line, and no half-written OUT."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scoredraw.tables import open_table

pytestmark = pytest.mark.contract

N = 500
RNG = np.random.default_rng(0)
DATA = {
    "id": [f"u{i}" for i in range(N)],
    "twice": [i // 2 for i in range(N)],
    "a": RNG.standard_normal(N),
    "b": RNG.standard_normal(N),
    "gap": [None, *range(1, N)],
    "cost": RNG.uniform(1, 2, N),
    "free": np.zeros(N),
}
DRAW = ("draw", "rows")
PLAIN = ("--columns", "a,b", "--method", "leverage", "--size", "20")


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a good table and an older OUT in it, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table(DATA), "in.parquet", row_group_size=100)
    Path("out.parquet").write_bytes(b"an older file")
    return tmp_path


@pytest.fixture
def fails(scoredraw, here: Path):
    """Run a command that must fail with one line and leave the folder as it was."""

    def run(*arguments: object, says: str, out: str | None = "out.parquet") -> None:
        before = sorted(here.iterdir())
        more = () if out is None else ("-o", out)
        done = scoredraw(*arguments, *more)
        assert done.code == 2, done
        assert done.err.startswith(f"scoredraw: {says}"), done.err
        assert done.err.count("\n") == 1, done.err
        assert done.out == ""
        assert sorted(here.iterdir()) == before
        assert Path("out.parquet").read_bytes() == b"an older file"

    return run


@pytest.mark.parametrize("size", ["0", "-1", "501", "120 %", "120%", "0%", "-3%", "abc", "1e2", "",
                                  "1.5", "20,0", "nan%"])  # fmt: skip
def test_sizes(fails, size: str) -> None:
    fails(*DRAW, "in.parquet", *PLAIN[:-1], size, says="size: got")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "levrage", "--size", 5), "method: got 'levrage' for rows, want one of"),
        (("--size", 5), "method: got both or neither of --method and --scores, want one"),
        (("--method", "lewis", "--scores", "in.parquet", "--size", 5), "method: got both or"),
        (("--method", "lewis"), "size: got both or neither of --size and --budget, want one"),
        ((*PLAIN, "--scheme", "poison"), "scheme: got 'poison', want one of poisson, priority"),
        ((*PLAIN, "--map", "log"), "map: got 'log', want one of linear, softmax, rank"),
        ((*PLAIN, "--p", 1), "p: got an option that leverage does not have, want no options"),
        (("--method", "uniform", "--p", 1, "--size", 5), "p: got an option that uniform"),
        (("--method", "lewis", "--p", -1, "--columns", "a", "--size", 5), "p: got -1.0, want 0 <"),
        ((*PLAIN, "--engine", "spark"), "engine: got 'spark', want 'local' or 'ray'"),
        ((*PLAIN, "--target", "c"), "target: got 'c', want one of the columns id, twice, a, b"),
        (("--columns", "a,z", *PLAIN[2:]), "columns: got 'z', want one of the columns"),
        (("--columns", "a,id", *PLAIN[2:]), "columns: got 'id' of type string, want numbers"),
        (("--columns", "", *PLAIN[2:]), "columns: got no numeric column"),
        (("--columns", "gap", *PLAIN[2:]), "A: got nan at row 0 of in.parquet, column 'gap', want"),
        ((*PLAIN, "--by", "z"), "by: got 'z', want one of the columns"),
        ((*PLAIN, "--by", "gap"), "by: got 1 empty cells in 'gap', want a value in every row"),
        ((*PLAIN, "--by", "id"), "size: got 20, want at least 1 for each of 500 strata"),
        ((*PLAIN, "--id", "z"), "id: got 'z', want one of the columns"),
        ((*PLAIN, "--id", "twice"), "ids: got duplicate ids, want a different one for each row"),
        ((*PLAIN, "--id", "twice", "--scheme", "residual"), "ids: got duplicate ids"),
        ((*PLAIN, "--id", "gap"), "ids: got 1 missing ids, want one in every row"),
        ((*PLAIN, "--cost", "cost"), "cost: got one of --cost and --budget, want both"),
        ((*PLAIN, "--budget", 5), "cost: got one of --cost and --budget, want both"),
        ((*PLAIN, "--cost", "cost", "--budget", 5), "size: got both or neither of --size and"),
        ((*PLAIN[:-2], "--cost", "id", "--budget", 5), "cost: got 'id' of type string, want num"),
        ((*PLAIN[:-2], "--cost", "free", "--budget", 5), "costs: got 0.0 at row 0, want"),
        ((*PLAIN[:-2], "--cost", "gap", "--budget", 5), "costs: got nan at row 0, want finite"),
        ((*PLAIN[:-2], "--cost", "cost", "--budget", 0), "budget: got 0.0, want a positive"),
        ((*PLAIN[:-2], "--cost", "cost", "--budget", -4), "budget: got -4.0, want a positive"),
        ((*PLAIN[:-2], "--cost", "cost", "--budget", 5, "--scheme", "pivotal"), "cost: got the"),
        ((*PLAIN, "--report", "no/page.html"), "out: got no/page.html, want a file in an existing"),
        # Typer's own checks say it in one line as well
        ((*PLAIN, "--nope"), "No such option: --nope"),
        ((*PLAIN, "--seed", "x"), "Invalid value for '--seed'"),
        ((*PLAIN, "--seed", -1), "Invalid value for '--seed'"),
        ((*PLAIN, "--workers", 0), "Invalid value for '--workers'"),
        ((*PLAIN, "--batch-rows", 0), "Invalid value for '--batch-rows'"),
    ],
)
def test_requests(fails, arguments, says: str) -> None:
    fails(*DRAW, "in.parquet", *arguments, says=says)


@pytest.mark.parametrize("command", [("draw", "columns", "x"), ("pick",), ("draw", "rows")])
def test_commands_that_are_none(scoredraw, command) -> None:
    done = scoredraw(*command)
    assert done.code == 2
    assert done.err.startswith("scoredraw: ")
    assert done.err.count("\n") == 1


# ------------------------------------------------------------------ inputs


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.parquet", b"", "input: got empty.parquet, an empty file, want a table"),
        ("empty.csv", b"", "input: got empty.csv, an empty file, want a table"),
        ("header.csv", b"a,b\n", "input: got a table without rows, want at least one row"),
        ("ragged.csv", b"a,b\n1,2\n3\n", "input: cannot read ragged.csv: CSV parse error"),
        ("twice.csv", b"a,a\n1,2\n", "input: got twice.csv with two columns a, want one each"),
        ("drawn.csv", b"a,_weight\n1,2\n", "input: got the columns _weight, which the output"),
        ("drawn2.csv", b"_row,_score\n1,2\n", "input: got the columns _row, _score, which the"),
        ("garbage.parquet", b"abc" * 99, "input: cannot read garbage.parquet: "),
        ("garbage.csv.gz", b"abc" * 99, "input: cannot read garbage.csv.gz: "),
        ("garbage.npy", b"abc" * 99, "input: cannot read garbage.npy: "),
        ("text.csv", b"a,b\nx,y\n", "columns: got no numeric column, want at least one"),
        ("table.xlsx", b"abc", "input: got a .xlsx file, want .parquet or"),
        ("lines.jsonl", b'{"a": 1}\n{"a": ', "input: cannot read lines.jsonl: "),
    ],
)
def test_inputs(fails, here: Path, name: str, content: bytes, says: str) -> None:
    (here / name).write_bytes(content)
    fails(*DRAW, name, "--method", "leverage", "--size", 1, says=says)


def test_inputs_that_are_not_there(fails, here: Path) -> None:
    (here / "folder").mkdir()
    common = ("--method", "leverage", "--size", 1)
    fails(*DRAW, "no.csv", *common, says="input: got no.csv, which is not there, want a file, a gl")
    fails(*DRAW, "no*.csv", *common, says="input: got no*.csv, which is not there")
    fails(*DRAW, "folder", *common, says="input: got folder, a folder without tables, want .parq")


def test_a_truncated_parquet_file(fails, here: Path) -> None:
    whole = (here / "in.parquet").read_bytes()
    (here / "cut.parquet").write_bytes(whole[:-100])
    fails(*DRAW, "cut.parquet", *PLAIN, says="input: cannot read cut.parquet: ")
    (here / "holes.parquet").write_bytes(whole[:4] + bytes(8000) + whole[8004:])
    fails(*DRAW, "holes.parquet", *PLAIN, says="input: cannot read holes.parquet: ")


def test_files_that_differ(fails, here: Path) -> None:
    for kind, one, other, says in [
        ("columns", {"a": [1.0]}, {"b": [1.0]}, "input: got 2.parquet with other columns than 1."),
        ("types", {"a": [1.0]}, {"a": [1]}, "input: column 'a' has types double in 1.parquet, int"),
    ]:
        (here / kind).mkdir()
        pq.write_table(pa.table(one), here / kind / "1.parquet")
        pq.write_table(pa.table(other), here / kind / "2.parquet")
        fails(*DRAW, kind, "--method", "leverage", "--size", 1, says=says)
    (here / "formats").mkdir()
    (here / "formats" / "1.csv").write_text("a\n1\n")
    pq.write_table(pa.table({"a": [1]}), here / "formats" / "2.parquet")
    fails(*DRAW, "formats", "--method", "leverage", "--size", 1,
          says="input: got files of formats .csv, .parquet, want one format")  # fmt: skip
    (here / "csv").mkdir()
    (here / "csv" / "1.csv").write_text("a\n1\n")
    (here / "csv" / "2.csv").write_text("a\nx\n")
    fails(*DRAW, "csv", "--method", "leverage", "--columns", "a", "--size", 1,
          says="columns: got 'a' of type string, want numbers")  # fmt: skip


def test_a_broken_row_far_into_a_stream_of_files(fails, here: Path) -> None:
    (here / "parts").mkdir()
    values = np.ones(1_300_000)
    values[1_234_567] = np.nan
    for i, (a, b) in enumerate([(0, 1000), (1000, 700_000), (700_000, 1_300_000)]):
        table = pa.table({"ok": np.ones(b - a), "x": values[a:b]})
        pq.write_table(table, here / "parts" / f"part-{i}.parquet")
    where = "row 534,567 of part-2.parquet (row 1,234,567 in all), column 'x'"
    for method in ("leverage", "lewis", "root-leverage"):
        fails(*DRAW, "parts", "--method", method, "--size", "1%",
              says=f"A: got nan at {where}, want finite numbers")  # fmt: skip


def test_bom_and_quoted_newlines_are_no_fault(scoredraw, here: Path) -> None:
    rows = "".join(f'"line {i}\nof ""two""",{i % 7}\n' for i in range(60_000))
    (here / "in.csv").write_bytes(b"\xef\xbb\xbf" + f"text,x\n{rows}".encode())
    assert (here / "in.csv").stat().st_size > 1 << 20
    done = scoredraw(*DRAW, "in.csv", "--method", "leverage", "--size", 50, "-o", "kept.csv")
    assert (done.code, done.err) == (0, "")
    kept = open_table("kept.csv").read()
    assert kept.column_names == ["text", "x", "_row", "_weight", "_score"]
    for text, row in zip(kept["text"].to_pylist(), kept["_row"].to_pylist(), strict=True):
        assert text == f'line {row}\nof "two"'


# ------------------------------------------------------------------ scores, keep, exclude


def test_score_files(fails, here: Path) -> None:
    def scores(values, name: str = "_score") -> str:
        pq.write_table(pa.table({name: values}), "scores.parquet")
        return "scores.parquet"

    common = (*DRAW, "in.parquet", "--size", 20, "--scores")
    fails(*common, scores(np.ones(N - 1)), says="scores: got 499 scores, want 500, one a row")
    broken = np.where(np.arange(N) == 7, np.nan, 1.0)
    fails(*common, scores(broken), says="scores: got nan at row 7, want finite numbers")
    fails(*common, scores([None, *range(1, N)]), says="scores: got nan at row 0, want finite")
    fails(*common, scores(-np.ones(N)), says="size_measure: got -1.0 at row 0, want numbers >= 0")
    fails(*common, scores(np.zeros(N)), says="size_measure: got only zeros")
    fails(*common, scores(["x"] * N), says="scores: got '_score' of type string, want numbers")
    fails(*common, scores(np.ones(N), "s"), says="scores: got '_score', want one of the columns s")
    fails(*common, "no.parquet", says="input: got no.parquet, which is not there")
    fails(*common, scores(np.ones(N)), "--p", 2, says="p: got an option of --method beside --scor")


def test_keep_and_exclude_files(fails, here: Path) -> None:
    def rows(name: str, *values: object, column: str = "_row") -> str:
        (here / name).write_text(f"{column},filler\n" + "".join(f"{v},0\n" for v in values))
        return name

    common = (*DRAW, "in.parquet", *PLAIN)
    fails(*common, "--keep", rows("k.csv", 3), "--exclude", rows("e.csv", 2, 3),
          says="exclude: got row 3, which is also kept, want one or the other")  # fmt: skip
    fails(*common, "--keep", rows("k.csv", 500), says="keep: got row 500, want rows from 0 to 499")
    fails(*common, "--exclude", rows("e.csv", -1), says="exclude: got row -1, want rows from 0")
    fails(*common, "--keep", rows("k.csv", *range(20)), says="keep: got 20 kept already, want less")
    fails(*common, "--exclude", rows("e.csv", *range(490)), says="size: got 20, want at most 10")
    fails(*common, "--keep", rows("k.csv", 1, column="row"), says="keep: got k.csv without a colum")
    fails(*common, "--keep", rows("k.csv", 1, ""), says="keep: got an empty _row in k.csv, want")
    fails(*common, "--keep", rows("k.csv", "x"), says="keep: got '_row' of type string, want num")
    fails(*common, "--keep", "no.csv", says="input: got no.csv, which is not there")
    fails(*common, "--id", "id", "--keep", rows("k.csv", "u1", "nobody", column="id"),
          says="keep: got 1 ids of k.csv that the input does not have, want ids of")  # fmt: skip
    fails(*common, "--id", "id", "--keep", rows("k.csv", 1), says="keep: got 'id', want one of")
    pq.write_table(pa.table({"n": range(N), "a": DATA["a"]}), here / "numbered.parquet")
    words = rows("k.csv", "seven", column="n")
    fails(*DRAW, "numbered.parquet", *PLAIN[2:], "--id", "n", "--keep", words,
          says="keep: got column 'n' of type string")  # fmt: skip


# ------------------------------------------------------------------ outputs


def test_outputs_that_cannot_be(fails, here: Path) -> None:
    (here / "folder.csv").mkdir()
    common = (*DRAW, "in.parquet", *PLAIN)
    fails(*common, out="no/out.csv", says="out: got no/out.csv, want a file in an existing folder")
    fails(*common, out="in.parquet/out.csv", says="out: got in.parquet/out.csv, want a file in an")
    fails(*common, out="out.doc", says="out: got out.doc, want a name ending in .parquet or")
    fails(*common, out="out", says="out: got out, want a name ending in .parquet or")
    fails(*common, out="folder.csv", says="out: got folder.csv, which is a folder, want a file's")
    fails(*common, out="/proc/out.csv", says="out: cannot write /proc/out.csv: ")
    fails(*common, out="out.npy", says="out: got text in column 'id', want numbers only in a .npy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(fails, here: Path) -> None:
    (here / "locked").mkdir(mode=0o555)
    fails(*DRAW, "in.parquet", *PLAIN, out="locked/out.csv",
          says="out: cannot write locked/out.csv: Permission denied")  # fmt: skip


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scoredraw", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60,
                          **options)  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "csv.gz", "jsonl", "npz"])
def test_a_full_disk(here: Path, kind: str) -> None:
    """A limit on the size of files stops the writer as a full disk does, with any rights."""
    table = {f"x{i}": RNG.standard_normal(20_000) for i in range(4)}
    pq.write_table(pa.table(table), here / "big.parquet")
    out = here / f"kept.{kind}"
    out.write_bytes(b"an older file")
    before = sorted(here.iterdir())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000))

    done = run(*DRAW, "big.parquet", "--method", "uniform", "--size", 15_000, "-o", out,
               preexec_fn=limit)  # fmt: skip
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"scoredraw: out: cannot write {out}: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(here.iterdir()) == before
    assert out.read_bytes() == b"an older file"


def test_a_really_full_disk(here: Path) -> None:
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow mounting a small disk")
    try:
        pq.write_table(pa.table({"x": RNG.standard_normal(50_000)}), here / "big.parquet")
        done = run(*DRAW, "big.parquet", "--method", "uniform", "--size", 40_000, "-o",
                   disk / "kept.parquet")  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "No space left on device" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------ interrupts


@pytest.fixture
def writing(here: Path):
    """A `draw` in the middle of writing OUT, which takes it seconds; the older OUT is there."""
    rows = 600_000
    pq.write_table(pa.table({"x": RNG.standard_normal(rows), "t": ["text"] * rows}), "big.parquet")
    Path("kept.jsonl").write_bytes(b"an older file")
    command = [sys.executable, "-m", "scoredraw", *DRAW, "big.parquet", "--method", "uniform",
               "--size", "100%", "-o", "kept.jsonl"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(f.stat().st_size for f in here.glob(".kept*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_termination(here: Path, writing, sent: signal.Signals, code: int) -> None:
    writing.send_signal(sent)
    out, err = writing.communicate(timeout=30)
    assert writing.returncode == code
    assert out == ""
    assert err.count("\n") <= 1
    assert "Traceback" not in err
    assert (here / "kept.jsonl").read_bytes() == b"an older file"
    assert not list(here.glob(".kept*"))


def test_kill_9(here: Path, writing, scoredraw) -> None:
    writing.kill()
    writing.communicate(timeout=30)
    assert writing.returncode == -signal.SIGKILL
    assert (here / "kept.jsonl").read_bytes() == b"an older file"
    # what is left is hidden, and no later command takes it for a table
    [left] = here.glob(".kept*")
    (here / "kept.jsonl").unlink()
    done = scoredraw(*DRAW, "*.jsonl", "--method", "uniform", "--size", 1)
    assert done.err == ("scoredraw: input: got *.jsonl, which is not there, want a file, a glob or "
                        "a folder\n")  # fmt: skip
    assert left.name.startswith(".")
    done = scoredraw(*DRAW, "big.parquet", "--method", "uniform", "--size", 5, "-o", "kept.jsonl")
    assert done.code == 0
    assert open_table("kept.jsonl").num_rows == 5
