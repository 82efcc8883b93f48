"""OT of a mixture to validation data: closed forms, the laws of its gradient, bad input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from scoredraw.data_selection.source_transport import (
    check_mixtures,
    ot_with_source_gradient,
    otdd_cost,
    self_potential,
    source_means,
)
from scoredraw.errors import InputError

ot = pytest.importorskip("ot")
pytestmark = pytest.mark.oracle


def instance(seed: int, m: int = 3, d: int = 2) -> tuple[np.ndarray, list[int], np.ndarray]:
    """(cost, sizes, points) of m sources of unequal sizes and 11 validation points."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 9, m).tolist()
    points = rng.normal(size=(sum(sizes), d)) + np.repeat(rng.normal(size=(m, d)), sizes, axis=0)
    return otdd_cost(points, None, rng.normal(size=(11, d)), None), sizes, points


def toward(p: np.ndarray, i: int) -> np.ndarray:
    """Mass to source i, taken from the rest in proportion."""
    direction = -p / (1 - p[i])
    direction[i] = 1.0
    return direction


# ── the cost ──


def test_the_squared_cost_on_a_line_is_that_of_sorted_points() -> None:
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=40), rng.normal(size=40)
    value = ot_with_source_gradient(otdd_cost(x[:, None], None, v[:, None], None), [40]).value
    assert value == pytest.approx(((np.sort(x) - np.sort(v)) ** 2).mean())
    absolute = np.abs(x[:, None] - v[None])
    assert ot_with_source_gradient(absolute, [40]).value == pytest.approx(
        wasserstein_distance(x, v)
    )


@pytest.mark.parametrize("metric", ["gaussian", "mean", "exact"])
def test_one_class_is_plain_transport(metric) -> None:
    rng = np.random.default_rng(1)
    x, v = rng.normal(size=(9, 3)), rng.normal(size=(7, 3))
    plain = otdd_cost(x, None, v, None)
    labelled = otdd_cost(x, np.full(9, "cat"), v, np.full(7, "cat"), label_metric=metric)
    np.testing.assert_array_equal(labelled, plain)
    want = ot.emd2([], [], plain)
    assert ot_with_source_gradient(labelled, [9]).value == pytest.approx(want)


@pytest.mark.parametrize("metric", ["gaussian", "mean", "exact"])
def test_label_distances(metric) -> None:
    """Against POT's Bures distance, means, and its exact transport between the clouds."""
    rng = np.random.default_rng(2)
    x, v = rng.normal(size=(12, 3)), rng.normal(size=(10, 3)) + 1
    y, yv = np.repeat([0, 1], 6), np.repeat([0, 1], 5)
    extra = otdd_cost(x, y, v, yv, label_metric=metric, lam=0.7) - otdd_cost(x, None, v, None)
    for a in (0, 1):
        for b in (0, 1):
            p, q = x[y == a], v[yv == b]
            if metric == "gaussian":
                covariances = (np.cov(cloud.T, bias=True) for cloud in (p, q))
                want = ot.gaussian.bures_wasserstein_distance(p.mean(0), q.mean(0), *covariances)
                want = float(want) ** 2
            elif metric == "mean":
                want = ((p.mean(0) - q.mean(0)) ** 2).sum()
            else:
                want = ot.emd2([], [], ot.dist(p, q))
            np.testing.assert_allclose(extra[np.ix_(y == a, yv == b)], 0.7 * want, rtol=1e-7)


def test_gaussian_clouds_by_source_and_a_class_a_source_lacks() -> None:
    """A (source, class) with one row is described by the class's rows in all sources."""
    x = np.array([[0.0], [2.0], [10.0], [20.0], [24.0], [30.0]])
    y, source = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 0, 0, 1, 1, 1])
    v, yv = np.array([[0.0], [0.0], [5.0]]), np.array([0, 0, 1])
    cost = otdd_cost(x, y, v, yv, label_metric="mean", sources=source)
    label = (cost - (x - v.T) ** 2)[:, 0]  # to the validation class at 0
    pooled = {0: np.mean([0, 2, 30]), 1: np.mean([10, 20, 24])}
    want = [1.0, 1.0, pooled[1], 22.0, 22.0, pooled[0]]
    np.testing.assert_allclose(label, np.square(want))


def test_small_types_do_not_overflow() -> None:
    x = np.array([[1e25], [-1e25]], dtype=np.float32)
    cost = otdd_cost(x, None, x, None)
    assert cost[0, 1] == pytest.approx(4e50, rel=1e-6)
    with pytest.raises(InputError, match="X: got values whose squared distances overflow"):
        otdd_cost([[1e200]], None, [[-1e200]], None)


# ── the gradient ──


@pytest.mark.property
@given(st.integers(0, 10**6), st.sampled_from([None, 0.5]))
@settings(max_examples=25)
def test_laws_of_the_gradient(seed, reg) -> None:
    cost, sizes, _ = instance(seed)
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3))
    value, gradient, duals = ot_with_source_gradient(cost, sizes, p, reg=reg)
    assert p * (1 - p) @ gradient == pytest.approx(0, abs=1e-7)
    means = source_means(duals + 17.5, sizes)
    np.testing.assert_allclose((means - means @ p) / (1 - p), gradient, atol=1e-7)
    step = 1e-5 * p.min()  # piecewise linear: any step before the next kink
    for i in range(3):
        ahead, behind = (
            ot_with_source_gradient(cost, sizes, p + s * step * toward(p, i), reg=reg).value
            for s in (1, -1)
        )
        slack = 1e-5 if reg is None else 1e-3
        assert (value - behind) / step - slack <= gradient[i] <= (ahead - value) / step + slack


@pytest.mark.property
@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_transport_is_convex_in_the_mixture(seed) -> None:
    cost, sizes, _ = instance(seed, m=4)
    p, q = np.random.default_rng(seed).dirichlet(np.full(4, 0.5), 2)
    at = [ot_with_source_gradient(cost, sizes, r).value for r in (p, q, (p + q) / 2)]
    assert at[2] <= (at[0] + at[1]) / 2 + 1e-9
    means = source_means(ot_with_source_gradient(cost, sizes, p).duals, sizes)
    assert at[1] >= at[0] + means @ (q - p) - 1e-9  # the potentials are a subgradient


def test_debiased_potentials() -> None:
    """The gradient of the Sinkhorn divergence is a derivative, and equal data have none."""
    rng = np.random.default_rng(3)
    x, v, sizes, p = rng.normal(size=(12, 2)), rng.normal(size=(9, 2)), [5, 4, 3], [0.5, 0.3, 0.2]
    cost, own = otdd_cost(x, None, v, None), (
        otdd_cost(x, None, x, None), otdd_cost(v, None, v, None),
    )  # fmt: skip
    for costs in (None, own):
        gradient = ot_with_source_gradient(cost, sizes, p, reg=0.3, self_costs=costs).gradient
        for i in range(3):
            ahead, behind = (
                ot_with_source_gradient(
                    cost, sizes, p + s * 1e-4 * toward(np.array(p), i), reg=0.3, self_costs=costs
                ).value
                for s in (1, -1)
            )
            assert (ahead - behind) / 2e-4 == pytest.approx(gradient[i], abs=1e-5)
    same = ot_with_source_gradient(own[1], [9], reg=2.0, self_costs=(own[1], own[1]))
    assert same.value == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose(same.duals - same.duals.mean(), 0, atol=1e-6)
    assert ot_with_source_gradient(own[1], [9], reg=2.0).value > 0.1  # biased


def test_small_reg_goes_to_the_logarithms_and_to_the_exact_value() -> None:
    cost, sizes, _ = instance(4)
    exact = ot_with_source_gradient(cost, sizes)
    near = ot_with_source_gradient(cost, sizes, reg=0.02)
    assert cost.max() > 500 * 0.02
    assert near.value == pytest.approx(exact.value, abs=0.1)


def test_identical_sources_have_no_gradient() -> None:
    rng = np.random.default_rng(5)
    one = rng.normal(size=(6, 2))
    cost = otdd_cost(np.vstack([one, one, one]), None, rng.normal(size=(8, 2)), None)
    for reg in (None, 0.5):
        gradient = ot_with_source_gradient(cost, [6, 6, 6], [0.5, 0.3, 0.2], reg=reg).gradient
        np.testing.assert_allclose(gradient, 0, atol=1e-9)


def test_a_source_like_the_validation_data_takes_transport_to_nothing() -> None:
    rng = np.random.default_rng(6)
    v = rng.normal(size=(10, 2))
    cost = otdd_cost(np.vstack([v, v + 3]), None, v, None)
    values = [ot_with_source_gradient(cost, [10, 10], [p, 1 - p]).value for p in (0, 0.5, 0.9, 1)]
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] == pytest.approx(0, abs=1e-12)


def test_an_absent_source_can_come_back() -> None:
    """c-transform: where the notebook has a gradient of 0, ours is what entering would give."""
    rng = np.random.default_rng(7)
    v = rng.normal(size=(12, 2))
    cost = otdd_cost(np.vstack([v + 2, v + np.array([2, -2]), v]), None, v, None)
    p = np.array([0.6, 0.4, 0.0])
    value, gradient, duals = ot_with_source_gradient(cost, [12, 12, 12], p)
    ahead = ot_with_source_gradient(cost, [12, 12, 12], p + 1e-5 * toward(p, 2)).value
    assert gradient[2] < -1
    assert gradient[2] <= (ahead - value) / 1e-5 + 1e-6
    assert (ahead - value) / 1e-5 < 0
    present = ot.emd(np.repeat(p[:2] / 12, 12), [], cost[:24], log=True)[1]
    g = present["v"]
    np.testing.assert_allclose(duals[24:], (cost[24:] - g).min(axis=1))


def test_a_source_with_everything_has_nothing_to_gain() -> None:
    cost, sizes, _ = instance(8)
    gradient = ot_with_source_gradient(cost, sizes, [0.0, 1.0, 0.0]).gradient
    assert gradient[1] == 0
    assert np.isfinite(gradient).all()
    assert ot_with_source_gradient(cost, [len(cost)]).gradient.tolist() == [0.0]


def test_resampled_mixtures_agree_with_weighted_ones() -> None:
    """p_k = n_k / N by weights is the same problem as every row at 1/N."""
    cost, sizes, _ = instance(9)
    weighted = ot_with_source_gradient(cost, sizes, np.array(sizes) / sum(sizes))
    plain = ot_with_source_gradient(cost, sizes)
    assert weighted.value == pytest.approx(plain.value)
    assert plain.value == pytest.approx(ot.emd2([], [], cost))


def test_self_potential_is_a_fixed_point() -> None:
    x = np.random.default_rng(10).normal(size=(8, 2))
    cost, a = otdd_cost(x, None, x, None), np.full(8, 1 / 8)
    f = self_potential(cost, a, 0.2)
    plan = a[:, None] * a * np.exp((f[:, None] + f - cost) / 0.2)
    np.testing.assert_allclose(plan.sum(axis=1), a, rtol=1e-8)


# ── bad input ──

X, Y = np.ones((4, 2)), [0, 1, 0, 1]
C = np.arange(8.0).reshape(4, 2)
CALLS = {
    "X: got shape (3,), want (rows": lambda: otdd_cost(np.ones(3), None, X, None),
    "X: got NaN": lambda: otdd_cost(X * np.nan, None, X, None),
    "Xv: got 3 columns, want 2": lambda: otdd_cost(X, None, np.ones((4, 3)), None),
    "y, yv: got one of them": lambda: otdd_cost(X, Y, X, None),
    "y: got shape (3,), want (4,)": lambda: otdd_cost(X, Y[:3], X, Y),
    "sources: got shape (3,)": lambda: otdd_cost(X, Y, X, Y, sources=[0, 1, 1]),
    "lam: got -1": lambda: otdd_cost(X, Y, X, Y, lam=-1),
    "label_metric: got 'mode'": lambda: otdd_cost(X, Y, X, Y, label_metric="mode"),  # type: ignore[arg-type]
    "C: got NaN or inf": lambda: ot_with_source_gradient(C + np.inf, [2, 2]),
    "source_sizes: got a sum of 3, want 4": lambda: ot_with_source_gradient(C, [2, 1]),
    "source_sizes: got no rows of source 1": lambda: ot_with_source_gradient(C, [4, 0]),
    "source_sizes: got float64": lambda: ot_with_source_gradient(C, [2.0, 2.0]),
    "p: got shares that sum to 1.1": lambda: ot_with_source_gradient(C, [2, 2], [0.6, 0.5]),
    "p: got a share of -0.1": lambda: ot_with_source_gradient(C, [2, 2], [1.1, -0.1]),
    "p: got shape (3,)": lambda: ot_with_source_gradient(C, [2, 2], [0.2, 0.3, 0.5]),
    "p: got NaN": lambda: ot_with_source_gradient(C, [2, 2], [np.nan, 0.5]),
    "reg: got 0": lambda: ot_with_source_gradient(C, [2, 2], reg=0),
    "self_costs: got costs": lambda: ot_with_source_gradient(C, [2, 2], self_costs=(C, C)),
    "self_costs: got shape (4, 2)": lambda: ot_with_source_gradient(
        C, [2, 2], reg=1.0, self_costs=(C, C)
    ),
    "max_iter: got 1": lambda: ot_with_source_gradient(
        np.random.default_rng(0).normal(size=(40, 40)), [20, 20], reg=0.05, max_iter=1
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("message", CALLS)
def test_bad_input_is_one_line(message) -> None:
    with pytest.raises(InputError) as caught:
        CALLS[message]()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_mixtures_within_tolerance_are_put_on_the_simplex() -> None:
    p = check_mixtures([0.5 + 4e-7, 0.5, -1e-9], 3)
    assert p.sum() == 1
    assert p.min() == 0
