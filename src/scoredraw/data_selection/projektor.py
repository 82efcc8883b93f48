"""Which mixture of data sources to collect, from a small sample of each (projektor).

Before data are bought or labelled there is a pilot sample of every source. Train on mixtures of
the pilots at two small sizes, fit performance to the mixture and its transport distance to the
validation data, project to the size wanted, and climb to the best mixture:

    fit        a grid of mixtures at N0 and N1             (`mixture_runs`, `mixture_performance`)
    predict    L(p, N) from L(p, N0) and L(p, N1)          (`size_projection`)
    optimize   p ← Π_Δ(p + η ∇_p L(p, N))                  (`source_transport`, `simplex`)

The released notebook steps along the gradient at N0 alone and computes the projected one without
using it; it leaves the simplex, as only two of three shares are updated and none is clipped. Here
the gradient is that of the projected performance, and every step is projected.

Kang, Just, Sahu and Jia, 2023, "Performance Scaling via Optimal Transport: Enabling Data Selection
from Partially Revealed Sources", arXiv:2307.02460.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.mixture_performance import MixturePerformanceModel
from scoredraw.data_selection.mixture_runs import MixtureRuns, Progress, Source, TrainAndEval
from scoredraw.data_selection.simplex import Trace, mixture_grid, optimise_mixture
from scoredraw.data_selection.size_projection import (
    LINKS,
    projection_weights,
    warn_amplification,
)
from scoredraw.data_selection.source_transport import (
    SourceTransport,
    check_mixtures,
    ot_with_source_gradient,
    otdd_cost,
    source_means,
)
from scoredraw.errors import require
from scoredraw.metrics import Estimate
from scoredraw.uniforms import Rng

Array = NDArray[np.float64]


class Projektor:
    """Fit pilots, predict any mixture at any size, find the best mixture.

    Parameters
    ----------
    form, ridge : the regression, as in `MixturePerformanceModel`; by default chosen by BIC.
    link : the scale that is affine in log N, "identity" (the paper's), "log_error" or "log".
    label_metric, lam : the label cost of `otdd_cost`; classes are described by all sources' rows.
    reg : entropic transport with this strength; None is exact.
    embed : X -> features in which distances mean something; by default X itself.
    bounds : what performance can be; (0, 1) for accuracies. Predictions are clipped to it.
    maximise : False where performance is a loss.
    ot_rows : at most this many rows of a source, and of the validation data, enter transport.

    Attributes
    ----------
    runs_ : the `MixtureRuns`. model_ : the fitted regression, a column a size.
    grid_, ot_, performance_ : (g, m), (g,), (g, 2) medians over repeats. sizes_ : (N0, N1).

    Time: g x 2 x repeats trainings, then one transport a mixture or step; memory O(rows x nv).

    >>> rng = np.random.default_rng(0)
    >>> good = rng.normal(size=(60, 2))
    >>> sources = [(good, good[:, 0] > 0), (rng.normal(size=(60, 2)), rng.random(60) > 0.5)]
    >>> val = rng.normal(size=(80, 2))
    >>> def nearest(X, y):
    ...     near = ((val[:, None] - X[None]) ** 2).sum(axis=2).argmin(axis=1)
    ...     return (y[near] == (val[:, 0] > 0)).mean()
    >>> model = Projektor(form="linear").fit(sources, (val, val[:, 0] > 0), nearest, sizes=(20, 50))
    >>> best, _ = model.optimize(100)
    >>> best.round(2).tolist(), model.predict(best, 100) > model.predict([0.5, 0.5], 100)
    ([1.0, 0.0], True)
    """

    def __init__(
        self,
        *,
        form: str = "auto",
        ridge: float | str | None = None,
        link: str = "identity",
        label_metric: str = "gaussian",
        lam: float = 1.0,
        reg: float | None = None,
        embed: Callable[[NDArray[Any]], ArrayLike] | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        maximise: bool = True,
        ot_rows: int = 1000,
    ) -> None:
        require(link in LINKS, "link", repr(link), " or ".join(LINKS))
        require(ot_rows >= 2, "ot_rows", ot_rows, "2 or more")
        self.form, self.ridge, self.link = form, ridge, link
        self.label_metric, self.lam, self.reg, self.embed = label_metric, lam, reg, embed
        self.bounds, self.maximise, self.ot_rows = bounds, maximise, ot_rows

    # ── Fitting ──────────────────────────────────────────────────────────────────────────────

    def fit(
        self,
        sources: Sequence[Source],
        val: tuple[ArrayLike, ArrayLike | None],
        train_and_eval: TrainAndEval,
        sizes: tuple[int, int],
        grid: ArrayLike | None = None,
        *,
        repeats: int = 3,
        replacement: bool = False,
        rng: Rng = 0,
        journal: str | Path | None = None,
        depends: Any = None,
        progress: Progress | None = None,
    ) -> Projektor:
        """Train the grid at both sizes and fit.

        sources : (X_k, y_k) pilots. val : (X_v, y_v), y_v None for transport without labels.
        train_and_eval : (X, y) -> performance on the validation data.
        sizes : N0 < N1. grid : (g, m) mixtures; by default up to 36 on a lattice, less those the
        pilots have too few rows for. repeats : trainings a mixture and size; the median counts.
        replacement, rng, journal, depends, progress : as in `MixtureRuns`.

        Raises `InputError` on N0 ≥ N1, sources that are empty or differ in columns, a grid off
        the simplex or beyond the pilots' rows, too few mixtures for a named form, performance
        outside `bounds` or not finite.
        """
        n0, n1 = sizes
        require(0 < n0 < n1, "sizes", f"{n0} and {n1}", "0 < n0 < n1")
        self.runs_ = MixtureRuns(
            sources,
            train_and_eval,
            replacement=replacement,
            rng=rng,
            journal=journal,
            depends=depends,
            progress=progress,
        )
        self.sizes_ = (int(n0), int(n1))
        self.repeats_ = repeats
        self.grid_ = self._grid(grid)
        self._prepare_transport(val)
        self.ot_ = np.array([self.transport(p).value for p in self.grid_])
        model = MixturePerformanceModel(self.form, self.ridge)
        model.fit(self.grid_, self.ot_, self.ot_)  # a form the grid can't determine is refused
        self.performance_ = np.stack([self.measure(self.grid_, n) for n in self.sizes_], axis=1)
        self.model_ = model.fit(self.grid_, self.ot_, self.performance_)
        return self

    def _grid(self, grid: ArrayLike | None) -> Array:
        m, n1 = self.runs_.m, self.sizes_[1]
        if grid is not None:
            P = check_mixtures(grid, m, "grid")
            require(P.ndim == 2, "grid", f"shape {P.shape}", f"(mixtures, {m})")
            self.runs_.counts(P, n1)  # refused before anything is trained
            return P
        P = mixture_grid(m)
        P = P[self.runs_.feasible(P, n1)]
        came = f"{n1} for pilots of {self.runs_.sizes.tolist()} rows"
        require(len(P) > m, "sizes", came, "sizes that leave more mixtures to train")
        return P

    def _prepare_transport(self, val: tuple[ArrayLike, ArrayLike | None]) -> None:
        embed = self.embed or (lambda x: x)
        sizes = np.minimum(self.runs_.sizes, self.ot_rows)
        rows = self.runs_.rows(sizes, 0, "transport", distinct=True)
        Xv, yv = np.asarray(val[0]), None if val[1] is None else np.asarray(val[1])
        require(Xv.ndim == 2 and len(Xv) > 0, "val", f"shape {Xv.shape}", "(rows, columns)")
        few = np.argsort(self.runs_.uniforms.block(0, len(Xv), stream="validation"))[: self.ot_rows]
        self.validation_rows_ = len(Xv)
        self._sizes = sizes
        self.cost_ = otdd_cost(
            embed(self.runs_.X[rows]),
            None if yv is None else self.runs_.y[rows],
            embed(Xv[few]),
            None if yv is None else yv[few],
            label_metric=self.label_metric,  # type: ignore[arg-type]
            lam=self.lam,
        )

    def transport(self, p: ArrayLike) -> SourceTransport:
        """OT(p), its calibrated gradient by source, and the potentials."""
        require(hasattr(self, "cost_"), "projektor", "one that was not fitted", "fit(...) first")
        return ot_with_source_gradient(self.cost_, self._sizes, p, reg=self.reg)

    def measure(
        self, P: ArrayLike, n: int, *, repeats: int | None = None, stream: str = "pilot"
    ) -> Array:
        """Median performance of mixtures (g, m) trained at n, (g,). Each run is made once."""
        values = self.runs_.measure(P, n, repeats=repeats or self.repeats_, stream=stream)
        if self.bounds is not None:
            low, high = self.bounds
            inside = bool(((values >= low) & (values <= high)).all())
            came = f"{values.min():g} to {values.max():g}"
            require(inside, "train_and_eval", came, f"within bounds {self.bounds}, or bounds=None")
        return np.asarray(np.median(values, axis=1))

    # ── Predicting ───────────────────────────────────────────────────────────────────────────

    def predict(self, p: ArrayLike, n: float) -> Any:
        """Projected performance of a mixture (m,) or mixtures (g, m) at size n.

        Clipped to `bounds`; warns where the projection enlarges errors more than fivefold.
        """
        P, both = self._both_sizes(p)
        warn_amplification(*self.sizes_, n)
        value = self._clip(self._project(both, n))
        return float(value[0]) if P.ndim == 1 else value

    def interval(
        self, p: ArrayLike, n: float, *, against: ArrayLike | None = None, level: float = 0.95
    ) -> Estimate:
        """A single mixture's projected performance with an interval, or its gain over another.

        Without `against`: where a new measurement (a median of as many repeats) should fall, from
        the regression's residuals, carried through the projection to first order. With it: the
        difference of the two predictions, whose interval has no measurement in it. Neither covers
        a wrong form or link; `calibrate` measures that.
        """
        from scipy.special import stdtrit

        require(0 < level < 1, "level", level, "a share between 0 and 1")
        value, slopes, spread = self._influence(p, n)
        covariance = self.model_.residual_covariance_
        noise = float(slopes @ covariance @ slopes)
        if against is not None:
            other, _, other_spread = self._influence(against, n)
            value, spread, noise = value - other, spread - other_spread, 0.0
        variance = float(np.sum(covariance * (spread @ spread.T))) + noise
        half = float(stdtrit(self.model_.degrees_, (1 + level) / 2)) * np.sqrt(variance)
        low, high = value - half, value + half
        if against is None:
            value, low, high = self._clip(np.array([value, low, high]))
        return Estimate(float(value), float(low), float(high), len(self.grid_))

    def _influence(self, p: ArrayLike, n: float) -> tuple[float, Array, Array]:
        """Prediction, its slopes (2,) in the predictions at N0, N1, and in the data (2, g)."""
        P, both = self._both_sizes(p)
        require(P.ndim == 1, "p", f"{P.ndim} dimensions", "one mixture")
        projected = self._project(both, n)
        slopes = self._slopes(both[0], projected[0], n)
        h = self.model_.weights(P, [self.transport(P).value])
        return float(projected[0]), slopes, slopes[:, None] * h

    def gradient(self, p: ArrayLike, n: float) -> Array:
        """Gradient (m,) of the projected performance along the simplex; it sums to 0."""
        _, both, transport = self._single(p)
        slopes = self._slopes(both, self._project(both[None], n)[0], n)
        means = source_means(transport.duals, self._sizes)
        out: Array = slopes @ self.model_.grad(p, transport.value, means)
        return out

    def _single(self, p: ArrayLike) -> tuple[Array, Array, SourceTransport]:
        transport = self.transport(p)
        P = check_mixtures(p, self.runs_.m)
        return P, self._domain(self.model_.predict(P, [transport.value])), transport

    def _both_sizes(self, p: ArrayLike) -> tuple[Array, Array]:
        require(hasattr(self, "model_"), "projektor", "one that was not fitted", "fit(...) first")
        P = check_mixtures(p, self.runs_.m)
        rows = np.atleast_2d(P)
        ot = [self.transport(row).value for row in rows]
        return P, self._domain(self.model_.predict(rows, ot))

    def _domain(self, both: Array) -> Array:
        """Inside the link's domain: an error is not told apart from half a validation row."""
        least = 0.5 / self.validation_rows_
        if self.link == "log_error":
            return np.minimum(both, 1 - least)
        return np.maximum(both, least) if self.link == "log" else both

    def _project(self, both: Array, n: float) -> Array:
        w0, w1 = projection_weights(*self.sizes_, n)
        h = LINKS[self.link]
        return h.back(w0 * h.forward(both[:, 0]) + w1 * h.forward(both[:, 1]))

    def _slopes(self, both: Array, projected: float, n: float) -> Array:
        """∂L_N/∂(L_N0, L_N1) = w_s h'(L_s) / h'(L_N)."""
        h = LINKS[self.link]
        w = np.array(projection_weights(*self.sizes_, n))
        return np.asarray(w * h.slope(both) / h.slope(np.array(projected)))

    def _clip(self, values: Array) -> Array:
        return values if self.bounds is None else np.clip(values, *self.bounds)

    # ── Choosing ─────────────────────────────────────────────────────────────────────────────

    def optimize(
        self,
        n: float,
        steps: int = 100,
        lr: float | None = None,
        decay: float = 0.9,
        *,
        start: ArrayLike | None = None,
        method: str = "projected",
    ) -> tuple[Array, Trace]:
        """The mixture of best projected performance at n, from `start` (uniform), and the trace.

        As `optimise_mixture`. The paper's lr=5e-4 belongs to accuracies in per cent: on fractions
        it moves by at most 0.005 times the slope. By default the first step has length 1.
        """
        sign = 1.0 if self.maximise else -1.0
        warn_amplification(*self.sizes_, n)

        def objective(p: Array) -> tuple[float, Array]:
            _, both, transport = self._single(p)
            value = float(self._project(both[None], n)[0])
            means = source_means(transport.duals, self._sizes)
            slope = self._slopes(both, value, n) @ self.model_.grad(p, transport.value, means)
            return sign * value, sign * slope

        first = self._start(start)
        best, trace = optimise_mixture(
            objective, first, steps=steps, lr=lr, decay=decay, method=method
        )
        return best, Trace(trace.mixtures, sign * trace.values)

    def nearest(
        self,
        steps: int = 100,
        lr: float | None = None,
        decay: float = 0.9,
        *,
        start: ArrayLike | None = None,
    ) -> tuple[Array, Trace]:
        """The mixture of least OT(p), without any training's result: selection by transport alone.

        OT is convex in p, so this is a global minimum up to the steps' length.
        """

        def objective(p: Array) -> tuple[float, Array]:
            transport = self.transport(p)
            return -transport.value, -source_means(transport.duals, self._sizes)

        first = self._start(start)
        best, trace = optimise_mixture(objective, first, steps=steps, lr=lr, decay=decay)
        return best, Trace(trace.mixtures, -trace.values)

    def _start(self, start: ArrayLike | None) -> Array:
        m = self.runs_.m
        return np.full(m, 1 / m) if start is None else check_mixtures(start, m, "start")

    def calibrate(
        self, P: ArrayLike, n: int, *, repeats: int | None = None, level: float = 0.95
    ) -> Calibration:
        """Train mixtures (g, m) at size n on draws of their own, beside what was forecast."""
        P = np.atleast_2d(check_mixtures(P, self.runs_.m, "P"))
        measured = self.measure(P, n, repeats=repeats, stream="check")
        return Calibration(P, n, [self.interval(p, n, level=level) for p in P], measured)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Forecasts of mixtures that were not fitted, and what training them gave.

    >>> c = Calibration(np.eye(2), 10, [Estimate(0.5, 0.4, 0.6, 9)] * 2, np.array([0.5, 0.8]))
    >>> round(c.mae, 3), c.coverage
    (0.15, 0.5)
    """

    mixtures: Array
    n: int
    predicted: list[Estimate]
    measured: Array

    @property
    def mae(self) -> float:
        """Mean absolute error of the forecasts."""
        return float(np.abs(self._values() - self.measured).mean())

    @property
    def correlation(self) -> float:
        """Between forecast and measurement; NaN where one of them does not vary."""
        flat = len(self.measured) < 2 or min(np.ptp(self._values()), np.ptp(self.measured)) == 0
        return float("nan") if flat else float(np.corrcoef(self._values(), self.measured)[0, 1])

    @property
    def coverage(self) -> float:
        """The share of measurements inside their interval."""
        ends = np.array([[e.low, e.high] for e in self.predicted])
        return float(((ends[:, 0] <= self.measured) & (self.measured <= ends[:, 1])).mean())

    def _values(self) -> Array:
        return np.array([e.value for e in self.predicted])
