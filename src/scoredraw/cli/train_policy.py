"""`scoredraw train policy`: reinforcement learning of a language model from rewards."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli import options as o
from scoredraw.cli.compare import check_report
from scoredraw.cli.live import live_table
from scoredraw.cli.outcome import written_by
from scoredraw.errors import InterruptedWorkError, require

if TYPE_CHECKING:
    from scoredraw.pages import Page
    from scoredraw.rl.policy_training import PolicyRun

COLUMNS = {
    "reward": "reward", "frac_dead_groups": "dead groups", "entropy": "entropy",
    "completions/mean_length": "tokens", "loss": "loss", "generation_batches": "batches sampled",
}  # fmt: skip


def policy(
    problems: o.Problems,
    out: o.RunFolder,
    method: Annotated[str, typer.Option("--method", "-m", help="How answers are credited.")] = (
        "grpo"
    ),
    model: o.PolicyModel = "embedded",
    reward: o.Reward = "exact",
    steps: Annotated[int, typer.Option(min=1, help="Batches of problems.")] = 100,
    prompts: Annotated[int, typer.Option(min=1, help="Problems a batch.")] = 8,
    generations: o.Generations = 8,
    learning_rate: o.LearningRate = None,
    max_tokens: o.AnswerTokens = None,
    beta: Annotated[float, typer.Option(min=0.0, help="KL to the model as it came.")] = 0.0,
    held_out: o.HeldOut = 32,
    samples: o.AnswersEach = 8,
    save_every: Annotated[int, typer.Option(min=1, help="Batches between checkpoints.")] = 10,
    plain: o.Plain = False,
    set_: o.Set = None,
    report: o.ReportPage = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Train a language model on problems from a reward, and leave it in FOLDER/model.

    TRL's GRPO underneath; the method says how answers are credited. The same command goes on from
    the last checkpoint. What it was worth is measured on held-out problems before and after.
    """
    from scoredraw import registry
    from scoredraw.reports import plain as plain_values
    from scoredraw.rl.policy_training import train_policy

    begun = time.perf_counter()
    if report is not None:
        check_report(report)
    found = registry.method("policies", method)
    made = registry.resolve(found.function)(**o.settings(set_))
    rows = rows_of(problems)
    try:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func, which is ours
        with live_table("step", COLUMNS) as show, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TRL's calls of transformers
            run = train_policy(
                rows, out, model=model, reward=reward, method=made, steps=steps,
                about=" ".join([method, *(set_ or [])]), plain=plain,
                prompts=prompts, generations=generations, learning_rate=learning_rate,
                max_tokens=max_tokens, beta=beta, held_out=held_out, samples=samples,
                save_every=save_every, seed=seed, progress=show,
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = "; checkpoints are kept, the same command goes on" * (out / "checkpoints").is_dir()
        raise InterruptedWorkError(f"interrupted{kept}") from None
    if report is not None:
        policy_page(run, method, problems).save(report)
    facts = {
        "method": method, "steps": steps, "before": run.before, "after": run.after,
        "gain": plain_values(run.gain), "seconds": round(time.perf_counter() - begun, 3),
        "out": str(out / "model"),
    }  # fmt: skip
    typer.echo(json.dumps(facts, indent=2) if as_json else f"{said(run, method)} -> {out}/model")


def rows_of(problems: str) -> list[dict[str, Any]]:
    """The rows of a table, or of the problems that ship."""
    kind, _, families = problems.partition(":")
    if kind == "embedded":
        from scoredraw.papers.small_policy import FAMILIES, shipped_problems

        names = o.split(families) or list(FAMILIES)
        wrong = next((name for name in names if name not in FAMILIES), None)
        require(wrong is None, "problems", repr(wrong), f"a family: {', '.join(FAMILIES)}")
        found = [
            {key: row[key] for key in ("prompt", "answer")}
            for row in shipped_problems("train", names)
        ]
        random.Random(0).shuffle(found)  # they lie by family; the last ones measure
        return found
    from scoredraw.tables import open_table

    rows: list[dict[str, Any]] = open_table(problems).read().to_pylist()
    return rows


def said(run: PolicyRun, method: str) -> str:
    """What came of it, in a sentence."""
    steps = f"{method}: {len(run.log)} steps in {run.seconds:.0f} s"
    if run.gain is None:
        return steps
    k = max(run.after)
    sure = "" if run.gain.above(0) or run.gain.below(0) else ", which cannot be told from nothing"
    return (
        f"{steps}; held-out pass@1 {run.before[1]:.3f} before, {run.after[1]:.3f} after: a gain of "
        f"{run.gain}{sure}; pass@{k} {run.before[k]:.3f} and {run.after[k]:.3f}"
    )


def policy_page(run: PolicyRun, method: str, name: str) -> Page:
    """Curves of the run, and pass@k before and after."""
    from scoredraw.pages import Page
    from scoredraw.reports import Cell, Figure, ReportTable, Series, stamp

    curves = []
    for key, title in COLUMNS.items():
        points = [(i + 1, row[key]) for i, row in enumerate(run.log) if key in row]
        if points:
            x, y = map(list, zip(*points, strict=True))
            curves.append(Figure("line", title, "step", title, [Series(method, x, y)]))
    rows: list[list[Cell]] = [[k, run.before[k], run.after[k]] for k in run.after]
    return Page(
        title="A policy trained from rewards",
        kicker=f"scoredraw train policy · {name}",
        answer=f"{said(run, method)}.",
        tables=[ReportTable("Held-out problems", ["k", "pass@k before", "after"], rows)],
        figures=curves,
        notes=[
            "Dead groups are prompts whose answers all have advantage 0: they teach nothing.",
            "One run says little: seeds differ by more than most methods do.",
        ],
        provenance={**written_by(method=method), **stamp()},
    )
