"""What competes in a bake-off: a score, a scheme that draws by it, and perhaps strata.

A contender is written NAME[:SCHEME][@class]: a method of the catalogue, a scheme other than the
method's own (`bottom_k` takes the smallest scores), and strata by class. So `el2n` is the paper's
choice, `el2n:bottom_k@class` the easiest examples of every class.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import registry, sampling
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require
from scoredraw.execution import Engine
from scoredraw.verbs import DEFAULT_P

Float = NDArray[np.float64]

BASELINE = "uniform"
SCHEMES = (*sampling.SCHEMES, "bottom_k")
FIXED = ("top_k", "bottom_k")  # schemes that leave nothing to chance
DEFAULTS = {
    "classification": (
        *("uniform", "uniform@class", "leverage", "ridge-leverage", "lewis", "root-leverage"),
        *("el2n", "el2n:poisson", "grand", "forgetting", "forgetting:bottom_k@class"),
        *("vog", "tracin", "pvi"),
    ),
    "regression": ("uniform", "leverage", "ridge-leverage", "lewis", "root-leverage"),
}


@dataclass(frozen=True)
class Contender:
    """One parsed NAME[:SCHEME][@class]."""

    text: str
    method: registry.Method
    scheme: str
    by_class: bool

    @property
    def random(self) -> bool:
        """Whether two draws differ."""
        return self.scheme not in FIXED

    @property
    def draws_itself(self) -> bool:
        """Whether the method makes its own draw (and nobody asked for another)."""
        own = bool(self.method.draw) and self.text == self.method.name
        return own and self.method.name != BASELINE


def parse(text: str, task: str) -> Contender:
    """Read NAME[:SCHEME][@class]; `InputError` for anything unknown or unfit for the task."""
    rest, _, stratum = text.partition("@")
    name, _, scheme = rest.partition(":")
    require(stratum in ("", "class") and not text.endswith("@"), "methods", repr(text),
            "NAME[:SCHEME][@class]")  # fmt: skip
    known = {m.name: m for kind in ("examples", "rows") for m in registry.methods(kind)}
    require(name in known, "methods", repr(name), f"some of {', '.join(known)}")
    method = known[name]
    require(not scheme or scheme in SCHEMES, "methods", f"scheme {scheme!r}",
            f"one of {', '.join(SCHEMES)}")  # fmt: skip
    require(name != BASELINE or not scheme, "methods", repr(text), "uniform without a scheme")
    if task == "regression":
        require(method.kind == "rows", "methods", f"{name!r} for regression", "a score of rows")
        require(not stratum, "methods", f"{text!r} for regression", "no classes")
    return Contender(text, method, scheme or method.scheme, stratum == "class")


def parse_all(texts: Sequence[str] | None, task: str) -> list[Contender]:
    """The contenders, the baseline first; it competes even where nobody names it."""
    if isinstance(texts, str):
        texts = [part.strip() for part in texts.split(",")]
    wanted = DEFAULTS[task] if texts is None else (BASELINE, *texts)
    contenders = [parse(text, task) for text in dict.fromkeys(wanted)]
    require(len(contenders) > 1, "methods", "only uniform", "at least one to compare with it")
    return contenders


def seed_of(*parts: int | str) -> int:
    """A seed that depends on these parts alone, whoever else competes."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


# ── scores ────────────────────────────────────────────────────────────────────────────────────


def score_contenders(
    contenders: Sequence[Contender], x: Float, y: NDArray[Any], task: str, seed: int
) -> dict[str, tuple[Float, float]]:
    """Method -> (scores of the training rows, seconds), one computation a method."""
    methods = {c.method.name: c.method for c in contenders if needs_scores(c)}
    scores = {}
    matrix = design(x, y, task)
    for method in methods.values():
        if method.kind == "rows":
            started = time.perf_counter()
            p = DEFAULT_P.get(method.name, 1.0)
            values = np.asarray(call(method.function, matrix, p=p, rng=seed))
            scores[method.name] = values, time.perf_counter() - started
    probes = [method.name for method in methods.values() if method.kind == "examples"]
    if probes:
        score_all = registry.resolve("scoredraw.data_selection.probe:score_all")
        scores |= score_all(x, y, probes, rng=seed)
    return scores


def needs_scores(contender: Contender) -> bool:
    return contender.method.name != BASELINE and not contender.draws_itself and not sized(contender)


def sized(contender: Contender) -> bool:
    """Whether the scores depend on how many rows are wanted."""
    function = contender.method.function
    return bool(function) and "size" in signature(registry.resolve(function)).parameters


def design(x: Float, y: NDArray[Any], task: str) -> Float:
    """The matrix whose rows are scored: intercept, features, and for a regression the target."""
    parts = [np.ones((len(x), 1)), x]
    if task == "regression":
        parts.append(y[:, None])
    return np.hstack(parts)


def call(reference: str, matrix: Float, **known: Any) -> Any:
    """Call a method with those of the known arguments that it takes, on one core."""
    function = registry.resolve(reference)
    known |= {"engine": Engine("local", 1), "workers": 1}
    parameters = signature(function).parameters
    arguments = {name: value for name, value in known.items() if name in parameters}
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is Parameter.empty
        and parameter.kind is not Parameter.VAR_KEYWORD
        and name not in arguments
    ]
    if missing:
        raise InputError(f"methods: got {reference}, want one that needs no {', '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # indicators and an intercept are dependent by design
        return function(matrix, **arguments)


# ── draws ─────────────────────────────────────────────────────────────────────────────────────


def draw_for(
    contender: Contender,
    scores: Float | None,
    matrix: Float,
    labels: NDArray[Any],
    size: int,
    seed: int,
) -> Draw:
    """The contender's draw of `size` rows."""
    by = labels if contender.by_class else None
    if contender.method.name == BASELINE:
        return sampling.uniform(len(matrix), size, rng=seed, by=by)
    p = DEFAULT_P.get(contender.method.name, 1.0)
    if contender.draws_itself:
        draw: Draw = call(contender.method.draw, matrix, p=p, size=size, rng=seed)
        return draw
    if scores is None:
        found = call(contender.method.function, matrix, p=p, size=size)
        scores = np.asarray(getattr(found, "scores", found))
    if contender.method.easy == "high":  # a large draw is of what is hard, whatever the sign
        scores = -scores
    if contender.scheme in FIXED:
        largest = contender.scheme == "top_k"
        return sampling.top_k(scores, size, largest=largest, rng=seed, by=by)
    measure = scores if contender.method.kind == "rows" else sampling.linear(scores)
    return sampling.SCHEMES[contender.scheme](measure, size, rng=seed, by=by)
