"""What samples cost: sums over tokens spelled out, prices, and the price of a coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.language.coverage import coverage_curve, extrapolate_coverage
from scoredraw.language.coverage_models import BetaBinomial, PowerLaw
from scoredraw.language.inference_cost import (
    api_price,
    cost_to_reach,
    flops_per_token,
    inference_flops,
)

SMALL = st.integers(0, 40)


@pytest.mark.oracle
def test_operations_of_the_published_size() -> None:
    got = inference_flops(8.0e9, layers=32, d_model=4096, prompt=100, decode=10, samples=2)
    assert got == 1_923_753_902_080
    assert isinstance(got, float)


@pytest.mark.property
@given(st.integers(0, 10**6), SMALL, SMALL, SMALL, SMALL, SMALL)
def test_operations_are_the_sum_over_tokens(
    params: int, layers: int, width: int, prompt: int, decode: int, samples: int
) -> None:
    def at(t: int) -> int:
        return 2 * (params + 2 * layers * width * t)

    read = sum(at(t) for t in range(1, prompt + 1))
    written = sum(at(prompt + t) for t in range(1, decode + 1))
    want = read + samples * written
    assert inference_flops(params, layers, width, prompt, decode, samples) == want
    assert flops_per_token(params, layers, width, prompt) == at(prompt)


@pytest.mark.oracle
def test_arrays_broadcast() -> None:
    got = inference_flops([1e9, 8e9], [[16], [32]], 2048, 100, 10, 3)
    assert got.shape == (2, 2)
    assert got[1, 0] == inference_flops(1e9, 32, 2048, 100, 10, 3)
    prices = api_price([0, 1, 5], 100, 10, input_price=1, output_price=2, cached_price=0)
    assert prices.tolist() == [0, 120, 200]


@pytest.mark.oracle
def test_prices() -> None:
    price: dict[str, Any] = {"input_price": 3e-6, "output_price": 15e-6}
    assert api_price(7, 1000, 200, **price) == pytest.approx(7 * (0.003 + 0.003))
    # a cache that costs as much as none; one that is free
    same = api_price(7, 1000, 200, **price, cached_price=3e-6)
    assert same == pytest.approx(api_price(7, 1000, 200, **price))
    free = api_price(7, 1000, 200, **price, cached_price=0)
    assert free == pytest.approx(0.003 + 7 * 0.003)


@pytest.mark.oracle
def test_the_price_of_a_coverage() -> None:
    law, betas = PowerLaw(-2.0, -0.5), BetaBinomial(0.4, 3.0)
    curve = coverage_curve((64, [1, 5, 20, 64]))
    for model in (law, betas, curve):
        reach = cost_to_reach(model, 0.7, lambda k: 3 * k + 1)
        k = reach.samples.value
        assert k == math.ceil(model.k_for(0.7))
        assert reach.cost.value == 3 * k + 1
        assert math.isnan(reach.cost.low)
    assert law.coverage([k := cost_to_reach(law, 0.9, float).samples.value])[0] >= 0.9
    assert law.coverage([k - 1])[0] < 0.9


@pytest.mark.oracle
def test_an_exact_hit_takes_no_sample_more() -> None:
    law = PowerLaw(-2.0, -0.5)
    for k in (1, 7, 100, 12_345):
        assert cost_to_reach(law, float(law.coverage([k])[0]), float).samples.value == k


@pytest.mark.oracle
def test_intervals_of_k_become_intervals_of_cost() -> None:
    rng = np.random.default_rng(0)
    c = rng.binomial(30, rng.beta(0.6, 3.0, size=80))
    curve = extrapolate_coverage(30, c, [30, 1000], resamples=200)
    reach = cost_to_reach(curve, 0.95, lambda k: 0.5 * k)
    assert reach.samples.low < reach.samples.value < reach.samples.high
    assert reach.cost.high == 0.5 * reach.samples.high
    assert reach.cost.n == reach.samples.n == 80


@pytest.mark.oracle
def test_what_is_out_of_reach_has_no_finite_price() -> None:
    curve = coverage_curve((8, [0, 0, 3, 8]))
    reach = cost_to_reach(curve, 0.9, float)
    assert reach.samples.value == reach.cost.value == math.inf


@pytest.mark.oracle
def test_bad_input() -> None:
    for name in ("params", "layers", "d_model", "prompt", "decode", "samples"):
        good = dict.fromkeys(("params", "layers", "d_model", "prompt", "decode", "samples"), 1.0)
        for wrong in (-1.0, math.nan, math.inf):
            with pytest.raises(InputError, match=f"{name}: got {wrong}"):
                inference_flops(**(good | {name: wrong}))
    with pytest.raises(InputError, match="cached_price: got -1"):
        api_price(1, 1, 1, input_price=1, output_price=1, cached_price=-1)
    for target in (0, 1, 1.5, math.nan):
        with pytest.raises(InputError, match="target"):
            cost_to_reach(PowerLaw(-1.0, -1.0), target, float)
