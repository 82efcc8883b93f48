"""Types of text files: widened where later rows need it, and the same for one file or many."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw import table_files
from scoredraw.errors import InputError
from scoredraw.tables import open_table

pytestmark = pytest.mark.contract

PAD = "a" * 60  # 40,000 rows of it are more than two blocks of CSV


def csv(path: Path, values: list[str]) -> Path:
    path.write_text("x,pad\n" + "".join(f"{value},{PAD}\n" for value in values))
    return path


@pytest.mark.parametrize(
    ("early", "late", "kind", "last"),
    [
        ("7", "1.5", pa.float64(), 1.5),
        ("7", "text", pa.string(), "text"),
        ("", "3", pa.int64(), 3),
        ("", "2.5", pa.float64(), 2.5),
        ("", "true", pa.bool_(), True),
        ("", "text", pa.string(), "text"),
        ("", "2020-01-02", pa.date32(), None),
        ("true", "text", pa.string(), "text"),
        ("2020-01-02", "2020-01-02 10:00:00", pa.timestamp("s"), None),
        ("2020-01-02", "text", pa.string(), "text"),
        ("1", "99999999999999999999", pa.float64(), 1e20),
        ("text", "8", pa.string(), "8"),
    ],
)
def test_a_late_value_widens_its_column(tmp_path: Path, early, late, kind, last) -> None:
    """The last of 40,000 rows, blocks after the ones the types were guessed from."""
    values = [early] * 39_999 + [late]
    one = open_table(csv(tmp_path / "one.csv", values))
    assert one.schema.field("x").type == kind
    column = one.read(["x"])["x"].to_pylist()
    assert len(column) == 40_000
    if last is not None:
        assert column[-1] == last
    if kind == pa.string() and early:
        assert column[0] == early  # text stays as it was written
    # cut into files whose types differ it is the same table
    (tmp_path / "many").mkdir()
    csv(tmp_path / "many" / "1.csv", values[:39_999])
    csv(tmp_path / "many" / "2.csv", values[39_999:])
    many = open_table(tmp_path / "many")
    assert many.schema.equals(one.schema)
    assert many.read(["x"])["x"].to_pylist() == column
    # and what reading it whole would say
    whole = pacsv.read_csv(tmp_path / "one.csv", pacsv.ReadOptions(block_size=1 << 30))
    assert whole.schema.field("x").type == kind


cells = st.sampled_from(
    ["", "0", "1", "-7", "2.5", "1e5", "true", "False", "2020-01-02", "2020-01-02 10:00:00",
     "2020-01-02 10:00:00.5", "10:30:00", "text", "NA", "0x1F", "2020-01-02T10:00:00Z"]
)  # fmt: skip


@pytest.mark.property
@settings(max_examples=150)
@given(values=st.lists(cells, min_size=2, max_size=6), data=st.data())
def test_files_agree_on_what_one_file_would_be(tmp_path_factory, values, data) -> None:
    cut = data.draw(st.lists(st.integers(1, len(values) - 1), min_size=1, max_size=2))
    folder = tmp_path_factory.mktemp("csv")
    one = open_table(csv(folder / "one.csv", values))
    (folder / "many").mkdir()
    edges = [0, *sorted(set(cut)), len(values)]
    for i, (a, b) in enumerate(pairwise(edges)):
        csv(folder / "many" / f"{i}.csv", values[a:b])
    many = open_table(folder / "many")
    assert many.schema.equals(one.schema), (values, edges)
    assert many.read().equals(one.read())


def test_latin_1_late_in_a_text_column(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 make the column bytes; they are neither lost nor a loop."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"x\n" + f"{PAD}\n".encode() * 40_000 + b"caf\xe9\n")
    column = open_table(path).read()["x"]
    assert column.type == pa.binary()
    assert column[-1].as_py() == b"caf\xe9"


def test_quoted_newlines_across_block_borders(tmp_path: Path) -> None:
    """Every row holds a line break, so that each of several blocks is likely to end in one."""
    rows = [f'{i},"line {i}\nof ""two"", {PAD}"' for i in range(40_000)]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + ("i,text\n" + "\n".join(rows) + "\n").encode())
    assert path.stat().st_size > 3 << 20
    table = open_table(path).read()
    assert table.column_names == ["i", "text"]
    assert table["i"].to_pylist() == list(range(40_000))
    assert table["text"][39_999].as_py() == f'line 39999\nof "two", {PAD}'


def test_a_header_without_rows_among_files(tmp_path: Path) -> None:
    csv(tmp_path / "1.csv", [])
    csv(tmp_path / "2.csv", ["1", "2"])
    assert open_table(tmp_path).read(["x"]).to_pydict() == {"x": [1, 2]}


# ------------------------------------------------------------------ JSON lines


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("early", "late", "kind"),
    [
        ({"x": 1}, {"x": 1.5}, pa.float64()),
        ({"x": None}, {"x": "text"}, pa.string()),
        ({"x": [1, 2]}, {"x": [0.5]}, pa.list_(pa.float64())),
        ({"y": 1}, {"y": 1, "x": True}, pa.bool_()),
        ({"x": 3, "y": "a"}, {"x": 4}, pa.int64()),
    ],
)
def test_late_json_lines(tmp_path: Path, monkeypatch, early, late, kind) -> None:
    """Types of the last line, blocks after the first (of 4 kB here, 16 MB at work)."""
    monkeypatch.setattr(table_files, "_JSON_BYTES", 4096)
    rows = [{**early, "pad": PAD}] * 500 + [late]
    table = open_table(jsonl(tmp_path / "a.jsonl", rows))
    assert table.schema.field("x").type == kind
    assert table.num_rows == 501
    every = table.read().to_pylist()
    for row, found in ((rows[0], every[0]), (late, every[-1])):
        assert {k: v for k, v in found.items() if v is not None} == {
            k: v for k, v in row.items() if v is not None
        }


def test_json_files_whose_types_differ(tmp_path: Path) -> None:
    jsonl(tmp_path / "1.jsonl", [{"x": None, "v": [1]}])
    jsonl(tmp_path / "2.jsonl", [{"x": 2, "v": [0.5]}])
    jsonl(tmp_path / "3.jsonl", [{"x": 1.5, "v": None}])
    assert open_table(tmp_path).read().to_pydict() == {"x": [None, 2.0, 1.5],
                                                       "v": [[1.0], [0.5], None]}  # fmt: skip
    jsonl(tmp_path / "4.jsonl", [{"x": "text", "v": None}])
    with pytest.raises(InputError, match=r"^input: cannot read .*\.jsonl: .*/x\)") as error:
        open_table(tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ Parquet and Arrow


def test_parquet_files_must_agree(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [1.0]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"x": [1.5], "y": [1.0]}), tmp_path / "2.parquet")
    pattern = r"^input: column 'x' has types int64 in 1\.parquet, double in 2\.parquet"
    with pytest.raises(InputError, match=pattern):
        open_table(tmp_path)
    pq.write_table(pa.table({"x": [1], "z": [1.0]}), tmp_path / "2.parquet")
    pattern = r"^input: got 2\.parquet with other columns than 1\.parquet \(y, z\)"
    with pytest.raises(InputError, match=pattern):
        open_table(tmp_path)
    pq.write_table(pa.table({"y": [1.0], "x": [1]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"^input: got 2\.parquet"):
        open_table(tmp_path)


def test_required_and_optional_columns_are_one_column(tmp_path: Path) -> None:
    required = pa.schema([pa.field("x", pa.float64(), nullable=False)])
    pq.write_table(pa.table([[1.0]], schema=required), tmp_path / "1.parquet")
    pq.write_table(pa.table({"x": [2.0, None]}), tmp_path / "2.parquet")
    table = open_table(tmp_path)
    assert table.read().to_pydict() == {"x": [1.0, 2.0, None]}
    assert table.schema.field("x").nullable


def test_lists_whose_items_have_other_names(tmp_path: Path) -> None:
    """Writers call the items of a list `item` or `element`; it is one type."""
    for i, word in enumerate(["item", "element"]):
        kind = pa.list_(pa.field(word, pa.float64()), 2)
        with pa.ipc.new_file(str(tmp_path / f"{i}.arrow"), pa.schema([("v", kind)])) as file:
            file.write(pa.record_batch([pa.array([[1.0, 2.0]], kind)], names=["v"]))
    table = open_table(tmp_path)
    assert table.read().to_pydict() == {"v": [[1.0, 2.0]] * 2}
    assert table.blocks().d == 2


def test_parquet_with_two_columns_of_a_name(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"^input: got 1\.parquet with two columns a"):
        open_table(tmp_path)


def test_spools_go_with_the_table(tmp_path: Path, monkeypatch) -> None:
    import gc
    import tempfile

    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    table = open_table(csv(tmp_path / "a.csv", ["1", "2.5"]))
    assert len(list(spool.iterdir())) == 1
    del table
    gc.collect()
    assert list(spool.iterdir()) == []
    (tmp_path / "b.csv").write_text("x,y\n1\n")
    with pytest.raises(InputError):
        open_table(tmp_path / "b.csv")
    gc.collect()
    assert list(spool.iterdir()) == []
