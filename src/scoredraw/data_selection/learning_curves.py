r"""Learning curves: how well a model does after n examples, and what the next ones would add.

A learning curve rises and flattens: it is monotone and concave, and noise in the measurements is
neither. So every family here is monotone and concave by its form and its bounds:

    power        r(n) = a - b n^-c           b ≥ 0, c > 0
    root         r(n) = 1 - β n^-1/2         one parameter: the safe choice for few, noisy points
    saturating   r(n) = a n / (n + k)        a, k > 0
    daetwyler    r(n) = h² n h² / (n h² + M) R² of a polygenic score: heritability h², M segments
    isotonic     the nearest concave, non-decreasing broken line; beyond the data its last slope

The parametric ones are linear in all but one parameter, their shape. For each shape the best
linear part within its bounds is a formula, so that a fit is a search along one line, which sees
the whole line: no starting point, no local optimum.

Cai, Encarnacion, Chern, Corbett-Davies, Bogen, Bergman and Goel, "Adaptive sampling strategies to
construct equitable training datasets", FAccT 2022, arXiv 2202.01327. Daetwyler, Villanueva and
Woolliams, 2008, "Accuracy of predicting the genetic risk of disease using a genome-wide approach".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Family = Literal["power", "root", "saturating", "daetwyler", "isotonic"]
Limits = dict[str, tuple[float, float]]

FAMILIES = ("power", "root", "saturating", "daetwyler", "isotonic")
SHAPE = {"power": "c", "saturating": "k", "daetwyler": "M"}  # what `known` gives
FREE = {"power": 3, "root": 1, "saturating": 2, "daetwyler": 2, "isotonic": 2}
COARSE, FINE, ZOOMS = 65, 33, 10  # the search along the shapes ends 1e-13 wide


@dataclass(frozen=True)
class LearningCurve:
    """Performance as a function of the number of examples, from `fit_learning_curve` or known.

    parameters: of the family's formula, by name ("a", "b", "c"; "beta"; "a", "k"; "h2", "M").
    knots: sizes and values of the broken line of "isotonic". sse: weighted sum of squared errors
    of the fit, NaN for a curve that is known.

    >>> curve = LearningCurve("power", {"a": 0.9, "b": 1.0, "c": 0.5})
    >>> curve.predict([25, 100]).round(3).tolist(), round(float(curve.marginal(25, 75)), 3)
    ([0.7, 0.8], 0.1)
    """

    family: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    knots: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    sse: float = math.nan

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, "family", repr(self.family), ", ".join(FAMILIES))
        names = PARAMETERS[self.family]
        given = sorted(self.parameters)
        require(given == sorted(names), "parameters", given, f"{sorted(names)} for {self.family}")
        finite = all(math.isfinite(value) for value in self.parameters.values())
        require(finite, "parameters", dict(self.parameters), "finite numbers")
        drawn = (self.knots is None) == (self.family != "isotonic")
        require(drawn, "knots", self.knots, "given for 'isotonic' and for nothing else")

    def predict(self, n: ArrayLike) -> Float:
        """The performance at sizes n, any shape; -inf at 0 for power and root."""
        x = np.asarray(n, np.float64)
        if self.knots is not None:
            at, values = (np.asarray(one) for one in self.knots)
            beyond = np.maximum(x - at[-1], 0.0) * self._slopes()[-1]
            return np.asarray(np.interp(x, at, values) + beyond)
        with np.errstate(divide="ignore"):
            return VALUES[self.family](x, **self.parameters)

    __call__ = predict

    def slope(self, n: ArrayLike) -> Float:
        """The derivative at sizes n; at a knot of a broken line the one to its right."""
        x = np.asarray(n, np.float64)
        if self.knots is not None:
            slopes, at = self._slopes(), np.asarray(self.knots[0])
            inside = np.clip(np.searchsorted(at, x, "right") - 1, 0, len(slopes) - 1)
            return np.asarray(np.where(x < at[0], 0.0, slopes[inside]))
        with np.errstate(divide="ignore"):
            return SLOPES[self.family](x, **self.parameters)

    def marginal(self, n: ArrayLike, step: ArrayLike) -> Float:
        """What `step` more examples add at sizes n: predict(n + step) - predict(n)."""
        x, more = np.asarray(n, np.float64), np.asarray(step, np.float64)
        return np.asarray(self.predict(x + more) - self.predict(x))

    def _slopes(self) -> Float:
        assert self.knots is not None
        at, values = (np.asarray(one) for one in self.knots)
        return np.asarray(np.diff(values) / np.diff(at))


PARAMETERS: dict[str, tuple[str, ...]] = {
    "power": ("a", "b", "c"),
    "root": ("beta",),
    "saturating": ("a", "k"),
    "daetwyler": ("h2", "M"),
    "isotonic": (),
}
VALUES: dict[str, Callable[..., Any]] = {
    "power": lambda n, a, b, c: a - b * n**-c,
    "root": lambda n, beta: 1 - beta * n**-0.5,
    "saturating": lambda n, a, k: a * n / (n + k),
    "daetwyler": lambda n, h2, M: h2 * n * h2 / (n * h2 + M),
}
SLOPES: dict[str, Callable[..., Any]] = {
    "power": lambda n, a, b, c: b * c * n ** (-c - 1),
    "root": lambda n, beta: beta / 2 * n**-1.5,
    "saturating": lambda n, a, k: a * k / (n + k) ** 2,
    "daetwyler": lambda n, h2, M: h2**2 * M / (n * h2 + M) ** 2,
}


def fit_learning_curve(
    n: ArrayLike,
    r: ArrayLike,
    family: Family = "power",
    weights: ArrayLike | None = None,
    bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
    *,
    known: float | None = None,
    shrink: tuple[float, float] | None = None,
) -> LearningCurve:
    r"""The curve of a family nearest to measurements: min Σ w_i (r_i - r(n_i))² within bounds.

    Parameters
    ----------
    n : (m,) sizes, above 0; repeats are welcome. r : (m,) the performances measured there, the
        higher the better. weights : (m,) precisions of the measurements, such as n or 1/variance;
        scaled to mean one.
    bounds : parameter -> (low, high), None for an open end, in place of the defaults: b ≥ 0,
        .01 ≤ c ≤ 4; β ≥ 0; a ≥ 0, .001 min n ≤ k ≤ 1e4 max n; 1e-6 ≤ h2 ≤ 1. Daetwyler's M is
        bounded through k = M / h2. "isotonic" has none.
    known : the shape where it is known (c, k, or Daetwyler's M): one parameter less.
    shrink : (centre, weight), adds weight · ln²(shape / centre). It is what a log-normal prior
        does whose weight is (noise of a measurement / spread of the log)²; the cure for a shape
        that few noisy points would bend to anything.

    Raises
    ------
    InputError
        lengths that differ, sizes not above 0, NaN, negative weights, an unknown family or bound,
        or fewer distinct sizes than free parameters (power 3, root 1, others 2; one less with
        `known` or `shrink`).

    Time O(m), some 10 passes of 33 shapes; memory O(65 m). Sequential.

    Cai et al. 2022, arXiv 2202.01327.

    >>> n = np.array([20, 40, 80, 160])
    >>> curve = fit_learning_curve(n, 0.9 - 1.5 * n**-0.6)
    >>> {name: round(value, 6) for name, value in curve.parameters.items()}
    {'a': 0.9, 'b': 1.5, 'c': 0.6}
    >>> round(float(fit_learning_curve([25], [0.8], "root").predict(100)), 6)
    0.9
    """
    require(family in FAMILIES, "family", repr(family), ", ".join(FAMILIES))
    x, y, w = _measurements(n, r, weights)
    free = free_parameters(family, known, shrink)
    sizes = len(np.unique(x[w > 0]))
    require(sizes >= free, "n", f"{sizes} distinct sizes", f"{free} or more for {family}")
    limits = _limits(family, bounds, x, known)
    if family == "isotonic":
        return _broken_line(x, y, w)
    if family == "daetwyler" and known is None:  # h² n / (n + M/h²)
        limits = {"a": limits["h2"], "k": limits["k"]}
        shape, linear, sse = _search("saturating", x, y, w, limits, None, shrink)
        return LearningCurve("daetwyler", {"h2": linear[0], "M": shape * linear[0]}, sse=sse)
    shape, linear, sse = _search(family, x, y, w, limits, known, shrink)
    if family == "daetwyler":
        assert known is not None
        return LearningCurve(family, {"h2": shape, "M": float(known)}, sse=sse)
    parts = linear if family == "root" else (*linear, shape)
    return LearningCurve(family, dict(zip(PARAMETERS[family], parts, strict=True)), sse=sse)


def free_parameters(
    family: str, known: float | None = None, shrink: tuple[float, float] | None = None
) -> int:
    """How many distinct sizes a fit of the family takes.

    >>> free_parameters("power"), free_parameters("daetwyler", known=150)
    (3, 1)
    """
    shaped = family in SHAPE
    require(known is None or shaped, "known", known, f"nothing for {family}, which has no shape")
    require(shrink is None or shaped, "shrink", shrink, f"nothing for {family}: no shape")
    if known is not None:
        require(shrink is None, "shrink", shrink, "one of known and shrink")
        require(math.isfinite(known) and known > 0, "known", known, "a shape above 0")
    if shrink is not None:
        good = len(shrink) == 2 and shrink[0] > 0 and shrink[1] > 0 and math.isfinite(sum(shrink))
        require(good, "shrink", shrink, "(centre, weight), both above 0")
    return FREE[family] - (known is not None or shrink is not None)


# ── the search along the shapes ──────────────────────────────────────────────────────────────────


def _search(
    family: str,
    x: Float,
    y: Float,
    w: Float,
    limits: Limits,
    known: float | None,
    shrink: tuple[float, float] | None,
) -> tuple[float, tuple[float, ...], float]:
    """The best shape, its linear part and the sum of squares (without the penalty)."""

    def linear(shapes: Float) -> tuple[Float, Float]:
        """Sums of squares (S,) and linear parts (S, p) at these shapes (S, 1)."""
        if family == "root":
            return _scale(-(x**-0.5) + 0 * shapes, y - 1, w, limits["beta"])
        if family == "power":
            return _line(-(x**-shapes), y, w, limits["a"], limits["b"])
        if family == "saturating":
            return _scale(x / (x + shapes), y, w, limits["a"])
        fit = VALUES["daetwyler"](x, h2=shapes, M=known)
        return (w * (y - fit) ** 2).sum(1), np.empty((len(shapes), 0))

    def penalised(shapes: Float) -> Float:
        loss = linear(shapes[:, None])[0]
        return loss if shrink is None else loss + shrink[1] * np.log(shapes / shrink[0]) ** 2

    if family == "root" or (known is not None and family != "daetwyler"):
        shape = 1.0 if known is None else float(known)
    else:
        low, high = limits["h2" if family == "daetwyler" else SHAPE[family]]
        shapes = np.geomspace(low, high, COARSE)
        for _ in range(ZOOMS):
            i = int(np.argmin(penalised(shapes)))
            shape = float(shapes[i])
            shapes = np.geomspace(
                shapes[max(i - 1, 0)], shapes[min(i + 1, len(shapes) - 1)], FINE
            )  # fmt: skip
    losses, parts = linear(np.array([[shape]]))
    return shape, tuple(float(part) for part in parts[0]), float(losses[0])


def _scale(x: Float, y: Float, w: Float, limits: tuple[float, float]) -> tuple[Float, Float]:
    """min Σ w (y - b x)² over b in its limits, for each row of x (S, m)."""
    b = np.clip((w * x * y).sum(1) / (w * x * x).sum(1), *limits)
    return (w * (y - b[:, None] * x) ** 2).sum(1), b[:, None]


def _line(
    x: Float, y: Float, w: Float, a_limits: tuple[float, float], b_limits: tuple[float, float]
) -> tuple[Float, Float]:
    """min Σ w (y - a - b x)² over a box, for each row of x (S, m).

    A convex function's least value over a box is its free minimum or lies on an edge.
    """
    total = w.sum()
    mean_x, mean_y = (w * x).sum(1) / total, float((w * y).sum() / total)
    spread = (w * (x - mean_x[:, None]) ** 2).sum(1)
    across = (w * (x - mean_x[:, None]) * (y - mean_y)).sum(1)
    free_b = across / np.where(spread > 0, spread, 1.0)
    pairs = [(mean_y - free_b * mean_x, free_b)]
    for b in b_limits:
        if math.isfinite(b):
            pairs.append((np.clip(mean_y - b * mean_x, *a_limits), np.full(len(x), b)))
    for a in a_limits:
        if math.isfinite(a):
            on_edge = (w * x * (y - a)).sum(1) / (w * x * x).sum(1)
            pairs.append((np.full(len(x), a), np.clip(on_edge, *b_limits)))
    points = np.stack([np.stack(pair, axis=1) for pair in pairs])  # (edges, S, 2)
    loss = (w * (y - points[..., :1] - points[..., 1:] * x) ** 2).sum(-1)
    low, high = np.array([a_limits, b_limits]).T
    loss = np.where(((points >= low) & (points <= high)).all(-1), loss, np.inf)
    best, rows = loss.argmin(0), np.arange(len(x))
    return loss[best, rows], points[best, rows]


def _broken_line(x: Float, y: Float, w: Float) -> LearningCurve:
    """The nearest concave non-decreasing broken line: intercept + Σ_j v_j min(x, x_j), v ≥ 0."""
    from scipy.optimize import nnls

    at, where = np.unique(x, return_inverse=True)
    weight = np.bincount(where, w)
    at, mean = at[weight > 0], (np.bincount(where, w * y)[weight > 0]) / weight[weight > 0]
    weight = weight[weight > 0] / weight.sum()
    unit = at[-1] - at[0]
    ramps = np.minimum((at - at[0])[:, None], (at[1:] - at[0])[None]) / unit
    middle, level, root = weight @ ramps, float(weight @ mean), np.sqrt(weight)
    slopes, _ = nnls(root[:, None] * (ramps - middle), root * (mean - level))
    values = level + (ramps - middle) @ slopes
    sse = float((w * (y - np.interp(x, at, values)) ** 2).sum())
    knots = (tuple(at.tolist()), tuple(values.tolist()))
    return LearningCurve("isotonic", knots=knots, sse=sse)


# ── what may come in ─────────────────────────────────────────────────────────────────────────────


def _measurements(n: ArrayLike, r: ArrayLike, weights: ArrayLike | None) -> tuple[Float, ...]:
    try:
        x, y = np.atleast_1d(np.asarray(n, np.float64)), np.atleast_1d(np.asarray(r, np.float64))
        w = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise InputError("n, r, weights: got what is not numeric, want numbers") from None
    require(x.ndim == 1 and len(x) > 0, "n", f"shape {x.shape}", "(m,) sizes, one or more")
    require(y.shape == x.shape, "r", f"shape {y.shape}", f"{x.shape}, a performance for each n")
    require(w.shape == x.shape, "weights", f"shape {w.shape}", f"{x.shape}, one for each n")
    require(bool((np.isfinite(x) & (x > 0)).all()), "n", "a size not above 0", "sizes above 0")
    require(bool(np.isfinite(y).all()), "r", "NaN or infinity", "finite performances")
    require(
        bool((np.isfinite(w) & (w >= 0)).all()), "weights", "a negative one or NaN", "0 or more"
    )
    require(float(w.sum()) > 0, "weights", "all 0", "one above 0")
    return x, y, w * (len(w) / w.sum())


def _limits(family: str, bounds: Mapping[str, Any] | None, x: Float, known: float | None) -> Limits:
    k = (1e-3 * float(x.min()), 1e4 * float(x.max()))
    limits: Limits = {
        "power": {"a": (-math.inf, math.inf), "b": (0.0, math.inf), "c": (0.01, 4.0)},
        "root": {"beta": (0.0, math.inf)},
        "saturating": {"a": (0.0, math.inf), "k": k},
        "daetwyler": {"h2": (1e-6, 1.0)} | ({"k": k} if known is None else {}),
        "isotonic": {},
    }[family]
    searched = {"c", "k"} | ({"h2"} if known is not None else set())
    for name, pair in (bounds or {}).items():
        require(name in limits, "bounds", name, f"a name among {', '.join(limits) or 'none'}")
        require(len(pair) == 2, "bounds", f"{name}: {pair}", "(low, high)")
        low, high = (
            default if end is None else float(end)
            for end, default in zip(pair, limits[name], strict=True)
        )
        require(low <= high, "bounds", f"{name}: {pair}", "(low, high), low first")
        positive = name not in searched or low > 0
        require(positive, "bounds", f"{name}: {pair}", "a shape above 0")
        concave = name not in {"b", "beta"} or low >= 0
        require(concave, "bounds", f"{name}: {pair}", "0 or more: the curve rises and flattens")
        limits[name] = (low, high)
    return limits
