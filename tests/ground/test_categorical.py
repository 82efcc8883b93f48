"""Categorical draws are exact: frequencies, rare tokens, ties, and rows that can't be drawn.

Every chi-square test has a fixed seed and a false-alarm rate of 1e-4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from scoredraw import categorical
from scoredraw.categorical import draw, gumbel, invert, normalize, truncate
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

KINDS = ("array", "tensor")
P = np.array([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
logits = st.lists(st.floats(-30, 30), min_size=2, max_size=12)


def as_kind(values: Any, kind: str) -> Any:
    if kind == "array":
        return np.asarray(values)
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    return torch.tensor(np.asarray(values))


def fits(tokens: Any, p: Any) -> bool:
    counts = np.bincount(np.asarray(tokens), minlength=len(p))
    assert counts[p == 0].sum() == 0
    return chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_of_both_ways_of_drawing(kind: str) -> None:
    rows = as_kind(np.log(np.tile(P, (200_000, 1))), kind)
    u = np.random.default_rng(0).random(200_000)
    assert fits(invert(rows, u), P)
    if kind == "tensor":
        import torch

        assert fits(draw(rows, torch.Generator().manual_seed(0)), P)
    else:
        assert fits(draw(rows, 0), P)
    flat = np.full(6, 1 / 6)
    assert not fits(invert(rows, u), flat)  # the test can fail


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_is_the_inverse_of_the_cumulative_probability(kind: str) -> None:
    x = as_kind(np.log(P), kind)
    steps = np.cumsum(P)
    for token in range(6):
        inside = as_kind(np.tile(np.log(P), (3, 1)), kind)
        low = steps[token] - P[token]
        u = np.array([low + 1e-9, low + P[token] / 2, steps[token] - 1e-9])
        assert np.asarray(invert(inside, u)).tolist() == [token] * 3
    assert int(invert(x, np.array(0.0))) == 0
    assert int(invert(x, np.array(1 - 2**-53))) == 5
    hollow = as_kind([-np.inf, 0.0, -np.inf, 0.0, -np.inf], kind)
    assert int(invert(hollow, np.array(0.0))) == 1  # never a token of probability 0
    assert int(invert(hollow, np.array(1 - 2**-53))) == 3


def test_rare_tokens_keep_their_share_which_float32_takes_from_them() -> None:
    """Half the mass on one token, 50,000 more of 1.4 units of float32 each (0.4% in all).

    Summed in float32, each of their steps is rounded to one unit: they lose over a quarter.
    """
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    rare, unit, n = 50_000, 2.0**-24, 1_000_000
    mass = rare * 1.4 * unit
    p = torch.cat([torch.tensor([1 - mass], dtype=torch.float64),
                   torch.full((rare,), 1.4 * unit, dtype=torch.float64)])  # fmt: skip
    u = np.random.default_rng(1).random(n)
    share = np.array([1 - mass, mass])
    assert fits(np.asarray(invert(p.log(), u)) > 0, share)
    steps = p.float().numpy().cumsum(dtype=np.float32)
    coarse = np.searchsorted(steps, u.astype(np.float32) * steps[-1], side="right") > 0
    assert not fits(coarse, share)
    assert coarse.mean() < 0.8 * mass


def test_no_noise_of_float32_reaches_a_token_of_one_in_a_billion() -> None:
    """The race needs log-odds of -21: float32 spans 19.5 of them, float64 over 43."""
    log_odds = np.log(1e-9)
    most = np.nextafter(np.float32(1), np.float32(0))  # the largest and least of 24-bit uniforms
    span = [-np.log(-np.log(np.float32(u))) for u in (most, 2.0**-24)]
    assert span[0] - span[1] < -log_odds
    for u, winner in [((2.0**-24, float(most)), 0), ((2.0**-53, 1 - 2.0**-53), 1)]:
        noise = -np.log(-np.log(np.array(u)))
        assert (np.array([0.0, log_odds]) + noise).argmax() == winner


class Fixed:
    """A generator that says what it was told to."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float64)

    def random(self, shape: Any) -> Any:
        return np.broadcast_to(self.values, shape)


def test_the_race_uses_all_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(categorical, "numpy_generator", lambda rng: Fixed([2.0**-53, 1 - 2.0**-53]))
    assert draw(np.log([1.0, 1e-9])) == 1
    monkeypatch.setattr(categorical, "numpy_generator", lambda rng: Fixed([0.0, 1 - 2.0**-53]))
    noise = gumbel((2,))
    assert np.isfinite(noise).all()  # even of u = 0
    assert noise[1] > 36


@pytest.mark.parametrize("kind", KINDS)
def test_gumbel_noise_has_its_distribution(kind: str) -> None:
    from scipy.stats import gumbel_r, kstest

    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    rng = 3 if kind == "array" else torch.Generator().manual_seed(3)
    noise = np.asarray(gumbel((100_000,), rng))
    assert noise.dtype == np.float64
    assert kstest(noise, gumbel_r.cdf).pvalue > 1e-4


@given(x=logits, kind=st.sampled_from(KINDS))
def test_log_probabilities_sum_to_one(x: list[float], kind: str) -> None:
    out = np.asarray(normalize(as_kind(x, kind)))
    assert out.dtype == np.float64
    assert np.exp(out).sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(out - out[0], np.array(x) - x[0], atol=1e-12)


def test_half_precision_is_normalised_in_double() -> None:
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    x = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = normalize(x).exp().sum(-1)
    assert float((total - 1).abs().max()) < 1e-12


# ---- what is cut off -----------------------------------------------------------------------------


def kept(values: Any, kind: str, **how: Any) -> list[float]:
    return np.exp(np.asarray(truncate(as_kind(values, kind), **how))).round(12).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_each_rule(kind: str) -> None:
    x = np.log([0.3, 0.5, 0.2])
    assert kept(x, kind) == [0.3, 0.5, 0.2]
    assert kept(x, kind, temperature=0) == [0, 1, 0]
    squares = np.array([0.09, 0.25, 0.04])
    assert kept(x, kind, temperature=0.5) == (squares / 0.38).round(12).tolist()
    assert kept(x, kind, top_k=2) == [0.375, 0.625, 0]
    assert kept(x, kind, top_k=9) == [0.3, 0.5, 0.2]
    assert kept(x, kind, top_p=0.5) == [0, 1, 0]  # half is held by the first
    assert kept(x, kind, top_p=0.51) == [0.375, 0.625, 0]
    assert kept(x, kind, top_p=1e-300) == [0, 1, 0]
    assert kept(x, kind, min_p=0.6) == [0.375, 0.625, 0]  # 0.3 = 0.6 · 0.5
    assert kept(x, kind, min_p=0.61) == [0, 1, 0]
    both = kept(x, kind, temperature=0.5, top_k=2, top_p=0.7)
    assert both == [0, 1, 0]  # 0.25 / 0.34 > 0.7: each rule reads what the one before it left


@pytest.mark.parametrize("kind", KINDS)
def test_ties(kind: str) -> None:
    even = np.zeros(10)
    for share in range(1, 10):  # exact boundaries, that sums of 0.1 miss by a rounding
        assert np.count_nonzero(kept(even, kind, top_p=share / 10)) == share
    assert kept(even, kind, top_p=0.3)[:4] == [round(1 / 3, 12)] * 3 + [0]  # the first of equals
    assert kept([1.0, 2.0, 2.0], kind, temperature=0) == [0, 1, 0]
    assert kept([0.0, 1.0, 1.0], kind, top_k=1) == [0, 0.5, 0.5]  # equals of the last stay
    assert kept(np.log([0.6, 0.3, 0.1]), kind, min_p=0.5)[1] > 0  # 0.3 = 0.5 · 0.6, but for bits


@given(x=logits, top_p=st.floats(0.01, 1), temperature=st.floats(0.05, 5), data=st.data())
def test_the_nucleus_is_the_smallest_that_holds_its_share(
    x: list[float], top_p: float, temperature: float, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    whole = np.exp(np.asarray(truncate(as_kind(x, kind), temperature=temperature)))
    cut = np.asarray(truncate(as_kind(x, kind), temperature=temperature, top_p=top_p))
    stays = np.isfinite(cut)
    assert whole[stays].sum() >= top_p - 1e-9
    if stays.sum() > 1:
        assert whole[stays].sum() - whole[stays].min() < top_p + 1e-9
    if not stays.all():
        assert whole[stays].min() >= whole[~stays].max()
    other = np.asarray(truncate(np.array(x), temperature=temperature, top_p=top_p))
    np.testing.assert_allclose(cut, other, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_temperatures_and_logits(kind: str) -> None:
    x = [5.0, 700.0, -1e300, -np.inf]
    assert kept(x, kind, temperature=1e-310) == [0, 1, 0, 0]
    assert kept(x, kind, temperature=1e300)[3] == 0  # what can't be drawn stays so
    assert kept([1e300, 1e300], kind) == [0.5, 0.5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_rows_that_cannot_be_drawn(kind: str, bad: list[float]) -> None:
    rows = as_kind([[0.0, 0.0], bad], kind)
    for what in (normalize, draw, truncate, lambda x: truncate(x, temperature=0),
                 lambda x: truncate(x, temperature=0.5, top_p=0.5)):  # fmt: skip
        with pytest.raises(InputError, match=r"^logits: got NaN, \+inf, or a row of -inf, want"):
            what(rows)
    half = as_kind([[0.0, -np.inf], [-np.inf, 0.0]], kind)
    assert np.asarray(draw(half)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", np.nan), ("temperature", np.inf), ("top_k", -1),
     ("top_p", 0.0), ("top_p", 1.1), ("top_p", np.nan), ("min_p", -0.1), ("min_p", 1.0)],
)  # fmt: skip
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}: got"):
        truncate(np.zeros(3), **{name: value})


def test_tensors_are_drawn_with_a_generator_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    with pytest.raises(InputError, match=r"^rng: got int, want a torch.Generator or None"):
        draw(torch.zeros(3), 0)
    x = torch.zeros(1000, 5)
    one, two = (draw(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert bool((one == two).all())
    np.testing.assert_array_equal(draw(np.zeros((50, 5)), 4), draw(np.zeros((50, 5)), 4))


def test_on_a_gpu_too() -> None:
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    rows = torch.log(torch.tensor(P, device="cuda")).expand(200_000, 6)
    u = np.random.default_rng(0).random(200_000)
    assert fits(draw(rows, torch.Generator("cuda").manual_seed(0)).cpu(), P)
    assert fits(draw(rows, torch.Generator().manual_seed(0)).cpu(), P)
    np.testing.assert_array_equal(invert(rows, u).cpu(), invert(rows.cpu(), u))
    cut = truncate(rows[:1], temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)
    want = truncate(rows[:1].cpu(), temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)
    np.testing.assert_allclose(cut.cpu(), want, atol=1e-12)
