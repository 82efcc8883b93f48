"""A table that grows while something trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

SHOWN = 12  # rows of the table


class Show(Protocol):
    """Adds a row: the number of a step, of how many, its values by name, a note under the table."""

    def __call__(self, step: int, total: int, row: Mapping[str, float], note: str = "") -> None: ...


@contextmanager
def live_table(what: str, columns: Mapping[str, str]) -> Iterator[Show]:
    """The last steps as a table where someone is looking, else a line a tenth of the run.

    what: a step's name; columns: name of a value -> heading; those that no row has are not shown.
    """
    if not sys.stderr.isatty():

        def line(step: int, total: int, row: Mapping[str, float], note: str = "") -> None:
            if step == total or step % max(total // 10, 1) == 0:
                shown = ", ".join(f"{columns[k]} {row[k]:.3g}" for k in columns if k in row)
                print(f"{what} {step} of {total}: {shown}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    kept: list[tuple[int, Mapping[str, float]]] = []
    with Live(console=Console(stderr=True), transient=True) as live:

        def show(step: int, total: int, row: Mapping[str, float], note: str = "") -> None:
            kept.append((step, row))
            del kept[:-SHOWN]
            held = [k for k in columns if any(k in row for _, row in kept)]
            shown = Table(what, *(columns[k] for k in held), caption=f"of {total} {what}s{note}")
            for number, values in kept:
                shown.add_row(
                    str(number), *(f"{values[k]:.3g}" if k in values else "" for k in held)
                )
            live.update(shown)

        yield show
