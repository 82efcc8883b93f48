"""What `plan` shows: the answer in words, tables on the terminal, a page of figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scoredraw.cli.outcome import written_by
from scoredraw.pages import Page, cell_text
from scoredraw.reports import Cell, ReportTable, stamp

if TYPE_CHECKING:
    from scoredraw.data_selection.budget_plan import BudgetPlan
    from scoredraw.data_selection.mixture_plan import MixturePlan


def budget_page(plan: BudgetPlan, name: str, money: float) -> Page:
    """The next batch, where the whole budget goes, and what other rules would give."""
    bought = (plan.counts - plan.held).tolist()
    batch = counted(plan.names, plan.next_batch.tolist())
    answer = f"Collect next: {batch}. The whole {money:g} would buy {counted(plan.names, bought)}."
    for rule, gain in plan.gains.items():
        verdict = "" if gain.above(0) or gain.below(0) else ", which cannot be told from none"
        answer += f" Over {rule} numbers that gains {gain} in utility{verdict}."
    rows: list[list[Cell]] = [
        [group, int(held), int(now), int(count), before, after]
        for group, held, now, count, before, after in zip(
            plan.names, plan.held, plan.next_batch, plan.counts, plan.before, plan.after,
            strict=True,
        )
    ]  # fmt: skip
    columns = ["group", "held", "next batch", "planned", "performance now", "performance then"]
    others: list[list[Cell]] = [
        [group, int(planned), *(int(counts[g]) for counts in plan.alternatives.values()),
         after.value, *(float(r[g]) for r in plan.alternative_performance.values())]
        for g, (group, planned, after) in enumerate(
            zip(plan.names, plan.counts, plan.after, strict=True)
        )
    ]  # fmt: skip
    rules = ["plan", *plan.alternatives]
    heads = [f"{rule}: {what}" for what in ("examples", "performance") for rule in rules]
    return Page(
        title="Of which group to collect the next examples",
        kicker=f"scoredraw plan budget · {name}",
        answer=answer,
        tables=[
            ReportTable("The plan", columns, rows),
            ReportTable("The same money by other rules", ["group", *heads], others),
        ],
        figures=plan.figures(),
        notes=plan.notes,
        provenance={**written_by(kind="plan"), **stamp()},
    )


def counted(names: Sequence[str], counts: Sequence[int]) -> str:
    """What there is some of, as a person says it.

    >>> counted(["young", "old"], [20, 0])
    '20 of young'
    """
    some = [f"{n:,} of {name}" for name, n in zip(names, counts, strict=True) if n]
    return ", ".join(some) or "nothing"


def mixture_table(plan: MixturePlan) -> dict[str, list[Any]]:
    """A row a source: share and rows to collect."""
    return {
        "source": list(plan.sources),
        "share": plan.shares.tolist(),
        "rows": plan.counts.tolist(),
    }


def mixture_page(plan: MixturePlan, name: str) -> Page:
    """The mixture, what it should give, and why to believe it."""
    wanted = counted(plan.sources, plan.counts.tolist())
    answer = (
        f"Collect {wanted}: the forecast accuracy at {plan.n:,} rows is {plan.performance}, "
        f"against {plan.even} for an even split."
    )
    if plan.chosen == "even":
        answer += " No other mixture did better in the final round."
    elif not plan.gain.above(0):
        answer += " That gain cannot be told from none: an even split may do as well."
    return Page(
        title="Which mixture of sources to collect",
        kicker=f"scoredraw plan mixture · {name}",
        answer=answer,
        tables=[plan.table()],
        figures=plan.figures,
        notes=plan.notes,
        provenance={**written_by(kind="plan"), **stamp()},
    )


def print_plan(page: Page) -> None:
    """The page's tables, answer and notes on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for found in page.tables:
        table = Table(title=Text(found.title), title_justify="left")
        for i, column in enumerate(found.columns):
            table.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
        for row in found.rows:
            table.add_row(*(Text(cell_text(cell)) for cell in row))
        console.print(table)
    console.print(Text(page.answer))
    for note in page.notes:
        console.print(Text(f"- {note}", style="dim"))
