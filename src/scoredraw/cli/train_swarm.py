"""`scoredraw train swarm`: a node that trains on its own answers and some of the others'."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli import options as o
from scoredraw.cli.live import Show, live_table
from scoredraw.cli.train_policy import rows_of
from scoredraw.errors import InterruptedWorkError, require

if TYPE_CHECKING:
    from scoredraw.rl.policy_training import Row
    from scoredraw.rl.swarm_node import NodeRun, Progress
    from scoredraw.rl.swarm_transports import Transport

COLUMNS = {
    "reward": "reward", "external": "taken", "missing": "missing", "heard": "heard",
    "dropped": "dropped", "loss": "loss",
}  # fmt: skip
ENDPOINT = re.compile(r"[a-z0-9_-]+/[^\s,]+")
WITH_PORT = re.compile(r"(tcp|udp|tls|quic|ws)/[^\s,]+:(\d{1,5})([?#]\S*)?")
OF_ZENOH = ("swarm", "multicast", "block", "settings")
EPILOG = (
    "Two terminals, two nodes that learn from one another (pip install 'scoredraw\\[swarm]'): "
    "scoredraw train swarm embedded:chain_sum --node ann --listen tcp/127.0.0.1:7447 --wait 60 "
    "-o ann; and: scoredraw train swarm embedded:chain_sum --node bob --connect tcp/127.0.0.1:7447 "
    "--wait 60 -o bob. On several machines, give each node a --listen that the others can reach. "
    "Without Zenoh, --folder SHARED instead of both."
)


def swarm(
    problems: o.Problems,
    node: Annotated[str, typer.Option(help="Its name in the swarm, no other's.", metavar="NAME")],
    out: o.RunFolder,
    listen: Annotated[
        str | None,
        typer.Option(help="Where others reach this node: tcp/127.0.0.1:7447.", metavar="ENDPOINT"),
    ] = None,
    connect: Annotated[
        str | None, typer.Option(help="Nodes to begin with; one is enough.", metavar="ENDPOINT,...")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="A folder that the nodes share, instead.", metavar="SHARED"),
    ] = None,
    model: o.PolicyModel = "embedded",
    reward: o.Reward = "exact",
    columns: Annotated[
        str | None,
        typer.Option(help="Columns to send along for the reward; all if not given.", metavar="A,B"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each ends with an update.")] = 100,
    local: Annotated[int, typer.Option(min=1, help="Own problems a round.")] = 4,
    external: Annotated[int, typer.Option(min=0, help="Groups of others a round.")] = 4,
    generations: o.Generations = 8,
    selection: Annotated[
        str,
        typer.Option(
            help="Which groups of others: nonzero_uniform, uniform, top_reward, "
            "advantage_magnitude or newest."
        ),
    ] = "nonzero_uniform",
    learning_rate: o.LearningRate = None,
    max_tokens: o.AnswerTokens = None,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds a round waits for groups of others; 0 never.")
    ] = 0.0,
    verify: Annotated[
        str | None,
        typer.Option(
            help="Whether a group of another may be scored: its answer may be a lie.",
            metavar="MODULE:FUNCTION",
        ),
    ] = None,
    held_out: o.HeldOut = 32,
    samples: o.AnswersEach = 8,
    save_every: Annotated[int, typer.Option(min=1, help="Rounds between checkpoints.")] = 10,
    set_: o.Set = None,
    seed: Annotated[int, typer.Option(min=0, help="With the node's name, of all it draws.")] = 0,
    as_json: o.Json = False,
) -> None:
    """Train a language model as a node of a swarm, and leave it in FOLDER/model.

    Nodes publish the answers that their models wrote, as text, and train on their own and on some
    of the others', scored by their own reward. Models may differ; nobody waits for anybody, and a
    node alone trains on. The same command goes on from the last checkpoint; what is younger than
    ttl in a shared folder is then heard, and may be drawn, again. Whoever reaches an endpoint or
    the folder can take part under any name: keep them to networks that you trust. A reward of your
    own that runs answers or columns runs what others wrote.
    """
    others = o.settings(set_)
    of_zenoh = {name: others.pop(name) for name in OF_ZENOH if name in others}
    rows = kept_columns(rows_of(problems), o.split(columns))
    ends = {"listen": endpoints("listen", listen), "connect": endpoints("connect", connect)}
    from scoredraw.rl.swarm_node import last_checkpoint, train_node

    try:
        with (
            closing(joined(node, ends, folder, others.get("ttl", 600.0), of_zenoh)) as transport,
            live_table("round", COLUMNS) as show,
        ):
            run = train_node(
                rows, out, transport, node=node, model=model, reward=reward, rounds=rounds,
                local=local, external=external, generations=generations, selection=selection,
                learning_rate=learning_rate, max_tokens=max_tokens, held_out=held_out,
                samples=samples, save_every=save_every, patience=wait, verify=verify, seed=seed,
                options=others, progress=told(show),
            )  # fmt: skip
    except KeyboardInterrupt:
        found = last_checkpoint(out)
        at = f"round {found[0]} of {rounds} is kept in {out}" if found else "no round is kept yet"
        raise InterruptedWorkError(f"interrupted; {at}, the same command goes on") from None
    typer.echo(json.dumps(facts_of(run, node)) if as_json else f"{said(run, node)} -> {out}/model")


# ── what comes in ───────────────────────────────────────────────────────────────────────────────


def kept_columns(rows: list[dict[str, Any]], wanted: list[str] | None) -> list[dict[str, Any]]:
    """The rows with the prompt, the answer and those columns that are to be sent."""
    if wanted is None or not rows:
        return rows
    wrong = next((name for name in wanted if name not in rows[0]), None)
    require(wrong is None, "columns", repr(wrong), f"one of the columns {', '.join(rows[0])}")
    kept = {"prompt", "problem", "question", "answer", *wanted}
    return [{name: row[name] for name in row if name in kept} for row in rows]


def endpoints(argument: str, text: str | None) -> list[str] | None:
    """A comma-separated list of endpoints, each in a form that Zenoh knows."""
    found = o.split(text)
    for one in [] if found is None else found or [""]:
        fine = bool(ENDPOINT.fullmatch(one))
        if one.partition("/")[0] in ("tcp", "udp", "tls", "quic", "ws"):
            port = WITH_PORT.fullmatch(one)
            fine = port is not None and int(port[2]) < 2**16
        require(fine, argument, repr(one), "an endpoint such as tcp/127.0.0.1:7447")
    return found


def joined(
    node: str, ends: Mapping[str, list[str] | None], folder: Path | None, ttl: Any,
    options: Mapping[str, Any],
) -> Transport:  # fmt: skip
    """The way to the others: Zenoh where there are endpoints, or a folder; exactly one of them."""
    from scoredraw.rl.rollout_groups import check_name
    from scoredraw.rl.swarm_transports import Directory, Zenoh

    places = o.given(**ends)
    check_name(node, "node")
    require(bool(places) or folder is not None, "folder", "no --listen, --connect or --folder",
            "endpoints or a folder")  # fmt: skip
    require(not places or folder is None, "folder", f"--folder beside --{' and --'.join(places)}",
            "endpoints or a folder")  # fmt: skip
    for name in options:
        require(folder is None, name, "an option of endpoints", "none beside --folder")
    for name in ("multicast", "block"):
        fine = isinstance(options.get(name, False), bool)
        require(fine, name, repr(options.get(name)), "True or False")
    fine = isinstance(options.get("settings", {}), dict)
    require(fine, "settings", repr(options.get("settings")), "{'a/setting': value} of Zenoh")
    if folder is None:
        swarm_name = str(options.get("swarm", "swarm"))  # a number is read as one
        return Zenoh(node, **places, **{**options, "swarm": swarm_name})
    require(folder.is_dir(), "folder", str(folder), "an existing folder that the nodes share")
    number = isinstance(ttl, (int, float)) and not isinstance(ttl, bool)
    require(number, "ttl", repr(ttl), "a number")
    return Directory(folder, node, ttl=ttl)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────


def told(show: Show) -> Progress:
    """A node's progress as rows of the live table."""

    def tell(t: int, total: int, row: Row, counts: Counter[str]) -> None:
        why = reasons(counts)
        show(t, total, row, f"; dropped: {why}" if why else "")

    return tell


def reasons(counts: Mapping[str, int]) -> str:
    """What was dropped, and why."""
    from scoredraw.rl.swarm_node import dropped

    return ", ".join(f"{n} {reason}" for reason, n in dropped(counts).items())


def facts_of(run: NodeRun, node: str) -> dict[str, Any]:
    """What came of a node, as `--json` promises it."""
    from scoredraw.rl.swarm_node import dropped

    return {
        "node": node, "rounds": len(run.log), "published": run.counts["published"],
        "heard": run.counts["received"], "taken": run.counts["drawn"], "taken_of": run.taken,
        "missing": int(sum(row["missing"] for row in run.log)), "dropped": dropped(run.counts),
        "before": run.before, "after": run.after, "seconds": round(run.seconds, 3),
        "out": str(run.folder / "model"),
    }  # fmt: skip


def said(run: NodeRun, node: str) -> str:
    """The same for a person."""
    facts = facts_of(run, node)
    parts = [f"{node}: {facts['rounds']} rounds in {run.seconds:.0f} s"]
    whose = ", ".join(f"{n} of {peer}" for peer, n in run.taken.most_common(8))
    taken = f"{facts['taken']} groups of others taken" + f" ({whose})" * bool(whose)
    parts.append(f"{taken}, {facts['missing']} missing, {facts['heard']} heard")
    if run.counts and (why := reasons(run.counts)):
        parts.append(f"dropped: {why}")
    if run.after:
        parts.append(f"held-out pass@1 {run.before[1]:.3f} before, {run.after[1]:.3f} after")
    return "; ".join(parts)
