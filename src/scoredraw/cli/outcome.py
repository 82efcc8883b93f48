"""What a command says when it is done, and what the files it writes say of their making."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import typer

from scoredraw.cli.options import peak_rss_mb


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

    return {"scoredraw": version("scoredraw"), "command": sys.argv[1:], **facts}
