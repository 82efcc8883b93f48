r"""Scores from the gradient of the loss at the weights: GraNd and TracIn.

A step of gradient descent on example z changes the loss of z' by about
:math:`-\eta\,\nabla L(z)\cdot\nabla L(z')`. Summed over checkpoints this is the influence of z
on z' (TracIn); with z' = z it is a weighted sum of squared gradient lengths, and the length alone,
early in training, is GraNd. At a final linear layer the gradient is an outer product, so that
neither lengths nor dot products need it formed. For other layers see `gradients`.

Pruthi, Liu, Sundararajan and Kale, 2020, arXiv:2002.08484; Paul, Ganguli and Dziugaite, 2021,
arXiv:2107.07075; as used by Anand, Tan and Minakova, 2023, arXiv:2311.16298.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from scoredraw.data_selection.influence import (
    Array,
    checkpoints,
    mean_over_runs,
    prediction_errors,
    require_finite,
    to_numpy,
)
from scoredraw.errors import require


def grand(gradient_norms: ArrayLike) -> Array:
    r"""Length of the loss gradient at the weights, averaged over runs (GraNd).

    :math:`\mathrm{GraNd}_i=\frac1R\sum_r\lVert\nabla_w L(w_r;x_i,y_i)\rVert_2`, from the lengths
    that `gradients.squared_gradient_norms` (then a root) or `last_layer_gradient_norms` give.
    Widely copied released code (DeepCore and its descendants) hands softmax outputs to a
    cross-entropy that applies softmax again, which is the gradient of another loss: compute the
    lengths from logits.

    Parameters
    ----------
    gradient_norms : (..., n), non-negative; leading axes are runs.

    Returns
    -------
    (n,) float64. Raises InputError on negative, NaN or infinite lengths. Time O(size).

    Paul, Ganguli and Dziugaite, 2021, arXiv:2107.07075.

    >>> grand([[1.0, 4.0], [3.0, 0.0]]).tolist()
    [2.0, 2.0]
    """
    return mean_over_runs(_lengths("gradient_norms", gradient_norms, least=1))


def tracin_self(squared_norms: ArrayLike, learning_rates: ArrayLike) -> Array:
    r"""Self-influence: how much the steps on an example lower its own loss (TracInCP).

    :math:`\mathrm{TracIn}(z,z)=\sum_k\eta_k\lVert\nabla_w L(w_k,z)\rVert^2` over checkpoints k.
    A constant rate only scales the scores. About ten checkpoints; the gradient of the last
    encoder layer ranks better than that of the classifier's own weights (arXiv:2311.16298).

    Parameters
    ----------
    squared_norms : (K, n), non-negative.
    learning_rates : (K,), or one number for all checkpoints.

    Returns
    -------
    (n,) float64, non-negative. Raises InputError on shapes that do not match, negative or
    non-finite values. Time O(K n).

    Pruthi, Liu, Sundararajan and Kale, 2020, "Estimating Training Data Influence by Tracing
    Gradient Descent", arXiv:2002.08484.

    >>> tracin_self([[1.0, 4.0], [1.0, 0.0]], [0.1, 0.2]).round(3).tolist()
    [0.3, 0.4]
    """
    norms = _lengths("squared_norms", squared_norms, least=2)
    require(norms.ndim == 2, "squared_norms", f"shape {norms.shape}", "(K, n)")
    result: Array = _rates(learning_rates, len(norms)) @ norms
    return result


def tracin_pairwise(
    gradients: Iterable[ArrayLike], other: Iterable[ArrayLike], learning_rates: ArrayLike
) -> Array:
    r"""Influence of training examples on others, from their gradients (TracInCP).

    :math:`\mathrm{TracIn}(z,z')=\sum_k\eta_k\,\nabla_w L(w_k,z)\cdot\nabla_w L(w_k,z')`. Positive:
    a step on z lowers the loss of z' (a proponent); negative: it raises it (an opponent).

    Parameters
    ----------
    gradients, other : K arrays (n, ...) and K arrays (m, ...) of equal trailing size, as arrays
        or iterables; iterables are read one checkpoint at a time.
    learning_rates : (K,), or one number.

    Returns
    -------
    (n, m) float64; symmetric where both sides are the same examples. Raises InputError on
    shapes that do not match, differing numbers of checkpoints, non-finite values.

    Time O(K n m P), memory O(n m + (n + m) P) for P weights.

    Pruthi et al., 2020, arXiv:2002.08484.

    >>> z = [[[1.0, 0.0], [0.0, 2.0]]]
    >>> tracin_pairwise(z, z, 0.5).tolist()
    [[0.5, 0.0], [0.0, 2.0]]
    """
    dots: list[Array] = []
    first, second = checkpoints(gradients), checkpoints(other)
    for a in first:
        b = next(second, None)
        require(b is not None, "other", f"{len(dots)} checkpoints", "as many as gradients")
        assert b is not None
        left = a.reshape(a.shape[0], -1).astype(np.float64)
        right = b.reshape(b.shape[0], -1).astype(np.float64)
        require(
            left.shape[1] == right.shape[1],
            "other",
            f"{right.shape[1]} weights",
            f"{left.shape[1]} as gradients have",
        )
        require_finite("gradients", left)
        require_finite("other", right)
        dots.append(left @ right.T)
    require(next(second, None) is None, "other", "more checkpoints", f"{len(dots)} as gradients")
    require(bool(dots), "gradients", "no checkpoint", "at least 1")
    rates = _rates(learning_rates, len(dots))
    total: Array = np.zeros_like(dots[0])
    for rate, dot in zip(rates, dots, strict=True):
        total += rate * dot
    return total


def last_layer_gradient_norms(
    logits: ArrayLike, labels: ArrayLike, hidden: ArrayLike, *, bias: bool = True
) -> Array:
    r"""Length of the loss gradient at a final linear layer, without forming it.

    With softmax cross-entropy on :math:`f=Wh+b` the gradient is the outer product of
    :math:`r=p-\mathrm{onehot}(y)` and :math:`(h,1)`, so
    :math:`\lVert\nabla\rVert=\lVert r\rVert\sqrt{\lVert h\rVert^2+1}` (without the 1 if
    ``bias=False``).

    Parameters
    ----------
    logits : (..., n, C). labels : (n,).
    hidden : the layer's input, (n, H) or (..., n, H) with the leading axes of `logits`.

    Returns
    -------
    (..., n) float64: feed it to `grand`, or squared to `tracin_self`. Raises InputError as
    `el2n`, and on a `hidden` that does not match. Time O(size of `logits` and `hidden`).

    >>> last_layer_gradient_norms([[0.0, 0.0]], [0], [[3.0, 4.0]], bias=False).round(4).tolist()
    [3.5355]
    """
    errors = prediction_errors(logits, labels)
    states = _hidden(hidden, errors)
    square = np.square(states).sum(axis=-1) + float(bias)
    return np.asarray(np.linalg.norm(errors, axis=-1) * np.sqrt(square))


def last_layer_tracin(
    errors: ArrayLike,
    hidden: ArrayLike,
    other_errors: ArrayLike,
    other_hidden: ArrayLike,
    learning_rates: ArrayLike,
    *,
    bias: bool = True,
) -> Array:
    r"""Pairwise TracIn at a final linear layer, without forming a gradient.

    :math:`\sum_k\eta_k\,(r_k\cdot r'_k)(h_k\cdot h'_k+1)` with r from `prediction_errors`; exact
    for softmax cross-entropy.

    Parameters
    ----------
    errors : (K, n, C), other_errors : (K, m, C).
    hidden : (K, n, H) or (n, H), other_hidden : (K, m, H) or (m, H).
    learning_rates : (K,), or one number.

    Returns
    -------
    (n, m) float64. Raises InputError on shapes that do not match. Time O(K n m (C + H)),
    memory O(n m).

    >>> r, h = [[[0.5, -0.5]]], [[1.0]]
    >>> last_layer_tracin(r, h, r, h, 1.0).tolist()
    [[1.0]]
    """
    r, s = to_numpy(errors).astype(np.float64), to_numpy(other_errors).astype(np.float64)
    require(
        r.ndim == 3 and s.ndim == 3 and r.shape[::2] == s.shape[::2],
        "errors",
        f"shapes {r.shape} and {s.shape}",
        "(K, n, C) and (K, m, C)",
    )
    h = np.broadcast_to(_hidden(hidden, r), (*r.shape[:2], np.shape(hidden)[-1]))
    g = np.broadcast_to(_hidden(other_hidden, s), (*s.shape[:2], np.shape(other_hidden)[-1]))
    require(h.shape[-1] == g.shape[-1], "other_hidden", g.shape, f"width {h.shape[-1]}")
    total = np.zeros((r.shape[1], s.shape[1]))
    for k, rate in enumerate(_rates(learning_rates, len(r))):
        total += rate * (r[k] @ s[k].T) * (h[k] @ g[k].T + float(bias))
    return total


def _lengths(name: str, values: ArrayLike, *, least: int) -> Array:
    lengths = to_numpy(values).astype(np.float64)
    require(lengths.ndim >= least, name, f"shape {lengths.shape}", "(..., n)")
    require_finite(name, np.moveaxis(lengths, -1, 0))
    require(bool((lengths >= 0).all()), name, "negative values", "lengths, not below 0")
    return lengths


def _rates(learning_rates: ArrayLike, checkpoints: int) -> Array:
    rates = to_numpy(learning_rates).astype(np.float64)
    if rates.ndim == 0:
        rates = np.full(checkpoints, float(rates))
    good = rates.shape == (checkpoints,) and np.isfinite(rates).all() and (rates >= 0).all()
    require(
        bool(good),
        "learning_rates",
        f"shape {rates.shape}",
        f"({checkpoints},) finite rates, not negative, one a checkpoint",
    )
    return rates


def _hidden(hidden: ArrayLike, errors: Array) -> Array:
    states = to_numpy(hidden).astype(np.float64)
    fits = states.ndim >= 2 and states.shape[:-1] in (errors.shape[-2:-1], errors.shape[:-1])
    require(fits, "hidden", f"shape {states.shape}", f"(..., {errors.shape[-2]}, H)")
    require_finite("hidden", np.moveaxis(states, -2, 0))
    return states
