"""The weights of DEIS against high precision, exactness on polynomials, order conditions."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad

from scoredraw.diffusion.integrator_coefficients import (
    TABLEAUX,
    VARIANTS,
    deis_coefficients,
    runge_kutta_coefficients,
)
from scoredraw.diffusion.schedules import (
    LinearBeta,
    NoiseSchedule,
    VarianceExploding,
)
from scoredraw.diffusion.time_grids import GRIDS, time_grid
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

Float = NDArray[np.float64]

LINEAR = LinearBeta()
MULTISTEP = ("tab", "rhoab", "logrhoab")


def precise_row(times: Float, i: int, order: int, variant: str) -> list[float]:
    """C_i0 .. C_ir of `LinearBeta()` with 40 digits."""
    b0, slope = mp.mpf(LINEAR.beta_0), mp.mpf(LINEAR.beta_1) - mp.mpf(LINEAR.beta_0)
    lost = lambda t: t * t * slope / 2 + t * b0  # noqa: E731
    rho = lambda t: mp.sqrt(mp.expm1(lost(t)))  # noqa: E731

    def time(rho: Any) -> Any:
        return 2 * mp.log1p(rho**2) / (b0 + mp.sqrt(b0**2 + 2 * slope * mp.log1p(rho**2)))

    variable = {"tab": time, "rhoab": lambda rho: rho, "logrhoab": mp.log}[variant]
    past = [mp.mpf(float(times[i - k])) for k in range(min(i, order) + 1)]
    nodes = [variable(rho(t)) if variant != "tab" else t for t in past]
    start, end = rho(past[0]), rho(mp.mpf(float(times[i + 1])))
    row = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]

        def integrand(s: Any, node: Any = node, others: Any = others) -> Any:
            at = variable(mp.exp(s))
            return mp.exp(s) * mp.fprod((at - other) / (node - other) for other in others)

        row.append(mp.quad(integrand, [mp.log(start), mp.log(end)]))
    scale = mp.exp(-lost(mp.mpf(float(times[i + 1]))) / 2)
    return [float(scale * value) for value in row]


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
@pytest.mark.parametrize("variant", MULTISTEP)
def test_coefficients_against_forty_digits(variant: str, steps: int) -> None:
    """No cancellation with short steps: the float32 sigmas of the peers lose up to 6e-3 here."""
    times = time_grid(LINEAR, steps)
    _, C = deis_coefficients(LINEAR, times, 3, variant)
    with mp.workdps(40):
        for i in {0, 1, 2, 3, steps // 2, steps - 1} & set(range(steps)):
            want = precise_row(times, i, 3, variant)
            np.testing.assert_allclose(C[i, : len(want)], want, rtol=2e-15 * (steps + 1), atol=0)


def test_one_step_across_the_whole_schedule() -> None:
    """From rho = 152 to 1e-5 in a step: the panels keep the quadrature exact."""
    times = np.array([1.0, 0.9, 1e-9])
    _, C = deis_coefficients(LINEAR, times, 1, "tab")
    with mp.workdps(40):
        np.testing.assert_allclose(C[1], precise_row(times, 1, 1, "tab"), rtol=1e-13)


@pytest.mark.parametrize("kind", GRIDS)
def test_rows_sum_to_the_ddim_increment(schedule: NoiseSchedule, kind: str) -> None:
    times = time_grid(schedule, 12, kind, t_end=max(schedule.ends.t_end, 1e-3))
    for order in range(4):
        for variant in (*MULTISTEP, "ipndm", "ei_eps"):
            psi, C = deis_coefficients(schedule, times, order, variant)
            assert C.shape == (12, order + 1)
            alpha, sigma = schedule.alpha(times), schedule.sigma(times)
            np.testing.assert_allclose(psi, alpha[1:] / alpha[:-1], rtol=1e-12)
            want = sigma[1:] - psi * sigma[:-1]
            np.testing.assert_allclose(C.sum(axis=1), want, rtol=1e-10, atol=1e-13)


@pytest.mark.property
@settings(max_examples=40)
@given(
    beta_0=st.floats(0.01, 5),
    beta_1=st.floats(0, 30),
    t_end=st.floats(1e-6, 0.5),
    steps=st.integers(1, 40),
    order=st.integers(0, 3),
    kind=st.sampled_from(GRIDS),
    variant=st.sampled_from([*MULTISTEP, "ipndm"]),
)
def test_partition_of_unity(
    beta_0: float, beta_1: float, t_end: float, steps: int, order: int, kind: str, variant: str
) -> None:
    schedule = LinearBeta(beta_0, beta_1)
    times = time_grid(schedule, steps, kind, t_end=t_end)
    _, C = deis_coefficients(schedule, times, order, variant, space="v")
    np.testing.assert_allclose(C.sum(axis=1), np.diff(schedule.rho(times)), rtol=1e-9, atol=1e-13)
    beyond = np.arange(order + 1) > np.arange(steps)[:, None]
    assert not C[beyond].any()


@pytest.mark.parametrize("variant", MULTISTEP)
def test_polynomials_are_integrated_exactly(schedule: NoiseSchedule, variant: str) -> None:
    """Degree <= r in the variant's own variable, after the warm-up."""
    times = time_grid(schedule, 8, t_end=max(schedule.ends.t_end, 1e-3))
    kinks = np.log(schedule.rho(schedule.knots)) if schedule.knots.size else np.zeros(0)
    rho = schedule.rho(times)
    own = {"tab": lambda r: float(schedule.time_of_rho(r)), "rhoab": float, "logrhoab": np.log}
    scale = {"tab": times[0], "rhoab": rho[0], "logrhoab": 1.0}[variant]
    past = {"tab": times, "rhoab": rho, "logrhoab": np.log(rho)}[variant] / scale
    for order in range(4):
        _, C = deis_coefficients(schedule, times, order, variant, space="v")
        for power in range(order + 1):
            for i in (order, 6):
                got = sum(C[i, j] * past[i - j] ** power for j in range(order + 1))
                ends = np.log(rho[[i, i + 1]])
                cuts = kinks[(kinks < ends[0]) & (kinks > ends[1])][::-1]
                edges = np.concatenate([ends[:1], cuts, ends[1:]])

                def integrand(s: float, power: int = power) -> float:
                    return float(np.exp(s) * (own[variant](np.exp(s)) / scale) ** power)

                if len(edges) > 30:
                    want = gauss(integrand, edges)
                else:
                    want = sum(quad(integrand, a, b)[0] for a, b in pairwise(edges))
                np.testing.assert_allclose(got, want, rtol=1e-8)


def gauss(function: Any, edges: Float) -> float:
    """Five nodes on each short interval between two kinks."""
    nodes, weights = np.polynomial.legendre.leggauss(5)
    centres, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    points = centres[:, None] + halves[:, None] * nodes
    return float((np.vectorize(function)(points) * weights * halves[:, None]).sum())


def test_ipndm_has_the_classic_weights() -> None:
    times = time_grid(LINEAR, 6, "t", 1.0)
    classic = [[1], [3 / 2, -1 / 2], np.array([23, -16, 5]) / 12, np.array([55, -59, 37, -9]) / 24]
    _, C = deis_coefficients(LINEAR, times, 3, "ipndm", space="v")
    increments = np.diff(LINEAR.rho(times))
    for i in range(6):
        weights = classic[min(i, 3)]
        got = C[i, : len(weights)] / increments[i]
        np.testing.assert_allclose(got, weights, rtol=1e-13)


def test_frozen_score_and_euler() -> None:
    times = time_grid(LINEAR, 7)
    psi, C = deis_coefficients(LINEAR, times, 0, "ei_score")
    np.testing.assert_allclose(C[:, 0], (1 - psi) / LINEAR.sigma(times[:-1]), rtol=1e-12)
    start, dt = times[:-1], np.diff(times)
    psi, C = deis_coefficients(LINEAR, times, 2, "euler")
    np.testing.assert_allclose(psi, 1 - 0.5 * LINEAR.beta(start) * dt, rtol=1e-13)
    want = 0.5 * LINEAR.beta(start) / LINEAR.sigma(start) * dt
    np.testing.assert_allclose(C[:, 0], want, rtol=1e-13)
    assert not C[:, 1:].any()
    exploding = VarianceExploding()
    sigma = time_grid(exploding, 7)
    psi, C = deis_coefficients(exploding, sigma, 0, "ei_score")
    want = np.diff(sigma**2) / 2 / sigma[:-1]
    np.testing.assert_allclose(C[:, 0], want, rtol=1e-11)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "rhork"])
def test_the_two_spaces_are_one_solver(variant: str) -> None:
    times = time_grid(LINEAR, 5)
    psi, C = deis_coefficients(LINEAR, times, 2, variant)
    ratio, D = deis_coefficients(LINEAR, times, 2, variant, space="v")
    alpha = LINEAR.alpha(times)
    np.testing.assert_allclose(ratio * alpha[1:] / alpha[:-1], psi, rtol=1e-12)
    np.testing.assert_allclose(D * alpha[1:, None], C, rtol=1e-12)


@pytest.mark.parametrize("name", TABLEAUX)
def test_tableaux_meet_the_order_conditions(name: str) -> None:
    c, a, b = TABLEAUX[name]
    order = int(name[0])
    nodes, weights = np.array(c, float), np.array(b, float)
    stages = len(c)
    inner = np.array([[*row, *[0.0] * (stages - len(row))] for row in a])
    np.testing.assert_allclose(inner.sum(axis=1), nodes, atol=1e-15)
    conditions = [
        [(weights.sum(), 1)],
        [(weights @ nodes, 1 / 2)],
        [(weights @ nodes**2, 1 / 3), (weights @ inner @ nodes, 1 / 6)],
        [
            (weights @ nodes**3, 1 / 4),
            ((weights * nodes) @ inner @ nodes, 1 / 8),
            (weights @ inner @ nodes**2, 1 / 12),
            (weights @ inner @ inner @ nodes, 1 / 24),
        ],
    ]
    for got, want in chain.from_iterable(conditions[:order]):
        assert got == pytest.approx(want, abs=1e-15)


def test_coefficient_tables_refuse() -> None:
    times = time_grid(LINEAR, 3)
    with pytest.raises(InputError, match="runge_kutta_coefficients"):
        deis_coefficients(LINEAR, times, 3, "rhork")
    with pytest.raises(InputError, match="space: got 'y'"):
        deis_coefficients(LINEAR, times, space="y")
    with pytest.raises(InputError, match="tableau: got 'rk'"):
        runge_kutta_coefficients(LINEAR, times, "rk")
