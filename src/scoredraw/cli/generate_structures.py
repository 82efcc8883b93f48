"""`scoredraw generate tokens|graph|flow`: masked diffusion, graph diffusion, flows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scoredraw.cli.generate_image import require_picture, waiting
from scoredraw.cli.options import Json, Seed, Set, settings
from scoredraw.errors import InputError, import_extra, require


def tokens(
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPTS", help="A table with a column text (or prompt)."),
    ],
    model: Annotated[
        str,
        typer.Option(help="A folder with a masked language model and tokenizer.", metavar="FOLDER"),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="first-hitting, ancestral, confidence, random-order or left-to-right.",
        ),
    ] = "first-hitting",
    length: Annotated[int, typer.Option(min=0, help="Masks put after each prompt.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Calls; one a token if not given (exact).")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--samples", min=1, help="Texts of a prompt.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The table to write.", metavar="OUT")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of prompts.")] = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fill in masks, or write on, by a masked language model: a masked diffusion without time."""
    from scoredraw.cli.generate import texts_of
    from scoredraw.diffusion.first_hitting import generate_tokens
    from scoredraw.table_output import require_format
    from scoredraw.tables import open_table

    if out is not None:
        require_format(out)
    asked = texts_of(open_table(prompts), column, None)
    network, tokenizer = masked_model(model)
    begun = time.perf_counter()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with waiting(f"{method}, {len(asked) * n} texts"):
        made = generate_tokens(
            network, ids, length, n, mask_id=tokenizer.mask_token_id, pad_id=pad, method=method,
            steps=steps, rng=seed, **settings(set_),
        )  # fmt: skip
    rows = [
        {"problem": text, "sample": j, "text": tokenizer.decode(one), "ids": one.tolist()}
        for text, texts in zip(asked, made, strict=True)
        for j, one in enumerate(texts)
    ]
    if out is not None:
        import pyarrow as pa

        from scoredraw.cli.outcome import written_by
        from scoredraw.table_output import write_table

        table = pa.Table.from_pylist(rows)
        facts = {"model": model, "method": method, "seed": seed, "input": prompts}
        write_table(out, table.schema, table.to_batches(), written_by(kind="tokens", **facts))
    elif not as_json:
        for row in rows[:20]:
            typer.echo(f"── {row['problem']!r}, sample {row['sample']}\n{row['text']}\n")
    say({"method": method, "texts": len(rows)}, begun, out, as_json)


def masked_model(folder: str) -> tuple[Any, Any]:
    """The model and tokenizer in a folder, or an InputError."""
    transformers = import_extra("transformers", "language")
    wanted = "a folder with a masked language model of transformers and its tokenizer"
    require(Path(folder).is_dir(), "model", folder, wanted)
    try:
        network = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"model: got {folder}: {error}, want {wanted}") from None
    require(tokenizer.mask_token_id is not None, "model", "a tokenizer without a mask", wanted)
    return network, tokenizer


def graph(
    size: Annotated[int, typer.Option("--size", "-n", min=1, help="Graphs.")] = 16,
    method: Annotated[str, typer.Option("--method", "-m", help="s4 or pc.")] = "s4",
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to graphs.")] = 200,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Lines of {n, edges}: .jsonl.", metavar="OUT"),
    ] = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Whole graphs by two coupled diffusions, from the shipped scores of two-community graphs."""
    from scoredraw.diffusion.graph_networks import generate_graphs
    from scoredraw.reports import write_text

    if out is not None:
        require(out.suffix == ".jsonl", "out", out.name, "a name that ends in .jsonl")
        require(out.parent.is_dir(), "out", str(out), "a file in an existing folder")
    begun = time.perf_counter()
    with waiting(f"{method}, {size} graphs"):
        made = generate_graphs(size, method=method, n_steps=steps, rng=seed, **settings(set_))
    lines = [
        json.dumps({"n": one.number_of_nodes(), "edges": [list(map(int, e)) for e in one.edges]})
        for one in made
    ]
    if out is not None:
        write_text(out, "\n".join(lines) + "\n")
    elif not as_json:
        typer.echo("\n".join(lines))
    say({"method": method, "graphs": len(made)}, begun, out, as_json)


def flow(
    model: Annotated[
        str, typer.Option(help="embedded (digits, 8 x 8), or a file of save_flow.")
    ] = "embedded",
    method: Annotated[
        str, typer.Option("--method", "-m", help="gs-jacobi, jacobi or sequential.")
    ] = "gs-jacobi",
    tol: Annotated[
        float, typer.Option(min=0, help="Where sweeps stop: 0 gives the sequential images.")
    ] = 1e-3,
    size: Annotated[int, typer.Option("--size", "-n", min=1, help="Images.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A grid as .png, or the arrays as .npz.", metavar="OUT"),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Images of an autoregressive flow, inverted in few passes instead of token by token."""
    import torch

    from scoredraw.cli.generate_image import save
    from scoredraw.papers.small_flow import METHODS, generate

    require_picture(out)
    begun = time.perf_counter()
    with waiting(f"{method}, {size} images"):
        source = None if model == "embedded" else model
        plan = replace(METHODS[method], tol=tol) if method in METHODS else None
        images, facts = generate(size, source, method, plan, seed=seed)
    if out is not None:
        save(torch.from_numpy(images), out, {"model": model, "method": method, "seed": seed})
    say(facts | {"method": method}, begun, out, as_json)


def say(facts: dict[str, Any], begun: float, out: Path | None, as_json: bool) -> None:
    """The facts as JSON, or in a line."""
    facts |= {"seconds": round(time.perf_counter() - begun, 3)}
    facts |= {"out": None if out is None else str(out)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    shown = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "out" and v is not None)
    typer.echo(shown + (f" -> {out}" if out else ""))
