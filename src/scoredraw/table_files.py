"""File formats, one class a kind of file: how many rows, which columns, batches of a row range."""

from __future__ import annotations

import math
import os
import re
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scoredraw.errors import InputError, require
from scoredraw.tables import FORMATS, suffix

# What a CSV column may be, in the order in which Arrow tries types: each widens to the next.
LADDER = [
    pa.null(),
    pa.int64(),
    pa.bool_(),
    pa.date32(),
    pa.time32("s"),
    pa.timestamp("s"),
    pa.timestamp("ns"),
    pa.timestamp("s", "UTC"),
    pa.timestamp("ns", "UTC"),
    pa.float64(),
    pa.string(),
    pa.binary(),
]
_JSON_BYTES = 1 << 24  # read at a time; a line must be shorter


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Whatever a reader says of a broken file, in one line that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"input: cannot read {path}: {reason}") from None


def open_parts(files: Sequence[Path]) -> list[Any]:
    """One part a file, with one schema for all of them."""
    kinds = {suffix(file) for file in files}
    for kind in sorted(kinds):
        require(kind in FORMATS, "input", f"a {kind or 'nameless'} file", " or ".join(FORMATS))
    require(len(kinds) == 1, "input", f"files of formats {', '.join(sorted(kinds))}", "one format")
    reader = {
        ".parquet": ParquetPart,
        ".npy": NumpyPart,
        ".npz": NumpyPart,
        ".arrow": ArrowPart,
        ".feather": ArrowPart,
    }.get(kinds.pop(), TextPart)
    parts = []
    for file in files:
        with _reading(file):
            require(file.stat().st_size > 0, "input", f"{file}, an empty file", "a table")
            parts.append(reader(file))
            _require_once(parts[-1])
    _unify(parts)
    return parts


def memory_part(source: Any) -> Any:
    """A part from a frame, a mapping of columns or an array in memory."""
    with _reading(f"a {type(source).__name__}"):
        part = MemoryPart(_memory_table(source))
    _require_once(part)
    return part


def _memory_table(source: Any) -> pa.Table:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    if isinstance(source, Mapping):
        return _arrays_table(source)
    if type(source).__module__.split(".")[0] == "polars":
        return source.to_arrow()
    if type(source).__module__.split(".")[0] == "pandas":
        return pa.Table.from_pandas(source, preserve_index=False)
    if type(source).__module__.split(".")[0] == "datasets":
        return source.with_format("arrow")[:]
    return _arrays_table({"x": np.asarray(source)})


class MemoryPart:
    """A table in memory."""

    name = ""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.schema, self.num_rows = table.schema, table.num_rows

    def pieces(self) -> list[tuple[int, int]]:
        return [(0, self.num_rows)]

    def batches(self, names: list[str], start: int, stop: int, size: int) -> Iterator[Any]:
        yield from self.table.select(names).slice(start, stop - start).to_batches(size)


class NumpyPart(MemoryPart):
    """A .npy matrix (columns x0, x1, ...) or the arrays of a .npz, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else _closing() as file:
            arrays = {k: file[k] for k in file} if file else {"x": np.load(path, mmap_mode="r")}
        super().__init__(_arrays_table(arrays))
        self.name = path.name


class ParquetPart:
    """A Parquet file, read by row groups; pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.schema = self._file.schema_arrow
        self.num_rows = self._file.metadata.num_rows

    @cached_property
    def _file(self) -> Any:
        import pyarrow.parquet as pq

        # Read ahead would keep whole row groups of every column in memory.
        return pq.ParquetFile(self.path, pre_buffer=False)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def pieces(self) -> list[tuple[int, int]]:
        meta = self._file.metadata
        ends = np.cumsum([0] + [meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        return [(int(a), int(b)) for a, b in pairwise(ends)]

    def batches(self, names: list[str], start: int, stop: int, size: int) -> Iterator[Any]:
        groups = [(i, a, b) for i, (a, b) in enumerate(self.pieces()) if a < stop and b > start]
        at = groups[0][1]
        with _reading(self.path):
            for batch in self._file.iter_batches(size, [i for i, _, _ in groups], columns=names):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield batch.slice(low, high - low).select(names)
                at += batch.num_rows


class ArrowPart:
    """An Arrow IPC file (or stream), memory-mapped; pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.schema, self.num_rows = self._table.schema, self._table.num_rows

    @cached_property
    def _table(self) -> Any:
        source = pa.memory_map(str(self.path))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    pieces = MemoryPart.pieces

    def batches(self, names: list[str], start: int, stop: int, size: int) -> Iterator[Any]:
        yield from self._table.select(names).slice(start, stop - start).to_batches(size)


class TextPart(ArrowPart):
    """A CSV or JSON-lines file, spooled as Arrow into a temporary file that goes with the part."""

    def __init__(self, path: Path, types: pa.Schema | None = None) -> None:
        self.text = path
        handle, name = tempfile.mkstemp(prefix="scoredraw-", suffix=".arrow")
        os.close(handle)
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        write = _spool_csv if suffix(path).startswith(".csv") else _spool_json
        write(path, Path(name), types)
        super().__init__(Path(name))
        self.name = path.name

    def retyped(self, types: pa.Schema) -> TextPart:
        """The same file read anew with these types."""
        with _reading(self.text):
            return TextPart(self.text, types)


def _spool_csv(path: Path, spool: Path, types: pa.Schema | None) -> None:
    """Types are guessed from the first rows; a later value that does not fit widens its column."""
    import pyarrow.csv as pacsv

    known = {} if types is None else {field.name: field.type for field in types}
    parse = pacsv.ParseOptions(newlines_in_values=True)
    while True:
        convert = pacsv.ConvertOptions(
            column_types=known,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,  # "NA" in quotes is a text
        )
        try:
            reader = pacsv.open_csv(path, parse_options=parse, convert_options=convert)
            names = reader.schema.names
            twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
            require(not twice, "input", f"{path.name} with two columns {twice}", "one each")
            known = {field.name: field.type for field in reader.schema}
            _write(spool, reader.schema, reader)
            return
        except pa.ArrowInvalid as error:
            found = re.search(r"In CSV column #(\d+): .*conversion error", str(error))
            name = list(known)[int(found[1])] if found else ""
            if not found or known[name] == LADDER[-1]:
                raise
            known[name] = LADDER[LADDER.index(known[name]) + 1]


def _spool_json(path: Path, spool: Path, types: pa.Schema | None) -> None:
    """Types are those of the first lines; if later ones differ, all are looked through first."""
    try:
        _stream_json(path, spool, types)
    except pa.ArrowInvalid:
        if types is not None:
            raise
        _stream_json(path, spool, _json_types(path))


def _stream_json(path: Path, spool: Path, types: pa.Schema | None) -> None:
    import pyarrow.json as pajson

    options = pajson.ReadOptions(block_size=_JSON_BYTES)
    parse = pajson.ParseOptions(explicit_schema=types)
    reader = pajson.open_json(pa.input_stream(str(path)), read_options=options, parse_options=parse)
    _write(spool, reader.schema, reader)


def _json_types(path: Path) -> pa.Schema:
    """The types that hold every line, from runs of whole lines."""
    import pyarrow.json as pajson

    kinds: dict[str, pa.DataType] = {}
    with pa.input_stream(str(path)) as lines:
        text = rest = b""
        while (text := lines.read(_JSON_BYTES)) or rest:
            whole, _, rest = (rest + (text or b"\n")).rpartition(b"\n")
            if whole.strip():
                options = pajson.ReadOptions(block_size=len(whole) + 1)
                schema = pajson.read_json(pa.BufferReader(whole), read_options=options).schema
                kinds |= {f.name: _join(kinds.get(f.name, f.type), f.type) for f in schema}
    return pa.schema(list(kinds.items()))


def _write(spool: Path, schema: pa.Schema, batches: Any) -> None:
    with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _unify(parts: list[Any]) -> None:
    """One schema for all parts, in place; text files are read anew with the wider types."""
    first = parts[0]
    for part in parts[1:]:
        here, want = part.schema.names, first.schema.names
        if here != want:
            odd = sorted(set(here) ^ set(want)) or here
            came = f"{part.name} with other columns than {first.name} ({', '.join(odd[:5])})"
            raise InputError(f"input: got {came}, want the same columns in every file")
    while True:  # a file may turn out to need a still wider type than the files agreed on
        schema = pa.schema([_common(parts, name) for name in first.schema.names])
        narrow = [i for i, part in enumerate(parts) if not part.schema.equals(schema)]
        if not isinstance(first, TextPart) or not narrow:
            return
        for i in narrow:
            parts[i] = parts[i].retyped(schema)


def _common(parts: list[Any], name: str) -> pa.Field:
    types = [part.schema.field(name).type for part in parts]
    if any(kind != types[0] for kind in types) and not isinstance(parts[0], TextPart):
        kinds = {str(kind): part for kind, part in zip(types, parts, strict=True)}
        listed = ", ".join(f"{kind} in {part.name}" for kind, part in kinds.items())
        raise InputError(f"input: column {name!r} has types {listed}; want one type in every file")
    return pa.field(name, reduce(_join, types))


def _join(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The narrowest type that may hold the values of both; reading tells whether it does."""
    if one == other:
        return one
    if one in LADDER and other in LADDER:
        return LADDER[max(LADDER.index(one), LADDER.index(other))]
    try:  # the lists and structures of JSON
        pair = [pa.schema([("x", one)]), pa.schema([("x", other)])]
        return pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _require_once(part: Any) -> None:
    names = part.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    where = f"{part.name} with two columns" if part.name else "two columns"
    require(not twice, "input", f"{where} {', '.join(twice)}", "one each")


def _arrays_table(arrays: Mapping[str, Any]) -> pa.Table:
    """Named arrays as columns; an array of several dimensions gives a column a value."""
    columns: dict[str, Any] = {}
    lengths = {}
    for name, values in arrays.items():
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else np.asarray(values)
        shape = array.shape if isinstance(array, np.ndarray) else (len(array),)
        require(len(shape) >= 1, "input", f"{name}, a single number", "arrays with rows")
        lengths[name] = len(array)
        wide = [name] if len(shape) == 1 else [f"{name}{j}" for j in range(math.prod(shape[1:]))]
        twice = sorted(columns.keys() & set(wide))
        require(not twice, "input", f"two columns {', '.join(twice)}", "one each")
        if len(shape) == 1:
            columns[name] = pa.array(array) if isinstance(array, np.ndarray) else array
            continue
        flat = array.reshape(len(array), -1)
        for j, column in enumerate(wide):
            columns[column] = pa.array(np.ascontiguousarray(flat[:, j]))
    require(len(set(lengths.values())) <= 1, "input", f"arrays of lengths {lengths}", "one length")
    return pa.table(columns)


@contextmanager
def _closing() -> Iterator[None]:
    yield None
