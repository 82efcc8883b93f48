"""Tables in: files of any common format, or frames in memory, read as rows of one long table.

A table is one file, a glob, a folder or several paths (in natural order: part-2 before part-10),
an Arrow/pandas/Polars frame or an array. Rows are numbered from 0 through all files. Columns
stream: no reader here holds more than a few batches, so a table may exceed memory. CSV and JSON
lines are read once and spooled as Arrow in a temporary file, so that every pass after is fast and
starts at any row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scoredraw.errors import InputError, require
from scoredraw.execution import BLOCK_ROWS

if TYPE_CHECKING:
    import pyarrow as pa

Int = npt.NDArray[np.int64]
FORMATS = (
    ".parquet",
    ".arrow",
    ".feather",
    ".csv",
    ".csv.gz",
    ".jsonl",
    ".jsonl.gz",
    ".npy",
    ".npz",
)
BATCH_ROWS = 131_072


def open_table(source: Any, *, batch_rows: int = BATCH_ROWS) -> Table:
    """Open a table for streaming.

    source: a path, a glob, a folder, a sequence of paths; or in memory an Arrow table, a pandas
    or Polars frame, a 1-d or 2-d array (columns x0, x1, ...) or a mapping of columns.
    batch_rows: rows read at a time; it bounds memory and changes nothing else.

    Raises InputError: nothing there, a format nobody reads, an empty or broken file, files whose
    columns or types differ.

    >>> table = open_table(np.eye(3)); table.num_rows, table.column_names
    (3, ['x0', 'x1', 'x2'])
    """
    from scoredraw.table_files import memory_part, open_parts

    require(batch_rows >= 1, "batch_rows", batch_rows, "at least 1")
    if isinstance(source, Table):
        return source
    paths = isinstance(source, str | Path) or (
        isinstance(source, list | tuple) and source and isinstance(source[0], str | Path)
    )
    parts = open_parts(find_files(source)) if paths else [memory_part(source)]
    table = Table(parts, batch_rows)
    require(table.num_rows > 0, "input", "a table without rows", "at least one row")
    return table


def find_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a path, a folder, a glob or a sequence of them, in natural order."""
    if not isinstance(source, str | Path):
        return [file for one in source for file in find_files(one)]
    path = Path(source)
    if path.is_dir():
        files = [f for f in path.iterdir() if suffix(f) in FORMATS and not f.name.startswith(".")]
        require(bool(files), "input", f"{path}, a folder without tables", " or ".join(FORMATS))
    elif path.exists():
        files = [path]
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(anchor))
        wild = any(c in pattern for c in "*?[")
        found = anchor.glob(pattern) if wild else ()
        # Hidden files are what a killed writer leaves; a shell's glob passes over them as well.
        hidden = path.name.startswith(".")
        files = [f for f in found if f.is_file() and (hidden or not f.name.startswith("."))]
        require(bool(files), "input", f"{path}, which is not there", "a file, a glob or a folder")
    return sorted(files, key=_natural)


def suffix(path: Path) -> str:
    """The extension that names the format, lower case: `.csv.gz` counts as one."""
    name = path.name.lower()
    return next(
        (s for s in sorted(FORMATS, key=len, reverse=True) if name.endswith(s)), path.suffix
    )


def numeric_width(kind: pa.DataType) -> int:
    """How many numeric columns a column makes: 1, a fixed-size list its length, others 0."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * (numeric_width(kind.value_type) == 1)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return int(number or pa.types.is_boolean(kind) or pa.types.is_decimal(kind))


class Table:
    """Rows of one or more files (or of memory) as one table; see `open_table`."""

    def __init__(self, parts: Sequence[Any], batch_rows: int) -> None:
        self.parts = list(parts)
        self.batch_rows = batch_rows
        self.schema: pa.Schema = self.parts[0].schema
        if not all(part.schema.equals(self.schema) for part in self.parts):
            self.schema = _optional(self.schema)
        self.starts = np.cumsum([0] + [part.num_rows for part in self.parts])

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def column_names(self) -> list[str]:
        return list(self.schema.names)

    def require_columns(self, names: Sequence[str], argument: str) -> None:
        """InputError that lists the columns there are, unless all names are among them."""
        for name in names:
            have = ", ".join(self.column_names[:12]) + (", ..." if len(self.schema) > 12 else "")
            require(name in self.column_names, argument, f"{name!r}", f"one of the columns {have}")

    def batches(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Record batches of rows start..stop in order."""
        stop = self.num_rows if stop is None else stop
        names = list(self.column_names if columns is None else columns)
        for part, first in zip(self.parts, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, part.num_rows)
            if low < high:
                yield from part.batches(names, int(low), int(high), self.batch_rows)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The columns in memory."""
        import pyarrow as pa

        names = list(self.column_names if columns is None else columns)
        schema = pa.schema([self.schema.field(name) for name in names])
        batches = (
            pa.RecordBatch.from_arrays(batch.columns, schema=schema)
            for batch in self.batches(names)
        )
        return pa.Table.from_batches(batches, schema=schema)

    def column(self, name: str, argument: str = "column") -> pa.ChunkedArray:
        """One column in memory."""
        self.require_columns([name], argument)
        return self.read([name])[name]

    def numbers(self, name: str, argument: str = "column") -> npt.NDArray[np.float64]:
        """One column as float64 (n,), NaN for missing; InputError if it isn't numeric."""
        column = self.column(name, argument)
        kind = column.type
        require(numeric_width(kind) == 1, argument, f"{name!r} of type {kind}", "numbers")
        return np.concatenate([_as_numbers(chunk, 1).reshape(-1) for chunk in column.chunks])

    def select(self, rows: Int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The given rows (ascending, repeats allowed) as record batches, reading only near them."""
        for part, first in zip(self.parts, self.starts, strict=False):
            for low, high in part.pieces():
                a, b = np.searchsorted(rows, [first + low, first + high])
                if a == b:
                    continue
                at = int(first) + low
                for batch in self.batches(columns, at, int(first) + high):
                    b = int(np.searchsorted(rows, at + batch.num_rows))
                    if b > a:
                        yield batch.take(_indices(rows[a:b] - at))
                    a, at = b, at + batch.num_rows

    def numeric_columns(self, exclude: Sequence[str] = ()) -> list[str]:
        """The columns that numbers can be read from."""
        return [f.name for f in self.schema if numeric_width(f.type) and f.name not in exclude]

    def blocks(self, columns: Sequence[str] | None = None) -> TableBlocks:
        """The columns as a float64 matrix that streams in aligned blocks (`execution.Blocks`)."""
        names = list(self.numeric_columns() if columns is None else columns)
        self.require_columns(names, "columns")
        require(bool(names), "columns", "no numeric column", "at least one")
        for name in names:
            kind = self.schema.field(name).type
            require(numeric_width(kind) > 0, "columns", f"{name!r} of type {kind}", "numbers")
        return TableBlocks(self, names)

    def where(self, row: int) -> str:
        """A row as a person finds it: the file, and the row in the file."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        name, inside = self.parts[index].name, row - int(self.starts[index])
        if not name:
            return f"row {row:,}"
        whole = f" (row {row:,} in all)" if len(self.parts) > 1 else ""
        return f"row {inside:,} of {name}{whole}"


class TableBlocks:
    """Columns of a table as a matrix in aligned blocks: `execution.Blocks` over files."""

    def __init__(self, table: Table, names: list[str]) -> None:
        self.table, self.names = table, names
        self.widths = [numeric_width(table.schema.field(name).type) for name in names]
        self.n, self.d = table.num_rows, sum(self.widths)
        self.finite = False

    def parts(self, first: int, last: int) -> Iterator[list[pa.RecordBatch]]:
        start, stop = first * BLOCK_ROWS, min(last * BLOCK_ROWS, self.n)
        block: list[pa.RecordBatch] = []
        missing = min(BLOCK_ROWS, stop - start)
        for batch in self.table.batches(self.names, start, stop):
            at = 0
            while at < batch.num_rows:
                piece = batch.slice(at, missing)
                block.append(piece)
                at, start, missing = at + len(piece), start + len(piece), missing - len(piece)
                if missing == 0:
                    yield block
                    block, missing = [], min(BLOCK_ROWS, stop - start)

    def dense(self, part: list[pa.RecordBatch]) -> npt.NDArray[np.float64]:
        """Columns lie one after the other, as Arrow has them: the block is a transpose."""
        rows = sum(batch.num_rows for batch in part)
        matrix = np.empty((self.d, rows))
        at = 0
        for batch in part:
            span, j = slice(at, at + batch.num_rows), 0
            for column, width in zip(batch.columns, self.widths, strict=True):
                matrix[j : j + width, span] = _as_numbers(column, width)
                j += width
            at += batch.num_rows
        return matrix.T

    def where(self, row: int, column: int) -> str:
        name = self.names[int(np.searchsorted(np.cumsum(self.widths), column, side="right"))]
        return f"{self.table.where(row)}, column {name!r}"


def _as_numbers(column: pa.Array, width: int) -> npt.NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        matrix = np.full((width, len(column)), np.nan)  # flatten passes over missing lists
        present = column.is_valid().to_numpy(zero_copy_only=False)
        matrix[:, present] = _as_numbers(column.flatten(), 1).reshape(-1, width).T
        return matrix
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    values = column.to_numpy(zero_copy_only=False)
    return np.asarray(values, None if values.dtype.kind in "fiu" else np.float64)  # cast on arrival


def _optional(schema: pa.Schema) -> pa.Schema:
    """The schema with every column open to missing values: files may differ in that."""
    import pyarrow as pa

    return pa.schema([field.with_nullable(True) for field in schema], metadata=schema.metadata)


def _indices(rows: Int) -> Any:
    import pyarrow as pa

    return pa.array(rows)


def _natural(file: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Numbers by their value; names that differ in leading zeros only by their letters."""
    parts = re.split(r"([0-9]+)", str(file))
    return [(0, int(x)) if i % 2 else (1, x) for i, x in enumerate(parts)], str(file)


def reserved(table: Table, names: Sequence[str]) -> None:
    """InputError if the table already has columns that the output is going to add."""
    have = [name for name in names if name in table.column_names]
    if have:
        listed = ", ".join(have)
        raise InputError(
            f"input: got the columns {listed}, which the output would add; "
            "rename or drop them, or draw from the table they came from"
        )
