r"""Per-example gradients of a torch model: the traces that VoG, GraNd and TracIn are made of.

Three kinds. *Input gradients*: how the label's logit moves with the embedding output (or the
pixels), by one backward pass a batch, since in evaluation mode no example touches another.
*Weight gradients* of each example's loss, by ``vmap(grad)`` over any parameters. And the squared
*lengths* of weight gradients at linear layers, from what the layer received and sent back, without
forming a gradient: with inputs :math:`a_t` and output gradients :math:`\delta_t` at positions t,
:math:`\lVert\sum_t\delta_t a_t^\top\rVert^2=\sum_{t,u}(a_t\cdot a_u)
(\delta_t\cdot\delta_u)`.

Batches and models are as in `evaluation`. Every function puts the model in evaluation mode,
leaves each module's mode, every `requires_grad` and every `.grad` as they were, and moves batches
to the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scoredraw.data_selection.evaluation import (
    Forward,
    check_labels,
    describe,
    evaluating,
    find_layer,
    map_tensors,
    model_outputs,
    on_model_device,
    split_batch,
)
from scoredraw.data_selection.influence import GradientSpread, Spread
from scoredraw.errors import require

Target = Literal["logit", "probability"] | Callable[[Tensor, Tensor], Tensor]


# ── Gradients at the input ───────────────────────────────────────────────────────────────────────


def input_gradients(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    layer: str | nn.Module | None = None,
    target: Target = "logit",
    forward: Forward | None = None,
) -> Tensor:
    """Gradient of each example's true-label logit at a layer's output, or at the raw input.

    d A_y / d E with A the pre-softmax activation and E the output of `layer` (a module or its
    name, such as ``"bert.embeddings"``), or `inputs` itself where `layer` is None and they are
    one float tensor. `target` may be ``"probability"``, or a function of (outputs, labels) that
    gives one number an example (regression, several labels).

    Returns (n, ...) in the shape of E. Raises InputError on an unknown layer, one that does not
    run exactly once, labels out of range. One forward and one backward pass.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> g = input_gradients(model, torch.ones(3, 2), torch.tensor([0, 1, 1]))
    >>> bool((g[2] == model.weight[1]).all())
    True
    """
    inputs, labels = on_model_device(model, inputs), on_model_device(model, labels)
    with evaluating(model), torch.enable_grad():
        if layer is None:
            usable = isinstance(inputs, Tensor) and inputs.is_floating_point()
            require(usable, "inputs", describe(inputs), "a float tensor, or name an inner layer")
            at = inputs.detach().clone().requires_grad_()
            outputs = model_outputs(model, at, forward)
        else:
            with _captured(find_layer(model, layer)) as seen:
                outputs = model_outputs(model, inputs, forward)
            require(len(seen) == 1, "layer", f"one that ran {len(seen)} times", "exactly once")
            at = seen[0]
        (gradient,) = torch.autograd.grad(_selected(outputs, labels, target).sum(), at)
    return gradient.detach()


@contextmanager
def _captured(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph at a layer's output and hand the cut out as a leaf."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        require(isinstance(output, Tensor), "layer", describe(output), "one that puts out a tensor")
        leaf: Tensor = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _selected(outputs: Tensor, labels: Tensor, target: Target) -> Tensor:
    if callable(target):
        chosen = target(outputs, labels)
        fits = chosen.shape == (len(outputs),)
        require(fits, "target", f"shape {tuple(chosen.shape)}", "one number an example")
        return chosen
    require(target in ("logit", "probability"), "target", repr(target), "logit, probability")
    check_labels(outputs, labels)
    values = outputs.softmax(dim=-1) if target == "probability" else outputs
    return values.gather(1, labels.long()[:, None])[:, 0]


def checkpoint_variance(
    checkpoints: Iterable[nn.Module],
    batches: Iterable[Any],
    *,
    layer: str | None = None,
    target: Target = "logit",
    spread: Spread = "std",
    mask_key: str | None = "attention_mask",
    channel_axis: int | None = None,
    forward: Forward | None = None,
) -> NDArray[np.float64]:
    """Variance of gradients of a model's checkpoints, straight from the models.

    `influence.variance_of_gradients` of `input_gradients`. A sequence of models is read batch by
    batch (memory: one batch, all models); an iterator such as `load_states` gives, checkpoint by
    checkpoint (memory: one model, and two float64 arrays of every example's input gradient).
    Both give the same scores. About ten evenly spaced checkpoints of one run.

    Where `layer` is named and the inputs hold `mask_key`, padding is left out of the mean.
    `channel_axis` (1 for images) is averaged over before the spread, as published for images.
    Batches may be padded to different lengths, but must come in one order: ``shuffle=False``.

    Returns (n,) float64. Raises InputError on fewer than two checkpoints, gradients that are not
    finite, an order that changed. Time: one forward and backward an example and checkpoint.

    Agarwal et al., 2022, arXiv:2008.11600; Anand et al., 2023, arXiv:2311.16298.

    >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    >>> twice = nn.Linear(3, 2)
    >>> checkpoint_variance([twice, twice], data).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    running: list[GradientSpread] = []
    masks: list[Any] = []
    order: list[Tensor] = []

    def visit(model: nn.Module, number: int, inputs: Any, labels: Tensor) -> None:
        if number == len(running):
            running.append(GradientSpread(first_row=sum(map(len, order))))
            has_mask = layer is not None and isinstance(inputs, Mapping) and mask_key in inputs
            masks.append(inputs[mask_key] if has_mask else None)
            order.append(labels.cpu())
        same = torch.equal(order[number], labels.cpu())
        require(same, "batches", "another order", "the same at each checkpoint (no shuffling)")
        gradient = input_gradients(
            model, inputs, labels, layer=layer, target=target, forward=forward
        )
        running[number].update(
            gradient if channel_axis is None else gradient.mean(dim=channel_axis)
        )

    if isinstance(checkpoints, Sequence | nn.ModuleList):
        for number, batch in enumerate(batches):
            for model in checkpoints:
                visit(model, number, *split_batch(batch))
    else:
        again = list(batches) if isinstance(batches, Iterator) else batches
        for model in checkpoints:
            for number, batch in enumerate(again):
                visit(model, number, *split_batch(batch))
    require(bool(running), "checkpoints", "no checkpoint or no batch", "two checkpoints, one batch")
    scores = [part.score(spread, mask) for part, mask in zip(running, masks, strict=True)]
    return np.concatenate(scores)


def load_states(model: nn.Module, states: Iterable[Mapping[str, Any]]) -> Iterator[nn.Module]:
    """The model with each state dict in turn; its own weights come back at the end.

    >>> layer = nn.Linear(1, 1)
    >>> zero = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    >>> before = layer.weight.item()
    >>> [m.weight.item() for m in load_states(layer, [zero])], layer.weight.item() == before
    ([0.0], True)
    """
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        for state in states:
            model.load_state_dict(state)
            yield model
    finally:
        model.load_state_dict(own)


# ── Gradients at the weights ─────────────────────────────────────────────────────────────────────


def per_sample_gradients(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    parameters: str | Sequence[str] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    forward: Forward | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Gradient of each example's loss at the weights, by ``vmap(grad)``.

    `parameters` are names or prefixes ("encoder.layer.3"); None takes all. `loss` maps
    (outputs (1, C), labels (1,)) to a number; cross-entropy by default. The model has to be one
    that `torch.func.vmap` can run. Memory n x (number of weights chosen): for lengths and dot
    products use the functions below.

    Returns {parameter name: (n, *its shape)}. Raises InputError on names that match nothing.

    >>> model = nn.Linear(2, 2)
    >>> g = per_sample_gradients(model, torch.ones(3, 2), torch.tensor([0, 1, 1]))
    >>> {name: tuple(value.shape) for name, value in g.items()}
    {'weight': (3, 2, 2), 'bias': (3, 2)}
    """
    gradient, chosen = _gradient_function(model, parameters, loss, forward)
    inputs, labels = on_model_device(model, inputs), on_model_device(model, labels)
    with evaluating(model):
        mapped = torch.func.vmap(gradient, in_dims=(None, 0, 0), chunk_size=chunk_size)
        result: dict[str, Tensor] = mapped(chosen, inputs, labels)
    return result


def squared_gradient_norms(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    parameters: str | Sequence[str] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    forward: Forward | None = None,
    chunk_size: int | None = 64,
) -> Tensor:
    """Squared length of each example's loss gradient over the chosen parameters, (n,).

    What `tracin.tracin_self` sums; its root is what `tracin.grand` averages. Arguments and
    errors as `per_sample_gradients`; memory `chunk_size` x (number of weights chosen). At linear
    layers `squared_linear_norms` is faster and needs no vmap.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.zero_()
    >>> squared_gradient_norms(model, torch.tensor([[2.0]]), torch.tensor([0])).tolist()
    [2.0]
    """
    gradient, chosen = _gradient_function(model, parameters, loss, forward)
    inputs, labels = on_model_device(model, inputs), on_model_device(model, labels)

    def length(weights: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in gradient(weights, x, y).values()]).sum()

    with evaluating(model):
        mapped = torch.func.vmap(length, in_dims=(None, 0, 0), chunk_size=chunk_size)
        result: Tensor = mapped(chosen, inputs, labels)
    return result


def gradient_dots(
    model: nn.Module,
    first: tuple[Any, Tensor],
    second: tuple[Any, Tensor],
    *,
    parameters: str | Sequence[str] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """Dot products of the loss gradients of two sets of examples, (n, m).

    One checkpoint's term of pairwise TracIn before its learning rate. `first` and `second` are
    pairs (inputs, labels); other arguments and errors as `per_sample_gradients`. Memory
    (n + m) x (number of weights chosen): choose one layer, or go in blocks.

    >>> model, z = nn.Linear(2, 2), (torch.ones(3, 2), torch.tensor([0, 1, 1]))
    >>> tuple(gradient_dots(model, z, z).shape)
    (3, 3)
    """
    options = {"parameters": parameters, "loss": loss, "forward": forward}
    left = per_sample_gradients(model, *first, **options)  # type: ignore[arg-type]
    right = per_sample_gradients(model, *second, **options)  # type: ignore[arg-type]
    return torch.stack([left[k].flatten(1) @ right[k].flatten(1).T for k in left]).sum(dim=0)


def _gradient_function(
    model: nn.Module,
    parameters: str | Sequence[str] | None,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    forward: Forward | None,
) -> tuple[Callable[[dict[str, Tensor], Any, Tensor], dict[str, Tensor]], dict[str, Tensor]]:
    """The gradient of one example's loss as a function of the chosen weights, and those weights."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {k: v for k, v in weights.items() if matches(k, parameters)}
    require(bool(chosen), "parameters", repr(parameters), f"names among {', '.join(weights)}")
    fixed = {k: v for k, v in weights.items() if k not in chosen}
    fixed |= {name: b.detach() for name, b in model.named_buffers()}
    criterion = loss or nn.functional.cross_entropy

    class Whole(nn.Module):  # functional_call swaps weights only for calls through a module
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Tensor:
            return model_outputs(self.model, x, forward)

    whole = Whole()

    def one_loss(moving: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        everything = {f"model.{name}": value for name, value in {**fixed, **moving}.items()}
        outputs = torch.func.functional_call(
            whole, everything, (map_tensors(x, lambda t: t[None]),)
        )
        return criterion(outputs, y[None])

    return torch.func.grad(one_loss), chosen


def matches(name: str, parameters: str | Sequence[str] | None) -> bool:
    if parameters is None:
        return True
    prefixes = (parameters,) if isinstance(parameters, str) else parameters
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


# ── Gradient lengths at linear layers ────────────────────────────────────────────────────────────


def squared_linear_norms(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    layers: str | Sequence[str] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    forward: Forward | None = None,
) -> Tensor:
    r"""Squared length of each example's loss gradient at linear layers, forming no gradient.

    With inputs :math:`a_t` and output gradients :math:`\delta_t` of a layer at the positions t of
    an example: :math:`\sum_{t,u}(a_t\cdot a_u)(\delta_t\cdot\delta_u)` for the weight plus
    :math:`\lVert\sum_t\delta_t\rVert^2` for the bias, summed over layers; one position gives
    :math:`\lVert\delta\rVert^2(\lVert a\rVert^2+1)`. A layer that runs several times in a forward
    pass has the positions of all its runs.

    Parameters
    ----------
    layers : names or prefixes of modules; all `nn.Linear` below them. None: all of the model.
    loss : maps (outputs (n, C), labels (n,)) to one loss an example, or to their sum; by default
        cross-entropy.

    Returns (n,). Raises InputError where no linear layer is chosen or runs, where its weight is
    tied to a layer of another kind, where its input does not have the example as first axis.
    One forward and one backward pass, plus O(n L min(L (p + q), p q)) a layer p to q wide.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.zero_()
    >>> squared_linear_norms(model, torch.tensor([[2.0]]), torch.tensor([0])).tolist()
    [2.0]
    """
    inputs, labels = on_model_device(model, inputs), on_model_device(model, labels)
    chosen = _linear_layers(model, layers)
    runs: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in chosen}

    def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        runs[layer].append((args[0].detach(), output))

    handles = [layer.register_forward_hook(hook) for layer in chosen]
    try:
        with evaluating(model), requiring_grad(chosen), torch.enable_grad():
            outputs = model_outputs(model, inputs, forward)
            losses = (loss or _each_cross_entropy)(outputs, labels)
            flat = [output for calls in runs.values() for _, output in calls]
            require(bool(flat), "layers", "layers that did not run", "ones the forward pass uses")
            deltas = iter(torch.autograd.grad(losses.sum(), flat, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    total = torch.zeros(len(labels), device=flat[0].device, dtype=flat[0].dtype)
    for layer, calls in runs.items():
        if calls:
            a = torch.cat([by_position(received, len(labels)) for received, _ in calls], dim=1)
            sent = [zero_if_none(next(deltas), output) for _, output in calls]
            delta = torch.cat([by_position(value, len(labels)) for value in sent], dim=1)
            total += outer_square(a, delta, layer.bias is not None)
    return total


def outer_square(a: Tensor, delta: Tensor, bias: bool) -> Tensor:
    """|sum_t delta_t a_t'|^2 an example, by whichever product is smaller; plus the bias."""
    (_, length, p), q = a.shape, delta.shape[-1]
    if length == 1:
        square = a.square().sum((1, 2)) * delta.square().sum((1, 2))
    elif length * (p + q) < p * q:
        square = ((a @ a.mT) * (delta @ delta.mT)).sum((1, 2))
    else:
        square = (delta.mT @ a).square().sum((1, 2))
    return square + delta.sum(1).square().sum(1) if bias else square


def zero_if_none(gradient: Tensor | None, output: Tensor) -> Tensor:
    """A layer may run without the loss using what it put out."""
    return torch.zeros_like(output) if gradient is None else gradient


def by_position(value: Tensor, n: int) -> Tensor:
    fits = value.ndim >= 2 and len(value) == n
    require(fits, "layers", f"an input {tuple(value.shape)}", f"the {n} examples as first axis")
    return value.reshape(n, -1, value.shape[-1])


def _linear_layers(model: nn.Module, layers: str | Sequence[str] | None) -> list[nn.Linear]:
    linear = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    everything = layers in ("", [""])
    chosen = {k: m for k, m in linear.items() if everything or matches(k, layers)}
    require(bool(chosen), "layers", repr(layers), f"linear layers among {', '.join(linear)}")
    weights = {id(m.weight) for m in chosen.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            continue
        tied = any(id(p) in weights for p in module.parameters(recurse=False))
        require(not tied, "layers", f"a weight tied to {name}", "ones of linear layers alone")
    return list(chosen.values())


@contextmanager
def requiring_grad(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Frozen layers need a graph too."""
    before = [(p, p.requires_grad) for layer in layers for p in layer.parameters(recurse=False)]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _each_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels.long(), reduction="none")
