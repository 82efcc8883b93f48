"""Tables out: record batches to any of the formats read, whole or not at all.

Parquet and Arrow files carry their provenance (what made them, from what, with which seed) in the
schema's metadata under `scoredraw`; `provenance(path)` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path
from scoredraw.tables import FORMATS, suffix

if TYPE_CHECKING:
    import pyarrow as pa

Write = Callable[["pa.RecordBatch"], Any]


def require_format(path: str | Path) -> None:
    """InputError unless the extension is a format that can be written."""
    path = Path(path)
    require(suffix(path) in FORMATS, "out", str(path), "a name ending in " + " or ".join(FORMATS))
    folder = path.parent
    require(not path.is_dir(), "out", f"{path}, which is a folder", "a file's path")
    require(folder.is_dir(), "out", f"{path} in a folder that does not exist", "an existing folder")


def write_table(
    path: str | Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    provenance: dict[str, Any],
) -> int:
    """Stream batches into a file of the format its extension names; return the rows written.

    Raises InputError if it cannot be written (a folder that is not there, a full disk, text in a
    .npy); then, as on an interrupt, no file is left behind and an older one stays as it was.
    """
    path = Path(path)
    require_format(path)
    meta = {**(schema.metadata or {}), b"scoredraw": json.dumps(provenance).encode()}
    schema = schema.with_metadata(meta)
    import pyarrow as pa

    rows = 0
    try:
        with atomic_path(path) as temporary, _writer(temporary, suffix(path), schema) as write:
            for batch in batches:
                write(batch)
                rows += batch.num_rows
    except pa.ArrowException as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"out: cannot write {path}: {why}") from None
    return rows


def provenance(path: str | Path) -> dict[str, Any]:
    """What a file written by `write_table` says of its making; {} if it says nothing."""
    from scoredraw.tables import open_table

    text = (open_table(path).schema.metadata or {}).get(b"scoredraw")
    return dict(json.loads(text)) if text else {}


@contextmanager
def _writer(path: Path, kind: str, schema: pa.Schema) -> Iterator[Write]:
    if kind == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, schema) as parquet:
            yield lambda batch: parquet.write_batch(batch.replace_schema_metadata(schema.metadata))
    elif kind in (".arrow", ".feather"):
        import pyarrow as pa

        # A file holds one dictionary a column, batches have their own: they are written out.
        plain = pa.schema([_decoded(field) for field in schema], metadata=schema.metadata)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, plain) as ipc:
            yield lambda batch: ipc.write_batch(batch.cast(plain))
    elif kind in (".csv", ".csv.gz"):
        import pyarrow as pa
        import pyarrow.csv as pacsv

        compression = "gzip" if kind.endswith(".gz") else None
        flat = [field.name for field in schema if pa.types.is_nested(field.type)]
        require(
            not flat, "out", f"a CSV for the list column {flat[:1]}", "a .parquet or .arrow file"
        )
        with (
            pa.output_stream(str(path), compression=compression) as sink,
            pacsv.CSVWriter(sink, schema) as writer,
        ):
            yield writer.write_batch
    elif kind in (".jsonl", ".jsonl.gz"):
        import pyarrow as pa

        compression = "gzip" if kind.endswith(".gz") else None
        with pa.output_stream(str(path), compression=compression) as sink:
            yield lambda batch: sink.write(_json_lines(batch))
    else:
        arrays: list[pa.RecordBatch] = []
        yield arrays.append
        _write_numpy(path, kind, schema, arrays)


def _decoded(field: pa.Field) -> pa.Field:
    import pyarrow as pa

    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _json_lines(batch: pa.RecordBatch) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in batch.to_pylist())
    return "".join(f"{line}\n" for line in lines).encode()


def _write_numpy(path: Path, kind: str, schema: pa.Schema, batches: list[Any]) -> None:
    import pyarrow as pa

    table = pa.Table.from_batches(batches, schema=schema)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    text = [name for name, column in columns.items() if column.dtype.kind not in "fiub"]
    if text:
        raise InputError(f"out: got text in column {text[0]!r}, want numbers only in a {kind} file")
    with path.open("wb") as file:
        if kind == ".npz":
            np.savez(file, **columns)
        else:
            np.save(file, np.column_stack(list(columns.values())))
