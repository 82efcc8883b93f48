"""`scoredraw plan budget|mixture`: what to collect or mix, before it is collected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli import options as o
from scoredraw.cli.compare import check_report, progress_bar

if TYPE_CHECKING:
    from scoredraw.data_selection.budget_plan import BudgetPlan
    from scoredraw.data_selection.mixture_plan import MixturePlan

app = typer.Typer()


@app.command(
    epilog="Example: scoredraw plan budget groups.csv --budget 5000 --utility maximin "
    "--report page.html"
)
def budget(
    groups: Annotated[
        str,
        typer.Argument(
            metavar="GROUPS",
            help="A table with a row a measurement: group, n, performance, cost; perhaps se, "
            "weight, share, pool.",
            show_default=False,
        ),
    ],
    money: Annotated[float, typer.Option("--budget", help="To spend on further examples.")],
    out: o.Out = None,
    utility: Annotated[
        str, typer.Option(help="sum, log, sqrt, crra:ETA, maximin or gap:LAMBDA of performances.")
    ] = "sum",
    family: Annotated[
        str, typer.Option(help="Of learning curves: root, power, saturating, daetwyler, isotonic.")
    ] = "root",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Examples a round.", show_default="a twentieth of the budget"),
    ] = None,
    explore: Annotated[float, typer.Option(help="Share of a round that goes to all.")] = 0.1,
    resamples: Annotated[int, typer.Option(min=0, help="Disturbed plans, for intervals.")] = 200,
    seed: o.Seed = 0,
    report: o.ReportPage = None,
    as_json: o.Json = False,
) -> None:
    """From what groups' models reach so far: of which group to collect the next examples.

    A learning curve is fitted to each group's measurements; the budget goes where it raises the
    utility of all groups' performances most. Measure again after every batch and plan anew.
    """
    from scoredraw.cli.plan_page import budget_page
    from scoredraw.data_selection.budget_plan import plan_budget
    from scoredraw.example_inputs import measurements

    check_files(out, report)
    plan: BudgetPlan = plan_budget(
        measurements(groups),
        money,
        utility=utility,
        family=family,  # type: ignore[arg-type]
        batch=batch,
        explore=explore,
        resamples=resamples,
        rng=seed,
    )
    deliver(plan.table(), budget_page(plan, groups, money), list(plan.notes), out, report, as_json)


@app.command(
    epilog="Example: scoredraw plan mixture pilots.parquet --validation wanted.parquet "
    "--target label --source vendor --rows 10000 --report page.html"
)
def mixture(
    source_table: o.Input,
    validation: Annotated[
        str, typer.Option(help="A table of what the model will be judged on.", metavar="FILE")
    ],
    target: Annotated[str, typer.Option(help="The column of labels.", metavar="COL")],
    source: Annotated[str, typer.Option(help="The column of sources.", metavar="COL")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to be collected.")],
    out: o.Out = None,
    columns: o.Columns = None,
    text: o.Text = None,
    model: Annotated[str, typer.Option(help="logistic, forest or nearest.")] = "logistic",
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Two pilot sizes.", metavar="N0,N1", show_default="half a source, a source"
        ),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(min=1, help="Steps a share is cut into.", show_default="fine")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings a mixture and size.")] = 3,
    form: Annotated[str, typer.Option(help="Of the fitted surface: auto chooses by BIC.")] = "auto",
    link: Annotated[str, typer.Option(help="log_error or identity, from size to size.")] = (
        "log_error"
    ),
    log: o.Log = None,
    seed: o.Seed = 0,
    report: o.ReportPage = None,
    as_json: o.Json = False,
) -> None:
    """From pilot rows of several sources: how many of each to collect, and what that should give.

    A quick model is trained on mixtures of the pilots at two sizes; optimal transport to the
    validation rows and those trainings forecast every mixture at every size.
    """
    from scoredraw.cli.plan_page import mixture_page, mixture_table
    from scoredraw.data_selection.mixture_plan import plan_mixture
    from scoredraw.errors import require
    from scoredraw.example_inputs import pilots

    check_files(out, report)
    pair = o.whole(sizes, "sizes")
    require(pair is None or len(pair) == 2, "sizes", sizes, "two counts, as 500,1000")
    data = pilots(
        source_table, validation, target=target, source=source, columns=o.split(columns), text=text
    )
    with progress_bar() as progress:
        plan: MixturePlan = plan_mixture(
            *data, n=rows, model=model, sizes=None if pair is None else (pair[0], pair[1]),
            grid=grid, repeats=repeats, form=form, link=link, rng=seed, journal=log,
            progress=lambda done, total: progress("pilot trainings", done, total),
        )  # fmt: skip
    deliver(mixture_table(plan), mixture_page(plan, source_table), plan.notes, out, report, as_json)


def check_files(out: Path | None, report: Path | None) -> None:
    """Find out before the work whether what was asked for can be written."""
    from scoredraw.errors import require
    from scoredraw.table_output import require_format

    if out is not None:
        require(out.parent.is_dir(), "out", out, "a file in an existing folder")
        require_format(out)
    if report is not None:
        check_report(report)


def deliver(
    table: dict[str, list[Any]],
    page: Any,
    notes: list[str],
    out: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Write the plan and its page where asked, then print it."""
    import json

    import pyarrow as pa

    from scoredraw.cli.outcome import written_by
    from scoredraw.cli.plan_page import print_plan
    from scoredraw.reports import plain
    from scoredraw.table_output import write_table

    if out is not None:
        made = pa.table(table)
        write_table(out, made.schema, made.to_batches(), written_by(kind="plan"))
    if report is not None:
        page.save(report)
    if as_json:
        facts = {"answer": page.answer, "plan": table, "notes": notes}
        typer.echo(json.dumps(plain(facts), indent=2, allow_nan=False))
        return
    print_plan(page)
    for path in (out, report):
        if path is not None:
            typer.echo(f"wrote {path}")
