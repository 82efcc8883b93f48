"""Inverse-Hessian products against dense solves, and the two fixed points of LiSSA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from scoredraw.data_selection.inverse_hessian import inverse_hessian_product, inverse_hvp
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle


def positive_matrix(m: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    root = random.normal(size=(m, m))
    return np.asarray(root @ root.T / m)


@given(m=st.integers(1, 12), seed=st.integers(0, 100), damping=st.floats(0.01, 2))
@settings(max_examples=40)
def test_cg_is_the_exact_solve(m: int, seed: int, damping: float) -> None:
    h, v = positive_matrix(m, seed), np.random.default_rng(seed + 1).normal(size=m)
    want = np.linalg.solve(h + damping * np.eye(m), v)
    for hessian in (h, aslinearoperator(h), lambda u: h @ u):
        for solver in ("cg", "exact"):
            got = inverse_hessian_product(hessian, v, solver=solver, damping=damping)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * max(1, abs(want).max()))


def test_lissa_with_the_whole_hessian_reaches_its_fixed_point() -> None:
    h, v = positive_matrix(5, 0), np.arange(1.0, 6.0)
    right = inverse_hessian_product(h, v, damping=0.1)
    ours = inverse_hessian_product(h, v, solver="lissa", damping=0.1, scale=5.0, depth=5000)
    np.testing.assert_allclose(ours, right, atol=1e-9)
    released = inverse_hessian_product(
        h, v, solver="lissa", damping=0.1, scale=5.0, depth=5000, released=True
    )
    np.testing.assert_allclose(released, 5 * np.linalg.solve(h + 0.5 * np.eye(5), v), atol=1e-9)
    assert np.linalg.norm(released - right) > 0.5 * np.linalg.norm(right)  # another quantity


def test_lissa_with_random_examples_is_right_on_average() -> None:
    """A linear recursion in independent Hessians: its mean obeys the mean Hessian's recursion.

    40 runs; the mean lies within 5 of its own standard errors (false alarms: 1e-6 a number).
    """
    random = np.random.default_rng(3)
    x = random.normal(size=(50, 3))
    v = np.array([1.0, -2.0, 0.5])

    def product(u: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.asarray(x[rows].T @ (x[rows] @ u) / len(rows))

    want = np.linalg.solve(x.T @ x / 50 + 0.1 * np.eye(3), v)
    options: dict[str, Any] = {"solver": "lissa", "damping": 0.1, "scale": 20.0, "depth": 600}
    runs = [inverse_hessian_product(product, v, n=50, rng=s, **options) for s in range(40)]
    error = np.std(runs, axis=0, ddof=1) / np.sqrt(40)
    assert (abs(np.mean(runs, axis=0) - want) < 5 * error).all()
    averaged = inverse_hessian_product(product, v, n=50, rng=0, repeats=20, **options)
    larger = inverse_hessian_product(product, v, n=50, rng=0, batch_size=20, **options)
    one = np.linalg.norm(np.array(runs) - want, axis=1).mean()
    assert np.linalg.norm(averaged - want) < one / 2
    assert np.linalg.norm(larger - want) < one / 2
    again = inverse_hessian_product(product, v, n=50, rng=0, **options)
    np.testing.assert_array_equal(again, runs[0])


def test_the_scale_has_to_reach_the_largest_eigenvalue() -> None:
    h, v = np.diag([1.0, 30.0]), np.ones(2)
    for released in (False, True):
        with pytest.raises(InputError, match=r"scale: got 10, .*largest eigenvalue"):
            inverse_hessian_product(
                h, v, solver="lissa", scale=10.0, damping=0.0, released=released
            )
    inverse_hessian_product(h, v, solver="lissa", scale=31.0)


# ── Torch ────────────────────────────────────────────────────────────────────────────────────────

X = torch.tensor(np.random.default_rng(0).normal(size=(30, 4)))
Y = torch.tensor(np.random.default_rng(1).integers(3, size=30))
PARAMS = {
    "layer.weight": torch.tensor(np.random.default_rng(2).normal(size=(4, 3))),
    "layer.bias": torch.zeros(3, dtype=torch.float64),
    "temperature": torch.tensor(0.3, dtype=torch.float64),
}


def loss(params: dict[str, torch.Tensor], rows: torch.Tensor | None = None) -> torch.Tensor:
    x, y = (X, Y) if rows is None else (X[rows], Y[rows])
    logits = (x @ params["layer.weight"] + params["layer.bias"]) * params["temperature"].exp()
    ridge = sum(p.square().sum() for p in params.values())
    return torch.nn.functional.cross_entropy(logits, y) + 0.5 * ridge


def dense(names: list[str]) -> np.ndarray:
    flat = torch.cat([PARAMS[name].reshape(-1) for name in names])

    def objective(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([PARAMS[name].numel() for name in names])
        moved = {k: p.view_as(PARAMS[k]) for k, p in zip(names, parts, strict=True)}
        return loss({**PARAMS, **moved})

    return np.asarray(torch.autograd.functional.hessian(objective, flat))


@pytest.mark.parametrize("names", [None, "layer", ["temperature", "layer.bias"]])
@pytest.mark.parametrize("n", [None, 30])
def test_a_torch_loss(names: Any, n: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    v = {k: torch.randn(p.shape, generator=random, dtype=p.dtype) for k, p in PARAMS.items()}
    chosen = [k for k in PARAMS if names is None or (k.startswith("layer") and names == "layer")
              or k in names]  # fmt: skip
    flat = np.concatenate([v[k].numpy().reshape(-1) for k in chosen])
    want = np.linalg.solve(dense(chosen) + 0.01 * np.eye(len(flat)), flat)
    for solver in ("cg", "exact", "lissa"):
        if solver == "lissa" and n is not None:
            continue  # of random examples: below
        got = inverse_hvp(
            loss,
            PARAMS,
            v,
            solver=solver,
            n=n,
            parameters=names,
            scale=8.0,
            depth=240,
            block=11,
        )
        assert list(got) == chosen
        assert all(got[k].shape == PARAMS[k].shape for k in chosen)
        ours = np.concatenate([got[k].numpy().reshape(-1) for k in chosen])
        np.testing.assert_allclose(ours, want, atol=1e-8)


def test_lissa_of_a_torch_loss_draws_examples() -> None:
    """4 runs of 30 rows a step: within 2 % (0.4 % expected); a run of 1 row is not (4 %)."""
    v = {k: torch.ones_like(p) for k, p in PARAMS.items()}
    want = inverse_hvp(loss, PARAMS, v, n=30)["layer.weight"]
    options: dict[str, Any] = {"n": 30, "solver": "lissa", "scale": 20.0, "depth": 80}
    many = inverse_hvp(loss, PARAMS, v, rng=0, batch_size=30, repeats=4, **options)["layer.weight"]
    one = inverse_hvp(loss, PARAMS, v, rng=0, **options)["layer.weight"]
    assert (many - want).norm() < 0.02 * want.norm() < (one - want).norm()


def test_any_nesting_and_dtype_comes_back() -> None:
    params = [torch.ones(2), (torch.full((1, 2), 2.0),)]
    v = [torch.tensor([1.0, 2.0]), (torch.tensor([[3.0, 4.0]]),)]

    def quadratic(p: Any) -> torch.Tensor:
        return torch.as_tensor((p[0] ** 2).sum() / 2 + (p[1][0] ** 2).sum())

    got = inverse_hvp(quadratic, params, v, damping=0.0)
    assert isinstance(got, list)
    assert isinstance(got[1], tuple)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(got[1][0], torch.tensor([[1.5, 2.0]]))


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver: got 'newton', want one of"),
        ({"damping": -1.0}, "damping: got -1"),
        ({"damping": np.nan}, "damping: got nan"),
        ({"scale": 0.0}, "scale: got 0"),
        ({"depth": 0}, "depth: got 0"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"tolerance": 0.0}, "tolerance: got 0"),
        ({"released": True}, "solver: got 'cg', want released=True is a form of LiSSA"),
        ({"n": 3}, "n: got 3, want none with a matrix"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inverse_hessian_product(np.eye(2), [1.0, 2.0], **options)


@pytest.mark.parametrize(
    ("hessian", "v", "message"),
    [
        (np.eye(2), [1.0, np.nan], "v: got NaN"),
        (np.eye(2), [1.0], r"hessian: got shape \(2, 2\), want \(1, 1\)"),
        (np.eye(2), [], "v: got shape"),
        (np.full((2, 2), np.inf), [1.0, 2.0], "hessian: got NaN or infinity"),
        (lambda u: u[:1], [1.0, 2.0], "hessian: got a product"),
        (lambda u: u * np.nan, [1.0, 2.0], "hessian: got NaN or infinity"),
        (np.diag([1.0, -5.0]), [1.0, 2.0], "damping: got 0.01 and negative curvature"),
    ],
)
def test_bad_hessians(hessian: Any, v: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inverse_hessian_product(hessian, v)


def test_singular_and_unreached() -> None:
    with pytest.raises(InputError, match="damping: got 0"):
        inverse_hessian_product(np.zeros((2, 2)), [1.0, 2.0], solver="exact", damping=0.0)
    hilbert = 1 / (np.arange(40)[:, None] + np.arange(40) + 1.0)
    with pytest.raises(InputError, match=r"not reached|negative curvature"):
        inverse_hessian_product(hilbert, np.ones(40), damping=0.0, tolerance=1e-300)


def test_bad_torch_input() -> None:
    v = {k: torch.ones_like(p) for k, p in PARAMS.items()}
    with pytest.raises(InputError, match="parameters: got 'encoder', want names among layer"):
        inverse_hvp(loss, PARAMS, v, parameters="encoder")
    with pytest.raises(InputError, match="params: got list, want a dict"):
        inverse_hvp(lambda p: p[0].sum(), [torch.ones(1)], [torch.ones(1)], parameters="a")
    with pytest.raises(InputError, match="v: got"):
        inverse_hvp(loss, PARAMS, {**v, "temperature": torch.ones(2)})
    with pytest.raises(InputError, match="v: got NaN"):
        inverse_hvp(loss, PARAMS, {**v, "temperature": torch.tensor(torch.nan)})
    with pytest.raises(InputError, match="params: got NaN"):
        inverse_hvp(loss, {**PARAMS, "temperature": torch.tensor(torch.nan)}, v)
    with pytest.raises(InputError, match="n: got 0"):
        inverse_hvp(loss, PARAMS, v, n=0)
    with pytest.raises(InputError, match="block: got 0"):
        inverse_hvp(loss, PARAMS, v, n=30, block=0)
    with pytest.raises(InputError, match=r"scale: got 0.01, .*largest eigenvalue"):
        inverse_hvp(loss, PARAMS, v, solver="lissa", scale=0.01, n=30, rng=0)
