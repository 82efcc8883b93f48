"""`scoredraw draw rows|examples|answers`: choose rows, write them with their weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli import options as o
from scoredraw.errors import InputError, require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scoredraw.draws import Draw
    from scoredraw.tables import Table
    from scoredraw.verbs import Job

app = typer.Typer()
RESERVED = ("_row", "_weight", "_score")

Size = Annotated[
    str | None,
    typer.Option(help="How many rows to keep: 500, 1%, or several: 1%,5%.", metavar="N|P%[,...]"),
]
Scores = Annotated[
    Path | None, typer.Option(help="A table with a `_score` a row, in place of --method.")
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="poisson, priority, exponential_keys, systematic, pivotal, multinomial, residual or "
        "top_k; the method's own if not given."
    ),
]
Map = Annotated[str | None, typer.Option(help="linear, softmax or rank: from scores to chances.")]
By = Annotated[str | None, typer.Option(help="Draw each value's share.", metavar="COL")]
Id = Annotated[
    str | None, typer.Option("--id", help="Rows keep their luck by this column.", metavar="COL")
]
Cost = Annotated[str | None, typer.Option(help="What a row costs.", metavar="COL")]
Budget = Annotated[float | None, typer.Option(help="What the rows may cost (with --cost).")]
Keep = Annotated[Path | None, typer.Option(help="A table of rows to keep for certain.")]
Exclude = Annotated[Path | None, typer.Option(help="A table of rows never to draw.")]
ReportFile = Annotated[
    Path | None, typer.Option(help="A page about the draw.", metavar="FILE.html")
]
Method = Annotated[str | None, typer.Option("--method", "-m", help="How rows are scored.")]


@app.command(
    epilog="Methods: uniform, leverage, ridge-leverage, lewis, sensitivity, root-leverage, "
    "sensitivity-leverage, split. "
    "Example: scoredraw draw rows 'data/*.parquet' --method lewis --p 1 --size 1% -o kept.parquet"
)
def rows(
    source: o.Input,
    method: Method = None,
    size: Size = None,
    out: o.Out = None,
    scores: Scores = None,
    scheme: Scheme = None,
    target: o.Target = None,
    columns: o.Columns = None,
    by: By = None,
    id_: Id = None,
    cost: Cost = None,
    budget: Budget = None,
    keep: Keep = None,
    exclude: Exclude = None,
    map_: Annotated[str | None, typer.Option("--map", help="linear, softmax or rank.")] = None,
    p: o.P = None,
    ridge: o.Ridge = None,
    rounds: o.Rounds = None,
    set_: o.Set = None,
    seed: o.Seed = 0,
    engine: o.EngineName = "local",
    workers: o.Workers = None,
    batch_rows: o.BatchRows = 131_072,
    report: ReportFile = None,
    as_json: o.Json = False,
) -> None:
    """Draw rows of a matrix so that a weighted fit on them is close to the fit on all."""
    request = Request("rows", source, method, size, out, scores, scheme, map_, by, id_, cost,
                      budget, keep, exclude, seed, report, as_json)  # fmt: skip
    settings = {"target": target, "columns": o.split(columns)}
    settings |= o.settings(set_) | o.given(p=p, ridge=ridge, rounds=rounds)
    request.carry_out(settings, engine, workers, batch_rows)


@app.command(
    epilog="Methods, of labelled examples (--target): uniform, el2n, grand, forgetting, vog, "
    "tracin, pvi, k-center, facility-location, herding, uncertainty, add-one-in, dealrec, ccs, "
    "odis-probe, quad; of ratings (--columns, or measured on --text): odis; of --text, with "
    "--model: add-one-in-llm; of pairs (prompt, chosen, rejected), with --model: ches. "
    "Examples: scoredraw draw examples train.csv --target label --method vog --size 55% -o a.csv; "
    "scoredraw draw examples pairs.jsonl --method ches --size 90% -o kept.jsonl"
)
def examples(
    source: o.Input,
    method: Method = None,
    target: o.Target = None,
    size: Size = None,
    out: o.Out = None,
    scores: Scores = None,
    scheme: Scheme = None,
    columns: o.Columns = None,
    text: o.Text = None,
    by: By = None,
    id_: Id = None,
    cost: Cost = None,
    budget: Budget = None,
    keep: Keep = None,
    exclude: Exclude = None,
    map_: Annotated[str | None, typer.Option("--map", help="linear, softmax or rank.")] = None,
    probe: o.Probe = None,
    seeds: o.Seeds = None,
    epochs: o.Epochs = None,
    model: o.Model = None,
    log: o.Log = None,
    set_: o.Set = None,
    seed: o.Seed = 0,
    batch_rows: o.BatchRows = 131_072,
    report: ReportFile = None,
    as_json: o.Json = False,
) -> None:
    """Draw the training examples worth training on."""
    request = Request("examples", source, method, size, out, scores, scheme, map_, by, id_, cost,
                      budget, keep, exclude, seed, report, as_json)  # fmt: skip
    settings = {"target": target, "columns": o.split(columns), "text": text}
    settings |= o.settings(set_)
    settings |= o.given(probe=probe, seeds=seeds, epochs=epochs, model=model, log=log)
    request.carry_out(settings, "local", None, batch_rows)


@app.command(
    epilog="Methods: majority, bon, weighted, mean-logprob, sum-logprob, mean-probability, "
    "sum-probability, perplexity-consistency, rpc, bom, mob, soft-bon, mbr, uniform. "
    "Examples: scoredraw draw answers smollm2-arith --method rpc --size 2; scoredraw draw answers "
    "samples.jsonl --method bom --set alpha=0.05 --size 4 -o chosen.jsonl"
)
def answers(
    samples: o.SamplesInput,
    method: Annotated[str, typer.Option("--method", "-m", help="How they are chosen.")],
    size: Annotated[int, typer.Option(min=1, help="Answers to submit for a problem.")] = 1,
    out: o.Out = None,
    columns: o.SampleColumns = None,
    equal: o.Equal = "exact",
    pad: Annotated[
        str | None, typer.Option(help="frequency: fill up with the most frequent answers.")
    ] = None,
    set_: o.Set = None,
    seed: o.Seed = 0,
    report: ReportFile = None,
    as_json: o.Json = False,
) -> None:
    """Choose the answers to submit from many samples of each problem.

    The columns problem and answer (or text) are enough for a vote; reward, logprob, tokens and
    text bring the other methods. Where correct is there, the choice is graded.
    """
    from scoredraw.cli import draw_answers

    draw_answers.carry_out(
        samples, method, size, out, o.named_columns(columns), equal, pad, o.settings(set_), seed,
        report, as_json,
    )  # fmt: skip


def strata(column: Any) -> Any:
    """A code a row in the order of the values, whichever comes first: shares go by it on a tie."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        encoded = column.combine_chunks().dictionary_encode()
        order = pc.sort_indices(encoded.dictionary).to_numpy()
    except pa.ArrowNotImplementedError:
        raise InputError(f"by: got a column of type {column.type}, want labels") from None
    return np.argsort(order)[encoded.indices.to_numpy()]


class Request:
    """One `draw` command, checked before any work."""

    def __init__(
        self, kind: str, source: str, method: str | None, size: str | None, out: Path | None,
        scores: Path | None, scheme: str | None, map_: str | None, by: str | None,
        id_: str | None, cost: str | None, budget: float | None, keep: Path | None,
        exclude: Path | None, seed: int, report: Path | None, as_json: bool,
    ) -> None:  # fmt: skip
        require((method is None) != (scores is None), "method", "both or neither of --method and "
                "--scores", "one of them")  # fmt: skip
        require((cost is None) == (budget is None), "cost", "one of --cost and --budget", "both")
        require((size is None) != (budget is None), "size", "both or neither of --size and "
                "--budget", "one of them")  # fmt: skip
        self.kind, self.source, self.method, self.out = kind, source, method, out
        self.sizes: list[Any] = [budget] if size is None else (o.split(size) or [size])
        self.scores, self.scheme, self.map, self.by, self.id = scores, scheme, map_, by, id_
        self.cost, self.keep, self.exclude, self.seed = cost, keep, exclude, seed
        self.report, self.as_json = report, as_json

    def carry_out(
        self, settings: dict[str, Any], engine: str, workers: int | None, batch_rows: int
    ) -> None:
        """Score once, draw each size, write each draw."""
        from scoredraw import verbs
        from scoredraw.cli.outcome import outcome, sentence
        from scoredraw.table_output import require_format
        from scoredraw.tables import open_table, reserved

        begun = time.perf_counter()
        for path in (self.out, self.report):
            require(
                path is None or path.parent.is_dir(), "out", path, "a file in an existing folder"
            )
        if self.out is not None:
            require_format(self.out)
        table = open_table(self.source, batch_rows=batch_rows)
        reserved(table, RESERVED)
        n = table.num_rows
        sizes: list[float] = [
            verbs.parse_size(size, n) if self.cost is None else verbs.parse_budget(size)
            for size in self.sizes
        ]
        sizes = list(dict.fromkeys(sizes))  # a size asked for twice is drawn once
        restrictions = self._restrictions(table)
        with o.engine(engine, workers, f"scoring by {self.method or 'file'}") as runs:
            job = self._job(table, settings, runs)
            common: dict[str, Any] = {"scheme": self.scheme, "map": self.map, "seed": self.seed}
            common |= restrictions
            draws = [verbs.draw_job(job, size, **common) for size in sizes]
        facts = []
        for size, draw in zip(sizes, draws, strict=True):
            out = self._out(size) if len(sizes) > 1 else self.out
            if out is not None:
                self._write(table, draw, out)
            facts.append(outcome(self.method or "scores", n, len(draw), begun, out))
        if self.report is not None:
            from scoredraw.cli.draw_page import write_page

            scores = None if job.scores_nothing else job.scores(sizes[0])
            write_page(self.report, self.source, draws, scores)
        if self.as_json:
            typer.echo(json.dumps(facts[0] if len(facts) == 1 else facts, indent=2))
        else:
            for fact in facts:
                typer.echo(sentence(fact))

    def _restrictions(self, table: Table) -> dict[str, Any]:
        """What the columns and files named by options say: strata, identities, costs, rows."""
        from scoredraw.uniforms import hash_ids

        found: dict[str, Any] = {}
        if self.by is not None:
            column = table.column(self.by, "by")
            require(column.null_count == 0, "by", f"{column.null_count} empty cells in {self.by!r}",
                    "a value in every row")  # fmt: skip
            found["by"] = strata(column)
        if self.id is not None:
            found["ids"] = hash_ids(table.column(self.id, "id"))
        if self.cost is not None:
            found["costs"] = table.numbers(self.cost, "cost")
        for name, path in (("keep", self.keep), ("exclude_rows", self.exclude)):
            if path is not None:
                found[name] = self._rows_of(table, path, name.removesuffix("_rows"))
        return found

    def _rows_of(self, table: Table, path: Path, argument: str) -> Any:
        """The positions of the rows that another table names by `_row`, or by the --id column."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        from scoredraw.tables import open_table

        other = open_table(str(path))
        if self.id is None:
            have = "_row" in other.column_names
            require(have, argument, f"{path} without a column _row", "one, or --id COL")
            rows = other.numbers("_row", argument)
            require(bool(np.isfinite(rows).all()), argument, f"an empty _row in {path}", "numbers")
            return rows.astype(np.int64)
        ids, wanted = table.column(self.id, "id"), other.column(self.id, argument)
        try:
            places = pc.index_in(wanted.cast(ids.type), value_set=ids.combine_chunks())
        except pa.ArrowException:
            kinds = f"{wanted.type} in {path}", f"the input's {ids.type}"
            require(False, argument, f"column {self.id!r} of type {kinds[0]}", kinds[1])
        require(places.null_count == 0, argument, f"{places.null_count} ids of {path} that the "
                "input does not have", "ids of the input")  # fmt: skip
        return places.to_numpy()

    def _job(self, table: Table, settings: dict[str, Any], runs: Any) -> Job:
        from scoredraw import verbs

        if self.method is None:
            unused = next((name for name, value in settings.items() if value is not None), None)
            require(unused is None, str(unused), "an option of --method beside --scores", "one")
            return verbs.given_scores(self.kind, self._given_scores(table))
        aside = tuple(name for name in (self.by, self.id, self.cost) if name)
        return verbs.bind(
            self.kind, table, self.method, exclude=aside, engine=runs, seed=self.seed, **settings
        )

    def _given_scores(self, table: Table) -> Any:
        import numpy as np

        from scoredraw.tables import open_table

        given = open_table(str(self.scores))
        scores = given.numbers("_score", "scores")
        same = len(scores) == table.num_rows
        require(same, "scores", f"{len(scores):,} scores", f"{table.num_rows:,}, one a row")
        if "_row" not in given.column_names:
            return scores
        rows = given.numbers("_row", "scores")  # the file may have been sorted since
        order = np.argsort(rows, kind="stable")
        every = np.array_equal(rows[order], np.arange(len(rows)))
        require(every, "scores", f"a _row column of {self.scores} with gaps or repeats",
                f"every row from 0 to {len(rows) - 1}")  # fmt: skip
        return scores[order]

    def _out(self, size: Any) -> Path | None:
        """OUT for one of several sizes: kept.parquet -> kept-500.parquet."""
        from scoredraw.tables import suffix

        if self.out is None:
            return None
        kind = suffix(self.out)
        return self.out.with_name(f"{self.out.name[: -len(kind)]}-{size}{kind}")

    def _write(self, table: Table, draw: Draw, out: Path) -> None:
        import numpy as np
        import pyarrow as pa

        from scoredraw.cli.outcome import written_by
        from scoredraw.table_output import write_table

        order = np.argsort(draw.indices, kind="stable")
        rows = draw.indices[order]
        columns: dict[str, Any] = {"_row": rows, "_weight": draw.weights[order]}
        columns["_score"] = (
            np.full(len(draw), np.nan) if draw.scores is None else draw.scores[order]
        )
        schema = table.schema
        for name, values in columns.items():
            schema = schema.append(pa.field(name, pa.from_numpy_dtype(values.dtype)))

        def batches() -> Iterator[Any]:
            at = 0
            for batch in table.select(rows):
                stop = at + batch.num_rows
                added = [pa.array(values[at:stop]) for values in columns.values()]
                yield pa.RecordBatch.from_arrays([*batch.columns, *added], schema=schema)
                at = stop

        if not len(draw):
            raise InputError("size: got a draw without rows by chance, want a larger size")
        made = written_by(
            kind=self.kind, method=draw.method, n=draw.n, size=len(draw), seed=self.seed,
            unbiased=draw.unbiased, input=str(self.source),
        )  # fmt: skip
        write_table(out, schema, batches(), made)
