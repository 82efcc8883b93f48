"""Learning curves: exact recovery, another least squares, bounds, noise, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from scoredraw.data_selection.learning_curves import (
    FAMILIES,
    LearningCurve,
    fit_learning_curve,
    free_parameters,
)
from scoredraw.errors import InputError

N = np.array([20.0, 40, 80, 160, 320, 640])
TRUE: dict[str, dict[str, float]] = {
    "power": {"a": 0.91, "b": 1.7, "c": 0.63},
    "root": {"beta": 1.4},
    "saturating": {"a": 0.8, "k": 55.0},
    "daetwyler": {"h2": 0.6, "M": 150.0},
}


@pytest.mark.oracle
@pytest.mark.parametrize("family", list(TRUE))
def test_a_curve_without_noise_is_recovered(family: Any) -> None:
    truth = LearningCurve(family, TRUE[family])
    curve = fit_learning_curve(N, truth.predict(N), family)
    for name, value in TRUE[family].items():
        assert curve.parameters[name] == pytest.approx(value, rel=1e-6)
    assert curve.sse < 1e-16


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "name"), [("power", "c"), ("saturating", "k"), ("daetwyler", "M")]
)
def test_a_known_shape_leaves_one_parameter_less(family: Any, name: str) -> None:
    truth = LearningCurve(family, TRUE[family])
    sizes = N[: free_parameters(family, known=1.0)]
    curve = fit_learning_curve(sizes, truth.predict(sizes), family, known=TRUE[family][name])
    for parameter, value in TRUE[family].items():
        assert curve.parameters[parameter] == pytest.approx(value, rel=1e-6)


@pytest.mark.oracle
def test_fits_are_least_squares_of_scipy() -> None:
    """Never above a local search from the truth, on 20 noisy curves, weighted."""
    rng = np.random.default_rng(0)
    truth = LearningCurve("power", TRUE["power"])
    weights = N / N.mean()
    for _ in range(20):
        r = truth.predict(N) + 0.02 * rng.normal(size=len(N))
        curve = fit_learning_curve(N, r, "power", N)

        def residuals(p: Any, r: Any = r) -> Any:
            return np.sqrt(weights) * (r - (p[0] - p[1] * N ** -p[2]))

        peer = optimize.least_squares(
            residuals, [0.91, 1.7, 0.63], bounds=([-np.inf, 0, 0.01], [np.inf, np.inf, 4]),
            xtol=1e-14, ftol=1e-14, gtol=1e-14,
        )  # fmt: skip
        assert curve.sse <= 2 * peer.cost * (1 + 1e-9)


@pytest.mark.oracle
@pytest.mark.parametrize("family", list(TRUE))
def test_slopes_and_marginals(family: Any) -> None:
    curve, h = LearningCurve(family, TRUE[family]), 1e-4
    differences = (curve.predict(N + h) - curve.predict(N - h)) / (2 * h)
    np.testing.assert_allclose(curve.slope(N), differences, rtol=1e-6)
    np.testing.assert_array_equal(curve.marginal(N, 10), curve.predict(N + 10) - curve.predict(N))
    assert curve.predict(N.reshape(2, 3)).shape == (2, 3)
    np.testing.assert_array_equal(curve(N), curve.predict(N))


@pytest.mark.oracle
def test_weights_are_precisions() -> None:
    """A measurement of weight 2 counts as two of weight 1; one of weight 0 not at all."""
    r = np.array([0.5, 0.62, 0.7, 0.74, 0.77, 0.78])
    twice = fit_learning_curve(np.append(N, N[1]), np.append(r, r[1]), "power")
    once = fit_learning_curve(N, r, "power", [1, 2, 1, 1, 1, 1])
    assert twice.predict(1000) == pytest.approx(float(once.predict(1000)), rel=1e-7)
    dropped = fit_learning_curve(N, np.append(r[:-1], 0.1), "power", [1, 1, 1, 1, 1, 0])
    without = fit_learning_curve(N[:-1], r[:-1], "power")
    assert dropped.predict(1000) == pytest.approx(float(without.predict(1000)), rel=1e-7)


@pytest.mark.oracle
def test_bounds_hold_and_the_edge_is_the_best_inside() -> None:
    r = LearningCurve("power", {"a": 1.2, "b": 1.5, "c": 0.3}).predict(N)
    curve = fit_learning_curve(N, r, "power", bounds={"a": (None, 1.0)})
    assert curve.parameters["a"] == pytest.approx(1.0)
    grid = np.linspace(0.1, 1.5, 2001)
    x = -(N[None] ** -grid[:, None])
    b = (x * (r - 1)).sum(1) / (x * x).sum(1)
    best = ((r - 1 - b[:, None] * x) ** 2).sum(1).min()
    assert curve.sse <= best * (1 + 1e-9)
    flat = fit_learning_curve(N, r, "power", bounds={"b": (0, 0.2), "c": (0.5, 0.5)})
    assert flat.parameters["b"] == pytest.approx(0.2)
    assert flat.parameters["c"] == pytest.approx(0.5)


@pytest.mark.oracle
def test_shrinking_draws_the_shape_to_its_centre() -> None:
    r = LearningCurve("power", {"a": 0.9, "b": 3.0, "c": 1.2}).predict(N)
    shapes = [
        fit_learning_curve(N, r, shrink=(0.5, weight)).parameters["c"]
        for weight in (1e-9, 1e-4, 1e-3, 1e3)
    ]
    assert shapes[0] == pytest.approx(1.2, rel=1e-2)
    assert shapes[-1] == pytest.approx(0.5, rel=1e-3)
    assert sorted(shapes, reverse=True) == shapes


@pytest.mark.oracle
def test_a_falling_measurement_gives_a_flat_curve() -> None:
    for family in ("power", "isotonic"):
        curve = fit_learning_curve(N, 0.9 - 1e-4 * N, family)
        np.testing.assert_allclose(curve.marginal(N, 100), 0, atol=1e-9)


@pytest.mark.oracle
def test_broken_lines_are_the_nearest_concave_rising_ones() -> None:
    """Against a quadratic programme over the values at the sizes."""
    import cvxpy as cp

    rng = np.random.default_rng(1)
    for _ in range(10):
        r, w = rng.random(len(N)), rng.random(len(N)) + 0.1
        curve = fit_learning_curve(N, r, "isotonic", w)
        v = cp.Variable(len(N))
        slopes = cp.multiply(cp.diff(v), 1 / np.diff(N))
        loss = cp.sum(cp.multiply(w * len(w) / w.sum(), cp.square(r - v)))
        problem = cp.Problem(cp.Minimize(loss), [slopes >= 0, cp.diff(slopes) <= 0])
        assert curve.sse == pytest.approx(problem.solve(solver="CLARABEL"), rel=1e-5, abs=1e-7)


@pytest.mark.oracle
def test_broken_lines_go_on_with_their_last_slope() -> None:
    curve = fit_learning_curve([10, 10, 20, 40], [0.4, 0.6, 0.7, 0.8], "isotonic")
    assert curve.predict([10, 15, 60]).tolist() == pytest.approx([0.5, 0.6, 0.9])
    assert curve.slope([12, 40, 100]).tolist() == pytest.approx([0.02, 0.005, 0.005])


@pytest.mark.property
@settings(max_examples=60)
@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=3, max_size=8),
    st.sampled_from(FAMILIES),
)
def test_every_fit_rises_and_flattens(values: list[float], family: Any) -> None:
    n = 10.0 * 2 ** np.arange(len(values))
    curve = fit_learning_curve(n, values, family)
    dense = np.linspace(n[0], 2 * n[-1], 200)
    gains = np.diff(curve.predict(dense))
    assert (gains >= -1e-9).all()
    assert (np.diff(gains) <= 1e-9).all()


@pytest.mark.property
@settings(max_examples=30)
@given(st.permutations(range(6)), st.floats(0.1, 50))
def test_neither_the_order_nor_the_scale_of_weights_matters(order: list[int], scale: float) -> None:
    r = np.array([0.5, 0.62, 0.69, 0.75, 0.77, 0.79])
    a = fit_learning_curve(N, r, "saturating", N)
    b = fit_learning_curve(N[order], r[order], "saturating", scale * N[order])
    assert float(a.predict(1000)) == pytest.approx(float(b.predict(1000)), rel=1e-7)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"n": [0, 1, 2, 3]}, "n"),
        ({"n": [1, 2, 3, np.nan]}, "n"),
        ({"n": [1, 2, 3]}, "r"),
        ({"n": []}, "n"),
        ({"n": ["a", "b", "c", "d"]}, "n, r, weights"),
        ({"r": [0.1, 0.2, 0.3, np.nan]}, "r"),
        ({"weights": [1, 1, 1]}, "weights"),
        ({"weights": [1, 1, 1, -1]}, "weights"),
        ({"weights": [0, 0, 0, 0]}, "weights"),
        ({"weights": [1, 1, 0, 0]}, "n"),
        ({"family": "cubic"}, "family"),
        ({"n": [5, 5, 9, 9]}, "n"),
        ({"bounds": {"q": (0, 1)}}, "bounds"),
        ({"bounds": {"a": (1, 0)}}, "bounds"),
        ({"bounds": {"a": (1,)}}, "bounds"),
        ({"bounds": {"b": (-1, 1)}}, "bounds"),
        ({"bounds": {"c": (0, 1)}}, "bounds"),
        ({"known": 0.0}, "known"),
        ({"known": 0.5, "shrink": (0.5, 1)}, "shrink"),
        ({"shrink": (0.5, 0)}, "shrink"),
        ({"known": 0.5, "family": "root"}, "known"),
        ({"shrink": (0.5, 1), "family": "isotonic"}, "shrink"),
    ],
)
def test_fits_refuse(change: dict[str, Any], argument: str) -> None:
    good = {"n": [10, 20, 40, 80], "r": [0.5, 0.6, 0.65, 0.68]}
    with pytest.raises(InputError, match=f"^{argument}: got ") as error:
        fit_learning_curve(**(good | change))
    assert "\n" not in str(error.value)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (("cubic", {}), "family"),
        (("power", {"a": 1.0}), "parameters"),
        (("root", {"beta": np.nan}), "parameters"),
        (("isotonic", {}), "knots"),
    ],
)
def test_curves_refuse(arguments: tuple[Any, ...], argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}: got "):
        LearningCurve(*arguments)
