"""`scoredraw generate text`: sample a model by a method, into a table that the other verbs take."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli import generate_image, generate_structures
from scoredraw.cli import options as o
from scoredraw.errors import InputError, InterruptedWorkError, require

if TYPE_CHECKING:
    from scoredraw.endpoint_runs import Progress
    from scoredraw.models import Completion, Prompt
    from scoredraw.tables import Table

app = typer.Typer()
app.command(
    epilog="Methods: ddim, heun, deis, usf, time-shift, teleport (the model's own images); "
    "annealed, product, tilted, tree, tree-search, best-of-n (others). Examples: scoredraw "
    "generate image --method deis --steps 10 --size 64 -o grid.png; scoredraw generate image "
    "--method tilted --reward class:8 --steps 100 --set strength=4 -o bags.png"
)(generate_image.image)
app.command(
    epilog="Example: scoredraw generate tokens texts.jsonl --model FOLDER --length 64 -o made.jsonl"
)(generate_structures.tokens)
app.command(epilog="Example: scoredraw generate graph --size 16 -o graphs.jsonl")(
    generate_structures.graph
)
app.command(epilog="Example: scoredraw generate flow --size 64 --method gs-jacobi -o digits.png")(
    generate_structures.flow
)
PROMPT_COLUMNS = ("prompt", "problem", "question", "text")
SHOWN = 20  # samples that are printed where no file is asked for


@app.callback()
def verb() -> None:
    """Sample from a model."""


@app.command(
    epilog="Methods: sample, greedy, hedged (any model), cautious, deepening, watermarked (a model "
    "in this process). Examples: scoredraw generate text prompts.jsonl --model small --method "
    "hedged -n 5 -o pools.jsonl; scoredraw generate text gsm8k.jsonl --model "
    "http://localhost:8000/v1#qwen -n 32 --temperature 0.7 --answer 'answer is (\\S+)' "
    "--truth answer -o samples.jsonl"
)
def text(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="A table with a column prompt (problem, question or text)."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="small, stories, a folder, a file.gguf, or an endpoint's URL#NAME.",
            metavar="MODEL",
        ),
    ] = "small",
    method: Annotated[str, typer.Option("--method", "-m", help="How tokens are drawn.")] = "sample",
    n: Annotated[int, typer.Option("-n", "--samples", min=1, help="Samples of a prompt.")] = 1,
    out: o.Out = None,
    column: Annotated[
        str | None, typer.Option(help="The column of prompts.", metavar="COL")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="A prompt made of columns: 'Question: {question}\\nAnswer:'."),
    ] = None,
    plain: o.Plain = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a sample.")] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="1 if not given.")] = None,
    top_p: Annotated[float | None, typer.Option(help="The nucleus' share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the likeliest's p.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends a sample; again for more.")] = None,
    key: Annotated[int | None, typer.Option(help="Of a watermark.")] = None,
    set_: o.Set = None,
    answer: Annotated[
        str | None,
        typer.Option(help="A pattern whose last match (its group) is the answer.", metavar="REGEX"),
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="The column of right answers, to grade.", metavar="COL")
    ] = None,
    equal: o.Equal = "exact",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once (endpoints).")] = 8,
    prices: Annotated[
        str | None,
        typer.Option(help="Of a million prompt and sampled tokens.", metavar="IN,OUT"),
    ] = None,
    log: o.Log = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Sample texts from a model, into a table for draw, compare and audit.

    What is sampled is kept in a log beside OUT at once: the same command goes on from it, and
    pays for nothing twice.
    """
    from scoredraw.language.text_methods import MethodModel
    from scoredraw.math_answers import equality
    from scoredraw.open_models import open_model
    from scoredraw.table_output import require_format
    from scoredraw.tables import open_table

    begun = time.perf_counter()
    if out is not None:
        require_format(out)
    same, pattern = equality(equal), compiled(answer)
    require(truth is None or pattern is not None, "truth", "one without --answer", "both")
    table = open_table(prompts)
    asked = texts_of(table, column, template)
    truths = None if truth is None else table.column(truth, "truth").to_pylist()
    found = open_model(model, max_new_tokens=max_tokens, prices=two_prices(prices))
    sampler = MethodModel(found, method, **o.settings(set_), **o.given(key=key))
    request = o.given(temperature=temperature, top_p=top_p, min_p=min_p, stop=stop or None)
    ready = asked if plain or not chats(found) else conversations(asked)
    request |= {"max_tokens": max_tokens, "seed": seed, "concurrency": concurrency}
    made = collected(sampler, ready, n, log, out, request)
    rows = list(rows_of(asked, made, pattern, truths, same))
    if out is not None:
        write(rows, out, model=model, method=method, seed=seed, input=prompts)
    facts = summary(rows, method, n, begun, out)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if out is None:
        show_first(rows)
    typer.echo(sentence(facts))


def show_first(rows: list[dict[str, Any]]) -> None:
    """The first samples, and how many there are besides."""
    for row in rows[:SHOWN]:
        typer.echo(f"── {row['problem']!r}, sample {row['sample']}\n{row['text']}\n")
    if len(rows) > SHOWN:
        typer.echo(f"and {len(rows) - SHOWN:,} more samples (-o FILE writes them all)")


def collected(
    sampler: Any, prompts: Any, n: int, log: Path | None, out: Path | None, request: dict[str, Any]
) -> list[list[Completion]]:
    """The samples, by way of the log; an interrupt says where those that came are."""
    from scoredraw import endpoint_runs

    with log_beside(log, out) as path, meter(n * len(prompts)) as progress:
        try:
            return endpoint_runs.run(sampler, prompts, path, n=n, progress=progress, **request)
        except KeyboardInterrupt:
            kept = f"; what was sampled is in {path}, the same command goes on"
            told = kept if log or out else ""
            raise InterruptedWorkError(f"interrupted{told}") from None


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """A pattern with at most one group, or an InputError."""
    if pattern is None:
        return None
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise InputError(f"answer: got {pattern!r}: {error}, want a regular expression") from None
    require(found.groups <= 1, "answer", f"{found.groups} groups", "at most one")
    return found


def two_prices(text: str | None) -> tuple[float, float] | None:
    """`IN,OUT` as two numbers."""
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"prices: got {text!r}, want two numbers as 0.15,0.6") from None
    return first, second


def texts_of(table: Table, column: str | None, template: str | None) -> list[str]:
    """The prompts: a column, or a template filled in with each row's columns."""
    if template is not None:
        import numpy as np

        require(column is None, "column", "one beside --template", "one of them")
        every = table.select(np.arange(table.num_rows))
        try:
            return [template.format_map(row) for batch in every for row in batch.to_pylist()]
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"template: {error!r}, want columns in {{}}") from None
    names = (column,) if column else PROMPT_COLUMNS
    name = next((name for name in names if name in table.column_names), None)
    wanted = f"one of the columns {', '.join(table.column_names)}"
    require(name is not None, "column", repr(column or "none of " + ", ".join(names)), wanted)
    assert name is not None
    values = table.column(name, "column").to_pylist()
    for row, value in enumerate(values):
        fine = isinstance(value, str) and value.strip()
        require(bool(fine), "column", f"{value!r} in row {row}", "a text in every row")
    require(bool(values), "input", "no rows", "at least one prompt")
    return values


def chats(model: Any) -> bool:
    """Whether a model takes conversations: a server, or one with a chat template."""
    local = getattr(model, "tokenizer", None)
    return local is None or bool(getattr(local, "chat_template", None))


def conversations(texts: list[str]) -> list[Prompt]:
    """Each text as what the user says."""
    return [[{"role": "user", "content": text}] for text in texts]


@contextmanager
def log_beside(log: Path | None, out: Path | None) -> Iterator[Path]:
    """The file that holds the samples as they come: given, beside OUT, or for this run alone."""
    if log is None and out is not None:
        log = out.with_name(f"{out.name}.log.jsonl")
    if log is not None:
        yield log
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "log.jsonl"


@contextmanager
def meter(total: int) -> Iterator[Callable[[Progress], None] | None]:
    """Samples done, tokens a second and the cost so far, where someone is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def tell(at: Any) -> None:
            said = f"{at.tokens_per_second:.0f} tokens/s"
            said += "" if at.cost is None else f", {at.cost:.4g} spent"
            bar.update(task, completed=at.done, description=said)

        yield tell


def rows_of(
    prompts: list[str],
    made: list[list[Completion]],
    pattern: re.Pattern[str] | None,
    truths: list[Any] | None,
    same: Any,
) -> Iterator[dict[str, Any]]:
    """A row a sample, with the columns that `samples.read_samples` knows."""
    for i, (prompt, samples) in enumerate(zip(prompts, made, strict=True)):
        for j, one in enumerate(samples):
            known = one.logprobs is not None and one.logprobs.size > 0
            row: dict[str, Any] = {"problem": prompt, "sample": j, "text": one.text}
            if pattern is not None:
                row["answer"] = last_match(pattern, one.text)
            if truths is not None:
                row["truth"] = str(truths[i])
                row["correct"] = right(row["answer"], str(truths[i]), same)
            row["logprob"] = min(one.logprob, 0.0) if known else None
            row["tokens"] = len(one.logprobs) if one.logprobs is not None and known else None
            row["finished"] = one.finished
            row["ids"] = list(one.tokens)
            yield row


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's group (or the whole match), None without one.

    >>> last_match(re.compile(r"is (\\d+)"), "it is 3, no: it is 4")
    '4'
    """
    found = list(pattern.finditer(text))
    return None if not found else found[-1].group(min(1, pattern.groups))


def right(answer: str | None, truth: str, same: Any) -> bool:
    """Whether an answer is the right one."""
    return answer is not None and bool(same(answer, truth) if same else answer == truth)


def write(rows: list[dict[str, Any]], out: Path, **facts: Any) -> None:
    """The rows as a table; a column nothing is known in is left out."""
    import pyarrow as pa

    from scoredraw.cli.outcome import written_by
    from scoredraw.table_output import write_table

    table = pa.Table.from_pylist(rows)
    unknown = [
        name
        for name in ("logprob", "tokens", "ids")
        if all(row[name] is None or row[name] == [] for row in rows)
    ]
    table = table.drop_columns(unknown)
    write_table(out, table.schema, table.to_batches(), written_by(kind="text", **facts))


def summary(
    rows: list[dict[str, Any]], method: str, n: int, begun: float, out: Path | None
) -> dict[str, Any]:
    """What was sampled, as `--json` promises it."""
    tokens = [row["tokens"] for row in rows if row["tokens"] is not None]
    facts: dict[str, Any] = {
        "method": method, "prompts": len(rows) // n, "samples": len(rows),
        "tokens": sum(tokens) if len(tokens) == len(rows) else None,
        "seconds": round(time.perf_counter() - begun, 3), "out": None if out is None else str(out),
    }  # fmt: skip
    if rows and "answer" in rows[0]:
        facts["answered"] = sum(row["answer"] is not None for row in rows)
    if rows and "correct" in rows[0]:
        facts["correct"] = sum(row["correct"] for row in rows)
    return facts


def sentence(facts: dict[str, Any]) -> str:
    """The same facts for a person."""
    said = f"{facts['method']}: {facts['samples']:,} samples of {facts['prompts']:,} prompts"
    said += "" if facts["tokens"] is None else f", {facts['tokens']:,} tokens"
    said += f", {facts['answered']:,} with an answer" if "answered" in facts else ""
    said += f", {facts['correct']:,} right" if "correct" in facts else ""
    return f"{said}, in {facts['seconds']:.1f} s" + (f" -> {facts['out']}" if facts["out"] else "")
