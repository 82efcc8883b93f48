"""`scoredraw score rows|examples`: one number a row, written beside the row's position."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from scoredraw.cli import options as o
from scoredraw.errors import require

app = typer.Typer()


@app.command(
    epilog="Example: scoredraw score rows table.parquet --method lewis --p 1 -o scores.parquet"
)
def rows(
    source: o.Input,
    method: str = typer.Option(
        ..., "--method", "-m", help="How rows are scored: see `draw rows -h`."
    ),
    out: o.Out = None,
    target: o.Target = None,
    columns: o.Columns = None,
    p: o.P = None,
    ridge: o.Ridge = None,
    set_: o.Set = None,
    seed: o.Seed = 0,
    engine: o.EngineName = "local",
    workers: o.Workers = None,
    batch_rows: o.BatchRows = 131_072,
    as_json: o.Json = False,
) -> None:
    """Score the rows of a matrix: what each weighs in any fit."""
    chosen = o.settings(set_) | o.given(p=p, ridge=ridge)
    settings = {"target": target, "columns": o.split(columns), "seed": seed, **chosen}
    _score("rows", source, method, out, batch_rows, engine, workers, as_json, settings)


@app.command(
    epilog="Examples: scoredraw score examples train.csv --target label --method el2n -o a.csv; "
    "scoredraw score examples pairs.jsonl --method ches --model small -o scores.parquet"
)
def examples(
    source: o.Input,
    method: str = typer.Option(..., "--method", "-m", help="See `draw examples -h`."),
    target: o.Target = None,
    out: o.Out = None,
    columns: o.Columns = None,
    text: o.Text = None,
    probe: o.Probe = None,
    seeds: o.Seeds = None,
    epochs: o.Epochs = None,
    model: o.Model = None,
    set_: o.Set = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Score training examples: what each is worth to a learner, or does to it."""
    chosen = o.settings(set_) | o.given(probe=probe, seeds=seeds, epochs=epochs, model=model)
    settings = {"target": target, "columns": o.split(columns), "text": text, "seed": seed, **chosen}
    _score("examples", source, method, out, 131_072, "local", None, as_json, settings)


def _score(
    kind: str,
    source: str,
    method: str,
    out: Path | None,
    batch_rows: int,
    engine: str,
    workers: int | None,
    as_json: bool,
    settings: dict[str, Any],
) -> None:
    import numpy as np

    from scoredraw import verbs
    from scoredraw.cli.outcome import report_outcome, written_by
    from scoredraw.table_output import require_format, write_table
    from scoredraw.tables import open_table

    require(out is not None, "out", "nothing", "-o FILE to write the scores to")
    assert out is not None
    require_format(out)
    begun = time.perf_counter()
    table = open_table(source, batch_rows=batch_rows)
    with o.engine(engine, workers, f"scoring by {method}") as runs:
        scores = verbs.score(kind, table, method=method, engine=runs, **settings)
    import pyarrow as pa

    result = pa.table({"_row": np.arange(len(scores)), "_score": scores})
    made = written_by(kind=kind, method=method, seed=settings["seed"], input=str(source))
    write_table(out, result.schema, result.to_batches(), made)
    report_outcome(method, table.num_rows, len(scores), begun, out, as_json)
