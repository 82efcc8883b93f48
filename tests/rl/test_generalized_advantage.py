"""Advantages of tokens against the recursion, its limits, and what the mask hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.rl.generalized_advantage import generalized_advantage
from scoredraw.rl.token_credit import returns_to_go

pytestmark = pytest.mark.oracle


@st.composite
def batch(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes, (B, T) each."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    number = st.floats(-2, 2, width=32)
    table = st.lists(st.lists(number, min_size=T, max_size=T), min_size=B, max_size=B)
    seen = st.lists(st.booleans(), min_size=T, max_size=T).filter(any)
    mask = torch.tensor(draw(st.lists(seen, min_size=B, max_size=B)))
    rewards, values = (torch.tensor(draw(table), dtype=torch.float64) for _ in "rv")
    return rewards, values, mask


def recursion(r: Tensor, V: Tensor, m: Tensor, gamma: float, lam: float) -> Tensor:
    """Backwards over the tokens that are there, one by one."""
    found = torch.zeros_like(V)
    for i in range(len(V)):
        after, running = 0.0, 0.0
        for t in reversed(m[i].nonzero()[:, 0].tolist()):
            running = float(r[i, t]) + gamma * after - float(V[i, t]) + gamma * lam * running
            found[i, t], after = running, float(V[i, t])
    return found


@pytest.mark.property
@given(batch(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_the_recursion(given_: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    r, V, m = given_
    found = generalized_advantage(r, V, m, gamma, lam)
    want = recursion(r, V, m, gamma, lam)
    assert torch.allclose(found.advantages, want, atol=1e-12)
    assert torch.allclose(found.returns, (want + V) * m, atol=1e-12)
    hidden = torch.where(m, V, torch.nan), torch.where(m, r, torch.inf)
    again = generalized_advantage(hidden[1], hidden[0], m, gamma, lam)
    assert torch.equal(again.advantages, found.advantages)


def test_limits() -> None:
    """lam = 1: what is still to come, less V; lam = 0: one step. Rewards lie at the end."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 3, 1, 5])
    m = torch.arange(6) < lengths[:, None]
    r = torch.tensor([1.0, 0.0, 2.0, -1.0])
    at_end = torch.zeros(4, 6, dtype=torch.float64)
    at_end[torch.arange(4), lengths - 1] = r.double()
    whole = generalized_advantage(r, V, m, gamma=0.9)
    assert torch.equal(whole.advantages, generalized_advantage(at_end, V, m, 0.9).advantages)
    assert torch.allclose(whole.returns, returns_to_go(at_end, m, 0.9), atol=1e-12)
    step = generalized_advantage(r, V, m, gamma=0.9, lam=0.0).advantages
    after = torch.nn.functional.pad((V * m)[:, 1:], (0, 1))
    assert torch.allclose(step, (at_end + 0.9 * after - V) * m, atol=1e-12)


def test_whitened_over_all_tokens() -> None:
    V = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    m = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    plain = generalized_advantage([1.0, 0.0, 1.0], V, m, lam=0.5)
    white = generalized_advantage([1.0, 0.0, 1.0], V, m, lam=0.5, whitened=True)
    tokens = plain.advantages[m > 0]
    want = (tokens - tokens.mean()) / tokens.std()
    assert torch.allclose(white.advantages[m > 0], want, atol=1e-5)
    assert not white.advantages[m == 0].any()
    assert torch.equal(white.returns, plain.returns)
    assert white.advantages.dtype == torch.float32


def test_a_perfect_critic_leaves_nothing() -> None:
    """V = the return: every advantage is 0, for any lam."""
    V = torch.tensor([[0.81, 0.9, 1.0, 7.0]], dtype=torch.float64)
    for lam in (0.0, 0.5, 1.0):
        found = generalized_advantage([1.0], V, [[1, 1, 1, 0]], 0.9, lam)
        assert found.advantages.abs().max() < 1e-12


def test_nothing() -> None:
    for T in (0, 3):
        none = torch.zeros(0, T)
        assert generalized_advantage([], none, none).advantages.shape == (0, T)


def test_half_precision_and_gradients() -> None:
    V = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    found = generalized_advantage([1.0], V, torch.ones(1, 2))
    assert found.advantages.dtype == torch.float32
    assert not found.advantages.requires_grad


V, M = torch.zeros(2, 3), torch.ones(2, 3)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: generalized_advantage([1.0, 0.0], V[0], M[0]), r"values: got shape \(3,\)"),
    (lambda: generalized_advantage([1.0, 0.0], V, M[:1]), r"mask: got shape \(1, 3\)"),
    (lambda: generalized_advantage([1.0], V, M), r"rewards: got shape \(1,\), want \(2,\)"),
    (
        lambda: generalized_advantage([1.0, 0.0], V, [[1, 0, 0], [0, 0, 0]]),
        r"mask: got no token in row \[1\]",
    ),
    (lambda: generalized_advantage([1.0, 0.0], V, M, gamma=1.1), "gamma: got 1.1"),
    (lambda: generalized_advantage([1.0, 0.0], V, M, lam=-0.1), "lam: got -0.1"),
    (lambda: generalized_advantage([1.0, None], V, M), "rewards: got None, words or ragged rows"),
    (lambda: generalized_advantage(["1", "0"], V, M), "rewards: got None, words or ragged rows"),
    (lambda: generalized_advantage([1.0, torch.nan], V, M), "rewards: got NaN or infinity"),
    (lambda: generalized_advantage([1.0, 0.0], V + torch.inf, M), "values: got NaN or infinity"),
]


@pytest.mark.contract
@pytest.mark.parametrize(("call", "message"), BAD)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
