r"""Particles with weights: how many they are worth, log Z, and resampling them.

N particles with log-weights a_k stand for a law: E[φ] ≈ Σ_k p_k φ(x_k), p = softmax(a). Resampling
draws N of them with expected counts N p_k and sets the weights back to one. What the weights had
gathered by then is an estimate of a ratio of normalising constants,

    log Z  =  log (1/N) Σ_k exp(a_k),

which adds up over the resamplings. The schemes differ in how far the counts stray from N p_k; all
go along the line of cumulated p with N points, sorted, so that each costs O(N):

    multinomial   N independent uniforms
    stratified    one in each of N equal cells
    systematic    a comb with one offset: counts are floor(N p_k) or one more
    residual      floor(N p_k) copies for certain, and a comb over what is left of each
    sobol         a scrambled Sobol sequence

`BirthDeath` replaces particles one by one as time goes on instead of all at once. Arrays and torch
tensors alike: what decides is computed on the CPU in float64, ids come back where the weights are.

Douc, Cappé and Moulines 2005, arXiv cs/0507025, compare the schemes. Kitagawa 1996; Liu and Chen
1998; Del Moral 2004.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import resampling_points as line
from scoredraw.arrays import is_tensor, on_host
from scoredraw.errors import InputError, require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]


def probabilities(log_weights: Any) -> Any:
    """softmax of the log-weights (N,): float64, in the kind and on the device of the input.

    -inf is a particle of no weight. Raises InputError for NaN, +inf, and where nothing has weight.

    >>> probabilities([1000.0, 1000.0, -np.inf]).tolist()
    [0.5, 0.5, 0.0]
    """
    w, _ = _weights(log_weights)
    return _back(w / w.sum(), log_weights)


def effective_size(log_weights: Any) -> float:
    """1 / Σ p²: how many particles of equal weight would do as well. In [1, N]. Kong 1992.

    >>> round(effective_size([0.0, 0.0, -np.inf]), 9)
    2.0
    """
    w, _ = _weights(log_weights)
    return float(w.sum() ** 2 / np.square(w).sum())


def log_mean_weight(log_weights: Any) -> float:
    """log (1/N) Σ exp(a_k): what these weights add to log Z when they are set back.

    >>> round(log_mean_weight(np.log([1.0, 3.0])), 9) == round(float(np.log(2)), 9)
    True
    """
    w, top = _weights(log_weights)
    return float(top + np.log(w.mean()))


def self_normalized(log_weights: Any, values: Any) -> Any:
    """Σ_k p_k φ_k of values (N, ...): plain importance sampling's estimate of E[φ], float64.

    Particles of no weight don't count, whatever their value.

    >>> float(self_normalized([0.0, -np.inf], [2.0, np.nan]))
    2.0
    """
    w, _ = _weights(log_weights)
    phi = np.asarray(on_host(values), np.float64)
    require(phi.shape[:1] == w.shape, "values", phi.shape, f"({len(w)}, ...)")
    alive = w > 0
    return _back(np.tensordot(w[alive], phi[alive], axes=1) / w.sum(), log_weights)


def resample(
    log_weights: Any, scheme: str = "systematic", rng: Any = None, *, size: int | None = None
) -> Any:
    """`size` ids (N by default), particle k an expected size · p_k times: int64.

    log_weights: (N,). scheme: one of `SCHEMES`. rng: a seed, a NumPy `Generator`, a
    `torch.Generator` (which gives a seed) or None. With equal weights stratified, systematic and
    residual keep everyone once. Ids are in rising order; numba, if installed, only makes many of
    them faster. O(N + size). Raises InputError as `probabilities`, for an unknown scheme and a size
    below 1.

    >>> resample(np.log([0.5, 0.25, 0.25]), "residual", rng=0, size=4).tolist()
    [0, 0, 1, 2]
    """
    require(scheme in SCHEMES, "scheme", repr(scheme), f"one of {', '.join(SCHEMES)}")
    a, top = _numbers(log_weights)
    count = len(a) if size is None else size
    require(count >= 1, "size", count, "1 or more")
    ids = SCHEMES[scheme](line.weights(a, top), count, _numpy_generator(rng))
    return _back(ids, log_weights)


def systematic_ids(p: Any, offset: float, size: int | None = None, *, least: float = 0.0) -> Int:
    """The comb: for u_k = (offset + k/size) mod 1 the first i with p_1 + ... + p_i > u_k.

    p: (N,), summing to 1. offset in [0, 1). least: lifts every p to at least this and lets the sum
    exceed 1, as released code does with 1e-6; it can bring dead particles back.

    >>> systematic_ids([0.5, 0.25, 0.25], 0.6, 4).tolist()
    [1, 2, 0, 0]
    """
    q = np.asarray(p, np.float64)
    count = len(q) if size is None else size
    ends = np.cumsum(np.maximum(q, least))
    ends = np.minimum(ends / (1.0 if least else ends[-1]) * count, count)
    first = int(offset * count)
    ids = line.repeated(line.before_comb(ends, offset * count - first), count)
    return np.roll(ids, -first)


def _sobol(w: Float, size: int, rng: np.random.Generator) -> Int:
    from scipy.stats import qmc

    points = qmc.Sobol(1, rng=rng).random_base2((size - 1).bit_length())[:size, 0]
    return line.fallen(np.sort(points), w, 1.0)


SCHEMES: dict[str, Callable[[Float, int, np.random.Generator], Int]] = {
    "multinomial": line.independent,
    "stratified": line.strata,
    "systematic": line.comb,
    "residual": line.copies_and_comb,
    "sobol": _sobol,
}


@dataclass(frozen=True, eq=False)
class BirthDeathState:
    """The clocks of N particles.

    gathered: (N,) rate of dying summed over time since the particle was last replaced. alarm: (N,)
    the Exp(1) at which it dies. births: (N,) rate of being copied, summed over all time; at_last:
    (N,) rows of `past` that hold it as it was when the particle was last replaced.
    """

    gathered: Float
    alarm: Float
    births: Float
    past: Float
    at_last: Int


class BirthDeath:
    """Particles replaced one by one: i at rate (ḡ - g_i)⁺, by a copy of j drawn ∝ (g_j - ḡ)⁺.

    For log-weights that grow at rates g_i (N,), with ḡ their mean, this keeps all weights equal.
    Each particle gathers D_i += (ḡ - g_i)⁺ dt and is replaced when D_i reaches its own Exp(1); then
    its clock starts anew. births: "instantaneous", j drawn by the rates of this step, exact as
    dt → 0; or "accumulated", by their sum since i was last replaced, though j may have become
    another by now: smoother, and biased. That takes O(N) memory for every step since then.

    Skreta et al. 2025, arXiv 2503.02819; its released code draws j uniformly, which loses the
    correction. O(N) a step, and O(N) more for each particle that is replaced.

    >>> clock = BirthDeath()
    >>> ids, _ = clock.step(clock.init(2, rng=0), [50.0, -50.0], 1.0, rng=1)
    >>> ids.tolist()
    [0, 0]
    """

    def __init__(self, births: str = "instantaneous") -> None:
        kinds = ("instantaneous", "accumulated")
        require(births in kinds, "births", repr(births), " or ".join(kinds))
        self.births = births

    def init(self, n: int, rng: Any = None) -> BirthDeathState:
        """Clocks at zero. n: 2 or more particles."""
        require(n >= 2, "n", n, "2 or more particles")
        alarm = _numpy_generator(rng).exponential(size=n)
        return BirthDeathState(np.zeros(n), alarm, np.zeros(n), np.zeros((1, n)), np.zeros(n, int))

    def step(
        self, state: BirthDeathState, rates: Any, dt: float, rng: Any = None
    ) -> tuple[Any, BirthDeathState]:
        """Which particle each one is after a time dt, int64 (N,), and the clocks.

        rates: (N,) finite. Raises InputError for others, another N and dt <= 0.
        """
        g = np.asarray(on_host(rates), np.float64)
        require(g.shape == state.alarm.shape, "rates", g.shape, f"({len(state.alarm)},)")
        require(bool(np.isfinite(g).all()), "rates", "NaN or infinity", "finite rates")
        require(0 < dt < np.inf, "dt", dt, "a positive time")
        random, over = _numpy_generator(rng), g - g.mean()
        born = np.maximum(over, 0.0) * dt
        gathered, births = state.gathered + np.maximum(-over, 0.0) * dt, state.births + born
        ids = np.arange(len(g))
        dead = np.flatnonzero(gathered >= state.alarm)
        alarm, past, at_last = state.alarm.copy(), state.past, state.at_last.copy()
        for i in dead:
            since = births - past[at_last[i]] if self.births == "accumulated" else born
            ends = np.cumsum(since)
            ids[i] = np.searchsorted(ends, random.random() * ends[-1], side="right")
        if dead.size:
            gathered[dead], alarm[dead] = 0.0, random.exponential(size=dead.size)
        if dead.size and self.births == "accumulated":
            at_last[dead] = len(past)
            kept, at_last = np.unique(at_last, return_inverse=True)
            past = np.vstack([past, births])[kept]
        return _back(ids, rates), BirthDeathState(gathered, alarm, births, past, at_last)


def _weights(log_weights: Any) -> tuple[Float, float]:
    """exp(a - max a) and max a, in float64."""
    a, top = _numbers(log_weights)
    w = a - top
    return np.exp(w, out=w), top


def _numbers(log_weights: Any) -> tuple[Float, float]:
    """The log-weights in float64, and the highest."""
    a = np.asarray(on_host(log_weights), np.float64)
    require(a.ndim == 1 and a.size >= 1, "log_weights", a.shape, "(N,), N >= 1")
    top = float(a.max())
    if not np.isfinite(top):
        require(top != -np.inf, "log_weights", "-inf throughout", "a particle with weight")
        bad = np.flatnonzero(np.isnan(a) | (a == np.inf))[0]
        raise InputError(f"log_weights: got {a[bad]} at {bad}, want numbers or -inf")
    return a, top


def _back(values: Any, like: Any) -> Any:
    """As a tensor on the device of `like`, if that is one."""
    return sys.modules["torch"].as_tensor(values).to(like.device) if is_tensor(like) else values


def _numpy_generator(rng: Any) -> np.random.Generator:
    """As `generator`; a torch.Generator gives a seed, and so moves on."""
    if not type(rng).__module__.startswith("torch"):
        return generator(rng)
    torch = sys.modules["torch"]
    return generator(int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device)))
