"""How far a mixture of data sources is from the validation data, and which way it should move.

A training set with share p_k from source k is a cloud of weighted points: each of the n_k rows of
source k weighs p_k / n_k. Its optimal transport cost to the validation set falls as the mixture
comes to look like what the model will be judged on, and the solver's dual potentials f give the
gradient in p for nothing: with f̄_k the mean of f over source k,

    ∂OT/∂p_i = (f̄_i - Σ_k p_k f̄_k) / (1 - p_i)

where the mass given to source i is taken from the others in proportion. Because the rows are
weighted and not drawn again, OT(p) has no sampling noise and is convex in p.

Labels count through the cost (OTDD): besides the features, two rows differ by how differently
their classes are distributed.

Kang, Just, Sahu and Jia, 2023, "Performance Scaling via Optimal Transport: Enabling Data Selection
from Partially Revealed Sources", arXiv:2307.02460; Alvarez-Melis and Fusi, 2020, "Geometric
Dataset Distances via Optimal Transport", arXiv:2002.02923.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, import_extra, require

Array = NDArray[np.float64]
Int = NDArray[np.int64]
LabelMetric = Literal["gaussian", "mean", "exact"]

SIMPLEX_TOLERANCE = 1e-6
KERNEL_RANGE = 500.0  # exp(-this) is still far from underflow in float64
SWEEP_ELEMENTS = 1 << 17  # of the kernel, 1 MB, read once for both halves of a sweep


# ── The cost ─────────────────────────────────────────────────────────────────────────────────────


def otdd_cost(
    X: ArrayLike,
    y: ArrayLike | None,
    Xv: ArrayLike,
    yv: ArrayLike | None,
    *,
    label_metric: LabelMetric = "gaussian",
    lam: float = 1.0,
    sources: ArrayLike | None = None,
) -> Array:
    r"""Squared distances between labelled rows (the ground cost of OTDD), (n, nv).

    :math:`C_{ij}=\lVert x_i-x'_j\rVert^2+\lambda\,W_2^2(\alpha_{y_i},\alpha'_{y'_j})`, where
    :math:`\alpha_c` is the cloud of the rows of class c on its own side, and W₂² is

    - ``"gaussian"``: between normal distributions with the classes' means and covariances
      (Bures): ‖μ-μ'‖² + tr Σ + tr Σ' - 2 ‖Σ^½ Σ'^½‖_*;
    - ``"mean"``: ‖μ-μ'‖², which costs least;
    - ``"exact"``: between the clouds themselves, one exact transport a pair of classes.

    Without labels (`y` and `yv` None), and where both sides hold one and the same class, labels
    say nothing and C is the plain squared distance.

    Parameters
    ----------
    X, Xv : (n, d) and (nv, d) features or embeddings, standardised by the caller; any real type.
    y, yv : (n,) and (nv,) labels of any kind, or both None.
    lam : weight λ ≥ 0 of the label term.
    sources : (n,) source of each training row. Then a class is described source by source, and a
        class of which a source holds fewer than two rows by its rows in all sources.

    Raises
    ------
    InputError
        shapes that disagree, labels on one side only, NaN or infinity, costs beyond float64.

    Time O(n nv d) and, for K and K' classes, O(K K' d³) ("gaussian"); memory O(n nv + K' d²).

    >>> otdd_cost([[0.0], [2.0]], None, [[1.0], [3.0]], None).tolist()
    [[1.0, 9.0], [1.0, 1.0]]
    >>> C = otdd_cost([[0.0], [2.0]], [0, 1], [[1.0], [3.0]], [0, 1], label_metric="mean")
    >>> C.tolist()
    [[2.0, 18.0], [2.0, 2.0]]
    """
    from scipy.spatial.distance import cdist

    x, xv = _features(X, "X"), _features(Xv, "Xv")
    require(xv.shape[1] == x.shape[1], "Xv", f"{xv.shape[1]} columns", f"{x.shape[1]}, as in X")
    known = ("gaussian", "mean", "exact")
    require(label_metric in known, "label_metric", repr(label_metric), " or ".join(known))
    require(np.isfinite(lam) and lam >= 0, "lam", lam, "a number ≥ 0")
    require((y is None) == (yv is None), "y, yv", "one of them", "both, or neither")
    cost: Array = cdist(x, xv, "sqeuclidean")
    if y is not None and lam > 0:
        assert yv is not None
        labels, labels_v = _labels(y, len(x), "y"), _labels(yv, len(xv), "yv")
        if len(np.unique(np.concatenate([labels, labels_v]))) > 1:
            clouds, cell = _class_clouds(x, labels, sources)
            clouds_v, cell_v = _class_clouds(xv, labels_v, None)
            cost += lam * _cloud_distances(clouds, clouds_v, label_metric)[np.ix_(cell, cell_v)]
    fits = bool(np.isfinite(cost).all())
    require(fits, "X", "values whose squared distances overflow", "features of a smaller scale")
    return cost


def _features(X: ArrayLike, argument: str) -> Array:
    """As float64 before anything is squared: float32 overflows at 1.8e19."""
    x = np.asarray(X, dtype=np.float64)
    require(x.ndim == 2 and x.size > 0, argument, f"shape {x.shape}", "(rows, columns), not empty")
    require(bool(np.isfinite(x).all()), argument, "NaN or infinity", "finite numbers")
    return x


def _labels(y: ArrayLike, n: int, argument: str) -> NDArray[Any]:
    labels = np.asarray(y)
    require(labels.shape == (n,), argument, f"shape {labels.shape}", f"({n},), one a row")
    return labels


def _class_clouds(
    x: Array, labels: NDArray[Any], sources: ArrayLike | None
) -> tuple[list[Array], Int]:
    """The rows of every class (of every source), and which of these clouds each row belongs to."""
    classes, code = np.unique(labels, return_inverse=True)
    clouds = [x[code == c] for c in range(len(classes))]
    if sources is None:
        return clouds, code
    source = np.unique(_labels(sources, len(x), "sources"), return_inverse=True)[1]
    cells, cell, counts = np.unique(
        source * len(classes) + code, return_inverse=True, return_counts=True
    )
    own = [
        x[cell == k] if counts[k] >= 2 else clouds[int(cells[k]) % len(classes)]
        for k in range(len(cells))
    ]
    return own, cell


def _cloud_distances(a: list[Array], b: list[Array], metric: LabelMetric) -> Array:
    """W₂² between every two clouds, (len(a), len(b))."""
    if metric == "exact":
        from scipy.spatial.distance import cdist

        ot = import_extra("ot", "all")
        return np.array([[ot.emd2([], [], cdist(p, q, "sqeuclidean")) for q in b] for p in a])
    means_a, means_b = (np.stack([cloud.mean(axis=0) for cloud in side]) for side in (a, b))
    squared: Array = ((means_a[:, None] - means_b[None]) ** 2).sum(axis=2)
    if metric == "mean":
        return squared
    # ‖Σ^½ Σ'^½‖_* from the centred rows: no matrix root, and exact for singular covariances
    roots_a, roots_b = ([_root(cloud) for cloud in side] for side in (a, b))
    spread_a, spread_b = (np.array([(r**2).sum() for r in roots]) for roots in (roots_a, roots_b))
    stacked = np.stack(roots_b)
    overlap = np.stack([np.linalg.svdvals(root @ stacked).sum(axis=1) for root in roots_a])
    bures: Array = np.maximum(spread_a[:, None] + spread_b[None] - 2 * overlap, 0.0)
    return squared + bures


def _root(cloud: Array) -> Array:
    """The symmetric root of the covariance (d, d), from the SVD of the centred rows."""
    centred = (cloud - cloud.mean(axis=0)) / np.sqrt(len(cloud))
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    root: Array = (vt.T * s) @ vt
    return root


# ── Transport, and its gradient by source ────────────────────────────────────────────────────────


class SourceTransport(NamedTuple):
    """OT(p), its gradient in p (m,) as mass is taken in proportion, and the potentials f (n,)."""

    value: float
    gradient: Array
    duals: Array


def ot_with_source_gradient(
    C: ArrayLike,
    source_sizes: ArrayLike,
    p: ArrayLike | None = None,
    *,
    reg: float | None = None,
    self_costs: tuple[ArrayLike, ArrayLike] | None = None,
    max_iter: int | None = None,
) -> SourceTransport:
    r"""Transport cost of a mixture of sources to validation data, with its gradient by source.

    :math:`\mathrm{OT}(p)=\min_{\pi}\langle\pi,C\rangle` with row sums :math:`p_k/n_k` on the rows
    of source k and column sums :math:`1/n_v`. With potentials f and their source means f̄,
    :math:`\partial_i=(\bar f_i-\sum_k p_k\bar f_k)/(1-p_i)`, and 0 where :math:`p_i=1`: there is
    nothing left to take mass from. It lies between the backward and the forward difference
    quotient (OT is convex and piecewise linear in p), does not change when a constant is added
    to f, and Σ p_i (1-p_i) ∂_i = 0.

    A source with p_i = 0 gets the potentials that the optimum implies,
    :math:`f(x)=\min_j c(x,v_j)-g_j`, so that it can enter. (The released notebook gives such a
    source the gradient 0; it never returns.)

    Parameters
    ----------
    C : (n, nv) costs; the rows of a source stand together, in the order of `source_sizes`.
    source_sizes : (m,) rows of each source, at least one, summing to n.
    p : (m,) shares on the simplex; by default n_k / n, every row weighing the same.
    reg : None for the exact network simplex; ε > 0 for entropic transport, in units of C
        (relative to the product of the marginals).
    self_costs : with `reg`, the costs of the training rows and of the validation rows among
        themselves, (n, n) and (nv, nv): value and potentials are then debiased (the Sinkhorn
        divergence), and equal data have divergence 0. Without it they are the entropic ones.
    max_iter : of the solver; by default 10⁷ pivots or 10⁴ Sinkhorn sweeps.

    Returns
    -------
    (value, gradient (m,), duals (n,)): in units of C, and of C per unit of share.

    Raises
    ------
    InputError
        sizes that do not sum to n, an empty source, p off the simplex by more than 1e-6, NaN
        or infinite costs, reg ≤ 0, a solver stopped before the optimum.

    Time about O(n nv log n) to O(n² nv) exact (2,000 x 500 in 0.2 s), O(n nv) a Sinkhorn sweep;
    memory O(n nv).

    Kang et al., 2023, arXiv:2307.02460; exact potentials from POT (Flamary et al., 2021).

    >>> value, gradient, duals = ot_with_source_gradient([[0.0], [4.0]], [1, 1], [0.75, 0.25])
    >>> value, gradient.tolist()
    (1.0, [-4.0, 4.0])
    """
    cost = np.asarray(C, dtype=np.float64)
    require(cost.ndim == 2 and cost.size > 0, "C", f"shape {cost.shape}", "(rows, validation rows)")
    require(bool(np.isfinite(cost).all()), "C", "NaN or infinity", "finite costs")
    sizes = _source_sizes(source_sizes, len(cost))
    share = sizes / len(cost) if p is None else check_mixtures(p, len(sizes))
    require(share.ndim == 1, "p", f"shape {share.shape}", f"one mixture ({len(sizes)},)")
    a, b = np.repeat(share / sizes, sizes), np.full(cost.shape[1], 1 / cost.shape[1])
    if reg is None:
        require(self_costs is None, "self_costs", "costs", "None for exact transport")
        f, g = _exact_potentials(cost, a, b, max_iter or 10**7)
    else:
        require(np.isfinite(reg) and reg > 0, "reg", reg, "a number above 0, or None")
        f, g = _entropic_potentials(cost, a, b, reg, max_iter or 10**4)
        if self_costs is not None:
            f -= self_potential(_square(self_costs[0], len(a)), a, reg)
            g -= self_potential(_square(self_costs[1], len(b)), b, reg)
    return SourceTransport(
        float(a @ f + b @ g), calibrated_gradient(source_means(f, sizes), share), f
    )


def source_means(duals: ArrayLike, source_sizes: ArrayLike) -> Array:
    """f̄ (m,): the mean potential of each source, ∂OT/∂p as a plain partial derivative.

    The rows of a source stand together. Raises `InputError` where the sizes do not sum to n.

    >>> source_means([1.0, 3.0, 5.0], [2, 1]).tolist()
    [2.0, 5.0]
    """
    f = np.asarray(duals, dtype=np.float64)
    sizes = _source_sizes(source_sizes, len(f))
    means: Array = np.add.reduceat(f, np.cumsum(sizes) - sizes) / sizes
    return means


def calibrated_gradient(means: Array, p: Array) -> Array:
    """(f̄_i - Σ_k p_k f̄_k) / (1 - p_i), and 0 where source i already has everything."""
    rest = 1 - p
    alone = rest <= SIMPLEX_TOLERANCE
    gradient: Array = np.where(alone, 0.0, (means - means @ p) / np.where(alone, 1.0, rest))
    return gradient


def _exact_potentials(cost: Array, a: Array, b: Array, max_iter: int) -> tuple[Array, Array]:
    """Potentials of the network simplex on the rows that have mass, extended to all rows."""
    ot = import_extra("ot", "all")
    present = a > 0
    _, log = ot.emd(a[present], b, cost[present], numItermax=max_iter, log=True)
    optimal = log["warning"] is None
    require(optimal, "max_iter", f"{max_iter}, which did not reach the optimum", "more")
    g: Array = np.asarray(log["v"], dtype=np.float64)
    f: Array = (cost - g).min(axis=1)  # where there is mass these are the solver's own
    return f, g


def _entropic_potentials(
    cost: Array, a: Array, b: Array, reg: float, max_iter: int
) -> tuple[Array, Array]:
    """Potentials of OT_ε(a, b) = min <π, C> + ε KL(π | a ⊗ b), f after one more half sweep."""
    shift = cost.min(axis=1)  # a constant a row goes into f, and keeps exp(-C/ε) from vanishing
    if (cost.max(axis=1) - shift).max() > KERNEL_RANGE * reg:

        def in_logs(z: Array) -> Array:
            f = soft_transform(cost, reg * z, b, reg)
            return soft_transform(cost.T, f, a, reg) / reg

        g = reg * _sinkhorn(in_logs, b, max_iter)
        return soft_transform(cost, g, b, reg), g
    kernel = cost - shift[:, None]
    kernel /= -reg
    np.exp(kernel, out=kernel)

    def by_kernel(z: Array) -> Array:
        """Both halves of a sweep in one pass, a cache's worth of rows at a time."""
        v, sums = b * np.exp(z), np.zeros(len(b))
        for start in range(0, len(a), rows):
            block = kernel[start : start + rows]
            sums += (a[start : start + rows] / (block @ v)) @ block
        return -np.log(sums)

    rows = max(1, SWEEP_ELEMENTS // len(b))
    z = _sinkhorn(by_kernel, b, max_iter)
    return shift - reg * np.log(kernel @ (b * np.exp(z))), reg * z


def _sinkhorn(sweep: Callable[[Array], Array], b: Array, max_iter: int) -> Array:
    """The fixed point z = g/ε of a sweep, by Anderson's extrapolation from the last ten.

    Plain sweeps take about five times as many. Where an extrapolation makes things worse, plain
    sweeps go on from the best point, twice as many each time. Stops where the column sums
    b exp(-(sweep(z) - z)) are within 1e-9 of b.
    """
    z, good, weight, best = np.zeros(len(b)), np.zeros(len(b)), np.sqrt(b), np.inf
    points: list[Array] = []
    moves: list[Array] = []
    plain, pause = 0, 5
    for _ in range(max_iter):
        move = sweep(z) - z
        error = float(np.linalg.norm(b * np.expm1(np.minimum(-move, KERNEL_RANGE))))
        if error <= 1e-9:
            return z
        if error > 2 * best and plain == 0:
            z, points, moves, plain, pause = good, [], [], pause, 2 * pause
            continue
        if error < best:
            good, best = z, error
        points, moves = [*points[-9:], z], [*moves[-9:], move]
        z = z + move
        plain = max(plain - 1, 0)
        if len(moves) > 1 and plain == 0:
            turns, steps = np.diff(moves, axis=0).T, np.diff(points, axis=0).T
            mix = np.linalg.lstsq(turns * weight[:, None], move * weight, rcond=1e-10)[0]
            z = z - (steps + turns) @ mix
    came = f"{max_iter} sweeps, with column sums {error:.1e} off"
    raise InputError(f"max_iter: got {came}, want more, or a larger reg")


def soft_transform(cost: Array, g: Array, b: Array, reg: float) -> Array:
    """f(x) = -ε log Σ_j b_j exp((g_j - c(x, v_j)) / ε), over the columns that have mass."""
    held = b > 0
    exponent = (g[held] - cost[:, held]) / reg + np.log(b[held])
    top = exponent.max(axis=1)
    np.subtract(exponent, top[:, None], out=exponent)
    f: Array = -reg * (top + np.log(np.exp(exponent, out=exponent).sum(axis=1)))
    return f


def self_potential(cost: Array, a: Array, reg: float, max_iter: int = 1000) -> Array:
    """The potential of OT_ε(a, a), half of whose value is a @ f: f ← (f + T f) / 2.

    cost: (n, n) symmetric. The averaged sweep contracts, unlike the plain one. Raises
    `InputError` where 1,000 sweeps are not enough. O(n²) a sweep.
    """
    f = np.zeros(len(a))
    for _ in range(max_iter):
        step = soft_transform(cost, f, a, reg) - f
        f += step / 2
        if np.abs(step).max() <= 1e-10 * max(reg, np.abs(f).max()):
            return f
    raise InputError(f"reg: got {reg:g}, at which self-transport did not converge, want more")


# ── What may be asked ────────────────────────────────────────────────────────────────────────────


def check_mixtures(p: ArrayLike, m: int, argument: str = "p") -> Array:
    """Mixtures (m,) or (g, m) on the simplex, tolerated to 1e-6 and then put exactly on it.

    >>> check_mixtures([0.5, 0.6], 2)
    Traceback (most recent call last):
    scoredraw.errors.InputError: p: got shares that sum to 1.1, want 1 (to 1e-06)
    """
    P = np.array(p, dtype=np.float64)
    fits = P.ndim in (1, 2) and P.size > 0 and P.shape[-1] == m
    require(fits, argument, f"shape {P.shape}", f"({m},) or (mixtures, {m})")
    require(bool(np.isfinite(P).all()), argument, "NaN or infinity", "finite shares")
    require(bool((P >= -SIMPLEX_TOLERANCE).all()), argument, f"a share of {P.min():g}", "none < 0")
    sums = P.sum(axis=-1)
    worst = float(sums.flat[np.abs(sums - 1).argmax()])
    close = abs(worst - 1) <= SIMPLEX_TOLERANCE
    wanted = f"1 (to {SIMPLEX_TOLERANCE:g})"
    require(close, argument, f"shares that sum to {worst:g}", wanted)
    P = np.maximum(P, 0.0)
    normal: Array = P / P.sum(axis=-1, keepdims=True)
    return normal


def _source_sizes(source_sizes: ArrayLike, n: int) -> Int:
    sizes = np.asarray(source_sizes)
    whole = sizes.ndim == 1 and len(sizes) > 0 and sizes.dtype.kind in "iu"
    require(whole, "source_sizes", f"{sizes.dtype} {sizes.shape}", "whole numbers (m,)")
    empty = np.flatnonzero(sizes < 1)
    came = f"no rows of source {empty[0]}" if len(empty) else ""
    require(not len(empty), "source_sizes", came, "at least one row of each")
    require(int(sizes.sum()) == n, "source_sizes", f"a sum of {sizes.sum()}", f"{n}, the rows")
    return sizes.astype(np.int64)


def _square(cost: ArrayLike, n: int) -> Array:
    square = np.asarray(cost, dtype=np.float64)
    fits = square.shape == (n, n) and bool(np.isfinite(square).all())
    require(fits, "self_costs", f"shape {square.shape}", f"finite costs ({n}, {n})")
    return square
