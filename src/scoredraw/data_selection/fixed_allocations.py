r"""Collecting by a fixed rule: equal numbers, population shares, or where we know least.

Rules that look at no learning curve, and what an allocation by marginal gain has to beat. Each is
a ratio q of the groups' sizes, scaled to the budget: n_g = clip(t q_g, n_g⁰, pool_g) with t such
that Σ c_g n_g = B. Sizes are real numbers.

Cai et al. 2022, arXiv 2202.01327; Neyman, 1934, "On the two different aspects of the
representative method".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.group_utilities import numbers
from scoredraw.errors import require

Float = NDArray[np.float64]

CENT = 1e-12  # the share of a budget that rounding may overspend


def equal_allocation(
    costs: ArrayLike, budget: float, *, n0: ArrayLike = 0, pool: ArrayLike | None = None
) -> Float:
    """As many examples of each group: n_g = B / Σ c, float64 (G,).

    A group that holds more than that keeps it (n0), one whose pool ends before gets it all, and
    the others share the rest. Raises InputError as `allocate`. O(G²) time, as the rules below.

    >>> equal_allocation([1, 2, 3], 60).tolist()
    [10.0, 10.0, 10.0]
    """
    return proportional_allocation(np.ones(np.size(costs)), costs, budget, n0=n0, pool=pool)


def proportional_allocation(
    shares: ArrayLike,
    costs: ArrayLike,
    budget: float,
    *,
    n0: ArrayLike = 0,
    pool: ArrayLike | None = None,
    inverse: bool = False,
) -> Float:
    """In proportion to the groups' shares of the population: n_g = s_g B / Σ s c, float64 (G,).

    It is what collecting whoever comes does on average. shares: (G,) 0 or more, on any scale; a
    single one above 0 collects that group alone.
    inverse: in proportion to 1 / s_g. n0 and pool as in `equal_allocation`. Raises InputError.

    >>> proportional_allocation([3, 1], [1, 1], 100).tolist()
    [75.0, 25.0]
    >>> proportional_allocation([3, 1], [1, 1], 100, n0=[10, 40]).tolist()
    [60.0, 40.0]
    """
    price, held, most = budget_terms(costs, budget, n0, pool)
    ratio = numbers(shares, "shares", len(price))
    good = (ratio > 0) if inverse else (ratio >= 0)
    wanted = "above 0" if inverse else "0 or more"
    require(bool(good.all()), "shares", f"{ratio.min():g}", wanted)
    require(bool(ratio.any()), "shares", "all 0", "one above 0")
    ratio = 1 / ratio if inverse else ratio / ratio.max()
    live = ratio > 0
    # Σ c clip(t q, n0, pool) is a broken line in t, known at its corners.
    ends = np.concatenate([held[live] / ratio[live], most[live] / ratio[live], [0.0]])
    corners = np.unique(ends[np.isfinite(ends)])
    spent = np.clip(corners[:, None] * ratio, held, most) @ price
    if budget < spent[-1]:
        t = float(np.interp(budget, spent, corners))
    else:
        rate = float(price @ np.where(np.isinf(most), ratio, 0.0))
        t = float(corners[-1]) + ((budget - spent[-1]) / rate if rate > 0 else 0.0)
    return np.asarray(np.clip(t * ratio, held, most))


def uncertainty_allocation(
    deviations: ArrayLike,
    costs: ArrayLike,
    budget: float,
    *,
    n0: ArrayLike = 0,
    pool: ArrayLike | None = None,
) -> Float:
    """Where we know least: n_g ∝ σ_g / √c_g, which makes Σ σ_g² / n_g least (Neyman, 1934).

    deviations: (G,) standard deviations of one example's score in each group. Others as in
    `equal_allocation`. -> float64 (G,). Raises InputError.

    >>> uncertainty_allocation([0.3, 0.1], [1, 1], 100).round(6).tolist()
    [75.0, 25.0]
    """
    price, _, _ = budget_terms(costs, budget, n0, pool)
    spread = numbers(deviations, "deviations", len(price))
    require(bool((spread >= 0).all()), "deviations", f"{spread.min():g}", "0 or more")
    ratio = spread / np.sqrt(price)
    return proportional_allocation(ratio, price, budget, n0=n0, pool=pool)


def budget_terms(
    costs: ArrayLike, budget: float, n0: ArrayLike, pool: ArrayLike | None
) -> tuple[Float, Float, Float]:
    """Costs, what is held and what exists, (G,) each; InputError unless B pays for what is held."""
    groups = int(np.size(costs))
    require(groups >= 1, "costs", "none", "one a group")
    price, held = numbers(np.ravel(costs), "costs", groups), numbers(n0, "n0", groups)
    require(bool((price > 0).all()), "costs", f"{price.min():g}", "above 0")
    require(bool((held >= 0).all()), "n0", f"{held.min():g}", "0 or more")
    require(math.isfinite(budget), "budget", budget, "a finite amount")
    paid = float(price @ held)
    require(paid <= budget * (1 + CENT), "budget", budget, f"{paid:g} or more, for what is held")
    most = np.full(groups, math.inf)
    if pool is not None:
        most = np.asarray(pool, np.float64)
        finite = np.where(np.isinf(most), 0.0, most)  # inf: without end
        numbers(finite, "pool", groups)
        require(bool((most >= held).all()), "pool", "less than is held", "n0 or more")
    return price, held, np.asarray(most, np.float64)
