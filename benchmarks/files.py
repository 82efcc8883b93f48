"""From a Parquet file to the chosen rows in a file, against merely reading the first one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.contest import Contest, Limit

GROUP_ROWS = 500_000


def draw(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """The time of `scoredraw draw rows --method leverage --size 1%`, and its memory."""
    from scoredraw.cli.draw import rows

    n, d = (20_000, 8) if tiny else (8_000_000, 32)
    with tempfile.TemporaryDirectory(prefix="scoredraw-benchmark-") as folder:
        source, kept = Path(folder, "rows.parquet"), Path(folder, "kept.parquet")
        write_rows(source, n, d)
        what = f"draw rows --method leverage --size 1%, Parquet, {n:,} x {d} float32"

        def ours() -> Path:
            with contextlib.redirect_stdout(io.StringIO()):
                rows(str(source), method="leverage", size="1%", out=kept)
            return kept

        def bare() -> int:
            return sum(batch.num_rows for batch in pq.ParquetFile(source).iter_batches())

        def came_through(out: Path, count: int) -> None:
            assert count == n
            require_rows_of(source, out, n, d)

        yield Contest(what, "PyArrow iter_batches", ours, bare, came_through, 5.0, repeats=5)

        def peak() -> float:
            options = ["--method", "leverage", "--size", "1%", "-o", str(kept), "--json"]
            command = [sys.executable, "-m", "scoredraw", "draw", "rows", str(source), *options]
            # A child starts with its parent's peak on its books: let that be the shell's.
            command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return float(json.loads(done.stdout)["peak_rss_mb"])

        yield Limit("peak memory of that command", "MB", peak, 700.0)


def write_rows(path: Path, n: int, d: int) -> None:
    """A file of n rows in groups, heavy-tailed so that the leverages differ; PyArrow's defaults."""
    rng = np.random.default_rng(0)
    schema = pa.schema([(f"x{j}", pa.float32()) for j in range(d)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, n, GROUP_ROWS):
            count = min(GROUP_ROWS, n - start)
            columns = rng.standard_normal((d, count), np.float32)
            columns *= rng.lognormal(0.0, 1.0, count).astype(np.float32)
            writer.write_table(pa.table(list(columns), schema=schema), row_group_size=GROUP_ROWS)
    os.sync()  # or the disk is still busy with it while the first turns are timed


def require_rows_of(source: Path, out: Path, n: int, d: int) -> None:
    """The written rows are the source's, their scores its leverages, and 1 % of them came."""
    kept, file = pq.read_table(out), pq.ParquetFile(source)
    position, score = kept["_row"].to_numpy(), kept["_score"].to_numpy()
    assert abs(len(kept) - n / 100) < 6 * np.sqrt(n / 100)
    gram = np.zeros((d, d))
    for batch in file.iter_batches():
        block = np.column_stack([column.to_numpy() for column in batch.columns]).astype(float)
        gram += block.T @ block
    first = file.read_row_group(0)
    inside = position < first.num_rows
    names = first.column_names
    chosen = np.column_stack([kept[name].to_numpy()[inside] for name in names])
    there = np.column_stack([first[name].to_numpy()[position[inside]] for name in names])
    assert np.array_equal(chosen, there)
    wide = chosen.astype(float)
    expected = (wide @ np.linalg.inv(gram) * wide).sum(1)
    np.testing.assert_allclose(score[inside], expected, rtol=1e-8)
