"""Two kinds of reasoning paths, told apart by their probabilities: a mixture of two Weibulls.

The probabilities x_1..x_n of sampled paths are taken to come from a mixture of a "high" and a "low"
component, told apart by their means λ Γ(1 + 1/k):

    f(x)  =  w W(x; k_h, λ_h) + (1 - w) W(x; k_l, λ_l)
    W(x; k, λ)  =  (k/λ) (x/λ)^{k-1} exp(-(x/λ)^k)

Maximum likelihood has no answer here: with λ at a data point and k → ∞ the likelihood is unbounded.
What the method means is the local optimum that L-BFGS-B reaches from one given start inside given
bounds; other starts and "better" optimisers find spikes. So the optimiser belongs to the method,
and many samples are fitted at once by taking SciPy's own L-BFGS-B through its steps, one step of
all of them at a time, with the likelihoods of all of them in one evaluation. The results are those
of one fit after the other, to the last bit.

Zhou et al., "A theoretical study on bridging internal probability and self-consistency for LLM
reasoning", NeurIPS 2025, arXiv 2510.15444.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, gammaln

from scoredraw.errors import require
from scoredraw.execution import Engine, one_blas_thread

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

START = (0.5, 1.0, 1.0, 1.5, 2.0)  # w, k1, λ1, k2, λ2
BOUNDS = ((0.2, 0.8), *(((0.01, np.inf),) * 4))
LEAST = 1e-12  # smaller probabilities are taken to be this
HUGE = 600.0  # exp(600) is finite, and so is what is made of it
CELLS = 102_400  # samples × paths of a block: few calls of NumPy, and not far from a core
THREADS = 2  # more wait for each other, as a fifth of the time nothing but Python's lock is held
MEMORY, LINE_STEPS, MOST_STEPS = 10, 20, 15_000  # as SciPy has them by default
FTOL, GTOL = 2.2204460492503131e-09, 1e-5
NEW, EVALUATE, CONVERGED = 1, 3, 4  # what a step of L-BFGS-B asks for, or that it is done


@dataclass(frozen=True, eq=False)
class WeibullMixture:
    """A fitted mixture, or S of them: everything then has a leading axis S.

    w: weight of the high component, in [0.2, 0.8]. k, scale: (2,), shape and scale λ of the high
    and the low component. nll: -Σ log f(x_i). converged: whether the optimiser said so.
    What was not fitted is NaN.
    """

    w: Float
    k: Float
    scale: Float
    nll: Float
    converged: Bool

    @property
    def means(self) -> Float:
        """λ Γ(1 + 1/k) of the high and the low component, (..., 2)."""
        return np.asarray(self.scale * np.exp(gammaln(1 + 1 / self.k)))

    def posterior_high(self, x: ArrayLike) -> Float:
        """P(high | x) = w W_h / (w W_h + (1 - w) W_l), for x (..., n).

        In logarithms: defined also where both densities underflow.
        """
        log_x = np.log(np.maximum(np.asarray(x, np.float64), LEAST))
        k, log_scale = self.k, np.log(self.scale)
        high, low = (k[..., [c]] * (log_x - log_scale[..., [c]]) for c in (0, 1))
        odds = np.asarray(np.log(self.w * k[..., 0]) - np.log((1 - self.w) * k[..., 1]))[..., None]
        gap = high - low
        # exp(high) - exp(low) without infinity less infinity
        apart = np.exp(np.minimum(np.maximum(high, low, out=high), HUGE, out=high), out=high)
        apart *= -np.expm1(-np.abs(gap))
        return np.asarray(expit(odds + gap - np.copysign(apart, gap)))

    def __getitem__(self, one: Any) -> WeibullMixture:
        return WeibullMixture(
            self.w[one], self.k[one], self.scale[one], self.nll[one], self.converged[one]
        )


def fit_weibull_mixture(p: ArrayLike) -> WeibullMixture:
    """The mixture that L-BFGS-B finds from the one start, for probabilities p (n,).

    Minimises -Σ log f(p_i), with its analytic gradient, from (w, k1, λ1, k2, λ2) = (0.5, 1, 1, 1.5,
    2) within w in [0.2, 0.8] and the rest ≥ 0.01. Probabilities below 1e-12 count as that. The
    released code takes numerical gradients of densities that underflow, and stops where they do.
    Raises InputError for fewer than 2 probabilities, and for what lies outside [0, 1].

    Zhou et al. 2025, arXiv 2510.15444, section 3.2. About 60 evaluations of O(n). The order of p
    does not matter, to the last bit.

    >>> p = np.random.default_rng(0).weibull([[9.0], [2.0]], (2, 500)) * [[0.8], [0.2]]
    >>> fit = fit_weibull_mixture(np.minimum(p, 1).reshape(-1))
    >>> fit.means.round(2).tolist(), bool(fit.converged)
    ([0.77, 0.17], True)
    """
    x = _checked(p, 1)
    log_x = np.log(np.maximum(np.sort(x), LEAST))
    return name_components(*_one(log_x))


def fit_weibull_mixtures(p: ArrayLike) -> WeibullMixture:
    """`fit_weibull_mixture` of each row of p (S, n), in lock step: the same, and faster.

    Where SciPy's L-BFGS-B can't be taken through its steps (its internals changed, or are those of
    before 1.15) the rows are fitted one after the other. Ten times faster than that for n up to 64,
    three times for 1,000. O(S n) an evaluation; memory O(S n).

    >>> p = np.random.default_rng(0).beta(5, 2, (3, 20))
    >>> many = fit_weibull_mixtures(p)
    >>> [bool(many.nll[s] == fit_weibull_mixture(p[s]).nll) for s in range(3)]
    [True, True, True]
    """
    x = _checked(p, 2)
    log_x = np.log(np.maximum(np.sort(x, axis=1), LEAST))
    if not len(log_x):
        return name_components(np.empty((0, 5)), np.empty(0), np.empty(0, bool))
    if not steps_like_scipy():
        fits = zip(*map(_one, log_x), strict=True)
        return name_components(*(np.array(parts) for parts in fits))
    return name_components(*_in_lock_step(log_x))


def _checked(p: ArrayLike, dimensions: int) -> Float:
    x = np.asarray(p, np.float64)
    require(x.ndim == dimensions, "p", f"{x.ndim} dimensions", str(dimensions))
    require(x.shape[-1] >= 2, "p", f"{x.shape[-1]} values", "2 or more")
    require(bool(((x >= 0) & (x <= 1)).all()), "p", "others", "probabilities in [0, 1]")
    return x


def name_components(theta: Float, nll: Any, converged: Any) -> WeibullMixture:
    """The mixture of parameters (..., 5) as optimised, the component of the larger mean first.

    >>> mixture = name_components(np.array([0.3, 2.0, 0.2, 2.0, 0.8]), 0.0, True)
    >>> float(mixture.w), mixture.scale.tolist()
    (0.7, [0.8, 0.2])
    """
    w, k, scale = theta[..., 0], theta[..., [1, 3]], theta[..., [2, 4]]
    means = np.log(scale) + gammaln(1 + 1 / k)
    swap = means[..., 1] > means[..., 0]
    return WeibullMixture(
        np.asarray(np.where(swap, 1 - w, w)),
        np.where(swap[..., None], k[..., ::-1], k),
        np.where(swap[..., None], scale[..., ::-1], scale),
        np.asarray(nll, np.float64),
        np.asarray(converged, bool),
    )


# ── the likelihood ──────────────────────────────────────────────────────────────────────────────


def negative_log_likelihood(
    theta: Float, log_x: Float, work: Float | None = None
) -> tuple[Float, Float]:
    """-Σ_i log f(x_i) (S,) and its gradient (S, 5), at parameters (S, 5), for log x (S, n) ≤ 0.

    Of each component, with u = log x - log λ, e = exp(k u) and its posterior r:
    log(w W x) = log(w k) + k u - e,  ∂/∂k = -Σ r (1/k + u (1 - e)),  ∂/∂λ = -Σ r (e - 1) k/λ;
    and of the two, a and b, log(f x) = max(a, b) - log max(r, 1 - r) with r = 1/(1 + e^{b-a}). Both
    are kept less log(w k) of the second.
    Row by row the same whatever the other rows are. work: (5, S or more, n) to compute in; whoever
    calls often gives it, as fresh memory may cost more than the formula.
    """
    if work is None:
        work = np.empty((5, *log_x.shape))
    S = len(theta)
    both, e, one = work[:2, :S], work[2:4, :S], work[4, :S]
    first, second = both
    w, k, scale = theta[:, 0], theta[:, 1::2].T, theta[:, 2::2].T  # k, scale: (2, S)
    log_scale = np.log(scale)
    most = -k * log_scale  # k u where x is 1
    np.multiply(k[..., None], log_x, out=both)
    both += most[..., None]
    np.exp(both if most.max() <= HUGE else np.minimum(both, HUGE, out=e), out=e)
    both -= e
    of_first, of_second = np.log(np.stack([w, 1 - w]) * k)
    first += (of_first - of_second)[:, None]
    np.subtract(second, first, out=one)
    total = np.maximum(first, second, out=first).sum(axis=1) + log_x.shape[1] * of_second
    np.exp(np.clip(one, -HUGE, HUGE, out=one), out=one)
    one += 1
    np.reciprocal(one, out=first)  # the posteriors, from here on
    np.subtract(1, first, out=second)
    total -= np.log(np.maximum(first, second, out=one), out=one).sum(axis=1)
    count = both.sum(axis=2)
    e -= 1
    e *= both
    weight = e.sum(axis=2)
    gradient = np.empty_like(theta)
    gradient[:, 0] = count[1] / (1 - w) - count[0] / w
    by_k = np.einsum("csn,sn->cs", e, log_x) - log_scale * weight - count / k
    gradient[:, 1::2], gradient[:, 2::2] = by_k.T, (-weight * (k / scale)).T
    return log_x.sum(axis=1) - total, gradient


# ── L-BFGS-B, one sample or many ────────────────────────────────────────────────────────────────


def _one(log_x: Float) -> tuple[Float, float, bool]:
    """One fit by `scipy.optimize.minimize`."""

    def at(theta: Float) -> tuple[float, Float]:
        value, gradient = negative_log_likelihood(theta[None], log_x[None])
        return float(value[0]), gradient[0]

    found = minimize(at, np.array(START), jac=True, bounds=BOUNDS, method="L-BFGS-B")
    return found.x, float(found.fun), bool(found.success)


@cache
def steps_like_scipy() -> bool:
    """Whether the steps below give, to the last bit, what `minimize` gives, on four small samples.

    They are not part of SciPy's public interface, so this is looked at before they are used.
    """
    log_x = np.log(np.sin(np.arange(1.0, 33.0).reshape(4, 8)) ** 2)
    try:
        theta, nll, _ = _in_lock_step(log_x)
    except Exception:  # they raise their own kinds
        return False
    alone = [_one(row) for row in log_x]
    return all(
        np.array_equal(theta[s], one) and nll[s] == value for s, (one, value, _) in enumerate(alone)
    )


def _in_lock_step(log_x: Float) -> tuple[Float, Float, Bool]:
    """Parameters (S, 5), -log-likelihoods (S,) and whether it converged (S,), in blocks."""
    size = max(1, CELLS // log_x.shape[1])
    blocks = [log_x[i : i + size] for i in range(0, len(log_x), size)]
    threads = min(THREADS, Engine().threads)
    # matrices of ten are slower on several cores
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_block_in_lock_step, blocks))
    theta, nll, converged = (np.concatenate(part) for part in zip(*parts, strict=True))
    return theta, nll, converged


def _block_in_lock_step(log_x: Float) -> tuple[Float, Float, Bool]:
    from scipy.optimize import _lbfgsb

    s, size, m = len(log_x), len(START), MEMORY
    theta = np.tile(np.array(START), (s, 1))
    value, gradient = np.zeros(s), np.zeros((s, size))
    low, high = np.array(list(zip(*BOUNDS, strict=True)))
    bounded = np.where(np.isfinite(high), 2, 1).astype(np.int32)
    work = np.zeros((s, 2 * m * size + 5 * size + 11 * m * m + 8 * m))
    integers = {n: np.zeros((s, n), np.int32) for n in (3 * size, 4, 44)}
    task, line_task = np.zeros((2, s, 2), np.int32)
    reals = np.zeros((s, 29))
    high = np.where(np.isfinite(high), high, 0.0)
    state = [
        (
            m, theta[i], low, high, bounded, value[i : i + 1].reshape(()), gradient[i],
            FTOL / np.finfo(float).eps, GTOL, work[i], integers[3 * size][i], task[i],
            integers[4][i], integers[44][i], reals[i], LINE_STEPS, line_task[i],
        )
        for i in range(s)
    ]  # fmt: skip
    step, asked = _lbfgsb.setulb, task[:, 0]
    work, rows = np.empty((5, *log_x.shape)), np.empty_like(log_x)
    going = np.arange(s)
    for _ in range(MOST_STEPS):
        for i in going.tolist():
            step(*state[i])
        while (fresh := going[asked[going] == NEW]).size:
            for i in fresh.tolist():
                step(*state[i])
        going = going[asked[going] == EVALUATE]
        if not going.size:
            break
        some = log_x
        if len(going) < s:
            some = np.take(log_x, going, axis=0, out=rows[: len(going)])
        value[going], gradient[going] = negative_log_likelihood(theta[going], some, work)
    return theta, value, (asked == CONVERGED) & np.isfinite(value)
