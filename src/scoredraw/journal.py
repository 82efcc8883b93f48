"""Everything that is written to disk passes here: whole files or none, and logs that resume.

`atomic_path` gives a temporary neighbour and renames it at the end, so that an error, Ctrl-C or
kill -9 leaves either the old file or the new one. `Journal` appends one JSON line a finished
piece of work; a line cut off by a kill is dropped when the log is read again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scoredraw.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well.

    The temporary file is hidden, keeps the extension, and is removed on any error, an interrupt
    included. Raises InputError if the folder cannot be written or the disk is full.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"out: got {path}, which is a folder, want a file's path")
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=f".partial{''.join(path.suffixes)}", dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        raise InputError(f"out: cannot write {path}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"out: cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


class Journal:
    """A log of finished pieces of work, one JSON object a line, safe against kill -9.

    >>> import tempfile
    >>> journal = Journal(Path(tempfile.mkdtemp()) / "runs.jsonl")
    >>> journal.append({"repeat": 0, "accuracy": 0.9}); journal.records()
    [{'repeat': 0, 'accuracy': 0.9}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it is on the disk when this returns."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(record, allow_nan=True) + "\n"
            with self.path.open("a+b") as log:
                # A line cut off by a kill must not swallow this one.
                if log.tell() and (log.seek(-1, os.SEEK_END), log.read(1))[1] != b"\n":
                    line = "\n" + line
                log.write(line.encode())
                log.flush()
                os.fsync(log.fileno())
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"journal: cannot write {self.path}: {why}") from None

    def records(self) -> list[dict[str, Any]]:
        """All whole records, in order."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [record for record in found if isinstance(record, dict)]
