r"""Products with an inverse Hessian, without the inverse and mostly without the Hessian.

Influence functions need :math:`h=(H+\delta I)^{-1}v`, with H the Hessian of a mean loss over n
examples and :math:`\delta` a damping. One product :math:`Hu` costs about two gradients
(Pearlmutter 1994), so that

- ``"cg"``: conjugate gradients on :math:`u\mapsto Hu+\delta u`; deterministic, the default;
- ``"lissa"``: the recursion
  :math:`h_t=h_{t-1}+\frac1c\left(v-(H_{s_t}+\delta I)h_{t-1}\right)`, whose fixed point is the
  same, with the Hessian of a random example :math:`s_t` a step and a scale
  :math:`c\ge\lambda_{\max}`;
- ``"exact"``: the m x m Hessian and a dense solve, for small m.

LiSSA is often run as :math:`h_t=v+(1-\delta)h_{t-1}-\frac1cH_{s_t}h_{t-1}` and not divided by c
afterwards (so in the program released with DEALRec: :math:`\delta=0.01`, c = 25, 5,000 steps, one
repeat). Its fixed point is :math:`c\,(H+\delta c\,I)^{-1}v`: c times too long, and under a ridge
:math:`\delta c` in place of :math:`\delta`. ``released=True`` gives that.

Agarwal, Bullins and Hazan, 2017, "Second-order stochastic optimization for machine learning in
linear time", arXiv:1602.03943 (LiSSA); Koh and Liang, 2017, arXiv:1703.04730 (influence).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from scoredraw.data_selection.influence import Array, to_numpy
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Solver = Literal["cg", "exact", "lissa"]
Product = Callable[..., Any]

GROWTH = 1e6  # a LiSSA iterate this many times as long as v has diverged
LOOK_EVERY = 10
MAX_ITERATIONS = 10_000
BLOCK = 512  # examples whose loss is differentiated at once


@dataclass(frozen=True)
class Options:
    """How an inverse-Hessian product is computed; the fields are those of `inverse_hvp`."""

    solver: Solver = "cg"
    damping: float = 0.01
    scale: float = 25.0
    depth: int = 5000
    repeats: int = 1
    batch_size: int = 1
    released: bool = False
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        names = ("cg", "exact", "lissa")
        require(self.solver in names, "solver", repr(self.solver), f"one of {', '.join(names)}")
        require(0 <= self.damping < np.inf, "damping", self.damping, "a number of at least 0")
        require(0 < self.scale < np.inf, "scale", self.scale, "a positive number")
        for name in ("depth", "repeats", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 < self.tolerance < 1, "tolerance", self.tolerance, "a number between 0 and 1")
        other = "released=True is a form of LiSSA"
        require(not self.released or self.solver == "lissa", "solver", repr(self.solver), other)


# ── NumPy ────────────────────────────────────────────────────────────────────────────────────────


def inverse_hessian_product(
    hessian: Any, v: ArrayLike, *, n: int | None = None, rng: Rng = None, **options: Any
) -> Array:
    r"""The vector :math:`(H+\delta I)^{-1}v`, for a Hessian given as numbers or by its products.

    Parameters
    ----------
    hessian : (m, m) symmetric array, SciPy `LinearOperator`, or a function u -> H u, all (m,)
        With `n`, a function (u, rows) -> the product with the mean Hessian of these of n
        examples: what LiSSA draws one of a step (with the whole H at each step otherwise).
    v : (m,) finite.
    options : as `inverse_hvp`. rng : for LiSSA's examples.

    Returns
    -------
    (m,) float64. Raises InputError as `inverse_hvp`.

    Time: an m^3 / 3 solve, or one product an iteration; memory O(m) but for "exact".

    >>> inverse_hessian_product(np.diag([1.0, 3.0]), [2.0, 4.0], damping=1.0).tolist()
    [1.0, 1.0]
    """
    how = Options(**options)
    vector = _vector(v)
    everyone = () if n is None else (np.arange(n),)
    product = _as_product(hessian, len(vector), n)

    def whole(u: Array) -> Array:
        return _checked(np.asarray(product(u, *everyone), np.float64), u)

    if how.solver == "exact":
        dense = hessian if isinstance(hessian, np.ndarray) else _columns(whole, len(vector))
        return _dense_solve(np.asarray(dense, np.float64), vector, how)
    if how.solver == "cg":
        return _conjugate_gradients(whole, vector, how)
    step = whole
    if n is not None:
        random = generator(rng)

        def step(u: Array) -> Array:
            return np.asarray(product(u, random.integers(n, size=how.batch_size)), np.float64)

    result: Array = _lissa(step, vector, how)
    return result


def _vector(v: ArrayLike) -> Array:
    vector = to_numpy(v).astype(np.float64)
    require(vector.ndim == 1 and len(vector) > 0, "v", f"shape {vector.shape}", "(m,), m > 0")
    require(bool(np.isfinite(vector).all()), "v", "NaN or infinity", "finite numbers")
    return vector


def _as_product(hessian: Any, m: int, n: int | None) -> Product:
    from scipy.sparse.linalg import LinearOperator, aslinearoperator

    if isinstance(hessian, LinearOperator) or not callable(hessian):
        require(n is None, "n", n, "none with a matrix, which has no single examples")
        operator = hessian if isinstance(hessian, LinearOperator) else _matrix(hessian)
        shape = operator.shape
        require(shape == (m, m), "hessian", f"shape {shape}", f"({m}, {m}), as v has {m} entries")
        product: Product = aslinearoperator(operator).matvec
        return product
    require(n is None or n >= 1, "n", n, "at least one example")
    return hessian


def _matrix(hessian: Any) -> Array:
    matrix = to_numpy(hessian).astype(np.float64)
    require(bool(np.isfinite(matrix).all()), "hessian", "NaN or infinity", "finite numbers")
    return matrix


def _checked(product: Array, u: Array) -> Array:
    require(product.shape == u.shape, "hessian", f"a product {product.shape}", f"{u.shape}")
    require(bool(np.isfinite(product).all()), "hessian", "NaN or infinity", "finite products")
    return product


def _columns(product: Callable[[Array], Array], m: int) -> Array:
    return np.column_stack([product(unit) for unit in np.eye(m)])


# ── Torch ────────────────────────────────────────────────────────────────────────────────────────


def inverse_hvp(
    loss_fn: Callable[..., Any],
    params: Any,
    v: Any,
    *,
    solver: Solver = "cg",
    damping: float = 0.01,
    n: int | None = None,
    parameters: str | Sequence[str] | None = None,
    scale: float = 25.0,
    depth: int = 5000,
    repeats: int = 1,
    batch_size: int = 1,
    released: bool = False,
    tolerance: float | None = None,
    block: int = BLOCK,
    rng: Rng = None,
) -> Any:
    r"""The inverse-Hessian-vector product :math:`(H+\delta I)^{-1}v` of a torch loss.

    H is the Hessian of `loss_fn` at `params`. Hessian-vector products are the forward-mode
    derivative of the gradient (`torch.func`), so every operation of the loss needs both kinds.

    Parameters
    ----------
    loss_fn : params -> the mean loss; with `n`, (params, rows) -> the mean loss of these examples
        `rows` is an int64 tensor of positions below n.
    params : tensors in any nesting of dicts, lists and tuples, of one dtype and device.
    v : tensors in the same nesting.
    solver : "cg", "exact" (memory m^2) or "lissa". damping : the ridge added to H.
    parameters : names or prefixes ("encoder.layer.3") of a dict `params`: only these move.
    scale, depth, repeats, batch_size : of LiSSA: c, at least the largest eigenvalue of any
        example's Hessian (Hessian of `batch_size` of them); steps; runs averaged.
    released : the form with the fixed point :math:`c(H+\delta c I)^{-1}v`, not divided by c.
    tolerance : of CG's residual over that of 0; None: 1e-10, in float32 1e-5.
    block : examples whose loss is differentiated at once. rng : for LiSSA's examples.

    Returns
    -------
    What `v` is (only the chosen entries of a dict), on the device and in the dtype of `params`.

    Raises
    ------
    InputError
        `parameters` that match nothing, v of another shape, NaN, negative curvature under CG
        (raise `damping`), CG that does not converge, LiSSA that diverges (raise `scale`).

    Time: an iteration costs about four passes over the n examples, LiSSA's a single one's.
    Memory O(m) beyond the graph of `block` examples. Sequential.

    Lin et al., 2024, arXiv:2401.17197; the solvers: see the module.

    >>> import torch
    >>> loss = lambda w: (torch.tensor([0.5, 1.5]) * w**2).sum()
    >>> inverse_hvp(loss, torch.ones(2), torch.tensor([2.0, 4.0]), damping=1.0).tolist()
    [1.0, 1.0]
    """
    import torch

    theta, moved, vector, rebuild = _flattened(params, v, parameters)
    if tolerance is None:
        tolerance = 1e-10 if theta.dtype == torch.float64 else 1e-5
    how = Options(solver, damping, scale, depth, repeats, batch_size, released, tolerance)
    require(n is None or n >= 1, "n", n, "at least one example")
    require(block >= 1, "block", block, "at least one example")
    everyone = torch.arange(n or 0, device=theta.device).split(block)
    blocks: list[tuple[Any, ...]] = [()] if n is None else [(rows,) for rows in everyone]

    def product(u: Any, *rows: Any) -> Any:
        gradient = torch.func.grad(lambda flat: loss_fn(moved(flat), *rows))
        return torch.func.jvp(gradient, (theta,), (u,))[1]

    def whole(u: Any) -> Any:
        shares = [1.0 if n is None else len(rows[0]) / n for rows in blocks]
        return sum(w * product(u, *rows) for w, rows in zip(shares, blocks, strict=True))

    if solver == "lissa":
        random = generator(rng)

        def step(u: Any) -> Any:
            rows = random.integers(n, size=batch_size) if n is not None else None
            return whole(u) if rows is None else product(u, torch.as_tensor(rows).to(theta.device))

        return rebuild(_lissa(step, vector, how))
    if solver == "exact":
        identity = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
        hessian = torch.func.vmap(whole, chunk_size=64)(identity).cpu().double().numpy()
        h = _dense_solve(_checked(hessian, hessian), _vector(vector), how)
    else:

        def on_host(u: Array) -> Array:
            out = whole(torch.as_tensor(u, dtype=theta.dtype, device=theta.device))
            return _checked(out.cpu().double().numpy(), u)

        h = _conjugate_gradients(on_host, _vector(vector), how)
    return rebuild(torch.as_tensor(h, dtype=theta.dtype, device=theta.device))


def _flattened(params: Any, v: Any, parameters: str | Sequence[str] | None) -> tuple[Any, ...]:
    """The chosen parameters and v as vectors; params from such a vector; v's nesting from one."""
    import torch
    from torch.utils import _pytree as pytree

    from scoredraw.data_selection.gradients import matches

    chosen, wanted = params, v
    if parameters is not None:
        named = isinstance(params, Mapping)
        require(named, "params", type(params).__name__, "a dict, to choose parameters by name")
        chosen = {k: p for k, p in params.items() if matches(k, parameters)}
        known = ", ".join(map(str, params))[:300]
        require(bool(chosen), "parameters", repr(parameters), f"names among {known}")
        wanted = {k: v[k] for k in chosen if k in v}
    leaves, tree = pytree.tree_flatten(chosen)
    given, other = pytree.tree_flatten(wanted)
    shapes = [tuple(p.shape) for p in leaves]
    came = [tuple(p.shape) for p in given]
    fits = bool(leaves) and tree == other and shapes == came
    require(fits, "v", f"{other} of {came}"[:300], f"{tree} of {shapes}"[:300])
    theta = torch.cat([p.detach().reshape(-1) for p in leaves])
    vector = torch.cat([p.detach().reshape(-1) for p in given]).to(theta)
    require(bool(vector.isfinite().all()), "v", "NaN or infinity", "finite numbers")
    require(bool(theta.isfinite().all()), "params", "NaN or infinity", "finite numbers")

    def rebuild(flat: Any) -> Any:
        parts = flat.split([p.numel() for p in leaves])
        shaped = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return pytree.tree_unflatten(shaped, tree)

    def moved(flat: Any) -> Any:
        return rebuild(flat) if parameters is None else {**params, **rebuild(flat)}

    return theta, moved, vector, rebuild


# ── The three solvers ────────────────────────────────────────────────────────────────────────────


def _dense_solve(hessian: Array, v: Array, how: Options) -> Array:
    from scipy.linalg import LinAlgError, solve

    damped = (hessian + hessian.T) / 2 + how.damping * np.eye(len(v))
    try:
        return np.asarray(solve(damped, v, assume_a="sym"))
    except LinAlgError:
        raise InputError(f"damping: got {how.damping}, want more: H + it is singular") from None


def _conjugate_gradients(product: Callable[[Array], Array], v: Array, how: Options) -> Array:
    from scipy.sparse.linalg import LinearOperator, cg

    def damped(u: Array) -> Array:
        u = u.reshape(-1)
        result = product(u) + how.damping * u
        positive = float(u @ result) > 0 or not u.any()
        require(positive, "damping", f"{how.damping} and negative curvature", "more damping")
        return np.asarray(result)

    operator = LinearOperator((len(v), len(v)), matvec=damped, dtype=np.float64)
    limit = min(10 * len(v) + 100, MAX_ITERATIONS)
    h, iterations = cg(operator, v, rtol=how.tolerance, atol=0.0, maxiter=limit)
    came = f"{how.tolerance:g}, not reached in {iterations} iterations"
    require(iterations == 0, "tolerance", came, "a larger one, or more damping")
    return np.asarray(h)


def _lissa(product: Callable[[Any], Any], v: Any, how: Options) -> Any:
    """The recursion on a NumPy or torch vector; `product(u)` is H u or a fresh example's."""
    limit = GROWTH * float((v * v).sum()) ** 0.5
    total: Any = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging run is caught below
        for _ in range(how.repeats):
            h = v
            for step in range(how.depth):
                if how.released:
                    h = v + (1 - how.damping) * h - product(h) / how.scale
                else:
                    h = h + (v - product(h) - how.damping * h) / how.scale
                if step % LOOK_EVERY == 0 or step == how.depth - 1:
                    length = float((h * h).sum()) ** 0.5
                    came = f"{how.scale:g}, with which LiSSA diverges in {step + 1} steps"
                    wanted = "at least the largest eigenvalue of a Hessian it draws"
                    require(length <= limit, "scale", came, wanted)
            total = total + h
    return total / how.repeats
