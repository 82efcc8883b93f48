"""Tables out: what is written comes back, with its provenance, or not at all."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.table_output import provenance, require_format, write_table
from scoredraw.tables import FORMATS, open_table

pytestmark = pytest.mark.contract
TYPED = (".parquet", ".arrow", ".feather")
TEXT = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


def write(path: Path, table: pa.Table, rows: int = 2) -> int:
    return write_table(path, table.schema, table.to_batches(rows), {"seed": 7, "command": ["a"]})


def test_every_format_that_is_read_is_written(tmp_path: Path) -> None:
    table = pa.table({"i": [1, -2, 3], "f": [0.1, np.pi * 1e-300, -1e300]})
    for kind in FORMATS:
        path = tmp_path / f"out{kind}"
        assert write(path, table) == 3
        found = open_table(path).read()
        if kind == ".npy":
            assert [c.to_pylist() for c in found.columns] == [
                [1.0, -2.0, 3.0],
                table["f"].to_pylist(),
            ]
        else:
            assert found.to_pydict() == table.to_pydict(), kind
        made = {"seed": 7, "command": ["a"]} if kind in TYPED else {}
        assert provenance(path) == made
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f"out{k}" for k in FORMATS)


@pytest.mark.parametrize("kind", [*TYPED, *TEXT])
def test_text_and_missing_values(tmp_path: Path, kind: str) -> None:
    table = pa.table(
        {
            "t": ['a,"b"', "line\nbreak", "ünï ", None],
            "i": pa.array([1, None, 3, 4]),
            "f": pa.array([1.5, None, float("inf"), -0.0]),
            "b": [True, None, False, True],
        }
    )
    write(tmp_path / f"out{kind}", table)
    assert open_table(tmp_path / f"out{kind}").read().to_pydict() == table.to_pydict()


@pytest.mark.parametrize("kind", TYPED)
def test_typed_formats_keep_types(tmp_path: Path, kind: str) -> None:
    batches = [["x", "y", "x"], ["z", "x", "z"]]  # dictionaries that differ, as row groups have
    table = pa.table(
        {
            "d": pa.chunked_array([pa.array(b).dictionary_encode() for b in batches]),
            "when": pa.array([datetime(2020, 1, 1, 12)] * 6, pa.timestamp("us")),
            "money": pa.array([Decimal("1.50")] * 6),
            "list": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float64(), 2)),
            "raw": pa.array([b"\xff"] * 6),
        }
    )
    write(tmp_path / f"out{kind}", table)
    found = open_table(tmp_path / f"out{kind}").read()
    assert found.to_pydict() == table.to_pydict()
    assert found.schema.types[1:] == table.schema.types[1:]


def test_pandas_reads_what_was_drawn_from_its_own_file(tmp_path: Path) -> None:
    """Its metadata speak of another number of rows and of fewer columns."""
    frame = pd.DataFrame({"c": pd.Categorical(list("aab")), "x": [1.0, 2.0, 3.0]})
    frame.to_parquet(tmp_path / "in.parquet")
    table = open_table(tmp_path / "in.parquet")
    schema = table.schema.append(pa.field("_row", pa.int64()))
    batches = [
        pa.RecordBatch.from_arrays([*batch.columns, pa.array([0, 2])], schema=schema)
        for batch in table.select(np.array([0, 2]))
    ]
    write_table(tmp_path / "out.parquet", schema, batches, {"seed": 1})
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back["c"].tolist() == ["a", "b"]
    assert back["_row"].tolist() == [0, 2]
    assert provenance(tmp_path / "out.parquet") == {"seed": 1}


@pytest.mark.property
@settings(max_examples=80)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20))
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".npy"])
def test_text_keeps_every_bit_of_a_number(tmp_path_factory, kind: str, values) -> None:
    path = tmp_path_factory.mktemp("bits") / f"out{kind}"
    table = pa.table({"x": pa.array([0.5, *values])})  # so that the column is not all whole
    write(path, table)
    found = open_table(path).numbers(open_table(path).column_names[0])
    assert found.tobytes() == table["x"].to_numpy().tobytes()


@pytest.mark.parametrize(
    ("kind", "column", "pattern"),
    [
        (".npy", ["a"], "text in column 'x'"),
        (".npz", [b"a"], "text in column 'x'"),
        (".csv", [[1, 2]], "the list column"),
        (".csv.gz", [{"a": 1}], "the list column"),
        (".csv", [b"\xff"], "cannot write .*UTF8"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, kind: str, column, pattern: str) -> None:
    out = tmp_path / f"out{kind}"
    out.write_text("old")
    with pytest.raises(InputError, match=f"^out: .*{pattern}") as error:
        write(out, pa.table({"x": pa.array(column)}))
    assert "\n" not in str(error.value)
    assert out.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path, kind: str, error) -> None:
    def batches():
        yield pa.record_batch({"x": [1.0, 2.0]})
        raise error

    out = tmp_path / f"out{kind}"
    with pytest.raises(error):
        write_table(out, pa.schema([("x", pa.float64())]), batches(), {})
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, pattern in [
        ("out", "want a name ending in .parquet"),
        ("out.xlsx", "want a name ending in .parquet"),
        ("no/out.csv", "in a folder that does not exist"),
        ("folder.csv", "which is a folder"),
    ]:
        with pytest.raises(InputError, match=f"^out: got .*{pattern}"):
            require_format(tmp_path / name)
