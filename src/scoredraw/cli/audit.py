"""`scoredraw audit`: how far to trust a number; `passk`: what more samples would buy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli.compare import check_report, progress_bar
from scoredraw.cli.options import (
    Json,
    ReportPage,
    SampleColumns,
    SamplesInput,
    Seed,
    Sizes,
    named_columns,
    whole,
)
from scoredraw.errors import InputError

if TYPE_CHECKING:
    from scoredraw.samples import Samples

app = typer.Typer()


@app.callback()
def verb() -> None:
    """How far to trust a number that a scorer gives."""


@app.command(
    epilog="Example: scoredraw audit passk samples.jsonl --target 0.9 --report page.html",
)
def passk(
    samples: SamplesInput,
    ks: Sizes = None,
    beyond: Annotated[
        str | None,
        typer.Option(help="Extrapolate to.", metavar="K,...", show_default="2, 10, 100 times n"),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="A coverage to reach, such as 0.9.", metavar="SHARE")
    ] = None,
    prompt_tokens: Annotated[float, typer.Option(min=0, help="Of a problem, for the price.")] = 0.0,
    input_price: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a million prompt tokens.", metavar="PRICE"),
    ] = None,
    output_price: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a million sampled tokens.", metavar="PRICE"),
    ] = None,
    cached_price: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a million cached tokens.", metavar="PRICE"),
    ] = None,
    columns: SampleColumns = None,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(min=1, help="Of the problems, for intervals.")] = 1000,
    seed: Seed = 0,
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Coverage of repeated samples: the curve, its future, and the gap to picking one answer.

    The columns problem and correct (true/false or 0/1) are enough. answer (and reward, logprob,
    tokens) bring the ways of choosing one answer without a verifier.
    """
    from scoredraw.cli.audit_page import audit_json, print_audit, write_page
    from scoredraw.language.coverage_audit import audit_coverage
    from scoredraw.samples import read_samples

    if report is not None:
        check_report(report)
    found = read_samples(samples, named_columns(columns))
    price = price_of(found, prompt_tokens, input_price, output_price, cached_price)
    with progress_bar() as progress:
        audit = audit_coverage(
            found, ks=whole(ks, "ks"), beyond=whole(beyond, "beyond"), target=target, cost=price,
            level=level, resamples=resamples, rng=seed, progress=progress,
        )  # fmt: skip
    priced = price is not None
    if report is not None:
        write_page(report, audit, priced)
    if as_json:
        typer.echo(audit_json(audit, priced))
        return
    print_audit(audit, priced)
    if report is not None:
        typer.echo(f"wrote {report}")


@app.command(
    epilog="Example: scoredraw audit proxy rollouts.jsonl --columns proxy=reward_model,true=passed "
    "--margin 0.1 --report proxy.html"
)
def proxy(
    rollouts: Annotated[
        str,
        typer.Argument(
            metavar="ROLLOUTS",
            help="A table with proxy and true rewards, stated confidence, or both.",
        ),
    ],
    columns: Annotated[
        str | None,
        typer.Option(
            help="Roles proxy, true, problem, episode, time, confidence.",
            metavar="ROLE=COL,...",
        ),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0.0, help="Differences of the proxy that mean nothing.")
    ] = None,
    gamma: Annotated[float, typer.Option(help="Discount of later steps (time).")] = 1.0,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Seed = 0,
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """How far a reward may be optimised, on rollouts of the policy you trust.

    proxy and true: their correlation, and the penalty it asks for. proxy and problem, with
    --margin: how much of the advantages comes from differences that mean nothing. confidence and
    true (0 or 1): whether stated confidence can be trusted.
    """
    from scoredraw.cli import audit_proxy

    audit_proxy.carry_out(rollouts, columns, margin, gamma, level, seed, report, as_json)


@app.command(
    epilog="Example: scoredraw audit watermark texts.jsonl --scheme kgw --key 42 --model small"
)
def watermark(
    texts: Annotated[
        str,
        typer.Argument(metavar="TEXTS", help="A table with a column of token ids, or of text."),
    ],
    scheme: Annotated[
        str, typer.Option(help="kgw, gumbel, randomised or permute_and_flip.")
    ] = "randomised",
    key: Annotated[int, typer.Option(help="The key the texts were written with.")] = 15485863,
    context: Annotated[int, typer.Option(min=1, help="Tokens that make a seed.")] = 1,
    gamma: Annotated[float, typer.Option(help="The green share (kgw).")] = 0.25,
    seeding: Annotated[str, typer.Option(help="hash, additive, skip, min or lefthash.")] = "hash",
    dedup: Annotated[
        str, typer.Option(help="Count a token in its context once (v2), a context once (v1), all.")
    ] = "v2",
    alpha: Annotated[float, typer.Option(help="The level of the tests.")] = 0.01,
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokens they are: small, stories or a folder.", metavar="MODEL"),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="The width of the model's logits, without --model.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="The column.", metavar="COL", show_default="ids, else text"),
    ] = None,
    report: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Which texts were written with a watermark's key, by exact tests.

    A text that does not know the key is flagged with the probability of the level, however
    repetitive it is; all texts are tested together (Holm). Token ids are surer than text, which
    may come back from the tokenizer as other tokens.
    """
    from scoredraw.cli import audit_watermark

    audit_watermark.carry_out(
        texts, model, column, vocab_size, report, as_json, scheme=scheme, key=key,
        context=context, gamma=gamma, seeding=seeding, dedup=dedup, alpha=alpha,
    )  # fmt: skip


def price_of(
    samples: Samples,
    prompt_tokens: float,
    input_price: float | None,
    output_price: float | None,
    cached_price: float | None,
) -> Callable[[float], Any] | None:
    """What k samples of a problem cost at these prices of a million tokens, or None."""
    from scoredraw.language.inference_cost import api_price

    if input_price is None and output_price is None:
        return None
    if output_price and samples.tokens is None:
        raise InputError("output_price: got one for samples without lengths, want a tokens column")
    length = 0.0 if samples.tokens is None else float(samples.tokens.mean())
    million = 1e6
    return partial(
        api_price, input_tokens=prompt_tokens, output_tokens=length,
        input_price=(input_price or 0.0) / million, output_price=(output_price or 0.0) / million,
        cached_price=None if cached_price is None else cached_price / million,
    )  # fmt: skip
