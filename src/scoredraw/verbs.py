"""The verbs: `score` and `draw` for any kind of input and any method of the catalogue, by name.

    scores = sd.score("rows", A, method="lewis", p=1)
    chosen = sd.draw("rows", "data/*.parquet", method="lewis", p=1, size="1%", seed=0)

`kind` says what the input is: "rows" of a matrix, scored for what they weigh in every fit, or
"examples" (features and a target, texts, quality ratings, preference pairs), scored for what they
are worth to a learner. A method is a function of a room that the catalogue names; what it takes
besides the data are its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from scoredraw import example_inputs, registry, sampling
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require
from scoredraw.execution import Blocks, Engine, as_blocks
from scoredraw.inclusion import Float, Int, as_scores
from scoredraw.tables import open_table
from scoredraw.uniforms import RowUniforms

# what the verbs give a method, and what its name decides already; the rest are its options
SUPPLIED = (
    *("engine", "rng", "workers", "progress", "size"),
    *("method", "sketch", "return_info", "scores", "probe_scores", "reference", "tokens"),
)
DEFAULT_P = {"split": 3.0}  # splitting is for p > 2; the others default to least absolute values
MAPS: dict[str, Callable[..., Float]] = {
    "linear": sampling.linear,
    "softmax": sampling.softmax,
    "rank": sampling.rank,
}


@dataclass(frozen=True)
class Job:
    """A method bound to an input: `scores(size)` and, where the method has one, its own draw."""

    method: registry.Method
    n: int
    _score: Callable[..., Any] | None
    _draw: Callable[..., Draw] | None
    _known: dict[float | None, Float] = field(default_factory=dict)

    @property
    def scores_nothing(self) -> bool:
        """Whether the method is a draw without scores (uniform)."""
        return self._score is None

    @property
    def makes_draws(self) -> bool:
        """Whether the method makes the whole draw itself (recursive ones do)."""
        return self._draw is not None

    def scores(self, size: float | None = None) -> Float:
        """One number a row, float64 (n,), computed once (once a size if it depends on that)."""
        if self._score is None:
            raise InputError(f"method: got {self.method.name}, want a method that gives scores")
        sized = _takes(self._score, "size")
        key = size if sized else None
        if key not in self._known:
            found = self._score(size=size or self.n) if sized else self._score()
            self._known[key] = np.asarray(getattr(found, "scores", found), np.float64)
        return self._known[key]

    @property
    def spends_tokens(self) -> bool:
        """Whether the draw that it makes itself can have a budget of what examples cost."""
        return self._draw is not None and _takes(self._draw, "tokens")

    def draw(self, size: float, rng: Any, tokens: Any = None) -> Draw:
        """The draw that the method makes itself, from its scores where it starts from those."""
        assert self._draw is not None
        more = {} if tokens is None else {"tokens": np.asarray(tokens)}
        if self._score is not None and _takes(self._draw, "scores"):
            more["scores"] = self.scores(size)
        return self._draw(size=size, rng=rng, **more)


def bind(
    kind: str,
    source: Any,
    method: str,
    *,
    target: Any = None,
    columns: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    text: str | None = None,
    engine: Engine | None = None,
    seed: Any = 0,
    **options: Any,
) -> Job:
    """Open the input and bind a method to it; all that is wrong with either is found here.

    source: a matrix (array, CSR, blocks) or whatever `open_table` opens. target: a column's name
    or an array (n,); for rows it is one more column of the matrix, [A b]. columns: which ones (all
    numeric). exclude: columns that are no features. Raises InputError.
    """
    entry = registry.method(kind, method)
    score = registry.resolve(entry.function, entry.extra) if entry.function else None
    own = registry.resolve(entry.draw, entry.extra) if entry.draw else None
    uniform = method == "uniform"  # nothing to score, and any input will do
    can = [] if uniform else options_of(score, own)
    for name in options:
        takes = ", ".join(can) or "no options"
        require(name in can, name, f"an option that {method} does not have", takes)
    if uniform:
        return Job(entry, count(source), None, None)
    workers = engine.workers if engine else None
    known = {"engine": engine, "rng": seed, "workers": workers, "p": DEFAULT_P.get(method, 1.0)}
    known["progress"] = engine.progress if engine else None
    if kind == "rows":
        matrix = rows_matrix(source, target, columns, exclude)
        data: tuple[Any, ...] = (matrix,)
        n = matrix.n
    else:
        read = example_inputs.READERS[entry.takes]
        data = read(source, target=target, columns=columns, exclude=exclude, text=text)
        n = len(data[0])
    settings = {**known, **options}
    return Job(entry, n, _bound(score, data, settings), _bound(own, data, settings))


def score(kind: str, source: Any, *, method: str, **options: Any) -> Float:
    """Score every row: one float64 a row, by a method of the catalogue.

    kind: "rows" or "examples"; source, target, columns, engine, seed and the method's own options
    as in `bind`. Raises InputError. `registry.methods(kind)` lists the methods.

    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> score("rows", A, method="leverage").round(3).tolist()
    [1.0, 0.5, 0.5]
    """
    return bind(kind, source, method, **options).scores()


def draw(
    kind: str,
    source: Any,
    *,
    size: float | str,
    method: str | None = None,
    scores: Any = None,
    scheme: str | None = None,
    map: str | None = None,
    by: Any = None,
    ids: Any = None,
    costs: Any = None,
    keep: Any = None,
    exclude_rows: Any = None,
    seed: Any = 0,
    **options: Any,
) -> Draw:
    """Draw rows by a method's scores, or by scores of your own.

    size: a count, or a share such as "5%"; with costs (n,), the budget that they may add up to.
    Exactly one of method and scores. scheme: one of `sampling.SCHEMES` (the method's default).
    map: "linear", "softmax" or "rank", from any scores to a size measure. by: a label a row, drawn
    in proportion; ids: identities other than the position. keep: rows that are in for certain and
    count towards the size; exclude_rows: rows that cannot be drawn. Other options as in `bind`.
    Raises InputError.

    >>> A = np.random.default_rng(0).standard_normal((1000, 3))
    >>> chosen = draw("rows", A, method="leverage", size=100, seed=0)
    >>> chosen.method, chosen.unbiased
    ('leverage by poisson', True)
    """
    require(
        (method is None) != (scores is None), "method", "both or neither of it and scores", "one"
    )
    chosen = {"scheme": scheme, "map": map, "by": by, "ids": ids, "costs": costs, "keep": keep}
    if method is not None:
        job = bind(kind, source, method, seed=seed, **options)
    else:
        require(not options, next(iter(options), ""), "an option beside scores", "no options")
        job = given_scores(kind, scores)
        if source is not None:
            n = count(source)
            require(job.n == n, "scores", f"{job.n:,} scores", f"{n:,}, one a row")
    return draw_job(job, size, exclude_rows=exclude_rows, seed=seed, **chosen)


def draw_job(
    job: Job,
    size: float | str,
    *,
    scheme: str | None = None,
    map: str | None = None,
    by: Any = None,
    ids: Any = None,
    costs: Any = None,
    keep: Any = None,
    exclude_rows: Any = None,
    seed: Any = 0,
) -> Draw:
    """`draw` from a bound method: several sizes of one job are scored once."""
    require(scheme is None or scheme in sampling.SCHEMES, "scheme", repr(scheme),
            f"one of {', '.join(sampling.SCHEMES)}")  # fmt: skip
    require(map is None or map in MAPS, "map", repr(map), f"one of {', '.join(MAPS)}")
    k: float = parse_size(size, job.n) if costs is None else parse_budget(size)
    name, flip = job.method.name, -1.0 if job.method.easy == "high" else 1.0
    plain = all(x is None for x in (scheme, map, by, ids, keep, exclude_rows))
    if job.makes_draws and plain and (costs is None or job.spends_tokens):
        return replace(job.draw(k, RowUniforms(seed), costs), method=name)
    if job.makes_draws and job.scores_nothing:
        asked = {"scheme": scheme, "map": map, "by": by, "id": ids, "cost": costs, "keep": keep}
        asked["exclude"] = exclude_rows
        given = next(argument for argument, value in asked.items() if value is not None)
        require(False, given, "one", f"none: {name} makes the whole draw itself")
    if job.scores_nothing:  # uniform: the scheme itself is the method
        values, scheme = np.ones(job.n), scheme or ("uniform" if costs is None else "poisson")
    else:
        values, scheme = flip * job.scores(k), scheme or job.method.scheme
    if map is not None or (job.method.kind == "examples" and scheme not in ("uniform", "top_k")):
        values = MAPS[map or "linear"](values)
    made = _restricted(scheme, values, k, by, ids, costs, keep, exclude_rows, seed)
    if map is None and flip < 0 and made.scores is not None:
        made = replace(made, scores=flip * made.scores)
    return replace(made, method=made.method if name == "uniform" else f"{name} by {made.method}")


def given_scores(kind: str, scores: Any) -> Job:
    """A job whose scores are known: any finite numbers (n,)."""
    values = as_scores(scores)
    scheme = "poisson" if kind == "rows" else "top_k"
    entry = registry.Method(kind, "given scores", 0, "", scheme, "", "")
    return Job(entry, len(values), lambda: values, None)


def parse_size(size: float | str, n: int) -> int:
    """A count, or a share such as "5%" (at least one row), of a pool of n; InputError otherwise.

    >>> parse_size("5%", 200), parse_size(7, 200)
    (10, 7)
    """
    text, wanted = str(size).strip(), f"a count from 1 to {n} or a share from above 0% to 100%"
    try:
        share = text.endswith("%")
        number = float(text[:-1]) if share else int(text.replace("_", ""))
    except ValueError:
        raise InputError(f"size: got {size!r}, want {wanted}") from None
    require(0 < number <= (100 if share else n), "size", repr(size), wanted)
    return max(1, round(n * number / 100)) if share else int(number)


def parse_budget(budget: Any) -> float:
    """A positive number; InputError otherwise."""
    try:
        value = float(budget)
    except ValueError:
        value = -1.0
    require(0 < value < np.inf, "budget", repr(budget), "a positive number")
    return value


def count(source: Any) -> int:
    """How many rows an input has."""
    if isinstance(source, Blocks):
        return source.n
    return int(source.shape[0]) if hasattr(source, "shape") else open_table(source).num_rows


def rows_matrix(
    source: Any, target: Any, columns: list[str] | None, exclude: tuple[str, ...] = ()
) -> Blocks:
    """The matrix [A b] of an input as aligned blocks."""
    if isinstance(source, Blocks):
        return source
    array = hasattr(source, "tocsr") or isinstance(source, np.ndarray)
    if array and target is None:
        return as_blocks(source)
    if array:
        column = np.asarray(target, np.float64)
        require(column.shape == (source.shape[0],), "target", f"shape {column.shape}", "one a row")
        if hasattr(source, "tocsr"):
            from scipy.sparse import hstack

            return as_blocks(hstack([source, column[:, None]], format="csr"))
        return as_blocks(np.column_stack([source, column]))
    table = open_table(source)
    named = target is None or isinstance(target, str)
    require(named, "target", f"a {type(target).__name__}", "a column's name, for a table")
    names = columns if columns is not None else table.numeric_columns(exclude)
    if target is not None and target not in names:
        table.require_columns([target], "target")
        names = [*names, target]
    return table.blocks(names)


def _restricted(
    scheme: str, values: Float, size: float, by: Any, ids: Any, costs: Any, keep: Any,
    exclude: Any, seed: Any,
) -> Draw:  # fmt: skip
    """Draw among the rows that are neither kept for certain nor excluded, and put those back."""
    n = len(values)
    kept, gone = _positions(keep, n, "keep"), _positions(exclude, n, "exclude")
    both = np.intersect1d(kept, gone)
    if len(both):
        require(False, "exclude", f"row {both[0]}, which is also kept", "one or the other")
    if not len(kept) and not len(gone):
        return _by_scheme(scheme, values, size, by, ids, costs, seed)
    open_ = np.ones(n, bool)
    open_[kept] = open_[gone] = False
    pool = np.flatnonzero(open_)
    spent = len(kept) if costs is None else float(np.asarray(costs)[kept].sum())
    require(spent < size, "keep", f"{spent:g} kept already", f"less than the size {size:g}")
    rest = size - spent
    if costs is None:
        require(rest <= len(pool), "size", size, f"at most {len(kept) + len(pool)} after exclusion")
    part = _by_scheme(
        scheme,
        values[pool],
        rest if costs is not None else int(rest),
        None if by is None else np.asarray(by)[pool],
        pool.astype(np.uint64) if ids is None else np.asarray(ids)[pool],
        None if costs is None else np.asarray(costs)[pool],
        seed,
    )
    rows = np.concatenate([kept, pool[part.indices]])
    order = np.argsort(rows, kind="stable")
    ones = np.ones(len(kept))
    inclusion = None if part.inclusion is None else np.concatenate([ones, part.inclusion])[order]
    strata = part.info.get("strata")
    info = dict(part.info)
    if strata is not None:  # the certain rows are a stratum of their own
        info["strata"] = np.concatenate([np.full(len(kept), -1), strata])[order]
    if info["design"] in ("residual", "replacement"):  # the rows kept for certain are not drawn
        info["design"] = None
    return replace(
        part, indices=rows[order], weights=np.concatenate([ones, part.weights])[order], n=n,
        inclusion=inclusion, scores=values[rows[order]], unbiased=part.unbiased and not len(gone),
        info=info,
    )  # fmt: skip


def _by_scheme(
    scheme: str, values: Float, size: float, by: Any, ids: Any, costs: Any, seed: Any
) -> Draw:
    if scheme == "uniform":
        return sampling.uniform(len(values), int(size), rng=seed, by=by, ids=ids)
    if costs is None:
        return sampling.SCHEMES[scheme](values, int(size), rng=seed, by=by, ids=ids)
    can = ("poisson", "top_k")
    require(scheme in can, "cost", f"the scheme {scheme}", f"one of {', '.join(can)}")
    require(by is None, "cost", "a cost and strata", "one or the other")
    return sampling.SCHEMES[scheme](values, size, rng=seed, ids=ids, costs=costs)


def _positions(rows: Any, n: int, argument: str) -> Int:
    found = np.unique(np.asarray([] if rows is None else rows, np.int64))
    inside = not len(found) or (found[0] >= 0 and found[-1] < n)
    if not inside:
        odd = found[0] if found[0] < 0 else found[-1]
        require(False, argument, f"row {odd}", f"rows from 0 to {n - 1}")
    return found


def options_of(*functions: Callable[..., Any] | None) -> list[str]:
    """The options of a method: what its functions take besides the data and what the verbs give.

    >>> options_of(registry.resolve("scoredraw.data_selection.probe:score_el2n"))
    ['probe', 'seeds', 'epochs']
    """
    found: dict[str, None] = {}
    for function in functions:
        parameters = () if function is None else inspect.signature(function).parameters.values()
        for given in parameters:
            optional = given.default is not inspect.Parameter.empty or given.name == "p"
            if optional and given.name not in SUPPLIED:
                found[given.name] = None
    return list(found)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _bound(
    function: Callable[..., Any] | None, data: tuple[Any, ...], settings: dict[str, Any]
) -> Callable[..., Any] | None:
    """The function with the input and those of the settings that it takes."""
    if function is None:
        return None
    chosen = {name: v for name, v in settings.items() if _takes(function, name) and v is not None}
    return partial(function, *data, **chosen)
