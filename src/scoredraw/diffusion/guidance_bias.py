r"""How wrong mixed scores are on Gaussians, and what the corrected ones should give: closed forms.

For experts N(m_i, v_i) the target Π q_i^{β_i} is Gaussian with precision Σ β_i/v_i, if that is
positive, and log ∫ is known. The uncorrected sampler, drift -f + σ² (1 + ζ²)/2 Σ β_i s_i and noise
ζ σ without weights, stays Gaussian too. In y = x/alpha and ρ = sigma/alpha, with u = ρ²,

    dm/du = (1 + ζ²)/2 Σ β_i (m - m_i)/(v_i + u)       dV/du = (1 + ζ²) Σ β_i V/(v_i + u) - ζ²

from the noise end (large u) to the data. For one expert, c = β (1 + ζ²) and κ = ζ²/(c - 1),

    V(u) = κ (v + u) + (V_1/(v + u_1) - κ) (v + u_1) ((v + u)/(v + u_1))^c

so that annealing ends at κ v in place of v/β: with β = 3 at 0.2 v for the usual noise, at v/9 for
"tempered" noise, and at v/3 as it should only for ζ → ∞.

Closed forms of the bias of what Skreta et al. 2025, arXiv 2503.02819, correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require

Float = NDArray[np.float64]


class GaussianTarget(NamedTuple):
    """N(mean, covariance) and log ∫ Π q_i^{β_i}."""

    mean: Float
    covariance: Float
    log_z: float


def gaussian_target(betas: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> GaussianTarget:
    """The target of Gaussian experts, or an InputError if it is none.

        P = Σ β_i S_i⁻¹,  h = Σ β_i S_i⁻¹ m_i,  mean P⁻¹ h,  covariance P⁻¹

    betas: (k,). means: (k, d). covariances: (k, d, d), or (k,) variances of isotropic ones.
    Raises InputError where P is not positive definite (guidance with a scale above one, say) and
    for shapes that disagree. O(k d³).

    >>> annealed = gaussian_target([3.0], [[0.0]], [1.0])
    >>> annealed.covariance.round(4).tolist(), round(annealed.log_z, 4)
    ([[0.3333]], -2.3872)
    >>> gaussian_target([-1.0, 2.0], [[0.0], [0.0]], [1.0, 3.0])
    Traceback (most recent call last):
    scoredraw.errors.InputError: betas: got a target with precision -0.333333 in some direction, want one that can be normalised
    """  # noqa: E501
    beta, m, S = _experts(betas, means, covariances)
    _, d = m.shape
    precisions = np.linalg.inv(S)
    P = np.einsum("i,ide->de", beta, precisions)
    h = np.einsum("i,ide,ie->d", beta, precisions, m)
    least = float(np.linalg.eigvalsh(P).min())
    came = f"a target with precision {least:g} in some direction"
    require(least > 0, "betas", came, "one that can be normalised")
    mean = np.linalg.solve(P, h)
    norms = d * np.log(2 * np.pi) + np.linalg.slogdet(S)[1]
    heights = np.einsum("id,ide,ie->i", m, precisions, m)
    log_z = 0.5 * (
        d * np.log(2 * np.pi) - np.linalg.slogdet(P)[1] + h @ mean - beta @ (norms + heights)
    )
    return GaussianTarget(mean, np.linalg.inv(P), float(log_z))


def normalisable(betas: ArrayLike, covariances: ArrayLike) -> bool:
    """Whether Π q_i^{β_i} of Gaussians (or of anything with these tails) has a finite integral.

    covariances: (k, d, d), or (k,) variances. Σ β_i S_i⁻¹ must be positive definite.

    >>> normalisable([-1.0, 2.0], [1.0, 1.9]), normalisable([-1.0, 2.0], [1.0, 2.1])
    (True, False)
    """
    S = np.asarray(covariances, np.float64)
    d = 1 if S.ndim == 1 else S.shape[-1]
    beta, _, S = _experts(betas, np.zeros((len(S), d)), S)
    precision = np.einsum("i,ide->de", beta, np.linalg.inv(S))
    return bool(np.linalg.eigvalsh(precision).min() > 0)


def variance_factor(beta: ArrayLike, noise_scale: ArrayLike) -> Float:
    """κ = ζ²/(β (1 + ζ²) - 1): annealing without weights ends at variance κ v, not v/β.

    From a noise end far away. Raises InputError unless β (1 + ζ²) > 1, where it depends on how far.

    >>> variance_factor(3.0, [1.0, 3**-0.5, 0.5**0.5, 1e6]).round(4).tolist()
    [0.2, 0.1111, 0.1429, 0.3333]
    """
    b, square = np.asarray(beta, np.float64), np.square(np.asarray(noise_scale, np.float64))
    rate = b * (1 + square) - 1
    require(bool((rate > 0).all()), "beta", f"β (1 + ζ²) = {rate.min() + 1:g}", "more than 1")
    return np.asarray(square / rate)


def bias_table(betas: Sequence[float], noise_scales: Sequence[float]) -> NDArray[np.float64]:
    """β κ, the variance that annealing without weights reaches over the right one: (β, ζ).

    >>> bias_table([2.0, 3.0], [1.0, 4.0]).round(3).tolist()
    [[0.667, 0.97], [0.6, 0.96]]
    """
    b = np.asarray(betas, np.float64)[:, None]
    return np.asarray(b * variance_factor(b, np.asarray(noise_scales)[None, :]))


def uncorrected_gaussian(
    betas: ArrayLike,
    means: ArrayLike,
    variances: ArrayLike,
    noise_scale: float,
    rho_start: float,
    rho_end: float = 0.0,
    *,
    mean_start: float = 0.0,
    variance_start: float | None = None,
) -> tuple[float, float]:
    """Mean and variance, in x/alpha, at which the unweighted sampler of 1-D Gaussians ends.

    betas, means, variances: (k,). rho_start, rho_end: sigma/alpha at the two ends. variance_start:
    that of the first state, by default rho_start²/Σβ. Isotropic experts in d dimensions have this
    in each. The integrals are taken numerically in log u, to 1e-10.

    >>> mean, variance = uncorrected_gaussian([3.0], [0.0], [1.0], 1.0, rho_start=10.0)
    >>> round(variance, 4)
    0.2
    """
    from scipy.integrate import solve_ivp

    beta, m, v = (np.atleast_1d(np.asarray(a, np.float64)) for a in (betas, means, variances))
    require(beta.shape == m.shape == v.shape, "betas", beta.shape, f"as many as means, {m.shape}")
    require(0 <= rho_end < rho_start < np.inf, "rho_end", rho_end, f"in [0, {rho_start:g})")
    square = noise_scale**2
    start = rho_start**2 / float(beta.sum()) if variance_start is None else variance_start

    def slope(s: float, y: Float) -> Float:
        u = np.exp(s) - v.min()
        weights = beta * (1 + square) / (v + u)
        dm = 0.5 * float(weights @ (y[0] - m))
        return np.array([dm, float(weights.sum()) * y[1] - square]) * np.exp(s)

    span = np.log(np.array([rho_start**2, rho_end**2]) + v.min())  # never the log of nothing
    found = solve_ivp(slope, span, [mean_start, start], rtol=1e-10, atol=1e-12, method="DOP853")
    return float(found.y[0, -1]), float(found.y[1, -1])


def _experts(betas: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> tuple[Float, ...]:
    """β (k,), m (k, d), S (k, d, d), checked."""
    beta, m = np.asarray(betas, np.float64), np.asarray(means, np.float64)
    S = np.asarray(covariances, np.float64)
    require(beta.ndim == 1 and beta.size >= 1, "betas", beta.shape, "(k,), k >= 1")
    require(bool(np.isfinite(beta).all()), "betas", "NaN or infinity", "finite powers")
    require(m.ndim == 2 and len(m) == len(beta), "means", m.shape, f"({len(beta)}, d)")
    k, d = m.shape
    if S.ndim == 1:
        S = S[:, None, None] * np.eye(d)
    require(S.shape == (k, d, d), "covariances", S.shape, f"({k}, {d}, {d}) or ({k},)")
    definite = bool(np.isfinite(S).all()) and bool((np.linalg.eigvalsh(S) > 0).all())
    require(definite, "covariances", "one that is not", "positive definite matrices")
    return beta, m, S
