"""`scoredraw generate image`: images of a trained diffusion model, by a method, as a grid."""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoredraw.cli.options import Guidance, Json, Negative, Prompt, Seed, Set, settings
from scoredraw.errors import InputError, require

if TYPE_CHECKING:
    from scoredraw.diffusion.image_models import ImageModel

FORMATS = (".png", ".npz")


def image(
    model: Annotated[
        str,
        typer.Option(
            help="embedded (a UNet of clothing, 28 x 28), or a folder that a diffusers pipeline "
            "was saved to: of an unconditional UNet, or Stable Diffusion.",
            metavar="MODEL",
        ),
    ] = "embedded",
    prompt: Prompt = None,
    negative: Negative = None,
    guidance: Guidance = None,
    method: Annotated[str, typer.Option("--method", "-m", help="How it is sampled.")] = "deis",
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Network calls; of annealed, product, tilted: steps, 100 or more."
        ),
    ] = 10,
    size: Annotated[int, typer.Option("--size", "-n", min=1, help="Images.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A grid as .png, or the arrays as .npz.", metavar="OUT"),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Of tilted, tree, tree-search, best-of-n: class:K of the embedded model, or "
            "module:function of images in [-1, 1].",
            metavar="REWARD",
        ),
    ] = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Sample images from a trained model: in fewer calls, or from a steered law.

    Image i depends on the seed and i alone, for methods that solve the model's ODE.
    """
    from scoredraw import registry
    from scoredraw.diffusion.image_models import open_image_model

    require_picture(out)
    entry = registry.method("images", method)
    sample = registry.resolve(entry.function, entry.extra)
    given = settings(set_)
    if entry.takes == "reward":
        require(reward is not None, "reward", "none", f"--reward for {method}")
        given["reward"] = reward
    else:
        require(reward is None, "reward", f"one for {method}", "tilted, tree, tree-search, ...")
    if entry.takes != "ode":
        given["seed"] = seed
    found = open_image_model(model, prompt, negative=negative, guidance=guidance)
    begun = time.perf_counter()
    with counted(found) as calls, waiting(f"{method}, {size} images"):
        images = found.images(sampled(sample, found, found.noise(size, seed), steps, given))
    facts = {
        "model": model, "method": method, "steps": steps, "images": len(images),
        "calls_an_image": round(calls[0] / max(len(images), 1), 3),
        "seconds": round(time.perf_counter() - begun, 3), "out": None if out is None else str(out),
        **({} if prompt is None else
           {"prompt": prompt, "negative": negative, "guidance": found.unet.guidance}),
    }  # fmt: skip
    if out is not None:
        save(images, out, facts | {"seed": seed})
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    where = f" -> {out}" if out else " (-o grid.png keeps them)"
    typer.echo(
        f"{method}: {facts['images']} images, {facts['calls_an_image']:g} network calls each, "
        f"in {facts['seconds']:.1f} s{where}"
    )


def require_picture(out: Path | None) -> None:
    """Find out before the work whether the file can be written."""
    if out is not None:
        require(
            out.suffix in FORMATS, "out", out.name, f"a name that ends in {' or '.join(FORMATS)}"
        )
        require(out.parent.is_dir(), "out", str(out), "a file in an existing folder")


def sampled(sample: Any, model: ImageModel, x: Any, steps: int, given: dict[str, Any]) -> Any:
    """The method's images; an option that it lacks or was not given is an InputError."""
    import torch

    own = list(inspect.signature(sample).parameters.values())[3:]
    known = [p.name for p in own if p.kind != p.VAR_KEYWORD]
    for p in own:
        needed = p.default is p.empty and p.kind != p.VAR_KEYWORD
        require(not needed or p.name in given, "set", f"no {p.name}", f"--set {p.name}=VALUE")
    for name in given if len(known) == len(own) else ():
        check_option(name, name in known, known)
    try:
        with torch.no_grad():
            return sample(model, x, steps, **given)
    except TypeError as error:  # of an option that is passed on
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is not None:
            check_option(unknown[1], False, known)
        raise


def check_option(name: str, fine: bool, known: list[str]) -> None:
    """InputError for an option that a method does not have."""
    had = f"an option that this method does not have: {name}"
    require(fine, "set", had, f"one of {', '.join(known) or 'none'}")


@contextmanager
def counted(model: ImageModel) -> Iterator[list[int]]:
    """How many images the network has been asked about, in a list of one number."""
    calls = [0]

    def count(_: Any, arguments: Any, __: Any) -> None:
        calls[0] += len(arguments[0])

    hook = model.unet.register_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner with the time, where someone is looking."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(what, total=None)
        yield


def save(images: Any, out: Path, facts: dict[str, Any]) -> None:
    """A grid, as square as can be, or the arrays; with what made it."""
    import numpy as np

    from scoredraw.cli.outcome import written_by
    from scoredraw.diffusion.image_models import pictures
    from scoredraw.journal import atomic_path

    made_by = json.dumps(written_by(kind="image", **facts))
    with atomic_path(out) as path:
        if out.suffix == ".npz":
            with path.open("wb") as file:
                np.savez_compressed(file, images=images.numpy(), made_by=made_by)
            return
        from matplotlib.image import imsave

        shown = grid(pictures(images))
        imsave(path, shown, format="png", metadata={"Description": made_by})


def grid(shown: Any) -> Any:
    """Pictures (n, H, W, C) in rows and columns with a line between, (H', W', 3)."""
    import numpy as np

    if not len(shown):
        raise InputError("images: got none, want at least one")
    n, height, width, channels = shown.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.zeros((rows * columns, height + 1, width + 1, 3), np.uint8)
    sheet[:n, :height, :width] = shown if channels == 3 else shown[..., :1]
    sheet = sheet.reshape(rows, columns, height + 1, width + 1, 3).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * (height + 1), columns * (width + 1), 3)
