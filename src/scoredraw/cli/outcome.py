"""What a command says when it is done, and what the files it writes say of their making."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from scoredraw.cli.options import peak_rss_mb

SECRET = ("--key", "key")


def outcome(method: str, n: int, size: int, begun: float, out: Path | None) -> dict[str, Any]:
    """The facts of a finished command, as `--json` promises them."""
    seconds = time.perf_counter() - begun
    return {
        "method": method,
        "n": n,
        "size": size,
        "seconds": round(seconds, 4),
        "rows_per_second": round(n / seconds, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "out": None if out is None else str(out),
    }


def report_outcome(
    method: str, n: int, size: int, begun: float, out: Path | None, as_json: bool
) -> None:
    """Print one finished command, as a line or as JSON."""
    facts = outcome(method, n, size, begun, out)
    typer.echo(json.dumps(facts, indent=2) if as_json else sentence(facts))


def sentence(facts: dict[str, Any]) -> str:
    """The same facts for a person."""
    where = f" -> {facts['out']}" if facts["out"] else ""
    pace = f"{facts['seconds']:.2f} s, {facts['peak_rss_mb']:.0f} MB"
    return f"{facts['method']}: {facts['size']:,} of {facts['n']:,} rows in {pace}{where}"


def written_by(**facts: Any) -> dict[str, Any]:
    """The provenance of an output: the command, the version, the seed and the like."""
    from importlib.metadata import version

    return {"scoredraw": version("scoredraw"), "command": without_secrets(sys.argv[1:]), **facts}


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command without the key of a watermark, which a file that is passed on must not tell.

    >>> without_secrets(["--key", "42", "--key=42", "--set", "key=42", "-n", "4"])
    ['--key', '***', '--key=***', '--set', 'key=***', '-n', '4']
    """
    shown, hidden = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = bool(equals) and name in SECRET
        shown.append("***" if hidden else f"{name}=***" if secret else argument)
        hidden = argument in SECRET
    return shown
