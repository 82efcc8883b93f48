"""The command line: `scoredraw VERB KIND INPUT --method NAME`; a file a verb, no maths.

A person's mistakes (`InputError`, a missing extra, a wrong option) end with one line on standard
error and exit code 2, work that could not go on (`StoppedError`) with 1, Ctrl-C with 130, SIGTERM
with 143. What was being written is then gone,
what was finished is kept.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from scoredraw.cli import audit, compare, draw, generate, papers, plan, run, score, train
from scoredraw.errors import InputError, InterruptedWorkError, MissingExtraError, StoppedError

# click's, wherever this version of Typer keeps it
UsageError: Any = typer.BadParameter.__mro__[1]

INTERRUPTED = 130

app = typer.Typer(
    name="scoredraw",
    help="Score, then draw: choose the rows, examples and answers worth keeping.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: scoredraw draw rows table.parquet --method leverage --size 1% -o kept.parquet",
)
comparisons = typer.Typer()
comparisons.command("rows")(compare.rows)
comparisons.command("answers")(compare.answers)
comparisons.command("samplers")(compare.samplers)
for verb, group, text in (
    ("compare", comparisons, "Which way of choosing is worth it on your data, against uniform."),
    ("score", score.app, "Give every row a score and write them."),
    ("draw", draw.app, "Choose rows by a method's scores and write them, weighted."),
    ("generate", generate.app, "Sample from a model: texts, images, tokens, graphs."),
    ("train", train.app, "Search or train what a method needs."),
    ("plan", plan.app, "What to collect or mix, before it is collected."),
    ("audit", audit.app, "How far to trust a number, and what it hides."),
):
    app.add_typer(group, name=verb, help=text, no_args_is_help=True)
app.command("papers")(papers.papers)
app.command("run")(run.run)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"scoredraw {version('scoredraw')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Score, then draw: choose the rows, examples and answers worth keeping."""


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"scoredraw: note: {message}", file=sys.stderr)


def main() -> None:
    """The `scoredraw` command."""
    warnings.simplefilter("once")
    warnings.simplefilter("ignore", DeprecationWarning)  # of libraries, to their developers
    warnings.showwarning = _say_warning
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files go
    sys.path.append(os.getcwd())  # where the module of a user's MODULE:FUNCTION lies
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # Typer makes this of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UsageError as error:
        if message := error.format_message():  # none where the help has been shown instead
            print(f"scoredraw: {message}", file=sys.stderr)
        sys.exit(2)
    except (InputError, MissingExtraError) as error:
        print(f"scoredraw: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as error:
        print(f"scoredraw: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, InterruptedWorkError) as error:
        print(f"scoredraw: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
