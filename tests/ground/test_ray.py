"""A real local Ray cluster of two workers: the same bits as the local engine, the same errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scoredraw import verbs
from scoredraw.errors import InputError
from scoredraw.execution import Engine
from scoredraw.tables import open_table

ray = pytest.importorskip("ray", reason="the extra scoredraw[ray] is not installed")
pytestmark = pytest.mark.contract

N = 200_000  # 25 blocks: two Ray tasks
RAY = Engine("ray", workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    whole = pa.table({name: rng.standard_t(3, N) for name in "abc"})
    for i, (a, b) in enumerate([(0, 10), (10, 90_000), (90_000, N)]):
        pq.write_table(whole.slice(a, b - a), folder / f"part-{i}.parquet", row_group_size=20_000)
    return folder


def test_a_parquet_table_gives_the_same_bits(folder: Path) -> None:
    made = []
    for engine, batch_rows in ((Engine(workers=2), 131_072), (RAY, 5000)):
        table = open_table(folder, batch_rows=batch_rows)
        job = verbs.bind("rows", table, "lewis", p=1.0, engine=engine)
        draw = verbs.draw_job(job, "1%", seed=4)
        recursive = verbs.draw("rows", table, method="root-leverage", p=1.0, size=500,
                               engine=engine)  # fmt: skip
        made.append((job.scores(), draw.indices, draw.weights, recursive.indices,
                     recursive.weights))  # fmt: skip
    for local, remote in zip(*made, strict=True):
        np.testing.assert_array_equal(local, remote)


def test_an_array_in_memory_gives_the_same_bits() -> None:
    A = np.random.default_rng(1).standard_t(3, (N, 4))
    for method, options in (("leverage", {}), ("lewis", {"p": 1.0})):
        local = verbs.score("rows", A, method=method, engine=Engine(workers=1), **options)
        remote = verbs.score("rows", A, method=method, engine=RAY, **options)
        np.testing.assert_array_equal(local, remote)


def test_a_broken_row_is_named_from_inside_a_task(folder: Path, tmp_path: Path) -> None:
    A = np.ones((N, 2))
    A[150_001, 1] = np.nan
    want = "A: got nan at row 150001, column 1, want finite numbers"
    with pytest.raises(InputError) as error:
        verbs.score("rows", A, method="leverage", engine=RAY)
    assert str(error.value) == want
    pq.write_table(pa.table({"a": A[:, 0], "b": A[:, 1]}), tmp_path / "broken.parquet")
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "scoredraw", "draw", "rows", str(tmp_path / "broken.parquet"),
               "--method", "leverage", "--size", "10", "-o", str(out), "--engine", "ray",
               "--workers", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "scoredraw: A: got nan at row 150,001 of broken.parquet, column 'b', want finite numbers\n"
    )
    assert not out.exists()
