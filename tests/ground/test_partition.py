"""Partition invariance: no cut of a table into files, batches or workers shows in a result.

`draw` and `score` on one Parquet file are the reference; every example cuts the same rows into
other files of any format and reads them with other batches and workers. Scores, indices and
weights must be the same to the last bit. 20,000 rows are two and a half blocks.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw import verbs
from scoredraw.draws import Draw
from scoredraw.execution import Engine
from scoredraw.sampling import SCHEMES
from scoredraw.tables import open_table
from scoredraw.uniforms import hash_ids

pytestmark = pytest.mark.property

N = 20_000
METHODS = {
    "leverage": {},
    "ridge-leverage": {"ridge": 3.0},
    "lewis": {"p": 1.0},
    "root-leverage": {"p": 1.0},
    "sensitivity-upper": {"p": 1.0},
    "sensitivity-block": {"p": 1.0},
    "uniform": {},
}


@cache
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "name": [f"row-{i}" for i in range(N)],
            "a": rng.standard_t(2, N),
            "whole": rng.integers(-50, 50, N),
            "b": rng.standard_normal(N) * 1e-3,
            "c": rng.lognormal(0, 2, N),
            "group": np.array(["x", "y", "z"])[rng.integers(0, 3, N)],
        }
    )


def write(part: pa.Table, path: Path, row_groups: int) -> None:
    kind = path.suffix
    if kind == ".parquet":
        pq.write_table(part, path, row_group_size=row_groups)
    elif kind == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, part.schema) as ipc:
            ipc.write_table(part, max_chunksize=row_groups)
    elif kind == ".csv":
        pacsv.write_csv(part, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in part.to_pylist()))


def results(source, batch_rows: int, workers: int | None) -> dict[str, np.ndarray]:
    """Scores by every method, draws by every scheme and by strata and ids."""
    opened = open_table(source, batch_rows=batch_rows)
    engine = Engine(workers=workers)
    found: dict[str, np.ndarray] = {}

    def put(name: str, draw: Draw) -> None:
        found[f"{name} rows"], found[f"{name} weights"] = draw.indices, draw.weights

    for method, options in METHODS.items():
        job = verbs.bind("rows", opened, method, target="c", engine=engine, **options)
        if not job.scores_nothing:
            found[f"{method} scores"] = job.scores()
        put(method, verbs.draw_job(job, 500, seed=1))
        for scheme in SCHEMES if method in ("leverage", "lewis") else ():
            put(f"{method} {scheme}", verbs.draw_job(job, "3%", seed=2, scheme=scheme))
    ids = hash_ids(opened.column("name"))
    by = opened.column("group").to_numpy()
    put("strata", verbs.draw_job(job, 300, seed=3, by=by, ids=ids))
    return found


@cache
def reference() -> dict[str, np.ndarray]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "whole.parquet"
        pq.write_table(table(), path)
        return results(path, 131_072, 1)


def assert_same(found: dict[str, np.ndarray]) -> None:
    want = reference()
    assert found.keys() == want.keys()
    assert len(want) == len(METHODS) - 1 + 2 * (len(METHODS) + 2 * len(SCHEMES) + 1)
    for name, values in want.items():
        assert values.dtype == found[name].dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".arrow", ".jsonl"])
@settings(max_examples=12)
@given(
    cuts=st.lists(st.integers(0, N) | st.sampled_from([1, 8191, 8192, 16_384]), max_size=12),
    batch_rows=st.integers(50, 30_000) | st.sampled_from([8191, 8192, 8193]),
    workers=st.sampled_from([1, 2, 3]),
    row_groups=st.integers(500, 30_000),
)
def test_no_partition_shows(kind: str, cuts, batch_rows: int, workers: int, row_groups) -> None:
    edges = [0, *sorted(cuts), N]
    pieces = list(pairwise(edges))
    if kind == ".jsonl":  # a file of no lines has no columns and is refused
        pieces = [(a, b) for a, b in pieces if a < b]
    with TemporaryDirectory() as folder:
        for i, (a, b) in enumerate(pieces):
            write(table().slice(a, b - a), Path(folder) / f"part-{i}{kind}", row_groups)
        assert_same(results(folder, batch_rows, workers))


def test_memory_is_a_partition_too() -> None:
    chunked = pa.concat_tables([table().slice(0, 7), table().slice(7, 9000), table().slice(9007)])
    assert_same(results(chunked, 1234, 2))
    assert_same(results(table().to_pandas(), 131_072, None))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_arrays_and_sparse_matrices(workers: int) -> None:
    """Any number of workers gives the same bits on an array in memory, dense or CSR."""
    from scipy import sparse

    rng = np.random.default_rng(1)
    A = rng.standard_t(2, (N, 5))
    B = sparse.random_array((N, 8), density=0.3, rng=rng, format="csr")
    for matrix in (A, np.asfortranarray(A), A.astype(np.float32), B):
        for method, options in (("leverage", {}), ("lewis", {"p": 1.0}), ("ridge-leverage", {})):
            one = verbs.score("rows", matrix, method=method, engine=Engine(workers=1), **options)
            two = verbs.score(
                "rows", matrix, method=method, engine=Engine(workers=workers), **options
            )
            np.testing.assert_array_equal(one, two)
