"""`scoredraw train`: a solver schedule that suits a model, a policy that a reward improves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from scoredraw.cli import train_policy, train_swarm
from scoredraw.cli.compare import progress_bar
from scoredraw.cli.options import Guidance, Json, Negative, Prompt, Seed
from scoredraw.errors import InterruptedWorkError, require

app = typer.Typer()
app.command(
    epilog="Methods: grpo, ngrpo, tempo and more (scoredraw papers --search advantage). Examples: "
    "scoredraw train policy embedded:chain_sum --method ngrpo --steps 40 -o run; scoredraw train "
    "policy problems.jsonl --model FOLDER --reward math --method tempo -o run --report run.html"
)(train_policy.policy)
app.command(epilog=train_swarm.EPILOG)(train_swarm.swarm)


@app.callback()
def verb() -> None:
    """Train or search what a method needs."""


@app.command(
    epilog="Example: scoredraw train schedule --model embedded --steps 5 -o five.json; then "
    "scoredraw generate image --method usf --set schedule=five.json --steps 5 -o grid.png"
)
def schedule(
    model: Annotated[
        str, typer.Option(help="embedded, or the folder of a diffusers pipeline.", metavar="MODEL")
    ] = "embedded",
    prompt: Prompt = None,
    negative: Negative = None,
    guidance: Guidance = None,
    steps: Annotated[int, typer.Option(min=1, help="Network calls of the schedule.")] = 5,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The schedule to write.", metavar="OUT.json")
    ] = Path("schedule.json"),
    method: Annotated[
        str, typer.Option("--method", "-m", help="evolution, random or predictor.")
    ] = "evolution",
    evaluations: Annotated[int, typer.Option(min=0, help="Candidates tried.")] = 300,
    noises: Annotated[int, typer.Option(min=1, help="Noises each is tried on.")] = 32,
    held_out: Annotated[int, typer.Option(min=1, help="Fresh noises for the verdict.")] = 96,
    reference: Annotated[int, typer.Option(min=1, help="Steps of the exact solution.")] = 60,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search a solver schedule by its error to the exact ODE of a model, on fixed noises.

    Every trial is kept in a journal beside OUT: the same command goes on from it. The verdict is
    on noises that the search has not seen, beside the best known solver.
    """
    import torch

    from scoredraw.diffusion.image_models import open_image_model
    from scoredraw.diffusion.schedule_search import search_schedule
    from scoredraw.diffusion.unified_solver import SolutionError

    require(out.suffix == ".json", "out", out.name, "a name that ends in .json")
    require(out.parent.is_dir(), "out", str(out), "a file in an existing folder")
    journal = out.with_name(f"{out.name}.log.jsonl")
    found = open_image_model(model, prompt, negative=negative, guidance=guidance)
    about, begun = [model, prompt, negative, guidance, noises, reference], time.perf_counter()
    try:
        with torch.no_grad(), progress_bar() as progress:
            error, fresh = (
                SolutionError(
                    found.eps, found.schedule, found.noise(count, seed, first), reference=reference
                )
                for count, first in ((noises, 0), (held_out, noises))
            )
            result = search_schedule(
                error, found.schedule, steps, evaluations=evaluations, held_out=fresh,
                journal=journal, about=about, method=method, rng=seed,
                progress=lambda done, total, best: progress("trials", done, total),
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"; trials are kept in {journal}, the same command goes on" * journal.is_file()
        raise InterruptedWorkError(f"interrupted{kept}") from None
    result.best.schedule.save(out)
    assert result.held_out is not None
    facts = {
        "model": model, "calls": steps, "method": method, "trials": len(result.trials),
        "error": result.best.score, "best_preset": result.best_preset.schedule.about,
        "best_preset_error": result.best_preset.score, "held_out_error": result.held_out[0],
        "held_out_best_preset_error": result.held_out[1],
        "seconds": round(time.perf_counter() - begun, 3), "out": str(out),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    ours, known = result.held_out
    typer.echo(
        f"{method}: {len(result.trials)} trials; on {held_out} fresh noises the error to the exact "
        f"solution is {ours:.4g}, that of the best known solver {known:.4g} ({ours / known:.2f}), "
        f"in {facts['seconds']:.1f} s -> {out}"
    )
