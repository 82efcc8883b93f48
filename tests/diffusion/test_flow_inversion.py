"""Inverting autoregressive blocks: closed forms, laws of the sweeps, and what may go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.flow_inversion import (  # noqa: E402
    Inversion,
    SegmentPlan,
    affine_inverse,
    block_metrics,
    check_causal,
    fixed_point_residual,
    full_passes,
    invert_autoregressive,
    plan_from_notation,
    plan_strategy,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

T, C = 12, 3
EXACT = 1e-12


def normal(*shape: int, seed: int = 0) -> Any:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def linear(A: Any) -> Any:
    """u = A x over the tokens, no scale."""
    return lambda x: (torch.zeros_like(x), torch.einsum("ij,bjc->bic", A, x))


def wavy(x: Any) -> Any:
    """A block that mixes tokens and channels, scales and shifts; s_1 = u_1 = 0."""
    n, c = x.shape[1:]
    mix = normal(c, c, seed=3).to(x)
    near = torch.tril(normal(n, n, seed=4), -1).to(x)
    h = torch.einsum("ij,bjc,cd->bid", near, x, mix)
    return 0.5 * torch.tanh(h), torch.sin(h)


def solution(block_fn: Any, z: Any) -> Any:
    """Token by token, written out on its own."""
    x = z.clone()
    for t in range(1, z.shape[1]):
        s, u = block_fn(x)
        x[:, t] = torch.exp(s[:, t]) * z[:, t] + u[:, t]
    return x


def error(got: Any, want: Any) -> float:
    return float((got - want).abs().max())


# ── laws of the sweeps ──────────────────────────────────────────────────────────────────────────


def test_iterates_of_a_linear_block_are_partial_sums() -> None:
    A = torch.tril(normal(T, T), -1)
    z = normal(4, T, C, seed=1)
    want, power = z, z
    for k in range(1, T):
        power = torch.einsum("ij,bjc->bic", A, power)
        want = want + power
        assert error(invert_autoregressive(linear(A), z, max_iter=k, tol=0).x, want) < 1e-9
    exact = torch.linalg.solve(torch.eye(T).double() - A, z.transpose(0, 1).reshape(T, -1))
    np.testing.assert_allclose(want.transpose(0, 1).reshape(T, -1), exact, atol=1e-8)


def test_sweeps_end_at_the_nilpotency_index() -> None:
    """A shift by five has A³ = 0 among 12 tokens: the third sweep changes nothing."""
    A = torch.diag(torch.ones(T - 5).double(), -5)
    found = invert_autoregressive(linear(A), normal(2, T, C), tol=0)
    assert found.iterations == (3,)
    assert found.residuals == (0.0,)
    assert found.converged


def test_a_block_that_does_nothing_takes_one_sweep() -> None:
    z = normal(2, T, C)
    found = invert_autoregressive(lambda x: (0 * x, 0 * x), z)
    assert torch.equal(found.x, z)
    assert (found.passes, found.residuals) == (1, (0.0,))


@pytest.mark.parametrize("init", ["z", "zero", normal(5, T, C, seed=9)])
def test_k_sweeps_make_k_plus_1_tokens_final(init: Any) -> None:
    z = normal(5, T, C)
    want = solution(wavy, z)
    for k in range(1, T):
        found = invert_autoregressive(wavy, z, "jacobi", max_iter=k, tol=0, init=init)
        assert error(found.x[:, : k + 1], want[:, : k + 1]) < EXACT
        assert k == T - 1 or error(found.x, want) > 1e-9
        assert found.converged == (k == T - 1)


@pytest.mark.parametrize("G", range(T + 1))
def test_a_segment_is_exact_after_as_many_sweeps_as_it_has_tokens(G: int) -> None:
    """Also where G does not divide T, where the published code is off by its last segment."""
    z = normal(5, T, C)
    want = solution(wavy, z)
    found = invert_autoregressive(wavy, z, segments=G, tol=0)
    assert error(found.x, want) < EXACT
    assert found.converged
    assert found.passes == T - 1
    longest = max(b - a for a, b in SegmentPlan(G).bounds(T))
    assert max(found.iterations) <= longest
    short = invert_autoregressive(wavy, z, segments=G, tol=0, max_iter=max(1, longest // 2))
    assert (error(short.x, want) < EXACT) == (longest == 1) == short.converged


def test_one_segment_is_jacobi_and_T_segments_are_sequential() -> None:
    z = normal(3, T, C)
    for k in (1, 4):
        jacobi = invert_autoregressive(wavy, z, "jacobi", segments=7, max_iter=k)
        assert torch.equal(jacobi.x, invert_autoregressive(wavy, z, segments=1, max_iter=k).x)
    one_by_one = invert_autoregressive(wavy, z, "sequential", max_iter=3)
    assert one_by_one.iterations == (1,) * (T - 1)
    assert one_by_one.tokens == T - 1
    assert torch.equal(one_by_one.x, invert_autoregressive(wavy, z, segments=T).x)
    assert error(one_by_one.x, solution(wavy, z)) < EXACT


@pytest.mark.property
@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_any_plan_without_tolerance_is_exact(
    n: int, G: int, seed: int, refresh: bool, per_sample: bool
) -> None:
    z = normal(3, n, 2, seed=seed)
    found = invert_autoregressive(
        wavy, z, segments=min(G, n), tol=0, refresh=refresh, per_sample=per_sample
    )
    assert error(found.x, solution(wavy, z)) < 1e-9
    assert float(fixed_point_residual(wavy, found.x, z).max()) < 1e-9


def test_a_tolerance_is_met_and_saves_passes() -> None:
    z = normal(6, T, C)
    faint = lambda x: tuple(0.1 * p for p in wavy(x))  # noqa: E731
    want = solution(faint, z)
    passes = []
    for tol in (1e-2, 1e-4, 1e-8):
        found = invert_autoregressive(faint, z, tol=tol)
        assert found.residuals[0] <= tol
        assert error(found.x, want) < 30 * tol
        passes.append(found.passes)
    assert passes[0] < passes[1] < passes[2] < T - 1


# ── what earlier segments show to later ones ────────────────────────────────────────────────────


def test_later_segments_see_the_iterate_before_the_last_or_the_last_with_refresh() -> None:
    z, k, S = normal(3, T, C), 2, T // 2
    jacobi = [z]
    for _ in range(k):
        jacobi.append(affine_inverse(wavy(jacobi[-1]), z))
    for refresh in (False, True):
        shown = jacobi[k if refresh else k - 1][:, :S]
        x = torch.cat([jacobi[k][:, : S + 1], z[:, S + 1 :]], dim=1)
        for _ in range(k):
            inside = torch.cat([shown, x[:, S:]], dim=1)
            x = torch.cat([x[:, : S + 1], affine_inverse(wavy(inside), z)[:, S + 1 :]], dim=1)
        found = invert_autoregressive(wavy, z, segments=2, max_iter=k, tol=0, refresh=refresh)
        assert error(found.x, x) < EXACT
        assert found.passes == 2 * k + refresh
        assert not found.converged


def test_samples_do_not_depend_on_their_company_where_each_has_its_own_stop() -> None:
    z = normal(6, T, C) * torch.logspace(-3, 0.5, 6, dtype=torch.float64)[:, None, None]
    for plan in ({}, {"segments": 3, "refresh": True}, {"segments": 4, "clamp": 1.5}):
        together = invert_autoregressive(wavy, z, tol=1e-3, per_sample=True, **plan)
        alone = [invert_autoregressive(wavy, one, tol=1e-3, per_sample=True, **plan)
                 for one in z.split(1)]  # fmt: skip
        assert error(together.x, torch.cat([one.x for one in alone])) < EXACT
        assert min(one.passes for one in alone) < together.passes
    batch = invert_autoregressive(wavy, z, tol=1e-3)
    assert error(batch.x[:1], invert_autoregressive(wavy, z[:1], tol=1e-3).x) > 1e-9


# ── overflow and clamps ─────────────────────────────────────────────────────────────────────────


def steep(x: Any) -> Any:
    """exp(s) overflows in early sweeps, where the tokens are far from the solution's zeros."""
    before = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
    return 60 * before.abs(), -before


def test_a_segment_whose_sweeps_overflow_is_redone_token_by_token() -> None:
    z = torch.full((2, T, 1), 0.0, dtype=torch.float32)
    z[0, 4:] = 40.0  # exp(60 * 40) is infinite, but ...
    honest = invert_autoregressive(lambda x: (0 * x, 0 * x), z)
    assert honest.fallbacks == ()

    def block_fn(x: Any) -> Any:
        s, _ = steep(x)
        return s, -torch.exp(s.clamp(max=80)) * z  # ... the solution is 0 wherever s is small

    found = invert_autoregressive(block_fn, z, segments=2)
    assert found.fallbacks == (0, 1)
    assert torch.equal(found.x[1], z[1])
    assert error(found.x, solution(block_fn, z)) == 0.0
    assert np.isnan(found.residuals).all()


def test_an_overflow_that_reaches_the_first_token_is_no_moved_one() -> None:
    """A mask that multiplies turns 0 · ∞ into NaN, at all tokens."""

    def block_fn(x: Any) -> Any:
        h = torch.tril(torch.ones(T, T), -1) @ torch.exp(x)
        return -h, 0 * x

    z = torch.full((1, T, 1), 0.5)
    z[0, T // 2] = 100.0  # exp(100) is infinite in float32, but x is small there
    found = invert_autoregressive(block_fn, z)
    assert found.fallbacks == (0,)
    assert torch.isfinite(found.x).all()


def test_a_sample_in_which_the_flow_itself_overflows_leaves_the_others_alone() -> None:
    z = normal(3, T, 1).float() / 10
    z[1, 5] = 90.0
    block_fn = lambda x: (2 * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)), 0 * x)  # noqa: E731
    found = invert_autoregressive(block_fn, z, segments=3)
    assert torch.isfinite(found.x).all(dim=2).all(dim=1).tolist() == [True, False, True]
    want = invert_autoregressive(block_fn, z[::2], segments=3)
    torch.testing.assert_close(found.x[::2], want.x, rtol=1e-5, atol=1e-6)
    assert len(found.fallbacks) == 1


def test_the_clamp_leaves_the_result_alone_and_the_published_one_does_not() -> None:
    z = 2 * normal(4, T, C)
    want = solution(wavy, z)
    assert float(want.abs().max()) > 4
    for G in (1, 3):
        ours = invert_autoregressive(wavy, z, segments=G, tol=1e-9, clamp=3.0)
        assert error(ours.x, want) < 1e-7
        theirs = invert_autoregressive(
            wavy, z, segments=G, tol=1e-9, clamp=3.0, clamp_finished=True
        )
        assert float(theirs.x[:, 1:].abs().max()) <= 3.0
        assert error(theirs.x, want) > 0.5
    inside = 0.1 * normal(4, T, C)
    free, bound = (invert_autoregressive(wavy, inside, clamp=c, max_iter=3) for c in (None, 50.0))
    assert torch.equal(free.x, bound.x)


def test_half_precision_exponentiates_in_float32() -> None:
    s, z = torch.tensor([[[12.0]]]).half(), torch.tensor([[[1e-3]]]).half()
    want = np.exp(12.0) * float(z)  # exp(12) is more than float16 holds
    assert float(affine_inverse((s, 0 * s), z)) == pytest.approx(want, rel=1e-3)
    x = torch.full((3, T, C), 1e-3).half()
    block_fn = lambda x: (torch.full_like(x, -12.0), 0 * x)  # noqa: E731
    found = block_metrics(block_fn, x, (torch.eye(C), torch.zeros(C, C)))  # of all 1e-3 exp(12)
    assert found["crm"] == pytest.approx(np.exp(12.0) * 1e-3 * np.sqrt(T * C), rel=2e-3)
    for dtype in (torch.float16, torch.bfloat16):
        found = invert_autoregressive(wavy, normal(2, T, C).to(dtype), tol=0)
        assert found.x.dtype == dtype


# ── other flows ─────────────────────────────────────────────────────────────────────────────────


def made(x: Any) -> Any:
    """A masked autoencoder (MAF): it acts on the first variable too."""
    n = x.shape[1]
    first = torch.tril(normal(n, n, seed=5), -1).to(x)
    h = torch.einsum("ij,bjc->bic", first, x)
    return 0.3 * torch.tanh(h) + 0.2, h - 0.7


def test_a_masked_autoregressive_flow() -> None:
    z = normal(5, T, 1)
    x = torch.zeros_like(z)
    for t in range(T):
        s, u = made(x)
        x[:, t] = torch.exp(s[:, t]) * z[:, t] + u[:, t]
    for G in (0, 1, 5):
        found = invert_autoregressive(made, z, segments=G, tol=0, first="block")
        assert error(found.x, x) < EXACT
        assert found.passes == T
    with pytest.raises(InputError, match="first: got a block that moves the first token"):
        invert_autoregressive(made, z)


def test_a_block_that_is_not_affine() -> None:
    """z = asinh(x) + a tanh(asinh x), token by token; solved by bisection."""

    def solve(a: Any, z: Any) -> Any:
        low, high = torch.full_like(z, -50.0), torch.full_like(z, 50.0)
        for _ in range(80):
            y = (low + high) / 2
            over = y + a * torch.tanh(y) > z
            low, high = torch.where(over, low, y), torch.where(over, y, high)
        return torch.sinh(low)

    block_fn = lambda x: torch.sigmoid(made(x)[1])  # noqa: E731
    x = normal(4, T, C)
    y = torch.asinh(x)
    z = y + block_fn(x) * torch.tanh(y)
    found = invert_autoregressive(block_fn, z, segments=3, tol=0, solve=solve, first="block")
    assert error(found.x, x) < 1e-9
    assert float(fixed_point_residual(block_fn, found.x, z, solve).max()) < 1e-9
    check_causal(block_fn, x, solve)


def test_gradients_pass_through() -> None:
    z = normal(2, 5, 1).requires_grad_()
    (got,) = torch.autograd.grad(invert_autoregressive(wavy, z, segments=2, tol=0).x.sum(), z)
    step = 1e-6 * normal(2, 5, 1, seed=8)
    there, here = (solution(wavy, z.detach() + sign * step).sum() for sign in (1, -1))
    assert float((got * step).sum()) == pytest.approx(float(there - here) / 2, rel=1e-6)


def test_steps_are_the_iterates() -> None:
    z = normal(3, T, C)
    work = Inversion(SegmentPlan(1, tol=0), full_passes(wavy, z), z)
    state = work.init()
    for k in range(1, T):
        assert not work.done(state)
        state = work.step(state)
        assert torch.equal(state.x, invert_autoregressive(wavy, z, max_iter=k, tol=0).x)
    assert work.done(state)


# ── metrics and plans ───────────────────────────────────────────────────────────────────────────


def test_metrics_by_hand() -> None:
    x = normal(50, T, C)
    s, u = wavy(x)
    z = torch.exp(-s) * (x - u)
    W_s, W_u = normal(C, 7, seed=1), normal(C, 7, seed=2)
    for norm, order in ((2, 2), (1, 1), ("fro", "fro")):
        found = block_metrics(wavy, x, (W_s, W_u), norm)
        size = lambda m, order=order: np.linalg.norm(m.numpy(), order)  # noqa: E731
        first = size((torch.exp(wavy(z)[0]) * z + wavy(z)[1] - x).mean(0))
        assert found["igm_z"] == pytest.approx(first)
        crm = size((torch.exp(-s) * x).mean(0)) * size(W_s) + size(W_u)
        assert found["crm"] == pytest.approx(crm)
        no_scale = block_metrics(wavy, x, (0 * W_s, W_u), norm)["crm"]
        assert no_scale == pytest.approx(size(W_u))
    assert "crm" not in block_metrics(wavy, x)


@pytest.mark.parametrize(
    ("shares", "tough"),
    [
        ([5.2, 5.6, 2.5, 10.9, 7.7, 7.4, 56.6, 4.1], {6}),
        ([6.3, 6.3, 8.2, 7.9, 9.0, 10.3, 9.4, 42.6], {7}),
        ([50.7, 2.4, 2.3, 3.4, 1.8, 1.3, 33.6, 4.4], {0, 6}),
        ([74.6, 4.9, 0.7, 1.0, 4.1, 2.7, 1.6, 10.5], {0, 7}),
        ([0.0, 0.0], set()),
    ],
)
def test_the_rule_finds_the_blocks_that_the_authors_cut(
    shares: list[float], tough: set[int]
) -> None:
    metrics = [{"crm": c, "igm_z": 1.0, "igm_zero": 0.5 + i % 2} for i, c in enumerate(shares)]
    plans = plan_strategy(metrics, 1024)
    assert {i for i, plan in enumerate(plans) if plan.segments == 8} == tough
    assert {plan.max_iter for i, plan in enumerate(plans) if i in tough} <= {32}
    assert [plan.init for plan in plans[:2]] == ["zero", "z"]


def test_an_overflowing_guess_is_not_chosen() -> None:
    nan, inf = float("nan"), float("inf")
    for z, zero, want in ((2, nan, "z"), (nan, 2, "zero"), (inf, 2, "zero"), (nan, nan, "z")):
        (plan,) = plan_strategy([{"crm": 1.0, "igm_z": z, "igm_zero": zero}], 16)
        assert plan.init == want


def test_notation() -> None:
    plans = plan_from_notation("0/6-8-32-20", 8)
    assert [plan.segments for plan in plans] == [8, 1, 1, 1, 1, 1, 8, 1]
    assert [plan.max_iter for plan in plans] == [32, 20, 20, 20, 20, 20, 32, 20]
    for text in ("8-8-32-10", "1/1-8-32-10", "1/2/3-8/9-32-10", "6-8-32", "a-8-32-10", ""):
        with pytest.raises(InputError, match="text: got"):
            plan_from_notation(text, 8)
    with pytest.raises(InputError, match="max_iter: got 0"):
        plan_from_notation("1-8-0-10", 8)


# ── bad input and edges ─────────────────────────────────────────────────────────────────────────


def test_edges() -> None:
    one = normal(3, 1, C)
    found = invert_autoregressive(wavy, one, "sequential")
    assert torch.equal(found.x, one)
    assert (found.passes, found.converged) == (0, True)
    none = torch.zeros(0, T, C)
    for first in ("identity", "block"):
        assert invert_autoregressive(wavy, none, segments=4, first=first).x.shape == none.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(T, C)}, "z: got shape"),
        ({"z": np.zeros((2, T, C))}, "z: got a ndarray"),
        ({"z": torch.zeros(2, T, C, dtype=torch.int64)}, "z: got torch.int64"),
        ({"z": torch.full((2, T, C), float("nan"))}, "z: got NaN"),
        ({"z": torch.full((2, T, C), float("inf"))}, "z: got NaN or inf"),
        ({"z": torch.zeros(2, 0, C)}, "z: got shape"),
        ({"segments": -1}, "segments: got -1"),
        ({"segments": T + 1}, "segments: got 13, want at most the 12"),
        ({"segments": 2.0}, "segments: got 2.0"),
        ({"max_iter": 0}, "max_iter: got 0"),
        ({"tol": -1e-3}, "tol: got"),
        ({"tol": float("nan")}, "tol: got"),
        ({"clamp": 0.0}, "clamp: got"),
        ({"init": "ones"}, "init: got"),
        ({"init": torch.zeros(2, T, 1)}, "init: got"),
        ({"init": torch.full((2, T, C), float("nan"))}, "init: got NaN"),
        ({"method": "newton"}, "method: got"),
        ({"first": "second"}, "first: got"),
        ({"block_fn": None}, "block_fn, cache_fn: got neither"),
        ({"cache_fn": lambda z: None}, "block_fn, cache_fn: got both"),
        ({"block_fn": lambda x: (x[:, None], x[:, None])}, "block_fn: got"),
        ({"block_fn": lambda x: (x.double(), x.double())}, "block_fn: got"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    request = {"block_fn": wavy, "z": torch.zeros(2, T, C), **change}
    with pytest.raises(InputError, match=message):
        invert_autoregressive(**request)


def test_a_block_that_looks_ahead_is_found() -> None:
    check_causal(wavy, normal(2, T, C))
    own = lambda x: (0 * x, x)  # noqa: E731
    ahead = lambda x: (0 * x, torch.roll(x, -1, 1))  # noqa: E731
    late = lambda x: (0 * x, torch.where(torch.arange(T)[:, None] == 7, x, 0 * x))  # noqa: E731
    for block_fn, token in ((own, 0), (ahead, 0), (late, 7)):
        with pytest.raises(InputError, match=f"block_fn: got token {token} depending"):
            check_causal(block_fn, normal(2, T, C))


@pytest.mark.parametrize("metrics", [[], [{"crm": float("nan")}], [{"crm": -1.0}, {"crm": 1.0}]])
def test_bad_metrics(metrics: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match="metrics: got"):
        plan_strategy(metrics, 16)
    with pytest.raises(InputError, match=r"metrics: got \[nan\], want one finite crm"):
        plan_strategy([{"igm_z": 1.0, "igm_zero": 1.0}], 16)
    with pytest.raises(InputError, match="segments: got 0, want a positive count"):
        plan_strategy([{"crm": 1.0, "igm_z": 1.0, "igm_zero": 1.0}], 16, segments=0)
    with pytest.raises(InputError, match="x: got no samples"):
        block_metrics(wavy, torch.zeros(0, T, C))
    with pytest.raises(InputError, match="norm: got 3"):
        block_metrics(wavy, torch.zeros(1, T, C), norm=3)
