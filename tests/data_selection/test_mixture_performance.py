"""Fitting performance to mixtures, projecting it to another size, moving on the simplex."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge

from scoredraw.data_selection.mixture_performance import (
    FORMS,
    LINEAR_FORMS,
    MixturePerformanceModel,
    error_amplification,
    mixture_grid,
    optimise_mixture,
    project_simplex,
    project_size,
    projection_weights,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

COUNTS = {  # coefficients for three sources, the constant among them
    "ot": 2, "linear-ot": 6, "pq-ot": 10, "pq-ot-code": 8, "linear": 3, "pseudo-quadratic": 5,
    "quadratic": 6,
}  # fmt: skip


def smooth(P: np.ndarray) -> np.ndarray:
    """A transport cost of a mixture, and no polynomial of it."""
    return 2 + 1 / (0.3 + P[..., 0]) + np.cos(3 * P[..., 1])


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    return mixture_grid(3, 6)


# ── the regression ──


@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_planted_coefficients_are_recovered(form, grid) -> None:
    ot = smooth(grid)
    probe = MixturePerformanceModel(form).fit(grid, ot, ot)
    assert len(probe.coef_) + 1 == COUNTS[form]
    x = np.column_stack([ot, grid])
    terms = np.prod(x[:, None] ** probe._powers, axis=2)
    planted = np.random.default_rng(0).normal(size=terms.shape[1])
    model = MixturePerformanceModel(form).fit(grid, ot, 0.3 + terms @ planted)
    np.testing.assert_allclose(model.coef_, planted, atol=1e-9)
    assert model.intercept_ == pytest.approx(0.3)
    elsewhere = np.random.default_rng(1).dirichlet(np.ones(3), 7)
    at = smooth(elsewhere)
    want = 0.3 + np.prod(np.column_stack([at, elsewhere])[:, None] ** probe._powers, 2) @ planted
    np.testing.assert_allclose(model.predict(elsewhere, at), want, atol=1e-9)
    assert model.predict(elsewhere[0], [at[0]]) == pytest.approx(want[0])


def test_the_paper_form_has_the_squares_the_notebook_lacks(grid) -> None:
    full = MixturePerformanceModel("pq-ot").fit(grid, smooth(grid), grid[:, 0]).terms_
    code = MixturePerformanceModel("pq-ot-code").fit(grid, smooth(grid), grid[:, 0]).terms_
    assert set(full) - set(code) == {"p1^2", "p2^2"}
    performance = 1 - grid[:, 0] ** 2
    errors = {
        form: np.abs(
            MixturePerformanceModel(form).fit(grid, smooth(grid), performance).predict(
                grid, smooth(grid)
            ) - performance
        ).max()
        for form in ("pq-ot", "pq-ot-code")
    }  # fmt: skip
    assert errors["pq-ot"] < 1e-9 < 1e-4 < errors["pq-ot-code"]


def test_least_squares_and_ridge_are_scikit_learns(grid) -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(len(grid), 2))
    X = np.column_stack([grid[:, 0], grid[:, 1]])
    plain = MixturePerformanceModel("linear").fit(grid, None, y)
    peer = LinearRegression().fit(X, y)
    np.testing.assert_allclose(plain.predict(grid), peer.predict(X), atol=1e-12)
    scaled = (X - X.mean(0)) / X.std(0)
    strong = MixturePerformanceModel("linear", 0.3).fit(grid, None, y)
    peer = Ridge(alpha=0.3 * len(X)).fit(scaled, y)
    np.testing.assert_allclose(strong.predict(grid), peer.predict(scaled), atol=1e-12)


@pytest.mark.parametrize(("form", "ridge"), [("pq-ot", None), ("quadratic", 0.01), ("ot", None)])
def test_leaving_one_out_and_weights(form, ridge, grid) -> None:
    rng = np.random.default_rng(3)
    y, ot = rng.normal(size=len(grid)), smooth(grid)
    model = MixturePerformanceModel(form, ridge).fit(grid, ot, y)
    np.testing.assert_allclose(model.weights(grid, ot) @ y, model.predict(grid, ot), atol=1e-9)
    if ridge is None:  # a ridge's scale changes a little with the rows
        held = np.array([
            MixturePerformanceModel(form).fit(
                np.delete(grid, i, 0), np.delete(ot, i), np.delete(y, i)
            ).predict(grid[i], [ot[i]])
            for i in range(len(grid))
        ])  # fmt: skip
        np.testing.assert_allclose(model.leave_one_out(), held, atol=1e-8)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "auto"])
def test_gradient_is_a_derivative_between_any_two_sources(form, grid) -> None:
    """OT here is a smooth function with known partial derivatives, so any form is checked."""
    rng = np.random.default_rng(4)
    y = np.stack([0.9 - 0.1 * smooth(grid), grid[:, 0] * 0.2], axis=1)
    y += rng.normal(size=y.shape) * 0.01
    model = MixturePerformanceModel(form).fit(grid, smooth(grid), y)
    p = np.array([0.3, 0.45, 0.25])
    means = approx_fprime(p, lambda q: float(smooth(q)), 1e-7)
    gradient = model.grad(p, float(smooth(p)), means + 40.0)
    assert gradient.shape == (2, 3)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-9)
    for i in range(3):
        for j in range(3):
            step = (np.eye(3)[i] - np.eye(3)[j]) * 1e-5
            ahead, behind = (
                model.predict(p + s * step, [float(smooth(p + s * step))]) for s in (1, -1)
            )
            want = (ahead - behind) / 2e-5
            np.testing.assert_allclose(gradient[:, i] - gradient[:, j], want, atol=1e-5, rtol=1e-4)


def test_the_calibrated_gradient_in_its_place_is_wrong(grid) -> None:
    """What the notebook does: another direction for each component."""
    performance = 0.9 - 0.1 * smooth(grid) + 0.2 * grid[:, 0] ** 2
    model = MixturePerformanceModel("pq-ot").fit(grid, smooth(grid), performance)
    p = np.array([0.2, 0.5, 0.3])
    means = approx_fprime(p, lambda q: float(smooth(q)), 1e-7)
    right = model.grad(p, float(smooth(p)), means)
    wrong = model.grad(p, float(smooth(p)), (means - means @ p) / (1 - p))
    assert np.linalg.norm(wrong - right) > 0.05 * np.linalg.norm(right)


def test_rational_recovers_its_own_curve() -> None:
    grid = mixture_grid(3, 7)
    rates = np.array([[3.0, 0.6, 0.5], [0.4, 2.5, 0.7], [0.6, 0.8, 4.0]])
    planted = 0.95 - 0.1 * (1 / (grid @ rates.T)).sum(axis=1)
    model = MixturePerformanceModel("rational").fit(grid, None, planted)
    inside = np.random.default_rng(5).dirichlet(np.ones(3), 20)
    want = 0.95 - 0.1 * (1 / (inside @ rates.T)).sum(axis=1)
    np.testing.assert_allclose(model.predict(inside), want, atol=2e-3)
    assert np.isfinite(model.leave_one_out()).all()


def test_auto_takes_the_small_form_of_small_grids() -> None:
    """A law in OT alone, noisy, 15 mixtures: the paper's 10 coefficients are not spent on it.

    Over 40 instances; "ot" spends 2, and noise alone seldom pays for more than 4.
    """
    grid, spent, better = mixture_grid(3, 4), [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = 0.9 - 0.1 * smooth(grid)
        y = truth + rng.normal(size=len(grid)) * 0.02
        auto = MixturePerformanceModel().fit(grid, smooth(grid), y)
        full = MixturePerformanceModel("pq-ot").fit(grid, smooth(grid), y)
        spent.append(auto.df_)
        new = rng.dirichlet(np.ones(3), 50)
        at, want = smooth(new), 0.9 - 0.1 * smooth(new)
        errors = [np.abs(model.predict(new, at) - want).mean() for model in (auto, full)]
        better.append(errors[0] < errors[1])
    assert np.mean(spent) < 4
    assert np.mean(better) > 0.75


def test_auto_finds_the_form_that_made_the_data(grid) -> None:
    rng = np.random.default_rng(6)
    y = 0.5 + 0.3 * grid[:, 0] - 0.4 * grid[:, 0] * grid[:, 1]
    model = MixturePerformanceModel().fit(grid, smooth(grid), y + rng.normal(size=28) * 1e-4)
    assert model.form_ == "quadratic"
    assert min(model.bic_, key=model.bic_.__getitem__) == (model.form_, model.ridge_)
    assert MixturePerformanceModel().fit(grid, None, y).form_ == "quadratic"
    chosen = MixturePerformanceModel("pq-ot", "bic").fit(grid, smooth(grid), y)
    assert {form for form, _ in chosen.bic_} == {"pq-ot"}
    assert len(chosen.bic_) > 1


def test_clone_and_parameters() -> None:
    model = clone(MixturePerformanceModel("ot", 0.1))
    assert model.get_params() == {"form": "ot", "ridge": 0.1}
    assert model.set_params(form="linear").form == "linear"
    with pytest.raises(InputError, match="params: got 'alpha'"):
        model.set_params(alpha=1)


# ── another size ──


@given(st.floats(-3, 3), st.floats(-1, 1), st.integers(2, 500), st.integers(1, 10**6))
@pytest.mark.property
@pytest.mark.filterwarnings("ignore:projecting")
def test_projection_is_exact_where_performance_is_affine_in_log_n(a, b, n0, n) -> None:
    law = lambda size: a + b * np.log(size)  # noqa: E731
    n1 = 2 * n0
    got = project_size(law(n0), law(n1), n0, n1, n)
    assert got == pytest.approx(law(n), abs=1e-8)
    assert project_size(0.3, 0.7, n0, n1, n0) == pytest.approx(0.3)
    assert project_size(0.3, 0.7, n0, n1, n1) == pytest.approx(0.7)
    w0, w1 = projection_weights(n0, n1, n)
    assert w0 + w1 == pytest.approx(1)


def test_power_laws_through_the_links() -> None:
    error = lambda n: 3 * n**-0.4  # noqa: E731
    with pytest.warns(UserWarning, match="by 5.2; sizes of 120 and 240: times 3.7"):
        got = project_size(1 - error(120), 1 - error(200), 120, 200, 1000, "log_error")
    assert got == pytest.approx(1 - error(1000))
    assert project_size(error(100), error(200), 100, 200, 400, "log") == pytest.approx(error(400))
    both = project_size([0.5, 0.6], [0.7, 0.9], 100, 200, 400, clip=(0, 1))
    np.testing.assert_allclose(both, [0.9, 1.0])


def test_error_amplification_is_the_spread_of_projections() -> None:
    assert error_amplification(1000, 1500, 10_000) == pytest.approx(np.hypot(5.68, 4.68), abs=0.01)
    noise = np.random.default_rng(7).normal(size=(2, 20_000))
    with pytest.warns(UserWarning, match="multiplies the error"):
        spread = project_size(noise[0], noise[1], 1000, 1500, 10_000).std()
    assert spread == pytest.approx(7.36, rel=0.03)  # six deviations of its own noise


# ── the simplex ──


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12))
@settings(max_examples=60)
@pytest.mark.property
def test_projection_onto_the_simplex(v) -> None:
    p = project_simplex(v)
    assert p.min() >= 0
    assert p.sum() == pytest.approx(1)
    gap = np.array(v) - p  # optimal: the same over the support, no larger off it
    assert gap[p > 0] == pytest.approx(gap[p > 0].max(), abs=1e-9)
    assert (gap <= gap[p > 0].max() + 1e-9).all()
    np.testing.assert_allclose(project_simplex(p), p, atol=1e-12)


def test_grid_is_the_whole_lattice() -> None:
    assert len(mixture_grid(3, 6)) == 28
    assert len(np.unique(mixture_grid(4, 5).round(9), axis=0)) == 56
    np.testing.assert_allclose(mixture_grid(4, 5).sum(axis=1), 1)
    assert len(mixture_grid(3)) == 36
    assert len(mixture_grid(10)) == 55  # halves at least


@pytest.mark.parametrize("method", ["projected", "exponentiated"])
def test_climbing_stays_on_the_simplex_and_finds_the_top(method) -> None:
    target, Q = np.array([0.6, 0.5, -0.3]), np.diag([1.0, 2.0, 1.5])

    def objective(p):
        return -(p - target) @ Q @ (p - target), -2 * Q @ (p - target)

    best, trace = optimise_mixture(
        objective, [0.1, 0.1, 0.8], steps=400, lr=0.2, decay=1.0, method=method
    )
    assert (trace.mixtures >= 0).all()
    np.testing.assert_allclose(trace.mixtures.sum(axis=1), 1)
    peer = minimize(
        lambda p: -objective(p)[0], np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
    )  # fmt: skip
    np.testing.assert_allclose(best, peer.x, atol=2e-3)
    assert trace.values.max() == objective(best)[0]


def test_the_published_rate_hardly_moves_fractions() -> None:
    slope = np.array([0.3, -0.1, -0.2])
    objective = lambda p: (float(slope @ p), slope)  # noqa: E731
    slow = optimise_mixture(objective, np.full(3, 1 / 3), lr=5e-4)[0]
    assert np.linalg.norm(slow - 1 / 3) <= 5e-4 / 0.1 * np.linalg.norm(slope)
    free = optimise_mixture(objective, np.full(3, 1 / 3))[0]
    np.testing.assert_allclose(free, [1, 0, 0], atol=1e-9)
    percent = optimise_mixture(lambda p: (100 * float(slope @ p), 100 * slope), np.full(3, 1 / 3))
    np.testing.assert_allclose(percent[0], free)  # the default knows no unit


# ── bad input ──

P = mixture_grid(3, 4)
OK = P[:, 0]
FEW = slice(9)  # p1 takes two values there, so that its square says nothing new


def fit(form="ot", P=P, ot=OK, perf=OK, ridge=None):
    return MixturePerformanceModel(form, ridge).fit(P, ot, perf)


CALLS = {
    "form: got 'cubic'": lambda: fit("cubic"),
    "P: got shares that sum to 1.1": lambda: fit(P=P * 1.1),
    "P: got shape (15,)": lambda: fit(P=OK),
    "perf: got shape (14,)": lambda: fit(perf=OK[1:]),
    "perf: got NaN or infinity at mixture 3": lambda: fit(
        perf=np.where(np.arange(15) == 3, np.nan, 1)
    ),
    "ot: got None, want OT(p), which ot needs": lambda: fit(ot=None),
    "ot: got NaN": lambda: fit(ot=OK * np.nan),
    "P: got 9 mixtures, which determine 8 of 10": lambda: fit(
        "pq-ot", P[FEW], smooth(P[FEW]), OK[FEW]
    ),
    "P: got 10 mixtures, want more than": lambda: fit("rational", P[:10], None, OK[:10]),
    "ridge: got -1": lambda: fit(ridge=-1),
    "ridge: got 'lots'": lambda: fit(ridge="lots"),
    "model: got one that was not fitted": lambda: MixturePerformanceModel().grad([1, 0], 1.0, None),
    "source_means: got None": lambda: fit().grad([0.2, 0.3, 0.5], 1.0, None),
    "source_means: got shape (2,)": lambda: fit().grad([0.2, 0.3, 0.5], 1.0, [1, 2]),
    "n0, n1: got 200 and 100": lambda: project_size(0.5, 0.6, 200, 100, 300),
    "n0, n1: got 100 and 100": lambda: project_size(0.5, 0.6, 100, 100, 300),
    "n: got 0": lambda: project_size(0.5, 0.6, 100, 200, 0),
    "perf_n1: got 1, want below 1": lambda: project_size(0.5, 1.0, 1, 2, 3, "log_error"),
    "perf_n0: got 0, want above 0": lambda: project_size(0.0, 1.0, 1, 2, 3, "log"),
    "perf_n0: got NaN": lambda: project_size(np.nan, 1.0, 1, 2, 3),
    "link: got 'logit'": lambda: project_size(0.5, 0.6, 1, 2, 3, "logit"),
    "v: got NaN": lambda: project_simplex([np.nan, 1]),
    "m: got 1": lambda: mixture_grid(1),
    "start: got shares": lambda: optimise_mixture(lambda p: (0.0, p), [0.5, 0.6]),
    "lr: got 0": lambda: optimise_mixture(lambda p: (0.0, p), [0.5, 0.5], lr=0),
    "decay: got 2": lambda: optimise_mixture(lambda p: (0.0, p), [0.5, 0.5], decay=2),
    "method: got 'newton'": lambda: optimise_mixture(
        lambda p: (0.0, p), [0.5, 0.5], method="newton"
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("message", CALLS)
def test_bad_input_is_one_line(message) -> None:
    with pytest.raises(InputError) as caught:
        CALLS[message]()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_too_few_mixtures_are_enough_with_a_ridge() -> None:
    few, at = P[:9], smooth(P[:9])
    forced = fit("pq-ot", few, at, OK[:9], ridge=0.1)
    assert np.isfinite(forced.predict(P, smooth(P))).all()
    assert fit("auto", few, at, OK[:9]).df_ < 8
