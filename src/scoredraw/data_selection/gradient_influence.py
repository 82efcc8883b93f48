r"""Influence of training examples on a reference set, from activations at linear layers.

Up-weighting example z by a little lowers the mean loss of a reference set by

.. math:: I(z)=\langle P,G_z\rangle,\qquad P=(F+\lambda I)^{-1}G_{\mathrm{ref}}

(positive is helpful). The gradient of z at a linear layer is a sum of outer products over its
positions, :math:`G_z=\sum_t\delta_ta_t^\top`, so that

.. math:: \langle P,G_z\rangle=\sum_t\delta_t^\top Pa_t,\qquad
          \langle G_z,G_u\rangle=\sum_{t,v}(a_t\cdot a'_v)(\delta_t\cdot\delta'_v),

and no example's gradient is ever formed: one forward and one backward pass a batch give all
:math:`a_t` and :math:`\delta_t`. `kronecker` gives P. Gradients that do have to be kept are
projected by random signs. Batches and models are as in `evaluation`.

Zhang et al., 2025, arXiv:2409.16986. The code released with it projects the reference at linear
layers only and training gradients at all parameters, with two matrices that have nothing in
common, and drops the last references of a loader; here both sides pass the same layers and signs
or are refused, and every example counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scoredraw.arrays import on_host
from scoredraw.data_selection.evaluation import Forward
from scoredraw.data_selection.gradients import outer_square
from scoredraw.data_selection.linear_traces import Loss, TraceReader
from scoredraw.errors import require
from scoredraw.uniforms import RowUniforms

Gradients = Mapping[str, Tensor]
Float = NDArray[np.float64]

_CELLS = 1 << 24  # numbers held at a time


# ── Influence ────────────────────────────────────────────────────────────────────────────────────


def mean_gradient(reader: TraceReader, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The mean over examples of the loss gradient at every layer, (out, in [+ 1]) by name.

    >>> model = nn.Linear(1, 2)
    >>> data = [(torch.ones(3, 1), torch.tensor([0, 0, 1]))]
    >>> g = mean_gradient(TraceReader(model), data)[""]
    >>> nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    >>> bool(torch.allclose(g, torch.hstack([model.weight.grad, model.bias.grad[:, None]])))
    True
    """
    total: dict[str, Tensor] = {}
    count = 0
    for size, traces in reader.read(batches):
        count += size
        for name, (a, delta, _) in traces.items():
            part = delta.flatten(0, 1).T @ a.flatten(0, 1)
            total[name] = total[name] + part if name in total else part
    require(count > 0, "batches", "no batch", "one or more")
    return {name: value / count for name, value in total.items()}


def linear_influence(
    reader: TraceReader,
    batches: Iterable[Any],
    preconditioned: Gradients,
    *,
    normalize: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Float:
    """Influence of every example of the batches, sum over layers and positions of δᵀ P a: (n,).

    preconditioned: P by layer, what `KFACFactors.ihvp` makes of the reference's `mean_gradient`
    (P (r, out, in) for r references gives (n, r)). normalize: P and every example's gradient are
    scaled to length one over all layers; an example without a gradient gets 0. Positive: training
    on it lowers the reference loss. Raises InputError where the layers differ. No gradient is
    formed: time O(positions out in) a layer, memory of one batch's activations.
    """
    have = [site.name for site in reader.sites]
    came = sorted(preconditioned)
    require(came == sorted(have), "preconditioned", f"layers {', '.join(came)}", ", ".join(have))
    values, seen = [], 0
    for size, traces in reader.read(batches):
        total: Any = 0.0
        square: Any = 0.0
        for name, (a, delta, _) in traces.items():
            P = preconditioned[name].to(a)
            total = total + _contract(a, delta, P)
            if normalize:
                square = square + outer_square(a, delta, False)
        if normalize:
            total = total / _lengths(square, total.ndim)
        values.append(total.double().cpu().numpy())
        seen += size
        if progress is not None:
            progress(seen)
    require(bool(values), "batches", "no batch", "one or more")
    result: Float = np.concatenate(values)
    if normalize:
        squares = [P.double().square().sum((-2, -1)) for P in preconditioned.values()]
        length = torch.stack(squares).sum(0).sqrt().cpu().numpy()
        result = result / np.where(length > 0, length, 1.0)
    return result


def _contract(a: Tensor, delta: Tensor, P: Tensor) -> Tensor:
    """Sum over positions of δᵀ P a: (n,), or (n, r) for P (r, out, in)."""
    if P.ndim == 2:
        return (delta @ P * a).sum((1, 2))
    return torch.stack([_contract(a, delta, one) for one in P], dim=1)


def _lengths(square: Tensor, ndim: int) -> Tensor:
    length = square.sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length))
    return length[:, None] if ndim == 2 else length


def influence(ihvp: Any, gradients: Any, *, normalize: bool = True) -> Float:
    """Mean over reference rows of their dot products with training gradients, float64 (n,).

    ihvp: (D,) or (r, D), preconditioned reference gradients; gradients: (n, D); or dicts of layer
    name -> (..., out, in) matrices, both with the same layers. Positive is helpful. normalize
    scales every row to length one; a row of length 0 gives 0. Raises InputError where dimensions
    or layers differ (gradients of other parameters, or another projection). O(n r D).

    >>> influence([[2.0, 0.0]], [[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).tolist()
    [1.0, 0.0, 0.0]
    """
    if isinstance(ihvp, Mapping):
        require(isinstance(gradients, Mapping), "gradients", "no dict", "a dict as ihvp is one")
        names = sorted(ihvp)
        require(sorted(gradients) == names, "gradients", f"layers {sorted(gradients)}", f"{names}")
        ihvp = np.concatenate([_rows(ihvp[k]) for k in names], axis=1)
        gradients = np.concatenate([_rows(gradients[k], many=True) for k in names], axis=1)
    left, right = np.atleast_2d(_numbers(ihvp)), _numbers(gradients)
    fits = right.ndim == 2 and left.ndim == 2 and right.shape[1] == left.shape[1]
    require(fits, "gradients", f"shape {right.shape}", f"(n, {left.shape[-1]}), as ihvp")
    if normalize:
        left, right = (
            x / _nonzero(np.linalg.norm(x, axis=1, keepdims=True)) for x in (left, right)
        )
    return np.asarray(right @ left.mean(axis=0))


def _numbers(x: Any) -> Float:
    return np.asarray(on_host(x), dtype=np.float64)


def _rows(x: Any, many: bool = False) -> Float:
    values = _numbers(x)
    require(values.ndim >= 2 + many, "gradients", f"shape {values.shape}", "(..., out, in)")
    return values.reshape(-1, values.shape[-2] * values.shape[-1])


def _nonzero(length: Float) -> Float:
    return np.where(length > 0, length, 1.0)


# ── Dot products and projections ─────────────────────────────────────────────────────────────────


def linear_gradient_dots(
    model: nn.Module,
    first: tuple[Any, Tensor],
    second: tuple[Any, Tensor],
    *,
    layers: str | Sequence[str] = "linear",
    loss: Loss | None = None,
    forward: Forward | None = None,
    mask_key: str | None = "attention_mask",
) -> Tensor:
    """Dot products of two sets of examples' loss gradients at linear layers, (n, m).

    What `gradients.gradient_dots` gives for those parameters, from inputs and output gradients
    alone: one position an example is (a · a')(δ · δ'), a layer. `first` and `second` are pairs
    (inputs, labels); other arguments as `KFACFactors.fit`. Raises InputError as that does. Two
    forward and backward passes, and O(n m (in + out)) a layer; with T positions by pairs of
    positions or by gradients of a few examples at a time, whichever is less.

    >>> model = nn.Linear(2, 2)
    >>> z = (torch.ones(3, 2), torch.tensor([0, 1, 1]))
    >>> tuple(linear_gradient_dots(model, z, z).shape)
    (3, 3)
    """
    reader = TraceReader(
        model, layers, fuse_qkv=False, loss=loss, forward=forward, mask_key=mask_key
    )
    left, right = reader.traces(*first), reader.traces(*second)
    parts = [_dots(*left[name][:2], *right[name][:2]) for name in left]
    return torch.stack(parts).sum(dim=0)


def _dots(a: Tensor, delta: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    (n, T, p), (m, U, q) = a.shape, eps.shape
    if T == U == 1:
        return (a[:, 0] @ b[:, 0].T) * (delta[:, 0] @ eps[:, 0].T)
    by_pairs = T * U * (p + q) < p * q
    step = max(1, _CELLS // (T * m * U if by_pairs else p * q))
    rows = []
    for at in range(0, n, step):
        x, d = a[at : at + step], delta[at : at + step]
        if by_pairs:
            both = (x.flatten(0, 1) @ b.flatten(0, 1).T) * (d.flatten(0, 1) @ eps.flatten(0, 1).T)
            rows.append(both.reshape(len(x), T, m, U).sum((1, 3)))
        else:
            G = (d.mT @ x).flatten(1)
            columns = range(0, m, step)
            parts = [G @ (eps[c : c + step].mT @ b[c : c + step]).flatten(1).T for c in columns]
            rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def rademacher_projection(gradients: Any, width: int = 8192, *, seed: int = 0) -> Float:
    """Random signs over sqrt(width): (n, D) gradients as float64 (n, width), dot products kept.

    E<Rx, Ry> = <x, y>, with variance (|x|^2|y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / width, about
    (1 + cos^2) / width for unit rows. gradients: (n, D), or a dict of layer name -> (n, out, in);
    a layer's signs depend on the seed, its name and the place in it, and on nothing else: the same
    for a reference and for training gradients, for any number of rows at a time. Signs are made
    for a few thousand weights at a time and not kept. Raises InputError on width < 1, NaN.

    Time O(n D width), memory O((n + 4096) width). Johnson and Lindenstrauss, 1984; Achlioptas,
    2003.

    >>> x = np.eye(2, 50)
    >>> projected = rademacher_projection(x, 1000)
    >>> np.allclose(projected @ projected.T, x @ x.T, atol=0.2)
    True
    """
    require(width >= 1, "width", width, "at least 1")
    layers = gradients if isinstance(gradients, Mapping) else {"": gradients}
    uniforms, words = RowUniforms(seed), -(-width // 64)
    total: Any = 0.0
    for name, value in layers.items():
        rows = _numbers(value)
        require(rows.ndim >= 2, "gradients", f"shape {rows.shape}", "a row an example")
        require(bool(np.isfinite(rows).all()), "gradients", "NaN or infinity", "finite numbers")
        rows = rows.reshape(len(rows), -1)
        step = max(1, _CELLS // (64 * words))
        for at in range(0, rows.shape[1], step):
            part = rows[:, at : at + step]
            span = at * words, (at + part.shape[1]) * words
            bits = uniforms.words(*span, stream=f"signs {name}").view(np.uint8)
            signs = np.unpackbits(bits, bitorder="little").reshape(part.shape[1], -1)[:, :width]
            total = total + part @ (2.0 * signs - 1.0)
    return np.asarray(total / math.sqrt(width))
