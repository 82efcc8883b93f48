r"""What a set of groups' performances is worth: from "the mean counts" to "the worst counts".

    sum          U(r) = Σ w_g r_g
    log, sqrt    U(r) = Σ w_g u(r_g)
    crra:η       u(r) = r^(1-η) / (1-η): η = 0 is sum, η = 1 is log, η → ∞ tends to maximin
    maximin      U(r) = min_g r_g; allocations go on with the next lowest (leximin)
    gap:λ        U(r) = Σ w_g r_g - λ (max r - min r)
    a callable   U(r), performances (G,) -> a number

The larger η, the more a gain is worth where performance is low. Atkinson, 1970, "On the
measurement of inequality"; Cai et al. 2022, arXiv 2202.01327.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
UtilityLike = str | Callable[[Float], float]

UTILITIES = "sum, log, sqrt, crra:ETA, maximin, gap:LAMBDA or a callable"
MOST_AVERSE = 100.0  # r^(1-η) of performances above .001 stays a double


@dataclass(frozen=True, eq=False)
class GroupUtility:
    """A utility of G performances; `group_utility` makes one.

    eta: the exponent of a separable one (None for others). floor: below it u goes on along its
    tangent, which keeps it rising and concave where log and roots end.
    """

    name: str
    weights: Float
    eta: float | None = None
    gap: float = 0.0
    joint: Callable[[Float], float] | None = None
    floor: float | None = None

    @property
    def separable(self) -> bool:
        """Whether U is a weighted sum over groups."""
        return self.eta is not None

    def each(self, r: ArrayLike) -> Float:
        """u(r), any shape. Raises InputError for r outside its domain, unless there is a floor."""
        inside, below = self._split(np.asarray(r, np.float64))
        eta = self._eta
        values = np.log(inside) if eta == 1 else inside ** (1 - eta) / (1 - eta)
        return np.asarray(values if self.floor is None else values + below * inside**-eta)

    def slope(self, r: ArrayLike) -> Float:
        """u'(r) = r^-η, any shape."""
        inside, _ = self._split(np.asarray(r, np.float64))
        with np.errstate(divide="ignore"):
            return np.asarray(inside**-self._eta)

    def value(self, r: ArrayLike) -> Float:
        """U of performances (..., G) -> (...)."""
        x = np.asarray(r, np.float64)
        if self.joint is not None:
            flat = [float(self.joint(one)) for one in x.reshape(-1, x.shape[-1])]
            values = np.reshape(flat, x.shape[:-1])
            require(bool(np.isfinite(values).all()), "utility", "NaN or infinity", "finite values")
            return values
        if self.separable:
            return np.asarray(self.each(x) @ self.weights)
        if self.name == "maximin":
            return np.asarray(x.min(-1))
        return np.asarray(x @ self.weights - self.gap * (x.max(-1) - x.min(-1)))

    @property
    def _eta(self) -> float:
        require(self.eta is not None, "utility", self.name, "a weighted sum over groups")
        return float(self.eta or 0)

    def _split(self, r: Float) -> tuple[Float, Float]:
        """Performances raised to the floor, and how far (≤ 0) each lay below it."""
        if self._eta == 0:
            return r, np.zeros_like(r)
        if self.floor is not None:
            return np.maximum(r, self.floor), np.minimum(r - self.floor, 0.0)
        least = r.min(initial=math.inf)
        ok = least >= 0 if self._eta < 1 else least > 0
        wanted = "0 or more" if self._eta < 1 else "above 0"
        require(bool(ok), "performance", f"{least:.4g}", f"{wanted} for {self.name}, or a floor")
        return r, np.zeros_like(r)


def group_utility(
    utility: UtilityLike,
    groups: int,
    weights: ArrayLike | None = None,
    floor: float | None = None,
) -> GroupUtility:
    """A utility of `groups` performances from its name or a callable.

    utility: "sum", "log", "sqrt", "crra:2", "maximin", "gap:0.5", or U(r) of (G,) performances.
    weights: (G,) 0 or more, 1/G each where there are none; not for "maximin" and callables.
    floor: performances below it are valued along the tangent there. Without one, log of 0 or less
    and sqrt of less than 0 raise.

    Raises InputError for an unknown utility, weights that are negative, NaN or all 0, η outside
    [0, 100], λ < 0, a floor not above 0.

    >>> float(group_utility("gap:0.5", 2).value([0.6, 0.8]).round(6))
    0.6
    >>> float(group_utility("crra:2", 2, weights=[1, 1]).value([0.5, 0.25]))
    -6.0
    """
    require(groups >= 1, "groups", groups, "one or more")
    require(floor is None or (0 < floor < math.inf), "floor", floor, "above 0")
    name, number = _named(utility)
    given = np.full(groups, 1 / groups) if weights is None else _weights(weights, groups)
    if name in ("maximin", "callable"):
        require(weights is None, "weights", weights, f"none for {name}")
        joint = utility if callable(utility) else None
        return GroupUtility(name, given, joint=joint, floor=floor)
    if name == "gap":
        return GroupUtility(f"gap:{number:g}", given, gap=number, floor=floor)
    etas = {"sum": 0.0, "log": 1.0, "sqrt": 0.5, "crra": number}
    scale = 0.5 if name == "sqrt" else 1.0  # √r is half of r^(1/2) / (1/2)
    return GroupUtility(str(utility), scale * given, eta=etas[name], floor=floor)


def _named(utility: UtilityLike) -> tuple[str, float]:
    if callable(utility):
        return "callable", math.nan
    name, _, text = str(utility).partition(":")
    try:
        number = float(text) if text else math.nan
    except ValueError:
        raise InputError(f"utility: got {utility!r}, want {UTILITIES}") from None
    known = name in ("sum", "log", "sqrt", "maximin") and not text
    numbered = name in ("crra", "gap") and math.isfinite(number) and number >= 0
    require(known or numbered, "utility", repr(utility), UTILITIES)
    averse = name != "crra" or number <= MOST_AVERSE
    require(averse, "utility", repr(utility), f"an eta of at most {MOST_AVERSE:g}")
    return name, number


def _weights(weights: ArrayLike, groups: int) -> Float:
    given = numbers(weights, "weights", groups)
    require(bool((given >= 0).all()), "weights", f"{given.min():g}", "0 or more")
    require(bool((given > 0).any()), "weights", "all 0", "one above 0")
    return given


def numbers(values: Any, argument: str, groups: int) -> Float:
    """(G,) finite float64 from a number or one a group; InputError otherwise."""
    try:
        given = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{argument}: got what is not numeric, want numbers") from None
    if given.ndim == 0:
        given = np.full(groups, float(given))
    require(given.shape == (groups,), argument, f"shape {given.shape}", f"({groups},)")
    require(bool(np.isfinite(given).all()), argument, "NaN or infinity", "finite numbers")
    return given
