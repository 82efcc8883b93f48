"""What a network predicts, turned into eps or x_0; and schedule values that scale its arrays.

With  x = alpha x_0 + sigma eps  the state and any one of these give the other:

    epsilon           eps
    sample            x_0
    v_prediction      alpha eps - sigma x_0      (Salimans and Ho 2022, arXiv 2202.00512)
    score             ∇log p(x) = -eps/sigma
    flow_prediction   eps - x_0                  (Lipman et al. 2023, arXiv 2210.02747)

The formulas hold for any alpha and sigma, not only where alpha² + sigma² = 1 or alpha + sigma = 1.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor, on_host
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")


def to_eps(prediction: Any, x: Any, alpha: Any, sigma: Any, kind: str = "epsilon") -> Any:
    """The noise eps that a prediction of this kind at state x implies; arrays or tensors.

    alpha, sigma: numbers, or arrays that broadcast against x (`per_sample` shapes them).
    Raises InputError for an unknown kind. "sample" needs sigma > 0.

    >>> x0, eps = np.array([2.0]), np.array([-1.0])
    >>> x = 0.6 * x0 + 0.8 * eps
    >>> to_eps(0.6 * eps - 0.8 * x0, x, 0.6, 0.8, "v_prediction").round(12).tolist()
    [-1.0]
    """
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (x - alpha * prediction) / sigma
    if kind == "v_prediction":
        return (alpha * prediction + sigma * x) / (alpha * alpha + sigma * sigma)
    if kind == "score":
        return -sigma * prediction
    if kind == "flow_prediction":
        return (x + alpha * prediction) / (alpha + sigma)
    raise InputError(f"kind: got {kind!r}, want one of {', '.join(PREDICTIONS)}")


def to_x0(prediction: Any, x: Any, alpha: Any, sigma: Any, kind: str = "epsilon") -> Any:
    """The clean sample x_0 that a prediction of this kind at state x implies: as `to_eps`.

    All kinds but "sample", "v_prediction" and "flow_prediction" need alpha > 0.

    >>> x0, eps = np.array([2.0]), np.array([-1.0])
    >>> to_x0(-eps / 0.8, 0.6 * x0 + 0.8 * eps, 0.6, 0.8, "score").round(12).tolist()
    [2.0]
    """
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return (alpha * x - sigma * prediction) / (alpha * alpha + sigma * sigma)
    if kind == "flow_prediction":
        return (x - sigma * prediction) / (alpha + sigma)
    return (x - sigma * to_eps(prediction, x, alpha, sigma, kind)) / alpha


def as_times(t: Any) -> Float:
    """Times as float64, from a number, a sequence, an array or a tensor on any device."""
    return np.asarray(on_host(t), dtype=np.float64)


def per_sample(values: Float, x: Any) -> Any:
    """Values, one for all samples or one each, as what multiplies x (B, *dims).

    A single value becomes a Python float; B of them an array or tensor (B, 1, ..., 1) with the
    dtype and device of x. Raises InputError for another number of values.

    >>> per_sample(np.array([1.0, 2.0]), np.zeros((2, 3, 4), np.float32)).shape
    (2, 1, 1)
    """
    if values.ndim == 0:
        return float(values)
    count = x.shape[0] if x.ndim else 0
    require(values.shape == (count,), "t", f"times {values.shape}", f"one time or ({count},)")
    column = values.reshape(-1, *(1,) * (x.ndim - 1))
    if is_tensor(x):
        torch = sys.modules["torch"]
        dtype = x.dtype if x.is_floating_point() else torch.float64
        return torch.as_tensor(column, dtype=dtype, device=x.device)
    return column.astype(x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64)
