"""What k samples cost, in arithmetic or in money, and what it costs to reach a coverage.

A token at context length t takes about two operations for each parameter and for each number of
the keys and values that it attends to, F(t) = 2 (N + 2 L d t). The prompt is processed once,
the decoding is paid for by every sample:

    total = Σ_{t=1..P} F(t) + k Σ_{t=1..D} F(P + t)

Brown, Juravsky, Ehrlich, Clark, Le, Ré and Mirhoseini, "Large language monkeys: scaling inference
compute with repeated sampling", 2024, arXiv 2407.21787, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require
from scoredraw.metrics import Estimate

Float = NDArray[np.float64]


class ReachesCoverage(Protocol):
    """A curve or a model that knows at which k it reaches a coverage."""

    def k_for(self, target: float) -> Any: ...


def flops_per_token(
    params: ArrayLike, layers: ArrayLike, d_model: ArrayLike, context: ArrayLike
) -> Any:
    """Floating point operations of one token at a context length: 2 (N + 2 L d t).

    params N, layers L, width d_model d, context t in tokens: numbers or arrays that broadcast.
    -> float, or float64 of their shape. Raises InputError for what is negative or not finite.

    >>> flops_per_token(8e9, 32, 4096, 1000)
    16524288000.0
    """
    n, depth, width, t = _amounts(params=params, layers=layers, d_model=d_model, context=context)
    return _plain(2 * (n + 2 * depth * width * t))


def inference_flops(
    params: ArrayLike,
    layers: ArrayLike,
    d_model: ArrayLike,
    prompt: ArrayLike,
    decode: ArrayLike,
    samples: ArrayLike,
) -> Any:
    """Floating point operations of `samples` answers to one prompt, which is processed once.

    Σ_{t=1..P} F(t) + k Σ_{t=1..D} F(P+t)
        = 2N (P + kD) + 4Ld [ P(P+1)/2 + k (DP + D(D+1)/2) ]

    prompt P and decode D in tokens, samples k; numbers or arrays that broadcast. For answers of
    different lengths give `decode` as an array, samples=1, and add up, less the prompts.
    -> float, or float64 of their shape. Raises InputError for what is negative or not finite.
    Brown et al. 2024, arXiv 2407.21787, section 2.3. O(1) a value, whatever the number of tokens.

    >>> f"{inference_flops(8e9, 32, 4096, prompt=100, decode=10, samples=2):.0f}"
    '1923753902080'
    """
    n, depth, width = _amounts(params=params, layers=layers, d_model=d_model)
    p, d, k = _amounts(prompt=prompt, decode=decode, samples=samples)
    tokens = p + k * d
    positions = p * (p + 1) / 2 + k * (d * p + d * (d + 1) / 2)
    return _plain(2 * n * tokens + 4 * depth * width * positions)


def api_price(
    samples: ArrayLike,
    input_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    input_price: ArrayLike,
    output_price: ArrayLike,
    cached_price: ArrayLike | None = None,
) -> Any:
    """The price of k samples from an interface that charges for tokens.

    k (in · p_in + out · p_out); with a prompt cache the prompt is paid for in full once and at
    `cached_price` after that (0 where repeats are free): in (p_in + (k-1) p_cached) + k out p_out.

    input_tokens and output_tokens of one sample; prices of one token, in any currency; numbers or
    arrays that broadcast. No samples cost nothing.
    -> float, or float64 of their shape. Raises InputError for what is negative or not finite.
    Brown et al. 2024, arXiv 2407.21787, section 2.3.

    >>> price = {"input_price": 3e-6, "output_price": 15e-6}
    >>> round(api_price(100, 2000, 500, **price), 6)
    1.35
    >>> round(api_price(100, 2000, 500, **price, cached_price=0.3e-6), 6)
    0.8154
    """
    k, into, out = _amounts(samples=samples, input_tokens=input_tokens, output_tokens=output_tokens)
    price_in, price_out = _amounts(input_price=input_price, output_price=output_price)
    if cached_price is None:
        prompts = k * price_in
    else:
        (again,) = _amounts(cached_price=cached_price)
        prompts = np.where(k > 0, price_in + np.maximum(k - 1, 0) * again, 0.0)
    return _plain(into * prompts + k * out * price_out)


@dataclass(frozen=True)
class ReachCost:
    """The samples a problem needs for a coverage, and their cost, each with its interval.

    `samples` are whole numbers, or inf where the coverage is out of reach (`cost` is inf then).
    """

    target: float
    samples: Estimate
    cost: Estimate


def cost_to_reach(model: ReachesCoverage, target: float, cost: Callable[[float], Any]) -> ReachCost:
    """What it costs to reach a coverage: cost(k) at the smallest whole k that does.

    model: a CoverageCurve, a PowerLaw or a BetaBinomial, or an ExtrapolatedCoverage, whose
    interval of k becomes one of the cost. cost: a rising function of the number of samples,
    such as `api_price` or `inference_flops` with the rest given.
    Raises InputError for a target outside (0, 1).

    >>> from scoredraw.language.coverage_models import PowerLaw
    >>> reach = cost_to_reach(PowerLaw(-2.0, -0.5), 0.9, lambda k: 0.02 * k)
    >>> print(reach.samples, reach.cost)
    361 7.22
    """
    require(0 < target < 1, "target", target, "a coverage between 0 and 1")
    if hasattr(model, "samples_for"):
        found: Estimate = model.samples_for(target)
    else:
        found = Estimate(float(model.k_for(target)), math.nan, math.nan, 0)
    k, low, high = (_whole(end) for end in (found.value, found.low, found.high))
    price, least, most = (float(cost(k)) if math.isfinite(k) else k for k in (k, low, high))
    samples, money = Estimate(k, low, high, found.n), Estimate(price, least, most, found.n)
    return ReachCost(target, samples, money)


def _whole(k: float) -> float:
    """The next whole number; what is a rounding error above one is that one."""
    return float(math.ceil(k * (1 - 1e-12))) if math.isfinite(k) else k


def _amounts(**given: ArrayLike) -> list[Float]:
    amounts = []
    for name, value in given.items():
        amount = np.asarray(value, np.float64)
        good = np.isfinite(amount) & (amount >= 0)
        require(bool(good.all()), name, amount[~good][:1].sum(), "0 or more, and finite")
        amounts.append(amount)
    return amounts


def _plain(value: Any) -> Any:
    return value if np.ndim(value) else float(value)
