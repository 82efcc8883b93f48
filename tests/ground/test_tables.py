"""Tables in: which files, in which order, of which types, and what broken ones say."""

from __future__ import annotations

import gzip
import json
import pickle
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather

from scoredraw.errors import InputError
from scoredraw.tables import find_files, open_table, suffix

pytestmark = pytest.mark.contract


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refuses(source, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        open_table(source)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ which files


def test_files_come_in_natural_order(tmp_path: Path) -> None:
    names = ["part-10.csv", "part-2.csv", "part-1.csv", "a.csv", "part-02.csv", "x²1.csv"]
    for name in names:
        put(tmp_path / name, "x\n1\n")
    put(tmp_path / ".part-3.partial.csv", "a killed writer's")
    put(tmp_path / "notes.txt", "no table")
    want = ["a.csv", "part-1.csv", "part-02.csv", "part-2.csv", "part-10.csv", "x²1.csv"]
    assert [f.name for f in find_files(tmp_path)] == want
    assert [f.name for f in find_files(str(tmp_path / "*.csv"))] == want
    assert [f.name for f in find_files(str(tmp_path / "part-?.csv"))] == want[1:2] + want[3:4]
    # a list keeps its own order
    listed = [tmp_path / "part-10.csv", str(tmp_path / "a.csv")]
    assert [f.name for f in find_files(listed)] == ["part-10.csv", "a.csv"]
    assert open_table(listed).num_rows == 2


def test_names_with_wildcards_in_them_are_names_first(tmp_path: Path) -> None:
    put(tmp_path / "a[1].csv", "x\n1\n")
    put(tmp_path / "a1.csv", "x\n2\n")
    assert open_table(tmp_path / "a[1].csv").read()["x"].to_pylist() == [1]


def test_globs_below_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub" / "b.csv", "x\n1\n")
    monkeypatch.chdir(tmp_path)
    assert find_files("*/*.csv") == find_files("**/*.csv") == [Path("sub/b.csv")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.parquet", ".parquet"), ("A.PARQUET", ".parquet"), ("a.csv.gz", ".csv.gz"),
     ("a.b.jsonl.gz", ".jsonl.gz"), ("a.tar.gz", ".gz"), ("a", ""), ("a.csv.jsonl", ".jsonl")],
)  # fmt: skip
def test_suffixes(name: str, kind: str) -> None:
    assert suffix(Path(name)) == kind


def test_what_is_not_there(tmp_path: Path) -> None:
    refuses(tmp_path / "no.csv", r"^input: got .*no\.csv, which is not there")
    refuses(str(tmp_path / "*.csv"), r"^input: got .*\*\.csv, which is not there")
    refuses(tmp_path, r"^input: got .*, a folder without tables")
    refuses(put(tmp_path / "a.txt", "x"), r"^input: got a \.txt file")
    put(tmp_path / "a.csv", "x\n1\n")
    put(tmp_path / "a.jsonl", '{"x": 1}\n')
    refuses(tmp_path, r"^input: got files of formats \.csv, \.jsonl, want one format")
    with pytest.raises(InputError, match=r"^batch_rows"):
        open_table(tmp_path / "a.csv", batch_rows=0)


# ------------------------------------------------------------------ memory


def test_memory() -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=[7, 8])
    for source in (frame, pl.from_pandas(frame), pa.Table.from_pandas(frame, preserve_index=False),
                   {"a": [1, 2], "b": ["x", "y"]}, {"a": pa.array([1, 2]), "b": ["x", "y"]},
                   pa.record_batch({"a": [1, 2], "b": ["x", "y"]})):  # fmt: skip
        table = open_table(source)
        assert table.column_names == ["a", "b"]
        assert table.read().to_pydict() == {"a": [1, 2], "b": ["x", "y"]}
        assert open_table(table) is table
    assert open_table([[1.0, 2.0], [3.0, 4.0]]).read().to_pydict() == {"x0": [1, 3], "x1": [2, 4]}
    assert open_table(np.arange(3)).column_names == ["x"]
    assert open_table({"A": np.eye(2), "b": np.ones(2)}).column_names == ["A0", "A1", "b"]
    import datasets

    assert open_table(datasets.Dataset.from_dict({"a": [1, 2]})).num_rows == 2


@pytest.mark.parametrize(
    "source",
    [
        [],
        np.zeros((0, 3)),
        pa.table({"a": pa.array([], pa.int64())}),
        {"a": [1], "b": [1, 2]},
        {"x": np.eye(2), "x0": np.ones(2)},
        {"a": 5},
        np.float64(3.0),
        pd.DataFrame({"a": [1, "x"]}),
        pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]),
    ],
)
def test_memory_that_is_no_table(source) -> None:
    refuses(source, "^input: ")


# ------------------------------------------------------------------ formats


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    plain = {"i": [1, 2, 3], "f": [0.1, -1e300, 5e-324], "t": ["a", 'ü,"q"\nline', "c"]}
    table = pa.table(plain)
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    text = 'i,f,t\n1,0.1,a\n2,-1e300,"ü,""q""\nline"\n3,5e-324,c\n'
    put(tmp_path / "a.csv", "\ufeff" + text)  # with a byte order mark
    put(tmp_path / "crlf.csv", text.replace("\n", "\r\n").replace('q""\r', 'q""'))
    put(tmp_path / "a.csv.gz", gzip.compress(text.encode()))
    rows = [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    put(tmp_path / "a.jsonl", lines)
    put(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))
    np.savez(tmp_path / "a.npz", i=plain["i"], f=plain["f"])
    np.save(tmp_path / "a.npy", np.column_stack([plain["i"], plain["f"]]))
    for file in sorted(tmp_path.iterdir()):
        opened = open_table(file)
        assert opened.num_rows == 3, file
        found = opened.read().to_pydict()
        if file.suffix == ".npy":
            assert found == {"x0": [1.0, 2.0, 3.0], "x1": plain["f"]}
        else:
            want = {k: v for k, v in plain.items() if k != "t" or file.suffix != ".npz"}
            assert found == want, file
        names = opened.numeric_columns()
        assert names == (["x0", "x1"] if file.suffix == ".npy" else ["i", "f"])
        assert open_table(file).numbers(names[1]).tolist() == plain["f"]
        # a table travels to other processes as a path
        copy = pickle.loads(pickle.dumps(opened))
        assert copy.read().to_pydict() == found


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".npy", ".npz", ".csv.gz", ".jsonl.gz"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_broken_files_are_named(tmp_path: Path, kind: str, damage: str) -> None:
    from scoredraw.table_output import write_table

    path = tmp_path / f"broken{kind}"
    table = pa.table({"x": np.random.default_rng(0).standard_normal(5000)})
    write_table(path, table.schema, table.to_batches(), {})
    whole = path.read_bytes()
    path.write_bytes({"garbage": b"abc" * 999, "truncated": whole[: len(whole) // 2],
                      "empty": b""}[damage])  # fmt: skip
    refuses(path, rf"^input: .*broken{kind}")


def test_damage_inside_a_parquet_file_is_named_when_it_is_met(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).standard_normal(5000)}), path)
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = bytes(396)
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match=r"^input: cannot read .*broken\.parquet") as error:
        open_table(path).read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.csv", "x,y\n", "a table without rows"),
        ("a.csv", "\n", "a.csv"),
        ("a.csv", "x,y\n1,2\n3\n", "Expected 2 columns, got 1"),
        ("a.csv", "x,x\n1,2\n", "two columns x"),
        ("a.jsonl", '{"x": 1\n{"x"', "a.jsonl"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl"),
        ("a.jsonl", '{"x": 1}\n{"x": "text"}\n', "a.jsonl: .*changed from number to string"),
    ],
)
def test_text_that_is_no_table(tmp_path: Path, name: str, content: str, pattern: str) -> None:
    refuses(put(tmp_path / name, content), f"^input: .*{pattern}")


def test_arrays_that_are_no_table(tmp_path: Path) -> None:
    np.save(tmp_path / "complex.npy", np.zeros(3, complex))
    np.savez(tmp_path / "lengths.npz", a=np.zeros(3), b=np.zeros(4))
    np.savez(tmp_path / "number.npz", a=np.zeros(3), b=5)
    np.savez(tmp_path / "names.npz", x=np.eye(2), x0=np.ones(2))
    np.save(tmp_path / "object.npy", np.array([1, "a"], object), allow_pickle=True)
    for file in tmp_path.iterdir():
        refuses(file, "^input: ")


# ------------------------------------------------------------------ rows


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """Row i holds i: 5,000 rows in three Parquet files of several row groups."""
    folder = tmp_path_factory.mktemp("numbered")
    for i, (a, b) in enumerate([(0, 1), (1, 3000), (3000, 5000)]):
        pq.write_table(pa.table({"i": range(a, b)}), folder / f"{i}.parquet", row_group_size=700)
    return folder


@pytest.mark.property
@settings(max_examples=60)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 6000))
def test_batches_of_a_range(numbered: Path, start: int, stop: int, batch_rows: int) -> None:
    batches = list(open_table(numbered, batch_rows=batch_rows).batches(["i"], start, stop))
    assert all(0 < b.num_rows <= batch_rows for b in batches)
    found = [x for b in batches for x in b["i"].to_pylist()]
    assert found == list(range(start, stop))


@pytest.mark.property
@settings(max_examples=60)
@given(st.lists(st.integers(0, 4999), max_size=30), st.integers(100, 6000))
def test_select_gives_the_rows_asked_for(numbered: Path, rows: list[int], batch_rows: int) -> None:
    asked = np.sort(np.array(rows, np.int64))  # repeats stay
    batches = open_table(numbered, batch_rows=batch_rows).select(asked)
    assert [x for b in batches for x in b["i"].to_pylist()] == asked.tolist()


def test_where_names_the_file_and_the_row(numbered: Path) -> None:
    table = open_table(numbered)
    assert table.where(0) == "row 0 of 0.parquet (row 0 in all)"
    assert table.where(1) == "row 0 of 1.parquet (row 1 in all)"
    assert table.where(4999) == "row 1,999 of 2.parquet (row 4,999 in all)"
    assert open_table(numbered / "1.parquet").where(2345) == "row 2,345 of 1.parquet"
    assert open_table({"x": [1, 2]}).where(1) == "row 1"


def test_columns_asked_for_must_be_there_and_hold_numbers(numbered: Path) -> None:
    table = open_table({"a": [1.0], "t": ["x"], "z": pa.array([None])})
    assert table.numeric_columns() == ["a"]
    for call, pattern in [
        (lambda: table.blocks(["b"]), r"^columns: got 'b', want one of the columns a, t, z"),
        (lambda: table.blocks(["a", "t"]), r"^columns: got 't' of type string, want numbers"),
        (lambda: table.blocks([]), r"^columns: got no numeric column"),
        (lambda: table.numbers("t", "cost"), r"^cost: got 't' of type string"),
        (lambda: table.column("q", "by"), r"^by: got 'q', want one of"),
    ]:
        with pytest.raises(InputError, match=pattern):
            call()


def test_one_number_a_row_of_every_kind() -> None:
    lists = pa.array([[1.0], None], pa.list_(pa.float64(), 1))
    for column, want in [
        (pa.array([True, None]), [1, np.nan]),
        (pa.array([Decimal("1.5"), None]), [1.5, np.nan]),
        (pa.array([1, None]), [1, np.nan]),
        (lists, [1, np.nan]),
    ]:
        chunked = pa.chunked_array([column, column])
        np.testing.assert_array_equal(open_table({"c": chunked}).numbers("c"), want * 2)
