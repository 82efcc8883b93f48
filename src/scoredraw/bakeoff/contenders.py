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
from dataclasses import dataclass, field, replace
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
PROBES = "scoredraw.data_selection.probe"
SCHEMES = (*sampling.SCHEMES, "bottom_k")
FIXED = ("top_k", "bottom_k")  # schemes that leave nothing to chance
DEFAULTS = {
    "classification": (
        *("uniform", "uniform@class", "leverage", "ridge-leverage", "lewis", "root-leverage"),
        *("el2n", "el2n:poisson", "grand", "forgetting", "forgetting:bottom_k@class"),
        *("vog", "tracin", "pvi"),
        *("k-center", "facility-location", "herding", "uncertainty"),
        *("add-one-in", "ccs", "dealrec", "odis-probe", "quad"),
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
        """Whether two draws of the same training rows differ, cheaply enough to repeat."""
        return self.scheme not in FIXED and not (self.draws_itself and self.method.kind != "rows")

    @property
    def draws_itself(self) -> bool:
        """Whether the method makes its own draw (and nobody asked for another)."""
        own = bool(self.method.draw) and self.text == self.method.name
        return own and self.method.name != BASELINE

    @property
    def needs_scores(self) -> bool:
        """Whether its draws start from the method's scores, which do not depend on the size."""
        if not self.method.function or takes(self.method.function, "size"):
            return False
        return not self.draws_itself or takes(self.method.draw, "scores")

    @property
    def needs_probes(self) -> bool:
        """Whether its own draw starts from all the scores of the probes."""
        return self.draws_itself and takes(self.method.draw, "probe_scores")


@dataclass(frozen=True, eq=False)
class Rows:
    """The training rows of a split as methods take them: features, labels, the matrix [1 x (y)].

    scores, probes: name -> (one score a row, seconds), of methods and of the probes;
    probe_seconds: what all the probes took together.
    """

    x: Float
    y: NDArray[Any]
    matrix: Float
    scores: dict[str, tuple[Float, float]] = field(default_factory=dict)
    probes: dict[str, tuple[Float, float]] = field(default_factory=dict)
    probe_seconds: float = 0.0

    def data(self, method: registry.Method) -> tuple[Any, ...]:
        """What the method's functions begin with."""
        return (self.matrix,) if method.kind == "rows" else (self.x, self.y)


def parse(text: str, task: str) -> Contender:
    """Read NAME[:SCHEME][@class]; `InputError` for anything unknown or unfit for the task."""
    rest, _, stratum = text.partition("@")
    name, _, scheme = rest.partition(":")
    require(stratum in ("", "class") and not text.endswith("@"), "methods", repr(text),
            "NAME[:SCHEME][@class]")  # fmt: skip
    known = {
        m.name: m for kind in ("examples", "rows") for m in registry.methods(kind) if not m.takes
    }
    require(name in known, "methods", repr(name), f"some of {', '.join(known)}")
    method = known[name]
    require(not scheme or scheme in SCHEMES, "methods", f"scheme {scheme!r}",
            f"one of {', '.join(SCHEMES)}")  # fmt: skip
    require(name != BASELINE or not scheme, "methods", repr(text), "uniform without a scheme")
    whole = name == BASELINE or bool(method.function) or text == name
    require(whole, "methods", repr(text), f"{name!r} alone: it makes the whole draw itself")
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


def score_contenders(contenders: Sequence[Contender], rows: Rows, seed: int) -> Rows:
    """The rows with the scores of every method that starts from some, one computation a method.

    Those of the probes (functions `score_NAME` of `data_selection.probe`) share their training.
    """
    methods = {c.method.name: c.method for c in contenders if c.needs_scores}
    of_probes = {name: probe for name in methods if (probe := probe_of(methods[name]))}
    wanted = list(dict.fromkeys(of_probes.values()))
    if any(contender.needs_probes for contender in contenders):
        wanted = list(registry.resolve(f"{PROBES}:METHODS"))
    probes: dict[str, tuple[Float, float]] = {}
    started = time.perf_counter()
    if wanted:
        probes = registry.resolve(f"{PROBES}:score_all")(rows.x, rows.y, wanted, rng=seed)
    rows = replace(rows, scores={}, probes=probes, probe_seconds=time.perf_counter() - started)
    for name, method in methods.items():
        started = time.perf_counter()
        if name in of_probes:
            rows.scores[name] = probes[of_probes[name]]
            continue
        data, p = rows.data(method), DEFAULT_P.get(name, 1.0)
        values = np.asarray(call(method.function, data, p=p, rng=seed))
        rows.scores[name] = values, time.perf_counter() - started
    return rows


def probe_of(method: registry.Method) -> str:
    """Which score of `probe.score_all` the method's is, or ""."""
    prefix = f"{PROBES}:score_"
    return method.function.removeprefix(prefix) if method.function.startswith(prefix) else ""


def takes(reference: str, parameter: str) -> bool:
    """Whether the function of that reference has such a parameter."""
    return bool(reference) and parameter in signature(registry.resolve(reference)).parameters


def design(x: Float, y: NDArray[Any], task: str) -> Float:
    """The matrix whose rows are scored: intercept, features, and for a regression the target."""
    parts = [np.ones((len(x), 1)), x]
    if task == "regression":
        parts.append(y[:, None])
    return np.hstack(parts)


def call(reference: str, data: tuple[Any, ...], **known: Any) -> Any:
    """Call a method with those of the known arguments that it takes, on one core."""
    function = registry.resolve(reference)
    known |= {"engine": Engine("local", 1), "workers": 1}
    parameters = signature(function).parameters
    arguments = {name: value for name, value in known.items() if name in parameters}
    missing = [
        name
        for name, parameter in list(parameters.items())[len(data) :]
        if parameter.default is Parameter.empty
        and parameter.kind is not Parameter.VAR_KEYWORD
        and name not in arguments
    ]
    if missing:
        raise InputError(f"methods: got {reference}, want one that needs no {', '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # indicators and an intercept are dependent by design
        return function(*data, **arguments)


# ── draws ─────────────────────────────────────────────────────────────────────────────────────


def draw_for(contender: Contender, rows: Rows, size: int, seed: int) -> Draw:
    """The contender's draw of `size` rows."""
    by = rows.y if contender.by_class else None
    method = contender.method
    if method.name == BASELINE:
        return sampling.uniform(len(rows.y), size, rng=seed, by=by)
    p, known = DEFAULT_P.get(method.name, 1.0), rows.scores.get(method.name, (None, 0.0))[0]
    if contender.draws_itself:
        probes = {name: values for name, (values, _) in rows.probes.items()}
        draw: Draw = call(
            method.draw, rows.data(method), p=p, size=size, rng=seed, scores=known,
            probe_scores=probes,
        )  # fmt: skip
        return draw
    if known is None:
        found = call(method.function, rows.data(method), p=p, size=size)
        known = np.asarray(getattr(found, "scores", found))
    scores = -known if method.easy == "high" else known  # a large draw is of what is hard
    if contender.scheme in FIXED:
        largest = contender.scheme == "top_k"
        return sampling.top_k(scores, size, largest=largest, rng=seed, by=by)
    measure = scores if method.kind == "rows" else sampling.linear(scores)
    return sampling.SCHEMES[contender.scheme](measure, size, rng=seed, by=by)


def scoring_seconds(contender: Contender, rows: Rows) -> float:
    """What the scores that its draws start from took."""
    if contender.needs_probes:
        return rows.probe_seconds
    return rows.scores.get(contender.method.name, (None, 0.0))[1]
