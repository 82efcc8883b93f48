"""Steps on their tokens, against a loop over the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.token_credit import (
    at_step_ends,
    leading_tokens,
    over_steps,
    returns_to_go,
    whiten,
)

pytestmark = pytest.mark.oracle


@st.composite
def steps(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Values, mask and ends of rows with holes among the steps."""
    T, S = draw(st.integers(1, 9)), draw(st.integers(0, 5))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        ends = sorted(draw(st.sets(st.integers(0, T - 1), max_size=S)))
        places = sorted(draw(st.permutations(range(S)))[: len(ends)])
        rows.append((places, ends))
    mask = torch.zeros(len(rows), S, dtype=torch.bool)
    at = torch.full((len(rows), S), 77)
    for i, (places, ends) in enumerate(rows):
        mask[i, places], at[i, places] = True, torch.tensor(ends, dtype=torch.int64)
    values = torch.arange(1.0, 1 + mask.numel()).reshape(mask.shape)
    return values, mask, at, T


@pytest.mark.property
@given(steps())
def test_against_the_loop(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    values, mask, ends, T = case
    N, S = mask.shape
    last, spread = torch.zeros(N, T), torch.zeros(N, T)
    for i in range(N):
        start = 0
        for j in range(S):
            if mask[i, j]:
                stop = int(ends[i, j])
                last[i, stop] = values[i, j]
                spread[i, start : stop + 1] = values[i, j]
                start = stop + 1
    assert torch.equal(at_step_ends(values, mask, ends, T), last)
    assert torch.equal(over_steps(values, mask, ends, T), spread)


def test_steps_of_half_precision_and_with_gradients() -> None:
    where = torch.tensor([[True, True]]), torch.tensor([[1, 3]]), 5
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    over_steps(x, *where).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 2.0]]
    half = over_steps(x.detach().bfloat16(), *where)
    assert (half.dtype, half.tolist()) == (torch.bfloat16, [[1.0, 1.0, 2.0, 2.0, 0.0]])


@pytest.mark.property
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_leading_tokens(rows: list[list[bool]]) -> None:
    want = [[*row, False].index(False) for row in rows]
    unbroken = all(not any(row[n:]) for row, n in zip(rows, want, strict=True))
    length, whole = leading_tokens(torch.tensor(rows))
    assert (length.tolist(), whole) == (want, unbroken)


@pytest.mark.property
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0, 1))
def test_returns(x: list[float], gamma: float) -> None:
    want = [sum(gamma ** (s - t) * x[s] for s in range(t, len(x))) for t in range(len(x))]
    got = returns_to_go(torch.tensor([x], dtype=torch.float64), gamma=gamma)
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64))


def test_returns_stop_at_the_mask() -> None:
    x, mask = torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([[True, True, False]])
    assert returns_to_go(x, mask).tolist() == [[3.0, 2.0, 0.0]]


def test_whitened_tokens_have_mean_0_and_variance_1() -> None:
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.arange(3, 9)[:, None]
    got = whiten(x, mask)
    assert float(got[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(got[mask].var()) == pytest.approx(1, abs=1e-6)
    assert not got[~mask].any()


@pytest.mark.contract
def test_refusals() -> None:
    values, mask = torch.ones(1, 2), torch.tensor([[True, True]])
    for message, ends, m in (
        (r"step_end: got \[5\]", [[1, 5]], mask),
        (r"step_end: got \[-1\]", [[-1, 3]], mask),
        ("step_end: got ends that do not rise", [[3, 3]], mask),
        ("step_end: got torch.float32", [[1.0, 2.0]], mask),
        ("step_mask: got torch.float32", [[1, 3]], mask.float()),
        ("step values, step_mask, step_end", [[1, 2, 3]], mask),
    ):
        with pytest.raises(InputError, match=message):
            at_step_ends(values, m, torch.tensor(ends), 5)
    with pytest.raises(InputError, match=r"gamma: got 1\.5"):
        returns_to_go(values, gamma=1.5)
    with pytest.raises(InputError, match="mask: got 1 tokens"):
        whiten(values, torch.tensor([[True, False]]))
