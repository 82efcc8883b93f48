"""Scores made of scores: root leverage, sums, and split rows.

Sampling by lp sensitivities alone needs about 𝔖^{2/p} rows for some matrices (p < 2) although all
of lp fits in d directions; leverage sees the directions. Their combinations need fewer rows, and
for p < 2 a power of the leverage alone, recomputed on what is left, needs about d. Beside them
stand the inequalities between sensitivities, Lewis weights and leverage, which turn a cheap score
into a certified bound of a costly one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scoredraw.coresets.certified import lewis_certificate
from scoredraw.coresets.leverage import leverage_scores, materialise, take_rows
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.execution import Engine, as_blocks
from scoredraw.sampling import calibrate_inclusion
from scoredraw.uniforms import Rng, RowUniforms

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

SOURCES = ("best", "lewis", "leverage")
SIZES = ("sensitivity", "root_leverage", "sensitivity_plus_leverage", "split", "lewis", "generic")


def root_leverage_scores(A: Any, p: float, *, engine: Engine | None = None) -> Float:
    """τ_i^{p/2}: an upper bound of the lp sensitivity for p ≤ 2, at the price of leverage.

    A: (n, d) as in `leverage_scores`; 1 ≤ p < ∞ (for p > 2 it bounds from below). -> float64 (n,).
    Woodruff and Yasuda 2023 (arXiv 2306.00732).

    >>> import numpy as np
    >>> root_leverage_scores(np.array([[3.0], [4.0]]), 1).round(12).tolist()
    [0.6, 0.8]
    """
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    return leverage_scores(A, engine=engine) ** (p / 2)


def root_leverage(
    A: Any,
    p: float,
    size: float,
    *,
    rounds: int = 3,
    rng: Rng = None,
    engine: Engine | None = None,
) -> Draw:
    """Recursive root-leverage sampling: draw by τ^{p/2}, reweight, recompute τ, draw again.

    Round r keeps rows independently with q ∝ τ^{p/2}, τ the leverage of the kept rows scaled by
    their weights W^{1/p}, and an expected n^{1-r/rounds} size^{r/rounds} rows; W is the product of
    1/q over the rounds. One round keeps about n^{1-p/2} d^{p/2}/ε² rows; repeated on what is left
    the count falls to d (up to logarithms and powers of 1/ε) in O(log log n) rounds.

    A: (n, d) dense, CSR or blocks of a table; 1 ≤ p < 2; size: expected rows. -> `Draw`, unbiased;
    `inclusion` is given the earlier rounds. All rows, weight one, if `size` reaches the nonzero
    ones. Raises InputError for p outside [1, 2) or size ≤ 0.

    Row-local given the leverages: round r uses each row's uniform of round r. Time O(n d²) for the
    first round and less for the others, memory O(n). Woodruff and Yasuda 2023 (arXiv 2306.00732).

    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((500, 3))
    >>> draw = root_leverage(A, 1, 50, rng=0)
    >>> 20 < len(draw) < 90
    True
    """
    require(1 <= p < 2, "p", p, "1 <= p < 2 (sensitivities, Lewis weights or split scores beyond)")
    require(rounds >= 1, "rounds", rounds, "at least 1")
    require(np.isfinite(size) and size > 0, "size", size, "a positive number")
    blocks = as_blocks(A)
    uniforms = RowUniforms(rng)
    scores = leverage_scores(blocks, engine=engine) ** (p / 2)
    kept = np.flatnonzero(scores)
    scores, weights, count = scores[kept], np.ones(len(kept)), len(kept)
    last = scores
    for r in range(1, rounds + 1):
        target = count * (size / count) ** (r / rounds)
        if target >= len(kept):
            continue
        q, _ = calibrate_inclusion(scores, target)
        chosen = uniforms.at(kept, stream="root_leverage", round=r) < q
        kept, weights, last = kept[chosen], weights[chosen] / q[chosen], scores[chosen]
        if r == rounds or not len(kept):
            break
        scaled = _scale_rows(take_rows(blocks, kept, engine), weights ** (1 / p))
        scores = leverage_scores(scaled, engine=engine) ** (p / 2)
    info = {"design": "independent", "rounds": rounds}
    method = f"root_leverage(p={p:g})"
    return Draw(kept, weights, blocks.n, 1 / weights, True, last, method=method, info=info)


def sensitivity_plus_leverage(A: Any, p: float, *, workers: int | None = None) -> Float:
    """σ_i + τ_i: lp sensitivities with the leverages added, for 1 ≤ p ≤ 2.

    About (𝔖 + d)/ε² rows are enough with these, where sensitivities alone need d^{1-p/2} 𝔖/ε².
    -> float64 (n,). Raises InputError for p outside [1, 2].
    Munteanu and Omlor 2024 (arXiv 2406.00328).

    >>> import numpy as np
    >>> sensitivity_plus_leverage(np.eye(2), 1).tolist()
    [2.0, 2.0]
    """
    require(1 <= p <= 2, "p", p, "1 <= p <= 2 (split_scores for p > 2)")
    return lp_sensitivities(A, p, workers=workers) + leverage_scores(A)


class SplitRows(NamedTuple):
    """The scores, the number of virtual copies, the leverage of each row's copies; (n,) each."""

    scores: Float
    copies: Int
    leverage: Float


def split_scores(
    A: Any,
    p: float,
    size: int,
    *,
    sensitivities: Any = None,
    workers: int | None = None,
    engine: Engine | None = None,
) -> Float:
    """Sensitivity and flattened leverage, for p > 2: s_i = σ_i/𝔖 + τ'_i/d; `split_rows` says how.

    -> float64 (n,), summing to two. Raises InputError for p ≤ 2.

    >>> import numpy as np
    >>> split_scores(np.eye(3), 4, 3).round(12).tolist()
    [0.666666666667, 0.666666666667, 0.666666666667]
    """
    return split_rows(
        A, p, size, sensitivities=sensitivities, workers=workers, engine=engine
    ).scores


def split_rows(
    A: Any,
    p: float,
    size: int,
    *,
    sensitivities: Any = None,
    workers: int | None = None,
    engine: Engine | None = None,
) -> SplitRows:
    """Rows split until none is sensitive, for p > 2, and the scores s_i = σ_i/𝔖 + τ'_i/d.

    Row i stands for k_i = ⌈σ_i size/𝔖⌉ copies scaled by k_i^{-1/p}, which leaves ‖Ax‖_p as it is
    for every x and each copy with a sensitivity of at most 𝔖/size. τ'_i = k_i^{1-2/p} a_iᵀG'⁻¹a_i,
    G' = Σ k_i^{1-2/p} a_i a_iᵀ, is the leverage of its copies together. They are never made.

    A: (n, d) as in `lp_sensitivities`; 2 < p < ∞; size: the rows to be drawn; sensitivities: (n,)
    if already known, or upper bounds of them. -> `SplitRows`; τ' sums to the rank, s to two.
    Raises InputError for p ≤ 2. The count d^{2/p} 𝔖^{2-4/p}/ε² is that of Woodruff and Yasuda 2023
    (arXiv 2306.00732); this way of combining the two scores is ours and not proved to reach it.

    >>> import numpy as np
    >>> split_rows(np.eye(3), 4, 6).copies.tolist()
    [2, 2, 2]
    """
    require(
        2 < p < np.inf,
        "p",
        p,
        "2 < p < infinity (sensitivity_plus_leverage or root_leverage for p <= 2)",
    )
    require(size >= 1, "size", size, "at least 1")
    blocks = as_blocks(A)
    if sensitivities is None:
        sigma = lp_sensitivities(blocks, p, workers=workers)
    else:
        sigma = np.asarray(sensitivities, np.float64)
        require(sigma.shape == (blocks.n,), "sensitivities", sigma.shape, f"({blocks.n},)")
    total = float(sigma.sum())
    require(total > 0, "A", "only zero rows", "at least one nonzero row")
    copies = split_copies(sigma, total / size)
    split = _scale_rows(materialise(blocks, engine), copies ** (0.5 - 1 / p))
    tau = leverage_scores(split, engine=engine)
    return SplitRows(sigma / total + tau / tau.sum(), copies, tau)


def split_copies(scores: Any, alpha: float) -> Int:
    """k_i = max(1, ⌈s_i/α⌉): copies of a row, scaled by k_i^{-1/p}, with scores of at most α each.

    >>> split_copies([0.1, 0.5, 1.0], 0.25).tolist()
    [1, 2, 4]
    """
    require(alpha > 0, "alpha", alpha, "a positive number")
    ratio = np.asarray(scores, np.float64) / alpha
    return np.maximum(np.ceil(ratio * (1 - 1e-12)), 1).astype(np.int64)


def sample_size(method: str, p: float, eps: float, total_sensitivity: float, d: int) -> int:
    """Rows that a score needs for a relative error eps in every ‖Ax‖_p^p, up to constants and logs.

    The order of the published bounds with all constants set to one and logarithms left out: it
    tells how the need grows with eps, d and 𝔖, and certifies nothing. method: "sensitivity",
    "root_leverage" (1 ≤ p < 2), "sensitivity_plus_leverage" (1 ≤ p ≤ 2), "split" (p > 2), "lewis"
    or "generic". Raises InputError where a method does not serve that p.

    Woodruff and Yasuda 2023 (arXiv 2306.00732); Munteanu and Omlor 2024
    (arXiv 2406.00328); Cohen and Peng 2015 (arXiv 1412.0588); "generic": 𝔖 d/ε².

    >>> sample_size("lewis", 1, 0.5, 3.0, 10), sample_size("generic", 1, 0.5, 3.0, 10)
    (40, 120)
    """
    require(method in SIZES, "method", repr(method), f"one of {', '.join(SIZES)}")
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    require(0 < eps < 1, "eps", eps, "0 < eps < 1")
    require(total_sensitivity > 0, "total_sensitivity", total_sensitivity, "a positive number")
    require(d >= 1, "d", d, "at least 1")
    require(method != "root_leverage" or p < 2, "p", p, "p < 2 for root_leverage")
    require(method != "sensitivity_plus_leverage" or p <= 2, "p", p, f"p <= 2 for {method}")
    require(method != "split" or p > 2, "p", p, "p > 2 for split")
    total = total_sensitivity
    rows = {
        "sensitivity": total ** (2 / p) if p <= 2 else total ** (2 - 2 / p),
        "root_leverage": d * eps ** (2 - 4 / p),
        "sensitivity_plus_leverage": total + d,
        "split": d ** (2 / p) * total ** (2 - 4 / p),
        "lewis": d ** max(1.0, p / 2),
        "generic": total * d,
    }[method]
    return max(1, int(np.ceil(rows / eps**2 * (1 - 1e-12))))


# ------------------------------------------------------------------ inequalities


def lewis_bounds(weights: Any, p: float, rank: int) -> tuple[Float, Float]:
    """Bounds of the sensitivities by Lewis weights w: between w and d^{|1-p/2|} w, by p.

    p ≤ 2: d^{p/2-1} w ≤ σ ≤ w;  p ≥ 2: w ≤ σ ≤ min(1, d^{p/2-1} w).  -> (lower, upper), (n,) each.

    >>> low, high = lewis_bounds([0.5], 1, 4)
    >>> low.tolist(), high.tolist()
    ([0.25], [0.5])
    """
    w = np.asarray(weights, np.float64)
    other = np.minimum(1.0, max(rank, 1) ** (p / 2 - 1) * w)
    return (other, w) if p <= 2 else (w, other)


def leverage_bounds(leverage: Any, p: float, n: int | None = None) -> tuple[Float, Float]:
    """Bounds of the sensitivities by leverage τ: between τ^{p/2} and n^{p/2-1} τ^{p/2}, by p.

    n: the number of nonzero rows (that of `leverage` by default). -> (lower, upper), (n,) each.

    >>> low, high = leverage_bounds([0.25, 0.25, 0.25, 0.25], 1)
    >>> low.tolist(), high.tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5])
    """
    tau = np.asarray(leverage, np.float64)
    count = max(int(np.count_nonzero(tau)), 1) if n is None else n
    root = tau ** (p / 2)
    other = np.minimum(1.0, np.exp((p / 2 - 1) * np.log(count)) * root)
    return (other, root) if p <= 2 else (root, other)


def total_bounds(p: float, rank: int) -> tuple[float, float]:
    """Bounds of 𝔖 = Σσ_i: from d^{p/2} to d for p ≤ 2, from d to d^{p/2} for p ≥ 2.

    >>> total_bounds(1, 9)
    (3.0, 9.0)
    """
    ends = sorted((float(rank), float(rank ** (p / 2))))
    return ends[0], ends[1]


def sensitivity_upper_bounds(
    A: Any, p: float, *, source: str = "best", engine: Engine | None = None
) -> Float:
    """Upper bounds of the lp sensitivities: cheap, and never too small.

    source="lewis": w_i for p ≤ 2 and min(1, d^{p/2-1} w_i) for p ≥ 2; "leverage": τ_i^{p/2} and
    min(1, n^{p/2-1} τ_i^{p/2}), n the nonzero rows; "best": the smaller, row by row.
    A: (n, d) dense, CSR or blocks; 1 ≤ p < ∞. -> float64 (n,). Where the weights' iteration has
    not converged (it warns), their own certified bounds are used. Raises InputError.
    Time that of the weights. Cohen and Peng 2015 (arXiv 1412.0588).

    >>> import numpy as np
    >>> sensitivity_upper_bounds(np.eye(3), 4).round(9).tolist()
    [1.0, 1.0, 1.0]
    """
    return _bounds(A, p, source, engine)[1]


def sensitivity_lower_bounds(
    A: Any, p: float, *, source: str = "best", engine: Engine | None = None
) -> Float:
    """Lower bounds of the lp sensitivities: cheap, and never too large.

    source="lewis": d^{p/2-1} w_i for p ≤ 2 and w_i for p ≥ 2; "leverage": n^{p/2-1} τ_i^{p/2} and
    τ_i^{p/2}; "best": the larger, row by row. Otherwise as `sensitivity_upper_bounds`.

    >>> import numpy as np
    >>> sensitivity_lower_bounds(np.array([[3.0], [4.0]]), 1, source="lewis").round(6).tolist()
    [0.428571, 0.571429]
    """
    return _bounds(A, p, source, engine)[0]


def _bounds(A: Any, p: float, source: str, engine: Engine | None) -> tuple[Float, Float]:
    require(1 <= p < np.inf, "p", p, "1 <= p < infinity")
    require(source in SOURCES, "source", repr(source), f"one of {', '.join(SOURCES)}")
    blocks = as_blocks(A)
    found = []
    if source != "leverage":
        weights, info = lewis_weights(blocks, p, return_info=True, engine=engine)
        low, high = weights, weights
        if not info.converged:
            low, high = lewis_certificate(blocks, p, weights)[:2]
        found.append((lewis_bounds(low, p, info.rank)[0], lewis_bounds(high, p, info.rank)[1]))
    if source != "lewis":
        found.append(leverage_bounds(leverage_scores(blocks, engine=engine), p))
    lower = np.max([one[0] for one in found], axis=0)
    return lower, np.min([one[1] for one in found], axis=0)


def _scale_rows(rows: Any, scale: npt.NDArray[Any]) -> Any:
    if isinstance(rows, np.ndarray):
        return rows * scale[:, None]
    from scipy.sparse import diags_array

    return (diags_array(scale) @ rows).tocsr()
