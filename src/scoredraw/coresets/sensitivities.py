"""How much one row can matter: exact lp sensitivities.

The sensitivity of row i is the largest share of ‖Ax‖_p^p that the row can take,

    σ_i = max_x |⟨a_i, x⟩|^p / ‖Ax‖_p^p = 1 / min {‖Ax‖_p^p : ⟨a_i, x⟩ = 1},

one convex programme a row, with the dual  σ_i^{1/p} = min {‖z‖_q : Aᵀz = a_i},  1/p + 1/q = 1. σ
is the same for A and AT (T invertible), so everything happens in an orthonormal basis U of the
columns of A. The programmes of many rows are solved at once by Newton's method (their Hessians
are one matrix product), and every value comes with a certificate: the primal point and a feasible
dual point made from it bound σ_i from both sides. For p = 1 the certificate is a vertex of the
linear programme, degenerate or not; rows where both guesses fail go to HiGHS, one dual each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.arrays import is_tensor
from scoredraw.coresets.leverage import (
    leverage_scores,
    materialise,
    whitening,
)
from scoredraw.errors import require
from scoredraw.execution import as_blocks, single_threads
from scoredraw.uniforms import Rng

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

METHODS = ("exact", "sampled", "block", "upper", "lower")
GAP = 1e-10  # a row is finished when its duality gap, relative, is below
WARN_GAP = 1e-6  # and reported when its gap is still above after MAX_STEPS
LP_GAP = 1e-8  # p = 1: rows with a larger gap after LP_STEPS go to the linear programme
MAX_STEPS = 100
LP_STEPS = 45
FACE_CUTS = (1e-6, 1e-4)  # residuals taken for zero at a degenerate vertex, in parts of their mean
SHRINK = 0.4  # of the smoothing width, a step
BATCH_CELLS = 1 << 20  # rows solved at once times rows of the objective
BATCH_ROWS = 128  # at most so many at once: often enough to report, and to share among workers
PRODUCT_CELLS = 1 << 25  # outer products u_j u_jᵀ kept in memory; beyond, they are made again


def lp_sensitivities(
    A: Any,
    p: float,
    *,
    method: str = "exact",
    rows: Any = None,
    rng: Rng = None,
    workers: int | None = None,
    solver: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Float:
    """lp sensitivities σ_i = max_x |⟨a_i, x⟩|^p / ‖Ax‖_p^p of the rows of A.

    A: (n, d) dense, CSR, blocks of a table, or a torch tensor (`tensor_sensitivities`); p in
    [1, ∞], where p = ∞ means max_x |⟨a_i, x⟩| / ‖Ax‖_∞. rows: positions of the rows wanted (all).
    workers: threads (all cores). solver: "newton", "lp" (p = 1 and p = ∞, HiGHS on the dual), or
    "auto". progress(done, all) is called as rows are solved. method: "exact", or, for p < ∞, in
    falling cost "sampled" (`approximate_sensitivities`), "block" (`block_sensitivities`), "upper"
    or "lower" (`sensitivity_upper_bounds`, `_lower_bounds`), seeded by rng; `options` are theirs.
    -> float64 (n,) or (len(rows),), in [0, 1]; a zero row has 0, p = 2 gives leverage scores.

    Equal rows are merged and solved once. Each exact value is certified by a dual point to 1e-10
    relative where round-off lets it (1e-8 for p = 1); a ConvergenceWarning states the largest gap
    if one exceeds 1e-6.
    Raises InputError for p < 1, NaN or infinite entries, positions outside the matrix, or a method
    or option that is none. Warns (RankWarning) if A is rank deficient.

    Time O(n² d² · 10 to 60 steps), memory O(n d + 2^20) numbers a worker.
    Woodruff and Yasuda 2023 (arXiv 2306.00732).

    >>> import numpy as np
    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])  # a triangle graph, one vertex dropped
    >>> lp_sensitivities(A, 1).round(12).tolist()
    [0.5, 0.5, 0.5]
    """
    require(p >= 1, "p", p, "p >= 1")
    require(method in METHODS, "method", repr(method), f"one of {', '.join(METHODS)}")
    if is_tensor(A) and method == "exact":
        from scoredraw.coresets import tensor_sensitivities

        return tensor_sensitivities.lp_sensitivities(A, p, rows=rows)
    if method != "exact":
        from scoredraw.coresets.approximate import by_method

        given = {"rng": rng, "workers": workers, "progress": progress, **options}
        return by_method(method, A, p, rows, given)
    require(not options, "options", ", ".join(options), "none for method='exact'")
    require(solver in ("auto", "newton", "lp"), "solver", repr(solver), "auto, newton or lp")
    linear = p in (1, np.inf)
    require(solver != "lp" or linear, "solver", f"lp with p = {p}", "lp only for p = 1 or infinity")
    require(solver != "newton" or p < np.inf, "solver", "newton with p = inf", "lp or auto")
    blocks = as_blocks(A)
    wanted = positions(rows, blocks.n)
    if p == 2:
        return leverage_scores(blocks)[wanted]
    merged, group, counts = merge_equal_rows(materialise(blocks), p)
    if not len(counts):
        return np.zeros(len(wanted))
    basis = orthonormal_basis(merged)
    targets = np.unique(group[wanted])
    targets = targets[targets >= 0]
    value = np.zeros(len(counts) + 1)  # the last entry is for zero rows, whose group is -1
    solved = solve_programmes(basis, basis[targets], p, workers, solver, progress)
    value[targets] = solved / (counts[targets] if p < np.inf else 1.0)
    return np.minimum(value, 1.0)[group[wanted]]


def merge_equal_rows(matrix: Any, p: float) -> tuple[Any, Int, Float]:
    """The distinct nonzero rows, scaled by m^{1/p} for m copies; each row's group; the counts m.

    The scaled rows have the lp norms of the whole, and m times the sensitivity of a copy. A zero
    row is in group -1. CSR rows are told apart by two random sums, dense rows by their bytes.
    """
    if isinstance(matrix, np.ndarray):
        key = matrix + 0.0  # -0.0 + 0.0 is 0.0
        zero = np.asarray(~matrix.any(axis=1))
    else:
        matrix.eliminate_zeros()
        matrix.sort_indices()
        key = matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], 2))
        zero = np.diff(matrix.indptr) == 0
    _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
    keep = ~zero[first]
    place = np.where(keep, np.cumsum(keep) - 1, -1)
    group = place[group.ravel()]
    rows, counts = first[keep], np.bincount(group[group >= 0], minlength=int(keep.sum()))
    scale = counts ** (1 / p)
    if isinstance(matrix, np.ndarray):
        return matrix[rows] * scale[:, None], group, counts.astype(np.float64)
    from scipy.sparse import diags_array

    return (diags_array(scale) @ matrix[rows]).tocsr(), group, counts.astype(np.float64)


def orthonormal_basis(matrix: Any) -> Float:
    """An orthonormal basis of the columns (n, rank), orthogonal to round-off; zero rows stay so."""
    columns = np.asarray(matrix @ whitening(matrix).factor)
    return np.asarray(np.linalg.qr(columns)[0] * np.any(columns, axis=1, keepdims=True))


def positions(rows: Any, n: int) -> Int:
    if rows is None:
        return np.arange(n)
    wanted = np.atleast_1d(np.asarray(rows))
    require(wanted.ndim == 1 and wanted.dtype.kind in "iu", "rows", rows, "integer positions")
    inside = wanted.size == 0 or (wanted.min() >= 0 and wanted.max() < n)
    require(bool(inside), "rows", "a position outside the matrix", f"0 <= row < {n}")
    return wanted.astype(np.int64)


def solve_programmes(
    basis: Float,
    targets: Float,
    p: float,
    workers: int | None = None,
    solver: str = "auto",
    progress: Progress | None = None,
) -> Float:
    """1 / min {‖Uy‖_p^p : ⟨t, y⟩ = 1} for every row t of `targets`; U has full column rank."""
    count = len(targets)
    sigma, gap = np.empty(count), np.full(count, np.inf)
    linear = p in (1, np.inf) and solver != "newton"  # HiGHS for what Newton leaves

    def report(solved: int) -> None:
        if progress is not None:
            progress(solved, count)

    if solver != "lp" and p < np.inf:
        newton = _newton_smoothed if p < 2 else _newton_power
        grams = WeightedGrams(basis)
        batch = int(np.clip(BATCH_CELLS // len(basis), 16, BATCH_ROWS))
        parts = [slice(i, i + batch) for i in range(0, count, batch)]
        with single_threads(workers) as pool:
            batches = pool.map(lambda s: newton(basis, grams, targets[s], p), parts)
            for part, found in zip(parts, batches, strict=True):
                sigma[part], gap[part] = found
                report(int((gap <= LP_GAP).sum()) if linear else min(part.stop, count))
    if linear:
        left = np.flatnonzero(gap > LP_GAP)
        with single_threads(workers) as pool:
            solved = pool.map(lambda i: _dual(basis, targets[i], p), left)
            for i, value in zip(left, solved, strict=True):
                sigma[i], gap[i] = value, 0.0
                report(int((gap <= LP_GAP).sum()))
    if (worst := gap.max(initial=0.0)) > WARN_GAP:
        from sklearn.exceptions import ConvergenceWarning

        bad = f"{(gap > WARN_GAP).sum()} rows"
        text = f"lp_sensitivities: {bad} with a relative duality gap up to {worst:.1e}"
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
    return sigma


class WeightedGrams:
    """Uᵀ diag(w_b) U for many weight vectors w_b at once, as one matrix product.

    Row j's outer product, upper triangle only, is a row of an (n, r(r+1)/2) matrix, which a batch
    of weights (B, n) multiplies. Kept while it fits PRODUCT_CELLS, made chunk by chunk otherwise.
    """

    def __init__(self, basis: Float) -> None:
        self.basis = basis
        self.rank = basis.shape[1]
        self.upper = np.triu_indices(self.rank)
        width = len(self.upper[0])
        self.step = max(1, min(len(basis), (PRODUCT_CELLS // 16) // width))
        self.kept = list(self._products()) if len(basis) * width <= PRODUCT_CELLS else None

    def _products(self) -> Iterator[tuple[slice, Float]]:
        a, b = self.upper
        for start in range(0, len(self.basis), self.step):
            part = self.basis[start : start + self.step]
            yield slice(start, start + self.step), part[:, a] * part[:, b]

    def __call__(self, weights: Float) -> Float:
        packed = np.zeros((len(weights), len(self.upper[0])))
        for rows, products in self.kept if self.kept is not None else self._products():
            packed += weights[:, rows] @ products
        full = np.empty((len(weights), self.rank, self.rank))
        a, b = self.upper
        full[:, a, b] = packed
        full[:, b, a] = packed
        return full


def _regularised(hessian: Float, targets: Float) -> Float:
    """H + ρ ttᵀ + tiny I: steps with ⟨t, δ⟩ = 0 don't change, and H is invertible at a vertex."""
    r = hessian.shape[1]
    trace = np.trace(hessian, axis1=1, axis2=2)
    pull = trace / (targets * targets).sum(1)
    hessian += pull[:, None, None] * targets[:, :, None] * targets[:, None, :]
    hessian[:, range(r), range(r)] += (1e-15 * trace + 1e-300)[:, None]
    return hessian


def _backtrack(
    merit: Callable[[Float], Float], residual: Float, change: Float, slope: Float
) -> Float:
    """Step lengths t = 1, 1/2, 1/4, ... with merit(r + t Δr) ≤ merit(r) + 1e-4 t slope."""
    start = merit(residual)
    t = np.ones(len(residual))
    for _ in range(30):
        reached = merit(residual + t[:, None] * change)
        bad = ~(reached <= start + 1e-4 * t * slope + 1e-15 * start)
        if not bad.any():
            break
        t[bad] *= 0.5
    return t


def _duality_gap(
    basis: Float, targets: Float, residual: Float, dual: Float, p: float
) -> tuple[Float, Float]:
    """log ‖r‖_p^p and its relative distance to the bound by a dual point made feasible.

    Any z with Uᵀz = c t gives ‖Uy‖_p ≥ c/‖z‖_q for all y with ⟨t, y⟩ = 1; z is projected to one.
    """
    image = dual @ basis
    c = (image * targets).sum(1) / (targets * targets).sum(1)
    dual = dual - (image - c[:, None] * targets) @ basis.T
    value = p * _log_norm(residual, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = p * (np.log(np.maximum(c, 0)) - _log_norm(dual, p / (p - 1) if p > 1 else np.inf))
    gap = np.abs(np.expm1(np.minimum(value - bound, 700.0)))
    return value, np.where(np.isnan(gap), np.inf, gap)


def power(x: Float, exponent: float) -> Float:
    """x ** exponent for x > 0, without NumPy's pow where a cheaper function does."""
    cheap: dict[float, Any] = {
        -1.0: np.reciprocal,
        0.0: np.ones_like,
        0.5: np.sqrt,
        1.0: np.copy,
        2.0: np.square,
    }
    function = cheap.get(exponent)
    return np.asarray(x**exponent if function is None else function(x))


def _log_norm(vectors: Float, p: float) -> Float:
    top = np.abs(vectors).max(1)
    if p == np.inf:
        return np.asarray(np.log(top))
    ratio = np.abs(vectors) / np.where(top > 0, top, 1.0)[:, None]
    log_norm: Float = np.log(top) + np.log((ratio**p).sum(1)) / p
    return log_norm


class _Unfinished:
    """The rows of a batch still at work, and the best value and gap of every row so far."""

    def __init__(self, count: int, enough: float) -> None:
        self.enough = enough
        self.live = np.arange(count)
        self.log_value = np.full(count, np.inf)
        self.gap = np.full(count, np.inf)

    def record(self, log_value: Float, gap: Float) -> npt.NDArray[np.bool_]:
        """Keep what is better; the mask of the rows to go on with."""
        better = gap < self.gap[self.live]
        rows = self.live[better]
        self.log_value[rows], self.gap[rows] = log_value[better], gap[better]
        unknown = ~np.isfinite(self.gap[self.live])
        self.log_value[self.live[unknown]] = np.minimum(
            self.log_value[self.live[unknown]], log_value[unknown]
        )
        go_on = self.gap[self.live] > self.enough
        self.live = self.live[go_on]
        return go_on

    def result(self) -> tuple[Float, Float]:
        return np.exp(-self.log_value), self.gap


def _newton_power(
    basis: Float, grams: WeightedGrams, targets: Float, p: float
) -> tuple[Float, Float]:
    """p > 2: damped Newton from the least squares solution, through exponents 2, 3, 4.5, ... p.

    With H = Uᵀ diag|r|^{q-2} U the Newton step for Σ|r|^q on ⟨t, y⟩ = 1 is
    (H⁻¹t / ⟨t, H⁻¹t⟩ - y) / (q - 1): reweighted least squares, shortened.
    """
    t = targets
    y = t / (t * t).sum(1)[:, None]
    work = _Unfinished(len(t), GAP)
    exponents = []
    q = 2.0
    while (q := 1.5 * q) < p:
        exponents += [q] * 3
    for q in exponents + [p] * MAX_STEPS:
        residual = y @ basis.T
        top = np.abs(residual).max(1)[:, None]
        ratio = np.abs(residual) / top
        if q == p:
            dual = np.sign(residual) * ratio ** (p - 1)
            go_on = work.record(*_duality_gap(basis, t, residual, dual, p))
            y, t, residual, ratio, top = (v[go_on] for v in (y, t, residual, ratio, top))
            if not len(t):
                break
        hessian = _regularised(grams(ratio ** (q - 2)), t)
        direction = np.linalg.solve(hessian, t[:, :, None])[:, :, 0]
        step = (direction / (t * direction).sum(1)[:, None] - y) / (q - 1)
        change = step @ basis.T / top
        signed = residual / top
        slope = q * (np.sign(signed) * ratio ** (q - 1) * change).sum(1)

        def merit(r: Float, q: float = q) -> Float:
            return np.asarray((np.abs(r) ** q).sum(1))

        length = _backtrack(merit, signed, change, slope)
        y = y + length[:, None] * step
    return work.result()


def _newton_smoothed(
    basis: Float, grams: WeightedGrams, targets: Float, p: float
) -> tuple[Float, Float]:
    """1 ≤ p < 2: primal-dual Newton on Σ(r² + e²)^{p/2} while e falls.

    The dual z = rθ^{p-2}, θ² = r² + e², is a variable of its own and the curvature uses it,
    h = θ^{p-2}(1 - (2-p) z r θ^{-p}), which keeps the steps long when e is small (Chan, Golub and
    Mulet 1999). For p = 1 every step guesses the vertex and tests it.
    """
    t = targets
    y = t / (t * t).sum(1)[:, None]
    residual = y @ basis.T
    width = 0.3 * np.abs(residual).mean(1)[:, None]
    smallest = (1e-8 if p == 1 else 1e-11) * width
    theta = np.sqrt(residual**2 + width**2)
    dual = residual * power(theta, p - 2)
    work = _Unfinished(len(t), LP_GAP if p == 1 else GAP)
    for _ in range(MAX_STEPS if p > 1 else LP_STEPS):
        weight = power(theta, p - 2)
        bend = np.minimum(dual * residual * power(theta, -p), 1.0)
        curvature = np.maximum(weight * (1 - (2 - p) * bend), 1e-12 * weight)
        gradient = (weight * residual) @ basis
        hessian = _regularised(grams(curvature), t)
        solved = np.linalg.solve(hessian, np.stack([t, gradient], axis=2))
        along, down = solved[:, :, 0], solved[:, :, 1]
        multiplier = (t * down).sum(1) / (t * along).sum(1)
        step = multiplier[:, None] * along - down
        change = step @ basis.T
        decrement = -(gradient * step).sum(1)

        def merit(r: Float, e: Float = width) -> Float:
            return np.asarray(power(r * r + e * e, p / 2).sum(1))

        length = _backtrack(merit, residual, change, -p * decrement)[:, None]
        y = y + length * step
        residual = y @ basis.T
        before = residual - length * change
        free_dual = dual + length * (curvature * change + weight * before - dual)
        value, gap = _duality_gap(basis, t, residual, free_dual, p)
        if p == 1:
            at_vertex, vertex_gap = _vertex(basis, t, residual)
            value, gap = np.where(vertex_gap < gap, (at_vertex, vertex_gap), (value, gap))
        go_on = work.record(value, gap)
        settled = decrement[:, None] * p < 1e-2 * merit(residual)[:, None]
        width = np.where(settled, np.maximum(SHRINK * width, smallest), width)
        y, t, residual, width, smallest, free_dual = (
            v[go_on] for v in (y, t, residual, width, smallest, free_dual)
        )
        if not len(t):
            break
        theta = np.sqrt(residual**2 + width**2)
        limit = power(theta, p - 1)
        dual = np.clip(free_dual, -limit, limit)
    if p == 1 and len(t):
        for cut in FACE_CUTS:
            ends = [_face(basis, *one, cut) for one in zip(t, y, free_dual, strict=True)]
            value, gap = np.array(ends).T
            go_on = work.record(value, gap)
            t, y, free_dual = t[go_on], y[go_on], free_dual[go_on]
            if not len(t):
                break
    return work.result()


def _face(basis: Float, target: Float, y: Float, dual: Float, cut: float) -> tuple[float, float]:
    """p = 1, a degenerate vertex (more than r - 1 residuals are zero): log value, duality gap.

    y is projected onto the x that keep the residuals below the cut at zero; the dual is sign(r) on
    the other rows, and on these what the smoothed dual was, with the least change that gives
    Uᵀz = t ‖Uy‖_1. Where many duals are optimal the smoothed one lies inside, and stays there.
    """
    residual = basis @ y
    size = np.abs(residual)
    zero = size <= cut * size.mean()
    near = basis[zero]
    values, vectors = np.linalg.eigh(near.T @ near)
    there = values > 1e-12 * max(values[-1], 1e-300)
    kernel = vectors[:, ~there]
    y = kernel @ (kernel.T @ y)
    along = float(y @ target)
    if not along > 0:
        return np.inf, np.inf
    residual = basis @ (y / along)
    z = np.where(zero, np.clip(dual, -1.0, 1.0), np.sign(residual))
    missing = np.abs(residual).sum() * target - z @ basis
    span = vectors[:, there]
    z[zero] += near @ (span @ ((span.T @ missing) / values[there]))
    value, gap = _duality_gap(basis, target[None], residual[None], z[None], 1)
    return float(value[0]), float(gap[0])


def _vertex(basis: Float, targets: Float, residual: Float) -> tuple[Float, Float]:
    """p = 1: the vertex with the r - 1 smallest residuals at zero, and its duality gap.

    y solves u_j·y = 0 for those rows and t·y = 1. The dual is sign(r) on the others and solves
    Uᵀz = c t on them: optimal if no |z| exceeds one, and then σ = 1/c to round-off.
    """
    count, r = targets.shape
    lines = np.arange(count)[:, None]
    zero = np.argpartition(np.abs(residual), min(r, residual.shape[1] - 1), axis=1)[:, : r - 1]
    system = np.concatenate([basis[zero], targets[:, None, :]], axis=1)
    usable = np.isfinite(np.linalg.slogdet(system)[1])
    system[~usable] = np.eye(r)
    inverse = np.linalg.inv(system)
    at = inverse[:, :, -1] @ basis.T
    value = np.abs(at).sum(1)
    signs = np.sign(at)
    signs[lines, zero] = 0.0
    z = -((signs @ basis)[:, None, :] @ inverse)[:, 0, :]
    excess = np.maximum(np.abs(z[:, :-1]).max(1, initial=0.0), 1.0)
    gap = np.abs(value * excess / np.maximum(-z[:, -1], 1e-300) - 1)
    return np.log(value), np.where(usable & (excess < 1 + 1e-9), gap, np.inf)


def _dual(basis: Float, target: Float, p: float) -> float:
    """p = 1: σ = 1/c, the largest c with Uᵀz = c t, |z| ≤ 1. p = ∞: σ = min ‖z‖_1, Uᵀz = t."""
    from scipy.optimize import linprog

    n, r = basis.shape
    scale = np.abs(target).max()  # so that both sides of the equations are near one
    if p == 1:
        cost, wanted = np.append(np.zeros(n), -1.0), np.zeros(r)
        equations = np.column_stack([basis.T, -target / scale])
        bounds = np.tile([-1.0, 1.0], (n + 1, 1))
        bounds[-1] = 0.0, np.inf
    else:
        cost, wanted = np.ones(2 * n), target / scale
        equations = np.column_stack([basis.T, -basis.T])  # z = z⁺ - z⁻
        bounds = np.tile([0.0, np.inf], (2 * n, 1))
    done = linprog(cost, A_eq=equations, b_eq=wanted, bounds=bounds, method="highs")
    require(done.success, "A", f"a linear programme HiGHS left ({done.message})", "a solvable one")
    return float(scale / done.x[-1] if p == 1 else done.fun * scale)
