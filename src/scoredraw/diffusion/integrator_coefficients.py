"""Weights of the exponential integrators for the diffusion ODE, exact to round-off.

Per unit of signal, v = x/alpha, and in the variable rho = sigma/alpha, the probability-flow ODE
of every schedule is  dv/drho = eps(alpha v, t(rho)).  A multistep solver replaces eps by the
polynomial through its last r + 1 values and integrates that exactly; back in x,

    x_{i+1} = psi_i x_i + Σ_j C_ij eps_{i-j},        psi_i = alpha_{i+1} / alpha_i
    C_ij    = alpha_{i+1} ∫_{rho_i}^{rho_{i+1}} L_ij drho

with L_ij the Lagrange polynomials on the last r + 1 times. The variants differ in the variable in
which the polynomial is one: t (`tab`), rho (`rhoab`), log rho (`logrhoab`), the step's number
(`ipndm`: the classic Adams-Bashforth weights times the DDIM increment). The integrals are
Gauss-Legendre sums of terms without cancellation: for a polynomial in rho or in the step's number
r//2 + 1 nodes are exact; for the others the nodes are spread over log rho, in which t(rho) is far
from its singularities, in panels that also end at the kinks of the schedule.

Zhang and Chen, "Fast sampling of diffusion models with exponential integrator", ICLR 2023,
arXiv 2204.13902. The authors' programs use a left Riemann sum of 10,000 points instead (errors up
to 4e-4 in the coefficients); diffusers' DEISMultistepScheduler is `logrhoab`, in float32.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.time_grids import checked_times, whole
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Int = NDArray[np.int64]

VARIANTS = ("euler", "ei_score", "ei_eps", "tab", "rhoab", "rhork", "ipndm", "logrhoab")
ONE_STEP = ("euler", "ei_score", "ei_eps")  # the paper's first ingredients: they keep no history
TO_CLEAN = ("rhoab", "rhork")  # regular at rho = 0, so they may end where no noise is left
NODES = 32  # Gauss-Legendre nodes a panel
WIDEST = 2.0  # of a panel, in log rho; 32 nodes are then exact to 1e-16


def deis_coefficients(
    schedule: NoiseSchedule,
    times: Any,
    order: int = 3,
    variant: str = "tab",
    *,
    space: str = "x",
) -> tuple[Float, Float]:
    """psi (N,) and C (N, order + 1) of x_{i+1} = psi_i x_i + Σ_j C_ij eps(x_{i-j}, t_{i-j}).

    times: (N + 1,) decreasing. Step i has only i earlier values, so it uses order min(i, order)
    and the other columns are 0. variant, beside the four above:

        euler      explicit Euler on dx/dt = f x + g²/(2 sigma) eps
        ei_score   the linear part exact, the score -eps/sigma frozen:
                   C_i0 = alpha_{i+1}/sigma_i ∫ alpha rho drho
        ei_eps     the same with eps frozen: DDIM, and order 0 of every other variant

    which fill the first column only. space: "x", or "v" for the weights in v = x/alpha.

    For all variants but euler and ei_score,  Σ_j C_ij = sigma_{i+1} - psi_i sigma_i.

    Raises InputError for an unknown variant, an order that is not an integer >= 0, and for times
    that `checked_times` refuses; warns above order 3, where extrapolation grows unstable.
    Time and memory O((N + kinks) order² nodes). Zhang and Chen 2023, arXiv 2204.13902.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> psi, C = deis_coefficients(LinearBeta(), [1.0, 0.5, 0.1], order=1)
    >>> psi.round(4).tolist(), C.round(4).tolist()
    ([42.7877, 3.3669], [[-41.8271, 0.0], [-3.7371, 0.8281]])
    """
    choices = ", ".join(name for name in VARIANTS if name != "rhork")
    wanted = f"one of {choices} (rhork has `runge_kutta_coefficients`)"
    require(variant in VARIANTS and variant != "rhork", "variant", repr(variant), wanted)
    require(space in ("x", "v"), "space", repr(space), "x or v")
    degree = whole(order, "order", 0)
    if degree > 3:
        warnings.warn(f"order {degree}: extrapolation above order 3 is unstable", stacklevel=2)
    grid = checked_times(schedule, times, clean_end=variant in TO_CLEAN)
    log_alpha, alpha = schedule.log_alpha(grid), schedule.alpha(grid)
    psi = np.exp(np.diff(log_alpha))
    if variant == "euler":
        start, steps = grid[:-1], np.diff(grid)
        psi = 1 + schedule.drift(start) * steps
        C = _first(0.5 * schedule.diffusion(start) / schedule.sigma(start) * steps, degree)
    elif variant == "ei_score":
        rho, weights, first = _nodes(schedule, grid)
        frozen = schedule.alpha(schedule.time_of_rho(rho)) * rho
        integrals = np.add.reduceat((weights * frozen).sum(axis=1), first)
        C = _first(alpha[1:] / schedule.sigma(grid[:-1]) * integrals, degree)
    elif variant == "ei_eps":
        C = _first(alpha[1:] * np.diff(schedule.rho(grid)), degree)
    else:
        C = alpha[1:, None] * _extrapolation(schedule, grid, degree, variant)
    if space == "v":
        return psi * np.exp(-np.diff(log_alpha)), C / alpha[1:, None]
    return psi, C


def _first(column: Float, order: int) -> Float:
    return np.pad(column[:, None], ((0, 0), (0, order)))


def _extrapolation(schedule: NoiseSchedule, times: Float, order: int, variant: str) -> Float:
    """∫ L_ij drho over each step i, (N, order + 1), the polynomials in the variant's variable."""
    steps = np.arange(len(times) - 1)
    rho = schedule.rho(times)
    if variant in ("rhoab", "ipndm"):
        share, weights = unit_nodes(order // 2 + 1)
        variable = rho if variant == "rhoab" else np.arange(len(times), dtype=np.float64)
        points = variable[:-1, None] + np.diff(variable)[:, None] * share
        return _integrals(points, np.diff(rho)[:, None] * weights, steps, variable, order)
    points, weights, first = _nodes(schedule, times)
    if variant == "tab":
        variable, points = times, schedule.time_of_rho(points)
    else:
        variable, points = np.log(rho), np.log(points)
    return _integrals(points, weights, first, variable, order)


def unit_nodes(count: int) -> tuple[Float, Float]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return np.asarray((1 + nodes) / 2), np.asarray(weights / 2)


def _nodes(schedule: NoiseSchedule, times: Float) -> tuple[Float, Float, Int]:
    """rho (P, 32) at the nodes of P panels, the weights of ∫ · drho, each step's first panel (N,).

    Substituting rho = e^s, panels are cut at the times, at the kinks of abar between them, and
    where they would be wider than `WIDEST` in s. Positions are kept relative to the start of the
    cut, rho = rho_a e^{share Δs}, so that short steps lose no digits.
    """
    kinks = schedule.knots[(schedule.knots > times[-1]) & (schedule.knots < times[0])]
    cuts = np.union1d(times, kinks)[::-1]
    rho = schedule.rho(cuts)
    widths = np.log1p(np.diff(rho) / rho[:-1])
    parts = np.maximum(1, np.ceil(-widths / WIDEST)).astype(np.int64)
    cut = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(cut)) - np.repeat(np.cumsum(parts) - parts, parts)
    share, weights = unit_nodes(NODES)
    position = (part[:, None] + share) / parts[cut, None]
    nodes = rho[cut, None] * np.exp(position * widths[cut, None])
    first = np.searchsorted(-cuts[cut], -times[:-1])
    return nodes, nodes * weights * (widths / parts)[cut, None], first


def _integrals(points: Float, weights: Float, first: Int, variable: Float, order: int) -> Float:
    """Σ weights · L_ij(points), (N, order + 1), over the panels of each step i.

    L_ij is 1 at variable[i-j] and 0 at the other variable[i-k], 0 <= k <= min(i, order).
    """
    steps = np.arange(len(variable) - 1)
    past = steps[:, None] - np.arange(order + 1)
    panels = np.diff(np.append(first, len(points)))
    exists = np.repeat(past >= 0, panels, axis=0)
    nodes = np.repeat(variable[np.maximum(past, 0)], panels, axis=0)
    result = np.zeros((len(steps), order + 1))
    for j in range(order + 1):
        basis = weights * exists[:, j, None]
        for k in range(order + 1):
            if k != j:
                both = exists[:, j] & exists[:, k]
                gap = np.where(both, nodes[:, j] - nodes[:, k], 1.0)
                ratio = (points - nodes[:, k, None]) / gap[:, None]
                basis = basis * np.where(both[:, None], ratio, 1.0)
        result[:, j] = np.add.reduceat(basis.sum(axis=1), first)
    return result


# ------------------------------------------------------------------ Runge-Kutta


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: stage s at share c[s] of the step, from the stages before it.

    a[s] has the weights of stages 0 .. s-1, b those of the step.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUX = {
    "1euler": Tableau((0,), ((),), (1,)),
    "2heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "3kutta": Tableau((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "3ral": Tableau((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "3heun": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "3vdh": Tableau((0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4)),
    "3ssprk": Tableau((0, 1, 1 / 2), ((), (1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "4rk": Tableau(
        (0, 1 / 2, 1 / 2, 1),
        ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


class RungeKuttaCoefficients(NamedTuple):
    """Stage s of step i looks at  stage_psi x_i + Σ_l stage_C[l] eps_l  at time stage_times.

    stage_times, stage_psi (N, S); stage_C (N, S, S), strictly lower triangular; the step itself is
    psi_i x_i + Σ_s C_is eps_s with psi (N,) and C (N, S).
    """

    stage_times: Float
    stage_psi: Float
    stage_C: Float
    psi: Float
    C: Float


def runge_kutta_coefficients(
    schedule: NoiseSchedule, times: Any, tableau: str | Tableau = "3kutta"
) -> RungeKuttaCoefficients:
    """The explicit Runge-Kutta method of `tableau` on dv/drho = eps, written in x.

    times: (N + 1,) decreasing, one step an interval, so N times as many network calls as stages.
    Stage times are t(rho_i + c (rho_{i+1} - rho_i)). tableau: a name in `TABLEAUX` or a `Tableau`.
    Raises InputError for an unknown name (listing the names), a tableau of inconsistent sizes, or
    times that `checked_times` refuses; t_end = 0 is allowed. Zhang and Chen 2023, arXiv 2204.13902.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> runge_kutta_coefficients(LinearBeta(), [0.5, 0.0], "2heun").stage_times.tolist()
    [[0.5, 0.0]]
    """
    method = as_tableau(tableau)
    grid = checked_times(schedule, times, clean_end=True)
    stages = len(method.c)
    c = np.array(method.c, dtype=np.float64)
    a = np.array([[*row, *[0.0] * (stages - len(row))] for row in method.a])
    alpha, rho = schedule.alpha(grid), schedule.rho(grid)
    increment = np.diff(rho)[:, None]
    stage_times = np.asarray(schedule.time_of_rho(rho[:-1, None] + c * increment))
    stage_times[:, c == 0] = grid[:-1, None]  # the inverse of rho would move them by an ulp
    stage_times[:, c == 1] = grid[1:, None]
    stage_alpha = schedule.alpha(stage_times)
    return RungeKuttaCoefficients(
        stage_times=stage_times,
        stage_psi=stage_alpha / alpha[:-1, None],
        stage_C=(stage_alpha * increment)[:, :, None] * a,
        psi=alpha[1:] / alpha[:-1],
        C=alpha[1:, None] * increment * np.array(method.b, dtype=np.float64),
    )


def as_tableau(tableau: str | Tableau) -> Tableau:
    """The tableau of a name, or a checked tableau."""
    if isinstance(tableau, str):
        require(tableau in TABLEAUX, "tableau", repr(tableau), f"one of {', '.join(TABLEAUX)}")
        return TABLEAUX[tableau]
    stages = len(tableau.c)
    sizes = stages >= 1 and len(tableau.b) == stages
    if not sizes or [len(row) for row in tableau.a] != list(range(stages)):
        raise InputError("tableau: got inconsistent sizes, want c (S), b (S), a[s] with s weights")
    return tableau
