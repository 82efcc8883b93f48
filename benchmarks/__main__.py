"""`python -m benchmarks`: run the lines, print the table, keep what was measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from threadpoolctl import threadpool_info

from benchmarks.contest import Line, run, table
from scoredraw.registry import resolve

# Imported when they run: not every environment has every peer.
BENCHMARKS = {
    "leverage": "matrices:leverage",
    "draw": "files:draw",
    "keys": "races:keys",
    "calibrate": "races:calibrate",
    "lewis": "matrices:lewis",
    "sketched": "sketches:sketched",
    "coverage": "coverage:coverage",
    "scheduler": "diffusion:scheduler",
    "selection": "selection:selection",
    "influence": "influence:influence",
    "transport": "transport:transport",
    "rpc": "rpc:rpc",
    "answers": "answers:answers",
    "watermarks": "watermarks:watermarks",
    "mbr": "minimum_bayes_risk:minimum_bayes_risk",
    "decoding": "decoding:decoding",
    "resampling": "resampling:resampling",
    "first-hitting": "first_hitting:first_hitting",
    "flow": "flow_inversion:flow_inversion",
    "tree": "tree:tree",
    "images": "image_samplers:images",
    "schedulers": "image_samplers:schedulers",
    "advantages": "advantages:advantages",
    "credit": "credit:credit",
    "swarm": "swarm:swarm",
}
WIDTH = 170  # of the table in a file or a log
PEERS = (
    *("scipy", "pyarrow", "statsmodels", "scorio", "torch", "diffusers"),
    *("apricot-select", "kronfluence", "POT", "transformers", "sacrebleu", "particles"),
    *("trl", "eclipse-zenoh"),
)


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Run the named benchmarks (all by default) and return their lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    listed = ", ".join(BENCHMARKS)
    parser.add_argument("name", nargs="*", help=f"which: {listed} (all if not given)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurements")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns a side (7)")
    parser.add_argument("--tiny", action="store_true", help="small inputs, no verdicts")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.name if name not in BENCHMARKS]
    if unknown:
        parser.error(f"name: got {unknown[0]!r}, want one of {listed}")
    if asked.repeats < 1:
        parser.error(f"--repeats: got {asked.repeats}, want at least 1")
    if asked.out is not None and not asked.out.parent.is_dir():
        parser.error(f"--out: got {asked.out}, want a file in an existing folder")
    screen, lines = Console(), []
    if not screen.is_terminal:
        screen.width = WIDTH
    with screen.status("starting") as status:
        for name in asked.name or BENCHMARKS:
            status.update(name)
            made = resolve(f"benchmarks.{BENCHMARKS[name]}")
            for entry in made(tiny=asked.tiny):
                status.update(f"{name}: {entry.what}")
                lines.append(run(entry, asked.repeats, judged=not asked.tiny))
                del entry  # its arrays, before the next ones are made
    screen.print(table(lines))
    if asked.out is not None:
        write(asked.out, lines, asked.tiny)
    return lines


def write(path: Path, lines: list[Line], tiny: bool) -> None:
    """The lines as JSON, with the commit, the machine, the date and the versions."""
    from scoredraw.reports import plain, stamp, write_text

    installed = {one.name.lower() for one in metadata.distributions()}
    versions = {name: metadata.version(name) for name in PEERS if name.lower() in installed}
    blas = [
        {key: pool[key] for key in ("internal_api", "version", "num_threads", "architecture")}
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]
    made: dict[str, Any] = {"scale": "tiny" if tiny else "full"}
    made["environment"] = {**stamp(), **versions, "blas": blas}
    made["lines"] = lines
    write_text(path, json.dumps(plain(made), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
