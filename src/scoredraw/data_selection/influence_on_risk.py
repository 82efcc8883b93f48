r"""What leaving an example out would do to the risk, and how hard a model would work to learn it.

Two scores of a training example, one from a cheap model and one from the expensive model that is
to be fine-tuned. With :math:`g_i=\nabla L(z_i)` at trained weights, :math:`v=\frac1n\sum_jg_j` and
the Hessian H of the objective, leaving example i out moves the weights by
:math:`\frac1nH^{-1}g_i` and the empirical risk, to first order, by

.. math:: I_i=\frac1n\,g_i^\top H^{-1}v.

Positive: the risk rises without it, keep it. H is symmetric, so that one solve serves all
examples. The *effort* of the expensive model is the length of the example's gradient on it.

Beware: at an exact minimiser of the same risk v = 0, and every influence with it. The score says
something because the cheap model is regularised, stopped early or trained with noise; hence
`mean_gradient_ratio`, which is looked at whenever the target is the training risk. Under a penalty
g and v are gradients of the *data loss* alone, and H is that of the penalised objective.

Lin, Wang, Li, Yang, Feng, Wei and Chua, 2024, "Data-efficient Fine-tuning for LLM-based
Recommendation" (DEALRec), arXiv:2401.17197; Koh and Liang, 2017, arXiv:1703.04730.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from scoredraw.data_selection.influence import Array, name_rows, require_finite, to_numpy
from scoredraw.data_selection.inverse_hessian import inverse_hessian_product, inverse_hvp
from scoredraw.errors import require
from scoredraw.uniforms import Rng

VANISHING = 1e-6  # a mean gradient this short beside the gradients is rounding
CHUNK = 64  # examples whose gradients are held at once


# ── Influence on the risk ────────────────────────────────────────────────────────────────────────


def influence_on_risk(
    source: Any,
    *,
    target: Any = "train",
    hessian: Any = None,
    loss: Callable[..., Any] | None = None,
    parameters: str | Sequence[str] | None = None,
    penalty: float = 0.0,
    damping: float = 0.01,
    rng: Rng = None,
    **solver: Any,
) -> Array:
    r"""How much the risk rises when an example is left out, to first order.

    :math:`I_i=\frac1n\,g_i^\top(H+\delta I)^{-1}v`; the printed algorithm of the paper divides by
    n once more, which changes no ranking.

    Parameters
    ----------
    source : gradients (n, m), or (model, (inputs, labels)) of a torch model
        Gradients of the data loss, without a penalty's. A model's are taken 64 examples at a
        time, in evaluation mode, and never all held.
    target : "train", the risk of the same examples; or other examples whose risk counts:
        gradients (k, m) or their mean (m,), of a model (inputs, labels).
    hessian : (m, m), `LinearOperator` or function u -> H u, with a penalty's part; gradients only.
    loss : of a model: (outputs, labels) -> the mean loss; cross-entropy by default.
    parameters : of a model: names or prefixes, such as one layer; None takes all.
    penalty : of a model: c where it was trained with :math:`\frac c2\lVert\theta\rVert^2`.
    damping, rng, solver : as `inverse_hvp` (``solver=``, ``scale=``, ``depth=``, ...).

    Returns
    -------
    (n,) float64, in units of the loss. Warns where the target is "train" and its mean gradient
    vanishes beside the gradients: the scores are then rounding errors.

    Raises
    ------
    InputError
        NaN or infinite gradients, none, a Hessian that is missing or does not fit, a target of
        another kind, parameters that match nothing; and what `inverse_hvp` raises.

    Time: the solve and, for a model, two passes of per-example gradients. Memory O(m) for a
    model. Sequential.

    Lin et al., 2024, arXiv:2401.17197.

    >>> g = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    >>> influence_on_risk(g, hessian=np.diag([2.0, 4.0]), damping=0.0).round(4).tolist()
    [0.1111, 0.2222, 0.3333]
    """
    if isinstance(source, tuple):
        require(hessian is None, "hessian", "one beside a model", "none: it is the model's")
        require(penalty >= 0, "penalty", penalty, "at least 0")
        risk = _ModelRisk(*_model_and_data(source), loss, parameters, penalty)
        return _influence_of_model(risk, target, damping=damping, rng=rng, **solver)
    require(hessian is not None, "hessian", None, "the Hessian that goes with the gradients")
    gradients = _gradients(source, "source")
    v = _target_gradient(target, gradients)
    h = inverse_hessian_product(hessian, v, damping=damping, rng=rng, **solver)
    return np.asarray(gradients @ h / len(gradients))


def mean_gradient_ratio(gradients: ArrayLike) -> float:
    r"""How much of the gradients is left in their mean: :math:`\lVert v\rVert` over mean |g_i|.

    0 at a minimiser of the risk, where influence on it says nothing; 1 if all point one way.
    gradients: (n, m). Raises InputError on NaN or infinite ones.

    >>> mean_gradient_ratio([[1.0, 0.0], [-1.0, 0.0]]), mean_gradient_ratio([[3.0, 4.0]])
    (0.0, 1.0)
    """
    g = _gradients(gradients, "gradients")
    return relative_length(g.mean(axis=0), np.linalg.norm(g, axis=1))


def relative_length(mean: Array, lengths: Array) -> float:
    """The length of a mean gradient over the mean length of the gradients."""
    typical = float(lengths.mean())
    return float(np.linalg.norm(mean)) / typical if typical > 0 else 0.0


def warn_if_vanishing(ratio: float) -> None:
    """Say that influence on a risk is noise where the risk's own gradient is."""
    if ratio < VANISHING:
        message = (
            f"target: the mean gradient is {ratio:.1e} of a gradient, the model minimises this "
            "risk and influence on it is noise; stop earlier, or give a validation set as target"
        )
        warnings.warn(message, UserWarning, stacklevel=4)


def _gradients(values: Any, name: str) -> Array:
    gradients = to_numpy(values).astype(np.float64)
    fits = gradients.ndim == 2 and gradients.size > 0
    require(fits, name, f"shape {gradients.shape}", "gradients (n, m), not empty")
    require_finite(name, gradients)
    return gradients


def _target_gradient(target: Any, gradients: Array) -> Array:
    if isinstance(target, str):
        require(target == "train", "target", repr(target), "'train' or gradients")
        v: Array = gradients.mean(axis=0)
        warn_if_vanishing(relative_length(v, np.linalg.norm(gradients, axis=1)))
        return v
    given = np.atleast_2d(to_numpy(target).astype(np.float64))
    m = gradients.shape[1]
    require(given.ndim == 2 and given.shape[1] == m, "target", f"shape {given.shape}", f"(k, {m})")
    require_finite("target", given)
    return np.asarray(given.mean(axis=0))


# ── Of a torch model ─────────────────────────────────────────────────────────────────────────────


@dataclass
class _ModelRisk:
    """A model's mean loss and per-example gradients, as functions of the chosen parameters."""

    model: Any
    data: tuple[Any, Any]
    loss: Callable[..., Any] | None
    parameters: str | Sequence[str] | None
    penalty: float

    def gradients(self, data: tuple[Any, Any]) -> Iterator[Any]:
        """Per-example gradients of the data loss, `CHUNK` rows (b, m) at a time."""
        import torch

        from scoredraw.data_selection.gradients import per_sample_gradients

        for rows in torch.arange(len(data[1])).split(CHUNK):
            found = per_sample_gradients(
                self.model, *_rows_of(data, rows), parameters=self.parameters, loss=self.loss
            )
            yield torch.cat([g.flatten(1) for g in found.values()], dim=1)

    def inverse_hvp(self, v: Any, **options: Any) -> Any:
        """v as a vector over the chosen parameters, in and out."""
        import torch

        from scoredraw.data_selection.evaluation import evaluating, on_model_device
        from scoredraw.data_selection.gradients import matches

        criterion = self.loss or torch.nn.functional.cross_entropy
        data = tuple(on_model_device(self.model, part) for part in self.data)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        chosen = {k: p for k, p in weights.items() if matches(k, self.parameters)}
        whole = _outputs_of(self.model)

        def risk(moving: dict[str, Any], rows: Any) -> Any:
            x, y = _rows_of(data, rows)
            state = {f"model.{name}": p for name, p in {**weights, **moving}.items()}
            value = criterion(torch.func.functional_call(whole, state, (x,)), y)
            squares = torch.stack([p.square().sum() for p in moving.values()]).sum()
            return value + self.penalty / 2 * squares

        parts = v.split([p.numel() for p in chosen.values()])
        nested = {k: part.view_as(p) for (k, p), part in zip(chosen.items(), parts, strict=True)}
        with evaluating(self.model):
            found = inverse_hvp(risk, chosen, nested, n=len(data[1]), **options)
        return torch.cat([part.flatten() for part in found.values()])


def _outputs_of(model: Any) -> Any:
    """The model within a module: `functional_call` swaps weights only for calls through one."""
    from torch import nn

    from scoredraw.data_selection.evaluation import model_outputs

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return model_outputs(self.model, x, None)

    return Whole()


def _influence_of_model(risk: _ModelRisk, target: Any, **options: Any) -> Array:
    n, total, lengths = len(risk.data[1]), 0.0, []
    for g in risk.gradients(risk.data):
        lengths.append(g.norm(dim=1).cpu().double().numpy())
        total = total + g.sum(dim=0)
    v: Any = total / n
    require_finite("source", np.concatenate(lengths))
    if isinstance(target, str):
        require(target == "train", "target", repr(target), "'train' or (inputs, labels)")
        warn_if_vanishing(relative_length(v.cpu().double().numpy(), np.concatenate(lengths)))
    else:
        pair = isinstance(target, tuple) and len(target) == 2 and len(target[1]) > 0
        require(pair, "target", type(target).__name__, "'train' or (inputs, labels) of some rows")
        v = sum(g.sum(dim=0) for g in risk.gradients(target)) / len(target[1])
    h = risk.inverse_hvp(v, **options)
    dots = [(g @ h).cpu().double().numpy() for g in risk.gradients(risk.data)]
    return np.asarray(np.concatenate(dots) / n)


def _model_and_data(source: tuple[Any, ...]) -> tuple[Any, tuple[Any, Any]]:
    pair = len(source) == 2 and isinstance(source[1], tuple | list) and len(source[1]) == 2
    require(pair, "source", f"{len(source)} parts", "gradients, or (model, (inputs, labels))")
    model, (inputs, labels) = source
    require(len(labels) > 0, "source", "no examples", "one or more")
    return model, (inputs, labels)


def _rows_of(data: tuple[Any, ...], rows: Any) -> tuple[Any, Any]:
    from scoredraw.data_selection.evaluation import map_tensors

    return map_tensors(data[0], lambda t: t[rows]), data[1][rows]


# ── Effort ───────────────────────────────────────────────────────────────────────────────────────


def effort_scores(
    model: Any,
    batches: Iterable[Any],
    *,
    params: str | Sequence[str] | None = None,
    loss: Callable[..., Any] | None = None,
    forward: Callable[..., Any] | None = None,
    chunk_size: int | None = CHUNK,
) -> Array:
    r"""Length of each example's loss gradient on the model that is to be fine-tuned.

    :math:`e_i=\lVert\nabla_\phi L(z_i)\rVert_2` at the weights as they are, before fine-tuning;
    large means the model would have to work for it. Adapter matrices start at 0 on one side, so
    that the other side's gradient is 0 then, as it should be.

    Parameters
    ----------
    model : torch module, read in evaluation mode. batches : as `evaluation`; order kept.
        A mapping with labels (n, L) is a causal language model's: the next token's
        cross-entropy, averaged over an example's labelled tokens (-100 marks the others).
    params : names or prefixes of the parameters; "lora_last" the LoRA matrices of the last layer
        that has some, as published; None all.
    loss : (outputs, labels) of one example, batch axis kept -> its loss.
    forward : (model, inputs) -> outputs, where calling the model is not enough.
    chunk_size : examples a `vmap` holds gradients of.

    Returns
    -------
    (n,) float64. Raises InputError on parameters that match nothing, no LoRA, no batches, an
    example without a labelled token, gradients that are not finite.

    Linear layers (LoRA's are) take one forward and backward pass a batch and form no gradient;
    anything else runs under `vmap`, which the model must bear. Row-local given the model.

    Lin et al., 2024, arXiv:2401.17197 (equation 12; LoRA, r = 8, of a 7B model there).

    >>> import torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> effort_scores(model, [(torch.tensor([[2.0]]), torch.tensor([0]))]).round(4).tolist()
    [1.4142]
    """
    from scoredraw.data_selection import gradients as g
    from scoredraw.data_selection.evaluation import split_batch

    names = lora_last(model) if params == "lora_last" else params
    chosen = [k for k, _ in model.named_parameters() if g.matches(k, names)]
    known = ", ".join(k for k, _ in model.named_parameters())[:300]
    require(bool(chosen), "params", repr(params), f"names among {known}")
    layers = None if loss is not None else _linear_layers_of(model, chosen)
    scores: list[Array] = []
    for batch in batches:
        inputs, labels = split_batch(batch)
        if labels.ndim > 1 and loss is None:
            empty = np.flatnonzero(to_numpy((labels[:, 1:] == -100).all(dim=1)))
            came = f"no labelled token in {name_rows(empty + sum(len(part) for part in scores))}"
            require(len(empty) == 0, "labels", came, "one or more after the first")
        if layers is not None:
            each = _token_losses if labels.ndim > 1 else None
            squares = g.squared_linear_norms(
                model, inputs, labels, layers=layers, loss=each, forward=forward
            )
        else:
            one = loss or (_token_losses_sum if labels.ndim > 1 else None)
            squares = g.squared_gradient_norms(
                model, inputs, labels, parameters=chosen, loss=one, forward=forward,
                chunk_size=chunk_size,
            )  # fmt: skip
        scores.append(squares.detach().double().clamp(min=0).sqrt().cpu().numpy())
    require(bool(scores), "batches", "none", "one or more")
    effort = np.concatenate(scores)
    require_finite("effort", effort)
    return effort


def lora_last(model: Any) -> list[str]:
    """Names of the LoRA parameters of the last layer that has some.

    A layer is the path up to its first number; "last" is the largest number in the stack of the
    model's last LoRA matrix. Raises InputError where there is no LoRA.

    >>> import torch
    >>> layer = lambda: torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 1, bias=False)})
    >>> lora_last(torch.nn.ModuleList([layer(), layer()]))
    ['1.lora_A.weight']
    """
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    require(bool(names), "params", "'lora_last' of a model without LoRA", "a model with LoRA")
    places = {name: re.match(r"(.*?\.)(\d+)\.", f".{name}") for name in names}
    last = places[names[-1]]
    if last is None:  # no numbered layers: the module that the last matrix belongs to
        module = names[-1].split("lora_")[0]
        return [name for name in names if name.startswith(module)]
    stack = {k: int(p[2]) for k, p in places.items() if p is not None and p[1] == last[1]}
    return [name for name, number in stack.items() if number == max(stack.values())]


def _linear_layers_of(model: Any, chosen: Sequence[str]) -> list[str] | None:
    """The linear layers that these parameters are all of, or None if they are not just that."""
    from torch import nn

    layers = [
        (name, {f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)})
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name
    ]
    inside = [(name, own) for name, own in layers if own <= set(chosen)]
    covered: set[str] = set().union(*(own for _, own in inside))
    return [name for name, _ in inside] if covered == set(chosen) else None


def _token_losses(outputs: Any, labels: Any) -> Any:
    """Cross-entropy of the next token, averaged over each example's labelled tokens, (n,)."""
    import torch
    from torch.nn.functional import cross_entropy

    fits = outputs.ndim == 3 and labels.shape == outputs.shape[:2]
    require(fits, "labels", tuple(labels.shape), f"(n, L) beside logits {tuple(outputs.shape)}")
    wide = torch.promote_types(outputs.dtype, torch.float32)
    logits, following = outputs[:, :-1].to(wide), labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), following, reduction="none", ignore_index=-100)
    return losses.sum(dim=1) / (following != -100).sum(dim=1)


def _token_losses_sum(outputs: Any, labels: Any) -> Any:
    return _token_losses(outputs, labels).sum()
