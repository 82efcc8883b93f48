r"""Softmax regression as the cheap model: fitted, and its influence on the risk in closed form.

With logits xW, :math:`p_i=\mathrm{softmax}(x_iW)` and :math:`r_i=p_i-\mathrm{onehot}(y_i)`, the
gradient of an example is the outer product of :math:`x_i` and :math:`r_i`, and the Hessian of the
penalised mean loss acts as

.. math:: HU=\frac1nX^\top\left(P\circ(XU)-P\circ\big((P\circ XU)\,1\,1^\top\big)\right)+cU,

so that nothing larger than the (n, C) logits is formed. See `influence_on_risk`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.influence import Array
from scoredraw.data_selection.influence_on_risk import relative_length, warn_if_vanishing
from scoredraw.data_selection.inverse_hessian import inverse_hessian_product

Index = NDArray[np.int64]


def fit_softmax(x: Array, y: Index, *, penalty: float, steps: int) -> Array:
    r"""Weights (d, C) that `steps` iterations of L-BFGS reach from 0 on the penalised mean loss.

    :math:`\frac1n\sum_i-\log\mathrm{softmax}(x_iW)_{y_i}+\frac c2\lVert W\rVert^2`.
    Few steps stop early; many find the minimiser. Time O(n d C) a step.

    >>> x, y = np.array([[1.0], [-1.0]]), np.array([0, 1])
    >>> fit_softmax(x, y, penalty=0.1, steps=50).round(3).tolist()
    [[1.064, -1.064]]
    """
    from scipy.optimize import minimize

    shape, rows = (x.shape[1], int(y.max()) + 1), np.arange(len(x))

    def objective(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(shape)
        logits = x @ weights
        logits -= logits.max(axis=1, keepdims=True)
        of_label = logits[rows, y]
        p = np.exp(logits, out=logits)  # one array of (n, C): half the time of logsumexp
        total = p.sum(axis=1, keepdims=True)
        loss = np.log(total).mean() - of_label.mean() + penalty / 2 * float(flat @ flat)
        p /= total
        p[rows, y] -= 1.0
        return loss, (x.T @ p / len(x) + penalty * weights).reshape(-1)

    options = {"maxiter": steps, "ftol": 0.0, "gtol": 1e-12}
    start = np.zeros(shape[0] * shape[1])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x.reshape(shape), np.float64)


def softmax_influence(
    x: Array,
    y: Index,
    weights: Array,
    *,
    penalty: float,
    damping: float = 0.0,
    tolerance: float = 1e-6,
) -> tuple[Array, float]:
    r"""`influence_on_risk` of a softmax regression with logits xW, and its mean-gradient ratio.

    :math:`I_i=\frac1n\,x_i\,(H+\delta I)^{-1}[V]\,r_i^\top`, V the data loss's mean gradient.

    x : (n, d), a constant column where an intercept is wanted. y : (n,) in 0..C-1.
    weights : (d, C). penalty : c. Returns (n,) float64, and |v| over mean |g_i|.
    Warns where the latter is below 1e-6, raises
    InputError as `inverse_hvp`. Time O(n d C) an iteration of CG, memory O(n C).

    >>> x, y = np.array([[1.0], [1.0], [-1.0]]), np.array([0, 0, 1])
    >>> scores, ratio = softmax_influence(x, y, np.zeros((1, 2)), penalty=0.1)
    >>> scores.round(3).tolist(), round(ratio, 6)
    ([0.278, 0.278, 0.278], 1.0)
    """
    from scipy.special import softmax

    n = len(x)
    p = softmax(x @ weights, axis=1)
    residual = p.copy()
    residual[np.arange(n), y] -= 1.0
    v = x.T @ residual / n
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(residual, axis=1)

    def product(u: Array) -> Array:
        matrix = u.reshape(weights.shape)
        moved = x @ matrix
        moved *= p
        moved -= p * moved.sum(axis=1, keepdims=True)
        return np.asarray(x.T @ moved / n + penalty * matrix).reshape(-1)

    ratio = relative_length(v, lengths)
    warn_if_vanishing(ratio)
    h = inverse_hessian_product(product, v.reshape(-1), damping=damping, tolerance=tolerance)
    dots = np.einsum("ij,ij->i", x @ h.reshape(weights.shape), residual)
    return dots / n, ratio
