r"""Kronecker-factored curvature: inverse Hessians of linear layers that fit in memory.

A linear layer with inputs :math:`a_t` and output gradients :math:`\delta_t` at the positions t of
an example z has the weight gradient :math:`G_z=\sum_t\delta_ta_t^\top` (out x in; with a bias, a
ends in a 1). Its Fisher matrix :math:`E_z[\mathrm{vec}(G_z)\mathrm{vec}(G_z)^\top]` has
(out in)^2 entries. K-FAC takes inputs and output gradients as independent,

.. math:: F\approx S\otimes A,\qquad A=E[a a^\top],\quad S=E[\delta\delta^\top]

(vec row by row, E over positions and examples, padding left out), and EK-FAC keeps its eigenbases
and measures the eigenvalues in them, :math:`\Lambda=E_z[(Q_S^\top G_zQ_A)^{\circ2}]`, which is the
best diagonal there is. Either inverse is two small rotations there and back,

.. math:: (F+\lambda I)^{-1}V=Q_S\,\bigl[(Q_S^\top VQ_A)/(\Lambda+\lambda)\bigr]\,Q_A^\top.

Queries, keys and values of an attention head read the same inputs and are one layer here, whose S
holds their cross terms too. The arithmetic runs on NumPy arrays and on torch tensors alike; torch
is needed only to look into a model (`KFACFactors.fit`).

Martens and Grosse, 2015, arXiv:1503.05671 (K-FAC); George, Laurent, Bouthillier, Ballas and
Vincent, 2018, arXiv:1806.03884 (EK-FAC); Grosse et al., 2023, arXiv:2308.03296 (influence); Zhang
et al., 2025, arXiv:2409.16986 (attention). The code released with the last one divides by
1 / (Lambda + lambda), takes V of an SVD for its transpose and leaves out modules called wqkv and
wo; nothing of that is repeated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from scoredraw.arrays import is_tensor
from scoredraw.errors import import_extra, require

Form = Literal["ekfac", "kfac", "factored"]
Fisher = Literal["empirical", "sampled"]
Matrix = Any  # a NumPy array or a torch tensor

FORMS = ("ekfac", "kfac", "factored")
_CELLS = 1 << 24  # gradient entries held at a time where an example has several positions
_EXACT = 4096  # weights of a layer whose whole Fisher matrix may be formed


# ── One layer ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """A (in, in) and S (out, out) of a layer, their eigenbases, and Λ (out, in) if fitted.

    Eigenvalues a and s ascend; Λ has a row an eigenvector of S, a column an eigenvector of A.
    scale multiplies S ⊗ A: 1, or the mean number of positions an example (`token_scale`).

    >>> rng = np.random.default_rng(0)
    >>> layer = LayerFactors.of(rng.normal(size=(50, 1, 3)), rng.normal(size=(50, 1, 2)))
    >>> V = rng.normal(size=(2, 3))
    >>> bool(np.allclose(layer.ihvp(V, 1e9) * 1e9, V))
    True
    """

    A: Matrix
    S: Matrix
    Q_A: Matrix
    a: Matrix
    Q_S: Matrix
    s: Matrix
    Lambda: Matrix | None = None
    scale: float = 1.0

    @classmethod
    def of_covariances(cls, A: Matrix, S: Matrix, scale: float = 1.0) -> LayerFactors:
        """From A and S: two eigendecompositions, O(in^3 + out^3)."""
        a, Q_A = linalg(A).eigh(A)
        s, Q_S = linalg(S).eigh(S)
        return cls(A, S, Q_A, a.clip(0), Q_S, s.clip(0), None, scale)

    @classmethod
    def of(
        cls,
        inputs: Matrix,
        deltas: Matrix,
        *,
        mask: Matrix | None = None,
        ekfac: bool = True,
        token_scale: bool = False,
    ) -> LayerFactors:
        """From what a layer received and sent back: inputs (n, T, in), deltas (n, T, out).

        mask: (n, T), 0 at padding. InputError on shapes that do not fit, or NaN.
        """
        fits = inputs.ndim == 3 and deltas.ndim == 3 and inputs.shape[:2] == deltas.shape[:2]
        came = f"shapes {tuple(inputs.shape)} and {tuple(deltas.shape)}"
        require(fits and inputs.shape[0] > 0, "deltas", came, "(n, T, in) and (n, T, out)")
        count = inputs.shape[0] * inputs.shape[1]
        if mask is not None:
            want = tuple(inputs.shape[:2])
            require(tuple(mask.shape) == want, "mask", tuple(mask.shape), f"shape {want}")
            count = int((mask != 0).sum())
            require(count > 0, "mask", "nothing kept", "one position or more")
            inputs, deltas = inputs * mask[..., None], deltas * mask[..., None]
        A, S = second_moment(inputs) / count, second_moment(deltas) / count
        finite = bool(np.isfinite(float(A.sum())) and np.isfinite(float(S.sum())))
        require(finite, "inputs, deltas", "NaN or infinity", "finite numbers")
        layer = cls.of_covariances(A, S, count / inputs.shape[0] if token_scale else 1.0)
        if not ekfac:
            return layer
        return layer.with_lambda(squared_projection(inputs, deltas, layer) / inputs.shape[0])

    def with_lambda(self, Lambda: Matrix) -> LayerFactors:
        """The same layer with these eigenvalues."""
        return LayerFactors(**{**vars(self), "Lambda": Lambda})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the gradients it applies to."""
        return len(self.S), len(self.A)

    def curvature(self, form: Form = "ekfac") -> Matrix:
        """The eigenvalues in the Kronecker basis, (out, in): Λ, or scale · s aᵀ for K-FAC."""
        require(form in ("ekfac", "kfac"), "form", repr(form), "'ekfac' or 'kfac'")
        if form == "kfac":
            return self.scale * self.s[:, None] * self.a
        require(self.Lambda is not None, "form", "'ekfac' of factors fitted without", "'kfac'")
        return self.Lambda

    def ihvp(self, gradient: Matrix, damping: float = 1e-3, form: Form | None = None) -> Matrix:
        """(F + damping I)^-1 V for gradients V (..., out, in); see `KFACFactors.ihvp`."""
        form = self._checked(damping, form)
        shape = tuple(gradient.shape[-2:])
        require(shape == self.shape, "gradients", f"shape {shape}", f"(..., {self.shape})")
        Q_S, Q_A = like(self.Q_S, gradient), like(self.Q_A, gradient)
        divisor = like(self._divisor(damping, form), gradient)
        return Q_S @ ((Q_S.mT @ gradient @ Q_A) / divisor) @ Q_A.mT

    def _divisor(self, damping: float, form: Form) -> Matrix:
        if form != "factored":
            return self.curvature(form) + damping
        s = self.scale * self.s
        by_input, by_output = float(self.a.mean()), float(s.mean())  # traces over widths
        pi = math.sqrt(by_input / by_output) if by_input > 0 and by_output > 0 else 1.0
        root = math.sqrt(damping)
        return (s + root / pi)[:, None] * (self.a + root * pi)

    def _checked(self, damping: float, form: Form | None) -> Form:
        require(0 < damping < math.inf, "damping", damping, "a positive number")
        chosen: Form = form or ("kfac" if self.Lambda is None else "ekfac")
        require(chosen in FORMS, "form", repr(form), f"one of {', '.join(FORMS)}")
        return chosen

    def dense(self, form: Form = "ekfac") -> Matrix:
        """The approximated Fisher matrix itself, (out in, out in), vec row by row; small layers."""
        q, p = self.shape
        require(q * p <= _EXACT, "layer", f"{q * p} weights", f"at most {_EXACT}")
        xp = namespace(self.A)
        basis = xp.kron(self.Q_S, self.Q_A)
        return (basis * self.curvature(form).reshape(-1)) @ basis.T


def second_moment(x: Matrix) -> Matrix:
    """Sum of x xᵀ over all leading axes, float64 (d, d)."""
    flat = x.reshape(-1, x.shape[-1])
    return double(flat.T @ flat)


def squared_projection(inputs: Matrix, deltas: Matrix, layer: LayerFactors) -> Matrix:
    """Sum over examples of the squares of Q_Sᵀ G_z Q_A, float64 (out, in).

    With one position an example no gradient is formed; otherwise a few examples' at a time.
    """
    x, d = inputs @ like(layer.Q_A, inputs), deltas @ like(layer.Q_S, deltas)
    if x.shape[1] == 1:
        return double((d[:, 0] ** 2).T @ (x[:, 0] ** 2))
    step = max(1, _CELLS // (x.shape[-1] * d.shape[-1]))
    total: Matrix = 0.0
    for start in range(0, len(x), step):
        gradients = d[start : start + step].mT @ x[start : start + step]
        total = total + double((gradients**2).sum(0))
    return total


def exact_fisher(inputs: Matrix, deltas: Matrix) -> Matrix:
    """E_z[vec(G_z) vec(G_z)ᵀ] of a small layer, (out in, out in): what K-FAC approximates.

    inputs (n, T, in), deltas (n, T, out), zero at padding. InputError above 4,096 weights.

    >>> exact_fisher(np.ones((2, 1, 1)), np.array([[[1.0]], [[3.0]]])).tolist()
    [[5.0]]
    """
    weights = inputs.shape[-1] * deltas.shape[-1]
    require(weights <= _EXACT, "inputs, deltas", f"{weights} weights", f"at most {_EXACT}")
    rows = (deltas.mT @ inputs).reshape(len(inputs), -1)
    return double(rows.T @ rows) / len(rows)


def exact_ihvp(fisher: Matrix, gradient: Matrix, damping: float = 1e-3) -> Matrix:
    """(F + damping I)^-1 V by a dense solve, V (out, in).

    >>> exact_ihvp(np.array([[3.0]]), np.array([[8.0]]), 1.0).tolist()
    [[2.0]]
    """
    require(0 < damping < math.inf, "damping", damping, "a positive number")
    xp = namespace(fisher)
    damped = fisher + damping * like(xp.eye(len(fisher)), fisher)
    return xp.linalg.solve(damped, gradient.reshape(-1)).reshape(gradient.shape)


# ── All linear layers of a model ─────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class KFACFactors:
    """K-FAC or EK-FAC factors of a model's linear layers, and inverse-Hessian products with them.

    layers: name -> `LayerFactors`, in the model's order. A gradient is a dict of the same names;
    each matrix is (out, in), with a bias (out, in + 1), the bias last; fused queries, keys and
    values lie one below the other. `gradient_influence.mean_gradient` gives such a dict.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.randn(20, 3), torch.randint(2, (20,)))]
    >>> factors = KFACFactors.fit(model, data)
    >>> {name: layer.shape for name, layer in factors.layers.items()}
    {'': (2, 4)}
    """

    layers: dict[str, LayerFactors] = field(default_factory=dict)
    examples: int = 0
    fisher: Fisher = "empirical"

    @classmethod
    def fit(
        cls,
        model: Any,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], Any] | None = None,
        *,
        layers: str | Sequence[str] = "linear",
        fuse_qkv: bool = True,
        ekfac: bool = True,
        token_scale: bool = False,
        fisher: Fisher = "empirical",
        forward: Callable[[Any, Any], Any] | None = None,
        mask_key: str | None = "attention_mask",
        generator: Any = None,
        progress: Callable[[int], None] | None = None,
    ) -> KFACFactors:
        """Fit the factors on the batches of `loader`: one pass, for EK-FAC two.

        Parameters
        ----------
        model : any torch module; its `nn.Linear` and transformers `Conv1D` layers are looked at,
            in evaluation mode, whatever they are called. Its state is left as it was.
        loader : batches as in `evaluation`; with ekfac one that can be iterated twice.
        loss_fn : (outputs, labels) to one loss an example, or their sum. By default cross-entropy
            of logits (n, C) or (n, T, C), summed over positions; label -100 is left out.
        layers : "linear" for all, or names and prefixes.
        fuse_qkv : separate query, key and value projections of one input as one layer.
        token_scale : multiply S ⊗ A by the mean number of positions of an example: an example's
            gradient is a sum over its positions, and the Fisher of a sum of T independent terms is
            T times that of one. EK-FAC measures Λ on whole examples and needs no such factor.
        fisher : "empirical" takes the gradients at the given labels; "sampled" at labels drawn
            from the model's own softmax (the true Fisher, the Gauss-Newton matrix), with
            `generator`, a `torch.Generator`.
        mask_key : padding mask (n, T) among the inputs; layers with T positions leave it out.

        Raises InputError on an empty loader, no linear layer, tied weights, NaN, an iterator for
        EK-FAC. Time O(positions (in^2 + out^2) + in^3 + out^3) a layer, for EK-FAC with T > 1 also
        O(positions in out); memory in^2 + out^2 + in out, and the gradients of a few examples.
        """
        import_extra("torch", "torch")
        from scoredraw.data_selection.linear_traces import TraceReader

        require(
            fisher in ("empirical", "sampled"), "fisher", repr(fisher), "'empirical', 'sampled'"
        )
        twice = not (ekfac and isinstance(loader, Iterator))
        require(twice, "loader", "an iterator", "batches that can be read twice (or ekfac=False)")
        reader = TraceReader(
            model, layers, fuse_qkv=fuse_qkv, loss=loss_fn, forward=forward, mask_key=mask_key,
            sample=fisher == "sampled", generator=generator,
        )  # fmt: skip
        factors = cls(*_covariances(reader, loader, token_scale, progress), fisher)
        if ekfac:
            _fit_lambdas(factors, reader, loader, progress)
        return factors

    def ihvp(
        self, gradients: Mapping[str, Matrix], damping: float = 1e-3, form: Form | None = None
    ) -> dict[str, Matrix]:
        """(F + damping I)^-1 V, layer by layer, for V (..., out, in) by name.

        form: "ekfac" divides by Λ + λ; "kfac" by s aᵀ + λ, the exact inverse of S ⊗ A + λI;
        "factored" is (S + √λ/π)⁻¹ V (A + π√λ)⁻¹ with π² = (tr A / in) / (tr S / out). None: EK-FAC
        if fitted. Returns the dtype and device of V. Raises InputError on damping <= 0 or layers
        that are not the fitted ones. Time O(out in (out + in)) a gradient.
        """
        came, have = sorted(gradients), sorted(self.layers)
        require(bool(have), "factors", "none", "fitted ones")
        require(came == have, "gradients", f"layers {', '.join(came)}", ", ".join(have))
        return {k: layer.ihvp(gradients[k], damping, form) for k, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything fitted, for `torch.save` or `numpy.savez`."""
        layers = {name: dict(vars(layer)) for name, layer in self.layers.items()}
        return {"layers": layers, "examples": self.examples, "fisher": self.fisher}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        missing = [key for key in ("layers", "examples", "fisher") if key not in state]
        require(not missing, "state", f"no {', '.join(missing)}", "what `state_dict` gives")
        self.layers = {name: LayerFactors(**parts) for name, parts in state["layers"].items()}
        self.examples, self.fisher = state["examples"], state["fisher"]


def _covariances(
    reader: Any, loader: Iterable[Any], token_scale: bool, progress: Callable[[int], None] | None
) -> tuple[dict[str, LayerFactors], int]:
    """Every layer's A and S with their eigenbases, and the number of examples."""
    sums: dict[str, list[Any]] = {}
    examples = 0
    for size, traces in reader.read(loader):
        examples += size
        for name, trace in traces.items():
            parts = (second_moment(trace.inputs), second_moment(trace.deltas), trace.positions)
            before = sums.get(name, (0.0, 0.0, 0))
            sums[name] = [x + y for x, y in zip(before, parts, strict=True)]
        if progress is not None:
            progress(examples)
    require(examples > 0, "loader", "no batch", "one or more")
    layers = {}
    for name, (A, S, count) in sums.items():
        finite = math.isfinite(float(A.sum())) and math.isfinite(float(S.sum()))
        require(finite, "model", f"NaN or infinity at layer {name!r}", "finite gradients")
        scale = count / examples if token_scale else 1.0
        layers[name] = LayerFactors.of_covariances(A / count, S / count, scale)
    return layers, examples


def _fit_lambdas(
    factors: KFACFactors, reader: Any, loader: Iterable[Any], progress: Callable[[int], None] | None
) -> None:
    """The second pass: the eigenvalues, measured in the eigenbases."""
    sums: dict[str, Any] = dict.fromkeys(factors.layers, 0.0)
    seen = factors.examples
    for size, traces in reader.read(loader):
        seen += size
        for name, trace in traces.items():
            squares = squared_projection(trace.inputs, trace.deltas, factors.layers[name])
            sums[name] = sums[name] + squares
        if progress is not None:
            progress(seen)
    same = seen == 2 * factors.examples
    came = f"{seen - factors.examples} examples at the second reading"
    require(same, "loader", came, f"the {factors.examples} of the first")
    for name, total in sums.items():
        factors.layers[name] = factors.layers[name].with_lambda(total / factors.examples)


# ── NumPy or torch ───────────────────────────────────────────────────────────────────────────────


def namespace(x: Matrix) -> Any:
    """torch for a tensor, NumPy otherwise."""
    return sys.modules["torch"] if is_tensor(x) else np


def linalg(x: Matrix) -> Any:
    return namespace(x).linalg


def double(x: Matrix) -> Matrix:
    return x.double() if is_tensor(x) else x.astype(np.float64)


def like(x: Matrix, other: Matrix) -> Matrix:
    """x in the kind, dtype and device of `other`."""
    if is_tensor(other):
        return namespace(other).as_tensor(x).to(other)
    return np.asarray(x, dtype=other.dtype)
