"""How far a confidence that is estimated from n samples lies from the truth, exactly.

p is the probability with which the model gives an answer, I is 1 if the answer is right and 0 if
it is not, and p̂ is what a method makes of n samples. The squared error has two parts,

    E(p̂ - I)²  =  estimation error  +  (p - I)²

of which the second is the model's and the first goes with n. Where p̂ is unbiased (votes) the first
is its variance; a sum over the paths that were seen is too low, and then it also holds what the
bias does, and can be negative (for a wrong answer, not to have been seen is right).

    votes                 p (1 - p) / n
    the one path of y     (1 - p)^n p (2 I - p)
    k equal paths to y    E[p̂²] - 2 I p (1 - α^n) + I - (p - I)²,   q = p / k,  α = 1 - q
                          E[p̂²] = q² [k (1 - α^n) + k (k - 1) (1 - 2 α^n + (1 - 2q)^n)]

Votes converge like 1/n, sums over distinct paths like α^n: faster, but with many paths (α near 1)
not soon. The paper's theorem 4, as printed, has α^n p (2 I - (1 + α^n) p) for the last; without
samples (n = 0) that makes a wrong answer's squared error -p², so the sign of a term is wrong. The
exact form is here; with paths taken as independent it reads

    α^n p (2 I - (2 - α^n) p) + (p²/k) α^n (1 - α^n)

Zhou, Tan, Yang, Gan, Wang, Zhang and Li, "A theoretical study on bridging internal probability and
self-consistency for LLM reasoning", NeurIPS 2025, arXiv 2510.15444.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require

Float = NDArray[np.float64]


def model_error(p: ArrayLike, right: ArrayLike) -> Float:
    """(p - I)²: what is left however many samples are drawn.

    >>> model_error(0.3, [0, 1]).round(4).tolist()
    [0.09, 0.49]
    """
    x, truth, _ = _checked(p, right, 0)
    return np.asarray((x - truth) ** 2)


def vote_error(p: ArrayLike, n: ArrayLike) -> Float:
    """p (1 - p) / n: the estimation error of the share of n ≥ 1 samples that give the answer.

    >>> vote_error(0.5, [1, 100]).tolist()
    [0.25, 0.0025]
    """
    x, _, size = _checked(p, 0, n)
    require(bool((size >= 1).all()), "n", size.min(initial=1), "1 or more samples")
    return np.asarray(x * (1 - x) / size)


def path_error(p: ArrayLike, n: ArrayLike, right: ArrayLike) -> Float:
    """(1 - p)^n p (2 I - p): the estimation error for one path, p̂ = p once it was seen, else 0.

    >>> path_error(0.5, [0, 1, 2], right=1).tolist()
    [0.75, 0.375, 0.1875]
    """
    x, truth, size = _checked(p, right, n)
    return np.asarray((1 - x) ** size * x * (2 * truth - x))


def seen_mass(p: ArrayLike, n: ArrayLike, paths: ArrayLike = 1) -> Float:
    """E[p̂] = p (1 - α^n): the mass of the distinct ones of k equal paths seen in n samples.

    >>> seen_mass(0.6, [0, 1, 2], paths=3).round(12).tolist()
    [0.0, 0.12, 0.216]
    """
    x, _, size = _checked(p, 0, n)
    k = _paths(paths)
    return np.asarray(x * (1 - (1 - x / k) ** size))


def seen_mass_squared(p: ArrayLike, n: ArrayLike, paths: ArrayLike = 1) -> Float:
    """E[p̂²] = q² [k (1 - α^n) + k (k - 1) (1 - 2 α^n + (1 - 2q)^n)], exactly.

    p (...): probability of the answer; n (...): samples; paths k (...): equal paths to it, q = p/k.

    >>> seen_mass_squared(0.5, [0, 1, 2], paths=2).tolist()
    [0.0, 0.03125, 0.0703125]
    """
    x, _, size = _checked(p, 0, n)
    k = _paths(paths)
    q = x / k
    missed, both = (1 - q) ** size, np.maximum(1 - 2 * q, 0.0) ** size  # one path has no pair
    return np.asarray(q**2 * (k * (1 - missed) + k * (k - 1) * (1 - 2 * missed + both)))


def consistency_error(p: ArrayLike, n: ArrayLike, right: ArrayLike, paths: ArrayLike = 1) -> Float:
    """The estimation error of perplexity consistency, for an answer with k equal paths, exactly.

    E[p̂²] - 2 I E[p̂] + I - (p - I)². Decays like (1 - p/k)^n; `path_error` where k = 1.
    Shapes broadcast. Raises InputError for p outside [0, 1], a truth other than 0 or 1, negative
    n, and k below 1. Zhou et al. 2025, arXiv 2510.15444, theorem 4, corrected.

    >>> consistency_error(0.5, [0, 1, 50], right=0, paths=2).round(6).tolist()
    [-0.25, -0.21875, -0.0]
    """
    x, truth, size = _checked(p, right, n)
    squared = seen_mass_squared(x, size, paths) - 2 * truth * seen_mass(x, size, paths) + truth
    return np.asarray(squared - (x - truth) ** 2)


def consistency_error_independent(
    p: ArrayLike, n: ArrayLike, right: ArrayLike, paths: ArrayLike = 1
) -> Float:
    """α^n p (2 I - (2 - α^n) p) + (p²/k) α^n (1 - α^n): as if paths were seen independently.

    >>> float(consistency_error_independent(0.5, 0, right=0, paths=2))
    -0.25
    """
    x, truth, size = _checked(p, right, n)
    k = _paths(paths)
    missed = (1 - x / k) ** size
    spread = x**2 / k * missed * (1 - missed)
    return np.asarray(missed * x * (2 * truth - (2 - missed) * x) + spread)


def printed_consistency_error(
    p: ArrayLike, n: ArrayLike, right: ArrayLike, paths: ArrayLike = 1
) -> Float:
    """α^n p (2 I - (1 + α^n) p), as the paper's theorem 4 prints it: to compare, it is not right.

    >>> float(printed_consistency_error(0.5, 0, right=0) + model_error(0.5, 0))
    -0.25
    """
    x, truth, size = _checked(p, right, n)
    missed = (1 - x / _paths(paths)) ** size
    return np.asarray(missed * x * (2 * truth - (1 + missed) * x))


def printed_pruning_bound(k_hat: float, k: float, tau: float, alpha: float) -> float:
    """1 - exp(-2 k̂ k² (1 - τ/(1 - α))²), the paper's bound for pruning at the best threshold τ.

    The probability with which the estimation error is then gone, as printed. What the symbols mean
    is not clear from the text: with τ = p and 1 - α = p/k it would be near 1 for every k above 1.

    >>> round(printed_pruning_bound(k_hat=1, k=2, tau=0.2, alpha=0.6), 4)
    0.8647
    """
    require(alpha < 1, "alpha", alpha, "less than 1")
    return float(-np.expm1(-2 * k_hat * k**2 * (1 - tau / (1 - alpha)) ** 2))


def _checked(p: ArrayLike, right: ArrayLike, n: ArrayLike) -> tuple[Float, Float, Float]:
    x, truth, size = (np.asarray(value, np.float64) for value in (p, right, n))
    require(bool(((x >= 0) & (x <= 1)).all()), "p", _first(x), "probabilities in [0, 1]")
    require(bool(((truth == 0) | (truth == 1)).all()), "right", _first(truth), "0 or 1")
    counts = (size >= 0) & (size % 1 == 0)
    require(bool(counts.all()), "n", _first(size), "whole numbers of samples")
    return x, truth, size


def _paths(paths: ArrayLike) -> Float:
    k = np.asarray(paths, np.float64)
    require(bool(((k >= 1) & (k % 1 == 0)).all()), "paths", _first(k), "whole numbers, 1 or more")
    return k


def _first(values: Float) -> Any:
    return values.reshape(-1)[:3].tolist()
