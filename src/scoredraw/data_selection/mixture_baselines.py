"""What else would choose a mixture of sources: values of sources, tries at random, transport alone.

All take the pilots, the training function and the size N1 of a fitted `Projektor`, so that they
are compared on what each makes of the same small data.
"""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.mixture_runs import MixtureRuns
from scoredraw.data_selection.projektor import Projektor
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Array = NDArray[np.float64]

SHAPLEY_SOURCES = 10  # 2^10 trainings


def baseline_mixtures(
    projektor: Projektor,
    *,
    trials: int = 16,
    nothing: float = 0.0,
    steps: int = 100,
    rng: Rng = 0,
) -> dict[str, Array]:
    """Mixtures by other means, from the same pilots at size N1.

    - "uniform": 1/m each.
    - "leave-one-out": p_i ∝ the positive part of v(all) - v(all but i), where v(S) is the
      performance of a uniform mixture of S.
    - "Shapley": p_i ∝ the positive part of the exact Shapley value, Σ_S |S|! (m-|S|-1)! / m!
      [v(S ∪ i) - v(S)], v(∅) = `nothing`. Only up to 10 sources (2^m trainings).
    - "random validation": the best of `trials` mixtures drawn uniformly from the simplex.
    - "best pilot": the best mixture of the fitted grid.
    - "OT only": the mixture of least transport cost, after `steps`.

    Mixtures the pilots have too few rows for can't be tried: random ones are drawn again, and a
    value that needs one raises `InputError`.
    """
    m, n1 = projektor.runs_.m, projektor.sizes_[1]
    sign = 1.0 if projektor.maximise else -1.0
    game = coalition_values(projektor, nothing) if m <= SHAPLEY_SOURCES else None
    out = {"uniform": np.full(m, 1 / m)}
    if game is None:
        left_out = (1 - np.eye(m)) / (m - 1)
        values = sign * projektor.measure(np.vstack([out["uniform"], left_out]), n1)
        out["leave-one-out"] = value_shares(values[0] - values[1:])
    else:
        everyone = 2**m - 1
        out["leave-one-out"] = value_shares(game[everyone] - game[everyone - 2 ** np.arange(m)])
        out["Shapley"] = value_shares(shapley_values(game))
    tried = random_mixtures(projektor.runs_, n1, trials, rng)
    out["random validation"] = tried[(sign * projektor.measure(tried, n1)).argmax()]
    out["best pilot"] = projektor.grid_[(sign * projektor.performance_[:, 1]).argmax()]
    out["OT only"] = projektor.nearest(steps)[0]
    return out


def coalition_values(projektor: Projektor, nothing: float = 0.0) -> Array:
    """v(S) of every coalition, (2^m,): the performance of a uniform mixture of S at N1.

    Coalition c holds source i where bit i of c is set; v(0) is `nothing`, and losses are negated.
    """
    m = projektor.runs_.m
    members = (np.arange(1, 2**m)[:, None] >> np.arange(m)) & 1
    values = projektor.measure(members / members.sum(axis=1, keepdims=True), projektor.sizes_[1])
    sign = 1.0 if projektor.maximise else -1.0
    return np.append(nothing, sign * values)


def shapley_values(values: ArrayLike) -> Array:
    """Exact Shapley values (m,) of a game given as v of all 2^m coalitions (bit i: player i).

    They sum to v(all) - v(∅). Raises `InputError` unless there are 2^m values. O(m 2^m).

    >>> shapley_values([0.0, 1.0, 2.0, 5.0]).tolist()
    [2.0, 3.0]
    """
    v = np.asarray(values, dtype=np.float64)
    m = max(v.size.bit_length() - 1, 0)
    require(v.ndim == 1 and v.size == 2**m > 1, "values", f"shape {v.shape}", "(2^m,), m ≥ 1")
    coalitions = np.arange(2**m)
    size = ((coalitions[:, None] >> np.arange(m)) & 1).sum(axis=1)
    weight = np.array([1 / (m * comb(m - 1, s)) if s < m else 0.0 for s in range(m + 1)])
    out = np.empty(m)
    for i in range(m):
        without = coalitions[(coalitions >> i) & 1 == 0]
        out[i] = weight[size[without]] @ (v[without + 2**i] - v[without])
    return out


def value_shares(values: ArrayLike) -> Array:
    """Shares in proportion to the positive values; uniform where none is positive.

    >>> value_shares([3.0, 1.0, -2.0]).tolist()
    [0.75, 0.25, 0.0]
    """
    positive = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
    total = positive.sum()
    return positive / total if total > 0 else np.full(len(positive), 1 / len(positive))


def random_mixtures(runs: MixtureRuns, n: int, count: int, rng: Rng) -> Array:
    """`count` mixtures uniform on the part of the simplex the pilots have rows for at size n."""
    require(count >= 1, "trials", count, "1 or more")
    random = generator(rng)
    found = np.empty((0, runs.m))
    for _ in range(1000):
        drawn = random.dirichlet(np.ones(runs.m), size=4 * count)
        found = np.vstack([found, drawn[runs.feasible(drawn, n)]])
        if len(found) >= count:
            return found[:count]
    came = f"{n} for pilots of {runs.sizes.tolist()} rows"
    raise InputError(f"sizes: got {came}, want sizes the pilots have rows for")
