"""Compare solvers of an image model's ODE: which comes nearest in so many calls, against DDIM.

All of them start from the same noises. `error` is the root mean square distance, over pixels (of
Stable Diffusion: over latents), to where the exact solution leads, one a noise; ratios to DDIM's
are taken noise by noise. `distance` is the Fréchet distance of a feature space, taken over blocks
of noises: to real images of the embedded data set in the features of a small classifier of them, or
for other models to the exact solutions of other noises in the principal components of their states.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import registry
from scoredraw.bakeoff.comparison import Entry, listing, verdicts
from scoredraw.bakeoff.display import capital
from scoredraw.bakeoff.rows import Progress
from scoredraw.errors import InputError, require
from scoredraw.metrics import Estimate, frechet_distance, mean_interval, paired_difference
from scoredraw.pages import Page
from scoredraw.reports import Figure, Picture, ReportTable, Series, plain, stamp

Float = NDArray[np.float64]

BASELINE = "ddim"
BLOCKS = 4  # of noises, each with a Fréchet distance
SHOWN = 12  # images of a method on the page
PROMPTED = ("prompt", "negative", "guidance")  # of the protocol, where a model takes them
COMPONENTS = 32  # principal components of a model without a classifier


@dataclass(frozen=True, eq=False)
class SamplerComparison:
    """Every solver at every number of calls.

    errors[method] (calls, noises); distances[method] (calls, blocks); seconds[method] (calls,) an
    image; images[method] (calls, SHOWN, C, H, W), "exact" among them. space: what the distances
    are taken in.
    """

    model: str
    protocol: dict[str, Any]
    errors: dict[str, Float] = field(repr=False)
    distances: dict[str, Float] = field(repr=False)
    seconds: dict[str, Float] = field(repr=False)
    images: dict[str, NDArray[np.float32]] = field(repr=False)
    space: str = ""
    floor: Estimate | None = None

    @property
    def methods(self) -> list[str]:
        """The solvers compared."""
        return list(self.errors)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every solver at every number of calls; gain is log(DDIM's error / the solver's)."""
        found = []
        count = max(1, (len(self.methods) - 1) * len(self.protocol["steps"]))
        for method in self.methods:
            for j, calls in enumerate(self.protocol["steps"]):
                errors, base = self.errors[method][j], self.errors[BASELINE][j]
                gain = paired_difference(np.log(base), np.log(errors), comparisons=count)
                seconds = float(self.seconds[method][j])
                value = mean_interval(errors)
                found.append(Entry(method, f"{calls} calls", calls, value, gain, None, seconds))
        return tuple(found)

    def of(self, method: str) -> list[Entry]:
        """A solver's entries by calls."""
        return [entry for entry in self.entries if entry.method == method]

    @cached_property
    def ranking(self) -> list[str]:
        """Solvers by their gain averaged over the numbers of calls."""
        return sorted(self.methods, key=lambda m: -sum(e.gain.value for e in self.of(m)))

    @property
    def answer(self) -> str:
        """Which solver is worth it, in a few sentences."""
        parts = []
        for j, calls in enumerate(self.protocol["steps"]):
            best = min(self.methods, key=lambda m: self.of(m)[j].value.value)
            entry = self.of(best)[j]
            base = self.of(BASELINE)[j].value.value
            parts.append(f"with {calls} calls {best} (error {entry.value.value:.3g}, {BASELINE}'s "
                         f"{base:.3g})")  # fmt: skip
        losers = [m for m in self.ranking if all(e.verdict == "worse" for e in self.of(m))]
        worse = f" {listing(losers)}: farther off than {BASELINE} everywhere." if losers else ""
        return f"Nearest to the exact solution: {'; '.join(parts)}.{worse}"

    @property
    def notes(self) -> list[str]:
        """How it was done."""
        noises, images = self.protocol["noises"], self.protocol["size"]
        known = [
            (
                f"Errors: root mean square over the numbers of a state (pixels in [-1, 1], or "
                f"latents), {noises} noises, to the "
                f"solution of {self.protocol['reference']} third-order steps of 3 calls. Ratios to "
                f"{BASELINE}'s are paired by noise; their t intervals hold together with 95 %."
            ),
            (
                f"Fréchet distances: {self.space}; means over {BLOCKS} blocks of "
                f"{images // BLOCKS} images, with t intervals; biased upwards, equally for all."
            ),
            "Seconds: of an image, the network's calls included, on this machine.",
        ]
        if self.floor is not None:
            known.append(f"The exact solutions themselves have a Fréchet distance of {self.floor}.")
        return known

    def distance(self, method: str) -> list[Estimate]:
        """Its Fréchet distances by calls."""
        return [mean_interval(row) for row in self.distances[method]]

    def tables(self) -> list[ReportTable]:
        """Ratios of errors, errors, Fréchet distances and seconds."""
        heads = [entry.size for entry in self.of(BASELINE)]
        rivals = [m for m in self.ranking if m != BASELINE]

        def rows(cells: Callable[[str], Sequence[Any]], names: Sequence[str]) -> list[list[Any]]:
            return [[m, *cells(m)] for m in names]

        gains = rows(
            lambda m: [verdicts(self.of(m), "number of calls"), *map(ratio, self.of(m))], rivals
        )
        errors = rows(lambda m: [entry.value for entry in self.of(m)], self.ranking)
        times = rows(lambda m: [f"{e.seconds:.4f}" for e in self.of(m)], self.ranking)
        return [
            ReportTable(f"Error as a share of {BASELINE}'s with as many calls",
                        ["method", f"against {BASELINE}", *heads], gains, "Below 1 is nearer."),
            ReportTable("Error to the exact solution", ["method", *heads], errors),
            ReportTable("Fréchet distance", ["method", *heads],
                        rows(self.distance, self.ranking), self.space),
            ReportTable("Seconds an image", ["method", *heads], times),
        ]  # fmt: skip

    def page(self) -> Page:
        """The report as a self-contained HTML page."""
        steps = self.protocol["steps"]

        def lines(values: Callable[[str], Sequence[Estimate]]) -> list[Series]:
            every = [(m, list(values(m))) for m in self.ranking]
            return [
                Series(m, steps, [e.value for e in v], [e.low for e in v], [e.high for e in v],
                       baseline=m == BASELINE)
                for m, v in every
            ]  # fmt: skip

        figures = [
            Figure("line", "Error against calls", "network calls", "RMSE to the exact solution",
                   lines(lambda m: [e.value for e in self.of(m)]), log_x=True, log_y=True),
            Figure("line", "Fréchet distance against calls", "network calls", "Fréchet distance",
                   lines(self.distance), log_x=True, log_y=True, caption=capital(self.space)),
        ]  # fmt: skip
        exact = Picture("exact", strip(self.images["exact"][0]))
        for j, calls in enumerate(steps):
            shown = [Picture(m, strip(self.images[m][j])) for m in self.ranking]
            caption = "The same noises for all; the first row is where the exact solution leads."
            figures.append(Figure("pictures", f"{calls} calls", caption=caption,
                                  pictures=[exact, *shown]))  # fmt: skip
        return Page(
            title="Which sampler, with how many calls?",
            kicker=f"scoredraw compare samplers · {self.model}",
            answer=self.answer,
            tables=self.tables(),
            figures=figures,
            notes=self.notes,
            provenance={
                "model": self.model, "methods": ", ".join(self.methods),
                "calls": ", ".join(map(str, steps)), "images": self.protocol["size"],
                **{name: self.protocol[name] for name in PROMPTED if name in self.protocol},
                "seed": self.protocol["seed"], **stamp(),
            },
        )  # fmt: skip

    def to_json(self) -> str:
        """One strict JSON object."""
        board = [
            {"method": e.method, "calls": e.rows, "error": e.value, "share": ratio(e),
             "distance": self.distance(e.method)[j % len(self.protocol["steps"])],
             "verdict": e.verdict, "seconds": e.seconds}
            for j, e in enumerate(self.entries)
        ]  # fmt: skip
        found = {
            "model": self.model, "answer": self.answer, "leaderboard": board, "space": self.space,
            "floor": self.floor, "protocol": self.protocol, "notes": self.notes,
            "environment": stamp(),
        }  # fmt: skip
        return json.dumps(plain(found), indent=2, allow_nan=False, ensure_ascii=False)


def compare_samplers(
    model: str = "embedded",
    methods: str | Sequence[str] | None = None,
    steps: Sequence[int] = (5, 10, 20),
    *,
    size: int = 512,
    noises: int = 128,
    data: str | Path | None = None,
    reference: int = 60,
    seed: int = 0,
    prompt: str | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> SamplerComparison:
    """Compare solvers of a model's ODE by error, Fréchet distance and seconds, on equal noises.

    model, prompt, negative, guidance: as in `image_models.open_image_model`. methods: names of
    `registry.methods("images")` that solve the ODE (all); DDIM is always among them. steps: numbers
    of network calls. size: images of a method, a multiple of 4; noises: how many of them are
    compared with the exact solution; reference: its steps, with three calls each. data: a .npz of
    images, for the methods that use the data's moments; without it these are only run on the
    embedded model. Raises InputError for unknown methods, those that sample another law or lack
    data, and sizes that make no sense.
    """
    import torch

    from scoredraw.diffusion import image_methods
    from scoredraw.diffusion.image_models import EMBEDDED, open_image_model

    calls = sorted({int(n) for n in steps})
    require(bool(calls) and calls[0] >= 1, "steps", calls, "numbers of calls >= 1")
    require(size >= 8 and size % BLOCKS == 0, "size", size, f"a multiple of {BLOCKS}, 8 or more")
    require(2 <= noises <= size, "noises", noises, f"from 2 to size = {size}")
    tell = progress or (lambda *_: None)
    found = open_image_model(model, prompt, negative=negative, guidance=guidance)
    names = chosen(methods, moments=data is not None or found.name == EMBEDDED)
    if data is not None:
        image_methods.data_of(found, str(data))
    x = found.noise(size, seed)
    errors: dict[str, list[Float]] = {name: [] for name in names}
    distances: dict[str, list[Float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shown: dict[str, list[Any]] = {name: [] for name in names}

    def show(states: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(found.images(torch.from_numpy(states[:SHOWN])))

    with torch.no_grad():
        exact = []
        for i, part in enumerate(x[:noises].split(32)):
            exact.append(image_methods.exact(found, part, reference))
            tell("exact solutions", i + 1, -(-noises // 32))
        solved = torch.cat(exact).numpy()
        judge, space, floor = distance_space(found, solved)
        total = len(names) * len(calls)
        for name in names:
            sample = function_of(name)
            options = {} if data is None or not uses_data(sample) else {"data": str(data)}
            for n in calls:
                begun = time.perf_counter()
                made = sample(found, x, n, **options).numpy()
                seconds[name].append((time.perf_counter() - begun) / size)
                gap = np.square(made[:noises] - solved).reshape(noises, -1).mean(axis=1)
                errors[name].append(np.sqrt(gap).astype(np.float64))
                distances[name].append(np.array([judge(b) for b in np.split(made, BLOCKS)]))
                shown[name].append(show(made))
                tell("samplers", sum(map(len, seconds.values())), total)
    protocol = {
        "steps": calls,
        "size": size,
        "noises": noises,
        "reference": reference,
        "seed": seed,
        **(
            {}
            if prompt is None
            else {"prompt": prompt, "negative": negative, "guidance": found.unet.guidance}
        ),
    }
    return SamplerComparison(
        model, protocol, stacked(errors), stacked(distances), stacked(seconds),
        {**stacked(shown), "exact": show(solved)[None]}, space, floor,
    )  # fmt: skip


def stacked(lists: dict[str, list[Any]]) -> dict[str, NDArray[Any]]:
    """What was found for each method, one entry a number of calls, as arrays."""
    return {method: np.array(values) for method, values in lists.items()}


def chosen(methods: str | Sequence[str] | None, *, moments: bool) -> list[str]:
    """The solvers asked for, DDIM first; moments: whether those of the data are known."""
    solvers = [m.name for m in registry.methods("images") if m.takes == "ode"]
    given = methods.split(",") if isinstance(methods, str) else methods
    lacking = [] if moments else [name for name in solvers if uses_data(function_of(name))]
    if given is None:
        return [name for name in solvers if name not in lacking]
    asked = [name.strip() for name in given if name.strip()]
    for name in asked:
        registry.method("images", name)
        require(name not in lacking, "data", f"none for {name}", "images of the data, as .npz")
        if name not in solvers:
            wanted = f"solvers of the ODE: {', '.join(solvers)}"
            raise InputError(f"methods: got {name!r}, which samples another law, want {wanted}")
    return list(dict.fromkeys([BASELINE, *asked]))


def function_of(name: str) -> Callable[..., Any]:
    """What runs a method."""
    entry = registry.method("images", name)
    found: Callable[..., Any] = registry.resolve(entry.function, entry.extra)
    return found


def uses_data(sample: Callable[..., Any]) -> bool:
    """Whether a method asks for images of the data."""
    return "data" in inspect.signature(sample).parameters


def distance_space(
    model: Any, solved: NDArray[Any]
) -> tuple[Callable[[NDArray[Any]], float], str, Estimate | None]:
    """What a block of images is judged by, in words, and what the exact solutions come to."""
    from scoredraw.diffusion.image_models import EMBEDDED, fashion_features

    if model.name == EMBEDDED:
        from scoredraw import datasets

        rows = np.asarray(datasets.load("fashion-mnist").x).reshape(-1, 1, 28, 28)
        real = fashion_features(rows.astype(np.float32) / 127.5 - 1)
        said = "to the 12,000 real images, in the 64 activations of the shipped classifier"

        def judge(images: NDArray[Any]) -> float:
            return frechet_distance(fashion_features(images), real)

        floor = mean_interval([judge(half) for half in np.array_split(solved, 2)])
        return judge, said, floor
    flat = solved.reshape(len(solved), -1).astype(np.float64)
    _, _, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    axes = axes[:COMPONENTS]
    said = f"to {len(solved)} exact solutions, in the first {len(axes)} components of their states"

    def judge_pixels(images: NDArray[Any]) -> float:
        return frechet_distance(images.reshape(len(images), -1) @ axes.T, flat @ axes.T)

    return judge_pixels, said, None


def ratio(entry: Entry) -> Estimate:
    """The solver's error as a share of DDIM's, geometric mean over noises."""
    low, value, high = (
        float(np.exp(-g)) for g in (entry.gain.high, entry.gain.value, entry.gain.low)
    )
    return Estimate(value, low, high, entry.gain.n)


def strip(images: Any) -> str:
    """Images (n, C, H, W) side by side, as a PNG in base64."""
    from matplotlib.image import imsave

    from scoredraw.diffusion.image_models import pictures

    shown = pictures(images)
    shown = np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown
    buffer = io.BytesIO()
    imsave(
        buffer, np.hstack([np.pad(one, ((1, 1), (1, 1), (0, 0))) for one in shown]), format="png"
    )
    return base64.b64encode(buffer.getvalue()).decode("ascii")
