"""What few bits of noise do to a categorical draw: laws against enumeration and simulation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from scoredraw.diffusion.low_precision import (
    NOISE_BITS,
    effective_temperature,
    entropy,
    grid_categorical_probs,
    least_noise,
    noise_bits,
    on_grid,
    race,
    rare_share,
    sample_categorical,
    truncated_categorical_probs,
    unmasking_probs,
)
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

TOY = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


def zipf(size: int) -> np.ndarray:
    p = 1 / (np.arange(1, size + 1) + 2.7)
    return p / p.sum()


def token_entropy(law: np.ndarray) -> float:
    """Of the token, given that it is not the mask, which is last."""
    return entropy(law[:-1] / law[:-1].sum())


def test_the_least_noise() -> None:
    assert {name: noise_bits(name) for name in NOISE_BITS} == NOISE_BITS
    gumbel = {name: -np.log(least_noise(name)) for name in NOISE_BITS}
    want = {"float64": 36.74, "float32": 16.64, "float16": 7.62, "bfloat16": 5.54}
    assert gumbel == pytest.approx(want, abs=0.01)


# ── truncation ──────────────────────────────────────────────────────────────────────────────────


def test_truncation_against_simulation() -> None:
    """200,000 draws of δ + Exp(1); false alarm 1e-3 each, and the exact law is refused."""
    rng = np.random.default_rng(0)
    for delta in (0.02, 0.1, 0.2):
        arrivals = (delta + rng.exponential(size=(200_000, 5))) / TOY
        found = np.bincount(arrivals.argmin(axis=1), minlength=5)
        law = truncated_categorical_probs(TOY, delta=delta)
        assert chisquare(found, law * 200_000).pvalue > 1e-3
        assert chisquare(found, TOY * 200_000).pvalue < 1e-9


def test_truncation_sums_to_one_keeps_places_and_has_its_limits() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(60, 0.2), size=4)
    p[:, 7] = 0
    p /= p.sum(axis=1, keepdims=True)
    for delta in (0.0, 1e-9, 1e-3, 0.3, 50.0):
        law = truncated_categorical_probs(p, delta=delta)
        np.testing.assert_allclose(law.sum(axis=1), 1, atol=1e-12)
        assert (law[:, 7] == 0).all()
        assert (law[np.arange(4), p.argmax(axis=1)] >= p.max(axis=1) - 1e-12).all()
    np.testing.assert_allclose(truncated_categorical_probs(p, delta=0.0), p, atol=1e-14)
    np.testing.assert_allclose(truncated_categorical_probs(p, "float64"), p, atol=1e-14)
    order = rng.permutation(60)
    turned = truncated_categorical_probs(p[:, order], 11)
    np.testing.assert_allclose(turned, truncated_categorical_probs(p, 11)[:, order], atol=1e-14)
    assert truncated_categorical_probs(p[0], delta=50.0).max() > 1 - 1e-12


@pytest.mark.filterwarnings("error")
def test_a_class_so_rare_that_its_start_overflows_takes_nothing_from_the_others() -> None:
    for rare in (1e-310, 5e-324):
        law = truncated_categorical_probs([0.6, 0.4, rare], "bfloat16")
        np.testing.assert_allclose(law, truncated_categorical_probs([0.6, 0.4, 0], "bfloat16"))
        assert grid_categorical_probs([1.0, rare], 8, dominated=True).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("steps", "from_one", "from_half", "grid"),
    [
        (16, 8.09, 8.18, 8.17), (64, 7.69, 7.94, 7.92), (256, 6.92, 7.33, 7.24),
        (1024, 6.07, 6.50, 6.40), (4096, 5.20, 5.64, 5.53), (16384, 4.29, 4.75, 4.62),
        (50_000, 3.53, 4.01, 3.86),
    ],
)  # fmt: skip
def test_entropy_of_a_zipf_vocabulary_in_float32(
    steps: int, from_one: float, from_half: float, grid: float
) -> None:
    """An ancestral step from t = 1 and 1/2; true entropy 8.264. To the two decimals given."""
    p = zipf(50_257)
    assert entropy(p) == pytest.approx(8.264, abs=5e-4)
    one, half = unmasking_probs(p, 1 / steps), unmasking_probs(p, 2 / steps)
    assert token_entropy(truncated_categorical_probs(one, 24)) == pytest.approx(from_one, abs=6e-3)
    assert token_entropy(truncated_categorical_probs(half, 24)) == pytest.approx(
        from_half, abs=6e-3
    )
    law = grid_categorical_probs(one, 24, dominated=True)
    assert token_entropy(law) == pytest.approx(grid, abs=6e-3)


def test_a_direct_draw_is_nearly_immune() -> None:
    p = zipf(50_257)
    for bits, want in ((24, 8.253), (11, 5.16), (8, 4.03)):
        assert entropy(truncated_categorical_probs(p, bits)) == pytest.approx(want, abs=6e-3)
    assert entropy(truncated_categorical_probs(p, "float64")) == pytest.approx(8.264, abs=5e-4)


# ── the grid ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("probs", [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.7, 0.3, 0.0], [1 / 3] * 3])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_law_is_the_enumerated_race(probs: list[float], bits: int) -> None:
    """All (2^b - 1)³ noises; equals go to the first class, as in argmax."""
    u = np.array(list(itertools.product(np.arange(1, 2**bits) / 2**bits, repeat=3)))
    with np.errstate(divide="ignore"):
        winners = race(np.log(probs), u)
    want = np.bincount(winners, minlength=3) / len(u)
    np.testing.assert_allclose(grid_categorical_probs(probs, bits), want, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 12])
def test_the_grid_law_is_what_is_drawn(bits: int) -> None:
    """200,000 draws; false alarm 1e-3 each, and the exact law is refused at 8 bits."""
    logits = np.broadcast_to(np.log(unmasking_probs(TOY, 1 / 16)), (200_000, 6))
    found = np.bincount(sample_categorical(logits, bits, rng=0), minlength=6)
    law = grid_categorical_probs(unmasking_probs(TOY, 1 / 16), bits)
    assert chisquare(found, 200_000 * law).pvalue > 1e-3
    if bits == 8:
        assert chisquare(found, 200_000 * unmasking_probs(TOY, 1 / 16)).pvalue < 1e-9


def test_a_rare_class_beside_one_that_dominates() -> None:
    """Its share a/(e^a - 1), against the exact law at 12 bits, where it is 0.2 of the truth."""
    race_ = unmasking_probs(zipf(2000), 1 / 64)
    exact = grid_categorical_probs(race_, 12)
    near = grid_categorical_probs(race_, 12, dominated=True)
    assert (1 - exact[-1]) * 64 < 0.25
    shown = 1 - exact[-1]
    assert 1 - near[-1] == pytest.approx(shown, rel=0.01)
    assert abs(near - exact)[:-1].sum() / 2 < 0.01 * shown  # in total variation of the tokens
    assert rare_share([1e-12, 1.0, 800.0]) == pytest.approx([1.0, 1 / np.expm1(1.0), 0.0])


def test_float32_in_an_ancestral_step_of_4096() -> None:
    """Zipf 1 .. 2000 at t = 1: the share of tokens shown, and the likeliest among them."""
    p = zipf(2000)
    step = unmasking_probs(p, 1 / 4096)
    cut = truncated_categorical_probs(step, 24)
    grid = grid_categorical_probs(step, 24, dominated=True)
    assert [4096 * (1 - law[-1]) for law in (cut, grid)] == pytest.approx([0.731, 0.815], abs=5e-4)
    first = [law[0] / (1 - law[-1]) for law in (cut, grid)]
    assert first == pytest.approx([0.0571, 0.0514], abs=5e-5)
    assert p[0] == pytest.approx(0.0420, abs=5e-5)


def test_grid_and_truncation_agree_in_order() -> None:
    p = zipf(300)
    for bits in (6, 8, 10, 12):
        lost = [entropy(p) - entropy(f(p, bits)) for f in (
            truncated_categorical_probs, grid_categorical_probs)]  # fmt: skip
        assert lost[0] > lost[1] > 0


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────


def test_exact_noise_passes_where_truncated_noise_fails() -> None:
    """Five classes, 50,000 draws: p > 1e-3 (false alarm 1e-3), and p < 1e-9 with δ = 0.02."""
    logits = np.broadcast_to(np.log(TOY), (50_000, 5))
    found = np.bincount(sample_categorical(logits, rng=0), minlength=5)
    assert chisquare(found, 50_000 * TOY).pvalue > 1e-3
    cut = np.exp(-0.02) * np.random.default_rng(0).random((50_000, 5))  # -log u = 0.02 + Exp(1)
    found = np.bincount(race(np.log(TOY), cut), minlength=5)
    assert chisquare(found, 50_000 * TOY).pvalue < 1e-9
    law = truncated_categorical_probs(TOY, delta=0.02)
    assert chisquare(found, 50_000 * law).pvalue > 1e-3


def test_tensors_are_drawn_as_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.from_numpy(np.log(TOY)).expand(100_000, 5)
    source = torch.Generator().manual_seed(0)
    for noise, law in (("float64", TOY), (8, grid_categorical_probs(TOY, 8))):
        found = torch.bincount(sample_categorical(logits, noise, source), minlength=5).numpy()
        assert chisquare(found, 100_000 * law).pvalue > 1e-3
    assert noise_bits(torch.bfloat16) == 8
    with pytest.raises(InputError, match="rng: got int"):
        sample_categorical(logits, 8, 0)


def test_the_grid_has_neither_end() -> None:
    for bits in (2, 8, 24, 53):
        low, high = on_grid(np.array([0.0, 1 - 2.0**-53]), bits)
        assert low == 2.0**-bits
        assert high == 1 - 2.0**-bits


def test_float32_of_torch_is_on_this_grid() -> None:
    """What `torch.rand` gives, which the law assumes: multiples of 2^-24, none of them 1."""
    torch = pytest.importorskip("torch")
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).double() * 2**24
    assert torch.equal(u, u.round())
    assert u.max() < 2**24


# ── temperature ─────────────────────────────────────────────────────────────────────────────────


def test_the_effective_temperature() -> None:
    p = zipf(500)
    for T in (0.3, 1.0, 2.5):
        q = p ** (1 / T)
        assert effective_temperature(p, q / q.sum()) == pytest.approx(T, rel=1e-8)
    found = [
        effective_temperature(p, truncated_categorical_probs(p, bits)) for bits in (6, 8, 11, 16)
    ]
    assert found == sorted(found)
    assert 0.2 < found[0] < found[-1] < 1
    with pytest.raises(InputError, match="drawn: got an entropy of 0"):
        effective_temperature(p, np.eye(500)[0])


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_categorical_probs([0.5, 0.6]), "probs: got a sum off by 0.1"),
        (lambda: truncated_categorical_probs([1.5, -0.5]), "probs: got negative"),
        (lambda: truncated_categorical_probs([np.nan, 1.0]), "probs: got negative, NaN"),
        (lambda: truncated_categorical_probs(0.5), "probs"),
        (lambda: truncated_categorical_probs([1.0], delta=-1.0), "delta: got -1.0"),
        (lambda: grid_categorical_probs([[0.5, 0.5]], 8), "probs: got .1, 2."),
        (lambda: grid_categorical_probs(zipf(50_257), 24), "noise: got .* arrivals of 24 bits"),
        (lambda: noise_bits(1), "noise: got 1, want an integer >= 2"),
        (lambda: noise_bits(54), "noise: got 54"),
        (lambda: noise_bits("int8"), "noise: got 'int8'"),
        (lambda: sample_categorical([np.nan, 0.0]), "logits: got NaN"),
        (lambda: sample_categorical([-np.inf, -np.inf], 8), "row of -inf"),
        (lambda: unmasking_probs([1.0], 0.0), "unmask: got 0.0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
