"""A plan for collecting data: from a table of pilot rows to how many to ask of each source.

The table holds rows of several sources; other rows stand for what the model will be judged on. A
quick classifier is trained on mixtures of the pilots, and `Projektor` makes of that a forecast for
any mixture and size. Its best mixture need not be the best one, so it meets the mixture of least
transport, the best pilot and an even split in a final round of trainings, which decides. Further
trainings show how far the forecast can be trusted.

Kang, Just, Sahu and Jia, 2023, "Performance Scaling via Optimal Transport: Enabling Data Selection
from Partially Revealed Sources", arXiv:2307.02460.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.mixture_baselines import random_mixtures
from scoredraw.data_selection.mixture_runs import Progress, TrainAndEval, mixture_counts
from scoredraw.data_selection.projektor import Calibration, Projektor
from scoredraw.data_selection.simplex import mixture_grid
from scoredraw.errors import require
from scoredraw.metrics import Estimate, mean_interval
from scoredraw.reports import Cell, Figure, ReportTable, Series
from scoredraw.uniforms import Rng, RowUniforms

Array = NDArray[np.float64]

MODELS = ("logistic", "forest", "nearest")
FINALISTS = ("projected", "fitted", "transport", "pilot", "even")
FINAL_REPEATS = 2  # times the repeats of a pilot
CHECKS = 6  # mixtures that are trained only to see whether the forecast was right
SMALLEST = 10  # rows, for the smaller of two pilot sizes


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """What to collect, what it should give, and why to believe it.

    sources : m names. chosen : the candidate that won the final round; shares (m,) its mixture,
    counts (m,) of n rows. finalists : what every candidate (see `candidate_mixtures`) measured
    there. performance : forecast at n, and where a new measurement should fall. even : the same
    for an even split. gain : their difference.
    transport_gradient (m,) : at the even split, ∂OT/∂p_i; the most negative brings the mixture
    nearest to the validation data. slopes (m,) : of the forecast performance, summing to 0.
    calibration : fresh mixtures at the larger pilot size. projection : fresh mixtures at a size
    beyond both, where the pilots allow it, else None. notes : what a reader should know.
    """

    sources: list[str]
    n: int
    sizes: tuple[int, int]
    chosen: str
    shares: Array
    counts: NDArray[np.int64]
    finalists: dict[str, Estimate]
    performance: Estimate
    even: Estimate
    gain: Estimate
    transport: float
    even_transport: float
    transport_gradient: Array
    slopes: Array
    calibration: Calibration
    projection: Calibration | None
    form: str
    figures: list[Figure]
    notes: list[str]

    @property
    def ranking(self) -> list[str]:
        """The sources, the one that brings the mixture nearest to the validation data first."""
        return [self.sources[k] for k in np.argsort(self.transport_gradient, kind="stable")]

    def table(self) -> ReportTable:
        """A row a source: share, rows to collect, both gradients."""
        rows: list[list[Cell]] = [
            [name, float(p), int(count), float(f), float(g)]
            for name, p, count, f, g in zip(
                self.sources,
                self.shares,
                self.counts,
                self.transport_gradient,
                self.slopes,
                strict=True,
            )
        ]
        return ReportTable(
            f"{self.n:,} rows to collect",
            ["source", "share", "rows", "∂OT/∂p, even split", "∂performance/∂p, even split"],
            rows,
            f"Forecast {self.performance}; an even split {self.even}; gain {self.gain}.",
        )


def plan_mixture(
    features: ArrayLike,
    labels: ArrayLike,
    sources: ArrayLike,
    val_features: ArrayLike,
    val_labels: ArrayLike,
    *,
    n: int,
    model: str | Callable[[], Any] = "logistic",
    sizes: tuple[int, int] | None = None,
    grid: int | ArrayLike | None = None,
    repeats: int = 3,
    form: str = "auto",
    link: str = "log_error",
    label_metric: str = "gaussian",
    rng: Rng = 0,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> MixturePlan:
    """The mixture of sources to collect n rows of, for accuracy on data like the validation data.

    Parameters
    ----------
    features (N, d), labels (N,) of any kind, sources (N,) names: the pilot rows. Features are
        standardised by the pilots' mean and deviation.
    val_features (v, d), val_labels (v,) : what the model will be judged on.
    n : rows to be collected.
    model : "logistic", "forest", "nearest" (neighbours), or a function that makes a classifier
        with fit and predict.
    sizes : N0 < N1 of the pilot trainings; by default the smallest source's rows and half of them.
    grid : steps a share is cut into, or mixtures (g, m); by default up to 36 mixtures. Lattice
        points for which a source has too few rows are left out.
    repeats : trainings a mixture and size (the median counts).
    form, link, label_metric : as in `Projektor`.
    journal : a file of finished trainings; the same call goes on from it.
    progress : called as (trainings done, trainings in all).

    Raises
    ------
    InputError
        lengths that disagree, NaN or infinity, one source or one class only, sizes the pilots
        have no rows for, n < 1, an unknown model.

    Time g x 2 x repeats + 17 x repeats trainings (a minute for 36 mixtures of a few hundred rows),
    and some 500 exact transports; memory O(N d + rows x v).

    >>> rng = np.random.default_rng(0)
    >>> x, v = rng.normal(size=(120, 2)), rng.normal(size=(60, 2))
    >>> source = np.repeat(["crowd", "expert"], 60)
    >>> y = np.where(source == "expert", x[:, 0] > 0, rng.random(120) > 0.5)
    >>> plan = plan_mixture(x, y, source, v, v[:, 0] > 0, n=200, grid=6, repeats=5)
    >>> plan.ranking[0], bool(plan.shares[1] > plan.shares[0])
    ('expert', True)
    """
    x, y, names, code, xv, yv = _checked(features, labels, sources, val_features, val_labels)
    require(n >= 1, "n", n, "a size above 0")
    require(repeats >= 1, "repeats", repeats, "1 or more")
    pilots = [(x[code == k], y[code == k]) for k in range(len(names))]
    sizes = _pilot_sizes(sizes, [len(y) for _, y in pilots])
    uniforms = RowUniforms(rng)
    rows = [len(labels) for _, labels in pilots]
    lattice = _lattice(grid, len(names), sizes[1], rows)
    even, beyond = np.full((1, len(names)), 1 / len(names)), len(names) * min(rows)
    further = beyond if beyond >= 1.5 * sizes[1] else None
    runs = 2 * len(lattice) + CHECKS + (further is not None) + FINAL_REPEATS * len(FINALISTS)
    total = repeats * runs
    projektor = Projektor(form=form, link=link, label_metric=label_metric).fit(
        pilots,
        (xv, yv),
        accuracy_on(xv, yv, model, seed=int(uniforms.key[0] >> np.uint64(32))),
        sizes,
        lattice,
        repeats=repeats,
        rng=uniforms,
        journal=journal,
        depends=[getattr(model, "__qualname__", str(model)), xv.tolist(), yv.astype(str).tolist()],
        progress=None if progress is None else (lambda done, _: progress(done, total)),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        candidates = candidate_mixtures(projektor, n)
    chosen, finals = final_round(projektor, candidates, FINAL_REPEATS * repeats)
    checks = random_mixtures(projektor.runs_, sizes[1], CHECKS, uniforms)
    calibration = projektor.calibrate(checks, sizes[1])
    projection = None if further is None else projektor.calibrate(even, further)
    if progress is not None:
        progress(total, total)  # also where a candidate could not be trained
    notes = list(dict.fromkeys(str(w.message) for w in caught))
    missing = sorted({str(c) for c in np.unique(yv)} - {str(c) for c in np.unique(y)})
    if missing:
        notes.append(f"no source has the validation classes {', '.join(missing)}")
    plan = _plan(projektor, names, n, chosen, candidates[chosen], finals, calibration, projection)
    return replace(plan, figures=_figures(projektor, plan), notes=notes + _notes(projektor, plan))


def candidate_mixtures(projektor: Projektor, n: float, steps: int = 100) -> dict[str, Array]:
    """The mixtures between which a final round of trainings decides.

    "projected" climbs the forecast at n, as the paper does; "fitted" climbs the fit at N1, which
    has not been through the projection; "transport" has least OT; "pilot" is the grid's best at
    N1; "even" is 1/m each. Both climbs start from the even split and from the grid's best.
    """

    def climb(size: float) -> Array:
        forecasts = projektor.predict(projektor.grid_, size)
        starts = (None, projektor.grid_[int(np.argmax(forecasts))])
        found = [projektor.optimize(size, steps, start=start) for start in starts]
        return max(found, key=lambda each: float(each[1].values.max()))[0]

    m = projektor.runs_.m
    return {
        "projected": climb(n),
        "fitted": climb(projektor.sizes_[1]),
        "transport": projektor.nearest(steps)[0],
        "pilot": projektor.grid_[int(projektor.performance_[:, 1].argmax())],
        "even": np.full(m, 1 / m),
    }


def final_round(
    projektor: Projektor, candidates: dict[str, Array], repeats: int
) -> tuple[str, dict[str, Estimate]]:
    """Train the candidates at N1 on fresh draws that all share; the best on average, and each's.

    A candidate that the pilots have too few rows for stays out; InputError if that is all of them.
    """
    n1 = projektor.sizes_[1]
    able = {name: p for name, p in candidates.items() if projektor.runs_.feasible(p, n1)[0]}
    require(bool(able), "sizes", f"{n1}, too many rows for every candidate", "a smaller size")
    shares = np.stack(list(able.values()))
    values = projektor.runs_.measure(shares, n1, repeats=repeats, stream="final")
    found = {name: mean_interval(v) for name, v in zip(able, values, strict=True)}
    return max(found, key=lambda name: found[name].value), found


def _plan(
    projektor: Projektor,
    names: list[str],
    n: int,
    chosen: str,
    shares: Array,
    finalists: dict[str, Estimate],
    calibration: Calibration,
    projection: Calibration | None,
) -> MixturePlan:
    even = np.full(len(names), 1 / len(names))
    at_even = projektor.transport(even)
    return MixturePlan(
        sources=names,
        n=n,
        sizes=projektor.sizes_,
        chosen=chosen,
        shares=shares,
        counts=mixture_counts(shares, n),
        finalists=finalists,
        performance=projektor.interval(shares, n),
        even=projektor.interval(even, n),
        gain=projektor.interval(shares, n, against=even),
        transport=projektor.transport(shares).value,
        even_transport=at_even.value,
        transport_gradient=at_even.gradient,
        slopes=projektor.gradient(even, n),
        calibration=calibration,
        projection=projection,
        form=projektor.model_.form_,
        figures=[],
        notes=[],
    )


def _notes(projektor: Projektor, plan: MixturePlan) -> list[str]:
    """In words: what was fitted, whether the gain is real, how the checks came out."""
    n0, n1 = plan.sizes
    ridge = projektor.model_.ridge_
    chosen = f"form {plan.form}" + (f" with ridge {ridge:g}" if ridge else "")
    notes = [f"{len(projektor.grid_)} mixtures at {n0} and {n1} rows; {chosen}"]
    round_of = ", ".join(f"{name} {value}" for name, value in plan.finalists.items())
    notes.append(f"final round at {n1} rows, won by {plan.chosen}: {round_of}")
    if plan.chosen == "even":
        notes.append("no candidate did better than an even split")
    elif not plan.gain.above(0):
        notes.append("the forecast gain over an even split can't be told from 0")
    check = plan.calibration
    notes.append(
        f"{len(check.measured)} fresh mixtures at {n1} rows: forecast off by {check.mae:.3f} on "
        f"average, {check.coverage:.0%} of them inside the interval"
    )
    if plan.projection is not None:
        one, got = plan.projection.predicted[0], float(plan.projection.measured[0])
        side = "inside" if one.low <= got <= one.high else "outside"
        notes.append(
            f"an even split at {plan.projection.n} rows: forecast {one}, measured {got:.3f}, "
            f"{side} the interval"
        )
    return notes


def _figures(projektor: Projektor, plan: MixturePlan) -> list[Figure]:
    even = np.full(len(plan.sources), 1 / len(plan.sources))
    bars = [
        Series("even split", plan.sources, even.tolist(), baseline=True),
        Series("plan", plan.sources, plan.shares.tolist()),
    ]
    sizes = np.unique(np.geomspace(plan.sizes[0], max(plan.n, plan.sizes[1]), 12).round())
    lines = []
    for name, p in (("even split", even), ("plan", plan.shares)):
        ends = [projektor.interval(p, float(size)) for size in sizes]
        lines.append(
            Series(
                name,
                sizes.tolist(),
                [e.value for e in ends],
                [e.low for e in ends],
                [e.high for e in ends],
                baseline=p is even,
            )
        )
    left_out = projektor.model_.leave_one_out()[:, 1]
    seen, measured = np.isfinite(left_out), projektor.performance_[:, 1]
    check = plan.calibration
    clouds = [
        Series("grid, each left out", left_out[seen].tolist(), measured[seen].tolist()),
        Series("fresh mixtures", [e.value for e in check.predicted], check.measured.tolist()),
    ]
    return [
        Figure("bar", "What to collect", "source", "share", bars),
        Figure(
            "line", "Forecast by size", "rows", "accuracy", lines, log_x=True,
            caption="Bands: where a new measurement should fall (95 %).",
        ),
        Figure(
            "scatter", f"Forecast and measurement at {plan.sizes[1]} rows", "forecast", "measured",
            clouds,
        ),
    ]  # fmt: skip


def accuracy_on(
    xv: NDArray[Any], yv: NDArray[Any], model: str | Callable[[], Any] = "logistic", seed: int = 0
) -> TrainAndEval:
    """The function (X, y) -> accuracy on (xv, yv) of a fresh classifier.

    Training data of one class give the classifier that always answers with it.

    >>> accuracy_on(np.array([[0.0], [1.0]]), np.array([0, 1]))(np.zeros((3, 1)), np.ones(3))
    0.5
    """
    make = model if callable(model) else _maker(model, seed)

    def train_and_eval(X: NDArray[Any], y: NDArray[Any]) -> float:
        if (y == y[0]).all():
            return float((yv == y[0]).mean())
        return float((make().fit(X, y).predict(xv) == yv).mean())

    return train_and_eval


def _maker(model: str, seed: int) -> Callable[[], Any]:
    require(model in MODELS, "model", repr(model), " or ".join(MODELS))

    def make() -> Any:
        if model == "logistic":
            from sklearn.linear_model import LogisticRegression

            return LogisticRegression(max_iter=1000)
        if model == "forest":
            from sklearn.ensemble import RandomForestClassifier

            return RandomForestClassifier(random_state=seed)
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(1)

    return make


def _checked(
    features: ArrayLike,
    labels: ArrayLike,
    sources: ArrayLike,
    val_features: ArrayLike,
    val_labels: ArrayLike,
) -> tuple[Array, NDArray[Any], list[str], NDArray[np.int64], Array, NDArray[Any]]:
    x, xv = (np.asarray(v, dtype=np.float64) for v in (features, val_features))
    y, yv, source = np.asarray(labels), np.asarray(val_labels), np.asarray(sources)
    for name, array in (("features", x), ("val_features", xv)):
        ok = array.ndim == 2 and array.size > 0
        require(ok, name, f"shape {array.shape}", "(rows, columns), not empty")
        require(bool(np.isfinite(array).all()), name, "NaN or infinity", "finite numbers")
    columns = f"{xv.shape[1]} columns"
    require(xv.shape[1] == x.shape[1], "val_features", columns, f"{x.shape[1]}, as in features")
    for name, array, rows in (
        ("labels", y, len(x)), ("sources", source, len(x)), ("val_labels", yv, len(xv)),
    ):  # fmt: skip
        require(array.shape == (rows,), name, f"shape {array.shape}", f"({rows},), one a row")
    names, code = np.unique(source, return_inverse=True)
    require(len(names) >= 2, "sources", f"{len(names)} source", "two or more")
    require(len(np.unique(y)) >= 2, "labels", "one class", "two or more")
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    return (x - centre) / scale, y, [str(s) for s in names], code, (xv - centre) / scale, yv


def _pilot_sizes(sizes: tuple[int, int] | None, rows: list[int]) -> tuple[int, int]:
    if sizes is not None:
        n0, n1 = sizes
        require(0 < n0 < n1, "sizes", f"{n0} and {n1}", "0 < n0 < n1")
        return int(n0), int(n1)
    n1 = min(rows)
    came = f"none, and a source of {n1} rows"
    require(n1 // 2 >= SMALLEST, "sizes", came, f"{2 * SMALLEST} rows a source, or sizes")
    return n1 // 2, n1


def _lattice(grid: int | ArrayLike | None, m: int, n1: int, rows: list[int]) -> Array:
    """The mixtures to train; a lattice without what the sources have too few rows for."""
    if grid is not None and np.ndim(grid) > 0:
        return np.asarray(grid, dtype=np.float64)
    P = mixture_grid(m, None if grid is None else int(np.asarray(grid)))
    P = P[(mixture_counts(P, n1) <= np.array(rows)).all(axis=1)]
    came = f"{n1} for sources of {rows} rows"
    require(len(P) > m, "sizes", came, "sizes or a grid that leave more mixtures to train")
    return P
