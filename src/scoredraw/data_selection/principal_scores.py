"""Principal components of quality metrics, turned so that their high end is the better one.

Documents rated by K metrics (an LLM judge's, a classifier's, or counted) are rated several times
over on the same thing: the metrics are correlated. Principal component analysis takes the
correlation out. With Z the standardised (n, K) ratings,

    Z = U Σ Vᵀ,   Y = Z V,   λ = σ² / n,   share of the variance λ_j / Σ λ.

A singular vector has no sign and "the top of a component" depends on it. Here the loadings of a
component sum to 0 or more, so that high is better on the average metric; if they sum to 0, the
largest in size is positive. A component whose loadings have both signs is a *contrast*: it trades
one metric against another, neither end is the better one, and it is reported as such.

Whitened scores W = Y Λ^{-1/2} may be rotated by any orthogonal R and stay uncorrelated: varimax
(each component on few metrics), ICA (independent beyond correlation), ZCA (R = Vᵀ: a component a
metric, as near to it as uncorrelated scores come).

The principal components are those of arXiv 2510.18909 (2025), "Learning from the Best,
Differently"; that paper states neither standardisation nor signs. Jolliffe 2002 on PCA.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.arrays import on_host
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]

SIGNS = ("loadings_sum", "anchor", "two_sided")
ROTATIONS = (None, "varimax", "ica", "zca")
NEAR_EQUAL = 0.05  # relative eigengap under which a component is as good as its neighbour
AGAINST = 0.1  # a loading of the other sign that is at least this large makes a contrast
ROUND_OFF = 1e-9


@dataclass(frozen=True, eq=False)
class PrincipalScores:
    """Fitted components: how a row of K metrics becomes k uncorrelated scores.

    metrics: int64 (m,) columns that vary; the others were dropped. mean, scale: (m,).
    projection: (k, m), scores = ((S - mean) / scale) projectionᵀ, with the directions in `scale`.
    loadings: (k, m), rows of length one: the principal axes, or the rotated factors' profile.
    explained: (m,) share of the variance of every principal axis. component_share: (k,), that of
    the k components (equal to `explained[:k]` without rotation).
    spread: (k,) standard deviation of each component on the fitted rows.
    contrast: bool (k,). gap: the smallest relative eigengap that decides the components.
    """

    n_metrics: int
    metrics: Int
    mean: Float
    scale: Float
    projection: Float
    loadings: Float
    explained: Float
    component_share: Float
    spread: Float
    contrast: NDArray[np.bool_]
    gap: float
    impute: str | None

    def transform(self, scores: ArrayLike) -> Float:
        """Component scores float64 (n, k) of ratings (n, K): of the rows fitted, or of others."""
        s = as_ratings(scores, impute=self.impute)
        k = s.shape[1]
        require(k == self.n_metrics, "scores", f"{k} metrics", f"{self.n_metrics}, as were fitted")
        return self._centred(s) @ self.projection.T

    def _centred(self, s: Float) -> Float:
        z = s[:, self.metrics]
        if self.impute == "mean":
            z = np.where(np.isnan(z), self.mean, z)
        z -= self.mean
        z /= self.scale
        return z


def principal_scores(
    scores: ArrayLike,
    n_components: int | None = 4,
    *,
    explained: float = 0.85,
    standardize: bool = True,
    sign: str = "loadings_sum",
    anchor: ArrayLike | None = None,
    rotation: str | None = None,
    whiten: bool = False,
    directions: Sequence[int] | None = None,
    impute: str | None = None,
    rng: Rng = 0,
) -> PrincipalScores:
    """Fit the components of ratings S (n, K): Z = U Σ Vᵀ, scores Z V, signs by the loadings.

    Parameters
    ----------
    scores : (n, K) finite, or NaN where `impute="mean"` fills in the column's mean.
    n_components : how many, or None for the fewest that explain a share `explained` of the
        variance. A single metric is its own component, whatever is asked.
    standardize : divide by the population standard deviation; otherwise the covariance's axes.
    sign : "loadings_sum"; "anchor", a positive correlation with `anchor` (n,), an overall score;
        "two_sided", as "loadings_sum" where both ends of contrasts are to be taken (by `select`).
    rotation : None, "varimax", "ica" or "zca" (a component a metric: n_components=None).
    whiten : scale components to variance 1; rotated ones always are.
    directions : (K,) of 1 or -1, for metrics where less is better (difficulty, toxicity).
    rng : of ICA's start.

    Warns where a metric is constant (dropped), n < K, or eigenvalues that decide the components
    lie within 5 %: these components turn into one another with other samples.
    Raises InputError for NaN, infinity, nothing that varies, more components than the rank.
    Time O(n K²), memory O(n K).

    >>> s = np.random.default_rng(0).normal(size=(200, 3)) @ [[2, 1, 0], [0, 1, 0], [0, 0, 1]]
    >>> fit = principal_scores(s, 2)
    >>> y = fit.transform(s)
    >>> y.shape, bool(abs(np.corrcoef(y.T)[0, 1]) < 1e-10), bool(fit.loadings.sum(axis=1).min() > 0)
    ((200, 2), True, True)
    """
    _check(n_components, explained, sign, anchor, rotation, impute)
    s = as_ratings(scores, impute=impute)
    n, k_all = s.shape
    require(n >= 2, "scores", f"n_samples = {n}", "two documents or more")
    turn = _directions(directions, k_all)
    if n < k_all:
        warnings.warn(f"{n} documents for {k_all} metrics: noisy components", stacklevel=2)
    mean = np.nanmean(s, axis=0) if impute else s.mean(axis=0)
    filled = np.where(np.isnan(s), mean, s) if impute else s
    deviation = filled.std(axis=0)
    metrics = np.flatnonzero(deviation > 1e-12 * np.abs(filled).max(axis=0))
    require(len(metrics) > 0, "scores", "constant metrics only", "one that varies")
    if len(metrics) < k_all:
        flat = ", ".join(str(c) for c in np.setdiff1d(np.arange(k_all), metrics))
        warnings.warn(f"constant metrics dropped: columns {flat}", stacklevel=2)
    scale = (deviation if standardize else np.ones(k_all))[metrics] * turn[metrics]
    z = (filled[:, metrics] - mean[metrics]) / scale
    _, singular, axes = np.linalg.svd(np.linalg.qr(z, mode="r"), full_matrices=False)
    variance = singular**2 / n
    if len(variance) < len(metrics):  # fewer documents than metrics
        variance = np.pad(variance, (0, len(metrics) - len(variance)))
    k, rank = _count(n_components, explained, variance, n, k_all, rotation)
    gap = _smallest_gap(variance[:rank], k, rotation)
    if gap < NEAR_EQUAL:
        text = f"eigenvalues {gap:.1%} apart: other samples may give other components"
        warnings.warn(text, stacklevel=2)
    projection, loadings, share = _components(z, axes[:k], variance, rotation, rng)
    if whiten and rotation is None:
        projection = projection / np.sqrt(variance[:k, None])
    y = z @ projection.T
    flip = _signs(loadings, y, anchor, sign)
    loadings, projection = loadings * flip[:, None], projection * flip[:, None]
    return PrincipalScores(
        k_all, metrics, mean[metrics], scale, projection, loadings, variance / variance.sum(),
        share, y.std(axis=0), is_contrast(loadings), gap, impute,
    )  # fmt: skip


def is_contrast(loadings: Float) -> NDArray[np.bool_]:
    """Whether each row of loadings (k, K), of length one, has both signs: a trade, bool (k,).

    Loadings below 0.1, less than 1 % of the component, do not count.

    >>> is_contrast(np.array([[0.8, 0.6], [0.8, -0.6], [0.999, -0.045]])).tolist()
    [False, True, False]
    """
    return np.asarray((loadings >= AGAINST).any(axis=1) & (loadings <= -AGAINST).any(axis=1))


def varimax(loadings: ArrayLike, *, sweeps: int = 100) -> Float:
    """The orthogonal R (k, k) that makes the squares of B = A R vary most, for loadings A (m, k).

    Raises Σ_j [mean_i b_ij⁴ - (mean_i b_ij²)²] plane by plane; in a plane with u = x² - y² and
    v = 2xy the best angle is exact: tan 4φ = cov(u, 2v) / (var u - var v). Kaiser 1958.
    O(sweeps m k²).

    >>> B = np.array([[1.0, 1.0], [1.0, -1.0]]) @ varimax([[1.0, 1.0], [1.0, -1.0]])
    >>> sorted(np.abs(B).ravel().round(6).tolist())
    [0.0, 0.0, 1.414214, 1.414214]
    """
    b = np.array(loadings, np.float64)
    k = b.shape[1]
    rotation = np.eye(k)
    for _ in range(sweeps):
        widest = 0.0
        for i, j in combinations(range(k), 2):
            u, v = b[:, i] ** 2 - b[:, j] ** 2, 2 * b[:, i] * b[:, j]
            u, v = u - u.mean(), v - v.mean()
            angle = np.arctan2(2 * u @ v, u @ u - v @ v) / 4
            c, s = np.cos(angle), np.sin(angle)
            plane = np.array([[c, -s], [s, c]])
            b[:, [i, j]] @= plane
            rotation[:, [i, j]] @= plane
            widest = max(widest, abs(float(angle)))
        if widest < ROUND_OFF:
            break
    return rotation


def as_ratings(scores: ArrayLike, *, impute: str | None = None) -> Float:
    """Ratings as float64 (n, K); InputError unless numbers, finite (NaN only where imputed)."""
    try:
        s = np.array(on_host(scores), np.float64)
    except (TypeError, ValueError):
        raise InputError("scores: got values that are not numbers, want ratings (n, K)") from None
    shaped = s.ndim == 2 and s.size > 0
    require(shaped, "scores", f"shape {s.shape}", "documents and metrics (n, K), not empty")
    bad = np.isinf(s) if impute else ~np.isfinite(s)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        came = f"NaN or infinity ({s[row, column]} in row {row}, metric {column})"
        require(False, "scores", came, "finite numbers, or impute='mean' for NaN")
    if impute:
        empty = np.flatnonzero(np.isnan(s).all(axis=0))
        require(not empty.size, "scores", f"NaN alone in metric {empty[:1]}", "some ratings")
    return s


def _check(
    n_components: Any, explained: Any, sign: str, anchor: Any, rotation: Any, impute: Any
) -> None:
    whole = isinstance(n_components, int | np.integer) and not isinstance(n_components, bool)
    given = n_components is None or (whole and n_components >= 1)
    require(given, "n_components", repr(n_components), "a whole number from 1, or None")
    require(0 < explained <= 1, "explained", explained, "a share of the variance in (0, 1]")
    require(sign in SIGNS, "sign", repr(sign), f"one of {', '.join(SIGNS)}")
    needed = (sign == "anchor") == (anchor is not None)
    came = "none" if anchor is None else f"one with sign={sign!r}"
    require(needed, "anchor", came, "overall scores (n,) with sign='anchor', and only then")
    require(rotation in ROTATIONS, "rotation", repr(rotation), "None, varimax, ica or zca")
    require(impute in (None, "mean"), "impute", repr(impute), "None or 'mean'")


def _directions(directions: Sequence[int] | None, k: int) -> Float:
    turn = np.ones(k) if directions is None else np.asarray(directions, np.float64)
    right = turn.shape == (k,) and bool((np.abs(turn) == 1).all())
    require(right, "directions", directions, f"{k} values, 1 or -1 a metric")
    return turn


def _count(
    wanted: int | None, explained: float, variance: Float, n: int, k_all: int, rotation: Any
) -> tuple[int, int]:
    """How many components to keep, and the rank they must not exceed."""
    eps = np.finfo(np.float64).eps * max(n, k_all)
    rank = int((np.sqrt(variance) > eps * np.sqrt(variance[0])).sum())
    if k_all == 1:
        return 1, 1
    if rotation == "zca":
        whole = f"all {len(variance)} metrics with rotation='zca' (n_components=None)"
        require(wanted in (None, len(variance)), "n_components", wanted, whole)
        require(rank == len(variance), "scores", f"rank {rank}", f"rank {len(variance)} for zca")
        return rank, rank
    if wanted is None:
        reached = np.cumsum(variance) / variance.sum()
        return min(rank, int(np.searchsorted(reached, explained * (1 - ROUND_OFF))) + 1), rank
    require(wanted <= rank, "n_components", wanted, f"at most {rank}, the rank of the ratings")
    return wanted, rank


def _smallest_gap(variance: Float, k: int, rotation: Any) -> float:
    """Smallest (λ_j - λ_{j+1}) / λ_j that matters: a rotation leaves only the last one open."""
    gaps = 1 - variance[1:] / variance[:-1]
    matter = gaps[:k] if rotation is None else gaps[k - 1 : k]
    return float(matter.min(initial=1.0))


def _components(
    z: Float, axes: Float, variance: Float, rotation: str | None, rng: Rng
) -> tuple[Float, Float, Float]:
    """Projection (k, m), unit loadings (k, m) and shares (k,), the largest share first."""
    k, total = len(axes), float(variance.sum())
    if rotation is None:
        return axes, axes, variance[:k] / total
    deviation = np.sqrt(variance[:k])
    factors = axes.T * deviation  # (m, k): covariances of metrics with whitened components
    if rotation == "varimax":
        turn = varimax(factors)
    elif rotation == "zca":
        turn = axes
    else:
        from sklearn.decomposition import FastICA

        seed = int(generator(rng).integers(2**31))
        ica = FastICA(whiten=False, random_state=seed, max_iter=1000)
        turn = ica.fit(z @ (axes.T / deviation)).components_.T
    rotated = factors @ turn
    share = (rotated**2).sum(axis=0)
    order = np.arange(k) if rotation == "zca" else np.argsort(-share, kind="stable")
    projection = (axes.T / deviation @ turn).T[order]
    return projection, (rotated / np.sqrt(share)).T[order], share[order] / total


def _signs(loadings: Float, y: Float, anchor: ArrayLike | None, sign: str) -> Float:
    """The sign (k,) of each component."""
    total = loadings.sum(axis=1)
    size = np.abs(loadings)
    largest = (size >= size.max(axis=1, keepdims=True) - ROUND_OFF).argmax(axis=1)
    total = np.where(np.abs(total) < ROUND_OFF, loadings[np.arange(len(size)), largest], total)
    if sign == "anchor":
        overall = np.asarray(anchor, np.float64)
        fits = overall.shape == y.shape[:1] and bool(np.isfinite(overall).all())
        require(fits, "anchor", f"shape {overall.shape}", f"finite scores ({len(y)},)")
        centred = overall - overall.mean()
        along = centred @ y
        unrelated = np.abs(along) <= ROUND_OFF * np.linalg.norm(centred) * np.linalg.norm(y, axis=0)
        total = np.where(unrelated, total, along)
    return np.where(total < 0, -1.0, 1.0)
