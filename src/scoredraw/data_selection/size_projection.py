"""Performance at one training size from that at two others, without parameters.

Performance h(L), on a scale h of its own, is taken to be affine in log N:

    h(L_N) = w1 h(L_N1) + w0 h(L_N0),   w1 = log(N/N0) / log(N1/N0),   w0 = 1 - w1

The further N lies beyond N1, and the nearer N0 and N1 are to each other, the more the errors of
the two measurements are enlarged.

Kang, Just, Sahu and Jia, 2023, "Performance Scaling via Optimal Transport", arXiv:2307.02460.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require

Array = NDArray[np.float64]


class Link(NamedTuple):
    """A scale h, its inverse, and h'."""

    forward: Callable[[Array], Array]
    back: Callable[[Array], Array]
    slope: Callable[[Array], Array]


LINKS = {
    "identity": Link(lambda y: y, lambda z: z, np.ones_like),
    "log_error": Link(lambda y: np.log1p(-y), lambda z: -np.expm1(z), lambda y: 1 / (y - 1)),
    "log": Link(np.log, np.exp, lambda y: 1 / y),
}
AMPLIFICATION = 5.0  # times the error of a measurement, beyond which a projection warns


def projection_weights(n0: float, n1: float, n: float) -> tuple[float, float]:
    """(w0, w1) of performance at n from that at n0 < n1, on the scale that is affine in log N.

    >>> projection_weights(1000, 2000, 4000)
    (-1.0, 2.0)
    """
    require(0 < n0 < n1 < np.inf, "n0, n1", f"{n0} and {n1}", "0 < n0 < n1")
    require(0 < n < np.inf, "n", n, "a size above 0")
    w1 = float(np.log(n / n0) / np.log(n1 / n0))
    return 1 - w1, w1


def error_amplification(n0: float, n1: float, n: float) -> float:
    """√(w0² + w1²): the error of a projection over that of one measurement, if independent.

    >>> round(error_amplification(1000, 1500, 10_000), 2)
    7.36
    """
    return float(np.hypot(*projection_weights(n0, n1, n)))


def project_size(
    perf_n0: ArrayLike,
    perf_n1: ArrayLike,
    n0: float,
    n1: float,
    n: float,
    link: str = "identity",
    *,
    clip: tuple[float, float] | None = None,
) -> Any:
    r"""Performance at size n from that at two sizes, without parameters.

    :math:`h(L_n)=\frac{\log(n/n_0)\,h(L_{n_1})-\log(n/n_1)\,h(L_{n_0})}{\log(n_1/n_0)}`: exact at
    both sizes and wherever h(L) is affine in log N. `link` h: "identity"; "log_error", the log of
    1 - L (accuracies whose error is a power of N); "log" (losses that are).

    Arrays broadcast; with "identity" the unit is free. `clip` bounds the result, (0, 1) for
    accuracies. Warns (UserWarning) where the errors of the measurements come out more than five
    times as large (`error_amplification`), and says what sizes twice apart would give.

    Raises `InputError` unless 0 < n0 < n1 and n > 0, for NaN or infinity, and for performance
    outside the link's domain (below 1 for "log_error", above 0 for "log").

    Kang et al., 2023, arXiv:2307.02460, stage 2.

    >>> project_size(0.5, 0.75, 100, 200, 400, "log_error")
    0.875
    """
    w0, w1 = projection_weights(n0, n1, n)
    require(link in LINKS, "link", repr(link), " or ".join(LINKS))
    y0, y1 = _inside(perf_n0, link, "perf_n0"), _inside(perf_n1, link, "perf_n1")
    warn_amplification(n0, n1, n)
    h = LINKS[link]
    out = h.back(w1 * h.forward(y1) + w0 * h.forward(y0))
    out = out if clip is None else np.clip(out, *clip)
    return float(out) if np.ndim(out) == 0 else out


def warn_amplification(n0: float, n1: float, n: float) -> None:
    """Warn where a projection makes too much of the error of the measurements."""
    factor = error_amplification(n0, n1, n)
    if factor > AMPLIFICATION:
        apart = "take sizes further apart"
        if n1 < 2 * n0:
            apart = f"sizes of {n0:g} and {2 * n0:g}: times {error_amplification(1, 2, n / n0):.2g}"
        warnings.warn(
            f"projecting {n0:g} and {n1:g} to {n:g} multiplies the error of the measurements by "
            f"{factor:.2g}; {apart}",
            stacklevel=3,
        )


def _inside(perf: ArrayLike, link: str, argument: str) -> Array:
    """Performance the link can take."""
    y = np.asarray(perf, dtype=np.float64)
    require(bool(np.isfinite(y).all()), argument, "NaN or infinity", "finite numbers")
    if link == "log_error":
        require(bool((y < 1).all()), argument, f"{y.max():g}", "below 1: the error's log is taken")
    if link == "log":
        require(bool((y > 0).all()), argument, f"{y.min():g}", "above 0: its log is taken")
    return y
